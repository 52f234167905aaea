"""One table of all runs: complete, typed, each row once, and nothing written where two sources disagree."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from axmoe_lite import paths, runs
from axmoe_lite.runs import Run, collect, store
from axmoe_lite.runs.notes import studies
from axmoe_lite.runs.tables import codes_of

KEY = ("multiplier", "seed")
ORIGIN = {"dataset": "cifar100", "n_train": 50000, "n_test": 10000, "scale": "quick", "seed": 0, "epochs": 60}
ORIGIN |= {"device": "toy", "commit": "1234567890", "date": "2026-01-01", "version": "0.1.0", "seconds": 1.5}


def row(multiplier="KV6", **changed):
    return {"multiplier": multiplier, "top1": 0.5, **ORIGIN, **changed}


@pytest.fixture
def made(elsewhere, monkeypatch):
    """made(rows, parameters…): a run that has recorded these rows and ended, one minute after the run before."""
    minutes = iter(range(60))

    def write(
        rows, *, chapter="toy", study="study", source="aaaaaaaa", key=KEY, about="", state="finished", **parameters
    ):
        run = Run(chapter, {"scale": "quick", "seed": 0, **parameters}, source)
        store.begin(run, notebook=json.dumps({"cells": []}))
        with monkeypatch.context() as inside:
            inside.setenv("AXMOE_RUN", str(run.folder))
            if rows:
                runs.record(study, rows, key=key, about=about)
        ended = f"2026-01-01T10:{next(minutes):02}:00+01:00"
        store.write_json(run.folder / "outcome.json", {"state": state, "ended": ended})
        return run

    return write


def file_of(run, scale="quick", study="study"):
    return run.folder / "rows" / scale / f"{study}.csv"


def test_one_tidy_table_of_two_studies(made):
    first = made([row(), row("KVA", top1=1)], seed=0)
    second = made([row(seed=1, top1=None)], seed=1)
    other = made([row(good=True, note="a, b\nc", code="007")], chapter="other", study="apart", key=("multiplier",))
    found = collect()
    assert found.runs == 3 and found.skipped == {} and found.published is None
    assert found.files == [paths.runs_dir() / "collected.parquet", paths.runs_dir() / "collected.csv"]
    rows = found.table.to_pylist()
    assert found.table.column_names[:4] == ["run", "chapter", "study", "multiplier"]
    told = {(r["run"], r["chapter"], r["study"], r["multiplier"], r["seed"], r["top1"], r["good"]) for r in rows}
    assert told == {
        (other.id, "other", "apart", "KV6", 0, 0.5, True),
        (first.id, "toy", "study", "KV6", 0, 0.5, None),
        (first.id, "toy", "study", "KVA", 0, 1.0, None),
        (second.id, "toy", "study", "KV6", 1, None, None),
    }
    kinds = {name: str(found.table.schema.field(name).type) for name in ("seed", "top1", "good")}
    assert kinds == {"seed": "int64", "top1": "double", "good": "bool"}
    assert rows[0]["commit"] == "1234567890" and rows[0]["code"] == "007" and rows[0]["note"] == "a, b\nc"
    again = pq.read_table(found.files[0])
    assert again.to_pylist() == rows and str(again.schema.field("device").type) == "string"
    assert json.loads(again.schema.metadata[b"keys"]) == {"apart": ["multiplier"], "study": list(KEY)}
    as_text = found.files[1].read_text()
    assert (
        as_text.startswith('"run","chapter","study","multiplier"') and f'"{second.id}","toy","study","KV6",,' in as_text
    )
    assert sorted(p.name for p in paths.runs_dir().iterdir()) == ["collected.csv", "collected.parquet", "other", "toy"]


def test_runs_that_have_not_finished_are_counted_and_not_read(made):
    made([row()])
    made([row(top1=0.1)], state="failed", seed=1)
    interrupted = made([row(top1=0.2)], seed=2)
    (interrupted.folder / "outcome.json").unlink()
    found = collect()
    assert found.runs == 1 and found.skipped == {"failed": 1, "interrupted": 1} and found.table.num_rows == 1
    assert "1 row of 1 study from 1 finished run:" in str(found) and "Not read: 1 failed, 1 interrupted." in str(found)


def test_finished_runs_without_rows_make_an_empty_table(made):
    made([])
    assert collect().table.num_rows == 0


def test_there_must_be_something_to_collect(made, elsewhere):
    with pytest.raises(ValueError, match=r"no finished run to collect in .*runs \(none at all\)"):
        collect()
    made([row()], state="failed")
    with pytest.raises(ValueError, match=r"\(1 failed\)"):
        collect()
    made([row()], chapter="05_networks")
    for name in ("05_networks", "05", "5", "networks"):
        assert collect(chapters=[name]).runs == 1
    with pytest.raises(
        ValueError, match=r"called 'netwroks'\. Did you mean '05_networks'\? There are 05_networks, toy"
    ):
        collect(chapters=["netwroks"])


def test_a_row_that_two_runs_measured_alike_is_refused_or_the_later_is_kept(made):
    late = made([row(seconds=9.0, commit="later", date="2026-01-02")])
    early = made([row(), row("KVA")], source="bbbbbbbb")
    for run, ended in ((early, "10:00:00+01:00"), (late, "09:30:00+00:00")):  # half an hour apart
        store.write_json(run.folder / "outcome.json", {"state": "finished", "ended": f"2026-01-01T{ended}"})
    with pytest.raises(ValueError) as refusal:
        collect()
    for part in ("1 duplicate row; nothing was written", "study, multiplier=KV6, seed=0, scale=quick"):
        assert part in str(refusal.value)
    for run in (early, late):
        assert f"{run.id} ({file_of(run)})" in str(refusal.value)
    assert "--keep-newest" in str(refusal.value) and not (paths.runs_dir() / "collected.csv").exists()
    kept = collect(keep_newest=True).table.to_pylist()
    assert sorted((r["run"], r["multiplier"], r["seconds"]) for r in kept) == sorted(
        [(late.id, "KV6", 9.0), (early.id, "KVA", 1.5)]
    )


@pytest.mark.parametrize("keep_newest", [False, True])
def test_rows_that_disagree_are_refused_with_both_sources_and_values(made, keep_newest):
    one = made([row(), row("KVA"), *(row(f"m{n}") for n in range(5))])
    two = made([row(), row("KVA", top1=0.25), *(row(f"m{n}", top1=n) for n in range(5))], source="bbbbbbbb")
    with pytest.raises(ValueError) as refusal:
        collect(keep_newest=keep_newest)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "6 conflicting and 1 duplicate rows; nothing was written."
    at = lines.index("  conflicting: study, multiplier=KVA, seed=0, scale=quick")
    assert lines[at + 1 : at + 3] == [
        f"    {one.id} ({file_of(one)}): top1 0.5",
        f"    {two.id} ({file_of(two)}): top1 0.25",
    ]
    assert "  … and 4 more" in lines and not (paths.runs_dir() / "collected.parquet").exists()


def test_a_parameter_that_the_key_does_not_name_is_told(made):
    made([row()], retrain_epochs=2)
    made([row(top1=0.75)], retrain_epochs=5)
    with pytest.raises(
        ValueError, match=r"These runs differ in retrain_epochs \([25], [25]\), which the key does not name"
    ):
        collect()


def test_rows_of_two_scales_are_no_duplicates(made):
    made([row()])
    made([row(scale="paper", top1=0.75)], source="bbbbbbbb")
    assert collect().table.num_rows == 2


def test_only_runs_of_the_present_code(made):
    old = made([row(top1=0.1)])
    now = store.source_digest(old.folder / "source.ipynb")
    made([row()], source=now)
    found = collect(current=True)
    assert found.table["top1"].to_pylist() == [0.5] and found.skipped == {"made by other code": 1}


def test_two_keys_of_one_study_are_refused(made):
    first, second = made([row()]), made([row("KVA")], key=("multiplier",), source="bbbbbbbb")
    with pytest.raises(ValueError) as refusal:
        collect()
    assert all(f"{run.id} ({file_of(run)})" in str(refusal.value) for run in (first, second))


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("KVA,0.5,cifar100", "KVA,0.5,", r"study\.csv, line 3: no dataset"),
        ("KVA,0.5,", ",0.5,", r"study\.csv, line 3: no multiplier"),
        ("dataset", "data", r"study\.csv, line 2: no dataset"),
        ("KVA,0.5,", "KVA,", r"study\.csv is not readable as CSV"),
        ("top1", "run", r"study\.csv has a column 'run'"),
        ("top1", "dataset", r"study\.csv: its first line should name the columns, each differently"),
    ],
)
def test_a_file_without_evidence_or_out_of_shape_is_refused(made, before, after, problem):
    file = file_of(made([row(), row("KVA")]))
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ValueError, match=problem):
        collect()


def test_rows_that_nobody_recorded_are_refused(made):
    file = file_of(made([row()]))
    (file.parent / "studies.json").unlink()
    with pytest.raises(ValueError, match=r"study\.csv: studies\.json beside it does not say what names its rows"):
        collect()


def test_publishing_writes_paper_rows_and_what_made_them_and_says_so_once(made, elsewhere):
    for seed in (0, 1):
        made([row(seed=seed, scale="paper")], seed=seed, about="a toy's top-1")
    made([row()], seed=2)
    found = collect(publish=True, to=elsewhere / "out" / "july.csv")
    assert found.published == {"study": 2} and found.files[0] == elsewhere / "out" / "july.parquet"
    assert f"Written to {paths.results_dir() / 'study'}.csv: 2 rows." in str(found)
    rows = runs.read("study")
    assert [(r["seed"], r["scale"], r["commit"]) for r in rows] == [(s, "paper", "1234567890") for s in "01"]
    note = {"key": list(KEY), "about": "a toy's top-1", "made_by": "axmoe sweep toy scale=quick seed=0,1"}
    assert studies(paths.results_dir()) == {"study": note}
    assert [path.name for path in paths.results_dir().glob("*.csv")] == ["study.csv"]
    before = (paths.results_dir() / "study.csv").stat().st_mtime_ns
    again = collect(publish=True)
    assert again.published == {"study": 0} and "Nothing of scale 'paper' is new" in str(again)
    assert (paths.results_dir() / "study.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize("keep_newest", [False, True])
def test_committed_rows_are_never_replaced_by_another_result(made, keep_newest):
    committed = runs.record("study", [row(scale="paper"), row("KVA", scale="paper")], key=KEY)
    before = committed.read_text()
    made([row(scale="paper", seed=5)], study="apart", seed=1)
    run = made([row(scale="paper", top1=0.75, date="2027-01-01"), row("KVA", scale="paper", date="2027-01-01")])
    with pytest.raises(ValueError) as refusal:
        collect(publish=True, keep_newest=keep_newest)
    lines = str(refusal.value).splitlines()
    assert f"    {committed}: top1 0.5" in lines and f"    {run.id} ({file_of(run, 'paper')}): top1 0.75" in lines
    assert committed.read_text() == before and not (committed.parent / "apart.csv").exists(), "all or nothing"
    assert not (paths.runs_dir() / "collected.parquet").exists()


@pytest.mark.parametrize(("keep_newest", "date"), [(False, "2026-01-01"), (True, "2027-01-01")])
def test_a_committed_row_that_agrees_stays_unless_the_newest_is_wanted(made, keep_newest, date):
    runs.record("study", [row(scale="paper")], key=KEY)
    made([row(scale="paper", date="2027-01-01", seconds=3.0)])
    assert collect(publish=True, keep_newest=keep_newest).published == {"study": int(keep_newest)}
    assert [r["date"] for r in runs.read("study")] == [date]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"rows": [{**row(scale="paper"), "loss": 1}]}, "other columns .*loss"),
        ({"key": ("multiplier",)}, "are named by"),
    ],
)
def test_rows_that_do_not_fit_the_committed_file_are_refused(made, changed, problem):
    runs.record("study", [row(scale="paper")], key=KEY)
    made(**{"rows": [row("KVA", scale="paper")], **changed})
    with pytest.raises(ValueError, match=problem):
        collect(publish=True)
    assert len(runs.read("study")) == 1


def test_many_columns_of_many_values_do_not_fold_into_one_another():
    values = [
        str(n) for n in range(1023)
    ]  # and null: 1024 a column, so that seven columns shift the first out of 64 bits
    columns = {f"c{n}": [*values, "0"] for n in range(1, 8)}
    codes = codes_of(pa.table({"c0": [*values, "1"], **columns}), [f"c{n}" for n in range(8)])
    assert len(set(codes.tolist())) == 1024, "the last row differs from the first in its first column"


MEASURED = """
import resource, sys, time
from axmoe_lite.runs import collect
import pyarrow.csv, pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
found = collect()
print(found.runs, found.table.num_rows, time.perf_counter() - start, found.table["top1"].combine_chunks().sum())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.trust("load", "a hundred thousand rows are collected")
def test_a_hundred_thousand_rows_of_a_thousand_runs_take_seconds_and_little_memory(elsewhere, record_property):
    """A million rows of a thousand runs took 18 s and 705 MB in all; ten thousand runs of one row 20 s and 380 MB."""
    names = list(row())
    for n in range(1000):
        run = Run("toy", {"seed": n}, "aaaaaaaa")
        store.begin(run, notebook="")
        folder = run.folder / "rows" / "quick"
        folder.mkdir(parents=True)
        rows = [row(f"m{i}", seed=n, top1=i / 128) for i in range(1000 if n % 10 == 0 else 1)]
        lines = [",".join(names), *(",".join(map(str, each.values())) for each in rows)]
        (folder / "study.csv").write_text("\n".join(lines) + "\n")
        store.write_json(folder / "studies.json", {"study": {"key": list(KEY)}})
        store.write_json(run.folder / "outcome.json", {"state": "finished", "ended": "2026-01-01T10:00:00+01:00"})
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    n_runs, n_rows, seconds, total, megabytes = map(float, done.stdout.split())
    record_property("cases", int(n_rows))
    # Sums of 0..999 over 128 are exact, 100 times; the runs of one row have 0.
    assert (n_runs, n_rows, total) == (1000, 100_900, 100 * 999 * 500 / 128)
    assert seconds < 60 and megabytes < 300

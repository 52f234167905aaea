"""Evidence: complete or refused, written whole, and true for what is committed."""

import json
import subprocess
import sys

import pytest

from axmoe_lite import EVOAPPROX, multiplier, paths, runs
from axmoe_lite.runs.evidence import command, recorded
from axmoe_lite.runs.notes import studies

ROW = {"multiplier": "mul8s_1L2J", "top1": 0.123456789, "seconds": 1.5}
KEY = ("multiplier", "seed")


@pytest.fixture
def origin(textures):
    return runs.evidence(textures, scale="quick", seed=0, epochs=2)


def test_evidence_says_where_a_number_comes_from(origin, textures):
    assert set(runs.EVIDENCE) == {*origin, "seconds"}
    assert (origin["dataset"], origin["n_train"], origin["n_test"]) == ("synthetic", 256, 64)
    assert "threads" in origin["device"] and origin["date"].startswith("20")
    with pytest.raises(ValueError, match="'full'.*'quick', 'paper'"):
        runs.evidence(textures, scale="full", seed=0, epochs=1)


def test_commit_marks_changed_code(monkeypatch, tmp_path):
    assert runs.commit() != ""
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)  # no repository there
    assert runs.commit() == "unknown"


def test_record_and_read(elsewhere, origin):
    path = runs.record("study", [{**ROW, **origin}], key=KEY)
    assert path == elsewhere / "data" / "cache" / "results" / "study.csv"
    (row,) = runs.read("study", scale="quick")
    assert row["top1"] == "0.123457" and row["n_test"] == "64"
    assert runs.read("study", scale="paper") == [] and runs.read("other") == []
    paper = runs.record("study", [{**ROW, **origin, "scale": "paper"}], key=KEY)
    assert paper == elsewhere / "data" / "results" / "study.csv"


def test_a_row_of_the_same_key_is_replaced_and_others_are_kept(elsewhere, origin):
    runs.record("study", [{**ROW, **origin}, {**ROW, **origin, "seed": 1}], key=KEY)
    runs.record("study", [{**ROW, **origin, "top1": 0.9}], key=KEY)
    assert [(r["seed"], r["top1"]) for r in runs.read("study", scale="quick")] == [("0", "0.9"), ("1", "0.123457")]
    files = sorted(p.name for p in (elsewhere / "data" / "cache" / "results").iterdir())
    assert files == ["studies.json", "study.csv"], "no half-written file is left"


def test_other_columns_than_the_files_are_refused_and_the_file_stays(elsewhere, origin):
    path = runs.record("study", [{**ROW, **origin}], key=KEY)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"study\.csv has other columns than these rows \(loss\)"):
        runs.record("study", [{**ROW, "loss": 1.0, **origin}], key=KEY)
    assert path.read_text() == before and len(list(path.parent.iterdir())) == 2


def test_rows_without_evidence_are_refused(elsewhere, origin):
    for spoiled, problem in [
        ([], "No rows"),
        ([ROW], "has no dataset"),
        ([{**ROW, **origin, "commit": ""}], "has no commit"),
        ([{**ROW, **origin}, {"extra": 1, **ROW, **origin}], "has columns"),
        ([{**ROW, **origin}, {**ROW, **origin, "scale": "paper"}], "several scales"),
    ]:
        with pytest.raises(ValueError, match=problem):
            runs.record("study", spoiled, key=KEY)
    assert not (elsewhere / "data").exists()


def test_a_file_without_evidence_is_refused(elsewhere, origin):
    path = runs.record("study", [{**ROW, **origin}], key=KEY)
    path.write_text(path.read_text().replace("synthetic", ""))
    with pytest.raises(ValueError, match=r"study\.csv, line 2: no dataset"):
        runs.read("study", scale="quick")


def test_a_study_keeps_its_key_and_the_latest_words_about_it(elsewhere, origin):
    row = {**ROW, **origin}
    path = runs.record("study", [row], key=KEY, about="top-1 of a toy", made_by="by hand")
    runs.record("study", [row], key=("seed", "multiplier"))  # says nothing new, in another order
    assert studies(path.parent) == {"study": {"key": list(KEY), "about": "top-1 of a toy", "made_by": "by hand"}}
    runs.record("another", [row], key=("seed",), about="one a seed")
    runs.record("study", [row], key=KEY, about="top-1 of a better toy")
    assert {name: note["about"] for name, note in studies(path.parent).items()} == {
        "another": "one a seed",
        "study": "top-1 of a better toy",
    }
    before = path.read_text()
    with pytest.raises(ValueError, match=r"study\.csv are named by multiplier, seed, these by seed; give the same key"):
        runs.record("study", [{**row, "seed": 7}], key=("seed",))
    assert path.read_text() == before and studies(path.parent)["study"]["key"] == list(KEY)


def test_a_key_that_cannot_name_the_rows_of_an_old_file_drops_none_of_them(elsewhere, origin):
    path = runs.record("study", [{**ROW, **origin}, {**ROW, **origin, "seed": 1}], key=KEY)
    (path.parent / "studies.json").unlink()  # a file from before keys were set down
    with pytest.raises(ValueError, match="several rows with the same multiplier"):
        runs.record("study", [{**ROW, **origin}], key=("multiplier",))
    assert len(runs.read("study", scale="quick")) == 2


@pytest.fixture
def run_folder(elsewhere, monkeypatch):
    """This process is part of a run."""
    folder = elsewhere / "data" / "runs" / "05_networks" / "3f2a9c1b-77ab12cd"
    folder.mkdir(parents=True)
    told = {"chapter": "05_networks", "parameters": {"scale": "quick", "seed": 1}, "source": "77ab12cd"}
    (folder / "run.json").write_text(json.dumps(told))
    monkeypatch.setenv("AXMOE_RUN", str(folder))
    return folder


def test_a_run_writes_into_its_own_folder_and_reads_there_first(run_folder, elsewhere, origin, monkeypatch):
    def top1(scale="quick"):
        return [row["top1"] for row in runs.read("study", scale=scale)]

    monkeypatch.delenv("AXMOE_RUN")
    shared = [runs.record("study", [{**ROW, **origin, "scale": scale, "top1": 0.5}], key=KEY) for scale in runs.SCALES]
    before = [path.read_bytes() for path in shared]
    assert recorded("study", scale="quick") == [], "outside a run, nothing is one's own"
    monkeypatch.setenv("AXMOE_RUN", str(run_folder))
    assert top1() == ["0.5"] and recorded("study", scale="quick") == [], (
        "what others measured is read, but not one's own"
    )
    own = [runs.record("study", [{**ROW, **origin, "scale": s, "seed": 9, "top1": 0.75}], key=KEY) for s in runs.SCALES]
    assert own == [run_folder / "rows" / scale / "study.csv" for scale in runs.SCALES]
    assert top1() == top1("paper") == ["0.75"] and recorded("study", scale="paper")[0]["seed"] == "9"
    assert studies(own[0].parent)["study"]["made_by"] == "axmoe run 05_networks scale=quick seed=1"
    assert before == [path.read_bytes() for path in shared] and top1("paper") == ["0.75"]


def test_the_command_that_makes_the_rows_of_several_runs():
    some = [{"scale": "paper", "seed": seed, "circuit": name} for seed in (0, 1) for name in ("drum(4)", "roba()")]
    assert command("05_networks", *some) == "axmoe sweep 05_networks scale=paper seed=0,1 'circuit=drum(4),roba()'"
    last = "axmoe run 05_networks scale=paper seed=1 'circuit=drum(4)' (the last of 3 runs)"
    assert command("05_networks", *some[:3]) == last, "three of four are no grid"
    assert command("05_networks", some[2], some[2]) == last.split(" (the")[0], "the same run twice is one run"


RECORDS = """
import sys
from axmoe_lite import runs
origin = runs.evidence(8, scale="quick", seed=int(sys.argv[1]), epochs=0)
print("ready", flush=True)
sys.stdin.readline()
for step in range(40):
    row = {"step": step, "seconds": 0.1, **origin}
    runs.record("shared", [row], key=("seed", "step"))
    runs.record(f"own_{sys.argv[1]}", [row], key=("seed", "step"))
"""


@pytest.mark.trust("load", "processes record one study at once")
def test_processes_that_record_one_study_at_once_lose_nothing(elsewhere, record_property):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RECORDS, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # all at once
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    for writer in writers:
        writer.stdin.close(), writer.stdout.close()
    rows = runs.read("shared", scale="quick")
    record_property("cases", len(rows))
    assert sorted((int(r["seed"]), int(r["step"])) for r in rows) == [(s, n) for s in range(3) for n in range(40)]
    assert sorted(studies(elsewhere / "data" / "cache" / "results")) == ["own_0", "own_1", "own_2", "shared"]


def test_the_committed_resilience_rows():
    rows = runs.read("resilience_resnet20_cifar100")
    top1 = {row["multiplier"]: float(row["top1"]) for row in rows}
    assert list(top1) == ["float32", *EVOAPPROX, "swap:mul8s_1KVM"]
    assert {row["n_test"] for row in rows} == {"10000"} and {row["scale"] for row in rows} == {"paper"}
    assert all(abs(int(row["correct"]) / 10_000 - float(row["top1"])) < 1e-6 for row in rows)
    assert all(row["digest"] == multiplier(row["multiplier"]).digest for row in rows[1:])
    assert top1["float32"] >= 0.64 and abs(top1["mul8s_1KV6"] - top1["float32"]) <= 0.005

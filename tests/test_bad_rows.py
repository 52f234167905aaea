"""Rows, notes, run folders and notebooks that are broken: refused by their file's name, and never changed by that."""

import csv
import io
import json
import random
import re
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from axmoe_lite import paths, runs, verify
from axmoe_lite.runs import Run, collect, compare, parameters, store
from axmoe_lite.runs.evidence import EVIDENCE
from axmoe_lite.runs.ledger import ledger
from axmoe_lite.runs.notebooks import load
from axmoe_lite.runs.notes import studies
from axmoe_lite.runs.tables import read_rows, read_text

ROWS = pytest.mark.trust("input", "rows, notes and run folders")
NOTEBOOKS = pytest.mark.trust("input", "notebooks and their parameters")
KEPT = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)  # one folder for all examples

ORIGIN = {"dataset": "digits", "n_train": 9, "n_test": 9, "scale": "paper", "seed": 0, "epochs": 1, "device": "toy"}
ORIGIN |= {"commit": "1234567890", "date": "2026-01-01", "version": "0.1.0", "seconds": 1.5}
DEEP = "[" * 100_000


def row(multiplier="KVA", **changed):
    return {"multiplier": multiplier, "top1": 0.5, **ORIGIN, **changed}


@pytest.fixture
def study(elsewhere):
    """A file of two rows."""
    return runs.record("study", [row(), row("KV6", top1=0.25)], key=("multiplier",))


def readers(file):
    """All that read a file of rows: each by itself, for each has its own way to stumble."""
    return {
        "read_rows": lambda: read_rows(file),
        "read_text": lambda: read_text(file),
        "read": lambda: runs.read(file.stem),
        "compare": lambda: compare(str(file), str(file), by=["multiplier"]),
        "ledger": ledger,
        "record": lambda: runs.record(file.stem, [row()], key=("multiplier",)),
    }


def lines_with(change):
    return lambda text: "".join(change(text.splitlines(keepends=True)))


BROKEN = {
    "empty": lambda text: "",
    "a blank line": lambda text: "\n",
    "a name twice": lambda text: text.replace("top1", "multiplier", 1),
    "a column without a name": lambda text: text.replace("top1", "", 1),
    "a cell too many": lines_with(lambda lines: [*lines[:2], lines[2].replace("\n", ",9\n")]),
    "a cell too few": lines_with(lambda lines: [*lines[:2], lines[2].rpartition(",")[0] + "\n"]),
    "cut in a line": lambda text: text[:-9],
    "quotes that do not close": lambda text: text.replace("KV6", '"KV6'),
    "not UTF-8": lambda text: text.replace("KV6", "KV\udcff"),
    "UTF-16": lambda text: text.encode("utf-16").decode("utf-8", "surrogateescape"),
    "a picture": lambda text: "\udc89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9,
}


@ROWS
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_of_rows_is_refused_by_its_name_and_stays_as_it_is(study, how, record_property):
    content = BROKEN[how](study.read_text()).encode("utf-8", "surrogateescape")
    tried = readers(study)
    for name, read in tried.items():
        study.write_bytes(content)
        with pytest.raises(ValueError, match="study.csv") as refused:
            read()
        assert study.read_bytes() == content, name
        assert len(str(refused.value)) < 700, name
    record_property("cases", len(tried))


@ROWS
@pytest.mark.parametrize("column", [*EVIDENCE, "multiplier"])
def test_a_file_without_a_column_or_a_cell_that_is_needed_is_refused(study, column, record_property):
    whole = list(csv.reader(io.StringIO(study.read_text())))
    at = whole[0].index(column)
    for rows in (
        [line[:at] + line[at + 1 :] for line in whole],
        [whole[0], *([*r[:at], "", *r[at + 1 :]] for r in whole[1:])],
    ):
        with study.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        before = study.read_bytes()
        if column in EVIDENCE:
            with pytest.raises(ValueError, match=rf"study.csv, line 2: no {column}"):
                runs.read("study")
        with pytest.raises(ValueError, match="study"):
            runs.record("study", [row("KV7"), row("KV8")], key=("multiplier",))
        assert study.read_bytes() == before
    record_property("cases", 2)


@ROWS
@pytest.mark.parametrize("change", ["\ufeff{}", "{}\n\n", "windows"])
def test_what_a_spreadsheet_does_to_a_file_changes_no_row(study, change, record_property):
    text, rows = study.read_text(), runs.read("study")
    study.write_bytes((text.replace("\n", "\r\n") if change == "windows" else change.format(text)).encode())
    assert runs.read("study") == rows == read_rows(study)
    assert read_text(study).to_pylist() == rows
    assert len(compare(str(study), str(study), by=["multiplier"]).pairs) == 2
    assert read_rows(runs.record("study", [row("KV8")], key=("multiplier",)))[:2] == rows
    record_property("cases", 4)


@ROWS
def test_cells_that_need_quotes_come_back_whole(elsewhere):
    odd = ['a "b"', "a, b", "a\nb", "ä€", " ", "'", "\u2028", "x" * 100_000]
    file = runs.record("study", [row(name) for name in odd], key=("multiplier",))
    assert [r["multiplier"] for r in runs.read("study")] == odd
    assert read_text(file)["multiplier"].to_pylist() == odd
    file.write_text(file.read_text().replace("x" * 100_000, "x" * 200_000))
    with pytest.raises(ValueError, match="study.csv is not readable as CSV"):  # csv's own limit: 131,072 letters a cell
        runs.read("study")


@ROWS
def test_text_where_a_number_is_needed_is_refused(study):
    whole = study.read_text()
    study.write_text(whole.replace("0.25", "many"))
    with pytest.raises(ValueError, match=r"top1 of .*study.csv is no number"):
        compare(str(study), str(study), by=["multiplier"], values=["top1"])
    study.write_text(whole.replace("digits,9,9", "digits,9,many"))
    with pytest.raises(ValueError, match="study.csv has n_test 'many'"):
        ledger()


@ROWS
@KEPT
@given(st.integers(0, 2**32))
def test_whatever_happens_to_a_file_its_rows_are_whole_or_it_is_refused(tmp_path_factory, seed):
    draw = random.Random(seed)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(row()), lineterminator="\n")
    writer.writeheader()
    writer.writerows([row(), row("KV6"), row('a "b", c')])
    content = bytearray(text.getvalue().encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        change = draw.choice(("flip", "cut", "insert", "repeat"))
        if change == "flip" and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif change == "cut":
            del content[at : at + draw.choice((1, 5, 10**6))]
        elif change == "insert":
            content[at:at] = draw.choice((b"\0", b",", b'"', b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", "€".encode()))
        else:
            content[at:at] = content[at : at + 20]
    file = tmp_path_factory.getbasetemp() / "drawn.csv"
    file.write_bytes(content)
    for read in (read_rows, lambda path: read_text(path).to_pylist()):
        try:
            rows = read(file)
        except ValueError as refused:
            assert str(file) in str(refused)
        else:
            assert len({tuple(r) for r in rows}) < 2 and all(None not in r for r in rows)


@ROWS
@pytest.mark.parametrize(
    ("name", "column"),
    [("explorer_resnet8_digits", c) for c in ("multiplier", "mae", "top1")]
    + [("claims", "part"), ("claims", "verdict")],
)
def test_committed_rows_without_a_column_are_not_verified(elsewhere, name, column):
    source = paths.CHECKOUT / "data" / "results" / f"{name}.csv"
    kept = [{k: v for k, v in r.items() if k != column} for r in read_rows(source)]
    target = elsewhere / "data" / "results" / f"{name}.csv"
    target.parent.mkdir(parents=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(kept[0]))
        writer.writeheader()
        writer.writerows(kept)
    with pytest.raises(ValueError, match=rf"{name}.csv has no column {column}"):
        verify.possible([name])


# ---------------------------------------------------------------------------------- notes

NOTES = {
    "empty": "",
    "half of it": '{"study": {"key": ["multi',
    "a list": "[]",
    "a number": "7",
    "nothing": "null",
    "too deep": DEEP,
    "not UTF-8": b"\xff\xfe",
    "a study that is a text": '{"study": "multiplier"}',
    "no key": '{"study": {"about": "x"}}',
    "an empty key": '{"study": {"key": []}}',
    "a key that is a text": '{"study": {"key": "multiplier"}}',
    "a key of numbers": '{"study": {"key": [1]}}',
    "about a number": '{"study": {"key": ["multiplier"], "about": 1}}',
    "made by a list": '{"study": {"key": ["multiplier"], "made_by": []}}',
}


@ROWS
@pytest.mark.parametrize("how", NOTES)
def test_broken_notes_are_refused_by_their_name_and_no_row_is_written(study, how, record_property):
    notes, text = study.with_name("studies.json"), NOTES[how]
    notes.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = study.read_bytes()
    again = lambda: runs.record("study", [row("KV8")], key=("multiplier",))  # noqa: E731
    tried = [lambda: studies(notes.parent), lambda: compare(str(study), str(study)), ledger, again]
    for read in tried:
        with pytest.raises(ValueError, match=r"studies.json (is not|holds no|tells of)"):
            read()
    assert study.read_bytes() == rows
    record_property("cases", len(tried))


# ---------------------------------------------------------------------------------- run folders

TEXTS = ["", "{", "[]", "7", "null", '"x"', DEEP, '{"state": "finish', "{}\0"]
OUTCOMES = [{"state": "done"}, {"state": None}, {"ended": "2026"}, {"state": ["finished"]}]
ENDS = [None, "", "yesterday", 7, "2026-13-01T00:00", []]


@pytest.fixture
def finished(elsewhere):
    """A run that has finished, with one row."""
    run = Run("toy", {"seed": 0}, "aaaaaaaa")
    store.begin(run, notebook='{"cells": []}')
    with store.inside(run.folder):
        runs.record("study", [row(scale="quick")], key=("multiplier",))
    store.write_json(run.folder / "outcome.json", {"state": "finished", "ended": "2026-01-01T10:00:00+01:00"})
    assert len(collect().table) == 1
    (paths.runs_dir() / "collected.csv").unlink()
    return run


def refused(run, name, content):
    """What collect() says with a file of the run in this shape; it writes nothing."""
    (run.folder / name).write_text(content)
    with pytest.raises(ValueError, match="delete its folder|Delete its folder") as told:
        collect()
    assert str(run.folder / name) in str(told.value) and len(str(told.value)) < 700
    assert not (paths.runs_dir() / "collected.csv").exists()


@ROWS
@pytest.mark.parametrize("name", ["run.json", "outcome.json"])
def test_a_run_whose_files_are_broken_is_named_with_what_to_do(finished, name, record_property):
    for text in TEXTS:
        refused(finished, name, text)
    record_property("cases", len(TEXTS))


@ROWS
def test_a_run_that_ended_in_no_known_way_is_named(finished, record_property):
    outcomes = [*OUTCOMES, *({"state": "finished", "ended": ended} for ended in ENDS), {"state": "finished"}]
    for outcome in outcomes:
        refused(finished, "outcome.json", json.dumps(outcome))
    record_property("cases", len(outcomes))


@ROWS
@pytest.mark.parametrize(
    "changed", [{"chapter": "../.."}, {"chapter": None}, {"parameters": {"seed": 1}}, {"source": 7}]
)
def test_a_run_that_says_it_is_another_is_named(finished, changed):
    refused(finished, "run.json", json.dumps(store.read_json(finished.folder / "run.json") | changed))


@ROWS
def test_things_in_place_of_a_run_do_no_harm(finished, record_property):
    there = paths.runs_dir()
    (there / "a file").write_text("x")
    (there / "toy" / "another file").write_text("x")
    (there / "toy" / "an empty folder").mkdir()
    (there / "toy" / "a link to nothing").symlink_to(there / "nowhere")
    (there / "toy" / "a circle").symlink_to(there / "toy" / "a circle")
    (there / "toy" / "up").symlink_to(there)
    (finished.folder / "rows" / "quick" / "a folder.txt").mkdir()
    assert [run.id for run in store.all_runs()] == [finished.id]
    assert len(collect().table) == 1
    (finished.folder / "outcome.json").unlink()
    (finished.folder / "outcome.json").mkdir()
    with pytest.raises(OSError, match=r"outcome\.json"):
        collect()
    record_property("cases", 8)


# ---------------------------------------------------------------------------------- notebooks

CELL = {
    "cell_type": "code",
    "metadata": {"tags": ["parameters"]},
    "source": "n = 1",
    "outputs": [],
    "execution_count": None,
}
FILES = {
    "empty": "",
    "half of it": json.dumps({"cells": [CELL]})[:-9],
    "a list": "[]",
    "a text": '"cells"',
    "too deep": DEEP,
    "not UTF-8": b'{"cells": ["\xff"]}',
    "UTF-16": json.dumps({"cells": [CELL]}).encode("utf-16"),
    "no cells": '{"nbformat": 4}',
    "cells by name": '{"cells": {}}',
    "cells of format 3": '{"worksheets": [{"cells": []}]}',
    **{
        f"a cell {cell!r}"[:40]: json.dumps({"cells": [cell]})
        for cell in (
            None,
            "n = 1",
            [],
            {},
            {**CELL, "cell_type": None},
            {**CELL, "source": None},
            {**CELL, "source": 7},
            {**CELL, "source": ["n = 1", 7]},
            {**CELL, "metadata": []},
            {**CELL, "metadata": {"tags": "parameters"}},
        )
    },
}


@NOTEBOOKS
@pytest.mark.parametrize("text", FILES.values(), ids=range(len(FILES)))
def test_what_is_no_notebook_is_refused_by_its_name(tmp_path, text, elsewhere):
    file = tmp_path / "broken.ipynb"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (load, parameters, lambda path: runs.sweep(path, {}, progress=False)):
        with pytest.raises(ValueError, match="broken.ipynb is no notebook") as told:
            read(file)
        assert len(str(told.value)) < 700
    assert not paths.runs_dir().exists()


SOURCES = [
    *(
        "n",
        "n = ",
        "n = 1 = 2",
        "n += 1",
        "n: int",
        "a, b = 1, 2",
        "n[0] = 1",
        "n.a = 1",
        "import os",
        "n = f()",
        "n = {}",
    ),
    *(
        "n = {1: 2}",
        "n = None",
        "n = b'x'",
        "n = 1j",
        "n = [[1]]",
        "n = (1,)",
        "n = [1, 'a']  # {1..2}",
        "n = ...",
        "n = -'1'",
    ),
    *(
        "n = 1\nn = 2",
        "n = float('nan')",
        "n = float('inf')",
        "n = 1e999",
        "n = [1e999]",
        "n = 1  # {2..3}",
        "n = 1  # {a, b}",
    ),
    *(
        "n = 1  # {1..x}",
        "n = 'x'  # {0..9}",
        "n = 'drum(99)'  # {multiplier}",
        "n = 1  # {multiplier}",
        "n = '\0'\0",
        "%magic",
    ),
    *(
        f"n = {'(' * 1000}1{')' * 1000}",
        f"n = {'-' * 50_000}1",
        f"n = {'[' * 90}{']' * 90}",
        f"n = {'9' * 5000}",
        "  n = 1",
    ),
    *(
        "n = 'a",
        "n = 1;;",
        "\ud800 = 1",
        "n = '''",
        "# only words\nx",
        "n = 1 if True else 2",
        "n = lambda: 1",
        "if 1: n = 1",
    ),
    *(
        "n = [1]  # {multiplier}",
        "n = 0  # {1.5..2.5}",
        "n = True  # {0..1}",
        "n = 'a'  # {b,(}",
    ),
]


@NOTEBOOKS
@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_a_cell_that_is_no_list_of_parameters_is_refused_and_starts_nothing(toy, elsewhere, source):
    file = toy("n = 1  # {0..}", name="cell")
    content = json.loads(file.read_text())
    content["cells"][0]["source"] = source
    file.write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match=r"The parameters cell of|a parameter",
    ):
        runs.sweep(file, {}, progress=False)
    assert not paths.runs_dir().exists()


@NOTEBOOKS
@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(max_size=40), st.text("n=1[](){}'\",.#-+ \n\\0e_:;", max_size=40)))
def test_no_parameters_cell_makes_the_reader_stumble(source):
    try:
        found = parameters({"cells": [{**CELL, "source": source}]})
    except ValueError as refused:
        assert str(refused).startswith("The parameters cell of the notebook: ")
    else:
        assert all(type(p.default) in (int, float, str, bool, list) for p in found.values())


@NOTEBOOKS
@settings(deadline=None, max_examples=300)
@given(st.integers(0, 2**32))
def test_a_notebook_with_a_wrong_piece_is_read_or_refused(tmp_path_factory, seed):
    """Any one thing in it becomes something else, of another type as a rule."""
    draw = random.Random(seed)
    content = {"cells": [dict(CELL), {"cell_type": "markdown", "metadata": {}, "source": ["# A", "b"]}], "nbformat": 4}
    places = [(content, "cells"), *((content["cells"], i) for i in (0, 1))]
    places += [(cell, name) for cell in content["cells"] for name in cell]
    places += [(content["cells"][0]["metadata"], "tags"), (content["cells"][1]["source"], 0)]
    where, name = draw.choice(places)
    where[name] = draw.choice([None, 0, 1.5, True, "", "x", "parameters", [], [None], ["x"], {}, {"x": 1}, [[]], [{}]])
    file = tmp_path_factory.getbasetemp() / "drawn.ipynb"
    file.write_text(json.dumps(content))
    try:
        parameters(file)
        assert re.fullmatch("[0-9a-f]{8}", store.source_digest(file))
    except ValueError as refused:
        assert str(file) in str(refused)


@NOTEBOOKS
def test_a_broken_run_is_an_error_of_one_line_on_the_command_line(finished):
    (finished.folder / "outcome.json").write_text("{")
    asked = [sys.executable, "-m", "axmoe_lite", "collect"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("axmoe collect: ") and done.stderr.count("\n") == 1

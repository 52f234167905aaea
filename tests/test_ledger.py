"""The ledger: it says what the files say, and every committed file is in it."""

import csv
import json
import shlex

import pytest
import torch

from axmoe_lite import paths, runs
from axmoe_lite.__main__ import main
from axmoe_lite.runs.ledger import BEGIN, END, is_kept, ledger, write_ledger
from axmoe_lite.runs.notes import studies
from axmoe_lite.train import save

KEY = ("multiplier", "seed")


def row_of(**changed):
    origin = runs.evidence(500, scale="paper", seed=0, epochs=0)
    return {"multiplier": "mul8s_1L2J", "top1": 0.5, "seconds": 1.5, **origin, **changed}


def cells(text: str, start: str) -> list[str]:
    """The cells of the first line of the tables that begins with this one."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{start}")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_committed_ledger_is_what_the_files_say():
    text = (paths.CHECKOUT / "data" / "README.md").read_text()
    assert text.split(BEGIN)[1].split(END)[0].strip() == ledger(), (
        "renew it: python -c 'from axmoe_lite import runs; runs.write_ledger()'"
    )


def test_the_ledger_s_examples_compare_what_is_there(capsys):
    lines = (paths.CHECKOUT / "data" / "README.md").read_text().splitlines()
    asked = [shlex.split(line) for line in lines if line.startswith("    axmoe compare")]
    there = [words[1:] for words in asked if not words[2].endswith(".parquet")]
    assert len(there) == 2
    for words in there:
        assert main(words) == 0
        assert "pairs by" in capsys.readouterr().out


def test_every_committed_study_has_a_key_that_names_its_rows_and_words():
    folder = paths.CHECKOUT / "data" / "results"
    known, files = studies(folder), {file.stem: file for file in folder.glob("*.csv")}
    assert set(known) == set(files)
    for study, file in files.items():
        with file.open(newline="") as opened:
            rows = list(csv.DictReader(opened))
        names = {tuple(row[column] for column in known[study]["key"]) for row in rows}
        assert len(names) == len(rows) > 0 and known[study]["about"] and known[study]["made_by"]


def test_it_counts_what_is_in_the_files(elsewhere):
    rows = [row_of(seed=seed, date=f"2026-01-0{1 + seed % 3}", commit=f"c{seed}") for seed in range(12)]
    runs.record("toy", rows, key=KEY, about="top-1 | a toy", made_by="axmoe run 05_networks")
    assert cells(ledger(), "results/toy.csv") == ["`results/toy.csv`", "top-1 \\| a toy", "`axmoe run 05_networks`"]
    number, measured_on, seeds, dates, commits, device = cells(ledger(), "toy`")[1:]
    assert (number, measured_on, dates) == ("12", "random numbers", "2026-01-01 to 2026-01-03")
    assert (seeds, commits) == ("0; 1; 2 and 9 more", "c0; c1; c2 and 9 more") and device.endswith("threads")
    recipe = {
        "epochs": 3,
        "dataset": "digits",
        "n_train": 1437,
        "seed": 4,
        "commit": "abc",
        "date": "2026-01-01",
        "lr": 1,
    }
    save(torch.nn.Linear(250, 1000), paths.checkpoints_dir() / "toy.safetensors", recipe=recipe)
    of_file = cells(ledger(), "checkpoints/toy.safetensors")[1:]
    assert of_file == ["digits, 1,437 images", "3", "4", "1.0 MB", "lr 1", "2026-01-01", "abc"]


def test_a_file_that_nobody_described_or_that_is_of_quick_scale_is_seen(elsewhere):
    path = runs.record("toy", [row_of()], key=KEY)
    assert "not described yet" in cells(ledger(), "results/toy.csv")[1]
    path.write_text(path.read_text().replace(",paper,", ",quick,"))
    assert cells(ledger(), "toy`")[1] == "1, quick!"


def test_recording_at_paper_scale_renews_it_and_leaves_the_rest_of_the_file(elsewhere):
    runs.record("toy", [row_of()], key=KEY)  # no file with marks: nothing to renew, nothing to complain of
    readme = elsewhere / "data" / "README.md"
    assert not readme.exists() and not is_kept()
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    runs.record("toy", [row_of(seed=1)], key=KEY)
    text = readme.read_text()
    assert text == f"before\n{BEGIN}\n\n{ledger()}\n\n{END}\nafter\n" and "old" not in text
    assert cells(text, "toy`")[1] == "2"
    runs.record("toy", [row_of(scale="quick", seed=2)], key=KEY)
    assert readme.read_text() == text


@pytest.mark.parametrize("text", ["no marks", f"{END} {BEGIN}", BEGIN])
def test_it_needs_its_two_marks(elsewhere, text):
    (elsewhere / "data").mkdir()
    readme = elsewhere / "data" / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="has no place for the ledger; add the lines\n<!-- ledger: begin"):
        write_ledger()
    assert readme.read_text() == text


def test_a_spoiled_studies_file_is_named(elsewhere):
    path = runs.record("toy", [row_of()], key=KEY)
    (path.parent / "studies.json").write_text(json.dumps({"toy": {}})[:-1])
    with pytest.raises(ValueError, match=r"studies\.json is not readable as JSON .* correct it by hand"):
        ledger()

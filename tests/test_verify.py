"""Committed rows measured again: what agrees, what differs, what cannot be measured here."""

import csv
import dataclasses
import shutil

import pytest

from axmoe_lite import paths, runs, verify
from axmoe_lite.__main__ import main


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """A copy of the committed rows and weights that a test may spoil, without photographs."""
    for folder in ("results", "checkpoints"):
        shutil.copytree(paths.CHECKOUT / "data" / folder, tmp_path / "data" / folder)
    monkeypatch.setenv("AXMOE_HOME", str(tmp_path))
    return tmp_path / "data" / "results"


def test_a_committed_row_still_comes_out():
    (checked,) = verify.verify(["explorer_resnet8_digits"], n=1, seed=3, progress=False)
    assert all(one.agrees for one in checked), verify.report(checked)
    assert {one.column for one in checked} == {"rank", "mae", "bias", "wce", "ep", "top1"}


def test_the_ledger_still_follows_from_its_rows():
    for checked in verify.verify(["claims"], n=2, progress=False):
        assert all(one.agrees for one in checked), verify.report(checked)


@pytest.mark.parametrize(
    ("column", "wrong", "agrees"),
    [("top1", 2.0 / 360, True), ("top1", 3.1 / 360, False), ("mae", 1e-3, False), ("rank", 1, False)],
)
def test_a_number_that_was_changed_is_found(column, wrong, agrees):
    row = dict(next(r for r in runs.read("explorer_resnet8_digits") if r["multiplier"] == "mul8s_1L2J"))
    row[column] = str(float(row[column]) + wrong)
    found = {one.column: one.agrees for one in verify.again("explorer_resnet8_digits", row)}
    assert found.pop(column) == agrees and all(found.values())


def test_texts_are_compared_as_texts():
    one = verify.Checked("claims", "C1", "verdict", "reproduced", "not reproduced", 0)
    assert not one.agrees and dataclasses.replace(one, again="reproduced").agrees
    assert verify.report([one]) == "DIFFERS       claims [C1] verdict: reproduced, again not reproduced"
    assert not verify.Checked("claims", "C1", "effect", "", 1.0, 0).agrees  # nothing is not a number


def test_what_cannot_be_measured_here_is_said_with_its_reason(committed):
    rows, reasons = verify.possible()
    assert set(rows) == {"explorer_resnet8_digits", "claims"}
    assert "cifar100.npz" in reasons["axmoe_resnet20_cifar100"] and "a machine's time" in reasons["speed_cases"]
    there = {file.stem for file in committed.glob("*.csv") if not file.stem.endswith("_answers")}
    assert set(rows) | set(reasons) == there


def test_the_draw_is_seeded_and_never_takes_a_row_twice(monkeypatch):
    monkeypatch.setattr(verify, "again", lambda name, row: [(name, row["multiplier"])])
    one, same, other = (
        [c[0] for c in verify.verify(["explorer_resnet8_digits"], n=40, seed=seed, progress=False)]
        for seed in (1, 1, 2)
    )
    assert one == same != other and len(set(one)) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["claim"], "No study 'claim' is committed. Did you mean 'claims'?"),
        (["--n", "0"], "n is 0; at least one"),
        (["speed_cases"], "Nothing can be measured again here: speed_cases"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, capsys):
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_fails_where_a_row_differs(committed, capsys):
    assert main(["verify", "explorer_resnet8_digits", "--n", "1"]) == 0
    told = "".join(capsys.readouterr())
    name = told.split("[")[1].split("]")[0]
    file = committed / "explorer_resnet8_digits.csv"
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    next(row for row in rows if row["multiplier"] == name)["rank"] = "77"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert main(["verify", "explorer_resnet8_digits", "--n", "1"]) == 1
    told = "".join(capsys.readouterr())
    assert f"DIFFERS       explorer_resnet8_digits [{name}] rank: 77, again" in told

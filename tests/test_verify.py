"""Committed rows measured again: what agrees, what differs, what cannot be measured here."""

import csv
import dataclasses
import shutil

import pytest
import torch

from axmoe_lite import kernels, paths, runs, verify
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


# ---------------------------------------------------------------------------------------- against the law


@pytest.mark.trust("law", "all paths in turn, as `axmoe verify` draws them")
def test_every_path_equals_the_law(record_property):
    rows = verify.against_the_law(700, seed=11)
    assert [row["path"] for row in rows] == list(verify.WAYS) and {row["cases"] for row in rows} == {100}
    assert [row["first"] for row in rows if row["differing"]] == []
    assert all(row["products"] > 10_000 for row in rows)
    record_property("cases", sum(row["cases"] for row in rows))


def _swapped(a, b, m):
    return kernels.matmul(b.T, a.T, m, path="reference").T


def _late(a, b, m):
    return kernels.matmul(a[:, 1:], b[1:], m, path="reference") if a.shape[1] > 1 else a.new_zeros(1)


@pytest.mark.parametrize(
    ("wrong", "multipliers", "least"),
    [
        (_late, ["mul8s_1KV6"], 30),  # the first product left out; with one, the shape is wrong
        (_swapped, ["broken_array(2,0,0)"], 30),  # which drops two bits of the activation only
        (lambda a, b, m: kernels.matmul(a, b, m, path="reference") + 1, None, 40),
    ],
)
def test_a_wrong_product_is_found_and_the_case_is_named(wrong, multipliers, least):
    (row,) = verify.against_the_law(40, product=wrong, multipliers=multipliers)
    assert row["path"] == "yours" and row["differing"] >= least and "M x K x N" in row["first"]


def test_a_symmetric_table_cannot_see_swapped_operands():
    assert verify.against_the_law(40, product=_swapped, multipliers=["mul8s_1KV6"])[0]["differing"] == 0


def test_other_integers_and_floats_are_compared_by_value():
    for dtype in (torch.int64, torch.float32):  # sums below 2^24: at most 33 products of 2^14
        (row,) = verify.against_the_law(
            40, product=lambda a, b, m, d=dtype: kernels.matmul(a, b, m).to(d), multipliers=["mul8s_1KV6"]
        )
        assert row["differing"] == 0


def test_the_command_fails_where_a_path_differs(monkeypatch, capsys):
    matmul = kernels.matmul
    monkeypatch.setattr(kernels, "matmul", lambda a, b, m, **options: matmul(a, b, m, **options) + (a.shape[1] == 23))
    assert main(["verify", "claims", "--n", "1"]) == 1
    told = capsys.readouterr().out
    assert "DIFFERS in" in told and " x 23 x " in told and "as the law    convolution, factored: 30 cases" in told


def test_no_cases_or_an_unknown_multiplier_is_refused(capsys):
    assert main(["verify", "claims", "--cases", "0"]) == 2
    assert "at least one is to be drawn" in capsys.readouterr().err
    with pytest.raises(ValueError, match="mul8s_1KV7"):
        verify.against_the_law(1, multipliers=["mul8s_1KV7"])
    with pytest.raises(ValueError, match="multipliers is empty"):
        verify.against_the_law(1, multipliers=[])

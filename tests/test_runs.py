"""Evidence: complete or refused, written whole, and true for what is committed."""

import pytest

from axmoe_lite import EVOAPPROX, multiplier, paths, runs

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
    assert [p.name for p in (elsewhere / "data" / "cache" / "results").iterdir()] == ["study.csv"]


def test_other_columns_than_the_files_are_refused_and_the_file_stays(elsewhere, origin):
    path = runs.record("study", [{**ROW, **origin}], key=KEY)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"study\.csv has other columns than these rows \(loss\)"):
        runs.record("study", [{**ROW, "loss": 1.0, **origin}], key=KEY)
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["study.csv"]


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


def test_the_committed_resilience_rows():
    rows = runs.read("resilience_resnet20_cifar100")
    top1 = {row["multiplier"]: float(row["top1"]) for row in rows}
    assert list(top1) == ["float32", *EVOAPPROX, "swap:mul8s_1KVM"]
    assert {row["n_test"] for row in rows} == {"10000"} and {row["scale"] for row in rows} == {"paper"}
    assert all(abs(int(row["correct"]) / 10_000 - float(row["top1"])) < 1e-6 for row in rows)
    assert all(row["digest"] == multiplier(row["multiplier"]).digest for row in rows[1:])
    assert top1["float32"] >= 0.64 and abs(top1["mul8s_1KV6"] - top1["float32"]) <= 0.005

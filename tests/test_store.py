"""What names a run, what makes it stale, and what state it is in."""

import json
import os
from pathlib import Path

import pytest
from filelock import FileLock

from axmoe_lite import paths
from axmoe_lite.runs import store
from axmoe_lite.runs.store import Run


def test_the_order_of_parameters_does_not_name_a_run_and_each_value_does():
    run = Run("toy", {"a": 1, "b": [1, 2]}, "s")
    assert run.id == Run("toy", {"b": [1, 2], "a": 1}, "s").id
    others = [
        Run("toy", {"a": 2, "b": [1, 2]}, "s"),
        Run("toy", {"a": 1, "b": [2, 1]}, "s"),
        Run("toy", {"a": "1", "b": [1, 2]}, "s"),
        Run("toy", {"a": 1, "b": [1, 2]}, "t"),
        Run("tay", {"a": 1, "b": [1, 2]}, "s"),
    ]
    assert len({run.id, *(other.id for other in others)}) == 6


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of one file that stands for ours."""
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    (tmp_path / "axmoe_lite").mkdir()
    file = tmp_path / "axmoe_lite" / "one.py"
    stamps = iter(range(10**9, 2 * 10**9))

    def write(text: str) -> str:
        file.write_text(text)
        os.utime(file, ns=(next(stamps),) * 2)  # an edit within the clock's tick
        return store.package_digest()

    return write


def test_code_makes_a_run_stale_and_words_do_not(package):
    plain = package("def f(x):\n    return x + 1\n")
    assert package('"""Says."""\n\ndef f(x):\n    """Adds."""\n    # why\n    return (x  +  1)\n') == plain
    assert package("def f(x):\n    return x + 2\n") != plain
    assert package("def f(x, y=0):\n    return x + 1\n") != plain
    assert package("def f(x):\n    return x + 1\n") == plain


def test_a_new_file_makes_a_run_stale(package, tmp_path):
    before = package("x = 1")
    (tmp_path / "axmoe_lite" / "two.py").write_text("")
    assert store.package_digest() != before


def test_a_notebooks_code_counts_but_neither_its_parameters_nor_its_text(toy):
    first = store.source_digest(toy("n = 1  # how many", "print(n)", "%time n"))
    assert store.source_digest(toy("n = 2", "print( n )  # shown", "%time n")) == first
    assert store.source_digest(toy("n = 1", "print(n + 1)", "%time n")) != first
    assert store.source_digest(toy("n = 1", "print(n)", "%timeit n")) != first
    path = toy("n = 1", "print(n)", "%time n")
    content = json.loads(path.read_text())
    content["cells"].append({"cell_type": "markdown", "metadata": {}, "source": "text"})
    path.write_text(json.dumps(content))
    assert store.source_digest(path) == first


def test_the_states_of_a_run(elsewhere):
    run = Run("toy", {"n": 1}, "s")
    assert run.state() == "new" and list(store.all_runs()) == []
    store.begin(run, notebook="{}")
    assert run.state() == "interrupted" and list(store.all_runs()) == list(store.all_runs("toy")) == [run]
    with FileLock(run.folder / "lock"):
        assert run.state() == "running"
    store.write_json(run.folder / "outcome.json", {"state": "failed"})
    (run.folder / "error.txt").write_text("first")
    assert run.state() == "failed" and store.attempts(run) == 1
    store.reopen(run)
    assert run.state() == "interrupted" and store.attempts(run) == 2
    assert (run.folder / "error-1.txt").read_text() == "first" and list(store.all_runs("other")) == []


@pytest.mark.trust("fault", "the disk is full while a row is written")
def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    store.write_json(path, {"a": 1})

    write = Path.write_bytes

    def full(file, content):
        write(file, content[: len(content) // 2])  # as much as there is room for
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        store.write_json(path, {"a": 2})
    assert store.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "outcome.json").write_text("{")
    with pytest.raises(ValueError, match=r"outcome\.json is not readable as JSON .* delete its folder"):
        store.read_json(tmp_path / "outcome.json")
    assert store.read_json(tmp_path / "none.json") == {}


def test_quick_work_is_kept_within_a_run_only(elsewhere, monkeypatch):
    monkeypatch.delenv("AXMOE_RUN", raising=False)
    assert store.scratch("quick") is None and store.scratch("paper") == elsewhere / "data" / "cache"
    monkeypatch.setenv("AXMOE_RUN", "/somewhere/run")
    assert store.scratch("quick") == Path("/somewhere/run/scratch")

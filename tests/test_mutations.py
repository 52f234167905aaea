"""The bugs that are planted by hand still fit the code, and the script that plants them tells caught from survived."""

import ast
import re

import mutations
import pytest
from mutations import MUTATIONS, ROOT, Mutation

from axmoe_lite import runs

# Tests of milliseconds, so that what takes time here is Python's own start.
STORE, SAVES = "axmoe_lite/runs/store.py", "tests/test_store.py::test_writing_is_whole_or_not_at_all"
LOST = Mutation("lost", "nothing is written", STORE, "os.replace(partial, path)", "lost_here = 0", SAVES)


def test_every_bug_fits_the_code_once_and_is_still_python():
    for bug in MUTATIONS:
        text = (ROOT / bug.file).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(mutations.mutated(text, bug))) != ast.dump(ast.parse(text)), bug.name


def test_every_bug_has_a_name_of_its_own_words_and_tests_that_exist():
    names = [bug.name for bug in MUTATIONS]
    assert len(set(names)) == len(names) >= 24 and len({bug.what for bug in MUTATIONS}) == len(names)
    for bug in MUTATIONS:
        assert bug.what and bug.tests, bug.name
        for test in bug.tests.split():
            file, _, function = test.partition("::")
            assert re.search(rf"\b{function}\b", (ROOT / file).read_text()), test


def test_every_recorded_row_is_of_a_bug_that_is_still_planted():
    for row in runs.read(mutations.STUDY):
        (bug,) = mutations.chosen([row["name"]])
        assert (row["what"], row["file"]) == (bug.what, bug.file), f"{bug.name} has changed; record it again"


def test_code_that_has_changed_is_said():
    with pytest.raises(ValueError, match=r"the code has changed: .*store\.py should have this once, and has it 0 t"):
        mutations.mutated("something else", LOST)
    with pytest.raises(ValueError, match="has it 2 times"):
        mutations.mutated(f"{LOST.old}\n{LOST.old}", LOST)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="No bug is called 'gate-learn'; did you mean 'gate-learns'"):
        mutations.chosen(["double-scaling", "gate-learn"])


def test_a_planted_bug_is_caught_and_the_checkout_stays_as_it_is(monkeypatch, capsys, elsewhere):
    monkeypatch.setattr(mutations, "MUTATIONS", (LOST,))
    before = (ROOT / STORE).read_bytes()
    assert mutations.main(["lost", "--record"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"lost (nothing is written): caught by {SAVES} in ") and told[1] == "1 of 1 bugs caught."
    assert (ROOT / STORE).read_bytes() == before
    rows = [(row["name"], row["caught_by"], row["n_test"]) for row in runs.read(mutations.STUDY)]
    assert rows == [("lost", SAVES, "0")]


def test_a_bug_that_no_test_notices_is_said(monkeypatch, capsys, elsewhere):
    seen = []

    def all_pass(copy, arguments):
        seen.append((LOST.new in (copy / STORE).read_text(), arguments))
        return ""

    monkeypatch.setattr(mutations, "MUTATIONS", (LOST,))
    monkeypatch.setattr(mutations, "first_failure", all_pass)
    assert mutations.main(["--record"]) == mutations.main(["--all-tests"]) == 1
    assert seen == [(False, [SAVES]), (True, [SAVES]), (False, []), (True, [])], "without the bug, then with it"
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [f"lost (nothing is written): SURVIVED {SAVES}", "0 of 1 bugs caught. SURVIVED: lost"]
    assert [row["caught_by"] for row in runs.read(mutations.STUDY)] == [""]


def test_tests_that_would_import_another_package_are_not_believed(tmp_path):
    with pytest.raises(RuntimeError, match=r"would import .*axmoe_lite.__init__\.py, not the copy|No module named"):
        mutations.first_failure(tmp_path, ["--version"])


def test_tests_that_fail_by_themselves_say_nothing(monkeypatch):
    monkeypatch.setattr(mutations, "MUTATIONS", (LOST,))
    monkeypatch.setattr(mutations, "first_failure", lambda copy, arguments: "tests/test_a.py::test_b")
    with pytest.raises(SystemExit, match="test_b fails without any bug"):
        mutations.main([])


def test_pytest_without_a_verdict_is_no_catch(monkeypatch):
    ended = mutations.subprocess.CompletedProcess([], returncode=2, stdout="ERROR tests/test_a.py\n", stderr="")
    monkeypatch.setattr(mutations.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(RuntimeError, match=r"no verdict \(status 2\)"):
        mutations.first_failure(ROOT, [])

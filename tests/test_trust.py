"""What the tests are evidence of is counted as they run: drawn examples, failures, and what was skipped."""

import csv
import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.trust("law", "drawn")
@pytest.mark.parametrize("n", [1, 2])
@settings(max_examples=40)
@given(st.integers())
def test_drawn(n, x):
    pass


@pytest.mark.trust("fault", "mixed")
def test_counted(record_property):
    record_property("cases", 5)


@pytest.mark.trust("fault", "mixed")
def test_wrong():
    assert False


@pytest.mark.trust("fault", "mixed")
@pytest.mark.skipif(True, reason="nothing to see")
def test_skipped():
    pass


def test_without_a_mark():
    pass
"""


def test_rows_count_what_was_tried_and_how_it_ended(tmp_path):
    (tmp_path / "test_few.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "trust", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "--hypothesis-seed=3", "--record-trust", "test_few.py"]
    env = {**os.environ, "AXMOE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    env = {key: value for key, value in env.items() if not key.startswith("PYTEST_")}  # not of the run that runs this
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    with (tmp_path / "data" / "results" / "trust.csv").open(newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    counts = {what: [int(row[c]) for c in ("cases", "tests", "failed", "skipped")] for what, row in rows.items()}
    # Two parameters of 40 examples each; 5 told, 1 that failed, none for the test that was skipped.
    assert counts == {"drawn": [80, 2, 0, 0], "mixed": [6, 3, 1, 1]} and rows["drawn"]["seed"] == "3"

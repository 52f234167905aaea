"""Small notebooks to try sweeps on: one that counts and is killed, and what a sweep costs by itself.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import functools
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

from axmoe_lite.runs import store
from axmoe_lite.runs.evidence import evidence, record
from axmoe_lite.runs.execute import Work, conclusion
from axmoe_lite.runs.sweep import sweep
from axmoe_lite.runs.words import words as as_words

COUNTING = """
import json, os, time
from axmoe_lite import runs
kept = runs.scratch("quick") / "count.json"
kept.parent.mkdir(exist_ok=True)
state = json.loads(kept.read_text()) if kept.exists() else {"at": 0, "value": n, "starts": 0}
state["starts"] += 1
while state["at"] < 40:
    state |= {"at": state["at"] + 1, "value": (state["value"] * 75 + 74) % 65537}
    time.sleep(0.05)
    kept.with_suffix(".new").write_text(json.dumps(state))
    os.replace(kept.with_suffix(".new"), kept)
print(json.dumps(state))
"""
COMPUTING = """
import time
from axmoe_lite import multiplier
end = time.process_time() + 2
while time.process_time() < end:
    pass
"""


def notebook(path: Path | str, *cells: str) -> Path:
    """Write a notebook of code cells, the first of them its parameters.

    >>> import json, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     len(json.loads(notebook(f"{folder}/toy.ipynb", "n = 1", "print(n)").read_text())["cells"])
    2
    """
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    blank = {"cell_type": "code", "outputs": [], "execution_count": None}
    tags = [{"tags": ["parameters"]}] + [{}] * len(cells)
    content = {
        "cells": [
            {**blank, "id": f"c{at}", "metadata": tag, "source": cell}
            for at, (cell, tag) in enumerate(zip(cells, tags, strict=False))
        ],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    store.write_json(Path(path), content)
    return Path(path)


def counting(folder: Path | str) -> Path:
    """A notebook that counts to forty in two seconds, and after each step writes down where it is."""
    return notebook(Path(folder) / "count.ipynb", "n = 1  # {1..} where it begins", COUNTING)


def kill_sweep(path: Path, *words: str, seconds: float = 0.5) -> dict[str, str]:
    """Start ``axmoe sweep`` in a process of its own and kill it without warning.

    Args:
        path: a notebook that keeps something in :func:`~axmoe_lite.runs.scratch`.
        words: its parameters, as on a command line.
        seconds: from the moment when a run has kept something.

    Returns:
        The state in which it leaves each of its runs, by their parameters.
    """
    known = {run.id for run in store.all_runs(path.stem)}
    command = [sys.executable, "-m", "axmoe_lite", "sweep", str(path), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(
        run.id not in known and any((run.folder / "scratch").glob("*")) for run in store.all_runs(path.stem)
    ):
        time.sleep(0.05)
    time.sleep(seconds)
    process.kill()
    process.wait()
    time.sleep(0.5)  # its run notices that the pipe has broken, and goes
    return {" ".join(as_words(run.parameters)): run.state() for run in store.all_runs(path.stem) if run.id not in known}


def costs(folder: Path | str, *, repeats: int = 1) -> tuple[dict[str, float], dict[str, list[dict]]]:
    """What a run costs beside its work, and what a second worker gives: seconds, measured in turns.

    Returns:
        Median seconds of an empty run, of one that imports the package, and of four that compute for two seconds on
        one worker and on two; and the outcomes of the last two.
    """
    folder, fresh, outcomes = Path(folder), itertools.count(1), {}
    first = "n = 1  # {1..} makes each run a new one"
    empty = notebook(folder / "empty.ipynb", first, "n")
    imports = notebook(folder / "imports.ipynb", first, "from axmoe_lite import multiplier")
    computes = notebook(folder / "computes.ipynb", first, COMPUTING)

    def go(path: Path, n_runs: int, *, workers: int = 1) -> list[dict]:
        given = {"n": list(itertools.islice(fresh, n_runs))}
        return sweep(path, given, workers=workers, threads=1, progress=False)

    calls = {
        "an empty run": lambda: go(empty, 1),
        "a run that imports the package": lambda: go(imports, 1),
        "4 runs of 2 s, 1 worker": lambda: outcomes.update({"1 worker": go(computes, 4)}),
        "4 runs of 2 s, 2 workers": lambda: outcomes.update({"2 workers": go(computes, 4, workers=2)}),
    }
    go(empty, 1)  # the first reads papermill and its like from the disk
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, outcomes


def pretend(work: Work) -> dict:
    """A run that does nothing but record its parameters as one row: what a sweep costs by itself."""
    run, clock = work.run, time.perf_counter()
    store.begin(run, notebook=work.notebook, made_by=work.made_by)
    with store.inside(run.folder):
        row = {**run.parameters, "seconds": 0.0, **_origin()}
        record(f"pretended_{run.chapter}", [row], key=tuple(run.parameters))
    ended = conclusion(work, "", seconds=time.perf_counter() - clock)
    store.write_json(run.folder / "outcome.json", {**ended, "started": ended["ended"], "peak_mb": 0})
    return store.outcome(run)


@functools.cache
def _origin() -> dict:
    return evidence(0, scale="quick", seed=0, epochs=0)  # asks git once, not ten thousand times

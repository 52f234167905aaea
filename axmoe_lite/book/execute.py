"""Which chapters are out of date, and executing them.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import ast
import datetime
import importlib.util
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from axmoe_lite import paths, runs
from axmoe_lite.book.pages import code_cells, page_of, read
from axmoe_lite.runs import Run, Work, store

LIMIT_MINUTES = {"quick": 30.0, "paper": 0.0}  # for each chapter; at paper scale one cell trains for hours


def work_of(notebook: Path, *, scale: str) -> Work:
    """The run that a chapter's page shows: its defaults at a scale, one thread unless it measures time."""
    complete = runs.check(runs.parameters(notebook), {"scale": scale})
    threads = runs.cores() if _alone(notebook) else 1
    (work,) = runs.plan(notebook, [complete], threads=threads, minutes=LIMIT_MINUTES[scale], retry=True)
    return work


def _alone(notebook: Path) -> bool:
    return bool(read(notebook)["metadata"].get("axmoe", {}).get("alone"))


def execute(works: dict[Path, Work], *, scale: str, workers: int | None, force: bool) -> list[dict]:
    """Do the runs that have not been done, or are out of date; returns the outcomes that are not "finished"."""
    due = [notebook for notebook, work in works.items() if force or _out_of_date(notebook, work.run, scale=scale)]
    if not due:
        print(f"All {len(works)} chapters are executed as they are ({scale}).", flush=True)
        return []
    rest = f"; the other {len(works) - len(due)} are as they were" if len(due) < len(works) else ""
    print(f"Executing {', '.join(notebook.stem for notebook in due)} ({scale}){rest}.", flush=True)
    for notebook in due:
        if works[notebook].run.state() == "finished":
            shutil.rmtree(works[notebook].run.folder)
    # The later a chapter, the longer it computes; begun last it would leave the other cores waiting.
    together = [works[notebook] for notebook in reversed(due) if not _alone(notebook)]
    alone = [works[notebook] for notebook in due if _alone(notebook)]
    at_once = workers or (runs.cores() if importlib.util.find_spec("distributed") else 1)
    outcomes = []
    if together:
        outcomes += runs.perform_all(together, workers=min(at_once, len(together)))
    if alone:
        outcomes += runs.perform_all(alone)
    if scale == "quick":
        _forget_superseded([works[notebook].run for notebook in due])
    return [outcome for outcome in outcomes if outcome["state"] != "finished"]


def what_failed(outcome: dict) -> str:
    """The sentence for a run that did not finish, and where to look."""
    folder, chapter = outcome["folder"], outcome["run"].split("/")[0]
    part = folder / "executing.ipynb"
    told = f"{chapter}.ipynb failed ({outcome['reason']})"
    return f"{told}; the executed part is in {part}" if part.exists() else f"{told}; see {folder}"


def _out_of_date(notebook: Path, run: Run, *, scale: str) -> bool:
    if run.state() != "finished" or page_of(notebook, run) is None:
        return True
    if scale != "quick":
        return False
    started, now = datetime.datetime.fromisoformat(store.outcome(run)["started"]).timestamp(), time.time()
    written = [file.stat().st_mtime for file in data_named_in(read(notebook))]
    # The clock may have been set: a file from the future says nothing, and after a start in the future any may be new.
    return any(at <= now and (at >= started or started > now) for at in written)


def data_named_in(notebook: dict) -> list[Path]:
    """The committed data that a chapter may read: those files that a text in its code, f-strings too, could name.

    Args:
        notebook: its content.
    """
    names = [re.compile(name) for cell in code_cells(notebook) for name in _names_in("".join(cell["source"]))]
    files = [*paths.results_dir().glob("*.csv"), *paths.checkpoints_dir().glob("*")]
    return sorted(f for f in files if any(name.fullmatch(text) for name in names for text in (f.name, f.stem)))


def _names_in(code: str) -> Iterable[str]:
    """Regular expressions of the texts that a cell writes down."""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # a %magic may read anything
        yield ".+"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.escape(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".*" for part in node.values]
            if set(parts) != {".*"}:  # a number in its format names no file
                yield "".join(parts)


def _forget_superseded(done: list[Run]) -> None:
    """Remove the book's earlier run of a chapter when another has taken its place: they are many megabytes each."""
    file = paths.book_dir() / "_build" / "runs.json"
    file.parent.mkdir(exist_ok=True)
    known = store.read_json(file)
    for run in done:
        if run.state() == "finished":
            before, known[run.chapter] = known.get(run.chapter, run.id), run.id
            if before != run.id:
                shutil.rmtree(paths.runs_dir() / before, ignore_errors=True)
    store.write_json(file, known)

"""The book: every chapter executed as a run, then HTML pages, and of both only what changed.

    build()          what `axmoe book` does

A chapter is the run that `axmoe run` would make with its defaults, and lies where that does: neither repeats the
other. It is executed again when its parameters, its code or the package's code differ (not their comments and
docstrings), or, at quick scale, when committed data that it names have changed since (at paper scale chapters write
those data themselves). Its text cells are taken as they are now, so that a corrected sentence executes nothing.

What the pages are made of is staged in ``book/_build/stage``, where only files that differ are written, for Sphinx
reads only those again.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import ast
import datetime
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from axmoe_lite import paths, runs
from axmoe_lite.doctor import pip
from axmoe_lite.runs import Run, Work, store

WIDGET = "application/vnd.jupyter.widget-view+json"
LIMIT_MINUTES = {"quick": 30.0, "paper": 0.0}  # for each chapter; at paper scale one cell trains for hours
BUILDERS = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "sphinx-mathjax-offline", "sphinxcontrib-bibtex")
NOT_STAGED = ("_build", ".ipynb_checkpoints", "__pycache__")


def build(*, scale: str = "quick", workers: int | None = None, force: bool = False) -> int:
    """Execute the chapters that changed, then build the pages that changed, in ``book/_build/html``.

    Args:
        scale: ``"quick"`` or ``"paper"``, the parameter of every chapter.
        workers: chapters at a time; None for one a core. Chapters whose metadata say ``{"axmoe": {"alone": true}}``
            measure time, and follow one by one.
        force: execute and build everything.

    Returns:
        The exit status: 0, or 1 if there is no book, a chapter failed, or a page did.

    Raises:
        ValueError: for a scale or a number of workers that cannot be.
    """
    book = paths.CHECKOUT / "book"
    if scale not in LIMIT_MINUTES:
        raise ValueError(f"scale is {scale!r}; it can be {', '.join(map(repr, LIMIT_MINUTES))}.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 is needed.")
    if not book.is_dir():
        return _refuse(f"There is no book at {book}: 'axmoe book' works in a checkout of the repository.")
    missing = [
        name for name in ("papermill", "psutil", "jupyter_book", "altair") if importlib.util.find_spec(name) is None
    ]
    if missing:
        return _refuse(
            f"The book needs {', '.join(missing)}: {pip('book,sweep')}  ('axmoe doctor' looks at everything)"
        )
    works = {notebook: work_of(notebook, scale=scale) for notebook in runs.chapters()}
    try:
        failed = _execute(works, scale=scale, workers=workers, force=force)
    except RuntimeError as reason:  # the package was edited while chapters ran
        return _refuse(str(reason))
    for outcome in failed:
        _refuse(_what_failed(outcome))
    if failed:
        return 1
    stage = book / "_build" / "stage"
    pages = {notebook.name: _page_of(notebook, work.run) for notebook, work in works.items()}
    if edited := [name for name, content in pages.items() if content is None]:
        return _refuse(f"{', '.join(edited)} was edited meanwhile; the same command executes what changed.")
    _stage(book, stage, pages)
    return _build_pages(stage, book / "_build", force=force)


def _refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 1


# ---------------------------------------------------------------------------------- executing


def work_of(notebook: Path, *, scale: str) -> Work:
    """The run that a chapter's page shows: its defaults at a scale, one thread unless it measures time."""
    complete = runs.check(runs.parameters(notebook), {"scale": scale})
    threads = runs.cores() if _alone(notebook) else 1
    (work,) = runs.plan(notebook, [complete], threads=threads, minutes=LIMIT_MINUTES[scale], retry=True)
    return work


def _alone(notebook: Path) -> bool:
    return bool(_read(notebook)["metadata"].get("axmoe", {}).get("alone"))


def _execute(works: dict[Path, Work], *, scale: str, workers: int | None, force: bool) -> list[dict]:
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


def _what_failed(outcome: dict) -> str:
    folder, chapter = outcome["folder"], outcome["run"].split("/")[0]
    part = folder / "executing.ipynb"
    told = f"{chapter}.ipynb failed ({outcome['reason']})"
    return f"{told}; the executed part is in {part}" if part.exists() else f"{told}; see {folder}"


def _out_of_date(notebook: Path, run: Run, *, scale: str) -> bool:
    if run.state() != "finished" or _page_of(notebook, run) is None:
        return True
    started = datetime.datetime.fromisoformat(store.outcome(run)["started"]).timestamp()
    return scale == "quick" and any(file.stat().st_mtime >= started for file in data_named_in(_read(notebook)))


def data_named_in(notebook: dict) -> list[Path]:
    """The committed data that a chapter may read: those files that a text in its code, f-strings too, could name.

    Args:
        notebook: its content.
    """
    names = [re.compile(name) for cell in _code_cells(notebook) for name in _names_in("".join(cell["source"]))]
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
    file = paths.CHECKOUT / "book" / "_build" / "runs.json"
    file.parent.mkdir(exist_ok=True)
    known = store.read_json(file)
    for run in done:
        if run.state() == "finished":
            before, known[run.chapter] = known.get(run.chapter, run.id), run.id
            if before != run.id:
                shutil.rmtree(paths.runs_dir() / before, ignore_errors=True)
    store.write_json(file, known)


# ---------------------------------------------------------------------------------- pages


def _page_of(notebook: Path, run: Run) -> dict | None:
    """A chapter's page (see :func:`page`); None if its run has other code, or its notebook was lost."""
    present = _read(notebook)
    known = runs.parameters(present)
    changed = {name: value for name, value in run.parameters.items() if value != known[name].default}
    executed = store.read_json(run.folder / "notebook.ipynb")
    return page(present, executed, changed=changed) if executed else None


def page(present: dict, executed: dict, *, changed: dict) -> dict | None:
    """A chapter as it is written now, with the outputs of its executed copy.

    Args:
        present, executed: notebooks. Their code cells must be the same but for comments, layout and parameters.
        changed: parameters that the run had other values of; shown after the chapter's own.

    Returns:
        A notebook; or None if the code cells differ.
    """
    ran = [cell for cell in _code_cells(executed) if "injected-parameters" not in _tags(cell)]
    own = _code_cells(present)
    if len(ran) != len(own) or not all(map(_same_code, own, ran)):
        return None
    cells, outputs = [], iter(ran)
    for cell in present["cells"]:
        if cell["cell_type"] != "code":
            cells.append(cell)
            continue
        done = next(outputs)
        shown = [_for_a_page(output) for output in done["outputs"] if WIDGET not in output.get("data", {})]
        cells.append({**cell, "execution_count": done["execution_count"], "outputs": shown})
        if changed and "parameters" in _tags(cell):
            source = "\n".join(["# Changed for this page", *(f"{name} = {value!r}" for name, value in changed.items())])
            new = {"id": "changed-parameters", "source": source, "execution_count": None, "outputs": []}
            cells.append({"cell_type": "code", "metadata": {}, **new})
    return {**present, "cells": cells}


def _same_code(a: dict, b: dict) -> bool:
    if "parameters" in _tags(a) or "parameters" in _tags(b):
        return _tags(a) == _tags(b)  # their values are the run's
    return store.bare_code("".join(a["source"])) == store.bare_code("".join(b["source"]))


def _for_a_page(output: dict) -> dict:
    """An output without the copy of Vega that every chart of a live notebook carries: a page has its own, once."""
    html = "".join(output.get("data", {}).get("text/html", ""))
    start, end = html.find("if(!window.vegaEmbed){"), html.rfind("if(window.vegaEmbed){")
    if 'class="axmoe-chart"' not in html or not 0 <= start < end:
        return output
    return {**output, "data": {**output["data"], "text/html": html[:start] + html[end:]}}


def _code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def _read(notebook: Path) -> dict:
    return json.loads(notebook.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------- building


def _stage(book: Path, stage: Path, pages: dict[str, dict]) -> None:
    """Make ``stage`` a copy of the book with these pages and Vega; files that do not differ keep their time."""
    wanted = {
        file.relative_to(book): file.read_bytes()
        for file in book.rglob("*")
        if file.is_file() and not set(file.relative_to(book).parts) & set(NOT_STAGED)
    }
    wanted |= {Path(name): (json.dumps(content, indent=1) + "\n").encode() for name, content in pages.items()}
    vega = Path("assets") / "vega.js"
    wanted[vega] = _vega(stage / vega)
    for name, content in wanted.items():
        file = stage / name
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(file, content)
    for file in [file for file in stage.rglob("*") if file.is_file() and file.relative_to(stage) not in wanted]:
        file.unlink()


def _vega(present: Path) -> bytes:
    """One script for all charts; what is staged already, if the same vl-convert made it, for that takes seconds."""
    head = f"/* vl-convert-python {metadata.version('vl-convert-python')} */\n".encode()
    if present.exists() and (content := present.read_bytes()).startswith(head):
        return content
    from axmoe_lite import plots

    return head + plots.javascript_bundle().encode()


def _build_pages(stage: Path, build: Path, *, force: bool) -> int:
    """Call jupyter-book, unless nothing has changed since it last succeeded."""
    stamp, index = build / "stamp.json", build / "html" / "index.html"
    before, now = store.read_json(stamp), {"frame": _frame(stage), "pages": _digest(stage.rglob("*"), stage)}
    if before == now and index.exists() and not force:
        print(f"No page has changed. The book is at {index}")
        return 0
    everything = force or before.get("frame") != now["frame"] or not index.exists()
    stamp.unlink(missing_ok=True)  # a build that fails has warned of what the next would no longer look at
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(stage), "--path-output"]
    command += [str(build.parent), *(["--all"] if everything else []), "-W", "--keep-going"]
    if subprocess.run(command, check=False).returncode:
        return 1
    store.write_json(stamp, now)
    print(f"The book is at {index}")
    return 0


def _frame(stage: Path) -> str:
    """A digest of all that every page shows or may refer to: anything but the pages, and their headings and labels."""
    pages = sorted(file for file in stage.rglob("*") if file.suffix in (".md", ".ipynb"))
    others = [file for file in stage.rglob("*") if file not in pages]
    targets = re.compile(r"^(#+ .*|\(.+\)=|\$\$ \(.+\)|.*:(?:label|name): .*)$", flags=re.M)
    named = [[page.name, *targets.findall(_text_of(page))] for page in pages]
    versions = [f"{name} {_version(name)}" for name in BUILDERS]
    return hashlib.sha256(f"{_digest(others, stage)} {named} {versions}".encode()).hexdigest()[:16]


def _text_of(page: Path) -> str:
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    return "\n".join("".join(cell["source"]) for cell in _read(page)["cells"] if cell["cell_type"] == "markdown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _digest(files: Iterable[Path], folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts):
        found.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]

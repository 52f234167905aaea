"""The book: every chapter executed as a run, then HTML pages, and of both only what changed.

    build()          what `axmoe book` does

    execute          which chapters are out of date; executing them
    pages            a chapter as it is written now, with the outputs of its run
    status           when each page was made, how long it took, on what; where it can be launched
    html             the stage that jupyter-book reads, and the call of it

A chapter is the run that `axmoe run` would make with its defaults, and lies where that does: neither repeats the
other. It is executed again when its parameters, its code or the package's code differ (not their comments and
docstrings), or, at quick scale, when committed data that it names have changed since (at paper scale chapters write
those data themselves). Its text cells are taken as they are now, so that a corrected sentence executes nothing.

What the pages are made of is staged in ``book/_build/stage``, where only files that differ are written, for Sphinx
reads only those again.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import importlib.util
import sys

from axmoe_lite import paths, runs
from axmoe_lite.book.execute import LIMIT_MINUTES, data_named_in, execute, what_failed, work_of
from axmoe_lite.book.html import build_pages, build_single, write_stage
from axmoe_lite.book.pages import WIDGET, page, page_of, stopped_page
from axmoe_lite.book.status import status_page
from axmoe_lite.doctor import pip

__all__ = ["WIDGET", "build", "data_named_in", "page", "status_page", "work_of"]


def build(*, scale: str = "quick", workers: int | None = None, force: bool = False, single: bool = False) -> int:
    """Execute the chapters that changed, then build the pages that changed, in ``book/_build/html``.

    Args:
        scale: ``"quick"`` or ``"paper"``, the parameter of every chapter.
        workers: chapters at a time; None for one a core. Chapters whose metadata say ``{"axmoe": {"alone": true}}``
            measure time, and follow one by one.
        force: execute and build everything.
        single: also the whole book as one page, in ``book/_build/singlehtml``, for printing.

    Returns:
        The exit status: 0, or 1 if there is no book, a chapter failed, or a page did. A chapter that failed has a page
        all the same, which shows how far it came.

    Raises:
        ValueError: for a scale or a number of workers that cannot be.
    """
    book = paths.book_dir()
    if scale not in LIMIT_MINUTES:
        raise ValueError(f"scale is {scale!r}; it can be {', '.join(map(repr, LIMIT_MINUTES))}.")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 is needed.")
    if not book.is_dir():
        return _refuse(f"There is no book at {book}: install the package from its wheel, or work in a checkout.")
    missing = [
        name for name in ("papermill", "psutil", "jupyter_book", "altair") if importlib.util.find_spec(name) is None
    ]
    if missing:
        return _refuse(
            f"The book needs {', '.join(missing)}: {pip('book,sweep')}  ('axmoe doctor' looks at everything)"
        )
    works = {notebook: work_of(notebook, scale=scale) for notebook in runs.chapters()}
    try:
        failed = execute(works, scale=scale, workers=workers, force=force)
    except RuntimeError as reason:  # the package was edited while chapters ran
        return _refuse(str(reason))
    stage, stopped = book / "_build" / "stage", {outcome["folder"]: outcome["reason"] for outcome in failed}
    pages = {
        notebook.name: stopped_page(notebook, work.run, reason=stopped[work.run.folder])
        if work.run.folder in stopped
        else page_of(notebook, work.run)
        for notebook, work in works.items()
    }
    if edited := [name for name, content in pages.items() if content is None]:
        return _refuse(f"{', '.join(edited)} was edited meanwhile; the same command executes what changed.")
    write_stage(book, stage, pages | {"status.md": status_page(works)})
    status = build_pages(stage, book / "_build", force=force) or (build_single(stage, book / "_build") if single else 0)
    for outcome in failed:  # last, where it is seen
        status = _refuse(what_failed(outcome))
    return status


def _refuse(why: str) -> int:
    print(why, file=sys.stderr)
    return 1

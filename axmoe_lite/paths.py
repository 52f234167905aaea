"""Where everything lives: the book, committed results, and what can be made again.

One environment variable, ``AXMOE_HOME``, moves results, checkpoints and caches together. Without it
they live in the checkout that holds this package, or in ``~/.cache/axmoe_lite`` when the package was
installed without one. Functions, not constants: the variable is read at each call.
"""

import functools
import os
import shutil
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that holds ``data/``: ``AXMOE_HOME``, else the checkout, else the user's cache.

    Raises:
        ValueError: for an ``AXMOE_HOME`` that can be no folder: a file, links in a circle, the home of nobody.
    """
    if chosen := os.environ.get("AXMOE_HOME"):
        try:
            there = Path(chosen).expanduser().resolve()
            problem = "is a file" if there.is_file() else "is a link that leads back to itself" * there.is_symlink()
        # A name too long; nobody's home; before Python 3.13, a circle of links.
        except (OSError, RuntimeError) as reason:
            problem = f"leads to no folder ({reason})"
        if problem:
            raise ValueError(f"AXMOE_HOME is {chosen!r}, which {problem}; set it to a folder of yours, or unset it.")
        return there
    return CHECKOUT if (CHECKOUT / "book").is_dir() else Path.home() / ".cache" / "axmoe_lite"


def expanded(path: Path | str) -> Path:
    """A path that may begin with ``~``. Raises ValueError, with the path, for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no such home folder; write out the path.") from None


def book_dir() -> Path:
    """The chapters: of the checkout, else those that :func:`unpack_book` put into :func:`home`, else in the wheel."""
    if (CHECKOUT / "book").is_dir():
        return CHECKOUT / "book"
    unpacked, shipped = home() / "book", _shipped().get("book/intro.md")
    return unpacked if unpacked.is_dir() or not shipped else shipped.parent


def cache_dir() -> Path:
    """Downloads and half-finished training. Ignored by git; safe to delete, slow to lose."""
    return home() / "data" / "cache"


def runs_dir() -> Path:
    """One folder a run of a chapter, with its notebook, rows and outcome. Ignored by git; ``axmoe collect`` reads."""
    return home() / "data" / "runs"


def results_dir() -> Path:
    """Committed evidence: one CSV a study, written only by :func:`axmoe_lite.runs.record`."""
    return home() / "data" / "results"


def checkpoints_dir() -> Path:
    """Committed weights, each under 2 MB, with their recipe in the file's own header."""
    return home() / "data" / "checkpoints"


def unpack_book(version: str) -> str:
    """Where the package was installed without a checkout: copy the chapters and rows of its wheel into :func:`home`.

    Files that are there stay as they are: they may have been edited. In a checkout nothing is done.

    Args:
        version: of the package; chapters of another version are named, not replaced.

    Returns:
        What a user should know of it; "" if nothing.
    """
    if (CHECKOUT / "book").is_dir():
        return ""
    if not (shipped := _shipped()):
        return ""
    stamp = home() / "book" / ".version"
    if stamp.exists():
        there = stamp.read_text(encoding="utf-8").strip()
        if there == version:
            return ""
        return f"The chapters in {home() / 'book'} are of version {there}, the package is {version}; move them away."
    for name, file in shipped.items():
        target = home() / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    stamp.write_text(version + "\n", encoding="utf-8")
    return f"The chapters and their rows are now in {home()} (AXMOE_HOME chooses another folder)."


@functools.cache
def _shipped() -> dict[str, Path]:
    """What travels in the wheel beside the package, such as ``"book/intro.md"``, and where it was installed."""
    try:
        listed = metadata.files("axmoe_lite") or []
    except metadata.PackageNotFoundError:
        return {}
    marker = "share/axmoe_lite/"
    return {
        file.as_posix().partition(marker)[2]: Path(file.locate()).resolve()
        for file in listed
        if marker in file.as_posix()
    }

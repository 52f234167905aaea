"""Which notebook is meant: the book's chapters by number or name, and any notebook by its path.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import difflib
import json
import os
from pathlib import Path

from axmoe_lite import paths


def chapters() -> list[Path]:
    """The book's chapters in reading order; none where the package was installed without the book."""
    return sorted(paths.book_dir().glob("[0-9][0-9]_*.ipynb"))


def find(chapter: str | Path) -> Path:
    """The notebook that is meant.

    Args:
        chapter: a chapter by number (``"5"``, ``"05"``) or name (``"networks"``, ``"05_networks"``), or the path of
            any notebook; ``book/05_networks.ipynb`` works from any directory.

    Returns:
        Its absolute path.

    Raises:
        ValueError: if there is none; names the nearest chapter, lists all, or says that the book is missing.

    >>> find("5").name
    '05_networks.ipynb'
    """
    asked, there = str(chapter), chapters()
    for path in there:
        number, _, name = path.stem.partition("_")
        if asked in (number, number.lstrip("0") or "0", name, path.stem):
            return path
    for path in (Path(os.path.expanduser(asked)), paths.book_dir().parent / asked, paths.book_dir() / asked):
        if path.suffix == ".ipynb" and os.path.isfile(path):  # False, too, for a name too long to be one
            return path.resolve()
    problem = f"{asked!r} is no chapter and no notebook on disk."
    if not there:
        raise ValueError(f"{problem} {no_book()} Give the path of a notebook, or work in a checkout of the repository.")
    short = {name: path.stem for path in there for name in (path.stem, path.stem.partition("_")[2])}
    near = difflib.get_close_matches(Path(asked).stem, short, n=1, cutoff=0.5)
    near = [] if Path(asked).suffix == ".ipynb" and Path(asked).stem not in near else near  # a file that is not here
    meant = f" Did you mean {short[near[0]]!r}?" if near else ""
    raise ValueError(f"{problem}{meant} There are {', '.join(path.stem for path in there)}; or give a notebook's path.")


def no_book() -> str:
    """The sentence for those who installed the package without the book."""
    return f"There is no book in {paths.book_dir().parent}: the package was installed without it."


def load(notebook: Path) -> dict:
    """The content of a notebook's file.

    Raises:
        ValueError: for what cannot be read or is no notebook of format 4.
    """
    try:
        content = json.loads(Path(notebook).read_text(encoding="utf-8"))
    except OSError as problem:
        raise ValueError(f"{notebook} cannot be read: {problem.strerror}.") from None
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{notebook} is no notebook: it is not JSON ({problem}).") from None
    if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
        raise ValueError(f"{notebook} is no notebook of format 4: it has no cells. Open it in JupyterLab and save it.")
    for number, cell in enumerate(content["cells"], start=1):
        if not _is_cell(cell):
            raise ValueError(
                f"{notebook} is no notebook of format 4: its cell {number} has no type, no source, or metadata that are"
                " none. Open it in JupyterLab and save it."
            )
    return content


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict) or not isinstance(cell.get("cell_type"), str):
        return False
    source, metadata = cell.get("source"), cell.get("metadata", {})
    lines = isinstance(source, list) and all(isinstance(line, str) for line in source)
    return (
        (isinstance(source, str) or lines) and isinstance(metadata, dict) and isinstance(metadata.get("tags", []), list)
    )

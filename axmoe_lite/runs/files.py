"""Files that a run is given: found from any folder, and another run once they hold something else.

    model = ""  # {file} a Python file with a function build()        in the cell of parameters
    path = runs.given_file(model)                                     in a later one

Chapter: 10, "Can a hundred runs be trusted?"
"""

import hashlib
import re
from pathlib import Path

from axmoe_lite import paths

_PINNED = re.compile(r"(.+)@digest=([0-9a-f]{8})")


def pinned_file(text: str) -> str:
    """The whole path with a digest of what the file holds, as in ``/home/me/net.py@digest=5f3a77c1``; "" for "".

    What the file itself reads, such as a module that it imports, is not in the digest.

    Raises:
        ValueError: if there is no such file, or its digest is another than the one given with it.
    """
    if not text:
        return ""
    found = _PINNED.fullmatch(text)
    path, digest = found.groups() if found else (text, "")
    whole = paths.expanded(path).absolute()
    if not whole.is_file():
        raise ValueError(f"there is no file {path!r}{'' if Path(path).is_absolute() else f' in {Path.cwd()}'}.")
    with whole.open("rb") as file:
        now = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    if digest not in ("", now):
        raise ValueError(f"{whole} has changed: its digest was {digest} and is {now}. Name it without its digest.")
    return f"{whole}@digest={now}"


def given_file(text: str) -> Path | None:
    """The path of a parameter ``{file}``, pinned or as papermill hands it over; None for "".

    Raises:
        ValueError: see :func:`pinned_file`.
    """
    return Path(pinned_file(text).rpartition("@digest=")[0]) if text else None

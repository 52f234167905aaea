"""``studies.json``, beside every folder of rows: the key of each study, what it is about, and what made it.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from axmoe_lite import paths
from axmoe_lite.runs import store

NOTES = "studies.json"


def studies(folder: Path) -> dict[str, dict]:
    """What is known of the studies in a folder: name -> ``{"key": [columns], "about": "…", "made_by": "…"}``.

    Raises:
        ValueError: if the file is no JSON, or what it tells of a study is not of this form.
    """
    path = Path(folder) / NOTES
    if not path.exists():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{path} is not readable as JSON ({reason}); correct it by hand.") from reason
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds no studies by name but a {type(told).__name__}; correct it by hand.")
    for study, note in told.items():
        if not _is_note(note):
            raise ValueError(
                f'{path} tells of {study!r} {str(note)[:80]}; a study has its "key", a list of columns, and may have'
                ' "about" and "made_by" in words. Correct it by hand.'
            )
    return told


def _is_note(note: object) -> bool:
    key = note.get("key") if isinstance(note, dict) else None
    named = isinstance(key, list) and key and all(isinstance(column, str) for column in key)
    return bool(named) and all(isinstance(note.get(name, ""), str) for name in ("about", "made_by"))


def take_note(path: Path, scale: str, note: dict) -> None:
    """Set down a study's key once and for all, and the latest of what is told about it."""
    with locked(NOTES, scale):  # one file for all studies of the folder
        known = studies(path.parent)
        old = known.get(path.stem, {})
        if old and set(old["key"]) != set(note["key"]):
            raise ValueError(
                f"The rows of {path} are named by {', '.join(old['key'])}, these by {', '.join(note['key'])}; give the"
                " same key, or record under another study's name."
            )
        known[path.stem] = {
            **note,
            **{name: value for name, value in old.items() if name == "key" or not note.get(name)},
        }
        if known[path.stem] != old:
            text = json.dumps(dict(sorted(known.items())), indent=2, ensure_ascii=False) + "\n"
            store.write_text(path.parent / NOTES, text)


@contextmanager
def locked(name: str, scale: str) -> Iterator[None]:
    """Alone among all processes while inside: between reading a file and replacing it, nobody else may do the same.

    Args:
        name, scale: of what is read and replaced, such as a study.
    """
    folder = (store.present_folder() or paths.cache_dir()) / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.{scale}.lock"):
        yield

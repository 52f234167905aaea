"""Where a run lives: a folder named after its parameters and the source that made it, and what is in there.

    data/runs/05_networks/3f2a9c1b-77ab12cd/
        run.json          which run this is
        source.ipynb      the notebook that is executed
        executing.ipynb   what has been executed so far
        log.txt           what its processes said
        rows/             what it recorded
        notebook.ipynb    the executed notebook, when the run has finished
        error.txt         the traceback, when it has failed
        outcome.json      how it ended; written last

A run without an outcome is running (its lock is held) or was interrupted. Every file is written whole or not at all.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import ast
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from axmoe_lite import __version__, paths

STATES = ("new", "running", "interrupted", "failed", "finished")
ENDED = STATES[-2:]


@dataclass(frozen=True)
class Run:
    """A chapter with all of its parameters, made by a certain source.

    Attributes:
        chapter: the notebook's name without ``.ipynb``.
        parameters: all of them, defaults too.
        source: eight letters that differ where the code does, see :func:`source_digest`.

    >>> Run("05_networks", {"scale": "quick", "seed": 1}, "77ab12cd").id
    '05_networks/436c3ef1-77ab12cd'
    """

    chapter: str
    parameters: dict
    source: str

    @property
    def key(self) -> str:
        """Eight letters of the parameters, whatever their order."""
        return _digest(json.dumps(self.parameters, sort_keys=True, default=str))

    @property
    def id(self) -> str:
        """The folder's path below :func:`axmoe_lite.paths.runs_dir`."""
        return f"{self.chapter}/{self.key}-{self.source}"

    @property
    def folder(self) -> Path:
        """Where its files are; it may not exist yet."""
        return paths.runs_dir() / self.id

    def state(self) -> str:
        """One of :data:`STATES`."""
        if ended := outcome(self):
            return ended["state"]
        if not (self.folder / "run.json").exists():
            return "new"
        return "running" if _held(self.folder / "lock") else "interrupted"


def outcome(run: Run) -> dict:
    """How a run ended: ``state``, ``reason``, ``seconds``, ``started``, ``ended``, ``host``, ``attempts``, ``peak_mb``.

    Empty if it has not ended.

    Raises:
        ValueError: if the file does not say how.
    """
    told = read_json(file := run.folder / "outcome.json")
    if told and told.get("state") not in ENDED:
        raise ValueError(
            f"{file} says that the run ended {told.get('state')!r}; it can be {' or '.join(map(repr, ENDED))}. Delete"
            " its folder to run it again."
        )
    return told


def all_runs(chapter: str = "") -> Iterator[Run]:
    """The runs that have a folder, in the order of their names; of one chapter if it is named."""
    for file in sorted(paths.runs_dir().glob(f"{chapter or '*'}/*/run.json")):
        told = read_json(file)
        run = Run(*(told.get(name) for name in ("chapter", "parameters", "source")))
        if run.folder != file.parent:  # a name is missing or was changed; files would be looked for elsewhere
            raise ValueError(
                f"{file} does not say which run this is, {run.id} says it; delete its folder to run it again."
            )
        yield run


def begin(run: Run, *, notebook: str, made_by: str = "") -> None:
    """Make a run's folder, with its ``run.json`` and the notebook to execute, if they are not there yet.

    Args:
        notebook: the text of the file.
        made_by: the commit of the code, for whoever looks into the folder later.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    if not (run.folder / "run.json").exists():
        write_text(run.folder / "source.ipynb", notebook)
        told = {"chapter": run.chapter, "parameters": run.parameters, "source": run.source}
        write_json(run.folder / "run.json", {**told, "version": __version__, "commit": made_by})


def reopen(run: Run) -> None:
    """Set the outcome and the traceback of a failed attempt aside, numbered, so that another can be made."""
    n = attempts(run)
    for name in ("error.txt", "outcome.json"):
        file = run.folder / name
        if file.exists():
            os.replace(file, file.with_stem(f"{file.stem}-{n}"))


def attempts(run: Run) -> int:
    """How many attempts at a run have been set aside, and the present one."""
    return 1 + len(list(run.folder.glob("outcome-*.json")))


_inside: ContextVar[Path | None] = ContextVar("inside", default=None)


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """What this thread records belongs to the run of that folder meanwhile."""
    before = _inside.set(folder)
    try:
        yield
    finally:
        _inside.reset(before)


def present_folder() -> Path | None:
    """Where the run that this process is part of keeps its files; None outside a run."""
    chosen = _inside.get() or os.environ.get("AXMOE_RUN")
    return Path(chosen) if chosen else None


def scratch(scale: str) -> Path | None:
    """Where a chapter keeps half-finished work, so that it resumes if it is interrupted. None: nowhere.

    Paper scale: the cache, which all runs share, so that one network is trained once. Quick scale: the folder of the
    run, emptied when it finishes; outside a run, where minutes may be lost, nowhere.

    >>> scratch("paper").name
    'cache'
    """
    if scale == "paper":
        return paths.cache_dir()
    return folder / "scratch" if (folder := present_folder()) else None


# ---------------------------------------------------------------------------------- what a run's code is


def source_digest(notebook: Path | str) -> str:
    """Eight letters of the package's code and of a notebook's code cells (but not of its parameters cell).

    Docstrings, comments, text cells and layout do not count: correcting a sentence does not make a run stale.

    Args:
        notebook: its file.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    code = [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell.get("metadata", {}).get("tags", [])
    ]
    return _digest(package_digest(), *map(bare_code, code))


def package_digest() -> str:
    """Eight letters of the package's code, as it is on disk now."""
    package = paths.CHECKOUT / "axmoe_lite"
    files = sorted(package.rglob("*.py"))
    return _digest(*(part for file in files for part in (file.relative_to(package).as_posix(), _code_of(file))))


_known: dict[Path, tuple[tuple[int, int], str]] = {}


def _code_of(file: Path) -> str:
    """The digest of a file's code; parsed again only when the file has changed."""
    seen = file.stat()
    stamp = (seen.st_mtime_ns, seen.st_size)
    if _known.get(file, ((0, 0), ""))[0] != stamp:
        _known[file] = (stamp, _digest(bare_code(file.read_text(encoding="utf-8"))))
    return _known[file][1]


def bare_code(code: str) -> str:
    """Code without docstrings, comments and layout; as it is, if Python cannot read it (a notebook's ``%magic``)."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a NUL; a thousand brackets
        return code.strip()
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _digest(*texts: str) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)}:{text}".encode())
    return found.hexdigest()[:8]


# ---------------------------------------------------------------------------------- files


def write_json(path: Path, data: dict) -> None:
    """Write a dict as JSON, atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, atomically: a reader sees the old file or the new one, never half of one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file's content, atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as wrong:
        if wrong.errno:  # a full disk does not say which file it had no room for
            wrong.filename, wrong.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_json(path: Path) -> dict:
    """What a file holds; empty if there is no such file.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{path} is not readable as JSON ({reason}); delete its folder to run it again.") from reason
    if not isinstance(told, dict):
        raise ValueError(
            f"{path} holds no names and values but a {type(told).__name__}; delete its folder to run it again."
        )
    return told


def _held(path: Path) -> bool:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:  # nobody runs in a folder that cannot be written to
        return False
    lock.release()
    return False

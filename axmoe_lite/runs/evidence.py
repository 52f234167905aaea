"""Evidence: a number travels with where it came from, and one function writes it.

Rows of scale ``"paper"`` go to ``data/results/<study>.csv`` and are committed; rows of scale ``"quick"``
go to ``data/cache/results`` and are not. What a run records goes to the run's own folder, until ``axmoe collect``
takes it from there. Beside the files lies ``studies.json``: the key of each study, what it is about, and what made it.
:func:`read` refuses a file whose rows lack evidence.

Chapter: 05, "What happens to a network?"
"""

import csv
import datetime
import io
import math
import platform
import re
import shlex
import subprocess
from pathlib import Path

import torch

from axmoe_lite import __version__, paths
from axmoe_lite.datasets import Images
from axmoe_lite.runs import store
from axmoe_lite.runs.ledger import is_kept, write_ledger
from axmoe_lite.runs.notes import locked, take_note
from axmoe_lite.runs.tables import read_rows
from axmoe_lite.runs.words import word, words

SCALES = ("quick", "paper")
EVIDENCE = (
    "dataset",
    "n_train",
    "n_test",
    "scale",
    "seed",
    "epochs",
    "device",
    "commit",
    "date",
    "version",
    "seconds",
)


def evidence(images: Images | int, *, scale: str, seed: int, epochs: int, device: str = "cpu") -> dict:
    """The evidence columns that all rows of one run share (``seconds`` belongs to each row).

    Args:
        images: the set the numbers were measured on; or, where only time was measured, how many random
            inputs went in.
        scale: ``"quick"`` or ``"paper"``.
        seed, epochs: of the training behind the numbers.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; it can be {', '.join(map(repr, SCALES))}.")
    if isinstance(images, int):
        name, n_train, n_test = "random numbers", 0, images
    else:
        name, n_train, n_test = images.name, len(images.x_train), len(images.x_test)
    return {
        "dataset": name,
        "n_train": n_train,
        "n_test": n_test,
        "scale": scale,
        "seed": seed,
        "epochs": epochs,
        "device": device_name(device),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "version": __version__,
    }


def device_name(device: str) -> str:
    """The processor in words, with the number of threads torch uses on it."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found[1].strip() if found else model
    return f"{model}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of the code that runs, with ``+`` if tracked files of the package differ from it; or "unknown"."""
    try:
        here = {"cwd": paths.CHECKOUT, "capture_output": True, "text": True, "check": True}
        name = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **here).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "axmoe_lite"], **here).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if changed else name


def record(study: str, rows: list[dict], *, key: tuple[str, ...], about: str = "", made_by: str = "") -> Path:
    """Write rows of a study to its CSV file, atomically, next to those that are there.

    Any number of processes may record the same study at once. Inside a run, the file is the run's own.

    Args:
        study: the file's name without ``.csv``.
        rows: dicts with the same columns, among them all of :data:`EVIDENCE`, all of one scale.
        key: the columns that name a row; a new row replaces an old one with the same key.
        about: what was measured, a sentence for the ledger; empty leaves what is there.
        made_by: the command that measures it; empty leaves what is there, or, in a run, is the run.

    Returns:
        The file.

    Raises:
        ValueError: for no rows, a missing column, missing evidence, rows of two scales, or a key or columns other
            than those of the file. The file is then as it was.
    """
    _check(study, rows, key)
    scale = rows[0]["scale"]
    path = _file(study, scale)
    texts = [{column: _text(value) for column, value in row.items()} for row in rows]
    with locked(study, scale):
        old = _rows(path)
        if old and set(old[0]) != set(texts[0]):
            differ = ", ".join(sorted(set(old[0]) ^ set(texts[0])))
            raise ValueError(f"{path} has other columns than these rows ({differ}); record under another study's name.")
        kept = {tuple(row[c] for c in key): row for row in old}
        if len(kept) < len(old):
            raise ValueError(f"{path} has several rows with the same {', '.join(key)}: this key cannot name its rows.")
        kept.update({tuple(row[c] for c in key): row for row in texts})
        path.parent.mkdir(parents=True, exist_ok=True)
        take_note(path, scale, {"key": list(key), "about": about, "made_by": made_by or _present_command()})
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
        store.write_text(path, text.getvalue())
    if path.parent == paths.results_dir() and is_kept():
        write_ledger()
    return path


def read(study: str, *, scale: str = "paper") -> list[dict[str, str]]:
    """The rows of a study, as text; none if it was not recorded at that scale.

    Inside a run: the run's own rows if it has recorded this study, those that all share otherwise.

    Raises:
        ValueError: if the file lacks an evidence column or a row leaves one empty.
    """
    own = _file(study, scale)
    return _rows(own if own.exists() else _shared(scale) / own.name)


def recorded(study: str, *, scale: str) -> list[dict[str, str]]:
    """The rows that this run has recorded before it was interrupted, so that it can skip what it knows.

    Outside a run there are none: what others have measured is not to be taken for one's own.

    >>> recorded("resilience_resnet20_digits", scale="quick")
    []
    """
    return _rows(_file(study, scale)) if store.present_folder() else []


def command(chapter: str, *parameters: dict) -> str:
    """What to type into a shell to run a chapter with these parameters, once or in all combinations of a sweep.

    Args:
        chapter: its name.
        parameters: of each run. Where the runs are no complete grid, the last one is named, and how many there are.

    >>> command("08_learning", {"scale": "quick", "circuits": ["mul8s_1L12", "roba()"]})
    "axmoe run 08_learning scale=quick 'circuits=[mul8s_1L12,roba()]'"
    >>> command("05_networks", {"scale": "paper", "seed": 0}, {"scale": "paper", "seed": 1})
    'axmoe sweep 05_networks scale=paper seed=0,1'
    """
    given = {name: dict.fromkeys(word(each.get(name, "")) for each in parameters) for name in parameters[-1]}
    in_all = math.prod(map(len, given.values()))
    if in_all == len({tuple(words(each)) for each in parameters}):
        verb, typed = "run" if in_all == 1 else "sweep", [f"{n}={','.join(all_)}" for n, all_ in given.items()]
        return shlex.join(["axmoe", verb, chapter, *typed])
    return f"{command(chapter, parameters[-1])} (the last of {len(parameters)} runs)"


def _present_command() -> str:
    folder = store.present_folder()
    told = store.read_json(folder / "run.json") if folder else {}
    return command(told["chapter"], told["parameters"]) if told else ""


def _shared(scale: str) -> Path:
    return paths.results_dir() if scale == "paper" else paths.cache_dir() / "results"


def _file(study: str, scale: str) -> Path:
    folder = store.present_folder()
    return (folder / "rows" / scale if folder else _shared(scale)) / f"{study}.csv"


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    rows = read_rows(path)
    for number, row in enumerate(rows, start=2):
        missing = [column for column in EVIDENCE if not row.get(column)]
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing)}; every row needs its evidence.")
    return rows


def _check(study: str, rows: list[dict], key: tuple[str, ...]) -> None:
    if not rows:
        raise ValueError(f"No rows were given for {study!r}; at least one is needed.")
    for row in rows:
        missing = [c for c in (*EVIDENCE, *key) if row.get(c) in (None, "")]
        if missing or list(row) != list(rows[0]):
            problem = f"has no {', '.join(missing)}" if missing else f"has columns {list(row)}, others {list(rows[0])}"
            raise ValueError(f"A row of {study!r} {problem}; all rows need the same columns and their evidence.")
    if len({row["scale"] for row in rows}) > 1:
        raise ValueError(f"The rows of {study!r} are of several scales; record each scale by itself.")


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)

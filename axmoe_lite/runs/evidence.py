"""Evidence: a number travels with where it came from, and one function writes it.

Rows of scale ``"paper"`` go to ``data/results/<study>.csv`` and are committed; rows of scale ``"quick"``
go to ``data/cache/results`` and are not. :func:`read` refuses a file whose rows lack evidence.

Chapter: 05, "What happens to a network?"
"""

import csv
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from axmoe_lite import __version__, paths
from axmoe_lite.datasets import Images

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


def record(study: str, rows: list[dict], *, key: tuple[str, ...]) -> Path:
    """Write rows of a study to its CSV file, atomically, next to those that are there.

    Args:
        study: the file's name without ``.csv``.
        rows: dicts with the same columns, among them all of :data:`EVIDENCE`, all of one scale.
        key: the columns that name a row; a new row replaces an old one with the same key.

    Returns:
        The file.

    Raises:
        ValueError: for no rows, a missing column, missing evidence, rows of two scales, or columns other
            than those of the file. The file is then as it was.
    """
    _check(study, rows, key)
    path = _file(study, rows[0]["scale"])
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [{column: _text(value) for column, value in row.items()} for row in rows]
    old = read(study, scale=rows[0]["scale"])
    if old and set(old[0]) != set(texts[0]):
        differ = ", ".join(sorted(set(old[0]) ^ set(texts[0])))
        raise ValueError(f"{path} has other columns than these rows ({differ}); record under another study's name.")
    kept = {tuple(row[c] for c in key): row for row in old}
    kept.update({tuple(row[c] for c in key): row for row in texts})
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    os.replace(partial, path)
    return path


def read(study: str, *, scale: str = "paper") -> list[dict[str, str]]:
    """The rows of a study, as text; none if it was not recorded at that scale.

    Raises:
        ValueError: if the file lacks an evidence column or a row leaves one empty.
    """
    path = _file(study, scale)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=2):
        missing = [column for column in EVIDENCE if not row.get(column)]
        if missing:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing)}; every row needs its evidence.")
    return rows


def _file(study: str, scale: str) -> Path:
    folder = paths.results_dir() if scale == "paper" else paths.cache_dir() / "results"
    return folder / f"{study}.csv"


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

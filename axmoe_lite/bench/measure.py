"""From a case to rows of evidence: all columns in turns, medians of ratios, one table.

Chapter: 06, "Faster than float32?"
"""

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from axmoe_lite import runs
from axmoe_lite.bench.cases import Case
from axmoe_lite.bench.columns import FLOAT32, FROZEN, NAIVE, PREPARED, SEED, table_of
from axmoe_lite.factors import factorise
from axmoe_lite.runs import cores

KEY = ("device", "case", "axis", "column")
SERIES = ("scaling", "peak")  # groups whose rows go to speed_scaling.csv, the others' to speed_cases.csv
UNITS = ("avx512_vnni", "avx512vbmi", "amx_int8", "avx_vnni", "asimddp", "i8mm")  # what /proc/cpuinfo calls them


@functools.cache
def machine() -> dict[str, str]:
    """What a speed depends on beside the device: libraries, and the processor's byte units."""
    try:
        numba = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        numba = "none"
    info = Path("/proc/cpuinfo")
    found = set(re.findall(r"\w+", info.read_text())) if info.exists() else set()
    units = " ".join(unit for unit in UNITS if unit in found)
    return {"torch": torch.__version__, "numba": numba, "units": units or "none known"}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """torch with this many threads inside, and as many as before afterwards."""
    if not 1 <= number <= cores():
        raise ValueError(f"{number} threads were asked for; this process has {cores()} cores, so give 1 to {cores()}.")
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(case: Case, *, scale: str, repeats: int = 9) -> list[dict]:
    """Time all columns of a case in turns; one row each, complete with evidence.

    ``speed`` is how many times as fast as float32 a column is: the median over the turns of the ratio within
    a turn, with its quartiles beside it. ``seconds`` is the median time of a call. A column that did only a
    part of the work has its time divided by that part, and ``note`` says so.

    Args:
        case: one of :func:`~axmoe_lite.bench.builders`.
        scale: ``"quick"`` or ``"paper"``.
        repeats: number of turns.

    Raises:
        RuntimeError: if something has changed torch's number of threads on the way.
    """
    number = torch.get_num_threads()
    with torch.inference_mode(not case.training):
        turns = runs.turns(case.columns, repeats=repeats)
    if torch.get_num_threads() != number:  # numba can do that: both draw on one OpenMP
        raise RuntimeError(
            f"torch had {number} threads before {case.name!r} and {torch.get_num_threads()} after it: these times"
            " would be of neither number."
        )
    origin = runs.evidence(case.inputs, scale=scale, seed=SEED, epochs=0)
    rows, baseline = [], np.array(turns[FLOAT32])
    for column, values in turns.items():
        share = case.share.get(column, 1.0)
        seconds = np.array(values) / share
        low, speed, high = np.percentile(baseline / seconds, [25, 50, 75])
        note = f"measured on {share * case.inputs:.0f} of {case.inputs} inputs, time scaled" if share < 1 else ""
        rows.append(
            {
                "case": case.name,
                "group": case.group,
                "axis": case.axis,
                "value": case.value,
                "column": column,
                "rank": _rank(case, column),
                "threads": torch.get_num_threads(),
                "macs": case.macs,
                "speed": float(speed),
                "speed_low": float(low),
                "speed_high": float(high),
                "repeats": repeats,
                "note": note,
                **machine(),
                **origin,
                "seconds": float(np.median(seconds)),
            }
        )
    return rows


def _rank(case: Case, column: str) -> int | str:
    """How many exact products one approximate product takes, for columns that have a multiplier."""
    if column == "rank R":
        return case.value
    if column in (FLOAT32, PREPARED, NAIVE, "int8 units"):
        return ""
    return factorise(table_of(column.removesuffix(FROZEN))).rank


def run(
    builders: Iterable[Callable[[], Case]],
    *,
    scale: str,
    repeats: int = 9,
    thread_counts: Iterable[int] = (1,),
    progress: bool = True,
    done: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """Build and measure cases, each with each number of threads; ``done`` is given the rows of each as they come.

    Raises:
        ValueError: for more threads than there are cores.
    """
    todo = [(number, build) for number in thread_counts for build in builders]
    rows: list[dict] = []
    with tqdm(todo, desc="bench", unit="case", disable=not progress) as bar:
        for number, build in bar:
            with threads(number):  # while building, too: libraries lay weights out for so many
                case = build()
                bar.set_postfix_str(f"{case.name}, {_threads(number)}")
                new = measure(case, scale=scale, repeats=repeats)
            rows += new
            done(new)
    return rows


def record(rows: list[dict]) -> list[Path]:
    """Write rows to ``speed_cases.csv`` and ``speed_scaling.csv``; returns the files."""
    series = [row for row in rows if row["group"] in SERIES]
    others = [row for row in rows if row["group"] not in SERIES]
    files = (("speed_cases", others), ("speed_scaling", series))
    return [runs.record(study, some, key=KEY) for study, some in files if some]


def table(rows: list[dict]) -> str:
    """The rows of one case as text for a terminal."""
    first = rows[0]
    size = f"{first['repeats']} turns, {first['macs'] / 1e6:,.0f} M products; G/s: billions of products a second"
    lines = [f"{first['case']}, {_threads(first['threads'])}", f"  {size}"]
    lines.append(f"  {'':<18} {'rank':>4} {'time':>11} {'speed':>8}  {'quartiles':<14} {'G/s':>6}")
    for row in rows:
        speed, low, high = (_short(row[name]) for name in ("speed", "speed_low", "speed_high"))
        speed, spread = f"{speed}x", f"{low} to {high}"
        rate = row["macs"] / row["seconds"] / 1e9
        line = f"  {row['column']:<18} {row['rank']!s:>4} {row['seconds'] * 1e3:8.2f} ms {speed:>8}  {spread:<14}"
        lines.append(f"{line} {rate:6.3g}" + (f"\n  {'':<18} ({row['note']})" if row["note"] else ""))
    return "\n".join(lines)


def _threads(number: int) -> str:
    return f"{number} thread" + ("s" if number > 1 else "")


def _short(speed: float) -> str:
    return f"{speed:.2f}" if speed >= 0.1 else f"{speed:.2g}"

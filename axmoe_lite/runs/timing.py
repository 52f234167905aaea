"""Seconds, measured so that they can be compared: every candidate has its go in each turn.

Chapter: 06, "How fast is exact simulation?"
"""

import math
import os
import statistics
import time
from collections.abc import Callable


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def turns(
    calls: dict[str, Callable[[], object]], *, repeats: int = 7, at_least: float = 0.005
) -> dict[str, list[float]]:
    """Seconds of each call in each turn: all have their go once a turn, so that a slow moment hits all alike.

    Compare them as ratios within a turn, and name the machine. A short call is repeated until ``at_least``
    seconds are filled, after one unmeasured call: what ran before it left the caches and the units in a state
    that is not its own.

    >>> {name: len(seconds) for name, seconds in turns({"a": lambda: 1, "b": lambda: 2}, repeats=3).items()}
    {'a': 3, 'b': 3}
    """
    often = {}
    for name, call in calls.items():
        call()  # may compile, or lay weights out
        often[name] = max(1, math.ceil(at_least / max(_seconds(call), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if often[name] > 1:
                call()
            seconds[name].append(_seconds(call, often[name]))
    return seconds


def _seconds(call: Callable[[], object], often: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(often):
        call()
    return (time.perf_counter() - start) / often


def interleaved(calls: dict[str, Callable[[], object]], *, repeats: int = 7) -> dict[str, float]:
    """Median seconds of each call, measured in :func:`turns`.

    >>> sorted(interleaved({"a": lambda: 1, "b": lambda: 2}, repeats=3))
    ['a', 'b']
    """
    return {name: statistics.median(values) for name, values in turns(calls, repeats=repeats).items()}

"""Which core for which layer: pipelines of stages, layers dealt out to them, and what the result does in a second.

    pipelines()                   all ways to make stages of four big and four little cores: 64
    points(29)                    and to deal 29 layers out to them: 5,379,616
    merge_stage(times)            Pipe-it's search: work_flow, which deals layers out by find_split, and merged stages
    best_split(pipeline, times)   the best that can be dealt out to one pipeline, exactly
    optimum(times)                the best of all of them, exactly
    gantt(schedule, images=9)     who works on which image when

A stage is a core type and a number of cores, a pipeline is a tuple of stages, big cores first, a split says how many
layers each stage takes, in the order of the layers. Times are a table from each stage to the seconds of each layer
there, float [W]. One image after another goes through all stages, so the slowest stage alone sets the throughput:

    stage time = sum of its layers' times,   throughput = 1 / max stage time,   latency = sum of stage times.

Source: Pipe-it (arXiv 1903.05898). The abstract gives the idea; the three functions of its search are built here as
the field describes them, and what the description leaves open is said where it is decided.

Letters: W layers, p stages.

Chapter: 19, "Which core for which layer?"
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from axmoe_lite import moe

Stage = tuple[str, int]
Pipeline = tuple[Stage, ...]
Times = Mapping[Stage, Sequence[float]]

CORES = {"big": 4, "little": 4}
PARTITIONS = ("work_flow", "exact")


@dataclass(frozen=True)
class Schedule:
    """Layers on stages. A stage that got no layer is not in it: its cores are idle.

    Attributes:
        pipeline: p stages, each a core type and a number of cores.
        split: layers of each stage, at least 1, W in all.
        stage_s: seconds of each stage for one image.
        throughput: images per second in steady state.
        latency_s: seconds of one image through an empty pipeline.
    """

    pipeline: Pipeline
    split: tuple[int, ...]
    stage_s: tuple[float, ...]
    throughput: float
    latency_s: float


def pipelines(cores: Mapping[str, int] = CORES) -> list[Pipeline]:
    """All pipelines that use all cores, each stage of one type, the types in the order given.

    Args:
        cores: how many there are of each type, at least 1. C cores of a type can be cut into stages in 2^(C-1) ways.

    Returns:
        The pipelines, those of few stages first.

    Raises:
        ValueError: for no cores, or a number that is not a whole one above 0.

    >>> len(pipelines())
    64
    >>> pipelines({"big": 2, "little": 1})
    [(('big', 2), ('little', 1)), (('big', 1), ('big', 1), ('little', 1))]
    """
    _check_cores(cores)
    ways = ([tuple((kind, h) for h in cut) for cut in _compositions(count)] for kind, count in cores.items())
    found = [tuple(itertools.chain.from_iterable(parts)) for parts in itertools.product(*ways)]
    return sorted(found, key=len)


def points(layers: int, cores: Mapping[str, int] = CORES) -> int:
    """How many ways there are to deal out layers to all pipelines, no stage without one: (pipeline, split) pairs.

    W layers are cut into p ranges in C(W-1, p-1) ways. Four big and four little cores give C(W+5, 7) in all.

    Raises:
        ValueError: for fewer than one layer, or cores as in :func:`pipelines`.

    >>> points(29)
    5379616
    """
    if layers < 1:
        raise ValueError(f"{layers} layers were asked for; a network has at least 1.")
    return sum(math.comb(layers - 1, len(pipeline) - 1) for pipeline in pipelines(cores))


def evaluate(pipeline: Sequence[Stage], split: Sequence[int], times: Times) -> Schedule:
    """What a pipeline does with a split.

    Args:
        pipeline: p stages; more cores of a type than the board has are not noticed here.
        split: layers of each stage, W in all. A stage with 0 layers is left out of the result.
        times: seconds of each layer, positive [W], for each of the stages.

    Raises:
        ValueError: for a stage that has no times, times that are not W positive numbers, a split of another length or
            sum, or a pipeline of more stages than layers.

    >>> evaluate([("big", 1), ("little", 2)], [2, 1], {("big", 1): [1, 2, 5], ("little", 2): [2, 4, 8]})
    Schedule(pipeline=(('big', 1), ('little', 2)), split=(2, 1), stage_s=(3.0, 8.0), throughput=0.125, latency_s=11.0)
    """
    table = _table(times, pipeline)
    layers = _check_stages(pipeline, table)
    if len(split) != len(pipeline) or min(split) < 0 or sum(split) != layers:
        raise ValueError(
            f"The split {tuple(split)} was given for {len(pipeline)} stages and {layers} layers; it needs a number of"
            f" layers for each stage, {layers} in all."
        )
    return _schedule(pipeline, split, table)


def find_split(first: Sequence[float], second: Sequence[float], kept: int) -> int:
    """Pipe-it's: layers move from the end of one stage to the next while the slower of the two gets faster.

    So a layer moves when the second stage with it is faster than the first with it.

    Args:
        first: seconds of each layer of the pair on the first stage's cores.
        second: the same layers on the second's.
        kept: how many of them the first stage has now, those in front.

    Returns:
        How many it keeps, 0 to ``kept``.

    >>> find_split([1, 1, 1, 1], [3, 3, 3, 3], 4)
    3
    """
    slower = np.maximum(_ahead(first), np.sum(second) - _ahead(second))
    while kept and slower[kept - 1] < slower[kept]:
        kept -= 1
    return int(kept)


def work_flow(pipeline: Sequence[Stage], times: Times) -> Schedule:
    """Pipe-it's: all layers to the first stage, then :func:`find_split` on each pair of neighbours until none moves.

    A sweep goes from the first pair to the last. Layers only ever move on, so it ends; and since a layer that could
    move still can after others have moved, the result does not depend on the order of the pairs. No layer moves
    unless its own pair gains by it, so a fast stage further down can stay idle: :func:`best_split` is often better.

    Raises:
        ValueError: as :func:`evaluate`.

    >>> work_flow([("big", 1), ("little", 2)], {("big", 1): [1, 2, 4], ("little", 2): [2, 4, 6]}).split
    (2, 1)
    """
    table = _table(times, pipeline)
    _check_stages(pipeline, table)
    return _schedule(pipeline, _work_flow(pipeline, table), table)


def best_split(pipeline: Sequence[Stage], times: Times, *, idle: bool = True) -> Schedule:
    """The best that can be dealt out to a pipeline, by dynamic programming: O(p W^2). Not from the paper.

    Args:
        idle: a stage may stay without layers, which is better where its cores are slow. False: each takes one or more.

    Raises:
        ValueError: as :func:`evaluate`.

    >>> best_split([("big", 1), ("little", 2)], {("big", 1): [1, 2, 4], ("little", 2): [2, 4, 6]}).stage_s
    (3.0, 6.0)
    """
    table = _table(times, pipeline)
    _check_stages(pipeline, table)
    return _schedule(pipeline, _exact(pipeline, table, idle), table)


def merge_stage(
    times: Times, cores: Mapping[str, int] = CORES, *, partition: str = "work_flow", through: bool = False
) -> Schedule:
    """Pipe-it's search: from stages of one core each, neighbours of a type become one while throughput rises.

    Pairs are tried in the order of their slower stage, slowest first, then of the pair's sum, smallest first, so that
    the bottleneck is joined to its lighter neighbour; the first pair whose union raises the throughput is merged, and
    it begins anew. Which pairs are tried after the bottleneck's own is our reading. Stages that :func:`work_flow`
    leaves without layers can be merged too; those that stay so in the end are left out of the result, so that there
    are never more stages than layers.

    Args:
        times: for each type and each number of cores up to all of them.
        cores: see :func:`pipelines`.
        partition: ``"work_flow"``, the paper's; ``"exact"``, :func:`best_split` in its place, not from the paper.
        through: not from the paper: go on when no union helps, always with the best of them, until each type is one
            stage, and take the best pipeline of all that were seen.

    Raises:
        ValueError: as :func:`pipelines`, or for times that are missing or not positive numbers.

    >>> times = {("big", h): [1 / h, 1 / h, 1 / h] for h in (1, 2)}
    >>> merge_stage(times, {"big": 2}).pipeline, merge_stage(times, {"big": 2}).stage_s
    ((('big', 2),), (1.5,))
    """
    moe.check_option("partition", partition, PARTITIONS)
    table = _full_table(times, cores)

    def deal(pipeline: Pipeline) -> tuple[list[float], Pipeline, tuple[int, ...]]:
        split = _work_flow(pipeline, table) if partition == "work_flow" else _exact(pipeline, table, True)
        return _stage_s(pipeline, split, table), pipeline, split

    seen = [deal(tuple((kind, 1) for kind, count in cores.items() for _ in range(count)))]
    while True:
        seconds, pipeline, _ = seen[-1]
        unions = (deal(_union(pipeline, i)) for i in _pairs(pipeline, seconds))
        if through:
            chosen = min(unions, key=_slowest, default=None)
        else:
            chosen = next((one for one in unions if _slowest(one) < _slowest(seen[-1])), None)
        if chosen is None:
            _, pipeline, split = min(seen, key=_slowest)
            return _schedule(pipeline, split, table)
        seen.append(chosen)


def optimum(times: Times, cores: Mapping[str, int] = CORES, *, idle: bool = True) -> Schedule:
    """The best schedule that there is: :func:`best_split` of each of :func:`pipelines`. Not from the paper.

    Among equals the one with fewer stages, then that with the smaller latency.

    Args:
        times, cores: see :func:`merge_stage`.
        idle: stages may stay without layers, as in :func:`merge_stage`. False: all cores work, and pipelines of more
            stages than layers are skipped.

    Raises:
        ValueError: as :func:`merge_stage`; and without ``idle`` for fewer layers than types of cores.

    >>> optimum({("big", h): [1 / h, 1 / h, 1 / h] for h in (1, 2)}, {"big": 2}).pipeline
    (('big', 2),)
    """
    table = _full_table(times, cores)
    layers = len(next(iter(table.values())))
    if not idle and layers < len(cores):
        raise ValueError(
            f"{layers} layer(s) cannot keep {len(cores)} types of cores busy, since a stage has one type; allow idle."
        )
    tried = (pipeline for pipeline in pipelines(cores) if idle or len(pipeline) <= layers)
    found = (_schedule(pipeline, _exact(pipeline, table, idle), table) for pipeline in tried)
    return min(found, key=lambda one: (-one.throughput, len(one.split), one.latency_s))


def gantt(schedule: Schedule, *, images: int = 12, queue: int = 1) -> list[dict[str, Any]]:
    """Who works on which image when, simulated exactly: all images are there from the start, in order.

    Between two stages is a queue. A stage that has finished an image puts it there, or, while the queue is full,
    waits with the image in its hands; then it takes the next one from the queue before it.

    Args:
        images: how many, at least 1.
        queue: images that a queue can hold, at least 1.

    Returns:
        A dict for each image and stage: ``image``, ``stage`` (both from 0), ``type``, ``cores``, ``start_s``,
        ``end_s``, ``wait_s`` (how long before the start the image had left the hands of the stage before, or 0) and
        ``blocked_s`` (how long after the end the stage had to hold it).

    Raises:
        ValueError: for numbers below 1.

    >>> two = evaluate([("big", 1), ("little", 1)], [1, 1], {("big", 1): [1, 1], ("little", 1): [3, 3]})
    >>> [(row["start_s"], row["end_s"], row["blocked_s"]) for row in gantt(two, images=4) if row["stage"] == 0]
    [(0.0, 1.0, 0.0), (1.0, 2.0, 0.0), (2.0, 3.0, 1.0), (4.0, 5.0, 2.0)]
    """
    if images < 1 or queue < 1:
        raise ValueError(f"images is {images} and queue {queue}; both are at least 1.")
    stages = len(schedule.pipeline)
    start, left = np.zeros((images, stages)), np.zeros((images, stages))
    rows = []
    for i, s in itertools.product(range(images), range(stages)):
        come = left[i, s - 1] if s else 0.0
        start[i, s] = max(come, left[i - 1, s] if i else 0.0)
        end = start[i, s] + schedule.stage_s[s]
        # A place is free once the image that many before has been taken out; the last stage gives its images away.
        left[i, s] = end if s == stages - 1 or i < queue else max(end, start[i - queue, s + 1])
        kind, cores = schedule.pipeline[s]
        times = {"start_s": float(start[i, s]), "end_s": float(end)}
        waits = {"wait_s": float(start[i, s] - come) if s else 0.0, "blocked_s": float(left[i, s] - end)}
        rows.append({"image": i, "stage": s, "type": kind, "cores": cores, **times, **waits})
    return rows


# ------------------------------------------------------------------------------ on a checked table


def _compositions(total: int) -> list[tuple[int, ...]]:
    """All ways to write a number as an ordered sum of numbers from 1."""
    if total == 0:
        return [()]
    return [(first, *rest) for first in range(total, 0, -1) for rest in _compositions(total - first)]


def _ahead(seconds: Sequence[float]) -> np.ndarray:
    """[n + 1]: the sum of all in front of each place."""
    return np.concatenate([[0.0], np.cumsum(seconds)])


def _stage_s(pipeline: Sequence[Stage], split: Sequence[int], table: dict[Stage, np.ndarray]) -> list[float]:
    ends = np.cumsum(split)
    parts = zip(pipeline, split, ends, strict=True)
    return [float(table[stage][end - count : end].sum()) for stage, count, end in parts]


def _schedule(pipeline: Sequence[Stage], split: Sequence[int], table: dict[Stage, np.ndarray]) -> Schedule:
    seconds = _stage_s(pipeline, split, table)
    stages, counts, seconds = zip(*(one for one in zip(pipeline, split, seconds, strict=True) if one[1]), strict=True)
    counts = tuple(int(count) for count in counts)
    return Schedule(tuple(stages), counts, tuple(seconds), 1 / max(seconds), sum(seconds))


def _work_flow(pipeline: Sequence[Stage], table: dict[Stage, np.ndarray]) -> tuple[int, ...]:
    seconds = [table[stage] for stage in pipeline]
    bounds = [0] + [len(seconds[0])] * len(pipeline)
    before = None
    while bounds != before:
        before = bounds.copy()
        for i in range(len(pipeline) - 1):
            low, high = bounds[i], bounds[i + 2]
            kept = bounds[i + 1] - low
            bounds[i + 1] = low + find_split(seconds[i][low:high], seconds[i + 1][low:high], kept)
    return tuple(np.diff(bounds).tolist())


def _exact(pipeline: Sequence[Stage], table: dict[Stage, np.ndarray], idle: bool) -> tuple[int, ...]:
    """best[w]: the smallest maximum of the stages so far when they have the first w layers."""
    layers = len(table[pipeline[0]])
    too_few = np.tri(layers + 1, k=-1 if idle else 0, dtype=bool)  # [v, w]: the stage takes layers v to w
    best = np.full(layers + 1, np.inf)
    best[0] = 0.0
    came = []
    for stage in pipeline:
        ahead = _ahead(table[stage])
        slowest = np.maximum(best[:, None], ahead[None, :] - ahead[:, None])
        slowest[too_few] = np.inf
        came.append(slowest.argmin(0))
        best = slowest.min(0)
    bounds = [layers]
    for choice in reversed(came):
        bounds.append(int(choice[bounds[-1]]))
    return tuple(np.diff(bounds[::-1]).tolist())


def _slowest(dealt: tuple) -> float:
    return max(dealt[0])


def _union(pipeline: Pipeline, i: int) -> Pipeline:
    kind, cores = pipeline[i]
    return (*pipeline[:i], (kind, cores + pipeline[i + 1][1]), *pipeline[i + 2 :])


def _pairs(pipeline: Pipeline, seconds: Sequence[float]) -> list[int]:
    """The first of each two neighbours of one type, in the order in which merging them is tried."""
    found = [i for i in range(len(pipeline) - 1) if pipeline[i][0] == pipeline[i + 1][0]]
    return sorted(found, key=lambda i: (-max(seconds[i : i + 2]), sum(seconds[i : i + 2])))


# ------------------------------------------------------------------------------ what is asked for is checked


def _check_cores(cores: Mapping[str, int]) -> None:
    if not cores or any(not isinstance(count, int) or count < 1 for count in cores.values()):
        raise ValueError(f"cores is {dict(cores)}; it needs a type or more, each with a whole number of cores from 1.")


def _check_stages(pipeline: Sequence[Stage], table: dict[Stage, np.ndarray]) -> int:
    layers = len(next(iter(table.values())))
    if len(pipeline) > layers:
        raise ValueError(
            f"A pipeline of {len(pipeline)} stages was asked for {layers} layer(s), and each stage needs one; join"
            " stages, or let optimum() or merge_stage() choose."
        )
    return layers


def _full_table(times: Times, cores: Mapping[str, int]) -> dict[Stage, np.ndarray]:
    _check_cores(cores)
    return _table(times, [(kind, h) for kind, count in cores.items() for h in range(1, count + 1)])


def _table(times: Times, stages: Sequence[Stage]) -> dict[Stage, np.ndarray]:
    """The times of the stages as arrays, checked."""
    if not stages:
        raise ValueError("A pipeline without stages was given; it needs one or more, such as [('big', 4)].")
    for stage in stages:
        if stage not in times:
            raise ValueError(f"There are no times for the stage {stage!r}, only for {', '.join(map(repr, times))}.")
    table = {stage: np.asarray(times[stage], dtype=float) for stage in stages}
    shape = next(iter(table.values())).shape
    for stage, seconds in table.items():
        if seconds.ndim != 1 or not len(seconds) or seconds.shape != shape:
            raise ValueError(
                f"The times of {stage!r} have shape {list(seconds.shape)}, those of {stages[0]!r} {list(shape)}; each"
                " stage needs one number for each layer."
            )
        if not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError(f"The times of {stage!r} must be positive seconds; one of them is {seconds.min():g}.")
    return table

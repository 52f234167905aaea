"""Images one after another through a placement, in simulated time, routed as they really are.

    needed = used(parts, seen)                        which parts each image needs
    done = stream(needed, parts, placed, macs)        who works on what, when

:mod:`axmoe_lite.search.places` promises a throughput by expectations. Here images wait for each other.

Chapter: 20, "Where should an expert live?"
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from axmoe_lite import cost, moe
from axmoe_lite.search.places import BOARD, Core, Placed, check


def used(parts: Mapping[str, Sequence[str]], seen: Mapping[str, Sequence[moe.Routing]]) -> np.ndarray:
    """Which parts each input needs: bool [N, parts], from what :func:`axmoe_lite.moe.watching` saw of the network.

    Args:
        parts: an expert of a mixture is one part or several, called after it, as
            :func:`axmoe_lite.search.groups` calls them; every other part is needed by every input.
        seen: mixture to its decisions, batch by batch. N is the number of decisions: of images, or of tokens where a
            gate routes tokens.

    Raises:
        ValueError: where mixtures made unlike numbers of decisions, or none.
    """
    chosen = {name: np.concatenate([one.choice.cpu().numpy() for one in of]) for name, of in seen.items() if of}
    sizes = sorted({len(choice) for choice in chosen.values()})
    if len(sizes) != 1:
        raise ValueError(
            f"The mixtures made {sizes or 'no'} decisions; watch a network whose mixtures all route images, on at least"
            " one batch."
        )
    needed = np.ones((sizes[0], len(parts)), bool)
    for column, part in enumerate(parts):
        for name, choice in chosen.items():
            prefix = f"{name}.experts.".lstrip(".")
            if part.startswith(prefix):
                needed[:, column] = choice == int(part.removeprefix(prefix).split(".")[0])
    return needed


@dataclass(frozen=True, eq=False)
class Streamed:
    """Images that went through a placement one after another.

    Attributes:
        throughput: images per second, the first and the last quarter left out, where the line fills and empties.
        time_s: float64 [N], of each image from entering to its answer, waiting too.
        busy: core type to the share of that time in which it worked.
        crossings: how often an image went from one core type to another, the mean.
        spans: (image, core type, start, end, part) of everything that ran, by start; seconds.
    """

    throughput: float
    time_s: np.ndarray
    busy: dict[str, float]
    crossings: float
    spans: list[tuple[int, str, float, float, str]]


def stream(
    needed: np.ndarray | Tensor,
    parts: Mapping[str, Sequence[str]],
    placed: Placed,
    macs: cost.Macs,
    *,
    cores: Sequence[Core] = BOARD,
    inside: int = 8,
    crossing_s: float = 0.0,
) -> Streamed:
    """Run images through a placement in simulated time; expectations become a line of images that wait for each other.

    Each core type takes the image that waits longest for it. At most ``inside`` images are under way.

    Args:
        needed: bool [N, parts], see :func:`used`; parts run in their order.
        inside: 1 or more. With 1 the throughput is one over the time of an image.
        crossing_s: seconds that a change of core type costs, spent on the core that is reached. Pipe-it measured that
            it is not 0; how much is not known to us.
    """
    known = check(macs, parts, cores)
    needed = np.asarray(needed, bool)
    if needed.ndim != 2 or needed.shape[1] != len(parts) or not len(needed):
        raise ValueError(f"needed is of shape {list(needed.shape)}; it must be [images, {len(parts)} parts].")
    if inside < 1 or crossing_s < 0:
        raise ValueError(f"inside is {inside} and crossing_s {crossing_s}; at least 1 and at least 0 are needed.")
    names = list(parts)
    speed = {core.name: core.macs_per_s for core in known}
    size = {part: sum(macs.layers[layer].static for layer in layers) for part, layers in parts.items()}
    seconds = [size[part] / speed[placed.places[part]] for part in names]
    tasks = [[i for i in range(len(names)) if row[i]] for row in needed]
    begin, end, spans, crossings = np.zeros(len(tasks)), np.zeros(len(tasks)), [], 0
    free, waiting, order = dict.fromkeys(speed, 0.0), [], itertools.count()
    upcoming = iter(range(len(tasks)))

    def enter(at: float) -> None:
        image = next(upcoming, None)
        if image is not None:
            begin[image] = at
            heapq.heappush(waiting, (at, next(order), image, 0, ""))

    for _ in range(inside):
        enter(0.0)
    while waiting:
        ready, _, image, step, before = heapq.heappop(waiting)
        if step == len(tasks[image]):
            end[image] = ready
            enter(ready)
            continue
        part = tasks[image][step]
        core = placed.places[names[part]]
        crossed = before not in ("", core)
        start = max(ready, free[core])
        done = start + seconds[part] + crossed * crossing_s
        crossings += crossed
        free[core] = done
        spans.append((image, core, start, done, names[part]))
        heapq.heappush(waiting, (done, next(order), image, step + 1, core))
    return _streamed(begin, end, spans, crossings, tuple(speed))


def _streamed(begin: np.ndarray, end: np.ndarray, spans: list, crossings: int, cores: tuple[str, ...]) -> Streamed:
    N = len(end)
    first, last = (N // 4, N - 1 - N // 4) if N >= 8 else (0, N - 1)
    ends = np.sort(end)
    window = ends[last] - (ends[first] if N >= 8 else 0.0)
    inside = {core: sum(e - s for _, where, s, e, _ in spans if where == core) for core in cores}
    return Streamed(
        throughput=float((last - first if N >= 8 else N) / window),
        time_s=end - begin,
        busy={core: seconds / float(ends[-1]) for core, seconds in inside.items()},
        crossings=crossings / N,
        spans=sorted(spans, key=lambda span: span[2]),
    )

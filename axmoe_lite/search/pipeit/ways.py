"""The same cores used in several ways, each in its turn: a pipeline, a network each, threads, and one core alone.

    rows = race(network, stages, images, cores=(0, 1), turns=3)

Ways that run one after the other on a machine that others use too can only be compared within a turn.

Chapter: 19, "Which core for which layer?"
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite.search.pipeit.workers import Ran, parallel, run

WAYS = ("one core", "pipeline", "data parallel", "threads")


def race(
    network: nn.Module,
    stages: Sequence[nn.Module],
    images: Tensor,
    *,
    cores: Sequence[int],
    batch: int = 1,
    turns: int = 3,
    fewer: int = 1,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """What each of :data:`WAYS` does in a second, in every turn. Not from the paper.

    ``"one core"`` computes the network on the first core. ``"pipeline"`` has a stage on each core, ``"data parallel"``
    the network on each, ``"threads"`` the network in one process with as many threads as there are cores.

    Args:
        stages: of the network; as many as cores.
        images: [n, ...], on the CPU.
        cores: their numbers. One may be there twice, as it must on a machine with one core; threads are then left out.
        batch: see :func:`~axmoe_lite.search.pipeit.workers.run`.
        turns: how often each way has its go.
        fewer: threads compute only n / fewer images, since beside another job on the machine they wait for each other
            at every layer.

    Returns:
        A dict a turn and way: ``way``, ``turn``, ``cores`` (their numbers, as text), ``batch``, ``images``,
        ``images_per_s``, ``over_one`` (over that of one core in the same turn), ``same`` (whether the answers are those
        of one core, in every bit), ``pinned``, ``seconds``. Several threads may add numbers up in another order, and
        then ``same`` is False.

    Raises:
        ValueError: for another number of stages than of cores, turns or fewer below 1, or as ``run``.
    """
    if len(stages) != len(cores):
        raise ValueError(f"There are {len(stages)} stages and {len(cores)} cores; give each stage one.")
    if turns < 1 or not 1 <= fewer <= len(images):
        raise ValueError(f"turns is {turns} and fewer {fewer}; both are at least 1, and fewer at most {len(images)}.")
    own, options = [[core] for core in cores], {"batch": batch}
    ways: dict[str, Callable[[], Ran]] = {
        "one core": partial(parallel, network, images, cores=own[:1], **options),
        "pipeline": partial(run, stages, images, cores=own, **options),
        "data parallel": partial(parallel, network, images, cores=own, **options),
        "threads": partial(parallel, network, images[: len(images) // fewer], cores=[list(cores)], **options),
    }
    if len(set(cores)) < len(cores):
        del ways["threads"]
    rows = []
    for turn in tqdm(range(turns), desc="turns", disable=not progress):
        alone: Ran | None = None
        for way, call in ways.items():
            ran = call()
            alone = alone or ran
            used = " ".join(map(str, cores[:1] if way == "one core" else cores))
            told = {"way": way, "turn": turn, "cores": used, "batch": batch, "images": len(ran.answers)}
            told |= {"images_per_s": ran.images_per_s, "over_one": ran.images_per_s / alone.images_per_s}
            same = torch.equal(ran.answers, alone.answers[: len(ran.answers)])
            rows.append({**told, "same": same, "pinned": ran.pinned, "seconds": ran.seconds})
    return rows

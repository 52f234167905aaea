"""Rank the layers by how little they mind, and approximate the first k: what a practitioner does in an afternoon.

    rank       which group first: the least harm for what it saves
    explore    for each multiplier the first k groups of its ranking, k from none to all
    search     explore on a network, scored on training images

A baseline, from no one paper: every assignment has one cheap multiplier, and nothing is learned from what was measured
but the order. A search that is worth its effort must do better.

Letters: G groups.

Chapter: 17, "Which search should I use?"
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.multipliers import EXACT
from axmoe_lite.search import additive, experts
from axmoe_lite.search.space import OBJECTIVES, catalogue, check_groups, layers_of
from axmoe_lite.search.trial import Found, Kept, Score, Trial, front


def rank(more: np.ndarray, saved: np.ndarray) -> np.ndarray:
    """The order in which groups are approximated: the least loss for each unit of cost first.

    Args:
        more: [G], what each group alone adds to the loss; may be infinite, or a little below 0.
        saved: [G], what it takes from the cost. A group that saves nothing, such as an expert that nobody uses, comes
            last; of equal ones the first given comes first.

    Returns:
        int64 [G], indices of groups.

    >>> rank(np.array([0.4, 0.1, 0.0, 0.3]), np.array([2.0, 1.0, 0.0, 6.0])).tolist()
    [3, 1, 0, 2]
    """
    worth = saved > 0
    harm = np.where(worth, more / np.where(worth, saved, 1.0), np.inf)
    return np.lexsort((~worth, harm))


def explore(
    groups: dict[str, list[str]],
    multipliers: Iterable[str],
    *,
    evaluate: Callable[[dict[str, str]], Score],
    price: Callable[[dict[str, str]], float],
    points: int = 8,
    objective: str = "divergence",
    progress: bool = True,
) -> list[Found]:
    """:func:`search` without a network, as :func:`axmoe_lite.search.explore`.

    For each multiplier in turn: each group alone under it, which gives the ranking (:func:`rank`); then the first
    0, 1, ... G groups of it together, of which ``points`` are measured, at about even steps of cost, both ends among
    them.

    Args:
        groups: name to layers, each layer in one group.
        multipliers: names. The exact circuit is what all groups begin with.
        evaluate: an assignment's :class:`~axmoe_lite.search.Score`. It is asked once for each.
        price: its cost.
        points: at least 2; with G + 1 all of them are measured.
        objective: ``"divergence"`` or ``"loss"``: what is to be small.

    Returns:
        The front of all that was measured, single groups too, from the cheapest to the dearest.

    >>> from axmoe_lite.multipliers import multiplier
    >>> score = lambda chosen: Score(0.0, sum(w for w, m in zip((4, 1, 2), chosen.values()) if m != EXACT), 1.0)
    >>> power = lambda chosen: sum(multiplier(name).power_mw for name in chosen.values())
    >>> parts = {"a": ["a"], "b": ["b"], "c": ["c"]}
    >>> found = explore(parts, ["mul8s_1L2J"], evaluate=score, price=power, progress=False)
    >>> [("".join(layer for layer, m in one.assignment.items() if m != EXACT), one.divergence) for one in found]
    [('abc', 7), ('bc', 3), ('b', 1), ('', 0)]
    """
    names = catalogue(multipliers)
    _check_options(groups, points=points, objective=objective)
    asked = Kept(evaluate)
    measured: dict[tuple[int, ...], tuple[dict[str, str], float, Score]] = {}

    def measure(choice: np.ndarray) -> float:
        pairs = zip(groups.values(), choice, strict=True)
        assignment = {layer: names[m] for layers, m in pairs for layer in layers}
        measured[tuple(choice)] = assignment, price(assignment), asked(assignment)
        bar.update()
        return getattr(measured[tuple(choice)][2], objective)

    steps = (len(names) - 1) * (len(groups) + min(points, len(groups) + 1))
    with tqdm(total=1 + steps, desc="ranking", disable=not progress) as bar:
        exact = np.zeros(len(groups), int)
        start = measure(exact)
        if not np.isfinite(start):
            raise ValueError(f"Under the exact circuit {EXACT} the scores are no numbers; nothing can be built on it.")
        for m in range(1, len(names)):
            single = m * np.eye(len(groups), dtype=int)
            more = np.array([measure(choice) for choice in single]) - start
            saved = measured[tuple(exact)][1] - np.array([measured[tuple(choice)][1] for choice in single])
            order = rank(more, saved.round(12))
            for k in additive.spread(-np.concatenate([[0.0], saved[order]]).cumsum(), points):
                measure(np.isin(np.arange(len(groups)), order[:k]) * m)
    return front(measured.values(), objective=objective, evaluated=asked.ran)


def search(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    groups: dict[str, list[str]] | None = None,
    points: int = 8,
    objective: str = "divergence",
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[Found]:
    """The first k of each multiplier's ranking, chosen on n training images; the test images are not looked at.

    The numbers that it ranks by are those of :func:`axmoe_lite.search.sensitivity`, and with the same checkpoint they
    are not measured again.

    Args:
        network: exactly trained; left as it was.
        multipliers: names to choose from. The exact circuit is what all groups begin with.
        base: what costs are relative to: the count of the dense network; None: this network.
        groups: what may choose for itself; None: :func:`axmoe_lite.search.groups` of the network, by expert.
        points, objective: see :func:`explore`.
        n, seed, regime, prepare, calibrate_options: see :class:`~axmoe_lite.search.Trial`. The seed draws the
            validation images; nothing else is random.
        checkpoint: a JSON file that keeps every score, so that an interrupted search goes on where it was.

    Returns:
        The front as measured on the validation images, from the cheapest to the dearest.

    Raises:
        ValueError: before anything is run: for a multiplier that does not exist or has no power, groups that are
            empty, overlap or name unknown layers, too few points, or a checkpoint of another search.
    """
    names = catalogue(multipliers)
    parts = experts.groups(network) if groups is None else groups
    _check_options(parts, points=points, objective=objective)
    healing = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    kept = {"base": base, "checkpoint": checkpoint, "n": n, "seed": seed}
    trial = Trial(network, images, layers=layers_of(parts, network), **healing, **kept)
    asked = {"evaluate": trial.evaluate, "price": trial.price}
    return explore(parts, names, points=points, objective=objective, progress=progress, **asked)


def _check_options(groups: dict[str, list[str]], *, points: int, objective: str) -> None:
    check_groups(groups)
    moe.check_option("objective", objective, OBJECTIVES)
    if points < 2:
        raise ValueError(f"points is {points}; at least 2 are needed, all exact and all approximate.")

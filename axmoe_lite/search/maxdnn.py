"""MAx-DNN: how fine should a choice of multipliers be? By layer, filter, channel, row or column, or by skipping.

    genes = parts(network, by="filter")                              what chooses, and where its weights are
    found = search(network, images, [EXACT, "roup(0,4)"], by="row", base=dense)

Leon, Makris, Xydis, Pekmestzi and Soudris (LASCAS 2022, arXiv 2506.21371). LLAM is ``by="layer"``, FLAM ``"filter"``,
KLAM ``"channel"``, ``"row"`` or ``"column"``, KLMS ``"skip"``. How the paper searches is not known to us; here NSGA-II
does, as in ALWANN, whose convention MAx-DNN follows. A layer of 64 filters with a choice each would have 64 genes; not
from the paper: filters (or channels) of similar weight share one.

Chapter: 16, "How fine should a choice be?"
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from axmoe_lite import cost, moe, quant
from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximable, default_layers
from axmoe_lite.multipliers import EXACT, mosaic_name
from axmoe_lite.multipliers.mosaic import AXES
from axmoe_lite.search import genetic
from axmoe_lite.search.space import OBJECTIVES, catalogue
from axmoe_lite.search.trial import Found, Score, Trial, front

BY = ("layer", *AXES, "skip")
POLARITIES = ("within", "outside")


@dataclass(frozen=True)
class Part:
    """What chooses one multiplier.

    Attributes:
        layer: dotted name.
        places: which filters, channels, rows or columns of its weight; empty: all of it.
    """

    layer: str
    places: tuple[int, ...] = ()


def parts(network: nn.Module, *, by: str = "layer", most: int = 4) -> dict[str, list[Part]]:
    """Every layer of :func:`~axmoe_lite.layers.default_layers`, cut into parts that choose for themselves.

    Args:
        by: ``"layer"``, ``"filter"``, ``"channel"``, ``"row"`` or ``"column"``.
        most: parts of a layer at most. Filters and channels are sorted by the sum of their weights' magnitudes and cut
            into parts of equal number, the lightest first; rows and columns are parts each, up to ``most`` of them.

    Returns:
        By layer; one part where a layer has no such axis, or one place along it.

    >>> from axmoe_lite.models import resnet8
    >>> [len(found) for found in parts(resnet8(classes=3), by="row").values()]
    [3, 3, 3, 3, 3, 3, 3]
    """
    moe.check_option("by", by, ("layer", *AXES))
    if most < 1:
        raise ValueError(f"most is {most}; a layer has at least one part.")
    layers, found = approximable(network), {}
    for name in default_layers(network):
        weight = layers[name].weight.detach()
        axis = AXES.index(by) if by in AXES else weight.ndim
        size = weight.shape[axis] if axis < weight.ndim else 1
        if size == 1:
            found[name] = [Part(name)]
            continue
        order = range(size) if by in ("row", "column") else _by_weight(weight, axis)
        cuts = np.array_split(np.array(order), min(size, most))
        found[name] = [Part(name, tuple(sorted(int(place) for place in cut))) for cut in cuts]
    return found


def _by_weight(weight: Tensor, axis: int) -> list[int]:
    return weight.abs().float().movedim(axis, 0).flatten(1).sum(1).argsort(stable=True).tolist()


def assembled(cut: dict[str, list[Part]], names: Sequence[str], *, by: str) -> dict[str, str]:
    """The assignment in which each part, layer after layer, has the multiplier of that name.

    >>> assembled({"a": [Part("a", (0, 2)), Part("a", (1,))]}, ["pr(0,1)", "pr(0,2)"], by="filter")
    {'a': 'filter[pr(0,1), pr(0,2), pr(0,1)]'}
    """
    told, assignment = iter(names), {}
    for layer, pieces in cut.items():
        chosen = {place: name for piece, name in zip(pieces, told, strict=False) for place in piece.places or (0,)}
        assignment[layer] = mosaic_name(
            [chosen[place] for place in sorted(chosen)], by if len(chosen) > 1 else "filter"
        )
    return assignment


def skips(
    network: nn.Module, *, sigmas: Iterable[float] = (1.0, 2.0), polarity: str = "within"
) -> dict[str, list[str]]:
    """KLMS: for each layer the multipliers that execute only products whose weight is near the mean of its weights.

    With mu and sigma of a layer's kernel, a weight is near if it lies in [mu - k sigma, mu + k sigma].

    Args:
        sigmas: the k.
        polarity: ``"within"`` executes the weights in that range, as we read the summary of the paper that we have;
            ``"outside"`` the others. Which is meant is uncertain.

    Returns:
        Names for each layer, as many as there are k; see :func:`axmoe_lite.multipliers.within`.

    >>> from axmoe_lite.models import resnet8
    >>> skips(resnet8(classes=3), sigmas=[1])["conv1"]
    ['within(-43,47,676)']
    """
    moe.check_option("polarity", polarity, POLARITIES)
    layers, found = approximable(network), {}
    for name in default_layers(network):
        weight = layers[name].weight.detach().float()
        codes = quant.quantise(weight, quant.weight_scale(weight)).float()
        found[name] = []
        for k in sigmas:
            low, high = (round(float(codes.mean() + side * k * codes.std())) for side in (-1, 1))
            low, high = max(low, -128), min(high, 127)
            inside = float(((codes >= low) & (codes <= high)).float().mean())
            executed = inside if polarity == "within" else 1 - inside
            found[name].append(f"{polarity}({low},{high},{round(1000 * executed)})")
    return found


def search(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    by: str = "layer",
    most: int = 4,
    sigmas: Sequence[float] = (1.0, 2.0),
    polarity: str = "within",
    objective: str = "divergence",
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
    **options: Any,
) -> list[Found]:
    """A front by NSGA-II at one granularity, chosen on n training images; test images are not seen.

    Args:
        network: exactly trained; left as it was. Its :func:`~axmoe_lite.layers.default_layers` choose.
        multipliers: names to choose from, such as ROUP's, or ``"tuned:..."`` for ALWANN's tuned weights. The exact
            circuit is always among them. With ``by="skip"`` they are not used: a layer is exact or skips.
        base: what costs are relative to: the count of the dense network; None: this network.
        by, most: of :func:`parts`; or ``"skip"``, with ``sigmas`` and ``polarity`` of :func:`skips`.
        objective: ``"divergence"`` or ``"loss"``: what is to be small.
        n, seed, regime, prepare, calibrate_options: see :class:`~axmoe_lite.search.Trial`. The paper retrains nothing;
            ``regime="not retrained"`` corrects nothing either.
        checkpoint: a JSON file that keeps every score.
        options: ``population``, ``generations``, ``budget``, ``crossover`` and ``mutation`` of
            :func:`axmoe_lite.search.genetic.evolve`.

    Returns:
        The front as measured on the validation images, from the cheapest to the dearest.

    Raises:
        ValueError: before anything is run, for a name, option or number that does not exist.
        ImportError: without pymoo.
    """
    moe.check_option("by", by, BY)
    moe.check_option("objective", objective, OBJECTIVES)
    names = catalogue(multipliers)
    cut = parts(network, by="layer" if by == "skip" else by, most=most)
    layer_of = [layer for layer, pieces in cut.items() for _ in pieces]
    told = {layer: names for layer in cut}
    if by == "skip":
        told = {
            layer: [EXACT, *of_layer] for layer, of_layer in skips(network, sigmas=sigmas, polarity=polarity).items()
        }
    genes = [len(told[layer]) for layer in layer_of]
    start = np.stack([np.full(len(genes), value) for value in range(max(genes))])
    genetic.check_numbers(len(start), **options)
    healing = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    kept = {"base": base, "checkpoint": checkpoint, "n": n, "seed": seed, "settings": {"by": by}}
    trial = Trial(network, images, layers=list(cut), **healing, **kept)
    known: dict[bytes, tuple[dict[str, str], float, Score]] = {}

    def objectives(choice: np.ndarray) -> tuple[float, float]:
        chosen = [told[layer][int(value)] for layer, value in zip(layer_of, choice, strict=True)]
        assignment = assembled(cut, chosen, by="filter" if by in ("layer", "skip") else by)
        paid, score = trial.price(assignment), trial.evaluate(assignment)
        known[choice.tobytes()] = assignment, paid, score
        return round(paid, 12), getattr(score, objective)  # equal sums may differ in their last bits

    found = genetic.evolve(genes, evaluate=objectives, start=start, seed=seed, progress=progress, **options)
    best = [known[choice.tobytes()] for choice in found.choices]
    return front(best, objective=objective, evaluated=found.evaluated)

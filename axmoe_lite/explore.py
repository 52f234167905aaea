"""One multiplier and all it does: what a slider moves, in the numbers a reader wants to see at once.

    KNOBS                  the families that have sliders, with what each can be
    settings()             every multiplier that the sliders and the catalogue reach
    witness()              a small trained network, its test images, and the codes that its layers multiply
    look(m, witness)       price, exact rank, errors under uniform and under real operands, the network's accuracy
    error_shares(m)        a histogram of the errors, in classes that double
    rows(names, witness)   look at many, as rows to be recorded

The published page shows rows that were made once; JupyterLab calls :func:`look` when a slider moves.

Chapter: 00, "Which multiplier would you build?"
"""

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import datasets, models, paths, train
from axmoe_lite.datasets import Images
from axmoe_lite.factors import factorise
from axmoe_lite.layers import approximate, evaluating
from axmoe_lite.multipliers import EVOAPPROX, EXACT, Multiplier, error_table, errors, multiplier
from axmoe_lite.pipeline import freeze
from axmoe_lite.search.predict import operands

KNOBS: dict[str, dict[str, tuple[int, int, int]]] = {
    "broken_array": {"drop_a": (0, 6, 0), "drop_b": (0, 6, 0), "drop_columns": (0, 10, 4)},
    "drum": {"k": (2, 8, 4)},
    "roup": {"k": (0, 3, 0), "m": (0, 8, 4)},
}
"""Of each family with sliders, each parameter's least, most and first value."""

PICKS: tuple[str, ...] = (*EVOAPPROX, "mitchell()", "roba()")
"""What is picked by name."""

ERROR_CLASSES: tuple[int, ...] = tuple(range(-15, 16))
"""Class 0 is exact; class s n has errors of sign s and size 2^(n-1) to 2^n - 1, the last all beyond."""

NETWORK = "resnet8-digits-seed0-epochs30.safetensors"


def name_of(family: str, values: Mapping[str, int]) -> str:
    """What the catalogue calls a position of the sliders.

    Args:
        family: one of :data:`KNOBS`.
        values: each of its parameters.

    >>> name_of("broken_array", {"drop_a": 1, "drop_b": 0, "drop_columns": 3})
    'broken_array(1,0,3)'
    """
    return f"{family}({','.join(str(values[parameter]) for parameter in KNOBS[family])})"


def settings() -> list[str]:
    """Every position of every slider, and every pick.

    >>> len(settings())
    597
    """
    names = []
    for family, knobs in KNOBS.items():
        for values in itertools.product(*(range(least, most + 1) for least, most, _ in knobs.values())):
            names.append(name_of(family, dict(zip(knobs, values, strict=True))))
    return [*names, *PICKS]


def error_class(error: Tensor) -> Tensor:
    """The class of each error, see :data:`ERROR_CLASSES`; integers of any shape.

    >>> error_class(torch.tensor([0, 1, -2, 3, 4, -16256])).tolist()
    [0, 1, -2, 2, 3, -14]
    """
    size = sum((error.abs() >= 2**n).long() for n in range(max(ERROR_CLASSES)))
    return size * error.sign()


def error_shares(m: Multiplier, *, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """How often an error of each class occurs: float64 [31], summing to 1.

    Args:
        a, b: how often each operand -128..127 occurs, [256], in any scale; None for equally often.
    """
    weights = [torch.ones(256, dtype=torch.float64) if one is None else one.double() for one in (a, b)]
    pairs = (weights[0] / weights[0].sum())[:, None] * (weights[1] / weights[1].sum())[None, :]
    classes = error_class(error_table(m)) - ERROR_CLASSES[0]
    return torch.zeros(len(ERROR_CLASSES), dtype=torch.float64).index_add_(0, classes.flatten(), pairs.flatten())


@dataclass(frozen=True, eq=False)
class Witness:
    """A trained network on which multipliers are tried.

    Attributes:
        network: calibrated; :func:`look` changes its multipliers.
        images: whose test images it is asked for.
        operands: for each layer how often each code -128..127 occurs: of the activations and of the weights, float64
            [256] each, on training images under the exact circuit. The activations of all positions are put together.
    """

    network: nn.Module
    images: Images
    operands: dict[str, tuple[Tensor, Tensor]]


@lru_cache(maxsize=1)
def digits_witness() -> Witness:
    """A ResNet-8 on handwritten digits (the offline data), with the weights of the repository, or trained: a minute."""
    images = datasets.digits()
    network = models.resnet8(classes=len(images.classes))
    stored = paths.checkpoints_dir() / NETWORK
    if stored.exists():
        train.load(network, stored)
    else:
        train.fit(network, images, **TRAINING, checkpoint=paths.cache_dir() / f"explore-{NETWORK}")
    return witness(network, images)


TRAINING = {"epochs": 30, "seed": 0, "augment": "crop"}


def witness(network: nn.Module, images: Images, *, n: int = 256) -> Witness:
    """Any network and its images as a :class:`Witness`.

    Args:
        network: trained, without approximation; calibrated in place.
        n: training images for calibration and for the codes.

    Raises:
        ValueError: if the network and the images do not fit.
    """
    train.measure.check_fits(network, images)
    few = images.subset(n_train=n)
    network.eval()
    found = operands(network, few, n=min(n, len(few.x_train)))
    approximate(network, EXACT, calibration=few.normalised(few.x_train))
    return Witness(network, images, {name: (one.patches.mean(0), one.weights) for name, one in found.items()})


def look(m: Multiplier, seen: Witness | None = None, *, layer: str = "") -> dict[str, object]:
    """All that the explorer tells of a multiplier.

    Args:
        seen: on which network; None leaves out what needs one.
        layer: whose operands are the real ones; the first if not named.

    Returns:
        ``multiplier``, ``power_mw`` (None if unknown), ``proxy`` (whether the power is an estimate), ``rank`` (products
        that simulate it exactly), ``mae``, ``wce``, ``ep``, ``bias``; with a network also ``real_mae``, ``real_bias``,
        ``layer``, and ``top1`` in [0, 1].

    >>> from axmoe_lite.multipliers import multiplier
    >>> look(multiplier("mul8s_1KVA"))["rank"]
    5
    """
    uniform = errors(m)
    told = {
        "multiplier": m.name,
        "power_mw": m.power_mw,
        "proxy": m.is_proxy,
        "rank": factorise(m).rank,
        "mae": uniform.mae,
        "wce": uniform.wce,
        "ep": uniform.ep,
        "bias": uniform.mean_error,
    }
    if seen is None:
        return told
    layer = layer or next(iter(seen.operands))
    if layer not in seen.operands:
        raise ValueError(f"There is no layer {layer!r}; there are {', '.join(seen.operands)}.")
    a, b = seen.operands[layer]
    real = errors(m, a=a, b=b)
    return {**told, "layer": layer, "real_mae": real.mae, "real_bias": real.mean_error, "top1": accuracy(m, seen)}


RECORDED = ("multiplier", "power_mw", "proxy", "rank", "mae", "bias", "wce", "ep", "top1")


def rows(names: Iterable[str], seen: Witness, *, progress: bool = True) -> list[dict[str, object]]:
    """What :func:`look` tells of many multipliers, as rows of a study that lack only their evidence.

    All 597 of :func:`settings` take two minutes on one thread.

    Args:
        names: of the catalogue; they are all checked before the first is looked at.
        seen: the network whose accuracy is asked for.
        progress: show a bar.

    Returns:
        For each name the columns :data:`RECORDED`, and ``seconds``. The figures of the table are those of all pairs,
        equally often: what depends on a layer's operands, a page computes itself.

    Raises:
        ValueError: for an unknown name.
    """
    names, told = list(names), []
    for name in names:
        multiplier(name)
    for name in tqdm(names, disable=not progress):
        start = time.perf_counter()
        found = look(multiplier(name), seen)
        told.append(
            {**{column: found[column] for column in RECORDED}, "seconds": round(time.perf_counter() - start, 3)}
        )
    return told


@torch.inference_mode()
def accuracy(m: Multiplier, seen: Witness) -> float:
    """Top-1 of the witness with this multiplier in all of its layers, in [0, 1]. Nothing is retrained."""
    with evaluating(seen.network):
        approximate(seen.network, m)
        frozen = freeze(seen.network)
        scores = [frozen(seen.images.normalised(x)) for x in seen.images.x_test.split(120)]
    guesses = torch.cat(scores).argmax(1)
    return (guesses == seen.images.y_test).double().mean().item()

"""A board with big and little cores, simulated from what was published about one: the Kirin 970's 4 A73 and 4 A53.

    networks()                the layers of the five networks that were measured on it, by shape
    times(network)            seconds of each layer on one to four cores of a type, simulated
    gains()                   what a pipeline over both clusters gains over the four big cores, by network

What is known of the board is two numbers a network (:data:`BOARD`): images per second on four cores of one type. The
rest is a model, kept simple:

    seconds on one core    T_1 proportional to the layer's multiply-accumulates (or to ``work``)
    seconds on H cores     T_H = T_1 ceil(tiles / H) / tiles + overhead, tiles = ceil(rows / tile)
    scale                  such that all layers on four cores of a type take as long as published

so both types are alike but for one factor a network, memory costs nothing, a cluster's cores do not slow each other
down, and handing an image from stage to stage costs nothing. A linear layer has one image row, so one tile, and runs on
one core however many there are: a pipeline helps it more than a cluster does. Simulated numbers are for comparison with
the published ones, not measurements of a board.

Sources: Pipe-it (arXiv 1903.05898) for the method and its gain of 39 %; its authors' "Neural Network Inference on
Mobile SoCs" (arXiv 1908.11450) for the throughput of four cores.

Letters: W layers; N, K, M the product of a layer, [N, K] x [K, M].

Chapter: 19, "Which core for which layer?"
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from axmoe_lite.search.pipeit.schedule import CORES, Stage, merge_stage, optimum
from axmoe_lite.search.pipeit.shapes import Layer

BOARD = {
    "AlexNet": {"big": 7.6, "little": 2.2},
    "GoogLeNet": {"big": 7.1, "little": 3.0},
    "MobileNet": {"big": 17.7, "little": 6.5},
    "ResNet-50": {"big": 2.8, "little": 1.5},
    "SqueezeNet": {"big": 15.7, "little": 6.8},
}
"""Images per second on the four cores of one type of a Kirin 970, A73 big and A53 little."""

PUBLISHED_GAIN = 0.39
"""Pipe-it's mean gain in throughput over the big cluster alone."""

TILE = 8
"""Image rows of a tile: those that a GEMM kernel for these cores takes at once. Not from the paper."""

Work = Callable[[Sequence[Layer]], Sequence[float]]


def networks() -> dict[str, list[Layer]]:
    """The five networks of :data:`BOARD` for one image each: their convolutions and linear layers, in order.

    AlexNet is the original with two groups, at 227 x 227 pixels (0.72 G multiply-accumulates); the others are at
    224 x 224: GoogLeNet without its side classifiers (1.58 G), MobileNet v1 (0.57 G), ResNet-50 with its strides in
    the 3 x 3 convolutions (4.09 G), SqueezeNet 1.0 (0.82 G). Branches run one after the other, a residual block's
    projection after its three convolutions.

    >>> for name, layers in networks().items():
    ...     print(name, len(layers), round(sum(one.macs for one in layers) / 1e9, 2))
    AlexNet 8 0.72
    GoogLeNet 58 1.58
    MobileNet 28 0.57
    ResNet-50 54 4.09
    SqueezeNet 26 0.82
    """
    return {
        "AlexNet": alexnet(),
        "GoogLeNet": googlenet(),
        "MobileNet": mobilenet(),
        "ResNet-50": resnet50(),
        "SqueezeNet": squeezenet(),
    }


def times(
    network: str,
    layers: Sequence[Layer] | None = None,
    *,
    images_per_s: Mapping[str, float] | None = None,
    work: Work | None = None,
    tile: int = TILE,
    overhead_s: float = 0.0,
) -> dict[Stage, np.ndarray]:
    """The simulated board's table: seconds of each layer of a network on each stage, float64 [W].

    Args:
        network: one of :data:`BOARD`; with ``layers`` and ``images_per_s`` any name.
        layers: None: those of :func:`networks`.
        images_per_s: of four cores of each type; None: as published for the network.
        work: from layers to what each costs on one core, in any unit, positive [W], such as a fitted
            :class:`~axmoe_lite.search.pipeit.times.Predictor`'s seconds on one core of the host; None:
            multiply-accumulates.
        tile: image rows that a core takes at once, at least 1.
        overhead_s: what starting and joining more than one core costs a layer, from 0, in seconds.

    Raises:
        ValueError: for another network, numbers out of range, or an overhead that alone takes longer than published.

    >>> table = times("AlexNet")
    >>> round(float(1 / table["big", 4].sum()), 6), round(float(1 / table["little", 4].sum()), 6)
    (7.6, 2.2)
    """
    speeds = _published(network) if images_per_s is None else images_per_s
    layers = _layers(network) if layers is None else list(layers)
    if not layers:
        raise ValueError(f"{network} was given without layers; it needs one or more.")
    if tile < 1 or overhead_s < 0 or not speeds or min(speeds.values()) <= 0:
        raise ValueError(
            f"tile is {tile}, overhead_s {overhead_s} and images_per_s {dict(speeds)}; at least 1, at least 0 and"
            " above 0 for each type are needed."
        )
    alone = np.array([one.macs for one in layers] if work is None else work(layers), dtype=float)
    if alone.shape != (len(layers),) or not (np.isfinite(alone) & (alone > 0)).all():
        raise ValueError(f"work gave {alone.tolist()} for {len(layers)} layers; it must be a positive number for each.")
    tiles = np.array([math.ceil(one.n / tile) for one in layers])
    most = max(CORES.values())
    found = {}
    for kind, speed in speeds.items():
        left = 1 / speed - overhead_s * len(layers)  # what the products may take
        if left <= 0:
            raise ValueError(
                f"An overhead of {overhead_s} s for each of {len(layers)} layers is longer than the {1 / speed:.3g} s"
                f" that {kind} cores take for an image; give a smaller one."
            )
        one_core = alone * left / (alone * _share(tiles, most)).sum()
        for h in range(1, most + 1):
            found[kind, h] = one_core * _share(tiles, h) + (overhead_s if h > 1 else 0.0)
    return found


def gains(names: Sequence[str] | None = None, *, idle: bool = True, **options: Any) -> list[dict[str, Any]]:
    """What the simulated board gains by pipelines over both clusters, by network, beside what was published.

    Args:
        names: of :data:`BOARD`; None: all.
        idle: of :func:`~axmoe_lite.search.pipeit.schedule.optimum`.
        options: of :func:`times`: ``work``, ``tile``, ``overhead_s``.

    Returns:
        A dict a network: ``network``, ``layers``, ``big_per_s`` (images per second of the four big cores alone),
        ``merged_per_s`` and ``best_per_s`` (of merge_stage and of the optimum), ``merged_gain`` and ``best_gain``
        (over the big cores, 0.39 is 39 %), ``bound`` (both clusters' published images per second, summed, over the big
        one's), ``gap`` (what merge_stage falls short of the optimum, as a share of it), ``merged`` and ``best`` (the
        schedules). A gain can be above the bound: the bound takes a core for a quarter of its cluster, but four cores
        share a layer's tiles unevenly, and one core by itself does not.

    Raises:
        ValueError: as :func:`times`.

    >>> [row] = gains(["ResNet-50"])
    >>> 0 < row["merged_gain"] <= row["best_gain"]
    True
    """
    names = list(BOARD) if names is None else list(names)
    for name in names:
        _published(name)
    rows = []
    for name in names:
        table = times(name, **options)
        alone = 1 / table["big", CORES["big"]].sum()
        merged, best = merge_stage(table), optimum(table, idle=idle)
        rows.append(
            {
                "network": name,
                "layers": len(table["big", 1]),
                "big_per_s": float(alone),
                "merged_per_s": merged.throughput,
                "best_per_s": best.throughput,
                "merged_gain": float(merged.throughput / alone - 1),
                "best_gain": float(best.throughput / alone - 1),
                "bound": bound(name),
                "gap": 1 - merged.throughput / best.throughput,
                "merged": merged,
                "best": best,
            }
        )
    return rows


def bound(network: str) -> float:
    """What a network would gain over the big cluster if both did all that was published of them.

    >>> round(sum(bound(name) for name in BOARD) / len(BOARD), 4)
    0.4096
    """
    speeds = _published(network)
    return speeds["little"] / speeds["big"]


def _share(tiles: np.ndarray, cores: int) -> np.ndarray:
    """[W]: the share of its tiles that the busiest of the cores does."""
    return np.ceil(tiles / cores) / tiles


def _published(network: str) -> dict[str, float]:
    if network not in BOARD:
        near = difflib.get_close_matches(str(network), BOARD, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"Nothing was published for {network!r}, only for {', '.join(BOARD)}; the nearest is {near!r}. Another"
            " network needs layers= and images_per_s=."
        )
    return BOARD[network]


def _layers(network: str) -> list[Layer]:
    known = networks()
    if network not in known:
        raise ValueError(f"The layers of {network!r} are not known; give layers=, or one of {', '.join(known)}.")
    return known[network]


# ------------------------------------------------------------------------------ the five networks, as shapes


def conv(name: str, out: int, kernel: int, c_in: int, c_out: int, groups: int = 1) -> Layer:
    """A convolution by what comes out of it: ``out`` x ``out`` pixels, ``c_out`` channels.

    >>> conv("conv1", 112, 7, 3, 64)
    Layer(name='conv1', n=12544, k=147, m=64, groups=1, kind='conv')
    """
    return Layer(name, out * out, kernel * kernel * c_in // groups, c_out // groups, groups)


def linear(name: str, c_in: int, c_out: int) -> Layer:
    """A linear layer for one image."""
    return Layer(name, 1, c_in, c_out, kind="linear")


def alexnet(filters: Sequence[int] = (96, 256, 384, 384, 256), groups: int = 2) -> list[Layer]:
    """The original, whose second, fourth and fifth convolution have two groups; torchvision's has one, fewer filters.

    >>> torchvisions = alexnet((64, 192, 384, 256, 256), groups=1)
    """
    a, b, c, d, e = filters
    return [
        conv("conv1", 55, 11, 3, a),
        conv("conv2", 27, 5, a, b, groups),
        conv("conv3", 13, 3, b, c),
        conv("conv4", 13, 3, c, d, groups),
        conv("conv5", 13, 3, d, e, groups),
        linear("fc6", 36 * e, 4096),
        linear("fc7", 4096, 4096),
        linear("fc8", 4096, 1000),
    ]


INCEPTIONS = (  # pixels, then filters: 1x1; 3x3 reduced, 3x3; 5x5 reduced, 5x5; after the pool
    ("3a", 28, 64, 96, 128, 16, 32, 32),
    ("3b", 28, 128, 128, 192, 32, 96, 64),
    ("4a", 14, 192, 96, 208, 16, 48, 64),
    ("4b", 14, 160, 112, 224, 24, 64, 64),
    ("4c", 14, 128, 128, 256, 24, 64, 64),
    ("4d", 14, 112, 144, 288, 32, 64, 64),
    ("4e", 14, 256, 160, 320, 32, 128, 128),
    ("5a", 7, 256, 160, 320, 32, 128, 128),
    ("5b", 7, 384, 192, 384, 48, 128, 128),
)


def googlenet(widest: int = 5) -> list[Layer]:
    """Szegedy et al. (2015), table 1. torchvision has 3 x 3 kernels where the paper has its widest, 5 x 5."""
    layers = [conv("conv1", 112, 7, 3, 64), conv("conv2", 56, 1, 64, 64), conv("conv3", 56, 3, 64, 192)]
    c = 192
    for name, out, one, three_in, three, five_in, five, pool in INCEPTIONS:
        layers += [
            conv(f"{name}.1x1", out, 1, c, one),
            conv(f"{name}.3x3_reduce", out, 1, c, three_in),
            conv(f"{name}.3x3", out, 3, three_in, three),
            conv(f"{name}.5x5_reduce", out, 1, c, five_in),
            conv(f"{name}.5x5", out, widest, five_in, five),
            conv(f"{name}.pool", out, 1, c, pool),
        ]
        c = one + three + five + pool
    return [*layers, linear("fc", c, 1000)]


def mobilenet() -> list[Layer]:
    """MobileNet v1, Howard et al. (2017), table 1: pairs of a depthwise and a pointwise convolution."""
    layers, c, out = [conv("conv1", 112, 3, 3, 32)], 32, 112
    widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for i, wider in enumerate(widths, 2):
        out //= 1 + (i in (3, 5, 7, 13))
        layers += [conv(f"conv{i}.depthwise", out, 3, c, c, groups=c), conv(f"conv{i}.pointwise", out, 1, c, wider)]
        c = wider
    return [*layers, linear("fc", c, 1000)]


def resnet50() -> list[Layer]:
    """He et al. (2016), table 1, with the strides in the 3 x 3 convolutions, as is usual since."""
    layers, c, before = [conv("conv1", 112, 7, 3, 64)], 64, 56
    for stage, (blocks, width, out) in enumerate(((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)), 1):
        for b in range(blocks):
            name = f"layer{stage}.{b}"
            layers += [
                conv(f"{name}.conv1", out if b else before, 1, c, width),
                conv(f"{name}.conv2", out, 3, width, width),
                conv(f"{name}.conv3", out, 1, width, 4 * width),
            ]
            layers += [] if b else [conv(f"{name}.downsample", out, 1, c, 4 * width)]
            c = 4 * width
        before = out
    return [*layers, linear("fc", c, 1000)]


def squeezenet() -> list[Layer]:
    """SqueezeNet 1.0, Iandola et al. (2016), table 1, whose pools round sizes up; its classifier is a convolution."""
    layers, c = [conv("conv1", 109, 7, 3, 96)], 96
    fires = ((54, 16), (54, 16), (54, 32), (27, 32), (27, 48), (27, 48), (27, 64), (13, 64))
    for i, (out, squeezed) in enumerate(fires, 2):
        layers += [
            conv(f"fire{i}.squeeze", out, 1, c, squeezed),
            conv(f"fire{i}.expand1x1", out, 1, squeezed, 4 * squeezed),
            conv(f"fire{i}.expand3x3", out, 3, squeezed, 4 * squeezed),
        ]
        c = 8 * squeezed
    return [*layers, conv("conv10", 13, 1, c, 1000)]

"""Every fast path against the law, on cases drawn at random, on this machine.

    against_the_law(200)                                 as many cases, dealt out to all paths
    against_the_law(200, product=mine)                   of a matrix product of your own

The law is :mod:`axmoe_lite.kernels.reference`: index the table, add. Shapes are small and odd, operands often at the
ends of their range, tables often without any structure: that is where paths go wrong, and it keeps a case short.

Chapter: 23, "How do you know?"
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from axmoe_lite import kernels, models
from axmoe_lite.cost import count
from axmoe_lite.kernels import reference
from axmoe_lite.kernels.products import ConvProduct, LinearProduct
from axmoe_lite.layers import approximate
from axmoe_lite.multipliers import EVOAPPROX, Multiplier, multiplier
from axmoe_lite.pipeline import freeze

SIZES = (1, 2, 3, 5, 8, 16, 23, 33)
ENDS = (-128, -127, -1, 0, 1, 2, 126, 127)
OTHERS = ("broken_array(2,1,4)", "drum(4)", "truncation(3)", "roup(0,4)", "pr(1,2)")


@dataclass(frozen=True)
class _Compared:
    """What a path found, what the law says, how many multiplications that took, and the case in words."""

    found: Tensor
    law: Tensor
    products: int
    words: str


class _Draw:
    """Random sizes, codes and choices, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=self.generator))

    def one_of(self, choices: tuple) -> object:
        return choices[self.whole(0, len(choices) - 1)]

    def codes(self, *shape: int) -> Tensor:
        """int8: from the whole range, or, every third time, only from its ends."""
        if self.whole(0, 2):
            return torch.randint(-128, 128, shape, generator=self.generator).to(torch.int8)
        return torch.tensor(ENDS, dtype=torch.int8)[torch.randint(len(ENDS), shape, generator=self.generator)]

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def table(self) -> Multiplier:
        """Any table: random numbers, of which products with 0 need not be 0."""
        most = self.one_of((2, 300, 16384, 2**20))
        return Multiplier("random", torch.randint(-most, most + 1, (256, 256), generator=self.generator).int())


def _matmul(draw: _Draw, table: Multiplier, product: Callable) -> _Compared:
    m, k, n = (draw.one_of(SIZES) for _ in range(3))
    a, b = draw.codes(m, k), draw.codes(k, n)
    words = f"{table.name}, M x K x N = {m} x {k} x {n}"
    return _Compared(product(a, b, table), reference.matmul(a, b, table.table), m * k * n, words)


def _convolution(draw: _Draw) -> tuple[Tensor, Tensor, dict, int, str]:
    """An image, weights and options that fit each other; the fan-in; the shapes in words."""
    groups, per_group, out = draw.one_of((1, 1, 2)), draw.one_of((1, 2, 3, 7)), draw.one_of((1, 2, 5))
    kernel, size = draw.one_of((1, 2, 3)), draw.one_of((3, 5, 8))
    x = draw.codes(draw.whole(1, 2), groups * per_group, size, size + draw.whole(0, 2))
    x = x.contiguous(memory_format=draw.one_of((torch.contiguous_format, torch.channels_last)))
    weight = draw.codes(groups * out, per_group, kernel, kernel)
    options = {"stride": (draw.whole(1, 2),) * 2, "padding": (draw.whole(0, 2), draw.whole(0, 1))}
    options |= {"dilation": (1, 1), "groups": groups}
    return x, weight, options, weight[0].numel(), f"x {list(x.shape)}, weight {list(weight.shape)}, {options}"


def _by_path(path: str) -> Callable:
    return lambda a, b, table: kernels.matmul(a, b, table, path=path)


def _conv2d(draw: _Draw, table: Multiplier, path: str) -> _Compared:
    x, weight, options, fan_in, words = _convolution(draw)
    law = reference.conv2d(x, weight, table.table, **options)
    return _Compared(
        kernels.conv2d(x, weight, table, path=path, **options), law, law.numel() * fan_in, f"{table.name}, {words}"
    )


def _scales(draw: _Draw, outputs: int) -> dict:
    """Powers of two, so that codes divided by them and rounded again are the same codes."""
    scale_w = torch.rand(outputs, generator=draw.generator) + 0.01
    return {"scale_w": scale_w, "scale_x": 2.0 ** draw.whole(-6, 2), "bias": draw.floats(outputs)}


def _rescaled(sums: Tensor, scales: dict, *, axis: int) -> Tensor:
    """Law (1) of :mod:`axmoe_lite.kernels.products`, each step rounded to float32."""
    shape = [-1] + [1] * (sums.ndim - 1 - axis)
    return sums.float() * (scales["scale_w"] * scales["scale_x"]).view(shape) + scales["bias"].view(shape)


def _conv_layer(draw: _Draw, table: Multiplier) -> _Compared:
    x, weight, options, fan_in, words = _convolution(draw)
    x, scales = x.clamp(min=-127), _scales(draw, len(weight))  # quantise() never gives -128
    law = _rescaled(reference.conv2d(x, weight, table.table, **options), scales, axis=1)
    found = ConvProduct(weight, table, **scales, **options)(x.float() * scales["scale_x"])
    return _Compared(found, law, law.numel() * fan_in, f"{table.name}, {words}")


def _linear_layer(draw: _Draw, table: Multiplier) -> _Compared:
    m, k, n = (draw.one_of(SIZES) for _ in range(3))
    x, weight = draw.codes(m, k).clamp(min=-127), draw.codes(n, k)
    scales = _scales(draw, n)
    law = _rescaled(reference.matmul(x, weight.T, table.table), scales, axis=1)
    found = LinearProduct(weight, table, **scales)(x.float() * scales["scale_x"])
    return _Compared(found, law, m * k * n, f"{table.name}, x [{m}, {k}], weight [{n}, {k}]")


def _network(draw: _Draw, table: Multiplier) -> _Compared:
    """A whole ResNet-8, a quarter as wide, of two random images; frozen, against its own law."""
    seed = draw.whole(0, 10**6)
    network, x = models.resnet8(classes=10, width=0.25, seed=seed).eval(), draw.floats(2, 3, 8, 8)
    frozen = freeze(approximate(network, table, calibration=x))
    products = int(len(x) * count(network, x[:1]).executed)
    return _Compared(frozen(x), frozen.law(x), products, f"{table.name}, ResNet-8 of seed {seed}")


WAYS: dict[str, Callable[[_Draw, Multiplier], _Compared]] = {
    "matrix product, factored": lambda draw, table: _matmul(draw, table, _by_path("factored")),
    "matrix product, looked up": lambda draw, table: _matmul(draw, table, _by_path("lookup")),
    "convolution, factored": lambda draw, table: _conv2d(draw, table, "factored"),
    "convolution, looked up": lambda draw, table: _conv2d(draw, table, "lookup"),
    "convolution layer": _conv_layer,
    "linear layer": _linear_layer,
    "frozen network": _network,
}
"""The fast paths, by what the reader meets them as; each draws one case and computes it both ways."""
ANY_TABLE = ("matrix product, looked up", "convolution, looked up")
"""Where a table of random numbers takes no longer than another: it has 256 factors."""


def against_the_law(
    n: int = 200,
    *,
    seed: int = 0,
    multipliers: Iterable[str] | None = None,
    product: Callable[[Tensor, Tensor, Multiplier], Tensor] | None = None,
    progress: bool = False,
) -> list[dict]:
    """Draw cases, compute each by a fast path and by the law, and compare in every bit.

    Args:
        n: how many cases, dealt out in turn to all of :data:`WAYS`.
        seed: of all that is drawn.
        multipliers: names to draw from. None: the thirteen circuits, five members of the families and, where
            products are looked up, tables of random numbers.
        product: instead of the package's paths: ``product(a, b, multiplier)`` of int8 [M, K] and [K, N] gives
            integers [M, N].

    Returns:
        One dict a path: ``path``, ``cases``, ``products`` (multiplications compared), ``differing`` (cases in
        which any bit differs), ``first`` (the first of them in words, or "").

    Raises:
        ValueError: for n below 1 or a multiplier that does not exist.

    >>> def swapped(a, b, m): return kernels.matmul(b.T, a.T, m).T
    >>> against_the_law(50, product=swapped, multipliers=["mul8s_1KV6"])[0]["differing"]  # it is symmetric
    0
    >>> against_the_law(50, product=swapped, multipliers=["broken_array(2,0,0)"])[0]["differing"] > 40
    True
    """
    if n < 1:
        raise ValueError(f"The number of cases is {n}; at least one is to be drawn.")
    names = (*EVOAPPROX, *OTHERS) if multipliers is None else tuple(multipliers)
    tables = {name: multiplier(name) for name in names}
    if not tables:
        raise ValueError("multipliers is empty; name at least one, or leave it out for the package's own.")
    ways = WAYS if product is None else {"yours": lambda draw, table: _matmul(draw, table, product)}
    rows = {path: {"path": path, "cases": 0, "products": 0, "differing": 0, "first": ""} for path in ways}
    draw = _Draw(seed)
    for case in tqdm(range(n), desc="against the law", disable=not progress):
        path = list(ways)[case % len(ways)]
        random = multipliers is None and path in (*ANY_TABLE, "yours") and draw.whole(0, 1)
        compared, row = ways[path](draw, draw.table() if random else tables[draw.one_of(names)]), rows[path]
        row["cases"] += 1
        row["products"] += compared.products
        if not torch.equal(compared.found.double(), compared.law.double()):  # which holds both, whatever they come in
            row["differing"] += 1
            row["first"] = row["first"] or compared.words
    return list(rows.values())


def report_paths(rows: Iterable[dict]) -> str:
    """A line for each path."""
    lines = []
    for row in rows:
        said = f"DIFFERS in {row['differing']}" if row["differing"] else "as the law"
        first = f"; first: {row['first']}" if row["first"] else ""
        lines.append(f"{said:13} {row['path']}: {row['cases']} cases, {row['products']:,} products{first}")
    return "\n".join(lines)

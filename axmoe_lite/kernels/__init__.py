"""Approximate integer products: one call for matrices, one for images, whichever path computes them.

    reference   the law: index the table, add. Slow and obvious; every other path must equal it bit for bit
    factored    the same numbers by ordinary exact products of factored operands, on int8 units where there are any
    lookup      the same numbers by looking every product up, many at a time: for tables of high rank

``path="auto"`` takes whichever of the last two is cheaper on this machine (:func:`crossover_rank`). Letters:
M x K x N the product; for images N images, C channels in, O out. A layer, which multiplies by the same
weights again and again, keeps a :class:`ConvProduct` or :class:`LinearProduct`.

Chapter: 06, "Faster than float32?"
"""

import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from axmoe_lite.factors import HIGHEST_MINIMAL_RANK
from axmoe_lite.kernels import factored, lookup, reference, triton
from axmoe_lite.multipliers import EXACT, Mosaic, Multiplier
from axmoe_lite.multipliers import multiplier as by_name
from axmoe_lite.multipliers.table import check_table

PATHS = ("auto", "factored", "lookup", "reference")
ALWAYS_FACTORED = factored.FEW_TERMS  # these need no measurement


def matmul(a: Tensor, b: Tensor, multiplier: Multiplier | Mosaic, *, path: str = "auto") -> Tensor:
    """Approximate matrix product: out[..., m, n] = sum over k of M(a[..., m, k], b[..., k, n]).

    Args:
        a: the first operands (activations), integers in -128..127, [..., M, K].
        b: the second operands (weights), integers in -128..127, [..., K, N]; the dots stand for the same
            batch dimensions in both, or for none. A mosaic's filters are the N, its channels the K.
        path: ``"auto"``, ``"factored"``, ``"lookup"`` or ``"reference"``; all give the same bits.

    Returns:
        int32 [..., M, N].

    Raises:
        ValueError: operands that are not integers, out of range or of wrong shape; sums that could
            leave 32 bits; ``path="factored"`` for a table whose factors no arithmetic here can sum exactly.

    >>> from axmoe_lite.multipliers import multiplier
    >>> a, b = torch.tensor([[3, 7]]), torch.tensor([[5], [2]])
    >>> matmul(a, b, multiplier("mul8s_1KV6")), matmul(a, b, multiplier("mul8s_1L2J"))  # 3*5 + 7*2, 2*4 + 6*2
    (tensor([[29]], dtype=torch.int32), tensor([[20]], dtype=torch.int32))
    """
    a, b = _operand("a", a, 2, more=True), _operand("b", b, 2, more=True)
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"a is {list(a.shape)} and b {list(b.shape)}; the columns of a must match the rows of b, and dimensions"
            " before them must be the same in both."
        )
    _check_sums(a.shape[-1], multiplier)
    chosen = _choose(path, multiplier, a.shape[-1], 1, a.device)
    if a.ndim > 2 and (chosen != "factored" or isinstance(multiplier, Mosaic)):
        out = torch.empty(*a.shape[:-1], b.shape[-1], dtype=torch.int32, device=a.device)
        triples = (t.flatten(0, -3) for t in (a, b, out))
        for x, y, sums in zip(*triples, strict=True):
            sums.copy_(matmul(x, y, multiplier, path=path))
        return out
    if isinstance(multiplier, Mosaic):
        multiplier.check_fits("b, transposed,", b.mT.shape)
    if chosen in ("factored", "reference"):
        b = multiplier.columns(b.mT).mT
    if chosen == "factored":
        return factored.matmul(a, b, multiplier)
    product = {"lookup": lookup.matmul, "triton": triton.matmul, "reference": reference.matmul}[chosen]
    if isinstance(multiplier, Mosaic) and chosen != "reference":
        parts = ((part.mT, table) for part, table in _layers_of(multiplier, b.mT))
        return sum(product(a, part, table) for part, table in parts)
    return product(a, b, multiplier.table)


def conv2d(
    x: Tensor,
    weight: Tensor,
    multiplier: Multiplier | Mosaic,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    path: str = "auto",
) -> Tensor:
    """Approximate 2-D convolution, with torch's meaning of every option.

    Padding is code 0, and goes through the table like any other operand: a circuit with M(0, b) != 0
    errs at the border too.

    Args:
        x: activations, integers in -128..127, [N, C, H, W].
        weight: integers in -128..127, [O, C / groups, KH, KW].
        path: as in :func:`matmul`.

    Returns:
        int32 [N, O, OH, OW].

    Raises:
        ValueError: as :func:`matmul`, and for shapes, groups or a kernel that do not fit the image.
    """
    x, weight = _operand("x", x, 4), _operand("weight", weight, 4)
    stride, padding, dilation = _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    _check_conv_shapes(x, weight, padding, dilation, groups)
    kernel = weight.shape[2] * weight.shape[3]
    fan_in = weight.shape[1] * kernel
    _check_sums(fan_in, multiplier)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    chosen = _choose(path, multiplier, fan_in, kernel, x.device)
    if isinstance(multiplier, Mosaic):
        multiplier.check_fits("weight", weight.shape)
    if chosen == "factored":
        return factored.conv2d(x, multiplier.columns(weight), multiplier, **options)
    product = {"lookup": lookup.conv2d, "triton": triton.conv2d, "reference": reference.conv2d}[chosen]
    if isinstance(multiplier, Mosaic) and chosen != "reference":
        return sum(product(x, part, table, **options) for part, table in _layers_of(multiplier, weight))
    return product(x, multiplier.columns(weight), multiplier.table, **options)


def _layers_of(mosaic: Mosaic, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A mosaic as a sum of ordinary products, for paths that know one table: elsewhere each has a column of zeros.

    That column is the one of code -128, which quantised weights never take.
    """
    if bool((weight == -128).any()):
        raise ValueError(
            "A mosaic of so high a rank is looked up with code -128 as nothing, and there are weights of -128; give"
            " codes in -127..127, as quantise() does, or use path='reference'."
        )
    places = mosaic.places_of(weight)
    for place, one in enumerate(mosaic.multipliers):
        table = one.table.clone()
        table[:, 0] = 0
        yield torch.where(places == place, weight, -128).to(torch.int8), table


def _choose(path: str, multiplier: Multiplier | Mosaic, fan_in: int, together: int, device: torch.device) -> str:
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; it can be {', '.join(map(repr, PATHS))}.")
    if path == "reference":
        return path
    # A table is looked up by the CPU or by Triton; on any other device by the law.
    by_table = "lookup" if device.type == "cpu" else "triton" if triton.available(device) else "reference"
    if path == "lookup":
        return by_table
    possible = factored.possible(multiplier, fan_in, together, device)
    if path == "factored" and not possible:
        raise ValueError(
            f"No arithmetic here sums the factors of {multiplier.name!r} exactly at fan-in {fan_in}; use path='auto'."
        )
    rank = factored.rank(multiplier)
    cheap = possible and (rank <= ALWAYS_FACTORED or rank <= _crossover(multiplier, fan_in, device))
    return "factored" if path == "factored" or cheap else by_table


def _crossover(multiplier: Multiplier | Mosaic, fan_in: int, device: torch.device) -> int:
    on_units = factored.units(factored.factors_of(multiplier), fan_in, device)
    return crossover_rank("int8" if on_units else "float32") if device.type == "cpu" else 16  # not measured


@functools.cache
def crossover_rank(arithmetic: str) -> int:
    """The rank above which a table is looked up: measured once in a process, on an ordinary convolution.

    The choice changes the time a product takes, never its bits.

    Args:
        arithmetic: what the factored path would run in, ``"int8"`` or ``"float32"``.
    """
    from axmoe_lite.kernels.products import ConvProduct  # which stands on this module

    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 128, (16, 64, 16, 16), generator=generator).to(torch.int8)
    weight = torch.randint(-128, 128, (64, 64, 3, 3), generator=generator).to(torch.int8)
    by_terms = by_name(EXACT if arithmetic == "int8" else "drum(4)")  # DRUM makes 144 of -128: no byte
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    if arithmetic == "int8":  # as a layer has it, its weights laid out
        floats = x.float().contiguous(memory_format=torch.channels_last)
        term = ConvProduct(weight, by_terms, scale_w=torch.ones(()), scale_x=1.0, bias=None, **options)
        calls = [lambda: term(floats)]
    else:
        calls = [lambda: factored.conv2d(x, weight, by_terms, **options)]
    calls.append(lambda: lookup.conv2d(x, weight, by_terms.table, **options))
    seconds = _shortest(calls)
    return min(HIGHEST_MINIMAL_RANK, max(ALWAYS_FACTORED, int(seconds[1] / seconds[0] * factored.rank(by_terms))))


def _shortest(calls: list[Callable[[], Tensor]], *, turns: int = 20) -> list[float]:
    """Seconds of the quickest call of each, in turns, after two that may have to compile and to settle."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(2 + turns):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if turn > 1:
                times.append(time.perf_counter() - start)
    return list(map(min, seconds))


def _operand(name: str, values: Tensor, dimensions: int, *, more: bool = False) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim < dimensions or (values.ndim > dimensions and not more):
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        needed = f"{dimensions} or more dimensions" if more else f"{dimensions} dimensions"
        raise ValueError(f"{name} is {shape}; a tensor with {needed} is needed.")
    if values.dtype == torch.int8:
        return values
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"{name} is {values.dtype}; operands are integers in -128..127. Quantise first (axmoe_lite.quant.quantise)."
        )
    if values.numel() and not (int(values.min()) >= -128 and int(values.max()) <= 127):
        raise ValueError(
            f"{name} runs from {int(values.min())} to {int(values.max())}; signed 8-bit operands lie in -128..127."
        )
    return values.to(torch.int8)


def _check_sums(fan_in: int, multiplier: Multiplier | Mosaic) -> None:
    check_table(multiplier)
    if fan_in * multiplier.largest >= 2**31:
        raise ValueError(
            f"{fan_in} products of up to {multiplier.largest} ({multiplier.name!r}) can leave the 32-bit accumulator;"
            " split the sum, or use a table with smaller products."
        )


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} is {value!r}; give one whole number or two, each at least {least}.")
    return pair


def _check_conv_shapes(
    x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> None:
    channels, out, per_group = x.shape[1], weight.shape[0], weight.shape[1]
    if not isinstance(groups, int) or groups < 1 or channels != per_group * groups or out % groups:
        raise ValueError(
            f"x has {channels} channels and weight is {list(weight.shape)} with groups = {groups}; weight must be"
            " [O, C / groups, KH, KW] with O a multiple of groups."
        )
    for axis, name in ((0, "high"), (1, "wide")):
        image = x.shape[2 + axis] + 2 * padding[axis]
        kernel = dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        if kernel > image or kernel < 1:
            raise ValueError(f"The kernel is {kernel} pixels {name}, the padded image only {image}.")

"""The fast path: an approximate product as an exact one, R times as long.

With M(a, b) = sum over r of u_r(a) v_r(b), the sum over a fan-in K of M(a_k, b_k) is the sum over all
(k, r) of u_r(a_k) v_r(b_k): an ordinary product of fan-in K R. It runs in the cheapest arithmetic that is
provably exact, cut into chunks so short that :func:`~axmoe_lite.factors.exact_arithmetic` proves every
partial sum to be an integer that the format holds; then no rounding can happen, in whatever order the
library adds:

    int8 units     where the factors are bytes and the processor (or GPU) has such units
    float32        elsewhere on the CPU, if nobody has lowered its precision
    float64        elsewhere

Chapter: 02, "Why is an approximate product just a few exact ones?"
"""

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from axmoe_lite.factors import Arithmetic, Factors, compact, exact_arithmetic, factorise, masked
from axmoe_lite.kernels import cuda, int8
from axmoe_lite.kernels.encode import encode
from axmoe_lite.multipliers import Mosaic, Multiplier
from axmoe_lite.multipliers.table import Q

FEW_TERMS = 5  # what the EvoApproxLib circuits need at most; beyond, lookups may be cheaper


def factors_of(multiplier: Multiplier | Mosaic, channels: int | None = None) -> Factors:
    """The factors to multiply with: as bytes where that is possible (:func:`axmoe_lite.factors.compact`).

    Operands of a mosaic by channels can be encoded once it is known how many channels a layer's group has.
    """
    factors = factorise(multiplier)
    if factors not in _smaller:
        found = compact(factors)
        _smaller[factors] = None if found is factors else found  # itself would keep itself alive
    found = _smaller[factors] or factors
    if channels is None or not found.by_channel:
        return found
    layers = _placed.setdefault(multiplier, {})
    if channels not in layers:
        places = multiplier.places_of(torch.empty(1, channels)).expand(1, channels)[0]
        layers[channels] = replace(found, places=places)
    return layers[channels]


# Known for as long as the factors are: those of tables without structure take a megabyte each.
_smaller: "weakref.WeakKeyDictionary[Factors, Factors | None]" = weakref.WeakKeyDictionary()
_placed: "weakref.WeakKeyDictionary[Mosaic, dict[int, Factors]]" = weakref.WeakKeyDictionary()


def rank(multiplier: Multiplier | Mosaic) -> int:
    """How many exact products one approximate product takes."""
    return factors_of(multiplier).rank


def possible(multiplier: Multiplier | Mosaic, fan_in: int, together: int, device: torch.device) -> bool:
    """Whether the sums are provably exact; ``together`` products (one kernel's cells) cannot be cut apart."""
    factors = factors_of(multiplier)
    return units(factors, fan_in, device) or _arithmetic(factors, fan_in, together, device).name != "none"


def matmul(a: Tensor, b: Tensor, multiplier: Multiplier | Mosaic) -> Tensor:
    """int8 [..., M, K] and columns [..., K, N] (of a table) to int32 [..., M, N], equal to the law in every bit."""
    fan_in = a.shape[-1]
    factors = factors_of(multiplier, channels=fan_in)
    if factors.rank == 0 or 0 in (*a.shape, *b.shape):
        return torch.zeros(*a.shape[:-1], b.shape[-1], dtype=torch.int32, device=a.device)
    arithmetic = _arithmetic(factors, fan_in, 1, a.device)
    if units(factors, fan_in, a.device) and (a.ndim == 2 or arithmetic.chunk < fan_in):
        return shifted(_matmul_in_bytes(a, b, factors), factors)
    # A batch of small products: floats, where they need no cutting, have one call for all of it.
    dtype, total = getattr(torch, arithmetic.name), None
    for start in range(0, fan_in, arithmetic.chunk):
        part = slice(start, start + arithmetic.chunk)
        sums = _in_floats(a[..., part], b[..., part, :], factors.of(part), dtype).to(torch.int32)
        total = sums if total is None else total.add_(sums)
    return shifted(total, factors)


def float_sums(a: Tensor, b: Tensor, multiplier: Multiplier) -> Tensor | None:
    """As :func:`matmul` for a batch, but as float32 [..., M, N], if they are exact there without cutting; else None."""
    factors, fan_in = factors_of(multiplier), a.shape[-1]
    if a.ndim == 2 or factors.rank == 0 or factors.rank > FEW_TERMS or 0 in (*a.shape, *b.shape):
        return None
    arithmetic = _arithmetic(factors, fan_in, 1, a.device)
    exact = arithmetic.name == "float32" and arithmetic.chunk >= fan_in
    return _in_floats(a, b, factors, torch.float32).mul_(2.0**factors.shift) if exact else None


def _in_floats(a: Tensor, b: Tensor, factors: Factors, dtype: torch.dtype) -> Tensor:
    left = _terms(a, factors, "u", dtype, axis=-1)  # [..., M, R k]
    right = _terms(b, factors, "v", dtype, axis=-2)  # [..., R k, N]
    with torch.autocast(a.device.type, enabled=False):
        return left @ right


def _matmul_in_bytes(a: Tensor, b: Tensor, factors: Factors) -> Tensor:
    # [..., M, R K] and [..., R K, N]. Only codes can be encoded; the columns of a mosaic are looked up.
    left, columns = encode(a, factors, "u"), b.mT
    right = (
        encode(columns, factors, "v") if b.dtype == torch.int8 else _terms(columns, factors, "v", torch.int8, axis=-1)
    )
    right = right.mT
    product = cuda.matmul if a.device.type == "cuda" else int8.matmul
    if a.ndim == 2:
        return product(left, right)
    pairs = zip(left.flatten(0, -3), right.flatten(0, -3), strict=True)
    return torch.stack([product(x, y) for x, y in pairs]).unflatten(0, a.shape[:-2])


def conv2d(
    x: Tensor,
    weight: Tensor,
    multiplier: Multiplier | Mosaic,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """int8 [N, C, H, W] and columns [O, C / groups, KH, KW] to int32 [N, O, OH, OW], equal to the law in every bit."""
    factors = factors_of(multiplier, channels=weight.shape[1])
    by_hand, padding = border(padding, factors)
    x = padded(x, by_hand)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if factors.rank == 0 or 0 in (*x.shape, *weight.shape):
        reach = (d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))
        sides = zip(x.shape[2:], padding, reach, stride, strict=True)
        shape = (len(x), len(weight), *((side + 2 * p - r) // s + 1 for side, p, r, s in sides))
        return torch.zeros(shape, dtype=torch.int32, device=x.device)
    per_group, kernel = weight.shape[1], weight.shape[2] * weight.shape[3]
    if x.device.type == "cuda" and units(factors, per_group * kernel, x.device):
        sums = cuda.conv2d(first_operands(x, factors, groups=groups), second_operands(weight, factors), **options)
        return shifted(sums, factors)
    arithmetic = exact_arithmetic(factors, per_group * kernel, available=("float32",))  # what the units hand out
    bytewise = units(factors, per_group * kernel, x.device) and arithmetic.chunk >= kernel
    if not bytewise:
        arithmetic = _arithmetic(factors, per_group * kernel, kernel, x.device)
    step = max(1, arithmetic.chunk // kernel)  # channels of each group whose sums a float32 holds
    total, parts = None, [range(per_group)[start : start + step] for start in range(0, per_group, step)]
    while parts:
        few = parts.pop()
        part = slice(few.start, few.stop)
        seen = x if len(few) == per_group else x.unflatten(1, (groups, per_group))[:, :, part].flatten(1, 2)
        some = weight[:, part], factors.of(part)
        sums = _conv2d_in_bytes(seen, *some, options) if bytewise else None
        if sums is None and bytewise and len(few) > 1:
            parts += [few[: len(few) // 2], few[len(few) // 2 :]]  # whose sums the units' zero point does not spoil
            continue
        if sums is None:
            dtype = torch.float64 if bytewise else getattr(torch, arithmetic.name)
            sums = _conv2d_in_floats(seen, *some, dtype, options)
        sums = sums.to(torch.int32)
        total = sums if total is None else total.add_(sums)
    return shifted(total, factors)


def shifted(sums: Tensor, factors: Factors) -> Tensor:
    """Integer sums, in place, times the power of two that their factors have in common."""
    return sums.mul_(2**factors.shift) if factors.shift else sums


def _conv2d_in_bytes(x: Tensor, weight: Tensor, factors: Factors, options: dict) -> Tensor | None:
    terms, ones = second_operands(weight, factors), torch.ones(len(weight))
    # Without a zero point the units are exact without further proof, so images without signs are told apart.
    offset = 0 if factors.unsigned and int(x.min()) >= 0 else 128
    if not int8.fits(terms, offset):
        return None
    image = first_operands(x, factors, groups=options["groups"], offset=offset).view(torch.uint8)
    return int8.PackedConv2d(terms, ones, None, offset, **options)(image)


def _conv2d_in_floats(x: Tensor, weight: Tensor, factors: Factors, dtype: torch.dtype, options: dict) -> Tensor:
    # Channels last, in memory too, is the layout in which oneDNN convolves fastest.
    grouped = x.permute(0, 2, 3, 1).unflatten(3, (options["groups"], -1))
    left = _terms(grouped, factors, "u", dtype, axis=4).flatten(3).permute(0, 3, 1, 2)  # [N, groups R c, H, W]
    right = _terms(weight, factors, "v", dtype, axis=1)  # [O, R c, KH, KW]
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.conv2d(left, right, None, *options.values())


def border(padding: tuple[int, int], factors: Factors) -> tuple[tuple[int, int], tuple[int, int]]:
    """How much of the padding is done on the codes, and how much is left to the convolution: (by hand, left).

    Where some u_r(0) is not 0 the border must be made of codes before it is made of factors.
    """
    nothing = factors.masks is not None or not factors.u[:, 128::Q].any()
    return ((0, 0), padding) if nothing else (padding, (0, 0))


def padded(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """The image [N, C, H, W] with a border of zeros."""
    if not any(padding):
        return x
    return torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))


def first_operands(x: Tensor, factors: Factors, *, groups: int, offset: int = 0, **quantisation: float) -> Tensor:
    """The bytes of an image, [N, C, H, W] to [N, groups R C / groups, H, W], channels last in memory."""
    rows = x.permute(0, 2, 3, 1)
    return encode(rows, factors, "u", groups=groups, offset=offset, **quantisation).permute(0, 3, 1, 2)


def second_operands(weight: Tensor, factors: Factors) -> Tensor:
    """The bytes of weights, given as columns of the table: [O, c, ...] to [O, R c, ...]."""
    return _terms(weight, factors, "v", torch.int8, axis=1)


def units(factors: Factors, fan_in: int, device: torch.device) -> bool:
    """Whether int8 units take these factors, and their sums fit 32 bits."""
    if not _bytewise(factors, fan_in):
        return False
    return cuda.available(device) if device.type == "cuda" else device.type == "cpu" and int8.available()


def _bytewise(factors: Factors, fan_in: int) -> bool:
    return factors.rank > 0 and exact_arithmetic(factors, max(1, fan_in), available=("int8",)).name == "int8"


def _arithmetic(factors: Factors, fan_in: int, together: int, device: torch.device) -> Arithmetic:
    """float32 where its sums are exact and really float32, else float64."""
    for name in ("float32", "float64"):
        if name == "float32" and not _float32_is_float32(device):
            continue
        found = exact_arithmetic(factors, max(1, fan_in), available=(name,))
        if found.name != "none" and found.chunk >= min(together, max(1, fan_in)):
            return found
    return Arithmetic("none", 0, 0)


def _float32_is_float32(device: torch.device) -> bool:
    """False where torch may multiply float32 in fewer bits: on GPUs (TF32), or if the user allowed it."""
    if device.type != "cpu":
        return False
    if not hasattr(torch.backends.mkldnn, "conv"):  # before torch 2.9 there was one switch
        return torch.get_float32_matmul_precision() == "highest"
    backends = (torch.backends, torch.backends.mkldnn, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    return all(backend.fp32_precision in ("none", "ieee") for backend in backends)


def _terms(values: Tensor, factors: Factors, side: str, dtype: torch.dtype, *, axis: int) -> Tensor:
    """The R factors of every value, one block after the other along ``axis``, which grows R-fold."""
    if factors.masks is not None and values.dtype == torch.int8:
        blocks = [masked(values, pair[side == "v"]) for pair in factors.masks]  # still int8: a quarter of the traffic
    else:
        table = getattr(factors, side).to(device=values.device, dtype=dtype)
        index = values.long() + 128
        if side == "u" and factors.places is not None:  # the channels of first operands come last
            index += Q * factors.places.to(values.device)
        blocks = [row[index] for row in table]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=axis)).to(dtype)

"""The fast path: an approximate product as an exact one, R times as long.

With M(a, b) = sum over r of u_r(a) v_r(b), the sum over a fan-in K of M(a_k, b_k) is the sum over all
(k, r) of u_r(a_k) v_r(b_k): an ordinary product of fan-in K R. Here it runs in floating point, cut into
chunks so short that :func:`~axmoe_lite.factors.exact_arithmetic` proves every partial sum to be an
integer that the format holds; then no rounding can happen, in whatever order the library adds.
"""

import torch
from torch import Tensor

from axmoe_lite.factors import Arithmetic, Factors, exact_arithmetic, factorise, masked
from axmoe_lite.multipliers import Multiplier

HIGHEST_RANK = 16  # more terms than this cost more than looking the products up


def rank(multiplier: Multiplier) -> int:
    """How many exact products one approximate product takes."""
    return factorise(multiplier).rank


def possible(multiplier: Multiplier, fan_in: int, together: int, device: torch.device) -> bool:
    """Whether the sums are provably exact; ``together`` products (one kernel's cells) cannot be cut apart."""
    return _arithmetic(factorise(multiplier), fan_in, together, device).name != "none"


def matmul(a: Tensor, b: Tensor, multiplier: Multiplier) -> Tensor:
    """int8 [M, K] and [K, N] to int32 [M, N], equal to the law in every bit."""
    factors, fan_in = factorise(multiplier), a.shape[1]
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    if factors.rank == 0 or fan_in == 0:
        return total
    arithmetic = _arithmetic(factors, fan_in, 1, a.device)
    dtype = getattr(torch, arithmetic.name)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, fan_in, arithmetic.chunk):
            part = slice(start, start + arithmetic.chunk)
            left = _terms(a[:, part], factors, "u", dtype, axis=1)  # [M, R k]
            right = _terms(b[part], factors, "v", dtype, axis=0)  # [R k, N]
            total += (left @ right).to(torch.int32)
    return total


def conv2d(
    x: Tensor,
    weight: Tensor,
    multiplier: Multiplier,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """int8 [N, C, H, W] and [O, C / groups, KH, KW] to int32 [N, O, OH, OW], equal to the law in every bit."""
    factors = factorise(multiplier)
    per_group, kernel = weight.shape[1], weight.shape[2:]
    if any(padding) and factors.masks is None:
        # u_r(0) need not be 0, so the border must be made of codes before it is made of factors.
        x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        padding = (0, 0)
    if factors.rank == 0:
        shapes = (t.to("meta", torch.float32) for t in (x, weight))  # only the shape of the result is wanted
        shape = torch.nn.functional.conv2d(*shapes, None, stride, padding, dilation, groups).shape
        return torch.zeros(shape, dtype=torch.int32, device=x.device)
    arithmetic = _arithmetic(factors, per_group * kernel.numel(), kernel.numel(), x.device)
    dtype = getattr(torch, arithmetic.name)
    step = max(1, arithmetic.chunk // kernel.numel())  # channels of each group in one go
    total: Tensor | None = None
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, per_group, step):
            part = slice(start, start + step)
            # Channels last, in memory too, is the layout in which oneDNN convolves fastest.
            seen = x.permute(0, 2, 3, 1).unflatten(3, (groups, per_group))[..., part]
            left = _terms(seen, factors, "u", dtype, axis=4).flatten(3).permute(0, 3, 1, 2)  # [N, groups R c, H, W]
            right = _terms(weight[:, part], factors, "v", dtype, axis=1)  # [O, R c, KH, KW]
            sums = torch.nn.functional.conv2d(left, right, None, stride, padding, dilation, groups)
            total = sums.to(torch.int32) if total is None else total.add_(sums.to(torch.int32))
    return total


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
    if factors.masks is not None:
        blocks = [masked(values, pair[side == "v"]) for pair in factors.masks]  # still int8: a quarter of the traffic
    else:
        table = getattr(factors, side).to(device=values.device, dtype=dtype)
        blocks = [row[values.long() + 128] for row in table]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=axis)).to(dtype)

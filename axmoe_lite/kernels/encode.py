"""From values to the bytes that an exact int8 product multiplies: quantise, factorise, concatenate, in one pass.

Each value becomes R bytes, one for each term of the multiplier's factors: the code with some bits cleared,
or, for factors that are no masks, what a table of 256 bytes says. The bytes of one term stand side by side,
term after term, so that one product over R times the channels sums all terms:

    [..., C] values  ->  [..., R C] bytes

With numba this is one pass over memory; without it, a few of plain torch that give the same bytes.

Chapter: 04, "Faster than float32?"
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from axmoe_lite.factors import Factors, masked

LIMIT = 127  # -128 is left out, so that codes are symmetric


def encode(
    values: Tensor,
    factors: Factors,
    side: str = "u",
    *,
    inverse_scale: float | None = None,
    offset: int = 0,
    groups: int = 1,
    least: int = -LIMIT,
    out: Tensor | None = None,
) -> Tensor:
    """The bytes of every value: [..., C] to [..., groups R C / groups].

    Args:
        values: float32, of which code = round(value * inverse_scale) in least..127 is taken (half to even; NaN
            becomes 0), or int8 or uint8 codes as they are.
        factors: whose ``u`` or ``v`` fit -128..127.
        side: ``"u"`` for first operands, ``"v"`` for second ones.
        inverse_scale: float32(1 / s); None for codes.
        offset: 128 stores b + 128 in unsigned bytes, for units that want the first operand unsigned; 0
            stores b itself.
        groups: the channels fall into so many groups, each with its own R blocks.
        least: the lowest code, -127, or 0 where values are known to be cut at 0.
        out: where to write, if given: contiguous, of the result's shape and type.

    Returns:
        uint8 if ``offset`` is 128, or if the values are uint8, else int8.

    >>> from axmoe_lite import factorise, multiplier
    >>> encode(torch.tensor([[0.5, -0.3]]), factorise(multiplier("mul8s_1L2J")), inverse_scale=10.0)
    tensor([[ 4, -4]], dtype=torch.int8)
    """
    dtype = torch.uint8 if offset or values.dtype == torch.uint8 else torch.int8
    shape = (*values.shape[:-1], values.shape[-1] * factors.rank)
    out = torch.empty(shape, dtype=dtype, device=values.device) if out is None else out
    assert out.dtype == dtype and out.shape == shape and out.is_contiguous()
    if out.numel() == 0:
        return out
    rows = values.contiguous().view(-1, values.shape[-1] // groups)
    compiled = _compiled()
    if compiled is None or values.device.type != "cpu":
        return out.copy_(_by_torch(rows, factors, side, inverse_scale, offset, least).view(shape))
    masks, lookup = _instructions(factors, side)
    channels, flip, target = rows.shape[1], np.uint8(offset), _bytes(out)
    with torch_threads(compiled.numba):
        if inverse_scale is None:
            compiled.expand_codes(_bytes(rows), masks, lookup, flip, channels, target)
        else:
            scale, least = np.float32(inverse_scale), np.float32(least)
            compiled.quantise_rows(rows.view(-1).numpy(), scale, least, masks, lookup, flip, channels, target)
    return out


def _bytes(values: Tensor) -> np.ndarray:
    return values.view(-1).view(torch.uint8).numpy()


def codes_of(values: Tensor, inverse_scale: float, least: int = -LIMIT) -> Tensor:
    """round(value * inverse_scale) in least..127, half to even: int8, same shape and layout in memory.

    NaN has no code; it becomes 0 on every path.
    """
    if not _compiled_takes(values):
        scaled = (values.float() * inverse_scale).round_().clamp_(least, LIMIT)
        return scaled.nan_to_num_(nan=0.0).to(torch.int8)
    codes, compiled = torch.empty_like(values, dtype=torch.int8), _compiled()
    source, target = _in_memory(values).numpy(), _in_memory(codes).view(torch.uint8).numpy()
    all_bits, no_rows, flip = np.array([255], np.uint8), np.empty((0, 256), np.uint8), np.uint8(0)
    scale, least = np.float32(inverse_scale), np.float32(least)
    with torch_threads(compiled.numba):
        compiled.quantise_rows(source, scale, least, all_bits, no_rows, flip, max(1, source.size), target)
    return codes


def round_trip(values: Tensor, scale: float) -> Tensor:
    """What the codes of the values mean: round(value / scale), cut to -127..127, times scale; float32, same shape."""
    inverse = float(1.0 / torch.tensor(scale, dtype=torch.float32))
    if not _compiled_takes(values):
        return (values.float() * inverse).round_().clamp_(-LIMIT, LIMIT).mul_(scale)
    result, compiled = torch.empty_like(values), _compiled()
    with torch_threads(compiled.numba):
        source, target = _in_memory(values).numpy(), _in_memory(result).numpy()
        compiled.round_trip(source, np.float32(inverse), np.float32(scale), target)
    return result


def clear_outside(grad: Tensor, values: Tensor, limit: float) -> Tensor:
    """``grad``, in place, with 0 where |value| > limit or the value is NaN; float32, same shape as the values."""
    alike = grad.shape == values.shape and grad.stride() == values.stride()
    if not (alike and _compiled_takes(values) and _compiled_takes(grad)):
        return grad.masked_fill_(~(values.abs() <= limit), 0.0)
    compiled = _compiled()
    with torch_threads(compiled.numba):
        compiled.clear_outside(_in_memory(grad).numpy(), _in_memory(values).numpy(), np.float32(limit))
    return grad


def _compiled_takes(values: Tensor) -> bool:
    """Whether the compiled passes can run over a tensor's memory: dense float32 on the CPU, with numba at hand."""
    dense = values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
    return dense and values.dtype == torch.float32 and values.device.type == "cpu" and _compiled() is not None


def _in_memory(values: Tensor) -> Tensor:
    """The values of a dense tensor as they lie in memory: a view, [numel]."""
    return values.detach().as_strided((values.numel(),), (1,))


def _by_torch(
    rows: Tensor, factors: Factors, side: str, inverse_scale: float | None, offset: int, least: int
) -> Tensor:
    """The same bytes, [P, c] to [P, R c], in as many passes as it takes."""
    codes = rows.view(torch.int8) if inverse_scale is None else codes_of(rows, inverse_scale, least)
    if factors.masks is not None:
        blocks = [masked(codes, pair[side == "v"]) for pair in factors.masks]
    else:
        index = codes.long() + 128
        blocks = [row[index] for row in getattr(factors, side).to(device=rows.device, dtype=torch.int8)]
    merged = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return merged.view(torch.uint8) ^ offset if offset else merged.view(torch.int8)


@functools.lru_cache(maxsize=256)
def _instructions(factors: Factors, side: str) -> tuple[np.ndarray, np.ndarray]:
    """What the compiled pass reads: R masks as bytes, or R rows of 256 bytes, indexed by the byte of the code."""
    if factors.masks is not None:
        return np.array([pair[side == "v"] for pair in factors.masks], np.uint8), np.empty((0, 256), np.uint8)
    table = getattr(factors, side).to(torch.int8).numpy().view(np.uint8)
    return np.empty(0, np.uint8), np.roll(table, -128, axis=1)  # position 0 is code 0, position 255 code -1


@functools.cache
def _compiled() -> ModuleType | None:
    """The one-pass version, or None where numba is not installed."""
    try:
        return importlib.import_module("axmoe_lite.kernels.compiled")
    except ImportError:
        return None


@contextlib.contextmanager
def torch_threads(numba: ModuleType) -> Iterator[None]:
    """As many threads inside as torch may use: whoever limits torch means this too."""
    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)))
    try:
        yield
    finally:
        numba.set_num_threads(before)

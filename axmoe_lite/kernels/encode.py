"""From values to the bytes that an exact int8 product multiplies: quantise, factorise, concatenate, in one pass.

Each value becomes R bytes, one for each term of the multiplier's factors: the code with some bits cleared,
or, for factors that are no masks, what a table of 256 bytes says. The bytes of one term stand side by side,
term after term, so that one product over R times the channels sums all terms:

    [..., C] values  ->  [..., R C] bytes

With numba this is one pass over memory; without it, a few of plain torch that give the same bytes.

Chapter: 06, "Faster than float32?"
"""

import functools
import importlib
import math
import threading
import weakref
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from axmoe_lite.factors import Factors, masked
from axmoe_lite.multipliers.table import Q

LIMIT = 127  # -128 is left out, so that codes are symmetric
PIECE = 1 << 17  # values of a tensor that take a detour through float32 together: it stays in the cache


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
    values = values if inverse_scale is None else values.float()
    rows = values.contiguous().view(-1, values.shape[-1] // groups)
    if _compiled() is None or values.device.type != "cpu":
        return out.copy_(_by_torch(rows, factors, side, inverse_scale, offset, least).view(shape))
    instructions, channels = _instructions(factors, side), rows.shape[1]
    if inverse_scale is None:
        _run("expand_codes", rows.numel(), channels, channels, offset, *instructions, rows, out)
    else:
        _quantise_rows(rows, channels, inverse_scale, least, offset, instructions, out)
    return out


def encode_unsigned(values: Tensor, factors: Factors, *, inverse_scale: float, groups: int = 1) -> tuple[Tensor, int]:
    """The bytes of first operands for units that take unsigned ones, and their offset: 0 if none is negative.

    Takes what :func:`encode` takes. The result lies in memory that the next call overwrites (:func:`scratch`).

    Returns:
        uint8 [..., groups R C / groups], and 0 or 128.
    """
    out = scratch((*values.shape[:-1], values.shape[-1] * factors.rank), torch.uint8)
    if not factors.unsigned:
        return encode(values, factors, inverse_scale=inverse_scale, offset=128, groups=groups, out=out), 128
    if _compiled() is None or out.numel() == 0:
        # "Not at least" rather than "below": NaN must not hide negative values.
        offset = 0 if out.numel() == 0 or bool(values.amin() * inverse_scale >= -0.5) else 128
        target = out if offset else out.view(torch.int8)
        encode(values, factors, inverse_scale=inverse_scale, offset=offset, groups=groups, out=target)
        return out, offset
    x, instructions = values.float().contiguous(), _instructions(factors, "u")
    negative = _quantise_rows(x, x.shape[-1] // groups, inverse_scale, -LIMIT, 0, instructions, out)
    return (out.bitwise_xor_(128), 128) if negative else (out, 0)


def _quantise_rows(
    x: Tensor, channels: int, inverse_scale: float, least: int, offset: int, instructions: tuple, out: Tensor
) -> bool:
    """The compiled pass over values [P c] as they lie in memory; returns whether some code was negative."""
    assert x.dtype == torch.float32 and out.element_size() == 1, "the compiled pass reads memory as it is"
    seen = np.zeros(-(-x.numel() // channels), np.uint8)  # as many as there can be tasks
    numbers = np.float32(inverse_scale), np.float32(least), offset
    _run("quantise_rows", x.numel(), channels, channels, *numbers, *instructions, x, out, seen)
    return bool(seen.max(initial=0) >= 128)


def _run(loop: str, size: int, whole: int, *arguments: "int | np.floating | np.ndarray | Tensor") -> None:
    """A compiled loop over ``size`` values, in tasks that are multiples of ``whole``."""
    compiled = _compiled()
    step = max(1, compiled.TASK // whole) * whole
    compiled.run(getattr(compiled, loop), -(-size // step), size, step, *arguments)


_memory = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for values that are read before the next call that asks for some: fresh pages are dear.

    Each thread has its own, and one for each type, as large as the largest that was asked for.
    """
    size = math.prod(shape)
    held = getattr(_memory, str(dtype), None)
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # what is allocated in inference mode cannot be written to outside of it
            held = torch.empty(size, dtype=dtype)
        setattr(_memory, str(dtype), held)
    return held[:size].view(shape)


def codes_of(values: Tensor, inverse_scale: float, least: int = -LIMIT) -> Tensor:
    """round(value * inverse_scale) in least..127, half to even: int8, same shape.

    NaN has no code; it becomes 0 on every path.
    """
    values = values.float()
    if _compiled() is None or values.device.type != "cpu":
        scaled = (values * inverse_scale).round_().clamp_(least, LIMIT)
        return scaled.nan_to_num_(nan=0.0).to(torch.int8)
    values = values if _compiled_takes(values) else values.contiguous()
    codes, size = torch.empty_like(values, dtype=torch.int8), values.numel()
    if size:
        _quantise_rows(values, min(size, _compiled().TASK), inverse_scale, least, 0, _ALL_BITS, codes)
    return codes


def round_trip(values: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """What the codes of the values mean: round(value / scale), cut to -127..127, times scale; float32, same shape.

    Returns:
        The values, and notes for :func:`clear_outside` on where some were cut. Both lie in memory that the
        next call overwrites (:func:`scratch`).
    """
    inverse = np.float32(1) / np.float32(scale)
    if values.dtype != torch.float32 or not _compiled_takes(values):
        return (values.float() * float(inverse)).round_().clamp_(-LIMIT, LIMIT).mul_(scale), None
    size, few = values.numel(), _compiled().FEW
    result, outside = scratch((size,), torch.float32), scratch((-(-size // few),), torch.bool)
    _run("round_trip", size, few, inverse, np.float32(scale), limit(scale), values, outside, result)
    return result.as_strided(values.shape, values.stride()), outside


def codes_in_bfloat16(values: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """The codes of the values, round(value / scale), cut to -127..127, as bfloat16, which holds them; same shape.

    Returns:
        The codes, and notes for :func:`clear_outside`, in memory that the next such call overwrites.
    """
    inverse = np.float32(1) / np.float32(scale)
    if not _compiled_takes(values):
        return (values.float() * float(inverse)).round_().clamp_(-LIMIT, LIMIT).to(torch.bfloat16), None
    size, few = values.numel(), _compiled().FEW
    codes, outside = scratch((size,), torch.bfloat16), scratch((-(-size // few),), torch.bool)
    before, after = scratch((2, PIECE), torch.float32)
    flat, numbers = _as_in_memory(values), (inverse, np.float32(1), limit(scale))
    for start in range(0, size, PIECE):
        part = flat[start : start + PIECE]
        count = len(part)
        part = part if part.dtype == torch.float32 else before[:count].copy_(part)
        _run("round_trip", count, few, *numbers, part, outside[start // few :], after[:count])
        codes[start : start + count].copy_(after[:count])
    return codes.as_strided(values.shape, values.stride()), outside


def clear_outside(grad: Tensor, values: Tensor, scale: float, outside: Tensor | None = None) -> Tensor:
    """``grad``, in place, with 0 where a value was cut or is NaN; same shape as the values.

    ``outside`` are the notes that :func:`round_trip` or :func:`codes_in_bfloat16` made of the same values: with
    them most need not be read.
    """
    alike = grad.shape == values.shape and grad.stride() == values.stride()
    if outside is None or not (alike and _compiled_takes(grad)):
        return _clear(grad, values, scale)
    few = _compiled().FEW
    if grad.dtype == values.dtype == torch.float32:
        _run("clear_outside", values.numel(), few, limit(scale), grad, values, outside)
        return grad
    flat, seen = _as_in_memory(grad), _as_in_memory(values)
    whole = len(flat) // few  # the last note may speak for fewer
    _clear(flat[whole * few :], seen[whole * few :], scale)
    rows, seen, noted = flat[: whole * few].view(-1, few), seen[: whole * few].view(-1, few), outside[:whole]
    where = noted.nonzero()[:, 0]
    rows[where] = _clear(rows[where], seen[where], scale)
    return grad


def _clear(grad: Tensor, values: Tensor, scale: float) -> Tensor:
    # As float32: comparing shorter floats with a number, torch would round the number to their few bits first.
    return grad.masked_fill_(~(values.float().abs() <= float(limit(scale))), 0.0)


def _as_in_memory(values: Tensor) -> Tensor:
    """A dense tensor as one row, in the order of memory."""
    return values.as_strided((values.numel(),), (1,))


def limit(scale: float) -> np.float32:
    """The largest magnitude that is not cut: half a step above the largest code."""
    return np.float32(scale) * np.float32(LIMIT + 0.5)


def _compiled_takes(values: Tensor) -> bool:
    """Whether the compiled passes can run over a tensor's memory: dense on the CPU, with numba at hand.

    They read float32; bfloat16 goes there piece by piece.
    """
    dense = values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
    known = values.dtype in (torch.float32, torch.bfloat16)
    return dense and known and values.device.type == "cpu" and _compiled() is not None


def _by_torch(
    rows: Tensor, factors: Factors, side: str, inverse_scale: float | None, offset: int, least: int
) -> Tensor:
    """The same bytes, [P, c] to [P, R c], in as many passes as it takes."""
    codes = rows.view(torch.int8) if inverse_scale is None else codes_of(rows, inverse_scale, least)
    if factors.masks is not None:
        blocks = [masked(codes, pair[side == "v"]) for pair in factors.masks]
    else:
        index = codes.long() + 128
        if side == "u" and factors.places is not None:
            index += Q * factors.places.to(rows.device)
        blocks = [row[index] for row in getattr(factors, side).to(device=rows.device, dtype=torch.int8)]
    merged = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    return merged.view(torch.uint8) ^ offset if offset else merged.view(torch.int8)


_known: "weakref.WeakKeyDictionary[Factors, dict[str, tuple]]" = weakref.WeakKeyDictionary()  # gone with the factors


def _instructions(factors: Factors, side: str) -> tuple[int | np.ndarray, ...]:
    """What the compiled pass reads: R masks as bytes, or R rows of 256 bytes, indexed by the byte of the code.

    By channels there are M such rows side by side, and the place in them where each channel's begins.
    """
    known = _known.setdefault(factors, {})
    if side not in known:
        known[side] = _made(factors, side)
    return known[side]


def _made(factors: Factors, side: str) -> tuple[int | np.ndarray, ...]:
    if factors.masks is not None:
        return factors.rank, np.array([pair[side == "v"] for pair in factors.masks], np.uint8), *_NO_ROWS
    table = getattr(factors, side).to(torch.int8).numpy().view(np.uint8)
    by_byte = np.roll(table.reshape(factors.rank, -1, Q), -128, axis=2)  # position 0 is code 0, position 255 code -1
    rows = factors.rank, table.shape[1], np.ascontiguousarray(by_byte)
    by_channel = side == "u" and factors.places is not None
    starts = (Q * factors.places).to(torch.int32).numpy() if by_channel else _NOTHING
    return 0, _NOTHING, *rows, starts.size, starts


_NOTHING = np.empty(0, np.uint8)
_NO_ROWS = 0, Q, _NOTHING, 0, _NOTHING
_ALL_BITS = 1, np.array([255], np.uint8), *_NO_ROWS  # codes as they are


@functools.cache
def _compiled() -> ModuleType | None:
    """The one-pass version, or None where numba is not installed, or refuses a NUMBA_... variable."""
    try:
        return importlib.import_module("axmoe_lite.kernels.compiled")
    except (ImportError, ValueError):
        return None

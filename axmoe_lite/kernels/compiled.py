"""The compiled loops of :mod:`axmoe_lite.kernels.encode`. Imports numba, so it is imported only when needed.

Everything is flat and explicit: loops that the compiler is sure of are loops that it turns into vectors.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

MAGIC = np.float32(1.5 * 2**23)  # added to |v| < 2^22, it leaves round-half-even(v) in the lowest bits
TASK = 1 << 15  # values of one task: fits the second-level cache, worth a thread's while


@intrinsic
def _bits_of(context: Any, value: Any) -> tuple:
    """The 32 bits of a float32, as an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.types.int32(numba.types.float32), generate


@numba.njit(nogil=True, cache=True)
def _quantise(x, inverse, least, mask, flip, out):
    for i in range(x.size):
        v = min(max(x[i] * inverse, least), np.float32(127))
        # NaN slips through min and max, but the lowest byte of the quiet NaN is 0, the code it shall have.
        out[i] = np.uint8(_bits_of(v + MAGIC)) & mask ^ flip


@numba.njit(nogil=True, cache=True)
def _mask(codes, masks, flip, channels, out):
    """codes [P c] to out [P R c], bytes."""
    terms, o = masks.size, 0
    for p in range(codes.size // channels):
        for r in range(terms):
            for c in range(channels):
                out[o] = codes[p * channels + c] & masks[r] ^ flip
                o += 1


@numba.njit(nogil=True, cache=True)
def _mask_words(codes, masks, flip, words, out):
    """The same on eight bytes at a time: rows of 16 channels are too short for a vector of 64."""
    ones = np.uint64(0x0101010101010101)
    terms, o = masks.size, 0
    for p in range(codes.size // words):
        for r in range(terms):
            m = np.uint64(masks[r]) * ones
            f = np.uint64(flip) * ones
            for c in range(words):
                out[o] = codes[p * words + c] & m ^ f
                o += 1


@numba.njit(nogil=True, cache=True)
def _look_up(codes, rows, flip, channels, out):
    terms = rows.shape[0]
    for p in range(codes.size // channels):
        source = codes[p * channels : (p + 1) * channels]
        for r in range(terms):
            row = rows[r]
            first = (p * terms + r) * channels
            target = out[first : first + channels]
            for c in range(channels):
                target[c] = row[source[c]] ^ flip


@numba.njit(nogil=True, cache=True)
def _expand(codes, masks, rows, flip, channels, out):
    if masks.size == 0:
        _look_up(codes, rows, flip, channels, out)
    elif masks.size == 1:
        for i in range(codes.size):
            out[i] = codes[i] & masks[0] ^ flip
    elif channels % 8 == 0:
        _mask_words(codes.view(np.uint64), masks, flip, channels // 8, out.view(np.uint64))
    else:
        _mask(codes, masks, flip, channels, out)


@numba.njit(nogil=True, parallel=True, cache=True)
def quantise_rows(x, inverse, least, masks, rows, flip, channels, out):
    """float32 [P c] to bytes [P R c]: quantise and expand. ``least`` is the lowest code."""
    terms = max(masks.size, rows.shape[0])
    step = max(1, TASK // channels) * channels
    for task in numba.prange((x.size + step - 1) // step):
        part = x[task * step : min(x.size, (task + 1) * step)]
        result = out[task * step * terms : (task * step + part.size) * terms]
        if masks.size == 1:
            _quantise(part, inverse, least, masks[0], flip, result)
        else:
            codes = np.empty(part.size, np.uint8)
            _quantise(part, inverse, least, np.uint8(255), np.uint8(0), codes)
            _expand(codes, masks, rows, flip, channels, result)


@numba.njit(nogil=True, parallel=True, cache=True)
def expand_codes(codes, masks, rows, flip, channels, out):
    """Codes [P c], as bytes, to bytes [P R c]."""
    terms = max(masks.size, rows.shape[0])
    step = max(1, TASK // channels) * channels
    for task in numba.prange((codes.size + step - 1) // step):
        stop = min(codes.size, (task + 1) * step)
        _expand(codes[task * step : stop], masks, rows, flip, channels, out[task * step * terms : stop * terms])


@numba.njit(nogil=True, cache=True)
def _round_trip(x, inverse, scale, out):
    for i in range(x.size):
        v = min(max(x[i] * inverse, np.float32(-127)), np.float32(127))
        out[i] = ((v + MAGIC) - MAGIC) * scale


@numba.njit(nogil=True, parallel=True, cache=True)
def round_trip(x, inverse, scale, out):
    """float32 [n] to the values that its codes mean, [n]."""
    for task in numba.prange((x.size + TASK - 1) // TASK):
        part = slice(task * TASK, min(x.size, (task + 1) * TASK))
        _round_trip(x[part], inverse, scale, out[part])


@numba.njit(nogil=True, cache=True)
def _clear_outside(grad, x, limit):
    for i in range(x.size):
        grad[i] = grad[i] if abs(x[i]) <= limit else np.float32(0)


@numba.njit(nogil=True, parallel=True, cache=True)
def clear_outside(grad, x, limit):
    """grad [n], in place: 0 where |x| > limit."""
    for task in numba.prange((x.size + TASK - 1) // TASK):
        part = slice(task * TASK, min(x.size, (task + 1) * TASK))
        _clear_outside(grad[part], x[part], limit)

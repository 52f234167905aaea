"""The compiled loops of :mod:`axmoe_lite.kernels.encode`. Imports numba, so it is imported only when needed.

Each loop is a C function that threads of a team run together (:mod:`axmoe_lite.kernels.team`): they take
tasks of neighbouring values, ``step`` in each, until none is left. Everything is flat and explicit:
loops that the compiler is sure of are loops that it turns into vectors.
"""

import numba
import numpy as np
from numba import carray

from axmoe_lite.kernels.team import bits_of, float_of, loop, next_task, pointer
from axmoe_lite.kernels.team import run as run  # for callers, who may not import numba

MAGIC = np.float32(1.5 * 2**23)  # added to |v| < 2^22, it leaves round-half-even(v) in the lowest bits
TASK = 1 << 15  # values of one task: fits the second-level cache, worth a thread's while
FEW = 256  # values that one flag speaks for


@numba.njit(nogil=True)
def _quantise(x, inverse, least, mask, flip, out):
    """Returns every bit that some code has; bit 7 tells that one was negative."""
    seen = np.int32(0)
    for i in range(x.size):
        v = x[i] * inverse
        v = min(max(v if v == v else np.float32(0), least), np.float32(127))  # NaN has code 0
        bits = bits_of(v + MAGIC)
        seen |= bits
        out[i] = np.uint8(bits) & mask ^ flip
    return np.uint8(seen)


@numba.njit(nogil=True)
def _mask(codes, masks, flip, channels, out):
    """codes [P c] to out [P R c], bytes."""
    terms, o = masks.size, 0
    for p in range(codes.size // channels):
        for r in range(terms):
            for c in range(channels):
                out[o] = codes[p * channels + c] & masks[r] ^ flip
                o += 1


@numba.njit(nogil=True)
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


@numba.njit(nogil=True)
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


@numba.njit(nogil=True)
def _look_up_by_channel(codes, rows, starts, flip, channels, out):
    """The same where each channel has its own table: it begins ``starts`` bytes into a row."""
    terms = rows.shape[0]
    for p in range(codes.size // channels):
        source = codes[p * channels : (p + 1) * channels]
        for r in range(terms):
            row = rows[r]
            first = (p * terms + r) * channels
            target = out[first : first + channels]
            for c in range(channels):
                target[c] = row[starts[c] + source[c]] ^ flip


@numba.njit(nogil=True)
def _expand(codes, masks, rows, starts, flip, channels, out):
    if starts.size:
        _look_up_by_channel(codes, rows, starts, flip, channels, out)
    elif masks.size == 0:
        _look_up(codes, rows, flip, channels, out)
    elif masks.size == 1:
        for i in range(codes.size):
            out[i] = codes[i] & masks[0] ^ flip
    elif channels % 8 == 0:
        _mask_words(codes.view(np.uint64), masks, flip, channels // 8, out.view(np.uint64))
    else:
        _mask(codes, masks, flip, channels, out)


@loop
def quantise_rows(arguments):
    """float32 [P c] to bytes [P R c]: quantise and expand; seen[task] are the bits that its codes have."""
    a = carray(arguments, 18, np.int64)
    tasks, size, step, channels = a[1], a[2], a[3], a[4]
    inverse, least, flip = float_of(a[5]), float_of(a[6]), np.uint8(a[7])
    masks, rows = carray(pointer(a[9]), a[8], np.uint8), carray(pointer(a[12]), (a[10], a[11]), np.uint8)
    starts, terms = carray(pointer(a[14]), a[13], np.int32), masks.size + rows.shape[0]
    x, out = carray(pointer(a[15]), size, np.float32), carray(pointer(a[16]), size * terms, np.uint8)
    seen = carray(pointer(a[17]), tasks, np.uint8)
    codes = np.empty(0 if masks.size == 1 else step, np.uint8)
    task = next_task(arguments)
    while task < tasks:
        start, stop = task * step, min(size, (task + 1) * step)
        result = out[start * terms : stop * terms]
        if masks.size == 1:
            seen[task] = _quantise(x[start:stop], inverse, least, masks[0], flip, result)
        else:
            part = codes[: stop - start]
            seen[task] = _quantise(x[start:stop], inverse, least, np.uint8(255), np.uint8(0), part)
            _expand(part, masks, rows, starts, flip, channels, result)
        task = next_task(arguments)


@loop
def expand_codes(arguments):
    """Codes [P c], as bytes, to bytes [P R c]."""
    a = carray(arguments, 15, np.int64)
    tasks, size, step, channels, flip = a[1], a[2], a[3], a[4], np.uint8(a[5])
    masks, rows = carray(pointer(a[7]), a[6], np.uint8), carray(pointer(a[10]), (a[8], a[9]), np.uint8)
    starts, terms = carray(pointer(a[12]), a[11], np.int32), masks.size + rows.shape[0]
    codes, out = carray(pointer(a[13]), size, np.uint8), carray(pointer(a[14]), size * terms, np.uint8)
    task = next_task(arguments)
    while task < tasks:
        start, stop = task * step, min(size, (task + 1) * step)
        _expand(codes[start:stop], masks, rows, starts, flip, channels, out[start * terms : stop * terms])
        task = next_task(arguments)


@numba.njit(nogil=True)
def _round_trip(x, inverse, scale, limit, out):
    """Returns whether some |x| > limit."""
    largest = np.int32(0)
    for i in range(x.size):
        # Magnitudes are ordered as their bits are, with NaN above all; integers have a maximum in vectors.
        largest = max(largest, bits_of(abs(x[i])))
        v = min(max(x[i] * inverse, np.float32(-127)), np.float32(127))
        out[i] = ((v + MAGIC) - MAGIC) * scale
    return largest > bits_of(limit)


@loop
def round_trip(arguments):
    """float32 [n] to the values that its codes mean, [n]; outside [n / FEW] tells where some |x| > limit."""
    a = carray(arguments, 10, np.int64)
    tasks, size, step = a[1], a[2], a[3]
    inverse, scale, limit = float_of(a[4]), float_of(a[5]), float_of(a[6])
    x, out = carray(pointer(a[7]), size, np.float32), carray(pointer(a[9]), size, np.float32)
    outside = carray(pointer(a[8]), (size + FEW - 1) // FEW, np.bool_)
    task = next_task(arguments)
    while task < tasks:
        for start in range(task * step, min(size, (task + 1) * step), FEW):
            stop = min(size, start + FEW)
            outside[start // FEW] = _round_trip(x[start:stop], inverse, scale, limit, out[start:stop])
        task = next_task(arguments)


@loop
def clear_outside(arguments):
    """grad [n], in place: 0 where |x| > limit. Reads x only where ``outside`` says that there is something."""
    a = carray(arguments, 8, np.int64)
    tasks, size, step, limit = a[1], a[2], a[3], float_of(a[4])
    grad, x = carray(pointer(a[5]), size, np.float32), carray(pointer(a[6]), size, np.float32)
    outside = carray(pointer(a[7]), (size + FEW - 1) // FEW, np.bool_)
    task = next_task(arguments)
    while task < tasks:
        for start in range(task * step, min(size, (task + 1) * step), FEW):
            if outside[start // FEW]:
                for i in range(start, min(size, start + FEW)):
                    grad[i] = grad[i] if abs(x[i]) <= limit else np.float32(0)
        task = next_task(arguments)

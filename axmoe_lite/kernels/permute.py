"""The compiled half of the lookup path: three numba loops for one primitive, sums of lookups at distances.

    out[o, m] = initial[o] + sum over k of table_row(weights[o, k])[buffer[offsets[group of o, k] + m]]

Activation k of every output position m lies in one flat buffer at a constant distance, so consecutive m
are consecutive bytes: a matrix is such a buffer when transposed, an image when padded (see
:func:`axmoe_lite.kernels.lookup.conv2d`). All three functions take any part of out, release the GIL, and
add modulo 2^32, so partial sums may wrap as long as the whole fits.

    permute_rows  64 lookups by one byte permutation, when the CPU has AVX-512 VBMI
    loop_rows     16 outputs at a time: add whole table rows, in vectors that any CPU has
    single_rows   one lookup after the other, for shapes too small to repay what the others prepare

This module imports numba, so only :mod:`axmoe_lite.kernels.lookup` imports it, at the first product.
A byte here is an operand's two's complement code: 0..127 as they are, -128..-1 as 128..255.

Chapter: 06, "Faster than float32?"
"""

from collections.abc import Callable

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from axmoe_lite.kernels.team import loop, next_task, pointer
from axmoe_lite.kernels.team import run as run  # for callers, who may not import numba

LANES = 64  # bytes of a 512-bit register; out's rows are padded to a multiple of it
WIDE = 4  # registers of activations that share one load of a table row: 4 x 4 accumulators leave 16 registers free
FLUSH = 256  # products of bytes whose sum is sure to stay within 16 bits: 256 * 255 < 2^16
TILE = 16  # outputs that loop_rows adds together: a table row is one cache line
BLOCK = 4096  # output positions of loop_rows at a time: their sums stay in the second-level cache

BYTE, WORD, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(64)
BYTES, WORDS = ir.VectorType(BYTE, 64), ir.VectorType(WORD, 32)
INTS = ir.IntType(32)


def obstacle() -> str:
    """What keeps :func:`permute_rows` from running here, in words; empty if nothing does."""
    config = numba.config
    if config.CPU_NAME or config.CPU_FEATURES is not None:  # then the host's features say nothing
        return "NUMBA_CPU_NAME or NUMBA_CPU_FEATURES asks for code for another CPU"
    features = llvmlite.binding.get_host_cpu_features()
    missing = [name for name in ("avx512f", "avx512bw", "avx512vbmi") if not features.get(name)]
    return f"this CPU has no {', '.join(missing)}" if missing else ""


def _load(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _panel(quarters: int, registers: int) -> Callable:
    """A function that adds ``count`` products to ``registers`` x 64 outputs, all sums held in registers.

    Args:
        quarters: quarters of a table row that occur: 4, or 2 when no activation is negative.
        registers: 64-byte registers of activations.

    The products of one weight are two byte planes, the low and the high byte, each of ``quarters`` registers.
    One byte permutation looks 64 bytes up in one quarter (it reads the low six bits of the activation);
    the activation's upper bits choose among the quarters. Measured on one core: 22 G lookups a second; 18 with
    vpermi2b, which reads two quarters in one instruction.
    """

    @intrinsic
    def panel(typing_context, activations, offsets, weights, planes, count, out):
        signature = types.void(*[types.int64] * 6)  # addresses in bytes, and a count

        def generate(context, builder, signature, arguments):
            activations, offsets, weights, planes, count, out = arguments
            kind = ir.FunctionType(BYTES, [BYTES, BYTES])
            permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.qi.512")
            nothing, eight = ir.Constant(WORDS, [0] * 32), ir.Constant(WORDS, [8] * 32)

            def shifted(address, count, size):
                return builder.add(address, builder.mul(count, ir.Constant(LONG, size)))

            def after(address, distance):
                return builder.add(address, ir.Constant(LONG, distance))

            # Byte sums without unpacking: one 16-bit sum of the pairs even + 256 * odd, one of the odd bytes alone.
            sums = [
                [[cgutils.alloca_once_value(builder, nothing) for _ in ("pairs", "odd")] for _ in ("low", "high")]
                for _ in range(registers)
            ]
            with cgutils.for_range(builder, count, intp=LONG) as loop:
                source = builder.add(activations, _load(builder, LONG, shifted(offsets, loop.index, 8)))
                weight = builder.zext(_load(builder, BYTE, builder.add(weights, loop.index)), LONG)
                row = shifted(planes, weight, 2 * quarters * LANES)
                for register in range(registers):
                    a = _load(builder, BYTES, after(source, register * LANES))
                    zero = ir.Constant(BYTES, [0] * 64)
                    bit6 = builder.icmp_signed("<", builder.add(a, a), zero)
                    choose = [None, bit6]
                    if quarters == 4:
                        bit7 = builder.icmp_signed("<", a, zero)
                        choose += [bit7, builder.and_(bit6, bit7)]
                    for plane in range(2):
                        found = None
                        for quarter in range(quarters):
                            part = _load(builder, BYTES, after(row, (plane * quarters + quarter) * LANES))
                            here = builder.call(permute, [part, a])
                            found = here if found is None else builder.select(choose[quarter], here, found)
                        words = builder.bitcast(found, WORDS)
                        pairs, odd = sums[register][plane]
                        builder.store(builder.add(builder.load(pairs), words), pairs)
                        builder.store(builder.add(builder.load(odd), builder.lshr(words, eight)), odd)

            wide = ir.VectorType(INTS, 32)
            for register in range(registers):
                halves = {"even": [], "odd": []}
                for pairs, odd in sums[register]:
                    odd = builder.load(odd)
                    even = builder.sub(builder.load(pairs), builder.shl(odd, eight))
                    halves["even"].append(builder.zext(even, wide))
                    halves["odd"].append(builder.zext(odd, wide))
                high = ir.Constant(wide, [8] * 32)
                even, odd = (builder.add(low, builder.shl(top, high)) for low, top in halves.values())
                order = ir.Constant(ir.VectorType(INTS, 64), [i // 2 + 32 * (i % 2) for i in range(64)])
                place = builder.inttoptr(after(out, register * LANES * 4), ir.VectorType(INTS, 64).as_pointer())
                total = builder.add(builder.load(place, align=1), builder.shuffle_vector(even, odd, order))
                builder.store(total, place, align=1)
            return context.get_dummy_value()

        return signature, generate

    return panel


_signed_wide, _signed_narrow = _panel(4, WIDE), _panel(4, 1)
_positive_wide, _positive_narrow = _panel(2, WIDE), _panel(2, 1)


@numba.njit(nogil=True)
def permute_rows(buffer, offsets, weights, planes, initial, out, o_start, o_stop, m_start, m_stop):
    """64 lookups at a time, for tables whose rows span at most 16 bits.

    Args:
        buffer: uint8; readable for 64 bytes beyond the last activation.
        offsets: int64 [groups, K].
        weights: uint8 [O, K].
        planes: uint8 [256, 2, 256 or 128]: for every weight the low, then the high byte of its products with
            all activations (or with 0..127 only) less the row's smallest.
        initial: int32 [O]: what those smallest sum to.
        out: int32 [O, M], M a multiple of 64; written from o_start to o_stop and m_start (a multiple
            of 64) to m_stop, rounded up to a multiple of 64.
    """
    fan_in = weights.shape[1]
    per_group = weights.shape[0] // offsets.shape[0]
    positive = planes.shape[2] == 128
    m = m_start
    while m < m_stop:
        wide = m_stop - m > (WIDE - 1) * LANES
        width = WIDE * LANES if wide else LANES
        out[o_start:o_stop, m : m + width] = initial[o_start:o_stop].reshape(-1, 1)
        # Activations of 256 x 256 products and the whole table (128 KB) stay near while every output passes.
        for k in range(0, fan_in, FLUSH):
            count = min(FLUSH, fan_in - k)
            for o in range(o_start, o_stop):
                a = buffer.ctypes.data + m
                distance = offsets.ctypes.data + 8 * (o // per_group * fan_in + k)
                w = weights.ctypes.data + o * fan_in + k
                to = out.ctypes.data + 4 * (o * out.shape[1] + m)
                if positive and wide:
                    _positive_wide(a, distance, w, planes.ctypes.data, count, to)
                elif positive:
                    _positive_narrow(a, distance, w, planes.ctypes.data, count, to)
                elif wide:
                    _signed_wide(a, distance, w, planes.ctypes.data, count, to)
                else:
                    _signed_narrow(a, distance, w, planes.ctypes.data, count, to)
        m += width


@intrinsic
def _add_two_rows(typing_context, total, first, second):
    """total[0:16] += first[0:16] + second[0:16]; int32 at these addresses.

    Spelled as vectors because LLVM cannot prove that numba's arrays do not overlap, and would test it at
    every 16 additions. These are plain vectors: every CPU adds them in as many registers as it needs.
    """
    signature = types.void(*[types.int64] * 3)

    def generate(context, builder, signature, arguments):
        places = [builder.inttoptr(address, ir.VectorType(INTS, TILE).as_pointer()) for address in arguments]
        total, first, second = (builder.load(place, align=4) for place in places)
        builder.store(builder.add(total, builder.add(first, second)), places[0], align=4)
        return context.get_dummy_value()

    return signature, generate


@numba.njit(nogil=True)
def loop_rows(buffer, offsets, weights, table, initial, out, o_start, o_stop, m_start, m_stop):
    """16 outputs at a time, two k together: their products with every activation, side by side, are one row.

    Arguments as :func:`permute_rows`, but ``table`` is int32 [256, 256 or 128], with any entries.
    """
    fan_in = weights.shape[1]
    per_group = weights.shape[0] // offsets.shape[0]
    values = table.shape[1]
    rows = np.zeros((2, values, TILE), np.int32)  # 2 x 16 KB: in the first-level cache while all m pass
    blocks = -(-(m_stop - m_start) // BLOCK)  # all of one length: a short one would repay its preparation badly
    block = -(-(m_stop - m_start) // blocks)
    sums = np.zeros((block, TILE), np.int32)
    line = TILE * 4
    for start in range(m_start, m_stop, block):
        length = min(block, m_stop - start)
        o = o_start
        while o < o_stop:
            group = o // per_group
            width = min(TILE, o_stop - o, (group + 1) * per_group - o)
            sums[:] = 0
            for k in range(0, fan_in, 2):
                second = min(k + 1, fan_in - 1)
                for side in range(2):
                    for c in range(width):
                        entries = table[weights[o + c, k + side if k + side < fan_in else k]]
                        for a in range(values):
                            # An odd fan-in ends with a row of nothing.
                            rows[side, a, c] = entries[a] if k + side < fan_in else 0
                near = offsets[group, k] + start
                far = offsets[group, second] + start
                for m in range(length):
                    _add_two_rows(
                        sums.ctypes.data + line * m,
                        rows.ctypes.data + line * np.int64(buffer[near + m]),
                        rows.ctypes.data + line * (values + np.int64(buffer[far + m])),
                    )
            for c in range(width):
                for m in range(length):
                    out[o + c, start + m] = initial[o + c] + sums[m, c]
            o += width


@intrinsic
def _transpose_8_by_8(typing_context, source, source_pitch, place, place_pitch):
    """place[j, i] = source[i, j] for 8 x 8 bytes at these addresses, rows so many bytes apart."""
    signature = types.void(*[types.int64] * 4)

    def generate(context, builder, signature, arguments):
        source, source_pitch, place, place_pitch = arguments
        kind = ir.VectorType(LONG, 8)
        square = ir.Constant(kind, ir.Undefined)
        for i in range(8):
            row = _load(builder, LONG, builder.add(source, builder.mul(source_pitch, ir.Constant(LONG, i))))
            square = builder.insert_element(square, row, ir.Constant(INTS, i))
        order = ir.Constant(ir.VectorType(INTS, 64), [i // 8 + 8 * (i % 8) for i in range(64)])
        square = builder.bitcast(square, BYTES)
        square = builder.bitcast(builder.shuffle_vector(square, square, order), kind)
        for j in range(8):
            address = builder.add(place, builder.mul(place_pitch, ir.Constant(LONG, j)))
            column = builder.extract_element(square, ir.Constant(INTS, j))
            builder.store(column, builder.inttoptr(address, LONG.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature, generate


@loop
def transpose(arguments):
    """place[k, m] = source[m, k]: uint8 [M, K] to [K, pitch]; one task."""
    a = carray(arguments, 7, np.int64)
    rows, columns, pitch = a[2], a[3], a[4]
    source = carray(pointer(a[5]), (rows, columns), np.uint8)
    place = carray(pointer(a[6]), (columns, pitch), np.uint8)
    for top in range(0, rows, 64):  # 64 x 64 bytes: whole cache lines on both sides
        for left in range(0, columns, 64):
            for m in range(top, min(top + 64, rows), 8):
                for k in range(left, min(left + 64, columns), 8):
                    if m + 8 <= rows and k + 8 <= columns:
                        _transpose_8_by_8(
                            source.ctypes.data + m * columns + k, columns, place.ctypes.data + k * pitch + m, pitch
                        )
                    else:
                        for i in range(m, min(m + 8, rows)):
                            for j in range(k, min(k + 8, columns)):
                                place[j, i] = source[i, j]


@numba.njit(nogil=True)
def single_rows(buffer, offsets, weights, table, initial, out, o_start, o_stop, m_start, m_stop):
    """One lookup after the other. Arguments as :func:`loop_rows`."""
    fan_in = weights.shape[1]
    per_group = weights.shape[0] // offsets.shape[0]
    for o in range(o_start, o_stop):
        total = out[o, m_start:m_stop]
        total[:] = initial[o]
        for k in range(fan_in):
            entries = table[weights[o, k]]
            seen = buffer[offsets[o // per_group, k] + m_start :]
            for m in range(m_stop - m_start):
                total[m] += entries[seen[m]]


@numba.njit(nogil=True)
def _arrays(arguments):
    """What every loop below is given: parts of out to do, and the arrays of :func:`permute_rows` but one."""
    a = carray(arguments, 14, np.int64)
    size, groups, fan_in, outputs, pitch = a[2], a[3], a[4], a[5], a[6]
    return (
        carray(pointer(a[7]), (a[1], 4), np.int64),  # o_start, o_stop, m_start, m_stop of each part
        carray(pointer(a[8]), size, np.uint8),
        carray(pointer(a[9]), (groups, fan_in), np.int64),
        carray(pointer(a[10]), (outputs, fan_in), np.uint8),
        carray(pointer(a[11]), outputs, np.int32),
        carray(pointer(a[12]), (outputs, pitch), np.int32),
        a[13],
    )


@loop
def permute_parts(arguments):
    """:func:`permute_rows`, shared out."""
    parts, buffer, offsets, weights, initial, out, values = _arrays(arguments)
    planes = carray(pointer(carray(arguments, 15, np.int64)[14]), (256, 2, values), np.uint8)
    p = next_task(arguments)
    while p < parts.shape[0]:
        permute_rows(buffer, offsets, weights, planes, initial, out, parts[p, 0], parts[p, 1], parts[p, 2], parts[p, 3])
        p = next_task(arguments)


@loop
def loop_parts(arguments):
    """:func:`loop_rows`, shared out."""
    parts, buffer, offsets, weights, initial, out, values = _arrays(arguments)
    table = carray(pointer(carray(arguments, 15, np.int64)[14]), (256, values), np.int32)
    p = next_task(arguments)
    while p < parts.shape[0]:
        loop_rows(buffer, offsets, weights, table, initial, out, parts[p, 0], parts[p, 1], parts[p, 2], parts[p, 3])
        p = next_task(arguments)


@loop
def single_parts(arguments):
    """:func:`single_rows`, shared out."""
    parts, buffer, offsets, weights, initial, out, values = _arrays(arguments)
    table = carray(pointer(carray(arguments, 15, np.int64)[14]), (256, values), np.int32)
    p = next_task(arguments)
    while p < parts.shape[0]:
        single_rows(buffer, offsets, weights, table, initial, out, parts[p, 0], parts[p, 1], parts[p, 2], parts[p, 3])
        p = next_task(arguments)

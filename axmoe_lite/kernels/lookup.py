"""The path for any table: look every product up, many at a time.

Three ways, the same bits. ``permute`` lets one instruction look 64 bytes up (numba, a CPU with AVX-512
VBMI), ``loop`` adds the products of 16 weights at once (numba, any CPU), ``torch`` does that with
embedding_bag and needs nothing more. The fastest possible one is taken, or the one that the environment
variable ``AXMOE_LOOKUP`` names.

The compiled ways know one primitive (:mod:`axmoe_lite.kernels.permute`): activation k of every output
position lies at a constant distance in a flat buffer. A matrix [M, K] is such a buffer once transposed:
the distance is k rows. So is a batch of images, once padded and laid out as

    [C, stride phases, N, Hq, Wq]     pixel (s_h q + phase_h, s_w r + phase_w) of the padded image at [q, r]

where channel c and cell (i, j) of the kernel are one distance for all output positions. No patches are
copied; the few positions that fall between rows or images are computed too, and dropped.

Chapter: 06, "Faster than float32?"
"""

import functools
import importlib
import logging
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from math import ceil
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from axmoe_lite.kernels import reference

SWITCH = "AXMOE_LOOKUP"
BACKENDS = ("permute", "loop", "torch")  # fastest first
FEWEST = (256, 2)  # positions, and outputs of a group, that repay the preparation of 16 x 256 products for every k
WORTH_A_THREAD = 1 << 23  # lookups; fewer take less time than a thread takes to start
TEMPORARY = 1 << 23  # bytes of scratch that a convolution reuses for one part of its images after the other
BAG, COLUMNS, BAGS = 32, 128, 4096  # products summed by one embedding_bag, its columns (of 4 MB), and its rows


def matmul(a: Tensor, b: Tensor, table: Tensor) -> Tensor:
    """out[m, n] = sum over k of table[a[m, k] + 128, b[k, n] + 128], equal to the law in every bit.

    Args:
        a: int8 [M, K] on the CPU, in any layout.
        b: int8 [K, N].
        table: int32 [256, 256], any entries whose sums fit in 32 bits.

    Returns:
        int32 [M, N].

    Raises:
        ValueError: ``AXMOE_LOOKUP`` names no backend, or one that cannot run here.
    """
    chosen, (m, k), n = backend(), a.shape, b.shape[1]
    if 0 in (m, k, n):
        return torch.zeros(m, n, dtype=torch.int32)
    if chosen == "torch":
        return _bags(a, b, table)
    if _padded(n) * m < _padded(m) * n:
        # Registers run along M. Where only N fills them (a batch of one), exchange the operands' parts.
        return matmul(b.T, a.T, table.T).T.contiguous()
    pitch = _padded(m) | 64  # an odd number of cache lines: with a power of two all rows would share a few places
    buffer = np.empty((k, pitch), np.uint8)
    compiled = _compiled()
    compiled.run(compiled.transpose, 1, *a.shape, buffer.shape[1], a.contiguous(), buffer)
    offsets = np.arange(k, dtype=np.int64)[None] * pitch
    out = np.empty((n, pitch), np.int32)
    rows = _prepare(b.T, table, positive=int(a.min()) >= 0, positions=m)
    rows(buffer.reshape(-1), offsets, out, m)
    return torch.from_numpy(out)[:, :m].T.contiguous()


def conv2d(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """int8 [N, C, H, W] and [O, C / groups, KH, KW] to int32 [N, O, OH, OW], equal to the law in every bit.

    Padding is code 0 and is looked up like any other. Raises as :func:`matmul`.
    """
    chosen, (images, channels, *size), (outputs, per_group, *kernel) = backend(), x.shape, weight.shape
    high, wide = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    result = torch.zeros(images, outputs, high, wide, dtype=torch.int32)
    if 0 in (*result.shape, *weight.shape):
        return result
    if chosen == "torch":
        _conv2d_by_bags(x, weight, table, result, stride, padding, dilation, groups)
        return result

    # The padding right of a row is the padding left of the next: W + p columns a row instead of W + 2 p.
    pitch = [max(ceil((size[i] + padding[i]) / stride[i]), (high, wide)[i]) for i in range(2)]
    image = pitch[0] * pitch[1]
    end = ceil(padding[0] / stride[0]) * pitch[1] + ceil(padding[1] / stride[1])  # padding below the last image
    phases = stride[0] * stride[1]
    part = max(1, TEMPORARY // (image * (4 * outputs + channels * phases)))
    part = ceil(images / ceil(images / part))  # equal parts
    plane = part * image + end
    buffer = torch.zeros(channels * phases * plane + 64, dtype=torch.int8)
    pixels = buffer[: channels * phases * plane].view(channels, *stride, plane)[..., : part * image]
    pixels = pixels.unflatten(3, (part, *pitch))  # [C, phases, n, Hq, Wq]
    out = np.empty((outputs, _padded(part * image)), np.int32)
    sums = torch.from_numpy(out)[:, : part * image].unflatten(1, (part, *pitch))  # [O, n, Hq, Wq]

    c, i, j = np.ix_(*map(np.arange, (per_group, *kernel)))
    (q, i), (r, j) = divmod(i * dilation[0], stride[0]), divmod(j * dilation[1], stride[1])
    cells = ((c * stride[0] + i) * stride[1] + j) * plane + q * pitch[1] + r
    offsets = np.arange(groups)[:, None] * (per_group * phases * plane) + cells.reshape(1, -1)
    offsets = offsets.astype(np.int64)

    positive = x.numel() == 0 or int(x.min()) >= 0  # an image may be all border
    rows = _prepare(weight.flatten(1), table, positive=positive, positions=part * image, groups=groups)
    for first in range(0, images, part):
        n = min(part, images - first)
        for place, seen in zip(*_phases(x[first : first + n], pixels[..., :n, :, :], stride, padding), strict=True):
            place.copy_(seen)
        rows(buffer.numpy().view(np.uint8), offsets, out, (n - 1) * image + (high - 1) * pitch[1] + wide)
        result[first : first + n] = sums[:, :n, :high, :wide].transpose(0, 1)
    return result


def backend() -> str:
    """The way in use: ``"permute"``, ``"loop"`` or ``"torch"``; logged once, at level INFO.

    Raises:
        ValueError: ``AXMOE_LOOKUP`` names no backend, or one that cannot run here.
    """
    return getattr(_probing, "name", None) or _choose(os.environ.get(SWITCH, ""))


@functools.cache
def _choose(forced: str) -> str:
    if forced and forced not in BACKENDS:
        raise ValueError(f"{SWITCH} is {forced!r}; it can be {', '.join(map(repr, BACKENDS))}, or unset for the best.")
    obstacles = _obstacles()
    possible = [name for name in BACKENDS if name not in obstacles]
    if forced in obstacles:
        raise ValueError(
            f"{SWITCH} is {forced!r}, which cannot run here: {obstacles[forced]}. Possible here:"
            f" {', '.join(map(repr, possible))}; unset it for the best of them."
        )
    chosen = forced or possible[0]
    faster = [f"not {name!r}: {obstacles[name]}" for name in BACKENDS[: BACKENDS.index(chosen)] if name in obstacles]
    why = f"{SWITCH} says so" if forced else "; ".join(faster) or "the fastest, and this machine has all it needs"
    logging.getLogger("axmoe_lite").info("Products are looked up by %r (%s).", chosen, why)
    return chosen


@functools.cache
def _obstacles() -> dict[str, str]:
    """What keeps each backend from running here, of those that cannot."""
    try:
        numba = importlib.import_module("numba")
        obstacle = _compiled().obstacle()
    except (ImportError, OSError, ValueError) as error:  # a NUMBA_... variable that numba refuses
        return dict.fromkeys(("permute", "loop"), f"numba cannot be imported ({error})")
    if numba.config.DISABLE_JIT:
        return dict.fromkeys(("permute", "loop"), "NUMBA_DISABLE_JIT is set")
    found = {"permute": obstacle} if obstacle else {}
    for name in ("permute", "loop"):
        if name not in found and not _true_to_the_law(name):
            found[name] = "it differs from the law on this machine"
            warnings.warn(
                f"Products are not looked up by {name!r}: {found[name]}. Another way takes its place; results are"
                " the same, slower.",
                stacklevel=2,
            )
    return found


_probing = threading.local()  # the backend that is being tried, while it is


def _true_to_the_law(name: str) -> bool:
    """Whether a compiled backend equals the reference on hard operands: every path is tried before it is trusted."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-(2**15), 2**15, (256, 256), generator=generator, dtype=torch.int32)
    b = torch.randint(-128, 128, (300, 17), generator=generator).to(torch.int8)
    _probing.name = name
    try:
        for least in (-128, 0):  # with and without signs are two loops; 330 rows fill wide and narrow registers
            a = torch.randint(least, 128, (330, 300), generator=generator).to(torch.int8)
            a[0], a[-1] = least, 127
            if not torch.equal(matmul(a, b, table), reference.matmul(a, b, table)):
                return False
    finally:
        del _probing.name
    return True


def _compiled() -> ModuleType:
    """Imported at the first product, because numba takes a second to load and need not be installed."""
    return importlib.import_module("axmoe_lite.kernels.permute")


def _padded(length: int) -> int:
    return -(-length // 64) * 64


def _phases(
    x: Tensor, pixels: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Views of ``pixels`` [C, SH, SW, N, Hq, Wq], and the pixels of x [N, C, H, W] that belong there."""
    places, seen = [], []
    for phases in product(*map(range, stride)):
        here, there = [], []
        for axis in range(2):
            first = max(0, ceil((padding[axis] - phases[axis]) / stride[axis]))  # before it there is padding
            start = stride[axis] * first + phases[axis] - padding[axis]
            count = max(0, ceil((x.shape[2 + axis] - start) / stride[axis]))
            here.append(slice(first, first + count))
            there.append(slice(start, None, stride[axis]))
        places.append(pixels[:, phases[0], phases[1], :, here[0], here[1]])
        seen.append(x.transpose(0, 1)[:, :, there[0], there[1]])
    return places, seen


# -------------------------------------------------------------------------------- the compiled ways


def _prepare(weights: Tensor, table: Tensor, *, positive: bool, positions: int, groups: int = 1) -> Callable:
    """The primitive for these weights, int8 [O, K]: rows(buffer, offsets, out, m) fills out[:, :m]."""
    compiled = _compiled()
    codes = np.ascontiguousarray(weights.numpy()).view(np.uint8)
    entries, smallest, planes = _entries(table, positive)
    if backend() == "permute" and planes is not None:
        work, operand = compiled.permute_parts, planes
        initial = smallest[codes].sum(axis=1).astype(np.int32)  # may wrap, as the rest does, back into range
    else:
        initial = np.zeros(len(codes), np.int32)
        few = positions < FEWEST[0] or len(codes) // groups < FEWEST[1]
        work, operand = compiled.single_parts if few else compiled.loop_parts, entries

    def rows(buffer: np.ndarray, offsets: np.ndarray, out: np.ndarray, m: int) -> None:
        outputs = len(codes)
        threads = min(torch.get_num_threads(), 1 + m * codes.size // WORTH_A_THREAD)
        length = 256 * ceil(m / threads / 256)
        share = ceil(outputs / max(1, threads // ceil(m / length)))  # outputs are cut where positions are too few
        limits = product(range(0, outputs, share), range(0, m, length))
        parts = np.array([(o, min(o + share, outputs), start, min(start + length, m)) for o, start in limits], np.int64)
        sizes = (buffer.size, *offsets.shape, outputs, out.shape[1])
        arrays = (parts, buffer, offsets, codes, initial, out)
        compiled.run(work, len(parts), *map(int, sizes), *arrays, operand.shape[-1], np.ascontiguousarray(operand))

    return rows


MOST_REMEMBERED = 64  # tables
_remembered: OrderedDict[tuple, tuple[Tensor, tuple]] = OrderedDict()


def _entries(table: Tensor, positive: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A table as the compiled loops read it, by codes 0..127, -128..-1 of the weight, then of the activation.

    Returns:
        entries: int32 [256, 256], or [256, 128] for activations that are never negative.
        smallest: int64 [256], the smallest entry of each weight.
        planes: uint8 [256, 2, 256 or 128], low and high bytes of entry - smallest; None if 16 bits are too few.
    """
    # Compared by content, because a table may be written to, and its address used again.
    key = (table.data_ptr(), table.stride(), positive)
    known = _remembered.get(key)
    if known is None or not torch.equal(known[0], table):
        entries = np.roll(table.numpy(), (128, 128), (0, 1)).T
        entries = np.ascontiguousarray(entries[:, :128] if positive else entries, dtype=np.int32)
        smallest = entries.min(axis=1).astype(np.int64)
        above = entries - smallest[:, None]
        planes = np.stack([above & 255, above >> 8], axis=1).astype(np.uint8) if above.max() < 2**16 else None
        known = _remembered[key] = (table.clone(), (entries, smallest, planes))
        while len(_remembered) > MOST_REMEMBERED:
            _remembered.popitem(last=False)
    return known[1]


# ----------------------------------------------------------------------------------- plain torch


def _bags(a: Tensor, b: Tensor, table: Tensor) -> Tensor:
    """int8 [M, K] and [K, N] to int32 [M, N]: row (a[m, k], k) of a bag holds that activation's N products."""
    (m, fan_in), n = a.shape, b.shape[1]
    if 8 * m < n:  # every k costs 256 rows as long as the second operand: let it be the shorter one
        return _bags(b.T, a.T, table.T).T.contiguous()
    # Float sums of BAG entries are exact below 2^24; larger entries go in two halves, which 64 bits put together.
    small = max(int(table.max()), -int(table.min())) * BAG < 2**24
    parts = [(table, 1)] if small else [(table & 0xFFFF, 1), (table >> 16, 2**16)]
    parts = [(part.float(), value) for part, value in parts]
    total = torch.zeros(m, n, dtype=torch.int32 if small else torch.int64)
    for left in range(0, n, COLUMNS):
        weights = b[:, left : left + COLUMNS].int() + 128
        here, width = total[:, left : left + COLUMNS], weights.shape[1]
        memory = torch.empty(256 * min(BAG, fan_in) * width)  # fresh memory for each bag would take as long as the sums
        for k in range(0, fan_in, BAG):
            cells = min(BAG, fan_in - k)
            bag = memory[: 256 * cells * width].view(256, cells * width)
            place = torch.arange(128 * cells, 129 * cells, dtype=torch.int32)
            for part, value in parts:
                torch.index_select(part, 1, weights[k : k + cells].flatten(), out=bag)
                for start in range(0, m, BAGS):
                    rows = a[start : start + BAGS, k : k + cells].int().mul_(cells).add_(place)
                    sums = embedding_bag(rows, bag.view(-1, width), mode="sum").to(total.dtype)
                    here[start : start + BAGS] += sums if small else sums * value
    return total.int()


def _conv2d_by_bags(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    result: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> None:
    """Patches, a few at a time, times weights."""
    (images, outputs, high, wide), (_, per_group, *kernel) = result.shape, weight.shape
    x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    share = outputs // groups
    n, c, h, w = x.stride()
    steps = (n, h * stride[0], w * stride[1], c, h * dilation[0], w * dilation[1])
    rows = max(1, min(high, TEMPORARY // (wide * per_group * kernel[0] * kernel[1])))
    part = max(1, TEMPORARY // (rows * wide * per_group * kernel[0] * kernel[1])) if rows == high else 1
    patches = x.as_strided((images, high, wide, x.shape[1], *kernel), steps)
    for group, first, top in product(range(groups), range(0, images, part), range(0, high, rows)):
        seen = patches[first : first + part, top : top + rows, :, group * per_group : (group + 1) * per_group]
        mine = slice(group * share, (group + 1) * share)
        sums = _bags(seen.flatten(3).flatten(0, 2), weight[mine].flatten(1).T, table)
        result[first : first + part, mine, top : top + rows] = sums.unflatten(0, seen.shape[:3]).movedim(3, 1)

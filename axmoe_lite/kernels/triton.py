"""Any table on a GPU: a Triton kernel that looks every product up, for tables with too many factors.

One kernel serves matrices and images, for a product is a 1 x 1 convolution of one long line of pixels.
A program owns BLOCK_O output channels times BLOCK_P pixels, walks the fan-in, and for each pair of
operands loads table[b, a]. Patches are only index arithmetic; nothing of size M x K x N ever exists.

How the table is read, and why. Triton cannot keep a table in shared memory and index it: tl.gather moves
along one axis and writes its source to scratch memory at every call, 128 KB each time. So the lookups are
ordinary loads and the caches do the rest: 16-bit entries make 128 KB, which an A100's or H100's L1 (192,
256 KB) can hold as the kernel takes next to no shared memory, "evict_last" asks it to, and L2 always holds it. The
table is stored weights first, and the lanes of a warp run along the pixels under one weight: its 32 lookups
then fall into one row of 512 bytes, four cache lines, instead of thirty-two (half that after a ReLU).
Reasoned from the generated code and the data sheets; speed has not been measured (no GPU at hand).

Triton is optional and imported by the first call. With TRITON_INTERPRET=1, set before anything imports
it, the same source runs on CPU tensors, slowly: that is how it is tested without a GPU.
Letters: M x K x N the product; N images, C channels in, O out, P = N OH OW pixels, Q = 256.

Chapter: 02, "Why is an approximate product just a few exact ones?"
"""

from __future__ import annotations  # "tl.constexpr" below is read by Triton, long before which tl is None

import os
import warnings
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from axmoe_lite.kernels import reference
from axmoe_lite.multipliers.table import Q

tl: Any = None  # triton.language, once imported: Triton looks it up among the kernel's globals
LEAST_CAPABILITY = (7, 5)  # Turing: older GPUs than that are not Triton's
_prepared: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by table, then by device


def available(device: torch.device | str) -> bool:
    """Whether :func:`matmul` and :func:`conv2d` run here: Triton is installed, and the device one it compiles for.

    True for a CPU exactly if Triton's interpreter was asked for, which is slow: for tests only.
    """
    device = torch.device(device)
    if find_spec("triton") is None:
        return False
    if device.type == "cuda":
        capable = torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        return capable and true_to_the_law(device)
    return device.type == "cpu" and "TRITON_INTERPRET" in os.environ and _interpreted()


@lru_cache
def true_to_the_law(device: torch.device) -> bool:
    """Whether the kernel equals the reference on hard operands: tried once on each device, with a warning if not."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (37, 150), generator=generator).to(torch.int8)
    b = torch.randint(-128, 128, (150, 17), generator=generator).to(torch.int8)
    a[0], b[:, 0] = -128, 127
    for bits in (15, 20):  # entries of 16 and of 32 bits are two kernels
        table = torch.randint(-(2**bits), 2**bits, (256, 256), generator=generator, dtype=torch.int32)
        if not torch.equal(matmul(a.to(device), b.to(device), table).cpu(), reference.matmul(a, b, table)):
            warnings.warn(
                f"Triton's lookup on {device} is not used: a product differs from the law. The law itself takes its"
                " place; results are the same, much slower.",
                stacklevel=3,
            )
            return False
    return True


def matmul(a: Tensor, b: Tensor, table: Tensor) -> Tensor:
    """out[m, n] = sum over k of table[a[m, k] + 128, b[k, n] + 128].

    Args:
        a: activations, int8 [M, K]; any strides.
        b: weights, int8 [K, N]; any strides.
        table: integers [Q, Q] of at most 32 bits, row a + 128, column b + 128. It is copied to the device
            at first use and remembered for as long as it lives: do not change it in place.

    Returns:
        int32 [M, N]. A sum beyond 32 bits wraps around; :mod:`axmoe_lite.kernels` refuses those before.

    Raises:
        ImportError: without Triton.
        ValueError: for operands or a table of other shapes or types, and for a device Triton has no code for.
    """
    _check(a, b, table, 2)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}; the columns of a must match the rows of b.")
    image = a.T[None, :, None, :]  # [1, K, 1, M]: K channels, M pixels in a line
    return _launch(image, b.T[:, :, None, None], table, (1, 1), (0, 0), (1, 1), 1)[0, :, 0].T.contiguous()


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
    """The convolution whose products are the table's; padding looks up code 0.

    Args:
        x: activations, int8 [N, C, H, W]; any strides.
        weight: int8 [O, C / groups, KH, KW]; any strides.
        table: as in :func:`matmul`.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, already pairs.

    Returns:
        int32 [N, O, OH, OW].

    Raises:
        ImportError, ValueError: as :func:`matmul`.
    """
    _check(x, weight, table, 4)
    if x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ValueError(
            f"x has {x.shape[1]} channels and weight is {list(weight.shape)} with groups = {groups}; weight must be"
            " [O, C / groups, KH, KW] with O a multiple of groups."
        )
    return _launch(x, weight, table, stride, padding, dilation, groups)


def _launch(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    images, channels, height, width = x.shape
    outputs, per_group, *kernel = weight.shape
    out_height, out_width = (
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    out = torch.zeros(images, outputs, out_height, out_width, dtype=torch.int32, device=x.device)
    if out.numel() == 0 or weight.numel() == 0:
        return out
    out_per_group, pixels = outputs // groups, images * out_height * out_width
    # Neighbouring lanes read neighbouring pixels, and all outputs of one step of the walk lie together.
    x = x.contiguous()
    steps = weight.unflatten(0, (groups, out_per_group)).permute(0, 3, 4, 2, 1).contiguous()

    def grid(tile: dict[str, int]) -> tuple[int]:
        # One axis: the others end at 65,535.
        return (groups * -(-out_per_group // tile["BLOCK_O"]) * -(-pixels // tile["BLOCK_P"]),)

    # Triton launches on the current GPU, whatever tensors it is given.
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        _kernel()[grid](
            *(x, steps, _prepare(table, x.device), out),
            *(channels, height, width, height * width, out_width, out_height * out_width, pixels),
            *(per_group, out_per_group, *kernel, *stride, *padding, *dilation),
            tuning_class(pixels, out_per_group),
            **(tile(pixels, out_per_group) if _interpreted() else {}),
        )
    return out


def tile(pixels: int, out_per_group: int) -> dict[str, int]:
    """The tile that wastes least: 4,096 sums at most, as many outputs as there are up to 32.

    >>> tile(100_000, 1), tile(100_000, 64), tile(1, 1000)
    ({'BLOCK_O': 1, 'BLOCK_P': 1024}, {'BLOCK_O': 32, 'BLOCK_P': 128}, {'BLOCK_O': 32, 'BLOCK_P': 1})
    """
    block_o = min(32, _power_of_two(out_per_group))
    return {"BLOCK_O": block_o, "BLOCK_P": min(1024, 4096 // block_o, _power_of_two(pixels))}


def _power_of_two(number: int) -> int:
    """The smallest that is not below ``number``; Triton's tiles have no other sides."""
    return 1 << (number - 1).bit_length()


def tuning_class(pixels: int, out_per_group: int) -> int:
    """Shapes of one class share a tuned tile: as many outputs up to 64, and as many pixels, to a power of two."""
    return 100 * min(6, (out_per_group - 1).bit_length()) + (pixels - 1).bit_length()


# ------------------------------------------------------------------------------------ the kernel


def _lookup(
    x,  # noqa: ANN001  int8 [N, C, H, W]
    steps,  # noqa: ANN001  int8 [groups, KH, KW, C / groups, O / groups]
    table,  # noqa: ANN001  int16 or int32 [Q, Q], weights first
    out,  # noqa: ANN001  int32 [N, O, OH, OW]
    channels,  # noqa: ANN001
    height,  # noqa: ANN001
    width,  # noqa: ANN001
    area,  # noqa: ANN001
    out_width,  # noqa: ANN001
    out_area,  # noqa: ANN001
    pixels,  # noqa: ANN001
    per_group,  # noqa: ANN001
    out_per_group,  # noqa: ANN001
    kernel_height,  # noqa: ANN001
    kernel_width,  # noqa: ANN001
    stride_h,  # noqa: ANN001
    stride_w,  # noqa: ANN001
    padding_h,  # noqa: ANN001
    padding_w,  # noqa: ANN001
    dilation_h,  # noqa: ANN001
    dilation_w,  # noqa: ANN001
    tuning_class,  # noqa: ANN001
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """One tile of sums, [BLOCK_O, BLOCK_P]. Not called from Python: Triton reads it."""
    pixel_tiles = tl.cdiv(pixels, BLOCK_P)
    out_tiles = tl.cdiv(out_per_group, BLOCK_O)
    program = tl.program_id(0)
    group = program // pixel_tiles // out_tiles
    # In 64 bits from here on: an image set of 2 GB has addresses that 32 bits do not hold.
    p = (program % pixel_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o = (program // pixel_tiles % out_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    image = p // out_area
    top = p % out_area // out_width * stride_h - padding_h
    left = p % out_width * stride_w - padding_w
    first = x + (image * channels + group * per_group) * area
    step = steps + group.to(tl.int64) * kernel_height * kernel_width * per_group * out_per_group + o
    sums = tl.zeros((BLOCK_O, BLOCK_P), dtype=tl.int32)
    for i in range(kernel_height):
        for j in range(kernel_width):
            row, column = top + i * dilation_h, left + j * dilation_w
            inside = (p < pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            cell = first + row * width + column
            for _ in range(per_group):
                a = tl.load(cell, mask=inside, other=0).to(tl.int32) + 128  # the border is code 0, not product 0
                b = tl.load(step, mask=o < out_per_group, other=0).to(tl.int32) * 256 + 128 * 256
                # No mask: whatever a lane holds, its index lies in the table.
                products = tl.load(table + (b[:, None] + a[None, :]), eviction_policy="evict_last")
                sums += products.to(tl.int32)
                cell += area
                step += out_per_group
    # out[image, group, o, pixel of the image], of which the last axis is contiguous
    to = (image * (channels // per_group) + group) * out_per_group * out_area + p % out_area
    tl.store(out + to[None, :] + o[:, None] * out_area, sums, mask=(o < out_per_group)[:, None] & (p < pixels)[None, :])


@lru_cache
def _kernel() -> Any:
    """The kernel to launch: tuned by trial on a GPU, taken as it is in the interpreter."""
    return _compiled() if _interpreted() else tuned(_compiled())


@lru_cache
def _compiled() -> Any:
    # One compilation for all shapes: Triton would make a new one for each pattern of ones and multiples of 16.
    shapes = list(signature(_lookup).parameters)[4:-2]
    return _import_triton().jit(_lookup, do_not_specialize=shapes)


def tuned(compiled: Any, **options: Any) -> Any:
    """The kernel with a choice of tiles, the best of which is found by trial at the first call of each class."""
    triton = _import_triton()
    sizes = (
        *((1, 128, 4), (1, 512, 4), (1, 1024, 8)),  # depthwise
        *((4, 256, 4), (8, 128, 4), (8, 512, 8)),
        *((16, 64, 4), (16, 256, 8), (32, 32, 4), (32, 128, 4), (32, 128, 8), (64, 32, 4), (64, 128, 8)),
    )
    return triton.autotune(
        configs=[triton.Config({"BLOCK_O": o, "BLOCK_P": p}, num_warps=warps) for o, p, warps in sizes],
        key=["tuning_class"],  # and, by itself, the type of the table's entries
        prune_configs_by={"early_config_prune": fitting},
        **options,
    )(compiled)


def fitting(configs: list, named: dict, **_: object) -> list:
    """The configurations worth a trial: no more outputs a tile than the group has, nor much fewer."""
    wanted = min(64, _power_of_two(named["out_per_group"]))
    return [c for c in configs if wanted // 4 <= c.kwargs["BLOCK_O"] <= wanted]


@lru_cache
def _interpreted() -> bool:
    return not isinstance(_compiled(), _import_triton().runtime.JITFunction)


@lru_cache
def _import_triton() -> Any:
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise ImportError(
            "Looking products up on a GPU needs Triton, which is not installed; pip install triton (Linux), or use"
            " another path of axmoe_lite.kernels."
        ) from error
    return triton


# ---------------------------------------------------------------------------------------- operands


def _prepare(table: Tensor, device: torch.device) -> Tensor:
    """The table as the kernel wants it, [Q, Q] with weights first, in 16 bits if its entries fit."""
    known = _prepared.setdefault(table, {})
    if device not in known:
        low, high = int(table.min()), int(table.max())
        dtype = torch.int16 if low >= -(2**15) and high < 2**15 else torch.int32
        known[device] = table.T.to(device=device, dtype=dtype).contiguous()
    return known[device]


def _check(a: Tensor, b: Tensor, table: Tensor, dimensions: int) -> None:
    _import_triton()
    for values in (a, b):
        if values.ndim != dimensions or values.dtype != torch.int8:
            raise ValueError(
                f"An operand is {values.dtype} {list(values.shape)}; int8 with {dimensions} dimensions is needed."
            )
    if a.device != b.device:
        raise ValueError(f"One operand is on {a.device}, the other on {b.device}; move both to one device.")
    if tuple(table.shape) != (Q, Q) or table.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"The table is {table.dtype} {list(table.shape)}; 256 x 256 integers are needed.")
    if not available(a.device):
        raise ValueError(
            f"Triton has no code for {a.device}; it compiles for NVIDIA GPUs from capability 7.5 on, and runs on"
            " CPU tensors only with TRITON_INTERPRET=1 set before it is imported."
        )

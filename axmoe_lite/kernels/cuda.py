"""Factored products on int8 tensor cores: torch._int_mm, and convolution as a product of patches.

The operands are already factored and concatenated, R terms along K or along the channels
(:mod:`axmoe_lite.kernels.factored` says why that equals the table). On a GPU int8 is both the fastest
exact arithmetic and the only fast one: float32 may be TF32 there, float64 is slow or emulated.

Nothing here is written for one device: the tests run the same lines on a CPU. Letters: M x K x N the
product, K counting all terms; N images, C' = groups * terms channels in, O out, P = OH * OW pixels.

Why the sums are exact. A product of two int8 codes is at most 2^14 in magnitude, so 131,071 of them
stay below 2^31 in whatever order tensor cores add; longer fan-ins are cut. The parts are added by
torch, whose int32 wraps around: a total that fits 32 bits comes out right even if it was left on the way.

Chapter: 02, "Why is an approximate product just a few exact ones?"
"""

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from axmoe_lite.factors import Factors, exact_arithmetic

# What cuBLASLt's int8 kernels ask for. torch checks M > 16 and K, N multiples of 8, and refuses the rest;
# whole tiles of 32 rows avoid a cuBLAS of CUDA 12.1 that was silently wrong at M = 17 (pytorch 107671),
# and 16 bytes a row are what tensor cores load at once.
ROWS, COLUMNS = 32, 16
ALIGNMENT = 256  # bytes; torch lets cuBLASLt choose the kernel by its default preference, which assumes this
LONGEST = (2**31 - 1) // 2**14 // COLUMNS * COLUMNS  # products of two int8 codes that surely fit an int32
MOST_CELLS = 2**31 - 1  # of one operand or result in one call: no kernel's 32-bit index can overflow
BLOCK_BYTES = 256 * 2**20  # what the patches of one block and their sums may take


def possible(factors: Factors) -> bool:
    """Whether all factors fit -128..127; then every fan-in is summed exactly (module docstring).

    >>> from axmoe_lite.factors import factorise
    >>> from axmoe_lite.multipliers import multiplier
    >>> [possible(factorise(multiplier(name))) for name in ("mul8s_1KV8", "roba()")]
    [True, False]
    """
    return exact_arithmetic(factors, 1, available=("int8",)).name == "int8"


def available(device: torch.device | str) -> bool:
    """Whether torch multiplies int8 matrices on this device, and correctly: asked once, by example.

    Operands -128 and 127 at the corners show saturation, random ones anything else. False, never an
    error, where the GPU or its cuBLAS has no such kernels (they begin with Turing, capability 7.5).
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return False
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _probed(device)


@lru_cache
def _probed(device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (17, 16, 16), (33, 72, 24), (64, 1152, 40)):
        left = torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8)
        right = torch.randint(-128, 128, (k, n), generator=generator).to(torch.int8)
        left[0], right[:, 0] = -128, -128
        right[k // 2 :, -1] = 127
        try:
            found = matmul(left.to(device), right.to(device)).cpu()
        except (RuntimeError, AttributeError):  # no kernel for this GPU; no _int_mm in this torch
            return False
        if not torch.equal(found.double(), left.double() @ right.double()):  # far below 2^53: exact
            warnings.warn(
                f"The int8 units of {device} are not used: a product of fan-in {k} differs from the law. Other"
                " arithmetic takes their place; results are the same, slower.",
                stacklevel=3,
            )
            return False
    return True


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The ordinary product of int8 matrices, exact: [M, K] and [K, N] to int32 [M, N].

    Operands that tensor cores cannot take as they are (shape, strides, address) are copied into zeros
    of a size that they can. ``right`` costs no copy if it is the transpose of a contiguous [N, K].

    Raises:
        ValueError: for operands that are not int8 matrices of matching shapes on one device.
    """
    for name, values in (("left", left), ("right", right)):
        if values.ndim != 2 or values.dtype != torch.int8:
            raise ValueError(
                f"{name} is {values.dtype} {list(values.shape)}; the factors of a product are int8 matrices."
            )
    _check_device(left, right)
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"left is {list(left.shape)} and right {list(right.shape)}; the columns of left must match the rows of"
            " right."
        )
    (m, k), n = left.shape, right.shape[1]
    rows = max(1, MOST_CELLS // _round_up(max(k, n, 1), COLUMNS) // ROWS) * ROWS
    if 0 < m <= rows and 0 < k <= LONGEST and n:
        return _product(left, right).contiguous()
    total = torch.zeros(m, n, dtype=torch.int32, device=left.device)
    if n:
        for top in range(0, m, rows):
            for start in range(0, k, LONGEST):
                block = left[top : top + rows, start : start + LONGEST]
                total[top : top + rows] += _product(block, right[start : start + LONGEST])
    return total


def conv2d(
    left: Tensor,
    right: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    block_bytes: int = BLOCK_BYTES,
) -> Tensor:
    """Ordinary convolution of int8 operands, exact, as products of patches.

    The border is made of zeros, as everywhere in torch. Where a factor of code 0 is not 0, pad the
    codes before they are factored and give ``padding=(0, 0)``.

    Args:
        left: factored activations [N, C', H, W], group by group: channel g * terms + t belongs to group g.
        right: factored weights [O, C' / groups, KH, KW], its terms in the same order.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d, already pairs.
        block_bytes: about how much memory to use beside operands and result; less means more, smaller products.

    Returns:
        int32 [N, O, OH, OW], channels last in memory.

    Raises:
        ValueError: for operands that are not int8 images of matching shapes on one device.
    """
    for name, values in (("left", left), ("right", right)):
        if values.ndim != 4 or values.dtype != torch.int8:
            raise ValueError(
                f"{name} is {values.dtype} {list(values.shape)}; int8 with four dimensions is needed, [N, C', H, W]"
                " and [O, C' / groups, KH, KW]."
            )
    _check_device(left, right)
    outputs, terms, kernel = right.shape[0], right.shape[1], right.shape[2:]
    if left.shape[1] != terms * groups or outputs % groups:
        raise ValueError(
            f"left has {left.shape[1]} channels and right is {list(right.shape)} with groups = {groups}; right must be"
            " [O, C' / groups, KH, KW] with O a multiple of groups."
        )
    image = _padded_channels_last(left, padding)
    height, width = (
        (image.shape[1 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in (0, 1)
    )
    total = torch.zeros(left.shape[0], height, width, outputs, dtype=torch.int32, device=left.device)
    if total.numel() and right.numel():
        # Patches are never cut out before a block needs them: this is a view, six dimensions over one image.
        s = image.stride()
        patches = image.as_strided(
            (left.shape[0], height, width, *kernel, left.shape[1]),
            (s[0], s[1] * stride[0], s[2] * stride[1], s[1] * dilation[0], s[2] * dilation[1], s[3]),
        )
        # Tensor cores would multiply mostly padding here, and a depthwise layer is bound by memory anyway.
        narrow = groups > 1 and outputs // groups < COLUMNS // 2 and terms < COLUMNS
        (_sum_cells if narrow else _multiply_patches)(patches, right, groups, total, block_bytes)
    return total.permute(0, 3, 1, 2)


def _multiply_patches(patches: Tensor, right: Tensor, groups: int, total: Tensor, block_bytes: int) -> None:
    """total [N, OH, OW, O] from patches [N, OH, OW, KH, KW, C'], a block of output lines at a time."""
    images, height, width, outputs = total.shape
    terms, per_group = right.shape[1], outputs // groups
    # Kernel cells first, channels last: the order in which a patch lies in memory.
    weights = right.permute(0, 2, 3, 1).flatten(1).split(per_group)  # groups times [O / groups, KH KW terms]
    fan_in = weights[0].shape[1]
    bytes_a_pixel = 2 * _round_up(fan_in, COLUMNS) + 4 * _round_up(per_group, COLUMNS)  # patch, aligned patch, sums
    pixels = max(1, block_bytes // bytes_a_pixel)
    lines = max(1, min(height, pixels // width))  # an image too large for one block is cut between its lines
    at_once = max(1, pixels // (height * width))
    for first in range(0, images, at_once):
        for top in range(0, height, lines):
            here = slice(first, first + at_once), slice(top, top + lines)
            for g in range(groups):
                cells = patches[here][..., g * terms : (g + 1) * terms]
                sums = matmul(cells.reshape(-1, fan_in), weights[g].T)  # no copy yet for a 1 x 1 kernel
                total[here][..., g * per_group : (g + 1) * per_group] = sums.view(*cells.shape[:3], per_group)


def _sum_cells(patches: Tensor, right: Tensor, groups: int, total: Tensor, block_bytes: int) -> None:
    """The same for groups of few channels, as one multiplication and addition of images per kernel cell."""
    terms, outputs = right.shape[1], right.shape[0]
    weights = right.to(torch.int32).view(groups, outputs // groups, *right.shape[1:])
    total = total.view(*total.shape[:3], groups, outputs // groups)
    at_once = max(1, block_bytes // (4 * max(1, total[0].numel())))
    for first in range(0, len(total), at_once):
        block, sums = patches[first : first + at_once], total[first : first + at_once]
        for i in range(right.shape[2]):
            for j in range(right.shape[3]):
                for t in range(terms):
                    # int8 times int32 is int32 in torch; no float comes near it.
                    sums += block[:, :, :, i, j, t::terms, None] * weights[:, :, t, i, j]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """int32 [M, N] from [M, K] and [K, N], neither empty, by one call of torch._int_mm.

    The second operand goes as the transpose of a contiguous matrix: row-major it is not supported on
    every GPU (pytorch 169956), and slow where it is.
    """
    sums = torch._int_mm(_aligned(left, ROWS, COLUMNS), _aligned(right.T, COLUMNS, COLUMNS).T)
    return sums[: left.shape[0], : right.shape[1]]


def _aligned(values: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix itself if a kernel can take it, else a copy among zeros: multiples of ``rows`` x ``columns``."""
    shape = _round_up(values.shape[0], rows), _round_up(values.shape[1], columns)
    if tuple(values.shape) == shape and values.is_contiguous() and values.data_ptr() % ALIGNMENT == 0:
        return values
    found = torch.zeros(shape, dtype=values.dtype, device=values.device)
    found[: values.shape[0], : values.shape[1]] = values
    return found


def _padded_channels_last(values: Tensor, padding: tuple[int, int]) -> Tensor:
    """[N, C', H, W] to contiguous [N, H + 2 PH, W + 2 PW, C'], zeros around; no copy if none is needed."""
    values = values.permute(0, 2, 3, 1)
    if not any(padding):
        return values.contiguous()
    (n, h, w, c), (ph, pw) = values.shape, padding
    found = torch.zeros(n, h + 2 * ph, w + 2 * pw, c, dtype=values.dtype, device=values.device)
    found[:, ph : ph + h, pw : pw + w] = values
    return found


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_device(left: Tensor, right: Tensor) -> None:
    if left.device != right.device:
        raise ValueError(f"left is on {left.device} and right on {right.device}; move both to one device.")

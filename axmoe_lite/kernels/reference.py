"""The law: look every product up and add. Kept slow and obvious on purpose.

No path may differ from these two functions in a single bit. They share no code with the fast paths,
and take operands that :mod:`axmoe_lite.kernels` has checked.
"""

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, table: Tensor) -> Tensor:
    """out[m, n] = sum over k of table[a[m, k] + 128, b[k, n] + 128]; int8 [M, K], [K, N] to int32 [M, N]."""
    table = table.to(a.device)
    rows, columns = a.long() + 128, b.long() + 128
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for k in range(a.shape[1]):
        total += table[rows[:, k, None], columns[None, k, :]]
    return total


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
    """int8 [N, C, H, W] and [O, C / groups, KH, KW] to int32 [N, O, OH, OW], one kernel cell at a time."""
    table = table.to(x.device)
    per_group, (kh, kw) = weight.shape[1], weight.shape[2:]
    x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0])).long() + 128
    weight = weight.long() + 128
    height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    result = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=torch.int32, device=x.device)
    for o in range(weight.shape[0]):
        first = o // (weight.shape[0] // groups) * per_group  # the channels that output o may see
        for c in range(per_group):
            for i in range(kh):
                for j in range(kw):
                    top, left = i * dilation[0], j * dilation[1]
                    seen = x[:, first + c, top :: stride[0], left :: stride[1]][:, :height, :width]
                    result[:, o] += table[seen, weight[o, c, i, j]]
    return result

"""The naive simulator: index the table with everything against everything, and sum.

This is how a first version is usually written, in any array library: correct, short, and three hundred times
slower than float32. It shares no code with the fast paths.

Chapter: 06, "Faster than float32?"
"""

import torch
from torch import Tensor, nn

from axmoe_lite import quant
from axmoe_lite.layers import ApproxConv2d, ApproxLinear, ApproxMatmul

CHUNK = 1 << 22  # products whose indices are in memory at a time


def gather_matmul(a: Tensor, b: Tensor, table: Tensor) -> Tensor:
    """out[m, n] = sum over k of table[a[m, k] + 128, b[k, n] + 128], by broadcasting.

    Args:
        a: int8 [M, K].
        b: int8 [K, N].
        table: int32 [256, 256].

    Returns:
        int32 [M, N].

    >>> from axmoe_lite import multiplier
    >>> a, b = torch.tensor([[3, 7]]), torch.tensor([[5], [2]])
    >>> gather_matmul(a, b, multiplier("mul8s_1L2J").table)  # 2*4 + 6*2
    tensor([[20]], dtype=torch.int32)
    """
    rows, columns = a.long() + 128, b.long() + 128
    step = max(1, CHUNK // max(1, b.numel()))
    sums = [table[some[:, :, None], columns[None]].sum(1) for some in rows.split(step)]
    return torch.cat(sums).int()


class GatherLayer(nn.Module):
    """An approximate layer computed by :func:`gather_matmul`; the same bits as the layer it is made from.

    Args:
        layer: a calibrated ApproxConv2d (of one group, zero padding), ApproxLinear or ApproxMatmul.
    """

    def __init__(self, layer: ApproxConv2d | ApproxLinear | ApproxMatmul) -> None:
        super().__init__()
        self.layer, self.table = layer, layer.multiplier.table
        if not isinstance(layer, ApproxMatmul):
            weight = layer.weight.detach()
            scale_w = quant.weight_scale(weight, per_channel=layer.per_channel).expand(len(weight))
            self.codes = quant.quantise(weight.flatten(1), scale_w[:, None]).T
            self.scale = layer.scale_x * scale_w

    def forward(self, *inputs: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, ApproxMatmul):
            a, b = (quant.quantise(x, getattr(layer, s)) for x, s in zip(inputs, layer.SCALES, strict=True))
            pairs = zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)
            sums = torch.stack([gather_matmul(x, y, self.table) for x, y in pairs]).unflatten(0, a.shape[:-2])
            return sums.float() * (layer.scale_a * layer.scale_b)
        codes = quant.quantise(inputs[0], layer.scale_x)
        if isinstance(layer, ApproxLinear):
            sums = gather_matmul(codes.flatten(0, -2), self.codes, self.table).unflatten(0, codes.shape[:-1])
            return self._scaled(sums)
        patches = nn.functional.unfold(
            codes.float(), layer.kernel_size, layer.dilation, layer.code_padding, layer.stride
        ).mT  # [N, positions, fan-in]
        sums = gather_matmul(patches.flatten(0, 1).to(torch.int8), self.codes, self.table)
        y = self._scaled(sums).unflatten(0, patches.shape[:2]).mT
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        high = (inputs[0].shape[2] + 2 * layer.code_padding[0] - reach[0] - 1) // layer.stride[0] + 1
        return y.unflatten(2, (high, -1))

    def _scaled(self, sums: Tensor) -> Tensor:
        y = sums.float() * self.scale
        return y if self.layer.bias is None else y + self.layer.bias

"""Exact 3x3 convolutions over few positions, as matrix products: for training deep networks on a CPU in bfloat16.

A library lays the weights of a convolution out anew at each call. That is nothing beside the convolution itself where
an image still has many pixels. VGG's last eight layers have 16 or 4, and there that takes most of the time; as matrix
products, in the layout the weights have already, they trained several times faster when tried by hand on a Xeon.

    with small_convolutions(network):      for a training loop; elsewhere the network is as it was
    gradients(grad, x, weight)             of one convolution, when a layer's backward pass asks

Both round each sum to bfloat16 once, as the library does. Letters: N images, C channels in, O out, H x W pixels.

Chapter: 08, "Can a network learn its new arithmetic?"
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_POSITIONS = 2048  # N x H x W; with more, the library was as fast or faster when tried by hand
FEWEST_WEIGHTS = 256 * 512 * 9
AT_ONCE = 512  # positions of one product, whose patches then stay in the cache


def suits(x: Tensor, weight: Tensor, *, stride: object, padding: object, dilation: object, groups: int) -> bool:
    """Whether a convolution is one of those that are faster as matrix products."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.bfloat16
        and tuple(weight.shape[2:]) == (3, 3)
        and tuple(stride) == tuple(padding) == tuple(dilation) == (1, 1)
        and groups == 1
        and x.numel() // x.shape[1] <= MOST_POSITIONS
        and weight.numel() >= FEWEST_WEIGHTS
    )


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, C, H, W] by weight [O, C, 3, 3], padded by 1: [N, O, H, W] in channels_last; both bfloat16."""
    (N, C, H, W), matrix = x.shape, weight.permute(2, 3, 1, 0).reshape(9 * weight.shape[1], -1)
    rows = [
        torch.cat([part.reshape(-1, C) for part in _parts(some)], dim=1) @ matrix
        for some in x.split(max(1, AT_ONCE // (H * W)))
    ]
    return torch.cat(rows).view(N, H, W, -1).permute(0, 3, 1, 2)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
    """Of the loss by x and by weight, where grad [N, O, H, W] is that by the convolution's result.

    Args:
        wanted: which of the two to compute; the other is None.
    """
    C = weight.shape[1]
    grad_x = convolution(grad, weight.flip(2, 3).transpose(0, 1)) if wanted[0] else None
    if not wanted[1]:
        return grad_x, None
    rows = grad.permute(1, 0, 2, 3).flatten(1)
    parts = [rows @ part.reshape(-1, C) for part in _parts(x)]
    return grad_x, torch.stack(parts, dim=1).unflatten(1, (3, 3)).permute(0, 3, 1, 2)


def _parts(x: Tensor) -> Iterator[Tensor]:
    """What each of the nine weights of a kernel meets: [N, H, W, C], row by row of the kernel."""
    H, W = x.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return (padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolution(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gradients(grad, *ctx.saved_tensors, ctx.needs_input_grad)


@contextmanager
def small_convolutions(network: nn.Module) -> Iterator[None]:
    """Within the block, convolutions that :func:`suits` are matrix products, in mixed precision on a CPU."""
    layers = [module for module in network.modules() if type(module) is nn.Conv2d and module.padding_mode == "zeros"]

    def product(layer: nn.Conv2d) -> Callable:
        usual = layer._conv_forward  # what nn.Conv2d.forward calls
        how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}

        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            seen = x.bfloat16() if torch.is_autocast_enabled("cpu") else x
            if isinstance(layer.padding, str) or not suits(seen, weight, **how):
                return usual(x, weight, bias)
            y = _Convolution.apply(seen, weight.bfloat16())
            return y if bias is None else y + bias.bfloat16().view(-1, 1, 1)

        return forward

    for layer in layers:
        layer._conv_forward = product(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer._conv_forward

"""A layer's product with everything about its weights computed once: factored, masked, laid out, scaled.

    y = float32(sum over the fan-in of M(code of x, weight)) * scale[o] + bias[o]          (1)

each step rounded to float32, scale[o] being float32(s_x * s_w[o]). On int8 units quantising and factorising
is one pass over x, and the sum, the scaling and the bias are one operation; elsewhere (1) is computed as
written. The bits are the same.

Chapter: 06, "Faster than float32?"
"""

import numpy as np
import torch
from torch import Tensor

from axmoe_lite import kernels
from axmoe_lite.kernels import factored, int8
from axmoe_lite.kernels.encode import codes_of, encode_unsigned
from axmoe_lite.multipliers import Mosaic, Multiplier


class _Product:
    """What convolutions and linear layers share.

    Args:
        weight: int8 codes, [O, c, KH, KW] or [O, C].
        scale_w: float32 [O] or [], what one step of a weight's code means.
        scale_x: the same for activations; positive.
        bias: float32 [O] or None.
    """

    def __init__(
        self,
        weight: Tensor,
        multiplier: Multiplier | Mosaic,
        *,
        scale_w: Tensor,
        scale_x: Tensor | float,
        bias: Tensor | None,
    ) -> None:
        self.weight, self.multiplier, self.bias = weight, multiplier, bias
        self.scale_w, self.scale_x = scale_w.view(-1, *[1] * (weight.ndim - 1)), float(scale_x)
        self.scale = (scale_w * self.scale_x).expand(len(weight)).contiguous()
        self.inverse_scale = float(np.float32(1) / np.float32(self.scale_x))
        self.factors = factored.factors_of(multiplier, channels=weight.shape[1])
        fan_in = weight[0].numel()
        # Ranks that a lookup beats go there; see kernels.crossover_rank.
        path = kernels._choose("auto", multiplier, fan_in, fan_in, weight.device)
        on_cpu = weight.device.type == "cpu"
        self.bytewise = path == "factored" and on_cpu and factored.units(self.factors, fan_in, weight.device)
        self._packed: dict[int, int8.PackedConv2d | int8.PackedLinear | None] = {}

    def _check_channels(self, x: Tensor, n: int, axis: int) -> None:
        if x.shape[axis] != n:
            inputs = "[N, C, H, W]" if axis == 1 else "[..., C]"
            raise ValueError(f"This layer takes {n} channels, C of {inputs}; it was given {list(x.shape)}.")

    def units(self, offset: int) -> int8.PackedConv2d | int8.PackedLinear | None:
        """The weights as the units want them for images with this zero point, or None if they cannot."""
        if offset not in self._packed:
            terms = factored.second_operands(self.multiplier.columns(self.weight), self.factors)
            self._packed[offset] = self._pack(terms, offset) if int8.fits(terms, offset) else None
        return self._packed[offset]

    @property
    def scale_of_terms(self) -> Tensor:
        """What a sum of the factors' products means; a power of two more or less rounds nothing."""
        return self.scale * 2.0**self.factors.shift

    def _rescaled(self, sums: Tensor, *, axis: int) -> Tensor:
        shape = [-1] + [1] * (sums.ndim - 1 - axis % sums.ndim)
        # Every path hands out the same layout: what follows a layer may add up in an order that depends on it.
        layout = torch.channels_last if sums.ndim == 4 else torch.preserve_format
        y = sums.to(torch.float32, memory_format=layout).mul_(self.scale.view(shape))
        return y if self.bias is None else y.add_(self.bias.view(shape))


class ConvProduct(_Product):
    """Law (1) for convolutions: float32 [N, C, H, W] to [N, O, OH, OW].

    Takes what :class:`_Product` takes, and ``stride``, ``padding``, ``dilation`` (pairs) and ``groups``.

    >>> import torch
    >>> from axmoe_lite import multiplier
    >>> weight = torch.full((1, 1, 1, 1), 5, dtype=torch.int8)
    >>> product = ConvProduct(weight, multiplier("mul8s_1L2J"), scale_w=torch.tensor(0.5), scale_x=0.25, bias=None)
    >>> product(torch.full((1, 1, 1, 1), 1.75)).item()  # M(7, 5) = 6 * 4, times 0.125
    3.0
    """

    def __init__(
        self,
        weight: Tensor,
        multiplier: Multiplier | Mosaic,
        *,
        scale_w: Tensor,
        scale_x: Tensor | float,
        bias: Tensor | None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(weight, multiplier, scale_w=scale_w, scale_x=scale_x, bias=bias)
        self.options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        self.by_hand, left = factored.border(padding, self.factors)
        self.options_of_units = {**self.options, "padding": left}

    def _pack(self, terms: Tensor, offset: int) -> int8.PackedConv2d:
        return int8.PackedConv2d(terms, self.scale_of_terms, self.bias, offset, **self.options_of_units)

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.options["groups"]

    def __call__(self, x: Tensor) -> Tensor:
        self._check_channels(x, self.in_channels, 1)
        if self.bytewise and x.numel():
            image = factored.padded(x.float(), self.by_hand)
            rows, groups = image.permute(0, 2, 3, 1), self.options["groups"]
            image, offset = encode_unsigned(rows, self.factors, inverse_scale=self.inverse_scale, groups=groups)
            if (units := self.units(offset)) is not None:
                return units(image.permute(0, 3, 1, 2))
        codes = codes_of(x, self.inverse_scale)
        return self._rescaled(kernels.conv2d(codes, self.weight, self.multiplier, **self.options), axis=1)


class LinearProduct(_Product):
    """Law (1) for linear layers: float32 [..., C] to [..., O]. Takes what :class:`_Product` takes."""

    def _pack(self, terms: Tensor, offset: int) -> int8.PackedLinear:
        return int8.PackedLinear(terms, self.scale_of_terms, self.bias, offset)

    def __call__(self, x: Tensor) -> Tensor:
        self._check_channels(x, self.weight.shape[1], -1)
        if self.bytewise and x.numel():
            rows, offset = encode_unsigned(x.float(), self.factors, inverse_scale=self.inverse_scale)
            if (units := self.units(offset)) is not None:
                return units(rows)
        codes = codes_of(x, self.inverse_scale)
        sums = kernels.matmul(codes.flatten(0, -2), self.weight.T, self.multiplier)
        return self._rescaled(sums, axis=-1).unflatten(0, x.shape[:-1])

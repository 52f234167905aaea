"""The layers themselves: a convolution, a linear layer, and a product of two activations.

Chapter: 04, "What happens inside one layer?"
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from axmoe_lite import quant
from axmoe_lite.kernels.products import ConvProduct, LinearProduct
from axmoe_lite.layers import gradients
from axmoe_lite.multipliers import Mosaic, Multiplier


class Matmul(nn.Module):
    """a [..., M, K] times b [..., K, N]: a product of two activations, as a module so that it has a name.

    Attention written with it (Q K^T as one, the weighted sum of values as another) can be approximated like any layer.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Approximate(nn.Module):
    """What the layers share: the exact layer they stand for, a multiplier, and scales to be calibrated."""

    SCALES: tuple[str, ...] = ("scale_x",)  # one for each input: the name of its buffer

    def __init__(self, exact: nn.Module, multiplier: Multiplier | Mosaic, per_channel: bool, gradient: str) -> None:
        super().__init__()
        self.multiplier, self.per_channel, self.gradient = multiplier, per_channel, gradient
        device = next((p.device for p in exact.parameters()), None)
        for scale in self.SCALES:
            self.register_buffer(scale, torch.full((), torch.nan, device=device))
        self.histograms: list[quant.Histogram] | None = None  # set while calibrating: the layer is then exact
        object.__setattr__(self, "exact", exact)  # hidden from torch: its parameters are ours, once
        self.train(exact.training)

    def hand_over(self) -> None:
        """Give the exact layer what of it may have changed."""

    @property
    def calibrated(self) -> bool:
        return all(math.isfinite(getattr(self, scale)) for scale in self.SCALES)

    def _check_calibrated(self) -> None:
        if not self.calibrated:
            raise ValueError(
                "This layer has no activation scale yet; pass calibration images to approximate(), or load a"
                " checkpoint of a calibrated network."
            )

    def _called(self, *inputs: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            from axmoe_lite.layers.uncompiled import compute

            return compute[type(self)](self, *inputs)
        return self._observe(*inputs) if self.histograms is not None else self.compute(*inputs)

    def _observe(self, *inputs: Tensor) -> Tensor:
        for histogram, x in zip(self.histograms, inputs, strict=True):
            histogram.update(x)
        return self.exact.forward(*inputs)  # hooks are this layer's; it called them


class _Kept:
    """A product and what it was computed from. A copied layer starts with none: the units' memory cannot be copied."""

    def __init__(self) -> None:
        self.made_from: tuple = ()
        self.product: Any = None

    def __deepcopy__(self, memo: dict) -> "_Kept":
        return _Kept()

    def __reduce__(self) -> tuple:
        return _Kept, ()


class _Weighted(Approximate):
    """A layer with weights, of which it shares the exact layer's."""

    def __init__(
        self,
        exact: nn.Module,
        multiplier: Multiplier | Mosaic,
        *,
        per_channel: bool = False,
        gradient: str = "straight-through",
    ) -> None:
        super().__init__(exact, multiplier, per_channel, gradient)
        self.weight, self.bias = exact.weight, exact.bias
        self._kept = _Kept()
        object.__setattr__(self, "corrected", None)  # the bias that correct_bias() gave it; hidden, it is a parameter

    def hand_over(self) -> None:
        """Others may have been put in the place of the parameters. A corrected bias is this layer's own."""
        self.exact.weight = self.weight
        if self.bias is not self.corrected:
            self.exact.bias = self.bias
        elif self.exact.bias is not None and self.exact.bias.data.to(self.weight) is not self.exact.bias.data:
            # network.double() and .to(device) reach the parameters that torch sees, and this one is hidden.
            self.exact.bias.data, self.exact.bias.grad = self.exact.bias.data.to(self.weight), None

    def product(self) -> ConvProduct | LinearProduct:
        """The layer's product by law (1), made anew only when weight, bias, scale or multiplier have changed.

        The weights are compared value by value: a version counter would miss what is written through
        ``.data``. In training mode they change at every step, and nothing is kept.
        """
        sources = [t for t in (self.weight, self.bias, self.scale_x) if t is not None]
        kept, settings = self._kept, (self.multiplier, self.per_channel)
        if not self.training and kept.product is not None and kept.made_from[0] == settings:
            pairs = zip(kept.made_from[1], sources, strict=True)
            if all(a.device == b.device and torch.equal(a, b) for a, b in pairs):
                return kept.product
        self._check_calibrated()
        with torch.no_grad():
            scale_w = quant.weight_scale(self.weight, per_channel=self.per_channel)
            for part, held in (("weights", scale_w), ("biases", self.bias)):  # a scale holds the largest weight
                if held is not None and not bool(held.isfinite().all()):
                    raise FloatingPointError(
                        f"Among the {part} of this layer, {self.extra_repr()}, some are NaN or infinite: training has"
                        " diverged (lower lr), or the file they came from is damaged."
                    )
            spread = scale_w.view(-1, *[1] * (self.weight.ndim - 1)) if self.per_channel else scale_w
            codes = quant.quantise(self.weight, spread)
            bias = None if self.bias is None else self.bias.float()
            product = self._make(codes, scale_w, bias)
        if self.training:
            kept.product = None
        else:
            kept.product, kept.made_from = product, (settings, [t.detach().clone() for t in sources])
        return product


class ApproxConv2d(_Weighted):
    """A convolution whose products come from a multiplier; x [N, C, H, W] to y [N, O, OH, OW] by law (1).

    Made by :func:`~axmoe_lite.layers.approximate` from an ``nn.Conv2d``, whose parameters it shares. The
    image is the first operand of the multiplier, the weight the second. Padding with zeros becomes padding
    with code 0, which goes through the table too.
    """

    def __init__(self, exact: nn.Conv2d, multiplier: Multiplier | Mosaic, **options: Any) -> None:
        super().__init__(exact, multiplier, **options)
        self.in_channels, self.out_channels = exact.in_channels, exact.out_channels
        self.kernel_size, self.stride, self.padding = exact.kernel_size, exact.stride, exact.padding
        self.dilation, self.groups, self.padding_mode = exact.dilation, exact.groups, exact.padding_mode
        plain = exact.padding_mode == "zeros" and not isinstance(exact.padding, str)
        # Padding that the kernel cannot do itself ("same", reflect, ...) is done on the image before.
        self.image_padding = None if plain else tuple(exact._reversed_padding_repeated_twice)
        self.code_padding = tuple(exact.padding) if plain else (0, 0)

    def _make(self, codes: Tensor, scale_w: Tensor, bias: Tensor | None) -> ConvProduct:
        options = {
            "stride": self.stride,
            "padding": self.code_padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }
        return ConvProduct(codes, self.multiplier, scale_w=scale_w, scale_x=self.scale_x, bias=bias, **options)

    def forward(self, input: Tensor) -> Tensor:  # torch's name, by which some networks call it
        return self._called(input)

    def compute(self, x: Tensor) -> Tensor:
        if self.image_padding is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = nn.functional.pad(x, self.image_padding, mode=mode)
        if x.ndim == 3:  # one image without a batch, as nn.Conv2d takes it
            return gradients.Convolution.apply(x[None], self.weight, self.bias, self)[0]
        return gradients.Convolution.apply(x, self.weight, self.bias, self)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {self.multiplier.name}"


class ApproxLinear(_Weighted):
    """A linear layer whose products come from a multiplier; x [..., C] to y [..., O] by law (1)."""

    def __init__(self, exact: nn.Linear, multiplier: Multiplier | Mosaic, **options: Any) -> None:
        super().__init__(exact, multiplier, **options)
        self.in_features, self.out_features = exact.in_features, exact.out_features

    def _make(self, codes: Tensor, scale_w: Tensor, bias: Tensor | None) -> LinearProduct:
        return LinearProduct(codes, self.multiplier, scale_w=scale_w, scale_x=self.scale_x, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return self._called(input)

    def compute(self, x: Tensor) -> Tensor:
        y = gradients.Linear.apply(x[None] if x.ndim == 1 else x, self.weight, self.bias, self)
        return y[0] if x.ndim == 1 else y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.multiplier.name}"


class ApproxMatmul(Approximate):
    """A product of two activations by a multiplier: a [..., M, K], b [..., K, N] to [..., M, N].

    Batch dimensions are broadcast as torch's own product does.
    Both operands are quantised, each on its own calibrated range; law (1) with s = s_a * s_b and no bias.
    """

    SCALES = ("scale_a", "scale_b")

    def __init__(
        self,
        exact: Matmul,
        multiplier: Multiplier | Mosaic,
        *,
        per_channel: bool = False,
        gradient: str = "straight-through",
    ) -> None:
        super().__init__(exact, multiplier, per_channel, gradient)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self._called(a, b)

    def compute(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_calibrated()
        return gradients.Activations.apply(*spread(a, b), self)

    def extra_repr(self) -> str:
        return self.multiplier.name


def spread(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the batch dimensions that ``a @ b`` gives them; autograd sums over what was spread.

    Raises:
        ValueError: for batch dimensions that do not go together.
    """
    if a.shape[:-2] == b.shape[:-2] or min(a.ndim, b.ndim) < 2:
        return a, b
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"a is {list(a.shape)} and b {list(b.shape)}; dimensions before the last two must be the same in both, or"
            " 1 in one of them."
        ) from None
    return a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])


def first_input(args: tuple, named: dict[str, Any]) -> Any:
    """What a layer was given first, whether by place or by name; a hook ``with_kwargs=True`` is told both."""
    return next(iter((*args, *named.values())))


KINDS: dict[type[nn.Module], type[Approximate]] = {
    nn.Conv2d: ApproxConv2d,
    nn.Linear: ApproxLinear,
    Matmul: ApproxMatmul,
}

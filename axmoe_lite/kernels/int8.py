"""int8 units on the CPU: exact sums of products of bytes, by oneDNN and ``torch._int_mm``.

A first operand is stored as unsigned bytes: the code itself where codes are never negative, else code + 128
with zero point 128. The units add int32, and hand out

    y = float32(sum) * scale[o] + bias[o]                                              (1)

each step rounded to float32. Two habits of oneDNN's are avoided so that (1) holds to the last bit on every
processor. Told both operands' scales it multiplies by them in an order that depends on the processor: it is
told that the activation's is 1. And tile units (AMX) take the zero point off only after rounding the sum to
float32: signed activations go there only while no such sum can exceed 2^24 (:func:`fits`).

Not every processor sums bytes without saturating, so the units are tried once against the law
(:func:`available`), and left alone, with one warning, where they differ.

Chapter: 06, "Faster than float32?"
"""

import functools
import os
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# Tests and doubters switch the units off with AXMOE_INT8=0.
SWITCH = "AXMOE_INT8"


def available() -> bool:
    """Whether this processor's int8 units may be used: present, not switched off, and true to the law."""
    return os.environ.get(SWITCH, "1") != "0" and _agree_with_the_law()


@functools.cache
def _agree_with_the_law() -> bool:
    ops = torch.ops.onednn
    if not (hasattr(ops, "qconv2d_pointwise") and hasattr(ops, "qlinear_pointwise") and hasattr(torch, "_int_mm")):
        return False
    try:
        wrong = _disagreement()
    except (RuntimeError, NotImplementedError) as reason:  # torch built without oneDNN, or another processor
        wrong = f"they refuse to run ({str(reason).splitlines()[0][:100]})"
    if wrong:
        warnings.warn(
            f"The int8 units of this processor are not used: {wrong}. float32 takes their place; results are the"
            " same, slower.",
            stacklevel=2,
        )
    return not wrong


def _disagreement() -> str:
    """What the units get wrong, in words, or nothing. The operands are those on which weaker units saturate."""
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    for fan_in, out, offset in ((1, 1, 128), (2, 3, 128), (64, 16, 128), (150, 5, 128), (500, 33, 128), (1040, 33, 0)):
        draw = torch.randint(-128, 128, (37, fan_in), generator=generator).to(torch.int8)
        a = torch.cat([draw, extremes[:, None].expand(2, fan_in)])
        b = torch.randint(-128, 128, (fan_in, out), generator=generator).to(torch.int8)
        b[:, 0] = -128
        b[:, out // 2] = 127
        law = a.double() @ b.double()
        if not all(torch.equal(matmul(a, right).double(), law) for right in (b, b.T.contiguous().T)):
            return f"a product of fan-in {fan_in} differs from the law"
        a = a.clamp_min(-offset)
        law = a.double() @ b.double()
        scale, bias = torch.rand(out, generator=generator), torch.randn(out, generator=generator)
        y = law.float() * scale + bias
        codes = (a.int() + offset).to(torch.uint8)
        linear = PackedLinear(b.T.contiguous(), scale, bias, offset=offset)
        image = codes[None, None].permute(0, 3, 1, 2)  # [1, C, 1, W], channels last
        packed = PackedConv2d(b.T.reshape(out, fan_in, 1, 1), scale, bias, offset=offset)
        if not torch.equal(linear(codes), y) or not torch.equal(packed(image)[0, :, 0].T, y):
            return f"a scaled sum of fan-in {fan_in} differs from the law"
    return ""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int8 [M, K] x [K, N] to int32 [M, N]; sums must fit 32 bits."""
    if 1 in (*a.shape, *b.shape) or 0 in (*a.stride(), *b.stride()):
        # torch 2.13 reads the layout off the strides, which say nothing along an axis of one or an expanded one,
        # and leaves such results unwritten. float64 holds these sums too.
        return (a.double() @ b.double()).to(torch.int32)
    return torch._int_mm(a, b)


def fits(weight: Tensor, offset: int) -> bool:
    """Whether (1) is exact for these weights, int8 [O, ...], whatever the images with this zero point.

    Without a zero point always; with it, if the sum of code + 128, at most 255, stays within 2^24.
    """
    return offset == 0 or 255 * int(weight.int().abs().flatten(1).sum(1).max()) <= 2**24


@dataclass(eq=False)
class PackedConv2d:
    """The weight side of a convolution, laid out once as the units want it.

    Attributes:
        weight: int8 [O, c, KH, KW], c the (factored) channels of one group.
        scale, bias: float32 [O] of (1); bias may be None.
        offset: the zero point of the images it will see, 0 or 128.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    offset: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    _packed: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)
    _bare: "PackedConv2d | None" = field(default=None, repr=False)

    def __call__(
        self,
        x: Tensor,
        *,
        add_to: Tensor | None = None,
        ceiling: float | None = None,
        code_scale: float | None = None,
    ) -> Tensor:
        """uint8 [N, C, H, W], channels last, to float32 [N, O, OH, OW] by (1).

        Args:
            add_to: float32 of the result's shape, channels last, which receives the result on top of what it
                holds: y + x, rounded to float32. No finite ceiling then.
            ceiling: results are cut to 0..ceiling (after the addition); infinity is a ReLU.
            code_scale: hand out codes of the cut results, round(y * float32(1 / code_scale)) in 0..127, as uint8.
        """
        if self._errs(x.shape):
            y = self._by_a_detour(x, ceiling=None if add_to is not None else ceiling, code_scale=code_scale)
            if add_to is None:
                return y
            return add_to.add_(y) if ceiling is None else add_to.add_(y).relu_()
        options = [list(pair) for pair in (self.stride, self.padding, self.dilation)]
        where = (self._pack(x.shape), self.scale, self._zero_points)
        conv = torch.ops.onednn.qconv2d_pointwise
        if add_to is not None:
            assert ceiling in (None, torch.inf) and code_scale is None
            after = ("sum", 1.0, None if ceiling is None else "relu", [], "")
            result = (1.0, 0, torch.float32, 1.0, 0)
            return conv.binary(x, 1.0, self.offset, *where, add_to, self.bias, *options, self.groups, *result, *after)
        result, after = (1.0, 0, torch.float32), ("none", [], "")
        if code_scale is not None:
            # Cut at code 127 before rounding: the units would cut at 255.
            result, after = (code_scale, 0, torch.uint8), ("hardtanh", [0.0, min(127.0 * code_scale, ceiling)], "")
        elif ceiling is not None:
            after = ("relu", [], "") if ceiling == torch.inf else ("hardtanh", [0.0, ceiling], "")
        return conv(x, 1.0, self.offset, *where, self.bias, *options, self.groups, *result, *after)

    def _errs(self, shape: torch.Size) -> bool:
        """Shapes on which torch 2.13's units err, or crash: found by trying thousands.

        Those are results of one column, and windows of which hardly a cell lies in the image.
        """
        if self.result_shape(shape)[3] == 1:
            return True
        options = zip(shape[2:], self.padding, self.dilation, self.weight.shape[2:], strict=True)
        return any(p and (2 * p > d * (k - 1) or side <= d * (k - 1)) for side, p, d, k in options)

    def _by_a_detour(self, x: Tensor, **after: float | None) -> Tensor:
        """The same with the border made by hand, and with more columns than wanted."""
        width = self.result_shape(x.shape)[3]
        below, right = self.padding[0], self.padding[1] + (self.stride[1] if width == 1 else 0)
        rows = torch.nn.functional.pad(
            x.permute(0, 2, 3, 1), (0, 0, self.padding[1], right, self.padding[0], below), value=self.offset
        )
        if self._bare is None:
            self._bare = replace(self, padding=(0, 0), _packed={}, _bare=None)
        y = self._bare(rows.contiguous().permute(0, 3, 1, 2), **after)[..., :width]
        return y.contiguous(memory_format=torch.channels_last)

    def result_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """[N, O, OH, OW] for images of this shape."""
        sides = []
        for axis in range(2):
            reach = self.dilation[axis] * (self.weight.shape[2 + axis] - 1) + 1
            sides.append((shape[2 + axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1)
        return (shape[0], len(self.weight), *sides)

    @functools.cached_property
    def _zero_points(self) -> Tensor:
        return torch.zeros(len(self.weight), dtype=torch.int)

    def _pack(self, shape: torch.Size) -> Tensor:
        key = tuple(shape)
        if (found := self._packed.get(key)) is None:
            options = [list(pair) for pair in (self.stride, self.padding, self.dilation)]
            found = torch.ops.onednn.qconv_prepack(
                self.weight, self.scale, 1.0, self.offset, *options, self.groups, list(shape)
            )
            for old in list(self._packed)[:-3]:  # a new image size each time must not fill the memory
                self._packed.pop(old, None)  # which another thread may have done
            self._packed[key] = found
        return found


@dataclass(eq=False)
class PackedLinear:
    """The weight side of a linear layer: int8 [O, C], with scale and bias [O] as in :class:`PackedConv2d`."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    offset: int

    def __post_init__(self) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        self._zero_points = torch.zeros(len(self.weight), dtype=torch.int)

    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """uint8 [..., C] to float32 [..., O] by (1)."""
        return torch.ops.onednn.qlinear_pointwise(
            x,
            1.0,
            self.offset,
            self._packed,
            self.scale,
            self._zero_points,
            self.bias,
            1.0,
            0,
            torch.float32,
            "relu" if relu else "none",
            [],
            "",
        )

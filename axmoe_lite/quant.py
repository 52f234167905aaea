"""From floats to bytes and back: symmetric 8-bit quantisation, and how to choose the range.

A float x becomes the code round(x / s) in -127..127, and a code means code * s. The scale is
s = amax / 127, where amax is the largest magnitude that is still represented. For weights amax is the
largest weight; for activations it is read off calibration batches (:class:`Histogram`).

Rounding is half to even, and x is multiplied by float32(1 / s) rather than divided by s: that is the
order in which integer pipelines do it, and the two differ in rare bits.

Chapter: 03, "How do floats become bytes?"
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from axmoe_lite.kernels.encode import LIMIT, codes_of

METHODS = ("percentile", "mse", "max")


def quantise(x: Tensor, scale: Tensor | float) -> Tensor:
    """Codes of ``x``: int8, same shape, in -127..127.

    Args:
        x: floats of any shape.
        scale: positive, one number or a tensor that broadcasts against x (one scale per channel).

    NaN has no code and becomes 0; it is not looked for here, for speed. Calibration refuses it, and so do weights.

    Raises:
        ValueError: for a scale that is not positive and finite.

    >>> quantise(torch.tensor([0.24, -9.0, 0.06]), 0.1)
    tensor([  2, -90,   1], dtype=torch.int8)
    """
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if bool((bad := ~((scale > 0) & (scale < torch.inf))).any()):
        raise ValueError(f"quantise() was given a scale of {scale[bad][0].item()}; it is positive and finite.")
    if scale.numel() == 1:
        return codes_of(x, float(1.0 / scale))
    return (x.float() * (1.0 / scale)).nan_to_num_(nan=0.0).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)


def dequantise(codes: Tensor, scale: Tensor | float) -> Tensor:
    """What the codes mean: float32, same shape."""
    return codes.float() * torch.as_tensor(scale, dtype=torch.float32, device=codes.device)


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(within(x, scale))
        return dequantise(quantise(x, scale), scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None


def fake_quantise(x: Tensor, scale: Tensor | float) -> Tensor:
    """Round to the grid of codes and stay in floats; the gradient passes straight through.

    Where x was clipped the gradient is 0 (the straight-through estimator of Bengio et al., 2013).

    >>> x = torch.tensor([0.26, 20.0], requires_grad=True)
    >>> fake_quantise(x, 0.1).sum().backward()
    >>> x.grad
    tensor([1., 0.])
    """
    return _FakeQuantise.apply(x, torch.as_tensor(scale, dtype=torch.float32, device=x.device))


def within(x: Tensor, scale: Tensor) -> Tensor:
    """Where x is represented without clipping: bool, same shape."""
    return x.abs() <= scale * (LIMIT + 0.5)


def weight_scale(weight: Tensor, *, per_channel: bool = False) -> Tensor:
    """The scale that just holds the largest weight; never 0.

    Args:
        weight: [O, ...].
        per_channel: one scale for each of the O outputs instead of one for all.

    Returns:
        float32, [] or [O].
    """
    size = weight.detach().float().abs()
    amax = size.flatten(1).amax(1) if per_channel else size.amax()
    return _scale(amax)


def _scale(amax: Tensor) -> Tensor:
    return amax.float().clamp_min(torch.finfo(torch.float32).tiny * LIMIT) / LIMIT


class Histogram:
    """How large the activations of a layer are: a histogram of |x| that grows with what it sees.

    The range doubles by merging neighbouring bins, so any number of batches costs the same memory, and
    the result does not depend on how they were cut.

    >>> seen = Histogram()
    >>> seen.update(torch.linspace(-1, 1, 10_001))
    >>> round(float(seen.scale("max")) * 127, 3)
    1.0
    """

    BINS = 8192
    LEAST = 2.0**-100  # of the range: float32 holds BINS / LEAST

    def __init__(self, name: str = "this layer") -> None:
        self.name = name  # for errors
        self.counts = torch.zeros(self.BINS, dtype=torch.float64)
        self.top = 0.0  # upper edge of the last bin: a power of two above all values, so that each lies in its own bin
        self.largest = 0.0

    def update(self, x: Tensor) -> None:
        """Count the values of a batch.

        Raises:
            ValueError: for an empty batch, or values that are NaN or infinite.
        """
        if x.numel() == 0:
            raise ValueError(f"Calibration of {self.name!r} met an empty batch; give at least one image.")
        size = x.detach().float().abs()
        # In the order of memory: the counts do not depend on it, and a copy in the order of the axes takes longest.
        size = size.permute(sorted(range(size.dim()), key=size.stride, reverse=True)).flatten()
        largest = float(size.max())
        if not largest < float("inf"):
            bad = int((~torch.isfinite(size)).sum())
            raise ValueError(
                f"Calibration of {self.name!r} met {bad} activations (of {size.numel()}) that are NaN or infinite;"
                " check the images and the weights before it."
            )
        self.largest = max(self.largest, largest)
        if largest > 0 and self.top == 0:
            self.top = max(2.0 ** math.frexp(largest)[1], self.LEAST)
        while 0 < self.top <= largest:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.top *= 2
        bins = size.mul_(self.BINS / self.top if self.top else 0).clamp_max_(self.BINS - 1).int()
        self.counts += torch.bincount(bins, minlength=self.BINS).double().cpu()

    def scale(self, method: str = "percentile", *, percentile: float = 99.99) -> Tensor:
        """The scale that the chosen method proposes for what was seen: float32 [].

        Args:
            method: ``"percentile"`` (of |x|, AxMoE's usual choice: not from the paper), ``"mse"`` (least
                squared quantisation error) or ``"max"`` (nothing is clipped).
            percentile: for ``"percentile"``, in percent, above 0 and at most 100.
        """
        check_method(method, percentile)
        if not self.counts.sum():
            raise ValueError(f"Calibration of {self.name!r} has seen nothing; run images through the network first.")
        if method == "max" or self.largest == 0:
            return _scale(torch.tensor(self.largest))
        edges = torch.arange(1, self.BINS + 1, dtype=torch.float64) * (self.top / self.BINS)
        if method == "percentile":
            reached = self.counts.cumsum(0) >= self.counts.sum() * (percentile / 100)
            return _scale(edges[int(reached.float().argmax())].clamp_max(self.largest))
        centres = edges - self.top / self.BINS / 2
        candidates = self.largest * torch.linspace(0.1, 1, 91, dtype=torch.float64)
        steps = candidates[:, None] / LIMIT
        back = (centres / steps).round().clamp_max(LIMIT) * steps
        return _scale(candidates[((back - centres) ** 2 @ self.counts).argmin()])


def check_method(method: str, percentile: float) -> None:
    """Raise ValueError unless ``method`` is known and ``percentile`` lies in (0, 100]."""
    if method not in METHODS:
        raise ValueError(f"The calibration method is {method!r}; it can be {', '.join(map(repr, METHODS))}.")
    if not isinstance(percentile, Real) or not 0 < percentile <= 100:
        raise ValueError(f"The percentile is {percentile!r}; it lies above 0 and is at most 100.")

"""The error of a sum, what of it is the same for every image, and how to take that off.

A channel adds K products, each wrong by e = M(a, b) - a b. Its weights stay, the activations change with the
image, so the error of its sum has three parts. For activations and weights drawn independently

    lean       K E[e]                               the same in all channels
    shift      sqrt(K) std over b of E[e | b]       fixed too, another in each channel                      (3)
    scatter    sqrt(K) rms over b of std[e | b]     different in every image

The first two are numbers that could be subtracted: :func:`correct_bias` does.

Chapter: 04, "What happens inside one layer?"
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from axmoe_lite.kernels import matmul
from axmoe_lite.layers.modules import ApproxConv2d, Approximate, ApproxLinear, first_input
from axmoe_lite.layers.network import approximable, check_thawed, evaluating, nobody_idle
from axmoe_lite.multipliers import EXACT, Multiplier, error_table, exact_table, multiplier

Q = 256


@dataclass(frozen=True)
class SumError:
    """The parts of the error of a sum, and what the exact sum does itself, in units of the product.

    Attributes:
        lean: mean error, with its sign.
        shift: standard deviation over the channels of a channel's mean error.
        scatter: standard deviation of the error within a channel, root mean square over the channels.
        signal: the same of the exact sum: what the next layer is to see.
    """

    lean: float
    shift: float
    scatter: float
    signal: float


def predicted_error(circuit: Multiplier, fan_in: int, *, a: Tensor | None = None, b: Tensor | None = None) -> SumError:
    """Equation (3) for K = ``fan_in`` products of independent operands.

    Args:
        a, b: weights of the 256 values -128..127 of each operand, [256], as :func:`axmoe_lite.errors`
            takes them; None means uniform.

    >>> round(predicted_error(multiplier("mul8s_1KVA"), 100).lean)  # -12.25 a product
    -1225
    """
    p, q = _shares(a), _shares(b)
    exact = exact_table().double()
    error = error_table(circuit).double()
    mean = p @ error  # [Q]: E[e | b]
    lean = q @ mean
    shift = (q @ (mean - lean) ** 2).sqrt()
    scatter = (q @ (p @ (error - mean) ** 2)).sqrt()
    signal = (q @ (p @ (exact - p @ exact) ** 2)).sqrt()
    grown = fan_in**0.5
    return SumError((fan_in * lean).item(), *(grown * part.item() for part in (shift, scatter, signal)))


def measured_error(
    circuit: Multiplier,
    fan_in: int,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    images: int = 128,
    channels: int = 512,
    seed: int = 0,
) -> SumError:
    """What :func:`predicted_error` foretells, counted: random operands through the real product."""
    draw = torch.Generator().manual_seed(seed)
    codes = [
        (torch.multinomial(_shares(shares), m * n, replacement=True, generator=draw) - Q // 2).to(torch.int8).view(m, n)
        for shares, m, n in ((a, images, fan_in), (b, fan_in, channels))
    ]
    exact = matmul(*codes, multiplier(EXACT)).double()
    error = matmul(*codes, circuit).double() - exact
    means = error.mean(0)
    scatter, signal = (x.var(0).mean().sqrt().item() for x in (error, exact))
    return SumError(means.mean().item(), means.std().item(), scatter, signal)


def _shares(weights: Tensor | None) -> Tensor:
    weights = torch.ones(Q) if weights is None else weights
    return weights.double() / weights.double().sum()


# ------------------------------------------------------------------------------ real layers


@dataclass(frozen=True, eq=False)
class LayerError:
    """How far a layer's outputs are off, channel by channel: float32 [O] each, in the output's own unit.

    Attributes:
        shift: mean error of the channel over images and pixels.
        scatter: standard deviation of the error around it.
        signal: standard deviation of the exact output of the same bytes.
        gain: slope of the output against the exact output; below 1, differences between images shrink.
    """

    shift: Tensor
    scatter: Tensor
    signal: Tensor
    gain: Tensor


@torch.no_grad()
def input_of(network: nn.Module, name: str, images: Tensor) -> Tensor:
    """What reaches the layer of that name: its input, in evaluation mode, as the network computes it.

    Raises:
        ValueError: for a network that is frozen, or holds a frozen part.
    """
    check_thawed(network)
    seen: list[Tensor] = []
    layer = network.get_submodule(name)
    handle = layer.register_forward_hook(
        lambda layer, args, named, y: seen.append(first_input(args, named)), with_kwargs=True
    )
    try:
        with evaluating(network):
            network(images)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def layer_errors(network: nn.Module, images: Tensor) -> dict[str, LayerError]:
    """How far each approximate layer is off, against the exact product of the bytes that reach it.

    What reaches a layer comes from approximate layers before it, so each layer answers for its own error only.

    Args:
        network: after :func:`~axmoe_lite.layers.approximate`.
        images: one batch as the network expects it. An expert to which none of it goes is measured on all of it.

    Returns:
        A :class:`LayerError` for each approximate layer that has weights, by dotted name. What
        :func:`correct_bias` took off is no error any more.

    Raises:
        ValueError: for a network without approximate layers that have weights, or with a frozen part.
    """
    return _measure(network, images, lambda layer, x, error: None)


@torch.no_grad()
def correct_bias(network: nn.Module, calibration: Tensor) -> dict[str, LayerError]:
    """Take the mean error of every output channel off the layer's bias, in place. Not from the paper.

    One pass: each layer is corrected before its output goes on, so the layers behind it are measured on what
    they will see. A layer without bias gets one; the exact layer that it stands for keeps what it had, so
    ``restore`` undoes the correction, and so does ``approximate``, which makes new layers; what training did to a
    corrected bias meanwhile is lost then. Products of two activations have no bias and stay as they are.

    Args:
        network: after :func:`~axmoe_lite.layers.approximate`.
        calibration: one batch as the network expects it, of training images.

    Returns:
        What was measured of each layer before it was corrected, by dotted name. ``shift`` was taken off.

    Raises:
        ValueError: for a network without approximate layers that have weights, or with a frozen part.
    """

    def correct(layer: Approximate, x: Tensor, error: LayerError) -> Tensor:
        bias = nn.Parameter(-error.shift if layer.bias is None else layer.bias - error.shift)
        object.__setattr__(layer, "corrected", bias)
        _become(layer, layer.multiplier, bias)
        return layer.forward(x)

    return _measure(network, calibration, correct)


def _measure(
    network: nn.Module, images: Tensor, then: Callable[[Approximate, Tensor, LayerError], Tensor | None]
) -> dict[str, LayerError]:
    """The error of every layer in one pass; ``then`` may hand on another output than the one that was measured."""
    check_thawed(network)
    layers = {n: m for n, m in approximable(network).items() if isinstance(m, ApproxConv2d | ApproxLinear)}
    if not layers:
        raise ValueError(
            f"This {type(network).__name__} has no approximate layer with weights; call approximate() first."
        )
    found: dict[str, LayerError] = {}

    def hook(name: str, layer: Approximate, x: Tensor, y: Tensor) -> Tensor | None:
        if name in found:  # a layer that is used twice is measured at its first use
            return None
        found[name] = _error(layer, x, y)
        return then(layer, x, found[name])

    handles = [
        layer.register_forward_hook(
            lambda layer, args, named, y, name=name: hook(name, layer, first_input(args, named), y), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        with evaluating(network), nobody_idle(network):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _error(layer: Approximate, x: Tensor, y: Tensor) -> LayerError:
    """The layer's output y against what the exact multiplier makes of the same bytes."""
    circuit, bias = layer.multiplier, layer.bias
    layer.hand_over()
    try:
        _become(layer, multiplier(EXACT), layer.exact.bias)
        truth = layer.forward(x)
    finally:
        _become(layer, circuit, bias)
    channel = y.ndim - (3 if isinstance(layer, ApproxConv2d) else 1)
    error, truth = (t.movedim(channel, 0).flatten(1) for t in (y - truth, truth))
    shift = error.mean(1)
    error, truth = error - shift[:, None], truth - truth.mean(1, keepdim=True)
    scatter, signal = error.square().mean(1).sqrt(), truth.square().mean(1).sqrt()
    gain = 1 + (error * truth).mean(1) / signal.square().clamp_min(torch.finfo(torch.float32).tiny)
    return LayerError(shift, scatter, signal, gain)


def _become(layer: Approximate, circuit: Multiplier, bias: nn.Parameter | None) -> None:
    layer.multiplier, layer.bias = circuit, bias
    layer._kept.product = None  # it was made for another bias

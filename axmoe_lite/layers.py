"""Layers that multiply approximately, and the two calls that put them into a network and take them out.

    approximate(network, "mul8s_1L2J", calibration=images)     one multiplier everywhere
    approximate(network, {"layer1.0.conv1": "mul8s_1L2L"})     an assignment: layer name -> multiplier
    restore(network)                                           the very layers that were there before

The law of a layer, each step rounded to float32 and in this order (s_x the activation scale, s_w the
weight scale of output channel c):

    y = (float32(accumulator) * s_x) * s_w[c] + bias[c]                                          (1)

Weights stay floats that can be trained: every forward pass quantises them anew, and the backward pass
is straight-through with exact products of the quantised operands.

Chapter: 03, "What happens to a network?"
"""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from axmoe_lite import kernels, quant
from axmoe_lite.multipliers import Multiplier, multiplier

Assignment = str | Multiplier | dict[str, str | Multiplier]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, layer: "ApproxConv2d") -> Tensor:
        codes, weight_codes = quant.quantise(x, scale_x), quant.quantise(weight, scale_w.view(-1, 1, 1, 1))
        options = {
            "stride": layer.stride,
            "padding": layer.code_padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
        sums = kernels.conv2d(codes, weight_codes, layer.multiplier, **options)
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(codes, weight_codes, quant.within(x, scale_x), scale_x, scale_w)
            ctx.options, ctx.dtypes = options, (x.dtype, weight.dtype)
        return sums.float().mul_(scale_x).mul_(scale_w.view(-1, 1, 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, weight_codes, inside, scale_x, scale_w = ctx.saved_tensors
        x = quant.dequantise(codes, scale_x)
        weight = quant.dequantise(weight_codes, scale_w.view(-1, 1, 1, 1))
        o = ctx.options
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad.float(),
            x,
            weight,
            None,
            o["stride"],
            o["padding"],
            o["dilation"],
            False,
            (0, 0),
            o["groups"],
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False),
        )
        if grad_x is not None:
            grad_x = (grad_x * inside).to(ctx.dtypes[0])
        return grad_x, grad_weight if grad_weight is None else grad_weight.to(ctx.dtypes[1]), None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor, layer: "ApproxLinear") -> Tensor:
        codes, weight_codes = quant.quantise(x, scale_x), quant.quantise(weight, scale_w.view(-1, 1))
        sums = kernels.matmul(codes.flatten(0, -2), weight_codes.T, layer.multiplier).unflatten(0, x.shape[:-1])
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(codes, weight_codes, quant.within(x, scale_x), scale_x, scale_w)
            ctx.dtypes = x.dtype, weight.dtype
        return sums.float().mul_(scale_x).mul_(scale_w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, weight_codes, inside, scale_x, scale_w = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.float(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ quant.dequantise(weight_codes, scale_w.view(-1, 1)) * inside).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            x = quant.dequantise(codes, scale_x)
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(ctx.dtypes[1])
        return grad_x, grad_weight, None, None, None


class _Approximate(nn.Module):
    """What both layers share: the exact layer's own parameters, a multiplier, and a scale to be calibrated."""

    scale_x: Tensor

    def __init__(self, exact: nn.Module, multiplier: Multiplier, per_channel: bool) -> None:
        super().__init__()
        self.weight, self.bias = exact.weight, exact.bias
        self.multiplier, self.per_channel = multiplier, per_channel
        self.register_buffer("scale_x", torch.full((), torch.nan, device=exact.weight.device))
        self.histogram: quant.Histogram | None = None  # set while calibrating: the layer is then exact
        object.__setattr__(self, "exact", exact)  # hidden from torch: its parameters are ours, once
        self.train(exact.training)

    @property
    def calibrated(self) -> bool:
        return bool(torch.isfinite(self.scale_x))

    def _scales(self) -> tuple[Tensor, Tensor]:
        if not self.calibrated:
            raise ValueError(
                "This layer has no activation scale yet; pass calibration images to approximate(), or load a"
                " checkpoint of a calibrated network."
            )
        scale_w = quant.weight_scale(self.weight, per_channel=self.per_channel)
        return self.scale_x, scale_w.expand(self.weight.shape[0])


class ApproxConv2d(_Approximate):
    """A convolution whose products come from a multiplier; x [N, C, H, W] to y [N, O, OH, OW] by law (1).

    Made by :func:`approximate` from an ``nn.Conv2d``, whose parameters it shares. The image is the first
    operand of the multiplier, the weight the second. Padding with zeros becomes padding with code 0,
    which goes through the table too.
    """

    def __init__(self, exact: nn.Conv2d, multiplier: Multiplier, *, per_channel: bool = False) -> None:
        super().__init__(exact, multiplier, per_channel)
        self.in_channels, self.out_channels = exact.in_channels, exact.out_channels
        self.kernel_size, self.stride, self.padding = exact.kernel_size, exact.stride, exact.padding
        self.dilation, self.groups, self.padding_mode = exact.dilation, exact.groups, exact.padding_mode
        plain = exact.padding_mode == "zeros" and not isinstance(exact.padding, str)
        # Padding that the kernel cannot do itself ("same", reflect, ...) is done on the image before.
        self.image_padding = None if plain else tuple(exact._reversed_padding_repeated_twice)
        self.code_padding = tuple(exact.padding) if plain else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.histogram is not None:
            self.histogram.update(x)
            return self.exact(x)
        if self.image_padding is not None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = nn.functional.pad(x, self.image_padding, mode=mode)
        y = _Conv2d.apply(x, self.weight, *self._scales(), self)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {self.multiplier.name}"


class ApproxLinear(_Approximate):
    """A linear layer whose products come from a multiplier; x [..., C] to y [..., O] by law (1)."""

    def __init__(self, exact: nn.Linear, multiplier: Multiplier, *, per_channel: bool = False) -> None:
        super().__init__(exact, multiplier, per_channel)
        self.in_features, self.out_features = exact.in_features, exact.out_features

    def forward(self, x: Tensor) -> Tensor:
        if self.histogram is not None:
            self.histogram.update(x)
            return self.exact(x)
        flat = x[None] if x.ndim == 1 else x
        y = _Linear.apply(flat, self.weight, *self._scales(), self)
        y = y if self.bias is None else y + self.bias
        return y[0] if x.ndim == 1 else y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.multiplier.name}"


KINDS: dict[type[nn.Module], type[_Approximate]] = {nn.Conv2d: ApproxConv2d, nn.Linear: ApproxLinear}


# ------------------------------------------------------------------------- into a network, and out


def approximable(network: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can multiply approximately, by dotted name, in the network's order.

    That is each ``nn.Conv2d`` and ``nn.Linear`` (approximated or not). Left out are layers inside
    ``nn.MultiheadAttention``, which reads their weights without calling them, so that replacing them would
    change nothing.
    """
    inside_attention = {
        id(child)
        for module in network.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) in KINDS or isinstance(module, _Approximate)
        if id(module) not in inside_attention
    }


def default_layers(network: nn.Module) -> list[str]:
    """The layers that one multiplier for all goes to: all of :func:`approximable` but a final classifier.

    The classifier is the last ``nn.Linear``, if no convolution comes after it. AxMoE approximates all
    convolutions of the CNNs and leaves the classifier exact.
    """
    names = list(approximable(network).items())
    if names and isinstance(names[-1][1], nn.Linear | ApproxLinear):
        names.pop()
    return [name for name, _ in names]


def approximate(
    network: nn.Module,
    assignment: Assignment,
    *,
    calibration: Tensor | Iterable[Tensor] | None = None,
    method: str = "percentile",
    percentile: float = 99.99,
    per_channel: bool = False,
) -> nn.Module:
    """Give layers of a network their multipliers, in place, and calibrate those that need it.

    Called again it replaces the assignment: layers named then and not now become exact again, and scales
    already calibrated are kept unless ``calibration`` is given anew.

    Args:
        network: any torch module; only its ``nn.Conv2d`` and ``nn.Linear`` are touched.
        assignment: one multiplier (its name or the object) for all of :func:`default_layers`, or a dict
            from dotted layer names to multipliers; layers that it does not name stay exact floats.
            A name may say ``"swap:..."`` to make the weight the first operand.
        calibration: a batch as the network expects it ([N, C, H, W], normalised), or several. The exact
            network is run on it in evaluation mode to see how large each layer's inputs are.
        method, percentile: how the activation range is chosen, see :class:`axmoe_lite.quant.Histogram`.
        per_channel: one weight scale for each output channel instead of one a layer.

    Returns:
        The same network.

    Raises:
        ValueError: for a layer or multiplier that does not exist, a layer that was never run, images that
            are missing, empty or not finite. The network is then as it was before the call.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    >>> x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> approximate(net, "mul8s_1L2J", calibration=x)[0]
    ApproxConv2d(3, 4, kernel_size=(3, 3), mul8s_1L2J)
    >>> restore(net)[0]
    Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    quant.check_method(method, percentile)
    chosen = _resolve(network, assignment)
    before = approximable(network)
    after: dict[str, nn.Module] = {}
    for name, layer in before.items():
        exact = layer.exact if isinstance(layer, _Approximate) else layer
        after[name] = exact
        if name in chosen:
            after[name] = KINDS[type(exact)](exact, chosen[name], per_channel=per_channel)
            if isinstance(layer, _Approximate):
                after[name].scale_x.copy_(layer.scale_x)
    _place(network, before, after)
    layers = {name: after[name] for name in chosen}
    todo = layers if calibration is not None else {n: m for n, m in layers.items() if not m.calibrated}
    try:
        if todo:
            _calibrate(network, todo, calibration, method, percentile)
    except BaseException:
        _place(network, after, before)
        raise
    return network


def restore(network: nn.Module) -> nn.Module:
    """Put the exact layers back, in place, with whatever training did to their weights; returns the network."""
    before = approximable(network)
    _place(network, before, {n: m.exact if isinstance(m, _Approximate) else m for n, m in before.items()})
    return network


def assignment_of(network: nn.Module) -> dict[str, str]:
    """Which layer multiplies with what: dotted names to multiplier names; exact layers are not in it."""
    return {n: m.multiplier.name for n, m in approximable(network).items() if isinstance(m, _Approximate)}


def _resolve(network: nn.Module, assignment: Assignment) -> dict[str, Multiplier]:
    def table(value: str | Multiplier) -> Multiplier:
        return value if isinstance(value, Multiplier) else multiplier(value)

    known = approximable(network)
    if not isinstance(assignment, dict):
        names = default_layers(network)
        if not names:
            raise ValueError(
                f"This {type(network).__name__} has no layer to approximate by default; there are"
                f" {', '.join(known) or 'none'}. Name layers in a dict."
            )
        _warn_of_others(network, known)
        assignment = dict.fromkeys(names, assignment)
    for name in assignment:
        if name not in known:
            raise ValueError(_unknown_layer(network, name, known))
    return {name: table(value) for name, value in assignment.items()}


def _warn_of_others(network: nn.Module, known: dict[str, nn.Module]) -> None:
    """Say which layers multiply but stay exact because we do not know how they use their weights."""
    attention = [f"{name}." for name, m in network.named_modules() if isinstance(m, nn.MultiheadAttention)]
    others = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.MultiheadAttention)
        if name not in known and not name.startswith(tuple(attention))
    ]
    if others:
        first = type(network.get_submodule(others[0])).__name__
        warnings.warn(
            f"{len(others)} other layers multiply too and stay exact, such as {others[0]!r} ({first}): only plain"
            " nn.Conv2d and nn.Linear can be approximated.",
            stacklevel=4,
        )


def _unknown_layer(network: nn.Module, name: str, known: dict[str, nn.Module]) -> str:
    modules = dict(network.named_modules())
    kind = f"is a {type(modules[name]).__name__}" if name in modules else "does not exist"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"Layer {name!r} {kind} and cannot multiply approximately.{hint} The layers of this"
        f" {type(network).__name__}: {', '.join(known) or 'none'}."
    )


def _place(network: nn.Module, before: dict[str, nn.Module], after: dict[str, nn.Module]) -> None:
    """Put ``after`` wherever ``before`` stands, also where one layer is used under several names."""
    instead = {id(before[name]): after[name] for name in before if before[name] is not after[name]}
    for parent in network.modules():
        for key, child in parent._modules.items():
            if id(child) in instead:
                new = instead[id(child)]
                new.train(child.training)
                parent._modules[key] = new


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode for a while; then each of its modules in the mode it had."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _calibrate(
    network: nn.Module,
    layers: dict[str, _Approximate],
    batches: Tensor | Iterable[Tensor] | None,
    method: str,
    percentile: float,
) -> None:
    if batches is None:
        raise ValueError(
            f"Layer {next(iter(layers))!r} has no activation scale yet; pass calibration=images, a batch as the"
            " network expects it."
        )
    if not isinstance(batches, Iterable):
        raise ValueError(
            f"calibration is a {type(batches).__name__}; give a batch as the network expects it, or several."
        )
    device = next(network.parameters()).device
    watched = {n: m for n, m in approximable(network).items() if isinstance(m, _Approximate)}
    for name, layer in watched.items():
        layer.histogram = quant.Histogram(name)
    try:
        with evaluating(network):
            for batch in batches.split(250) if isinstance(batches, Tensor) else batches:
                if not isinstance(batch, Tensor) or batch.dtype == torch.uint8:
                    kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
                    raise ValueError(
                        f"Calibration met {kind}; give what the network takes, such as images.normalised(x)."
                    )
                network(batch.to(device))
        for name, layer in layers.items():
            if not layer.histogram.counts.sum():
                raise ValueError(
                    f"Layer {name!r} was not called on the calibration images (there were none, or the network reads"
                    " its weights without calling it), so approximating it would change nothing."
                )
            layer.scale_x.copy_(layer.histogram.scale(method, percentile=percentile))
    finally:
        for layer in watched.values():
            layer.histogram = None

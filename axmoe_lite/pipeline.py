"""Whole networks as an integer pipeline: eight-bit tensors flow between layers, one operation a layer.

    frozen = freeze(network)     # a network in which approximate() has placed multipliers
    frozen(x)                    # the same scores, sooner
    frozen.thaw()                # the network as it was

A convolution takes its BatchNorm, its ReLU, the residual addition and the next layer's rounding with it.
Its law, each step rounded to float32, with g[c] the folded BatchNorm's gain and shift:

    y = float32(accumulator) * scale[c] + bias[c]         scale[c] = s_x s_w[c] g[c],  bias[c] = shift[c]     (1)
    y = y + residual                                      where there is one
    y = min(max(y, 0), ceiling)                           where there is a ReLU; ceiling 6 for ReLU6
    code = round(y * float32(1 / s_next)), cut to 0..127  where the next layer wants codes, half to even     (2)

:meth:`Frozen.law` computes it in plain torch on the reference product; the pipeline equals it in every bit.
The unfrozen network differs by the rounding of BatchNorm alone, which flips a code now and then.

What is not recognised runs as it is, and :attr:`Frozen.eager` says what and why. Weights are taken as they
are at the call: freeze again after training.

Chapter: 04, "Faster than float32?"
"""

import copy
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from axmoe_lite.kernels import factored, int8, reference
from axmoe_lite.kernels.encode import LIMIT, encode
from axmoe_lite.kernels.products import ConvProduct
from axmoe_lite.layers import ApproxConv2d, evaluating
from axmoe_lite.layers.modules import Approximate

RELUS = (nn.ReLU, torch.relu, nn.functional.relu, "relu", "relu_")
RELU6S = (nn.ReLU6, nn.functional.relu6)
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


# ------------------------------------------------------------------------------------ the steps


@dataclass(eq=False)
class Run:
    """A node that runs as it is: a module, a function, a method or an attribute."""

    node: fx.Node
    call: Callable | None  # modules are called as they were when frozen

    def run(self, values: dict, buffers: dict) -> Any:
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda n: values[n])
        if self.node.op == "call_method":
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)
        return self.call(*args, **kwargs)

    def law(self, values: dict) -> Any:
        if isinstance(self.call, Approximate):
            args = fx.node.map_arg(self.node.args, lambda n: values[n])
            return _layer_by_law(self.call, *args)
        return self.run(values, {})


@dataclass(eq=False)
class Encode:
    """Floats or codes of ``source`` to the bytes that the units multiply, for one or more convolutions."""

    source: fx.Node
    product: ConvProduct
    from_codes: bool
    offset: int

    def key(self) -> tuple:
        scale = None if self.from_codes else self.product.inverse_scale
        return self.source, self.product.factors, scale, self.offset, self.product.options["groups"], self._border()

    def _border(self) -> tuple:
        # Factors that are masks keep zeros zero, and the convolution adds the border itself.
        return () if self.product.factors.masks is not None else tuple(self.product.options["padding"])

    def run(self, values: dict, buffers: dict) -> Tensor:
        product, x = self.product, values[self.source]
        x, _ = factored.padded(x, product.options["padding"], product.factors)
        rows = x.permute(0, 2, 3, 1).contiguous()
        shape = (*rows.shape[:-1], rows.shape[-1] * product.factors.rank)
        dtype = torch.uint8 if self.offset or self.from_codes else torch.int8
        where = (self, shape)  # not by shape alone: a later layer may read what two others have encoded since
        if where not in buffers:
            buffers[where] = torch.empty(shape, dtype=dtype)
        quantisation = {} if self.from_codes else {"inverse_scale": product.inverse_scale}
        least = -LIMIT if self.offset else 0
        groups, out = product.options["groups"], buffers[where]
        encode(rows, product.factors, groups=groups, offset=self.offset, least=least, out=out, **quantisation)
        return out.view(torch.uint8).permute(0, 3, 1, 2)

    def law(self, values: dict) -> Tensor:
        x = values[self.source]
        return x if self.from_codes else codes_of_law(x, self.product.inverse_scale)


@dataclass(eq=False)
class Convolve:
    """A convolution with all that follows it, by laws (1) and (2)."""

    bytes_of: Any  # the key of the Encode step, or the node whose codes are the bytes already
    product: ConvProduct
    units: int8.PackedConv2d
    residual: fx.Node | None
    in_place: bool  # the residual's memory receives the result: nobody reads it afterwards
    ceiling: float | None  # None: no ReLU; infinity: an ordinary one
    code_scale: float | None

    def run(self, values: dict, buffers: dict) -> Tensor:
        x = values[self.bytes_of]
        if self.residual is None:
            return self.units(x, ceiling=self.ceiling, code_scale=self.code_scale)
        residual = values[self.residual].contiguous(memory_format=torch.channels_last)
        if self.in_place and self.ceiling in (None, torch.inf):
            return self.units(x, add_to=residual, ceiling=self.ceiling)
        y = self.units(x).add_(residual)
        return y if self.ceiling is None else y.clamp_(0, self.ceiling)

    def law(self, values: dict) -> Tensor:
        table, options = self.product.multiplier.table, self.product.options
        sums = _channels_last(reference.conv2d(values[self.bytes_of], self.product.weight, table, **options))
        y = sums.float() * self.units.scale.view(-1, 1, 1) + self.units.bias.view(-1, 1, 1)
        y = y if self.residual is None else y + values[self.residual]
        y = y if self.ceiling is None else y.clamp(0, self.ceiling)
        if self.code_scale is None:
            return y
        return codes_of_law(y, float(1.0 / torch.tensor(self.code_scale)), least=0)


@dataclass(eq=False)
class PoolCodes:
    """Max pooling of codes: rounding is monotonic, so the largest code is the code of the largest value."""

    source: fx.Node
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def run(self, values: dict, buffers: dict) -> Tensor:
        x = values[self.source].permute(0, 2, 3, 1)  # torch's own pooling refuses bytes
        for axis in (1, 2):
            k, s, p = (pair[axis - 1] for pair in (self.kernel, self.stride, self.padding))
            if p:  # with zeros, below which no code lies
                x = nn.functional.pad(x, (0, 0, p, p) if axis == 2 else (0, 0, 0, 0, p, p))
            length = (x.shape[axis] - k) // s + 1
            shifted = [
                x.narrow(axis, i, (length - 1) * s + 1)[(slice(None),) * axis + (slice(None, None, s),)]
                for i in range(k)
            ]
            x = shifted[0]
            for other in shifted[1:]:
                x = torch.maximum(x, other)
        return x.permute(0, 3, 1, 2)

    def law(self, values: dict) -> Tensor:
        x = values[self.source].float()
        return nn.functional.max_pool2d(x, self.kernel, self.stride, self.padding).to(torch.int8)


def codes_of_law(x: Tensor, inverse_scale: float, least: int = -LIMIT) -> Tensor:
    """Law (2) in plain torch: int8."""
    return (x * inverse_scale).round().clamp(least, LIMIT).nan_to_num(nan=0.0).to(torch.int8)


def _channels_last(x: Tensor) -> Tensor:
    """The layout of the pipeline: what stays eager adds up in an order that depends on it."""
    return x.contiguous(memory_format=torch.channels_last)


def _layer_by_law(layer: Approximate, *inputs: Tensor) -> Tensor:
    """An approximate layer that stayed eager, on the reference product."""
    table = layer.multiplier.table
    if not hasattr(layer, "product"):
        a, b = (codes_of_law(x, float(1.0 / getattr(layer, s))) for x, s in zip(inputs, layer.SCALES, strict=True))
        pairs = zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)
        sums = torch.stack([reference.matmul(x, y, table) for x, y in pairs]).unflatten(0, a.shape[:-2])
        return sums.float() * (layer.scale_a * layer.scale_b)
    product, (x,) = layer.product(), inputs
    if isinstance(layer, ApproxConv2d):
        if layer.image_padding is not None:
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = nn.functional.pad(x, layer.image_padding, mode=mode)
        codes = codes_of_law(x, product.inverse_scale)
        sums = _channels_last(reference.conv2d(codes, product.weight, table, **product.options))
        scale, bias = (None if t is None else t.view(-1, 1, 1) for t in (product.scale, product.bias))
    else:
        codes = codes_of_law(x, product.inverse_scale).flatten(0, -2)
        sums = reference.matmul(codes, product.weight.T, table).unflatten(0, x.shape[:-1])
        scale, bias = product.scale, product.bias
    return sums.float() * scale if bias is None else sums.float() * scale + bias


# ---------------------------------------------------------------------------------- the network


class Frozen(nn.Module):
    """A network as an integer pipeline, made by :func:`freeze`; for evaluation only.

    Attributes:
        network: the network it was made from, untouched.
        eager: what runs as it is, by name, and why; functions without products are not listed.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, steps: dict[Any, Any], eager: dict[str, str]) -> None:
        super().__init__()
        self.network, self.eager = network, eager
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._output = next(node for node in graph.nodes if node.op == "output").args[0]
        self._steps = steps
        self._drop = _last_uses(steps, self._output)
        self._local = threading.local()  # buffers, which two threads must not share
        self.eval()

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        if not hasattr(self._local, "buffers"):
            self._local.buffers = {}
        buffers = self._local.buffers
        if len(buffers) > 4 * len(self._steps):  # a new image size each time must not fill the memory
            buffers.clear()
        values = self._bound(inputs)
        for key, step in self._steps.items():
            values[key] = step.run(values, buffers)
            for done in self._drop.get(key, ()):
                del values[done]
        return fx.node.map_arg(self._output, lambda n: values[n])

    @torch.no_grad()
    def law(self, *inputs: Tensor) -> Any:
        """The same by the slow and obvious way: plain torch on the reference product. Few images, please."""
        values = self._bound(inputs)
        for key, step in self._steps.items():
            values[key] = step.law(values)
        return fx.node.map_arg(self._output, lambda n: values[n])

    def thaw(self) -> nn.Module:
        """The network this was made from."""
        return self.network

    def _bound(self, inputs: tuple[Tensor, ...]) -> dict:
        defaults = [node.args[0] for node in self._inputs[len(inputs) :] if node.args]
        if len(inputs) + len(defaults) != len(self._inputs):
            raise ValueError(f"The network takes {len(self._inputs)} inputs; it was given {len(inputs)}.")
        return dict(zip(self._inputs, [*inputs, *defaults], strict=True))

    def __deepcopy__(self, memo: dict) -> "Frozen":
        return freeze(copy.deepcopy(self.network, memo))

    def __repr__(self) -> str:
        fused = [step for step in self._steps.values() if isinstance(step, Convolve)]
        lines = [f"Frozen({type(self.network).__name__}: {len(fused)} convolutions in the pipeline"]
        lines += [f"  eager: {name}, {why}" for name, why in self.eager.items()]
        return "\n".join(lines) + ")"


def freeze(network: nn.Module) -> Frozen:
    """A network's integer pipeline, for fast evaluation; the network itself is left as it is.

    Args:
        network: one in which :func:`~axmoe_lite.approximate` has placed calibrated multipliers. Any module
            that torch.fx can trace; parts that it cannot are run as they are.

    Returns:
        Frozen, to be called like the network.

    Raises:
        ValueError: if no layer is approximate, or one is not calibrated.

    >>> from axmoe_lite import approximate
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    >>> x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> frozen = freeze(approximate(net, "mul8s_1L2J", calibration=x))
    >>> frozen, torch.equal(frozen(x), frozen.law(x))
    (Frozen(Sequential: 2 convolutions in the pipeline), True)
    """
    if not any(isinstance(module, Approximate) for module in network.modules()):
        raise ValueError(
            f"This {type(network).__name__} has no approximate layer, so there is nothing to freeze; call"
            " approximate(network, multiplier, calibration=images) first."
        )
    with evaluating(network), torch.no_grad():
        graph, opaque = _trace(network)
        steps, eager = _Planner(network, graph).plan()
    eager.update({name: "torch.fx cannot trace it" for name in opaque})
    return Frozen(network, graph, steps, eager)


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque, self.failed = opaque, ""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Approximate) or name in self.opaque or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(module)  # the innermost one that fails
            raise


def _trace(network: nn.Module) -> tuple[fx.Graph, set[str]]:
    """The network's graph; modules that cannot be traced are single nodes in it, and named beside it."""
    opaque: set[str] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            return tracer.trace(network), opaque
        except Exception as reason:
            if not tracer.failed or tracer.failed in opaque:
                raise ValueError(
                    f"torch.fx cannot trace the forward of this {type(network).__name__}, so it has no frozen form"
                    f" ({reason}); evaluate it as it is."
                ) from reason
            opaque.add(tracer.failed)


class _Planner:
    """Turns a graph into steps: looks at each convolution for what can go with it."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(network.named_modules())
        self.network, self.graph = network, graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.steps: dict[Any, Any] = {}
        self.eager: dict[str, str] = {}
        self.code_scale: dict[fx.Node, float] = {}  # nodes whose value is codes, and what a step means
        self.fresh: set[fx.Node] = set()  # floats in memory that a convolution wrote and nobody else holds
        self.not_negative: set[fx.Node] = set()

    def plan(self) -> tuple[dict[Any, Any], dict[str, str]]:
        chains: dict[fx.Node, _Chain] = {}  # by their last node, where all that they read is there
        inside: set[fx.Node] = set()
        for node in self.graph.nodes:
            if (product := self._product(node)) is not None:
                chain = self._chain(node, product, inside)
                chains[chain.nodes[-1]] = chain
                inside.update(chain.nodes)
        for node in self.graph.nodes:
            if node in chains:
                self._convolve(chains[node])
            elif node not in inside and node.op not in ("placeholder", "output"):
                self._other(node)
        return self.steps, self.eager

    # ---- what goes with a convolution

    def _product(self, node: fx.Node) -> ConvProduct | None:
        layer = self.modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(layer, ApproxConv2d):
            return None
        product = layer.product()
        if layer.image_padding is not None:
            self.eager[node.target] = f"padding {layer.padding!r} ({layer.padding_mode}) is done on floats"
        elif not product.bytewise:
            self.eager[node.target] = f"{layer.multiplier.name} does not run on int8 units here"
        elif product.units(0) is None:
            self.eager[node.target] = "its sums do not fit the int8 units"
        else:
            return product
        return None

    def _chain(self, node: fx.Node, product: ConvProduct, taken: set[fx.Node]) -> "_Chain":
        chain = _Chain([node], product)
        user = self._only_user(chain)
        bn = None if user is None else self._module(user)
        if isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None:
            chain.nodes.append(user)
            chain.batch_norm = bn
        user = self._only_user(chain)
        if user in taken:  # of two convolutions that are added, the first takes the addition along
            return chain
        if user is not None and _is(user, ADDITIONS) and not user.kwargs and len(user.all_input_nodes) == 2:
            other = next(n for n in user.all_input_nodes if n is not chain.nodes[-1])
            chain.nodes.append(user)
            chain.residual = other
            user = self._only_user(chain)
        if user is not None and (_is(user, RELUS + RELU6S) or isinstance(self._module(user), nn.ReLU | nn.ReLU6)):
            six = _is(user, RELU6S) or isinstance(self._module(user), nn.ReLU6)
            chain.nodes.append(user)
            chain.ceiling = 6.0 if six else torch.inf
        return chain

    def _only_user(self, chain: "_Chain") -> fx.Node | None:
        users = list(chain.nodes[-1].users)
        return users[0] if len(users) == 1 and users[0].op != "output" else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(node.target) if node.op == "call_module" else None

    # ---- steps

    def _convolve(self, chain: "_Chain") -> None:
        product, source, end = chain.product, chain.nodes[0].args[0], chain.nodes[-1]
        offset = 0 if source in self.code_scale or source in self.not_negative else 128
        scale, bias = chain.folded()
        packed = product.units(offset)
        if packed is None:  # only with a zero point: signed images and very large sums
            self.eager[chain.nodes[0].target] = "its images are signed and its sums too large for the units' zero point"
            for node in chain.nodes:
                self._other(node)
            return
        units = int8.PackedConv2d(packed.weight, scale, bias, offset, **product.options_of_units())
        same_codes = (
            source in self.code_scale
            and product.factors.masks is not None
            and all(p & LIMIT == LIMIT for p, _ in product.factors.masks)
        )
        key = source
        if not (same_codes and product.factors.rank == 1):
            step = Encode(source, product, source in self.code_scale, offset)
            key = step.key()
            self.steps.setdefault(key, step)
        step = Convolve(key, product, units, chain.residual, False, chain.ceiling, None)
        if chain.residual is not None:
            last = max(chain.residual.users, key=self.order.__getitem__)
            step.in_place = chain.residual in self.fresh and last in chain.nodes
        elif chain.ceiling is not None:
            step.code_scale = self._wanted_codes(end)
        if step.code_scale is not None:
            self.code_scale[end] = step.code_scale
        else:
            self.fresh.add(end)
        if chain.ceiling is not None:
            self.not_negative.add(end)
        self.steps[end] = step

    def _wanted_codes(self, node: fx.Node) -> float | None:
        """The scale of the codes that all users of this value want, or None if some want floats."""
        scales = set()
        for user in node.users:
            if self._pool(user) is not None:
                scales.add(self._wanted_codes(user))
            elif self._product(user) is not None and user.args[0] is node:
                scales.add(float(self.modules[user.target].scale_x))
            else:
                return None
        return scales.pop() if len(scales) == 1 else None

    def _pool(self, node: fx.Node) -> nn.MaxPool2d | None:
        module = self._module(node)
        plain = isinstance(module, nn.MaxPool2d) and not module.ceil_mode and not module.return_indices
        return module if plain and _pair(module.dilation) == (1, 1) else None

    def _other(self, node: fx.Node) -> None:
        module, source = self._module(node), next(iter(node.all_input_nodes), None)
        if source in self.code_scale:
            pool = self._pool(node)
            self.steps[node] = PoolCodes(source, _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding))
            self.code_scale[node] = self.code_scale[source]
            return
        is_relu = _is(node, RELUS + RELU6S) or isinstance(module, nn.ReLU | nn.ReLU6)
        keeps_sign = isinstance(module, nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.Dropout | nn.Identity)
        if is_relu or (keeps_sign and source in self.not_negative):
            self.not_negative.add(node)
        call = node.target
        if module is not None:
            call = copy.deepcopy(module).eval()
            if isinstance(call, nn.ReLU | nn.ReLU6):
                call.inplace = False  # what it overwrites may be wanted elsewhere
        elif node.op == "get_attr":
            call = _constant(operator.attrgetter(node.target)(self.network))
        self.steps[node] = Run(node, call)


@dataclass
class _Chain:
    """A convolution's node and those that go with it, in order."""

    nodes: list[fx.Node]
    product: ConvProduct
    batch_norm: nn.BatchNorm2d | None = None
    residual: fx.Node | None = None
    ceiling: float | None = None

    def folded(self) -> tuple[Tensor, Tensor]:
        """scale and bias [O] of (1), BatchNorm folded in, computed in float64."""
        scale, bias, bn = self.product.scale.double(), self.product.bias, self.batch_norm
        bias = torch.zeros_like(scale) if bias is None else bias.double()
        if bn is not None:
            gain = (bn.running_var.double() + bn.eps).rsqrt()
            gain = gain if bn.weight is None else gain * bn.weight.double()
            shift = 0.0 if bn.bias is None else bn.bias.double()
            scale, bias = scale * gain, (bias - bn.running_mean.double()) * gain + shift
        return scale.float().contiguous(), bias.float().contiguous()


def _is(node: fx.Node, targets: tuple) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _constant(value: Any) -> Callable:
    value = value.detach().clone() if isinstance(value, Tensor) else value
    return lambda: value


def _last_uses(steps: dict[Any, Any], output: Any) -> dict[Any, list]:
    """After which step which values are no longer needed."""
    last: dict[Any, Any] = {}
    for key, step in steps.items():
        for used in _reads(step):
            last[used] = key
    kept: set = set()
    fx.node.map_arg(output, kept.add)
    drop: dict[Any, list] = {}
    for used, key in last.items():
        if used not in kept:
            drop.setdefault(key, []).append(used)
    return drop


def _reads(step: Any) -> list:
    if isinstance(step, Run):
        return list(step.node.all_input_nodes)
    if isinstance(step, Convolve):
        return [step.bytes_of] + ([] if step.residual is None else [step.residual])
    return [step.source]

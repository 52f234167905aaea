"""From a network to the steps of its frozen form: trace it, and see what can go with each convolution.

Chapter: 06, "Faster than float32?"
"""

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from axmoe_lite.kernels import int8
from axmoe_lite.kernels.encode import LIMIT
from axmoe_lite.kernels.products import ConvProduct
from axmoe_lite.layers import ApproxConv2d
from axmoe_lite.layers.modules import Approximate
from axmoe_lite.pipeline.steps import Convolve, Encode, PoolCodes, Run

RELUS = (torch.relu, nn.functional.relu, "relu")
RELU6S = (nn.functional.relu6,)
ADDITIONS = (operator.add, torch.add, "add")
WRITERS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "matmul", "mod", "pow")
}
WRITERS |= {operator.setitem: None, operator.delitem: None}


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


def trace(network: nn.Module) -> tuple[fx.Graph, set[str]]:
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


def _without_writing(network: nn.Module, graph: fx.Graph) -> None:
    """Turn what writes into a value into what makes a new one, and let later readers read that.

    Raises:
        ValueError: where somebody may read the same memory later under another name.
    """
    modules, order = dict(network.named_modules()), {node: i for i, node in enumerate(graph.nodes)}
    made: set[fx.Node] = set()  # new values where something was written in place
    for node in list(graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        if getattr(module, "inplace", False):
            pass  # Planner calls such modules on their own terms
        elif node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            if not hasattr(Tensor, node.target[:-1]):
                raise ValueError(_writes(network, node))
            node.target = node.target[:-1]
        elif node.op == "call_function" and node.target in WRITERS:
            if WRITERS[node.target] is None:
                raise ValueError(_writes(network, node))
            node.target = WRITERS[node.target]
        else:
            continue
        written = node.args[0]
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, node)
        made.add(node)
        if any(order[user] > order[node] for other in _aliases(written, modules, made) for user in other.users):
            raise ValueError(_writes(network, node))


def _aliases(node: fx.Node, modules: dict[str, nn.Module], made: set[fx.Node]) -> set[fx.Node]:
    """Values that may lie in the same memory as this one, itself left out."""

    def may_be_a_view(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(modules[node.target], nn.Identity | nn.Dropout | nn.Flatten | nn.Unflatten)
        known = node in made or _is(node, ADDITIONS + RELUS + RELU6S)
        return node.op in ("call_method", "call_function") and not known

    found, todo = set(), [node]
    while todo:
        here = todo.pop()
        near = list(here.all_input_nodes) if may_be_a_view(here) else []
        near += [user for user in here.users if may_be_a_view(user)]
        todo += [other for other in near if other not in found]
        found.update(near)
    return found - {node}


def _writes(network: nn.Module, node: fx.Node) -> str:
    return (
        f"This {type(network).__name__} writes into {node.args[0]} in place ({node}), which may be read elsewhere, so"
        " it has no frozen form; evaluate it as it is, or make a new value there."
    )


class Planner:
    """Turns a graph into steps: looks at each convolution for what can go with it."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        _without_writing(network, graph)
        self.modules = dict(network.named_modules())
        self.network, self.graph = network, graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.steps: dict[Any, Any] = {}
        self.eager: dict[str, str] = {}
        self.code_scale: dict[fx.Node, float] = {}  # nodes whose value is codes, and what a step means
        self.fresh: set[fx.Node] = set()  # floats in memory that a convolution wrote and nobody else holds
        self.not_negative: set[fx.Node] = set()
        self.runs_at: dict[fx.Node, int] = {}  # convolutions of the pipeline, and the place in the order

    def plan(self) -> tuple[dict[Any, Any], dict[str, str]]:
        chains: dict[fx.Node, _Chain] = {}  # by their last node, where all that they read is there
        inside: set[fx.Node] = set()
        for node in self.graph.nodes:
            if (product := self._product(node)) is not None:
                chain = self._chain(node, product, inside)
                chains[chain.nodes[-1]] = chain
                inside.update(chain.nodes)
                self.runs_at[node] = self.order[chain.nodes[-1]]
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
        elif product.units(0 if product.factors.unsigned else 128) is None:
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
        not_negative = source in self.code_scale or source in self.not_negative
        offset = 0 if not_negative and product.factors.unsigned else 128
        scale, bias = chain.folded()
        packed = product.units(offset)
        if packed is None:  # only with a zero point: signed images and very large sums
            self.eager[chain.nodes[0].target] = "its images are signed and its sums too large for the units' zero point"
            for node in chain.nodes:
                self._other(node)
            return
        units = int8.PackedConv2d(packed.weight, scale, bias, offset, **product.options_of_units)
        same_codes = (
            source in self.code_scale
            and not any(product.by_hand)
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
            step.in_place = chain.residual in self.fresh and self._read_for_the_last_time(chain)
        elif chain.ceiling is not None:
            step.code_scale = self._wanted_codes(end)
        if step.code_scale is not None:
            self.code_scale[end] = step.code_scale
        else:
            self.fresh.add(end)
        if chain.ceiling is not None:
            self.not_negative.add(end)
        self.steps[end] = step

    def _read_for_the_last_time(self, chain: "_Chain") -> bool:
        """Whether nobody reads the residual's memory after this chain, under its own name or another."""
        others = [user for user in chain.residual.users if user not in chain.nodes]
        # Only convolutions of the pipeline are known to hand out no view of what they read, and when they run.
        return all(user in self.runs_at and self.runs_at[user] < self.order[chain.nodes[-1]] for user in others)

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
            if getattr(call, "inplace", False):
                call.inplace = False
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
        scale, bias, bn = self.product.scale_of_terms.double(), self.product.bias, self.batch_norm
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

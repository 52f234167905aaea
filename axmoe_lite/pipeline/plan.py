"""From a network to the steps of its frozen form: trace it, and see what can go with each convolution.

Chapter: 06, "Faster than float32?"
"""

import copy
import inspect
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
    getattr(operator, f"i{name}"): getattr(operator, name + "_" * (name in ("and", "or")))
    for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()  # noqa: SIM905
}
AUGMENTED = {writer.__name__: writer for writer in WRITERS}  # not matmul: no tensor has __imatmul__
WRITERS |= {operator.imatmul: operator.matmul, operator.setitem: None, operator.delitem: None}
_NAMES = (  # noqa: SIM905
    "add sub mul div truediv floordiv pow neg abs exp sqrt clone cat stack matmul bmm conv2d linear mean sum relu relu6"
    " sigmoid tanh gelu silu hardswish hardsigmoid softmax log_softmax max_pool2d avg_pool2d batch_norm layer_norm"
).split()
NEW = (*_NAMES, *(getattr(space, n) for space in (operator, torch, nn.functional) for n in _NAMES if hasattr(space, n)))
HANDING_ON = (nn.Identity, nn.modules.dropout._DropoutNd, nn.Flatten, nn.Unflatten)  # their input, or a view of it
NUMBERS = ("size", "shape", "dim", "ndim", "numel", "nelement", "stride", "dtype", "device", "item")


class _Augmented:
    """+= and its like as what they are: torch.fx would take ``y += z`` for ``y = y + z``, which writes nowhere."""

    def __getattr__(self, name: str) -> fx.Proxy:
        return _Attribute(self, name)


for _name, _writer in AUGMENTED.items():

    def _augment(self: fx.Proxy, other: Any, writer: Callable = _writer) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", writer, (self, other), {})

    setattr(_Augmented, f"__{_name}__", _augment)


class _Proxy(_Augmented, fx.Proxy):
    pass


class _Attribute(_Augmented, fx.proxy.Attribute):
    pass


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[str]) -> None:
        super().__init__()
        self.opaque, self.failed = opaque, ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

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
            graph = tracer.trace(network)
        except Exception as reason:
            if not tracer.failed or tracer.failed in opaque:
                raise ValueError(
                    f"torch.fx cannot trace the forward of this {type(network).__name__}, so it has no frozen form"
                    f" ({reason}); evaluate it as it is."
                ) from reason
            opaque.add(tracer.failed)
        else:
            _give_by_place(graph, dict(network.named_modules()))
            return graph, opaque


def _give_by_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Give approximate layers by place what they are given by name: Planner and the law look for it there."""
    for node in graph.nodes:
        if node.op == "call_module" and node.kwargs and isinstance(layer := modules[node.target], Approximate):
            node.args, node.kwargs = inspect.signature(layer.forward).bind(*node.args, **node.kwargs).args, {}


def _without_writing(network: nn.Module, graph: fx.Graph) -> None:
    """Turn what writes into a value into what makes a new one, and let later readers read that.

    Raises:
        ValueError: where somebody may read the same memory later under another name, or torch has no such form.
    """
    modules, order = dict(network.named_modules()), {node: i for i, node in enumerate(graph.nodes)}
    made: set[fx.Node] = set()  # new values where something was written in place
    for node in list(graph.nodes):
        written = _rewritten(network, node, modules)
        if written is None:
            continue
        new = node
        if node.op != "call_module" and not _is(node, ADDITIONS + RELUS + RELU6S):
            with graph.inserting_after(node):  # what is written keeps its type: y.ge_(0) makes no bools of floats
                new = graph.call_method("type_as", (node, written))
            order[new] = order[node]
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        for user in list(written.users):
            if order[user] > order[node]:
                user.replace_input_with(written, new)
        made |= {node, new}
        if any(order[user] > order[node] for other in _aliases(written, modules, made) for user in other.users):
            raise ValueError(_writes(network, node, written))


def _rewritten(network: nn.Module, node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """What a node writes into, if it does; the node is changed into one that makes a new value."""
    written = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_module" and getattr(modules[node.target], "inplace", False):
        return written  # Planner calls such modules on their own terms
    if node.op not in ("call_method", "call_function"):
        return None
    if node.kwargs.get("inplace"):
        node.update_kwarg("inplace", False)
        return written
    if node.kwargs.get("out") is not None:
        written, without = node.kwargs["out"], node.target
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
    elif node.target in WRITERS:
        without = WRITERS[node.target]
    elif (without := _writing_form(node.target)) == node.target:
        return None
    if without is None or not isinstance(written, fx.Node):
        raise ValueError(_writes(network, node, written))
    augmented = getattr(node.target, "__name__", "") in AUGMENTED
    node.target = without
    return None if augmented and _is_number(written) else written


def _writing_form(target: str | Callable) -> str | Callable | None:
    """The function or method that makes a new value where this one writes; itself if it does not; None: there is none.

    By torch's own convention: a name that ends in one underscore writes.
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    plain = name[:-1]
    if not name.endswith("_") or name.endswith("__") or getattr(operator, name, None) is target:  # operator.and_
        return target
    if isinstance(target, str):
        return plain if hasattr(Tensor, plain) else None
    spaces = [space for space in (torch, nn.functional) if getattr(space, name, None) is target]
    return next((getattr(space, plain) for space in spaces if hasattr(space, plain)), None)


def _is_number(node: Any) -> bool:
    """Whether a value is a number or a shape, as far as can be told: += gives such a name a new one."""
    if not isinstance(node, fx.Node):
        return True
    if node.op == "call_method" or node.target is getattr:
        return (node.target if node.op == "call_method" else node.args[1]) in NUMBERS
    of_operators = node.op == "call_function" and getattr(operator, node.target.__name__, None) is node.target
    return of_operators and bool(node.all_input_nodes) and all(map(_is_number, node.all_input_nodes))


def _aliases(node: fx.Node, modules: dict[str, nn.Module], made: set[fx.Node]) -> set[fx.Node]:
    """Values that may lie in the same memory as this one, itself left out."""

    def may_be_a_view(node: fx.Node) -> bool:
        if node.op == "call_module":
            module = modules[node.target]
            foreign = not type(module).__module__.startswith("torch.nn.") and not isinstance(module, Approximate)
            return foreign or isinstance(module, HANDING_ON)
        known = node in made or _is(node, NEW) or _is_number(node)
        return node.op in ("call_method", "call_function") and not known

    found, todo = set(), [node]
    while todo:
        here = todo.pop()
        near = list(here.all_input_nodes) if may_be_a_view(here) else []
        near += [user for user in here.users if may_be_a_view(user)]
        todo += [other for other in near if other not in found]
        found.update(near)
    return found - {node}


def _writes(network: nn.Module, node: fx.Node, written: Any) -> str:
    return (
        f"This {type(network).__name__} writes into {written} in place ({node}), which may be read elsewhere, so"
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
        elif layer.weight.dtype != torch.float32:
            self.eager[node.target] = f"it answers in {layer.weight.dtype}, the pipeline in float32"
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

"""A network followed once while it runs: its graph, with the sizes of all values and the layers on the way.

torch.fx alone sees no sizes, so a comparison of two, or a loop over one, ends it. Here each value of the graph is
computed for the images at hand too. What follows from sizes and weights alone may decide an ``if``; what is computed
from the image may not, because another image would go another way.

Chapter: 19, "Which core for which layer?"
"""

import contextlib
import copy
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from axmoe_lite import moe
from axmoe_lite.layers import Matmul
from axmoe_lite.layers.modules import Approximate
from axmoe_lite.search.pipeit.shapes import Layer, layers_of_call, layers_of_module

DECIDES = "it decides by a number that is computed from the image"

FIXED = ("dim", "ndimension", "is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device")
"""Methods of a tensor that answer the same for every batch."""

SIZES = ("size", "numel", "nelement", "stride")
"""Methods whose answer follows from the sizes."""

MAKERS = ("zeros", "ones", "full", "arange", "eye")
"""Functions of torch that take sizes, which torch.fx alone would have to be Python's numbers."""


@dataclass(frozen=True)
class Followed:
    """What was found.

    Attributes:
        root: the model's modules in evaluation mode, with the model's own tensors.
        graph: its nodes know in ``meta["is_tensor"]`` whether their value is one.
        layers: in the order of execution.
        at: for nodes that have layers, which: the first, and how many.
        answer: the model's, for x.
    """

    root: nn.Module
    graph: fx.Graph
    layers: list[Layer]
    at: dict[fx.Node, tuple[int, int]]
    answer: Any


@torch.no_grad()
def follow(model: nn.Module, x: Tensor) -> Followed:
    """Follow a model on x [B, ...]; it stays as it is.

    Raises:
        ValueError: if that is not possible, with the reason and the line of the model's file.
    """
    kind = type(model).__name__
    _check_takes_one(model, x)
    if isinstance(model, moe.Mixture):
        raise ValueError(
            f"This {kind} chooses by the image which of {len(model.experts)} experts answers, so it has no row of"
            " layers; look at model.experts[0] and the gate or gateway, each by itself."
        )
    root = _sharing(model).eval()
    answer = root(x.clone())  # an error here is the model's own
    tracer = _Tracer(x.clone())
    try:
        with _sizes_are_traced(root):
            graph = tracer.trace(root)
    except Exception as reason:
        raise ValueError(
            f"torch.fx cannot trace this {kind}: {_reason(reason)}. Describe the parts that can be traced, each as a"
            " model of its own; or write it without `if` and loops over values, or hide the place in a"
            " function behind @fx.wrap."
        ) from reason
    if not tracer.layers:
        raise ValueError(f"This {kind} has no convolution and no linear layer, so there is nothing to describe.")
    return Followed(root, graph, tracer.layers, tracer.at, answer)


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules that has the same tensors, so that modes and traces leave the model alone."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return copy.deepcopy(model, {id(t): t for t in tensors})


class _Seen(fx.Proxy):
    """A value of the graph that knows what it is for x: sizes can be read, and an ``if`` on them decided."""

    value: Any = None
    from_image = True

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.value, name)
        plain = not callable(found) and not isinstance(found, Tensor) and name != "shape"
        if isinstance(self.value, Tensor) and (plain or name in FIXED):
            return found  # type, device, number of dimensions: the same for every batch
        if callable(found):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def known(self) -> Any:
        """The value for x, if it follows from sizes and weights alone."""
        if self.from_image:
            raise fx.proxy.TraceError(DECIDES)
        return self.value

    def __iter__(self) -> Iterator["_Seen"]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.value)

    def __index__(self) -> int:
        return self.known().__index__()

    def __int__(self) -> int:
        return int(self.known())

    def __float__(self) -> float:
        return float(self.known())


class _Tracer(fx.Tracer):
    """Follows a network and computes each value on the way; notes layers where they are called."""

    proxy_buffer_attributes = True

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.layers, self.at = x, [], {}
        self.computing = False  # then modules are called plainly

    def create_args_for_root(self, forward: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        """One value goes in; further arguments of the model keep their defaults."""
        x = self.create_proxy("placeholder", "x", (), {})
        return lambda root, x: forward(root, x), [self.root, x]

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaf = isinstance(module, Approximate | moe.Mixture | Matmul | nn.MultiheadAttention)
        return leaf or super().is_leaf_module(module, name)

    def call_module(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs) if self.computing else super().call_module(module, forward, args, kwargs)

    def getattr(self, name: str, value: Any, cache: dict[str, fx.Proxy]) -> Any:
        return value if self.computing else super().getattr(name, value, cache)

    def proxy(self, node: fx.Node) -> _Seen:
        return _Seen(node, self)

    def to_bool(self, value: fx.Proxy) -> bool:
        return bool(value.known())

    def create_proxy(self, kind: str, target: Any, args: tuple, kwargs: dict, *more: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **named)
        args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: a.value if isinstance(a, _Seen) else a)
        before, self.computing = self.computing, True
        try:
            proxy.value, layers = self._compute(proxy.node, kind, target, args, kwargs)
        finally:
            self.computing = before
        proxy.from_image = kind == "placeholder" or (_reads_values(kind, target, args) and _any_from_image(proxy.node))
        proxy.node.meta |= {"from_image": proxy.from_image, "is_tensor": isinstance(proxy.value, Tensor)}
        if layers:
            self.at[proxy.node] = (len(self.layers), len(layers))
            self.layers += layers
        return proxy

    def _compute(self, node: fx.Node, kind: str, target: Any, args: tuple, kwargs: dict) -> tuple[Any, list[Layer]]:
        if kind == "placeholder":
            return self.x, []
        if kind == "get_attr":
            value = self.root
            for part in target.split("."):
                value = getattr(value, part)
            return value, []
        if kind == "call_module":
            return layers_of_module(target, self.root.get_submodule(target), args, kwargs)
        if kind == "call_method":
            target, args = getattr(args[0], target), args[1:]
        return layers_of_call(self._name(node), target, args, kwargs)

    def _name(self, node: fx.Node) -> str:
        """Of a function's layer: that of the module whose weight it reads, or where it is called."""
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target.endswith(".weight"):
            return weight.target.removesuffix(".weight")
        return f"{self.scope.module_path}.{node.name}".lstrip(".")


def _any_from_image(node: fx.Node) -> bool:
    return any(one.meta.get("from_image", False) for one in node.all_input_nodes)


def _reads_values(kind: str, target: Any, args: tuple) -> bool:
    """Whether a call's result depends on more than the sizes of the tensors it is given."""
    if target is getattr and isinstance(args[0], Tensor):
        return args[1] != "shape"
    return not (target in (len, torch.numel) or (kind == "call_method" and target in SIZES))


def _traced(call: Callable) -> Callable:
    def instead(*args: Any, **kwargs: Any) -> Any:
        seen: list[_Seen] = []
        fx.node.map_aggregate((args, kwargs), lambda a: seen.append(a) if isinstance(a, _Seen) else a)
        return seen[0].tracer.create_proxy("call_function", call, args, kwargs) if seen else call(*args, **kwargs)

    return instead


@contextlib.contextmanager
def _sizes_are_traced(root: nn.Module) -> Iterator[None]:
    """While it lasts, ``len`` in the modules' own files and what makes tensors of a size give values of the graph."""
    spaces = [getattr(type(m).forward, "__globals__", {}) for m in root.modules()]
    spaces = {id(s): s for s in spaces if "len" not in s and not s.get("__name__", "torch.").startswith("torch.")}
    before = {name: getattr(torch, name) for name in MAKERS}
    try:
        for space in spaces.values():
            space["len"] = _traced(len)
        for name, call in before.items():
            setattr(torch, name, _traced(call))
        yield
    finally:
        for space in spaces.values():
            space.pop("len", None)
        for name, call in before.items():
            setattr(torch, name, call)


def _reason(error: Exception) -> str:
    """In a line: what happened, and in which line of the user's files."""
    ours = tuple(f"{Path(file).parent}/" for file in (torch.__file__, __file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    lines = str(error).strip().splitlines() or [type(error).__name__]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: `{frames[-1].line}`)" if frames else ""
    return lines[0].rstrip(".") + place


def _check_takes_one(model: nn.Module, x: Tensor) -> None:
    if not isinstance(model, nn.Module) or not isinstance(x, Tensor) or not x.ndim or not len(x):
        raise ValueError(
            f"describe() and split() were given a {type(model).__name__} and {_about(x)}; they take an nn.Module and a"
            " tensor [B, ...] with at least one image, as the model expects it."
        )
    given = list(inspect.signature(model.forward).parameters.values())
    needed = [p.name for p in given[1:] if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not given or needed:
        raise ValueError(
            f"The forward of this {type(model).__name__} takes {', '.join(p.name for p in given) or 'nothing'}; only"
            " models of one tensor can be described. Wrap it in a module that gives the others."
        )


def _about(x: Any) -> str:
    return f"a tensor {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"

"""What an answer costs: multiply-accumulates counted where they happen, and priced by an assignment.

    macs = count(network, images)                     every layer's products, executed and there to be executed
    price(macs, assignment_of(network), base=dense)   AxMoE's normalised cost, energy, delay

Products are counted by hooks on the layers that really run, so a mixture's cost is the expectation over where
these images were routed. AxMoE's measure (deduced from its published values, which the tests repeat) is

    P_norm = (M_eff / M_base) (f P_mult / P_exact + 1 - f)                                      (1)

M_eff the products executed for one input, M_base those of the dense network, f the share of M_eff that is
approximate, P the power of a multiplier. With an assignment of several multipliers it becomes the sum over layers

    P_norm = (1 / M_base) sum over l of M_l P_l / P_exact.                                      (2)

BatchNorm, activations, additions, memory and the routing of data cost nothing here, as they do there.

Chapter: 09, "What does accuracy cost?"
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from axmoe_lite import moe
from axmoe_lite.layers import Choice, Matmul, chosen_multiplier, evaluating
from axmoe_lite.layers.modules import Approximate
from axmoe_lite.multipliers import EXACT, Mosaic, Multiplier, multiplier

COUNTED = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, Matmul, Approximate)


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-accumulates of one layer for one input.

    Attributes:
        kind: ``"conv"``, ``"linear"`` or ``"product"`` (of two activations, as in attention).
        executed: the mean over the inputs that were counted; a fraction where some inputs go elsewhere.
        static: what it would be if every input came through.
    """

    kind: str
    executed: float
    static: float


@dataclass(frozen=True)
class Macs:
    """What :func:`count` found.

    Attributes:
        layers: by dotted name, in the network's order; layers that no input can reach are not there.
        parameters: numbers that the network stores and can learn, gates and BatchNorm among them.
        inputs: how many inputs the means are over.
    """

    layers: dict[str, LayerMacs]
    parameters: int
    inputs: int

    @property
    def executed(self) -> float:
        """M_eff: multiply-accumulates for one input, expected over the routing."""
        return sum(layer.executed for layer in self.layers.values())

    @property
    def static(self) -> float:
        """Multiply-accumulates if every expert computed every input."""
        return sum(layer.static for layer in self.layers.values())


@torch.no_grad()
def count(network: nn.Module, inputs: Tensor, *, attention: bool = True, batch_size: int = 250) -> Macs:
    """Count the multiply-accumulates of a network on some inputs, by hooks on the modules that run.

    Counted are convolutions, linear layers, :class:`~axmoe_lite.layers.Matmul` and ``nn.MultiheadAttention``,
    approximate or not; a padded position counts like any other.

    Args:
        network: any module; mixtures inside it are routed as these inputs make them. Of a frozen network, or part,
            the one that it was made from is counted: the same products.
        inputs: [N, ...] as the network expects them. One will do for a network without mixtures.
        attention: whether products of two activations count. Most published figures leave them out.

    Raises:
        ValueError: for no inputs.

    >>> from axmoe_lite.models import resnet20
    >>> macs = count(resnet20(classes=100), torch.zeros(1, 3, 32, 32))
    >>> round(macs.executed / 1e6, 2), macs.parameters  # as published: 40.82 million
    (40.82, 278324)
    """
    if not isinstance(inputs, Tensor) or batch_size < 1:
        raise ValueError(
            f"count() was given a {type(inputs).__name__} and batch_size = {batch_size}; give a tensor of inputs, and"
            " at least 1 at a time."
        )
    if not len(inputs):
        raise ValueError("count() was given no inputs; the mean over them needs at least one.")
    network = network.thaw() if hasattr(network, "thaw") else network
    with _thawed(network):
        return _counted(network, inputs, attention=attention, batch_size=batch_size)


def _counted(network: nn.Module, inputs: Tensor, *, attention: bool, batch_size: int) -> Macs:
    layers = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, COUNTED) and (attention or not _is_product(module))
    }
    executed, static = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)
    with evaluating(network):
        _run(network, inputs, layers, executed, attention=attention, batch_size=batch_size)
        few = inputs[: min(len(inputs), 2)]
        with moe.all_experts(network):
            _run(network, few, layers, static, attention=attention, batch_size=batch_size)
    found = {
        name: LayerMacs(_kind(module), executed[name] / len(inputs), static[name] / len(few))
        for name, module in layers.items()
        if static[name]
    }
    return Macs(found, sum(p.numel() for p in network.parameters()), len(inputs))


@contextmanager
def _thawed(network: nn.Module) -> Iterator[None]:
    """While it lasts, the network that a frozen part was made from stands in its place: hooks see nothing else run."""
    frozen = [
        (parent, name, part)
        for parent in network.modules()
        for name, part in parent._modules.items()
        if hasattr(part, "thaw")
    ]
    try:
        for parent, name, part in frozen:
            parent._modules[name] = part.thaw()
        yield
    finally:
        for parent, name, part in frozen:
            parent._modules[name] = part


def _run(
    network: nn.Module,
    inputs: Tensor,
    layers: dict[str, nn.Module],
    totals: dict[str, int],
    *,
    attention: bool,
    batch_size: int,
) -> None:
    def counter(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, named: dict[str, Any], output: Any) -> None:
            totals[name] += _macs(module, args, named, output, attention)

        return hook

    hooks = [module.register_forward_hook(counter(name), with_kwargs=True) for name, module in layers.items()]
    try:
        for batch in inputs.split(batch_size):
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, Matmul) or (isinstance(module, Approximate) and isinstance(module.exact, Matmul))


def _kind(module: nn.Module) -> str:
    module = module.exact if isinstance(module, Approximate) else module
    return (
        "product" if isinstance(module, Matmul) else "conv" if isinstance(module, nn.modules.conv._ConvNd) else "linear"
    )


def _macs(module: nn.Module, args: tuple, named: dict[str, Any], output: Any, attention: bool) -> int:
    """Of one call of one module."""
    if isinstance(module, nn.MultiheadAttention):
        return _attention_macs(module, *args, products=attention, **named)
    x = args[0] if args else named.get("a", named.get("input"))
    if _is_product(module):
        return x.shape[-1] * output.numel()
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.weight[0].numel() * x.numel()
    return module.weight[0].numel() * output.numel()


def _attention_macs(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *_: Any, products: bool, **__: Any
) -> int:
    """Four projections and two products; torch computes them in one call, so they have no modules of their own."""
    D, T, S = module.embed_dim, query.numel() // query.shape[-1], key.numel() // key.shape[-1]
    rows = query.shape[0] if module.batch_first else query.shape[1]
    images = rows if query.ndim == 3 else 1
    projections = 2 * T * D * D + S * D * (key.shape[-1] + value.shape[-1])
    return projections + (2 * T * (S // images) * D if products else 0)


# ----------------------------------------------------------------------------------- prices


@dataclass(frozen=True)
class Price:
    """What one input costs under an assignment.

    Attributes:
        p_norm: normalised inference cost, equation (2): 1 is the dense network under the exact multiplier.
        approximated_share: f, the share of executed multiply-accumulates under an assigned multiplier
            (the exact circuit too, if it is assigned: it stands where the approximate ones would), in [0, 1].
        energy_pj: sum over layers of M_l times power times delay of its multiplier, picojoules; products only.
        delay_ns: of the slowest multiplier in use, nanoseconds: what a common clock must wait for.
        serial_ms: one multiplier of each kind doing all products in turn, milliseconds.

        The last three are None where a multiplier in use has no published delay.
    """

    p_norm: float
    approximated_share: float
    energy_pj: float | None
    delay_ns: float | None
    serial_ms: float | None


def p_norm(*, executed: float, base: float, share: float, power_mw: float) -> float:
    """Equation (1): normalised inference cost of a network under one multiplier.

    Args:
        executed, base: M_eff and M_base, in the same unit.
        share: f, in [0, 1].
        power_mw: of the multiplier; the exact one's is known.

    >>> round(p_norm(executed=1, base=1, share=1, power_mw=0.301), 2)  # a dense CNN under L2J, as published
    0.71
    """
    known = all(isinstance(value, Real) for value in (executed, base, share, power_mw))
    if not known or not (0 <= share <= 1 and executed >= 0 and base > 0 and power_mw >= 0):
        raise ValueError(
            f"p_norm() was asked for executed = {executed}, base = {base}, share = {share}, power_mw = {power_mw};"
            " a share lies in [0, 1], executed is not negative and base is positive, power_mw is not negative."
        )
    return executed / base * (share * power_mw / multiplier(EXACT).power_mw + 1 - share)


def price(macs: Macs, assignment: Mapping[str, Choice], *, base: Macs | float | None = None) -> Price:
    """What one input costs when layers multiply as the assignment says, and all others exactly.

    Args:
        macs: of the network, from :func:`count`.
        assignment: dotted layer names to multipliers; need not be the one the network has now.
        base: M_base, or the :class:`Macs` of the dense network it is compared with; None: the network itself.

    Raises:
        ValueError: for a layer that was not counted, a multiplier without a power, or products of which there are none.

    >>> from axmoe_lite.layers import default_layers
    >>> from axmoe_lite.models import resnet20
    >>> network = resnet20(classes=100)
    >>> macs = count(network, torch.zeros(1, 3, 32, 32))
    >>> paid = price(macs, dict.fromkeys(default_layers(network), "mul8s_1L2L"))
    >>> round(paid.p_norm, 2), round(paid.approximated_share, 4)
    (0.47, 0.9998)
    """
    if not isinstance(macs, Macs) or not isinstance(assignment, Mapping):
        raise ValueError(
            f"price() was given a {type(macs).__name__} and a {type(assignment).__name__}; it takes what count()"
            " returns, and a dict from layers to multipliers, such as {'conv1': 'mul8s_1L2J'}."
        )
    chosen = {name: chosen_multiplier(choice) for name, choice in assignment.items()}
    _check_assignment(macs, chosen)
    exact = multiplier(EXACT)
    used = [(layer.executed, chosen.get(name, exact)) for name, layer in macs.layers.items()]
    total = macs.executed
    if not isinstance(base, Macs | Real | None):
        raise ValueError(f"base is {base!r}; give what count() returns for the dense network, a number, or None.")
    base_macs = total if base is None else base.executed if isinstance(base, Macs) else base
    if not total > 0 or not base_macs > 0:
        raise ValueError(
            f"price() was asked for {total:g} multiply-accumulates against a base of {base_macs:g}; both must be"
            " positive."
        )
    delays = [m.delay_ns for executed, m in used if executed]
    timed = bool(delays) and None not in delays
    return Price(
        p_norm=sum(n * m.power_mw for n, m in used) / exact.power_mw / base_macs,
        approximated_share=sum(macs.layers[name].executed for name in chosen) / total,
        energy_pj=sum(n * m.power_mw * m.delay_ns for n, m in used if n) if timed else None,
        delay_ns=max(delays) if timed else None,
        serial_ms=sum(n * m.delay_ns for n, m in used if n) / 1e6 if timed else None,
    )


def _check_assignment(macs: Macs, chosen: dict[str, Multiplier | Mosaic]) -> None:
    unknown = [name for name in chosen if name not in macs.layers]
    if unknown:
        raise ValueError(
            f"The assignment names {len(unknown)} layers that were not counted, such as {unknown[0]!r}; the counted"
            f" ones are {', '.join(macs.layers)}."
        )
    for name, m in chosen.items():
        if m.power_mw is None:
            raise ValueError(
                f"Layer {name!r} multiplies by {m.name!r}, whose power is not known; give it with"
                " dataclasses.replace(m, power_mw=...)."
            )

"""Mixtures in networks: put them there, see what they decide, steer them for a while.

Chapter: 07, "What if only some of the network answers?"
"""

import copy
import difflib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from axmoe_lite.moe.layers import ClusterMoE, Gate, HardMoE, Mixture, SoftMoE, check_option
from axmoe_lite.moe.routing import Routing


def mixture(
    network: nn.Module,
    layers: Iterable[str],
    *,
    topology: str = "hard",
    experts: int = 4,
    gate: str = "linear",
    per: str | None = None,
    jitter: float = 0.0,
    weighting: str = "probability",
    noise: float = 0.01,
    seed: int = 0,
) -> nn.Module:
    """Put a mixture in the place of each named layer, in place; the experts start as copies of the layer.

    Args:
        network: any module.
        layers: dotted names of modules that can be copied: convolutions, linear layers, a whole MLP.
        topology: ``"hard"`` or ``"soft"``.
        gate, jitter: see :class:`Gate`. Its size is read off the layer's first convolution or linear layer.
        per: what is routed; None means images where that is a convolution, else tokens.
        weighting: see :class:`HardMoE`.
        noise: each weight of a copy moves by a random amount of this many standard deviations of its tensor.
        seed: of the noise and of the gates.

    Raises:
        ValueError: for a layer that does not exist, is inside another that is named, or has no weights.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    >>> [name for name, _ in mixture(net, ["2"], experts=2).named_parameters()][2:5]
    ['2.experts.0.weight', '2.experts.0.bias', '2.experts.1.weight']
    """
    check_option("topology", topology, ("hard", "soft"))
    _check_experts(experts)
    names = list(layers)
    found = {name: _named(network, name) for name in names}
    for name in names:
        inside = [other for other in names if name != other and f"{name}.".startswith(f"{other}.")]
        if inside:
            raise ValueError(f"Layer {name!r} lies inside {inside[0]!r}, which is to become a mixture too; name one.")
    makers = {name: _gate_size(name, layer) for name, layer in found.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in found.items():
            features, natural = makers[name]
            chooser = Gate(features, experts, kind=gate, per=per or natural, jitter=jitter)
            chooser.to(next(layer.parameters()).device)
            copies = _copies(layer, experts, noise)
            new = HardMoE(copies, chooser, weighting=weighting) if topology == "hard" else SoftMoE(copies, chooser)
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, new.train(layer.training))
    return network


def cluster(
    network: nn.Module, gateway: nn.Module, *, experts: int = 4, noise: float = 0.0, seed: int = 0
) -> ClusterMoE:
    """A :class:`ClusterMoE` whose experts start as copies of ``network``; see :func:`mixture` for the arguments."""
    _check_experts(experts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ClusterMoE(_copies(network, experts, noise), gateway).train(network.training)


def _check_experts(experts: int) -> None:
    if experts < 1:
        raise ValueError(f"experts is {experts}; a mixture needs at least 1.")


@torch.no_grad()
def _copies(module: nn.Module, experts: int, noise: float) -> list[nn.Module]:
    copies = [copy.deepcopy(module) for _ in range(experts)]
    # Biases and norms stay, and so does a single number, which has no standard deviation.
    for parameter in (p for one in copies for p in one.parameters() if noise and p.ndim > 1 and p.numel() > 1):
        parameter.add_(torch.randn(parameter.shape).to(parameter) * (noise * parameter.std()))
    return copies


def _named(network: nn.Module, name: str) -> nn.Module:
    modules = dict(network.named_modules())
    if not name or name not in modules:
        near = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)[0]
        raise ValueError(f"This {type(network).__name__} has no layer {name!r}. Did you mean {near!r}?")
    return modules[name]


def _gate_size(name: str, layer: nn.Module) -> tuple[int, str]:
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels, "image"
        if isinstance(module, nn.Linear):
            return module.in_features, "token"
    raise ValueError(
        f"Layer {name!r} of type {type(layer).__name__} holds no nn.Conv2d and no nn.Linear, from which a gate could"
        " learn how many features come in; name one that does."
    )


def mixtures(network: nn.Module) -> dict[str, Mixture]:
    """All mixtures in a network by dotted name; the network itself, if it is one, is called ``""``."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Mixture)}


@contextmanager
def watching(network: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """While it lasts, what every mixture decides is noted: its name to one :class:`Routing` a call.

    >>> net = nn.Sequential(HardMoE([nn.Linear(2, 3)] * 2, Gate(2, 2, per="token")))
    >>> with watching(net) as seen:
    ...     _ = net(torch.zeros(6, 2))
    >>> seen["0"][0].probabilities.shape
    torch.Size([6, 2])
    """
    found = mixtures(network)
    before = {name: layer.seen for name, layer in found.items()}
    seen: dict[str, list[Routing]] = {name: [] for name in found}
    for name, layer in found.items():
        layer.seen = seen[name]
    try:
        yield seen
    finally:
        for name, layer in found.items():
            layer.seen = before[name]


@contextmanager
def _also(network: nn.Module, which: str) -> Iterator[None]:
    found = mixtures(network).values()
    before = [layer.also for layer in found]
    for layer in found:
        layer.also = which
    try:
        yield
    finally:
        for layer, value in zip(found, before, strict=True):
            layer.also = value


def no_idle_experts(network: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, an expert to which no item of a batch goes computes the whole batch; answers do not change.

    For calibration, which must see every expert at work, and each that is used on the items that go to it.
    """
    return _also(network, "idle")


def all_experts(network: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, every expert computes every item; answers do not change. For counting what is there."""
    return _also(network, "all")


@contextmanager
def gates_frozen(network: nn.Module) -> Iterator[None]:
    """While it lasts, gates do not learn and do not jitter: AxMoE's retraining."""
    gates = [module for module in network.modules() if isinstance(module, Gate)]
    before = [(gate.learns, [p.requires_grad for p in gate.parameters()]) for gate in gates]
    for gate in gates:
        gate.requires_grad_(False)
        gate.learns = False
    try:
        yield
    finally:
        for gate, (learns, flags) in zip(gates, before, strict=True):
            gate.learns = learns
            for parameter, flag in zip(gate.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)

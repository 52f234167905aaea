"""Dense, Hard, Soft, Cluster: the four topologies of AxMoE, made from any dense network.

    upcycle(resnet20(classes=100), topology="hard")      from a network that may have been trained before
    resnet20(classes=100, topology="hard", experts=4)    the same from fresh weights

In a CNN convolutions become mixtures, and BatchNorm and shortcuts stay; in a transformer whole MLPs do, and
attention stays; a cluster is made of whole networks.

Chapter: 07, "What if only some of the network answers?"
"""

import copy
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import nn

from axmoe_lite import moe
from axmoe_lite.layers import assignment_of, default_layers
from axmoe_lite.layers.network import check_module
from axmoe_lite.models.library import import_torchvision
from axmoe_lite.models.resnet import ResNet
from axmoe_lite.models.vit import ViT

TOPOLOGIES = ("dense", "hard", "soft", "cluster")
PLACEMENTS = ("last", "even")
OPTIONS = ("gate", "per", "jitter", "weighting", "noise")


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What ``make()`` builds when torch's random numbers start at ``seed``; the caller's are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def eligible(network: nn.Module) -> list[str]:
    """The parts of a dense network that may become mixtures, by dotted name, in the network's order.

    These are the modules called ``mlp``, as in a transformer; where there are none, the layers of
    :func:`~axmoe_lite.layers.default_layers` without the 1x1 convolutions on shortcuts.
    """
    mlps = [name for name, _ in network.named_modules() if name.rpartition(".")[2] == "mlp"]
    return mlps or default_layers(network, shortcuts=False)


def upcycle(
    network: nn.Module,
    *,
    topology: str,
    experts: int = 4,
    r: float = 0.5,
    placement: str = "last",
    gateway: nn.Module | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """The network in another topology, its experts copies of what was there; the network itself stays as it is.

    Not from the paper: four experts in half of the layers. (With them Soft costs 2.65 times Dense on ResNet-20, and the
    paper is said to report 2 to 3 times.) That experts start as copies is Komatsuzaki et al. (2023).

    Args:
        network: a dense network; for ``"dense"`` it is returned itself.
        topology: ``"dense"``, ``"hard"``, ``"soft"`` or ``"cluster"``.
        experts: E, at least 1.
        r: the fraction of :func:`eligible` layers that become mixtures, above 0 and at most 1; at least one does.
            A cluster has no such layers, and leaves it unread.
        placement: ``"last"``, from the last layer backwards; or ``"even"``, spread (r = 0.5: every other).
        gateway: for a cluster, a module from images to E scores, such as :func:`axmoe_lite.train.gateway_of` makes.
            None: ResNet-56, for a transformer torchvision's ResNet-50, as the costs reported by AxMoE suggest; with
            fresh weights, so that it routes by chance.
        seed: of noise, gates and an untrained gateway.
        options: ``gate``, ``per``, ``jitter``, ``weighting`` and ``noise``, see :func:`axmoe_lite.moe.mixture`.

    Raises:
        ValueError: for a topology, number or option that does not exist, or a network without eligible layers.

    >>> from axmoe_lite.models import resnet8
    >>> hard = upcycle(resnet8(classes=10), topology="hard", experts=2, r=0.25)
    >>> list(moe.mixtures(hard))
    ['layer3.0.conv1', 'layer3.0.conv2']
    """
    check_module(network)
    moe.check_option("topology", topology, TOPOLOGIES)
    moe.check_option("placement", placement, PLACEMENTS)
    for name in options:  # here, so that a typo is refused whatever the topology
        moe.check_option("An option of upcycle()", name, OPTIONS)
    if not isinstance(r, Real) or not 0 < r <= 1:
        raise ValueError(f"r is {r!r}; it is the fraction of layers that become mixtures, above 0 and at most 1.")
    if type(experts) is not int or experts < 1:
        raise ValueError(f"experts is {experts!r}; a mixture needs at least 1, a whole number.")
    if moe.mixtures(network):
        raise ValueError(
            f"This {type(network).__name__} has mixtures already; upcycle the dense network it was made of."
        )
    if topology == "dense":
        return network
    if assignment_of(network):
        raise ValueError(
            f"This {type(network).__name__} has approximate layers; restore() it, upcycle it, approximate the result."
        )
    if topology == "cluster":
        if gateway is not None:
            check_module(gateway)
        gateway = _gateway(network, experts, seed) if gateway is None else gateway
        return moe.cluster(network, gateway, experts=experts, seed=seed, **options)
    names = eligible(network)
    if not names:
        raise ValueError(f"This {type(network).__name__} has no convolution, linear layer or MLP to make a mixture of.")
    chosen = _placed(names, max(1, int(r * len(names) + 0.5)), placement)
    return moe.mixture(copy.deepcopy(network), chosen, topology=topology, experts=experts, seed=seed, **options)


def _placed(names: list[str], n: int, placement: str) -> list[str]:
    if placement == "last":
        return names[-n:]
    step = len(names) / n  # the last layer is always among them
    return [names[len(names) - 1 - int(i * step)] for i in reversed(range(n))]


def _gateway(network: nn.Module, experts: int, seed: int) -> nn.Module:
    if isinstance(network, ViT):
        return seeded(lambda: import_torchvision().models.resnet50(num_classes=experts), seed)
    return seeded(lambda: ResNet(9, experts, "projection"), seed).to(memory_format=torch.channels_last)

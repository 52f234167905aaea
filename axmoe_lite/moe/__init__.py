"""Mixtures of experts: several layers or networks stand where one stood, and a gate says which of them answer.

    HardMoE      the expert with the highest probability answers, and only it computes
    SoftMoE      all experts compute; their answers are added up, weighted by the probabilities
    ClusterMoE   a gateway network sends each image to one whole network

    mixture(network, ["layer3.2.conv2"], topology="hard", experts=4)    a layer becomes four, in place
    cluster(network, gateway, experts=4)                                a network becomes four and a gateway

An item is what is routed: an image, or a token. Routing is three lines, the same in all: probabilities from
the gate, :func:`dispatch` items to experts, :func:`combine` their answers. Experts know nothing of it.
This module knows nothing of approximation: the two meet in the dotted names of layers, as in
``layer3.2.conv2.experts.1``. A gate's layers are called ``gate`` or ``gateway``, and stay exact by that name.

Sources: Shazeer et al. (2017) for the weighted sum; Fedus et al. (2022, Switch Transformer), section 2.2, for
top-1 routing, the scaling by its probability, equation (4) for the load balance, and jitter; Komatsuzaki et
al. (2023) for experts that start as copies. AxMoE names the three kinds; its settings are not known to us.

Letters: N images, C channels, H x W pixels; B batch, T tokens, D features, E experts; I items.

Chapter: 07, "What if only some of the network answers?"
"""

from axmoe_lite.moe.layers import ClusterMoE, Gate, GroupedScores, HardMoE, Mixture, SoftMoE, check_option
from axmoe_lite.moe.networks import (
    all_experts,
    cluster,
    gates_frozen,
    mixture,
    mixtures,
    no_idle_experts,
    watching,
)
from axmoe_lite.moe.routing import Routing, RoutingStatistics, combine, dispatch, load_balance, statistics

__all__ = [
    "ClusterMoE",
    "Gate",
    "GroupedScores",
    "HardMoE",
    "Mixture",
    "Routing",
    "RoutingStatistics",
    "SoftMoE",
    "all_experts",
    "check_option",
    "cluster",
    "combine",
    "dispatch",
    "gates_frozen",
    "load_balance",
    "mixture",
    "mixtures",
    "no_idle_experts",
    "statistics",
    "watching",
]

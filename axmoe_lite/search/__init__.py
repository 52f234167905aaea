"""Which layer, or which expert, can bear which multiplier: assignments that are searched for, not guessed.

    experts      search: a front of assignments, expert by expert; groups, uniform, sensitivity, mixed_and_uniform
    space        explore, the search without a network: sensitivities, candidates, moves
    additive     what sensitivities that add up foretell, solved exactly
    ranking      search: plain sensitivity ranking, what one does without a method
    genetic      search: NSGA-II over the layers' multipliers, by pymoo
    noise        how much noise a layer bears, learned by gradient
    predict      how much a circuit's errors add up to in a layer, foretold from histograms, and simulated
    agn          search: the cheapest circuit within what a layer bears (AGN)
    qos          search: a few circuits for a few operating points (QoS-Nets)
    points       one network that switches between operating points while it runs
    maxdnn       search: a choice by layer, filter, channel, row or column, and skipping (MAx-DNN)
    pertinence   which network for which input, by a dispatcher that is searched for (PERTINENCE)
    pipeit       which core for which layer, and images through the stages (Pipe-it)
    places       which core type, and which multiplier, for each part of a mixture; not from a paper
    stream       images one after another through such a placement, in simulated time
    trial        one assignment on images that nobody reports: Trial, Score, Found, hold_out
    fronts       report on the test images; thin, dominates, compare

A method is a function ``search(network, images, multipliers, ...)`` that returns assignments, each a dict from dotted
layer names to multiplier names. It chooses on training images (:func:`hold_out` says which) and never sees the test
images; :func:`report` looks at those, once, when everything has been chosen. A mixture is compared with what the same
effort finds for the dense network layer by layer: else it would be credited with what mixing does for any network.

Chapters: 12, "A multiplier for each expert?", to 19, "Where should an expert live?".
"""

from axmoe_lite.search import agn, genetic, maxdnn, pertinence, pipeit, places, points, predict, qos, ranking, stream
from axmoe_lite.search.experts import groups, mixed_and_uniform, search, sensitivity, uniform
from axmoe_lite.search.fronts import Dominance, compare, dominates, report, thin
from axmoe_lite.search.noise import tolerances
from axmoe_lite.search.space import explore
from axmoe_lite.search.trial import REGIMES, Found, Score, Trial, hold_out

__all__ = [
    "REGIMES",
    "Dominance",
    "Found",
    "Score",
    "Trial",
    "agn",
    "compare",
    "dominates",
    "explore",
    "genetic",
    "groups",
    "hold_out",
    "maxdnn",
    "mixed_and_uniform",
    "pertinence",
    "pipeit",
    "places",
    "points",
    "predict",
    "qos",
    "ranking",
    "report",
    "search",
    "sensitivity",
    "stream",
    "thin",
    "tolerances",
    "uniform",
]

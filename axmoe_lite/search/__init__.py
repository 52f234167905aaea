"""Which layer, or which expert, can bear which multiplier: assignments that are searched for, not guessed.

    experts      search: a front of assignments, expert by expert; groups, uniform, sensitivity; not from the paper
    space        explore, the search without a network: sensitivities, candidates, moves; Found
    additive     what sensitivities that add up foretell, solved exactly
    trial        one assignment on images that nobody reports: Trial, Score, hold_out
    fronts       report on the test images; thin, dominates, compare

A method is a function ``search(network, images, multipliers, ...)`` that returns assignments, each a dict from dotted
layer names to multiplier names. It chooses on training images (:func:`hold_out` says which) and never sees the test
images; :func:`report` looks at those, once, when everything has been chosen. A mixture is compared with what the same
effort finds for the dense network layer by layer: else it would be credited with what mixing does for any network.

Chapter: 12, "A multiplier for each expert?"
"""

from axmoe_lite.search.experts import groups, search, sensitivity, uniform
from axmoe_lite.search.fronts import Dominance, compare, dominates, report, thin
from axmoe_lite.search.space import Found, explore
from axmoe_lite.search.trial import REGIMES, Score, Trial, hold_out

__all__ = [
    "REGIMES",
    "Dominance",
    "Found",
    "Score",
    "Trial",
    "compare",
    "dominates",
    "explore",
    "groups",
    "hold_out",
    "report",
    "search",
    "sensitivity",
    "thin",
    "uniform",
]

"""PERTINENCE: for each input the lightest network that is expected to be right, by a dispatcher of one linear layer.

    pool = look(networks, images)            every network once on the test images: answers, costs, features
    split = thirds(len(pool))                some teach, some choose, some are for the figure
    found = search(pool, split)              a front of dispatchers, by NSGA-II
    rows = report(pool, split, found)        what they are worth on the final images

    pool          Pool; routes, ideal, patterns, members; thirds
    look          look: run the networks, count what they cost, keep what they answered; unseen
    dispatcher    class_weights, fit, choose, score: many layers trained at once
    evolve        search: how the dispatcher is to be trained, by NSGA-II; ratios, taught
    report        report; singles, mixed, cascade: what one would do without it; compared: all of it
    frames        sequence, scene_change, when, follow, rules: a choice that is kept for some frames

A mixture of experts chooses by input inside a network; this chooses by input among networks. They may differ in their
architecture or in their multiplier: an approximate network is a cheap one (not from the paper).

Source: PERTINENCE (arXiv 2507.01695, v3).

Chapter: 18, "Which network for which input?"
"""

from axmoe_lite.search.pertinence.dispatcher import WEIGHTINGS, Layers, choose, class_weights, fit, loss, score
from axmoe_lite.search.pertinence.evolve import Routed, ratios, search, taught
from axmoe_lite.search.pertinence.frames import THRESHOLD, Film, Followed, follow, rules, scene_change, sequence, when
from axmoe_lite.search.pertinence.look import look, unseen
from axmoe_lite.search.pertinence.pool import Ideal, Pool, Split, ideal, members, patterns, routes, thirds
from axmoe_lite.search.pertinence.report import (
    bargains,
    best_single,
    cascade,
    cheapest,
    compared,
    gaps,
    mixed,
    report,
    singles,
    table,
)

__all__ = [
    "THRESHOLD",
    "WEIGHTINGS",
    "Film",
    "Followed",
    "Ideal",
    "Layers",
    "Pool",
    "Routed",
    "Split",
    "bargains",
    "best_single",
    "cascade",
    "cheapest",
    "choose",
    "class_weights",
    "compared",
    "fit",
    "follow",
    "gaps",
    "ideal",
    "look",
    "loss",
    "members",
    "mixed",
    "patterns",
    "ratios",
    "report",
    "routes",
    "rules",
    "scene_change",
    "score",
    "search",
    "sequence",
    "singles",
    "table",
    "taught",
    "thirds",
    "unseen",
    "when",
]

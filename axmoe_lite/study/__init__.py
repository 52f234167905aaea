"""AxMoE's question as one function: any network, topology and multiplier, before and after retraining.

    network = exact("resnet20", images, topology="hard", epochs=60, upcycle_epochs=20)    without approximation
    rows = measure(network, images, EVOAPPROX, retrain_epochs=5)               one a multiplier and regime
    rows = run("resnet20", images, topology="hard", multipliers=EVOAPPROX, regimes=REGIMES, epochs=60)  both in one
    rows = footprint("resnet20", classes=100, size=32)                         one a topology: counted, not trained

:func:`exact` keeps each stage in a folder and takes it from there the next time; :func:`measure` takes any network,
yours too. Both resume where they were interrupted.

    networks    build, footprint, exact
    rows        measure, in four regimes; which answers were right
    per_layer   errors_by_layer: how far each layer is off
    whole       run, at_hand, and settings for two CPU cores

Chapters: 09, "What does accuracy cost?", 11, "Does the paper hold?", and 13, "What do other signs give back?"
"""

from axmoe_lite.study.networks import NETWORKS, build, exact, footprint
from axmoe_lite.study.per_layer import errors_by_layer
from axmoe_lite.study.rows import REGIMES, measure, pack_answers, regimes_for, unpack_answers
from axmoe_lite.study.whole import AT_HAND, KEY, at_hand, run

__all__ = [
    "AT_HAND",
    "KEY",
    "NETWORKS",
    "REGIMES",
    "at_hand",
    "build",
    "errors_by_layer",
    "exact",
    "footprint",
    "measure",
    "pack_answers",
    "regimes_for",
    "run",
    "unpack_answers",
]

"""Training and measuring a network, exactly or under approximate products.

    loop           fit: the training loop, its schedule; Diverged
    measure        predict, evaluate, resilience
    recipes        how each architecture is trained
    retrain        calibrate, refresh_norms, retrain: what approximation breaks, training may heal
    clusters       gateway_of: who goes to which expert of a cluster
    checkpoints    save, load; half-finished training that resumes

Chapters: 05, "What happens to a network?", and 08, "Can a network learn its new arithmetic?"
"""

from axmoe_lite.train.checkpoints import load, save
from axmoe_lite.train.clusters import gateway_of
from axmoe_lite.train.loop import Diverged, fit, schedule
from axmoe_lite.train.measure import evaluate, predict, resilience
from axmoe_lite.train.recipes import recipe
from axmoe_lite.train.retrain import Retraining, calibrate, norms_of, refresh_norms, retrain

__all__ = [
    "Diverged",
    "Retraining",
    "calibrate",
    "evaluate",
    "fit",
    "gateway_of",
    "load",
    "norms_of",
    "predict",
    "recipe",
    "refresh_norms",
    "resilience",
    "retrain",
    "save",
    "schedule",
]

"""Calibrate a network, then heal it: approximate products forward, straight through them backward.

    calibrate(network, "mul8s_1L2L", images)     approximate() on training images, no expert left out
    retrain(network, images)                     five epochs; gates frozen, as AxMoE has it
    refresh_norms(network, images)               what of it BatchNorm's averages do alone, without any gradient

Chapter: 08, "Can a network learn its new arithmetic?"
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from axmoe_lite import moe
from axmoe_lite.datasets import Images, crop_flip
from axmoe_lite.layers import Assignment, approximate, assignment_of, evaluating
from axmoe_lite.train.loop import AUGMENTATIONS, Diverged, fit
from axmoe_lite.train.measure import evaluate
from axmoe_lite.train.recipes import recipe


def calibrate(
    network: nn.Module, assignment: Assignment, images: Images, *, n: int = 1000, **options: Any
) -> nn.Module:
    """:func:`~axmoe_lite.approximate` on ``n`` training images; experts that none of them reaches see all.

    Args:
        assignment, options: see :func:`~axmoe_lite.approximate`.
        n: images, at even steps through the training set, not augmented. Not from the paper: 1000.

    Returns:
        The same network.
    """
    seen = images.normalised(images.subset(n_train=n).x_train)
    return approximate(network, assignment, calibration=seen, **options)


@torch.no_grad()
def refresh_norms(
    network: nn.Module,
    images: Images,
    *,
    n: int = 2000,
    augment: str = "crop_flip",
    batch_size: int = 250,
    seed: int = 0,
) -> nn.Module:
    """Take BatchNorm's averages anew under the network's present products; no weight changes. Not from the paper.

    A control for :func:`retrain`, which does this too, besides learning. Gates and a gateway keep their averages,
    and so does a BatchNorm that no image reaches.

    Args:
        n: training images, at even steps through the set; averages are over their batches.
        augment: as in the training of the network, see :func:`fit`. It matters: the black borders of crops are in the
            averages that a network was trained with, and without them our
            ResNet-20 loses 5.3 points on CIFAR-100 in float32 (``data/results/norms_resnet20_cifar100.csv``).
        seed: of the augmentation.

    Returns:
        The same network, in place.

    Raises:
        ValueError: for a network in which no BatchNorm keeps averages, such as a transformer. Whatever is raised, or
            interrupts, leaves the averages as they were.
    """
    moe.check_option("augment", augment, AUGMENTATIONS)
    norms = norms_of(network)
    if not norms:
        raise ValueError(f"This {type(network).__name__} has no BatchNorm that keeps averages; retrain() still works.")
    generator = torch.Generator().manual_seed(seed)
    before = [(norm.momentum, {name: kept.clone() for name, kept in norm.named_buffers()}) for norm in norms]
    finished = False
    try:
        with evaluating(network):  # which gives every module its own mode back
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # each batch counts alike
                norm.train()
            for x in images.subset(n_train=n).x_train.split(batch_size):
                x = x if augment == "none" else crop_flip(x, generator=generator, flip=augment == "crop_flip")
                x = images.normalised(x.to(norms[0].running_mean.device))
                network(x.contiguous(memory_format=torch.channels_last))
        finished = True
    finally:
        for norm, (momentum, kept) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not (finished and norm.num_batches_tracked):
                norm.load_state_dict({**norm.state_dict(), **kept})
    return network


def norms_of(network: nn.Module) -> list[nn.Module]:
    """The BatchNorms of a network that keep averages, but those of gates and gateways."""
    gates = [module for module in network.modules() if isinstance(module, moe.Gate)]
    gates += [module.gateway for module in network.modules() if isinstance(module, moe.ClusterMoE)]
    spared = {part for gate in gates for part in gate.modules()}
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None and norm not in spared]


@dataclass(frozen=True)
class Retraining:
    """What :func:`retrain` did.

    Attributes:
        history: as of :func:`fit`, with a first row of epoch 0: the accuracy before, if it is measured at all.
        diverged: what was wrong, in words, if the loss became no number; else empty. The network is then as after
            the last epoch of ``history``.
    """

    history: list[dict]
    diverged: str

    @property
    def before(self) -> float | None:
        """Top-1 on the test images before retraining; None with ``evaluate_every=0``."""
        return self.history[0]["test_accuracy"]

    @property
    def after(self) -> float | None:
        """Top-1 on the test images after the last finished epoch, whether it is good or not."""
        return self.history[-1]["test_accuracy"]


def retrain(
    network: nn.Module, images: Images, *, epochs: int = 5, freeze_gates: bool = True, **options: Any
) -> Retraining:
    """Train a network under its approximate products, in place.

    The forward pass is the circuit's, bit for bit; the backward pass takes the products for exact (straight-through).
    Ranges of activations stay as calibrated; those of weights follow the weights.

    Args:
        network: one in which :func:`calibrate` or :func:`~axmoe_lite.approximate` has placed multipliers.
        freeze_gates: AxMoE's choice; otherwise gates learn too, with their load-balancing loss.
        options: of :func:`fit`, instead of those of :func:`~axmoe_lite.train.recipe`. Whether the paper keeps the
            load-balancing loss while gates are frozen is not known to us; ``balance_frozen=True`` does.

    Raises:
        ValueError: if no layer is approximate, or for an option that :func:`fit` refuses. Divergence raises nothing: it
            is a result, and is in the record.
    """
    if not assignment_of(network):
        raise ValueError(
            f"This {type(network).__name__} has no approximate layer, so there is nothing to get used to; call"
            " calibrate(network, multiplier, images) first, or fit() to train it exactly."
        )
    chosen = {"evaluate_every": 1, **recipe(network, stage="retrain"), **options}
    start = {"epoch": 0, "lr": 0.0, "loss": None, "train_accuracy": None, "seconds": 0.0}
    start["test_accuracy"] = evaluate(network, images, progress=False) if chosen["evaluate_every"] else None
    diverged = ""
    with moe.gates_frozen(network) if freeze_gates else contextlib.nullcontext():
        try:
            history = fit(network, images, epochs=epochs, **chosen)
        except Diverged as reason:
            history, diverged = reason.history, str(reason)
    return Retraining([start, *history], diverged)

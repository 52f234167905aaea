"""One network of the study from its training to its last row, and the settings for which there was time.

Chapter: 11, "Does the paper hold?"
"""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from axmoe_lite import cost
from axmoe_lite.datasets import Images
from axmoe_lite.models import TOPOLOGIES
from axmoe_lite.multipliers import multiplier
from axmoe_lite.study.networks import NETWORKS, check_known, device_of, exact
from axmoe_lite.study.rows import REGIMES, measure
from axmoe_lite.train import recipe

KEY = ("network", "topology", "experts", "r", "seed", "epochs", "upcycle_epochs", "multiplier", "regime")
KEY += ("retrain_epochs", "retrain_images", "retrain_lr")
"""The columns that name a row of :func:`run` among all others."""

_ON_CIFAR = {"images": "cifar100", "fit_options": {"precision": "bf16"}, "exact_options": {"gateway_epochs": 8}}
_ON_CIFAR |= {"retrain_epochs": 5, "retrain_images": 2500, "retrain_options": {"lr": 0.005}}
AT_HAND: dict[str, dict] = {
    "resnet8": {
        "images": "digits",
        "epochs": 6,
        "upcycle_epochs": 2,
        "gateway": "resnet8",
        "build_options": {"width": 0.5},
        "exact_options": {"gateway_options": {"width": 0.5}},
        "fit_options": {"batch_size": 64, "augment": "crop"},
        "retrain_epochs": 2,
        "retrain_images": 500,
        "retrain_options": {"lr": 0.02},
    },
    "resnet20": {**_ON_CIFAR, "epochs": 60, "upcycle_epochs": 3},
    "vgg11_bn": {**_ON_CIFAR, "epochs": 20, "upcycle_epochs": 3},
    "vgg19_bn": {**_ON_CIFAR, "epochs": 15, "upcycle_epochs": 2, "retrain_images": 1280},
    "vit_small": {
        "images": "tiny_imagenet_20",
        "epochs": 25,
        "upcycle_epochs": 3,
        "r": 0.25,
        "exact_options": {"gateway_epochs": 10},
        "fit_options": {"precision": "bf16"},
        "retrain_epochs": 5,
        "retrain_images": 640,
        "retrain_options": {"lr": 1e-4},
    },
}
"""How far two CPU cores get: a set of images for :func:`axmoe_lite.datasets.load`, and options of :func:`run`.

The paper is said to retrain on all images with lr 0.1. On so few images that ended far below where it began (52 % after
67 % on ResNet-20 under the exact circuit, tried once by hand), which 0.005 does not. How long it trains exactly is not
known. ResNet-8 is for digits, at the quick scale."""


_OF_EXACT = set(inspect.signature(exact).parameters) - {"images"}


def at_hand(
    network: str, images: Images, *, topology: str = "dense", start: nn.Module | None = None, **changes: Any
) -> nn.Module:
    """:func:`exact` with the settings of :data:`AT_HAND`.

    Args:
        network: a name in :data:`AT_HAND`.
        images: to learn from.
        start: the dense network that a mixture starts from; None: it is trained, or taken from the folder, first.
        changes: arguments of :func:`exact`, such as ``seed`` and ``folder``, or others than at hand.
    """
    check_known("network", network, AT_HAND)
    for name in changes:
        check_known("option of at_hand()", name, _OF_EXACT)
    settings = {"upcycle_epochs": 0, **AT_HAND[network], **changes}
    options = {key: value for key, value in settings.items() if key in _OF_EXACT}
    return exact(start or network, images, topology=topology, **{**settings.get("exact_options", {}), **options})


def run(
    network: str,
    images: Images,
    *,
    topology: str = "dense",
    multipliers: Iterable[str],
    epochs: int,
    upcycle_epochs: int = 0,
    experts: int = 4,
    r: float = 0.5,
    gateway: str = "resnet56",
    seed: int = 0,
    folder: Path | str | None = None,
    build_options: dict | None = None,
    fit_options: dict | None = None,
    retrain_options: dict | None = None,
    progress: bool = True,
    skip: Iterable[tuple[str, str]] = (),
    exact_options: dict | None = None,
    **measuring: Any,
) -> Iterator[dict]:
    """One network of the study from its training to its last row: :func:`exact`, then :func:`measure`.

    Args:
        folder: where training is kept, finished and half-finished; None: nowhere.
        retrain_options, skip, measuring: of :func:`measure`; the seed and ``fit_options`` go to retraining too.
        exact_options: further ones of :func:`exact`, such as ``gateway_epochs``.

    Returns:
        An iterator over the rows of :func:`measure`, each with ``network``, ``topology``, ``experts``, ``r``,
        ``gateway`` and ``upcycle_epochs`` (1, 0, "" and 0 for a dense network) and ``retrain_lr``.

    Raises:
        ValueError: by the call itself, before anything is trained: for a network, topology, gateway, regime or
            multiplier that does not exist.
    """
    multipliers = list(multipliers)
    measuring["regimes"] = None if measuring.get("regimes") is None else list(measuring["regimes"])
    for kind, names, known in (
        ("network", [network], NETWORKS),
        ("topology", [topology], TOPOLOGIES),
        ("gateway", [gateway], NETWORKS),
        ("regime", measuring.get("regimes") or (), REGIMES),
    ):
        for name in names:
            check_known(kind, name, known)
    for name in multipliers:
        if name != "float32":
            multiplier(name)

    def rows() -> Iterator[dict]:
        common = {"epochs": epochs, "seed": seed, "build_options": build_options, "fit_options": fit_options}
        common |= {"folder": folder, "progress": progress, "gateway": gateway, **(exact_options or {})}
        dense = exact(network, images, **common)
        base = cost.count(dense, images.normalised(images.x_test[:1].to(device_of(dense))))
        made, said = dense, {"experts": 1, "r": 0, "gateway": "", "upcycle_epochs": 0}
        if topology != "dense":
            mixture = {"topology": topology, "upcycle_epochs": upcycle_epochs, "experts": experts, "r": r}
            made = exact(dense if folder is None else network, images, **mixture, **common)
            said = {"experts": experts, "r": r, "gateway": "", "upcycle_epochs": upcycle_epochs}
            said |= {"r": 0, "gateway": gateway} if topology == "cluster" else {}  # which has no eligible layers
        chosen = {**recipe(made, stage="retrain"), "seed": seed, **(fit_options or {}), **(retrain_options or {})}
        name = f"retrain-{network}-{topology}-{images.name}-seed{seed}-{{multiplier}}.safetensors"
        file = None if folder is None else Path(folder) / name
        options = {"base": base, "skip": skip, "checkpoint": file, "progress": progress, "retrain_options": chosen}
        for row in measure(made, images, multipliers, **options, **measuring):
            lr = chosen["lr"] if row["regime"] == "retrained" else 0
            yield {"network": network, "topology": topology, **said, **row, "retrain_lr": lr}

    return rows()

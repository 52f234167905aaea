"""The networks of the study: built, counted in each topology, and trained without approximation.

Chapter: 09, "What does accuracy cost?"
"""

import copy
import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from axmoe_lite import cost, models, paths
from axmoe_lite.datasets import Images
from axmoe_lite.layers import default_layers
from axmoe_lite.models import upcycle
from axmoe_lite.multipliers import EXACT
from axmoe_lite.train import fit, gateway_of, load
from axmoe_lite.train import recipe as recipe_of
from axmoe_lite.train.clusters import CLUSTERS

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": models.resnet8,
    "resnet20": models.resnet20,
    "resnet56": models.resnet56,
    "vgg11_bn": models.vgg11_bn,
    "vgg19_bn": models.vgg19_bn,
    "mobilenet_v2": models.mobilenet_v2,
    "vit_small": models.vit_small,
}


def build(network: str, images: Images, *, seed: int = 0, **options: object) -> nn.Module:
    """A fresh dense network that fits a set of images.

    Args:
        network: one of :data:`NETWORKS`.
        options: of its factory, such as ``width`` or ``shortcut``.

    >>> from axmoe_lite import datasets
    >>> build("resnet8", datasets.synthetic(classes=3, size=8, n_train=9, n_test=3)).fc
    Linear(in_features=64, out_features=3, bias=True)
    """
    check_known("network", network, NETWORKS)
    if network == "vit_small":
        size = images.x_train.shape[-1]
        options = {"image_size": size, "patch": max(1, size // 8), **options}  # 64 patches, as 8 at 64 x 64
    return NETWORKS[network](classes=len(images.classes), seed=seed, **options)


def footprint(
    network: str,
    *,
    classes: int,
    size: int,
    topologies: Iterable[str] = models.TOPOLOGIES,
    attention: bool = True,
    build_options: dict | None = None,
    **mixture: Any,
) -> list[dict]:
    """What one image costs in each topology, counted on networks with fresh weights.

    Args:
        network: one of :data:`NETWORKS`.
        size: of the images, in pixels.
        attention: see :func:`axmoe_lite.cost.count`.
        build_options: of the network's factory, such as ``width``.
        mixture: ``experts``, ``r`` and others, see :func:`~axmoe_lite.models.upcycle`.

    Returns:
        One dict a topology: ``network``, ``topology``; products of the dense network (``base``), ``executed``
        for one image, and ``stored`` (if every expert answered); ``parameters``; ``approximated_share`` of what is
        executed, if all :func:`~axmoe_lite.layers.default_layers` have a multiplier.

    >>> [(row["topology"], row["executed"]) for row in footprint("resnet8", classes=10, size=8, topologies=["soft"])]
    [('soft', 2093248.0)]
    """
    check_known("network", network, NETWORKS)
    sized = {"image_size": size} if network == "vit_small" else {}
    image = torch.zeros(1, 3, size, size)
    dense = NETWORKS[network](classes=classes, **sized, **(build_options or {}))
    base = cost.count(dense, image, attention=attention).executed
    rows = []
    for topology in topologies:
        made = upcycle(dense, topology=topology, **mixture)
        macs = cost.count(made, image, attention=attention)
        paid = cost.price(macs, dict.fromkeys(default_layers(made), EXACT))
        rows.append(
            {
                "network": network,
                "topology": topology,
                "base": base,
                "executed": macs.executed,
                "stored": macs.static,
                "parameters": macs.parameters,
                "approximated_share": paid.approximated_share,
            }
        )
    return rows


def exact(
    network: str | nn.Module,
    images: Images,
    *,
    topology: str = "dense",
    epochs: int,
    upcycle_epochs: int = 0,
    experts: int = 4,
    r: float = 0.5,
    by: str = "features",
    gateway: str = "resnet56",
    gateway_epochs: int | None = None,
    seed: int = 0,
    build_options: dict | None = None,
    upcycle_options: dict | None = None,
    gateway_options: dict | None = None,
    fit_options: dict | None = None,
    folder: Path | str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> nn.Module:
    """A network in a topology, trained without approximation: dense first, then as a mixture of its copies.

    Args:
        network: a name for :func:`build`; or a dense network that is trained already, which then stays as it is.
        epochs: of the dense network.
        upcycle_epochs: of the mixture.
        experts, r: see :func:`~axmoe_lite.models.upcycle`; ``upcycle_options`` for the others there.
        by: how a cluster's images are grouped, see :func:`~axmoe_lite.train.gateway_of`.
        gateway: the network of a cluster's gateway, trained on the classes for ``gateway_epochs`` (None: ``epochs``).
            Not from the paper: ResNet-56 for a transformer too.
        build_options, gateway_options: of :func:`build`, for the dense network and for the gateway.
        fit_options: of :func:`~axmoe_lite.train.fit`, instead of those of its recipes.
        folder: where each stage is kept after every epoch. None: nowhere. A mixture's file is named after the weights
            and options it began with, so that others never resume from it. A dense network that was trained with the
            same settings and is in ``data/checkpoints`` is taken from there.
        device: of networks that are built here; one that is given stays where it is.

    Returns:
        The network. Its gates, gateway and experts are named as in :mod:`axmoe_lite.moe`.

    Raises:
        ValueError: for a network, topology, gateway or grouping that does not exist, before anything is trained.
    """
    if isinstance(network, str):
        check_known("network", network, NETWORKS)
    check_known("topology", topology, models.TOPOLOGIES)
    check_known("gateway", gateway, NETWORKS)
    check_known("grouping (by=)", by, CLUSTERS)
    chosen = {"progress": progress, **(fit_options or {})}

    def learn(model: nn.Module, name: str, stage: str, n_epochs: int, origin: str = "") -> nn.Module:
        options = {**recipe_of(model, stage=stage), **chosen}
        file = f"fit-{name}-{images.name}-seed{seed}-epochs{n_epochs}{origin}.safetensors"
        file = None if folder is None else Path(folder) / file
        stored = paths.checkpoints_dir() / f"{name}-{images.name}-seed{seed}-epochs{n_epochs}.safetensors"
        asked = {"dataset": images.name, "data": images.digest, "epochs": n_epochs, "seed": seed, **options}
        if not (stage == "train" and stored.exists() and _taken(model, stored, asked)):
            fit(model, images, epochs=n_epochs, seed=seed, checkpoint=file, **options)
        return model

    if isinstance(network, str):
        dense = build(network, images, seed=seed, **(build_options or {})).to(device)
        learn(dense, network, "train", epochs, _unusual(build_options))
    else:
        dense = network
    if topology == "dense":
        return dense
    options = {"experts": experts, "r": r, "seed": seed, **(upcycle_options or {})}
    gateway_epochs = epochs if gateway_epochs is None else gateway_epochs
    given = (options, by, gateway, gateway_epochs, gateway_options) if topology == "cluster" else options
    origin = f"-from-{digest_of(dense, given)}"
    if topology == "cluster":
        teacher = build(gateway, images, seed=seed, **(gateway_options or {})).to(device_of(dense))
        learn(teacher, gateway, "train", gateway_epochs, _unusual(gateway_options))
        options["gateway"] = gateway_of(teacher, images, experts=experts, by=by, seed=seed)
    name = f"{network if isinstance(network, str) else type(network).__name__}-{topology}{experts}"
    return learn(upcycle(dense, topology=topology, **options), name, "upcycle", upcycle_epochs, origin)


def _taken(model: nn.Module, stored: Path, asked: dict) -> bool:
    """Load the weights if they were trained as asked, and say whether they were."""
    try:
        recipe = load(copied := copy.deepcopy(model), stored)
    except ValueError:  # another width, or another number of classes
        return False
    usual = {name: p.default for name, p in inspect.signature(fit).parameters.items()}
    made = {**usual, **recipe_of(model, stage="train"), **recipe}
    if any(made.get(key) != value for key, value in asked.items() if key != "progress"):
        return False
    model.load_state_dict(copied.state_dict())
    return True


def device_of(network: nn.Module) -> torch.device:
    """Where a network's weights are."""
    return next(network.parameters()).device


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise ValueError, with the nearest name, for a name that is not among the known ones."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No {kind} is called {name!r}.{hint} There are {', '.join(known) or 'none'}.")


def _unusual(options: dict | None) -> str:
    """What a file's name says of options for :func:`build`: nothing where there are none."""
    return f"-{hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]}" if options else ""


def digest_of(network: nn.Module, options: object) -> str:
    """Eight letters that differ where the weights or the options do."""
    found = hashlib.sha256(repr(options).encode())
    for name, value in network.state_dict().items():
        found.update(name.encode() + value.detach().cpu().double().numpy().tobytes())
    return found.hexdigest()[:8]

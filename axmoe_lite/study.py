"""AxMoE's question as one function: any network, topology and multiplier, before and after retraining.

    network = exact("resnet20", images, topology="hard", epochs=60, upcycle_epochs=20)    without approximation
    rows = measure(network, images, EVOAPPROX, retrain_epochs=5)               one a multiplier and regime
    rows = run("resnet20", images, topology="hard", multipliers=EVOAPPROX, regimes=REGIMES, epochs=60)  both in one
    rows = footprint("resnet20", classes=100, size=32)                         one a topology: counted, not trained

:func:`exact` keeps each stage in a folder and takes it from there the next time; :func:`measure` takes any network,
yours too. Both resume where they were interrupted.

Chapter: 09, "What does accuracy cost?"
"""

import base64
import copy
import difflib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import cost, models, moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximable, assignment_of, default_layers
from axmoe_lite.layers.correction import correct_bias
from axmoe_lite.models import upcycle
from axmoe_lite.multipliers import EXACT, errors, multiplier
from axmoe_lite.train import calibrate, fit, gateway_of, norms_of, predict, recipe, refresh_norms, retrain
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

The paper is said to retrain on all images with lr 0.1. On so few images that ends far below where it began (52 % after
67 % on ResNet-20 under the exact circuit), which 0.005 does not. How long it trains exactly is not known. ResNet-8 is
for digits, at the quick scale."""

REGIMES = ("not retrained", "bias corrected", "norms refreshed", "retrained")


def build(network: str, images: Images, *, seed: int = 0, **options: object) -> nn.Module:
    """A fresh dense network that fits a set of images.

    Args:
        network: one of :data:`NETWORKS`.
        options: of its factory, such as ``width`` or ``shortcut``.

    >>> from axmoe_lite import datasets
    >>> build("resnet8", datasets.synthetic(classes=3, size=8, n_train=9, n_test=3)).fc
    Linear(in_features=64, out_features=3, bias=True)
    """
    _check_known("network", network, NETWORKS)
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
    _check_known("network", network, NETWORKS)
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
            and options it began with, so that others never resume from it.
        device: of networks that are built here; one that is given stays where it is.

    Returns:
        The network. Its gates, gateway and experts are named as in :mod:`axmoe_lite.moe`.

    Raises:
        ValueError: for a network, topology, gateway or grouping that does not exist, before anything is trained.
    """
    if isinstance(network, str):
        _check_known("network", network, NETWORKS)
    _check_known("topology", topology, models.TOPOLOGIES)
    _check_known("gateway", gateway, NETWORKS)
    _check_known("grouping (by=)", by, CLUSTERS)
    chosen = {"progress": progress, **(fit_options or {})}

    def learn(model: nn.Module, name: str, stage: str, n_epochs: int, origin: str = "") -> nn.Module:
        options = {**recipe(model, stage=stage), **chosen}
        file = f"fit-{name}-{images.name}-seed{seed}-epochs{n_epochs}{origin}.safetensors"
        file = None if folder is None else Path(folder) / file
        fit(model, images, epochs=n_epochs, seed=seed, checkpoint=file, **options)
        return model

    if isinstance(network, str):
        dense = build(network, images, seed=seed, **(build_options or {})).to(device)
        learn(dense, network, "train", epochs)
    else:
        dense = network
    if topology == "dense":
        return dense
    options = {"experts": experts, "r": r, "seed": seed, **(upcycle_options or {})}
    gateway_epochs = epochs if gateway_epochs is None else gateway_epochs
    given = (options, by, gateway, gateway_epochs, gateway_options) if topology == "cluster" else options
    origin = f"-from-{_digest(dense, given)}"
    if topology == "cluster":
        teacher = build(gateway, images, seed=seed, **(gateway_options or {})).to(_device(dense))
        learn(teacher, gateway, "train", gateway_epochs)
        options["gateway"] = gateway_of(teacher, images, experts=experts, by=by, seed=seed)
    name = f"{network if isinstance(network, str) else type(network).__name__}-{topology}{experts}"
    return learn(upcycle(dense, topology=topology, **options), name, "upcycle", upcycle_epochs, origin)


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
    """
    common = {"epochs": epochs, "seed": seed, "build_options": build_options, "fit_options": fit_options}
    common |= {"folder": folder, "progress": progress, "gateway": gateway, **(exact_options or {})}
    dense = exact(network, images, **common)
    base = cost.count(dense, images.normalised(images.x_test[:1].to(_device(dense))))
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


def measure(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    regimes: Iterable[str] | None = None,
    retrain_epochs: int = 0,
    retrain_images: int | None = None,
    base: cost.Macs | float | None = None,
    layers: Iterable[str] | None = None,
    calibrate_options: dict | None = None,
    retrain_options: dict | None = None,
    skip: Iterable[tuple[str, str]] = (),
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Iterator[dict]:
    """Accuracy and cost of an exactly trained network under each multiplier; rows come as they are measured.

    Args:
        network: any network; it is left as it was.
        multipliers: names, each given to all of ``layers``; ``"float32"`` is the network as it is.
        regimes: which of :data:`REGIMES` to measure. None: the network as it is, and retrained if there are epochs.
            Each starts from the same calibrated network. ``"bias corrected"`` is
            :func:`~axmoe_lite.layers.correction.correct_bias` on 500 training images; ``"norms refreshed"`` is
            :func:`~axmoe_lite.train.refresh_norms`, left out where there is no BatchNorm. Neither is from the paper.
        retrain_epochs: of :func:`~axmoe_lite.train.retrain`, for rows of the regime ``"retrained"``.
        retrain_images: how many training images an epoch of it sees, the same in each; None: all.
        base: what the cost is relative to, :func:`axmoe_lite.cost.count` of the dense network; None: this network.
        layers: dotted names; None: :func:`~axmoe_lite.layers.default_layers`.
        calibrate_options, retrain_options: see :func:`~axmoe_lite.train.calibrate` (``n``, ``per_channel``) and
            :func:`~axmoe_lite.train.retrain` (``seed``, ``lr``).
        skip: (multiplier, regime) pairs that are known already.
        checkpoint: a file name for half-finished retraining, in which ``{multiplier}`` becomes the name. It is
            removed when the row after it is asked for, or the end.

    Returns:
        An iterator over dicts, one a multiplier and regime: ``multiplier``, ``regime``, ``retrain_epochs``,
        ``retrain_images``, ``top1`` in [0, 1], ``correct``, ``outcome`` ("", or why retraining stopped), ``p_norm``,
        ``approximated_share``, ``macs`` (executed for an input), ``macs_static``, ``parameters``, ``energy_pj``,
        ``delay_ns``, ``digest`` of the table, ``power_mw``, ``mean_error``, ``seconds`` (of this row alone), and
        ``answers``, which test images were right, see :func:`unpack_answers`.

    Raises:
        ValueError: by the call itself, before anything is measured: for a multiplier, layer or regime that does not
            exist, a multiplier without a power, or a network that is approximate already.
    """
    names, known = list(multipliers), set(skip)
    tables = {name: None if name == "float32" else multiplier(name) for name in names}
    if assignment_of(network):
        raise ValueError(
            f"This {type(network).__name__} has approximate layers already; restore() it before measure()."
        )
    layers = default_layers(network) if layers is None else list(layers)
    for name in layers:
        _check_known("layer", name, approximable(network))
    if retrain_epochs < 0:
        raise ValueError(f"retrain_epochs is {retrain_epochs}; it is at least 0, and 0 retrains nothing.")
    regimes = ["not retrained", "retrained"] if regimes is None else list(regimes)
    for regime in (*regimes, *(regime for _, regime in known)):
        _check_known("regime", regime, REGIMES)
    few = images.subset(n_train=retrain_images)
    retraining = {
        "epochs": retrain_epochs,
        "options": {"images": few, "evaluate_every": 0, "progress": progress, **(retrain_options or {})},
    }
    regimes = [
        r for r in regimes if (r != "retrained" or retrain_epochs) and (r != "norms refreshed" or norms_of(network))
    ]
    macs = cost.count(network, images.normalised(images.subset(n_test=1000).x_test.to(_device(network))))
    prices = {
        name: cost.price(macs, dict.fromkeys(layers, table) if table else {}, base=base)
        for name, table in tables.items()
    }

    def one(name: str, wanted: list[str]) -> Iterator[dict]:
        calibrated, start, table = copy.deepcopy(network), time.perf_counter(), tables[name]
        file = None if checkpoint is None else str(checkpoint).replace("{multiplier}", name.replace(":", "-"))
        if table is not None:
            calibrate(calibrated, dict.fromkeys(layers, table), images, **(calibrate_options or {}))
        for regime in wanted:
            healed = calibrated if regime == wanted[-1] else copy.deepcopy(calibrated)
            outcome = _heal(healed, regime, images, checkpoint=file, **retraining)
            right = predict(healed, images, progress=False) == images.y_test.cpu()
            retrained = regime == "retrained"
            yield {
                "multiplier": name,
                "regime": regime,
                "retrain_epochs": retrain_epochs if retrained else 0,
                "retrain_images": len(few.x_train) if retrained else 0,
                "top1": int(right.sum()) / len(right),
                "correct": int(right.sum()),
                "outcome": outcome,
                **_paid(prices[name], macs),
                "digest": table.digest if table else "float32",
                "power_mw": (table or multiplier(EXACT)).power_mw,
                "mean_error": errors(table).mean_error if table else 0.0,
                "seconds": round(time.perf_counter() - start, 2),
                "answers": pack_answers(right),
            }
            start = time.perf_counter()  # what the caller did with the row is not the next row's time
        if file is not None and "retrained" in wanted:
            for epoch in range(1, retrain_epochs + 1):
                Path(file.replace("{epoch}", str(epoch))).unlink(missing_ok=True)

    def rows() -> Iterator[dict]:
        for name in tqdm(names, desc="measure", disable=not progress):
            possible = REGIMES[:1] if name == "float32" else REGIMES
            wanted = [regime for regime in regimes if regime in possible and (name, regime) not in known]
            if wanted:
                yield from one(name, wanted)

    return rows()


def _heal(
    network: nn.Module, regime: str, images: Images, *, checkpoint: str | None, epochs: int, options: dict
) -> str:
    """Bring a calibrated network into a regime, in place; what went wrong, if anything did."""
    if regime == "bias corrected":
        some = images.subset(n_train=500).x_train.to(_device(network))
        with moe.no_idle_experts(network):
            correct_bias(network, images.normalised(some))
    if regime == "norms refreshed":
        refresh_norms(network, images, augment=options.get("augment", "crop_flip"))
    if regime == "retrained":
        return retrain(network, epochs=epochs, checkpoint=checkpoint, **options).diverged
    return ""


def _paid(paid: cost.Price, macs: cost.Macs) -> dict:
    return {
        "p_norm": paid.p_norm,
        "approximated_share": paid.approximated_share,
        "macs": macs.executed,
        "macs_static": macs.static,
        "parameters": macs.parameters,
        "energy_pj": paid.energy_pj,
        "delay_ns": paid.delay_ns,
    }


def pack_answers(right: Tensor) -> str:
    """Which test images were answered right, bool [N], as base64 of their bits in the order of the set.

    >>> pack_answers(torch.tensor([True, False, True]))
    'oA=='
    """
    return base64.b64encode(np.packbits(np.asarray(right, bool))).decode()


def unpack_answers(text: str, n: int) -> np.ndarray:
    """The inverse of :func:`pack_answers`: bool [N] for N = ``n`` test images.

    >>> unpack_answers("oA==", 3)
    array([ True, False,  True])
    """
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    if len(bits) != -(-n // 8):
        raise ValueError(f"{len(bits)} bytes of answers cannot belong to {n} test images, which take {-(-n // 8)}.")
    return np.unpackbits(bits, count=n).astype(bool)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _check_known(kind: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"No {kind} is called {name!r}.{hint} There are {', '.join(known) or 'none'}.")


def _digest(network: nn.Module, options: object) -> str:
    """Eight letters that differ where the weights or the options do."""
    found = hashlib.sha256(repr(options).encode())
    for name, value in network.state_dict().items():
        found.update(name.encode() + value.detach().cpu().double().numpy().tobytes())
    return found.hexdigest()[:8]

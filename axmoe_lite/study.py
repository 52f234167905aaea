"""AxMoE's question as one function: any network, topology and multiplier, before and after retraining.

    network = exact("resnet20", images, topology="hard", epochs=60, upcycle_epochs=20)    without approximation
    rows = measure(network, images, EVOAPPROX, retrain_epochs=5)               one a multiplier and regime

:func:`exact` keeps each stage in a folder and takes it from there the next time; :func:`measure` takes any network,
yours too. Both resume where they were interrupted.

Chapter: 09, "What does accuracy cost?"
"""

import copy
import difflib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import cost, models, moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import assignment_of, default_layers
from axmoe_lite.models import upcycle
from axmoe_lite.multipliers import EXACT, errors, multiplier
from axmoe_lite.train import calibrate, fit, gateway_of, predict, recipe, retrain

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": models.resnet8,
    "resnet20": models.resnet20,
    "resnet56": models.resnet56,
    "vgg11_bn": models.vgg11_bn,
    "vgg19_bn": models.vgg19_bn,
    "mobilenet_v2": models.mobilenet_v2,
    "vit_small": models.vit_small,
}
REGIMES = ("not retrained", "retrained")


def build(network: str, images: Images, *, seed: int = 0, **options: object) -> nn.Module:
    """A fresh dense network that fits a set of images.

    Args:
        network: one of :data:`NETWORKS`.
        options: of its factory, such as ``width`` or ``shortcut``.

    >>> from axmoe_lite import datasets
    >>> build("resnet8", datasets.synthetic(classes=3, size=8, n_train=9, n_test=3)).fc
    Linear(in_features=64, out_features=3, bias=True)
    """
    if network not in NETWORKS:
        near = difflib.get_close_matches(network, NETWORKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"No network is called {network!r}. Did you mean {near!r}? There are {', '.join(NETWORKS)}.")
    if network == "vit_small":
        size = images.x_train.shape[-1]
        options = {"image_size": size, "patch": max(1, size // 8), **options}  # 64 patches, as 8 at 64 x 64
    return NETWORKS[network](classes=len(images.classes), seed=seed, **options)


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
    fit_options: dict | None = None,
    folder: Path | str | None = None,
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
        fit_options: of :func:`~axmoe_lite.train.fit`, instead of those of its recipes.
        folder: where each stage is kept after every epoch. None: nowhere.

    Returns:
        The network. Its gates, gateway and experts are named as in :mod:`axmoe_lite.moe`.
    """
    moe.check_option("topology", topology, models.TOPOLOGIES)
    chosen = {"progress": progress, **(fit_options or {})}

    def learn(model: nn.Module, name: str, stage: str, n_epochs: int) -> nn.Module:
        options = {**recipe(model, stage=stage), **chosen}
        file = f"fit-{name}-{images.name}-seed{seed}-epochs{n_epochs}.safetensors"
        file = None if folder is None else Path(folder) / file
        fit(model, images, epochs=n_epochs, seed=seed, checkpoint=file, **options)
        return model

    if isinstance(network, str):
        dense = learn(build(network, images, seed=seed, **(build_options or {})), network, "train", epochs)
    else:
        dense = network
    if topology == "dense":
        return dense
    name = f"{network if isinstance(network, str) else type(network).__name__}-{topology}{experts}"
    options = {"experts": experts, "r": r, "seed": seed, **(upcycle_options or {})}
    if topology == "cluster":
        teacher = build(gateway, images, seed=seed)
        learn(teacher, gateway, "train", epochs if gateway_epochs is None else gateway_epochs)
        options["gateway"] = gateway_of(teacher, images, experts=experts, by=by, seed=seed)
        name += f"-{by}"
    else:
        name += f"-r{r:g}"
    return learn(upcycle(dense, topology=topology, **options), name, "upcycle", upcycle_epochs)


def measure(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    retrain_epochs: int = 0,
    base: cost.Macs | None = None,
    layers: Iterable[str] | None = None,
    retrain_options: dict | None = None,
    skip: Iterable[tuple[str, str]] = (),
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Iterator[dict]:
    """Accuracy and cost of an exactly trained network under each multiplier; rows come as they are measured.

    Args:
        network: any network; it is left as it was.
        multipliers: names, each given to all of ``layers``; ``"float32"`` is the network as it is.
        retrain_epochs: if not 0, a second row for each after so many epochs of :func:`~axmoe_lite.train.retrain`.
        base: what the cost is relative to, :func:`axmoe_lite.cost.count` of the dense network; None: this network.
        layers: dotted names; None: :func:`~axmoe_lite.layers.default_layers`.
        retrain_options: see :func:`~axmoe_lite.train.retrain`.
        skip: (multiplier, regime) pairs that are known already.
        checkpoint: a file name for half-finished retraining, in which ``{multiplier}`` becomes the name.

    Yields:
        Dicts: ``multiplier``, ``regime``, ``retrain_epochs``, ``top1`` in [0, 1], ``correct``, ``outcome`` ("", or why
        retraining stopped), ``p_norm``, ``approximated_share``, ``macs`` (executed for an input), ``macs_static``,
        ``parameters``, ``energy_pj``, ``delay_ns``, ``digest`` of the table, ``power_mw``, ``mean_error``, ``seconds``.

    Raises:
        ValueError: for a multiplier or layer that does not exist, before anything is measured.
    """
    names, known = list(multipliers), set(skip)
    tables = {name: None if name == "float32" else multiplier(name) for name in names}
    layers = default_layers(network) if layers is None else list(layers)
    todo = [
        (name, regimes)
        for name in names
        if (regimes := [regime for regime in _regimes(name, retrain_epochs) if (name, regime) not in known])
    ]
    macs = cost.count(network, images.normalised(images.subset(n_test=1000).x_test.to(_device(network))))
    for name, regimes in tqdm(todo, desc="measure", disable=not progress):
        copied, start, outcome = copy.deepcopy(network), time.perf_counter(), ""
        if tables[name] is not None:
            calibrate(copied, dict.fromkeys(layers, tables[name]), images)
        paid = cost.price(macs, assignment_of(copied), base=base)
        for regime in regimes:
            if regime == "retrained":
                file = None if checkpoint is None else str(checkpoint).replace("{multiplier}", name.replace(":", "-"))
                options = {"evaluate_every": 0, "progress": progress, "checkpoint": file, **(retrain_options or {})}
                outcome = retrain(copied, images, epochs=retrain_epochs, **options).diverged
            correct = int((predict(copied, images, progress=False) == images.y_test.cpu()).sum())
            yield {
                "multiplier": name,
                "regime": regime,
                "retrain_epochs": retrain_epochs if regime == "retrained" else 0,
                "top1": correct / len(images.x_test),
                "correct": correct,
                "outcome": outcome,
                "p_norm": paid.p_norm,
                "approximated_share": paid.approximated_share,
                "macs": macs.executed,
                "macs_static": macs.static,
                "parameters": macs.parameters,
                "energy_pj": paid.energy_pj,
                "delay_ns": paid.delay_ns,
                "digest": tables[name].digest if tables[name] else "float32",
                "power_mw": (tables[name] or multiplier(EXACT)).power_mw,
                "mean_error": errors(tables[name]).mean_error if tables[name] else 0.0,
                "seconds": round(time.perf_counter() - start, 2),
            }
            if regime == "retrained" and file is not None:
                Path(file).unlink(missing_ok=True)


def _regimes(name: str, retrain_epochs: int) -> list[str]:
    return list(REGIMES) if retrain_epochs and name != "float32" else [REGIMES[0]]


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device

"""Run every network of a pool once, and keep what it answered.

    pool = look({"small": small, "large": large}, images)

What a network answered is kept in a file of its own, so that an interrupted look goes on, and a pool that gains a
network runs only that one. The unit of cost is a million exact multiplications: multiply-accumulates times the power of
their multiplier relative to the exact one, equation (2) of :mod:`axmoe_lite.cost` without its base. So the same network
under a cheaper multiplier is another, cheaper network.

Chapter: 18, "Which network for which input?"
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximable, evaluating
from axmoe_lite.layers.modules import Approximate, first_input
from axmoe_lite.layers.network import exact_kind
from axmoe_lite.pipeline import Frozen
from axmoe_lite.runs import store
from axmoe_lite.search.pertinence.pool import Pool, check_names, find
from axmoe_lite.search.trial import digest, hold_out
from axmoe_lite.train.measure import check_fits

MILLION = 1e-6


def look(
    networks: Mapping[str, nn.Module],
    images: Images,
    *,
    extractor: str | nn.Module | None = None,
    costs: Mapping[str, float] | None = None,
    extractor_cost: float | None = None,
    product: float | None = None,
    checkpoint: Path | str | None = None,
    batch_size: int = 250,
    progress: bool = True,
) -> Pool:
    """A pool of networks on the test images of a set, each run once.

    The test images must be new to all networks: on images that it has learned from, a network is right nearly always,
    and each of them would be routed to the cheapest.

    Args:
        networks: by name, at least two; any that take ``images.normalised(x)``: exact, approximate, mixtures, or frozen
            pipelines (:func:`axmoe_lite.pipeline.freeze`). They stay as they were, each on its own device.
        extractor: whose features the dispatcher sees: a name of the pool, or a network from outside; None: the cheapest
            of the pool. Its features are the inputs of the linear layer that it calls last. A frozen pipeline cannot be
            looked into: as the extractor it is run thawed.
        costs: what one image costs, by name, in a unit of your own; None: counted, in million exact multiplications.
        extractor_cost: of the features of one image; None: counted, up to the features. With ``costs`` it is the same
            share of a network of the pool as counted.
        product: what one exact multiplication costs in the unit of ``costs``; needed with them, and only then.
        checkpoint: a folder, in which ``network-<name>.safetensors`` keeps what a network answered, and
            ``extractor-<name>.safetensors`` what the extractor did, with its features.
        batch_size: images at a time.

    Raises:
        ValueError: before anything is run: for fewer than two networks, one that does not fit the images, a name or
            cost that is missing or unknown, a multiplier without a power, an extractor without a linear layer, or a
            file that other weights or images have made.

    >>> from axmoe_lite import datasets, models
    >>> images = datasets.synthetic(classes=2, size=8, n_train=4, n_test=6)
    >>> two = {"wide": models.resnet8(classes=2), "narrow": models.resnet8(classes=2, width=0.5)}
    >>> pool = look(two, images, progress=False)
    >>> pool.names, [round(value, 3) for value in pool.cost.tolist()], round(pool.extractor_cost, 5), pool.layer_cost
    (('narrow', 'wide'), [0.198, 0.765], 0.19814, 6.4e-05)
    """
    check_names(list(networks))
    if isinstance(extractor, str):
        find(extractor, list(networks), "network of the pool")
    _check_costs(networks, costs, product)
    folder = _folder(checkpoint)
    for network in networks.values():
        check_fits(network, images)
    counted = {name: _multiplications(network, images) for name, network in networks.items()}
    unit = MILLION if product is None else product
    paid = {name: counted[name] * unit for name in networks} if costs is None else dict(costs)
    order = sorted(networks, key=lambda name: paid[name])
    extractor = order[0] if extractor is None else extractor
    inside = isinstance(extractor, str)
    source = _thawed(networks[extractor] if inside else extractor)
    head = _head(source, images)
    if extractor_cost is None:
        extractor_cost = _multiplications(source, images, without=head) * unit
        if inside:
            extractor_cost *= paid[extractor] / (counted[extractor] * unit)
    jobs = {f"network-{name}": (networks[name], None) for name in order if name != extractor}
    jobs[name := f"extractor-{extractor}" if inside else "features"] = (source, head)
    seen = _answers(jobs, images, folder, batch_size, progress)
    answered = [seen[name if one == extractor else f"network-{one}"] for one in order]
    truth = images.y_test.cpu()
    return Pool(
        names=tuple(order),
        cost=torch.tensor([float(paid[one]) for one in order], dtype=torch.float64),
        correct=torch.stack([one["guess"] == truth for one in answered], 1),
        features=seen[name]["features"],
        extractor=extractor if inside else None,
        extractor_cost=float(extractor_cost),
        confidence=torch.stack([one["confidence"] for one in answered], 1),
        product=unit,
    )


def unseen(images: Images, *, n: int, seed: int = 0) -> Images:
    """The set with ``n`` of its training images moved to the test images, so that a small set has a large pool.

    Networks must then be trained on the result.

    Raises:
        ValueError: if no training image would be left.

    >>> from axmoe_lite import datasets
    >>> moved = unseen(datasets.synthetic(classes=3, size=8, n_train=20, n_test=5), n=8)
    >>> len(moved.x_train), len(moved.x_test)
    (12, 13)
    """
    held = hold_out(images, n=n, seed=seed)
    x, y = (torch.cat([getattr(of, key) for of in (held, images)]) for key in ("x_test", "y_test"))
    return replace(held, x_test=x, y_test=y)


def _answers(
    jobs: dict[str, tuple[nn.Module, str | None]], images: Images, folder: Path | None, batch_size: int, progress: bool
) -> dict[str, dict[str, Tensor]]:
    """What each network answers, from its file where there is one; all files are read before anything is run."""
    pixels, files, seen = digest([images.x_test], repr((images.mean, images.std))), {}, {}
    for name, (network, head) in jobs.items() if folder else ():
        files[name] = folder / _file_name(name), _settings(network, head, pixels)
        if (known := recall(*files[name])) is not None:
            seen[name] = known
    for name, (network, head) in jobs.items():
        if name not in seen:
            seen[name] = _seen(network, images, head, batch_size, name, progress)
            if folder:
                keep(*files[name], seen[name])
    return seen


@torch.no_grad()
def _seen(
    network: nn.Module, images: Images, head: str | None, batch_size: int, name: str, progress: bool
) -> dict[str, Tensor]:
    """``guess`` int64 [n], ``confidence`` float32 [n] and, up to a head, ``features`` float32 [n, F], on the CPU."""
    device = next(network.parameters()).device
    found: dict[str, list[Tensor]] = {"guess": [], "confidence": []}
    hooks = []
    if head is not None:
        features = found["features"] = []
        layer = network.get_submodule(head)

        def hold(_: nn.Module, args: tuple, named: dict) -> None:
            features.append(first_input(args, named).flatten(1).float().cpu())

        hooks.append(layer.register_forward_pre_hook(hold, with_kwargs=True))
    try:
        with evaluating(network):
            for x in tqdm(images.x_test.split(batch_size), desc=name, leave=False, disable=not progress):
                x = images.normalised(x.to(device)).contiguous(memory_format=torch.channels_last)
                chances = network(x).float().softmax(1).nan_to_num(0.0)
                best = chances.max(1)
                found["guess"].append(best.indices.cpu())
                found["confidence"].append(best.values.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    whole = {key: torch.cat(parts) for key, parts in found.items()}
    if len({len(value) for value in whole.values()}) > 1:
        raise ValueError(
            f"The last linear layer {head!r} of {name} saw {len(whole['features'])} inputs for {len(images.x_test)}"
            " images, so it is not one that every image passes once; take another extractor."
        )
    return whole


@torch.no_grad()
def _head(network: nn.Module, images: Images) -> str:
    """The dotted name of the linear layer that is called last for one image."""
    called: list[str] = []

    def note(name: str) -> object:
        return lambda *_: called.append(name)

    linear = {name: layer for name, layer in approximable(network).items() if exact_kind(layer) is nn.Linear}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in linear.items()]
    device = next(network.parameters()).device
    try:
        with evaluating(network):
            network(images.normalised(images.x_test[:1].to(device)))
    except RuntimeError as reason:
        raise ValueError(f"The extractor {type(network).__name__} cannot take {images.name}: {reason}") from reason
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError(
            f"The extractor {type(network).__name__} calls no linear layer, whose inputs would be the features; take"
            " another one."
        )
    return called[-1]


def _thawed(network: nn.Module) -> nn.Module:
    return network.thaw() if isinstance(network, Frozen) else network


def _multiplications(network: nn.Module, images: Images, *, without: str | None = None) -> float:
    """Exact multiplications that one image is worth, of a mixture on the average; ``without`` one layer."""
    network = _thawed(network)
    device = next(network.parameters()).device
    few = images.subset(n_test=250 if moe.mixtures(network) else 1).x_test
    macs = cost.count(network, images.normalised(few.to(device)))
    macs = replace(macs, layers={name: layer for name, layer in macs.layers.items() if name != without})
    chosen = {name: m for name, m in _multipliers(network).items() if name in macs.layers}
    return cost.price(macs, chosen, base=1.0).p_norm if macs.executed else 0.0


def _multipliers(network: nn.Module) -> dict[str, object]:
    """The multipliers themselves, so that one that is in no catalogue will do."""
    return {name: m.multiplier for name, m in approximable(network).items() if isinstance(m, Approximate)}


# ---------------------------------------------------------------------------------- files


def keep(file: Path, settings: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """Write tensors and what they depend on as one .safetensors file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    store.write_bytes(file, save({k: v.contiguous() for k, v in tensors.items()}, {"settings": json.dumps(settings)}))


def recall(file: Path, settings: dict[str, str]) -> dict[str, Tensor] | None:
    """What :func:`keep` wrote; None if there is no file.

    Raises:
        ValueError: if it was made with other settings, or cannot be read.
    """
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            made_by = dict(json.loads((opened.metadata() or {}).get("settings", "{}")))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as reason:
        raise ValueError(
            f"{file} is not a readable safetensors file ({reason}); delete it to start afresh."
        ) from reason
    if made_by != settings:
        differ = sorted(k for k in made_by | settings if made_by.get(k) != settings.get(k))
        raise ValueError(
            f"{file} was made with other {', '.join(differ)}; name another file or folder, or delete this one to start"
            " afresh."
        )
    return tensors


def _settings(network: nn.Module, head: str | None, pixels: str) -> dict[str, str]:
    tables = [f"{name}={m.digest}" for name, m in _multipliers(network).items()]
    weights = digest(network.state_dict().values(), type(network).__name__, repr(network), *tables)
    return {"weights": weights, "images": pixels, "features of": head or "nobody"}


def _file_name(name: str) -> str:
    """A name that any file system takes; names that differ only in odd letters get different files."""
    plain = re.sub(r"[^\w.+-]", "_", name)
    return f"{plain if plain == name else f'{plain}-{digest([], name)[:8]}'}.safetensors"


def _folder(checkpoint: Path | str | None) -> Path | None:
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"checkpoint is the file {folder}; a look keeps a file a network, so name a folder.")
    return folder


def _check_costs(networks: Mapping[str, nn.Module], costs: Mapping[str, float] | None, product: float | None) -> None:
    if (costs is None) != (product is None):
        raise ValueError(
            "costs and product belong together: costs in a unit of your own, and what one exact multiplication costs in"
            " it, for the dispatcher's layer. Give both or neither."
        )
    if costs is None:
        return
    for name in costs:
        find(name, list(networks), "network of the pool")
    missing = [name for name in networks if name not in costs]
    if missing:
        raise ValueError(f"costs has no {', '.join(map(repr, missing))}; every network of the pool needs a cost.")

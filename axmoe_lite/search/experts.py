"""Experts with multipliers of their own: who can bear a cheap one, and what a mixture of multipliers buys.

    parts = groups(network, by="expert")                                what may choose for itself
    rows = sensitivity(network, images, parts, PAPER_EIGHT, base=dense)     what each choice alone does
    found = search(network, images, PAPER_EIGHT, base=dense)            a front of assignments, by training images
    rows = report(network, images, found, base=dense)                   and what they are worth, on test images
    both = mixed_and_uniform(network, images, PAPER_EIGHT, base=dense, budget=260)      beside what there is to beat

Not from the paper, which gives one multiplier to all layers.

Chapter: 12, "A multiplier for each expert?"
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import default_layers
from axmoe_lite.multipliers import EXACT
from axmoe_lite.search.fronts import report, thin
from axmoe_lite.search.space import catalogue, check_options, explore, layers_of
from axmoe_lite.search.trial import Found, Trial

BY = ("expert", "layer", "each", "network")


def groups(network: nn.Module, *, by: str = "expert", others: str = "each") -> dict[str, list[str]]:
    """Layers that share one multiplier, for all :func:`~axmoe_lite.layers.default_layers` of a network.

    Args:
        by: ``"expert"``, each expert of each mixture, and in a cluster each network; ``"layer"``, all experts of a
            layer together, as in the dense network; ``"each"``, every layer of every expert; ``"network"``, all.
        others: layers outside mixtures are a group ``"each"``, or one group ``"together"``.

    Raises:
        ValueError: for another word, or a network without layers to approximate.

    >>> from axmoe_lite.models import resnet8
    >>> list(groups(resnet8(classes=3, topology="hard", experts=2, r=0.2), others="together"))
    ['others', 'layer3.0.conv2.experts.0', 'layer3.0.conv2.experts.1']
    """
    moe.check_option("by", by, BY)
    moe.check_option("others", others, ("each", "together"))
    layers = default_layers(network)
    if not layers:
        raise ValueError(f"This {type(network).__name__} has no layer to approximate, so there is nothing to group.")
    prefixes = {  # an expert's dotted name, and that of what it is an expert of
        f"{name}.experts.{e}".lstrip("."): name
        for name, mixture in moe.mixtures(network).items()
        for e in range(len(mixture.experts))
    }
    found: dict[str, list[str]] = {}
    for layer in layers:
        expert = next((prefix for prefix in prefixes if f"{layer}.".startswith(f"{prefix}.")), None)
        group = layer
        if by == "network" or (expert is None and others == "together"):
            group = by if by == "network" else "others"
        elif expert is not None and by != "each":
            group = expert if by == "expert" else (prefixes[expert] + layer.removeprefix(expert)).lstrip(".")
        found.setdefault(group, []).append(layer)
    return found


def uniform(network: nn.Module, multipliers: Iterable[str]) -> list[dict[str, str]]:
    """For each multiplier the assignment that gives it to all layers: what there is to beat.

    >>> from axmoe_lite.models import resnet8
    >>> set(uniform(resnet8(classes=3), ["mul8s_1L2J"])[0].values())
    {'mul8s_1L2J'}
    """
    return [dict.fromkeys(default_layers(network), name) for name in catalogue(multipliers, exact=False)]


def sensitivity(
    network: nn.Module,
    images: Images,
    groups: dict[str, list[str]],
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict]:
    """What one group under each multiplier does, all others under the exact circuit, on n training images.

    Args:
        groups: see :func:`groups`, or your own; layers in none of them stay exact floats.
        base: what costs are relative to: the count of the dense network; None: this network.
        n, seed, regime, prepare, calibrate_options: see :class:`Trial`.
        checkpoint: see :func:`search`, which goes on from the same file.

    Returns:
        A dict for each group and multiplier: ``group``, ``layers`` (how many), ``multiplier``, ``p_norm``, ``saved``
        (of it, against the exact circuit), ``loss``, ``divergence``, ``accuracy``, and ``more_loss`` and
        ``more_divergence`` than all exact.
    """
    names = catalogue(multipliers)
    healing = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    kept = {"base": base, "checkpoint": checkpoint, "n": n, "seed": seed}
    trial = Trial(network, images, layers=layers_of(groups, network), **healing, **kept)
    exact = {layer: EXACT for layers in groups.values() for layer in layers}
    start, full = trial.evaluate(exact), trial.price(exact)
    rows = []
    with tqdm(total=len(groups) * (len(names) - 1), desc="sensitivity", disable=not progress) as bar:
        for group, layers in groups.items():
            for name in names[1:]:
                changed = {**exact, **dict.fromkeys(layers, name)}
                score, paid = trial.evaluate(changed), trial.price(changed)
                rows.append(
                    {
                        "group": group,
                        "layers": len(layers),
                        "multiplier": name,
                        "p_norm": paid,
                        "saved": full - paid,
                        "loss": score.loss,
                        "divergence": score.divergence,
                        "accuracy": score.accuracy,
                        "more_loss": score.loss - start.loss,
                        "more_divergence": score.divergence - start.divergence,
                    }
                )
                bar.update()
    return rows


def search(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    groups: dict[str, list[str]] | None = None,
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
    **options: Any,
) -> list[Found]:
    """Assignments on the front of cost and loss, chosen on n training images; the test images are not looked at.

    Args:
        network: exactly trained; left as it was.
        multipliers: names to choose from. The exact circuit is always among them.
        base: what costs are relative to: the count of the dense network; None: this network.
        groups: what may choose for itself; None: :func:`groups` of the network, by expert.
        n, seed, regime, prepare, calibrate_options: see :class:`Trial`. The seed draws the validation images, and
            the order of the moves.
        checkpoint: a JSON file that keeps every score, so that an interrupted search goes on where it was.
        options: ``candidates``, ``refine``, ``budget`` and ``objective``, see :func:`~axmoe_lite.search.explore`.

    Returns:
        The front as measured on the validation images, from the cheapest to the dearest.

    Raises:
        ValueError: before anything is run: for a multiplier that does not exist or has no power, groups that are
            empty, overlap or name unknown layers, a budget that is too small, or a checkpoint of another search.
    """
    names = catalogue(multipliers)
    parts = _default_groups(network) if groups is None else groups
    check_options(parts, names, **options)
    healing = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    kept = {"base": base, "checkpoint": checkpoint, "n": n, "seed": seed}
    trial = Trial(network, images, layers=layers_of(parts, network), **healing, **kept)
    asked = {"evaluate": trial.evaluate, "price": trial.price}
    return explore(parts, names, seed=seed, progress=progress, **asked, **options)


_default_groups = groups  # search() has an argument of that name


def mixed_and_uniform(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    groups: dict[str, list[str]] | None = None,
    budget: int,
    checkpoint: Path | str | None = None,
    **trial: Any,
) -> dict[str, list[dict]]:
    """A search's front on the test images, and what there is to beat: each multiplier, and the exact one, everywhere.

    Args:
        groups, budget, checkpoint: of :func:`search`.
        trial: ``n``, ``seed``, ``regime``, ``prepare``, ``calibrate_options`` and ``progress``, as there and in
            :func:`~axmoe_lite.search.report`.

    Returns:
        ``{"mixed": rows, "uniform": rows}`` of :func:`~axmoe_lite.search.report`; of the front, what
        :func:`~axmoe_lite.search.thin` takes.
    """
    names = list(multipliers)
    how = {"groups": groups, "budget": budget, "checkpoint": checkpoint}
    found = search(network, images, names, base=base, **how, **trial)
    chosen = {"mixed": thin(found), "uniform": uniform(network, dict.fromkeys([EXACT, *names]))}
    return {kind: report(network, images, some, base=base, **trial) for kind, some in chosen.items()}

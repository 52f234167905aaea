"""One network, several prices: operating points that share all weights, and are switched between two images.

    points = operating_points(network, assignments, images)      a copy that can run at each of them
    switch(points, 2)(x)                                         from now on at the third
    fine_tune(points, images, epochs=10)                         each point's BatchNorm learns, all on the same batches
    trace(points, [1.0, 0.6, 0.3], images)                       what a falling budget does to answers

A point is an assignment and an overlay, which is a copy of each BatchNorm. For C channels that is 2 C numbers that
learn (gamma and beta) and 2 C averages (mean and variance): these are per point too, since they are of what the
multipliers before make of the images. A chip folds the four into a factor and an offset for each channel, so it stores
2 C numbers a point, which is what QoS-Nets counts. Weights, biases and activation scales are there once, and a prepared
product once for each layer and multiplier, however many points use it.

Source: QoS-Nets (arXiv 2410.07762) and, for the step of the fine-tuning, its authors' published code.

Chapter: 15, "Can one network have several prices?"
"""

import contextlib
import copy
import difflib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images, crop_flip
from axmoe_lite.layers import approximable, assignment_of, evaluating
from axmoe_lite.layers.modules import _Kept
from axmoe_lite.multipliers import multiplier
from axmoe_lite.search.trial import assignment_digest
from axmoe_lite.train import Diverged, calibrate, checkpoints, norms_of, refresh_norms
from axmoe_lite.train.loop import AUGMENTATIONS
from axmoe_lite.train.measure import check_fits


class Points:
    """A network at several operating points; made by :func:`operating_points`, moved by :func:`switch`.

    Put the network on its device before: what is made here is on the same one, and stays there.

    Attributes:
        network: the one that runs, at the point ``present``.
        assignments: one a point, all of the same layers.
        overlays: one a point: dotted name to the BatchNorm that holds its gamma, beta and averages.
        present: the point at which the network is.
        tables: names of the multipliers of all points, once each: what hardware must hold.
    """

    def __init__(self, network: nn.Module, assignments: Sequence[Mapping[str, str]]) -> None:
        self.network, self.present = network, 0
        # Of a circuit's two names one is kept, else it would count as two tables.
        self.assignments = tuple({layer: multiplier(name).name for layer, name in one.items()} for one in assignments)
        self.tables = sorted({name for one in self.assignments for name in one.values()})
        norms = set(norms_of(network))
        norms = {name: module for name, module in network.named_modules() if module in norms}
        self.overlays = [{name: copy.deepcopy(norm) for name, norm in norms.items()} for _ in self.assignments]
        kept: dict[tuple[str, str], _Kept] = {}
        self._plan = []
        for assignment, overlay in zip(self.assignments, self.overlays, strict=True):
            states: list[tuple[nn.Module, dict[str, Any]]] = []
            for layer, name in assignment.items():
                module, state = network.get_submodule(layer), {"multiplier": multiplier(name)}
                if hasattr(module, "_kept"):  # a product of two activations prepares nothing
                    state["_kept"] = kept.setdefault((layer, name), _Kept())
                states.append((module, state))
            for name, norm in norms.items():
                own = overlay[name]
                states.append((norm, {"_parameters": own._parameters, "_buffers": own._buffers}))
            self._plan.append(states)
        switch(self, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """What is shared, once (``shared.<name>``), and each point's overlay (``points.<p>.<name>``)."""
        own = tuple(f"{name}." for name in self.overlays[0])
        found = {f"shared.{k}": v for k, v in self.network.state_dict().items() if not k.startswith(own)}
        for p, overlay in enumerate(self.overlays):
            found |= {f"points.{p}.{n}.{k}": v for n, norm in overlay.items() for k, v in norm.state_dict().items()}
        return found

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of :meth:`state_dict`, in place; the point stays the present one."""
        here = f"points.{self.present}."
        both = ((key, prefix, value) for key, value in tensors.items() for prefix in ("shared.", here))
        self.network.load_state_dict({k.removeprefix(prefix): v for k, prefix, v in both if k.startswith(prefix)})
        for p, overlay in enumerate(self.overlays):
            for name, norm in overlay.items():
                start = f"points.{p}.{name}."
                norm.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})


def operating_points(
    network: nn.Module,
    assignments: Sequence[Mapping[str, str]],
    images: Images,
    *,
    calibrate_options: dict | None = None,
    refresh: dict | None = None,
) -> Points:
    """A copy of a network that can be switched between assignments, calibrated once for all of them.

    Args:
        network: exactly trained; left as it was.
        assignments: dotted layer names to multiplier names, one a point, usually the most accurate first
            (:func:`axmoe_lite.search.qos.choose`). All name the same layers.
        images: whose training images calibrate, at even steps through the set.
        calibrate_options: of :func:`~axmoe_lite.train.calibrate`, such as ``n`` or ``per_channel``.
        refresh: None: every overlay begins as the BatchNorms were trained. Options of
            :func:`~axmoe_lite.train.refresh_norms` (``{}``: its defaults): each begins with averages of its own point.

    Returns:
        Points, at the first of them.

    Raises:
        ValueError: for no assignments, different layers in two of them, an unknown layer or multiplier, a network
            that is approximate already, or nothing to refresh.

    >>> from axmoe_lite import datasets, models
    >>> from axmoe_lite.layers import default_layers
    >>> images, network = datasets.synthetic(classes=2, size=8, n_train=20, n_test=4), models.resnet8(classes=2)
    >>> two = [dict.fromkeys(default_layers(network), name) for name in ("mul8s_1KV6", "mul8s_1L2J")]
    >>> points = operating_points(network, two, images)
    >>> switch(points, 1).conv1.multiplier.name
    'mul8s_1L2J'
    """
    _check_assignments(network, assignments)
    if refresh is not None and not norms_of(network):
        raise ValueError(f"This {type(network).__name__} has no BatchNorm that keeps averages; leave out refresh.")
    made = calibrate(copy.deepcopy(network), dict(assignments[0]), images, **(calibrate_options or {}))
    points = Points(made, assignments)
    for p in range(0 if refresh is None else len(assignments)):
        refresh_norms(switch(points, p), images, **refresh)
    switch(points, 0)
    _prepare(points, images)
    return points


def _check_assignments(network: nn.Module, assignments: Sequence[Mapping[str, str]]) -> None:
    if assignment_of(network):
        raise ValueError(f"This {type(network).__name__} has approximate layers already; restore() it before.")
    if (
        isinstance(assignments, Mapping)
        or not len(assignments)
        or not all(a and isinstance(a, Mapping) for a in assignments)
    ):
        raise ValueError("assignments must be a list of dicts from layers to multipliers, one or more, none empty.")
    known = approximable(network)
    for p, one in enumerate(assignments):
        for layer, name in one.items():
            if layer not in known:
                near = difflib.get_close_matches(layer, known, n=1, cutoff=0.0)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"Point {p} names layer {layer!r}, which cannot multiply approximately.{hint}")
            multiplier(name)
        differ = sorted(set(one) ^ set(assignments[0]))
        if differ:
            which = f"Only one of points 0 and {p} has a multiplier for layer {differ[0]!r}"
            raise ValueError(f"{which}; name the same layers in all, with the exact circuit where it is meant.")


def switch(points: Points, point: int) -> nn.Module:
    """Go to an operating point: tens of microseconds for a ResNet-20, nothing is copied, made or compared.

    Each layer gets the point's multiplier with its prepared product, and each BatchNorm the point's numbers, by
    reference. Answers are then, bit for bit, those of a network built for this point alone.

    Returns:
        The network, now at that point.

    Raises:
        ValueError: for a point that does not exist.
    """
    if not 0 <= point < len(points.assignments):
        raise ValueError(f"There is no point {point!r}; there are {len(points.assignments)}, from 0.")
    for module, state in points._plan[point]:
        vars(module).update(state)  # setattr of a module looks for parameters first, which would take most of the time
    points.present = point
    return points.network


def _prepare(points: Points, images: Images) -> None:
    """Two images through every point, so that each product is laid out before it is needed."""
    present, device = points.present, next(points.network.parameters()).device
    x = images.normalised(images.subset(n_train=2).x_train.to(device)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), evaluating(points.network), moe.no_idle_experts(points.network):
        for p in range(len(points.assignments)):
            switch(points, p)(x)
    switch(points, present)


# ------------------------------------------------------------------------------ learning


def fine_tune(
    points: Points,
    images: Images,
    *,
    epochs: int,
    weights_learn: bool = False,
    lr: float = 1e-2,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    milestones: Sequence[float] = (0.5, 0.8),
    batch_size: int = 128,
    augment: str = "crop_flip",
    seed: int = 0,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train all points together, in place: every batch runs at each of them, then there is one step of SGD.

    A shared weight takes the mean of its gradients at the points. An overlay has a gradient at its own point only and
    takes that whole (not from the paper, which is silent). Gates are frozen, as in :func:`~axmoe_lite.train.retrain`.

    Args:
        weights_learn: weights and biases learn too, as in the authors' code; else, as the paper is summarised, only
            gamma and beta do, and averages follow the images.
        lr: at first; times 0.1 from each milestone on. The defaults are those of the authors' code.
        weight_decay: not from the paper, which is silent: none.
        milestones: shares of the epochs, in [0, 1]: 0.5 and 0.8 are epochs 5 and 8 of 10, after which it falls.
        augment: see :func:`~axmoe_lite.train.fit`.
        checkpoint: a file written after each epoch, from which the same call goes on.

    Returns:
        A dict an epoch: ``epoch``, ``lr``, ``loss`` (mean of the points), ``losses`` and ``train_accuracies`` (one a
        point), ``seconds``.

    Raises:
        ValueError: for an option out of its range, nothing that could learn, or a checkpoint that another call made.
        Diverged: when a loss or a weight is no number any more; points are as before that epoch.
    """
    _check_learning(epochs, lr, batch_size, milestones)
    moe.check_option("augment", augment, AUGMENTATIONS)
    if not weights_learn and not any(p.requires_grad for p in _overlaid(points)):
        kind = type(points.network).__name__
        raise ValueError(f"This {kind} has no BatchNorm that could learn; let its weights learn, weights_learn=True.")
    settings = {"images": images.name, "n_train": len(images.x_train), "model": type(points.network).__name__}
    settings |= {"points": [assignment_digest(one) for one in points.assignments], "weights_learn": weights_learn}
    settings |= {"epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    settings |= {"milestones": list(milestones), "batch_size": batch_size, "augment": augment, "seed": seed}
    network, present = points.network, points.present
    images = images.to(next(network.parameters()).device)
    check_fits(network, images)
    try:
        with checkpoints.alone(checkpoint), evaluating(network), _learning(points, weights_learn) as shared:
            return _epochs(points, images, shared, settings, checkpoint=checkpoint, progress=progress)
    finally:
        _prepare(points, images)
        switch(points, present)


def _check_learning(epochs: int, lr: float, batch_size: int, milestones: Sequence[float]) -> None:
    if epochs < 0 or batch_size < 1 or not lr > 0 or not all(0 <= share <= 1 for share in milestones):
        raise ValueError(
            f"fine_tune() was asked for epochs = {epochs}, batch_size = {batch_size}, lr = {lr}, milestones ="
            f" {tuple(milestones)}; epochs must be at least 0, batch_size at least 1, lr positive, and milestones are"
            " shares of the epochs, in [0, 1]."
        )


def _overlaid(points: Points) -> list[nn.Parameter]:
    return [p for overlay in points.overlays for norm in overlay.values() for p in norm.parameters()]


@contextlib.contextmanager
def _learning(points: Points, weights_learn: bool) -> Iterator[list[nn.Parameter]]:
    """The network in training mode, and which of its shared parameters learn; the others ask for no gradient."""
    network, own = points.network, {id(p) for p in _overlaid(points)}
    shared = [p for p in network.parameters() if id(p) not in own]
    before = [p.requires_grad for p in shared]
    network.train()
    try:
        with moe.gates_frozen(network):
            if not weights_learn:
                for parameter in shared:
                    parameter.requires_grad_(False)
                # In evaluation mode a layer keeps its product, which stays the same while its weights do.
                for layer in approximable(network).values():
                    layer.eval()
            yield [p for p in shared if p.requires_grad]
    finally:
        for parameter, flag in zip(shared, before, strict=True):
            parameter.requires_grad_(flag)


def _epochs(
    points: Points,
    images: Images,
    shared: list[nn.Parameter],
    settings: dict,
    *,
    checkpoint: Path | str | None,
    progress: bool,
) -> list[dict]:
    """The epochs that a checkpoint does not hold yet."""
    learning = [*shared, *(p for p in _overlaid(points) if p.requires_grad)]
    options = {key: settings[key] for key in ("lr", "momentum", "weight_decay")}
    stepper, epochs, history = torch.optim.SGD(learning, **options), settings["epochs"], []
    if checkpoint is not None and Path(checkpoint).exists():
        history = checkpoints.resume(Path(checkpoint), points, stepper, settings)
    bar = tqdm(total=epochs, initial=len(history), desc="fine-tune", unit="epoch", disable=not progress)
    for epoch in range(len(history) + 1, epochs + 1):
        start, before = time.perf_counter(), {k: v.clone() for k, v in points.state_dict().items()}
        passed = sum(epoch - 1 >= round(share * epochs, 9) for share in settings["milestones"])
        for group in stepper.param_groups:
            group["lr"] = settings["lr"] * 0.1**passed
        try:
            losses, accuracies = _one_epoch(points, images, stepper, shared, settings, epoch)
            if not all(map(math.isfinite, losses)):
                raise FloatingPointError(f"The losses of the points became {losses}.")
        except FloatingPointError as reason:
            points.load_state_dict(before)
            bar.close()
            raise Diverged(f"{reason} (epoch {epoch} of {epochs}); lower lr.", epoch=epoch, history=history) from None
        row = {"epoch": epoch, "lr": stepper.param_groups[0]["lr"], "loss": sum(losses) / len(losses)}
        row |= {"losses": losses, "train_accuracies": accuracies, "seconds": time.perf_counter() - start}
        history.append(row)
        if checkpoint is not None:
            checkpoints.suspend(Path(checkpoint), points, stepper, settings, history)
        bar.set_postfix(loss=f"{row['loss']:.3f}")
        bar.update()
    bar.close()
    return history


def _one_epoch(
    points: Points,
    images: Images,
    stepper: torch.optim.Optimizer,
    shared: list[nn.Parameter],
    settings: dict,
    epoch: int,
) -> tuple[list[float], list[float]]:
    """Each point's mean loss and accuracy over the (augmented) training set, while all of them learn."""
    device, n, o = images.x_train.device, len(images.x_train), len(points.assignments)
    generator = torch.Generator().manual_seed((settings["seed"] * 100_003 + epoch) % 2**63)
    losses, correct = torch.zeros(2, o, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())  # for layers that draw their own noise
        for batch in torch.randperm(n, generator=generator).split(settings["batch_size"]):
            x, y = images.x_train[batch.to(device)], images.y_train[batch.to(device)]
            if settings["augment"] != "none":
                x = crop_flip(x, generator=generator, flip=settings["augment"] == "crop_flip")
            x = images.normalised(x).contiguous(memory_format=torch.channels_last)
            stepper.zero_grad(set_to_none=True)
            for p in range(o):
                scores = switch(points, p)(x)
                loss = nn.functional.cross_entropy(scores, y)
                loss.backward()  # adds to what the points before left in the shared weights
                losses[p] += loss.detach() * len(y)
                correct[p] += (scores.argmax(1) == y).sum()
            for parameter in shared:
                if parameter.grad is not None:
                    parameter.grad /= o
            stepper.step()
    return (losses / n).tolist(), (correct / n).tolist()


# ------------------------------------------------------------------------------ what it costs, what it buys


def overlay_size(network: nn.Module) -> dict[str, int]:
    """How many numbers an overlay has: ``learned`` (gamma and beta) and ``averages`` (means and variances).

    >>> from axmoe_lite.models import resnet20
    >>> overlay_size(resnet20(classes=10, shortcut="pad"))  # 7 norms of 16 channels, 6 of 32, 6 of 64
    {'learned': 1376, 'averages': 1376}
    """
    norms = norms_of(network)
    averages = sum(norm.running_mean.numel() + norm.running_var.numel() for norm in norms)
    return {"learned": sum(p.numel() for norm in norms for p in norm.parameters()), "averages": averages}


def overhead(network: nn.Module, points: int) -> float:
    """Extra numbers that ``points`` operating points need, relative to the network's parameters.

    Counted as QoS-Nets does: gamma and beta of each overlay but the first, which is the network's own.

    Raises:
        ValueError: for fewer than one point, or a network without parameters.

    >>> from axmoe_lite.models import mobilenet_v2
    >>> round(overhead(mobilenet_v2(classes=200), 3), 4)  # as published: 2.75 %
    0.0275
    """
    parameters = sum(p.numel() for p in network.parameters())
    if points < 1 or not parameters:
        raise ValueError(f"overhead() was asked for {points} points and {parameters} parameters; both are at least 1.")
    return (points - 1) * overlay_size(network)["learned"] / parameters


def trace(
    points: Points,
    budgets: Sequence[float],
    images: Images,
    *,
    macs: cost.Macs | None = None,
    base: cost.Macs | float | None = None,
    batch_size: int = 100,
    progress: bool = True,
) -> list[dict]:
    """A run in which the budget changes: at each step the dearest point that it affords answers a batch.

    Args:
        budgets: the p_norm that a step may cost, see :mod:`axmoe_lite.cost`; one a step.
        images: whose test images are answered, batch after batch, from the first again after the last.
        macs: of the network; None: counted at the first point on (1000) test images.
        base: what costs are relative to: the count of the dense network; None: this network.

    Returns:
        A dict a step: ``step``, ``budget``, ``point``, ``p_norm``, ``affordable`` (False where not even the cheapest
        point is, which then answers), ``images`` (how many), ``accuracy`` on them in [0, 1], ``switch_us``. The points
        are left at the one they were at.

    Raises:
        ValueError: for no budgets, one that is no number, a batch of none, or images that do not fit.
    """
    if not len(budgets) or any(math.isnan(budget) for budget in budgets) or batch_size < 1:
        asked = f"the budgets {list(budgets)} and batch_size = {batch_size}"
        raise ValueError(f"trace() was asked for {asked}; one number a step and a batch of at least 1 are needed.")
    network, present, device = points.network, points.present, next(points.network.parameters()).device
    check_fits(network, images)
    if macs is None:
        macs = cost.count(switch(points, 0), images.normalised(images.subset(n_test=1000).x_test.to(device)))
    paid = [cost.price(macs, one, base=base).p_norm for one in points.assignments]
    found = []
    with torch.inference_mode(), evaluating(network):
        for step, budget in enumerate(tqdm(budgets, desc="trace", disable=not progress)):
            point, affordable = _afforded(paid, budget)
            start = time.perf_counter()
            switch(points, point)
            took = time.perf_counter() - start
            here = (step * batch_size + torch.arange(min(batch_size, len(images.x_test)))) % len(images.x_test)
            here = here.to(images.x_test.device)
            x = images.normalised(images.x_test[here].to(device)).contiguous(memory_format=torch.channels_last)
            right = network(x).argmax(1).cpu() == images.y_test[here].cpu()
            row = {"step": step, "budget": budget, "point": point, "p_norm": paid[point], "affordable": affordable}
            found.append(
                {**row, "images": len(right), "accuracy": right.double().mean().item(), "switch_us": took * 1e6}
            )
    switch(points, present)
    return found


def _afforded(paid: list[float], budget: float) -> tuple[int, bool]:
    """The dearest point within the budget, of equal ones the first; else the cheapest, and False."""
    within = [p for p, cost in enumerate(paid) if cost <= budget + 1e-12]
    if within:
        return max(within, key=lambda p: paid[p]), True
    return min(range(len(paid)), key=lambda p: paid[p]), False

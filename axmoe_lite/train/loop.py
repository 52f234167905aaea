"""The training loop: ``fit``, its schedule, and what happens when the loss is no number any more.

The same call gives the same numbers: every random draw of epoch e comes from a generator seeded by
(seed, e), so a run that was killed and resumed is bit-equal to one that was not.

Chapter: 08, "Can a network learn its new arithmetic?"
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import moe
from axmoe_lite.datasets import Images, crop_flip
from axmoe_lite.layers import assignment_of
from axmoe_lite.layers.small import small_convolutions
from axmoe_lite.train import checkpoints
from axmoe_lite.train.measure import check_fits, evaluate

AUGMENTATIONS = ("crop_flip", "crop", "none")
OPTIMISERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bf16")
CHECK_EVERY = 50  # steps between looks at the loss, which make a GPU wait


class Diverged(FloatingPointError):
    """The loss was no number any more. The model is as it was before that epoch.

    Attributes:
        epoch: the one that failed, from 1.
        history: of the epochs before it.
    """

    def __init__(self, message: str, *, epoch: int, history: list[dict]) -> None:
        super().__init__(message)
        self.epoch, self.history = epoch, history


def fit(
    model: nn.Module,
    images: Images,
    *,
    epochs: int,
    lr: float = 0.1,
    optimiser: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    warmup_epochs: float = 1.0,
    clip_norm: float = 0.0,
    label_smoothing: float = 0.0,
    balance: float = 0.01,
    balance_frozen: bool = False,
    augment: str = "crop_flip",
    precision: str = "float32",
    seed: int = 0,
    evaluate_every: int = 0,
    penalty: Callable[[], Tensor] | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train in place with a cosine schedule, on the model's own device.

    The defaults are the field's usual choice for CIFAR ResNets, not from the paper. Parameters that ask for no
    gradient stay as they are.

    Args:
        model: any network from [N, C, H, W] to class scores; trained in place.
        images: the set; its test images are only looked at every ``evaluate_every`` epochs.
        lr: the peak rate, reached after ``warmup_epochs`` and brought to 0 along a cosine.
        optimiser: ``"sgd"``, with Nesterov momentum; or ``"adamw"``, which spares biases and norms the decay.
        clip_norm: gradients longer than this are shortened to it; 0 leaves them.
        balance: alpha, the weight of the load-balancing loss of each :class:`~axmoe_lite.moe.HardMoE` whose gate
            learns (not from the paper: 0.01, as in Switch Transformer).
        balance_frozen: that loss also where the gate is frozen, so that the layers before it are bent to please it.
        augment: ``"crop_flip"``, ``"crop"`` (for images that mean something else mirrored) or ``"none"``.
        precision: ``"float32"``, or ``"bf16"`` for mixed precision, in which the sums of approximate products are
            still exact and only what a layer hands on is rounded.
        evaluate_every: measure top-1 after so many epochs; 0 means never.
        penalty: a number, called for at every step, that is to be small too; not in the ``loss`` that is reported. A
            checkpoint knows it by its name, and a method by the ``settings`` of its object as well.
        checkpoint: a file written after each epoch. If it exists and was made by the same call, training
            resumes from it (or returns at once if it had finished). With ``{epoch}`` in its name every epoch has
            its own file, and the latest is resumed from: delete the later ones to go on from an earlier one. Of two
            processes that train towards one file, the second waits for the first and takes its result.

    Returns:
        One dict an epoch: ``epoch``, ``lr``, ``loss``, ``train_accuracy``, ``test_accuracy`` (or None), ``seconds``.

    Raises:
        ValueError: for an unknown option, or a checkpoint that another call made.
        Diverged: when the loss, a weight or an answer is no number any more; the last good checkpoint stays.

    >>> from axmoe_lite import datasets, models
    >>> images = datasets.synthetic(classes=2, size=8, n_train=64, n_test=32)
    >>> history = fit(models.resnet8(classes=2), images, epochs=2, lr=0.05, progress=False)
    >>> [row["epoch"] for row in history]
    [1, 2]
    """
    _check_options(epochs, lr, batch_size)
    for name, value, allowed in (
        ("augment", augment, AUGMENTATIONS),
        ("precision", precision, PRECISIONS),
        ("optimiser", optimiser, OPTIMISERS),
    ):
        moe.check_option(name, value, allowed)
    settings = {
        "images": images.name,
        "data": images.digest,
        "n_train": len(images.x_train),
        "model": type(model).__name__,
        "epochs": epochs,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "warmup_epochs": warmup_epochs,
        "label_smoothing": label_smoothing,
        "augment": augment,
        "precision": precision,
        "seed": seed,
    }
    balanced = _balanced(model, frozen=balance_frozen)
    settings |= _if_it_matters(model, optimiser=optimiser, clip_norm=clip_norm, penalty=penalty)
    if balanced:
        settings["balance"] = balance
    if balanced != _balanced(model, frozen=False):
        settings["balance_frozen"] = True
    device = next(model.parameters()).device
    images = images.to(device)
    check_fits(model, images)
    stepper = _optimiser(model, optimiser, lr=lr, momentum=momentum, weight_decay=weight_decay)
    all_settings = {"clip_norm": clip_norm, "balanced": balanced if balance else [], **settings}
    options = {"evaluate_every": evaluate_every, "penalty": penalty, "checkpoint": checkpoint, "progress": progress}
    with checkpoints.alone(checkpoint):
        return _epochs(model, images, stepper, settings, all_settings, **options)


def _epochs(
    model: nn.Module,
    images: Images,
    stepper: torch.optim.Optimizer,
    settings: dict,
    all_settings: dict,
    *,
    evaluate_every: int,
    penalty: Callable[[], Tensor] | None,
    checkpoint: Path | str | None,
    progress: bool,
) -> list[dict]:
    """The epochs that a checkpoint does not hold yet; ``settings`` are those that it names."""
    epochs, seed = settings["epochs"], settings["seed"]
    history: list[dict] = []
    if checkpoint is not None and (latest := _latest(checkpoint, epochs)) is not None:
        history = checkpoints.resume(latest, model, stepper, settings)
    steps_per_epoch = math.ceil(len(images.x_train) / settings["batch_size"])

    bar = tqdm(total=epochs, initial=len(history), desc="fit", unit="epoch", disable=not progress)
    for epoch in range(len(history) + 1, epochs + 1):
        start, before = time.perf_counter(), {k: v.clone() for k, v in model.state_dict().items()}
        try:
            loss, accuracy = _one_epoch(
                model,
                images,
                stepper,
                generator=torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63),
                first_step=(epoch - 1) * steps_per_epoch,
                steps=epochs * steps_per_epoch,
                warmup=round(settings["warmup_epochs"] * steps_per_epoch),
                settings=all_settings,
                penalty=penalty,
            )
            seconds = time.perf_counter() - start
            measure = evaluate_every and epoch % evaluate_every == 0
            test = evaluate(model, images, progress=False) if measure else None
        except FloatingPointError as reason:
            model.load_state_dict(before)
            bar.close()
            raise Diverged(f"{reason} (epoch {epoch} of {epochs})", epoch=epoch, history=history) from None
        history.append(
            {
                "epoch": epoch,
                "lr": stepper.param_groups[0]["lr"],
                "loss": loss,
                "train_accuracy": accuracy,
                "test_accuracy": test,
                "seconds": seconds,
            }
        )
        if checkpoint is not None:
            checkpoints.suspend(_at(checkpoint, epoch), model, stepper, settings, history)
        bar.set_postfix(loss=f"{loss:.3f}", train=f"{accuracy:.1%}", test="-" if test is None else f"{test:.1%}")
        bar.update()
    bar.close()
    return history


def _check_options(epochs: int, lr: float, batch_size: int) -> None:
    if type(epochs) is not int or epochs < 0 or batch_size < 1 or not lr > 0:
        raise ValueError(
            f"fit() was asked for epochs = {epochs}, batch_size = {batch_size}, lr = {lr};"
            " epochs must be at least 0, batch_size at least 1, and lr positive."
        )


def _if_it_matters(model: nn.Module, *, optimiser: str, clip_norm: float, penalty: Callable[[], Tensor] | None) -> dict:
    """Settings that a checkpoint names only where they change something, so that older files still resume."""
    found: dict = {}
    if optimiser != "sgd":
        found["optimiser"] = optimiser
    if clip_norm:
        found["clip_norm"] = clip_norm
    if moe.mixtures(model):
        found["mixtures"] = {name: f"{type(m).__name__} of {len(m.experts)}" for name, m in moe.mixtures(model).items()}
    if assignment_of(model):
        found["assignment"] = assignment_of(model)
    if penalty is not None:
        name = getattr(penalty, "__qualname__", type(penalty).__qualname__)
        found["penalty"] = f"{name} {getattr(getattr(penalty, '__self__', None), 'settings', '')!r}"
    return found


def _optimiser(
    model: nn.Module, name: str, *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if name == "sgd":
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": momentum > 0}
        return torch.optim.SGD(parameters, **options)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))


def _at(checkpoint: Path | str, epoch: int) -> Path:
    return Path(str(checkpoint).replace("{epoch}", str(epoch)))


def _latest(checkpoint: Path | str, epochs: int) -> Path | None:
    files = [_at(checkpoint, epoch) for epoch in range(epochs, 0, -1)] or [Path(checkpoint)]
    return next((file for file in files if file.exists()), None)


def _one_epoch(
    model: nn.Module,
    images: Images,
    optimiser: torch.optim.Optimizer,
    *,
    generator: torch.Generator,
    first_step: int,
    steps: int,
    warmup: int,
    settings: dict,
    penalty: Callable[[], Tensor] | None,
) -> tuple[float, float]:
    """Mean loss (of the classes) and training accuracy (on the augmented images) of one pass over the training set."""
    device, n = images.x_train.device, len(images.x_train)
    order = torch.randperm(n, generator=generator)
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    balanced = settings["balanced"]
    model.train()
    with contextlib.ExitStack() as during:
        during.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(generator.initial_seed())  # for layers that draw their own noise
        seen = during.enter_context(moe.watching(model)) if balanced else {}
        if settings["precision"] == "bf16":
            during.enter_context(small_convolutions(model))
        for step, batch in enumerate(order.split(settings["batch_size"])):
            rate = settings["lr"] * schedule(first_step + step, steps=steps, warmup=warmup)
            for group in optimiser.param_groups:
                group["lr"] = rate
            x, y = images.x_train[batch.to(device)], images.y_train[batch.to(device)]
            if settings["augment"] != "none":
                x = crop_flip(x, generator=generator, flip=settings["augment"] == "crop_flip")
            x = images.normalised(x).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings["precision"] == "bf16"):
                scores = model(x)
            loss = nn.functional.cross_entropy(scores.float(), y, label_smoothing=settings["label_smoothing"])
            optimiser.zero_grad(set_to_none=True)
            imbalance = settings["balance"] * _imbalance(seen, balanced) if balanced else 0.0
            (loss + imbalance + (0.0 if penalty is None else penalty())).backward()
            if settings.get("clip_norm"):
                nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
            optimiser.step()
            loss_sum += loss.detach() * len(y)
            correct += (scores.argmax(1) == y).sum()
            if step % CHECK_EVERY == 0 or (step + 1) * settings["batch_size"] >= n:
                _check_finite(loss_sum.item(), first_step + step + 1, settings["lr"])
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise FloatingPointError(f"The last step left weights that are no numbers, at lr = {settings['lr']}; lower lr.")
    return loss_sum.item() / n, correct.item() / n


def _balanced(model: nn.Module, *, frozen: bool) -> list[str]:
    """The mixtures that a load-balancing loss is for: those whose gates learn, or ``frozen`` ones as well."""
    hard = {name: layer for name, layer in moe.mixtures(model).items() if isinstance(layer, moe.HardMoE)}
    return [name for name, layer in hard.items() if frozen or any(p.requires_grad for p in layer.gate.parameters())]


def _imbalance(seen: dict[str, list[moe.Routing]], balanced: list[str]) -> Tensor | float:
    """The load-balancing losses of the step just made; what was seen is then forgotten."""
    total: Tensor | float = 0.0
    for name in balanced:
        for routing in seen[name]:
            total = total + moe.load_balance(routing)
    for routings in seen.values():
        routings.clear()
    return total


def _check_finite(loss_sum: float, step: int, lr: float) -> None:
    if not math.isfinite(loss_sum):
        raise FloatingPointError(
            f"The loss became {loss_sum} by step {step} at lr = {lr}; lower lr or lengthen warmup_epochs."
        )


def schedule(step: int, *, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at ``step`` (from 0): linear up over ``warmup``, then a cosine to 0.

    >>> [round(schedule(s, steps=8, warmup=2), 2) for s in range(8)]
    [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

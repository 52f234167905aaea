"""Training and measuring a network: ``fit``, ``predict``, ``evaluate``, and checkpoints that resume.

The same call gives the same numbers: every random draw of epoch e comes from a generator seeded by
(seed, e), so a run that was killed and resumed is bit-equal to one that was not.

Chapter: 05, "What happens to a network?"
"""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite.datasets import Images, crop_flip
from axmoe_lite.layers import approximate, evaluating, restore
from axmoe_lite.multipliers import EXACT, errors, multiplier

AUGMENTATIONS = ("crop_flip", "crop", "none")
PRECISIONS = ("float32", "bf16")


def fit(
    model: nn.Module,
    images: Images,
    *,
    epochs: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    warmup_epochs: float = 1.0,
    label_smoothing: float = 0.0,
    augment: str = "crop_flip",
    precision: str = "float32",
    seed: int = 0,
    evaluate_every: int = 0,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[dict]:
    """Train in place by SGD with Nesterov momentum and a cosine schedule, on the model's own device.

    The defaults are the field's usual choice for CIFAR ResNets, not from the paper.

    Args:
        model: any network from [N, C, H, W] to class scores; trained in place.
        images: the set; its test images are only looked at every ``evaluate_every`` epochs.
        lr: the peak rate, reached after ``warmup_epochs`` and brought to 0 along a cosine.
        augment: ``"crop_flip"``, ``"crop"`` (for images that mean something else mirrored) or ``"none"``.
        precision: ``"float32"``, or ``"bf16"`` for mixed precision.
        evaluate_every: measure top-1 after so many epochs; 0 means never.
        checkpoint: a file written after each epoch. If it exists and was made by the same call, training
            resumes from it (or returns at once if it had finished).

    Returns:
        One dict an epoch: ``epoch``, ``lr``, ``loss``, ``train_accuracy``, ``test_accuracy`` (or None), ``seconds``.

    Raises:
        ValueError: for an unknown option, or a checkpoint that another call made.
        FloatingPointError: when the loss is no longer finite; the last good checkpoint stays.

    >>> from axmoe_lite import datasets, models
    >>> images = datasets.synthetic(classes=2, size=8, n_train=64, n_test=32)
    >>> history = fit(models.resnet8(classes=2), images, epochs=2, lr=0.05, progress=False)
    >>> [row["epoch"] for row in history]
    [1, 2]
    """
    _check_options(epochs, lr, batch_size, augment, precision)
    settings = {
        "images": images.name,
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
    device = next(model.parameters()).device
    images = images.to(device)
    _check_fits(model, images)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    history: list[dict] = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = _resume(Path(checkpoint), model, optimiser, settings)
    steps_per_epoch = math.ceil(len(images.x_train) / batch_size)

    bar = tqdm(total=epochs, initial=len(history), desc="fit", unit="epoch", disable=not progress)
    for epoch in range(len(history) + 1, epochs + 1):
        start = time.perf_counter()
        loss, accuracy = _one_epoch(
            model,
            images,
            optimiser,
            generator=torch.Generator().manual_seed(seed * 100_003 + epoch),
            first_step=(epoch - 1) * steps_per_epoch,
            steps=epochs * steps_per_epoch,
            warmup=round(warmup_epochs * steps_per_epoch),
            settings=settings,
        )
        seconds = time.perf_counter() - start
        measure = evaluate_every and epoch % evaluate_every == 0
        test = evaluate(model, images, progress=False) if measure else None
        history.append(
            {
                "epoch": epoch,
                "lr": optimiser.param_groups[0]["lr"],
                "loss": loss,
                "train_accuracy": accuracy,
                "test_accuracy": test,
                "seconds": seconds,
            }
        )
        if checkpoint is not None:
            _suspend(Path(checkpoint), model, optimiser, settings, history)
        bar.set_postfix(loss=f"{loss:.3f}", train=f"{accuracy:.1%}", test="-" if test is None else f"{test:.1%}")
        bar.update()
    bar.close()
    return history


def _check_options(epochs: int, lr: float, batch_size: int, augment: str, precision: str) -> None:
    if epochs < 0 or batch_size < 1 or not lr > 0:
        raise ValueError(
            f"fit() was asked for epochs = {epochs}, batch_size = {batch_size}, lr = {lr};"
            " epochs must be at least 0, batch_size at least 1, and lr positive."
        )
    for name, value, allowed in (("augment", augment, AUGMENTATIONS), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(repr, allowed))}.")


@torch.inference_mode()
def _check_fits(model: nn.Module, images: Images) -> None:
    """One image through the model, so that a mismatch is a clear error before any work."""
    device = next(model.parameters()).device
    shape, classes = list(images.x_test.shape[1:]), len(images.classes)
    try:
        with evaluating(model):
            scores = model(images.normalised(images.x_test[:1].to(device)))
    except RuntimeError as reason:
        raise ValueError(
            f"This {type(model).__name__} cannot take images of {shape} ({images.name}): {reason}"
        ) from reason
    if list(scores.shape) != [1, classes]:
        raise ValueError(
            f"This {type(model).__name__} answers with {list(scores.shape)} for one image; {images.name} has"
            f" {classes} classes, so [1, {classes}] is needed. Build the model with classes={classes}."
        )


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
) -> tuple[float, float]:
    """Mean loss and training accuracy (on the augmented images) of one pass over the training set."""
    device, n = images.x_train.device, len(images.x_train)
    order = torch.randperm(n, generator=generator)
    loss_sum, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())  # for layers that draw their own noise
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
            loss.backward()
            optimiser.step()
            loss_sum += loss.detach() * len(y)
            correct += (scores.argmax(1) == y).sum()
    if not math.isfinite(loss_sum.item()):
        raise FloatingPointError(
            f"The loss became {loss_sum.item()} between steps {first_step + 1} and {first_step + step + 1}"
            f" at lr = {settings['lr']}; lower lr or lengthen warmup_epochs."
        )
    return loss_sum.item() / n, correct.item() / n


def schedule(step: int, *, steps: int, warmup: int) -> float:
    """The share of the peak learning rate at ``step`` (from 0): linear up over ``warmup``, then a cosine to 0.

    >>> [round(schedule(s, steps=8, warmup=2), 2) for s in range(8)]
    [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def predict(model: nn.Module, images: Images, *, batch_size: int = 250, progress: bool = True) -> Tensor:
    """The class of the highest score for each test image: int64 [N], on the CPU.

    The model is in evaluation mode during the call, and each of its modules in its own mode after it.
    """
    _check_fits(model, images)
    device, guesses = next(model.parameters()).device, []
    with evaluating(model):
        for x in tqdm(images.x_test.split(batch_size), desc="predict", leave=False, disable=not progress):
            x = images.normalised(x.to(device)).contiguous(memory_format=torch.channels_last)
            guesses.append(model(x).argmax(1).cpu())
    return torch.cat(guesses)


def evaluate(model: nn.Module, images: Images, *, batch_size: int = 250, progress: bool = True) -> float:
    """Top-1 accuracy on the test images, in [0, 1]."""
    guesses = predict(model, images, batch_size=batch_size, progress=progress)
    return (guesses == images.y_test.cpu()).double().mean().item()


def resilience(
    network: nn.Module, images: Images, names: Sequence[str], *, calibration: Tensor, progress: bool = True
) -> list[dict]:
    """Top-1 without retraining: the network in float32, then under each multiplier in turn.

    This is AxMoE's first question (intrinsic resilience). The network is left exact, as it was.

    Args:
        names: multipliers, each given to all of :func:`axmoe_lite.layers.default_layers`.
        calibration: normalised training images [N, C, H, W] that set the activation ranges, once for all.

    Returns:
        One dict a multiplier, ``"float32"`` first: ``multiplier``, ``digest`` of its table, ``power_mw``,
        ``mean_error``, ``top1`` in [0, 1], ``correct`` (of the test images), ``seconds``.
    """
    rows = []
    for name in tqdm(["float32", *names], desc="resilience", disable=not progress):
        found = None if name == "float32" else multiplier(name)
        if found is not None:
            approximate(network, found, calibration=calibration if len(rows) == 1 else None)
        start = time.perf_counter()
        correct = int((predict(network, images, progress=False) == images.y_test.cpu()).sum())
        rows.append(
            {
                "multiplier": name,
                "digest": found.digest if found else "float32",
                "power_mw": found.power_mw if found else multiplier(EXACT).power_mw,
                "mean_error": errors(found).mean_error if found else 0.0,
                "top1": correct / len(images.x_test),
                "correct": correct,
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
    restore(network)
    return rows


# ----------------------------------------------------------------------------- checkpoints


def save(model: nn.Module, path: Path | str, *, recipe: dict) -> None:
    """Write weights and buffers as safetensors, with ``recipe`` (how they were made) in the file's header."""
    _write(Path(path), dict(model.state_dict()), {"recipe": json.dumps(recipe)})


def load(model: nn.Module, path: Path | str) -> dict:
    """Load weights written by :func:`save` into ``model`` and return their recipe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, or its tensors do not fit the model (both lists are named).
    """
    tensors, metadata = _read(Path(path))
    _load_exactly(model, tensors, Path(path))
    return json.loads(metadata.get("recipe", "{}"))


def _load_exactly(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in tensors.items()}
    if own != theirs:
        wrong = [name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)]
        name = sorted(wrong)[0]
        raise ValueError(
            f"{path} does not fit this {type(model).__name__}: {len(wrong)} tensors differ, such as {name!r}, which is"
            f" {theirs.get(name, 'absent')} in the file and {own.get(name, 'absent')} in the model. Build the model"
            " with the number of classes and the shortcut of the recipe."
        )
    model.load_state_dict(tensors)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as reason:
        raise ValueError(f"{path} is not a readable safetensors file ({reason}); delete it, train again.") from reason


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    # Convolution weights may be channels_last in memory; the file holds them in their logical order.
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def _suspend(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, settings: dict, history: list[dict]
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, parameter in enumerate(optimiser.param_groups[0]["params"]):
        buffer = optimiser.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{index}"] = buffer
    _write(path, tensors, {"settings": json.dumps(settings), "history": json.dumps(history)})


def _resume(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, settings: dict) -> list[dict]:
    tensors, metadata = _read(path)
    made_by = json.loads(metadata.get("settings", "{}"))
    if made_by != settings:
        differ = [key for key in settings if made_by.get(key) != settings[key]]
        raise ValueError(
            f"The checkpoint {path} was made by another call: "
            + ", ".join(f"{key} was {made_by.get(key)!r}, now {settings[key]!r}" for key in differ)
            + ". Name another file, or delete this one to start afresh."
        )
    _load_exactly(model, {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}, path)
    for index, parameter in enumerate(optimiser.param_groups[0]["params"]):
        if f"momentum.{index}" in tensors:
            buffer = tensors[f"momentum.{index}"].to(parameter.device)
            optimiser.state[parameter]["momentum_buffer"] = buffer.to(memory_format=torch.preserve_format)
    return json.loads(metadata["history"])

"""How good a network is: predict, evaluate, and its resilience under many multipliers.

Chapter: 05, "What happens to a network?"
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximate, assignment_of, evaluating, restore
from axmoe_lite.multipliers import EXACT, errors, multiplier


@torch.inference_mode()
def check_fits(model: nn.Module, images: Images) -> None:
    """One image through the model, so that a mismatch is a clear error before any work."""
    if not isinstance(images, Images):
        raise ValueError(
            f"The images are a {type(images).__name__}; an Images set is needed, as datasets.load() and"
            " datasets.read_npz() give it, or datasets.Images made of your tensors."
        )
    device = next(model.parameters()).device
    shape, classes = list(images.x_test.shape[1:]), len(images.classes)
    try:
        with evaluating(model), moe.watching(model):  # who watches outside is not to see this one
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


@torch.inference_mode()
def predict(model: nn.Module, images: Images, *, batch_size: int = 250, progress: bool = True) -> Tensor:
    """The class of the highest score for each test image: int64 [N], on the CPU.

    The model is in evaluation mode during the call, and each of its modules in its own mode after it.

    Raises:
        ValueError: if the model cannot take the images.
        FloatingPointError: if a score is NaN, of which none is the highest.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 image is answered at a time.")
    check_fits(model, images)
    device, guesses = next(model.parameters()).device, []
    with evaluating(model):
        for x in tqdm(images.x_test.split(batch_size), desc="predict", leave=False, disable=not progress):
            x = images.normalised(x.to(device)).contiguous(memory_format=torch.channels_last)
            scores = model(x)
            if bool(scores.isnan().any()):
                raise FloatingPointError(
                    f"This {type(model).__name__} answers some images of {images.name} with NaN: its training has"
                    " diverged, or its weights are damaged."
                )
            guesses.append(scores.argmax(1).cpu())
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
        names: multipliers, each given to all of :func:`axmoe_lite.layers.default_layers`; ``"float32"`` always comes
            first, and need not be named.
        calibration: normalised training images [N, C, H, W] that set the activation ranges, once for all.

    Returns:
        One dict a multiplier, ``"float32"`` first: ``multiplier``, ``digest`` of its table, ``power_mw``,
        ``mean_error``, ``top1`` in [0, 1], ``correct`` (of the test images), ``seconds``.

    Raises:
        ValueError: for a multiplier that does not exist, or a network that is approximate already; before any work.
    """
    if assignment_of(network):
        raise ValueError(
            f"This {type(network).__name__} has approximate layers already; restore() it before resilience()."
        )
    tables = {name: multiplier(name) for name in names if name != "float32"}
    rows: list[dict] = []
    try:
        for name, found in tqdm([("float32", None), *tables.items()], desc="resilience", disable=not progress):
            if found is not None:
                approximate(network, found, calibration=None if assignment_of(network) else calibration)
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
    finally:
        restore(network)
    return rows

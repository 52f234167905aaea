"""How far each layer of a network is off under a circuit, and a remedy that costs nothing: other signs.

Chapter: 11, "Does the paper hold?"
"""

import copy
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import ApproxConv2d, ApproxLinear, approximable, approximate, default_layers
from axmoe_lite.layers.correction import layer_errors
from axmoe_lite.multipliers import EXACT, Multiplier, multiplier
from axmoe_lite.study.networks import device_of
from axmoe_lite.train import calibrate, predict

NAMES = ("multiplier", "digest")


def errors_by_layer(
    network: nn.Module, images: Images, multipliers: Iterable[str], *, n: int = 60, calibration: int = 200
) -> list[dict]:
    """Each layer's error under each multiplier, in parts of what the layer has to say.

    Against the exact product of the same bytes, which come from approximate layers before it: a layer answers for its
    own error only. Not from the paper.

    Args:
        network: exactly trained; it is left as it was.
        multipliers: names, each given to all of :func:`~axmoe_lite.layers.default_layers`.
        n: training images that are looked at, at even steps through the set.
        calibration: training images that set the range of the codes.

    Returns:
        One dict a multiplier and layer: ``multiplier``, ``digest``, ``power_mw``, ``layer``, and, relative to the root
        mean square of the outputs' standard deviations over its channels, ``shift``, that of the channels' mean
        errors, and ``scatter``, that of their standard deviations; ``seconds`` of the multiplier.

    Raises:
        ValueError: for a multiplier that does not exist, or a network without layers to approximate.

    >>> from axmoe_lite import datasets, models
    >>> images = datasets.synthetic(classes=2, size=8, n_train=20, n_test=4)
    >>> rows = errors_by_layer(models.resnet8(classes=2, width=0.25), images, [EXACT, "mul8s_1L2L"])
    >>> len(rows), rows[0]["layer"], rows[0]["shift"], rows[0]["scatter"]
    (14, 'conv1', 0.0, 0.0)
    """
    tables = [multiplier(name) for name in multipliers]
    copied, rows = copy.deepcopy(network), []
    calibrate(copied, EXACT, images, n=calibration)
    x = images.normalised(images.subset(n_train=n).x_train.to(device_of(network)))
    for table in tables:
        start = time.perf_counter()
        approximate(copied, dict.fromkeys(default_layers(copied), table))
        with moe.no_idle_experts(copied):
            measured = layer_errors(copied, x)
        told = {"multiplier": table.name, "digest": table.digest, "power_mw": table.power_mw}
        told["seconds"] = round(time.perf_counter() - start, 2)
        for layer, error in measured.items():
            signal = max(_rms(error.signal), 1e-12)
            parts = {"shift": _rms(error.shift) / signal, "scatter": _rms(error.scatter) / signal}
            rows.append({**told, "layer": layer, **parts})
    return rows


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def negated(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """A copy in which every approximate layer gets half of its input channels negated, with their weights.

    No exact product changes: (-a)(-b) = ab. But where a circuit's error grows with a number, as that of a cut operand
    does, and all numbers have one sign, as behind ReLU, errors add up; after this they cancel. It needs no image and
    no training, and hardware no more than another sign where codes are written. Not from the paper.

    Args:
        network: after :func:`~axmoe_lite.layers.approximate`; it stays as it is.
        seed: draws the channels, half of each layer's.

    Returns:
        The copy. It is for evaluation: ``restore`` would leave its weights negated.

    >>> from axmoe_lite import datasets, models
    >>> images = datasets.synthetic(classes=2, size=8, n_train=20, n_test=4)
    >>> network = calibrate(models.resnet8(classes=2, width=0.25), EXACT, images).eval()
    >>> x = images.normalised(images.x_test)
    >>> bool((negated(network)(x) == network(x)).all())
    True
    """
    made, draw = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    for layer in approximable(made).values():
        if not isinstance(layer, ApproxConv2d | ApproxLinear):
            continue
        groups = getattr(layer, "groups", 1)
        inputs = groups * layer.weight.shape[1]
        order = torch.randperm(inputs, generator=draw)
        signs = torch.ones(inputs).index_fill_(0, order[: inputs // 2], -1.0).to(layer.weight.device)
        of_group = signs.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0)
        layer.weight.data.mul_(of_group.view(*of_group.shape, *[1] * (layer.weight.ndim - 2)))
        place = signs if layer.weight.ndim == 2 else signs.view(-1, 1, 1)
        layer.register_forward_pre_hook(lambda layer, inputs, place=place: (inputs[0] * place,))
    return made


def signs(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    draws: Sequence[int] = (0, 1),
    progress: bool = True,
    **options: Any,
) -> list[dict]:
    """Top-1 under each multiplier, not retrained, as it is and with half of the channels :func:`negated`.

    Args:
        network: exactly trained; it is left as it was.
        draws: seeds of :func:`negated`.
        options: of :func:`~axmoe_lite.train.calibrate`.

    Returns:
        One dict for float32, then one a multiplier and draw: ``multiplier``, ``digest``, ``power_mw``, ``regime``
        ("as it is" or "half negated"), ``draw`` (-1 as it is), ``top1`` in [0, 1], ``correct``, ``seconds``.
    """
    tables, copied, rows = [multiplier(name) for name in multipliers], copy.deepcopy(network), []

    def look(one: nn.Module, table: Multiplier | None, draw: int) -> None:
        start = time.perf_counter()
        correct = int((predict(one, images, progress=False) == images.y_test.cpu()).sum())
        told = {"multiplier": table.name, "digest": table.digest} if table else dict.fromkeys(NAMES, "float32")
        told |= {"power_mw": (table or multiplier(EXACT)).power_mw, "draw": draw, "correct": correct}
        told |= {"regime": "as it is" if draw < 0 else "half negated", "top1": correct / len(images.x_test)}
        rows.append(told | {"seconds": round(time.perf_counter() - start, 2)})

    look(copied, None, -1)
    calibrate(copied, EXACT, images, **options)
    for table in tqdm(tables, desc="signs", disable=not progress):
        approximate(copied, dict.fromkeys(default_layers(copied), table))
        look(copied, table, -1)
        for draw in draws:
            look(negated(copied, seed=draw), table, draw)
    return rows

"""How far each layer of a network is off under a circuit.

Chapter: 13, "What do other signs give back?"
"""

import copy
import time
from collections.abc import Iterable

from torch import Tensor, nn

from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximate, default_layers
from axmoe_lite.layers.correction import layer_errors
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.study.networks import device_of
from axmoe_lite.train import calibrate


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

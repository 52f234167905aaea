"""Accuracy and cost of a network under each multiplier, in each regime.

Chapter: 09, "What does accuracy cost?"
"""

import base64
import copy
import functools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import cost
from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximable, approximate, assignment_of, default_layers
from axmoe_lite.layers.correction import correct_bias
from axmoe_lite.multipliers import EXACT, Mosaic, Multiplier, errors, multiplier
from axmoe_lite.study.networks import check_known, device_of, digest_of
from axmoe_lite.train import calibrate, norms_of, predict, refresh_norms, retrain

REGIMES = ("not retrained", "bias corrected", "norms refreshed", "retrained")


def regimes_for(network: str) -> tuple[str, ...]:
    """Those of :data:`REGIMES` that a network of this name can be in: a transformer has no averages to refresh.

    >>> regimes_for("vit_small")
    ('not retrained', 'bias corrected', 'retrained')
    """
    return tuple(r for r in REGIMES if not (r == "norms refreshed" and network.startswith("vit")))


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
        checkpoint: a file name for half-finished retraining, in which ``{multiplier}`` becomes the name and eight
            letters for what it started from and how, so that nothing else resumes from it. It is removed when the row
            after it is asked for, or the end.

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
    for what, given in (("multipliers", multipliers), ("regimes", regimes), ("layers", layers)):
        if isinstance(given, str) or (what == "multipliers" and not isinstance(given, Iterable)):
            raise ValueError(f"{what} is {given!r}; give a list of names, such as [{str(given)!r}].")
    names, known = list(multipliers), set(skip)
    tables = {name: None if name == "float32" else multiplier(name) for name in names}
    if assignment_of(network):
        raise ValueError(
            f"This {type(network).__name__} has approximate layers already; restore() it before measure()."
        )
    layers = default_layers(network) if layers is None else list(layers)
    for name in layers:
        check_known("layer", name, approximable(network))
    if type(retrain_epochs) is not int or retrain_epochs < 0:
        raise ValueError(f"retrain_epochs is {retrain_epochs!r}; it is at least 0, and 0 retrains nothing.")
    regimes = ["not retrained", "retrained"] if regimes is None else list(regimes)
    for regime in (*regimes, *(regime for _, regime in known)):
        check_known("regime", regime, REGIMES)
    few = images.subset(n_train=retrain_images)
    retraining = {
        "epochs": retrain_epochs,
        "options": {"images": few, "evaluate_every": 0, "progress": progress, **(retrain_options or {})},
    }
    regimes = [
        r for r in regimes if (r != "retrained" or retrain_epochs) and (r != "norms refreshed" or norms_of(network))
    ]
    macs = cost.count(network, images.normalised(images.subset(n_test=1000).x_test.to(device_of(network))))
    prices = {
        name: cost.price(macs, dict.fromkeys(layers, table) if table else {}, base=base)
        for name, table in tables.items()
    }

    @functools.cache
    def in_bytes() -> nn.Module:  # the range of a layer's codes does not depend on the multiplier
        exact = dict.fromkeys(layers, EXACT)
        return calibrate(copy.deepcopy(network), exact, images, **(calibrate_options or {}))

    def one(name: str, wanted: list[str]) -> Iterator[dict]:
        start, table = time.perf_counter(), tables[name]
        calibrated = copy.deepcopy(in_bytes() if table else network)
        if table:
            approximate(calibrated, dict.fromkeys(layers, table))
        file = None
        if checkpoint is not None and "retrained" in wanted:  # another network or other options have another file
            given = [sorted((options or {}).items()) for options in (calibrate_options, retrain_options)]
            begun = digest_of(calibrated, (retrain_epochs, retrain_images, given))
            file = str(checkpoint).replace("{multiplier}", f"{name.replace(':', '-')}-{begun}")
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
                "mean_error": _mean_error(table),
                "seconds": round(time.perf_counter() - start, 2),
                "answers": pack_answers(right),
            }
            start = time.perf_counter()  # what the caller did with the row is not the next row's time
        if file is not None:
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
        some = images.subset(n_train=500).x_train.to(device_of(network))
        correct_bias(network, images.normalised(some))
    if regime == "norms refreshed":
        refresh_norms(network, images, augment=options.get("augment", "crop_flip"))
    if regime == "retrained":
        return retrain(network, epochs=epochs, checkpoint=checkpoint, **options).diverged
    return ""


def _mean_error(table: Multiplier | Mosaic | None) -> float:
    if isinstance(table, Mosaic):
        return table.mean(_mean_error)
    return errors(table).mean_error if table else 0.0


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


def pack_answers(right: Tensor | np.ndarray | list[bool]) -> str:
    """Which test images were answered right, bool [N], as base64 of their bits in the order of the set.

    >>> pack_answers([True, False, True])
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

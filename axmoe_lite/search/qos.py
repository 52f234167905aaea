"""A few multipliers for a few operating points: QoS-Nets' choice, from predicted errors alone.

    v = rows(std, signal, sigma, EVOAPPROX)               how much of its tolerance each multiplier uses up
    points = choose(std, signal, sigma, EVOAPPROX)        assignments, the most accurate first
    found = search(network, images, EVOAPPROX, ...)       the same, measured on validation images

A chip that can be told at run time to be accurate or to save power holds a few multipliers, the instances. Each of its
operating points says which layer uses which of them. So the points cannot be chosen one by one: a layer l at scale c
(small means accurate) uses up of its tolerance

    v[(c, l), j] = std[l, j] / (c sigma[l] signal[l])                                        (1)

under multiplier j, and these rows of all layers at all scales are put into as many clusters as there are instances.
Rows of a cluster share one multiplier: the cheapest that their centre tolerates. Sources: QoS-Nets (arXiv 2410.07762)
and, for the scales, the compression of v and the number of starts, its authors' published code.

No network is run for the choice. :mod:`axmoe_lite.search.points` runs the points, all on one set of weights.

Chapter: 15, "Can one network have several prices?"
"""

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import cost
from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximable
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.search.space import catalogue
from axmoe_lite.search.trial import Found, Trial

SCALES = (0.3, 1.0, 2.0)
STARTS = 10  # of k-means, of which the best is taken
ROUNDING = 1e-9  # k-means moves the origin, so the centre of equal rows differs from them in its last bits

Std = Mapping[str, Mapping[str, float]]


def rows(
    std: Std,
    signal: Mapping[str, float],
    sigma: Mapping[str, float],
    multipliers: Iterable[str],
    *,
    scales: Sequence[float] = SCALES,
) -> np.ndarray:
    """Equation (1): the share of its tolerance that each multiplier uses up, for each layer at each scale.

    Args:
        std: layer to multiplier to the predicted standard deviation of the accumulator's error, at least 0, in units
            of the integer product. The exact circuit need not be there: its error is 0.
        signal: layer to the standard deviation of its exact accumulator, in the same unit.
        sigma: layer to its tolerance, relative to the signal. 0 tolerates nothing but the exact circuit.
        multipliers: names to choose from. The exact circuit is always among them.
        scales: of the tolerances, one for each operating point, positive and rising: the most accurate point first.

    Returns:
        float64 [o L, M]: scale by scale the layers in the order of ``sigma``; the exact circuit first, then the others
        in the order given. At most 1 is tolerated; infinite is an error where none is tolerated.

    Raises:
        ValueError: for layers that differ between the three, a multiplier that does not exist, has no power or no
            standard deviation, a number that is negative or not finite, or scales that do not rise.

    >>> v = rows({"a": {"mul8s_1L2J": 30.0}}, {"a": 100.0}, {"a": 0.2}, ["mul8s_1L2J"], scales=(0.5, 2.0))
    >>> v.round(3).tolist()  # 30 / (0.5 * 20) and 30 / (2 * 20)
    [[0.0, 3.0], [0.0, 0.75]]
    """
    names = catalogue(multipliers)
    _check_scales(scales)
    _check_layers(std, signal, sigma)
    error = np.array([[_error(std, layer, name) for name in names] for layer in sigma])
    tolerance = np.outer(scales, [sigma[layer] * signal[layer] for layer in sigma]).reshape(-1, 1)
    error = np.tile(error, (len(scales), 1))
    with np.errstate(over="ignore"):
        return np.divide(error, tolerance, out=np.where(error > 0, np.inf, 0.0), where=tolerance > 0)


def choose(
    std: Std,
    signal: Mapping[str, float],
    sigma: Mapping[str, float],
    multipliers: Iterable[str],
    *,
    instances: int = 4,
    scales: Sequence[float] = SCALES,
    seed: int = 0,
) -> list[dict[str, str]]:
    """An assignment for each operating point, with at most ``instances`` different multipliers in all of them.

    Multipliers that no row of :func:`rows` tolerates are left out, entries above 1 become 1 + ln v, and k-means does
    the rest. Centres are means, so a single layer of a cluster may get more than it tolerates.

    Not from the paper, which says only that power must fall as the scale rises: a layer for which k-means chose a
    dearer multiplier at a larger scale keeps the one of the scale before. That one is among the instances, and the
    layer tolerates it better than there. So no layer's power ever rises, whatever its share of the products.

    Also not from the paper: a layer with a tolerance of 0 (or without a signal) is in no cluster, gets the exact
    circuit, and that circuit counts among the instances.

    Args:
        std, signal, sigma, multipliers, scales: see :func:`rows`.
        instances: multipliers in hardware, 1 or more, the exact one counted where it is used.
        seed: of the starts of k-means.

    Returns:
        One assignment a scale, the most accurate first. Neighbours may be equal.

    Raises:
        ValueError: as :func:`rows`, and for instances below 1.

    >>> std = {"a": {"mul8s_1L2J": 30.0}, "b": {"mul8s_1L2J": 90.0}}
    >>> points = choose(std, {"a": 100.0, "b": 100.0}, {"a": 0.2, "b": 0.2}, ["mul8s_1L2J"], scales=(1.0, 2.0))
    >>> [list(point.values()) for point in points]  # 30 is within 40, 90 is not
    [['mul8s_1KV6', 'mul8s_1KV6'], ['mul8s_1L2J', 'mul8s_1KV6']]
    """
    _check_instances(instances)
    names = catalogue(multipliers)
    v = rows(std, signal, sigma, names, scales=scales)
    power = np.array([multiplier(name).power_mw for name in names])
    tolerated = np.flatnonzero((v <= 1).any(0))  # the exact circuit, column 0, always is
    columns = tolerated[_cluster(v[:, tolerated], power[tolerated], instances, seed)]
    chosen = _never_dearer(columns.reshape(len(scales), len(sigma)), power)
    return [dict(zip(sigma, (names[m] for m in point), strict=True)) for point in chosen]


def _cluster(v: np.ndarray, power: np.ndarray, instances: int, seed: int) -> np.ndarray:
    """[rows, M] to the column of each row's multiplier, int64 [rows]; column 0 is the exact circuit."""
    chosen, free = np.zeros(len(v), int), np.isfinite(v).all(1)
    # Rows that tolerate nothing take the exact circuit; if no cluster does, it needs an instance of its own.
    for clusters in (instances, instances - 1):
        chosen[free] = _kmeans(v[free], power, clusters, seed) if clusters and free.any() else 0
        if len(np.unique(chosen)) <= instances:
            break
    return chosen


def _kmeans(v: np.ndarray, power: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans  # heavy, and needed nowhere else

    near = np.where(v > 1, 1 + np.log(np.maximum(v, 1)), v)
    clusters = min(clusters, len(np.unique(near, axis=0)))
    found = KMeans(n_clusters=clusters, n_init=STARTS, random_state=seed).fit(near)
    cheapest = []
    for centre in found.cluster_centers_:
        order = np.lexsort((centre, power))  # of equal power the smaller error
        cheapest.append(next(m for m in order if centre[m] <= 1 + ROUNDING))
    return np.array(cheapest)[found.labels_]


def _never_dearer(chosen: np.ndarray, power: np.ndarray) -> np.ndarray:
    """[o, L], each layer's power made to fall or stay from one operating point to the next."""
    chosen = chosen.copy()
    for before, point in itertools.pairwise(chosen):  # rows are views: repairs carry over
        dearer = power[point] > power[before]
        point[dearer] = before[dearer]
    return chosen


def search(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    std: Std,
    signal: Mapping[str, float],
    sigma: Mapping[str, float],
    instances: int = 4,
    scales: Sequence[float] = SCALES,
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[Found]:
    """The operating points of :func:`choose`, each scored alone on n training images; test images are not looked at.

    Args:
        network: exactly trained; left as it was.
        multipliers, std, signal, sigma, instances, scales: see :func:`choose`. Tolerances learned on the training
            images of ``hold_out(images, n=n, seed=seed)`` have not seen the validation images either.
        base: what costs are relative to: the count of the dense network; None: this network.
        n, seed, regime, prepare, calibrate_options: see :class:`~axmoe_lite.search.Trial`. The seed draws the
            validation images, and the starts of k-means.
        checkpoint: a JSON file that keeps every score, so that an interrupted search goes on where it was.

    Returns:
        One a scale, the most accurate first, as :func:`~axmoe_lite.search.points.operating_points` takes them: not a
        front, since a point may be dominated by another. ``evaluated`` counts the different ones.

    Raises:
        ValueError: before anything is run: as :func:`choose`, or for a layer that this network does not have; for a
            checkpoint of another search.
    """
    assignments = choose(std, signal, sigma, multipliers, instances=instances, scales=scales, seed=seed)
    known = approximable(network)
    for layer in sigma:
        if layer not in known:
            raise ValueError(f"{_unknown(layer, known)} This {type(network).__name__} has {', '.join(known)}.")
    healing = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    kept = {"base": base, "checkpoint": checkpoint, "n": n, "seed": seed}
    trial = Trial(network, images, layers=list(sigma), **healing, **kept)
    scores = [trial.evaluate(one) for one in tqdm(assignments, desc="operating points", disable=not progress)]
    return [
        Found(one, trial.price(one), s.loss, s.divergence, s.accuracy, evaluated=len(trial.evaluate.used))
        for one, s in zip(assignments, scores, strict=True)
    ]


# ------------------------------------------------------------------------------ what is refused


def _check_scales(scales: Sequence[float]) -> None:
    ordered = all(a < b for a, b in itertools.pairwise(scales))
    if not len(scales) or not ordered or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(
            f"scales are {tuple(scales)}; one positive number for each operating point is needed, rising, since the"
            " smallest makes the most accurate point."
        )


def _check_instances(instances: int) -> None:
    if instances < 1:
        raise ValueError(f"instances is {instances}; hardware holds at least 1 multiplier.")


def _check_layers(std: Std, signal: Mapping[str, float], sigma: Mapping[str, float]) -> None:
    if not sigma:
        raise ValueError("sigma names no layer; give a tolerance for each layer that is to get a multiplier.")
    for name, given in {"std": std, "signal": signal}.items():
        for layer in [*sigma, *given]:
            where, other = ("sigma", sigma) if layer in given else (name, given)
            if layer not in other:
                raise ValueError(
                    f"{_unknown(layer, other)} sigma, std and signal must be of the same layers, but {where} lacks it."
                )
    for name, given in {"signal": signal, "sigma": sigma}.items():
        for layer, value in given.items():
            _check_size(f"{name} of layer {layer!r}", value)


def _error(std: Std, layer: str, name: str) -> float:
    if name == EXACT:
        return 0.0
    if name not in std[layer]:
        raise ValueError(
            f"std of layer {layer!r} has no multiplier {name!r}; it has {', '.join(std[layer]) or 'none'}. Predict it"
            " too, or leave it out of multipliers."
        )
    _check_size(f"std of layer {layer!r} under {name!r}", std[layer][name])
    return std[layer][name]


def _check_size(what: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"The {what} is {value}; it must be finite and not negative.")


def _unknown(layer: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(layer, list(known), n=1, cutoff=0.0)
    return f"There is no layer {layer!r}." + (f" Did you mean {near[0]!r}?" if near else "")

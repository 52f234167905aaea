"""How long a layer takes on which cores, foretold from its shape: fitted once to layers that were measured.

    rows = measure(synthetic(400))                  see microbench; once for a machine
    to_fit, to_check = apart(rows)                  by layer, so that the error is on layers it never saw
    predictor = fit(to_fit)
    predictor.error(to_check)                       mean absolute percentage error, 0.1 is 10 %
    times = predictor.table(layers)                 what the searches for a schedule need

A layer is known by its shape alone: G groups of products [N, K] x [K, M]. Its time is a sum, with weights from 0, of

    N K M G, N K G, K M G, N M G, N, K G, M G, 1                                                     (1)

fitted for each kind of layer (dense or grouped convolution, depthwise convolution, linear for one row, linear for more
rows) so that the relative errors are small. On H cores the rows N are dealt out in tiles, and the busiest core has

    T_H = T_1 ceil(tiles / H) / tiles + overhead_H,   tiles = ceil(N / tile).                        (2)

That is Pipe-it's predictor (arXiv 1903.05898) as the field describes it, and is ``method="tiles"``; fitting one for
each kind of layer is ours. What a library does depends on more than that: other methods are named below.

Chapter: 19, "Which core for which layer?"
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from axmoe_lite import moe
from axmoe_lite.search.pipeit.microbench import SHAPE, check_layers, host, kernel, measure, shape_of, synthetic
from axmoe_lite.search.pipeit.schedule import Stage
from axmoe_lite.search.pipeit.shapes import Layer

__all__ = ["METHODS", "Predictor", "apart", "fit", "host", "measure", "synthetic"]

METHODS = ("tiles", "each", "kernels", "trees")
TILES = (1, 2, 4, 8, 16, 32, 64, 128)
FEWEST = 8
"""Layers of a kind that a fit needs: as many as (1) has terms."""


@dataclass(frozen=True, eq=False)
class _Sums:
    """The sum (1) of a kind of layer, and, if there are any, those of its kernels and what trees make of it."""

    weights: np.ndarray
    floor: float
    kernels: Mapping[int, np.ndarray]
    trees: Any = None

    def __call__(self, layers: Sequence[Layer]) -> np.ndarray:
        weights = np.array([self.kernels.get(kernel(one), self.weights) for one in layers])
        # A sum without its constant term can come near 0, and no schedule can be made of layers that take no time.
        seconds = np.maximum((_terms(layers) * weights).sum(1), self.floor)
        return seconds if self.trees is None else seconds * np.exp(self.trees.predict(_logarithms(layers)))


@dataclass(frozen=True, eq=False)
class _Tiled:
    """The law (2) on top of the sum for one core."""

    alone: _Sums
    cores: int
    tile: int
    overhead: float

    def __call__(self, layers: Sequence[Layer]) -> np.ndarray:
        return self.alone(layers) * _share(layers, self.tile, self.cores) + self.overhead


@dataclass(frozen=True, eq=False)
class Predictor:
    """Seconds of a layer on each configuration it was fitted for; made by :func:`fit`.

    Attributes:
        method: one of :data:`METHODS`.
        configurations: the stages it knows, such as ``("host", 2)``.
        laws: from (stage, :func:`kind_of` a layer) to what gives the seconds of such layers.
        fitted: the shapes it was fitted to.
    """

    method: str
    configurations: tuple[Stage, ...]
    laws: Mapping[tuple[Stage, str], Any]
    fitted: frozenset[tuple]

    def predict(self, layers: Sequence[Layer], configuration: Stage) -> np.ndarray:
        """Seconds of each layer on a configuration, positive float64 [W].

        Raises:
            ValueError: for a configuration or a kind of layer it was not fitted to.
        """
        check_layers(layers)
        if configuration not in self.configurations:
            known = ", ".join(map(repr, self.configurations))
            raise ValueError(f"{configuration!r} was not measured, only {known}; measure it and fit anew.")
        seconds = np.zeros(len(layers))
        kinds = [kind_of(one) for one in layers]
        for kind in dict.fromkeys(kinds):
            if (configuration, kind) not in self.laws:
                raise ValueError(
                    f"Layer {layers[kinds.index(kind)].name!r} is {kind}, and fewer than {FEWEST} such layers were"
                    f" measured on {configuration!r}, too few to fit; measure more."
                )
            chosen = [i for i, own in enumerate(kinds) if own == kind]
            seconds[chosen] = self.laws[configuration, kind]([layers[i] for i in chosen])
        return seconds

    def table(self, layers: Sequence[Layer]) -> dict[Stage, np.ndarray]:
        """:meth:`predict` for all configurations: the times that schedules are searched by."""
        return {configuration: self.predict(layers, configuration) for configuration in self.configurations}

    def error(self, rows: Sequence[Mapping[str, Any]], *, seen: bool = False) -> float:
        """Mean absolute percentage error on measured rows, as a share: 0.1 is 10 %.

        Raises:
            ValueError: for no rows, and, unless ``seen``, for layers that it was fitted to.
        """
        return float(np.mean(self._errors(rows, seen)))

    def errors(self, rows: Sequence[Mapping[str, Any]], *, seen: bool = False) -> list[dict[str, Any]]:
        """:meth:`error` by configuration and kind: ``type``, ``cores``, ``kind``, ``layers``, ``mape``, ``worst``.

        The kinds are those of the rows, and ``"all"``.
        """
        shares = self._errors(rows, seen)
        keys = [(row["type"], row["cores"], kind_of(_layer(row))) for row in rows]
        found = []
        for kind, cores in dict.fromkeys(key[:2] for key in keys):
            for family in ("all", *dict.fromkeys(key[2] for key in keys)):
                own = [
                    s for s, k in zip(shares, keys, strict=True) if k[:2] == (kind, cores) and family in ("all", k[2])
                ]
                if own:
                    told = {"type": kind, "cores": cores, "kind": family, "layers": len(own)}
                    found.append(told | {"mape": float(np.mean(own)), "worst": float(max(own))})
        return found

    def foretell(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Seconds foretold for each measured row's layer and configuration, float64 [rows].

        Raises:
            ValueError: as :meth:`predict`, and for no rows.
        """
        _check_rows(rows)
        told = np.zeros(len(rows))
        for stage in dict.fromkeys((row["type"], row["cores"]) for row in rows):
            own = [i for i, row in enumerate(rows) if (row["type"], row["cores"]) == stage]
            told[own] = self.predict([_layer(rows[i]) for i in own], stage)
        return told

    def _errors(self, rows: Sequence[Mapping[str, Any]], seen: bool) -> np.ndarray:
        _check_rows(rows)
        known = sum(shape_of(_layer(row)) in self.fitted for row in rows)
        if known and not seen:
            raise ValueError(
                f"{known} of the {len(rows)} rows are of layers that this was fitted to; keep some with apart(), or"
                " say seen=True."
            )
        measured = np.array([row["seconds"] for row in rows])
        return np.abs(self.foretell(rows) - measured) / measured


def kind_of(layer: Layer) -> str:
    """What a layer is fitted with.

    ``"linear"``, a linear layer for one row, which reads each weight once; ``"rows"``, one for more, and products of
    two activations; ``"depthwise"``; ``"dense"``, grouped convolutions among them.

    >>> kind_of(Layer("a", 49, 9, 1, groups=64)), kind_of(Layer("b", 197, 384, 384, kind="linear"))
    ('depthwise', 'rows')
    """
    if layer.kind == "linear":
        return "rows" if layer.n * layer.groups > 1 else "linear"
    return "depthwise" if layer.groups > 1 and layer.m == 1 else "dense"


def apart(
    rows: Sequence[Mapping[str, Any]], *, share: float = 0.25, seed: int = 0
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Rows to fit and rows to check, by layer: all configurations of a layer are on one side.

    Args:
        share: of the layers, to check, above 0 and below 1; at least one layer is on each side.

    Raises:
        ValueError: for another share, or fewer than two layers.
    """
    _check_rows(rows)
    shapes = list(dict.fromkeys(shape_of(_layer(row)) for row in rows))
    if not 0 < share < 1 or len(shapes) < 2:
        raise ValueError(f"share is {share} of {len(shapes)} layer(s); between 0 and 1, of two or more, is needed.")
    count = min(max(1, round(share * len(shapes))), len(shapes) - 1)
    kept = {shapes[i] for i in np.random.default_rng(seed).permutation(len(shapes))[:count]}
    return tuple([row for row in rows if (shape_of(_layer(row)) in kept) == side] for side in (False, True))


def fit(rows: Sequence[Mapping[str, Any]], *, method: str = "trees", ridge: float = 1e-4, seed: int = 0) -> Predictor:
    """A predictor for the configurations of measured rows.

    The weights of (1) are from 0 and minimise sum of (foretold / measured - 1)^2 + ridge * sum of weights^2, each
    term first scaled to the same size.

    Args:
        rows: of :func:`measure`. At least eight layers of a kind on a configuration are needed to fit that kind.
        method: ``"tiles"``, the paper's: (1) on one core, (2) on more, the tile of :data:`TILES` and the overhead that
            fit best. Not from the paper: ``"each"``, (1) for each configuration; ``"kernels"``, that for each
            :func:`kernel` that 16 layers or more have; ``"trees"``, the same, times a correction by
            gradient-boosted trees on the logarithms of the shape, for kinds with 24 layers or more.
        seed: of the trees.

    Raises:
        ValueError: for no rows, times that are not positive, another method, or by ``"tiles"`` a type of cores whose
            single core was not measured.
    """
    moe.check_option("method", method, METHODS)
    _check_rows(rows)
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; it is at least 0.")
    configurations = tuple(dict.fromkeys((row["type"], row["cores"]) for row in rows))
    for kind, cores in configurations:
        if method == "tiles" and (kind, 1) not in configurations:
            raise ValueError(f"{(kind, cores)!r} was measured and {(kind, 1)!r} was not; (2) needs one core's times.")
    laws: dict[tuple[Stage, str], Any] = {}
    for stage in sorted(configurations, key=lambda one: one[1]):  # one core first: others build on it
        for kind, (layers, seconds) in _by_kind(rows, stage).items():
            alone = laws.get(((stage[0], 1), kind))
            if len(layers) < FEWEST or (method == "tiles" and stage[1] > 1 and alone is None):
                continue
            if method == "tiles" and stage[1] > 1:
                laws[stage, kind] = _fit_tiles(alone, layers, seconds, stage[1])
            else:
                laws[stage, kind] = _fit_sums(layers, seconds, method, ridge, seed)
    return Predictor(method, configurations, laws, frozenset(shape_of(_layer(row)) for row in rows))


# ------------------------------------------------------------------------------ the fits


def _by_kind(rows: Sequence[Mapping[str, Any]], stage: Stage) -> dict[str, tuple[list[Layer], np.ndarray]]:
    """The layers measured on a stage, and their seconds."""
    found: dict[str, list[tuple[Layer, float]]] = {}
    for row in rows:
        if (row["type"], row["cores"]) == stage:
            found.setdefault(kind_of(_layer(row)), []).append((_layer(row), row["seconds"]))
    return {kind: ([one for one, _ in told], np.array([s for _, s in told])) for kind, told in found.items()}


def _terms(layers: Sequence[Layer]) -> np.ndarray:
    """[W, 8]: those of (1), of all groups together."""
    n, k, m, groups = np.array([(one.n, one.k, one.m, one.groups) for one in layers], dtype=float).T
    terms = (n * k * m * groups, n * k * groups, k * m * groups, n * m * groups, n, k * groups, m * groups, n**0)
    return np.stack(terms, axis=1)


def _logarithms(layers: Sequence[Layer]) -> np.ndarray:
    """What the trees see: sizes, reuse, and how well channels fill vectors of 16 numbers."""
    terms = np.log(_terms(layers))
    channels = np.array([(one.k // kernel(one) ** 2, one.m, one.groups) for one in layers])
    full = channels / (16 * np.ceil(channels / 16))
    sides = np.array([[kernel(one)] for one in layers])
    return np.hstack([terms[:, :7], terms[:, :1] - np.log(np.exp(terms[:, 1:4]).sum(1, keepdims=True)), full, sides])


def _share(layers: Sequence[Layer], tile: int, cores: int) -> np.ndarray:
    """[W]: the share of a layer's tiles that the busiest core has."""
    tiles = np.array([math.ceil(one.n / tile) for one in layers])
    return np.ceil(tiles / cores) / tiles


def _fit_sums(layers: list[Layer], seconds: np.ndarray, method: str, ridge: float, seed: int) -> _Sums:
    kernels = {}
    if method in ("kernels", "trees"):
        sides = np.array([kernel(one) for one in layers])
        for side in dict.fromkeys(sides.tolist()):
            own = np.flatnonzero(sides == side)
            if len(own) >= 2 * FEWEST:
                kernels[side] = _weights([layers[i] for i in own], seconds[own], ridge)
    found = _Sums(_weights(layers, seconds, ridge), float(seconds.min()) / 2, kernels)
    if method != "trees" or len(layers) < 3 * FEWEST:
        return found
    from sklearn.ensemble import GradientBoostingRegressor

    options = {"n_estimators": 300, "learning_rate": 0.05, "max_depth": 3, "subsample": 0.7, "loss": "absolute_error"}
    trees = GradientBoostingRegressor(**options, random_state=seed)
    trees.fit(_logarithms(layers), np.log(seconds / found(layers)))
    return replace(found, trees=trees)


def _weights(layers: Sequence[Layer], seconds: np.ndarray, ridge: float) -> np.ndarray:
    """[8]: those of (1). Rows are over the time measured, so that all should be 1."""
    from scipy.optimize import nnls  # comes with scikit-learn

    relative = _terms(layers) / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    stacked = np.vstack([relative / scale, math.sqrt(ridge) * np.eye(len(scale))])
    weights, _ = nnls(stacked, np.concatenate([np.ones(len(layers)), np.zeros(len(scale))]))
    return weights / scale


def _fit_tiles(alone: _Sums, layers: list[Layer], seconds: np.ndarray, cores: int) -> _Tiled:
    """The tile and the overhead with the smallest sum of squared relative errors."""
    best, least = None, math.inf
    for tile in TILES:
        tiled = alone(layers) * _share(layers, tile, cores)
        overhead = max(0.0, float(((seconds - tiled) / seconds**2).sum() / (1 / seconds**2).sum()))
        missed = float((((tiled + overhead) / seconds - 1) ** 2).sum())
        if missed < least:
            best, least = _Tiled(alone, cores, tile, overhead), missed
    return best


def _layer(row: Mapping[str, Any]) -> Layer:
    return Layer("measured", row["n"], row["k"], row["m"], row["groups"], row["kind"])


def _check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    if not len(rows):
        raise ValueError("No rows were given; measure() makes them.")
    needed = ("type", "cores", *SHAPE, "seconds")
    for i, row in enumerate(rows):
        if missing := [name for name in needed if name not in row]:
            raise ValueError(f"Row {i} lacks {', '.join(missing)}; rows are as measure() makes them.")
        if not (math.isfinite(row["seconds"]) and row["seconds"] > 0):
            raise ValueError(f"Row {i} took {row['seconds']} seconds; positive numbers are needed.")

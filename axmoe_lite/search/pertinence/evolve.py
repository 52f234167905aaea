"""NSGA-II over how the dispatcher is trained: penalties and class weighting are genes, accuracy and cost the goals.

    split = thirds(len(pool))
    found = search(pool, split)          a front of dispatchers, by the search images
    rows = report(pool, split, found)    and what they are worth, on the final images

An individual has N^2 + 1 genes: the N x N penalties of equation (1) of
:mod:`~axmoe_lite.search.pertinence.dispatcher`, and which of three class weightings. It becomes a freshly trained
layer; a generation is trained at once. The diagonal of the penalties is among the genes as in the paper, and is
multiplied by 0.

Letters: N networks, F features, G = N^2 + 1 genes, S individuals.

Source: PERTINENCE (arXiv 2507.01695, v3), on Deb et al. (IEEE Transactions on Evolutionary Computation, 2002).

Chapter: 18, "Which network for which input?"
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from axmoe_lite.search import additive
from axmoe_lite.search.genetic import check_numbers, check_pymoo
from axmoe_lite.search.pertinence.dispatcher import (
    WEIGHTINGS,
    Layers,
    check_training,
    choose,
    class_weights,
    fit,
    score,
)
from axmoe_lite.search.pertinence.look import keep, recall
from axmoe_lite.search.pertinence.pool import Pool, Split, routes
from axmoe_lite.search.trial import digest


@dataclass(frozen=True, eq=False)
class Routed:
    """A dispatcher on the front, as measured on the search images.

    Attributes:
        penalties: float64 [N, N], by true and predicted label, zero on the diagonal; what the layer was trained with.
        weighting: ``"INS"``, ``"ISNS"`` or ``"ENS"``.
        weight, bias: [N, F] and [N], the layer, on the features as they are.
        accuracy, cost: of the whole, in [0, 1] and in the pool's unit.
        evaluated: how many dispatchers the search has trained altogether.
        split: the digest of the :class:`Split` that the search was given.
    """

    penalties: Tensor
    weighting: str
    weight: Tensor
    bias: Tensor
    accuracy: float
    cost: float
    evaluated: int
    split: str

    def choose(self, features: Tensor) -> Tensor:
        """The network that it sends each image to: int64 [n], for features [n, F]."""
        return choose(Layers(self.weight[None], self.bias[None]), features)[0]


def search(
    pool: Pool,
    split: Split,
    *,
    population: int = 50,
    generations: int = 50,
    epochs: int = 20,
    lr: float = 1e-3,
    batch: int = 256,
    beta: float = 0.999,
    crossover: float = 0.9,
    eta_crossover: float = 20.0,
    mutation: float | None = None,
    eta_mutation: float = 25.0,
    high: float = 100.0,
    start: np.ndarray | None = None,
    seed: int = 0,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[Routed]:
    """Dispatchers on the front of accuracy and cost; they learn on ``split.fit`` and are scored on ``split.search``.

    The final images are not looked at. A label that no fit image has (a network that is never the cheapest right one)
    is no error: no image pulls the layer there, and the front does without that network or nearly so.

    Args:
        pool: what all networks answered.
        split: of :func:`~axmoe_lite.search.pertinence.thirds`, or your own.
        population, generations: individuals that live at a time, and how often they breed, the first among them. The
            paper: 50 and 50. At most their product is trained: not who differs from a known one on the diagonal alone.
        epochs, lr, batch: of :func:`~axmoe_lite.search.pertinence.fit`. Few images are few steps in 20 epochs, which
            move a layer hardly away from its random weights at a rate of 0.001: raise ``lr``, or lower ``batch``.
        beta: of the weighting ``"ENS"``. Not from the paper: 0.999.
        crossover, eta_crossover: probability and index of simulated binary crossover. The paper: 0.9 and 20.
            The weighting is inherited from one of the parents (not from the paper).
        mutation, eta_mutation: the probability that a gene mutates, and the index of polynomial mutation. None: 1 / G,
            which is not from the paper, 25 is. The weighting mutates to one of the other two.
        high: the largest penalty. The paper: 100.
        start: float64 [K, G], individuals of the first generation, such as :func:`ratios`; the others are random, in
            the paper all. At most ``population`` of them.
        seed: of the genes, and of every layer's first weights and batches.
        checkpoint: a .safetensors file, written after each generation. A search that was interrupted breeds the same
            individuals again, and trains only those that the file does not know; more generations go on from it.

    Returns:
        The front of all that was evaluated, from the cheapest to the dearest.

    Raises:
        ImportError: without pymoo.
        ValueError: before anything is trained: for numbers out of range, a split that names images the pool has not, or
            a file that another search has made.
    """
    options = {"epochs": epochs, "lr": lr, "batch": batch}
    check_numbers(0, population=population, generations=generations, crossover=crossover, mutation=mutation)
    check_training(**options)
    if not (eta_crossover > 0 and eta_mutation > 0 and 0 < high < np.inf):
        raise ValueError(
            f"eta_crossover is {eta_crossover}, eta_mutation {eta_mutation}, high {high}; all three are positive."
        )
    split.check_fits(len(pool))
    check_pymoo()
    G = len(pool.names) ** 2 + 1
    breeding = {"crossover": crossover, "eta_crossover": eta_crossover, "eta_mutation": eta_mutation, "high": high}
    breeding |= {"mutation": 1 / G if mutation is None else mutation, "population": population, "seed": seed}
    given = _check_start(start, G, population, high)
    train = _trainer(pool, split, beta=beta, seed=seed, **options)
    settings = {
        "pool": digest([pool.paid, pool.correct, pool.features], *pool.names),
        "split": split.digest,
        "options": repr(sorted((options | breeding | {"beta": beta}).items())),
        "start": digest([torch.from_numpy(given)]),
    }
    known = _Known(checkpoint and Path(checkpoint), settings)
    algorithm = _nsga2(given, **breeding)
    for _ in tqdm(range(generations), desc="generations", disable=not progress):
        born = algorithm.ask()
        if born is None or not len(born):
            break
        born.set("F", known.objectives(_without_diagonal(born.get("X")), train))
        algorithm.tell(infills=born)
    return known.front(split.digest)


def ratios(networks: int, *, steps: int = 11, decades: float = 5.0, high: float = 100.0) -> np.ndarray:
    """Individuals for ``start``: wrong answers over wasted products, their ratio at even steps of its logarithm.

    A penalty drawn evenly from 0 to 100 is seldom a hundredth of another, so that random individuals neither always
    choose the dearest network nor always the cheapest; the paper's own example has a ratio of ten thousand. Not from
    the paper.

    Args:
        networks: N.
        steps: ratios, from 10^-decades to 10^decades, each with the three weightings.
        high: the larger of the two penalties.

    Returns:
        float64 [3 steps, G].

    >>> ratios(2, steps=2, decades=1)[:2].tolist()  # too dear costs 100, too cheap 10; and back
    [[0.0, 100.0, 10.0, 0.0, 0.0], [0.0, 10.0, 100.0, 0.0, 0.0]]
    """
    true, predicted = np.indices((networks, networks))
    rows = []
    for kind in range(len(WEIGHTINGS)):
        for ratio in np.logspace(-decades, decades, steps):
            penalties = high * np.where(predicted < true, min(1, ratio), min(1, 1 / ratio)) * (predicted != true)
            rows.append(np.append(penalties.ravel(), float(kind)))
    return np.array(rows)


def taught(
    pool: Pool, split: Split, genes: np.ndarray, *, beta: float = 0.999, seed: int = 0, **options: Any
) -> list[dict]:
    """What some individuals become: where they send the search images, how often that is right, and what it costs.

    Args:
        genes: float64 [K, G], such as of :func:`ratios`.
        beta, seed, options: as of :func:`search`.

    Returns:
        A dict each: the share of images by network, ``accuracy``, ``cost``.
    """
    split.check_fits(len(pool))
    given = _check_start(genes, len(pool.names) ** 2 + 1, len(genes), np.inf)
    layers, found = _trainer(pool, split, beta=beta, seed=seed, **options)(_without_diagonal(given))
    chosen = choose(layers, pool.features[split.search])
    rows = []
    for one, (paid, minus) in zip(chosen, found.tolist(), strict=True):
        shares = torch.bincount(one, minlength=len(pool.names)).double() / len(one)
        rows.append({**dict(zip(pool.names, shares.tolist(), strict=True)), "accuracy": -minus, "cost": paid})
    return rows


# ---------------------------------------------------------------------------------- pieces


def _check_start(start: np.ndarray | None, G: int, population: int, high: float) -> np.ndarray:
    """As float64 [K, G]."""
    given = np.zeros((0, G)) if start is None else np.asarray(start, dtype=np.float64)
    right = given.ndim == 2 and given.shape[1] == G and len(given) <= population
    if not right or not ((given[:, :-1] >= 0) & (given[:, :-1] <= high)).all():
        raise ValueError(
            f"start is of shape {list(given.shape)}; it needs at most {population} (the population) rows of {G} genes:"
            f" penalties from 0 to {high}, and a weighting."
        )
    if not np.isin(given[:, -1], range(len(WEIGHTINGS))).all():
        raise ValueError(f"The last gene of start is a weighting, 0 to {len(WEIGHTINGS) - 1}, of {WEIGHTINGS}.")
    return given


def _trainer(pool: Pool, split: Split, *, beta: float, seed: int, **options: Any) -> Callable:
    """From genes [S, G] to layers and their two objectives, float64 [S, 2], both to be small: cost, minus accuracy."""
    labels, N = routes(pool.correct)[split.fit], len(pool.names)
    by_kind = torch.stack([class_weights(labels, N, kind, beta=beta) for kind in WEIGHTINGS])
    features, unseen = pool.features[split.fit], pool.features[split.search]

    def train(genes: np.ndarray) -> tuple[Layers, np.ndarray]:
        penalties = torch.from_numpy(genes[:, :-1]).view(-1, N, N)
        weights = by_kind[torch.from_numpy(genes[:, -1]).long()]
        layers = fit(features, labels, penalties, weights, seed=seed, **options)
        accuracy, paid = score(choose(layers, unseen), pool, split.search)
        return layers, torch.stack([paid, -accuracy], 1).numpy()

    return train


@dataclass
class _Known:
    """All individuals evaluated so far, and the layers of those that none dominates; kept in a file if there is one."""

    file: Path | None
    settings: dict[str, str]
    genes: list[np.ndarray] = field(default_factory=list)
    found: list[np.ndarray] = field(default_factory=list)
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        before = recall(self.file, self.settings) if self.file else None
        if before:
            self.genes, self.found = list(before["genes"].numpy()), list(before["objectives"].numpy())
            kept = zip(before["front"].tolist(), before["weight"], before["bias"], strict=True)
            self.layers = {i: (weight, bias) for i, weight, bias in kept}
        self._index = {row.tobytes(): i for i, row in enumerate(self.genes)}

    def objectives(self, genes: np.ndarray, train: Callable) -> np.ndarray:
        """[S, 2] for genes [S, G]; those that nobody knows are trained, all at once."""
        new = {row.tobytes(): row for row in genes if row.tobytes() not in self._index}
        if new:
            layers, found = train(np.stack(list(new.values())))
            for (key, row), objectives, weight, bias in zip(
                new.items(), found, layers.weight, layers.bias, strict=True
            ):
                self._index[key] = len(self.genes)
                self.layers[len(self.genes)] = weight.clone(), bias.clone()
                self.genes.append(row)
                self.found.append(objectives)
            kept = self._undominated()
            self.layers = {i: self.layers[i] for i in kept}  # who is dominated once is dominated for ever
            self._write()
        return np.stack([self.found[self._index[row.tobytes()]] for row in genes])

    def front(self, split: str) -> list[Routed]:
        N = math.isqrt(len(self.genes[0]) - 1)
        return [
            Routed(
                penalties=torch.from_numpy(self.genes[i][:-1].copy()).view(N, N),
                weighting=WEIGHTINGS[int(self.genes[i][-1])],
                weight=self.layers[i][0],
                bias=self.layers[i][1],
                accuracy=-float(self.found[i][1]),
                cost=float(self.found[i][0]),
                evaluated=len(self.genes),
                split=split,
            )
            for i in self._undominated()
        ]

    def _undominated(self) -> list[int]:
        cost, loss = np.stack(self.found).T
        return additive.undominated(cost, loss).tolist()

    def _write(self) -> None:
        if not self.file:
            return
        weight, bias = zip(*self.layers.values(), strict=True)
        tensors = {
            "genes": torch.from_numpy(np.stack(self.genes)),
            "objectives": torch.from_numpy(np.stack(self.found)),
        }
        tensors |= {"front": torch.tensor(list(self.layers)), "weight": torch.stack(weight), "bias": torch.stack(bias)}
        keep(self.file, self.settings, tensors)


def _without_diagonal(genes: np.ndarray) -> np.ndarray:
    """Genes [S, G] as they are expressed: the penalty of a right choice is 0."""
    N = math.isqrt(genes.shape[1] - 1)
    return genes * np.append((1 - np.eye(N)).ravel(), 1.0)


def _nsga2(
    given: np.ndarray,
    *,
    population: int,
    crossover: float,
    eta_crossover: float,
    mutation: float,
    eta_mutation: float,
    high: float,
    seed: int,
) -> Any:
    """pymoo's NSGA-II, to be asked for individuals and told their objectives; the last of G genes has no order.

    The first generation is those given, [K, G], and random ones.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.sbx import cross_sbx
    from pymoo.operators.mutation.pm import mut_pm
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    G, kinds = given.shape[1], len(WEIGHTINGS)
    least, most = np.zeros(G - 1), np.full(G - 1, high)

    def cross(problem: Problem, parents: Any, *, random_state: np.random.Generator, **_: Any) -> Any:
        pairs = np.array([[one.get("X") for one in pair] for pair in parents]).swapaxes(0, 1)  # [2, matings, G]
        each = np.ones((pairs.shape[1], 1))
        mixed = cross_sbx(
            pairs[:, :, :-1], least, most, eta_crossover * each, 0.5 * each, 0.5 * each, random_state=random_state
        )
        swapped = np.where(random_state.random(pairs.shape[1]) < 0.5, pairs[::-1, :, -1], pairs[:, :, -1])
        children = np.concatenate([mixed, swapped[:, :, None]], 2)
        children = np.where(random_state.random((pairs.shape[1], 1)) < crossover, children, pairs)
        return Population.new("X", children.reshape(-1, G))

    cross.n_parents = cross.n_offsprings = 2

    def mutate(problem: Problem, born: Any, *, random_state: np.random.Generator, **_: Any) -> Any:
        genes, S = born.get("X"), len(born)
        moved = mut_pm(
            genes[:, :-1],
            least,
            most,
            np.full(S, eta_mutation),
            np.full(S, mutation),
            at_least_once=False,
            random_state=random_state,
        )
        other = (genes[:, -1] + random_state.integers(1, kinds, S)) % kinds
        kind = np.where(random_state.random(S) < mutation, other, genes[:, -1])
        born.set("X", np.concatenate([moved, kind[:, None]], 1))
        return born

    draw = np.random.default_rng(seed)
    kind = draw.integers(0, kinds, (population, 1))
    first = np.concatenate([draw.uniform(0, high, (population, G - 1)), kind], 1)
    first[: len(given)] = given
    algorithm = NSGA2(pop_size=population, sampling=first, crossover=cross, mutation=mutate, survival=RankAndCrowding())
    problem = Problem(n_var=G, n_obj=2, xl=0, xu=np.append(most, kinds - 1))
    return algorithm.setup(problem, termination=NoTermination(), seed=seed)

"""NSGA-II: a population of assignments that breeds, the search that ALWANN and many papers after it use.

    evolve     the genetic algorithm, which knows genes and two numbers to be made small
    explore    groups as genes, multipliers as their values
    search     explore on a network, scored on training images

The algorithm is that of Deb et al. (IEEE Transactions on Evolutionary Computation, 2002), run by pymoo; which one of
each pair of parents a gene comes from, and how a gene mutates, is ours, because multipliers have no order.

Letters: G genes, one a group of layers; S individuals, one an assignment.

Chapter: 16, "How fine should a choice be?"
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.search import additive, experts
from axmoe_lite.search.space import OBJECTIVES, catalogue, check_groups, layers_of
from axmoe_lite.search.trial import Found, Score, Trial, front

INSTALL = 'pip install "axmoe_lite[search]"'


@dataclass(frozen=True, eq=False)
class Evolved:
    """What :func:`evolve` found.

    Attributes:
        choices: int64 [S, G], the individuals that none dominates of all that were evaluated, the cheapest first; of
            individuals with the same objectives the one evaluated first.
        objectives: float64 [S, 2], their cost and loss.
        evaluated: how many individuals were evaluated, each once.
    """

    choices: np.ndarray
    objectives: np.ndarray
    evaluated: int


def evolve(
    genes: Sequence[int],
    *,
    evaluate: Callable[[np.ndarray], tuple[float, float]],
    population: int = 32,
    generations: int = 20,
    budget: int | None = None,
    start: np.ndarray | Sequence[Sequence[int]] | None = None,
    crossover: float = 0.9,
    mutation: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evolved:
    """NSGA-II over whole numbers: gene g takes a value in 0..genes[g] - 1, and no value is nearer to one than another.

    A generation's children come from parents that win binary tournaments; of parents and children together the next
    generation is chosen by rank of domination, then by crowding distance. The front is that of all individuals ever
    evaluated, not of the last generation. An individual is evaluated once, however often it is born.

    Args:
        genes: how many values each gene has, at least 1.
        evaluate: from an individual, int64 [G], to its cost and its loss, both better when smaller. A loss may be
            infinite: such an individual is taken for worse than any with a number.
        population: individuals that live at a time, at least 2. Not from a paper, as all defaults here.
        generations: how many, the first among them, so that at most population * generations are evaluated. It ends
            earlier when all individuals that there are have been evaluated, or when no new child can be born.
        budget: individuals to evaluate at most; None: as many as the generations need.
        start: [S, G], individuals of the first generation, at most ``population`` of them; the others are random.
        crossover: the probability that two parents exchange genes, each gene with probability 1/2, in [0, 1].
        mutation: the probability that a gene of a child takes another value, all others alike, in [0, 1]; None: 1 / G.
        seed: of everything random. The same seed gives the same result, and nobody else's random numbers are used.

    Raises:
        ImportError: without pymoo.
        ValueError: before anything is evaluated, for numbers out of range; and where an objective is not a number.

    >>> found = evolve([4, 4], evaluate=lambda x: (x.sum(), 9 - 2 * x[0] - x[1]), population=8, progress=False)
    >>> found.choices.tolist()
    [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [3, 3]]
    >>> found.objectives[:, 1].tolist(), found.evaluated
    ([9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.0], 16)
    """
    sizes, given = _check_genes(genes, start)
    numbers = {"population": population, "generations": generations, "budget": budget}
    check_numbers(len(given), crossover=crossover, mutation=mutation, **numbers)
    space = math.prod(sizes.tolist())
    most = min(space, population * generations, *([] if budget is None else [budget]))
    first = _first(sizes, given, min(population, space), np.random.default_rng(seed))
    algorithm = _nsga2(sizes, first, crossover, 1 / len(sizes) if mutation is None else mutation, seed)
    known: dict[bytes, tuple[float, float]] = {}
    with tqdm(total=most, desc="evolution", disable=not progress) as bar:
        for _ in range(generations):
            born = algorithm.ask() if len(known) < most else None
            if born is None or not _live(born.get("X"), known, evaluate, most, bar):
                break
            found = np.array([known[row.tobytes()] for row in born.get("X")])
            broken = ~np.isfinite(found[:, 1:])
            born.set("F", np.where(broken, 0.0, found), "G", broken.astype(float))  # G above 0: worse than all others
            algorithm.tell(infills=born)
    choices = np.array([np.frombuffer(row, np.int64) for row in known])
    objectives = np.array(list(known.values()))
    kept = additive.undominated(objectives[:, 0], objectives[:, 1])
    return Evolved(choices[kept], objectives[kept], len(known))


def explore(
    groups: dict[str, list[str]],
    multipliers: Iterable[str],
    *,
    evaluate: Callable[[dict[str, str]], Score],
    price: Callable[[dict[str, str]], float],
    objective: str = "divergence",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[Found]:
    """:func:`search` without a network, as :func:`axmoe_lite.search.explore`: a gene a group, a value a multiplier.

    The first generation has every uniform assignment in it: the cheapest and the exact one are ends of the front.

    Args:
        groups: name to layers, each layer in one group.
        multipliers: names. The exact circuit is always among them.
        evaluate: an assignment's :class:`~axmoe_lite.search.Score`.
        price: its cost.
        objective: ``"divergence"`` or ``"loss"``: what is to be small.
        options: ``population``, ``generations``, ``budget``, ``crossover`` and ``mutation`` of :func:`evolve`.

    Returns:
        The front of all that was evaluated, from the cheapest to the dearest.
    """
    names = catalogue(multipliers)
    check_options(groups, names, objective=objective, **options)
    scores: dict[bytes, tuple[dict[str, str], float, Score]] = {}

    def objectives(choice: np.ndarray) -> tuple[float, float]:
        pairs = zip(groups.values(), choice, strict=True)
        assignment = {layer: names[m] for layers, m in pairs for layer in layers}
        score, paid = evaluate(assignment), price(assignment)
        scores[choice.tobytes()] = assignment, paid, score
        return round(paid, 12), getattr(score, objective)  # equal sums may differ in their last bits

    uniform = np.repeat(np.arange(len(names))[:, None], len(groups), 1)
    genes = [len(names)] * len(groups)
    found = evolve(genes, evaluate=objectives, start=uniform, seed=seed, progress=progress, **options)
    best = [scores[choice.tobytes()] for choice in found.choices]
    return front(best, objective=objective, evaluated=found.evaluated)


def search(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    groups: dict[str, list[str]] | None = None,
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
    **options: Any,
) -> list[Found]:
    """Assignments on the front of cost and loss by NSGA-II, chosen on n training images; test images are not seen.

    Args:
        network: exactly trained; left as it was.
        multipliers: names to choose from. The exact circuit is always among them.
        base: what costs are relative to: the count of the dense network; None: this network.
        groups: what may choose for itself; None: :func:`axmoe_lite.search.groups` of the network, by expert.
        n, seed, regime, prepare, calibrate_options: see :class:`~axmoe_lite.search.Trial`. The seed draws the
            validation images, and everything random in the algorithm.
        checkpoint: a JSON file that keeps every score. A search that was interrupted breeds the same individuals
            again, and runs only those networks that the file does not know.
        options: ``population``, ``generations``, ``budget``, ``crossover`` and ``mutation`` of :func:`evolve`;
            ``objective`` of :func:`explore`.

    Returns:
        The front as measured on the validation images, from the cheapest to the dearest.

    Raises:
        ImportError: without pymoo.
        ValueError: before anything is run: for a multiplier that does not exist or has no power, groups that are
            empty, overlap or name unknown layers, numbers out of range, or a checkpoint of another search.
    """
    names = catalogue(multipliers)
    parts = experts.groups(network) if groups is None else groups
    check_options(parts, names, **options)
    healing = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    kept = {"base": base, "checkpoint": checkpoint, "n": n, "seed": seed}
    trial = Trial(network, images, layers=layers_of(parts, network), **healing, **kept)
    asked = {"evaluate": trial.evaluate, "price": trial.price}
    return explore(parts, names, seed=seed, progress=progress, **asked, **options)


# --------------------------------------------------------------------------------- pieces


def _first(sizes: np.ndarray, given: np.ndarray, wanted: int, draw: np.random.Generator) -> np.ndarray:
    """The first generation: those given, then random ones until there are enough different ones, int64 [wanted, G]."""
    rows = {row.tobytes(): row for row in given}
    while len(rows) < wanted:
        row = draw.integers(0, sizes)
        rows.setdefault(row.tobytes(), row)
    return np.array(list(rows.values()))


def _live(born: np.ndarray, known: dict[bytes, tuple[float, float]], evaluate: Callable, most: int, bar: tqdm) -> bool:
    """Evaluate those of a generation, [S, G], that nobody knows yet; False where the budget ends before."""
    for row in born:
        if row.tobytes() in known:
            continue
        if len(known) >= most:
            return False
        paid, loss = (float(value) for value in evaluate(row.copy()))
        if not math.isfinite(paid) or math.isnan(loss):
            raise ValueError(
                f"evaluate() answered {(paid, loss)} for {row.tolist()}; a cost is a finite number, and a loss a"
                " number, or infinite where a network is broken."
            )
        known[row.tobytes()] = paid, loss
        bar.update()
    return True


def _nsga2(sizes: np.ndarray, first: np.ndarray, crossover: float, mutation: float, seed: int) -> Any:
    """pymoo's NSGA-II, to be asked for individuals and told their objectives."""
    check_pymoo()
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.core.termination import NoTermination
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    def mutate(problem: Problem, born: Any, *, random_state: np.random.Generator, **_: Any) -> Any:
        chosen = born.get("X")
        steps = 1 + random_state.integers(0, np.maximum(sizes - 1, 1), chosen.shape)
        hit = random_state.random(chosen.shape) < mutation
        born.set("X", np.where(hit, (chosen + steps) % sizes, chosen))
        return born

    algorithm = NSGA2(
        pop_size=max(2, len(first)),
        sampling=first,
        crossover=UniformCrossover(prob=crossover),
        mutation=mutate,
        survival=RankAndCrowding(),
    )
    problem = Problem(n_var=len(sizes), n_obj=2, n_ieq_constr=1, xl=0, xu=sizes - 1)
    return algorithm.setup(problem, termination=NoTermination(), seed=seed)


def check_pymoo() -> None:
    """Raise ImportError, with what to install, where pymoo is missing; keep it quiet where it is not."""
    try:
        import pymoo.algorithms.moo.nsga2  # noqa: F401
        from pymoo.config import Config
        from pymoo.functions import FunctionLoader
    except ImportError as reason:
        raise ImportError(f"NSGA-II is run by pymoo, which is not installed; {INSTALL}") from reason
    before = Config.warnings["not_compiled"]
    Config.warnings["not_compiled"] = False  # pymoo prints it at its first use, and here it loses no time
    FunctionLoader.get_instance()
    Config.warnings["not_compiled"] = before


def check_options(
    groups: dict[str, list[str]], names: Sequence[str], *, objective: str = "divergence", **options: Any
) -> None:
    """Refuse what :func:`explore` cannot be run with, before a network is calibrated for it."""
    check_groups(groups)
    moe.check_option("objective", objective, OBJECTIVES)
    check_numbers(len(names), **options)
    check_pymoo()


def _check_genes(genes: Sequence[int], start: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as int64: [G] and [S, G]."""
    sizes = np.asarray(genes)
    if sizes.ndim != 1 or not len(sizes) or sizes.dtype.kind not in "iu" or sizes.min() < 1:
        raise ValueError(f"genes is {genes!r}; give how many values each gene has, such as [3, 3, 2].")
    given = np.zeros((0, len(sizes)), int) if start is None else np.asarray(start)
    right = given.ndim == 2 and given.shape[1] == len(sizes) and given.dtype.kind in "iu"
    if not right or (given < 0).any() or (given >= sizes).any():
        raise ValueError(
            f"start is of shape {list(given.shape)}; it needs whole numbers [S, {len(sizes)}], each from 0 to below the"
            " number of values of its gene."
        )
    return sizes.astype(np.int64), given.astype(np.int64)


def check_numbers(
    start: int,
    *,
    population: int = 32,
    generations: int = 20,
    budget: int | None = None,
    crossover: float = 0.9,
    mutation: float | None = None,
) -> None:
    """Refuse options that :func:`evolve` cannot be run with, if ``start`` individuals are given."""
    if population < 2 or generations < 1 or (budget is not None and budget < 1):
        raise ValueError(
            f"population is {population}, generations {generations}, budget {budget}; at least 2, 1 and 1 are needed."
        )
    if start > population:
        raise ValueError(
            f"population is {population}, but {start} individuals are to be in the first generation (of a search one a"
            f" multiplier, the uniform assignments); give at least {start}."
        )
    for name, value in (("crossover", crossover), ("mutation", mutation)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it is a probability, from 0 to 1.")

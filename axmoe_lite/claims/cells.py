"""Rows of a study as cells that can be set against each other: found by name, never guessed.

    cells = read_cells(rows, answers)
    contrast(cells, "resnet20", {("hard", "mul8s_1L2L", "retrained"): 1, ("dense", "mul8s_1L2L", "retrained"): -1})

A contrast is a sum of accuracies with signs. It is measured on all seeds that have every term, image by image where
the answers were kept; what is missing is named.

Chapter: 11, "Does the paper hold?"
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from axmoe_lite.claims.paper import NETWORKS
from axmoe_lite.claims.statistics import Interval, paired_bootstrap, unpaired_normal
from axmoe_lite.models import TOPOLOGIES
from axmoe_lite.multipliers import PAPER_EIGHT
from axmoe_lite.study import regimes_for, unpack_answers

CLASSES = {"cifar100": 100, "cifar10": 10, "tiny-imagenet-200": 200, "digits": 10}
SHOWN = 4  # names of a kind that a sentence lists

Term = tuple[str, str, str]
"""(topology, multiplier, regime)."""


@dataclass(frozen=True)
class Cell:
    """One measured row.

    Attributes:
        retraining: its epochs, images in each, and learning rate; zeros if there was none.
        right: [images] of bool, which answers were right; None if that was not kept.
    """

    topology: str
    multiplier: str
    regime: str
    seed: int
    correct: int
    n_test: int
    p_norm: float | None
    dataset: str
    outcome: str
    retraining: tuple[int, int, float]
    n_train: int
    right: np.ndarray | None

    @property
    def top1(self) -> float:
        """In [0, 1]."""
        return self.correct / self.n_test


@dataclass(frozen=True)
class Cells:
    """What :func:`read_cells` found: cells by network, and in it by (topology, multiplier, regime, seed)."""

    by_network: dict[str, dict[tuple[str, str, str, int], Cell]]

    def seeds(self, network: str) -> list[int]:
        """Those that the network has any row of, in order."""
        return sorted({cell.seed for cell in self.by_network.get(network, {}).values()})

    def of(self, network: str, term: Term, seeds: Iterable[int] | None = None) -> list[Cell]:
        """One cell a seed, of these seeds or of all that have one."""
        cells = self.by_network.get(network, {})
        return [cells[(*term, s)] for s in (self.seeds(network) if seeds is None else seeds) if (*term, s) in cells]

    def top1(self, network: str, term: Term, seeds: Iterable[int] | None = None) -> float | None:
        """In percent, the mean over the seeds; None if it was not measured."""
        found = self.of(network, term, seeds)
        return 100 * sum(cell.top1 for cell in found) / len(found) if found else None


@dataclass(frozen=True)
class Contrast:
    """What :func:`contrast` found.

    Attributes:
        interval: in points; None if it could not be measured.
        seeds: those that have every term.
        problem: why it could not be measured, or ""; a sentence without its full stop.
        missing: (network, topology, multiplier, regime) of rows that no seed has, or the most complete one has not.
        notes: what a reader should know of what was measured, such as training that diverged.
    """

    interval: Interval | None
    seeds: tuple[int, ...]
    problem: str = ""
    notes: tuple[str, ...] = ()
    missing: tuple[tuple[str, str, str, str], ...] = ()


def read_cells(rows: Iterable[Mapping], answers: Iterable[Mapping] = ()) -> Cells:
    """Sort the rows of a study by what they measure, and put the answers where they belong.

    Args:
        rows: of :func:`axmoe_lite.study.measure` with ``network``, ``topology`` and evidence; values, or text as read
            from a file.
        answers: rows with the same key columns and ``answers``, see :func:`axmoe_lite.study.unpack_answers`. Rows may
            hold that column themselves.

    Raises:
        ValueError: for two rows of the same cell (such as two values of r), for rows of one network on different test
            images, or answers that contradict the number of correct ones.
    """
    kept = {_key(row): row["answers"] for row in answers if row.get("answers")}
    found: dict[str, dict[tuple[str, str, str, int], Cell]] = {}
    first: dict[tuple, Mapping] = {}
    for row in rows:
        place = (row["network"], row["topology"], row["multiplier"], row["regime"], int(row["seed"]))
        if place in first:
            _refuse_twice(first[place], row)
        first[place] = row
        _check_same_images(first.setdefault((row["network"],), row), row)
        _check_same_mixture(first.setdefault((row["network"], row["topology"]), row), row)
        found.setdefault(row["network"], {})[place[1:]] = _cell(row, row.get("answers") or kept.get(_key(row)))
    return Cells(found)


def contrast(cells: Cells, network: str, terms: Mapping[Term, float]) -> Contrast:
    """Measure a sum of accuracies with signs, in points, on the seeds that have all of its terms.

    Args:
        terms: factor of each accuracy; 1 and -1 make a difference of two.
    """
    by_seed = {s: [t for t in terms if (*t, s) not in cells.by_network[network]] for s in cells.seeds(network)}
    seeds = tuple(s for s, missing in by_seed.items() if not missing)
    if not seeds:
        lacking = min(by_seed.values(), key=len) if by_seed else list(terms)
        missing = tuple((network, *term) for term in lacking)
        return Contrast(None, (), f"rows are missing: {named(missing)}", missing=missing)
    grid = [[cells.by_network[network][(*term, seed)] for term in terms] for seed in seeds]
    retraining = {cell.retraining for row in grid for cell in row if cell.regime == "retrained"}
    if len(retraining) > 1:
        ways = " and ".join(f"{n} epochs of {images:,} images, rate {lr:g}" for n, images, lr in sorted(retraining))
        return Contrast(None, seeds, f"{network} was retrained in two ways ({ways}), which is no fair comparison")
    return Contrast(_interval(grid, list(terms.values())), seeds, notes=_notes(grid, by_seed))


def coverage(
    rows: Iterable[Mapping],
    *,
    networks: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    multipliers: Iterable[str] = PAPER_EIGHT,
) -> list[dict]:
    """Which part of the study has been run, so that what is empty can be seen.

    Args:
        networks: None: the paper's four, and others that have rows.
        seeds: None: those of any row; 0 if there are none.

    Returns:
        One dict a ``network``, ``topology``, ``seed`` and ``regime``: ``done`` ``of`` so many multipliers. The ViT has
        no BatchNorm, so the regime "norms refreshed" is not wanted of it.

    >>> row = {"network": "resnet20", "topology": "dense", "seed": 0, "regime": "retrained", "multiplier": "mul8s_1L2L"}
    >>> [found for found in coverage([row]) if found["done"]]
    [{'network': 'resnet20', 'topology': 'dense', 'seed': 0, 'regime': 'retrained', 'done': 1, 'of': 8}]
    """
    there = {(r["network"], r["topology"], int(r["seed"]), r["regime"], r["multiplier"]) for r in rows}
    networks = [*NETWORKS, *sorted({place[0] for place in there} - set(NETWORKS))] if networks is None else networks
    seeds = sorted({place[2] for place in there}) or [0] if seeds is None else list(seeds)
    multipliers = list(multipliers)
    return [
        {
            "network": network,
            "topology": topology,
            "seed": seed,
            "regime": regime,
            "done": sum((network, topology, seed, regime, name) in there for name in multipliers),
            "of": len(multipliers),
        }
        for network in networks
        for topology in TOPOLOGIES
        for seed in seeds
        for regime in regimes_for(network)
    ]


def chance(dataset: str) -> float:
    """The accuracy of guessing, in [0, 1]; 0 for a data set whose number of classes is not known here.

    >>> chance("cifar100"), chance("tiny-imagenet-20of200"), chance("synthetic")
    (0.01, 0.05, 0.0)
    """
    few = re.fullmatch(r"tiny-imagenet-(\d+)of\d+", dataset)
    classes = int(few[1]) if few else CLASSES.get(dataset, 0)
    return 1 / classes if classes else 0.0


def named(missing: Iterable[tuple[str, str, str, str]]) -> str:
    """Rows that are missing, in words: how many of each network, and of which topologies, multipliers and regimes.

    >>> named([("resnet20", "hard", name, "retrained") for name in ("mul8s_1KV6", "mul8s_1L2L")])
    '2 of resnet20 (hard; KV6, L2L; retrained)'
    """
    missing = list(dict.fromkeys(missing))
    told = []
    for network in dict.fromkeys(place[0] for place in missing):
        places = [place for place in missing if place[0] == network]
        columns = [list(dict.fromkeys(short(place[n]) for place in places)) for n in (1, 2, 3)]
        told.append(f"{len(places)} of {network} ({'; '.join(map(some, columns))})")
    return ", ".join(told)


def short(multiplier: str) -> str:
    """The name as the paper writes it.

    >>> short("mul8s_1L2L")
    'L2L'
    """
    return multiplier.removeprefix("mul8s_1")


def _interval(grid: list[list[Cell]], factors: list[float]) -> Interval:
    """In points, from one row of cells a seed and one cell a term."""
    points = 100 * np.array(factors)
    if all(cell.right is not None for row in grid for cell in row):
        return paired_bootstrap(np.stack([points @ np.stack([cell.right for cell in row]) for row in grid]))
    accuracies = np.array([[cell.top1 for cell in row] for row in grid])
    return unpaired_normal(accuracies, points, n_images=grid[0][0].n_test)


def _notes(grid: list[list[Cell]], by_seed: dict[int, list[Term]]) -> tuple[str, ...]:
    notes = []
    diverged = sorted({f"{cell.topology} {short(cell.multiplier)}" for row in grid for cell in row if cell.outcome})
    if diverged:
        notes.append(f"training diverged for {some(diverged)}")
    left_out = [str(seed) for seed, missing in by_seed.items() if missing]
    if left_out:
        which = f"seed {left_out[0]} is" if len(left_out) == 1 else f"seeds {', '.join(left_out)} are"
        notes.append(f"{which} incomplete and left out")
    return tuple(notes)


def some(names: list[str]) -> str:
    """The first few names, and how many more there are.

    >>> some(["KV8", "KV9", "KVA", "KVM", "KVP", "L2J"])
    'KV8, KV9, KVA, KVM and 2 more'
    """
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(names[:SHOWN]) + "".join(f" {text}" for text in more)


def _key(row: Mapping) -> tuple:
    """The same for text and numbers; a dense network has no experts to tell apart."""
    mixture = () if row["topology"] == "dense" else (float(row.get("experts") or 0), float(row.get("r") or 0))
    return (row["network"], row["topology"], row["multiplier"], row["regime"], int(row["seed"]), *mixture)


def _cell(row: Mapping, packed: str | None) -> Cell:
    correct, n_test = int(row["correct"]), int(row["n_test"])
    right = unpack_answers(packed, n_test) if packed else None
    if right is not None and int(right.sum()) != correct:
        raise ValueError(
            f"The answers of {_words(row)} hold {int(right.sum())} correct ones of {n_test}, the row says {correct};"
            " they are of different runs. Measure both again."
        )
    return Cell(
        topology=row["topology"],
        multiplier=row["multiplier"],
        regime=row["regime"],
        seed=int(row["seed"]),
        correct=correct,
        n_test=n_test,
        p_norm=float(row["p_norm"]) if row.get("p_norm") not in (None, "") else None,
        dataset=row.get("dataset", ""),
        outcome=row.get("outcome") or "",
        retraining=(
            int(row.get("retrain_epochs") or 0),
            int(row.get("retrain_images") or 0),
            float(row.get("retrain_lr") or 0),
        ),
        n_train=int(row.get("n_train") or 0),
        right=right,
    )


def _refuse_twice(one: Mapping, other: Mapping) -> None:
    skip = ("answers", "correct", "top1", "seconds", "date")
    differ = [c for c in one if c not in skip and str(one[c]) != str(other.get(c))]
    pairs = ", ".join(f"{column} {one[column]!r} and {other.get(column)!r}" for column in differ) or "nothing"
    raise ValueError(f"There are two rows of {_words(one)}, which differ in {pairs}; give the claims one of each.")


def _check_same_images(one: Mapping, other: Mapping) -> None:
    for column in ("dataset", "scale", "n_test"):
        if str(one.get(column)) != str(other.get(column)):
            raise ValueError(
                f"Rows of {one['network']} have {column} {one.get(column)!r} and {other.get(column)!r}; only networks"
                " that answered the same images can be compared. Give the claims one of them."
            )


def _check_same_mixture(one: Mapping, other: Mapping) -> None:
    for column in ("experts", "r"):
        if float(one.get(column) or 0) != float(other.get(column) or 0):
            raise ValueError(
                f"Rows of {one['network']} {one['topology']} have {column} {one.get(column)} and {other.get(column)};"
                " give the claims one of them."
            )


def _words(row: Mapping) -> str:
    return f"{row['network']} {row['topology']} {row['multiplier']}, {row['regime']}, seed {row['seed']}"

"""What was chosen, on the test images; and whether one front lies above another, honestly.

A front is a promise: give me a budget, I give you a network. So a front is read as the curve of what would be *chosen*
for each budget, by validation scores, and what that choice is worth on the test images. A point that is best on the
test images by luck earns nothing, and a front with more points has no advantage from having more.

Chapter: 12, "A multiplier for each expert?"
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import cost
from axmoe_lite.datasets import Images
from axmoe_lite.layers import default_layers
from axmoe_lite.search.trial import Found, Trial, assignment_digest
from axmoe_lite.study import pack_answers, unpack_answers

LESS = ("loss", "divergence")  # of these less is better, of all else more


def report(
    network: nn.Module,
    images: Images,
    found: Iterable[Found | dict[str, str]],
    *,
    base: cost.Macs | float | None,
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    progress: bool = True,
) -> list[dict]:
    """What assignments are worth on the test images: the one place where these are looked at.

    Args:
        found: of :func:`search`, or assignments, such as those of :func:`uniform`.
        base: what costs are relative to: the count of the dense network; None: this network.
        n, seed, regime, prepare, calibrate_options: as they were for the search, see :class:`Trial`.

    Returns:
        A dict each: ``assignment`` (JSON), ``digest``, ``multipliers`` (how many different ones), ``regime``; on the
        n validation images ``loss``, ``divergence``, ``accuracy`` and ``n_validation``; on the test images ``top1``,
        ``correct``, ``n_test`` and ``answers`` (:func:`axmoe_lite.study.unpack_answers`); ``p_norm`` with the routing
        of the exact network on (1000) test images, as all rows of this study have it, and ``p_norm_routed`` with that
        of the approximate one; ``seconds``.
    """
    given = [one if isinstance(one, Found) else Found(dict(one), *[np.nan] * 4, 0) for one in found]
    layers = dict.fromkeys([*default_layers(network), *(layer for one in given for layer in one.assignment)])
    options = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    trial = Trial(network, images, layers=layers, n=n, seed=seed, **options)
    some = images.normalised(images.subset(n_test=1000).x_test.to(trial.device))
    macs, rows = cost.count(network, some), []
    base = macs if base is None else base
    for one in tqdm(given, desc="report", disable=not progress):
        start, paid = time.perf_counter(), cost.price(macs, one.assignment, base=base)
        score = one if np.isfinite(one.accuracy) else trial.score(one.assignment)
        placed = trial.place(one.assignment)
        right = trial.answers(placed, images)
        routed = cost.price(cost.count(placed, some), one.assignment, base=base)
        rows.append(
            {
                "assignment": json.dumps(one.assignment),
                "digest": assignment_digest(one.assignment),
                "multipliers": len(set(one.assignment.values())),
                "regime": regime,
                **{key: asdict(score)[key] for key in ("loss", "divergence", "accuracy")},
                "n_validation": n,
                "top1": int(right.sum()) / len(right),
                "correct": int(right.sum()),
                "n_test": len(right),
                "answers": pack_answers(right),
                "p_norm": paid.p_norm,
                "p_norm_routed": routed.p_norm,
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
    return rows


def thin(found: Iterable[Found], n: int = 24) -> list[Found]:
    """What a front would choose for n budgets, evenly spaced from its cheapest point to its dearest.

    A search of some effort returns fronts of a hundred points, and each costs a look at all test images. Budgets know
    nothing of test images, so these are points like any others. Two budgets may choose the same one: it comes once.

    Args:
        found: of :func:`search`, in any order; a budget chooses the least divergence that it affords.
        n: budgets, 1 (the dearest) or more.

    Returns:
        At most n, from the cheapest to the dearest.

    Raises:
        ValueError: for n below 1.

    >>> front = [Found({"a": str(i)}, i / 100, 0.0, 1 - i / 100, 0.0, 0) for i in range(101)]
    >>> [one.p_norm for one in thin(front, 5)]
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if n < 1:
        raise ValueError(f"n is {n!r}; it is a number of budgets, 1 or more.")
    points = sorted(found, key=lambda one: (one.divergence, one.p_norm))
    prices = [one.p_norm for one in points]
    budgets = np.linspace(max(prices), min(prices), n) if points else []
    chosen = [next(one for one in points if one.p_norm <= budget + 1e-12) for budget in budgets]
    return sorted({id(one): one for one in chosen}.values(), key=lambda one: one.p_norm)


@dataclass(frozen=True)
class Dominance:
    """How far front a lies above front b, over the budgets of a box. Accuracies are in [0, 1].

    Attributes:
        volume: mean over the budgets of a's accuracy minus b's: the difference of the areas under their curves
            (hypervolumes) over the width of the box.
        largest_gap, largest_gap_at: where both can be afforded, a's largest lead, and the budget at which it begins.
        least_gap, least_gap_at: the same where a leads least, or trails most.
        dominates: a is nowhere below b in the box, and somewhere above.
        box: least and largest budget, and the accuracy of what cannot be afforded.
        volume_interval, largest_gap_interval: the middle 95 % over resampled test images (of the gap at that budget,
            which was picked because it is large: it leans upwards); None without answers.
        volume_positive, dominating: the share of the resamples in which the volume is above 0, and in which a
            dominates; None without answers.
    """

    volume: float
    largest_gap: float
    largest_gap_at: float
    least_gap: float
    least_gap_at: float
    dominates: bool
    box: tuple[float, float, float]
    volume_interval: tuple[float, float] | None = None
    largest_gap_interval: tuple[float, float] | None = None
    volume_positive: float | None = None
    dominating: float | None = None


def dominates(
    front_a: Sequence[dict],
    front_b: Sequence[dict],
    *,
    by: str | None = "divergence",
    box: tuple[float, float] | None = None,
    floor: float = 0.0,
    resamples: int = 2000,
    seed: int = 0,
) -> Dominance:
    """How far one front lies above another, each read as what it would choose for a budget.

    Args:
        front_a, front_b: rows with ``p_norm``, ``top1`` and the column ``by``, numbers or text; with ``answers`` and
            ``n_test`` of the same test images in all of them, there are intervals too.
        by: what a front chooses by among what a budget affords: ``"divergence"`` or ``"loss"`` (least), or any other
            column, such as ``"accuracy"`` (most). Several networks in one front need ``"loss"`` or ``"accuracy"``: a
            divergence is from one's own float32 network. None chooses by ``top1`` itself, which flatters fronts with
            many points: only for rows without validation.
        box: least and largest budget; None: from the cheapest to the dearest point of both.
        floor: the accuracy of what cannot be afforded, such as 1 / classes.
        resamples: of the test images, paired: both fronts are asked about the same ones. The choices stay.

    Raises:
        ValueError: for an empty front, a missing column, an empty box, or fronts that answered different test images.

    >>> dear, cheap = {"p_norm": 1.0, "top1": 0.9, "loss": 0.1}, {"p_norm": 0.5, "top1": 0.8, "loss": 0.2}
    >>> more = dominates([dear, cheap], [dear], by="loss")
    >>> more.dominates, round(more.volume, 2)  # 0.8 at budgets from 0.5 to 1, where the other has nothing
    (True, 0.8)
    """
    curves = [_Curve(list(front), by) for front in (front_a, front_b)]
    costs = np.concatenate([curve.cost for curve in curves])
    low, high = (float(costs.min()), float(costs.max())) if box is None else box
    if not low <= high:
        raise ValueError(f"The box runs from {low} to {high}; its largest budget is at least its least.")
    edges = np.unique(np.clip(np.concatenate([costs, [low, high]]), low, high))
    width = np.append(np.diff(edges), 0.0)
    weight = width / width.sum() if width.sum() else np.ones(1)
    chosen = [curve.choices(edges) for curve in curves]
    both = (chosen[0] >= 0) & (chosen[1] >= 0)
    if not both.any():
        raise ValueError(f"No budget from {low:.3g} to {high:.3g} affords a point of both fronts; widen the box.")
    lead = _values(curves[0].top1[None], chosen[0], floor) - _values(curves[1].top1[None], chosen[1], floor)
    gaps = np.where(both, lead[0], np.nan)
    most, least = int(np.nanargmax(gaps)), int(np.nanargmin(gaps))
    again = _resampled(curves, chosen, floor, resamples, seed)
    return Dominance(
        volume=float(lead[0] @ weight),
        largest_gap=float(gaps[most]),
        largest_gap_at=float(edges[most]),
        least_gap=float(gaps[least]),
        least_gap_at=float(edges[least]),
        dominates=bool(_above(lead)[0]),
        box=(low, high, floor),
        **{} if again is None else _intervals(again, weight, most),
    )


def _intervals(lead: np.ndarray, weight: np.ndarray, most: int) -> dict:
    volumes = lead @ weight
    middle = [2.5, 97.5]
    return {
        "volume_interval": tuple(np.percentile(volumes, middle).tolist()),
        "largest_gap_interval": tuple(np.percentile(lead[:, most], middle).tolist()),
        "volume_positive": float((volumes > 0).mean()),
        "dominating": float(_above(lead).mean()),
    }


def _above(lead: np.ndarray) -> np.ndarray:
    """[R, budgets] to bool [R]; accuracies that are equal may differ in their last bit."""
    return (lead >= -1e-12).all(1) & (lead > 1e-12).any(1)


def _values(top1: np.ndarray, chosen: np.ndarray, floor: float) -> np.ndarray:
    """Accuracy at each budget: [R, points] to [R, budgets]."""
    return np.where(chosen >= 0, np.maximum(top1[:, np.maximum(chosen, 0)], floor), floor)


def _resampled(
    curves: list["_Curve"], chosen: list[np.ndarray], floor: float, resamples: int, seed: int
) -> np.ndarray | None:
    """a's lead over b at each budget in each resample, [R, budgets]; None if rows have no answers."""
    answers = [curve.answers for curve in curves]
    if answers[0] is None or answers[1] is None:
        return None
    images = answers[0].shape[1]
    if answers[1].shape[1] != images:
        raise ValueError(
            f"One front answered {images} test images, the other {answers[1].shape[1]}; both must be of the same set."
        )
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples) / images
    a, b = (_values(drawn @ right.T, choice, floor) for right, choice in zip(answers, chosen, strict=True))
    return a - b


def compare(rows: Iterable[dict], pairs: Iterable[tuple[str, ...]], *, floor: float = 0.0) -> list[dict]:
    """Families of assignments against each other, by :func:`dominates`, as lines of a table in points.

    Args:
        rows: of :func:`report` with a column ``family``; numbers or text.
        pairs: each a family, and the families whose points together make the front that it is compared with.
        floor: the accuracy of what cannot be afforded, such as 1 / classes.

    Returns:
        A dict a pair: ``front``, ``against``, ``lead`` (mean over the budgets) with its 95 % interval ``low`` and
        ``high``, ``largest_gap``, ``least_gap``, all in points of accuracy, and ``dominates``.

    Raises:
        ValueError: for a family that no row belongs to, or as :func:`dominates`.
    """
    rows, lines = list(rows), []
    known = list(dict.fromkeys(row["family"] for row in rows))
    for first, *others in pairs:
        for family in (first, *others):
            if family not in known:
                raise ValueError(f"No row belongs to the family {family!r}; there are {', '.join(known) or 'none'}.")
        fronts = ([row for row in rows if row["family"] in names] for names in ((first,), others))
        found = dominates(*fronts, by="loss", floor=floor)
        low, high = found.volume_interval or (float("nan"), float("nan"))
        figures = {"lead": found.volume, "low": low, "high": high}
        figures |= {"largest_gap": found.largest_gap, "least_gap": found.least_gap}
        named = {"front": first, "against": " and ".join(others)}
        lines.append({**named, **{key: 100 * value for key, value in figures.items()}, "dominates": found.dominates})
    return lines


class _Curve:
    """A front as a function from budgets to the point that is chosen."""

    def __init__(self, rows: list[dict], by: str | None) -> None:
        if not rows:
            raise ValueError("A front has no rows; each needs at least one, with p_norm, top1 and what to choose by.")
        column = by or "top1"
        for needed in ("p_norm", "top1", column):
            missing = [n for n, row in enumerate(rows) if row.get(needed) in (None, "")]
            if missing:
                raise ValueError(
                    f"Row {missing[0]} of a front has no {needed!r}; it has {', '.join(rows[0])}. Choose by= a column"
                    " measured on validation images, or by=None, by top1 itself, which is optimistic."
                )
        self.cost, self.top1, worth = (
            np.array([float(row[key]) for row in rows]) for key in ("p_norm", "top1", column)
        )
        worth = -worth if column in LESS else worth
        self._order = np.lexsort((self.cost, -worth))  # the best first, of equal ones the cheapest
        packed = [row.get("answers") for row in rows]
        self.answers = None
        if all(packed):
            self.answers = np.stack(
                [unpack_answers(text, int(row["n_test"])) for text, row in zip(packed, rows, strict=True)]
            ).astype(float)

    def choices(self, budgets: np.ndarray) -> np.ndarray:
        """The index of the row chosen for each budget; -1 where none can be afforded."""
        affordable = self.cost[self._order][None, :] <= budgets[:, None] + 1e-12
        return np.where(affordable.any(1), self._order[affordable.argmax(1)], -1)

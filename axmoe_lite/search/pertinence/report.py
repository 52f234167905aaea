"""What dispatchers are worth on the final images, beside what one would do without them.

    rows = report(pool, split, found)      the dispatchers that a search has found
    singles(pool, split)                   one network for all images
    mixed(pool, split)                     two networks, drawn by lot: the straight line between them
    cascade(pool, split)                   a cheap network first, a dear one where the first is not confident
    cheapest(rows, 0.76)                   the cheapest that is good enough by the search images
    compared(pool, split)                  search, with and without the extractor's confidence, and all of these
    table(pool, split, {"dispatched": rows})    all of these and the ideal, with the same columns
    bargains(rows, less=0.01)              of each pool and kind the cheapest nearly as good as the best network
    gaps(rows, pairs, floor=0.1)           kinds against each other, on the mean of all budgets

Everything that is chosen is chosen by the fit and search images; the final ones are looked at here, and only here. All
rows have the same columns, those of :func:`axmoe_lite.search.report` among them, so that fronts can be compared by
:func:`axmoe_lite.search.dominates` with ``by="accuracy"``.

Source: PERTINENCE (arXiv 2507.01695, v3). Not from the paper: intervals, the lot, the cascade.

Chapter: 18, "Which network for which input?"
"""

import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axmoe_lite.claims import paired_bootstrap
from axmoe_lite.search import additive
from axmoe_lite.search.fronts import dominates
from axmoe_lite.search.pertinence.dispatcher import Layers, choose
from axmoe_lite.search.pertinence.evolve import Routed, ratios, search
from axmoe_lite.search.pertinence.pool import Pool, Split, find, ideal
from axmoe_lite.study import pack_answers


def best_single(pool: Pool, split: Split) -> str:
    """The network that is right most often on fit and search images, of equal ones the cheapest: what is to beat."""
    seen = torch.cat([split.fit, split.search])
    return pool.names[int(pool.correct[seen].sum(0).argmax())]


def report(pool: Pool, split: Split, found: Iterable[Routed], *, resamples: int = 2000) -> list[dict]:
    """Dispatchers on the final images.

    Args:
        pool, split: as the search was given them.
        found: of :func:`~axmoe_lite.search.pertinence.search`.
        resamples: of the final images, for the interval.

    Returns:
        A dict each: ``kind`` and ``name``; on the search images ``accuracy`` and ``cost_search``; on the final images
        ``top1``, ``correct``, ``n_test``, ``answers`` (:func:`axmoe_lite.study.unpack_answers`), ``cost`` for one image
        in the pool's unit, ``p_norm``, that cost over the cost of the best single network, and ``shares`` (JSON), how
        many of the images each network gets; ``lead`` over the best single network (``against``) in top-1, with its 95
        % interval ``low`` and ``high`` by a bootstrap paired over images; ``penalties`` (JSON) and ``weighting``.

    Raises:
        ValueError: for dispatchers that were searched on another split, or whose layer does not fit the pool.
    """
    given = list(found)
    for one in given:
        if one.split != split.digest or one.weight.shape != (len(pool.names), pool.features.shape[1]):
            raise ValueError(
                f"A dispatcher with a layer {list(one.weight.shape)} was found on the split {one.split}; this pool"
                f" needs [{len(pool.names)}, {pool.features.shape[1]}], and the split is {split.digest}. On another"
                " split, images that taught a dispatcher would be among the final ones."
            )
    if not given:
        return []
    choices = choose(
        Layers(torch.stack([d.weight for d in given]), torch.stack([d.bias for d in given])), pool.features
    )
    rows = []
    for one, chosen in zip(given, choices, strict=True):
        row = _row(pool, split, "dispatched", f"{one.weighting} {len(rows)}", chosen, pool.paid[chosen], resamples)
        rows.append(row | {"penalties": json.dumps(one.penalties.tolist()), "weighting": one.weighting})
    return rows


def singles(pool: Pool, split: Split, *, resamples: int = 2000) -> list[dict]:
    """Each network of the pool for all images, without a dispatcher; rows as of :func:`report`."""
    rows = []
    for i, name in enumerate(pool.names):
        chosen = torch.full((len(pool),), i)
        rows.append(_row(pool, split, "single", name, chosen, pool.cost[chosen], resamples))
    return rows


def cascade(
    pool: Pool,
    split: Split,
    *,
    first: str | None = None,
    then: str | None = None,
    points: int = 21,
    resamples: int = 2000,
) -> list[dict]:
    """Run one network, and a second where the first one's top softmax probability is below a threshold.

    What a practitioner would try first; it needs no training, but pays for both networks where it goes on. Not from the
    paper. Thresholds are quantiles of the confidence on the search images.

    Args:
        first, then: names; None: the cheapest, and :func:`best_single`.
        points: thresholds, from never going on to always going on, at least 2.

    Returns:
        Rows as of :func:`report`, with ``threshold``. ``shares`` are of the images that each network answers.

    Raises:
        ValueError: for a pool without confidences, unknown names, the same one twice, or fewer than two points.
    """
    if pool.confidence is None:
        raise ValueError("This pool has no confidence; give Pool(confidence=...) float [n, N], as look() does.")
    names = [pool.names[0] if first is None else first, best_single(pool, split) if then is None else then]
    a, b = (pool.names.index(find(name, pool.names, "network of the pool")) for name in names)
    if a == b or points < 2:
        raise ValueError(
            f"A cascade from {names[0]!r} to {names[1]!r} at {points} points: two networks and points, please."
        )
    sure = pool.confidence[:, a].double()
    inner = torch.quantile(sure[split.search], torch.linspace(0, 1, points, dtype=torch.float64))[1:-1]
    rows = []
    for threshold in [0.0, *inner.tolist(), np.inf]:
        again = sure < threshold
        chosen, paid = torch.where(again, b, a), pool.cost[a] + again * pool.cost[b]
        named = f"{names[0]}, below {threshold:.3f} {names[1]}"
        rows.append(_row(pool, split, "cascade", named, chosen, paid, resamples) | {"threshold": threshold})
    return rows


def mixed(pool: Pool, split: Split, *, points: int = 11) -> list[dict]:
    """Two neighbouring networks drawn by lot: what can be had between them without looking at the image.

    Neighbours are those on the front of the search images. What is given is the expectation, so there are no answers
    and no interval: ``kind``, ``name``, ``accuracy``, ``cost_search``, ``top1``, ``cost``, ``p_norm``, ``lead``,
    ``against``. Not from the paper.

    Args:
        points: mixtures for each pair, its two ends among them, at least 2.
    """
    if points < 2:
        raise ValueError(f"points is {points}; a line has at least 2.")
    searched, final = (pool.correct[part].double().mean(0) for part in (split.search, split.final))
    best = pool.names.index(best_single(pool, split))
    front = additive.undominated(pool.cost.numpy(), 1 - searched.numpy()).tolist()
    rows = []
    for a, b in itertools.pairwise(front):
        for share in np.linspace(0, 1, points).tolist():
            accuracy, top1, paid = (
                (1 - share) * v[a].item() + share * v[b].item() for v in (searched, final, pool.cost)
            )
            rows.append(
                {
                    "kind": "mixed",
                    "name": f"{share:.0%} {pool.names[b]}, else {pool.names[a]}",
                    "accuracy": accuracy,
                    "cost_search": paid,
                    "top1": top1,
                    "cost": paid,
                    "p_norm": paid / pool.cost[best].item(),
                    "lead": top1 - final[best].item(),
                    "against": pool.names[best],
                }
            )
    return rows


def cheapest(rows: Sequence[dict], accuracy: float) -> dict | None:
    """The row with the least cost among those at least so accurate, both on the search images; None if there is none.

    So a figure such as "as good as the best single network, at how much less?" is chosen without the images that it is
    then read from.

    >>> rows = [{"accuracy": 0.7, "cost_search": 1}, {"accuracy": 0.8, "cost_search": 3}]
    >>> cheapest(rows, 0.75), cheapest(rows, 0.9)
    ({'accuracy': 0.8, 'cost_search': 3}, None)
    """
    good = [row for row in rows if row["accuracy"] >= accuracy - 1e-12]
    return min(good, key=lambda row: row["cost_search"], default=None)


def compared(
    pool: Pool, split: Split, *, folder: Path | str | None = None, **options: Any
) -> tuple[dict[str, list[Routed]], list[dict]]:
    """Search twice, as the paper does and :meth:`Pool.with_confidence`, and lay both beside all the rest.

    Args:
        folder: for the checkpoints of both searches; None: nowhere.
        options: of :func:`~axmoe_lite.search.pertinence.search`; ``start`` is that of :func:`ratios` unless given.

    Returns:
        What was found, ``"dispatched"`` and ``"with confidence"``, and the rows of :func:`table`, each with the
        ``seconds`` that all of it took.
    """
    begun, found, rows = time.perf_counter(), {}, {}
    how = {"start": ratios(len(pool.names)), **options}
    for kind, seen in {"dispatched": pool, "with confidence": pool.with_confidence()}.items():
        file = None if folder is None else Path(folder) / f"{kind.replace(' ', '-')}.safetensors"
        found[kind] = search(seen, split, checkpoint=file, **how)
        rows[kind] = report(seen, split, found[kind])
    beside = table(pool, split, rows)
    seconds = time.perf_counter() - begun
    return found, [row | {"seconds": seconds} for row in beside]


def table(pool: Pool, split: Split, dispatched: Mapping[str, Sequence[dict]], *, resamples: int = 2000) -> list[dict]:
    """Dispatchers beside everything that does without one, and the ideal: one list, for a figure or a file.

    Args:
        dispatched: rows of :func:`report`, by the kind that they are to be called.
        resamples: of the final images, for the intervals of the others.

    Returns:
        The rows of all kinds with the same columns; a column that does not apply is ``""``. ``point`` counts the rows
        of a kind. The ideal pays for features and layer (:attr:`Ideal.cost_paid`). There is no cascade where
        :func:`best_single` is the cheapest network.
    """
    best = best_single(pool, split)
    searched, final = ideal(pool, split.search), ideal(pool, split.final)
    perfect = {"kind": "ideal", "name": "the cheapest that is right", "accuracy": searched.accuracy, "against": best}
    perfect |= {"cost_search": searched.cost_paid, "top1": final.accuracy, "cost": final.cost_paid}
    perfect |= {"p_norm": final.cost_paid / pool.cost[pool.names.index(best)].item()}
    perfect |= {"n_test": len(split.final), "shares": json.dumps(final.shares)}
    groups = [[row | {"kind": kind} for row in rows] for kind, rows in dispatched.items()]
    groups += [singles(pool, split, resamples=resamples), mixed(pool, split), [perfect]]
    if best != pool.names[0]:
        groups.append(cascade(pool, split, resamples=resamples))
    rows = [row | {"point": point, "n_test": len(split.final)} for group in groups for point, row in enumerate(group)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "") for column in columns} for row in rows]


def bargains(rows: Iterable[Mapping], *, less: float = 0.0) -> dict[tuple[str, str], dict]:
    """The :func:`cheapest` of each kind in each pool that is as good as the pool's best network, or nearly so.

    What is drawn by lot, and the ideal, are left out: nobody can choose them by an accuracy that they will have.

    Args:
        rows: of :func:`table`, with ``pool``.
        less: accuracy on the search images that may be given up.

    Returns:
        By pool and kind. A kind that has nothing so good is left out.
    """
    rows = [dict(row) for row in rows]
    goal = {row["pool"]: row["accuracy"] - less for row in rows if row["name"] == row["against"]}
    named = dict.fromkeys((row["pool"], row["kind"]) for row in rows if row["kind"] not in ("mixed", "ideal"))
    found = {key: cheapest([row for row in rows if (row["pool"], row["kind"]) == key], goal[key[0]]) for key in named}
    return {key: row for key, row in found.items() if row is not None}


def gaps(rows: Iterable[Mapping], pairs: Iterable[tuple[str, str]], *, floor: float = 0.0) -> list[dict]:
    """Kinds against each other in each pool, by :func:`axmoe_lite.search.dominates`, in points of accuracy.

    Args:
        rows: of :func:`table`, with ``pool``.
        pairs: two kinds each. A pool that lacks one of them is left out.
        floor: the accuracy of what a budget cannot pay for, such as 1 / classes.

    Returns:
        A dict each: ``pool``, ``front``, ``against``, ``lead``, the mean over all budgets of the two, and its 95 %
        interval ``low`` and ``high``, which are None for what is drawn by lot.
    """
    kinds: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        kinds.setdefault((row["pool"], row["kind"]), []).append(dict(row))
    lines, pairs = [], list(pairs)
    for pool in dict.fromkeys(pool for pool, _ in kinds):
        for one, other in pairs:
            if (pool, one) in kinds and (pool, other) in kinds:
                found = dominates(kinds[pool, one], kinds[pool, other], by="accuracy", floor=floor)
                low, high = (100 * end for end in found.volume_interval) if found.volume_interval else (None, None)
                line = {"pool": pool, "front": one, "against": other, "lead": 100 * found.volume}
                lines.append(line | {"low": low, "high": high})
    return lines


def _row(pool: Pool, split: Split, kind: str, name: str, chosen: Tensor, paid: Tensor, resamples: int) -> dict:
    """Of choices int64 [n] that cost float64 [n]."""
    right = pool.correct[torch.arange(len(pool)), chosen]
    best = best_single(pool, split)
    i, final = pool.names.index(best), split.final
    difference = (right.int() - pool.correct[:, i].int())[final]
    lead = paired_bootstrap(difference.numpy(), resamples=resamples)
    shares = torch.bincount(chosen[final], minlength=len(pool.names)).double() / len(final)
    spent = paid[final].mean().item()
    return {
        "kind": kind,
        "name": name,
        "accuracy": right[split.search].double().mean().item(),
        "cost_search": paid[split.search].mean().item(),
        "top1": right[final].double().mean().item(),
        "correct": int(right[final].sum()),
        "n_test": len(final),
        "answers": pack_answers(right[final]),
        "cost": spent,
        "p_norm": spent / pool.cost[i].item(),
        "shares": json.dumps(dict(zip(pool.names, shares.tolist(), strict=True))),
        "lead": lead.estimate,
        "low": lead.low,
        "high": lead.high,
        "against": best,
    }

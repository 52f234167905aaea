"""How fine a choice of multipliers is, what it costs to simulate, and which search finds it.

    shared_terms      exact products of several multipliers, each for itself and side by side
    weight_tuning     which weight is stored in the place of which, and what that does to the products
    searched_fronts   accuracy on test images against cost: a colour and a shape for each way to choose
    reached           how much of the best front there is another front has found
    effort            the same against the networks that were run
    effort_bars       networks and seconds that each search took

Chapters: 15, "How fine should a choice be?", and 16, "Which search should I use?"
"""

from collections.abc import Iterable, Mapping, Sequence

import altair as alt
import numpy as np
import pandas as pd

from axmoe_lite.factors import factorise
from axmoe_lite.multipliers import EXACT, errors, mosaic_name, multiplier, tuned, weight_map
from axmoe_lite.multipliers.table import OPERANDS
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, check_evidence
from axmoe_lite.search import Found

UNIFORM = "uniform"
_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#8C6D1F")
_SHAPES = ("circle", "square", "triangle-up", "cross", "triangle-down", "triangle-right", "stroke")
_TOLD = ("regime", "evaluated", "n_validation", "dataset", "n_train", "n_test", "seed", "epochs", "scale")
_TOLD += ("commit", "date", "device")


# ------------------------------------------------------------------------------- one layer


def shared_terms(sets: Mapping[str, Sequence[str]]) -> alt.LayerChart:
    """Terms of sets of multipliers: each factorised for itself, and all of a set side by side.

    Args:
        sets: what to call a set, and its multipliers' names, at least two different tables each.

    Raises:
        ValueError: for no sets, or a set of less than two multipliers.
    """
    if not sets:
        raise ValueError('shared_terms() was given no sets; name at least one, such as {"two": [EXACT, "roup(0,4)"]}.')
    rows = []
    for name, members in sets.items():
        if len(set(members)) < 2:
            raise ValueError(f"The set {name!r} has {len(set(members))} multipliers; two or more lie side by side.")
        alone = sum(factorise(multiplier(one)).rank for one in members)
        together = factorise(multiplier(mosaic_name(list(members)))).rank
        rows += [{"set": name, "how": "each for itself", "terms": alone, "members": ", ".join(members)}]
        rows += [{"set": name, "how": "side by side", "terms": together, "members": ", ".join(members)}]
    how = ["each for itself", "side by side"]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("terms:Q", title="exact products for one approximate one (terms)"),
        y=alt.Y("how:N", title=None, sort=how),
    )
    colour = alt.Color("how:N", scale=alt.Scale(domain=how, range=[GREY, BLUE]), legend=None)
    bars = base.mark_bar().encode(color=colour, tooltip=["set", "how", "terms", "members"])
    numbers = base.mark_text(align="left", dx=4).encode(text="terms:Q")
    header = alt.Header(labelAngle=0, labelAlign="left", labelLimit=200)
    row = alt.Row("set:N", title=None, sort=list(sets), header=header)
    return alt.layer(bars, numbers).properties(width=260, height=44).facet(row=row, spacing=8)


def weight_tuning(circuit: str, *, after_relu: bool = True) -> alt.VConcatChart:
    """What ALWANN's rule stores for each weight, and each weight's mean absolute error before and after.

    Args:
        circuit: a multiplier's name.
        after_relu: activations of 0 to 127, all alike; else -128 to 127.

    Raises:
        ValueError: for a multiplier that does not exist, or a mosaic.
    """
    before = multiplier(circuit)
    if "[" in circuit:
        raise ValueError(f"{circuit!r} is a mosaic; weights are tuned to one multiplier, such as 'mul8s_1L2L'.")
    seen = OPERANDS >= 0 if after_relu else OPERANDS >= -128
    after, stored = tuned(before, after_relu=after_relu), weight_map(before, a=seen.double())
    weights = OPERANDS[1:]  # -128 is no code of a weight
    meant = OPERANDS[seen][:, None] * OPERANDS[None]
    wrong = [(one.table[seen] - meant).abs().double().mean(0) for one in (before, after)]
    table = pd.DataFrame({"weight": weights.tolist(), "stored": stored[1:].tolist()})
    table["moved"] = table["stored"] - table["weight"]
    x = alt.X("weight:Q", title=None, scale=alt.Scale(domain=[-128, 128], nice=False))
    moved = alt.Chart(table).mark_bar(color=ORANGE, width=2).encode(
        x=x, y=alt.Y("moved:Q", title="stored − meant"), tooltip=["weight", "stored", "moved"]
    )  # fmt: skip
    names = ["as it is", "tuned"]
    lines = pd.concat(
        [table.assign(error=each[1:].tolist(), weights=name) for name, each in zip(names, wrong, strict=True)]
    )
    told = [f"{name} {errors(one, a=seen.double()).mae:.1f}" for name, one in zip(names, (before, after), strict=True)]
    how = alt.Color("weights:N", title=None, scale=alt.Scale(domain=names, range=[GREY, BLUE]))
    dash = alt.StrokeDash("weights:N", title=None, scale=alt.Scale(domain=names, range=[[4, 3], [1, 0]]))
    error = alt.Chart(lines).mark_line(strokeWidth=1.6).encode(
        x=x.title("weight that is meant (code)"),
        y=alt.Y("error:Q", title="mean |error|, product units"),
        color=how.legend(orient="top"),
        strokeDash=dash,
        tooltip=["weights", "weight", "stored", alt.Tooltip("error:Q", title="mean |error|", format=".1f")],
    )  # fmt: skip
    said = "activations 0 to 127" if after_relu else "activations -128 to 127"
    title = alt.Title(
        f"{circuit}: which weight is stored for which", subtitle=f"Mean |error| over {said}: {', '.join(told)}."
    )
    panels = [moved.properties(width=520, height=110), error.properties(width=520, height=170)]
    return alt.vconcat(*panels, spacing=6, title=title)


# --------------------------------------------------------------------------------- a network


def searched_fronts(
    rows: Iterable[Mapping], *, title: str = "", reference: tuple[float, float, str] | None = None
) -> alt.LayerChart:
    """Accuracy on test images against cost: a colour and a shape for each family; a step is what a budget chooses.

    The points of a family were chosen by validation images, so a dearer one may be worse on the test images. The family
    "uniform", one multiplier for all layers, has grey diamonds and no line. A click in the legend picks families.

    Args:
        rows: of :func:`axmoe_lite.search.report` with ``family`` and evidence; numbers or text.
        reference: what somebody else reports: a normalised cost, points of accuracy lost against the dearest uniform
            row, and what to call it.

    Raises:
        ValueError: for no rows, rows without evidence, more than seven families beside "uniform", or a reference where
            there is no uniform row.
    """
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError("searched_fronts() was given no rows; search.report() makes them.")
    check_evidence(rows, "family")
    table = pd.DataFrame(rows).astype({"top1": float, "p_norm": float, "accuracy": float})
    families = [name for name in dict.fromkeys(table["family"]) if name != UNIFORM]
    if len(families) > len(_COLOURS):
        raise ValueError(f"{len(families)} families are too many to tell apart; draw {len(_COLOURS)} at most.")
    uniform = [UNIFORM] if UNIFORM in set(table["family"]) else []
    if reference and not uniform:
        raise ValueError("A reference is drawn against the dearest uniform row, and there is none.")
    domain = [*families, *uniform]
    look = {
        "color": [*_COLOURS[: len(families)], *[GREY for _ in uniform]],
        "shape": [*_SHAPES[: len(families)], *["diamond" for _ in uniform]],
    }
    pick = alt.selection_point(fields=["family"], bind="legend")
    faint = alt.condition(pick, alt.value(0.95), alt.value(0.08))
    kept = ["family", "top1", "p_norm", "accuracy", "multipliers", *_TOLD]
    shown = alt.Chart(table[[column for column in kept if column in table]])
    x = alt.X("p_norm:Q", title="normalised inference cost (energy of the multiplications)", scale=_fitted())
    y = alt.Y("top1:Q", title="top-1 accuracy, test images", axis=alt.Axis(format="%"), scale=_fitted())
    legend = alt.Legend(orient="top", columns=4, symbolSize=90)
    colour = alt.Color("family:N", title=None, scale=alt.Scale(domain=domain, range=look["color"]), legend=legend)
    shape = alt.Shape("family:N", title=None, scale=alt.Scale(domain=domain, range=look["shape"]), legend=legend)
    lines = (
        shown.transform_filter(f"datum.family!='{UNIFORM}'")
        .mark_line(strokeWidth=1.6, interpolate="step-after")
        .encode(x=x, y=y, color=colour, opacity=faint, order="p_norm:Q")
    )
    tips = [
        "family",
        alt.Tooltip("top1:Q", title="top-1", format=".2%"),
        alt.Tooltip("p_norm:Q", title="P_norm", format=".3f"),
        alt.Tooltip("accuracy:Q", title="accuracy on validation images", format=".2%"),
        *(alt.Tooltip(f"{column}:N") for column in ("multipliers", *_TOLD) if column in table),
    ]
    points = shown.mark_point(filled=True, size=75)
    points = points.encode(x=x, y=y, color=colour, shape=shape, opacity=faint, tooltip=tips)
    layers = [points.add_params(pick), lines]  # the points first: only the first layer's legend listens
    if reference:
        layers += _reference(table[table["family"] == UNIFORM], reference, x, y)
    subtitle = (
        f"Steps: what a budget buys. Diamonds: one multiplier everywhere; {EXACT.removeprefix('mul8s_1')} costs 1."
    )
    return alt.layer(*layers).properties(width=540, height=340, title=alt.Title(title, subtitle=subtitle))


def _fitted() -> alt.Scale:
    return alt.Scale(zero=False)


def _reference(uniform: pd.DataFrame, reference: tuple[float, float, str], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """A cross and its name, ``points`` below the dearest uniform row."""
    paid, points, name = reference
    exact = uniform.loc[uniform["p_norm"].idxmax(), "top1"]
    place = alt.Chart(pd.DataFrame([{"p_norm": paid, "top1": exact - points / 100, "name": name}])).encode(x=x, y=y)
    cross = place.mark_point(shape="cross", angle=45, size=160, color="#333", strokeWidth=1.5)
    return [cross.encode(tooltip=["name"]), place.mark_text(align="left", dx=11, color="#333").encode(text="name:N")]


# --------------------------------------------------------------------------------- searches


def reached(front: Iterable[Found], truth: Iterable[Found]) -> float:
    """How much of the area that the best front dominates another front dominates too, 1 at most if ``truth`` is best.

    The area lies between a front and the corner of the worst cost and the worst divergence of ``truth`` (a
    hypervolume). The divergence counts by its logarithm, since it ranges over powers of ten, and as 1e-4 at least.

    Raises:
        ValueError: for an empty front, or a truth of less than two different points.

    >>> one = lambda paid, divergence: Found({}, paid, 0.0, divergence, 0.0, 0)
    >>> best = [one(0.0, 1.0), one(0.5, 0.01), one(1.0, 0.001)]  # 0.5 x 2 decades
    >>> reached(best[::2], best), reached(best, best)
    (0.0, 1.0)
    """
    found, best = ([(one.p_norm, max(one.divergence, 1e-4)) for one in each] for each in (front, truth))
    if not found:
        raise ValueError("The front has no points; nothing was reached.")
    corner = tuple(max(values) for values in zip(*best, strict=True)) if best else (0.0, 0.0)
    whole = _area(best, corner)
    if not whole:
        raise ValueError("The best front needs two points that differ in cost and in divergence.")
    return _area(found, corner) / whole


def _area(points: list[tuple[float, float]], corner: tuple[float, float]) -> float:
    """What the points dominate up to the corner, in units of cost times decades."""
    area, least = 0.0, corner[1]
    for n, (paid, lost) in enumerate(ordered := sorted(points)):
        least = min(least, lost)
        after = min(ordered[n + 1][0] if n + 1 < len(ordered) else corner[0], corner[0])
        area += max(0.0, after - paid) * float(np.log10(corner[1] / least))
    return area


def effort(trials: Iterable[Mapping], *, title: str = "") -> alt.LayerChart:
    """How much of the best front each method has reached after so many networks: mean, and the range over seeds.

    Args:
        trials: dicts with ``method``, ``networks`` (how many it was given), ``reached`` (:func:`reached`) and ``seed``.

    Raises:
        ValueError: for no trials, or one that lacks a column.
    """
    table = pd.DataFrame([dict(row) for row in trials])
    missing = [column for column in ("method", "networks", "reached", "seed") if column not in table]
    if missing:
        raise ValueError(f"effort() needs method, networks, reached and seed of each trial; {missing[0]} is missing.")
    groups = table.groupby(["method", "networks"], sort=False)
    told = groups["reached"].agg(["mean", "min", "max"]).assign(n=groups["seed"].nunique()).reset_index()
    methods = list(dict.fromkeys(table["method"]))
    colour = alt.Color("method:N", title=None, scale=alt.Scale(domain=methods, range=list(_COLOURS)[: len(methods)]))
    shape = alt.Shape("method:N", title=None, scale=alt.Scale(domain=methods, range=list(_SHAPES)[: len(methods)]))
    legend = alt.Legend(orient="top")
    base = alt.Chart(told).encode(
        x=alt.X("networks:Q", title="networks that were run", scale=alt.Scale(zero=False)),
        color=colour.legend(legend),
    )
    y = alt.Y("mean:Q", title="share of the best front's area", axis=alt.Axis(format="%"), scale=_fitted())
    ranges = base.mark_rule(opacity=0.5, strokeWidth=2).encode(y=alt.Y("min:Q"), y2="max:Q")
    tips = [
        "method",
        "networks",
        *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("mean", "min", "max")),
        alt.Tooltip("n:Q", title="seeds"),
    ]
    marks = base.mark_point(filled=True, size=80).encode(y=y, shape=shape.legend(legend), tooltip=tips)
    return alt.layer(ranges, base.mark_line().encode(y=y), marks).properties(
        width=520, height=260, title=alt.Title(title, subtitle="Marks: means over seeds. Strokes: worst and best seed.")
    )


def effort_bars(rows: Iterable[Mapping], *, title: str = "") -> alt.HConcatChart:
    """Networks that each family's search ran, and its seconds, trainings among them.

    Args:
        rows: with ``family``, ``evaluated``, ``search_seconds`` and evidence; the first of each family counts.

    Raises:
        ValueError: for no rows, or rows without evidence.
    """
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError("effort_bars() was given no rows; search.report() makes them.")
    check_evidence(rows, "family")
    table = pd.DataFrame(rows).drop_duplicates("family").astype({"evaluated": int, "search_seconds": float})
    tips = ["family", "evaluated", alt.Tooltip("search_seconds:Q", title="seconds", format=".0f")]
    tips += [alt.Tooltip(f"{column}:N") for column in _TOLD if column in table and column != "evaluated"]
    panels = []
    for n, (column, name, form) in enumerate(
        (("evaluated", "networks run", "d"), ("search_seconds", "seconds, training of noise included", ".0f"))
    ):
        axis = alt.Axis(labels=n == 0, ticks=False, domain=False, labelLimit=160)
        base = alt.Chart(table).encode(
            x=alt.X(f"{column}:Q", title=name),
            y=alt.Y("family:N", title=None, sort=list(table.sort_values("evaluated")["family"]), axis=axis),
        )
        bars = base.mark_bar(color=(BLUE, ORANGE)[n], height=14).encode(tooltip=tips)
        words = base.mark_text(align="left", dx=4).encode(text=alt.Text(f"{column}:Q", format=form))
        panels.append((bars + words).properties(width=210, height=24 * len(table)))
    return alt.hconcat(*panels, spacing=14, title=title)

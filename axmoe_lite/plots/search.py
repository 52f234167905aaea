"""Assignments that were searched for: what each part can bear, and the fronts of what was found.

Chapter: 12, "A multiplier for each expert?"
"""

import json
from collections.abc import Iterable, Mapping

import altair as alt
import pandas as pd

from axmoe_lite.multipliers import EXACT
from axmoe_lite.multipliers.catalogue import power_of
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, check_evidence

_TOLD = ["n_train", "n_test", "n_validation", "seed", "epochs", "regime", "evaluated", "commit", "date", "device"]


def sensitivities(rows: Iterable[Mapping], *, title: str) -> alt.LayerChart:
    """Part by multiplier: how far scores move if that part alone uses it. Dark parts should stay exact.

    Args:
        rows: of :func:`axmoe_lite.search.sensitivity`.

    Raises:
        ValueError: for no rows.
    """
    table = pd.DataFrame([dict(row) for row in rows])
    if table.empty:
        raise ValueError("sensitivities() was given no rows; search.sensitivity() makes them.")
    table["moved"] = table["more_divergence"].clip(lower=1e-4)  # the scale is logarithmic; noise may be below 0
    table["short"] = table["multiplier"].str.replace("mul8s_1", "")
    power = sorted(set(table["multiplier"]), key=lambda name: -power_of(name))
    x = alt.X(
        "short:N",
        title="multiplier, cheaper to the right",
        sort=[name.replace("mul8s_1", "") for name in power],
        axis=alt.Axis(labelAngle=0),
    )
    y = alt.Y("group:N", title=None, sort=None, axis=alt.Axis(labelLimit=260))
    kept = ["group", "layers", "multiplier", "short", "moved", "more_divergence", "more_loss", "accuracy", "saved"]
    return (
        alt.Chart(table[kept])
        .mark_rect()
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "moved:Q",
                title="divergence added, nats",
                scale=alt.Scale(type="log", scheme="oranges"),
            ),
            tooltip=[
                "group",
                "layers",
                "multiplier",
                alt.Tooltip("more_divergence:Q", title="divergence added, nats", format=".4f"),
                alt.Tooltip("more_loss:Q", title="loss added", format=".4f"),
                alt.Tooltip("accuracy:Q", title="accuracy on validation images", format=".1%"),
                alt.Tooltip("saved:Q", title="P_norm saved", format=".4f"),
            ],
        )
        .properties(width=alt.Step(60), height=alt.Step(14), title=title)
    )


def mixed_fronts(rows: Iterable[Mapping], *, title: str = "") -> alt.LayerChart:
    """Accuracy on test images against cost: a line a family of assignments, through what validation chose.

    A click in the legend picks families.

    Args:
        rows: of :func:`axmoe_lite.search.report` with ``family`` ("dense, mixed" and the like) and evidence.

    Raises:
        ValueError: for rows without evidence.
    """
    rows = [dict(row) for row in rows]
    check_evidence(rows, "family")
    table = pd.DataFrame(rows).astype({"top1": float, "p_norm": float, "accuracy": float})
    table["circuit"] = [_only_one(row) for row in rows]
    uniform = table[["uniform" in family for family in table["family"]]].sort_values("top1")
    lowest = uniform.drop_duplicates("circuit").index  # named once, beside the lowest of its marks
    table.loc[~table.index.isin(lowest), "circuit"] = ""
    families = sorted(set(table["family"]))  # so that figures of the same ones have the same colours
    colours = [BLUE, SKY, ORANGE, PURPLE, GREEN, GREY]
    scale = alt.Scale(domain=families, range=[colours[i % len(colours)] for i in range(len(families))])
    pick = alt.selection_point(fields=["family"], bind="legend")
    faint = alt.condition(pick, alt.value(0.95), alt.value(0.1))
    shown = alt.Chart(
        table[[c for c in ("family", "circuit", "top1", "p_norm", "accuracy", "multipliers", *_TOLD) if c in table]]
    )
    x = alt.X("p_norm:Q", title="normalised inference cost", scale=alt.Scale(zero=False))
    high = table["top1"].max()
    low = min(table["top1"].min(), high - 0.1)  # so that a few images do not fill the figure
    scale_y = alt.Scale(domain=[max(0.0, low - 0.05), min(1.0, high + 0.03)], nice=False)
    y = alt.Y("top1:Q", title="top-1 accuracy, test images", axis=alt.Axis(format="%"), scale=scale_y)
    shapes = alt.Scale(domain=families, range=["diamond" if "uniform" in name else "circle" for name in families])
    legend = alt.Legend(orient="top", columns=2, labelLimit=0)
    colour = alt.Color("family:N", title=None, scale=scale, legend=legend)
    lines = (
        shown.transform_filter("indexof(datum.family,'uniform')<0")
        .mark_line(strokeWidth=1.5)
        .encode(x=x, y=y, color=colour, opacity=faint, order="p_norm:Q")
    )
    points = shown.mark_point(filled=False, size=70, strokeWidth=2).encode(
        x=x,
        y=y,
        color=colour,
        opacity=faint,
        shape=alt.Shape("family:N", title=None, scale=shapes, legend=legend),
        tooltip=[
            "family",
            alt.Tooltip("top1:Q", title="top-1", format=".2%"),
            alt.Tooltip("p_norm:Q", title="P_norm", format=".3f"),
            alt.Tooltip("accuracy:Q", title="accuracy on validation images", format=".2%"),
            *(alt.Tooltip(c) for c in ("multipliers", *_TOLD) if c in table),
        ],
    )
    names = shown.transform_filter("indexof(datum.family,'uniform')>=0")
    names = names.mark_text(fontSize=11, dx=9, dy=11, align="left", color="#555").encode(
        x=x, y=y, text="circuit:N", opacity=faint
    )
    subtitle = (
        f"Lines: searched, circles. Diamonds: one multiplier for all layers ({EXACT.replace('mul8s_1', '')} is exact)."
    )
    # The points first: in a layered chart only the first layer's legend listens.
    return alt.layer(points.add_params(pick), lines, names).properties(
        width=520, height=340, title=alt.Title(title, subtitle=subtitle)
    )


def _only_one(row: Mapping) -> str:
    """The circuit that all layers of a row's assignment have, in short; "" if there are several."""
    assignment = row.get("assignment") or "{}"
    used = set((json.loads(assignment) if isinstance(assignment, str) else assignment).values())
    return used.pop().rpartition(":")[2].replace("mul8s_1", "") if len(used) == 1 else ""

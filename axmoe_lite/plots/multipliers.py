"""What a multiplier gets wrong, and what it is made of.

Chapters: 01, "What does a cheap multiplier get wrong?", and 02, "Why is an approximate product just a few exact ones?"
"""

import itertools
import re
from collections.abc import Sequence

import altair as alt
import pandas as pd

from axmoe_lite.factors import factorise
from axmoe_lite.multipliers import EVOAPPROX, Multiplier, error_table, errors, multiplier
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SIGNED, SKY

STAR = "M0,-1L.23,-.33L.94,-.33L.36,.11L.59,.8L0,.37L-.59,.8L-.36,.11L-.94,-.33L-.25,-.33Z"


def error_maps(names: Sequence[str | Multiplier]) -> alt.ConcatChart:
    """Error maps of several multipliers side by side, each cell the mean error of 8 x 8 operand pairs.

    Names and multipliers will do.

    Each map has its own colour range, in parts of its largest cell, so that the pattern shows; how large
    that is stands above it.
    """
    side, maps = 8, []
    numbers = alt.CsvDataFormat(type="csv", parse=dict.fromkeys(("a", "b", "share"), "number"))
    axis = alt.Axis(values=[-128, 0, 127], grid=False)
    for name in names:
        found = name if isinstance(name, Multiplier) else multiplier(name)
        table = error_table(found).double()
        means = table.unflatten(0, (-1, side)).unflatten(2, (-1, side)).mean((1, 3))
        top = float(means.abs().max())
        cells = ((i * side - 128, j * side - 128, v) for i, row in enumerate(means.tolist()) for j, v in enumerate(row))
        # Text in CSV is a tenth of the same as JSON objects.
        text = "\n".join(["a,b,share", *(f"{a},{b},{v / (top or 1):.3g}" for a, b, v in cells)])
        maps.append(
            alt.Chart(alt.InlineData(values=text, format=numbers))
            .transform_calculate(a2=f"datum.a+{side}", b2=f"datum.b+{side}")
            .mark_rect()
            .encode(
                x=alt.X("a:Q", title="activation a", axis=axis, scale=alt.Scale(domain=[-128, 128], nice=False)),
                x2="a2:Q",
                y=alt.Y("b:Q", title="weight b", axis=axis, scale=alt.Scale(domain=[-128, 128], nice=False)),
                y2="b2:Q",
                color=alt.Color(
                    "share:Q",
                    title="mean error of 8 x 8 pairs, in parts of the largest",
                    scale=alt.Scale(scheme="blueorange", domain=[-1, 1]),
                    legend=alt.Legend(orient="bottom", gradientLength=320, titleLimit=400),
                ),
            )
            .properties(
                width=160, height=160, title=alt.Title(_short(found.name), subtitle=f"up to {top:.0f}", fontSize=13)
            )
        )
    return alt.concat(*maps, columns=3, spacing=8).resolve_scale(color="shared")


def _short(name: str) -> str:
    """A multiplier's name; of one from a file the file's alone, without its folders and options."""
    return re.sub(r"file:(?:[^,\]]*/)?([^@,\]]*)[^,\]]*", r"\1", name)


def power_error_front(mine: Multiplier | None = None) -> alt.LayerChart:
    """Mean absolute error against power: the thirteen circuits, and families around them.

    Hollow marks have a proxy for their power (see :mod:`axmoe_lite.multipliers.price`).

    Args:
        mine: one more, drawn as a star with its name, if its power is known and it errs at all.
    """
    names = [f"broken_array({a},{b},{v})" for a, b, v in itertools.product(range(5), range(5), range(0, 9, 2))]
    names += [f"drum({k})" for k in range(3, 8)] + ["mitchell()", "roba()"]
    names += [f"{f}({k},{m})" for f in ("pr", "roup") for k, m in itertools.product(range(3), range(0, 7, 2))]
    rows = []
    for name in [*EVOAPPROX, *names]:
        found = multiplier(name)
        metrics = errors(found)
        if metrics.mae > 0 and (name in EVOAPPROX or found.is_proxy):  # each published circuit once
            rows.append(
                {
                    "name": name,
                    "family": "EvoApproxLib" if name in EVOAPPROX else name.split("(")[0],
                    "power": "proxy" if found.is_proxy else "published",
                    "power_mw": round(found.power_mw, 4),
                    "mae": round(metrics.mae, 2),
                    "bias": round(metrics.mean_error, 2),
                }
            )
    families = list(dict.fromkeys(row["family"] for row in rows))
    colours = [BLUE, SKY, ORANGE, GREEN, RED, PURPLE, GREY]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("power_mw:Q", title="power (mW, PDK45)", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("mae:Q", title="mean absolute error (product units)", scale=alt.Scale(type="log")),
        tooltip=["name", "family", "power", "power_mw", "mae", "bias"],
    )
    pick = alt.selection_point(fields=["family"], bind="legend")
    points = base.mark_point(size=70, strokeWidth=1.6).encode(
        color=alt.Color(
            "family:N",
            title="family (click)",
            scale=alt.Scale(domain=families, range=colours),
            legend=alt.Legend(symbolFillColor="transparent"),
        ),
        fill=alt.Fill(
            "power:N",
            scale=alt.Scale(domain=["published", "proxy"], range=[BLUE, "transparent"]),
            legend=alt.Legend(title="power", symbolType="circle", symbolStrokeColor=BLUE),
        ),
        opacity=alt.condition(pick, alt.value(0.9), alt.value(0.08)),
    )
    labels = (
        base.transform_filter("datum.family=='EvoApproxLib'")
        .transform_calculate(short="slice(datum.name,7)", down="datum.short=='KVP'", left="datum.short=='KVQ'")
        .mark_text(
            fontSize=11,
            align=alt.ExprRef("datum.left?'right':'left'"),
            dx=alt.ExprRef("datum.left?-8:8"),
            dy=alt.ExprRef("datum.down?9:-5"),
        )
        .encode(text="short:N")
    )
    front = points.add_params(pick) + labels
    if mine is not None and mine.power_mw is not None and errors(mine).mae > 0:
        row = {"name": _short(mine.name), "power_mw": mine.power_mw, "mae": errors(mine).mae}
        at = alt.Chart(pd.DataFrame([row])).encode(x="power_mw:Q", y="mae:Q")
        star = at.mark_point(shape=STAR, size=160, filled=True, color="black", opacity=1).encode(tooltip=[*row])
        front += star + at.mark_text(dx=12, align="left", fontSize=13, fontWeight="bold").encode(text="name:N")
    return front.properties(width=480, height=340, title="Cheaper means more wrong, but some are better bargains")


def proxy_check(leave_one_out: dict[str, float]) -> alt.Chart:
    """How far the power proxy misses each published circuit that was left out of its fit."""
    rows = [{"circuit": name, "miss": miss} for name, miss in leave_one_out.items()]
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X("miss:Q", title="proxy against published power, circuit left out", axis=alt.Axis(format="+.0%")),
            y=alt.Y("circuit:N", sort=None, title=None),
            tooltip=["circuit", alt.Tooltip("miss:Q", format="+.1%")],
        )
        .properties(width=420, height=260)
    )


# ------------------------------------------------------------------------------- its factors


def kept_cells(names: list[str]) -> alt.Chart:
    """The 8 x 8 array of bit products of a circuit, coloured by the factored term each belongs to.

    White cells are left out of the circuit. A menu picks the circuit.
    """
    rows = []
    for name in names:
        masks = factorise(multiplier(name)).masks
        for i, j in itertools.product(range(8), range(8)):
            term = next((r for r, (p, q) in enumerate(masks) if p >> i & 1 and q >> j & 1), None)
            label = "left out" if term is None else f"term {term + 1}"
            rows.append({"circuit": name, "i": i, "j": j, "term": label, "column": i + j})
    pick = alt.selection_point(
        fields=["circuit"],
        value=[{"circuit": "mul8s_1KVA"}],
        bind=alt.binding_select(options=names, name="circuit  "),
    )
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_rect(stroke="#bbb")
        .encode(
            x=alt.X("j:O", title="bit j of the weight b", sort="descending", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("i:O", title="bit i of the activation a"),
            color=alt.Color(
                "term:N",
                title=None,
                scale=alt.Scale(
                    domain=[f"term {r}" for r in range(1, 6)] + ["left out"],
                    range=[ORANGE, GREEN, RED, PURPLE, BLUE, "#ffffff"],
                ),
                legend=alt.Legend(symbolStrokeColor="#bbb", symbolType="square"),
            ),
            tooltip=["i", "j", "column", "term"],
        )
        .add_params(pick)
        .transform_filter(pick)
        .properties(width=300, height=300)
    )


def number_grid(values: list[list[int]], *, title: str, low: int, high: int) -> alt.LayerChart:
    """A small table of products as coloured numbers, rows a and columns b from ``low`` to ``high``."""
    rows = [{"a": low + i, "b": low + j, "value": value} for i, row in enumerate(values) for j, value in enumerate(row)]
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("b:O", title="b", axis=alt.Axis(labelAngle=0, orient="top")), y=alt.Y("a:O", title="a")
    )
    cells = base.mark_rect().encode(color=alt.Color("value:Q", scale=SIGNED, legend=None))
    most = max(abs(row["value"]) for row in rows)
    dark = alt.condition(f"abs(datum.value) > {0.6 * most}", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=11).encode(text="value:Q", color=dark)
    side = 30 * (high - low + 1)
    return (cells + numbers).properties(width=side, height=side, title=title)

"""What a multiplier gets wrong, and what it is made of.

Chapters: 01, "What does a cheap multiplier get wrong?", and 02, "Why is an approximate product just a few exact ones?"
"""

import itertools

import altair as alt
import pandas as pd

from axmoe_lite.factors import factorise
from axmoe_lite.multipliers import EVOAPPROX, FAMILIES, errors, exact_table, multiplier, proxy_power_mw
from axmoe_lite.multipliers.price import array_columns, full_adders
from axmoe_lite.multipliers.published import PUBLISHED
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SIGNED, SKY

_TILE = 4  # operand values along the side of one drawn cell
_SLIDERS = {"drop_a": 6, "drop_b": 6, "drop_columns": 10}


def broken_array_explorer() -> alt.VConcatChart:
    """Three sliders, the error map of that broken array and its figures, all computed in the page.

    All 65,536 products are recomputed by Vega's own expressions when a slider moves; the map shows the mean
    error of 4 x 4 neighbouring pairs, the figures below it are those of all pairs.
    """
    powers = [_power(*drops) for drops in itertools.product(*(range(most + 1) for most in _SLIDERS.values()))]
    sliders = [
        alt.param(name=name, value=value, bind=alt.binding_range(min=0, max=_SLIDERS[name], step=1, name=f"{name}  "))
        for name, value in (("drop_a", 1), ("drop_b", 1), ("drop_columns", 0))
    ]
    b_terms = [
        f"(drop_a<={i}?((datum.a>>{i})&1)*{-128 if i == 7 else 1 << i}"
        f"*(max(drop_b,drop_columns-{i})>7?0:datum.b&~((1<<max(drop_b,drop_columns-{i}))-1)):0)"
        for i in range(8)
    ]
    pairs = alt.Chart(alt.sequence(0, 65536, as_="i")).transform_calculate(
        a="floor(datum.i/256)-128", b="datum.i%256-128"
    )
    pairs = pairs.transform_calculate(error="+".join(b_terms) + "-datum.a*datum.b")
    heat = (
        pairs.transform_calculate(
            x=f"floor((datum.a+128)/{_TILE})*{_TILE}-128",
            y=f"floor((datum.b+128)/{_TILE})*{_TILE}-128",
        )
        .transform_aggregate(error="mean(error)", groupby=["x", "y"])
        .transform_calculate(x2=f"datum.x+{_TILE}", y2=f"datum.y+{_TILE}")
        .mark_rect(strokeWidth=0)
        .encode(
            x=alt.X("x:Q", title="activation a", scale=alt.Scale(domain=[-128, 128], nice=False)),
            x2="x2:Q",
            y=alt.Y("y:Q", title="weight b", scale=alt.Scale(domain=[-128, 128], nice=False)),
            y2="y2:Q",
            color=alt.Color(
                "error:Q", title="error", scale=SIGNED, legend=alt.Legend(orient="bottom", gradientLength=250)
            ),
            tooltip=[
                alt.Tooltip("x:Q", title="a from"),
                alt.Tooltip("y:Q", title="b from"),
                alt.Tooltip("error:Q", title="mean error", format=".1f"),
            ],
        )
        .properties(width=320, height=320)  # 64 cells of 5 pixels: no seams
    )
    index = f"powers[(drop_a*{_SLIDERS['drop_b'] + 1}+drop_b)*{_SLIDERS['drop_columns'] + 1}+drop_columns]"
    lines = {
        "power": f"format({index}/powers[0],'.0%')+' of the exact multiplier'",
        "mean |error|": "format(datum.mae,'.1f')",
        "worst |error|": "format(datum.wce,'d')",
        "mean error (bias)": "format(datum.bias,'+.2f')",
        "bias for a ≥ 0": "format(datum.positive,'+.2f')",
        "wrong products": "format(datum.wrong,'.1%')",
    }
    figures = (
        pairs.transform_calculate(
            size="abs(datum.error)",
            wrong="datum.error!=0?1:0",
            positive="datum.a>=0?datum.error*2:0",
        )
        .transform_aggregate(
            mae="mean(size)", wce="max(size)", bias="mean(error)", positive="mean(positive)", wrong="mean(wrong)"
        )
        .transform_calculate(**{f"line{n}": f"'{name}:  '+{value}" for n, (name, value) in enumerate(lines.items())})
        .transform_fold([f"line{n}" for n in range(len(lines))])
        .mark_text(align="left", fontSize=14)
        .encode(x=alt.value(0), y=alt.Y("key:N", axis=None), text="value:N")
        .properties(width=230, height=160)
    )
    return (
        alt.hconcat(heat, figures, spacing=24)
        .add_params(*sliders, alt.param(name="powers", value=powers))
        .properties(title="Move a slider: what does the array get wrong?")
    )


def _power(drop_a: int, drop_b: int, drop_columns: int) -> float:
    """Published where the circuit is, else the proxy; rounded to what a page needs."""
    for published in PUBLISHED:
        if published.drops == (drop_a, drop_b, drop_columns):
            return published.power_mw
    return round(proxy_power_mw(full_adders(array_columns(drop_a, drop_b, drop_columns))), 3)


def error_maps(names: list[str]) -> alt.ConcatChart:
    """Error maps of several multipliers side by side, each cell the mean error of 8 x 8 operand pairs.

    Each map has its own colour range, in parts of its largest cell, so that the pattern shows; how large
    that is stands above it.
    """
    side, maps = 8, []
    numbers = alt.CsvDataFormat(type="csv", parse=dict.fromkeys(("a", "b", "share"), "number"))
    axis = alt.Axis(values=[-128, 0, 127], grid=False)
    for name in names:
        table = (multiplier(name).table - exact_table()).double()
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
            .properties(width=160, height=160, title=alt.Title(name, subtitle=f"up to {top:.0f}", fontSize=13))
        )
    return alt.concat(*maps, columns=3, spacing=8).resolve_scale(color="shared")


def power_error_front() -> alt.LayerChart:
    """Mean absolute error against power: the thirteen circuits, and families around them.

    Hollow marks have a proxy for their power (see :mod:`axmoe_lite.multipliers.price`).
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
    families = ["EvoApproxLib", *(f for f in FAMILIES if f != "truncation")]
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
    return (points.add_params(pick) + labels).properties(
        width=480, height=340, title="Cheaper means more wrong, but some are better bargains"
    )


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
    numbers = base.mark_text(fontSize=11).encode(text="value:Q")
    side = 30 * (high - low + 1)
    return (cells + numbers).properties(width=side, height=side, title=title)

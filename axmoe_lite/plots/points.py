"""Operating points: which circuit each layer gets at each, what they cost and keep, and a run that switches.

Chapter: 15, "Can one network have several prices?"
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence

import altair as alt
import pandas as pd

from axmoe_lite import cost
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.multipliers.catalogue import power_of
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, check_evidence
from axmoe_lite.search import qos
from axmoe_lite.search.space import catalogue

_SHADES = [BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY]
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"]
_REGIMES = {
    "not retrained": (ORANGE, "triangle-down"),
    "norms refreshed": (PURPLE, "diamond"),
    "overlays tuned": (BLUE, "circle"),
    "weights tuned too": (GREEN, "square"),
}
_TOLD = ["regime", "point", "scale_c", "circuits", "tune_epochs", "tune_images", "n_train", "n_test", "epochs"]
_TOLD += ["seed", "device", "commit", "date", "scale"]


def point_tiles(
    points: Sequence[Mapping[str, str]], *, costs: Sequence[float], scales: Sequence[float], title: str
) -> alt.LayerChart:
    """Layer by operating point: the circuit, shaded by its power, a dark tile a dear one.

    Args:
        points: assignments of the same layers, as of :func:`axmoe_lite.search.qos.choose`.
        costs: the P_norm of each point.
        scales: the scale c of each point's tolerances.

    Raises:
        ValueError: for no points, other numbers of costs or scales, or layers that differ between points.
    """
    if not len(points) or not len(points) == len(costs) == len(scales):
        raise ValueError(
            f"point_tiles() was given {len(points)} points, {len(costs)} costs and {len(scales)} scales; one cost and"
            " one scale a point are needed, and one point at least."
        )
    for p, one in enumerate(points):
        if set(one) != set(points[0]):
            layer = sorted(set(one) ^ set(points[0]))[0]
            raise ValueError(f"Only one of points 0 and {p} names layer {layer!r}; points are of the same layers.")
    heads = [f"point {p}|c = {c:g}|P_norm {paid:.3f}" for p, (c, paid) in enumerate(zip(scales, costs, strict=True))]
    tiles = [
        {"layer": layer, "point": head, "circuit": _short(name), "power": round(_percent(name), 1)}
        for head, one in zip(heads, points, strict=True)
        for layer, name in one.items()
    ]
    base = alt.Chart(pd.DataFrame(tiles)).encode(
        x=alt.X(
            "point:N",
            title=None,
            sort=heads,
            axis=alt.Axis(
                orient="top",
                labelAngle=0,
                labelExpr="split(datum.label,'|')",
                labelPadding=36,  # to the first of three lines, which grow downwards
                ticks=False,
                domain=False,
            ),
        ),
        y=alt.Y("layer:N", title=None, sort=list(points[0]), axis=alt.Axis(labelLimit=220)),
        tooltip=["layer", "circuit", alt.Tooltip("power:Q", title="power, % of the exact circuit", format=".1f")],
    )
    cells = base.mark_rect(stroke="white").encode(
        color=alt.Color(
            "power:Q",
            title=["power, % of the", "exact circuit"],
            scale=alt.Scale(domain=[0, 100], range=["#f4f7fb", BLUE]),
            legend=alt.Legend(gradientLength=120),
        )
    )
    dark = alt.condition("datum.power>60", alt.value("white"), alt.value("#222222"))
    names = base.mark_text(fontSize=12).encode(text="circuit:N", color=dark)
    used = sorted({name for one in points for name in one.values()}, key=lambda name: -power_of(name))
    many = f"{len(used)} circuit{'s' * (len(used) > 1)} in all: {', '.join(map(_short, used))}."
    return alt.layer(cells, names).properties(
        width=alt.Step(118), height=alt.Step(24), title=alt.Title(title, subtitle=many, offset=10)
    )


def instance_costs(
    std: qos.Std,
    signal: Mapping[str, float],
    sigma: Mapping[str, float],
    multipliers: Iterable[str],
    *,
    macs: cost.Macs,
    title: str,
    most: int = 6,
    scales: Sequence[float] = qos.SCALES,
    seed: int = 0,
) -> alt.HConcatChart:
    """What a limit to n circuits does: the cost of each point, and how far past its tolerance its worst layer is.

    Args:
        std, signal, sigma, multipliers, scales, seed: of :func:`axmoe_lite.search.qos.choose`, which is asked for each
            number of instances from 1 to ``most``.
        macs: of the network, from :func:`axmoe_lite.cost.count`.

    Raises:
        ValueError: for ``most`` below 1, or as ``choose``.
    """
    if most < 1:
        raise ValueError(f"most is {most}; at least 1 circuit is needed.")
    names = catalogue(multipliers)
    v = qos.rows(std, signal, sigma, names, scales=scales).reshape(len(scales), len(sigma), len(names))
    rows = []
    for n in range(1, most + 1):
        for p, one in enumerate(qos.choose(std, signal, sigma, names, instances=n, scales=scales, seed=seed)):
            used = [v[p, place, names.index(one[layer])] for place, layer in enumerate(sigma)]
            paid = cost.price(macs, one).p_norm
            rows.append({"instances": n, "point": p, "scale_c": scales[p], "p_norm": paid, "worst": float(max(used))})
    table = pd.DataFrame(rows)
    colour, shape = _by_point(table, legend=alt.Legend(orient="top"))
    tips = ["instances", "point", alt.Tooltip("scale_c:Q", title="scale c", format="g")]
    tips += [alt.Tooltip("p_norm:Q", title="P_norm", format=".3f")]
    tips += [alt.Tooltip("worst:Q", title="v of the worst layer", format=".2f")]
    axis = alt.Axis(values=list(range(1, most + 1)), format="d", grid=False)
    x = alt.X(
        "instances:Q",
        title="circuits that the chip holds",
        axis=axis,
        scale=alt.Scale(domain=[0.7, most + 0.3], nice=False),
    )
    base = alt.Chart(table).encode(x=x, tooltip=tips, color=colour)

    def panel(y: alt.Y) -> alt.LayerChart:
        marks = base.mark_point(size=75, filled=True).encode(y=y, shape=shape)
        return marks + base.mark_line(strokeWidth=1.5).encode(y=y)

    paid = panel(alt.Y("p_norm:Q", title="P_norm", scale=alt.Scale(zero=False, padding=8)))
    worst = panel(alt.Y("worst:Q", title="v of the worst layer", scale=alt.Scale(zero=True)))
    limit = alt.Chart(pd.DataFrame({"v": [1]})).mark_rule(strokeDash=[5, 4], color="#555").encode(y="v:Q")
    says = "Left: what a point costs. Right: its worst layer's error, in parts of its tolerance (dashed)."
    size = {"width": 235, "height": 210}
    panels = [each.properties(**size) for each in (paid, worst + limit)]
    return alt.hconcat(*panels, spacing=24).properties(title=alt.Title(title, subtitle=says))


def point_accuracy(rows: Iterable[Mapping], *, title: str) -> alt.LayerChart:
    """Top-1 of each operating point against its cost, a line a regime; dashed, the exact circuit everywhere.

    Rows of several networks or settings get a menu.

    Args:
        rows: with ``network``, ``instances``, ``lam``, ``sigma_max``, ``point``, ``scale_c``, ``regime``, ``p_norm``,
            ``top1`` and evidence; numbers or their text. A row of regime ``"exact circuit"`` is the dashed line.

    Raises:
        ValueError: for no rows, rows without evidence, a regime that does not exist, or a top-1 outside [0, 1].
    """
    rows = [dict(row) for row in rows]
    check_evidence(rows, "point")
    table = _read(rows)
    table["run"] = [_run(row) for row in table.to_dict("records")]
    runs = list(dict.fromkeys(table["run"]))
    menu = {"bind": alt.binding_select(options=runs, name="run  ")} if len(runs) > 1 else {}
    chosen = alt.param("points_run", value=runs[0], **menu)
    pick = alt.selection_point(fields=["regime"], bind="legend")
    regimes = [name for name in _REGIMES if name in set(table["regime"])]
    ranges = [[_REGIMES[name][part] for name in regimes] for part in (0, 1)]
    legend = alt.Legend(orient="top", columns=4)
    colour, shape = (
        channel("regime:N", title=None, scale=alt.Scale(domain=regimes, range=each), legend=legend)
        for channel, each in zip((alt.Color, alt.Shape), ranges, strict=True)
    )
    kept = ["run", "p_norm", "top1", *(name for name in _TOLD if name in table)]
    shown = alt.Chart(table[kept]).transform_filter("datum.run==points_run")
    y = alt.Y("top1:Q", title="top-1 accuracy, test images", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False))
    x = alt.X(
        "p_norm:Q",
        title="P_norm (exact circuit everywhere = 1)",
        axis=alt.Axis(tickCount=8),
        scale=alt.Scale(zero=False, padding=12),
    )
    faint = alt.condition(pick, alt.value(0.95), alt.value(0.1))
    points = shown.transform_filter("datum.regime!='exact circuit'").encode(x=x, y=y, color=colour, opacity=faint)
    marks = points.mark_point(filled=True, size=95).encode(
        shape=shape,
        tooltip=[
            alt.Tooltip("top1:Q", title="top-1", format=".2%"),
            alt.Tooltip("p_norm:Q", title="P_norm", format=".3f"),
            *(alt.Tooltip(f"{name}:N", title=name.replace("_", " ")) for name in kept[3:]),
        ],
    )
    lines = points.mark_line(strokeWidth=1.5).encode(order="p_norm:Q")
    goal = (
        shown.transform_filter("datum.regime=='exact circuit'").mark_rule(strokeDash=[5, 4], color="#555").encode(y=y)
    )
    subtitle = [
        "Right: the most accurate point. Dashed: the exact circuit everywhere.",
        *(runs if len(runs) == 1 else []),
    ]
    # The marks first: in a layered chart only the first layer's legend listens.
    return (
        alt.layer(marks.add_params(pick), lines, goal)
        .add_params(chosen)
        .properties(width=520, height=300, title=alt.Title(title, subtitle=subtitle))
    )


def budget_trace(rows: Iterable[Mapping], *, title: str) -> alt.VConcatChart:
    """A run with a changing budget: budget and cost, the point, and the accuracy of each batch; a slider picks a step.

    Args:
        rows: of :func:`axmoe_lite.search.points.trace`.

    Raises:
        ValueError: for no rows.
    """
    table = pd.DataFrame([dict(row) for row in rows])
    if table.empty:
        raise ValueError("budget_trace() was given no steps; search.points.trace() makes them.")
    table["says"] = [_says(row) for row in table.to_dict("records")]
    last = int(table["step"].max())
    slider = alt.param("trace_step", value=last // 2, bind=alt.binding_range(min=0, max=last, step=1, name="step  "))
    colour, shape = _by_point(table, legend=None)
    base = alt.Chart(table).encode(tooltip=_STEP)
    here = base.transform_filter("datum.step==trace_step")
    words = here.mark_text(align="left", fontSize=12, fontStyle="italic", baseline="bottom")
    words = words.encode(x=alt.value(0), y=alt.value(-6), text="says:N")
    dots = base.mark_point(filled=True, size=45).encode(color=colour, shape=shape)
    beyond = base.transform_filter("!datum.affordable").mark_point(shape="cross", filled=True, size=90, color=RED)
    beyond = beyond.encode(x=_steps(last), y="p_norm:Q")
    rule = here.mark_rule(color="#222", strokeWidth=1.2)
    rule, last_rule = rule.encode(x=_steps(last)), rule.encode(x=_steps(last, title=_EACH))
    point = dots.encode(x=_steps(last), y=alt.Y("point:O", title="point"))
    y = alt.Y("accuracy:Q", title="right in a batch", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False))
    right = dots.encode(x=_steps(last, title=_EACH), y=y)
    panels = [
        alt.layer(_stairs(table, last), beyond, rule, words).properties(width=440, height=130),
        alt.layer(point, rule).properties(width=440, height=28 * table["point"].nunique()),
        alt.layer(right, last_rule).properties(width=440, height=120),
    ]
    crosses = "" if table["affordable"].all() else " Red crosses: not even the cheapest point fits."
    heading = alt.Title(title, subtitle=f"Colour and shape: the point. The slider picks a step.{crosses}", offset=12)
    chart = alt.vconcat(*panels, spacing=10).resolve_scale(color="independent", shape="independent")
    return chart.add_params(slider).properties(title=heading)


# ------------------------------------------------------------------------- what figures share

_EACH = "step, one batch each"
_STEP = [
    "step",
    alt.Tooltip("budget:Q", format=".3f"),
    alt.Tooltip("p_norm:Q", title="P_norm", format=".3f"),
    "point",
    "affordable",
    alt.Tooltip("accuracy:Q", title="right in this batch", format=".1%"),
    "images",
    alt.Tooltip("switch_us:Q", title="switched in, microseconds", format=".0f"),
]


def _stairs(table: pd.DataFrame, last: int) -> alt.Chart:
    """What may be spent and what is: two lines of steps."""
    names = ["budget (dashed)", "cost"]
    both = pd.concat(
        [table[["step"]].assign(what=n, p=table[c]) for n, c in zip(names, ("budget", "p_norm"), strict=True)]
    )
    scales = [alt.Scale(domain=names, range=each) for each in ([GREY, BLUE], [[5, 3], [1, 0]])]
    legend = alt.Legend(symbolType="stroke", symbolSize=300)
    return (
        alt.Chart(both)
        .mark_line(interpolate="step", strokeWidth=2)
        .encode(
            x=_steps(last),
            y=alt.Y("p:Q", title="P_norm", scale=alt.Scale(zero=False, padding=6)),
            color=alt.Color("what:N", title=None, scale=scales[0], legend=legend),
            strokeDash=alt.StrokeDash("what:N", title=None, scale=scales[1], legend=None),
        )
    )


def _steps(last: int, title: str | None = None) -> alt.X:
    axis = alt.Axis(labels=title is not None, ticks=title is not None, format="d", tickMinStep=1)
    return alt.X("step:Q", title=title, axis=axis, scale=alt.Scale(domain=[0, last], padding=8, nice=False))


def _by_point(table: pd.DataFrame, *, legend: alt.Legend | None) -> tuple[alt.Color, alt.Shape]:
    points = sorted(set(table["point"]))
    ranges = [[_SHADES[p % len(_SHADES)] for p in points], [_SHAPES[p % len(_SHAPES)] for p in points]]
    return tuple(
        channel("point:N", title="operating point", scale=alt.Scale(domain=points, range=each), legend=legend)
        for channel, each in zip((alt.Color, alt.Shape), ranges, strict=True)
    )


def _says(row: dict) -> str:
    right = round(row["accuracy"] * row["images"])
    text = f"Step {row['step']}: budget {row['budget']:.2f}, point {row['point']} at {row['p_norm']:.2f}, {right} of"
    return f"{text} {row['images']} right, switched in {row['switch_us']:.0f} \u00b5s."


def _read(rows: list[dict]) -> pd.DataFrame:
    """Rows with numbers, and the names of the circuits in the place of the whole assignment."""
    if not rows:
        raise ValueError("point_accuracy() was given no rows; it draws what a run has measured.")
    for row in rows:
        known = [*_REGIMES, "exact circuit"]
        if row["regime"] not in known:
            near = difflib.get_close_matches(row["regime"], known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"No regime is called {row['regime']!r}. Did you mean {near!r}? There are {', '.join(known)}."
            )
        if not 0 <= float(row["top1"]) <= 1:
            raise ValueError(f"Point {row['point']!r} has a top1 of {row['top1']}; it lies in [0, 1].")
    table = pd.DataFrame(rows).astype({"p_norm": float, "top1": float})
    names = [sorted(set(json.loads(text).values()), key=_percent, reverse=True) for text in table["assignment"]]
    table["circuits"] = [", ".join(map(_short, each)) for each in names]
    return table


def _run(row: dict) -> str:
    """What tells one curve from another, for the menu."""
    asked = f"{row['instances']} circuits, lambda {float(row['lam']):g}, sigma at most {float(row['sigma_max']):g}"
    return f"{row['network']}, {row['dataset']}, {row['n_test']} images, {asked}, seed {row['seed']} ({row['scale']})"


def _percent(name: str) -> float:
    return 100 * power_of(name) / multiplier(EXACT).power_mw


def _short(name: str) -> str:
    return name.replace("mul8s_1", "")

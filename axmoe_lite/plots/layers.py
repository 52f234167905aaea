"""What a layer does to numbers: floats become bytes, and the errors of products become the error of a sum.

Chapters: 03, "How do floats become bytes?", and 04, "What happens inside one layer?"
"""

import altair as alt
import pandas as pd
import torch
from torch import Tensor

from axmoe_lite.layers.correction import LayerError, measured_error, predicted_error
from axmoe_lite.multipliers import multiplier
from axmoe_lite.multipliers.catalogue import power_of
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, check_evidence
from axmoe_lite.quant import METHODS, Histogram, fake_quantise, weight_scale

LIMIT = 127
_DECADES = [10.0**n for n in range(-8, 1)]

# ------------------------------------------------------------------------------- chapter 03


def clip_errors(histogram: Histogram, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared rounding error and clipping error when the largest code stands for each of ``clips``.

    Args:
        histogram: of the values; each counts as the centre of its bin.
        clips: positive, [n].

    Returns:
        Two float64 [n], in the values' unit squared: over all values, those within and those beyond the range.
    """
    bins = histogram.counts.numel()
    size = (torch.arange(bins, dtype=torch.float64) + 0.5) * (histogram.top / bins)
    step = clips.double()[:, None] / LIMIT
    back = (size / step).round().clamp_max(LIMIT) * step
    squared = (back - size) ** 2 * (histogram.counts / histogram.counts.sum())
    beyond = size > step * (LIMIT + 0.5)
    return (squared * ~beyond).sum(1), (squared * beyond).sum(1)


def clip_explorer(histogram: Histogram, *, name: str) -> alt.VConcatChart:
    """Where to clip: the values of a layer above, what each clip point costs below, and a slider between.

    Errors are mean squares, in parts of the values' own mean square.

    Args:
        name: which layer of what, for the title.
    """
    percents = torch.arange(4, 101)
    clips = histogram.largest * percents.double() / 100
    scales = {method: float(histogram.scale(method)) * LIMIT for method in METHODS}
    chosen = torch.tensor([*clips.tolist(), *scales.values()])
    rounding, clipping = clip_errors(histogram, chosen)
    edges = torch.arange(1, histogram.counts.numel() + 1) * (histogram.top / histogram.counts.numel())
    share = histogram.counts / histogram.counts.sum()
    power = float((share * edges.double() ** 2).sum())
    rows = [
        {
            "percent": p,
            "clip": float(f"{clip:.4g}"),
            "beyond": float(share[edges > clip].sum()),
            "rounding": float(f"{r / power:.4g}"),
            "clipping": float(f"{c / power:.4g}"),
            "both": float(f"{(r + c) / power:.4g}"),
        }
        for p, clip, r, c in zip(
            [*percents.tolist(), *scales], chosen.tolist(), rounding.tolist(), clipping.tolist(), strict=True
        )
    ]
    curve, marks = rows[: len(percents)], rows[len(percents) :]
    lowest = min(row["both"] for row in curve) / 20
    start = min(curve, key=lambda row: abs(row["clip"] - scales["percentile"]))["percent"]
    slider = alt.param(
        "clip_percent",
        value=start,
        bind=alt.binding_range(min=4, max=100, step=1, name="clip point, % of the largest value  "),
    )

    x_scale = alt.Scale(domain=[0, histogram.largest * 1.02], nice=False)
    width, coarse = 490, 64
    bars = torch.zeros(coarse, dtype=torch.float64).index_add_(
        0, ((edges - edges[0] / 2) / histogram.largest * coarse).long().clamp_max(coarse - 1), share
    )
    bar_rows = [
        {"low": i * histogram.largest / coarse, "high": (i + 1) * histogram.largest / coarse, "share": float(v)}
        for i, v in enumerate(bars)
        if v > 0
    ]
    floor = min(row["share"] for row in bar_rows) / 2
    values = (
        alt.Chart(pd.DataFrame(bar_rows))
        .transform_calculate(
            floor=str(floor), kept=f"datum.low<clip_percent*{histogram.largest / 100}?'kept':'clipped'"
        )
        .mark_rect(stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("low:Q", title=None, scale=x_scale),
            x2="high:Q",
            y=alt.Y(
                "share:Q",
                title="share of the activations",
                scale=alt.Scale(type="log", domain=[floor, 1]),
                axis=alt.Axis(format="~%", values=_DECADES),
            ),
            y2="floor:Q",
            color=alt.Color(
                "kept:N",
                title=None,
                scale=alt.Scale(domain=["kept", "clipped"], range=[BLUE, ORANGE]),
                legend=alt.Legend(orient="right", symbolType="square"),
            ),
        )
        .properties(width=width, height=130)
    )
    base = alt.Chart(pd.DataFrame(curve))
    y = alt.Y(
        "error:Q",
        title="squared error / mean square",
        scale=alt.Scale(type="log", domain=[lowest, 1]),
        axis=alt.Axis(format="~%", values=_DECADES),
    )
    lines = (
        base.transform_fold(["both", "rounding", "clipping"], ["part", "error"])
        .transform_filter(f"datum.error>{lowest / 10}")  # zero has no logarithm
        .mark_line(clip=True)
        .encode(
            x=alt.X("clip:Q", title="clip point: the activation that code 127 stands for", scale=x_scale),
            y=y,
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(domain=["both", "rounding", "clipping"], range=["#222222", GREEN, PURPLE]),
                legend=alt.Legend(orient="right", symbolType="stroke"),
            ),
            strokeWidth=alt.condition("datum.part=='both'", alt.value(3), alt.value(1.6)),
        )
    )
    methods = alt.Chart(pd.DataFrame(marks).rename(columns={"percent": "method", "both": "error"}))
    points = methods.mark_point(size=80, filled=True, color=RED, opacity=1).encode(
        x="clip:Q",
        y="error:Q",
        tooltip=["method:N", "clip:Q", alt.Tooltip("beyond:Q", format=".3%"), alt.Tooltip("error:Q", format=".2e")],
    )
    names = methods.mark_text(
        dy=alt.ExprRef("{mse:16,max:-14}[datum.method]||-28"),  # the three may lie close together
        fontSize=12,
        color=RED,
    ).encode(x="clip:Q", y="error:Q", text="method:N")
    here = base.transform_filter("datum.percent==clip_percent")
    rule = here.mark_rule(strokeDash=[4, 3]).encode(x="clip:Q")
    reading = (
        here.transform_calculate(
            text="'clip at '+format(datum.clip,'.3~g')+':  '+format(datum.beyond,'.2p')+' clipped,  error '"
            "+format(datum.both,'.2p')"
        )
        .mark_text(align="left", fontSize=13, fontWeight="bold", baseline="bottom")
        .encode(x=alt.value(0), y=alt.value(-8), text="text:N")
    )
    below = alt.layer(lines, points, names, rule, reading).properties(width=width, height=220)
    return (
        alt.vconcat(values, below, spacing=24)
        .resolve_scale(color="independent")
        .add_params(slider)
        .properties(title=f"Where to clip? {name}")
    )


def code_counts(codes: dict[str, Tensor]) -> alt.LayerChart:
    """How often each code from -127 to 127 occurs, one of several layers at a time.

    Args:
        codes: int8 of any shape, by the name that the menu shows.
    """
    rows = []
    for name, values in codes.items():
        counts = torch.bincount(values.flatten().long() + 128, minlength=256)[1:]
        share = counts.double() / counts.sum()
        rows += [{"layer": name, "code": c - LIMIT, "share": round(s, 7)} for c, s in enumerate(share.tolist())]
    table = pd.DataFrame(rows)
    pick = alt.selection_point(
        fields=["layer"],
        value=[{"layer": list(codes)[-1]}],
        bind=alt.binding_select(options=list(codes), name="codes of  "),
    )
    used = table.groupby("layer", sort=False)["share"].apply(lambda s: int((s > 0).sum())).rename("used").reset_index()
    bars = (
        alt.Chart(table)
        .mark_bar(width=2, color=BLUE, clip=True)
        .encode(
            x=alt.X(
                "code:Q", scale=alt.Scale(domain=[-128, 128], nice=False), axis=alt.Axis(values=[-127, -64, 0, 64, 127])
            ),
            y=alt.Y("share:Q", title="share of the values", axis=alt.Axis(format="%"), scale=alt.Scale(domainMax=0.1)),
            tooltip=["code", alt.Tooltip("share:Q", format=".3%")],
        )
        .transform_filter(pick)
    )
    text = (
        alt.Chart(used)
        .transform_filter(pick)
        .transform_calculate(text="datum.used+' of 255 codes occur'")
        .mark_text(align="left", fontSize=13, fontWeight="bold", baseline="top")
        .encode(x=alt.value(5), y=alt.value(2), text="text:N")
    )
    title = alt.Title("Which of the 255 codes occur?", subtitle="Bars are cut at 10 %; hover over one for its share.")
    return alt.layer(bars.add_params(pick), text).properties(width=520, height=200, title=title)


def channel_ranges(weight: Tensor, *, name: str) -> alt.LayerChart:
    """How much of the byte each output channel of a layer uses if all channels share one scale.

    Args:
        weight: [O, ...].
        name: the layer's, for the title.
    """
    used = weight_scale(weight, per_channel=True) / weight_scale(weight) * LIMIT
    table = pd.DataFrame({"channel": range(len(used)), "largest": used.round().tolist()})
    bars = (
        alt.Chart(table)
        .mark_bar(color=BLUE)
        .encode(
            x=alt.X(
                "channel:O",
                sort=alt.SortField("largest"),
                axis=alt.Axis(labels=False, ticks=False),
                title="output channel, in order of its range",
            ),
            y=alt.Y(
                "largest:Q",
                title="largest |code|",
                scale=alt.Scale(domain=[0, 140], nice=False),
                axis=alt.Axis(values=[0, 32, 64, 96, 127]),
            ),
            tooltip=["channel", "largest"],
        )
    )
    full = alt.Chart(pd.DataFrame({"y": [LIMIT]}))
    rule = full.mark_rule(color=ORANGE, strokeWidth=2.5).encode(y="y:Q")
    text = full.mark_text(
        text="with a scale of its own, every channel reaches 127", color="#8a5f00", align="left", dy=-9, fontSize=12
    ).encode(x=alt.value(4), y="y:Q")
    title = f"Weights of {name}: one scale for all channels"
    return alt.layer(bars, rule, text).properties(width=520, height=190, title=title)


def straight_through(scale: float) -> alt.VConcatChart:
    """The staircase of the last codes, and the gradient that training sees there."""
    x = torch.linspace(123.5, 130.5, 351)
    inside = (x * scale).requires_grad_()
    value = fake_quantise(inside, scale)
    (slope,) = torch.autograd.grad(value.sum(), inside)
    table = pd.DataFrame({"x": (x * scale).tolist(), "value": value.tolist(), "slope": slope.tolist()}).round(5)
    axis = alt.Scale(domain=[123.5 * scale, 130.5 * scale], nice=False)
    base = alt.Chart(table).encode(x=alt.X("x:Q", title="x", scale=axis))
    stairs = base.mark_line(color=BLUE, strokeWidth=2).encode(
        y=alt.Y("value:Q", title="after the byte", scale=alt.Scale(zero=False))
    )
    truth = base.mark_line(color=GREY, strokeDash=[4, 4]).encode(y="x:Q")
    slopes = base.mark_line(color=RED, strokeWidth=2).encode(
        y=alt.Y(
            "slope:Q", title="gradient", axis=alt.Axis(values=[0, 1], format="d"), scale=alt.Scale(domain=[-0.1, 1.2])
        )
    )
    top = alt.layer(truth, stairs).properties(
        width=460,
        height=170,
        title=alt.Title(
            "Forward a staircase, backward a straight line",
            subtitle=f"The last codes at scale {scale:g}. Dashed: no rounding. Beyond 127.5 steps x is clipped.",
        ),
    )
    return alt.vconcat(top, slopes.properties(width=460, height=60), spacing=6)


# ------------------------------------------------------------------------------- chapter 04

_PARTS = {
    "lean, the same in all channels": RED,
    "shift, fixed in each channel": ORANGE,
    "scatter, new in every image": BLUE,
}


def sum_errors(
    circuits: list[str], operands: dict[str, tuple[Tensor | None, Tensor | None]], fan_ins: list[int]
) -> alt.LayerChart:
    """The error of a sum against the number of its products: lines predicted, marks measured.

    Errors are in parts of the exact sum's own standard deviation; menus pick the circuit and the operands.

    Args:
        operands: weights of the 256 values of activation and weight, as :func:`axmoe_lite.errors` takes them,
            by the name that the menu shows.
        fan_ins: where to predict and measure.
    """
    rows = []
    for circuit in circuits:
        for name, (a, b) in operands.items():
            for fan_in in fan_ins:
                found = [f(multiplier(circuit), fan_in, a=a, b=b) for f in (predicted_error, measured_error)]
                parts = [[abs(e.lean) / e.signal, e.shift / e.signal, e.scatter / e.signal] for e in found]
                rows += [
                    {"circuit": circuit, "operands": name, "K": fan_in, "part": part, "predicted": p, "measured": m}
                    for part, p, m in zip(_PARTS, *parts, strict=True)
                ]
    table = pd.DataFrame(rows)
    for column in ("predicted", "measured"):
        table[column] = [float(f"{v:.3g}") for v in table[column]]
    menus = [
        alt.param("sum_circuit", value=circuits[0], bind=alt.binding_select(options=circuits, name="circuit  ")),
        alt.param(
            "sum_operands", value=list(operands)[-1], bind=alt.binding_select(options=list(operands), name="operands  ")
        ),
    ]
    base = (
        alt.Chart(table)
        .transform_filter("datum.circuit==sum_circuit&&datum.operands==sum_operands&&datum.predicted>0")
        .encode(
            x=alt.X(
                "K:Q",
                title="fan-in K: products in the sum",
                scale=alt.Scale(type="log", domain=[fan_ins[0] / 1.25, fan_ins[-1] * 1.25], nice=False),
                axis=alt.Axis(values=fan_ins, grid=False, format="d"),
            ),
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(domain=list(_PARTS), range=list(_PARTS.values())),
                legend=alt.Legend(orient="bottom", columns=1, labelLimit=320),
            ),
        )
    )
    y = alt.Scale(type="log", domain=[1e-4, 1], clamp=True)
    lines = base.mark_line(clip=True).encode(
        y=alt.Y(
            "predicted:Q",
            title="error / standard deviation of the exact sum",
            scale=y,
            axis=alt.Axis(format="~%", values=_DECADES[4:]),
        )
    )
    marks = base.mark_point(size=55, clip=True, strokeWidth=1.8).encode(
        y=alt.Y("measured:Q", scale=y),
        shape=alt.Shape("part:N", scale=alt.Scale(domain=list(_PARTS), range=["square", "triangle-up", "circle"])),
        tooltip=["part", "K", alt.Tooltip("predicted:Q", format=".2%"), alt.Tooltip("measured:Q", format=".2%")],
    )
    title = alt.Title(
        "What grows with the fan-in?",
        subtitle="Lines: predicted from one product. Marks: 65,536 sums by the real product.",
    )
    return alt.layer(lines, marks).add_params(*menus).properties(width=460, height=300, title=title)


def channel_shifts(measured: dict[str, dict[str, LayerError]]) -> alt.LayerChart:
    """The mean error of every output channel of every layer; a menu picks the circuit.

    Args:
        measured: by circuit, what :func:`axmoe_lite.layers.correction.layer_errors` returns.
    """
    rows, bands = [], []
    order = list(next(iter(measured.values())))
    for circuit, layers in measured.items():
        for name, error in layers.items():
            unit, place = error.signal.clamp_min(1e-12), order.index(name)
            shifts = (error.shift / unit).tolist()
            aside = [place + 0.6 * ((c * 0.618) % 1 - 0.5) for c in range(len(shifts))]
            rows += [(circuit, round(x, 2), round(shift, 3)) for x, shift in zip(aside, shifts, strict=True)]
            scatter = round(float((error.scatter / unit).square().mean().sqrt()), 4)
            bands.append((circuit, place - 0.4, place + 0.4, -scatter, scatter))
    pick = alt.selection_point(
        fields=["circuit"],
        value=[{"circuit": next(iter(measured))}],
        bind=alt.binding_select(options=list(measured), name="circuit  "),
    )
    names = "[" + ",".join(f"'{name}'" for name in order) + "]"
    axis = alt.Axis(values=list(range(len(order))), labelExpr=f"{names}[datum.value]", labelAngle=-40, grid=False)
    axis.labelOverlap = len(order) > 12  # all names, where there is room
    x = alt.X("x:Q", title=None, axis=axis, scale=alt.Scale(domain=[-0.5, len(order) - 0.5], nice=False))
    y = alt.Axis(format="+~%")
    band = (
        alt.Chart(pd.DataFrame(bands, columns=["circuit", "x", "x2", "low", "high"]))
        .transform_filter(pick)
        .mark_rect(color=BLUE, opacity=0.25)
        .encode(x=x, x2="x2:Q", y=alt.Y("low:Q", title="error / signal of the channel", axis=y), y2="high:Q")
    )
    dots = (
        alt.Chart(pd.DataFrame(rows, columns=["circuit", "x", "shift"]))
        .transform_filter(pick)
        .mark_point(color=RED, filled=True, size=26, opacity=0.8)
        .encode(x=x, y=alt.Y("shift:Q", axis=y), tooltip=[alt.Tooltip("shift:Q", title="mean error", format="+.1%")])
    )
    zero = alt.Chart(pd.DataFrame({"y": [0]})).mark_rule(color="#333").encode(y="y:Q")
    title = alt.Title(
        "How far is every channel off?",
        subtitle="Dots: the mean error of one channel. Band: its standard deviation, drawn around no error.",
    )
    return alt.layer(band, zero, dots.add_params(pick)).properties(width=520, height=260, title=title)


def corrected(rows: list[dict], *, title: str = "What is got back by one number a channel?") -> alt.Chart:
    """Top-1 of each circuit before and after a remedy, one panel a run.

    Args:
        rows: with columns ``multiplier``, ``regime`` (two to four: that without the remedy comes first), ``top1``
            and evidence.

    Raises:
        ValueError: for rows without evidence.
    """
    check_evidence(rows, "multiplier")
    table = pd.DataFrame(rows).astype({"top1": float})
    table["run"] = [f"{r.dataset}, {r.n_test} images, seed {r.seed} ({r.scale})" for r in table.itertuples()]
    if table.get("network", pd.Series(dtype=str)).nunique() > 1:
        table["run"] = [f"{r.network}, {r.dataset} ({r.scale})" for r in table.itertuples()]
    table["short"] = table["multiplier"].str.replace("mul8s_1", "")
    names = sorted({*table["multiplier"]} - {"float32"}, key=lambda name: -power_of(name))
    order = [name.replace("mul8s_1", "") for name in names]  # from dear to cheap
    regimes = [regime for regime in dict.fromkeys(table["regime"]) if regime]
    colours, shapes = [ORANGE, BLUE, GREEN, PURPLE], ["circle", "diamond", "square", "triangle-up"]
    colours, shapes = colours[: len(regimes)], shapes[: len(regimes)]
    evidence = [alt.Tooltip(c) for c in ("multiplier", "regime", "dataset", "n_test", "device", "commit")]
    panels = []
    for run, part in table.groupby("run", sort=False):
        exact = part[part["multiplier"] == "float32"]
        base = alt.Chart(
            part[part["multiplier"] != "float32"][
                ["short", "regime", "top1", *(e.shorthand for e in evidence if e.shorthand != "regime")]
            ]
        )
        y = alt.Y("short:N", sort=order, title=None)
        link = (
            base.transform_aggregate(low="min(top1)", high="max(top1)", groupby=["short"])
            .mark_rule(color="#999", strokeWidth=2)
            .encode(x="low:Q", x2="high:Q", y=y)
        )
        points = base.mark_point(size=85, filled=True, opacity=1).encode(
            x=alt.X("top1:Q", title="top-1 accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            y=y,
            color=alt.Color(
                "regime:N",
                title=None,
                scale=alt.Scale(domain=regimes, range=colours),
                legend=alt.Legend(orient="bottom"),
            ),
            shape=alt.Shape("regime:N", scale=alt.Scale(domain=regimes, range=shapes)),
            tooltip=[alt.Tooltip("top1:Q", format=".2%"), *evidence],
        )
        rule = alt.Chart(exact[["top1"]]).mark_rule(strokeDash=[4, 4]).encode(x="top1:Q")
        panels.append(
            alt.layer(rule, link, points).properties(width=240, height=alt.Step(20), title=alt.Title(run, fontSize=12))
        )
    heading = alt.Title(title, subtitle="Dashed: the same network in float32. Hover over a mark for its evidence.")
    return alt.concat(*panels, columns=2, spacing=20).properties(title=heading)

"""What training sees of an approximate product, and what it gives back.

Chapter: 08, "Can a network learn its new arithmetic?"
"""

import altair as alt
import pandas as pd
import torch

from axmoe_lite.layers.gradients import slopes
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.multipliers.catalogue import power_of
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, check_evidence

_LINES = {"exact product": GREY, "the circuit": BLUE}
_SLOPES = {"straight-through": RED, "smoothed": GREEN, "the circuit's own": BLUE}
_REGIMES = {
    "not retrained": (ORANGE, "triangle-down"),
    "norms refreshed": (PURPLE, "diamond"),
    "retrained": (BLUE, "circle"),
}


def product_slopes(circuits: list[str], weights: list[int]) -> alt.VConcatChart:
    """A product as the activation grows: the circuit's stairs above, the slopes that training may use below.

    Menus pick the circuit and the weight.

    Args:
        weights: codes in -128..127.
    """
    rows = []
    for circuit in circuits:
        m = multiplier(circuit)
        p, q = slopes(m, "a")
        smoothed = torch.einsum("sa,sb->ab", p, q)
        for b in weights:
            for a in range(128):
                row = {"circuit": circuit, "b": b, "a": a, "exact": a * b, "answer": m(a, b)}
                row["own"] = m(a + 1, b) - m(a, b) if a < 127 else 0
                rows.append({**row, "smoothed": round(smoothed[a + 128, b + 128].item(), 2)})
    menus = [
        alt.param("slope_circuit", value=circuits[0], bind=alt.binding_select(options=circuits, name="circuit  ")),
        alt.param("slope_weight", value=weights[0], bind=alt.binding_select(options=weights, name="weight b  ")),
    ]
    base = (
        alt.Chart(pd.DataFrame(rows))
        .transform_filter("datum.circuit==slope_circuit&&datum.b==slope_weight")
        .transform_calculate(jump="datum.own==0?0:null")
        .encode(x=alt.X("a:Q", title="activation a", scale=alt.Scale(domain=[0, 127], nice=False)))
    )
    tooltip = ["a", "b", "answer", "exact", "smoothed"]

    def lines(shades: dict[str, str], columns: list[str], title: str, height: int) -> alt.LayerChart:
        layers = [
            base.transform_calculate(line=f'"{name}"')
            .mark_line(
                strokeWidth=3 if column == "jump" else 2,
                interpolate="step-after" if column in ("answer", "jump") else "linear",
                strokeDash=[4, 3] if column == "exact" else [1, 0],
                clip=True,
            )
            .encode(
                y=alt.Y(f"{column}:Q", title=title, scale=alt.Scale(zero=True, nice=False, padding=8)),
                color=alt.Color(
                    "line:N",
                    title=None,
                    scale=alt.Scale(domain=list(shades), range=list(shades.values())),
                    legend=alt.Legend(orient="right", symbolType="stroke"),
                ),
                tooltip=tooltip,
            )
            for name, column in zip(shades, columns, strict=True)
        ]
        return alt.layer(*layers).properties(width=440, height=height)

    above = lines(_LINES, ["exact", "answer"], "product M(a, b)", 180)
    below = lines(_SLOPES, ["b", "smoothed", "jump"], "slope dM/da", 120)
    return (
        alt.vconcat(above, below, spacing=8)
        .resolve_scale(color="independent")
        .add_params(*menus)
        .properties(
            title=alt.Title(
                "Forward the stairs, backward a slope of our choice",
                subtitle="The circuit's own slope is 0 on a step; where it jumps it has none (a gap).",
            )
        )
    )


def recovery_curves(histories: dict[str, list[dict]], *, reference: float, title: str) -> alt.LayerChart:
    """Top-1 on the test images after each epoch of retraining; epoch 0 is before it.

    Args:
        histories: of :func:`axmoe_lite.train.retrain`, with ``evaluate_every=1``, by the name in the legend.
        reference: a top-1, in [0, 1], of the exact 8-bit network before retraining: a dashed line.
        title: which network, data, scale.
    """
    rows = [
        {"run": _short(name), "epoch": row["epoch"], "top1": row["test_accuracy"], "lr": row["lr"]}
        for name, history in histories.items()
        for row in history
    ]
    names = [_short(name) for name in histories]
    shades = ["#222222", ORANGE, SKY, GREEN, RED, PURPLE, BLUE, GREY]
    pick = alt.selection_point(fields=["run"], bind="legend")
    colour = alt.Color(
        "run:N",
        title="click to single out",
        scale=alt.Scale(domain=names, range=[shades[i % len(shades)] for i in range(len(names))]),
    )
    y = alt.Y("top1:Q", title="top-1 accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1]))
    curves = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(point=alt.OverlayMarkDef(size=45))
        .encode(
            x=alt.X(
                "epoch:Q",
                title="epochs of retraining (0: before)",
                axis=alt.Axis(values=sorted({row["epoch"] for row in rows}), format="d"),
            ),
            y=y,
            color=colour,
            shape=alt.Shape("run:N", title="click to single out", scale=alt.Scale(domain=names)),
            opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
            tooltip=[
                alt.Tooltip("run:N", title="circuit"),
                "epoch",
                alt.Tooltip("top1:Q", title="top-1", format=".2%"),
                alt.Tooltip("lr:Q", title="last learning rate", format=".2g"),
            ],
        )
        .add_params(pick)
    )
    line = alt.Chart(pd.DataFrame({"top1": [reference]})).encode(y=y)
    rule = line.mark_rule(strokeDash=[5, 4], color="#555")
    return alt.layer(rule, curves).properties(
        width=430,
        height=270,
        title=alt.Title(title, subtitle=f"Dashed: exact products of bytes, before retraining ({reference:.1%})."),
    )


def recovered(rows: list[dict], *, title: str) -> alt.LayerChart:
    """Top-1 under each multiplier before retraining and after it; the cheapest multiplier is at the bottom.

    A menu picks the run where the rows hold several. What was not run has no mark.

    Args:
        rows: with ``network``, ``topology``, ``multiplier``, ``regime`` ("not retrained", "BatchNorm averages
            only" or "retrained"; others are left out) and ``top1``, and evidence. The dashed line is the exact
            multiplier, not retrained.
        title: what is asked.

    Raises:
        ValueError: for rows without evidence.
    """
    check_evidence(rows, "multiplier")
    table = pd.DataFrame(rows).astype({"top1": float})
    table = table[table["regime"].isin(list(_REGIMES))]
    table["run"] = [
        f"{r.network} {r.topology}, {r.dataset}, {r.n_test} images, seed {r.seed} ({r.scale})"
        for r in table.itertuples()
    ]
    power = {n: 9.9 if n == "float32" else power_of(n) for n in set(table["multiplier"])}
    table["power"] = table["multiplier"].map(power)
    table["short"] = [_with_power(name) for name in table["multiplier"]]
    order = table.sort_values("power", kind="stable", ascending=False)
    runs = list(dict.fromkeys(table["run"]))
    regimes = [name for name in _REGIMES if name in set(table["regime"])]
    chosen = alt.param("recovered_run", value=runs[0])
    if len(runs) > 1:
        chosen = alt.param("recovered_run", value=runs[0], bind=alt.binding_select(options=runs, name="run  "))
    pick = alt.selection_point(fields=["regime"], bind="legend")
    kept = ["run", "short", "multiplier", "regime", "top1", "n_train", "epochs", "device", "commit", "date", "scale"]
    base = (
        alt.Chart(table[kept])
        .transform_filter("datum.run==recovered_run")
        .encode(y=alt.Y("short:N", title="multiplier, power", sort=list(dict.fromkeys(order["short"]))))
    )
    axis = alt.Axis(format="%", values=[0, 0.2, 0.4, 0.6, 0.8, 1])
    x = alt.X("top1:Q", title="top-1 accuracy", axis=axis, scale=alt.Scale(domain=[0, 1]))
    scales = {
        "color": alt.Scale(domain=regimes, range=[_REGIMES[name][0] for name in regimes]),
        "shape": alt.Scale(domain=regimes, range=[_REGIMES[name][1] for name in regimes]),
    }
    legend = alt.Legend(orient="bottom")
    marks = base.mark_point(size=110, filled=True).encode(
        x=x,
        color=alt.Color("regime:N", title=None, scale=scales["color"], legend=legend),
        shape=alt.Shape("regime:N", title=None, scale=scales["shape"], legend=legend),
        opacity=alt.condition(pick, alt.value(0.9), alt.value(0.08)),
        tooltip=[
            alt.Tooltip("top1:Q", title="top-1", format=".2%"),
            *(alt.Tooltip(c) for c in ("multiplier", "regime", "n_train", "epochs", "device", "commit", "date")),
        ],
    )
    way = (
        base.transform_aggregate(low="min(top1)", high="max(top1)", groupby=["short"])
        .mark_rule(color="#bbb", strokeWidth=2)
        .encode(x=alt.X("low:Q", title="top-1 accuracy", axis=axis, scale=alt.Scale(domain=[0, 1])), x2="high:Q")
    )
    goal = (
        alt.Chart(table[kept])
        .transform_filter(f"datum.run==recovered_run&&datum.multiplier=='{EXACT}'&&datum.regime=='not retrained'")
        .mark_rule(strokeDash=[5, 4], color="#555")
        .encode(x=x)
    )
    return (
        alt.layer(goal, way, marks.add_params(pick))
        .add_params(chosen)
        .properties(
            width=460,
            height=alt.Step(26),
            title=alt.Title(
                title,
                subtitle=[*(runs if len(runs) == 1 else []), "Dashed: exact products of bytes, not retrained."],
            ),
        )
    )


def _short(name: str) -> str:
    return name.replace("mul8s_1", "") + (" (exact)" if name == EXACT else "")


def _with_power(name: str) -> str:
    if name in ("float32", EXACT):
        return _short(name)
    return f"{_short(name)}, {power_of(name) / multiplier(EXACT).power_mw:.0%}"

"""What a network makes of approximate products.

Chapter: 05, "What happens to a network?"
"""

import altair as alt
import pandas as pd

from axmoe_lite.multipliers import EXACT, PAPER_EIGHT, multiplier
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, check_evidence


def resilience(rows: list[dict]) -> alt.LayerChart:
    """Top-1 against power for the multipliers of one or several runs, each run named with its evidence.

    The eight multipliers of AxMoE are filled marks, the others hollow.

    Args:
        rows: as :func:`axmoe_lite.runs.read` returns them, or as they are given to ``record``.

    Raises:
        ValueError: for rows without evidence: a number without its origin is not drawn.
    """
    check_evidence(rows, "multiplier")
    table = pd.DataFrame(rows).astype({"top1": float, "power_mw": float, "mean_error": float})
    table["run"] = [
        f"{r.dataset}, {r.n_test} images, {r.epochs} epochs, seed {r.seed} ({r.scale})" for r in table.itertuples()
    ]
    table["short"] = table["multiplier"].str.replace("mul8s_1", "")
    table["paper"] = table["multiplier"].isin(PAPER_EIGHT)
    sides = {"KV6": "right", "swap:KVM": "left", "KV9": "below", "KVP": "below"}  # of the mark, where labels would meet
    table["side"] = table["short"].map(sides).fillna("above")
    exact = table[table.multiplier == "float32"]
    base = alt.Chart(table[table.multiplier != "float32"]).encode(
        x=alt.X("power_mw:Q", title="power of one multiplier (mW, PDK45)"),
        y=alt.Y("top1:Q", title="top-1 accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(nice=True)),
        color=alt.Color("run:N", title=None, legend=alt.Legend(orient="bottom", columns=1, labelLimit=520)),
    )
    pick = alt.selection_point(fields=["run"], bind="legend")
    shown = alt.condition(pick, alt.value(1), alt.value(0.12))
    evidence = [alt.Tooltip(c) for c in ("multiplier", "dataset", "n_test", "seed", "epochs", "device", "commit")]
    points = base.mark_point(size=80).encode(
        shape=alt.Shape("run:N", legend=None),
        fill=alt.Fill("run:N", legend=None),
        fillOpacity=alt.condition("datum.paper", alt.value(1), alt.value(0)),
        opacity=shown,
        tooltip=[alt.Tooltip("top1:Q", format=".2%"), alt.Tooltip("mean_error:Q", title="bias"), *evidence],
    )
    labels = base.mark_text(
        fontSize=11,
        align=alt.ExprRef("{right:'left',left:'right'}[datum.side]||'center'"),
        dx=alt.ExprRef("{right:5,left:-9}[datum.side]||0"),
        dy=alt.ExprRef("{right:9,left:1,below:14}[datum.side]||-11"),
    ).encode(text="short:N", opacity=shown)
    rule = (
        alt.Chart(exact)
        .mark_rule(strokeDash=[4, 4])
        .encode(
            y="top1:Q", color="run:N", opacity=shown, tooltip=[alt.Tooltip("top1:Q", title="float32", format=".2%")]
        )
    )
    title = alt.Title(
        "One network, thirteen multipliers, nothing retrained",
        subtitle="Filled: the eight of AxMoE. Dashed line: the same network in float32.",
    )
    return (rule + points.add_params(pick) + labels).properties(width=520, height=340, title=title)


def learning_curve(history: list[dict], *, title: str) -> alt.Chart:
    """Training accuracy (on augmented images) and, where measured, test accuracy after each epoch.

    Args:
        history: what :func:`axmoe_lite.train.fit` returns.
        title: which data, how many images, which scale.
    """
    rows = [
        {"epoch": row["epoch"], "accuracy": row[f"{split}_accuracy"], "images": name}
        for row in history
        for split, name in (("train", "training, augmented"), ("test", "test"))
        if row[f"{split}_accuracy"] is not None
    ]
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("accuracy:Q", title="top-1 accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("images:N", title=None, legend=alt.Legend(orient="bottom")),
            tooltip=["epoch", "images", alt.Tooltip("accuracy:Q", format=".2%")],
        )
        .properties(width=480, height=220, title=title)
    )


STATES = {
    "not retrained": "as it was trained",
    "norms refreshed": "BatchNorm's averages taken anew, no weight trained",
    "other weights": "averages anew, and each weight stored as the circuit multiplies it best, none trained",
    "retrained": "retrained under the circuit: five epochs of 2,500 images",
}


def healing(rows: list[dict]) -> alt.LayerChart:
    """The book's front page: what each circuit leaves of one dense network, and what brings it back.

    Args:
        rows: of a study (:func:`axmoe_lite.study.run`), of one network and seed, dense; ``tuned_relu:`` circuits too.

    Raises:
        ValueError: for rows without evidence, or of several networks, topologies or seeds.
    """
    check_evidence(rows, "multiplier")
    for column in ("network", "topology", "seed", "dataset"):
        if len(found := sorted({str(row[column]) for row in rows})) != 1:
            raise ValueError(f"The front page shows one {column}; these rows have {', '.join(found) or 'none'}.")
    table = pd.DataFrame(rows)
    tuned = table["multiplier"].str.startswith("tuned_relu:")
    table = table[~tuned | (table["regime"] == "norms refreshed")]
    table["regime"] = table["regime"].mask(tuned, "other weights")
    table["multiplier"] = table["multiplier"].str.removeprefix("tuned_relu:")
    table = table.query("multiplier != 'float32' and regime in @STATES")
    table = table.astype({"top1": float, "power_mw": float})
    exact = table.query("multiplier == @EXACT and regime == 'not retrained'").iloc[0]
    table = table[table.multiplier != EXACT]
    table["power"] = table["power_mw"] / exact.power_mw
    table["state"] = table["regime"].map(STATES)
    table["circuit"] = table["multiplier"].str.replace("mul8s_1", "")
    ends = table.pivot_table(index=["circuit", "power"], columns="regime", values="top1").reset_index()
    there = [regime for regime in STATES if regime in ends]
    ends["top"], ends["low"] = ends[there].max(axis=1), ends[there].min(axis=1)
    states = list(STATES.values())
    x = alt.X(
        "power:Q",
        title="power of one multiplication, of the exact circuit's",
        axis=alt.Axis(format="%", values=[n / 10 for n in range(11)]),
        scale=alt.Scale(domain=[0, 1.03], nice=False),
    )
    percent = alt.Axis(format="%", values=[n / 10 for n in range(8)])
    y = alt.Y("top1:Q", title="top-1 accuracy", axis=percent, scale=alt.Scale(domain=[0, 0.75]))
    stems = alt.Chart(ends).mark_rule(color="#bbb", strokeWidth=2).encode(x=x, y=alt.Y("low:Q"), y2="top:Q")
    marks = (
        alt.Chart(table)
        .mark_point(size=85, filled=True, opacity=1)
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "state:N",
                title=None,
                sort=states,
                scale=alt.Scale(domain=states, range=[RED, BLUE, ORANGE, GREEN]),
                legend=alt.Legend(orient="bottom", columns=1, labelLimit=460),
            ),
            shape=alt.Shape(
                "state:N",
                title=None,
                sort=states,
                scale=alt.Scale(domain=states, range=["triangle-down", "circle", "triangle-up", "diamond"]),
            ),
            tooltip=["multiplier", "state", alt.Tooltip("top1:Q", format=".1%"), alt.Tooltip("power:Q", format=".0%")],
        )
    )
    # Circuits of nearly the same power stand on two steps.
    close = ends.sort_values("power")["power"].diff().abs().lt(0.04).reindex(ends.index)
    ends["lift"] = 0.035 * (close & (ends["power"].rank().astype(int) % 2 == 0))
    ends["label"] = ends["top"].clip(lower=0.02) + 0.03 + ends["lift"]
    labels = alt.Chart(ends).mark_text(fontSize=11).encode(x=x, y="label:Q", text="circuit:N")
    rule = alt.Chart(pd.DataFrame([{"top1": exact.top1}])).mark_rule(strokeDash=[4, 4], color=GREY).encode(y=y)
    n = int(exact.n_test)
    title = alt.Title(
        "What cheap multipliers break, and what brings it back",
        subtitle=[
            f"{exact.network} on {exact.dataset} ({n:,} test images, seed {exact.seed}) under {len(ends)} circuits.",
            f"Dashed: the exact circuit, {exact.top1:.0%}.",
        ],
    )
    return (rule + stems + marks + labels).properties(width=560, height=340, title=title)


def leans(rows: list[dict]) -> alt.LayerChart:
    """The mean error of a sum against the share of its channels that are negated, one line a circuit.

    Args:
        rows: ``multiplier``, ``negated`` (a share in [0, 1]) and ``lean``, in parts of the signal.

    >>> rows = [{"multiplier": "mul8s_1L2L", "negated": share, "lean": share - 0.5} for share in (0, 1)]
    >>> leans(rows).to_dict()["layer"][0]["mark"]["type"]
    'line'
    """
    table = pd.DataFrame(rows)
    table["circuit"] = table["multiplier"].str.removeprefix("mul8s_1")
    order = list(dict.fromkeys(table["circuit"]))
    colours = alt.Scale(domain=order, range=[RED, ORANGE, PURPLE, BLUE, GREEN, GREY][: len(order)])
    axes = {
        "x": alt.X("negated:Q", title="channels negated, with their weights", axis=alt.Axis(format="%")),
        "y": alt.Y("lean:Q", title="mean error, in parts of the signal"),
    }
    told = ["circuit", alt.Tooltip("negated:Q", format=".0%"), alt.Tooltip("lean:Q", format="+.2f")]
    base = alt.Chart(table).encode(**axes, color=alt.Color("circuit:N", scale=colours, legend=None), tooltip=told)
    names = base.transform_filter("datum.negated == 1").mark_text(align="left", dx=6, fontWeight="bold")
    rule = alt.Chart().mark_rule(strokeDash=[4, 4], color=GREY).encode(y=alt.datum(0))
    lines = base.mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=40))
    title = alt.Title(
        "How far does a sum lean, when some of its channels are negated?",
        subtitle="144 products; activations as behind ReLU (never negative), weights of both signs.",
    )
    return (lines + names.encode(text="circuit:N") + rule).properties(width=480, height=240, title=title)


def layer_errors(rows: list[dict]) -> alt.LayerChart:
    """The mean error of every layer under every circuit, one colour a network: a tick a layer, a dot their median.

    Buttons show the scatter around the mean error instead.

    Args:
        rows: of :func:`axmoe_lite.study.errors_by_layer`, with ``network`` and evidence.

    Raises:
        ValueError: for rows without evidence.
    """
    check_evidence(rows, "layer")
    table = pd.DataFrame(rows).astype({"shift": float, "scatter": float, "power_mw": float})
    table["of"] = table["network"] + ", " + table["dataset"]
    networks = list(dict.fromkeys(table["of"]))
    table = table[table["shift"] + table["scatter"] > 0]  # the exact circuit has none, and a logarithm no place for it
    power = table.groupby("multiplier")["power_mw"].first() / multiplier(EXACT).power_mw
    table["circuit"] = [f"{name.removeprefix('mul8s_1')}, {power[name]:.0%}" for name in table["multiplier"]]
    order = list(table.sort_values("power_mw", ascending=False)["circuit"].unique())
    table = table.melt(
        ["of", "circuit", "layer", "n_train", "seed", "epochs", "device", "commit"],
        ["shift", "scatter"],
        var_name="kind",
        value_name="error",
    )
    told = {"shift": "mean error", "scatter": "scatter around it"}
    table["kind"] = table["kind"].map(told)
    bound = alt.binding_radio(options=list(told.values()), name="show  ")
    kind = alt.param("errors_kind", value=told["shift"], bind=bound)
    base = alt.Chart(table[table["error"] > 0]).transform_filter("datum.kind == errors_kind")
    place = {
        "x": alt.X(
            "error:Q",
            scale=alt.Scale(type="log"),
            title="in parts of the layer's signal (log scale)",
            axis=alt.Axis(format="~%", values=[10.0**n for n in range(-5, 3)]),
        ),
        "y": alt.Y("circuit:N", sort=order, title=None, axis=alt.Axis(grid=True)),
        "yOffset": alt.YOffset("of:N", sort=networks),
        "color": alt.Color(
            "of:N",
            scale=alt.Scale(domain=networks, range=[BLUE, RED, GREEN, GREY][: len(networks)]),
            title=None,
            legend=alt.Legend(orient="top", labelLimit=260, columns=3),
        ),
    }
    ticks = base.mark_tick(thickness=1.5, size=7, opacity=0.5).encode(
        **place, tooltip=["of", "circuit", "layer", alt.Tooltip("error:Q", format=".1%"), "seed", "epochs", "commit"]
    )
    medians = (
        base.transform_aggregate(error="median(error)", groupby=["circuit", "of"])
        .mark_point(filled=True, size=70, opacity=1)
        .encode(**place, tooltip=["of", "circuit", alt.Tooltip("error:Q", format=".1%", title="median of the layers")])
    )
    title = alt.Title(
        "How far off is each layer, under the same circuit?",
        subtitle="Tick: a layer, against the exact product of the same bytes. Dot: their median. Percent: power.",
    )
    height = alt.Step(9 * len(networks) + 6, **{"for": "position"})
    return (ticks + medians).add_params(kind).properties(width=430, height=height, title=title)

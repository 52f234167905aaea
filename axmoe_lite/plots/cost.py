"""What an answer costs in each topology, and what accuracy it buys.

Chapter: 09, "What does accuracy cost?"
"""

from collections.abc import Iterable

import altair as alt
import pandas as pd

from axmoe_lite.models import TOPOLOGIES
from axmoe_lite.multipliers import EVOAPPROX, EXACT, multiplier
from axmoe_lite.plots.theme import BLUE, GREEN, ORANGE, RED, check_evidence

COLOURS = alt.Scale(domain=list(TOPOLOGIES), range=[BLUE, ORANGE, GREEN, RED])
SHAPES = alt.Scale(domain=list(TOPOLOGIES), range=["circle", "square", "triangle-up", "diamond"])
BOTH = "both"


def pareto(rows: list[dict], *, cost: str = "p_norm", value: str = "top1") -> list[dict]:
    """The rows that no other row dominates, from the cheapest to the dearest.

    A row is dominated if another costs no more, is worth no less, and differs from it in one of the two.

    Args:
        rows: as measured, or as text from :func:`axmoe_lite.runs.read`.
        cost, value: columns; of the one less is better, of the other more.

    >>> [row["top1"] for row in pareto([{"p_norm": c, "top1": t} for c, t in [(2, 0.9), (1, 0.8), (1, 0.7), (3, 0.9)]])]
    [0.8, 0.9]
    """
    places = [(float(row[cost]), -float(row[value])) for row in rows]
    kept = [
        n
        for n, (c, v) in enumerate(places)
        if not any(other_c <= c and other_v <= v and (other_c, other_v) != (c, v) for other_c, other_v in places)
    ]
    return [rows[n] for n in sorted(kept, key=lambda n: places[n])]


def executed_stored(rows: list[dict]) -> alt.HConcatChart:
    """Multiply-accumulates of each topology in parts of the dense network's, one panel a network.

    Args:
        rows: with ``network``, ``topology``, ``base`` (of the dense network), ``executed``, ``stored`` and
            ``parameters``, for one input.
    """
    table = pd.DataFrame(rows)
    for column in ("executed", "stored"):
        table[f"{column}_times"] = (table[column] / table["base"]).round(3)
        table[f"{column}_M"] = (table[column] / 1e6).round(2)
    table["parameters_M"] = (table["parameters"] / 1e6).round(2)
    top = float(table["stored_times"].max())
    kept = ["topology", "executed_times", "stored_times", "executed_M", "stored_M", "parameters_M"]
    tips = [alt.Tooltip(column, title=column.replace("_", " ").replace(" M", " (millions)")) for column in kept]
    panels = []
    for n, (network, part) in enumerate(table.groupby("network", sort=False)):
        base = alt.Chart(part[kept]).encode(
            x=alt.X("topology:N", sort=list(TOPOLOGIES), title=None, axis=alt.Axis(labelAngle=0, labelFontSize=11)),
            tooltip=tips,
        )
        axis = alt.Axis(labels=n == 0, ticks=n == 0, domain=n == 0, tickCount=5)
        scale = alt.Scale(domain=[0, top * 1.02], nice=False)
        title = "multiply-accumulates, dense network = 1" if n == 0 else None
        stored = base.mark_bar(filled=False, strokeWidth=1.6, size=28).encode(
            y=alt.Y("stored_times:Q", title=title, axis=axis, scale=scale),
            stroke=alt.Stroke("topology:N", scale=COLOURS, legend=None),
        )
        executed = base.mark_bar(size=28).encode(
            y=alt.Y("executed_times:Q", title=title, axis=axis, scale=scale),
            color=alt.Color("topology:N", scale=COLOURS, legend=None),
        )
        text = base.mark_text(dy=-8, fontSize=12, fontWeight="bold").encode(
            y=alt.Y("executed_times:Q", scale=scale), text=alt.Text("executed_times:Q", format=".2f")
        )
        heading = f"{network}: {part['base'].iloc[0] / 1e6:,.1f} M"
        panels.append(
            alt.layer(stored, executed, text).properties(
                width=152, height=230, title=alt.Title(heading, fontSize=13, fontWeight="normal")
            )
        )
    title = alt.Title(
        "What one image costs, and what there is",
        subtitle=[
            "Filled, with its number: executed. Outline: all that is stored, if every expert answered.",
            "Beside the name: millions of multiply-accumulates of the dense network.",
        ],
    )
    return alt.hconcat(*panels, spacing=8).properties(title=title)


def cost_explorer(rows: list[dict], *, start: str = "mul8s_1L2L") -> alt.HConcatChart:
    """Normalised cost of each topology, with a slider over the power of the multiplier.

    Args:
        rows: with ``network``, ``topology``, ``base``, ``executed`` and ``approximated_share``.
        start: the circuit at which the slider begins.
    """
    exact = multiplier(EXACT).power_mw
    percents = {name: 100 * multiplier(name).power_mw / exact for name in EVOAPPROX}
    near = [min(percents, key=lambda name: abs(percents[name] - p)) for p in range(101)]
    says = [
        f"{name.removeprefix('mul8s_1')} has {percents[name]:.0f} %"
        if abs(percents[name] - p) <= 1
        else "no circuit here"
        for p, name in enumerate(near)
    ]
    slider = alt.param(
        "power_percent",
        value=round(percents[start]),
        bind=alt.binding_range(min=0, max=100, step=1, name="power of the multiplier, % of the exact one  "),
    )
    table = pd.DataFrame(rows)
    table["cheap"] = (table["executed"] * table["approximated_share"] / table["base"]).round(4)
    table["exact"] = (table["executed"] * (1 - table["approximated_share"]) / table["base"]).round(4)
    top = float((table["cheap"] + table["exact"]).max()) * 1.08
    panels = []
    for n, (network, part) in enumerate(table.groupby("network", sort=False)):
        base = (
            alt.Chart(part[["topology", "cheap", "exact"]])
            .transform_calculate(approximate="datum.cheap*power_percent/100", total="datum.exact+datum.approximate")
            .encode(
                x=alt.X("topology:N", sort=list(TOPOLOGIES), title=None, axis=alt.Axis(labelAngle=0, labelFontSize=11)),
                tooltip=[
                    "topology:N",
                    alt.Tooltip("total:Q", title="P_norm", format=".3f"),
                    alt.Tooltip("approximate:Q", title="of it approximate", format=".3f"),
                    alt.Tooltip("exact:Q", title="of it exact", format=".3f"),
                ],
            )
        )
        axis = alt.Axis(labels=n == 0, ticks=n == 0, domain=n == 0, tickCount=5)
        y = {"scale": alt.Scale(domain=[0, top], nice=False), "axis": axis}
        title = "P_norm" if n == 0 else None
        whole = base.mark_bar(size=28).encode(
            y=alt.Y("total:Q", title=title, **y),
            color=alt.Color("topology:N", scale=COLOURS, legend=None),
        )
        fixed = base.mark_bar(size=28, color="#333").encode(y=alt.Y("exact:Q", title=title, **y))
        text = base.mark_text(dy=-8, fontSize=12, fontWeight="bold").encode(
            y=alt.Y("total:Q", **y), text=alt.Text("total:Q", format=".2f")
        )
        one = alt.Chart(pd.DataFrame({"y": [1]})).mark_rule(strokeDash=[4, 4]).encode(y=alt.Y("y:Q", **y))
        halo = base.mark_text(dy=-8, fontSize=12, fontWeight="bold", stroke="white", strokeWidth=4).encode(
            y=alt.Y("total:Q", **y), text=alt.Text("total:Q", format=".2f")
        )
        layers = [whole, fixed, one, halo, text]
        if n == 0:
            names = "[" + ",".join(f"'{text}'" for text in says) + "]"
            layers.append(
                alt.Chart(pd.DataFrame({"n": [0]}))
                .transform_calculate(text=f"{names}[power_percent]")
                .mark_text(align="left", baseline="top", fontSize=12, fontWeight="bold")
                .encode(x=alt.value(4), y=alt.value(0), text="text:N")
            )
        panels.append(
            alt.layer(*layers).properties(
                width=152, height=230, title=alt.Title(network, fontSize=13, fontWeight="normal")
            )
        )
    title = alt.Title(
        "What does a cheaper multiplier make cheaper?",
        subtitle="Coloured: approximate products. Dark: products that stay exact. Dashed: the dense network, exact.",
    )
    return alt.hconcat(*panels, spacing=8).add_params(slider).properties(title=title)


def accuracy_cost(rows: list[dict]) -> alt.LayerChart:
    """Top-1 against normalised cost; buttons pick the regime, the legend a topology; the line is the Pareto front.

    A point is the mean over its seeds, so that the front is not that of the luckiest one.

    Rows of ``"float32"``, which no circuit multiplies, are left out.

    Args:
        rows: of :func:`axmoe_lite.study.measure` with ``network``, ``topology`` and evidence.

    Raises:
        ValueError: for no rows, or rows without evidence: a number without its origin is not drawn.
    """
    check_evidence(rows, "multiplier")
    rows = _over_seeds(row for row in rows if row["multiplier"] != "float32")
    if not rows:
        raise ValueError("accuracy_cost() was given no row of a circuit; there is nothing to draw.")
    regimes = list(dict.fromkeys(row["regime"] for row in rows))
    cheapest, dearest = (f(row["p_norm"] for row in rows) for f in (min, max))
    top = max(row["top1"] for row in rows) + 0.06  # for a label
    fronts = []
    for choice in [BOTH, *regimes]:
        front = pareto([row for row in rows if choice in (BOTH, row["regime"])])
        last = {"p_norm": 1e-9, "top1": 0.0}
        for row in front:
            near = row["p_norm"] < 1.13 * last["p_norm"] and row["top1"] < last["top1"] + 0.05
            last = last if near else row  # a name where there is room for it; the hover has the others
            circuit = "" if near else row["multiplier"].replace("mul8s_1", "")
            fronts.append({"regimes": choice, "circuit": circuit, **_place(row)})
        fronts.append({"regimes": choice, "circuit": "", **_place(front[-1]), "p_norm": dearest})
    found: dict[str, set[str]] = {}
    for r in rows:
        told = f"{r['network']}, {r['dataset']}, {r['n_test']} test images ({r['scale']})"
        found.setdefault(told, set()).update(r["seed"].split(", "))
    runs = [f"{told}, seed{'s' * (len(seeds) > 1)} {', '.join(sorted(seeds))}" for told, seeds in found.items()]
    kept = ["topology", "multiplier", "regime", "p_norm", "top1", "network", "dataset", "n_test", "seed", "epochs"]
    kept += ["device", "commit"]
    table = pd.DataFrame(rows)[kept]
    buttons = alt.param("shown_regime", value=BOTH, bind=alt.binding_radio(options=[BOTH, *regimes], name="regime:  "))
    pick = alt.selection_point(fields=["topology"], bind="legend")
    x = alt.X(
        "p_norm:Q",
        title="P_norm (dense network with the exact multiplier = 1)",
        scale=alt.Scale(type="log", nice=False, domain=[min(0.44, cheapest / 1.1), max(1.2, dearest * 1.1)]),
        axis=alt.Axis(values=[0.125, 0.25, 0.5, 1, 2, 4, 8], format="~g", grid=True),
    )
    y = alt.Y("top1:Q", title="top-1 accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, top], nice=False))
    evidence = ["multiplier", "network", "dataset", "n_test", "seed", "epochs", "device", "commit"]
    points = (
        alt.Chart(table)
        .transform_filter(f"shown_regime=='{BOTH}'||datum.regime==shown_regime")
        .mark_point(size=75, strokeWidth=1.8)
        .encode(
            x=x,
            y=y,
            color=alt.Color("topology:N", scale=COLOURS, title="topology", legend=alt.Legend(symbolStrokeWidth=2)),
            shape=alt.Shape("topology:N", scale=SHAPES),
            fill=alt.Fill("topology:N", scale=COLOURS, legend=None),
            fillOpacity=alt.condition("datum.regime=='retrained'", alt.value(1), alt.value(0)),
            opacity=alt.condition(pick, alt.value(1), alt.value(0.1)),
            tooltip=["topology", "regime", alt.Tooltip("top1:Q", format=".2%"), "p_norm", *evidence],
        )
        .add_params(pick)
    )
    front = alt.Chart(pd.DataFrame(fronts)).transform_filter("datum.regimes==shown_regime")
    line = front.mark_line(interpolate="step-after", color="#555", strokeWidth=1.4).encode(x=x, y=y)
    names = front.mark_text(dy=-11, dx=5, fontSize=11, align="left", color="#333").encode(x=x, y=y, text="circuit:N")
    title = alt.Title(
        "Which points does no other beat?",
        subtitle=[*runs, "Hollow: not retrained. Filled: retrained. Line: the Pareto front of what is shown."],
    )
    return alt.layer(line, points, names).add_params(buttons).properties(width=520, height=330, title=title)


_ALIKE = ("network", "topology", "experts", "multiplier", "regime", "dataset", "n_test", "epochs", "retrain_images")


def _over_seeds(rows: Iterable[dict]) -> list[dict]:
    """The mean over seeds of what is alike but for the seed."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        row = {**row, "p_norm": round(float(row["p_norm"]), 4), "top1": float(row["top1"]), "seed": str(row["seed"])}
        groups.setdefault(tuple(str(row.get(name)) for name in _ALIKE), []).append(row)
    return [
        {
            **part[0],
            **{name: sum(row[name] for row in part) / len(part) for name in ("p_norm", "top1")},
            "seed": ", ".join(sorted({row["seed"] for row in part})),
            "commit": ", ".join(dict.fromkeys(str(row["commit"]) for row in part)),
        }
        for part in groups.values()
    ]


def _place(row: dict) -> dict:
    return {"p_norm": row["p_norm"], "top1": row["top1"]}

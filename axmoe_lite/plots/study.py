"""The whole study in five figures: several networks, topologies, seeds and regimes in one list of rows.

    resilience_curves   how far accuracy falls as the multiplier gets cheaper
    recovery            what comes back, and by which means
    fronts              what accuracy each cost buys
    heat_map            how many points each multiplier costs in each topology
    coverage_chart      what has been run, and what is empty

A row is what :func:`axmoe_lite.study.measure` yields, with the network, the topology and the evidence; numbers or
their text. A cell that no row fills stays empty and is named as not run. Rows of several settings are never averaged:
networks of other data or epochs, and other lengths of retraining, get names of their own in the menus.

Chapter: 11, "Does the paper hold?"
"""

import math
from collections.abc import Iterable, Sequence

import altair as alt
import pandas as pd

from axmoe_lite.models import TOPOLOGIES
from axmoe_lite.multipliers import EVOAPPROX, EXACT, PAPER_EIGHT
from axmoe_lite.plots.cost import COLOURS, SHAPES, pareto
from axmoe_lite.plots.study_rows import (
    TOLD,
    check_known,
    gaps,
    in_words,
    listed,
    networks_of,
    not_run,
    regimes_of,
    short,
    spread,
    summed,
    to_table,
    with_gaps,
)
from axmoe_lite.plots.theme import BLUE, SKY
from axmoe_lite.study import NETWORKS, REGIMES, regimes_for

ALL = "all"
_SHADES = dict(zip(TOPOLOGIES, COLOURS.range, strict=True))
_MARKS = dict(zip(REGIMES, ("circle", "diamond", "square", "circle"), strict=True))
_WIDTH, _HEIGHT = 490, 300  # with axis and legend as wide as a page of the book


def resilience_curves(rows: list[dict]) -> alt.LayerChart:
    """Top-1 against the power of the multiplier, the cheapest on the left; one line a topology.

    Menus pick the network and the regime, the legend a topology. Lines are means over seeds, strokes the seeds, dashed
    lines float32. A line has a gap where a multiplier was not run.

    Args:
        rows: of any networks, topologies, seeds and regimes, with evidence; see the top of this file.

    Raises:
        ValueError: for no rows of a multiplier; a row without evidence, twice the same, or with a topology, regime or
            top-1 that cannot be; or two settings (experts, their share, their epochs) of one network and topology.
    """
    table = to_table(rows, "resilience_curves")
    circuits = table[table.multiplier != "float32"]
    seeds, means, told = summed(table, "power")
    menus, shown = _menus(circuits, "resilience")
    powers = circuits.groupby("multiplier")["power"].first().sort_values()
    low, high = powers.min() - 3, powers.max() + 1.5
    axis = alt.Axis(values=powers.tolist(), labels=False, tickSize=4, titlePadding=44)
    title = "multiplier, and its power in % of the exact one (KV6)"
    x = alt.X("power:Q", title=title, scale=alt.Scale(domain=[low, high], nice=False), axis=axis)
    zero = alt.param("resilience_zero", value=False, bind=alt.binding_checkbox(name="accuracy from 0 %  "))
    pick = alt.selection_point(name="resilience_topology", fields=["topology"], bind="legend")

    look = {
        "y": _accuracy(zero=alt.ExprRef("resilience_zero")),
        "color": alt.Color("topology:N", scale=COLOURS, title="topology"),
        "opacity": alt.condition(pick, alt.value(1), alt.value(0.06)),
    }

    def layer(frame: pd.DataFrame, *more: str, where: str = shown) -> alt.Chart:
        chart = _with_origin(alt.Chart(frame).transform_filter(where), told)
        return chart.encode(**look, tooltip=_tips("power", *more))

    of_circuits = means[means.multiplier != "float32"]
    exact = layer(means[means.multiplier == "float32"], "spread", where=shown.split("&&")[0])
    exact = exact.mark_rule(strokeDash=[5, 4]).add_params(pick)  # only the first layer's legend can be clicked
    lines = alt.Chart(with_gaps(of_circuits)).transform_filter(shown).encode(**look)
    lines = lines.mark_line(strokeWidth=2.2, invalid="break-paths-filter-domains")
    dots = layer(seeds[seeds.multiplier != "float32"]).mark_tick(orient="horizontal", thickness=1, size=13)
    marks = layer(of_circuits, "spread").mark_point(size=48, filled=True)
    shape = alt.Shape("topology:N", scale=SHAPES, title="topology")
    names = pd.DataFrame({"power": powers, "name": [f"{short(n)}|{p:.0f} %" for n, p in powers.items()]})
    names["place"] = spread(powers.tolist(), 34 * (high - low) / _WIDTH)
    labels = _names(names, x, alt.value(_HEIGHT), rim=_HEIGHT + 14, shown="true")
    heading = _title(
        "'Accuracy as the multiplier gets cheaper: '+resilience_network+', '+resilience_regime",
        "Line: mean over seeds. Strokes: the seeds. Dashed: float32. A gap in a line: not run. Click on the legend.",
    )
    layers = [exact, lines.encode(x=x), dots.encode(x=x), marks.encode(x=x, shape=shape), *labels]
    chart = alt.layer(*layers, _note(gaps(circuits), shown)).add_params(*menus, zero)
    return chart.properties(width=_WIDTH, height=_HEIGHT, title=heading)


def recovery(rows: list[dict]) -> alt.VConcatChart:
    """Top-1 under each multiplier before and after, one panel a topology; the cheapest multiplier is at the bottom.

    A menu picks the network, a click on the key a regime. Marks are means over seeds, thin strokes the seeds; the grey
    line joins what one network reaches. Dashed: the exact multiplier, not retrained.

    Args:
        rows: see :func:`resilience_curves`; those of float32 are left out.

    Raises:
        ValueError: as :func:`resilience_curves`.
    """
    table = to_table(rows, "recovery", float32=False)
    seeds, means, told = summed(table)
    menu, shown = _menus(table, "recovery", regime=False)
    powers = table.groupby("multiplier")["power"].first().sort_values(ascending=False)
    labels = {name: f"{short(name)}, {power:.0f} %" for name, power in powers.items()}
    empty = not_run(table, list(labels))
    for frame in (seeds, means, empty):
        frame["label"] = frame["multiplier"].map(labels)
    shapes = _shapes(table)
    means["mark"] = means["regime"].map(shapes)
    means = means.iloc[::-1]  # what is hollow, the first regime, is drawn last
    ways = means.groupby(["network", "topology", "label"], sort=False, as_index=False)
    ways = ways.agg(low=("top1", "min"), high=("top1", "max"))
    goals = means[(means.multiplier == EXACT) & (means.regime == REGIMES[0])]
    pick = alt.selection_point(name="recovery_regime", fields=["regime"])
    faded = alt.condition(pick, alt.value(1), alt.value(0.06))
    axis = {"title": "top-1 accuracy", "axis": alt.Axis(format="%", tickCount=4)}
    axis["scale"] = alt.Scale(domain=[0, min(1, 1.05 * table["top1"].max())], nice=False)
    x, scale = alt.X("top1:Q", **axis), alt.Scale(domain=list(labels.values()))
    panels, tips = [], _tips("spread")
    for n, (topology, shade) in enumerate(_SHADES.items()):
        beside = alt.Axis(labels=n == 0, ticks=False, domain=False, labelPadding=8)
        y = alt.Y("label:N", title=None, scale=scale, axis=beside)
        goal, *others = (
            alt.Chart(frame).transform_filter(f"{shown}&&datum.topology=='{topology}'")
            for frame in (goals, ways, seeds, means, empty)
        )
        way, dots, marks, none = (chart.encode(y=y) for chart in others)
        dots = _with_origin(dots, told)
        fill = alt.condition(f"datum.regime=='{REGIMES[0]}'", alt.value("white"), alt.value(shade))
        marks = _with_origin(marks, told).mark_point(size=75, strokeWidth=1.7, color=shade)
        panel = alt.layer(
            goal.mark_rule(strokeDash=[5, 4], color="#555").encode(x=x),
            way.mark_rule(color="#c8c8c8", strokeWidth=2).encode(x=alt.X("low:Q", **axis), x2="high:Q"),
            dots.mark_tick(thickness=1, size=10, color=shade).encode(x=x, opacity=faded, tooltip=_tips()),
            marks.encode(x=x, fill=fill, opacity=faded, shape=alt.Shape("mark:N", scale=None), tooltip=tips),
            none.mark_text(align="left", fontSize=10, color="#999").encode(x=alt.value(3), text=alt.value("not run")),
        )
        panels.append(panel.properties(width=124, height=alt.Step(25), title=_heading(topology, shade)))
    title = _title(
        "'What comes back, and by which means? '+recovery_network",
        "Marks: means over seeds. Strokes: the seeds. Dashed: the exact multiplier, not retrained. Percent: power.",
    )
    chart = alt.vconcat(_key(shapes, pick), alt.hconcat(*panels, spacing=10), spacing=4)
    return chart.add_params(*menu).properties(title=title)


def fronts(rows: list[dict]) -> alt.LayerChart:
    """Top-1 against normalised cost, with the Pareto front of the network and regime that menus pick.

    Marks are means over seeds, strokes the seeds. The front is of the means, see :func:`axmoe_lite.plots.pareto`: the
    best of several seeds would flatter what was run most often. Its multipliers are named in their topologies' colours.

    Args:
        rows: see :func:`resilience_curves`; those of float32 are left out, since no circuit multiplies there.

    Raises:
        ValueError: as :func:`resilience_curves`.
    """
    table = to_table(rows, "fronts", float32=False)
    seeds, means, told = summed(table, "p_norm")
    menus, shown = _menus(table, "fronts")
    low, high = table["p_norm"].min() / 1.1, max(1.2, table["p_norm"].max() * 1.1)
    axis = alt.Axis(values=[0.125, 0.25, 0.5, 1, 2, 4, 8], format="~g", grid=True)
    title = "P_norm (dense network with the exact multiplier = 1)"
    x = alt.X("p_norm:Q", title=title, axis=axis, scale=alt.Scale(type="log", domain=[low, high], nice=False))
    y = _accuracy(zero=False)
    steps, names = [], []
    for _, part in means.groupby(["network", "regime"], sort=False):
        front = [{**row, "name": short(row["multiplier"])} for row in pareto(part.to_dict("records"))]
        steps += [*front, {**front[-1], "p_norm": part["p_norm"].max()}]  # whatever costs more is worth no more
        places = spread([math.log(row["p_norm"]) for row in front], 30 * math.log(high / low) / _WIDTH)
        names += [{**row, "place": round(math.exp(p), 4)} for row, p in zip(front, places, strict=True)]
    steps, names = (pd.DataFrame(n) for n in (steps, names))
    steps = steps[["network", "regime", "p_norm", "top1"]]
    names = names[["network", "regime", "topology", "name", "p_norm", "place", "top1"]]
    pick = alt.selection_point(name="fronts_topology", fields=["topology"], bind="legend")

    def layer(frame: pd.DataFrame, *more: str) -> alt.Chart:
        return _with_origin(alt.Chart(frame).transform_filter(shown), told).encode(
            x=x,
            y=y,
            color=alt.Color("topology:N", scale=COLOURS, title="topology"),
            opacity=alt.condition(pick, alt.value(1), alt.value(0.06)),
            tooltip=_tips("p_norm", *more),
        )

    line = alt.Chart(steps).transform_filter(shown).mark_line(interpolate="step-after", color="#555", strokeWidth=1.4)
    dots = layer(seeds).mark_tick(orient="horizontal", thickness=1, size=13).add_params(pick)  # see above
    marks = layer(means, "spread").mark_point(size=70, filled=True)
    marks = marks.encode(shape=alt.Shape("topology:N", scale=SHAPES, title="topology"))
    heading = _title(
        "'What accuracy does each cost buy? '+fronts_network+', '+fronts_regime",
        "Marks: means over seeds. Strokes: the seeds. Line: the Pareto front of the means; above it, what is on it.",
    )
    labels = _names(names, x, y, rim=-4, shown=shown)
    chart = alt.layer(line.encode(x=x, y=y), dots, marks, *labels, _note(gaps(table), shown, y=-28))
    return chart.add_params(*menus).properties(width=_WIDTH, height=_HEIGHT, title=heading)


def heat_map(rows: list[dict], *, value: str = "lost") -> alt.LayerChart:
    """Topology by multiplier, the cheapest on the left: points lost against the exact multiplier, or top-1.

    What is lost is the mean over seeds of the differences to the exact multiplier in the same network, topology, seed
    and regime. Its own column says what it reached. A cell whose exact row is missing says its accuracy, uncoloured.

    Args:
        rows: see :func:`resilience_curves`; those of float32 are left out.
        value: ``"lost"`` (points) or ``"top1"``.

    Raises:
        ValueError: as :func:`resilience_curves`, or for another ``value``.
    """
    check_known("value", [value], ("lost", "top1"))
    table = to_table(rows, "heat_map", float32=False)
    _, means, told = summed(table, "lost")
    menus, shown = _menus(table, "heat")
    percent, points = (100 * means.top1).map("{:.1f} %".format), (means.lost.round(1) + 0.0).map("{:.1f}".format)
    compared = means.lost.notna() & (value == "lost") & (means.multiplier != EXACT)
    means["text"] = points.where(compared, percent)
    means["shade"] = means.lost.where(compared) if value == "lost" else 100 * means.top1
    means["loss"] = [f"{p:.2f}, n = {n}" if n else "no exact row" for p, n in zip(means.lost, means.pairs, strict=True)]
    powers = table.groupby("multiplier")["power"].first().sort_values()
    names = [short(name) for name in powers.index]
    top = max(10.0, means.shade.max())
    grid = pd.DataFrame([{"topology": t, "short": n} for t in TOPOLOGIES for n in names])
    means["short"] = means["multiplier"].map(short)
    x = alt.X("short:N", title="multiplier, the cheapest on the left", sort=names, axis=alt.Axis(labelAngle=0))
    y = alt.Y("topology:N", title=None, sort=list(TOPOLOGIES), axis=alt.Axis(labelFontSize=13))
    scale = alt.Scale(domain=[0, top], range=["#eaf1f8", BLUE])
    what, says, legend = "What does each multiplier reach? ", "Top-1, mean over seeds.", "top-1, %"
    if value == "lost":
        scale = alt.Scale(domain=[-5, 0, 5, top], range=[SKY, "#ffffff", "#fbdcae", "#a84300"], interpolate="rgb")
        what, legend = "What does each multiplier cost? ", "points lost"
        says = "Top-1 points below the exact multiplier KV6 in the same regime. With %: the top-1 itself."
    legend = alt.Legend(title=legend, gradientLength=130)
    nothing = alt.Chart(grid).encode(x=x, y=y)
    cells = _with_origin(alt.Chart(means).transform_filter(shown), told).encode(
        x=x, y=y, tooltip=_tips("loss", "spread")
    )
    colour = alt.condition("datum.shade!=null", alt.Color("shade:Q", scale=scale, legend=legend), alt.value("white"))
    dark = alt.condition(f"abs(datum.shade)>{0.6 * top:.1f}", alt.value("white"), alt.value("#222"))
    chart = alt.layer(
        nothing.mark_rect(fill="#f3f3f3", stroke="#ccc", strokeDash=[3, 3]),
        nothing.mark_text(fontSize=10, color="#aaa").encode(text=alt.value("not run")),
        cells.mark_rect(stroke="#bbb", invalid=None).encode(color=colour),
        cells.mark_text(fontSize=11).encode(text="text:N", color=dark),
    )
    heading = _title(f"'{what}'+heat_network+', '+heat_regime", says)
    return chart.add_params(*menus).properties(width=alt.Step(42), height=alt.Step(40), title=heading)


def coverage_chart(
    rows: list[dict],
    *,
    networks: Iterable[str] = (),
    multipliers: Sequence[str] = tuple(PAPER_EIGHT),
    regimes: Sequence[str] = REGIMES,
    seeds: Sequence[int] | None = None,
) -> alt.LayerChart:
    """Network by topology: how many of the wanted cells (multipliers times regimes times seeds) have a row.

    Buttons pick one regime or all. The hover names what is missing.

    Args:
        rows: see :func:`resilience_curves`.
        networks: wanted beside those in the rows, such as ``"vit_small"``.
        multipliers, regimes: wanted.
        seeds: wanted. None: all that any row has.

    Raises:
        ValueError: as :func:`resilience_curves`, or for a name or regime that does not exist.
    """
    table = to_table(rows, "coverage_chart", float32=False)
    check_known("network", networks, NETWORKS)
    check_known("regime", regimes, REGIMES)
    check_known("multiplier", multipliers, [*EVOAPPROX, *table["multiplier"]])
    seeds = sorted(set(table["seed"])) if seeds is None else list(seeds)
    if not (multipliers and regimes and seeds):
        raise ValueError("coverage_chart() was asked for no multiplier, regime or seed; name at least one of each.")
    run = set(zip(table.network, table.topology, table.multiplier, table.kind, table.seed, strict=True))
    have = networks_of(table)
    names = [*have, *(name for name in networks if name not in have.values())]
    cells = []
    for network, topology, choice in ((n, t, c) for n in names for t in TOPOLOGIES for c in (ALL, *regimes)):
        possible = [r for r in regimes if choice in (ALL, r) and r in regimes_for(have.get(network, network))]
        wanted = [(m, r, s) for r in possible for m in multipliers for s in seeds]
        open_ = [cell for cell in wanted if (network, topology, *cell) not in run]
        done = len(wanted) - len(open_)
        place = {"network": network, "topology": topology, "choice": choice, "done": done, "of": len(wanted)}
        cells.append({**place, "share": round(done / max(1, len(wanted)), 3), "missing": in_words(open_)})
    buttons = alt.param("coverage_regime", value=ALL, bind=alt.binding_radio(options=[ALL, *regimes], name="regime  "))
    base = (
        alt.Chart(pd.DataFrame(cells))
        .transform_filter("datum.choice==coverage_regime")
        .encode(
            x=alt.X("topology:N", title=None, sort=list(TOPOLOGIES), axis=alt.Axis(labelAngle=0, orient="top")),
            y=alt.Y("network:N", title=None, sort=names, axis=alt.Axis(labelLimit=260)),
            tooltip=["network", "topology", alt.Tooltip("choice", title="regime"), "done", "of", "missing"],
        )
    )
    scale = alt.Scale(domain=[0, 1], range=["#dfeaf4", BLUE])
    colour = alt.Color("share:Q", scale=scale, legend=None)
    some = base.transform_filter("datum.done>0")
    dark = alt.condition("datum.share>0.6", alt.value("white"), alt.value("#222"))
    layers = [
        base.mark_rect(fill="#f3f3f3", stroke="#ccc", strokeDash=[3, 3]),
        some.mark_rect(stroke="white").encode(color=colour),
        some.transform_calculate(text="datum.done+' of '+datum.of").mark_text().encode(text="text:N", color=dark),
        base.transform_filter("datum.done==0")
        .transform_calculate(text="datum.of==0?'no BatchNorm':'not run'")
        .mark_text(color="#999", fontSize=11)
        .encode(text="text:N"),
    ]
    of = f"Wanted: {len(multipliers)} multipliers, {len(regimes)} regimes, seeds {listed(seeds)}."
    heading = alt.Title("What has been run, and what is empty?", subtitle=of, offset=8)
    return alt.layer(*layers).add_params(buttons).properties(width=alt.Step(92), height=alt.Step(34), title=heading)


# ------------------------------------------------------------------------- what figures share


def _menus(table: pd.DataFrame, chart: str, *, regime: bool = True) -> tuple[list[alt.Parameter], str]:
    """A menu of the networks and buttons of the regimes, where there are several; and the filter they make."""
    networks, regimes = list(networks_of(table)), list(regimes_of(table))
    bound = {"bind": alt.binding_select(options=networks, name="network  ")} if len(networks) > 1 else {}
    menus, shown = [alt.param(f"{chart}_network", value=networks[0], **bound)], f"datum.network=={chart}_network"
    if regime:
        bound = {"bind": alt.binding_radio(options=regimes, name="regime  ")} if len(regimes) > 1 else {}
        menus.append(alt.param(f"{chart}_regime", value=regimes[0], **bound))
        shown += f"&&datum.regime=={chart}_regime"
    return menus, shown


def _shapes(table: pd.DataFrame) -> dict[str, str]:
    """A mark for each regime; other lengths of retraining get the spare ones."""
    spare = iter(("triangle-up", "triangle-down", "cross", "triangle-left", "triangle-right", *99 * ["stroke"]))
    shapes: dict[str, str] = {}
    kinds: list[str] = []
    for regime, kind in regimes_of(table).items():
        shapes[regime] = next(spare) if kind in kinds else _MARKS[kind]
        kinds.append(kind)
    return shapes


def _with_origin(chart: alt.Chart, told: pd.DataFrame) -> alt.Chart:
    """The evidence stands once in the page, not in each of hundreds of rows."""
    return chart.transform_lookup(lookup="origin", from_=alt.LookupData(data=told, key="origin", fields=TOLD))


def _tips(*more: str) -> list[alt.Tooltip]:
    """The place of a number, the number, and where it comes from."""
    titles = {"power": "power, %", "p_norm": "P_norm", "loss": "points lost", "spread": "seeds reach"}
    return [
        *(alt.Tooltip(f"{name}:N") for name in ("topology", "multiplier", "regime")),
        alt.Tooltip("top1:Q", title="top-1", format=".2%"),
        *(alt.Tooltip(f"{name}:N", title=titles[name]) for name in more),
        *(alt.Tooltip(f"{name}:N", title=title) for name, title in (("n", "n"), ("seeds", "seed"))),
        *(alt.Tooltip(f"{name}:N", title=name.replace("_", " ")) for name in TOLD),
    ]


def _accuracy(*, zero: bool | alt.ExprRef) -> alt.Y:
    scale = alt.Scale(zero=zero, nice=False, padding=8)
    return alt.Y("top1:Q", title="top-1 accuracy", axis=alt.Axis(format="%", tickCount=8), scale=scale)


def _title(text: str, subtitle: str, *, room: int = 6) -> alt.Title:
    return alt.Title(alt.ExprRef(text), subtitle=subtitle, offset=room)


def _heading(topology: str, shade: str) -> alt.Title:
    return alt.Title(topology, fontSize=13, color=shade, anchor="middle")


def _note(notes: pd.DataFrame, shown: str, *, y: int = -8) -> alt.Chart:
    base = alt.Chart(notes).transform_filter(shown).mark_text(align="left", fontSize=11, fontStyle="italic")
    return base.encode(x=alt.value(0), y=alt.value(y), text="note:N", color=alt.value("#a33"))


def _names(names: pd.DataFrame, x: alt.X, y: alt.Y | alt.YValue, *, rim: int, shown: str) -> list[alt.Chart]:
    """Names side by side on the rim, outside the plot, each with a thin line to its place inside."""
    axis = {name: x[name] for name in ("title", "scale", "axis")}
    below, base = rim > 0, alt.Chart(names).transform_filter(shown)
    colour = alt.Color("topology:N", scale=COLOURS) if "topology" in names else alt.value("#555")
    lead = base.mark_rule(strokeWidth=0.8, opacity=0.45).encode(x=x, x2="place:Q", y=y, y2=alt.value(rim), color=colour)
    text = base.mark_text(fontSize=11, lineBreak="|", baseline="top" if below else "bottom", dy=3 if below else -2)
    return [lead, text.encode(x=alt.X("place:Q", **axis), y=alt.value(rim), text="name:N", color=colour)]


def _key(shapes: dict[str, str], pick: alt.Parameter) -> alt.LayerChart:
    """Which mark is which regime; a click singles one out."""
    key = pd.DataFrame([{"n": n, "regime": name, "mark": mark} for n, (name, mark) in enumerate(shapes.items())])
    faded = alt.condition(pick, alt.value(1), alt.value(0.25))
    base = alt.Chart(key).encode(x=alt.X("n:O", axis=None), y=alt.value(10), opacity=faded)
    fill = alt.condition(f"datum.regime=='{REGIMES[0]}'", alt.value("white"), alt.value("#555"))
    marks = base.mark_point(size=75, strokeWidth=1.7, color="#555").encode(
        shape=alt.Shape("mark:N", scale=None), fill=fill
    )
    texts = base.mark_text(align="left", dx=10, fontSize=12).encode(text="regime:N")
    return alt.layer(marks.add_params(pick), texts).properties(width=alt.Step(9 * max(map(len, shapes))), height=20)

"""Who works when, and where: parts on core types, what energy buys, and images that step through stages.

Chapters: 18, "Which core for which layer?", and 19, "Where should an expert live?".
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from axmoe_lite import cost
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.multipliers.catalogue import power_of
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, check_evidence
from axmoe_lite.search.places import Placed
from axmoe_lite.search.stream import Streamed

_COLOURS = [BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY]
_TOLD = ["n_test", "n_validation", "seed", "epochs", "regime", "harm", "commit", "date", "device"]


def gantt(
    spans: Iterable[tuple],
    *,
    title: str = "",
    lane: str = "stage",
    unit: str = "ms",
    steps: int = 60,
) -> alt.LayerChart:
    """Lanes of work: a bar for each image in each lane. A slider moves time on; what has not begun is not drawn yet.

    Args:
        spans: (image, lane, start, end) with times in seconds, or with a fifth entry: what was done, for the hover.
        lane: what a lane is, for its axis: ``"stage"``, ``"core type"``.
        unit: ``"s"``, ``"ms"`` or ``"us"``: in which times are written.
        steps: of the slider.

    Raises:
        ValueError: for no spans, or another unit.
    """
    factors = {"s": 1.0, "ms": 1e3, "us": 1e6}
    if unit not in factors:
        raise ValueError(f"unit is {unit!r}; there are {', '.join(factors)}.")
    columns = ["image", "lane", "start", "end", "what"]
    table = pd.DataFrame([dict(zip(columns, span, strict=False)) for span in spans])
    if table.empty:
        raise ValueError("gantt() was given no spans: (image, lane, start, end) of each piece of work.")
    table[["start", "end"]] = (table[["start", "end"]] - table["start"].min()) * factors[unit]
    table["kind"] = [f"{image % len(_COLOURS)}" for image in table["image"]]
    last = float(table["end"].max())
    step = float(f"{last / steps:.0e}")  # one digit, so that the slider shows a time that can be read
    end = float(f"{math.ceil(last / step) * step:.6g}")
    now = alt.param(name="now", value=end, bind=alt.binding_range(min=0, max=end, step=step, name=f"time, {unit} "))
    shades = alt.Scale(domain=[str(i) for i in range(len(_COLOURS))], range=_COLOURS)
    lanes = list(dict.fromkeys(table["lane"]))
    x = alt.X("start:Q", title=f"time, {unit}", scale=alt.Scale(domain=[0, last], nice=False))
    y = alt.Y("lane:N", title=lane, sort=lanes)
    begun = alt.Chart(table).transform_filter("datum.start <= now").transform_calculate(until="min(datum.end, now)")
    bars = begun.mark_bar(stroke="white", strokeWidth=0.5).encode(
        x=x,
        x2="until:Q",
        y=y,
        color=alt.Color("kind:N", legend=None, scale=shades),
        tooltip=[
            "image",
            *(["what"] if "what" in table else []),
            alt.Tooltip("lane:N", title=lane),
            alt.Tooltip("start:Q", title=f"start, {unit}", format=".4g"),
            alt.Tooltip("end:Q", title=f"end, {unit}", format=".4g"),
        ],
    )
    wide = last / 40  # a narrower bar has no room for its number
    numbers = (
        begun.transform_filter(f"datum.until - datum.start > {wide}")
        .transform_calculate(middle="(datum.start + datum.until) / 2")
        .mark_text(color="white", fontSize=10)
        .encode(x="middle:Q", y=y, text="image:N")
    )
    rule = alt.Chart(pd.DataFrame([{}])).mark_rule(color="#333").transform_calculate(at="now").encode(x="at:Q")
    return (
        alt.layer(bars, numbers, rule)
        .add_params(now)
        .properties(width=560, height=alt.Step(34), title=alt.Title(title or " ", subtitle="A number is an image."))
    )


def places_map(
    placed: Placed, parts: Mapping[str, Sequence[str]], macs: cost.Macs, *, title: str = ""
) -> alt.LayerChart:
    """Layer by expert: on which core type, under which multiplier, and how many inputs come by.

    Args:
        placed: from :func:`axmoe_lite.search.places.best` or ``put``.
        parts: as it was given there.
        macs: as they were given there.
    """
    rows = []
    for part, layers in parts.items():
        home, _, expert = part.partition(".experts.")
        counted = [macs.layers[layer] for layer in layers]
        names = {placed.assignment.get(layer, EXACT) for layer in layers}
        rows.append(
            {
                "layer": home,
                "expert": f"expert {expert}" if expert else "all inputs",
                "part": part,
                "core": placed.places[part],
                "inputs": sum(c.executed for c in counted) / max(sum(c.static for c in counted), 1e-30),
                "circuit": ", ".join(sorted(name.replace("mul8s_1", "") for name in names)),
                "power": max(map(power_of, names)) / multiplier(EXACT).power_mw,
                "mmacs": sum(c.executed for c in counted) / 1e6,
            }
        )
    table = pd.DataFrame(rows)
    cores = list(placed.load_s)
    columns = sorted(set(table["expert"]), key=lambda name: (name != "all inputs", name))
    base = alt.Chart(table).encode(
        x=alt.X("expert:N", title=None, sort=columns, axis=alt.Axis(orient="top", labelAngle=0, ticks=False)),
        y=alt.Y("layer:N", title=None, sort=None, axis=alt.Axis(labelLimit=200)),
        tooltip=[
            "part",
            alt.Tooltip("core:N", title="core type"),
            "circuit",
            alt.Tooltip("inputs:Q", title="of the inputs", format=".1%"),
            alt.Tooltip("mmacs:Q", title="products an input, million", format=".3g"),
        ],
    )
    tiles = base.mark_rect(stroke="white").encode(
        color=alt.Color(
            "core:N",
            title="core type",
            scale=alt.Scale(domain=cores, range=_COLOURS[: len(cores)]),
            legend=alt.Legend(orient="top"),
        ),
        opacity=alt.Opacity(
            "inputs:Q",
            title="share of the inputs",
            scale=alt.Scale(domain=[0, 1], range=[0.12, 1]),
            legend=alt.Legend(orient="top", format="%", values=[0, 0.25, 0.5, 1]),
        ),
    )
    dark = alt.condition("datum.inputs > 0.55", alt.value("white"), alt.value("#222"))
    names = base.mark_text(fontSize=11).encode(text="circuit:N", color=dark)
    told = ", ".join(f"{core} {seconds * 1e6:,.0f} us" for core, seconds in placed.load_s.items())
    subtitle = [f"At work for an input: {told}.", f"Energy {placed.energy:.3f}; {placed.throughput:,.0f} images/s."]
    return alt.layer(tiles, names).properties(
        width=alt.Step(84), height=alt.Step(20), title=alt.Title(title, subtitle=subtitle, offset=12)
    )


def energy_fronts(rows: Iterable[Mapping[str, Any]], *, title: str = "") -> alt.LayerChart:
    """Throughput against energy, a line a family of placements. A click in the legend picks families.

    Args:
        rows: ``family``, ``energy``, ``throughput``, ``speedup`` (over all on the big cores), ``top1`` where it was
            measured, and evidence.

    Raises:
        ValueError: for rows without evidence.
    """
    rows = [dict(row) for row in rows]
    check_evidence(rows, "family")
    table = pd.DataFrame(rows).astype({"energy": float, "speedup": float})
    families = list(dict.fromkeys(table["family"]))
    scale = alt.Scale(domain=families, range=[_COLOURS[i % len(_COLOURS)] for i in range(len(families))])
    pick = alt.selection_point(fields=["family"], bind="legend")
    legend = alt.Legend(orient="top", columns=2, labelLimit=300)
    kept = ["family", "energy", "speedup", "throughput", "top1", "time_s", *_TOLD]
    shown = alt.Chart(table[[column for column in kept if column in table]]).encode(
        x=alt.X("energy:Q", title="energy of an input (1: the dense network, exact, on big cores)"),
        y=alt.Y("speedup:Q", title="throughput over all on the big cores"),
        color=alt.Color("family:N", title=None, scale=scale, legend=legend),
        opacity=alt.condition(pick, alt.value(0.95), alt.value(0.1)),
    )
    points = shown.mark_point(filled=False, size=70, strokeWidth=2).encode(
        shape=alt.Shape("family:N", title=None, scale=alt.Scale(domain=families), legend=legend),
        tooltip=[
            "family",
            alt.Tooltip("energy:Q", format=".3f"),
            alt.Tooltip("speedup:Q", title="throughput, relative", format=".3f"),
            *(alt.Tooltip(c, format=".1%") for c in ("top1",) if c in table),
            *(alt.Tooltip(c) for c in ("throughput", "time_s", *_TOLD) if c in table),
        ],
    )
    lines = shown.mark_line(strokeWidth=1.5).encode(order="energy:Q")
    return alt.layer(points.add_params(pick), lines).properties(width=540, height=320, title=title)


def crossings(streamed: Mapping[tuple[str, str, float], Streamed], *, title: str = "") -> alt.FacetChart:
    """Images per second against what a change of core type costs: a line a placement, a panel a network.

    Args:
        streamed: (network, placement, microseconds of a crossing) to what :func:`axmoe_lite.search.stream.stream` says.

    Raises:
        ValueError: for nothing.
    """
    if not streamed:
        raise ValueError("crossings() was given nothing to draw; search.stream.stream() makes it.")
    names = ("network", "placement", "crossing_us")
    rows = [{**dict(zip(names, key, strict=True)), **vars(one)} for key, one in streamed.items()]
    table = pd.DataFrame(rows)[[*names, "throughput", "crossings"]].rename(columns={"throughput": "images_per_s"})
    kinds = list(dict.fromkeys(table["placement"]))
    colours = alt.Scale(domain=kinds, range=_COLOURS[: len(kinds)])
    base = alt.Chart(table).encode(
        x=alt.X("crossing_us:Q", title="a change of core type takes, us"),
        y=alt.Y("images_per_s:Q", title="images per second"),
        color=alt.Color("placement:N", title=None, scale=colours, legend=alt.Legend(orient="top")),
    )
    points = base.mark_point(filled=True, size=50).encode(
        shape=alt.Shape("placement:N", title=None, scale=alt.Scale(domain=kinds), legend=alt.Legend(orient="top")),
        tooltip=[
            "network",
            "placement",
            alt.Tooltip("crossing_us:Q", title="a crossing takes, us"),
            alt.Tooltip("images_per_s:Q", title="images per second", format=",.0f"),
            alt.Tooltip("crossings:Q", title="crossings an image", format=".2f"),
        ],
    )
    return (
        alt.layer(base.mark_line(strokeWidth=1.5), points)
        .properties(width=250, height=220)
        .facet(column=alt.Column("network:N", title=None, sort=list(dict.fromkeys(table["network"]))))
        .properties(title=title)
    )

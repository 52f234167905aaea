"""Stages of a network on cores: seconds foretold and measured, what a pipeline gains, and who works when.

    foretold_times    seconds that a shape foretells against seconds that a clock saw, a mark a layer
    error_bars        how far the methods miss, by layers and cores
    gain_bars         what pipelines gain on the simulated board, beside what was published; a choice of tiles
    stage_gantt       who works on which image when, in a schedule or in a real run
    ways_bars         the same cores used in several ways, measured and foretold

Chapter: 19, "Which core for which layer?"
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from axmoe_lite.plots.places import gantt
from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, check_evidence
from axmoe_lite.search.pipeit import Predictor, Ran, Schedule
from axmoe_lite.search.pipeit import gantt as simulated
from axmoe_lite.search.pipeit.board import PUBLISHED_GAIN

WANTED = 0.15
"""Mean absolute percentage error that a predictor should stay below, as a share."""

_METHODS = {"tiles": ORANGE, "each": GREY, "kernels": GREEN, "trees": BLUE}
_WAYS = {"one core": GREY, "pipeline": BLUE, "data parallel": ORANGE, "threads": PURPLE}
_TOLD = ["repeats", "n_test", "seed", "scale", "commit", "date", "device"]


def foretold_times(
    predictors: Mapping[str, Predictor], rows: Iterable[Mapping[str, Any]], *, title: str = ""
) -> alt.HConcatChart:
    """Foretold against measured microseconds of a layer, both logarithmic; a panel for each ``shapes``.

    On the dashed line they agree; the grey band is within 15 % of it.

    Args:
        predictors: name to what :func:`axmoe_lite.search.pipeit.fit` made.
        rows: of :func:`axmoe_lite.search.pipeit.measure` on layers that were not fitted, with ``shapes`` (whose layers
            they are) and evidence.

    Raises:
        ValueError: for no predictors or rows, rows without evidence, or layers that a predictor does not know.
    """
    rows = [dict(row) for row in rows]
    check_evidence(rows, "shapes")
    if not predictors or not rows:
        raise ValueError("foretold_times() needs a predictor and a row or more; fit() and measure() make them.")
    table = pd.concat(
        pd.DataFrame(rows).assign(method=name, foretold_us=1e6 * one.foretell(rows)) for name, one in predictors.items()
    )
    table["measured_us"] = 1e6 * table.pop("seconds")
    table["ratio"] = table["foretold_us"] / table["measured_us"]
    both = table[["foretold_us", "measured_us"]]
    low, high = float(both.min().min()) / 1.3, float(both.max().max()) * 1.3
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    axis = alt.Axis(values=[10.0**n for n in range(8)], format="~s")
    x = alt.X("measured_us:Q", title="measured, us", scale=scale, axis=axis)
    y = alt.Y("foretold_us:Q", title="foretold from the shape, us", scale=scale, axis=axis)
    names, panels = list(predictors), list(dict.fromkeys(table["shapes"]))
    kept = [c for c in ("shapes", "method", "type", "cores", "kind", "n", "k", "m", "groups", *_TOLD) if c in table]
    shape = alt.Shape("method:N", title="method", scale=alt.Scale(domain=names), legend=alt.Legend(orient="top"))
    marks = {
        "color": alt.Color("method:N", title="method", scale=_colours(names), legend=alt.Legend(orient="top")),
        "shape": shape,
        "tooltip": [
            *(alt.Tooltip(c) for c in kept),
            alt.Tooltip("measured_us:Q", title="measured, us", format=",.1f"),
            alt.Tooltip("foretold_us:Q", title="foretold, us", format=",.1f"),
            alt.Tooltip("ratio:Q", title="foretold / measured", format=".2f"),
        ],
    }
    ends = pd.DataFrame({"measured_us": [low, high]})
    ends = ends.assign(foretold_us=ends, under=ends * (1 - WANTED), over=ends * (1 + WANTED))
    line = alt.Chart(ends)
    band = line.mark_area(color="#bbb", opacity=0.5, clip=True).encode(
        x=x, y=alt.Y("under:Q", scale=scale), y2="over:Q"
    )
    agree = line.mark_line(color="#555", strokeDash=[5, 4], strokeWidth=1.2).encode(x=x, y=y)
    drawn = []
    for panel in panels:
        own = alt.Chart(table.loc[table["shapes"] == panel, [*kept, "measured_us", "foretold_us", "ratio"]])
        layers = alt.layer(band, agree, own.mark_point(size=30, strokeWidth=1.2).encode(x=x, y=y, **marks))
        drawn.append(layers.properties(width=(520 - 60 * len(panels)) // len(panels) + 40, height=220, title=panel))
    told = f"A mark: a layer by one method. Dashed: agreement. Grey: within {WANTED:.0%}.{_quick(rows)}"
    return alt.hconcat(*drawn).properties(title=alt.Title(title, subtitle=told))


def error_bars(rows: Iterable[Mapping[str, Any]], *, title: str = "") -> alt.LayerChart:
    """Mean absolute percentage error by layers and cores: a bar a method, a dashed line where it should stay below.

    Args:
        rows: of :meth:`axmoe_lite.search.pipeit.Predictor.errors` with ``method``, ``shapes`` (whose layers) and
            evidence; those whose ``kind`` is not ``"all"`` are not drawn.

    Raises:
        ValueError: for no rows of kind "all", or rows without evidence.
    """
    rows = [dict(row) for row in rows if row.get("kind") == "all"]
    check_evidence(rows, "method")
    if not rows:
        raise ValueError('error_bars() was given no rows of kind "all"; Predictor.errors() makes them.')
    for row in rows:
        cores = int(row["cores"])
        row["what"] = f"{row['shapes']}, {cores} core{'s' if cores > 1 else ''}"
    table = pd.DataFrame(rows).astype({"mape": float, "worst": float, "layers": int})
    names = list(dict.fromkeys(table["method"]))
    kept = [c for c in ("what", "method", "mape", "worst", "layers", *_TOLD) if c in table]
    base = alt.Chart(table[kept]).encode(
        y=alt.Y("what:N", title=None, sort=list(dict.fromkeys(table["what"])), axis=alt.Axis(labelLimit=240)),
        yOffset=alt.YOffset("method:N", sort=names),
        x=alt.X("mape:Q", title="mean absolute error, of the measured time", axis=alt.Axis(format="%", tickCount=6)),
    )
    bars = base.mark_bar().encode(
        color=alt.Color("method:N", title="method", scale=_colours(names), legend=alt.Legend(orient="top")),
        tooltip=[
            *(alt.Tooltip(c) for c in ("what", "method", "layers")),
            alt.Tooltip("mape:Q", title="mean error", format=".1%"),
            alt.Tooltip("worst:Q", title="worst layer", format=".0%"),
            *(alt.Tooltip(c) for c in _TOLD if c in kept),
        ],
    )
    numbers = base.transform_calculate(said="datum.method + ' ' + format(datum.mape, '.0%')")
    numbers = numbers.mark_text(align="left", dx=4, fontSize=11).encode(text="said:N")
    wanted = alt.Chart(pd.DataFrame({"mape": [WANTED]})).mark_rule(color="#333", strokeDash=[5, 4]).encode(x="mape:Q")
    heading = alt.Title(title, subtitle=f"Dashed: {WANTED:.0%}.{_quick(rows)}")
    return alt.layer(bars, numbers, wanted).properties(width=420, height=alt.Step(22), title=heading)


def gain_bars(gains: Mapping[int, Sequence[Mapping[str, Any]]], *, tile: int = 8, title: str = "") -> alt.LayerChart:
    """Throughput gained over the four big cores, by network, on the simulated board. Buttons choose the tile size.

    Bars are the paper's search and the optimum, a tick is each network's bound, the dashed line the mean that was
    published.

    Args:
        gains: tile size to rows of :func:`axmoe_lite.search.pipeit.board.gains`.
        tile: chosen at first.

    Raises:
        ValueError: for no rows, or a first choice that is not among them.
    """
    if tile not in gains or not all(gains.values()):
        raise ValueError(f"The tile {tile} is to be shown; there are gains for {', '.join(map(str, gains)) or 'none'}.")
    kinds = {"merge_stage": "merged", "optimum": "best"}
    table = pd.DataFrame(
        [
            {"tile": size, "network": row["network"], "search": kind, "gain": row[f"{key}_gain"], "bound": row["bound"]}
            | {"images_per_s": row[f"{key}_per_s"], "schedule": _in_words(row[key])}
            for size, rows in gains.items()
            for row in rows
            for kind, key in kinds.items()
        ]
    )
    radio = alt.binding_radio(options=list(gains), name="image rows in a tile ")
    chosen = alt.param(name="tile_shown", value=tile, bind=radio)
    networks = list(dict.fromkeys(table["network"]))
    top = max(table["gain"].max(), table["bound"].max()) * 1.08
    x = alt.X("network:N", title=None, sort=networks, axis=alt.Axis(labelAngle=0))
    y = alt.Y("gain:Q", title="gain over the four big cores", axis=alt.Axis(format="%"))
    y = y.scale(domain=[0, float(top)], nice=False)
    base = alt.Chart(table).transform_filter("datum.tile == tile_shown")
    colours = alt.Scale(domain=list(kinds), range=[ORANGE, BLUE])
    bars = base.mark_bar().encode(
        x=x,
        y=y,
        xOffset=alt.XOffset("search:N", sort=list(kinds)),
        color=alt.Color("search:N", title=None, scale=colours, legend=alt.Legend(orient="top")),
        tooltip=[
            *("network", "search", "schedule"),
            alt.Tooltip("gain:Q", format=".1%"),
            alt.Tooltip("bound:Q", format=".1%"),
            alt.Tooltip("images_per_s:Q", title="images per second", format=".2f"),
        ],
    )
    at_foot = alt.condition("datum.search == 'optimum'", alt.value("white"), alt.value("black"))
    numbers = base.mark_text(fontSize=11).encode(  # at the foot, where no other mark is
        x=x,
        xOffset=alt.XOffset("search:N", sort=list(kinds)),
        y=alt.value(258),
        text=alt.Text("gain:Q", format=".0%"),
        color=at_foot,
    )
    bound = base.mark_tick(color="black", thickness=2, width=74).encode(x=x, y="bound:Q")
    published = alt.Chart(pd.DataFrame({"gain": [PUBLISHED_GAIN]}))
    published = published.mark_rule(color=RED, strokeDash=[6, 4], strokeWidth=1.5).encode(y="gain:Q")
    told = [
        f"Simulated. Black: both clusters' published throughputs, added. Dashed: the published mean,"
        f" {PUBLISHED_GAIN:.0%}.",
        "Buttons below choose the tile size, which is not from the paper.",
    ]
    return (
        alt.layer(bars, numbers, bound, published)
        .add_params(chosen)
        .properties(width=520, height=270, title=alt.Title(title, subtitle=told))
    )


def stage_gantt(of: Schedule | Ran, *, images: int = 9, unit: str = "ms", title: str = "") -> alt.LayerChart:
    """Who works on what when: a lane a stage. A slider moves time on.

    Args:
        of: a schedule, which is simulated with one place between stages; or a real run, of which the first batches
            are shown, and in the hover how long handing each on took.
        images: or batches, how many are shown.
        unit: see :func:`~axmoe_lite.plots.places.gantt`.

    Raises:
        ValueError: as :func:`~axmoe_lite.plots.places.gantt`; for fewer than one image.
    """
    if isinstance(of, Schedule):
        rows = simulated(of, images=images)
        lanes = [f"{i + 1}: {cores} {kind}" for i, (kind, cores) in enumerate(of.pipeline)]
        spans = [
            (row["image"], lanes[row["stage"]], row["start_s"], row["end_s"], f"held {1e3 * row['blocked_s']:.3g} ms")
            for row in rows
        ]
        chart, note = gantt(spans, unit=unit), "A number is an image. Simulated."
    else:
        if images < 1:
            raise ValueError(f"images is {images}; at least 1 is to be shown.")
        shown = sorted((one for one in of.spans if one.batch < images), key=lambda one: (one.stage, one.batch))
        handed = [f"handed on in {1e6 * (one.sent_s - one.end_s):.0f} us" for one in shown]
        spans = [
            (one.batch, f"{one.stage + 1}", one.start_s, one.end_s, what)
            for one, what in zip(shown, handed, strict=True)
        ]
        chart, note = gantt(spans, unit=unit), "A number is a batch. As it ran."
    return chart.properties(title=alt.Title(title, subtitle=note))


def ways_bars(rows: Iterable[Mapping[str, Any]], *, title: str = "") -> alt.FacetChart:
    """Images per second of each way to use the cores: medians as bars, turns as circles, a tick for what was foretold.

    The number at a bar is the median, over turns, of its throughput over one core's in the same turn.

    Args:
        rows: of :func:`axmoe_lite.search.pipeit.ways.race` with ``network``, ``foretold_per_s`` (0 where nothing was
            foretold) and evidence.

    Raises:
        ValueError: for no rows, or rows without evidence.
    """
    rows = [dict(row) for row in rows]
    check_evidence(rows, "way")
    if not rows:
        raise ValueError("ways_bars() was given no rows; ways.race() makes them.")
    table = pd.DataFrame(rows)
    for column in ("images_per_s", "over_one", "foretold_per_s"):
        table[column] = pd.to_numeric(table[column])
    table["foretold_per_s"] = table["foretold_per_s"].where(table["foretold_per_s"] > 0)
    kept = ["network", "way", "turn", "cores", "batch", "images", "images_per_s", "over_one", "foretold_per_s", "same"]
    names = [way for way in _WAYS if way in set(table["way"])]
    columns = [c for c in (*kept, *_TOLD) if c in table]
    colours = alt.Scale(domain=names, range=[_WAYS[way] for way in names])
    base = alt.Chart(table[columns]).encode(y=alt.Y("way:N", title=None, sort=names))
    x = alt.X("images_per_s:Q", title="images per second", axis=alt.Axis(tickCount=5))
    bars = base.mark_bar(opacity=0.55).encode(
        x=alt.X("median(images_per_s):Q", title="images per second"),
        color=alt.Color("way:N", scale=colours, legend=None),
        tooltip=[
            *("network", "way"),
            alt.Tooltip("median(images_per_s):Q", title="images per second, median", format=",.1f"),
            alt.Tooltip("median(over_one):Q", title="over one core, median", format=".2f"),
            alt.Tooltip("mean(foretold_per_s):Q", title="foretold", format=",.1f"),
            alt.Tooltip("count():Q", title="turns"),
        ],
    )
    points = base.mark_point(size=24, color="black").encode(x=x, tooltip=columns)
    ticks = base.mark_tick(color=RED, thickness=3, height=26).encode(x=alt.X("mean(foretold_per_s):Q"))
    numbers = base.transform_aggregate(groupby=["network", "way"], over="median(over_one)")
    numbers = numbers.transform_calculate(said="format(datum.over, '.2f') + 'x'")
    # At the edge, so that no number stands beside the mark of what was foretold.
    numbers = numbers.mark_text(align="left", dx=6, fontSize=11).encode(x=alt.value(230), text="said:N")
    told = f"Bars: medians; circles: turns; red: foretold. At the right: measured, over one core.{_quick(rows)}"
    return (
        alt.layer(bars, points, ticks, numbers)
        .properties(width=230, height=alt.Step(34))
        .facet(column=alt.Column("network:N", title=None, sort=list(dict.fromkeys(table["network"]))), spacing=50)
        .resolve_scale(x="independent")
        .properties(title=alt.Title(title, subtitle=told))
    )


def _colours(names: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(names), range=[_METHODS.get(name, RED) for name in names])


def _in_words(schedule: Schedule) -> str:
    parts = zip(schedule.pipeline, schedule.split, strict=True)
    return ", ".join(f"{layers} layers on {cores} {kind}" for (kind, cores), layers in parts)


def _quick(rows: Sequence[Mapping[str, Any]]) -> str:
    return " Quick: few layers or images." if any(row["scale"] == "quick" for row in rows) else ""

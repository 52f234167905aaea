"""What simulating an approximate multiplier costs, against the same work in float32.

Chapter: 06, "Faster than float32?"
"""

import itertools

import altair as alt
import pandas as pd

from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, RED, SKY, check_evidence

PEERS = 1 / 25  # of float32: other lookup simulators, measured on such a processor when this project was planned
FROZEN = " frozen"
NAIVE = "naive gather"
ABSENT = "not measured there"

_WAYS = {
    "float32, made ready": GREY,
    "exact products": BLUE,
    "exact products, as a pipeline": GREEN,
    "looked up, 64 at a time": ORANGE,
    "looked up, naively": RED,
}


def speed_bars(
    rows: list[dict], *, case: str = "", title: str = "How many times as fast as float32?"
) -> alt.LayerChart:
    """Speed of every multiplier in one case, with float32 at 1; menus pick the case, the threads and the machine.

    A bar is the faster way there is (for a network its pipeline), the circle beside it the network layer by layer.

    Args:
        rows: as :func:`axmoe_lite.bench.run` makes them, or read from ``speed_cases``.
        case: the one shown first; the first of the rows if left out. Of several machines the first row's is.

    Raises:
        ValueError: for rows without evidence.
    """
    check_evidence(rows, "column")
    table = pd.DataFrame(rows).astype({"speed": float, "speed_low": float, "speed_high": float, "seconds": float})
    table = table[table["column"] != "float32"].reset_index(drop=True)
    table["multiplier"] = table["column"].str.removesuffix(FROZEN)
    table["rank"] = pd.to_numeric(table["rank"], errors="coerce")
    table["way"] = [_way(column, rank) for column, rank in zip(table["column"], table["rank"], strict=True)]
    table["label"] = [_label(name, rank) for name, rank in zip(table["multiplier"], table["rank"], strict=True)]
    table["ms"] = [float(f"{1e3 * s:.3g}") for s in table["seconds"]]
    for column in ("speed", "speed_low", "speed_high"):
        table[column] = [float(f"{value:.3g}") for value in table[column]]
    table["machine"] = [machine_of(device) for device in table["device"]]
    key = ["case", "threads", "machine", "multiplier"]
    piped = {tuple(row) for row in table.loc[table["column"].str.endswith(FROZEN), key].to_numpy()}
    layered = [tuple(row) in piped for row in table[key].to_numpy()]
    table["mark"] = [
        "bar" if col.endswith(FROZEN) or not two else "circle"
        for col, two in zip(table["column"], layered, strict=True)
    ]
    kept = ["case", "threads", "machine", "label", "way", "mark", "speed", "speed_low", "speed_high", "ms", "note"]
    kept += ["repeats", "device", "commit", "date", "scale"]

    cases, threads = list(dict.fromkeys(table["case"])), sorted({int(t) for t in table["threads"]})
    table["threads"] = table["threads"].astype(int)
    pick_case = alt.param("speed_case", value=case or cases[0], bind=alt.binding_select(options=cases, name="work  "))
    pick_threads = alt.param(
        "speed_threads", value=threads[0], bind=alt.binding_radio(options=threads, name="threads  ")
    )
    machines = list(dict.fromkeys(table["machine"]))
    menu = alt.binding_select(options=machines, name="machine  ") if len(machines) > 1 else alt.Undefined
    pick_machine = alt.param("speed_machine", value=machines[0], bind=menu)
    low = min(PEERS, table["speed_low"].min()) / 3
    x = alt.X(
        "speed:Q",
        title="← slower \u2003 times as fast as float32 \u2003 faster →",
        scale=alt.Scale(type="log", domain=[low, table["speed_high"].max() * 2], nice=False),
        axis=alt.Axis(values=[0.001, 0.01, 0.1, 1, 2, 5, 10, 100], labelExpr="datum.value+'×'"),
    )
    y = alt.Y("label:N", title=None, sort=[*_order(table), ABSENT], axis=alt.Axis(labelLimit=260))
    evidence = [alt.Tooltip(c) for c in ("case", "threads", "note", "repeats", "device", "commit", "date", "scale")]
    tooltip = [
        alt.Tooltip("label:N", title="multiplier"),
        alt.Tooltip("way:N", title="computed as"),
        alt.Tooltip("speed:Q", title="times as fast", format=".3~g"),
        alt.Tooltip("speed_low:Q", title="lower quartile", format=".3~g"),
        alt.Tooltip("speed_high:Q", title="upper quartile", format=".3~g"),
        alt.Tooltip("ms:Q", title="milliseconds", format=".3~g"),
        *evidence,
    ]
    of = ["case", "threads", "machine"]
    there = set(table[of].itertuples(index=False, name=None))
    asked = [one for one in itertools.product(cases, threads, machines) if one not in there]
    lacking = pd.DataFrame(asked, columns=of).assign(label=ABSENT, mark="none")
    base = (
        alt.Chart(pd.concat([table[kept], lacking]) if asked else table[kept])
        .transform_filter("datum.case==speed_case&&datum.threads==speed_threads&&datum.machine==speed_machine")
        .transform_calculate(
            one="1",
            beside="datum.speed<1?datum.speed_low:datum.speed_high",
            text="format(datum.speed,datum.speed<0.1?'.1~g':datum.speed<10?'.2~f':'.0f')+'×'",
        )
        .encode(y=y)
    )
    absent = base.transform_filter("datum.mark=='none'").mark_text(text="").encode(x=alt.value(0))
    colour = alt.Color(
        "way:N",
        title="computed as",
        scale=alt.Scale(domain=list(_WAYS), range=list(_WAYS.values())),
        legend=alt.Legend(orient="bottom", columns=3, symbolType="square", labelLimit=260),
    )
    bars = base.transform_filter("datum.mark=='bar'")
    drawn = bars.mark_bar(height=13).encode(x=x, x2="one:Q", color=colour, tooltip=tooltip)
    spread = bars.mark_rule(color="#333").encode(x="speed_low:Q", x2="speed_high:Q", tooltip=tooltip)
    numbers = bars.mark_text(
        fontSize=11, align=alt.ExprRef("datum.speed<1?'right':'left'"), dx=alt.ExprRef("datum.speed<1?-8:8")
    ).encode(x="beside:Q", text="text:N")
    circles = (
        base.transform_filter("datum.mark=='circle'")
        .mark_point(size=45, filled=True, stroke="white", strokeWidth=1, opacity=1)
        .encode(x="speed:Q", color=colour, tooltip=tooltip)
    )
    reference = [mark for place, text, shade in _REFERENCES for mark in _reference(place, text, shade)]
    return (
        alt.layer(*reference, drawn, spread, numbers, circles, absent)
        .add_params(pick_case, pick_threads, pick_machine)
        .properties(width=430, height=alt.Step(19), title=alt.Title(title, offset=18, subtitle=_SUBTITLE))
    )


_REFERENCES = ((1.0, "float32", "#000000"), (PEERS, "other simulators, 1/25", RED))


def _reference(place: float, text: str, shade: str) -> list[alt.Chart]:
    base = alt.Chart(pd.DataFrame({"x": [place], "text": [text]})).encode(x="x:Q")
    name = base.mark_text(baseline="bottom", fontSize=11, dy=-3, color=shade)
    return [base.mark_rule(strokeDash=[4, 4], color=shade), name.encode(y=alt.value(0), text="text:N")]


_SUBTITLE = "Right of the black line: faster. Circle: the same network layer by layer, without the pipeline."


def machine_of(device: str) -> str:
    """A row's processor without its threads.

    >>> machine_of("AMD EPYC, 2 threads")
    'AMD EPYC'
    """
    return device.rsplit(", ", 1)[0]


def _way(column: str, rank: float) -> str:
    if column == NAIVE:
        return "looked up, naively"
    if column == "float32 prepared":
        return "float32, made ready"
    if column.endswith(FROZEN):
        return "exact products, as a pipeline"
    return "exact products" if rank <= 32 else "looked up, 64 at a time"


def _label(name: str, rank: float) -> str:
    if name == NAIVE:
        return "any table, naive gather"
    if name == "float32 prepared":
        return "float32, BatchNorm folded"
    if rank > 32:
        return f"{name.removesuffix('()')}, rank {rank:.0f}"
    exact = " (exact)" if name == "mul8s_1KV6" else ""
    return f"{name.removeprefix('mul8s_1')}{exact}, {rank:.0f} product" + ("s" if rank > 1 else "")


def _order(table: pd.DataFrame) -> list[str]:
    """float32 first, then by the number of products, as the catalogue has them, lookups last."""
    ranked = table.drop_duplicates("label").copy()
    ranked["place"] = ranked["rank"].fillna(0).where(ranked["multiplier"] != NAIVE, 1000)
    return list(ranked.sort_values("place", kind="stable")["label"])


# ------------------------------------------------------------------------------------- series

_SERIES = {
    "mul8s_1KV6": ("1 exact product", BLUE),
    "mul8s_1KVA": ("5 exact products", SKY),
    "rank R": ("rank R, whichever the package takes", GREEN),
    "random table": ("looked up", ORANGE),
    "float32": ("float32", GREY),
}
_AXES = {"images": "images at a time", "channels": "channels in and out", "rank": "rank R of the table"}


def speed_scaling(rows: list[dict]) -> alt.VConcatChart:
    """Products a second of one convolution as its batch, its width and its multiplier's rank grow.

    Dashed lines are the best that large matrix products reached on the same machine.

    Args:
        rows: of the groups ``scaling`` and ``peak``, as read from ``speed_scaling``. Of several machines the first's.

    Raises:
        ValueError: for rows without evidence.
    """
    check_evidence(rows, "column")
    rows = [row for row in rows if machine_of(row["device"]) == machine_of(rows[0]["device"])]
    table = pd.DataFrame(rows).astype({"macs": float, "seconds": float, "threads": int, "speed": float})
    table["rate"] = [float(f"{r:.3g}") for r in table["macs"] / table["seconds"] / 1e9]
    peaks = table[table["group"] == "peak"].sort_values("rate").drop_duplicates(["column", "threads"], keep="last")
    peaks = peaks.assign(text=[f"{c} at best: {r:.0f}" for c, r in zip(peaks["column"], peaks["rate"], strict=True)])
    series = table[table["column"].isin(list(_SERIES)) & table["axis"].isin(list(_AXES))]
    series = series.assign(
        value=series["value"].astype(int),
        line=[_SERIES[c][0] for c in series["column"]],
        speed=series["speed"].round(3),
    )
    threads = sorted(set(table["threads"]))
    pick = alt.param("scaling_threads", value=threads[0], bind=alt.binding_radio(options=threads, name="threads  "))
    colours = dict(_SERIES.values())
    colour = alt.Color(
        "line:N",
        title=None,
        scale=alt.Scale(domain=list(colours), range=list(colours.values())),
        legend=alt.Legend(orient="bottom", columns=3, labelLimit=300),
    )
    domain = [min(1.0, series["rate"].min() / 1.5), table["rate"].max() * 1.6]
    y_scale = alt.Scale(type="log", domain=domain, nice=False)
    kept = ["axis", "value", "line", "rate", "speed", "case", "threads", "repeats", "device", "commit", "date", "scale"]
    evidence = [alt.Tooltip(c) for c in ("case", "threads", "repeats", "device", "commit", "date", "scale")]
    panels = []
    for place, (axis, title) in enumerate(_AXES.items()):
        some = series[series["axis"] == axis]
        y = alt.Y(
            "rate:Q",
            title=None if place else "billion products a second (higher is faster)",
            scale=y_scale,
            axis=alt.Axis(values=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000], labels=not place, format="~s"),
        )
        lines = (
            alt.Chart(some[kept])
            .transform_filter("datum.threads==scaling_threads")
            .mark_line(point=alt.OverlayMarkDef(size=35))
            .encode(
                x=alt.X(
                    "value:Q",
                    title=title,
                    scale=alt.Scale(type="log", base=2),
                    axis=alt.Axis(values=sorted(set(some["value"])), labelOverlap=True, format="d"),
                ),
                y=y,
                color=colour,
                tooltip=[
                    alt.Tooltip("line:N", title="computed as"),
                    alt.Tooltip("rate:Q", title="billion products a second", format=".3~g"),
                    alt.Tooltip("speed:Q", title="times as fast as float32", format=".2~f"),
                    *evidence,
                ],
            )
        )
        best = alt.Chart(peaks[["rate", "text", "threads"]]).transform_filter("datum.threads==scaling_threads")
        layers = [best.mark_rule(strokeDash=[4, 4], color="#555").encode(y=y), lines]
        if place == 1:  # where the lines leave room
            layers.append(
                best.mark_text(align="left", baseline="bottom", fontSize=10, dx=2, dy=-2, color="#555").encode(
                    x=alt.value(0), y=y, text="text:N"
                )
            )
        panels.append(alt.layer(*layers).properties(width=190, height=260))
    return (
        alt.hconcat(*panels, spacing=14)
        .add_params(pick)
        .properties(
            title=alt.Title(
                "One convolution grows in three ways",
                subtitle="3x3, 16x16 pixels. Left: 32 channels. Middle: 16 images. Right: 64 channels, 16 images.",
            )
        )
    )

"""One multiplier in three small pictures that keep their scales, for the explorer with a kernel.

    error_map_of(m)        the error of every pair of operands, one dot a pair
    error_histogram(m)     how often an error of each size occurs, for two sorts of operands
    power_place(m)         power against error, among the catalogue and the families
    picture(chart)         a chart as an HTML image that needs no script, with its description

All three fill the same frame and have fixed domains, so that nothing jumps when a slider moves.

Chapter: 00, "Which multiplier would you build?"
"""

import base64
import html
import itertools
import json
import math
import struct
import zlib
from functools import lru_cache

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from torch import Tensor

from axmoe_lite.explore import ERROR_CLASSES, KNOBS, PICKS, error_shares, name_of
from axmoe_lite.multipliers import EVOAPPROX, EXACT, Multiplier, error_table, errors, multiplier
from axmoe_lite.plots.theme import BLUE, GREY, ORANGE, RED

WIDTH, HEIGHT = 310, 350  # of each picture, in CSS pixels, axes and legend included

# Blue for too small, orange for too large: told apart by colour-blind readers, and darker with the error's size.
_RAMP = ("#0b3c6f", "#2470b0", "#5ba3cf", "#a3cde6", "#f7f7f7", "#fbd09a", "#f09a3e", "#c8620a", "#7a3503")
_TOP = 16384  # the largest true product's size; errors beyond it have the last colour
_ABOUT = {
    "error_map": "Where is it wrong? (product units)",
    "histogram": "How often, and how far?",
    "place": "What does it save?",
}


# -------------------------------------------------------------------------------- error map


def error_map_of(m: Multiplier) -> alt.LayerChart:
    """The error M(a, b) - a b of all 65,536 pairs of operands, one dot a pair, on a scale that is the same for all.

    The colours are by the logarithm of 1 + |error|: an error of 3 and one of 3,000 both show.
    """
    corners = pd.DataFrame({"a": [-128.5, 127.5], "b": [-128.5, 127.5], "error": [-_TOP, _TOP]})
    axis = alt.Axis(values=[-128, -64, 0, 64, 127], grid=False)
    span = alt.Scale(domain=[-128.5, 127.5], nice=False)
    x, y = (
        alt.X("a:Q", title="activation a", axis=axis, scale=span),
        alt.Y("b:Q", title="weight b", scale=span, axis=axis),
    )
    levels = [_unlevel(k / 4) for k in range(-4, 5)]
    colour = alt.Color(
        "error:Q",
        title=None,
        scale=alt.Scale(type="symlog", constant=1, domain=levels, range=list(_RAMP)),
        legend=alt.Legend(
            orient="bottom",
            gradientLength=215,
            gradientThickness=10,
            values=[-10000, -100, 0, 100, 10000],
            labelExpr="(datum.value>0?'+':'')+format(datum.value,',')",
        ),
    )
    # A chart of 65,536 marks takes a second; one image takes milliseconds. The legend has two points nobody sees.
    legend = alt.Chart(corners).mark_point(opacity=0).encode(x=x, y=y, color=colour)
    frame = pd.DataFrame({"a": [-0.5], "b": [-0.5], "url": [_data_address("image/png", _map_png(m))]})
    dots = alt.Chart(frame).mark_image(width=_SIDE, height=_SIDE, aspect=False).encode(x=x, y=y, url="url:N")
    return _framed(dots + legend, "error_map", m, width=_SIDE, height=_SIDE)


_SIDE = 224


def _level(error: np.ndarray) -> np.ndarray:
    """Errors to -1..1, by the logarithm of 1 + |error|."""
    return np.sign(error) * np.minimum(np.log1p(np.abs(error)) / math.log1p(_TOP), 1)


def _unlevel(level: float) -> float:
    return math.copysign(math.expm1(abs(level) * math.log1p(_TOP)), level)


def _map_png(m: Multiplier) -> bytes:
    """The error map as a PNG of 256 x 256 dots: a to the right, b upwards."""
    levels = _level(error_table(m).numpy().astype(np.float64).T[::-1])
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in _RAMP], dtype=np.float64)
    places = np.linspace(-1, 1, len(stops))
    dots = np.stack([np.interp(levels, places, stops[:, channel]) for channel in range(3)], axis=-1)
    dots = dots.round().astype(np.uint8)
    lines = np.concatenate([np.zeros((256, 1), np.uint8), dots.reshape(256, -1)], axis=1)  # 0: a line without filter
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 256, 256, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes(), 6)),
        (b"IEND", b""),
    ]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


# ------------------------------------------------------------------------- error histogram


def error_histogram(m: Multiplier, operands: tuple[Tensor, Tensor] | None = None, *, layer: str = "") -> alt.LayerChart:
    """How often an error of each class occurs, if all operands are equally often, and as a layer meets them.

    Args:
        operands: how often each code -128..127 occurs, of activations and of weights, [256] each, in any scale;
            None draws the equally frequent ones alone.
        layer: what the legend calls those operands.

    The classes double (:data:`axmoe_lite.explore.ERROR_CLASSES`). The axis of shares is by the square root: a share of
    1 % still shows.
    """
    alike, met = "all pairs alike", f"in {layer}" if layer else "in a layer"
    shares = {alike: error_shares(m).tolist()}
    if operands is not None:
        shares[met] = error_shares(m, a=operands[0], b=operands[1]).tolist()
    rows = [
        {"class": c, "operands": name, "share": max(share, 0)}
        for name, values in shares.items()
        for c, share in zip(ERROR_CLASSES, values, strict=True)
    ]
    label = "(datum.value<0?'−':'+')+(abs(datum.value)>10?pow(2,abs(datum.value)-11)+'k':pow(2,abs(datum.value)-1))"
    colour = alt.Color(
        "operands:N",
        title=None,
        scale=alt.Scale(domain=[alike, met], range=[BLUE, ORANGE]),
        legend=alt.Legend(
            orient="top", direction="horizontal", symbolType="square", labelLimit=160, offset=4, columnPadding=18
        ),
    )
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X(
            "class:Q",
            title="error, in classes that double; 0 is right",
            scale=alt.Scale(domain=[-15.6, 15.6], nice=False),
            axis=alt.Axis(
                values=[-15, -11, -7, -3, 0, 3, 7, 11, 15], labelExpr=f"datum.value==0?'0':{label}", grid=False
            ),
        ),
        y=alt.Y(
            "share:Q",
            title="share of products (root scale)",
            scale=alt.Scale(type="sqrt", domain=[0, 1], nice=False),
            axis=alt.Axis(format="%", values=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1]),
        ),
        color=colour,
    )
    wide = base.transform_filter(alt.datum.operands == alike).mark_bar(size=7)
    narrow = base.transform_filter(alt.datum.operands == met).mark_bar(size=3)
    return _framed(wide + narrow, "histogram", m)


# ------------------------------------------------------------------------ power against error


def power_place(m: Multiplier) -> alt.LayerChart:
    """Where a multiplier lies between power and error; the published circuits and the families lie faint behind it.

    Power is in percent of the exact circuit's; hollow marks have a proxy for it (:mod:`axmoe_lite.multipliers.price`).
    Without a power there is a line at the error, across all powers.
    """
    x = alt.X(
        "power:Q",
        title="power, exact = 100 % (root scale)",
        scale=alt.Scale(type="sqrt", domain=[0, 2.4], nice=False, clamp=True),
        axis=alt.Axis(format="%", values=[0, 0.1, 0.25, 0.5, 1, 2]),
    )
    y = alt.Y(
        "mae:Q",
        title="mean |error| (product units)",
        scale=alt.Scale(type="symlog", domain=[0, 4000], nice=False, clamp=True),
        axis=alt.Axis(values=[0, 1, 10, 100, 1000], format="d"),
    )
    fill = alt.Fill(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=["published power", "proxy"], range=[GREY, "transparent"]),
        legend=alt.Legend(orient="top", symbolType="circle", symbolStrokeColor=GREY, offset=4, columnPadding=18),
    )
    faint = (
        alt.Chart(_background())
        .mark_point(size=26, strokeWidth=1, opacity=0.45, stroke=GREY)
        .encode(x=x, y=y, fill=fill)
    )
    mae = errors(m).mae
    if m.power_mw is None:
        here = alt.Chart(pd.DataFrame({"mae": [mae]})).mark_rule(color=RED, strokeWidth=2.5).encode(y=y)
        text, where = "its power is unknown", pd.DataFrame({"power": [1.2], "mae": [mae]})
    else:
        where = pd.DataFrame({"power": [m.power_mw / exact_power_mw()], "mae": [mae]})
        inside = "transparent" if m.is_proxy else RED
        here = alt.Chart(where).mark_point(size=150, strokeWidth=3, stroke=RED, fill=inside, opacity=1).encode(x=x, y=y)
        text = ""
    said = alt.Chart(where).mark_text(dy=-9, fontSize=12, color=BLUE, text=text).encode(x=x, y=y)
    return _framed(faint + here + said, "place", m)


def exact_power_mw() -> float:
    """The power of the exact circuit, which all powers are compared with, in milliwatts."""
    return multiplier(EXACT).power_mw


@lru_cache(maxsize=1)
def _background() -> pd.DataFrame:
    """Powers and errors of what lies behind: every pick, every third slider position of broken arrays, all others."""
    names = [
        *PICKS,
        *(
            name_of("broken_array", dict(zip(KNOBS["broken_array"], drops, strict=True)))
            for drops in itertools.product(range(0, 6, 2), range(0, 6, 2), range(0, 11, 3))
        ),
    ]
    names += [name_of("drum", {"k": k}) for k in range(2, 9)]
    names += [name_of("roup", {"k": k, "m": bit}) for k in range(4) for bit in range(0, 9, 2)]
    rows = []
    for name in names:
        found = multiplier(name)
        if name in EVOAPPROX or found.is_proxy:  # each published circuit once
            rows.append(
                {
                    "power": found.power_mw / exact_power_mw(),
                    "mae": errors(found).mae,
                    "kind": "proxy" if found.is_proxy else "published power",
                }
            )
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------- showing


def picture(chart: alt.TopLevelMixin, *, says: str) -> str:
    """A chart as an HTML ``<img>`` of :data:`WIDTH` x :data:`HEIGHT` CSS pixels: it needs no script and no address.

    Args:
        says: what a reader hears who does not see it; put the numbers in.

    >>> from axmoe_lite.multipliers import multiplier
    >>> picture(power_place(multiplier("drum(4)")), says="180 % of the power")[:29]
    '<img alt="180 % of the power"'
    """
    # The specification's check against its schema takes as long as a drawing; the tests do it.
    drawn = vl_convert.vegalite_to_svg(json.dumps(chart.to_dict(validate=False))).encode()
    # decoding="sync": the old picture stays until the new one is ready, without a blank between them.
    return (
        f'<img alt="{html.escape(says, quote=True)}" width="{WIDTH}" height="{HEIGHT}" decoding="sync"'
        f' src="{_data_address("image/svg+xml", drawn)}">'
    )


def _data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _framed(chart: alt.LayerChart, which: str, m: Multiplier, **size: int) -> alt.LayerChart:
    """The chart in the common frame, with its title and the multiplier's name."""
    fit = alt.AutoSizeParams(type="pad" if size else "fit", contains="padding")
    title = alt.Title(_ABOUT[which], subtitle=m.name if len(m.name) <= 36 else f"{m.name[:35]}…", fontSize=14, offset=6)
    return chart.properties(**(size or {"width": WIDTH, "height": HEIGHT}), title=title, autosize=fit)

"""A ledger of claims: what was compared, the interval, and the verdict.

Chapter: 11, "Does the paper hold?"
"""

import json
import textwrap
from collections.abc import Iterable, Mapping

import altair as alt
import pandas as pd

from axmoe_lite.claims import CLAIMS, VERDICTS, WHOLE
from axmoe_lite.plots.theme import BLUE, GREY, RED, check_evidence

_COLOURS = dict(zip(VERDICTS, (BLUE, RED, GREY), strict=True))
_TOLD = ["statement", "measured", "reason", "test", "seeds", "n_test", "dataset", "commit", "date", "device"]


def effects(lines: Iterable[Mapping], claim: str | None = None) -> alt.LayerChart:
    """What a claim is made of: each comparison's effect and 95 % interval, coloured by verdict; a menu picks the claim.

    Where the whole interval lies in the pale band, the comparison holds.

    Args:
        lines: of ``claims.csv``, or of :func:`axmoe_lite.claims.judged`. Comparisons without an effect are counted
            above the figure, not drawn.
        claim: draw this one alone, such as ``"C1"``, without a menu.

    Raises:
        ValueError: for lines without evidence, or if none has an effect, or none is of the claim.
    """
    lines = [dict(line) for line in lines if claim in (None, line["claim"])]
    if not lines:
        raise ValueError(f"effects() was given no line of claim {claim!r}; claims.CLAIMS and claims.NUMBERS have all.")
    check_evidence(lines, "claim")
    table = pd.DataFrame([line for line in lines if line["part"] not in ("", WHOLE)])
    for column in ("effect", "low", "high"):
        table[column] = pd.to_numeric(table[column])
    measured = table["effect"].notna()
    if not measured.any():
        raise ValueError("effects() was given no comparison with an effect; nothing has been measured yet.")
    counts = measured.groupby(table["claim"]).agg(["sum", "count"])
    table = _with_bands(table[measured])
    names = list(dict.fromkeys(table["claim"]))
    said = {line["claim"]: line["statement"] for line in reversed(lines)}  # the claim's own line is its first
    titles = {name: textwrap.wrap(f"{name}: {said[name]}", 72) for name in names}
    below = {name: _what_is_drawn(name, *counts.loc[name]) for name in names}
    menu = alt.param("effects_claim", value=names[0])
    if len(names) > 1:
        menu = alt.param("effects_claim", value=names[0], bind=alt.binding_select(options=names, name="claim  "))
    shown = ["claim", "part", "effect", "low", "high", "from", "to", "verdict", *_TOLD]
    base = alt.Chart(table[shown]).transform_filter("datum.claim==effects_claim")
    y = alt.Y("part:N", title=None, sort=None, axis=alt.Axis(labelLimit=320))
    colour = alt.Color(
        "verdict:N",
        title=None,
        scale=alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values())),
        legend=alt.Legend(orient="top"),
    )
    tips = [alt.Tooltip(c, format="+.2f") for c in ("effect", "low", "high")] + [alt.Tooltip(c) for c in _TOLD]
    x = {"title": "points of accuracy (95 % interval)"}
    bands = base.mark_bar(color=BLUE, opacity=0.12, height=alt.RelativeBandSize(1)).encode(
        x=alt.X("from:Q", **x), x2="to:Q", y=y
    )
    zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color="#999", strokeDash=[4, 4]).encode(x="x:Q")
    spans = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", **x), x2="high:Q", y=y, color=colour)
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("effect:Q", **x), y=y, color=colour, tooltip=tips
    )
    title = alt.Title(alt.ExprRef(f"({json.dumps(titles)})[effects_claim]"))
    words = pd.DataFrame([{"claim": name, "told": told} for name, told in below.items()])
    under = alt.Chart(words).transform_filter("datum.claim==effects_claim")
    under = under.mark_text(align="left", baseline="top", color="#555", lineBreak="\n", lineHeight=14)
    under = under.encode(text="told:N", x=alt.value(0), y=alt.value(alt.ExprRef("height + 38")))
    layers = alt.layer(bands, zero, spans, points, under).add_params(menu)
    return layers.properties(width=420, height=alt.Step(20), title=title)


def _what_is_drawn(name: str, drawn: int, among: int) -> str:
    """Below the claim: what lies to the right, what the band is, and how much could not be drawn."""
    effect = CLAIMS[name].effect if name in CLAIMS else "above the number in print"
    where = "A comparison holds where its whole line lies in the pale band. " if name in CLAIMS else ""
    return f"To the right: points {effect}.\n{where}{drawn} of {among} comparisons could be made."


def _with_bands(table: pd.DataFrame) -> pd.DataFrame:
    """With two columns, from where to where a comparison holds; empty where the lines do not say."""
    ends = table.groupby("claim").agg(low=("low", "min"), high=("high", "max"))
    goals = table["goal"] if "goal" in table else pd.Series("", table.index)
    spans = []
    for claim, goal in zip(table["claim"], goals, strict=True):
        kind, _, bound = str(goal or "").partition(" ")
        low, high = (float(ends.loc[claim, end]) for end in ("low", "high"))
        at = float(bound.lstrip("±")) if bound else 0.0
        spans.append(
            {
                "above": (at, max(high, at + 1)),
                "below": (min(low, at - 1), at),
                "within": (-at, at),
            }.get(kind, (None, None))
        )
    return table.assign(**{"from": [a for a, _ in spans], "to": [b for _, b in spans]})


def verdicts(lines: Iterable[Mapping]) -> alt.LayerChart:
    """One bar a claim: how many of its comparisons hold, fail, and cannot be told.

    Args:
        lines: as :func:`effects` takes them.
    """
    lines = [dict(line) for line in lines]
    check_evidence(lines, "claim")
    table = pd.DataFrame([line for line in lines if line["part"] not in ("", WHOLE)])
    whole = {line["claim"]: line for line in lines if line["part"] in ("", WHOLE)}
    counts = table.groupby(["claim", "verdict"], sort=False).size().rename("comparisons").reset_index()
    counts["order"] = counts["verdict"].map({verdict: i for i, verdict in enumerate(VERDICTS)})
    for column in ("statement", "reason"):
        counts[column] = counts["claim"].map({name: line[column] for name, line in whole.items()})
    scale = alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values()))
    return (
        alt.Chart(counts)
        .mark_bar()
        .encode(
            y=alt.Y("claim:N", title=None, sort=None),
            x=alt.X(
                "comparisons:Q", title="share of the claim's comparisons", stack="normalize", axis=alt.Axis(format="%")
            ),
            color=alt.Color("verdict:N", title=None, scale=scale, legend=alt.Legend(orient="top")),
            order="order:Q",
            tooltip=["claim", "verdict", "comparisons", "statement", "reason"],
        )
        .properties(width=520, height=alt.Step(24), title="What the comparisons say")
    )

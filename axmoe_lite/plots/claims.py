"""A ledger of claims: what was compared, the interval, and the verdict.

Chapter: 11, "Does the paper hold?"
"""

import json
from collections.abc import Iterable, Mapping

import altair as alt
import pandas as pd

from axmoe_lite.claims import VERDICTS, WHOLE
from axmoe_lite.plots.theme import BLUE, GREY, RED, check_evidence

_COLOURS = dict(zip(VERDICTS, (BLUE, RED, GREY), strict=True))
_TOLD = ["statement", "measured", "reason", "test", "seeds", "n_test", "dataset", "commit", "date", "device"]


def effects(lines: Iterable[Mapping]) -> alt.LayerChart:
    """What a claim is made of: each comparison's effect and 95 % interval, coloured by verdict; a menu picks the claim.

    Args:
        lines: of ``claims.csv``, or of :func:`axmoe_lite.claims.judged`. Comparisons without an effect are counted
            above the figure, not drawn.

    Raises:
        ValueError: for lines without evidence, or if none has an effect.
    """
    lines = [dict(line) for line in lines]
    check_evidence(lines, "claim")
    table = pd.DataFrame([line for line in lines if line["part"] not in ("", WHOLE)])
    for column in ("effect", "low", "high"):
        table[column] = pd.to_numeric(table[column])
    measured = table["effect"].notna()
    if not measured.any():
        raise ValueError("effects() was given no comparison with an effect; nothing has been measured yet.")
    counts = measured.groupby(table["claim"]).agg(["sum", "count"])
    table = table[measured]
    names = list(dict.fromkeys(table["claim"]))
    menu = alt.param("effects_claim", value=names[0], bind=alt.binding_select(options=names, name="claim  "))
    kept = ["claim", "part", "effect", "low", "high", "verdict", *_TOLD]
    base = alt.Chart(table[kept]).transform_filter("datum.claim==effects_claim")
    y = alt.Y("part:N", title=None, sort=None, axis=alt.Axis(labelLimit=320))
    colour = alt.Color(
        "verdict:N",
        title=None,
        scale=alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values())),
        legend=alt.Legend(orient="top"),
    )
    tips = [alt.Tooltip(c, format="+.2f") for c in ("effect", "low", "high")] + [alt.Tooltip(c) for c in _TOLD]
    x = {"title": "difference, points of accuracy (95 % interval)"}
    zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color="#999", strokeDash=[4, 4]).encode(x="x:Q")
    spans = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", **x), x2="high:Q", y=y, color=colour)
    points = base.mark_point(filled=True, size=70, opacity=1).encode(
        x=alt.X("effect:Q", **x), y=y, color=colour, tooltip=tips
    )
    told = {name: f"{name}: {done} of {of} comparisons could be made" for name, done, of in counts.itertuples()}
    title = alt.Title(alt.ExprRef(f"({json.dumps(told)})[effects_claim]"))
    return alt.layer(zero, spans, points).add_params(menu).properties(width=420, height=alt.Step(20), title=title)


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

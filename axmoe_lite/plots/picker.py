"""One chart for whoever looks for a number: pick network, topology, multiplier and regime, and read what was measured.

Chapters: 05, "What happens to a network?", 08, 09 and 11.
"""

import altair as alt

from axmoe_lite.models import TOPOLOGIES
from axmoe_lite.multipliers import EVOAPPROX
from axmoe_lite.plots.cost import COLOURS, SHAPES
from axmoe_lite.plots.study_rows import TOLD, networks_of, regimes_of, summed, to_table
from axmoe_lite.plots.theme import GREY

ANY = "any"
LINES = 14  # as many as the list has room for


def row_picker(rows: list[dict], *, regime: str = "not retrained") -> alt.VConcatChart:
    """Every number of a study, found by four menus: marks on accuracy against cost, and the same as a list.

    Args:
        rows: as :func:`axmoe_lite.claims.recorded` returns them, of any networks, topologies, seeds and regimes, with
            evidence. Numbers are means over seeds.
        regime: what its menu shows first.

    Raises:
        ValueError: as :func:`axmoe_lite.plots.resilience_curves`; for a regime that no row has.
    """
    table = to_table(rows, "row_picker")
    regimes = list(regimes_of(table))
    if regime not in (ANY, *regimes):
        raise ValueError(f"No row has the regime {regime!r}; there are {ANY}, {', '.join(regimes)}.")
    _, means, told = summed(table, "p_norm", "power")
    have = set(means["multiplier"])
    choices = {
        "network": list(networks_of(table)),
        "topology": [ANY, *(t for t in TOPOLOGIES if t in set(means["topology"]))],
        "multiplier": [
            ANY,
            *(m for m in ("float32", *EVOAPPROX) if m in have),
            *sorted(have - {"float32", *EVOAPPROX}),
        ],
        "regime": [ANY, *regimes],
    }
    first = {name: options[0] for name, options in choices.items()} | {"regime": regime}
    menus = [
        alt.param(f"picked_{name}", value=first[name], bind=alt.binding_select(options=options, name=f"{name}  "))
        for name, options in choices.items()
    ]
    asked = [f"(picked_{n}=='{ANY}'||datum.{n}==picked_{n})" for n in ("topology", "multiplier", "regime")]
    base = alt.Chart(means).transform_filter("datum.network==picked_network")
    base = base.transform_lookup(lookup="origin", from_=alt.LookupData(data=told, key="origin", fields=TOLD))
    base = base.transform_calculate(hit="&&".join(asked))
    colour = alt.Color("topology:N", scale=COLOURS, title="topology")
    tips = [alt.Tooltip(f"{name}:N") for name in ("topology", "multiplier", "regime", "n", "seeds", "spread")]
    tips += [alt.Tooltip("top1:Q", title="top-1", format=".2%"), alt.Tooltip("p_norm:Q", title="P_norm", format=".3f")]
    marks = base.mark_point(filled=True, size=55).encode(
        x=alt.X("p_norm:Q", title="normalised inference cost P_norm (dense, exact: 1)", scale=alt.Scale(zero=True)),
        y=alt.Y("top1:Q", title="top-1 accuracy", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True)),
        color=colour,
        shape=alt.Shape("topology:N", scale=SHAPES, title="topology"),
        opacity=alt.condition("datum.hit", alt.value(0.95), alt.value(0.07)),
        order="hit:Q",
        tooltip=[*tips, *(alt.Tooltip(f"{name}:N", title=name.replace("_", " ")) for name in TOLD)],
    )
    return (
        alt.vconcat(marks.properties(width=470, height=260), _list(base), spacing=12)
        .add_params(*menus)
        .properties(title="Which number are you looking for?")
    )


def _list(base: alt.Chart) -> alt.LayerChart:
    """The hits in words, the most accurate first."""
    hits = base.transform_filter("datum.hit").transform_joinaggregate(hits="count()")
    hits = hits.transform_window(
        place="row_number()", sort=[alt.SortField("top1", order="descending"), alt.SortField("p_norm")]
    ).transform_filter(f"datum.place<={LINES}")
    columns = {
        0: "format(datum.top1,'.2%')",
        60: "'P_norm '+format(datum.p_norm,'.3f')",
        150: "datum.multiplier",
        255: "datum.topology",
        315: "datum.regime",
        430: "datum.n>1?datum.n+' seeds':'seed '+datum.seeds",
    }
    y = alt.Y("place:O", axis=None, scale=alt.Scale(domain=list(range(1, LINES + 1))))
    texts = [
        hits.transform_calculate(text=words)
        .mark_text(align="left", fontSize=12)
        .encode(x=alt.value(x), y=y, text="text:N")
        for x, words in columns.items()
    ]
    more = hits.transform_filter("datum.place==1").transform_calculate(
        text=f"datum.hits>{LINES}?'The best {LINES} of '+datum.hits+'.':''"
    )
    note = more.mark_text(align="left", fontSize=12, color=GREY).encode(
        x=alt.value(0), y=alt.value(18 * LINES + 12), text="text:N"
    )
    return alt.layer(*texts, note).properties(width=470, height=18 * LINES)

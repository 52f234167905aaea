"""Which network for which input: what each network adds to a pool, what dispatchers are worth, and films.

    pool_members      what each network costs, how often it is right, and what only it gets right
    dispatch_fronts   accuracy against cost: dispatchers, single networks, the lot, a cascade, the ideal; a panel a pool
    film_rules        the same for a film, by the rule that says when to choose again

Chapter: 18, "Which network for which input?"
"""

from collections.abc import Iterable, Mapping

import altair as alt
import pandas as pd

from axmoe_lite.plots.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, check_evidence

KINDS = {  # how each is drawn: colour, shape, dash
    "dispatched": (BLUE, "circle", [1, 0]),
    "with confidence": (GREEN, "triangle-up", [1, 0]),
    "cascade": (ORANGE, "square", [5, 2]),
    "mixed": (GREY, "stroke", [2, 3]),
    "single": ("#333333", "diamond", [1, 0]),
    "ideal": (PURPLE, "cross", [1, 0]),
}
_TOLD = ("dataset", "n_train", "n_test", "seed", "epochs", "scale", "commit", "date", "device")
_NUMBERS = ("top1", "cost", "accuracy", "p_norm", "lead", "low", "high", "point")


def pool_members(rows: Iterable[Mapping], *, title: str = "") -> alt.HConcatChart:
    """Three bars a network: its cost, its accuracy, and how many images no other network of the pool gets right.

    Networks on the front are blue, and their names have a dot; the others are grey.

    Args:
        rows: of :func:`axmoe_lite.search.pertinence.members`, with evidence.

    Raises:
        ValueError: for no rows, or rows without evidence.
    """
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError("pool_members() was given no rows; search.pertinence.members() makes them.")
    check_evidence(rows, "name")
    table = pd.DataFrame(rows)
    table["shown"] = [f"{name} ●" if on else name for name, on in zip(table["name"], table["on_front"], strict=True)]
    tips = ["name", "on_front", "alone", alt.Tooltip("cost:Q", title="cost, million products", format=".3g")]
    tips += [alt.Tooltip("accuracy:Q", format=".2%"), alt.Tooltip("routed:Q", title="should go there", format=".1%")]
    tips += [alt.Tooltip(f"{column}:N") for column in _TOLD if column in table]
    panels = []
    for n, (column, name, form) in enumerate(
        (
            ("cost", "cost, million products", ".3~r"),
            ("accuracy", "right, of all images", ".1%"),
            ("alone", "images only it gets right", "d"),
        )
    ):
        axis = alt.Axis(labels=n == 0, ticks=False, domain=False, labelLimit=160)
        room = alt.Scale(domain=[0, 1.25 * float(table[column].max()) or 1.0], nice=False)
        ticks = alt.Axis(tickCount=3, format="%" if column == "accuracy" else "~s")
        base = alt.Chart(table).encode(
            x=alt.X(f"{column}:Q", title=name, scale=room, axis=ticks),
            y=alt.Y("shown:N", title=None, sort=list(table["shown"]), axis=axis),
        )
        colour = alt.condition("datum.on_front", alt.value(BLUE), alt.value(GREY))
        bars = base.mark_bar(height=14).encode(color=colour, tooltip=tips)
        words = base.mark_text(align="left", dx=4).encode(text=alt.Text(f"{column}:Q", format=form))
        panels.append((bars + words).properties(width=150, height=24 * len(table)))
    said = "A dot and blue: on the front of cost and accuracy. Grey: another network is cheaper and no worse."
    return alt.hconcat(*panels, spacing=14, title=alt.Title(title, subtitle=said))


def dispatch_fronts(rows: Iterable[Mapping], *, title: str = "") -> alt.FacetChart:
    """Accuracy on the final images against cost, a panel a pool. The cost's axis is logarithmic.

    Args:
        rows: of :func:`axmoe_lite.search.pertinence.table` with ``pool`` and evidence; numbers or text.

    Raises:
        ValueError: for no rows, rows without evidence, or a kind that is not in :data:`KINDS`.
    """
    table = _numbers(rows, "pool", "dispatch_fronts", "search.pertinence.table()")
    unknown = [kind for kind in dict.fromkeys(table["kind"]) if kind not in KINDS]
    if unknown:
        raise ValueError(f"No kind is called {unknown[0]!r}; there are {', '.join(KINDS)}.")
    domain = [kind for kind in KINDS if kind in set(table["kind"])]
    single = table[table["kind"] == "single"].sort_values("cost")
    table["above"] = single.groupby("pool").cumcount() % 2 == 1  # neighbours' names do not meet
    kept = ["pool", "kind", "name", "weighting", "shares", "against", "above", *_NUMBERS, *_TOLD]
    shown = alt.Chart(table[[column for column in kept if column in table]])
    legend = alt.Legend(orient="top", columns=6, symbolSize=90, symbolOpacity=1)
    looks = {n: alt.Scale(domain=domain, range=[KINDS[kind][n] for kind in domain]) for n in range(3)}
    x = alt.X(
        "cost:Q", title="cost of an image, million exact products", scale=alt.Scale(type="log", nice=False, padding=24)
    )
    y = alt.Y("top1:Q", title="top-1, final images", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False))
    colour = alt.Color("kind:N", title=None, scale=looks[0], legend=legend)
    dash = alt.StrokeDash("kind:N", title=None, scale=looks[2], legend=legend)
    lines = shown.transform_filter("datum.kind!='single' && datum.kind!='ideal'")
    lines = lines.mark_line(strokeWidth=1.4, opacity=0.8)
    lines = lines.encode(x=x, y=y, color=colour, strokeDash=dash, order="cost:Q")
    points = shown.transform_filter("datum.kind!='mixed'").mark_point(filled=True, size=55, opacity=0.9)
    points = points.encode(
        x=x,
        y=y,
        color=colour,
        shape=alt.Shape("kind:N", title=None, scale=looks[1], legend=legend),
        tooltip=_tips(table),
    )
    names = []
    for above, place in ((True, {"align": "right", "dx": -3, "dy": -9}), (False, {"align": "left", "dx": 4, "dy": 12})):
        told = shown.transform_filter(f"datum.kind=='single' && datum.above=={str(above).lower()}")
        told = told.encode(x=x, y=y, text="name:N", color=alt.value("#333"))
        names += [told.mark_text(fontSize=11, stroke="white", strokeWidth=3, strokeOpacity=0.8, **place)]
        names += [told.mark_text(fontSize=11, **place)]
    header = alt.Header(orient="top", labelAnchor="start", labelFontWeight="bold", labelPadding=2)
    said = ["Chosen on other images; each point is what it does on the final ones. Mixed: two networks, drawn by lot."]
    return (
        alt.layer(lines, points, *names)
        .properties(width=540, height=200)
        .facet(row=alt.Row("pool:N", title=None, sort=list(dict.fromkeys(table["pool"])), header=header), spacing=14)
        .properties(title=alt.Title(title, subtitle=said))
    )


def film_rules(rows: Iterable[Mapping], *, title: str = "") -> alt.LayerChart:
    """Accuracy against cost of a frame: a line and a shape for each rule, a number for each of its settings.

    Args:
        rows: dicts with ``rule`` (such as ``"every D frames"``), ``setting`` (a number), ``accuracy``, ``cost`` and
            ``asked`` of :func:`axmoe_lite.search.pertinence.follow`, and evidence.

    Raises:
        ValueError: for no rows, or rows without evidence.
    """
    table = _numbers(rows, "rule", "film_rules", "search.pertinence.follow()")
    rules = list(dict.fromkeys(table["rule"]))
    colours = alt.Scale(domain=rules, range=[(BLUE, RED, GREEN, ORANGE)[i % 4] for i in range(len(rules))])
    legend = alt.Legend(orient="top", symbolSize=90)
    kept = ["rule", "setting", "accuracy", "cost", "asked", *_TOLD]
    base = alt.Chart(table[[column for column in kept if column in table]]).encode(
        x=alt.X(
            "cost:Q",
            title="cost of a frame, million exact products",
            axis=alt.Axis(tickCount=6),
            scale=alt.Scale(zero=False, padding=18),
        ),
        y=alt.Y(
            "accuracy:Q",
            title="frames answered rightly",
            axis=alt.Axis(format=".1%"),
            scale=alt.Scale(zero=False, padding=14),
        ),
        color=alt.Color("rule:N", title=None, scale=colours, legend=legend),
    )
    points = base.mark_point(filled=True, size=70).encode(
        shape=alt.Shape("rule:N", title=None, scale=alt.Scale(domain=rules), legend=legend),
        tooltip=[
            "rule",
            "setting",
            alt.Tooltip("accuracy:Q", format=".2%"),
            alt.Tooltip("cost:Q", format=".4g"),
            alt.Tooltip("asked:Q", title="dispatcher asked, of the frames", format=".1%"),
            *(alt.Tooltip(f"{column}:N") for column in _TOLD if column in table),
        ],
    )
    numbers = [  # above the first rule's points, below those of the next
        base.transform_filter(alt.FieldEqualPredicate(rule, "rule"))
        .mark_text(dy=(-11, 14)[i % 2], fontSize=11)
        .encode(text=alt.Text("setting:N"))
        for i, rule in enumerate(rules)
    ]
    lines = base.mark_line(strokeWidth=1.4).encode(order="asked:Q")
    return alt.layer(lines, points, *numbers).properties(width=520, height=260, title=title)


# ---------------------------------------------------------------------------------- pieces


def _numbers(rows: Iterable[Mapping], name: str, function: str, source: str) -> pd.DataFrame:
    """A table whose measured columns are numbers; text that is none, such as "", becomes empty."""
    rows = [dict(row) for row in rows]
    if not rows:
        raise ValueError(f"{function}() was given no rows; {source} makes them.")
    check_evidence(rows, name)
    table = pd.DataFrame(rows)
    for column in (column for column in (*_NUMBERS, "asked") if column in table):
        table[column] = pd.to_numeric(table[column], errors="coerce")
    return table


def _tips(table: pd.DataFrame) -> list:
    tips = ["pool", "kind", "name", alt.Tooltip("top1:Q", title="top-1", format=".2%")]
    tips += [alt.Tooltip("cost:Q", title="cost, million products", format=".4g")]
    tips += [alt.Tooltip("p_norm:Q", title="of the best network's cost", format=".3f")]
    tips += [alt.Tooltip("accuracy:Q", title="accuracy on search images", format=".2%")]
    told = {"lead": "lead over the best network", "low": "95 % from", "high": "to"}
    tips += [alt.Tooltip(f"{key}:Q", title=words, format="+.2%") for key, words in told.items() if key in table]
    return tips + [alt.Tooltip(f"{c}:N") for c in ("against", "shares", "weighting", *_TOLD) if c in table]

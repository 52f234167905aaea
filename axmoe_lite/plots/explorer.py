"""The explorer of a page without a kernel: sliders, and everything that follows from them, computed by Vega.

A position of the sliders is a multiplier. Its error for each of the 65,536 pairs of operands is one Vega expression,
and the map, the histogram and the figures are aggregates of that one dataset. What takes more than arithmetic (the
price, the exact rank, what a network makes of it) comes from rows that :func:`axmoe_lite.explore.rows` made before.

Chapters: 00, "Which multiplier would you build?", and 01, "What does a cheap multiplier get wrong?"
"""

import difflib
import re
from collections.abc import Collection, Mapping

import altair as alt
from torch import Tensor

from axmoe_lite.explore import ERROR_CLASSES, KNOBS, PICKS, name_of, settings
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.multipliers.published import PUBLISHED
from axmoe_lite.plots.theme import BLUE, ORANGE, RED, SKY, check_evidence

LABELS = {"broken_array": "broken array", "drum": "DRUM", "roup": "ROUP", "picks": "catalogue"}
"""The families as the page names them; ``"picks"`` is what is chosen by name."""

TILE = 4  # operand values along the side of one drawn cell
OTHERS = "#c4c4c4"  # catalogue marks behind the present one
_ALIAS = {name_of("broken_array", dict(zip(KNOBS["broken_array"], p.drops, strict=True))): p.name for p in PUBLISHED}
_SLOT = 108  # width of one figure
_MARGIN = 54  # what the axes of the charts below take: the figures begin left of it


def explorer(
    rows: list[dict] | None,
    operands: Mapping[str, tuple[Tensor, Tensor]],
    *,
    families: Collection[str] = tuple(LABELS),
    start: str = "broken_array(0,0,4)",
    layer: str = "",
) -> alt.VConcatChart:
    """Sliders, and what that multiplier gets wrong, costs and does to a network; no kernel is needed.

    Args:
        rows: what the page cannot compute: of each multiplier that the controls reach ``multiplier``, ``power_mw``,
            ``proxy``, ``rank``, ``mae``, ``top1``, ``network``, and evidence (see :func:`axmoe_lite.explore.rows`).
            None leaves out the exact rank, the network, and the pictures of all multipliers.
        operands: layer name to how often each code -128..127 of the activations and of the weights occurs, [256] each,
            in any scale; at least one. With several, a menu picks one. A single one need not be a layer: its name is
            what the page calls these operands.
        families: of :data:`LABELS`, those that have controls.
        start: the multiplier that is shown first.
        layer: whose operands are shown first; the first if not named.

    Raises:
        ValueError: for an unknown family, start or layer, missing rows, rows without evidence, or no operands.

    >>> explorer([], {})
    Traceback (most recent call last):
        ...
    ValueError: explorer() was given no operands; one layer's are needed, or any two distributions under a name.
    """
    wanted = _check(rows, operands, families, start, layer)
    columns = ("rank", "mae", "top1") if rows else ()
    data = alt.NamedData(name="catalogue", format=_numbers("power", "proxy", *columns))
    real = "real operands" if len(operands) > 1 else next(iter(operands))
    pairs = alt.vconcat(
        _figures(data, real=real, measured=bool(rows)),
        alt.hconcat(_map(), _histogram(real), spacing=18).resolve_scale(color="independent"),
        data=alt.sequence(0, 65536, as_="i"),
        spacing=8,
    )
    pairs.transform = _pairs(families)
    views = [pairs]
    title = "What does it get wrong, and what does it cost?"
    subtitle = "Errors are computed in this page, of all 65,536 pairs of operands, whenever a control moves."
    if rows:
        title = "What does it get wrong, what does it cost, and does a network care?"
        views.append(alt.hconcat(_place("mae", data), _place("top1", data), spacing=18))
        about = rows[0]
        told = f"{about['dataset']}, {about['n_test']} images, {about['epochs']} epochs, seed {about['seed']}"
        subtitle = [subtitle, f"The network: {about['network']} on {told} ({about['scale']}), nothing retrained."]
    return (
        alt.vconcat(*views, spacing=14)
        .add_params(*_controls(families, list(operands), start, layer), *_derived(families, operands))
        .resolve_scale(color="independent")
        .properties(
            title=alt.Title(title, subtitle=subtitle),
            description="Explorer of approximate multipliers: an error map, a histogram of errors, figures"
            + (", and power against error and accuracy." if rows else "."),
            datasets={"catalogue": _csv(wanted, rows or _prices(wanted), columns)},
        )
    )


def _check(rows: list[dict] | None, operands: Mapping, families: Collection[str], start: str, layer: str) -> list[str]:
    """Refuse what cannot be drawn; returns the names that the controls reach."""
    if not operands:
        raise ValueError(
            "explorer() was given no operands; one layer's are needed, or any two distributions under a name."
        )
    for name, shares in operands.items():
        if [tuple(one.shape) for one in shares] != [(256,), (256,)] or not all(float(one.sum()) > 0 for one in shares):
            raise ValueError(f"The operands of {name!r} must be two distributions, one weight a code, [256] each.")
    if layer and layer not in operands:
        raise ValueError(f"There are no operands of a layer {layer!r}; there are those of {', '.join(operands)}.")
    if unknown := [family for family in families if family not in LABELS]:
        raise ValueError(f"There is no family {unknown[0]!r} with controls; there are {', '.join(LABELS)}.")
    wanted = [name for name in settings() if _family(name) in families]
    if start not in wanted:
        near = difflib.get_close_matches(start, wanted, n=1, cutoff=0)
        hint = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(LABELS)}"
        raise ValueError(f"The controls of {', '.join(families) or 'no family'} do not reach {start!r}; {hint}.")
    check_evidence(rows or [], "multiplier")
    if rows is not None and (missing := set(wanted) - {row["multiplier"] for row in rows}):
        raise ValueError(
            f"{len(missing)} of {len(wanted)} multipliers have no row, {min(missing)!r} among them; make them with"
            " axmoe_lite.explore.rows."
        )
    return wanted


def _family(name: str) -> str:
    return "picks" if name in PICKS else name.split("(")[0]


def _numbers(*columns: str) -> alt.CsvDataFormat:
    return alt.CsvDataFormat(type="csv", parse=dict.fromkeys(columns, "number"))


def _prices(names: list[str]) -> list[dict]:
    found = map(multiplier, names)
    return [{"multiplier": m.name, "power_mw": m.power_mw, "proxy": m.is_proxy} for m in found]


def _csv(names: list[str], rows: list[dict], columns: tuple[str, ...]) -> str:
    """The rows as text: a tenth of the same as JSON objects. ``alias`` is the other name of a published circuit."""
    known, exact = {row["multiplier"]: row for row in rows}, multiplier(EXACT).power_mw
    alias = _ALIAS | {circuit: array for array, circuit in _ALIAS.items()}
    lines = [",".join(["multiplier", "family", "alias", "power", "proxy", *columns])]
    for name in names:
        row = known[name]
        numbers = [f"{float(row['power_mw']) / exact:.4g}", str(int(str(row["proxy"]) == "True"))]
        numbers += [f"{float(row[column]):.4g}" for column in columns]
        lines.append(",".join([f'"{name}"', LABELS[_family(name)], f'"{alias.get(name, "")}"', *numbers]))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- controls


def _controls(families: Collection[str], layers: list[str], start: str, layer: str) -> list[alt.Parameter]:
    """What a reader moves: native inputs, so that Tab and the arrow keys reach them."""
    begin, controls = _family(start), []
    values = dict(zip(KNOBS[begin], map(int, re.findall(r"\d+", start)), strict=True)) if begin in KNOBS else {}
    if len(families) > 1:
        options = [LABELS[family] for family in LABELS if family in families]
        controls.append(
            alt.param(name="family", value=LABELS[begin], bind=alt.binding_radio(options=options, name="family  "))
        )
    if len(layers) > 1:
        bind = alt.binding_select(options=layers, name="real operands of  ")
        controls.append(alt.param(name="layer", value=layer or layers[0], bind=bind))
    for family, knobs in KNOBS.items():
        for knob, (least, most, first) in knobs.items() if family in families else ():
            name = knob if family == "broken_array" else f"{family}_{knob}"
            label = knob if len(families) == 1 else f"{LABELS[family]}: {knob}"
            bind = alt.binding_range(min=least, max=most, step=1, name=f"{label}  ")
            value = values.get(knob, first) if family == begin else first
            controls.append(alt.param(name=name, value=value, bind=bind))
    if "picks" in families:
        bind = alt.binding_select(options=list(PICKS), name="catalogue: pick  ")
        controls.append(alt.param(name="pick", value=start if begin == "picks" else PICKS[0], bind=bind))
    return controls


def _derived(families: Collection[str], operands: Mapping[str, tuple[Tensor, Tensor]]) -> list[alt.Parameter]:
    """What follows from the controls before any pair is looked at.

    ``kind`` is how to compute; ``masks`` holds for each bit of a which bits of b a broken array multiplies it with.
    """
    drops = {p.name: list(p.drops) for p in PUBLISHED}
    picked = "[" + ",".join(str(drops.get(name, [0, 0, 0])) for name in PICKS) + f"][indexof({list(PICKS)},pick)]"
    names = {
        "broken_array": "'broken_array('+drop_a+','+drop_b+','+drop_columns+')'",
        "drum": "'drum('+drum_k+')'",
        "roup": "'roup('+roup_k+','+roup_m+')'",
        "picks": "pick",
    }
    kinds = {f: f"'{f}'" for f in KNOBS} | {
        "picks": "pick=='mitchell()'?'mitchell':pick=='roba()'?'roba':'broken_array'"
    }
    array = {"broken_array": "[drop_a,drop_b,drop_columns]", "picks": picked}
    used = [f"(drops[0]<={i}&&max(drops[1],drops[2]-{i})<8?~((1<<max(drops[1],drops[2]-{i}))-1):0)" for i in range(8)]
    shares = [[_shares(one) for one in pair] for pair in operands.values()]
    layer = f"indexof({list(operands)},layer)" if len(operands) > 1 else "0"
    only = [alt.param(name="family", value=LABELS[next(iter(families))])] if len(families) == 1 else []
    return [
        *only,
        alt.param(name="present", expr=_by_family(names, families)),
        alt.param(name="kind", expr=_by_family(kinds, families)),
        alt.param(name="drops", expr=_by_family(array, families, otherwise="[0,0,0]")),
        alt.param(name="masks", expr=f"[{','.join(used)}]"),
        alt.param(name="operand_shares", value=shares),
        alt.param(name="real", expr=f"operand_shares[{layer}]"),
    ]


def _by_family(expressions: Mapping[str, str], families: Collection[str], *, otherwise: str = "''") -> str:
    """The expression of the family that is chosen."""
    cases = [f"family=='{LABELS[f]}'?({expression})" for f, expression in expressions.items() if f in families]
    return ":".join([*cases, otherwise])


def _shares(weights: Tensor) -> list[float]:
    return [float(f"{share:.4g}") for share in (weights.double() / weights.sum()).tolist()]


# ------------------------------------------------------------------------- all pairs, and their errors


def _pairs(families: Collection[str]) -> list[alt.Transform]:
    """Of each pair ``i``: a, b, its place on the map, its error, the error's class, and how often it really occurs.

    What no control changes comes first: Vega computes it once.
    """
    still = {"a": "floor(datum.i/256)-128", "b": "datum.i%256-128"}
    still |= {side * 2: f"floor((datum.{operand}+128)/{TILE})*{TILE}-128" for side, operand in (("x", "a"), ("y", "b"))}
    if set(families) & {"drum", "picks"}:
        for operand in "ab":  # its size, and the power of two that leads it
            still[f"size_{operand}"] = f"abs(datum.{operand})"
            lead = "".join(f"datum.size_{operand}>={2**n}?{2**n}:" for n in range(7, -1, -1))
            still[f"lead_{operand}"] = f"{lead}0"
    moving = {
        "share": "real[0][datum.a+128]*real[1][datum.b+128]",
        "error": _error(families),
        "class": f"datum.error==0?0:(datum.error>0?1:-1)*min({max(ERROR_CLASSES)},"
        "floor(log(abs(datum.error))/LN2+1e-9)+1)",  # a logarithm of 8 may come out just below 3
        "real_error": "datum.share*datum.error",
    }
    return [alt.CalculateTransform(calculate=what, **{"as": name}) for name, what in (still | moving).items()]


def _error(families: Collection[str]) -> str:
    """M(a, b) - a b as Vega's own arithmetic, of every family (the docstrings of multipliers/families.py say why)."""
    sign = "(datum.a<0!=datum.b<0?-1:1)*"
    bits = "+".join(f"((datum.a>>{i})&1)*{-128 if i == 7 else 1 << i}*(datum.b&masks[{i}])" for i in range(8))
    kinds = {"broken_array": f"{bits}-datum.a*datum.b"}
    if "drum" in families:
        unit = "(datum.lead_{0}>>(drum_k-1))"  # of the last bit that is kept; 0 where all are
        short = f"(datum.lead_{{0}}>>drum_k?((datum.size_{{0}}/{unit})|1)*{unit}:datum.size_{{0}})"
        kinds["drum"] = f"{sign}({short.format('a')}*{short.format('b')}-datum.size_a*datum.size_b)"
    if "roup" in families:
        terms = []
        for j in range(4):
            cut = f"max(roup_m-{2 * j},0)"
            rounded = f"({cut}?((datum.a>>{cut})+((datum.a>>({cut}-1))&1))<<{cut}:datum.a)"
            before = f"+((datum.b>>{2 * j - 1})&1)" if j else ""
            digit = f"(-2*((datum.b>>{2 * j + 1})&1)+((datum.b>>{2 * j})&1){before})"
            terms.append(f"(roup_k<={j}?{rounded}*{digit}*{4**j}:0)")
        kinds["roup"] = f"{'+'.join(terms)}-datum.a*datum.b"
    if "picks" in families:
        scale = "datum.lead_a*datum.lead_b"
        rest = "((datum.size_a-datum.lead_a)*datum.lead_b+datum.lead_a*(datum.size_b-datum.lead_b))"
        kinds["mitchell"] = f"{sign}(({rest}<{scale}?{scale}+{rest}:2*{rest})-datum.size_a*datum.size_b)"
        up = "2*datum.size_{0}>=3*datum.lead_{0}&&datum.size_{0}>1&&datum.size_{0}!=3"
        near = f"(({up}?2:1)*datum.lead_{{0}}-datum.size_{{0}})"  # a_r b + a b_r - a_r b_r - a b
        kinds["roba"] = f"-{sign}{near.format('a')}*{near.format('b')}"
    return ":".join([*(f"kind=='{kind}'?{what}" for kind, what in kinds.items()), "0"])


# ---------------------------------------------------------------------------------- views


def _map() -> alt.Chart:
    """Mean error of 4 x 4 neighbours; one colour scale for all multipliers, near zero linear and then logarithmic."""
    largest = 16384
    axis = alt.Axis(values=[-128, -64, 0, 64, 127], grid=False)
    scale = alt.Scale(domain=[-128, 128], nice=False)
    labels = (
        "datum.value==0?'0':(datum.value<0?'−':'+')+(abs(datum.value)>=1000?abs(datum.value)/1000+'k':abs(datum.value))"
    )
    return (
        alt.Chart()
        .transform_aggregate(mean="mean(error)", groupby=["xx", "yy"])
        .transform_calculate(x2=f"datum.xx+{TILE}", y2=f"datum.yy+{TILE}")
        .mark_rect(strokeWidth=0, aria=False)
        .encode(
            x=alt.X("xx:Q", title="activation a", axis=axis, scale=scale),
            x2="x2:Q",
            y=alt.Y("yy:Q", title="weight b", axis=axis, scale=scale),
            y2="y2:Q",
            color=alt.Color(
                "mean:Q",
                title="mean error of 4 × 4 pairs (logarithmic)",
                scale=alt.Scale(type="symlog", scheme="blueorange", domain=[-largest, largest], clamp=True),
                legend=alt.Legend(
                    orient="bottom",
                    gradientLength=256,
                    titleLimit=256,
                    labelExpr=labels,
                    values=[-10000, -100, -1, 1, 100, 10000],
                ),
            ),
            tooltip=[
                alt.Tooltip("xx:Q", title="a from"),
                alt.Tooltip("yy:Q", title="b from"),
                alt.Tooltip("mean:Q", title="mean error", format=".1f"),
            ],
        )
        .properties(width=256, height=256, title=alt.Title("Where is it wrong?", fontSize=13))  # 64 cells: no seams
    )


_BY_CLASS = {
    "pairs": "count()",
    "errors": "sum(error)",
    "real_errors": "sum(real_error)",
    "often": "sum(share)",
    "least": "min(error)",
    "most": "max(error)",
}


def _histogram(real: str) -> alt.Chart:
    """How often errors of each size occur, if all pairs do equally often, and with the operands of a layer."""
    uniform, ticks = "all pairs alike", [-15, -11, -7, -3, 0, 3, 7, 11, 15]
    label = "(datum.value<0?'−':'+')+(abs(datum.value)>10?pow(2,abs(datum.value)-11)+'k':pow(2,abs(datum.value)-1))"
    bars = (
        alt.Chart()
        .transform_aggregate(**_BY_CLASS, groupby=["class"])
        .transform_joinaggregate(total="sum(often)")
        .transform_calculate(**{uniform: "datum.pairs/65536", real: "datum.often/datum.total"})
        .transform_fold([uniform, real], as_=["operands", "part"])
        .transform_calculate(
            left=f"datum.class-(datum.operands=='{uniform}'?0.42:0)", right="datum.left+0.42", zero="0"
        )
        .mark_rect()
        .encode(
            x=alt.X(
                "left:Q",
                title="error, in classes that double; 0 is right",
                scale=alt.Scale(domain=[-15.6, 15.6], nice=False),
                axis=alt.Axis(values=ticks, labelExpr=f"datum.value==0?'0':{label}", grid=False),
            ),
            x2="right:Q",
            y=alt.Y(
                "part:Q",
                title="share of products (root scale)",
                scale=alt.Scale(type="sqrt", domain=[0, 1], nice=False),
                axis=alt.Axis(values=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], format="%"),
            ),
            y2="zero:Q",
            color=alt.Color(
                "operands:N", scale=alt.Scale(domain=[uniform, real], range=[BLUE, ORANGE]),
                legend=alt.Legend(orient="top-left", title=None, offset=6),
            ),
            tooltip=["operands:N", alt.Tooltip("part:Q", title="share", format=".1%"),
                     alt.Tooltip("least:Q", title="errors from"), alt.Tooltip("most:Q", title="to")],
        )
    )  # fmt: skip
    return bars.properties(width=256, height=256, title=alt.Title("How often, and how far?", fontSize=13))


def _figures(data: alt.NamedData, *, real: str, measured: bool) -> alt.LayerChart:
    """The numbers, large: those of all pairs, and those of the row."""
    real_mean = f"'{real.removesuffix(' operands')}: '+format(datum.real_{{0}}/datum.often,'{{1}}')"
    means = (
        alt.Chart()
        .transform_aggregate(**_BY_CLASS, groupby=["class"])
        .transform_calculate(  # errors of one class have one sign
            sizes="abs(datum.errors)", real_sizes="abs(datum.real_errors)", wrong="datum.class==0?0:datum.pairs",
            worst="max(abs(datum.least),abs(datum.most))",
        )
        .transform_aggregate(
            mae="sum(sizes)", real_mae="sum(real_sizes)", bias="sum(errors)", real_bias="sum(real_errors)",
            often="sum(often)", wrong="sum(wrong)", worst="max(worst)",
        )
    )  # fmt: skip
    mine = alt.Chart(data).transform_filter("datum.multiplier==present")
    figures = [  # of what, what it is, its value, a note
        (mine, "power, of exact", "format(datum.power,'.0%')", "datum.proxy?'a proxy':'published'"),
        (mine, "exact rank", "format(datum.rank,'d')", "'exact product'+(datum.rank>1?'s':'')"),
        (means, "mean |error|", "format(datum.mae/65536,'.1f')", real_mean.format("mae", ".1f")),
        (means, "lean (mean)", "format(datum.bias/65536,'+.2f')", real_mean.format("bias", "+.2f")),
        (means, "worst |error|", "format(datum.worst,'d')", "format(datum.wrong/65536,'.1%')+' are wrong'"),
        (mine, "network's top-1", "format(datum.top1,'.1%')", "'of the test images'"),
    ]
    figures = [figure for n, figure in enumerate(figures) if measured or n not in (1, 5)]
    name = (
        mine.transform_calculate(text="datum.multiplier+(datum.alias?'  =  '+datum.alias:'')")
        .mark_text(align="left", baseline="top", fontSize=15, fontWeight="bold", color=RED)
        .encode(x=alt.value(-_MARGIN), y=alt.value(2), text="text:N")
    )
    drawn = [text for slot, figure in enumerate(figures) for text in _texts(slot * _SLOT - _MARGIN, *figure)]
    return alt.layer(name, *drawn).properties(width=len(figures) * _SLOT - _MARGIN, height=80)


def _texts(x: int, base: alt.Chart, label: str, value: str, note: str) -> list[alt.Chart]:
    """One figure: what it is, its value, and a note below."""
    drawn = []
    for text, y, style in (
        (repr(label), 26, {"fontSize": 12, "color": "#555"}),
        (value, 42, {"fontSize": 21, "fontWeight": "bold"}),
        (note, 68, {"fontSize": 12, "color": "#555"}),
    ):
        mark = base.transform_calculate(text=text).mark_text(align="left", baseline="top", **style)
        drawn.append(mark.encode(x=alt.value(x), y=alt.value(y), text="text:N"))
    return drawn


def _place(what: str, data: alt.NamedData) -> alt.LayerChart:
    """Power against mean |error|, or against the network's accuracy: all rows faint, the present one marked."""
    axes = {
        "mae": alt.Y(
            "mae:Q",
            title="mean |error|, product units",
            scale=alt.Scale(type="symlog", domain=[0, 4000], nice=False),
            axis=alt.Axis(values=[0, 1, 10, 100, 1000], format="d"),
        ),
        "top1": alt.Y(
            "top1:Q",
            title="the network's top-1",
            scale=alt.Scale(domain=[0, 1.02], nice=False),
            axis=alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format="%"),
        ),
    }
    x = alt.X(
        "power:Q",
        title="power, exact array = 100 % (root scale)",
        scale=alt.Scale(type="sqrt", domain=[0, 2.4], nice=False),
        axis=alt.Axis(values=[0, 0.1, 0.25, 0.5, 1, 2], format="%"),
    )
    tooltip = ["multiplier:N", alt.Tooltip("power:Q", format=".0%"), alt.Tooltip("mae:Q", title="mean |error|")]
    tooltip.append(alt.Tooltip("top1:Q", title="top-1", format=".1%"))
    base = alt.Chart(data).encode(x=x, y=axes[what], tooltip=tooltip)
    all_rows = base.mark_circle(size=22, color=OTHERS, opacity=1)
    family = base.transform_filter("datum.family==family").mark_circle(size=22, color=SKY, opacity=1)
    mine = base.transform_filter("datum.multiplier==present")
    point = mine.mark_point(size=130, filled=True, color=RED, stroke="white", opacity=1)
    title = {"mae": "What does it save?", "top1": "Does the network care?"}[what]
    return alt.layer(all_rows, family, point).properties(
        width={"mae": 256, "top1": 256}[what],
        height=200,
        title=alt.Title(title, fontSize=13, subtitle="Red: this one. Blue: its family. Grey: all the others."),
    )

"""What is known of the tests: cases by what they tried, bugs planted, memory under load.

Chapter: 23, "How do you know?"
"""

import altair as alt
import pandas as pd

from axmoe_lite.plots.theme import BLUE, GREY, RED, check_evidence

_KINDS = {
    "law": "a fast path equals the slow one",
    "rule": "a known change has a known effect",
    "input": "something broken from outside",
    "fault": "something breaks under way",
    "load": "much of it",
}
_ENDED = {"all passed": BLUE, "some failed": RED, "skipped where recorded": GREY}
_ROOMS = ("multipliers", "factors", "kernels", "quant", "layers", "pipeline", "moe", "models", "datasets", "train")
_ROOMS += ("cost", "study", "runs", "claims")


def _check(rows: list[dict], key: str, asked: str, made_by: str) -> None:
    if not rows:
        raise ValueError(f"{asked} was given no rows; {made_by} in a checkout records them.")
    check_evidence(rows, key)


def tried(rows: list[dict]) -> alt.Chart:
    """A dot for each thing that the tests try, at the number of cases (log scale); a menu picks the kind.

    Args:
        rows: of the study ``trust``, as :func:`axmoe_lite.runs.read` returns them.

    Raises:
        ValueError: for no rows, rows without evidence, or a kind that is not known.
    """
    _check(rows, "what", "tried()", "pytest -m trust --record-trust")
    table = pd.DataFrame(rows).astype({"cases": int, "tests": int, "failed": int, "skipped": int})
    if unknown := sorted(set(table["kind"]) - set(_KINDS)):
        raise ValueError(f"There are rows of the kind {unknown[0]!r}; there are {', '.join(_KINDS)}.")
    table["ended"] = "all passed"
    table.loc[table["skipped"] == table["tests"], "ended"] = "skipped where recorded"
    table.loc[table["failed"] > 0, "ended"] = "some failed"
    table["of"] = table["kind"].map(_KINDS)
    table["drawn"] = table["cases"].clip(lower=1)  # a logarithm has no place for none
    ended = [name for name in _ENDED if (table["ended"] == name).any()]
    kinds = [told for told in _KINDS.values() if (table["of"] == told).any()]
    menu = alt.param("tried_kind", value=kinds[0], bind=alt.binding_select(options=kinds, name="what was tried  "))
    line = (
        alt.Chart(table)
        .transform_filter("datum.of == tried_kind")
        .encode(
            x=alt.X(
                "drawn:Q",
                scale=alt.Scale(type="log", domain=[1, 2 * int(table["drawn"].max())]),
                title="cases (log scale)",
                axis=alt.Axis(format="~s", values=[10**n for n in range(7)]),
            ),
            y=alt.Y("what:N", title=None, sort="-x", axis=alt.Axis(labelLimit=430)),
            color=alt.Color(
                "ended:N",
                scale=alt.Scale(domain=ended, range=[_ENDED[e] for e in ended]),
                title=None,
                legend=alt.Legend(orient="top") if len(ended) > 1 else None,
            ),
            tooltip=["what", "cases", "tests", "failed", "skipped", "seconds", "commit", "date", "device"],
        )
    )
    stems = line.mark_rule(strokeWidth=1.5).encode(x2=alt.datum(1))
    dots = line.mark_point(filled=True, size=60, opacity=1)
    return (stems + dots).add_params(menu).properties(width=205, height=alt.Step(19))


def planted(rows: list[dict]) -> alt.Chart:
    """A dot for each bug that was planted, filled if a test caught it; a row for each part of the package.

    Args:
        rows: of the study ``mutations``, as :func:`axmoe_lite.runs.read` returns them.

    Raises:
        ValueError: for no rows, or rows without evidence.
    """
    _check(rows, "name", "planted()", "python tests/mutations.py --record")
    table = pd.DataFrame(rows)
    table["part"] = [file.split("/")[1].removesuffix(".py") for file in table["file"]]
    table["became"] = ["caught" if test else "survived" for test in table["caught_by"]]
    table = table.sort_values(["part", "became"])
    table["place"] = table.groupby("part").cumcount() + 1
    order = [room for room in _ROOMS if room in set(table["part"])] + sorted(set(table["part"]) - set(_ROOMS))
    colors = alt.Scale(domain=["caught", "survived"], range=[BLUE, RED])
    return (
        alt.Chart(table)
        .mark_point(size=150, strokeWidth=2, opacity=1)
        .encode(
            x=alt.X("place:Q", title="bugs planted", axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("part:N", title=None, sort=order),
            color=alt.Color("became:N", scale=colors, title=None, legend=alt.Legend(orient="top")),
            fill=alt.Fill(
                "became:N", scale=alt.Scale(domain=["caught", "survived"], range=[BLUE, "white"]), legend=None
            ),
            tooltip=[alt.Tooltip("what", title="bug"), alt.Tooltip("caught_by", title="caught by"), "seconds", "file"],
        )
        .properties(width=420, height={"step": 24})
    )


_HELD = {"memory_mb": "memory, MB", "handles": "open files", "threads": "threads", "children": "processes started"}


def soak(rows: list[dict]) -> alt.Chart:
    """What a process holds on to, ten times on the way through many runs, and through many rounds inside one process.

    Args:
        rows: of the study ``soak``, as :func:`axmoe_lite.runs.read` returns them; those that were measured only once,
            such as the collector's, are left out.

    Raises:
        ValueError: for no rows, rows without evidence, or if nothing was measured twice.
    """
    _check(rows, "what", "soak()", "python tests/soak.py --runs 1000 --record")
    table = pd.DataFrame(rows)
    table = table[table.groupby("what")["at"].transform("count") > 1]
    if table.empty:
        raise ValueError("soak() was given nothing that was measured twice; a line needs two points.")
    kept = ["what", "at", *_HELD, "commit", "date", "device"]
    long = table[kept].melt(["what", "at", "commit", "date", "device"], var_name="of", value_name="held")
    long = long.astype({"at": int, "held": float}).replace({"of": _HELD})
    return (
        alt.Chart(long)
        .mark_line(point=alt.OverlayMarkDef(size=45), strokeWidth=2)
        .encode(
            x=alt.X("at:Q", title="runs, or rounds", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=2)),
            y=alt.Y("held:Q", title=None, scale=alt.Scale(zero=True), axis=alt.Axis(tickMinStep=1, tickCount=4)),
            color=alt.Color("what:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=["what", "at", "of", "held", "commit", "date", "device"],
        )
        .properties(width=210, height=110)
        .facet(facet=alt.Facet("of:N", title=None, sort=[*_HELD.values()]), columns=2)
        .resolve_scale(y="independent")
    )

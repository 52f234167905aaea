"""A sweep as it went: which run was at work when.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import altair as alt
import pandas as pd

from axmoe_lite.plots.theme import BLUE, GREY, RED

_STATES = {"finished": BLUE, "failed": RED, "not run": GREY}
_HEADER = alt.Header(labelAngle=0, labelAlign="left")


def timeline(sweeps: dict[str, list[dict]]) -> alt.Chart:
    """A bar a run, from its start to its end; one panel a sweep, its seconds counted from its first start.

    Args:
        sweeps: by name, outcomes as :func:`axmoe_lite.runs.sweep` returns them.

    Raises:
        ValueError: if no run of a sweep has started and ended.
    """
    rows = []
    for name, outcomes in sweeps.items():
        ran = [outcome for outcome in outcomes if outcome["started"] and outcome["ended"]]
        if not ran:
            raise ValueError(f"No run of {name!r} has started and ended; there is nothing to draw.")
        spans = [(pd.Timestamp(o["started"]), pd.Timestamp(o["ended"]), o) for o in ran]
        first = min(start for start, _, _ in spans)
        for number, (start, end, outcome) in enumerate(sorted(spans, key=lambda span: span[0]), start=1):
            given = " ".join(f"{key}={value}" for key, value in outcome["parameters"].items())
            row = {"sweep": name, "run": f"{number}", "state": outcome["state"], "parameters": given}
            row |= {"begins": (start - first).total_seconds(), "ends": (end - first).total_seconds()}
            rows.append({**row, "memory_mb": outcome["peak_mb"]})
    states = [state for state in _STATES if any(row["state"] == state for row in rows)]
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(height={"band": 0.7}, cornerRadius=2)
        .encode(
            x=alt.X("begins:Q", title="seconds since the sweep's first run began"),
            x2="ends:Q",
            y=alt.Y("run:N", title="run", sort=None),
            color=alt.Color("state:N", scale=alt.Scale(domain=states, range=[_STATES[s] for s in states]), legend=None),
            tooltip=["parameters", "state", alt.Tooltip("begins", format=".1f"), alt.Tooltip("ends", format=".1f"),
                     alt.Tooltip("memory_mb", title="memory, MB")],
        )
        .properties(width=520, height={"step": 22})
        .facet(row=alt.Row("sweep:N", title=None, sort=list(sweeps), header=_HEADER))
        .resolve_scale(y="independent")
    )  # fmt: skip

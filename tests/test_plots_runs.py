"""The picture of a sweep: a bar a run, counted from the sweep's own start."""

import pytest

from axmoe_lite import plots


def outcome(n: int, start: str, end: str, state: str = "finished") -> dict:
    times = {"started": start and f"2026-11-21T05:00:{start}+00:00", "ended": f"2026-11-21T05:00:{end}+00:00"}
    return {"run": f"toy/{n}", "parameters": {"n": n}, "state": state, "peak_mb": 100, **times}


def test_bars_begin_where_their_run_did():
    late = [outcome(2, "13.500", "15.000"), outcome(1, "10.000", "13.250", "failed")]
    lost = {"run": "toy/3", "parameters": {"n": 3}, "state": "not run", "peak_mb": "", "started": "", "ended": ""}
    rows = plots.timeline({"one": [*late, lost], "two": [outcome(4, "30.000", "31.000")]}).data.to_dict("records")
    assert [(r["sweep"], r["run"], r["begins"], r["ends"], r["state"]) for r in rows] == [
        ("one", "1", 0.0, 3.25, "failed"),
        ("one", "2", 3.5, 5.0, "finished"),
        ("two", "1", 0.0, 1.0, "finished"),
    ]
    with pytest.raises(ValueError, match="No run of 'none' has started and ended"):
        plots.timeline({"none": [lost]})

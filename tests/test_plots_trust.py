"""The figures of what was tried: every row is a dot, and how it ended is its colour."""

import pytest

from axmoe_lite import plots, runs

ORIGIN = {**runs.evidence(0, scale="paper", seed=0, epochs=0), "seconds": "1.5"}


def row(kind: str, what: str, *, cases: int = 10, tests: int = 2, failed: int = 0, skipped: int = 0) -> dict:
    counts = {"cases": cases, "tests": tests, "failed": failed, "skipped": skipped}
    return {"kind": kind, "what": what} | {name: str(n) for name, n in counts.items()} | ORIGIN


def test_a_dot_for_each_thing_tried_and_its_colour_is_how_it_ended():
    rows = [
        row("law", "products", cases=4000),
        row("fault", "a full disk", failed=1),
        row("fault", "a worker is killed", skipped=1),  # one of two: the other passed
        row("law", "on a card", cases=0, skipped=2),
    ]
    drawn = {r["what"]: r for r in plots.tried(rows).data.to_dict("records")}
    assert {what: r["ended"] for what, r in drawn.items()} == {
        "products": "all passed",
        "a full disk": "some failed",
        "a worker is killed": "all passed",
        "on a card": "skipped where recorded",
    }
    assert drawn["products"]["drawn"] == 4000 and drawn["on a card"]["drawn"] == 1 and drawn["on a card"]["cases"] == 0
    plots.tried(rows).to_dict()  # a valid chart


def test_unknown_kinds_and_rows_without_evidence_are_not_drawn():
    with pytest.raises(ValueError, match="of the kind 'luck'; there are law, rule, input, fault, load"):
        plots.tried([row("luck", "dice")])
    with pytest.raises(ValueError, match="A row for 'products' lacks commit"):
        plots.tried([{**row("law", "products"), "commit": ""}])


def bug(file: str, caught_by: str = "tests/test_x.py::test_y") -> dict:
    return {"name": file, "what": "something", "file": f"axmoe_lite/{file}", "caught_by": caught_by, **ORIGIN}


def test_bugs_stand_in_their_part_of_the_package_in_the_order_of_the_house():
    chart = plots.planted([bug("runs/store.py"), bug("cost.py"), bug("runs/sweep.py", ""), bug("book/pages.py")])
    drawn = chart.data.to_dict("records")
    assert sorted((r["part"], r["place"], r["became"]) for r in drawn) == [
        ("book", 1, "caught"),
        ("cost", 1, "caught"),
        ("runs", 1, "caught"),
        ("runs", 2, "survived"),
    ]
    assert chart.to_dict()["encoding"]["y"]["sort"] == ["cost", "runs", "book"]
    with pytest.raises(ValueError, match="A row for 'cost.py' lacks date"):
        plots.planted([{**bug("cost.py"), "date": ""}])


def held(what: str, at: int, memory_mb: float) -> dict:
    return {"what": what, "at": str(at), "memory_mb": str(memory_mb), "handles": "9", "threads": "3", "children": "0"}


def test_what_is_held_is_a_line_for_each_load_from_zero():
    rows = [held("runs", 100, 512.5) | ORIGIN, held("runs", 200, 513.0) | ORIGIN, held("rows", 10**6, 700.0) | ORIGIN]
    chart = plots.soak(rows)
    drawn = {(r["of"], r["at"]): r["held"] for r in chart.data.to_dict("records")}
    assert drawn["memory, MB", 100] == 512.5 and drawn["open files", 200] == 9 and len(drawn) == 8  # rows: only once
    assert chart.to_dict()["spec"]["encoding"]["y"]["scale"] == {"zero": True}
    with pytest.raises(ValueError, match="nothing that was measured twice"):
        plots.soak(rows[2:])


def test_where_nothing_was_recorded_the_command_is_said():
    for chart, command in ((plots.tried, "record-trust"), (plots.planted, "mutations.py"), (plots.soak, "soak.py")):
        with pytest.raises(ValueError, match=rf"was given no rows; .*{command}"):
            chart([])

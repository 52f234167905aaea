"""plots.places: bars of work, a map of a placement, and fronts of energy, drawn from numbers that are known."""

import numpy as np
import pytest

from axmoe_lite import cost, plots
from axmoe_lite.runs import EVIDENCE
from axmoe_lite.search import places
from axmoe_lite.search.stream import Streamed


def rows_of(chart) -> list[dict]:
    spec = chart.to_dict()
    return [row for table in spec["datasets"].values() for row in table]


def test_gantt_counts_from_the_first_start_in_its_unit() -> None:
    spans = [(7, "b", 2.001, 2.004), (6, "a", 2.000, 2.002)]
    chart = plots.gantt(spans, unit="ms")
    drawn = {row["image"]: row for row in rows_of(chart) if "image" in row}
    assert (drawn[7]["start"], drawn[7]["end"]) == (pytest.approx(1.0), pytest.approx(4.0))
    assert drawn[6]["start"] == 0
    spec = chart.to_dict()
    (slider,) = [p for p in spec["params"] if p["name"] == "now"]
    assert slider["value"] == slider["bind"]["max"] == pytest.approx(4.06)  # 58 steps of 0.07: the first past 4.0
    assert slider["bind"]["step"] == pytest.approx(0.07)  # 4 / 60, to one digit


def test_gantt_draws_only_what_has_begun() -> None:
    spec = plots.gantt([(0, "a", 0.0, 1.0), (1, "a", 1.0, 2.0)], unit="s").to_dict()
    assert {"filter": "datum.start <= now"} in spec["layer"][0]["transform"]


def test_gantt_refuses() -> None:
    with pytest.raises(ValueError, match="no spans"):
        plots.gantt([])
    with pytest.raises(ValueError, match="hours"):
        plots.gantt([(0, "a", 0.0, 1.0)], unit="hours")


def placed() -> tuple[places.Placed, dict, cost.Macs]:
    layers = {"stem": (30.0, 30.0), "x.experts.0": (15.0, 20.0), "x.experts.1": (5.0, 20.0)}
    macs = cost.Macs({name: cost.LayerMacs("conv", *both) for name, both in layers.items()}, 0, 1)
    parts = {name: [name] for name in layers}
    where = {"stem": "big", "x.experts.0": "big", "x.experts.1": "little"}
    return places.put(macs, parts, where, {"x.experts.1": "mul8s_1L2L"}), parts, macs


def test_places_map_shows_place_circuit_and_use() -> None:
    drawn = {row["part"]: row for row in rows_of(plots.places_map(*placed()))}
    assert drawn["stem"]["expert"] == "all inputs" and drawn["stem"]["inputs"] == 1
    one = drawn["x.experts.1"]
    assert (one["layer"], one["expert"], one["core"], one["circuit"]) == ("x", "expert 1", "little", "L2L")
    assert one["inputs"] == pytest.approx(0.25)
    assert drawn["x.experts.0"]["circuit"] == "KV6"


def test_energy_fronts_needs_evidence() -> None:
    row = {"family": "dense, exact", "energy": 0.5, "speedup": 1.2, "throughput": 100.0}
    with pytest.raises(ValueError, match="dense, exact"):
        plots.energy_fronts([row])
    row |= dict.fromkeys(EVIDENCE, "x")
    (drawn,) = rows_of(plots.energy_fronts([row]))
    assert (drawn["energy"], drawn["speedup"]) == (0.5, 1.2)


def test_crossings_has_a_panel_a_network() -> None:
    streamed = {
        (n, p, us): Streamed(10.0 - us, np.ones(2), {"big": 1.0}, 4.0, [])
        for n in ("dense", "hard")
        for p in ("anywhere", "consecutive")
        for us in (0, 5)
    }
    chart = plots.crossings(streamed)
    assert chart.to_dict()["facet"]["column"]["sort"] == ["dense", "hard"]
    assert {row["images_per_s"] for row in rows_of(chart) if row["crossing_us"] == 5} == {5.0}
    assert len(rows_of(chart)) == 8
    with pytest.raises(ValueError, match="nothing"):
        plots.crossings({})

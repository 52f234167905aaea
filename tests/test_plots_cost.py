"""Cost figures: the front is the front, bars are what was counted, and the slider computes P_norm."""

import json
import random
import re

import pytest
import vl_convert

from axmoe_lite import cost, multiplier, plots, runs, study
from axmoe_lite.plots.theme import _html


@pytest.fixture(scope="module")
def rows():
    """Two small networks; a cluster's gateway of normal size is many times what they cost."""
    options = {"size": 8, "classes": 10, "experts": 3, "topologies": ["dense", "hard", "soft"]}
    return [row for name in ("resnet8", "resnet20") for row in study.footprint(name, **options)]


@pytest.fixture
def measured(textures):
    origin = runs.evidence(textures, scale="quick", seed=0, epochs=2)

    def row(topology, regime, p_norm, top1, circuit="mul8s_1L2L"):
        row = {"network": "resnet8", "topology": topology, "regime": regime, "multiplier": circuit}
        return {**row, "p_norm": p_norm, "top1": top1, **origin, "seconds": 1.0}

    return [
        row("dense", "not retrained", 1, 0.9, "mul8s_1KV6"),
        row("dense", "not retrained", 0.47, 0.3),
        row("hard", "retrained", 0.47, 0.8),
        row("soft", "retrained", 1.2, 0.85),
        row("dense", "not retrained", 1, 0.95, "float32"),
    ]


def texts(chart):
    """What the chart draws as text, in whatever order."""
    return re.findall(r">([^<>]+)</text>", vl_convert.vegalite_to_svg(chart.to_dict()))


def test_the_front_by_hand():
    places = [(1, 0.5), (2, 0.7), (3, 0.7), (2, 0.6), (0.5, 0.1), (4, 0.9), (1, 0.5), (5, 0.89)]
    # (3, .7) and (2, .6) lose to (2, .7), (5, .89) to (4, .9); the twins (1, .5) do not beat each other.
    expected = [(0.5, 0.1), (1, 0.5), (1, 0.5), (2, 0.7), (4, 0.9)]
    found = plots.pareto([{"p_norm": str(c), "top1": str(t)} for c, t in places])  # text, as from a file
    assert [(float(row["p_norm"]), float(row["top1"])) for row in found] == expected
    assert plots.pareto([]) == []
    assert plots.pareto([{"ms": 2, "hits": 1}, {"ms": 1, "hits": 1}], cost="ms", value="hits") == [{"ms": 1, "hits": 1}]


def test_no_row_outside_the_front_is_undominated():
    draw = random.Random(0)
    rows = [{"p_norm": draw.randrange(12), "top1": draw.randrange(12)} for _ in range(60)]
    front = plots.pareto(rows)

    def beats(a, b):
        return a["p_norm"] <= b["p_norm"] and a["top1"] >= b["top1"] and a != b

    assert all(any(beats(a, b) for a in rows) != (b in front) for b in rows)
    assert [row["p_norm"] for row in front] == sorted(row["p_norm"] for row in front)


def test_bars_say_what_was_counted(rows):
    found = texts(plots.executed_stored(rows))
    for row in rows:
        assert f"{row['executed'] / row['base']:.2f}" in found
    assert f"resnet20: {rows[3]['base'] / 1e6:,.1f} M" in found


@pytest.mark.parametrize("circuit", ["mul8s_1L2L", "mul8s_1KV6", "mul8s_1L12"])
def test_the_sliders_arithmetic_is_p_norm(rows, circuit):
    """Vega's own expression at the slider's place, against equation (1)."""
    spec = plots.cost_explorer(rows, start=circuit).to_dict()
    (slider,) = spec["params"]
    power = slider["value"] / 100 * multiplier("mul8s_1KV6").power_mw
    found = texts(plots.cost_explorer(rows, start=circuit))
    for row in rows:
        expected = cost.p_norm(
            executed=row["executed"], base=row["base"], share=row["approximated_share"], power_mw=power
        )
        assert any(text in found for text in (f"{expected:.2f}", f"{expected - 1e-4:.2f}", f"{expected + 1e-4:.2f}"))
    assert any(text.startswith(f"{circuit[7:]} has ") for text in found)


def test_accuracy_against_cost(measured):
    spec = plots.accuracy_cost(measured).to_dict()
    text = json.dumps(spec)
    assert "resnet8, synthetic, 64 test images (quick), seed 0" in text and "float32" not in text
    data = {name: rows for name, rows in spec["datasets"].items()}
    (front,) = [rows for rows in data.values() if "regimes" in rows[0]]
    by_choice = {
        choice: [(r["circuit"], r["p_norm"], r["top1"]) for r in front if r["regimes"] == choice]
        for choice in ("both", "not retrained", "retrained")
    }
    # Each front goes on, unnamed, to the dearest mark.
    assert by_choice["both"] == [("L2L", 0.47, 0.8), ("KV6", 1, 0.9), ("", 1.2, 0.9)]
    assert by_choice["not retrained"] == [("L2L", 0.47, 0.3), ("KV6", 1, 0.9), ("", 1.2, 0.9)]
    assert by_choice["retrained"] == [("L2L", 0.47, 0.8), ("L2L", 1.2, 0.85), ("", 1.2, 0.85)]


def test_a_mark_is_the_mean_over_seeds_and_near_ones_share_a_name(measured):
    again = {**measured[0], "seed": 1, "top1": 0.8}
    near = {**measured[0], "multiplier": "mul8s_1KV8", "p_norm": 0.99, "top1": 0.84}
    spec = plots.accuracy_cost([measured[0], measured[1], again, near]).to_dict()
    marks = next(rows for rows in spec["datasets"].values() if "topology" in rows[0])
    exact = [(row["top1"], row["seed"]) for row in marks if row["multiplier"] == "mul8s_1KV6"]
    assert exact == [(pytest.approx(0.85), "0, 1")] and "seeds 0, 1" in json.dumps(spec)
    front = next(rows for rows in spec["datasets"].values() if "regimes" in rows[0])
    assert [row["circuit"] for row in front if row["regimes"] == "both"] == ["L2L", "KV8", "", ""]


def test_rows_without_evidence_are_not_drawn(measured):
    with pytest.raises(ValueError, match="lacks commit"):
        plots.accuracy_cost([{**measured[0], "commit": ""}])
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.accuracy_cost(measured[-1:])


def test_charts_stay_small_and_name_no_address(rows, measured, monkeypatch):
    monkeypatch.setenv("AXMOE_BOOK", "1")
    for chart in (plots.executed_stored(rows), plots.cost_explorer(rows), plots.accuracy_cost(measured)):
        spec = chart.to_dict()
        html = _html(spec)["text/html"]
        assert len(html) < 100_000 and "http" not in html.replace(spec["$schema"], "")

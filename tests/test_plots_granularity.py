"""The figures of granularity and of searches: counts by hand, evidence, one look for each family, areas by hand."""

import re

import pytest
import vl_convert

from axmoe_lite import EVOAPPROX, EXACT, multiplier, plots, runs
from axmoe_lite.multipliers import weight_map
from axmoe_lite.search import Found

ORIGIN = {**runs.evidence(10_000, scale="paper", seed=0, epochs=60), "dataset": "cifar100", "seconds": 1.0}
ORIGIN |= {"commit": "0123456789", "device": "a processor", "regime": "norms refreshed", "n_validation": 1000}


def row(family, p_norm, top1, **other) -> dict:
    return {"family": family, "p_norm": p_norm, "top1": top1, "accuracy": top1, "multipliers": 2, "evaluated": 40} | {
        **{"search_seconds": 12.5, **ORIGIN},
        **other,
    }


ROWS = [
    row("layer", 1.0, 0.6),
    row("layer", 0.4, 0.5, evaluated=30),
    row("filter", 0.5, 0.58, search_seconds=50.2),
    row("uniform", 1.0, 0.6, evaluated=2),
    row("uniform", 0.3, 0.2, evaluated=2),
]
TRIALS = [{"method": m, "networks": n, "reached": r, "seed": s} for m, n, r, s in (
    ("moves", 16, 0.9, 0), ("moves", 16, 0.7, 1), ("moves", 24, 1.0, 0), ("random", 16, 0.5, 0))]  # fmt: skip


def data(chart) -> list[dict]:
    return [line for rows in chart.to_dict()["datasets"].values() for line in rows]


def texts(chart) -> list[str]:
    return re.findall(r">([^<>]+)</text>", vl_convert.vegalite_to_svg(chart.to_dict()))


def inside(spec, key: str) -> list:
    """Everything that stands under this key, however deep."""
    below = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else []
    own = [spec[key]] if isinstance(spec, dict) and key in spec else []
    return own + [found for one in below for found in inside(one, key)]


def test_terms_are_counted_alone_and_together():
    sets = {"thirteen": EVOAPPROX, "ladder": [EXACT, "roup(0,4)", "roup(1,4)"]}
    counts = {(line["set"], line["how"]): line["terms"] for line in data(plots.shared_terms(sets))}
    # Rounding at bits 4, 2 and 0 is three terms for roup(0,4), at 2 and 0 two for roup(1,4), at 0 one for the exact.
    assert counts["ladder", "each for itself"] == 3 + 2 + 1 and counts["ladder", "side by side"] == 3
    assert counts["thirteen", "each for itself"] == 30 and counts["thirteen", "side by side"] == 7
    assert {"thirteen", "ladder", "30", "7"} <= set(texts(plots.shared_terms(sets)))


@pytest.mark.parametrize(("sets", "problem"), [({}, "no sets"), ({"one": [EXACT]}, "'one' has 1 multipliers")])
def test_sets_that_cannot_be_shared_are_refused(sets, problem):
    with pytest.raises(ValueError, match=problem):
        plots.shared_terms(sets)


def test_tuning_shows_what_is_stored_and_what_it_mends():
    lines = data(plots.weight_tuning("truncation(2)", after_relu=False))
    stored = {line["weight"]: line["stored"] for line in lines if "stored" in line}
    expected = weight_map(multiplier("truncation(2)"))
    assert len(stored) == 255 and all(stored[w] == int(expected[w + 128]) for w in stored)
    assert stored[7] == 8 and {line["moved"] for line in lines if line["weight"] == 7} == {1}
    # The weight 0 stays 0, and 0 times anything is right under truncation.
    assert [line["error"] for line in lines if line["weight"] == 0 and "error" in line] == [0, 0]
    for w in (3, 7, 100):  # |a w - M(a, stored)|, by hand over all activations
        by_hand = sum(abs(a * w - multiplier("truncation(2)")(a, stored[w])) for a in range(-128, 128)) / 256
        assert by_hand in [pytest.approx(line["error"]) for line in lines if line["weight"] == w and "error" in line]


def test_tuning_after_relu_asks_about_other_activations():
    told = texts(plots.weight_tuning("mul8s_1L2L"))
    assert "Mean |error| over activations 0 to 127: as it is 147.9, tuned 102.7." in told
    with pytest.raises(ValueError, match="is a mosaic"):
        plots.weight_tuning(f"filter[{EXACT}, roup(0,4)]")


def test_each_family_has_a_colour_and_a_shape_of_its_own():
    spec = plots.searched_fronts(ROWS, title="t").to_dict()
    drawn = [scale for scale in inside(spec, "scale") if isinstance(scale, dict)]
    scales = {str(s["range"]): s for s in drawn if s.get("domain") == ["layer", "filter", "uniform"]}
    assert len(scales) == 2  # colours and shapes
    assert all(len(set(scale["range"])) == 3 for scale in scales.values())
    assert any(scale["range"][2] == "diamond" for scale in scales.values())
    (line,) = [part for part in spec["layer"] if part["mark"].get("interpolate")]
    assert line["mark"]["interpolate"] == "step-after" and line["transform"] == [{"filter": "datum.family!='uniform'"}]


def test_fronts_may_be_read_from_a_file_and_are_drawn_as_they_are():
    read = [{name: str(value) for name, value in line.items()} for line in ROWS]
    points = [(line["family"], line["p_norm"], line["top1"]) for line in data(plots.searched_fronts(read))]
    assert points == [(line["family"], line["p_norm"], line["top1"]) for line in ROWS]
    assert "NaN" not in vl_convert.vegalite_to_svg(plots.searched_fronts(read).to_dict())


def test_fronts_tell_where_their_numbers_come_from_and_refuse_others():
    tips = [tip["field"] for tip in inside(plots.searched_fronts(ROWS).to_dict(), "tooltip")[0]]
    assert {"evaluated", "dataset", "n_test", "seed", "epochs", "commit", "date", "device", "p_norm"} <= set(tips)
    for figure in (plots.searched_fronts, plots.effort_bars):
        with pytest.raises(ValueError, match="'layer' lacks commit"):
            figure([{**ROWS[0], "commit": ""}])
        with pytest.raises(ValueError, match="no rows"):
            figure([])
    many = [row(f"family {i}", 1.0, 0.5) for i in range(8)]
    with pytest.raises(ValueError, match="8 families are too many"):
        plots.searched_fronts(many)
    assert plots.searched_fronts([*many[:7], ROWS[3]])


def test_a_reference_lies_below_the_dearest_uniform_network():
    chart = plots.searched_fronts(ROWS, reference=(0.46, 4, "somebody"))
    (cross,) = [line for line in data(chart) if line.get("name") == "somebody"]
    assert cross["p_norm"] == 0.46 and cross["top1"] == pytest.approx(0.6 - 0.04)
    assert "somebody" in texts(chart)
    with pytest.raises(ValueError, match="dearest uniform row"):
        plots.searched_fronts(ROWS[:2], reference=(0.46, 4, "somebody"))


def point(paid, divergence):
    return Found({}, paid, 0.0, divergence, 0.0, 1)


def test_the_area_of_a_front_by_hand():
    best = [point(0.2, 1.0), point(0.4, 0.1), point(0.8, 0.001), point(1.0, 0.0001)]
    # Up to the corner (1, 1): 0.2 x 0 decades, then 0.4 x 1, then 0.2 x 3.
    assert plots.reached(best, best) == 1
    assert plots.reached(best[:2], best) == pytest.approx(0.6 * 1 / 1.0)
    assert plots.reached([best[2]], best) == pytest.approx(0.2 * 3 / 1.0)
    assert plots.reached([*best, point(0.9, 0.5)], best) == 1  # what is dominated adds nothing
    assert plots.reached([point(0.1, 2.0), point(2.0, 1e-4)], best) == 0  # worse than the corner
    # No divergence is smaller than 1e-4, four decades: the float32 network's own is 0.
    assert plots.reached([point(0.2, 0.0)], best) == pytest.approx(0.8 * 4)


def test_areas_that_are_none_are_refused():
    with pytest.raises(ValueError, match="has no points"):
        plots.reached([], [point(0, 1)])
    for truth in ([], [point(0.5, 0.1)], [point(0.5, 0.1), point(0.9, 0.1)]):
        with pytest.raises(ValueError, match="two points"):
            plots.reached([point(0.5, 0.1)], truth)


def test_effort_is_a_mean_with_its_range():
    lines = {(line["method"], line["networks"]): line for line in data(plots.effort(TRIALS, title="t"))}
    told = lines["moves", 16]
    assert (told["mean"], told["min"], told["max"], told["n"]) == (pytest.approx(0.8), 0.7, 0.9, 2)
    assert lines["random", 16]["n"] == 1
    shapes = [scale["range"] for scale in inside(plots.effort(TRIALS).to_dict(), "scale") if "domain" in scale]
    assert ["circle", "square"] in shapes
    with pytest.raises(ValueError, match="seed is missing"):
        plots.effort([{"method": "moves", "networks": 3, "reached": 0.5}])


def test_bars_are_of_searches_not_of_points():
    chart = plots.effort_bars(ROWS, title="t")
    lines = {line["family"]: line for line in data(chart)}
    assert {family: line["evaluated"] for family, line in lines.items()} == {"layer": 40, "filter": 40, "uniform": 2}
    assert lines["filter"]["search_seconds"] == 50.2 and "50" in texts(chart)


def test_charts_fit_a_page_and_name_no_address():
    charts = [plots.shared_terms({"s": [EXACT, "roup(0,4)"]}), plots.weight_tuning("mul8s_1L2J"), plots.effort(TRIALS)]
    charts += [plots.searched_fronts(ROWS, title="t"), plots.effort_bars(ROWS)]
    for chart in charts:
        spec = chart.to_dict()
        width = float(re.search(r'width="([\d.]+)"', vl_convert.vegalite_to_svg(spec))[1])
        assert width <= 660 and "http" not in str(spec).replace(spec["$schema"], "")

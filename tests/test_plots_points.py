"""The figures of operating points: tiles are what was assigned, costs what was priced, and rows have evidence."""

import json
import re

import pytest
import vl_convert

from axmoe_lite import EXACT, cost, plots, runs

J, L = "mul8s_1L2J", "mul8s_1L2L"  # 0.301 and 0.200 mW; the exact circuit takes 0.425
POINTS = [{"a": EXACT, "b": J}, {"a": J, "b": L}]
ORIGIN = {**runs.evidence(10_000, scale="paper", seed=0, epochs=60), "dataset": "cifar100", "seconds": 1.0}
ASKED = {"network": "resnet20", "instances": 3, "lam": 0.2, "sigma_max": 0.075, "tune_epochs": 5, "tune_images": 100}


def row(regime, point, p_norm, top1, **other) -> dict:
    given = {"regime": regime, "point": point, "scale_c": 0.3, "p_norm": p_norm, "top1": top1}
    return {**ASKED, **given, "assignment": json.dumps({"a": L, "b": EXACT}), **ORIGIN, **other}


ROWS = [
    row("exact circuit", 0, 1, 0.66, scale_c=0),
    row("not retrained", 0, 0.9, 0.6),
    row("not retrained", 1, 0.5, 0.1),
    row("weights tuned too", 0, 0.9, 0.65),
    row("overlays tuned", 1, 0.5, 0.64),
]


def step(n, budget, point, p_norm, **other) -> dict:
    given = {"step": n, "budget": budget, "point": point, "p_norm": p_norm, "affordable": p_norm <= budget}
    return {**given, "images": 40, "accuracy": 0.95, "switch_us": 24.6, **other}


STEPS = [step(0, 1.0, 0, 0.9), step(1, 0.6, 1, 0.5), step(2, 0.4, 1, 0.5, accuracy=0.9), step(3, 0.95, 0, 0.9)]


def data(chart, *columns) -> list[dict]:
    """The rows of a chart's data that have these columns."""
    found = [each for rows in chart.to_dict()["datasets"].values() for each in rows]
    return [each for each in found if all(column in each for column in columns)]


def inside(spec, key: str) -> list:
    """Everything that stands under this key, however deep."""
    below = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else []
    here = [spec[key]] if isinstance(spec, dict) and key in spec else []
    return [*here, *(found for each in below for found in inside(each, key))]


def texts(chart, **chosen) -> list[str]:
    """What is drawn as text, with the sliders and menus at these values."""
    spec = chart.to_dict()
    spec["params"] = [{**p, "value": chosen.get(p["name"], p.get("value"))} for p in spec.get("params", [])]
    spec["params"] = [{k: v for k, v in p.items() if k != "value" or v is not None} for p in spec["params"]]
    return re.findall(r">([^<>]+)</t(?:ext|span)>", vl_convert.vegalite_to_svg(spec))


# ------------------------------------------------------------------------------ tiles


def test_tiles_are_what_was_assigned():
    chart = plots.point_tiles(POINTS, costs=[0.9, 0.6], scales=[0.3, 2.0], title="t")
    # 0.301 / 0.425 = 70.8 % and 0.2 / 0.425 = 47.1 %
    assert [(tile["layer"], tile["point"][:7], tile["circuit"], tile["power"]) for tile in data(chart, "circuit")] == [
        ("a", "point 0", "KV6", 100.0),
        ("b", "point 0", "L2J", 70.8),
        ("a", "point 1", "L2J", 70.8),
        ("b", "point 1", "L2L", 47.1),
    ]
    drawn = texts(chart)
    assert {"P_norm 0.900", "P_norm 0.600", "c = 0.3", "c = 2", "3 circuits in all: KV6, L2J, L2L."} <= set(drawn)


def test_one_circuit_is_one_circuit():
    same = [{"a": L}, {"a": L}]
    assert "1 circuit in all: L2L." in texts(plots.point_tiles(same, costs=[1, 1], scales=[1, 2], title="t"))


def test_layers_and_points_keep_their_order():
    """By name b would come before z, and point 10 before point 2."""
    points = [{"z": L, "b": L}] * 11
    spec = plots.point_tiles(points, costs=[0.5] * 11, scales=range(1, 12), title="t").to_dict()
    assert ["z", "b"] in inside(spec, "sort")
    assert [f"point {p}" for p in range(11)] in [[s.split("|")[0] for s in sort] for sort in inside(spec, "sort")]


@pytest.mark.parametrize(
    ("points", "costs", "scales", "message"),
    [
        ([], [], [], "was given 0 points"),
        (POINTS, [0.9], [1, 2], "2 points, 1 costs and 2 scales"),
        (POINTS, [0.9, 0.5], [1], "2 points, 2 costs and 1 scales"),
        ([POINTS[0], {"a": L}], [1, 1], [1, 2], "points 0 and 1 names layer 'b'"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(points, costs, scales, message):
    with pytest.raises(ValueError, match=message):
        plots.point_tiles(points, costs=costs, scales=scales, title="t")


# ------------------------------------------------------------------------------ instances

STD = {layer: {J: 3.0, L: 10.0} for layer in ("early", "middle", "late")}
SIGMA = {"early": 0.04, "middle": 0.1, "late": 0.2}
MACS = cost.Macs({layer: cost.LayerMacs("conv", 1, 1) for layer in STD}, parameters=0, inputs=1)
LIMITED = {"macs": MACS, "scales": (0.5, 1.0), "title": "t"}


def test_limits_by_hand():
    """The chapter's example: tolerances of 2, 5, 10 at c = 0.5 and of 4, 10, 20 at c = 1; errors of 3 and 10.

    Three circuits: KV6, L2J, L2L, where the worst is L2L in late at 10 / 10; and L2J, L2L, L2L, at 10 / 10 in middle.
    Two: early gets L2J at c = 0.5 too, 3 / 2. One: the mean v of L2J, counted as 1 + ln v above 1, is
    (1.405 + .6 + .3 + .75 + .3 + .15) / 6 = .584, and that of L2L (2.609 + 1.693 + 1 + 1.916 + 1 + .5) / 6 = 1.45.
    """
    chart = plots.instance_costs(STD, dict.fromkeys(STD, 100.0), SIGMA, [J, L], most=3, **LIMITED)
    found = {(each["instances"], each["point"]): each for each in data(chart, "worst")}
    exact, j, once = 0.425, 0.301, 0.2
    expected = {
        (1, 0): (3 * j, 1.5),
        (1, 1): (3 * j, 0.75),
        (2, 0): (2 * j + once, 1.5),
        (2, 1): (j + 2 * once, 1.0),
        (3, 0): (exact + j + once, 1.0),
        (3, 1): (j + 2 * once, 1.0),
    }
    assert found.keys() == expected.keys()
    for place, (power, worst) in expected.items():
        assert found[place]["p_norm"] == pytest.approx(power / 3 / exact), place
        assert found[place]["worst"] == pytest.approx(worst), place
        assert found[place]["scale_c"] == (0.5, 1.0)[place[1]]
    assert {"P_norm", "circuits that the chip holds", "v of the worst layer"} <= set(texts(chart))


def test_limits_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="most is 0"):
        plots.instance_costs(STD, dict.fromkeys(STD, 100.0), SIGMA, [J], most=0, **LIMITED)
    with pytest.raises(ValueError, match="sigma, std and signal must be of the same layers"):
        plots.instance_costs(STD, {"early": 100.0}, SIGMA, [J], **LIMITED)


# ------------------------------------------------------------------------------ accuracies


def test_accuracies_fresh_or_read_from_a_file():
    read = [{name: str(value) for name, value in each.items()} for each in ROWS]
    for rows in (ROWS, read):
        found = data(plots.point_accuracy(rows, title="t"), "top1")
        assert [(e["regime"], float(e["p_norm"]), e["top1"]) for e in found] == [
            (e["regime"], e["p_norm"], e["top1"]) for e in ROWS
        ]
        assert found[1]["circuits"] == "KV6, L2L"  # of the JSON, the dearest first


def test_every_accuracy_says_where_it_comes_from():
    spec = plots.point_accuracy(ROWS, title="t").to_dict()
    told = {tip["field"] for tips in inside(spec, "tooltip") for tip in tips}
    assert told >= {"regime", "point", "circuits", "n_test", "tune_epochs", "tune_images", "commit", "date", "device"}
    assert {column for each in data(plots.point_accuracy(ROWS, title="t"), "top1") for column in each} >= told


def test_marks_differ_by_shape_and_colour_and_the_exact_circuit_is_a_line():
    spec = plots.point_accuracy(ROWS, title="t").to_dict()
    (shape,) = [s for s in inside(spec, "shape") if isinstance(s, dict) and "scale" in s]
    assert shape["scale"]["domain"] == ["not retrained", "overlays tuned", "weights tuned too"]
    assert shape["scale"]["range"] == ["triangle-down", "circle", "square"]
    marks, lines, goal = spec["layer"]
    colours = marks["encoding"]["color"]["scale"]
    assert colours["domain"] == shape["scale"]["domain"] and len(set(colours["range"])) == 3
    assert goal["mark"]["type"] == "rule" and "=='exact circuit'" in json.dumps(goal["transform"])
    assert all("!='exact circuit'" in json.dumps(each["transform"]) for each in (marks, lines))
    percent = [y["axis"]["format"] for y in inside(spec, "y") if isinstance(y, dict) and "axis" in y]
    assert percent and set(percent) == {"%"}


def test_settings_are_never_in_one_curve():
    other = [{**each, "network": "resnet8"} for each in ROWS] + [{**each, "lam": 0.001} for each in ROWS]
    (menu,) = [
        p
        for p in plots.point_accuracy(ROWS + other, title="t").to_dict()["params"]
        if "bind" in p and "options" in p["bind"]
    ]
    assert len(menu["bind"]["options"]) == 3 and menu["value"] == menu["bind"]["options"][0]
    assert (
        menu["value"] == "resnet20, cifar100, 10000 images, 3 circuits, lambda 0.2, sigma at most 0.075, seed 0 (paper)"
    )
    alone = plots.point_accuracy(ROWS, title="t")
    assert not [p for p in alone.to_dict()["params"] if "options" in (p.get("bind") or {})] and menu["value"] in texts(
        alone
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": ""}, "A row for 1 lacks commit"),
        ({"regime": "overlay tuned"}, "No regime is called 'overlay tuned'. Did you mean 'overlays tuned'"),
        ({"top1": 64}, "Point 1 has a top1 of 64; it lies in"),
    ],
)
def test_accuracies_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plots.point_accuracy([ROWS[0], {**ROWS[4], **change}], title="t")
    with pytest.raises(ValueError, match="was given no rows"):
        plots.point_accuracy([], title="t")


# ------------------------------------------------------------------------------ the trace


def test_the_trace_is_drawn_as_it_ran():
    chart = plots.budget_trace(STEPS, title="t")
    stairs = [(each["step"], each["what"], each["p"]) for each in data(chart, "what")]
    assert stairs == [
        *((each["step"], "budget (dashed)", each["budget"]) for each in STEPS),
        *((each["step"], "cost", each["p_norm"]) for each in STEPS),
    ]
    assert [(each["point"], each["accuracy"]) for each in data(chart, "accuracy")] == [
        (0, 0.95),
        (1, 0.95),
        (1, 0.9),
        (0, 0.95),
    ]


def test_the_slider_says_what_happened_at_its_step():
    chart = plots.budget_trace(STEPS, title="t")
    (slider,) = [p for p in chart.to_dict()["params"] if p["name"] == "trace_step"]
    assert (slider["bind"]["min"], slider["bind"]["max"], slider["value"]) == (0, 3, 1)
    for n, right in ((1, 38), (2, 36)):  # 0.95 and 0.9 of 40
        budget = {1: "0.60", 2: "0.40"}[n]
        said = [text for text in texts(chart, trace_step=n) if text.startswith("Step")]
        assert said == [f"Step {n}: budget {budget}, point 1 at 0.50, {right} of 40 right, switched in 25 µs."]


def test_a_budget_that_nothing_fits_is_marked():
    some = " ".join(texts(plots.budget_trace(STEPS, title="t")))
    none = " ".join(texts(plots.budget_trace(STEPS[:2], title="t")))
    assert "Red crosses: not even the cheapest point fits." in some and "crosses" not in none
    with pytest.raises(ValueError, match="was given no steps"):
        plots.budget_trace([], title="t")


def test_points_differ_by_shape_and_colour():
    limits = plots.instance_costs(STD, dict.fromkeys(STD, 100.0), SIGMA, [J, L], **LIMITED)
    for chart in (limits, plots.budget_trace(STEPS, title="t")):
        spec = chart.to_dict()
        for name, ranges in (("shape", ["circle", "square"]), ("color", ["#0072B2", "#E69F00"])):
            found = [c for c in inside(spec, name) if isinstance(c, dict) and c.get("field") == "point"]
            assert found and all(c["scale"] == {"domain": [0, 1], "range": ranges} for c in found)


def test_the_panels_share_their_steps():
    spec = plots.budget_trace(STEPS, title="t").to_dict()
    domains = [x["scale"]["domain"] for x in inside(spec, "x") if isinstance(x, dict) and x.get("field") == "step"]
    assert len(spec["vconcat"]) == 3 and len(domains) >= 6 and all(domain == [0, 3] for domain in domains)
    titles = {x.get("title") for x in inside(spec["vconcat"][2], "x") if isinstance(x, dict) and x.get("field")}
    assert titles == {"step, one batch each"}


def test_charts_stay_small_and_name_no_address(monkeypatch):
    from axmoe_lite.plots.theme import _html

    monkeypatch.setenv("AXMOE_BOOK", "1")
    for chart in (
        plots.point_tiles(POINTS, costs=[0.9, 0.6], scales=[0.3, 2.0], title="t"),
        plots.instance_costs(STD, dict.fromkeys(STD, 100.0), SIGMA, [J, L], **LIMITED),
        plots.point_accuracy(ROWS, title="t"),
        plots.budget_trace([step(n, 1, 0, 0.9) for n in range(40)], title="t"),
    ):
        spec = chart.to_dict()
        html = _html(spec)["text/html"]
        assert len(html) < 60_000 and "http" not in html.replace(spec["$schema"], "")
        drawn = vl_convert.vegalite_to_svg(spec)
        assert int(float(re.search(r'width="([\d.]+)"', drawn)[1])) <= 660 and "NaN" not in drawn

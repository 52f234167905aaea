"""plots.stages and the race that it draws: times foretold, gains, stages at work, from numbers that are known."""

import numpy as np
import pytest
import torch
from torch import nn

from axmoe_lite import plots
from axmoe_lite.runs import EVIDENCE
from axmoe_lite.search import pipeit
from axmoe_lite.search.pipeit import Layer, Ran, Span, ways
from axmoe_lite.search.pipeit.schedule import evaluate

ORIGIN = {**dict.fromkeys(EVIDENCE, "x"), "scale": "paper"}
TWO = (("big", 1), ("little", 1))


def rows_of(chart) -> list[dict]:
    return [row for table in chart.to_dict()["datasets"].values() for row in table]


def measured(layers: list[Layer], *, per_product: float = 1e-9) -> list[dict]:
    """As measure() would write them, for a core that takes a nanosecond a product."""
    return [
        {"type": "host", "cores": 1, "kind": one.kind, "n": one.n, "k": one.k, "m": one.m, "groups": one.groups}
        | {"seconds": one.macs * per_product, "repeats": 1}
        for one in layers
    ]


def dense(count: int, *, start: int = 1) -> list[Layer]:
    return [Layer(f"{i}", 100 * i, 9 * i, 8 * i) for i in range(start, start + count)]


def test_foretell_says_what_predict_says_row_by_row() -> None:
    one = pipeit.fit(measured(dense(12)), method="tiles")
    others = dense(3, start=20)
    assert np.array_equal(one.foretell(measured(others)), one.predict(others, ("host", 1)))


def test_foretold_times_draws_what_the_predictor_foretells() -> None:
    one = pipeit.fit(measured(dense(12)), method="tiles")
    tests = measured(dense(1, start=20), per_product=2e-9)  # twice as slow as what was fitted
    rows = [{**row, **ORIGIN, "seconds": row["seconds"], "shapes": "unseen"} for row in tests]
    chart = plots.foretold_times({"tiles": one}, rows)
    (drawn,) = [row for row in rows_of(chart) if "ratio" in row]
    assert drawn["measured_us"] == pytest.approx(2e-3 * 2000 * 180 * 160)
    assert drawn["ratio"] == pytest.approx(0.5, rel=0.01)  # the ridge keeps weights a little small
    band = [row for row in rows_of(chart) if "under" in row]
    assert all(row["under"] == pytest.approx(0.85 * row["measured_us"]) for row in band) and len(band) == 2


def test_foretold_times_and_error_bars_refuse() -> None:
    one = pipeit.fit(measured(dense(12)), method="tiles")
    row = {**measured(dense(1, start=20))[0], "shapes": "bare"}
    with pytest.raises(ValueError, match="bare"):
        plots.foretold_times({"tiles": one}, [row])
    with pytest.raises(ValueError, match="a predictor and a row"):
        plots.foretold_times({}, [])
    with pytest.raises(ValueError, match="lacks"):
        plots.error_bars([{"kind": "all", "method": "tiles", "mape": 0.1}])
    with pytest.raises(ValueError, match='kind "all"'):
        plots.error_bars([{"kind": "dense", "method": "tiles", **ORIGIN}])


def test_error_bars_read_committed_text_and_draw_only_all_kinds() -> None:
    row = {"method": "trees", "shapes": "resnet20", "cores": "2", "mape": "0.25", "worst": "0.5", "layers": "9"}
    chart = plots.error_bars([{**row, **ORIGIN, "kind": "all"}, {**row, **ORIGIN, "kind": "dense", "mape": "0.9"}])
    (drawn,) = [one for one in rows_of(chart) if "what" in one]
    assert (drawn["what"], drawn["mape"]) == ("resnet20, 2 cores", 0.25)
    assert {"mape": 0.15} in rows_of(chart)  # the line that it should stay below
    assert "Quick" not in str(chart.to_dict()["title"])
    quick = plots.error_bars([{**row, **ORIGIN, "kind": "all", "scale": "quick"}])
    assert "Quick" in str(quick.to_dict()["title"])


def test_gain_bars_have_both_searches_for_each_tile() -> None:
    gains = {tile: pipeit.board.gains(["AlexNet", "MobileNet"], tile=tile) for tile in (1, 8)}
    chart = plots.gain_bars(gains, tile=1)
    drawn = [row for row in rows_of(chart) if "search" in row]
    assert len(drawn) == 2 * 2 * 2
    (one,) = [row for row in drawn if (row["tile"], row["network"], row["search"]) == (8, "AlexNet", "optimum")]
    assert one["gain"] == pytest.approx(gains[8][0]["best_gain"])
    assert one["bound"] == pytest.approx(2.2 / 7.6)
    assert one["schedule"].startswith("4 layers on 4 big, ")
    (button,) = chart.to_dict()["params"]
    assert (button["value"], button["bind"]["options"]) == (1, [1, 8])
    with pytest.raises(ValueError, match="there are gains for 1, 8"):
        plots.gain_bars(gains, tile=4)


def test_stage_gantt_of_a_schedule() -> None:
    # Stages of 2 s and 6 s: image 1 is ready after 4 s, and begins on the second stage at 8 s.
    schedule = evaluate(TWO, [2, 1], {("big", 1): [1, 1, 3], ("little", 1): [2, 2, 6]})
    chart = plots.stage_gantt(schedule, images=2, unit="s")
    drawn = {(row["image"], row["lane"]): (row["start"], row["end"]) for row in rows_of(chart) if "lane" in row}
    assert drawn == {
        (0, "1: 1 big"): (0.0, 2.0),
        (0, "2: 1 little"): (2.0, 8.0),
        (1, "1: 1 big"): (2.0, 4.0),
        (1, "2: 1 little"): (8.0, 14.0),
    }


def test_stage_gantt_of_a_run_shows_its_first_batches() -> None:
    spans = [Span(b, s, 0.010 * b + 0.02 * s, 0.010 * b + 0.02 * s + 0.005, 1.0) for b in range(5) for s in range(2)]
    ran = Ran(torch.zeros(5, 1), 1.0, 1.0, spans, True)
    drawn = [row for row in rows_of(plots.stage_gantt(ran, images=3)) if "lane" in row]
    assert sorted({row["image"] for row in drawn}) == [0, 1, 2] and len(drawn) == 6
    assert max(row["end"] for row in drawn) == pytest.approx(45.0)  # batch 2 on the second stage: 20 + 20 + 5 ms
    with pytest.raises(ValueError, match="at least 1"):
        plots.stage_gantt(ran, images=0)


def test_ways_bars_leave_out_what_was_not_foretold() -> None:
    row = {**ORIGIN, "network": "a", "turn": "0", "images_per_s": "10.0", "over_one": "1", "same": "True"}
    rows = [row | {"way": "one core", "foretold_per_s": "12.5"}, row | {"way": "threads", "foretold_per_s": "0"}]
    drawn = {one["way"]: one for one in rows_of(plots.ways_bars(rows))}
    assert drawn["one core"]["foretold_per_s"] == 12.5 and drawn["threads"]["foretold_per_s"] is None
    with pytest.raises(ValueError, match="no rows"):
        plots.ways_bars([])
    with pytest.raises(ValueError, match="threads"):
        plots.ways_bars([{"way": "threads"}])


def test_a_race_has_each_way_in_each_turn_with_the_same_answers() -> None:
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    images = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    core = next(iter(pipeit.host().values()))[0]
    stages = pipeit.split(network, images[:2], [0, 1, 2])
    rows = ways.race(network, stages, images, cores=[core, core], batch=2, turns=2, progress=False)
    # One core twice: threads need two different ones.
    assert [(row["turn"], row["way"]) for row in rows] == [(turn, way) for turn in (0, 1) for way in ways.WAYS[:3]]
    assert all(row["same"] is True and row["images"] == 8 for row in rows)
    assert [row["over_one"] for row in rows if row["way"] == "one core"] == [1.0, 1.0]
    with pytest.raises(ValueError, match="1 stages and 2 cores"):
        ways.race(network, stages[:1], images, cores=[core, core])
    with pytest.raises(ValueError, match="turns is 0"):
        ways.race(network, stages, images, cores=[core, core], turns=0)


def test_a_race_notices_stages_of_another_network() -> None:
    network, other = (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval() for _ in range(2))
    images = torch.ones(4, 6)
    core = next(iter(pipeit.host().values()))[0]
    stages = pipeit.split(other, images[:1], [0, 1, 2])
    rows = ways.race(network, stages, images, cores=[core, core], turns=1, progress=False)
    assert {row["way"]: row["same"] for row in rows} == {"one core": True, "pipeline": False, "data parallel": True}

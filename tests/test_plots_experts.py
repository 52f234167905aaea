"""Figures of mixtures: what they count, derived by hand, and that they draw offline."""

import base64
import io
import re

import pytest
import torch
import vl_convert
from PIL import Image

from axmoe_lite import moe, plots
from axmoe_lite.plots.theme import _html


def routing(*choices: int, experts: int = 3) -> moe.Routing:
    return moe.Routing.of(torch.nn.functional.one_hot(torch.tensor(choices), experts).double())


# Five images of two classes: a goes to 0, 0, 2 and b to 2, 2; in the second mixture all go to expert 1.
LABELS = torch.tensor([0, 1, 0, 1, 0])
SEEN = {"one": [routing(0, 2, 0), routing(2, 2)], "two": [routing(1, 1, 1, 1, 1)]}
PICTURES = torch.arange(5 * 3 * 4 * 4, dtype=torch.uint8).view(5, 3, 4, 4)


def figures():
    choice = torch.tensor([0, 2, 0, 2, 2])
    return {
        "who": plots.who_answers(SEEN, LABELS, ("a", "b")),
        "loads": plots.loads({"net": {name: moe.statistics(found) for name, found in SEEN.items()}}),
        "samples": plots.cluster_samples({"by": choice}, PICTURES, LABELS, ("a", "b"), columns=2),
        "changed": plots.changed_choices({"mul8s_1L2L": {"one": 0.25, "two": 0.0}}, images=5, title="t"),
    }


def rows_of(chart, column: str) -> list[dict]:
    return next(rows for rows in chart.to_dict()["datasets"].values() if column in rows[0])


def texts_of(chart) -> list[str]:
    return re.findall(r">([^<>]+)</text>", vl_convert.vegalite_to_svg(chart.to_dict()))


@pytest.mark.parametrize("name", ["who", "loads", "samples", "changed"])
def test_charts_draw_and_name_no_address(name, monkeypatch):
    monkeypatch.setenv("AXMOE_BOOK", "1")
    chart = figures()[name]
    assert texts_of(chart)
    spec = chart.to_dict()
    assert "http" not in _html(spec)["text/html"].replace(spec["$schema"], "")


def test_shares_are_of_the_class_and_calls_are_joined():
    found = {
        (r["mixture"], r["class"], r["expert"]): (r["images"], r["share"]) for r in rows_of(figures()["who"], "share")
    }
    assert found[0, "a", 0] == (2, 0.6667) and found[0, "a", 2] == (1, 0.3333)  # two and one of three
    assert found[0, "b", 2] == (2, 1.0) and found[0, "b", 0] == (0, 0.0)  # both of two
    assert found[1, "a", 1] == (3, 1.0) and len(found) == 2 * 2 * 3


def test_the_slider_begins_at_the_last_mixture_and_says_its_name():
    assert "Who answers what in two?" in texts_of(figures()["who"])
    alone = plots.who_answers({"": [routing(0, 1)]}, torch.tensor([0, 1]), ("a", "b"))
    assert "Who answers what in the whole network?" in texts_of(alone)


def test_a_class_without_images_is_drawn_without_a_share():
    chart = plots.who_answers({"one": [routing(0)]}, torch.tensor([0]), ("a", "b"))
    assert sum(row["share"] for row in rows_of(chart, "share")) == 1.0


def test_another_number_of_choices_than_images_is_refused():
    with pytest.raises(ValueError, match="Mixture 'one' chose 5 times for 4 images"):
        plots.who_answers(SEEN, LABELS[:4], ("a", "b"))


def test_bars_of_a_layer_lie_end_to_end():
    bars = [(r["layer"], r["expert"], r["from"], r["to"]) for r in rows_of(figures()["loads"], "from")]
    # Of five: two to expert 0, none to 1, three to 2.
    assert bars[:3] == [("one", 0, 0.0, 0.4), ("one", 1, 0.4, 0.4), ("one", 2, 0.4, 1.0)]
    # Balance of (2/5, 0, 3/5) is 0.6730 / log 3 = 0.61, of all to one 0; the gate is sure.
    texts = texts_of(figures()["loads"])
    assert {"0.61", "0.00", "1.00"} <= set(texts)


def test_samples_are_the_experts_own_images_in_order_of_class():
    rows = rows_of(figures()["samples"], "url")
    # Expert 0 has images 0 and 2. Expert 2 has 4 (class a), 1 and 3 (class b): two at even steps are 4 and 1.
    assert [(r["expert"], r["class"]) for r in rows] == [(0, "a"), (0, "a"), (2, "a"), (2, "b")]
    assert "0 images" in texts_of(figures()["samples"]), "expert 1 has none, and is shown"
    picture = Image.open(io.BytesIO(base64.b64decode(rows[0]["url"].partition(",")[2])))
    assert picture.size == (4, 4)


def test_pictures_of_one_channel_keep_their_pixels():
    grey = torch.tensor([[0, 255], [128, 0]], dtype=torch.uint8).view(1, 1, 2, 2)
    chart = plots.cluster_samples({"by": torch.tensor([0])}, grey, torch.tensor([0]), ("a",))
    url = rows_of(chart, "url")[0]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("L")
    assert list(picture.tobytes()) == [0, 255, 128, 0]


def test_changes_are_percent():
    assert {"25.0%", "0.0%", "L2L"} <= set(texts_of(figures()["changed"]))

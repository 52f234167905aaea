"""The explorer with a kernel: what it shows is what the package finds, of the multiplier whose name stands there."""

import io
import re
import threading
import zlib

import numpy as np
import pytest
import torch
import vl_convert

from axmoe_lite import Multiplier, explore, models, multiplier, widgets
from axmoe_lite.multipliers import exact_table
from axmoe_lite.plots import live

LAYER = "layer1.0.conv1"


@pytest.fixture(scope="module")
def seen(textures):
    """A network that was never trained: its accuracy means nothing, and changes all the same."""
    torch.manual_seed(3)
    return explore.witness(models.resnet8(classes=4), textures, n=64)


@pytest.fixture
def there(seen):
    found = widgets.Explorer(seen)
    assert found.wait(60)
    return found


def figures(explorer) -> dict[str, str]:
    """What the table shows, unrounded; what is not known yet is left out."""
    return read(explorer.numbers.value)


def read(text: str) -> dict[str, str]:
    found = dict(re.findall(r'data-figure="(\w+)"[^>]* data-value="([^"]*)"', text))
    return {**found, "multiplier": re.search(r'data-multiplier="([^"]*)"', text)[1]}


def agrees(explorer, name, seen, *, layer="conv1"):
    shown, told = figures(explorer), explore.look(multiplier(name), seen, layer=layer)
    assert shown["multiplier"] == name
    for figure in ("power_mw", "rank", "mae", "wce", "ep", "bias", "real_mae", "real_bias", "top1"):
        assert float(shown[figure]) == told[figure], figure


# --------------------------------------------------------------------------- state changes


def test_the_numbers_are_those_of_look_wherever_the_controls_stand(there, seen):
    agrees(there, "broken_array(0,0,4)", seen)
    there.knobs["broken_array"]["drop_a"].value = 2
    assert there.wait()
    agrees(there, "broken_array(2,0,4)", seen)
    there.family.value = "roup"
    there.layer.value = LAYER
    assert there.wait()
    agrees(there, "roup(0,4)", seen, layer=LAYER)
    there.family.value = "catalogue"
    assert there.wait()
    agrees(there, "mul8s_1KVA", seen, layer=LAYER)
    assert there.message.value.endswith("></div>"), "there is nothing to say"


def test_only_the_familys_own_sliders_are_there_within_their_ranges(there):
    for family, knobs in explore.KNOBS.items():
        there.family.value = family
        assert {s.description: (s.min, s.max, s.value) for s in there.controls.children} == knobs
    there.family.value = "catalogue"
    assert there.controls.children == (there.pick,) and there.pick.options == explore.PICKS
    there.wait()


def test_the_network_that_is_given_is_not_touched(seen, there):
    x = seen.images.normalised(seen.images.x_test[:8])
    with torch.inference_mode():
        before = seen.network(x)
        there.pick.value, there.family.value = "mul8s_1L2L", "catalogue"
        assert there.wait()
        assert torch.equal(seen.network(x), before)


def test_errors_are_there_before_a_network_is(monkeypatch, seen):
    gate = threading.Event()
    monkeypatch.setattr(explore, "digits_witness", lambda: gate.wait(60) and seen)
    explorer = widgets.Explorer()
    assert explorer._drawer.wait() and explorer._trier.wait()
    assert widgets.PREPARING in explorer.message.value
    early = figures(explorer)
    assert {"mae", "rank", "power_mw"} < set(early) and not {"top1", "real_mae"} & set(early)
    gate.set()
    assert explorer.wait()
    agrees(explorer, "broken_array(0,0,4)", seen)
    assert widgets.PREPARING not in explorer.message.value


# ------------------------------------------------------------------------- the newest wins


def test_jobs_that_were_overtaken_are_dropped_and_an_error_ends_nothing():
    done, failed, first, gate = [], [], threading.Event(), threading.Event()

    def work(job):
        first.set()
        gate.wait(60)
        if job == "wrong":
            raise ValueError("this one")
        done.append(job)

    newest = widgets.Newest(work, failed.append)
    newest.ask(1)
    first.wait(60)
    for job in (2, 3, 4):
        newest.ask(job)
    assert not newest.wait(0.01)
    gate.set()
    assert newest.wait()
    assert done == [1, 4]
    newest.ask("wrong")
    assert newest.wait()
    newest.ask(5)
    assert newest.wait()
    assert done == [1, 4, 5] and [str(one) for one in failed] == ["this one"]


def test_a_late_accuracy_never_stands_beside_another_name(there, monkeypatch):
    started, gate, tried, shown = threading.Event(), threading.Event(), [], []

    def slow(m, seen):
        tried.append(m.name)
        started.set()
        gate.wait(60)
        return {"broken_array(0,0,7)": 0.07, "broken_array(0,0,9)": 0.09}.get(m.name, 0.5)

    monkeypatch.setattr(explore, "accuracy", slow)
    there.numbers.observe(lambda change: shown.append(read(change["new"])), "value")
    columns = there.knobs["broken_array"]["drop_columns"]
    columns.value = 7
    assert started.wait(60)
    for value in (8, 9):
        columns.value = value
        assert there._drawer.wait()
    gate.set()
    assert there.wait()
    assert tried == ["broken_array(0,0,7)", "broken_array(0,0,9)"], "8 was overtaken before its turn came"
    assert [one["multiplier"] for one in shown if one.get("top1") == "0.07"] == []
    assert figures(there)["multiplier"] == "broken_array(0,0,9)" and figures(there)["top1"] == "0.09"


def test_what_was_tried_is_not_tried_again(there, monkeypatch):
    there.knobs["broken_array"]["drop_b"].value = 1
    assert there.wait()
    before = figures(there)
    monkeypatch.setattr(explore, "accuracy", None)
    there.layer.value = LAYER
    assert there.wait()
    assert figures(there)["top1"] == before["top1"] and figures(there)["real_mae"] != before["real_mae"]


def test_an_accuracy_that_fails_says_so_and_the_sliders_go_on(there, seen, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(explore, "accuracy", lambda m, seen: 1 / 0)
        there.knobs["broken_array"]["drop_columns"].value = 6
        assert there.wait()
        assert "division by zero" in there.message.value and "top1" not in figures(there)
    there.knobs["broken_array"]["drop_columns"].value = 5
    assert there.wait()
    agrees(there, "broken_array(0,0,5)", seen)


# --------------------------------------------------------------------------- a file of yours


def upload(explorer, name: str, content: bytes) -> None:
    """What the browser sends when a file is chosen."""
    file = {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": 0}
    explorer._uploaded((file,))
    assert explorer.wait()


def as_npy(table: torch.Tensor) -> bytes:
    out = io.BytesIO()
    np.save(out, table.numpy())
    return out.getvalue()


def test_a_wrong_file_says_why_and_all_stays(there):
    there.knobs["broken_array"]["drop_columns"].value = 3
    assert there.wait()
    before = figures(there)
    there.family.value = "table"
    assert widgets.NO_TABLE in there.message.value and there.controls.children == (there.upload,)
    for name, content in (("torn.npy", as_npy(exact_table())[:-9]), ("a.txt", b"1"), ("<b>.npy", b"no table")):
        upload(there, name, content)
        assert "Not taken" in there.message.value and "<b>" not in there.message.value
        assert name.replace("<b>", "&lt;b&gt;") in there.message.value
        assert figures(there) == before


def test_a_table_of_ones_own_is_explored_like_any_other(there, seen):
    table = multiplier("roup(0,4)").table
    there.family.value = "table"
    upload(there, "a&b.npy", as_npy(table))
    shown, told = figures(there), explore.look(multiplier("roup(0,4)"), seen)
    assert shown["multiplier"] == "a&amp;b" and "power_mw" not in shown
    assert float(shown["mae"]) == told["mae"] and float(shown["top1"]) == told["top1"]
    assert "unknown" in there.numbers.value and "power unknown" in there.pictures.value


# --------------------------------------------------------------------------------- pictures

DRAWN = {
    "map": lambda m, seen: live.error_map_of(m),
    "histogram": lambda m, seen: live.error_histogram(m, seen.operands[LAYER], layer=LAYER),
    "place": lambda m, seen: live.power_place(m),
}


@pytest.mark.parametrize("which", DRAWN)
def test_a_picture_keeps_its_frame_and_its_scales(which, seen):
    """Two multipliers, as different as can be: all that differs is rows, the name, and the mark's filling."""
    sizes, skeletons = set(), set()
    for name in ("mul8s_1KV6", "drum(2)", "broken_array(6,6,10)"):
        spec = DRAWN[which](multiplier(name), seen).to_dict()
        svg = vl_convert.vegalite_to_svg(spec)
        sizes.add(re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
        domains = re.findall(r"'domain': \[.*?\]", str(spec))
        skeletons.add(str(domains))
        assert spec["title"]["subtitle"] == name
    assert len(sizes) == len(skeletons) == 1
    width, height = map(int, sizes.pop())
    assert width <= live.WIDTH and height <= live.HEIGHT


def test_the_maps_dots_are_the_errors_of_their_pairs():
    """One planted error: the activation to the right, the weight upwards; an exact table is of one colour."""
    table = exact_table()
    table[100 + 128, -3 + 128] += 500
    dots = np.frombuffer(zlib.decompress(png_data(live._map_png(Multiplier("planted", table)))), np.uint8)
    dots = dots.reshape(256, 1 + 3 * 256)[:, 1:].reshape(256, 256, 3)
    other = np.argwhere((dots != dots[0, 0]).any(-1))
    assert other.tolist() == [[127 - -3, 100 + 128]]
    red, green, blue = dots[130, 228].astype(int)
    assert red > green > blue, "too large is orange"
    assert dots[0, 0].tolist() == [0xF7] * 3


def png_data(png: bytes) -> bytes:
    start = png.index(b"IDAT")
    length = int.from_bytes(png[start - 4 : start], "big")
    return png[start + 4 : start + 4 + length]


def test_the_histogram_holds_the_shares_and_the_mark_its_place(seen):
    m = multiplier("roup(0,4)")
    rows = next(iter(DRAWN["histogram"](m, seen).to_dict()["datasets"].values()))
    real = explore.error_shares(m, a=seen.operands[LAYER][0], b=seen.operands[LAYER][1]).tolist()
    assert [row["share"] for row in rows if LAYER not in row["operands"]] == explore.error_shares(m).tolist()
    assert [row["share"] for row in rows if LAYER in row["operands"]] == pytest.approx(real, abs=1e-12)
    here = [rows for rows in live.power_place(m).to_dict()["datasets"].values() if len(rows) == 1]
    exact = multiplier("mul8s_1KV6").power_mw
    assert here[0] == [{"power": m.power_mw / exact, "mae": pytest.approx(explore.look(m)["mae"])}]


def test_pictures_are_described_in_words_with_numbers_and_ask_for_nothing(there):
    texts = re.findall(r'<img alt="([^"]*)"', there.pictures.value)
    assert len(texts) == 3 and all("broken_array(0,0,4)" in text for text in texts)
    told = figures(there)
    assert f"worst error {told['wce']}" in texts[0] and f"bias {float(told['bias']):+.1f}" in texts[0]
    assert "92% of the exact circuit" in texts[2]
    assert not re.findall(r'(?:src|href)="(?!data:)', there.pictures.value)

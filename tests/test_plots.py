"""Figures: they hold what they claim, draw offline, and refuse numbers without evidence."""

import json
import re

import pytest
import torch
import vl_convert

from axmoe_lite import EVOAPPROX, errors, multiplier, pipeline, plots, runs
from axmoe_lite.layers.correction import LayerError
from axmoe_lite.plots.theme import _html, _packed
from axmoe_lite.quant import Histogram, quantise


def compiled(chart):
    return vl_convert.vegalite_to_vega(chart.to_dict())


CHARTS = {
    "maps": lambda: plots.error_maps(["mul8s_1KVA", "mitchell()"]),
    "front": plots.power_error_front,
    "cells": lambda: plots.kept_cells(list(EVOAPPROX)),
    "grid": lambda: plots.number_grid([[1, 2], [3, 4]], title="t", low=0, high=1),
    "proxy": lambda: plots.proxy_check({"mul8s_1L2J": 0.03}),
}


@pytest.mark.parametrize("name", CHARTS)
def test_charts_compile_stay_small_and_name_no_address(name, monkeypatch):
    monkeypatch.setenv("AXMOE_BOOK", "1")
    spec = CHARTS[name]().to_dict()
    compiled(CHARTS[name]())
    html = _html(spec)["text/html"]
    assert len(html) < 300_000
    assert "http" not in html.replace(spec["$schema"], "")


def figures_of(spec) -> list[str]:
    """The texts that the chart draws, in whatever order."""
    svg = vl_convert.vegalite_to_svg(spec)
    return [text.replace("&amp;", "&") for text in re.findall(r">([^<>]+)</text>", svg)]


def test_one_bundle_in_a_live_notebook_and_none_in_the_book(monkeypatch):
    spec = plots.proxy_check({"mul8s_1L2J": 0.03}).to_dict()
    monkeypatch.delenv("AXMOE_BOOK", raising=False)
    live = _html(spec)["text/html"]
    assert len(live) > 500_000 and live.count("</script>") == 1, "no text in it may close the script early"
    # Vega's code must arrive unchanged: it holds regular expressions such as /</ that a blunt escape would break.
    assert plots.javascript_bundle().replace("</script", "<\\/script") in live
    monkeypatch.setenv("AXMOE_BOOK", "1")
    assert len(_html(spec)["text/html"]) < 5_000


def test_source_shows_code_without_its_docstring():
    shown = plots.source(errors).data
    assert shown.startswith("def errors(") and '"""' not in shown and "mean = (weight * error).sum().item()" in shown


def test_source_shows_methods_too():
    shown = plots.source(pipeline.Convolve.law).data
    assert shown.startswith("def law(self") and "reference.conv2d" in shown


def test_every_chart_has_its_own_place(monkeypatch):
    monkeypatch.setenv("AXMOE_BOOK", "1")
    spec = plots.proxy_check({"mul8s_1L2J": 0.03}).to_dict()
    assert _html(spec)["text/html"].split('"')[1] != _html(spec)["text/html"].split('"')[1]


def test_numbers_without_evidence_are_not_drawn(textures):
    origin = runs.evidence(textures, scale="quick", seed=0, epochs=2)
    row = {"multiplier": "mul8s_1L2J", "top1": 0.5, "power_mw": 0.3, "mean_error": 0.75, "seconds": 1.0}
    text = json.dumps(plots.resilience([{**row, **origin}]).to_dict())
    assert "synthetic, 64 images, 2 epochs, seed 0 (quick)" in text, "the legend says what and how much"
    with pytest.raises(ValueError, match="'mul8s_1L2J' lacks dataset"):
        plots.resilience([row])
    with pytest.raises(ValueError, match="lacks commit"):
        plots.resilience([{**row, **origin, "commit": ""}])


def test_error_maps_average_the_table():
    chart = plots.error_maps(["mul8s_1KVA"]).to_dict()
    text = json.dumps(chart)
    table = (multiplier("mul8s_1KVA").table - multiplier("mul8s_1KV6").table).double()
    means = table.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).mean((1, 3))
    assert f"up to {means.abs().max():.0f}" in text
    top = means.abs().max()
    assert f"-128,-128,{means[0, 0] / top:.3g}" in text and f"120,-128,{means[-1, 0] / top:.3g}" in text


# ------------------------------------------------------------------------ bytes and layers


@pytest.fixture
def seen():
    histogram = Histogram("conv")
    histogram.update(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu())
    return histogram


def measured(name="conv", *, channels=3):
    ones = torch.ones(channels)
    return {name: LayerError(shift=-0.25 * ones, scatter=0.5 * ones, signal=2 * ones, gain=ones)}


def test_the_charts_of_layers_compile_and_stay_small(seen, textures, monkeypatch):
    monkeypatch.setenv("AXMOE_BOOK", "1")
    origin = {"seconds": 1.0, **runs.evidence(textures, scale="quick", seed=0, epochs=1)}
    rows = [
        {"multiplier": name, "regime": regime, "top1": top1, **origin}
        for name, regime, top1 in (
            ("float32", "not retrained", 0.9),
            ("mul8s_1KVA", "not retrained", 0.5),
            ("mul8s_1KVA", "bias corrected", 0.8),
        )
    ]
    charts = [
        plots.clip_explorer(seen, name="conv"),
        plots.code_counts({"conv": torch.tensor([0, 0, 5, 127], dtype=torch.int8)}),
        plots.channel_ranges(torch.randn(4, 3, 3, 3), name="conv"),
        plots.straight_through(0.1),
        plots.sum_errors(["mul8s_1KVA"], {"all bytes alike": (None, None)}, [9, 36]),
        plots.channel_shifts({"mul8s_1KVA": measured()}),
        plots.corrected(rows),
    ]
    for chart in charts:
        compiled(chart)
        assert len(_html(chart.to_dict())["text/html"]) < 60_000
    with pytest.raises(ValueError, match="lacks commit"):
        plots.corrected([{**rows[0], "commit": ""}])


def test_clip_errors_are_those_of_the_real_quantiser(seen):
    """Counted from bins against computed from values, wide and narrow; their least is what "mse" finds."""
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).relu().double()
    for clip in (0.5, 2.0, 4.5):
        rounding, clipping = plots.clip_errors(seen, torch.tensor([clip]))
        step = clip / 127
        wrong = (quantise(x, step).double() * step - x) ** 2
        assert (rounding + clipping).item() == pytest.approx(wrong.mean().item(), rel=0.05)
        # Up to half a step beyond the clip point a value still rounds.
        assert clipping.item() == pytest.approx((wrong * (x > clip + step / 2)).mean().item(), rel=0.05, abs=1e-9)
    clips = torch.linspace(0.1, 1, 91) * seen.largest
    best = clips[sum(plots.clip_errors(seen, clips)).argmin()]
    assert best == pytest.approx(float(seen.scale("mse")) * 127, rel=0.011)


def test_the_layers_charts_say_what_they_were_given(seen):
    codes = torch.tensor([-127, 0, 0, 5], dtype=torch.int8)
    assert "3 of 255 codes occur" in figures_of(plots.code_counts({"conv": codes}).to_dict())
    rows = json.dumps(plots.channel_shifts({"mul8s_1KVA": measured()}).to_dict())
    assert '"shift": -0.125' in rows and '"high": 0.25' in rows, "in parts of the channel's signal"
    lean = next(
        row
        for data in plots.sum_errors(["mul8s_1KVA"], {"all": (None, None)}, [9, 36]).to_dict()["datasets"].values()
        for row in data
        if row["K"] == 36 and row["part"].startswith("lean")
    )
    # 36 products lean by 36 * 12.25 = 441; the exact sum varies by 6 * 73.9 * 73.9 = 32,768 (2^30 / 2^15).
    assert lean["predicted"] == pytest.approx(441 / 32_768, rel=0.01)
    assert lean["measured"] == pytest.approx(lean["predicted"], rel=0.05)


def test_rows_are_packed_and_the_page_gets_them_back():
    """The browser's own unpacking is run by every page of the built book; here its inverse is checked on the data."""
    rows = [{"x": n, "dataset": "digits", "seed": 0} for n in range(3)]
    assert _packed({"datasets": {"d": rows}})["datasets"]["d"] == {
        "same": {"dataset": "digits", "seed": 0},
        "columns": ["x"],
        "rows": [[0], [1], [2]],
    }
    for left in ([{"x": 1}], [{"x": 1}, {"y": 2}], "a,b\n1,2"):  # one row, unlike rows, text
        assert _packed({"datasets": {"d": left}})["datasets"]["d"] == left
    assert _packed({"mark": "point"}) == {"mark": "point"}

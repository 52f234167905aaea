"""Figures: they hold what they claim, draw offline, and refuse numbers without evidence."""

import json
import re

import pytest
import torch
import vl_convert

from axmoe_lite import EVOAPPROX, errors, multiplier, pipeline, plots, runs
from axmoe_lite.plots.theme import _html


def compiled(chart):
    return vl_convert.vegalite_to_vega(chart.to_dict())


CHARTS = {
    "explorer": plots.broken_array_explorer,
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


def test_the_explorers_expressions_give_the_real_multiplier():
    """The page's own arithmetic, run by Vega on all 65,536 pairs, against the table."""
    spec = plots.broken_array_explorer().to_dict()
    sliders = {param["name"]: param for param in spec["params"]}
    for drops in [(1, 1, 0), (0, 0, 4), (2, 0, 5), (3, 5, 9), (6, 6, 10)]:
        for slider, value in zip(("drop_a", "drop_b", "drop_columns"), drops, strict=True):
            sliders[slider]["value"] = value
        texts = figures_of(spec)
        name = f"broken_array({','.join(map(str, drops))})"
        found = errors(multiplier(name))
        assert f"mean |error|:  {found.mae:.1f}" in texts
        assert f"worst |error|:  {found.wce}" in texts
        assert f"mean error (bias):  {found.mean_error:+.2f}".replace("-", "\N{MINUS SIGN}") in texts
        positive = errors(multiplier(name), a=(torch.arange(-128, 128) >= 0).double()).mean_error
        assert f"bias for a ≥ 0:  {positive:+.2f}".replace("-", "\N{MINUS SIGN}") in texts
        share = multiplier(name).power_mw / multiplier("mul8s_1KV6").power_mw
        assert any(f"{share:.0%} of the exact" in text for text in texts)


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

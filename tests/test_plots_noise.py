"""Noise in figures: pairs where they were measured, shares that add up, points lost from the right network."""

import functools
import re

import pytest
import vl_convert

from axmoe_lite import EXACT, cost, runs
from axmoe_lite.plots import noise_fronts, predictions, tolerance_bars

SIMULATED = {"conv": {"mul8s_1L2J": 10.0, "mul8s_1L2L": 1000.0}, "fc": {"mul8s_1L2J": 20.0, "mul8s_1L2L": 0.0}}
PREDICTED = {
    "multi": {"conv": {"mul8s_1L2J": 11.0, "mul8s_1L2L": 900.0}, "fc": {"mul8s_1L2J": 20.0, "mul8s_1L2L": 0.0}},
    "single": {"conv": {"mul8s_1L2J": 5.0, "mul8s_1L2L": 700.0}, "fc": {"mul8s_1L2J": 10.0, "mul8s_1L2L": 0.0}},
}
SIGMA = {0.2: {"conv": 0.1, "fc": 0.05}, 0.05: {"conv": 0.02, "fc": 0.0}}
MACS = cost.Macs({n: cost.LayerMacs("conv", m, m) for n, m in (("conv", 60), ("fc", 30), ("head", 10))}, 1, 1)
ORIGIN = {**runs.evidence(10_000, scale="paper", seed=0, epochs=60), "dataset": "cifar100", "seconds": 1.0}
ORIGIN |= {"network": "resnet8", "model": "multi", "commit": "0123456789", "device": "a processor"}
ORIGIN |= {"noise_epochs": 3, "noise_images": 50_000, "retrain_epochs": 2, "retrain_images": 25_000}


def row(family, setting, regime, saved, top1, **other) -> dict:
    return {"family": family, "setting": setting, "regime": regime, "saved": saved, "top1": top1, **ORIGIN, **other}


ROWS = [
    row("matched", "0.2", "not retrained", 0.40, 0.20),
    row("matched", "0.2", "retrained", 0.40, 0.595),
    row("matched", "0.5", "retrained", 0.60, 0.58),
    row("matched, exact weights", "0.2", "retrained", 0.40, 0.585),
    row("uniform", EXACT, "not retrained", 0.0, 0.60),
    row("uniform", EXACT, "retrained", 0.0, 0.61),
    row("uniform", "mul8s_1L2L", "retrained", 0.53, 0.55),
]
FIGURES = {
    "predictions": functools.partial(predictions, PREDICTED, SIMULATED),
    "tolerance_bars": functools.partial(tolerance_bars, SIGMA, MACS),
    "noise_fronts": functools.partial(noise_fronts, ROWS),
}


@functools.cache
def made(name: str) -> dict:
    """The figure, checked against Vega-Lite's schema."""
    return FIGURES[name]().to_dict()


def find(spec: dict, **place) -> list[dict]:
    """The rows of a specification's data that have all these values."""
    data = [each for rows in spec["datasets"].values() for each in rows]
    return [each for each in data if all(name in each and each[name] == value for name, value in place.items())]


def drawn(spec: dict, **chosen) -> str:
    params = [{**p, "value": chosen[p["name"]]} if p["name"] in chosen else p for p in spec["params"]]
    return vl_convert.vegalite_to_svg({**spec, "params": params})


def texts(spec: dict, **chosen) -> list[str]:
    return re.findall(r">([^<>]+)</text>", drawn(spec, **chosen))


def inside(spec, key: str) -> list:
    """Everything that stands under this key, however deep."""
    below = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else []
    own = [spec[key]] if isinstance(spec, dict) and key in spec else []
    return [*own, *(found for part in below for found in inside(part, key))]


@pytest.mark.parametrize("name", FIGURES)
def test_a_click_on_the_legend_reaches_the_chart(name):
    """Vega-Lite merges the legends of all layers, and only the first one's layer can make it listen."""
    vega = vl_convert.vegalite_to_vega(made(name))
    (legend,) = inside(vega, "legends")[0]
    assert legend["encode"]["symbols"]["interactive"] and legend["encode"]["labels"]["interactive"]
    assert "shape" in legend and {"fill", "stroke"} & set(legend)  # never colour alone


@pytest.mark.parametrize("name", FIGURES)
def test_everything_draws_and_nothing_is_no_number(name):
    svg = drawn(made(name))
    assert "NaN" not in svg and svg.count("aria-roledescription") > 2


def test_each_pair_is_where_it_was_measured():
    spec = made("predictions")
    (found,) = find(spec, model="multi", layer="conv", multiplier="mul8s_1L2J")
    assert (found["simulated"], found["predicted"], found["ratio"]) == (10.0, 11.0, pytest.approx(1.1))
    assert len(find(spec, model="single")) == 3
    assert "2 marks without an error are left out." in spec["title"]["subtitle"]  # fc under L2L, in both models


def test_both_axes_are_alike_and_hold_all_marks():
    """The least is 5, the most 1000: from 5 / 1.3 to 1000 * 1.3, so that agreement is the diagonal."""
    x, y = (made("predictions")["layer"][0]["encoding"][axis]["scale"] for axis in "xy")
    assert x == y and x["type"] == "log" and x["domain"] == pytest.approx([5 / 1.3, 1300])
    line = [each for each in find(made("predictions")) if "model" not in each]
    assert [each["simulated"] for each in line] == [each["predicted"] for each in line] == x["domain"]
    assert texts(made("predictions")).count("100") == 2  # ticks at the same decades


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        ({}, "no pair that errs"),
        ({"mutli": PREDICTED["multi"]}, "No model is called 'mutli'; there are multi, single, monte carlo"),
        ({"multi": {"conv": PREDICTED["multi"]["conv"]}}, "'fc' with 'mul8s_1L2J' is not both predicted .multi. and"),
        ({"multi": {layer: dict.fromkeys(row, 0.0) for layer, row in SIMULATED.items()}}, "no pair that errs"),
    ],
)
def test_predictions_of_something_else_are_refused(predicted, message):
    with pytest.raises(ValueError, match=message):
        predictions(predicted, SIMULATED)


def test_sigma_and_the_share_of_all_products():
    """60 and 30 of 100; the head has 10 and no sigma."""
    spec = made("tolerance_bars")
    (found,) = find(spec, **{"layer": "fc", "lambda": "0.2"})
    assert (found["sigma"], found["share"]) == (0.05, 0.3)
    assert {each["layer"] for each in find(spec) if "layer" in each} == {"conv", "fc"}
    scale = spec["hconcat"][0]["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == ["0.05", "0.2"]  # from the least, whatever came first


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        ({}, "0 lambdas are to be drawn; it can be 1 to 6"),
        ({n / 10: SIGMA[0.2] for n in range(1, 8)}, "7 lambdas"),
        ({0.1: {"conv": 0.1}, 0.2: {"fc": 0.1}}, "lambda 0.2 has the layers fc; the first one has conv"),
        ({0.1: {"convv": 0.1}}, "'convv' has a sigma but was not counted; there are conv, fc, head"),
        ({0.1: {"conv": 0.6}}, "sigma of 'conv' is 0.6; it must lie within 0 and sigma_max, 0.5"),
    ],
)
def test_what_is_no_tolerance_is_refused(sigma, message):
    with pytest.raises(ValueError, match=message):
        tolerance_bars(sigma, MACS)


def test_points_are_lost_from_the_exact_network_of_the_same_regime():
    """Retrained, 61 % is the reference, not the 60 % before: 61 - 58 = 3."""
    spec = made("noise_fronts")
    lost = {(r["setting"], r["regime"]): r["lost"] for r in find(spec, family="matched")}
    assert lost == {("0.2", "not retrained"): 40.0, ("0.2", "retrained"): 1.5, ("0.5", "retrained"): 3.0}
    (found,) = find(spec, setting=EXACT, regime="retrained")
    assert found["lost"] == 0 and found["reference"] == 0.61
    alone = noise_fronts([each for each in ROWS if each is not ROWS[5]]).to_dict(validate=False)
    (found,) = find(alone, setting="0.5")
    assert found["lost"] == 2.0, "not retrained it is 60 %, the only one there is"


def test_names_are_drawn_where_there_is_room():
    near = [row("uniform", name, "retrained", saved, 0.6) for name, saved in (("KV8", 0.01), ("KVM", 0.06))]
    shown = texts(noise_fronts([*ROWS, *near]).to_dict(validate=False))
    assert {"KV6", "KVM", "L2L"} <= set(shown) and "KV8" not in shown


def test_the_buttons_pick_a_regime():
    shown = texts(made("noise_fronts"))
    assert {"λ 0.2", "λ 0.5", "KV6", "L2L"} <= set(shown)
    shown = texts(made("noise_fronts"), noise_regime="not retrained")
    assert {"λ 0.2", "KV6"} <= set(shown) and not {"λ 0.5", "L2L"} & set(shown)
    assert not inside(noise_fronts([ROWS[4]]).to_dict(validate=False), "options"), "one regime needs no buttons"


def test_the_papers_claim_is_a_box():
    (found,) = find(made("noise_fronts"), low=0.7)
    assert (found["high"], found["none"], found["most"]) == (0.79, 0.0, 1.0)


def test_evidence_is_in_the_tooltip_and_says_of_each_row_what_is_true_of_it():
    spec = made("noise_fronts")
    told = {tip["field"] for tip in spec["layer"][0]["encoding"]["tooltip"]}
    assert told >= {"dataset", "n_test", "seed", "epochs", "commit", "date", "device", "noise_epochs", "retrain_epochs"}
    (found,) = find(spec, family="matched", setting="0.2", regime="not retrained")
    assert (found["noise_images"], found["retrain_images"]) == ("50000", "none")
    (found,) = find(spec, setting="mul8s_1L2L")
    assert (found["noise_epochs"], found["retrain_epochs"], found["commit"]) == ("none", "2", "0123456789")


def test_rows_may_be_fresh_or_read_from_a_file():
    read = noise_fronts([{name: str(value) for name, value in each.items()} for each in ROWS]).to_dict(validate=False)
    for setting, regime in {(each["setting"], each["regime"]) for each in ROWS}:
        place = {"setting": setting, "regime": regime, "family": "matched"}
        fresh = [(r["lost"], r["saved"]) for r in find(made("noise_fronts"), **place)]
        assert [(r["lost"], r["saved"]) for r in find(read, **place)] == fresh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": ""}, "'0.2' lacks commit"),
        ({"family": "mached"}, "No family is called 'mached'; there are matched, "),
        ({"top1": 58}, "top1 of '0.2' is 58"),
        ({"saved": "nan"}, "saved of '0.2' is nan"),
        ({"seed": 1}, "The rows have seed = 1, 0; draw one study at a time"),
        ({"dataset": "cifar10"}, "The rows have dataset = cifar10, cifar100"),
        ({"model": "single"}, "The rows have model = single, multi"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        noise_fronts([{**ROWS[0], **change}, *ROWS[1:]])


def test_without_a_reference_nothing_is_lost():
    with pytest.raises(ValueError, match="No row is 'mul8s_1KV6', 'not retrained'"):
        noise_fronts([each for each in ROWS if each is not ROWS[4]])
    with pytest.raises(ValueError, match="was given no rows"):
        noise_fronts([])

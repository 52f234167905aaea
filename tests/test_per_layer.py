"""How far each layer is off, and every other channel negated: behind ReLU errors then stop adding up."""

import copy

import pytest
import torch
from torch import nn

from axmoe_lite import EXACT, approximate, datasets, errors, models, multiplier, plots, runs, study
from axmoe_lite.layers.correction import layer_errors
from axmoe_lite.runs import EVIDENCE


@pytest.fixture(scope="module")
def images():
    return datasets.synthetic(classes=3, size=8, n_train=24, n_test=12)


def behind_relu():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 10), nn.ReLU(), nn.Linear(10, 3),
    ).eval()  # fmt: skip


def test_errors_by_layer_by_hand(images):
    network = behind_relu()
    before = copy.deepcopy(network.state_dict())
    rows = study.errors_by_layer(network, images, [EXACT, "mul8s_1L2L"], n=7, calibration=11)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [(row["multiplier"], row["layer"]) for row in rows[3:]] == [("mul8s_1L2L", layer) for layer in "025"]
    assert all(row["shift"] == row["scatter"] == 0 for row in rows[:3]) and all(row["shift"] > 0 for row in rows[3:])
    approximate(network, "mul8s_1L2L", calibration=images.normalised(images.subset(n_train=11).x_train))
    found = layer_errors(network, images.normalised(images.subset(n_train=7).x_train))
    for row in rows[3:]:
        error = found[row["layer"]]
        for part in ("shift", "scatter"):
            by_hand = (getattr(error, part).norm() / error.signal.norm()).item()
            assert row[part] == pytest.approx(by_hand, rel=1e-4)
    with pytest.raises(ValueError, match="No multiplier is called 'mul8s_1L2X'"):
        study.errors_by_layer(network, images, ["mul8s_1L2X"])


def test_behind_relu_cut_operands_err_one_way_until_signs_are_mixed(images):
    x = images.normalised(images.x_train)
    network = approximate(behind_relu(), "mul8s_1L2J", calibration=x)

    def off(one):
        return [error.shift.norm().item() for error in layer_errors(one, x).values()][1:]  # the first sees images

    before, scales = off(network), [layer.scale_x.item() for layer in network if hasattr(layer, "scale_x")]
    mixed = approximate(network, "signs:mul8s_1L2J")
    assert [layer.scale_x.item() for layer in mixed if hasattr(layer, "scale_x")] == scales
    assert all(after < 0.7 * before for before, after in zip(before, off(mixed), strict=True))


def test_the_study_takes_other_signs(images):
    network, names = models.resnet8(classes=3, width=0.25), ["mul8s_1L2L", "signs:mul8s_1L2L", f"signs:{EXACT}", EXACT]
    plain, signs, same, exact = study.measure(network, images, names, regimes=["not retrained"], progress=False)
    assert plain["p_norm"] == signs["p_norm"] and plain["power_mw"] == signs["power_mw"]
    assert plain["digest"] != signs["digest"] and same["answers"] == exact["answers"]
    both = errors(multiplier("mul8s_1L2L")).mean_error, errors(multiplier("negated:mul8s_1L2L")).mean_error
    assert signs["mean_error"] == pytest.approx(sum(both) / 2) and plain["mean_error"] == both[0]


def test_figures_of_both(images):
    evidence = dict.fromkeys(EVIDENCE, "x") | {"seed": 0, "epochs": 1, "n_train": 24, "n_test": 12, "scale": "quick"}
    rows = study.errors_by_layer(behind_relu(), images, [EXACT, "mul8s_1L2L"], n=7, calibration=11)
    with pytest.raises(ValueError, match="it is not drawn"):
        plots.layer_errors(rows)
    rows = [{**evidence, "network": "mine", "dataset": "these", **row} for row in rows]
    spec = plots.layer_errors(rows).to_dict()
    (data,) = [values for values in spec["datasets"].values() if values and "kind" in values[0]]
    assert {row["circuit"] for row in data} == {"L2L, 47%"} and len(data) == 2 * 3


def test_a_figure_of_four_remedies():
    names = dict.fromkeys(["as it is", "other signs", "fresh averages", "both"], 0.5)
    evidence = dict.fromkeys(EVIDENCE, "x") | {"seed": 0, "epochs": 1, "n_train": 24, "n_test": 12, "scale": "quick"}
    rows = [{**evidence, "multiplier": "mul8s_1L2L", "regime": name, "top1": 0.5} for name in names]
    chart = plots.corrected(rows, title="What do signs give back?").to_dict()
    assert chart["title"]["text"] == "What do signs give back?"
    (points,) = [layer for layer in chart["concat"][0]["layer"] if layer["mark"]["type"] == "point"]
    for channel in ("color", "shape"):
        scale = points["encoding"][channel]["scale"]
        assert scale["domain"] == list(names) and len(set(scale["range"])) == 4


def test_the_front_page_tells_other_weights_apart():
    rows = [row for row in runs.read("axmoe_resnet20_cifar100") if (row["topology"], row["seed"]) == ("dense", "0")]
    of = {"network": "resnet20", "topology": "dense", "seed": "0"}
    cured = [row for row in runs.read("signs") if of.items() <= row.items()]
    here = "mul8s_1L2N"
    rows = [row for row in (*rows, *cured) if row["multiplier"] in (EXACT, here, f"tuned_relu:{here}")]
    (data,) = [v for v in plots.healing(rows).to_dict()["datasets"].values() if "state" in v[0]]
    found = {(row["multiplier"], row["state"].split(",")[0]): row["top1"] for row in data}
    both = (f"tuned_relu:{here}", "norms refreshed")
    expected = next(float(row["top1"]) for row in cured if (row["multiplier"], row["regime"]) == both)
    assert found[here, "averages anew"] == expected > found[here, "BatchNorm's averages taken anew"]
    assert {name for name, _ in found} == {here}
    with pytest.raises(ValueError, match="shows one network; these rows have other, resnet20"):
        plots.healing([*rows, {**rows[0], "network": "other"}])

"""How far each layer is off, and half of the channels negated: exact products stay, and errors stop adding up."""

import copy

import pytest
import torch
from torch import nn

from axmoe_lite import EXACT, approximate, datasets, models, plots, study
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


@pytest.mark.parametrize("name", [EXACT, "mul8s_1L2L", "mul8s_1KVA"])
def test_negated_channels_change_no_exact_product(name, images):
    x = images.normalised(images.x_test)
    network = approximate(behind_relu(), name, calibration=x)
    weight, y = network[2].weight.clone(), network(x)
    made, other = study.negated(network, seed=0), study.negated(network, seed=1)
    assert torch.equal(network[2].weight, weight) and torch.equal(network(x), y), "it was given, not ours"
    assert torch.equal(made(x), y) == torch.equal(other(x), y) == (name == EXACT)
    assert torch.equal(made[2].weight.abs(), weight.abs())
    turned = (made[2].weight != weight).flatten(2).all(2)  # [8 outputs, 3 inputs of each group]
    assert turned.view(4, 2, 3)[:, 0].sum() == 6, "half of the twelve inputs"
    assert torch.equal(turned[::2], turned[1::2]), "both outputs of a group see the same inputs"
    assert not torch.equal(made[2].weight, other[2].weight)


def test_behind_relu_cut_operands_err_one_way_until_signs_are_mixed(images):
    x = images.normalised(images.x_train)
    network = approximate(behind_relu(), "mul8s_1L2J", calibration=x)

    def off(one):
        return [error.shift.norm().item() for error in layer_errors(one, x).values()][1:]  # the first sees images

    mixed = [sum(several) / 4 for several in zip(*(off(study.negated(network, seed=n)) for n in range(4)), strict=True)]
    assert all(after < 0.7 * before for before, after in zip(off(network), mixed, strict=True))


def test_signs_are_rows_that_agree_with_the_study(images):
    network = models.resnet8(classes=3, width=0.25)
    names = ["mul8s_1KV6", "mul8s_1L2L"]
    rows = study.signs(network, images, names, draws=[3], progress=False)
    assert [(r["multiplier"], r["draw"]) for r in rows] == [("float32", -1), *((n, d) for n in names for d in (-1, 3))]
    study_rows = study.measure(network, images, ["float32", *names], regimes=["not retrained"], progress=False)
    assert [r["correct"] for r in study_rows] == [r["correct"] for r in rows if r["draw"] < 0]
    exact = [r["correct"] for r in rows if r["multiplier"] == EXACT]
    assert exact[0] == exact[1]


def test_figures_of_both(images):
    evidence = dict.fromkeys(EVIDENCE, "x") | {"seed": 0, "epochs": 1, "n_train": 24, "n_test": 12, "scale": "quick"}
    rows = study.errors_by_layer(behind_relu(), images, [EXACT, "mul8s_1L2L"], n=7, calibration=11)
    with pytest.raises(ValueError, match="it is not drawn"):
        plots.layer_errors(rows)
    rows = [{**evidence, "network": "mine", "dataset": "these", **row} for row in rows]
    spec = plots.layer_errors(rows).to_dict()
    (data,) = [values for values in spec["datasets"].values() if values and "kind" in values[0]]
    assert {row["circuit"] for row in data} == {"L2L, 47%"} and len(data) == 2 * 3
    rows = study.signs(models.resnet8(classes=3, width=0.25), images, ["mul8s_1L2L"], draws=[0, 1], progress=False)
    text = plots.corrected([{**evidence, **row} for row in rows], title="What do signs give back?").to_json()
    assert "What do signs give back?" in text and '"half negated"' in text

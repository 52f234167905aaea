"""An approximate network on disk: multipliers, scales and options come back with the weights."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from axmoe_lite import Multiplier, approximate, assignment_of, models, multiplier, restore, train
from axmoe_lite.layers.correction import correct_bias


@pytest.fixture
def x():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def build():
    return models.resnet8(classes=10, width=0.5).eval()


ASSIGNMENTS = {
    "one for all": "mul8s_1L2L",
    "other signs": "signs:mul8s_1L2L",
    "some layers": {"conv1": "drum(4)", "layer2.0.conv1": "swap:mul8s_1KVM"},
    "filter by filter": {"conv1": ["mul8s_1KV6", "mul8s_1L2L"] * 4},
}


@pytest.mark.parametrize("assignment", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
@pytest.mark.parametrize("options", [{}, {"per_channel": True}])
def test_it_answers_as_before(x, tmp_path, assignment, options):
    network = approximate(build(), assignment, calibration=x, **options)
    train.save(network, tmp_path / "a.safetensors", recipe={"epochs": 3})
    again = build()
    assert train.load(again, tmp_path / "a.safetensors") == {"epochs": 3}
    assert assignment_of(again) == assignment_of(network) and torch.equal(again(x), network(x))
    assert restore(again)(x).shape == (6, 10)


def test_slopes_and_corrected_biases_come_back(x, tmp_path):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    approximate(plain, "mul8s_1KVA", calibration=x, gradient="smoothed")
    correct_bias(plain, x)
    train.save(plain, tmp_path / "a.safetensors", recipe={})
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    train.load(again, tmp_path / "a.safetensors")
    assert again[0].gradient == "smoothed" and torch.equal(again(x), plain(x))


def test_an_approximate_model_keeps_its_multipliers(x, tmp_path):
    train.save(approximate(build(), "mul8s_1L2L", calibration=x), tmp_path / "a.safetensors", recipe={})
    other = approximate(build(), "mul8s_1KV6", calibration=x)
    train.load(other, tmp_path / "a.safetensors")
    assert set(assignment_of(other).values()) == {"mul8s_1KV6"}


def test_another_table_of_that_name_is_refused_and_nothing_changes(x, tmp_path):
    table = multiplier("mul8s_1L2L").table
    np.save(file := tmp_path / "mine.npy", table.numpy())
    train.save(approximate(build(), f"file:{file}", calibration=x), tmp_path / "a.safetensors", recipe={})
    np.save(file, multiplier("mul8s_1L2N").table.numpy())
    again = build()
    before, modules = again.state_dict(), list(again.modules())
    with pytest.raises(ValueError, match=r"'conv1' was saved with.*another table|digest"):
        train.load(again, tmp_path / "a.safetensors")
    assert list(again.modules()) == modules and all(torch.equal(v, before[k]) for k, v in again.state_dict().items())


def test_a_multiplier_of_memory_alone_is_named_when_it_is_loaded(x, tmp_path):
    mine = Multiplier("mine", multiplier("mul8s_1L2L").table)
    train.save(approximate(build(), mine, calibration=x), tmp_path / "a.safetensors", recipe={})
    with pytest.raises(ValueError, match="'mine'"):
        train.load(build(), tmp_path / "a.safetensors")
    again = approximate(build(), mine, calibration=x)
    assert train.load(again, tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize("told", ['{"conv1": 3}', '{"conv1": {"multiplier": "mul8s_1L2L"}}', "[]", '{"conv9": {}}'])
def test_a_header_that_says_nonsense_is_refused_and_nothing_changes(x, tmp_path, told):
    file, again = tmp_path / "a.safetensors", build()
    train.save(approximate(build(), "mul8s_1L2L", calibration=x), file, recipe={})
    with safe_open(file, framework="pt") as opened:
        tensors, header = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    save_file(tensors, file, header | {"approximate": told})
    modules = list(again.modules())
    with pytest.raises(ValueError, match="no readable 'approximate' in its header"):
        train.load(again, file)
    assert list(again.modules()) == modules and json.loads(header["approximate"])["conv1"]["gradient"]


def test_tied_weights_are_written_twice(tmp_path):
    def tied():
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    one, other = tied(), tied()
    train.save(one, tmp_path / "a.safetensors", recipe={})
    train.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other[2].weight, one[0].weight) and other[2].weight is other[0].weight

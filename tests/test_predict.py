"""Which codes a layer sees, and the errors that are foretold from them."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from foretold import FOUR, MIXED, Two, learned, shares
from torch import nn

from axmoe_lite import EVOAPPROX, datasets, multiplier
from axmoe_lite.multipliers import EXACT
from axmoe_lite.search.predict import (
    Operands,
    agreement,
    operands,
    predicted_mean,
    predicted_std,
    simulated_std,
)
from axmoe_lite.train import calibrate


@pytest.fixture(scope="module")
def dense(textures):
    return learned(textures)


# ------------------------------------------------------------------------------ which codes a layer sees


class Grouped(nn.Module):
    """Padding, stride, dilation and groups at once, then a linear layer; 6 x 6 images of 4 channels."""

    def __init__(self, mode="zeros"):
        super().__init__()
        options = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 2, "padding_mode": mode}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(4, 6, (3, 2), **options), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.conv(x.repeat(1, 2, 1, 1)[:, :4]).relu().mean((2, 3)))


def few_images(textures):
    cut = {"x_train": textures.x_train[..., :6, :6], "x_test": textures.x_test[..., :6, :6]}
    return replace(textures, **cut).subset(n_train=8)


def unfolded(network, images):
    """Every receptive field of the convolution by torch's own unfolding: codes [8 * positions * groups, 12]."""
    layer = calibrate(copy.deepcopy(network), {"conv": EXACT}, images).conv
    x = images.normalised(images.x_train).repeat(1, 2, 1, 1)[:, :4]
    mode = network.conv.padding_mode
    x = nn.functional.pad(x, (1, 1, 2, 2), mode="constant" if mode == "zeros" else mode)
    codes = (x / layer.scale_x).round().clamp(-127, 127)
    fields = nn.functional.unfold(codes, (3, 2), stride=(2, 1), dilation=(1, 2))
    weight = (layer.weight / layer.weight.abs().max() * 127).round().detach()
    sums = nn.functional.conv2d(codes.double(), weight.double(), stride=(2, 1), dilation=(1, 2), groups=2)
    return fields.unflatten(1, (2, 12)).permute(0, 3, 1, 2).reshape(-1, 12), weight, sums


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_patches_are_the_fields_that_sums_see(textures, mode):
    images, network = few_images(textures), Grouped(mode)
    found = operands(network, images, layers=["conv"], patches=4000, n=8, seed=2)["conv"]
    fields, weight, sums = unfolded(network, images)
    expected = {tuple(np.bincount(field + 128, minlength=256)) for field in fields.numpy().astype(int)}
    drawn = {tuple(row) for row in (found.patches * 12).round().int().tolist()}
    assert drawn == expected, "all of them in 4000 draws, and nothing else"
    assert found.fan_in == 12 and found.signal == pytest.approx(sums.std(correction=0).item(), rel=1e-9)
    shares = np.bincount(weight.flatten().numpy().astype(int) + 128, minlength=256) / weight.numel()
    assert found.weights.numpy() == pytest.approx(shares)


def test_operands_depend_on_the_seed_only(dense, textures):
    options = {"patches": 30, "n": 16, "calibrate_options": {"n": 50}}
    first, again, other = (operands(dense, textures, seed=seed, **options)["conv1"] for seed in (0, 0, 1))
    assert torch.equal(first.patches, again.patches) and not torch.equal(first.patches, other.patches)
    both = operands(Two(), textures, **options)["many"]
    alone = operands(Two(), textures, layers=["many"], **options)["many"]
    assert torch.equal(alone.patches, both.patches), "whoever else is asked"
    truth = [simulated_std(Two(), textures, FOUR, n=4, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert truth[0] == truth[1] != truth[2], "it draws the images"
    different = replace(textures, x_test=255 - textures.x_test)
    assert torch.equal(operands(dense, different, **options)["conv1"].patches, first.patches)


def test_a_layer_that_is_called_twice_is_seen_once():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.ReLU()

        def forward(self, x):
            return self.conv(self.norm(self.conv(x)) + 50)

    found = operands(Again(), datasets.synthetic(classes=2, size=4, n_train=8, n_test=4), layers=["conv"], patches=64)
    assert found["conv"].patches[:, :128].sum() > 0, "the second call sees no negative codes"


# ------------------------------------------------------------------------------ errors foretold


def test_the_single_model_by_hand():
    """Codes 1 and 3 half and half times the weight 3: two errors, whose deviation is half their difference."""
    one = Operands(torch.stack([shares((1, 1.0)), shares((3, 1.0))]), shares((3, 1.0)), fan_in=25, signal=1.0)
    circuit = multiplier("mul8s_1L2J")
    errors = [circuit(a, 3) - 3 * a for a in (1, 3)]
    assert errors[0] != errors[1]
    half = abs(errors[0] - errors[1]) / 2
    assert predicted_std({"l": one}, ["mul8s_1L2J"], model="single")["l"]["mul8s_1L2J"] == pytest.approx(5 * half)
    # Each patch is one code: nothing scatters within, and all 25 products of a sum err alike.
    assert predicted_std({"l": one}, ["mul8s_1L2J"])["l"]["mul8s_1L2J"] == pytest.approx(25 * half)
    assert predicted_mean({"l": one}, ["mul8s_1L2J"])["l"]["mul8s_1L2J"] == pytest.approx(25 * sum(errors) / 2)


@pytest.mark.parametrize("name", FOUR[1:])
def test_the_multi_model_equals_a_slow_loop(name):
    circuit, means, variances = multiplier(name), [], []
    for patch in MIXED.patches.numpy():
        pairs = [
            (p * q, circuit(a - 128, b - 128) - (a - 128) * (b - 128))
            for (a, p), (b, q) in itertools.product(enumerate(patch), enumerate(MIXED.weights.numpy()))
            if p * q > 0
        ]
        mean = sum(p * e for p, e in pairs)
        means.append(18 * mean)
        variances.append(18 * sum(p * (e - mean) ** 2 for p, e in pairs))
    total = np.mean(variances) + np.var(means)
    other = {"first": replace(MIXED, fan_in=3), "l": MIXED}  # a second layer, which must not get in the way
    assert predicted_std(other, FOUR)["l"][name] == pytest.approx(total**0.5)
    assert predicted_mean(other, FOUR)["l"][name] == pytest.approx(np.mean(means))


def test_models_agree_where_there_is_one_distribution():
    one = replace(MIXED, patches=MIXED.patches[1:2])
    tables = {
        m: predicted_std({"l": one}, FOUR, model=m, draws=20_000, progress=False)["l"]
        for m in ("multi", "single", "monte carlo")
    }
    assert tables["multi"] == pytest.approx(tables["single"])
    assert tables["monte carlo"] == pytest.approx(tables["single"], rel=0.03)  # deviations of 20,000 sums: 0.5 %
    assert tables["multi"][EXACT] == 0 == tables["monte carlo"][EXACT] and tables["single"]["mul8s_1L2L"] > 0
    again = predicted_std({"l": one}, FOUR, model="monte carlo", draws=20_000, progress=False)["l"]
    other = predicted_std({"l": one}, FOUR, model="monte carlo", draws=20_000, seed=1, progress=False)["l"]
    assert again == tables["monte carlo"] != other
    apart = [predicted_std({"l": MIXED}, FOUR[1:], model=m)["l"] for m in ("multi", "single")]
    assert all(apart[0][name] > apart[1][name] for name in FOUR[1:]), "what patches share does not cancel"


def test_the_simulation_adds_up_all_errors(textures):
    images, network = few_images(textures), Grouped()
    names = [*FOUR[::3], "swap:mul8s_1KVM"]  # not commutative: which operand is the row matters
    found = simulated_std(network, images, names, layers=["conv", "fc"], n=8, progress=False)
    assert found["conv"][EXACT] == found["fc"][EXACT] == 0
    fields, weight, _ = unfolded(network, images)
    fields = fields.numpy().astype(int).reshape(-1, 2, 12)  # positions, groups, K
    weight = weight.flatten(1).numpy().astype(int).reshape(2, 3, 12)
    for name in names[1:]:
        codes = np.arange(-128, 128)
        wrong = multiplier(name).table.numpy().astype(int) - codes[:, None] * codes
        errors = wrong[fields[:, :, None] + 128, weight[None] + 128].sum(-1)
        assert found["conv"][name] == pytest.approx(errors.std(), rel=1e-9)


def test_patches_foretell_better_than_one_distribution(dense, textures):
    options = {"n": 32, "calibrate_options": {"n": 50}}
    codes = operands(dense, textures, patches=256, **options)
    truth = simulated_std(dense, textures, EVOAPPROX, progress=False, **options)
    multi, single = (agreement(predicted_std(codes, EVOAPPROX, model=m), truth) for m in ("multi", "single"))
    assert multi["pairs"] == 7 * 12, "the exact circuit does not err"
    assert multi["log_correlation"] > 0.97 and multi["log_correlation"] > single["log_correlation"]
    assert multi["relative_error"] < 0.25 and multi["relative_error"] < 0.7 * single["relative_error"]


def test_agreement_by_hand():
    """Pairs (1, 2), (4, 4), (16, 4); the first circuit errs nowhere, and does not count."""
    foretold = {"a": {"x": 5.0, "y": 1.0}, "b": {"y": 4.0, "z": 16.0}}
    found = agreement(foretold, {"a": {"x": 0.0, "y": 2.0}, "b": {"y": 4.0, "z": 4.0}})
    assert found["pairs"] == 3 and found["relative_error"] == pytest.approx((0.5 + 0 + 3) / 3)
    # Deviations from the means 7 and 10/3: covariance 8 - 2 + 6 = 12, squares 126 and 8/3.
    assert found["correlation"] == pytest.approx(12 / (126 * 8 / 3) ** 0.5)
    # Powers of two 0, 2, 4 and 1, 2, 2 around 2 and 5/3: covariance 4/3 + 0 + 2/3 = 2, squares 8 and 2/3.
    assert found["log_correlation"] == pytest.approx(2 / (8 * 2 / 3) ** 0.5)

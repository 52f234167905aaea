"""AGN: noise that is what it says, errors foretold and counted, and a choice that can be redone by hand."""

import copy
import functools
import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import nn

from axmoe_lite import EVOAPPROX, approximate, cost, datasets, models, moe, multiplier
from axmoe_lite.layers import Matmul, assignment_of, default_layers
from axmoe_lite.models import upcycle
from axmoe_lite.multipliers import EXACT
from axmoe_lite.search import Trial
from axmoe_lite.search import agn as agn_module
from axmoe_lite.search import noise as noise_module
from axmoe_lite.search.agn import match, search
from axmoe_lite.search.noise import Noisy, tolerances
from axmoe_lite.search.predict import (
    Operands,
    agreement,
    operands,
    predicted_mean,
    predicted_std,
    simulated_std,
)
from axmoe_lite.train import calibrate, fit
from axmoe_lite.train import loop as loop_module

FOUR = ["mul8s_1KV6", "mul8s_1KVM", "mul8s_1L2J", "mul8s_1L2L"]
FIT = {"batch_size": 64, "augment": "none"}
PLAIN = {"n": 64, "progress": False, "calibrate_options": {"n": 50}, "fit_options": FIT}
QUICK = {"epochs": 1, "calibrate_options": {"n": 50}, "fit_options": FIT, "progress": False}


@pytest.fixture(scope="module")
def dense(textures):
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    fit(network, textures, epochs=3, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


@pytest.fixture(scope="module")
def base(dense, textures):
    return cost.count(dense, textures.normalised(textures.x_test[:1]))


def layer_of(kind):
    """A network of one layer with a bias that would dominate the deviation, and an input for it."""
    draw = torch.Generator().manual_seed(1)
    conv = kind.endswith("convolution")
    layer = nn.Conv2d(2, 3, 3, padding=1) if conv else nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight.normal_(generator=draw)
        layer.bias.copy_(torch.tensor([-100.0, 0.0, 100.0]))
    x = torch.randn(4, 2, 6, 6, generator=draw) if conv else torch.randn(4, 7, 5, generator=draw)
    network = nn.Sequential(layer)
    return (approximate(network, {"0": EXACT}, calibration=x) if "approximate" in kind else network), x


# ------------------------------------------------------------------------------ the noise


@pytest.mark.parametrize("kind", ["convolution", "linear", "approximate convolution", "approximate linear"])
def test_noise_and_its_gradients_by_hand(kind):
    network, x = layer_of(kind)
    noisy = Noisy(network, {"0": 1}, sigma_init=0.3, pace=2.0).train()
    y = network(x)
    channel = (1, 3, 1, 1) if "convolution" in kind else (3,)
    deviation = float(np.std((y - network[0].bias.view(channel)).detach().numpy()))
    assert deviation < 10 < y.std(), "the bias must not be in it"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        eps = torch.randn_like(y)
        torch.manual_seed(3)
        out = noisy(x)
    torch.testing.assert_close(out, y + 0.3 * deviation * eps)

    pull = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (plain,) = torch.autograd.grad((pull * y).sum(), network[0].weight)
    weight, learned = torch.autograd.grad((pull * out).sum(), [network[0].weight, noisy.learned])
    torch.testing.assert_close(weight, plain)  # the deviation is a constant
    assert learned.item() == pytest.approx((2.0 * deviation * pull * eps).sum().item(), rel=1e-4)


def test_only_training_inside_the_wrapper_is_noisy():
    network, x = layer_of("linear")
    noisy = Noisy(network, {"0": 1})
    assert noisy.train()(x).ne(network(x)).any()
    assert torch.equal(noisy.eval()(x), network(x))
    with pytest.raises(RuntimeError):
        noisy.train()(x[..., :2])
    assert torch.equal(network(x), noisy.eval()(x)), "nothing is left hanging on the network"
    assert noisy.network is network and noisy.train()(x[:0]).shape == (0, 7, 3), "nobody there is no error"


def test_the_penalty_by_hand():
    """Shares 1/4 and 3/4; 0.7 counts as 0.5: -0.2 (0.1 / 4 + 0.5 * 3 / 4) = -0.08. Beyond the cap nothing pulls."""
    noisy = Noisy(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 3)), {"0": 10, "1": 30}, lam=0.2, sigma_max=0.5)
    noisy.learned.data = torch.tensor([-0.1, 0.7])
    noisy.penalty().backward()
    assert noisy.penalty().item() == pytest.approx(-0.08)
    assert noisy.learned.grad.tolist() == pytest.approx([0.05, 0.0])  # more noise on the negative side is downwards
    assert noisy.tolerance() == pytest.approx({"0": 0.1, "1": 0.5})


def test_weight_decay_leaves_sigma_alone():
    network, _ = layer_of("linear")
    for decay, kept in ((0.01, 1.0), (0.0, 0.999**5)):  # lr 0.1 times decay 0.01, five times
        noisy = Noisy(network, {"0": 1}, lam=0.0, decay=decay)
        stepper = torch.optim.SGD([noisy.learned], lr=0.1, weight_decay=0.01)
        for _ in range(5):
            stepper.zero_grad()
            noisy.penalty().backward()
            stepper.step()
        assert noisy.sigma.item() == pytest.approx(0.1 * kept, rel=1e-6)


def test_pace_is_squared():
    """One step of SGD at rate 0.1 down lam = 0.2: sigma grows by 0.1 * 0.2 * pace**2."""
    network, _ = layer_of("linear")
    for pace in (1.0, 3.0):
        noisy = Noisy(network, {"0": 1}, pace=pace)
        stepper = torch.optim.SGD([noisy.learned], lr=0.1)
        noisy.penalty().backward()
        stepper.step()
        assert noisy.sigma.item() == pytest.approx(0.1 + 0.02 * pace**2)


# ------------------------------------------------------------------------------ a penalty in the training loop


class Pull:
    """A penalty with settings: pulls a parameter towards 0."""

    def __init__(self, parameter, strength):
        self.parameter, self.settings = parameter, {"strength": strength}

    def penalty(self):
        return self.settings["strength"] * self.parameter.square().sum()


def trained(textures, strength, **options):
    network = models.resnet8(classes=4, width=0.25)
    pull = Pull(network.fc.weight, strength).penalty if strength is not None else None
    call = {"epochs": 1, "lr": 0.01, "progress": False, "penalty": pull, **FIT, **options}
    return network, fit(network, textures, **call)


def test_a_penalty_is_minimised_but_not_reported(textures):
    plain, history = trained(textures, None)
    none, same = trained(textures, 0.0)
    pulled, other = trained(textures, 5.0, batch_size=256)
    start, first = trained(textures, None, batch_size=256)
    assert [row | {"seconds": 0} for row in history] == [row | {"seconds": 0} for row in same]
    assert torch.equal(plain.fc.weight, none.fc.weight)
    assert first[0]["loss"] == other[0]["loss"], "the only step has not been made when its loss is taken"
    assert pulled.fc.weight.norm() < 0.95 * start.fc.weight.norm()


def test_a_checkpoint_knows_its_penalty(textures, tmp_path):
    file = tmp_path / "fit.safetensors"
    trained(textures, 0.1, checkpoint=file)
    trained(textures, 0.1, checkpoint=file)
    for other in (0.2, None):
        with pytest.raises(ValueError, match="penalty was .Pull.penalty {'strength': 0.1}., now"):
            trained(textures, other, checkpoint=file)
    plain = tmp_path / "plain.safetensors"
    trained(textures, None, checkpoint=plain)
    with pytest.raises(ValueError, match="penalty was None, now .*<lambda>"):
        trained(textures, None, checkpoint=plain, penalty=lambda: torch.zeros(()))


# ------------------------------------------------------------------------------ tolerances


def test_tolerances_leave_the_network_and_the_random_numbers(dense, textures):
    before, state = copy.deepcopy(dense.state_dict()), torch.get_rng_state()
    found = tolerances(dense, textures, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert list(found.sigma) == default_layers(dense) and not assignment_of(dense)
    assert found.network.state_dict().keys() == before.keys() and not assignment_of(found.network)
    assert not torch.equal(found.network.conv1.weight, dense.conv1.weight), "the weights learn too"
    assert tolerances(dense, textures, **QUICK).sigma == found.sigma
    assert tolerances(dense, textures, seed=1, **QUICK).sigma != found.sigma
    assert (found.lam, found.sigma_max, found.epochs, found.quantised) == (0.2, 0.5, 1, True)


def test_noise_is_learned_in_eight_bits_or_in_floats(dense, textures, monkeypatch):
    seen, original = [], noise_module.fit

    @functools.wraps(original)
    def watched(model, *arguments, **options):
        seen.append(assignment_of(model))
        return original(model, *arguments, **options)

    monkeypatch.setattr(noise_module, "fit", watched)
    for quantised in (True, False):
        tolerances(dense, textures, quantised=quantised, layers=["conv1"], **QUICK)
    assert seen == [{"network.conv1": EXACT}, {}]


def test_lambda_buys_noise_up_to_the_cap(dense, textures):
    none, much = (tolerances(dense, textures, lam=lam, quantised=False, **QUICK).sigma for lam in (0.0, 2.0))
    assert all(much[name] > none[name] for name in much)
    assert max(none.values()) < 0.1, "where noise only hurts it goes"
    cut = tolerances(dense, textures, lam=2.0, sigma_max=0.12, **QUICK).sigma
    assert max(cut.values()) == 0.12, "the learned number overshoots what it is cut to"


class Two(nn.Module):
    """Two layers on the same images, one with a hundred times the multiplications; noise costs next to nothing."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.few, self.many = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 100, 1)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(101, 4))

    def forward(self, x):
        return self.head(torch.cat([self.few(x), self.many(x)], dim=1).mul(1e-6))


def test_work_decides_who_is_pushed(textures):
    found = tolerances(Two(), textures, layers=["few", "many"], **QUICK | {"fit_options": {**FIT, "lr": 0.01}}).sigma
    # Momentum and schedule are the same for both; the pushes are as 1 to 100.
    assert found["many"] - 0.1 == pytest.approx(100 * (found["few"] - 0.1), rel=0.02) and found["many"] > 0.101


def test_a_mixture_keeps_its_gates_and_its_idle_expert(dense, textures):
    hard = upcycle(dense, topology="hard", experts=2, r=0.2)
    (gate,) = [layer.gate for layer in moe.mixtures(hard).values()]
    nn.init.zeros_(gate.score.weight)
    gate.score.bias.data = torch.tensor([5.0, -5.0])  # nobody goes to the second expert
    found = tolerances(hard, textures, **QUICK)
    idle = [name for name in found.sigma if name.endswith("experts.1")]
    assert [found.sigma[name] for name in idle] == [pytest.approx(0.1)], "nothing pushes it, nothing hurts"
    trained_gates = [layer.gate for layer in moe.mixtures(found.network).values()]
    assert torch.equal(trained_gates[0].score.bias, gate.score.bias)
    codes = operands(hard, textures, n=8, patches=20, calibrate_options={"n": 50})
    assert list(codes) == default_layers(hard) and codes[idle[0]].patches.shape == (20, 256)


def test_noise_is_not_resumed_for_another_network(dense, textures, tmp_path):
    options = {**QUICK, "checkpoint": tmp_path / "noise.safetensors"}
    first = tolerances(dense, textures, **options)
    assert tolerances(dense, textures, **options).sigma == first.sigma
    other = models.resnet8(classes=4, width=0.25, shortcut="pad", seed=1)
    changes = [{"lam": 0.3}, {"sigma_max": 0.4}, {"pace": 2.0}, {"calibrate_options": {"n": 51}}]
    for network, change in [(other, {}), *((dense, change) for change in changes)]:
        with pytest.raises(ValueError, match="made by another call: penalty was"):
            tolerances(network, textures, **{**options, **change})


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


def shares(*weights):
    """[Q] from pairs of code and share."""
    found = torch.zeros(256, dtype=torch.float64)
    for code, share in weights:
        found[code + 128] = share
    return found


MIXED = Operands(
    patches=torch.stack(
        [shares((0, 0.5), (3, 0.5)), shares((-7, 0.25), (90, 0.75)), shares((5, 1.0)), shares((0, 0.9), (127, 0.1))]
    ),
    weights=shares((-31, 0.2), (1, 0.5), (77, 0.3)),
    fan_in=18,
    signal=1.0,
)


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


# ------------------------------------------------------------------------------ the choice


def test_match_by_hand():
    """Powers: 1KV6 0.425, 1KVM, 1L2J 0.301, 1L2L cheapest."""
    power = [multiplier(name).power_mw for name in FOUR]
    assert power == sorted(power, reverse=True)
    foretold = {"mul8s_1KVM": 1.0, "mul8s_1L2J": 10.0, "mul8s_1L2L": 5.0}
    predicted = {layer: foretold for layer in "abcde"}
    tolerance = dict(zip("abcde", (0.0, 0.04, 0.05, 0.2, 0.2), strict=True))
    signal = dict.fromkeys("abcd", 100.0) | {"e": 1.0}
    chosen = match(tolerance, predicted, signal, FOUR)  # allowed: 0, 4, 5, 20, 0.2
    assert chosen == {"a": FOUR[0], "b": FOUR[1], "c": FOUR[3], "d": FOUR[3], "e": FOUR[0]}
    assert match({"d": 0.2}, predicted, signal, ["mul8s_1L2J"]) == {"d": "mul8s_1L2J"}


def test_of_equal_powers_the_smaller_error_wins():
    one, other = "mul8s_1KVM", "swap:mul8s_1KVM"
    for errors, wins in (((2.0, 1.0), other), ((1.0, 2.0), one)):
        assert match({"a": 1.0}, {"a": dict(zip((one, other), errors, strict=True))}, {"a": 9.0}, [one, other]) == {
            "a": wins
        }


# ------------------------------------------------------------------------------ the search


def look(network, images, base, **options):
    images = images.subset(n_train=160)  # of which 64 are held out
    return search(network, images, FOUR, base=base, **{"lambdas": (0.05, 1.0), "epochs": 2, **PLAIN, **options})


def test_the_search_is_a_measured_front(dense, textures, base):
    before = copy.deepcopy(dense.state_dict())
    base = 2 * base.executed
    found = look(dense, textures, base)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert found[0].evaluated == 2, "each lambda has its own assignment"
    assert all(b.p_norm > a.p_norm and b.divergence < a.divergence for a, b in itertools.pairwise(found))
    trial = Trial(dense, textures.subset(n_train=160), n=64, calibrate_options={"n": 50})
    for one in found:
        assert list(one.assignment) == default_layers(dense) and set(one.assignment.values()) <= set(FOUR)
        assert asdict(trial.score(one.assignment)).items() <= asdict(one).items(), "the given weights are scored"
        assert one.p_norm == cost.price(trial.macs, one.assignment, base=base).p_norm
    assert min(one.p_norm for one in found) < 0.5, "cheaper than half of twice the exact network"


def test_the_search_never_looks_at_the_test_images(dense, textures, base):
    other = replace(textures, x_test=255 - textures.x_test, y_test=textures.y_test.flip(0))
    assert look(dense, textures, base, epochs=1) == look(dense, other, base, epochs=1)


def test_the_noise_never_trains_on_validation_images(dense, textures, base, monkeypatch):
    held, taught = Trial(dense, textures.subset(n_train=160), n=64).held, []
    for name in ("tolerances", "operands"):
        original = getattr(agn_module, name)
        monkeypatch.setattr(
            agn_module,
            name,
            lambda network, images, call=original, **o: (taught.append(images), call(network, images, **o))[1],
        )
    look(dense, textures, base, epochs=1, lambdas=[0.2])
    assert [torch.equal(images.x_train, held.x_train) for images in taught] == [True, True]


def test_an_interrupted_search_runs_only_the_rest(dense, textures, base, tmp_path, monkeypatch):
    whole, epochs, original = look(dense, textures, base), [], loop_module._one_epoch

    def counted(*arguments, stop, **options):
        if len(epochs) == stop:
            raise KeyboardInterrupt
        epochs.append(options["first_step"])
        return original(*arguments, **options)

    folder = tmp_path / "deep" / "agn"
    monkeypatch.setattr(loop_module, "_one_epoch", lambda *a, **o: counted(*a, stop=3, **o))
    with pytest.raises(KeyboardInterrupt):
        look(dense, textures, base, checkpoint=folder)
    monkeypatch.setattr(loop_module, "_one_epoch", lambda *a, **o: counted(*a, stop=99, **o))
    assert look(dense, textures, base, checkpoint=folder) == whole and len(epochs) == 4
    assert {file.name for file in folder.iterdir()} == {
        "noise_0.05.safetensors",
        "noise_1.0.safetensors",
        "scores.json",
    }
    monkeypatch.setattr(Trial, "score", lambda *arguments: pytest.fail("it was scored before"))
    assert look(dense, textures, base, checkpoint=folder) == whole, "nothing is run again"
    with pytest.raises(ValueError, match="made by a search with other options"):
        look(dense, textures, base, checkpoint=folder, regime="not retrained")


# ------------------------------------------------------------------------------ errors


def test_errors_say_what_to_do(dense, textures, base, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("work was begun")

    monkeypatch.setattr(loop_module, "_one_epoch", never)
    monkeypatch.setattr(agn_module, "operands", never)
    (tmp_path / "file").write_text("")
    approximated = Trial(dense, textures, n=64, calibrate_options={"n": 50}).place({"conv1": "mul8s_1L2J"})
    foretold, one = {"a": {"mul8s_1L2J": 1.0}}, {"l": MIXED}
    for message, call in {
        "No multiplier is called 'mul8s_1L2K'": lambda: search(dense, textures, ["mul8s_1L2K"], base=base),
        "There are no lambdas": lambda: look(dense, textures, base, lambdas=[]),
        "lam is -1.0; it must be finite and at least 0": lambda: look(dense, textures, base, lambdas=[0.1, -1]),
        "lam is nan": lambda: look(dense, textures, base, lambdas=[float("nan")]),
        "sigma_max is 0": lambda: look(dense, textures, base, sigma_max=0),
        "sigma_init is 0.0; .* nothing would learn": lambda: tolerances(dense, textures, sigma_init=0.0),
        "pace is -2": lambda: tolerances(dense, textures, pace=-2),
        "epochs is 0": lambda: look(dense, textures, base, epochs=0),
        "model is 'both'; it can be 'multi'": lambda: look(dense, textures, base, model="both"),
        "regime is 'retrained'": lambda: look(dense, textures, base, regime="retrained"),
        "160 of the 160 training images": lambda: look(dense, textures, base, n=160),
        "checkpoint is the file": lambda: look(dense, textures, base, checkpoint=tmp_path / "file"),
        "no option 'batchsize'. Did you mean 'batch_size'": lambda: look(
            dense, textures, base, fit_options={"batchsize": 1}
        ),
        "fit_options holds 'epochs'": lambda: tolerances(dense, textures, fit_options={"epochs": 3}),
        "no layer 'conv9' with weights. Did you mean 'conv1'": lambda: tolerances(dense, textures, layers=["conv9"]),
        "No layer of this ResNet was named": lambda: operands(dense, textures, layers=[]),
        "approximate layers already": lambda: tolerances(approximated, textures),
        "ResNet has approximate layers already": lambda: operands(approximated, textures),
        "patches is 0": lambda: operands(dense, textures, patches=0),
        "n is 0": lambda: simulated_std(dense, textures, FOUR, n=0, progress=False),
        "do 0 multiplications": lambda: Noisy(dense, {"conv1": 0}),
        "no layer 'conv7' with weights": lambda: Noisy(dense, {"conv7": 1}),
        "draws is 1": lambda: predicted_std(one, FOUR, model="monte carlo", draws=1),
        "multipliers is the text": lambda: predicted_std(one, "mul8s_1L2J"),
        "There are no multipliers": lambda: predicted_std(one, []),
        "model is 'double'": lambda: predicted_std(one, FOUR, model="double"),
        "Only one side has layer 'a' with 'mul8s_1L2J', the predicted": lambda: agreement(foretold, {}),
        "0 of 1 pairs have an error": lambda: agreement(foretold, {"a": {"mul8s_1L2J": 0.0}}),
        "'b' has a tolerance but no predicted errors": lambda: match({"b": 0.1}, foretold, {"b": 1.0}, FOUR),
        "'a' has a tolerance but no signal": lambda: match({"a": 0.1}, foretold, {}, FOUR),
        "No error of 'mul8s_1KVM' is predicted for layer 'a'": lambda: match({"a": 0.1}, foretold, {"a": 1.0}, FOUR),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_products_of_two_activations_are_refused(textures):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.product = nn.Conv2d(3, 3, 1), Matmul()

        def forward(self, x):
            return self.product(self.conv(x), x)

    with pytest.raises(ValueError, match="no layer 'product' with weights. .* There are conv"):
        operands(Product(), textures, layers=["product"])

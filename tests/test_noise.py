"""Noise that is what it says, and tolerances that are learned from it."""

import copy
import functools

import numpy as np
import pytest
import torch
from foretold import Two, learned
from torch import nn

from axmoe_lite import approximate, models, moe
from axmoe_lite.layers import assignment_of, default_layers
from axmoe_lite.models import upcycle
from axmoe_lite.multipliers import EXACT
from axmoe_lite.search import noise as noise_module
from axmoe_lite.search.noise import Noisy, tolerances
from axmoe_lite.search.predict import (
    operands,
)
from axmoe_lite.train import fit

FIT = {"batch_size": 64, "augment": "none"}
QUICK = {"epochs": 1, "calibrate_options": {"n": 50}, "fit_options": FIT, "progress": False}


@pytest.fixture(scope="module")
def dense(textures):
    return learned(textures)


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

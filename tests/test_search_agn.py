"""AGN: a choice that can be redone by hand, and a search that never looks at test images."""

import copy
import itertools
from dataclasses import asdict, replace

import pytest
import torch
from foretold import FOUR, MIXED, learned
from torch import nn

from axmoe_lite import cost, multiplier
from axmoe_lite.layers import Matmul, default_layers
from axmoe_lite.search import Trial
from axmoe_lite.search import agn as agn_module
from axmoe_lite.search.agn import match, search
from axmoe_lite.search.noise import Noisy, tolerances
from axmoe_lite.search.predict import (
    agreement,
    operands,
    predicted_std,
    simulated_std,
)
from axmoe_lite.train import loop as loop_module

FIT = {"batch_size": 64, "augment": "none"}
PLAIN = {"n": 64, "progress": False, "calibrate_options": {"n": 50}, "fit_options": FIT}


@pytest.fixture(scope="module")
def dense(textures):
    return learned(textures)


@pytest.fixture(scope="module")
def base(dense, textures):
    return cost.count(dense, textures.normalised(textures.x_test[:1]))


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

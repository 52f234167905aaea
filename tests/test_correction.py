"""The error of a sum, by hand and by count; and a correction that takes off what is constant, and can be undone."""

import copy

import pytest
import torch
from torch import nn

from axmoe_lite import EXACT, Multiplier, approximate, freeze, models, multiplier, restore
from axmoe_lite.layers.correction import correct_bias, input_of, layer_errors, measured_error, predicted_error
from axmoe_lite.multipliers import exact_table


def always(extra: int) -> Multiplier:
    """Exact products plus a constant."""
    return Multiplier(f"plus {extra}", exact_table() + extra)


@pytest.fixture
def x():
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def network(x):
    network = models.resnet8(classes=4).eval()
    return approximate(network, EXACT, calibration=x)


def point(value: int) -> torch.Tensor:
    return (torch.arange(-128, 128) == value).double()


def test_a_constant_error_is_all_lean():
    # Every product is 7 too large, so 10 of them are 70 too large, and nothing else.
    error = predicted_error(always(7), 10)
    assert (error.lean, error.shift, error.scatter) == (70, 0, 0)


def test_the_three_parts_by_hand():
    # KVM takes a & ~1. With a = 2 or 3 in turn and b = 5 or -5 in turn the error is 0 or -b:
    #   E[e] = 0;   E[e | b] = -b / 2 = -+2.5, so shift 2.5;   given b it is 0 or -b, so scatter 2.5.
    # The exact product is 2 b or 3 b: standard deviation 2.5. Nine products triple all but the lean.
    a, b = point(2) + point(3), point(5) + point(-5)
    error = predicted_error(multiplier("mul8s_1KVM"), 9, a=a, b=b)
    assert (error.lean, error.shift, error.scatter, error.signal) == pytest.approx((0, 7.5, 7.5, 7.5))


@pytest.mark.parametrize("name", ["mul8s_1KVA", "mul8s_1L2J", "swap:mul8s_1KVM", "mul8s_1KXF"])
@pytest.mark.parametrize("fan_in", [23, 576])
def test_what_is_counted_is_what_was_predicted(name, fan_in):
    a = (torch.arange(-128, 128) >= 0).double()
    ahead, counted = (f(multiplier(name), fan_in, a=a) for f in (predicted_error, measured_error))
    # Means of 512 channels and of 65,536 sums: the lean is known to within a few of its own standard errors.
    noise = (ahead.shift**2 / 512 + ahead.scatter**2 / 128) ** 0.5
    assert abs(counted.lean - ahead.lean) < 5 * noise
    for part in ("shift", "scatter", "signal"):
        assert getattr(counted, part) == pytest.approx(getattr(ahead, part), rel=0.15)


def test_exact_layers_have_no_error(network, x):
    for error in layer_errors(network, x).values():
        assert not error.shift.any() and not error.scatter.any()
        assert error.gain.tolist() == pytest.approx([1.0] * len(error.gain))


def test_a_constant_error_is_taken_off_to_the_last_code(network, x):
    # Every output is 3 a product too large, at the border too, since the table answers 3 for code 0.
    with torch.inference_mode():
        exact = network(x)
        approximate(network, always(3))
        assert (network(x) - exact).abs().max() > 0.05
        correct_bias(network, x)
        assert (network(x) - exact).abs().max() < 1e-3


def test_afterwards_no_channel_is_off_and_nothing_is_left_to_take(network, x):
    approximate(network, "mul8s_1KVA")
    before = correct_bias(network, x)
    assert before["conv1"].shift.abs().max() > 1e-3
    for name, error in layer_errors(network, x).items():
        assert torch.allclose(network.get_submodule(name).bias, -before[name].shift)
        assert error.shift.abs().max() < 1e-5
        assert torch.allclose(error.scatter, before[name].scatter, rtol=1e-3)
    answer = network(x)
    correct_bias(network, x)
    assert torch.allclose(network(x), answer, atol=1e-5)


def test_it_comes_off_again(x):
    network = nn.Sequential(nn.Conv2d(3, 5, 3, bias=True), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2)).eval()
    weights, bias = copy.deepcopy(network.state_dict()), network[0].bias
    layers = {"0": "mul8s_1L2J", "3": "mul8s_1L2J"}
    approximate(network, layers, calibration=x)
    plain = network(x)
    shift = correct_bias(network, x)
    assert torch.allclose(network[0].bias, bias - shift["0"].shift)
    assert not torch.equal(network(x), plain)
    approximate(network, layers)
    assert torch.equal(network(x), plain), "the same assignment again starts without a correction"
    correct_bias(network, x)
    restore(network)
    assert network[0].bias is bias
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("move", [torch.float64, torch.bfloat16], ids=str)
def test_it_comes_off_again_in_another_type(x, move):
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2)).eval()
    bias = network[0].bias
    correct_bias(approximate(network, {"0": "mul8s_1L2J", "3": "mul8s_1L2J"}, calibration=x), x)
    restore(network.to(move))
    assert network[0].bias is bias and bias.dtype == move
    assert network(x.to(move)).shape == (40, 2)


def test_what_is_left_is_measured_in_another_type(x):
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval()
    correct_bias(approximate(network, {"0": "mul8s_1L2J"}, calibration=x), x)
    left = layer_errors(network.double(), x.double())
    assert network[0].exact.bias.dtype == torch.float64 and left["0"].shift.abs().max() < 1e-5


def test_a_corrected_network_freezes(network, x):
    approximate(network, "mul8s_1KVA")
    correct_bias(network, x)
    with torch.inference_mode():
        frozen = freeze(network)(x)
        assert torch.equal(frozen.argmax(1), network(x).argmax(1))


def test_the_input_of_a_layer(network, x):
    assert torch.equal(input_of(network, "conv1", x), x)
    assert input_of(network, "layer2.0.conv1", x).min() >= 0


def test_layers_that_are_given_their_input_by_name(x):
    class Named(nn.Sequential):
        def forward(self, x):
            return self[1](input=self[0](input=x).flatten(1))

    torch.manual_seed(0)
    named, placed = (
        Named(nn.Conv2d(3, 4, 8), nn.Linear(4, 2)),
        nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 2)),
    )
    placed.load_state_dict({name.replace("1.", "2."): value for name, value in named.state_dict().items()})
    for network, last in ((named, "1"), (placed, "2")):
        approximate(network, {"0": "mul8s_1KVA", last: "mul8s_1KVA"}, calibration=x)
    assert torch.equal(input_of(named, "1", x), input_of(placed, "2", x))
    shifts = [[error.shift for error in correct_bias(network, x).values()] for network in (named, placed)]
    assert all(map(torch.equal, *shifts)) and torch.equal(named(x), placed(x))


def test_a_network_without_approximate_layers_is_refused(x):
    with pytest.raises(ValueError, match="call approximate"):
        correct_bias(models.resnet8(classes=2), x)

"""Layers against the law written out, gradients against autograd, and networks that come back as they were."""

import copy
import warnings

import pytest
import torch
from torch import nn

from axmoe_lite import (
    EVOAPPROX,
    EXACT,
    Multiplier,
    approximate,
    assignment_of,
    kernels,
    layers,
    models,
    multiplier,
    restore,
)
from axmoe_lite.multipliers import exact_table
from axmoe_lite.quant import fake_quantise, quantise, weight_scale


@pytest.fixture
def x():
    return torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False), nn.Flatten(),
        nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def by_law(layer, x):
    """y = float32(acc) * (s_x * s_w[c]) + bias[c], with the reference product."""
    s_w = weight_scale(layer.weight, per_channel=layer.per_channel).expand(len(layer.weight))
    shape = (-1, 1, 1) if layer.weight.ndim == 4 else (-1,)
    codes, weights = quantise(x, layer.scale_x), quantise(layer.weight, s_w.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.weight.ndim == 4:
        acc = kernels.conv2d(
            codes, weights, layer.multiplier, stride=layer.stride, padding=layer.padding, groups=layer.groups,
            path="reference",
        )  # fmt: skip
    else:
        acc = kernels.matmul(codes, weights.T, layer.multiplier, path="reference")
    y = acc.float() * (layer.scale_x * s_w).view(shape)
    return y if layer.bias is None else y + layer.bias.view(shape)


@pytest.mark.parametrize("name", ["mul8s_1KV6", "mul8s_1KVA", "mul8s_1L12", "mitchell()"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_layers_follow_the_law(net, x, name, per_channel):
    approximate(net, name, calibration=x, per_channel=per_channel)
    assert torch.equal(net[0](x), by_law(net[0], x))
    hidden = net[:2](x)
    assert torch.equal(net[2](hidden), by_law(net[2], hidden))
    flat = net[:4](x)
    assert torch.equal(net[4](flat), by_law(net[4], flat))


def test_exact_multiplier_is_only_quantisation(net, x):
    before = net(x)
    after = approximate(net, EXACT, calibration=x, method="max")(x)
    assert not torch.equal(after, before)
    assert (after - before).norm() < 0.03 * before.norm()


def test_worse_multipliers_change_more(net, x):
    exact = approximate(net, EXACT, calibration=x)(x)
    changes = [(approximate(net, f"mul8s_{n}")(x) - exact).norm().item() for n in ("1KV8", "1L2J", "1L2L", "1L12")]
    assert changes == sorted(changes) and changes[0] > 0


def test_linear_takes_any_leading_shape():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
    x = torch.randn(2, 3, 4, 5)
    approximate(net, {"0": "mul8s_1KVA"}, calibration=x)
    flat = net[0](x.reshape(-1, 5))
    assert torch.equal(net[0](x), flat.view(2, 3, 4, 7))
    assert torch.equal(net[0](x[0, 0, 0]), flat[0])


@pytest.mark.parametrize("mode,padding", [("zeros", "same"), ("reflect", 1), ("circular", (1, 2)), ("replicate", 2)])
def test_every_kind_of_padding(mode, padding):
    torch.manual_seed(0)
    exact = nn.Conv2d(2, 3, (3, 5), padding=padding, padding_mode=mode)
    x = torch.randint(-127, 128, (1, 2, 8, 7)).float()
    layer = layers.ApproxConv2d(exact, multiplier(EXACT))
    layer.scale_x.fill_(1.0)  # the image is made of codes already, so only the weights are rounded
    scale = weight_scale(exact.weight)
    exact.weight.data.copy_(fake_quantise(exact.weight.data, scale))
    assert layer(x).shape == exact(x).shape
    assert torch.allclose(layer(x), exact(x), rtol=1e-4, atol=1e-2)


def test_padding_code_zero_goes_through_the_table():
    m = Multiplier("errs at zero", exact_table() + 100)  # every product is 100 too large, that of the border too
    layer = layers.ApproxConv2d(nn.Conv2d(1, 1, 3, padding=1, bias=False), m)
    layer.scale_x.fill_(1.0)
    exact = layers.ApproxConv2d(layer.exact, multiplier(EXACT))
    exact.scale_x.fill_(1.0)
    x = torch.zeros(1, 1, 3, 3)
    assert torch.allclose(layer(x) - exact(x), 900 * weight_scale(layer.weight).expand(1, 1, 3, 3))


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", [EXACT, "mul8s_1L2L"])
def test_gradients_are_straight_through_with_exact_products(net, x, name):
    # By hand: the gradient of the same layer on fake-quantised floats, whatever the multiplier in front.
    approximate(net, {"0": name, "2": name, "4": name}, calibration=x[:, :, :, :], percentile=90)
    for index, shape in ((0, (6, 3, 9, 9)), (2, (6, 8, 9, 9)), (4, (6, 128))):
        layer, exact = net[index], copy.deepcopy(net[index].exact)
        ours = torch.randn(shape, generator=torch.Generator().manual_seed(index)).mul_(2).requires_grad_()
        theirs = ours.detach().clone().requires_grad_()
        y = layer(ours)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        net.zero_grad()
        y.backward(grad)
        weight = fake_quantise(exact.weight, weight_scale(exact.weight))
        inputs = fake_quantise(theirs, layer.scale_x)
        if index == 4:
            z = nn.functional.linear(inputs, weight, exact.bias)
        else:
            z = nn.functional.conv2d(inputs, weight, exact.bias, exact.stride, exact.padding, 1, exact.groups)
        z.backward(grad)
        assert (ours.grad == 0).any(), "the 90th percentile clips something"
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
        assert torch.allclose(layer.weight.grad, exact.weight.grad, rtol=1e-4, atol=1e-4)
        if exact.bias is not None:
            assert torch.allclose(layer.bias.grad, exact.bias.grad, rtol=1e-4, atol=1e-5)


def test_training_moves_the_shared_weights(net, x):
    approximate(net, "mul8s_1L2J", calibration=x)
    before = net[0].weight.detach().clone()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net(x).square().mean().backward()
    optimiser.step()
    assert not torch.equal(net[0].weight, before)
    trained = net[0].weight.detach().clone()
    assert torch.equal(restore(net)[0].weight, trained)


def test_works_under_autocast(net, x):
    approximate(net, "mul8s_1KVA", calibration=x)
    with torch.autocast("cpu", torch.bfloat16):
        training, evaluating = net.train()[0](x), net.eval()[0](x)
    assert torch.equal(evaluating, net[0](x))  # every bit
    assert torch.equal(training, net[0](x).bfloat16())  # rounded at the very end, as an exact layer would


# --------------------------------------------------------------------- into a network, and out


def test_restore_gives_back_the_very_layers(net, x):
    before, modules = net(x), list(net.modules())
    approximate(net, "mul8s_1L2L", calibration=x)
    assert not torch.equal(net(x), before)
    restore(net)
    assert list(net.modules()) == modules and torch.equal(net(x), before)
    assert assignment_of(net) == {}


def test_state_dict_keeps_its_names(net, x):
    names = set(net.state_dict())
    approximate(net, "mul8s_1L2J", calibration=x)
    assert set(net.state_dict()) - names == {"0.scale_x", "2.scale_x", "4.scale_x"}
    assert names <= set(net.state_dict())
    assert len(list(net.parameters())) == len(list(restore(net).parameters()))


def test_an_assignment_names_everything_that_is_approximate(net, x):
    approximate(net, "mul8s_1L2J", calibration=x)
    assert assignment_of(net) == dict.fromkeys(["0", "2", "4"], "mul8s_1L2J")  # the classifier stays exact
    scales = [net[i].scale_x.item() for i in (0, 2)]
    approximate(net, {"0": "mul8s_1L2L", "2": "swap:mul8s_1KVM"})
    assert assignment_of(net) == {"0": "mul8s_1L2L", "2": "swap:mul8s_1KVM"}
    assert [net[i].scale_x.item() for i in (0, 2)] == scales
    assert isinstance(net[4], nn.Linear)
    # The assignment read back puts the same network together.
    y = net(x)
    assert torch.equal(approximate(restore(net), {"0": "mul8s_1L2L", "2": "swap:mul8s_1KVM"}, calibration=x)(x), y)


def test_a_copy_is_independent(net, x):
    approximate(net, "mul8s_1L2J", calibration=x)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert net[0].weight.any() and not restore(twin)[0].weight.any()


def test_a_layer_used_twice_is_replaced_in_both_places(x):
    shared = nn.Conv2d(3, 3, 3, padding=1)
    net = nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(243, 2))
    approximate(net, "mul8s_1L2J", calibration=x)
    assert net[0] is net[2] and isinstance(net[0], layers.ApproxConv2d)
    assert restore(net)[0] is shared and net[2] is shared


def test_calibration_in_batches_equals_one_batch(net, x):
    scales = [approximate(net, EXACT, calibration=c)[0].scale_x.item() for c in (x, [x[:2], x[2:]], iter(x.split(1)))]
    assert scales[0] == scales[1] == scales[2]


def test_calibration_leaves_the_mode_and_the_statistics_alone(textures):
    network = models.resnet8(classes=4).train()
    network.layer1.eval()  # a part that the user froze stays frozen
    statistics = network.bn1.running_mean.clone()
    approximate(network, EXACT, calibration=textures.normalised(textures.x_train[:20]))
    assert network.training and network.conv1.training and not network.layer1[0].conv1.training
    assert not network.layer1[0].bn1.training and torch.equal(network.bn1.running_mean, statistics)


@pytest.mark.parametrize(
    "assignment,problem",
    [
        ({"0.conv": "mul8s_1L2J"}, r"'0\.conv' does not exist.*Did you mean '0'.*0, 2, 4, 6"),
        ({"1": "mul8s_1L2J"}, "'1' is a ReLU"),
        ({"0": "mul8s_1L2"}, "No multiplier is called 'mul8s_1L2'"),
        ("mul8s_nothing", "No multiplier is called"),
        ({"0": 3}, "name is text"),
    ],
)
def test_bad_assignments_are_refused_before_anything_changes(net, x, assignment, problem):
    with pytest.raises(ValueError, match=problem):
        approximate(net, assignment, calibration=x)
    assert assignment_of(net) == {}


def test_bad_calibration_is_refused_and_undone(net, x):
    spoiled = x.clone()
    spoiled[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Calibration of '0' met 1 activations \(of 1458\) that are NaN"):
        approximate(net, EXACT, calibration=spoiled)
    with pytest.raises(ValueError, match="'0' met an empty batch"):
        approximate(net, EXACT, calibration=x[:0])
    with pytest.raises(ValueError, match="'0' was not called"):
        approximate(net, EXACT, calibration=[])
    with pytest.raises(ValueError, match="'0' has no activation scale yet"):
        approximate(net, EXACT)
    with pytest.raises(ValueError, match=r"met torch\.uint8; give what the network takes"):
        approximate(net, EXACT, calibration=torch.zeros(2, 3, 9, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="calibration is a int"):
        approximate(net, EXACT, calibration=5)
    with pytest.raises(ValueError, match="'minmax'"):
        approximate(net, EXACT, calibration=x, method="minmax")
    assert assignment_of(net) == {} and type(net[0]) is nn.Conv2d
    approximate(net, "mul8s_1L2J", calibration=x)
    with pytest.raises(ValueError, match="NaN"):
        approximate(net, "mul8s_1L2L", calibration=spoiled)
    assert assignment_of(net)["0"] == "mul8s_1L2J" and net[0].histograms is None


@pytest.mark.trust("input", "weights that are no numbers, and images that do not fit")
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("training", [False, True], ids=["answering", "learning"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_weights_that_are_no_numbers_are_refused_and_not_taken_for_0(kind, part, bad, training):
    layer = nn.Linear(3, 4) if kind == "linear" else nn.Conv2d(3, 4, 1)
    x = torch.ones((2, 3) if kind == "linear" else (2, 3, 4, 4))
    approximate(layer := nn.Sequential(layer), {"0": "mul8s_1L2J"}, calibration=x).train(training)
    layer(x)
    getattr(layer[0], part).data.view(-1)[1] = bad
    with pytest.raises(FloatingPointError, match=f"{'weights' if part == 'weight' else 'biases'} of this layer, 3, 4"):
        layer(x)


@pytest.mark.trust("input", "weights that are no numbers, and images that do not fit")
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 5, 4, 4), (1, 4, 4)])
def test_images_of_other_channels_are_refused_in_words(shape):
    layer = nn.Sequential(nn.Conv2d(3, 4, 1))
    approximate(layer, {"0": "mul8s_1L2J"}, calibration=torch.ones(2, 3, 4, 4))
    with pytest.raises(ValueError, match="takes 3 channels"):
        layer(torch.ones(shape))


@pytest.mark.trust("input", "weights that are no numbers, and images that do not fit")
def test_rows_of_another_length_are_refused_in_words():
    layer = nn.Sequential(nn.Linear(3, 4))
    approximate(layer, {"0": "mul8s_1L2J"}, calibration=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"takes 3 channels, C of \[..., C\]; it was given \[2, 5\]"):
        layer(torch.ones(2, 5))


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="no layer to approximate by default; there are 0"):
        approximate(nn.Sequential(nn.Linear(2, 2)), EXACT)


def test_layers_that_are_read_and_not_called_are_not_silently_exact():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(nn.functional.linear(x, self.read.weight))

    with pytest.raises(ValueError, match="'read' was not called"):
        approximate(Reader(), EXACT, calibration=torch.randn(3, 4))


def test_attention_is_named_as_left_exact():
    net = nn.ModuleDict({"attend": nn.MultiheadAttention(8, 2), "feed": nn.Linear(8, 8), "last": nn.Linear(8, 2)})
    assert layers.default_layers(net) == ["feed"]
    with pytest.warns(UserWarning, match="'attend' .MultiheadAttention"), pytest.raises(ValueError):
        approximate(net, EXACT)


# --------------------------------------------------------------------------- other people's networks


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn"])
def test_torchvision_networks(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = getattr(models.import_torchvision().models, name)(num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = network(x)
        exact = approximate(network, EXACT, calibration=x, per_channel=True)(x)
        rough = approximate(network, "mul8s_1L2L", per_channel=True)(x)
        assert (exact - before).norm() < (rough - before).norm()
        assert torch.equal(restore(network)(x), before)


def test_all_thirteen_run_in_resnet20(textures):
    network = models.resnet20(classes=4).eval()
    x = textures.normalised(textures.x_test[:4])
    approximate(network, EXACT, calibration=x)
    with torch.inference_mode():
        scores = {name: approximate(network, name)(x) for name in EVOAPPROX}
    assert len(assignment_of(network)) == 21
    assert len({tuple(s.flatten().tolist()) for s in scores.values()}) == 13, "no two circuits answer the same"


def test_called_again_it_keeps_how_a_layer_rounds_and_learns(net, x):
    approximate(net, EXACT, calibration=x, per_channel=True, gradient="smoothed")
    approximate(net, "mul8s_1KVA")
    assert [(net[i].per_channel, net[i].gradient) for i in (0, 2, 4)] == [(True, "smoothed")] * 3
    with pytest.raises(ValueError, match="gradient='smoothed' needs one table a layer"):
        approximate(net, {"0": ["mul8s_1KVA", "mul8s_1KV6"] * 4})
    approximate(net, {"0": "mul8s_1KVA", "4": "mul8s_1KVA"}, per_channel=False)
    approximate(net, "mul8s_1L2J", gradient="straight-through", calibration=x)  # 2 was exact in between
    told = [(net[i].per_channel, net[i].gradient) for i in (0, 2, 4)]
    assert told == [(False, "straight-through")] * 3
    assert torch.equal(net[0](x), by_law(net[0], x))

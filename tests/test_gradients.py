"""Gradients against autograd, and against loops over the table."""

import pytest
import torch
from derived import CONVOLUTIONS, assert_close, backward, evidence, layer_of, random
from torch import nn

from axmoe_lite import EXACT, approximate, assignment_of, layers, multiplier
from axmoe_lite.quant import fake_quantise, quantise, weight_scale

WINDOW = 4


# --------------------------------------------------------------------------------- straight through


@evidence
@pytest.mark.parametrize("name", [EXACT, "mul8s_1L2L", "drum(4)"])
@pytest.mark.parametrize("shape,out,kernel,options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_convolutions_pass_straight_through(name, shape, out, kernel, options, per_channel, last):
    # By hand: the float convolution of fake-quantised operands, whatever the multiplier in front.
    torch.manual_seed(1)
    exact = nn.Conv2d(shape[1], out, kernel, **options)
    layer = layer_of(exact, name, [0.01], per_channel=per_channel)  # clips beyond 1.275
    x = random(*shape).mul_(2)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    grad = random(*layer(x).shape, seed=9)
    leaves = [x, exact.weight, exact.bias]
    found = backward(lambda: layer(x), grad, *leaves)

    def by_hand():
        scale = weight_scale(exact.weight, per_channel=per_channel)
        weight = fake_quantise(exact.weight, scale.view(-1, 1, 1, 1) if per_channel else scale)
        return exact._conv_forward(fake_quantise(x, 0.01), weight, exact.bias)

    for ours, theirs in zip(found, backward(by_hand, grad, *leaves), strict=True):
        assert_close(ours, theirs)
    clipped = x.detach().abs() > 0.01 * 127.5
    assert not found[0][clipped].any() and (shape[1] == 1 or clipped.any())


@evidence
@pytest.mark.parametrize("shape", [(1, 1), (23, 5), (2, 3, 115), (2, 1, 4, 3), (5,)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_pass_straight_through(shape, bias):
    torch.manual_seed(1)
    exact = nn.Linear(shape[-1], 7, bias=bias)
    layer = layer_of(exact, "mul8s_1KVA", [0.01], per_channel=True)
    x = random(*shape).mul_(2).requires_grad_()
    grad = random(*shape[:-1], 7, seed=9)
    leaves = [x, exact.weight, exact.bias]
    found = backward(lambda: layer(x), grad, *leaves)

    def by_hand():
        weight = fake_quantise(exact.weight, weight_scale(exact.weight, per_channel=True).view(-1, 1))
        return nn.functional.linear(fake_quantise(x, 0.01), weight, exact.bias)

    for ours, theirs in zip(found, backward(by_hand, grad, *leaves), strict=True):
        assert_close(ours, theirs)


@evidence
@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
@pytest.mark.parametrize("turned", [False, True])
def test_products_of_activations_pass_straight_through(batch, turned):
    layer = layer_of(layers.Matmul(), "mul8s_1L2J", [0.01, 0.013])
    a = random(*batch, 4, 23).requires_grad_()
    b = random(*batch, 2, 23, seed=1).mT if turned else random(*batch, 23, 2, seed=1)
    b.requires_grad_()
    grad = random(*batch, 4, 2, seed=2)
    found = backward(lambda: layer(a, b), grad, a, b)
    theirs = backward(lambda: fake_quantise(a, 0.01) @ fake_quantise(b, 0.013), grad, a, b)
    for ours, other in zip(found, theirs, strict=True):
        assert_close(ours, other)
    assert not found[0][a.detach().abs() > 1.275].any() and not found[1][b.detach().abs() > 0.013 * 127.5].any()


@evidence
@pytest.mark.parametrize("gradient", ["straight-through", "smoothed"])
@pytest.mark.parametrize("name", ["mul8s_1L2J", "mul8s_1KVA", "mitchell()", "drum(4)"])
@pytest.mark.parametrize(
    "shape_a,shape_b", [((2, 3), (2, 1)), ((), (3,)), ((3,), ()), ((2, 1), (1, 3)), ((1,), (2, 3))], ids=str
)
def test_batches_that_broadcast_are_as_if_repeated(name, gradient, shape_a, shape_b):
    layer = layer_of(layers.Matmul(), name, [0.01, 0.013], gradient=gradient)
    a, b = random(*shape_a, 4, 23).requires_grad_(), random(*shape_b, 23, 2, seed=1).requires_grad_()
    batch = torch.broadcast_shapes(shape_a, shape_b)
    grad = random(*batch, 4, 2, seed=2)

    def repeated():
        return layer(a.expand(*batch, 4, 23).clone(), b.expand(*batch, 23, 2).clone())

    with torch.no_grad():
        assert torch.equal(layer(a, b), repeated())
    for ours, theirs in zip(backward(lambda: layer(a, b), grad, a, b), backward(repeated, grad, a, b), strict=True):
        assert_close(ours, theirs)


def test_batches_that_do_not_go_together_are_refused():
    layer = layer_of(layers.Matmul(), "mul8s_1L2J", [0.01, 0.013])
    with pytest.raises(ValueError, match=r"a is \[2, 4, 5\] and b \[3, 5, 4\]; dimensions before"):
        layer(random(2, 4, 5), random(3, 5, 4))


@pytest.mark.parametrize("gradient", ["straight-through", "smoothed"])
def test_the_edge_of_clipping(gradient):
    # Scale 1: codes reach 127, so values up to 127.5 are represented; the next float32 above is not. NaN has no code.
    above = torch.tensor(127.5).nextafter(torch.tensor(1000.0)).item()
    x = torch.tensor([[0.0, 127.0, 127.5, above, -127.5, -above, torch.inf, -torch.inf, torch.nan, 1e30]])
    x.requires_grad_()
    exact = nn.Linear(10, 1, bias=False)
    exact.weight.data.fill_(2.0)
    layer = layer_of(exact, EXACT, [1.0], gradient=gradient)
    (grad,) = backward(lambda: layer(x), torch.ones(1, 1), x)
    assert torch.allclose(grad, torch.tensor([[2.0, 2, 2, 0, 2, 0, 0, 0, 0, 0]]), atol=1e-4)
    # Of an image, where the straight-through pass also notes what it clipped.
    conv = nn.Conv2d(1, 1, 1, bias=False)
    conv.weight.data.fill_(2.0)
    image = x.detach().view(1, 1, 2, 5).requires_grad_()
    (grad,) = backward(lambda: layer_of(conv, EXACT, [1.0], gradient=gradient)(image), torch.ones(1, 1, 2, 5), image)
    assert torch.allclose(grad.flatten(), torch.tensor([2.0, 2, 2, 0, 2, 0, 0, 0, 0, 0]), atol=1e-4)


def test_clipping_anywhere_in_a_large_image():
    # The passes cut memory into pieces and skip pieces in which nothing was clipped: one value in each place.
    layer = layer_of(nn.Conv2d(3, 1, 1, bias=False), EXACT, [0.1])
    size = 3 * 115 * 115
    for place in (0, 1, 63, 64, 4095, 4096, 32767, 32768, size // 2, size - 2, size - 1):
        x = torch.zeros(size)
        x[place] = 12.76
        x = x.view(1, 3, 115, 115).requires_grad_()
        (grad,) = backward(lambda x=x: layer(x), torch.ones(1, 1, 115, 115), x)
        assert grad.flatten()[place] == 0 and int((grad == 0).sum()) == 1
        weights = layer.weight.detach()  # the gradient of the weight comes from the same pass
        (grad,) = backward(lambda x=x: layer(x), torch.ones(1, 1, 115, 115), layer.weight)
        expected = torch.zeros_like(weights)
        expected[0, place // 115**2] = 12.7
        assert torch.allclose(grad, expected)


@pytest.mark.parametrize("gradient", ["straight-through", "smoothed"])
def test_only_what_is_wanted_is_computed(gradient):
    torch.manual_seed(0)
    conv = layer_of(nn.Conv2d(3, 4, 3), "mul8s_1L2J", [0.02], gradient=gradient)
    linear = layer_of(nn.Linear(3, 4), "mul8s_1L2J", [0.02], gradient=gradient)
    for layer, x in ((conv, random(2, 3, 5, 5)), (linear, random(2, 3))):
        x.requires_grad_()
        leaves = [x, layer.weight, layer.bias]
        all_of_them = backward(lambda layer=layer, x=x: layer(x), torch.ones_like(layer(x)), *leaves)
        for wanted in (0, 1, 2):
            for i, leaf in enumerate(leaves):
                leaf.requires_grad_(i == wanted)
            y = layer(x)
            (only,) = torch.autograd.grad(y, leaves[wanted], torch.ones_like(y))
            assert_close(only, all_of_them[wanted], 1e-6)
        for leaf in leaves:
            leaf.requires_grad_(False)
        assert not layer(x).requires_grad


def test_the_gradient_of_a_bias_is_a_sum():
    # y = ... + bias[c]: 2 images of 3 x 3 results with gradient c + 1 give 18 (c + 1).
    layer = layer_of(nn.Conv2d(1, 2, 1), "mul8s_1L2L", [0.1])
    grad = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(2, 2, 3, 3)
    (found,) = backward(lambda: layer(torch.ones(2, 1, 3, 3)), grad, layer.bias)
    assert found.tolist() == [18.0, 36.0]
    layer = layer_of(nn.Linear(1, 2), "mul8s_1L2L", [0.1])
    (found,) = backward(lambda: layer(torch.ones(2, 3, 1)), torch.tensor([1.0, 2.0]).expand(2, 3, 2), layer.bias)
    assert found.tolist() == [6.0, 12.0]


# ----------------------------------------------------------------------------------------- smoothed


def slope_by_loop(table, operand):
    """D[a, b]: the least-squares slope of the products of up to nine neighbouring codes, one pair at a time."""
    table = table.double() if operand == "a" else table.double().T
    slopes = torch.empty(256, 256, dtype=torch.float64)
    for code in range(256):
        near = torch.arange(max(0, code - WINDOW), min(255, code + WINDOW) + 1)
        steps = near.double() - near.double().mean()
        slopes[code] = (steps[:, None] * table[near]).sum(0) / (steps**2).sum()
    return slopes if operand == "a" else slopes.T


def test_the_slope_of_a_staircase_by_hand():
    # L2J clears the lowest bit: codes 0..8 times 2 give 0 0 4 4 8 8 12 12 16. About their middle, 4, the sum of
    # step * product is 4 * 16 + 3 * 12 + 2 * 12 + 1 * 8 - 1 * 4 - 2 * 4 - 3 * 0 - 4 * 0 = 120, of step^2 60: slope 2.
    assert slope_by_loop(multiplier("mul8s_1L2J").table, "a")[4 + 128, 2 + 128] == 2.0


@pytest.fixture(scope="module")
def tables_of_slopes():
    names = ["mul8s_1L2J", "mul8s_1KVA", "drum(4)", "swap:mul8s_1KXF"]
    return {name: [slope_by_loop(multiplier(name).table, operand) for operand in "ab"] for name in names}


@evidence
@pytest.mark.parametrize("name", ["mul8s_1L2J", "mul8s_1KVA", "drum(4)", "swap:mul8s_1KXF"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_smoothed_linear_gradients_equal_a_loop_over_the_table(name, per_channel, tables_of_slopes):
    torch.manual_seed(2)
    exact = nn.Linear(5, 3)
    layer = layer_of(exact, name, [0.01], gradient="smoothed", per_channel=per_channel)
    x, grad = random(2, 2, 5).mul_(1.3).requires_grad_(), random(2, 2, 3, seed=4)
    found = backward(lambda: layer(x), grad, x, exact.weight, exact.bias)
    s_w = weight_scale(exact.weight, per_channel=per_channel).expand(3)
    a, b = quantise(x.detach(), 0.01).long() + 128, quantise(exact.weight.detach(), s_w.view(-1, 1)).long() + 128
    by_a, by_b = tables_of_slopes[name]
    grad_x, grad_w = torch.zeros(2, 2, 5, dtype=torch.float64), torch.zeros(3, 5, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            for o in range(3):
                for k in range(5):
                    pair = a[i, j, k], b[o, k]
                    if x[i, j, k].abs() <= 0.01 * 127.5:
                        grad_x[i, j, k] += grad[i, j, o] * by_a[pair] * s_w[o]
                    grad_w[o, k] += grad[i, j, o] * by_b[pair] * 0.01
    assert_close(found[0], grad_x.float(), 5e-3)  # terms below a thousandth are left out
    assert_close(found[1], grad_w.float(), 5e-3)
    assert_close(found[2], grad.sum((0, 1)))


@evidence
@pytest.mark.parametrize("name", ["mul8s_1L2J", "mul8s_1KVA", "drum(4)"])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2, "groups": 2, "padding": (0, 1), "bias": False}], ids=str
)
def test_smoothed_convolutions_are_smoothed_products_of_patches(name, options):
    # unfold is torch's own way to cut patches; its gradient adds up what overlaps. Padding is code 0.
    torch.manual_seed(3)
    exact = nn.Conv2d(4, 6, 3, **options)
    layer = layer_of(exact, name, [0.015], gradient="smoothed", per_channel=True)
    x = random(2, 4, 5, 6).requires_grad_()
    grad = random(*layer(x).shape, seed=4)
    found = backward(lambda: layer(x), grad, x, exact.weight, exact.bias)
    s_w = weight_scale(exact.weight, per_channel=True)

    def by_patches():
        outputs = []
        groups = exact.groups
        for part, weight in zip(x.chunk(groups, 1), exact.weight.chunk(groups), strict=True):
            patches = nn.functional.unfold(part, 3, padding=exact.padding, stride=exact.stride).mT  # [N, L, c 9]
            rows = nn.Linear(patches.shape[-1], len(weight), bias=False)
            product = layer_of(rows, name, [0.015], gradient="smoothed", per_channel=True)
            del product.weight  # so that the gradient reaches the convolution's own weight
            product.weight = weight.flatten(1)
            outputs.append(product(patches).mT.unflatten(-1, grad.shape[2:]))
        y = torch.cat(outputs, 1)
        return y if exact.bias is None else y + exact.bias.view(-1, 1, 1)

    assert len(s_w) == 6 and torch.allclose(by_patches(), layer(x), atol=1e-5)
    for ours, theirs in zip(found, backward(by_patches, grad, x, exact.weight, exact.bias), strict=True):
        assert_close(ours, theirs)


@evidence
@pytest.mark.parametrize("name", ["mul8s_1L2J", "mul8s_1KVA"])
def test_smoothed_products_of_activations_equal_a_loop(name, tables_of_slopes):
    layer = layer_of(layers.Matmul(), name, [0.01, 0.02], gradient="smoothed")
    a, b, grad = (
        random(2, 2, 3).requires_grad_(),
        random(2, 3, 2, seed=1).mul_(2).requires_grad_(),
        random(2, 2, 2, seed=2),
    )
    found = backward(lambda: layer(a, b), grad, a, b)
    x, y = quantise(a.detach(), 0.01).long() + 128, quantise(b.detach(), 0.02).long() + 128
    by_a, by_b = tables_of_slopes[name]
    grad_a, grad_b = torch.zeros(2, 2, 3), torch.zeros(2, 3, 2)
    for i in range(2):
        for m in range(2):
            for k in range(3):
                for n in range(2):
                    pair = x[i, m, k], y[i, k, n]
                    grad_a[i, m, k] += grad[i, m, n] * by_a[pair] * 0.02 * (a[i, m, k].abs() <= 0.01 * 127.5)
                    grad_b[i, k, n] += grad[i, m, n] * by_b[pair] * 0.01 * (b[i, k, n].abs() <= 0.02 * 127.5)
    assert_close(found[0], grad_a.detach(), 5e-3)
    assert_close(found[1], grad_b.detach(), 5e-3)


def test_smoothed_through_exact_products_is_straight_through():
    torch.manual_seed(0)
    cases = [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), random(2, 4, 7, 5), [0.01]),
        (nn.Linear(23, 5), random(2, 3, 23), [0.01]),
    ]
    for exact, x, scales in cases:
        x.requires_grad_()
        both = []
        for gradient in ("straight-through", "smoothed"):
            layer = layer_of(exact, EXACT, scales, gradient=gradient, per_channel=True)
            both.append(backward(lambda layer=layer, x=x: layer(x), torch.ones_like(layer(x)), x, *exact.parameters()))
        for one, other in zip(*both, strict=True):
            assert_close(one, other)
    a, b, both = random(2, 5, 23).requires_grad_(), random(2, 23, 1).requires_grad_(), []
    for gradient in ("straight-through", "smoothed"):
        layer = layer_of(layers.Matmul(), EXACT, [0.01, 0.01], gradient=gradient)
        both.append(backward(lambda layer=layer: layer(a, b), torch.ones(2, 5, 1), a, b))
    for one, other in zip(*both, strict=True):
        assert_close(one, other)


# --------------------------------------------------------------------------------- mixed precision
# ------------------------------------------------------------------------------ what is refused


def test_an_unknown_gradient_is_refused_before_anything_changes():
    network = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="gradient is 'smooth'; it can be 'straight-through', 'smoothed'"):
        approximate(network, EXACT, calibration=torch.ones(1, 1, 2, 2), gradient="smooth")
    assert assignment_of(network) == {}


@pytest.mark.parametrize("gradient", ["straight-through", "smoothed"])
def test_a_second_derivative_is_refused(gradient):
    # The slopes' own slopes are nowhere: better an error than a wrong zero.
    x = random(1, 2, 3, 3).requires_grad_()
    a, b = random(2, 3).requires_grad_(), random(3, 2).requires_grad_()
    conv = layer_of(nn.Conv2d(2, 2, 1), EXACT, [0.1], gradient=gradient)
    linear = layer_of(nn.Linear(3, 2), EXACT, [0.1], gradient=gradient)
    product = layer_of(layers.Matmul(), EXACT, [0.1, 0.1], gradient=gradient)
    for y, leaf in ((conv(x), x), (linear(a), a), (product(a, b), a)):
        (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()

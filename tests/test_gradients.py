"""Gradients against autograd and against loops over the table, and products that are never older than the weights."""

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from axmoe_lite import EXACT, approximate, assignment_of, layers, models, multiplier, restore
from axmoe_lite.quant import fake_quantise, quantise, weight_scale

evidence = pytest.mark.trust("law", "gradients: against autograd, and loops over the table")

WINDOW = 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(exact, name, scale_x, **options):
    """An approximate layer with a given activation scale."""
    kind = {nn.Conv2d: layers.ApproxConv2d, nn.Linear: layers.ApproxLinear, layers.Matmul: layers.ApproxMatmul}
    layer = kind[type(exact)](exact, multiplier(name), **options)
    for scale, value in zip(layer.SCALES, scale_x, strict=True):
        getattr(layer, scale).fill_(value)
    return layer


def backward(call, grad, *leaves):
    """The gradients that reach the leaves."""
    leaves = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(call(), leaves, grad)


def assert_close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() <= tolerance * expected.norm().clamp_min(1e-6)


# --------------------------------------------------------------------------------- straight through

CONVOLUTIONS = [
    # shape of x, outputs, kernel, options
    ((2, 3, 9, 7), 4, 3, {"padding": 1}),
    ((1, 1, 1, 1), 1, 1, {}),
    ((2, 6, 8, 5), 9, (3, 2), {"stride": (2, 1), "padding": (0, 2), "groups": 3, "bias": False}),
    ((3, 23, 5, 5), 23, 3, {"groups": 23, "padding": 2, "dilation": 2}),
    ((1, 115, 2, 3), 2, 1, {"stride": 2}),
    ((2, 4, 6, 6), 3, 3, {"padding": 1, "padding_mode": "circular"}),
    ((2, 4, 6, 6), 3, (3, 5), {"padding": "same"}),
]


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

# bfloat16 keeps 8 bits: rounding to it changes a number by at most a relative u = 2^-9 to first order. With codes
# exact, three roundings reach a gradient: that of grad, that of the dequantised weight or of scale, and that of the
# result. Those of the operands are independent over the fan-in n, so that the sum of n rounded terms is off by about
# u |term| sqrt(n), as the sum itself grows; in norm each of the three costs at most u, together at most 3 u of the
# result while its terms do not cancel, and a few times that where they do: 3 * 2^-9 * 2. A sum kept in bfloat16
# instead would be off by about n u / 2, beyond this bound from n = 115 on.
ROUNDED = 3 * 2**-9 * 2


def mixed():
    return torch.autocast("cpu", torch.bfloat16)


def both_precisions(layer, inputs, grad, leaves):
    """Result and gradients by float32, then in mixed precision; the gradient comes in as the result's type."""
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(*inputs)
        found.append([y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad.to(y.dtype))])
    return found


def assert_mixed(plain, rounded):
    assert plain[0].dtype == torch.float32 and torch.equal(rounded[0], plain[0].bfloat16())  # rounded once, at the end
    for exact, ours in zip(plain[1:], rounded[1:], strict=True):
        assert not torch.equal(ours, exact) or exact.numel() < 30 or not exact.any(), "nothing was rounded"
        assert_close(ours, exact, ROUNDED)


@pytest.mark.parametrize("name", ["mul8s_1KVA", "drum(4)"])
@pytest.mark.parametrize("shape,out,kernel,options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_convolutions_in_mixed_precision(name, shape, out, kernel, options, per_channel, kind):
    torch.manual_seed(1)
    layer = layer_of(nn.Conv2d(shape[1], out, kernel, **options), name, [0.01], per_channel=per_channel)
    for last in (False, True):
        x = random(*shape).mul_(2).to(kind)
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        grad = random(*layer(x).shape, seed=9)
        for odd in (grad, grad.mT.contiguous().mT, grad[:1, :, :1].expand(grad.shape)):
            plain, rounded = both_precisions(layer, [x], odd, [x, layer.weight, layer.bias])
            assert_mixed(plain, rounded)
            assert rounded[1].dtype == kind and rounded[2].dtype == torch.float32
            assert rounded[1].stride() == plain[1].stride()  # a lost layout would cost more than rounding gains
        assert torch.equal(rounded[1] == 0, plain[1] == 0), "clipped alike"


@pytest.mark.parametrize("shape", [(1, 1), (23, 5), (2, 3, 115), (2, 1, 4, 3), (5,), (1, 3000), (3000, 2)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_in_mixed_precision(shape, per_channel, kind):
    torch.manual_seed(1)
    layer = layer_of(nn.Linear(shape[-1], 7), "mul8s_1KVA", [0.01], per_channel=per_channel)
    x, grad = random(*shape).mul_(2).to(kind).requires_grad_(), random(*shape[:-1], 7, seed=9)
    for odd in (
        grad,
        grad.flip(-1),
        grad[..., :1].expand(grad.shape),
        grad.T.contiguous().T if grad.ndim == 2 else grad,
    ):
        plain, rounded = both_precisions(layer, [x], odd, [x, layer.weight, layer.bias])
        assert_mixed(plain, rounded)
        assert rounded[1].dtype == kind and rounded[2].dtype == rounded[3].dtype == torch.float32


@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_activations_in_mixed_precision(batch, turned, kind):
    layer = layer_of(layers.Matmul(), "mul8s_1L2J", [0.01, 0.013])
    a = random(*batch, 4, 115).to(kind).requires_grad_()
    b = (random(*batch, 2, 115, seed=1).mT if turned else random(*batch, 115, 2, seed=1)).to(kind).requires_grad_()
    plain, rounded = both_precisions(layer, [a, b], random(*batch, 4, 2, seed=2), [a, b])
    assert_mixed(plain, rounded)
    assert rounded[1].dtype == rounded[2].dtype == kind


def test_a_gradient_that_bfloat16_holds_is_exact_by_hand():
    # x = 3 has code 3 of scale 1, the weights codes 127 and -2 of scale 1/128 (exactly: amax = 127 / 128). grad (1, 4)
    # gives x: 127/128 - 8/128 = 119/128, which has 7 bits; the weights 1 * 3 and 4 * 3; the biases 1 and 4.
    layer = layer_of(nn.Linear(1, 2), EXACT, [1.0])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[127 / 128], [-2 / 128]]))
        layer.bias.zero_()
    x = torch.tensor([[3.0]], requires_grad=True)
    with mixed():
        y = layer(x)
    # 3 * 127 / 128 = 2.9765625 needs 9 bits; between 2 and 4 bfloat16 counts in 64ths: 190.5 / 64 becomes 190 / 64.
    assert y.dtype == torch.bfloat16 and y.tolist() == [[190 / 64, -6 / 128]]
    found = torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.tensor([[1.0, 4.0]]).bfloat16())
    assert [f.flatten().tolist() for f in found] == [[119 / 128], [3.0, 12.0], [1.0, 4.0]]


def test_the_gradient_of_a_bias_is_not_rounded():
    # 257 ones: bfloat16, which has 8 bits, would make it 256.
    for exact, x in ((nn.Linear(1, 1), torch.ones(257, 1)), (nn.Conv2d(1, 1, 1), torch.ones(1, 1, 257, 1))):
        layer = layer_of(exact, EXACT, [1.0])
        with mixed():
            y = layer(x)
        (found,) = torch.autograd.grad(y, layer.bias, torch.ones_like(y))
        assert found.tolist() == [257.0] and found.dtype == torch.float32


def test_codes_are_exact_operands_in_mixed_precision():
    # scale 0.3: values 0.3 * code would be rounded to bfloat16, codes are not. With a gradient of one 1 the gradient of
    # the weight is a value, rounded only where the product is handed out: the codes 1..127 are all held exactly.
    layer = layer_of(nn.Linear(127, 1, bias=False), EXACT, [0.3])
    x = torch.arange(1.0, 128.0).mul(0.3)[None]
    with mixed():
        y = layer(x)
    (found,) = torch.autograd.grad(y, layer.weight, torch.ones_like(y))
    assert torch.equal(found, torch.arange(1.0, 128.0)[None] * torch.tensor(0.3))
    image = layer_of(nn.Conv2d(127, 1, 1, bias=False), EXACT, [0.3])
    with mixed():
        y = image(x[:, :, None, None])
    (found,) = torch.autograd.grad(y, image.weight, torch.ones_like(y))
    assert torch.equal(found.flatten(), torch.arange(1.0, 128.0) * torch.tensor(0.3))


def cases_of_all_kinds(**options):
    torch.manual_seed(0)
    conv = layer_of(nn.Conv2d(4, 6, 3, padding=1), "mul8s_1L2J", [0.02], **options)
    linear = layer_of(nn.Linear(4, 6), "mul8s_1L2J", [0.02], **options)
    product = layer_of(layers.Matmul(), "mul8s_1L2J", [0.02, 0.02], **options)
    return [
        (conv, [random(2, 4, 5, 5).requires_grad_()]),
        (linear, [random(2, 4).requires_grad_()]),
        (product, [random(2, 3, 4).requires_grad_(), random(2, 4, 2, seed=1).requires_grad_()]),
    ]


def test_smoothed_gradients_stay_in_float32():
    for layer, inputs in cases_of_all_kinds(gradient="smoothed"):
        leaves = [*inputs, *layer.parameters()]
        y = layer(*inputs)
        grad = random(*y.shape).bfloat16()  # as what follows hands it on: the results then agree in every bit
        with mixed():
            rounded = layer(*inputs)
        assert torch.equal(rounded, y.bfloat16())
        theirs = torch.autograd.grad(y, leaves, grad.float())
        for ours, other in zip(torch.autograd.grad(rounded, leaves, grad), theirs, strict=True):
            assert ours.dtype == other.dtype and torch.equal(ours, other)


@pytest.mark.parametrize("context", ["evaluation", "float16", "switched off"])
def test_only_training_in_bfloat16_rounds(context):
    for layer, inputs in cases_of_all_kinds():
        layer.train(context != "evaluation")
        leaves = [*inputs, *layer.parameters()]
        y = layer(*inputs)
        grad = random(*y.shape)
        dtype = torch.float16 if context == "float16" else torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=context != "switched off"):
            other = layer(*inputs)
        assert other.dtype == torch.float32 and torch.equal(other, y)
        theirs = torch.autograd.grad(y, leaves, grad)
        for one, two in zip(torch.autograd.grad(other, leaves, grad), theirs, strict=True):
            assert torch.equal(one, two)


@evidence
def test_without_autocast_gradients_are_those_of_plain_torch_in_every_bit():
    # Straight-through in float32 is one call of torch on dequantised operands; mixed precision may not change a bit.
    (conv, (x,)), (linear, (rows,)), (product, (a, b)) = cases_of_all_kinds()

    def meant(t, scale):
        return quantise(t.detach(), scale).float() * torch.tensor(scale)

    def within(t):
        return t.abs() <= torch.tensor(0.02) * 127.5

    s_w = weight_scale(conv.weight)
    used, grad = quantise(conv.weight.detach(), s_w).float() * s_w, random(2, 6, 5, 5)
    found = torch.autograd.grad(conv(x), [x, conv.weight, conv.bias], grad)
    by_torch = torch.ops.aten.convolution_backward(
        grad, meant(x, 0.02), used, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)
    )
    assert torch.equal(found[0], by_torch[0] * within(x)) and torch.equal(found[1], by_torch[1])
    assert torch.equal(found[2], grad.sum((0, 2, 3)))

    s_w = weight_scale(linear.weight)
    used, grad = quantise(linear.weight.detach(), s_w).float() * s_w, random(2, 6)
    found = torch.autograd.grad(linear(rows), [rows, linear.weight, linear.bias], grad)
    assert torch.equal(found[0], grad @ used * within(rows)) and torch.equal(found[1], grad.T @ meant(rows, 0.02))
    assert torch.equal(found[2], grad.sum(0))

    grad = random(2, 3, 2)
    found = torch.autograd.grad(product(a, b), [a, b], grad)
    assert torch.equal(found[0], grad @ meant(b, 0.02).mT * within(a))
    assert torch.equal(found[1], meant(a, 0.02).mT @ grad * within(b))


def test_mixed_precision_keeps_channels_last_and_bfloat16_through_a_network():
    network = models.resnet8(classes=10, shortcut="projection")  # seven convolutions and two on the way around
    seen, grads = [], []
    approximate(network, "mul8s_1L2L", calibration=random(4, 3, 32, 32))

    def look(module, inputs, y):
        seen.append((*inputs, y))
        if inputs[0].requires_grad:
            inputs[0].register_hook(grads.append)

    for module in network.modules():
        if isinstance(module, layers.ApproxConv2d):
            module.register_forward_hook(look)
    with mixed():
        y = network.train()(random(4, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    y.float().square().sum().backward()
    assert len(seen) == 9 and y.dtype == torch.bfloat16
    for place, (x, y) in enumerate(seen):
        assert y.dtype == torch.bfloat16 and (place == 0 or x.dtype == torch.bfloat16)
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert len(grads) == 8
    for grad in grads:
        assert grad.dtype == torch.bfloat16 and grad.is_contiguous(memory_format=torch.channels_last)
    for parameter in network.parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all()


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


# ----------------------------------------------------------------- products follow the weights


def changes():
    def through_data(network, optimiser):
        network[0].weight.data.mul_(-1.5)

    def one_value_through_data(network, optimiser):
        network[2].weight.data[0, 0] += 1.0

    def bias_in_place(network, optimiser):
        with torch.no_grad():
            network[0].bias.add_(1.0)

    def new_memory(network, optimiser):
        network[0].weight.data = network[0].weight.data.flip(0).clone()

    def step(network, optimiser):
        network(random(2, 3, 6, 6)).square().sum().backward()
        optimiser.step()

    def load(network, optimiser):
        state = {name: value * 1.5 for name, value in network.state_dict().items()}
        network.load_state_dict(state)

    def assign(network, optimiser):
        state = {name: value * 1.5 for name, value in network.state_dict().items()}
        network.load_state_dict(state, assign=True)

    def scale(network, optimiser):
        network[0].scale_x.mul_(2)

    def other_multiplier(network, optimiser):
        network[0].multiplier = multiplier("mul8s_1L2L")

    return [
        through_data,
        one_value_through_data,
        bias_in_place,
        new_memory,
        step,
        load,
        assign,
        scale,
        other_multiplier,
    ]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_no_product_is_older_than_the_weights(change, training, grad):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = random(2, 3, 6, 6)
    approximate(network, {"0": "mul8s_1L2J", "2": "mul8s_1KVA"}, calibration=x).train(training)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    with torch.set_grad_enabled(grad):
        before = network(x)
        assert torch.equal(network(x), before)
    change(network, optimiser)
    fresh = copy.deepcopy(network)  # a copy has no products yet
    with torch.set_grad_enabled(grad):
        after = network(x)
        assert torch.equal(after, fresh(x)) and not torch.equal(after, before)
        network.train(not training)
        assert torch.equal(network(x), after)


def test_evaluation_between_two_steps_sees_both():
    # train, eval, train, eval: what evaluation keeps must not outlive the step.
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    x = random(2, 3, 6, 6)
    approximate(network, "mul8s_1L2J", calibration=x)
    optimiser, seen = torch.optim.SGD(network.parameters(), lr=0.5), []
    for _ in range(3):
        network.train()(x).square().sum().backward()
        optimiser.step()
        seen.append(network.eval()(x))
        assert torch.equal(seen[-1], copy.deepcopy(network)(x))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles_of_approximate_layers(used):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 2)).eval()
    x = random(2, 3, 6, 6)
    approximate(network, {"0": "mul8s_1L2J", "2": "mul8s_1KVA", "3": "drum(4)"}, calibration=x)
    y = network(x) if used else copy.deepcopy(network)(x)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    twins = [
        copy.deepcopy(network),
        copy.copy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(file, weights_only=False),
    ]
    for twin in twins:
        assert torch.equal(twin(x), y) and assignment_of(twin) == assignment_of(network)
        twin(x).sum().backward()
        twin.zero_grad()
    for twin in (twins[0], *twins[2:]):
        with torch.no_grad():
            twin[0].weight.zero_()
        assert torch.equal(network(x), y) and not torch.equal(twin(x), y)
        assert type(restore(twin)[0]) is nn.Conv2d and not twin[0].weight.any()


# --------------------------------------------------------------------------------------- attention


def test_attention_by_dotted_name():
    network = models.ViT(dim=12, depth=2, heads=3, classes=4, image_size=8, patch=4).eval()
    x = random(5, 3, 8, 8)
    before, modules = network(x), list(network.modules())
    assert not any(name.endswith((".qk", ".av")) for name in layers.default_layers(network))
    approximate(network, {"blocks.0.attn.qk": "mul8s_1L12"}, calibration=x)
    assert assignment_of(network) == {"blocks.0.attn.qk": "mul8s_1L12"}
    qk = network.blocks[0].attn.qk
    assert isinstance(qk, layers.ApproxMatmul) and isinstance(network.blocks[1].attn.qk, layers.Matmul)
    assert not torch.equal(network(x), before)
    # The product by its law, on what attention gives it: [5, 3, T, 4] times [5, 3, 4, T], T = 1 + 2 * 2.
    a, b = random(5, 3, 5, 4), random(5, 3, 5, 4, seed=1).mT
    codes = quantise(a, qk.scale_a), quantise(b, qk.scale_b)
    table = multiplier("mul8s_1L12").table
    sums = table[codes[0].long().unsqueeze(-1) + 128, codes[1].long().unsqueeze(-3) + 128].sum(-2)
    assert torch.equal(qk(a, b), sums.float() * (qk.scale_a * qk.scale_b))
    # Training goes through it, and restoring gives back the very modules.
    network.train()(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())
    assert list(restore(network.eval()).modules()) == modules and torch.equal(network(x), before)
    both = {f"blocks.{i}.attn.{part}": "mul8s_1KVA" for i in (0, 1) for part in ("qk", "av")}
    approximate(network, {**both, "blocks.1.mlp.fc1": "mul8s_1L2J"}, calibration=x, gradient="smoothed")
    assert len(assignment_of(network)) == 5
    network(x).sum().backward()
    assert torch.equal(restore(network)(x), before)


# ------------------------------------------------------------------------------------------ memory

STEP = """
import sys
import torch
from axmoe_lite import approximate, models

def memory(line):
    return int(open("/proc/self/status").read().split(line)[1].split()[0])

torch.manual_seed(0)
network = models.resnet20(classes=10).train()
if sys.argv[1] != "float32":
    approximate(network, "mul8s_1L2J", calibration=torch.randn(8, 3, 32, 32), gradient=sys.argv[1])
optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

def step(n):
    optimiser.zero_grad()
    x = torch.randn(n, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network(x).square().sum().backward()
    optimiser.step()

for _ in range(2):
    step(2)  # compiles, prepares and allocates what does not grow with the batch
open("/proc/self/clear_refs", "w").write("5")  # the peak starts at what is resident now
before = memory("VmRSS:")
for _ in range(2):
    step(64)
print(memory("VmHWM:") - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a process's peak")
@pytest.mark.parametrize("gradient", ["straight-through", "smoothed"])
def test_a_training_step_takes_little_more_memory_than_in_float32(gradient):
    def peak_kib(kind):
        # Large blocks go back to the system when they are freed, so that the peak is what was in use.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, "-c", STEP, kind]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    # A map of the first stage has 64 * 16 * 32 * 32 floats, 4 MiB; ResNet-20 keeps dozens of them.
    base, ours = peak_kib("float32"), peak_kib(gradient)
    print(f"\n{gradient}: {ours / 1024:.0f} MiB, float32 {base / 1024:.0f} MiB, ratio {ours / base:.2f}")
    assert base > 20 * 4096 and ours <= 1.5 * base

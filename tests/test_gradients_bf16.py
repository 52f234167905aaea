"""In mixed precision gradients are rounded three times at most, and only there."""

import pytest
import torch
from derived import CONVOLUTIONS, assert_close, evidence, layer_of, random
from torch import nn

from axmoe_lite import EXACT, approximate, layers, models
from axmoe_lite.quant import quantise, weight_scale

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


def assert_mixed(plain, rounded, kind=torch.float32):
    assert plain[0].dtype == kind and torch.equal(rounded[0], plain[0].bfloat16())  # rounded once, at the end
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
    assert_mixed(plain, rounded, kind)
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


@pytest.mark.parametrize("n", [257, layers.gradients.CACHED + 1])  # the second is summed in two parts
def test_the_gradient_of_a_bias_is_not_rounded(n):
    # 257 ones: bfloat16, which has 8 bits, would make it 256.
    for exact, x in ((nn.Linear(1, 1), torch.ones(n, 1)), (nn.Conv2d(1, 1, 1), torch.ones(1, 1, n, 1))):
        layer = layer_of(exact, EXACT, [1.0])
        with mixed():
            y = layer(x)
        (found,) = torch.autograd.grad(y, layer.bias, torch.ones_like(y))
        assert found.tolist() == [n] and found.dtype == torch.float32


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

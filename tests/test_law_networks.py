"""Layers, frozen networks, mixtures and gradients against the law, on what hypothesis draws. Equal means in every bit.

Where the law is one of floats, its operands are chosen so that no sum is rounded: small integers times powers of two.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import (
    cheap,
    codes_by_law,
    convolutions,
    dtypes,
    equal,
    few,
    floats,
    generator,
    laid,
    layouts,
    length,
    machine,
    machines,
    many,
    plain,
    scaled_by_law,
    seeds,
    tables,
)
from torch import nn

from axmoe_lite import Multiplier, approximate, layers, moe
from axmoe_lite.kernels import reference
from axmoe_lite.layers import small
from axmoe_lite.pipeline import freeze

tiny = torch.finfo(torch.float32).tiny


def scale_by_law(weight, per_channel):
    """What one step of a weight's code means, for each output: float32 [O]."""
    size = weight.detach().float().abs().flatten(1)
    largest = size.amax(1) if per_channel else size.amax().expand(len(size))
    return largest.clamp_min(tiny * 127) / 127


def weight_codes_by_law(weight, scale):
    scaled = weight.detach().float() * (1.0 / scale).view(-1, *[1] * (weight.ndim - 1))
    return scaled.round().clamp(-127, 127).to(torch.int8)


def layer_of(exact, m, scales, **options):
    """An approximate layer with given activation scales."""
    layer = layers.modules.KINDS[type(exact)](exact, m, **options)
    for name, scale in zip(layer.SCALES, scales, strict=True):
        getattr(layer, name).fill_(scale)
    return layer


# ------------------------------------------------------------------------------------- layers


@pytest.mark.trust("law", "convolutional layers, in each float type, layout and padding")
@many(250)
@given(
    m=st.one_of(cheap, tables), case=convolutions(least=1), seed=seeds, layout=layouts, dtype=dtypes, of_weight=dtypes,
    mode=st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]), same=st.booleans(),
    biased=st.booleans(), per_channel=st.booleans(), training=st.booleans(), signed=st.booleans(), on=machines,
)  # fmt: skip
def test_convolutional_layers(
    m, case, seed, layout, dtype, of_weight, mode, same, biased, per_channel, training, signed, on
):
    shape, kernel, options = case
    torch.manual_seed(seed)
    if same and options["stride"] == (1, 1):
        options = options | {"padding": "same"}
    exact = nn.Conv2d(shape[1], kernel[0], kernel[2:], padding_mode=mode, bias=biased, **options).to(of_weight)
    if mode != "zeros" or options["padding"] == "same":  # which torch has for images with pixels only
        shape = (*shape[:2], *(max(5, side) for side in shape[2:]))
    x = laid((floats(shape, seed, torch.float32, signed=signed) * 0.37).to(dtype), layout)
    layer = layer_of(exact, m, [0.37], per_channel=per_channel).train(training)
    around = exact._reversed_padding_repeated_twice
    padded = nn.functional.pad(plain(x), around, mode="constant" if mode == "zeros" else mode)
    scale = scale_by_law(exact.weight, per_channel)
    operands = codes_by_law(padded, 0.37), weight_codes_by_law(exact.weight, scale)
    sums = reference.conv2d(*operands, m.table, **options | {"padding": (0, 0)})
    law = scaled_by_law(sums, 0.37, scale, exact.bias.detach().float() if biased else None, axis=1).to(of_weight)
    with machine(*on), torch.no_grad():
        assert equal(layer(x), law)
        assert equal(layer(x), law), "a second call finds what the first has kept"
        if len(x):
            assert equal(layer(x[0]), law[0])


@pytest.mark.trust("law", "linear layers, in each float type and layout")
@many(250)
@given(
    m=st.one_of(cheap, tables), batch=st.sampled_from([(), (0,), (1,), (2,), (23,), (2, 3), (2, 0), (1, 1, 2)]),
    sides=st.tuples(st.sampled_from([1, 2, 23, 115]), st.sampled_from([1, 2, 23])), seed=seeds, layout=layouts,
    dtype=dtypes, of_weight=dtypes, biased=st.booleans(), per_channel=st.booleans(), training=st.booleans(),
    signed=st.booleans(), on=machines,
)  # fmt: skip
def test_linear_layers(m, batch, sides, seed, layout, dtype, of_weight, biased, per_channel, training, signed, on):
    torch.manual_seed(seed)
    exact = nn.Linear(*sides, bias=biased).to(of_weight)
    x = (floats((*batch, sides[0]), seed, torch.float32, signed=signed) * 0.37).to(dtype)
    x = laid(x, layout) if batch else x
    layer = layer_of(exact, m, [0.37], per_channel=per_channel).train(training)
    scale = scale_by_law(exact.weight, per_channel)
    rows, weight = codes_by_law(plain(x), 0.37).view(-1, sides[0]), weight_codes_by_law(exact.weight, scale)
    sums = reference.matmul(rows, weight.T, m.table).view(*batch, sides[1])
    bias = exact.bias.detach().float() if biased else None
    with machine(*on), torch.no_grad():
        assert equal(layer(x), scaled_by_law(sums, 0.37, scale, bias, axis=-1).to(of_weight))


@pytest.mark.trust("law", "products of two activations, in each float type and layout")
@many(250)
@given(
    m=st.one_of(cheap, tables), batch=st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0)]),
    sides=st.tuples(few, length, few), seed=seeds, layout=st.tuples(layouts, layouts), dtype=st.tuples(dtypes, dtypes),
    on=machines,
)  # fmt: skip
def test_products_of_activations(m, batch, sides, seed, layout, dtype, on):
    rows, fan_in, columns = sides
    a = laid(floats((*batch, rows, fan_in), seed, dtype[0], special=True), layout[0])
    b = floats((*batch, fan_in, columns), seed + 1, torch.float32, special=True) * 0.37  # ties on this grid too
    b = laid(b.to(dtype[1]), layout[1])
    x, y = codes_by_law(plain(a), 1.0), codes_by_law(plain(b), 0.37)
    sums = torch.zeros(*batch, rows, columns, dtype=torch.int32)
    for one, other, into in zip(*(t.flatten(0, -3) if batch else t[None] for t in (x, y, sums)), strict=True):
        into.copy_(reference.matmul(one, other, m.table))
    layer = layer_of(layers.Matmul(), m, [1.0, 0.37])
    law = (sums.float() * (torch.tensor(1.0) * torch.tensor(0.37))).to(torch.promote_types(*dtype))
    with machine(*on), torch.no_grad():
        assert equal(layer(a, b), law)


# ------------------------------------------------------------------------------------- frozen networks


class Chain(nn.Module):
    """Convolutions, each with what the pipeline may take along: BatchNorm, an addition, a ReLU, pooling."""

    def __init__(self, blocks, draw):
        super().__init__()
        self.blocks, channels = nn.ModuleList(), 3
        for out, kernel, stride, groups, norm, cut, pool, _ in blocks:
            out, groups = (out, 1) if channels % groups or out % groups else (out, groups)
            conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=not norm)
            block = nn.ModuleDict({"conv": conv, "norm": nn.BatchNorm2d(out) if norm else nn.Identity()})
            block["cut"] = {"none": nn.Identity(), "relu": nn.ReLU(), "six": nn.ReLU6()}[cut]
            block["pool"] = nn.MaxPool2d(3, pool, 1) if pool else nn.Identity()
            self.blocks.append(block)
            channels = out
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=draw) * 0.3)
            norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=draw) + 0.5)
            norm.weight.data.copy_(torch.randn(norm.weight.shape, generator=draw))
        self.adds = [block[-1] for block in blocks]

    def forward(self, x):
        for block, adds in zip(self.blocks, self.adds, strict=True):
            y = block["norm"](block["conv"](x))
            if adds and block["conv"].in_channels == block["conv"].out_channels and block["conv"].stride == (1, 1):
                y = y + x
            x = block["pool"](block["cut"](y))
        return x


blocks = st.lists(
    st.tuples(
        st.sampled_from([3, 3, 4, 6, 7]), st.sampled_from([1, 3, 3, 5]), st.sampled_from([1, 1, 2]),
        st.sampled_from([1, 1, 3]), st.booleans(), st.sampled_from(["none", "relu", "relu", "six"]),
        st.sampled_from([0, 0, 1, 2]), st.booleans(),
    ), min_size=1, max_size=4,
)  # fmt: skip


@pytest.mark.trust("law", "frozen networks against the network layer by layer")
@many(80)
@given(
    blocks=blocks, chosen=st.lists(st.one_of(cheap, cheap, tables), min_size=4, max_size=4), seed=seeds, layout=layouts,
    size=st.tuples(few.filter(bool), *[st.integers(1, 9)] * 2), per_channel=st.booleans(), units=st.booleans(),
)  # fmt: skip
def test_frozen_networks(blocks, chosen, seed, layout, size, per_channel, units):
    torch.manual_seed(seed)
    network = Chain(blocks, generator(seed)).eval()
    x = laid(torch.randn(size[0], 3, *size[1:], generator=generator(seed)) * 3, layout)
    assignment = {f"blocks.{i}.conv": m for i, m in enumerate(chosen[: len(blocks)])}
    approximate(network, assignment, calibration=torch.randn(2, 3, 9, 9) * 3, per_channel=per_channel)
    with machine(units or seed % 2 == 0, True), torch.no_grad():
        frozen = freeze(network)
        law = frozen.law(plain(x))
        for images in (x, x[:1], x):  # buffers of another size in between
            assert equal(frozen(images), law[: len(images)])
        if not any(block[4] for block in blocks):  # BatchNorm folded in rounds otherwise
            assert equal(law, network(x))


# ------------------------------------------------------------------------------------- mixtures

EXPERTS = {
    "images": (lambda: nn.Conv2d(3, 2, 3, padding=1), (3, 4, 5), "image"),
    "tokens": (lambda: nn.Linear(3, 2), (5, 3), "token"),
    "images of tokens": (lambda: nn.Linear(3, 2), (5, 3), "image"),
    "rows": (lambda: nn.Linear(3, 2), (3,), "token"),
}


@pytest.mark.trust("law", "mixtures of approximate experts against a loop over items and experts")
@many(150)
@given(
    kind=st.sampled_from(list(EXPERTS)), hard=st.booleans(), experts=st.integers(1, 4), n=few,
    weighting=st.sampled_from(["probability", "straight-through"]), chosen=st.lists(cheap, min_size=4, max_size=4),
    gate=st.sampled_from(["linear", "mlp", "standardised"]), seed=seeds, also=st.sampled_from(["", "idle", "all"]),
)  # fmt: skip
def test_mixtures(kind, hard, experts, n, weighting, chosen, gate, seed, also):
    make, shape, per = EXPERTS[kind]
    torch.manual_seed(seed)
    members, chooser = [make() for _ in range(experts)], moe.Gate(3, experts, kind=gate, per=per)
    layer = moe.HardMoE(members, chooser, weighting=weighting) if hard else moe.SoftMoE(members, chooser)
    for linear in (m for m in chooser.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=9)  # else the mean over pixels hardly matters
    assignment = {f"experts.{e}": m for e, m in enumerate(chosen[:experts])}
    with moe.no_idle_experts(layer), torch.no_grad():
        approximate(layer.eval(), assignment, calibration=torch.randn(6, *shape))
        x, layer.also = torch.randn(n, *shape), also
        y, p = layer(x), layer.gate(x)
    items = x.flatten(0, -2) if per == "token" else x
    assert len(p) == len(items)
    law = torch.zeros_like(y).view(len(items), *y.shape[x.ndim - items.ndim + 1 :])
    with torch.no_grad():
        for i, e in itertools.product(range(len(items)), range(experts)):
            weight = p[i, e] if not hard or weighting == "probability" else torch.ones(())
            if not hard or e == p[i].argmax():
                law[i] += layer.experts[e](items[i : i + 1])[0] * weight
    assert equal(y, law.view(y.shape))


@pytest.mark.trust("law", "clusters of approximate networks against a loop over images")
@many(80)
@given(experts=st.integers(1, 4), n=few, chosen=st.lists(cheap, min_size=4, max_size=4), seed=seeds)
def test_clusters(experts, n, chosen, seed):
    torch.manual_seed(seed)
    networks = [
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
        for _ in range(experts)
    ]
    network = moe.ClusterMoE(networks, nn.Sequential(nn.Flatten(), nn.Linear(32, experts))).eval()
    assignment = {f"experts.{e}.{i}": m for e, m in enumerate(chosen[:experts]) for i in (0, 4)}
    with moe.no_idle_experts(network), torch.no_grad():
        approximate(network, assignment, calibration=torch.randn(6, 2, 4, 4))
        x = torch.randn(n, 2, 4, 4)
        choice = network.gateway(x).argmax(1)
        law = [network.experts[e](x[i : i + 1]) for i, e in enumerate(choice)]
        assert equal(network(x), torch.cat(law) if law else torch.zeros(0, 5))


# ------------------------------------------------------------------------------------- gradients

STEP, UNIT = 2.0**-3, 2.0**-5  # scales of activations and weights: no product of integers with them is rounded


def on_a_grid(shape, seed, largest):
    """Integers as floats."""
    return torch.randint(-largest, largest + 1, shape, generator=generator(seed)).float()


def weights_on_a_grid(shape, seed):
    """Weights whose scale is UNIT exactly, because the first of each output is 127 steps."""
    weight = on_a_grid(shape, seed, 126)
    weight.view(len(weight), -1)[:, 0] = 127
    return weight * UNIT


def gradients_of(call, grad, *leaves):
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return [g.double() for g in torch.autograd.grad(call(*leaves), leaves, grad)]


@pytest.mark.trust("law", "straight-through gradients that no sum rounds")
@many(200)
@given(
    m=st.one_of(cheap, tables), case=convolutions(least=1), seed=seeds, layout=layouts, per_channel=st.booleans(),
    biased=st.booleans(), linear=st.booleans(),
)  # fmt: skip
def test_straight_through_gradients(m, case, seed, layout, per_channel, biased, linear):
    shape, kernel, options = case
    if 0 in shape:
        return
    if linear:
        exact = nn.Linear(kernel[1], kernel[0], bias=biased)
        shape, kernel, options = (*shape[2:], kernel[1]), kernel[:2], {}
    else:
        exact = nn.Conv2d(shape[1], kernel[0], kernel[2:], bias=biased, **options)
    exact.weight.data.copy_(weights_on_a_grid(kernel, seed))
    layer = layer_of(exact, m, [STEP], per_channel=per_channel)
    x = laid(on_a_grid(shape, seed, 140), layout).mul(STEP)  # some are clipped
    grad = on_a_grid(layer(x).shape, seed + 1, 3)
    leaves = [exact.weight, exact.bias] if biased else [exact.weight]
    found = gradients_of(lambda x, *_: layer(x), grad, x, *leaves)
    seen, *theirs = (t.detach().double() for t in (x.clamp(-127 * STEP, 127 * STEP), *leaves))
    product = nn.functional.linear if linear else nn.functional.conv2d
    law = gradients_of(lambda x, w, b=None: product(x, w, b, **options), grad.double(), seen, *theirs)
    law[0] = law[0] * (x.detach().abs() <= 127.5 * STEP)
    assert all(equal(ours, theirs) for ours, theirs in zip(found, law, strict=True))


@pytest.mark.trust("law", "straight-through gradients that no sum rounds")
@many(150)
@given(
    m=st.one_of(cheap, tables),
    batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    sides=st.tuples(*[st.sampled_from([1, 2, 23])] * 3),
    seed=seeds,
    layout=st.tuples(layouts, layouts),
)
def test_straight_through_gradients_of_two_activations(m, batch, sides, seed, layout):
    rows, fan_in, columns = sides
    a = laid(on_a_grid((*batch, rows, fan_in), seed, 140), layout[0]).mul(STEP)
    b = laid(on_a_grid((*batch, fan_in, columns), seed + 1, 140), layout[1]).mul(UNIT)
    layer, grad = layer_of(layers.Matmul(), m, [STEP, UNIT]), on_a_grid((*batch, rows, columns), seed + 2, 3)
    found = gradients_of(layer, grad, a, b)
    seen = [t.detach().double().clamp(-127 * s, 127 * s) for t, s in ((a, STEP), (b, UNIT))]
    law = gradients_of(torch.matmul, grad.double(), *seen)
    for ours, theirs, t, s in zip(found, law, (a, b), (STEP, UNIT), strict=True):
        assert equal(ours, theirs * (t.detach().abs() <= 127.5 * s))


def finite_differences(layer, x, weight, grad):
    """How much sum(grad * y) changes if one activation, or one weight, moves by one code: two tensors."""
    changes = []
    for values, step in ((x, STEP), (weight, UNIT)):
        found = torch.zeros(values.numel(), dtype=torch.float64)
        flat = values.detach().view(-1)
        before = (layer(x) * grad).double().sum()
        for i in range(len(flat)):
            kept = flat[i].item()
            flat[i] = kept + step
            found[i] = ((layer(x) * grad).double().sum() - before) / step
            flat[i] = kept
        changes.append(found.view(values.shape))
    return changes


@pytest.mark.trust("law", "smoothed gradients against finite differences of the layer")
@many(30)
@given(by=st.sampled_from("ab"), seed=seeds, linear=st.booleans(), stride=st.integers(1, 2), padding=st.integers(0, 1))
def test_smoothed_gradients(by, seed, linear, stride, padding):
    # M(a, b) = a f(b) + g(b): a straight line in a, so that a line fitted to nine products has the slope of two of
    # them. All outputs are integers times powers of two that float32 holds; the slopes come from a float SVD.
    draw = generator(seed)
    f, g = (torch.randint(-n, n + 1, (256,), generator=draw) for n in (20, 50))
    lines = torch.arange(-128, 128)[:, None] * f[None, :] + g[None, :]
    m = Multiplier("lines", lines if by == "a" else lines.T)
    exact = nn.Linear(5, 3, bias=False) if linear else nn.Conv2d(2, 3, 2, stride, padding, bias=False)
    exact.weight.data.copy_(weights_on_a_grid(exact.weight.shape, seed))
    layer = layer_of(exact, m, [STEP], gradient="smoothed").eval()
    x = on_a_grid((2, 5) if linear else (1, 2, 3, 3), seed, 100) * STEP
    grad = on_a_grid(layer(x).shape, seed + 1, 3)
    found = gradients_of(lambda x, w: layer(x), grad, x, exact.weight)
    with torch.no_grad():
        law = finite_differences(layer, x, exact.weight, grad)
    ours, theirs, unit = (found[0], law[0], UNIT) if by == "a" else (found[1], law[1], STEP)
    if by == "b":  # the largest weight makes the scale: moved, it would change all codes
        ours, theirs = (t.flatten(1)[:, 1:] for t in (ours, theirs))
    assert equal((ours / unit).round(), theirs / unit) and (ours - theirs).abs().max() < 0.1 * unit


@pytest.mark.trust("law", "gradients of mixtures and gates against finite differences")
@many(40)
@given(
    kind=st.sampled_from(["hard", "soft", "gate"]),
    gate=st.sampled_from(["linear", "mlp", "standardised"]),
    experts=st.integers(1, 4),
    seed=seeds,
)
def test_gradients_of_mixtures(kind, gate, experts, seed):
    torch.manual_seed(seed)
    chooser = moe.Gate(3, experts, kind=gate, per="token")
    members = [nn.Linear(3, 2) for _ in range(experts)]
    layer = {"hard": moe.HardMoE(members, chooser), "soft": moe.SoftMoE(members, chooser), "gate": chooser}[kind]
    layer = layer.double().eval()
    x, parameters = torch.randn(4, 3, dtype=torch.double), [p.detach().clone() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (x, *parameters)])


@pytest.mark.trust("law", "small convolutions of bfloat16 as matrix products, where no sum is rounded")
@many(120)
@given(
    n=few.filter(bool),
    channels=st.sampled_from([1, 2, 23, 28]),
    out=st.sampled_from([1, 2, 23]),
    size=st.tuples(*[st.integers(1, 5)] * 2),
    seed=seeds,
    layout=st.tuples(layouts, layouts),
)
def test_small_convolutions(n, channels, out, size, seed, layout):
    # -1, 0 and 1: nine times 28 products are at most 252, and bfloat16 holds integers up to 256.
    x, w = (
        laid(on_a_grid(shape, seed + i, 1).bfloat16(), how)
        for i, (shape, how) in enumerate(zip([(n, channels, *size), (out, channels, 3, 3)], layout, strict=True))
    )
    grad = on_a_grid((n, out, *size), seed + 2, 1).bfloat16()
    leaves = [plain(t).double().requires_grad_() for t in (x, w)]
    y = nn.functional.conv2d(*leaves, padding=1)
    law = [y, *torch.autograd.grad(y, leaves, grad.double())]
    found = [small.convolution(x, w), *small.gradients(grad, x, w, (True, True))]
    assert all(equal(ours.double(), theirs.detach()) for ours, theirs in zip(found, law, strict=True))

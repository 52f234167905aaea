"""A known change of the input changes the output in a known way: rules that need no second implementation.

Equal means in every bit. Other seeds of ``--hypothesis-seed`` draw other cases.
"""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import (
    EVOAPPROX,
    NAMED,
    cheap,
    codes,
    convolutions,
    convolved,
    equal,
    fills,
    floats,
    generator,
    laid,
    layer_of,
    layouts,
    length,
    machine,
    machines,
    many,
    multiplied,
    seeds,
    small_network,
    table,
    tables,
)
from torch import nn
from torch.nn.functional import pad

from axmoe_lite import (
    EXACT,
    Multiplier,
    approximate,
    conv2d,
    cost,
    layers,
    matmul,
    moe,
    multiplier,
    restore,
)
from axmoe_lite.multipliers import Mosaic
from axmoe_lite.pipeline import freeze

paths = st.sampled_from(["auto", "factored", "lookup"])


@st.composite
def images(draw, least=0):
    """x, weight and options of a convolution, laid out anyhow."""
    (shape, kernel, options), seed = draw(convolutions(least=least)), draw(seeds)
    x, w = codes(shape, draw(fills), seed), codes(kernel, draw(fills), seed + 1)
    return laid(x, draw(layouts)), laid(w, draw(layouts)), options


@st.composite
def matrices(draw):
    (rows, fan_in, columns), seed = draw(st.tuples(length, length, length)), draw(seeds)
    return laid(codes((rows, fan_in), draw(fills), seed), draw(layouts)), codes(
        (fan_in, columns), draw(fills), seed + 1
    )


# ------------------------------------------------------------------------------------- sums of products


@pytest.mark.trust("rule", "channels in another order, each with its weights: the same sums")
@many(200)
@given(m=tables, case=images(), pair=matrices(), path=paths, seed=seeds)
def test_channels_in_another_order(m, case, pair, path, seed):
    (x, w, options), (a, b) = case, pair
    order = torch.randperm(w.shape[1], generator=generator(seed))
    grouped = x.unflatten(1, (options["groups"], -1))[:, :, order].flatten(1, 2) if x.shape[1] else x
    assert equal(convolved(grouped, w[:, order], m, path, **options), convolved(x, w, m, path, **options))
    order = torch.randperm(len(b), generator=generator(seed))
    assert equal(multiplied(a[:, order], b[order], m, path), multiplied(a, b, m, path))


@pytest.mark.trust("rule", "outputs and images in another order: the same results in that order")
@many(200)
@given(m=tables, case=images(), pair=matrices(), path=paths, seed=seeds)
def test_outputs_in_another_order(m, case, pair, path, seed):
    (x, w, options), (a, b), draw = case, pair, generator(seed)
    first, second = torch.randperm(len(x), generator=draw), torch.randperm(len(w), generator=draw)
    second = torch.arange(len(w)) if options["groups"] > 1 else second  # an output belongs to its group
    y = convolved(x, w, m, path, **options)
    assert equal(convolved(x[first], w[second], m, path, **options), y[first][:, second])
    first, second = (torch.randperm(n, generator=draw) for n in (len(a), b.shape[1]))
    assert equal(multiplied(a[first], b[:, second], m, path), multiplied(a, b, m, path)[first][:, second])


@pytest.mark.trust("rule", "a fan-in in two parts: their sums added")
@many(200)
@given(m=tables, case=images(), pair=matrices(), path=paths, where=st.floats(0, 1))
def test_a_fan_in_in_two_parts(m, case, pair, path, where):
    (x, w, options), (a, b) = case, pair
    cut = round(where * len(b))
    parts = [multiplied(a[:, part], b[part], m, path) for part in (slice(cut), slice(cut, None))]
    assert equal(parts[0] + parts[1], multiplied(a, b, m, path))
    groups, cut = options["groups"], round(where * w.shape[1])
    x = x.unflatten(1, (groups, w.shape[1]))
    parts = [
        convolved(x[:, :, part].flatten(1, 2), w[:, part], m, path, **options)
        for part in (slice(cut), slice(cut, None))
    ]
    assert equal(parts[0] + parts[1], convolved(x.flatten(1, 2), w, m, path, **options))


@pytest.mark.trust("rule", "operands exchanged: the transposed table")
@many(150)
@given(m=tables, pair=matrices(), path=paths)
def test_operands_exchanged(m, pair, path):
    a, b = pair
    y = multiplied(a, b, m, path)
    assert equal(multiplied(b.T, a.T, exchanged(m), path), y.T)
    if torch.equal(m.table, m.table.T):
        assert equal(multiplied(b.T, a.T, m, path), y.T)


swaps = {}


def exchanged(m):
    """Kept, because factors are kept by multiplier."""
    return swaps.setdefault(m, m.swapped())


@pytest.mark.trust("rule", "operands exchanged: the transposed table")
@pytest.mark.parametrize("name", NAMED)
def test_only_a_multiplier_that_commutes_does_not_care_for_the_order(name):
    m, operands = table(name), torch.arange(-128, 128).to(torch.int8)
    one, other = (
        matmul(operands[:, None], operands[None, :], m),
        matmul(operands[:, None], operands[None, :], exchanged(m)),
    )
    assert torch.equal(one, other) == torch.equal(m.table, m.table.T) and torch.equal(one, other.T)


def test_some_of_the_thirteen_commute_and_some_do_not():
    # Those that drop as many rows as columns of the array are symmetric: the exact one at least, and L2J, which
    # clears the lowest bit of both; KXF's table differs from its mirror.
    commute = {name for name in EVOAPPROX if torch.equal(table(name).table, table(name).table.T)}
    assert {EXACT, "mul8s_1L2J"} <= commute and "mul8s_1KXF" not in commute


@pytest.mark.trust("rule", "two tables added: their sums added")
@many(150)
@given(two=st.tuples(tables, tables), case=images(), path=paths)
def test_tables_added(two, case, path):
    x, w, options = case
    one, other = (convolved(x, w, m, path, **options) for m in two)
    both = Multiplier("both", two[0].table + two[1].table)  # whose factors take a while to find
    assert equal(conv2d(x, w, both, path="lookup", **options), one + other)


@pytest.mark.trust("rule", "a 1 x 1 convolution: a matrix product of the pixels")
@many(200)
@given(m=tables, case=images(), path=paths)
def test_a_convolution_of_single_cells(m, case, path):
    x, w, _ = case
    x, w = x[:, : w.shape[1]], w[:, :, :1, :1]
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    y = convolved(x, w, m, path).permute(0, 2, 3, 1).flatten(0, 2) if 0 not in x.shape[2:] else None
    assert y is None or equal(multiplied(rows, w[:, :, 0, 0].T, m, path), y)


@pytest.mark.trust("rule", "a border of code 0 made by hand: padding")
@many(250)
@given(m=tables, case=images(), path=paths)
def test_a_border_by_hand(m, case, path):
    x, w, options = case
    high, wide = options["padding"]
    around = pad(x, (wide, wide, high, high))
    bare = convolved(around, w, m, path, **options | {"padding": (0, 0)})
    assert equal(bare, convolved(x, w, m, path, **options))


@pytest.mark.trust("rule", "groups: convolutions of their own, side by side")
@many(150)
@given(m=tables, case=images(least=1), path=paths)
def test_groups_apart(m, case, path):
    x, w, options = case
    groups = options["groups"]
    apart = [
        convolved(part, weight, m, path, **options | {"groups": 1})
        for part, weight in zip(x.chunk(groups, 1), w.chunk(groups), strict=True)
    ]
    assert equal(torch.cat(apart, 1), convolved(x, w, m, path, **options))


@pytest.mark.trust("rule", "image and kernel mirrored or turned: the result too")
@many(150)
@given(m=tables, case=images(), path=paths)
def test_mirrored_and_turned(m, case, path):
    x, w, options = case
    options = options | {"stride": (1, 1)}  # a wider stride may leave out another row at the other end
    y = convolved(x, w, m, path, **options)
    assert equal(convolved(x.flip(2), w.flip(2), m, path, **options), y.flip(2))
    assert equal(convolved(x.flip(3), w.flip(3), m, path, **options), y.flip(3))
    options = {name: value[::-1] if isinstance(value, tuple) else value for name, value in options.items()}
    assert equal(convolved(x.mT, w.mT, m, path, **options), y.mT)


MIXED = ("mul8s_1KV6", "mul8s_1L2L", "swap:mul8s_1KXF")


@pytest.mark.trust("rule", "filters in another order, each with its multiplier: the same results in that order")
@many(150)
@given(case=images(least=1), path=paths, seed=seeds)
def test_filters_in_another_order(case, path, seed):
    x, w, options = case
    options, x, w = options | {"groups": 1}, x[:, : w.shape[1]], w.clamp_min(-127)
    places = torch.randint(0, 3, (len(w), 1, 1, 1), generator=generator(seed))
    order = torch.randperm(len(w), generator=generator(seed + 1))
    known = tuple(map(multiplier, MIXED))
    y = convolved(x, w, Mosaic("one", known, places), path, **options)
    assert equal(convolved(x, w[order], Mosaic("other", known, places[order]), path, **options), y[:, order])
    apart = [convolved(x, w[o : o + 1], known[place], path, **options) for o, place in enumerate(places.flatten())]
    assert equal(torch.cat(apart, 1), y)


# ------------------------------------------------------------------------------------- layers and networks


@pytest.mark.trust("rule", "a batch in two parts: the same rows")
@many(150)
@given(m=tables, case=images(least=1), where=st.floats(0, 1), seed=seeds, on=machines, linear=st.booleans())
def test_a_batch_in_two_parts(m, case, where, seed, on, linear):
    x, w, options = case
    torch.manual_seed(seed)
    exact = (
        nn.Linear(x.shape[-1], 3) if linear and x.shape[-1] else nn.Conv2d(x.shape[1], len(w), w.shape[2:], **options)
    )
    layer, x, cut = layer_of(exact, m), floats(x.shape, seed, torch.float32) * 0.37, round(where * len(x))
    with machine(*on), torch.no_grad():
        y = layer(x)
        assert equal(torch.cat([layer(x[:cut]), layer(x[cut:])]), y)
        one = layer(x[:1].abs())  # alone without signs, beside others with signs: another zero point
        assert not len(x) or equal(one, layer(torch.cat([x[:1].abs(), -x.abs()]))[:1])


@pytest.mark.trust("rule", "activations and their scale times a power of two: results times the same")
@many(100)
@given(m=st.one_of(cheap, tables), case=images(least=1), power=st.integers(-12, 12), seed=seeds, on=machines)
def test_scaled_activations(m, case, power, seed, on):
    x, w, options = case
    torch.manual_seed(seed)
    exact, x = nn.Conv2d(x.shape[1], len(w), w.shape[2:], bias=False, **options), floats(x.shape, seed, torch.float32)
    with machine(*on), torch.no_grad():
        one, other = layer_of(exact, m)(x), layer_of(exact, m, torch.tensor(0.37) * 2.0**power)(x * 2.0**power)
    assert equal(one * 2.0**power, other)


@pytest.mark.trust("rule", "approximated and restored: the network in every bit")
@many(50)
@given(names=st.lists(st.sampled_from(NAMED), min_size=4, max_size=4), seed=seeds, again=st.booleans())
def test_approximated_and_restored(names, seed, again):
    network, x = small_network(seed)
    modules, state, before = list(network.modules()), copy.deepcopy(network.state_dict()), network(x)
    assignment = dict(zip(("0", "3", "6", "8"), names, strict=True))
    for chosen in (assignment, {"3": names[0]})[: 1 + again]:
        assert layers.assignment_of(approximate(network, chosen, calibration=x)) == chosen
        network(x)
    freeze(network)(x)
    restore(network)
    assert list(network.modules()) == modules and list(network.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert equal(network(x), before)


@pytest.mark.trust("rule", "the exact circuit everywhere: the quantised network")
@many(60)
@given(seed=seeds, per_channel=st.booleans(), on=machines)
def test_exact_products_everywhere(seed, per_channel, on):
    network, x = small_network(seed, norm=False)
    with machine(*on), torch.no_grad():
        approximate(network, dict.fromkeys(("0", "3", "6", "8"), EXACT), calibration=x, per_channel=per_channel)
        y, frozen = network(x), freeze(network)(x)
        for layer in network:
            if isinstance(layer, layers.modules.Approximate):
                x = ordinary(layer, x)
            else:
                x = layer(x)
    assert equal(y, x) and equal(frozen, x)


def ordinary(layer, x):
    """The layer by torch's own products, of codes in float64, which holds their sums."""
    size = layer.weight.abs().flatten(1).amax(1)
    scale = (size if layer.per_channel else size.max().expand(len(size))) / 127
    shape = (-1, *[1] * (layer.weight.ndim - 1))
    seen = (x * (1.0 / layer.scale_x)).round().clamp(-127, 127).double()
    weight = (layer.weight * (1.0 / scale).view(shape)).round().clamp(-127, 127).double()
    if isinstance(layer, layers.ApproxLinear):
        return (seen @ weight.T).float() * (layer.scale_x * scale) + layer.bias
    sums = nn.functional.conv2d(seen, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).float()
    return sums * (layer.scale_x * scale).view(-1, 1, 1) + layer.bias.view(-1, 1, 1)


# ------------------------------------------------------------------------------------- mixtures


def mixture_of(experts, seed, names):
    """A Hard mixture of approximate convolutions whose gate is decided, and images."""
    torch.manual_seed(seed)
    layer = moe.HardMoE([nn.Conv2d(3, 2, 3) for _ in range(experts)], moe.Gate(3, experts)).eval()
    layer.weighting = "straight-through"
    nn.init.normal_(layer.gate.score.weight, std=9)
    with moe.no_idle_experts(layer), torch.no_grad():
        approximate(layer, {f"experts.{e}": names[e] for e in range(experts)}, calibration=torch.randn(8, 3, 5, 4))
    return layer, torch.randn(8, 3, 5, 4)


def assert_scaled(layer, x, answers):
    """The mixture gives these answers, in every bit, and where it scales them, these times the gate's probabilities.

    The probabilities themselves may differ in their last bit: a softmax over more, or other, numbers adds them up in
    another order.
    """
    assert equal(layer(x), answers)
    layer.weighting = "probability"
    assert equal(layer(x), answers * layer.gate(x).amax(1).view(-1, 1, 1, 1))


circuits = st.lists(st.sampled_from(EVOAPPROX), min_size=6, max_size=6)


@pytest.mark.trust("rule", "an expert more that is never chosen: the same answers")
@many(80)
@given(experts=st.integers(1, 5), seed=seeds, names=circuits)
def test_an_expert_that_is_never_chosen(experts, seed, names):
    layer, x = mixture_of(experts, seed, names)
    score, before = layer.gate.score, layer(x)
    layer.experts.append(copy.deepcopy(layer.experts[0]))
    layer.gate.score = nn.Linear(3, experts + 1)
    with torch.no_grad():
        layer.gate.score.weight.zero_()[:experts] = score.weight
        layer.gate.score.bias.fill_(-torch.inf)[:experts] = score.bias
    assert_scaled(layer, x, before)


@pytest.mark.trust("rule", "experts in another order, with the gate's rows: the same answers")
@many(80)
@given(experts=st.integers(1, 6), seed=seeds, names=circuits)
def test_experts_in_another_order(experts, seed, names):
    layer, x = mixture_of(experts, seed, names)
    before, order = layer(x), torch.randperm(experts, generator=generator(seed))
    layer.experts = nn.ModuleList([layer.experts[e] for e in order])
    with torch.no_grad():
        for values in layer.gate.score.parameters():
            values.copy_(values[order])
    assert_scaled(layer, x, before)


# ------------------------------------------------------------------------------------- cost


@st.composite
def bills(draw):
    """What a network multiplies, layer by layer, and an assignment of some of the layers."""
    sizes = draw(st.lists(st.integers(1, 10**9), min_size=1, max_size=8))
    macs = cost.Macs({f"layer{i}": cost.LayerMacs("conv", n, n) for i, n in enumerate(sizes)}, 1, 1)
    named = draw(st.lists(st.sampled_from(list(macs.layers)), unique=True))
    return macs, {name: table(draw(st.sampled_from(EVOAPPROX))) for name in named}


def about(number):
    """Sums of a few floats in another order."""
    return pytest.approx(number, rel=1e-12)


@pytest.mark.trust("rule", "the price of exact products, of more power, of other names")
@many(300)
@given(bill=bills(), factor=st.floats(0, 100), seed=seeds)
def test_prices(bill, factor, seed):
    macs, chosen = bill
    paid, exact = cost.price(macs, chosen), table(EXACT)
    assert cost.price(macs, {}).p_norm == about(1) and cost.price(macs, dict.fromkeys(chosen, EXACT)).p_norm == about(1)
    rest = sum(layer.executed for name, layer in macs.layers.items() if name not in chosen) / macs.executed
    dearer = {name: dataclasses.replace(m, power_mw=factor * m.power_mw) for name, m in chosen.items()}
    scaled = cost.price(macs, dearer).p_norm
    assert scaled == pytest.approx(rest + factor * (paid.p_norm - rest), rel=1e-9, abs=1e-9)
    assert cost.price(macs, dict(reversed(chosen.items()))) == paid
    assert cost.price(macs, chosen, base=2 * macs.executed).p_norm == paid.p_norm / 2
    order = torch.randperm(len(macs.layers), generator=generator(seed)).tolist()
    other = dict(zip(macs.layers, (f"other{i}" for i in order), strict=True))
    moved = dataclasses.replace(macs, layers=dict(sorted((other[name], layer) for name, layer in macs.layers.items())))
    again = cost.price(moved, {other[name]: m for name, m in chosen.items()})
    for field in dataclasses.fields(paid):
        assert getattr(again, field.name) == about(getattr(paid, field.name)), field.name
    exactly = {**chosen, **{name: exact for name in macs.layers if name not in chosen}}
    assert cost.price(macs, exactly).p_norm == paid.p_norm and cost.price(macs, exactly).approximated_share == about(1)

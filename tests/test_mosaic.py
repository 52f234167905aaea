"""Several multipliers inside one layer: the law place by place, few terms, one price, names that say it all."""

import copy

import pytest
import torch
from torch import nn

from axmoe_lite import EVOAPPROX, approximate, cost, errors, kernels, models, multiplier
from axmoe_lite.factors import Factors, compact, factorise, rank_lower_bound
from axmoe_lite.kernels import factored
from axmoe_lite.layers import assignment_of, default_layers, restore
from axmoe_lite.multipliers import EXACT, Mosaic, mosaic_name
from axmoe_lite.pipeline import freeze

evidence = pytest.mark.trust("law", "mosaics: chosen mixtures, place by place")

MIXED = {
    "masks by filter": "filter[mul8s_1KV6, 2 mul8s_1L2L, mul8s_1KVA]",
    "Booth digits by channel": "channel[roup(0,2), 3 roup(1,4), 2 mul8s_1KV6]",
    "rounded by column": "column[mul8s_1KV6, pr(0,2), pr(1,4)]",
    "a table that is looked up, by row": "row[drum(4), mul8s_1KV6, mitchell()]",
    "by filter and channel": "filter*4+channel*6[5 mul8s_1KV6, 9 mul8s_1KVA, 10 mul8s_1L12]",
    "nothing where weights are small": "row[within(-30,30,500), outside(-30,30,500), mul8s_1KV6]",
    "every other channel negated": "signs:mul8s_1L2J",
    "repeating": "filter[mul8s_1KVM, 2 mul8s_1L2L, ...]",
}


def codes(*shape, seed=0):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def law(x, weight, mosaic, stride, padding):
    """One product after the other, each by its own multiplier's table: [N, O, OH, OW]."""
    x = nn.functional.pad(x, (padding,) * 4).long()
    high, wide = ((x.shape[2 + i] - weight.shape[2 + i]) // stride + 1 for i in (0, 1))
    places = mosaic.places
    if mosaic.repeats:  # more often than any layer is long, and cut off
        places = places.repeat(*(1 if n == 1 else 9 for n in places.shape))[tuple(map(slice, weight.shape))]
    places = places.expand(weight.shape)
    sums = torch.zeros(len(x), len(weight), high, wide, dtype=torch.int32)
    for o, c, i, j in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape)).tolist():
        table = mosaic.multipliers[places[o, c, i, j]].table
        seen = x[:, c, i : i + stride * high : stride, j : j + stride * wide : stride]
        sums[:, o] += table[seen + 128, int(weight[o, c, i, j]) + 128]
    return sums


@evidence
@pytest.mark.parametrize("name", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("path", ["auto", "factored", "lookup", "reference"])
def test_every_path_is_the_law(name, path):
    mosaic, x, weight = multiplier(name), codes(2, 6, 7, 5), codes(4, 6, 3, 3, seed=1)
    found = kernels.conv2d(x, weight, mosaic, stride=2, padding=1, path=path)
    assert torch.equal(found, law(x, weight, mosaic, 2, 1))


@evidence
@pytest.mark.parametrize("path", ["auto", "factored", "lookup", "reference"])
def test_a_matrix_has_filters_and_channels(path):
    a, b = codes(3, 6), codes(6, 4, seed=1)
    for name in ("filter[drum(4), 2 mul8s_1KV6, roba()]", MIXED["Booth digits by channel"]):
        found = kernels.matmul(a, b, multiplier(name), path=path)
        image, weight = a[:, :, None, None], b.T[:, :, None, None]
        assert torch.equal(found, law(image, weight, multiplier(name), 1, 0)[:, :, 0, 0])


def test_other_signs_are_the_same_circuit_between_two_changes_of_sign():
    x, weight = codes(2, 7, 6, 5), codes(4, 7, 3, 3, seed=1)
    signs = torch.tensor([1, -1, 1, -1, 1, -1, 1], dtype=torch.int8).view(-1, 1, 1)
    for name in ("mul8s_1L2J", "mul8s_1KVA", EXACT):
        found = kernels.conv2d(x, weight, multiplier(f"signs:{name}"), padding=1)
        assert torch.equal(found, kernels.conv2d(x * signs, weight * signs, multiplier(name), padding=1))
        assert torch.equal(found, kernels.conv2d(x, weight, multiplier(name), padding=1)) == (name == EXACT)
        linear = kernels.matmul(x[0, :, 0].T, weight[:, :, 0, 0].T, multiplier(f"signs:{name}"))
        turned = signs[:, 0] * torch.ones(1, 5, dtype=torch.int8), signs[:, 0] * weight[:, :, 0, 0].T
        assert torch.equal(linear, kernels.matmul((x[0, :, 0] * turned[0]).T, turned[1], multiplier(name)))


def test_what_repeats_fits_any_layer():
    mosaic = multiplier("channel[mul8s_1L2L, 2 mul8s_1KV6, ...]")
    for shape, expected in (((2, 5, 3, 3), [1, 0, 0, 1, 0]), ((2, 1, 1, 1), [1]), ((4, 4), [1, 0, 0, 1])):
        weight = torch.zeros(shape, dtype=torch.int8)
        mosaic.check_fits("any", shape)
        assert mosaic.places_of(weight).flatten().tolist() == expected
        assert torch.equal(mosaic.columns(weight), (256 * mosaic.places_of(weight)).int().expand(shape))
    exact, cheap = (multiplier(name).power_mw for name in (EXACT, "mul8s_1L2L"))
    assert mosaic.power_mw == pytest.approx((cheap + 2 * exact) / 3)
    assert mosaic.digest != multiplier("channel[mul8s_1L2L, 2 mul8s_1KV6]").digest
    written_out = multiplier("channel[mul8s_1L2L, negated:mul8s_1L2L, ...]")
    assert written_out.digest == multiplier("signs:mul8s_1L2L").digest
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = approximate(models.resnet8(classes=3, width=0.25), "signs:mul8s_1L2L", calibration=x)
    assert set(assignment_of(network).values()) == {"signs:mul8s_1L2L"}


def test_multipliers_share_what_they_do_to_the_activation():
    # Alone the thirteen have 30 terms together. A term is a set of rows of the array that keep the same columns in
    # all thirteen, so there can be eight at most; rows 6 and 7 are never told apart.
    assert sum(factorise(multiplier(name)).rank for name in EVOAPPROX) == 30
    together = factorise(multiplier(mosaic_name(list(EVOAPPROX))))
    assert together.rank == 7 and together.masks is not None
    # roup(k, m) rounds activations at bits m, m - 2, ...: of these at 4, 2 and 0, so three terms.
    booth = multiplier("filter[roup(0,2), roup(0,4), roup(1,4), roup(2,4), mul8s_1KV6]")
    assert factorise(booth).rank == rank_lower_bound(booth.table) == 3


def test_an_activation_that_meets_one_multiplier_needs_its_terms_alone():
    names = ["mul8s_1KVA", "negated:mul8s_1KV9", "roup(0,4)", "drum(4)"]
    mosaic = multiplier(mosaic_name(names, by="channel"))
    apart = factorise(mosaic)
    ranks = [factorise(multiplier(name)).rank for name in names]
    assert apart.rank == max(ranks) == 5 < factorise(multiplier(mosaic_name(names))).rank
    assert apart.by_channel and apart.u.shape == apart.v.shape == (5, 4 * 256)
    for place, one in enumerate(mosaic.multipliers):
        block = slice(256 * place, 256 * (place + 1))
        assert torch.equal(apart.u[:, block].T @ apart.v[:, block], one.table.long())
    for name in EVOAPPROX:  # on int8 units, too: a lattice's factors need not be bytes
        turned = factored.factors_of(multiplier(f"signs:{name}"), channels=4)
        assert turned.rank == factorise(multiplier(name)).rank and turned.bytewise, name
        assert turned.places is None if turned.masks else turned.places.tolist() == [0, 1, 0, 1]
    masks = factorise(multiplier(mosaic_name(list(EVOAPPROX), by="channel")))  # quicker to apply than tables
    assert masks.rank == 7 and masks.masks is not None and not masks.by_channel


@evidence
@pytest.mark.parametrize("units", ["1", "0"])
def test_a_fan_in_cut_into_pieces_keeps_its_channels(units, monkeypatch):
    monkeypatch.setenv("AXMOE_INT8", units)
    for name in ("signs:mul8s_1KVA", "channel[5 drum(4), 3 mul8s_1KV6, 4 mitchell(), ...]", "signs:drum(4)"):
        mosaic, a, b = multiplier(name), codes(2, 3000), codes(3000, 3, seed=1)
        found = kernels.matmul(a, b, mosaic, path="factored")
        assert torch.equal(found, kernels.matmul(a, b, mosaic, path="reference")), name
        x, weight = codes(1, 700, 4, 3), codes(2, 350, 3, 3, seed=1)
        found = kernels.conv2d(x, weight, mosaic, groups=2, path="factored")
        assert torch.equal(found, kernels.conv2d(x, weight, mosaic, groups=2, path="reference")), name


def test_places_do_not_change_the_factors():
    one, other = (multiplier(f"filter[{n} mul8s_1KV6, {9 - n} mul8s_1L2L]") for n in (1, 5))
    assert factorise(one) is factorise(other)


@pytest.mark.parametrize(
    "name,rank,shift",
    [
        ("pr(1,4)", 1, 6),
        ("roup(0,4)", 3, 4),
        ("roup(0,1)", 2, 1),
        ("filter[mul8s_1KV6, pr(0,2)]", 3, 0),
        ("roba()", 2, 0),
    ],
)
def test_compact_factors_are_bytes(name, rank, shift):
    # pr(1,4) = 16 round(a / 16) * 4 round(b / 4): 64 in common. Beside the exact product nothing is in common, and
    # round(a, 4) b = 2 round(a / 4) (b + b), twice a byte, since 4 round(a / 4) reaches 128.
    circuit = multiplier(name)
    small = compact(factorise(circuit))
    assert (small.rank, small.shift) == (rank, shift)
    assert torch.equal(small.u.T @ small.v << small.shift, circuit.table.long())
    if name != "roba()":
        assert factored.units(small, 64, torch.device("cpu")) == factored.int8.available()
        assert all(int(row.min()) >= -128 and int(row.max()) <= 127 for row in (*small.u, *small.v))


def test_what_does_not_pay_stays_as_it_is():
    for name in ("drum(4)", "mul8s_1KVA", "mitchell()"):
        assert compact(factorise(multiplier(name))) is factorise(multiplier(name))
    wide = Factors(torch.full((1, 256), 1), torch.full((1, 256), 1 << 40), None)
    assert compact(wide).u.max() <= 127  # powers of two are no size at all
    assert compact(Factors(wide.u, wide.v + 1, None)).v.max() > 127


@evidence
def test_a_layer_by_the_law(monkeypatch):
    layer = nn.Conv2d(6, 4, 3, padding=1)
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    for name in MIXED.values():
        net = approximate(nn.Sequential(copy.deepcopy(layer)), {"0": name}, calibration=x)
        scale_x, scale_w = net[0].scale_x, net[0].weight.detach().abs().max() / 127
        weight = (net[0].weight.detach() * (1 / scale_w)).round().to(torch.int8)
        images = (x * (1 / scale_x)).round().clamp(-127, 127).to(torch.int8)
        sums = law(images, weight, multiplier(name), 1, 1)
        expected = sums.float() * (scale_x * scale_w) + net[0].bias.view(-1, 1, 1)
        assert torch.equal(net(x), expected)
        assert assignment_of(net) == {"0": name}


def test_one_multiplier_everywhere_is_no_mosaic():
    assert mosaic_name(["mul8s_1L2J"] * 5) == "mul8s_1L2J"
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Conv2d(6, 4, 3))
    plain = approximate(copy.deepcopy(net), {"0": "mul8s_1L2J"}, calibration=x)
    same = Mosaic("all the same", (multiplier("mul8s_1L2J"),), torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    assert torch.equal(plain(x), approximate(net, {"0": same}, calibration=x)(x))


def test_a_network_frozen_and_learning():
    network = models.resnet8(classes=3, width=0.25)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assignment = dict.fromkeys(default_layers(network), "row[pr(0,2), roup(1,4), pr(0,2)]")
    short = [name for name in default_layers(network) if network.get_submodule(name).kernel_size == (1, 1)]
    assignment |= dict.fromkeys(short, "signs:mul8s_1L2J")
    assignment["conv1"] = ["mul8s_1KV6"] * (len(network.conv1.weight) - 1) + ["mul8s_1L2L"]
    approximate(network.eval(), assignment, calibration=x)
    frozen = freeze(network)
    assert "conv1" not in frozen.eager
    assert torch.equal(frozen(x), frozen.law(x))
    network.train()(x).sum().backward()  # straight-through: as if the products were exact
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert not any("filter" in name for name in assignment_of(restore(network)).values())


def test_the_price_is_that_of_the_places():
    exact, cheap = (multiplier(name).power_mw for name in (EXACT, "mul8s_1L2L"))
    mosaic = multiplier("filter[mul8s_1KV6, 3 mul8s_1L2L]")
    assert mosaic.power_mw == pytest.approx((exact + 3 * cheap) / 4)
    assert mosaic.delay_ns == max(multiplier(EXACT).delay_ns, multiplier("mul8s_1L2L").delay_ns)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1))
    macs = cost.count(net, torch.zeros(1, 2, 6, 6))  # 4 x 4 pixels: 1152 and 256 products
    paid = cost.price(macs, {"0": [EXACT] + ["mul8s_1L2L"] * 3})
    assert paid.p_norm == pytest.approx((1152 * (exact + 3 * cheap) / 4 / exact + 256) / 1408)


A, B = "drum(3)", "pr(0,1)"


@pytest.mark.parametrize(
    "names,by,shape",
    [
        ([A, B, B], "row", (1, 1, 3, 1)),
        ([[A, B, B], [B, B, A]], "filter+column", (2, 1, 1, 3)),
        ([[[A], [B]], [[B], [A]]], "filter+channel+row", (2, 2, 1, 1)),
    ],
)
def test_names_go_there_and_back(names, by, shape):
    mosaic = multiplier(mosaic_name(names, by=by))
    assert tuple(mosaic.places.shape) == shape
    flat = [mosaic.multipliers[place].name for place in mosaic.places.flatten().tolist()]
    assert flat == torch.utils._pytree.tree_leaves(names)


def test_digests_tell_products_apart():
    one, other = multiplier("filter[mul8s_1KV6, mul8s_1L2L]"), multiplier("filter[mul8s_1L2L, mul8s_1KV6]")
    assert one.digest != other.digest
    assert one.digest == multiplier("filter[broken_array(0,0,0), mul8s_1L2L]").digest  # the same table
    assert one.digest != multiplier("channel[mul8s_1KV6, mul8s_1L2L]").digest


def test_errors_say_what_to_do():
    net = nn.Sequential(nn.Conv2d(2, 4, 3))
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"'0' has a weight of \[4, 2, 3, 3\], so 4 filters; .* names 3"):
        approximate(net, {"0": "filter[2 mul8s_1KV6, mul8s_1L2L]"}, calibration=x)
    with pytest.raises(ValueError, match="one table a layer"):
        approximate(net, {"0": "row[2 mul8s_1KV6, mul8s_1L2L]"}, calibration=x, gradient="smoothed")
    with pytest.raises(ValueError, match="axes are filter, channel, row, column"):
        multiplier("row+filter[mul8s_1KV6]")
    with pytest.raises(ValueError, match="no count and name"):
        multiplier("filter[2x mul8s_1KV6]")
    with pytest.raises(ValueError, match="names 3 places; its axes have 2 x 2"):
        multiplier("filter*2+row*2[3 mul8s_1KV6]")
    with pytest.raises(ValueError, match="Did you mean 'mul8s_1L2N'"):
        multiplier("filter[mul8s_1KV6, mul8s_1L2K]")
    with pytest.raises(ValueError, match="write it before each name"):
        multiplier("swap:filter[mul8s_1KV6, mul8s_1L2L]")
    with pytest.raises(ValueError, match="has the mosaic 'signs:mul8s_1L2L' inside"):
        multiplier("channel[mul8s_1KV6, signs:mul8s_1L2L]")
    with pytest.raises(ValueError, match="write it before each name"):
        multiplier("swap:signs:mul8s_1L2L")
    with pytest.raises(ValueError, match="repeats along 2 axes; one can"):
        multiplier("filter*2+row*2[3 mul8s_1KV6, mul8s_1L2L, ...]")
    with pytest.raises(ValueError, match=r"'\.\.\.' in .* is no count and name|No multiplier is called '\.\.\.'"):
        multiplier("channel[...]")
    with pytest.raises(ValueError, match="'signs:mul8s_1L2L' is a mosaic of 2 .* such as 'mul8s_1L2L'"):
        errors(multiplier("signs:mul8s_1L2L"))
    with pytest.raises(ValueError, match="equal length"):
        mosaic_name([["a", "b"], ["a"]], by="filter+channel")
    with pytest.raises(ValueError, match="one name for each place"):
        mosaic_name([["a", "b"]], by="filter")
    with pytest.raises(ValueError, match="must not be above"):
        multiplier("within(5,-5,100)")
    x = torch.full((1, 1, 1, 1), 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="weights of -128"):
        kernels.conv2d(
            x, torch.full((2, 1, 1, 1), -128, dtype=torch.int8), multiplier("filter[roba(), mitchell()]"), path="lookup"
        )

"""Multiply-accumulates by hand, under routing, and as published; prices by hand and as published."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from axmoe_lite import EXACT, approximate, layers, models, moe, multiplier
from axmoe_lite.cost import LayerMacs, Macs, count, p_norm, price
from axmoe_lite.layers import Matmul


class Calls(nn.Module):
    """A network of one module, called as the test says."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


def counted(module, x, **options):
    return {name: layer.executed for name, layer in count(module, x, **options).layers.items()}


# ------------------------------------------------------------------------------ layers by hand


@pytest.mark.parametrize(
    "conv,shape,macs",
    [
        # 7 x 5 pixels become (7 + 2 - 3) / 2 + 1 = 4 times (5 + 2 - 3) / 2 + 1 = 3: 12 places, 6 outputs, 4 inputs, 9.
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 5), 12 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 5), 12 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 3, 3), 4 * 9),
        (nn.Conv2d(1, 1, 1), (1, 1, 1), 1),
        (nn.Conv2d(2, 3, 3, dilation=2, bias=False), (2, 5, 6), 1 * 2 * 3 * 2 * 9),
        (nn.Conv1d(2, 3, 5), (2, 23), 19 * 3 * 2 * 5),
        # Each of 3 x 9 inputs meets 4 x 9 weights, whatever is cut off at the border.
        (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), (3, 3, 3), 3 * 9 * 4 * 9),
        (nn.Linear(5, 7), (5,), 35),
        (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 35),
        (nn.Linear(115, 1), (23, 115), 23 * 115),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 23])
def test_layers_by_hand(conv, shape, macs, n):
    found = count(nn.Sequential(conv, nn.ReLU()), torch.zeros(n, *shape))
    kind = "linear" if isinstance(conv, nn.Linear) else "conv"
    assert found.layers == {"0": LayerMacs(kind, macs, macs)}
    assert found.executed == found.static == macs and found.inputs == n
    assert found.parameters == sum(p.numel() for p in conv.parameters())


def test_products_of_activations_by_hand():
    network = Calls(Matmul(), lambda m, x: m(x, x.transpose(-2, -1)))
    x = torch.zeros(2, 3, 4, 5)  # 3 products of 4 x 5 x 4
    assert count(network, x).layers == {"module": LayerMacs("product", 240, 240)}
    assert count(network, x, attention=False).layers == {}
    named = Calls(Matmul(), lambda m, x: m(b=x.transpose(-2, -1), a=x))
    assert counted(named, x) == {"module": 240}


def test_layers_called_by_keyword_count_too():
    assert counted(Calls(nn.ConvTranspose2d(3, 4, 3), lambda m, x: m(input=x)), torch.zeros(1, 3, 3, 3)) == {
        "module": 27 * 36
    }
    attend = Calls(nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(query=x, key=x, value=x)[0])
    assert counted(attend, torch.zeros(2, 5, 8)) == {"module": 4 * 5 * 64 + 2 * 25 * 8}


@pytest.mark.parametrize("n", [1, 2, 23])
def test_multihead_attention_by_formula(n):
    # Self-attention of T = 5 tokens of D = 8: q, k, v and output are 4 T D^2 = 1280, the two products 2 T^2 D = 400.
    x = torch.zeros(n, 5, 8)
    first = Calls(nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0])
    turned = Calls(nn.MultiheadAttention(8, 2), lambda m, x: m(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1))
    for network in (first, turned):
        assert counted(network, x) == {"module": 1680}
        assert counted(network, x, attention=False) == {"module": 1280}
    # Across: q and the output of T = 5, k of S = 3 tokens of 6, v of 3 tokens of 4.
    across = Calls(
        nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
        lambda m, x: m(x, x[:, :3, :6], x[:, :3, :4])[0],
    )
    assert counted(across, x) == {"module": 2 * 5 * 64 + 3 * 6 * 8 + 3 * 4 * 8 + 2 * 5 * 3 * 8}


def test_visible_attention_equals_the_formula():
    tiny = models.ViT(dim=12, depth=1, heads=3, classes=5, image_size=8, patch=4)
    found, without = (counted(tiny, torch.zeros(2, 3, 8, 8), attention=flag) for flag in (True, False))
    assert set(found) - set(without) == {"blocks.0.attn.qk", "blocks.0.attn.av"}
    assert all(found[name] == macs for name, macs in without.items())
    inside = sum(macs for name, macs in found.items() if ".attn." in name)
    attention = Calls(nn.MultiheadAttention(12, 3, batch_first=True), lambda m, x: m(x, x, x)[0])
    assert inside == count(attention, torch.zeros(2, 5, 12)).executed == 4 * 5 * 144 + 2 * 25 * 12


def test_a_layer_used_twice_counts_twice_and_one_unused_does_not():
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    network.spare = nn.Linear(9, 9)
    network.forward = lambda x: shared(shared(x))
    assert counted(network, torch.zeros(2, 3)) == {"0": 18}
    assert count(network, torch.zeros(2, 3)).parameters == 12 + 90


# -------------------------------------------------------------------------------- as published


@pytest.mark.parametrize("make,millions", [("resnet20", 40.82), ("vgg11_bn", 153.34), ("vgg19_bn", 398.71)])
def test_cnns_cost_what_was_published(make, millions):
    network = getattr(models, make)(classes=100)
    macs = count(network, torch.zeros(1, 3, 32, 32))
    assert round(macs.executed / 1e6, 2) == millions
    # All but the classifier is approximate: 6,400 of 40.82 M; 575,488 of 153.34 M and of 398.71 M.
    for name, expected in (("mul8s_1L2L", 0.47), ("mul8s_1L2J", 0.71)):
        paid = price(macs, dict.fromkeys(layers.default_layers(network), name))
        exact = 6_400 if make == "resnet20" else 2 * 512**2 + 51_200
        assert round(paid.p_norm, 2) == expected
        assert paid.approximated_share == pytest.approx(1 - exact / macs.executed, abs=1e-9)


def test_vit_small_costs_nearly_what_was_published():
    # T = 197 tokens of D = 384. Blocks: 12 T (3 + 1 + 4 + 4) D^2 = 4,183,031,808. Patches: 196 x 768 x 384 =
    # 57,802,752. Classifier: 384,000. Together 4.241 G; the published 4.25 G are explained in models.vit_small.
    # Both products of attention: 12 x 2 T^2 D = 357,663,744.
    found = count(models.vit_small(classes=1000), torch.zeros(1, 3, 224, 224))
    kinds = dict.fromkeys(("conv", "linear", "product"), 0)
    for layer in found.layers.values():
        kinds[layer.kind] += layer.executed
    assert kinds == {"conv": 57_802_752, "linear": 4_183_031_808 + 384_000, "product": 357_663_744}
    assert kinds["conv"] + kinds["linear"] == 4_241_218_560 and found.executed == 4_598_882_304


# ------------------------------------------------------------------------------- under routing


def mlp(width):
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def gate():
    """Rows with a positive first number go to expert 1."""
    gate = moe.Gate(2, 2, per="token")
    with torch.no_grad():
        gate.score.weight.copy_(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        gate.score.bias.zero_()
    return gate


THREE_OF_FOUR = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])


@pytest.mark.parametrize("batch_size", [1, 3, 250])
def test_a_hard_mixture_costs_what_its_items_do(gate, batch_size):
    # Expert 0: 2 x 4 + 4 x 3 = 20. Expert 1, of double width: 40. The gate: 2 x 2 = 4.
    # Three of four go to expert 1: 1/4 20 + 3/4 40 + 4 = 39; if all computed: 20 + 40 + 4 = 64.
    found = count(moe.HardMoE([mlp(4), mlp(8)], gate), THREE_OF_FOUR, batch_size=batch_size)
    assert {name: (m.executed, m.static) for name, m in found.layers.items()} == {
        "experts.0.0": (2, 8), "experts.0.2": (3, 12), "experts.1.0": (12, 16), "experts.1.2": (18, 24),
        "gate.score": (4, 4),
    }  # fmt: skip
    assert (found.executed, found.static) == (39, 64)
    assert found.parameters == (12 + 15) + (24 + 27) + 6


def test_an_expert_that_nobody_needs_costs_nothing_but_is_there(gate):
    found = count(moe.HardMoE([mlp(4), mlp(8)], gate), THREE_OF_FOUR[:1])
    assert found.layers["experts.0.0"] == LayerMacs("linear", 0, 8) and (found.executed, found.static) == (44, 64)


def test_tokens_of_an_image_may_part(gate):
    # One image of four tokens: 1 x 20 + 3 x 40 + 4 x 4.
    found = count(moe.HardMoE([mlp(4), mlp(8)], gate), THREE_OF_FOUR[None])
    assert (found.executed, found.static) == (156, 4 * 64)


def test_a_soft_mixture_executes_everything(gate):
    found = count(moe.SoftMoE([mlp(4), mlp(8)], gate), THREE_OF_FOUR)
    assert found.executed == found.static == 64


def test_a_cluster_costs_its_gateway_too():
    gateway = nn.Linear(2, 2)
    with torch.no_grad():
        gateway.weight.copy_(torch.tensor([[0.0, 0.0], [9.0, 0.0]]))
        gateway.bias.zero_()
    found = count(moe.ClusterMoE([mlp(4), mlp(8)], gateway), THREE_OF_FOUR)
    assert (found.executed, found.static) == (39, 64) and found.layers["gateway"].executed == 4


def test_topologies_cost_what_their_layers_do():
    dense = models.resnet8(classes=4, width=0.25)
    x = torch.randn(23, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    base = count(dense, x)
    gates = 4 * sum(dense.get_submodule(n).in_channels for n in layers.default_layers(dense)[-4:])
    mixed = sum(base.layers[n].executed for n in layers.default_layers(dense)[-4:])
    hard, soft = (count(models.upcycle(dense, topology=t, experts=4), x) for t in ("hard", "soft"))
    assert hard.executed == pytest.approx(base.executed + gates)  # copies: it is the same wherever one goes
    assert hard.static == soft.static == soft.executed == base.executed + gates + 3 * mixed
    cluster = count(models.upcycle(dense, topology="cluster", experts=4, gateway=copy.deepcopy(dense)), x)
    assert cluster.executed == pytest.approx(2 * base.executed) and cluster.static == 5 * base.executed


# ------------------------------------------------------------------------ what counting leaves


def test_approximation_changes_no_count():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cnn = models.resnet8(classes=4, width=0.25, topology="hard", experts=2, r=0.3, noise=0.1)
    tiny = models.ViT(dim=12, depth=1, heads=3, classes=5, image_size=8, patch=4)
    for network, names in ((cnn, layers.default_layers(cnn)), (tiny, list(layers.approximable(tiny)))):
        before = {flag: count(network, x, attention=flag) for flag in (True, False)}
        with moe.no_idle_experts(network):
            approximate(network, dict.fromkeys(names, EXACT), calibration=x)
        assert sum(isinstance(m, layers.modules.Approximate) for m in network.modules()) == len(names)
        for flag, macs in before.items():
            found = count(network, x, attention=flag)
            assert (found.parameters, list(found.layers)) == (macs.parameters, list(macs.layers))
            assert [(m.kind, m.static) for m in found.layers.values()] == [
                (m.kind, m.static) for m in macs.layers.values()
            ]
            assert found.executed == macs.executed


class Fails(nn.Module):
    """Raises when it is called for the n-th time."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def forward(self, x):
        self.left -= 1
        if not self.left:
            raise KeyError("as planned")
        return x


@pytest.mark.parametrize("fails_at", [1, 2, 3])  # on what is executed; on what there is to be executed; never
def test_counting_leaves_no_trace(gate, fails_at):
    network = nn.Sequential(
        nn.Linear(2, 2), nn.BatchNorm1d(2), moe.HardMoE([mlp(4), mlp(8)], gate), Fails(fails_at)
    ).train()  # fmt: skip
    network[0].eval()
    state = copy.deepcopy(network.state_dict())
    if fails_at < 3:
        with pytest.raises(KeyError):
            count(network, THREE_OF_FOUR)
    else:
        assert count(network, THREE_OF_FOUR).executed > 0
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in network.modules())
    assert network.training and network[1].training and not network[0].training and network[2].also == ""
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert torch.is_grad_enabled()


def test_nothing_can_be_counted_on_nothing():
    with pytest.raises(ValueError, match="no inputs; the mean over them needs at least one"):
        count(nn.Linear(2, 2), torch.zeros(0, 2))


# -------------------------------------------------------------------------------------- prices


def test_published_costs_follow_from_equation_1():
    # Powers in mW: L2L 0.200, L2J 0.301, exact 0.425. 0.200 / 0.425 = 0.4706, 0.301 / 0.425 = 0.7082.
    assert round(p_norm(executed=1, base=1, share=1, power_mw=0.200), 2) == 0.47
    assert round(p_norm(executed=1, base=1, share=1, power_mw=0.301), 2) == 0.71
    # ViT: 0.973 x 0.4706 + 0.027 = 0.4849.
    assert round(p_norm(executed=4.25e9, base=4.25e9, share=0.973, power_mw=0.200), 3) == 0.485
    # ViT Cluster: a gateway of 4.14 G, exact, before it: 4.14 / 4.25 + 0.4849 = 1.459.
    both = 4.25e9 + 4.14e9
    assert round(p_norm(executed=both, base=4.25e9, share=0.973 * 4.25e9 / both, power_mw=0.200), 2) == 1.46


@pytest.fixture
def macs():
    found = {"a": ("conv", 100, 100), "b": ("linear", 50, 200), "c": ("product", 30, 30), "idle": ("conv", 0, 70)}
    return Macs({name: LayerMacs(*layer) for name, layer in found.items()}, parameters=7, inputs=4)


def test_a_mixed_assignment_by_hand(macs):
    # mW: L2L 0.200, 1KVA 0.391, exact 0.425; ns: 1.14, 1.51, 1.48.  Idle layers multiply nothing.
    assert macs.executed == 180 and macs.static == 400
    paid = price(macs, {"a": "mul8s_1L2L", "b": "mul8s_1KVA", "idle": "mul8s_1KXF"})
    assert paid.p_norm == pytest.approx((100 * 0.200 + 50 * 0.391 + 30 * 0.425) / (180 * 0.425))
    assert paid.approximated_share == pytest.approx(150 / 180)
    assert paid.energy_pj == pytest.approx(100 * 0.200 * 1.14 + 50 * 0.391 * 1.51 + 30 * 0.425 * 1.48)  # mW ns = pJ
    assert paid.delay_ns == 1.51
    assert paid.serial_ms == pytest.approx((100 * 1.14 + 50 * 1.51 + 30 * 1.48) / 1e6)  # a million ns


def test_equation_2_with_one_multiplier_is_equation_1(macs):
    for name, power in (("mul8s_1L2L", 0.200), ("mul8s_1L12", 0.052)):
        paid = price(macs, {"a": name, "c": name}, base=77)
        assert paid.p_norm == pytest.approx(p_norm(executed=180, base=77, share=130 / 180, power_mw=power))
        assert paid.approximated_share == pytest.approx(130 / 180)
    assert price(macs, dict.fromkeys("abc", "mul8s_1L2L")).p_norm == pytest.approx(0.200 / 0.425)


def test_nothing_approximate_costs_one(macs):
    paid = price(macs, {})
    assert paid.p_norm == pytest.approx(1) and paid.approximated_share == 0 and paid.delay_ns == 1.48
    # The exact circuit, assigned, costs as much but counts as assigned.
    assigned = price(macs, dict.fromkeys("abc", EXACT))
    assert assigned.p_norm == pytest.approx(1) and assigned.approximated_share == 1


def test_the_base_is_a_number_or_counted_too(macs):
    half = Macs({"a": LayerMacs("conv", 90, 90)}, parameters=1, inputs=1)
    for base in (half, 90, 90.0):
        assert price(macs, {}, base=base).p_norm == pytest.approx(2)
    assert price(macs, {}, base=macs).p_norm == pytest.approx(1)


def test_the_common_clock_waits_for_what_is_in_use(macs):
    fast = dict.fromkeys("abc", "mul8s_1L12")
    assert price(macs, fast).delay_ns == 0.89  # the idle layer's exact multiplier keeps nobody waiting
    assert price(macs, {**fast, "b": "mul8s_1KXF"}).delay_ns == 1.19


def test_without_a_published_delay_there_is_no_time_or_energy(macs):
    array = multiplier("broken_array(1,1,1)")
    assert array.delay_ns is None and array.power_mw
    paid = price(macs, {"a": array})
    assert (paid.energy_pj, paid.delay_ns, paid.serial_ms) == (None, None, None)
    assert paid.p_norm == pytest.approx((100 * array.power_mw + 80 * 0.425) / (180 * 0.425))
    assert price(macs, {"idle": array}).delay_ns == 1.48, "what is not in use need not be known"


def test_swapped_operands_cost_the_same(macs):
    assert price(macs, {"a": "swap:mul8s_1KVM"}) == price(macs, {"a": "mul8s_1KVM"})


def test_impossible_prices_are_refused(macs):
    with pytest.raises(
        ValueError, match="names 2 layers that were not counted, such as 'd'; the counted ones are a, b"
    ):
        price(macs, {"a": EXACT, "d": EXACT, "e": EXACT})
    with pytest.raises(ValueError, match="No multiplier is called 'mul8s_1L2'"):
        price(macs, {"a": "mul8s_1L2"})
    unknown = dataclasses.replace(multiplier(EXACT), name="mine", power_mw=None)
    with pytest.raises(ValueError, match=r"'b' multiplies by 'mine', whose power is not known.*power_mw=\.\.\."):
        price(macs, {"b": unknown})
    assert price(macs, {"b": dataclasses.replace(unknown, power_mw=0.425)}).p_norm == pytest.approx(1)
    for bad in (lambda: price(macs, {}, base=0), lambda: price(Macs({}, 0, 1), {})):
        with pytest.raises(ValueError, match="both must be positive"):
            bad()


@pytest.mark.parametrize("change", [{"share": 1.1}, {"share": -0.1}, {"base": 0}, {"executed": -1}])
def test_impossible_shares_are_refused(change):
    with pytest.raises(ValueError, match=r"a share lies in \[0, 1\], executed is not negative and base is positive"):
        p_norm(**{"executed": 1, "base": 1, "share": 0.5, "power_mw": 0.2, **change})

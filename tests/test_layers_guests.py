"""Approximate layers as guests in others' networks: hooks, other types, put-in weights, torch's short cuts."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from axmoe_lite import approximate, cost, freeze, layers, moe, restore, train
from axmoe_lite.layers.correction import correct_bias, input_of, layer_errors

L2L = "mul8s_1L2L"


@pytest.fixture
def x():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)]
    return nn.Sequential(*parts).eval()


# ----------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("how", ["load_state_dict", "assigned"])
@pytest.mark.parametrize("after", ["restore", "swap"])
def test_weights_that_were_put_in_stay(net, x, how, after):
    approximate(net, L2L, calibration=x)
    new = {name: value + 1 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    if how == "load_state_dict":
        net.load_state_dict(new, assign=True)
    else:
        net[0].weight, net[0].bias = nn.Parameter(new["0.weight"]), nn.Parameter(new["0.bias"])
    (restore(net) if after == "restore" else approximate(net, "mul8s_1KV6"))
    assert torch.equal(net[0].weight, new["0.weight"]) and torch.equal(net[0].bias, new["0.bias"])
    assert torch.equal(restore(net)[0].weight, new["0.weight"])


def test_a_corrected_bias_is_no_bias_that_was_put_in(net, x):
    before = net[0].bias.detach().clone()
    correct_bias(approximate(net, L2L, calibration=x), x)
    assert not torch.equal(net[0].bias, before)
    assert torch.equal(restore(net)[0].bias, before)
    copied = copy.deepcopy(approximate(net, L2L, calibration=x))
    correct_bias(copied, x)
    assert torch.equal(restore(copy.deepcopy(copied))[0].bias, before)


@pytest.mark.parametrize(
    "utility",
    [lambda m: prune.l1_unstructured(m, "weight", 0.5), nn.utils.spectral_norm],
    ids=["prune", "spectral_norm"],
)
def test_a_weight_that_is_made_at_each_call_is_refused(net, x, utility):
    utility(net[3])
    before = list(net.modules())
    with pytest.raises(ValueError, match=r"Layer '3' makes its weight anew.*prune\.remove"):
        approximate(net, L2L, calibration=x)
    assert list(net.modules()) == before
    approximate(net, {"0": L2L}, calibration=x)  # the others may
    if utility is not nn.utils.spectral_norm:
        prune.remove(net[3], "weight")
        assert layers.assignment_of(approximate(net, L2L, calibration=x)) == {"0": L2L, "3": L2L}


# ----------------------------------------------------------------------------------- hooks


def test_hooks_stay_where_they_were(net, x):
    seen = []
    handle = net[0].register_forward_hook(lambda layer, args, y: seen.append(type(layer).__name__))
    approximate(net, L2L, calibration=x)
    assert seen == ["ApproxConv2d"]  # once, while calibrating
    net(x)
    restore(net)(x)
    assert seen[1:] == ["ApproxConv2d", "Conv2d"]
    handle.remove()
    approximate(net, L2L, calibration=x)(x)
    assert len(seen) == 3


# ----------------------------------------------------------------------------------- mixtures


def test_idle_experts_are_calibrated_corrected_and_measured(x):
    gate = moe.Gate(3, 3)
    torch.nn.init.zeros_(gate.score.weight)
    gate.score.bias.data.copy_(torch.tensor([5.0, 0, 0]))  # all images to expert 0
    net = nn.Sequential(moe.HardMoE([nn.Conv2d(3, 4, 3) for _ in range(3)], gate)).eval()
    approximate(net, L2L, calibration=x)
    assert len(layers.assignment_of(net)) == 3
    assert {expert.scale_x.item() for expert in net[0].experts} == {net[0].experts[0].scale_x.item()}
    assert sorted(layer_errors(net, x)) == [f"0.experts.{e}" for e in range(3)]
    assert sorted(correct_bias(net, x)) == [f"0.experts.{e}" for e in range(3)]
    assert net[0].also == ""


# ----------------------------------------------------------------------------------- torch's own transformer


def encoder(layers_=1):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers_) if layers_ > 1 else layer


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_transformer_takes_no_short_cut_around_our_layers(depth, masked):
    net, tokens = encoder(depth).eval(), torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6)[None] >= torch.tensor([6, 4, 5, 3])[:, None] if masked else None
    exact = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that attention stays exact, and torch's own of nested tensors
        approximate(net, dict.fromkeys(layers.approximable(net), "mul8s_1L2N"), calibration=tokens)
    assert len(layers.assignment_of(net)) == 2 * depth
    learning = net(tokens, src_key_padding_mask=mask)
    with torch.no_grad():
        watched = net(tokens, src_key_padding_mask=mask)
        there = ~mask if masked else torch.ones(4, 6, dtype=bool)
        assert torch.allclose(watched[there], learning.detach()[there], atol=1e-5)
        assert (watched - exact(tokens))[there].abs().max() > 0.01
        assert torch.equal(restore(net)(tokens), exact(tokens))
    flags = [(m.__dict__.get("activation_relu_or_gelu"), m.__dict__.get("use_nested_tensor")) for m in net.modules()]
    assert flags == [
        (m.__dict__.get("activation_relu_or_gelu"), m.__dict__.get("use_nested_tensor")) for m in exact.modules()
    ]


# ----------------------------------------------------------------------------------- types and tools


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_in_another_type_stays_in_it(net, x, dtype):
    net, x = net.to(dtype), x.to(dtype)
    exact = net(x)
    y = approximate(net, "mul8s_1KV6", calibration=x)(x)
    assert y.dtype == dtype and (y - exact).abs().max() < 0.1 * exact.abs().max()
    net.train()(x).square().sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in net.parameters())


def test_products_of_activations_stay_in_their_type():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = layers.Matmul()

        def forward(self, a):
            return self.scores(a, a.mT)

    a = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    net = approximate(Attention(), {"scores": "mul8s_1KV6"}, calibration=a)
    assert net(a).dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", [False, True])
def test_a_trace_is_refused_and_does_not_crash(net, x, frozen):
    network = approximate(net, L2L, calibration=x)
    network = freeze(network) if frozen else network
    with pytest.raises(RuntimeError, match="addresses.*restore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of values that a trace would keep
        torch.jit.trace(network, x)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch looks at its own graph
def test_torch_compile_goes_around_our_layers(net, x):
    approximate(net, L2L, calibration=x)
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
    compiled.train()(x).square().sum().backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(x).square().sum().backward()
    for one, other in zip(found, (p.grad for p in net.parameters()), strict=True):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


def test_a_tensor_without_memory_is_refused_and_does_not_crash(x):
    net = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2)).eval()
    approximate(net, L2L, calibration=torch.randn(4, 32))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        net[0](torch.randn(3, 32, device="meta"))


# ----------------------------------------------------------------------------------- frozen networks


def test_a_frozen_network_neither_trains_nor_loads(net, x):
    frozen = freeze(approximate(net, L2L, calibration=x))
    y = frozen(x)
    with pytest.raises(RuntimeError, match=r"freeze it\s+again"):
        frozen.load_state_dict(frozen.state_dict())
    for network in (frozen.train(), frozen.eval()):
        assert network is frozen and not net.training and torch.equal(frozen(x), y)
    with pytest.raises(ValueError, match="frozen already"):
        freeze(frozen)
    assert cost.count(frozen, x) == cost.count(net, x) and cost.count(frozen, x).executed > 0


# ----------------------------------------------------------------------------------- calls and words


def test_a_layer_may_be_called_by_keyword(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(input=self.conv(input=x).mean((2, 3)))

    net = Net().eval()
    y = net(x)
    approximate(net, dict.fromkeys(("conv", "linear"), "mul8s_1KV6"), calibration=x)
    assert (net(x) - y).abs().max() < 0.05


def test_a_bare_layer_and_a_loader_of_pairs_are_answered_in_words(net, x):
    with pytest.raises(ValueError, match=r"Conv2d is a layer and no network.*nn\.Sequential\(layer\)"):
        approximate(nn.Conv2d(3, 4, 3), L2L, calibration=x)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(6)), batch_size=3)
    with pytest.raises(ValueError, match=r"met list;.*\(x for x, _ in loader\)"):
        approximate(net, L2L, calibration=loader)
    approximate(net, L2L, calibration=(x for x, _ in loader))
    with pytest.raises(ValueError, match="images are a DataLoader; an Images set is needed"):
        train.evaluate(net, loader)


@pytest.mark.parametrize("nested", [False, True])
def test_a_frozen_part_is_not_changed_in_silence(net, x, nested):
    frozen = freeze(approximate(net, L2L, calibration=x))
    network = nn.Sequential(frozen, nn.Identity()) if nested else frozen
    y, name = network(x), "0.network.0" if nested else "network.0"
    layer = network.get_submodule(name)
    for change in (
        lambda: approximate(network, "mul8s_1KV6"),
        lambda: approximate(network, {name: "mul8s_1KV6"}),
        lambda: restore(network),
        lambda: correct_bias(network, x),
        lambda: layer_errors(network, x),
        lambda: input_of(network, name, x),
    ):
        with pytest.raises(ValueError, match=r"(is frozen|a frozen part, '0').*change frozen.thaw.*freeze it again"):
            change()
    assert network.get_submodule(name) is layer and torch.equal(network(x), y)


def test_the_products_of_a_frozen_part_are_counted(net, x):
    thawed = nn.Sequential(approximate(net, L2L, calibration=x), nn.Identity())
    network = nn.Sequential(freeze(net), nn.Identity())
    assert cost.count(network, x) == cost.count(thawed, x) and hasattr(network[0], "thaw")

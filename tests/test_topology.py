"""Four topologies from one dense network, and where mixtures meet approximation: in dotted names and in every bit."""

import copy

import pytest
import torch
from torch import nn

from axmoe_lite import EXACT, approximate, assignment_of, datasets, layers, moe, quant, restore, train
from axmoe_lite.layers import default_layers
from axmoe_lite.models import ViT, eligible, resnet8, resnet20, upcycle, vgg11_bn

MIXED = ["hard", "soft", "cluster"]
TOPOLOGIES = ["dense", *MIXED]


def small_resnet(**options):
    network = resnet8(**{"classes": 5, "width": 0.25, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():  # statistics as after training, so that images differ where gates look
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_(generator=generator)
    return network


def small_vit():
    torch.manual_seed(0)
    network = ViT(dim=12, depth=4, heads=3, classes=5, image_size=8, patch=4).eval()
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return network


NETWORKS = {"resnet8": small_resnet, "vit": small_vit}


class Planted(nn.Module):
    """A gateway without weights: an image goes where its first pixel says."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return nn.functional.one_hot(x[:, 0, 0, 0].long(), self.experts).float()


def foreign():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


@pytest.fixture
def x():
    return torch.randn(23, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def mixed(network, topology, x, **options):
    """Three experts that differ, most of them with something to do; images go to clusters by a remainder."""
    if topology == "dense":
        return network
    if topology == "cluster":
        return upcycle(network, topology=topology, gateway=Remainder(3), experts=3, **{"noise": 0.5, **options}).eval()
    result = upcycle(network, topology=topology, experts=3, **{"noise": 0.5, **options}).eval()
    for layer in moe.mixtures(result).values():
        seen, score = [], layer.gate.score
        hook = score.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            result(x)
            hook.remove()
            # Means over pixels after a ReLU hardly differ: weights are large, and scores 0 in the mean.
            nn.init.normal_(score.weight, std=30, generator=torch.Generator().manual_seed(4))
            score.bias.copy_(-score.weight @ seen[0].mean(0))
    return result


class Remainder(nn.Module):
    """A gateway without weights: an image goes to the next of some experts, by its first pixel in hundredths."""

    def __init__(self, experts, among=None):
        super().__init__()
        self.experts, self.among = experts, torch.tensor(among or range(experts))

    def forward(self, x):
        number = (100 * x[:, 0, 0, 0]).floor().long() % len(self.among)
        return nn.functional.one_hot(self.among[number], self.experts).float()


def loads(network, x):
    """For each mixture how many items each expert gets."""
    with moe.watching(network) as seen, torch.no_grad():
        network(x)
    return {name: r[0].choice.bincount(minlength=r[0].probabilities.shape[1]).tolist() for name, r in seen.items()}


# ------------------------------------------------------------------------------- what may become one


def test_eligible_are_convolutions_without_shortcuts_or_whole_mlps():
    blocks = [
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer3.0.conv1",
        "layer3.0.conv2",
    ]
    assert eligible(resnet8(classes=5)) == ["conv1", *blocks]
    assert eligible(resnet8(classes=5, shortcut="projection")) == ["conv1", *blocks]
    twenty = eligible(resnet20(classes=5))
    assert len(twenty) == 19 and twenty[-1] == "layer3.2.conv2" and not any("downsample" in name for name in twenty)
    convolutions = [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)]
    assert eligible(vgg11_bn(classes=5, width=0.1)) == convolutions  # its classifier stays as it is
    assert eligible(small_vit()) == [f"blocks.{i}.mlp" for i in range(4)]
    assert eligible(foreign()) == ["0", "3", "5"]
    assert eligible(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) == []


def test_r_counts_from_the_last_layer_backwards():
    names = eligible(resnet8(classes=5))
    # Of seven layers: 0.5 is 3.5, rounded up to 4; 0.35 is 2.45, so 2; 0.01 is at least one.
    for r, n in ((0.5, 4), (0.35, 2), (0.01, 1), (1 / 7, 1), (0.25, 2), (1, 7)):
        network = upcycle(small_resnet(), topology="hard", experts=2, r=r)
        assert list(moe.mixtures(network)) == names[-n:]
    assert list(moe.mixtures(upcycle(small_vit(), topology="soft", experts=2))) == ["blocks.2.mlp", "blocks.3.mlp"]


@pytest.mark.parametrize("n", [1, 2, 7, 19])
def test_even_placement_spreads_and_holds_the_last_layer(n):
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(n + 1)))  # the last one is the classifier
    for k in range(1, n + 1):
        places = [int(i) for i in moe.mixtures(
            upcycle(network, topology="hard", experts=1, r=k / n, placement="even", noise=0.0)
        )]  # fmt: skip
        assert len(places) == k and places[-1] == n - 1
        steps = [b - a for a, b in zip([-1, *places], places, strict=False)]
        assert max(steps[1:], default=0) - min(steps[1:], default=0) <= 1
    half = upcycle(foreign(), topology="hard", experts=1, r=0.5, placement="even")
    assert list(moe.mixtures(half)) == ["3", "5"]  # 1.5 of three, rounded up to 2


def test_every_other_layer_is_half_of_them():
    half = upcycle(small_vit(), topology="hard", experts=2, placement="even")
    assert list(moe.mixtures(half)) == ["blocks.1.mlp", "blocks.3.mlp"]


def test_dense_is_the_network_itself():
    network = small_resnet()
    assert upcycle(network, topology="dense") is network


@pytest.mark.parametrize(
    "options,problem",
    [
        ({"topology": "sparse"}, "topology is 'sparse'; it can be 'dense', 'hard', 'soft', 'cluster'"),
        ({"placement": "first"}, "placement is 'first'; it can be 'last', 'even'"),
        ({"r": 0}, "r is 0; it is the fraction of layers"),
        ({"r": 1.5}, r"r is 1\.5"),
        ({"r": float("nan")}, "r is nan"),
        ({"experts": 0}, "experts is 0; a mixture needs at least 1"),
        ({"gate": "conv"}, "gate is 'conv'"),
        ({"weighting": "none"}, "weighting is 'none'"),
    ],
)
def test_bad_options_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        upcycle(small_resnet(), **{"topology": "hard", **options})


def test_networks_that_cannot_be_upcycled_are_refused(x):
    for topology in MIXED:
        network = mixed(small_resnet(), topology, x)
        for again in TOPOLOGIES:
            with pytest.raises(ValueError, match="has mixtures already; upcycle the dense network it was made of"):
                upcycle(network, topology=again)
    with pytest.raises(ValueError, match="This Sequential has no convolution, linear layer or MLP"):
        upcycle(nn.Sequential(nn.ReLU()), topology="hard")
    rough = approximate(small_resnet(), EXACT, calibration=x)
    for topology in MIXED:
        with pytest.raises(ValueError, match=r"This ResNet has approximate layers; restore\(\) it"):
            upcycle(rough, topology=topology)
    assert upcycle(rough, topology="dense") is rough


# -------------------------------------------------------------------------- where they start from


@pytest.mark.parametrize("topology", MIXED)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_dense_network_stays_as_it_is(make, topology, x):
    network = make()
    before, modules = copy.deepcopy(network.state_dict()), list(network.modules())
    result = mixed(network, topology, x).train()
    assert not {id(p) for p in network.parameters()} & {id(p) for p in result.parameters()}
    result(x).square().sum().backward()
    for parameter in (p for p in result.parameters() if p.grad is not None):
        parameter.data -= 0.1 * parameter.grad
    assert list(network.modules()) == modules and not any(m.training for m in modules)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_without_noise_every_topology_begins_as_the_dense_network(make, x):
    network = make()
    with torch.inference_mode():
        expected = network(x)
        hard = mixed(network, "hard", x, noise=0.0, weighting="straight-through")
        assert all(len([n for n in load if n]) > 1 for load in loads(hard, x).values()), "several experts answer"
        # The same products; floats may be added up in another order where an expert's batch is smaller.
        torch.testing.assert_close(hard(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed(network, "soft", x, noise=0.0)(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed(network, "cluster", x, noise=0.0)(x), expected, rtol=1e-5, atol=1e-5)
        for topology in MIXED:
            assert not torch.allclose(mixed(network, topology, x)(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("topology", ["hard", "cluster"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_one_batch_for_one_expert_begins_as_the_dense_network_bit_for_bit(make, topology, x):
    network = make()
    options = {"weighting": "straight-through"} if topology == "hard" else {"gateway": Planted(4)}
    result = upcycle(network, topology=topology, noise=0.0, **options)
    x[:, 0, 0, 0] = 2.5
    for layer in moe.mixtures(result).values():
        if topology == "hard":
            layer.gate.score.bias.data[2] = 1e9
    assert torch.equal(result(x), network(x))
    assert set(map(tuple, loads(result, x).values())) <= {(0, 0, n, 0) for n in (23, 23 * 5)}


def test_a_cluster_brings_a_gateway_when_it_is_given_none():
    cluster = upcycle(small_resnet(), topology="cluster", experts=3)
    assert type(cluster.gateway).__name__ == "ResNet" and cluster.gateway.fc.out_features == 3
    assert len([m for m in cluster.gateway.modules() if isinstance(m, nn.Conv2d)]) == 1 + 54 + 2  # ResNet-56
    assert cluster(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    again, other = (upcycle(small_resnet(), topology="cluster", experts=3, seed=s).gateway for s in (0, 1))
    assert torch.equal(again.fc.weight, cluster.gateway.fc.weight)
    assert not torch.equal(other.fc.weight, again.fc.weight)


def test_a_factory_makes_what_upcycle_makes(x):
    made = resnet8(classes=5, width=0.25, topology="hard", experts=3, r=0.3, seed=4).eval()
    dense = resnet8(classes=5, width=0.25, seed=4)
    same, other = (upcycle(dense, topology="hard", experts=3, r=0.3, seed=seed).eval() for seed in (4, 5))
    assert torch.equal(made(x), same(x)) and not torch.equal(made(x), other(x))
    assert list(moe.mixtures(made)) == ["layer3.0.conv1", "layer3.0.conv2"]


# ---------------------------------------------------------------- where they meet approximation


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_one_multiplier_goes_to_every_expert_and_to_no_gate_or_classifier(topology):
    network = small_resnet(shortcut="projection", width=1.0)
    dense = default_layers(network)
    result = network if topology == "dense" else upcycle(
        network, topology=topology, experts=2, r=0.01, gateway=resnet8(classes=2, width=0.25)
    )  # fmt: skip
    last = "layer3.0.conv2"
    expected = {
        "dense": dense,
        "hard": [n for name in dense for n in ([name] if name != last else [f"{last}.experts.{e}" for e in (0, 1)])],
        "cluster": [f"experts.{e}.{name}" for e in (0, 1) for name in dense],
    }
    expected["soft"] = expected["hard"]
    assert default_layers(result) == expected[topology]
    for options in ({"stem": False}, {"shortcuts": False}, {"stem": False, "shortcuts": False}):
        gone = ["conv1"] * ("stem" in options)
        gone += ["layer2.0.downsample.0", "layer3.0.downsample.0"] * ("shortcuts" in options)
        kept = [n for n in expected[topology] if n.removeprefix("experts.0.").removeprefix("experts.1.") not in gone]
        assert default_layers(result, **options) == kept and len(kept) < len(expected[topology])


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_in_a_transformer_too(topology):
    options = {"hard": {"gate": "mlp"}, "cluster": {"gateway": resnet8(classes=2, width=0.25)}}.get(topology, {})
    network = upcycle(small_vit(), topology=topology, experts=2, r=1, **options)
    mlp = [f"mlp.experts.{e}.{fc}" for e in (0, 1) for fc in ("fc1", "fc2")]
    if topology in ("dense", "cluster"):
        mlp = ["mlp.fc1", "mlp.fc2"]
    expected = [f"blocks.{i}.{name}" for i in range(4) for name in ["attn.qkv", "attn.proj", *mlp]]
    if topology == "cluster":
        expected = [f"experts.{e}.{name}" for e in (0, 1) for name in expected]
    assert default_layers(network) == expected


def test_stem_false_leaves_out_every_expert_of_a_stem():
    network = upcycle(small_resnet(), topology="soft", experts=3, r=1)
    stem = {f"conv1.experts.{e}" for e in range(3)}
    assert set(default_layers(network)) - set(default_layers(network, stem=False)) == stem


@pytest.mark.parametrize("topology", ["hard", "cluster"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_cheap_expert_changes_only_what_goes_to_it(make, topology, x):
    network = mixed(make(), topology, x, **({"per": "image", "r": 0.01} if topology == "hard" else {}))
    (name,) = moe.mixtures(network)
    with moe.watching(network) as seen:
        network(x)
    choice = seen[name][0].choice
    assert len(set(choice.tolist())) == 3
    inside = [n for n in default_layers(network) if ".experts." in f".{n}"]
    cheap = ["mul8s_1KVA", "mul8s_1L2L", "mul8s_1KXF"]  # each expert its own
    assignment = {n: cheap[int(n.split("experts.")[1][0])] for n in inside}
    assert set(assignment.values()) == set(cheap)
    approximate(network, dict.fromkeys(inside, EXACT), calibration=x)
    with torch.inference_mode():
        exact = network(x)
        for e in range(3):
            approximate(network, {n: m if m == cheap[e] else EXACT for n, m in assignment.items()})
            changed = (network(x) != exact).any(1)
            assert torch.equal(changed, choice == e)
        approximate(network, assignment)
        assert assignment_of(network) == assignment and (network(x) != exact).any(1).all()
        restore(network)
        assert assignment_of(network) == {}


@pytest.mark.parametrize("topology", ["hard", "cluster"])
def test_an_expert_that_no_image_reaches_is_calibrated_on_the_whole_batch(topology):
    images = datasets.synthetic(classes=5, size=8, n_train=40, n_test=23)
    seen = images.normalised(images.x_train)
    if topology == "cluster":
        network = upcycle(small_resnet(), topology=topology, experts=3, gateway=Remainder(3, [0, 2]))
    else:
        network = mixed(small_resnet(), topology, seen, r=0.01)
        network.layer3[0].conv2.gate.score.bias.data[1] = -1e9
    starved = "experts.1.conv1" if topology == "cluster" else "layer3.0.conv2.experts.1"
    assert train.calibrate(network, "mul8s_1L2J", images, n=23) is network
    assert set(assignment_of(network)) == set(default_layers(network)) and starved in assignment_of(network)
    assert all(m.calibrated for m in network.modules() if isinstance(m, layers.modules.Approximate))
    # The idle one was shown the whole batch: its first convolution, in a cluster, saw the images themselves.
    if topology == "cluster":
        largest = quant.Histogram()
        largest.update(images.normalised(images.subset(n_train=23).x_train))
        assert network.experts[1].conv1.scale_x == largest.scale()
    assert network(seen).shape == (40, 5)


class ByIntegers(nn.Module):
    """What an approximate layer must say under the exact multiplier, by torch's own products of whole numbers.

    y = float32(sum of codes times codes) float32(s_x s_w) + bias; float64 adds whole numbers exactly up to 2^53.
    """

    def __init__(self, layer):
        super().__init__()
        self.scale_x, self.bias = layer.scale_x, layer.bias
        self.scale_w = quant.weight_scale(layer.weight)
        self.weight = quant.quantise(layer.weight, self.scale_w).double()
        self.places = (layer.stride, layer.padding) if layer.weight.ndim == 4 else None

    def forward(self, x):
        codes = quant.quantise(x, self.scale_x).double()
        if self.places:
            sums = nn.functional.conv2d(codes, self.weight, None, *self.places)
            # Means over pixels follow, and depend on the order in memory: all of the package's are channels_last.
            sums = sums.contiguous(memory_format=torch.channels_last)
        else:
            sums = nn.functional.linear(codes, self.weight)
        y = sums.float() * (self.scale_x * self.scale_w)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * (sums.ndim - 2 if self.places else 0))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_with_the_exact_multiplier_a_mixture_is_the_quantised_mixture_bit_for_bit(make, topology, x):
    network = mixed(make(), topology, x)
    before = network(x)
    with moe.no_idle_experts(network), torch.inference_mode():
        approximate(network, "mul8s_1KV6", calibration=x)
    law = copy.deepcopy(network)
    for name, layer in layers.approximable(law).items():
        if isinstance(layer, layers.modules.Approximate):
            parent, _, leaf = name.rpartition(".")
            setattr(law.get_submodule(parent), leaf, ByIntegers(layer))
    assert sum(isinstance(m, ByIntegers) for m in law.modules()) == len(assignment_of(network)) > 6
    assert assignment_of(law) == {}
    with torch.inference_mode():
        for n in (23, 2, 1):
            assert torch.equal(network(x[:n]), law(x[:n]))
        assert not torch.equal(network(x), before), "quantised"
        assert loads(network, x) == loads(law, x)
        assert all(len([n for n in load if n]) > 1 for load in loads(network, x).values()), "several experts answer"
        approximate(network, "mul8s_1KVA")
        assert not torch.equal(network(x), law(x))


def test_the_classifier_of_every_expert_stays_exact_also_where_it_has_no_name():
    dense = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 9), torch.nn.Linear(9, 2)
    )
    cluster = upcycle(dense, topology="cluster", experts=2)
    assert default_layers(dense) == ["0", "2"]
    assert default_layers(cluster) == ["experts.0.0", "experts.0.2", "experts.1.0", "experts.1.2"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_typo_is_refused_in_every_topology(topology):
    with pytest.raises(ValueError, match=r"'expert'; it can be 'gate'"):
        resnet8(classes=3, topology=topology, expert=2)

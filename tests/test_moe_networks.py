"""Mixtures inside networks: found, watched, steered, and put there."""

import copy

import pytest
import torch
from planted import Planted, networks, planted, rows_seen
from torch import nn

from axmoe_lite import models, moe
from axmoe_lite.moe import Gate, HardMoE, SoftMoE

# --------------------------------------------------------------- mixtures in networks: looking


@pytest.fixture
def x():
    return torch.randn(23, 2, 4, 4, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def net(x):
    """conv -> mixture of convs -> mixture of convs -> classifier; expert 2 of the second has no items."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3),
        nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    moe.mixture(network, ["2", "4"], experts=3, noise=0.5)
    with torch.no_grad():
        for i in (2, 4):  # about as many images on either side of zero
            score, mean = network[i].gate.score, network[:i](x).mean((0, 2, 3))
            nn.init.normal_(score.weight, std=30)
            score.bias.copy_(-score.weight @ mean)
        score.bias[2] = -1e9
    return network.eval()


def test_mixtures_are_found_by_name(net):
    assert list(moe.mixtures(net)) == ["2", "4"] and moe.mixtures(net)["4"] is net[4]
    assert list(moe.mixtures(net[2])) == [""]
    assert moe.mixtures(nn.Linear(2, 2)) == {}


def test_watching_notes_each_call(net, x):
    y = net(x)
    with moe.watching(net) as seen:
        assert torch.equal(net(x), y)
        net(x[:2])
        net(x[:0])
    net(x)
    assert list(seen) == ["2", "4"] and [len(r.choice) for r in seen["4"]] == [23, 2, 0]
    hidden = net[:2](x)
    assert torch.equal(seen["2"][0].probabilities, net[2].gate(hidden))
    assert torch.equal(seen["2"][0].choice, net[2].gate(hidden).argmax(1)) and seen["2"][0].choice.dtype == torch.int64
    assert seen["2"][0].probabilities.requires_grad, "the load-balancing loss needs it"


def test_watching_inside_watching_notes_for_the_inner_one(net, x):
    with moe.watching(net) as outer:
        net(x)
        with moe.watching(net[4]) as inner:
            net(x)
        net(x)
    assert [len(outer[name]) for name in ("2", "4")] == [3, 2] and len(inner[""]) == 1


def test_watching_ends_with_an_error(net, x):
    with pytest.raises(KeyError), moe.watching(net) as seen:
        net(x)
        raise KeyError
    net(x)
    assert len(seen["2"]) == 1 and net[2].seen is None
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))


# ------------------------------------------------------------- mixtures in networks: steering


def test_no_idle_experts_shows_the_batch_to_those_without_items(net, x):
    y, seen = net(x), rows_seen(net)
    net(x)
    before = {name: list(calls) for name, calls in seen.items()}
    assert before["4.experts.2"] == [] and sum(len(calls) for calls in before.values()) == 5
    with moe.no_idle_experts(net):
        assert torch.equal(net(x), y)
    after = {name: calls[len(before[name]) :] for name, calls in seen.items()}
    assert after == {**before, "4.experts.2": [23]}
    net(x)
    assert seen["4.experts.2"] == [23], "and then it rests again"


def test_all_experts_see_every_item_once(net, x):
    y, seen = net(x), rows_seen(net)
    with moe.all_experts(net):
        assert torch.equal(net(x), y)
    assert {name: sum(calls) for name, calls in seen.items()} == dict.fromkeys(seen, 23) and len(seen) == 6


@pytest.mark.parametrize("steer", [moe.all_experts, moe.no_idle_experts])
@pytest.mark.parametrize("n", [0, 1, 2, 23])
def test_steering_changes_no_bit(steer, n):
    # Linear layers too: a product of floats may add up in another order when the batch is another.
    torch.manual_seed(0)
    dense = models.ViT(dim=12, depth=1, heads=3, classes=5, image_size=8, patch=4).eval()
    hard = moe.mixture(copy.deepcopy(dense), ["blocks.0.mlp"], experts=4, noise=1.0)
    cluster = moe.cluster(dense, Planted(4), experts=4, noise=1.0)
    x = planted([3 * (i % 2) for i in range(n)], 3, 8, 8)
    for network in (hard, cluster):
        y = network(x)
        with steer(network):
            assert torch.equal(network(x), y)


@pytest.mark.parametrize("steer", [moe.all_experts, moe.no_idle_experts])
def test_steering_ends_with_an_error_and_can_be_nested(steer, net, x):
    with pytest.raises(KeyError), steer(net):
        raise KeyError
    seen = rows_seen(net)
    net(x)
    assert seen["4.experts.2"] == []
    with moe.all_experts(net):
        with pytest.raises(KeyError), steer(net):
            raise KeyError
        [calls.clear() for calls in seen.values()]
        net(x)
        assert {sum(calls) for calls in seen.values()} == {23}, "all_experts is on again"
    net(x)
    assert sum(seen["4.experts.2"]) == 23


@pytest.mark.parametrize("error", [False, True])
def test_gates_frozen_and_as_they_were_again(net, x, error):
    net.train()
    net[2].gate.jitter = 0.9
    net[2].gate.score.bias.requires_grad_(False)  # a part that the user froze stays frozen
    net[4].gate = Gate(3, 3, kind="standardised")

    def learn():
        """Whether gates jitter and note means, and which of their parameters get a gradient."""
        net.zero_grad()
        with moe.watching(net) as seen:
            net(x), net(x).square().sum().backward()
        jitters = not torch.equal(*(routing.probabilities for routing in seen["2"]))
        learners = [n for n, p in net.named_parameters() if ".gate." in n and p.grad is not None]
        return jitters, net[4].gate.score[0].updates.item(), learners

    others = ["4.gate.score.1.weight", "4.gate.score.1.bias"]
    assert learn() == (True, 2, ["2.gate.score.weight", *others])
    try:
        with moe.gates_frozen(net):
            assert learn() == (False, 2, []) and any(p.grad is not None for p in net[2].experts.parameters())
            with moe.gates_frozen(net[2]):
                pass
            assert learn() == (False, 2, []), "the inner one did not thaw what the outer one had frozen"
            if error:
                raise KeyError
    except KeyError:
        pass
    assert learn() == (True, 4, ["2.gate.score.weight", *others]) and net[2].gate.jitter == 0.9


# ----------------------------------------------------------------------- putting mixtures there


def test_experts_start_as_copies(x):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5))
    dense = copy.deepcopy(network)
    assert moe.mixture(network, ["0", "2"], experts=3, noise=0.0) is network
    assert [name for name in network.state_dict() if "weight" in name] == [
        *(f"0.experts.{e}.weight" for e in range(3)), "0.gate.score.weight",
        *(f"2.experts.{e}.weight" for e in range(3)), "2.gate.score.weight",
    ]  # fmt: skip
    for expert in network[0].experts:
        assert torch.equal(expert(x), dense[0](x))
    hidden = dense[:2](x)
    for expert in network[2].experts:
        assert torch.equal(expert(hidden), dense[2](hidden))
    assert len({id(p) for p in network.parameters()}) == 2 * (3 * 2 + 2), "copies share nothing"
    assert (network[0].gate.per, network[2].gate.per) == ("image", "token")
    with torch.no_grad():
        network[0].experts[0].weight.zero_()
    assert network[0].experts[1].weight.any()


def test_noise_is_small_seeded_and_different_for_each_expert():
    layer = nn.Linear(115, 23)

    def moved(**options):
        network = moe.mixture(nn.Sequential(copy.deepcopy(layer)), ["0"], **{"experts": 3, "noise": 0.05, **options})
        return [expert.weight - layer.weight for expert in network[0].experts], network[0]

    moves, mixture = moved()
    # 2,645 draws of 0.05 standard deviations: their own standard deviation is known to 1.4 %.
    for move in moves:
        assert (move.std() / layer.weight.std()).item() == pytest.approx(0.05, rel=0.07)
    assert not torch.equal(moves[0], moves[1]) and not torch.equal(moves[1], moves[2])
    assert all(torch.equal(expert.bias, layer.bias) for expert in mixture.experts)
    again, twin = moved(seed=0)
    other, stranger = moved(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(moves, again, strict=True)) and not torch.equal(moves[0], other[0])
    assert torch.equal(mixture.gate.score.weight, twin.gate.score.weight)
    assert not torch.equal(mixture.gate.score.weight, stranger.gate.score.weight)


def test_a_layer_of_one_weight_survives_the_noise():
    for layer in (nn.Linear(1, 1), nn.Conv2d(1, 1, 1)):  # the standard deviation of one number is 0 / 0
        network = moe.mixture(nn.Sequential(layer), ["0"], experts=2)
        assert all(torch.equal(expert.weight, layer.weight) for expert in network[0].experts)


def test_making_mixtures_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    dense = nn.Sequential(nn.Conv2d(2, 3, 3))
    torch.set_rng_state(state)
    moe.mixture(copy.deepcopy(dense), ["0"])
    moe.cluster(dense, Planted(2), experts=2, noise=0.1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("topology", ["hard", "soft"])
def test_a_whole_mlp_is_an_expert(topology):
    network = models.ViT(dim=12, depth=2, heads=3, classes=5, image_size=8, patch=4).eval()
    dense = copy.deepcopy(network)
    moe.mixture(network, ["blocks.1.mlp"], topology=topology, experts=3, noise=0.0)
    assert network.get_submodule("blocks.1.mlp.experts.2.fc1").in_features == 12
    layer, x = network.blocks[1].mlp, torch.randn(23, 5, 12)
    assert isinstance(layer, HardMoE if topology == "hard" else SoftMoE)
    assert layer.gate.per == "token" and layer.gate.score.weight.shape == (3, 12)
    assert layer(x).shape == (23, 5, 12)
    torch.testing.assert_close(layer.experts[2](x), dense.blocks[1].mlp(x))
    by_image = moe.mixture(dense, ["blocks.1.mlp"], topology=topology, experts=3, per="image")
    assert by_image.blocks[1].mlp.gate(x).shape == (23, 3)


@pytest.mark.parametrize("training", [False, True])
def test_mixtures_stay_in_the_layers_mode_and_type(training):
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(2, 2)).train(not training)
    network[0].train(training)
    moe.mixture(network, ["0"], experts=2, gate="mlp", jitter=0.2, per="image", weighting="straight-through")
    assert all(module.training == training for module in network[0].modules())
    assert network[1].training == (not training)
    assert isinstance(network[0].gate.score, nn.Sequential) and network[0].gate.jitter == 0.2
    assert network[0].weighting == "straight-through"
    dense = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).train(training)
    assert all(m.training == training for m in moe.cluster(dense, Planted(2), experts=2).experts.modules())


def test_a_cluster_starts_as_copies():
    dense = networks(1)[0].eval()
    network = moe.cluster(dense, Planted(3), experts=3)
    x = planted([2, 0, 1, 1], 2, 4, 4)
    torch.testing.assert_close(network(x), dense(x))
    assert [n for n, _ in network.named_parameters()][:2] == ["experts.0.0.weight", "experts.0.0.bias"]
    noisy = [moe.cluster(dense, Planted(3), experts=3, noise=0.1, seed=s).experts[1][0].weight for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], dense[0].weight)


@pytest.mark.parametrize(
    "layers,options,problem",
    [
        (["block", "block.0"], {}, "'block.0' lies inside 'block', which is to become a mixture too"),
        (["blok.0"], {}, r"This ModuleDict has no layer 'blok\.0'\. Did you mean 'block\.0'\?"),
        (["relu"], {}, "'relu' of type ReLU holds no nn.Conv2d and no nn.Linear"),
        (["norm"], {}, "'norm' of type BatchNorm2d holds no"),
        (["last"], {"topology": "cluster"}, "topology is 'cluster'; it can be 'hard', 'soft'"),
        (["last"], {"experts": 0}, "experts is 0; a mixture needs at least 1"),
        (["last"], {"gate": "conv"}, "gate is 'conv'"),
        (["last"], {"per": "pixel"}, "per is 'pixel'"),
        (["last"], {"jitter": 1}, "jitter is 1"),
        (["last"], {"weighting": "none"}, "weighting is 'none'"),
    ],
)
def test_bad_places_are_refused_before_anything_changes(layers, options, problem):
    network = nn.ModuleDict(
        {"block": nn.Sequential(nn.Conv2d(2, 3, 3)), "relu": nn.ReLU(), "norm": nn.BatchNorm2d(3),
         "last": nn.Linear(2, 2)}
    )  # fmt: skip
    modules = list(network.modules())
    with pytest.raises(ValueError, match=problem):
        moe.mixture(network, layers, **options)
    with pytest.raises(ValueError, match="experts is -1"):
        moe.cluster(network, Planted(1), experts=-1)
    assert list(network.modules()) == modules

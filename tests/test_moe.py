"""Routing against plain indexing, mixtures against the slow masked sum, and small cases worked out by hand."""

import copy
import math

import pytest
import torch
from planted import Planted, networks, planted, rows_seen
from torch import nn

from axmoe_lite.moe import ClusterMoE, Gate, GroupedScores, HardMoE, SoftMoE, combine, dispatch


def gradients(output, x, layer):
    """Of a weighted sum of the output, for the input and each parameter by name; zeros where there is none."""
    leaves = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    found = torch.autograd.grad((output * weight).sum(), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), found, strict=True)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------- dispatch and combine


@pytest.mark.parametrize("experts", [1, 2, 23])
@pytest.mark.parametrize("items", [0, 1, 2, 23, 115])
def test_combine_undoes_dispatch(items, experts):
    generator = torch.Generator().manual_seed(items)
    for shape in ((), (1,), (5, 2), (3, 4, 4)):
        x = torch.randn(items, *shape, generator=generator)
        choice = torch.randint(0, experts, (items,), generator=generator)
        parts, order = dispatch(x, choice, experts)
        assert len(parts) == experts and sum(map(len, parts)) == items
        assert torch.equal(combine(parts, order), x)


def test_an_expert_gets_its_items_in_their_order():
    choice = torch.randint(0, 4, (115,), generator=torch.Generator().manual_seed(0))
    choice[choice == 2] = 3  # nobody goes to 2
    parts, _ = dispatch(torch.arange(115), choice, 6)
    assert [part.tolist() for part in parts] == [[i for i in range(115) if choice[i] == e] for e in range(6)]
    assert [len(part) == 0 for part in parts] == [False, False, True, False, True, True]


@pytest.mark.parametrize("choice", [[0, 2, 2, 0, 1, 1], [0, 2, 2, 0, 2, 0], [3, 3, 3, 3, 3, 3]])
def test_images_stay_channels_last(choice):
    x = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    parts, order = dispatch(x, torch.tensor(choice), 5)
    for images in (*parts, combine(parts, order)):
        assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("choice", [[1, 0, 3, 1, 1], [2, 2, 2, 2, 2], [0], []])
def test_gradients_of_dispatch_and_combine_are_those_of_indexing(choice):
    choice = torch.tensor(choice, dtype=torch.int64)
    x = torch.randn(len(choice), 2, dtype=torch.double, requires_grad=True)
    sizes = [1.0, -2.0, 3.0, 0.5]

    def ours(x):
        parts, order = dispatch(x, choice, 4)
        return combine([size * part**2 for size, part in zip(sizes, parts, strict=True)], order)

    def plain(x):
        y = torch.zeros_like(x)
        for e, size in enumerate(sizes):
            y = y.index_put((choice == e,), size * x[choice == e] ** 2)
        return y

    assert torch.equal(ours(x), plain(x))
    if len(choice):
        assert torch.autograd.gradcheck(ours, x) and torch.autograd.gradgradcheck(ours, x)
    grad = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(ours(x), x, grad)[0], torch.autograd.grad(plain(x), x, grad)[0])


# ----------------------------------------------------------------------------------- HardMoE


def by_hand(weighting="probability"):
    """Two linear experts of two features, and a gate whose scores are (ln 3 x_0, 0)."""
    layer = HardMoE([nn.Linear(2, 1), nn.Linear(2, 1)], Gate(2, 2, per="token"), weighting=weighting)
    with torch.no_grad():
        for module, weight, bias in (
            (layer.experts[0], [[1, 2]], [0]),
            (layer.experts[1], [[10, 0]], [1]),
            (layer.gate.score, [[math.log(3), 0], [0, 0]], [0, 0]),
        ):
            module.weight.copy_(torch.tensor(weight))
            module.bias.copy_(torch.tensor(bias))
    return layer


X_BY_HAND = [[1.0, 1.0], [-1.0, 1.0], [0.0, 5.0]]


def test_hard_by_hand():
    # ( 1, 1): p = (3, 1)/4, expert 0 says 1 + 2 = 3, times 3/4.
    # (-1, 1): p = (1/3, 1)/(4/3) = (1, 3)/4, expert 1 says -10 + 1 = -9, times 3/4.
    # ( 0, 5): p = (1, 1)/2, the first of equals answers: 10, times 1/2.
    y = by_hand()(torch.tensor(X_BY_HAND))
    torch.testing.assert_close(y, torch.tensor([[2.25], [-6.75], [5.0]]))


def test_straight_through_by_hand():
    # The answers themselves. Backward y = E_c(x) p_c / constant, so dy/dp_c = E_c(x) / p_c, and with
    # dp_c/ds_j = p_c (1[j = c] - p_j):  dy/ds_j = E_c(x) (1[j = c] - p_j).
    #   3 (1/4, -1/4);  -9 (-1/4, 1/4);  10 (1/2, -1/2)
    layer = by_hand("straight-through")
    x = torch.tensor(X_BY_HAND)
    y = layer(x)
    assert y.tolist() == [[3.0], [-9.0], [10.0]]
    y.sum().backward()
    of_scores = torch.tensor([[0.75, -0.75], [2.25, -2.25], [5.0, -5.0]])
    torch.testing.assert_close(layer.gate.score.weight.grad, of_scores.T @ x)
    torch.testing.assert_close(layer.gate.score.bias.grad, of_scores.sum(0))
    assert layer.experts[0].bias.grad.item() == 2 and layer.experts[1].bias.grad.item() == 1


CASES = {
    "images": ("image", lambda: nn.Conv2d(3, 2, 3), (3, 5, 4)),
    "tokens": ("token", lambda: nn.Linear(3, 2), (7, 3)),
    "images of tokens": ("image", lambda: nn.Linear(3, 2), (7, 3)),
    "rows": ("token", lambda: nn.Linear(3, 2), (3,)),
    "rows as images": ("image", lambda: nn.Linear(3, 2), (3,)),
    "images, gate of tokens": ("token", lambda: nn.Conv2d(3, 2, 3), (3, 5, 4)),
}


def drawn(case, n, experts, kind):
    per, expert, shape = CASES[case]
    torch.manual_seed(n + experts)
    layer = kind([expert() for _ in range(experts)], Gate(3, experts, per=per)).double()
    nn.init.normal_(layer.gate.score.weight, std=30)  # else the mean over pixels would hardly matter
    x = torch.randn(n, *shape, dtype=torch.double, requires_grad=True)
    return layer, x


def slow(layer, x, choose):
    """Sum over e of w_e(x) E_e(x), each expert on everything, by the definition."""
    by_token = layer.gate.per == "token" and x.ndim < 4
    items = x.flatten(0, -2) if by_token else x
    p = layer.gate(x)
    weights = p * nn.functional.one_hot(p.argmax(1), p.shape[1]) if choose else p
    answers = [expert(items) for expert in layer.experts]
    y = sum(w.view(-1, *[1] * (answers[0].ndim - 1)) * a for w, a in zip(weights.T, answers, strict=True))
    return y.unflatten(0, x.shape[:-1]) if by_token else y


@pytest.mark.parametrize("kind", [HardMoE, SoftMoE])
@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 23])
@pytest.mark.parametrize("case", CASES)
def test_mixtures_equal_the_slow_sum_and_so_do_their_gradients(case, n, experts, kind):
    layer, x = drawn(case, n, experts, kind)
    y, expected = layer(x), slow(layer, x, choose=kind is HardMoE)
    assert y.shape == expected.shape and y.dtype == torch.double
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert_same(gradients(y, x, layer), gradients(expected, x, layer))
    if n == 23 and kind is HardMoE:
        assert len(set(layer.gate(x).argmax(1).tolist())) > experts // 2, "most experts have something to do"


def test_only_the_chosen_expert_computes():
    layer, x = drawn("images", 23, 5, HardMoE)
    with torch.no_grad():
        layer.gate.score.bias[3] = -1e9
    seen = rows_seen(layer)
    choice = layer.gate(x).argmax(1)
    layer(x)
    assert seen["experts.3"] == [] and (choice != 3).all()
    assert all(seen[f"experts.{e}"] == [(choice == e).sum()] for e in (0, 1, 2, 4))
    assert sum(sum(calls) for calls in seen.values()) == 23


def test_one_image_wakes_one_expert():
    layer, x = drawn("images", 1, 5, HardMoE)
    seen = rows_seen(layer)
    layer(x)
    assert sorted(seen.values()) == [[], [], [], [], [1]]


def test_an_empty_batch_keeps_its_shape():
    images = torch.zeros(0, 3, 5, 4)
    assert HardMoE([nn.Conv2d(3, 2, 3) for _ in range(4)], Gate(3, 4))(images).shape == (0, 2, 3, 2)
    assert SoftMoE([nn.Conv2d(3, 2, 3) for _ in range(4)], Gate(3, 4))(images).shape == (0, 2, 3, 2)
    tokens = torch.zeros(0, 7, 3)
    assert HardMoE([nn.Linear(3, 2) for _ in range(4)], Gate(3, 4, per="token"))(tokens).shape == (0, 7, 2)
    assert ClusterMoE([nn.Conv2d(3, 2, 3)] * 2, Planted(2))(images).shape == (0, 2, 3, 2)


def test_straight_through_answers_are_the_experts_own():
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 4, 3, padding=1)
    for parameter in dense.parameters():  # whole numbers, of which floats make sums without rounding
        parameter.data.mul_(100).round_()
    layer = HardMoE([copy.deepcopy(dense) for _ in range(3)], Gate(3, 3), weighting="straight-through")
    nn.init.normal_(layer.gate.score.weight, std=9)
    x = torch.randn(23, 3, 6, 6).mul_(100).round_()
    assert len(set(layer.gate(x).argmax(1).tolist())) == 3
    assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("weighting", ["probability", "straight-through"])
def test_an_expert_that_is_never_chosen_changes_nothing_and_learns_nothing(weighting):
    torch.manual_seed(0)
    two = HardMoE([nn.Linear(5, 3) for _ in range(2)], Gate(5, 2, per="token"), weighting=weighting)
    three = copy.deepcopy(two)
    three.experts.append(nn.Linear(5, 3))
    three.gate.score = nn.Linear(5, 3)
    with torch.no_grad():
        three.gate.score.weight.zero_()[:2] = two.gate.score.weight
        three.gate.score.bias.fill_(-1e9)[:2] = two.gate.score.bias
    x = torch.randn(115, 5)
    assert torch.equal(three(x), two(x))
    three(x).sum().backward()
    assert three.experts[2].weight.grad is None and three.experts[2].bias.grad is None
    assert all(expert.weight.grad is not None for expert in three.experts[:2])


def test_experts_can_be_renumbered():
    torch.manual_seed(0)
    layer = HardMoE([nn.Linear(5, 3) for _ in range(4)], Gate(5, 4, per="token"), weighting="straight-through")
    order, other = [2, 0, 3, 1], copy.deepcopy(layer)
    other.experts = nn.ModuleList([copy.deepcopy(layer.experts[e]) for e in order])
    with torch.no_grad():
        other.gate.score.weight.copy_(layer.gate.score.weight[order])
        other.gate.score.bias.copy_(layer.gate.score.bias[order])
    x = torch.randn(115, 5)
    assert torch.equal(other(x), layer(x))
    other.weighting = layer.weighting = "probability"
    torch.testing.assert_close(other(x), layer(x))  # the denominator is added up in another order


def test_images_come_out_channels_last():
    layer = HardMoE([nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(5)], Gate(3, 5))
    y = layer(torch.randn(6, 3, 5, 5).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_mixtures_run_in_mixed_precision():
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    for kind in (HardMoE, SoftMoE):
        layer = kind([nn.Linear(5, 3) for _ in range(2)], Gate(5, 2, per="token"))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="no experts; it needs at least 1"):
        HardMoE([], Gate(2, 1))
    with pytest.raises(ValueError, match="weighting is 'straight'; it can be 'probability', 'straight-through'"):
        HardMoE([nn.Linear(2, 2)], Gate(2, 1), weighting="straight")


# ----------------------------------------------------------------------------------- SoftMoE


def test_soft_by_hand():
    # The layer of test_hard_by_hand:  3/4 3 + 1/4 11 = 5;  1/4 1 + 3/4 (-9) = -6.5;  1/2 10 + 1/2 1 = 5.5.
    hard = by_hand()
    y = SoftMoE(hard.experts, hard.gate)(torch.tensor(X_BY_HAND))
    torch.testing.assert_close(y, torch.tensor([[5.0], [-6.5], [5.5]]))


@pytest.mark.parametrize("kind", [HardMoE, SoftMoE])
def test_a_mixture_of_one_is_the_layer(kind):
    torch.manual_seed(0)
    expert = nn.Conv2d(3, 4, 3)
    x = torch.randn(23, 3, 5, 5)
    assert torch.equal(kind([expert], Gate(3, 1))(x), expert(x))  # softmax of one number is 1


def test_all_experts_of_a_soft_mixture_compute_everything():
    layer, x = drawn("tokens", 2, 5, SoftMoE)
    seen = rows_seen(layer)
    layer(x)
    assert list(seen.values()) == [[14]] * 5  # 2 images of 7 tokens


# -------------------------------------------------------------------------------- ClusterMoE


def test_a_cluster_sends_each_image_where_the_gateway_says():
    experts = networks(3)
    network = ClusterMoE(experts, Planted(3)).eval()
    choice = [2, 0, 0, 2, 0]  # 1 has nothing to do
    x, seen = planted(choice, 2, 4, 4), rows_seen(network)
    y = network(x)
    assert list(seen.values()) == [[3], [], [2]]
    for i, e in enumerate(choice):  # unscaled
        torch.testing.assert_close(y[i : i + 1], experts[e](x[i : i + 1]))


@pytest.mark.parametrize("training", [False, True])
def test_a_cluster_takes_one_image(training):
    experts = networks(3)
    network, alone = ClusterMoE(experts, Planted(3)).train(training), copy.deepcopy(experts[1]).train(training)
    x = planted([1], 2, 4, 4)
    assert torch.equal(network(x), alone(x))  # in training too: BatchNorm has 2 x 2 positions to average over


def test_the_gateway_neither_learns_nor_adapts():
    gateway = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 3))
    network = ClusterMoE(networks(3), gateway)
    state = copy.deepcopy(gateway.state_dict())
    network.train()
    assert network.training and network.experts[0].training and not any(m.training for m in gateway.modules())
    x = torch.randn(23, 2, 4, 4)
    y = network(x)
    assert torch.equal(y, network(x)), "no dropout in the gateway: images go the same way again"
    y.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in gateway.parameters())
    assert all(torch.equal(state[name], value) for name, value in gateway.state_dict().items())
    assert not network.eval().training and not network.experts[0].training


def test_experts_of_a_cluster_learn_as_if_alone():
    experts = networks(2)
    network = ClusterMoE(experts, Planted(2)).eval()
    x = planted([0, 1, 1, 0, 1], 2, 4, 4)
    network(x).square().sum().backward()
    for e, rows in ((0, [0, 3]), (1, [1, 2, 4])):
        alone = copy.deepcopy(experts[e])
        alone.zero_grad()
        alone(x[rows]).square().sum().backward()
        torch.testing.assert_close(experts[e][0].weight.grad, alone[0].weight.grad)


@pytest.mark.parametrize("answers", [2, 4])
def test_a_gateway_of_another_size_is_refused(answers):
    network = ClusterMoE(networks(3), nn.Sequential(nn.Flatten(), nn.Linear(32, answers)))
    with pytest.raises(ValueError, match=rf"answers with \[5, {answers}\] for 5 images; with 3 .*must be \[5, 3\]"):
        network(torch.zeros(5, 2, 4, 4))


def test_a_gateway_that_forgets_the_images_is_refused():
    with pytest.raises(ValueError, match=r"answers with \[3\] for 3 images"):
        ClusterMoE(networks(3), nn.Sequential(nn.Flatten(0), nn.Linear(96, 3)))(torch.zeros(3, 2, 4, 4))


def test_grouped_scores_by_hand():
    # Classes of probabilities 1/10, 2/10, 3/10, 4/10 in clusters 1, 0, 1, 0: 6/10 and 4/10.
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()
    torch.testing.assert_close(GroupedScores([1, 0, 1, 0])(scores).softmax(-1), torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(GroupedScores([0, 1, 2, 3])(scores), scores)
    torch.testing.assert_close(GroupedScores([0, 0, 0, 0])(scores), torch.tensor([[10.0]]).log())
    assert GroupedScores([0, 1])(torch.zeros(0, 2)).shape == (0, 2)


@pytest.mark.parametrize("numbers", [[0, 2], [1, 1], [-1, 0], []])
def test_clusters_of_classes_have_no_gaps(numbers):
    with pytest.raises(ValueError, match="numbered from 0 without gaps"):
        GroupedScores(numbers)

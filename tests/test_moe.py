"""Routing against plain indexing, mixtures against the slow masked sum, and small cases worked out by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from axmoe_lite import models, moe
from axmoe_lite.moe import ClusterMoE, Gate, GroupedScores, HardMoE, Routing, SoftMoE, combine, dispatch, load_balance


class Planted(nn.Module):
    """A gateway without weights: an image's first number is the number of its expert."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return nn.functional.one_hot(x.flatten(1)[:, 0].long(), self.experts).float()


def planted(choice, *shape):
    """Images [I, *shape] that :class:`Planted` sends to these experts."""
    x = torch.randn(len(choice), *shape, generator=torch.Generator().manual_seed(len(choice)))
    if len(choice):
        x.flatten(1)[:, 0] = torch.tensor(choice).float()
    return x


def rows_seen(network):
    """For each expert of each mixture, by name, the sizes of the batches it is called with from now on."""
    seen = {}
    for name, layer in moe.mixtures(network).items():
        for e, expert in enumerate(layer.experts):
            calls = seen.setdefault(f"{name}.experts.{e}".lstrip("."), [])
            expert.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(len(args[0])))
    return seen


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


def networks(n):
    torch.manual_seed(n)
    return [nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5)) for _ in range(n)]


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


# -------------------------------------------------------------------------------------- Gate


def test_a_gate_is_a_softmax_of_means():
    torch.manual_seed(0)
    gate, x = Gate(3, 4), torch.randn(5, 3, 6, 2)
    expected = (x.flatten(2).mean(2) @ gate.score.weight.T + gate.score.bias).softmax(1)
    torch.testing.assert_close(gate(x), expected)
    tokens = x.flatten(2).transpose(1, 2)  # the same pixels as tokens: the same mean
    torch.testing.assert_close(gate(tokens), expected)
    each = Gate(3, 4, per="token")
    each.load_state_dict(gate.state_dict())
    assert each(tokens).shape == (5 * 12, 4)
    torch.testing.assert_close(each(tokens)[13], gate(tokens[1:, 1:2])[0])  # token 1 of image 1
    torch.testing.assert_close(each(x), expected)  # pixels are no tokens


def test_a_gate_of_two_layers():
    torch.manual_seed(0)
    gate, x = Gate(3, 4, kind="mlp", per="token"), torch.randn(5, 3)
    first, second = gate.score[0], gate.score[2]
    assert first.weight.shape == (3, 3) and second.weight.shape == (4, 3)
    hidden = (x @ first.weight.T + first.bias).clamp_min(0)
    torch.testing.assert_close(gate(x), (hidden @ second.weight.T + second.bias).softmax(1))


def test_a_standardising_gate_by_hand():
    # Features 1, 3, then 5, 5 (one item): mean (2 + 5) / 2 = 3.5, mean square (5 + 25) / 2 = 15 (each batch counts
    # alike at first), variance 15 - 12.25 = 2.75. The item 9 becomes 5.5 / sqrt(2.75) = 3.3166.
    gate = Gate(1, 2, kind="standardised", per="token")
    with torch.no_grad():
        gate.score[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
        gate.score[1].bias.zero_()
    nine = torch.tensor([[9.0]])
    torch.testing.assert_close(gate.eval()(nine), torch.tensor([[9.0, 0.0]]).softmax(1))  # nothing known yet
    gate.train()
    for batch in ([[1.0], [3.0]], [[5.0]]):
        gate(torch.tensor(batch))
    assert gate(torch.zeros(0, 1)).shape == (0, 2) and gate.score[0].updates == 2  # an empty batch teaches nothing
    torch.testing.assert_close(gate.eval()(nine), torch.tensor([[5.5 / 2.75**0.5, 0.0]]).softmax(1))
    assert gate.score[0].updates == 2, "evaluation teaches nothing"
    # After a hundred batches each new one counts for a hundredth.
    gate.train().score[0].updates.fill_(1000)
    gate(torch.tensor([[103.5]]))
    assert gate.score[0].mean.item() == pytest.approx(3.5 + 1)


def test_a_standardising_gate_sees_small_differences():
    x = 100 + 0.01 * torch.randn(115, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    gates = {kind: Gate(3, 2, kind=kind, per="token").double() for kind in ("linear", "standardised")}
    for gate in gates.values():
        nn.init.zeros_(list(gate.parameters())[-1])
    loads = {kind: gate(x).argmax(1).bincount(minlength=2).min().item() for kind, gate in gates.items()}
    assert loads["linear"] == 0 and loads["standardised"] > 20


@pytest.mark.parametrize("kind", ["linear", "mlp", "standardised"])
def test_a_gate_stays_in_float32_in_mixed_precision(kind):
    torch.manual_seed(0)
    gate, x = Gate(23, 4, kind=kind).eval(), torch.randn(5, 23, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        p, rounded = gate(x), gate(x.bfloat16())
    assert p.dtype == rounded.dtype == torch.float32
    assert torch.equal(p, gate(x)) and torch.equal(rounded, gate(x.bfloat16().float()))


def test_a_gateway_stays_in_float32_in_mixed_precision():
    torch.manual_seed(0)
    network = ClusterMoE(networks(2), nn.Sequential(nn.Flatten(), nn.Linear(32, 2)))
    x = torch.randn(23, 2, 4, 4)
    with moe.watching(network) as seen:
        network(x)
        with torch.autocast("cpu", torch.bfloat16):
            network(x)
    assert seen[""][1].probabilities.dtype == torch.float32
    assert torch.equal(seen[""][0].probabilities, seen[""][1].probabilities)


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
def test_a_network_cast_as_a_whole_still_routes(dtype):
    hard = HardMoE([nn.Linear(3, 2) for _ in range(2)], Gate(3, 2, per="token")).to(dtype)
    assert hard(torch.randn(5, 3, dtype=dtype)).dtype == dtype
    cluster = ClusterMoE(networks(2), nn.Sequential(nn.Flatten(), nn.Linear(32, 2))).to(dtype)
    assert cluster(torch.randn(5, 2, 4, 4, dtype=dtype)).dtype == dtype


def test_jitter_multiplies_only_while_training():
    gate, seen = Gate(23, 2, jitter=0.25), []
    gate.score.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.full((115, 23, 2, 1), 2.0)
    assert torch.equal(gate.eval()(x), gate(x)) and (seen[-1] == 2).all()
    gate.train()
    torch.manual_seed(7)
    first = gate(x)
    torch.manual_seed(7)
    assert torch.equal(gate(x), first) and not torch.equal(gate(x), first)
    # 115 x 23 draws from 1.5..2.5: the ends are reached within 0.01, the mean is 2 within six standard errors.
    assert 1.5 <= seen[-1].min() < 1.51 and 2.49 < seen[-1].max() <= 2.5
    assert abs(seen[-1].mean() - 2) < 6 * (1 / math.sqrt(12)) / math.sqrt(115 * 23)
    gate.jitter = 0.0
    assert (gate(x) is not None) and (seen[-1] == 2).all()


@pytest.mark.parametrize(
    "options,problem",
    [
        ({"jitter": 1.0}, r"jitter is 1\.0; it lies in 0\.\.1"),
        ({"jitter": -0.1}, r"jitter is -0\.1"),
        ({"jitter": math.nan}, "jitter is nan"),
        ({"kind": "conv"}, "gate is 'conv'; it can be 'linear', 'mlp', 'standardised'"),
        ({"per": "pixel"}, "per is 'pixel'; it can be 'image', 'token'"),
    ],
)
def test_bad_gates_are_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        Gate(3, 2, **options)


# -------------------------------------------------------------------- how even the load is


def test_load_balance_by_hand():
    # Four sure items, one for each of four experts: 4 (4 x 1/4 1/4) = 1.
    assert load_balance(Routing.of(torch.eye(4))) == 1
    # All to the first, which has 0.7 each time: 4 (1 x 0.7) = 2.8, whatever the others have.
    p = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.3, 0.0, 0.0]])
    assert load_balance(Routing.of(p)).item() == pytest.approx(2.8)
    assert load_balance(Routing.of(torch.ones(23, 1))) == 1  # one expert is always even
    assert load_balance(Routing.of(torch.zeros(0, 4))) == 0  # not 0 / 0


def test_load_balance_pushes_the_fullest_expert_down():
    # f = (3/4, 1/4), and d/dp_ie = E f_e / I = 2 (3/4) / 4 and 2 (1/4) / 4.
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], requires_grad=True)
    load_balance(Routing.of(p)).backward()
    torch.testing.assert_close(p.grad, torch.tensor([[0.375, 0.125]]).expand(4, 2))
    scores = p.detach().log().requires_grad_()
    load_balance(Routing.of(scores.softmax(1))).backward()
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1] < 0).all()
    assert (scores - scores.grad).softmax(1)[:, 0].mean() < p[:, 0].mean()


def test_statistics_by_hand():
    calls = [torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0.1, 0.9]]), torch.zeros(0, 2)]
    found = moe.statistics([Routing.of(p) for p in calls])
    assert found.items == 3
    assert found.load == pytest.approx((2 / 3, 1 / 3))  # the first of equals
    assert found.importance == pytest.approx((1.35 / 3, 1.65 / 3))
    assert found.balance == pytest.approx(2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3))
    # Entropies in bits: of 1/4 2 - 3/4 log2 3 = 0.811, of 1/2 1, of 1/10 0.469.
    assert found.entropy == pytest.approx((0.8112781 + 1 + 0.4689956) / 3)
    assert found.confidence == pytest.approx((0.75 + 0.5 + 0.9) / 3)


def test_statistics_at_the_ends():
    all_to_one = moe.statistics([Routing.of(torch.tensor([[0.0, 1.0, 0.0]]).expand(23, 3))])
    assert all_to_one.load == (0, 1, 0) and all_to_one.balance == all_to_one.entropy == 0
    undecided = moe.statistics([Routing.of(torch.full((5, 4), 0.25))])
    assert undecided.entropy == pytest.approx(1) and undecided.confidence == 0.25 and undecided.balance == 0
    alone = moe.statistics([Routing.of(torch.ones(2, 1))])
    assert (alone.load, alone.balance, alone.entropy) == ((1.0,), 0, 0)  # not 0 / log 1
    for nothing in ([], [Routing.of(torch.zeros(0, 3))]):
        with pytest.raises(ValueError, match="Nothing was routed"):
            moe.statistics(nothing)


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

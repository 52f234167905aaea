"""Gates by hand and in mixed precision, and how even the load is."""

import math

import pytest
import torch
from planted import networks
from torch import nn

from axmoe_lite import moe
from axmoe_lite.moe import ClusterMoE, Gate, HardMoE, Routing, load_balance

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

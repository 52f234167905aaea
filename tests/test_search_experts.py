"""A multiplier for each expert: chosen on training images, equal to trying everything where that is possible."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from axmoe_lite import PAPER_EIGHT, cost, models, moe, multiplier, study
from axmoe_lite.layers import approximable, assignment_of, default_layers
from axmoe_lite.models import upcycle
from axmoe_lite.search import (
    Score,
    Trial,
    additive,
    explore,
    groups,
    hold_out,
    report,
    search,
    sensitivity,
    uniform,
)
from axmoe_lite.search.trial import Kept, assignment_digest
from axmoe_lite.train import fit

THREE = ["mul8s_1KV6", "mul8s_1L2J", "mul8s_1L2L"]
PARTS = {"a": ["a"], "b": ["b1", "b2"], "c": ["c"]}
WEIGHT = {"a": 1, "b1": 3, "b2": 4, "c": 5}
PLAIN = {"n": 64, "progress": False, "calibrate_options": {"n": 50}}


@pytest.fixture(scope="module")
def dense(textures):
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    fit(network, textures, epochs=3, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


@pytest.fixture(scope="module")
def hard(dense):
    return upcycle(dense, topology="hard", experts=2, r=0.4)


@pytest.fixture(scope="module")
def base(dense, textures):
    return cost.count(dense, textures.normalised(textures.x_test[:1]))


def price(assignment):
    return sum(WEIGHT[layer] * multiplier(name).power_mw for layer, name in assignment.items())


def sensitive(assignment, *, together=0.0):
    """A toy: b bears anything, a little, c nothing; cheap a and cheap c hurt each other by ``together``."""
    bad = {"mul8s_1KV6": 0.0, "mul8s_1L2J": 1.0, "mul8s_1L2L": 4.0}
    loss = 0.3 * bad[assignment["a"]] + 0.01 * bad[assignment["b1"]] + 2.0 * bad[assignment["c"]]
    loss += together * (assignment["a"] == assignment["c"] == "mul8s_1L2L")
    return Score(loss, 1 + loss, 0.9 if loss < 5 else 0.1)


def enumerated(evaluate):
    """All that 27 assignments can do: (price, divergence) of those that none dominates."""
    points = []
    for chosen in itertools.product(THREE, repeat=3):
        assignment = {layer: name for part, name in zip(PARTS.values(), chosen, strict=True) for layer in part}
        points.append((round(price(assignment), 9), evaluate(assignment).divergence))
    return sorted(p for p in points if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points))


def points(found):
    return [(round(one.p_norm, 9), one.divergence) for one in found]


def toy(evaluate=sensitive, **options):
    return explore(PARTS, THREE, evaluate=evaluate, price=price, progress=False, **options)


# ------------------------------------------------------------------------------ the search, without a network


@pytest.mark.parametrize("seed", range(5))
def test_the_foretold_front_is_that_of_all_choices(seed):
    draw = np.random.default_rng(seed)
    costs, losses = draw.random((4, 4)), draw.normal(size=(4, 4))
    losses[0, 1] = np.inf
    everything = np.array(list(itertools.product(range(4), repeat=4)))
    sums, lost = (table[np.arange(4), everything].sum(1) for table in (costs, losses))
    best = {
        tuple(everything[i])
        for i in range(256)
        if np.isfinite(lost[i])
        and not ((sums <= sums[i]) & (lost <= lost[i]) & ((sums < sums[i]) | (lost < lost[i]))).any()
    }
    found = additive.front(costs, losses, bins=10**9)
    assert {tuple(choice) for choice in found} == best


def test_a_large_front_is_as_good_as_its_bins():
    """For any price of cost, the best of a sum is the sum of the bests: the front must hold it, up to its steps."""
    draw = np.random.default_rng(0)
    costs, losses = draw.random((40, 8)), draw.exponential(size=(40, 8))
    found = additive.front(costs, losses, bins=4000)
    sums, lost = (table[np.arange(40), found].sum(1) for table in (costs, losses))
    assert (np.diff(sums) > 0).all() and (np.diff(lost) < 0).all() and len(found) > 100
    for coarse in (found, additive.front(costs, losses, bins=30)):
        ends = costs[np.arange(40), coarse[0]].sum(), losses[np.arange(40), coarse[-1]].sum()
        assert ends == pytest.approx((costs.min(1).sum(), losses.min(1).sum())), "the cheapest and the best stay"
    for weight in (0.1, 0.5, 1, 2, 10):
        best = (losses + weight * costs).min(1).sum()
        slack = 40 * weight * np.ptp(costs, axis=1).sum() / 4000
        assert best - 1e-9 <= (lost + weight * sums).min() <= best + slack


def test_the_search_finds_what_trying_everything_finds():
    assert points(toy(candidates=27, refine=0)) == enumerated(sensitive)


def test_the_front_is_measured_not_foretold():
    """Cheap a and c together are worse than they add up to: the foretold point must not be believed."""

    def interacting(assignment):
        return sensitive(assignment, together=7.0)

    found = toy(interacting, budget=27, candidates=9)
    assert points(found) == enumerated(interacting) != enumerated(sensitive)
    assert all(one.divergence == interacting(one.assignment).divergence for one in found)


def test_moves_find_what_the_sum_of_sensitivities_misses():
    """Alone b seems to break at every change; with cheap c it is free, which only a measurement shows."""

    def hidden(assignment):
        cheap_c = assignment["c"] == "mul8s_1L2L"
        loss = (0 if cheap_c else 3) * (assignment["b1"] != "mul8s_1KV6") + 0.1 * cheap_c
        loss += 1.0 * (assignment["a"] != "mul8s_1KV6")
        return Score(loss, loss, 0.9)

    without, with_moves = toy(hidden, candidates=2, refine=0), toy(hidden, candidates=2, refine=12)
    assert points(with_moves) == enumerated(hidden) != points(without)


def test_what_is_broken_is_not_refined():
    """Only the exact circuit works, and all its neighbours are known from the sensitivities: there is no move left."""

    def score(assignment):
        return replace(sensitive(assignment), accuracy=0.9 if set(assignment.values()) == {"mul8s_1KV6"} else 0.4)

    assert toy(score, candidates=1, refine=10)[0].evaluated == 1 + 3 * 2 + 2  # the candidate is a uniform one


def test_moves_go_where_the_sensitivities_promise_most():
    """Where losses do add up, a promise is kept: moves are better than all that was known at their cost."""
    draw, asked = np.random.default_rng(0), []
    parts = {str(g): [str(g)] for g in range(10)}
    losses = {layer: dict(zip(THREE, [0, *np.sort(draw.exponential(size=2))], strict=True)) for layer in parts}

    def score(assignment):
        loss = sum(losses[layer][name] for layer, name in assignment.items())
        asked.append((power(assignment), loss))
        return Score(loss, loss, 0.9)

    def power(assignment):
        return sum(multiplier(name).power_mw * (1 + int(layer)) for layer, name in assignment.items())

    explore(parts, THREE, evaluate=score, price=power, candidates=2, refine=20, progress=False)
    kept = [not any(c <= one[0] and v <= one[1] for c, v in asked[:n]) for n, one in enumerate(asked)][-20:]
    assert sum(kept) >= 19, kept


@pytest.mark.parametrize("room", [15, 20, 99])
def test_the_effort_is_what_was_said(room):
    asked = {}

    def score(assignment):
        assert assignment_digest(assignment) not in asked, "nothing is run twice"
        return asked.setdefault(assignment_digest(assignment), sensitive(assignment))

    found = toy(score, candidates=6, budget=room)
    assert len(asked) == found[0].evaluated <= 27
    if room < 27:
        assert len(asked) == room
    else:  # it ends where every neighbour of the front is known, but of its broken members
        for one in found:
            near = [one.assignment | dict.fromkeys(part, name) for part in PARTS.values() for name in THREE]
            assert one.accuracy < 0.5 or all(assignment_digest(other) in asked for other in near)


def test_the_same_seed_makes_the_same_moves():
    def order(seed):
        asked = []
        toy(lambda one: (asked.append(one), sensitive(one))[1], candidates=4, refine=6, seed=seed)
        return asked

    assert order(1) == order(1)
    assert any(order(1) != order(seed) for seed in range(2, 6))


def test_the_objective_can_be_the_loss():
    def opposed(assignment):
        return replace(sensitive(assignment), divergence=-sensitive(assignment).loss)

    found = toy(opposed, candidates=27, refine=0, objective="loss")
    assert [one.loss for one in found] == pytest.approx([d - 1 for _, d in enumerated(sensitive)])


def test_scores_that_are_no_numbers_are_never_chosen():
    def breaking(assignment):
        return Score(*[float("inf")] * 2, 0.0) if assignment["c"] == "mul8s_1L2L" else sensitive(assignment)

    found = toy(breaking, budget=27, candidates=9)
    assert [one.divergence < np.inf for one in found] == [False] + [True] * (len(found) - 1)
    with pytest.raises(ValueError, match="Under the exact circuit"):
        toy(lambda one: Score(*[float("inf")] * 2, 0.0))


# ------------------------------------------------------------------------------ interrupted


def test_an_interrupted_search_runs_only_the_rest(tmp_path):
    calls = []

    def counted(assignment, stop=10**9):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(assignment)
        return sensitive(assignment)

    options = {"candidates": 5, "refine": 5, "seed": 3}
    whole = toy(counted, **options)
    n, file = len(calls), tmp_path / "deep" / "kept.json"
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        toy(Kept(lambda one: counted(one, stop=9), file, {"seed": 3}), **options)
    again = Kept(counted, file, {"seed": 3})
    assert len(calls) == 9 and toy(again, **options) == whole
    assert len(calls) == n and again.ran == n - 9 and len(again.used) == n
    assert [p.name for p in file.parent.iterdir()] == ["kept.json"], "nothing half-written stays"


def test_scores_of_another_search_are_refused(tmp_path):
    Kept(sensitive, tmp_path / "kept.json", {"regime": "one", "images": "same"})(dict.fromkeys(WEIGHT, THREE[0]))
    with pytest.raises(ValueError, match=r"kept.json was made by a search with other regime; .* delete"):
        Kept(sensitive, tmp_path / "kept.json", {"regime": "two", "images": "same"})


def test_an_assignment_is_known_by_its_tables():
    one, other = {"a": "mul8s_1L2J", "b": "mul8s_1KV6"}, {"b": "v1:mul8s_1KV8", "a": "v1:mul8s_1L2H"}
    assert assignment_digest(one) == assignment_digest(other)
    assert len({assignment_digest(a) for a in (one, {"a": "mul8s_1L2J"}, {"a": "mul8s_1KV6", "b": "mul8s_1L2J"})}) == 3


# ------------------------------------------------------------------------------ groups


def test_groups_of_a_mixture(hard):
    by_expert = groups(hard)
    assert list(moe.mixtures(hard)) == ["layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2"]
    experts = [f"{name}.experts.{e}" for name in moe.mixtures(hard) for e in range(2)]
    assert [name for name in by_expert if "experts" in name] == experts
    assert all(by_expert[name] == [name] for name in experts)
    by_layer = groups(hard, by="layer")
    name = next(iter(moe.mixtures(hard)))
    assert by_layer[name] == [f"{name}.experts.0", f"{name}.experts.1"]
    together = groups(hard, others="together")
    assert set(together) == {*experts, "others"}
    for parts in (by_expert, by_layer, together, groups(hard, by="each"), groups(hard, by="network")):
        assert sorted(itertools.chain(*parts.values())) == sorted(default_layers(hard))


def test_groups_of_a_cluster_are_its_networks(dense):
    cluster = upcycle(
        dense, topology="cluster", experts=3, gateway=models.resnet8(classes=3, width=0.25, shortcut="pad")
    )
    by_expert, by_layer = groups(cluster), groups(cluster, by="layer")
    assert list(by_expert) == ["experts.0", "experts.1", "experts.2"]
    assert all(len(layers) == len(default_layers(dense)) for layers in by_expert.values())
    assert list(by_layer) == default_layers(dense), "as in the dense network"
    assert all(len(layers) == 3 for layers in by_layer.values())
    assert len(groups(cluster, by="each")) == 3 * len(by_layer)


def test_groups_of_a_dense_network_are_its_layers(dense):
    assert groups(dense) == groups(dense, by="layer") == {name: [name] for name in default_layers(dense)}


# ------------------------------------------------------------------------------ trials


def test_validation_images_are_training_images_apart(textures):
    held = hold_out(textures, n=100, seed=1)
    rows = {tuple(x.flatten().tolist()) for x in held.x_test}
    rest = {tuple(x.flatten().tolist()) for x in held.x_train}
    everything = {tuple(x.flatten().tolist()) for x in textures.x_train}
    assert len(held.x_test) == 100 and not rows & rest and rows | rest == everything
    assert held.mean == textures.mean, "a network sees the same numbers"
    assert torch.equal(held.x_test, hold_out(textures, n=100, seed=1).x_test)
    assert not torch.equal(held.x_test, hold_out(textures, n=100, seed=2).x_test)
    where = {tuple(x.flatten().tolist()): int(y) for x, y in zip(textures.x_train, textures.y_train, strict=True)}
    assert all(where[tuple(x.flatten().tolist())] == y for x, y in zip(held.x_test, held.y_test, strict=True))


def test_a_trial_leaves_the_network_and_keeps_one_range(hard, textures):
    before = copy.deepcopy(hard.state_dict())
    trial = Trial(hard, textures, n=64, calibrate_options={"n": 50})
    exact = trial.place(dict.fromkeys(default_layers(hard), "mul8s_1KV6"))
    mixed = dict.fromkeys(default_layers(hard), "mul8s_1L2L") | {"layer1.0.conv1": "mul8s_1KVM"}
    placed = trial.place(mixed)
    assert assignment_of(placed) == mixed and not assignment_of(hard)
    assert all(torch.equal(value, before[name]) for name, value in hard.state_dict().items())
    for name in mixed:
        assert torch.equal(placed.get_submodule(name).scale_x, exact.get_submodule(name).scale_x)
    few = trial.place({"layer1.0.conv1": "mul8s_1L2L"})
    assert list(assignment_of(few)) == ["layer1.0.conv1"], "the others are exact floats"
    assert trial.score({}).divergence == pytest.approx(0, abs=1e-9)
    rounded = Trial(hard, textures, n=64, calibrate_options={"n": 50, "per_channel": True}).place(mixed)
    assert all(rounded.get_submodule(name).per_channel for name in mixed)


def test_every_expert_is_corrected_even_an_idle_one(hard, textures):
    network = copy.deepcopy(hard)
    for layer in moe.mixtures(network).values():
        torch.nn.init.zeros_(layer.gate.score.weight)
        layer.gate.score.bias.data = torch.tensor([5.0, -5.0])  # nobody goes to the second expert
    placed = Trial(network, textures, n=64, calibrate_options={"n": 50}).place(
        dict.fromkeys(default_layers(network), "mul8s_1L2L")
    )
    assert all(layer.bias is not None for name, layer in approximable(placed).items() if "experts" in name)


def test_regimes_heal_differently(dense, textures):
    cheap = dict.fromkeys(default_layers(dense), "mul8s_1L2L")
    scores, calls = {}, []
    for regime in ("not retrained", "bias corrected", "norms refreshed"):
        trial = Trial(dense, textures, n=64, regime=regime, calibrate_options={"n": 50})
        scores[regime] = trial.score(cheap)
        assert trial.score(cheap) == scores[regime], "nothing is left over from the one before"
    assert len({score.divergence for score in scores.values()}) == 3
    assert scores["bias corrected"].divergence < scores["not retrained"].divergence
    Trial(dense, textures, n=64, regime="mine", prepare=calls.append).score(cheap)
    assert [assignment_of(network) for network in calls] == [cheap]


def test_a_score_by_hand(dense, textures):
    trial = Trial(dense, textures, n=64, regime="not retrained", calibrate_options={"n": 50})
    assignment = dict.fromkeys(default_layers(dense), "mul8s_1KX5")
    x = trial.held.normalised(trial.held.x_test)
    with torch.no_grad():
        p = dense.eval()(x).double().softmax(1)
        q = trial.place(assignment).eval()(x).double().softmax(1)
    score = trial.score(assignment)
    assert score.divergence == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-4)
    assert score.loss == pytest.approx(torch.nn.functional.nll_loss(q.log(), trial.held.y_test).item(), rel=1e-4)
    assert score.accuracy == (q.argmax(1) == trial.held.y_test).double().mean().item()


# ------------------------------------------------------------------------------ a real network


def test_sensitivities_add_up_in_cost_and_serve_the_search(hard, textures, base, tmp_path):
    parts = groups(hard, by="layer")
    options = {"base": base, "checkpoint": tmp_path / "scores.json", **PLAIN}
    rows = sensitivity(hard, textures, parts, THREE, **options)
    assert [(row["group"], row["multiplier"]) for row in rows] == list(itertools.product(parts, THREE[1:]))
    macs = Trial(hard, textures, n=64, calibrate_options={"n": 50}).macs
    exact, cheap = (cost.price(macs, dict.fromkeys(default_layers(hard), m), base=base).p_norm for m in THREE[::2])
    saved = sum(row["saved"] for row in rows if row["multiplier"] == THREE[2])
    assert saved == pytest.approx(exact - cheap)
    first = json.loads((tmp_path / "scores.json").read_text())["scores"]
    found = search(hard, textures, THREE, groups=parts, candidates=3, refine=2, **options)
    second = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert len(first) == len(rows) + 1 and first.items() <= second.items()
    assert len(second) == found[0].evaluated <= len(rows) + 1 + 3 + 2 + 2
    assert all(
        later.p_norm > one.p_norm and later.divergence < one.divergence for one, later in itertools.pairwise(found)
    )


def test_experts_that_nobody_uses_save_nothing(hard, textures, base):
    network = copy.deepcopy(hard)
    for layer in moe.mixtures(network).values():
        torch.nn.init.zeros_(layer.gate.score.weight)
        layer.gate.score.bias.data = torch.tensor([5.0, -5.0])
    parts = {name: layers for name, layers in groups(network).items() if "experts" in name}
    rows = sensitivity(network, textures, parts, THREE[::2], base=base, **PLAIN)
    for row in rows:
        assert (row["saved"] > 0) == row["group"].endswith(".0"), row["group"]
        assert row["group"].endswith(".0") or row["more_divergence"] == 0


def test_the_search_never_looks_at_the_test_images(dense, textures, base):
    parts = groups(dense, by="network")
    found = search(dense, textures, PAPER_EIGHT, groups=parts, base=base, candidates=2, refine=0, **PLAIN)
    other = replace(textures, x_test=255 - textures.x_test, y_test=textures.y_test.flip(0))
    assert search(dense, other, PAPER_EIGHT, groups=parts, base=base, candidates=2, refine=0, **PLAIN) == found


def test_report_agrees_with_the_study(dense, hard, textures, base):
    for network in (dense, hard):
        rows = report(network, textures, uniform(network, THREE[1:]), base=base, regime="not retrained", **PLAIN)
        study_rows = list(study.measure(network, textures, THREE[1:], base=base, progress=False))
        assert [row["p_norm"] for row in rows] == [row["p_norm"] for row in study_rows]
        for row in rows:
            right = study.unpack_answers(row["answers"], 64)
            assert right.sum() == row["correct"] == 64 * row["top1"] and row["n_test"] == 64
            assert row["multipliers"] == 1 and row["digest"] == assignment_digest(json.loads(row["assignment"]))
            assert 0 <= row["divergence"] < np.inf and row["n_validation"] == 64
            assert network is hard or row["p_norm_routed"] == pytest.approx(row["p_norm"])


# ------------------------------------------------------------------------------ errors


def test_errors_say_what_to_do(dense, hard, textures, base):
    def look(network=dense, multipliers=THREE, **options):
        return search(network, textures, multipliers, base=base, **{**PLAIN, **options})

    for message, call in {
        "No multiplier is called 'mul8s_1L2K'": lambda: look(multipliers=["mul8s_1L2K"]),
        "multipliers is the text 'mul8s_1L2J'": lambda: look(multipliers="mul8s_1L2J"),
        "there are no groups": lambda: look(groups={}),
        "group 'x' has no layers": lambda: look(groups={"x": []}),
        "'conv1' is in two groups": lambda: look(groups={"x": ["conv1"], "y": ["conv1"]}),
        "Group 'x' names layer 'conv9'; this ResNet has conv1": lambda: look(groups={"x": ["conv9"]}),
        r"budget is 5; .* need \d+ networks": lambda: look(budget=5),
        "objective is 'top1'": lambda: look(objective="top1"),
        "candidates is 0": lambda: look(candidates=0),
        "regime is 'retrained'": lambda: look(regime="retrained"),
        "256 of the 256 training images": lambda: look(n=256),
        "by is 'experts'": lambda: groups(hard, by="experts"),
        "others is 'none'": lambda: groups(hard, others="none"),
        "no layer to approximate": lambda: groups(torch.nn.Sequential(torch.nn.ReLU())),
        "approximate layers already": lambda: look(
            Trial(dense, textures, n=64).place({"conv1": "mul8s_1L2J"}), candidates=2
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_multiplier_without_a_power_has_no_price(dense, textures, base, monkeypatch):
    from axmoe_lite.search import space

    powerless = replace(multiplier("mul8s_1L2J"), name="mine", power_mw=None)
    monkeypatch.setattr(space, "multiplier", lambda name: powerless if name == "mine" else multiplier(name))
    with pytest.raises(ValueError, match="The power of multiplier 'mine' is not known"):
        search(dense, textures, ["mine"], base=base, **PLAIN)

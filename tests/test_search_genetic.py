"""All searches against trying everything; NSGA-II and ranking against what is slow and obvious."""

import itertools
import json
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from axmoe_lite import PAPER_EIGHT, cost, layers, models, multiplier
from axmoe_lite.multipliers.tuning import weight_map
from axmoe_lite.search import Score, Trial, additive, explore, genetic, ranking, search, sensitivity, uniform
from axmoe_lite.search.trial import Kept, assignment_digest
from axmoe_lite.train import fit

THREE = ["mul8s_1KV6", "mul8s_1L2J", "mul8s_1L2L"]
PARTS = {"a": ["a"], "b": ["b1", "b2"], "c": ["c"], "d": ["d"]}
WEIGHT = {"a": 1, "b1": 3, "b2": 4, "c": 5, "d": 2}
FOUR = {  # the layers of the real network, in four groups
    "stem": ["conv1"],
    "first": ["layer1.0.conv1", "layer1.0.conv2"],
    "second": ["layer2.0.conv1", "layer2.0.conv2"],
    "third": ["layer3.0.conv1", "layer3.0.conv2"],
}
PLAIN = {"n": 64, "progress": False, "regime": "not retrained", "calibrate_options": {"n": 50}}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def dense(textures):
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    fit(network, textures, epochs=3, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


@pytest.fixture(scope="module")
def base(dense, textures):
    return cost.count(dense, textures.normalised(textures.x_test[:1]))


@pytest.fixture(scope="module")
def real(dense, textures, base, tmp_path_factory):
    """(price, divergence) of all 81 assignments of the real network, and a file that holds their scores."""
    trial = Trial(dense, textures, **{key: value for key, value in PLAIN.items() if key != "progress"})
    file = tmp_path_factory.mktemp("real") / "scores.json"
    evaluate = Kept(trial.score, file, trial.settings)
    return everything(FOUR, evaluate, lambda one: cost.price(trial.macs, one, base=base).p_norm), file


def price(assignment):
    return sum(WEIGHT[layer] * multiplier(name).power_mw for layer, name in assignment.items())


def sensitive(assignment):
    """Losses add up: b bears anything, a and d a little, c nothing."""
    bad = {"mul8s_1KV6": 0.0, "mul8s_1L2J": 1.0, "mul8s_1L2L": 4.0}
    harm = {"a": 0.3, "b1": 0.01, "c": 2.0, "d": 0.31}
    loss = sum(harm[layer] * bad[assignment[layer]] for layer in harm)
    return Score(loss, 1 + loss, 0.9)


def entangled(assignment):
    """As :func:`sensitive`, but cheap a and cheap d hurt each other, and cheap c is harmless once b is cheap."""
    cheap = {layer for layer, name in assignment.items() if name == "mul8s_1L2L"}
    loss = sensitive(assignment).loss + 5.0 * ({"a", "d"} <= cheap) - 7.5 * ({"b1", "c"} <= cheap)
    return Score(loss, 1 + loss, 0.9)


def everything(parts, evaluate, pay):
    """(price, divergence) of all assignments."""
    found = []
    for chosen in itertools.product(THREE, repeat=len(parts)):
        assignment = {layer: name for part, name in zip(parts.values(), chosen, strict=True) for layer in part}
        found.append((round(pay(assignment), 9), evaluate(assignment).divergence))
    return found


def best(points):
    """Those that no other is at least as good as in both, each once."""
    points = set(points)
    return sorted(p for p in points if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points))


def volume(points, corner):
    """The area between a front and a corner that is worse in both: the two-dimensional hypervolume, slice by slice."""
    front = best(points)
    ends = [*(p[0] for p in front[1:]), corner[0]]
    return sum((end - p[0]) * (corner[1] - p[1]) for p, end in zip(front, ends, strict=True))


def share(points, of):
    """How much of the hypervolume of all that is possible was found, 1 at most if it is among the possible."""
    corner = [1.05 * max(p[i] for p in of) for i in (0, 1)]
    return volume(points, corner) / volume(of, corner)


def points(found):
    return [(round(one.p_norm, 9), one.divergence) for one in found]


def of_groups(evaluate=sensitive, **options):
    return genetic.explore(PARTS, THREE, evaluate=evaluate, price=price, progress=False, **options)


def line(x):
    """Five genes of four values: the sum is the cost, and what is missing, weighted, is the loss."""
    return float(x.sum()), float(((3 - x) * [5, 4, 3, 2, 1]).sum())


# ------------------------------------------------------------------------------ against trying everything

EXPLORERS = {  # how to explore, its options, how many of 81 it may run, the least share of their hypervolume
    "sensitivities and moves": (explore, {"candidates": 8, "refine": 8}, 27, 0.94),
    "a little of it": (explore, {"candidates": 4, "refine": 2}, 17, 0.85),
    "genetic": (genetic.explore, {}, 81, 1.0),
    "a little genetic": (genetic.explore, {"population": 8, "budget": 30}, 30, 0.93),
    "ranking": (ranking.explore, {}, 15, 0.83),
}
SEARCHES = {  # the same of searches on a network
    "experts": (search, {"groups": FOUR, "candidates": 8, "refine": 8}, 27, 0.95),
    "genetic": (genetic.search, {"groups": FOUR}, 81, 1.0),
    "a little genetic": (genetic.search, {"groups": FOUR, "population": 8, "budget": 27}, 27, 0.9),
    "ranking": (ranking.search, {"groups": FOUR}, 15, 0.8),
}


@pytest.mark.parametrize("evaluate", [sensitive, entangled])
@pytest.mark.parametrize("name", EXPLORERS)
def test_how_near_each_comes_without_a_network(name, evaluate):
    method, options, most, least = EXPLORERS[name]
    found = method(PARTS, THREE, evaluate=evaluate, price=price, progress=False, **options)
    reached = share(points(found), everything(PARTS, evaluate, price))
    assert least - 1e-9 <= reached <= 1 + 1e-9, f"{reached:.4f} by {found[0].evaluated} of 81"
    assert found[0].evaluated <= most
    assert all(one.divergence == evaluate(one.assignment).divergence for one in found), "measured, not foretold"


@pytest.mark.parametrize("name", SEARCHES)
def test_how_near_each_comes_on_a_network(name, dense, textures, base, real):
    method, options, most, least = SEARCHES[name]
    found = method(dense, textures, THREE, base=base, **PLAIN, **options)
    reached = share(points(found), real[0])
    assert reached >= least - 1e-9, f"{reached:.4f} by {found[0].evaluated} networks"
    assert found[0].evaluated <= most
    if options.get("groups") is FOUR:
        assert set(points(found)) <= set(real[0]), "the same scores and prices"


def test_the_share_by_hand():
    """With corner (1.05, 1.05), (0, 0) holds 1.05 ** 2, the others among it; (0.5, 0.5) alone holds 0.55 ** 2."""
    possible = [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)]
    assert share([(0.5, 0.5)], possible) == pytest.approx(0.55**2 / 1.05**2)
    both = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]  # 0.5 * 0.05 + 0.5 * 0.55 + 0.05 * 1.05
    assert volume(both, (1.05, 1.05)) == pytest.approx(0.025 + 0.275 + 0.0525)


# ------------------------------------------------------------------------------ evolution


@pytest.mark.parametrize("evaluate", [sensitive, entangled])
@pytest.mark.parametrize("seed", range(3))
def test_enough_generations_find_the_front_itself(evaluate, seed):
    asked = []
    found = of_groups(lambda one: (asked.append(assignment_digest(one)), evaluate(one))[1], seed=seed)
    assert points(found) == best(everything(PARTS, evaluate, price))
    assert len(asked) == len(set(asked)) == found[0].evaluated == 81, "it ends where everything is known"
    first = list(asked)
    of_groups(lambda one: (asked.append(assignment_digest(one)), evaluate(one))[1], seed=seed + 1)
    assert asked[81:] != first, "the seed is handed on"


def test_evolution_beats_chance_by_far():
    """1,048,576 individuals, of which 640 are tried; the front of this sum is known exactly."""
    draw = np.random.default_rng(0)
    costs, losses = draw.random((10, 4)), draw.exponential(size=(10, 4))

    def evaluate(x):
        return costs[np.arange(10), x].sum(), losses[np.arange(10), x].sum()

    chance = [evaluate(x) for x in draw.integers(0, 4, (640, 10))]
    ideal = [evaluate(x) for x in additive.front(costs, losses)]
    corner = costs.max(1).sum(), losses.max(1).sum()
    for seed in range(3):
        found = genetic.evolve([4] * 10, evaluate=evaluate, seed=seed, **QUIET)
        assert found.evaluated <= 640
        assert volume(map(tuple, found.objectives.tolist()), corner) > 0.97 * volume(ideal, corner)
    assert volume(chance, corner) < 0.9 * volume(ideal, corner)


def test_the_front_is_that_of_all_that_ever_lived():
    seen = {}

    def evaluate(x):
        assert x.dtype == np.int64 and tuple(x) not in seen, "each is evaluated once"
        return seen.setdefault(tuple(x), line(x))

    found = genetic.evolve([4] * 5, evaluate=evaluate, population=6, generations=30, **QUIET)
    assert found.evaluated == len(seen) <= 180 and best(seen.values()) == [tuple(o) for o in found.objectives.tolist()]
    assert len(found.objectives) > 6, "more than live at a time"
    assert [seen[tuple(x)] for x in found.choices] == [tuple(o) for o in found.objectives]


def test_genes_may_have_different_numbers_of_values():
    sizes, seen = [1, 2, 5, 3], []
    genetic.evolve(sizes, evaluate=lambda x: (seen.append(tuple(x)), (0.0, float(x.sum())))[1], mutation=1.0, **QUIET)
    assert set(seen) == set(itertools.product(*map(range, sizes))), "all 30, and nothing else"
    one = genetic.evolve([1], evaluate=lambda x: (1.0, 2.0), **QUIET)
    assert one.choices.tolist() == [[0]] and one.evaluated == 1


def test_operators_do_what_they_are_told():
    start = np.array([[0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 2, 2], [0, 1, 2, 0]])

    def born(**options):
        seen = []
        evaluate = lambda x: (seen.append(tuple(x)), (float(x.sum()), float(9 - x[0])))[1]  # noqa: E731
        genetic.evolve([5] * 4, evaluate=evaluate, start=start, population=4, generations=9, **QUIET, **options)
        return seen

    assert born(crossover=0, mutation=0) == [tuple(x) for x in start.tolist()], "nobody new can be born"
    crossed = born(crossover=1, mutation=0)
    assert len(crossed) > 4 and all(set(x) <= {0, 1, 2} for x in crossed), "values travel, none is made"
    first_child = born(crossover=0, mutation=1)[4]
    assert any(all(a != b for a, b in zip(first_child, parent, strict=True)) for parent in start), (
        "every gene is another"
    )


@pytest.mark.parametrize("budget", [1, 5, 33, 50])
def test_the_budget_is_kept(budget):
    seen = []
    evaluate = lambda x: (seen.append(tuple(x)), line(x))[1]  # noqa: E731
    found = genetic.evolve([4] * 5, evaluate=evaluate, budget=budget, **QUIET)
    assert len(seen) == len(set(seen)) == found.evaluated == budget
    plain = []
    genetic.evolve([4] * 5, evaluate=lambda x: (plain.append(tuple(x)), line(x))[1], **QUIET)
    assert plain[:budget] == seen, "it only ends earlier"


def test_the_same_seed_evolves_the_same_and_disturbs_nobody(capfd, monkeypatch):
    import pymoo.functions
    from pymoo.config import Config

    monkeypatch.setattr(pymoo.functions.FunctionLoader, "_FunctionLoader__instance", None)
    monkeypatch.setattr(pymoo.functions, "is_compiled", lambda: False)  # pymoo would say so, once
    before = np.random.get_state()[1].tobytes(), random.getstate(), torch.get_rng_state().tolist()
    runs = [genetic.evolve([4] * 5, evaluate=line, budget=100, seed=seed, **QUIET) for seed in (3, 3, 4, 5)]
    assert (np.random.get_state()[1].tobytes(), random.getstate(), torch.get_rng_state().tolist()) == before
    assert capfd.readouterr() == ("", "") and Config.warnings["not_compiled"] is True
    assert np.array_equal(runs[0].choices, runs[1].choices) and np.array_equal(runs[0].objectives, runs[1].objectives)
    assert any(not np.array_equal(runs[0].choices, other.choices) for other in runs[2:])


def test_a_broken_network_has_no_children():
    """Without a number every value of gene 0 but 3 looks best; only what is cheapest of all stays on the front."""
    seen = []

    def evaluate(x):
        seen.append(x.copy())
        return float(x.sum()), float("inf") if x[0] < 3 else float(20 - x.sum())

    found = genetic.evolve([4] * 5, evaluate=evaluate, population=8, generations=12, start=[[3] * 5, [0] * 5], **QUIET)
    assert np.isinf(found.objectives[:, 1]).sum() <= 1 and found.objectives[-1].tolist() == [15.0, 5.0]
    later = np.array(seen[len(seen) // 2 :])
    assert (later[:, 0] == 3).mean() > 0.5, "a quarter by chance; mutation breaks one in five"
    hopeless = genetic.evolve([2, 2], evaluate=lambda x: (float(x.sum()), float("inf")), population=2, **QUIET)
    assert hopeless.choices.tolist() == [[0, 0]] and hopeless.evaluated == 4


def test_scores_that_are_kept_are_not_asked_for_again(tmp_path):
    calls, options = [], {"population": 8, "generations": 6, "seed": 2}

    def counted(assignment, stop=10**9):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(assignment)
        return entangled(assignment)

    whole, n = of_groups(counted, **options), len(calls)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        of_groups(Kept(lambda one: counted(one, stop=20), tmp_path / "kept.json"), **options)
    again = Kept(counted, tmp_path / "kept.json")
    assert of_groups(again, **options) == whole and again.ran == n - 20
    third = Kept(counted, tmp_path / "kept.json")
    assert of_groups(third, **options) == whole and third.ran == 0 and len(third.used) == n


def test_a_search_goes_on_from_its_file(dense, textures, base, real, monkeypatch):
    monkeypatch.setattr(Trial, "score", lambda *_: pytest.fail("all of it is in the file"))
    for method in (genetic.search, ranking.search):
        method(dense, textures, THREE, base=base, groups=FOUR, checkpoint=real[1], **PLAIN)


@pytest.mark.parametrize("method", [genetic.search, ranking.search])
def test_a_search_leaves_the_network_and_never_looks_at_the_test_images(method, dense, textures, base, real):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    options = {"base": base, "groups": FOUR, "checkpoint": real[1], **PLAIN}
    found = method(dense, textures, THREE, **options)
    other = replace(textures, x_test=255 - textures.x_test, y_test=textures.y_test.flip(0))
    few = {"checkpoint": None} | ({"population": 4, "generations": 2} if method is genetic.search else {"points": 2})
    some = method(dense, textures, THREE[::2], **{**options, **few})
    assert method(dense, other, THREE[::2], **{**options, **few}) == some
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    prices, lost = [one.p_norm for one in found], [one.divergence for one in found]
    assert prices == sorted(prices) and lost == sorted(lost, reverse=True), "from the cheapest to the dearest"


def test_the_objective_can_be_the_loss():
    def opposed(assignment):
        return replace(sensitive(assignment), divergence=-sensitive(assignment).loss)

    wanted = [d - 1 for _, d in best(everything(PARTS, sensitive, price))]
    assert [one.loss for one in of_groups(opposed, objective="loss")] == pytest.approx(wanted)
    found = ranking.explore(PARTS, THREE, evaluate=opposed, price=price, objective="loss", progress=False)
    assert [one.loss for one in found] == sorted((one.loss for one in found), reverse=True) and len(found) > 5


def test_uniform_assignments_are_in_the_first_generation(dense):
    parts, seen = {name: [name] for name in layers.default_layers(dense)}, []
    evaluate = lambda one: (seen.append(one), Score(1.0, 1.0, 0.5))[1]  # noqa: E731
    genetic.explore(parts, PAPER_EIGHT, evaluate=evaluate, price=lambda one: 1.0, generations=1, progress=False)
    assert all(one in seen[:8] for one in uniform(dense, PAPER_EIGHT)) and len(seen) == 32


# ------------------------------------------------------------------------------ ranking


def test_a_ranking_by_hand():
    """L2J alone: a adds 0.3 at weight 1, b 0.01 at 7, c 2 at 5, d 0.31 at 2: b, d (0.155), a (0.3), c (0.4).

    Weights approximated by k: 0, 7, 9, 10, 15. Five even steps ask for 0, 3.75, 7.5, 11.25 and 15: so 0, 7, 10, 15.
    """
    asked = []
    evaluate = lambda one: (asked.append(one), sensitive(one))[1]  # noqa: E731
    found = ranking.explore(PARTS, THREE[1:2], evaluate=evaluate, price=price, points=5, progress=False)
    changed = [{part for part, names in PARTS.items() if one[names[0]] != "mul8s_1KV6"} for one in asked]
    singles, prefixes = [{"a"}, {"b"}, {"c"}, {"d"}], [{"a", "b", "d"}, {"a", "b", "c", "d"}]
    assert changed == [set(), *singles, *prefixes], "{b} alone is the first prefix, and is not asked for twice"
    assert found[0].evaluated == 7
    assert [one.divergence for one in found] == pytest.approx([1 + loss for loss in (2.62, 0.62, 0.01, 0)])


def test_what_saves_nothing_comes_last():
    """Group a is never used: it costs the same under anything. Group d breaks: it comes last of those that save."""

    def evaluate(one):
        return Score(1.0, float("inf"), 0.0) if one["d"] == "mul8s_1L2L" else sensitive(one)

    def unused(one):
        return price(one | {"a": "mul8s_1KV6"})

    order = ranking.rank(np.array([-1.0, 0.04, 8.0, np.inf]), np.array([0.0, 7.0, 5.0, 2.0]))
    assert order.tolist() == [1, 2, 3, 0]
    found = ranking.explore(PARTS, THREE[2:], evaluate=evaluate, price=unused, points=5, progress=False)
    assert {one.assignment["a"] for one in found} == {"mul8s_1KV6"}
    assert [one.divergence < np.inf for one in found] == [False] + [True] * (len(found) - 1)


def test_points_are_spread_by_cost():
    found = {}
    for some in (2, 3, 5, 99):
        asked = []
        evaluate = lambda one, to=asked: (to.append(one), sensitive(one))[1]  # noqa: E731
        ranking.explore(PARTS, THREE[1:2], evaluate=evaluate, price=price, points=some, progress=False)
        found[some] = [sum(WEIGHT[n] for n in one if one[n] != "mul8s_1KV6") for one in asked[5:]]
    # Of 0, 7, 9, 10 and 15, see above. Half way is 7.5, where b is, which was asked for alone.
    assert found == {2: [15], 3: [15], 5: [10, 15], 99: [9, 10, 15]}


def test_the_ranking_is_by_the_sensitivities(dense, textures, base, real, tmp_path):
    options = {"base": base, "checkpoint": tmp_path / "scores.json", **PLAIN}
    rows = sensitivity(dense, textures, FOUR, THREE, **options)
    found = ranking.search(dense, textures, THREE, groups=FOUR, points=99, **options)
    kept = json.loads((tmp_path / "scores.json").read_text())["scores"]
    wanted, exact = set(), dict.fromkeys(itertools.chain(*FOUR.values()), "mul8s_1KV6")
    for name in THREE[1:]:
        mine = [row for row in rows if row["multiplier"] == name]
        mine.sort(key=lambda row: row["more_divergence"] / row["saved"])
        for k in range(5):
            cheap = [layer for row in mine[:k] for layer in FOUR[row["group"]]]
            wanted.add(assignment_digest(exact | dict.fromkeys(cheap, name)))
        for row in mine:
            wanted.add(assignment_digest(exact | dict.fromkeys(FOUR[row["group"]], name)))
    assert set(kept) == wanted and found[0].evaluated == len(wanted) == 1 + 2 * (4 + 3)


# ------------------------------------------------------------------------------ errors


def test_errors_say_what_to_do(dense, textures, base):
    def evolve(genes=(3, 3), **options):
        return genetic.evolve(genes, evaluate=lambda x: pytest.fail("before anything is run"), **QUIET, **options)

    def look(method=genetic.search, multipliers=THREE, **options):
        return method(dense, textures, multipliers, base=base, **{**PLAIN, **options})

    for message, call in {
        r"genes is \[\]; .* such as \[3, 3, 2\]": lambda: evolve([]),
        r"genes is \[2, 0\]": lambda: evolve([2, 0]),
        r"genes is \[2.5\]": lambda: evolve([2.5]),
        "population is 1, generations 20": lambda: evolve(population=1),
        "generations 0": lambda: evolve(generations=0),
        "budget 0": lambda: evolve(budget=0),
        "crossover is 1.5; it is a probability": lambda: evolve(crossover=1.5),
        "mutation is -1": lambda: evolve(mutation=-1),
        r"start is of shape \[1, 3\]; it needs whole numbers \[S, 2\]": lambda: evolve(start=[[0, 0, 0]]),
        r"start is of shape \[1, 2\]": lambda: evolve(start=[[0, 3]]),
        "population is 2, but 3 individuals .* give at least 3": lambda: evolve(population=2, start=[[0, 0]] * 3),
        r"evaluate\(\) answered \(0.0, nan\) for \[\d, \d\]": lambda: genetic.evolve(
            [3, 3], evaluate=lambda x: (0, float("nan")), **QUIET
        ),
        "population is 2, but 3 individuals": lambda: look(population=2),
        "No multiplier is called 'mul8s_1L2K'": lambda: look(multipliers=["mul8s_1L2K"]),
        "there are no groups": lambda: look(groups={}),
        "'conv1' is in two groups": lambda: look(ranking.search, groups={"x": ["conv1"], "y": ["conv1"]}),
        "conv9": lambda: look(ranking.search, groups={"x": ["conv9"]}),
        "conv8": lambda: look(groups={"x": ["conv8"]}),
        "objective is 'top1'": lambda: look(objective="top1"),
        "objective is 'top5'": lambda: look(ranking.search, objective="top5"),
        "points is 1; at least 2": lambda: look(ranking.search, points=1),
        "Under the exact circuit": lambda: ranking.explore(
            PARTS, THREE, evaluate=lambda _: Score(float("inf"), float("inf"), 0.0), price=price, progress=False
        ),
        r"The distribution of activations is \[255\]": lambda: weight_map(multiplier("drum(4)"), a=torch.ones(255)),
        "finite shares, none negative": lambda: weight_map(multiplier("drum(4)"), a=-torch.ones(256)),
        "not all zero": lambda: weight_map(multiplier("drum(4)"), a=torch.zeros(256)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="populaton"):
        look(populaton=4)


def test_without_pymoo_it_says_what_to_install(dense, textures, base, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    monkeypatch.setattr(Trial, "__init__", lambda *_, **__: pytest.fail("before anything is run"))
    for call in (
        lambda: genetic.evolve([2], evaluate=line, **QUIET),
        lambda: genetic.search(dense, textures, THREE, base=base, **PLAIN),
    ):
        with pytest.raises(ImportError, match=r'pip install "axmoe_lite\[search\]"'):
            call()

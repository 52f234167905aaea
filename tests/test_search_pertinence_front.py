"""Fronts of dispatchers: bred, restarted, reported on images that nobody chose by, and kept for some frames."""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from axmoe_lite import models
from axmoe_lite.claims import paired_bootstrap
from axmoe_lite.search import dominates
from axmoe_lite.search.pertinence import (
    WEIGHTINGS,
    Pool,
    best_single,
    cascade,
    cheapest,
    choose,
    class_weights,
    fit,
    follow,
    ideal,
    look,
    mixed,
    ratios,
    report,
    routes,
    scene_change,
    score,
    search,
    sequence,
    singles,
    thirds,
    when,
)
from axmoe_lite.study import unpack_answers

evolve = sys.modules["axmoe_lite.search.pertinence.evolve"]
SMALL = {"population": 8, "generations": 4, "epochs": 3, "lr": 0.02, "progress": False}


def random_pool(n=400, N=3, F=5, seed=0):
    """Harder images have a larger first feature; the dearer a network, the harder the images that it bears."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(n, F, generator=draw)
    level = features[:, 0] + 0.3 * torch.randn(n, generator=draw)
    correct = torch.stack([level < t for t in torch.linspace(0, 1.5, N).tolist()], 1)
    confidence = torch.sigmoid(1 - level)[:, None].expand(-1, N) * torch.linspace(0.9, 1, N)
    return Pool("abcdef"[:N], [1.0, 4, 16][:N], correct, features, "a", 0.9, confidence=confidence)


@pytest.fixture(scope="module")
def pool():
    return random_pool()


@pytest.fixture(scope="module")
def split(pool):
    return thirds(len(pool), seed=3)


@pytest.fixture(scope="module")
def found(pool, split):
    return search(pool, split, **SMALL)


def points(found):
    return [(one.cost, one.accuracy) for one in found]


# ------------------------------------------------------------------------------ the search


def test_a_front_is_what_its_layers_do_on_the_search_images(pool, split, found):
    assert len(found) > 3 and 16 < found[0].evaluated <= 32
    assert all(b.cost > a.cost and b.accuracy > a.accuracy for a, b in itertools.pairwise(found))
    labels = routes(pool.correct)[split.fit]
    for one in found:
        chosen = (pool.features[split.search] @ one.weight.T + one.bias).argmax(1)
        assert one.accuracy == pool.correct[split.search, chosen].double().mean().item()
        assert one.cost == pytest.approx(pool.paid[chosen].mean().item())
        assert one.penalties.diagonal().eq(0).all() and one.penalties.max() <= 100
        weights = class_weights(labels, 3, one.weighting)
        again = fit(pool.features[split.fit], labels, one.penalties[None], weights[None], epochs=3, lr=0.02)
        assert torch.allclose(again.weight[0], one.weight, atol=1e-4), "trained as it says"


def test_the_front_is_that_of_everything_evaluated(pool, split, found, tmp_path):
    from safetensors.torch import load_file

    search(pool, split, checkpoint=tmp_path / "evolved.safetensors", **SMALL)
    kept = load_file(tmp_path / "evolved.safetensors")
    everything = [(cost, -minus) for cost, minus in kept["objectives"].tolist()]
    assert len(everything) == found[0].evaluated
    best = {p for p in everything if not any(o != p and o[0] <= p[0] and o[1] >= p[1] for o in everything)}
    assert set(points(found)) == best and len(best) < len(set(everything))
    kinds, penalties = kept["genes"][:, -1], kept["genes"][:, :-1].view(-1, 3, 3)
    assert set(kinds.tolist()) == {0, 1, 2}, "a weighting is never something between two"
    assert penalties.min() >= 0 and 90 < penalties.max() <= 100 and penalties.diagonal(dim1=1, dim2=2).eq(0).all()


def test_an_interrupted_search_goes_on_and_trains_nothing_twice(pool, split, found, tmp_path, monkeypatch):
    file, trained, plain = tmp_path / "evolved.safetensors", [], evolve.fit

    def counted(features, labels, penalties, *rest, **options):
        trained.append(len(penalties))
        return plain(features, labels, penalties, *rest, **options)

    monkeypatch.setattr(evolve, "fit", counted)
    search(pool, split, checkpoint=file, **{**SMALL, "generations": 2})
    assert len(trained) == 2 and trained[0] == 8, "a generation is trained at once"
    again = search(pool, split, checkpoint=file, **SMALL)
    assert len(trained) == 4 and sum(trained) == found[0].evaluated and points(again) == points(found)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(again, found, strict=True))
    search(pool, split, checkpoint=file, **SMALL)
    assert len(trained) == 4
    for message, options in {
        "made with other options": {"lr": 0.03},
        "made with other start": {"start": ratios(3, steps=1)},
    }.items():
        with pytest.raises(ValueError, match=message):
            search(pool, split, checkpoint=file, **{**SMALL, **options})
    with pytest.raises(ValueError, match="made with other pool"):
        search(random_pool(seed=1), split, checkpoint=file, **SMALL)
    with pytest.raises(ValueError, match="made with other split"):
        search(pool, thirds(len(pool), seed=4), checkpoint=file, **SMALL)


def test_the_final_images_are_not_looked_at(pool, split, found):
    correct, features = pool.correct.clone(), pool.features.clone()
    correct[split.final] = ~correct[split.final]
    features[split.final] = 9.0
    same = search(replace(pool, correct=correct, features=features), split, **SMALL)
    assert points(same) == points(found)
    correct = pool.correct.clone()
    correct[split.search] = ~correct[split.search]
    assert points(search(replace(pool, correct=correct), split, **SMALL)) != points(found), "but these are"


def test_seeds_matter_and_nobody_elses_random_numbers_do(pool, split, found):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert points(search(pool, split, **SMALL)) == points(found)
    assert torch.equal(before[0], torch.get_rng_state()) and np.random.get_state()[1].tolist() == before[1]
    assert points(search(pool, split, seed=1, **SMALL)) != points(found)


def test_who_differs_on_the_diagonal_alone_is_not_trained_again():
    genes = np.random.default_rng(0).uniform(0, 100, (2, 5))
    genes[1] = genes[0]
    genes[1, 0], genes[1, 3] = 1.0, 2.0  # N = 2: the genes are P00 P01 P10 P11 and the weighting
    expressed = evolve._without_diagonal(genes)
    assert expressed[0].tolist() == [0, genes[0, 1], genes[0, 2], 0, genes[0, 4]] == expressed[1].tolist()


def test_children_take_the_weighting_of_a_parent_or_mutate():
    """All parents have weighting 1: without mutation all children have; with certain mutation of each gene none has."""
    given = np.full((6, 5), 50.0)
    given[:, :4] += np.arange(24).reshape(6, 4)
    given[:, 4] = 1
    options = {"population": 6, "crossover": 1.0, "eta_crossover": 20.0, "eta_mutation": 25.0, "high": 100.0, "seed": 0}

    def children(mutation):
        algorithm = evolve._nsga2(given, mutation=mutation, **options)
        first = algorithm.ask()
        assert np.array_equal(first.get("X"), given)
        first.set("F", np.random.default_rng(0).random((6, 2)))
        algorithm.tell(infills=first)
        return algorithm.ask().get("X")

    assert set(children(0.0)[:, -1]) == {1} and set(children(1.0)[:, -1]) == {0, 2}
    assert (children(0.0)[:, :4] != children(1.0)[:, :4]).all(), "penalties mutate too"
    assert children(0.0)[:, :4].min() >= 0 and children(1.0)[:, :4].max() <= 100


def test_ratios_reach_both_ends(pool, split):
    """At the ends of the ratios nothing but the dearest, and nothing but the cheapest network is chosen."""
    genes = ratios(3, steps=5)
    assert genes.shape == (15, 10) and set(genes[:, -1]) == {0, 1, 2}
    P = genes[0, :-1].reshape(3, 3)  # ratio 10^-5: too dear is what hurts
    assert P[0, 1] == P[1, 2] == 100 and P[1, 0] == P[2, 0] == pytest.approx(1e-3) and P[1, 1] == 0
    options = {**SMALL, "population": 15, "generations": 1, "epochs": 20}
    ends = points(search(pool, split, start=genes, **options))
    middle = points(search(pool, split, **options))
    assert ends[0][0] < middle[0][0] and ends[-1][1] > middle[-1][1], "wider than random ones"


def test_a_pool_in_which_one_network_is_never_the_right_one(pool, split):
    """The second network is right only where the first is: an answer, not an error, and the front ignores it."""
    correct = pool.correct.clone()
    correct[:, 1] = correct[:, 0]
    useless = replace(pool, correct=correct)
    rows = report(useless, split, search(useless, split, **{**SMALL, "epochs": 30}), resamples=20)
    assert max(json.loads(row["shares"])["b"] for row in rows) < 0.1
    everywhere = replace(pool, correct=torch.ones_like(correct))  # and one in which only the first ever is
    front = search(everywhere, split, **{**SMALL, "epochs": 30})
    assert front[-1].accuracy == 1 and front[0].cost < 1.1


# ------------------------------------------------------------------------------ the report


def test_a_report_is_of_the_final_images(pool, split, found):
    rows = report(pool, split, found, resamples=200)
    assert [row["accuracy"] for row in rows] == [one.accuracy for one in found]
    assert [row["cost_search"] for row in rows] == pytest.approx([one.cost for one in found])
    best = pool.names.index(best_single(pool, split))
    for row, one in zip(rows, found, strict=True):
        chosen = (pool.features[split.final] @ one.weight.T + one.bias).argmax(1)
        right = pool.correct[split.final, chosen]
        assert np.array_equal(unpack_answers(row["answers"], row["n_test"]), right.numpy())
        assert row["top1"] == right.double().mean().item() == row["correct"] / len(split.final)
        assert row["cost"] == pytest.approx(pool.paid[chosen].mean().item())
        assert row["p_norm"] == pytest.approx(row["cost"] / pool.cost[best].item())
        assert json.loads(row["shares"])["b"] == pytest.approx((chosen == 1).double().mean().item())
        lead = paired_bootstrap((right.int() - pool.correct[split.final, best].int()).numpy(), resamples=200)
        assert (row["lead"], row["low"], row["high"], row["against"]) == (lead.estimate, lead.low, lead.high, "c")
        assert row["weighting"] in WEIGHTINGS and json.loads(row["penalties"]) == one.penalties.tolist()
    assert report(pool, split, []) == []


def test_singles_and_the_lot(pool, split):
    rows = singles(pool, split, resamples=50)
    final = pool.correct[split.final].double().mean(0).tolist()
    assert [(row["name"], row["cost"], row["top1"]) for row in rows] == list(zip("abc", [1, 4, 16], final, strict=True))
    assert rows[2]["lead"] == 0 and rows[2]["p_norm"] == 1 and rows[0]["lead"] < 0
    line = mixed(pool, split, points=3)
    assert [row["cost"] for row in line] == [1, 2.5, 4, 4, 10, 16]
    assert line[1]["top1"] == pytest.approx((final[0] + final[1]) / 2) and line[4]["lead"] < 0
    worse = replace(pool, correct=pool.correct[:, [0, 0, 2]])
    assert [row["cost"] for row in mixed(worse, split, points=2)] == [1, 16], "a dominated network is no neighbour"


def test_the_best_single_is_not_chosen_on_final_images(pool):
    """On the final images only the first is right, so that it is right most often on all images together."""
    correct, split = pool.correct.clone(), thirds(len(pool), shares=(0.3, 0.3, 0.4))
    correct[split.final] = torch.tensor([True, False, False])
    assert correct.sum(0).argmax() == 0 and best_single(replace(pool, correct=correct), split) == "c"


def test_a_cascade_by_an_obvious_loop(pool, split):
    rows = cascade(pool, split, points=5, resamples=20)
    assert len(rows) == 5
    for row in rows:
        right, paid = [], []
        for i in split.final.tolist():
            on = pool.confidence[i, 0].double().item() < row["threshold"]
            right.append(pool.correct[i, 2 if on else 0].item())
            paid.append(1 + 16 * on)
        assert row["top1"] == pytest.approx(np.mean(right)) and row["cost"] == pytest.approx(np.mean(paid))
    assert rows[0]["cost"] == 1 and rows[-1]["cost"] == 17 and rows[-1]["lead"] == 0
    # 80 search images: below their median confidence are 40, below their first quartile 20.
    assert [row["cost_search"] for row in rows] == [1, 1 + 16 / 4, 1 + 16 / 2, 1 + 16 * 3 / 4, 17]
    other = cascade(pool, split, first="b", then="c", points=2, resamples=20)
    assert [row["cost"] for row in other] == [4, 20]


def test_choosing_without_the_final_images(pool, split, found):
    rows = report(pool, split, found, resamples=20)
    wanted = rows[len(rows) // 2]
    assert cheapest(rows, wanted["accuracy"]) is wanted and cheapest(rows, 1.1) is None
    two = [{"accuracy": 1, "cost_search": 1, "cost": 3}, {"accuracy": 1, "cost_search": 2, "cost": 2}]
    assert cheapest(two, 0.5) is two[0], "by the cost on the search images"
    more = dominates(rows, mixed(pool, split), by="accuracy", box=(0.1, 1.0))
    assert np.isfinite(more.volume), "rows are those of other fronts"


def test_a_dispatcher_beats_the_lot_where_features_tell():
    """The first feature says nearly how hard an image is, so looking at it is worth its price."""
    pool = random_pool(2000)
    split, options = thirds(2000), {"batch": 64, "epochs": 20, "population": 16, "start": ratios(3, steps=5)}
    rows = report(pool, split, search(pool, split, **{**SMALL, **options}), resamples=200)
    most = ideal(pool, split.final)
    assert dominates(rows, mixed(pool, split), by="accuracy", box=(0.15, 1.0)).volume > 0.02
    assert all(row["top1"] <= most.accuracy for row in rows)
    good = cheapest(rows, 0.97 * singles(pool, split, resamples=20)[2]["accuracy"])
    assert good["p_norm"] < 0.75 and good["cost"] > most.cost_paid > most.cost


# ------------------------------------------------------------------------------ frames


def test_a_film_drifts_and_cuts(textures):
    film = sequence(textures, scenes=5, frames=12, step=0.6, light=0.01, seed=2)
    assert film.frames.shape == (60, 3, 16, 16) and film.frames.dtype == torch.uint8
    assert film.scene.tolist() == [s for s in range(5) for _ in range(12)]
    known = {tuple(x.flatten().tolist()): int(y) for x, y in zip(textures.x_test, textures.y_test, strict=True)}
    for s in range(5):
        first = film.frames[12 * s]
        assert known[tuple(first.flatten().tolist())] == film.labels[12 * s], "a scene begins with the image itself"
        assert film.labels[12 * s : 12 * s + 12].unique().numel() == 1
    change = scene_change(film.frames[:-1], film.frames[1:])
    cuts = torch.arange(11, 59, 12)
    within = change[[i for i in range(59) if i not in cuts.tolist()]]
    assert change[cuts].min() > within.mean() * 2 and within.max() > 0
    assert torch.equal(film.frames, sequence(textures, scenes=5, frames=12, step=0.6, light=0.01, seed=2).frames)
    still = sequence(textures, scenes=2, frames=3, step=0, light=0).frames
    assert torch.equal(still[0], still[2]) and not torch.equal(still[2], still[3])
    some = sequence(textures, scenes=3, frames=1, which=torch.tensor([7, 9, 11])).frames
    assert {tuple(x.flatten().tolist()) for x in some} == {
        tuple(textures.x_test[i].flatten().tolist()) for i in (7, 9, 11)
    }


def test_a_drift_is_a_shift_with_reflection(textures):
    """Within the padding every frame is a window of the reflected image."""
    film = sequence(textures, scenes=1, frames=60, step=3, light=0, seed=4)
    padded = torch.nn.functional.pad(film.frames[:1].float(), [4] * 4, mode="reflect")[0]
    windows = {
        tuple(padded[:, r : r + 16, c : c + 16].flatten().int().tolist()): (r, c) for r in range(9) for c in range(9)
    }
    places = [windows[tuple(x.flatten().int().tolist())] for x in film.frames]
    assert places[0] == (4, 4) and len(set(places)) > 5
    for axis in zip(*places, strict=True):
        assert (min(axis), max(axis)) == (0, 8), "it comes to all borders, and stays inside"


def test_scene_change_by_hand():
    """Half of the pixels go from grey 0 to 255: pixels differ by 1/2, half the histogram moves: 0.2 / 2 + 0.8 / 2."""
    a = torch.zeros(3, 4, 4, dtype=torch.uint8)
    b = a.clone()
    b[:, :2] = 255
    assert scene_change(a, b).item() == pytest.approx(0.5) == scene_change(b, a).item()
    # Levels 3 and 5 share a bin of eight; 7 and 8 do not. A pixel is 2/255 or 1/255 different.
    level = {v: torch.full((3, 4, 4), v, dtype=torch.uint8) for v in (3, 5, 7, 8)}
    assert scene_change(level[3], level[5]).item() == pytest.approx(0.2 * 2 / 255)
    assert scene_change(level[7], level[8]).item() == pytest.approx(0.2 / 255 + 0.8)
    mirrored = b.flip(1)
    assert scene_change(b, mirrored).item() == pytest.approx(0.2), "a histogram knows no places"
    both = scene_change(torch.stack([a, b]), torch.stack([b, b]))
    assert both.tolist() == pytest.approx([0.5, 0])


def test_when_to_ask_again():
    black, white = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 255, dtype=torch.uint8)
    frames = torch.stack([black, black, white, white, white, black, black])
    assert when(frames, every=3).tolist() == [True, False, False, True, False, False, True]
    assert when(frames, threshold=0.016).nonzero().flatten().tolist() == [0, 2, 5]
    assert when(frames, every=3, threshold=0.016).nonzero().flatten().tolist() == [0, 2, 3, 5, 6]
    assert when(frames, threshold=1.0).sum() == 1 and when(frames, every=1).all()
    assert when(frames[:1], threshold=0.016).tolist() == [True]


def test_following_by_an_obvious_loop(pool):
    draw = torch.Generator().manual_seed(0)
    L = len(pool)
    choices, again = torch.randint(0, 3, (L,), generator=draw), torch.rand(L, generator=draw) < 0.3
    again[0] = True
    played, held, right, paid = follow(pool, choices, again), None, [], []
    for i in range(L):
        held = choices[i].item() if again[i] else held
        right.append(pool.correct[i, held].item())
        paid.append((pool.paid if again[i] else pool.cost)[held].item())
    assert played.right.tolist() == right and played.accuracy == np.mean(right)
    assert played.cost == pytest.approx(np.mean(paid)) and played.asked == again.double().mean().item()
    always = follow(pool, choices, torch.ones(L, dtype=torch.bool))
    accuracy, paid = score(choices[None], pool)
    assert (always.accuracy, always.cost) == pytest.approx((accuracy.item(), paid.item()))


def test_a_film_through_a_pool(textures, split):
    """Small frames' histograms move at every step, so a threshold asks often; asking less costs less."""
    networks = {name: models.resnet8(classes=4, width=w, shortcut="pad") for name, w in (("a", 0.25), ("b", 0.5))}
    film = sequence(textures, scenes=6, frames=8)
    seen = look(networks, replace(textures, x_test=film.frames, y_test=film.labels), progress=False)
    layers = fit(seen.features, routes(seen.correct), torch.ones(1, 2, 2), torch.ones(1, 2), epochs=2)
    choices = choose(layers, seen.features)[0]
    costs = [follow(seen, choices.clamp(0, 0), when(film.frames, every=D)).cost for D in (1, 2, 8)]
    # All go to the extractor: its layer is all that a dispatch costs, and it is paid at every D-th frame.
    assert costs == pytest.approx([seen.cost[0].item() + seen.layer_cost / D for D in (1, 2, 8)])
    cut = when(film.frames, threshold=0.1)
    assert cut[::8].all() and cut.sum() < len(cut)


# ------------------------------------------------------------------------------ errors


def test_errors_say_what_to_do(pool, split, found, textures):
    frames = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    ask = torch.ones(len(pool), dtype=torch.bool)
    zeros = torch.zeros(len(pool)).long()
    for message, call in {
        "population is 1": lambda: search(pool, split, population=1),
        "generations 0": lambda: search(pool, split, generations=0),
        "crossover is 2": lambda: search(pool, split, crossover=2),
        "mutation is -1": lambda: search(pool, split, mutation=-1),
        "eta_crossover is 0": lambda: search(pool, split, eta_crossover=0),
        "high 0": lambda: search(pool, split, high=0),
        "epochs is 0": lambda: search(pool, split, epochs=0),
        "beta = 1": lambda: search(pool, split, beta=1),
        "The split names image 400, but the pool has 400": lambda: search(
            pool, replace(split, final=torch.tensor([400]))
        ),
        r"start is of shape \[3, 5\]; it needs at most 50": lambda: search(pool, split, start=np.zeros((3, 5))),
        "The last gene of start": lambda: search(pool, split, start=np.full((3, 10), 1.5)),
        r"start is of shape \[15, 10\]; it needs at most 4": lambda: search(
            pool, split, population=4, start=ratios(3, steps=5)
        ),
        "was found on the split": lambda: report(pool, thirds(len(pool), seed=9), found),
        r"needs \[2, 5\]": lambda: report(pool.only("ab"), split, found),
        "This pool has no confidence": lambda: cascade(replace(pool, confidence=None), split),
        "A cascade from 'a' to 'a'": lambda: cascade(pool, split, then="a"),
        "is called 'd'": lambda: cascade(pool, split, first="d"),
        "points is 1": lambda: mixed(pool, split, points=1),
        "scenes is 0": lambda: sequence(textures, scenes=0),
        "99 scenes of 64 images": lambda: sequence(textures, scenes=99),
        "step nan": lambda: sequence(textures, step=float("nan")),
        "every is None, threshold None": lambda: when(frames),
        "every is 0": lambda: when(frames, every=0),
        "threshold is -1": lambda: when(frames, threshold=-1),
        "frames are uint8": lambda: scene_change(frames, frames.float()),
        "begins with True": lambda: follow(pool, zeros, ~ask),
        r"choices are \[1, 400\]": lambda: follow(pool, zeros[None], ask),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_without_pymoo_the_search_says_how_to_install_it(pool, split, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo.algorithms.moo.nsga2", None)
    with pytest.raises(ImportError, match=r'pip install "axmoe_lite\[search\]"'):
        search(pool, split, **SMALL)

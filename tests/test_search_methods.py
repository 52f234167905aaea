"""Six searches on one network of four layers and three multipliers, against all 81 assignments tried."""

import itertools

import pytest
import torch
from torch import nn

from axmoe_lite import cost
from axmoe_lite.search import (
    Trial,
    additive,
    agn,
    genetic,
    groups,
    hold_out,
    maxdnn,
    predict,
    qos,
    ranking,
    report,
    search,
    tolerances,
)
from axmoe_lite.train import fit

THREE = ["mul8s_1KV6", "mul8s_1L2L", "mul8s_1L2N"]
COMMON = {"n": 64, "progress": False, "calibrate_options": {"n": 50}}
LEARNING = {"lr": 0.05, "batch_size": 32, "augment": "none"}


@pytest.fixture(scope="module")
def four(textures):
    """Four convolutions; the classifier stays exact."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths, layers = (3, 8, 8, 12, 12), []
        for i in range(4):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, stride=1 + i % 2, bias=False)
            layers += [conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    fit(network, textures, epochs=6, progress=False, **LEARNING)
    return network.eval()


@pytest.fixture(scope="module")
def tried(four, textures):
    """(p_norm, divergence) of all 81, by assignment."""
    parts = groups(four)
    assert len(parts) == 4
    trial, found = Trial(four, textures, n=64, calibrate_options={"n": 50}), {}
    for names in itertools.product(THREE, repeat=4):
        assignment = {layer: name for layers, name in zip(parts.values(), names, strict=True) for layer in layers}
        paid = cost.price(trial.macs, assignment).p_norm
        found[tuple(sorted(assignment.items()))] = round(paid, 9), trial.score(assignment).divergence
    return found


def foretold(network, images):
    """What QoS-Nets chooses by: tolerances, predicted errors and signals."""
    rest = hold_out(images, n=64)
    sigma = tolerances(network, rest, lam=0.3, epochs=3, pace=3.0, fit_options=LEARNING, progress=False).sigma
    seen = predict.operands(network, rest, patches=64, n=32, calibrate_options={"n": 50})
    std = predict.predicted_std(seen, THREE, progress=False)
    return {"sigma": sigma, "std": std, "signal": {name: one.signal for name, one in seen.items()}}


def by_qos(network, images, multipliers, **options):
    given = foretold(network, images)
    return qos.search(network, images, multipliers, instances=3, scales=(0.3, 1.0, 2.0, 4.0), **given, **options)


def by_agn(network, images, multipliers, **options):
    learning = {"lambdas": (0.05, 0.3, 1.0), "epochs": 3, "pace": 3.0, "fit_options": LEARNING}
    return agn.search(network, images, multipliers, **learning, **options)


METHODS = {  # how, how many of 81 it may run, and the least share of their hypervolume
    "experts": (lambda *a, **k: search(*a, candidates=8, refine=8, **k), 27, 0.98),
    "genetic": (genetic.search, 81, 1.0),
    "a little genetic": (lambda *a, **k: genetic.search(*a, population=8, budget=27, **k), 27, 0.95),
    "MAx-DNN by layer": (lambda *a, **k: maxdnn.search(*a, by="layer", **k), 81, 1.0),
    "ranking": (ranking.search, 15, 0.8),
    "AGN": (by_agn, 3, 0.55),
    "QoS-Nets": (by_qos, 4, 0.75),
}


def volume(points, corner):
    """Area between a front and a corner that is worse in both."""
    points = sorted(points)
    costs, losses = (torch.tensor(column, dtype=torch.float64).numpy() for column in zip(*points, strict=True))
    front = [points[i] for i in additive.undominated(costs, losses)]
    ends = [*(p[0] for p in front[1:]), corner[0]]
    return sum((end - p[0]) * (corner[1] - p[1]) for p, end in zip(front, ends, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_how_near_each_comes_to_what_is_possible(name, four, textures, tried):
    method, most, least = METHODS[name]
    found = method(four, textures, THREE, base=None, **COMMON)
    points = [(round(one.p_norm, 9), one.divergence) for one in found]
    assert [tried[tuple(sorted(one.assignment.items()))] for one in found] == points, "the same scores and prices"
    corner = [1.05 * max(p[i] for p in tried.values()) for i in (0, 1)]
    reached = volume(points, corner) / volume(tried.values(), corner)
    assert least - 1e-9 <= reached <= 1 + 1e-9, f"{reached:.4f} by {found[0].evaluated} of 81"
    assert found[0].evaluated <= most


@pytest.mark.parametrize("name", ["experts", "a little genetic", "AGN", "ranking", "QoS-Nets"])
def test_all_are_seeded_and_can_be_reported(name, four, textures):
    method = METHODS[name][0]
    found = method(four, textures, THREE, base=None, seed=3, **COMMON)
    assert method(four, textures, THREE, base=None, seed=3, **COMMON) == found
    rows = report(four, textures, found[:1], base=None, **COMMON)
    assert rows[0]["n_test"] == len(textures.x_test) and rows[0]["p_norm"] == pytest.approx(found[0].p_norm)

"""How fine a choice is: parts that cover a layer, names that say where, skips by value, and a search over all of it."""

import itertools

import pytest
import torch
from torch import nn

from axmoe_lite import cost, models, multiplier
from axmoe_lite.layers import approximable, default_layers
from axmoe_lite.multipliers import EXACT
from axmoe_lite.search import Trial, maxdnn
from axmoe_lite.search.maxdnn import Part, assembled, parts, skips
from axmoe_lite.train import fit

ROUPS = ["roup(0,2)", "roup(1,4)"]
QUICK = {"n": 48, "population": 8, "generations": 3, "progress": False, "calibrate_options": {"n": 50}}


@pytest.fixture(scope="module")
def dense(textures):
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    fit(network, textures, epochs=3, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


@pytest.fixture(scope="module")
def base(dense, textures):
    return cost.count(dense, textures.normalised(textures.x_test[:1]))


def short(*layers):
    """The first layers of a network, and a classifier of four classes that nobody trained."""
    classifier = nn.Linear(4, 4)
    classifier.weight.data = torch.eye(4)
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier).eval()


@pytest.mark.parametrize("by", ["layer", "filter", "channel", "row", "column"])
def test_parts_cover_each_layer_once(dense, by):
    cut = parts(dense, by=by)
    assert list(cut) == default_layers(dense)
    for layer, pieces in cut.items():
        shape = approximable(dense)[layer].weight.shape
        size = {"layer": 1, "filter": shape[0], "channel": shape[1], "row": 3, "column": 3}[by]
        assert len(pieces) == min(size, 4)
        if len(pieces) > 1:
            assert sorted(place for piece in pieces for place in piece.places) == list(range(size))
            assert max(len(p.places) for p in pieces) - min(len(p.places) for p in pieces) <= 1


def test_filters_of_like_weight_choose_together():
    layer = nn.Conv2d(1, 6, 1, bias=False)
    layer.weight.data = torch.tensor([3.0, -1.0, 6.0, 2.0, -5.0, 4.0]).view(6, 1, 1, 1)
    # By magnitude 1, 2, 3 (filters 1, 3, 0) and 4, 5, 6 (filters 5, 4, 2).
    assert parts(nn.Sequential(layer), by="filter", most=2) == {"0": [Part("0", (0, 1, 3)), Part("0", (2, 4, 5))]}


def test_what_has_no_such_axis_is_one_part():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    cut = parts(network, by="row")  # the last linear layer is the classifier, which stays exact
    assert cut == {"0": [Part("0")], "2": [Part("2")]}
    assert len(parts(network, by="channel")["2"]) == 4


def test_an_assignment_puts_each_name_in_its_place():
    cut = {"a": [Part("a", (0, 2)), Part("a", (1,))], "b": [Part("b")]}
    found = assembled(cut, ["pr(0,1)", "pr(0,2)", "roba()"], by="column")
    assert found == {"a": "column[pr(0,1), pr(0,2), pr(0,1)]", "b": "roba()"}
    places = multiplier(found["a"]).places
    assert tuple(places.shape) == (1, 1, 1, 3) and places.flatten().tolist() == [0, 1, 0]
    assert assembled(cut, ["pr(0,1)"] * 3, by="column") == {"a": "pr(0,1)", "b": "pr(0,1)"}


def test_skipping_by_hand():
    network = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False))
    network[0].weight.data = torch.tensor([127.0, 1.0, -1.0, 1.0]).view(2, 2, 1, 1)
    # Mean 32, standard deviation (of a sample) 63.3: 3 of 4 weights lie in -31..95; 2 sigma are -95..159, cut at 127.
    assert skips(network) == {"0": ["within(-31,95,750)", "within(-95,127,1000)"]}
    assert skips(network, sigmas=[1], polarity="outside") == {"0": ["outside(-31,95,250)"]}
    near, far = multiplier("within(-31,95,750)"), multiplier("outside(-31,95,250)")
    assert torch.equal(near.table + far.table, multiplier(EXACT).table)
    assert near.power_mw + far.power_mw == pytest.approx(multiplier(EXACT).power_mw)


@pytest.mark.parametrize("by", ["layer", "filter", "channel", "row", "skip"])
def test_a_search_at_each_granularity(dense, textures, base, by):
    found = maxdnn.search(dense, textures, ROUPS, base=base, by=by, **QUICK)
    costs, losses = [one.p_norm for one in found], [one.divergence for one in found]
    assert costs == sorted(costs) and losses == sorted(losses, reverse=True) and len(found) > 1
    assert found[0].evaluated <= 24
    trial = Trial(dense, textures, n=48, calibrate_options={"n": 50})
    for one in (found[0], found[-1]):
        assert trial.score(one.assignment).divergence == one.divergence
        assert cost.price(trial.macs, one.assignment, base=base).p_norm == one.p_norm
    named = {name.partition("[")[0] for one in found for name in one.assignment.values() if "[" in name}
    assert named <= ({by} if by in ("filter", "channel", "row") else set())


def test_finer_choices_contain_coarser_ones(dense, textures, base):
    """Every assignment by layer is one by row, so with all of both tried the finer front is nowhere above."""
    network = short(dense.conv1, dense.bn1)
    options = {**QUICK, "population": 16, "generations": 20}
    fronts = [
        maxdnn.search(network, textures, ["roup(1,4)", "pr(2,6)"], base=None, by=by, **options)
        for by in ("layer", "row")
    ]
    assert [front[0].evaluated for front in fronts] == [3, 27]  # three multipliers in one part, and in three
    for coarse in fronts[0]:
        assert any(fine.p_norm <= coarse.p_norm and fine.divergence <= coarse.divergence for fine in fronts[1])
    assert len(fronts[1]) > len(fronts[0])


def test_the_front_is_that_of_all_that_there_is(dense, textures, base):
    """By skip with one sigma each layer has two choices; of two layers all four are tried, and enumerated here."""
    network = short(dense.conv1, dense.bn1, nn.ReLU(), dense.layer1[0].conv1)
    found = maxdnn.search(network, textures, [], base=None, by="skip", sigmas=[1.0], **{**QUICK, "generations": 9})
    told = {layer: [EXACT, *names] for layer, names in skips(network, sigmas=[1.0]).items()}
    trial = Trial(network, textures, n=48, calibrate_options={"n": 50})
    points = []
    for choice in itertools.product(*told.values()):
        assignment = dict(zip(told, choice, strict=True))
        points.append((cost.price(trial.macs, assignment).p_norm, trial.score(assignment).divergence))
    front = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))
    assert [(one.p_norm, one.divergence) for one in found] == front


def test_an_interrupted_search_goes_on(dense, textures, base, tmp_path, monkeypatch):
    options = {**QUICK, "checkpoint": tmp_path / "scores.json"}
    first = maxdnn.search(dense, textures, ROUPS, base=base, by="row", **options)
    monkeypatch.setattr(Trial, "score", lambda *_: pytest.fail("it was scored before"))
    assert maxdnn.search(dense, textures, ROUPS, base=base, by="row", **options) == first
    with pytest.raises(ValueError, match="other by"):
        maxdnn.search(dense, textures, ROUPS, base=base, by="layer", **options)


def test_weight_tuning_is_a_name(dense, textures, base):
    found = maxdnn.search(dense, textures, ["tuned:mul8s_1L2L"], base=base, by="layer", **QUICK)
    used = {name for one in found for name in one.assignment.values()}
    assert used == {EXACT, "tuned:mul8s_1L2L"}


def test_errors_say_what_to_do(dense, textures, base):
    for wrong, message in (
        ({"by": "rows"}, "by is 'rows'; it can be 'layer'"),
        ({"objective": "top1"}, "objective is 'top1'"),
        ({"population": 2}, "give at least 3"),
        ({"most": 0, "by": "filter"}, "at least one part"),
        ({"by": "skip", "polarity": "in"}, "polarity is 'in'"),
    ):
        with pytest.raises(ValueError, match=message):
            maxdnn.search(dense, textures, ROUPS, base=base, **{**QUICK, **wrong})
    with pytest.raises(ValueError, match="No multiplier is called"):
        maxdnn.search(dense, textures, ["roop(0,2)"], base=base, **QUICK)

"""Which network for which input: pools, perfect choice, and layers trained together as if each were alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from axmoe_lite import approximate, cost, models, moe
from axmoe_lite.models import upcycle
from axmoe_lite.multipliers import multiplier
from axmoe_lite.pipeline import freeze
from axmoe_lite.search.pertinence import (
    WEIGHTINGS,
    Layers,
    Pool,
    Split,
    choose,
    class_weights,
    fit,
    ideal,
    look,
    loss,
    members,
    patterns,
    routes,
    score,
    thirds,
)
from axmoe_lite.train import calibrate, evaluate, predict
from axmoe_lite.train import fit as train

PAPER = {"TTT": 6320, "TTF": 228, "TFT": 256, "TFF": 143, "FTT": 1759, "FTF": 237, "FFT": 527, "FFF": 530}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def narrow(textures):
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    train(network, textures, epochs=2, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


@pytest.fixture(scope="module")
def wide(textures):
    network = models.resnet8(classes=4, width=0.5, shortcut="pad", seed=1)
    train(network, textures, epochs=2, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


@pytest.fixture(scope="module")
def cheap(narrow, textures):
    return calibrate(copy.deepcopy(narrow), "mul8s_1L2J", textures, n=50)


def table(counts):
    """Rows of a table of patterns, as often as it says."""
    return torch.tensor([[letter == "T" for letter in row] for row, n in counts.items() for _ in range(n)])


def made(correct, cost=None, features=None, extractor="a", extractor_cost=0.5, **more):
    """A pool of networks a, b, ..., which cost 1, 2, ..."""
    N = correct.shape[1]
    cost = list(range(1, N + 1)) if cost is None else cost
    features = torch.zeros(len(correct), 2) if features is None else features
    return Pool("abcdef"[:N], cost, correct, features, extractor, extractor_cost, **more)


def random_pool(n=200, N=3, F=5, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(n, F, generator=draw, dtype=dtype)
    level = features[:, 0] + 0.5 * torch.randn(n, generator=draw, dtype=dtype)
    correct = torch.stack([level < t for t in torch.linspace(0, 1.5, N).tolist()], 1)
    return made(correct ^ (torch.rand(n, N, generator=draw) < 0.1), features=features)


# ------------------------------------------------------------------------------ what choice could do


def test_the_papers_table_of_complementarity():
    """ResNet-8, 14 and 20 on 10,000 images: 69.47, 85.44 and 88.62 % alone, 94.70 % with ideal dispatch."""
    correct = table(PAPER)
    assert patterns(correct) == PAPER and list(patterns(correct)) == list(PAPER)
    pool = made(correct)
    assert pool.accuracy == (0.6947, 0.8544, 0.8862)
    assert ideal(pool).accuracy == pytest.approx(0.9470)
    # Right by the first: T..; else by the second: FT.; else by the third: FFT; by none, so to the cheapest: FFF.
    shares = {"a": (6320 + 228 + 256 + 143 + 530) / 10_000, "b": (1759 + 237) / 10_000, "c": 527 / 10_000}
    assert ideal(pool).shares == pytest.approx(shares)
    assert ideal(pool).cost == pytest.approx(shares["a"] + 2 * shares["b"] + 3 * shares["c"])
    assert [row["alone"] for row in members(pool)] == [143, 237, 527]


def test_routes_by_an_obvious_loop():
    correct = torch.rand(50, 4, generator=torch.Generator().manual_seed(3)) < 0.4
    slow = [next((i for i, right in enumerate(row) if right), 0) for row in correct.tolist()]
    assert routes(correct).tolist() == slow and routes(correct).dtype == torch.int64
    assert len(set(slow)) == 4 and (correct.sum(1) == 0).any(), "every case is there"


def test_the_extractor_is_paid_for_once():
    """Extractor 0.5, layer 2 features x 3 networks x 0.1 = 0.6; who is the extractor costs itself and the layer."""
    correct = table({"FFT": 1, "FTT": 2})
    assert made(correct, product=0.1).paid.tolist() == pytest.approx([1 + 0.6, 2 + 1.1, 3 + 1.1])
    assert made(correct, product=0.1, extractor="b").paid.tolist() == pytest.approx([1 + 1.1, 2 + 0.6, 3 + 1.1])
    assert made(correct, product=0.1, extractor=None).paid.tolist() == pytest.approx([2.1, 3.1, 4.1])


def test_a_perfect_dispatcher_may_prefer_the_extractor():
    """Cheapest right is a (1 + 1.5 paid), but b is the extractor, whose 2 are paid anyway: 2 is less than 2.5."""
    pool = made(table({"TT": 1}), extractor="b", extractor_cost=1.5, product=0)
    assert (ideal(pool).cost, ideal(pool).cost_paid) == (1, 2)
    nobody = made(table({"FF": 1}), extractor="b", extractor_cost=1.5, product=0)
    assert (ideal(nobody).cost, ideal(nobody).cost_paid) == (1, 2), "where none is right, what costs least"


def test_some_images_of_a_pool():
    pool = made(table({"TF": 3, "FT": 1}))
    assert ideal(pool, torch.tensor([0, 3])).cost == 1.5 and ideal(pool).cost == 1.25
    assert [row["accuracy"] for row in members(pool, torch.tensor([3]))] == [0, 1]


def test_who_is_dominated_still_adds_what_only_it_gets_right():
    pool = made(table({"TFT": 5, "FTF": 2, "TFF": 1, "FFF": 1}))
    rows = {row["name"]: row for row in members(pool)}
    assert [name for name, row in rows.items() if row["on_front"]] == ["a"]
    assert rows["b"]["alone"] == 2 and rows["c"]["alone"] == 0
    without = pool.only(["a", "c"])
    assert ideal(pool).accuracy - ideal(without).accuracy == pytest.approx(2 / 9)
    assert without.cost.tolist() == [1, 3] and without.extractor == "a"


def test_thirds_are_disjoint_and_complete():
    for n, sizes in ((10_000, (5000, 2000, 3000)), (23, (12, 4, 7)), (3, (1, 1, 1))):
        shares = (0.5, 0.2, 0.3) if n > 3 else (1 / 3,) * 3
        split = thirds(n, shares=shares, seed=5)
        assert (len(split.fit), len(split.search), len(split.final)) == sizes
        assert torch.cat([split.fit, split.search, split.final]).sort().values.equal(torch.arange(n))
    assert thirds(50, seed=1).digest == thirds(50, seed=1).digest != thirds(50, seed=2).digest


# ------------------------------------------------------------------------------ looking


def test_a_look_agrees_with_predict_and_with_counted_costs(narrow, wide, cheap, textures):
    before = copy.deepcopy(cheap.state_dict())
    networks = {"wide": wide, "cheap": cheap, "narrow": narrow}
    pool = look(networks, textures, extractor="narrow", **QUIET)
    assert pool.names == ("cheap", "narrow", "wide"), "from the cheapest"
    assert all(torch.equal(value, before[name]) for name, value in cheap.state_dict().items())
    x = textures.normalised(textures.x_test)
    for i, name in enumerate(pool.names):
        assert torch.equal(pool.correct[:, i], predict(networks[name], textures, progress=False) == textures.y_test)
        assert pool.accuracy[i] == evaluate(networks[name], textures, progress=False)
        macs = cost.count(networks[name], x[:1])
        power = multiplier("mul8s_1L2J").power_mw / multiplier("mul8s_1KV6").power_mw if name == "cheap" else 1
        head = macs.layers["fc"].executed
        assert pool.cost[i] == pytest.approx((head + (macs.executed - head) * power) / 1e6)
        with torch.no_grad():
            top = networks[name].eval()(x).softmax(1).amax(1)
        assert torch.allclose(pool.confidence[:, i], top, atol=1e-5)
    body = nn.Sequential(*list(narrow.children())[:-1])  # conv1, bn1, relu, three stages and the pooling
    with torch.no_grad():
        assert torch.allclose(pool.features, body.eval()(x).flatten(1), atol=1e-5)
    F, head = pool.features.shape[1], pool.features.shape[1] * 4
    assert pool.extractor_cost == pytest.approx(pool.cost[1].item() - head / 1e6) and pool.layer_cost == F * 3 / 1e6


def test_a_network_from_outside_may_give_the_features(narrow, wide, cheap, textures):
    foreign = models.resnet20(classes=7, width=0.25, shortcut="pad")
    pool = look({"narrow": narrow, "wide": wide}, textures, extractor=foreign, **QUIET)
    macs = cost.count(foreign, textures.normalised(textures.x_test[:1]))
    assert pool.extractor is None and pool.features.shape[1] == foreign.fc.in_features
    assert pool.extractor_cost == pytest.approx((macs.executed - macs.layers["fc"].executed) / 1e6)
    assert torch.equal(pool.paid, pool.cost + pool.extractor_cost + pool.layer_cost)


def test_frozen_pipelines_and_mixtures_are_networks_too(narrow, cheap, textures):
    hard = upcycle(narrow, topology="hard", experts=2, r=0.4)
    pool = look({"frozen": freeze(cheap), "cheap": cheap, "hard": hard}, textures, **QUIET)
    frozen, thawed = (pool.names.index(name) for name in ("frozen", "cheap"))
    assert pool.cost[frozen] == pool.cost[thawed] < pool.cost[pool.names.index("hard")]
    assert pool.correct[:, frozen].eq(pool.correct[:, thawed]).double().mean() > 0.95  # a rounding apart
    assert pool.extractor == "frozen" and pool.features.shape == (64, 16), "looked into as thawed"


def test_an_interrupted_look_goes_on_and_a_stale_file_is_refused(narrow, wide, textures, tmp_path, monkeypatch):
    import axmoe_lite.search.pertinence.look  # noqa: F401 (the module, which the function hides)

    module = __import__("sys").modules["axmoe_lite.search.pertinence.look"]
    ran, seen = [], module._seen
    monkeypatch.setattr(module, "_seen", lambda *args: ran.append(args[4]) or seen(*args))
    networks = {"narrow": narrow, "a/b": wide}
    first = look(networks, textures, checkpoint=tmp_path, **QUIET)
    assert ran == ["network-a/b", "extractor-narrow"] and len(list(tmp_path.iterdir())) == 2
    again = look(networks, textures, checkpoint=tmp_path, **QUIET)
    assert len(ran) == 2 and torch.equal(again.correct, first.correct) and torch.equal(again.features, first.features)
    look({**networks, "third": models.resnet20(classes=4)}, textures, checkpoint=tmp_path, **QUIET)
    assert ran[2:] == ["network-third"], "only the new one runs"
    look(networks, textures, extractor="a/b", checkpoint=tmp_path, **QUIET)
    assert ran[3:] == ["network-narrow", "extractor-a/b"], "another extractor has files of its own"
    trained = copy.deepcopy(wide)
    trained.conv1.weight.data[0, 0, 0, 0] += 0.01
    with pytest.raises(ValueError, match="made with other weights"):
        look({"narrow": narrow, "a/b": trained}, textures, checkpoint=tmp_path, **QUIET)
    other = replace(textures, x_test=255 - textures.x_test)
    with pytest.raises(ValueError, match="made with other images"):
        look(networks, other, checkpoint=tmp_path, **QUIET)
    placed = calibrate(copy.deepcopy(wide), "mul8s_1L2J", textures, n=50)
    look({"narrow": narrow, "placed": placed}, textures, checkpoint=tmp_path, **QUIET)
    approximate(placed, "mul8s_1L2L")
    with pytest.raises(ValueError, match="made with other weights"):
        look({"narrow": narrow, "placed": placed}, textures, checkpoint=tmp_path, **QUIET)
    next(tmp_path.glob("network-a_b*")).write_bytes(b"half a fi")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        look(networks, textures, checkpoint=tmp_path, **QUIET)


def test_features_go_into_the_layer_called_last_wherever_it_is_registered(narrow, wide, textures):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(6, 4), nn.Linear(3 * 16 * 16, 6)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    odd = Backwards()
    pool = look({"narrow": narrow, "odd": odd}, textures, extractor="odd", **QUIET)
    with torch.no_grad():
        hidden = odd.body(textures.normalised(textures.x_test).flatten(1)).relu()
    assert torch.allclose(pool.features, hidden, atol=1e-5)
    assert pool.extractor_cost == pytest.approx(3 * 16 * 16 * 6 / 1e6)
    plain = nn.Sequential(nn.Flatten(), odd.body, nn.ReLU(), odd.head)
    again = look({"narrow": narrow, "wide": wide}, textures, extractor=plain, **QUIET)
    assert torch.equal(again.features, pool.features)


def test_a_mixtures_cost_is_the_mean_over_where_images_go(narrow, wide, textures):
    gateway = models.resnet8(classes=2, width=0.25, shortcut="pad", seed=3)
    cluster = moe.ClusterMoE([narrow, wide], gateway)
    pool = look({"narrow": narrow, "cluster": cluster}, textures, **QUIET)
    x = textures.normalised(textures.x_test)
    with torch.no_grad():
        shares = torch.bincount(gateway.eval()(x).argmax(1), minlength=2) / len(x)
    assert 0 < shares[0] < 1
    macs = [cost.count(network, x[:1]).executed for network in (gateway, narrow, wide)]
    assert pool.cost[1] * 1e6 == pytest.approx(macs[0] + shares[0].item() * macs[1] + shares[1].item() * macs[2])


def test_costs_of_your_own_have_a_unit(narrow, wide, textures):
    milliseconds = {"narrow": 5.0, "wide": 2.0}
    pool = look({"narrow": narrow, "wide": wide}, textures, costs=milliseconds, product=1e-7, **QUIET)
    assert pool.names == ("wide", "narrow") and pool.cost.tolist() == [2, 5] and pool.extractor == "wide"
    macs = cost.count(wide, textures.normalised(textures.x_test[:1]))
    assert pool.extractor_cost == pytest.approx(2 * (1 - macs.layers["fc"].executed / macs.executed))
    assert pool.layer_cost == pytest.approx(pool.features.shape[1] * 2 * 1e-7)
    given = {"costs": milliseconds, "product": 1e-7, "extractor_cost": 0.25}
    assert look({"narrow": narrow, "wide": wide}, textures, **given, **QUIET).extractor_cost == 0.25


# ------------------------------------------------------------------------------ class weights and the loss


def test_class_weights_by_hand():
    """Counts 6, 3, 0, 1 of ten images; in each kind the mean over the images is 1, and ratios are as defined."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    for kind, raw in {
        "INS": [1 / 6, 1 / 3, 0, 1],
        "ISNS": [6**-0.5, 3**-0.5, 0, 1],
        "ENS": [0.5 / (1 - 0.5**6), 0.5 / (1 - 0.5**3), 0, 1],  # with beta 1/2
    }.items():
        found = class_weights(labels, 4, kind, beta=0.5)
        mean = (6 * raw[0] + 3 * raw[1] + raw[3]) / 10
        assert found.tolist() == pytest.approx([value / mean for value in raw]), kind
        assert found[labels].mean().item() == pytest.approx(1)


def test_the_loss_by_an_obvious_loop():
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(7, 2, 3, generator=draw, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    P, w = torch.rand(2, 3, 3, generator=draw).double(), torch.rand(2, 3, generator=draw).double()
    for s in range(2):
        total, wrong = 0.0, 0
        for b, true in enumerate(labels.tolist()):
            predicted = int(scores[b, s].argmax())
            if predicted != true:
                chance = scores[b, s].exp()[true] / scores[b, s].exp().sum()
                total, wrong = total - w[s, true] * P[s, true, predicted] * chance.log(), wrong + 1
        assert 0 < wrong < 7
        assert loss(scores, labels, P, w)[s].item() == pytest.approx(total.item() / 7)


# ------------------------------------------------------------------------------ layers trained together


def alone(x, labels, penalty, weight, first, batches, lr):
    """One layer by nn.Linear and Adam: the law for :func:`fit`, on features that are standardised already."""
    layer = nn.Linear(x.shape[1], len(weight), dtype=x.dtype)
    layer.weight.data, layer.bias.data = first[:, :-1].clone(), first[:, -1].clone()
    stepper = torch.optim.Adam(layer.parameters(), lr=lr)
    for batch in batches:
        scores, y = layer(x[batch]), labels[batch]
        losses = nn.functional.cross_entropy(scores, y, reduction="none") * weight[y] * penalty[y, scores.argmax(1)]
        losses = losses * (scores.argmax(1) != y)
        stepper.zero_grad()
        losses.mean().backward()
        stepper.step()
    return layer


def test_layers_trained_together_are_layers_trained_alone():
    pool, S, epochs, size = random_pool(150, dtype=torch.float64), 4, 6, 32
    features = 3 * pool.features + torch.arange(5)
    labels, draw = routes(pool.correct), torch.Generator().manual_seed(2)
    penalties = 10 * torch.rand(S, 3, 3, generator=draw, dtype=torch.float64)
    weights = torch.stack([class_weights(labels, 3, kind) for kind in (*WEIGHTINGS, "INS")])
    together = fit(features, labels, penalties, weights, epochs=epochs, batch=size, lr=0.02, seed=7)
    draw = torch.Generator().manual_seed(7)
    first = (2 * torch.rand(3, 6, generator=draw, dtype=torch.float64) - 1) / 5**0.5
    batches = [part for _ in range(epochs) for part in torch.randperm(150, generator=draw).split(size)]
    assert len(batches[-1]) == 150 % 32, "the last batch is short"
    x = (features - features.mean(0)) / features.std(0, correction=0)
    choices = choose(together, features)
    for s in range(S):
        layer = alone(x, labels, penalties[s], weights[s], first, batches, 0.02)
        found = features @ together.weight[s].T + together.bias[s]
        assert torch.allclose(found, layer(x).detach(), rtol=1e-9, atol=1e-9)
        assert torch.equal(choices[s], layer(x).argmax(1))
    assert len({tuple(row) for row in choices.tolist()}) == S, "four different layers"
    one = fit(features, labels, penalties[2:3], weights[2:3], epochs=epochs, batch=size, lr=0.02, seed=7)
    assert torch.allclose(one.weight[0], together.weight[2]) and torch.equal(choose(one, features)[0], choices[2])


def test_penalties_move_the_choice():
    """Dear mistakes towards the cheap network make a layer send more to the dear one, and the other way round."""
    pool = random_pool(600, N=2)
    labels = routes(pool.correct)
    careful, thrifty = torch.tensor([[0, 1.0], [50, 0]]), torch.tensor([[0, 50.0], [1, 0]])
    layers = fit(pool.features, labels, torch.stack([careful, thrifty]), torch.ones(2, 2), epochs=40, lr=0.01)
    choices = choose(layers, pool.features)
    accuracy, paid = score(choices, pool)
    assert paid[0] > paid[1] + 0.2 and accuracy[0] > accuracy[1] + 0.02
    assert choose(layers.at([1]), pool.features)[0].equal(choices[1]) and len(layers) == 2


def test_a_label_that_never_occurs_is_no_error():
    """The third network is right wherever the second is and nowhere else: no image should go there."""
    pool = random_pool(300, N=2)
    pool = made(torch.cat([pool.correct, pool.correct[:, 1:]], 1), features=pool.features)
    labels = routes(pool.correct)
    assert set(labels.tolist()) == {0, 1}
    weights = class_weights(labels, 3, "ENS")[None]
    layers = fit(pool.features, labels, torch.ones(1, 3, 3), weights, epochs=60, lr=0.02)
    chosen = choose(layers, pool.features)[0]
    assert weights[0, 2] == 0 and (chosen == 2).double().mean() < 0.02 and (chosen == 1).any()


def test_a_feature_that_never_varies_has_no_say():
    pool = random_pool(100)
    flat = torch.full((100, 1), 0.1)
    labels = routes(pool.correct)
    arguments = labels, torch.ones(1, 3, 3), torch.ones(1, 3)
    with_flat = fit(torch.cat([pool.features, flat, 0 * flat], 1), *arguments, epochs=2)
    assert (with_flat.weight[..., -2:] == 0).all() and with_flat.weight[..., :-2].ne(0).all()
    assert with_flat.weight.isfinite().all() and with_flat.bias.isfinite().all()


def test_fit_leaves_everybodys_random_numbers_alone():
    pool = random_pool(50)
    before = torch.get_rng_state()
    arguments = pool.features, routes(pool.correct), torch.ones(1, 3, 3), torch.ones(1, 3)
    one, same, other = (fit(*arguments, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_by_an_obvious_loop():
    pool, draw = random_pool(40), torch.Generator().manual_seed(0)
    choices, which = torch.randint(0, 3, (2, 15), generator=draw), torch.randperm(40, generator=draw)[:15]
    accuracy, paid = score(choices, pool, which)
    for s in range(2):
        pairs = list(zip(which.tolist(), choices[s].tolist(), strict=True))
        assert accuracy[s].item() == pytest.approx(np.mean([pool.correct[i, c].item() for i, c in pairs]))
        each = [pool.cost[c] + pool.layer_cost + (0 if c == 0 else pool.extractor_cost) for _, c in pairs]
        assert paid[s].item() == pytest.approx(np.mean(each))


# ------------------------------------------------------------------------------ errors


def test_errors_say_what_to_do(narrow, wide, textures, tmp_path):
    two, ones = {"narrow": narrow, "wide": wide}, torch.ones(4, 2, dtype=torch.bool)
    x, y, P, w = torch.zeros(4, 3), torch.zeros(4).long(), torch.ones(1, 2, 2), torch.ones(1, 2)
    (tmp_path / "file").write_text("")
    for message, call in {
        "The pool has the networks narrow; choosing needs at least two": lambda: look({"narrow": narrow}, textures),
        "No network of the pool is called 'wid'; .* Did you mean 'wide'": lambda: look(two, textures, extractor="wid"),
        "belong together": lambda: look(two, textures, costs={"narrow": 1, "wide": 2}),
        "costs has no 'wide'": lambda: look(two, textures, costs={"narrow": 1}, product=1),
        "is called 'wild'": lambda: look(two, textures, costs={"narrow": 1, "wild": 1}, product=1),
        "checkpoint is the file": lambda: look(two, textures, checkpoint=tmp_path / "file"),
        r"answers with \[1, 9\]": lambda: look({"narrow": narrow, "nine": models.resnet8(classes=9)}, textures),
        "calls no linear layer": lambda: look(two, textures, extractor=nn.Conv2d(3, 4, 3)),
        "cannot take synthetic": lambda: look(two, textures, extractor=nn.Conv2d(5, 4, 3)),
        "No network of the pool is called 'A'": lambda: made(ones, extractor="A"),
        r"cost is of shape \[3\]": lambda: made(ones, cost=[1, 2, 3]),
        r"features is of shape \[3, 2\]": lambda: made(ones, features=torch.zeros(3, 2)),
        r"confidence is of shape \[4\]": lambda: made(ones, confidence=torch.zeros(4)),
        "features must be finite": lambda: made(ones, features=torch.full((4, 2), torch.nan)),
        "from the cheapest network to the dearest": lambda: made(ones, cost=[2, 1]),
        "extractor_cost is 1.5, but all of 'a' costs 1.0": lambda: made(ones, extractor_cost=1.5),
        "extractor_cost is -1": lambda: made(ones, extractor=None, extractor_cost=-1),
        "each once": lambda: Pool("aa", [1, 2], ones, x, None, 1),
        r"shares is \(0.5, 0.2, 0.2\)": lambda: thirds(10, shares=(0.5, 0.2, 0.2)),
        "leave a part without any": lambda: thirds(2),
        "5 indices, but only 4 different ones": lambda: Split(torch.arange(2), torch.tensor([1, 2]), torch.tensor([3])),
        "search is .* at least one": lambda: Split(torch.arange(2), torch.arange(0), torch.tensor([3])),
        "kind is 'ins'; it can be 'INS'": lambda: class_weights(y, 2, "ins"),
        "beta = 1": lambda: class_weights(y, 2, "ENS", beta=1),
        "0 labels": lambda: class_weights(y[:0], 2, "INS"),
        "epochs is 0": lambda: fit(x, y, P, w, epochs=0),
        "lr nan": lambda: fit(x, y, P, w, lr=float("nan")),
        "of at least one image": lambda: fit(x, y[:3], P, w),
        "labels run from 0 to 2": lambda: fit(x, torch.tensor([0, 1, 2, 0]), P, w),
        r"penalties are \[1, 2, 3\]": lambda: fit(x, y, torch.ones(1, 2, 3), w),
        "penalties hold negative": lambda: fit(x, y, -P, w),
        r"features are \[4, 2\]; these layers take \[n, 3\]": lambda: choose(
            Layers(torch.zeros(1, 2, 3), torch.zeros(1, 2)), x[:, :2]
        ),
        r"choices are \[1, 3\]": lambda: score(torch.zeros(1, 3).long(), made(ones)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_cluster_has_no_layer_that_all_images_pass(narrow, textures):
    gateway = models.resnet8(classes=2, width=0.25, shortcut="pad", seed=3)
    cluster = upcycle(narrow, topology="cluster", experts=2, gateway=gateway)
    other = models.resnet20(classes=4, width=0.25, shortcut="pad")
    with moe.watching(cluster) as seen:
        predict(cluster, textures, progress=False)
    loads = torch.bincount(torch.cat([routing.choice for routing in next(iter(seen.values()))]), minlength=2)
    assert loads.min() > 0, "both experts are used"
    with pytest.raises(ValueError, match="not one that every image passes once"):
        look({"cluster": cluster, "other": other}, textures, extractor="cluster", **QUIET)

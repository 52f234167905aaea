"""Operating points: few multipliers in all of them, and a switch that no bit of an answer can tell from a new build."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from axmoe_lite import cost, datasets, models, multiplier
from axmoe_lite.layers import ApproxConv2d, Matmul, approximable, assignment_of, default_layers, evaluating
from axmoe_lite.models import upcycle
from axmoe_lite.multipliers import EVOAPPROX, EXACT
from axmoe_lite.search import Trial, hold_out, qos, report
from axmoe_lite.search import points as points_module
from axmoe_lite.search.points import Points, fine_tune, operating_points, overhead, overlay_size, switch, trace
from axmoe_lite.train import Diverged, calibrate, evaluate, fit, norms_of

J, L = "mul8s_1L2J", "mul8s_1L2L"  # 0.301 and 0.200 mW; the exact circuit takes 0.425
POWER = {name: multiplier(name).power_mw for name in EVOAPPROX}
PLAIN = {"n": 64, "progress": False, "calibrate_options": {"n": 50}}
TUNE = {"augment": "none", "batch_size": 32, "progress": False}


def alone(values):
    """Tolerance and signal of 1 for each layer, so that at scale 1 a row of v is the std itself."""
    return [values, *[dict.fromkeys(values, 1.0)] * 2]


# ------------------------------------------------------------------------------ rows


def test_rows_by_hand():
    """Tolerances: a 0.5 * 40 = 20, b 0.1 * 10 = 1; at scale 2 twice that."""
    std = {"a": {J: 10.0, L: 30.0}, "b": {J: 3.0, L: 0.0}}
    v = qos.rows(std, {"b": 10.0, "a": 40.0}, {"a": 0.5, "b": 0.1}, [L, J], scales=(1.0, 2.0))
    assert v.tolist() == [[0, 1.5, 0.5], [0, 0, 3], [0, 0.75, 0.25], [0, 0, 1.5]]


def test_no_tolerance_is_used_up_by_any_error():
    v = qos.rows({"a": {J: 2.0, L: 0.0}, "b": {J: 1.0, L: 1.0}}, {"a": 5.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, [J, L])
    assert v[:2].tolist() == [[0, np.inf, 0], [0, np.inf, np.inf]] and len(v) == 2 * len(qos.SCALES)


def test_the_exact_circuit_is_exact_whatever_was_predicted():
    assert qos.rows(*alone({"a": {EXACT: 7.0, J: 1.0}}), [J, EXACT], scales=(1.0,)).tolist() == [[0, 1]]


# ------------------------------------------------------------------------------ the choice


def spread(seed, layers=12, names=EVOAPPROX[1:]):
    """Predicted errors of which the cheap circuits have the larger ones, by and large."""
    draw = np.random.default_rng(seed)
    size = np.geomspace(0.05, 20, len(names))
    std = {f"l{n}": dict(zip(names, size * draw.lognormal(0, 0.7, len(names)), strict=True)) for n in range(layers)}
    sigma = {layer: float(draw.choice([0.0, 0.3, 1.0, 2.0])) for layer in std}
    return std, dict.fromkeys(std, 1.0), sigma


@pytest.mark.parametrize("instances", [1, 2, 3, 4, 7])
def test_no_more_multipliers_than_instances_and_never_a_dearer_one(instances):
    most = 0
    for seed in range(6):
        std, signal, sigma = spread(seed)
        points = qos.choose(std, signal, sigma, EVOAPPROX, instances=instances, seed=seed)
        used = {name for point in points for name in point.values()}
        most = max(most, len(used))
        assert len(used) <= instances and len(points) == 3 and all(list(p) == list(sigma) for p in points)
        for before, after in itertools.pairwise(points):
            assert all(POWER[after[layer]] <= POWER[before[layer]] for layer in sigma)
        assert all(point[layer] == EXACT for layer in sigma if not sigma[layer] for point in points)
        assert points == qos.choose(std, signal, sigma, EVOAPPROX, instances=instances, seed=seed)
    assert most == instances, "some case uses all that it may"


def test_a_layer_without_tolerance_takes_an_instance_for_itself():
    std, signal, sigma = alone({"a": {J: 0.5, L: 9.0}, "b": {J: 0.5, L: 9.0}, "c": {J: 0.5, L: 0.5}})
    assert list(qos.choose(std, signal, sigma, [J, L], instances=2, scales=(1.0,))[0].values()) == [J, J, L]
    sigma = sigma | {"a": 0.0}
    assert list(qos.choose(std, signal, sigma, [J, L], instances=3, scales=(1.0,))[0].values()) == [EXACT, J, L]
    # With two, b and c share what is left: the centre (0.5, (1 + ln 9 + 0.5) / 2 = 1.85) tolerates J only.
    assert list(qos.choose(std, signal, sigma, [J, L], instances=2, scales=(1.0,))[0].values()) == [EXACT, J, J]
    assert set(qos.choose(std, signal, sigma, [J, L], instances=1, scales=(1.0,))[0].values()) == {EXACT}


def test_with_an_instance_for_each_row_every_layer_gets_its_own_match():
    """A cluster of one row has that row as its centre: the cheapest that the layer tolerates, at each scale."""
    for seed in range(4):
        std, signal, sigma = spread(seed, layers=5)
        points = qos.choose(std, signal, sigma, EVOAPPROX, instances=15)
        for scale, point in zip(qos.SCALES, points, strict=True):
            for layer, allowed in sigma.items():
                fits = [name for name, error in std[layer].items() if error <= scale * allowed]
                assert point[layer] == min([EXACT, *fits], key=POWER.get)


def test_entries_above_1_are_compressed():
    """0.9 and 1 + ln 1.1 = 1.095 have their centre at 0.998; 1 + ln 100 = 5.6 and 1 + ln 1000 = 7.9 are far.

    Not compressed, 1000 is alone and 100 spoils the others: nobody would get the cheap one.
    """
    std = {"a": {J: 0.9}, "b": {J: 1.1}, "c": {J: 100.0}, "d": {J: 1000.0}}
    points = qos.choose(*alone(std), [J], instances=2, scales=(1.0,))
    assert list(points[0].values()) == [J, J, EXACT, EXACT]


def test_what_nobody_tolerates_does_not_draw_clusters():
    """As before; a hopeless column in which a is near c, and b near d, would put a and b into different clusters."""
    std = {"a": {J: 0.9, L: 2}, "b": {J: 1.1, L: 1e30}, "c": {J: 100.0, L: 2}, "d": {J: 1000.0, L: 1e30}}
    points = qos.choose(*alone(std), [J, L], instances=2, scales=(1.0,))
    assert list(points[0].values()) == [J, J, EXACT, EXACT]


def test_of_equal_power_the_smaller_error_wins():
    std = {"a": {f"swap:{L}": 0.9, L: 0.2}, "b": {f"swap:{L}": 0.1, L: 0.5}}
    points = qos.choose(*alone(std), [f"swap:{L}", L], instances=2, scales=(1.0,))
    assert list(points[0].values()) == [L, f"swap:{L}"]


def test_power_falls_although_the_clusters_say_otherwise(monkeypatch):
    """Compressed, at scale 1: a (2.16, 0.7), b (1.53, 1.53), c (0.7, 1.53); at 2: a (1.47, 0.35), b and c (., 0.85).

    Two clusters: both a and the first b, centre (1.72, 0.86), take L; both c and the second b, centre (0.63, 1.08),
    take J, which is dearer. So b would go from L to J at the larger scale.
    """
    given = *alone({"a": {J: 3.2, L: 0.7}, "b": {J: 1.7, L: 1.7}, "c": {J: 0.7, L: 1.7}}), [J, L]
    options = {"instances": 2, "scales": (1.0, 2.0)}
    assert [list(point.values()) for point in qos.choose(*given, **options)] == [[L, L, J], [L, L, J]]
    monkeypatch.setattr(qos, "_never_dearer", lambda chosen, power: chosen)
    assert [list(point.values()) for point in qos.choose(*given, **options)] == [[L, L, J], [L, J, J]]


def test_repairs_carry_over_to_later_points():
    power = np.array([3.0, 2.0, 1.0])
    assert qos._never_dearer(np.array([[2, 0], [1, 1], [1, 0]]), power).tolist() == [[2, 0], [2, 1], [2, 1]]


# ------------------------------------------------------------------------------ a network


@pytest.fixture(scope="module")
def dense(textures):
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    fit(network, textures, epochs=3, batch_size=32, lr=0.05, augment="none", progress=False)
    return network.eval()


@pytest.fixture(scope="module")
def three(dense):
    """All exact; exact, J and L in turn; J and L in turn."""
    layers = default_layers(dense)
    return [dict(zip(layers, itertools.cycle(names), strict=False)) for names in ([EXACT], [EXACT, J, L], [J, L])]


@pytest.fixture
def made(dense, three, textures):
    return operating_points(dense, three, textures, calibrate_options={"n": 50})


def predicted(network):
    """Dicts such as a prediction gives them: the n-th layer bears n times what the first does."""
    layers = default_layers(network)
    std = {layer: {J: 1.0, L: 3.0} for layer in layers}
    return {"std": std, "signal": dict.fromkeys(layers, 10.0), "sigma": {x: 0.1 * n for n, x in enumerate(layers)}}


def test_the_search_scores_the_choice(dense, textures, tmp_path, monkeypatch):
    given = predicted(dense)
    found = qos.search(
        dense, textures, [J, L], base=None, instances=3, checkpoint=tmp_path / "kept.json", **given, **PLAIN
    )
    points = qos.choose(**given, multipliers=[J, L], instances=3)
    trial = Trial(dense, textures, n=64, calibrate_options={"n": 50})
    assert [one.assignment for one in found] == points and not assignment_of(dense)
    for one in found:
        score = trial.score(one.assignment)
        assert (one.loss, one.divergence, one.accuracy) == (score.loss, score.divergence, score.accuracy)
        assert one.p_norm == cost.price(trial.macs, one.assignment).p_norm
        assert one.evaluated == len({tuple(point.values()) for point in points}) == 3
    assert found[0].p_norm > found[1].p_norm > found[2].p_norm
    assert len(report(dense, textures, found, base=None, **PLAIN)) == 3

    other = replace(textures, x_test=255 - textures.x_test, y_test=textures.y_test.flip(0))
    monkeypatch.setattr(Trial, "score", lambda *args: pytest.fail("a score that the checkpoint holds was run again"))
    again = qos.search(
        dense, other, [J, L], base=None, instances=3, checkpoint=tmp_path / "kept.json", **given, **PLAIN
    )
    assert again == found, "test images are not looked at"


# ------------------------------------------------------------------------------ switching


def built(network, images, points, p, *, calibrated=None):
    """A network made for one point alone: calibrated, then given the shared numbers and that point's overlay."""
    found = calibrate(copy.deepcopy(network), points.assignments[p], images, n=50)
    state = points.state_dict()
    shared = {k.removeprefix("shared."): v for k, v in state.items() if k.startswith("shared.")}
    own = {k.removeprefix(f"points.{p}."): v for k, v in state.items() if k.startswith(f"points.{p}.")}
    found.load_state_dict({**shared, **own})
    return found


@torch.no_grad()
def answers(network, images):
    with evaluating(network):
        return network(images.normalised(images.x_test))


def check_switching(network, images, points):
    """Every order of two points, so that nothing of the one before is left."""
    wanted = [answers(built(network, images, points, p), images) for p in range(len(points.assignments))]
    assert not torch.equal(wanted[0], wanted[-1]), "points differ, else nothing is tested"
    for pair in itertools.permutations(range(len(wanted)), 2):
        for p in pair:
            assert torch.equal(answers(switch(points, p), images), wanted[p]) and points.present == p
            assert assignment_of(points.network) == points.assignments[p]


def test_a_switch_equals_a_new_build(dense, textures, made):
    before = copy.deepcopy(dense.state_dict())
    check_switching(dense, textures, made)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert not assignment_of(dense) and made.tables == [EXACT, J, L]


def test_refreshed_averages_are_those_of_a_trial(dense, three, textures):
    trial = Trial(dense, textures, n=64, regime="norms refreshed", calibrate_options={"n": 50})
    found = operating_points(dense, three, hold_out(textures, n=64), refresh={}, calibrate_options={"n": 50})
    for p in (2, 0, 1):
        assert torch.equal(answers(switch(found, p), textures), answers(trial.place(three[p]), textures))
    check_switching(dense, textures, found)


def test_products_are_prepared_once(dense, three, textures, monkeypatch):
    real, calls = ApproxConv2d._make, []
    monkeypatch.setattr(ApproxConv2d, "_make", lambda layer, *args: (calls.append(layer), real(layer, *args))[1])
    found = operating_points(dense, three, textures, calibrate_options={"n": 50})
    assert len(calls) == len({pair for one in three for pair in one.items()}) > len(three[0])
    calls.clear()
    for p in (2, 1, 0, 2):
        answers(switch(found, p), textures)
    assert not calls


def test_idle_experts_and_products_of_activations_switch_too(dense, textures):
    hard = upcycle(dense, topology="hard", experts=2, r=0.4).eval()
    vit = models.vit_small(classes=4, image_size=16, patch=4, width=0.125).eval()
    for network in (hard, vit):
        layers = [*default_layers(network), *(n for n, m in approximable(network).items() if isinstance(m, Matmul))]
        two = [dict.fromkeys(layers, name) for name in (EXACT, L)]
        check_switching(network, textures, operating_points(network, two, textures, calibrate_options={"n": 50}))


def test_a_circuit_of_two_names_is_one_table(dense, textures):
    both = [{"conv1": J}, {"conv1": "v1:mul8s_1L2H"}]
    assert operating_points(dense, both, textures, calibrate_options={"n": 8}).tables == [J]


def test_a_copy_switches_for_itself(made, textures):
    other, here = copy.deepcopy(made), answers(made.network, textures)
    assert not torch.equal(answers(switch(other, 2), textures), here)
    assert torch.equal(answers(made.network, textures), here) and made.present == 0
    assert torch.equal(answers(switch(made, 2), textures), answers(other.network, textures))


# ------------------------------------------------------------------------------ learning


def frozen(points):
    return {key: value.clone() for key, value in points.state_dict().items() if key.startswith("shared.")}


def norms_by_name(network):
    return [name for name, module in network.named_modules() if module in norms_of(network)]


def test_fine_tuning_changes_overlays_only(dense, textures, made):
    weights, start = frozen(made), {k: v.clone() for k, v in made.state_dict().items()}
    switch(made, 1)
    history = fine_tune(made, textures, epochs=2, lr=0.1, milestones=(), **TUNE)
    after = made.state_dict()
    assert made.present == 1 and not any(module.training for module in made.network.modules())
    assert all(torch.equal(value, after[key]) for key, value in weights.items()) and len(weights) > 10
    for key in after.keys() - weights.keys():
        assert not torch.equal(after[key], start[key]), f"{key} has learned nothing"
    for name, one in itertools.product(norms_by_name(dense), ("weight", "bias", "running_mean", "running_var")):
        values = [after[f"points.{p}.{name}.{one}"] for p in range(3)]
        equal = [torch.equal(a, b) for a, b in itertools.combinations(values, 2)]
        # Both first points have an exact first layer, so their first averages are alike.
        assert equal == [name == "bn1" and one.startswith("running"), False, False], (name, one)
    assert all(parameter.requires_grad for parameter in made.network.parameters())
    check_switching(dense, textures, made)
    assert [row["epoch"] for row in history] == [1, 2] and history[0]["loss"] > history[1]["loss"]
    assert history[1]["loss"] == pytest.approx(np.mean(history[1]["losses"])) and len(history[1]["losses"]) == 3


def test_weights_learn_when_asked(dense, textures, made):
    weights = frozen(made)
    fine_tune(made, textures, epochs=1, weights_learn=True, **TUNE)
    learned = {
        key for key, value in made.state_dict().items() if key in weights and not torch.equal(value, weights[key])
    }
    assert learned == {k for k in weights if not k.endswith("scale_x")}, "activation scales stay, all else learns"
    check_switching(dense, textures, made)


def test_a_step_averages_the_gradients_of_shared_weights(dense, textures, made):
    """One batch, no momentum: new = old - lr * gradient, of networks that were built and run one by one."""
    images, lr = textures.subset(n_train=32), 0.5
    networks = [built(dense, textures, made, p).train() for p in range(3)]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(7 * 100_003 + 1))
    losses = []
    for network in networks:
        x = images.normalised(images.x_train[order]).contiguous(memory_format=torch.channels_last)
        losses.append(torch.nn.functional.cross_entropy(network(x), images.y_train[order]))
        losses[-1].backward()
    start = {key: value.clone() for key, value in made.state_dict().items()}
    (row,) = fine_tune(made, images, epochs=1, weights_learn=True, lr=lr, momentum=0.0, seed=7, milestones=(), **TUNE)
    assert row["losses"] == pytest.approx([loss.item() for loss in losses])
    after, norms = made.state_dict(), norms_by_name(dense)
    for name, _ in dense.named_parameters():
        gradients = [dict(network.named_parameters())[name].grad for network in networks]
        keys = [f"points.{p}.{name}" for p in range(3)] if name.rpartition(".")[0] in norms else [f"shared.{name}"]
        wanted = gradients if len(keys) == 3 else [sum(gradients) / 3]
        for key, gradient in zip(keys, wanted, strict=True):
            torch.testing.assert_close((start[key] - after[key]) / lr, gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_the_rate_falls_at_epochs_5_and_8_of_10(made, textures):
    history = fine_tune(made, textures.subset(n_train=8), epochs=10, **TUNE)
    assert [row["lr"] for row in history] == pytest.approx([1e-2] * 5 + [1e-3] * 3 + [1e-4] * 2)


@pytest.mark.parametrize("weights_learn", [False, True])
def test_an_interrupted_training_goes_on(dense, three, textures, elsewhere, monkeypatch, weights_learn):
    images = textures.subset(n_train=64)
    options = {**TUNE, "epochs": 3, "weights_learn": weights_learn, "augment": "crop_flip", "weight_decay": 1e-3}
    new, real = (
        (lambda: operating_points(dense, three, textures, calibrate_options={"n": 50})),
        points_module._one_epoch,
    )
    whole = new()
    history = fine_tune(whole, images, **options)

    def killed(*args):
        if args[-1] == 3:
            raise KeyboardInterrupt
        return real(*args)

    file, first = elsewhere / "deep" / "points.safetensors", new()
    monkeypatch.setattr(points_module, "_one_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(first, images, checkpoint=file, **options)
    assert first.present == 0 and all(p.requires_grad for p in first.network.parameters())
    monkeypatch.setattr(points_module, "_one_epoch", lambda *args: real(*args) if args[-1] == 3 else pytest.fail())
    rest = switch_to(new(), 2)  # where it stands when it starts does not matter
    again = fine_tune(rest, images, checkpoint=file, **options)
    untimed = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows] for rows in (history, again)]
    assert untimed[0] == untimed[1]
    assert all(torch.equal(value, rest.state_dict()[key]) for key, value in whole.state_dict().items())
    with pytest.raises(ValueError, match="made by another call: lr was 0.01, now 0.02"):
        fine_tune(new(), images, checkpoint=file, lr=0.02, **options)


def switch_to(points: Points, point: int) -> Points:
    switch(points, point)
    return points


def test_losses_that_are_no_numbers_undo_their_epoch(made, textures):
    start = {key: value.clone() for key, value in made.state_dict().items()}
    with pytest.raises(Diverged, match=r"epoch 1 of 2\); lower lr") as failed:
        fine_tune(made, textures, epochs=2, lr=1e30, weights_learn=True, **TUNE)
    assert failed.value.epoch == 1 and not failed.value.history
    assert all(torch.equal(value, start[key]) for key, value in made.state_dict().items())


# ------------------------------------------------------------------------------ costs and budgets


def test_the_published_overhead():
    """MobileNetV2 at 200 classes: 2 * 34,112 / 2,480,072 = 2.751 %; a point more costs half of that."""
    network = models.mobilenet_v2(classes=200)
    assert overlay_size(network) == {"learned": 34112, "averages": 34112}
    assert overhead(network, 3) == 2 * 34112 / 2480072 and round(overhead(network, 3), 5) == 0.02751
    assert overhead(network, 1) == 0 and overhead(models.vit_small(classes=4, width=0.125), 5) == 0


def test_a_trace_takes_the_dearest_that_it_can_afford(dense, textures, made):
    base = cost.count(dense, textures.normalised(textures.x_test[:1]))
    paid = [cost.price(base, one, base=base).p_norm for one in made.assignments]
    assert paid[0] > paid[1] > paid[2]
    switch(made, 1)
    budgets = [2.0, paid[0], paid[0] - 1e-6, paid[1], paid[2], paid[2] - 1e-6]
    rows = trace(made, budgets, textures, base=base, batch_size=24, progress=False)
    assert [row["point"] for row in rows] == [0, 0, 1, 1, 2, 2] and made.present == 1
    assert [row["affordable"] for row in rows] == [True] * 5 + [False]
    assert [row["p_norm"] for row in rows] == [paid[row["point"]] for row in rows]
    assert [(row["step"], row["budget"]) for row in rows] == list(enumerate(budgets))
    for step, row in enumerate(rows):  # 64 images, so the third batch begins again after 16
        here = [(24 * step + n) % 64 for n in range(24)]
        batch = replace(textures, x_test=textures.x_test[here], y_test=textures.y_test[here])
        assert row["accuracy"] == evaluate(built(dense, textures, made, row["point"]), batch, progress=False)
        assert row["images"] == 24 and row["switch_us"] > 0


# ------------------------------------------------------------------------------ errors


def test_choices_that_cannot_be_made():
    std, signal, sigma = alone({"conv1": {J: 1.0}, "conv2": {J: 1.0}})

    def choose(std=std, signal=signal, sigma=sigma, multipliers=(J,), **options):
        return qos.choose(std, signal, sigma, multipliers, **options)

    for message, call in {
        "instances is 0": lambda: choose(instances=0),
        r"scales are \(2.0, 1.0\).* rising": lambda: choose(scales=(2.0, 1.0)),
        r"scales are \(\)": lambda: choose(scales=()),
        r"scales are \(0.0, 1.0\).* positive": lambda: choose(scales=(0.0, 1.0)),
        "No multiplier is called 'mul8s_1L2K'": lambda: choose(multipliers=["mul8s_1L2K"]),
        "multipliers is the text": lambda: choose(multipliers=J),
        f"std of layer 'conv1' has no multiplier '{L}'; it has {J}": lambda: choose(multipliers=[J, L]),
        "no layer 'conv3'. Did you mean 'conv2'.* but std lacks it": lambda: choose(sigma=sigma | {"conv3": 1.0}),
        "no layer 'conv2'. Did you mean 'conv1'.* but sigma lacks it": lambda: choose(sigma={"conv1": 1.0}),
        "no layer 'conv2'.* but signal lacks it": lambda: choose(signal={"conv1": 1.0}),
        "sigma names no layer": lambda: choose({}, {}, {}),
        "The sigma of layer 'conv1' is -0.1": lambda: choose(sigma=sigma | {"conv1": -0.1}),
        "The signal of layer 'conv2' is nan": lambda: choose(signal=signal | {"conv2": float("nan")}),
        f"The std of layer 'conv1' under '{J}' is inf": lambda: choose(std | {"conv1": {J: float("inf")}}),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_networks_that_do_not_fit(dense, three, textures, made):
    given = predicted(dense)
    renamed = {key: {k.replace("conv1", "conv9"): v for k, v in one.items()} for key, one in given.items()}
    vit = models.vit_small(classes=4, image_size=16, patch=4, width=0.125)
    plain = operating_points(vit, [dict.fromkeys(default_layers(vit), J)], textures, calibrate_options={"n": 8})
    larger = datasets.synthetic(classes=3, size=16, n_train=8, n_test=4)
    for message, call in {
        "no layer 'conv9'. Did you mean 'conv1'.* This ResNet has conv1": lambda: qos.search(
            dense, textures, [J, L], base=None, **renamed, **PLAIN
        ),
        "assignments must be a list": lambda: operating_points(dense, [], textures),
        "assignments must be a list of dicts": lambda: operating_points(dense, three[0], textures),
        "Point 1 names layer 'conv9', which .* Did you mean 'conv1'": lambda: operating_points(
            dense, [three[0], {"conv9": J}], textures
        ),
        "Only one of points 0 and 1 has .* 'layer1.0.conv1'": lambda: operating_points(
            dense, [{"conv1": J, "layer1.0.conv1": J}, {"conv1": J}], textures
        ),
        "No multiplier is called 'mul8s_1L2K'": lambda: operating_points(dense, [{"conv1": "mul8s_1L2K"}], textures),
        "approximate layers already": lambda: operating_points(made.network, three, textures),
        "no BatchNorm that keeps averages; leave out refresh": lambda: operating_points(
            vit, plain.assignments, textures, refresh={}
        ),
        "There is no point 3; there are 3": lambda: switch(made, 3),
        "There is no point -1": lambda: switch(made, -1),
        "no BatchNorm that could learn": lambda: fine_tune(plain, textures, epochs=1),
        "epochs = -1": lambda: fine_tune(made, textures, epochs=-1),
        "lr = 0": lambda: fine_tune(made, textures, epochs=1, lr=0),
        r"milestones = \(5, 8\)": lambda: fine_tune(made, textures, epochs=10, milestones=(5, 8)),
        "augment is 'flip'": lambda: fine_tune(made, textures, epochs=1, augment="flip"),
        "has 3 classes": lambda: fine_tune(made, larger, epochs=1),
        "budgets \\[\\]": lambda: trace(made, [], textures),
        "budgets .*nan": lambda: trace(made, [1.0, float("nan")], textures),
        "batch_size = 0": lambda: trace(made, [1.0], textures, batch_size=0),
        "asked for 0 points": lambda: overhead(dense, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert made.present == 0

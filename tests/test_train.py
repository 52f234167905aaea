"""Training learns, repeats itself exactly, resumes where it was killed, and loads only what fits."""

import json
from dataclasses import replace

import pytest
import torch

from axmoe_lite import EVOAPPROX, assignment_of, models, moe, train
from axmoe_lite.layers import approximate
from axmoe_lite.train import loop


@pytest.fixture
def network():
    return models.resnet8(classes=4, seed=2)


def weights(network):
    return [value.clone() for value in network.state_dict().values()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_fit_learns_and_reports(network, textures):
    history = train.fit(network, textures, epochs=6, lr=0.05, batch_size=32, evaluate_every=3, progress=False)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert [row["test_accuracy"] is None for row in history] == [True, True, False] * 2
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert train.evaluate(network, textures, progress=False) > 0.6  # 4 classes: chance is 0.25
    assert all(row["seconds"] > 0 and 0 <= row["train_accuracy"] <= 1 for row in history)


def test_the_same_call_gives_the_same_numbers(textures):
    runs = []
    for seed in (0, 0, 1):
        network = models.resnet8(classes=4)
        train.fit(network, textures, epochs=1, batch_size=64, seed=seed, progress=False)
        runs.append(weights(network))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_every_epoch_of_every_seed_draws_afresh(network, textures, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "_one_epoch", lambda *_, generator, **__: seen.append(generator.initial_seed()) or (1, 0))
    for seed in (0, 1, 2):
        train.fit(network, textures, epochs=4, seed=seed, progress=False)
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.trust("fault", "training is killed")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_killed_run_resumes_bit_for_bit(textures, tmp_path, monkeypatch, precision):
    call = {"epochs": 3, "batch_size": 64, "precision": precision, "progress": False}
    whole = models.resnet8(classes=4)
    expected = train.fit(whole, textures, **call)

    real, epochs = loop._one_epoch, []

    def killed_in_the_third(*args, **kwargs):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(loop, "_one_epoch", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.fit(models.resnet8(classes=4), textures, checkpoint=path, **call)
    monkeypatch.setattr(loop, "_one_epoch", real)
    resumed = models.resnet8(classes=4, seed=99)  # whatever it starts from, the checkpoint wins
    history = train.fit(resumed, textures, checkpoint=path, **call)
    assert same(weights(whole), weights(resumed))
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"], "no partial file is left"
    # Finished: a further call only loads.
    monkeypatch.setattr(loop, "_one_epoch", None)
    assert len(train.fit(models.resnet8(classes=4), textures, checkpoint=path, **call)) == 3


def test_a_checkpoint_of_another_call_is_refused(network, textures, tmp_path):
    path = tmp_path / "run.safetensors"
    train.fit(network, textures, epochs=1, batch_size=64, checkpoint=path, progress=False)
    with pytest.raises(ValueError, match=r"lr was 0\.1, now 0\.2"):
        train.fit(network, textures, epochs=1, lr=0.2, batch_size=64, checkpoint=path, progress=False)


@pytest.mark.parametrize(
    "option,problem",
    [
        ({"augment": "flip"}, "augment is 'flip'.*'crop_flip'"),
        ({"precision": "fp16"}, "'fp16'.*'bf16'"),
        ({"epochs": -1}, "epochs = -1"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"lr": float("nan")}, "lr = nan"),
    ],
)
def test_bad_options_are_refused_before_any_work(network, textures, option, problem):
    before = weights(network)
    with pytest.raises(ValueError, match=problem):
        train.fit(network, textures, **{"epochs": 1, "progress": False, **option})
    assert same(before, weights(network))


def test_a_network_that_does_not_fit_is_refused_before_any_work(textures):
    for call in (lambda n: train.fit(n, textures, epochs=1), lambda n: train.evaluate(n, textures)):
        with pytest.raises(ValueError, match=r"answers with \[1, 9\].*classes=4"):
            call(models.resnet8(classes=9))
        with pytest.raises(ValueError, match=r"cannot take images of \[3, 16, 16\] \(synthetic\)"):
            call(torch.nn.Conv2d(1, 4, 3))


def test_divergence_is_said_and_the_checkpoint_survives(network, textures, tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(FloatingPointError, match="lower lr"):
        train.fit(network, textures, epochs=3, lr=1e30, batch_size=32, checkpoint=path, progress=False)
    assert not list(tmp_path.glob(".*"))


def test_answers_that_are_no_numbers_are_refused_and_not_counted_as_wrong(network, textures):
    network.fc.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"answers some images of synthetic with NaN"):
        train.evaluate(network, textures, progress=False)


def test_a_last_step_that_leaves_no_numbers_is_divergence_too(network, textures, monkeypatch):
    """The loss of an epoch is that before its last step."""
    before, step = weights(network), torch.optim.SGD.step

    def spoiling(self, *args):
        step(self, *args)
        network.fc.weight.data[0, 0] = torch.nan

    monkeypatch.setattr(torch.optim.SGD, "step", spoiling)
    with pytest.raises(train.Diverged, match=r"last step .*lower lr.*epoch 1 of 1"):
        train.fit(network, textures, epochs=1, batch_size=len(textures.x_train), progress=False)
    assert same(before, weights(network))


def test_divergence_leaves_the_network_as_before_the_epoch(network, textures, monkeypatch):
    whole = models.resnet8(classes=4, seed=2)
    train.fit(whole, textures, epochs=2, batch_size=64, progress=False)
    real, epochs = loop._one_epoch, []

    def third_fails(*args, **kwargs):
        epochs.append(real(*args, **kwargs))
        if len(epochs) == 3:
            raise FloatingPointError("planted")
        return epochs[-1]

    monkeypatch.setattr(loop, "_one_epoch", third_fails)
    # The schedule of 3 epochs is not that of 2, so the reference is a run that is stopped, not a shorter one.
    with pytest.raises(train.Diverged, match=r"planted \(epoch 3 of 3\)") as stop:
        train.fit(network, textures, epochs=3, batch_size=64, progress=False)
    kept = weights(network)
    assert stop.value.epoch == 3 and [row["epoch"] for row in stop.value.history] == [1, 2]
    stopped, epochs[:] = models.resnet8(classes=4, seed=2), []

    def third_is_cut(*args, **kwargs):
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "_one_epoch", third_is_cut)
    with pytest.raises(KeyboardInterrupt):
        train.fit(stopped, textures, epochs=3, batch_size=64, progress=False)
    assert same(kept, weights(stopped)) and not same(kept, weights(whole))


@pytest.mark.parametrize("options", [{}, {"optimiser": "adamw", "lr": 1e-3, "clip_norm": 0.5}], ids=["sgd", "adamw"])
def test_every_epoch_can_be_gone_on_from(textures, tmp_path, options):
    call = {
        "epochs": 3,
        "batch_size": 64,
        "progress": False,
        "checkpoint": tmp_path / "run{epoch}.safetensors",
    } | options
    whole = models.resnet8(classes=4)
    expected = train.fit(whole, textures, **call)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"run{e}.safetensors" for e in (1, 2, 3)]
    for later in (3, 2):  # go on from epoch 2, then from epoch 1
        for epoch in range(later, 4):
            (tmp_path / f"run{epoch}.safetensors").unlink()
        again = models.resnet8(classes=4, seed=99)
        assert [row["loss"] for row in train.fit(again, textures, **call)] == [row["loss"] for row in expected]
        assert same(weights(whole), weights(again))


def test_adamw_spares_biases_and_norms_the_decay(network, textures):
    before = network.state_dict()["bn1.weight"].clone(), network.conv1.weight.detach().norm()
    train.fit(
        network, textures, epochs=1, optimiser="adamw", lr=1e-12, weight_decay=1e11, batch_size=256, progress=False
    )
    # One step: decay multiplies by 1 - lr * weight_decay = 0.9, times the schedule's share of the peak, 1.
    assert torch.equal(before[0], network.bn1.weight)
    assert network.conv1.weight.detach().norm() / before[1] == pytest.approx(0.9, abs=1e-3)


def test_clipping_shortens_the_step(textures):
    moved = []
    for clip in (0.0, 1e-3):
        network = models.resnet8(classes=4)
        start = network.conv1.weight.detach().clone()
        options = {"momentum": 0.0, "weight_decay": 0.0, "batch_size": 256, "warmup_epochs": 0}
        train.fit(network, textures, epochs=1, lr=1.0, clip_norm=clip, progress=False, **options)
        moved.append((network.conv1.weight.detach() - start).norm().item())
    assert moved[1] <= 1e-3 < moved[0]


# ------------------------------------------------------------------------- mixtures and retraining


@pytest.fixture
def hard(network):
    return models.upcycle(network, topology="hard", experts=3, r=1.0)


def test_the_load_is_balanced_only_where_asked(textures, hard):
    # With a huge weight the balancing loss decides; with none the gates only hear of the classes.
    start = {n: p.detach().clone() for n, p in hard.named_parameters() if ".gate." in n}
    options = {"epochs": 1, "lr": 0.05, "batch_size": 64, "weight_decay": 0.0, "progress": False}
    found = {}
    for balance in (0.0, 100.0):
        network = models.upcycle(models.resnet8(classes=4, seed=2), topology="hard", experts=3, r=1.0)
        train.fit(network, textures, balance=balance, clip_norm=1.0, **options)
        with moe.watching(network) as seen:
            train.evaluate(network, textures, progress=False)
        found[balance] = [moe.statistics(routings) for routings in seen.values()]
        assert any(not torch.equal(start[n], p) for n, p in network.named_parameters() if n in start)
    importance = {b: max(max(s.importance) - min(s.importance) for s in all_) for b, all_ in found.items()}
    assert importance[100.0] < importance[0.0]


def test_a_mixture_resumes_bit_for_bit(textures, tmp_path, hard):
    call = {"epochs": 2, "batch_size": 64, "progress": False, "checkpoint": tmp_path / "run{epoch}.safetensors"}
    hard.get_submodule("conv1").gate.jitter = 0.1  # random numbers of the layers themselves repeat too
    train.fit(hard, textures, **call)
    (tmp_path / "run2.safetensors").unlink()
    again = models.upcycle(models.resnet8(classes=4, seed=5), topology="hard", experts=3, r=1.0)
    again.get_submodule("conv1").gate.jitter = 0.1
    train.fit(again, textures, **call)
    assert same(weights(hard), weights(again))
    with pytest.raises(ValueError, match="mixtures was"):
        train.fit(models.resnet8(classes=4), textures, **call)


def test_what_is_watched_while_evaluating_is_each_image_once(textures, hard):
    with moe.watching(hard) as seen:
        train.evaluate(hard, textures, batch_size=50, progress=False)
    assert [len(routing.choice) for routing in seen["conv1"]] == [50, 14]


@pytest.mark.parametrize("frozen", [True, False])
def test_retraining_heals_and_leaves_frozen_gates_alone(textures, hard, frozen):
    options = {"batch_size": 32, "lr": 0.05, "augment": "none", "progress": False}
    train.fit(hard, textures, epochs=5, **options)
    exact = train.evaluate(hard, textures, progress=False)
    train.calibrate(hard, "mul8s_1L2N", textures, n=64)
    gates = {n: p.detach().clone() for n, p in hard.named_parameters() if ".gate." in n}
    done = train.retrain(hard, textures, epochs=4, freeze_gates=frozen, **options)
    assert [row["epoch"] for row in done.history] == [0, 1, 2, 3, 4] and done.diverged == ""
    assert done.before < exact - 0.1 and done.after > done.before + 0.1
    assert set(assignment_of(hard).values()) == {"mul8s_1L2N"}
    unchanged = [torch.equal(gates[n], p) for n, p in hard.named_parameters() if n in gates]
    assert all(unchanged) if frozen else not any(unchanged)
    assert all(p.requires_grad for p in hard.parameters()), "after the call they can learn again"


def test_a_frozen_gate_is_balanced_only_if_asked_for(textures, tmp_path):
    # The layers before it would be bent to please it, in a Hard network and in no other topology.
    def retrained(topology="hard", checkpoint=None, **options):
        network = models.upcycle(models.resnet8(classes=4, seed=2), topology=topology, experts=3, r=0.5)
        train.calibrate(network, "mul8s_1KV6", textures, n=32)
        options |= {"batch_size": 32, "augment": "none", "progress": False, "checkpoint": checkpoint}
        train.retrain(network, textures, epochs=1, **options)
        return weights(network)

    left = retrained(balance=0.0)
    assert same(left, retrained(balance=1.0)) and same(left, retrained(balance=0.0, balance_frozen=True))
    assert not same(left, retrained(balance=1.0, balance_frozen=True))
    assert same(*(retrained("soft", balance=1.0, balance_frozen=frozen) for frozen in (False, True)))
    for frozen, file in ((False, tmp_path / "left.safetensors"), (True, tmp_path / "bent.safetensors")):
        retrained(checkpoint=file, balance=1.0, balance_frozen=frozen)
        with pytest.raises(ValueError, match="balance_frozen"):
            retrained(checkpoint=file, balance=1.0, balance_frozen=not frozen)


def test_retraining_reports_divergence_and_keeps_the_last_good_network(textures, network):
    train.calibrate(network, "mul8s_1KVA", textures, n=64)
    before = weights(network)
    done = train.retrain(network, textures, epochs=2, lr=1e30, progress=False)
    assert "lower lr" in done.diverged and "epoch 1 of 2" in done.diverged
    assert len(done.history) == 1 and done.after == done.before
    assert same(before, weights(network))


def test_retraining_needs_an_approximate_network(network, textures):
    with pytest.raises(ValueError, match=r"no approximate layer.*calibrate"):
        train.retrain(network, textures)


def test_calibration_reaches_experts_that_no_image_reaches(textures, hard):
    for name in moe.mixtures(hard):  # all images to expert 0
        gate = hard.get_submodule(name).gate.score
        torch.nn.init.zeros_(gate.weight)
        gate.bias.data.copy_(torch.tensor([5.0, 0.0, 0.0]))
    train.calibrate(hard, "mul8s_1KV6", textures, n=8)
    assert all(layer.calibrated for layer in hard.modules() if hasattr(layer, "calibrated"))


def test_calibration_sees_training_images_only(textures, network):
    def scales(images):
        train.calibrate(network, "mul8s_1KV6", images, n=32)
        return torch.stack([layer.scale_x for layer in network.modules() if hasattr(layer, "scale_x")])

    black = torch.zeros_like
    seen = scales(textures)
    assert torch.equal(scales(replace(textures, x_test=black(textures.x_test))), seen)
    assert not torch.equal(scales(replace(textures, x_train=black(textures.x_train))), seen)


@pytest.mark.parametrize("by", ["features", "classes"])
def test_a_gateway_groups_what_belongs_together(textures, network, by):
    train.fit(network, textures, epochs=5, batch_size=32, lr=0.05, progress=False)
    gateway = train.gateway_of(network, textures, experts=2, by=by)
    x = textures.normalised(textures.x_test)
    choice = gateway(x).argmax(1)
    # Images of one class mostly go the same way, and each expert gets some class.
    share = torch.stack([(choice[textures.y_test == c] == 0).float().mean() for c in range(4)])
    assert ((share < 0.25) | (share > 0.75)).sum() >= 3 and 0 < choice.float().mean() < 1
    assert torch.equal(gateway(x), train.gateway_of(network, textures, experts=2, by=by)(x)), "seeded"
    assert network.fc.out_features == 4, "the classifier stays as it is"
    if by == "features":  # the head is the nearest centre: |f - c|^2 = |f|^2 - (2 c.f - |c|^2)
        features = torch.nn.Sequential(*list(network.eval().children())[:-1], torch.nn.Flatten())(x)
        distance = torch.cdist(features, gateway.fc.weight / 2)
        assert torch.equal(distance.argmin(1), choice)


def test_a_gateway_needs_enough_to_group(textures, network):
    with pytest.raises(ValueError, match="5 clusters were asked for; there are 4 classes"):
        train.gateway_of(network, textures, experts=5, by="classes")
    with pytest.raises(ValueError, match=r"by is 'colour'.*'features', 'classes'"):
        train.gateway_of(network, textures, experts=2, by="colour")
    with pytest.raises(ValueError, match="no linear layer"):
        train.gateway_of(torch.nn.Conv2d(3, 4, 3), textures, experts=2)


def test_recipes_follow_the_architecture():
    vit = models.ViT(dim=12, depth=1, heads=3, classes=4, image_size=8, patch=4)
    assert train.recipe(vit, stage="retrain")["optimiser"] == "adamw"
    assert (
        train.recipe(models.upcycle(vit, topology="cluster", gateway=torch.nn.Flatten()), stage="retrain")["lr"] == 1e-4
    )
    assert train.recipe(models.resnet8(classes=4), stage="retrain")["lr"] == 0.1
    with pytest.raises(ValueError, match="stage is 'heal'"):
        train.recipe(vit, stage="heal")


def test_schedule_by_hand():
    # Four warm-up steps, then a cosine over 8: half of the peak after half of it.
    values = [train.schedule(s, steps=12, warmup=4) for s in range(12)]
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert values[8] == pytest.approx(0.5) and values[11] < 0.05


def test_predict_keeps_the_mode_and_does_not_depend_on_the_batch(network, textures):
    network.train()
    network.bn1.eval()  # a part that the user froze stays frozen
    one, other = (train.predict(network, textures, batch_size=n, progress=False) for n in (7, 64))
    assert network.training and not network.bn1.training and torch.equal(one, other) and one.shape == (64,)
    accuracy = (one == textures.y_test).float().mean().item()
    assert train.evaluate(network, textures, progress=False) == pytest.approx(accuracy)


def test_resilience_reports_every_multiplier_and_leaves_the_network_exact(network, textures):
    before = weights(network)
    calibration = textures.normalised(textures.x_train[:32])
    rows = train.resilience(network, textures, EVOAPPROX, calibration=calibration, progress=False)
    assert [row["multiplier"] for row in rows] == ["float32", *EVOAPPROX]
    assert same(before, weights(network)) and assignment_of(network) == {}
    for row in rows:
        assert row["top1"] == row["correct"] / 64
    # Each row is what evaluate says of the network so assembled.
    approximate(network, "mul8s_1KXF", calibration=calibration)
    assert rows[10]["multiplier"] == "mul8s_1KXF"
    assert rows[10]["top1"] == pytest.approx(train.evaluate(network, textures, progress=False))


@pytest.mark.parametrize("names", [["float32", "mul8s_1L2N"], ["mul8s_1L2N", "float32"]])
def test_resilience_measures_float32_once_and_first(names, network, textures):
    calibration = textures.normalised(textures.x_train[:32])
    found, expected = (
        [(row["multiplier"], row["correct"]) for row in train.resilience(network, textures, asked, **options)]
        for options in [{"calibration": calibration, "progress": False}]
        for asked in (names, ["mul8s_1L2N"])
    )
    assert found == expected and [name for name, _ in found] == ["float32", "mul8s_1L2N"]


def test_resilience_refuses_before_any_work(network, textures):
    calibration = textures.normalised(textures.x_train[:32])
    with pytest.raises(ValueError, match="mul8s_1L2X"):
        train.resilience(network, textures, ["mul8s_1L2N", "mul8s_1L2X"], calibration=calibration, progress=False)
    assert assignment_of(network) == {}
    approximate(network, "mul8s_1L2N", calibration=calibration)
    with pytest.raises(ValueError, match="approximate layers already; restore"):
        train.resilience(network, textures, ["mul8s_1L2J"], calibration=calibration, progress=False)


# ----------------------------------------------------------------------------- checkpoints


def test_save_and_load(network, tmp_path):
    train.save(network, tmp_path / "net.safetensors", recipe={"epochs": 3, "seed": 0})
    other = models.resnet8(classes=4, seed=7)
    assert train.load(other, tmp_path / "net.safetensors") == {"epochs": 3, "seed": 0}
    assert same(weights(network), weights(other))
    assert other.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.trust("input", "checkpoints and networks from broken files")
def test_load_refuses_what_does_not_fit(network, tmp_path):
    path = tmp_path / "net.safetensors"
    train.save(network, path, recipe={})
    with pytest.raises(ValueError, match=r"2 tensors differ, such as 'fc.bias', which is \(4,\) in the file"):
        train.load(models.resnet8(classes=9), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        train.load(network, path)
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        train.load(network, tmp_path / "absent.safetensors")


def test_the_committed_network_loads():
    from axmoe_lite import paths

    path = paths.CHECKOUT / "data" / "checkpoints" / "resnet20-cifar100-seed0-epochs60.safetensors"
    recipe = train.load(models.resnet20(classes=100), path)
    assert recipe["dataset"] == "cifar100" and recipe["epochs"] == 60 and recipe["commit"]
    assert path.stat().st_size < 2_000_000
    json.dumps(recipe)

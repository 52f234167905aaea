"""Training learns, repeats itself exactly, resumes where it was killed, and loads only what fits."""

import json

import pytest
import torch

from axmoe_lite import EVOAPPROX, assignment_of, models, train
from axmoe_lite.layers import approximate


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
    monkeypatch.setattr(
        train, "_one_epoch", lambda *_, generator, **__: seen.append(generator.initial_seed()) or (1, 0)
    )
    for seed in (0, 1, 2):
        train.fit(network, textures, epochs=4, seed=seed, progress=False)
    assert len(seen) == len(set(seen)) == 12


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_killed_run_resumes_bit_for_bit(textures, tmp_path, monkeypatch, precision):
    call = {"epochs": 3, "batch_size": 64, "precision": precision, "progress": False}
    whole = models.resnet8(classes=4)
    expected = train.fit(whole, textures, **call)

    real, epochs = train._one_epoch, []

    def killed_in_the_third(*args, **kwargs):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(train, "_one_epoch", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.fit(models.resnet8(classes=4), textures, checkpoint=path, **call)
    monkeypatch.setattr(train, "_one_epoch", real)
    resumed = models.resnet8(classes=4, seed=99)  # whatever it starts from, the checkpoint wins
    history = train.fit(resumed, textures, checkpoint=path, **call)
    assert same(weights(whole), weights(resumed))
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"], "no partial file is left"
    # Finished: a further call only loads.
    monkeypatch.setattr(train, "_one_epoch", None)
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


# ----------------------------------------------------------------------------- checkpoints


def test_save_and_load(network, tmp_path):
    train.save(network, tmp_path / "net.safetensors", recipe={"epochs": 3, "seed": 0})
    other = models.resnet8(classes=4, seed=7)
    assert train.load(other, tmp_path / "net.safetensors") == {"epochs": 3, "seed": 0}
    assert same(weights(network), weights(other))
    assert other.conv1.weight.is_contiguous(memory_format=torch.channels_last)


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

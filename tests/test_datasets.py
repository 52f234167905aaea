"""Image sets: the offline ones are real and learnable, the others refuse what is damaged."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch
from safetensors import safe_open

from axmoe_lite import datasets, models, paths
from axmoe_lite.datasets import Images, crop_flip

REAL = paths.CHECKOUT / "data" / "cache" / "cifar100.npz"


def archive(folder, name="mine", **changes):
    rng = np.random.default_rng(0)
    parts = {
        "x_train": rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
        "classes": np.array(["a", "b", "c"]),
    }
    parts.update(changes)
    path = folder / f"{name}.npz"
    np.savez(path, **{key: value for key, value in parts.items() if value is not None})
    return path


def test_digits_are_real_and_split_by_seed():
    images = datasets.digits()
    assert images.x_train.shape == (1437, 3, 32, 32) and images.x_test.shape == (360, 3, 32, 32)
    assert set(images.y_test.tolist()) == set(range(10))
    assert torch.equal(images.x_train, datasets.digits().x_train)
    assert not torch.equal(images.y_test, datasets.digits(seed=1).y_test)
    # A nearest-mean classifier tells the digits apart: the labels belong to the pictures.
    means = torch.stack([images.x_train[images.y_train == c].float().mean(0) for c in range(10)])
    nearest = torch.cdist(images.x_test.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == images.y_test).float().mean() > 0.85


def test_synthetic_follows_its_arguments():
    images = datasets.synthetic(classes=7, size=20, n_train=50, n_test=9, seed=3)
    assert images.x_train.shape == (50, 3, 20, 20) and images.x_test.shape == (9, 3, 20, 20)
    assert len(images.classes) == 7
    assert torch.equal(images.x_train, datasets.synthetic(classes=7, size=20, n_train=50, n_test=9, seed=3).x_train)
    with pytest.raises(ValueError, match="classes = 1.*at least 2"):
        datasets.synthetic(classes=1)


def test_normalised_images_have_mean_0_and_deviation_1():
    images = datasets.digits()
    x = images.normalised(images.x_train)
    assert x.dtype == torch.float32
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(3), atol=1e-3)


def test_a_subset_keeps_every_class_and_the_statistics():
    x = torch.zeros(100, 3, 4, 4, dtype=torch.uint8)
    y = torch.arange(100) // 10  # ordered by class
    images = Images("ordered", x + y[:, None, None, None].to(torch.uint8), y, x, y, tuple("0123456789"))
    few = images.subset(n_train=20, n_test=10)
    assert few.y_train.bincount().tolist() == [2] * 10 and few.y_test.tolist() == list(range(10))
    assert few.mean == images.mean and few.std == images.std
    assert len(images.subset(n_test=5).x_train) == 100
    with pytest.raises(ValueError, match="subset of 0"):
        images.subset(n_test=0)


@pytest.mark.parametrize("file", sorted(path.name for path in paths.checkpoints_dir().glob("*.safetensors")))
def test_committed_networks_know_their_images_on_every_machine(file):
    # A mean that another processor rounds otherwise would have them trained again, in silence.
    with safe_open(paths.checkpoints_dir() / file, "pt") as stored:
        recipe = json.loads(stored.metadata()["recipe"])
    try:
        images = datasets.load(recipe["dataset"])
    except FileNotFoundError:
        pytest.skip(f"{recipe['dataset']} is not here")
    assert images.digest == recipe["data"]


def test_normalisation_is_the_exact_one():
    images = datasets.synthetic(classes=3, size=8, n_train=12, n_test=3)
    for c in range(3):
        values = images.x_train[:, c].flatten().tolist()
        assert images.mean[c] == pytest.approx(statistics.fmean(values) / 255, rel=1e-15)
        assert images.std[c] == pytest.approx(statistics.pstdev(values) / 255, rel=1e-15)


def test_the_digest_knows_the_images_that_are_learnt():
    one, again, other = (datasets.synthetic(classes=3, size=8, n_train=12, n_test=6, seed=seed) for seed in (0, 0, 1))
    assert one.digest == again.digest != other.digest and len(one.digest) == 12
    assert one.digest == one.subset(n_test=2).digest == one.to("cpu").digest != one.subset(n_train=6).digest
    assert one.digest != dataclasses.replace(one, y_train=one.y_train.flip(0)).digest


def test_crop_flip_by_hand():
    # With padding 0 nothing can move, so an image comes back as it is or mirrored.
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(torch.uint8)
    out = crop_flip(x.repeat(20, 1, 1, 1), generator=torch.Generator().manual_seed(0), padding=0)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(out, x.repeat(20, 1, 1, 1), strict=True)]
    same = [torch.equal(a, b) for a, b in zip(out, x.repeat(20, 1, 1, 1), strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True)) and 8 < sum(mirrored) < 32
    out = crop_flip(x.repeat(20, 1, 1, 1), generator=torch.Generator().manual_seed(0), padding=0, flip=False)
    assert torch.equal(out, x.repeat(20, 1, 1, 1))


def test_crop_shifts_within_the_padding_and_fills_black():
    x = torch.full((200, 1, 6, 6), 9, dtype=torch.uint8)
    out = crop_flip(x, generator=torch.Generator().manual_seed(0), padding=2)
    black = (out == 0).sum((1, 2, 3))
    assert out.shape == x.shape and black.min() == 0 and black.max() == 36 - 16  # shifted by 2 in both directions
    assert set(out.unique().tolist()) == {0, 9}


# -------------------------------------------------------------------------------- bad input


def test_images_refuse_what_does_not_fit():
    x, y = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    for change, problem in [
        ({"x_test": x[:0], "y_test": y[:0]}, "mine: test images are empty"),
        ({"x_train": x.float()}, r"mine: train images must be uint8.*permute"),
        ({"x_train": x[0]}, r"\[3, 8, 8\]"),
        ({"x_test": x[:, :, :4]}, r"\(3, 4, 8\)"),
        ({"y_train": y[:3]}, r"must be int64 \[4\]"),
        ({"y_train": y + 1}, r"from 1 to 2.*0\.\.1"),
        ({"y_test": y.float()}, "float32"),
    ]:
        parts = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, **change}
        with pytest.raises(ValueError, match=problem):
            Images("mine", classes=("a", "b"), **parts)


def test_read_npz(tmp_path):
    path = archive(tmp_path)
    images = datasets.read_npz(path)
    assert images.name == "mine" and images.classes == ("a", "b", "c") and images.x_train.shape == (12, 3, 8, 8)
    assert images.x_train[0, :, 0, 0].tolist() == np.load(path)["x_train"][0, 0, 0].tolist()


@pytest.mark.trust("input", "archives of images, broken")
@pytest.mark.parametrize("keep", [0, 1, 100, 700, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = archive(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"mine\.npz.*damaged or incomplete; delete it"):
        datasets.read_npz(path)


@pytest.mark.trust("input", "archives of images, broken")
def test_corrupt_files_are_refused(tmp_path):
    path = archive(tmp_path)
    data = bytearray(path.read_bytes())
    data[400] ^= 0xFF  # inside the first array: the archive's checksum no longer fits
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        datasets.read_npz(path)


@pytest.mark.trust("input", "archives of images, broken")
@pytest.mark.parametrize(
    "changes,problem",
    [
        ({"y_test": None}, "no y_test"),
        ({"x_train": np.zeros((12, 8, 8), np.uint8)}, r"uint8 \[N, H, W, C\]"),
        ({"x_train": np.zeros((12, 8, 8, 3), np.float32)}, "float32"),
        ({"y_train": np.zeros(12)}, "integers"),
        ({"y_train": np.full(12, 9)}, "from 9 to 9"),
        ({"classes": np.array([{"pickled": 1}], dtype=object)}, "damaged"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, changes, problem):
    with pytest.raises(ValueError, match=problem):
        datasets.read_npz(archive(tmp_path, **changes))


def test_cifar_of_the_wrong_size_is_refused(elsewhere):
    (elsewhere / "data" / "cache").mkdir(parents=True)
    archive(elsewhere / "data" / "cache", "cifar10")
    with pytest.raises(ValueError, match=r"cifar10 has 10 classes and x_train \[50000, 3, 32, 32\]. Delete the file"):
        datasets.cifar10()


def test_without_a_network_the_message_says_what_to_do(elsewhere, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    torchvision = models.import_torchvision()
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", refuse)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*cifar100\.npz.*digits\(\) and"):
        datasets.cifar100()
    assert not list((elsewhere / "data" / "cache").glob("*")), "no half file is left"


def test_a_download_is_written_once_in_our_form(elsewhere, monkeypatch):
    class Source:
        def __init__(self, root, train, download):
            self.classes = [f"class {i}" for i in range(10)]
            n = 50_000 if train else 10_000
            self.data = np.full((n, 32, 32, 3), 7, np.uint8)
            self.data[0, 0, 1] = (1, 2, 3)
            self.targets = [i % 10 for i in range(n)]

    monkeypatch.setattr(models.import_torchvision().datasets, "CIFAR10", Source)
    images = datasets.cifar10()
    assert images.x_train[0, :, 0, 1].tolist() == [1, 2, 3] and images.classes[3] == "class 3"
    monkeypatch.delattr(models.import_torchvision().datasets, "CIFAR10")
    assert torch.equal(datasets.cifar10().x_test, images.x_test), "read from the file the second time"


def test_unknown_sets_are_refused():
    with pytest.raises(ValueError, match="'cifar'.*Did you mean 'cifar10"):
        datasets.load("cifar")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        datasets.read_npz("nowhere.npz")


@pytest.mark.skipif(not REAL.exists(), reason="needs the real CIFAR-100 in data/cache/cifar100.npz")
def test_the_real_cifar100():
    images = datasets.cifar100()
    assert images.x_train.shape == (50_000, 3, 32, 32) and images.y_test.bincount().tolist() == [100] * 100
    assert [round(m, 4) for m in images.mean] == [0.5071, 0.4865, 0.4409]  # the field's well-known numbers
    assert [round(s, 4) for s in images.std] == [0.2673, 0.2564, 0.2762]

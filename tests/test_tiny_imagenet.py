"""Tiny ImageNet from its own zip: the right pictures with the right classes, once."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from axmoe_lite import datasets, paths

IDS = ["n02", "n01", "n03"]


def jpeg(shade, mode="RGB"):
    picture = Image.fromarray(np.full((64, 64), shade, np.uint8)).convert(mode)
    picture.save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path)
    path, top = tmp_path / "tiny-imagenet-200.zip", "tiny-imagenet-200/"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(top + "wnids.txt", "\n".join(IDS))
        file.writestr(top + "words.txt", "n01\tgoldfish\nn02\tbullfrog, frog\nn99\tother\n")
        for label, name in enumerate(IDS):
            for i in range(2):
                mode = "L" if i else "RGB"  # some of the set's photographs are grey
                file.writestr(f"{top}train/{name}/images/{name}_{i}.JPEG", jpeg(50 * label + i, mode))
            file.writestr(f"{top}train/{name}/{name}_boxes.txt", "")
            file.writestr(f"{top}val/images/val_{label}.JPEG", jpeg(50 * label + 5))
        lines = [f"val_{label}.JPEG\t{IDS[label]}\t0\t0\t62\t62" for label in (2, 0, 1)]
        file.writestr(top + "val/val_annotations.txt", "\n".join(lines))
    return path


def test_the_zip_is_converted_once(archive):
    with pytest.raises(ValueError, match="200 classes were asked for; tiny-imagenet-200 has 1 to 3"):
        datasets.tiny_imagenet()
    archive.unlink()  # the converted file is enough
    images = datasets.tiny_imagenet(classes=3)
    assert images.classes == ("bullfrog, frog", "goldfish", "n03") and images.name == "tiny-imagenet-200"
    shades = images.x_train.float().mean((1, 2, 3)).round().tolist()
    assert [round(s / 50) for s in shades] == images.y_train.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.y_test.tolist() == [2, 0, 1] and images.x_test.shape == (3, 3, 64, 64)
    assert [round((s - 5) / 50) for s in images.x_test.float().mean((1, 2, 3)).tolist()] == [2, 0, 1]


def test_fewer_classes_are_taken_at_even_steps(archive):
    images = datasets.tiny_imagenet(classes=2)
    assert images.name == "tiny-imagenet-2of3" and images.classes == ("bullfrog, frog", "goldfish")
    assert images.y_train.tolist() == [0, 0, 1, 1] and images.y_test.tolist() == [0, 1]
    with pytest.raises(ValueError, match="0 classes"):
        datasets.tiny_imagenet(classes=0)


def test_without_the_zip_it_says_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200\.zip"):
        datasets.load("tiny_imagenet")

"""Image sets as plain tensors: two that need no network, three that are downloaded once.

A data set here is small enough to sit on the device as one uint8 tensor, so there are no loader
processes: a batch is an index, and augmentation is two tensor operations (:func:`crop_flip`).

    digits()      1,797 handwritten digits from scikit-learn, the offline default (real images)
    synthetic()   any number of classes, any size; learnable textures, for tests and scaling
    cifar10()     50,000 + 10,000 photographs, 10 classes
    cifar100()    50,000 + 10,000 photographs, 100 classes
    tiny_imagenet()   100,000 + 10,000 photographs of 64 x 64 pixels, 200 classes, or some of them

The photographs are read from ``data/cache/<name>.npz`` if that file is there. Else CIFAR is fetched through
torchvision, and Tiny ImageNet read from its own zip, and written there. Letters: N images, C channels, H x W pixels.

Chapter: 05, "What happens to a network?"
"""

import difflib
import functools
import hashlib
import io
import math
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from axmoe_lite import paths
from axmoe_lite.models import import_torchvision

KEYS = ("x_train", "y_train", "x_test", "y_test", "classes")
PACKED = 100  # images of an archive are rarely packed to a tenth; what unpacks to so many times its size is a trap


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled image set held in memory, checked when it is made.

    Args:
        name: what rows of results call it, for example ``"cifar100"``.
        x_train, x_test: uint8 [N, C, H, W], the same C, H, W in both.
        y_train, y_test: int64 [N], each in ``0 .. len(classes) - 1``.
        classes: the class names in label order.
        mean, std: of each channel of the training images, in [0, 1]; measured when left out, and kept
            by :meth:`subset`, so that a network sees the same numbers whatever part it is tested on.

    Raises:
        ValueError: for an empty split, a wrong shape or dtype, or a label that names no class.

    >>> tiny = synthetic(classes=3, size=8, n_train=12, n_test=6)
    >>> tiny.x_train.shape, len(tiny.classes)
    (torch.Size([12, 3, 8, 8]), 3)
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for split, x, y in (("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)):
            _check_split(f"{self.name}: {split}", x, y, len(self.classes))
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"{self.name}: training images are {tuple(self.x_train.shape[1:])} and test images "
                f"{tuple(self.x_test.shape[1:])}; give both splits the same [C, H, W]."
            )
        if not self.mean:
            mean, std = _statistics(self.x_train)
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)

    @functools.cached_property
    def digest(self) -> str:
        """Twelve letters that differ where training images, their labels or their normalisation do."""
        found = hashlib.sha256(repr((self.mean, self.std)).encode())
        for part in (self.x_train, self.y_train):
            found.update(repr(tuple(part.shape)).encode() + part.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:12]

    def normalised(self, x: Tensor) -> Tensor:
        """uint8 [N, C, H, W] to float32 with zero mean and unit deviation in each channel."""
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x.float() / 255 - mean) / std

    def to(self, device: torch.device | str) -> "Images":
        """The same set with its tensors on ``device``."""
        moved = {key: getattr(self, key).to(device) for key in ("x_train", "y_train", "x_test", "y_test")}
        return replace(self, **moved)

    def subset(self, *, n_train: int | None = None, n_test: int | None = None) -> "Images":
        """At most ``n_train`` and ``n_test`` images (``None``: all), taken at even steps through the set.

        Even steps keep every class of a set that is ordered by class.
        """

        def evenly(x: Tensor, n: int | None) -> Tensor:
            if n is not None and n < 1:
                raise ValueError(f"{self.name}: a subset of {n} images was asked for; at least 1 is needed.")
            n = len(x) if n is None else min(n, len(x))
            return torch.arange(n, device=x.device) * len(x) // n

        train, test = evenly(self.x_train, n_train), evenly(self.x_test, n_test)
        return replace(
            self,
            x_train=self.x_train[train],
            y_train=self.y_train[train],
            x_test=self.x_test[test],
            y_test=self.y_test[test],
        )


def _statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """In whole numbers up to one division and one root, which every machine rounds alike."""
    means, deviations = [], []
    for channel in x.transpose(0, 1).cpu():
        counts = torch.bincount(channel.flatten(), minlength=256).tolist()
        n = sum(counts)
        total, squares = (sum(count * value**power for value, count in enumerate(counts)) for power in (1, 2))
        means.append(total / (255 * n))
        deviations.append(math.sqrt(max(1.0, (n * squares - total**2) / n**2)) / 255)
    return tuple(means), tuple(deviations)


def _check_split(where: str, x: Tensor, y: Tensor, classes: int) -> None:
    if x.ndim != 4 or x.dtype != torch.uint8:
        raise ValueError(
            f"{where} images must be uint8 [N, C, H, W]; these are {x.dtype} {list(x.shape)}."
            " (Images stored as [N, H, W, C] need .permute(0, 3, 1, 2).)"
        )
    if len(x) == 0 or 0 in x.shape:
        raise ValueError(f"{where} images are empty, shape {list(x.shape)}; at least one image is needed.")
    if y.dtype != torch.int64 or y.shape != x.shape[:1]:
        raise ValueError(f"{where} labels must be int64 [{len(x)}]; these are {y.dtype} {list(y.shape)}.")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(
            f"{where} labels run from {int(y.min())} to {int(y.max())}, but there are {classes} classes;"
            f" labels must lie in 0..{classes - 1}."
        )


def crop_flip(x: Tensor, *, generator: torch.Generator, padding: int = 4, flip: bool = True) -> Tensor:
    """Shift each image by up to ``padding`` pixels (black outside) and, with ``flip``, mirror half of them.

    Args:
        x: [N, C, H, W], any dtype, any device.
        generator: a CPU generator, so that every device draws the same augmentation.

    Returns:
        [N, C, H, W], a new tensor.
    """
    n, _, height, width = x.shape
    shift = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    mirror = torch.rand(n, 1, generator=generator) < (0.5 if flip else 0)
    rows = shift[0] + torch.arange(height)
    columns = torch.where(mirror, torch.arange(width).flip(0), torch.arange(width)) + shift[1]
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    # Advanced indices first, the channel last: [N, H, W, C], which is channels_last memory already.
    image = torch.arange(n)[:, None, None]
    picked = padded.permute(0, 2, 3, 1)[
        image.to(x.device), rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)
    ]
    return picked.permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------- offline


def digits(*, seed: int = 0) -> Images:
    """scikit-learn's handwritten digits, enlarged from 8x8 to 32x32 RGB: 1,437 to learn, 360 to test.

    Real images that ship inside a package, so the book runs with the network off. ``seed`` draws
    the split. Grey is copied to three channels, so that the networks are those of CIFAR.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = torch.from_numpy(raw.images).float()[:, None] / 16
    large = torch.nn.functional.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    x = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:360], order[360:]
    return Images("digits", x[train], y[train], x[test], y[test], tuple("0123456789"))


def synthetic(*, classes: int = 10, size: int = 32, n_train: int = 2000, n_test: int = 500, seed: int = 0) -> Images:
    """Textures that a network can learn: one smooth random pattern a class, shifted, faded and noisy.

    Every image is its class's pattern rolled by a random amount, so a classifier must find the
    texture and not a pixel. Made for tests and for scaling studies, not for claims.

    Raises:
        ValueError: when ``classes``, ``size`` or a count is below its minimum (2, 4 and 1).
    """
    for name, value, least in (
        ("classes", classes, 2),
        ("size", size, 4),
        ("n_train", n_train, 1),
        ("n_test", n_test, 1),
    ):
        if value < least:
            raise ValueError(f"synthetic() was asked for {name} = {value}; it must be at least {least}.")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, 3, 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-2, 2)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(0, classes, (n,), generator=generator)
        shift = torch.randint(0, size, (2, n, 1), generator=generator)
        rows, columns = (shift + torch.arange(size)) % size
        image = torch.arange(n)[:, None, None]
        x = patterns[y].permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
        contrast = 25 + 20 * torch.rand(n, 1, 1, 1, generator=generator)
        noise = 12 * torch.randn(x.shape, generator=generator)
        return (128 + contrast * x + noise).clamp(0, 255).round().to(torch.uint8).permute(0, 3, 1, 2), y

    (x_train, y_train), (x_test, y_test) = draw(n_train), draw(n_test)
    names = tuple(f"texture {i}" for i in range(classes))
    return Images("synthetic", x_train.contiguous(), y_train, x_test.contiguous(), y_test, names)


# --------------------------------------------------------------------------- downloaded once


def cifar10() -> Images:
    """CIFAR-10: 50,000 + 10,000 RGB photographs of 32x32 pixels (Krizhevsky, 2009)."""
    return _cifar("cifar10", "CIFAR10", 10)


def cifar100() -> Images:
    """CIFAR-100 with its 100 fine labels: 50,000 + 10,000 RGB photographs of 32x32 pixels."""
    return _cifar("cifar100", "CIFAR100", 100)


def _cifar(name: str, torchvision_class: str, classes: int) -> Images:
    path = paths.cache_dir() / f"{name}.npz"
    if not path.exists():
        _download_cifar(path, torchvision_class)
    images = read_npz(path)
    expected = {"x_train": (50_000, 3, 32, 32), "x_test": (10_000, 3, 32, 32)}
    for key, shape in expected.items():
        if tuple(getattr(images, key).shape) != shape or len(images.classes) != classes:
            raise ValueError(
                f"{path} holds {len(images.classes)} classes and {key} {list(getattr(images, key).shape)};"
                f" {name} has {classes} classes and {key} {list(shape)}. Delete the file and call {name}()"
                " again where there is a network."
            )
    return images


def tiny_imagenet(*, classes: int = 200) -> Images:
    """Tiny ImageNet-200: 500 training and 50 validation photographs of each class, which are the test images here.

    Args:
        classes: take that many of the 200, at even steps; the set is then named ``tiny-imagenet-20of200``.

    Raises:
        FileNotFoundError: if neither ``tiny-imagenet-200.npz`` nor the official ``tiny-imagenet-200.zip``
            (cs231n.stanford.edu/tiny-imagenet-200.zip, 237 MB) lies in ``data/cache``.
    """
    path = paths.cache_dir() / "tiny-imagenet-200.npz"
    if not path.exists():
        _convert_tiny_imagenet(path.with_suffix(".zip"), path)
    images = read_npz(path)
    if not 1 <= classes <= len(images.classes):
        raise ValueError(f"{classes} classes were asked for; {images.name} has 1 to {len(images.classes)}.")
    if classes == len(images.classes):
        return images
    kept = torch.arange(classes) * len(images.classes) // classes
    parts = {}
    for split in ("train", "test"):
        x, y = getattr(images, f"x_{split}"), getattr(images, f"y_{split}")
        among = torch.isin(y, kept)
        parts |= {f"x_{split}": x[among], f"y_{split}": torch.searchsorted(kept, y[among])}
    name = f"tiny-imagenet-{classes}of{len(images.classes)}"
    return Images(name, **parts, classes=tuple(images.classes[c] for c in kept))


def _convert_tiny_imagenet(source: Path, path: Path) -> None:
    """From the official zip to one file of arrays, moved into place when it is whole."""
    if not source.exists():
        raise FileNotFoundError(
            f"Tiny ImageNet is not at {path}. Download http://cs231n.stanford.edu/{source.name} (237 MB) to"
            f" {source} and call again: it is converted once. Without a network, digits() and synthetic() work."
        )
    if not source.is_file():
        raise ValueError(f"{source} is a folder or a device; the official zip is needed there.")
    try:
        arrays = _tiny_imagenet_arrays(source)
    except Exception as reason:  # a damaged zip, text or photograph can raise almost anything
        raise ValueError(
            f"{source} cannot be read as Tiny ImageNet: {reason or type(reason).__name__}. It is damaged or incomplete;"
            " delete it, then download it again."
        ) from reason
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        np.savez(finished := Path(folder) / path.name, **arrays)
        os.replace(finished, path)


def _tiny_imagenet_arrays(source: Path) -> dict[str, np.ndarray]:
    """What :func:`read_npz` reads; nothing is unpacked but the texts and photographs, each of its proper size."""
    from PIL import Image  # comes with torchvision

    with zipfile.ZipFile(source) as archive:
        _check_packed(source, archive.infolist())

        def picture(name: str) -> np.ndarray:
            with Image.open(io.BytesIO(archive.read(name)), formats=["JPEG"]) as opened:
                if opened.size != (64, 64):  # before it is decoded
                    raise ValueError(f"{name} has {opened.size} pixels, not 64 x 64")
                return np.asarray(opened.convert("RGB"))

        top = "tiny-imagenet-200/"
        ids = archive.read(f"{top}wnids.txt").decode().split()
        called = dict(line.split("\t", 1) for line in archive.read(f"{top}words.txt").decode().splitlines())
        files = {"train": [], "test": []}
        for name in archive.namelist():
            if name.startswith(f"{top}train/") and name.endswith(".JPEG"):
                files["train"].append((name, name.split("/")[2]))
        for line in archive.read(f"{top}val/val_annotations.txt").decode().splitlines():
            files["test"].append((f"{top}val/images/{line.split(chr(9))[0]}", line.split("\t")[1]))
        arrays: dict = {"classes": np.array([called.get(i, i) for i in ids])}
        for split, named in files.items():
            arrays[f"y_{split}"] = np.array([ids.index(i) for _, i in named], np.int64)
            arrays[f"x_{split}"] = np.stack([picture(name) for name, _ in named])
    return arrays


def read_npz(path: Path | str) -> Images:
    """Read an image set from one ``.npz`` file: your own, or a cached one.

    Args:
        path: a file with ``x_train``, ``x_test`` (uint8 [N, H, W, C]), ``y_train``, ``y_test``
            (integers [N]) and ``classes`` (strings). The set is named after the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, truncated, lacks a key, or holds the wrong shapes.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No image set at {path}; a .npz file with the keys {', '.join(KEYS)} is needed.")
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is a folder or a device; an image set is read from a plain .npz file.")
    try:
        raw = _arrays(path)
        classes = tuple(str(c) for c in raw["classes"].flat)  # numpy's text may hold what is no letter
    except Exception as reason:  # a damaged archive can raise almost anything
        raise ValueError(
            f"{path} cannot be read as an image set: {reason}. It is damaged or incomplete; delete it, then"
            f" download or copy it again (keys needed: {', '.join(KEYS)})."
        ) from reason
    for key in ("x_train", "x_test"):
        if raw[key].ndim != 4 or raw[key].dtype != np.uint8:
            raise ValueError(f"{path}: {key} must be uint8 [N, H, W, C], not {raw[key].dtype} {list(raw[key].shape)}.")
    for key in ("y_train", "y_test"):
        if raw[key].dtype.kind not in "iu":
            raise ValueError(f"{path}: {key} must be integers [N], not {raw[key].dtype}.")
    if raw["classes"].ndim != 1:
        raise ValueError(f"{path}: classes must be a list of names, not of shape {list(raw['classes'].shape)}.")
    x_train, x_test = (torch.from_numpy(raw[key]).permute(0, 3, 1, 2).contiguous() for key in ("x_train", "x_test"))
    y_train, y_test = (torch.from_numpy(raw[key].astype(np.int64)) for key in ("y_train", "y_test"))
    try:
        return Images(path.stem, x_train, y_train, x_test, y_test, classes)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the keys. None is made before its head, the archive's list and the file's size agree."""
    with zipfile.ZipFile(path) as archive:
        there = [name.removesuffix(".npy") for name in archive.namelist()]
        if missing := [key for key in KEYS if key not in there]:
            raise ValueError(f"it has no {', '.join(missing)} (its keys: {', '.join(there) or 'none'})")
        members = {key: archive.getinfo(f"{key}.npy") for key in KEYS}
        _check_packed(path, list(members.values()))
        for key, member in members.items():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                head = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, kind = head[version](file)
            if min(shape, default=0) < 0 or math.prod(shape) * max(kind.itemsize, 1) > member.file_size:
                raise ValueError(f"{key} of shape {list(shape)} does not fit into its {member.file_size:,} bytes")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in KEYS}


def _check_packed(path: Path, members: list[zipfile.ZipInfo]) -> None:
    unpacked, packed = sum(member.file_size for member in members), path.stat().st_size
    if unpacked > max(2**26, PACKED * packed):
        raise ValueError(f"it would unpack from {packed:,} to {unpacked:,} bytes")


def _download_cifar(path: Path, torchvision_class: str) -> None:
    """Fetch through torchvision into a temporary folder, then move one finished file into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            source = getattr(import_torchvision().datasets, torchvision_class)
            train, test = (source(folder, train=flag, download=True) for flag in (True, False))
        except Exception as reason:  # no network, a connection that breaks off, another file than the right one
            raise FileNotFoundError(
                f"{path.stem} is not at {path} and could not be downloaded ({reason}). Run once where there is a"
                f" network, or put a {path.name} with the keys {', '.join(KEYS)} there. Without a network,"
                " digits() and synthetic() work."
            ) from reason
        finished = Path(folder) / path.name
        np.savez(
            finished,
            x_train=train.data,
            y_train=np.array(train.targets, np.int64),
            x_test=test.data,
            y_test=np.array(test.targets, np.int64),
            classes=np.array(train.classes),
        )
        os.replace(finished, path)


LOADERS: dict[str, Callable[[], Images]] = {
    "digits": digits,
    "synthetic": synthetic,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "tiny_imagenet_20": lambda: tiny_imagenet(classes=20),
}


def load(name: str) -> Images:
    """The image set of that name, with its defaults: what a notebook's ``dataset`` parameter names."""
    if name not in LOADERS:
        near = difflib.get_close_matches(name, LOADERS, n=1, cutoff=0)
        raise ValueError(f"No image set is called {name!r}; there are {', '.join(LOADERS)}. Did you mean {near[0]!r}?")
    return LOADERS[name]()

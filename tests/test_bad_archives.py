"""Image sets from broken archives: refused in a sentence that names the file, and nothing is unpacked beside them."""

import io
import os
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from broken import damaged, outcomes, result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_datasets import archive
from test_tiny_imagenet import jpeg

from axmoe_lite import datasets, models

pytestmark = pytest.mark.trust("input", "archives of images, broken")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
often = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def npz(**changes) -> dict[str, bytes]:
    """The members of a small image set, by name; None leaves one out."""
    arrays = {
        "x_train": np.zeros((6, 8, 8, 3), np.uint8),
        "y_train": np.arange(6) % 3,
        "x_test": np.ones((3, 8, 8, 3), np.uint8),
        "y_test": np.arange(3),
        "classes": np.array(["a", "b", "c"]),
        **changes,
    }
    members = {}
    for key, value in arrays.items():
        if value is not None:
            np.save(file := io.BytesIO(), value)
            members[f"{key}.npy"] = file.getvalue()
    return members


def head(shape: str, kind: str = "|u1") -> bytes:
    """The beginning of a .npy file that promises such an array."""
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text


def packed(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", how) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return file.getvalue()


TOP = "tiny-imagenet-200/"
TINY = {
    "wnids.txt": b"n02\nn01\n",
    "words.txt": b"n01\tgoldfish\nn02\tbullfrog, frog\n",
    "train/n01/images/n01_0.JPEG": jpeg(10),
    "train/n02/images/n02_0.JPEG": jpeg(60),
    "val/images/val_0.JPEG": jpeg(110),
    "val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t62\t62\n",
}


def tiny(**changes) -> bytes:
    members = {TOP + name: content for name, content in (TINY | changes).items() if content is not None}
    return packed(members)


@pytest.fixture
def cache(elsewhere):
    (elsewhere / "data" / "cache").mkdir(parents=True)
    return elsewhere / "data" / "cache"


def tiny_imagenet(path):
    """The images of this zip; the converted file is removed again."""
    try:
        datasets._convert_tiny_imagenet(path, converted := path.with_suffix(".npz"))
        return datasets.read_npz(converted)
    finally:
        converted.unlink(missing_ok=True)


def check(found: datasets.Images | None) -> None:
    """What was read at all is a whole set."""
    if found is not None:
        assert found.x_train.dtype == found.x_test.dtype == torch.uint8 and found.x_train.ndim == 4
        assert 0 <= int(found.y_train.min()) <= int(found.y_train.max()) < len(found.classes)


# ---------------------------------------------------------------------------------- anything


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@often
@given(data=st.data())
def test_a_damaged_archive_is_refused_by_name_or_a_whole_set(how, tmp_path, data):
    path = tmp_path / "mine.npz"
    path.write_bytes(data.draw(damaged(packed(npz(), how))))
    check(result(datasets.read_npz, path))


@often
@given(data=st.data(), key=st.sampled_from(datasets.KEYS))
def test_an_array_that_was_damaged_before_it_was_packed_too(tmp_path, data, key):
    members = npz()
    members[f"{key}.npy"] = data.draw(damaged(members[f"{key}.npy"]))  # its checksum fits
    (tmp_path / "mine.npz").write_bytes(packed(members))
    check(result(datasets.read_npz, tmp_path / "mine.npz"))


@often
@given(data=st.data())
def test_a_damaged_zip_of_tiny_imagenet_is_refused_by_name_or_a_whole_set(tmp_path, data):
    path = tmp_path / "tiny-imagenet-200.zip"
    path.write_bytes(data.draw(damaged(tiny())))
    check(result(tiny_imagenet, path))


@often
@given(data=st.data(), name=st.sampled_from(sorted(TINY)))
def test_a_photograph_or_a_list_that_was_damaged_before_too(tmp_path, data, name):
    path = tmp_path / "tiny-imagenet-200.zip"
    path.write_bytes(tiny(**{name: data.draw(damaged(TINY[name]))}))
    check(result(tiny_imagenet, path))


# ---------------------------------------------------------------------------------- by hand

MEMBERS = {
    "labels as fractions": npz(y_train=np.full(6, np.nan)),
    "labels below 0": npz(y_test=np.array([0, 1, -1])),
    "a label of no class": npz(y_test=np.array([0, 1, 3])),
    "labels beyond 64 bits": npz(y_test=np.array([0, 1, 2**63], np.uint64)),
    "labels of two axes": npz(y_test=np.zeros((3, 1), int)),
    "too few labels": npz(y_test=np.arange(2)),
    "images as fractions": npz(x_train=np.full((6, 8, 8, 3), np.nan)),
    "images of 16 bits": npz(x_train=np.zeros((6, 8, 8, 3), np.uint16)),
    "no images": npz(x_test=np.zeros((0, 8, 8, 3), np.uint8), y_test=np.zeros(0, int)),
    "images without pixels": npz(x_test=np.zeros((3, 0, 8, 3), np.uint8)),
    "two sizes": npz(x_test=np.zeros((3, 4, 8, 3), np.uint8)),
    "a single class name": npz(classes=np.array("a")),
    "class names in a square": npz(classes=np.array([["a", "b", "c"]])),
    "no class": npz(classes=np.array([], "<U1")),
    "a missing array": npz(classes=None),
    "objects": npz(classes=np.array(["a", "b", print], object)),
    "objects as images": npz(x_train=np.full((6, 8, 8, 3), None)),
    "a shape beyond memory": npz() | {"x_train.npy": head("(99999999999, 32, 32, 3)")},
    "a shape beyond 64 bits": npz() | {"x_train.npy": head(f"({2**62}, {2**62}, 1, 3)")},
    "a shape below 0": npz() | {"x_train.npy": head("(-1, 8, 8, 3)")},
    "a shape of fractions": npz() | {"x_train.npy": head("(1.5, 8, 8, 3)")},
    "entries without bytes": npz() | {"classes.npy": head("(99999999999999,)", "<U0")},
    "a head without end": npz() | {"x_train.npy": head("(" * 5000)},
    "letters beyond Unicode": npz() | {"classes.npy": head("(3,)", "<U1") + b"\xff" * 12},
    "a head that is a program": npz() | {"x_train.npy": head("__import__('os').system('touch executed')")},
    "a version of the future": npz() | {"x_train.npy": b"\x93NUMPY\x07\0" + bytes(90)},
    "an array that is none": npz() | {"x_train.npy": b"hello"},
    "nothing in it": {},
}


@pytest.mark.parametrize("name", MEMBERS)
def test_an_archive_of_wrong_arrays_is_refused(name, tmp_path):
    (tmp_path / "mine.npz").write_bytes(packed(MEMBERS[name]))
    assert result(datasets.read_npz, tmp_path / "mine.npz") is None


def encrypted(content: bytes) -> bytes:
    """The same archive, but its list says that a password is needed (bit 0 of the flags, 8 bytes into an entry)."""
    at = content.index(b"PK\x01\x02") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]


def strange(content: bytes) -> bytes:
    """The same archive, but its list names a method of packing that does not exist (10 bytes into an entry)."""
    at = content.index(b"PK\x01\x02") + 10
    return content[:at] + b"\x63\0" + content[at + 2 :]


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x05\x06" + bytes(18), npz()["x_train.npy"], b"\x80\x04N.", b"PK" * 99, encrypted(packed(npz())),
     strange(packed(npz())), packed(npz())[:-1], packed(npz())[40:]],
    ids=["empty", "no members", "a .npy", "a pickle", "letters", "a password", "a method", "an end", "a beginning"],
)  # fmt: skip
def test_what_is_no_whole_archive_is_refused(content, tmp_path):
    for read, name in ((datasets.read_npz, "mine.npz"), (tiny_imagenet, "tiny-imagenet-200.zip")):
        (tmp_path / name).write_bytes(content)
        assert result(read, tmp_path / name) is None


def drawn(kind: str, size: tuple[int, int]) -> bytes:
    Image.new("RGB", size).save(file := io.BytesIO(), kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"wnids.txt": None},
        {"words.txt": None},
        {"val/val_annotations.txt": None},
        {"val/images/val_0.JPEG": None},
        {"wnids.txt": b""},
        {"wnids.txt": b"n01\n"},  # n02 has photographs
        {"wnids.txt": b"\xff\xfe"},
        {"words.txt": b"n01 goldfish\n"},  # no tab
        {"val/val_annotations.txt": b"val_0.JPEG\n"},
        {"val/val_annotations.txt": b"../../wnids.txt\tn01\n"},
        {"val/val_annotations.txt": b""},
        {"val/images/val_0.JPEG": b"no photograph"},
        {"val/images/val_0.JPEG": jpeg(0)[:200]},
        {"train/n01/images/n01_0.JPEG": drawn("JPEG", (65, 64))},
        {"train/n01/images/n01_0.JPEG": drawn("GIF", (64, 64))},
    ],
)  # fmt: skip
def test_a_zip_of_other_things_is_not_tiny_imagenet(changes, cache):
    path = cache / "tiny-imagenet-200.zip"
    path.write_bytes(tiny(**changes))
    with pytest.raises(
        ValueError, match=r"tiny-imagenet-200\.zip cannot be read as Tiny ImageNet: .*download it again"
    ):
        datasets.tiny_imagenet()
    assert os.listdir(cache) == [path.name], "nothing half converted stays"


def test_members_that_lead_elsewhere_are_never_unpacked(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    odd = {"../outside.npy": b"x", "/tmp/outside-too.npy": b"x", "..\\outside.npy": b"x"}
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16  # a symbolic link, as Info-ZIP writes it
    for name, members in (("mine.npz", npz()), ("tiny-imagenet-200.zip", {TOP + k: v for k, v in TINY.items()})):
        with zipfile.ZipFile(inside / name, "w") as opened:
            for member, content in {**odd, link: b"/etc/passwd", **members}.items():
                opened.writestr(member, content)
    check(found := result(datasets.read_npz, inside / "mine.npz"))
    check(more := result(tiny_imagenet, inside / "tiny-imagenet-200.zip"))
    assert found is not None and more is not None and os.listdir(tmp_path) == ["inside"]


def test_what_is_no_plain_file_is_neither_read_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    os.mkfifo(tmp_path / "waiting.zip")
    (tmp_path / "folder.npz").mkdir()
    os.symlink("round.npz", tmp_path / "round.npz")
    os.symlink("/dev/zero", tmp_path / "device.npz")
    for name in ("pipe.npz", "folder.npz", "round.npz", "device.npz", "nowhere.npz", "a" * 300 + ".npz"):
        assert result(datasets.read_npz, tmp_path / name) is None
    assert result(tiny_imagenet, tmp_path / "waiting.zip") is None


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_an_archive_without_permission_is_refused(tmp_path):
    archive(tmp_path).chmod(0)
    assert result(datasets.read_npz, tmp_path / "mine.npz") is None


# ---------------------------------------------------------------------------------- downloads


def hostile() -> bytes:
    """A .tar.gz whose members lead out of the folder, are links and devices, or a program in a pickle."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as opened:
        for name, kind in (("../outside", tarfile.REGTYPE), ("link", tarfile.SYMTYPE), ("device", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            opened.addfile(member, io.BytesIO())
        program = b"cos\nsystem\n(S'touch executed'\ntR."
        member = tarfile.TarInfo("cifar-100-python/train")
        member.size = len(program)
        opened.addfile(member, io.BytesIO(program))
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", hostile(), hostile()[:-20]], ids=len)
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_download_that_is_not_the_known_file_is_not_even_unpacked(content, name, cache, monkeypatch):
    def fetch(url, filename, *_, **__):
        asked.append(url)
        with open(filename, "wb") as file:
            file.write(content)

    asked: list[str] = []
    utils = models.import_torchvision().datasets.utils
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", fetch)
    monkeypatch.chdir(cache)
    with pytest.raises(FileNotFoundError, match=rf"{name}\.npz and could not be downloaded \(.*corrupted"):
        datasets.load(name)
    assert asked and not os.listdir(cache) and os.listdir(cache.parent) == ["cache"]


@pytest.mark.parametrize(
    "reason", [EOFError(), MemoryError(), tarfile.ReadError("cut"), RuntimeError("x"), KeyError("data")]
)
def test_a_download_that_breaks_off_leaves_nothing(reason, cache, monkeypatch):
    def refuse(*_, **__):
        raise reason

    monkeypatch.setattr(models.import_torchvision().datasets, "CIFAR10", refuse)
    with pytest.raises(FileNotFoundError, match=r"cifar10\.npz and could not be downloaded"):
        datasets.cifar10()
    assert not os.listdir(cache)


# ---------------------------------------------------------------------------------- memory


@linux
def test_traps_take_no_memory_and_start_no_program(tmp_path, record_property):
    zeros = bytes(2**27)  # packs to a thousandth
    kinds = {
        "bomb.npz": packed(npz() | {"x_train.npy": head(f"({2**27},)") + zeros}, zipfile.ZIP_DEFLATED),
        "promise.npz": packed(MEMBERS["a shape beyond memory"]),
        "nothing.npz": packed(MEMBERS["entries without bytes"]),
        "objects.npz": packed(MEMBERS["objects"]),
        "bomb.zip": packed({TOP + k: v for k, v in TINY.items()} | {TOP + "wnids.txt": zeros}, zipfile.ZIP_DEFLATED),
        "picture.zip": tiny(**{"val/images/val_0.JPEG": huge_jpeg()}),
    }
    del zeros
    for name, content in kinds.items():
        (tmp_path / name).write_bytes(content)
    told = outcomes(*((name[-3:], tmp_path / name) for name in kinds), megabytes=100)
    for name, (kind, words) in zip(kinds, told, strict=True):
        assert kind == "ValueError" and name in words, (name, kind, words[:300])
    assert [words.split(": ")[1].split(" ")[1] for _, words in told[::4]] == ["would", "would"], "before unpacking"
    record_property("cases", len(kinds))


def huge_jpeg() -> bytes:
    """A photograph that says of itself that it has 20,000 x 20,000 pixels: 1.2 GB as numbers."""
    content = jpeg(0)
    at = content.index(b"\xff\xc0") + 5  # the frame's height and width, after its length and precision
    return content[:at] + (20_000).to_bytes(2) * 2 + content[at + 4 :]

"""Networks from broken files: refused in a sentence that names the file, the network as it was, nothing unpickled."""

import io
import json
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch
from broken import damaged, outcomes, result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as as_safetensors
from torch import nn

from axmoe_lite import models, train
from axmoe_lite.search.pertinence.look import recall
from axmoe_lite.train import checkpoints

pytestmark = pytest.mark.trust("input", "checkpoints and networks from broken files")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
often = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SETTINGS = {"epochs": 3, "lr": 0.1}
ROWS = [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 1.5}]
OPTIMISERS = {
    "sgd": lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda network: torch.optim.AdamW(network.parameters(), lr=0.1),
}


def small(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def started(name: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network after one step of that optimiser."""
    network = small(seed)
    stepper = OPTIMISERS[name](network)
    network(torch.ones(5, 4) + torch.eye(5, 4)).square().sum().backward()
    stepper.step()
    return network, stepper


def state(network: nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in network.state_dict().values()]


def tensors() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in small(seed=1).state_dict().items()}


def stored(contents: object, **options) -> bytes:
    torch.save(contents, file := io.BytesIO(), **options)
    return file.getvalue()


def raw(head: object, data: bytes = b"") -> bytes:
    """A safetensors file with this head, its length before it."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data


def suspended(path, name: str) -> dict[str, torch.Tensor]:
    """What a half-finished training holds, and its file."""
    checkpoints.suspend(path, *started(name), SETTINGS, ROWS)
    found, _ = checkpoints._read(path)
    return {key: value.clone() for key, value in found.items()}


def unchanged(read, path, network: nn.Module):
    """What ``read(path)`` gives, or None; a refusal leaves the network as it was."""
    before = state(network)
    found = result(read, path)
    assert found is not None or state(network) == before
    return found


# ---------------------------------------------------------------------------------- anything


@often
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_by_name_or_loaded_whole(tmp_path, data):
    path, network = tmp_path / "mine.safetensors", small()
    path.write_bytes(data.draw(damaged(as_safetensors(tensors(), {"recipe": '{"epochs": 3}'}))))
    recipe = unchanged(lambda p: train.load(network, p), path, network)
    assert recipe is None or isinstance(recipe, dict)


@pytest.mark.parametrize("name", OPTIMISERS)
@often
@given(data=st.data())
def test_a_damaged_half_finished_training_is_refused_by_name_or_gone_on_with(tmp_path, name, data):
    path = tmp_path / "run.safetensors"
    if name not in kept:
        suspended(path, name)
        kept[name] = path.read_bytes()
    path.write_bytes(data.draw(damaged(kept[name])))
    network, stepper = started(name, seed=1)
    history = unchanged(lambda p: checkpoints.resume(p, network, stepper, SETTINGS), path, network)
    if history is not None:
        assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
        stepper.step()  # goes on with whatever it was given


kept: dict[str, bytes] = {}
FORMS = {
    "mine.safetensors": as_safetensors(tensors()),
    "mine.pth": stored(tensors()),
    "mine.pt": stored({"state_dict": tensors(), "epoch": 3}),
    "mine.bin": stored(tensors(), _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", FORMS)
@often
@given(data=st.data())
def test_damaged_weights_are_refused_by_name_or_loaded_whole(tmp_path, name, data):
    path, network = tmp_path / name, small()
    path.write_bytes(data.draw(damaged(FORMS[name])))
    found = unchanged(lambda p: models.load_weights(network, p), path, network)
    assert found is None or set(found.loaded) == set(tensors())


@often
@given(data=st.data())
def test_a_pickle_that_was_damaged_before_it_was_packed_too(tmp_path, data):
    with zipfile.ZipFile(io.BytesIO(FORMS["mine.pth"])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = data.draw(damaged(members[name]))  # its checksum fits
    path, network = tmp_path / "mine.pth", small()
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    unchanged(lambda p: models.load_weights(network, p), path, network)


PROGRAM = "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())\n"


@often
@given(
    cut=st.integers(0, len(PROGRAM)),
    n=st.integers(0, 9),
    byte=st.sampled_from([b"", b"\0", b"\xff", b"(", b"\t", b"'"]),
)
def test_a_damaged_program_is_refused_by_name_or_builds_a_network(tmp_path, cut, n, byte):
    path = tmp_path / "my_network.py"
    path.write_bytes(PROGRAM[:cut].encode() + byte + PROGRAM[cut + n :].encode())
    found = result(models.build_network, path)
    assert found is None or isinstance(found, nn.Module)


# ---------------------------------------------------------------------------------- by hand

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADS = {
    "nothing": b"",
    "seven bytes": b"\1\0\0\0\0\0\0",
    "a head beyond the file": struct.pack("<Q", 10**7) + b"{}",
    "a head beyond memory": struct.pack("<Q", 2**63) + b"{}",
    "a head that is no JSON": raw(b"{nope}"),
    "a head that is a list": raw([]),
    "a head without end": raw(b"[" * 100_000),
    "a head that is no text": raw(b'{"\xff": 1}'),
    "an empty head": raw({}),
    "an unknown type": raw({"a": ONE | {"dtype": "F99"}}, bytes(4)),
    "a type that torch has not": raw({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, bytes(3)),
    "a shape below 0": raw({"a": ONE | {"shape": [-1]}}, bytes(4)),
    "a shape beyond its numbers": raw({"a": ONE | {"shape": [2**40]}}, bytes(4)),
    "a shape beyond 64 bits": raw({"a": ONE | {"shape": [2**62, 2**62], "data_offsets": [0, 0]}}),
    "an empty shape that is huge": raw({"a": ONE | {"shape": [0, 2**60], "data_offsets": [0, 0]}}),
    "numbers outside the file": raw({"a": ONE | {"data_offsets": [0, 2**40]}}, bytes(4)),
    "numbers that end before they begin": raw({"a": ONE | {"data_offsets": [4, 0]}}, bytes(4)),
    "two tensors in one place": raw({"a": ONE, "b": ONE}, bytes(4)),
    "more than it tells of": raw({"a": ONE}, bytes(9)),
    "a pickle": pickle.dumps({"a": 1}),
    "a program": b"cos\nsystem\n(S'touch executed'\ntR.",
    "torch's format": stored(tensors()),
    "another network": as_safetensors({"weight": torch.zeros(3)}),
    "another shape": as_safetensors(tensors() | {"0.weight": torch.zeros(4, 3)}),
    "whole numbers": as_safetensors({name: value.long() for name, value in tensors().items()}),
    "complex numbers": as_safetensors(tensors() | {"0.bias": torch.zeros(3, dtype=torch.complex64)}),
    "fractions of a count": as_safetensors(tensors() | {"1.num_batches_tracked": torch.tensor(0.5)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_file_that_holds_no_such_network_is_refused_by_both_readers(name, tmp_path):
    path, network = tmp_path / "mine.safetensors", small()
    path.write_bytes(HEADS[name])
    assert unchanged(lambda p: train.load(network, p), path, network) is None
    assert unchanged(lambda p: models.load_weights(network, p), path, network) is None


def test_half_precision_is_a_checkpoint_too(tmp_path):
    halves = {n: v.half() if v.is_floating_point() else v for n, v in tensors().items()}
    (tmp_path / "half.safetensors").write_bytes(as_safetensors(halves))
    train.load(network := small(), tmp_path / "half.safetensors")
    assert all(torch.equal(value, halves[name].to(value.dtype)) for name, value in network.state_dict().items())


NO_DICT = ("{nope", "[1]", "3", "null", '"a"', "[" * 100_000, "9" * 5000)


@pytest.mark.parametrize("text", NO_DICT, ids=lambda text: text[:9])
def test_a_recipe_that_is_none_is_refused(text, tmp_path):
    path, network = tmp_path / "mine.safetensors", small()
    path.write_bytes(as_safetensors(tensors(), {"recipe": text}))
    with pytest.raises(ValueError, match=r"mine\.safetensors has no readable 'recipe' in its header"):
        train.load(network, path)
    assert unchanged(lambda p: train.load(network, p), path, network) is None
    path.write_bytes(as_safetensors({"guess": torch.zeros(3)}, {"settings": text}))
    assert result(lambda p: recall(p, {"weights": "w"}), path) is None


SAID = {"settings": json.dumps(SETTINGS), "history": json.dumps(ROWS)}


@pytest.mark.parametrize(
    ("changes", "said", "problem"),
    [
        ({}, SAID | {"history": "[]"}, r"tells of the epochs \[\]"),
        ({}, SAID | {"history": "[1, 2]"}, r"tells of the epochs \[None, None\]"),
        ({}, SAID | {"history": json.dumps(ROWS[::-1])}, r"tells of the epochs \[2, 1\]"),
        *(({}, SAID | {"history": text}, "no readable 'history'") for text in ("{", "{}", "null", "[" * 100_000)),
        *(({}, SAID | {"settings": text}, "no readable 'settings'") for text in ("{", "[]", "null", "[" * 100_000)),
        ({}, {"settings": SAID["settings"]}, "no readable 'history'"),
        ({}, {}, "was made by another call: epochs was None, now 3"),
        ({"momentum": torch.zeros(3)}, SAID, "holds 'momentum'"),
        ({"momentum.6": torch.zeros(2)}, SAID, "holds 'momentum.6'"),  # parameters count from 0 to 5
        ({"momentum.-1": torch.zeros(2)}, SAID, "holds 'momentum.-1'"),
        ({"momentum.²": torch.zeros(2)}, SAID, "holds 'momentum.²'"),
        ({"momentum.0": torch.zeros(4, 3)}, SAID, r"holds 'momentum.0' \(4, 3\)"),
        ({"momentum.0": torch.zeros(3, 4).long()}, SAID, "holds 'momentum.0' .*int64"),
        ({"exp_avg.0": torch.zeros(3, 4)}, SAID, r"not just what SGD keeps \(momentum_buffer\)"),
        ({"model.more": torch.zeros(2)}, SAID, "'more', which is .* absent in the model"),
    ],
)
def test_a_half_finished_training_that_cannot_be_is_refused(changes, said, problem, tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(as_safetensors(suspended(path, "sgd") | changes, said))
    network, stepper = started("sgd", seed=1)
    known = [stepper.state[p]["momentum_buffer"].clone() for p in network.parameters()]
    with pytest.raises(ValueError, match=problem) as refused:
        checkpoints.resume(path, network, stepper, SETTINGS)
    assert path.name in str(refused.value)
    assert unchanged(lambda p: checkpoints.resume(p, network, stepper, SETTINGS), path, network) is None
    assert all(
        torch.equal(a, stepper.state[p]["momentum_buffer"]) for a, p in zip(known, network.parameters(), strict=True)
    )


def test_adamw_without_half_of_what_it_keeps_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    contents = suspended(path, "adamw")
    del contents["exp_avg.0"]
    path.write_bytes(as_safetensors(contents, SAID))
    with pytest.raises(ValueError, match=r"not just what AdamW keeps"):
        checkpoints.resume(path, *started("adamw"), SETTINGS)


def test_fit_refuses_a_broken_checkpoint_before_any_step(tmp_path, textures, elsewhere):
    path, network = tmp_path / "run.safetensors", models.resnet8(classes=4)
    path.write_bytes(b"half a fi")
    before = state(network)
    with pytest.raises(ValueError, match=r"run\.safetensors is not a readable safetensors file"):
        train.fit(network, textures, epochs=1, checkpoint=path, progress=False)
    assert state(network) == before and path.read_bytes() == b"half a fi"


ODD = {
    "sparse": {n: v.to_sparse() if v.ndim else v for n, v in tensors().items()},
    "without numbers": {n: v.to("meta") for n, v in tensors().items()},
    "a list": [torch.zeros(3)],
    "named by numbers": {1: torch.zeros(3)},
    "one number for all": {"0.weight": torch.zeros(1).expand(2**40)},
    "names inside names": {"model": {"model": {"model": {"model": tensors()}}}},
    "a network": nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", ODD)
def test_weights_of_another_kind_are_refused(name, tmp_path):
    path, network = tmp_path / "mine.pth", small()
    path.write_bytes(stored(ODD[name]))
    assert unchanged(lambda p: models.load_weights(network, p), path, network) is None


def test_a_torchscript_archive_is_not_run(tmp_path):
    torch.jit.save(torch.jit.trace(small().eval(), torch.zeros(2, 4)), path := tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"mine\.pt cannot be read as weights: it is a TorchScript archive"):
        models.load_weights(small(), path)


def test_what_is_no_plain_file_is_neither_read_nor_waited_for(tmp_path):
    network = small()
    for ending in (".safetensors", ".pth"):
        os.mkfifo(tmp_path / f"pipe{ending}")
        (tmp_path / f"folder{ending}").mkdir()
        os.symlink(f"round{ending}", tmp_path / f"round{ending}")
        os.symlink("/dev/zero", tmp_path / f"device{ending}")
        for name in ("pipe", "folder", "round", "device", "nowhere"):
            for read in (train.load, models.load_weights):
                assert unchanged(lambda p, read=read: read(network, p), tmp_path / f"{name}{ending}", network) is None


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_checkpoint_without_permission_is_refused(tmp_path):
    path, network = tmp_path / "mine.safetensors", small()
    train.save(network, path, recipe={})
    path.chmod(0)
    assert unchanged(lambda p: train.load(network, p), path, network) is None


PROGRAMS = {
    "deep": "x = " + "(" * 5000 + ")" * 5000,
    "signs": "x = " + "-" * 200_000 + "1",
    "attributes": "x = a" + ".a" * 100_000,
    "bytes": "\0" * 100,
    "recursion": "def build():\n    return build()\n",
    "an error without end": "def build():\n    raise ValueError('x' * 100)\n",
    "an exit": "def build():\n    raise SystemExit\n",
    "a class": "class build:\n    def __init__(self, n): ...\n",
    "nothing": "",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_builds_nothing_is_refused(name, tmp_path):
    (tmp_path / "my_network.py").write_text(PROGRAMS[name])
    assert result(models.build_network, tmp_path / "my_network.py") is None


def test_a_program_of_no_size_for_one_is_not_read(tmp_path):
    (tmp_path / "my_network.py").touch()
    os.truncate(tmp_path / "my_network.py", 2**36)  # a hole: it takes no disk
    assert result(models.build_network, tmp_path / "my_network.py") is None
    with pytest.raises(FileNotFoundError, match=r"my_network\.py"):
        models.build_network("my_network.py")
    with pytest.raises(ValueError, match=r"~nobody-of-that-name/my_network\.py: there is no such home folder"):
        models.build_network("~nobody-of-that-name/my_network.py")


# ---------------------------------------------------------------------------------- memory


class Program:
    """What a pickle can hold: reading it would make a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@linux
def test_traps_take_no_memory_and_run_no_program(tmp_path, monkeypatch, record_property):
    zeros = bytes(2**27)  # packs to a thousandth
    with (
        zipfile.ZipFile(bomb := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive,
        zipfile.ZipFile(io.BytesIO(stored({"fc.weight": torch.zeros(2**10)}))) as plain,
    ):
        for name in plain.namelist():
            archive.writestr(name, zeros if name.endswith("/data/0") else plain.read(name))
    kinds = {
        "long.safetensors": struct.pack("<Q", 2**40) + b"{}",
        "hole.safetensors": struct.pack("<Q", 2**30) + b"{}",
        "program.safetensors": pickle.dumps(Program()),
        "packed.safetensors": stored({"fc.weight": Program()}),
        "bomb.pth": bomb.getvalue(),
        "program.pth": pickle.dumps(Program(), protocol=2),
        "packed.pth": stored({"fc.weight": Program()}),
        "old.pth": stored({"fc.weight": Program()}, _use_new_zipfile_serialization=False),
        "bytes.pth": pickle.dumps({"a": bytearray(9)}, protocol=2).replace(b"\x09", b"\xff"),
    }
    for name, content in kinds.items():
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "hole.safetensors", 2**38)
    monkeypatch.chdir(tmp_path)
    asked = [(kind, tmp_path / name) for name in kinds for kind in ("load", "weights")]
    for (_, path), (kind, words) in zip(asked, outcomes(*asked, megabytes=100), strict=True):
        assert kind == "ValueError" and path.name in words, (path.name, kind, words[:300])
    assert not (tmp_path / "executed").exists()
    record_property("cases", len(asked))

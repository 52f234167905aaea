"""The disk fails: every row that was finished stays byte for byte, the file is named, and a rerun does the rest."""

import contextlib
import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from faults import KEY, RECORD, axmoe, numbers_of, python, row, rows_of, wait_for

from axmoe_lite import models, paths, runs, train
from axmoe_lite.__main__ import main
from axmoe_lite.runs import execute, store

# ---------------------------------------------------------------------------------- a full disk


def mount(*options) -> None:
    if os.name != "posix" or subprocess.run(["mount", *map(str, options)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")


@pytest.fixture
def small_disk(elsewhere):
    """A disk of one megabyte that holds AXMOE_HOME/data; fill() leaves so many free bytes on it, free() frees it."""
    data = elsewhere / "data"
    data.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", data)
    ballast = data / "ballast"

    class Disk:
        @staticmethod
        def fill(leave: int = 0) -> None:
            with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            if leave:
                os.truncate(ballast, ballast.stat().st_size - leave)

        @staticmethod
        def free() -> None:
            ballast.unlink()

    yield Disk
    subprocess.run(["umount", "--lazy", str(data)], check=True)


@pytest.mark.trust("fault", "the disk is full while a row is written")
def test_a_full_disk_leaves_the_rows_that_were_there_and_names_the_file(small_disk):
    path = runs.record("steps", [row(step) for step in range(40)], key=KEY)
    before = rows_of(paths.home())
    small_disk.fill()
    with pytest.raises(OSError, match=r"No space left on device: '.*steps\.csv'"):
        runs.record("steps", [row(step) for step in range(40, 80)], key=KEY)
    assert rows_of(paths.home()) == before and len(before) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["steps.csv", "studies.json"], "nothing half-written"
    small_disk.free()
    runs.record("steps", [row(step) for step in range(40, 80)], key=KEY)
    assert path.read_bytes().startswith(before["data/cache/results/steps.csv"])
    assert len(runs.read("steps", scale="quick")) == 80


LIMITED = """
import resource, signal, sys
from axmoe_lite import runs
row = runs.evidence(8, scale="quick", seed=1, epochs=0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
runs.record("steps", [{"step": n, "seconds": 0.1, **row} for n in range(100)], key=("seed", "step"))
"""


@pytest.mark.trust("fault", "the disk is full while a row is written")
@pytest.mark.skipif(os.name != "posix", reason="files have no limits here")
def test_a_file_that_may_not_grow_leaves_the_rows_that_were_there_and_is_named(elsewhere):
    path = runs.record("steps", [row()], key=KEY)
    before = rows_of(elsewhere)
    done = python(LIMITED)  # a hundred rows take more than 4096 bytes
    assert done.returncode == 1 and f"File too large: '{path}'" in done.stderr
    assert rows_of(elsewhere) == before and len(list(path.parent.iterdir())) == 2


@pytest.mark.trust("fault", "the disk fills up in the middle of a run")
def test_a_disk_that_fills_up_in_a_run_ends_it_with_the_reason_and_a_rerun_does_the_rest(small_disk, toy, elsewhere):
    path = toy("n = 0", RECORD, "record(0, 1, 2)\n(home / 'go').exists() or (home / 'full').touch()",
               "import time\nwhile not (home / 'go').exists(): time.sleep(0.02)", "record(3)")  # fmt: skip
    process = axmoe("sweep", str(path), "n=0")
    wait_for((elsewhere / "full").exists)
    before = rows_of(elsewhere)
    small_disk.fill()
    (elsewhere / "go").touch()
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "No space left on device" in said, said
    assert rows_of(elsewhere) == before and numbers_of(elsewhere) == [3]
    small_disk.free()
    again = runs.run(path, retry=True, progress=False)
    assert again["state"] == "finished"
    assert numbers_of(again["folder"]) == [4], "each step once"
    assert not [file for file in paths.runs_dir().rglob(".*") if file.name.startswith((".outcome", ".steps", ".error"))]


@pytest.mark.trust("fault", "the disk is full while a checkpoint is saved")
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_one_before(small_disk):
    network, kept = models.resnet8(classes=4, width=0.25), paths.cache_dir() / "kept.safetensors"
    train.save(network, kept, recipe={"epochs": 1})
    before = kept.read_bytes()
    small_disk.fill(leave=len(before) // 2)
    with pytest.raises(OSError, match=r"kept\.safetensors cannot be written .*[Nn]o space left.*is there still"):
        train.save(network, kept, recipe={"epochs": 2})
    assert kept.read_bytes() == before and [file.name for file in kept.parent.iterdir()] == [kept.name]
    small_disk.free()
    train.save(network, kept, recipe={"epochs": 2})
    assert train.load(network, kept) == {"epochs": 2}


@pytest.mark.trust("fault", "the disk is full while a checkpoint is saved")
def test_a_checkpoint_that_cannot_be_named_leaves_no_half(elsewhere, monkeypatch):
    def full(old, new):
        raise OSError(errno.ENOSPC, "No space left on device", str(new))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*kept\.safetensors'"):
        train.save(torch.nn.Linear(2, 2), elsewhere / "kept.safetensors", recipe={})
    assert list(elsewhere.iterdir()) == []


@pytest.mark.trust("fault", "the disk is full while a checkpoint is saved")
def test_training_stopped_by_a_full_disk_goes_on_to_the_same_bits(small_disk, textures):
    call = {"epochs": 2, "batch_size": 64, "progress": False}
    whole = models.resnet8(classes=4, width=0.25)
    train.fit(whole, textures, **call)
    kept = paths.cache_dir() / "fit{epoch}.safetensors"
    need = 4 * sum(value.numel() for value in whole.state_dict().values())  # with momentum twice that
    small_disk.fill(leave=3 * need)  # room for one
    stopped = models.resnet8(classes=4, width=0.25)
    with pytest.raises(OSError, match=r"fit2\.safetensors cannot be written"):
        train.fit(stopped, textures, checkpoint=kept, **call)
    small_disk.free()
    resumed = models.resnet8(classes=4, width=0.25, seed=9)
    train.fit(resumed, textures, checkpoint=kept, **call)
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.trust("fault", "the disk is full while all rows are collected")
def test_a_table_for_which_there_is_no_room_leaves_the_one_before(small_disk, elsewhere, capsys):
    finished_run({"n": 0}, [row()])
    assert main(["collect"]) == 0
    tables = {file.name: file.read_bytes() for file in paths.runs_dir().glob("collected.*")}
    before = rows_of(elsewhere)
    finished_run({"n": 1}, [row(step) for step in range(1, 200)])
    small_disk.fill()
    capsys.readouterr()
    assert main(["collect"]) == 1 and "o space left on device" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in paths.runs_dir().glob("collected.*")} == tables
    assert before.items() <= rows_of(elsewhere).items() and not list(paths.runs_dir().glob(".collected*"))
    small_disk.free()
    assert main(["collect"]) == 0 and "200 rows" in capsys.readouterr().out


def finished_run(parameters: dict, rows: list[dict]) -> store.Run:
    """A run that has ended and recorded these rows."""
    run = store.Run("toy", parameters, "aaaaaaaa")
    store.begin(run, notebook=json.dumps({"cells": []}))
    with store.inside(run.folder):
        runs.record("steps", rows, key=KEY)
    store.write_json(run.folder / "outcome.json", {"state": "finished", "ended": "2026-01-01T10:00:00+01:00"})
    return run


# ---------------------------------------------------------------------------------- folders that cannot be written to


@pytest.fixture
def read_only(elsewhere):
    """read_only(folder): nothing can be written below it until read_only(folder, over=True); root is refused, too."""
    mounted = set()

    def seal(folder: Path, *, over: bool = False) -> None:
        if over:
            mounted.discard(folder)
            subprocess.run(["umount", str(folder)], check=True)
            return
        mount("--bind", folder, folder)
        mounted.add(folder)
        mount("-o", "remount,ro,bind", folder)

    yield seal
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.trust("fault", "the results folder is read-only")
def test_a_read_only_results_folder_is_named_and_keeps_its_rows(read_only):
    first = row(scale="paper")
    path = runs.record("steps", [first], key=KEY)
    before = path.read_bytes()
    read_only(path.parent)
    with pytest.raises(OSError, match=r"Read-only file system: '.*results/(steps\.csv|studies\.json)'"):
        runs.record("steps", [{**first, "step": 1}], key=KEY)
    assert path.read_bytes() == before and runs.read("steps")[0]["step"] == "0", "and it can be read"
    read_only(path.parent, over=True)
    runs.record("steps", [{**first, "step": 1}], key=KEY)
    assert path.read_bytes().startswith(before) and len(runs.read("steps")) == 2


@pytest.mark.trust("fault", "the cache is read-only")
def test_a_read_only_cache_is_named_and_what_needs_none_works(read_only, toy, elsewhere, capsys):
    cache = paths.cache_dir()
    cache.mkdir(parents=True)
    read_only(cache)
    with pytest.raises(OSError, match=r"Read-only file system: '.*data/cache/"):
        runs.record("steps", [row()], key=KEY)
    outcome = runs.run(toy("n = 0", RECORD, "record(0)"), progress=False)
    assert outcome["state"] == "finished" and len(rows_of(outcome["folder"])) == 1, "a run locks in its own folder"
    assert main(["collect"]) == 0 and "1 row" in capsys.readouterr().out


@pytest.mark.trust("fault", "the runs are in a read-only folder")
def test_read_only_runs_are_listed_and_collected_elsewhere(read_only, toy, elsewhere, tmp_path_factory, capsys):
    finished_run({"n": 0}, [row()])
    stopped = store.Run("toy", {"n": 1}, "aaaaaaaa")
    store.begin(stopped, notebook="{}")
    (stopped.folder / "lock").touch()
    path = toy("n = 2", "1")
    read_only(paths.runs_dir())
    assert [run.state() for run in store.all_runs()].count("interrupted") == 1
    assert main(["collect", "--to", str(tmp_path_factory.mktemp("out") / "table")]) == 0
    assert "1 row" in capsys.readouterr().out
    assert main(["run", str(path)]) == main(["collect"]) == 1
    told = capsys.readouterr().err
    assert told.count("Read-only file system: '") == 2 and str(paths.runs_dir()) in told


@pytest.mark.trust("fault", "a file is where a folder should be")
@pytest.mark.parametrize("where", ["cache", "results", "runs"])
def test_a_file_in_place_of_a_folder_is_named(toy, elsewhere, capsys, where):
    (elsewhere / "data").mkdir()
    (elsewhere / "data" / where).touch()
    if where == "runs":
        assert main(["run", str(toy("n = 0", "1"))]) == 1
        told = capsys.readouterr().err
    else:
        with pytest.raises(OSError) as refused:
            runs.record("steps", [row(scale="paper" if where == "results" else "quick")], key=KEY)
        assert refused.value.errno in (errno.ENOTDIR, errno.EEXIST)
        told = str(refused.value)
    assert str(elsewhere / "data" / where) in told


# ---------------------------------------------------------------------------------- torn writes

TORN = """
import os, signal, sys
from axmoe_lite import runs
row = {"seconds": 0.1, **runs.evidence(8, scale="quick", seed=0, epochs=0)}
runs.record("steps", [{"step": 0, **row}], key=("seed", "step"))
print("written", flush=True)
real = os.replace
def torn(old, new):
    if str(new).endswith(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
os.replace = torn
runs.record("steps", [{"step": 1, **row}], key=("seed", "step"), about="said anew")
"""


@pytest.mark.trust("fault", "a process is killed between writing a file and naming it")
@pytest.mark.parametrize("at", ["steps.csv", "studies.json"])
def test_a_torn_write_is_as_if_it_had_not_begun(elsewhere, at):
    done = python(TORN, at)
    assert done.returncode == -signal.SIGKILL and done.stdout == "written\n"
    path = paths.cache_dir() / "results" / "steps.csv"
    (kept,) = runs.read("steps", scale="quick")
    before = path.read_bytes()
    assert kept["step"] == "0" and len(list(path.parent.glob(f".{at}.*"))) == 1, "the half that nobody reads"
    runs.record("steps", [row(1)], key=KEY)  # nor does the dead process's lock hold anyone up
    assert path.read_bytes().startswith(before) and len(runs.read("steps", scale="quick")) == 2


@pytest.mark.trust("fault", "a process is killed between writing a file and naming it")
def test_what_a_killed_attempt_left_half_written_is_not_sent_nor_collected(elsewhere):
    run = finished_run({"n": 0}, [row()])
    (run.folder / "rows" / "quick" / ".steps.csv.12.34").write_text("step,secon")
    assert sorted(execute._packed(run.folder)) == ["rows/quick/steps.csv", "rows/quick/studies.json"]
    assert runs.collect().table.num_rows == 1

"""Nothing grows over many rounds and runs in one process; the long form is ``python tests/soak.py``."""

import copy
import dataclasses
import gc
import weakref

import psutil
import pytest
import soak
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from axmoe_lite import Multiplier, factorise, models, multiplier, runs
from axmoe_lite.kernels import factored, lookup
from axmoe_lite.layers import approximate
from axmoe_lite.multipliers import files

ROUNDS, EVERY = 24, 3
A_TABLE_MB = 0.262144  # 256 x 256 x 4 bytes
LEAK = []


@pytest.fixture
def few_kept(monkeypatch):
    """Of the tables read from files four are kept, not 64: what is kept on purpose is full after four rounds."""
    monkeypatch.setattr(files, "MOST_KEPT", 4)
    monkeypatch.setattr(lookup, "MOST_REMEMBERED", 4)
    monkeypatch.setattr(files, "_kept", {})


@pytest.mark.trust("load", "memory stays flat over rounds of new tables in one process")
def test_rounds_of_new_tables_leave_nothing_behind(few_kept, record_property):
    seen = list(soak.rounds(ROUNDS, every=EVERY))
    record_property("cases", ROUNDS)
    assert [one.at for one in seen] == list(range(EVERY, ROUNDS + 1, EVERY))
    assert soak.grown(seen) == []
    # One table lost in each of the fifteen rounds between the third measurement and the last would be fifteen times it.
    assert seen[-1].tensors_mb - seen[2].tensors_mb < 2 * A_TABLE_MB, seen


def test_a_leak_of_one_table_a_round_is_noticed(few_kept, monkeypatch):
    real = soak.one_round

    def leaking(file, *others):
        real(file, *others)
        LEAK.append(multiplier(f"file:{file}").table)

    monkeypatch.setattr(soak, "one_round", leaking)
    seen = list(soak.rounds(8, every=2))
    LEAK.clear()
    assert seen[-1].tensors_mb - seen[1].tensors_mb > 2 * A_TABLE_MB, "four rounds, about four tables"


def test_tensors_without_memory_are_not_counted():
    before = soak.held("runs", 1, 0.0).tensors_mb
    with FakeTensorMode():
        traced = torch.empty(1000, 1000)  # what a compiled network's caches hold on to
    kept = torch.empty(1000, 250)
    assert soak.held("runs", 1, 0.0).tensors_mb == pytest.approx(before + 1, abs=0.01) and len(traced) == len(kept)


def held(at: int, **changed) -> soak.Held:
    return dataclasses.replace(soak.Held("runs", at, 500.0, 1.0, 6, 2, 0, 0, 1.0), **changed)


def test_what_grows_from_the_middle_on_is_said_and_what_is_kept_before_is_not():
    flat = [held(at, memory_mb=500.0 + min(at, 500)) for at in range(100, 1100, 100)]
    assert soak.grown(flat) == []
    # 0.2 MB a run from 500 to 1000 are 100 MB.
    assert soak.grown([held(at, memory_mb=at / 5) for at in range(100, 1100, 100)]) == [
        "100 MB of memory more from 500 to 1,000 runs"
    ]
    for name in ("handles", "threads", "children", "left"):
        seen = [*flat[:-1], dataclasses.replace(flat[-1], **{name: 9})]
        assert soak.grown(seen) == [f"{name}: {getattr(flat[0], name)} after 500 runs, 9 after 1,000"]


@pytest.mark.trust("load", "a process that sweeps again and again holds on to nothing")
def test_sweeps_of_real_runs_leave_no_process_file_or_thread_behind(record_property):
    before = len(psutil.Process().children(recursive=True))  # servers of processes that other tests started
    seen = list(soak.swept(12, every=3, cell="n * n"))  # the kernels are real, what they compute is not
    record_property("cases", 12)
    assert [one.at for one in seen] == [3, 6, 9, 12] and soak.grown(seen) == [], seen
    assert all(one.children <= before and one.left == 0 for one in seen)


def test_a_run_that_leaves_a_file_and_a_process_behind_is_noticed(monkeypatch):
    real, left = soak.runs.sweep, []

    def littering(path, given, **options):
        left.append(soak.subprocess.Popen(["sleep", "60"]))
        soak.tempfile.mkstemp()
        return real(path, given, perform=runs.pretend, **options)

    monkeypatch.setattr(soak.runs, "sweep", littering)
    try:
        seen = list(soak.swept(4, every=1, cell="n"))
    finally:
        for process in left:
            process.kill()
            process.wait()
    grew = [one.partition(":")[0] for one in soak.grown(seen)]
    assert grew == ["handles", "children", "left"], seen


def test_a_copied_network_shares_its_multipliers_and_factors_go_with_the_last():
    images = torch.rand(2, 3, 8, 8)
    table = torch.randint(-100, 100, (256, 256), generator=torch.Generator().manual_seed(0))
    mine = Multiplier("mine", table)
    network = approximate(models.resnet8(classes=4, width=0.25), mine, calibration=images)
    assert copy.deepcopy(network).layer1[0].conv1.multiplier is mine
    mosaic = multiplier("filter[drum(4), roba()]")
    assert copy.deepcopy(mosaic) is mosaic
    factors = weakref.ref(factored.factors_of(mine)), weakref.ref(factorise(mine))
    network(images)
    del network, mine
    gc.collect()
    assert [factor() for factor in factors] == [None, None]


def test_the_script_collects_and_records(elsewhere, capsys):
    assert soak.main(["--collect", "20000", "--record"]) == 0
    assert "what='rows', at=20000" in (said := capsys.readouterr().out) and "Nothing grew." in said
    (row,) = runs.read("soak")
    assert (row["what"], row["at"], row["children"]) == ("rows", "20000", "0") and float(row["memory_mb"]) < 500


def test_nothing_asked_for_is_refused(capsys):
    with pytest.raises(SystemExit):
        soak.main([])
    assert "name --runs, --rounds or --collect" in capsys.readouterr().err

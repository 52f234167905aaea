"""A run is stopped, starved, lost or confused by the clock: its rows stay, the cause is said, a rerun does the rest."""

import datetime
import json
import os
import signal

import pytest
from faults import RECORD, TRACE, alive, axmoe, begun, numbers_of, rows_of, wait_for

from axmoe_lite import paths, runs
from axmoe_lite.runs import execute, store

ONCE = "once = home / 'once'\nfirst = not once.exists()\nonce.touch()\n"


@pytest.mark.trust("fault", "a sweep is interrupted")
def test_an_interrupted_sweep_keeps_its_rows_and_goes_on(toy, elsewhere):
    wait = "while n == 1 and not (home / 'go').exists(): time.sleep(0.05)"
    path = toy("n = 0", RECORD, "record(0, 1)", wait, "record(2)")
    process = axmoe("sweep", str(path), "n=0,1")
    wait_for(lambda: sorted(numbers_of(elsewhere)) == [2, 3])
    before = rows_of(elsewhere)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; what has finished is kept, the same command goes on" in said
    assert not any(alive(int(pid)) for _, pid in begun(elsewhere)) and rows_of(elsewhere) == before
    (elsewhere / "go").touch()
    outcomes = runs.sweep(path, {"n": [0, 1]}, progress=False)
    assert [(o["state"], o["ran"]) for o in outcomes] == [("finished", False), ("finished", True)]
    after = rows_of(elsewhere)
    assert all(after[name].startswith(content) for name, content in before.items()) and numbers_of(elsewhere) == [3, 3]


@pytest.mark.trust("fault", "a run's kernel is killed")
def test_a_killed_kernel_leaves_its_rows_and_is_tried_again_on_request(toy, elsewhere):
    path = toy("n = 0", RECORD, ONCE + "record(0)", "if first: os.kill(os.getpid(), 9)", "record(1)")
    failed = runs.run(path, progress=False)
    before = rows_of(failed["folder"])
    assert failed["state"] == "failed" and "DeadKernelError" in failed["reason"] and numbers_of(elsewhere) == [1]
    done = runs.run(path, retry=True, progress=False)
    (content,) = rows_of(done["folder"]).values()
    assert done["state"] == "finished" and numbers_of(elsewhere) == [2] and content.startswith(*before.values())


@pytest.mark.trust("fault", "a run is out of memory")
def test_a_run_out_of_memory_says_so_and_the_next_one_finishes(toy, elsewhere):
    limit = "import resource, numpy\nresource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)"
    path = toy("n = 0", RECORD, "record(0)", f"if n == 0:\n    exec({limit!r})\n    numpy.ones(2**30)", "record(1)")
    outcomes = runs.sweep(path, {"n": [0, 1]}, progress=False)
    assert [o["state"] for o in outcomes] == ["failed", "finished"]
    assert "MemoryError: Unable to allocate 8.00 GiB" in outcomes[0]["reason"]  # 2^30 numbers of 8 bytes
    assert [numbers_of(o["folder"]) for o in outcomes] == [[1], [2]]


# ---------------------------------------------------------------------------------- a folder is deleted


@pytest.mark.trust("fault", "a run's folder is deleted under it")
def test_a_folder_deleted_under_its_run_is_said_and_the_others_finish(toy, elsewhere):
    lost = "import shutil\nif n == 1 and first:\n    shutil.rmtree(os.environ['AXMOE_RUN'])\n    time.sleep(60)"
    path = toy("n = 0", TRACE, ONCE.replace("'once'", "f'once{n}'"), lost)
    one, two = runs.sweep(path, {"n": [1, 2]}, progress=False)
    assert (one["state"], one["reason"]) == ("not run", "its folder was deleted while it ran")
    assert two["state"] == "finished" and not one["folder"].exists() and not alive(int(begun(elsewhere)[0][1]))
    assert "1 not run: the same command goes on with them" in runs.summary([one, two])
    again = runs.sweep(path, {"n": [1, 2]}, progress=False)
    assert [(o["state"], o["ran"]) for o in again] == [("finished", True), ("finished", False)]


@pytest.mark.trust("fault", "a run's folder is deleted under it")
def test_a_run_that_records_into_a_new_folder_is_not_taken_for_whole(toy, elsewhere):
    lost = "import shutil\nif first: shutil.rmtree(os.environ['AXMOE_RUN'])"
    path = toy("n = 0", RECORD, ONCE + "record(0)", lost, "record(1)")
    (outcome,) = runs.sweep(path, progress=False)
    assert (outcome["state"], outcome["reason"]) == ("not run", "its folder was deleted while it ran")
    assert not outcome["folder"].exists(), "row 0 is gone: nobody is to find row 1 alone"
    assert runs.run(path, progress=False)["state"] == "finished" and numbers_of(elsewhere) == [2]


# ---------------------------------------------------------------------------------- the clock is set

CLOCK = """
import datetime, os, time
real = time.time
def ahead():
    try:
        with open(os.environ["CLOCK"]) as file: return float(file.read())
    except (OSError, ValueError): return 0.0
time.time = lambda: real() + ahead()
class Set(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return cls.fromtimestamp(time.time(), tz)
datetime.datetime = Set
"""
DAY, YEAR = 86_400, 31_536_000


@pytest.fixture
def clock(elsewhere, monkeypatch):
    """The file that says by how many seconds the clock of new processes is wrong; each reads it again and again."""
    (elsewhere / "site").mkdir()
    (elsewhere / "site" / "sitecustomize.py").write_text(CLOCK)
    monkeypatch.setenv("PYTHONPATH", f"{elsewhere / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', paths.CHECKOUT)}")
    monkeypatch.setenv("CLOCK", str(elsewhere / "clock"))
    return elsewhere / "clock"


@pytest.mark.trust("fault", "the clock is set back a day, or ahead a year")
@pytest.mark.parametrize("seconds", [-DAY, YEAR], ids=["back", "ahead"])
def test_a_clock_that_is_set_in_mid_run_ends_no_run_and_lengthens_none(toy, elsewhere, clock, seconds):
    jump = "if n: pathlib.Path(os.environ['CLOCK']).write_text(str(n))\ntime.sleep(3)\nprint(time.time())"
    path = toy("n = 0", TRACE, jump)
    process = axmoe("sweep", str(path), f"n=0,{seconds}", "--workers", "2", "--minutes", "5")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "2 finished, 0 failed." in said, said
    again = runs.sweep(path, {"n": [0, seconds]}, progress=False)
    assert all(o["state"] == "finished" and not o["ran"] and 3 < o["seconds"] < 60 for o in again)
    start, end = (datetime.datetime.fromisoformat(again[1][name]).timestamp() for name in ("started", "ended"))
    assert abs(end - start - seconds) < 60, "the clock was set indeed"
    assert len(begun(elsewhere)) == 2


@pytest.mark.trust("fault", "the clock is set back a day, or ahead a year")
def test_attempts_are_numbered_in_their_order_whatever_the_clock_says(toy, elsewhere, clock):
    path, outcomes = toy("n = 0", TRACE, "1 / n"), []
    for seconds in (0, YEAR, -DAY):
        clock.write_text(str(seconds))
        outcomes.append(runs.run(path, retry=True, progress=False))
    assert [o["attempts"] for o in outcomes] == [1, 2, 3] and all(0 < o["seconds"] < 60 for o in outcomes)
    first, second = (json.loads((outcomes[0]["folder"] / f"outcome-{n}.json").read_text()) for n in (1, 2))
    assert second["started"] == outcomes[1]["started"] > first["started"] > outcomes[2]["started"]


# ---------------------------------------------------------------------------------- two sweeps in one folder


@pytest.mark.trust("fault", "two sweeps run at once in one folder")
def test_a_sweep_that_waited_for_another_ones_run_leaves_its_outcome_alone(toy, elsewhere):
    work, later = (runs.plan(toy("n = 0", "1"), [{"n": 0}])[0] for _ in range(2))
    store.begin(work.run, notebook="{}")
    store.write_json(work.run.folder / "outcome.json", execute.conclusion(work, "", seconds=1) | {"peak_mb": 500})
    execute._conclude(later, None, "", seconds=9, peak_mb=20)
    assert store.outcome(work.run)["peak_mb"] == 500

"""Real notebooks in real processes: each combination once, whatever is killed in between."""

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults import wait_for

from axmoe_lite import paths, runs
from axmoe_lite.__main__ import main
from axmoe_lite.runs import execute, store

TRACE = "import os, pathlib, time; trace = pathlib.Path(os.environ['AXMOE_HOME'], 'trace')"
SAY = TRACE + "\nwith trace.open('a') as f: print('run', n, os.getpid(), time.time(), file=f)"


def traced(home: Path) -> list[list[str]]:
    return [line.split() for line in (home / "trace").read_text().splitlines()]


def output(outcome: dict) -> str:
    cells = json.loads((outcome["folder"] / "notebook.ipynb").read_text())["cells"]
    return "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))


def test_every_combination_once(toy, elsewhere):
    path = toy("n = 0  # {0..9} a number\nword = 'a'  # {a, b} a letter", SAY, "print(n, word)")
    given = {"n": [1, 2], "word": ["a", "b"]}
    outcomes = runs.sweep(path, given, progress=False)
    assert [output(o).split() for o in outcomes] == [["1", "a"], ["1", "b"], ["2", "a"], ["2", "b"]]
    assert all(o["ran"] and o["state"] == "finished" and o["peak_mb"] > 10 for o in outcomes)
    again = runs.sweep(path, {**given, "n": [2, 3]}, progress=False)
    assert [o["ran"] for o in again] == [False, False, True, True]
    assert [line[1] for line in traced(elsewhere)] == list("112233")
    assert sorted(p.name for p in outcomes[0]["folder"].iterdir()) == [
        "lock", "log.txt", "notebook.ipynb", "outcome.json", "run.json", "source.ipynb", "work.json",
    ]  # fmt: skip
    told = runs.summary([*outcomes, *again])
    assert "8 finished (2 before), 0 failed." in told and "n=1 word=b" in told


def test_nothing_starts_after_a_typo(toy, elsewhere):
    path = toy("n = 0  # {0..9} a number", "1")
    for given, problem in [
        ({"m": [1]}, "no parameter 'm'. There are n"),
        ({"n": [1, 10]}, "10"),
        ({"n": ["one"]}, "'one'"),
    ]:
        with pytest.raises(ValueError, match=problem):
            runs.sweep(path, given, progress=False)
    for wrong in ({"workers": 0}, {"minutes": -1}, {"threads": -2}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            runs.sweep(path, **wrong, progress=False)
    with pytest.raises(ValueError, match="05_networks"):
        runs.sweep("05_netwroks", progress=False)
    assert not (elsewhere / "data").exists()


def test_failures_are_kept_and_retried_on_request(toy, elsewhere):
    path = toy("n = 0", SAY, TRACE + "\nif n == 1 and len(trace.read_text().splitlines()) < 4: 1 / 0", "print('end')")
    outcomes = runs.sweep(path, {"n": [0, 1]}, progress=False)
    assert [o["state"] for o in outcomes] == ["finished", "failed"]
    assert "ZeroDivisionError: division by zero" in outcomes[1]["reason"]
    assert "1 / 0" in (outcomes[1]["folder"] / "error.txt").read_text()
    assert (outcomes[1]["folder"] / "executing.ipynb").exists() and not (
        outcomes[1]["folder"] / "notebook.ipynb"
    ).exists()
    assert "1 failed (1 before: --retry" in runs.summary(runs.sweep(path, {"n": [0, 1]}, progress=False))
    assert len(traced(elsewhere)) == 2, "a failed run is not run again unasked"
    assert runs.run(path, {"n": 1}, retry=True, progress=False)["attempts"] == 2
    last = runs.run(path, {"n": 1}, retry=True, progress=False)
    assert last["state"] == "finished" and last["attempts"] == 3
    kept = sorted(p.name for p in last["folder"].glob("*-*"))
    assert kept == ["error-1.txt", "error-2.txt", "outcome-1.json", "outcome-2.json"]


@pytest.mark.trust("fault", "a run is killed, or stopped at its limits")
@pytest.mark.parametrize(
    ("cell", "limits", "reason"),
    [
        ("import time; time.sleep(100)", {"minutes": 0.05}, "longer than its limit of 0.05 minutes"),
        ("x = b'1' * 900_000_000; import time; time.sleep(100)", {"memory_gb": 0.6}, "more than its limit of 0.6 GB"),
        ("import os; os.kill(os.getpid(), 9)", {}, "DeadKernelError"),
        ("import os; os.kill(os.getppid(), 9)", {}, "killed by signal 9"),
    ],
    ids=["time", "memory", "kernel", "process"],
)
def test_what_ends_a_run_is_said(toy, elsewhere, cell, limits, reason):
    start = time.perf_counter()
    outcome = runs.run(toy("n = 0", TRACE + "; trace.write_text(str(os.getpid()))", cell), progress=False, **limits)
    assert outcome["state"] == "failed" and reason in outcome["reason"] and time.perf_counter() - start < 60
    assert reason in (outcome["folder"] / "error.txt").read_text()
    assert gone(int((elsewhere / "trace").read_text())), "its kernel does not outlive it"


def gone(pid: int, *, within: float = 5.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_threads_are_pinned_and_each_run_sees_one_gpu(toy, elsewhere, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    path = toy("n = 0", "import os, time; time.sleep(2); print(os.environ['OMP_NUM_THREADS'], end=' ')",
               "print(os.environ['NUMBA_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])")  # fmt: skip
    outcomes = runs.sweep(path, {"n": [0, 1]}, workers=2, threads=3, progress=False)
    assert sorted(output(o).split() for o in outcomes) == [["3", "3", "3"], ["3", "3", "5"]]
    times = [(o["started"], o["ended"]) for o in outcomes]
    assert max(start for start, _ in times) < min(end for _, end in times), "two at a time"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert execute._gpus() == []


@pytest.mark.trust("fault", "the code is edited while a sweep runs")
def test_other_code_is_refused(toy, elsewhere, monkeypatch):
    path = toy("n = 0", "1")
    (work,) = runs.plan(path, [{"n": 0}])
    monkeypatch.setattr(store, "package_digest", lambda: "01234567")
    with pytest.raises(RuntimeError, match=rf"other code of axmoe_lite \(01234567\).*\({work.package}\)"):
        execute.perform(work)
    assert not work.run.folder.exists()


def test_what_a_worker_sends_back_keeps_the_traceback_of_the_attempt_before(toy, elsewhere):
    path = toy("n = 0", "1 / n")
    failed = runs.run(path, progress=False)
    (work,) = runs.plan(path, [{"n": 0}])
    sent = {"state": "finished", "files": {"notebook.ipynb": base64.b64encode(b"{}").decode()}}
    assert execute.unpack(work, sent) == {"state": "finished"} == store.outcome(work.run)
    assert "1 / n" in (failed["folder"] / "error-1.txt").read_text() and not (failed["folder"] / "error.txt").exists()
    for name in ("../outcome.json", "run.json", "rows/../../x", "/etc/passwd"):
        with pytest.raises(ValueError, match="none of a run's"):
            execute.unpack(work, {"state": "finished", "files": {name: ""}})


def test_runs_of_other_code_count_if_told_so(toy, elsewhere, monkeypatch):
    path = toy("n = 0", SAY)
    runs.run(path, progress=False)
    changed = toy("n = 0", SAY, "'more'")
    assert not runs.run(changed, any_source=True, progress=False)["ran"]
    assert runs.run(changed, progress=False)["ran"]
    assert len(traced(elsewhere)) == 2


# ---------------------------------------------------------------------------------- killed

STEPS = 30
COUNTED = f"""
import json, os, pathlib, time
kept = pathlib.Path(os.environ["AXMOE_RUN"], "scratch"); kept.mkdir(exist_ok=True)
state = json.loads((kept / "state").read_text()) if (kept / "state").exists() else []
while len(state) < {STEPS}:
    state.append((len(state) + 1) * (state[-1] if state else n) % 1_000_003)
    time.sleep(0.15)
    with trace.open("a") as f: print("step", len(state), file=f)
    (kept / "partial").write_text(json.dumps(state)); os.replace(kept / "partial", kept / "state")
print(state[-1])
"""


def sweep_process(home: Path, path: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "axmoe_lite", "sweep", str(path), *words]
    environment = {**os.environ, "AXMOE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **options)


@pytest.mark.trust("fault", "a sweep is killed again and again")
def test_killed_again_and_again_it_loses_no_finished_step(toy, elsewhere, record_property):
    path = toy("n = 1", SAY, COUNTED)
    chance, kills, killed_at = random.Random(20261121), 0, []

    def lines():
        return len(traced(elsewhere)) if (elsewhere / "trace").exists() else 0

    for _ in range(60):
        before, process = lines(), sweep_process(elsewhere, path, "n=5,7")
        if kills % 2:  # once it works; a slow machine starts too slowly to be hit there by chance
            wait_for(lambda process=process, before=before: lines() > before or process.poll() is not None)
        try:
            said, _ = process.communicate(timeout=chance.uniform(0.0, 3.0) if kills < 10 else 120)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # no warning, no clean-up
            process.communicate()
            kills += 1
            killed_at.append(lines() - before)
    assert process.returncode == 0 and "2 finished" in said
    record_property("cases", kills)
    assert kills >= 5 and any(killed_at), f"killed {kills} times, after {killed_at} lines"
    steps = [int(line[1]) for line in traced(elsewhere) if line[0] == "step"]
    begun = [line for line in traced(elsewhere) if line[0] == "run"]
    # Each kill repeats the one step it interrupted, at most.
    assert 2 * STEPS <= len(steps) <= 2 * STEPS + len(begun)
    for n, outcome in zip((5, 7), runs.sweep(path, {"n": [5, 7]}, progress=False), strict=True):
        value = n
        for step in range(1, STEPS + 1):
            value = step * (value if step > 1 else n) % 1_000_003
        assert not outcome["ran"] and output(outcome).split() == [str(value)]
        left = {p.name for p in outcome["folder"].iterdir()}
        assert not any(name.startswith(".") for name in left) and not left & {"scratch", "executing.ipynb"}


TRAIN = """
from axmoe_lite import datasets, models, runs
from axmoe_lite.train import fit
images = datasets.synthetic(classes=2, size=8, n_train=128, n_test=32)
network = models.resnet8(classes=2, width=0.5, seed=n)
kept = runs.scratch("quick") / "fit.safetensors"
"""
FIT = """
history = fit(network, images, epochs=4, lr=0.05, batch_size=8, seed=n, checkpoint=kept, progress=False)
with trace.open("a") as f: print("trained", n, len(history), file=f)
print(network.fc.weight.double().sum().item(), history[-1]["loss"])
"""


@pytest.mark.trust("fault", "training is killed")
def test_training_that_was_killed_ends_with_the_same_bits(toy, elsewhere, tmp_path):
    path = toy("n = 1", SAY, TRAIN, FIT)
    process = sweep_process(elsewhere, path)
    wait_for(lambda: list(elsewhere.glob("data/runs/toy/*/scratch/fit.safetensors")))
    kernel = int(traced(elsewhere)[-1][2])
    process.kill()
    process.communicate()
    assert gone(kernel), "a killed sweep leaves no orphan at work"
    resumed = runs.run(path, progress=False)
    whole = runs.run(toy("n = 1", SAY, TRAIN, FIT, "'in one go'"), progress=False)
    assert resumed["state"] == whole["state"] == "finished"
    assert output(resumed) == output(whole) != ""


@pytest.mark.trust("fault", "two sweeps run at once in one folder")
def test_two_sweeps_at_once_do_each_run_once(toy, elsewhere):
    path = toy("n = 0", SAY, "import time; time.sleep(1)")
    first, second = (sweep_process(elsewhere, path, "n=0..2") for _ in range(2))
    for process in (first, second):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "3 finished" in said
    assert sorted(line[1] for line in traced(elsewhere)) == ["0", "1", "2"]


@pytest.mark.trust("fault", "a sweep is interrupted")
def test_an_interrupt_stops_the_runs_and_says_so(toy, elsewhere):
    path = toy("n = 0", SAY, "import time; time.sleep(100)")
    process = sweep_process(elsewhere, path, "n=0,1", "--workers", "2")
    wait_for(lambda: (elsewhere / "trace").exists() and len(traced(elsewhere)) == 2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted; what has finished is kept" in said
    assert all(gone(int(line[2])) for line in traced(elsewhere))
    assert {run.state() for run in store.all_runs()} == {"interrupted"}


# ---------------------------------------------------------------------------------- the command line


def test_exit_codes_and_what_is_said(toy, elsewhere, capsys):
    path = str(toy("n = 0  # {0..3} a number", "1 / (n - 1)"))
    assert main(["run", path]) == 0
    assert "1 finished" in (said := capsys.readouterr().out) and "notebook.ipynb" in said
    assert main(["sweep", path, "n=0..2"]) == 1
    said = capsys.readouterr().out
    assert "2 finished (1 before), 1 failed." in said and "ZeroDivisionError" in said
    for words, hint in [
        (["run", path, "n=0,2"], "axmoe sweep"),
        (["run", path, "m=1"], "n"),
        (["sweep", path, "n"], "n="),
        (["sweep", path, "n=7"], "0..3"),
        (["run", "12_nothing"], "networks"),
        (["run", path, "--minutes", "-1"], "minutes"),
        (["book", "--workers", "0"], "at least 1"),
    ]:
        assert main(words) == 2
        assert hint in capsys.readouterr().err
    assert main(["collect", "toy", "--to", "/dev/null/table"]) == 1
    assert "/dev/null" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", path, "--workers", "2", "--scheduler", "tcp://localhost:1"])


@pytest.mark.trust("fault", "no scheduler answers")
def test_a_scheduler_that_is_not_there(toy, elsewhere, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["axmoe_lite.runs.sweep"], "WAIT_SECONDS", 1)
    assert main(["sweep", str(toy("n = 0", "1")), "--scheduler", "tcp://127.0.0.1:1"]) == 1
    assert "No Dask scheduler answers at 'tcp://127.0.0.1:1'" in capsys.readouterr().err


@pytest.mark.trust("load", "a thousand runs that only record")
def test_a_thousand_runs_that_do_nothing(elsewhere, toy, record_property):
    record_property("cases", 1000)
    path = toy("n = 0", "1")
    outcomes = runs.sweep(path, {"n": list(range(1000))}, workers=2, perform=runs.pretend, progress=False)
    assert len({o["run"] for o in outcomes}) == 1000 and all(o["state"] == "finished" for o in outcomes)
    assert len(list(store.all_runs())) == 1000 and not list(paths.runs_dir().glob(".sweep-*"))

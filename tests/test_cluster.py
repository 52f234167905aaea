"""A real Dask scheduler and two real workers over TCP; one of them is killed in mid-run."""

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from faults import wait_for

from axmoe_lite import runs
from axmoe_lite.runs import store

SLOW = """
import os, pathlib, time
with pathlib.Path(os.environ["AXMOE_TRACE"]).open("a") as f: print("begin", n, os.environ["AXMOE_WORKER"], file=f)
time.sleep(2)
with pathlib.Path(os.environ["AXMOE_TRACE"]).open("a") as f: print("end", n, os.environ["AXMOE_WORKER"], file=f)
"""


def start(*command: str, **environment: str) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-m", "dask", *command], env={**os.environ, **environment}, **options)


def kill(process: subprocess.Popen) -> None:
    """With its nanny's worker, but not what the worker started: that has to notice by itself."""
    family = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "child.py" not in " ".join(p.cmdline())
    ]
    for member in [p for p in family if "ipykernel" not in " ".join(p.cmdline())]:
        member.kill()
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def cluster(tmp_path):
    """An address, two workers with homes of their own, and the file in which their runs leave traces."""
    trace = tmp_path / "trace"
    trace.touch()
    file = tmp_path / "scheduler.json"
    processes = [
        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    ]
    wait_for(file.exists)
    wait_for(lambda: store.read_json(file).get("address"))
    address = store.read_json(file)["address"]
    for name in ("one", "two"):
        environment = {"AXMOE_HOME": str(tmp_path / name), "AXMOE_TRACE": str(trace), "AXMOE_WORKER": name}
        options = ("--nthreads", "1", "--no-dashboard", "--local-directory", str(tmp_path / "dask"))
        processes.append(start("worker", address, *options, **environment))
    yield address, processes, trace
    for process in processes:
        if process.poll() is None:
            for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                member.kill()
            process.wait()
            process.stdout.close()


@pytest.mark.trust("fault", "a worker is killed")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_worker_is_killed_and_every_run_finishes_once(cluster, toy, elsewhere, tmp_path):
    address, (_, one, _two), trace = cluster
    path, result = toy("n = 0  # {0..} a number", SLOW, "print(n * n)"), []
    sweep = threading.Thread(
        target=lambda: result.extend(runs.sweep(path, {"n": list(range(6))}, scheduler=address, progress=False))
    )
    sweep.start()
    wait_for(lambda: any(line.startswith("begin") and line.endswith("one") for line in trace.read_text().splitlines()))
    kill(one)
    sweep.join(120)
    assert [o["state"] for o in result] == ["finished"] * 6
    assert {o["parameters"]["n"] for o in result} == set(range(6))
    lines = [line.split() for line in trace.read_text().splitlines()]
    ended = [n for word, n, _ in lines if word == "end"]
    assert sorted(ended) == sorted(set(ended)) and len(ended) == 6, "each to its end once"
    assert len(lines) - len(ended) == 7, "one was begun twice: the one that was killed"
    for outcome in result:  # the workers' folders are not ours: what they made was sent here
        assert (outcome["folder"] / "notebook.ipynb").exists() and outcome["folder"].is_relative_to(elsewhere / "data")
    again = runs.sweep(path, {"n": list(range(6))}, progress=False)
    assert not any(o["ran"] for o in again)


@pytest.mark.trust("fault", "the scheduler is killed")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_scheduler_is_killed_and_what_has_finished_stays(cluster, toy, elsewhere):
    address, (scheduler, *_), _ = cluster
    path = toy("n = 0", SLOW)
    command = [sys.executable, "-m", "axmoe_lite", "sweep", str(path), "n=0..9", "--scheduler", address]
    sweep = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: sum(run.state() == "finished" for run in store.all_runs()) >= 2)
    scheduler.send_signal(signal.SIGKILL)
    said, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1 and "not run: the same command goes on" in said, said[-2000:]
    done = sum(run.state() == "finished" for run in store.all_runs())
    assert 2 <= done < 10 and f"{done} finished" in said

"""One run from its folder to its outcome: a process of its own, watched, its threads, time and memory limited.

:func:`perform` is what a sweep calls in a thread here, or on a Dask worker anywhere. It is safe to call twice for one
run, at once or after a crash: a finished run returns its outcome, and two at work on one folder take turns.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import base64
import contextlib
import datetime
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from axmoe_lite import paths
from axmoe_lite.runs import store
from axmoe_lite.runs.store import Run

POLL_SECONDS = 0.2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
SENT_BACK = ("notebook.ipynb", "error.txt", "log.txt")
DELETED = {"state": "not run", "reason": "its folder was deleted while it ran"}


@dataclass(frozen=True)
class Work:
    """What a worker needs to know about one run.

    Attributes:
        run: which.
        notebook: the text of the file to execute.
        package: digest of the package's code, which must be the worker's too.
        sweep: a name of its own for each sweep; ``runs_dir()/.sweep-<name>`` exists where the sweep was started.
        threads: of torch, BLAS and numba in the run.
        minutes, memory_gb: limits, 0 for none; of all the run's processes together.
        retry: run it again if an earlier sweep left it failed.
        cwd: the notebook's working directory, if the worker has it.
        environment: variables for the run.
        made_by: the commit of the code.
    """

    run: Run
    notebook: str
    package: str
    sweep: str
    threads: int = 1
    minutes: float = 0.0
    memory_gb: float = 0.0
    retry: bool = False
    cwd: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    made_by: str = ""


def perform(work: Work, *, on_cell: Callable[[int, int], object] | None = None) -> dict:
    """Do a run, unless it has been done, and return its outcome (see :func:`axmoe_lite.runs.store.outcome`).

    Args:
        on_cell: called with (cell, number of cells) as they start.

    Returns:
        The outcome; with ``files``, if this machine cannot see the folder of whoever asked.

    Raises:
        RuntimeError: if the code here is not the code the run is named after.
    """
    run = work.run
    _check_same_code(work)
    store.begin(run, notebook=work.notebook, made_by=work.made_by)
    ended = store.outcome(run)
    if ended.get("state") == "failed" and work.retry and ended.get("sweep") != work.sweep:
        store.reopen(run)
        ended = {}
    if not ended:
        if not _watch(work, on_cell):
            return dict(DELETED)
        ended = store.outcome(run)
    return ended if _shared(work) else {**ended, "files": _packed(run.folder)}


def _check_same_code(work: Work) -> None:
    here = store.package_digest()
    if here != work.package:
        raise RuntimeError(
            f"{socket.gethostname()} has other code of axmoe_lite ({here}) than the sweep was started with"
            f" ({work.package}): it was edited meanwhile, or another version is installed there. Start the sweep again,"
            " with the same version everywhere."
        )


def _shared(work: Work) -> bool:
    return (paths.runs_dir() / f".sweep-{work.sweep}").exists()


def _packed(folder: Path) -> dict[str, str]:
    files = [folder / name for name in SENT_BACK] + sorted((folder / "rows").rglob("*.*"))
    return {
        file.relative_to(folder).as_posix(): base64.b64encode(file.read_bytes()).decode()
        for file in files
        if file.is_file() and not file.name.startswith(".")  # half-written when an earlier attempt was killed
    }


def unpack(work: Work, outcome: dict) -> dict:
    """Write what another machine sent back into the run's folder here, the outcome last; returns it without files.

    Only names that :func:`perform` sends are accepted.
    """
    run, files = work.run, outcome.pop("files", {})
    if files:
        store.begin(run, notebook=work.notebook, made_by=work.made_by)
        if store.outcome(run):  # an earlier attempt, whose traceback is kept
            store.reopen(run)
    for name, content in files.items():
        parts = Path(name).parts
        rows = parts[0] == "rows" and len(parts) == 3 and ".." not in parts
        if name not in SENT_BACK and not rows:
            raise ValueError(f"A worker sent a file called {name!r} for {run.id}; that is none of a run's.")
        file = run.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        store.write_bytes(file, base64.b64decode(content))
    if files:
        store.write_json(run.folder / "outcome.json", outcome)
    return outcome


# ---------------------------------------------------------------------------------- watching a process

_living: set[subprocess.Popen] = set()
_stopped: set[subprocess.Popen] = set()


class Interrupted(RuntimeError):
    """A run was stopped with its sweep: it has not failed, and goes on with the next one."""


def stop_all() -> None:
    """Stop the runs of this process, with their kernels; each can be resumed."""
    for child in list(_living):
        _stopped.add(child)
        _kill(child)


def _watch(work: Work, on_cell: Callable[[int, int], object] | None) -> bool:
    """Start the run's process and see it through; if it dies or has to, write down why. False: its folder is gone."""
    run, clock, peak_mb = work.run, time.perf_counter(), 0.0
    cwd = work.cwd if work.cwd and Path(work.cwd).is_dir() else str(run.folder)
    told = {"parameters": run.parameters, "cwd": cwd, "kernel": "python3", "sweep": work.sweep}
    since = {"started": 0.0}
    with _gpu() as gpu, _sockets() as sockets, (run.folder / "log.txt").open("ab") as log:
        store.write_json(run.folder / "work.json", {**told, "attempts": store.attempts(run), "sockets": sockets})
        environment = {**os.environ, **gpu, **work.environment, "AXMOE_RUN": str(run.folder)}
        environment |= dict.fromkeys(THREAD_VARIABLES, str(work.threads))
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("child.py")), str(run.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches us alone; we decide what becomes of it
        )
        _living.add(child)
        try:
            listener = threading.Thread(target=_listen, args=(child, since, on_cell), daemon=True)
            listener.start()
            reason = ""
            while child.poll() is None and not _deleted(run.folder, log):
                used_mb = _memory_mb(child.pid)
                peak_mb = max(peak_mb, used_mb)
                reason = _beyond(work, since["started"], used_mb)
                if reason:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_SECONDS)
        finally:  # also when interrupted: nothing of ours works on behind the user's back
            _kill(child)
            listener.join(5)
            _living.discard(child)
        deleted = _deleted(run.folder, log)
    if child in _stopped:
        _stopped.discard(child)
        raise Interrupted(f"{run.id} was stopped")
    if deleted:
        if not (run.folder / "run.json").exists():  # else another sweep has begun it anew
            shutil.rmtree(run.folder, ignore_errors=True)
        return False
    _conclude(work, child, reason, seconds=time.perf_counter() - clock, peak_mb=peak_mb)
    return True


def _deleted(folder: Path, log: BinaryIO) -> bool:
    """Whether the folder is no longer that of this log: a notebook that records makes a new one, without its rows."""
    try:
        return not os.path.samestat(os.fstat(log.fileno()), (folder / "log.txt").stat())
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def _sockets() -> Iterator[str]:
    """A folder for a kernel's sockets; "" where files cannot be sockets, or their names would be too long to be."""
    with tempfile.TemporaryDirectory(prefix="axmoe-", ignore_cleanup_errors=True) as folder:
        yield folder if os.name == "posix" and len(folder) < 80 else ""


def _listen(child: subprocess.Popen, since: dict, on_cell: Callable[[int, int], object] | None) -> None:
    with child.stdout:
        for line in child.stdout:
            words = line.decode(errors="replace").split()
            if words[:1] == ["started"]:
                since["started"] = time.perf_counter()
            elif words[:1] == ["cell"] and len(words) == 3 and on_cell is not None:
                on_cell(int(words[1]), int(words[2]))


def _beyond(work: Work, started: float, used_mb: float) -> str:
    """Why a run has to be stopped, or ""; the time it waited for another sweep does not count."""
    if work.minutes and started and time.perf_counter() - started > 60 * work.minutes:
        return f"longer than its limit of {work.minutes:g} minutes"
    if work.memory_gb and used_mb > 1000 * work.memory_gb:
        return f"{used_mb / 1000:.2f} GB of memory, more than its limit of {work.memory_gb:g} GB"
    return ""


def _conclude(work: Work, child: subprocess.Popen, reason: str, *, seconds: float, peak_mb: float) -> None:
    run = work.run
    ended = store.outcome(run)
    if ended and ended["sweep"] != work.sweep:  # another sweep's, for which this one waited
        return
    if not ended:
        if not reason:
            reason = f"its process ended by itself ({_how(child.returncode)}) without an outcome"
        tail = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        store.write_text(run.folder / "error.txt", f"{reason}\n\n{tail}")
        ended = conclusion(work, reason, seconds=seconds)
    store.write_json(run.folder / "outcome.json", {**ended, "peak_mb": round(peak_mb)})


def conclusion(work: Work, reason: str, *, seconds: float) -> dict:
    """An outcome: failed for a reason, or finished if that is ""."""
    return {
        "state": "failed" if reason else "finished",
        "reason": reason,
        "seconds": round(seconds, 3),
        "started": "",
        "ended": datetime.datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "host": socket.gethostname(),
        "attempts": store.attempts(work.run),
        "sweep": work.sweep,
    }


def _how(status: int) -> str:
    if status == -9:
        return "killed by signal 9: by hand, or by a system out of memory"
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _memory_mb(pid: int) -> float:
    """Of a process and all below it."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total / 1e6


def _kill(child: subprocess.Popen) -> None:
    import psutil

    family = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(child.pid).children(recursive=True)
    for process in [*family, child]:
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            process.kill()
    child.wait()
    child.stdin.close()


# ---------------------------------------------------------------------------------- one GPU a run

_lock, _runs_on = threading.Lock(), {}


@contextlib.contextmanager
def _gpu() -> Iterator[dict[str, str]]:
    """The variable that shows a run one GPU: the least busy of those this process sees. Nothing where there is none."""
    names = _gpus()
    if not names:
        yield {}
        return
    with _lock:
        name = min(names, key=lambda gpu: _runs_on.get(gpu, 0))
        _runs_on[name] = _runs_on.get(name, 0) + 1
    try:
        yield {"CUDA_VISIBLE_DEVICES": name}
    finally:
        with _lock:
            _runs_on[name] -= 1


def _gpus() -> list[str]:
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return [name.strip() for name in shown.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]

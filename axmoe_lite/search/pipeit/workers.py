"""A real pipeline: one process for each stage, pinned to its cores, with a bounded queue between two of them.

    ran = run(stages, images, cores=[[0], [1]], batch=8)          stage 0 on core 0, stage 1 on core 1
    ran = parallel(model, images, cores=[[0], [1]], batch=8)      the whole model on each, images dealt out in turn
    ran = parallel(model, images, cores=[[0, 1]], batch=8)        one process, two threads

Values lie in memory that both processes see: a stage writes what it made into a free slot, sends a note of some
bytes through a pipe, and the next computes on the slot itself. So a value is copied once on each way, and a queue of
two batches costs three slots. The first stage takes its images, and the last leaves its answers, in such memory too.

Times are of ``time.perf_counter``, which on Linux (CLOCK_MONOTONIC), macOS and Windows is one clock for all
processes. Workers are fresh processes, started before the clock runs: seconds for the first, on Linux and macOS less
for those after it. So a script must call this under ``if __name__ == "__main__":``, and classes of the user's own
must lie in a file that can be imported; a notebook needs neither where the modules are torch's or ours, as those of
:func:`split` mostly are.

Letters: n images, B in a batch.

Chapter: 19, "Which core for which layer?"
"""

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor, nn

from axmoe_lite.layers import evaluating
from axmoe_lite.search.pipeit.links import Gone, Receiver, Sender, link, pack

# Never a fork of this process: one that has run torch's threads can hang. Where there is a server of fresh processes,
# torch is imported once, by the server.
START = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)


@dataclass(frozen=True)
class Span:
    """When a worker was busy with a batch, seconds after the first of all began.

    Attributes:
        batch: its number, from 0.
        stage: of the pipeline; in :func:`parallel` the worker's number.
        start_s, end_s: when it computed.
        sent_s: when the answer had been handed on: after end_s comes the wait for a free slot, and a copy.
    """

    batch: int
    stage: int
    start_s: float
    end_s: float
    sent_s: float


@dataclass(frozen=True, eq=False)
class Ran:
    """What came of it.

    Attributes:
        answers: [n, ...] in the order of the images.
        images_per_s: of a pipeline in steady state: the images after the first batch over the time from the first
            answer to the last (with one batch: n / seconds). Of :func:`parallel`, which needs no filling: n / seconds.
        seconds: from the first start to the last answer, with filling and draining.
        spans: one for each batch and stage, by stage and batch.
        pinned: whether the workers were bound to their cores; False where the system cannot.
    """

    answers: Tensor
    images_per_s: float
    seconds: float
    spans: list[Span]
    pinned: bool


def run(
    stages: Sequence[nn.Module],
    images: Tensor,
    *,
    cores: Sequence[Sequence[int]],
    batch: int = 1,
    queue: int = 2,
    warm_up: int = 3,
    timeout_s: float | None = 600.0,
) -> Ran:
    """Images through a pipeline of processes, one for each stage. Not from the paper: processes, where it has threads.

    The answers are those of ``chain(stages, images[i : i + batch])`` in this process with as many threads, in every
    bit: values keep their strides, and lie as aligned as torch's.

    Args:
        stages: of :func:`split`, or any modules that take what the one before gave (a tensor, or a tuple with one
            entry for each argument). They are run once here before anything starts, in evaluation mode.
        images: [n, ...], on the CPU. They are copied once.
        cores: for each stage the numbers of its cores; it computes with as many threads. Stages may share cores and
            then take turns, as they must on a machine with one.
        batch: B, images that travel together; the last batch may be smaller.
        queue: batches that may wait between two stages, at least 1.
        warm_up: batches that go through before the clock runs.
        timeout_s: for all of it, starting included; None: however long it takes.

    Raises:
        ValueError: before any process starts: for numbers that make no sense, cores that this process may not use,
            stages that do not fit each other, give no tensor in the end, or cannot be sent.
        RuntimeError: with the worker's own words, when one fails or dies; the others are ended.
        TimeoutError: with how far each had come.
    """
    _check(stages, images, cores, batch, warm_up, timeout_s)
    if queue < 1:
        raise ValueError(f"queue is {queue}; at least 1 batch must be able to wait between two stages.")
    if len(stages) != len(cores):
        raise ValueError(f"There are {len(stages)} stages and {len(cores)} lists of cores; give each stage one.")
    sizes, answers = _rehearsed(stages, images, batch)
    blobs = [_written(f"Stage {i}", stage) for i, stage in enumerate(stages)]
    shared = images.detach().clone().share_memory_()
    senders, receivers = zip(*(link(size=size, slots=queue + 1) for size in sizes), strict=True) if sizes else ((), ())
    ends = zip([None, *receivers], [*senders, None], strict=True)
    jobs = [
        _Job(f"Stage {i}", blob, tuple(own), shared, answers, batch, warm_up, before, after)
        for i, (blob, own, (before, after)) in enumerate(zip(blobs, cores, ends, strict=True))
    ]
    return _ran(answers, _all(jobs, timeout_s), len(images), batch)


def parallel(
    model: nn.Module,
    images: Tensor,
    *,
    cores: Sequence[Sequence[int]],
    batch: int = 1,
    warm_up: int = 3,
    timeout_s: float | None = 600.0,
) -> Ran:
    """The whole model in a process for each list of cores; whoever is free takes the next batch.

    What the same cores do without a pipeline. Arguments, answers and errors are those of :func:`run`;
    ``cores=[[0, 1]]`` is one process that computes each layer with two threads.
    """
    _check([model], images, cores, batch, warm_up, timeout_s)
    _, answers = _rehearsed([model], images, batch)
    blob, shared = _written("The model", model), images.detach().clone().share_memory_()
    turn = START.Value("q", 0)
    jobs = [
        _Job(f"Worker {i}", blob, tuple(own), shared, answers, batch, warm_up, turn=turn) for i, own in enumerate(cores)
    ]
    return _ran(answers, _all(jobs, timeout_s), len(images), None)


# ---------------------------------------------------------------------------------- before any process starts


def _check(
    stages: Sequence[nn.Module],
    images: Tensor,
    cores: Sequence[Sequence[int]],
    batch: int,
    warm_up: int,
    timeout_s: float | None,
) -> None:
    if not stages or not all(isinstance(stage, nn.Module) for stage in stages):
        raise ValueError("A pipeline needs at least one stage, and each must be an nn.Module, as split() makes them.")
    if not isinstance(images, Tensor) or images.device.type != "cpu" or not images.ndim or not len(images):
        about = f"{list(images.shape)} on {images.device}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images is {about}; it must be a tensor [n, ...] on the CPU with at least one image.")
    for name, value, least in (("batch", batch, 1), ("warm_up", warm_up, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it is at least {least}.")
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}; it is a number of seconds above 0, or None.")
    there = os.sched_getaffinity(0) if _can_pin() else set(range(os.cpu_count() or 1))
    if not cores:
        raise ValueError(f"cores is empty; give a list for each process, of cores {sorted(there)}.")
    for own in cores:
        if not own or len(set(own)) != len(own) or not set(own) <= there:
            raise ValueError(
                f"cores has {list(own)} for one process; it takes at least one of {sorted(there)}, each once."
            )
    if not _can_pin():
        warnings.warn("This system does not bind processes to cores: it decides itself who runs where.", stacklevel=3)


def _can_pin() -> bool:
    return hasattr(os, "sched_setaffinity")


@torch.no_grad()
def _rehearsed(stages: Sequence[nn.Module], images: Tensor, batch: int) -> tuple[list[int], Tensor]:
    """Bytes that travel after each stage but the last, and memory for all answers. Runs a whole batch, and the rest."""
    n, sizes = len(images), [0] * (len(stages) - 1)
    for few in sorted({min(batch, n), n % batch or min(batch, n)}, reverse=True):
        value: Any = images[:few].clone()
        for i, stage in enumerate(stages):
            try:
                with evaluating(stage):
                    value = stage(*_as_arguments(value))
            except Exception as reason:
                raise ValueError(
                    f"Stage {i} of {len(stages)} failed on the first {few} images, before any process was started:"
                    f" {type(reason).__name__}: {reason}"
                ) from reason
            if i < len(sizes):
                sizes[i] = max(sizes[i], pack(_as_arguments(value))[1])
        if not isinstance(value, Tensor) or value.shape[:1] != (few,):
            about = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"The last stage gives {about} for {few} images; it must give a tensor [{few}, ...].")
    return sizes, value.new_empty(n, *value.shape[1:]).share_memory_()


def _as_arguments(value: Any) -> tuple:
    return value if type(value) is tuple else (value,)


def _written(label: str, module: nn.Module) -> bytes:
    file = io.BytesIO()
    try:
        torch.save(module, file)
    except Exception as reason:
        raise ValueError(
            f"{label} cannot be sent to another process: {reason}. What it holds must be importable: classes and"
            " functions at the top of a file, no lambda."
        ) from reason
    return file.getvalue()


# ---------------------------------------------------------------------------------- in the worker


@dataclass(frozen=True)
class _Job:
    """What one process is to do: a stage where it has a neighbour or none at all, else its share of the batches."""

    label: str
    module: bytes
    cores: tuple[int, ...]
    images: Tensor
    answers: Tensor
    batch: int
    warm_up: int
    before: Receiver | None = None
    after: Sender | None = None
    turn: Any = None  # the next batch's number, where whoever is free takes it

    @property
    def batches(self) -> int:
        return -(-len(self.images) // self.batch)

    def rows(self, number: int) -> slice:
        """Of a batch; those of a batch for warming up, below 0, are the first."""
        start = max(number, 0) * self.batch
        return slice(start, start + self.batch)

    def numbers(self, status: Connection) -> Iterator[int]:
        """Batches to compute, and the wait for all others after those for warming up."""
        yield from range(-self.warm_up, 0)
        status.send(("ready", None))
        try:
            status.recv()
        except (EOFError, OSError) as error:
            raise Gone from error
        if self.turn is None:
            yield from range(self.batches)
        while self.turn is not None:
            with self.turn.get_lock():
                number, self.turn.value = self.turn.value, self.turn.value + 1
            if number >= self.batches:
                return
            yield number

    def close(self) -> None:
        """Close this process's ends: else nobody would learn that the worker's are closed."""
        for end in (self.before, self.after):
            if end is not None:
                end.close()


def _work(job: _Job, status: Connection) -> None:
    """What a process does from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; whoever started this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if _can_pin():
            os.sched_setaffinity(0, job.cores)
        torch.set_num_threads(len(job.cores))
        module = torch.load(io.BytesIO(job.module), weights_only=False).eval()
        status.send(("done", _computed(job, module, status)))
    except Gone:
        pass  # who is to blame says so itself
    except BaseException as error:
        with contextlib.suppress(OSError):
            status.send(("failed", _told(error)))


def _told(error: BaseException) -> str:
    hint = ""
    if isinstance(error, AttributeError) and "__main__" in str(error):
        hint = "\nA class or function of a notebook or script is not known in a process of its own: put it into a file."
    return f"failed: {type(error).__name__}: {error}{hint}\n\n{traceback.format_exc()}"


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@torch.no_grad()
def _computed(job: _Job, module: nn.Module, status: Connection) -> list[tuple[int, float, float, float]]:
    """Batch, start, end, sent of all that were not for warming up."""
    times, slot, clock = [], None, time.perf_counter
    for number in job.numbers(status):
        if job.before is None:
            values = (job.images[job.rows(number)].clone(),)  # a network may write into its input
        else:
            slot, values = job.before.receive()
        start = clock()
        value = module(*values)
        end = clock()
        if job.after is not None:
            job.after.send(_as_arguments(value))
        elif number >= 0:
            job.answers[job.rows(number)] = value
        sent = clock()
        if job.before is not None:
            job.before.free(slot)
        if number >= 0:
            times.append((number, start, end, sent))
    return times


# ---------------------------------------------------------------------------------- whoever started them


def _all(jobs: list[_Job], timeout_s: float | None) -> list[Span]:
    """Start all, wait for all; whatever happens, none is left behind."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    processes, statuses = [], []
    START.set_forkserver_preload([__name__])  # has no effect once the server runs, or where there is none
    try:
        for job in jobs:
            ours, theirs = START.Pipe()
            statuses.append(ours)
            processes.append(START.Process(target=_work, args=(job, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
        for job in jobs:
            job.close()
        found = _heard([job.label for job in jobs], processes, statuses, deadline)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for end in [*statuses, *jobs]:
            end.close()
    begin = min(times[0][1] for times in found if times)
    return [
        Span(number, i, start - begin, end - begin, sent - begin)
        for i, times in enumerate(found)
        for number, start, end, sent in times
    ]


def _heard(labels: list[str], processes: list, statuses: list[Connection], deadline: float | None) -> list[list]:
    """Let them begin together, and collect what they measured.

    A worker without a neighbour ends without a word and with exit code 0; the one to blame is another.
    """
    states: list[Any] = ["starting"] * len(labels)  # in the end a list: what it measured
    while not all(isinstance(state, list) for state in states):
        alive = [c for c, state in zip(statuses, states, strict=True) if state in ("starting", "ready", "running")]
        heard = wait(alive, None if deadline is None else max(0.0, deadline - time.monotonic())) if alive else []
        if not heard:
            told = ", ".join(
                f"{a}: {'done' if isinstance(b, list) else b}" for a, b in zip(labels, states, strict=True)
            )
            raise (
                TimeoutError(f"The time of timeout_s is over ({told}).")
                if alive
                else RuntimeError(f"The workers ended without a word ({told}).")
            )
        for status in heard:
            i = statuses.index(status)
            try:
                kind, content = status.recv()
            except (EOFError, OSError):
                kind, content = "gone", _end_of(processes[i], states[i])
            if kind == "failed" or (kind == "gone" and content):
                raise RuntimeError(f"{labels[i]} of 0..{len(labels) - 1} {content}")
            states[i] = content if kind == "done" else kind
        if set(map(str, states)) == {"ready"}:
            for status in statuses:
                with contextlib.suppress(OSError):  # it has just died, and will be heard of
                    status.send("go")
            states = ["running"] * len(labels)
    return states


def _end_of(process: Any, state: str) -> str:
    """How a process died; nothing, if it ended by itself because a neighbour had."""
    process.join(5)
    code = process.exitcode
    if not code:
        return ""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name} while {state} (SIGKILL may mean: out of memory)."
    hint = ' In a script, call this under `if __name__ == "__main__":`.' if state == "starting" else ""
    return f"ended with exit code {code} while {state}.{hint}"


def _ran(answers: Tensor, spans: list[Span], n: int, filled_by: int | None) -> Ran:
    """With what fills the pipeline, the images of the first batch, left out of the rate; None: there is no pipeline."""
    # A stage may look at its clock only after the next has taken what it sent, and even answered.
    last = max(span.stage for span in spans)
    exits = [span.sent_s for span in spans if filled_by is None or span.stage == last]
    seconds = max(exits)
    rate = n / seconds
    if filled_by is not None and len(exits) > 1:
        rate = (n - filled_by) / (exits[-1] - exits[0])
    return Ran(answers.clone(), rate, seconds, spans, _can_pin())

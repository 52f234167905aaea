"""Many runs: a chapter's parameters in all combinations, here or on many machines, each finished once.

    outcomes = sweep("05_networks", {"dataset": ["digits"], "seed": [0, 1, 2]}, workers=2)

What has finished is not run again, so that the same call resumes a sweep that was interrupted, and extends one that was
not. Workers are threads of this process, each watching a run's own processes; ``scheduler="tcp://host:8786"`` sends the
runs to the workers of a Dask scheduler instead.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from axmoe_lite import paths
from axmoe_lite.runs import execute, store
from axmoe_lite.runs.evidence import commit
from axmoe_lite.runs.execute import Work
from axmoe_lite.runs.parameters import check, find, parameters
from axmoe_lite.runs.parameters import grid as every
from axmoe_lite.runs.store import Run
from axmoe_lite.runs.timing import cores

WAIT_SECONDS = 60  # for the scheduler, and for its first worker
INSTALL = "pip install 'axmoe_lite[sweep]'"
STATES = ("failed", "not run", "finished")


def run(chapter: str | Path, given: dict | None = None, **options: Any) -> dict:
    """Execute a chapter once with some of its parameters changed; see :func:`sweep` for the options and the result.

    >>> run("05_networks", {"sede": 1})
    Traceback (most recent call last):
    ...
    ValueError: There is no parameter 'sede'. Did you mean 'seed'? ...
    """
    (outcome,) = sweep(chapter, {name: [value] for name, value in (given or {}).items()}, **options)
    return outcome


def sweep(
    chapter: str | Path,
    given: dict[str, list] | None = None,
    *,
    workers: int = 1,
    scheduler: str = "",
    threads: int = 0,
    retry: bool = False,
    minutes: float = 0.0,
    memory_gb: float = 0.0,
    any_source: bool = False,
    progress: bool = True,
    perform: Callable[[Work], dict] = execute.perform,
) -> list[dict]:
    """Execute a chapter with every combination of the parameters given, but what has finished.

    Args:
        chapter: a chapter's name or number, or the path of any notebook; see :func:`axmoe_lite.runs.find`.
        given: the values of each parameter that is not left at its default.
        workers: runs at a time on this machine.
        scheduler: address of a Dask scheduler, whose workers are used instead.
        threads: of each run. 0: this machine's cores shared among the workers; 1 with a scheduler.
        retry: run again what failed in an earlier sweep; its traceback is kept, numbered.
        minutes, memory_gb: limits for each run, 0 for none. A run beyond them fails.
        any_source: skip what another version of the code has finished, too.
        progress: show a bar.
        perform: what does a run; for measuring a sweep by itself.

    Returns:
        One dict a combination, in the order of the grid: ``run`` (its name), ``parameters``, ``folder``, ``ran`` (in
        this sweep), and its outcome: ``state`` ("finished", "failed", or "not run" if the workers were lost),
        ``reason``, ``seconds``, ``started``, ``ended``, ``host``, ``attempts``, ``peak_mb``.

    Raises:
        ValueError: before anything starts: for a chapter, parameter, value or limit that cannot be.
        ImportError: without Dask, for a scheduler.
        ConnectionError: if no scheduler answers, or it has no workers, or workers have other code.
    """
    _check_numbers(workers=workers, threads=threads, minutes=minutes, memory_gb=memory_gb)
    paths.runs_dir()  # refuses an AXMOE_HOME that can be no folder
    notebook = find(chapter)
    known = parameters(notebook)
    grid = [check(known, chosen) for chosen in every(given or {})]
    threads = threads or (1 if scheduler else max(1, cores() // workers))
    works = plan(notebook, grid, threads=threads, retry=retry, minutes=minutes, memory_gb=memory_gb)
    if any_source:
        finished = {(r.chapter, r.key): r for r in store.all_runs(notebook.stem) if r.state() == "finished"}
        works = [dataclasses.replace(w, run=finished.get((w.run.chapter, w.run.key), w.run)) for w in works]
    return perform_all(works, workers=workers, scheduler=scheduler, progress=progress, perform=perform)


def plan(
    notebook: Path, grid: Iterable[dict], *, environment: dict[str, str] | None = None, **limits: Any
) -> list[Work]:
    """The work of a grid of complete parameters.

    Args:
        limits: ``threads``, ``minutes``, ``memory_gb``, ``retry`` of :class:`~axmoe_lite.runs.execute.Work`.
    """
    source, text = store.source_digest(notebook), notebook.read_text(encoding="utf-8")
    shared = {"package": store.package_digest(), "sweep": uuid.uuid4().hex[:12], "made_by": commit()}
    shared |= {"cwd": os.getcwd(), "environment": environment or {}, **limits}
    return [Work(run=Run(notebook.stem, chosen, source), notebook=text, **shared) for chosen in grid]


def perform_all(
    works: list[Work],
    *,
    workers: int = 1,
    scheduler: str = "",
    progress: bool = True,
    perform: Callable[[Work], dict] = execute.perform,
) -> list[dict]:
    """Do all the work that has not been done; the outcomes as :func:`sweep` returns them."""
    ended = {work.run.id: store.outcome(work.run) for work in works}
    known = {i for i, o in ended.items() if o.get("state") == "finished"}
    known |= {w.run.id for w in works if ended[w.run.id].get("state") == "failed" and not w.retry}
    todo = list({work.run.id: work for work in works if work.run.id not in known}.values())
    failed = sum(ended[i]["state"] == "failed" for i in known)
    bar = tqdm(total=len(ended), initial=len(known), desc="runs", unit="run", disable=not progress, smoothing=0.05)
    with bar, _announced(todo):
        for work, outcome in _outcomes(todo, workers=workers, scheduler=scheduler, perform=perform, bar=bar):
            ended[work.run.id] = {**outcome, "ran": outcome["state"] != "not run"}
            failed += outcome["state"] != "finished"
            bar.set_postfix_str(f"{failed} failed" if failed else "")
            bar.update()
    return [_told(work.run, ended[work.run.id]) for work in works]


def summary(outcomes: list[dict], *, most: int = 20) -> str:
    """A table of outcomes, those that did not finish first, and a line that counts them.

    Args:
        outcomes: as :func:`sweep` returns them.
        most: how many runs to list; the others are only counted.
    """
    varying = _varying([o["parameters"] for o in outcomes])
    ordered = sorted(outcomes, key=lambda o: STATES.index(o["state"]))
    wide = max(len(o["run"]) for o in outcomes)
    lines = [f"{'run':{wide}}  {'state':8} {'seconds':>8} {'MB':>6}  {'' if len(outcomes) == 1 else 'with'}".rstrip()]
    for o in ordered[:most]:
        seconds = f"{o['seconds']:.1f}" if o["seconds"] != "" else ""
        chosen = " ".join(f"{name}={o['parameters'].get(name)}" for name in varying)
        lines.append(f"{o['run']:{wide}}  {o['state']:8} {seconds:>8} {o['peak_mb']:>6}  {chosen}".rstrip())
        if o["reason"]:
            lines.append(f"    {o['reason']}")
    if len(ordered) > most:
        lines.append(f"... and {len(ordered) - most} more")
    done = [o for o in outcomes if o["state"] == "finished"]
    before = sum(not o["ran"] for o in done)
    failed = [o for o in outcomes if o["state"] == "failed"]
    old = sum(not o["ran"] for o in failed)
    lost = len(outcomes) - len(done) - len(failed)
    lines.append(
        f"{len(done)} finished" + (f" ({before} before)" if before else "")
        + f", {len(failed)} failed" + (f" ({old} before: --retry runs them again)" if old else "")
        + (f", {lost} not run: the same command goes on with them" if lost else "")
        + "."
    )  # fmt: skip
    return "\n".join(lines)


def _varying(parameters: list[dict]) -> list[str]:
    names = list(dict.fromkeys(name for chosen in parameters for name in chosen))
    return [name for name in names if len({str(chosen.get(name)) for chosen in parameters}) > 1]


def _told(run: Run, outcome: dict) -> dict:
    kept = {name: outcome.get(name, "") for name in ("reason", "seconds", "started", "ended", "host", "peak_mb")}
    told = {"run": run.id, "parameters": run.parameters, "folder": run.folder, "state": outcome["state"]}
    return {**told, "ran": outcome.get("ran", False), **kept, "attempts": outcome.get("attempts", 0)}


@contextlib.contextmanager
def _announced(works: list[Work]) -> Iterator[None]:
    """A file that lives as long as the sweep: workers who can see it share our folders, and send nothing back."""
    files = {paths.runs_dir() / f".sweep-{work.sweep}" for work in works}
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    try:
        yield
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _outcomes(
    works: list[Work], *, workers: int, scheduler: str, perform: Callable[[Work], dict], bar: tqdm
) -> Iterator[tuple[Work, dict]]:
    if not works:
        return
    if scheduler:
        with _client(scheduler) as client:
            _check_workers(client, works[0].package)
            yield from _through(client, works, perform)
    elif min(workers, len(works)) > 1:
        yield from _side_by_side(works, min(workers, len(works)), perform)
    else:
        if perform is execute.perform:
            perform = functools.partial(perform, on_cell=lambda at, n: bar.set_postfix_str(f"cell {at} of {n}"))
        try:
            for work in works:
                yield work, execute.unpack(work, perform(work))
        finally:
            execute.stop_all()


def _side_by_side(works: list[Work], workers: int, perform: Callable[[Work], dict]) -> Iterator[tuple[Work, dict]]:
    """In threads of this process, which only wait for the runs' own processes."""
    with futures.ThreadPoolExecutor(workers, thread_name_prefix="run") as pool:
        given = {pool.submit(perform, work): work for work in works}
        try:
            for done in futures.as_completed(list(given)):
                work, error = given.pop(done), done.exception()
                yield work, _lost(work, error) if error else execute.unpack(work, done.result())
        finally:  # interrupted: what has not begun never does, and what begins in this moment is stopped in the next
            pool.shutdown(wait=False, cancel_futures=True)
            running = [one for one in given if not one.done()]
            while running:
                execute.stop_all()
                running = futures.wait(running, timeout=execute.POLL_SECONDS).not_done


@contextlib.contextmanager
def _client(scheduler: str) -> Iterator[Any]:
    """A connection to a Dask scheduler that has a worker."""
    try:
        import dask
        import distributed
    except ImportError as missing:
        raise ImportError(f"A scheduler needs dask.distributed: {INSTALL}") from missing
    with dask.config.set({"distributed.comm.timeouts.connect": "10s"}), contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(distributed.Client(scheduler, timeout=WAIT_SECONDS, set_as_default=False))
        except (OSError, ValueError) as reason:
            raise ConnectionError(
                f"No Dask scheduler answers at {scheduler!r} ({reason}). Start one with 'dask scheduler' and name"
                " its address, as in tcp://host:8786; or leave it out and use --workers."
            ) from reason
        try:
            client.wait_for_workers(1, timeout=WAIT_SECONDS)
        except TimeoutError as reason:
            raise ConnectionError(
                f"The scheduler at {scheduler} has no worker after {WAIT_SECONDS} s. Start some on each machine with"
                f" 'dask worker {scheduler} --nthreads 1'."
            ) from reason
        yield client


def _check_workers(client: Any, package: str) -> None:
    found = client.run(store.package_digest)
    other = sorted(address for address, digest in found.items() if digest != package)
    if other:
        raise ConnectionError(
            f"{len(other)} of {len(found)} workers have other code of axmoe_lite than this machine, such as"
            f" {other[0]} ({found[other[0]]} there, {package} here). Install the same version everywhere."
        )


def _through(client: Any, works: list[Work], perform: Callable[[Work], dict]) -> Iterator[tuple[Work, dict]]:
    """Hand out as many runs as there are threads to do them: more would wait behind a long one while others idle."""
    from distributed import as_completed

    waiting, at = iter(works), {}
    done = as_completed([], loop=client.loop, with_results=True, raise_errors=False)
    slots, asked = 0, -math.inf

    def refill() -> None:
        nonlocal slots, asked
        if time.monotonic() - asked > 1:  # workers may have come, or gone
            workers = client.scheduler_info(n_workers=-1).get("workers", {})
            slots, asked = sum(worker["nthreads"] for worker in workers.values()), time.monotonic()
        for work in itertools.islice(waiting, max(0, max(1, slots) - len(at))):
            future = client.submit(perform, work, key=f"{work.run.id}-{work.sweep}", pure=False)
            at[future.key] = work
            done.add(future)

    refill()
    for future, result in done:
        work = at.pop(future.key)
        yield work, execute.unpack(work, result) if future.status == "finished" else _lost(work, result)
        future.release()
        if client.status != "running":
            break
        refill()
    for work in [*at.values(), *waiting]:  # none, unless the scheduler is lost
        yield work, _lost(work, ConnectionError("the scheduler was lost"))


def _lost(work: Work, reason: object) -> dict:
    """What to say of a run whose worker died (KilledWorker), whose scheduler did, or that raised an error of ours."""
    error = reason[1] if isinstance(reason, tuple) else reason  # Dask hands errors over as sys.exc_info() does
    told = (str(error).strip().splitlines() or [""])[0]
    return store.outcome(work.run) or {"state": "not run", "reason": f"{type(error).__name__}: {told}"}


def _check_numbers(*, workers: int, threads: int, minutes: float, memory_gb: float) -> None:
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 is needed.")
    for name, value in (("threads", threads), ("minutes", minutes), ("memory_gb", memory_gb)):
        if not 0 <= value < math.inf:  # no number is none of them
            raise ValueError(f"{name} is {value}; it is positive, or 0 for no limit of ours.")

"""Does anything grow? A thousand runs through one sweep, a thousand rounds in one process, a million rows collected.

    python tests/soak.py --rounds 1000               minutes: each round a new table, a network under it, one step
    python tests/soak.py --runs 1000 --record        an hour: a real notebook each, swept by one process
    python tests/soak.py --collect 1000000           under a minute: the rows of a thousand runs, in one table
    python tests/soak.py --minutes 20 --runs 1000    as many as fit

Measured ten times on the way, after the garbage was collected: the process's memory, its open files, its threads, its
children, and what it left in the folder for temporary files. ``--record`` writes the measurements to
data/results/soak.csv. The exit status is 1 if memory grew by more than :data:`MOST_MB`, or the rest at all, from the
middle to the end: what is kept on purpose is full by then.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from axmoe_lite import approximate, datasets, factorise, freeze, models, multiplier, paths, restore, runs
from axmoe_lite.runs import Run, rehearsal, store

STUDY, KEY = "soak", ("what", "at")
ABOUT = "what one process holds on to over many runs, rounds or rows: memory, open files, threads, children, files left"
MOST_MB = 40.0  # what an allocator needs more or less; 500 rounds that lost a table each would be 130
COLLECT_MB, COLLECT_SECONDS = 1000, 60  # for a million rows
RUN = """
from axmoe_lite import approximate, datasets, models, runs
from axmoe_lite.train import evaluate
images = datasets.digits().subset(n_train=100, n_test=100)
network = models.resnet8(classes=10, width=0.25, seed=n)
approximate(network, "mul8s_1L2J", calibration=images.normalised(images.x_train))
top1 = evaluate(network, images, progress=False)
row = {"top1": top1, "seconds": 0.1, **runs.evidence(images, scale="quick", seed=n, epochs=0)}
runs.record("soaked", [row], key=("seed",))
"""


@dataclass(frozen=True)
class Held:
    """What a process holds at one moment.

    Attributes:
        what, at: after how many "runs", "rounds" or "rows".
        memory_mb, tensors_mb: resident and shared with nobody; of it, in tensors that Python knows.
        handles, threads, children: open files and sockets, threads, processes started.
        left: files and folders in the folder for temporary files.
        seconds: since the measurement before.
    """

    what: str
    at: int
    memory_mb: float
    tensors_mb: float
    handles: int
    threads: int
    children: int
    left: int
    seconds: float


def held(what: str, at: int, since: float) -> Held:
    """Measure this process, after its garbage has been collected and what is free given back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory for later, in pieces
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    me = psutil.Process()
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if _is_tensor(t)}
    counts = {"handles": me.num_fds(), "threads": me.num_threads(), "children": len(me.children(recursive=True))}
    memory = me.memory_info()  # without the code of libraries, which the system drops and reads again as it likes
    own = memory.rss - getattr(memory, "shared", 0)
    left = len(list(Path(tempfile.gettempdir()).iterdir()))
    sizes = {"memory_mb": round(own / 1e6, 1), "tensors_mb": round(sum(tensors.values()) / 1e6, 3)}
    return Held(what=what, at=at, **sizes, **counts, left=left, seconds=round(time.perf_counter() - since, 2))


def _is_tensor(thing: object) -> bool:
    # The stand-ins with which torch.compile traces, which its caches hold on to, have no memory.
    return type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided


@contextlib.contextmanager
def own_folders() -> Iterator[Path]:
    """A home and a folder for temporary files of this process alone, so that all that lies there is its own."""
    before = {name: os.environ.get(name) for name in ("AXMOE_HOME", "TMPDIR")}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for name in before:
            (Path(folder) / name[:3]).mkdir()
            os.environ[name] = str(Path(folder) / name[:3])
        tempfile.tempdir = None  # read the variable anew
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            tempfile.tempdir = None


# ---------------------------------------------------------------------------------- the three loads


def swept(n: int, *, every: int, workers: int = 2, cell: str = RUN) -> Iterator[Held]:
    """Runs of a small real notebook; ``every`` so many a sweep, all by this process."""
    with own_folders() as folder:
        path = rehearsal.notebook(folder / "soak.ipynb", "n = 0  # {0..} makes each run a new one", cell)
        for start in range(0, n, every):
            since = time.perf_counter()
            outcomes = runs.sweep(path, {"n": list(range(start, start + every))}, workers=workers, progress=False)
            wrong = [outcome for outcome in outcomes if outcome["state"] != "finished"]
            assert not wrong, wrong[0]["reason"]
            yield held("runs", start + every, since)


def rounds(n: int, *, every: int) -> Iterator[Held]:
    """A new table from a file, factorised; a network under it, frozen, trained for a step, restored."""
    images = datasets.synthetic(classes=4, size=16, n_train=32, n_test=8)
    x, y = images.normalised(images.x_train), images.y_train
    network, draw = models.resnet8(classes=4, width=0.25), np.random.default_rng(0)
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3)
    with own_folders() as folder:
        since = time.perf_counter()
        for at in range(1, n + 1):
            file = folder / f"table{at}.npy"
            np.save(file, table(draw, noisy=bool(at % 2)))
            one_round(file, network, optimiser, x, y)
            file.unlink()
            if at % every == 0:
                yield held("rounds", at, since)
                since = time.perf_counter()


def table(draw: np.random.Generator, *, noisy: bool) -> np.ndarray:
    """Products with errors: without any structure, or of four terms, whose rank is at most five."""
    exact = np.outer(np.arange(-128, 128), np.arange(-128, 128))
    u, v = draw.integers(-3, 4, (256, 4)), draw.integers(-3, 4, (4, 256))
    return (exact + (draw.integers(-64, 65, (256, 256)) if noisy else u @ v)).astype(np.int32)


def one_round(
    file: Path, network: torch.nn.Module, optimiser: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> None:
    """All that a search or an explorer does with one multiplier."""
    name = f"file:{file}"
    factorise(multiplier(name))
    approximate(network.eval(), name, calibration=x[:8])
    with torch.no_grad():
        frozen = freeze(network)
        assert torch.equal(frozen(x[:2]), frozen.law(x[:2])), f"{name}: the pipeline differs from its law"
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(network.train()(x), y).backward()
    optimiser.step()
    restore(network)


COLLECT = """
import json, re, resource, time
from pathlib import Path
from axmoe_lite.runs import collect
start, status = time.perf_counter(), Path("/proc/self/status")
found = collect()
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux that of its parent, if this was more
peak = 1.024e-3 * (int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) if status.exists() else kilobytes)
print(json.dumps([found.runs, found.table.num_rows, round(peak, 1), round(time.perf_counter() - start, 2)]))
"""


def collected(n: int, *, n_runs: int = 1000) -> Held:
    """The rows of a thousand runs, put into one table by a process of its own: its peak, and its seconds."""
    with own_folders():
        for run in range(n_runs):
            recorded(run, range(run * n // n_runs, (run + 1) * n // n_runs))
        done = subprocess.run([sys.executable, "-c", COLLECT], capture_output=True, text=True, check=True)
    found_runs, found_rows, peak_mb, seconds = json.loads(done.stdout)
    assert (found_runs, found_rows) == (n_runs, n), done.stdout
    return Held("rows", n, peak_mb, 0.0, 0, 0, 0, 0, seconds)


def recorded(seed: int, steps: range) -> None:
    """A run's folder as it lies there with its rows; written at once, since recording one by one would take hours."""
    run, row = Run("soak", {"seed": seed}, "aaaaaaaa"), {"top1": 0.5, "seconds": 1.5, **_origin(), "seed": seed}
    store.begin(run, notebook="")
    folder = run.folder / "rows" / "quick"
    folder.mkdir(parents=True)
    tail = "," + ",".join(map(str, row.values())) + "\n"
    lines = ",".join(["step", *row]) + "\n" + "".join(f"{step}{tail}" for step in steps)
    (folder / "soaked.csv").write_text(lines)
    store.write_json(folder / "studies.json", {"soaked": {"key": ["seed", "step"]}})
    store.write_json(run.folder / "outcome.json", {"state": "finished", "ended": "2026-01-01T10:00:00+01:00"})


def _origin() -> dict:
    origin = {"dataset": "digits", "n_train": 1437, "n_test": 360, "scale": "quick", "seed": 0, "epochs": 0}
    return origin | {"device": "soak", "commit": "1234567890", "date": "2026-01-01", "version": "0"}


# ---------------------------------------------------------------------------------- the verdict


def grown(seen: list[Held], *, most_mb: float = MOST_MB) -> list[str]:
    """What was more at the end than in the middle, in words; nothing if all is flat.

    Memory by a line through the second half, since an allocator gives and takes; the rest by counting.
    """
    half = seen[len(seen) // 2 - 1 :] if len(seen) > 3 else seen
    first, last = half[0], half[-1]
    at = [float(one.at) for one in half]
    slope = float(np.polyfit(at, [one.memory_mb for one in half], 1)[0]) if len(half) > 1 else 0.0
    found = []
    if (more := slope * (last.at - first.at)) > most_mb:
        found.append(f"{more:.0f} MB of memory more from {first.at:,} to {last.at:,} {last.what}")
    for name in ("handles", "threads", "children", "left"):
        before, after = getattr(first, name), getattr(last, name)
        if after > before:
            found.append(f"{name}: {before} after {first.at:,} {first.what}, {after} after {last.at:,}")
    return found


def record(one: Held) -> None:
    """One row of ``data/results/soak.csv``, with its evidence; no accuracy was looked at."""
    told = {**asdict(one), **runs.evidence(0, scale="paper", seed=0, epochs=0), "seconds": one.seconds}
    runs.record(STUDY, [told], key=KEY, about=ABOUT, made_by="python tests/soak.py --record")


def main(arguments: list[str] | None = None) -> int:
    """Put on the load that was asked for, and say what grew; 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=0, metavar="N", help="of a small notebook, through one sweep")
    parser.add_argument("--rounds", type=int, default=0, metavar="N", help="of a new table each, in one process")
    parser.add_argument("--collect", type=int, default=0, metavar="N", help="rows of a thousand runs, in one table")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--minutes", type=float, default=60.0, help="then stop with what there is (default: 60)")
    parser.add_argument("--record", action="store_true", help="write a row for each measurement to data/results")
    asked = parser.parse_args(arguments)
    if asked.runs <= 0 and asked.rounds <= 0 and asked.collect <= 0:
        parser.error("nothing was asked for; name --runs, --rounds or --collect, as in --rounds 1000.")
    end, wrong = time.monotonic() + 60 * asked.minutes, []
    loads = []
    if asked.rounds > 0:
        loads.append(rounds(asked.rounds, every=max(1, asked.rounds // 10)))
    if asked.runs > 0:
        loads.append(swept(asked.runs, every=max(1, asked.runs // 10), workers=asked.workers))
    for load in loads:
        seen = []
        with contextlib.closing(load):
            for one in load:
                seen.append(one)
                print(one, flush=True)
                if time.monotonic() > end:
                    break
        wrong += grown(seen)
        keep(seen, asked.record)
    if asked.collect > 0:
        one = collected(asked.collect)
        print(one, flush=True)
        share = asked.collect / 1_000_000
        if one.memory_mb > COLLECT_MB * max(share, 0.5) or one.seconds > COLLECT_SECONDS * max(share, 0.5):
            wrong.append(f"{asked.collect:,} rows took {one.memory_mb:.0f} MB and {one.seconds:.0f} s")
        keep([one], asked.record)
    print("\n".join(wrong) or "Nothing grew.")
    return 1 if wrong else 0


def keep(seen: list[Held], wanted: bool) -> None:
    """Record what was measured, once the process has its own home back."""
    if wanted:
        if Path(__file__).resolve().parent.parent != paths.CHECKOUT:
            raise RuntimeError(f"axmoe_lite is imported from {paths.CHECKOUT}; its commit is not that of this script.")
        for one in seen:
            record(one)


if __name__ == "__main__":
    sys.exit(main())

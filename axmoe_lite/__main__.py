"""The command line: ``axmoe book`` executes every chapter and builds the book, ``axmoe bench`` measures speed."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from axmoe_lite import paths

WIDGET = "application/vnd.jupyter.widget-view+json"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status (0: done, 1: it failed, 2: it was asked for what does not exist)."""
    parser = argparse.ArgumentParser(prog="axmoe", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    book = commands.add_parser(
        "book", help="execute every chapter with papermill, then build the HTML book", allow_abbrev=False
    )
    book.add_argument("--scale", choices=("quick", "paper"), default="quick", help="quick: minutes, offline (default)")
    bench = commands.add_parser(
        "bench", help="measure speed against float32 on this machine, in turns", allow_abbrev=False
    )
    bench.add_argument("--cases", default="", help="groups of cases, as in gemm,resnet20 (default: all)")
    bench.add_argument("--threads", default="", help="numbers of threads, as in 1,2 (default: 1, and 2 if there are)")
    bench.add_argument("--repeats", type=int, help="turns of each case (default: 9, or 3 with --quick)")
    bench.add_argument("--quick", action="store_true", help="fewer and smaller: about a minute")
    bench.add_argument("--record", action="store_true", help="write data/results/speed_*.csv (the cache, if quick)")
    chosen = parser.parse_args(arguments)
    if chosen.command == "book":
        return build_book(scale=chosen.scale)
    try:
        work = speed_work(chosen)
    except ValueError as wrong:  # a typo: nothing has been measured yet
        bench.error(str(wrong))
    return measure_speed(work, record=chosen.record)


def speed_work(chosen: argparse.Namespace) -> dict:
    """What ``axmoe bench`` was asked to do, as arguments of :func:`axmoe_lite.bench.run`.

    Raises:
        ValueError: for cases, threads or repeats that cannot be.
    """
    from axmoe_lite import bench

    repeats = (3 if chosen.quick else 9) if chosen.repeats is None else chosen.repeats
    if repeats < 1:
        raise ValueError(f"--repeats is {repeats}; at least 1 turn is needed.")
    cores = bench.cores()
    counts = (chosen.threads or ("1,2" if cores > 1 else "1")).split(",")
    if not all(count.strip().isdigit() and 1 <= int(count) <= cores for count in counts):
        raise ValueError(
            f"--threads is {chosen.threads!r}; this machine has {cores} cores: give 1 to {cores}, as in 1,2."
        )
    names = [name.strip() for name in chosen.cases.split(",")] if chosen.cases else list(bench.CASES)
    return {
        "builders": bench.builders(names, quick=chosen.quick),
        "thread_counts": [int(count) for count in counts],
        "repeats": repeats,
        "scale": "quick" if chosen.quick else "paper",
    }


def measure_speed(work: dict, *, record: bool) -> int:
    """``axmoe bench``: one table a case as soon as it is measured, and rows of evidence if wanted."""
    from tqdm.auto import tqdm

    from axmoe_lite import bench, runs

    def done(rows: list[dict]) -> None:
        tqdm.write(bench.table(rows) + "\n")
        if record:  # at once: what is measured stays if a later case fails
            bench.record(rows)

    known = ", ".join(f"{name} {value}" for name, value in bench.machine().items())
    print(f"on {runs.device_name('cpu').rsplit(',', 1)[0]} ({known})")
    bench.run(**work, done=done)
    return 0


def chapters() -> list[Path]:
    """The chapters in reading order."""
    return sorted((paths.CHECKOUT / "book").glob("[0-9][0-9]_*.ipynb"))


def build_book(*, scale: str) -> int:
    """Execute the chapters into ``book/_build/stage`` and build ``book/_build/html`` from there."""
    book = paths.CHECKOUT / "book"
    if not book.is_dir():
        print(f"There is no book at {book}: 'axmoe book' works in a checkout of the repository.", file=sys.stderr)
        return 1
    stage = book / "_build" / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(book, stage, ignore=shutil.ignore_patterns("_build", ".ipynb_checkpoints"))
    for chapter in chapters():
        if status := _execute(chapter, stage / chapter.name, scale=scale):
            return status
    return _build_pages(stage, book / "_build")


def _execute(chapter: Path, output: Path, *, scale: str) -> int:
    command = [sys.executable, "-m", "papermill", str(chapter), str(output), "-p", "scale", scale]
    # A cell that hangs should not hang the build; at paper scale one cell trains for hours.
    command += ["--execution-timeout", "1800"] if scale == "quick" else []
    print(f"== {chapter.name} ({scale})", flush=True)
    status = subprocess.run(command, env={**os.environ, "AXMOE_BOOK": "1"}, check=False).returncode
    if status:
        print(f"{chapter.name} failed; the executed part is in {output}", file=sys.stderr)
        return 1
    _drop_widgets(output)
    return 0


def _drop_widgets(notebook: Path) -> None:
    """Progress bars are live widgets; a page that held one would ask the network for the code to draw it."""
    content = json.loads(notebook.read_text())
    content["metadata"].pop("widgets", None)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            is_widget = [WIDGET in output.get("data", {}) for output in cell["outputs"]]
            cell["outputs"] = [o for o, widget in zip(cell["outputs"], is_widget, strict=True) if not widget]
    notebook.write_text(json.dumps(content, indent=1))


def _build_pages(stage: Path, build: Path) -> int:
    from axmoe_lite import plots

    (stage / "assets").mkdir(exist_ok=True)
    (stage / "assets" / "vega.js").write_text(plots.javascript_bundle())
    command = [
        str(Path(sys.executable).with_name("jupyter-book")),
        "build",
        str(stage),
        "--path-output",
        str(build.parent),
    ]
    status = subprocess.run([*command, "--all", "-W", "--keep-going"], check=False).returncode
    if status:
        return 1
    print(f"The book is at {build / 'html' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

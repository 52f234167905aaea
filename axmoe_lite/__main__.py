"""The command line.

    axmoe list                                          chapters and their parameters
    axmoe run 05_networks seed=1                        execute one, once
    axmoe sweep 05_networks seed=0,1,2 --workers 2      every combination, each once
    axmoe collect                                       one table of what the runs recorded
    axmoe compare A B                                   two sets of results, paired
    axmoe verify                                        fast paths against the law, some committed rows measured again
    axmoe book                                          execute what changed, build the pages
    axmoe bench                                         speed against float32, on this machine
    axmoe doctor                                        what this machine has, what is missing, what to do

Exit status: 0 done, 1 something failed or was not run, 2 asked for what does not exist, 130 interrupted.
"""

import argparse
import re
import signal
import sys
from pathlib import Path

from axmoe_lite import __version__, paths


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: stop the runs, say what is done
    try:
        if told := paths.unpack_book(__version__):
            print(told, file=sys.stderr)
        return COMMANDS[chosen.command](chosen)
    except (ValueError, ImportError, OSError, RuntimeError) as wrong:
        print(f"axmoe {chosen.command}: {wrong}", file=sys.stderr)
        return 2 if isinstance(wrong, ValueError) else 1
    except KeyboardInterrupt:
        print(
            f"\naxmoe {chosen.command}: interrupted; what has finished is kept, the same command goes on.",
            file=sys.stderr,
        )
        return 130


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="axmoe", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"axmoe_lite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=does, description=does, allow_abbrev=False)

    command("list", "chapters, their parameters and what these can be")
    for name, does in (("run", "execute a chapter once"), ("sweep", "execute a chapter with every combination")):
        one = command(name, does)
        one.add_argument("chapter", help="its name or number, as in 'axmoe list'; or the path of any notebook")
        one.add_argument("parameters", nargs="*", metavar="key=value", help="or key=a,b,c in a sweep; key=0..9 too")
        one.add_argument("--threads", type=int, default=0, help="of each run (default: the cores, shared)")
        one.add_argument("--minutes", type=float, default=0.0, help="stop a run that takes longer")
        one.add_argument("--memory-gb", type=float, default=0.0, help="stop a run whose processes need more")
        one.add_argument("--retry", action="store_true", help="run again what failed before")
        one.add_argument("--any-source", action="store_true", help="skip what other versions of the code finished, too")
        if name == "sweep":
            where = one.add_mutually_exclusive_group()
            where.add_argument("--workers", type=int, default=1, help="runs at a time on this machine (default: 1)")
            where.add_argument("--scheduler", default="", help="send them to this Dask scheduler: tcp://host:8786")
    collect = command("collect", "one table, Parquet and CSV, of the rows of all finished runs")
    collect.add_argument("chapters", nargs="*", help="only of these")
    collect.add_argument("--current", action="store_true", help="only of runs by the code as it is now")
    collect.add_argument("--keep-newest", action="store_true", help="of rows measured twice with one result, the later")
    collect.add_argument(
        "--publish", action="store_true", help="rows of scale 'paper' into data/results, and the ledger"
    )
    collect.add_argument("--to", type=Path, help="the table's file, without its ending (default: data/runs/collected)")
    compare = command("compare", "two sets of results side by side, paired by what they were measured on")
    compare.add_argument(
        "a", metavar="A", help="a study, or a CSV or Parquet file; NAME:column=value,... for some rows"
    )
    compare.add_argument("b", metavar="B", help="the same")
    compare.add_argument("--by", default="", help="columns that pair the rows (default: the study's key)")
    compare.add_argument("--values", default="", help="columns to compare (default: top1, or all that were measured)")
    verify = command("verify", "compare fast paths with the law, and measure some committed rows again")
    verify.add_argument("studies", nargs="*", help="only of these (default: all that fit this machine)")
    verify.add_argument("--n", type=int, default=5, help="how many rows (default: 5)")
    verify.add_argument("--cases", type=int, default=210, help="compared with the law before that (default: 210)")
    verify.add_argument("--seed", type=int, default=0, help="of both draws")
    book = command("book", "execute every chapter that changed, then build the HTML pages")
    book.add_argument("--scale", choices=("quick", "paper"), default="quick", help="quick: minutes, offline (default)")
    book.add_argument("--workers", type=int, help="chapters at a time (default: one a core)")
    book.add_argument("--force", action="store_true", help="execute and build everything")
    book.add_argument("--single", action="store_true", help="the whole book as one page too, for printing")
    bench = command("bench", "measure speed against float32 on this machine, in turns")
    bench.add_argument("--cases", default="", help="groups of cases, as in gemm,resnet20 (default: all)")
    bench.add_argument("--threads", default="", help="numbers of threads, as in 1,2 (default: 1, and 2 if there are)")
    bench.add_argument("--repeats", type=int, help="turns of each case (default: 9, or 3 with --quick)")
    bench.add_argument("--quick", action="store_true", help="fewer and smaller: about a minute")
    bench.add_argument("--record", action="store_true", help="write data/results/speed_*.csv (the cache, if quick)")
    command("doctor", "what this machine has, what is missing, and what to do about it")
    return parser


def _list(chosen: argparse.Namespace) -> int:
    from axmoe_lite import runs

    print(runs.listing())
    return 0


def _run(chosen: argparse.Namespace) -> int:
    """``axmoe run`` and ``axmoe sweep``."""
    from axmoe_lite import runs

    known = runs.parameters(runs.find(chosen.chapter))
    given = runs.parse(known, chosen.parameters)
    several = [name for name, values in given.items() if len(values) > 1]
    if several and chosen.command == "run":
        raise ValueError(
            f"{several[0]} has {len(given[several[0]])} values; 'axmoe sweep' takes several, 'axmoe run' one."
        )
    outcomes = runs.sweep(
        chosen.chapter,
        given,
        workers=getattr(chosen, "workers", 1),
        scheduler=getattr(chosen, "scheduler", ""),
        threads=chosen.threads,
        retry=chosen.retry,
        minutes=chosen.minutes,
        memory_gb=chosen.memory_gb,
        any_source=chosen.any_source,
    )
    print(runs.summary(outcomes))
    if len(outcomes) == 1:
        (only,) = outcomes
        print(only["folder"] / ("notebook.ipynb" if only["state"] == "finished" else "error.txt"))
    else:
        print(f"Each has its folder in {outcomes[0]['folder'].parent}; 'axmoe collect' makes one table of their rows.")
    return 0 if all(outcome["state"] == "finished" for outcome in outcomes) else 1


def _collect(chosen: argparse.Namespace) -> int:
    from axmoe_lite import runs

    options = {"current": chosen.current, "keep_newest": chosen.keep_newest, "publish": chosen.publish, "to": chosen.to}
    print(runs.collect(chapters=chosen.chapters, **options))
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from axmoe_lite import runs

    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    print(runs.table(runs.compare(chosen.a, chosen.b, by=names(chosen.by), values=names(chosen.values))))
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    """The paths; each row as soon as it is measured; what cannot be measured here, and why, at the end."""
    from tqdm.auto import tqdm

    from axmoe_lite import verify

    rows = verify.verify(chosen.studies, n=chosen.n, seed=chosen.seed)  # refuses before anything is computed
    paths = verify.against_the_law(chosen.cases, seed=chosen.seed, progress=True)
    print(verify.report_paths(paths))
    agree = not any(path["differing"] for path in paths)
    for checked in rows:
        tqdm.write(verify.report(checked))
        agree &= all(one.agrees for one in checked)
    for name, reason in verify.possible(chosen.studies)[1].items():
        print(f"{'not here':13} {name}: {reason}")
    return 0 if agree else 1


def _book(chosen: argparse.Namespace) -> int:
    from axmoe_lite import book

    return book.build(scale=chosen.scale, workers=chosen.workers, force=chosen.force, single=chosen.single)


def _bench(chosen: argparse.Namespace) -> int:
    """One table a case as soon as it is measured, and rows of evidence if wanted."""
    from tqdm.auto import tqdm

    from axmoe_lite import bench, runs

    work = speed_work(chosen)

    def done(rows: list[dict]) -> None:
        tqdm.write(bench.table(rows) + "\n")
        if chosen.record:  # at once: what is measured stays if a later case fails
            bench.record(rows)

    known = ", ".join(f"{name} {value}" for name, value in bench.machine().items())
    print(f"on {runs.device_name('cpu').rsplit(',', 1)[0]} ({known})")
    bench.run(**work, done=done)
    return 0


def speed_work(chosen: argparse.Namespace) -> dict:
    """What ``axmoe bench`` was asked to do, as arguments of :func:`axmoe_lite.bench.run`.

    Raises:
        ValueError: for cases, threads or repeats that cannot be.
    """
    from axmoe_lite import bench, runs

    repeats = (3 if chosen.quick else 9) if chosen.repeats is None else chosen.repeats
    if repeats < 1:
        raise ValueError(f"--repeats is {repeats}; at least 1 turn is needed.")
    cores = runs.cores()
    counts = (chosen.threads or ("1,2" if cores > 1 else "1")).split(",")
    if not all(re.fullmatch("[0-9]{1,9}", count.strip()) and 1 <= int(count) <= cores for count in counts):
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


def _doctor(chosen: argparse.Namespace) -> int:
    from axmoe_lite import doctor

    findings = doctor.examine()
    print(doctor.report(findings))
    return 0 if doctor.healthy(findings) else 1


COMMANDS = {
    "list": _list,
    "run": _run,
    "sweep": _run,
    "collect": _collect,
    "compare": _compare,
    "verify": _verify,
    "book": _book,
    "bench": _bench,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())

"""The speed benchmark, and how to run it so that its numbers mean something.

    .venv/bin/axmoe bench --quick                        about a minute: does anything stand out?
    .venv/bin/axmoe bench --record                       everything, one and two threads: data/results/speed_*.csv
    .venv/bin/python tests/benchmarks/run.py             as --record, once the machine is quiet

What is measured is in ``axmoe_lite/bench/cases.py``; how, in ``runs.turns``: all columns of a case take turns
in one process, and only their ratios within a turn are compared. What it cannot do is make a busy machine
quiet: with another job on the same cores two-thread figures stall, and no median mends that. So this file
waits until the load is low, runs, and says afterwards whether it stayed low.

This is not collected by pytest, and no test anywhere asserts a time: what a test may assert is that the columns
are computed, complete and equal in every bit (``tests/test_bench.py``).
"""

import os
import sys
import time

from axmoe_lite.__main__ import main

QUIET = 0.3  # processes that want a core, on average over a minute


def wait(*, minutes: int = 30) -> bool:
    """Until the machine is quiet, or the minutes are over; returns whether it is."""
    for _ in range(minutes * 6):
        if os.getloadavg()[0] < QUIET:
            return True
        print(f"load {os.getloadavg()[0]:.2f}: waiting for less than {QUIET}", file=sys.stderr)
        time.sleep(10)
    return False


if __name__ == "__main__":
    if not wait():
        sys.exit("The machine did not become quiet; measure elsewhere, or later.")
    status = main(["bench", "--record", *sys.argv[1:]])
    print(f"load afterwards, with the benchmark's own threads in it: {os.getloadavg()[0]:.2f}")
    sys.exit(status)

"""How fast is it? Cases, columns of each case, and ratios to float32 measured in turns.

    cases      what is measured: matrix products, convolutions, networks, a training step, and how cost grows
    gather     the naive simulator, as a first version is usually written, to compare with
    measure    times all columns of a case in turns, makes rows of evidence, prints them as a table

A **column** is one way to compute a case: ``"float32"``, a multiplier's name (its layers one by one, as
``approximate()`` leaves them), the name and ``" frozen"`` (the integer pipeline), ``"naive gather"``.

Weights and images are random, from a seed; BatchNorm's statistics are set by one pass in training mode. Speed
does not depend on them, so nothing needs to be learned first. From a shell: ``axmoe bench --quick``.

Chapter: 06, "Faster than float32?"
"""

from axmoe_lite.bench.cases import CASES, Case, builders
from axmoe_lite.bench.columns import HIGH_RANK, planted_table, random_table
from axmoe_lite.bench.gather import GatherLayer, gather_matmul
from axmoe_lite.bench.measure import KEY, machine, measure, record, run, table, threads

__all__ = [
    "CASES",
    "HIGH_RANK",
    "KEY",
    "Case",
    "GatherLayer",
    "builders",
    "gather_matmul",
    "machine",
    "measure",
    "planted_table",
    "random_table",
    "record",
    "run",
    "table",
    "threads",
]

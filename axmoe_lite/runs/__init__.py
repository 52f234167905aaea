"""A hundred runs, kept honest: executed once, resumed when interrupted, collected with their evidence.

    notebooks    the chapters, and any other notebook
    parameters   what a chapter can be given, and what it refuses
    words        the same on a command line
    files        those that a chapter is given
    store        a run's folder, its name and its state
    execute      one run: a process of its own, watched (child.py is what runs there)
    sweep        many runs, here or on many machines
    evidence     where a number comes from; the only writer of results
    notes        what names the rows of a study, and what it is about
    collect      one table of all runs (tables: the columns' side of it)
    compare      two sets of results, paired
    ledger       data/README.md, from the files themselves
    rehearsal    small notebooks to try all this on, and what it costs
    timing       seconds that can be compared

Chapter: 10, "Can a hundred runs be trusted?"
"""

from axmoe_lite.runs.collect import Collected, collect
from axmoe_lite.runs.compare import Comparison, compare, table
from axmoe_lite.runs.evidence import EVIDENCE, SCALES, commit, device_name, evidence, read, record, recorded
from axmoe_lite.runs.execute import Work, perform
from axmoe_lite.runs.files import given_file
from axmoe_lite.runs.ledger import ledger, write_ledger
from axmoe_lite.runs.notebooks import chapters, find
from axmoe_lite.runs.parameters import Parameter, check, check_parameters, grid, listing, parameters, parse
from axmoe_lite.runs.rehearsal import pretend
from axmoe_lite.runs.store import STATES, Run, all_runs, outcome, scratch
from axmoe_lite.runs.sweep import perform_all, plan, run, summary, sweep
from axmoe_lite.runs.timing import cores, interleaved, turns

__all__ = [
    "EVIDENCE",
    "SCALES",
    "STATES",
    "Collected",
    "Comparison",
    "Parameter",
    "Run",
    "Work",
    "all_runs",
    "chapters",
    "check",
    "check_parameters",
    "collect",
    "commit",
    "compare",
    "cores",
    "device_name",
    "evidence",
    "find",
    "given_file",
    "grid",
    "interleaved",
    "ledger",
    "listing",
    "outcome",
    "parameters",
    "parse",
    "perform",
    "perform_all",
    "plan",
    "pretend",
    "read",
    "record",
    "recorded",
    "run",
    "scratch",
    "summary",
    "sweep",
    "table",
    "turns",
    "write_ledger",
]

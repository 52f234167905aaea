"""What the tests are evidence of, counted: `pytest -m trust --record-trust` writes data/results/trust.csv.

    @pytest.mark.trust("fault", "the disk is full while a row is written")     a test, or pytestmark of a file
    record_property("cases", 4096)                                             tried in this test; else 1

Kinds: ``law`` (a fast path equals the slow one), ``rule`` (a known change of the input changes the output in a known
way), ``input`` (something broken from outside), ``fault`` (something breaks under way), ``load`` (much of it).
Each example that hypothesis draws is a case by itself. A row counts all tests with the same kind and words.
"""

import functools

import pytest

KINDS = ("law", "rule", "input", "fault", "load")
STUDY, KEY = "trust", ("kind", "what")
ABOUT = "what the tests marked as evidence tried, and how it ended: cases, tests, failures, tests skipped here"


def pytest_addoption(parser):
    parser.addoption("--record-trust", action="store_true", help="count the marked tests into data/results/trust.csv")


def pytest_report_header(config):
    return f"hypothesis: --hypothesis-seed={config.getoption('hypothesis_seed')} draws these cases, another seed others"


def pytest_configure(config):
    if config.getoption("record_trust") and not str(config.getoption("hypothesis_seed")).isdecimal():
        raise pytest.UsageError("--record-trust writes the seed down: name one, as in --hypothesis-seed=0")
    config.pluginmanager.register(Tally(), "tally")


def pytest_collection_modifyitems(items):
    for item in items:
        if marker := item.get_closest_marker("trust"):
            kind, what = marker.args
            assert kind in KINDS and what, f"{item.nodeid} is evidence of {kind!r}; there are {', '.join(KINDS)}."
            item.user_properties.append(("trust", [kind, what]))
            if drawn := _drawn(item):
                drawn.inner_test = _counting(drawn.inner_test)


def _drawn(item):
    """Where hypothesis keeps the function that it calls with each example; None for other tests."""
    return getattr(getattr(item, "obj", None), "hypothesis", None)


def _counting(inner):
    if hasattr(inner, "cases"):  # parameters of one function share it
        return inner

    @functools.wraps(inner)
    def counted(*args, **kwargs):
        counted.cases += 1
        return inner(*args, **kwargs)

    counted.cases = 0
    return counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call" and item.get_closest_marker("trust") and (drawn := _drawn(item)):
        item.user_properties.append(("cases", drawn.inner_test.cases))
        drawn.inner_test.cases = 0
    return (yield)


class Tally:
    """Counts what the tests report, in the process that started the others."""

    def __init__(self):
        self.rows = {}

    def pytest_runtest_logreport(self, report):
        told = dict(report.user_properties)
        ended = report.when == "call" or (report.when == "setup" and not report.passed)
        if ended and "trust" in told:
            kind, what = told["trust"]
            new = {"kind": kind, "what": what, "cases": 0, "tests": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
            row = self.rows.setdefault((kind, what), new)
            row["tests"] += 1
            row["cases"] += 0 if report.skipped else told.get("cases", 1)
            row["failed"] += report.failed
            row["skipped"] += report.skipped
            row["seconds"] += report.duration

    def pytest_sessionfinish(self, session):
        if session.config.getoption("record_trust") and self.rows and not hasattr(session.config, "workerinput"):
            from axmoe_lite import runs

            seed = session.config.getoption("hypothesis_seed")
            told = runs.evidence(0, scale="paper", seed=int(seed), epochs=0)
            rows = [row | told | {"seconds": round(row["seconds"], 2)} for row in self.rows.values()]
            command = "python -m pytest -m trust --numprocesses 2 --dist loadfile --record-trust"
            runs.record(STUDY, rows, key=KEY, about=ABOUT, made_by=command)

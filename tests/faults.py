"""What the tests of faults share: a notebook that records rows, a command line to break, what is left afterwards."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from axmoe_lite import runs

KEY = ("seed", "step")
TRACE = """
import os, pathlib, time
home = pathlib.Path(os.environ["AXMOE_HOME"])
with (home / "trace").open("a") as f: print(n, os.getpid(), file=f)
"""
RECORD = f"""{TRACE}
from axmoe_lite import runs
def record(*steps):
    origin = runs.evidence(8, scale="quick", seed=n, epochs=0)
    runs.record("steps", [dict(step=step, seconds=0.1, **origin) for step in steps], key={KEY})
"""


def row(step: int = 0, *, scale: str = "quick") -> dict:
    """A row as the notebook records them."""
    return {"step": step, "seconds": 0.1, **runs.evidence(8, scale=scale, seed=0, epochs=0)}


def rows_of(folder: Path) -> dict[str, bytes]:
    """Every file of rows below a folder, as it is on the disk."""
    found = folder.rglob("*.csv")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def numbers_of(folder: Path) -> list[int]:
    """How many rows there are in each file below a folder."""
    return [len(content.splitlines()) - 1 for content in rows_of(folder).values()]


def begun(home: Path) -> list[list[str]]:
    """The number of each run that began, and its process."""
    return [line.split() for line in (home / "trace").read_text().splitlines()] if (home / "trace").exists() else []


def alive(pid: int) -> bool:
    """Whether a process is at work still."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(true: Callable[[], object], *, within: float = 60.0) -> None:
    """Until something is true."""
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def axmoe(*words: str, before: str = "", **environment: str) -> subprocess.Popen:
    """The command line in a process of its own, after some code."""
    code = f"import sys\n{before}\nfrom axmoe_lite.__main__ import main\nsys.exit(main({list(words)!r}))"
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, **piped)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """A script to its end, however that comes."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)

"""One notebook, executed in a process of its own; a script that imports nothing of ours, since torch costs seconds.

    python child.py FOLDER

FOLDER holds ``source.ipynb`` and ``work.json``; :mod:`axmoe_lite.runs.execute` starts this and watches it. Its input
is a pipe from whoever started it: when that ends, however it ends, so does this, and its kernel.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import contextlib
import datetime
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

from filelock import FileLock

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def main(folder: Path) -> int:
    """Execute ``folder/source.ipynb`` unless it has been, and leave an outcome; returns the exit status."""
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    threading.Thread(target=_die_with_parent, args=(work["sockets"],), daemon=True).start()
    with FileLock(folder / "lock"):  # another sweep may be at it: then wait, and find it done
        if not (folder / "outcome.json").exists():
            _say("started")
            _write(folder / "outcome.json", json.dumps(_execute(folder, work), indent=1) + "\n")
    return 0


def _execute(folder: Path, work: dict) -> dict:
    # jsonschema, if it finds this, parses a grammar of web addresses at each start: 1.2 s, for what no notebook has.
    sys.modules["rfc3987_syntax"] = None
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    options = {}
    if work["sockets"]:  # two kernels that start at one moment may be given the same port; files are each kernel's own
        options["config"] = Config({"ConnectionFileMixin": {"transport": "ipc", "ip": f"{work['sockets']}/k"}})
    started, clock, reason = _now(), time.perf_counter(), ""
    n_cells = len(json.loads((folder / "source.ipynb").read_text(encoding="utf-8"))["cells"]) + bool(work["parameters"])
    try:
        papermill.execute_notebook(
            str(folder / "source.ipynb"),
            str(folder / "executing.ipynb"),
            parameters=work["parameters"],
            cwd=work["cwd"],
            kernel_name=work["kernel"],
            progress_bar=False,
            on_cell_start=lambda cell, cell_index: _say(f"cell {cell_index + 1} {n_cells}"),
            **options,
        )
        os.replace(folder / "executing.ipynb", folder / "notebook.ipynb")
        shutil.rmtree(folder / "scratch", ignore_errors=True)
    except PapermillExecutionError as wrong:
        reason = f"cell {wrong.exec_count}: {wrong.ename}: {_first_line(wrong.evalue)}"
        _write(folder / "error.txt", COLOURS.sub("", "\n".join(wrong.traceback)) + "\n")
    except Exception as wrong:  # a dead kernel, a notebook that is none, a full disk
        died = " (killed by hand, or by a system out of memory?)" if type(wrong).__name__ == "DeadKernelError" else ""
        reason = f"{type(wrong).__name__}: {_first_line(str(wrong))}{died}"
        _write(folder / "error.txt", f"{type(wrong).__name__}: {wrong}\n")
    return {
        "state": "failed" if reason else "finished",
        "reason": reason,
        "seconds": round(time.perf_counter() - clock, 3),
        "started": started,
        "ended": _now(),
        "host": socket.gethostname(),
        "attempts": work["attempts"],
        "sweep": work["sweep"],
    }


def _die_with_parent(sockets: str) -> None:
    """Wait for the pipe to end; then end the kernel too, so that no orphan works on in a folder that is run again."""
    while os.read(0, 1):
        pass
    import psutil

    for process in psutil.Process().children(recursive=True):
        process.kill()
    if sockets:
        shutil.rmtree(sockets, ignore_errors=True)
    os._exit(1)


def _say(line: str) -> None:
    print(line, flush=True)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:300]


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="milliseconds")


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

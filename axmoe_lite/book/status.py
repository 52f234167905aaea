"""Back matter that no one can write by hand: when each page was made and on what, and where it can be launched.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from axmoe_lite import __version__, paths, runs
from axmoe_lite.runs import Work, store

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "numba", "altair", "papermill", "jupyter-book")


def status_page(works: dict[Path, Work]) -> str:
    """The text of ``status.md``: what is written in the book, and a table of the runs behind the pages.

    Args:
        works: the run that each chapter shows, see :func:`axmoe_lite.book.execute.work_of`.
    """
    lines = [_written(), "| chapter | executed (UTC) | seconds | memory, MB | threads | commit |"]
    lines += ["|---|---|--:|--:|--:|---|"]
    for notebook, work in works.items():
        ended = store.outcome(work.run)
        made_by = store.read_json(work.run.folder / "run.json").get("commit") or "unknown"
        when, seconds = str(ended.get("started", ""))[:16].replace("T", " "), float(ended.get("seconds", 0))
        cells = [f"{{doc}}`{notebook.stem} <{notebook.stem}>`", when, f"{seconds:.0f}"]
        cells += [f"{float(ended.get('peak_mb') or 0):.0f}", str(work.threads), f"`{made_by}`"]
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    machine = f"{runs.device_name('cpu').rsplit(',', 1)[0]}, {runs.cores()} cores, {platform.system()}"
    scales = " and ".join(sorted({str(work.run.parameters["scale"]) for work in works.values()}))
    lines += ["", f"**Scale** {scales}. **Machine** {machine}.", ""]
    lines += [f"**Versions** axmoe_lite {__version__}, Python {platform.python_version()}, {versions}.", ""]
    return "\n".join(lines)


def _written() -> str:
    file = paths.book_dir() / "status.md"
    return file.read_text(encoding="utf-8") if file.exists() else "# What was executed\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(absent)"


def repository() -> str:
    """Where these files are public: ``https://github.com/owner/name``, or "" if they are not.

    A workflow knows (``GITHUB_REPOSITORY``); elsewhere the checkout's ``origin`` does, if it is on GitHub.
    """
    name, server = os.environ.get("GITHUB_REPOSITORY", ""), os.environ.get("GITHUB_SERVER_URL", "https://github.com")
    # What is no address would break the file that it is written into.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and re.fullmatch(r"https?://[\w.-]+(:\d+)?", server):
        return f"{server}/{name}"
    asked = ["git", "-C", str(paths.CHECKOUT), "remote", "get-url", "origin"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
    found = re.fullmatch(r"(?:https://github\.com/|git@github\.com:)([\w.-]+/[\w.-]+?)(?:\.git)?/?", told)
    return f"https://github.com/{found[1]}" if found else ""


def launchable(config: str) -> str:
    """A book's ``_config.yml`` with buttons that open each chapter on Binder and Colab, if the repository is public.

    Args:
        config: the file's text.
    """
    if not (public := repository()):
        return config
    settings = {
        "launch_buttons": "  notebook_interface: jupyterlab\n  binderhub_url: https://mybinder.org\n"
        "  colab_url: https://colab.research.google.com\n",
        "repository": f"  url: {public}\n  path_to_book: book\n  branch: main\n",
    }
    return config.rstrip("\n") + "\n" + "".join(f"{key}:\n{lines}" for key, lines in settings.items())

"""The stage that jupyter-book reads, and the call of it: only files that differ are written, only those are read again.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from axmoe_lite.book.pages import read
from axmoe_lite.book.status import launchable
from axmoe_lite.runs import store

BUILDERS = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "sphinx-mathjax-offline", "sphinxcontrib-bibtex")
NOT_STAGED = ("_build", ".ipynb_checkpoints", "__pycache__")


def write_stage(book: Path, stage: Path, pages: dict[str, dict | str]) -> None:
    """Make ``stage`` a copy of the book with these pages and Vega; files that do not differ keep their time."""
    wanted = {
        file.relative_to(book): file.read_bytes()
        for file in book.rglob("*")
        if file.is_file() and not set(file.relative_to(book).parts) & set(NOT_STAGED)
    }
    config = Path("_config.yml")
    wanted[config] = launchable(wanted[config].decode()).encode()
    for name, content in pages.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        wanted[Path(name)] = text.encode()
    vega = Path("assets") / "vega.js"
    wanted[vega] = _vega(stage / vega)
    for name, content in wanted.items():
        file = stage / name
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            store.write_bytes(file, content)
    for file in [file for file in stage.rglob("*") if file.is_file() and file.relative_to(stage) not in wanted]:
        file.unlink()


def _vega(present: Path) -> bytes:
    """One script for all charts; what is staged already, if the same vl-convert made it, for that takes seconds."""
    head = f"/* vl-convert-python {metadata.version('vl-convert-python')} */\n".encode()
    if present.exists() and (content := present.read_bytes()).startswith(head):
        return content
    from axmoe_lite import plots

    return head + plots.javascript_bundle().encode()


def build_pages(stage: Path, build: Path, *, force: bool) -> int:
    """Call jupyter-book, unless nothing has changed since it last succeeded."""
    stamp, index = build / "stamp.json", build / "html" / "index.html"
    before, now = store.read_json(stamp), {"frame": _frame(stage), "pages": _digest(stage.rglob("*"), stage)}
    if before == now and index.exists() and not force:
        print(f"No page has changed. The book is at {index}")
        return 0
    everything = force or before.get("frame") != now["frame"] or not index.exists()
    stamp.unlink(missing_ok=True)  # a build that fails has warned of what the next would no longer look at
    if status := _jupyter_book(stage, build, *(["--all"] if everything else [])):
        return status
    store.write_json(stamp, now)
    print(f"The book is at {index}")
    return 0


def build_single(stage: Path, build: Path) -> int:
    """The whole book as one page, ``build/singlehtml/intro.html``; returns the exit status."""
    if status := _jupyter_book(stage, build, "--builder", "singlehtml"):
        return status
    print(f"The book on one page is at {build / 'singlehtml' / 'intro.html'}; a browser prints it as PDF.")
    return 0


def _jupyter_book(stage: Path, build: Path, *options: str) -> int:
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(stage)]
    command += ["--path-output", str(build.parent), *options, "-W", "--keep-going"]
    return int(subprocess.run(command, check=False).returncode != 0)


def _frame(stage: Path) -> str:
    """A digest of all that every page shows or may refer to: anything but the pages, and their headings and labels."""
    pages = sorted(file for file in stage.rglob("*") if file.suffix in (".md", ".ipynb"))
    others = [file for file in stage.rglob("*") if file not in pages]
    targets = re.compile(r"^(#+ .*|\(.+\)=|\$\$ \(.+\)|.*:(?:label|name): .*)$", flags=re.M)
    named = [[page.name, *targets.findall(_text_of(page))] for page in pages]
    versions = [f"{name} {_version(name)}" for name in BUILDERS]
    return hashlib.sha256(f"{_digest(others, stage)} {named} {versions}".encode()).hexdigest()[:16]


def _text_of(page: Path) -> str:
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    return "\n".join("".join(cell["source"]) for cell in read(page)["cells"] if cell["cell_type"] == "markdown")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _digest(files: Iterable[Path], folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts):
        found.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]

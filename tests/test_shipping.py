"""What travels: the wheel with its chapters, the back matter, the links, the front figure."""

import ast
import importlib
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

import axmoe_lite
from axmoe_lite import paths, runs
from axmoe_lite.book import status
from axmoe_lite.study import KEY

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from the source archive, in a venv that borrows the dependencies: run(*command)."""
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--outdir", str(place), str(ROOT)]
    made = subprocess.run(build, capture_output=True, text=True)
    if made.returncode and "Could not find a version" in made.stdout + made.stderr:
        pytest.skip("no package registry in reach: a wheel cannot be built")
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    python = place / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wheel = next(place.glob("*.whl"))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    (place / "elsewhere").mkdir()

    def run(*command: str) -> subprocess.CompletedProcess:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "AXMOE_HOME")}
        environment |= {"HOME": str(place), "PATH": f"{python.parent}:{environment['PATH']}"}
        return subprocess.run(
            command, cwd=place / "elsewhere", env=environment, capture_output=True, text=True, timeout=300
        )

    run.place = place
    return run


def test_the_wheel_brings_its_chapters_and_runs_them_from_anywhere(installed):
    where = installed("python", "-c", "import axmoe_lite; print(axmoe_lite.__file__)").stdout
    assert str(installed.place / "venv") in where, "the test would run the checkout"
    first = installed("axmoe", "list")
    assert first.returncode == 0 and "What does a cheap multiplier get wrong?" in first.stdout
    home = installed.place / ".cache" / "axmoe_lite"
    assert f"are now in {home}" in first.stderr
    for folder, kinds in (("book", "*.*"), ("book/assets", "*"), ("data/results", "*"), ("data/checkpoints", "*")):
        ours = {file.name for file in (ROOT / folder).glob(kinds) if file.is_file()}
        assert {file.name for file in (home / folder).glob(kinds) if file.is_file()} - {".version"} == ours
    edited = home / "book" / "intro.md"
    edited.write_text("mine")
    again = installed("axmoe", "run", "01_multipliers", "circuit=mul8s_1L2L")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "now in" not in again.stderr and edited.read_text() == "mine"


def test_chapters_are_found_where_the_home_is_another_and_empty(installed):
    asks = "import os; os.environ['AXMOE_HOME'] = {!r}; from axmoe_lite import paths, runs; print(runs.find('02'))"
    empty = installed.place / "empty"
    empty.mkdir()
    found = installed("python", "-c", asks.format(str(empty)))
    assert found.stdout.strip().endswith("share/axmoe_lite/book/02_factors.ipynb"), found.stderr
    assert not any(empty.iterdir())


def test_chapters_of_another_version_are_named_and_kept(installed):
    installed("axmoe", "list")
    stamp = installed.place / ".cache" / "axmoe_lite" / "book" / ".version"
    stamp.write_text("0.0.1\n")
    told = installed("axmoe", "list").stderr
    assert "are of version 0.0.1, the package is" in told and stamp.read_text() == "0.0.1\n"
    stamp.write_text(axmoe_lite.__version__ + "\n")


def test_in_a_checkout_nothing_is_unpacked(elsewhere):
    assert paths.unpack_book("9.9") == "" and not any(elsewhere.iterdir())


# ---------------------------------------------------------------------------------- back matter


def test_every_name_of_the_symbol_table_exists():
    text = (BOOK / "symbols.md").read_text()
    names = re.findall(r"`(axmoe_lite(?:\.\w+)+)`", text)
    assert len(names) > 50
    for name in names:
        parts = name.split(".")
        known = next(n for n in range(len(parts), 0, -1) if _imports(".".join(parts[:n])))
        found = importlib.import_module(".".join(parts[:known]))
        for part in parts[known:]:
            found = getattr(found, part)
    for option, name in re.findall(r"`(\w+)` of `(axmoe_lite[\w.]+)`", text):
        module, _, function = name.rpartition(".")
        owner = getattr(importlib.import_module(module), function)
        source = ast.unparse(ast.parse(Path(importlib.import_module(owner.__module__).__file__).read_text()))
        assert re.search(rf"\b{option}\b", source), f"{name} has no {option}"


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def test_the_glossary_is_in_order_and_every_page_that_is_named_exists():
    lines = (BOOK / "glossary.md").read_text().split("```{glossary}")[1].split("```")[0].splitlines()
    terms = [line for line in lines if line and not line.startswith(" ")]
    assert terms == sorted(terms, key=str.casefold) and len(set(terms)) == len(terms) > 40
    pages = {file.stem for file in BOOK.iterdir() if file.suffix in (".md", ".ipynb")}
    for file in BOOK.glob("*.md"):
        assert set(re.findall(r"\{doc\}`([\w/]+)`", file.read_text())) <= pages, file.name


def test_the_citation_is_the_same_everywhere():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    page = (BOOK / "cite.md").read_text()
    assert cff["version"] == axmoe_lite.__version__
    assert all(str(cff[key]) in page for key in ("title", "version", "date-released", "license"))
    assert cff["references"][0]["notes"] in page


def test_the_front_figure_is_of_the_committed_rows():
    """To draw it anew: plots.healing(rows).save("book/assets/healing.svg") with the rows below."""
    rows = [
        row
        for row in runs.read("axmoe_resnet20_cifar100")
        if (row["topology"], row["seed"]) == ("dense", "0") and row["multiplier"] not in ("float32", "mul8s_1KV6")
        if row["regime"] in ("not retrained", "norms refreshed") or row["retrain_images"] == "2500"
        if row["regime"] != "bias corrected"
    ]
    assert len({tuple(row[key] for key in KEY) for row in rows}) == len(rows) == 36
    of = {"network": "resnet20", "topology": "dense", "seed": "0", "regime": "norms refreshed"}
    cured = [row for row in runs.read("signs") if of.items() <= row.items()]
    rows += [row for row in cured if row["multiplier"].startswith("tuned_relu:")]
    assert len(rows) == 48
    text = (BOOK / "assets" / "healing.svg").read_text()
    drawn = {float(share) for share in re.findall(r"top-1 accuracy: ([\d.]+)%; ", text)}
    assert {round(100 * float(row["top1"]), 6) for row in rows} <= drawn


# ---------------------------------------------------------------------------------- links


@pytest.mark.parametrize("remote", ["https://github.com/some/fork.git", "git@github.com:some/fork.git"])
def test_launch_buttons_lead_to_the_public_repository(monkeypatch, tmp_path, remote):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    before = (BOOK / "_config.yml").read_text()
    assert status.launchable(before) == before  # nowhere public: no link that leads nowhere
    subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True)
    config = yaml.safe_load(status.launchable(before))
    assert config["repository"]["url"] == "https://github.com/some/fork"
    assert set(config["launch_buttons"]) >= {"binderhub_url", "colab_url"}
    monkeypatch.setenv("GITHUB_REPOSITORY", "an/other")
    assert status.repository() == "https://github.com/an/other"


def test_binder_installs_the_package_from_the_environment_file():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert listed[-1]["pip"][-1] == "-e ."
    assert not (ROOT / ".binder").exists() and not (ROOT / "binder").exists(), "they would hide environment.yml"

"""The explorer in JupyterLab, as a reader has it: a server, a kernel, a browser, and keys that are pressed."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import find_chromium, page

from axmoe_lite import explore, multiplier
from axmoe_lite.runs import rehearsal

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "book" / "00_explorer.ipynb"


@contextmanager
def server(folder: Path, notebooks: Path):
    """A JupyterLab of our own on a free port, its settings in ``folder``: yields its address and token."""
    pytest.importorskip("jupyterlab", reason="no JupyterLab test: pip install jupyterlab")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.root_dir": notebooks,
        "ServerApp.allow_root": True,
        "IdentityProvider.token": token,
    }
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = {
        **os.environ,
        **{name: str(folder / name.lower()) for name in places},
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    quiet = folder / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)  # else JupyterLab asks whether it may fetch news, and for updates
    news = json.dumps({"fetchNews": "false", "checkForUpdates": False})
    (quiet / "notification.jupyterlab-settings").write_text(news)
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=notebooks)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", process, log)
        yield f"http://127.0.0.1:{port}", token
    finally:
        process.terminate()  # it ends its kernels, too
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()  # kernels end when they find themselves without a parent
            process.wait()


def _wait_for(address: str, process: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"JupyterLab ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not answer in {seconds} s: {log.read_text()[-2000:]}")


def live_cells() -> list[str]:
    """Those cells of the chapter that make and show the explorer."""
    cells = [cell for cell in json.loads(CHAPTER.read_text())["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if "widgets" in "".join(cell["source"])]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """lab(name): a page that shows this notebook after "Run All Cells", and what went wrong on it."""
    pytest.importorskip("playwright.sync_api", reason="no browser test: pip install playwright")
    if find_chromium() is None:
        pytest.skip("no browser test: this machine has no chromium; install Debian's chromium or Chrome")
    notebooks = tmp_path_factory.mktemp("notebooks")
    rehearsal.notebook(notebooks / "small.ipynb", "from axmoe_lite import widgets\n\nwidgets.explorer()")
    if CHAPTER.exists():
        rehearsal.notebook(notebooks / "chapter.ipynb", *live_cells())
    with server(tmp_path_factory.mktemp("jupyter"), notebooks) as (address, token):

        @contextmanager
        def opened(name):
            with page(width=1400, height=1000, seconds=120) as (tab, trouble):
                # "reset": else JupyterLab opens what an earlier test left open, too.
                tab.goto(f"{address}/lab/tree/{name}.ipynb?reset&token={token}")
                tab.locator(".jp-Notebook .jp-Cell").first.wait_for()
                tab.get_by_text("| Idle").wait_for()  # without a kernel "Run" would ask for one
                tab.get_by_role("menuitem", name="Run", exact=True).click()
                tab.get_by_text("Run All Cells", exact=True).click()
                yield tab, trouble

        yield opened


def figures(tab) -> dict[str, str]:
    """The numbers that the widget shows, unrounded, and the multiplier's name."""
    read = "cells => Object.fromEntries(cells.map(c => [c.dataset.figure, c.dataset.value]))"
    shown = tab.locator("table.axmoe-numbers td[data-figure]").evaluate_all(read)
    return {**shown, "multiplier": tab.locator("table.axmoe-numbers").get_attribute("data-multiplier")}


def wait_for(tab, name: str) -> dict[str, str]:
    """The numbers, once all of this multiplier are there."""
    tab.locator(f'table.axmoe-numbers[data-multiplier="{name}"] td[data-figure="top1"][data-value]').wait_for()
    return figures(tab)


def expected(name: str, layer: str = "conv1") -> dict[str, object]:
    return explore.look(multiplier(name), explore.digits_witness(), layer=layer)


def agree(shown: dict[str, str], name: str) -> None:
    told = expected(name)
    for figure in ("rank", "wce"):
        assert int(shown[figure]) == told[figure], figure
    for figure in ("power_mw", "mae", "bias", "ep", "real_mae", "real_bias", "top1"):
        assert float(shown[figure]) == told[figure], figure


def test_keys_move_the_explorer_and_a_wrong_file_does_not(lab, tmp_path):
    with lab("small") as (tab, trouble):
        before = wait_for(tab, "broken_array(0,0,4)")
        agree(before, "broken_array(0,0,4)")
        places = boxes(tab)
        slider = tab.locator(".widget-slider", has_text="drop_columns").get_by_role("slider")
        slider.focus()
        slider.press("ArrowRight")
        after = wait_for(tab, "broken_array(0,0,5)")
        agree(after, "broken_array(0,0,5)")
        assert after["top1"] != before["top1"] and after["mae"] != before["mae"]
        assert boxes(tab) == places, "a picture jumped"
        assert "broken_array(0,0,5)" in tab.locator(".axmoe-pictures img").first.get_attribute("alt")
        wrong = tmp_path / "short.npy"
        wrong.write_bytes(b"not a table")
        tab.get_by_role("button", name="your table").press("Enter")
        with tab.expect_file_chooser() as chooser:
            tab.get_by_role("button", name="choose a file").press("Enter")
        chooser.value.set_files(wrong)
        tab.locator(".axmoe-wrong", has_text="short.npy").wait_for()
        assert figures(tab) == after and boxes(tab) == places
        assert not ours(trouble), ours(trouble)
        assert not trouble.outside, "a live notebook needs no other machine"


def boxes(tab) -> list[dict]:
    """Where the three pictures lie on the page, in CSS pixels."""
    return [tab.locator(".axmoe-pictures img").nth(n).bounding_box() for n in range(3)]


def ours(trouble) -> list[str]:
    """What went wrong in scripts; JupyterLab itself asks for services that this server has not (404)."""
    return [text for text in trouble.errors if "Failed to load resource" not in text]


@pytest.mark.skipif(not CHAPTER.exists(), reason="the chapter with the explorer is not there")
def test_the_chapters_own_cell_shows_the_explorer(lab):
    assert live_cells(), "the chapter shows no explorer"
    with lab("chapter") as (tab, trouble):
        shown = wait_for(tab, "broken_array(0,0,4)")
        agree(shown, "broken_array(0,0,4)")
        assert tab.locator(".axmoe-pictures img").count() == 3
        assert not ours(trouble), ours(trouble)

"""The real commands on real chapters: papermill from any directory, and the book's own command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from axmoe_lite.__main__ import WIDGET, _drop_widgets, chapters, main

ROOT = Path(__file__).resolve().parent.parent


def chapter(stem: str) -> Path:
    return ROOT / "book" / f"{stem}.ipynb"


def papermill(chapter: Path, output: Path, *parameters: str, home: Path) -> dict:
    command = [sys.executable, "-m", "papermill", str(chapter), str(output), "--no-progress-bar", *parameters]
    env = {**os.environ, "AXMOE_BOOK": "1", "AXMOE_HOME": str(home)}
    done = subprocess.run(command, cwd=output.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def shown(notebook: dict) -> str:
    return json.dumps([cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"])


def test_a_chapter_runs_from_any_directory_with_other_parameters(tmp_path):
    notebook = papermill(chapter("02_factors"), tmp_path / "out.ipynb", "-p", "circuit", "roba()", home=tmp_path)
    assert "Factors(rank 2)" in shown(notebook)


def test_the_network_chapter_runs_on_another_image_set(tmp_path):
    parameters = ["-p", "dataset", "synthetic", "-p", "epochs", "3"]
    notebook = papermill(chapter("05_networks"), tmp_path / "out.ipynb", *parameters, home=tmp_path)
    assert "synthetic, 500 images, 3 epochs, seed 0 (quick)" in shown(notebook)
    assert (tmp_path / "data" / "cache" / "results" / "resilience_resnet20_synthetic.csv").exists()


def test_the_speed_chapter_runs_where_nothing_was_recorded(tmp_path):
    notebook = papermill(chapter("06_speed"), tmp_path / "out.ipynb", "-p", "repeats", "1", home=tmp_path)
    assert "ResNet-20 forward, 8 images, 1 thread" in shown(notebook) and "Nothing was recorded here" in shown(notebook)


def test_pages_keep_no_widget(tmp_path):
    view = {"output_type": "display_data", "metadata": {}, "data": {WIDGET: {"model_id": "1"}, "text/plain": "bar"}}
    text = {"output_type": "stream", "name": "stdout", "text": "kept"}
    path = tmp_path / "chapter.ipynb"
    cell = {"cell_type": "code", "source": "", "metadata": {}, "execution_count": 1, "outputs": [view, text]}
    path.write_text(json.dumps({"cells": [cell], "metadata": {"widgets": {"state": {}}}}))
    _drop_widgets(path)
    assert json.loads(path.read_text()) == {"cells": [{**cell, "outputs": [text]}], "metadata": {}}


def test_papermill_prints_a_help_for_every_parameter():
    for chapter in chapters():
        command = [sys.executable, "-m", "papermill", "--help-notebook", str(chapter)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert '"quick" or "paper"' in text or '"quick": digits' in text


def test_chapters_are_in_reading_order():
    numbers = [int(path.stem[:2]) for path in chapters()]
    assert numbers == list(range(1, 10))
    listed = [entry["file"] for entry in yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())["chapters"]]
    assert [path.stem for path in chapters()] == [name for name in listed if name[0].isdigit()]


@pytest.mark.parametrize("arguments", [[], ["bok"], ["book", "--scale", "papr"], ["book", "--scal", "quick"]])
def test_typos_on_the_command_line_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: axmoe" in capsys.readouterr().err


def test_without_a_checkout_the_command_says_so(monkeypatch, tmp_path, capsys):
    from axmoe_lite import paths

    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    assert main(["book"]) == 1
    assert "works in a checkout" in capsys.readouterr().err

"""The real commands on real chapters: papermill from any directory, and the book's own command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from faults import wait_for
from papermill.cli import papermill as papermill_command

import axmoe_lite
from axmoe_lite import book, paths, plots
from axmoe_lite.__main__ import main
from axmoe_lite.book import WIDGET, build, data_named_in, page
from axmoe_lite.runs import store
from axmoe_lite.runs.parameters import chapters, parameters

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


def test_papermill_prints_a_help_for_every_parameter():
    for chapter in chapters():  # papermill's own command, of which a process for each would take a minute
        text = CliRunner().invoke(papermill_command, ["--help-notebook", str(chapter)], catch_exceptions=False).output
        known = parameters(chapter)
        assert next(iter(known)) == "scale" and "{quick, paper}" in text
        assert all(f"  {p.name}: Unknown type" in text and p.about in text for p in known.values())


def test_chapters_are_in_reading_order():
    numbers = [int(path.stem[:2]) for path in chapters()]
    assert numbers == list(range(len(chapters()))) and len(numbers) >= 10
    parts = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())["parts"]
    listed = [entry["file"] for part in parts for entry in part["chapters"]]
    assert [path.stem for path in chapters()] == [name for name in listed if name[0].isdigit()]


@pytest.mark.parametrize("arguments", [[], ["bok"], ["book", "--scale", "papr"], ["book", "--scal", "quick"]])
def test_typos_on_the_command_line_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: axmoe" in capsys.readouterr().err


def test_without_a_checkout_the_command_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path)
    assert main(["book"]) == 1
    assert "work in a checkout" in capsys.readouterr().err


def test_what_cannot_be_is_refused_before_anything_is_executed(tiny_book):
    for options, problem in (({"scale": "papr"}, "'papr'.*'quick', 'paper'"), ({"workers": 0}, "workers is 0")):
        with pytest.raises(ValueError, match=problem):
            build(**options)
    assert not (tiny_book / "book" / "_build").exists()


# ---------------------------------------------------------------------------------- a page from a run


def cell(source: str, *outputs: dict, tags: tuple = ()) -> dict:
    metadata = {"tags": list(tags)} if tags else {}
    base = {"cell_type": "code", "metadata": metadata, "source": source, "id": f"c{abs(hash(source)) % 10**8}"}
    return base | {"outputs": list(outputs), "execution_count": 1 if outputs else None}


def text(source: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": source, "id": f"m{abs(hash(source)) % 10**8}"}


def notebook(*cells: dict, **metadata: object) -> dict:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata |= {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


PARAMETERS = ('scale = "quick"  # {quick, paper} the dial', "seed = 0  # {0..} of the draw")
SEVEN = {"output_type": "stream", "name": "stdout", "text": "7\n"}


def test_a_page_is_todays_text_with_the_outputs_of_the_run():
    dial = cell("\n".join(PARAMETERS), tags=("parameters",))
    injected = cell("# Parameters\nseed = 0", tags=("injected-parameters",))
    executed = notebook(text("old"), dial, injected, cell("print(7)  # old", SEVEN), papermill={"duration": 1.5})
    present = notebook(text("new"), dial, text("more"), cell("# new\nprint( 7 )"))
    made = page(present, executed, changed={})
    assert [c["source"] for c in made["cells"]] == ["new", dial["source"], "more", "# new\nprint( 7 )"]
    assert made["cells"][3]["outputs"] == [SEVEN] and made["metadata"] == present["metadata"]
    shown = page(present, executed, changed={"scale": "paper"})["cells"][2]
    assert shown["source"] == "# Changed for this page\nscale = 'paper'"
    for other in (notebook(dial, cell("print(8)")), notebook(dial, cell("print(7)"), cell("1")), notebook(dial)):
        assert page(other, executed, changed={}) is None
    assert page(notebook(cell(dial["source"]), cell("print(7)")), executed, changed={}) is None  # the tag was removed


def test_pages_keep_no_widget_and_no_second_copy_of_vega(monkeypatch):
    import altair as alt

    from axmoe_lite.plots.theme import _html

    view = {"output_type": "display_data", "metadata": {}, "data": {WIDGET: {"model_id": "1"}, "text/plain": "bar"}}
    html = {}
    for live in (True, False):
        monkeypatch.setenv("AXMOE_BOOK", "" if live else "1")
        spec = alt.Chart(alt.Data(values=[{"x": 1}])).mark_point().encode(x="x:Q").to_dict()
        html[live] = re.sub(r"axmoe-chart-[\w-]+", "axmoe-chart-1", _html(spec)["text/html"])
    chart = {"output_type": "display_data", "metadata": {}, "data": {"text/html": html[True].splitlines(True)}}
    executed = notebook(cell("show()", view, SEVEN, chart))
    outputs = page(notebook(cell("show()")), executed, changed={})["cells"][0]["outputs"]
    assert len(html[True]) > 500_000 and outputs == [SEVEN, {**chart, "data": {"text/html": html[False]}}]


def test_a_chapter_depends_on_the_committed_data_that_its_code_names(elsewhere):
    for name in (
        "results/resilience_a.csv",
        "results/resilience_b.csv",
        "results/cost.csv",
        "checkpoints/a.safetensors",
    ):
        (elsewhere / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / "data" / name).touch()
    for code, named in [
        ('runs.read("cost")', ["cost.csv"]),
        ('runs.read(f"resilience_{images.name}")', ["resilience_a.csv", "resilience_b.csv"]),
        ('load(paths.checkpoints_dir() / "a.safetensors")  # and "cost"', ["a.safetensors"]),
        ('f"{share:.0%}", "resilience", ""', []),
        ("%run cost", ["a.safetensors", "cost.csv", "resilience_a.csv", "resilience_b.csv"]),
    ]:
        assert [file.name for file in data_named_in(notebook(text("cost"), cell(code)))] == named, code


# ---------------------------------------------------------------------------------- the book's builder, on a tiny book


@pytest.fixture
def tiny_book(tmp_path, monkeypatch):
    """A checkout with a book of two chapters, one of which shows its threads and measures time alone."""
    folder = tmp_path / "checkout" / "book"
    folder.mkdir(parents=True)
    config = {"title": "Tiny", "only_build_toc_files": True, "execute": {"execute_notebooks": "off"}}
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    toc = {"format": "jb-book", "root": "intro", "chapters": [{"file": "01_sum"}, {"file": "02_time"}]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc))
    (folder / "intro.md").write_text("# Tiny\n")
    dial = cell("\n".join(PARAMETERS), tags=("parameters",))
    write(folder / "01_sum.ipynb", notebook(text("(sum)=\n# A sum\n\nOld text."), dial, cell("print(40 + 2, scale)")))
    code = 'import os\nprint("threads", os.environ["OMP_NUM_THREADS"])\n"cost"'
    write(
        folder / "02_time.ipynb",
        notebook(text("# A time\n\nAfter {ref}`sum`."), dial, cell(code), axmoe={"alone": True}),
    )
    monkeypatch.setattr(paths, "CHECKOUT", folder.parent)
    monkeypatch.setenv("AXMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(plots, "javascript_bundle", lambda: "/* making it takes seconds */")
    return folder.parent


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


def edit(path: Path, old: str, new: str) -> None:
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))


def executed() -> dict[str, tuple]:
    """Which execution of each chapter there is; those that were superseded are gone."""
    found = [(run.chapter, (run.folder.stat().st_ino, store.outcome(run)["started"])) for run in store.all_runs()]
    assert len(dict(found)) == len(found)
    return dict(found)


def html(checkout: Path, name: str) -> str:
    return (checkout / "book" / "_build" / "html" / f"{name}.html").read_text()


def test_only_what_changed_is_executed_and_built(tiny_book, capfd):
    chapters, built = tiny_book / "book", tiny_book / "book" / "_build" / "html"
    assert build(workers=2) == 0
    assert "Executing 01_sum, 02_time (quick)." in capfd.readouterr().out
    assert "42 quick" in html(tiny_book, "01_sum") and f"threads {os.cpu_count()}" in html(tiny_book, "02_time")
    first, times = executed(), {file: file.stat().st_mtime_ns for file in built.rglob("*")}
    ended = {run.chapter: store.outcome(run) for run in store.all_runs()}
    assert ended["02_time"]["started"] >= ended["01_sum"]["ended"], "what measures time runs alone"

    assert build() == 0  # nothing has changed
    assert "No page has changed. The book is at " in capfd.readouterr().out
    assert executed() == first and {file: file.stat().st_mtime_ns for file in built.rglob("*")} == times

    edit(chapters / "01_sum.ipynb", "Old text.", "New text.")
    edit(chapters / "01_sum.ipynb", "print(40 + 2, scale)", "print(40 + 2, scale)  # forty-two")
    assert build() == 0
    assert "New text." in html(tiny_book, "01_sum") and "forty-two" in html(tiny_book, "01_sum")
    assert "42 quick" in html(tiny_book, "01_sum") and executed() == first
    assert (built / "02_time.html").stat().st_mtime_ns == times[built / "02_time.html"], "the other page was written"

    time.sleep(1.1)  # when a run started is known to the second
    edit(chapters / "01_sum.ipynb", "40 + 2", "40 + 3")
    (paths.results_dir()).mkdir(parents=True)
    (paths.results_dir() / "others.csv").touch()
    assert build() == 0
    assert "43 quick" in html(tiny_book, "01_sum")
    second = executed()
    assert second["01_sum"] != first["01_sum"] and second["02_time"] == first["02_time"]

    (paths.results_dir() / "cost.csv").touch()  # which chapter 2 names
    assert build() == 0
    third = executed()
    assert third["01_sum"] == second["01_sum"] and third["02_time"] != second["02_time"]
    capfd.readouterr()
    assert build() == 0 and "No page has changed" in capfd.readouterr().out

    edit(chapters / "01_sum.ipynb", "# A sum", "# One sum")  # the other page's menu names it
    assert build() == 0 and "One sum" in html(tiny_book, "02_time") and executed() == third


def test_a_chapter_that_fails_is_named_and_tried_again(tiny_book, capfd):
    chapters = tiny_book / "book"
    edit(chapters / "01_sum.ipynb", "print(40 + 2, scale)", "print(40 + 2); 1 / 0")
    assert build() == 1
    told = capfd.readouterr().err
    assert "01_sum.ipynb failed (cell 3: ZeroDivisionError: division by zero)" in told
    part = Path(re.search(r"the executed part is in (\S+)", told)[1])
    assert "42" in shown(json.loads(part.read_text()))
    assert executed().keys() == {"01_sum", "02_time"}
    there = html(tiny_book, "01_sum")  # how far it came, and that it came no further
    words = re.sub(r"<[^>]+>", "", there)
    assert "the chapter stopped at cell 3: ZeroDivisionError: division by zero. Nothing" in words and "42" in words
    assert "stopped at" not in html(tiny_book, "02_time")
    first = executed()
    assert build() == 1  # as it was, and tried again
    (failed,) = store.all_runs("01_sum")
    assert store.outcome(failed)["attempts"] == 2 and executed()["02_time"] == first["02_time"]
    edit(chapters / "01_sum.ipynb", "1 / 0", "1 / 1")
    assert build() == 0 and "42" in html(tiny_book, "01_sum") and "stopped at" not in html(tiny_book, "01_sum")
    assert len(list(store.all_runs("02_time"))) == 1


BOOK = """
import sys, time
from pathlib import Path
from axmoe_lite import book, paths
from axmoe_lite.__main__ import main
paths.CHECKOUT, book.build_pages = Path(sys.argv[1]), lambda stage, build, force: print("built") or 0
sys.exit(main(["book", "--workers", "1"]))
"""


@pytest.mark.trust("fault", "the book is interrupted")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_book_keeps_what_was_executed_and_goes_on(tiny_book, sent, monkeypatch):
    wait = "import os, pathlib, time; go = pathlib.Path(os.environ['AXMOE_HOME'], 'go'); n = 0\nwhile not go.exists(): "
    code = (wait + "go.with_name('begun').touch(); time.sleep(0.02)").replace("\n", "\\n")
    edit(tiny_book / "book" / "02_time.ipynb", "import os\\nprint", f"{code}\\nprint")
    command = [sys.executable, "-c", BOOK, str(tiny_book)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for((paths.home() / "begun").exists)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "axmoe book: interrupted; what has finished is kept" in said
    assert {run.chapter: run.state() for run in store.all_runs()} == {"01_sum": "finished", "02_time": "interrupted"}
    (first,) = store.all_runs("01_sum")
    before = {file: file.read_bytes() for file in first.folder.iterdir()}
    (paths.home() / "go").touch()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "Executing 02_time (quick); the other 1 are as they were." in again.stdout
    assert {file: file.read_bytes() for file in first.folder.iterdir()} == before


@pytest.mark.trust("fault", "the clock is set back a day, or ahead a year")
def test_a_clock_that_was_set_executes_no_chapter_again_and_again(tiny_book, monkeypatch, capsys):
    monkeypatch.setattr(book, "build_pages", lambda stage, build, force: 0)
    cost = paths.results_dir() / "cost.csv"  # which chapter 2 names
    cost.parent.mkdir(parents=True)
    cost.touch()
    assert build(workers=1) == 0
    first = executed()
    os.utime(cost, (time.time() + 86_400,) * 2)  # written before the clock went back a day
    assert build() == 0 and executed() == first
    os.utime(cost, (time.time() - 86_400,) * 2)
    assert build() == 0 and executed() == first
    (run,) = store.all_runs("02_time")
    ahead = f"{int(time.strftime('%Y')) + 1}-01-01T00:00:00+00:00"  # begun under a clock that was ahead
    store.write_json(run.folder / "outcome.json", store.outcome(run) | {"started": ahead})
    assert build() == 0 and executed()["02_time"] != first["02_time"], "what came since cannot be told: once more"
    second = executed()
    assert build() == 0 and executed() == second and second["01_sum"] == first["01_sum"]


def test_a_page_with_a_broken_reference_fails_until_it_is_mended(tiny_book, capfd):
    chapters = tiny_book / "book"
    for broken, problem in ((("Old text.", "{ref}`nowhere`"), "nowhere"), (("(sum)=", "(summe)="), "sum")):
        assert build() == 0
        edit(chapters / "01_sum.ipynb", *broken)  # the second is in the other page, which is unchanged
        for _ in range(2 if problem == "nowhere" else 1):  # Sphinx by itself warns of a page once
            capfd.readouterr()
            assert build() == 1
            assert f"undefined label: '{problem}'" in capfd.readouterr().err
        edit(chapters / "01_sum.ipynb", *reversed(broken))


def test_the_stage_is_the_book_and_files_that_do_not_differ_keep_their_time(tiny_book):
    stage = tiny_book / "book" / "_build" / "stage"
    (tiny_book / "book" / ".ipynb_checkpoints").mkdir()
    (tiny_book / "book" / ".ipynb_checkpoints" / "old.ipynb").touch()
    (tiny_book / "book" / "note.txt").touch()
    pages = {"01_sum.ipynb": notebook(text("Executed."))}
    book.write_stage(tiny_book / "book", stage, pages)
    times = {file: file.stat().st_mtime_ns for file in stage.rglob("*") if file.is_file()}
    names = {file.relative_to(stage).as_posix() for file in times}
    assert names == {
        "_config.yml",
        "_toc.yml",
        "01_sum.ipynb",
        "02_time.ipynb",
        "intro.md",
        "note.txt",
        "assets/vega.js",
    }
    assert json.loads((stage / "01_sum.ipynb").read_text()) == pages["01_sum.ipynb"]
    (tiny_book / "book" / "note.txt").unlink()
    (tiny_book / "book" / "intro.md").write_text("# New\n")
    book.write_stage(tiny_book / "book", stage, pages)
    again = {file: file.stat().st_mtime_ns for file in stage.rglob("*") if file.is_file()}
    assert {file.name for file in times if again.get(file) != times[file]} == {"note.txt", "intro.md"}


def test_the_whole_book_stands_on_one_page_if_asked(tiny_book, capfd):
    assert build(single=True) == 0
    page = tiny_book / "book" / "_build" / "singlehtml" / "intro.html"
    text = page.read_text()
    assert "42 quick" in text and "A time" in text and str(page) in capfd.readouterr().out


def test_the_table_of_runs_says_how_long_each_took_and_on_what(tiny_book):
    (tiny_book / "book" / "status.md").write_text("# Status\n\nWritten by hand.\n")
    assert build() == 0
    text = (tiny_book / "book" / "_build" / "stage" / "status.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| {doc}")]
    assert text.startswith("# Status\n\nWritten by hand.\n") and [row[0].strip() for row in rows] == [
        "{doc}`01_sum <01_sum>`",
        "{doc}`02_time <02_time>`",
    ]
    ended = {run.chapter: store.outcome(run) for run in store.all_runs()}
    assert [float(row[2]) for row in rows] == [round(ended[name]["seconds"]) for name in ("01_sum", "02_time")]
    assert "**Scale** quick." in text and f"axmoe_lite {axmoe_lite.__version__}" in text


def test_force_and_other_parameters_execute_again(tiny_book, monkeypatch):
    monkeypatch.setattr(book, "build_pages", lambda stage, build, force: 0)

    def staged() -> str:
        return json.dumps(json.loads((tiny_book / "book" / "_build" / "stage" / "01_sum.ipynb").read_text()))

    assert build() == 0
    first = executed()
    assert build(force=True) == 0
    assert all(executed()[name] != first[name] for name in first)
    assert build(scale="paper") == 0
    assert "42 paper" in staged() and "scale = 'paper'" in staged()
    assert build() == 0 and "42 quick" in staged() and "scale = 'paper'" not in staged()
    assert len(list(store.all_runs())) == 4  # of both scales


def test_without_the_books_packages_the_command_says_which_and_how(tiny_book, monkeypatch, capsys):
    find = book.importlib.util.find_spec
    monkeypatch.setattr(book.importlib.util, "find_spec", lambda name: None if name == "papermill" else find(name))
    assert build() == 1
    assert "needs papermill: pip install" in capsys.readouterr().err

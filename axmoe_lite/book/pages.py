"""A chapter's page: its text as it is written now, with the outputs of the run that executed it.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import json
from pathlib import Path

from axmoe_lite import runs
from axmoe_lite.runs import Run, store

WIDGET = "application/vnd.jupyter.widget-view+json"


def page_of(notebook: Path, run: Run) -> dict | None:
    """A chapter's page (see :func:`page`); None if its run has other code, or its notebook was lost."""
    present, executed = read(notebook), store.read_json(run.folder / "notebook.ipynb")
    return page(present, executed, changed=_changed(present, run)) if executed else None


def stopped_page(notebook: Path, run: Run, *, reason: str) -> dict:
    """The page of a chapter whose run failed: what was computed before, under a box that says where it stopped.

    Args:
        reason: as in the run's outcome, such as ``"cell 12: AssertionError"``.
    """
    present, executed = read(notebook), store.read_json(run.folder / "executing.ipynb")
    changed, blank = _changed(present, run), [{**cell, "outputs": []} for cell in code_cells(present)]
    shown = page(present, executed, changed=changed) if executed else None
    shown = shown or page(present, {"cells": blank}, changed=changed)  # it was edited meanwhile, or never began
    why = reason.strip(" :").replace("`", "'")  # shown as code: an error's words are no markup
    box = (
        f"```{{warning}}\nOn the machine that made this page the chapter stopped at `{why}`. Nothing below that was"
        " computed, and what is claimed above may not hold there.\n```"
    )
    told = {"cell_type": "markdown", "id": "stopped", "metadata": {}, "source": box}
    return {**shown, "cells": [*shown["cells"][:1], told, *shown["cells"][1:]]}


def _changed(present: dict, run: Run) -> dict:
    """The parameters that a run had other values of than its chapter says."""
    known = runs.parameters(present)
    return {name: value for name, value in run.parameters.items() if value != known[name].default}


def page(present: dict, executed: dict, *, changed: dict) -> dict | None:
    """A chapter as it is written now, with the outputs of its executed copy.

    Args:
        present, executed: notebooks. Their code cells must be the same but for comments, layout and parameters.
        changed: parameters that the run had other values of; shown after the chapter's own.

    Returns:
        A notebook; or None if the code cells differ.
    """
    ran = [cell for cell in code_cells(executed) if "injected-parameters" not in _tags(cell)]
    own = code_cells(present)
    if len(ran) != len(own) or not all(map(_same_code, own, ran)):
        return None
    cells, outputs = [], iter(ran)
    for cell in present["cells"]:
        if cell["cell_type"] != "code":
            cells.append(cell)
            continue
        done = next(outputs)
        shown = [_for_a_page(output) for output in done["outputs"] if WIDGET not in output.get("data", {})]
        cells.append({**cell, "execution_count": done["execution_count"], "outputs": shown})
        if changed and "parameters" in _tags(cell):
            source = "\n".join(["# Changed for this page", *(f"{name} = {value!r}" for name, value in changed.items())])
            new = {"id": "changed-parameters", "source": source, "execution_count": None, "outputs": []}
            cells.append({"cell_type": "code", "metadata": {}, **new})
    return {**present, "cells": cells}


def _same_code(a: dict, b: dict) -> bool:
    if "parameters" in _tags(a) or "parameters" in _tags(b):
        return _tags(a) == _tags(b)  # their values are the run's
    return store.bare_code("".join(a["source"])) == store.bare_code("".join(b["source"]))


def _for_a_page(output: dict) -> dict:
    """An output without the copy of Vega that every chart of a live notebook carries: a page has its own, once."""
    html = "".join(output.get("data", {}).get("text/html", ""))
    start, end = html.find("if(!window.vegaEmbed){"), html.rfind("const draw=()=>")
    if 'class="axmoe-chart"' not in html or not 0 <= start < end:
        return output
    return {**output, "data": {**output["data"], "text/html": html[:start] + html[end:]}}


def code_cells(notebook: dict) -> list[dict]:
    """A notebook's cells of code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def read(notebook: Path) -> dict:
    """A notebook's content."""
    return json.loads(notebook.read_text(encoding="utf-8"))

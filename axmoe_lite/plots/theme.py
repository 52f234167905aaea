"""One look for the whole book, a renderer that draws with the network off, and sources shown in chapters.

A chart is shown as a ``<div>`` and a call of ``vegaEmbed``. Vega itself comes with the book (one script beside
the pages), or, in a live notebook, inside every chart, so that each draws whichever cell ran first.

Chapters: 01 to 09.
"""

import ast
import hashlib
import inspect
import itertools
import json
import os
import textwrap
import uuid
from collections.abc import Callable
from typing import Any

import altair as alt
import vl_convert
from IPython.display import Code

from axmoe_lite.runs import EVIDENCE

# Okabe and Ito's colours, told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
    "#777777",
)
SIGNED = alt.Scale(scheme="blueorange", domainMid=0)


@alt.theme.register("axmoe", enable=True)
def theme() -> alt.theme.ThemeConfig:
    """One look for the whole book: quiet axes, readable text, no box around the data."""
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
    return alt.theme.ThemeConfig(
        config={
            "font": font,
            "view": {"stroke": None},
            "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "gridColor": "#e8e8e8"},
            "axisX": {"labelFlush": False},  # else the last two labels of an axis run together
            "legend": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
            "header": {"labelFontSize": 13, "titleFontSize": 13},
            "title": {"fontSize": 15, "subtitleFontSize": 12, "anchor": "start", "subtitleColor": "#555"},
            "range": {"category": [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY]},
        }
    )


# ---------------------------------------------------------------------------------- showing

_numbers = itertools.count(1)


def javascript_bundle() -> str:
    """Vega, Vega-Lite and vegaEmbed in one script without outside addresses, about 0.9 MB."""
    return "(function(){" + vl_convert.javascript_bundle() + "})();"


_ACTIONS = '{"export":true,"source":false,"compiled":false,"editor":false}'

# A dataset's rows as the page needs them, from what :func:`_packed` made.
_UNPACK = (
    "s=>{for(const k in s.datasets||{}){const d=s.datasets[k];if(d.rows)s.datasets[k]=d.rows.map("
    "r=>{const o={...d.same};d.columns.forEach((c,i)=>{o[c]=r[i]});return o})}return s}"
)


def _packed(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification with each dataset as columns and rows, and once what all rows share."""
    datasets = {}
    for name, rows in spec.get("datasets", {}).items():
        datasets[name] = rows
        if isinstance(rows, list) and len(rows) > 1 and all(row.keys() == rows[0].keys() for row in rows):
            same = {key: value for key, value in rows[0].items() if all(row[key] == value for row in rows)}
            columns = [key for key in rows[0] if key not in same]
            values = [[row[key] for key in columns] for row in rows]
            datasets[name] = {"same": same, "columns": columns, "rows": values}
    return {**spec, "datasets": datasets} if datasets else spec


def _html(spec: dict[str, Any], **_: Any) -> dict[str, str]:
    """Altair's renderer: a div, the chart's description, and the call that fills the div."""
    in_book = bool(os.environ.get("AXMOE_BOOK"))
    text = json.dumps(_packed(spec), separators=(",", ":")).replace("</", "<\\/")
    # Pages are the same at every build, and chapters may stand on one page; two live notebooks share a browser page.
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-{next(_numbers)}" if in_book else uuid.uuid4().hex
    name = f"axmoe-chart-{name}"
    bundle = ""
    if not in_book:
        # Only where it would end the script: Vega's code also holds regular expressions such as /</.
        script = javascript_bundle().replace("</script", "<\\/script")
        bundle = f"if(!window.vegaEmbed){{{script}}}"
    draw = f'vegaEmbed("#{name}",({_UNPACK})({text}),{{"actions":{_ACTIONS}}})'
    failed = f'e=>{{document.getElementById("{name}").textContent="This chart failed: "+e}}'
    # In a function of its own, so that its names are nobody else's.
    wait = f'const draw=()=>{draw}.catch({failed});window.vegaEmbed?draw():window.addEventListener("load",draw)'
    wait = f"(()=>{{{bundle}{wait}}})()"
    return {"text/html": f'<div id="{name}" class="axmoe-chart"></div><script>{wait}</script>'}


alt.renderers.register("axmoe", _html)
alt.renderers.enable("axmoe")
alt.data_transformers.disable_max_rows()


def source(function: Callable[..., Any]) -> Code:
    """The text of a function of the package, without its docstring, for a chapter that explains it."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()  # a method is indented
    body = ast.parse("\n".join(lines)).body[0].body
    if ast.get_docstring(ast.parse("\n".join(lines)).body[0]):
        del lines[body[0].lineno - 1 : body[0].end_lineno]
    return Code("\n".join(lines), language="python")


def check_evidence(rows: list[dict], name: str) -> None:
    """Raise ValueError for a row without evidence: a number without its origin is not drawn.

    Args:
        name: the column that says which row it is.
    """
    for row in rows:
        missing = [column for column in EVIDENCE if row.get(column) in (None, "")]
        if missing:
            raise ValueError(f"A row for {row.get(name)!r} lacks {', '.join(missing)}; it is not drawn.")

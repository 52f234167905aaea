"""The built book in a real browser: every page, offline and from its file, wide and on a phone.

Built by `axmoe book`; what is not built is skipped, with the reason.
"""

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from browser import page

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "book" / "_build" / "html"
TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
PAGES = [TOC["root"], *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"])]
MOST_BYTES = 1_000_000

pytestmark = [
    pytest.mark.skipif(not (HTML / "index.html").exists(), reason="the book is not built: make book"),
    pytest.mark.xdist_group("pages"),
]
DRAWN = """() => [...document.querySelectorAll('.axmoe-chart')].every(
    chart => chart.querySelector('canvas, svg.marks') && !chart.textContent.startsWith('This chart failed'))"""
PICTURE = """chart => { const drawn = chart.querySelector('canvas, svg.marks');
    return drawn.toDataURL ? drawn.toDataURL() : drawn.outerHTML }"""
SIDEWAYS = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"

UNTOLD = """() => [...document.querySelectorAll('.axmoe-chart, .cell_output .output')].some(box => {
    const told = parseFloat(getComputedStyle(box, '::before').height) > 0, hidden = box.scrollWidth - box.clientWidth;
    return told ? hidden == 0 : hidden > 1 })"""


def opened(tab, name: str) -> None:
    tab.goto((HTML / f"{name}.html").as_uri())
    tab.wait_for_load_state("load")
    tab.wait_for_function(DRAWN, timeout=60_000)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_from_its_file_with_every_chart_and_no_complaint(name):
    with page() as (tab, trouble):
        opened(tab, name)
        assert tab.locator("h1").count() >= 1
        tab.wait_for_function("() => !document.querySelector('.math') || document.querySelector('mjx-container')")
        broken = tab.evaluate("() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
        assert (broken, trouble.errors, trouble.failed, trouble.outside) == ([], [], [], [])
        tab.set_viewport_size({"width": 390, "height": 800})  # a phone: charts scroll in their box, the page does not
        assert tab.evaluate(SIDEWAYS) <= 1
        tab.wait_for_function(f"() => !({UNTOLD})()")  # what is hidden at the right is announced, and nothing else
    assert (HTML / f"{name}.html").stat().st_size < MOST_BYTES


@pytest.mark.parametrize("name", [n for n in PAGES if n[0].isdigit()])
def test_every_slider_and_menu_changes_its_picture(name):
    with page() as (tab, trouble):
        opened(tab, name)
        for chart in tab.locator(".axmoe-chart").all():
            others, tried = chart.locator("input[type=range], select").all(), set()
            for radio in [None, *chart.locator("input[type=radio]:not(:checked)").all()]:
                if radio is not None:
                    _changes(chart, radio, lambda radio=radio: (radio.focus(), radio.press("Space")))
                for n, control in enumerate(others):
                    if n not in tried and control.is_visible():  # some show only where a radio button stands so
                        tried.add(n)
                        stood = control.input_value()
                        _changes(chart, control, lambda control=control: _move(control))
                        control.evaluate(PUT, stood)  # the next one moves from where the page begins
                        tab.wait_for_timeout(100)
        assert (trouble.errors, trouble.outside) == ([], [])


PUT = """(control, value) => { control.value = value;
    for (const event of ['input', 'change']) control.dispatchEvent(new Event(event, {bubbles: true})) }"""


def _changes(chart, control, move) -> None:
    before = chart.evaluate(PICTURE)
    move()
    for _ in range(60):
        chart.page.wait_for_timeout(50)
        if chart.evaluate(PICTURE) != before:
            return
    pytest.fail(f"no change: {control.evaluate('c => c.outerHTML')[:200]}")


def _move(control) -> None:
    """As a reader without a mouse would."""
    if control.evaluate("c => c.type") == "range":
        control.focus()
        control.press("Home" if control.evaluate("c => Number(c.value) > Number(c.min)") else "End")
    else:
        control.select_option(index=control.evaluate("c => [...c.options].findIndex(o => !o.selected)"))


def test_links_lead_to_what_exists():
    anchors = {}
    for name in PAGES:
        text = (HTML / f"{name}.html").read_text(encoding="utf-8")
        anchors[name] = set(re.findall(r'\bid="([^"]+)"', text))
    lost = []
    for name in PAGES:
        text = re.sub(r"<script.*?</script>", "", (HTML / f"{name}.html").read_text(encoding="utf-8"), flags=re.S)
        for link in set(re.findall(r'(?:href|src)="([^"]+)"', text)):
            parts = urlsplit(link.replace("&amp;", "&"))
            if parts.scheme or parts.netloc:
                continue
            target = HTML / unquote(parts.path) if parts.path else HTML / f"{name}.html"
            known = anchors.get(target.name.removesuffix(".html"))
            if not target.exists() or (parts.fragment and known is not None and parts.fragment not in known):
                lost.append(f"{name}: {link}")
    assert lost == []


@pytest.mark.parametrize("published", [True, False])
def test_the_search_finds_a_chapter(published, served):
    with page() as (tab, trouble):
        tab.goto((served if published else HTML.as_uri()) + "/search.html?q=straight-through")
        tab.wait_for_selector("#search-results li a")
        assert any("08_learning" in a.get_attribute("href") for a in tab.locator("#search-results li a").all())
        if published:  # from a file the results come without excerpts, which a browser may not read there
            tab.wait_for_selector("#search-results li p.context")
            assert (trouble.errors, trouble.failed) == ([], [])
        assert trouble.outside == []


@pytest.fixture
def served():
    """The pages as a web server gives them."""
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(HTML))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

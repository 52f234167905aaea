"""A real browser for tests: the machine's own Chromium, driven by Playwright, or a reason why there is none.

    find_chromium()     the path of a Chromium or Chrome, or None
    page(...)           a page that keeps what went wrong on it; skips the test where there is no browser

A test of Jupyter and one of the built pages share this file.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass
class Trouble:
    """What went wrong on a page, as text; the lists grow while the page lives.

    Attributes:
        errors: console messages of level "error", and exceptions that no script caught.
        failed: requests that brought nothing or a status of 400 and above: "404 address".
        outside: addresses of other machines that the page asked for.
    """

    errors: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


def find_chromium() -> str | None:
    """Where this machine's Chromium is, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def page(
    *, width: int = 1280, height: int = 900, offline: bool = True, seconds: float = 60
) -> Iterator[tuple[Any, Trouble]]:
    """A new page of a new browser, and what goes wrong on it: ``with page() as (tab, trouble): tab.goto(...)``.

    Args:
        width, height: of the window, in CSS pixels.
        offline: refuse every request to another machine (they are listed in ``trouble.outside`` either way).
        seconds: how long any one wait of this page may take.

    Skips the test, with the reason, where Playwright or a browser is missing.
    """
    api = pytest.importorskip("playwright.sync_api", reason="no browser test: pip install playwright")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no browser test: this machine has no chromium; install Debian's chromium or Chrome")
    trouble = Trouble()
    with api.sync_playwright() as playwright:
        # Containers have no user namespaces and a small /dev/shm.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.route("**/*", lambda route: _pass(route, trouble, offline))
            tab = context.new_page()
            tab.set_default_timeout(seconds * 1000)
            _listen(tab, trouble)
            yield tab, trouble
        finally:
            browser.close()


def _pass(route: Any, trouble: Trouble, offline: bool) -> None:
    parts = urlsplit(route.request.url)
    if parts.scheme in ("http", "https") and parts.hostname not in LOCAL:
        trouble.outside.append(route.request.url)
        if offline:
            route.abort()
            return
    route.continue_()


def _listen(tab: Any, trouble: Trouble) -> None:
    tab.on("console", lambda said: trouble.errors.append(said.text) if said.type == "error" else None)
    tab.on("pageerror", lambda raised: trouble.errors.append(str(raised)))
    tab.on("requestfailed", lambda asked: trouble.failed.append(f"{asked.failure} {asked.url}"))
    tab.on("response", lambda got: trouble.failed.append(f"{got.status} {got.url}") if got.status >= 400 else None)

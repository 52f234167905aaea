"""Sphinx: drop the scripts that would fetch a notebook runtime from the network (the theme adds them unasked)."""

from typing import Any


def _without_thebe(app: Any, page: str, template: str, context: dict, doctree: Any) -> None:
    def is_thebe(script: Any) -> bool:
        return "thebe" in f"{script} {getattr(script, 'attributes', '')}".lower()

    context["script_files"] = [script for script in context.get("script_files", []) if not is_thebe(script)]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("html-page-context", _without_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

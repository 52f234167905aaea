"""Sphinx: drop the scripts that would fetch a notebook runtime from the network (the theme adds them unasked)."""


def _without_thebe(app, page, template, context, doctree) -> None:  # noqa: ANN001
    def is_thebe(script) -> bool:  # noqa: ANN001
        return "thebe" in f"{script} {getattr(script, 'attributes', '')}".lower()

    context["script_files"] = [script for script in context.get("script_files", []) if not is_thebe(script)]


def setup(app) -> dict[str, bool]:  # noqa: ANN001
    """Called by Sphinx."""
    app.connect("html-page-context", _without_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Where everything lives: the book, committed results, and what can be made again.

One environment variable, ``AXMOE_HOME``, moves results, checkpoints and caches together. Without it
they live in the checkout that holds this package, or in ``~/.cache/axmoe_lite`` when the package was
installed without one. Functions, not constants: the variable is read at each call.
"""

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that holds ``data/``: ``AXMOE_HOME``, else the checkout, else the user's cache."""
    if chosen := os.environ.get("AXMOE_HOME"):
        return Path(chosen).expanduser().resolve()
    return CHECKOUT if (CHECKOUT / "book").is_dir() else Path.home() / ".cache" / "axmoe_lite"


def cache_dir() -> Path:
    """Downloads and half-finished training. Ignored by git; safe to delete, slow to lose."""
    return home() / "data" / "cache"


def runs_dir() -> Path:
    """One folder a run of a chapter, with its notebook, rows and outcome. Ignored by git; ``axmoe collect`` reads."""
    return home() / "data" / "runs"


def results_dir() -> Path:
    """Committed evidence: one CSV a study, written only by :func:`axmoe_lite.runs.record`."""
    return home() / "data" / "results"


def checkpoints_dir() -> Path:
    """Committed weights, each under 2 MB, with their recipe in the file's own header."""
    return home() / "data" / "checkpoints"

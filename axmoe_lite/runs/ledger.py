"""The ledger: which numbers and weights are committed, and where each came from, told by the files themselves.

What a study is about and what made it is in ``data/results/studies.json``; how many rows, of which data, when, by which
code and on what is counted in the rows; the recipe of a network is in the header of its file.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import json
from collections.abc import Iterable
from pathlib import Path

from axmoe_lite import paths
from axmoe_lite.runs import store
from axmoe_lite.runs.notes import locked, studies
from axmoe_lite.runs.tables import read_rows

BEGIN = "<!-- ledger: begin (generated; edit the about texts in results/studies.json) -->"
END = "<!-- ledger: end -->"
SHOWN = 3  # values of a column that are written out; of more, the first ones and how many


def ledger() -> str:
    """The tables of the ledger, in Markdown, from the files in ``data/results`` and ``data/checkpoints``.

    >>> ledger().splitlines()[0]
    '| file | what | how it was made |'
    """
    files = sorted(paths.results_dir().glob("*.csv"))
    notes = studies(paths.results_dir())
    told = [_told(file, notes.get(file.stem, {})) for file in files]
    counted = [_counted(file) for file in files]
    weights = [_weights(file) for file in sorted(paths.checkpoints_dir().glob("*.safetensors"))]
    tables = [
        _table(("file", "what", "how it was made"), told),
        _table(("rows of", "number", "measured on", "seeds", "dates", "commits", "devices"), counted),
        _table(("weights", "trained on", "epochs", "seed", "size", "how", "date", "commit"), weights),
    ]
    return "\n\n".join(tables)


def is_kept() -> bool:
    """Whether there is a ``data/README.md`` with a place for the ledger."""
    readme = _readme()
    return readme.exists() and BEGIN in readme.read_text(encoding="utf-8")


def write_ledger() -> Path:
    """Put :func:`ledger` between its two marks in ``data/README.md``; the rest of the file stays as it is.

    Raises:
        ValueError: if the file or a mark is not there.
    """
    path = _readme()
    with locked("ledger", "paper"):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not 0 <= text.find(BEGIN) < text.find(END):
            raise ValueError(f"{path} has no place for the ledger; add the lines\n{BEGIN}\n{END}")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        new = f"{before}{BEGIN}\n\n{ledger()}\n\n{END}{after}"
        if new != text:
            store.write_text(path, new)
    return path


def _readme() -> Path:
    return paths.home() / "data" / "README.md"


def _told(file: Path, note: dict) -> tuple[str, ...]:
    about = note.get("about") or "not described yet: add it to `results/studies.json`"
    made_by = note.get("made_by", "")
    typed = made_by.startswith(("axmoe ", "papermill "))
    return f"`results/{file.name}`", about, f"`{made_by}`" if typed else made_by or "–"


def _counted(file: Path) -> tuple[str, ...]:
    rows = read_rows(file)

    def values(column: str) -> list[str]:
        return list(dict.fromkeys(row.get(column) or "?" for row in rows))

    number = f"{len(rows):,}" + "".join(f", {scale}!" for scale in values("scale") if scale != "paper")
    if wrong := [row["n_test"] for row in rows if row.get("n_test") and not row["n_test"].isdecimal()]:
        raise ValueError(f"{file} has n_test {wrong[0]!r}; it is a whole number of images. Mend the row.")
    images = [f"{row.get('dataset')}, {int(row.get('n_test') or 0):,} images" for row in rows]
    measured_on = "random numbers" if set(values("dataset")) == {"random numbers"} else _some(dict.fromkeys(images))
    dates = sorted(values("date"))
    days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "–"
    seeds = _some(sorted(values("seed"), key=lambda seed: (len(seed), seed)))
    return (f"`{file.stem}`", number, measured_on, seeds, days, _some(values("commit")), _some(values("device")))


def _weights(file: Path) -> tuple[str, ...]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        recipe = json.loads((opened.metadata() or {}).get("recipe", "{}"))

    def of(name: str) -> str:
        return str(recipe.get(name, "–"))

    trained = f"{of('dataset')}, {recipe['n_train']:,} images" if "n_train" in recipe else of("dataset")
    how = ", ".join(f"{name} {recipe[name]}" for name in ("lr", "batch_size", "precision") if name in recipe)
    size = f"{file.stat().st_size / 1e6:.1f} MB"
    return f"`checkpoints/{file.name}`", trained, of("epochs"), of("seed"), size, how or "–", of("date"), of("commit")


def _some(values: Iterable[str]) -> str:
    values = list(values)
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return "; ".join(values[:SHOWN]) + more or "–"


def _table(heads: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    all_lines = [heads, ("---",) * len(heads), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in all_lines)

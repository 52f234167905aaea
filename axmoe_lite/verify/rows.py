"""Committed rows measured again: does the number still come out, with the code as it is now?

    axmoe verify                        five rows of those that fit this machine, drawn at random
    axmoe verify --n 3 --seed 1         other ones
    verify(["claims"], n=10)            of one study, from Python

Not every row can be measured again everywhere: some need photographs that are not here, a network that was trained for
hours and is too large to commit, or the very machine whose time they tell. :func:`possible` says which, and why.

How far a number may move is said for each study. Everything in it is integer arithmetic until the last layer, whose
float32 sums another processor may add in another order; then an image in some thousands is answered otherwise.

Chapter: 23, "How do you know?"
"""

import difflib
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from axmoe_lite import claims, datasets, explore, models, paths, runs, study, train

PHOTOGRAPHS = "cifar100"
RESNET20 = "resnet20-cifar100-seed0-epochs60.safetensors"
TYPED = 5e-6  # rows are written with six digits


@dataclass(frozen=True)
class Checked:
    """A row, measured again.

    Attributes:
        study, row: which.
        column: what was compared.
        committed, again: the two values; text where they are no numbers.
        allowed: how far apart they may be.
        agrees: whether they are not further.
    """

    study: str
    row: str
    column: str
    committed: float | str
    again: float | str
    allowed: float

    @property
    def agrees(self) -> bool:
        if isinstance(self.committed, str) or isinstance(self.again, str):
            return str(self.committed) == str(self.again)
        return abs(self.committed - self.again) <= self.allowed + TYPED * abs(self.committed)


@dataclass(frozen=True)
class _Study:
    """How the rows of a study are measured again.

    ``fits`` picks the rows of which that can be done, ``again`` measures one, ``allowed`` says what is compared.
    """

    key: tuple[str, ...]
    allowed: dict[str, float]
    again: Callable[[dict], dict]
    fits: Callable[[dict], bool] = lambda row: True
    photographs: bool = False


def _explored(row: dict) -> dict:
    (found,) = explore.rows([row["multiplier"]], explore.digits_witness(), progress=False)
    return found


def _judged(row: dict) -> dict:
    return {(line["claim"], line["part"]): line for line in claims.judged()}[row["claim"], row["part"]]


def _studied(row: dict) -> dict:
    """A dense ResNet-20 of the committed weights, in a regime that trains nothing."""
    images, network = datasets.cifar100(), models.resnet20(classes=100)
    train.load(network, paths.checkpoints_dir() / RESNET20)
    regime = row.get("regime") or "not retrained"
    (found,) = study.measure(network, images, [row["multiplier"]], regimes=[regime], progress=False)
    return found


def _untrained(row: dict) -> bool:
    here = row.get("topology", "dense") == "dense" and row["seed"] == "0" and row.get("network") == "resnet20"
    return here and row.get("regime", "") in ("not retrained", "bias corrected", "norms refreshed")


_IMAGES = 10 / 10_000  # averages over other threads move a few images
_ON_RESNET20 = {"allowed": {"top1": _IMAGES}, "again": _studied, "fits": _untrained, "photographs": True}
STUDIES: dict[str, _Study] = {
    "explorer_resnet8_digits": _Study(
        key=("multiplier",),
        allowed={"rank": 0, "mae": 0, "bias": 0, "wce": 0, "ep": 0, "top1": 2 / 360},
        again=_explored,
    ),
    "claims": _Study(key=("claim", "part"), allowed={"verdict": 0, "effect": 0, "low": 0, "high": 0}, again=_judged),
    "axmoe_resnet20_cifar100": _Study(key=("multiplier", "regime"), **_ON_RESNET20),
    "bias_correction_resnet20_cifar100": _Study(key=("multiplier", "regime"), **_ON_RESNET20),
    "resilience_resnet20_cifar100": _Study(key=("multiplier",), **_ON_RESNET20),
}
"""The studies whose rows can be measured again from what is committed, and photographs where it says so."""


def possible(names: Iterable[str] = ()) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Which rows can be measured again on this machine, and why the others cannot.

    Args:
        names: of studies; none for all that are committed.

    Returns:
        Rows by study; and reasons by study.

    Raises:
        ValueError: for a study that is not committed; names the nearest.
    """
    known = sorted(file.stem for file in paths.results_dir().glob("*.csv") if not file.stem.endswith("_answers"))
    names = list(names) or known
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"No study {name!r} is committed.{meant} There are {', '.join(known) or 'none'}.")
    rows: dict[str, list[dict]] = {}
    reasons: dict[str, str] = {}
    for name in names:
        if name not in STUDIES:
            reasons[name] = "its networks were trained for hours and are not committed, or it tells a machine's time"
        elif STUDIES[name].photographs and not _photographs().exists():
            reasons[name] = f"its photographs are not here: {_photographs()} (datasets.cifar100() fetches them)"
        elif found := [row for row in _complete(name) if STUDIES[name].fits(row)]:
            rows[name] = found
        else:
            reasons[name] = "none of its rows can be measured without training"
    return rows, reasons


def _complete(name: str) -> list[dict]:
    """The rows of a study, if they have the columns that measuring them again needs."""
    rows, how = runs.read(name), STUDIES[name]
    if missing := [column for column in (*how.key, *how.allowed) if rows and column not in rows[0]]:
        raise ValueError(
            f"{paths.results_dir() / name}.csv has no column {', '.join(missing)}; its rows cannot be compared. Take"
            " the file from the repository again."
        )
    return rows


def _photographs() -> Path:
    return paths.cache_dir() / f"{PHOTOGRAPHS}.npz"


def verify(names: Iterable[str] = (), *, n: int = 5, seed: int = 0, progress: bool = True) -> Iterator[list[Checked]]:
    """Measure rows again, drawn at random: each study with the same chance, then each of its rows.

    Args:
        names: of studies; none for all that fit this machine.
        n: how many rows; fewer if there are no more.
        seed: of the draw.

    Returns:
        An iterator: for each row, as soon as it is measured, what was compared.

    Raises:
        ValueError: by the call itself: for an unknown study, n below 1, or when no row fits this machine.
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least one row is to be measured.")
    rows, reasons = possible(names)
    if not rows:
        raise ValueError("Nothing can be measured again here: " + "; ".join(f"{k}: {v}" for k, v in reasons.items()))
    draw, left, chosen = random.Random(seed), {name: list(found) for name, found in rows.items()}, []
    while len(chosen) < n and any(left.values()):
        name = draw.choice(sorted(name for name, found in left.items() if found))
        chosen.append((name, left[name].pop(draw.randrange(len(left[name])))))

    def measured() -> Iterator[list[Checked]]:
        for name, row in tqdm(chosen, desc="verify", disable=not progress):
            yield again(name, row)

    return measured()


def again(name: str, row: dict) -> list[Checked]:
    """One row measured again, and compared column by column.

    Args:
        name: of :data:`STUDIES`.
        row: as :func:`axmoe_lite.runs.read` returns it.
    """
    how = STUDIES[name]
    found, told = how.again(row), ", ".join(row[column] for column in how.key)
    return [
        Checked(name, told, column, _value(row[column]), _value(found[column]), allowed)
        for column, allowed in how.allowed.items()
    ]


def _value(cell: object) -> float | str:
    text = "" if cell is None else str(cell)
    try:
        return float(text)
    except ValueError:
        return text


def report(checked: Iterable[Checked]) -> str:
    """A line for each value that was compared."""
    lines = []
    for one in checked:
        said = "as committed" if one.agrees else "DIFFERS"
        lines.append(
            f"{said:13} {one.study} [{one.row}] {one.column}: {_word(one.committed)}, again {_word(one.again)}"
        )
    return "\n".join(lines)


def _word(value: float | str) -> str:
    return value or "nothing" if isinstance(value, str) else f"{value:.6g}"

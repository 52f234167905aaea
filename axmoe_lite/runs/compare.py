"""Two sets of results side by side: what pairs, by how much it differs, and how sure that is.

    study = "axmoe_resnet20_cifar100"
    print(table(compare(f"{study}:regime=not retrained", f"{study}:regime=retrained")))

Rows pair by their study's key. Differences are b - a; their spread over seeds says how much of one is chance.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import difflib
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from axmoe_lite import paths
from axmoe_lite.runs.evidence import EVIDENCE
from axmoe_lite.runs.notes import studies
from axmoe_lite.runs.tables import decoded, read_text, typed

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

UNLIKE = (
    "dataset",
    "n_train",
    "n_test",
    "scale",
    "epochs",
    "device",
    "version",
    "commit",
)  # worth a word if they differ
WIDTH = 120
SHOWN = 3  # values and rows that a sentence names
DASH = "–"


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        a, b: the names of the two sources.
        by: the columns that pair the rows.
        pairs: one row a pair and value: the columns of ``by``, ``value`` (its name), ``a``, ``b``, ``difference``.
        groups: pairs that differ in seed only, as one: the other columns of ``by``, ``value``, ``n``, and the means
            ``a``, ``b``, ``difference``, with ``sd`` of the difference over the seeds (nan if n is 1).
        summary: one row a value, over all pairs: ``n``, ``mean``, ``median``, ``sd``, ``min``, ``max`` of the
            difference, ``low`` and ``high`` (95 % interval of the mean, from Student's t), and in how many pairs b is
            ``higher``, ``lower`` and ``equal``.
        only_in_a, only_in_b: rows that found no partner.
        notes: what a reader should know before believing the numbers.
    """

    a: str
    b: str
    by: list[str]
    pairs: "pd.DataFrame"
    groups: "pd.DataFrame"
    summary: "pd.DataFrame"
    only_in_a: "pd.DataFrame"
    only_in_b: "pd.DataFrame"
    notes: list[str]


def compare(a: str, b: str, *, by: Iterable[str] = (), values: Iterable[str] = ()) -> Comparison:
    """Pair the rows of two sources and take the differences of their values, b - a.

    Args:
        a, b: a study of ``data/results``, or the path of a CSV or parquet file; after a colon, which rows to take, as
            in ``"speed_cases:threads=1,column=mul8s_1KV6"``.
        by: columns that pair the rows. If none is named: the columns of both keys, without those that have no value in
            common (then nothing could pair; ``notes`` names them).
        values: columns to compare. If none is named: ``top1`` if there is one, else all that hold fractions.

    Raises:
        ValueError: for a source, column or value that does not exist (names the nearest), if the key is not known, if
            nothing pairs, and if several rows of a source would pair with one; names the columns that tell them apart.

    >>> study = "resilience_resnet20_cifar100"
    >>> found = compare(f"{study}:multiplier=float32", f"{study}:multiplier=mul8s_1KV6")
    >>> found.pairs[["value", "a", "b", "difference"]].round(4).values.tolist()
    [['top1', 0.6758, 0.6714, -0.0044]]
    """
    left, right = _load(a, "a"), _load(b, "b")
    notes = []
    if chosen := list(by):
        for side in (left, right):
            for name in chosen:
                side.check_column(name)
    else:
        chosen = _pairing(left, right, notes)
    measured = _measured(left, right, list(values), chosen)
    for name in UNLIKE:
        told = name in chosen or any(note.startswith(f"not paired by {name}:") for note in notes)
        if not told and name in left.rows and name in right.rows and left.told(name) != right.told(name):
            notes.append(f"unlike: {name} is {left.told(name)} in a, {right.told(name)} in b")
    rows = _paired(left, right, chosen, measured)
    pairs = _differences(left, right, rows.dropna(), chosen, measured, notes)
    only_in_a = left.rows.loc[rows.loc[rows["b"].isna(), "a"].astype(int)]
    only_in_b = right.rows.loc[rows.loc[rows["a"].isna(), "b"].astype(int)]
    return Comparison(a, b, chosen, pairs, _groups(pairs, chosen), _summary(pairs), only_in_a, only_in_b, notes)


# ---------------------------------------------------------------------------------- the two sources


@dataclass
class _Side:
    """The chosen rows of one source."""

    name: str
    letter: str
    rows: "pd.DataFrame"
    fractions: list[str]
    key: list[str]

    def check_column(self, name: str) -> None:
        """Refuse a column that is not there."""
        if name not in self.rows:
            raise ValueError(f"{self.name} has no column {name!r}.{_nearest(name, list(self.rows))}")

    def told(self, name: str) -> str:
        """The values of a column, the first few."""
        values = list(dict.fromkeys(_text(self.rows[name])))
        return "; ".join(value or "empty" for value in values[:SHOWN]) + (
            f" and {len(values) - SHOWN:,} more" if len(values) > SHOWN else ""
        )


def _load(source: str, letter: str) -> _Side:
    import pyarrow as pa

    name, *filters = [source] if os.path.isfile(source) else re.split(r":(?=\w+=)", source, maxsplit=1)
    found, keys = _read(name)
    fractions = [field.name for field in found.schema if pa.types.is_floating(field.type)]
    side = _Side(source, letter, found.to_pandas(), fractions, [])
    for chosen in re.split(r",(?=\w+=)", filters[0]) if filters else []:
        column, value = chosen.split("=", 1)
        side.check_column(column)
        texts = _text(side.rows[column])
        matches = [_same(text, value) for text in texts]
        if not any(matches):
            among = list(dict.fromkeys(texts))
            raise ValueError(f"No row of {name} has {column}={value!r}.{_nearest(value, among)}")
        side.rows = side.rows[matches]
    present = list(dict.fromkeys(side.rows["study"])) if "study" in side.rows else list(keys)
    side.key = list(dict.fromkeys(column for study in present for column in keys.get(study, [])))
    if len(present) > 1:
        side.key = ["study", *side.key]
    return side


def _read(name: str) -> tuple["pa.Table", dict[str, list[str]]]:
    """The rows of a study or file, and the keys of the studies in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(os.path.expanduser(name))
    if not os.path.isfile(path):  # False, too, for a name too long to be one
        path = paths.results_dir() / f"{name}.csv"
    if not os.path.isfile(path):
        known = sorted(file.stem for file in paths.results_dir().glob("*.csv"))
        hint = " Choose rows after a colon, as in NAME:column=value." if ":" in name else ""
        raise ValueError(f"No file or study of {paths.results_dir()} is called {name!r}.{_nearest(name, known)}{hint}")
    if path.suffix == ".parquet":
        try:
            return pq.read_table(path), _keys(path)
        except pa.ArrowException as reason:
            raise ValueError(f"{path} is not readable as Parquet ({reason}); collect() writes such files.") from reason
    note = studies(path.parent).get(path.stem)
    keys = {path.stem: note["key"]} if note else _keys(path.with_suffix(".parquet"))
    return decoded(typed(read_text(path))), keys


def _keys(path: Path) -> dict[str, list[str]]:
    """The keys that :func:`axmoe_lite.runs.collect` has left in a parquet file."""
    import pyarrow.parquet as pq

    told = (pq.read_schema(path).metadata or {}) if path.is_file() else {}
    return json.loads(told.get(b"keys", b"{}"))


def _text(column: "pd.Series") -> list[str]:
    """Values as they would stand in a file, so that 1 and 1.0 and "1" pair; "" for none."""
    import pandas as pd

    codes, known = pd.factorize(column)
    words = [f"{value:.15g}" if isinstance(value, float) else str(value) for value in known.tolist()]
    return [words[code] if code >= 0 else "" for code in codes]


def _same(text: str, asked: str) -> bool:
    if text == asked:
        return True
    try:
        return float(text) == float(asked)
    except ValueError:
        return False


def _nearest(asked: str, known: list[str]) -> str:
    near = difflib.get_close_matches(asked, known, n=1, cutoff=0.4)
    shown = ", ".join(name or "(empty)" for name in known[:20]) + (" …" if len(known) > 20 else "")
    return (f" Did you mean {near[0]!r}?" if near else "") + f" There are {shown or 'none'}."


# ---------------------------------------------------------------------------------- which rows pair


def _pairing(left: _Side, right: _Side, notes: list[str]) -> list[str]:
    """The columns of both keys, but those that would let nothing pair."""
    keys = [side.key or other.key for side, other in ((left, right), (right, left))]
    if not keys[0]:
        raise ValueError(
            f"It is not known what names a row of {left.name}; say which columns pair the rows: by (--by)."
        )
    chosen = []
    for name in dict.fromkeys(keys[0] + keys[1]):
        lacks = [side.letter for side in (left, right) if name not in side.rows]
        if lacks or not (name in keys[0] and name in keys[1]):
            notes.append(f"not paired by {name}: " + (f"no column of {lacks[0]}" if lacks else "not in both keys"))
        elif set(_text(left.rows[name])).isdisjoint(_text(right.rows[name])):
            notes.append(f"not paired by {name}: {left.told(name)} in a, {right.told(name)} in b")
        else:
            chosen.append(name)
    if not chosen:
        raise ValueError(f"The keys of {left.name} and {right.name} have no value in common: " + "; ".join(notes) + ".")
    return chosen


def _measured(left: _Side, right: _Side, asked: list[str], chosen: list[str]) -> list[str]:
    import pandas as pd

    for name in asked:
        for side in (left, right):
            side.check_column(name)
            if not pd.api.types.is_numeric_dtype(side.rows[name]):
                raise ValueError(f"{name} of {side.name} is no number ({side.told(name)}); compare another column.")
    apart = {*left.key, *right.key, *EVIDENCE, *chosen}
    shared = [c for c in left.fractions if c in right.fractions and c not in apart]
    found = asked or [c for c in shared if all(side.rows[c].notna().any() for side in (left, right))]
    if not found:
        raise ValueError(f"{left.name} and {right.name} share no column of fractions; name the values (--values).")
    return ["top1"] if not asked and "top1" in found else found


def _paired(left: _Side, right: _Side, chosen: list[str], measured: list[str]) -> "pd.DataFrame":
    """The index of each row in ``a`` beside that of its partner in ``b``; nan where there is none."""
    import pandas as pd

    names = [pd.DataFrame({column: _text(side.rows[column]) for column in chosen}) for side in (left, right)]
    for side, own, others in ((left, names[0], names[1]), (right, names[1], names[0])):
        again = own.index[own.duplicated(keep=False)]
        again = own.loc[again].reset_index().merge(others.drop_duplicates(), on=chosen)
        if len(again):
            _refuse_ambiguous(side, again, chosen, measured)
    own, others = (
        name.assign(**{side.letter: side.rows.index}) for name, side in zip(names, (left, right), strict=True)
    )
    rows = own.merge(others, on=chosen, how="outer")[["a", "b"]].sort_values(["a", "b"])
    if not len(rows.dropna()):
        first = [", ".join(f"{column}={name[column][0]}" for column in chosen) for name in names]
        raise ValueError(
            f"No row of {left.name} pairs with one of {right.name} by these columns: the first of a has {first[0]}; of"
            f" b, {first[1]}. Say which columns pair the rows: by (--by)."
        )
    return rows


def _refuse_ambiguous(side: _Side, again: "pd.DataFrame", chosen: list[str], measured: list[str]) -> None:
    rows = side.rows.iloc[again["index"]]
    groups = again.groupby(chosen, sort=False).ngroup().to_numpy()
    left_out = {*chosen, *measured, "seconds"}
    apart = [column for column in rows if column not in left_out and rows[column].groupby(groups).nunique().max() > 1]
    apart = [column for column in apart if column in side.key] or apart
    tell = f"{', '.join(apart)} ({side.told(apart[0])})" if apart else "nothing that would tell them apart"
    first = ", ".join(f"{column}={again[column][0]}" for column in chosen)
    advice = f"{side.name.split(':')[0]}:{apart[0]}=…, or pair by it too (--by)" if apart else "one row of each, first"
    raise ValueError(
        f"{len(again):,} rows of {side.name} share a name with others, such as {first}. They differ in {tell}: choose"
        f" rows, as in {advice}."
    )


# ---------------------------------------------------------------------------------- differences


def _differences(
    left: _Side, right: _Side, rows: "pd.DataFrame", chosen: list[str], measured: list[str], notes: list[str]
) -> "pd.DataFrame":
    import pandas as pd

    found = []
    for name in measured:
        own, others = left.rows.loc[rows["a"].astype(int)], right.rows.loc[rows["b"].astype(int), name]
        part = own[chosen].reset_index(drop=True)
        part = part.assign(value=name, a=own[name].to_numpy(float), b=others.to_numpy(float))
        part["difference"] = part["b"] - part["a"]
        if n := int(part["difference"].isna().sum()):
            notes.append(f"left out: {n:,} pair{'s' if n != 1 else ''} without {name} in a or b")
        found.append(part.dropna(subset=["difference"]))
    return pd.concat(found, ignore_index=True)


def _groups(pairs: "pd.DataFrame", chosen: list[str]) -> "pd.DataFrame":
    names = [*(column for column in chosen if column != "seed"), "value"]
    grouped = pairs.groupby(names, sort=False, dropna=False)
    difference = ("difference", "mean")
    found = grouped.agg(
        n=("a", "size"), a=("a", "mean"), b=("b", "mean"), difference=difference, sd=("difference", "std")
    )
    return found.reset_index()


def _summary(pairs: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd
    from scipy.special import stdtrit

    found = []
    for name, of in pairs.groupby("value", sort=False)["difference"]:
        n, mean, sd = len(of), of.mean(), of.std()
        half = stdtrit(n - 1, 0.975) * sd / math.sqrt(n) if n > 1 else math.nan
        spread = {"mean": mean, "median": of.median(), "sd": sd, "min": of.min(), "max": of.max()}
        interval = {"low": mean - half, "high": mean + half}
        signs = {"higher": int((of > 0).sum()), "lower": int((of < 0).sum()), "equal": int((of == 0).sum())}
        found.append({"value": name, "n": n, **spread, **interval, **signs})
    return pd.DataFrame(found)


# ---------------------------------------------------------------------------------- for a terminal


def table(compared: Comparison, *, limit: int = 40) -> str:
    """A comparison as text for a terminal, at most 120 columns wide.

    Args:
        limit: groups that are shown.

    >>> study = "resilience_resnet20_cifar100"
    >>> print(table(compare(f"{study}:multiplier=float32", f"{study}:multiplier=mul8s_1KV6")).splitlines()[2])
    1 pair by network, topology, regime, seed, epochs
    """
    n = len(compared.pairs) // max(1, len(compared.summary))
    lines = [f"a: {compared.a}", f"b: {compared.b}"]
    lines += _wrapped(f"{n:,} pair{'s' if n != 1 else ''} by {', '.join(compared.by)}")
    varying = [column for column in compared.by if column != "seed" and len(set(_text(compared.groups[column]))) > 1]
    same = [column for column in compared.by if column not in varying and len(set(_text(compared.pairs[column]))) == 1]
    told = [f"{column} {_text(compared.pairs[column])[0]}".replace(" ", "\xa0") for column in same]  # one word each
    lines += _wrapped(f"  the same in all: {', '.join(told)}") if told else []
    for note in compared.notes:
        lines += _wrapped(f"  {note}")
    for whole in compared.summary.to_dict("records"):
        lines += ["", *_section(compared, whole, varying, limit)]
    return "\n".join([*lines, "", *_unpaired(compared)])


def _section(compared: Comparison, whole: dict, varying: list[str], limit: int) -> list[str]:
    """One value: its groups, and all pairs together."""
    name = whole["value"]
    pairs = compared.pairs[compared.pairs["value"] == name]
    percent = _is_share(name) and pairs[["a", "b"]].min().min() >= 0 and pairs[["a", "b"]].max().max() <= 1
    unit = (" in %, differences in percentage points" if percent else "") + ":"

    def number(value: float, sign: str = "") -> str:
        if math.isnan(value):
            return DASH
        return f"{round(100 * value, 2) + 0.0:{sign}.2f}" if percent else f"{value:{sign}.4g}"

    groups = compared.groups[compared.groups["value"] == name]
    seeds = "seed" in compared.by
    cells = [[*varying, "a", "b", "b - a", *(["sd over seeds", "seeds"] if seeds else [])]]
    for group in groups.head(limit).to_dict("records"):
        names = [_text_of(group[column]) for column in varying]
        means = [number(group["a"]), number(group["b"]), number(group["difference"], "+")]
        cells.append([*names, *means, *([number(group["sd"]), str(group["n"])] if seeds else [])])
    more = [f"… and {len(groups) - limit:,} more lines like these"] if len(groups) > limit else []
    signed = {part: number(whole[part], "+") for part in ("mean", "median", "min", "max", "low", "high")}
    interval = f"{signed['low']} to {signed['high']}" if whole["n"] > 1 else DASH
    return [
        f"{name}{unit}",
        *_aligned(cells, left=len(varying)),
        *more,
        f"b - a over {whole['n']:,} pair{'s' if whole['n'] != 1 else ''}: mean {signed['mean']}, median"
        f" {signed['median']}, sd {number(whole['sd'])}, from {signed['min']} to {signed['max']}",
        f"  95 % interval of the mean: {interval}; b is higher in {whole['higher']:,}, lower in {whole['lower']:,},"
        f" equal in {whole['equal']:,}",
    ]


def _is_share(name: str) -> bool:
    return bool(re.search("top1|accuracy", name))


def _text_of(value: object) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _aligned(cells: list[list[str]], *, left: int) -> list[str]:
    """Columns side by side, the first ``left`` of them flush left; the longest cell gives way if a line is too long."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    while sum(widths) + 2 * len(widths) > WIDTH and left:
        widest = max(range(left), key=lambda i: widths[i])
        if widths[widest] <= 8:
            break
        widths[widest] -= 1
    lines = []
    for line in cells:
        cut = [cell if len(cell) <= w else cell[: w - 1] + "…" for cell, w in zip(line, widths, strict=True)]
        padded = [f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cut, widths, strict=True))]
        lines.append("  " + "  ".join(padded).rstrip())
    return lines


def _unpaired(compared: Comparison) -> list[str]:
    lines = []
    for letter, rows in (("a", compared.only_in_a), ("b", compared.only_in_b)):
        telling = [c for c in compared.by if len({*_text(rows[c]), *_text(compared.pairs[c])}) > 1] or compared.by[-1:]
        names = [
            ", ".join(filter(None, row)) for row in zip(*(_text(rows[c].head(SHOWN)) for c in telling), strict=True)
        ]
        more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        told = f" ({', '.join(telling)}: {'; '.join(names)}{more})" if names else ""
        lines += _wrapped(f"only in {letter}: {len(rows):,} row{'s' if len(rows) != 1 else ''}{told}")
    return lines


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]

"""One tidy table of all runs: what they recorded, each row once, with where it came from.

    collect()                                              data/runs/collected.parquet and .csv
    collect(chapters=["05_networks"], publish=True)        and its rows of scale "paper" into data/results

A row is named by its study's key, at one scale. Where two runs recorded a row of the same name, nothing is written and
both are named: which of them counts is not for a program to say.

Chapter: 10, "Can a hundred runs be trusted?"
"""

import datetime
import difflib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from axmoe_lite import paths
from axmoe_lite.runs import store
from axmoe_lite.runs.evidence import EVIDENCE, command, read, record
from axmoe_lite.runs.notes import NOTES, studies
from axmoe_lite.runs.store import Run
from axmoe_lite.runs.tables import codes_of, read_text, typed, unite, write_table

if TYPE_CHECKING:
    import pyarrow as pa

FIRST = ("run", "chapter", "study")
SOURCE = "source file"  # a column of ours while we read: the index of the file that a row is from
VOLATILE = ("date", "commit", "version", "device")  # may differ between measurements that agree; so may any seconds
OTHER_CODE = "made by other code"
ADVICE = (
    "Take only runs of the present code (--current), or delete the folder of the run that is not to count. Rows that"
    " agree are settled by --keep-newest."
)
SHOWN = 3  # rows that a refusal describes, a study
PENDING = 256  # tables that are held apart before they are united


@dataclass(frozen=True)
class Collected:
    """What :func:`collect` found and wrote.

    Attributes:
        table: the rows of all runs; columns of text are dictionary-encoded.
        files: written: parquet and CSV.
        runs: how many have been read.
        skipped: how many were not, by state.
        published: rows that were new to ``data/results``, by study; None if it was not asked for.
    """

    table: "pa.Table"
    files: list[Path]
    runs: int
    skipped: dict[str, int]
    published: dict[str, int] | None = None

    def __str__(self) -> str:
        many = len(self.table["study"].unique())
        told = f"{_number(self.table.num_rows, 'row')} of {_number(many, 'study', 'studies')} from"
        lines = [f"{told} {_number(self.runs, 'finished run')}:", *(f"  {file}" for file in self.files)]
        if self.skipped:
            others = ", ".join(f"{count:,} {state}" for state, count in sorted(self.skipped.items()))
            lines.append(f"Not read: {others}.")
        if self.published is not None:
            new = {study: rows for study, rows in self.published.items() if rows}
            lines += [f"Written to {paths.results_dir() / study}.csv: {_number(n, 'row')}." for study, n in new.items()]
            lines += [] if new else [f"Nothing of scale 'paper' is new to {paths.results_dir()}."]
        return "\n".join(lines)


def _number(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


@dataclass(frozen=True)
class _Source:
    """A file of rows, the run it belongs to, and when that ended."""

    run: Run
    file: Path
    ended: float

    def __str__(self) -> str:
        return f"{self.run.id} ({self.file})"


@dataclass
class _Study:
    """All rows of a study, and what names them."""

    key: list[str]
    about: str
    tables: list["pa.Table"] = field(default_factory=list)

    def add(self, table: "pa.Table") -> None:
        self.tables.append(table)
        if len(self.tables) >= PENDING:  # ten thousand small tables weigh more than their rows
            self.tables = [self.united()]

    def united(self) -> "pa.Table":
        """All of its rows, which it keeps no longer: they are to be in memory once."""
        tables, self.tables = self.tables, []
        return unite(tables)


def collect(
    *,
    chapters: Iterable[str] = (),
    current: bool = False,
    keep_newest: bool = False,
    publish: bool = False,
    to: Path | None = None,
) -> Collected:
    """Put the rows of all finished runs into one table.

    Its columns are ``run``, ``chapter``, ``study``, and those of the studies, null where a study has no such column.

    Args:
        chapters: only runs of these; all if none is named.
        current: only runs of the present code.
        keep_newest: of two rows of the same key that agree (in all but date, commit, version, device and seconds),
            keep that of the run which ended later. Rows that do not agree are refused still.
        publish: also write the rows of scale "paper" to ``data/results``. A row that is there already and agrees stays
            as it is (or, with ``keep_newest``, is replaced if the run's is not older).
        to: the files' path, without ending; ``data/runs/collected`` otherwise.

    Raises:
        ValueError: before anything is written: for a chapter without runs, if no run has finished, for a row without
            its evidence or key, and for rows of the same key from two runs, or from a run and ``data/results``.
    """
    runs, skipped = _chosen(list(chapters), current)
    sources, found = _read(runs)
    kept, refused = {}, _Refused()
    for study, of in sorted(found.items()):
        kept[study] = _once(study, of.united(), of.key, sources, keep_newest, refused)
    refused.settle(ADVICE)
    plan = _plan(kept, found, sources, keep_newest) if publish else []
    keys = json.dumps({study: of.key for study, of in sorted(found.items())})
    stem = Path(to) if to else paths.runs_dir() / "collected"
    stem = stem.with_suffix("") if stem.suffix in (".parquet", ".csv") else stem
    table = typed(_tidy(kept, sources))
    files = write_table(stem, table, metadata={"keys": keys})
    for study, rows, made_by in plan:
        if rows:
            record(study, rows, key=tuple(found[study].key), about=found[study].about, made_by=made_by)
    published = {study: len(rows) for study, rows, _ in plan} if publish else None
    return Collected(table, files, len(runs), skipped, published)


# ---------------------------------------------------------------------------------- which runs


def _chosen(chapters: list[str], current: bool) -> tuple[list[tuple[Run, float]], dict[str, int]]:
    """Finished runs with the time of their end, and how many others there are, by state."""
    wanted, digests = {_chapter(name) for name in chapters}, {}
    runs, skipped = [], Counter()
    for run in store.all_runs():
        if wanted and run.chapter not in wanted:
            continue
        ended = store.outcome(run)
        state = ended["state"] if ended else run.state()
        if state == "finished" and current and run.source != _present_source(run, digests):
            state = OTHER_CODE
        if state == "finished":
            runs.append((run, _moment(run, ended.get("ended"))))
        else:
            skipped[state] += 1
    if not runs:
        others = ", ".join(f"{n} {state}" for state, n in skipped.items()) or "none at all"
        raise ValueError(f"There is no finished run to collect in {paths.runs_dir()} ({others}); start one: axmoe run")
    return runs, dict(skipped)


def _moment(run: Run, told: object) -> float:
    try:
        return datetime.datetime.fromisoformat(told).timestamp()
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{run.folder / 'outcome.json'} says that the run ended at {told!r}, which is no time; delete its folder to"
            " run it again."
        ) from None


def _chapter(name: str) -> str:
    known = sorted(folder.name for folder in paths.runs_dir().glob("*/") if not folder.name.startswith("."))
    for chapter in known:
        number, _, words = chapter.partition("_")
        if name in (chapter, number, number.lstrip("0"), words):
            return chapter
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"No chapter with runs is called {name!r}.{hint} There are {', '.join(known) or 'none'}.")


def _present_source(run: Run, digests: dict[str, str]) -> str:
    """The digest that a run would have now; a notebook from elsewhere is taken as the run has it."""
    chapter = paths.book_dir() / f"{run.chapter}.ipynb"
    if not chapter.exists():
        return store.source_digest(run.folder / "source.ipynb")
    if run.chapter not in digests:
        digests[run.chapter] = store.source_digest(chapter)
    return digests[run.chapter]


# ---------------------------------------------------------------------------------- their rows


def _read(runs: list[tuple[Run, float]]) -> tuple[list[_Source], dict[str, _Study]]:
    import pyarrow as pa

    sources: list[_Source] = []
    found: dict[str, _Study] = {}
    for run, ended in runs:
        for folder in sorted((run.folder / "rows").glob("*/")):
            notes = studies(folder)
            for file in sorted(folder.glob("*.csv")):
                table = read_text(file)
                _check(table, file, notes.get(file.stem, {}))
                note = notes[file.stem]
                known = found.setdefault(file.stem, _Study(note["key"], note.get("about", "")))
                if set(known.key) != set(note["key"]):
                    first = next(source for source in sources if source.file.stem == file.stem)
                    raise ValueError(
                        f"The rows of {file.stem} are named by {', '.join(known.key)} in {first}, and by"
                        f" {', '.join(note['key'])} in {run.id} ({file}); collect the runs of one version of the code."
                    )
                index = pa.array(np.full(table.num_rows, len(sources), np.int32))
                known.add(table.append_column(SOURCE, index))
                sources.append(_Source(run, file, ended))
    return sources, found


def _check(table: "pa.Table", file: Path, note: dict) -> None:
    """Refuse a file whose rows have no key, no evidence, or a column of ours."""
    if "key" not in note:
        raise ValueError(f"{file}: {NOTES} beside it does not say what names its rows; write rows with record().")
    for column in dict.fromkeys((*EVIDENCE, *note["key"])):
        if column not in table.column_names or table[column].null_count:
            empty = table[column].is_null() if column in table.column_names else [True]
            line = 2 + int(np.argmax(np.asarray(empty)))
            raise ValueError(f"{file}, line {line}: no {column}; every row needs its evidence and its key.")
    if taken := [column for column in (*FIRST, SOURCE) if column in table.column_names]:
        raise ValueError(
            f"{file} has a column {taken[0]!r}, which says where a row is from; record it as another name."
        )


def _tidy(kept: dict[str, "pa.Table"], sources: list[_Source]) -> "pa.Table":
    """One table of all studies, with the run, chapter and study of each row in front."""
    import pyarrow as pa

    def named(table: "pa.Table", names: list[str]) -> "pa.DictionaryArray":
        known = list(dict.fromkeys(names))
        place = {name: i for i, name in enumerate(known)}
        of_source = np.array([place[name] for name in names], np.int32)
        return pa.DictionaryArray.from_arrays(of_source[table[SOURCE].to_numpy()], known)

    text = pa.dictionary(pa.int32(), pa.string())
    tables = [pa.schema([(name, text) for name in FIRST]).empty_table()]  # the columns are there if no run has rows
    runs, chapters = [source.run.id for source in sources], [source.run.chapter for source in sources]
    for study in list(kept):
        table = kept.pop(study)
        front = [named(table, runs), named(table, chapters), named(table, [study] * len(sources))]
        rest = table.drop_columns([SOURCE])
        tables.append(pa.table([*front, *rest.columns], names=[*FIRST, *rest.column_names]))
    return unite(tables)


# ---------------------------------------------------------------------------------- each row once


def _once(
    study: str, table: "pa.Table", key: list[str], sources: list[_Source], keep_newest: bool, refused: "_Refused"
) -> "pa.Table":
    """The table with each key once; what cannot be settled is told to ``refused``."""
    names = codes_of(table, [*key, "scale"])
    ended = np.array([source.ended for source in sources])[table[SOURCE].to_numpy()]
    order = np.lexsort((ended, names))
    twice = np.flatnonzero(names[order][1:] == names[order][:-1])
    if not len(twice):
        return table
    earlier, later = order[twice], order[twice + 1]
    values = codes_of(table, [c for c in table.column_names if c not in (*key, SOURCE) and not _volatile(c)])
    conflicting = values[earlier] != values[later]
    if keep_newest and not conflicting.any():
        stays = np.ones(table.num_rows, bool)
        stays[earlier] = False
        return table.filter(stays)
    for n, pair in enumerate(np.argsort(~conflicting, kind="stable")):
        if n == SHOWN:
            break
        rows = table.take([earlier[pair], later[pair]]).to_pylist()
        refused.show(study, [*key, "scale"], rows, [sources[row.pop(SOURCE)] for row in rows])
    refused.conflicting += int(conflicting.sum())
    refused.duplicate += int((~conflicting).sum())
    return table


@dataclass
class _Refused:
    """Rows of the same key from two sources: how many, and the first few in words."""

    conflicting: int = 0
    duplicate: int = 0
    shown: int = 0
    lines: list[str] = field(default_factory=list)
    unnamed: dict[str, str] = field(default_factory=dict)

    def show(self, study: str, key: list[str], rows: list[dict], both: list) -> None:
        """Describe a row that two sources have."""
        differ = _differing(*rows, key)
        kind, name = "conflicting" if differ else "duplicate", ", ".join(f"{c}={rows[0][c]}" for c in key)
        self.lines.append(f"  {kind}: {study}, {name}")
        for row, source in zip(rows, both, strict=True):
            values = ", ".join(f"{column} {row.get(column) or 'empty'}" for column in differ)
            self.lines.append(f"    {source}{': ' if differ else ''}{values}")
        self.shown += 1
        if all(isinstance(source, _Source) for source in both):
            first, second = (source.run.parameters for source in both)
            differ = [name for name in first if first[name] != second.get(name)]
            self.unnamed |= {name: f"{name} ({first[name]}, {second.get(name)})" for name in differ}

    def settle(self, advice: str) -> None:
        """Raise if there is anything to refuse."""
        total = self.conflicting + self.duplicate
        if not total:
            return
        if self.unnamed:
            advice = f"These runs differ in {', '.join(self.unnamed.values())}, which the key does not name: let the"
            advice += " chapter record it as a column of the key, or collect chapters and sweeps apart."
        more = [f"  … and {total - self.shown:,} more"] if total > self.shown else []
        kinds = {"conflicting": self.conflicting, "duplicate": self.duplicate}
        counts = " and ".join(f"{n:,} {kind}" for kind, n in kinds.items() if n)
        told = [f"{counts} row{'s' if total > 1 else ''}; nothing was written.", *self.lines, *more, advice]
        raise ValueError("\n".join(told))


def _volatile(column: str) -> bool:
    return column in VOLATILE or column.startswith("seconds")


def _differing(one: dict, other: dict, key: list[str]) -> list[str]:
    """The measured columns in which two rows differ."""
    names = [c for c in one if c not in key and not _volatile(c)]
    return [c for c in names if (one[c] or "") != (other[c] or "")]


# ---------------------------------------------------------------------------------- into data/results


def _plan(
    kept: dict[str, "pa.Table"], found: dict[str, _Study], sources: list[_Source], keep_newest: bool
) -> list[tuple[str, list[dict], str]]:
    """Of each study the rows that ``data/results`` lacks, and the command that makes them; refuses contradictions."""
    import pyarrow.compute as pc

    plan, refused, notes = [], _Refused(), studies(paths.results_dir())
    for study, table in kept.items():
        of_paper = table.filter(pc.equal(table["scale"], "paper"))
        rows, key = of_paper.to_pylist(), found[study].key
        file, old = paths.results_dir() / f"{study}.csv", read(study)
        if not rows:
            continue
        _check_fits(file, old, rows, key, notes.get(study, {}).get("key", key))
        known = {tuple(row[c] for c in key): row for row in old}
        new: list[dict] = []
        plan.append((study, new, _made_by(of_paper, sources)))
        for row in rows:
            source = sources[row.pop(SOURCE)]
            row = {c: row[c] or "" for c in (old[0] if old else row)}
            there = known.get(tuple(row[c] for c in key))
            if there and _differing(there, row, key):
                refused.conflicting += 1
                if refused.shown < SHOWN:
                    refused.show(study, key, [there, row], [file, source])
            elif not there or (keep_newest and there != row and there["date"] <= row["date"]):
                new.append(row)
    refused.settle("Committed rows are never replaced by another result: delete the file's row, or the run's folder.")
    return plan


def _check_fits(file: Path, old: list[dict], rows: list[dict], key: list[str], its_key: list[str]) -> None:
    if set(key) != set(its_key):
        raise ValueError(
            f"The rows of {file} are named by {', '.join(its_key)}, those of the runs by {', '.join(key)}; nothing was"
            " written. Collect the runs of one version of the code, or publish under another study's name."
        )
    if old and (differ := set(old[0]) ^ (set(rows[0]) - {SOURCE})):
        raise ValueError(
            f"{file} has other columns than the runs' rows ({', '.join(sorted(differ))}); nothing was written. Record"
            " under another study's name."
        )


def _made_by(table: "pa.Table", sources: list[_Source]) -> str:
    """The command that makes the rows: of the chapter that ran last, all of its runs."""
    runs = [sources[index] for index in dict.fromkeys(table[SOURCE].to_pylist())]
    runs = sorted(runs, key=lambda source: source.ended)
    chapter = runs[-1].run.chapter
    return command(chapter, *(source.run.parameters for source in runs if source.run.chapter == chapter))

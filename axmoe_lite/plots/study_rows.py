"""Rows of a study as tables that figures can draw: checked, named, averaged over seeds, with their gaps.

Chapter: 11, "Does the paper hold?"
"""

import difflib
import math
import statistics
from collections.abc import Iterable

import pandas as pd

from axmoe_lite.models import TOPOLOGIES
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.plots.theme import check_evidence
from axmoe_lite.study import NETWORKS, REGIMES

KEY = ["network", "topology", "multiplier", "regime", "seed"]
NUMBERS = {"top1": float, "p_norm": float, "power_mw": float, "seed": int, "retrain_epochs": int, "retrain_images": int}
SETTINGS = ["experts", "r", "upcycle_epochs"]
OPTIONAL = ["gateway", "retrain_lr"]  # settings too, where rows have them
# What the hover says of a number, beside its seeds.
TOLD = ["dataset", "n_train", "n_test", "scale", "epochs", "upcycle_epochs", "retrain_epochs", "retrain_images"]
TOLD += ["retrain_lr", "gateway", "outcome", "commit", "date", "device"]


def to_table(rows: list[dict], chart: str, *, float32: bool = True) -> pd.DataFrame:
    """The rows as numbers, refused where they cannot be told apart; with ``power`` (%), ``kind`` and ``lost``."""
    columns = list(dict.fromkeys([*KEY, *NUMBERS, *SETTINGS, *TOLD]))
    rows = [{**dict.fromkeys(OPTIONAL, ""), **row} for row in rows if float32 or row.get("multiplier") != "float32"]
    if not any(row.get("multiplier") != "float32" for row in rows):
        raise ValueError(f"{chart}() was given no row of a multiplier; there is nothing to draw.")
    check_evidence(rows, "multiplier")
    for row in rows:
        missing = [c for c in columns if c not in row or (c in NUMBERS and row[c] in ("", None))]
        if missing:
            raise ValueError(f"{chart}() was given a row of {row.get('multiplier')!r} without {listed(missing)}.")
    table = pd.DataFrame(rows)[columns].astype(NUMBERS)
    check_known("topology", table["topology"], TOPOLOGIES)
    check_known("regime", table["regime"], REGIMES)
    outside = table["top1"][~table["top1"].between(0, 1)]
    if len(outside):
        raise ValueError(f"{chart}() was given a top1 of {outside.iloc[0]:g}; it lies in [0, 1].")
    table["power"] = (100 * table["power_mw"] / multiplier(EXACT).power_mw).round(2)
    table["family"], table["kind"] = table["network"], table["regime"]
    _label(table)
    exact = table[table.multiplier == EXACT].set_index(["network", "topology", "regime", "seed"])["top1"]
    places = pd.MultiIndex.from_frame(table[exact.index.names])
    table["lost"] = (100 * (exact.reindex(places).to_numpy() - table["top1"])).round(3)
    return table


def _label(table: pd.DataFrame) -> None:
    """Names for the menus, longer where short ones would mix settings; and no row twice, no two kinds of mixture."""
    quick = table["scale"].map({"quick": " (quick)"}).fillna("")
    table["network"] = table["network"] + ", " + table["dataset"] + quick
    _tell_apart(table, ["network"], ["n_train", "n_test", "epochs"], "{} training and {} test images, {} epochs")
    _tell_apart(table, ["network", "regime"], ["retrain_epochs", "retrain_images"], "{} epochs of {} images")
    table["retrain_lr"] = table["retrain_lr"].map(_number)
    _tell_apart(table, ["network", "regime"], ["retrain_lr"], "learning rate {}")
    for (network, topology), part in table.groupby(["network", "topology"], sort=False):
        for column in (*SETTINGS, "gateway"):
            values = part[column].map(_number).unique()
            if len(values) > 1:
                raise ValueError(
                    f"The rows of {network}, {topology} have {column} = {listed(values)}; one figure"
                    " shows one of them, so filter the rows."
                )
    twice = table[table.duplicated(KEY)]
    if len(twice):
        raise ValueError(f"{len(twice)} rows are there twice, such as {', '.join(map(str, twice[KEY].iloc[0]))}.")


def _number(value: float | str) -> str:
    """A number's text, the same for ``0``, ``"0"`` and ``0.0``; other text as it is."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return str(value)


def _tell_apart(table: pd.DataFrame, by: list[str], settings: list[str], words: str) -> None:
    """Append the settings to the last column of ``by``, wherever one group has several of them."""
    texts = pd.Series([words.format(*row) for row in table[settings].itertuples(index=False)], index=table.index)
    several = texts.groupby([table[c] for c in by]).transform("nunique") > 1
    table[by[-1]] = table[by[-1]].where(~several, table[by[-1]] + ", " + texts)


def summed(table: pd.DataFrame, *columns: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows by seed, their means over seeds, and the evidence of both, which they point at by ``origin``.

    Args:
        columns: to be kept beside the key, top-1 and the seeds: ``power``, ``p_norm``, ``lost``.
    """
    origins: dict[tuple, int] = {}
    rows = table.to_dict("records")

    def gathered(by: list[str]) -> pd.DataFrame:
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            groups.setdefault(tuple(row[name] for name in by), []).append(row)
        found = []
        for part in groups.values():
            told = tuple("; ".join(dict.fromkeys(str(row[c]) for row in part if row[c] != "")) for c in TOLD)
            place = {name: part[0][name] for name in KEY[:-1]}
            place |= {c: _mean([row[c] for row in part]) for c in ("top1", *columns)}
            place |= {"n": len(part), "seeds": listed(sorted(row["seed"] for row in part))}
            if "lost" in columns:
                place["pairs"] = sum(not math.isnan(row["lost"]) for row in part)
            if "seed" not in by:
                reached = [row["top1"] for row in part]
                place["spread"] = f"{min(reached):.2%} to {max(reached):.2%}"
            found.append({**place, "origin": origins.setdefault(told, len(origins))})
        return pd.DataFrame(found)

    seeds, means = gathered(KEY), gathered(KEY[:-1])
    told = pd.DataFrame([dict(zip(TOLD, t, strict=True)) for t in origins])
    return seeds, means, told.assign(origin=range(len(told)))


def _mean(values: list[float]) -> float:
    """Of what there is; NaN where there is nothing."""
    known = [value for value in values if not math.isnan(value)]
    return round(statistics.fmean(known), 5) if known else math.nan


def with_gaps(means: pd.DataFrame) -> pd.DataFrame:
    """Means, and rows without any for the multipliers that a network has and a line has not: there the line breaks."""
    have = means[["network", "multiplier", "power"]].drop_duplicates()
    every = means[["network", "regime", "topology"]].drop_duplicates().merge(have, on="network")
    keys = list(every.columns)
    return every.merge(means[[*keys, "top1"]], how="left", on=keys)


def not_run(table: pd.DataFrame, multipliers: list[str]) -> pd.DataFrame:
    """The networks, topologies and multipliers without any row."""
    have = set(zip(table.network, table.topology, table.multiplier, strict=True))
    cells = [(n, t, m) for n in networks_of(table) for t in TOPOLOGIES for m in multipliers if (n, t, m) not in have]
    return pd.DataFrame(cells, columns=KEY[:3])


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """A line for each network and regime: which topologies were not run, or not under every multiplier and seed."""
    notes = []
    for network, part in table.groupby("network", sort=False):
        of = part["multiplier"].nunique() * part["seed"].nunique()
        for regime in regimes_of(table):
            done = part[part.regime == regime]["topology"].value_counts()
            some = [f"{t} {of - done[t]} of {of} runs" for t in TOPOLOGIES if 0 < done.get(t, 0) < of]
            told = listed([t for t in TOPOLOGIES if t not in done] + some)
            told = told and (f"Not run: {told}." if len(done) else "Nothing of this was run.")
            notes.append({"network": network, "regime": regime, "note": told})
    return pd.DataFrame(notes)


def in_words(cells: list[tuple[str, str, int]], most: int = 5) -> str:
    """Cells (multiplier, regime, seed) in words.

    >>> in_words([("mul8s_1L2L", "retrained", 0), ("mul8s_1L2L", "retrained", 2), ("mul8s_1KVA", "retrained", 0)])
    'L2L retrained (seed 0, 2), KVA retrained (seed 0)'
    """
    seeds: dict[str, list[int]] = {}
    for name, regime, seed in cells:
        seeds.setdefault(f"{short(name)} {regime}", []).append(seed)
    told = [f"{cell} (seed {listed(of)})" for cell, of in seeds.items()]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "") or "nothing"


def networks_of(table: pd.DataFrame) -> dict[str, str]:
    """Names in the menu, in the order of :data:`~axmoe_lite.study.NETWORKS`, quick ones last; and whose each is."""
    order = {name: n for n, name in enumerate(NETWORKS)}
    places = zip(table["scale"] == "quick", table["family"].map(order).fillna(len(order)), strict=True)
    found = dict(zip(table["network"], zip(places, table["family"], strict=True), strict=True))
    return {name: family for name, (_, family) in sorted(found.items(), key=lambda item: item[1])}


def regimes_of(table: pd.DataFrame) -> dict[str, str]:
    """Names on the buttons, in the order of :data:`~axmoe_lite.study.REGIMES`, and the regime that each is of."""
    found = dict(zip(table["regime"], table["kind"], strict=True))
    return dict(sorted(found.items(), key=lambda item: REGIMES.index(item[1])))


def short(name: str) -> str:
    """A circuit's name as the figures write it."""
    return name.replace("mul8s_1", "")


def listed(values: Iterable) -> str:
    """``0, 1, 2``"""
    return ", ".join(map(str, values))


def check_known(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not known, with the nearest that is."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"No {kind} is called {name!r}. Did you mean {near!r}? There are {', '.join(known)}.")


def spread(places: list[float], gap: float) -> list[float]:
    """Ascending places moved, as little as least squares can, until neighbours are ``gap`` apart.

    >>> spread([0.0, 10.0, 11.0, 30.0], 5)
    [0.0, 8.0, 13.0, 30.0]
    """
    blocks: list[list[float]] = []  # mean of (place - number * gap), members
    for n, place in enumerate(places):
        blocks.append([place - n * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, members = blocks.pop()
            old, olds = blocks[-1]
            blocks[-1] = [(old * olds + mean * members) / (olds + members), olds + members]
    starts = [mean for mean, members in blocks for _ in range(int(members))]
    return [start + n * gap for n, start in enumerate(starts)]

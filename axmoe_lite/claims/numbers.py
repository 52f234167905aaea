"""The paper's printed numbers beside ours.

Accuracies of two trainings differ before any multiplier is approximate. So where the paper's own exact accuracy is
known, or deduced, the distances from it are compared; otherwise the accuracies as they are.

Chapter: 11, "Does the paper hold?"
"""

import math

from axmoe_lite.claims.cells import Cells, Contrast, contrast, short
from axmoe_lite.claims.paper import NUMBERS, Number
from axmoe_lite.claims.parts import (
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    SAME_COST,
    in_order,
    interval_columns,
    sample,
    sentence,
    span,
)
from axmoe_lite.claims.statistics import Interval
from axmoe_lite.multipliers import EXACT
from axmoe_lite.study import REGIMES

NEAR = 2  # points, not from the paper: so far apart two trainings of one network may end


def number_lines(cells: Cells) -> list[dict]:
    """One line for each row of the table, and below it one for each accuracy and cost in it."""
    found = []
    for row in dict.fromkeys(number.id for number in NUMBERS):
        below = []
        numbers = [number for number in NUMBERS if number.id == row]
        for number in numbers:
            common = {"claim": row, "statement": number.statement, "source": number.source, "network": number.network}
            below += [_accuracy(cells, number) | common] if number.top1 is not None else []
            below += [_cost(cells, number) | common] if number.p_norm else []
        found += [in_order(line) for line in (_whole(numbers, below), *below)]
    return found


def _accuracy(cells: Cells, number: Number) -> dict:
    """Where the summary does not say which regime it means, both have to say the same; the nearer one is shown."""
    readings = [_reading(cells, number, regime) for regime in number.regimes]
    line = min(readings, key=lambda line: abs(line.get("effect", math.inf)))
    line["part"] = f"{number.network}: {number.topology}, {number.what}"
    if len(readings) > 1:
        told = [f"{regime}: {each['reason']}" for regime, each in zip(number.regimes, readings, strict=True)]
        line["reason"] = " ".join(["It is not said whether it was retrained.", *map(sentence, told)])
        if len({each["verdict"] for each in readings}) > 1:
            line["verdict"] = NOT_TESTABLE
    line["reason"] += f" {number.note}" if number.note else ""
    return line


def _reading(cells: Cells, number: Number, regime: str) -> dict:
    term, own = (number.topology, number.multiplier, regime), (number.topology, EXACT, REGIMES[0])
    base, relative = number.base_of or own, number.base is not None
    found = contrast(cells, number.network, {term: 1, base: -1} if relative else {term: 1})
    printed = number.top1 - number.base if relative else number.top1
    kind = "top-1 accuracy"
    if relative:
        there = "the exact multiplier" if base == own else f"{base[0]} under {short(base[1])}, {base[2]}"
        kind = f"distance from {there}"
    line = {"comparison": f"{kind}, ours ({regime}) against the paper's"}
    if found.interval is None:
        return line | {
            "measured": f"the paper: {printed:.2f}",
            "verdict": NOT_TESTABLE,
            "reason": sentence(found.problem),
        }
    verdict, reason = _below(found.interval, printed) if number.below else _agrees(found.interval, printed, relative)
    line |= interval_columns(found.interval, shift=printed)
    line |= {"p": found.interval.p(printed), "test": f"{found.interval.test}; p of no difference from the paper"}
    return line | {"measured": _measured(found, printed, relative, number), "verdict": verdict, "reason": reason}


def _measured(found: Contrast, printed: float, relative: bool, number: Number) -> str:
    unit = "points" if relative else "%"
    told = f"ours {found.interval.estimate:.2f} {unit} ({span(found.interval)})"
    told += f", the paper {'below ' if number.below else ''}{printed:.2f} {unit}"
    return "; ".join((told, *found.notes))


def _agrees(found: Interval, printed: float, relative: bool) -> tuple[str, str]:
    unit = "points" if relative else "%"
    apart = abs(found.estimate - printed)
    near, inside = apart <= NEAR, found.low <= printed <= found.high
    told = f"ours is {found.estimate:.1f} {unit} ({span(found)}), the paper's {printed:.1f}, {apart:.1f} points apart"
    if near or inside:
        return REPRODUCED, sentence(f"{told}: {f'within {NEAR}' if near else 'inside our interval'}")
    return NOT_REPRODUCED, sentence(f"{told}: more than {NEAR}, and outside our interval")


def _below(found: Interval, bound: float) -> tuple[str, str]:
    told = f"ours is {found.estimate:.1f} % ({span(found)}), the paper's below {bound:g}"
    if found.high < bound:
        return REPRODUCED, sentence(told)
    if found.low >= bound:
        return NOT_REPRODUCED, sentence(f"{told}: all of our interval lies above that")
    return NOT_TESTABLE, sentence(f"{told}: too close to tell with {sample(found)}")


def _cost(cells: Cells, number: Number) -> dict:
    """P_norm does not depend on training but for a mixture's routing, so any regime's rows will do."""
    line = {"part": f"{number.network}: {number.topology}, P_norm", "comparison": "P_norm, ours against the paper's"}
    terms = [(number.topology, number.multiplier, regime) for regime in REGIMES]
    found = [c for term in terms for c in cells.of(number.network, term) if c.p_norm is not None]
    if not found:
        place = f"{number.network} {number.topology} under {number.multiplier}"
        return line | {
            "measured": f"the paper: {number.p_norm}",
            "verdict": NOT_TESTABLE,
            "reason": f"No row of {place} was measured, so its P_norm is not known.",
        }
    ours = sum(cell.p_norm for cell in found) / len(found)
    low, high = printed_range(number.p_norm)
    inside = low - 1e-9 <= ours <= high + 1e-9
    agrees = inside or low * (1 - SAME_COST) <= ours <= high * (1 + SAME_COST)
    told = "agrees" if inside else f"agrees within {SAME_COST:.0%}" if agrees else "disagrees"
    return line | {
        "measured": f"ours {ours:.4f}, the paper {number.p_norm}",
        "test": "none: both are counted",
        "seeds": len({cell.seed for cell in found}),
        "n_test": found[0].n_test,
        "verdict": REPRODUCED if agrees else NOT_REPRODUCED,
        "reason": f"Ours is {ours:.4f}, which {told} with the printed {number.p_norm}. {number.cost_note}".rstrip(),
    }


def printed_range(text: str) -> tuple[float, float]:
    """What a printed number can stand for.

    >>> printed_range("0.71"), printed_range("2 to 3")
    ((0.705, 0.715), (2.0, 3.0))
    """
    if " to " in text:
        low, high = map(float, text.split(" to "))
        return low, high
    digits = len(text.partition(".")[2])
    half = 0.5 * 10**-digits
    return round(float(text) - half, digits + 1), round(float(text) + half, digits + 1)


def _whole(numbers: list[Number], below: list[dict]) -> dict:
    verdict = next(v for v in (NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED) if any(b["verdict"] == v for b in below))
    told = [line for line in below if line["verdict"] == verdict]
    first = told[0]
    whole = {column: first.get(column) for column in first} | {"part": "", "verdict": verdict}
    whole["statement"] = " ".join(number.statement for number in numbers)
    whole["measured"] = "; ".join(f"{line['part']}: {line['measured']}" for line in below)
    return whole | {"reason": " ".join(f"{line['part']}: {line['reason']}" for line in told)}

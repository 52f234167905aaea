"""From what was measured to a verdict and a reason: one line a comparison, one line the claim.

A claim holds if all its comparisons do, which needs no correction for their number. That one of many fails may be
chance, so a claim fails only where a p-value says so after Holm's correction.

Chapter: 11, "Does the paper hold?"
"""

from collections.abc import Callable
from dataclasses import dataclass

from axmoe_lite.claims.cells import Contrast, named
from axmoe_lite.claims.statistics import Interval, holm, paired_t

REPRODUCED, NOT_REPRODUCED, NOT_TESTABLE = VERDICTS = ("reproduced", "not reproduced", "not testable here")
LEVEL = 0.05  # not from the paper
SAME_COST = 0.01  # relative difference of two P_norm, not from the paper
COLUMNS = (
    "claim", "part", "statement", "source", "network", "comparison", "measured", "effect", "low", "high", "goal", "p",
    "test", "seeds", "n_test", "verdict", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Goal:
    """Where the whole interval has to lie for a yes: ``"above"``, ``"below"`` or ``"within"`` so many points."""

    kind: str
    bound: float

    def holds(self, found: Interval) -> bool:
        """Whether all of the interval is there."""
        return self._inside(found) > 0

    def fails(self, found: Interval) -> bool:
        """Whether none of the interval is there."""
        if self.kind == "within":
            return found.low > self.bound or found.high < -self.bound
        return found.high < self.bound if self.kind == "above" else found.low > self.bound

    @property
    def bounds(self) -> tuple[float, ...]:
        """The one, or the two."""
        return (-self.bound, self.bound) if self.kind == "within" else (self.bound,)

    def p(self, found: Interval) -> float:
        """Of the effect being exactly at the bound; of the nearer one if there are two."""
        return max(found.p(bound) for bound in self.bounds)

    def margin(self, effect: float) -> float:
        """How far inside an effect lies, in points; negative outside."""
        if self.kind == "within":
            return self.bound - abs(effect)
        return effect - self.bound if self.kind == "above" else self.bound - effect

    def _inside(self, found: Interval) -> float:
        return min(self.margin(found.low), self.margin(found.high))

    def __str__(self) -> str:
        """As it reads after "the interval lies".

        >>> print(Goal("above", -1), Goal("within", 5), sep="; ")
        above -1; within ±5
        """
        return f"{self.kind} {'±' if self.kind == 'within' else ''}{self.bound:g}"


@dataclass(frozen=True)
class Part:
    """One comparison of a claim.

    Attributes:
        name: such as ``"resnet20: hard - dense"``.
        comparison: what against what, in words.
        measured: the numbers behind the effect, in words.
        says: the effect as a clause, given its size in points.
        problem: why it cannot be told although it was measured, or "".
        empty: whether there is nothing to tell, so that the claim does not wait for it.
        test: more than the interval's own test, or "".
    """

    name: str
    network: str
    comparison: str
    found: Contrast
    goal: Goal
    says: Callable[[float], str]
    measured: str = ""
    problem: str = ""
    empty: bool = False
    test: str = ""


def lines(parts: list[Part], *, claim: str, statement: str, source: str, measured: str = "") -> list[dict]:
    """The claim's own line, and below it one line for each comparison.

    Args:
        measured: of the claim as a whole, beside how many comparisons hold.
    """
    tested = [part for part in parts if not (part.problem or part.found.problem)]
    corrected = holm([part.goal.p(part.found.interval) for part in tested])
    p_holm = dict(zip((part.name for part in tested), corrected, strict=True))
    common = {"claim": claim, "statement": statement, "source": source}
    below = [_part_line(part, p_holm.get(part.name), len(tested)) | common for part in parts]
    whole = _summary(parts, below, p_holm, measured) | common
    whole["reason"] += _of_one_seed(parts, below, whole["verdict"])
    return [in_order(line) for line in (whole, *below)]


def in_order(line: dict) -> dict:
    """A line with all columns; None where there is nothing to say."""
    return {column: line.get(column) for column in COLUMNS}


def interval_columns(found: Interval, *, shift: float = 0.0) -> dict:
    """Columns of an effect, relative to ``shift``."""
    return {
        "effect": found.estimate - shift,
        "low": found.low - shift,
        "high": found.high - shift,
        "seeds": found.n_seeds,
        "n_test": found.n_images,
    }


def span(found: Interval, *, shift: float = 0.0) -> str:
    """The interval in words.

    >>> from axmoe_lite.claims.statistics import unpaired_normal
    >>> span(unpaired_normal([[0.7, 0.6]], [100, -100], n_images=10_000))
    '95 %: 8.7 to 11.3'
    """
    return f"95 %: {found.low - shift:.1f} to {found.high - shift:.1f}"


def sample(found: Interval) -> str:
    """How much was measured, in words."""
    return f"{found.n_seeds} seed{'s' if found.n_seeds > 1 else ''} and {found.n_images:,} images"


def sentence(text: str) -> str:
    """With a capital and a full stop; names of networks keep their small letter.

    >>> sentence("hard loses 3 points"), sentence("resnet20 was not run")
    ('Hard loses 3 points.', 'resnet20 was not run.')
    """
    first = text.split(" ")[0].rstrip(":")
    named = any(letter.isdigit() or letter == "_" for letter in first)
    return f"{text if named else text[:1].upper() + text[1:]}{'' if text.endswith('.') else '.'}"


def _part_line(part: Part, p_holm: float | None, among: int) -> dict:
    found = part.found.interval
    line = {"part": part.name, "network": part.network, "comparison": part.comparison, "goal": str(part.goal)}
    line["measured"] = "; ".join(text for text in (part.measured, *part.found.notes) if text)
    if found is None:
        return line | {"verdict": NOT_TESTABLE, "reason": sentence(part.found.problem or part.problem)}
    line |= interval_columns(found) | {"p": part.goal.p(found), "test": _test(part, found, p_holm, among)}
    says = f"{part.says(found.estimate)} ({span(found)})"
    if part.problem:
        return line | {"verdict": NOT_TESTABLE, "reason": sentence(f"{says}, but {part.problem}")}
    if part.goal.holds(found):
        return line | {"verdict": REPRODUCED, "reason": sentence(f"{says}: all of it lies {part.goal}")}
    if part.goal.fails(found) and p_holm < LEVEL:
        return line | {"verdict": NOT_REPRODUCED, "reason": sentence(f"{says}: none of it lies {part.goal}")}
    why = f"part of it lies {part.goal} and part not, too close to tell with {sample(found)}"
    if part.goal.fails(found):
        why = f"none of it lies {part.goal}, but among {among} that may be chance (corrected p = {p_holm:.2f})"
    return line | {"verdict": NOT_TESTABLE, "reason": sentence(f"{says}: {why}")}


def _test(part: Part, found: Interval, p_holm: float | None, among: int) -> str:
    texts = [found.test, f"p against {' and '.join(f'{bound:g}' for bound in part.goal.bounds)}"]
    if p_holm is not None and among > 1:
        texts.append(f"{p_holm:.3g} after Holm's correction for {among} comparisons")
    texts += [f"standard deviation over seeds {found.spread:.2f}"] if found.spread is not None else []
    over_seeds = [paired_t(found.per_seed, null=bound) for bound in part.goal.bounds]
    if None not in over_seeds:
        texts.append(f"t over {found.n_seeds} seeds alone: p = {max(over_seeds):.3g}, uncorrected")
    return "; ".join([*texts, *([part.test] if part.test else [])])


def _summary(parts: list[Part], below: list[dict], p_holm: dict[str, float], measured: str) -> dict:
    """The claim's line from those of its parts."""
    counted = [(part, line) for part, line in zip(parts, below, strict=True) if not part.empty]
    if not counted:
        reason = f"There is nothing to tell: {below[0]['reason']}" if below else "There are no rows for it."
        return {"part": "", "measured": measured, "verdict": NOT_TESTABLE, "reason": reason}
    groups = {v: [(part, line) for part, line in counted if line["verdict"] == v] for v in VERDICTS}
    verdict = next(v for v in (NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED) if groups[v])
    part, line = _deciding(groups[verdict], verdict)
    whole = {"part": "", "network": ", ".join(dict.fromkeys(part.network for part, _ in counted)), "verdict": verdict}
    whole |= {column: line.get(column) for column in ("comparison", "effect", "low", "high", "goal", "p", "test")}
    if verdict == REPRODUCED:
        whole["p"] = max(other["p"] for _, other in counted)  # that all hold is as sure as the least sure of them
    if verdict == NOT_REPRODUCED:
        whole["p"] = min(p_holm[other.name] for other, _ in groups[verdict])
    for column in ("seeds", "n_test"):  # the least of them: a claim is as well founded as its weakest part
        whole[column] = min((other[column] for _, other in counted if other.get(column)), default=None)
    told = ", ".join(
        f"{len(groups[v])} {says[len(groups[v]) > 1]}"
        for v, says in zip(
            VERDICTS,
            (("holds", "hold"), ("speaks against it", "speak against it"), ("cannot be told",) * 2),
            strict=True,
        )
        if groups[v]
    )
    whole["measured"] = "; ".join(text for text in (f"of {len(counted)} comparisons {told}", measured) if text)
    return whole | {"reason": _reason(groups, verdict, part, line)}


def _of_one_seed(parts: list[Part], below: list[dict], verdict: str) -> str:
    """A warning, where what decides the verdict was measured on one training."""
    found = [part.found.interval for part, line in zip(parts, below, strict=True) if line["verdict"] == verdict]
    measured = [interval for interval in found if interval]
    alone = sum(interval.n_seeds == 1 for interval in measured)
    if not alone:
        return ""
    which = "One seed" if alone == len(measured) else f"One seed in {alone} of these {len(measured)}"
    return f" {which}: what another training would give is not in the interval."


def _deciding(group: list[tuple[Part, dict]], verdict: str) -> tuple[Part, dict]:
    """The part that is nearest to saying otherwise; of those that speak against it, the one that does so most."""
    if verdict == NOT_TESTABLE:
        return next((pair for pair in group if pair[0].found.interval is None or pair[0].problem), group[0])
    return min(group, key=lambda pair: pair[0].goal.margin(pair[0].found.interval.estimate))


def _reason(groups: dict[str, list], verdict: str, part: Part, line: dict) -> str:
    n, here = sum(map(len, groups.values())), f"{part.name}: {line['reason']}"
    if n == 1:
        return line["reason"]
    if verdict == REPRODUCED:
        return f"All {n} comparisons hold. The closest is {here}"
    if verdict == NOT_REPRODUCED:
        against = len(groups[verdict])
        return f"{against} of {n} comparisons speak{'s' * (against == 1)} against it, most of all {here}"
    missing = [place for other, _ in groups[verdict] for place in other.found.missing]
    blocked = sum(other.found.interval is None or bool(other.problem) for other, _ in groups[verdict])
    close = len(groups[verdict]) - blocked
    why = [f"{blocked} cannot be made"] * bool(blocked) + [
        f"{close} {'is' if close == 1 else 'are'} too close to tell"
    ] * bool(close)
    told = f"Nothing speaks against it, but of {n} comparisons {' and '.join(why)}. "
    return told + (f"Rows are missing: {named(missing)}." if missing else f"The first is {here}")

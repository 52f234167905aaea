"""Which of the paper's claims our rows bear out: a rule for each, and the ledger they fill.

    for line in judge(rows, answers):
        print(line["claim"], line["part"], line["verdict"], line["reason"])

The rules are ours, the paper gives none: where it says "recovers" or "comparable", the constants below say how much.

Chapter: 11, "Does the paper hold?"
"""

import math
from collections.abc import Callable, Iterable, Mapping

from axmoe_lite.claims.cells import Cells, Term, chance, contrast, read_cells, short, some
from axmoe_lite.claims.numbers import number_lines
from axmoe_lite.claims.paper import AGGRESSIVE, CLAIMS, CNNS, NETWORKS, UNPLACED, VIT
from axmoe_lite.claims.parts import SAME_COST, Goal, Part, lines
from axmoe_lite.claims.statistics import mcnemar
from axmoe_lite.models import TOPOLOGIES
from axmoe_lite.multipliers import EXACT, PAPER_EIGHT
from axmoe_lite.study import regimes_for

# None of these is from the paper. Points of top-1 accuracy where nothing else is said.
FLOOR = 2  # times chance: a topology below it cannot lose more, and what it has lost is only where it began
COMPARABLE = 2
RECOVERED_FULLY = 1
RECOVERED = 2
FAILED = 10
HALF = 0.5  # of what a multiplier costs: what more than half of it is due to is its cause
MOST = 0.9  # of what retraining returns
WORTH = 1  # where less was lost, or returned, there is no share to speak of

APPROXIMATE = tuple(name for name in PAPER_EIGHT if name != EXACT)
NOT, BIAS, NORMS, YES = "not retrained", "bias corrected", "norms refreshed", "retrained"


def judge(
    rows: Iterable[Mapping], answers: Iterable[Mapping] = (), *, instead: Mapping[str, str] | None = None
) -> list[dict]:
    """Judge every claim and printed number of the paper by the rows of a study.

    Args:
        rows, answers: see :func:`~axmoe_lite.claims.cells.read_cells`. Without answers intervals are wider.
        instead: a network of ours that stands where a claim has another, as in ``{"resnet20": "resnet8"}``; printed
            numbers are compared with their own networks only.

    Returns:
        Dicts with the columns :data:`~axmoe_lite.claims.parts.COLUMNS`: for each claim one whose ``part`` is "", and
        one for each comparison it is made of. ``effect``, ``low`` and ``high`` (95 %) are in points, ``p`` is corrected
        for the number of comparisons, ``verdict`` is "reproduced", "not reproduced" or "not testable here", and
        ``reason`` a sentence. None where there is nothing to say.

    Raises:
        ValueError: for rows that contradict each other, see there; or an ``instead`` for no network of the paper.

    >>> [(line["claim"], line["verdict"]) for line in judge([]) if not line["part"]][:2]
    [('C1', 'not testable here'), ('C2', 'not testable here')]
    """
    instead = dict(instead or {})
    unknown = [name for name in instead if name not in NETWORKS]
    if unknown:
        raise ValueError(f"instead= names {unknown[0]!r}; the paper's networks are {', '.join(NETWORKS)}.")
    if len({instead.get(name, name) for name in NETWORKS}) < len(NETWORKS):
        raise ValueError("instead= puts one network in two places; each of the paper's needs one of its own.")
    cells = read_cells(rows, answers)
    found = []
    for claim in CLAIMS.values():
        parts, measured = RULES[claim.id](cells, lambda name: instead.get(name, name))
        if claim.id.startswith("C"):
            there = {part.network for part in parts}
            stand = [f"{ours} stands where the paper has {name}" for name, ours in instead.items() if ours in there]
            measured = "; ".join(text for text in (*stand, measured) if text)
        found += lines(parts, claim=claim.id, statement=claim.statement, source=claim.source, measured=measured)
    return found + number_lines(cells)


# ----------------------------------------------------------------------------------- without retraining


def _c1(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    networks = [ours(name) for name in CNNS]
    parts = [part for name in networks for part in _resilience(cells, name, Goal("above", 0))]
    return parts, "; ".join(text for name in networks if (text := _who_kept_most(cells, name)))


def _c2(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    return _resilience(cells, ours(VIT), Goal("within", COMPARABLE)), _who_kept_most(cells, ours(VIT))


def _resilience(cells: Cells, network: str, goal: Goal) -> list[Part]:
    """Every other topology against Dense: by how much more its accuracy drops on the mean of the multipliers."""
    used = [name for name in APPROXIMATE if not _is_at_floor(cells, network, name)]
    at_floor = ", ".join(short(name) for name in APPROXIMATE if name not in used)
    left_out = f"left out, a topology is below {FLOOR} x chance there and has no more to lose: {at_floor}"
    parts = []
    for other in TOPOLOGIES[1:]:
        terms: dict[Term, float] = {}
        for topology, sign in ((other, 1), ("dense", -1)):
            terms[topology, EXACT, NOT] = sign
            terms |= {(topology, name, NOT): -sign / len(used) for name in used}
        found = contrast(cells, network, terms)
        drops = ", ".join(text for t in (other, "dense") if (text := _drop(cells, network, t, used, found.seeds)))
        parts.append(
            Part(
                name=f"{network}: {other} - dense",
                network=network,
                comparison=f"points lost by {other} against points lost by dense, mean of {len(used)} multipliers",
                found=found,
                goal=goal,
                says=lambda e, other=other: f"{other} loses {abs(e):.1f} points {_more(e)} than dense",
                measured="; ".join(text for text in (drops, left_out if at_floor else "") if text),
                problem=""
                if used
                else "a topology is near chance under every multiplier, so nothing is left to compare",
            )
        )
    return parts


def _is_at_floor(cells: Cells, network: str, multiplier: str) -> bool:
    terms = [(topology, multiplier, NOT) for topology in TOPOLOGIES]
    measured = {term: found[0] for term in terms if (found := cells.of(network, term))}
    return any(cells.top1(network, term) < 100 * FLOOR * chance(cell.dataset) for term, cell in measured.items())


def _drop(cells: Cells, network: str, topology: str, multipliers: list[str], seeds: tuple[int, ...]) -> str:
    exact, *others = (cells.top1(network, (topology, name, NOT), seeds) for name in (EXACT, *multipliers))
    if exact is None or None in others or not others:
        return ""
    kept = sum(others) / len(others)
    return f"{topology} loses {exact - kept:.1f} of {exact:.1f} and keeps {kept:.1f}"


def _who_kept_most(cells: Cells, network: str) -> str:
    """Under which multipliers each topology lost least."""
    kept: dict[str, list[str]] = {}
    for name in (name for name in APPROXIMATE if not _is_at_floor(cells, network, name)):
        drops = {}
        for topology in TOPOLOGIES:
            exact, left = (cells.top1(network, (topology, each, NOT)) for each in (EXACT, name))
            if exact is not None and left is not None:
                drops[topology] = exact - left
        if len(drops) == len(TOPOLOGIES):
            kept.setdefault(min(drops, key=drops.get), []).append(short(name))
    told = "; ".join(f"{topology} under {', '.join(names)}" for topology, names in kept.items())
    return f"on {network} the least was lost by {told}" if told else ""


# ----------------------------------------------------------------------------------- after retraining


def _c3(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    network = ours("resnet20")
    goal = Goal("above", -RECOVERED_FULLY)
    parts = [_recovery(cells, network, t, m, goal) for t in TOPOLOGIES for m in APPROXIMATE]
    # Four networks that end a little too low each may be chance; all four together need not be.
    parts += [_recovery_of_all(cells, network, m, goal) for m in APPROXIMATE]
    return parts, _effort(cells, network)


def _c4(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    parts = []
    for paper_name in ("vgg11_bn", "vgg19_bn"):
        network = ours(paper_name)
        for topology in TOPOLOGIES:
            spared = (paper_name, topology) == ("vgg11_bn", "cluster")
            for name in (name for name in APPROXIMATE if name not in UNPLACED):
                if name not in AGGRESSIVE:
                    parts.append(_recovery(cells, network, topology, name, Goal("above", -RECOVERED)))
                elif not spared:
                    parts.append(_recovery(cells, network, topology, name, Goal("below", -FAILED)))
                else:
                    parts += [_spared(cells, network, other, name) for other in TOPOLOGIES if other != topology]
    efforts = [_effort(cells, ours(name)) for name in ("vgg11_bn", "vgg19_bn")]
    unplaced = f"left out, it is not said whether it is aggressive: {', '.join(map(short, UNPLACED))}"
    return parts, "; ".join(text for text in (*efforts, unplaced) if text)


def _recovery(cells: Cells, network: str, topology: str, multiplier: str, goal: Goal) -> Part:
    """Retrained under a multiplier, against the same network retrained under the exact one: the fair control."""
    name = short(multiplier)
    here, control = (topology, multiplier, YES), (topology, EXACT, YES)
    found = contrast(cells, network, {here: 1, control: -1})
    levels = [cells.top1(network, term, found.seeds) for term in (here, control, (topology, EXACT, NOT))]
    measured = ""
    if None not in levels:
        measured = f"{levels[0]:.1f} % against {levels[1]:.1f} % retrained under KV6 and {levels[2]:.1f} % under KV6 "
        measured += f"before retraining ({levels[0] - levels[2]:+.1f})"
    return Part(
        name=f"{network}: {topology}, {name} - KV6",
        network=network,
        comparison=f"{topology} retrained under {name} against {topology} retrained under KV6",
        found=found,
        goal=goal,
        says=lambda e: f"{topology} retrained under {name} ends {abs(e):.1f} points {_above(e)} itself under KV6",
        measured=measured,
    )


def _recovery_of_all(cells: Cells, network: str, multiplier: str, goal: Goal) -> Part:
    """As :func:`_recovery`, on the mean of the topologies."""
    name, share = short(multiplier), 1 / len(TOPOLOGIES)
    sides = {multiplier: share, EXACT: -share}
    found = contrast(cells, network, {(t, m, YES): factor for m, factor in sides.items() for t in TOPOLOGIES})
    measured = ""
    if found.interval:
        here, control = (sum(cells.top1(network, (t, m, YES), found.seeds) for t in TOPOLOGIES) * share for m in sides)
        measured = f"{here:.1f} % against {control:.1f} % retrained under KV6"
    return Part(
        name=f"{network}: mean of {len(TOPOLOGIES)} topologies, {name} - KV6",
        network=network,
        comparison=f"all topologies retrained under {name} against all retrained under KV6",
        found=found,
        goal=goal,
        says=lambda e: f"all retrained under {name} end {abs(e):.1f} points {_above(e)} all under KV6",
        measured=measured,
    )


def _spared(cells: Cells, network: str, other: str, multiplier: str) -> Part:
    """Whether Cluster loses less than another topology does. It may lose much: the summary prints 42.5 % for it."""
    name = short(multiplier)
    terms = {("cluster", multiplier, YES): 1, ("cluster", EXACT, YES): -1}
    terms |= {(other, multiplier, YES): -1, (other, EXACT, YES): 1}
    found = contrast(cells, network, terms)
    levels = [cells.top1(network, term, found.seeds) for term in terms]
    measured = ""
    if found.interval:
        measured = "{} {:.1f} % against {:.1f} % under KV6, {} {:.1f} % against {:.1f} %".format(
            "cluster", *levels[:2], other, *levels[2:]
        )
    return Part(
        name=f"{network}: cluster - {other}, {name}",
        network=network,
        comparison=f"points below KV6 of cluster against those of {other}, both retrained under {name}",
        found=found,
        goal=Goal("above", 0),
        says=lambda e: f"under {name} cluster loses {abs(e):.1f} points {_more(-e)} than {other}",
        measured=measured,
    )


def _c5(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    network, name = ours(VIT), AGGRESSIVE[0]
    terms = {("hard", name, YES): 1, ("dense", name, YES): -1}
    found = contrast(cells, network, terms)
    problem, measured, test = "", "", ""
    if found.interval:
        sides = [cells.of(network, term, found.seeds) for term in terms]
        hard, dense = (sum(cell.p_norm or math.nan for cell in side) / len(side) for side in sides)
        levels = [cells.top1(network, term, found.seeds) for term in terms]
        measured = f"hard {levels[0]:.1f} % at P_norm {hard:.3f}, dense {levels[1]:.1f} % at {dense:.3f}"
        if not abs(hard / dense - 1) <= SAME_COST:  # of an unknown cost neither
            problem = f"P_norm is {hard:.3f} for hard and {dense:.3f} for dense, so the cost is not equal"
        right = [cell.right for side in sides for cell in side]
        if len(right) == 2 and all(each is not None for each in right):
            test = f"McNemar exact: p = {mcnemar(*right):.3g}"
    part = Part(
        name=f"{network}: hard - dense",
        network=network,
        comparison=f"hard against dense, both retrained under {short(name)}",
        found=found,
        goal=Goal("above", 0),
        says=lambda e: f"hard ends {abs(e):.1f} points {_above(e)} dense",
        measured=measured,
        problem=problem,
        test=test,
    )
    return [part, _more_than_exact(cells, network, name)], _effort(cells, network)


def _more_than_exact(cells: Cells, network: str, multiplier: str) -> Part:
    """Whether Hard's lead is the circuit's doing: it may be Hard's own."""
    circuits, name = {multiplier: 1, EXACT: -1}, short(multiplier)
    found = contrast(
        cells, network, {(t, m, YES): side * f for m, f in circuits.items() for t, side in (("hard", 1), ("dense", -1))}
    )
    measured = ""
    if found.interval:
        leads = [
            cells.top1(network, ("hard", m, YES), found.seeds) - cells.top1(network, ("dense", m, YES), found.seeds)
            for m in circuits
        ]
        measured = f"hard - dense is {leads[0]:+.1f} points under {name} and {leads[1]:+.1f} under KV6, retrained alike"
    return Part(
        name=f"{network}: hard - dense, {name} - KV6",
        network=network,
        comparison=f"the lead of hard over dense under {name} against that under KV6, all retrained",
        found=found,
        goal=Goal("above", 0),
        says=lambda e: f"the lead is {abs(e):.1f} points {'larger' if e >= 0 else 'smaller'} than under KV6",
        measured=measured,
    )


# ----------------------------------------------------------------------------------- mechanisms


def _m1(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    return [_bias(cells, *place, "mul8s_1KVA", Goal("above", 0)) for place in _places(cells)], ""


def _m2(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    unbiased = ("mul8s_1KVM", "mul8s_1L2J")
    return [_bias(cells, *place, name, Goal("below", 0)) for place in _places(cells) for name in unbiased], ""


def _bias(cells: Cells, network: str, topology: str, multiplier: str, goal: Goal) -> Part:
    """Correcting the bias returns more (or less) than half of what is lost: c - n > (x - n) / 2."""
    name = short(multiplier)
    before, corrected, exact = (topology, multiplier, NOT), (topology, multiplier, BIAS), (topology, EXACT, NOT)
    measured, empty, problem = "", False, ""
    found = contrast(cells, network, {corrected: 1, before: -(1 - HALF), exact: -HALF})
    n, c, x = (cells.top1(network, term, found.seeds) for term in (before, corrected, exact))
    if None not in (n, c, x):
        measured = f"{n:.1f} % becomes {c:.1f} % of {x:.1f} % under KV6"
        empty = x - n < WORTH
        problem = f"{name} costs {x - n:.1f} points here, too little to say where they went" if empty else ""
        measured += "" if empty else f", {(c - n) / (x - n):.0%} of what was lost"
    return Part(
        name=f"{network}: {topology}, {name}",
        network=network,
        comparison=f"{topology} under {name} with its bias corrected, against half way from uncorrected to KV6",
        found=found,
        goal=goal,
        says=lambda e: f"correction ends {abs(e):.1f} points {_above(e)} half way back to KV6",
        measured=measured,
        problem=problem,
        empty=empty,
    )


def _o1(cells: Cells, ours: Callable[[str], str]) -> tuple[list[Part], str]:
    # A transformer has no averages to refresh.
    return [_norms(cells, *place) for place in _places(cells) if "norms refreshed" in regimes_for(place[0])], ""


def _norms(cells: Cells, network: str, topology: str) -> Part:
    """f - n > 0.9 (r - n), each the mean over the multipliers."""
    share = 1 / len(APPROXIMATE)
    factors = {NORMS: share, NOT: -(1 - MOST) * share, YES: -MOST * share}
    found = contrast(cells, network, {(topology, m, regime): f for regime, f in factors.items() for m in APPROXIMATE})
    measured, empty, problem = "", False, ""
    if found.interval:
        levels = {r: [cells.top1(network, (topology, m, r), found.seeds) for m in APPROXIMATE] for r in factors}
        n, f, r = (sum(levels[regime]) * share for regime in (NOT, NORMS, YES))
        measured = f"{n:.1f} % becomes {f:.1f} % with norms refreshed and {r:.1f} % retrained"
        empty = r - n < WORTH
        problem = f"retraining returns {r - n:.1f} points here, too little to take a share of" if empty else ""
        measured += "" if empty else f", {(f - n) / (r - n):.0%} of its gain"
        under = [f"{short(m)} {a:.1f} {b:.1f}" for m, a, b in zip(APPROXIMATE, levels[NORMS], levels[YES], strict=True)]
        measured += f" ({', '.join(under)})"
    return Part(
        name=f"{network}: {topology}",
        network=network,
        comparison=f"{topology} with norms refreshed, against {MOST:.0%} of the way from not retrained to retrained",
        found=found,
        goal=Goal("above", 0),
        says=lambda e: f"refreshing ends {abs(e):.1f} points {_above(e)} {MOST:.0%} of what retraining returns",
        measured=measured,
        problem=problem,
        empty=empty,
    )


def _places(cells: Cells) -> list[tuple[str, str]]:
    """Networks and topologies that have rows: a mechanism is not claimed of a list."""
    return [
        (network, topology)
        for network, found in cells.by_network.items()
        for topology in TOPOLOGIES
        if any(cell.topology == topology for cell in found.values())
    ]


RULES: dict[str, Callable] = {
    "C1": _c1, "C2": _c2, "C3": _c3, "C4": _c4, "C5": _c5, "M1": _m1, "M2": _m2, "O1": _o1,
}  # fmt: skip


# ----------------------------------------------------------------------------------- words


def _effort(cells: Cells, network: str) -> str:
    """A word of warning where retraining saw fewer images than there are."""
    short_of = sorted(
        {
            (cell.retraining[1], cell.n_train)
            for cell in cells.by_network.get(network, {}).values()
            if cell.regime == YES and 0 < cell.retraining[1] < cell.n_train
        }
    )
    told = some([f"{images:,} of {all_:,}" for images, all_ in short_of])
    return f"our retraining of {network} was shorter than the paper's: it saw {told} images an epoch" if told else ""


def _more(effect: float) -> str:
    return "more" if effect >= 0 else "less"


def _above(effect: float) -> str:
    return "above" if effect >= 0 else "below"

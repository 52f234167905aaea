"""Where should an expert live? The parts of a network on core types, each part with a multiplier of its own.

    parts = groups(network, by="expert")                         what may be put somewhere
    there = put(macs, parts, places, assignment, cores=BOARD)    what a placement costs: time, throughput, energy
    there = best(macs, parts, multipliers, energy=0.4, harm=…)   the placement of most throughput within budgets
    there = consecutive(macs, parts, assignment)                 Pipe-it's: a run of layers for each core type
    rows = report(network, images, front(macs, parts, …))        for many budgets, and measured on the test images

Pipe-it gives each core type a run of consecutive layers. In a mixture a layer has parts that few inputs need, and a
part that few need may be slow: it can live on a small core. Not from a paper; with u_i the share of inputs that use
part i, T_ic its time on core type c and E_icm its energy there under multiplier m,

    time = sum of u_i T_ic      load of c = sum of u_i T_ic over its parts      throughput = 1 / greatest load     (1)
    energy = sum of u_i E_icm,  E_icm = macs_i e_c (s P_m / P_exact + 1 - s)                                        (2)

where e_c is the energy of an exact product on that core, and s the share of it that the multiplier has. Each core type
works on one part at a time, all its cores together, while the others work on other images;
:mod:`axmoe_lite.search.stream` lets them.

Chapter: 20, "Where should an expert live?"
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.multipliers.catalogue import power_of
from axmoe_lite.search import fronts
from axmoe_lite.search.space import catalogue, check_groups
from axmoe_lite.search.trial import assignment_digest

GAP = 1e-4  # how far from the optimum the solver may stop, relative


@dataclass(frozen=True)
class Core:
    """All cores of one type together.

    Attributes:
        name: such as ``"big"``.
        macs_per_s: multiply-accumulates per second of one layer of one image on all of them.
        energy: of one exact product, relative to any other core's.
    """

    name: str
    macs_per_s: float
    energy: float


# Kirin 970 (Wang et al., arXiv 1908.11450): ResNet-50, 4.09 G products, ran at 2.8 images per second on its four A73,
# at 1.5 on its four A53. What a product costs there is not known to us; half on a small core is not from a paper.
BOARD = (Core("big", 2.8 * 4.09e9, 1.0), Core("little", 1.5 * 4.09e9, 0.5))


@dataclass(frozen=True)
class Placed:
    """A placement and its price, for one input, expected over the routing.

    Attributes:
        places: part to core type.
        assignment: dotted layer names to multiplier names.
        load_s: core type to the seconds that it works for one input.
        time_s: from start to end of one input that is alone, seconds.
        throughput: images per second if there are always images to work on.
        energy: relative to ``base`` multiply-accumulates, all exact, on the first core type.
        harm: what the assignment is foretold to lose, in the unit of the harm that was given; 0 without.
    """

    places: dict[str, str]
    assignment: dict[str, str]
    load_s: dict[str, float]
    time_s: float
    throughput: float
    energy: float
    harm: float = 0.0


def put(
    macs: cost.Macs,
    parts: Mapping[str, Sequence[str]],
    places: Mapping[str, str],
    assignment: Mapping[str, str],
    *,
    cores: Sequence[Core] = BOARD,
    base: cost.Macs | float | None = None,
    share: float = 1.0,
) -> Placed:
    """Equations (1) and (2) for one placement.

    Args:
        macs: of the network, counted on images, so with their routing; see :func:`axmoe_lite.cost.count`.
        parts: name to layers. Layers in none of them, such as gates, run on the first core type, exactly.
        places: part to the name of a core type.
        assignment: layer to multiplier; layers that are not there are exact.
        cores: the core types there are.
        base: what energies are relative to, on the first core type; None: this network.
        share: s, of the energy of an exact product what the multiplier takes, in [0, 1]. With 1 only products count,
            as in P_norm.

    Raises:
        ValueError: for a part, layer or core type that does not exist, or a number out of its range.

    >>> macs = cost.Macs({"a": cost.LayerMacs("conv", 30.0, 30.0), "b": cost.LayerMacs("conv", 5.0, 20.0)}, 0, 1)
    >>> two = (Core("big", 10.0, 1.0), Core("little", 5.0, 0.5))
    >>> there = put(macs, {"a": ["a"], "b": ["b"]}, {"a": "big", "b": "little"}, {}, cores=two)
    >>> there.load_s, there.time_s  # b takes 20 / 5 seconds, and a quarter of the inputs needs it
    ({'big': 3.0, 'little': 1.0}, 4.0)
    >>> round(there.energy, 4)  # (30 + 0.5 * 5) / 35
    0.9286
    """
    known = {core.name: core for core in check(macs, parts, cores, share)}
    for part in parts:
        if part not in places:
            raise ValueError(f"Part {part!r} has no place; give each of {', '.join(parts)} a core type.")
        moe.check_option(f"The place of {part!r}", places[part], tuple(known))
    where = {layer: known[places[part]] for part, layers in parts.items() for layer in layers}
    chosen = {layer: power_of(name) for layer, name in assignment.items()}
    lost = [layer for layer in chosen if layer not in macs.layers]
    if lost:
        raise ValueError(f"The assignment names layer {lost[0]!r}; counted were {', '.join(macs.layers)}.")
    load, energy, exact = dict.fromkeys(known, 0.0), 0.0, power_of(EXACT)
    for layer, counted in macs.layers.items():
        core = where.get(layer, cores[0])
        load[core.name] += counted.executed / core.macs_per_s
        power = chosen.get(layer, exact) / exact
        energy += counted.executed * core.energy * (share * power + 1 - share)
    return Placed(
        places={part: places[part] for part in parts},
        assignment=dict(assignment),
        load_s=load,
        time_s=sum(load.values()),
        throughput=1 / max(load.values()),
        energy=energy / (_base(macs, base) * cores[0].energy),
    )


def best(
    macs: cost.Macs,
    parts: Mapping[str, Sequence[str]],
    multipliers: Iterable[str],
    *,
    energy: float = float("inf"),
    harm: Mapping[tuple[str, str], float] | None = None,
    most_harm: float = float("inf"),
    cores: Sequence[Core] = BOARD,
    base: cost.Macs | float | None = None,
    share: float = 1.0,
) -> Placed | None:
    """The placement and the multipliers of most throughput within a budget of energy, and one of harm.

    A mixed-integer linear programme (SciPy's HiGHS): one choice of core type and multiplier for each part, the greatest
    load as small as can be, to within :data:`GAP`; then the least energy at that load. Harm is taken to add up over
    parts, which is only about true; see :mod:`axmoe_lite.search.additive`.

    Args:
        macs, parts, cores, base, share: see :func:`put`.
        multipliers: names to choose from. The exact circuit is always among them.
        energy: the most that an input may cost, relative to ``base``.
        harm: (part, multiplier) to what it loses alone, such as ``more_divergence`` of
            :func:`axmoe_lite.search.sensitivity`; at least 0, or below it by chance. The exact circuit does none.
        most_harm: the most that all parts may lose together.

    Returns:
        The placement; None where no choice fits the budgets.

    Raises:
        ValueError: as :func:`put`, and for a multiplier without a power, or a part without harm.

    >>> macs = cost.Macs({"a": cost.LayerMacs("conv", 30.0, 30.0), "b": cost.LayerMacs("conv", 20.0, 20.0)}, 0, 1)
    >>> two = (Core("big", 10.0, 1.0), Core("little", 5.0, 0.5))
    >>> parts = {"a": ["a"], "b": ["b"]}
    >>> best(macs, parts, [], cores=two).places
    {'a': 'big', 'b': 'little'}
    >>> best(macs, parts, [], cores=two, energy=0.4) is None  # both on the small cores still cost 0.5
    True
    >>> best(macs, parts, ["mul8s_1L2L"], cores=two, energy=0.4).assignment["a"]
    'mul8s_1L2L'
    """
    check(macs, parts, cores, share)
    names, total = catalogue(multipliers), _base(macs, base)
    lost = _lost(parts, names, harm)
    power = np.array([multiplier(name).power_mw for name in names]) / multiplier(EXACT).power_mw
    executed = np.array([sum(macs.layers[layer].executed for layer in layers) for layers in parts.values()])
    fixed = macs.executed - executed.sum()  # gates and the like, exactly, on the first cores
    P, C, M = len(parts), len(cores), len(names)
    factor = np.outer([core.energy for core in cores], share * power + 1 - share) / cores[0].energy
    spent = executed[:, None, None] * factor / total  # [P, C, M]
    busy = np.zeros((C, P, C, M))
    for c, core in enumerate(cores):
        busy[c, :, c] = executed[:, None] / core.macs_per_s
    start = np.array([fixed / cores[0].macs_per_s, *[0.0] * (C - 1)])
    told = np.broadcast_to(lost[:, None], (P, C, M))
    limits = [(spent, energy - fixed / total), (np.where(np.isfinite(told), told, 0), most_harm)]
    choice = _solved(spent, busy, start, limits, allowed=np.isfinite(told))
    if choice is None:
        return None
    places = {part: cores[i // M].name for part, i in zip(parts, choice, strict=True)}
    chosen = {part: names[i % M] for part, i in zip(parts, choice, strict=True)}
    assignment = {layer: chosen[part] for part, layers in parts.items() for layer in layers}
    there = put(macs, parts, places, assignment, cores=cores, base=base, share=share)
    return replace(there, harm=float(sum(lost[p, i % M] for p, i in enumerate(choice))))


def _solved(
    spent: np.ndarray, busy: np.ndarray, start: np.ndarray, limits: list[tuple[np.ndarray, float]], allowed: np.ndarray
) -> np.ndarray | None:
    """The least greatest load, then the least energy at that load: for each part which of its C * M choices, [P].

    Args:
        spent: [P, C, M], energy of each choice.
        busy: [C, P, C, M], seconds of each choice on each core type; start: [C], seconds that nobody chooses.
        limits: pairs of what a choice takes, [P, C, M], and what all may take together.
        allowed: bool [P, C, M].
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # heavy, and needed nowhere else

    P, C, M = spent.shape
    size = P * C * M
    # The variables are a choice each, 0 or 1, and the greatest load, as a share of what the quickest cores would take.
    scale = max(busy.sum(0).min(1).sum(), 1e-30)
    rows = [
        LinearConstraint(np.c_[np.kron(np.eye(P), np.ones(C * M)), np.zeros(P)], 1, 1),
        LinearConstraint(np.c_[busy.reshape(C, size) / scale, -np.ones(C)], -np.inf, -start / scale),
    ]
    rows += [LinearConstraint(np.append(each, 0), -np.inf, most) for each, most in limits if np.isfinite(most)]
    kinds, highest = np.append(np.ones(size), 0), np.append(allowed, np.inf)
    load = np.append(np.zeros(size), 1)
    for objective in (load, np.append(spent, 0)):
        bounds, options = Bounds(0, highest), {"mip_rel_gap": GAP}
        found = milp(objective, integrality=kinds, bounds=bounds, constraints=rows, options=options)
        if found.x is None:
            return None
        highest[-1] = found.x[-1] * (1 + GAP)  # what the second objective may not spoil
    return found.x[:-1].reshape(P, C * M).argmax(1)


def consecutive(
    macs: cost.Macs,
    parts: Mapping[str, Sequence[str]],
    assignment: Mapping[str, str],
    *,
    cores: Sequence[Core] = BOARD,
    base: cost.Macs | float | None = None,
    share: float = 1.0,
) -> Placed:
    """Pipe-it's way: each core type gets one run of consecutive layers, all experts of a layer together.

    Of all cuts, with the core types in any order and none of them idle by force, the one of most throughput; of equal
    ones the one of least energy.

    >>> macs = cost.Macs({name: cost.LayerMacs("conv", 10.0, 10.0) for name in "abc"}, 0, 1)
    >>> two = (Core("big", 10.0, 1.0), Core("little", 5.0, 0.5))
    >>> consecutive(macs, {name: [name] for name in "abc"}, {}, cores=two).places
    {'a': 'big', 'b': 'big', 'c': 'little'}
    """
    check(macs, parts, cores, share)
    layer_of = [part.partition(".experts.")[0] for part in parts]
    layers = list(dict.fromkeys(layer_of))
    told, found = {"cores": cores, "base": base, "share": share}, []
    for order in itertools.permutations(core.name for core in cores):
        for cuts in itertools.combinations_with_replacement(range(len(layers) + 1), len(cores) - 1):
            run = np.searchsorted(cuts, np.arange(len(layers)), side="right")
            home = {layer: order[i] for layer, i in zip(layers, run, strict=True)}
            places = {part: home[layer] for part, layer in zip(parts, layer_of, strict=True)}
            found.append(put(macs, parts, places, assignment, **told))
    return min(found, key=lambda one: (-one.throughput, one.energy))


def front(
    macs: cost.Macs,
    parts: Mapping[str, Sequence[str]],
    multipliers: Iterable[str],
    *,
    budgets: Iterable[float],
    **limits: Any,
) -> list[Placed]:
    """:func:`best` for each budget of energy, those that exist and differ, from the least energy to the most.

    Args:
        macs, parts, multipliers, limits: of :func:`best`.
    """
    names = catalogue(multipliers)
    found = [best(macs, parts, names, energy=energy, **limits) for energy in sorted(budgets)]
    return list({one.energy: one for one in found if one is not None}.values())


def report(network: nn.Module, images: Images, front: Iterable[Placed], **healing: Any) -> list[dict]:
    """What placements are worth on the test images; those of one assignment are measured once.

    Args:
        network, images: as they were for the harms.
        healing: of :func:`axmoe_lite.search.report`, ``base`` among them.

    Returns:
        A dict each: what :func:`axmoe_lite.search.report` says of its assignment, and ``places`` (the core type of each
        part, in their order), ``energy``, ``throughput``, ``time_s`` and ``harm``.
    """
    placed = list(front)
    digests = [assignment_digest(one.assignment) for one in placed]
    distinct = dict(zip(digests, (one.assignment for one in placed), strict=True))
    measured = {row["digest"]: row for row in fronts.report(network, images, distinct.values(), **healing)}
    return [
        {
            **measured[digest],
            "places": " ".join(one.places.values()),
            "energy": round(one.energy, 6),
            **{name: getattr(one, name) for name in ("throughput", "time_s", "harm")},
        }
        for one, digest in zip(placed, digests, strict=True)
    ]


# --------------------------------------------------------------------------------- pieces


def _base(macs: cost.Macs, base: cost.Macs | float | None) -> float:
    return macs.executed if base is None else base.executed if isinstance(base, cost.Macs) else base


def _lost(parts: Mapping[str, Sequence[str]], names: list[str], harm: Mapping | None) -> np.ndarray:
    """[parts, multipliers]: what each loses under each; 0 without harm, and under the exact circuit."""
    lost = np.zeros((len(parts), len(names)))
    for p, part in enumerate(parts):
        for m, name in enumerate(names[1:], 1) if harm is not None else []:
            if (part, name) not in harm:
                raise ValueError(
                    f"There is no harm of part {part!r} under {name!r}; sensitivity() measures all of them."
                )
            lost[p, m] = max(0.0, harm[part, name])
    return lost


def check(
    macs: cost.Macs, parts: Mapping[str, Sequence[str]], cores: Sequence[Core], share: float = 1.0
) -> Sequence[Core]:
    """Refuse parts, cores or a share that nothing can be placed with; the cores again."""
    check_groups(dict(parts))
    for part, layers in parts.items():
        for layer in layers:
            if layer not in macs.layers:
                raise ValueError(f"Part {part!r} names layer {layer!r}; counted were {', '.join(macs.layers)}.")
    if not cores or len({core.name for core in cores}) < len(cores):
        raise ValueError(f"cores are {[core.name for core in cores]}; give at least one core type, each name once.")
    for core in cores:
        if not core.macs_per_s > 0 or not core.energy > 0:
            raise ValueError(f"Of {core}, speed and energy must be positive.")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; the multiplier takes between 0 and 1 of a product's energy.")
    return cores

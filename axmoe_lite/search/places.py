"""Where should an expert live? The parts of a network on core types, each part with a multiplier of its own.

    parts = groups(network, by="expert")                         what may be put somewhere
    there = put(macs, parts, places, assignment, cores=BOARD)    what a placement costs: time, throughput, energy
    there = best(macs, parts, multipliers, energy=0.4, harm=…)   the placement of most throughput within budgets
    there = consecutive(macs, parts, assignment)                 Pipe-it's: a run of layers for each core type
    done = stream(used, parts, there, macs)                      images one after another, routed as they really are

Pipe-it gives each core type a run of consecutive layers. In a mixture a layer has parts that few inputs need, and a
part that few need may be slow: it can live on a small core. Not from a paper; with u_i the share of inputs that use
part i, T_ic its time on core type c and E_icm its energy there under multiplier m,

    time = sum of u_i T_ic      load of c = sum of u_i T_ic over its parts      throughput = 1 / greatest load     (1)
    energy = sum of u_i E_icm,  E_icm = macs_i e_c (s P_m / P_exact + 1 - s)                                        (2)

where e_c is the energy of an exact product on that core, and s the share of it that the multiplier has. Each core type
works on one part at a time, all its cores together, while the others work on other images.

Chapter: 19, "Where should an expert live?"
"""

import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from axmoe_lite import cost, moe
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.search.space import catalogue, check_groups

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
    known = {core.name: core for core in _check(macs, parts, cores, share)}
    for part in parts:
        if part not in places:
            raise ValueError(f"Part {part!r} has no place; give each of {', '.join(parts)} a core type.")
        moe.check_option(f"The place of {part!r}", places[part], tuple(known))
    where = {layer: known[places[part]] for part, layers in parts.items() for layer in layers}
    chosen = {layer: multiplier(name) for layer, name in assignment.items()}
    lost = [layer for layer in chosen if layer not in macs.layers]
    if lost:
        raise ValueError(f"The assignment names layer {lost[0]!r}; counted were {', '.join(macs.layers)}.")
    load, energy, exact = dict.fromkeys(known, 0.0), 0.0, multiplier(EXACT)
    for layer, counted in macs.layers.items():
        core = where.get(layer, cores[0])
        load[core.name] += counted.executed / core.macs_per_s
        power = chosen.get(layer, exact).power_mw / exact.power_mw
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
    _check(macs, parts, cores, share)
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
    _check(macs, parts, cores, share)
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


def used(parts: Mapping[str, Sequence[str]], seen: Mapping[str, Sequence[moe.Routing]]) -> np.ndarray:
    """Which parts each input needs: bool [N, parts], from what :func:`axmoe_lite.moe.watching` saw of the network.

    Args:
        parts: an expert of a mixture is one part or several, called after it, as
            :func:`axmoe_lite.search.groups` calls them; every other part is needed by every input.
        seen: mixture to its decisions, batch by batch. N is the number of decisions: of images, or of tokens where a
            gate routes tokens.

    Raises:
        ValueError: where mixtures made unlike numbers of decisions, or none.
    """
    chosen = {name: np.concatenate([one.choice.cpu().numpy() for one in of]) for name, of in seen.items() if of}
    sizes = sorted({len(choice) for choice in chosen.values()})
    if len(sizes) != 1:
        raise ValueError(
            f"The mixtures made {sizes or 'no'} decisions; watch a network whose mixtures all route images, on at least"
            " one batch."
        )
    needed = np.ones((sizes[0], len(parts)), bool)
    for column, part in enumerate(parts):
        for name, choice in chosen.items():
            prefix = f"{name}.experts.".lstrip(".")
            if part.startswith(prefix):
                needed[:, column] = choice == int(part.removeprefix(prefix).split(".")[0])
    return needed


@dataclass(frozen=True, eq=False)
class Streamed:
    """Images that went through a placement one after another.

    Attributes:
        throughput: images per second, the first and the last quarter left out, where the line fills and empties.
        time_s: float64 [N], of each image from entering to its answer, waiting too.
        busy: core type to the share of that time in which it worked.
        crossings: how often an image went from one core type to another, the mean.
        spans: (image, part, core type, start_s, end_s) of everything that ran, by start.
    """

    throughput: float
    time_s: np.ndarray
    busy: dict[str, float]
    crossings: float
    spans: list[tuple[int, str, str, float, float]]


def stream(
    needed: np.ndarray | Tensor,
    parts: Mapping[str, Sequence[str]],
    placed: Placed,
    macs: cost.Macs,
    *,
    cores: Sequence[Core] = BOARD,
    inside: int = 8,
    crossing_s: float = 0.0,
) -> Streamed:
    """Run images through a placement in simulated time; expectations become a line of images that wait for each other.

    Each core type takes the image that waits longest for it. At most ``inside`` images are under way.

    Args:
        needed: bool [N, parts], see :func:`used`; parts run in their order.
        inside: 1 or more. With 1 the throughput is one over the time of an image.
        crossing_s: seconds that a change of core type costs, spent on the core that is reached. Pipe-it measured that
            it is not 0; how much is not known to us.
    """
    known = _check(macs, parts, cores, 1.0)
    needed = np.asarray(needed, bool)
    if needed.ndim != 2 or needed.shape[1] != len(parts) or not len(needed):
        raise ValueError(f"needed is of shape {list(needed.shape)}; it must be [images, {len(parts)} parts].")
    if inside < 1 or crossing_s < 0:
        raise ValueError(f"inside is {inside} and crossing_s {crossing_s}; at least 1 and at least 0 are needed.")
    names = list(parts)
    speed = {core.name: core.macs_per_s for core in known}
    size = {part: sum(macs.layers[layer].static for layer in layers) for part, layers in parts.items()}
    seconds = [size[part] / speed[placed.places[part]] for part in names]
    tasks = [[i for i in range(len(names)) if row[i]] for row in needed]
    begin, end, spans, crossings = np.zeros(len(tasks)), np.zeros(len(tasks)), [], 0
    free, waiting, order = dict.fromkeys(speed, 0.0), [], itertools.count()
    upcoming = iter(range(len(tasks)))

    def enter(at: float) -> None:
        image = next(upcoming, None)
        if image is not None:
            begin[image] = at
            heapq.heappush(waiting, (at, next(order), image, 0, ""))

    for _ in range(inside):
        enter(0.0)
    while waiting:
        ready, _, image, step, before = heapq.heappop(waiting)
        if step == len(tasks[image]):
            end[image] = ready
            enter(ready)
            continue
        part = tasks[image][step]
        core = placed.places[names[part]]
        crossed = before not in ("", core)
        start = max(ready, free[core])
        done = start + seconds[part] + crossed * crossing_s
        crossings += crossed
        free[core] = done
        spans.append((image, names[part], core, start, done))
        heapq.heappush(waiting, (done, next(order), image, step + 1, core))
    return _streamed(begin, end, spans, crossings, tuple(speed))


def _streamed(begin: np.ndarray, end: np.ndarray, spans: list, crossings: int, cores: tuple[str, ...]) -> Streamed:
    N = len(end)
    first, last = (N // 4, N - 1 - N // 4) if N >= 8 else (0, N - 1)
    ends = np.sort(end)
    window = ends[last] - (ends[first] if N >= 8 else 0.0)
    inside = {core: sum(e - s for *_, where, s, e in spans if where == core) for core in cores}
    return Streamed(
        throughput=float((last - first if N >= 8 else N) / window),
        time_s=end - begin,
        busy={core: seconds / float(ends[-1]) for core, seconds in inside.items()},
        crossings=crossings / N,
        spans=sorted(spans, key=lambda span: span[3]),
    )


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


def _check(macs: cost.Macs, parts: Mapping[str, Sequence[str]], cores: Sequence[Core], share: float) -> Sequence[Core]:
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

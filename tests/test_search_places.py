"""search.places and search.stream: priced by hand, chosen as brute force chooses, streamed in simulated time."""

import itertools

import numpy as np
import pytest
import torch

from axmoe_lite import cost, models, moe, search
from axmoe_lite.search import places, stream

BIG, LITTLE = places.Core("big", 10.0, 1.0), places.Core("little", 4.0, 0.5)
TWO = (BIG, LITTLE)
KV6, L2L = "mul8s_1KV6", "mul8s_1L2L"
CHEAP = 0.2 / 0.425  # L2L's power over the exact circuit's, both published, in milliwatts


def macs_of(**layers: tuple[float, float]) -> cost.Macs:
    return cost.Macs({name: cost.LayerMacs("conv", *both) for name, both in layers.items()}, 0, 1)


MACS = macs_of(stem=(20.0, 20.0), x0=(15.0, 20.0), x1=(5.0, 20.0), head=(10.0, 10.0))
PARTS = {"stem": ["stem"], "x.experts.0": ["x0"], "x.experts.1": ["x1"], "head": ["head"]}


def test_a_placement_is_priced_by_hand() -> None:
    chosen = dict(zip(PARTS, ["big", "big", "little", "big"], strict=True))
    there = places.put(MACS, PARTS, chosen, {"x1": L2L}, cores=TWO)
    # big: (20 + 15 + 10) / 10 s; little: 5 / 4 s
    assert there.load_s == pytest.approx({"big": 4.5, "little": 1.25})
    assert there.time_s == pytest.approx(5.75)
    assert there.throughput == pytest.approx(1 / 4.5)
    assert there.energy == pytest.approx((45 + 5 * 0.5 * CHEAP) / 50, rel=1e-3)
    half = places.put(MACS, PARTS, chosen, {"x1": L2L}, cores=TWO, share=0.5, base=100)
    assert half.energy == pytest.approx((45 + 5 * 0.5 * (0.5 * CHEAP + 0.5)) / 100, rel=1e-3)


def test_layers_in_no_part_run_on_the_first_cores() -> None:
    some = {"x.experts.0": ["x0"]}
    there = places.put(MACS, some, {"x.experts.0": "little"}, {}, cores=TWO)
    assert there.load_s == pytest.approx({"big": 3.5, "little": 15 / 4})


def by_force(energy: float, most_harm: float, names: list[str], harm: dict) -> float:
    """The least greatest load of all placements and multipliers, tried one by one."""
    least = float("inf")
    for where in itertools.product(["big", "little"], repeat=len(PARTS)):
        for which in itertools.product(names, repeat=len(PARTS)):
            chosen = {layer: name for layers, name in zip(PARTS.values(), which, strict=True) for layer in layers}
            there = places.put(MACS, PARTS, dict(zip(PARTS, where, strict=True)), chosen, cores=TWO)
            lost = sum(harm.get(pair, 0.0) for pair in zip(PARTS, which, strict=True))
            if there.energy <= energy + 1e-9 and lost <= most_harm + 1e-9:
                least = min(least, max(there.load_s.values()))
    return least


@pytest.mark.parametrize("energy", [0.3, 0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("most_harm", [0.0, 0.3, 1.0])
def test_the_best_placement_is_brute_force_s(energy: float, most_harm: float) -> None:
    harm = {(part, L2L): of for part, of in zip(PARTS, (0.5, 0.2, 0.1, 0.6), strict=True)}
    there = search.places.best(MACS, PARTS, [L2L], energy=energy, harm=harm, most_harm=most_harm, cores=TWO)
    least = by_force(energy, most_harm, [KV6, L2L], harm)
    if there is None:
        assert least == float("inf")
        return
    assert max(there.load_s.values()) == pytest.approx(least, rel=3 * places.GAP)
    assert there.energy <= energy + 1e-6
    assert there.harm <= most_harm + 1e-6


def test_infinite_harm_is_never_chosen() -> None:
    harm = {(part, L2L): float("inf") for part in PARTS}
    assert places.best(MACS, PARTS, [L2L], energy=0.45, harm=harm, cores=TWO) is None
    harm["stem", L2L] = 0.0
    there = places.best(MACS, PARTS, [L2L], energy=0.9, harm=harm, cores=TWO)
    assert {layer for layer, name in there.assignment.items() if name == L2L} <= {"stem"}


def test_at_that_load_the_least_energy_wins() -> None:
    there = places.best(MACS, PARTS, [L2L], cores=TWO)
    assert set(there.assignment.values()) == {L2L}


def test_a_line_of_images_reaches_the_foretold_throughput() -> None:
    draw = np.random.default_rng(0)
    expert = (draw.random(400) < 0.25).astype(int)  # as MACS says: a quarter of the inputs need the second
    needed = np.stack([np.ones(400), expert == 0, expert == 1, np.ones(400)], 1).astype(bool)
    there = places.put(MACS, PARTS, dict(zip(PARTS, ["big", "little", "big", "big"], strict=True)), {}, cores=TWO)
    done = stream.stream(needed, PARTS, there, MACS, cores=TWO, inside=12)
    assert done.throughput == pytest.approx(there.throughput, rel=0.05)
    alone = stream.stream(needed, PARTS, there, MACS, cores=TWO, inside=1)
    assert alone.throughput == pytest.approx(1 / alone.time_s[100:300].mean(), rel=0.01)
    assert alone.time_s.max() == pytest.approx(2 + 20 / 4 + 1)  # stem, expert 0 on the small cores, head
    assert set(np.unique(alone.time_s.round(6))) == {5.0, 8.0}


def test_a_line_never_has_two_parts_on_one_core_type_at_a_time() -> None:
    needed = np.ones((30, 4), bool)
    there = places.put(MACS, PARTS, dict(zip(PARTS, ["big", "little", "big", "little"], strict=True)), {}, cores=TWO)
    done = stream.stream(needed, PARTS, there, MACS, cores=TWO, inside=5, crossing_s=0.25)
    assert len(done.spans) == 30 * 4
    for core in ("big", "little"):
        spans = sorted((start, end) for _, where, start, end, _ in done.spans if where == core)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(spans))
    assert done.crossings == 3  # to the small cores, back, and there again
    first = [(start, end) for image, _, start, end, _ in done.spans if image == 0]
    assert first[1][1] - first[1][0] == pytest.approx(20 / 4 + 0.25)


def test_used_reads_the_routing() -> None:
    network = models.resnet8(classes=3, topology="hard", experts=2, r=0.3, seed=1).eval()
    parts = search.groups(network)
    x = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with moe.watching(network) as seen, torch.no_grad():
        network(x[:4])
        network(x[4:])
    needed = stream.used(parts, seen)
    mixtures = list(moe.mixtures(network))
    assert needed.shape == (7, len(parts))
    for name in mixtures:
        columns = [list(parts).index(f"{name}.experts.{e}") for e in range(2)]
        assert (needed[:, columns].sum(1) == 1).all()
        choice = torch.cat([one.choice for one in seen[name]])
        assert (needed[:, columns[1]] == choice.numpy()).all()
    others = [i for i, part in enumerate(parts) if ".experts." not in part]
    assert needed[:, others].all()
    macs = cost.count(network, x)
    expected = macs.layers[f"{mixtures[0]}.experts.1"]
    share = needed[:, list(parts).index(f"{mixtures[0]}.experts.1")].mean()
    assert expected.executed == pytest.approx(share * expected.static)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"parts": {"a": ["nowhere"]}}, "nowhere"),
        ({"parts": {"a": []}}, "no layers"),
        ({"cores": ()}, "at least one core type"),
        ({"cores": (BIG, BIG)}, "each name once"),
        ({"cores": (places.Core("big", 0.0, 1.0),)}, "positive"),
        ({"share": 1.5}, "between 0 and 1"),
        ({"multipliers": ["mul8s_1L2"]}, "mul8s_1L2"),
        ({"harm": {("stem", L2L): 0.1}}, "experts.0"),
    ],
)
def test_bad_input_to_best(change: dict, told: str) -> None:
    asked = {"parts": PARTS, "multipliers": [L2L], "cores": TWO, **change}
    with pytest.raises(ValueError, match=told):
        places.best(MACS, **asked)


def test_bad_input_to_put_stream_and_used() -> None:
    where = dict.fromkeys(PARTS, "big")
    with pytest.raises(ValueError, match="middle"):
        places.put(MACS, PARTS, {**where, "stem": "middle"}, {}, cores=TWO)
    with pytest.raises(ValueError, match="'head' has no place"):
        places.put(MACS, PARTS, {part: "big" for part in PARTS if part != "head"}, {}, cores=TWO)
    with pytest.raises(ValueError, match="nowhere"):
        places.put(MACS, PARTS, where, {"nowhere": L2L}, cores=TWO)
    there = places.put(MACS, PARTS, where, {}, cores=TWO)
    with pytest.raises(ValueError, match="shape"):
        stream.stream(np.ones((3, 2)), PARTS, there, MACS, cores=TWO)
    with pytest.raises(ValueError, match="inside"):
        stream.stream(np.ones((3, 4)), PARTS, there, MACS, cores=TWO, inside=0)
    with pytest.raises(ValueError, match="no decisions"):
        stream.used(PARTS, {})


def test_consecutive_is_the_best_of_all_cuts() -> None:
    there = places.consecutive(MACS, PARTS, {}, cores=TWO)
    # Layers of 20, 20 (both experts) and 10: big may take 40, 30, 20, 10 or 50 at 10 a second, little the rest at 4.
    # 40 | 10: 4.0 and 2.5 seconds; 30 | 20: 3.0 and 5.0. So stem and experts are big, or experts and head are not.
    assert there.places == dict(zip(PARTS, ["big", "big", "big", "little"], strict=True))
    assert there.throughput == pytest.approx(1 / 4)
    free = places.best(MACS, PARTS, [], cores=TWO)
    assert free.throughput > there.throughput  # it may tear the experts apart: 20 + 15 | 5 + 10
    assert max(free.load_s.values()) == pytest.approx(3.75)


def test_consecutive_with_three_core_types() -> None:
    three = (BIG, LITTLE, places.Core("tiny", 1.0, 0.25))
    macs = macs_of(a=(4.0, 4.0), b=(1.0, 1.0), c=(10.0, 10.0))
    there = places.consecutive(macs, {name: [name] for name in "abc"}, {}, cores=three)
    assert there.places == {"a": "little", "b": "tiny", "c": "big"}
    assert there.throughput == pytest.approx(1.0)


def test_front_keeps_what_differs() -> None:
    found = places.front(MACS, PARTS, [L2L], budgets=[1.0, 0.1, 0.9, 0.5, 0.3], cores=TWO)
    energies = [one.energy for one in found]
    assert energies == sorted(set(energies)) and len(found) >= 2  # 0.1 cannot be had, 0.9 and 1.0 are one
    loads = [max(one.load_s.values()) for one in found]
    assert loads == sorted(loads, reverse=True)


def test_report_measures_an_assignment_once(textures) -> None:
    network = models.resnet8(classes=len(textures.classes), seed=0).eval()
    parts = search.groups(network)
    macs = cost.count(network, textures.normalised(textures.x_test[:2]))
    one = places.put(macs, parts, dict.fromkeys(parts, "big"), dict.fromkeys(parts, L2L))
    two = places.put(macs, parts, dict.fromkeys(parts, "little"), dict.fromkeys(parts, L2L))
    told = {"base": macs, "n": 48, "regime": "not retrained", "calibrate_options": {"n": 50}, "progress": False}
    rows = places.report(network, textures, [one, two], **told)
    assert [row["places"].split()[0] for row in rows] == ["big", "little"]
    assert rows[0]["seconds"] == rows[1]["seconds"] and rows[0]["top1"] == rows[1]["top1"]
    (alone,) = search.report(network, textures, [two.assignment], **told)
    assert (alone["top1"], alone["divergence"]) == (rows[1]["top1"], rows[1]["divergence"])
    assert rows[1]["energy"] == pytest.approx(0.5 * rows[0]["energy"], rel=1e-3)  # the classifier stays where it is

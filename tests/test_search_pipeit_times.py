"""Predictors of a layer's time: laws that are known are found again, and files are gone on from. No clock is asked."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from axmoe_lite.search.pipeit import board, microbench
from axmoe_lite.search.pipeit.microbench import host, kernel, measure, realise, shape_of, synthetic
from axmoe_lite.search.pipeit.schedule import optimum
from axmoe_lite.search.pipeit.shapes import Layer
from axmoe_lite.search.pipeit.times import apart, fit, kind_of

ODD = [
    Layer("prime", 23, 18, 5),
    Layer("grouped", 9, 18, 4, 2),
    Layer("tokens", 7, 6, 5, kind="linear"),
    Layer("attention", 7, 6, 5, 3, kind="linear"),
]
TWO = {("cpu", 1): [0], ("cpu", 2): [0, 1]}


def rows_of(layers, law, *stages):
    return [
        {
            "type": stage[0],
            "cores": stage[1],
            "kind": one.kind,
            "n": one.n,
            "k": one.k,
            "m": one.m,
            "groups": one.groups,
            "seconds": law(one, stage[1]),
        }
        for stage in stages or [("cpu", 1)]
        for one in layers
    ]


def plain(one, cores=1):
    """A sum (1) with other weights for each kind of layer."""
    speed = {"dense": 40e9, "depthwise": 5e9, "linear": 8e9, "rows": 30e9}[kind_of(one)]
    moved = one.n * one.k + one.k * one.m + one.n * one.m
    return one.macs / speed + moved * one.groups / 2e10 + 3e-6 * (kind_of(one) != "linear") + 2e-9 * one.n


def tiled(one, cores):
    """The law (2): tiles of 16 rows, 20 microseconds for two cores."""
    tiles = -(-one.n // 16)
    return plain(one) * -(-tiles // cores) / tiles + 20e-6 * (cores > 1)


# ------------------------------------------------------------------------------ shapes


def test_shapes_are_drawn_by_the_seed_and_nobody_elses():
    np.random.seed(5)
    shapes = synthetic(300, seed=3)
    assert np.random.random() == np.random.RandomState(5).random_sample()
    assert shapes == synthetic(300, seed=3) != synthetic(300, seed=4)
    assert synthetic(50, seed=3) == shapes[:50]
    assert len({shape_of(one) for one in shapes}) == 300


def test_shapes_are_such_as_networks_have():
    shapes = synthetic(600)
    kinds = [kernel(one) if kind_of(one) == "dense" else kind_of(one) for one in shapes]
    share = {kind: kinds.count(kind) / 600 for kind in set(kinds)}
    assert {"linear", "rows", "depthwise", 1, 3, 5, 7} <= set(share)
    assert 0.2 < share[1] < 0.4 and 0.2 < share[3] < 0.45 and share[7] > 0.03
    for one in shapes:
        assert 1e4 <= one.macs <= 3e8
        assert one.n <= 256 if one.kind == "linear" else 16 <= one.n <= 112**2
        assert one.m % 8 == 0 or one.groups > 1
    assert any(one.k == 27 for one in shapes), "some read the three colours"
    assert np.log10([one.macs for one in shapes]).std() > 0.5, "small ones are as welcome as large ones"


@pytest.mark.parametrize("one", [*synthetic(12, macs=(1e4, 1e7)), *ODD])
def test_a_realised_layer_has_the_products_it_should(one):
    """Counted by what goes in and comes out: weights of K M G numbers, results of N M G."""
    seen = {}

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.setdefault(function.__name__, [tuple(value.shape) for value in args if torch.is_tensor(value)])
            return function(*args, **(kwargs or {}))

    with Watch():
        made = realise(one)()
    products = one.kind == "linear" and one.groups > 1
    x, weight = seen["matmul" if products else "linear" if one.kind == "linear" else "conv2d"]
    assert made.numel() == one.n * one.m * one.groups and made.dtype == torch.float32
    assert np.prod(weight) == one.k * one.m * one.groups
    assert np.prod(x) * kernel(one) ** 2 == one.n * one.k * one.groups
    assert one.kind == "linear" or made.is_contiguous(memory_format=torch.channels_last)


def test_kernels_are_guessed_from_the_shape():
    names = {"conv1": 7, "layer1.0.conv1": 1, "layer1.0.conv2": 3, "fc": 1}
    for one in board.resnet50():
        side = names.get(one.name, 3 if one.name.endswith("conv2") else 1)
        assert kernel(one) == side, one
    assert kernel(board.alexnet()[0]) == 11


# ------------------------------------------------------------------------------ measured


@pytest.fixture
def told(monkeypatch):
    """measure() with processes that take n microseconds for each layer, and a list of what was asked of them."""
    asked = []

    def child(shapes, cores, threads, repeats):
        for shape in shapes:
            if shape[1] == 13:
                raise RuntimeError("The process that measures has ended: bad luck")
            asked.append((shape, tuple(cores), threads))
            yield shape[1] / 1e6 / threads

    monkeypatch.setattr(microbench, "_in_child", child)
    monkeypatch.setattr(microbench, "host", lambda: TWO)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *args: None, raising=False)
    return asked


SHAPES = [Layer(f"l{n}", n, 9, 8) for n in (4, 9, 16, 25)]


def test_measure_asks_each_configuration_for_each_layer_once(told):
    again = [*SHAPES, Layer("another name", 4, 9, 8)]
    rows = measure(again, configurations=TWO, progress=False)
    assert len(rows) == len(told) == 8
    assert [(row["type"], row["cores"], row["n"]) for row in rows[:5]] == [
        *[("cpu", 1, n) for n in (4, 9, 16, 25)],
        ("cpu", 2, 4),
    ]
    assert rows[5] == {
        "type": "cpu",
        "cores": 2,
        "pinned": "0 1",
        "kind": "conv",
        "n": 9,
        "k": 9,
        "m": 8,
        "groups": 1,
        "seconds": 4.5e-6,
        "repeats": 7,
    }
    assert {(cores, threads) for _, cores, threads in told} == {((0,), 1), ((0, 1), 2)}
    order = [shape for shape, _, threads in told if threads == 1]
    told.clear()
    measure(again, configurations=TWO, seed=1, progress=False)
    assert [shape for shape, _, threads in told if threads == 1] != order, "the seed draws the order"


def test_measuring_goes_on_where_it_was(told, tmp_path):
    file = tmp_path / "deep" / "rows.jsonl"
    whole = measure(SHAPES, configurations=TWO, progress=False)
    told.clear()
    with pytest.raises(RuntimeError, match="bad luck"):
        measure([*SHAPES, Layer("l13", 13, 9, 8)], configurations=TWO, checkpoint=file, seed=2, progress=False)
    before = len(told)
    assert 0 < before < 8, "some were measured, then it broke"
    with file.open("a") as lines:
        lines.write('{"type": "cpu", "co')  # and the power went out
    assert measure(SHAPES, configurations=TWO, checkpoint=file, progress=False) == whole
    assert len(told) == 8, "nothing was measured twice"
    assert measure(SHAPES, configurations=TWO, checkpoint=file, progress=False) == whole
    assert len(told) == 8
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(kept) == 9 and kept[0]["repeats"] == 7
    with pytest.raises(ValueError, match="was made with"):
        measure(SHAPES, configurations=TWO, checkpoint=file, repeats=3, progress=False)
    file.write_text("rubbish\n" + file.read_text())
    with pytest.raises(ValueError, match=r"Line 1 of .*rows\.jsonl"):
        measure(SHAPES, configurations=TWO, checkpoint=file, progress=False)


def test_a_system_that_cannot_pin_says_so_once(told, monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with pytest.warns(UserWarning, match="cannot pin") as said:
        rows = measure(SHAPES, configurations=TWO, progress=False)
    assert len(said) == 1
    assert {row["pinned"] for row in rows} == {""} and {cores for _, cores, _ in told} == {()}


@pytest.mark.parametrize(
    "options, says",
    [
        ({"shapes": []}, "at least one"),
        ({"shapes": [SimpleNamespace(name="a", n=1, k=1, m=1, groups=1, kind="pool")]}, "'a' is of kind 'pool'"),
        ({"shapes": [SimpleNamespace(name="a", n=0, k=1, m=1, groups=1, kind="conv")]}, r"\(0, 1, 1, 1\)"),
        ({"repeats": 0}, "at least 1 of each"),
        ({"configurations": {}}, "at least 1 of each"),
        ({"configurations": {("cpu", 2): [0]}}, "as many different ones"),
        ({"configurations": {("cpu", 2): [0, 0]}}, "as many different ones"),
        ({"configurations": {("cpu", 1): [7]}}, r"may use \[0, 1\]"),
    ],
)
def test_bad_questions_are_answered_before_anything_is_measured(told, options, says):
    given = {"shapes": SHAPES, "configurations": TWO, "progress": False} | options
    with pytest.raises(ValueError, match=says):
        measure(given.pop("shapes"), **given)
    assert not told
    with pytest.raises(ValueError, match="at least 1"):
        synthetic(0)
    with pytest.raises(ValueError, match="hundredfold"):
        synthetic(1, macs=(1e5, 1e6))


def test_something_is_really_measured():
    one_core = dict([next(iter(host().items()))])
    shapes = [Layer("a", 16, 18, 4), Layer("b", 1, 5, 3, kind="linear"), Layer("c", 4, 9, 1, groups=8)]
    rows = measure(shapes, configurations=one_core, repeats=2, progress=False)
    assert [row["kind"] for row in rows] == ["conv", "linear", "conv"]
    assert all(np.isfinite(row["seconds"]) and 0 < row["seconds"] < 10 for row in rows)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="has ended: OSError"):
        list(microbench._in_child([("conv", 1, 1, 1, 1)], [100_000], 1, 1))


# ------------------------------------------------------------------------------ foretold


@pytest.fixture(scope="module")
def shapes():
    return synthetic(320, seed=7)


def test_a_sum_is_found_again(shapes):
    to_fit, to_check = apart(rows_of(shapes, plain))
    assert fit(to_fit, method="each", ridge=0).error(to_check) < 1e-6
    assert fit(to_fit, method="each").error(to_check) < 0.01
    law = fit(to_fit, method="each", ridge=0).laws[("cpu", 1), "dense"]
    assert law.weights[[0, 1, 2, 3, 4, 7]] == pytest.approx([1 / 40e9, 5e-11, 5e-11, 5e-11, 2e-9, 3e-6])
    assert fit(to_fit, method="each", ridge=100).error(to_check) > 0.1, "the ridge holds weights down"


def test_weights_are_never_negative(shapes):
    falling = rows_of(shapes, lambda one, cores: 1 / one.macs)
    law = fit(falling, method="each").laws[("cpu", 1), "dense"]
    assert (law.weights >= 0).all() and (fit(falling, method="each").predict(shapes, ("cpu", 1)) > 0).all()


def test_relative_errors_count(shapes):
    """One layer of a second must not push the microseconds of all others aside: of 1 + 1, 2 + 2 and 300 it is 9 %."""
    rows = rows_of(shapes, lambda one, cores: plain(one) * (3 if one.macs > 2e8 else 1))
    predictor = fit(rows, method="each")
    small = [row for row in rows if row["n"] * row["k"] * row["m"] * row["groups"] < 1e7]
    assert predictor.error(small, seen=True) < 0.05


def test_tiles_are_found_again(shapes):
    stages = [("cpu", h) for h in (2, 1, 3)]
    to_fit, to_check = apart(rows_of(shapes, tiled, *stages))
    predictor = fit(to_fit, method="tiles", ridge=0)
    assert predictor.error(to_check) < 1e-6
    for cores in (2, 3):
        law = predictor.laws[("cpu", cores), "dense"]
        assert (law.tile, law.overhead) == (16, pytest.approx(20e-6))
    # The sum (1) knows no rounding to whole tiles, so fitting it for two cores does worse.
    assert fit(to_fit, method="each", ridge=0).error(to_check) > 0.02
    with pytest.raises(ValueError, match=r"\('cpu', 2\) was measured and \('cpu', 1\) was not"):
        fit(rows_of(shapes, tiled, ("cpu", 2)), method="tiles")


def test_each_kernel_has_its_own_sum(shapes):
    def law(one, cores):
        return plain(one) * (1 + kernel(one) / 3)

    rows = rows_of(shapes, law)
    common = {shape_of(one) for one in shapes if one.kind == "conv" and one.groups == 1 and kernel(one) in (1, 3)}
    rows = [row for row in rows if tuple(row[name] for name in microbench.SHAPE) in common]
    to_fit, to_check = apart(rows)  # the others have fewer than 16 layers each
    assert fit(to_fit, method="kernels", ridge=0).error(to_check) < 1e-6
    assert fit(to_fit, method="each", ridge=0).error(to_check) > 0.05


def test_trees_learn_what_no_sum_can(shapes):
    """Products are slow where filters do not fill vectors of 16, and bumpy in their number."""

    def law(one, cores):
        return plain(one) * (1.6 if one.m % 16 else 1) * (1 + 0.3 * np.sin(np.log(one.macs)))

    to_fit, to_check = apart(rows_of([one for one in shapes if kind_of(one) == "dense"], law))
    errors = {method: fit(to_fit, method=method).error(to_check) for method in ("each", "kernels", "trees")}
    assert errors["trees"] < 0.6 * min(errors["each"], errors["kernels"])
    again = fit(to_fit, method="trees")
    assert again.error(to_check) == errors["trees"], "the same seed, the same trees"
    assert fit(to_fit, method="trees", seed=1).error(to_check) != errors["trees"]


def test_errors_by_hand(shapes):
    rows = rows_of(shapes, plain, ("cpu", 1), ("cpu", 2))
    predictor = fit(rows, method="each", ridge=0)
    linear = next(one for one in shapes if one.kind == "linear")
    dense = next(one for one in shapes if kind_of(one) == "dense")
    # Twice and four times as slow as foretold is off by 1/2 and 3/4, half as slow by 1.
    slow = rows_of([linear], lambda one, cores: 2 * cores * plain(one), ("cpu", 1), ("cpu", 2))
    slow += rows_of([dense], lambda one, cores: plain(one) / 2)
    assert predictor.error(slow, seen=True) == pytest.approx((1 / 2 + 3 / 4 + 1) / 3)
    told = {(row["cores"], row["kind"]): (row["layers"], row["mape"]) for row in predictor.errors(slow, seen=True)}
    assert told == {
        (1, "all"): (2, pytest.approx(0.75)),
        (1, "linear"): (1, pytest.approx(0.5)),
        (1, "dense"): (1, pytest.approx(1)),
        (2, "all"): (1, pytest.approx(0.75)),
        (2, "linear"): (1, pytest.approx(0.75)),
    }


def test_layers_are_apart_whatever_their_configuration(shapes):
    rows = rows_of(shapes, plain, ("cpu", 1), ("cpu", 2))
    to_fit, to_check = apart(rows, share=0.1)
    sides = [
        {(row["n"], row["k"], row["m"], row["groups"], row["kind"]) for row in side} for side in (to_fit, to_check)
    ]
    assert not sides[0] & sides[1] and len(sides[1]) == 32 and len(to_check) == 64
    assert apart(rows, share=0.1, seed=1)[1] != to_check
    with pytest.raises(ValueError, match="64 of the 64 rows are of layers that this was fitted to"):
        fit(rows, method="each").error(to_check)


def test_a_table_is_what_schedules_are_searched_by(shapes):
    predictor = fit(rows_of(shapes, tiled, ("cpu", 1), ("cpu", 2)), method="tiles", ridge=0)
    layers = board.mobilenet()
    table = predictor.table(layers)
    assert table["cpu", 2] == pytest.approx([tiled(one, 2) for one in layers])
    assert optimum(table, {"cpu": 2}).throughput > 1 / sum(tiled(one, 1) for one in layers)
    relative = board.times("MobileNet", work=lambda them: predictor.predict(them, ("cpu", 1)))
    assert relative["big", 1][2] / relative["big", 1][1] == pytest.approx(plain(layers[2]) / plain(layers[1]))


DENSE = [one for one in synthetic(40) if kind_of(one) == "dense"]


@pytest.mark.parametrize(
    "ask, says",
    [
        (lambda: fit([]), "measure\\(\\) makes them"),
        (lambda: fit([{"type": "cpu", "cores": 1}]), "Row 0 lacks kind, n, k, m, groups, seconds"),
        (lambda: fit(rows_of(DENSE, lambda one, cores: 0.0)), "Row 0 took 0.0 seconds"),
        (lambda: fit(rows_of(DENSE, lambda one, cores: np.nan)), "Row 0 took nan seconds"),
        (lambda: fit(rows_of(DENSE, plain), method="forest"), "'tiles', 'each', 'kernels', 'trees'"),
        (lambda: fit(rows_of(DENSE, plain), ridge=-1), "at least 0"),
        (lambda: apart(rows_of(DENSE[:1], plain)), "1 layer"),
        (lambda: apart(rows_of(DENSE, plain), share=1), "between 0 and 1"),
        (
            lambda: fit(rows_of(DENSE, plain)).predict(DENSE, ("cpu", 2)),
            r"\('cpu', 2\) was not measured, only \('cpu', 1\)",
        ),
        (lambda: fit(rows_of(DENSE, plain)).predict([], ("cpu", 1)), "No layers"),
        (lambda: fit(rows_of(DENSE, plain)).error([]), "No rows"),
        (
            lambda: fit(rows_of(DENSE, plain)).predict([*DENSE, Layer("head", 1, 64, 10, kind="linear")], ("cpu", 1)),
            "'head' is linear, and fewer than 8",
        ),
    ],
)
def test_bad_questions(ask, says):
    with pytest.raises(ValueError, match=says):
        ask()

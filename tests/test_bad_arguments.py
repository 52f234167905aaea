"""Arguments that cannot be: refused in words before any work, by every public function that takes them."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from axmoe_lite import (
    approximate,
    cost,
    datasets,
    errors,
    factorise,
    freeze,
    kernels,
    models,
    multiplier,
    quant,
    restore,
    search,
    study,
    train,
)
from axmoe_lite.layers import assignment_of
from axmoe_lite.multipliers import EVOAPPROX, Multiplier, mosaic_name
from axmoe_lite.plots.learning import recovered
from axmoe_lite.plots.search import sensitivities
from axmoe_lite.search.agn import match
from axmoe_lite.search.qos import choose

pytestmark = pytest.mark.trust("input", "arguments of public functions")

L2J = multiplier("mul8s_1L2J")
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def images():
    return datasets.synthetic(classes=3, size=8, n_train=12, n_test=6, seed=0)


@pytest.fixture(scope="module")
def x(images):
    return images.normalised(images.x_test)


@pytest.fixture
def network():
    return models.resnet8(classes=3)


@pytest.fixture(scope="module")
def unpriced(tmp_path_factory):
    """The name of a multiplier whose power nobody knows."""
    file = tmp_path_factory.mktemp("tables") / "mine.npy"
    np.save(file, L2J.table.numpy())
    assert multiplier(f"file:{file}").power_mw is None
    return f"file:{file}"


ASSIGNMENTS = [
    None,
    3,
    b"roba()",
    {"conv1"},
    [],
    [3],
    [[]],
    [["roba()"], 3],
    "x",
    '{"conv1": "roba()"}',
]
ASSIGNMENTS += [
    {"x": "roba()"},
    {"": "roba()"},
    {1: "roba()"},
    {"conv1": None},
    {"conv1": 3},
    {"conv1": []},
    {"conv1": [3]},
]
ASSIGNMENTS += [
    {"conv1": "x"},
    {"conv1": [["roba()"], ["roba()", "roba()"]]},
    {"conv1": "row[roba(), drum(4)]"},
    {"bn1": "roba()"},
]
ASSIGNMENTS += [
    {"conv1": "roba()", "conv": "roba()"},
    {"fc": "row[roba(), drum(4)]"},
    {"conv1": ["roba()", 3] * 8},
    [[["roba()"]]],
]


@pytest.mark.parametrize("assignment", ASSIGNMENTS, ids=lambda a: str(a)[:40])
def test_an_assignment_that_cannot_be_leaves_the_network_as_it_was(network, x, assignment):
    before = network(x[:1])
    with pytest.raises(ValueError):
        approximate(network, assignment, calibration=x)
    assert not assignment_of(network) and torch.equal(network(x[:1]), before)


def test_calibration_that_cannot_be_leaves_the_network_as_it_was(network, x, images, record_property):
    broken = [
        None,
        3,
        "x",
        [],
        [3],
        x[:0],
        x[:, :1],
        x[0, 0],
        x * NAN,
        x * INF,
        x.double(),
        images.x_test,
        [x, x * NAN],
        [x, x[:0]],
    ]
    for calibration in broken:
        with pytest.raises(ValueError):
            approximate(network, "mul8s_1L2J", calibration=calibration)
        assert not assignment_of(network)
    options = [{"percentile": p} for p in (0, -1, 101, NAN, INF, "x", None)] + [{"method": m} for m in ("x", None, 3)]
    for wrong in [*options, {"gradient": "x"}, {"gradient": 3}, {"per_channel": "no"}]:
        with pytest.raises(ValueError):
            approximate(network, "mul8s_1L2J", calibration=x, **wrong)
    record_property("cases", len(broken) + len(options) + 3)


@pytest.mark.parametrize("wrong", ["resnet20", None, 3, nn.ReLU, []], ids=str)
def test_what_is_no_network_is_refused(wrong, images):
    calls = [
        lambda: approximate(wrong, "roba()"),
        lambda: restore(wrong),
        lambda: freeze(wrong),
        lambda: models.upcycle(wrong, topology="hard"),
        lambda: models.upcycle(
            models.resnet8(classes=3), topology="cluster", gateway=wrong if wrong is not None else "x"
        ),
        lambda: study.measure(wrong, images, ["roba()"]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="a torch module is needed"):
            call()


UPCYCLED = [
    ("topology", "x"),
    ("topology", None),
    ("r", 0),
    ("r", -1),
    ("r", 1.1),
    ("r", NAN),
    ("r", "x"),
    ("placement", "x"),
]
UPCYCLED += [("experts", value) for value in (0, -1, 2.5, "4", None, True, NAN)]
UPCYCLED += [("gate", "x"), ("jitter", -1), ("jitter", NAN), ("per", "x"), ("weighting", "x"), ("no_such_option", 1)]


@pytest.mark.parametrize(("option", "value"), UPCYCLED, ids=str)
def test_a_mixture_that_cannot_be_is_refused(network, option, value):
    with pytest.raises(ValueError, match=option if option != "no_such_option" else "An option of upcycle"):
        models.upcycle(network, **{"topology": "hard", option: value})


@pytest.mark.parametrize("classes", [0, -1, 2.5, "10", None, NAN])
def test_a_network_of_no_classes_is_refused(classes):
    with pytest.raises(ValueError, match="classes is"):
        models.resnet8(classes=classes)


def ones(*shape):
    return torch.ones(shape, dtype=torch.int8)


PRODUCTS = {
    "shapes": (ones(2, 3), ones(2, 3), L2J),
    "no tensor": (None, ones(3, 2), L2J),
    "a list": ([[1]], [[2]], L2J),
    "a vector": (ones(3), ones(3, 2), L2J),
    "floats": (ones(2, 3).float(), ones(3, 2), L2J),
    "bools": (ones(2, 3).bool(), ones(3, 2), L2J),
    "too large": (ones(2, 3).int() * 128, ones(3, 2), L2J),
    "too small": (ones(2, 3).int() * -129, ones(3, 2), L2J),
    "batches": (ones(2, 2, 3), ones(3, 3, 2), L2J),
    "a name": (ones(2, 3), ones(3, 2), "mul8s_1L2J"),
    "nothing": (ones(2, 3), ones(3, 2), None),
    "a table": (ones(2, 3), ones(3, 2), L2J.table),
}


@pytest.mark.parametrize("what", PRODUCTS)
def test_a_product_that_cannot_be_is_refused(what):
    with pytest.raises(ValueError):
        kernels.matmul(*PRODUCTS[what])


@pytest.mark.parametrize("path", ["auto", "factored", "lookup", "reference"])
def test_products_of_nothing_are_nothing(path, record_property):
    shapes = [((0, 3), (3, 2)), ((2, 0), (0, 2)), ((2, 3), (3, 0)), ((0, 2, 3), (0, 3, 2)), ((0, 0), (0, 0))]
    for left, right in shapes:
        found = kernels.matmul(ones(*left), ones(*right), L2J, path=path)
        assert found.shape == (*left[:-1], right[-1]) and found.dtype == torch.int32 and not found.any()
    assert kernels.conv2d(ones(0, 2, 5, 5), ones(3, 2, 3, 3), L2J, path=path).shape == (0, 3, 3, 3)
    record_property("cases", len(shapes) + 1)


@pytest.mark.parametrize("option", ["stride", "padding", "dilation", "groups", "path"])
def test_options_of_a_convolution_that_cannot_be_are_refused(option, record_property):
    values = [-1, "x", None, 1.5, NAN, (1, 2, 3), (), (1, "x"), [1.0, 1.0]] + [0] * (option != "padding")
    for value in values:
        with pytest.raises(ValueError):
            kernels.conv2d(ones(1, 2, 5, 5), ones(4, 2, 3, 3), L2J, **{option: value})
    record_property("cases", len(values))


@pytest.mark.parametrize("weight", [(3, 3, 3, 3), (3, 2, 9, 9), (3, 2, 0, 0), (3, 2, 3)], ids=str)
def test_a_kernel_that_does_not_fit_is_refused(weight):
    with pytest.raises(ValueError):
        kernels.conv2d(ones(1, 2, 5, 5), ones(*weight), L2J)


TABLES = [
    None,
    "table",
    [[1]],
    [],
    L2J.table[:255],
    L2J.table.float(),
    L2J.table.bool(),
    L2J.table.long() * 2**20,
    object(),
    {},
]


def test_a_table_that_cannot_be_is_refused(record_property):
    for table in TABLES:
        with pytest.raises(ValueError, match="The table of 'mine'"):
            Multiplier("mine", table)
    figures = [("power_mw", v) for v in (-1, NAN, INF, "0.3", [1])] + [
        ("delay_ns", -1),
        ("area_um2", "x"),
        ("name", 3),
        ("name", None),
    ]
    for name, value in figures:
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(L2J, **{name: value})
    for a, b in ((300, 1), (1, -129), ("a", 1), (1.5, 1), (None, 1), (1, NAN)):
        with pytest.raises(ValueError, match="Operand"):
            L2J(a, b)
    for what in ("roba()", None, 3, L2J.table):
        for call in (errors, factorise):
            with pytest.raises(ValueError, match="no multiplier"):
                call(what)
    for names, by in (
        ([], "filter"),
        ([1], "filter"),
        (["a", ["b"]], "filter+row"),
        (["a"], "x"),
        ([["a"], []], "filter+row"),
    ):
        with pytest.raises(ValueError):
            mosaic_name(names, by=by)
    record_property("cases", len(TABLES) + len(figures) + 6 + 8 + 5)


def test_ranges_of_what_is_no_number_are_refused(x, record_property):
    seen = quant.Histogram()
    for values in (x[:0], x * NAN, x * INF, torch.tensor([1.0, NAN]), torch.tensor([-INF])):
        with pytest.raises(ValueError, match="Calibration of 'this layer' met"):
            seen.update(values)
    with pytest.raises(ValueError, match="has seen nothing"):
        seen.scale()
    seen.update(x)
    for method, percentile in (("x", 99), (None, 99), ("percentile", 0), ("percentile", NAN), ("percentile", "x")):
        with pytest.raises(ValueError, match="method|percentile"):
            seen.scale(method, percentile=percentile)
    record_property("cases", 11)


def test_prices_of_what_was_not_counted_are_refused(network, x, unpriced, record_property):
    macs = cost.count(network, x[:1])
    wrong = [
        (macs, a, None)
        for a in (None, "roba()", ["roba()"], {"x": "roba()"}, {"conv1": "x"}, {"conv1": unpriced}, {"conv1": 3})
    ]
    wrong += [(macs, {}, base) for base in (0, -1, NAN, "x", [])] + [(None, {}, None), (network, {}, None)]
    for counted, assignment, base in wrong:
        with pytest.raises(ValueError):
            cost.price(counted, assignment, base=base)
    for inputs, batch in ((x[:0], 250), ("x", 250), (None, 250), (x, 0), (x, -1)):
        with pytest.raises(ValueError, match=r"count\(\) was given"):
            cost.count(network, inputs, batch_size=batch)
    right = {"executed": 1, "base": 1, "share": 0.5, "power_mw": 0.3}
    parts = [(name, value) for name in right for value in (-1, NAN, "x", None)]
    for name, value in parts:
        with pytest.raises(ValueError, match=r"p_norm\(\) was asked"):
            cost.p_norm(**{**right, name: value})
    record_property("cases", len(wrong) + 5 + len(parts))


MEASURED = [{"multipliers": m} for m in ("roba()", None, 3, ["x"], [3], [None], ["roba()", "x"])]
MEASURED += [{"regimes": r} for r in (["x"], "retrained", [None])] + [
    {"layers": layers} for layers in (["x"], "conv1", [3])
]
MEASURED += [{"retrain_epochs": e} for e in (-1, "x", 1.5, None, NAN)] + [{"retrain_images": n} for n in (0, -5)]
MEASURED += [{"skip": [("roba()", "x")]}, {"base": 0}, {"base": "x"}]


@pytest.mark.parametrize("wrong", MEASURED, ids=str)
def test_a_study_that_cannot_be_is_refused_by_the_call_itself(network, images, wrong):
    with pytest.raises(ValueError):
        study.measure(network, images, **{"multipliers": ["roba()"], **wrong})


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"epochs": "x"}, {"epochs": 1.5}, {"lr": NAN}, {"lr": 0}, {"batch_size": 0}], ids=str
)
def test_training_that_cannot_be_is_refused(network, images, wrong):
    with pytest.raises(ValueError, match=r"fit\(\) was asked"):
        train.fit(network, images, **{"epochs": 1, "progress": False, **wrong})
    with pytest.raises(ValueError, match="batch_size is 0"):
        train.evaluate(network, images, batch_size=0)


# ---------------------------------------------------------------------------------- multipliers without a power


def searches(network, images, names):
    """Every search that chooses among multipliers, in the least it can be asked."""
    macs = cost.count(network, images.normalised(images.x_test[:1]))
    groups, one = {"a": ["conv1"]}, {"conv1": 0.5}
    cores, parts = (search.places.Core("big", 10.0, 1.0),), {"a": ["conv1"]}
    score = lambda chosen: search.Score(0.0, 0.0, 1.0)  # noqa: E731
    return {
        "search": lambda: search.search(network, images, names, base=macs, progress=False),
        "explore": lambda: search.explore(groups, names, evaluate=score, price=lambda chosen: 1.0, progress=False),
        "uniform": lambda: search.uniform(network, names),
        "match": lambda: match(one, {"conv1": {}}, one, names),
        "choose": lambda: choose({"conv1": {}}, one, one, names),
        "genetic": lambda: search.genetic.search(network, images, names, base=macs, progress=False),
        "ranking": lambda: search.ranking.search(network, images, names, base=macs, progress=False),
        "maxdnn": lambda: search.maxdnn.search(network, images, names, base=macs, progress=False),
        "agn": lambda: search.agn.search(network, images, names, base=macs, progress=False),
        "best": lambda: search.places.best(macs, parts, names, cores=cores),
    }


SEARCHES = ("search", "explore", "uniform", "match", "choose", "genetic", "ranking", "maxdnn", "agn", "best")


@pytest.mark.parametrize("method", SEARCHES)
def test_a_search_among_what_has_no_power_or_no_name_is_refused(network, images, unpriced, method, record_property):
    wrong = [[unpriced], "roba()", ["x"], [3], None, 3, [None]]
    for names in wrong:
        with pytest.raises(ValueError):
            searches(network, images, names)[method]()
    record_property("cases", len(wrong))


def test_a_figure_that_orders_by_power_refuses_what_has_none(unpriced, network, images, record_property):
    evidence = {"network": "n", "topology": "dense", "regime": "retrained", "dataset": "d", "n_train": 1, "n_test": 1}
    evidence |= {"scale": "quick", "seed": 0, "epochs": 1, "device": "d", "commit": "c", "date": "d", "version": "v"}
    rows = [{"multiplier": unpriced, "top1": 0.5, "seconds": 1.0, **evidence}]
    moved = [{"multiplier": unpriced, "more_divergence": 0.1, "group": "a"}]
    macs = cost.count(network, images.normalised(images.x_test[:1]))
    put = {"parts": {"a": ["conv1"]}, "places": {"a": "big"}, "assignment": {"conv1": unpriced}}
    calls = [lambda: recovered(rows, title="x"), lambda: sensitivities(moved, title="x")]
    calls += [lambda: search.places.put(macs, **put, cores=(search.places.Core("big", 10.0, 1.0),))]
    for call in calls:
        with pytest.raises(ValueError, match=r"The power of multiplier 'file:.*' is not known"):
            call()
    record_property("cases", len(calls))


@pytest.mark.parametrize(
    "points", [[], "x", [{}], ["x"], {"conv1": "roba()"}, [{"x": "roba()"}], [{"conv1": "x"}], [3]], ids=str
)
def test_points_that_cannot_be_are_refused(network, images, points):
    with pytest.raises(ValueError):
        search.points.operating_points(network, points, images)


def test_every_circuit_survives_its_own_name():
    assert all(json.loads(json.dumps(multiplier(name).name)) == name for name in EVOAPPROX)

"""The benchmark: it measures what it says, its columns agree, and it refuses typos. No test asserts a time."""

import functools
import json
import time

import pytest
import torch
import vl_convert

from axmoe_lite import EVOAPPROX, approximate, bench, errors, factorise, models, multiplier, paths, plots, runs
from axmoe_lite.__main__ import main
from axmoe_lite.bench import cases
from axmoe_lite.kernels import reference
from axmoe_lite.layers import Matmul

GROUPS = list(bench.CASES)


@functools.cache
def build(group, number=0, *, quick=True):
    return bench.builders([group], quick=quick)[number]()


def result(case, column):
    with torch.inference_mode():
        return case.columns[column]()


def test_the_naive_gather_is_the_law(draw):
    for m, k, n in [(1, 1, 1), (2, 23, 1), (115, 2, 23), (23, 115, 5)]:
        a, b = draw(m, k), draw(k, n)
        for name in ("mul8s_1L2J", "mul8s_1KVA", "mitchell()", "swap:mul8s_1KVM"):
            table = multiplier(name).table
            assert torch.equal(bench.gather_matmul(a, b, table), reference.matmul(a, b, table))


def test_the_naive_gather_tells_its_operands_apart():
    table = torch.zeros(256, 256, dtype=torch.int32)
    table[3 + 128, 5 + 128], table[5 + 128, 3 + 128] = 1, 2
    assert bench.gather_matmul(torch.tensor([[3]]), torch.tensor([[5]]), table).item() == 1


def test_the_naive_gather_in_many_chunks(draw, monkeypatch):
    a, b, table = draw(23, 7), draw(7, 5), multiplier("mul8s_1KVA").table
    monkeypatch.setattr("axmoe_lite.bench.gather.CHUNK", 1)
    assert torch.equal(bench.gather_matmul(a, b, table), reference.matmul(a, b, table))


CONV = torch.nn.Conv2d
LAYERS = {
    "conv": (lambda: CONV(3, 5, 3, padding=1), (2, 3, 7, 9)),
    "strided": (lambda: CONV(2, 3, (3, 2), stride=(2, 3), padding=(1, 0), bias=False), (2, 2, 8, 11)),
    "dilated": (lambda: CONV(1, 2, 3, dilation=2), (1, 1, 9, 7)),
    "linear": (lambda: torch.nn.Linear(23, 5), (2, 4, 23)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_gather_layer_has_the_bits_of_the_layer(name, per_channel):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.randn(shape)
    net = torch.nn.Sequential(make()).eval()
    approximate(net, {"0": "mul8s_1KVA"}, calibration=x, per_channel=per_channel)
    with torch.inference_mode():
        assert torch.equal(bench.GatherLayer(net[0])(x), net(x))


@pytest.mark.parametrize(("group", "number"), [("gemm", 0), ("gemm", 1), ("convs", 0), ("mlp", 0), ("attention", 0)])
def test_columns_of_a_layer_agree_in_every_bit(group, number):
    case = build(group, number)
    part = round(case.share["naive gather"] * len(result(case, "mul8s_1L2J")))
    naive = result(case, "naive gather")
    assert part == len(naive) >= 1
    assert torch.equal(naive, result(case, "mul8s_1L2J")[:part])
    wrong = result(case, "mul8s_1KVA")[:part]
    assert not torch.equal(naive, wrong), "another multiplier must give other bits"
    exact, true = result(case, "mul8s_1KV6"), result(case, "float32")
    assert (exact - true).norm() < 0.05 * true.norm(), "the exact multiplier differs by rounding alone"


def test_columns_of_a_network():
    case = build("resnet20")
    assert set(case.columns) == {
        "float32", "float32 prepared", "mul8s_1KV6", "mul8s_1KV6 frozen", "mul8s_1L2J", "mul8s_1L2J frozen",
        "mul8s_1KVA", "mul8s_1KVA frozen", "random table", "naive gather",
    }  # fmt: skip
    true = result(case, "float32")
    assert torch.allclose(result(case, "float32 prepared"), true, atol=1e-4 * true.abs().max())
    for name in ("mul8s_1KV6", "mul8s_1KVA"):  # frozen, BatchNorm rounds elsewhere: a code flips now and then
        layered, frozen = result(case, name), result(case, f"{name} frozen")
        assert (layered - frozen).norm() < 0.1 * layered.norm()
    assert (result(case, "mul8s_1KVA") - true).norm() > 0.3 * true.norm(), "and the circuits really are in it"
    naive = result(case, "naive gather")
    assert len(naive) == 1 and (naive - result(case, "mul8s_1L2J")[:1]).norm() < 0.05 * naive.norm()


def test_the_full_list_of_columns_and_cases():
    case = build("convs", 1, quick=False)
    assert case.name == "conv 3x3, 16 to 16 channels, 32x32, 64 images"
    assert list(case.columns) == ["float32", *EVOAPPROX, *bench.HIGH_RANK, "naive gather"]
    assert case.macs == 64 * 32 * 32 * 16 * 16 * 9
    # 3 -> 16; 16 -> 16; 16 -> 32 by 3x3 and 1x1 with stride 2; 32 -> 32; the same two to 64; 64 -> 64
    assert len(bench.builders(["convs"])) == 8
    names = [build().name for build in bench.builders(["scaling"], quick=True)]
    assert sum("16x16" in name for name in names) == 9


def test_products_are_counted():
    # ResNet-20 at 100 classes has 40.82 M (see models.resnet20), of which the case takes 8 images.
    assert round(build("resnet20").macs / 8e6, 2) == 40.82
    assert build("gemm").macs == build("gemm", 1).macs == 8192 * 576 * 64
    assert build("attention").macs == 4 * 6 * 197 * 197 * 64
    # The docstring of models.vit_small: 4.241 G in layers with weights, 0.358 G in attention's products.
    network = models.vit_small(classes=1000).eval()
    assert round(cases._products(network, torch.zeros(1, 3, 224, 224)) / 1e9, 3) == 4.599


@pytest.mark.parametrize("rank", [1, 2, 5, 12, 32])
def test_planted_tables_have_their_rank_and_factors_that_are_bytes(rank):
    found = factorise(bench.planted_table(rank))
    assert found.rank == rank and max(max(side) for side in found.largest) <= 127


def test_a_planted_table_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="rank 65 was asked for; 1 to 64"):
        bench.planted_table(65)


def test_the_random_table_is_the_worst_case():
    found = bench.random_table()
    assert factorise(found).rank == 256 and found.largest < 2**15 and errors(found).ep > 0.99
    assert found.digest == bench.random_table().digest != bench.random_table(seed=1).digest


def test_attention_products_are_products_of_matrices():
    case = build("attention", 1)
    assert result(case, "float32").shape == (4, 6, 197, 64)
    assert isinstance(case.columns["float32"].func.layer, Matmul)


def test_a_training_step_changes_only_its_own_network():
    case = build("training")
    first = {name: case.columns[name]() for name in ("float32", "mul8s_1KV6")}
    again = {name: case.columns[name]() for name in ("float32", "mul8s_1KV6")}
    assert all(again[name] < first[name] for name in first), "each learns its one batch"
    assert abs(first["float32"] - first["mul8s_1KV6"]) < 0.05


@pytest.fixture
def tiny(monkeypatch):
    """One case that takes no time, under the name of a group."""

    def case():
        x = torch.ones(3, 4)
        columns = {"float32": lambda: x @ x.T, "mul8s_1L2J": lambda: x, "naive gather": lambda: x}
        return bench.Case("tiny", "gemm", columns, 36, 3, {"naive gather": 1 / 3})

    monkeypatch.setitem(bench.CASES, "gemm", lambda quick: [case])


def test_rows_are_complete(tiny, elsewhere):
    rows = bench.run(bench.builders(["gemm"]), scale="quick", repeats=2, progress=False)
    assert [row["column"] for row in rows] == ["float32", "mul8s_1L2J", "naive gather"]
    for row in rows:
        assert row["seconds"] > 0 and 0 < row["speed_low"] <= row["speed"] <= row["speed_high"]
        assert (row["threads"], row["n_test"], row["dataset"], row["macs"]) == (1, 3, "random numbers", 36)
        assert row["torch"] == torch.__version__ and row["device"].endswith("1 threads")
    assert rows[0]["speed"] == 1 and [row["rank"] for row in rows] == ["", 1, ""]
    assert [row["note"] for row in rows] == ["", "", "measured on 1 of 3 inputs, time scaled"]
    (path,) = bench.record(rows)
    assert path == paths.cache_dir() / "results" / "speed_cases.csv"
    assert bench.record(rows) == [path] and len(runs.read("speed_cases", scale="quick")) == 3, "replaced, not repeated"


def test_a_part_is_scaled_to_the_whole(monkeypatch):
    monkeypatch.setattr(runs, "turns", lambda calls, repeats: {"float32": [2.0, 4.0, 2.0], "naive gather": [5.0] * 3})
    case = bench.Case("c", "gemm", {}, 10, 8, {"naive gather": 1 / 4})
    fast, slow = bench.measure(case, scale="quick", repeats=3)
    # 5 seconds for a quarter are 20 for all; the ratios are 2/20, 4/20, 2/20
    assert (slow["seconds"], slow["speed"], slow["speed_low"], slow["speed_high"]) == pytest.approx(
        (20, 0.1, 0.1, 0.15)
    )
    assert (fast["seconds"], fast["speed"]) == (2.0, 1.0)


def test_turns_interleave_and_fill_their_time(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(name, seconds):
        def go():
            said.append(name)
            now[0] += seconds

        return go

    found = runs.turns({"short": call("s", 0.002), "long": call("L", 1.0)}, repeats=2, at_least=0.005)
    # twice each to warm up and to see how long they take; then a turn: one unmeasured and three measured, and one
    assert "".join(said) == "ssLL" + "ssssL" * 2
    assert found == {"short": pytest.approx([0.002] * 2), "long": pytest.approx([1.0] * 2)}


def test_threads_are_as_many_as_asked_and_restored():
    before = torch.get_num_threads()
    with bench.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with (
        pytest.raises(ValueError, match=rf"999 threads were asked for; this process has {runs.cores()} cores"),
        bench.threads(999),
    ):
        pass


def test_the_machine_is_described():
    assert set(bench.machine()) == {"torch", "numba", "units"} and all(bench.machine().values())


def test_the_command_prints_a_table_and_records_when_asked(tiny, elsewhere, capsys):
    assert main(["bench", "--quick", "--cases", "gemm", "--threads", "1", "--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert "tiny, 1 thread\n  2 turns" in printed and "1.00x" in printed and "mul8s_1L2J" in printed
    assert not (elsewhere / "data").exists()
    assert main(["bench", "--quick", "--cases", "gemm", "--threads", "1", "--repeats", "2", "--record"]) == 0
    assert len(runs.read("speed_cases", scale="quick")) == 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--cases", "resnt20"], "There is no case 'resnt20'. Did you mean 'resnet20'?"),
        (["--cases", "gemm,vgg1"], "Did you mean 'vgg11'?"),
        (["--cases", "gemm,"], "There is no case ''"),
        (["--threads", "999"], "--threads is '999'; this machine has"),
        (["--threads", "one"], "--threads is 'one'"),
        (["--threads", "0"], "--threads is '0'"),
        (["--repeats", "0"], "--repeats is 0; at least 1"),
        (["--case", "gemm"], "unrecognized arguments"),
    ],
)
def test_typos_are_refused_before_any_work(arguments, problem, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("work began"))
    try:
        status = main(["bench", *arguments])
    except SystemExit as stop:  # what argparse itself refuses
        status = stop.code
    assert status == 2
    assert problem in capsys.readouterr().err


def test_figures_of_measured_rows_refuse_rows_without_evidence(tiny):
    rows = bench.run(bench.builders(["gemm"]), scale="quick", repeats=1, progress=False)
    assert plots.speed_bars(rows).to_dict()["params"][0]["bind"]["options"] == ["tiny"]
    with pytest.raises(ValueError, match="'float32' lacks commit"):
        plots.speed_bars([{**row, "commit": ""} for row in rows])


def test_machines_are_not_mixed_in_one_figure(tiny):
    rows = bench.run(bench.builders(["gemm"]), scale="quick", repeats=1, progress=False)
    other = [{**row, "device": "Another, 1 threads", "speed": 7.0} for row in rows]
    spec = plots.speed_bars([*rows, *other]).to_dict()
    bound = {one["name"]: one["bind"] for one in spec["params"] if "bind" in one}
    here, there = bound["speed_machine"]["options"]
    assert there == "Another" and rows[0]["device"].startswith(here)
    assert "speed_machine" not in {one["name"] for one in plots.speed_bars(rows).to_dict()["params"] if "bind" in one}
    pick = next(one for one in spec["params"] if one["name"] == "speed_machine")
    assert pick["value"] == here and "datum.machine==speed_machine" in json.dumps(spec)
    assert "not measured there" not in json.dumps(spec["datasets"])
    elsewhere = plots.speed_bars([*rows, *({**row, "case": "another"} for row in other)]).to_dict()
    lacking = [row for data in elsewhere["datasets"].values() for row in data if row.get("mark") == "none"]
    assert {(row["case"], row["machine"], row["label"]) for row in lacking} == {
        ("tiny", "Another", "not measured there"),
        ("another", here, "not measured there"),
    }


def test_series_and_cases_are_drawn_small_and_offline():
    x = torch.ones(3, 4)
    ways = {name: (lambda: x @ x.T) for name in ("float32", "mul8s_1KV6", "mul8s_1KVA", "random table")}
    series = [
        bench.Case(f"{axis} {n}", "scaling", ways, 36, 3, axis=axis, value=n)
        for axis in ("images", "channels", "rank")
        for n in (1, 2)
    ]
    best = bench.Case("large", "peak", {"float32": lambda: x, "int8 units": lambda: x}, 64, 4, axis="peak", value=4)
    rows = [row for case in (*series, best) for row in bench.measure(case, scale="quick", repeats=1)]
    for chart in (plots.speed_scaling(rows), plots.speed_bars(rows)):
        spec = chart.to_dict()
        vl_convert.vegalite_to_vega(spec)
        text = json.dumps(spec)
        assert len(text) < 300_000 and "http" not in text.replace(spec["$schema"], "")
    with pytest.raises(ValueError, match="lacks date"):
        plots.speed_scaling([{**row, "date": ""} for row in rows])

"""The study's figures: means are means, gaps stay gaps, every number says where it comes from."""

import functools
import json
import re

import pytest
import vl_convert

from axmoe_lite import EXACT, PAPER_EIGHT, multiplier, runs
from axmoe_lite.plots import study as figures
from axmoe_lite.plots.study_rows import TOLD, gaps, spread, to_table
from axmoe_lite.study import REGIMES

ALL = [figures.resilience_curves, figures.recovery, figures.fronts, figures.heat_map, figures.coverage_chart]
ORIGIN = {**runs.evidence(10_000, scale="paper", seed=0, epochs=60), "dataset": "cifar100", "seconds": 1.0}
ORIGIN |= {"commit": "0123456789", "device": "a processor"}


def row(topology, circuit, regime, top1, *, network="resnet20", seed=0, **other) -> dict:
    trained = {"retrain_epochs": 5, "retrain_images": 50_000} if regime == "retrained" else {}
    mixture = {"experts": 1, "r": 0} if topology == "dense" else {"experts": 4, "r": 0.5, "upcycle_epochs": 20}
    power = multiplier(EXACT if circuit == "float32" else circuit).power_mw
    return {
        **{"network": network, "topology": topology, "multiplier": circuit, "regime": regime, "top1": top1},
        **{"retrain_epochs": 0, "retrain_images": 0, "upcycle_epochs": 0, "outcome": "", "power_mw": power},
        **{**trained, **mixture, "p_norm": power / 0.425, **ORIGIN, "seed": seed, **other},
    }


ROWS = [
    row("dense", "float32", "not retrained", 0.70),
    row("dense", EXACT, "not retrained", 0.68),
    row("dense", EXACT, "not retrained", 0.66, seed=1),
    row("dense", "mul8s_1L2L", "not retrained", 0.10),
    row("dense", "mul8s_1L2L", "not retrained", 0.14, seed=1),
    row("dense", "mul8s_1L2L", "retrained", 0.64),
    row("hard", EXACT, "not retrained", 0.69, p_norm=1.0004),
    row("hard", "mul8s_1KVA", "not retrained", 0.40, p_norm=0.9204),
    row("dense", EXACT, "not retrained", 0.97, network="resnet8", scale="quick", dataset="digits"),
]


@functools.cache
def made(figure) -> dict:
    """The figure of ROWS, checked against Vega-Lite's schema."""
    return figure(ROWS).to_dict()


def spec_of(figure, rows, **options) -> dict:
    return figure(rows, **options).to_dict(validate=False)  # the schema was asked in made(), and is slow


def find(spec, **place) -> list[dict]:
    """The rows of a specification's data that have all these values."""
    data = [r for rows in spec["datasets"].values() for r in rows]
    return [r for r in data if all(name in r and r[name] == value for name, value in place.items())]


def drawn(spec, **chosen) -> str:
    params = [{**p, "value": chosen[p["name"]]} if p["name"] in chosen else p for p in spec["params"]]
    return re.sub(r"gradient_\d+", "gradient", vl_convert.vegalite_to_svg({**spec, "params": params}))


def texts(spec, **chosen) -> list[str]:
    return re.findall(r">([^<>]+)</text>", drawn(spec, **chosen))


def inside(spec, key: str) -> list:
    """Everything that stands under this key, however deep."""
    below = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else []
    return [
        *([spec[key]] if isinstance(spec, dict) and key in spec else []),
        *(f for b in below for f in inside(b, key)),
    ]


CIFAR = {"network": "resnet20, cifar100", "topology": "dense", "multiplier": "mul8s_1L2L"}


@pytest.mark.parametrize("figure", ALL[:4])
def test_means_are_over_seeds_and_within_a_regime(figure):
    (found,) = find(made(figure), **CIFAR, regime="not retrained", seeds="0, 1", n=2)
    assert found["top1"] == pytest.approx(0.12) and found["spread"] == "10.00% to 14.00%"
    (alone,) = find(made(figure), **CIFAR, regime="retrained", spread="64.00% to 64.00%")
    assert (alone["top1"], alone["seeds"], alone["n"]) == (0.64, "0", 1)


@pytest.mark.parametrize("figure", ALL[:4])
def test_every_number_says_where_it_comes_from(figure):
    spec = made(figure)
    for tooltip in [t for t in inside(spec, "tooltip") if isinstance(t, list)]:
        told = {tip["field"] for tip in tooltip}
        assert told >= {"seeds", "n", "dataset", "n_test", "epochs", "retrain_images", "commit", "date", "device"}
    assert [t for t in inside(spec, "tooltip") if isinstance(t, list)]
    lookups = inside(spec, "lookup")
    assert set(lookups) == {"origin"}
    assert all(fields == TOLD for fields in inside(spec, "fields") if "n_test" in fields)
    (found,) = find(made(figure), **CIFAR, regime="retrained", spread="64.00% to 64.00%")
    (told,) = [r for r in find(made(figure), origin=found["origin"]) if "commit" in r]
    assert (told["retrain_images"], told["commit"], told["n_test"]) == ("50000", "0123456789", "10000")


def test_evidence_of_a_mean_names_all_its_sources():
    rows = [
        row("dense", EXACT, "not retrained", 0.6),
        row("dense", EXACT, "not retrained", 0.7, seed=1, device="a GPU"),
    ]
    (mean,) = find(spec_of(figures.heat_map, rows), seeds="0, 1")
    (told,) = [r for r in find(spec_of(figures.heat_map, rows), origin=mean["origin"]) if "device" in r]
    assert told["device"] == "a processor; a GPU"


def test_rows_may_be_fresh_or_read_from_a_file():
    read = [{name: str(value) for name, value in r.items()} for r in ROWS]
    for name, old in to_table(ROWS, "t").drop(columns="r").items():
        assert to_table(read, "t")[name].astype(str).tolist() == old.astype(str).tolist(), name
    assert find(spec_of(figures.heat_map, read), n=2) == find(made(figures.heat_map), n=2)
    assert not any("NaN" in drawn(made(figure)) for figure in ALL)


@pytest.mark.parametrize("figure", [figures.resilience_curves, figures.fronts])
def test_a_click_on_the_legend_reaches_the_chart(figure):
    """Vega-Lite merges the legends of all layers, and only the first one's layer can make it listen."""
    (legend,) = vl_convert.vegalite_to_vega(made(figure))["legends"]
    assert legend["encode"]["symbols"]["interactive"] and legend["encode"]["labels"]["interactive"]
    assert {"shape", "fill"} <= set(legend)  # one legend for both


def test_a_study_without_float32_draws():
    assert "70%" not in texts(spec_of(figures.resilience_curves, ROWS[3:4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": ""}, "lacks commit"),
        ({"topology": "sfot"}, "No topology is called 'sfot'. Did you mean 'soft'"),
        ({"regime": "retraind"}, "No regime is called 'retraind'. Did you mean 'retrained'"),
        ({"top1": 64}, "top1 of 64; it lies in"),
        ({"top1": "nan"}, "top1 of nan"),
        ({"p_norm": ""}, "without p_norm"),
        ({"seed": 1}, "1 rows are there twice, such as resnet20, cifar100, dense, mul8s_1L2L, not retrained, 1"),
        ({"experts": 8}, "dense have experts = 1, 8"),
        ({"gateway": "resnet8"}, "dense have gateway = , resnet8"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        figures.heat_map([*ROWS[:3], {**ROWS[3], **change}, *ROWS[4:]])


@pytest.mark.parametrize("figure", ALL)
def test_a_missing_column_and_nothing_at_all_are_refused(figure):
    with pytest.raises(ValueError, match="without retrain_images"):
        figure([{name: v for name, v in ROWS[1].items() if name != "retrain_images"}])
    for rows in ([], ROWS[:1]):
        with pytest.raises(ValueError, match=f"{figure.__name__}.. was given no row of a multiplier"):
            figure(rows)


@pytest.mark.parametrize(("figure", "prefix"), zip(ALL[:4], ("resilience", "recovery", "fronts", "heat"), strict=True))
def test_menus_list_what_there_is(figure, prefix):
    spec = made(figure)
    names = [param["name"] for param in spec["params"]]
    assert len(set(names)) == len(names) and all(name.startswith(f"{prefix}_") for name in names)
    menus = {p["name"]: p["bind"]["options"] for p in spec["params"] if "options" in p.get("bind", "")}
    assert menus[f"{prefix}_network"] == ["resnet20, cifar100", "resnet8, digits (quick)"]  # quick ones last
    if figure is not figures.recovery:
        assert menus[f"{prefix}_regime"] == ["not retrained", "retrained"]


def test_one_network_in_one_regime_needs_no_menu():
    assert not inside(spec_of(figures.heat_map, ROWS[:2]), "options")


def test_lengths_of_retraining_are_kept_apart():
    shorter = row("hard", EXACT, "retrained", 0.5, retrain_images=12_800)
    regimes = set(to_table([*ROWS, shorter], "t")["regime"])
    assert regimes == {"not retrained", "retrained, 5 epochs of 50000 images", "retrained, 5 epochs of 12800 images"}
    marks = figures._shapes(to_table([*ROWS, shorter], "t"))
    assert list(marks.values()) == ["circle", "circle", "triangle-up"]  # the first is hollow
    faster = [{**r, "retrain_lr": lr} for r, lr in ((shorter, 0.1), ({**shorter, "seed": 1}, "0.100"), (ROWS[5], 0))]
    faster = set(to_table([*faster, {**shorter, "seed": 2, "retrain_lr": 0.01}], "t")["regime"])
    assert {f"retrained, 5 epochs of 12800 images, learning rate {lr}" for lr in (0.1, 0.01)} < faster
    networks = set(to_table([*ROWS, row("dense", EXACT, "not retrained", 0.5, epochs=9)], "t")["network"])
    assert {n for n in networks if n.startswith("resnet20")} == {
        f"resnet20, cifar100, 0 training and 10000 test images, {epochs} epochs" for epochs in (60, 9)
    }


# ------------------------------------------------------------------------------------- gaps


def test_a_line_breaks_where_nothing_was_run():
    places = find(
        made(figures.resilience_curves), network="resnet20, cifar100", regime="not retrained", topology="hard"
    )
    assert [r["top1"] for r in places if r["multiplier"] == "mul8s_1L2L"] == [None]
    modes = inside(made(figures.resilience_curves), "invalid")
    assert modes == ["break-paths-filter-domains"]
    rows = [*ROWS, *(row("soft", c, "not retrained", t) for c, t in ((EXACT, 0.6), ("mul8s_1L2L", 0.3)))]
    (path,) = re.findall(r'd="(M[^"]*)" stroke="#009E73"', drawn(spec_of(figures.resilience_curves, rows)))
    assert path.count("M") == 2  # KVA lies between the two, and was not run: two pieces
    rows.append(row("soft", "mul8s_1KVA", "not retrained", 0.5))
    (path,) = re.findall(r'd="(M[^"]*)" stroke="#009E73"', drawn(spec_of(figures.resilience_curves, rows)))
    assert path.count("M") == 1 and path.count("L") == 2


def test_what_was_not_run_is_written_down():
    notes = {
        (r["network"], r["regime"]): r["note"] for r in gaps(to_table(ROWS, "t", float32=False)).to_dict("records")
    }
    # KV6, L2L and KVA under two seeds are six runs; dense has four of them, hard two.
    assert notes["resnet20, cifar100", "not retrained"] == (
        "Not run: soft, cluster, dense 2 of 6 runs, hard 4 of 6 runs."
    )
    assert notes["resnet8, digits (quick)", "retrained"] == "Nothing of this was run."
    assert notes["resnet20, cifar100", "not retrained"] in texts(made(figures.resilience_curves))
    complete = [row(t, EXACT, "not retrained", 0.6) for t in ("dense", "hard", "soft", "cluster")]
    assert gaps(to_table(complete, "t"))["note"].tolist() == [""]


def test_panels_of_recovery_say_what_was_not_run():
    found = texts(made(figures.recovery), recovery_network="resnet20, cifar100")
    assert found.count("not run") == 1 + 1 + 3 + 3  # dense KVA, hard L2L, all of soft and cluster
    assert [t for t in found if re.match(r"KV|L2", t)] == ["KV6, 100 %", "KVA, 92 %", "L2L, 47 %"]


def test_cells_of_the_heat_map():
    chart = made(figures.heat_map)
    # (68 - 10 + 66 - 14) / 2 points; the exact one's own cell says what it reached, (68 + 66) / 2.
    (lost,) = find(chart, **CIFAR, regime="not retrained", n=2)
    assert (lost["lost"], lost["text"], lost["loss"]) == (55, "55.0", "55.00, n = 2")
    (exact,) = find(chart, network="resnet20, cifar100", topology="dense", multiplier=EXACT)
    assert (exact["text"], exact["shade"]) == ("67.0 %", None)
    (unpaired,) = find(chart, **CIFAR, regime="retrained")  # there is no exact row after retraining
    assert (unpaired["text"], unpaired["shade"], unpaired["loss"]) == ("64.0 %", None, "no exact row")
    found = texts(chart)
    assert {"55.0", "67.0 %", "29.0"} < set(found) and found.count("not run") >= 8
    assert not find(chart, topology="soft", regime="not retrained")
    (value,) = find(spec_of(figures.heat_map, ROWS, value="top1"), **CIFAR, regime="not retrained", n=2)
    assert (value["text"], value["shade"]) == ("12.0 %", pytest.approx(12))
    with pytest.raises(ValueError, match="No value is called 'top-1'. Did you mean 'top1'"):
        figures.heat_map(ROWS, value="top-1")


def test_losses_pair_the_same_seeds_only():
    rows = [row("dense", EXACT, "not retrained", 0.9), row("dense", "mul8s_1L2L", "not retrained", 0.5, seed=0)]
    rows.append(row("dense", "mul8s_1L2L", "not retrained", 0.1, seed=1))  # its exact row is not there
    (found,) = find(spec_of(figures.heat_map, rows), **CIFAR, n=2)
    assert found["loss"] == "40.00, n = 1" and found["top1"] == pytest.approx(0.3)


# ------------------------------------------------------------------------------- fronts, grids


def test_the_front_is_of_the_means_of_one_network_and_regime():
    lucky = row("dense", "mul8s_1KVA", "not retrained", 0.99, seed=1)
    poor = row("dense", "mul8s_1KVA", "not retrained", 0.01)
    chart = spec_of(figures.fronts, [*ROWS, lucky, poor])
    named = [r for r in find(chart, network="resnet20, cifar100", regime="not retrained") if "place" in r]
    # KVA of dense (mean 50) beats that of hard; hard's KV6 (69, a little dearer) is above dense's (67).
    assert [(r["topology"], r["name"]) for r in named] == [("dense", n) for n in ("L2L", "KVA", "KV6")] + [
        ("hard", "KV6")
    ]
    steps = [r for r in find(chart, network="resnet20, cifar100") if set(r) == {"network", "regime", "p_norm", "top1"}]
    assert [r["top1"] for r in steps if r["regime"] == "retrained"] == [0.64, 0.64]
    assert not find(chart, multiplier="float32")


def test_neighbouring_names_are_pushed_apart():
    moved = spread([0.0, 1.0, 2.0, 50.0, 51.0], 10)
    assert moved == pytest.approx([-9, 1, 11, 45.5, 55.5])
    assert spread([1.0, 30.0], 10) == [1, 30] and spread([], 1) == []


def test_coverage_counts_wanted_cells():
    chart = spec_of(figures.coverage_chart, ROWS, networks=["resnet20", "vgg11_bn"])
    place = {"network": "resnet20, cifar100", "topology": "dense"}
    (whole,) = find(chart, **place, choice="all")
    assert (whole["done"], whole["of"]) == (5, 8 * 4 * 2)  # float32 is not wanted
    (one,) = find(chart, **place, choice="retrained")
    assert (one["done"], one["of"]) == (1, 16) and one["missing"].startswith("KV6 retrained (seed 0, 1), ")
    assert (
        "L2L retrained (seed 1)"
        in find(spec_of(figures.coverage_chart, ROWS, multipliers=["mul8s_1L2L"]), **place, choice="retrained")[0][
            "missing"
        ]
    )
    assert [r["done"] for r in find(chart, network="vgg11_bn", choice="all")] == [0] * 4
    assert not find(chart, network="resnet20")  # it is there already, with its data
    assert texts(chart).count("not run") == 2 + 4 + 3
    vit = spec_of(figures.coverage_chart, ROWS, networks=["vit_small"], seeds=[0])
    kinds = ("all", "retrained", "norms refreshed")
    assert [find(vit, network="vit_small", choice=kind)[0]["of"] for kind in kinds] == [8 * 3, 8, 0]
    with pytest.raises(ValueError, match="No network is called 'vgg12_bn'"):
        figures.coverage_chart(ROWS, networks=["vgg12_bn"])
    with pytest.raises(ValueError, match="name at least one"):
        figures.coverage_chart(ROWS, seeds=[])


def test_a_topology_has_its_colour_everywhere():
    colours = {"dense": "#0072B2", "hard": "#E69F00", "soft": "#009E73", "cluster": "#D55E00"}
    for figure in (figures.resilience_curves, figures.fronts):
        (scale,) = {json.dumps(s) for s in inside(made(figure), "scale") if "dense" in str(s) and "#" in str(s)}
        scale = json.loads(scale)
        assert dict(zip(scale["domain"], scale["range"], strict=True)) == colours
    assert all(colour in drawn(made(figures.recovery)) for colour in (colours["dense"], colours["hard"]))


def test_seven_hundred_rows_stay_small_and_name_no_address():
    rows = [
        row(t, c, regime, 0.5 + 0.001 * n, network=network, seed=seed, device="Intel(R) Xeon(R) Processor, 1 threads")
        for network in ("resnet20", "vgg11_bn")
        for t in ("dense", "hard", "soft", "cluster")
        for n, c in enumerate(PAPER_EIGHT)
        for regime in REGIMES
        for seed in (0, 1, 2)
    ]
    for figure in ALL:
        spec = spec_of(figure, rows[:700])
        text = json.dumps(spec)
        assert len(text) < 400_000 and "http" not in text.replace(spec["$schema"], "")

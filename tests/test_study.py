"""AxMoE's question as one function: every combination runs, resumes, and leaves what it was given as it was."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from axmoe_lite import EVOAPPROX, cost, datasets, models, moe, multiplier, paths, study, train
from axmoe_lite.layers import approximate, assignment_of, default_layers
from axmoe_lite.study import networks
from axmoe_lite.study import rows as in_rows
from axmoe_lite.train import loop

TINY = {"upcycle_epochs": 0, "experts": 2, "gateway": "resnet8", "progress": False}
ONCE = {"retrain_epochs": 1, "retrain_options": {"batch_size": 8, "augment": "none"}, "progress": False}
KEYS = (  # noqa: SIM905
    "multiplier regime retrain_epochs retrain_images top1 correct outcome p_norm approximated_share macs macs_static"
    " parameters energy_pj delay_ns digest power_mw mean_error seconds answers"
).split()


@pytest.fixture(scope="module")
def few():
    """8 + 4 images of 32 x 32, which VGG needs, in 3 classes."""
    return datasets.synthetic(classes=3, size=32, n_train=8, n_test=4)


@pytest.fixture(scope="module")
def small():
    """Images for what does not depend on the architecture."""
    return datasets.synthetic(classes=3, size=8, n_train=16, n_test=8)


def narrow(network, images, topology="dense", width=1 / 16, **options):
    both = {"build_options": {"width": width}, "gateway_options": {"width": width}}
    if network == "resnet20":
        both["build_options"]["shortcut"] = "pad"  # a narrow projection is refused
    return study.exact(network, images, topology=topology, **{"epochs": 0, **TINY, **both, **options})


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def no_training(*_, **__):
    raise AssertionError("something was trained")


@pytest.mark.parametrize("topology", models.TOPOLOGIES)
@pytest.mark.parametrize("network", ["resnet20", "vgg11_bn", "vgg19_bn", "vit_small"])
def test_every_combination_runs(network, topology, few):
    exact = narrow(network, few, topology)
    before = weights(exact)
    rows = list(study.measure(exact, few, EVOAPPROX, **ONCE))
    regimes = ("not retrained", "retrained")
    assert [(row["multiplier"], row["regime"]) for row in rows] == [(m, r) for m in EVOAPPROX for r in regimes]
    healed = study.measure(exact, few, ["mul8s_1KVA"], regimes=study.REGIMES[1:3], **ONCE)
    expected = ["bias corrected", "norms refreshed"][: 1 if network == "vit_small" else 2]  # which has no BatchNorm
    assert [row["regime"] for row in healed] == expected
    assert all(list(row) == KEYS for row in rows)
    for row in rows:
        assert row["outcome"] == "" and row["correct"] == 4 * row["top1"] and 0 <= row["top1"] <= 1
        assert 0 < row["macs"] <= row["macs_static"] and row["seconds"] >= 0
        assert row["digest"] == multiplier(row["multiplier"]).digest
        assert row["retrain_epochs"] == (row["regime"] == "retrained")
    assert len({row["digest"] for row in rows}) == 13
    assert same(before, weights(exact)), "measure() leaves the network as it was"


def test_the_exact_circuit_costs_one_and_a_cheaper_one_its_share(small):
    """Equation (1) by hand: f of the products at 0.2 / 0.425 of the power, the others exactly."""
    rows = list(study.measure(narrow("resnet8", small), small, ["float32", "mul8s_1KV6", "mul8s_1L2L"]))
    float32, exact, cheap = rows
    assert float32["digest"] == "float32" and float32["regime"] == "not retrained"
    assert float32["approximated_share"] == 0 and exact["approximated_share"] == cheap["approximated_share"] > 0.9
    assert float32["p_norm"] == pytest.approx(1) and exact["p_norm"] == pytest.approx(1)
    f = cheap["approximated_share"]
    assert cheap["p_norm"] == pytest.approx(f * 0.2 / 0.425 + 1 - f)


def test_float32_is_never_retrained(small):
    rows = list(study.measure(narrow("resnet8", small), small, ["float32", "mul8s_1KV6"], **ONCE))
    assert [(row["multiplier"], row["regime"]) for row in rows] == [
        ("float32", "not retrained"),
        ("mul8s_1KV6", "not retrained"),
        ("mul8s_1KV6", "retrained"),
    ]


def test_cost_is_relative_to_the_base(small):
    dense = narrow("resnet8", small)
    soft = narrow("resnet8", small, "soft")
    x = small.normalised(small.x_test)
    base, own = cost.count(dense, x), cost.count(soft, x)
    (alone,) = study.measure(soft, small, ["mul8s_1KV6"], progress=False)
    (beside,) = study.measure(soft, small, ["mul8s_1KV6"], base=base, progress=False)
    assert alone["p_norm"] == pytest.approx(1)
    assert beside["p_norm"] == pytest.approx(own.executed / base.executed) and beside["p_norm"] > 1.1
    assert beside["macs"] == own.executed and beside["top1"] == alone["top1"]


def test_known_rows_are_skipped(small):
    network = narrow("resnet8", small)
    skip = [("mul8s_1KV6", "not retrained"), ("mul8s_1L2L", "not retrained"), ("mul8s_1L2L", "retrained")]
    rows = list(study.measure(network, small, ["mul8s_1KV6", "mul8s_1L2L", "mul8s_1L2J"], skip=skip, **ONCE))
    assert [(row["multiplier"], row["regime"]) for row in rows] == [
        ("mul8s_1KV6", "retrained"),
        ("mul8s_1L2J", "not retrained"),
        ("mul8s_1L2J", "retrained"),
    ]
    whole = study.measure(network, small, ["mul8s_1KV6"], **ONCE)
    assert timeless(rows[:1]) == timeless(list(whole)[1:]), "a skipped row changes no other"


@pytest.mark.parametrize(
    "options,problem",
    [
        ({"network": "resnet21"}, "'resnet21'. Did you mean 'resnet20'"),
        ({"topology": "sotf"}, "'sotf'. Did you mean 'soft'"),
        ({"topology": "cluster", "gateway": "resnet65"}, "'resnet65'. Did you mean 'resnet56'"),
        ({"topology": "cluster", "by": "class"}, "'class'. Did you mean 'classes'"),
    ],
)
def test_unknown_names_are_refused_before_training(options, problem, small, monkeypatch):
    monkeypatch.setattr(networks, "fit", no_training)
    options = {"network": "resnet8", **options}
    with pytest.raises(ValueError, match=problem):
        study.exact(options.pop("network"), small, epochs=1, **options)


@pytest.mark.parametrize(
    "options,problem",
    [
        ({"multipliers": ["float32", "mul8s_1L2K"]}, "'mul8s_1L2[A-Z]'"),
        ({"layers": ["layer1.0.conv3"]}, "'layer1.0.conv3'. Did you mean 'layer1.0.conv[12]'"),
        ({"layers": ["layer1.0.bn1"]}, "No layer is called 'layer1.0.bn1'"),
        ({"skip": [("mul8s_1KV6", "retraind")]}, "'retraind'. Did you mean 'retrained'"),
        ({"retrain_epochs": -1}, "retrain_epochs is -1"),
    ],
)
def test_unknown_names_are_refused_before_in_rows(options, problem, small, monkeypatch):
    for work in ("predict", "calibrate"):
        monkeypatch.setattr(in_rows, work, no_training)
    monkeypatch.setattr(cost, "count", no_training)
    network = models.resnet8(classes=3)
    with pytest.raises(ValueError, match=problem):
        study.measure(network, small, **{"multipliers": ["mul8s_1KV6"], **options})  # no row was asked for yet


def test_an_approximate_network_is_refused(small):
    network = narrow("resnet8", small)
    approximate(network, "mul8s_1L2L", calibration=small.normalised(small.x_train))
    with pytest.raises(ValueError, match=r"restore\(\)"):
        study.measure(network, small, ["float32"])


def test_the_network_is_left_as_it_was(small):
    network = narrow("resnet8", small, "hard").train()
    network.layer1.eval()
    before, modes = weights(network), [m.training for m in network.modules()]
    list(study.measure(network, small, ["float32", "mul8s_1L2L"], **ONCE))
    assert same(before, weights(network)) and modes == [m.training for m in network.modules()]
    assert not assignment_of(network) and all(p.requires_grad for p in network.parameters())


def test_any_network_can_be_measured_and_upcycled(small):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    )
    before = weights(network)
    # A convolution of 3 x 3 numbers in 3 channels makes 4 x 3 x 3 numbers, one of 4 channels makes 6, of 6 come 3.
    (row,) = study.measure(network, small, ["mul8s_1L2L"], progress=False)
    assert row["macs"] == 27 * 4 * 9 + 36 * 6 + 6 * 3
    assert row["approximated_share"] == pytest.approx(1 - 18 / row["macs"])
    (one,) = study.measure(network, small, ["mul8s_1L2L"], layers=["2"], progress=False)
    assert one["approximated_share"] == pytest.approx(216 / row["macs"])
    soft = study.exact(network, small, topology="soft", epochs=9, upcycle_epochs=1, experts=3, r=1.0, progress=False)
    assert len(moe.mixtures(soft)) == 2 and same(before, weights(network))
    assert cost.count(soft, torch.zeros(1, 3, 8, 8)).executed > 3 * (row["macs"] - 18)


def test_stages_are_kept_and_not_trained_again(small, tmp_path, monkeypatch):
    call = {"epochs": 1, "upcycle_epochs": 1, "folder": tmp_path, "fit_options": {"batch_size": 8}}
    first = {topology: narrow("resnet8", small, topology, **call) for topology in models.TOPOLOGIES}
    files = {path.name for path in tmp_path.iterdir()}
    assert len(files) == 4  # the dense network, which is the gateway's architecture too, and three mixtures
    monkeypatch.setattr(loop, "_one_epoch", no_training)
    for topology, network in first.items():
        assert same(weights(network), weights(narrow("resnet8", small, topology, **call)))
    assert files == {path.name for path in tmp_path.iterdir()}


def test_a_committed_network_of_the_same_settings_is_taken(small, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "checkpoints_dir", lambda: tmp_path)
    other = narrow("resnet8", small, seed=9)
    told = {"epochs": 1, "seed": 0, "dataset": small.name, "data": small.digest, "batch_size": 8}
    file = tmp_path / f"resnet8-{small.name}-seed0-epochs1.safetensors"
    asked = {"epochs": 1, "fit_options": {"batch_size": 8}}
    for changed in ({"batch_size": 16}, {"data": "other"}, {"dataset": "another"}, {"optimiser": "adamw"}):
        train.save(other, file, recipe={**told, **changed})
        assert not same(weights(narrow("resnet8", small, **asked)), weights(other)), changed
    train.save(other, file, recipe=told)
    assert not same(weights(narrow("resnet8", small, **asked, width=1 / 8)), weights(other)), "another network"
    for option in ({"lr": 0.01}, {"augment": "none"}, {"label_smoothing": 0.1}):  # of which the file says nothing
        changed = {"epochs": 1, "fit_options": {"batch_size": 8, **option}}
        assert not same(weights(narrow("resnet8", small, **changed)), weights(other)), option
    monkeypatch.setattr(loop, "_one_epoch", no_training)
    assert same(weights(narrow("resnet8", small, **asked)), weights(other))


@pytest.mark.parametrize(
    "change", [{"epochs": 2}, {"r": 0.9}, {"seed": 1}, {"upcycle_options": {"noise": 0.1}}, {"experts": 3}]
)
def test_a_mixture_never_resumes_from_another(change, small, tmp_path):
    call = {"topology": "hard", "epochs": 1, "upcycle_epochs": 1, "fit_options": {"batch_size": 8}}
    narrow("resnet8", small, **call, folder=tmp_path)
    beside = narrow("resnet8", small, **{**call, **change}, folder=tmp_path)
    assert same(weights(beside), weights(narrow("resnet8", small, **{**call, **change}))), "as if alone"


def test_a_given_network_starts_the_mixture(small, tmp_path):
    call = {"topology": "hard", "upcycle_epochs": 0, "upcycle_options": {"noise": 0}}
    for seed in (0, 1):
        dense = models.resnet8(classes=3, width=1 / 8, seed=seed)
        hard = narrow(dense, small, **call, folder=tmp_path)
        last = moe.mixtures(hard)["layer3.0.conv2"]
        assert all(torch.equal(expert.weight, dense.layer3[0].conv2.weight) for expert in last.experts)


def test_divergence_is_a_row(small):
    network = narrow("resnet8", small)
    options = {**ONCE, "retrain_options": {"batch_size": 2, "lr": 1e30, "warmup_epochs": 0}}
    before, after = study.measure(network, small, ["mul8s_1KV6"], **options)
    assert before["outcome"] == "" and "lower lr" in after["outcome"]
    assert after["top1"] == before["top1"], "the network is as it was before the epoch that failed"


def test_the_same_seed_gives_the_same_rows(small):
    def rows(seed):
        network = narrow("resnet8", small, "hard", epochs=1, upcycle_epochs=1, seed=seed)
        options = {**ONCE, "retrain_options": {"batch_size": 8, "seed": seed}}
        return weights(network), timeless(study.measure(network, small, ["mul8s_1L2L"], **options))

    (one, first), (two, second), (other, _) = rows(0), rows(0), rows(1)
    assert same(one, two) and first == second and not same(one, other)
    untrained = [weights(narrow("resnet8", small, seed=seed)) for seed in (0, 1)]
    assert not same(*untrained)


def test_a_cluster_trains_its_gateway_and_pays_for_it(small):
    fresh = narrow("resnet8", small, "cluster", width=0.5, by="classes")
    trained = narrow("resnet8", small, "cluster", width=0.5, by="classes", gateway_epochs=2)
    first = "gateway.0.conv1.weight"
    assert not torch.equal(fresh.state_dict()[first], trained.state_dict()[first])
    assert torch.equal(fresh.state_dict()["experts.0.conv1.weight"], trained.state_dict()["experts.0.conv1.weight"])
    x = small.normalised(small.x_test)
    dense, gateway = (cost.count(n, x).executed for n in (narrow("resnet8", small, width=0.5), trained.gateway))
    (row,) = study.measure(trained, small, ["mul8s_1L2L"], base=dense, progress=False)
    assert row["macs"] == dense + gateway and row["macs_static"] == 2 * dense + gateway
    # Equation (1) with the gateway exact: it adds its own share of the dense network, whatever the multiplier.
    f = row["approximated_share"] * row["macs"] / dense
    assert row["p_norm"] == pytest.approx(gateway / dense + f * 0.2 / 0.425 + 1 - f)
    assert not any("gateway" in name for name in default_layers(trained))


@pytest.mark.parametrize("name", ["{multiplier}.safetensors", "{multiplier}-{epoch}.safetensors", "one.safetensors"])
def test_half_finished_retraining_is_kept_until_its_row_was_taken(name, small, tmp_path):
    network = narrow("resnet8", small)
    rows = study.measure(network, small, ["swap:mul8s_1KVM", "mul8s_1L2L"], checkpoint=tmp_path / name, **ONCE)
    next(rows)
    assert not list(tmp_path.iterdir())
    next(rows)
    assert len(list(tmp_path.iterdir())) == 1, "the row may not be written down yet"
    next(rows)
    assert not list(tmp_path.iterdir())
    assert len(list(rows)) == 1 and not list(tmp_path.iterdir())


def test_half_finished_retraining_is_resumed(small, tmp_path, monkeypatch):
    network = narrow("resnet8", small)
    options = {**ONCE, "retrain_epochs": 2, "checkpoint": tmp_path / "half.safetensors"}
    expected = list(study.measure(network, small, ["mul8s_1L2L"], **{**options, "checkpoint": None}))
    rows = study.measure(network, small, ["mul8s_1L2L"], **options)
    killed = [next(rows), next(rows)]
    monkeypatch.setattr(loop, "_one_epoch", no_training)
    again = list(study.measure(network, small, ["mul8s_1L2L"], **options))
    assert timeless(expected) == timeless(killed) == timeless(again)


@pytest.mark.parametrize("change", [{"retrain_options": {"batch_size": 4}}, {"calibrate_options": {"n": 4}}])
def test_half_finished_retraining_is_only_resumed_as_it_was_begun(change, small, tmp_path):
    options = {**ONCE, "regimes": ["retrained"], "checkpoint": tmp_path / "{multiplier}.safetensors"}

    def answers(seed, **changed):
        return next(study.measure(narrow("resnet8", small, seed=seed), small, ["mul8s_1L2L"], **changed))["answers"]

    answers(0, **options)  # killed after this row, as it were
    assert answers(1, **options) == answers(1, **{**options, "checkpoint": None}), "another network begins afresh"
    changed = {**options, **change}
    assert answers(0, **changed) == answers(0, **{**changed, "checkpoint": None})
    assert len(list(tmp_path.iterdir())) == 3


def test_networks_of_other_images_or_widths_are_not_resumed(small, tmp_path):
    call = {"epochs": 1, "fit_options": {"batch_size": 8}, "folder": tmp_path}
    narrow("resnet8", small, **call)
    wide = narrow("resnet8", small, **call, width=0.5)
    assert same(weights(wide), weights(narrow("resnet8", small, **{**call, "folder": None}, width=0.5)))
    relabelled = dataclasses.replace(small, y_train=small.y_train.flip(0))
    with pytest.raises(ValueError, match="data was"):
        narrow("resnet8", relabelled, **call)


def test_a_rows_seconds_are_its_own(small, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(in_rows, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    rows = list(study.measure(narrow("resnet8", small), small, ["mul8s_1KV6", "mul8s_1L2L"], **ONCE))
    assert [row["seconds"] for row in rows] == [1.0] * 4  # from one look at the clock to the next


def test_regimes_all_start_from_the_same_calibrated_network(small):
    network = narrow("resnet8", small, "hard", width=1 / 4)
    options = {**ONCE, "retrain_images": 9}
    together = timeless(study.measure(network, small, ["mul8s_1KVA"], regimes=study.REGIMES, **options))
    for row in together:
        assert timeless(study.measure(network, small, ["mul8s_1KVA"], regimes=[row["regime"]], **options)) == [row]
    assert [(row["retrain_epochs"], row["retrain_images"]) for row in together] == [(0, 0)] * 3 + [(1, 9)]
    assert len({row["answers"] for row in together}) > 1


def test_answers_say_which_images_were_right(small):
    network = narrow("resnet8", small)
    (row,) = study.measure(network, small, ["float32"], progress=False)
    right = study.unpack_answers(row["answers"], len(small.x_test))
    assert right.tolist() == (train.predict(network, small, progress=False) == small.y_test).tolist()
    assert right.sum() == row["correct"] and len(right) == 8
    with pytest.raises(ValueError, match="2 bytes of answers cannot belong to 8 test images"):
        study.unpack_answers("oAA=", 8)


def test_options_reach_calibration(small, monkeypatch):
    seen, real = [], in_rows.calibrate
    monkeypatch.setattr(in_rows, "calibrate", lambda *given, **options: seen.append(options) or real(*given, **options))
    options = {"n": 5, "per_channel": True}
    list(study.measure(narrow("resnet8", small), small, ["mul8s_1KV6"], calibrate_options=options, progress=False))
    assert seen == [options]


def test_one_calibration_serves_every_circuit(small, monkeypatch):
    network, names = narrow("resnet8", small, "hard", width=1 / 4), ["mul8s_1KVA", "float32", "mul8s_1L2L"]
    options = {"regimes": study.REGIMES, "calibrate_options": {"n": 7, "per_channel": True, "gradient": "smoothed"}}
    alone = [row for name in names for row in timeless(study.measure(network, small, [name], **ONCE | options))]
    seen, real = [], in_rows.calibrate
    monkeypatch.setattr(in_rows, "calibrate", lambda *given, **options: seen.append(given) or real(*given, **options))
    assert timeless(study.measure(network, small, names, **ONCE | options)) == alone
    assert len(seen) == 1
    healed = train.calibrate(copy.deepcopy(network), "mul8s_1L2L", small, **options["calibrate_options"])
    right = train.predict(healed, small, progress=False) == small.y_test
    (row,) = [row for row in alone if (row["multiplier"], row["regime"]) == ("mul8s_1L2L", "not retrained")]
    assert row["answers"] == study.pack_answers(right)


def test_networks_are_built_for_the_images(small, few):
    assert study.build("vit_small", small, width=1 / 16).patch_embed.proj.kernel_size == (1, 1)  # 64 patches of 8 x 8
    assert study.build("vit_small", few, width=1 / 16).patch_embed.proj.kernel_size == (4, 4)
    assert study.build("resnet20", few, shortcut="pad").fc.out_features == 3


@pytest.mark.parametrize("topology", models.TOPOLOGIES)
def test_run_trains_measures_and_says_with_what(topology, small, tmp_path):
    options = {"build_options": {"width": 1 / 8}, "gateway": "resnet8", "epochs": 1, "upcycle_epochs": 1, "experts": 2}
    options |= {"exact_options": {"gateway_options": {"width": 1 / 8}}, "fit_options": {"batch_size": 8}}
    options |= {"topology": topology, "multipliers": ["float32", "mul8s_1L2L"], "retrain_epochs": 1, "progress": False}
    options |= {"retrain_options": {"lr": 0.01}, "seed": 3}
    rows = list(study.run("resnet8", small, **options))
    before, after = rows[1:]
    said = {"dense": (1, 0, "", 0), "hard": (2, 0.5, "", 1), "soft": (2, 0.5, "", 1), "cluster": (2, 0, "resnet8", 1)}
    for row in rows:
        assert (row["network"], row["topology"]) == ("resnet8", topology)
        assert tuple(row[name] for name in ("experts", "r", "gateway", "upcycle_epochs")) == said[topology]
    assert (before["retrain_lr"], after["retrain_lr"]) == (0, 0.01)
    assert (rows[0]["p_norm"] > 1.4) == (topology in ("soft", "cluster")), "the base is dense"
    kept = study.run("resnet8", small, **options, folder=tmp_path)
    assert timeless(kept) == timeless(rows), "a folder changes no number"
    skip = {("float32", "not retrained"), ("mul8s_1L2L", "not retrained")}
    (alone,) = study.run("resnet8", small, **options, folder=tmp_path, skip=skip)
    assert timeless([alone]) == timeless([after])
    assert not list(tmp_path.glob("retrain-*"))


def test_run_is_seeded_throughout(small):
    options = {"build_options": {"width": 1 / 8}, "epochs": 1, "fit_options": {"batch_size": 8}, "progress": False}
    options |= {"multipliers": ["mul8s_1L2L"], "retrain_epochs": 1}
    one, two = (list(study.run("resnet8", small, seed=seed, **options))[1]["answers"] for seed in (0, 1))
    again = list(study.run("resnet8", small, seed=0, **options))[1]["answers"]
    assert one == again and one != two


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"network": "resnet9"}, "'resnet9'. Did you mean 'resnet8'"),
        ({"topology": "hrad"}, "'hrad'. Did you mean 'hard'"),
        ({"gateway": "resnet65"}, "'resnet65'. Did you mean 'resnet56'"),
        ({"regimes": ["norm refreshed"]}, "'norm refreshed'. Did you mean 'norms refreshed'"),
        ({"multipliers": ["float32", "mul8s_1L2K"]}, "mul8s_1L2K"),
    ],
)
def test_run_refuses_typos_before_any_training(wrong, problem, small, monkeypatch):
    monkeypatch.setattr(networks, "fit", no_training)
    options = {"network": "resnet8", "topology": "hard", "multipliers": ["mul8s_1L2L"], "epochs": 1, **wrong}
    with pytest.raises(ValueError, match=problem):
        study.run(options.pop("network"), small, **options)  # no row was asked for yet


def test_at_hand_is_exact_with_those_settings(small, monkeypatch):
    asked = {}
    monkeypatch.setattr("axmoe_lite.study.whole.exact", lambda *given, **named: asked.update(given=given, **named))
    study.at_hand("vit_small", small, topology="hard", seed=3, folder="here")
    assert asked.pop("given") == ("vit_small", small)
    assert asked == {
        "topology": "hard",
        "epochs": 25,
        "upcycle_epochs": 3,
        "r": 0.25,
        "gateway_epochs": 10,
        "fit_options": {"precision": "bf16"},
        "seed": 3,
        "folder": "here",
    }
    with pytest.raises(ValueError, match="resnet9"):
        study.at_hand("resnet9", small)
    with pytest.raises(ValueError, match=r"'upcyle_epochs'. Did you mean 'upcycle_epochs'"):
        study.at_hand("vit_small", small, upcyle_epochs=0)


def test_at_hand_gives_the_network_of_exact(small):
    options = {"epochs": 1, "fit_options": {"batch_size": 8, "augment": "none"}, "progress": False}
    ours = study.at_hand("resnet8", small, **options)
    build = study.AT_HAND["resnet8"]["build_options"]
    theirs = study.exact("resnet8", small, build_options=build, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    mixture = study.at_hand("resnet8", small, topology="hard", start=ours, **{**options, "upcycle_epochs": 0})
    assert list(moe.mixtures(mixture))

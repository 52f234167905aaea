"""Chapter 08's figures: the numbers in them are the circuit's and the run's, and they draw."""

import pytest
import vl_convert

from axmoe_lite import EXACT, multiplier, plots, runs


def data_of(chart) -> list[dict]:
    return [row for rows in chart.to_dict()["datasets"].values() for row in rows]


def row(circuit: str, regime: str, top1: float, **other) -> dict:
    key = {"network": "resnet8", "topology": "dense", "multiplier": circuit, "regime": regime, "top1": top1}
    return {**key, "seconds": 1.0, **runs.evidence(360, scale="quick", seed=0, epochs=8), **other}


ROWS = [
    row("mul8s_1L2L", "retrained", 0.97),
    row("mul8s_1L2L", "not retrained", 0.35),
    row(EXACT, "not retrained", 0.96),
]


def test_the_stairs_are_the_circuits_own():
    rows = data_of(plots.product_slopes(["mul8s_1L2L", "mul8s_1L12"], [10, -50]))
    assert len(rows) == 2 * 2 * 128
    for r in rows:
        assert r["answer"] == multiplier(r["circuit"])(r["a"], r["b"]) and r["exact"] == r["a"] * r["b"]
    one = {r["a"]: r for r in rows if r["circuit"] == "mul8s_1L2L" and r["b"] == 10}
    # L2L sees the weight 10 as 8: 23 as 20, so 160; the next step, at 24, is 192.
    assert (one[23]["answer"], one[23]["own"], one[22]["own"]) == (160, 32, 0)
    # On the stairs of slope 8 on average, far from the ends, the fitted slope stays near 8 and away from 10.
    assert all(7 < one[a]["smoothed"] < 9 for a in range(8, 120))


def test_exact_products_have_one_slope():
    rows = data_of(plots.product_slopes([EXACT], [10]))
    assert all(r["smoothed"] == pytest.approx(10, abs=0.05) for r in rows)


def test_curves_keep_epoch_zero_and_every_name():
    history = [{"epoch": e, "test_accuracy": t, "lr": 0.1} for e, t in enumerate((0.35, 0.6, 0.97))]
    chart = plots.recovery_curves({EXACT: history, "mul8s_1L2L": history[:1]}, reference=0.96, title="t")
    rows = [r for r in data_of(chart) if "epoch" in r]
    assert [(r["run"], r["epoch"], r["top1"]) for r in rows] == [
        ("KV6 (exact)", 0, 0.35),
        ("KV6 (exact)", 1, 0.6),
        ("KV6 (exact)", 2, 0.97),
        ("L2L", 0, 0.35),
    ]
    assert "(96.0%)" in str(chart.to_dict()["title"])


def test_marks_stand_in_order_of_power():
    rows = [row("mul8s_1KXF", "retrained", 0.9), row("mul8s_1L2J", "retrained", 0.9), *ROWS]
    svg = vl_convert.vegalite_to_svg(plots.recovered(rows, title="t").to_dict())
    labels = ["KV6 (exact)", "L2J, 71%", "KXF, 56%", "L2L, 47%"]  # neither as given nor by the alphabet
    assert sorted(labels, key=svg.index) == labels


def test_a_regime_without_a_mark_stretches_no_line():
    drawn = str(plots.recovered([*ROWS, row("mul8s_1L2L", "bias corrected", 0.01)], title="t").to_dict()["datasets"])
    assert "bias corrected" not in drawn and "retrained" in drawn


def test_several_runs_get_a_menu_and_one_does_not():
    more = [*ROWS, row(EXACT, "retrained", 0.98, seed=1)]
    menus = [p["bind"] for p in plots.recovered(more, title="t").to_dict()["params"] if isinstance(p.get("bind"), dict)]
    assert len(menus) == 1 and len(menus[0]["options"]) == 2
    assert "'options'" not in str(plots.recovered(ROWS, title="t").to_dict()["params"])


def test_a_number_without_evidence_is_not_drawn():
    with pytest.raises(ValueError, match="lacks commit"):
        plots.recovered([row(EXACT, "retrained", 0.98, commit="")], title="t")


@pytest.mark.parametrize("rows", [ROWS, [{name: str(value) for name, value in r.items()} for r in ROWS]])
def test_rows_may_be_fresh_or_read_from_a_file(rows):
    texts = vl_convert.vegalite_to_svg(plots.recovered(rows, title="What?").to_dict())
    assert "resnet8 dense" in texts and "not retrained" in texts and "retrained" in texts
    assert "NaN" not in texts

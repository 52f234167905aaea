"""Figures of the ledger and of searched assignments: what is drawn is what was given, with its origin."""

import json

import pytest

from axmoe_lite import claims, plots, runs

ORIGIN = {**runs.evidence(8, scale="paper", seed=0, epochs=1), "seconds": 1}


def line(claim, part, verdict, effect=None, low=None, high=None, goal=""):
    told = {
        "statement": f"{claim} says",
        "measured": "so much",
        "reason": f"because of {part}",
        "test": "t",
        "seeds": "0",
    }
    return {
        "claim": claim,
        "part": part,
        "verdict": verdict,
        "effect": effect,
        "low": low,
        "high": high,
        "goal": goal,
        **told,
        **ORIGIN,
    }


LINES = [
    line("C1", claims.WHOLE, "not reproduced"),
    line("C1", "a - b", "reproduced", 2.0, 1.0, 3.0, "above 0"),
    line("C1", "c - b", "not reproduced", -2.0, -3.0, -1.0, "above 0"),
    line("C1", "d - b", "not testable here"),
    line("C3", claims.WHOLE, "reproduced"),
    line("C3", "e - f", "reproduced", 0.5, 0.1, 0.9, "within ±2"),
    line("C3", "g - f", "not reproduced", 3.5, 3.1, 3.9, "below -1"),
    line("N1", claims.WHOLE, "reproduced"),
    line("N1", "accuracy", "reproduced", 0.5, 0.1, 0.9),
]


def data_of(chart, column):
    """The rows of the chart that have a column."""
    sets = json.loads(chart.to_json())["datasets"].values()
    return [row for rows in sets for row in rows if column in row]


def text_rows(lines):
    return [{key: "" if value is None else str(value) for key, value in one.items()} for one in lines]


@pytest.mark.parametrize("as_read", [lambda lines: lines, text_rows])
def test_effects_are_drawn_where_there_are_any(as_read):
    chart = plots.effects(as_read(LINES))
    drawn = data_of(chart, "effect")
    assert [(row["part"], row["low"], row["effect"], row["high"]) for row in drawn] == [
        ("a - b", 1, 2, 3), ("c - b", -3, -2, -1), ("e - f", 0.1, 0.5, 0.9), ("g - f", 3.1, 3.5, 3.9),
        ("accuracy", 0.1, 0.5, 0.9),
    ]  # fmt: skip
    told = {row["claim"]: row["told"] for row in data_of(chart, "told")}
    assert "2 of 3 comparisons could be made" in told["C1"] and "pale band" in told["C1"]
    assert "points lost more than by Dense" in told["C1"] and "number in print" in told["N1"]
    text = chart.to_json()
    assert "C1: C1 says" in text and '"C1", "C3", "N1"' in " ".join(text.split())
    tips = {tip["field"] for layer in json.loads(text)["layer"] for tip in layer["encoding"].get("tooltip", [])}
    assert {"reason", "test", "seeds", "commit", "date", "device"} <= tips


def test_a_band_reaches_from_where_a_comparison_holds():
    drawn = {row["part"]: (row["from"], row["to"]) for row in data_of(plots.effects(LINES), "effect")}
    assert drawn == {
        "a - b": (0, 3), "c - b": (0, 3), "e - f": (-2, 2), "g - f": (-2, -1), "accuracy": (None, None)
    }  # fmt: skip


def test_one_claim_is_drawn_without_a_menu():
    chart = plots.effects(LINES, "C3")
    assert {row["claim"] for row in data_of(chart, "effect")} == {"C3"}
    assert "input" not in chart.to_json()
    with pytest.raises(ValueError, match=r"no line of claim 'C9'; claims.CLAIMS"):
        plots.effects(LINES, "C9")


def test_effects_need_evidence_and_an_effect():
    with pytest.raises(ValueError, match="lacks commit"):
        plots.effects([{**LINES[1], "commit": ""}])
    with pytest.raises(ValueError, match="no comparison with an effect"):
        plots.effects([LINES[0], LINES[3]])


def test_verdicts_count_comparisons_not_claims():
    counted = {
        (row["claim"], row["verdict"]): row["comparisons"] for row in data_of(plots.verdicts(LINES), "comparisons")
    }
    wanted = {("C1", verdict): 1 for verdict in claims.VERDICTS} | {("N1", "reproduced"): 1}
    wanted |= {("C3", verdict): 1 for verdict in claims.VERDICTS[:2]}
    assert counted == wanted


def test_sensitivities_are_clipped_for_the_scale_but_told_as_they_are():
    row = {"group": "a", "layers": 1, "multiplier": "mul8s_1L2L", "more_loss": 0.1, "accuracy": 0.5, "saved": 0.2}
    rows = [{**row, "more_divergence": -0.01}, {**row, "multiplier": "mul8s_1KV8", "more_divergence": 0.5}]
    chart = plots.sensitivities(rows, title="t")
    drawn = data_of(chart, "moved")
    assert [(r["moved"], r["more_divergence"]) for r in drawn] == [(1e-4, -0.01), (0.5, 0.5)]
    assert json.loads(chart.to_json())["encoding"]["x"]["sort"] == ["KV8", "L2L"], "the cheaper one to the right"
    with pytest.raises(ValueError, match="no rows"):
        plots.sensitivities([], title="t")


def test_mixed_fronts_join_what_was_searched_only():
    row = {"top1": "0.5", "p_norm": "0.7", "accuracy": "0.6", "multipliers": "2", "evaluated": 9, **ORIGIN}
    row["assignment"] = '{"conv1": "signs:mul8s_1L2L", "fc": "signs:mul8s_1L2L"}'
    chart = plots.mixed_fronts([{**row, "family": f"hard, {kind}"} for kind in ("mixed", "uniform")], title="t")
    drawn = data_of(chart, "family")
    assert [(r["family"], r["top1"], r["circuit"]) for r in drawn] == [
        ("hard, mixed", 0.5, ""),
        ("hard, uniform", 0.5, "L2L"),
    ]
    points, lines, names = json.loads(chart.to_json())["layer"]
    assert "uniform" in str(lines["transform"]) and "transform" not in points and "uniform" in str(names["transform"])
    assert json.loads(chart.to_json())["params"][0]["bind"] == "legend"
    with pytest.raises(ValueError, match="lacks"):
        plots.mixed_fronts([{**row, "family": "a", "date": ""}])

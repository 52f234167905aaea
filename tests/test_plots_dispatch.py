"""plots.dispatch: pools, fronts of dispatchers and films, drawn from known numbers; and the rows behind them."""

import json

import pytest
import torch

from axmoe_lite import plots
from axmoe_lite.runs import EVIDENCE
from axmoe_lite.search import pertinence

ORIGIN = dict.fromkeys(EVIDENCE, "x")


def rows_of(chart) -> list[dict]:
    spec = chart.to_dict()
    return [row for table in spec["datasets"].values() for row in table]


def pool(n: int = 60) -> pertinence.Pool:
    """Of three networks, the dearer the more often right: on 30, 40 and 50 of 60 images; "c" alone on the last ten."""
    image = torch.arange(n)
    correct = torch.stack([image < n // 2, image < 2 * n // 3, image < 5 * n // 6], 1)
    sure = torch.where(image < n // 2, 0.9, 0.4)[:, None].expand(-1, 3).contiguous()
    return pertinence.Pool("abc", [1.0, 2, 4], correct, torch.randn(n, 4), "a", 0.5, sure)


def table() -> list[dict]:
    made, split = pool(), pertinence.thirds(60)
    some = {"kind": "dispatched", "name": "INS 0", "accuracy": 0.8, "cost_search": 2.5, "top1": 0.75, "cost": 2.25}
    some |= {
        "p_norm": 0.5,
        "lead": -0.05,
        "low": -0.1,
        "high": 0.01,
        "shares": "{}",
        "against": "c",
        "weighting": "INS",
    }
    return [{**ORIGIN, **row, "pool": "p"} for row in pertinence.table(made, split, {"with confidence": [some]})]


def test_a_table_has_all_kinds_with_the_same_columns() -> None:
    rows = table()
    assert [*dict.fromkeys(row["kind"] for row in rows)] == ["with confidence", "single", "mixed", "ideal", "cascade"]
    assert len({tuple(row) for row in rows}) == 1 and {row["n_test"] for row in rows} == {18}
    assert [row["point"] for row in rows if row["kind"] == "single"] == [0, 1, 2]
    (ideal,) = [row for row in rows if row["kind"] == "ideal"]
    final = pertinence.ideal(pool(), pertinence.thirds(60).final)
    assert (ideal["top1"], ideal["cost"], ideal["p_norm"]) == (final.accuracy, final.cost_paid, final.cost_paid / 4)
    assert ideal["lead"] == "" and json.loads(ideal["shares"]) == final.shares
    best = pool().only("ab")  # and if the best were the cheapest, nothing would come after it
    best = pertinence.Pool("ab", [1, 2], best.correct.flip(1), best.features, "a", 0.5, best.confidence)
    assert "cascade" not in {row["kind"] for row in pertinence.table(best, pertinence.thirds(60), {})}


def test_confidence_is_one_more_feature_and_the_extractor_is_paid_for_whole() -> None:
    plain = pool()
    more = plain.with_confidence()
    assert more.features.shape == (60, 5) and torch.equal(more.features[:, :4], plain.features)
    assert torch.equal(more.features[:, 4], plain.confidence[:, 0])
    extra = 3 * more.product  # a feature more for each of three networks
    assert (more.paid - plain.paid).tolist() == pytest.approx([extra, 0.5 + extra, 0.5 + extra])
    with pytest.raises(ValueError, match="extractor is None"):
        plain.only("bc").with_confidence()


def test_pool_members_draws_what_it_is_told() -> None:
    rows = [row | ORIGIN for row in pertinence.members(pool())]
    chart = plots.pool_members(rows)
    drawn = {row["name"]: row for row in rows_of(chart)}
    assert (drawn["a"]["accuracy"], drawn["b"]["accuracy"], drawn["c"]["alone"]) == (0.5, pytest.approx(2 / 3), 10)
    assert drawn["a"]["shown"] == "a ●", "not by colour alone"
    titles = [panel["layer"][0]["encoding"]["x"]["title"] for panel in chart.to_dict()["hconcat"]]
    assert titles == ["cost, million products", "right, of all images", "images only it gets right"]


def test_a_network_off_the_front_has_no_dot() -> None:
    worse = pertinence.Pool("ab", [1, 2], [[1, 0], [1, 1]], torch.zeros(2, 1), "a", 0.5)
    drawn = rows_of(plots.pool_members([row | ORIGIN for row in pertinence.members(worse)]))
    assert [row["shown"] for row in drawn] == ["a ●", "b"]


def test_dispatch_fronts_has_a_panel_a_pool_and_a_logarithmic_cost() -> None:
    rows = table()
    chart = plots.dispatch_fronts([*rows, *(row | {"pool": "q"} for row in rows)]).to_dict()
    assert chart["facet"]["row"]["sort"] == ["p", "q"]
    encoding = chart["spec"]["layer"][0]["encoding"]
    assert encoding["x"]["scale"]["type"] == "log" and "million" in encoding["x"]["title"]
    kinds = encoding["color"]["scale"]["domain"]
    assert kinds == ["with confidence", "cascade", "mixed", "single", "ideal"]
    shapes = chart["spec"]["layer"][1]["encoding"]["shape"]["scale"]["range"]
    assert len(set(shapes)) == 5, "not by colour alone"


def test_dispatch_fronts_reads_recorded_text() -> None:
    text = [{column: str(value) for column, value in row.items()} for row in table()]
    drawn = rows_of(plots.dispatch_fronts(text))
    (one,) = [row for row in drawn if row["kind"] == "with confidence"]
    assert (one["top1"], one["cost"], one["low"]) == (0.75, 2.25, -0.1)
    assert {row["lead"] for row in drawn if row["kind"] == "ideal"} == {None}, "what does not apply is empty"


def test_film_rules_numbers_its_points() -> None:
    rules = [("every D frames", 1, 0.9, 3.0, 1.0), ("every D frames", 4, 0.88, 2.5, 0.25), ("cut", 0.1, 0.89, 2.4, 0.1)]
    names = ("rule", "setting", "accuracy", "cost", "asked")
    chart = plots.film_rules([dict(zip(names, rule, strict=True)) | ORIGIN for rule in rules])
    spec = chart.to_dict()
    assert [(row["setting"], row["cost"]) for row in rows_of(chart)] == [(1, 3.0), (4, 2.5), (0.1, 2.4)]
    assert spec["layer"][2]["encoding"]["text"]["field"] == "setting"
    assert spec["layer"][0]["encoding"]["order"]["field"] == "asked"


@pytest.mark.parametrize("draw", [plots.pool_members, plots.dispatch_fronts, plots.film_rules])
def test_nothing_is_drawn_without_rows_or_evidence(draw) -> None:
    with pytest.raises(ValueError, match=rf"{draw.__name__}\(\) was given no rows"):
        draw([])
    row = {"name": "a", "pool": "a", "rule": "a", "kind": "single", "top1": 0.5, "cost": 1.0} | ORIGIN
    with pytest.raises(ValueError, match="'a' lacks commit"):
        draw([row | {"commit": ""}])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="oracle"):
        plots.dispatch_fronts([{"pool": "p", "kind": "oracle", "top1": 0.5, "cost": 1.0} | ORIGIN])


# ------------------------------------------------------------------------------ what the chapter asks the search for


def line(pool: str, kind: str, name: str, accuracy: float, cost: float, top1: float) -> dict:
    figures = {"accuracy": accuracy, "cost_search": cost, "cost": cost, "p_norm": cost / 4, "top1": top1}
    return {"pool": pool, "kind": kind, "name": name, "against": "c", **figures}


def test_bargains_are_as_good_as_the_best_network_or_nearly_so() -> None:
    rows = [line("p", "single", "c", 0.9, 4.0, 0.9), line("p", "ideal", "x", 1.0, 1.0, 1.0)]
    rows += [
        line("p", "dispatched", str(cost), accuracy, cost, 0.9) for accuracy, cost in ((0.9, 3), (0.88, 2), (0.8, 1))
    ]
    rows += [line("p", "cascade", "y", 0.7, 1.0, 0.9)]
    told = {key: row["name"] for key, row in pertinence.bargains(rows).items()}
    assert told == {("p", "single"): "c", ("p", "dispatched"): "3"}, "the ideal is no choice, the cascade is too bad"
    assert pertinence.bargains(rows, less=0.03)["p", "dispatched"]["name"] == "2"


def test_gaps_are_means_over_budgets_in_points() -> None:
    rows = [line("p", "single", "c", 0.9, 4.0, 0.9), line("p", "single", "a", 0.5, 1.0, 0.5)]
    rows += [line("p", "dispatched", "d", 0.8, 1.0, 0.75), line("q", "single", "c", 0.9, 4.0, 0.9)]
    (one,) = pertinence.gaps(rows, [("dispatched", "single")])
    # Budgets from 1/4 to 1 of c's cost: 25 points more than "a"; at 1 itself, of no width, 15 less than "c".
    assert (one["pool"], one["front"], one["lead"], one["low"]) == ("p", "dispatched", pytest.approx(25), None)


def test_compared_searches_twice_and_lays_all_kinds_side_by_side(tmp_path) -> None:
    made, split = pool(), pertinence.thirds(60)
    options = {"population": 36, "generations": 1, "epochs": 2, "progress": False}
    found, rows = pertinence.compared(made, split, folder=tmp_path, **options)
    assert {file.stem for file in tmp_path.iterdir()} == {"dispatched", "with-confidence"}
    assert [len(found[kind][0].weight[0]) for kind in ("dispatched", "with confidence")] == [4, 5]
    assert {row["kind"] for row in rows} == set(plots.dispatch.KINDS) and len({row["seconds"] for row in rows}) == 1
    alone = pertinence.search(made, split, start=pertinence.ratios(3), **options)
    assert torch.equal(found["dispatched"][0].penalties, alone[0].penalties), "begun with ratios"
    assert found["dispatched"][0].choose(made.features).shape == (60,)


def test_taught_is_what_the_search_would_train() -> None:
    made, split = pool(), pertinence.thirds(60)
    thrifty, careful = pertinence.taught(made, split, pertinence.ratios(3, steps=2)[:2], lr=0.1, epochs=60)
    assert thrifty["cost"] < careful["cost"] and sum(careful[name] for name in "abc") == pytest.approx(1)
    found = pertinence.search(
        made,
        split,
        population=2,
        generations=1,
        start=pertinence.ratios(3, steps=2)[:2],
        lr=0.1,
        epochs=60,
        progress=False,
    )
    assert found[0].cost == thrifty["cost"] and found[0].accuracy == thrifty["accuracy"]


def test_rules_follow_a_film_under_each_setting() -> None:
    made = pool()
    frames = torch.zeros(60, 3, 8, 8, dtype=torch.uint8)
    frames[30:] = 255
    told = pertinence.rules(made, torch.zeros(60, dtype=torch.int64), frames, every=(1, 60), thresholds=(0.5,))
    assert [(row["rule"], row["setting"]) for row in told] == [
        ("every D frames", 1),
        ("every D frames", 60),
        ("scene change above", 0.5),
    ]
    assert [row["asked"] * 60 for row in told] == [60, 1, 2] and told[0]["accuracy"] == 0.5


def test_unseen_moves_images_that_training_will_not_see(textures) -> None:
    moved = pertinence.unseen(textures, n=10, seed=1)
    assert len(moved.x_train) == len(textures.x_train) - 10
    assert torch.equal(moved.x_test[10:], textures.x_test) and torch.equal(moved.y_test[10:], textures.y_test)
    assert moved.mean == textures.mean

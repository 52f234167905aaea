"""Fronts compared: what each would choose for a budget, on the same test images, with an interval."""

import json

import numpy as np
import pytest

from axmoe_lite import EXACT, cost, models, study
from axmoe_lite.search import Found, compare, dominates, groups, mixed_and_uniform, report, search, uniform
from axmoe_lite.train import fit

THREE = [EXACT, "mul8s_1L2J", "signs:mul8s_1L2L"]
PLAIN = {"n": 64, "progress": False, "calibrate_options": {"n": 50}}


def point(p_norm, top1, loss, answers=None):
    more = {} if answers is None else {"answers": study.pack_answers(np.array(answers)), "n_test": len(answers)}
    return {"p_norm": p_norm, "top1": top1, "loss": loss, **more}


@pytest.fixture(scope="module")
def dense(textures):
    network = models.resnet8(classes=4, width=0.25, shortcut="pad")
    fit(network, textures, epochs=1, batch_size=32, lr=0.05, augment="none", progress=False)
    return network


def test_report_takes_the_scores_of_the_search(dense, textures):
    found = Found(uniform(dense, THREE[1:2])[0], 1.0, 0.25, 0.125, 0.5, 7)
    (row,) = report(dense, textures, [found], base=None, **PLAIN)
    assert (row["loss"], row["divergence"], row["accuracy"]) == (0.25, 0.125, 0.5)


def test_a_front_and_what_there_is_to_beat(dense, textures):
    base = cost.count(dense, textures.normalised(textures.x_test[:1])).executed / 2
    own = {"groups": groups(dense, by="network"), "budget": 21, "base": base, **PLAIN}
    both = mixed_and_uniform(dense, textures, iter(THREE), **own)
    assert list(both) == ["mixed", "uniform"]
    uniforms = [set(json.loads(row["assignment"]).values()) for row in both["uniform"]]
    assert uniforms == [{EXACT}, {"mul8s_1L2J"}, {"signs:mul8s_1L2L"}]
    found = search(dense, textures, THREE, **own)
    assert [json.loads(row["assignment"]) for row in both["mixed"]] == [one.assignment for one in found]
    assert both["uniform"][0]["p_norm"] == pytest.approx(2)  # of a base half as large
    measured = [row for rows in both.values() for row in rows]
    assert all(row["n_test"] == len(textures.x_test) and row["n_validation"] == 64 for row in measured)


def test_dominance_by_hand():
    """a: 0.8 from 0.2 on, 0.9 from 0.6. b: 0.7 from 0.4 on, 0.95 from 0.8. Box 0.2 to 1: 0.04 more by area."""
    a, b = [point(0.6, 0.9, 1), point(0.2, 0.8, 2)], [point(0.4, 0.7, 2), point(0.8, 0.95, 1)]
    found = dominates(a, b, by="loss", box=(0.2, 1.0), floor=0.5)
    area = 0.2 * (0.8 - 0.5) + 0.2 * (0.8 - 0.7) + 0.2 * (0.9 - 0.7) + 0.2 * (0.9 - 0.95)
    assert found.volume == pytest.approx(area / 0.8)
    assert (found.largest_gap, found.largest_gap_at) == (pytest.approx(0.2), 0.6)
    assert (found.least_gap, found.least_gap_at) == (pytest.approx(-0.05), 0.8)
    assert not found.dominates and found.volume_interval is None and found.box == (0.2, 1.0, 0.5)
    assert dominates(a, b, by="loss", box=(0.2, 0.7)).dominates
    back = dominates(b, a, by="loss", box=(0.2, 1.0), floor=0.5)
    assert back.volume == pytest.approx(-found.volume) and not back.dominates
    assert not dominates(a, a, by="loss").dominates


def test_luck_on_the_test_images_earns_nothing():
    """The lucky point has the best top-1 of all, but its validation loss says: do not choose it."""
    plain, lucky = [point(0.5, 0.8, 1.0)], [point(0.5, 0.8, 1.0), point(0.4, 0.99, 3.0)]
    assert dominates(lucky, plain, by="loss", box=(0.5, 1)).volume == 0
    assert dominates(lucky, plain, by=None, box=(0.5, 1)).volume == pytest.approx(0.19)


def test_more_is_better_for_accuracy_and_text_is_read():
    rows = [{"p_norm": "0.5", "top1": "0.7", "accuracy": "0.9"}, {"p_norm": "0.4", "top1": "0.6", "accuracy": "0.1"}]
    found = dominates(rows, rows[1:], by="accuracy", box=(0.5, 1))
    assert found.volume == pytest.approx(0.1)


def test_intervals_come_from_the_same_images():
    """a is right on 10 images more than b, out of 100: 0.1, with deviation sqrt(0.1 * 0.9 / 100) = 0.03."""
    right = np.arange(100) < 60
    a, b = [point(1.0, 0.6, 1, right)], [point(1.0, 0.5, 1, np.arange(100) < 50)]
    found = dominates(a, b, by="loss", box=(1, 2), resamples=4000)
    low, high = found.volume_interval
    assert low == pytest.approx(0.1 - 1.96 * 0.03, abs=0.015) and high == pytest.approx(0.1 + 1.96 * 0.03, abs=0.015)
    assert found.volume_positive > 0.99 and found.dominating == found.volume_positive
    assert found.largest_gap_interval == (low, high)
    assert found == dominates(a, b, by="loss", box=(1, 2), resamples=4000)
    same = dominates(a, a, by="loss", resamples=50)
    assert same.volume_interval == (0, 0) and same.dominating == 0


def test_a_table_of_comparisons_names_its_families():
    images = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    costs, families = (1.0, 1.0, 0.5), ("a", "b", "b")
    rows = [
        {"family": f, "p_norm": c, "loss": 1 - right.mean(), "top1": right.mean(), "n_test": 4}
        | {"answers": study.pack_answers(right)}
        for f, c, right in zip(families, costs, images, strict=True)
    ]
    (line,) = compare(rows, [("a", "b")])
    # At a budget of 1 a answers one image of four more; below it a cannot be afforded, and b answers two.
    assert (line["front"], line["against"], line["dominates"]) == ("a", "b", False)
    assert line["largest_gap"] == pytest.approx(25) and line["lead"] == pytest.approx(-50)
    assert line["low"] <= line["lead"] <= line["high"]
    with pytest.raises(ValueError, match="No row belongs to the family 'c'; there are a, b"):
        compare(rows, [("a", "c")])


def test_errors_say_what_to_do():
    one = [point(1, 1, 1)]
    for message, call in {
        "A front has no rows": lambda: dominates([], one),
        "Row 0 of a front has no 'divergence'": lambda: dominates(one, one),
        "The box runs from 2 to 1": lambda: dominates(one, one, by="loss", box=(2, 1)),
        "affords a point of both": lambda: dominates(one, [point(2, 1, 1)], by="loss", box=(1, 1.5)),
        "One front answered 2 test images, the other 3": lambda: dominates(
            [point(1, 1, 1, [True] * 2)], [point(1, 1, 1, [True] * 3)], by="loss"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()

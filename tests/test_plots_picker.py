"""The menus that find one number among all rows of a study."""

import re

import pytest
import vl_convert

from axmoe_lite import claims, plots
from axmoe_lite.plots.picker import LINES


@pytest.fixture(scope="module")
def rows():
    return claims.recorded()[0]


def listed(rows: list[dict], **picks: str) -> list[str]:
    """The texts that the chart draws when its menus stand so."""
    spec = plots.row_picker(rows).to_dict()
    for param in spec["params"]:
        name = param["name"].removeprefix("picked_")
        if name in picks:
            assert picks[name] in param["bind"]["options"]
            param["value"] = picks[name]
    return re.findall(r">([^<>]+)</text>", vl_convert.vegalite_to_svg(spec))


def test_four_menus_lead_to_one_row(rows):
    picked = {"topology": "hard", "multiplier": "mul8s_1KVA", "regime": "not retrained"}
    seeds = [r for r in rows if ({"network": "resnet20"} | picked).items() <= r.items()]
    texts = listed(rows, **picked)
    top1, p_norm = (sum(float(r[column]) for r in seeds) / len(seeds) for column in ("top1", "p_norm"))
    assert len(seeds) >= 3 and f"{len(seeds)} seeds" in texts
    assert texts.count(f"{top1:.2%}") == 1 and f"P_norm {p_norm:.3f}" in texts
    assert sum(text.endswith("%") and "." in text for text in texts) == 1, "another row is listed"


def test_a_long_list_shows_its_best_and_says_how_many_there_are(rows):
    texts = listed(rows, regime="any")
    shown = sorted((float(text[:-1]) for text in texts if re.fullmatch(r"\d+\.\d\d%", text)), reverse=True)
    best = {}
    for r in rows:
        if r["network"] == "resnet20":
            best.setdefault((r["topology"], r["multiplier"], r["regime"]), []).append(float(r["top1"]))
    means = sorted((round(100 * sum(seeds) / len(seeds), 2) for seeds in best.values()), reverse=True)
    assert shown == pytest.approx(means[:LINES], abs=0.011)
    assert f"The best {LINES} of {len(means)}." in texts


def test_a_regime_that_no_row_has_is_refused(rows):
    with pytest.raises(ValueError, match="No row has the regime 'retrain'; there are any, not retrained"):
        plots.row_picker(rows, regime="retrain")

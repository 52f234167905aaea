"""The explorer of a page without a kernel: Vega's own arithmetic, run by Vega, against the tables it stands for."""

import json
import re

import pytest
import torch
import vl_convert

from axmoe_lite import errors, explore, multiplier, plots, runs
from axmoe_lite.multipliers import exact_table
from axmoe_lite.plots.theme import _html

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def operands():
    """Two layers: activations that are never negative and mostly small, weights around zero; and anything at all."""
    codes, draw = torch.arange(-128, 128).double(), torch.Generator().manual_seed(20260505)
    small = torch.where(codes >= 0, (-codes.abs() / 20).exp(), 0)
    return {
        "conv1": (small, (-(codes**2) / 800).exp()),
        "layer1.0.conv2": (torch.rand(256, generator=draw), torch.rand(256, generator=draw)),
    }


@pytest.fixture(scope="module")
def rows(textures):
    """A row of every multiplier, with figures that are easy to tell apart, and not those of a network."""
    origin = runs.evidence(textures, scale="quick", seed=0, epochs=2)
    return [
        {
            "network": "resnet8",
            "multiplier": name,
            "power_mw": multiplier(name).power_mw,
            "proxy": multiplier(name).is_proxy,
            "rank": 1 + n % 7,
            "mae": float(n),
            "top1": n / 1000,
            "seconds": 1.0,
            **origin,
        }
        for n, name in enumerate(explore.settings())
    ]


def placed(spec: dict, **values) -> dict:
    """The chart with its controls moved."""
    spec = json.loads(json.dumps(spec))
    params = {param["name"]: param for param in spec["params"]}
    for name, value in values.items():
        params[name]["value"] = value
    return spec


def texts(spec: dict) -> list[str]:
    svg = vl_convert.vegalite_to_svg(spec)
    return [text.replace("&amp;", "&").replace("&gt;", ">") for text in re.findall(r">([^<>]+)</text>", svg)]


def computed(spec: dict, *transforms: dict, text: str) -> list[str]:
    """Texts made of the chart's own pairs, by its own transforms and these."""
    kept = {name: spec[name] for name in ("$schema", "params")}
    mark = {"type": "text", "fontSize": 0}  # it takes minutes to measure how wide long texts are, if they have a size
    drawn = {"mark": mark, "encoding": {"text": {"field": "told", "type": "nominal"}}}
    (pairs,) = [one for one in spec["vconcat"] if "transform" in one]
    steps = [*pairs["transform"], *transforms, {"calculate": text, "as": "told"}]
    return texts({**kept, "data": pairs["data"], "transform": steps, **drawn})


SETTINGS = [  # what the controls are set to, and what the catalogue calls that
    ({"drop_a": 1, "drop_b": 1, "drop_columns": 0}, "broken_array(1,1,0)"),
    ({"drop_a": 0, "drop_b": 0, "drop_columns": 4}, "mul8s_1KVA"),
    ({"drop_a": 3, "drop_b": 5, "drop_columns": 9}, "broken_array(3,5,9)"),
    ({"drop_a": 0, "drop_b": 2, "drop_columns": 10}, "broken_array(0,2,10)"),
    ({"family": "DRUM", "drum_k": 2}, "drum(2)"),
    ({"family": "DRUM", "drum_k": 4}, "drum(4)"),
    ({"family": "DRUM", "drum_k": 8}, "drum(8)"),
    ({"family": "ROUP", "roup_k": 0, "roup_m": 8}, "roup(0,8)"),
    ({"family": "ROUP", "roup_k": 2, "roup_m": 5}, "roup(2,5)"),
    ({"family": "catalogue", "pick": "mul8s_1KVQ"}, "mul8s_1KVQ"),
    ({"family": "catalogue", "pick": "mitchell()"}, "mitchell()"),
    ({"family": "catalogue", "pick": "roba()"}, "roba()"),
]


@pytest.mark.parametrize(("values", "name"), SETTINGS, ids=[name for _, name in SETTINGS])
def test_vega_computes_the_error_of_every_pair(rows, operands, values, name):
    spec = placed(plots.explorer(rows, operands).to_dict(), **values)
    by_a = {"aggregate": [{"op": "values", "as": "all"}], "groupby": ["a"]}
    told = computed(
        spec, by_a, text="datum.a+' '+join(pluck(datum.all,'b'),' ')+' '+join(pluck(datum.all,'error'),' ')"
    )
    lines = sorted([int(number) for number in line.split()] for line in told)
    assert [line[0] for line in lines] == list(range(-128, 128))
    assert all(line[1:257] == list(range(-128, 128)) for line in lines)
    found = torch.tensor([line[257:] for line in lines])
    assert torch.equal(found, (multiplier(name).table - exact_table()).long())


@pytest.mark.parametrize(("n", "layer"), [(1, "conv1"), (5, "layer1.0.conv2"), (10, "conv1")])
def test_the_histogram_counts_classes_of_errors(rows, operands, n, layer):
    values, name = SETTINGS[n]
    spec = placed(plots.explorer(rows, operands).to_dict(), layer=layer, **values)
    ((histogram,),) = [[v for v in one["hconcat"] if "fold" in json.dumps(v)] for one in nested(spec)]
    share = "datum.operands+'|'+datum.class+'|'+format(datum.part,'.6f')"
    told = dict(line.rsplit("|", 1) for line in computed(spec, *histogram["transform"], text=share))
    a, b = operands[layer]
    for label, expected in (
        ("all pairs alike", explore.error_shares(multiplier(name))),
        ("real operands", explore.error_shares(multiplier(name), a=a, b=b)),
    ):
        for error_class, one in zip(explore.ERROR_CLASSES, expected.tolist(), strict=True):
            # Shares of operands are shipped with four digits: their product may be off by a thousandth of itself.
            assert float(told.get(f"{label}|{error_class}", 0)) == pytest.approx(one, rel=1e-3, abs=1e-6)
    assert sum(float(part) for part in told.values()) == pytest.approx(2, abs=1e-4)


def nested(spec: dict) -> list[dict]:
    """The rows of charts that hold the map and the histogram."""
    (pairs,) = [one for one in spec["vconcat"] if "transform" in one]
    return [one for one in pairs["vconcat"] if "hconcat" in one]


@pytest.mark.parametrize(("values", "name"), [SETTINGS[n] for n in (2, 6, 8, 9)])
def test_figures_are_those_of_the_multiplier(rows, operands, values, name):
    found = texts(placed(plots.explorer(rows, operands, layer="layer1.0.conv2").to_dict(), **values))
    m, (a, b) = multiplier(name), operands["layer1.0.conv2"]
    uniform, real = errors(m), errors(m, a=a, b=b)
    row = next(row for row in rows if row["multiplier"] == name)
    power = f"{m.power_mw / multiplier('mul8s_1KV6').power_mw:.0%}"
    expected = [f"{uniform.mae:.1f}", f"{uniform.mean_error:+.2f}", str(uniform.wce), f"{uniform.ep:.1%} are wrong"]
    expected += [power, "a proxy" if m.is_proxy else "published", str(row["rank"])]
    expected += [f"{row['top1']:.1%}"]
    assert {one.replace("-", MINUS) for one in expected} <= set(found)
    assert any(name == text.split("  =  ")[0] for text in found)
    (mae,) = [float(text[6:]) for text in found if re.fullmatch(r"real: \d.*", text)]
    (bias,) = [float(text[6:].replace(MINUS, "-")) for text in found if re.match(rf"real: [+{MINUS}]", text)]
    assert mae == pytest.approx(real.mae, rel=1e-3, abs=0.06)
    assert bias == pytest.approx(real.mean_error, abs=0.01 + 1e-3 * real.mae)


def test_nothing_moves_but_the_numbers(rows, operands):
    """The picture has one size, and its axes one domain, at all positions of the sliders."""
    spec, seen = plots.explorer(rows, operands).to_dict(), set()
    for values in (
        {},
        {"drop_columns": 0},
        {"family": "DRUM", "drum_k": 2},
        {"family": "catalogue", "pick": "mitchell()"},
    ):
        svg = vl_convert.vegalite_to_svg(placed(spec, **values))
        seen.add((re.search(r'viewBox="([^"]+)"', svg)[1], *re.findall(r'aria-label="([XY]-axis[^"]+)"', svg)))
    assert len(seen) == 1
    assert float(next(iter(seen))[0].split()[2]) <= 724, "wider, it is cut on many screens"


def test_controls_offer_what_the_package_has(rows, operands):
    spec = plots.explorer(rows, operands, start="roup(2,5)", layer="layer1.0.conv2").to_dict()
    params = {param["name"]: param for param in spec["params"] if "bind" in param}
    assert params["family"]["value"] == "ROUP" and (params["roup_k"]["value"], params["roup_m"]["value"]) == (2, 5)
    assert params["pick"]["bind"]["options"] == list(explore.PICKS)
    assert params["layer"]["bind"]["options"] == list(operands) and params["layer"]["value"] == "layer1.0.conv2"
    for name, (least, most, _) in explore.KNOBS["broken_array"].items():
        assert (params[name]["bind"]["min"], params[name]["bind"]["max"]) == (least, most)


def test_a_chapter_may_take_one_family_and_its_own_operands_and_no_network():
    not_negative = (torch.arange(-128, 128) >= 0).double()
    after_relu = {"a ≥ 0": (not_negative, torch.ones(256))}
    chart = plots.explorer(None, after_relu, families=["broken_array"], start="broken_array(1,1,0)")
    spec = chart.to_dict()
    assert [param["name"] for param in spec["params"] if "bind" in param] == ["drop_a", "drop_b", "drop_columns"]
    found = texts(spec)
    assert f"a ≥ 0: {MINUS}31.25" in found and "+0.75" in found, "the lean of L2J, on paper and after a ReLU"
    assert "71%" in found and "broken_array(1,1,0)  =  mul8s_1L2J" in found
    assert not any(word in json.dumps(spec) for word in ("top1", "rank", "drum"))


def test_a_page_with_it_is_light_and_names_no_address(operands, monkeypatch):
    monkeypatch.setenv("AXMOE_BOOK", "1")
    spec = plots.explorer(runs.read("explorer_resnet8_digits"), operands).to_dict()
    html = _html(spec)["text/html"]
    assert len(html) < 300_000, "with Vega's 0.9 MB beside the pages"
    assert "http" not in html.replace(spec["$schema"], "")
    assert "resnet8 on digits, 360 images, 30 epochs, seed 0 (paper)" in html


def test_what_cannot_be_drawn_is_refused(rows, operands):
    half = {"conv1": (torch.ones(256), torch.ones(255))}
    for arguments, options, problem in (
        ((rows, {}), {}, "no operands"),
        ((rows, half), {}, r"operands of 'conv1' must be two distributions"),
        ((rows, {"conv1": (torch.ones(256), torch.zeros(256))}), {}, r"operands of 'conv1'"),
        ((rows, operands), {"families": ["drom"]}, "'drom'.*broken_array, drum, roup, picks"),
        ((rows, operands), {"families": []}, "no family do not reach.*there are broken_array"),
        ((rows, operands), {"start": "drum(44)"}, r"do not reach 'drum\(44\)'; the nearest is 'drum\(4\)'"),
        ((rows, operands), {"families": ["roup"]}, "controls of roup do not reach"),
        ((rows, operands), {"layer": "conv2"}, "no operands of a layer 'conv2'; there are those of conv1"),
        ((rows[1:], operands), {}, r"1 of 597 multipliers have no row, 'broken_array\(0,0,0\)'"),
        (([{**rows[0], "commit": ""}, *rows[1:]], operands), {}, "lacks commit"),
    ):
        with pytest.raises(ValueError, match=problem):
            plots.explorer(*arguments, **options)

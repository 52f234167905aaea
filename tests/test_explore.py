"""What a slider shows of a multiplier: the same numbers as those that were recorded, each from the place it belongs."""

import pytest
import torch

from axmoe_lite import errors, explore, multiplier, runs
from axmoe_lite.factors import factorise
from axmoe_lite.multipliers import EVOAPPROX, exact_table

SAMPLE = ("mul8s_1KVA", "drum(4)", "roup(2,0)")


def test_settings_are_multipliers_each_once():
    names = explore.settings()
    assert len(set(names)) == len(names) == 7 * 7 * 11 + 7 + 4 * 9 + 15
    assert set(EVOAPPROX) < set(names)
    for name in (names[0], names[539], names[545], names[546], names[-1]):  # the ends of the sliders
        assert multiplier(name).name == name
    for family, knobs in explore.KNOBS.items():
        first = explore.name_of(family, {knob: value for knob, (_, _, value) in knobs.items()})
        assert first in names, f"the sliders of {family} begin outside of their range"


def test_classes_of_errors_double():
    sizes = torch.tensor([0, 1, 2, 3, 4, 7, 8, 8191, 8192, 16383, 16384, 40000])
    classes = [0, 1, 2, 2, 3, 3, 4, 13, 14, 14, 15, 15]
    assert explore.error_class(sizes).tolist() == classes
    assert explore.error_class(-sizes).tolist() == [-one for one in classes]


def test_shares_are_those_of_pairs_and_of_operands_that_occur():
    m = multiplier("mul8s_1KVM")  # clears the lowest bit of a: the error is -b if a is odd
    shares = dict(zip(explore.ERROR_CLASSES, explore.error_shares(m).tolist(), strict=True))
    assert shares[0] == 1 / 2 + 1 / 512 and shares[1] == shares[-1] == 1 / 512 and shares[-8] == 0
    assert shares[8] == 1 / 512  # of b, -128 alone has so large a size
    odd, two = torch.zeros(256), torch.zeros(256)
    odd[128 + 3], two[128 + 2] = 5, 1  # 3 * 2 becomes 2 * 2
    shares = explore.error_shares(m, a=odd, b=two)
    assert shares[explore.ERROR_CLASSES.index(-2)] == 1 and shares.sum() == 1


def test_a_look_tells_what_each_part_of_the_package_says(textures):
    name = "broken_array(0,1,3)"
    told, m = explore.look(multiplier(name)), multiplier(name)
    found = errors(m)
    assert told["rank"] == factorise(m).rank > 1
    assert (told["mae"], told["wce"], told["ep"], told["bias"]) == (found.mae, found.wce, found.ep, found.mean_error)
    assert (told["power_mw"], told["proxy"]) == (m.power_mw, True)
    assert told["mae"] == (m.table - exact_table()).abs().double().mean()
    assert not {"top1", "real_mae", "layer"} & set(told), "without a network nothing is said of one"


@pytest.fixture(scope="module")
def seen():
    return explore.digits_witness()


def test_a_look_at_a_network_uses_the_operands_of_the_layer(seen):
    m = multiplier("mul8s_1KVM")
    first, last = explore.look(m, seen), explore.look(m, seen, layer="layer3.0.conv2")
    assert first["layer"] == next(iter(seen.operands)) and last["layer"] == "layer3.0.conv2"
    for told in (first, last):
        a, b = seen.operands[told["layer"]]
        found = errors(m, a=a, b=b)
        assert (told["real_mae"], told["real_bias"]) == (found.mae, found.mean_error)
    assert first["top1"] == last["top1"] and first["real_mae"] != last["real_mae"]
    with pytest.raises(ValueError, match="no layer 'conv9'; there are conv1, layer1.0.conv1"):
        explore.look(m, seen, layer="conv9")


def test_operands_of_the_witness_are_distributions(seen):
    assert len(seen.operands) == 7
    for name, (a, b) in seen.operands.items():
        assert a.sum() == pytest.approx(1) and b.sum() == pytest.approx(1), name
        if name != "conv1":  # which sees the pixels; all others follow a ReLU
            assert a[:128].sum() == 0 and b[:128].sum() > 0.2, name


def test_recorded_rows_are_what_is_computed_here(seen):
    known = {row["multiplier"]: row for row in runs.read("explorer_resnet8_digits")}
    assert list(known) == explore.settings()
    found = explore.rows(SAMPLE, seen, progress=False)
    assert [row["multiplier"] for row in found] == list(SAMPLE)
    for row in found:
        old = known[row["multiplier"]]
        assert list(row) == [*explore.RECORDED, "seconds"]
        for column in ("power_mw", "mae", "bias", "ep"):
            assert f"{row[column]:.6g}" == old[column], (row["multiplier"], column)
        assert (str(row["rank"]), str(row["wce"]), str(row["proxy"])) == (old["rank"], old["wce"], old["proxy"])
        # The ranges of codes are found in float32: on another processor an image or two may fall to the other side.
        assert abs(row["top1"] - float(old["top1"])) <= 2.01 / len(seen.images.x_test)


def test_an_unknown_name_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"Did you mean 'drum\(k\)'"):
        explore.rows(["drum(4)", "drom(4)"], None, progress=False)

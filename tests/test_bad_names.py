"""Names of multipliers that cannot be, and all that can."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from axmoe_lite import (
    multiplier,
    study,
)
from axmoe_lite.multipliers import FAMILIES
from axmoe_lite.study.networks import check_known

pytestmark = pytest.mark.trust("input", "arguments of public functions")

L2J = multiplier("mul8s_1L2J")

NAMES = """
broken_array
broken_array(1,0)
broken_array(1,0,3
broken_array(1,0,99)
broken_array(1,0,3))
broken_array(1,0,3)x
broken_array(1.5,0,3)
broken_array(a,b,c)
broken_array(1,,3)
drum()
drum(99)
drum(-1)
drum(\u0664)
drum(\u00b2)
drum(99999999999999999999999999)
drum (4)
DRUM(4)
mitchell(1)
mul8s_1L2K
mul8s_1L2J\u200b
v1:mul8s_1L2J
v2:mul8s_1L2H
swap:
swap:swap
swap:row[roba()]
row[...]
row[]
row[roba()
row]roba()[
row[row[roba()]]
row[0 roba()]
row[-1 roba()]
row[1.5 roba()]
row[\u00b2 roba()]
row[9999999999999999999 roba()]
row[999999999 roba()]
row*2[roba()]
row*99999999999999999999999[roba()]
row+filter[roba()]
row+row[roba()]
rows[roba()]
file:
file:x
file:no_such.npy
exec('1')
None
""".strip("\n").split("\n")
LONG = [
    "",
    " ",
    "\n",
    "x" * 10**5,
    "(" * 10**4,
    "[" * 10**4,
    "row[" * 1000 + "]" * 1000,
    "a\0b",
    "\ud800",
    "swap:" * 10**4,
]
LONG += ["swap:tuned:" * 9 + "roba()", "drum(" + "9" * 10**5 + ")", "row[" + "," * 2000 + "]", "drum(4)" * 1000]
KINDS = [None, 0, 1.5, True, b"roba()", ["roba()"], {"roba()"}, L2J, nn.ReLU]


@pytest.mark.parametrize("name", [*NAMES, *LONG, *KINDS], ids=lambda name: repr(name)[:30])
def test_a_name_of_no_multiplier_is_refused_in_a_few_words(name):
    with pytest.raises(ValueError) as told:
        multiplier(name)
    said = str(told.value)
    assert 20 < len(said) < 1500 + (4 * len(name) if isinstance(name, str) and len(name) < 5000 else 20_000)
    assert "invalid literal" not in said and "object" not in said


@settings(deadline=None, max_examples=500)
@given(
    st.one_of(
        st.text(max_size=30),
        st.text("drum()[]4,*+: -row1", max_size=20),
        st.builds("{}({})".format, st.sampled_from([*FAMILIES, "x"]), st.text("0123456789,- \u0664", max_size=8)),
        st.builds(
            "{}[{}]".format, st.sampled_from(["row", "filter*2", "channel+row", "x"]), st.text("2 roba(),", max_size=20)
        ),
    )
)
def test_any_text_is_a_multiplier_of_that_name_or_refused(name):
    try:
        found = multiplier(name)
    except ValueError as refused:
        assert len(str(refused)) > 20
    else:
        assert found.table.shape[0] == 256 and found.table.dtype == torch.int32


def test_what_resembles_nothing_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"^No network is called 'qqqq'\. There are"):
        check_known("network", "qqqq", study.NETWORKS)
    with pytest.raises(ValueError, match="Did you mean 'resnet20'"):
        check_known("network", "resnet2", study.NETWORKS)
    with pytest.raises(ValueError, match=r"^No multiplier is called '@@@@'\. There are"):
        multiplier("@@@@")
    with pytest.raises(ValueError, match="No network is called 3"):
        check_known("network", 3, study.NETWORKS)

"""Factorisation: exact on every pair, minimal where promised, and honest about arithmetic."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axmoe_lite import EVOAPPROX, Multiplier, exact_arithmetic, factorise, multiplier
from axmoe_lite.factors import Factors, masked, rank_lower_bound
from axmoe_lite.kernels.encode import encode_unsigned
from axmoe_lite.multipliers import exact_table

evidence = pytest.mark.trust("law", "factors multiplied out: the table")

RANKS = dict(zip(EVOAPPROX, (1, 3, 4, 5, 1, 3, 4, 1, 4, 1, 1, 1, 1), strict=True))


def gives_back(factors: Factors, table: torch.Tensor) -> bool:
    u, v = (np.asarray(side) for side in (factors.u, factors.v))
    return torch.equal(torch.as_tensor((u.T @ v).astype("int64")), table.long())


@pytest.mark.parametrize("name", EVOAPPROX)
def test_the_thirteen_have_their_published_rank_in_masks(name):
    factors = factorise(multiplier(name))
    assert factors.rank == RANKS[name] == rank_lower_bound(multiplier(name).table)
    a = torch.arange(-128, 128, dtype=torch.int8)
    by_masks = sum(masked(a, p).long()[:, None] * masked(a, q).long()[None, :] for p, q in factors.masks)
    assert torch.equal(by_masks, multiplier(name).table.long())


@evidence
@pytest.mark.parametrize(
    "name,rank",
    [("drum(4)", 1), ("pr(1,2)", 1), ("roba()", 2), ("roup(0,4)", 3), ("mitchell()", 64), ("broken_array(8,0,0)", 0)],
)
def test_ranks_of_families(name, rank):
    factors = factorise(multiplier(name))
    assert factors.rank == rank
    assert torch.equal(factors.u.long().T @ factors.v.long(), multiplier(name).table.long())


@evidence
def test_every_broken_array_is_masks():
    for drop_a in range(0, 9, 2):
        for drop_b in range(0, 9, 3):
            for drop_columns in range(0, 16, 3):
                factors = factorise(multiplier(f"broken_array({drop_a},{drop_b},{drop_columns})"))
                # Rows that keep no column vanish; of the others, those with the same columns share a term.
                kept = {max(drop_b, drop_columns - i) for i in range(drop_a, 8)} - set(range(8, 20))
                assert factors.masks is not None and factors.rank == len(kept)


@evidence
@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 6), largest=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_any_low_rank_table(rank, largest, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-largest, largest + 1, (256, rank), generator=generator)
    v = torch.randint(-largest, largest + 1, (rank, 256), generator=generator)
    factors = factorise(Multiplier("random", u @ v))
    assert factors.rank <= rank
    assert torch.equal(factors.u.T @ factors.v, u @ v)


@evidence
def test_high_ranks_stay_exact():
    generator = torch.Generator().manual_seed(0)
    for rank in (9, 20, 65, 256):
        u = torch.randint(-9, 10, (256, rank), generator=generator)
        table = u @ torch.randint(-9, 10, (rank, 256), generator=generator)
        factors = factorise(Multiplier("random", table))
        if isinstance(factors.u, torch.Tensor):
            assert torch.equal(factors.u.T @ factors.v, table)
        else:
            assert gives_back(factors, table)
        assert factors.rank == rank if rank <= 64 else factors.rank <= 256


def test_one_planted_error_adds_one_term():
    table = exact_table()
    table[100, 50] += 1
    assert factorise(Multiplier("planted", table)).rank == 2


def test_factors_are_remembered():
    m = multiplier("mul8s_1KVA")
    assert factorise(m) is factorise(m)


def test_masks_are_not_claimed_for_tables_that_only_look_like_arrays():
    # Exact on single bits, wrong elsewhere: the 8 x 8 look would be fooled, the check on all pairs is not.
    table = exact_table()
    table[3 + 128, 5 + 128] += 1
    assert factorise(Multiplier("sly", table)).masks is None


def test_bytes_are_not_claimed_for_tables_that_only_look_like_negated_arrays():
    negated = multiplier("mul8s_1KVA").negated().table
    assert factorise(Multiplier("turned", negated)).bytewise
    for row in (0, 131):  # -128, which an array's other rows say nothing of, and 3
        table = negated.clone()
        table[row] += 7
        assert gives_back(factorise(Multiplier("sly", table)), table)
    for name in ("drum(7)", "drum(6)"):  # where single bits and -1 are exact
        assert gives_back(factorise(multiplier(name)), multiplier(name).table)


# ---------------------------------------------------------------------------- which arithmetic


def test_exact_arithmetic_by_hand():
    kv6 = factorise(multiplier("mul8s_1KV6"))  # |u|, |v| up to 128: B = 16,384 = 2^14
    assert exact_arithmetic(kv6, 131_071).name == "int8"  # 131,071 * 2^14 < 2^31
    assert exact_arithmetic(kv6, 131_072).name == "float32"  # 2^17 * 2^14 = 2^31 is one too many
    assert exact_arithmetic(kv6, 5000, available=("float32",)).chunk == 1024  # 2^24 / 2^14
    assert exact_arithmetic(kv6, 10, available=("float64",)).chunk == 10
    kva = factorise(multiplier("mul8s_1KVA"))  # B = 128*128 + (1 + 2 + 4 + 8) * 128 = 18,304
    assert exact_arithmetic(kva, 5000, available=("float32",)).chunk == 2**24 // 18_304
    drum4 = factorise(multiplier("drum(4)"))  # values up to 136 do not fit a byte
    assert exact_arithmetic(drum4, 9).name == "float32"


def test_a_factor_beyond_the_format_is_refused():
    u = torch.full((1, 256), 2**24 + 1, dtype=torch.int64)
    factors = Factors(u, torch.zeros(1, 256, dtype=torch.int64), None)
    assert exact_arithmetic(factors, 1, available=("float32",)).name == "none"
    assert exact_arithmetic(factors, 1, available=("float64",)).name == "float64"


def test_a_fan_in_of_zero_is_refused():
    with pytest.raises(ValueError, match="fan-in is 0"):
        exact_arithmetic(factorise(multiplier("mul8s_1KV6")), 0)


def test_what_was_made_of_factors_goes_with_their_multiplier():
    """A search meets thousands of tables; what a kernel keeps of each must not outlive it."""
    mine = Multiplier("mine", exact_table() - 3 * torch.arange(-128, 128)[:, None])
    encode_unsigned(torch.ones(2, 3, 4, 4), factorise(mine), inverse_scale=1.0, groups=1)
    found = weakref.ref(factorise(mine))
    del mine
    gc.collect()
    assert found() is None

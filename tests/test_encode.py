"""One compiled pass and several of plain torch give the same bytes, on no more threads than torch may use."""

import importlib.util
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from axmoe_lite import EXACT, Factors, Multiplier, factorise, multiplier
from axmoe_lite.kernels import encode as module
from axmoe_lite.kernels import factored
from axmoe_lite.kernels.encode import (
    PIECE,
    clear_outside,
    codes_in_bfloat16,
    codes_of,
    encode,
    encode_unsigned,
    round_trip,
)
from axmoe_lite.layers import ApproxConv2d, ApproxLinear

evidence = pytest.mark.trust("law", "bytes of operands: the compiled passes against plain torch")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="without numba there is one path")


def random_table(rank, seed=0, largest=9):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-largest, largest + 1, (256, rank), generator=generator)
    return Multiplier("random", u @ torch.randint(-largest, largest + 1, (rank, 256), generator=generator))


FACTORS = {
    "exact": factorise(multiplier(EXACT)),
    "one mask": factorise(multiplier("mul8s_1L2J")),
    "masks": factorise(multiplier("mul8s_1KV8")),
    "no masks": factorise(random_table(2)),
    "no masks, rank 5": factorise(random_table(5, seed=1)),
}


def factors_for(name, channels):
    """One of FACTORS, or those of a mosaic on so many channels."""
    return FACTORS.get(name) or factored.factors_of(multiplier(name), channels=channels)


BY_CHANNEL = ["signs:mul8s_1L2L", "channel[mul8s_1KVA, mul8s_1L2L, negated:mul8s_1KV9, ...]", "signs:roup(0,4)"]


@pytest.fixture
def both(monkeypatch):
    """both(call): what the compiled pass gives, a copy, and what plain torch gives."""

    def run(call):
        def kept():
            result = call()
            several = result if isinstance(result, tuple) else (result,)
            return tuple(r.clone() if isinstance(r, torch.Tensor) else r for r in several)

        with monkeypatch.context() as patch:
            patch.setattr(module, "_compiled", lambda: None)
            slow = kept()
        return kept(), slow

    return run


def same(one, other):
    """The same bits, type and shape; NaN equals NaN."""
    one, other = (t.view(torch.int32) if t.dtype == torch.float32 else t for t in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def awkward(*shape, seed=0):
    """Values around all that can go wrong: ties at .5, both zeros, the ends of the range, huge, infinite and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 60
    special = torch.tensor(
        [0.0, -0.0, 0.5, -0.5, 1.5, -1.5, 2.5, 126.5, 127.0, 127.5, 128.0, -126.5, -127.5, -128.5, 0.49999997, 1e9,
         -1e9, 3e38, -3e38, 1e-40, -1e-40, 4194304.5, 8388609.0, torch.inf, -torch.inf, torch.nan, -torch.nan]
    )  # fmt: skip
    flat = x.view(-1)
    places = torch.randperm(flat.numel(), generator=generator)[: len(special)]
    flat[places] = special[: len(places)]
    return x


SHAPES = [(1, 1), (2, 23), (115, 8), (3, 5, 2, 16), (1, 115), (23, 1), (2, 24), (2, 3, 6)]


# --------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("compiled", [False, True])
def test_codes_by_hand(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(module, "_compiled", lambda: None)
    # Times 2: 0, 0.5 -> 0 and 1.5 -> 2 and 2.5 -> 2 (half to even), -0.5 -> 0, 126.5 -> 126, 127.5 -> 128 cut to 127.
    x = torch.tensor(
        [0.0, 0.25, 0.75, 1.25, -0.25, -0.75, 63.25, 63.75, -63.75, 1e30, torch.inf, -torch.inf, torch.nan]
    )
    codes = [0, 0, 2, 2, 0, -2, 126, 127, -127, 127, 127, -127, 0]
    assert codes_of(x, 2.0).tolist() == codes
    assert codes_of(x, 2.0, least=0).tolist() == [max(0, c) for c in codes]
    # L2J keeps all bits but the lowest; as unsigned bytes, 128 more.
    kept = [c & -2 for c in codes]
    assert encode(x[None], FACTORS["one mask"], inverse_scale=2.0)[0].tolist() == kept
    assert encode(x[None], FACTORS["one mask"], inverse_scale=2.0, offset=128)[0].tolist() == [k + 128 for k in kept]
    assert encode_unsigned(x[None], FACTORS["one mask"], inverse_scale=2.0)[0][0].tolist() == [k + 128 for k in kept]
    positive, offset = encode_unsigned(x[None, :5], FACTORS["exact"], inverse_scale=2.0)
    assert offset == 0 and positive.tolist() == [[0, 0, 2, 2, 0]], "-0.25 has code 0, so no code is negative"


@pytest.mark.parametrize("compiled", [False, True])
def test_terms_stand_side_by_side_in_their_group(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(module, "_compiled", lambda: None)
    # u_0(a) = a & 2 bits, u_1(a) = ...: read off the factors themselves. Channels 1 2 | 3 -4 of two groups become
    # u_0(1) u_0(2) u_1(1) u_1(2) | u_0(3) u_0(-4) u_1(3) u_1(-4).
    for factors in (FACTORS["masks"], FACTORS["no masks"]):
        u = [[int(row[a + 128]) for a in (1, 2, 3, -4)] for row in factors.u]
        together = [value for row in u for value in row]
        apart = [value for row in u for value in row[:2]] + [value for row in u for value in row[2:]]
        codes = torch.tensor([[1, 2, 3, -4]], dtype=torch.int8)
        assert encode(codes, factors)[0].tolist() == together
        assert encode(codes, factors, groups=2)[0].tolist() == apart
        assert encode(codes.float(), factors, groups=2, inverse_scale=1.0)[0].tolist() == apart
        v = [[int(row[b + 128]) for b in (1, 2, 3, -4)] for row in factors.v]
        assert encode(codes, factors, "v")[0].tolist() == [value for row in v for value in row]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_channel_has_its_own_factors(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(module, "_compiled", lambda: None)
    # L2J clears the lowest bit: 7 becomes 6, -7 becomes -8. Negated first, 7 becomes -8. Halves of both are multiplied.
    factors = factored.factors_of(multiplier("signs:mul8s_1L2J"), channels=3)
    assert (factors.rank, factors.shift) == (1, 2)
    codes = torch.tensor([[7, 7, -7, 7, 7, -7]], dtype=torch.int8)
    turned = torch.tensor([[3, -4, -4, 3, -4, -4]], dtype=torch.int8)
    assert torch.equal(encode(codes, factors, groups=2), turned)
    assert torch.equal(encode(codes.float(), factors, groups=2, inverse_scale=1.0), turned)
    found, offset = encode_unsigned(codes.float(), factors, inverse_scale=1.0, groups=2)
    assert offset == 128 and torch.equal(found.int() - 128, turned.int())


# ------------------------------------------------------------------------------- both paths agree


@evidence
@pytest.mark.parametrize("name", [*FACTORS, *BY_CHANNEL])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("least", [-127, 0])
def test_encoded_values(name, shape, offset, least, both):
    x, factors = awkward(*shape), factors_for(name, shape[-1])
    for inverse in (1.0, 2.0, float(np.float32(1 / 0.37))):
        options = {"inverse_scale": inverse, "offset": offset, "least": least}
        fast, slow = both(lambda options=options: encode(x, factors, **options))
        assert same(fast[0], slow[0])
        assert fast[0].dtype == (torch.uint8 if offset else torch.int8)


def test_factors_that_lie_transposed_in_memory():
    # Above rank 64 u is one_hot(...).T: term r of code a is 1 where row a of the table is the r-th distinct one.
    factors = factorise(random_table(65))
    codes = torch.arange(-128, 128).to(torch.int8)[:, None]
    for side in ("u", "v"):
        small = getattr(factors, side).clamp(-128, 127)
        held = Factors(factors.u.clamp(-128, 127), factors.v.clamp(-128, 127), None)
        assert torch.equal(encode(codes, held, side), small.T.to(torch.int8))


@evidence
@pytest.mark.parametrize("name,side", [*((n, s) for n in FACTORS for s in "uv"), *((n, "u") for n in BY_CHANNEL)])
@pytest.mark.parametrize("groups,channels", [(1, 7), (2, 6), (2, 16), (3, 24), (23, 23), (5, 115)])
@pytest.mark.parametrize("offset", [0, 128])
def test_encoded_codes_in_groups(name, groups, channels, offset, side, both, draw):
    codes, factors = draw(3, 2, channels), factors_for(name, channels // groups)
    fast, slow = both(lambda: encode(codes, factors, side, groups=groups, offset=offset))
    assert same(fast[0], slow[0])
    unsigned = codes.clamp_min(0).view(torch.uint8)
    fast, slow = both(lambda: encode(unsigned, factors, side, groups=groups, offset=offset))
    assert same(fast[0], slow[0]) and fast[0].dtype == torch.uint8


@evidence
@pytest.mark.parametrize("name", [*FACTORS, *BY_CHANNEL])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("signed", [False, True])
def test_unsigned_bytes(name, shape, signed, both):
    x, factors = awkward(*shape, seed=1).nan_to_num(nan=0.0), factors_for(name, shape[-1])
    x = x if signed else x.abs()
    fast, slow = both(lambda: encode_unsigned(x, factors, inverse_scale=2.0))
    assert same(fast[0], slow[0]) and fast[1] == slow[1]
    # Less the offset, they are the signed bytes.
    assert torch.equal((fast[0].int() - fast[1]).to(torch.int8), encode(x, factors, inverse_scale=2.0))
    if fast[1] == 0:
        assert not codes_of(x, 2.0).lt(0).any()


def test_unsigned_bytes_of_factors_that_are_negative_where_codes_are_not():
    factors, x = FACTORS["no masks"], torch.rand(5, 23) * 127
    found, offset = encode_unsigned(x, factors, inverse_scale=1.0)
    u = factors.u[:, codes_of(x, 1.0).long() + 128]  # [R, 5, 23]
    assert torch.equal(found.int() - offset, u.transpose(0, 1).flatten(1).int())


def test_one_negative_code_anywhere_is_seen(both):
    # -0.25 of scale 1 / 2 has code 0, the next float below code -1 (half to even takes -0.5 up).
    below = torch.tensor(-0.25).nextafter(torch.tensor(-1.0)).item()
    for size in (1, 23, 40_000):
        for place in {0, size // 2, size - 1}:
            x = torch.full((1, size), -0.25)
            assert encode_unsigned(x, FACTORS["exact"], inverse_scale=2.0)[1] == 0
            x[0, place] = below
            fast, slow = both(lambda x=x: encode_unsigned(x, FACTORS["exact"], inverse_scale=2.0))
            assert fast[1] == slow[1] == 128 and same(fast[0], slow[0]) and fast[0][0, place] == 127


def test_not_a_number_gives_the_same_product_on_both_paths(both):
    # Whether there is a zero point may differ then: NaN has code 0, which is not negative.
    for x in (torch.tensor([[torch.nan, 1.0]]), torch.tensor([[torch.nan, -1.0]]), torch.full((1, 2), torch.nan)):
        for factors in FACTORS.values():
            (fast, high), (slow, low) = both(lambda x=x, f=factors: encode_unsigned(x, f, inverse_scale=1.0))
            assert torch.equal((fast.int() - high).to(torch.int8), (slow.int() - low).to(torch.int8))


def test_every_kind_of_nan_has_code_zero():
    nans = torch.tensor([0x7FC00001, 0x7FC000FF, 0x7FABCDEF, -1], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all() and codes_of(nans, 1.0).tolist() == [0, 0, 0, 0]


@evidence
@pytest.mark.parametrize("inverse", [1.0, 2.0, float(np.float32(1 / 0.37)), 1e-30, 1e30])
@pytest.mark.parametrize("least", [-127, 0])
def test_codes(inverse, least, both):
    for x in (awkward(1), awkward(115), awkward(2, 23), awkward(3, 4, 5, 6), awkward(70_001), awkward(1, 1, 1, 1)):
        fast, slow = both(lambda x=x: codes_of(x, inverse, least))
        assert same(fast[0], slow[0])


@evidence
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.37, 1e-30, 3e30])
def test_round_trips(scale, both):
    for x in (awkward(1), awkward(115), awkward(2, 23), awkward(3, 4, 5, 6), awkward(70_001)):
        x = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        fast, slow = both(lambda x=x: round_trip(x, scale)[0])
        # The one difference: torch rounds -0.3 to -0, the compiled pass to 0. As numbers they are equal.
        assert torch.equal(fast[0], slow[0]) and fast[0].dtype == torch.float32
        inverse = float(1.0 / torch.tensor(scale))
        assert torch.equal(fast[0], codes_of(x, inverse).float() * torch.tensor(scale))


@evidence
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30])
def test_clearing(scale, both):
    for shape in ((1,), (115,), (2, 23), (3, 4, 5, 6), (70_001,)):
        x = awkward(*shape) * scale
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(5))

        def clear(x=x, grad=grad):
            _, notes = round_trip(x, scale)
            return clear_outside(grad.clone(), x, scale, notes)

        fast, slow = both(clear)
        inside = x.abs() <= torch.tensor(scale) * 127.5
        assert same(fast[0], slow[0]) and torch.equal(fast[0] != 0, inside)
        assert torch.equal(fast[0][inside], grad[inside])
        assert same(clear_outside(grad.clone(), x, scale), fast[0]), "without notes"


@evidence
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_in_bfloat16(scale, dtype, both):
    # Whole pieces, a few values more and a few less, and tensors that are no memory in one row.
    shapes = [(1,), (115,), (2, 23), (3, 4, 5, 6), (PIECE,), (PIECE + 1,), (2 * PIECE - 1,)]
    views = [(awkward(*shape) * scale).to(dtype) for shape in shapes]
    views += [views[3].contiguous(memory_format=torch.channels_last), views[1][::2], views[2].T, views[4][3:70_000]]
    inverse = float(1.0 / torch.tensor(scale))
    for x in (view.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) for view in views):
        fast, slow = both(lambda x=x: codes_in_bfloat16(x, scale)[0])
        assert fast[0].dtype == slow[0].dtype == torch.bfloat16
        assert torch.equal(fast[0], slow[0]) and torch.equal(fast[0].to(torch.int8), codes_of(x, inverse))
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            assert codes_in_bfloat16(x, scale)[0].stride() == x.stride()


@evidence
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30])
@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_grad", [torch.float32, torch.bfloat16], ids=str)
def test_clearing_short_floats(scale, of_x, of_grad, both):
    for shape in ((1,), (115,), (2, 23), (256,), (257,), (511,), (3, 4, 5, 6), (PIECE + 300,), (0, 6)):
        x = (awkward(*shape) * scale).to(of_x)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(of_grad)
        if x.ndim == 4:
            x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))

        def clear(x=x, grad=grad):
            return clear_outside(grad.clone(), x, scale, codes_in_bfloat16(x, scale)[1])

        fast, slow = both(clear)
        expected = torch.where(x.float().abs() <= torch.tensor(scale) * 127.5, grad, torch.zeros((), dtype=of_grad))
        for found in (fast[0], slow[0], clear_outside(grad.clone(), x, scale)):
            assert found.dtype == of_grad and torch.equal(found, expected)


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16], ids=str)
def test_one_short_float_is_cleared_wherever_it_stands(of_x):
    # Each note speaks for 256 values, each piece has notes of its own, and the last ones speak for fewer.
    size = 2 * PIECE + 300
    for place in (0, 255, 256, PIECE - 1, PIECE, PIECE + 256, 2 * PIECE - 1, 2 * PIECE, 2 * PIECE + 256, size - 1):
        x = torch.zeros(size, dtype=of_x)
        x[place] = -200
        grad = clear_outside(torch.ones(size, dtype=torch.bfloat16), x, 1.0, codes_in_bfloat16(x, 1.0)[1])
        assert grad[place] == 0 and int(grad.float().sum()) == size - 1


def test_the_edge_of_clipping_is_not_rounded_to_the_type_of_the_values(both):
    # 127.5 * 1.0039 = 127.997...: bfloat16 steps by 0.5 up to 128, and rounds this limit to 128, which lies outside.
    x, scale = torch.tensor([127.5, 128.0, -128.0, 129.0, 0.0]).bfloat16(), 1.0039
    assert torch.tensor(127.5 * scale).bfloat16() == 128
    for notes in (lambda: None, lambda: codes_in_bfloat16(x, scale)[1]):
        for dtype in (torch.float32, torch.bfloat16):
            found = both(lambda notes=notes, dtype=dtype: clear_outside(torch.ones(5, dtype=dtype), x, scale, notes()))
            assert all(kept[0].tolist() == [1, 0, 0, 0, 1] for kept in found)


def test_clearing_works_in_place_and_in_every_layout():
    x = awkward(2, 6, 5, 4)
    expected = torch.where(x.abs() <= 127.5, 1.0, 0.0)
    layouts = [lambda t: t, lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.mT.contiguous().mT]
    for of_grad in layouts:
        for of_x in layouts:
            grad, seen = of_grad(torch.ones(2, 6, 5, 4)), of_x(x)
            _, notes = round_trip(seen, 1.0)
            assert clear_outside(grad, seen, 1.0, notes) is grad and torch.equal(grad, expected)


# ------------------------------------------------------------------------------ layouts and memory


def test_inputs_of_every_layout(both):
    factors, wide = FACTORS["masks"], awkward(4, 6, 5, 46)
    views = {
        "every second": wide[..., ::2],
        "channels last": wide[..., :23].contiguous(memory_format=torch.channels_last),
        "transposed": wide.transpose(1, 2)[..., :23],
        "turned": wide[..., :23].permute(3, 1, 2, 0),
        "one for all": wide[:1, ..., :23].expand(4, 6, 5, 23),
        "offset": wide[1:, 1:, 1:, 1:24],
        "flipped": wide[..., :23].flip(-1),
    }
    for name, x in views.items():
        for call in (
            lambda x: encode(x, factors, inverse_scale=2.0),
            lambda x: encode_unsigned(x, factors, inverse_scale=2.0)[0].clone(),
            lambda x: codes_of(x, 2.0),
            lambda x: round_trip(x.nan_to_num(nan=0.0), 0.5)[0].clone(),
        ):
            plain = call(x.clone(memory_format=torch.contiguous_format))
            fast, slow = both(lambda x=x, call=call: call(x))
            assert torch.equal(fast[0], plain) and torch.equal(slow[0], plain), name
    last = views["channels last"]
    assert codes_of(last, 2.0).stride() == last.stride() == round_trip(last, 0.5)[0].stride()


def test_other_float_types(both):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = (awkward(3, 23).clamp(-300, 300)).to(dtype)
        fast, slow = both(lambda x=x: codes_of(x, 2.0))
        assert same(fast[0], slow[0]) and same(fast[0], codes_of(x.float(), 2.0))
        fast, slow = both(lambda x=x: round_trip(x, 0.5)[0])
        assert torch.equal(fast[0].nan_to_num(), slow[0].nan_to_num()) and fast[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (2, 0, 6), (0,)])
def test_empty_inputs(shape, both):
    x = torch.zeros(shape)
    for call in (
        lambda: encode(x, FACTORS["masks"], inverse_scale=1.0),
        lambda: encode(x.to(torch.int8), FACTORS["no masks"], offset=128),
        lambda: encode_unsigned(x, FACTORS["masks"], inverse_scale=1.0)[0],
        lambda: codes_of(x, 1.0),
        lambda: round_trip(x, 1.0)[0],
        lambda: clear_outside(x.clone(), x, 1.0, round_trip(x, 1.0)[1]),
        lambda: codes_in_bfloat16(x, 1.0)[0],
    ):
        fast, slow = both(call)
        assert same(fast[0], slow[0]) and fast[0].numel() == 0


def test_a_given_place_is_written_to():
    x, factors = awkward(3, 23), FACTORS["masks"]
    out = torch.zeros(3, 23 * factors.rank, dtype=torch.uint8)
    assert encode(x, factors, inverse_scale=1.0, offset=128, out=out) is out
    assert torch.equal(out, encode(x, factors, inverse_scale=1.0, offset=128))


def test_inputs_are_left_alone():
    x = awkward(3, 24)
    kept = x.clone()
    encode(x, FACTORS["masks"], inverse_scale=1.0)
    encode_unsigned(x, FACTORS["exact"], inverse_scale=1.0)
    codes_of(x, 1.0)
    clear_outside(torch.ones(3, 24), x, 1.0, round_trip(x, 1.0)[1])
    codes = codes_of(x, 1.0)
    again = codes.clone()
    encode(codes, FACTORS["exact"], offset=128)
    assert same(x, kept) and same(codes, again)


def test_borrowed_memory_is_not_lent_twice_within_a_product():
    # The first layers fall back to other arithmetic (600 * 127 * 255 > 2^24) after they have encoded; smaller ones
    # follow. Results kept from before must all stay as they are, and each be the law.
    kept = []
    for out, channels in ((2, 600), (3, 23), (4, 6)):
        for exact in (nn.Linear(channels, out, bias=False), nn.Conv2d(channels, out, 1, bias=False)):
            exact.weight.data.fill_(127.0)  # code 127 of scale 1
            layer = (ApproxLinear if isinstance(exact, nn.Linear) else ApproxConv2d)(exact, multiplier(EXACT))
            layer.scale_x.fill_(0.01)
            shape = (5, channels) if isinstance(exact, nn.Linear) else (5, channels, 3, 2)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(channels))
            sums = codes_of(x, float(1.0 / torch.tensor(0.01))).int().sum(1, keepdim=True) * 127
            law = (sums.float() * torch.tensor(0.01)).expand(5, out, *shape[2:])
            with torch.no_grad():
                kept.append((layer.eval()(x), law, layer, x))
    for found, law, layer, x in reversed(kept):
        with torch.no_grad():
            assert torch.equal(found, law) and torch.equal(layer(x), law)


def test_two_threads_have_memory_of_their_own():
    wrong, factors, start = [], FACTORS["masks"], threading.Barrier(2)

    def work(seed):
        x = awkward(40, 24, seed=seed)
        expected = encode(x, factors, inverse_scale=1.0, offset=128)
        start.wait()
        for _ in range(200):
            found, offset = encode_unsigned(x, factors, inverse_scale=1.0)
            if offset != 128 or not torch.equal(found, expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads_and_counts_are_restored(threads):
    import numba

    before, of_numba = torch.get_num_threads(), numba.get_num_threads()
    x, factors = awkward(3, 50_000), FACTORS["masks"]
    expected = encode(x, factors, inverse_scale=1.0), codes_of(x, 2.0), round_trip(x, 0.5)[0].clone()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(encode(x, factors, inverse_scale=1.0), expected[0])
        assert torch.equal(codes_of(x, 2.0), expected[1])
        assert same(round_trip(x, 0.5)[0], expected[2])
        assert torch.get_num_threads() == threads and numba.get_num_threads() == of_numba
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fresh_process_keeps_its_number_of_threads(threads):
    # numba starts its threads at its first parallel loop, and has changed torch's count then.
    code = f"""
import torch
torch.set_num_threads({threads})
from axmoe_lite import factorise, multiplier
from axmoe_lite.kernels import encode, lookup
x = torch.randn(3, 50_000)
for name in ("mul8s_1KV6", "mul8s_1KV8"):
    encode.encode(x, factorise(multiplier(name)), inverse_scale=10.0)
    assert torch.get_num_threads() == {threads}, torch.get_num_threads()
encode.codes_of(x, 2.0)
encode.clear_outside(torch.ones_like(x), x, 0.01, encode.round_trip(x, 0.01)[1])
assert torch.get_num_threads() == {threads}
a = torch.randint(-128, 128, (200, 100)).to(torch.int8)
lookup.matmul(a, a.T, multiplier("mitchell()").table)
assert torch.get_num_threads() == {threads}, torch.get_num_threads()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

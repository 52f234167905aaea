"""Every path equals the law in every bit, on shapes that no tile divides and operands meant to break it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axmoe_lite import EVOAPPROX, EXACT, Multiplier, conv2d, matmul, multiplier
from axmoe_lite.kernels import reference
from axmoe_lite.multipliers import exact_table

NAMES = [*EVOAPPROX, "drum(4)", "roba()", "roup(0,4)", "pr(1,2)", "swap:mul8s_1KXF", "broken_array(8,0,0)"]


def random_table(rank: int, largest: int, seed: int = 0) -> Multiplier:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-largest, largest + 1, (256, rank), generator=generator)
    return Multiplier("random", u @ torch.randint(-largest, largest + 1, (rank, 256), generator=generator))


# --------------------------------------------------------------------------------- the law itself


@pytest.mark.parametrize("path", ["reference", "factored"])
def test_sentinels_prove_which_operand_is_the_row(path):
    # A table of zeros with two planted values: M(127, 0) = 3 and M(0, 127) = 5. a is the row.
    table = torch.zeros(256, 256, dtype=torch.int32)
    table[127 + 128, 0 + 128], table[0 + 128, 127 + 128] = 3, 5
    m = Multiplier("sentinels", table)
    assert matmul(torch.tensor([[127]]), torch.tensor([[0]]), m, path=path).item() == 3
    assert matmul(torch.tensor([[0]]), torch.tensor([[127]]), m, path=path).item() == 5
    image, weight = torch.tensor([[[[127]]]]), torch.tensor([[[[0]]]])
    assert conv2d(image, weight, m, path=path).item() == 3
    assert conv2d(weight, image, m, path=path).item() == 5


def test_the_law_on_a_finger():
    # L2J clears the lowest bits: [3, 7] . [5, 2] = 2*4 + 6*2 = 20.
    assert (
        matmul(torch.tensor([[3, 7]]), torch.tensor([[5], [2]]), multiplier("mul8s_1L2J"), path="reference").item()
        == 20
    )


def test_the_law_with_the_exact_table_is_ordinary_convolution(draw):
    x, w = draw(2, 6, 9, 7), draw(4, 3, 3, 2)
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    exact = torch.nn.functional.conv2d(x.double(), w.double(), **options)
    assert torch.equal(conv2d(x, w, multiplier(EXACT), path="reference", **options).double(), exact)
    a, b = draw(5, 23), draw(23, 3)
    assert torch.equal(matmul(a, b, multiplier(EXACT), path="reference").long(), a.long() @ b.long())


def test_two_writings_of_the_law_agree(draw):
    # A convolution is a product of its patches; unfold is torch's own way to cut them.
    m = multiplier("mul8s_1KX5")
    x, w = draw(1, 3, 6, 5), draw(4, 3, 3, 3)
    patches = torch.nn.functional.unfold(x.float(), 3, padding=1)[0].to(torch.int8)  # [27, 30]
    product = reference.matmul(patches.T.contiguous(), w.flatten(1).T, m.table)  # [30, 4]
    assert torch.equal(conv2d(x, w, m, padding=1, path="reference")[0].flatten(1), product.T)


# ------------------------------------------------------------------------------ the factored path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 23, 115), (115, 1, 2), (23, 115, 1)])
def test_factored_matmul_is_the_law(name, shape, draw):
    m, k, n = shape
    a, b, found = draw(m, k), draw(k, n), multiplier(name)
    assert torch.equal(matmul(a, b, found, path="factored"), matmul(a, b, found, path="reference"))


OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 3), "dilation": (2, 1)},
    {"groups": 3, "padding": 1},
    {"groups": 6, "padding": 2, "dilation": 2},
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_factored_conv2d_is_the_law(name, options, draw):
    groups = options.get("groups", 1)
    x, w, m = draw(2, 6, 7, 9), draw(6, 6 // groups, 3, 2), multiplier(name)
    assert torch.equal(conv2d(x, w, m, path="factored", **options), conv2d(x, w, m, path="reference", **options))


@pytest.mark.parametrize("name", ["mul8s_1KV6", "mul8s_1KVA", "drum(4)"])
@pytest.mark.parametrize("channels", [113, 114, 230])
def test_fan_ins_around_the_chunk(name, channels, draw):
    # 9 * 113 = 1017 products fit a float32 chunk of 1024, 9 * 114 = 1026 do not.
    m = multiplier(name)
    for x in (torch.full((1, channels, 4, 3), -128, dtype=torch.int8), draw(1, channels, 4, 3)):
        w = torch.full((2, channels, 3, 3), -128, dtype=torch.int8)
        assert torch.equal(conv2d(x, w, m, path="factored"), conv2d(x, w, m, path="reference"))


@pytest.mark.parametrize("fan_in", [1, 1024, 1025, 4608, 20_000])
def test_adversarial_operands(fan_in):
    alternating = torch.tensor([-128, 127], dtype=torch.int8).repeat(fan_in)[:fan_in]
    for a in (alternating, torch.full((fan_in,), -128, dtype=torch.int8), torch.full((fan_in,), 127, dtype=torch.int8)):
        for b in (alternating, torch.full((fan_in,), -128, dtype=torch.int8)):
            for name in ("mul8s_1KV6", "mul8s_1KVA", "roba()"):
                law = matmul(a[None], b[:, None], multiplier(name), path="reference")
                assert torch.equal(matmul(a[None], b[:, None], multiplier(name), path="factored"), law)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 8),
    largest=st.sampled_from([1, 9, 100]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9)),
    seed=st.integers(0, 2**31),
)
def test_random_tables(rank, largest, shape, seed):
    m, (rows, fan_in, columns) = random_table(rank, largest, seed), shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (rows, fan_in), generator=generator)
    b = torch.randint(-128, 128, (fan_in, columns), generator=generator)
    assert torch.equal(matmul(a, b, m, path="auto"), matmul(a, b, m, path="reference"))


def test_padding_goes_through_the_table(draw):
    # M(0, b) = b: every padded pixel adds its weight. Fast paths that pad with a factor of 0 miss that.
    m = Multiplier("errs at zero", exact_table() + torch.arange(-128, 128, dtype=torch.int32)[None, :])
    x, w = torch.zeros(1, 1, 1, 1, dtype=torch.int8), draw(1, 1, 3, 3)
    assert conv2d(x, w, m, padding=1, path="reference").item() == w.int().sum()
    x, w = draw(2, 4, 5, 5), draw(2, 2, 3, 3)
    fast = conv2d(x, w, m, padding=1, groups=2, path="factored")
    assert torch.equal(fast, conv2d(x, w, m, padding=1, groups=2, path="reference"))


def test_channels_last_and_strided_inputs(draw):
    m, x, w = multiplier("mul8s_1KVA"), draw(2, 6, 10, 8), draw(4, 6, 3, 3)
    law = conv2d(x, w, m, path="reference")
    assert torch.equal(conv2d(x.contiguous(memory_format=torch.channels_last), w, m), law)
    wide = draw(2, 6, 20, 8)
    assert torch.equal(conv2d(wide[:, :, ::2], w, m), conv2d(wide[:, :, ::2].clone(), w, m, path="reference"))


def test_exact_under_autocast_and_lowered_precision(draw):
    # bfloat16 holds 8 bits: without care, a user's autocast would round the sums.
    m, x, w = multiplier("mul8s_1L2J"), draw(2, 64, 6, 6), draw(8, 64, 3, 3)
    law = conv2d(x, w, m, path="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv2d(x, w, m, path="factored"), law)
        assert torch.equal(matmul(x[:, 0, 0], x[0, :6, 0], m), matmul(x[:, 0, 0], x[0, :6, 0], m, path="reference"))


def test_lowered_float32_precision_is_noticed():
    # In a process of its own: the switch is global, and some torch versions do not take it back.
    import subprocess
    import sys

    # sign(a) (3 b + 1) needs nine bits in one factor: bfloat16, which torch then uses, would round it.
    code = """
import torch
torch.set_float32_matmul_precision("medium")
from axmoe_lite import Multiplier, matmul
value = torch.arange(-128, 128)
m = Multiplier("wide", value.sign()[:, None] * (3 * value + 1)[None, :])
a = torch.randint(-128, 128, (256, 576)); b = torch.randint(-128, 128, (576, 256))
assert torch.equal(matmul(a, b, m, path="factored"), matmul(a, b, m, path="reference"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_thread_counts_do_not_matter(draw):
    a, b, m = draw(60, 700), draw(700, 30), multiplier("mul8s_1KVQ")
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(matmul(a, b, m))
    torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_a_high_rank_table_takes_the_law():
    m = random_table(40, 3)
    a, b = torch.tensor([[5, -7]]), torch.tensor([[3], [2]])
    assert matmul(a, b, m).item() == m(5, 3) + m(-7, 2)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "a,b,problem",
    [
        (torch.zeros(2, 3), torch.zeros(3, 1, dtype=torch.int8), "a is torch.float32.*Quantise first"),
        (torch.full((2, 3), 128), torch.zeros(3, 1, dtype=torch.int8), r"a runs from 128 to 128.*-128\.\.127"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(4, 1, dtype=torch.int8), "columns of a must match"),
        (torch.zeros(3, dtype=torch.int8), torch.zeros(3, 1, dtype=torch.int8), "2 or more dimensions"),
        ([[1]], torch.zeros(1, 1, dtype=torch.int8), "list"),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.int8), "bool"),
    ],
)
def test_matmul_refuses(a, b, problem):
    with pytest.raises(ValueError, match=problem):
        matmul(a, b, multiplier(EXACT))


@pytest.mark.parametrize(
    "options,problem",
    [
        ({"groups": 4}, "groups = 4"),
        ({"padding": -1}, "padding is -1"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": (1, 2, 3)}, "stride is"),
        ({"dilation": 9}, "kernel is 19 pixels high"),
        ({"path": "fast"}, "'fast'.*'auto'"),
    ],
)
def test_conv2d_refuses(options, problem, draw):
    with pytest.raises(ValueError, match=problem):
        conv2d(draw(1, 3, 6, 6), draw(2, 3, 3, 3), multiplier(EXACT), **options)


def test_sums_that_could_leave_32_bits_are_refused(draw):
    huge = Multiplier("huge", torch.full((256, 256), 2**30))
    with pytest.raises(ValueError, match="32-bit accumulator"):
        matmul(draw(1, 2), draw(2, 1), huge)
    assert matmul(draw(1, 1), draw(1, 1), huge).item() == 2**30
    lowest = Multiplier("lowest", torch.full((256, 256), -(2**31), dtype=torch.int32))  # its magnitude wraps in int32
    with pytest.raises(ValueError, match="up to 2147483648"):
        matmul(draw(1, 1), draw(1, 1), lowest)


def test_factored_refuses_what_it_cannot_prove(draw):
    with pytest.raises(ValueError, match="use path='auto'"):
        matmul(draw(2, 3), draw(3, 2), random_table(20, 50), path="factored")

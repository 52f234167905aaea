"""Every path equals the law in every bit, on shapes that no tile divides and operands meant to break it."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axmoe_lite import EVOAPPROX, EXACT, Multiplier, conv2d, kernels, matmul, multiplier
from axmoe_lite.factors import HIGHEST_MINIMAL_RANK
from axmoe_lite.kernels import factored, lookup, reference
from axmoe_lite.multipliers import exact_table

evidence = pytest.mark.trust("law", "kernels: shapes and operands chosen to break them")

NAMES = [*EVOAPPROX, "drum(4)", "roba()", "roup(0,4)", "pr(1,2)", "swap:mul8s_1KXF", "broken_array(8,0,0)"]


def random_table(rank: int, largest: int, seed: int = 0) -> Multiplier:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-largest, largest + 1, (256, rank), generator=generator)
    return Multiplier("random", u @ torch.randint(-largest, largest + 1, (rank, 256), generator=generator))


# --------------------------------------------------------------------------------- the law itself


@pytest.mark.parametrize("path", ["reference", "factored", "lookup", "auto"])
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


# --------------------------------------------------------------------------------- the fast paths


@evidence
@pytest.mark.parametrize("path", ["factored", "lookup"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 23, 115), (115, 1, 2), (23, 115, 1)])
def test_matmul_is_the_law(path, name, shape, draw):
    m, k, n = shape
    a, b, found = draw(m, k), draw(k, n), multiplier(name)
    assert torch.equal(matmul(a, b, found, path=path), matmul(a, b, found, path="reference"))


OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (2, 1), "padding": (0, 3), "dilation": (2, 1)},
    {"groups": 3, "padding": 1},
    {"groups": 6, "padding": 2, "dilation": 2},
]


@evidence
@pytest.mark.parametrize("path", ["factored", "lookup"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_conv2d_is_the_law(path, name, options, draw):
    groups = options.get("groups", 1)
    x, w, m = draw(2, 6, 7, 9), draw(6, 6 // groups, 3, 2), multiplier(name)
    assert torch.equal(conv2d(x, w, m, path=path, **options), conv2d(x, w, m, path="reference", **options))


@evidence
@pytest.mark.parametrize("name", ["mul8s_1KV6", "mul8s_1KVA", "drum(4)"])
@pytest.mark.parametrize("channels", [113, 114, 230])
def test_fan_ins_around_the_chunk(name, channels, draw):
    # 9 * 113 = 1017 products fit a float32 chunk of 1024, 9 * 114 = 1026 do not.
    m = multiplier(name)
    for x in (torch.full((1, channels, 4, 3), -128, dtype=torch.int8), draw(1, channels, 4, 3)):
        w = torch.full((2, channels, 3, 3), -128, dtype=torch.int8)
        assert torch.equal(conv2d(x, w, m, path="factored"), conv2d(x, w, m, path="reference"))


@evidence
@pytest.mark.parametrize("fan_in", [1, 1024, 1025, 4608, 20_000])
def test_adversarial_operands(fan_in):
    alternating = torch.tensor([-128, 127], dtype=torch.int8).repeat(fan_in)[:fan_in]
    for a in (alternating, torch.full((fan_in,), -128, dtype=torch.int8), torch.full((fan_in,), 127, dtype=torch.int8)):
        for b in (alternating, torch.full((fan_in,), -128, dtype=torch.int8)):
            for name in ("mul8s_1KV6", "mul8s_1KVA", "roba()"):
                law = matmul(a[None], b[:, None], multiplier(name), path="reference")
                for path in ("factored", "lookup"):
                    assert torch.equal(matmul(a[None], b[:, None], multiplier(name), path=path), law)


@functools.cache
def table_of_rank(rank: int, largest: int, seed: int) -> Multiplier:
    """Few different ones: factors of a high rank take a while to find."""
    return random_table(rank, largest, seed)


RANKS = [1, 2, 3, 5, 6, 8, 17, 65, 255, 256]
FILLS = ["random", "all -128", "all 127", "alternating", "not negative", "zero"]


def filled(fill: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """int8 operands on which weaker arithmetic saturates, wraps or rounds."""
    values = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    constant = {"all -128": -128, "all 127": 127, "zero": 0}
    if fill in constant:
        return torch.full_like(values, constant[fill])
    if fill == "alternating":
        return torch.tensor([-128, 127], dtype=torch.int8).repeat(values.numel())[: values.numel()].view(shape)
    return values.clamp_min(0) if fill == "not negative" else values


def paths(m: Multiplier, fan_in: int, together: int) -> list[str]:
    possible = factored.possible(m, fan_in, together, torch.device("cpu"))
    return ["auto", "lookup"] + ["factored"] * possible


@evidence
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rank=st.sampled_from(RANKS),
    largest=st.sampled_from([1, 9, 100]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 115), st.integers(1, 9)),
    fills=st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS)),
    seed=st.integers(0, 2),
)
def test_products_with_random_tables(rank, largest, shape, fills, seed):
    m, (rows, fan_in, columns) = table_of_rank(rank, largest, seed), shape
    a, b = filled(fills[0], (rows, fan_in), seed), filled(fills[1], (fan_in, columns), seed + 1)
    law = matmul(a, b, m, path="reference")
    for path in paths(m, fan_in, 1):
        assert torch.equal(matmul(a, b, m, path=path), law), path


@st.composite
def convolutions(draw_from):
    """x [N, C, H, W], weight [O, c, KH, KW] and options that fit each other."""
    small = st.integers(1, 3)
    groups, per_group, out = draw_from(small), draw_from(st.integers(1, 5)), draw_from(small)
    kernel, dilation = draw_from(st.tuples(small, small)), draw_from(st.tuples(small, small))
    padding = draw_from(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [n + draw_from(st.integers(0, 6)) for n in least]
    options = {
        "stride": draw_from(st.tuples(small, small)), "padding": padding, "dilation": dilation, "groups": groups,
    }  # fmt: skip
    return (draw_from(small), groups * per_group, *size), (groups * out, per_group, *kernel), options


@evidence
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([*NAMES, "mitchell()"]),
    case=convolutions(),
    fills=st.tuples(st.sampled_from(FILLS), st.sampled_from(FILLS)),
    seed=st.integers(0, 2**31),
)
def test_convolutions_with_any_options(name, case, fills, seed):
    shape, kernel, options = case
    x, w, m = filled(fills[0], shape, seed), filled(fills[1], kernel, seed + 1), multiplier(name)
    law = conv2d(x, w, m, path="reference", **options)
    for path in paths(m, w[0].numel(), kernel[2] * kernel[3]):
        assert torch.equal(conv2d(x, w, m, path=path, **options), law), path


def convolutions_with_random_tables(fills: st.SearchStrategy):
    """A test over tables of all ranks, their errors at code 0 among them, and images of the given kinds."""

    @evidence
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        rank=st.sampled_from(RANKS),
        largest=st.sampled_from([1, 9, 100]),
        case=convolutions(),
        fill=fills,
        of_weight=st.sampled_from(FILLS),
        seed=st.integers(0, 2),
    )
    def check(rank, largest, case, fill, of_weight, seed):
        (shape, kernel, options), m = case, table_of_rank(rank, largest, seed)
        x, w = filled(fill, shape, seed), filled(of_weight, kernel, seed + 1)
        law = conv2d(x, w, m, path="reference", **options)
        for path in paths(m, w[0].numel(), kernel[2] * kernel[3]):
            assert torch.equal(conv2d(x, w, m, path=path, **options), law), path

    return check


test_signed_images_with_random_tables = convolutions_with_random_tables(st.sampled_from(["all -128", "alternating"]))
test_unsigned_images_with_random_tables = convolutions_with_random_tables(
    st.sampled_from(["not negative", "all 127", "zero"])
)


@evidence
@pytest.mark.parametrize("path", ["auto", "factored", "lookup", "reference"])
@pytest.mark.parametrize("name", ["mul8s_1L2J", "mul8s_1KVA", "roba()"])
@pytest.mark.parametrize("batch", [(1,), (3,), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 23, 1), (5, 115, 3)])
def test_batches_of_products_are_products(path, name, batch, shape, draw):
    (rows, fan_in, columns), m = shape, multiplier(name)
    a, b = draw(*batch, rows, fan_in), draw(*batch, columns, fan_in).mT  # b turned, as keys are in attention
    found = matmul(a, b, m, path=path)
    assert found.shape == (*batch, rows, columns) and found.dtype == torch.int32
    pairs = zip(a.flatten(0, -3), b.flatten(0, -3), found.flatten(0, -3), strict=True)
    assert all(torch.equal(y, matmul(x, w, m, path="reference")) for x, w, y in pairs)


@evidence
@pytest.mark.parametrize("path", ["auto", "factored", "lookup"])
def test_batches_of_long_sums(path):
    # 2,000 products of 127 * 127 are 32,258,000, beyond 2^24: a batch is cut, or multiplied pair by pair.
    a = torch.full((2, 3, 2000), 127, dtype=torch.int8)
    a[1, 2, 0] = 126
    found = matmul(a, a.mT, multiplier(EXACT), path=path)
    assert found[0].unique().tolist() == [32_258_000]
    assert found[1, 2].tolist() == [32_258_000 - 127, 32_258_000 - 127, 32_258_000 - 127 * 127 + 126 * 126]


@evidence
@pytest.mark.parametrize("path", ["auto", "factored", "lookup", "reference"])
@pytest.mark.parametrize("shapes", [((0, 3), (3, 2)), ((2, 0), (0, 3)), ((0, 2, 3), (0, 3, 1)), ((4, 2, 0), (4, 0, 3))])
def test_products_of_nothing(path, shapes):
    a, b = (torch.zeros(shape, dtype=torch.int8) for shape in shapes)
    found = matmul(a, b, multiplier("mul8s_1KVA"), path=path)
    assert found.shape == (*a.shape[:-1], b.shape[-1]) and found.dtype == torch.int32 and not found.any()


def taken(monkeypatch, call) -> set[str]:
    """Which of the two fast paths a call takes."""
    seen = set()

    def watch(name, product):
        def watched(*args, **options):
            seen.add(name)
            return product(*args, **options)

        return watched

    with monkeypatch.context() as patch:
        for name, path in (("factored", factored), ("lookup", lookup)):
            for kind in ("matmul", "conv2d"):
                patch.setattr(path, kind, watch(name, getattr(path, kind)))
        call()
    return seen


@pytest.mark.parametrize("crossover,path", [(7, "lookup"), (8, "factored"), (9, "factored")])
def test_ranks_above_the_crossover_are_looked_up(crossover, path, draw, monkeypatch):
    m, a, b = table_of_rank(8, 9, 0), draw(2, 23), draw(23, 3)
    assert factored.rank(m) == 8
    monkeypatch.setattr(kernels, "crossover_rank", lambda arithmetic: crossover)
    found = []
    assert taken(monkeypatch, lambda: found.append(matmul(a, b, m))) == {path}
    assert torch.equal(found[0], matmul(a, b, m, path="reference"))
    x, w = draw(1, 3, 5, 5), draw(2, 3, 3, 3)
    assert taken(monkeypatch, lambda: found.append(conv2d(x, w, m))) == {path}
    assert torch.equal(found[1], conv2d(x, w, m, path="reference"))


def test_circuits_of_low_rank_need_no_measurement(draw, monkeypatch):
    def refuse(arithmetic):
        raise AssertionError("measured")

    monkeypatch.setattr(kernels, "crossover_rank", refuse)
    a, b = draw(2, 23), draw(23, 3)
    for name in EVOAPPROX:
        assert taken(monkeypatch, lambda name=name: matmul(a, b, multiplier(name))) == {"factored"}


def test_the_crossover_is_measured_once():
    assert kernels.ALWAYS_FACTORED <= kernels.crossover_rank("int8") <= HIGHEST_MINIMAL_RANK


@evidence
def test_padding_goes_through_the_table(draw):
    # M(0, b) = b: every padded pixel adds its weight. Fast paths that pad with a factor of 0 miss that.
    m = Multiplier("errs at zero", exact_table() + torch.arange(-128, 128, dtype=torch.int32)[None, :])
    x, w = torch.zeros(1, 1, 1, 1, dtype=torch.int8), draw(1, 1, 3, 3)
    assert conv2d(x, w, m, padding=1, path="reference").item() == w.int().sum()
    x, w = draw(2, 4, 5, 5), draw(2, 2, 3, 3)
    fast = conv2d(x, w, m, padding=1, groups=2, path="factored")
    assert torch.equal(fast, conv2d(x, w, m, padding=1, groups=2, path="reference"))


@evidence
def test_channels_last_and_strided_inputs(draw):
    m, x, w = multiplier("mul8s_1KVA"), draw(2, 6, 10, 8), draw(4, 6, 3, 3)
    law = conv2d(x, w, m, path="reference")
    assert torch.equal(conv2d(x.contiguous(memory_format=torch.channels_last), w, m), law)
    wide = draw(2, 6, 20, 8)
    assert torch.equal(conv2d(wide[:, :, ::2], w, m), conv2d(wide[:, :, ::2].clone(), w, m, path="reference"))


@evidence
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
        (
            torch.zeros(2, 3, 4, dtype=torch.int8),
            torch.zeros(3, 4, 1, dtype=torch.int8),
            "before them must be the same",
        ),
        (torch.zeros(2, 3, 4, dtype=torch.int8), torch.zeros(4, 1, dtype=torch.int8), "before them must be the same"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int8), torch.zeros(2, 1, 4, 1, dtype=torch.int8), r"a is \[1, 2, 3, 4\]"),
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

"""Looking products up, in all three ways: the law's bits on odd shapes, on tables and operands meant to break them."""

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axmoe_lite.kernels import lookup, reference

evidence = pytest.mark.trust("law", "looking up: tables and operands chosen to break it")

PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
POSSIBLE = [name for name in lookup.BACKENDS if name not in lookup._obstacles()]


@pytest.fixture(params=lookup.BACKENDS)
def backend(request, monkeypatch):
    if request.param not in POSSIBLE:
        pytest.skip(f"{request.param}: {lookup._obstacles()[request.param]}")
    monkeypatch.setenv(lookup.SWITCH, request.param)
    return request.param


def random_table(rank: int = 256, largest: int = 11, seed: int = 0) -> torch.Tensor:
    """Entries up to rank * largest^2 in magnitude: 2 * 11^2 * 256 = 61,952 spans 16 bits, 12^2 does not."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-largest, largest + 1, (256, rank), generator=generator)
    return (u @ torch.randint(-largest, largest + 1, (rank, 256), generator=generator)).int()


def agree(a: torch.Tensor, b: torch.Tensor, table: torch.Tensor) -> bool:
    found = lookup.matmul(a, b, table)
    return found.dtype == torch.int32 and torch.equal(found, reference.matmul(a, b, table))


def conv_agrees(x: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, **options) -> bool:
    options = PLAIN | options
    found = lookup.conv2d(x, weight, table, **options)
    return found.dtype == torch.int32 and torch.equal(found, reference.conv2d(x, weight, table, **options))


# ------------------------------------------------------------------------------------ every backend


def test_sentinels_prove_which_operand_is_the_row(backend):
    # A table of zeros with two planted values: M(127, 0) = 3 and M(0, 127) = 5. a is the row.
    table = torch.zeros(256, 256, dtype=torch.int32)
    table[127 + 128, 0 + 128], table[0 + 128, 127 + 128] = 3, 5
    high, low = torch.tensor([[127]], dtype=torch.int8), torch.tensor([[0]], dtype=torch.int8)
    assert (lookup.matmul(high, low, table).item(), lookup.matmul(low, high, table).item()) == (3, 5)
    # The same with the longer side second, where the compiled ways exchange the operands.
    assert lookup.matmul(high, low.expand(1, 300), table).tolist() == [[3] * 300]
    assert lookup.matmul(low, high.expand(1, 300), table).tolist() == [[5] * 300]
    assert lookup.conv2d(high[None, None], low[None, None], table, **PLAIN).item() == 3
    assert lookup.conv2d(low[None, None], high[None, None], table, **PLAIN).item() == 5


@evidence
def test_every_entry_is_found(backend):
    # All 65,536 pairs, one product each.
    operands = torch.arange(-128, 128).to(torch.int8)
    table = torch.arange(65536, dtype=torch.int32).view(256, 256) - 40_000
    assert torch.equal(lookup.matmul(operands[:, None], operands[None, :], table), table)
    assert torch.equal(lookup.matmul(operands[128:, None], operands[None, :], table), table[128:])


@evidence
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 23, 115), (115, 1, 2), (23, 115, 1), (300, 23, 17), (261, 2, 33)])
@pytest.mark.parametrize("least", [-128, -1, 0], ids=["signed", "barely_signed", "positive"])
def test_matmul_is_the_law(backend, shape, least, draw):
    m, k, n = shape
    assert agree(draw(m, k).clamp(min=least), draw(k, n), random_table())


@evidence
@pytest.mark.parametrize("m,k,n", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
def test_matmul_of_nothing(backend, m, k, n):
    a, b = torch.zeros(m, k, dtype=torch.int8), torch.zeros(k, n, dtype=torch.int8)
    assert agree(a, b, random_table() + 1)


OPTIONS = [
    {},
    {"padding": (1, 1)},
    {"stride": (2, 2), "padding": (1, 1)},
    {"stride": (2, 1), "padding": (0, 3), "dilation": (2, 1)},
    {"stride": (3, 2), "padding": (5, 2), "dilation": (1, 3)},
    {"stride": (4, 5), "padding": (1, 0)},
    {"padding": (9, 9), "stride": (1, 3)},
    {"groups": 3, "padding": (1, 1)},
    {"groups": 6, "padding": (2, 2), "dilation": (2, 2)},
]


@evidence
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)], ids=str)
def test_conv2d_is_the_law(backend, options, kernel, draw):
    x, weight = draw(3, 6, 11, 13), draw(12, 6 // options.get("groups", 1), *kernel)
    assert conv_agrees(x, weight, random_table(), **options)
    assert conv_agrees(x.clamp(min=0), weight, random_table(), **options)
    assert conv_agrees(x.clamp(min=-1), weight, random_table(), **options)


@evidence
def test_convolutions_wide_enough_for_tiles(backend, draw):
    # 17 outputs in one group are a tile and one more; 23 x 23 positions are two panels and a rest.
    assert conv_agrees(draw(1, 4, 23, 23), draw(17, 4, 3, 3), random_table(), padding=(1, 1))
    assert conv_agrees(draw(2, 4, 23, 23), draw(34, 2, 3, 3), random_table(), groups=2, stride=(1, 2))
    assert conv_agrees(draw(1, 4, 23, 23), draw(4, 1, 3, 3), random_table(), groups=4)


@evidence
def test_images_in_several_parts(backend, draw, monkeypatch):
    monkeypatch.setattr(lookup, "TEMPORARY", 20_000)
    for batch in (1, 2, 7):  # 7 images in parts of a few, and a smaller part at the end
        assert conv_agrees(draw(batch, 3, 9, 8), draw(5, 3, 3, 3), random_table(), padding=(1, 1), stride=(2, 1))


def test_padding_goes_through_the_table(backend, draw):
    # M(0, b) = b: every padded pixel adds its weight.
    table = torch.arange(-128, 128, dtype=torch.int32).expand(256, 256)
    x, weight = torch.zeros(1, 1, 1, 1, dtype=torch.int8), draw(1, 1, 3, 3)
    assert lookup.conv2d(x, weight, table, **PLAIN | {"padding": (1, 1)}).item() == weight.int().sum()
    assert conv_agrees(draw(2, 2, 5, 5), draw(3, 2, 3, 3), table, padding=(2, 2))


@evidence
def test_any_layout_of_the_operands(backend, draw):
    table = random_table()
    x, weight = draw(2, 6, 20, 8), draw(4, 6, 3, 3)
    assert conv_agrees(x.contiguous(memory_format=torch.channels_last), weight, table, padding=(1, 1))
    assert conv_agrees(x[:, :, 1::2].flip(3), weight.transpose(2, 3), table)
    assert conv_agrees(x[1:, 2:, ::2, 1:], weight[:, 1:5], table)
    a, b = draw(40, 90).T[::3], draw(80, 15)[::2, ::3]  # [30, 40] and [40, 5]
    assert agree(a, b, table)
    assert agree(draw(1, 40).expand(7, 40), b, table.T)


@evidence
@pytest.mark.parametrize("fan_in", [1, 2, 255, 256, 257, 513, 20_000])
def test_adversarial_operands(backend, fan_in):
    alternating = torch.tensor([-128, 127], dtype=torch.int8).repeat(fan_in)[:fan_in]
    lowest, highest = torch.full((fan_in,), -128, dtype=torch.int8), torch.full((fan_in,), 127, dtype=torch.int8)
    # Rows that reach from 0 to 65,535: both bytes at their largest, for all products or for every second.
    extremes = torch.zeros(256, 256, dtype=torch.int32)
    extremes[255] = 65_535
    for table in (extremes, extremes - 40_000, extremes.flip(0)):
        a = torch.stack([alternating, lowest, highest])
        assert agree(a, torch.stack([alternating, lowest], dim=1), table)
        assert agree(highest[None], lowest[:, None], table)


@evidence
@pytest.mark.parametrize("largest", [2**15 - 1, 2**15, 2**19, 2**20, 2**24, 2**30], ids=str)
def test_entries_of_any_size(backend, largest, draw):
    # Entries around 2^15 need 16 or 17 bits, 32 products of 2^19 are 2^24, all sums stay below 2^31. Three in
    # four are positive, so that sums grow, and some odd, so that rounding would show.
    fan_in = min(70, (2**31 - 1) // largest)
    size = largest - random_table(seed=1).abs() % 2
    table = torch.where(torch.rand(256, 256, generator=torch.Generator().manual_seed(2)) < 0.75, size, -size).int()
    assert agree(draw(300, fan_in), draw(fan_in, 3), table)
    assert agree(draw(5, fan_in), draw(fan_in, 3), table)  # too few for tiles
    if fan_in >= 4:
        assert conv_agrees(draw(1, 1, 17, 17), draw(4, 1, 2, 2), table)


def test_the_lowest_32_bit_entry(backend):
    table = torch.full((256, 256), -(2**31), dtype=torch.int32)
    one = torch.zeros(1, 1, dtype=torch.int8)
    assert lookup.matmul(one, one, table).item() == -(2**31)


@evidence
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(POSSIBLE),
    rank=st.integers(1, 256),
    largest=st.sampled_from([1, 9, 11, 100, 300]),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20)),
    least=st.sampled_from([-128, 0]),
    seed=st.integers(0, 2**31),
)
def test_random_products(name, rank, largest, shape, least, seed):
    generator = torch.Generator().manual_seed(seed)
    (m, k, n), table = shape, random_table(rank, largest, seed)
    a = torch.randint(least, 128, (m, k), generator=generator).to(torch.int8)
    b = torch.randint(-128, 128, (k, n), generator=generator).to(torch.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(lookup.SWITCH, name)
        assert agree(a, b, table)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@evidence
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(POSSIBLE),
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=st.integers(0, 2**31),
)
def test_random_convolutions(name, size, channels, kernel, stride, dilation, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    groups, per_group, outputs = channels
    x = torch.randint(-128, 128, (2, groups * per_group, *size), generator=generator).to(torch.int8)
    weight = torch.randint(-128, 128, (groups * outputs, per_group, *kernel), generator=generator).to(torch.int8)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(lookup.SWITCH, name)
        assert conv_agrees(x, weight, random_table(seed=seed), **options)


def test_thread_counts_do_not_matter(backend, draw, monkeypatch):
    monkeypatch.setattr(lookup, "WORTH_A_THREAD", 1000)
    operands = [(draw(700, 60), draw(60, 30)), (draw(1, 60), draw(60, 1030)), (draw(300, 3), draw(3, 5))]
    x, weight = draw(3, 4, 20, 20), draw(6, 2, 3, 3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert all(agree(a, b, random_table()) for a, b in operands)
            assert conv_agrees(x, weight, random_table(), groups=2, padding=(1, 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif("loop" not in POSSIBLE, reason="compiled loops need numba")
def test_torch_keeps_the_number_of_threads_it_had():
    code = """
import torch
torch.set_num_threads(1)
from axmoe_lite.kernels import lookup
a, table = torch.zeros(3000, 200, dtype=torch.int8), torch.zeros(256, 256, dtype=torch.int32)
lookup.matmul(a, a[:200], table)
print(torch.get_num_threads())
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["1"]


# ------------------------------------------------------------------------------------------ memory


def test_a_table_that_changes_is_noticed(backend, draw):
    table, a, b = random_table(), draw(5, 4), draw(4, 3)
    for _ in range(3):
        assert agree(a, b, table)
        table += 1  # the same address, other products
    for seed in range(5):
        assert agree(a, b, random_table(seed=seed))  # perhaps the address of the one before


def test_few_tables_are_remembered(backend, draw):
    for seed in range(70):
        lookup.matmul(draw(2, 2), draw(2, 2), random_table(rank=1, seed=seed))
    assert len(lookup._remembered) <= 64


def test_memory_stays_far_below_the_number_of_products(backend):
    # 8192 x 576 x 64 products are 302 MB if each took one byte; operands and result together take 7 MB.
    code = """
import resource, torch
from axmoe_lite.kernels import lookup
table = torch.arange(65536, dtype=torch.int32).view(256, 256)
a, b = torch.zeros(8192, 576, dtype=torch.int8), torch.zeros(576, 64, dtype=torch.int8)
x, w = torch.zeros(64, 64, 16, 16, dtype=torch.int8), torch.zeros(64, 64, 3, 3, dtype=torch.int8)
options = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
lookup.matmul(a[:300], b, table), lookup.conv2d(x[:2], w, table, **options)  # compiled, and all libraries loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lookup.matmul(a, b, table), lookup.conv2d(x, w, table, **options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 64 * 1024
    assert done.stderr == ""


# ------------------------------------------------------------------------------------ which backend


@pytest.fixture
def anew(monkeypatch):
    """Forget which backend was chosen, before and after."""
    monkeypatch.delenv(lookup.SWITCH, raising=False)
    lookup._choose.cache_clear(), lookup._obstacles.cache_clear()
    yield
    lookup._choose.cache_clear(), lookup._obstacles.cache_clear()


def test_the_fastest_backend_is_taken_and_named_once(anew, caplog, draw):
    caplog.set_level(logging.INFO, "axmoe_lite")
    assert lookup.backend() == POSSIBLE[0]
    for _ in range(3):
        lookup.matmul(draw(2, 3), draw(3, 2), random_table())
    (record,) = caplog.records
    assert record.levelno == logging.INFO and repr(POSSIBLE[0]) in record.getMessage()


def test_without_numba_torch_does_it(anew, caplog, draw, monkeypatch):
    caplog.set_level(logging.INFO, "axmoe_lite")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert lookup.backend() == "torch"
    assert "numba cannot be imported" in caplog.text
    assert agree(draw(3, 4), draw(4, 5), random_table())
    monkeypatch.setenv(lookup.SWITCH, "loop")
    with pytest.raises(
        ValueError, match="AXMOE_LOOKUP is 'loop', which cannot run here: numba.*Possible here: 'torch'"
    ):
        lookup.matmul(draw(3, 4), draw(4, 5), random_table())


def test_an_older_cpu_takes_the_loop(anew, caplog, monkeypatch):
    pytest.importorskip("numba")
    caplog.set_level(logging.INFO, "axmoe_lite")
    monkeypatch.setattr(lookup._compiled(), "obstacle", lambda: "this CPU has no avx512vbmi")
    assert lookup.backend() == "loop"
    assert "not 'permute': this CPU has no avx512vbmi" in caplog.text


@pytest.mark.skipif("loop" not in POSSIBLE, reason="compiled loops need numba")
def test_a_compiled_backend_that_errs_is_not_used(anew, draw, monkeypatch):
    # One lane of the compiled result is off by one: seen at first use, with one warning for each that errs.
    compiled = lookup._compiled()
    run = compiled.run

    def errs(loop, tasks, *arguments):
        run(loop, tasks, *arguments)
        if loop is not compiled.transpose:
            arguments[10][0, 0] += 1  # out

    monkeypatch.setattr(compiled, "run", errs)
    with pytest.warns(UserWarning, match="differs from the law") as told:
        assert lookup.backend() == "torch"
    assert len(told) == len(POSSIBLE) - 1
    assert agree(draw(3, 4), draw(4, 5), random_table())


def test_an_unknown_backend_is_refused(anew, draw, monkeypatch):
    monkeypatch.setenv(lookup.SWITCH, "gather")
    with pytest.raises(ValueError, match="'gather'.*'permute', 'loop', 'torch'"):
        lookup.backend()


def test_import_is_light():
    code = "import sys, threading, axmoe_lite.kernels.lookup; print('numba' in sys.modules, threading.active_count())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"] and done.stderr == ""


@pytest.mark.skipif("loop" not in POSSIBLE, reason="compiled loops need numba")
def test_a_second_process_does_not_compile_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(lookup.SWITCH, "loop")
    code = """
import torch
from axmoe_lite.kernels import lookup
a, table = torch.zeros(300, 2, dtype=torch.int8), torch.zeros(256, 256, dtype=torch.int32)
lookup.matmul(a, a[:2], table)
"""
    run = [sys.executable, "-W", "error", "-c", code]
    written = []
    for _ in range(2):
        subprocess.run(run, check=True)
        written.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbc")})
    assert written[0] and written[0] == written[1]

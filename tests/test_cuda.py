"""The two paths for GPUs equal the law in every bit: tested without one, and again on one where there is one.

kernels/cuda.py is ordinary torch and runs here on the CPU, under a stand-in for torch._int_mm that refuses
what a GPU's would. kernels/triton.py runs in Triton's interpreter, in a process of its own, for the choice
is made when Triton is imported: `TRITON_INTERPRET=1 pytest tests/test_cuda.py -k lookup` by hand.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from axmoe_lite import EVOAPPROX, Multiplier, multiplier
from axmoe_lite.factors import factorise
from axmoe_lite.kernels import cuda, reference
from axmoe_lite.kernels import triton as lookup
from axmoe_lite.multipliers import exact_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = list(EVOAPPROX)  # whose factors are masked operands; those of DRUM, RoBA and the like leave int8
SHAPES = [(1, 1, 1), (2, 23, 115), (115, 1, 2), (23, 115, 1), (64, 64, 64)]
OPTIONS = [
    {},
    {"stride": (2, 2), "padding": (1, 1)},
    {"stride": (2, 1), "padding": (0, 3), "dilation": (2, 1)},
    {"groups": 3, "padding": (1, 1)},
    {"groups": 6, "padding": (2, 2), "dilation": (2, 2)},
]
PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
# Triton 3.9 announces a default of floating point, of which the kernel has none.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


@pytest.fixture
def device():
    """Where Triton runs in this process."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and Triton's interpreter runs in the process of another test")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def calls(monkeypatch):
    """torch._int_mm with a GPU's rules; the operands it was given."""
    seen, real = [], torch._int_mm

    def strict(left, right):
        (m, k), n = left.shape, right.shape[1]
        assert left.dtype == right.dtype == torch.int8
        assert m > 16 and k % 8 == 0 and n % 8 == 0 and k > 0 and n > 0, "torch refuses these sizes on a GPU"
        assert left.is_contiguous() and right.T.is_contiguous(), "cuBLASLt wants row-major times column-major"
        assert left.data_ptr() % 16 == 0 and right.data_ptr() % 16 == 0
        seen.append((left, right))
        return real(left, right)

    monkeypatch.setattr(torch, "_int_mm", strict)
    return seen


def terms(values, rows, axis):
    """The factors of int8 values, written down once more: rows [R, Q] looked up, R blocks along ``axis``."""
    return torch.cat([row.to(torch.int8)[values.long() + 128] for row in rows.long()], dim=axis)


def factored_image(x, weight, name, groups):
    """x [N, C, H, W] and weight [O, C / groups, KH, KW] with their terms in each group's channels."""
    factors = factorise(multiplier(name))
    left = torch.cat([terms(part, factors.u, 1) for part in x.chunk(groups, dim=1)], dim=1)
    return left, terms(weight, factors.v, 1)


def a_table(largest, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest, (256, 256), generator=generator, dtype=torch.int32)


# ----------------------------------------------------- products of int8 on tensor cores, on a CPU


@pytest.mark.parametrize("shape", [*SHAPES, (17, 16, 16), (33, 24, 8), (0, 3, 2), (3, 0, 2), (3, 2, 0), (2, 0, 0)])
def test_int8_matmul_is_exact(shape, draw, calls):
    m, k, n = shape
    a, b = draw(m, k), draw(k, n)
    assert torch.equal(cuda.matmul(a, b).long(), a.long() @ b.long())
    wide, tall = draw(m, 2 * k), draw(n, k)  # neither contiguous
    assert torch.equal(cuda.matmul(wide[:, ::2], tall.T).long(), wide[:, ::2].long() @ tall.T.long())
    assert len(calls) == (2 if m * k * n else 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_int8_factors_are_the_law(name, shape, draw, calls):
    (m, k, n), factors = shape, factorise(multiplier(name))
    a, b = draw(m, k), draw(k, n)
    product = cuda.matmul(terms(a, factors.u, 1), terms(b, factors.v, 0))
    assert torch.equal(product, reference.matmul(a, b, multiplier(name).table))


@pytest.mark.parametrize("block_bytes", [2**28, 4000, 1])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["mul8s_1KV6", "mul8s_1KVA", "mul8s_1KX5"])
def test_int8_conv2d_is_the_law(name, options, block_bytes, draw, calls):
    options = PLAIN | options
    x, w = draw(3, 6, 7, 9), draw(12, 6 // options["groups"], 3, 2)
    left, right = factored_image(x, w, name, options["groups"])
    law = reference.conv2d(x, w, multiplier(name).table, **options)
    assert torch.equal(cuda.conv2d(left, right, block_bytes=block_bytes, **options), law)
    last = left.contiguous(memory_format=torch.channels_last)
    assert torch.equal(cuda.conv2d(last, right.transpose(2, 3).clone().transpose(2, 3), **options), law)


def test_groups_are_multiplied_where_that_pays_and_summed_where_not(draw, calls):
    x = draw(2, 48, 5, 5)
    for groups, outputs, products in ((48, 48, 0), (2, 32, 2), (3, 6, 3), (12, 96, 12), (1, 2, 1)):
        w = draw(outputs, 48 // groups, 3, 3)
        calls.clear()
        found = cuda.conv2d(x, w, **PLAIN | {"groups": groups})
        assert torch.equal(found, reference.conv2d(x, w, exact_table(), **PLAIN | {"groups": groups}))
        assert len(calls) == products


def test_int8_blocks_stay_within_their_memory(draw, calls):
    # 40 * 40 patches of 9 * 32 bytes: 460,800 bytes an image, cut to products of at most 100,000.
    x, w = draw(3, 32, 40, 40), draw(16, 32, 3, 3)
    found = cuda.conv2d(x, w, **PLAIN | {"padding": (1, 1)}, block_bytes=100_000)
    assert torch.equal(found.double(), torch.nn.functional.conv2d(x.double(), w.double(), padding=1))
    assert max(left.numel() for left, _ in calls) <= 100_000 and len(calls) >= 3 * 5


def test_int8_sums_longer_than_an_int32_can_prove(calls):
    # Four parts of LONGEST products: + + - -. The sum of two leaves 32 bits, that of all four is known:
    # 2 LONGEST (128 * 128 - 128 * 127) = 256 LONGEST.
    assert cuda.LONGEST * 2**14 < 2**31 <= 2 * cuda.LONGEST * 2**14
    left = torch.full((2, 4 * cuda.LONGEST), -128, dtype=torch.int8)
    right = torch.full((4 * cuda.LONGEST, 1), -128, dtype=torch.int8)
    right[2 * cuda.LONGEST :] = 127
    assert cuda.matmul(left, right).tolist() == [[256 * cuda.LONGEST]] * 2
    assert [operand.shape[1] for operand, _ in calls] == [cuda.LONGEST] * 4


def test_int8_matrices_beyond_32_bit_indices_are_cut_by_rows(draw, calls, monkeypatch):
    monkeypatch.setattr(cuda, "MOST_CELLS", 3000)  # 23 columns are 32: 93 rows, of which two tiles of 32
    a, b = draw(200, 23), draw(23, 5)
    assert torch.equal(cuda.matmul(a, b).long(), a.long() @ b.long())
    assert [left.shape[0] for left, _ in calls] == [64, 64, 64, 32]


def test_int8_is_possible_exactly_where_factors_fit():
    assert all(cuda.possible(factorise(multiplier(name))) for name in EVOAPPROX)
    assert not any(cuda.possible(factorise(multiplier(name))) for name in ("roba()", "drum(4)", "pr(1,2)"))


def test_a_wrong_or_missing_int_mm_is_noticed(monkeypatch):
    assert cuda.available("cpu")
    assert cuda.available("cuda") or not torch.cuda.is_available()

    def saturating(left, right):
        return (left.int() @ right.int()).clamp(-(2**20), 2**20)

    def refusing(left, right):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    cuda._probed.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    with pytest.warns(UserWarning, match="differs from the law"):
        assert not cuda.available("cpu")
    cuda._probed.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", refusing)  # not there is no fault: nothing to warn of
    assert not cuda.available("cpu")
    cuda._probed.cache_clear()


EMPTY = [((0, 6, 7, 9), (4, 6, 3, 3)), ((2, 0, 7, 9), (4, 0, 3, 3)), ((2, 6, 7, 9), (0, 6, 3, 3))]


@pytest.mark.parametrize("x,w", EMPTY)
def test_int8_conv2d_of_nothing(x, w, draw):
    found = cuda.conv2d(draw(*x), draw(*w), **PLAIN)
    assert found.dtype == torch.int32 and found.shape == (x[0], w[0], 5, 7) and not found.any()


def test_int8_refuses(draw):
    with pytest.raises(ValueError, match=r"right is torch.int32.*int8 matrices"):
        cuda.matmul(draw(2, 3), draw(3, 2).int())
    with pytest.raises(ValueError, match="columns of left must match"):
        cuda.matmul(draw(2, 3), draw(4, 2))
    with pytest.raises(ValueError, match="groups = 2"):
        cuda.conv2d(draw(1, 3, 4, 4), draw(2, 3, 1, 1), **PLAIN | {"groups": 2})
    with pytest.raises(ValueError, match=r"left is torch.float32"):
        cuda.conv2d(draw(1, 3, 4, 4).float(), draw(2, 3, 1, 1), **PLAIN)
    with pytest.raises(ValueError, match="on meta"):
        cuda.matmul(draw(2, 3), draw(3, 2).to("meta"))


# ------------------------------------------------- any table, on a GPU or in Triton's interpreter


def test_lookup_sentinels_prove_which_operand_is_the_row(device):
    # A table of zeros with two planted values: M(127, 0) = 3 and M(0, 127) = 5. a is the row.
    table = torch.zeros(256, 256, dtype=torch.int32)
    table[127 + 128, 0 + 128], table[0 + 128, 127 + 128] = 3, 5
    high, zero = (torch.tensor([[v]], dtype=torch.int8, device=device) for v in (127, 0))
    assert lookup.matmul(high, zero, table).item() == 3 and lookup.matmul(zero, high, table).item() == 5
    high, zero = high[None, None], zero[None, None]
    assert lookup.conv2d(high, zero, table, **PLAIN).item() == 3
    assert lookup.conv2d(zero, high, table, **PLAIN).item() == 5


def test_lookup_is_tried_before_it_is_trusted(device, monkeypatch):
    lookup.true_to_the_law.cache_clear()
    assert lookup.true_to_the_law(torch.device(device))
    lookup.true_to_the_law.cache_clear()
    right = lookup.matmul
    monkeypatch.setattr(lookup, "matmul", lambda *operands: right(*operands) + 1)
    with pytest.warns(UserWarning, match="differs from the law"):
        assert not lookup.true_to_the_law(torch.device(device))
    lookup.true_to_the_law.cache_clear()


def test_lookup_reaches_every_entry(device):
    # One product of each pair, a along the rows: the result is the table itself, corners and signs included.
    operands = torch.arange(-128, 128).to(torch.int8).to(device)
    ends = (torch.full((256, 256), value) for value in (-(2**15) - 1, -(2**15), 2**15 - 1, 2**15, 2**31 - 1))
    for table in (a_table(2**15), a_table(2**31 - 1), *(end.int() for end in ends)):
        assert torch.equal(lookup.matmul(operands[:, None], operands[None, :], table).cpu(), table)


@pytest.mark.parametrize("largest", [2**15, 2**20])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_lookup_matmul_is_the_law(shape, largest, draw, device):
    (m, k, n), table = shape, a_table(largest)
    a, b = draw(m, 2 * k)[:, ::2], draw(n, k).T  # neither contiguous
    assert torch.equal(lookup.matmul(a.to(device), b.to(device), table).cpu(), reference.matmul(a, b, table))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lookup_conv2d_is_the_law(options, draw, device):
    # A random table errs at zero too: M(0, b) != 0, so that padding shows.
    options, table = PLAIN | options, a_table(2**15)
    x, w = draw(2, 6, 7, 9), draw(12, 6 // options["groups"], 3, 2)
    law = reference.conv2d(x, w, table, **options)
    assert torch.equal(lookup.conv2d(x.to(device), w.to(device), table, **options).cpu(), law)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(lookup.conv2d(x.to(device), w.to(device), table, **options).cpu(), law)


def test_lookup_padding_goes_through_the_table(device):
    # M(0, b) = b: every padded pixel adds its weight. One pixel of code 0 under a 3 x 3 kernel sees all nine.
    table = exact_table() + torch.arange(-128, 128, dtype=torch.int32)[None, :]
    x, w = torch.zeros(1, 1, 1, 1, dtype=torch.int8), torch.arange(9, dtype=torch.int8).view(1, 1, 3, 3)
    assert lookup.conv2d(x.to(device), w.to(device), table, **PLAIN | {"padding": (1, 1)}).item() == 36


def test_lookup_of_images_of_many_tiles(draw, device):
    # 2 * 33 * 35 pixels and 37 outputs divide into no tile.
    x, w, table = draw(2, 2, 35, 37), draw(37, 2, 3, 3), a_table(2**15)
    law = reference.conv2d(x, w, table, **PLAIN)
    assert torch.equal(lookup.conv2d(x.to(device), w.to(device), table, **PLAIN).cpu(), law)


@pytest.mark.parametrize("name", ["mul8s_1L2J", "mul8s_1KX5", "swap:mul8s_1KXF", "roba()"])
def test_lookup_of_named_multipliers(name, draw, device):
    a, b, table = draw(5, 23), draw(23, 9), multiplier(name).table
    assert torch.equal(lookup.matmul(a.to(device), b.to(device), table).cpu(), reference.matmul(a, b, table))


@pytest.mark.parametrize("x,w", EMPTY)
def test_lookup_conv2d_of_nothing(x, w, draw, device):
    found = lookup.conv2d(draw(*x).to(device), draw(*w).to(device), a_table(2**15), **PLAIN)
    assert found.dtype == torch.int32 and found.shape == (x[0], w[0], 5, 7) and not found.any()


def test_lookup_of_a_long_sum(device):
    # 20,000 * 128 * 128 = 327,680,000: within 32 bits, far beyond float32's integers.
    low = torch.full((1, 20_000), -128, dtype=torch.int8, device=device)
    assert lookup.matmul(low, low.T, exact_table()).item() == 20_000 * 2**14


def test_lookup_forgets_a_table_with_its_owner(device):
    one, before = torch.ones(1, 1, dtype=torch.int8, device=device), len(lookup._prepared)
    for value in range(3):  # a new table may lie where a dead one lay
        assert lookup.matmul(one, one, torch.full((256, 256), value)).item() == value
    assert len(lookup._prepared) <= before + 1


def test_lookup_tuning_tries_only_tiles_that_fit(draw, device):
    tried = []

    def bench(call, quantiles):
        call()
        tried.append(1)
        return [float(-len(tried))] * 3  # the last is the best

    kernel = lookup.tuned(lookup._compiled(), do_bench=bench)
    x, w, table = draw(2, 4, 6, 5), draw(10, 4, 3, 3), a_table(2**15)
    law = reference.conv2d(x, w, table, **PLAIN)
    lookup._kernel.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "_kernel", lambda: kernel)
        patch.setattr(lookup, "tile", lambda *shape: {})  # which is only for the interpreter
        for _ in range(2):
            assert torch.equal(lookup.conv2d(x.to(device), w.to(device), table, **PLAIN).cpu(), law)
    # Ten outputs fill a tile of 16: of 4, 8, 8 and 16, 16 that makes five trials, at the first call only.
    assert len(tried) == 5 and kernel.best_config.kwargs == {"BLOCK_O": 16, "BLOCK_P": 256}


def test_lookup_refuses(draw, device):
    x = draw(2, 3).to(device)
    with pytest.raises(ValueError, match=r"torch.int32.*int8 with 2 dimensions"):
        lookup.matmul(x, x.T.int(), exact_table())
    with pytest.raises(ValueError, match="columns of a must match"):
        lookup.matmul(x, x, exact_table())
    with pytest.raises(ValueError, match="256 x 256 integers"):
        lookup.matmul(x, x.T, exact_table().float())
    with pytest.raises(ValueError, match="groups = 2"):
        lookup.conv2d(x[None, None], x[None, None], exact_table(), **PLAIN | {"groups": 2})
    with pytest.raises(ValueError, match="Triton has no code for meta"):
        lookup.matmul(x.to("meta"), x.T.to("meta"), exact_table())


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_everything_about_lookup_in_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_lookup"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-3000:]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("bits", [16, 32])
def test_the_kernel_compiles_for_gpus(capability, bits, tmp_path, monkeypatch):
    # The compiler needs no GPU, only its name; what the module's docstring says of the code is looked up in it.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = lookup._compiled()
    types = dict.fromkeys(kernel.arg_names, "i32") | {"x": "*i8", "steps": "*i8", "table": f"*i{bits}", "out": "*i32"}
    types |= {"pixels": "i64", "out_area": "i64", "BLOCK_O": "constexpr", "BLOCK_P": "constexpr"}
    source = ASTSource(fn=kernel, signature=types, constexprs={"BLOCK_O": 32, "BLOCK_P": 128})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    gathers = [line for line in made.asm["ptx"].splitlines() if "ld.global" in line and "evict_last" in line]
    assert len(gathers) >= 32 and all(f".b{bits} " in line for line in gathers)
    assert made.metadata.shared <= 1024, "the caches' room for the table"
    layouts = [line for line in made.asm["ttgir"].splitlines() if f"!tt.ptr<i{bits}>, #" in line and "tt.load" in line]
    name = layouts[0].split(f"!tt.ptr<i{bits}>, ")[1].split(">")[0]
    layout = next(line for line in made.asm["ttgir"].splitlines() if line.startswith(f"{name} = "))
    assert "threadsPerWarp = [1, 32]" in layout, "a warp runs along the pixels of one output"


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_error_says_so(draw):
    assert not lookup.available("cpu")
    with pytest.raises(ImportError, match="pip install triton"):
        lookup.matmul(draw(1, 1), draw(1, 1), exact_table())


def test_importing_the_paths_imports_no_triton():
    code = "import sys, axmoe_lite.kernels.triton, axmoe_lite.kernels.cuda; print('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# ------------------------------------------------------------------------------------ a real GPU


@gpu
def test_gpu_int8_is_available_and_correct(draw):
    assert cuda.available("cuda")
    for m, k, n in [*SHAPES, (4096, 4608, 512), (17, 16, 16), (1, 20_000, 1)]:
        a, b = draw(m, k), draw(k, n)
        exact = (a.cuda().double() @ b.cuda().double()).int()  # 20,000 * 2^14 < 2^53
        with torch.autocast("cuda", torch.float16):
            assert torch.equal(cuda.matmul(a.cuda(), b.cuda()), exact)
    most = torch.full((64, cuda.LONGEST), -128, dtype=torch.int8, device="cuda")
    assert (cuda.matmul(most, most.T) == cuda.LONGEST * 2**14).all(), "tensor cores neither saturate nor round"


@gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gpu_int8_conv2d_is_the_law(name, options, draw):
    options = PLAIN | options
    x, w = draw(5, 24, 17, 15), draw(48, 24 // options["groups"], 3, 3)
    left, right = factored_image(x, w, name, options["groups"])
    law = reference.conv2d(x, w, multiplier(name).table, **options)
    for block_bytes in (2**28, 50_000):
        found = cuda.conv2d(left.cuda(), right.cuda(), block_bytes=block_bytes, **options)
        assert torch.equal(found.cpu(), law)


@gpu
@needs_triton
@pytest.mark.parametrize("shape", [(64, 64, 56), (512, 512, 7)])
def test_gpu_both_paths_agree_on_layers_of_a_network(shape, draw):
    channels, outputs, size = shape
    x, w, options = draw(16, channels, size, size), draw(outputs, channels, 3, 3), PLAIN | {"padding": (1, 1)}
    left, right = factored_image(x, w, "mul8s_1KVA", 1)
    by_factors = cuda.conv2d(left.cuda(), right.cuda(), **options)
    by_lookup = lookup.conv2d(x.cuda(), w.cuda(), multiplier("mul8s_1KVA").table, **options)
    assert torch.equal(by_factors, by_lookup)
    some = reference.conv2d(x[:1].cuda(), w[:4].cuda(), multiplier("mul8s_1KVA").table, **options)
    assert torch.equal(by_lookup[:1, :4], some)


@gpu
def test_gpu_int8_memory_is_bounded(draw):
    # All patches together: 64 * 56 * 56 * 2304 = 462 MB; allowed: image, result, 64 MB, and slack for cuBLAS.
    x, w = draw(64, 256, 56, 56).cuda(), draw(64, 256, 3, 3).cuda()
    options, image, result = PLAIN | {"padding": (1, 1)}, 64 * 58 * 58 * 256, 4 * 64 * 56 * 56 * 64
    cuda.conv2d(x[:1], w, **options)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cuda.conv2d(x, w, block_bytes=64 * 2**20, **options)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"int8 convolution: {peak / 2**20:.0f} MB at the peak beside its operands")
    assert peak < image + result + 64 * 2**20 + 32 * 2**20


@gpu
@needs_triton
def test_gpu_lookup_memory_is_the_result(draw):
    x, w, table = draw(64, 256, 56, 56).cuda(), draw(64, 256, 3, 3).cuda(), a_table(2**15)
    options, result = PLAIN | {"padding": (1, 1)}, 4 * 64 * 56 * 56 * 64
    lookup.conv2d(x, w, table, **options)  # tuning flushes the caches with a quarter of a GB of its own
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = lookup.conv2d(x, w, table, **options)
    peak = torch.cuda.max_memory_allocated() - before
    print(f"lookup convolution: {peak / 2**20:.0f} MB at the peak beside its operands")
    assert peak < result + 8 * 2**20 and found.shape == (64, 64, 56, 56)


@gpu
@needs_triton
def test_gpu_addresses_beyond_32_bits(draw):
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free GPU memory")
    # 2 * 32,769 * 32,769 = 2^31 + 131,074 codes; only the last lines of the image lie beyond 2^31.
    x = torch.zeros(1, 2, 32_769, 32_769, dtype=torch.int8, device="cuda")
    x[:, :, -3:] = draw(1, 2, 3, 32_769).cuda()
    w, table = draw(1, 2, 1, 1).cuda(), multiplier("mul8s_1L2J").table
    law = reference.conv2d(x[:, :, -3:], w, table, **PLAIN)
    assert torch.equal(lookup.conv2d(x, w, table, **PLAIN)[:, :, -3:], law)
    clear = torch.tensor(-2, dtype=torch.int8, device="cuda")  # L2J clears the lowest bit of both operands
    assert torch.equal(cuda.conv2d(x & clear, w & clear, **PLAIN)[:, :, -3:], law)


@gpu
@needs_triton
def test_gpu_more_tiles_than_one_side_of_a_grid(draw):
    # 70,000,000 pixels in tiles of at most 1,024: 68,360 programs, above the 65,535 of a grid's other sides.
    a, b, table = draw(70_000_000, 1).cuda(), draw(1, 1).cuda(), a_table(2**15)
    expected = table.cuda()[a[:, 0].long() + 128, b.int().item() + 128]
    assert torch.equal(lookup.matmul(a, b, table)[:, 0], expected)


@gpu
@needs_triton
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU")
def test_gpu_tensors_on_another_than_the_current_one(draw):
    a, b = draw(23, 115), draw(115, 5)
    m = Multiplier("random", a_table(2**15))
    assert torch.equal(lookup.matmul(a.to("cuda:1"), b.to("cuda:1"), m.table).cpu(), reference.matmul(a, b, m.table))
    assert torch.equal(cuda.matmul(a.to("cuda:1"), b.to("cuda:1")).cpu().long(), a.long() @ b.long())

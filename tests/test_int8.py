"""The int8 units hand out law (1) to the last bit, and are left alone where they would not."""

import os
import subprocess
import sys

import pytest
import torch

from axmoe_lite import EXACT, conv2d, kernels, matmul, multiplier
from axmoe_lite.kernels import factored, int8, reference

needs_units = pytest.mark.skipif(not int8.available(), reason="this processor's int8 units are not used")
evidence = pytest.mark.trust("law", "int8 units: shapes and sums that libraries get wrong")

TABLE = multiplier(EXACT).table


def features() -> set[str]:
    """What the processor says it can do, in Linux's words."""
    try:
        with open("/proc/cpuinfo") as lines:
            return set(next(line for line in lines if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()


def scaled(sums, scale, bias, *, axis=1):
    """Law (1): y = float32(sum) * scale[o] + bias[o], each step rounded to float32."""
    shape = [-1] + [1] * (sums.ndim - 1 - axis % sums.ndim)
    assert sums.dtype == torch.int32
    y = sums.float() * scale.view(shape)
    return y if bias is None else y + bias.view(shape)


def image_of(x, offset):
    """Codes as the units want them: unsigned bytes, channels last."""
    return (x.int() + offset).to(torch.uint8).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def numbers():
    """numbers(O): scales of both signs and of all sizes, and a bias."""
    generator = torch.Generator().manual_seed(3)

    def draw(out):
        size = 2.0 ** torch.randint(-20, 3, (out,), generator=generator)
        return torch.randn(out, generator=generator) * size, torch.randn(out, generator=generator) * 10

    return draw


# ------------------------------------------------------------------------------- convolutions

CONVOLUTIONS = [
    # N, C, H, W, O, kernel, options
    ((2, 6, 9, 7), 4, (3, 3), {"padding": (1, 1)}),
    ((1, 1, 1, 1), 1, (1, 1), {}),
    ((3, 23, 5, 2), 5, (1, 1), {}),
    ((1, 115, 3, 4), 2, (1, 1), {"stride": (2, 2)}),
    ((2, 5, 11, 10), 23, (3, 2), {"stride": (2, 1), "padding": (0, 3)}),
    ((2, 4, 12, 9), 6, (3, 3), {"dilation": (2, 3), "padding": (2, 1)}),
    ((2, 6, 8, 8), 9, (3, 3), {"groups": 3, "padding": (1, 1)}),
    ((2, 23, 7, 7), 23, (3, 3), {"groups": 23, "padding": (1, 1), "stride": (2, 2)}),  # depthwise
    ((1, 2, 6, 6), 4, (5, 5), {"groups": 2, "padding": (2, 2)}),
    ((5, 16, 8, 8), 1, (3, 3), {"padding": (1, 1)}),
]

MISTAKEN = [
    # x, O, kernel, options: results of one column and several rows, which oneDNN 3 gets wrong with or without tiles
    ((3, 8, 11, 3), 1, (3, 2), {"stride": (1, 2), "dilation": (2, 2)}),
    ((1, 5, 3, 1), 1, (3, 3), {"stride": (1, 3), "padding": (2, 2)}),
    ((2, 1, 9, 4), 2, (3, 2), {"stride": (1, 2), "dilation": (1, 2)}),
    ((1, 4, 1, 1), 12, (3, 3), {"stride": (1, 3), "padding": (2, 1), "groups": 4}),
    ((3, 4, 7, 4), 8, (3, 2), {"stride": (1, 3), "dilation": (2, 1), "groups": 4}),
    ((3, 20, 5, 1), 8, (3, 2), {"stride": (1, 1), "dilation": (1, 2), "padding": (1, 1), "groups": 4}),
    ((1, 1, 6, 1), 2, (2, 2), {"stride": (3, 3), "dilation": (2, 2), "padding": (1, 1)}),
    # results that see nothing but the border: cells at -1 and +1 of an image of one row, or one column
    ((3, 4, 1, 9), 4, (2, 3), {"stride": (2, 1), "dilation": (2, 1), "padding": (1, 0), "groups": 2}),
    ((3, 8, 3, 1), 8, (3, 2), {"stride": (3, 3), "dilation": (1, 2), "padding": (1, 1), "groups": 4}),
]


def operands(shape, out, kernel, options, offset, draw):
    defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    options = {**defaults, **options}
    x = draw(*shape).clamp_min(-offset)  # without a zero point no code is negative
    weight = draw(out, shape[1] // options["groups"], *kernel)
    return x, weight, options


@evidence
@needs_units
@pytest.mark.parametrize("case", CONVOLUTIONS + MISTAKEN, ids=str)
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("ceiling", [None, torch.inf, 6.0])
def test_convolutions_hand_out_the_law(case, offset, ceiling, draw, numbers):
    x, weight, options = operands(*case, offset, draw)
    scale, bias = numbers(len(weight))
    sums = reference.conv2d(x, weight, TABLE, **options)
    for b in (bias, None):
        packed = int8.PackedConv2d(weight, scale, b, offset, **options)
        y = scaled(sums, scale, b)
        y = y if ceiling is None else y.clamp(0, ceiling)
        found = packed(image_of(x, offset), ceiling=ceiling)
        assert found.dtype == torch.float32 and torch.equal(found, y)


@evidence
@needs_units
@pytest.mark.parametrize("case", CONVOLUTIONS + MISTAKEN, ids=str)
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("ceiling", [torch.inf, 6.0])
@pytest.mark.parametrize("code_scale", [0.1, 0.013, 1.0])
def test_codes_are_the_rounded_law(case, offset, ceiling, code_scale, draw, numbers):
    x, weight, options = operands(*case, offset, draw)
    _, bias = numbers(len(weight))
    fan_in = weight[0].numel()
    scale = torch.linspace(-1, 1, len(weight)) * 0.3 / fan_in**0.5 / 100 + 1e-4
    y = scaled(reference.conv2d(x, weight, TABLE, **options), scale, bias).clamp(0, ceiling)
    codes = (y * (1.0 / torch.tensor(code_scale))).round().clamp(0, 127)
    packed = int8.PackedConv2d(weight, scale, bias, offset, **options)
    found = packed(image_of(x, offset), ceiling=ceiling, code_scale=code_scale)
    assert found.dtype == torch.uint8 and torch.equal(found.int(), codes.int())


@needs_units
def test_codes_round_half_to_even():
    # One weight of 1 and scale 1/2: sums 0..127 become 0, 0.5, 1, 1.5, ...; in codes of scale 1 half of them tie.
    sums = torch.arange(128, dtype=torch.int8).view(1, 1, 1, 128)
    packed = int8.PackedConv2d(torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.tensor([0.5]), torch.zeros(1), 0)
    codes = packed(image_of(sums, 0), ceiling=torch.inf, code_scale=1.0).flatten()
    assert codes[:8].tolist() == [0, 0, 1, 2, 2, 2, 3, 4]
    assert torch.equal(codes.float(), (sums.flatten() / 2).round())


@needs_units
def test_codes_stop_at_127_and_at_the_ceiling():
    # Sums 0..127 of scale 2 in codes of scale 1 would be 0, 2, ..., 254; the ceiling 6 is code 6.
    sums = torch.arange(128, dtype=torch.int8).view(1, 1, 128, 1)
    packed = int8.PackedConv2d(torch.ones(1, 1, 1, 1, dtype=torch.int8), torch.tensor([2.0]), None, 0)
    for ceiling, most in ((torch.inf, 127), (6.0, 6)):
        codes = packed(image_of(sums, 0), ceiling=ceiling, code_scale=1.0).flatten().tolist()
        assert codes == [min(2 * n, most) for n in range(128)]


@evidence
@needs_units
@pytest.mark.parametrize("case", CONVOLUTIONS + MISTAKEN, ids=str)
@pytest.mark.parametrize("ceiling", [None, torch.inf])
def test_sums_are_added_in_place(case, ceiling, draw, numbers):
    x, weight, options = operands(*case, 128, draw)
    scale, bias = numbers(len(weight))
    y = scaled(reference.conv2d(x, weight, TABLE, **options), scale, bias)
    residual = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * y.abs().amax()
    target = residual.clone().contiguous(memory_format=torch.channels_last)
    found = int8.PackedConv2d(weight, scale, bias, 128, **options)(image_of(x, 128), add_to=target, ceiling=ceiling)
    law = y + residual
    assert torch.equal(found, law if ceiling is None else law.clamp(min=0))
    assert torch.equal(target, found)


@needs_units
def test_many_image_sizes_through_one_convolution(draw, numbers):
    # Prepared weights are kept for four sizes; all others, and the first again, are as right.
    weight, (scale, bias) = draw(3, 2, 3, 3), numbers(3)
    packed = int8.PackedConv2d(weight, scale, bias, 128, padding=(1, 1))
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    for shape in [(1, 2, 4, n) for n in (1, 2, 3, 5, 23, 115, 1, 2)] + [(7, 2, 4, 4)]:
        x = draw(*shape)
        assert torch.equal(packed(image_of(x, 128)), scaled(reference.conv2d(x, weight, TABLE, **options), scale, bias))
    assert len(packed._packed) <= 4


@evidence
@needs_units
@pytest.mark.parametrize("case", MISTAKEN, ids=str)
@pytest.mark.parametrize("offset", [0, 128])
def test_shapes_that_onednn_gets_wrong(case, offset, draw, numbers):
    x, weight, options = operands(*case, offset, draw)
    scale, bias = numbers(len(weight))
    y = scaled(reference.conv2d(x, weight, TABLE, **options), scale, bias)
    assert torch.equal(int8.PackedConv2d(weight, scale, bias, offset, **options)(image_of(x, offset)), y)


WIDE_BORDER = """
import torch
from axmoe_lite import conv2d, multiplier
g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randint(-128, 128, shape, generator=g).to(torch.int8)
for x, w, options in (
    (draw(1, 20, 1, 1), draw(8, 5, 1, 1), {"stride": 2, "padding": (0, 1), "groups": 4}),
    (draw(2, 3, 5, 1), draw(1, 3, 1, 1), {"stride": 3, "padding": (0, 2)}),
    (draw(2, 3, 5, 4), draw(2, 3, 2, 1), {"padding": (3, 2)}),
):
    for name in ("mul8s_1KV6", "mul8s_1L2J"):
        for image in (x, x.clamp_min(0)):
            fast = conv2d(image, w, multiplier(name), path="factored", **options)
            assert torch.equal(fast, conv2d(image, w, multiplier(name), path="reference", **options))
"""


def test_a_border_as_wide_as_the_kernel():
    # In a process of its own, because what went wrong was a segmentation fault.
    assert (
        subprocess.run([sys.executable, "-c", WIDE_BORDER], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    )


# ------------------------------------------------------------------------------ linear layers


@evidence
@needs_units
@pytest.mark.parametrize("shape", [(1, 1), (2, 23), (115, 1), (23, 115), (2, 3, 23), (1, 2, 5, 64), (1, 1, 1)])
@pytest.mark.parametrize("out", [1, 2, 23])
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("relu", [False, True])
def test_linear_layers_hand_out_the_law(shape, out, offset, relu, draw, numbers):
    x, weight, (scale, bias) = draw(*shape).clamp_min(-offset), draw(out, shape[-1]), numbers(out)
    sums = reference.matmul(x.flatten(0, -2), weight.T, TABLE).view(*shape[:-1], out)
    for b in (bias, None):
        y = scaled(sums, scale, b, axis=-1)
        found = int8.PackedLinear(weight, scale, b, offset)((x.int() + offset).to(torch.uint8), relu=relu)
        assert found.shape == y.shape and torch.equal(found, y.clamp(min=0) if relu else y)


# ------------------------------------------------------------------------------- large sums


@evidence
@needs_units
@pytest.mark.parametrize("a,b", [(127, 127), (127, -128), (126, 127), (1, -127)])
def test_sums_beyond_what_a_float32_holds_are_rounded_once(a, b):
    # 20,000 * 127 * 127 = 322,580,000; one product less is 322,563,871. Beyond 2^28 float32 has multiples of 32
    # only: y is made from the one nearest to the sum. Added up in float32 it would be another.
    fan_in = 20_000
    x, weight = torch.full((3, fan_in), a, dtype=torch.int8), torch.full((2, fan_in), b, dtype=torch.int8)
    x[1, 0], x[2, :7] = 0, 3
    weight[1, 1] = 5
    sums = (x.double() @ weight.double().T).to(torch.int32)
    assert sums[0, 0] == fan_in * a * b
    scale, bias = torch.tensor([1.0, -0.37]), torch.tensor([0.25, 3.0])
    y = scaled(sums, scale, bias)
    assert torch.equal(int8.PackedLinear(weight, scale, bias, 0)(x.view(torch.uint8)), y)
    packed = int8.PackedConv2d(weight.view(2, fan_in, 1, 1), scale, bias, 0)
    assert torch.equal(packed(image_of(x.view(3, fan_in, 1, 1), 0)).flatten(1), y)
    assert torch.equal(int8.matmul(x, weight.T), sums)


@needs_units
def test_fits_at_its_edge_and_is_exact_there():
    # 2^24 = 16,777,216 = 255 * 65,793 + 1, so sums of |weight| up to 65,793 fit: 518 * 127 + 7 = 65,793.
    weight = torch.tensor([127] * 518 + [7], dtype=torch.int8)[None]
    assert int(weight.int().sum()) == 65_793 and 255 * 65_793 == 2**24 - 1
    above = torch.tensor([127] * 518 + [8], dtype=torch.int8)[None]
    assert int8.fits(weight, 128) and int8.fits(-weight, 128) and not int8.fits(above, 128)
    assert int8.fits(above, 0), "without a zero point the units are exact without further proof"
    assert int8.fits(torch.cat([weight, weight]), 128) and not int8.fits(torch.cat([weight, above]), 128)
    lowest = torch.full((1, 514), -128, dtype=torch.int8)  # its magnitude, 128, is no int8; 514 * 128 = 65,792
    assert int8.fits(lowest, 128) and not int8.fits(torch.cat([lowest, lowest[:, :1]], 1), 128)
    for w in (weight, -weight, lowest, weight * torch.tensor([1, -1], dtype=torch.int8).repeat(260)[:519]):
        x = torch.randint(-128, 128, (9, w.shape[1]), generator=torch.Generator().manual_seed(0)).to(torch.int8)
        x[0], x[1], x[2] = 127, -128, torch.where(w[0] > 0, 127, -128)
        scale, bias = torch.tensor([0.731]), torch.tensor([-0.2])
        y = scaled((x.double() @ w.double().T).to(torch.int32), scale, bias)
        packed = int8.PackedConv2d(w.view(1, -1, 1, 1), scale, bias, 128)
        assert torch.equal(packed(image_of(x.view(*x.shape, 1, 1), 128)).flatten(1), y)
        assert torch.equal(int8.PackedLinear(w, scale, bias, 128)((x.int() + 128).to(torch.uint8)), y)


def test_images_whose_sums_do_not_fit_are_cut_into_channels_whose_sums_do(monkeypatch, draw):
    # 600 products of 127 * 127 with signed images: refused by fits(), equal all the same.
    x = torch.full((2, 600, 2, 3), 127, dtype=torch.int8)
    x[0, 0] = -1
    weight = torch.full((2, 600, 1, 1), 127, dtype=torch.int8)
    assert not int8.fits(weight, 128)
    law = conv2d(x, weight, multiplier(EXACT), path="reference")
    assert law[1, 0, 0, 0] == 600 * 127 * 127 and law[0, 0, 0, 0] == 599 * 127 * 127 - 127
    assert torch.equal(conv2d(x, weight, multiplier(EXACT), path="factored"), law)
    if int8.available():  # not even by the floats that hold such sums: they take ten times as long
        monkeypatch.setattr(factored, "_conv2d_in_floats", None)
    x, weight = draw(2, 130, 5, 4), draw(4, 65, 3, 3)
    for name in ("mul8s_1KVA", "signs:mul8s_1KVA"):
        law = conv2d(x, weight, multiplier(name), groups=2, path="reference")
        assert torch.equal(conv2d(x, weight, multiplier(name), groups=2, path="factored"), law)


# ------------------------------------------------------------------------------ plain products


@needs_units
@evidence
@pytest.mark.parametrize("m", [1, 2, 23])
@pytest.mark.parametrize("k", [1, 2, 115])
@pytest.mark.parametrize("n", [1, 2, 23])
def test_axes_of_one_and_every_layout(m, k, n, draw):
    # torch._int_mm reads the layout off the strides, and an axis of one may have any: such results stayed unwritten.
    a, b = draw(m, k), draw(k, n)
    law = reference.matmul(a, b, TABLE)
    for left in (a, a.T.contiguous().T, a.as_strided((m, k), (k, 1) if m > 1 else (1, 1)), draw(m, 2 * k)[:, ::2]):
        for right in (b, b.T.contiguous().T, b.as_strided((k, n), (n, 1) if k > 1 else (1, 1))):
            assert torch.equal(int8.matmul(left, right), reference.matmul(left, right, TABLE))
    assert torch.equal(int8.matmul(a, b), law)


def test_stale_memory_is_never_handed_out(draw):
    # An unwritten result would show what the allocator had there before.
    for m, k, n in [(1, 64, 64), (64, 1, 64), (64, 64, 1), (1, 1, 64), (1, 64, 1), (64, 1, 1)]:
        a, b = draw(m, k), draw(k, n)
        trash = torch.full((m, n), 123_456_789, dtype=torch.int32)
        del trash
        assert torch.equal(int8.matmul(a, b), reference.matmul(a, b, TABLE))


# ------------------------------------------------------------- whether the units are used at all

COMPARE = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    from axmoe_lite import approximate, conv2d, matmul, multiplier
    from axmoe_lite.kernels import int8
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randint(-128, 128, shape, generator=g).to(torch.int8)
    a, b, x, w = draw(37, 230), draw(230, 23), draw(2, 40, 9, 7), draw(6, 20, 3, 3)
    a[0], b[:, 0], x[0], w[0] = -128, -128, 127, -128
    for name in ("mul8s_1KV6", "mul8s_1KVA", "mul8s_1L2J"):
        m, options = multiplier(name), {"groups": 2, "padding": 1}
        for values in (a, a.clamp_min(0)):
            assert torch.equal(matmul(values, b, m, path="factored"), matmul(values, b, m, path="reference"))
        for image in (x, x.clamp_min(0)):
            law = conv2d(image, w, m, path="reference", **options)
            assert torch.equal(conv2d(image, w, m, path="factored", **options), law)
        conv = torch.nn.Conv2d(40, 5, 3, bias=False)
        net = approximate(torch.nn.Sequential(conv), {"0": name}, calibration=torch.randn(2, 40, 9, 7, generator=g))
        image = torch.randn(2, 40, 9, 7, generator=g)
        from axmoe_lite.quant import quantise, weight_scale
        s_w = weight_scale(conv.weight)
        codes = quantise(image, net[0].scale_x), quantise(conv.weight, s_w)
        law = conv2d(*codes, m, path="reference").float() * (net[0].scale_x * s_w)
        assert torch.equal(net(image), law)
    available = int8.available()
ours = [str(w.message) for w in said if "int8" in str(w.message)]
print(available, len(ours), *ours)
"""


def outside(**environment):
    """What COMPARE prints in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@pytest.mark.skipif("avx2" not in features(), reason="the processor has no AVX2 to be reduced to")
def test_units_that_saturate_are_refused_with_one_warning():
    # AVX2 adds pairs of products in 16 bits: 2 * 255 * 127 = 64,770 does not fit.
    said = outside(ONEDNN_MAX_CPU_ISA="AVX2")
    assert said.startswith("False 1 The int8 units of this processor are not used: a ")
    assert said.endswith("float32 takes their place; results are the same, slower.")


def test_the_switch_turns_the_units_off_silently():
    assert outside(AXMOE_INT8="0") == "False 0"


@pytest.mark.skipif("avx512_vnni" not in features(), reason="the processor has no AVX512-VNNI")
def test_vector_units_without_tiles_are_as_true():
    assert outside(ONEDNN_MAX_CPU_ISA="AVX512_CORE_VNNI") == "True 0"


def test_the_switch_is_looked_at_each_time(monkeypatch, draw):
    a, b, m = draw(5, 23), draw(23, 2), multiplier(EXACT)
    law = matmul(a, b, m, path="reference")
    before = int8.available()
    monkeypatch.setenv("AXMOE_INT8", "0")
    assert not int8.available() and torch.equal(kernels.matmul(a, b, m), law)
    monkeypatch.setenv("AXMOE_INT8", "1")
    assert int8.available() == before and torch.equal(kernels.matmul(a, b, m), law)

"""Every way to multiply against the law, on shapes, layouts, operands and tables that hypothesis draws.

The law is kernels.reference: index the table, add. Around it stands what a layer adds, written out in operands.py in
plain torch, sharing nothing with the code that it checks. Equal means in every bit, never close. Another
``--hypothesis-seed`` draws other cases. test_law_networks.py goes on with layers and what is made of them.
"""

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import (
    LIMIT,
    cheap,
    codes,
    codes_by_law,
    convolutions,
    dtypes,
    equal,
    few,
    fills,
    floats,
    generator,
    laid,
    largest_for,
    layouts,
    length,
    machine,
    machines,
    many,
    plain,
    scaled_by_law,
    seeds,
    table,
    tables,
)
from torch import nn

from axmoe_lite import conv2d, kernels, matmul, multiplier
from axmoe_lite.factors import Factors
from axmoe_lite.kernels import cuda, encode, factored, int8, lookup, reference
from axmoe_lite.kernels.products import ConvProduct, LinearProduct
from axmoe_lite.multipliers import Mosaic

CPU = torch.device("cpu")
POSSIBLE = [name for name in lookup.BACKENDS if name not in lookup._obstacles()]
integers = st.sampled_from([torch.int8, torch.int8, torch.int16, torch.int64])


def paths(m, fan_in, together):
    """The paths that can sum these products; the factored one refuses the others, which is checked too."""
    possible = factored.possible(m, fan_in, together, CPU)
    return ["auto", "lookup", *["factored"] * possible], possible


# ------------------------------------------------------------------------------------- kernels


@pytest.mark.trust("law", "matrix products on every path, in every layout")
@many(300)
@given(
    m=tables, shape=st.tuples(length, length, length), fill=st.tuples(fills, fills), seed=seeds,
    layout=st.tuples(layouts, layouts), dtype=integers,
)  # fmt: skip
def test_matrix_products(m, shape, fill, seed, layout, dtype):
    (rows, fan_in, columns) = shape
    a = laid(codes((rows, fan_in), fill[0], seed).to(dtype), layout[0])
    b = laid(codes((fan_in, columns), fill[1], seed + 1), layout[1])
    before = plain(a), plain(b)
    law = reference.matmul(before[0].to(torch.int8), before[1], m.table)
    possible, can = paths(m, fan_in, 1)
    for path in possible:
        assert equal(matmul(a, b, m, path=path), law), path
    assert torch.equal(a, before[0]) and torch.equal(b, before[1]), "operands are only read"
    if not can:
        with pytest.raises(ValueError, match="use path='auto'"):
            matmul(a, b, m, path="factored")


@pytest.mark.trust("law", "batches of matrix products, one pair after the other")
@many(250)
@given(
    m=st.one_of(tables, st.just(table("filter[mul8s_1KV6, roup(0,4)]"))),
    batch=st.sampled_from([(0,), (1,), (2,), (3,), (2, 1), (2, 2), (1, 3), (2, 0)]),
    shape=st.tuples(few, length), fill=st.tuples(fills, fills), seed=seeds, layout=st.tuples(layouts, layouts),
)  # fmt: skip
def test_batches_of_products(m, batch, shape, fill, seed, layout):
    (rows, fan_in), columns = shape, 2
    a = laid(codes((*batch, rows, fan_in), fill[0], seed), layout[0])
    b = laid(codes((*batch, fan_in, columns), fill[1], seed + 1).clamp_min(-127), layout[1])
    law = torch.zeros(*batch, rows, columns, dtype=torch.int32)
    for x, y, sums in zip(*(t.flatten(0, -3) for t in (a, b, law)), strict=True):
        sums.copy_(reference.matmul(plain(x), m.columns(plain(y).T).T, m.table))
    for path in ["auto", "lookup", "reference", *["factored"] * factored.possible(m, fan_in, 1, CPU)]:
        assert equal(matmul(a, b, m, path=path), law), path


@pytest.mark.trust("law", "convolutions on every path, with every option and layout")
@many(400)
@given(
    m=tables, case=convolutions(), fill=st.tuples(fills, fills), seed=seeds, layout=st.tuples(layouts, layouts),
    dtype=integers,
)  # fmt: skip
def test_convolutions(m, case, fill, seed, layout, dtype):
    shape, kernel, options = case
    x = laid(codes(shape, fill[0], seed).to(dtype), layout[0])
    w = laid(codes(kernel, fill[1], seed + 1), layout[1])
    before = plain(x), plain(w)
    law = reference.conv2d(before[0].to(torch.int8), before[1], m.table, **options)
    possible, can = paths(m, kernel[1] * kernel[2] * kernel[3], kernel[2] * kernel[3])
    for path in possible:
        assert equal(conv2d(x, w, m, path=path, **options), law), path
    assert torch.equal(x, before[0]) and torch.equal(w, before[1]), "operands are only read"
    if not can:
        with pytest.raises(ValueError, match="use path='auto'"):
            conv2d(x, w, m, path="factored", **options)


@pytest.mark.trust("law", "sums up to the last of 32 bits, and a refusal one product further")
@many(150)
@given(
    fan_in=st.sampled_from([1, 2, 3, 23, 115, 300]), shape=st.tuples(*[st.sampled_from([1, 2, 23])] * 2),
    fill=st.tuples(fills, fills), seed=seeds,
)  # fmt: skip
def test_sums_at_the_limit(fan_in, shape, fill, seed):
    m = largest_for(fan_in)
    a, b = codes((shape[0], fan_in), fill[0], seed), codes((fan_in, shape[1]), fill[1], seed + 1)
    law = reference.matmul(a, b, m.table)
    assert torch.equal(
        law.long(), m.table.long()[a.long() + 128][:, torch.arange(fan_in)[:, None], b.long() + 128].sum(1)
    )
    image, weight = a[:, :, None, None].expand(-1, -1, 1, 2), b.T[:, :, None, None]
    for path in paths(m, fan_in, 1)[0]:
        assert equal(matmul(a, b, m, path=path), law), path
        assert equal(conv2d(image, weight, m, path=path), law[:, :, None, None].expand(-1, -1, 1, 2)), path
    more = LIMIT // m.largest - fan_in + 1  # the first fan-in whose sums could leave 32 bits
    longer = torch.cat([a, a.new_zeros(len(a), more)], 1), torch.cat([b, b.new_zeros(more, b.shape[1])])
    for path in kernels.PATHS:
        with pytest.raises(ValueError, match="32-bit accumulator"):
            matmul(*longer, m, path=path)


@contextlib.contextmanager
def looked_up_by(name):
    """One of the three ways to look products up."""
    with mock.patch.dict(os.environ, {lookup.SWITCH: name}):
        yield


@pytest.mark.trust("law", "looking up: by permutation, by a loop, by embedding_bag")
@pytest.mark.parametrize("name", lookup.BACKENDS)
@many(150)
@given(
    size=st.sampled_from([3, 2**15, 2**16, 2**22, 2**30]), fill=st.tuples(fills, fills), seed=seeds,
    leaning=st.booleans(), sides=st.tuples(*[st.sampled_from([1, 2, 23, 115, 300])] * 3),
    layout=st.tuples(layouts, layouts),
)  # fmt: skip
def test_lookups(name, size, sides, fill, seed, layout, leaning):
    if name not in POSSIBLE:
        pytest.skip(f"{name}: {lookup._obstacles()[name]}")
    rows, columns, fan_in = (*sides[:2], min(sides[2], LIMIT // size))
    entries = torch.randint(-size, size + 1, (256, 256), generator=generator(seed), dtype=torch.int32)
    entries = entries.abs() if leaning else entries  # so that sums grow beyond what a float32 holds
    a, b = (
        laid(codes((rows, fan_in), fill[0], seed), layout[0]),
        laid(codes((fan_in, columns), fill[1], seed), layout[1]),
    )
    with looked_up_by(name):
        assert equal(lookup.matmul(a, b, entries), reference.matmul(plain(a), plain(b), entries))


@pytest.mark.trust("law", "looking up: convolutions by permutation, by a loop, by embedding_bag")
@pytest.mark.parametrize("name", lookup.BACKENDS)
@many(120)
@given(
    size=st.sampled_from([3, 2**15, 2**16, 2**19]), case=convolutions(), out=st.sampled_from([1, 1, 17]),
    fill=st.tuples(fills, fills), seed=seeds, layout=st.tuples(layouts, layouts),
)  # fmt: skip
def test_lookups_of_convolutions(name, size, case, out, fill, seed, layout):
    if name not in POSSIBLE:
        pytest.skip(f"{name}: {lookup._obstacles()[name]}")
    shape, kernel, options = case
    if kernel[1] < 23:  # more outputs than the compiled loops add together, over more positions than repay them
        shape, kernel = (*shape[:2], shape[2] + out - 1, shape[3] + out - 1), (kernel[0] * out, *kernel[1:])
    entries = torch.randint(-size, size + 1, (256, 256), generator=generator(seed), dtype=torch.int32)
    x, w = laid(codes(shape, fill[0], seed), layout[0]), laid(codes(kernel, fill[1], seed + 1), layout[1])
    with looked_up_by(name):
        assert equal(lookup.conv2d(x, w, entries, **options), reference.conv2d(plain(x), plain(w), entries, **options))


@pytest.mark.trust("law", "products of bytes: int8 units, and what GPUs are asked")
@many(250)
@given(
    shape=st.tuples(length, length, length),
    fill=st.tuples(fills, fills),
    seed=seeds,
    layout=st.tuples(layouts, layouts),
)
def test_products_of_bytes(shape, fill, seed, layout):
    rows, fan_in, columns = shape
    a, b = (
        laid(codes((rows, fan_in), fill[0], seed), layout[0]),
        laid(codes((fan_in, columns), fill[1], seed + 1), layout[1]),
    )
    law = (a.long() @ b.long()).to(torch.int32)
    assert equal(cuda.matmul(a, b), law)
    if 0 not in shape:
        assert equal(int8.matmul(a, b), law)


@pytest.mark.trust("law", "convolutions of bytes as a GPU makes them, run on this processor")
@many(150)
@given(
    case=convolutions(),
    fill=st.tuples(fills, fills),
    seed=seeds,
    layout=st.tuples(layouts, layouts),
    block=st.sampled_from([2**28, 4000, 1]),
)
def test_convolutions_of_bytes_for_a_gpu(case, fill, seed, layout, block):
    shape, kernel, options = case
    x, w = laid(codes(shape, fill[0], seed), layout[0]), laid(codes(kernel, fill[1], seed + 1), layout[1])
    law = reference.conv2d(plain(x), plain(w), table("mul8s_1KV6").table, **options)
    assert equal(cuda.conv2d(x, w, block_bytes=block, **options), law)


TRITON = """
import torch
from operands import codes, equal, generator, laid
from axmoe_lite.kernels import reference, triton
cases = 0
for seed in range(12):
    draw = generator(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=draw))
    entries = torch.randint(-(2**(11 + seed)), 2**(11 + seed), (256, 256), generator=draw, dtype=torch.int32)
    layout = ("contiguous", "last", "gaps", "shifted", "expanded", "turned")[seed % 6]
    groups, per_group, out = pick(1, 2), pick(1, 3), pick(1, 3)
    options = {"stride": (pick(1, 2), pick(1, 3)), "padding": (pick(0, 2), pick(0, 2)), "dilation": (pick(1, 2), 1)}
    x = laid(codes((pick(1, 2), groups * per_group, pick(5, 8), pick(3, 8)), "whole range", seed), layout)
    w = laid(codes((groups * out, per_group, pick(1, 3), pick(1, 3)), "whole range", seed + 1), layout)
    law = reference.conv2d(x, w, entries, groups=groups, **options)
    assert equal(triton.conv2d(x, w, entries, groups=groups, **options), law), seed
    a, b = (laid(codes(shape, "whole range", seed), layout) for shape in ((pick(1, 9), 23), (23, pick(1, 9))))
    assert equal(triton.matmul(a, b, entries), reference.matmul(a, b, entries)), seed
    cases += 2
print(cases)
"""


@pytest.mark.trust("law", "looking up on a GPU: the kernel in Triton's interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_for_gpus(record_property):
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", TRITON], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record_property("cases", int(done.stdout))


# ------------------------------------------------------------------------------------- mosaics


def place_by_place(x, weight, mosaic, *, stride, padding, dilation, groups):
    """One product after the other, each by the table of the multiplier at its place."""
    places, per_group = mosaic.places.expand(weight.shape), weight.shape[1]
    x = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0])).long() + 128
    reach = (d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))
    high, wide = ((n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True))
    sums = torch.zeros(len(x), len(weight), high, wide, dtype=torch.int32)
    for o, c, i, j in itertools.product(*map(range, weight.shape)):
        channel = o // (len(weight) // groups) * per_group + c
        seen = x[:, channel, i * dilation[0] :: stride[0], j * dilation[1] :: stride[1]][:, :high, :wide]
        sums[:, o] += mosaic.multipliers[places[o, c, i, j]].table[seen, int(weight[o, c, i, j]) + 128]
    return sums


MIXED = [
    ("mul8s_1KV6", "mul8s_1L2L"), ("mul8s_1KVA", "swap:mul8s_1KXF", "mul8s_1L12"), ("roup(0,2)", "roup(1,4)"),
    ("pr(1,4)", "mul8s_1KV6"), ("drum(4)", "mul8s_1KV6"), ("mitchell()", "roba()"),
]  # fmt: skip


def mosaic_on(kernel, names, shared, seed):
    """These multipliers anywhere on a weight, the same along the axes that are shared."""
    shape = [1 if one else size for one, size in zip(shared, kernel, strict=True)]
    places = torch.randint(0, len(names), shape, generator=generator(seed))
    return Mosaic("drawn", tuple(map(multiplier, names)), places)


@pytest.mark.trust("law", "several multipliers in one layer, place by place")
@many(200)
@given(
    case=convolutions(), names=st.sampled_from(MIXED), shared=st.tuples(*[st.booleans()] * 4),
    fill=st.tuples(fills, fills), seed=seeds, layout=st.tuples(layouts, layouts),
)  # fmt: skip
def test_mosaics(case, names, shared, fill, seed, layout):
    shape, kernel, options = case
    kernel = (kernel[0], min(kernel[1], 5), *kernel[2:])
    shape = (shape[0], kernel[1] * options["groups"], *shape[2:])
    m = mosaic_on(kernel, names, shared, seed)
    x, w = (
        laid(codes(shape, fill[0], seed), layout[0]),
        laid(codes(kernel, fill[1], seed + 1).clamp_min(-127), layout[1]),
    )
    law = place_by_place(plain(x), plain(w), m, **options)
    fan_in, together = kernel[1] * kernel[2] * kernel[3], kernel[2] * kernel[3]
    for path in ["reference", *paths(m, fan_in, together)[0]]:
        assert equal(conv2d(x, w, m, path=path, **options), law), path
    if kernel[2:] == (1, 1) and options["groups"] == 1 and options["padding"] == (0, 0) and w.numel():
        law = place_by_place(plain(x), plain(w), m, **options | {"stride": (1, 1)})  # a matrix of pixels
        for path in ["reference", *paths(m, fan_in, 1)[0]]:
            found = matmul(x.permute(0, 2, 3, 1).flatten(0, 2), w[:, :, 0, 0].T, m, path=path)
            assert equal(found, law.permute(0, 2, 3, 1).flatten(0, 2)), path


@pytest.mark.trust("law", "several multipliers in one layer, place by place")
def test_mosaics_that_are_looked_up_refuse_weights_of_minus_128():
    m, a = mosaic_on((2, 3, 1, 1), MIXED[-1], (False,) * 4, 0), torch.ones(4, 3, dtype=torch.int8)
    for path in ("lookup", "auto"):
        with pytest.raises(ValueError, match="weights of -128"):
            matmul(a, torch.full((3, 2), -128, dtype=torch.int8), m, path=path)


# ------------------------------------------------------------------------------------- floats


@pytest.mark.trust("law", "bytes of quantised operands: one compiled pass against look up")
@many(300)
@given(
    m=st.one_of(cheap, tables), shape=st.tuples(few, few, st.sampled_from([1, 2, 8, 23, 24, 115])),
    groups=st.booleans(), side=st.sampled_from("uv"), offset=st.sampled_from([0, 128]),
    least=st.sampled_from([-127, 0]), scale=st.sampled_from([1.0, 0.5, 0.37, 3.1]), compiled=st.booleans(),
    seed=seeds, layout=layouts, dtype=dtypes,
)  # fmt: skip
def test_encoding(m, shape, groups, side, offset, least, scale, compiled, seed, layout, dtype):
    f = factored.factors_of(m)
    if not isinstance(f.u, torch.Tensor) or not f.rank:
        return
    f = f if f.masks is not None else Factors(f.u.clamp(-128, 127), f.v.clamp(-128, 127), None)  # what bytes hold
    groups = shape[-1] if groups else 1
    x, rows = laid(floats(shape, seed, dtype, special=True), layout), getattr(f, side)
    seen = codes_by_law(plain(x), scale).clamp_min(least)
    terms = rows[:, seen.long() + 128].movedim(0, -1)  # [..., C, R]
    law = terms.unflatten(-2, (groups, -1)).mT.flatten(-3)  # [..., groups R C / groups]
    inverse = float(1.0 / torch.tensor(scale))
    with machine(True, compiled):
        found = encode.encode(x, f, side, inverse_scale=inverse, offset=offset, groups=groups, least=least)
        assert equal(found.int() - offset, law.int()) and found.dtype == (torch.uint8 if offset else torch.int8)
        assert equal(encode.encode(laid(seen, layout), f, side, groups=groups), law.to(torch.int8)), "codes as they are"
        found, zero = encode.encode_unsigned(x.float(), f, inverse_scale=inverse, groups=groups)
        assert zero in (0, 128) and (side == "v" or least == 0 or equal(found.int() - zero, law.int()))


@pytest.mark.trust("law", "layers' products, scaled: on int8 units and without, compiled and not")
@many(300)
@given(
    m=st.one_of(cheap, tables), case=convolutions(least=1), fill=fills, seed=seeds, layout=layouts, dtype=dtypes,
    signed=st.booleans(), scale=st.sampled_from([1.0, 0.37, 2.0**-9]), per_channel=st.booleans(), biased=st.booleans(),
    on=machines,
)  # fmt: skip
def test_products_of_convolutions(m, case, fill, seed, layout, dtype, signed, scale, per_channel, biased, on):
    shape, kernel, options = case
    draw, w = generator(seed), codes(kernel, fill, seed)
    x = laid((floats(shape, seed, torch.float32, signed=signed, special=True) * scale).to(dtype), layout)
    scale_w = torch.rand(len(w), generator=draw) + 0.01 if per_channel else torch.rand((), generator=draw) + 0.01
    bias = torch.randn(len(w), generator=draw) * 99 if biased else None
    sums = reference.conv2d(codes_by_law(plain(x), scale), w, m.table, **options)
    law = scaled_by_law(sums, scale, scale_w.expand(len(w)), bias, axis=1)
    with machine(*on):
        product = ConvProduct(w, m, scale_w=scale_w, scale_x=scale, bias=bias, **options)
        assert equal(product(x), law)
        if not torch.isnan(x).any():
            assert equal(product(x.abs()), product(plain(x.abs()))), (
                "the same product for images with and without signs"
            )


@pytest.mark.trust("law", "linear layers' products, scaled: on int8 units and without, compiled and not")
@many(300)
@given(
    m=st.one_of(cheap, tables), batch=st.sampled_from([(0,), (1,), (2,), (23,), (2, 3), (2, 0), (1, 1, 2)]),
    channels=st.sampled_from([1, 2, 23, 115]), out=st.sampled_from([1, 2, 23]), fill=fills, seed=seeds, layout=layouts,
    dtype=dtypes, signed=st.booleans(), scale=st.sampled_from([1.0, 0.37]), biased=st.booleans(), on=machines,
)  # fmt: skip
def test_products_of_linear_layers(m, batch, channels, out, fill, seed, layout, dtype, signed, scale, biased, on):
    draw, w = generator(seed), codes((out, channels), fill, seed)
    x = laid((floats((*batch, channels), seed, torch.float32, signed=signed, special=True) * scale).to(dtype), layout)
    scale_w, bias = torch.rand(out, generator=draw) + 0.01, torch.randn(out, generator=draw) if biased else None
    sums = reference.matmul(codes_by_law(plain(x), scale).flatten(0, -2), w.T, m.table).unflatten(0, batch)
    with machine(*on):
        product = LinearProduct(w, m, scale_w=scale_w, scale_x=scale, bias=bias)
        assert equal(product(x), scaled_by_law(sums, scale, scale_w, bias, axis=-1))

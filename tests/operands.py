"""What hypothesis draws for test_law.py and test_rules.py: tables, operands, layouts, shapes; and what takes them.

Shapes and kinds are drawn one by one, so that a failure shrinks; numbers come from one seed each.
"""

import contextlib
import functools
import os
from unittest import mock

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from axmoe_lite import EVOAPPROX, Multiplier, conv2d, layers, matmul, multiplier
from axmoe_lite.kernels import encode, factored, int8
from axmoe_lite.multipliers import exact_table

CPU = torch.device("cpu")
LIMIT = 2**31 - 1  # of a sum
SWAPPED = [f"swap:{name}" for name in ("mul8s_1L12", "mul8s_1KXF", "mul8s_1KVM")]
FAMILIES = ["drum(4)", "roba()", "roup(0,4)", "pr(1,4)", "pr(1,2)", "mitchell()", "truncation(3)", "within(-30,30,500)"]
NAMED = [*EVOAPPROX, *SWAPPED, *FAMILIES]
RANKS = (1, 2, 3, 5, 8, 256)  # 17..64 take seconds to factorise
seeds = st.integers(0, 2**31)


def many(examples: int) -> settings:
    """So many examples, however slow each is."""
    return settings(max_examples=examples, deadline=None)


def generator(seed: int) -> torch.Generator:
    """Two neighbouring seeds draw nothing alike."""
    return torch.Generator().manual_seed(seed * 7919 + 1)


# ------------------------------------------------------------------------------------- tables


@functools.cache
def table(kind: str, number: int = 0, rank: int = 0) -> Multiplier:
    """The multiplier of a name, or a table that no circuit has; kept, because factors take a while to find."""
    draw = generator(number)
    if kind == "low rank":
        u = torch.randint(-9, 10, (256, rank), generator=draw)
        found = u @ torch.randint(-9, 10, (rank, 256), generator=draw)
    elif kind == "any":
        found = torch.randint(-(2**15), 2**15, (256, 256), generator=draw)
    elif kind == "errs at zero":  # M(0, b) = f(b): every padded pixel adds something
        found = exact_table() + torch.randint(-50, 50, (1, 256), generator=draw, dtype=torch.int32)
    elif kind == "huge":  # entries up to ``number`` in magnitude, most of one sign so that sums grow
        sign = torch.where(torch.rand(256, generator=draw) < 0.9, 1, -1)
        found = sign[:, None] * (number - torch.arange(256) % min(7, number))[None, :]
    else:
        return multiplier(kind)
    return Multiplier(f"{kind} {number}", found)


RANDOM = [("low rank", seed, rank) for rank in RANKS for seed in range(2)]
RANDOM += [(kind, seed) for kind in ("any", "errs at zero") for seed in range(3)]
tables = st.one_of(st.sampled_from(NAMED).map(table), st.sampled_from(RANDOM).map(lambda key: table(*key)))
# Of few terms and small factors: what the int8 units take.
cheap = st.sampled_from([*EVOAPPROX, *SWAPPED, "roup(0,4)", "pr(1,4)"]).map(table)


def largest_for(fan_in: int) -> Multiplier:
    """A table whose sums over this fan-in just stay within 32 bits."""
    return table("huge", LIMIT // max(1, fan_in))


# ------------------------------------------------------------------------------------- operands

fills = st.sampled_from(
    ["whole range", "whole range", "extremes", "not negative", "barely signed", "all -128", "all 127", "zero"]
)
layouts = st.sampled_from(["contiguous", "last", "gaps", "shifted", "expanded", "turned"])


def codes(shape: tuple[int, ...], fill: str, seed: int) -> torch.Tensor:
    """int8 operands; on extremes weaker arithmetic saturates, wraps or rounds."""
    values = torch.randint(-128, 128, shape, generator=generator(seed)).to(torch.int8)
    constant = {"all -128": -128, "all 127": 127, "zero": 0}
    if fill in constant:
        return torch.full_like(values, constant[fill])
    if fill == "extremes":
        return torch.where(values < 0, -128, 127).to(torch.int8)
    least = {"not negative": 0, "barely signed": -1}.get(fill, -128)
    return values.clamp_min(least)


def laid(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in other places of memory; "expanded" repeats the first instead of the others."""
    if layout == "last":
        four = values.ndim == 4
        return values.contiguous(memory_format=torch.channels_last) if four else values.mT.contiguous().mT
    if layout == "gaps":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), 77)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "shifted":  # an address that no register is aligned to
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    if layout == "expanded" and len(values):
        return values[:1].expand(values.shape)
    if layout == "turned":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    return values


def plain(values: torch.Tensor) -> torch.Tensor:
    """A copy that shares nothing with what a fast path is given."""
    return values.clone(memory_format=torch.contiguous_format)


def equal(found: torch.Tensor, law: torch.Tensor) -> bool:
    """The same shape, type and bits."""
    assert found.shape == law.shape and found.dtype == law.dtype, (found.shape, found.dtype, law.shape, law.dtype)
    return torch.equal(found, law)


# ------------------------------------------------------------------------------------- floats

dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])
SPECIAL = [0.0, -0.0, 0.5, -0.5, 1.5, 126.5, 127.5, -127.5, -128.5]  # ties, both zeros, the ends of the range
SPECIAL += [1e30, -1e30, 1e-40, torch.inf, -torch.inf, torch.nan]


def floats(shape, seed, dtype, *, signed=True, special=False):
    """Activations for a scale of 1: most within the range of codes, some clipped, ties among them."""
    draw = generator(seed)
    x = torch.randn(shape, generator=draw) * 50
    x = torch.where(torch.rand(shape, generator=draw) < 0.3, (2 * x).round() / 2, x)
    if special and x.numel():
        places = torch.randint(0, x.numel(), (5,), generator=draw)
        x.view(-1)[places] = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (5,), generator=draw)]
    return (x if signed else x.abs()).to(dtype)


def codes_by_law(x, scale):
    """round(x * float32(1 / s)), half to even, cut to -127..127; NaN is code 0."""
    scaled = x.float() * (1.0 / torch.tensor(scale, dtype=torch.float32))
    return scaled.round().clamp(-127, 127).nan_to_num(nan=0.0).to(torch.int8)


def scaled_by_law(sums, scale_x, scale_w, bias, *, axis):
    """Law (1): float32(sum) * float32(s_x s_w) + bias, each step rounded to float32."""
    shape = [-1] + [1] * (sums.ndim - 1 - axis % sums.ndim)
    y = sums.float() * (torch.tensor(scale_x) * scale_w).view(shape)
    return y if bias is None else y + bias.view(shape)


@contextlib.contextmanager
def machine(units, compiled):
    """A processor with or without int8 units, a house with or without numba."""
    absent = mock.patch.object(encode, "_compiled", lambda: None)
    with (
        mock.patch.dict(os.environ, {int8.SWITCH: "1" if units else "0"}),
        contextlib.nullcontext() if compiled else absent,
    ):
        yield


machines = st.tuples(st.sampled_from([True, True, False]), st.sampled_from([True, True, False]))


# ------------------------------------------------------------------------------------- shapes

few = st.sampled_from([0, 1, 1, 2, 3, 5])
length = st.sampled_from([0, 1, 2, 23, 115])
small = st.integers(1, 3)


@st.composite
def convolutions(draw, least: int = 0):
    """Shapes of x [N, C, H, W] and weight [O, c, KH, KW], of which O and c are at least ``least``, and options."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    images, per_group, out = draw(few), max(least, draw(few)), max(least, draw(few))
    kernel, stride, dilation = (draw(st.tuples(small, small)) for _ in range(3))
    if kernel == (1, 1):
        per_group = draw(st.sampled_from([per_group, 23, 115]))
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = (d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True))
    size = [max(0, n) + draw(st.integers(0, 6)) for n in reach]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (images, groups * per_group, *size), (groups * out, per_group, *kernel), options


# ------------------------------------------------------------------------------------- what takes them


def convolved(x, w, m, path, **options):
    """By this path, or by whichever is possible."""
    able = path != "factored" or factored.possible(m, w.shape[1:].numel(), w.shape[2:].numel(), CPU)
    return conv2d(x, w, m, path=path if able else "auto", **options)


def multiplied(a, b, m, path):
    able = path != "factored" or factored.possible(m, a.shape[-1], 1, CPU)
    return matmul(a, b, m, path=path if able else "auto")


def layer_of(exact, m, scale=0.37, **options):
    layer = layers.modules.KINDS[type(exact)](exact, m, **options)
    for name in layer.SCALES:
        getattr(layer, name).fill_(scale)
    return layer.eval()


def small_network(seed, *, norm=True):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(6, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 7), nn.ReLU(), nn.Linear(7, 4),
    )  # fmt: skip
    return network.eval(), torch.randn(4, 3, 6, 6, generator=generator(seed))

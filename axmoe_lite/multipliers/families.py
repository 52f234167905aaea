"""Multipliers made from a formula: each function fills a table and names it after its own call.

All are signed 8 bit. "Sign-magnitude" means that the unsigned circuit works on |a| and |b| and the
sign is put back exactly. Powers are published where the circuit is one of EvoApproxLib's, otherwise a
proxy (see :mod:`axmoe_lite.multipliers.price`), and ``source`` says which.
"""

from math import ceil, log2

import torch
from torch import Tensor

from axmoe_lite.multipliers.price import GATE, MUX, XOR, array_columns, full_adders, proxy_power_mw
from axmoe_lite.multipliers.published import PUBLISHED
from axmoe_lite.multipliers.table import OPERANDS, Multiplier

BIT_WEIGHTS = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128], dtype=torch.int32)
_SIGNS = 2 * 8 * (XOR + 0.5) + 16 * (XOR + 0.5)  # negate two operands and one product: XORs and half adders
_LEADING_ONE = 8 * 2 * GATE


def broken_array(drop_a: int = 0, drop_b: int = 0, drop_columns: int = 0) -> Multiplier:
    """A Baugh-Wooley array with cells left out: the family of all thirteen EvoApproxLib circuits.

    M(a, b) = sum over i >= drop_a, j >= drop_b, i + j >= drop_columns of w_i a_i * w_j b_j, where a_i and
    b_j are the operands' bits and w = (1, 2, ..., 64, -128) their weights in two's complement.

    Args:
        drop_a: low bits of a (the activation) that are ignored, 0..8.
        drop_b: low bits of b (the weight) that are ignored, 0..8.
        drop_columns: low columns of the partial products that are not summed, 0..15.

    Raises:
        ValueError: for a count out of range.

    >>> broken_array(2, 0, 0)(7, 3)  # 7 loses its two low bits: 4 * 3
    12
    """
    for name, value, most in (("drop_a", drop_a, 8), ("drop_b", drop_b, 8), ("drop_columns", drop_columns, 15)):
        _check("broken_array", name, value, 0, most)
    table = array_products(drop_a, drop_b, drop_columns)
    for published in PUBLISHED:
        if published.drops == (drop_a, drop_b, drop_columns):
            return Multiplier(
                f"broken_array({drop_a},{drop_b},{drop_columns})",
                table,
                published.power_mw,
                published.area_um2,
                published.delay_ns,
                source=f"EvoApproxLib v2022 {published.name}, PDK45",
            )
    adders = full_adders(array_columns(drop_a, drop_b, drop_columns))
    return _proxied(f"broken_array({drop_a},{drop_b},{drop_columns})", table, adders)


def array_products(drop_a: int, drop_b: int, drop_columns: int) -> Tensor:
    """The sum of :func:`broken_array` for all operands at once: int32 [256, 256]."""
    i, j = torch.arange(8)[:, None], torch.arange(8)[None, :]
    kept = (i >= drop_a) & (j >= drop_b) & (i + j >= drop_columns)
    bits = _bits(OPERANDS) * BIT_WEIGHTS  # [256, 8]: w_i a_i
    return bits @ kept.int() @ bits.T


def truncation(bits: int) -> Multiplier:
    """Both operands lose their ``bits`` lowest bits (0..8): broken_array(bits, bits, 0).

    >>> truncation(3)(15, 9)  # 8 * 8
    64
    """
    _check("truncation", "bits", bits, 0, 8)
    array = broken_array(bits, bits, 0)
    return Multiplier(
        f"truncation({bits})", array.table, array.power_mw, array.area_um2, array.delay_ns, source=array.source
    )


def drum(k: int) -> Multiplier:
    """DRUM-k (Hashemi et al., ICCAD 2015): k bits from the leading one on, the last of them set to 1.

    The forced 1 stands for the mean of what was cut off, which makes the unsigned error nearly
    unbiased. Sign-magnitude. ``k`` from 2 to 8; numbers below 2^k are exact.

    >>> drum(4)(100, 3)  # 100 = 0b1100100 -> 0b1101000 = 104
    312
    """
    _check("drum", "k", k, 2, 8)
    size = OPERANDS.abs()
    shift = (_leading_one(size) - k + 1).clamp_min(0)
    short = torch.where(shift > 0, ((size >> shift) | 1) << shift, size) * OPERANDS.sign()
    steps = 8 - k
    select = 2 * (_LEADING_ONE + k * steps * MUX)
    restore = 16 * ceil(log2(2 * steps + 1)) * MUX
    core = full_adders([min(c + 1, 2 * k - 1 - c, k) for c in range(2 * k - 1)])
    return _proxied(f"drum({k})", short[:, None] * short[None, :], core + select + restore + _SIGNS)


def mitchell() -> Multiplier:
    """Mitchell's logarithmic multiplier (1962): add the logarithms, read between the powers of two.

    With a = 2^i (1 + x) and b = 2^j (1 + y): 2^(i+j) (1 + x + y), or 2^(i+j+1) (x + y) once x + y
    reaches 1. Never too large in magnitude. Sign-magnitude.

    >>> mitchell()(6, 6)  # x = y = 0.5: 2^(2+2+1) * 1
    32
    """
    size = OPERANDS.abs()
    power = torch.where(size > 0, 1 << _leading_one(size), 0)
    rest = size - power
    scale = power[:, None] * power[None, :]
    fraction = rest[:, None] * power[None, :] + power[:, None] * rest[None, :]
    table = torch.where(fraction < scale, scale + fraction, 2 * fraction) * _sign_table()
    adders = 2 * (_LEADING_ONE + 7 * 3 * MUX) + 10 + 16 * 4 * MUX + _SIGNS
    return _proxied("mitchell()", table, adders)


def roba() -> Multiplier:
    """RoBA (Zendegani et al., TVLSI 2017): a_r b + a b_r - a_r b_r, with operands rounded to powers of two.

    A tie is rounded up, except 3, which becomes 2 (the paper's rule). Sign-magnitude.

    >>> roba()(5, 7)  # 4 * 7 + 5 * 8 - 4 * 8
    36
    """
    size = OPERANDS.abs()
    power = torch.where(size > 0, 1 << _leading_one(size), 0)
    up = (2 * size >= 3 * power) & (size > 1) & (size != 3)
    near = torch.where(up, 2 * power, power)
    table = near[:, None] * size[None, :] + size[:, None] * near[None, :] - near[:, None] * near[None, :]
    adders = 2 * 2 * _LEADING_ONE + 3 * 8 * 3 * MUX + 2 * 16 + _SIGNS
    return _proxied("roba()", table * _sign_table(), adders)


def pr(k: int, m: int) -> Multiplier:
    """PR(k, m) of MAx-DNN: k Booth digits of the weight perforated, the activation rounded at bit m.

    Symmetric: every remaining partial product uses the same rounded activation, so that
    M(a, b) = round(a, 2^m) * round(b, 4^k), ties up.

    Args:
        k: radix-4 Booth digits of b that are left out, 0..4.
        m: low bits of a that are rounded away, 0..8.

    >>> pr(1, 2)(5, 3)  # round(5, 4) * round(3, 4)
    16
    """
    _check("pr", "k", k, 0, 4)
    _check("pr", "m", m, 0, 8)
    table = _round(OPERANDS, m)[:, None] * _round(OPERANDS, 2 * k)[None, :]
    return _proxied(f"pr({k},{m})", table, _booth_adders(k, [m] * 4))


def roup(k: int, m: int) -> Multiplier:
    """ROUP(k, m) of MAx-DNN, asymmetric: as :func:`pr`, but each partial product is rounded at its own bit.

    M(a, b) = sum over Booth digits j >= k of digit_j(b) 4^j round(a, 2^max(m - 2j, 0)), so all rows stop
    at column m. Which of the two the paper's tables use is not known to us; both are provided.

    Args:
        k: radix-4 Booth digits of b that are left out, 0..4.
        m: the column below which partial products are rounded away, 0..8.

    >>> roup(0, 2)(5, 6)  # 6 = 2 * 4 - 2: -2 * round(5, 4) + 8 * 5
    32
    """
    _check("roup", "k", k, 0, 4)
    _check("roup", "m", m, 0, 8)
    cuts = [max(m - 2 * j, 0) for j in range(4)]
    digits = _booth_digits(OPERANDS)
    table = sum(
        (_round(OPERANDS, cuts[j])[:, None] * (digits[j] * 4**j)[None, :] for j in range(k, 4)),
        torch.zeros(256, 256, dtype=torch.int32),
    )
    return _proxied(f"roup({k},{m})", table, _booth_adders(k, cuts))


def within(low: int, high: int, permille: int) -> Multiplier:
    """MAx-DNN's skipping by value: exact where the weight's code lies in low..high, elsewhere 0 and not executed.

    Args:
        low, high: -128..127; in the paper the mean of a layer's weights less and plus their standard deviation.
        permille: how many of a thousand products are executed, which the layer's weights decide; the power is that
            share of the exact circuit's (a proxy: what decides to skip is not counted).

    >>> within(-10, 10, 683)(7, 9), within(-10, 10, 683)(7, 11)
    (63, 0)
    """
    return _skipping("within", low, high, permille, (low <= OPERANDS) & (high >= OPERANDS))


def outside(low: int, high: int, permille: int) -> Multiplier:
    """As :func:`within` with the weights in low..high skipped: which polarity the paper means is not known to us.

    >>> outside(-10, 10, 317)(7, 9), outside(-10, 10, 317)(7, 11)
    (0, 77)
    """
    return _skipping("outside", low, high, permille, (low > OPERANDS) | (high < OPERANDS))


def _skipping(family: str, low: int, high: int, permille: int, executed: Tensor) -> Multiplier:
    for name, value, least, most in (
        ("low", low, -128, 127),
        ("high", high, -128, 127),
        ("permille", permille, 0, 1000),
    ):
        _check(family, name, value, least, most)
    if low > high:
        raise ValueError(
            f"{family}() was asked for codes from {low} to {high}; the first must not be above the second."
        )
    power = permille / 1000 * next(p for p in PUBLISHED if p.drops == (0, 0, 0)).power_mw
    table = OPERANDS[:, None] * torch.where(executed, OPERANDS, 0)[None, :]
    source = "proxy: the exact circuit's power times the share of products that are executed"
    return Multiplier(f"{family}({low},{high},{permille})", table, power_mw=power, source=source)


# --------------------------------------------------------------------------------- pieces


def _check(family: str, name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{family}() was asked for {name} = {value!r}; it must be a whole number in {least}..{most}.")


def _proxied(name: str, table: Tensor, adders: float) -> Multiplier:
    source = f"proxy: {adders:.0f} full-adder equivalents"
    return Multiplier(name, table, power_mw=proxy_power_mw(adders), source=source)


def _bits(values: Tensor) -> Tensor:
    """The eight two's-complement bits of each value, lowest first: [..., 8]."""
    return (values[..., None] >> torch.arange(8, dtype=values.dtype)) & 1


def _leading_one(size: Tensor) -> Tensor:
    """Position of the highest set bit of 0..128; 0 for 0."""
    return sum(((size >> bit) > 0).int() for bit in range(1, 8))


def _sign_table() -> Tensor:
    return OPERANDS.sign()[:, None] * OPERANDS.sign()[None, :]


def _round(values: Tensor, bits: int) -> Tensor:
    """To the nearest multiple of 2^bits, half up: (floor(A / 2^m) + a_{m-1}) * 2^m."""
    return values if bits == 0 else ((values >> bits) + ((values >> (bits - 1)) & 1)) << bits


def _booth_digits(values: Tensor) -> list[Tensor]:
    """Radix-4 Booth digits, -2..2, lowest first: digit_j = -2 b_(2j+1) + b_(2j) + b_(2j-1)."""
    bits = _bits(values)
    before = [torch.zeros_like(values), bits[..., 1], bits[..., 3], bits[..., 5]]
    return [-2 * bits[..., 2 * j + 1] + bits[..., 2 * j] + before[j] for j in range(4)]


def _booth_adders(k: int, cuts: list[int]) -> float:
    """Adders of the rows j >= k, each 9 bits wide less its cut, and a selector for every bit of a row."""
    heights, cells = [0] * 17, 0
    for j in range(k, 4):
        for bit in range(min(cuts[j], 8), 9):
            heights[2 * j + bit] += 1
            cells += 1
    return full_adders(heights) + cells * (XOR + GATE)

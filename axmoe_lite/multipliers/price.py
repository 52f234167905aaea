"""What a circuit would cost, when nobody has published it: a proxy that counts its full adders.

The thirteen published circuits are arrays of AND gates whose rows are summed by full adders, so their
adders can be counted from (drop_a, drop_b, drop_columns). One constant, milliwatts per full adder,
fitted to the thirteen with equal relative weight, predicts a circuit that was left out of the fit to
within 3.3 % on average and 7.1 % at worst (:func:`proxy_leave_one_out`, asserted by a test). AND gates
as a second constant made the worst case worse (32 %). Half adders made it better (2.0 % and 4.4 %), but at a
negative price for each, which cannot be carried over to other circuits; so the proxy keeps to its one constant.

The proxy is checked on arrays only. Other families are converted to full-adder equivalents by the
relative sizes of the cells they need; take those as an order of magnitude, or give a measured
``power_mw`` of your own.
"""

from collections.abc import Sequence
from functools import cache

from axmoe_lite.multipliers.published import PUBLISHED

# Areas of the open NanGate 45 nm cells relative to its full adder (FA_X1, 4.256 um2).
MUX = 0.44
XOR = 0.375
GATE = 0.25


def array_columns(drop_a: int, drop_b: int, drop_columns: int) -> list[int]:
    """How many partial-product bits an 8x8 broken array has in each of its 16 columns.

    >>> array_columns(0, 0, 0)
    [1, 2, 3, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    """
    heights = [0] * 16
    for i in range(drop_a, 8):
        for j in range(drop_b, 8):
            if i + j >= drop_columns:
                heights[i + j] += 1
    return heights


def full_adders(heights: Sequence[int]) -> int:
    """Full adders that compress columns of bits to one bit a column, carries going to the next column.

    A full adder turns three bits of a column into one and a carry; a last pair takes a half adder,
    which is not counted.

    >>> full_adders([3]), full_adders([1, 2, 1]), full_adders(array_columns(0, 0, 0))
    (1, 0, 48)
    """
    total, carries = 0, 0
    for height in heights:
        bits, carries = height + carries, 0
        while bits >= 3:
            bits, carries, total = bits - 2, carries + 1, total + 1
        carries += bits == 2
    return total


def _mw_per_adder(rows: Sequence[tuple[int, float]]) -> float:
    """The least-squares constant c of c * adders / power = 1: every circuit weighs the same."""
    ratios = [adders / power for adders, power in rows]
    return sum(ratios) / sum(r * r for r in ratios)


@cache
def _calibration() -> tuple[tuple[int, float], ...]:
    return tuple((full_adders(array_columns(*p.drops)), p.power_mw) for p in PUBLISHED)


def proxy_power_mw(adders: float) -> float:
    """Power of a circuit of so many full-adder equivalents, in milliwatts (PDK45 scale). A proxy.

    >>> round(proxy_power_mw(full_adders(array_columns(0, 0, 0))), 3)  # published: 0.425
    0.426
    """
    return adders * _mw_per_adder(_calibration())


def proxy_leave_one_out() -> dict[str, float]:
    """Relative error of the proxy for each published circuit when that circuit is left out of the fit."""
    rows = _calibration()
    found = {}
    for index, published in enumerate(PUBLISHED):
        adders, power = rows[index]
        others = rows[:index] + rows[index + 1 :]
        found[published.name] = adders * _mw_per_adder(others) / power - 1
    return found

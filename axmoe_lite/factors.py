"""Why an approximate product is just a few exact ones: a table of products, factorised over the integers.

A table M is a 256 x 256 integer matrix. If its rank is R there are integer vectors u_r, v_r with

    M(a, b) = sum over r < R of u_r(a) v_r(b)        for all 65,536 pairs,          (1)

so an approximate matrix product of fan-in K equals one ordinary product of fan-in K R:
replace each activation by its R values u_r(a) and each weight by its R values v_r(b). All thirteen
EvoApproxLib circuits have R <= 5, and there every factor is the operand with some bits cleared.

Letters: Q = 256 operand values, R rank, K fan-in.

Chapter: 02, "Why is an approximate product just a few exact ones?"
"""

import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from axmoe_lite.multipliers import Multiplier
from axmoe_lite.multipliers.families import BIT_WEIGHTS
from axmoe_lite.multipliers.table import OPERANDS, Q

HIGHEST_MINIMAL_RANK = 64  # beyond it no product is cheaper than a lookup, and minimal factors take minutes
_PRIME = 2_147_483_647  # 2^31 - 1: a product of two residues fits 62 bits


@dataclass(frozen=True, eq=False)
class Factors:
    """An exact factorisation (1), verified on all pairs when it is made.

    Attributes:
        u: integers [R, Q]; u[r, a + 128] is what term r makes of the activation a.
        v: integers [R, Q]; v[r, b + 128] is what term r makes of the weight b.
        masks: if every factor is an operand with bits cleared, the R pairs (p, q) of bit masks with
            M(a, b) = sum over r of (a & p_r) * (b & q_r); otherwise None.

    ``u`` and ``v`` are int64 tensors, or numpy arrays of Python integers where 64 bits are too few
    (possible only for tables of high rank, which are simulated by lookup anyway).
    """

    u: Tensor | np.ndarray
    v: Tensor | np.ndarray
    masks: tuple[tuple[int, int], ...] | None

    @property
    def rank(self) -> int:
        return len(self.u)

    @cached_property
    def largest(self) -> tuple[list[int], list[int]]:
        """max |u_r| and max |v_r| of each term: what the proofs of exactness rest on."""
        return tuple([int(abs(row).max()) for row in side] for side in (self.u, self.v))

    def __repr__(self) -> str:
        if self.masks is None:
            return f"Factors(rank {self.rank})"
        terms = " + ".join(f"(a & {p:#010b})(b & {q:#010b})" for p, q in self.masks)
        return f"Factors(rank {self.rank}: {terms or '0'})"


_found: "weakref.WeakKeyDictionary[Multiplier, Factors]" = weakref.WeakKeyDictionary()


def factorise(multiplier: Multiplier) -> Factors:
    """Exact factors of the smallest possible number of terms, remembered for as long as the multiplier lives.

    First the sixteen operands with a single bit set are looked at: if they determine the table, as in
    every array multiplier, an 8 x 8 matrix is factorised into bit masks instead. Otherwise a basis of the
    integer lattice of the table's rows is found by Euclid's algorithm; it exists for every table. Above
    rank 64 the distinct rows themselves are the terms: as exact, but not the fewest.

    The rank is proven: a minor that does not vanish modulo a prime bounds it from below, the
    factorisation, compared with the table on all pairs, from above.

    >>> from axmoe_lite.multipliers import multiplier
    >>> factorise(multiplier("mul8s_1L2J"))
    Factors(rank 1: (a & 0b11111110)(b & 0b11111110))
    >>> factorise(multiplier("mul8s_1KV8")).rank, factorise(multiplier("roba()")).rank
    (3, 2)
    """
    if multiplier not in _found:
        factors = mask_factors(multiplier.table) or _lattice_factors(multiplier.table)
        _verify(multiplier, factors)
        _found[multiplier] = factors
    return _found[multiplier]


def _verify(multiplier: Multiplier, factors: Factors) -> None:
    u, v = (np.asarray(side) for side in (factors.u, factors.v))  # int64 cannot wrap here: _narrow left room
    product = u.T @ v if len(u) else np.zeros((Q, Q), np.int64)
    assert (product == multiplier.table.numpy()).all(), f"{multiplier.name}: factors do not give back the table"
    lower = rank_lower_bound(multiplier.table)
    assert factors.rank == lower or lower > HIGHEST_MINIMAL_RANK, f"{multiplier.name}: rank is not minimal"


# ------------------------------------------------------------------- arrays: eight bits by eight


def mask_factors(table: Tensor) -> Factors | None:
    """Terms (a & p)(b & q) of a table that is a sum of bit products with weights 0 or 1, else None."""
    single = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128])
    cells = table[single + 128][:, single + 128]
    kept = (cells == BIT_WEIGHTS[:, None] * BIT_WEIGHTS[None, :]).int()
    if not torch.equal(cells, kept * BIT_WEIGHTS[:, None] * BIT_WEIGHTS[None, :]):
        return None
    # Rows of the array that keep the same columns share a term: p collects the rows, q their columns.
    patterns: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(kept.tolist()):
        if any(row):
            patterns[tuple(row)] = patterns.get(tuple(row), 0) | 1 << i
    masks = tuple((p, sum(1 << j for j, keep in enumerate(row) if keep)) for row, p in patterns.items())
    u = torch.stack([masked(OPERANDS, p) for p, _ in masks]) if masks else torch.zeros(0, Q)
    v = torch.stack([masked(OPERANDS, q) for _, q in masks]) if masks else torch.zeros(0, Q)
    u, v = u.long(), v.long()
    if not torch.equal(u.T @ v, table.long()) or len(masks) != rank_lower_bound(table):
        return None
    return Factors(u, v, masks)


def masked(values: Tensor, mask: int) -> Tensor:
    """Signed 8-bit values with all bits outside ``mask`` cleared; bit 7 weighs -128.

    >>> masked(torch.tensor([-1, 7], dtype=torch.int8), 0b10000010)
    tensor([-126,    2], dtype=torch.int8)
    """
    signed = mask - 256 if mask >= 128 else mask
    return values & torch.tensor(signed, dtype=values.dtype, device=values.device)


# ------------------------------------------------------------------------------- any table


def rank_lower_bound(table: Tensor) -> int:
    """The rank of an integer matrix modulo 2^31 - 1, which is at most its true rank."""
    m = table.numpy().astype(np.int64) % _PRIME
    rank = 0
    for column in range(m.shape[1]):
        below = np.flatnonzero(m[rank:, column])
        if len(below) == 0:
            continue
        pivot = rank + below[0]
        m[[rank, pivot]] = m[[pivot, rank]]
        m[rank] = m[rank] * pow(int(m[rank, column]), -1, _PRIME) % _PRIME
        rest = rank + 1 + np.flatnonzero(m[rank + 1 :, column])
        m[rest] = (m[rest] - m[rest, column, None] * m[rank] % _PRIME) % _PRIME
        rank += 1
        if rank == m.shape[0]:
            break
    return rank


def _lattice_factors(table: Tensor) -> Factors:
    """u, v with v a basis of the lattice that the rows of the table span, hence u integer too."""
    if rank_lower_bound(table) > HIGHEST_MINIMAL_RANK:
        distinct, which = table.long().unique(dim=0, return_inverse=True)
        return Factors(torch.nn.functional.one_hot(which).T, distinct, None)
    rows = table.numpy().astype(object)
    v = _echelon_basis(rows)
    u = _coordinates(rows, v)
    if len(v) <= 8:
        _shorten(u, v)
    return Factors(*_narrow(u, v), None)


def _echelon_basis(rows: np.ndarray) -> np.ndarray:
    """A basis [R, Q], in Hermite's echelon form, of the integer lattice that the rows span.

    Each row is taken in by Euclid's algorithm on leading entries. Everything is kept reduced by the
    leaders below it, without which the integers would grow beyond all use.
    """
    basis: dict[int, np.ndarray] = {}  # by the column of the leading entry, which is positive

    def reduced(row: np.ndarray, after: int) -> np.ndarray:
        for column in sorted(c for c in basis if c > after):
            if quotient := row[column] // basis[column][column]:
                row = row - quotient * basis[column]
        return row

    for row in dict.fromkeys(map(tuple, rows)):
        rest = reduced(np.array(row, dtype=object), -1)
        while len(nonzero := np.flatnonzero(rest)):
            column = nonzero[0]
            # What is left is smaller than the leader it meets: it takes that place, the old one goes on.
            displaced = basis.get(column)
            basis[column] = reduced(rest if rest[column] > 0 else -rest, column)
            for earlier in (c for c in basis if c < column):
                basis[earlier] = reduced(basis[earlier], earlier)
            rest = np.zeros(rows.shape[1], dtype=object) if displaced is None else reduced(displaced, -1)
    return np.array([basis[column] for column in sorted(basis)], dtype=object).reshape(-1, rows.shape[1])


def _coordinates(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """u [R, Q] with rows = u.T @ basis, read off the leading entries one after another."""
    rest, u = rows.copy(), np.zeros((len(basis), len(rows)), dtype=object)
    for r, vector in enumerate(basis):
        column = np.flatnonzero(vector)[0]
        u[r] = rest[:, column] // vector[column]
        rest = rest - np.outer(u[r], vector)
    assert not rest.any(), "a row of the table is not in the lattice of its rows"
    return u


def _shorten(u: np.ndarray, v: np.ndarray) -> None:
    """Make the vectors of v small, pair by pair (Lagrange), in place; u follows so that u.T @ v stays.

    Small factors are what lets cheap arithmetic be proven exact.
    """
    changed = True
    while changed:
        changed = False
        for i in range(len(v)):
            for j in range(len(v)):
                size = v[j] @ v[j]
                quotient = (2 * (v[i] @ v[j]) + size) // (2 * size)
                shorter = v[i] - quotient * v[j]
                if i != j and quotient and shorter @ shorter < v[i] @ v[i]:
                    v[i], u[j] = shorter, u[j] + quotient * u[i]
                    changed = True


def _narrow(u: np.ndarray, v: np.ndarray) -> tuple[Tensor, Tensor] | tuple[np.ndarray, np.ndarray]:
    """As int64 tensors if every sum of products of (1) fits 63 bits, else as they are."""
    bound = sum(int(abs(a).max()) * int(abs(b).max()) for a, b in zip(u, v, strict=True))
    if bound >= 2**63:
        return u, v
    return torch.from_numpy(u.astype(np.int64)), torch.from_numpy(v.astype(np.int64))


# --------------------------------------------------------------- which arithmetic is exact


@dataclass(frozen=True)
class Arithmetic:
    """The cheapest arithmetic in which a factored product of a given fan-in is provably exact.

    Attributes:
        name: ``"int8"`` (int8 operands, int32 sums), ``"float32"``, ``"float64"`` or ``"none"`` (use a lookup).
        chunk: the longest fan-in that may be summed in one go; longer ones are cut and added as integers.
        bound: no partial sum of a chunk, in any order, exceeds this in magnitude.
    """

    name: str
    chunk: int
    bound: int


def exact_arithmetic(
    factors: Factors, fan_in: int, *, available: tuple[str, ...] = ("int8", "float32", "float64")
) -> Arithmetic:
    """Prove which arithmetic computes (1) exactly, from the ranges of the factors and the fan-in.

    One activation and one weight contribute terms whose magnitudes sum to at most
    B = sum over r of max|u_r| max|v_r|, so no partial sum over k pairs exceeds k B, whatever the order.
    int8 is exact if all factors fit -128..127 and K B < 2^31; float32 if the factors and k B stay within
    2^24 (all integers up to there are floats), cutting the fan-in into chunks of k; float64 likewise
    within 2^53.

    Args:
        factors: from :func:`factorise`.
        fan_in: K, the number of products summed into one output, at least 1.
        available: the arithmetics to choose from, cheapest first.

    Returns:
        Arithmetic.

    >>> from axmoe_lite.multipliers import multiplier
    >>> exact_arithmetic(factorise(multiplier("mul8s_1KV6")), 4608)
    Arithmetic(name='int8', chunk=4608, bound=75497472)
    >>> exact_arithmetic(factorise(multiplier("mul8s_1KV6")), 4608, available=("float32",))
    Arithmetic(name='float32', chunk=1024, bound=16777216)
    """
    if fan_in < 1:
        raise ValueError(f"The fan-in is {fan_in}; a sum needs at least 1 product.")
    most_u, most_v = factors.largest
    pair = max(1, sum(a * b for a, b in zip(most_u, most_v, strict=True)))
    largest = max([1, *most_u, *most_v])
    for name in available:
        if name == "int8":
            fits = all(int(f.min()) >= -128 and int(f.max()) <= 127 for side in (factors.u, factors.v) for f in side)
            chunk = fan_in if fits and fan_in * pair < 2**31 else 0
        else:
            limit = {"float32": 2**24, "float64": 2**53}[name]
            chunk = min(fan_in, limit // pair) if largest <= limit else 0
        if chunk:
            return Arithmetic(name, chunk, chunk * pair)
    return Arithmetic("none", 0, 0)

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
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from axmoe_lite.multipliers import Mosaic, Multiplier
from axmoe_lite.multipliers.families import BIT_WEIGHTS
from axmoe_lite.multipliers.table import NEGATED, OPERANDS, Q, check_table

HIGHEST_MINIMAL_RANK = 64  # beyond it no product is cheaper than a lookup, and minimal factors take minutes
_PRIME = 2_147_483_647  # 2^31 - 1: a product of two residues fits 62 bits


@dataclass(frozen=True, eq=False)
class Factors:
    """An exact factorisation (1), verified on all pairs when it is made.

    Attributes:
        u: integers [R, Q]; u[r, a + 128] is what term r makes of the activation a. Of a mosaic by channels
            [R, M Q], one multiplier beside the other.
        v: integers [R, Q]; v[r, b + 128] is what term r makes of the weight b. Of any mosaic [R, M Q].
        masks: if every factor is an operand with bits cleared, the R pairs (p, q) of bit masks with
            M(a, b) = sum over r of (a & p_r) * (b & q_r), of a mosaic the p alone matter; otherwise None.
        shift: the sum is to be multiplied by 2^shift; 0 but in :func:`compact`.
        places: integers [c], which of the M multipliers each channel of a layer's group has, where u tells them
            apart and the layer is known.

    ``u`` and ``v`` are int64 tensors, or numpy arrays of Python integers where 64 bits are too few
    (possible only for tables of high rank, which are simulated by lookup anyway).
    """

    u: Tensor | np.ndarray
    v: Tensor | np.ndarray
    masks: tuple[tuple[int, int], ...] | None
    shift: int = 0
    places: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.u)

    @property
    def by_channel(self) -> bool:
        """Whether what becomes of an activation depends on its channel."""
        return self.u.shape[1] > Q

    def of(self, channels: slice) -> "Factors":
        """For some of the channels."""
        return self if self.places is None else replace(self, places=self.places[channels])

    @cached_property
    def largest(self) -> tuple[list[int], list[int]]:
        """max |u_r| and max |v_r| of each term: what the proofs of exactness rest on."""
        return tuple([int(abs(row).max()) for row in side] for side in (self.u, self.v))

    @cached_property
    def bytewise(self) -> bool:
        """Whether all factors are bytes, -128..127."""
        return all(int(f.min()) >= -128 and int(f.max()) <= 127 for side in (self.u, self.v) for f in side)

    @cached_property
    def unsigned(self) -> bool:
        """Whether activations that are not negative have factors that are not: masks do, others need not."""
        return self.masks is not None or int(self.u.reshape(self.rank, -1, Q)[..., 128:].min()) >= 0

    def __repr__(self) -> str:
        if self.masks is None:
            return f"Factors(rank {self.rank})"
        terms = " + ".join(f"(a & {p:#010b})(b & {q:#010b})" for p, q in self.masks)
        return f"Factors(rank {self.rank}: {terms or '0'})"


_found: "weakref.WeakKeyDictionary[Multiplier | Mosaic, Factors]" = weakref.WeakKeyDictionary()


def factorise(multiplier: Multiplier | Mosaic) -> Factors:
    """Exact factors of the smallest possible number of terms, remembered for as long as the multiplier lives.

    First the sixteen operands with a single bit set are looked at: if they determine the table, as in
    every array multiplier, an 8 x 8 matrix is factorised into bit masks instead, and so is that of an array whose
    operands are negated first. Otherwise a basis of the integer lattice of the table's rows is found by Euclid's
    algorithm; it exists for every table. Above rank 64 the distinct rows themselves are the terms: as exact, but not
    the fewest.

    The rank is proven: a minor that does not vanish modulo a prime bounds it from below, the
    factorisation, compared with the table on all pairs, from above.

    The multipliers of a mosaic are factorised side by side, [M_0 | M_1 | ...]: terms that treat the activation
    alike are shared. By channels an activation meets one of them alone: unless all have masks, which are quicker to
    apply, each keeps its own terms, and there are as many as the longest has.

    >>> from axmoe_lite.multipliers import multiplier
    >>> factorise(multiplier("mul8s_1L2J"))
    Factors(rank 1: (a & 0b11111110)(b & 0b11111110))
    >>> factorise(multiplier("mul8s_1KV8")).rank, factorise(multiplier("roba()")).rank
    (3, 2)
    >>> factorise(multiplier("filter[roup(0,2), roup(0,4), roup(1,4)]")).rank  # 2, 3 and 2 terms alone
    3
    >>> [factorise(multiplier(f"{by}[mul8s_1KVA, negated:mul8s_1KVA]")).rank for by in ("filter", "channel")]
    [9, 5]
    """
    check_table(multiplier)
    if isinstance(multiplier, Mosaic):
        side_by_side = _factorise_apart if multiplier.by_channel else _factorise_together
        return side_by_side(multiplier.multipliers)
    if multiplier not in _found:
        table = multiplier.table
        factors = mask_factors(table) or _turned_factors(table) or _lattice_factors(table)
        _verify(multiplier.name, table, factors)
        _found[multiplier] = factors
    return _found[multiplier]


@lru_cache(maxsize=256)
def _factorise_together(multipliers: tuple[Multiplier, ...]) -> Factors:
    table = torch.cat([m.table for m in multipliers], dim=1)
    factors = mask_factors(table) or _lattice_factors(table)
    _verify(" | ".join(m.name for m in multipliers), table, factors)
    return factors


@lru_cache(maxsize=256)
def _factorise_apart(multipliers: tuple[Multiplier, ...]) -> Factors:
    """Each one's own factors, with zeros for terms that others have; masks that suit all are quicker to apply."""
    alone = [factorise(m) for m in multipliers]
    too_large = any(not isinstance(factors.u, Tensor) for factors in alone)  # for 64 bits, and so for any product
    if too_large or all(factors.masks is not None for factors in alone):
        return _factorise_together(multipliers)
    rank = max(factors.rank for factors in alone)
    u, v = (
        torch.cat([torch.nn.functional.pad(side, (0, 0, 0, rank - len(side))) for side in sides], dim=1)
        for sides in ([f.u for f in alone], [f.v for f in alone])
    )
    return Factors(u, v, None)


def _verify(name: str, table: Tensor, factors: Factors) -> None:
    u, v = (np.asarray(side) for side in (factors.u, factors.v))  # int64 cannot wrap here: _narrow left room
    product = u.T @ v << factors.shift if len(u) else np.zeros(table.shape, np.int64)
    assert (product == table.numpy()).all(), f"{name}: factors do not give back the table"
    if not factors.shift:
        lower = rank_lower_bound(table)
        assert factors.rank == lower or lower > HIGHEST_MINIMAL_RANK, f"{name}: rank is not minimal"


# ------------------------------------------------------------------- arrays: eight bits by eight


def mask_factors(table: Tensor) -> Factors | None:
    """Terms (a & p)(b & q) of a table that is a sum of bit products with weights 0 or 1, else None.

    Of M tables side by side, [Q, M Q], a term has one q for each.
    """
    single, tables = torch.tensor([1, 2, 4, 8, 16, 32, 64, -128]), table.shape[1] // Q
    columns = (Q * torch.arange(tables)[:, None] + single + 128).flatten()
    cells, weights = table[single + 128][:, columns], BIT_WEIGHTS[:, None] * BIT_WEIGHTS.repeat(tables)[None, :]
    kept = (cells == weights).int()
    if not torch.equal(cells, kept * weights):
        return None
    # Rows of the array that keep the same columns share a term: p collects the rows, q their columns.
    patterns: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(kept.tolist()):
        if any(row):
            patterns[tuple(row)] = patterns.get(tuple(row), 0) | 1 << i
    masks = tuple((p, sum(1 << j for j, keep in enumerate(row[:8]) if keep)) for row, p in patterns.items())
    bits = OPERANDS[:, None] >> torch.arange(8) & 1  # [Q, 8]
    u = torch.stack([masked(OPERANDS, p) for p, _ in masks]).long() if masks else torch.zeros(0, Q).long()
    v = torch.tensor(list(patterns)).view(len(masks), tables, 8) * BIT_WEIGHTS  # the bits of b that each term keeps
    v = (v @ bits.T.to(v.dtype)).flatten(1).long()
    if not torch.equal(u.T @ v, table.long()) or len(masks) != rank_lower_bound(table):
        return None
    return Factors(u, v, masks)


def _turned_factors(table: Tensor) -> Factors | None:
    """Factors of an array whose operands were negated first, else None: bytes, which a lattice's need not be."""
    turned = NEGATED + 128
    array = table[turned][:, turned]
    # Nothing is turned into -128. In an array that row is what -1 = -128 + 127 has and 127 has not.
    array[0] = array[-1 + 128] - array[127 + 128]
    array[:, 0] = array[:, -1 + 128] - array[:, 127 + 128]
    found = mask_factors(array)
    if found is None:
        return None
    u, v = found.u[:, turned], found.v[:, turned]
    return Factors(u, v, None) if torch.equal(u.T @ v, table.long()) else None  # -128 may have a life of its own


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


def compact(factors: Factors) -> Factors:
    """The same sum with factors that are bytes, if it takes no more than a power of two and a few terms.

    Rounded operands reach 128, and a weight rounded to a multiple of 16 times an activation rounded to one of 4 is
    64 times a product of small numbers. So powers of two go from where there is no room to where there is some, what
    all terms have in common to ``shift``, a factor that reaches +128 changes its sign with its partner, and one that
    is still too large is written as a sum of smaller ones. More than twice the terms would not pay.

    >>> from axmoe_lite.multipliers import multiplier
    >>> small = compact(factorise(multiplier("pr(1,4)")))  # round(a, 16) round(b, 4): -128..128 times -128..128
    >>> small.largest, small.shift
    (([8], [32]), 6)
    """
    if factors.masks is not None or not factors.rank or not isinstance(factors.u, Tensor):
        return factors
    twos = [[_twos(row) for row in side] for side in (factors.u, factors.v)]
    shift = min(x + y for x, y in zip(*twos, strict=True))
    u, v = [], []
    for row_u, row_v, x, y in zip(factors.u, factors.v, *twos, strict=True):
        row_u, row_v, left = row_u >> x, row_v >> y, x + y - shift
        while left and _fits(row_v << 1):
            row_v, left = row_v << 1, left - 1
        while left and _fits(row_u << 1):
            row_u, left = row_u << 1, left - 1
        row_v = row_v << left
        if not (_fits(row_u) and _fits(row_v)):
            row_u, row_v = -row_u, -row_v
        if _pieces(row_u) * _pieces(row_v) > 2 * factors.rank:
            return factors
        parts = _parts(row_u), _parts(row_v)
        u += [a for a in parts[0] for _ in parts[1]]
        v += [b for _ in parts[0] for b in parts[1]]
    return Factors(torch.stack(u), torch.stack(v), None, shift) if len(u) <= 2 * factors.rank else factors


def _fits(row: Tensor) -> bool:
    return int(row.min()) >= -128 and int(row.max()) <= 127


def _pieces(row: Tensor) -> int:
    """How many rows of bytes it takes to add up to the row."""
    return max(1, -(-int(row.max()) // 127), -(int(row.min()) // 128))


def _parts(row: Tensor) -> list[Tensor]:
    """These rows, as equal as can be."""
    n = _pieces(row)
    return [(row + i).div(n, rounding_mode="floor") for i in range(n)]


def _twos(row: Tensor) -> int:
    """How often 2 divides all entries."""
    common = int(np.gcd.reduce(row.numpy()))
    return (common & -common).bit_length() - 1


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
            chunk = fan_in if factors.bytewise and fan_in * pair < 2**31 else 0
        else:
            limit = {"float32": 2**24, "float64": 2**53}[name]
            chunk = min(fan_in, limit // pair) if largest <= limit else 0
        if chunk:
            return Arithmetic(name, chunk, chunk * pair)
    return Arithmetic("none", 0, 0)

"""The noun of the project: a multiplier is its table of 65,536 integer products."""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from operator import index

import torch
from torch import Tensor

Q = 256  # values of an 8-bit operand
OPERANDS = torch.arange(-128, 128, dtype=torch.int32)
NEGATED = OPERANDS.neg().clamp_max(127)  # as bytes: there is no 128


def exact_table() -> Tensor:
    """The true products: int32 [256, 256], entry [a + 128, b + 128] = a * b.

    >>> exact_table()[3 + 128, -5 + 128].item()
    -15
    """
    return OPERANDS[:, None] * OPERANDS[None, :]


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A signed 8-bit multiplier: what it answers for every pair of operands, and what that costs.

    Treat the table as read-only; products and factors are cached by multiplier.

    Args:
        name: what assignments and result rows call it.
        table: int32 [256, 256]; row a + 128 is the first operand (the activation), column b + 128 the
            second (the weight), both from -128 to 127. Any integer tensor is accepted and converted.
        power_mw: power in milliwatts, or None if unknown.
        area_um2, delay_ns: area and critical path, or None if unknown.
        source: where table and figures come from. It begins with ``"proxy"`` where the power is an
            estimate (:mod:`axmoe_lite.multipliers.price`) and not a published figure.

    Raises:
        ValueError: for a table of another shape or type, or with entries beyond 32 bits.

    >>> ones = Multiplier("always one", torch.ones(256, 256, dtype=torch.int32))
    >>> ones(100, -3)
    1
    """

    name: str
    table: Tensor
    power_mw: float | None = None
    area_um2: float | None = None
    delay_ns: float | None = None
    source: str = "user"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"A multiplier's name is text; {self.name!r} is a {type(self.name).__name__}.")
        for what in ("power_mw", "area_um2", "delay_ns"):
            value = getattr(self, what)
            if value is not None and not (isinstance(value, Real) and 0 <= value < math.inf):
                raise ValueError(f"{what} of {self.name!r} is {value!r}; give a number, 0 or more, or None if unknown.")
        try:
            table = torch.as_tensor(self.table)
        except (TypeError, RuntimeError, ValueError) as reason:
            raise ValueError(
                f"The table of {self.name!r} is a {type(self.table).__name__}, of which torch makes no tensor"
                f" ({reason}); give 256 x 256 integers."
            ) from None
        if tuple(table.shape) != (Q, Q):
            raise ValueError(
                f"The table of {self.name!r} is {list(table.shape)}; a signed 8-bit multiplier has 256 x 256"
                " products, row a + 128 for the activation a, column b + 128 for the weight b."
            )
        if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
            raise ValueError(f"The table of {self.name!r} is {table.dtype}; products are integers. Use torch.int32.")
        wide = table.to(torch.float64) if table.dtype == torch.uint64 else table.long()  # torch compares no uint64
        beyond = [int(x) for x in (wide.min(), wide.max()) if not -(2**31) <= int(x) < 2**31]
        if beyond:
            raise ValueError(f"The table of {self.name!r} has products beyond 32 bits, up to {max(beyond, key=abs)}.")
        object.__setattr__(self, "table", table.to(torch.int32).contiguous().clone())

    def __call__(self, a: int, b: int) -> int:
        """One product: ``a`` the activation, ``b`` the weight, both in -128..127."""
        for name, value in (("a", a), ("b", b)):
            try:
                fits = -128 <= index(value) <= 127
            except TypeError:
                fits = False
            if not fits:
                raise ValueError(f"Operand {name} is {value!r}; a signed 8-bit operand is a whole number in -128..127.")
        return int(self.table[index(a) + 128, index(b) + 128])

    def __deepcopy__(self, memo: dict) -> "Multiplier":
        """Itself: a copied network has the same circuits, and what is known of them."""
        return self

    def __repr__(self) -> str:
        power = "unknown power" if self.power_mw is None else f"{self.power_mw:.3f} mW"
        return f"Multiplier({self.name!r}, {power}, {self.source})"

    @cached_property
    def largest(self) -> int:
        """The largest magnitude in the table: with the fan-in it bounds every sum."""
        return int(self.table.long().abs().max())  # int32 has no +2^31

    @property
    def is_proxy(self) -> bool:
        """Whether the power is an estimate and not a published figure."""
        return self.source.startswith("proxy")

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change with any entry: names move between libraries, tables do not."""
        return hashlib.sha256(self.table.numpy().astype("<i4").tobytes()).hexdigest()[:12]

    def columns(self, weight: Tensor) -> Tensor:
        """The column of the table, less 128, that each weight stands for: its code. Mosaics have more columns."""
        return weight

    def swapped(self) -> "Multiplier":
        """The same circuit with its operands exchanged: now rows are weights. Named ``swap:...``."""
        name = self.name.removeprefix("swap:") if self.name.startswith("swap:") else f"swap:{self.name}"
        return replace(self, name=name, table=self.table.T)

    def negated(self) -> "Multiplier":
        """The same circuit fed with both operands negated: (-a)(-b) = ab, but its errors differ. Named ``negated:...``.

        -128, a byte that quantisation never makes, becomes 127. The power of changing signs is not counted: whoever
        writes a code can write it negated.

        >>> from axmoe_lite import multiplier
        >>> l2j = multiplier("mul8s_1L2J")
        >>> l2j(5, 3), l2j.negated()(5, 3)  # cut bits make a number smaller: 4 and 2, -6 and -4
        (8, 24)
        """
        turned = NEGATED + 128
        return replace(self, name=f"negated:{self.name}", table=self.table[turned][:, turned])


@dataclass(frozen=True)
class ErrorMetrics:
    """How far a multiplier is from the truth, error = M(a, b) - a * b, in units of the product.

    Attributes:
        mae: mean absolute error.
        wce: worst-case absolute error.
        ep: error probability, the share of operand pairs with a wrong product, in [0, 1].
        mre: mean of |error| / |a * b| over the pairs whose true product is not zero (1 = 100 %).
        mse: mean squared error.
        mean_error: the bias, with its sign.
        variance: mse - mean_error squared.
    """

    mae: float
    wce: int
    ep: float
    mre: float
    mse: float
    mean_error: float
    variance: float


def check_table(multiplier: object) -> None:
    """Raise ValueError for what is no :class:`Multiplier` and no mosaic of them, such as a name."""
    if not hasattr(type(multiplier), "columns"):  # not ``table``: a mosaic makes its own anew whenever it is asked
        raise ValueError(
            f"{multiplier!r} is a {type(multiplier).__name__} and no multiplier; multiplier('mul8s_1L2J') makes one of"
            " a name, Multiplier('mine', table) one of a table."
        )


def error_table(multiplier: Multiplier) -> Tensor:
    """M(a, b) - a b for all operands: int64 [256, 256], rows and columns as :class:`Multiplier` has them.

    Raises:
        ValueError: for what is no multiplier, or a mosaic of several.
    """
    check_table(multiplier)
    if not isinstance(multiplier, Multiplier):
        raise ValueError(
            f"{multiplier.name!r} is a mosaic of {len(multiplier.multipliers)} multipliers, and each errs in its own"
            f" way; ask for the errors of one of them, such as {multiplier.multipliers[0].name!r}."
        )
    return multiplier.table.long() - exact_table()


def errors(multiplier: Multiplier, *, a: Tensor | None = None, b: Tensor | None = None) -> ErrorMetrics:
    """Error metrics over all operand pairs, or over the operands that really occur.

    Args:
        multiplier: any multiplier.
        a, b: weights of the 256 values -128..127 of each operand, [256], not negative, in any scale
            (counts will do); None means uniform. The worst case is taken over pairs that can occur.

    Raises:
        ValueError: for a distribution of another shape, with a negative or no weight, and for a mosaic.

    >>> from axmoe_lite.multipliers import multiplier
    >>> errors(multiplier("mul8s_1KVM")).wce
    128
    >>> never_negative = (torch.arange(-128, 128) >= 0).double()
    >>> errors(multiplier("mul8s_1KVM"), a=never_negative).mean_error
    0.25
    >>> errors(multiplier("mul8s_1KVM"), a=never_negative, b=never_negative).mean_error
    -31.75
    """
    error, exact = error_table(multiplier).double(), exact_table().double()
    weight = _distribution("a", a)[:, None] * _distribution("b", b)[None, :]
    size = error.abs()
    defined = exact != 0
    mass = weight[defined].sum().item()
    mean = (weight * error).sum().item()
    mse = (weight * error**2).sum().item()
    return ErrorMetrics(
        mae=(weight * size).sum().item(),
        wce=int(size[weight > 0].max().item()),
        ep=(weight * (error != 0)).sum().item(),
        mre=(weight[defined] * size[defined] / exact[defined].abs()).sum().item() / mass if mass else 0.0,
        mse=mse,
        mean_error=mean,
        variance=mse - mean**2,
    )


def _distribution(name: str, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.full((Q,), 1 / Q, dtype=torch.float64)
    weights = torch.as_tensor(weights).double()
    if tuple(weights.shape) != (Q,):
        raise ValueError(
            f"The distribution of operand {name} is {list(weights.shape)}; give one weight a value, [256]."
        )
    if not bool(torch.isfinite(weights).all()) or float(weights.min()) < 0 or float(weights.sum()) == 0:
        raise ValueError(f"The distribution of operand {name} needs finite weights, none negative and not all zero.")
    return weights / weights.sum()

"""Several multipliers inside one layer: which of them makes which of its products.

A hardware layer need not have one kind of multiplier. MAx-DNN gives one to each filter, or to each channel, row or
column of its kernels. The weight says where a product stands, so what a product is becomes a look into one wide table:

    M(a, b at place p) = T[a, 256 m(p) + b],    T = [M_0 | M_1 | ...]        (1)

T is factorised like any other table (:func:`axmoe_lite.factorise`), so a mosaic costs a few exact products too: as many
as the rank of its multipliers side by side, however they are mixed, and multipliers that treat the activation alike
share them. By channels, where an activation meets one multiplier alone, as many as the longest takes may do.
Letters: O filters, C channels, KH x KW kernel, Q = 256, M multipliers.

A mosaic whose list ends in ``...`` begins anew where it ends, and so fits any layer. One of them has a name of its
own: ``signs:mul8s_1L2L`` is ``channel[mul8s_1L2L, negated:mul8s_1L2L, ...]``, one circuit fed with every other channel
negated, activations and weights. No exact product changes, but errors that grow with a number no longer add up where
all numbers have one sign (not from the papers; chapter 13).

Chapter: 16, "How fine should a choice be?"
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from axmoe_lite.multipliers.table import Multiplier, Q

AXES = ("filter", "channel", "row", "column")
"""The axes of a convolution's weight [O, C, KH, KW]; a linear layer's [O, C] has the first two."""

MOST_PLACES = 2**25


@dataclass(frozen=True, eq=False)
class Mosaic:
    """A layer's multipliers, place by place. Stands wherever one :class:`Multiplier` for the whole layer can.

    Args:
        name: as :func:`mosaic_name` writes it.
        multipliers: each once.
        places: integers, the multiplier of each place: [O, C, KH, KW] with 1 along axes that share.
        repeats: whether the places begin anew where they end, up to the size of the layer.
    """

    name: str
    multipliers: tuple[Multiplier, ...]
    places: Tensor
    repeats: bool = False

    area_um2 = None  # of a layer's circuits together nothing is known

    def __deepcopy__(self, memo: dict) -> "Mosaic":
        """Itself: a copied network has the same circuits."""
        return self

    @property
    def table(self) -> Tensor:
        """T of (1): int32 [Q, M Q]; made anew at each call, so that many mosaics fit the memory."""
        return torch.cat([m.table for m in self.multipliers], dim=1)

    def columns(self, weight: Tensor) -> Tensor:
        """The column of T, less 128, that each weight stands for: int32, shape of ``weight`` [O, C, ...]."""
        return weight.int() + Q * self.places_of(weight)

    def places_of(self, weight: Tensor) -> Tensor:
        """The multiplier of each weight: integers that broadcast against ``weight`` [O, C] or [O, C, KH, KW]."""
        places = self.places
        if self.repeats:
            for axis, size in enumerate(places.shape):
                if size > 1:
                    length = weight.shape[axis] if axis < weight.ndim else 1
                    places = places.index_select(axis, torch.arange(length) % size)
        return (places if weight.ndim == 4 else places[..., 0, 0]).to(weight.device)

    @property
    def by_channel(self) -> bool:
        """Whether the channel alone tells the multiplier."""
        filters, _, rows, columns = self.places.shape
        return filters == rows == columns == 1

    def mean(self, of: Callable[[Multiplier], float | None]) -> float | None:
        """The mean over the places of what ``of`` says of a multiplier, where they repeat over one period, or None."""
        values = [of(m) for m in self.multipliers]
        if None in values:
            return None
        counts = self.places.flatten().bincount(minlength=len(values)).tolist()
        return sum(n * value for n, value in zip(counts, values, strict=True)) / self.places.numel()

    @property
    def power_mw(self) -> float | None:
        """The mean over the places, milliwatts: each makes as many products as any other. None if one is not known."""
        return self.mean(lambda m: m.power_mw)

    @property
    def delay_ns(self) -> float | None:
        """Of the slowest, nanoseconds: one clock drives the layer."""
        delays = [m.delay_ns for m in self.multipliers]
        return None if None in delays else max(delays)

    @cached_property
    def largest(self) -> int:
        """The largest magnitude of a product."""
        return max(m.largest for m in self.multipliers)

    @property
    def is_proxy(self) -> bool:
        """Whether the power of one of them is an estimate."""
        return any(m.is_proxy for m in self.multipliers)

    @property
    def source(self) -> str:
        """Where tables and powers come from; begins with ``"proxy"`` where one is an estimate."""
        return "; ".join(sorted({m.source for m in self.multipliers}, key=lambda text: not text.startswith("proxy")))

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that differ where a product does."""
        found = hashlib.sha256(repr((*self.places.shape, *["..."] * self.repeats)).encode())
        for place in self.places.flatten().tolist():
            found.update(self.multipliers[place].digest.encode())
        return found.hexdigest()[:12]

    def check_fits(self, layer: str, shape: Sequence[int]) -> None:
        """Raise ValueError unless a weight of this shape has these places."""
        sizes = [*shape, *[1] * (4 - len(shape))]
        for axis, places, size in zip(AXES, self.places.shape, sizes, strict=True):
            if places not in (1, size) and not self.repeats:
                raise ValueError(
                    f"Layer {layer!r} has a weight of {list(shape)}, so {size} {axis}{'s' * (size != 1)}; the mosaic"
                    f" {self.name!r} names {places}. Give one multiplier for each."
                )

    def __repr__(self) -> str:
        power = "unknown power" if self.power_mw is None else f"{self.power_mw:.3f} mW"
        return f"Mosaic({self.name!r}, {power})"


def mosaic_name(names: Sequence[str] | Sequence[Sequence[str]], by: str = "filter") -> str:
    """What an assignment calls a mosaic: its axes, and its multipliers along them, repeated ones counted.

    Args:
        names: of multipliers, one for each place along the axis; nested, the last axis innermost, for several.
        by: ``"filter"``, ``"channel"``, ``"row"`` or ``"column"``, or several joined by ``+`` in that order.

    Returns:
        The name; the multiplier's own if all places have the same one.

    Raises:
        ValueError: for an axis that does not exist, or nested lists of unequal length.

    >>> mosaic_name(["mul8s_1KV6", "mul8s_1L2L", "mul8s_1L2L"])
    'filter[mul8s_1KV6, 2 mul8s_1L2L]'
    >>> mosaic_name([["pr(0,1)", "pr(0,2)"], ["pr(0,2)", "pr(0,1)"]], by="filter+row")
    'filter*2+row*2[pr(0,1), 2 pr(0,2), pr(0,1)]'
    """
    axes = by.split("+")
    _check_axes(by, axes)
    sizes, flat = [], list(names)
    for depth in range(len(axes)):
        sizes.append(len(flat[0]) if depth and flat and isinstance(flat[0], list | tuple) else len(flat))
        if depth:
            if any(not isinstance(part, list | tuple) or len(part) != sizes[-1] for part in flat):
                raise ValueError(f"The names along {axes[depth]} differ in number; give lists of equal length.")
            flat = [name for part in flat for name in part]
    if not flat or not all(isinstance(name, str) for name in flat):
        raise ValueError(f"{by!r} asks for lists of names {len(axes)} deep; give one name for each place.")
    if len(set(flat)) == 1:
        return flat[0]
    runs: list[list] = []
    for name in flat:
        if runs and runs[-1][1] == name:
            runs[-1][0] += 1
        else:
            runs.append([1, name])
    written = ", ".join(name if count == 1 else f"{count} {name}" for count, name in runs)
    pairs = zip(axes, sizes, strict=True)
    return f"{by if len(axes) == 1 else '+'.join(f'{axis}*{size}' for axis, size in pairs)}[{written}]"


def signs(multiplier: Multiplier) -> Mosaic:
    """``signs:...``: one circuit, and every other input channel of a layer negated together with its weights.

    In a grouped convolution that is every other channel of each group: a depthwise one stays as it is.

    >>> from axmoe_lite import multiplier
    >>> signs(multiplier("mul8s_1L2L"))
    Mosaic('signs:mul8s_1L2L', 0.200 mW)
    """
    both = (multiplier, multiplier.negated())
    return Mosaic(f"signs:{multiplier.name}", both, torch.arange(2).view(1, 2, 1, 1), repeats=True)


def parse_mosaic(name: str) -> tuple[list[str], Tensor, bool] | None:
    """Names, places and whether they repeat, of a :class:`Mosaic`, from its name; None if it is no such name.

    Raises:
        ValueError: for a name that begins like a mosaic's and is not one.
    """
    found = re.fullmatch(r"((?:[a-z]+(?:\*\d+)?)(?:\+[a-z]+(?:\*\d+)?)*)\[(.*)\]", name)
    if not found:
        return None
    axes, sizes = zip(*((part.partition("*")[::2]) for part in found[1].split("+")), strict=True)
    _check_axes(found[1], axes)
    flat: list[str] = []
    parts = re.split(r",\s*(?![^()]*\))", found[2])  # commas inside parentheses belong to a family's numbers
    repeats = len(parts) > 1 and parts[-1].strip() == "..."
    if repeats and len(axes) > 1:
        raise ValueError(f"{name!r} repeats along {len(axes)} axes; one can, as in 'channel[drum(4), roba(), ...]'.")
    for part in parts[: len(parts) - repeats]:
        count, _, rest = part.strip().rpartition(" ")
        if not rest or not re.fullmatch("[1-9][0-9]{0,8}", count or "1") or "[" in rest:
            raise ValueError(f"{part.strip()!r} in {name!r} is no count and name, such as '3 mul8s_1L2J'.")
        if len(flat) + int(count or 1) > MOST_PLACES:  # before the memory is full of them
            raise ValueError(f"{name!r} names more than {MOST_PLACES:,} places; no layer has so many weights.")
        flat += [rest] * int(count or 1)
    lengths = [int(size) if size else len(flat) for size in sizes]
    if math.prod(lengths) != len(flat):
        raise ValueError(f"{name!r} names {len(flat)} places; its axes have {' x '.join(map(str, lengths))}.")
    known = sorted(set(flat))
    shape = [dict(zip(axes, lengths, strict=True)).get(axis, 1) for axis in AXES]
    return known, torch.tensor([known.index(one) for one in flat]).view(shape), repeats


def _check_axes(by: str, axes: Sequence[str]) -> None:
    if not axes or list(axes) != [axis for axis in AXES if axis in axes]:
        raise ValueError(
            f"A mosaic by {by!r} was asked for; its axes are {', '.join(AXES)}, joined by + in this order."
        )

"""A pool: what each of several networks answered on the same images, what it costs, and what perfect choice would do.

    routes(correct)          the cheapest network that is right, image by image: what a dispatcher is to learn
    ideal(pool)              accuracy and cost if it learned it perfectly
    patterns(correct)        who is right together with whom
    members(pool)            which networks are on the front, and what each adds that no other has
    thirds(n)                images that teach the dispatcher, images that choose among dispatchers, images for the
    figure

A network that dominates another, cheaper and more often right, may still need it: what counts is the images that only
the other gets right.

Letters: n images, N networks, F features.

Source: PERTINENCE (arXiv 2507.01695, v3).

Chapter: 18, "Which network for which input?"
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from axmoe_lite.search import additive
from axmoe_lite.search.trial import digest


@dataclass(frozen=True, eq=False)
class Pool:
    """What is known of N networks on n held-out images; made by :func:`~axmoe_lite.search.pertinence.look`, or by hand.

    Args:
        names: of the networks, from the cheapest to the dearest, at least two.
        cost: float64 [N], what one image costs, in any unit; positive.
        correct: bool [n, N], which network is right on which image.
        features: float32 [n, F], what the dispatcher sees of an image.
        extractor: the network of the pool whose features these are; None: one that is not in the pool.
        extractor_cost: of the features of one image, in the unit of ``cost``. Of a network of the pool it is that of
            all layers up to the features, so not more than the whole network.
        confidence: float32 [n, N], the highest class probability of each network, in [0, 1]; None: not known.
        product: what one exact multiplication costs in the unit of ``cost``, for the dispatcher's own layer.

    Raises:
        ValueError: for fewer than two networks, lengths that do not fit, networks that are not sorted, costs or
            features that are no numbers, or an extractor that is not in the pool.

    >>> pool = Pool(("small", "large"), [1, 3], [[1, 1], [0, 1], [0, 0], [1, 0]], torch.zeros(4, 2), "small", 0.9)
    >>> pool.accuracy, pool.paid.tolist()  # the layer's four products are cheap; "large" pays for the features too
    ((0.5, 0.5), [1.000004, 3.900004])
    """

    names: tuple[str, ...]
    cost: Tensor
    correct: Tensor
    features: Tensor
    extractor: str | None
    extractor_cost: float
    confidence: Tensor | None = None
    product: float = 1e-6

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "names", tuple(self.names))
        set_(self, "cost", torch.as_tensor(self.cost, dtype=torch.float64))
        set_(self, "correct", torch.as_tensor(self.correct).bool())
        set_(self, "features", torch.as_tensor(self.features))
        if self.confidence is not None:
            set_(self, "confidence", torch.as_tensor(self.confidence))
        check_names(self.names)
        _check_shapes(self)
        _check_costs(self)

    def __len__(self) -> int:
        """How many images."""
        return len(self.correct)

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Of each network alone, in [0, 1]."""
        return tuple(self.correct.double().mean(0).tolist())

    @property
    def layer_cost(self) -> float:
        """Of the dispatcher's layer for one image: F N multiplications."""
        return self.features.shape[1] * len(self.names) * self.product

    @property
    def paid(self) -> Tensor:
        """float64 [N]: an image that is sent to network i costs extractor + layer + network i.

        If network i is the extractor, what it has computed already is not paid for again.
        """
        paid = self.cost + self.extractor_cost + self.layer_cost
        if self.extractor is not None:
            own = self.names.index(self.extractor)
            paid[own] = self.cost[own] + self.layer_cost
        return paid

    def only(self, names: Iterable[str]) -> "Pool":
        """The same with some of its networks; an extractor that is not among them becomes one from outside.

        >>> pool = Pool("abc", [1, 2, 3], torch.eye(3), torch.zeros(3, 1), "a", 0.5)
        >>> pool.only(["c", "b"]).names, pool.only(["b", "c"]).extractor, pool.only(["b", "c"]).extractor_cost
        (('b', 'c'), None, 0.5)
        """
        wanted = {find(name, self.names, "network of the pool") for name in names}
        kept = [i for i, name in enumerate(self.names) if name in wanted]
        return replace(
            self,
            names=tuple(self.names[i] for i in kept),
            cost=self.cost[kept],
            correct=self.correct[:, kept],
            confidence=None if self.confidence is None else self.confidence[:, kept],
            extractor=self.extractor if self.extractor in wanted else None,
        )

    def with_confidence(self) -> "Pool":
        """The same, but the dispatcher also sees how sure the extractor is of its own answer. Not from the paper.

        How sure a network is depends on the lead of its best class over the next, whichever they are, and no linear
        layer on the features can say that. It costs the extractor's last layer, so the extractor is paid for whole.

        Raises:
            ValueError: if the extractor is not in the pool, or confidences are not known.

        >>> pool = Pool("ab", [1, 3], [[1, 1], [0, 1]], torch.zeros(2, 4), "a", 0.9, torch.tensor([[0.8, 1], [0.3, 1]]))
        >>> more = pool.with_confidence()
        >>> [round(value, 1) for value in more.features[:, -1].tolist()], more.extractor_cost
        ([0.8, 0.3], 1.0)
        """
        if self.extractor is None or self.confidence is None:
            raise ValueError(
                f"The extractor is {self.extractor!r}, the confidence {'not ' if self.confidence is None else ''}known;"
                " an extractor of the pool is needed, and confidences as look() gives them."
            )
        own = self.names.index(self.extractor)
        sure = self.confidence[:, own, None].to(self.features.dtype)
        return replace(self, features=torch.cat([self.features, sure], 1), extractor_cost=self.cost[own].item())


# ---------------------------------------------------------------------------------- what choice could do


def routes(correct: Tensor) -> Tensor:
    """The network that each image should go to, int64 [n]: the cheapest that is right; where none is, the cheapest.

    Args:
        correct: bool [n, N], from the cheapest network to the dearest.

    >>> routes(torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()).tolist()
    [0, 1, 2, 0]
    """
    return correct.to(torch.uint8).argmax(1)  # of equal values the first


@dataclass(frozen=True)
class Ideal:
    """A dispatcher that is never wrong about the networks: none is right more often, and none as often for less.

    Attributes:
        accuracy: the share of images on which any network is right.
        cost: mean cost of the routed network alone: who knows the answer needs neither features nor a layer.
        cost_paid: the same for a perfect dispatcher that pays for features and layer. Of the networks that are right it
            takes the one with the least :attr:`Pool.paid`, which may be the extractor where the cheapest is another.
        shares: of the images that go to each network, by :func:`routes`.
    """

    accuracy: float
    cost: float
    cost_paid: float
    shares: dict[str, float]


def ideal(pool: Pool, which: Tensor | None = None) -> Ideal:
    """The dispatcher that always chooses the cheapest network that is right, on all images or on some.

    >>> found = ideal(Pool("ab", [1, 3], [[1, 1], [0, 1], [0, 0], [1, 0]], torch.zeros(4, 1), None, 0.5, product=0))
    >>> found.accuracy, found.cost, found.cost_paid, found.shares
    (0.75, 1.5, 2.0, {'a': 0.75, 'b': 0.25})
    """
    correct = pool.correct if which is None else pool.correct[which]
    shares = torch.bincount(routes(correct), minlength=len(pool.names)).double() / len(correct)
    least = torch.where(correct, pool.paid, torch.inf).amin(1)
    return Ideal(
        accuracy=correct.any(1).double().mean().item(),
        cost=(shares @ pool.cost).item(),
        cost_paid=torch.where(least.isfinite(), least, pool.paid.min()).mean().item(),
        shares=dict(zip(pool.names, shares.tolist(), strict=True)),
    )


def patterns(correct: Tensor) -> dict[str, int]:
    """How many images each set of networks gets right: ``"TF"`` is right by the first, wrong by the second.

    Patterns that no image has are left out; those with the cheapest right come first.

    >>> patterns(torch.tensor([[1, 0], [1, 1], [0, 0], [1, 1]]).bool())
    {'TT': 2, 'TF': 1, 'FF': 1}
    """
    found, counts = torch.unique(correct, dim=0, return_counts=True)
    named = ["".join("FT"[right] for right in row) for row in found.int().tolist()]
    return dict(sorted(zip(named, counts.tolist(), strict=True), reverse=True))


def members(pool: Pool, which: Tensor | None = None) -> list[dict]:
    """What each network is worth in the pool, on all images or on some.

    Returns:
        A dict each: ``name``, ``cost``, ``accuracy``; ``on_front``, whether no network is at most as dear and at least
        as good; ``routed``, the share of images that should go there; ``alone``, how many images only this network gets
        right: what the ideal loses without it. A network off the front is worth keeping for these, and where ``routed``
        says that it is the cheapest right one before a dearer.

    >>> rows = members(Pool("abc", [1, 2, 3], [[0, 1, 0], [1, 0, 1], [1, 0, 1]], torch.zeros(3, 1), None, 1))
    >>> [(row["name"], row["on_front"], row["alone"]) for row in rows]
    [('a', True, 0), ('b', False, 1), ('c', False, 0)]
    """
    correct = pool.correct if which is None else pool.correct[which]
    accuracy = correct.double().mean(0)
    front = additive.undominated(pool.cost.numpy(), 1 - accuracy.numpy()).tolist()
    alone = (correct & (correct.sum(1, keepdim=True) == 1)).sum(0).tolist()
    routed = ideal(pool, which).shares
    return [
        {
            "name": name,
            "cost": pool.cost[i].item(),
            "accuracy": accuracy[i].item(),
            "on_front": i in front,
            "routed": routed[name],
            "alone": alone[i],
        }
        for i, name in enumerate(pool.names)
    ]


# ---------------------------------------------------------------------------------- which images for what


@dataclass(frozen=True, eq=False)
class Split:
    """Which images are for what: int64 indices, no image in two parts, none of them empty.

    Attributes:
        fit: teach a dispatcher's layer.
        search: choose among dispatchers.
        final: are looked at once, for the figure.
    """

    fit: Tensor
    search: Tensor
    final: Tensor

    def __post_init__(self) -> None:
        for part in ("fit", "search", "final"):
            found = torch.as_tensor(getattr(self, part))
            if found.ndim != 1 or not len(found) or found.dtype not in (torch.int64, torch.int32) or found.min() < 0:
                raise ValueError(
                    f"{part} is {found.dtype} {list(found.shape)}; it holds indices of images, at least one."
                )
            object.__setattr__(self, part, found.long())
        everything = torch.cat([self.fit, self.search, self.final])
        if len(everything.unique()) < len(everything):
            raise ValueError(
                f"The parts hold {len(everything)} indices, but only {len(everything.unique())} different ones; an"
                " image that taught or chose a dispatcher says nothing honest about it. thirds() makes disjoint parts."
            )

    @property
    def digest(self) -> str:
        """Sixteen letters that differ where the parts do."""
        return digest([self.fit, self.search, self.final])

    def check_fits(self, n: int) -> None:
        """Raise ValueError if there are not as many images."""
        last = max(int(part.max()) for part in (self.fit, self.search, self.final))
        if last >= n:
            raise ValueError(f"The split names image {last}, but the pool has {n}, from 0 to {n - 1}.")


def thirds(n: int, *, shares: Sequence[float] = (0.5, 0.2, 0.3), seed: int = 0) -> Split:
    """n images in three random parts: to fit, to search, and for the final figure.

    Not from the paper, whose shares are not known to us: of a test set seven tenths for all that is learned and chosen,
    of which five teach the layer and two choose among layers, and three tenths that are looked at once.

    Raises:
        ValueError: for shares that are not three positive numbers with the sum 1, or parts without an image.

    >>> split = thirds(10)
    >>> len(split.fit), len(split.search), len(split.final)
    (5, 2, 3)
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(
            f"shares is {shares!r}; give three positive numbers with the sum 1, for fit, search and final."
        )
    fit, final = round(n * shares[0]), round(n * shares[2])
    if min(fit, n - fit - final, final) < 1:
        raise ValueError(f"{n} images in shares of {shares!r} leave a part without any; give more images.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Split(*(part.sort().values for part in order.split([fit, n - fit - final, final])))


# ---------------------------------------------------------------------------------- checks


def find(name: str, known: Sequence[str], kind: str) -> str:
    """The name, or ValueError with the nearest one: ``No network of the pool is called ...``."""
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
        raise ValueError(f"No {kind} is called {name!r}; there are {', '.join(known)}. Did you mean {near[0]!r}?")
    return name


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError unless there is a choice: two different names or more."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"The pool has the networks {', '.join(names) or 'none'}; choosing needs at least two, each once."
        )


def _check_shapes(pool: Pool) -> None:
    n, N = len(pool.correct), len(pool.names)
    wanted = {"cost": [N], "correct": [n, N], "features": [n, *pool.features.shape[1:2]]}
    if pool.confidence is not None:
        wanted["confidence"] = [n, N]
    for field, shape in wanted.items():
        if list(getattr(pool, field).shape) != shape or 0 in shape:
            raise ValueError(
                f"{field} is of shape {list(getattr(pool, field).shape)}; with {N} names and {n} images in correct"
                f" it must be {'[n, F]' if field == 'features' else shape}, and not empty."
            )
    if pool.features.ndim != 2 or not pool.features.isfinite().all():
        raise ValueError(
            f"features must be finite numbers [n, F]; these are {list(pool.features.shape)}, or not finite."
        )


def _check_costs(pool: Pool) -> None:
    cost = pool.cost.numpy()
    if not np.isfinite(cost).all() or cost.min() <= 0 or (np.diff(cost) < 0).any():
        raise ValueError(f"cost is {cost.tolist()}; give positive numbers, from the cheapest network to the dearest.")
    if not 0 <= pool.extractor_cost < np.inf or not 0 <= pool.product < np.inf:
        raise ValueError(
            f"extractor_cost is {pool.extractor_cost}, product {pool.product}; neither can be negative or infinite."
        )
    if pool.extractor is None:
        return
    own = cost[pool.names.index(find(pool.extractor, pool.names, "network of the pool"))]
    if pool.extractor_cost > own * (1 + 1e-9):
        raise ValueError(
            f"extractor_cost is {pool.extractor_cost}, but all of {pool.extractor!r} costs {own}; its features are a"
            " part of it. Give extractor=None for features from elsewhere."
        )

"""Who goes where: what a gate decided, items sorted by expert and put back, and how even the load is.

Letters: E experts; I items (images or tokens).

Chapter: 07, "What if only some of the network answers?"
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Routing:
    """What a gate decided for the items of one call.

    Attributes:
        probabilities: [I, E], rows summing to 1; with the gradient where there is one.
        choice: int64 [I], the expert of the highest probability (the first of several).
    """

    probabilities: Tensor
    choice: Tensor

    @classmethod
    def of(cls, probabilities: Tensor) -> "Routing":
        """From probabilities alone."""
        return cls(probabilities, probabilities.argmax(-1))


class _Reorder(torch.autograd.Function):
    """x[order] for a permutation. Its gradient is a reordering too, where indexing would add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad[order.argsort()], None


def dispatch(items: Tensor, choice: Tensor, experts: int) -> tuple[list[Tensor], Tensor]:
    """Sort items by the expert they go to, so that each expert computes one batch.

    Args:
        items: [I, ...].
        choice: int64 [I], in 0..experts - 1.
        experts: E.

    Returns:
        E tensors [I_e, ...], some perhaps empty, and the order [I] that :func:`combine` needs.

    >>> parts, order = dispatch(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([2, 0, 2]), experts=3)
    >>> [part.tolist() for part in parts]
    [[20.0], [], [10.0, 30.0]]
    >>> combine(parts, order).tolist()
    [10.0, 20.0, 30.0]
    """
    order = choice.argsort(stable=True)
    counts = torch.bincount(choice, minlength=experts)
    return list(_Reorder.apply(items, order).split(counts.tolist())), order


def combine(answers: Sequence[Tensor], order: Tensor) -> Tensor:
    """Put the experts' answers, in the experts' order, back in the order of the items: [I, ...]."""
    # An empty answer says nothing, but with one among them torch.cat forgets channels_last.
    full = [answer for answer in answers if len(answer)] or list(answers)
    return _Reorder.apply(torch.cat(full), order.argsort())


def load_balance(routing: Routing) -> Tensor:
    """E * sum over e of f_e P_e: 1 when the load is even, E when one expert gets all. Fedus et al. (2022), eq. (4).

    f_e is the share of items that go to e, P_e the mean of its probability, which carries the gradient. 0 where
    nothing was routed.

    >>> load_balance(Routing.of(torch.tensor([[0.9, 0.1], [0.2, 0.8]]))).item()  # 2 (0.5 * 0.55 + 0.5 * 0.45)
    1.0
    """
    items, E = routing.probabilities.shape
    counts = torch.bincount(routing.choice, minlength=E)
    return E * (counts / max(1, items) * routing.probabilities.sum(0) / max(1, items)).sum()


@dataclass(frozen=True)
class RoutingStatistics:
    """How a mixture routes.

    Attributes:
        items: how many were routed.
        load: the share that went to each expert, E numbers summing to 1.
        importance: the mean probability of each expert, E numbers summing to 1.
        balance: entropy of the load over log E: 1 even, 0 all to one.
        entropy: mean entropy of an item's probabilities over log E: 0 where the gate is sure.
        confidence: mean probability of the chosen expert, in 1/E..1.
    """

    items: int
    load: tuple[float, ...]
    importance: tuple[float, ...]
    balance: float
    entropy: float
    confidence: float


def statistics(routings: Sequence[Routing]) -> RoutingStatistics:
    """Of all calls that :func:`watching` noted for one mixture.

    >>> statistics([Routing.of(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))])
    RoutingStatistics(items=4, load=(0.5, 0.5), importance=(0.5, 0.5), balance=1.0, entropy=0.0, confidence=1.0)
    """
    if not routings or not sum(len(routing.choice) for routing in routings):
        raise ValueError("Nothing was routed while watching; run the network on some images inside `with watching`.")
    p = torch.cat([routing.probabilities.detach().double().cpu() for routing in routings])
    choice = torch.cat([routing.choice.cpu() for routing in routings])
    load = torch.bincount(choice, minlength=p.shape[1]).double() / len(choice)
    most = math.log(p.shape[1]) or 1.0  # one expert: log 1 = 0
    return RoutingStatistics(
        items=len(choice),
        load=tuple(load.tolist()),
        importance=tuple(p.mean(0).tolist()),
        balance=(torch.special.entr(load).sum() / most).item(),
        entropy=(torch.special.entr(p).sum(1).mean() / most).item(),
        confidence=p.gather(1, choice[:, None]).mean().item(),
    )

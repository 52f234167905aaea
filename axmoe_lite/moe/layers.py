"""Gates, and the three kinds of mixtures.

Letters: N images, C channels, H x W pixels; B batch, T tokens, D features, E experts; I items.

Chapter: 07, "What if only some of the network answers?"
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from axmoe_lite.moe.routing import Routing, combine, dispatch

GATES = ("linear", "mlp", "standardised")
ITEMS = ("image", "token")
WEIGHTINGS = ("probability", "straight-through")


def check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(repr, allowed))}.")


class _Standardise(nn.Module):
    """Features minus their running mean, over their running deviation; unlike BatchNorm also while training."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("square", torch.ones(features))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take the items [I, features] of a batch into account: all batches alike at first, then the last hundred."""
        if len(x):
            self.updates += 1
            share = max(0.01, 1 / int(self.updates))
            self.mean.lerp_(x.mean(0), share)
            self.square.lerp_((x**2).mean(0), share)

    def forward(self, x: Tensor) -> Tensor:
        variance = (self.square - self.mean**2).clamp_min(1e-6)
        return (x - self.mean) * variance.rsqrt()


class Gate(nn.Module):
    """Probabilities of the experts from an input: [N, C, H, W] or [B, T, D] to [I, E].

    Always in the type of its weights, so in float32 under autocast too.

    Args:
        features: C or D.
        experts: E.
        kind: ``"linear"``, one linear layer; ``"mlp"``, two with a ReLU between (``features`` hidden); or
            ``"standardised"``, a linear layer on features of mean 0 and deviation 1: after a ReLU the mean of a
            channel hides how images differ, and one expert then tends to get them all.
        per: ``"image"``, from the mean over pixels or tokens (I = N or B); or ``"token"`` (I = B T).
        jitter: while training, features are multiplied by random numbers in 1 - jitter .. 1 + jitter, so that
            an expert with a near miss is tried too (Fedus et al., 2022).

    Not from the paper: all of these; a linear layer on the mean is the field's usual choice.
    """

    def __init__(
        self, features: int, experts: int, *, kind: str = "linear", per: str = "image", jitter: float = 0.0
    ) -> None:
        super().__init__()
        check_option("gate", kind, GATES)
        check_option("per", per, ITEMS)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is {jitter}; it lies in 0..1, 1 left out.")
        self.per, self.jitter = per, jitter
        self.learns = True  # until gates_frozen()
        linear = nn.Linear(features, experts)
        before = {
            "linear": [],
            "mlp": [nn.Linear(features, features), nn.ReLU()],
            "standardised": [_Standardise(features)],
        }[kind]
        self.score = nn.Sequential(*before, linear) if before else linear

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(_type(self))
            if x.ndim == 4:
                x = x.mean((2, 3))
            elif self.per == "token":
                x = x.flatten(0, -2)
            elif x.ndim == 3:
                x = x.mean(1)
            if self.training and self.learns and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            if self.training and self.learns:
                for standard in (m for m in self.score.modules() if isinstance(m, _Standardise)):
                    standard.update(x)
            return self.score(x).softmax(-1)

    def extra_repr(self) -> str:
        return f"per={self.per!r}, jitter={self.jitter}"


class Mixture(nn.Module):
    """What the three kinds share: experts, and somebody who may want to see how they are chosen."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if not len(self.experts):
            raise ValueError("A mixture was given no experts; it needs at least 1.")
        self.seen: list[Routing] | None = None  # set by watching()
        self.also = (
            ""  # set by no_idle_experts() and all_experts(): whether "idle" experts run too, or "all" on everything
        )

    def _route(self, probabilities: Tensor) -> Routing:
        routing = Routing.of(probabilities)
        if self.seen is not None:
            self.seen.append(routing)
        return routing

    def _top_one(self, items: Tensor, choice: Tensor) -> Tensor:
        """Each item through its expert: [I, ...] to [I, ...]."""
        parts, order = dispatch(items, choice, len(self.experts))
        # Its own items apart from the others: in a larger batch, floats may be added up in another order.
        for e, (expert, part) in enumerate(zip(self.experts, parts, strict=True)):
            if len(part) < len(items) and (self.also == "all" or (self.also == "idle" and not len(part))):
                expert(items[choice != e])
        return combine(_answers(self.experts, parts), order)


class HardMoE(Mixture):
    """Top-1 routing: only the chosen expert computes, and its answer is scaled by its probability.

    Items are grouped by expert: E products of I_e items each, none of masked zeros. No item is dropped,
    whatever the load (Switch Transformer has a capacity; AxMoE's is not known to us).

    Args:
        experts: modules of the same input and output.
        gate: with ``per="image"`` for [N, C, H, W], ``"token"`` or ``"image"`` for [B, T, D].
        weighting: ``"probability"``; or ``"straight-through"``, which leaves the answer as it is and lets
            only the gradient pass through the probability, so that copies of a dense layer begin as that layer.

    >>> layer = HardMoE([nn.Linear(2, 3) for _ in range(4)], Gate(2, 4, per="token"))
    >>> layer(torch.zeros(5, 7, 2)).shape
    torch.Size([5, 7, 3])
    """

    def __init__(self, experts: Iterable[nn.Module], gate: Gate, *, weighting: str = "probability") -> None:
        super().__init__(experts)
        check_option("weighting", weighting, WEIGHTINGS)
        self.gate, self.weighting = gate, weighting

    def forward(self, x: Tensor) -> Tensor:
        routing = self._route(self.gate(x))
        by_token = self.gate.per == "token" and x.ndim != 4
        y = self._top_one(x.flatten(0, -2) if by_token else x, routing.choice)
        weight = routing.probabilities.gather(1, routing.choice[:, None]).flatten()
        if self.weighting == "straight-through":
            weight = weight / weight.detach()
        y = y * _beside(weight, y)
        return y.unflatten(0, x.shape[:-1]) if by_token else y


class SoftMoE(Mixture):
    """All experts compute; y = sum over e of p_e(x) E_e(x). It costs E times the dense layer's products.

    With exact arithmetic this equals one expert with weights mixed by p; with an approximate multiplier it
    does not, and every expert's own products are what is computed here.

    >>> layer = SoftMoE([nn.Conv2d(3, 8, 3) for _ in range(2)], Gate(3, 2))
    >>> layer(torch.zeros(5, 3, 6, 6)).shape
    torch.Size([5, 8, 4, 4])
    """

    def __init__(self, experts: Iterable[nn.Module], gate: Gate) -> None:
        super().__init__(experts)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        routing = self._route(self.gate(x))
        by_token = self.gate.per == "token" and x.ndim != 4
        items, y = x.flatten(0, -2) if by_token else x, None
        for expert, weight in zip(self.experts, routing.probabilities.unbind(1), strict=True):
            answer = expert(items)
            answer = answer * _beside(weight, answer)
            y = answer if y is None else y + answer
        return y.unflatten(0, x.shape[:-1]) if by_token else y


class ClusterMoE(Mixture):
    """A gateway network sends each image to one whole network; [N, C, H, W] to that network's scores.

    The gateway is trained before and by itself: here it is frozen, in evaluation mode, and without gradient.

    Args:
        experts: networks of the same input and output.
        gateway: [N, C, H, W] to a score for each expert, [N, E].

    >>> gateway = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    >>> network = ClusterMoE([nn.Sequential(nn.Flatten(), nn.Linear(12, 10)) for _ in range(2)], gateway)
    >>> network(torch.zeros(5, 3, 2, 2)).shape
    torch.Size([5, 10])
    """

    def __init__(self, experts: Iterable[nn.Module], gateway: nn.Module) -> None:
        super().__init__(experts)
        self.gateway = gateway.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ClusterMoE":
        super().train(mode)
        self.gateway.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            scores = self.gateway(x.to(_type(self.gateway)))
        if scores.shape != (len(x), len(self.experts)):
            raise ValueError(
                f"The gateway answers with {list(scores.shape)} for {len(x)} images; with {len(self.experts)} experts"
                f" it must be [{len(x)}, {len(self.experts)}]."
            )
        return self._top_one(x, self._route(scores.softmax(-1)).choice)


class GroupedScores(nn.Module):
    """Scores of classes to scores of clusters of classes: [N, classes] to [N, E], log-sum-exp over each cluster.

    With it a classifier becomes a gateway: softmax of the result is the probability that the class lies in e.

    Args:
        cluster_of_class: for each class the number of its cluster, from 0; every cluster has a class.

    >>> GroupedScores([0, 1, 0])(torch.tensor([[0.0, 0.0, 0.0]])).softmax(-1)
    tensor([[0.6667, 0.3333]])
    """

    def __init__(self, cluster_of_class: Sequence[int]) -> None:
        super().__init__()
        clusters = torch.as_tensor(cluster_of_class)
        E = int(clusters.max()) + 1 if len(clusters) else 0
        if E == 0 or sorted(set(clusters.tolist())) != list(range(E)):
            raise ValueError(
                f"Clusters of classes are numbered from 0 without gaps; these are {sorted(set(clusters.tolist()))}."
            )
        self.register_buffer("outside", clusters[None, :] != torch.arange(E)[:, None])

    def forward(self, scores: Tensor) -> Tensor:
        return scores[:, None, :].masked_fill(self.outside, -torch.inf).logsumexp(-1)


def _answers(experts: Iterable[nn.Module], parts: Sequence[Tensor]) -> list[Tensor]:
    """Each expert on its part; an expert without items does not run (unless nobody has any)."""
    experts = list(experts)
    busy = [(expert, part) for expert, part in zip(experts, parts, strict=True) if len(part)]
    return [expert(part) for expert, part in busy or [(experts[0], parts[0])]]


def _type(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)


def _beside(weight: Tensor, y: Tensor) -> Tensor:
    """[I] as [I, 1, ...], to be multiplied with y [I, ...], in y's type."""
    return weight.to(y.dtype).view(-1, *[1] * (y.ndim - 1))

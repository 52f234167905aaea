"""A dispatcher is one linear layer on frozen features: a whole population of them is trained at once.

    labels = routes(pool.correct)[split.fit]
    weights = class_weights(labels, N, "INS")                   float64 [N]
    layers = fit(pool.features[split.fit], labels, P[None], weights[None])
    choices = choose(layers, pool.features)                     int64 [S, n]

An image whose best network is t, sent to network p, costs the training

    L = 0  if p = t,  else  w[t] P[t, p] (-log softmax(scores)[t])                                   (1)

averaged over the batch: P[t, p] with p cheaper than t is the price of a wrong answer, with p dearer that of wasted
products. S layers read the same batches, so their scores are one product [B, F] x [F, S N]; and as no layer's loss
depends on another's weights, the gradient of the sum of losses is each layer's own.

Letters: n images, N networks, F features, S layers, B images of a batch.

Source: PERTINENCE (arXiv 2507.01695, v3). Not from the paper: Adam, its rate, the batches.

Chapter: 18, "Which network for which input?"
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from axmoe_lite import moe
from axmoe_lite.search.pertinence.pool import Pool

WEIGHTINGS = ("INS", "ISNS", "ENS")
NEARLY = 1e-6  # a feature that varies by less than this share of its largest value tells nothing


@dataclass(frozen=True, eq=False)
class Layers:
    """S linear layers: weight [S, N, F] and bias [S, N]."""

    weight: Tensor
    bias: Tensor

    def __len__(self) -> int:
        """S, how many layers."""
        return len(self.weight)

    def at(self, which: list[int] | Tensor) -> "Layers":
        """Some of them."""
        return Layers(self.weight[which], self.bias[which])


def class_weights(labels: Tensor, networks: int, kind: str, *, beta: float = 0.999) -> Tensor:
    """How much an image counts by its route label, so that rare labels are not drowned: float64 [N].

    With n_c images of label c: ``"INS"`` 1 / n_c, ``"ISNS"`` 1 / sqrt(n_c), ``"ENS"`` (1 - beta) / (1 - beta^n_c).
    They are scaled so that the mean over the images is 1 (not from the paper; Adam is indifferent to the scale of a
    loss, so it is for the eye). A network that is the best for no image has no image to be weighted, and weight 0.

    Args:
        labels: int64 [n], of :func:`~axmoe_lite.search.pertinence.routes`; at least one.
        networks: N.
        beta: of ``"ENS"``, in [0, 1). Not from the paper: 0.999.

    Raises:
        ValueError: for another kind, beta or no labels.

    >>> class_weights(torch.tensor([0, 0, 0, 1]), 3, "INS").tolist()  # of 3 and 1: 1/3 and 1, with mean 1/2
    [0.6666666666666666, 2.0, 0.0]
    """
    moe.check_option("kind", kind, WEIGHTINGS)
    if not 0 <= beta < 1 or not len(labels) or int(labels.max()) >= networks:
        raise ValueError(
            f"class_weights() was given beta = {beta} and {len(labels)} labels for {networks} networks; beta lies in"
            " [0, 1), and at least one label, each below the number of networks, is needed."
        )
    counts = torch.bincount(labels, minlength=networks).double()
    raw = {"INS": 1 / counts, "ISNS": counts.rsqrt(), "ENS": (1 - beta) / (1 - beta**counts)}[kind]
    raw = torch.where(counts > 0, raw, 0.0)
    return raw * len(labels) / (raw @ counts)


def loss(scores: Tensor, labels: Tensor, penalties: Tensor, weights: Tensor) -> Tensor:
    """Equation (1), averaged over the batch, one number a layer: [S].

    Args:
        scores: [B, S, N].
        labels: int64 [B].
        penalties: [S, N, N], by true and by predicted label.
        weights: [S, N].

    >>> scores = torch.log(torch.tensor([[[0.25, 0.75]], [[0.25, 0.75]]]))
    >>> P, w = torch.tensor([[[0.0, 10.0], [9.0, 0.0]]]), torch.tensor([[2.0, 1.0]])
    >>> loss(scores, torch.tensor([0, 1]), P, w).item()  # (2 * 10 * log 4 + 0) / 2
    13.862943649291992
    """
    S = scores.shape[1]
    layer, true = torch.arange(S, device=scores.device)[None, :], labels[:, None].expand(-1, S)
    predicted = scores.argmax(2)
    factor = weights[layer, true] * penalties[layer, true, predicted] * (predicted != true)
    surprise = scores.logsumexp(2) - scores.gather(2, true[:, :, None]).squeeze(2)
    return (factor * surprise).sum(0) / len(scores)


def fit(
    features: Tensor,
    labels: Tensor,
    penalties: Tensor,
    weights: Tensor,
    *,
    epochs: int = 20,
    lr: float = 1e-3,
    batch: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Layers:
    """Train S layers at once by Adam, each as if it were alone.

    All begin with the same random weights (those of ``nn.Linear``: uniform up to 1 / sqrt(F)) and see the same batches
    in the same order, so what a layer becomes depends on its penalties and weights alone, and two layers differ because
    these do. Features are standardised by the mean and deviation of these images, which the returned layers have folded
    in; a feature that does not vary over them gets weight 0.

    Args:
        features: float [n, F]; the layers have its type.
        labels: int64 [n], in 0..N - 1. A label that no image has is never learned.
        penalties: [S, N, N], not negative, by true and by predicted label; the diagonal is never asked for.
        weights: [S, N], not negative, of :func:`class_weights`.
        epochs: passes over the images. The paper: 20.
        lr, batch: Adam's rate, images a step.
        seed: of the first weights and of the batches.

    Raises:
        ValueError: for shapes that do not fit, negative or infinite numbers, or options out of range.

    >>> x = torch.tensor([[-1.0], [1.0]]).repeat(64, 1)
    >>> layers = fit(x, (x[:, 0] > 0).long(), torch.ones(1, 2, 2), torch.ones(1, 2), epochs=200, batch=32, lr=0.01)
    >>> choose(layers, torch.tensor([[-3.0], [2.0]])).tolist()
    [[0, 1]]
    """
    _check(features, labels, penalties, weights)
    check_training(epochs=epochs, lr=lr, batch=batch)
    (S, N), (n, F) = weights.shape, features.shape
    mean, scale = _standard(features)
    x = (features - mean) * scale
    penalties, weights = (t.to(x.device, x.dtype) for t in (penalties, weights))
    generator = torch.Generator().manual_seed(seed)
    first = (2 * torch.rand(N, F + 1, generator=generator, dtype=x.dtype) - 1) / math.sqrt(F)
    first = first.to(x.device)
    weight = first[:, :F].repeat(S, 1).requires_grad_()  # [S N, F], so that all scores are one product
    bias = first[:, F].repeat(S).requires_grad_()
    stepper = torch.optim.Adam([weight, bias], lr=lr)
    for _ in tqdm(range(epochs), desc=f"{S} dispatchers", leave=False, disable=not progress):
        for chosen in torch.randperm(n, generator=generator).to(x.device).split(batch):
            scores = torch.addmm(bias, x[chosen], weight.T).view(len(chosen), S, N)
            stepper.zero_grad()
            loss(scores, labels[chosen], penalties, weights).sum().backward()
            stepper.step()
    with torch.no_grad():
        folded = weight * scale
        return Layers(folded.view(S, N, F), (bias - folded @ mean).view(S, N))


def choose(layers: Layers, features: Tensor) -> Tensor:
    """The network that each layer sends each image to: int64 [S, n], the one with the highest score."""
    S, N, F = layers.weight.shape
    if features.ndim != 2 or features.shape[1] != F:
        raise ValueError(f"features are {list(features.shape)}; these layers take [n, {F}].")
    flat, bias = layers.weight.reshape(S * N, F).T, layers.bias.reshape(S * N)
    parts = [torch.addmm(bias, part, flat).view(len(part), S, N).argmax(2) for part in features.split(1000)]
    return torch.cat(parts).T.contiguous()


def score(choices: Tensor, pool: Pool, which: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Accuracy and mean cost of some choices: float64 [S] each.

    The cost of an image is :attr:`Pool.paid`: extractor, layer and chosen network, the extractor's own features reused.

    Args:
        choices: int64 [S, m].
        which: indices of those m images; None: all of the pool.

    >>> pool = Pool("ab", [1, 3], [[1, 1], [0, 1], [0, 0], [1, 0]], torch.zeros(4, 1), None, 0.5, product=0)
    >>> [value.tolist() for value in score(torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1]]), pool)]
    [[0.75, 0.5], [2.0, 3.5]]
    """
    correct = pool.correct if which is None else pool.correct[which]
    if choices.ndim != 2 or choices.shape[1] != len(correct):
        raise ValueError(f"choices are {list(choices.shape)}; for {len(correct)} images [S, {len(correct)}] is needed.")
    right = correct[torch.arange(len(correct)), choices]
    shares = torch.stack([(choices == i).sum(1) for i in range(len(pool.names))], 1).double() / len(correct)
    return right.double().mean(1), shares @ pool.paid


# ---------------------------------------------------------------------------------- pieces


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation [F]; the latter is 0 for a feature that does not vary, which hides it."""
    wide = features.double()
    mean, deviation = wide.mean(0), wide.std(0, correction=0)
    varies = deviation > NEARLY * wide.abs().amax(0)
    scale = torch.where(varies, 1 / torch.where(varies, deviation, 1.0), 0.0)
    return mean.to(features.dtype), scale.to(features.dtype)


def check_training(*, epochs: int, lr: float, batch: int) -> None:
    """Raise ValueError for numbers that :func:`fit` cannot train with."""
    if epochs < 1 or batch < 1 or not 0 < lr < math.inf:
        raise ValueError(
            f"epochs is {epochs}, batch {batch}, lr {lr}; at least 1, at least 1 and a positive number are needed."
        )


def _check(features: Tensor, labels: Tensor, penalties: Tensor, weights: Tensor) -> None:
    if features.ndim != 2 or not len(features) or labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"features are {list(features.shape)}, labels {labels.dtype} {list(labels.shape)}; of at least"
            " one image give [n, F] and int64 [n]."
        )
    if weights.ndim != 2 or penalties.shape != (*weights.shape, weights.shape[-1]) or not weights.numel():
        raise ValueError(
            f"penalties are {list(penalties.shape)}, weights {list(weights.shape)}; give [S, N, N] and [S, N]."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= weights.shape[1]:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; with {weights.shape[1]} networks they lie in"
            f" 0..{weights.shape[1] - 1}."
        )
    for name, value in (("penalties", penalties), ("weights", weights)):
        if not value.isfinite().all() or (value < 0).any():
            raise ValueError(f"{name} hold negative or infinite numbers; a loss is never to be made large.")

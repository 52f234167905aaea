"""One assignment after another on the same images: calibrated once, healed alike, and never asked twice.

Chapter: 12, "A multiplier for each expert?"
"""

import copy
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import approximate, assignment_of, default_layers, evaluating
from axmoe_lite.layers.correction import correct_bias
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.runs import store
from axmoe_lite.search import additive
from axmoe_lite.train import calibrate, predict, refresh_norms

REGIMES = ("not retrained", "bias corrected", "norms refreshed")


@dataclass(frozen=True)
class Score:
    """How good an assignment is on the validation images.

    Attributes:
        loss: mean cross-entropy with the labels, nats.
        divergence: mean Kullback-Leibler divergence of the class probabilities from those of the float32 network,
            nats, at least 0. It sees a change long before an image is answered differently, so it is less noisy.
        accuracy: top-1 in [0, 1].

    The first two are infinite where scores are no numbers.
    """

    loss: float
    divergence: float
    accuracy: float


@dataclass(frozen=True)
class Found:
    """An assignment on the front, as measured on the validation images.

    Attributes:
        assignment: dotted layer name to multiplier name.
        p_norm: normalised cost with the routing of the validation images, see :mod:`axmoe_lite.cost`.
        loss, divergence, accuracy: see :class:`Score`.
        evaluated: how many networks the search has run altogether, sensitivities among them.
    """

    assignment: dict[str, str]
    p_norm: float
    loss: float
    divergence: float
    accuracy: float
    evaluated: int


def front(
    measured: Iterable[tuple[dict[str, str], float, Score]], *, objective: str = "divergence", evaluated: int
) -> list[Found]:
    """Of assignments, their costs and their scores those that none dominates, from the cheapest to the dearest."""
    measured = list(measured)
    paid = np.array([paid for _, paid, _ in measured]).round(12)  # equal sums may differ in their last bits
    lost = np.array([getattr(score, objective) for *_, score in measured])
    best = [measured[i] for i in additive.undominated(paid, lost)]
    return [Found(one, paid, s.loss, s.divergence, s.accuracy, evaluated) for one, paid, s in best]


def hold_out(images: Images, *, n: int = 1000, seed: int = 0) -> Images:
    """The set with ``n`` of its training images in the place of its test images, which are left out altogether.

    Training on the result keeps those n images unseen; a :class:`Trial` with the same ``n`` and ``seed`` then
    chooses on images that the network has not learned from. Without that it chooses on images that it has learned
    from, not augmented: still not on test images, but nearer to what the network knows by heart.

    Raises:
        ValueError: if no training image would be left.

    >>> from axmoe_lite import datasets
    >>> held = hold_out(datasets.synthetic(classes=3, size=8, n_train=20, n_test=5), n=8)
    >>> len(held.x_train), len(held.x_test)
    (12, 8)
    """
    have = len(images.x_train)
    if not 1 <= n < have:
        raise ValueError(
            f"{n} of the {have} training images of {images.name} were to be held out; 1 to {have - 1} can be, since"
            " calibration needs the others."
        )
    order = torch.randperm(have, generator=torch.Generator().manual_seed(seed)).to(images.x_train.device)
    held, kept = order[:n].sort().values, order[n:].sort().values
    x, y = images.x_train, images.y_train
    return replace(images, x_train=x[kept], y_train=y[kept], x_test=x[held], y_test=y[held])


class Trial:
    """Tries assignments on a network, which stays as it was.

    Activation ranges are read once, under the exact circuit, on training images that are not held out, and serve all
    assignments: a range depends on the image, not on the multiplier. Each assignment gets a fresh copy.

    Args:
        network: exactly trained.
        layers: dotted names that assignments may name; None: :func:`~axmoe_lite.layers.default_layers`.
        n, seed: of :func:`hold_out`.
        regime: what is done to a network before it is scored, one of :data:`REGIMES`. Mean errors of a cheap
            multiplier break a network that bears its scatter well, so without it the search would choose by something
            that costs nothing to mend: :func:`~axmoe_lite.layers.correction.correct_bias` on 500 training images, or
            :func:`~axmoe_lite.train.refresh_norms`. Only training images are looked at that are not held out.
        prepare: does it instead, in place; ``regime`` is then your name for it.
        calibrate_options: of :func:`~axmoe_lite.train.calibrate`, such as ``n`` or ``per_channel``.
        base: what costs are relative to: the count of the dense network; None: this network.
        checkpoint: a JSON file that keeps every score; None: nothing is written.
        settings: what else a score depends on, so that a checkpoint of other settings is refused.

    Attributes:
        macs: :func:`axmoe_lite.cost.count` on the validation images, so with their routing.
        evaluate: :meth:`score`, :class:`Kept`.

    Raises:
        ValueError: for an unknown regime, layer or option, a network that is approximate already, or the checkpoint
            of another search.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Images,
        *,
        layers: Iterable[str] | None = None,
        n: int = 1000,
        seed: int = 0,
        regime: str = "bias corrected",
        prepare: Callable[[nn.Module], object] | None = None,
        calibrate_options: dict | None = None,
        base: cost.Macs | float | None = None,
        checkpoint: Path | str | None = None,
        settings: dict | None = None,
    ) -> None:
        if assignment_of(network):
            raise ValueError(f"This {type(network).__name__} has approximate layers already; restore() it before.")
        if prepare is None:
            moe.check_option("regime", regime, REGIMES)
        self.held, self.regime, self._prepare = hold_out(images, n=n, seed=seed), regime, prepare
        self.network, self.device = network, next(network.parameters()).device
        layers = default_layers(network) if layers is None else list(layers)
        options = calibrate_options or {}
        self._calibrated = calibrate(copy.deepcopy(network), dict.fromkeys(layers, EXACT), self.held, **options)
        self.macs = cost.count(network, self.held.normalised(self.held.x_test.to(self.device)))
        self._truth = self._log_probabilities(network)
        told = (type(network).__name__, regime, getattr(prepare, "__qualname__", ""), n, seed, sorted(options.items()))
        self.settings = {
            "network": digest(network.state_dict().values(), type(network).__name__, repr(network)),
            "images": digest([self.held.x_train, self.held.y_train, self.held.x_test, self.held.y_test]),
            "options": repr(told),
            "layers": digest([], *layers),
            **(settings or {}),
        }
        self._base, self.evaluate = base, Kept(self.score, checkpoint, self.settings)

    def price(self, assignment: dict[str, str]) -> float:
        """Its normalised cost, with the routing of the validation images."""
        return cost.price(self.macs, assignment, base=self._base).p_norm

    def place(self, assignment: dict[str, str]) -> nn.Module:
        """A copy of the network under the assignment, calibrated and healed as the regime says."""
        network = copy.deepcopy(self._calibrated)
        approximate(network, assignment)
        if self._prepare is not None:
            self._prepare(network)
        elif self.regime == "norms refreshed":
            refresh_norms(network, self.held)
        elif self.regime == "bias corrected" and assignment:
            some = self.held.subset(n_train=500).x_train.to(self.device)
            correct_bias(network, self.held.normalised(some))
        return network

    def score(self, assignment: dict[str, str]) -> Score:
        """How good the network is under it on the validation images."""
        found, truth, y = self._log_probabilities(self.place(assignment)), self._truth, self.held.y_test.cpu()
        loss = -found.gather(1, y[:, None]).mean()
        divergence = (truth.exp() * (truth - found)).sum(1).mean()
        finite = bool(found.isfinite().all())
        return Score(
            loss=loss.item() if finite else float("inf"),
            divergence=max(0.0, divergence.item()) if finite else float("inf"),
            accuracy=(found.argmax(1) == y).double().mean().item(),
        )

    def answers(self, network: nn.Module, images: Images) -> Tensor:
        """Which test images of ``images`` a network from :meth:`place` answers right: bool [N], on the CPU."""
        return predict(network, images, progress=False) == images.y_test.cpu()

    @torch.no_grad()
    def _log_probabilities(self, network: nn.Module) -> Tensor:
        """[N, classes] of the validation images, float64 on the CPU."""
        found = []
        with evaluating(network):
            for x in self.held.x_test.split(250):
                x = self.held.normalised(x.to(self.device)).contiguous(memory_format=torch.channels_last)
                found.append(network(x).double().log_softmax(1).cpu())
        return torch.cat(found)


class Kept:
    """``evaluate`` that is asked once for each assignment, and, with a file, once for ever.

    Args:
        evaluate: from an assignment to its :class:`Score`.
        file: JSON, written whole after each evaluation; None: nothing is written.
        settings: what else the scores depend on. A file that was made with others is refused.

    Attributes:
        ran: how many times ``evaluate`` was called.
        used: which assignments were asked for, as their digests, known from the file or not.
    """

    def __init__(
        self, evaluate: Callable[[dict[str, str]], Score], file: Path | str | None = None, settings: dict | None = None
    ) -> None:
        self._evaluate, self._file, self._settings = evaluate, file and Path(file), settings or {}
        self.ran, self.used, self._scores = 0, set(), {}
        before = store.read_json(self._file) if self._file else {}
        if before and before.get("settings") != self._settings:
            made_by = before.get("settings") or {}
            differ = sorted(k for k in made_by | self._settings if made_by.get(k) != self._settings.get(k))
            raise ValueError(
                f"{self._file} was made by a search with other {', '.join(differ)}; name another file, or delete this"
                " one to start afresh."
            )
        self._scores = {key: Score(**value) for key, value in before.get("scores", {}).items()}

    def __call__(self, assignment: dict[str, str]) -> Score:
        key = assignment_digest(assignment)
        self.used.add(key)
        if key not in self._scores:
            self._scores[key] = self._evaluate(assignment)
            self.ran += 1
            if self._file:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                scores = {k: asdict(score) for k, score in self._scores.items()}
                store.write_json(self._file, {"settings": self._settings, "scores": scores})
        return self._scores[key]


def assignment_digest(assignment: dict[str, str]) -> str:
    """Sixteen letters that differ where a layer multiplies by another table, whatever the names and their order.

    >>> assignment_digest({"a": "mul8s_1L2J"}) == assignment_digest({"a": "v1:mul8s_1L2H"})
    True
    """
    return digest([], *(f"{layer}={multiplier(name).digest}" for layer, name in sorted(assignment.items())))


def digest(tensors: Iterable[Tensor], *texts: str) -> str:
    """Sixteen letters that differ where a tensor's values or shape, or a text does."""
    found = hashlib.sha256(repr(texts).encode())
    for value in tensors:
        value = value.detach().cpu().contiguous()
        found.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    return found.hexdigest()[:16]

"""How much noise a layer can bear: Gaussian noise on its products, as strong as the network can learn to live with.

    found = tolerances(network, images, lam=0.2)      sigma of each layer, and the network trained under noise
    Noisy(network, work)                              the noise itself, for a training loop of your own

AGN's first half: instead of trying circuits, ask each layer what it would bear. A circuit's error is one more noise, so
whatever has a smaller standard deviation than the layer bears should do (:mod:`axmoe_lite.search.predict`).

Chapter: 14, "How much noise can a layer bear?"
"""

import copy
import difflib
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.layers import restore
from axmoe_lite.layers.modules import Approximate
from axmoe_lite.multipliers import EXACT
from axmoe_lite.search.predict import check_exact, weighted
from axmoe_lite.search.trial import digest
from axmoe_lite.train import calibrate, fit, recipe

OURS = ("epochs", "penalty", "checkpoint", "seed", "progress")  # of the options of fit


class Noisy(nn.Module):
    """A network whose layers are noisy while it trains, each as much as its own learned number says (AGN).

        y' = y + sigma_l std(y) eps,      eps ~ N(0, 1) for each value, drawn anew at each call             (1)

    std(y) is that of the layer's whole output for the batch, before the bias, and is taken for a constant by the
    gradient. In evaluation mode nothing is added. The network is wrapped, not copied, and outside of this module it
    has no noise.

    Args:
        network: any module.
        work: multiplications of each noisy layer, by dotted name, in any unit; ``nn.Conv2d`` and ``nn.Linear``,
            approximate or not.
        lam, sigma_max: of :meth:`penalty`.
        sigma_init: what every sigma starts at.
        pace: not from the paper, for short searches: sigma is pace times the parameter, so that with SGD it learns
            pace**2 times as fast as the weights do at the same rate (with AdamW, whose steps know no size, pace
            times).
        decay: the weight decay that SGD is going to apply, of which :meth:`penalty` then spares the parameter.

    Attributes:
        names: of the noisy layers. Letter: L of them.
        settings: what a checkpoint should know of the penalty.

    Raises:
        ValueError: for a number out of its range, no work, or a layer that does not exist or has no weights.

    >>> noisy = Noisy(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), {"0": 6, "1": 3}, lam=0.2, sigma_init=0.1)
    >>> round(noisy.penalty().item(), 3), round(noisy.tolerance()["1"], 3)  # -0.2 * (6 * 0.1 + 3 * 0.1) / 9
    (-0.02, 0.1)
    """

    def __init__(
        self,
        network: nn.Module,
        work: Mapping[str, float],
        *,
        lam: float = 0.2,
        sigma_max: float = 0.5,
        sigma_init: float = 0.1,
        pace: float = 1.0,
        decay: float = 0.0,
    ) -> None:
        super().__init__()
        check_noise(lam=lam, sigma_max=sigma_max, sigma_init=sigma_init, pace=pace)
        self.names = tuple(weighted(network, work))
        total = sum(work.values())
        if not total > 0 or min(work.values()) < 0:
            raise ValueError(f"The layers do {total} multiplications together; none may be negative, nor all 0.")
        self.network = network
        self.lam, self.sigma_max, self.pace, self.decay = lam, sigma_max, pace, decay
        self.settings: dict[str, Any] = {"lam": lam, "sigma_max": sigma_max, "sigma_init": sigma_init, "pace": pace}
        self.settings |= {"decay": decay, "work": digest([], repr(dict(work)))}
        device = next(network.parameters()).device
        self.learned = nn.Parameter(torch.full((len(self.names),), sigma_init / pace, device=device))
        self.register_buffer("share", torch.tensor([c / total for c in work.values()], device=device), persistent=False)

    @property
    def sigma(self) -> Tensor:
        """[L], as learned: of either sign, which the noise does not show, and not cut."""
        return self.pace * self.learned

    def tolerance(self) -> dict[str, float]:
        """min(abs(sigma), sigma_max) of each layer: the standard deviation it bears, as a share of its signal's."""
        return {
            name: min(abs(sigma), self.sigma_max) for name, sigma in zip(self.names, self.sigma.tolist(), strict=True)
        }

    def penalty(self) -> Tensor:
        """AGN's second loss: -lam times the sum over l of (c_l / c) min(abs(sigma_l), sigma_max), c_l the layer's work.

        With ``decay`` there is -decay / 2 times the square of the parameter too. SGD's weight decay would pull every
        sigma towards 0, at sigma 0.4 and decay 5e-4 as hard as the first term pushes a layer with 0.1 % of the work
        (lam 0.2, pace 1); so the two cancel. Not from the paper: what it does about this is not known to us.
        """
        wanted = (self.share * self.sigma.abs().clamp(max=self.sigma_max)).sum()
        return -self.lam * wanted - self.decay / 2 * self.learned.square().sum()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.network(x)
        hooks = [
            self.network.get_submodule(name).register_forward_hook(partial(self._disturb, index))
            for index, name in enumerate(self.names)
        ]
        try:
            return self.network(x)
        finally:
            for hook in hooks:
                hook.remove()

    def _disturb(self, index: int, layer: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        """Equation (1). An expert to which nobody went has nothing to disturb."""
        if not y.numel():
            return None
        with torch.no_grad():
            bias = 0.0 if layer.bias is None else _along_channels(layer, layer.bias, y)
            scale = (y.float() - bias).std(correction=0)
        return y + (self.sigma[index] * scale * torch.randn_like(y, dtype=torch.float32)).to(y.dtype)


def _along_channels(layer: nn.Module, bias: Tensor, y: Tensor) -> Tensor:
    kind = layer.exact if isinstance(layer, Approximate) else layer
    return bias.view(-1, 1, 1) if isinstance(kind, nn.Conv2d) else bias


def check_noise(*, lam: float, sigma_max: float, sigma_init: float, pace: float) -> None:
    """Raise ValueError unless all are finite, lam at least 0 and the others positive."""
    numbers = {"lam": lam, "sigma_max": sigma_max, "sigma_init": sigma_init, "pace": pace}
    for name, value in numbers.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "lam"):
            why = "; at sigma_init 0 nothing would learn" if name == "sigma_init" else ""
            least = "at least 0" if name == "lam" else "above 0"
            raise ValueError(f"{name} is {value}; it must be finite and {least}{why}.")


@dataclass(frozen=True, eq=False)
class Tolerances:
    """What :func:`tolerances` found.

    Attributes:
        sigma: for each layer the standard deviation of noise that it bears, in [0, sigma_max], as a share of the
            standard deviation of its products' sums.
        network: the copy that was trained under noise, its layers exact floats. AGN goes on with its weights.
        history: of the training, see :func:`~axmoe_lite.train.fit`; accuracies on training images are under noise.
        lam, sigma_max, sigma_init, pace, epochs, quantised: as asked for.
    """

    sigma: dict[str, float]
    network: nn.Module
    history: list[dict]
    lam: float
    sigma_max: float
    sigma_init: float
    pace: float
    epochs: int
    quantised: bool


def tolerances(
    network: nn.Module,
    images: Images,
    *,
    lam: float = 0.2,
    sigma_max: float = 0.5,
    sigma_init: float = 0.1,
    pace: float = 1.0,
    epochs: int = 30,
    layers: Iterable[str] | None = None,
    quantised: bool = True,
    calibrate_options: dict | None = None,
    checkpoint: Path | str | None = None,
    fit_options: dict | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tolerances:
    """How much noise each layer bears, learned by gradient together with the weights (AGN).

    Args:
        network: exactly trained; left as it was. Gates stay frozen in the copy, as in
            :func:`~axmoe_lite.train.retrain` (not from the paper, which has no mixtures).
        images: its training images are trained on; its test images are not looked at, unless ``fit_options`` asks.
        lam: how much noise is wanted: the weight of :meth:`Noisy.penalty`. AGN's default is 0.2.
        sigma_max: no layer is pushed beyond; sigma_init: where each starts. AGN's defaults.
        pace: see :class:`Noisy`. Not from the paper.
        epochs: AGN trains 30 on CIFAR-10.
        layers: dotted names; None: :func:`~axmoe_lite.layers.default_layers`.
        quantised: learn on the network in 8 bits, under the exact circuit, as AGN does; else in float32.
        calibrate_options: of :func:`~axmoe_lite.train.calibrate`.
        checkpoint, seed: see :func:`~axmoe_lite.train.fit`. A checkpoint of another network, other images or other
            settings is refused.
        fit_options: instead of those of :func:`~axmoe_lite.train.recipe` for retraining (lr 0.1 for a CNN, as AGN).

    Raises:
        ValueError: for an unknown layer or option, or a number out of its range, before anything is trained.
        Diverged: as :func:`~axmoe_lite.train.fit`.
    """
    numbers = {"lam": lam, "sigma_max": sigma_max, "sigma_init": sigma_init, "pace": pace}
    check_noise(**numbers)
    check_fit_options(fit_options)
    check_exact(network)
    names, copied = weighted(network, layers), copy.deepcopy(network)
    options = {**recipe(network, stage="retrain"), **(fit_options or {})}
    work = _work(copied, images, names)
    if quantised:
        calibrate(copied, dict.fromkeys(names, EXACT), images, **(calibrate_options or {}))
    noisy = Noisy(copied, work, **numbers, decay=options["weight_decay"] if options["optimiser"] == "sgd" else 0.0)
    # fit() knows a network by its type only, and would go on from the noise of another one.
    told = (repr(network), repr(sorted((calibrate_options or {}).items())))
    noisy.settings["of"] = digest([*network.state_dict().values(), images.x_train, images.y_train], *told)
    with moe.gates_frozen(copied):
        history = fit(
            noisy,
            images,
            epochs=epochs,
            penalty=noisy.penalty,
            checkpoint=checkpoint,
            seed=seed,
            progress=progress,
            **options,
        )
    restored = restore(copied).train(network.training)
    return Tolerances(noisy.tolerance(), restored, history, **numbers, epochs=epochs, quantised=quantised)


def check_fit_options(options: dict | None) -> None:
    """Raise ValueError for options that :func:`~axmoe_lite.train.fit` does not have, or that are said elsewhere."""
    parameters = inspect.signature(fit).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in OURS]
    for name in options or {}:
        if name in OURS:
            raise ValueError(f"fit_options holds {name!r}, which has an argument of its own or none; leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"fit() has no option {name!r}. Did you mean {near!r}? There are {', '.join(known)}.")


def _work(network: nn.Module, images: Images, names: list[str]) -> dict[str, float]:
    """Multiplications of each layer for one image, with the routing of some training images."""
    device = next(network.parameters()).device
    macs = cost.count(network, images.normalised(images.subset(n_train=250).x_train.to(device)))
    idle = [name for name in names if name not in macs.layers]
    if idle:
        raise ValueError(f"Layer {idle[0]!r} is never called by this {type(network).__name__}; leave it out of layers.")
    return {name: macs.layers[name].executed for name in names}

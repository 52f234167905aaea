"""How far off a layer's sums will be under a circuit, foretold from how often each code occurs; and how far they are.

    found = operands(network, images)                     which codes reach each layer
    predicted_std(found, EVOAPPROX, model="multi")        AGN's error model: milliseconds
    simulated_std(network, images, EVOAPPROX)             the truth, by computing every product
    agreement(predicted, simulated)                       how near the first is to the second

The error of a sum of K products is a sum of K errors e(a, b) = M(a, b) - a b. If all K activations were drawn from one
distribution, errors would cancel as independent numbers do. They are not: what one output sees is one patch of one
image, and patches differ. AGN keeps a histogram of each of some patches, draws a patch first, and then its codes:

    mu_i, s_i    mean and standard deviation of e over the codes of patch i and of the weights
    mean         K mean_i(mu_i)                                                                             (1)
    variance     mean_i(K s_i^2 + K^2 mu_i^2) - (K mean_i(mu_i))^2                (AGN, Eq. 15-16)          (2)

the law of total variance. (AGN writes the error of the mean of K products; times K it is that of the sum.)

Letters: P patches, Q = 256 codes, K fan-in, M multipliers, L layers.

Chapter: 14, "How much noise can a layer bear?"
"""

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from axmoe_lite import kernels, moe
from axmoe_lite.datasets import Images
from axmoe_lite.kernels.encode import codes_of
from axmoe_lite.layers import Matmul, approximable, assignment_of, default_layers, evaluating
from axmoe_lite.layers.modules import ApproxConv2d, ApproxLinear, first_input
from axmoe_lite.layers.network import exact_kind
from axmoe_lite.multipliers import EXACT, Multiplier, error_table, multiplier
from axmoe_lite.train import calibrate

Q = 256
MODELS = ("multi", "single", "monte carlo")
PIECE = 1 << 20  # sums that become float64 together


@dataclass(frozen=True, eq=False)
class Operands:
    """Which codes a layer multiplies.

    Attributes:
        patches: float64 [P, Q], the share of each activation code -128..127 in each of P receptive fields.
        weights: float64 [Q], the share of each weight code.
        fan_in: K, products in one sum.
        signal: standard deviation of the exact integer sums over images, pixels and channels: what an error is to be
            small against.
    """

    patches: Tensor
    weights: Tensor
    fan_in: int
    signal: float


def operands(
    network: nn.Module,
    images: Images,
    *,
    layers: Iterable[str] | None = None,
    patches: int = 512,
    n: int = 128,
    seed: int = 0,
    calibrate_options: dict | None = None,
) -> dict[str, Operands]:
    """The codes that reach each layer, under the exact circuit; AGN takes 512 patches of 128 images.

    A patch is what one sum of one random output position of one image sees, zeros of the padding among it, which are
    codes like any others; of a grouped convolution it is what one random group sees, of a linear layer one row. Of a
    layer that is called several times the first call counts. Layers that are not asked for stay exact floats.

    Args:
        network: exactly trained; left as it was.
        images: its training images serve, the test images are not looked at.
        layers: dotted names; None: :func:`~axmoe_lite.layers.default_layers`.
        patches: P.
        n: images to run, drawn at random; all if there are fewer. An expert that none of them goes to sees all.
        seed: of the images and of the patches.
        calibrate_options: of :func:`~axmoe_lite.train.calibrate`, which sets the range of the codes.

    Raises:
        ValueError: for an unknown layer, one without weights, an approximate network, or numbers below 1.
    """
    if patches < 1:
        raise ValueError(f"patches is {patches}; a distribution needs at least 1.")
    found: dict[str, Operands] = {}

    def look(name: str, seen: _Seen) -> None:
        drawn = _patches(seen, patches, torch.Generator().manual_seed(seed))
        weights = _shares(seen.weight.reshape(1, -1))[0]
        signal = _spread(seen.sums(multiplier(EXACT)))
        found[name] = Operands(_shares(drawn), weights, seen.weight[0].numel(), signal)

    names = _visit(network, images, layers, n=n, seed=seed, calibrate_options=calibrate_options, look=look)
    return {name: found[name] for name in names}


# ------------------------------------------------------------------------------ foretold


def predicted_std(
    found: Mapping[str, Operands],
    multipliers: Iterable[str],
    *,
    model: str = "multi",
    draws: int = 100_000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Standard deviation of the error of each layer's sums under each multiplier, in units of the integer product.

    Args:
        found: of :func:`operands`.
        multipliers: names.
        model: ``"multi"``, equation (2); ``"single"``, all patches in one distribution, sqrt(K) times the standard
            deviation of e; ``"monte carlo"``, what the latter foretells, counted on ``draws`` sums (slow).
        draws, seed, progress: for ``"monte carlo"``; AGN draws 100,000.

    Returns:
        Layer name to multiplier name to a number, at least 0.

    Raises:
        ValueError: for an unknown model or multiplier, or fewer than 2 draws.

    >>> dark, light = torch.zeros(2, 256).double()
    >>> dark[128], light[128 + 1] = 1, 1  # one patch of zeros, one of ones
    >>> one = Operands(torch.stack([dark, light]), light, fan_in=9, signal=1.0)
    >>> predicted_std({"conv": one}, ["mul8s_1KVA"])["conv"]  # M(0, 1) = 0, M(1, 1) = 0: 0 or -9, each half the time
    {'mul8s_1KVA': 4.5}
    """
    moe.check_option("model", model, MODELS)
    if draws < 2:
        raise ValueError(f"draws is {draws}; a standard deviation needs at least 2.")
    circuits = _circuits(multipliers)
    if model == "monte carlo":
        spreads = _monte_carlo(found, circuits, draws, seed, progress)
    else:
        foretell = _single if model == "single" else _multi
        spreads = (foretell(one, *moments) for one, moments in _moments(found, circuits))
    return _table(found, circuits, spreads)


def predicted_mean(found: Mapping[str, Operands], multipliers: Iterable[str]) -> dict[str, dict[str, float]]:
    """Mean error of each layer's sums, equation (1), as :func:`predicted_std`; the same in all models.

    AGN matches standard deviations only and leaves the mean to retraining and BatchNorm.
    """
    circuits = _circuits(multipliers)
    means = (one.fan_in * (one.patches.mean(0) @ first) for one, (first, _) in _moments(found, circuits))
    return _table(found, circuits, means)


def _moments(
    found: Mapping[str, Operands], circuits: list[Multiplier]
) -> Iterator[tuple[Operands, tuple[Tensor, Tensor]]]:
    """Each layer with the means of e and of e^2 over its weights, given the activation: float64 [Q, M] both."""
    weights = torch.stack([one.weights for one in found.values()]).T  # [Q, L]
    wrong = [error_table(circuit).double() for circuit in circuits]  # [Q, Q]
    first, second = (torch.stack([e**power @ weights for e in wrong], dim=2) for power in (1, 2))  # [Q, L, M]
    return zip(found.values(), zip(first.unbind(1), second.unbind(1), strict=True), strict=True)


def _multi(one: Operands, first: Tensor, second: Tensor) -> Tensor:
    """Equation (2): float64 [M]."""
    mean, square, K = one.patches @ first, one.patches @ second, one.fan_in  # [P, M]
    within = K * (square - mean**2).clamp_min(0).mean(0)
    return (within + (K * mean).var(0, correction=0)).sqrt()


def _single(one: Operands, first: Tensor, second: Tensor) -> Tensor:
    pooled = one.patches.mean(0)
    return (one.fan_in * (pooled @ second - (pooled @ first) ** 2).clamp_min(0)).sqrt()


def _monte_carlo(
    found: Mapping[str, Operands], circuits: list[Multiplier], draws: int, seed: int, progress: bool
) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.stack([error_table(circuit).double().flatten() for circuit in circuits], dim=1)  # [Q Q, M]

    def draw(shares: Tensor) -> Tensor:
        below = shares.cumsum(0)
        uniform = torch.rand(draws, dtype=torch.float64, generator=generator) * below[-1]
        return torch.searchsorted(below, uniform, right=True).clamp_max(Q - 1)

    with tqdm(total=sum(one.fan_in for one in found.values()), desc="monte carlo", disable=not progress) as bar:
        for one in found.values():
            pooled, sums = one.patches.mean(0), torch.zeros(draws, len(circuits), dtype=torch.float64)
            for _ in range(one.fan_in):
                sums += wrong[draw(pooled) * Q + draw(one.weights)]
                bar.update()
            yield sums.std(0)


def _circuits(multipliers: Iterable[str]) -> list[Multiplier]:
    if isinstance(multipliers, str):
        raise ValueError(f"multipliers is the text {multipliers!r}; give a list of names, such as [{multipliers!r}].")
    found = list({m.name: m for m in map(multiplier, multipliers)}.values())
    if not found:
        raise ValueError("There are no multipliers to foretell the error of; name some, such as axmoe_lite.EVOAPPROX.")
    return found


def _table(found: Iterable[str], circuits: list[Multiplier], rows: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    names = [circuit.name for circuit in circuits]
    return {layer: dict(zip(names, row.tolist(), strict=True)) for layer, row in zip(found, rows, strict=True)}


# ------------------------------------------------------------------------------ computed


def simulated_std(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    layers: Iterable[str] | None = None,
    n: int = 128,
    seed: int = 0,
    calibrate_options: dict | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """What :func:`predicted_std` foretells, by computing all products: each layer's sums under each multiplier.

    Every layer gets the codes it would get if all others were exact, as :func:`operands` of the same seed sees them;
    the deviation is over all images, pixels and channels.

    Args:
        multipliers: names; the rest as :func:`operands`.
    """
    circuits, found = _circuits(multipliers), {}
    names = weighted(network, layers)
    with tqdm(total=len(names) * len(circuits), desc="simulate", disable=not progress) as bar:

        def look(name: str, seen: _Seen) -> None:
            truth, found[name] = seen.sums(multiplier(EXACT)), {}
            for circuit in circuits:
                found[name][circuit.name] = _spread(seen.sums(circuit) - truth)
                bar.update()

        _visit(network, images, names, n=n, seed=seed, calibrate_options=calibrate_options, look=look)
    return {name: found[name] for name in names}


def agreement(predicted: Mapping[str, Mapping[str, float]], simulated: Mapping[str, Mapping[str, float]]) -> dict:
    """How near a prediction is, over all pairs of a layer and a multiplier that really errs.

    Returns:
        ``pairs``, how many; ``correlation`` (Pearson's) of the values, and ``log_correlation`` of their logarithms, in
        [-1, 1]; ``relative_error``, the mean of abs(predicted - simulated) / simulated.

    Raises:
        ValueError: for other layers or multipliers on one side, or fewer than 2 pairs.

    >>> found = agreement({"a": {"x": 2.0, "y": 4.0}}, {"a": {"x": 1.0, "y": 2.0}})
    >>> found["pairs"], round(found["correlation"], 6), found["relative_error"]
    (2, 1.0, 1.0)
    """
    keys = [{(layer, name) for layer, row in table.items() for name in row} for table in (predicted, simulated)]
    if keys[0] != keys[1]:
        layer, name = sorted(keys[0] ^ keys[1])[0]
        side = "predicted" if (layer, name) in keys[0] else "simulated"
        raise ValueError(f"Only one side has layer {layer!r} with {name!r}, the {side} one; compare equal pairs.")
    pairs = [(predicted[layer][name], simulated[layer][name]) for layer, name in sorted(keys[0])]
    found = np.array([pair for pair in pairs if pair[1] > 0])
    if len(found) < 2:
        raise ValueError(f"{len(found)} of {len(pairs)} pairs have an error; a correlation needs at least 2.")
    seen = found[found[:, 0] > 0]  # a logarithm needs both
    return {
        "pairs": len(found),
        "correlation": float(np.corrcoef(found.T)[0, 1]),
        "log_correlation": float(np.corrcoef(np.log(seen).T)[0, 1]) if len(seen) > 1 else float("nan"),
        "relative_error": float((np.abs(found[:, 0] - found[:, 1]) / found[:, 1]).mean()),
    }


# ------------------------------------------------------------------------------ the codes of a layer


@dataclass(frozen=True, eq=False)
class _Seen:
    """One call of a layer: int8 codes [N, C, H, W] by weight [O, c, KH, KW], or [T, C] by [O, C] without options."""

    codes: Tensor
    weight: Tensor
    options: dict | None

    def sums(self, circuit: Multiplier) -> Tensor:
        if self.options is None:
            return kernels.matmul(self.codes, self.weight.T, circuit)
        return kernels.conv2d(self.codes, self.weight, circuit, **self.options)


def weighted(network: nn.Module, layers: Iterable[str] | None) -> list[str]:
    """The names of layers with weights that were asked for, None for the default ones; once each.

    Raises:
        ValueError: for none, an unknown one, or one without weights.
    """
    known = [name for name, layer in approximable(network).items() if exact_kind(layer) is not Matmul]
    names = default_layers(network) if layers is None else list(dict.fromkeys(layers))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"This {type(network).__name__} has no layer {name!r} with weights.{hint} There are"
                f" {', '.join(known) or 'none'}."
            )
    if not names:
        raise ValueError(
            f"No layer of this {type(network).__name__} was named; there are {', '.join(known) or 'none'}."
        )
    return names


def check_exact(network: nn.Module) -> None:
    """Raise ValueError for a network that is approximate already."""
    if assignment_of(network):
        raise ValueError(f"This {type(network).__name__} has approximate layers already; restore() it before.")


@torch.no_grad()
def _visit(
    network: nn.Module,
    images: Images,
    layers: Iterable[str] | None,
    *,
    n: int,
    seed: int,
    calibrate_options: dict | None,
    look: Callable[[str, _Seen], None],
) -> list[str]:
    """Show each layer's codes to ``look``, once, on n training images; returns the layers' names."""
    check_exact(network)
    names = weighted(network, layers)
    if n < 1:
        raise ValueError(f"n is {n}; at least 1 image must be run.")
    copied = calibrate(copy.deepcopy(network), dict.fromkeys(names, EXACT), images, **(calibrate_options or {}))
    order = torch.randperm(len(images.x_train), generator=torch.Generator().manual_seed(seed))[:n]
    some = images.x_train[order.to(images.x_train.device)].to(next(network.parameters()).device)
    waiting = set(names)

    def hook(name: str, layer: ApproxConv2d | ApproxLinear, x: Tensor) -> None:
        if name in waiting:
            waiting.remove(name)
            look(name, _seen(layer, x))

    for name in names:
        layer = copied.get_submodule(name)
        layer.register_forward_hook(
            lambda layer, args, named, y, name=name: hook(name, layer, first_input(args, named)), with_kwargs=True
        )
    with evaluating(copied), moe.no_idle_experts(copied):
        copied(images.normalised(some))
    assert not waiting, f"{waiting} were called while calibrating, but not now"
    return names


def _seen(layer: ApproxConv2d | ApproxLinear, x: Tensor) -> _Seen:
    """The codes that the layer makes of its input, and those of its weights."""
    product = layer.product()
    if isinstance(layer, ApproxLinear):
        return _Seen(codes_of(x, product.inverse_scale).reshape(-1, x.shape[-1]), product.weight, None)
    if layer.image_padding is not None:  # done on the image, as the layer does it
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = nn.functional.pad(x, layer.image_padding, mode=mode)
    codes = codes_of(x if x.ndim == 4 else x[None], product.inverse_scale)
    return _Seen(codes, product.weight, product.options)


def _patches(seen: _Seen, count: int, generator: torch.Generator) -> Tensor:
    """Codes of random receptive fields: int8 [P, K]."""
    codes, device = seen.codes, seen.codes.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator).to(device)

    if seen.options is None:
        return codes[draw(len(codes))]
    (down, across), dilation, groups = (seen.options[key] for key in ("padding", "dilation", "groups"))
    codes = nn.functional.pad(codes, (across, across, down, down))
    c, *kernel = seen.weight.shape[1:]
    reach = [torch.arange(k, device=device) * d for k, d in zip(kernel, dilation, strict=True)]
    image, group = draw(len(codes)), draw(groups)
    rows, columns = (
        draw((size - 1 - int(steps[-1])) // stride + 1)[:, None] * stride + steps
        for size, steps, stride in zip(codes.shape[2:], reach, seen.options["stride"], strict=True)
    )
    channels = group[:, None] * c + torch.arange(c, device=device)
    return codes[
        image[:, None, None, None], channels[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
    ].flatten(1)


def _shares(codes: Tensor) -> Tensor:
    """int8 [P, K] to the share of each code in each row: float64 [P, Q], on the CPU."""
    codes = codes.cpu().long() + Q // 2
    rows = torch.arange(len(codes))[:, None] * Q
    return torch.bincount((rows + codes).flatten(), minlength=len(codes) * Q).view(-1, Q).double() / codes.shape[1]


def _spread(sums: Tensor) -> float:
    """Standard deviation of integers, over all of them."""
    flat = sums.flatten()
    mean = flat.sum(dtype=torch.int64).item() / len(flat)
    return (sum((part.double() - mean).square().sum().item() for part in flat.split(PIECE)) / len(flat)) ** 0.5

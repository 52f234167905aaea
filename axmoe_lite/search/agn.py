"""AGN: give each layer the cheapest circuit whose error is below the noise that the layer learned to bear.

    found = search(network, images, EVOAPPROX, base=dense)      a front, one noise search for each lambda
    match(tolerance, predicted, signal, EVOAPPROX)              the choice itself

Trommer, Waschneck and Kumar, ICCAD 2022 (arXiv 2208.07265). No circuit is run while choosing: sigma comes from
:mod:`axmoe_lite.search.noise`, the error of each circuit from :mod:`axmoe_lite.search.predict`.

Chapter: 14, "How much noise can a layer bear?"
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import nn
from tqdm.auto import tqdm

from axmoe_lite import cost, moe
from axmoe_lite.datasets import Images
from axmoe_lite.multipliers import EXACT, multiplier
from axmoe_lite.search.noise import check_fit_options, check_noise, tolerances
from axmoe_lite.search.predict import MODELS, operands, predicted_std
from axmoe_lite.search.space import catalogue
from axmoe_lite.search.trial import Found, Trial, assignment_digest, front

LAMBDAS = (0.05, 0.1, 0.2, 0.3, 0.5)


def match(
    tolerance: Mapping[str, float],
    predicted: Mapping[str, Mapping[str, float]],
    signal: Mapping[str, float],
    multipliers: Iterable[str],
) -> dict[str, str]:
    """For each layer the multiplier of least power whose error is within what the layer bears.

    Args:
        tolerance: sigma of each layer, see :func:`~axmoe_lite.search.noise.tolerances`.
        predicted: layer to multiplier to standard deviation of the sums' error, see
            :func:`~axmoe_lite.search.predict.predicted_std`.
        signal: standard deviation of each layer's exact sums, in the same unit. The error may be sigma times that.
        multipliers: names to choose from. The exact circuit is always among them, and errs by 0. Of equal powers the
            smaller error wins.

    Returns:
        An assignment for the layers of ``tolerance``.

    Raises:
        ValueError: for a multiplier that does not exist or has no power, or a layer or multiplier without prediction.

    >>> foretold = {"conv": {"mul8s_1L2J": 5.0, "mul8s_1L2L": 30.0}}
    >>> match({"conv": 0.1}, foretold, {"conv": 100.0}, ["mul8s_1L2J", "mul8s_1L2L"])  # 10 are allowed
    {'conv': 'mul8s_1L2J'}
    """
    names = catalogue(multipliers)
    power = {name: multiplier(name).power_mw for name in names}
    chosen = {}
    for layer, sigma in tolerance.items():
        if layer not in predicted or layer not in signal:
            what = "predicted errors" if layer not in predicted else "signal"
            raise ValueError(f"Layer {layer!r} has a tolerance but no {what}; take all three of the same layers.")
        errors = {EXACT: 0.0, **predicted[layer]}
        missing = [name for name in names if name not in errors]
        if missing:
            raise ValueError(
                f"No error of {missing[0]!r} is predicted for layer {layer!r}; there are {', '.join(errors)}."
            )
        allowed = [name for name in names if errors[name] <= sigma * signal[layer]]
        chosen[layer] = min(allowed or [EXACT], key=lambda name, errors=errors: (power[name], errors[name]))
    return chosen


def search(
    network: nn.Module,
    images: Images,
    multipliers: Iterable[str],
    *,
    base: cost.Macs | float | None,
    lambdas: Iterable[float] = LAMBDAS,
    epochs: int = 30,
    sigma_max: float = 0.5,
    sigma_init: float = 0.1,
    pace: float = 1.0,
    model: str = "multi",
    n: int = 1000,
    seed: int = 0,
    regime: str = "bias corrected",
    prepare: Callable[[nn.Module], object] | None = None,
    calibrate_options: dict | None = None,
    fit_options: dict | None = None,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> list[Found]:
    """A front by AGN: noise is learned and matched once for each lambda, and the assignments are then scored.

    Training images that are not held out teach the noise and tell the operands; the n others score. The test images are
    not looked at. The *given* network is scored, healed as ``regime`` says, so that fronts of different methods are
    comparable. The paper goes on with the weights that were trained under noise
    (:func:`~axmoe_lite.search.noise.tolerances` returns them) and retrains them under the chosen circuits.

    Args:
        network: exactly trained; left as it was. Its :func:`~axmoe_lite.layers.default_layers` choose.
        multipliers: names to choose from. The exact circuit is always among them.
        base: what costs are relative to: the count of the dense network; None: this network.
        lambdas: how much noise is wanted, one training each. AGN's own sweep is not known to us.
        epochs, sigma_max, sigma_init, pace, fit_options: of each training, see
            :func:`~axmoe_lite.search.noise.tolerances`.
        model: of :func:`~axmoe_lite.search.predict.predicted_std`.
        n, seed, regime, prepare, calibrate_options: see :class:`~axmoe_lite.search.Trial`. The seed also draws batches,
            noise and patches.
        checkpoint: a folder, which keeps ``noise_<lambda>.safetensors``, a training after each epoch, and
            ``scores.json``, every score, so that an interrupted search goes on where it was.

    Returns:
        The front as measured on the validation images, from the cheapest to the dearest. ``evaluated`` counts the
        networks that were scored; the trainings come on top.

    Raises:
        ValueError: for a multiplier that does not exist or has no power, a number out of its range, or an unknown model
            or option, before anything is run; and for a checkpoint of another search.
    """
    names, wanted = catalogue(multipliers), _lambdas(lambdas)
    moe.check_option("model", model, MODELS)
    noise = {"sigma_max": sigma_max, "sigma_init": sigma_init, "pace": pace}
    for lam in wanted:
        check_noise(lam=lam, **noise)
    check_fit_options(fit_options)
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; noise is learned in at least 1.")
    folder = _folder(checkpoint)
    healing = {"regime": regime, "prepare": prepare, "calibrate_options": calibrate_options}
    kept = {"base": base, "checkpoint": folder and folder / "scores.json", "n": n, "seed": seed}
    trial = Trial(network, images, **healing, **kept)
    found = operands(network, trial.held, seed=seed, calibrate_options=calibrate_options)
    predicted = predicted_std(found, names, model=model, seed=seed, progress=progress)
    signal, chosen = {layer: one.signal for layer, one in found.items()}, {}
    for lam in wanted:
        learned = tolerances(
            network,
            trial.held,
            lam=lam,
            epochs=epochs,
            **noise,
            calibrate_options=calibrate_options,
            checkpoint=folder and folder / f"noise_{lam!r}.safetensors",
            fit_options=fit_options,
            seed=seed,
            progress=progress,
        )
        assignment = match(learned.sigma, predicted, signal, names)
        chosen[assignment_digest(assignment)] = assignment
    assignments = tqdm(chosen.values(), desc="scores", disable=not progress)
    measured = [(one, trial.price(one), trial.evaluate(one)) for one in assignments]
    return front(measured, evaluated=len(trial.evaluate.used))


def _lambdas(lambdas: Iterable[float]) -> list[float]:
    found = list(dict.fromkeys(float(lam) for lam in lambdas))
    if not found:
        raise ValueError(f"There are no lambdas; each is one noise search, such as {LAMBDAS}.")
    return found


def _folder(checkpoint: Path | str | None) -> Path | None:
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(f"checkpoint is the file {folder}; this search keeps several files, so name a folder.")
    return folder

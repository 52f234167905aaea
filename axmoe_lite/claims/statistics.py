"""How sure a difference is: paired over test images and over seeds.

    found = paired_bootstrap(100 * (right_hard.astype(float) - right_dense))       # [seeds, images], in points
    found.low, found.high, found.p()

Two networks that answer the same images err on the same hard ones, so their difference is known far better than either
accuracy. Everything here is linear in the answers: a "difference" is any sum of accuracies with signs, one number an
image and seed, whose mean is the effect.

Chapter: 11, "Does the paper hold?"
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 2000
LEAST_P = 1e-6
_BATCH = 1000  # images at a time: 16 MB for 2,000 resamples


@dataclass(frozen=True)
class Interval:
    """An effect and its 95 % interval, in the unit of what was given.

    Attributes:
        spread: standard deviation over the seeds of each seed's own effect; None for one seed.
        n_seeds, n_images: what it is the mean over.
        per_seed: each seed's own effect.
        test: which test, in words.
        draws: [resamples], what other images and seeds might have given; None where only a normal curve is known.
        error: standard error, of the images and of the seeds.
    """

    estimate: float
    low: float
    high: float
    spread: float | None
    n_seeds: int
    n_images: int
    test: str
    per_seed: tuple[float, ...]
    error: float
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)

    def p(self, null: float = 0.0) -> float:
        """Two-sided p-value of "the effect is ``null``"; below 0.05 where the interval leaves ``null`` out.

        Where no draw lies beyond ``null``, 2,000 of them cannot tell 1 / 1000 from less; for one seed it is then the
        tail of a normal curve with the same standard error. Never below 1e-6: no curve is to be trusted further. A few
        seeds promise no such tail, and 1 / 1000 it stays.
        """
        if self.estimate == null or not self.error:
            return float(self.estimate == null) or LEAST_P
        tail = max(LEAST_P, math.erfc(abs(self.estimate - null) / self.error / math.sqrt(2)))
        if self.draws is None:
            return tail
        close = 1e-9 * max(1.0, abs(null))  # sums of the same numbers in another order
        beyond = min(int((self.draws <= null + close).sum()), int((self.draws >= null - close).sum()))
        counted = min(1.0, 2 * (beyond + 1) / (len(self.draws) + 1))
        return counted if beyond or self.n_seeds > 1 else min(counted, tail)


def paired_bootstrap(differences: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Resample the test images, the same for all seeds and for everything that is compared; seeds by Student's t.

    S seeds tell the mean over all seeds to within spread / sqrt(S), and the spread is known from them alone: that is
    Student's t with S - 1 degrees of freedom, whose draws are added to those of the images. Resampling two or three
    seeds instead would cover the truth too seldom. Two seeds give a wide interval; that of one is of images only.

    Args:
        differences: [seeds, images], or [images] for one seed; finite.
        seed: of the resampling; equal seeds and numbers of images mean equal resampled images.

    Raises:
        ValueError: for another shape, or no images.

    >>> found = paired_bootstrap(np.array([1, 0, 0, 1, -1, 0, 1, 0] * 50))
    >>> round(found.estimate, 3), round(found.low, 2), round(found.high, 2), found.p() < 0.05
    (0.25, 0.18, 0.32, True)
    """
    values = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    if values.ndim != 2 or not values.size:
        raise ValueError(
            f"paired_bootstrap() was given an array of shape {np.shape(differences)}; it takes [seeds, images] with at"
            " least one of each."
        )
    n_seeds, n_images = values.shape
    counts, busy = _resampled_images(n_images, resamples, seed), np.flatnonzero(values.any(axis=0))
    sums = np.zeros((resamples, n_seeds))
    for part in np.array_split(busy, -(-len(busy) // _BATCH) or 1):  # an image without any difference adds nothing
        sums += counts[part].T.astype(np.float64) @ values[:, part].T
    per_seed, means = values.mean(axis=1), sums.mean(axis=1) / n_images
    draws = means + _seed_draws(per_seed, resamples, seed)
    low, high = _ends(draws)
    return Interval(
        estimate=float(per_seed.mean()),
        low=float(low),
        high=float(high),
        spread=_spread(per_seed),
        n_seeds=n_seeds,
        n_images=n_images,
        test=f"paired bootstrap of images{f', t over {n_seeds} seeds' if n_seeds > 1 else ''}, {resamples} resamples",
        per_seed=tuple(map(float, per_seed)),
        error=math.hypot(float(means.std()), _seed_error(per_seed)),
        draws=draws,
    )


@functools.lru_cache(maxsize=1)
def _resampled_images(n_images: int, resamples: int, seed: int) -> np.ndarray:
    """[images, resamples]: how often each image was drawn, 20 MB for 10,000 images; drawn once for all comparisons."""
    generator = np.random.default_rng(seed)
    counts = np.empty((resamples, n_images), dtype=np.uint8)  # an image drawn 256 times has probability 0
    for row in counts:
        row[:] = np.bincount(generator.integers(n_images, size=n_images), minlength=n_images)
    return np.ascontiguousarray(counts.T)


def _seed_draws(per_seed: np.ndarray, resamples: int, seed: int) -> np.ndarray | float:
    """[resamples]: by how much the mean over all seeds may lie off the mean over these."""
    if len(per_seed) == 1:
        return 0.0
    from scipy import stats

    order = np.random.default_rng([seed, len(per_seed)]).permutation(resamples)
    return _seed_error(per_seed) * stats.t.ppf((order + 0.5) / resamples, len(per_seed) - 1)


def _ends(draws: np.ndarray) -> tuple[float, float]:
    """Of the 95 % interval: two of the draws, so that it leaves out exactly what :meth:`Interval.p` puts below 0.05."""
    return float(np.quantile(draws, 0.025, method="lower")), float(np.quantile(draws, 0.975, method="higher"))


def _seed_error(per_seed: np.ndarray) -> float:
    return (_spread(per_seed) or 0.0) / math.sqrt(len(per_seed))


def unpaired_normal(accuracies: np.ndarray, signs: Sequence[float], *, n_images: int) -> Interval:
    """For when it is known how many answers were right, but not which: a normal interval, wider than the paired one.

    What enters with the same sign is taken as perfectly correlated, what enters with opposite signs as independent.
    Networks err on the same images, so both can only overstate the variance. Several seeds enter as in
    :func:`paired_bootstrap`.

    Args:
        accuracies: [seeds, terms], in [0, 1].
        signs: [terms], the factor of each in the effect.

    Raises:
        ValueError: if the shapes do not fit, or an accuracy is none.

    >>> found = unpaired_normal(np.array([[0.70, 0.60]]), [100, -100], n_images=10_000)
    >>> round(found.estimate, 1), round(found.low, 2), round(found.high, 2)
    (10.0, 8.69, 11.31)
    """
    values, signs = np.atleast_2d(np.asarray(accuracies, dtype=np.float64)), np.asarray(signs, dtype=np.float64)
    if values.ndim != 2 or signs.shape != values.shape[1:] or not values.size or (values < 0).any():
        raise ValueError(
            f"unpaired_normal() was given accuracies of shape {np.shape(accuracies)} and {signs.size} signs; it takes"
            " [seeds, terms] in [0, 1] and one sign a term."
        )
    if (values > 1).any():
        raise ValueError(f"An accuracy is {values.max():g}; they lie in [0, 1], not in percent.")
    deviations = np.sqrt(values * (1 - values) / n_images) * np.abs(signs)
    ups, downs = (deviations[:, side].sum(axis=1).mean() for side in (signs > 0, signs < 0))
    per_seed = values @ signs
    centre, of_images = float(per_seed.mean()), math.hypot(ups, downs)
    low, high, draws = centre - 1.96 * of_images, centre + 1.96 * of_images, None
    if len(per_seed) > 1:
        from scipy import stats

        means = centre + of_images * stats.norm.ppf((np.arange(RESAMPLES) + 0.5) / RESAMPLES)
        draws = means + _seed_draws(per_seed, RESAMPLES, 0)
        low, high = _ends(draws)
    return Interval(
        estimate=centre,
        low=low,
        high=high,
        spread=_spread(per_seed),
        n_seeds=len(per_seed),
        n_images=n_images,
        test="unpaired normal interval (answers not kept; wider than a paired one)",
        per_seed=tuple(map(float, per_seed)),
        error=math.hypot(of_images, _seed_error(per_seed)),
        draws=draws,
    )


def paired_t(per_seed: Sequence[float], *, null: float = 0.0) -> float | None:
    """Two-sided p-value of Student's t over the seeds' own effects; None for fewer than three seeds.

    >>> round(paired_t([1.0, 2.0, 3.0]), 4)  # t = 2 / (1 / sqrt(3)) = 3.46, two degrees of freedom
    0.0742
    """
    from scipy import stats

    n = len(per_seed)
    if n < 3:
        return None
    mean, spread = float(np.mean(per_seed)), float(np.std(per_seed, ddof=1))
    if spread == 0:
        return float(mean == null)
    return float(2 * stats.t.sf(abs(mean - null) / spread * math.sqrt(n), n - 1))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact McNemar test of two networks on the same images: p-value of "both are right equally often".

    Args:
        first, second: [images] of bool, which answers were right.

    Raises:
        ValueError: if the two have not answered the same number of images.

    >>> mcnemar(np.array([1, 1, 1, 1, 1, 1, 0, 1], bool), np.array([0, 0, 0, 0, 0, 0, 0, 1], bool))  # 6 : 0, 2 / 2**6
    0.03125
    """
    from scipy import stats

    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"mcnemar() was given answers of shapes {first.shape} and {second.shape}; pairs need one.")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if not only_first + only_second:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values of several comparisons, so that one chance hit among many stays unlikely.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]  # 3 * 0.01; 2 * 0.03; 0.04, but never below the one before
    [0.03, 0.06, 0.06]
    """
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def _spread(per_seed: np.ndarray) -> float | None:
    return float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None

"""The ledger's statistics can be redone by hand, and cover the truth as often as they say."""

import math

import numpy as np
import pytest

from axmoe_lite.claims.parts import Goal
from axmoe_lite.claims.statistics import holm, mcnemar, paired_bootstrap, paired_t, unpaired_normal

# ----------------------------------------------------------------------------------- statistics


def test_interval_of_one_seed_covers_the_truth_as_often_as_it_says():
    generator, hits = np.random.default_rng(1), 0
    for _ in range(300):
        found = paired_bootstrap(generator.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=400), resamples=400)
        hits += found.low <= 0.1 <= found.high
    assert 0.91 < hits / 300 < 0.985  # 0.95 +- 3 standard errors


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_interval_of_several_seeds_covers_the_mean_over_all_seeds(seeds):
    """Seeds that differ by far more than images do: resampling images alone would cover about one time in three."""
    generator, hits, without = np.random.default_rng(2), 0, 0
    for _ in range(400):
        truth = generator.normal(scale=0.1, size=(seeds, 1))
        values = truth + generator.normal(scale=1, size=(seeds, 400))
        found = paired_bootstrap(values, resamples=400)
        hits += found.low <= 0 <= found.high
        images_only = paired_bootstrap(values.mean(axis=0), resamples=400)
        without += images_only.low <= 0 <= images_only.high
    assert hits / 400 > 0.93
    assert without / 400 < 0.75


def test_seeds_scatter_as_much_as_their_standard_error():
    values = np.repeat([[0.0], [1.0], [2.0], [3.0]], 50, axis=1)  # all images agree: only seeds are left
    found = paired_bootstrap(values, resamples=20_000)
    assert found.estimate == 1.5
    assert found.spread == pytest.approx(math.sqrt(5 / 3))  # squares 2.25 + 0.25 + 0.25 + 2.25 over 3
    assert found.error == pytest.approx(math.sqrt(5 / 3 / 4))
    assert found.high - 1.5 == pytest.approx(3.1824 * math.sqrt(5 / 3 / 4), rel=1e-3)  # t, three degrees of freedom
    assert found.p(0) == pytest.approx(paired_t(found.per_seed), rel=0.01)


def test_everything_is_resampled_with_the_same_images():
    a, b = np.random.default_rng(3).normal(size=(2, 3000))
    one, other, both = (paired_bootstrap(values).draws for values in (a, b, a + b))
    np.testing.assert_allclose(one + other, both, atol=1e-12)
    assert not np.allclose(one, paired_bootstrap(a, seed=1).draws)


def test_images_that_never_differ_count_nevertheless():
    few = np.array([1.0] * 10 + [0.0] * 90)
    found = paired_bootstrap(few, resamples=20_000)
    assert found.n_images == 100 and found.estimate == pytest.approx(0.1)
    assert found.error == pytest.approx(math.sqrt(0.1 * 0.9 / 100), rel=0.03)
    assert paired_bootstrap(np.zeros(5)).p() == 1


def test_more_images_than_one_batch():
    values = np.random.default_rng(4).normal(size=2500)
    found = paired_bootstrap(values)
    assert found.draws.mean() == pytest.approx(values.mean(), abs=3 * found.error / math.sqrt(2000))
    assert found.error == pytest.approx(values.std() / 50, rel=0.06)


def test_p_value_and_interval_agree_at_the_border():
    # With this seed the 50th of 2,000 draws lies just above 0, and an interpolated quantile would leave 0 out.
    found = paired_bootstrap(np.random.default_rng(187).choice([-1, 0, 1], size=60, p=[0.1, 0.6, 0.3]))
    assert 0.05 < found.p() < 0.052 and found.low <= 0
    for seed in range(300):
        drawn = np.random.default_rng(seed).choice([-1, 0, 1], size=60, p=[0.1, 0.6, 0.3])
        found = paired_bootstrap(drawn, resamples=200)
        assert (found.p() < 0.05) == (not found.low <= 0 <= found.high), seed


def test_p_value_agrees_with_the_interval_and_sees_further_than_the_draws():
    found = paired_bootstrap(np.random.default_rng(5).normal(0.1, 1, size=1000))
    assert found.p(found.low - 0.003) < 0.05 < found.p(found.low + 0.003)
    assert found.p(found.high + 0.003) < 0.05 < found.p(found.high - 0.003)
    assert found.p(found.estimate) == 1
    assert found.p(-5) == pytest.approx(1e-6)  # with 1 / 1001 no claim of more than 50 comparisons could fail


def test_unpaired_interval_by_hand_and_never_narrower():
    # equal signs add up, opposite ones add squared: sqrt((0.5 * 0.5 + 0.5 * 0.5)**2 + 0.5**2) / 10
    found = unpaired_normal([[0.5, 0.5, 0.5]], [0.5, 0.5, -1], n_images=100)
    assert found.estimate == 0 and found.error == pytest.approx(math.sqrt(0.25 + 0.25) / 10)
    generator = np.random.default_rng(6)
    right = generator.random(2000) + 0.2 * generator.random((5, 2000)) < np.array([[0.8], [0.7], [0.6], [0.7], [0.5]])
    signs = np.array([1, -1, 0.5, 0.5, -1])
    paired = paired_bootstrap(signs @ right)
    unpaired = unpaired_normal(right.mean(axis=1), signs, n_images=2000)
    assert paired.estimate == pytest.approx(unpaired.estimate) and paired.error < unpaired.error


def test_unpaired_interval_knows_that_seeds_differ():
    alike, apart = (unpaired_normal([[a], [b]], [100], n_images=10_000) for a, b in ((0.6, 0.6), (0.5, 0.7)))
    assert alike.spread == 0 and apart.spread == pytest.approx(20 / math.sqrt(2))
    assert apart.error == pytest.approx(math.hypot(10, 100 * (0.5 + math.sqrt(0.21)) / 200), rel=1e-3)
    assert apart.high - 60 == pytest.approx(12.706 * 10, rel=0.02)  # t with one degree of freedom
    assert 0.1 < apart.p(0) < 0.2  # 6 standard errors, of two seeds


@pytest.mark.parametrize(
    "call", [lambda: paired_bootstrap(np.zeros((2, 0))), lambda: paired_bootstrap(np.zeros((2, 2, 2))),
             lambda: unpaired_normal([[0.5]], [1, -1], n_images=9), lambda: unpaired_normal([[50]], [1], n_images=9),
             lambda: unpaired_normal([[-0.1]], [1], n_images=9), lambda: mcnemar(np.zeros(3), np.zeros(4))],
)  # fmt: skip
def test_statistics_refuse_what_they_cannot_use(call):
    with pytest.raises(ValueError, match=r"given|lie in \[0, 1\]"):
        call()


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.5, times 4 3 2 1: 0.04, 0.06, 0.06, 0.5
    assert holm([0.5, 0.02, 0.01, 0.03]) == pytest.approx([0.5, 0.06, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_t_and_mcnemar_against_scipy_and_by_hand():
    from scipy import stats

    assert paired_t([0.4, 1.1, 0.9, 0.2], null=-1) == pytest.approx(stats.ttest_1samp([0.4, 1.1, 0.9, 0.2], -1).pvalue)
    assert paired_t([1, 2]) is None and paired_t([1, 1, 1]) == 0 and paired_t([1, 1, 1], null=1) == 1
    first, second = np.array([1, 1, 1, 1, 0, 1, 0], bool), np.array([0, 0, 0, 0, 1, 1, 0], bool)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 5) / 2**5)  # 4 against 1 of 5
    assert mcnemar(first, first) == 1


def test_goals():
    found = unpaired_normal([[0.7, 0.6]], [100, -100], n_images=10_000)  # 8.7 to 11.3
    assert Goal("above", 8).holds(found) and not Goal("above", 9).holds(found) and not Goal("above", 9).fails(found)
    assert Goal("below", 8).fails(found) and Goal("below", 12).holds(found) and Goal("above", 12).fails(found)
    assert Goal("within", 12).holds(found) and Goal("within", 8).fails(found) and not Goal("within", 10).fails(found)
    assert Goal("within", 12).margin(-11) == 1

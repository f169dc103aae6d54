import itertools
import math

import numpy as np
import pytest
from scipy import stats

from headwater.claims import benjamini_hochberg, binomial, bootstrap, p_from_draws, permutation, sign_flip, smallest_p
from headwater.core.errors import ClaimError


def test_benjamini_hochberg_by_hand():
    # sorted .01 .02 .03 .04 .5, times 5/rank: .05 .05 .05 .05 .5
    assert benjamini_hochberg([0.5, 0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.5, 0.05, 0.05, 0.05, 0.05])
    # .001*4/1=.004, .2*4/2=.4, .3*4/3=.4, .9; untested ones neither count nor change
    assert benjamini_hochberg([None, 0.001, 0.3, 0.2, None, 0.9]) == pytest.approx([None, 0.004, 0.4, 0.4, None, 0.9])
    assert benjamini_hochberg([]) == [] and benjamini_hochberg([None]) == [None]
    with pytest.raises(ClaimError, match="outside"):
        benjamini_hochberg([1.5])


def test_benjamini_hochberg_against_its_definition():
    random = np.random.default_rng(0)
    for _ in range(50):
        p = random.uniform(size=random.integers(1, 9)) ** 2
        adjusted = benjamini_hochberg(list(p))
        ranks = {int(at): rank for rank, at in enumerate(np.argsort(p, kind="stable"), start=1)}
        for i in range(p.size):
            brute = min(1.0, min(p[j] * p.size / ranks[j] for j in range(p.size) if ranks[j] >= ranks[i]))
            assert adjusted[i] == pytest.approx(brute)


def test_p_from_draws_counts_the_observed_one():
    assert p_from_draws(5, [1, 2, 3]) == 1 / 4
    assert p_from_draws(2, [1, 2, 3]) == 3 / 4  # a tie counts
    assert p_from_draws(0, [1, 2, 3], side="less") == 1 / 4
    assert p_from_draws(5, [1, 2, 3], side="two-sided") == 1 / 2
    with pytest.raises(ClaimError):
        p_from_draws(1, [])
    with pytest.raises(ClaimError):
        p_from_draws(1, [float("nan")])
    with pytest.raises(ClaimError, match="side"):
        p_from_draws(1, [0.0], side="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["greater", "less", "two-sided"])
def test_sign_flip_is_exact_for_few_pairs(side):
    values = [0.4, -0.1, 0.7, 0.3, 0.3, 0.0]
    means = [
        np.mean([s * v for s, v in zip(signs, values, strict=True)]) for signs in itertools.product([1, -1], repeat=6)
    ]
    observed = np.mean(values)
    above, below = np.mean([m >= observed - 1e-9 for m in means]), np.mean([m <= observed + 1e-9 for m in means])
    brute = {"greater": above, "less": below, "two-sided": min(1, 2 * min(above, below))}[side]
    assert sign_flip(values, side=side) == pytest.approx(brute)
    assert sign_flip([v + 3 for v in values], reference=3, side=side) == pytest.approx(brute)


def test_sign_flip_by_draws_agrees_with_scipy_and_is_seeded():
    values = np.random.default_rng(1).normal(0.15, 1, 60)
    reference = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=20_000, rng=1
    ).pvalue
    assert sign_flip(values, draws=20_000) == pytest.approx(reference, abs=0.01)
    assert sign_flip(values, draws=999, seed=3) == sign_flip(values, draws=999, seed=3)
    assert sign_flip(np.full(60, 1.0), draws=999) == 1 / 1000


def test_permutation_agrees_with_scipy():
    random = np.random.default_rng(2)
    one, two = random.normal(0.4, 1, 25), random.normal(0, 1, 30)
    reference = stats.permutation_test(
        (one, two), lambda x, y, axis: x.mean(axis) - y.mean(axis), alternative="greater", n_resamples=10_000, rng=1
    ).pvalue
    assert permutation(one, two) == pytest.approx(reference, abs=0.015)


@pytest.mark.parametrize("n", [8, 40])
def test_false_positives_under_the_null_keep_to_their_rate(n):
    random = np.random.default_rng(n)
    trials = 1000
    hits = sum(sign_flip(random.normal(0, 1, n), draws=199, seed=i) <= 0.05 for i in range(trials))
    low, high = stats.binom.interval(0.9999, trials, 0.05)
    assert hits <= high and (n < 10 or hits >= low)  # exact enumeration may only be conservative


def test_false_positives_of_draws_keep_to_their_rate():
    random = np.random.default_rng(5)
    trials = 2000
    hits = sum(p_from_draws(random.normal(), random.normal(size=19)) <= 0.05 for _ in range(trials))
    low, high = stats.binom.interval(0.9999, trials, 0.05)
    assert low <= hits <= high


def test_false_discoveries_keep_to_their_rate():
    random = np.random.default_rng(6)
    shares = []
    for _ in range(400):
        null = random.uniform(size=8)
        real = random.uniform(size=8) * 1e-3
        adjusted = benjamini_hochberg([*null, *real])
        found = [p is not None and p <= 0.05 for p in adjusted]
        shares.append(sum(found[:8]) / max(1, sum(found)))
        assert all(found[8:])
    assert np.mean(shares) <= 0.05 * 8 / 16 + 3 * np.std(shares) / math.sqrt(len(shares))


def test_bootstrap_agrees_with_scipy_and_covers():
    random = np.random.default_rng(3)
    sample = random.exponential(1, 50)
    mine = bootstrap(sample, draws=2000, seed=4)
    theirs = stats.bootstrap((sample,), np.mean, n_resamples=2000, rng=np.random.default_rng(4)).confidence_interval
    assert (mine.value, mine.lo, mine.hi) == pytest.approx((sample.mean(), theirs.low, theirs.high))
    covered = 0
    for seed in range(200):
        interval = bootstrap(random.normal(1, 1, 30), draws=300, seed=seed, method="percentile")
        covered += interval.lo <= 1 <= interval.hi
    assert 170 <= covered <= 200


def test_bootstrap_of_a_ratio_and_of_constants():
    x = np.random.default_rng(0).normal(2, 0.1, 40)
    ratio = bootstrap(x * 0.5, x, statistic=lambda a, b, axis: a.mean(axis) / b.mean(axis))
    assert ratio.value == pytest.approx(0.5) and ratio.lo == pytest.approx(0.5) and ratio.hi == pytest.approx(0.5)
    assert bootstrap([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0)
    assert bootstrap([2.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ClaimError, match="one length"):
        bootstrap([1.0, 2.0], [1.0], statistic=np.mean)


def test_binomial_is_exact():
    p, share = binomial(9, 10, 0.5)
    assert p == pytest.approx(11 / 1024)
    assert (
        share.value == 0.9
        and share.lo == pytest.approx(0.5958, abs=1e-3)
        and share.hi == pytest.approx(0.9821, abs=1e-3)
    )
    with pytest.raises(ClaimError, match="impossible"):
        binomial(3, 2, 0.5)


def test_smallest_p_says_what_no_data_could_beat():
    assert smallest_p(pairs=4) == 1 / 16 == sign_flip([1.0] * 4)
    assert smallest_p(draws=19) == 1 / 20 and smallest_p(pairs=3, draws=19) == 1 / 8
    assert smallest_p(pairs=4, side="two-sided") == sign_flip([1.0] * 4, side="two-sided")

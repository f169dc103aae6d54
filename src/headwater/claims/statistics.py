"""p-values and intervals: exact where they can be; where they cannot, the observed value counts among the draws."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import ClaimError

Side = Literal["greater", "less", "two-sided"]
Floats = NDArray[np.float64]
_EXACT = 14  # up to 2**14 sign patterns are enumerated


class Interval(NamedTuple):
    """An estimate and its confidence limits."""

    value: float
    lo: float
    hi: float


def p_from_draws(observed: float, draws: Sequence[float] | Floats, *, side: Side = "greater") -> float:
    """Share of null draws at least as extreme as `observed`, the observed one counted among them.

    (1 + count) / (1 + draws): never 0, and a valid p-value for any number of draws (Phipson and Smyth, 2010).
    """
    null = _finite(draws, "null draws")
    slack = 1e-12 * max(1.0, abs(observed))  # ties that differ in the last bit are ties
    above = (1 + int((null >= observed - slack).sum())) / (1 + null.size)
    below = (1 + int((null <= observed + slack).sum())) / (1 + null.size)
    return _one_of(above, below, side)


def sign_flip(
    values: Sequence[float] | Floats,
    *,
    reference: float = 0.0,
    side: Side = "greater",
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Paired permutation test: p of the mean of `values` [n] under random signs of `values - reference`.

    Its null says that each pair's difference is as likely to point the other way. All 2^n patterns are counted for n
    up to 14; beyond, `draws` random ones with the observed one among them. Raises ClaimError for values that are empty
    or not finite.
    """
    centred = _finite(values, "paired differences") - reference
    n = centred.size
    if n <= _EXACT:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        means = (1 - 2 * patterns) @ centred / n
        slack = 1e-12 * max(1.0, float(np.abs(centred).max()))
        observed = float(centred.mean())
        return _one_of(float((means >= observed - slack).mean()), float((means <= observed + slack).mean()), side)
    random = np.random.default_rng(seed)
    means = np.concatenate(
        [(1 - 2.0 * random.integers(0, 2, (size, n), dtype=np.int8)) @ centred / n for size in _chunks(draws, n)]
    )
    return p_from_draws(float(centred.mean()), means, side=side)


def permutation(
    first: Sequence[float] | Floats,
    second: Sequence[float] | Floats,
    *,
    side: Side = "greater",
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """p of mean(first) - mean(second) when labels are shuffled: the two samples are unpaired."""
    one, two = _finite(first, "first sample"), _finite(second, "second sample")
    pooled = np.concatenate([one, two])
    total, n, m = float(pooled.sum()), one.size, two.size
    random = np.random.default_rng(seed)
    sums = np.array([float(random.permutation(pooled)[:n].sum()) for _ in range(draws)])
    return p_from_draws(float(one.mean() - two.mean()), sums / n - (total - sums) / m, side=side)


def binomial(
    successes: int, n: int, chance: float, *, side: Side = "greater", level: float = 0.95
) -> tuple[float, Interval]:
    """Exact binomial p of `successes` out of `n` at `chance`, and the share with its Wilson interval."""
    from scipy.stats import binomtest

    if not 0 <= successes <= n or n < 1 or not 0 <= chance <= 1:
        raise ClaimError(
            "a binomial test got impossible counts",
            got=f"{successes} of {n} at chance {chance}",
            wanted="0 <= successes <= n, n >= 1, chance in [0, 1]",
        )
    test = binomtest(successes, n, chance, alternative=side)
    limits = test.proportion_ci(confidence_level=level, method="wilson")
    two_sided = limits if side == "two-sided" else binomtest(successes, n, chance).proportion_ci(level, method="wilson")
    return float(test.pvalue), Interval(successes / n, float(two_sided.low), float(two_sided.high))


def bootstrap(
    *samples: Sequence[float] | Floats,
    statistic: Callable[..., Any] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> Interval:
    """`statistic` of paired samples (each [n]) with its bootstrap interval over pairs.

    `statistic(*samples, axis=-1)` must work along an axis; the mean of the one sample if not given. Where every
    resample gives the same value the interval is that value. Falls back from BCa to percentiles where BCa is
    undefined (constant data, all resamples on one side).
    """
    from scipy.stats import bootstrap as scipy_bootstrap

    arrays = tuple(_finite(sample, "sample") for sample in samples)
    if not arrays or len({array.size for array in arrays}) > 1:
        raise ClaimError("paired samples must have one length", got=[array.size for array in arrays])
    function = statistic or np.mean
    value = float(function(*arrays, axis=-1))
    if arrays[0].size == 1 or all(bool(np.ptp(array) == 0) for array in arrays):
        return Interval(value, value, value)

    def limits(kind: str) -> tuple[float, float]:
        with np.errstate(all="ignore"):
            result = scipy_bootstrap(
                arrays, function, n_resamples=draws, confidence_level=level, paired=True, vectorized=True,
                method=kind, rng=np.random.default_rng(seed),
            )  # fmt: skip
        return float(result.confidence_interval.low), float(result.confidence_interval.high)

    import warnings

    lo, hi = float("nan"), float("nan")
    if method == "bca":
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # scipy warns where BCa is undefined and returns NaN, which is looked at here
            lo, hi = limits("BCa")
    if not (np.isfinite(lo) and np.isfinite(hi)):
        lo, hi = limits("percentile")
    return Interval(value, lo, hi)


def benjamini_hochberg(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values: claims at most q after adjusting hold a false-discovery rate of q (Benjamini, Hochberg, 1995).

    None (a claim that could not be tested) stays None and does not count among the tests.
    """
    known = [(p, at) for at, p in enumerate(p_values) if p is not None]
    for p, _ in known:
        if not 0 <= p <= 1:
            raise ClaimError("a p-value lies outside [0, 1]", got=p)
    adjusted: list[float | None] = [None] * len(p_values)
    smallest = 1.0
    for rank, (p, at) in reversed(list(enumerate(sorted(known), start=1))):
        smallest = min(smallest, p * len(known) / rank)
        adjusted[at] = smallest
    return adjusted


def smallest_p(*, pairs: int | None = None, draws: int | None = None, side: Side = "greater") -> float:
    """The smallest p that a sign-flip test of `pairs`, or a null of `draws`, can give: above q, nothing could pass."""
    two = 2.0 if side == "two-sided" else 1.0
    by_pairs = two / 2.0**pairs if pairs is not None else 0.0
    by_draws = two / (1 + draws) if draws is not None else 0.0
    return min(1.0, max(by_pairs, by_draws))


def _one_of(above: float, below: float, side: Side) -> float:
    if side == "greater":
        return above
    if side == "less":
        return below
    if side == "two-sided":
        return min(1.0, 2 * min(above, below))
    raise ClaimError("unknown side of a test", got=repr(side), wanted="greater, less or two-sided")


def _finite(values: Sequence[float] | Floats, what: str) -> Floats:
    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if array.size == 0 or not bool(np.isfinite(array).all()):
        got = "none" if array.size == 0 else f"{int((~np.isfinite(array)).sum())} of {array.size} not finite"
        raise ClaimError(f"{what} must be finite numbers, at least one", got=got)
    return array


def _chunks(draws: int, n: int) -> list[int]:
    """Sizes that keep a block of sign patterns below some 32 MB."""
    size = max(1, 4_000_000 // n)
    return [size] * (draws // size) + ([draws % size] if draws % size else [])

"""Statistics of points that come in groups: a relation's checkpoints are no independent points, so relations are what
is resampled.

Shapes: N points, R groups, B resamples.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_RIDGE = 1e-3


class Groups:
    """Groups of points, and resamples of groups with replacement. of: [N] names. weights: [1 + B, R] how often each
    group is in a resample; the first row is the sample itself. Made from one seed, so that differences are paired."""

    def __init__(self, of: NDArray[np.str_], *, draws: int, seed: int) -> None:
        self.names, index = np.unique(of, return_inverse=True)
        self.index: Ints = index.astype(np.int64)
        n = len(self.names)
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) if n else np.zeros((draws, 0))
        self.weights: Floats = np.concatenate([np.ones((1, n)), drawn]).astype(np.float64)

    def summed(self, values: Floats) -> Floats:
        """[1 + B, K]: sums over the points of each resample of values [N, K]."""
        sums = np.zeros((len(self.names), values.shape[1]))
        np.add.at(sums, self.index, values)
        return self.weights @ sums


class Estimate(NamedTuple):
    """A value with the middle 95% of its resamples."""

    value: float
    lo: float
    hi: float


def estimate(values: Floats) -> Estimate:
    """Of [1 + B] values, the first the sample's own. NaN where there is none."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(drawn):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))


def correlations(x: Floats, y: Floats, groups: Groups) -> Floats:
    """[1 + B]: Pearson's r of x and y [N] in each resample; NaN where one of them does not vary."""
    if len(x) < 3:
        return np.full(len(groups.weights), np.nan)
    x, y = x - x.mean(), y - y.mean()  # the same r, with less lost to rounding
    n, sx, sy, sxx, syy, sxy = groups.summed(np.column_stack([np.ones_like(x), x, y, x * x, y * y, x * y])).T
    with np.errstate(invalid="ignore", divide="ignore"):
        vx, vy = sxx - sx**2 / n, syy - sy**2 / n
        r = (sxy - sx * sy / n) / np.sqrt(vx * vy)
    slack = 1e-12 * max(1.0, float(np.abs(x).max()), float(np.abs(y).max())) ** 2
    return np.where((vx > slack) & (vy > slack), np.clip(r, -1, 1), np.nan)


def logistic(x: Floats, y: Floats, weight: Floats, groups: Groups) -> Floats:
    """[1 + B, 2]: intercept and slope of y (shares, each of `weight` trials) = sigmoid(a + b x), by Newton's method, of
    each resample. A slight ridge keeps separable data finite."""
    centre, scale = float(x.mean()), float(x.std()) or 1.0
    z = (x - centre) / scale
    beta = np.zeros((len(groups.weights), 2))
    trials = weight / weight.mean()
    counted = groups.weights[:, groups.index] * trials  # [1 + B, N]
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(beta[:, :1] + beta[:, 1:] * z, -30, 30)))
        gradient = np.stack([(counted * (y - p)).sum(1), (counted * (y - p) * z).sum(1)], axis=1) - _RIDGE * beta
        w = counted * p * (1 - p)
        h00, h01, h11 = w.sum(1) + _RIDGE, (w * z).sum(1), (w * z * z).sum(1) + _RIDGE
        det = h00 * h11 - h01**2
        step = np.stack([h11 * gradient[:, 0] - h01 * gradient[:, 1], h00 * gradient[:, 1] - h01 * gradient[:, 0]], 1)
        step = np.clip(step / det[:, None], -2, 2)
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    return np.column_stack([beta[:, 0] - beta[:, 1] * centre / scale, beta[:, 1] / scale])


def ridge_held_out(
    features: Floats, y: Floats, groups: Groups, *, strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4)
) -> Floats:
    """[N]: each point predicted from the points of the other groups, by ridge regression on features [N, F], their
    squares and products, standardized. How strong the ridge is, is chosen among the other groups too, each of them held
    out in turn."""
    n, size = features.shape
    products = [features[:, i] * features[:, j] for i in range(size) for j in range(i, size)]
    wide = np.column_stack([features, *products]) if size else np.zeros((n, 0))
    spread = wide.std(0)
    kept = spread > 1e-12
    wide = np.column_stack([np.ones(n), (wide[:, kept] - wide[:, kept].mean(0)) / spread[kept]])
    many = len(groups.names)
    parts = [groups.index == one for one in range(many)]
    grams = np.stack([wide[part].T @ wide[part] for part in parts])  # [R, F, F]
    sides = np.stack([wide[part].T @ y[part] for part in parts])  # [R, F]
    free = np.eye(wide.shape[1])
    free[0, 0] = 1e-9  # the mean is not drawn to 0
    ridges = np.asarray(strengths)[:, None, None] * free
    out = np.empty(n)
    for held in range(many):
        gram, side = grams.sum(0) - grams[held], sides.sum(0) - sides[held]
        others = [one for one in range(many) if one != held]
        losses = np.zeros(len(strengths))
        for one in others if len(others) > 1 else ():
            right = np.broadcast_to(side - sides[one], (len(strengths), len(side)))[..., None]
            slopes = np.linalg.solve(gram - grams[one] + ridges, right)[..., 0]
            losses += ((wide[parts[one]] @ slopes.T - y[parts[one], None]) ** 2).mean(0)
        out[parts[held]] = wide[parts[held]] @ np.linalg.solve(gram + ridges[int(losses.argmin())], side)
    return out

"""Change points: at which step a measure changed, with an interval.

A curve is split into two levels where that leaves the least squares (the classic single change point, Hinkley, 1970).
The interval comes from resampling the residuals of both levels; p says how often values in random order give as large a
share of the variance to two levels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEAST = 6
"""Points that a curve needs."""
SCHEMA: dict[str, Any] = {
    "measure": pl.String, "name": pl.String, "step": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
    "before": pl.Float64, "after": pl.Float64, "share": pl.Float64, "p": pl.Float64, "half": pl.Float64,
    "tenth": pl.Float64, "nine_tenths": pl.Float64, "n": pl.Int64,
}  # fmt: skip


def change_point(
    steps: Sequence[int], values: Sequence[float], *, draws: int = 500, seed: int = 0
) -> dict[str, float] | None:
    """Where a curve changes level; None for fewer than six finite points, or a constant.

    step: between the last step of the first level and the first of the second (their geometric mean, counted from 1);
    lo, hi: 95% interval, as the steps around the resampled change points; before, after: the levels; share: of the
    variance that the two levels explain; p: against values in random order. half, tenth, nine_tenths: the first steps
    at which the curve, read in straight lines, has gone that share of the way from its first to its last level.

    Known failure: a steady slope has a change point too (its middle, with a small p): how far `tenth` and `nine_tenths`
    are apart says how sudden it was; and of several changes only the greatest is seen.
    """
    at = np.asarray(steps, dtype=np.float64)
    y = np.asarray(values, dtype=np.float64)
    at, y = at[np.isfinite(y)], y[np.isfinite(y)]
    if len(y) < LEAST or float(np.ptp(y)) <= 1e-12 * max(1.0, float(np.abs(y).max())):
        return None
    random = np.random.default_rng(seed)
    k, share = split(y[None])
    first = int(k[0])
    levels = np.where(np.arange(len(y)) < first, y[:first].mean(), y[first:].mean())
    residuals = y - levels
    # of a level of n points the residuals are too small by sqrt((n - 1) / n)
    sizes = np.where(np.arange(len(y)) < first, first, len(y) - first)
    residuals = residuals * np.sqrt(sizes / np.maximum(sizes - 1, 1))
    again, _ = split(levels + random.choice(residuals, (draws, len(y))))
    low, high = np.quantile(again, [0.025, 0.975], method="closest_observation").astype(int)
    shuffled = random.permuted(np.tile(y, (draws, 1)), axis=1)
    p = (1 + int((split(shuffled)[1] >= share[0] - 1e-12).sum())) / (1 + draws)
    crossings = {
        name: crossing(at, y, levels[0] + part * (levels[-1] - levels[0]), rising=bool(levels[-1] > levels[0]))
        for name, part in (("tenth", 0.1), ("half", 0.5), ("nine_tenths", 0.9))
    }
    return {
        "step": float(np.sqrt((at[first - 1] + 1) * (at[first] + 1)) - 1),
        "lo": float(at[max(0, low - 1)]),
        "hi": float(at[min(len(at) - 1, high)]),
        "before": float(levels[0]),
        "after": float(levels[-1]),
        "share": float(share[0]),
        "p": p,
        "n": len(y),
        **crossings,
    }


def split(rows: Floats) -> tuple[NDArray[np.int64], Floats]:
    """(length of the first level, share of the variance explained by two) of the best split of each row [R, N]."""
    n = rows.shape[1]
    centred = rows - rows.mean(axis=1, keepdims=True)
    sums = np.cumsum(centred, axis=1)[:, :-1]
    sizes = np.arange(1, n)
    explained = sums**2 * (1 / sizes + 1 / (n - sizes))
    best = explained.argmax(axis=1)
    total = (centred**2).sum(axis=1)
    share = np.divide(explained.max(axis=1), total, out=np.zeros(len(rows)), where=total > 0)
    return best + 1, share


def crossing(steps: Floats, values: Floats, level: float, *, rising: bool) -> float:
    """The first step at which the curve, read in straight lines between its points, reaches a level; NaN: never."""
    sign = 1.0 if rising else -1.0
    y = sign * (values - level)
    for i in range(len(y)):
        if y[i] >= 0:
            if i == 0:
                return float(steps[0])
            part = y[i - 1] / (y[i - 1] - y[i])
            return float(steps[i - 1] + part * (steps[i] - steps[i - 1]))
    return float("nan")


def transitions(values: pl.DataFrame, *, draws: int = 500, seed: int = 0) -> pl.DataFrame:
    """One row for each curve (measure, name) of a timeline that has a change point."""
    rows: list[dict[str, Any]] = []
    for (measure, name), curve in values.sort("step").group_by(["measure", "name"], maintain_order=True):
        found = change_point(curve["step"].to_list(), curve["value"].to_list(), draws=draws, seed=seed)
        if found is not None:
            rows.append({"measure": measure, "name": name, **found})
    return pl.DataFrame(rows, schema=SCHEMA)

"""Intervals of ratios of means, by bootstrap over pairs."""

import numpy as np
from torch import Tensor

_DRAWS = 1000


def ratio(
    part: Tensor, whole: Tensor, *, draws: int = _DRAWS, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """(mean(part) / mean(whole), low, high) over pairs [n]: a percentile bootstrap that draws both from the same pairs.

    A ratio of means, not a mean of ratios: pairs on which prompt and counterfactual hardly differ cannot blow it up.
    """
    top, bottom = part.double().cpu().numpy(), whole.double().cpu().numpy()
    n = len(top)
    index = np.random.default_rng(seed).integers(0, n, (draws, n))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(np.divide(top.mean(), bottom.mean()))
        drawn = top[index].mean(axis=1) / bottom[index].mean(axis=1)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return value, float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)

"""How well scores find what is true: AUROC, average precision, precision at the true size, rank correlation.

Every function takes one number a thing (a node or an edge), the larger the surer, and whether the thing is true. Things
that a method did not score are left out before.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from headwater.localize.judging.circuit_track import auroc as auroc_of_tensors

NAN = float("nan")


def auroc(scores: Sequence[float], true: Sequence[bool]) -> float:
    """The chance that a true one scores higher than a false one, ties counting half. NaN where one side is empty."""
    if not any(true) or all(true):
        return NAN
    return auroc_of_tensors(torch.tensor(scores, dtype=torch.float64), torch.tensor(true), rank="signed")


def average_precision(scores: Sequence[float], true: Sequence[bool]) -> float:
    """The mean, over the true ones, of the precision among all that score at least as high; ties stand together.

    The area under the curve of precision over recall, as a sum of steps. NaN where nothing is true.
    """
    value, yes = np.asarray(scores, dtype=np.float64), np.asarray(true, dtype=bool)
    if not yes.any():
        return NAN
    order = np.argsort(-value, kind="stable")
    value, yes = value[order], yes[order]
    ends = np.append(np.nonzero(np.diff(value))[0], len(value) - 1)  # the last of each run of ties
    found = np.cumsum(yes)[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / yes.sum())


def precision_at_size(scores: Sequence[float], true: Sequence[bool]) -> float:
    """The share of true ones among the k that score highest, k as many as are true: precision and recall at once.

    Where the k-th place is shared, what is expected of a random choice among those that share it. NaN where nothing is
    true.
    """
    value, yes = np.asarray(scores, dtype=np.float64), np.asarray(true, dtype=bool)
    k = int(yes.sum())
    if not k:
        return NAN
    least = np.sort(value)[-k]
    above, at = value > least, value == least
    expected = yes[above].sum() + (k - above.sum()) * yes[at].mean()
    return float(expected / k)


def precision_recall_f1(found: Tensor, true: Tensor) -> tuple[float, float, float]:
    """Of two sets of edges (bool, of one shape). Precision of an empty find is NaN, and so is recall of nothing."""
    hits = int((found & true).sum())
    n_found, n_true = int(found.sum()), int(true.sum())
    precision = hits / n_found if n_found else NAN
    recall = hits / n_true if n_true else NAN
    return precision, recall, 2 * hits / (n_found + n_true) if n_found + n_true else NAN


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank. NaN where one side does not vary."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return NAN
    from scipy.stats import rankdata

    first, second = rankdata(a), rankdata(b)
    return float(np.corrcoef(first, second)[0, 1])


def clustered(values: dict[str, list[float]], *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float, int]:
    """(mean, low, high, clusters): the mean over clusters of each one's mean, with a 95% bootstrap interval that draws
    whole clusters.

    values: the measured numbers of each cluster (a model's seeds), NaN where there is none. One cluster has no
    interval.
    """
    means = [float(np.nanmean(own)) for own in values.values() if len(own) and not np.isnan(own).all()]
    if not means:
        return NAN, NAN, NAN, 0
    if len(means) == 1:
        return means[0], NAN, NAN, 1
    array = np.asarray(means)
    index = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.quantile(array[index].mean(axis=1), [0.025, 0.975])
    return float(array.mean()), float(low), float(high), len(array)

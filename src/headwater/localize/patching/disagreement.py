"""Where metrics disagree about the same patches (after Zhang & Nanda, 2024).

Effects are normalized (0 the run as it was, 1 the other run), so those of different metrics can be laid side by side.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import polars as pl

_SHOWN = 10
_SMALL = 0.05

AGREEMENT = {
    "metric": pl.String,
    "other": pl.String,
    "rank_correlation": pl.Float64,
    "same_sign": pl.Float64,
    "n": pl.Int64,
}
DISAGREEMENT = {
    "metric": pl.String,
    "other": pl.String,
    "site": pl.String,
    "effect": pl.Float64,
    "other_effect": pl.Float64,
    "rank": pl.Int64,
    "other_rank": pl.Int64,
    "rank_gap": pl.Int64,
    "sign_differs": pl.Boolean,
}


def compare_metrics(
    sites: Sequence[str], effects: Mapping[str, Sequence[float]], *, shown: int = _SHOWN
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(agreement of each two metrics, the sites on which each two differ most).

    effects: metric -> effect of each site. `agreement`: metric, other, rank_correlation (Spearman's, of the effects
    over sites), same_sign (share of sites), n sites. `disagreement`: for each two metrics the `shown` sites whose
    ranks by |effect| (1 is the largest) differ most, those of opposite sign first. Signs are compared where both
    effects are at least 5% of their metric's largest; smaller ones are taken for zero.
    """
    rows, differing = [], []
    for one, two in combinations(effects, 2):
        a, b = np.asarray(effects[one], dtype=float), np.asarray(effects[two], dtype=float)
        there = np.isfinite(a) & np.isfinite(b)
        index = np.flatnonzero(there)
        a, b = a[there], b[there]
        if not len(index):
            rows.append((one, two, None, None, 0))
            continue
        counted = (np.abs(a) >= _SMALL * np.abs(a).max()) & (np.abs(b) >= _SMALL * np.abs(b).max())
        opposite = counted & (np.sign(a) != np.sign(b))
        share = 1.0 - float(opposite.sum() / counted.sum()) if counted.any() else None
        rows.append((one, two, _spearman(a, b), share, len(index)))
        ranks, others = _ranks(a), _ranks(b)
        gap = np.abs(ranks - others)
        order = sorted(range(len(index)), key=lambda i: (not opposite[i], -gap[i], ranks[i]))
        for i in order[:shown]:
            if gap[i] or opposite[i]:
                differing.append(
                    (
                        one,
                        two,
                        sites[index[i]],
                        float(a[i]),
                        float(b[i]),
                        int(ranks[i]),
                        int(others[i]),
                        int(gap[i]),
                        bool(opposite[i]),
                    )
                )
    return (
        pl.DataFrame(rows, schema=AGREEMENT, orient="row"),
        pl.DataFrame(differing, schema=DISAGREEMENT, orient="row"),
    )


def _ranks(effects: np.ndarray) -> np.ndarray:
    """1 for the largest |effect|; equal ones in the order of the sites."""
    ranks = np.empty(len(effects), dtype=int)
    ranks[np.argsort(-np.abs(effects), kind="stable")] = np.arange(1, len(effects) + 1)
    return ranks


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    from scipy.stats import rankdata

    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])

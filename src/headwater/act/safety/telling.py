"""Telling two kinds of prompts apart by what happens inside: AUROC of each part, a detector of the best, and its
baselines, judged on pairs that nothing was chosen on."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.core.errors import MethodError
from headwater.core.results import Result, register_result

Floats = NDArray[np.float64]


@register_result
class Detection(Result):
    """How well parts of a model tell two kinds of prompts apart.

    `tables["parts"]`: part (`a5.h3`, `m4`, `resid_post.6`), kind, yes and no (means over training pairs of either
    kind), auroc (on training pairs, above .5 where the part is higher for "yes"), chosen. `tables["detectors"]`:
    detector, auroc, lo, hi (95% bootstrap interval over pairs), n, baseline: on test pairs. facts: what "yes" is, how
    many pairs of either kind there are.
    """

    kind: ClassVar[str] = "detection"
    main: ClassVar[str] = "detectors"


def auroc(values: Floats, yes: NDArray[np.bool_]) -> float:
    """The chance that a value of "yes" is above one of "no" (ties count half); NaN where a kind is missing."""
    from scipy.stats import rankdata

    n_yes, n_no = int(yes.sum()), int((~yes).sum())
    if not n_yes or not n_no:
        return float("nan")
    return float((rankdata(values)[yes].sum() - n_yes * (n_yes + 1) / 2) / (n_yes * n_no))


def both_kinds(yes: NDArray[np.bool_], what: str, where: str, least: int = 2) -> None:
    """Raise MethodError unless at least `least` pairs are of either kind."""
    counts = int(yes.sum()), int((~yes).sum())
    if min(counts) < least:
        raise MethodError(
            f"too few {where} pairs to tell {what} from the rest",
            got=f"{counts[0]} of {sum(counts)} are",
            wanted=f"at least {least} of either kind",
            fix="Take more pairs, or a behavior at which the model sometimes fails",
        )


def parts_table(
    values: Mapping[tuple[str, str], Floats], yes: NDArray[np.bool_], expected: Mapping[str, int], n: int
) -> pl.DataFrame:
    """The table of parts, of which the `n` best of each kind are chosen.

    values: (kind, part) -> its value on each training pair. expected: kind -> +1 where it should be higher for "yes",
    -1 where lower, 0 where either will do.
    """
    rows = [
        {
            "part": part,
            "kind": kind,
            "yes": float(value[yes].mean()),
            "no": float(value[~yes].mean()),
            "auroc": auroc(value, yes),
        }
        for (kind, part), value in values.items()
    ]
    table = pl.DataFrame(rows)
    kept: list[tuple[str, str]] = []
    for kind, sign in expected.items():
        own = [row for row in rows if row["kind"] == kind]
        own.sort(key=lambda row: -(sign * (row["auroc"] - 0.5) if sign else abs(row["auroc"] - 0.5)))
        kept += [(kind, row["part"]) for row in own[:n]]
    marks = [(kind, part) in kept for kind, part in zip(table["kind"], table["part"], strict=True)]
    return table.with_columns(chosen=pl.Series(marks, dtype=pl.Boolean))


def detectors_table(
    scores: Mapping[str, Floats], yes: NDArray[np.bool_], baselines: Sequence[str], *, draws: int = 1000, seed: int = 0
) -> pl.DataFrame:
    """AUROC of each detector with its bootstrap interval over pairs."""
    random = np.random.default_rng(seed)
    picks = [random.integers(0, len(yes), len(yes)) for _ in range(draws)]
    picks = [pick for pick in picks if 0 < int(yes[pick].sum()) < len(yes)]
    rows = []
    for name, value in scores.items():
        drawn = np.array([auroc(value[pick], yes[pick]) for pick in picks])
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (float("nan"), float("nan"))
        rows.append(
            {
                "detector": name,
                "auroc": auroc(value, yes),
                "lo": float(low),
                "hi": float(high),
                "n": len(yes),
                "baseline": name in baselines,
            }
        )
    return pl.DataFrame(rows)


def standardized(train: Floats, test: Floats) -> Floats:
    """Test values [n, K] in units of the training values' spread; a value that never moves stays 0."""
    spread = train.std(0)
    return (test - train.mean(0)) / np.where(spread > 0, spread, 1.0)

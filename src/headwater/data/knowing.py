"""Which facts a model knows, against how often each stood in what it had read: threshold, held-out prediction, change.

A fact is a subject and an object (a country and its capital). Its counts grow over the checkpoints, and so does all
else: so every comparison here is made between facts of the *same* checkpoint, and nulls deal the counts out anew among
the facts.

Shapes: F facts, S steps.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.claims.statistics import p_from_draws
from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result, register_result

Floats = NDArray[np.float64]
COLUMNS = ("step", "fact", "split", "pair", "subject", "object", "known")
PREDICTORS = ("pair", "subject", "object", "step")
_PREDICTED: dict[str, Any] = {
    "predictor": pl.String, "auc": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "log_loss": pl.Float64,
    "n": pl.Int64,
}  # fmt: skip
_LEAST = 6
"""Facts that each split needs."""


@register_result
class FactLink(Result):
    """What the facts that a model knows have to do with what it had read.

    `tables["facts"]`: step, fact, split, pair, subject, object (how often each had stood in what was read by then),
    known (share of the fact's prompts that were answered right, over all tokens). `tables["predictors"]`: predictor
    ("pair": co-occurrences, "subject", "object", "step"), auc (held out: facts of the test split, predicted by a
    logistic curve of the log count fitted on those of the train split; between facts of the same step), lo, hi (95%,
    facts resampled), log_loss (nats), n (test facts). Facts: threshold (the count at which half of the facts are known,
    over all steps) with lo, hi; slope; auc and p of the pair count against counts dealt out anew, with null_mean.
    """

    kind: ClassVar[str] = "fact_link"
    main: ClassVar[str | None] = "facts"


@register_result
class FactChange(Result):
    """What became of each fact where the same training was done once more on other data.

    `tables["facts"]`: fact, split, log_count (natural log of 1 + co-occurrences, mean over the steps),
    log_count_redone, known (mean over the steps: how early it was learned), known_redone, change_count, change_known.
    Facts: r (of the two changes, over facts), lo, hi, p (changes of count dealt out anew), n, moved (facts whose count
    changed).
    """

    kind: ClassVar[str] = "fact_change"
    main: ClassVar[str | None] = "facts"


class Grid(NamedTuple):
    """The table as arrays. known, counts[what]: [F, S]; train: [F] bool."""

    facts: list[str]
    steps: list[int]
    train: NDArray[np.bool_]
    known: Floats
    counts: dict[str, Floats]


def grid(table: pl.DataFrame) -> Grid:
    """The facts as arrays. Raises MethodError for missing columns, or facts that lack a step."""
    for name in COLUMNS:
        if name not in table.columns:
            raise MethodError("a table of facts lacks a column", got=", ".join(table.columns), wanted=name)
    ordered = table.sort("fact", "step")
    facts = ordered["fact"].unique(maintain_order=True).to_list()
    steps = sorted(ordered["step"].unique().to_list())
    if ordered.height != len(facts) * len(steps):
        raise MethodError("every fact is measured at every step, once", got=f"{ordered.height} rows")

    def of(name: str) -> Floats:
        return ordered[name].cast(pl.Float64).to_numpy().reshape(len(facts), len(steps))

    train = (ordered["split"].to_numpy().reshape(len(facts), len(steps)) == "train")[:, 0]
    return Grid(facts, steps, train, of("known"), {name: of(name) for name in ("pair", "subject", "object")})


def fact_link(table: pl.DataFrame, *, draws: int = 999, seed: int = 0) -> FactLink:
    """Relate what a model knows at each step to the counts by then.

    table: columns of `FactLink.tables["facts"]`. draws: of the null (counts dealt out anew among the facts, each with
    its whole history) and of the bootstrap over facts. Raises MethodError for too few facts, or where all facts are
    known at every step, or none is: then frequency can explain nothing.

    Known failure: co-occurrence is no statement, and a frequent subject has frequent pairs: hold the predictors against
    each other. A correlation over facts is no cause: see `fact_change`.
    """
    found = grid(table)
    known, pair = found.known, found.counts["pair"]
    test = ~found.train
    if min(int(test.sum()), int(found.train.sum())) < _LEAST:
        got = f"{int(found.train.sum())} facts to fit on, {int(test.sum())} to judge on"
        raise MethodError("too few facts", got=got, wanted=f"{_LEAST} of each")
    if not np.isfinite(within(known, pair)):
        raise MethodError(
            "no step at which some facts are known and others are not, with different counts",
            got=f"{known.mean():.0%} known over all steps",
        )
    random = np.random.default_rng(seed)
    auc = within(known[test], pair[test])
    null = [within(known[test], random.permutation(pair[test])) for _ in range(draws)]
    null = [one for one in null if np.isfinite(one)]
    threshold, slope = crossing(known, pair)
    again = [crossing(known[rows], pair[rows])[0] for rows in _resampled(len(known), min(draws, 500), random)]
    lo, hi = interval(again)
    steps = np.broadcast_to(np.log1p(np.asarray(found.steps, dtype=np.float64)), known.shape)
    rows = [
        _predicted(name, known, np.log1p(found.counts[name]) if name != "step" else steps, found.train, draws, random)
        for name in PREDICTORS
    ]
    facts = {
        "threshold": threshold, "lo": lo, "hi": hi, "slope": slope, "auc": auc,
        "p": p_from_draws(auc, null) if np.isfinite(auc) and null else None,
        "null_mean": float(np.mean(null)) if null else None,
        "facts": len(known), "steps": len(found.steps), "test_facts": int(test.sum()),
    }  # fmt: skip
    return FactLink(
        tables={"facts": table.sort("step", "fact"), "predictors": pl.DataFrame(rows, schema=_PREDICTED)},
        facts=facts,
        config={"draws": draws, "seed": seed},
        provenance=Provenance.collect(seed=seed),
    )


def fact_change(before: pl.DataFrame, after: pl.DataFrame, *, draws: int = 999, seed: int = 0) -> FactChange:
    """Whether what a model knows follows the data: the change of each fact's count against the change of what is known
    of it, between a training and the same training on other data (do(data)).

    before, after: as `fact_link` takes them, of the same facts and steps. Raises MethodError where they are not.
    Known failure: facts that are known in both, or in neither, say nothing; many of them draw r towards 0.
    """
    old, new = grid(before), grid(after)
    if old.facts != new.facts or old.steps != new.steps:
        raise MethodError("the two trainings are not of the same facts and steps", got=f"{len(old.facts)} facts")
    counts = [np.log1p(one.counts["pair"]).mean(axis=1) for one in (old, new)]
    known = [one.known.mean(axis=1) for one in (old, new)]
    change_count, change_known = counts[1] - counts[0], known[1] - known[0]
    random = np.random.default_rng(seed)
    r = correlation(change_count, change_known)
    null = [correlation(random.permutation(change_count), change_known) for _ in range(draws)]
    null = [one for one in null if np.isfinite(one)]
    again = [
        correlation(change_count[rows], change_known[rows]) for rows in _resampled(len(known[0]), draws, random)
    ]  # fmt: skip
    lo, hi = interval(again)
    table = pl.DataFrame({
        "fact": old.facts, "split": ["train" if one else "test" for one in old.train.tolist()],
        "log_count": counts[0], "log_count_redone": counts[1], "known": known[0], "known_redone": known[1],
        "change_count": change_count, "change_known": change_known,
    })  # fmt: skip
    facts = {
        "r": r, "lo": lo, "hi": hi, "p": p_from_draws(r, null) if np.isfinite(r) and null else None,
        "null_mean": float(np.mean(null)) if null else None, "n": len(old.facts),
        "moved": int((np.abs(change_count) > 1e-9).sum()),
    }  # fmt: skip
    config = {"draws": draws, "seed": seed}
    return FactChange(tables={"facts": table}, facts=facts, config=config, provenance=Provenance.collect(seed=seed))


def within(known: Floats, predictor: Floats) -> float:
    """Area under the ROC curve of a predictor [F, S] for what is known [F, S], between facts of the same step.

    The mean over the steps, each weighted by how many pairs of facts it can compare; a share of prompts counts as that
    part of a fact. 0.5: no better than chance. NaN where no step can be compared.
    """
    total = weight = 0.0
    for step in range(known.shape[1]):
        y, x = known[:, step], predictor[:, step]
        pairs = float(y.sum() * (1 - y).sum() - (y * (1 - y)).sum())
        if pairs <= 1e-12 or float(np.ptp(x)) == 0:
            continue
        order = np.argsort(x, kind="stable")
        y, x = y[order], x[order]
        # sums over values that tie count half
        _, start = np.unique(x, return_index=True)
        ones, zeros = np.add.reduceat(y, start), np.add.reduceat(1 - y, start)
        itself = np.add.reduceat(y * (1 - y), start)
        below = np.concatenate([[0.0], np.cumsum(zeros)[:-1]])
        won = float((ones * below).sum() + 0.5 * (ones * zeros - itself).sum())
        total, weight = total + won, weight + pairs
    return total / weight if weight else float("nan")


def crossing(known: Floats, counts: Floats) -> tuple[float, float]:
    """(count at which half is known, slope a factor of e) of a logistic curve of log(1 + count) over all facts and
    steps; the count is NaN where more is not better."""
    slope, start = logistic(np.log1p(counts).reshape(-1), known.reshape(-1))
    return (float(np.expm1(min(-start / slope, 50.0))) if slope > 1e-6 else float("nan")), slope


def logistic(x: Floats, y: Floats, *, penalty: float = 1e-3) -> tuple[float, float]:
    """(slope, intercept) of y = 1 / (1 + exp(-(slope x + intercept))), y in [0, 1]: Newton's steps on the likelihood,
    the slope held by a small ridge so that separable data have an answer."""
    mean, scale = float(x.mean()), float(x.std()) or 1.0
    design = np.stack([(x - mean) / scale, np.ones_like(x)], axis=1)
    ridge = np.diag([penalty * len(x), 1e-9])
    weights = np.zeros(2)
    for _ in range(50):
        shares = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (y - shares) - ridge @ weights
        curvature = (design * (shares * (1 - shares))[:, None]).T @ design + ridge
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), gradient)
        weights = weights + np.clip(step, -4, 4)
        if float(np.abs(step).max()) < 1e-9:
            break
    slope = float(weights[0]) / scale
    return slope, float(weights[1]) - slope * mean


def correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    """Pearson's r; NaN where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / size) if size > 1e-12 else float("nan")


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The middle 95% of the finite values; (None, None) where fewer than half are finite."""
    known = [value for value in values if np.isfinite(value)]
    if 2 * len(known) < len(values) or not known:
        return None, None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _predicted(
    name: str, known: Floats, x: Floats, train: NDArray[np.bool_], draws: int, random: np.random.Generator
) -> dict[str, Any]:
    slope, start = logistic(x[train].reshape(-1), known[train].reshape(-1))
    score = slope * x[~train] + start
    y = known[~train]
    shares = np.clip(1 / (1 + np.exp(-np.clip(score, -30, 30))), 1e-6, 1 - 1e-6)
    loss = float(-(y * np.log(shares) + (1 - y) * np.log(1 - shares)).mean())
    auc = within(y, score)
    again = [within(y[rows], score[rows]) for rows in _resampled(len(y), min(draws, 500), random)]
    lo, hi = interval(again)
    if not np.isfinite(auc):  # the step alone tells no fact from another
        auc, lo, hi = 0.5, 0.5, 0.5
    return {"predictor": name, "auc": auc, "lo": lo, "hi": hi, "log_loss": loss, "n": len(y)}


def _resampled(n: int, draws: int, random: np.random.Generator) -> Any:
    return (random.integers(0, n, n) for _ in range(draws))

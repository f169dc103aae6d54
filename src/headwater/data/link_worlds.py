"""Counterfactual pre-training: the same facts, other frequencies. Does the mechanism follow?

A correlation between how often something was read and how well it is known has many causes: facts that are easy may be
frequent too. Two models of the same recipe, trained on worlds that differ in frequencies alone, tell: what changes in
the mechanism where the frequency was changed was changed by the data.
"""

import time
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.claims import Context, Ledger, Outcome, claim_from_test, p_from_draws, test
from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result, register_result
from headwater.data.counts import Counts
from headwater.data.link import points_of, seen
from headwater.data.link_stats import Groups, correlations, estimate
from headwater.data.link_strengths import Strengths

Floats = NDArray[np.float64]
WHATS = ("causality", "accuracy", "log_prob")
LEAST = 5
"""Relations that a verdict needs."""


@register_result
class WorldsResult(Result):
    """What changing frequencies did to mechanisms: world b minus world a.

    `tables["changes"]`: step, relation, n (judged facts), pair (change of the mean of log10(1 + times together)),
    causality, accuracy, log_prob (changes). `tables["fact_changes"]`, at the last step: relation, subject, object,
    pair, right (-1, 0 or 1), log_prob. `tables["correlations"]`: level ("relation" or "fact"), strength, steps, r, lo,
    hi (over relations), p (one-sided, changes of frequency dealt out anew: among relations, or for facts among those of
    one relation), points. Facts: r, lo, hi, p (relations, last step, causality), steps, relations.
    """

    kind: ClassVar[str] = "counterfactual_pretraining"
    main: ClassVar[str | None] = "correlations"

    def outcome(self, *, reference: float = 0.0) -> Outcome:
        """The do(data) test: that causality follows the frequency of its facts, with r above `reference`."""
        facts = self.facts
        few = len(facts["relations"]) < LEAST
        return Outcome(
            effect=facts["r"], lo=facts["lo"], hi=facts["hi"], p=facts["p"], n=len(facts["relations"]),
            reference=reference, details={"steps": facts["steps"], "relations": facts["relations"]},
            why_not=f"{len(facts['relations'])} relations are too few to decide" if few else "",
        )  # fmt: skip

    def ledger(self, *, q: float = 0.05, command: str = "") -> Ledger:
        """The do(data) claim, decided: the same facts under other frequencies have mechanisms that follow them."""
        statement = "Where the same facts are read more or less often, the causality of their relation follows."
        context = Context(worlds=self)
        claim = claim_from_test(
            "do-data-frequency", statement, "counterfactual_pretraining", context, stage="data", command=command
        )
        return Ledger.of([claim], q=q, title="Counterfactual pre-training", provenance=self.provenance)


def compare_worlds(
    a_strengths: Strengths,
    a_counts: Counts,
    b_strengths: Strengths,
    b_counts: Counts,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> WorldsResult:
    """Hold the change of frequency against the change of the mechanism, between two models that differ in the data.

    Both strengths must be of the same facts at the same steps, measured alike. Raises MethodError where they are not.
    Known failure: a run has other accidents too (the order of the data, the random numbers of its steps), so two seeds
    of one world differ a little; and where all frequencies of a relation moved alike, its facts cannot tell which did.
    """
    started = time.monotonic()
    if draws < 10:
        raise MethodError("a null needs draws", got=draws, wanted="10 or more")
    a, b = seen(a_strengths, a_counts), seen(b_strengths, b_counts)
    keys = ["step", "relation", "subject", "object", "role"]
    if not a.select(keys).sort(keys).equals(b.select(keys).sort(keys)):
        raise MethodError(
            "the two worlds were measured on other facts or steps", got=f"{a.height} and {b.height} rows",
            fix="Measure both with the same relations, steps and settings",
        )  # fmt: skip
    at = ["step", "relation"]
    both = points_of(a).filter(pl.col("subjects") == "all").join(
        points_of(b).filter(pl.col("subjects") == "all"), on=at, suffix="_b"
    )  # fmt: skip
    changes = both.select(*at, "n", *((pl.col(f"{one}_b") - pl.col(one)).alias(one) for one in ("pair", *WHATS)))
    last = max(a_strengths.steps)
    facts = a.filter(pl.col("step") == last).join(b.filter(pl.col("step") == last), on=keys[1:], suffix="_b")
    fact_changes = facts.select(
        *keys[1:4],
        (pl.col("log_pair_b") - pl.col("log_pair")).alias("pair"),
        (pl.col("right_b").cast(pl.Int64) - pl.col("right").cast(pl.Int64)).alias("right"),
        (pl.col("log_prob_b") - pl.col("log_prob")).alias("log_prob"),
    )
    rows: list[dict[str, Any]] = []
    for strength in WHATS:
        for steps, part in (("all", changes), ("last", changes.filter(pl.col("step") == last))):
            rows.append({"level": "relation", "strength": strength, "steps": steps, **_r(part, strength, draws, seed)})
    for strength in ("right", "log_prob"):
        found = _r(fact_changes, strength, draws, seed)
        rows.append({"level": "fact", "strength": strength, "steps": "last", **found})
    best = next(row for row in rows if row["strength"] == "causality" and row["steps"] == "last")
    return WorldsResult(
        tables={"changes": changes, "fact_changes": fact_changes, "correlations": pl.DataFrame(rows)},
        facts={
            **{one: best[one] for one in ("r", "lo", "hi", "p")}, "steps": a_strengths.steps,
            "relations": a_strengths.facts["relations"],
        },
        config={"draws": draws, "seed": seed},
        provenance=Provenance.collect(seed=seed, seconds=time.monotonic() - started),
    )  # fmt: skip


def _r(table: pl.DataFrame, strength: str, draws: int, seed: int) -> dict[str, Any]:
    """r of the change in frequency with the change of a strength, its interval over relations, and its p."""
    table = table.sort(["relation", *(["step"] if "step" in table.columns else [])])
    x, y = table["pair"].to_numpy().astype(np.float64), table[strength].to_numpy().astype(np.float64)
    groups = Groups(table["relation"].to_numpy(), draws=draws, seed=seed)
    drawn = correlations(x, y, groups)
    r = estimate(drawn)
    random = np.random.default_rng(seed)
    whole = Groups(np.zeros(len(x), dtype="<U1"), draws=0, seed=seed)
    steps = table["step"].n_unique() if "step" in table.columns else 0
    null: list[float] = []
    for _ in range(draws):
        if steps:  # a relation's changes over the steps go together
            dealt = x.reshape(-1, steps)[random.permutation(len(groups.names))].reshape(-1)
        else:
            dealt = x[np.lexsort((random.random(len(x)), groups.index))]  # within each relation
        null.append(float(correlations(dealt, y, whole)[0]))
    known = [value for value in null if np.isfinite(value)]
    p = p_from_draws(r.value, known) if known and np.isfinite(r.value) else float("nan")
    return {"r": r.value, "lo": r.lo, "hi": r.hi, "p": p, "points": len(x)}


@test("counterfactual_pretraining")
def _counterfactual(context: Context, *, seed: int, reference: float = 0.0) -> Outcome:
    """See `WorldsResult.outcome`; on the context's `worlds`."""
    del seed  # its draws are those of the result
    return context["worlds"].outcome(reference=reference)

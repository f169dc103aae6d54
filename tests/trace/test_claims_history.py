"""The tests of claims about a model's history, on tables whose truth is written down."""

import numpy as np
import polars as pl
import pytest

from headwater.claims import Claim, Context, Ledger, Outcome, run_test
from headwater.core.results import Result
from headwater.data.knowing import fact_change, fact_link
from headwater.dynamics.formation import Formation, curves, halfway, head_curve, shortest, windows
from headwater.trace.claims_history import NOT_CHANGED, found_threshold

STEPS = [0, 1, 2, 4, 8, 16, 32, 64, 128]


def formed(*, behavior: int = 16, circuit: int = 4, noise: float = 0.3, n: int = 30, seed: int = 0) -> Formation:
    """Behavior and circuit that step up at these steps."""
    random = np.random.default_rng(seed)
    rows = [
        {
            "step": step, "id": f"{i:03d}", "split": ("train", "test")[i % 2],
            "whole": 5.0 * (step >= behavior) + noise * random.normal(),
            "part": 4.0 * (step >= circuit) + noise * random.normal(), "known": step >= behavior,
        }
        for step in STEPS
        for i in range(2 * n)
    ]  # fmt: skip
    found = Formation(tables={"pairs": pl.DataFrame(rows)}, facts={"steps": STEPS, "metric": "logit_diff"})
    found.tables["curves"] = curves(found, seed=0)
    found.tables["windows"] = windows(found, 0.8)
    return found


def decided(outcome: Outcome) -> str:
    claim = Claim(id="it", statement="It is so.", test="some").with_outcome(outcome)
    return Ledger.of([claim])["it"].status


# --- when


def test_windows_are_where_the_steps_were_put():
    found = formed()
    assert found.window("behavior") == {
        "what": "behavior", "first": 8, "last": 16, "share": 0.8, "held": pytest.approx(1.0, abs=0.1),
        "half": pytest.approx(11.4, abs=0.6),
    }  # fmt: skip
    assert (found.window("circuit") or {})["first"] == 2
    assert found.tables["curves"].filter(step=128, what="behavior", split="test")["value"].item() == pytest.approx(1.0)
    flat = np.ones(4)
    assert shortest(np.arange(4.0), flat, 0.8) is None and np.isnan(halfway(np.arange(4.0), flat))
    # of two stretches of as many checkpoints, the nearer in log(1 + step)
    assert shortest(np.array([0.0, 1, 8, 16]), np.array([0.0, 0, 0, 1]), 0.8) == (2, 3)
    assert halfway(np.array([1.0, 3.0]), np.array([0.0, 1.0])) == pytest.approx(2 * np.sqrt(2) - 1)


def test_what_formed_in_between_is_supported_and_elsewhere_refuted():
    context = Context(formation=formed())
    params = {"what": "behavior", "threshold": 0.5}
    right = run_test("formed_between", context, {**params, "first": 8, "last": 16})
    assert decided(right) == "supported" and right.effect == pytest.approx(1.0, abs=0.1) and right.n == 30
    assert len(right.null_draws) == 7 and max(right.null_draws) < 0.1
    wrong = run_test("formed_between", context, {**params, "first": 16, "last": 64})
    assert decided(wrong) == "refuted" and wrong.hi is not None and wrong.hi < 0.2
    few = Context(formation=formed(n=3))
    assert "too few" in run_test("formed_between", few, {**params, "first": 8, "last": 16}).why_not
    never = run_test("formed_between", Context(formation=formed(behavior=999)), {**params, "first": 8, "last": 16})
    assert "did not" in never.why_not
    with pytest.raises(Exception, match="no such checkpoints"):
        run_test("formed_between", context, {**params, "first": 8, "last": 17})


def test_which_formed_first():
    context = Context(formation=formed(behavior=32, circuit=4, noise=0.05))
    circuit, behavior = ["circuit"], ["behavior"]
    first = run_test("formed_first", context, {"first": circuit, "second": behavior, "draws": 99})
    assert decided(first) == "supported" and first.effect > 10
    other = run_test("formed_first", context, {"first": behavior, "second": circuit, "draws": 99})
    assert decided(other) == "refuted"
    # which was to be first was read off the curves that are tested: p counts both orders
    from headwater.dynamics.first import came_first
    from headwater.trace.claims_history import _Curves

    own = came_first(_Curves(context), ("circuit",), ("behavior",), draws=99)  # type: ignore[arg-type]
    assert own.p is not None and first.p == pytest.approx(2 * own.p) and other.p == 1.0
    flat = Context(formation=formed(behavior=999, noise=0.0))
    none = run_test("formed_first", flat, {"first": circuit, "second": behavior, "draws": 99})
    assert decided(none) == "inconclusive" and "no change point" in none.why_not


def test_a_group_of_heads_is_the_mean_of_its_heads():
    values = [
        {"step": step, "measure": "heads", "name": f"induction a1.h{head}", "value": float(head * (step >= 4))}
        for step in STEPS
        for head in range(3)
    ]
    timeline = Result(tables={"values": pl.DataFrame(values)})
    steps, mean = head_curve(timeline, "induction", [[1, 0], [1, 2]])
    assert steps.tolist() == STEPS and mean.tolist() == [0.0] * 3 + [1.0] * 6
    context = Context(formation=formed(behavior=32, noise=0.05), timeline=timeline)
    heads = ["heads", "induction", [[1, 0], [1, 2]]]
    assert decided(run_test("formed_first", context, {"first": heads, "second": ["behavior"], "draws": 99})) == (
        "supported"
    )


# --- which frequency


def facts(*, seed: int = 0, n: int = 60, by: str = "pair") -> pl.DataFrame:
    random = np.random.default_rng(seed)
    rates = {name: np.exp(random.normal(0, 1.5, n)) for name in ("pair", "subject", "object")}
    rows = []
    for step in (1, 10, 100):
        for i in range(n):
            counts = {name: float(round(step * values[i])) for name, values in rates.items()}
            rows.append({
                "step": step, "fact": f"{i:03d}", "split": ("train", "test")[i % 2], **counts,
                "known": float(counts[by] + random.normal() > 40),
            })  # fmt: skip
    return pl.DataFrame(rows)


@pytest.mark.parametrize("name", ["frequency_tells_known", "pair_above_parts", "known_above_threshold"])
def test_frequency_is_told_and_decides_only_with_do_data(name):
    params = {"draws": 99} | ({"threshold": 40.0} if name == "known_above_threshold" else {})
    link = fact_link(facts(), draws=19)
    alone = run_test(name, Context(fact_link=link), params)
    assert alone.why_not == NOT_CHANGED and decided(alone) == "inconclusive"
    changed = fact_change(facts(), facts(seed=1), draws=19)
    both = run_test(name, Context(fact_link=link, fact_change=changed), params)
    assert decided(both) == "supported" and both.effect == alone.effect and both.n == 30


def test_a_confound_is_not_taken_for_the_pair():
    link = fact_link(facts(by="subject"), draws=19)
    changed = fact_change(facts(), facts(seed=1), draws=19)
    context = Context(fact_link=link, fact_change=changed)
    assert decided(run_test("pair_above_parts", context, {"draws": 99})) == "refuted"
    assert decided(run_test("frequency_tells_known", context, {"draws": 99})) != "supported"


def test_the_threshold_is_found_on_train_facts():
    table = facts(n=200)
    found = found_threshold(table)
    assert found is not None and 25 < found < 60
    assert found_threshold(table.with_columns(known=1 - pl.col("known"))) is None


def test_all_known_alike_leaves_it_open():
    table = facts()
    known = pl.when(pl.col("split") == "test").then(1.0).otherwise(pl.col("known")).alias("known")
    link = Result(tables={"facts": table.with_columns(known)})
    for name in ("frequency_tells_known", "pair_above_parts"):
        assert "known alike" in run_test(name, Context(fact_link=link), {"draws": 99}).why_not


def points(*, by: str = "pair", seed: int = 0, n: int = 14) -> Result:
    random = np.random.default_rng(seed)
    rates = {name: random.normal(0, 0.7, n) for name in ("pair", "subject", "object")}
    rows = []
    for step in (1, 10, 100):
        for i in range(n):
            counts = {name: float(np.log10(step) + values[i]) for name, values in rates.items()}
            strength = 1 / (1 + np.exp(-3 * (counts[by] - 1.5)))
            rows.append({"step": step, "relation": f"r{i}", "subjects": "all", **counts, "causality": strength})
    return Result(tables={"points": pl.DataFrame(rows)})


def test_the_link_of_relations_beats_what_the_step_alone_gives():
    changed = {"fact_change": fact_change(facts(), facts(seed=1), draws=19)}
    context = Context(link=points(), **changed)
    found = run_test("link_above_null", context, {"draws": 199})
    assert decided(found) == "supported" and found.effect > 0.85 and 0.3 < found.reference < 0.8
    assert decided(run_test("link_pair_above_parts", context, {"draws": 199})) == "supported"
    other = Context(link=points(by="subject"), **changed)
    assert decided(run_test("link_above_null", other, {"draws": 199})) != "supported"
    assert decided(run_test("link_pair_above_parts", other, {"draws": 199})) == "refuted"
    assert run_test("link_above_null", Context(link=points()), {"draws": 99}).why_not == NOT_CHANGED


# --- do(data)


def test_knowledge_that_follows_and_one_that_stays():
    before, after = facts(seed=1, n=80), facts(seed=2, n=80)
    follows = Context(fact_change=fact_change(before, after, draws=19))
    found = run_test("knowledge_follows_data", follows, {"draws": 99})
    assert decided(found) == "supported" and found.n == 40 and found.effect > 0.5
    stays = Context(fact_change=fact_change(before, after.with_columns(known=before.sort("step", "fact")["known"])))
    assert "changed" in run_test("knowledge_follows_data", stays, {"draws": 99}).why_not

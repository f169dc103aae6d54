"""What is known against what was read, on tables whose truth is written down."""

import numpy as np
import polars as pl
import pytest

from headwater.core.errors import MethodError
from headwater.core.results import load_result
from headwater.data.knowing import crossing, fact_change, fact_link, grid, interval, logistic, within

STEPS = (1, 10, 100)


def table(*, seed: int = 0, threshold: float = 50.0, facts: int = 60, by: str = "pair", sharp: float = 3.0):
    """Facts whose `by` count decides, by a logistic curve, whether they are known."""
    random = np.random.default_rng(seed)
    rates = np.exp(random.normal(0, 1.5, facts))
    others = {name: np.exp(random.normal(0, 1.5, facts)) for name in ("subject", "object")}
    rows = []
    for step in STEPS:
        for i in range(facts):
            counts = {
                "pair": round(step * rates[i]),
                **{name: round(step * (rates[i] * 0.2 + values[i])) for name, values in others.items()},
            }
            chance = 1 / (1 + np.exp(-sharp * (np.log1p(counts[by]) - np.log1p(threshold))))
            rows.append({
                "step": step, "fact": f"fact {i:03d}", "split": ("train", "test")[i % 2], **counts,
                "known": float(random.random() < chance),
            })  # fmt: skip
    return pl.DataFrame(rows)


def plain_within(known, x):
    """The definition: over pairs of facts of one step of which the first is known and the second is not."""
    total = n = 0.0
    for step in range(known.shape[1]):
        if np.ptp(x[:, step]) == 0:
            continue
        for i in range(len(known)):
            for j in range(len(known)):
                weight = known[i, step] * (1 - known[j, step]) if i != j else 0.0
                total += weight * ((x[i, step] > x[j, step]) + 0.5 * (x[i, step] == x[j, step]))
                n += weight
    return total / n if n else float("nan")


@pytest.mark.parametrize("seed", range(4))
def test_the_area_is_that_over_pairs_of_facts(seed):
    random = np.random.default_rng(seed)
    known = random.integers(0, 3, (9, 4)) / 2  # shares of prompts, too
    x = random.integers(0, 4, (9, 4)).astype(float)
    x[:, 2] = 1.0
    assert within(known, x) == pytest.approx(plain_within(known, x), abs=1e-12)
    assert np.isnan(within(np.ones((5, 2)), random.random((5, 2))))
    assert np.isnan(within(known, np.ones_like(x)))


def test_the_logistic_curve_is_the_likeliest():
    random = np.random.default_rng(0)
    x = random.normal(2.0, 3.0, 4000)
    y = (random.random(4000) < 1 / (1 + np.exp(-(0.7 * x - 1.4)))).astype(float)
    slope, start = logistic(x, y, penalty=0.0)
    assert slope == pytest.approx(0.7, abs=0.06) and start == pytest.approx(-1.4, abs=0.15)
    shares = 1 / (1 + np.exp(-(slope * x + start)))
    assert abs(float(((y - shares) * x).mean())) < 1e-6  # the gradient is zero
    separable = logistic(np.array([0.0, 1, 2, 3]), np.array([0.0, 0, 1, 1]))
    assert np.isfinite(separable).all() and -separable[1] / separable[0] == pytest.approx(1.5, abs=0.05)


def test_the_threshold_that_was_put_in_comes_out(tmp_path):
    found = fact_link(table(facts=160), draws=99)
    facts = found.facts
    assert facts["lo"] < 50 < facts["hi"] and facts["threshold"] == pytest.approx(50, rel=0.4)
    assert facts["p"] <= 0.01 and facts["auc"] > 0.85 and abs(facts["null_mean"] - 0.5) < 0.05
    areas = {row["predictor"]: row for row in found.tables["predictors"].to_dicts()}
    assert areas["pair"]["lo"] > max(areas["subject"]["auc"], areas["object"]["auc"])
    assert areas["step"]["auc"] == 0.5 and areas["pair"]["log_loss"] < areas["step"]["log_loss"]
    found.save(tmp_path / "link")
    assert load_result(tmp_path / "link", check=True).content_hash == found.content_hash


def test_a_subject_that_decides_is_seen_as_such():
    areas = fact_link(table(by="subject", facts=160, seed=3), draws=49).tables["predictors"]
    found = dict(areas.select("predictor", "auc").iter_rows())
    assert found["subject"] > found["pair"] > 0.4


def test_all_or_nothing_known_explains_nothing():
    with pytest.raises(MethodError, match="no step at which"):
        fact_link(table().with_columns(known=pl.lit(1.0)))
    with pytest.raises(MethodError, match="too few facts"):
        fact_link(table(facts=8))
    with pytest.raises(MethodError, match="lacks a column"):
        fact_link(table().drop("pair"))
    with pytest.raises(MethodError, match="every step, once"):
        grid(table().head(61))


def test_knowledge_that_follows_its_counts_and_one_that_does_not():
    before, other = table(seed=1, facts=80), table(seed=2, facts=80)
    change = fact_change(before, other, draws=199)
    assert change.facts["lo"] > 0.4 and change.facts["p"] == 1 / 200 and change.facts["moved"] > 70
    row = change.tables["facts"].row(0, named=True)
    first = before.filter(pl.col("fact") == row["fact"])
    assert row["log_count"] == pytest.approx(float(np.log1p(first["pair"].to_numpy()).mean()))
    assert row["change_known"] == pytest.approx(row["known_redone"] - row["known"])
    shuffled = other.with_columns(known=pl.Series(np.random.default_rng(5).permutation(other["known"].to_numpy())))
    none = fact_change(before.with_columns(known=shuffled["known"].reverse()), shuffled, draws=199)
    assert none.facts["lo"] < 0 < none.facts["hi"] and none.facts["p"] > 0.05
    with pytest.raises(MethodError, match="same facts"):
        fact_change(before, other.filter(pl.col("fact") != "fact 000"))


def test_small_parts():
    assert interval([float("nan")] * 3) == (None, None)
    assert interval([1.0] * 4 + [float("nan")]) == (1.0, 1.0)
    known = np.array([[0.0], [0.0], [1.0], [1.0]])
    assert np.isnan(crossing(known, np.array([[4.0], [3.0], [2.0], [1.0]]))[0])  # more is not better

"""Statistics of grouped points, against plain definitions."""

import numpy as np
import pytest
from scipy.optimize import minimize

from headwater.data.link_stats import Groups, correlations, estimate, logistic, ridge_held_out


def points(n: int = 60, groups: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    of = np.array([f"r{i % groups}" for i in range(n)])
    x = random.normal(size=n) + 1000
    return x, 0.5 * (x - 1000) + random.normal(size=n), of


def test_r_is_pearsons_and_resamples_are_of_whole_groups() -> None:
    x, y, of = points()
    groups = Groups(of, draws=20, seed=1)
    found = correlations(x, y, groups)
    assert found[0] == pytest.approx(np.corrcoef(x, y)[0, 1])
    names = sorted(set(of))
    for row in (1, 7):
        chosen = [name for name, times in zip(names, groups.weights[row], strict=True) for _ in range(int(times))]
        assert len(chosen) == len(names)
        take = np.concatenate([np.flatnonzero(of == name) for name in chosen])
        assert found[row] == pytest.approx(np.corrcoef(x[take], y[take])[0, 1])


def test_r_of_what_does_not_vary_is_unknown() -> None:
    x, y, of = points()
    groups = Groups(of, draws=5, seed=1)
    assert np.isnan(correlations(x, np.ones_like(y), groups)).all()
    assert np.isnan(correlations(x[:2], y[:2], groups)).all()
    assert np.isnan(estimate(np.array([np.nan, 1.0])).lo)


def test_an_interval_over_groups_is_wider_than_one_over_points_where_groups_differ() -> None:
    random = np.random.default_rng(0)
    of = np.repeat([f"r{i}" for i in range(8)], 40)
    level = np.repeat(random.normal(size=8), 40)
    x, y = level + random.normal(size=320) * 0.1, np.repeat(random.normal(size=8), 40) + random.normal(size=320) * 0.1
    grouped = estimate(correlations(x, y, Groups(of, draws=500, seed=0)))
    single = estimate(correlations(x, y, Groups(np.arange(320).astype(str), draws=500, seed=0)))
    assert grouped.hi - grouped.lo > 2 * (single.hi - single.lo)


def test_the_logistic_curve_is_the_likeliest() -> None:
    random = np.random.default_rng(3)
    x = random.uniform(0, 3, 80)
    y = np.clip(1 / (1 + np.exp(-3 * (x - 1.5))) + random.normal(size=80) * 0.05, 0, 1)
    of = np.array([f"r{i % 8}" for i in range(80)])
    weight = random.integers(5, 50, 80).astype(float)
    found = logistic(x, y, weight, Groups(of, draws=10, seed=0))[0]

    def loss(beta: np.ndarray) -> float:
        z = beta[0] + beta[1] * x
        return float((weight * (np.logaddexp(0, z) - y * z)).sum())

    assert found == pytest.approx(minimize(loss, np.zeros(2)).x, rel=1e-2)
    assert (np.log(9) - found[0]) / found[1] == pytest.approx(1.5 + np.log(9) / 3, abs=0.2)


def test_separable_data_stay_finite() -> None:
    x = np.linspace(0, 1, 20)
    y = (x > 0.5).astype(float)
    assert np.isfinite(logistic(x, y, np.ones(20), Groups(np.arange(20).astype(str), draws=5, seed=0))).all()


def test_predictions_never_saw_their_own_group() -> None:
    random = np.random.default_rng(4)
    of = np.repeat(["a", "b", "c", "d"], 50)
    features = random.normal(size=(200, 2))
    y = features[:, 0] * 2 + features[:, 1] ** 2 + 3
    groups = Groups(of, draws=0, seed=0)
    found = ridge_held_out(features, y, groups, strengths=(1e-6,))
    assert found == pytest.approx(y, abs=1e-4)  # squares are among the features
    changed = y.copy()
    changed[of == "a"] = 1e6
    again = ridge_held_out(features, changed, groups, strengths=(1e-6,))
    assert again[of == "a"] == pytest.approx(found[of == "a"])
    assert again[of == "b"] != pytest.approx(found[of == "b"])
    noisy = np.column_stack([features, random.normal(size=(200, 6))])
    weak, chosen = (
        ridge_held_out(noisy, random.normal(size=200), groups, strengths=one) for one in ((1e-6,), (1e-6, 1e6))
    )
    assert np.abs(chosen).mean() < 0.5 * np.abs(weak).mean()  # of noise nothing is believed
    bare = ridge_held_out(np.zeros((200, 0)), y, groups)
    assert bare[of == "a"] == pytest.approx(np.full(50, y[of != "a"].mean()))

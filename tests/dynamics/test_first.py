"""Which came first: planted orders are found, equal times are not told apart, and the claim says so."""

from typing import Any

import numpy as np
import polars as pl
import pytest

from headwater.claims import Context, Ledger, claim_from_test
from headwater.core.errors import MethodError
from headwater.dynamics.first import came_first
from headwater.dynamics.timeline import Timeline

STEPS = [20 * i for i in range(40)]


def timeline(changes: dict[str, int], *, noise: float = 0.15, seed: int = 0, steps: list[int] = STEPS) -> Timeline:
    """Curves that go from 0 to 1 at their step, with noise."""
    random = np.random.default_rng(seed)
    rows = [
        {"step": step, "measure": "m", "name": name, "value": float(step >= at) + random.normal(0, noise)}
        for name, at in changes.items()
        for step in steps
    ]
    return Timeline(tables={"values": pl.DataFrame(rows).with_columns(lo=pl.lit(None), hi=pl.lit(None))})


def order(told: Any, **options: Any) -> Any:
    return came_first(told, ("m", "a"), ("m", "b"), draws=199, **options)


def test_a_planted_order_is_found_with_its_interval() -> None:
    inside = 0
    for seed in range(20):
        found = order(timeline({"a": 200, "b": 320}, noise=0.35, seed=seed), seed=seed)
        assert found.p is not None and found.p <= 0.02 and found.why_not == ""
        assert found.lo is not None and found.hi is not None and found.lo <= found.effect <= found.hi
        inside += found.lo <= 120 <= found.hi
    assert inside >= 17  # nominal 95%


def test_changes_at_one_time_are_not_told_apart() -> None:
    ps = [order(timeline({"a": 300, "b": 300}, noise=0.5, seed=seed), seed=seed).p for seed in range(60)]
    assert sum(p <= 0.05 for p in ps) <= 7  # nominal 3
    later = order(timeline({"a": 400, "b": 200}))
    assert later.effect < 0 and later.p > 0.9


def test_a_margin_is_part_of_the_claim() -> None:
    told = timeline({"a": 200, "b": 400})
    assert order(told, margin=100).p < 0.05
    assert order(told, margin=200).p > 0.05  # it may be 200 or 180: a change lies between two checkpoints
    assert order(told, margin=300).p > 0.5
    assert order(told).details["probability"] == 1.0
    assert told.came_first(("m", "a"), ("m", "b"), margin=100).effect == order(told).effect


def test_noise_has_no_order() -> None:
    told = timeline({"a": 300, "b": 10_000}, seed=4)
    assert "no clear transition of m b" in order(told).why_not


def test_seeds_are_paired() -> None:
    runs = [timeline({"a": 200 + 20 * s, "b": 260 + 40 * s}, noise=0.05, seed=s) for s in range(6)]
    found = order(runs)
    assert found.effect == pytest.approx(110, abs=5) and found.p == pytest.approx(2**-6) and found.n == 6
    assert found.lo is not None and 70 <= found.lo <= 100
    assert "too few" in order(runs[:4]).why_not


def test_as_a_claim() -> None:
    ledger = Ledger.of()
    for name, changes in (("before", {"a": 200, "b": 400}), ("after", {"a": 400, "b": 200})):
        params = {"first": ["m", "a"], "second": ["m", "b"], "draws": 199}
        ledger.add(
            claim_from_test(name, "a before b", "came_first", Context(timeline=timeline(changes)), params, seed=1)
        )
    assert ledger["before"].status == "supported" and ledger["after"].status == "refuted"
    both = Context(timelines=[timeline({"a": 200, "b": 400}, seed=s) for s in range(5)])
    assert claim_from_test("seeds", "a before b", "came_first", both, params).n == 5


def test_what_cannot_be_put_in_order_is_refused() -> None:
    flat = timeline({"a": 0, "b": 200}, noise=0.0)
    with pytest.raises(MethodError, match="no change point"):
        order(flat)
    with pytest.raises(MethodError, match="not in this timeline"):
        came_first(timeline({"a": 100}), ("m", "a"), ("m", "c"))
    with pytest.raises(MethodError, match="needs timelines"):
        order([])
    with pytest.raises(MethodError, match="a measure and a name"):
        came_first(flat, ("m", "a", "x"), ("m", "b"))

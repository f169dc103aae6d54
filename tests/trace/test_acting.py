"""What is acted on: the heads that survived their test, before those that merely stand out."""

from types import SimpleNamespace

import polars as pl
import pytest

from headwater.claims import Claim, Ledger, Outcome
from headwater.trace.acting import heads_to_act_on

GOOD, BAD = {"lo": 0.1, "hi": 0.9, "p": 1e-5}, {"lo": -0.9, "hi": -0.1, "p": 1.0}


def role(id, heads, effect, found):
    claim = Claim(id=id, statement=id, test="heads_play_role", params={"heads": heads})
    return claim.with_outcome(Outcome(effect=effect, n=30, **found))


def work(claims, roles=(), nodes=()):
    return SimpleNamespace(
        run=SimpleNamespace(load=lambda *_: Ledger.of(claims)),
        heads=SimpleNamespace(
            tables={
                "roles": pl.DataFrame(
                    list(roles), schema={"layer": pl.Int64, "head": pl.Int64, "effect": pl.Float64}, orient="row"
                )
            }
        ),
        attribution=SimpleNamespace(
            tables={"nodes": pl.DataFrame(list(nodes), schema={"node": pl.String, "score": pl.Float64}, orient="row")}
        ),
    )


@pytest.mark.parametrize(
    ("claims", "chosen"),
    [
        (
            [role("a", [[1, 0]], 0.2, GOOD), role("b", [[2, 1], [3, 0]], 0.5, GOOD), role("c", [[9, 9]], -0.5, BAD)],
            ["a2.h1", "a3.h0"],
        ),
        ([role("c", [[9, 9]], -0.5, BAD)], ["a5.h1", "a4.h0"]),
        ([], ["a5.h1", "a4.h0"]),
    ],
)
def test_what_survived_goes_first(claims, chosen):
    assert heads_to_act_on(work(claims, roles=[(4, 0, 0.1), (5, 1, 0.3), (6, 0, -0.4), (5, 1, 0.2)])) == chosen


def test_without_roles_the_best_scored_heads_are_taken():
    nodes = [("input", 9.0), ("m0", 5.0), ("a1.h1", 2.0), ("a0.h0", 3.0), ("a2.h0", None)]
    assert heads_to_act_on(work([], nodes=nodes), most=2) == ["a0.h0", "a1.h1"]

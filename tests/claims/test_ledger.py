import json

import pytest

from headwater.claims import Claim, Context, Ledger, Outcome, claim_from_test, decide, run_test
from headwater.claims import test as register
from headwater.core.errors import ClaimError
from headwater.core.results import load_result


def claim(id="c", **outcome) -> Claim:
    return Claim(id=id, statement=f"claim {id}", test="t").with_outcome(Outcome(**{"effect": 0.0, **outcome}))


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ({"effect": 1.0, "lo": 0.5, "hi": 1.5, "p": 0.001}, "supported"),
        ({"effect": -1.0, "lo": -1.5, "hi": -0.5, "p": 0.001}, "refuted"),  # a small p on the other side is no support
        ({"effect": 0.3, "lo": -0.1, "hi": 0.7, "p": 0.2}, "inconclusive"),
        ({"effect": 0.3, "lo": 0.2, "hi": 0.4, "p": 0.2, "null_draws": (0.0, 0.1, 0.5, 0.9)}, "refuted"),  # in the null
        ({"effect": 0.3, "lo": 0.2, "hi": 1.4, "p": 0.2, "null_draws": (0.0, 0.1, 0.5, 0.9)}, "inconclusive"),
        ({"effect": 0.4, "lo": 0.3, "hi": 0.5, "p": 0.001, "side": "less", "reference": 0.8}, "supported"),
        ({"effect": 0.9, "lo": 0.85, "hi": 0.95, "p": 1.0, "side": "less", "reference": 0.8}, "refuted"),
        ({"effect": 1.0, "lo": 0.5, "hi": 1.5, "p": 0.001, "why_not": "only 3 pairs"}, "inconclusive"),
        ({"effect": float("nan"), "p": 0.001}, "inconclusive"),
        ({"effect": 1.0, "p": None}, "inconclusive"),
    ],
)
def test_statuses(outcome, status):
    ledger = Ledger.of([claim(**outcome)])
    assert ledger["c"].status == status
    assert ledger.counts[status] == 1 and len(ledger) == 1  # never dropped


def test_decisions_are_joint():
    weak = {"effect": 1.0, "lo": 0.1, "hi": 2.0, "p": 0.04}
    ledger = Ledger.of([claim("a", **weak)])
    assert ledger["a"].status == "supported" and ledger["a"].p_adj == pytest.approx(0.04)
    ledger.add(claim("b", effect=1.0, p=0.9), claim("untested", effect=1.0, p=0.5, why_not="too few pairs"))
    assert ledger["a"].p_adj == pytest.approx(0.08) and ledger["a"].status == "inconclusive"
    assert ledger["untested"].p_adj is None
    with pytest.raises(ClaimError, match="two claims"):
        ledger.add(claim("a"))
    with pytest.raises(ClaimError, match="untested"):
        ledger["untestd"]
    with pytest.raises(ClaimError):
        Ledger.of(q=1.5)


def test_json_and_files_keep_everything(tmp_path):
    filed = [
        claim("a", effect=1.0, lo=0.5, hi=1.5, p=0.001, n=40, null_draws=(0.1, 0.2), details={"heads": [(1, 2)]}),
        claim("b", effect=-1.0, lo=-2.0, hi=-0.5, p=0.99, note="<b>"),
    ]
    ledger = Ledger.of(filed, q=0.1, title="IOI")
    again = Ledger.from_json(ledger.to_json())
    assert again.claims == ledger.claims and again.content_hash == ledger.content_hash and again.q == 0.1
    loaded = load_result(ledger.save(tmp_path / "ledger"), check=True)
    assert isinstance(loaded, Ledger) and loaded.claims == ledger.claims
    assert loaded["a"].null_draws == (0.1, 0.2) and loaded["a"].null_mean == pytest.approx(0.15)
    assert loaded.to_frame()["status"].to_list() == ["supported", "refuted"]
    loaded.add(claim("c", effect=1.0, p=0.5))  # a loaded ledger goes on
    assert len(loaded) == 3


def test_stored_status_is_decided_again_not_believed():
    ledger = Ledger.of([claim("a", effect=-1.0, lo=-2.0, hi=-0.5, p=0.99)])
    data = json.loads(ledger.to_json())
    data["claims"][0]["status"] = "supported"
    assert Ledger.from_json(json.dumps(data))["a"].status == "refuted"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"claims": [{"id": "a"}]}', '{"claims": [{"id": "a", "statement": "s", "test": "t", "stat": 1}]}'],
)
def test_broken_json_is_refused(text):
    with pytest.raises(ClaimError):
        Ledger.from_json(text)


def test_tests_run_again_by_name_from_stored_params():
    @register("test_mean_above")
    def mean_above(context, *, seed, least):
        values = context["values"]
        return Outcome(effect=sum(values) / len(values), reference=least, p=0.01, n=len(values))

    filed = claim_from_test(
        "m", "the mean is above 1", "test_mean_above", {"values": [2.0, 4.0]}, {"least": 1.0}, seed=3
    )
    assert (filed.effect, filed.reference, filed.n, filed.seed) == (3.0, 1.0, 2, 3)
    stored = Claim.from_dict(json.loads(json.dumps(filed.to_dict())))
    assert run_test(stored.test, Context(values=[2.0, 4.0]), stored.params, seed=stored.seed).effect == stored.effect
    with pytest.raises(ClaimError, match="test_mean_above"):
        run_test("test_mean_abov", {}, {})
    with pytest.raises(ClaimError, match="params"):
        run_test("test_mean_above", {}, {"most": 1.0})
    with pytest.raises(ClaimError, match="values"):
        run_test("test_mean_above", {}, {"least": 1.0})


def test_decide_needs_an_interval_to_refute():
    assert decide(claim(effect=-1.0, p=0.9), q=0.05) == "inconclusive"

"""A claim about a subspace is decided only where its dormant pathways were looked for."""

import pytest
import torch

import headwater as hw
import headwater.trace.tests
from headwater.claims import Claim, Context, Ledger, Outcome, claim_from_test, test_names
from headwater.claims.claim import unchecked_subspace
from headwater.core.errors import ClaimError
from headwater.localize.comparing.subspace import subspace_check
from tiny import tiny_llama, tiny_tokenizer

SITE = "mlp_out.2"
ON = {"site": SITE, "n": 8, "metric": "logit_diff"}


@pytest.fixture(scope="module")
def context() -> Context:
    """The last MLP of a random model; answers are what the prompts' own last MLP raises, so its output carries them."""
    model = hw.load(tiny_llama(torch.float64), tokenizer=tiny_tokenizer())
    ids = [model.tokenizer(name)["input_ids"][0] for name in (" is", " are")]
    words = ["apple", "book", "box", "car", "chair", "city", "cup", "dog", "door", "field", "fire", "fish"]
    rows = [
        {"prompt": f"The {w} and the house", "counterfactual": f"The {w} and the horse", "answer": " is",
         "foil": " are", "split": "train" if i < 4 else "test"}
        for i, w in enumerate(words)
    ]  # fmt: skip
    runs = [
        model.run([row[side] for row in rows], capture=[f"{SITE}@-1"], logits="last")
        for side in ("prompt", "counterfactual")
    ]
    toward = (
        runs[0].logits[:, ids[0]] - runs[0].logits[:, ids[1]] - runs[1].logits[:, ids[0]] + runs[1].logits[:, ids[1]]
    )
    if float(toward.mean()) < 0:
        for row in rows:
            row["answer"], row["foil"] = row["foil"], row["answer"]
    return Context(model=model, behavior=hw.Behavior.from_rows(rows))


def claim(context: Context, **params: object) -> Claim:
    return claim_from_test("s", "the subspace carries it", "subspace_carries", context, {**ON, **params})


def test_without_the_check_it_is_inconclusive_and_with_it_decided(context) -> None:
    assert "subspace_carries" in test_names()
    without = claim(context)
    assert "not checked for a dormant pathway" in without.why_not
    assert Ledger.of([without])["s"].status == "inconclusive"
    assert without.p is not None and without.details["whole"] == pytest.approx(without.effect)
    check = subspace_check(context["model"], context["behavior"], site=SITE, n_test=8, draws=0)
    made = Context({**context, "subspace_checks": {SITE: check}})
    with_check = claim(made)
    assert with_check.why_not == ""
    assert with_check.details["dormant_pathway"] == check.verdict
    part = "rowspace" if check.verdict == "dormant pathway" else "whole"
    assert with_check.effect == pytest.approx(check.effect(part))
    status = Ledger.of([with_check])["s"].status
    assert status == ("supported" if with_check.effect > 0 and with_check.p <= 0.05 else status)


def test_a_check_of_another_subspace_does_not_count(context) -> None:
    check = subspace_check(
        context["model"], context["behavior"], site=SITE, directions=torch.eye(32)[:1], n_test=8, draws=0
    )
    assert "not checked" in claim(Context({**context, "subspace_checks": {SITE: check}})).why_not
    named = Context({**context, "subspaces": {"axis": torch.eye(32)[:1]}, "subspace_checks": {"axis": check}})
    assert claim(named, subspace="axis").why_not == ""
    with pytest.raises(ClaimError, match="not stored"):
        claim(named, subspace="nosuch")


def test_the_gate_holds_for_any_test_that_says_it_patched_a_subspace() -> None:
    base = Claim(id="c", statement="s", test="t")
    strong = {"effect": 0.9, "lo": 0.8, "hi": 1.0, "p": 1e-4, "n": 40}
    assert Ledger.of([base.with_outcome(Outcome(**strong))])["c"].status == "supported"
    patched = base.with_outcome(Outcome(**strong, details={"subspace": "resid_post.3"}))
    assert "resid_post.3" in patched.why_not and Ledger.of([patched])["c"].status == "inconclusive"
    checked = base.with_outcome(Outcome(**strong, details={"subspace": "resid_post.3", "dormant_pathway": "connected"}))
    assert Ledger.of([checked])["c"].status == "supported"
    own = base.with_outcome(Outcome(**strong, why_not="too few pairs", details={"subspace": "resid_post.3"}))
    assert own.why_not == "too few pairs"
    assert unchecked_subspace({}) == ""

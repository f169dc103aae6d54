"""The tests of a trace's claims, on a tiny model made to have a behavior: answers are what the prompt raises most."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

import headwater as hw
import headwater.trace.tests
from headwater.behavior.table import Behavior
from headwater.claims import Context, run_test, sign_flip
from headwater.localize.attribution.eap import eap
from headwater.localize.comparing.heads import heads, metric_values

NAMES = [" Mary", " John", " Mark", " Paul", " Laura", " Kevin", " Scott", " Sarah"]


@pytest.fixture(scope="module")
def planted(tiny_model) -> Behavior:
    """IOI prompts whose answer and foil are the names that this model tells prompt and counterfactual apart by."""
    ioi = hw.behavior("ioi", n=40, seed=1)
    ids = [tiny_model.tokenizer(name)["input_ids"][0] for name in NAMES]
    change = (
        tiny_model.run(ioi.prompts, logits="last").logits - tiny_model.run(ioi.counterfactuals, logits="last").logits
    )
    best, worst = change[:, ids].argmax(dim=1).tolist(), change[:, ids].argmin(dim=1).tolist()
    frame = ioi.frame.with_columns(
        pl.Series("answers", [[NAMES[i]] for i in best]), pl.Series("foils", [[NAMES[i]] for i in worst])
    )
    return Behavior(frame, name="planted")


@pytest.fixture(scope="module")
def context(tiny_model, planted) -> Context:
    scores = eap(tiny_model, planted)
    options = {"top": 2, "least": 0.01, "n_train": 8, "n_test": 8, "null_heads": 2, "sequences": 2, "length": 6}
    found = heads(tiny_model, planted, **options)
    return Context(model=tiny_model, behavior=planted, circuit=scores.circuit(fraction=0.3), heads=found)


ON = {"n": 20, "metric": "logit_diff"}


def test_accuracy_against_chance_is_exact(context, tiny_model, planted):
    outcome = run_test("accuracy_above_chance", context, {"n": 20})
    right = metric_values(tiny_model, planted.test[:20].bind(tiny_model), metric="accuracy")
    assert outcome.effect == float(right.mean()) and outcome.reference == 0.5 and outcome.n == 20
    few = run_test("accuracy_above_chance", context, {"n": 4})
    assert "too few" in few.why_not and run_test("accuracy_above_chance", context, {"n": 5}).why_not == ""


def test_prompt_against_counterfactual_sees_the_planted_behavior(context, tiny_model, planted):
    outcome = run_test("prompt_against_counterfactual", context, ON)
    pairs = planted.test[:20].bind(tiny_model)
    change = metric_values(tiny_model, pairs) - metric_values(tiny_model, pairs, side="corrupt")
    assert outcome.effect == pytest.approx(float(change.mean())) and outcome.p == sign_flip(change.numpy()) <= 1e-3
    assert outcome.lo is not None and outcome.lo > 0


def test_sufficiency_is_faithfulness_on_the_test_pairs(context, planted):
    circuit = context["circuit"]
    outcome = run_test("circuit_sufficient", context, {**ON, "threshold": 0.1})
    assert outcome.effect == pytest.approx(circuit.faithfulness(planted.test[:20]).value)
    assert outcome.reference == 0.1 and outcome.why_not == ""
    impossible = run_test("circuit_sufficient", context, {**ON, "threshold": 50.0})
    assert impossible.p is not None and impossible.p > 0.99


def test_necessity_is_what_the_complement_loses(context, planted):
    outcome = run_test("circuit_necessary", context, {**ON, "draws": 3}, seed=2)
    assert outcome.effect == pytest.approx(1 - context["circuit"].completeness(planted.test[:20]).value)
    assert len(outcome.null_draws) == 3 and outcome.reference == pytest.approx(np.mean(outcome.null_draws))
    assert outcome == run_test("circuit_necessary", context, {**ON, "draws": 3}, seed=2)
    assert outcome.null_draws != run_test("circuit_necessary", context, {**ON, "draws": 3}, seed=3).null_draws


def test_random_circuits_are_run_once_for_both_claims(context):
    fresh = Context(context)
    params = {**ON, "draws": 19}
    edges = run_test("circuit_beats_random", fresh, {**params, "kind": "edges"}, seed=1)
    assert len(fresh["made"]) == 1
    renamed = run_test("circuit_beats_random", fresh, {**params, "kind": "heads"}, seed=1)
    assert len(fresh["made"]) == 1 and edges.effect == renamed.effect and edges.null_draws != renamed.null_draws
    closer = sum(abs(1 - draw) <= abs(1 - edges.effect) + 1e-12 for draw in edges.null_draws)
    assert edges.p == pytest.approx((1 + closer) / 20)
    few = run_test("circuit_beats_random", Context(context), {**params, "draws": 10, "kind": "edges"})
    assert "10 draws are too few" in few.why_not


def test_random_weights_give_circuits_of_the_same_size(context):
    params = {**ON, "n_find": 6, "copies": 2, "method": "eap_ig", "steps": 2}
    outcome = run_test("circuit_beats_random_weights", context, params, seed=5)
    assert len(outcome.null_draws) == 2 and len(outcome.details["edges_shared"]) == 2
    assert outcome == run_test("circuit_beats_random_weights", context, params, seed=5)


def test_a_role_needs_both_attention_and_effect(context, tiny_model, planted):
    found = context["heads"]
    role = found.found[0]
    group = found.heads_of(role)
    params = {**ON, "role": role, "heads": [list(head) for head in group], "draws": 2}
    outcome = run_test("heads_play_role", context, params, seed=4)
    details = outcome.details
    assert outcome.p == max(details["p_attention"], details["p_effect"])
    pairs = planted.test[:20].bind(tiny_model)
    clean, corrupt = metric_values(tiny_model, pairs), metric_values(tiny_model, pairs, side="corrupt")
    without = metric_values(tiny_model, pairs, out=group, means=found.tensors["means"])
    assert outcome.effect == pytest.approx(float((clean - without).mean() / (clean - corrupt).mean()))
    # heads that attend nowhere near the place do not have the role, whatever the metric makes of them
    attention = found.tensors["attention.previous_token"].nanmean(dim=0)
    worst = [divmod(int(at), 4) for at in attention.flatten().argsort()[:1]]
    wrong = run_test("heads_play_role", context, {**params, "role": "previous_token", "heads": worst}, seed=4)
    assert wrong.p is not None and wrong.p > 0.2
    lacking = Context(context, sides={}, behavior=hw.behavior("agreement", n=12, seed=0))
    undecided = run_test("heads_play_role", lacking, {**params, "role": "s_inhibition"})
    assert undecided.p is None and "no test prompt" in undecided.why_not


def test_without_a_behavior_nothing_is_said_about_shares_of_it(context, planted):
    swapped = planted.frame.with_columns(answers=pl.col("foils"), foils=pl.col("answers"))
    lacking = Context(context, sides={}, behavior=Behavior(swapped, name="swapped"))
    for test, params in {
        "circuit_sufficient": {**ON, "threshold": 0.5},
        "circuit_necessary": {**ON, "draws": 1},
        "circuit_beats_random": {**ON, "draws": 19, "kind": "edges"},
    }.items():
        assert "nothing to explain" in run_test(test, lacking, params).why_not
    outcome = run_test("prompt_against_counterfactual", lacking, ON)
    assert outcome.effect < 0 and outcome.p is not None and outcome.p > 0.9


def test_tests_leave_the_global_random_state_alone(context):
    state = torch.random.get_rng_state()
    run_test("circuit_beats_random", Context(context), {**ON, "draws": 2, "kind": "edges"}, seed=1)
    run_test("circuit_beats_random_weights", context, {**ON, "n_find": 4, "copies": 1, "method": "eap", "steps": 1})
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    again = run_test("circuit_necessary", context, {**ON, "draws": 2}, seed=1)
    torch.manual_seed(98)
    assert replace(again) == run_test("circuit_necessary", context, {**ON, "draws": 2}, seed=1)

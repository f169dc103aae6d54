"""Plans say what will run: their counts are those of hooks on the blocks while the method runs."""

from typing import Any

import polars as pl
import pytest
import torch

import headwater as hw
from headwater.core.errors import MethodError
from headwater.localize.engine import planning
from headwater.localize.engine.cost import costs_of, counted, free_bytes, memory_budget


def ran(model: Any, job: Any) -> dict[str, int]:
    job()  # probes of the model are made once
    with counted(model) as found:
        job()
    return found.to_dict()


@pytest.mark.parametrize("memory_mb", [None, 0.5])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("eap", {}),
        ("eap", {"reuse_prefix": False, "metric": "prob_diff"}),
        ("eap_ig", {"steps": 3}),
        ("eap_ig", {"steps": 2, "rule": "gauss"}),
        ("atp", {}),
    ],
)
def test_attribution_runs_what_its_plan_says(
    tiny_model: Any, method: str, options: dict[str, Any], memory_mb: float | None
) -> None:
    ioi = hw.behavior("ioi", n=12, seed=0)
    run = hw.localize.methods.get(method)
    found = ran(tiny_model, lambda: run(tiny_model, ioi, memory_mb=memory_mb, **options))
    plan = planning.plan(method, tiny_model, ioi, memory_mb=memory_mb, **options)
    assert plan.counts() == found
    assert plan.n == ioi.train.n
    batches = next(step.passes for step in plan.steps if step.name == "counterfactuals")
    assert plan.total.backwards == batches * options.get("steps", 1)


@pytest.mark.parametrize("name", ["tiny_model", "tiny_gpt2_model"])
def test_evaluation_runs_what_its_plan_says(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    ioi = hw.behavior("ioi", n=12, seed=0)
    scores: Any = hw.localize.eap(model, ioi)
    circuit = scores.circuit(edges=12)
    found = ran(model, lambda: circuit.faithfulness(ioi.test))
    assert planning.plan("faithfulness", model, ioi.test, circuits=circuit).counts() == found
    found = ran(model, lambda: scores.curve(ioi.test, fractions=(0.01, 0.1, 0.5)))
    plan = planning.plan("curve", model, ioi.test, scores=scores, fractions=(0.01, 0.1, 0.5))
    assert plan.counts() == found
    # MLPs and attentions without an edge are not run: fewer than three whole circuits and two runs would take
    assert plan.total.attention < plan.floor.attention


def test_a_plan_reads_and_adds_up(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=8, seed=0)
    plan = planning.plan("eap", tiny_model, ioi)
    text = plan.explain()
    assert "naive floor" in text and "counterfactuals" in text and f"on {ioi.train.n} pairs" in text
    frame = plan.to_frame()
    steps = frame.filter(~pl.col("step").is_in(["total", "naive floor"]))
    total = frame.filter(step="total")
    for column in ("passes", "positions", "attention", "mlp", "flops"):
        assert steps[column].sum() == pytest.approx(total[column].item())
    assert 0 < plan.ratio < 1  # the shared prefix is run once
    assert plan.budget > 0
    assert plan.weights == sum(p.numel() * 4 for p in tiny_model.hf.parameters())
    with pytest.raises(MethodError, match="no planner"):
        planning.plan("eapp", tiny_model, ioi)
    with pytest.raises(MethodError, match="gradient"):
        planning.plan("eap", tiny_model, ioi, metric="rank")


def test_costs_are_those_of_the_modules(tiny_model: Any, tiny_gpt2_model: Any) -> None:
    llama, gpt2 = costs_of(tiny_model), costs_of(tiny_gpt2_model)
    assert llama.attention == 2 * (32 * 32 * 2 + 32 * 16 * 2)
    assert llama.mlp == 2 * 3 * 32 * 48
    assert gpt2.attention == 2 * 4 * 32 * 32
    assert gpt2.mlp == 2 * 2 * 32 * 128
    assert llama.mixing == 2 * 4 * 16
    assert llama.vocabulary == 2 * 32 * tiny_model.d_vocab
    whole = llama.forward(10, keys=10, unembedded=10)
    assert whole == 10 * (3 * (llama.attention + 10 * llama.mixing + llama.mlp) + llama.vocabulary)
    # at least the stream and what the MLP makes of it are alive at once
    assert llama.scratch >= 4 * (32 + 48)
    assert gpt2.scratch >= 4 * (32 + 128)


def test_costs_of_experts_are_of_those_a_token_meets() -> None:
    from localize_families import LAYERS, VOCAB, D, make

    model = make("mixtral")
    costs = costs_of(model)
    one_expert, gate = 2 * 3 * D * 48, 2 * D * 4
    assert costs.mlp == pytest.approx(2 * one_expert + gate)
    assert costs.n_layers == LAYERS
    assert costs.vocabulary == 2 * D * VOCAB


def test_the_budget_is_bounded_by_what_is_free(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwater.localize.engine import cost

    assert memory_budget(tiny_model, 3.0) == 3 * 2**20
    free = free_bytes("cpu")
    assert free is not None and free > 2**20
    monkeypatch.setattr(cost, "free_bytes", lambda _: 2**22)
    assert memory_budget(tiny_model) == 2**21
    monkeypatch.setattr(cost, "free_bytes", lambda _: None)
    assert memory_budget(tiny_model) == 96 * 2**20
    if torch.cuda.is_available():
        assert (free_bytes("cuda") or 0) > 0


def test_positions_and_layers_before_a_patch_are_never_run(tiny_model: Any) -> None:
    ioi = hw.behavior("ioi", n=12, seed=0)
    n = ioi.train.n

    def patches(site: str) -> dict[str, int]:
        """What patching one site runs beyond what patching at no visible place does."""
        both = [
            hw.localize.patch(tiny_model, ioi, sites=[one]).facts["ran"] for one in (site, "mlp_out.2@0")
        ]  # the first token's last MLP is seen by nobody
        return {key: both[0][key] - both[1][key] for key in ("positions", "attention", "mlp")}

    assert patches("resid_pre.0@-2") == {"positions": 2 * n, "attention": 6 * n, "mlp": 5 * n}
    assert patches("mlp_out.0@-2") == {"positions": 2 * n, "attention": 4 * n, "mlp": 3 * n}
    assert patches("attn_out.1@-2") == {"positions": 2 * n, "attention": 2 * n, "mlp": 3 * n}
    assert patches("mlp_out.2@-1") == {"positions": n, "attention": 0, "mlp": 0}
    assert (
        planning.plan("patch", tiny_model, ioi, sites=["resid_pre.0@-2", "head"]).counts()
        == hw.localize.patch(tiny_model, ioi, sites=["resid_pre.0@-2", "head"]).facts["ran"]
    )

"""The run that masks are learned through is the definition; learned masks find what matters."""

import math
from typing import Any

import pytest
import torch

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.localize.engine.ablation import Ablation
from headwater.localize.engine.soft import soft_logits
from headwater.localize.judging.faithfulness import evaluate_masks
from headwater.localize.judging.nulls import random_circuits
from headwater.localize.search.edge_pruning import EdgePruningConfig, Masks
from headwater.localize.search.searching import Trials
from localize_ablated import plain_ablated, plain_reference
from localize_families import LAYOUTS, bound, make, pairs
from tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("kind", ["counterfactual", "mean"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_soft_masks_equal_their_definition(name: str, kind: Any) -> None:
    """Every edge counts by its weight, and gradients by the weights are finite differences of the definition."""
    model, group = make(name), pairs(2, 5, 2)
    trials = Trials(model, bound(group), "logit_diff", Ablation(kind=kind))
    graph = trials.graph
    weights = torch.rand(graph.allowed.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights.requires_grad_(True)
    with trials.engine.open(), torch.enable_grad():
        logits = soft_logits(trials.references[0], weights, trials.entered[0])
        value = metric("logit_diff")(logits, group.answers, group.foils).sum()
        (gradient,) = torch.autograd.grad(value, weights)
    base = plain_reference(model, name, group, kind)

    @torch.no_grad()
    def plain(own: torch.Tensor) -> torch.Tensor:
        found = plain_ablated(model, name, group, base, lambda s, r: own[graph.source(s), graph.reader(r)])
        return metric("logit_diff")(found, group.answers, group.foils).sum()

    assert float(value.detach()) == pytest.approx(float(plain(weights.detach())), abs=1e-9)
    assert not bool(gradient[~graph.allowed].any())
    direction = torch.randn(graph.allowed.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction[~graph.allowed] = 0
    # some attentions work in float32 whatever the dtype: their differences are coarse
    step, close = (1e-3, 2e-3) if name in ("gptj", "gemma2", "gemma3", "mixtral") else (1e-5, 1e-5)
    ahead, behind = (plain(weights.detach() + way * direction) for way in (step, -step))
    found = float((gradient * direction).sum())
    assert found == pytest.approx(float(ahead - behind) / (2 * step), rel=close, abs=close)


@pytest.fixture(scope="module")
def model() -> Any:
    return Model(tiny_llama(num_hidden_layers=2), tiny_tokenizer())


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=12, seed=0)


def test_masks_are_drawn_as_their_distribution_says() -> None:
    masks = Masks(4000, EdgePruningConfig())
    with torch.no_grad():
        masks.logits.copy_(torch.linspace(-3, 3, 4).repeat_interleave(1000))
    drawn = masks.sampled(torch.Generator().manual_seed(0)).detach().view(4, 1000)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    opened = torch.sigmoid(torch.linspace(-3, 3, 4) - 2 / 3 * math.log(0.1 / 1.1))
    torch.testing.assert_close((drawn > 0).double().mean(dim=1).float(), opened, rtol=0, atol=0.05)
    assert masks.share() == pytest.approx(float(opened.mean()), abs=1e-6)
    assert masks.target(0) == pytest.approx(float(torch.sigmoid(torch.tensor(2 - 2 / 3 * math.log(0.1 / 1.1)))))
    assert masks.target(199) == pytest.approx(0.05)


@pytest.mark.parametrize("method", ["edge_pruning", "node_pruning"])
def test_learned_masks_beat_chance(method: str, model: Any, ioi: Any) -> None:
    weights = [w.clone() for w in model.hf.parameters()]
    learn = hw.localize.methods.get(method)
    asked = {"steps": 120, "fraction": 0.3, "pairs": 4, "learning_rate": 0.3, "seed": 1}
    found = learn(model, ioi, **asked)
    again = learn(model, ioi, **asked)
    assert torch.equal(found.tensors["scores"], again.tensors["scores"])
    steps = found.tables["steps"]
    assert steps["open"][0] > 0.9
    assert steps["open"][-1] == pytest.approx(0.3, abs=0.15 if method == "edge_pruning" else 0.25)
    assert found.facts["passes"]["backward"] > 0
    circuit = found.circuit()
    row = found.tables["curve"].row(0, named=True)
    assert 0 < circuit.n_edges == row["edges"] < circuit.graph.n_edges
    values = circuit.faithfulness(ioi.train, metric="kl").facts["circuit"]
    assert row["value"] == pytest.approx(values, abs=1e-5)
    masks = list(random_circuits(circuit.graph, circuit.mask, 10, kind="edges"))
    chance = evaluate_masks(model, ioi.train, masks, metric="kl").circuits.mean(dim=1)
    assert values < float(chance.mean())
    assert found.circuit(fraction=0.1).n_edges <= int(0.1 * circuit.graph.n_edges)
    for weight, before in zip(model.hf.parameters(), weights, strict=True):
        assert weight.grad is None
        assert torch.equal(weight, before)
    with pytest.raises(MethodError):
        learn(model, ioi, fraction=0.0)
    with pytest.raises(MethodError, match="gradient"):
        learn(model, ioi, metric="accuracy")

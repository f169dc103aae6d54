"""Learned constants cost no more than the mean, are as good as any near them, and mean what evaluation makes of
them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.localize.engine.ablation import Ablation, Constants
from headwater.localize.judging.faithfulness import evaluate_masks
from headwater.localize.search.optimal_ablation import OptimalAblationResult, optimal_ablation
from tiny import tiny_gpt2, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return Model(tiny_gpt2(torch.float64, n_layer=2), tiny_tokenizer())


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=8, seed=0)


def loss_without(model: Any, ioi: Any, nodes: list[str], ablation: Ablation) -> list[float]:
    graph = hw.localize.graph_of(model)
    masks = []
    for node in nodes:
        mask = graph.allowed.clone()
        mask[graph.source(node)] = False
        masks.append(mask)
    return evaluate_masks(model, ioi, masks, metric="kl", ablation=ablation).circuits.mean(dim=1).tolist()


def test_gaps_are_those_of_evaluation(model: Any, ioi: Any, tmp_path: Path) -> None:
    found = optimal_ablation(model, ioi, steps=40, side_by_side=3)
    table = found.tables["nodes"]
    nodes = table["node"].to_list()
    assert nodes == list(found.graph.sources[1:])
    losses = loss_without(model, ioi.train, nodes, found.ablation)
    assert table["gap"].to_list() == pytest.approx(losses, abs=1e-8)
    usual = loss_without(model, ioi.train, nodes, Ablation(kind="mean", over="prompt"))
    assert table["mean_gap"].to_list() == pytest.approx(usual, abs=1e-8)
    gained = [mean - gap for mean, gap in zip(usual, losses, strict=True)]
    assert min(gained) >= -1e-9
    assert sum(losses) < 0.9 * sum(usual)
    found.save(tmp_path / "oa")
    again = OptimalAblationResult.load(tmp_path / "oa")
    assert loss_without(model, ioi.train, nodes[:2], again.ablation) == pytest.approx(losses[:2], abs=1e-12)
    found.chart()


def test_no_constant_near_the_best_is_better(model: Any, ioi: Any) -> None:
    found = optimal_ablation(model, ioi, steps=150, learning_rate=0.05)
    node = found.tables["nodes"].sort("gap").row(-1, named=True)
    constants = found.ablation.constants
    assert constants is not None
    generator = torch.Generator().manual_seed(0)

    def near(x: Tensor) -> Tensor:
        return x + 0.05 * x.abs().mean() * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    for _ in range(10):
        moved = Constants(
            constants.input, tuple(map(near, constants.heads)), tuple(map(near, constants.mlps)), constants.shared
        )
        (loss,) = loss_without(model, ioi.train, [node["node"]], Ablation(kind="optimal", constants=moved))
        assert loss > node["gap"] - 1e-6


def test_a_circuit_has_constants_of_its_own(model: Any, ioi: Any) -> None:
    circuit = hw.localize.eap(model, ioi).circuit(edges=40)
    found = optimal_ablation(model, ioi, circuit=circuit, steps=60)
    row = found.tables["nodes"].row(0, named=True)
    own = circuit.faithfulness(ioi.train, metric="kl", ablation=found)
    assert own.facts["circuit"] == pytest.approx(row["gap"], abs=1e-8)
    usual = circuit.faithfulness(ioi.train, metric="kl", ablation=Ablation(kind="mean", over="prompt"))
    assert usual.facts["circuit"] == pytest.approx(row["mean_gap"], abs=1e-8)
    assert row["gap"] < 0.9 * row["mean_gap"]
    several = circuit.faithfulness(ioi.train, metric="kl", ablation=("optimal", "counterfactual", "zero", found))
    assert several.tables["curve"]["ablation"].to_list() == ["optimal", "counterfactual", "zero", "optimal 2"]
    assert set(several.facts["by_ablation"]) == {"optimal", "counterfactual", "zero", "optimal 2"}
    assert several.value == several.facts["by_ablation"]["optimal"]["faithfulness"]
    curve = circuit.curve(ioi.train, fractions=(0.2, 0.6), ablation=("counterfactual", "optimal"))
    assert curve.tables["curve"]["ablation"].to_list() == ["counterfactual"] * 2 + ["optimal"] * 2
    assert curve.facts["cpr"] == curve.facts["by_ablation"]["counterfactual"]["cpr"]
    circuit.null(ioi.train, n=2, ablation=found)
    circuit.minimality(ioi.train, nodes=circuit.nodes[1:2], ablation="mean")
    with pytest.raises(MethodError, match="gradient"):
        optimal_ablation(model, ioi, metric="rank")
    with pytest.raises(MethodError):
        optimal_ablation(model, ioi, steps=-1)

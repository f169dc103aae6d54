"""Completeness is its definition: the circuit and the model without the same nodes."""

from typing import Any

import pytest
import torch

import headwater as hw
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.localize.judging.faithfulness import evaluate_masks
from tiny import tiny_gpt2, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return Model(tiny_gpt2(torch.float64, n_layer=2), tiny_tokenizer())


def test_incompleteness_is_its_definition(model: Any) -> None:
    ioi = hw.behavior("ioi", n=8, seed=0)
    circuit = hw.localize.eap(model, ioi).circuit(edges=40)
    found = circuit.incompleteness(ioi.train, n=4, greedy=2, ablation="mean", seed=1)
    table = found.tables["subsets"]
    assert table["kind"].to_list() == ["whole", *["random"] * 4, *["greedy"] * 2]
    for row in table.iter_rows(named=True):
        left_out = row["nodes"].split()
        assert len(left_out) == row["size"]
        masks = []
        for whole in (circuit.mask, circuit.graph.allowed):
            mask = whole.clone()
            for node in left_out:
                mask[circuit.graph.source(node)] = False
            masks.append(mask)
        values = evaluate_masks(model, ioi.train, masks, metric="logit_diff", ablation="mean")
        ours, theirs = values.faithfulness(0)[0], values.faithfulness(1)[0]
        assert row["incompleteness"] == pytest.approx(abs(ours - theirs), abs=1e-9)
        assert (row["circuit"], row["model"]) == (pytest.approx(ours, abs=1e-9), pytest.approx(theirs, abs=1e-9))
    assert table["model"][0] == pytest.approx(1.0)
    greedy = table.filter(table["kind"] == "greedy")
    assert set(greedy["nodes"][0].split()) < set(greedy["nodes"][1].split())
    # the first greedy step is the worst of all single nodes
    members = [node for node in circuit.nodes if node not in ("input", "logits")]
    singles = []
    for node in members:
        masks = [m.clone() for m in (circuit.mask, circuit.graph.allowed)]
        for mask in masks:
            mask[circuit.graph.source(node)] = False
        values = evaluate_masks(model, ioi.train, masks, metric="logit_diff", ablation="mean")
        singles.append(abs(values.faithfulness(0)[0] - values.faithfulness(1)[0]))
    assert greedy["incompleteness"][0] == pytest.approx(max(singles), abs=1e-9)
    assert found.value == pytest.approx(table["incompleteness"].max())
    found.chart()


def test_the_whole_model_is_complete_and_nonsense_is_refused(model: Any) -> None:
    ioi = hw.behavior("ioi", n=6, seed=0)
    graph = hw.localize.graph_of(model)
    whole = hw.Circuit.build(graph, graph.allowed, model=model)
    assert whole.incompleteness(ioi, n=3, greedy=1).value == pytest.approx(0, abs=1e-9)
    with pytest.raises(MethodError, match="subsets"):
        whole.incompleteness(ioi, n=0, greedy=0)
    with pytest.raises(MethodError, match="no nodes"):
        hw.Circuit.from_edges(graph, ["input->logits"], model=model).incompleteness(ioi)

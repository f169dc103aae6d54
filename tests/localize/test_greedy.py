"""Each step of a greedy search makes the best of all single moves, as whole evaluations say."""

from typing import Any

import pytest
import torch

import headwater as hw
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.localize.judging.faithfulness import evaluate_masks
from headwater.localize.search.greedy import greedy
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return Model(tiny_llama(torch.float64, num_hidden_layers=2), tiny_tokenizer())


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=8, seed=0)


@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
@pytest.mark.parametrize("move", ["drop", "add"])
def test_every_step_is_the_best_of_all_nodes(move: Any, ablation: Any, model: Any, ioi: Any) -> None:
    size = 7 if move == "drop" else 3
    found = greedy(model, ioi, move=move, size=size, target=None, ablation=ablation)
    graph = found.graph
    inside = set(graph.sources) if move == "drop" else {"input"}
    moves = found.tables["moves"]
    assert len(moves) == 3
    for row in moves.iter_rows(named=True):
        left = [n for n in graph.sources[1:] if (n in inside) == (move == "drop")]
        masks = [hw.Circuit.from_nodes(graph, inside ^ {node}).mask for node in left]
        values = evaluate_masks(model, ioi.train, masks, metric="logit_diff", ablation=ablation)
        gaps = [abs(1 - values.faithfulness(i)[0]) for i in range(len(left))]
        best = min(range(len(left)), key=gaps.__getitem__)
        assert row["moved"] == left[best]
        assert row["value"] == pytest.approx(float(values.circuits[best].mean()), abs=1e-9)
        inside ^= {row["moved"]}
    last = found.tables["curve"].row(-1, named=True)
    assert found.circuit().faithfulness(ioi.train, ablation=ablation).value == pytest.approx(last["faithfulness"])
    assert last["forward"] == found.facts["passes"]["forward"]


def test_edges_go_until_the_target_or_the_budget(model: Any, ioi: Any) -> None:
    found = greedy(model, ioi, unit="edge", target=0.5, at_a_time=4, passes=2500)
    curve = found.tables["curve"]
    assert curve["faithfulness"].min() >= 0.5
    assert curve["edges"][-1] < curve["edges"][0] == found.graph.n_edges
    assert found.facts["passes"]["forward"] <= 2500 + 6
    with pytest.raises(MethodError, match="joins nothing"):
        greedy(model, ioi, unit="edge", move="add")
    for wrong in ({"move": "swap"}, {"unit": "layer"}, {"at_a_time": 0}, {"target": None}, {"ablation": "optimal"}):
        with pytest.raises(MethodError):
            greedy(model, ioi, **wrong)

"""ACDC keeps the edges that trying one at a time on whole runs keeps; its published findings, where GPT-2 is at
hand.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.localize.engine.ablation import Ablation
from headwater.localize.search.acdc import acdc, pruned
from headwater.localize.search.searching import SearchResult, Trials, reached
from localize_ablated import plain_ablated, plain_reference
from localize_families import bound, make, pairs
from tiny import tiny_llama, tiny_tokenizer


def plain_acdc(name: str, group: Any, score: str, kind: str, threshold: float, unit: str) -> tuple[Tensor, int]:
    """ACDC by the book: every trial is a whole run of a circuit by its definition. Gives the edges, and the trials."""
    model = make(name)
    graph = hw.localize.graph_of(model)
    base = plain_reference(model, name, group, kind)
    sign = 1 if score == "kl" else -1
    with torch.no_grad():
        reference = model.hf(input_ids=group.clean).logits[:, -1]

    def loss(mask: Tensor) -> float:
        edges = set(graph.edge_names(reached(graph, mask)))
        logits = plain_ablated(model, name, group, base, lambda s, r: float((s, r) in edges))
        return sign * float(metric(score)(logits, group.answers, group.foils, reference).mean())

    mask, trials = graph.allowed.clone(), 0
    now = loss(mask)
    if unit == "node":
        cuts = [[(source, slice(None))] for source in reversed(range(1, len(graph.sources)))]
    else:
        cuts = []
        for reader in reversed(range(len(graph.readers))):
            cuts.append([(s, reader) for s in reversed(range(len(graph.sources))) if graph.allowed[s, reader]])
    for group_of_cuts in cuts:
        for source, reader in group_of_cuts:
            tried = mask.clone()
            tried[source, reader] = False
            feeds = unit == "node" or reader == len(graph.readers) - 1 or mask[graph.owners[:, reader]].any()
            if not feeds:
                mask = tried
                continue
            trials += 1
            value = loss(tried)
            if value - now < threshold:
                mask, now = tried, value
    return mask, trials


@pytest.mark.parametrize(
    ("name", "score", "kind", "threshold", "unit"),
    [
        ("llama", "kl", "counterfactual", 0.02, "edge"),
        ("gemma2", "logit_diff", "counterfactual", 0.05, "edge"),
        ("neox", "kl", "zero", 0.05, "edge"),
        ("gpt2", "logit_diff", "mean", 0.05, "node"),
    ],
)
@torch.no_grad()
def test_acdc_is_the_naive_algorithm(name: str, score: str, kind: Any, threshold: float, unit: Any) -> None:
    group = pairs(3, 5, 2)
    expected, n = plain_acdc(name, group, score, kind, threshold, unit)
    trials = Trials(make(name), bound(group), score, Ablation(kind=kind))
    whole = trials.settle(trials.graph.allowed)
    spent = trials.forward
    for side_by_side in (1, 16):
        mask, value = pruned(trials, whole, threshold, unit=unit, side_by_side=side_by_side)
        assert torch.equal(mask, expected)
        assert value == pytest.approx(trials.values([mask])[0], abs=1e-9)
        if side_by_side == 1:  # each trial costs the layers from its reader's on, and not one pass more
            assert trials.forward - spent < (n + 1) * 3
    edges = int(reached(trials.graph, mask).sum())
    assert 0 < edges < trials.graph.n_edges


def test_a_sweep_is_kept_and_cut(tmp_path: Path) -> None:
    model = Model(tiny_llama(torch.float64, num_hidden_layers=1), tiny_tokenizer())
    ioi = hw.behavior("ioi", n=8, seed=0)
    found = acdc(model, ioi, thresholds=(0.3, 0.001), metric="logit_diff")
    curve = found.tables["curve"]
    assert curve["setting"].to_list() == [0.3, 0.001]
    assert curve["edges"][0] < curve["edges"][1]
    assert curve["forward"][0] < curve["forward"][1] == found.facts["passes"]["forward"]
    small, large = found.circuit(0), found.circuit()
    assert (small.n_edges, large.n_edges) == tuple(curve["edges"])
    for circuit, row in zip((small, large), curve.iter_rows(named=True), strict=True):
        assert circuit.faithfulness(ioi.train).value == pytest.approx(row["faithfulness"], abs=1e-9)
    assert set(found.tensors["scores"].unique().tolist()) <= {0.0, 0.001, 0.3}
    found.save(tmp_path / "acdc")
    assert SearchResult.load(tmp_path / "acdc").circuit().n_edges == large.n_edges
    found.chart()
    with pytest.raises(MethodError, match="no such row"):
        found.circuit(2)
    for wrong in ({"unit": "neuron"}, {"thresholds": ()}, {"ablation": "optimal"}, {"treshold": 1}):
        with pytest.raises(MethodError):
            acdc(model, ioi, **wrong)  # type: ignore[arg-type]


def test_its_plan_counts_a_trial_an_edge() -> None:
    model = Model(tiny_llama(num_hidden_layers=2), tiny_tokenizer())
    ioi = hw.behavior("ioi", n=8, seed=0)
    graph = hw.localize.graph_of(model)
    plan = hw.localize.plan("acdc", model, ioi, thresholds=(0.1, 0.01))
    n = ioi.train.bind(model).n
    assert plan.n == n
    assert plan.floor.passes % (2 + 2 * graph.n_edges) == 0
    assert plan.total.attention < plan.floor.attention
    # trials at the logits run no layer at all, those at layer 1 half of them
    by_name = {step.name: step for step in plan.steps}
    assert by_name["trials from layer 2 on"].attention == 0
    later, first = (by_name[f"trials from layer {i} on"] for i in (1, 0))
    assert later.attention / later.positions == 1
    assert first.attention / first.positions == 2


# --- published findings


@pytest.fixture(scope="module")
def gpt2() -> Any:
    folder = os.environ.get("HEADWATER_GPT2")
    if not folder:
        pytest.skip("HEADWATER_GPT2 names no folder with GPT-2's weights, so ACDC's published findings are not checked")
    return hw.load(folder)


GREATER_THAN = {
    "a0.h1", "a0.h3", "a0.h5", "m0", "m1", "m2", "m3",  # read the year
    "a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1",  # attend to it
    "m8", "m9", "m10", "m11",  # raise later years
}  # fmt: skip
IOI = {
    "a9.h9", "a10.h0", "a9.h6",  # name movers
    "a7.h3", "a7.h9", "a8.h6", "a8.h10",  # S-inhibition
    "a5.h5", "a6.h9", "a5.h8", "a5.h9",  # induction
    "a0.h1", "a3.h0", "a0.h10",  # duplicate tokens
    "a2.h2", "a4.h11",  # previous token
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published", "metric", "threshold"),
    [("greater_than", GREATER_THAN, "prob_diff", 0.01585), ("ioi", IOI, "kl", 0.0575)],
)
def test_published_circuits_are_found_again(
    gpt2: Any, name: str, published: set[str], metric: str, threshold: float
) -> None:
    """Conmy et al. (2023) recover most of the circuits of Hanna et al. (2023) and Wang et al. (2022): here at least
    half of the published nodes must be found, and more of them than of as many nodes drawn at random.
    """
    pairs_of_it = hw.behavior(name, n=16, seed=0)
    found = acdc(gpt2, pairs_of_it, metric=metric, thresholds=(threshold,), side_by_side=32).circuit()
    graph = found.graph
    kept = set(found.nodes) - {"input", "logits"}
    recall = len(kept & published) / len(published)
    assert recall >= 0.5
    assert recall > 1.5 * len(kept) / (len(graph.sources) - 1)

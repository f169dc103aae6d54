"""Overlap of circuits: identical and unrelated ones, the null against its definition, exact expectations."""

import itertools

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import kstest, spearmanr

from headwater.core.errors import MethodError
from headwater.core.results import load_result
from headwater.localize.attribution.eap import AttributionResult
from headwater.localize.circuit import Circuit
from headwater.localize.comparing.compare import compare, expected_shared, members, shared_p
from headwater.localize.graph import Graph
from headwater.localize.judging.nulls import random_circuits

GRAPH = Graph(n_layers=3, n_heads=4, n_kv_heads=2)


def mask(seed: int, density: float = 0.2, graph: Graph = GRAPH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(graph.allowed.shape, generator=generator) < density) & graph.allowed


def scores(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(GRAPH.allowed.shape, generator=generator, dtype=torch.float64) * GRAPH.allowed


def row(result, what, measure, null=None):  # type: ignore[no-untyped-def]
    found = result.tables["overlap"].filter((pl.col("what") == what) & (pl.col("measure") == measure))
    return (found if null is None else found.filter(null=null)).row(0, named=True)


def test_identical_circuits_overlap_wholly_and_not_by_chance() -> None:
    circuit = Circuit.build(GRAPH, mask(0), scores(0))
    result = compare(circuit, circuit, n=200)
    for what in ("edges", "nodes", "heads", "weights"):
        for measure in ("iou", "recall", "precision"):
            assert row(result, what, measure)["value"] == pytest.approx(1.0)
    assert row(result, "scores", "spearman")["value"] == pytest.approx(1.0)
    assert row(result, "edges", "iou")["p"] < 1e-6
    assert row(result, "edges", "iou", "heads")["p"] <= 1 / 50
    assert row(result, "weights", "iou")["p"] == pytest.approx(1 / 201)
    assert row(result, "scores", "spearman")["p"] == pytest.approx(1 / 201)
    assert result.facts["shared_heads"] == [name for name in circuit.nodes if ".h" in name]


def test_counts_are_those_of_the_sets() -> None:
    a, b = Circuit.build(GRAPH, mask(1)), Circuit.build(GRAPH, mask(2))
    one, two = set(GRAPH.edge_names(a.mask)), set(GRAPH.edge_names(b.mask))
    result = compare(a, b, n=20)
    assert row(result, "edges", "iou")["value"] == pytest.approx(len(one & two) / len(one | two))
    assert row(result, "edges", "recall")["value"] == pytest.approx(len(one & two) / len(one))
    assert row(result, "edges", "precision")["value"] == pytest.approx(len(one & two) / len(two))
    nodes = set(a.nodes) - {"logits"}, set(b.nodes) - {"logits"}
    assert row(result, "nodes", "iou")["value"] == pytest.approx(len(nodes[0] & nodes[1]) / len(nodes[0] | nodes[1]))
    heads = set(a.heads), set(b.heads)
    assert row(result, "heads", "recall")["value"] == pytest.approx(len(heads[0] & heads[1]) / len(heads[0]))
    assert {name for name, yes in zip(GRAPH.sources, members(GRAPH, a.mask).tolist(), strict=True) if yes} == nodes[0]


def test_weights_and_ranks_equal_their_definitions() -> None:
    a, b = Circuit.build(GRAPH, mask(1), scores(1)), Circuit.build(GRAPH, mask(2), scores(1) + 0.5 * scores(2))
    result = compare(a, b, n=20)
    u, v = ((c.scores.abs() * c.mask).flatten() / (c.scores.abs() * c.mask).sum() for c in (a, b))
    assert row(result, "weights", "iou")["value"] == pytest.approx(
        float(torch.minimum(u, v).sum() / torch.maximum(u, v).sum())
    )
    assert row(result, "weights", "recall")["value"] == pytest.approx(float(u[b.mask.flatten()].sum()))
    assert row(result, "weights", "precision")["value"] == pytest.approx(float(v[a.mask.flatten()].sum()))
    x, y = a.scores[GRAPH.allowed], b.scores[GRAPH.allowed]
    assert row(result, "scores", "spearman")["value"] == pytest.approx(spearmanr(x, y).statistic)
    assert row(result, "absolute scores", "spearman")["value"] == pytest.approx(spearmanr(x.abs(), y.abs()).statistic)


def test_the_null_of_edges_is_that_of_random_circuits() -> None:
    a, b = mask(3, 0.3), mask(4, 0.3)
    drawn = np.array([int((a & m).sum()) for m in random_circuits(GRAPH, b, 4000, kind="edges", seed=1)])
    assert expected_shared(GRAPH, a, b) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 4000**0.5)
    observed = int((a & b).sum())
    share = (drawn >= observed).mean()
    assert shared_p(GRAPH, a, b) == pytest.approx(share, abs=4 * 0.5 / 4000**0.5)
    result = compare(Circuit.build(GRAPH, a), Circuit.build(GRAPH, b), n=2000)
    assert row(result, "edges", "recall")["expected"] == pytest.approx(drawn.mean() / int(a.sum()), rel=0.05)
    # by hand: a cell of N edges with x and y of them shares x y / N on average
    cells = GRAPH.layer_cells
    by_hand = sum(
        float((cells[a] == c).sum() * (cells[b] == c).sum() / (cells == c).sum()) for c in set(cells[a].tolist())
    )
    assert expected_shared(GRAPH, a, b) == pytest.approx(by_hand)


def test_p_of_unrelated_circuits_is_uniform() -> None:
    a = mask(5, 0.3)
    drawn = list(random_circuits(GRAPH, mask(6, 0.3), 300, kind="edges", seed=2))
    p = np.array([shared_p(GRAPH, a, b) for b in drawn])
    # a discrete p is at or above uniform: never too often small, and not far above either
    assert (p <= 0.05).mean() <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5
    uniform = np.random.default_rng(0).random(300)
    below = np.array([shared_p_strict(a, b) for b in drawn])
    assert kstest(p - uniform * (p - below), "uniform").pvalue > 0.01


def shared_p_strict(a: torch.Tensor, b: torch.Tensor) -> float:
    """P(more shared edges than observed): with the p itself, the two ends of the randomized p-value."""
    from headwater.localize.comparing.compare import _shared_distribution

    return float(_shared_distribution(GRAPH, a, b)[int((a & b).sum()) + 1 :].sum())


def test_ranks_of_unrelated_scores_do_not_correlate() -> None:
    p = [
        row(compare(attribution(seed), attribution(seed + 100), n=39, seed=seed), "scores", "spearman")["p"]
        for seed in range(40)
    ]
    assert 0.3 < float(np.mean(p)) < 0.7 and min(p) < 0.3


def attribution(seed: int) -> AttributionResult:
    return AttributionResult(tensors={"scores": scores(seed)}, facts={"graph": GRAPH.to_dict(), "method": "eap"})


def test_a_layer_profile_alone_is_not_similarity() -> None:
    """Scores that are large in the same layers, and random within them, correlate; the null knows it."""
    profile = GRAPH.layer_cells.double().clamp(min=0) * GRAPH.allowed
    a, b = (attribution(seed) for seed in (1, 2))
    for result in (a, b):
        result.tensors["scores"] = profile + 0.01 * result.tensors["scores"]
    found = row(compare(a, b, n=200), "scores", "spearman")
    assert found["value"] > 0.9 and found["p"] > 0.02


def test_more_alike_is_more_significant() -> None:
    base = mask(8, 0.15)
    p = []
    for keep in (1.0, 0.6, 0.0):
        generator = torch.Generator().manual_seed(1)
        other = next(random_circuits(GRAPH, base, 1, kind="edges", seed=9))
        kept = torch.rand(base.shape, generator=generator) < keep
        p.append(shared_p(GRAPH, base, torch.where(kept, base, other & ~base)))
    assert all(x < y for x, y in itertools.pairwise(p))


def test_what_cannot_be_compared_is_refused() -> None:
    other = Graph(n_layers=3, n_heads=4, n_kv_heads=4)
    with pytest.raises(MethodError, match="one graph"):
        compare(Circuit.build(GRAPH, mask(0)), Circuit.build(other, mask(0, graph=other)))
    with pytest.raises(MethodError, match="empty"):
        compare(Circuit.build(GRAPH, mask(0)), Circuit.build(GRAPH, torch.zeros_like(GRAPH.allowed)))
    with pytest.raises(MethodError, match="draws"):
        compare(Circuit.build(GRAPH, mask(0)), Circuit.build(GRAPH, mask(1)), n=0)
    with pytest.raises(MethodError, match="no such measure"):
        compare(Circuit.build(GRAPH, mask(0)), Circuit.build(GRAPH, mask(1)), n=5).value("edges", "spearman")


def test_models_of_one_shape_but_another_width_compare(tmp_path) -> None:  # type: ignore[no-untyped-def]
    wide = Graph(n_layers=3, n_heads=4, n_kv_heads=2, d_model=99)
    result = compare(Circuit.build(GRAPH, mask(0)), Circuit.build(wide, mask(0)), n=10, names=("gpt", "tpg"))
    result.save(tmp_path / "c")
    again = load_result(tmp_path / "c")
    assert again.content_hash == result.content_hash
    assert again.facts["names"] == ["gpt", "tpg"]

"""EAP and EAP-IG equal their definition on every family, edge for edge."""

import pytest
import torch

from headwater.behavior.metrics import metric
from headwater.localize.engine.edges import EdgeScorer
from headwater.localize.engine.passes import Engine, Scored, can_reuse_prefix, make_batches
from localize_families import LAYOUTS, bound, make, pairs, plain_edge_scores

NODES = {"eap": [(1.0, 1.0)], "ig": [(0.0, 1 / 3), (1 / 3, 1 / 3), (2 / 3, 1 / 3)]}


@pytest.mark.parametrize("reuse", [True, False], ids=["prefix", "whole"])
@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_equal_their_definition(name: str, nodes: list[tuple[float, float]], reuse: bool) -> None:
    model = make(name)
    groups = [pairs(3, 6, 2, seed=1), pairs(2, 7, 4, seed=2)]
    engine = Engine(model)
    assert can_reuse_prefix(engine)
    scorer = EdgeScorer(engine, Scored.named("logit_diff"))
    for batch in make_batches(bound(*groups), 8, reuse_prefix=reuse):
        scorer.add(batch, nodes)
    graph = scorer.graph
    expected = torch.zeros_like(scorer.total)
    for group in groups:
        for (source, reader), value in plain_edge_scores(model, name, group, metric("logit_diff"), nodes).items():
            expected[graph.source(source), graph.reader(reader)] += value * len(group)
    expected = expected.masked_fill(~graph.allowed, 0)
    assert float(expected.abs().max()) > 1e-2
    assert not bool(scorer.total[~graph.allowed].any())
    torch.testing.assert_close(scorer.total, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))

"""AtP: a node's score is the sum of its edges' EAP scores, and the derivative of the metric along its write."""

import pytest
import torch

from headwater.localize.attribution.atp import NodeScorer
from headwater.localize.engine.edges import EdgeScorer
from headwater.localize.engine.passes import Engine, Scored, make_batches
from headwater.localize.engine.places import places_of
from localize_families import LAYOUTS, bound, make, pairs


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_node_is_worth_the_sum_of_its_edges(name: str) -> None:
    engine, metric = Engine(make(name)), Scored.named("logit_diff")
    edges, nodes = EdgeScorer(engine, metric), NodeScorer(engine, metric)
    total = torch.zeros(len(edges.graph.sources), dtype=torch.float64)
    for batch in make_batches(bound(pairs(3, 6, 2)), 8):
        edges.add(batch, [(1.0, 1.0)])
        scores = nodes.scores(batch)
        total += scores.sum(dim=(1, 2))
        for positions in ("named", "each"):
            parts = places_of(batch, positions).sums(scores)
            torch.testing.assert_close(sum(parts.values()), scores.sum(dim=(1, 2)), rtol=1e-10, atol=1e-12)
        named = places_of(batch, "named").sums(scores)
        torch.testing.assert_close(named["END"], scores[:, :, -1].sum(dim=1), rtol=0, atol=0)
    torch.testing.assert_close(total, edges.total.sum(dim=1), rtol=1e-9, atol=1e-10)
    assert (edges.mean_clean, edges.mean_corrupt) == pytest.approx((nodes.mean_clean, nodes.mean_corrupt))

"""Circuits are evaluated as their definition says, on every family; the whole is the model, nothing is the
counterfactual.
"""

import pytest
import torch

from headwater.behavior.metrics import metric
from headwater.localize.engine.evaluate import CircuitRunner
from headwater.localize.engine.passes import Engine, Scored, make_batches
from headwater.localize.selection import prune
from localize_families import LAYOUTS, bound, make, pairs, plain_circuit


def plain_model(model, ids):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model.hf(input_ids=ids, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("reuse", [True, False], ids=["prefix", "whole"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_circuits_equal_their_definition(name: str, reuse: bool) -> None:
    model = make(name)
    group = pairs(3, 6, 2)
    engine = Engine(model)
    graph = engine.wiring.graph
    generator = torch.Generator().manual_seed(5)
    masks = [
        (torch.rand(graph.allowed.shape, generator=generator) < density) & graph.allowed
        for density in (0.03, 0.1, 0.4, 0.8)
    ]
    no_attention = graph.allowed.clone()
    no_attention[:, graph.attention_readers_at(1)] = False
    no_mlp = graph.allowed.clone()
    no_mlp[:, graph.mlp_reader_at(0)] = False
    masks += [graph.allowed, torch.zeros_like(graph.allowed), no_attention, no_mlp]
    logit_diff = metric("logit_diff")
    batches = make_batches(bound(group), 8, reuse_prefix=reuse)
    assert len(batches) == (2 if reuse else 3)
    runner = CircuitRunner(engine, Scored.named("logit_diff"))
    found = [
        torch.cat(values) for values in zip(*(runner.values(batch, masks).circuits for batch in batches), strict=True)
    ]
    for name_of in ("logit_diff", "kl"):  # without the model's own run, and with it
        alone = CircuitRunner(engine, Scored.named(name_of))
        for batch in batches:
            same = zip(alone.circuits_only(batch, masks), alone.values(batch, masks).circuits, strict=True)
            assert all(torch.equal(a, b) for a, b in same)
    ends = [runner.values(batch, []) for batch in batches]
    clean = logit_diff(plain_model(model, group.clean), group.answers, group.foils)
    corrupt = logit_diff(plain_model(model, group.corrupt), group.answers, group.foils)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.cat([e.clean for e in ends]), clean, **close)
    torch.testing.assert_close(torch.cat([e.corrupt for e in ends]), corrupt, **close)
    torch.testing.assert_close(found[4], clean, **close)
    torch.testing.assert_close(found[5], corrupt, **close)
    moved = 0
    for mask, values in zip(masks, found, strict=True):
        # with a norm after the output projection, heads that lead nowhere would count in its deviation: see the module
        pruned = LAYOUTS[name].post_norm is not None
        edges = set(graph.edge_names(prune(graph, mask) if pruned else mask))
        expected = logit_diff(plain_circuit(model, name, group, edges), group.answers, group.foils)
        torch.testing.assert_close(values, expected, **close)
        moved += int(not torch.allclose(expected, clean) and not torch.allclose(expected, corrupt))
    assert moved >= 4
    after = plain_model(model, group.clean)
    torch.testing.assert_close(logit_diff(after, group.answers, group.foils), clean, rtol=0, atol=0)
    assert not any(
        "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
        for module in model.hf.modules()
    )

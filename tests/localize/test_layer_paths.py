"""EAP-IG over activations and node integrated gradients equal their plain definitions: whole passes, one stream a
reader."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from headwater.behavior.metrics import metric
from headwater.localize.attribution.ig_activations import score_batch
from headwater.localize.attribution.layer_paths import WriteScorer, sites_of
from headwater.localize.engine.edges import EdgeScorer
from headwater.localize.engine.passes import Engine, Scored, make_batches
from localize_families import LAYERS, LAYOUTS, Plain, bound, make, pairs

FLOAT32_INSIDE = {"gptj", "gemma2", "gemma3", "mixtral"}  # softmaxes that compute in float32 whatever the dtype
NODES = [(1 / 3, 0.2), (0.0, 0.3), (1.0, 0.5)]


def written_at(plain: Plain, seen: dict[str, Any], kind: str, layer: int) -> Tensor:
    """What a site writes, before the block's multiplier."""
    if kind == "input":
        return seen["resid"][0].detach()
    if kind == "mlp":
        return seen["mlp"][layer].detach()
    out = seen["o"][layer].detach()
    return out if plain.layout.post_norm is None else plain.at(layer, plain.layout.post_norm)(out).detach()


def moving(plain: Plain, kind: str, layer: int, value: Tensor) -> Callable[[ExitStack], None]:
    """A change of a run: a site writes `value`."""

    def change(stack: ExitStack) -> None:
        if kind == "input":

            def enter(_: Any, a: Any, k: Any) -> Any:
                return ((value, *a[1:]), k) if a else (a, {**k, "hidden_states": value})

            stack.callback(plain.blocks[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
            return
        path = plain.layout.mlp_write if kind == "mlp" else (plain.layout.post_norm or plain.layout.out_proj)

        def instead(_: Any, a: Any, y: Any) -> Any:
            return (value, *y[1:]) if isinstance(y, tuple) else value

        stack.callback(plain.at(layer, path).register_forward_hook(instead).remove)

    return change


def plain_scores(
    name: str, model: Any, group: Any, scope: str
) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """(edge scores, node scores by own activations), every pass whole, every reader with a stream of its own."""
    plain = Plain(model, name)
    with torch.no_grad():
        clean, corrupt = plain.run(group.clean), plain.run(group.corrupt)
    ours, theirs = plain.writes(clean), plain.writes(corrupt)
    for weight in model.hf.parameters():
        weight.requires_grad_(False)
    names = [n for layer in range(LAYERS) for n in (*[r for r, _, _ in plain.reader_names(layer)], f"m{layer}")]
    edges: dict[tuple[str, str], float] = {}
    nodes: dict[str, float] = {}
    sites = sites_of(LAYERS)
    for site in sites:
        sources = {
            "input": ["input"],
            "attention": [f"a{site.layer}.h{h}" for h in range(4)],
            "mlp": [f"m{site.layer}"],
        }[site.kind]
        end = written_at(plain, clean, site.kind, site.layer)
        start = written_at(plain, corrupt, site.kind, site.layer)
        for place, weight in NODES:
            value = (start + place * (end - start)).clone().requires_grad_(True)
            leaves: dict[str, Tensor] = {}

            def own(reader: str, leaves: dict[str, Tensor] = leaves) -> Callable[[Tensor], Tensor]:
                def read(stream: Tensor) -> Tensor:
                    leaves[reader] = stream.view_as(stream)
                    return leaves[reader]

                return read

            def change(stack: ExitStack, value: Tensor = value, own: Any = own, site: Any = site) -> None:
                moving(plain, site.kind, site.layer, value)(stack)
                plain.reading({reader: own(reader) for reader in [*names, "logits"]})(stack)
                # readers before the site need something to differentiate by
                if site.kind != "input":
                    stack.callback(
                        model.hf.get_input_embeddings()
                        .register_forward_hook(lambda _, a, y: y.detach().requires_grad_(True))
                        .remove
                    )

            logits = plain.run(group.clean, change)["logits"]
            total = metric("logit_diff")(logits, group.answers, group.foils, clean["logits"]).sum()
            wanted = [*leaves.values(), value]
            found = torch.autograd.grad(total, wanted, allow_unused=True)
            share = weight / len(sites) if scope == "all" else weight
            for reader, g in zip(leaves, found, strict=False):
                for source in ours if scope == "all" else sources:
                    if g is not None:
                        change_of = (ours[source] - theirs[source]) * g
                        edges[source, reader] = edges.get((source, reader), 0.0) + float(change_of.sum()) * share
            assert found[-1] is not None
            for source in sources:  # a head's part of the write, before the multiplier
                scale = plain.layout.scale if site.kind != "input" else 1.0
                difference = ((ours[source] - theirs[source]) / scale).reshape(found[-1].shape)
                nodes[source] = nodes.get(source, 0.0) + float((difference * found[-1]).sum()) * weight
    return edges, nodes


@pytest.mark.parametrize("reuse", [True, False], ids=["prefix", "whole"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_moved_activations_equal_their_definition(name: str, reuse: bool) -> None:
    model = make(name)
    group = pairs(3, 6, 2)
    engine, scored = Engine(model), Scored.named("logit_diff")
    batches = make_batches(bound(group), 8, reuse_prefix=reuse)
    for scope in ("all", "own"):
        scorer, nodes = EdgeScorer(engine, scored), WriteScorer(engine, scored)
        total = torch.zeros(len(scorer.graph.sources), dtype=torch.float64)
        for batch in batches:
            score_batch(scorer, batch, NODES, scope)  # type: ignore[arg-type]
            total += nodes.scores(batch, NODES).sum(dim=(1, 2))
        graph = scorer.graph
        edges, by_node = plain_scores(name, model, group, scope)
        expected = torch.zeros_like(scorer.total)
        for (source, reader), value in edges.items():
            expected[graph.source(source), graph.reader(reader)] += value
        expected = expected.masked_fill(~graph.allowed, 0)
        biggest = float(expected.abs().max())
        assert biggest > 1e-2
        near = 1e-7 if name in FLOAT32_INSIDE else 1e-10
        torch.testing.assert_close(scorer.total, expected, rtol=100 * near, atol=near * biggest)
        assert not bool(scorer.total[~graph.allowed].any())
    wanted = torch.tensor([by_node[source] for source in graph.sources], dtype=torch.float64)
    torch.testing.assert_close(total, wanted, rtol=100 * near, atol=near * float(wanted.abs().max()))
    assert (scorer.mean_clean, scorer.mean_corrupt) == pytest.approx((nodes.mean_clean, nodes.mean_corrupt))

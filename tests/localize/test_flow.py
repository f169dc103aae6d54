"""Information-flow routes: terms add up to the stream, importances and flow are their definition, on every family."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.core.errors import MethodError, ModelError
from headwater.localize.engine.passes import Engine
from headwater.localize.engine.wiring import wiring_of
from headwater.localize.search.flow_routes import Flow, FlowConfig, flow_routes
from headwater.localize.search.moves import captured, moves_of
from localize_families import LAYERS, LAYOUTS, H, K, Plain, make, pairs

KINDS = ("v", "pattern", "z", "attn_out", "resid_pre", "mlp_out")


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=12, seed=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_add_up_to_the_stream(name: str) -> None:
    """Every token's part of every head, with the biases shared out, is all that attention adds."""
    model, ids = make(name), pairs(3, 6, 2).clean
    run = captured(model, ids, KINDS, logits="none")
    for index, layer in enumerate(wiring_of(model).layers):
        moves = moves_of(layer, run, torch.float64)
        total, by_head = torch.zeros_like(run[f"attn_out.{index}"]), torch.zeros_like(moves.heads())
        for head, queries, terms in moves.pieces():
            by_head[:, head, queries] += terms.sum(dim=2)
            total[:, queries] += terms.sum(dim=2)
        # the model's own attention softmaxes in float32 where it shows its pattern
        torch.testing.assert_close(total, run[f"attn_out.{index}"], rtol=0, atol=2e-6)
        torch.testing.assert_close(by_head, moves.heads(), rtol=1e-12, atol=1e-12)
        part = moves.at(slice(5, None))
        torch.testing.assert_close(part.heads(), moves.heads()[:, :, 5:], rtol=0, atol=0)


def plain_terms(name: str, model: Any, ids: Tensor) -> list[dict[str, Tensor]]:
    """By hand: each layer's stream before [B, T, D], MLP [B, T, D], and head terms [B, H, T, S, D]."""
    plain, patterns = Plain(model, name), model.run(ids, capture="pattern.*", logits="none")
    seen = plain.run(ids)
    writes, found = plain.writes(seen), []
    for layer in range(LAYERS):
        weight, bias = plain.weight(layer, plain.layout.out_proj)
        kv = plain.layout.kv
        terms = torch.zeros(*ids.shape[:1], H, ids.shape[1], ids.shape[1], weight.shape[0], dtype=torch.float64)
        for head in range(H):
            _, value = plain.project(layer, "v", head // (H // kv), seen["resid"][layer])
            write = value @ weight[:, head * K : (head + 1) * K].T + (0 if bias is None else bias / H)
            term = patterns[f"pattern.{layer}"][:, head, :, :, None] * write[:, None]
            if plain.layout.post_norm is not None:
                norm = plain.at(layer, plain.layout.post_norm)
                gain = norm.weight + 1 if norm.plus_one else norm.weight
                term = term / (seen["o"][layer].square().mean(-1, keepdim=True) + norm.eps).sqrt()[:, :, None] * gain
            terms[:, head] = term.detach() * plain.layout.scale
        found.append({"before": seen["resid"][layer].detach(), "mlp": writes[f"m{layer}"], "heads": terms})
    return found


def near(whole: Tensor, term: Tensor) -> float:
    return max(0.0, float(whole.abs().sum() - (whole - term).abs().sum()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox", "granite"])
def test_flow_is_its_definition(name: str) -> None:
    """Walk the prediction's 1 down, token by token and term by term, and count what comes to each source."""
    model, ids = make(name), pairs(2, 5, 2).clean
    with torch.no_grad():
        layers = plain_terms(name, model, ids)
    flow = Flow(Engine(model), ids)
    graph = flow.graph
    length, parallel = ids.shape[1], graph.parallel
    for row in range(len(ids)):
        reaches: dict[tuple[str, int], float] = {}  # (node, token) -> flow

        def down(layer: int, token: int, amount: float, row: int = row, reaches: Any = reaches) -> None:
            """The stream that enters block `layer` at a token hands its flow to what it is the sum of."""
            if layer == 0:
                reaches["input", token] = reaches.get(("input", token), 0.0) + amount
                return
            here = layers[layer - 1]
            before, mlp = here["before"][row, token], here["mlp"][row, token]
            heads = here["heads"][row, :, token]
            whole = before + heads.sum(dim=(0, 1)) + mlp
            if not parallel:
                own, rest = near(whole, mlp), near(whole, whole - mlp)
                reaches[f"m{layer - 1}", token] = reaches.get((f"m{layer - 1}", token), 0.0) + amount * own / (
                    own + rest
                )
                amount, whole = amount * rest / (own + rest), whole - mlp
            terms = {(h, s): near(whole, heads[h, s]) for h in range(H) for s in range(length)}
            stream, own = near(whole, before), near(whole, mlp) if parallel else 0.0
            total = sum(terms.values()) + stream + own
            if parallel:
                reaches[f"m{layer - 1}", token] = reaches.get((f"m{layer - 1}", token), 0.0) + amount * own / total
            for head in range(H):
                at = sum(terms[head, s] for s in range(length))
                key = (f"a{layer - 1}.h{head}", token)
                reaches[key] = reaches.get(key, 0.0) + amount * at / total
            down(layer - 1, token, amount * stream / total)

        def spend(layer: int, row: int = row, reaches: Any = reaches, down: Any = down) -> None:
            """What came to a layer's nodes goes on through what they read."""
            here = layers[layer]
            if not parallel:
                for token in range(length):
                    amount = reaches.get((f"m{layer}", token), 0.0)
                    # an MLP reads the stream after its attention: that sum, then the stream below it
                    before, heads = here["before"][row, token], here["heads"][row, :, token]
                    whole = before + heads.sum(dim=(0, 1))
                    terms = {(h, s): near(whole, heads[h, s]) for h in range(H) for s in range(length)}
                    total = sum(terms.values()) + near(whole, before)
                    for head in range(H):
                        at = sum(terms[head, s] for s in range(length))
                        key = (f"a{layer}.h{head}", token)
                        reaches[key] = reaches.get(key, 0.0) + amount * at / total
                    down(layer, token, amount * near(whole, before) / total)
            else:
                for token in range(length):
                    down(layer, token, reaches.get((f"m{layer}", token), 0.0))
            for head in range(H):
                for token in range(length):
                    amount = reaches.get((f"a{layer}.h{head}", token), 0.0)
                    before, heads = here["before"][row, token], here["heads"][row, :, token]
                    whole = before + heads.sum(dim=(0, 1)) + (here["mlp"][row, token] if parallel else 0)
                    terms = [near(whole, heads[head, s]) for s in range(length)]
                    for source in range(length):
                        if sum(terms) > 0:
                            down(layer, source, amount * terms[source] / sum(terms))

        down(LAYERS, length - 1, 1.0)
        for layer in reversed(range(LAYERS)):
            spend(layer)
        _, nodes = flow.flows("values")
        expected = torch.zeros_like(nodes[:, row])
        for (node, token), amount in reaches.items():
            expected[graph.source(node), token] += amount
        torch.testing.assert_close(nodes[:, row], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reads", ["all", "values"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "olmo2", "mixtral"])
def test_flow_is_kept(name: str, reads: Any) -> None:
    flow = Flow(Engine(make(name)), pairs(3, 6, 2).clean)
    graph = flow.graph
    scores, nodes = flow.flows(reads)
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(scores[:, -1].sum(), one.sum())
    torch.testing.assert_close(nodes[0].sum(dim=-1), one)  # all of it comes from the embeddings in the end
    torch.testing.assert_close(scores.sum(dim=1), nodes.sum(dim=(1, 2)))
    assert not bool(scores[~graph.allowed].any()) and bool((scores >= 0).all())
    for index, step in enumerate(flow.steps):
        whole = step.head.sum(dim=(1, 3)) + step.stream + (step.mlp if graph.parallel else 0)
        torch.testing.assert_close(whole, torch.ones_like(whole))
        assert not bool(step.head.triu(1).any()), index
    # what arrives at a node leaves it: into a head's readers, into an MLP's
    for node in range(1, len(graph.sources)):
        into = scores[:, graph.owners[node]].sum()
        if graph.n_kv_heads == graph.n_heads or "m" in graph.sources[node]:
            torch.testing.assert_close(into, nodes[node].sum(), rtol=1e-6, atol=1e-9)
    if reads == "values":
        queries = [r for r, reader in enumerate(graph.readers) if "<q>" in reader or "<k>" in reader]
        assert not bool(scores[:, queries].any())


def test_routes_are_what_is_reached_above_the_threshold(tiny_model: Any, ioi: Any) -> None:
    result: Any = flow_routes(tiny_model, ioi, threshold=0.05)
    routes = result.tables["routes"]
    assert routes["importance"].min() > 0.05
    assert set(routes["part"]) <= {"head", "mlp", "residual", "residual_mlp"}
    row = routes["row"][0]
    one = result.route(row).to_dicts()
    top = max(r["layer"] for r in one)
    last = max(r["query"] for r in one)
    assert {r["query"] for r in one if r["layer"] == top and r["part"] != "head"} == {last}
    # every edge below the top lies under one that was followed to its query
    held = {(r["layer"], r["source"]) for r in one if r["part"] in ("head", "residual")}
    for r in one:
        if r["part"] == "head" and r["layer"] < top:
            assert (r["layer"] + 1, r["query"]) in held
    fewer = flow_routes(tiny_model, ioi, threshold=0.3).tables["routes"]
    assert 0 < fewer.height < routes.height
    steps = result.tables["steps"]
    assert steps["share"].max() == 1.0 and steps.height < routes.height
    counted = routes.filter(pl.col("part") == "head").group_by("row").len()["len"].sum()
    assert counted == routes.filter(pl.col("head").is_not_null()).height
    with pytest.raises(MethodError, match="no route of this prompt"):
        result.route(-5)


def test_scores_serve_as_any_other(tiny_model: Any, ioi: Any, tmp_path: Path) -> None:
    result: Any = hw.localize.methods.get("flow_routes")(tiny_model, ioi)
    assert result.facts["passes"] == {"forward": float(ioi.train.n), "backward": 0.0}
    assert result.circuit(edges=40).faithfulness(ioi.test[:3]).facts["n"] == 3
    assert "cmd" in result.curve(ioi.test[:3], fractions=(0.1, 0.5)).facts
    result.save(tmp_path / "r")
    back: Any = hw.load_result(tmp_path / "r", check=True)
    assert back.content_hash == flow_routes(tiny_model, ioi).content_hash
    assert back.chart().to_dict()


def test_what_does_not_fit_is_refused(tiny_model: Any, ioi: Any) -> None:
    with pytest.raises(MethodError, match="reads: Input should be"):
        flow_routes(tiny_model, ioi, reads="value")
    with pytest.raises(MethodError, match="between 0 and 1"):
        FlowConfig(threshold=1.5)
    with pytest.raises(MethodError, match="unknown option"):
        flow_routes(tiny_model, ioi, tau=0.1)


def test_attention_that_is_not_its_pattern_times_its_values_is_refused() -> None:
    model = make("llama")
    ids = pairs(2, 5, 2).clean
    run = captured(model, ids, KINDS, logits="none")
    layer = wiring_of(model).layers[0]
    run._values["v.0"] = run["v.0"] * torch.sigmoid(run["v.0"])
    with pytest.raises(ModelError, match="does not add up"):
        moves_of(layer, run, torch.float64)

"""What edges outside a circuit carry, against a plain definition layer after layer, in float64, on every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError
from headwater.core.model import Model
from headwater.localize.engine.ablation import Ablation, Constants, ablation_names, as_ablations, prepare
from headwater.localize.engine.evaluate import CircuitRunner
from headwater.localize.engine.passes import Engine, Scored, make_batches
from headwater.localize.engine.positions import position_index, prune_positions, top_positions
from headwater.localize.selection import prune
from localize_ablated import plain_ablated, plain_reference
from localize_families import LAYERS, LAYOUTS, H, K, Plain, bound, make, pairs
from tiny import tiny_llama, tiny_tokenizer


def evaluated(model: Model, group: Any, masks: list[Tensor], ablation: Ablation, positions: Any = None) -> Any:
    engine = Engine(model)
    reuse = ablation.kind == "counterfactual"
    batches = make_batches(bound(group), 12, reuse_prefix=reuse)
    prepared = prepare(engine, bound(group), batches, ablation)
    runner = CircuitRunner(engine, Scored.named("logit_diff"), prepared)
    found = [runner.values(batch, masks, positions) for batch in batches]
    circuits = [torch.cat([f.circuits[i] for f in found]) for i in range(len(masks))]
    return (
        circuits,
        torch.cat([f.clean for f in found]),
        torch.cat([f.corrupt for f in found]),
        torch.cat([f.empty for f in found]),
    )


@pytest.mark.parametrize("kind", ["zero", "mean", "mean_positional"])
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_ablated_circuits_equal_their_definition(name: str, kind: Any) -> None:
    model, group = make(name), pairs(3, 6, 2)
    graph = Engine(model).wiring.graph
    generator = torch.Generator().manual_seed(3)
    masks = [(torch.rand(graph.allowed.shape, generator=generator) < density) & graph.allowed for density in (0.2, 0.6)]
    masks = [prune(graph, mask) for mask in masks] + [graph.allowed, torch.zeros_like(graph.allowed)]
    found, clean, corrupt, empty = evaluated(model, group, masks, Ablation(kind=kind))
    base = plain_reference(model, name, group, kind)
    score = metric("logit_diff")
    for mask, values in zip(masks, found, strict=True):
        edges = set(graph.edge_names(mask))
        logits = plain_ablated(model, name, group, base, lambda s, r, edges=edges: float((s, r) in edges))
        torch.testing.assert_close(values, score(logits, group.answers, group.foils), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], clean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[3], empty, rtol=0, atol=0)
    own = [
        score(model.hf(input_ids=ids).logits[:, -1], group.answers, group.foils) for ids in (group.clean, group.corrupt)
    ]
    torch.testing.assert_close(torch.stack([clean, corrupt]), torch.stack(own), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(empty, corrupt)
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("over", ["prompt", "counterfactual"])
@torch.no_grad()
def test_resampling_gives_each_pair_another_ones_values(over: Any) -> None:
    model, group = make("llama"), pairs(4, 6, 2)
    engine = Engine(model)
    graph = engine.wiring.graph
    mask = prune(
        graph, (torch.rand(graph.allowed.shape, generator=torch.Generator().manual_seed(3)) < 0.4) & graph.allowed
    )
    ablation = Ablation(kind="resample", seed=5, over=over)
    prepared = prepare(engine, bound(group), [], ablation)
    assert prepared.others is not None
    texts = {"prompt": group.clean, "counterfactual": group.corrupt}[over]
    drawn = [next(i for i in range(4) if torch.equal(texts[i], prepared.others[row])) for row in range(4)]
    assert sorted(drawn) == [0, 1, 2, 3]
    assert all(i != row for row, i in enumerate(drawn))
    found, _, corrupt, empty = evaluated(model, group, [mask], ablation)
    plain = Plain(model, "llama")
    base = plain.writes(plain.run(texts[drawn]))
    edges = set(graph.edge_names(mask))
    score = metric("logit_diff")
    logits = plain_ablated(model, "llama", group, base, lambda s, r: float((s, r) in edges))
    torch.testing.assert_close(found[0], score(logits, group.answers, group.foils), rtol=1e-9, atol=1e-9)
    other = score(plain.run(texts[drawn])["logits"], group.answers, group.foils)
    torch.testing.assert_close(empty, other, rtol=1e-9, atol=1e-9)
    usual = score(plain.run(group.corrupt)["logits"], group.answers, group.foils)
    torch.testing.assert_close(corrupt, usual, rtol=1e-9, atol=1e-9)
    alone = prepare(engine, bound(pairs(1, 5, 2)), [], ablation)
    assert alone.others is not None
    assert torch.equal(alone.others[0], pairs(1, 5, 2).corrupt[0])


def test_constants_are_given_and_go_through_files() -> None:
    model, group = make("gemma2"), pairs(3, 6, 2)
    engine = Engine(model)
    graph = engine.wiring.graph
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = tuple(drawn(H, 1, K) for _ in range(LAYERS))
    constants = Constants(drawn(1, 32), heads, tuple(drawn(1, 32) for _ in range(LAYERS)), (None,) * LAYERS)
    constants = Constants.from_tensors(constants.tensors())
    mask = prune(graph, (torch.rand(graph.allowed.shape, generator=generator) < 0.5) & graph.allowed)
    with torch.no_grad():
        found, *_ = evaluated(model, group, [mask], Ablation(kind="optimal", constants=constants))
        plain = Plain(model, "gemma2")
        base = {"input": constants.input.expand(3, 6, 32)}
        for layer in range(LAYERS):
            norm, weight = plain.at(layer, plain.layout.post_norm), plain.weight(layer, plain.layout.out_proj)[0]
            for head in range(H):
                write = constants.heads[layer][head] @ weight[:, head * K : (head + 1) * K].T * (norm.weight + 1)
                base[f"a{layer}.h{head}"] = write.expand(3, 6, 32)
            base[f"m{layer}"] = constants.mlps[layer].expand(3, 6, 32)
        edges = set(graph.edge_names(mask))
        logits = plain_ablated(model, "gemma2", group, base, lambda s, r: float((s, r) in edges))
    expected = metric("logit_diff")(logits, group.answers, group.foils)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(MethodError, match="another model"):
        evaluated(make("gpt2"), group, [], Ablation(kind="optimal", constants=Constants(
            torch.zeros(1, 8), heads, constants.mlps, constants.shared)))  # fmt: skip


@pytest.mark.parametrize("kind", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("name", ["llama", "neox", "gemma2"])
@torch.no_grad()
def test_circuits_by_position_equal_their_definition(name: str, kind: Any) -> None:
    model, group = make(name), pairs(3, 6, 2)
    group.positions["S2"] = torch.tensor([2, 3, 3])
    graph = Engine(model).wiring.graph
    names = ["S2", "other", "END"]
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(*graph.allowed.shape, 3, generator=generator) < 0.4) & graph.allowed[..., None]
    mask = prune_positions(graph, mask)
    whole = graph.allowed[..., None].expand_as(mask)
    found, clean, _, empty = evaluated(model, group, [mask, whole, mask & False], Ablation(kind=kind), names)
    index = torch.ones(3, 6, dtype=torch.long)
    index[:, -1] = 2
    index[torch.arange(3), group.positions["S2"]] = 0

    def weight(source: str, reader: str) -> Tensor:
        own = mask[graph.source(source), graph.reader(reader)].double()
        return own[index][..., None]

    base = plain_reference(model, name, group, kind)
    logits = plain_ablated(model, name, group, base, weight)
    expected = metric("logit_diff")(logits, group.answers, group.foils)
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], clean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[2], empty, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected, clean)


def test_positions_are_told_apart() -> None:
    group = pairs(2, 4, 0)
    group.positions["S"] = torch.tensor([0, 3])
    (batch,) = make_batches(bound(group), 100)
    assert position_index(batch, ["S", "END", "other"]).tolist() == [[0, 2, 2, 1], [2, 2, 2, 0]]
    assert position_index(batch, ["-1", "-2", "other"]).tolist() == [[2, 2, 1, 0]] * 2
    assert position_index(batch, [f"-{i}" for i in range(1, 8)]).tolist() == [[3, 2, 1, 0]] * 2
    with pytest.raises(MethodError, match="no name covers"):
        position_index(batch, ["END"])
    with pytest.raises(MethodError, match="unknown position"):
        position_index(batch, ["S3", "other"])


def test_the_best_edges_at_positions_are_taken_and_connected() -> None:
    graph = Engine(make("llama")).wiring.graph
    scores = torch.zeros(*graph.allowed.shape, 2, dtype=torch.float64)
    i, a, m, out = graph.source("input"), graph.source("a0.h1"), graph.source("m1"), graph.reader("logits")
    scores[i, graph.reader("a0.h1<k>"), 0] = 5  # a key at one class serves the head's output at the other
    scores[a, out, 1] = -4
    scores[i, graph.reader("m1"), 0] = 3  # an MLP works at each position by itself: nothing comes of this one
    scores[m, out, 1] = 2
    assert int(top_positions(graph, scores, edges=4, pruned=False).sum()) == 4
    kept = top_positions(graph, scores, edges=4)
    assert sorted(map(tuple, kept.nonzero().tolist())) == sorted([(i, graph.reader("a0.h1<k>"), 0), (a, out, 1)])
    assert int(top_positions(graph, scores, edges=3, rank="signed", pruned=False)[a, out].sum()) == 0


@pytest.mark.parametrize("positions", ["named", "each"])
def test_scores_by_position_give_a_circuit_by_position(positions: str) -> None:
    model = Model(tiny_llama(torch.float64, num_hidden_layers=2), tiny_tokenizer())
    ioi = hw.behavior("ioi", n=8, seed=0)
    scores = hw.localize.eap(model, ioi, positions=positions)
    circuit = scores.circuit(edges=60, positions=True)
    assert circuit.positions == scores.facts["positions"]
    assert 0 < circuit.facts["n_position_edges"] <= 60
    assert len(circuit.tables["positions"]) == circuit.facts["n_position_edges"]
    free = scores.circuit(edges=60)
    found = [one.faithfulness(ioi.train).value for one in (circuit, free)]
    assert found[0] != found[1]
    whole = scores.circuit(edges=scores.graph.n_edges * len(circuit.positions), positions=True, pruned=False)
    assert whole.faithfulness(ioi.train).value == pytest.approx(1.0, abs=1e-9)
    assert whole.completeness(ioi.train).value == pytest.approx(0.0, abs=1e-9)
    drops = circuit.minimality(ioi.train, nodes=["m1"]).tables["nodes"]
    mask = circuit.position_mask.clone()
    mask[circuit.graph.source("m1")] = False
    less = hw.Circuit.build(circuit.graph, mask, positions=circuit.positions, model=model)
    assert drops["faithfulness"][0] == pytest.approx(less.faithfulness(ioi.train).value, abs=1e-9)
    for refused in (circuit.complement, lambda: circuit.null(ioi.train, n=1), lambda: circuit.without("m1")):
        with pytest.raises(MethodError, match="by position"):
            refused()
    with pytest.raises(MethodError, match="by position"):
        hw.localize.eap(model, ioi).circuit(edges=10, positions=True)
    with pytest.raises(MethodError, match="best of them all"):
        scores.circuit(threshold=0.1, positions=True)


def test_ablations_are_named_and_checked() -> None:
    assert ablation_names(as_ablations(["mean", Ablation(kind="mean", over="both"), "zero"])) == [
        "mean",
        "mean 2",
        "zero",
    ]
    for wrong in ("average", 3, []):
        with pytest.raises(MethodError):
            as_ablations(wrong)
    with pytest.raises(MethodError, match="texts"):
        Ablation(kind="mean", over="train")  # type: ignore[arg-type]

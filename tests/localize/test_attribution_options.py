"""Positions, references and neurons of attribution: each equals its definition, parts sum to the whole."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.behavior.metrics import metric
from headwater.core.errors import MethodError, ModelError
from headwater.localize.attribution.atp import NodeScorer
from headwater.localize.attribution.eap import integration_nodes
from headwater.localize.attribution.ig_activations import score_batch
from headwater.localize.attribution.layer_paths import WriteScorer
from headwater.localize.engine.edges import EdgeScorer
from headwater.localize.engine.passes import Batch, Engine, Scored, can_narrow, make_batches
from headwater.localize.engine.places import in_order, places_of
from headwater.localize.engine.writes import Fixed, fixed_values
from localize_families import LAYERS, LAYOUTS, Plain, bound, make, pairs, plain_edge_scores

FAMILIES = ["llama", "gpt2", "neox", "phi", "gemma2", "olmo2", "opt", "granite"]


def named(group: Any) -> Any:
    """The group with two more names: one that moves from pair to pair, one that hides END in the last pair."""
    n, last = len(group), group.clean.shape[1] - 1
    moving = torch.tensor([last - 1 - i % 3 for i in range(n)])
    hides = torch.tensor([last if i == n - 1 else last - 1 for i in range(n)])
    return replace(group, positions={"S": moving, "T": hides, "END": torch.full((n,), last)})


@pytest.mark.parametrize("name", FAMILIES)
def test_each_position_equals_its_definition(name: str) -> None:
    """A position's score is that of a counterfactual run whose writes differ there only."""
    model, group = make(name), named(pairs(3, 6, 2))
    engine, scored = Engine(model), Scored.named("logit_diff")
    (batch,) = make_batches(bound(group), 1000)
    plain = Plain(model, name)
    with torch.no_grad():
        ours, theirs = (plain.writes(plain.run(ids)) for ids in (group.clean, group.corrupt))
    scorer = EdgeScorer(engine, scored, positions="each")
    scorer.add(batch, [(1.0, 1.0)])
    assert in_order(scorer.places) == ["-4", "-3", "-2", "-1"]
    # the gradient of every reader is the score of a write of ones there, edge by edge from the plain definition
    gradients = _reader_gradients(model, name, group)
    graph = scorer.graph
    biggest = float(scorer.total.abs().max())
    for place, table in scorer.places.items():
        at = 6 + int(place)
        for reader, g in gradients.items():
            for source in ours:
                if bool(graph.allowed[graph.source(source), graph.reader(reader)]):
                    expected = float(((ours[source] - theirs[source]) * g)[:, at].sum())
                    found = float(table[graph.source(source), graph.reader(reader)])
                    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7 * biggest)


def _reader_gradients(model: Any, name: str, group: Any) -> dict[str, Tensor]:
    plain = Plain(model, name)
    for weight in model.hf.parameters():
        weight.requires_grad_(False)
    names = [n for layer in range(LAYERS) for n in (*[r for r, _, _ in plain.reader_names(layer)], f"m{layer}")]
    leaves: dict[str, Tensor] = {}

    def reading(reader: str) -> Any:
        def read(stream: Tensor) -> Tensor:
            leaves[reader] = stream.view_as(stream)
            return leaves[reader]

        return read

    def change(stack: ExitStack) -> None:
        hook = lambda _, a, y: y.detach().requires_grad_(True)  # noqa: E731
        stack.callback(model.hf.get_input_embeddings().register_forward_hook(hook).remove)
        plain.reading({reader: reading(reader) for reader in [*names, "logits"]})(stack)

    logits = plain.run(group.clean, change)["logits"]
    total = metric("logit_diff")(logits, group.answers, group.foils, None).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("positions", ["named", "each"])
@pytest.mark.parametrize("name", FAMILIES)
def test_positions_add_up(name: str, positions: Any) -> None:
    """For every edge method, on pairs of two lengths; a token with two names counts once."""
    engine, scored = Engine(make(name)), Scored.named("logit_diff")
    batches = make_batches(bound(named(pairs(3, 6, 2, seed=1)), named(pairs(2, 7, 4, seed=2))), 8)

    def run(scorer: EdgeScorer, how: str) -> EdgeScorer:
        for batch in batches:
            if how in ("all", "own"):
                score_batch(scorer, batch, integration_nodes(2, "right"), how)  # type: ignore[arg-type]
            else:
                scorer.add(batch, [(1.0, 1.0)] if how == "eap" else integration_nodes(2, "left"))
        return scorer

    for how in ("eap", "ig", "all", "own"):
        whole, parts = run(EdgeScorer(engine, scored), how), run(EdgeScorer(engine, scored, positions=positions), how)
        assert whole.places == {}
        biggest = float(whole.total.abs().max())
        torch.testing.assert_close(parts.total, whole.total, rtol=0, atol=1e-11 * biggest)
        summed = torch.stack(list(parts.places.values())).sum(dim=0)
        torch.testing.assert_close(summed, parts.total, rtol=0, atol=1e-11 * biggest)
        nodes = {place: table.sum(dim=1) for place, table in parts.places.items()}
        if how == "eap":
            scorer = NodeScorer(engine, scored)
            by_place: dict[str, Tensor] = {}
            for batch in batches:
                for place, part in places_of(batch, positions).sums(scorer.scores(batch)).items():
                    by_place[place] = by_place.get(place, torch.zeros_like(part)) + part
            for place, part in nodes.items():
                torch.testing.assert_close(part, by_place[place], rtol=0, atol=1e-10 * biggest)


def test_names_of_places() -> None:
    group = named(pairs(3, 6, 2))
    (batch,) = make_batches(bound(group), 1000)
    places = places_of(batch, "named")
    assert places.names == ["S", "T", "END", "other"]
    assert places.of.tolist() == [[3, 3, 0, 2], [3, 0, 1, 2], [0, 3, 3, 1]]


# --- references


def reference_of(plain: Plain, groups: list[Any], against: str) -> Any:
    """(pair length) -> source -> what it writes instead, [T, D], by definition from whole runs."""
    with torch.no_grad():
        writes = [plain.writes(plain.run(group.clean)) for group in groups]
    out: dict[int, dict[str, Tensor]] = {}
    for group in groups:
        length = group.clean.shape[1]
        out[length] = {}
        for source in writes[0]:
            rows = []
            for t in range(1, length + 1):
                have = [w[source][:, -t] for w in writes if w[source].shape[1] >= t]
                rows.append(torch.cat(have).mean(dim=0))
            by_position = torch.stack(rows[::-1])
            if against == "mean":
                every = torch.cat([w[source].flatten(0, 1) for w in writes]).mean(dim=0)
                by_position = every.expand(length, -1)
            out[length][source] = by_position
    return out


@pytest.mark.parametrize("against", ["mean", "mean_positional", "zero"])
@pytest.mark.parametrize("name", FAMILIES)
def test_references_equal_their_definition(name: str, against: Any) -> None:
    model = make(name)
    groups = [pairs(3, 6, 2, seed=1), pairs(2, 7, 4, seed=2)]
    engine, scored, plain = Engine(model), Scored.named("logit_diff"), Plain(model, name)
    batches = make_batches(bound(*groups), 8, reuse_prefix=False)
    fixed = fixed_values(engine, batches, against)
    scorer, nodes = EdgeScorer(engine, scored, fixed=fixed), NodeScorer(engine, scored, fixed=fixed)
    by_node = torch.zeros(len(scorer.graph.sources), dtype=torch.float64)
    for batch in batches:
        scorer.add(batch, [(1.0, 1.0)])
        by_node += nodes.scores(batch).sum(dim=(1, 2))
    assert scorer.mean_corrupt is None
    expected = torch.zeros_like(scorer.total)
    instead = None if against == "zero" else reference_of(plain, groups, against)
    for group in groups:
        with torch.no_grad():
            ours = plain.writes(plain.run(group.clean))
        for reader, g in _reader_gradients(model, name, group).items():
            for source, write in ours.items():
                other = _bias(plain, source) if instead is None else instead[group.clean.shape[1]][source]
                score = float(((write - other) * g).sum())
                expected[scorer.graph.source(source), scorer.graph.reader(reader)] += score
    expected = expected.masked_fill(~scorer.graph.allowed, 0)
    biggest = float(expected.abs().max())
    near = 1e-6 if name == "gemma2" else 1e-9
    torch.testing.assert_close(scorer.total, expected, rtol=0, atol=near * biggest)
    torch.testing.assert_close(by_node, scorer.total.sum(dim=1), rtol=0, atol=1e-9 * biggest)


def _bias(plain: Plain, source: str) -> Tensor | float:
    """What stays of a head's write in the plain definition when its values are zero: its share of the bias."""
    if not source.startswith("a"):
        return 0.0
    _, bias = plain.weight(int(source[1 : source.index(".")]), plain.layout.out_proj)
    return 0.0 if bias is None else bias / 4


def test_moved_from_a_fixed_reference() -> None:
    """By own activations, the score of all of a layer tends to what replacing its write by the reference does."""
    model, group = make("llama"), pairs(3, 6, 2)
    engine, scored, plain = Engine(model), Scored.named("logit_diff"), Plain(model, "llama")
    batches = make_batches(bound(group), 1000, reuse_prefix=False)
    nodes = integration_nodes(24, "gauss")
    for against in ("mean_positional", "zero"):
        fixed = fixed_values(engine, batches, against)  # type: ignore[arg-type]
        scores = WriteScorer(engine, scored, fixed=fixed).scores(batches[0], nodes).sum(dim=(1, 2))
        edges = EdgeScorer(engine, scored, fixed=fixed)
        score_batch(edges, batches[0], nodes, "own")
        torch.testing.assert_close(edges.total.sum(dim=1), scores, rtol=1e-9, atol=1e-9)
        graph = edges.graph
        with torch.no_grad():
            clean = plain.run(group.clean)
            for layer in range(LAYERS):
                for path, at in (("self_attn.o_proj", graph.heads_at(layer)), ("mlp", graph.mlp_at(layer))):
                    module = plain.at(layer, path)

                    def instead(_: Any, a: Any, y: Tensor, mean: bool = against == "mean_positional") -> Tensor:
                        return y.mean(dim=0, keepdim=True).expand_as(y) if mean else y * 0

                    handle = module.register_forward_hook(instead)
                    try:
                        patched = plain.run(group.clean)["logits"]
                    finally:
                        handle.remove()
                    fall = metric("logit_diff")(clean["logits"], group.answers, group.foils, None) - metric(
                        "logit_diff"
                    )(patched, group.answers, group.foils, None)
                    assert float(scores[at].sum()) == pytest.approx(float(fall.sum()), rel=2e-2, abs=2e-2)


# --- completeness of the ways


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2"])
def test_moved_activations_are_complete(name: str) -> None:
    """The scores of the input and of each MLP tend to the metric's real difference when just that is replaced."""
    engine, scored = Engine(make(name)), Scored.named("logit_diff")
    (batch,) = make_batches(bound(pairs(3, 6, 2)), 1000)
    from headwater.localize.engine.evaluate import CircuitRunner

    scorer = WriteScorer(engine, scored)
    errors = []
    for steps in (2, 24):
        scores = scorer.scores(batch, integration_nodes(steps, "gauss")).sum(dim=(1, 2))
        graph = scorer.graph
        masks = []
        for index in range(LAYERS):
            mask = graph.allowed.clone()
            mask[graph.mlp_at(index)] = False
            masks.append(mask)
        found = CircuitRunner(engine, scored).values(batch, masks)
        whole = scores[0] - (found.clean - found.corrupt).sum()
        mlps = [float(scores[graph.mlp_at(i)] - (found.clean - value).sum()) for i, value in enumerate(found.circuits)]
        errors.append([abs(float(whole)), *(abs(e) for e in mlps)])
    few, many = errors
    assert max(many) < 0.02
    assert sum(many) < sum(few)


@pytest.mark.parametrize("name", LAYOUTS)
def test_integrated_gradients_of_nodes_are_the_sums_of_edges(name: str) -> None:
    engine, scored = Engine(make(name)), Scored.named("logit_diff")
    batches = make_batches(bound(pairs(3, 6, 2, seed=1), pairs(2, 7, 4, seed=2)), 8)
    for nodes in ([(0.0, 0.5), (1.0, 0.5)], integration_nodes(3, "midpoint"), integration_nodes(2, "left")):
        edges, scorer = EdgeScorer(engine, scored), NodeScorer(engine, scored)
        total = torch.zeros(len(edges.graph.sources), dtype=torch.float64)
        for batch in batches:
            edges.add(batch, nodes)
            total += scorer.scores(batch, nodes).sum(dim=(1, 2))
        torch.testing.assert_close(total, edges.total.sum(dim=1), rtol=1e-9, atol=1e-9)


# --- the last block at the last position


@pytest.mark.parametrize("name", LAYOUTS)
def test_narrow_runs_give_the_same_scores(name: str) -> None:
    """Where the model allows it: all but MLPs that get their tokens in one row."""
    engine, scored = Engine(make(name)), Scored.named("logit_diff")
    assert can_narrow(engine) is (name not in ("opt", "mixtral"))
    (batch,) = make_batches(bound(pairs(3, 6, 2)), 1000)
    totals = []
    for narrow in (True, False):
        scorer = EdgeScorer(engine, scored)
        scorer.narrows = narrow and scorer.narrows
        scorer.add(batch, integration_nodes(2, "midpoint"))
        score_batch(scorer, batch, [(0.5, 1.0)], "all")
        totals.append(scorer.total)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=1e-8)
    seen = engine.run(batch.clean[:, batch.prefix :], _past(engine, batch), narrow=can_narrow(engine))
    assert seen.z[-1].shape[1] == (1 if can_narrow(engine) else 4)


def _past(engine: Engine, batch: Batch) -> Any:
    with engine.open():
        return engine.prefix_cache(batch)


# --- neurons


@pytest.mark.parametrize("against", ["counterfactual", "mean", "zero"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "opt", "granite"])
def test_neurons_equal_their_definition(name: str, against: Any) -> None:
    """Of plain and gated MLPs: (a neuron's value - its reference) times the metric's gradient there."""
    model, group = make(name), pairs(3, 6, 2)
    engine, scored = Engine(model), Scored.named("logit_diff")
    (batch,) = make_batches(bound(group), 1000, reuse_prefix=against == "counterfactual")
    fixed = None if against == "counterfactual" else fixed_values(engine, [batch], against, neurons=True)
    scorer = NodeScorer(engine, scored, fixed=fixed, neurons=True)
    scores = scorer.scores(batch).sum(dim=(1, 2))
    sites = [f"neurons.{layer}" for layer in range(LAYERS)]
    clean, corrupt = (model.run(ids, capture=sites) for ids in (group.clean, group.corrupt))
    zeros = [torch.zeros_like(clean[site]).requires_grad_(True) for site in sites]
    moved = [hw.add(site, zero) for site, zero in zip(sites, zeros, strict=True)]
    logits = model.run(group.clean, logits="last", grad=True, interventions=moved).logits
    found = torch.autograd.grad(metric("logit_diff")(logits, group.answers, group.foils, None).sum(), zeros)
    for layer, (site, g) in enumerate(zip(sites, found, strict=True)):
        ours = clean[site]
        theirs = {"counterfactual": corrupt[site], "mean": ours.mean(dim=(0, 1)), "zero": 0.0}[against]
        expected = ((ours - theirs) * g).sum(dim=(0, 1))
        near = 1e-6 if name == "gemma2" else 1e-9
        torch.testing.assert_close(scorer.neurons[layer], expected, rtol=0, atol=near * float(expected.abs().max()))
        if name == "llama":  # no bias, no norm behind: an MLP's neurons are the MLP
            mlp = scores[scorer.graph.mlp_at(layer)]
            assert float(scorer.neurons[layer].sum()) == pytest.approx(float(mlp), rel=1e-9)


# --- as users call them


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=24, seed=0)


@pytest.mark.parametrize("method", ["eap", "eap_ig", "eap_ig_activations", "eap_clean_corrupted"])
def test_edges_by_position_as_a_method(tiny_model: Any, ioi: Any, method: str, tmp_path: Path) -> None:
    run = hw.localize.methods.get(method)
    result = run(tiny_model, ioi, positions="named")
    names = result.facts["positions"]
    assert names[-1] == "other"
    assert "END" in names
    parts = result.tensors["position_scores"]
    assert parts.shape == (*result.scores.shape, len(names))
    torch.testing.assert_close(parts.sum(dim=2), result.scores, rtol=1e-9, atol=1e-12)
    table = result.tables["edge_positions"]
    assert table.columns == ["source", "target", "position", "score"]
    best = table.sort("score", descending=True).row(0, named=True)
    at = result.graph.source(best["source"]), result.graph.reader(best["target"]), names.index(best["position"])
    assert float(parts[at]) == best["score"]
    assert result.circuit(edges=40).n_edges <= 40
    back = hw.load_result(result.save(tmp_path / "r"), check=True)
    assert back.content_hash == result.content_hash
    assert result.chart() is not None


def test_references_as_a_method(tiny_model: Any, ioi: Any) -> None:
    for method in ("eap", "atp", "eap_ig_activations"):
        scores = {
            against: hw.localize.methods.get(method)(tiny_model, ioi, against=against)
            for against in ("counterfactual", "mean", "mean_positional", "zero")
        }
        hashes = {result.content_hash for result in scores.values()}
        assert len(hashes) == 4
        assert scores["mean"].facts["corrupt"] is None
        assert scores["counterfactual"].facts["corrupt"] is not None
    for method in ("eap_ig", "eap_clean_corrupted", "node_ig"):
        with pytest.raises(MethodError, match="counterfactual"):
            hw.localize.methods.get(method)(tiny_model, ioi, against="mean")
    with pytest.raises(MethodError, match="median"):
        hw.localize.atp(tiny_model, ioi, against="median")
    assert hw.localize.node_ig(tiny_model, ioi, against="mean", path="activations").facts["corrupt"] is None


def test_node_ig_and_neurons_as_a_method(tiny_model: Any, ioi: Any) -> None:
    left = hw.localize.node_ig(tiny_model, ioi, steps=3, rule="left")
    edges = hw.localize.eap_ig(tiny_model, ioi, steps=3, rule="left")
    torch.testing.assert_close(left.tensors["node_scores"], edges.scores.sum(dim=1), rtol=1e-4, atol=1e-5)
    for result in (hw.localize.atp(tiny_model, ioi, neurons=True), hw.localize.node_ig(tiny_model, ioi, neurons=True)):
        table, scores = result.tables["neurons"], result.tensors["neurons"]
        assert scores.shape == (3, 48)
        best = table.row(0, named=True)
        assert abs(best["score"]) == pytest.approx(float(scores.abs().max()))
        assert float(scores[best["layer"], best["neuron"]]) == best["score"]
    with pytest.raises(MethodError, match="neurons"):
        hw.localize.node_ig(tiny_model, ioi, neurons=True, path="activations")
    with pytest.raises(MethodError, match="path"):
        hw.localize.node_ig(tiny_model, ioi, path="weights")
    with pytest.raises(MethodError, match="scope"):
        hw.localize.eap_ig_activations(tiny_model, ioi, scope="some")


def test_experts_have_no_neurons() -> None:
    engine, scored = Engine(make("mixtral")), Scored.named("logit_diff")
    (batch,) = make_batches(bound(pairs(3, 6, 2)), 1000)
    with pytest.raises(ModelError, match="no neurons"):
        NodeScorer(engine, scored, neurons=True).scores(batch)


def test_clean_corrupted_is_the_mean_of_both_ends(tiny_model64: Any, ioi: Any) -> None:
    both = hw.localize.eap_clean_corrupted(tiny_model64, ioi).scores
    left = hw.localize.eap_ig(tiny_model64, ioi, steps=1, rule="left").scores
    right = hw.localize.eap(tiny_model64, ioi).scores
    torch.testing.assert_close(both, (left + right) / 2, rtol=1e-9, atol=1e-12)


def test_scores_against_nothing_are_kept_apart() -> None:
    assert Fixed().embed is None
    assert integration_nodes(4, "right") == [(0.25, 0.25), (0.5, 0.25), (0.75, 0.25), (1.0, 0.25)]


def test_plain_and_measured_scores_agree_on_kl() -> None:
    """A metric with a reference, through the moved activations' scorer: complete for the input."""
    model, group = make("llama"), pairs(3, 6, 2)
    engine, scored = Engine(model), Scored.named("kl", differentiable=True)
    (batch,) = make_batches(bound(group), 1000)
    scorer = EdgeScorer(engine, scored)
    nodes = [(1 / 3, 1.0)]
    scorer.add(batch, nodes)
    expected = plain_edge_scores(model, "llama", group, metric("kl"), nodes)
    for (source, reader), score in expected.items():
        at = scorer.graph.source(source), scorer.graph.reader(reader)
        if bool(scorer.graph.allowed[at]):
            assert float(scorer.total[at]) / len(group) == pytest.approx(float(score), rel=1e-6, abs=1e-9)

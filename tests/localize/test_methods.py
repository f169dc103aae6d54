"""The methods as users call them: what they must satisfy, what they refuse, what they keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.utils import logging

import headwater as hw
from headwater.core.errors import HeadwaterError, MethodError, ModelError
from headwater.core.model import Model
from headwater.localize.attribution.eap import integration_nodes
from headwater.localize.engine.edges import EdgeScorer
from headwater.localize.engine.evaluate import CircuitRunner
from headwater.localize.engine.norms import Norm, measure_norm
from headwater.localize.engine.passes import Engine, Scored, make_batches, shared_prefix
from headwater.localize.engine.wiring import graph_of
from localize_families import LAYOUTS, bound, make, pairs

logging.set_verbosity_error()


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=24, seed=0)


# --- exactness where theory promises it


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "neox"])
def test_integrated_gradients_are_complete(name: str) -> None:
    """The gradients averaged on the way, times the way, are the metric's difference, the better the more nodes."""
    engine, metric = Engine(make(name)), Scored.named("logit_diff")
    (batch,) = make_batches(bound(pairs(3, 6, 2)), 1000)
    errors: dict[tuple[str, int], float] = {}
    for rule, steps in (("left", 4), ("left", 64), ("midpoint", 64), ("gauss", 24)):
        scorer = EdgeScorer(engine, metric)
        scorer.add(batch, integration_nodes(steps, rule))  # type: ignore[arg-type]
        whole = (scorer.mean_clean - scorer.mean_corrupt) * 3
        errors[rule, steps] = abs(float(scorer.total[0].sum()) - whole) / abs(whole)
    assert errors["left", 64] < errors["left", 4]
    assert errors["midpoint", 64] < errors["left", 64]
    assert errors["gauss", 24] < 0.02


def linear_model() -> Model:
    """A GPT-2 that is linear in its stream: no norms, uniform attention whatever the queries, an MLP without a bend."""
    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, activation_function="linear",
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(config).double().eval()
    for block in hf.transformer.h:
        block.attn.c_attn.weight.data[:, :64] = 0
        block.attn.c_attn.bias.data[:64] = 0
        block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
    hf.transformer.ln_f = torch.nn.Identity()
    return Model(hf, None)


def test_a_block_that_the_graph_does_not_know_is_refused() -> None:
    """One module that serves as both norms of a block: its two calls cannot be told apart."""
    model = linear_model()
    for block in model.hf.transformer.h:
        block.ln_1 = block.ln_2
    twice = Model(model.hf, None)
    engine, metric = Engine(twice), Scored.named("logit_diff")
    with pytest.raises(ModelError, match="does not give the model's own logits"):
        CircuitRunner(engine, metric).check()
    CircuitRunner(Engine(linear_model()), metric).check()


def test_writes_that_do_not_add_up_are_refused() -> None:
    engine, metric = Engine(make("llama")), Scored.named("logit_diff")
    (batch,) = make_batches(bound(pairs(3, 6, 2)), 1000)
    scorer = EdgeScorer(engine, metric)
    scorer.out_weight(0).mul_(1.5)
    with pytest.raises(ModelError, match="not the sum"):
        scorer.add(batch, [(1.0, 1.0)])


def test_eap_is_exact_on_a_linear_model() -> None:
    """Every edge's score is what really happens when that edge alone carries its counterfactual value."""
    engine, metric = Engine(linear_model()), Scored.named("logit_diff")
    graph = engine.wiring.graph
    (batch,) = make_batches(bound(pairs(3, 6, 2)), 1000)
    scorer = EdgeScorer(engine, metric)
    scorer.add(batch, [(1.0, 1.0)])
    edges = graph.allowed.nonzero().tolist()
    masks = []
    for s, r in edges:
        mask = graph.allowed.clone()
        mask[s, r] = False
        masks.append(mask)
    found = CircuitRunner(engine, metric).values(batch, masks)
    true = torch.zeros_like(scorer.total)
    for (s, r), value in zip(edges, found.circuits, strict=True):
        true[s, r] = (found.clean - value).sum()
    assert float(true.abs().max()) > 0.1
    torch.testing.assert_close(scorer.total, true, rtol=1e-9, atol=1e-9)


def test_eap_points_the_way_of_real_edge_patching() -> None:
    """On a model with bends it is an estimate: the large edges agree in sign and rank with patching each edge."""
    engine, metric = Engine(make("llama")), Scored.named("logit_diff")
    graph = engine.wiring.graph
    group = pairs(3, 6, 2)
    # a counterfactual close to the prompt, where first order is a good order
    group.corrupt[:, 3:] = group.clean[:, 3:]
    (batch,) = make_batches(bound(group), 1000)
    scorer = EdgeScorer(engine, metric)
    scorer.add(batch, integration_nodes(8, "gauss"))
    masks = [graph.allowed.clone() for _ in range(graph.n_edges)]
    for mask, (s, r) in zip(masks, graph.allowed.nonzero().tolist(), strict=True):
        mask[s, r] = False
    found = CircuitRunner(engine, metric).values(batch, masks)
    true = torch.stack([(found.clean - value).sum() for value in found.circuits])
    estimate = scorer.total[graph.allowed]
    assert float(torch.corrcoef(torch.stack([true, estimate]))[0, 1]) > 0.7


# --- the public calls


@pytest.mark.parametrize("method", ["eap", "eap_ig", "atp"])
def test_a_method_by_name(tiny_model: Any, ioi: Any, method: str, tmp_path: Path) -> None:
    result = hw.localize.methods.get(method)(tiny_model, ioi)
    assert result.facts["n"] == ioi.train.n  # found on train, where there is a split
    assert result.facts["method"] == method
    again = hw.localize.methods.get(method)(tiny_model, ioi)
    assert again.content_hash == result.content_hash
    result.save(tmp_path / "r")
    back = hw.load_result(tmp_path / "r", check=True)
    assert back.content_hash == result.content_hash
    assert set(result.to_frame().columns) == {"node", "layer", "score"}
    if method == "atp":
        with pytest.raises(MethodError, match="scores nodes"):
            result.circuit(edges=3)
    else:
        assert back.graph == graph_of(tiny_model)
        assert back.circuit(edges=40).n_edges <= 40
        assert result.top(3).height == 3


def test_memory_and_prefix_do_not_change_scores(tiny_model64: Any, ioi: Any) -> None:
    whole = hw.localize.eap_ig(tiny_model64, ioi, steps=3, reuse_prefix=False)
    small = hw.localize.eap_ig(tiny_model64, ioi, steps=3, memory_mb=0.2)
    torch.testing.assert_close(whole.scores, small.scores, rtol=1e-5, atol=1e-6)  # RMSNorm computes in float32


def test_kl_needs_the_way_in_between(tiny_model: Any, ioi: Any) -> None:
    for method in (hw.localize.eap, hw.localize.atp):
        with pytest.raises(MethodError, match="KL is zero"):
            method(tiny_model, ioi, metric="kl")
    scores = hw.localize.eap_ig(tiny_model, ioi, metric="kl", steps=8, rule="midpoint")
    # KL falls to 0 on the clean run; turned around, the input's score speaks for the clean behavior
    assert scores.scores[0].sum() > 0
    assert scores.facts["clean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"rule": "centre"},
        {"step": 3},
        {"metric": "accuracy"},
        {"metric": "nosuch"},
        {"config": 1, "steps": 2},
    ],
)
def test_options_that_make_no_sense(tiny_model: Any, ioi: Any, options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        hw.localize.eap_ig(tiny_model, ioi, **options)
    with pytest.raises(MethodError, match="positions"):
        hw.localize.atp(tiny_model, ioi, positions="some")


def test_unknown_methods_are_named_with_the_known_ones() -> None:
    with pytest.raises(MethodError, match="eap_ig"):
        hw.localize.methods.get("eap_gi")
    assert {"atp", "eap", "eap_ig", "patch"} <= set(hw.localize.methods.names())


# --- circuits as users judge them


def test_judging_a_circuit(tiny_model: Any, ioi: Any, tmp_path: Path) -> None:
    scores = hw.localize.eap_ig(tiny_model, ioi, steps=3)
    circuit = scores.circuit(edges=60)
    faithful = circuit.faithfulness(ioi.test)
    assert faithful.facts["n"] == ioi.test.n
    assert faithful.interval[0] <= faithful.value <= faithful.interval[1]
    by_hand = (faithful.facts["circuit"] - faithful.facts["corrupt"]) / (
        faithful.facts["full"] - faithful.facts["corrupt"]
    )
    assert faithful.value == pytest.approx(by_hand)
    everything = hw.Circuit.build(circuit.graph, circuit.graph.allowed, model=tiny_model)
    assert everything.faithfulness(ioi.test).value == pytest.approx(1, abs=1e-3)
    assert everything.completeness(ioi.test).value == pytest.approx(0, abs=1e-3)
    outside = circuit.completeness(ioi.test)
    assert outside.value == pytest.approx(circuit.complement().faithfulness(ioi.test).value)
    back = hw.Circuit.load(circuit.save(tmp_path / "c")).bind(tiny_model)
    assert back.faithfulness(ioi.test).value == faithful.value
    again = hw.Circuit.from_json(_written(circuit, tmp_path), model=tiny_model)
    assert again.faithfulness(ioi.test).value == faithful.value


def _written(circuit: Any, folder: Path) -> Path:
    circuit.to_json(folder / "c.json")
    return folder / "c.json"


def test_minimality_is_the_drop_without_each_node(tiny_model: Any, ioi: Any) -> None:
    circuit = hw.localize.eap(tiny_model, ioi).circuit(edges=60)
    table = circuit.minimality(ioi.test).to_frame()
    assert set(table["node"]) == set(circuit.nodes) - {"input", "logits"}
    whole = circuit.faithfulness(ioi.test).value
    for row in table.head(3).iter_rows(named=True):
        without = circuit.without(row["node"]).faithfulness(ioi.test).value
        assert row["faithfulness"] == pytest.approx(without, abs=1e-4)
        assert row["drop"] == pytest.approx(whole - without, abs=1e-4)


def test_a_null_is_beaten_or_not(tiny_model: Any, ioi: Any) -> None:
    graph = graph_of(tiny_model)
    everything = hw.Circuit.build(graph, graph.allowed, model=tiny_model)
    null = everything.null(ioi.test, n=6, kinds=["edges"])
    assert null.to_frame()["value"].to_list() == pytest.approx([1.0] * 6, abs=1e-3)  # there is only one whole
    circuit = hw.localize.eap(tiny_model, ioi).circuit(edges=60)
    null = circuit.null(ioi.test, n=8)
    assert null.to_frame().group_by("kind").len()["len"].to_list() == [8, 8]
    closer = sum(abs(1 - v) <= abs(1 - null.facts["observed"]) for v in null.to_frame().filter(kind="heads")["value"])
    assert null.facts["p_heads"] == pytest.approx((1 + closer) / 9)
    assert null.p == max(null.facts["p_heads"], null.facts["p_edges"])
    assert null.facts["observed"] == pytest.approx(circuit.faithfulness(ioi.test).value, abs=1e-6)
    same = circuit.null(ioi.test, n=8)
    assert same.content_hash == null.content_hash
    with pytest.raises(MethodError, match="draws"):
        circuit.null(ioi.test, n=0)


def test_the_curve_and_its_areas(tiny_model: Any, ioi: Any) -> None:
    scores = hw.localize.eap(tiny_model, ioi)
    result = scores.curve(ioi.test, fractions=(0.1, 0.5, 1.0))
    f = result.to_frame()["faithfulness"].to_list()
    assert f[2] == pytest.approx(1, abs=1e-3)
    assert result.facts["cpr"] == pytest.approx(0.4 * (f[0] + f[1]) / 2 + 0.5 * (f[1] + f[2]) / 2)
    assert result.facts["cmd"] == pytest.approx(
        0.4 * (abs(1 - f[0]) + abs(1 - f[1])) / 2 + 0.5 * (abs(1 - f[1]) + abs(1 - f[2])) / 2
    )
    for fraction, value in zip((0.1, 0.5, 1.0), f, strict=True):
        assert scores.circuit(fraction=fraction).faithfulness(ioi.test).value == pytest.approx(value, abs=1e-4)
    assert result.facts["rank"] == "abs"
    assert scores.circuit(edges=30).curve(ioi.test, fractions=(0.5, 1.0)).facts["cpr"] > 0


def test_a_circuit_of_another_model_is_refused(tiny_model: Any, tiny_gpt2_model: Any) -> None:
    graph = graph_of(tiny_model)
    with pytest.raises(MethodError, match="another model"):
        hw.Circuit.build(graph, graph.allowed).bind(tiny_gpt2_model)


# --- models that have no such graph, and parts that are measured


def test_models_without_a_circuit_graph_are_refused_by_name() -> None:
    small = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    bert = Model(BertLMHeadModel(BertConfig(**small, is_decoder=True)).eval(), None)
    with pytest.raises(ModelError, match="post-norm"):
        graph_of(bert)
    t5 = T5Config(vocab_size=61, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="cross-attention"):
        graph_of(Model(T5ForConditionalGeneration(t5).eval(), None))


def test_the_users_model_is_left_as_it_was(tiny_llama: Any, tiny_model: Any, ioi: Any) -> None:
    tiny_llama.train()
    try:
        before = {name: weight.clone() for name, weight in tiny_llama.state_dict().items()}
        scores = hw.localize.eap(tiny_model, ioi)
        scores.circuit(edges=20).faithfulness(ioi.test)
        assert all(module.training for module in tiny_llama.modules())
    finally:
        tiny_llama.eval()
    assert all(weight.requires_grad for weight in tiny_llama.parameters())
    assert all(weight.grad is None for weight in tiny_llama.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in tiny_llama.state_dict().items())


def test_hooks_go_also_when_something_breaks(tiny_llama: Any, tiny_model: Any, ioi: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    graph_of(tiny_model)
    last = tiny_llama.model.layers[-1].mlp
    handle = last.register_forward_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            hw.localize.eap(tiny_model, ioi)
        with pytest.raises(RuntimeError, match="out of memory"):
            hw.localize.patch(tiny_model, ioi, sites="head.0.h0")
    finally:
        handle.remove()
    for module in tiny_llama.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert all(weight.requires_grad for weight in tiny_llama.parameters())


class SquareNorm(torch.nn.Module):
    """A norm of no known form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (1 + x.square().sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", ["rms", "layer", "module"])
def test_norms_are_measured_and_differentiated(kind: str) -> None:
    module = {"rms": torch.nn.RMSNorm(16, eps=1e-5), "layer": torch.nn.LayerNorm(16), "module": SquareNorm(16)}[kind]
    module = module.double()
    for weight in module.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.3)
    norm = measure_norm(module, 16)
    assert norm.kind == kind
    x, g = torch.randn(5, 16, dtype=torch.float64, requires_grad=True), torch.randn(5, 16, dtype=torch.float64)
    (expected,) = torch.autograd.grad(module(x), x, g)
    torch.testing.assert_close(norm.vjp(g, x.detach()), expected, rtol=1e-10, atol=1e-12)
    assert Norm(None).vjp(g, x) is g


@pytest.mark.parametrize("size", [1e-3, 1.0, 500.0])
def test_a_norm_is_known_whatever_the_size_of_its_weights(size: float) -> None:
    """Gemma-3-270M has norms with weights in the hundreds: float32's rounding of what they give is no other form."""
    rms, layer = torch.nn.RMSNorm(64, eps=1e-6), torch.nn.LayerNorm(64)
    for module in (rms, layer):
        module.weight.data.copy_(size * (torch.randn(64, generator=torch.Generator().manual_seed(1)) + 0.1))
    assert (measure_norm(rms, 64).kind, measure_norm(layer, 64).kind) == ("rms", "layer")
    assert not measure_norm(rms, 64).plus_one


def test_a_norm_of_unknown_form_gives_exact_scores() -> None:
    """The slow way (autograd through the module) and the folded one agree."""
    model = make("gpt2")
    metric = Scored.named("logit_diff")
    (batch,) = make_batches(bound(pairs(3, 6, 2)), 1000)
    folded = EdgeScorer(Engine(model), metric)
    slow = EdgeScorer(Engine(model), metric)
    from dataclasses import replace

    slow.layers = tuple(
        replace(layer, norm=replace(layer.norm, kind="module"), mlp_norm=replace(layer.mlp_norm, kind="module"))
        for layer in slow.layers
    )
    for scorer in (folded, slow):
        scorer.add(batch, [(0.0, 0.5), (1.0, 0.5)])
    torch.testing.assert_close(slow.total, folded.total, rtol=1e-9, atol=1e-12)


def test_half_precision_is_scored_in_float32(tiny_tokenizer: Any, ioi: Any) -> None:
    import tiny

    whole = hw.load(tiny.tiny_llama(), tokenizer=tiny_tokenizer)
    half = hw.load(tiny.tiny_llama(torch.bfloat16), tokenizer=tiny_tokenizer)
    a, b = hw.localize.eap(whole, ioi).scores, hw.localize.eap(half, ioi).scores
    assert float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) > 0.95


def test_shared_prefix() -> None:
    clean = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    corrupt = torch.tensor([[9, 2, 3], [1, 2, 4], [1, 2, 3]])
    assert shared_prefix(clean, corrupt).tolist() == [0, 2, 2]


def test_every_family_has_a_graph() -> None:
    for name, layout in LAYOUTS.items():
        graph = graph_of(make(name))
        assert graph.parallel is layout.parallel
        assert graph.n_kv_heads == layout.kv


def test_errors_leave_with_code_2() -> None:
    assert issubclass(MethodError, HeadwaterError)
    assert MethodError("x").exit_code == 2

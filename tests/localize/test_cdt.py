"""Contextual decomposition: by its definition on small models, exact where the model is linear, refused elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import headwater as hw
from headwater.core.errors import MethodError, ModelError
from headwater.core.interventions import replace
from headwater.core.model import Model
from headwater.localize.engine.passes import Engine
from headwater.localize.search.cdt import CdtConfig, build_hops, cdt
from headwater.localize.search.decomposition import Decomposition, Rules
from localize_families import LAYERS, LAYOUTS, VOCAB, H, K, Plain, make, pairs

Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def ioi() -> Any:
    return hw.behavior("ioi", n=12, seed=0)


def decomposed(model: Model, group: Any, **options: Any) -> Decomposition:
    engine = Engine(model)
    with engine.open():
        return Decomposition(Rules(engine, CdtConfig(**options)), group, None)


# --- the definition: both parts kept, one source at a time, and their sum compared with the model everywhere


def share(rel: Tensor, rest: Tensor, bias: Tensor) -> Pair:
    size = (rel.abs() + rest.abs()).clamp(min=1e-30)
    return rel + bias * rel.abs() / size, rest + bias * rest.abs() / size


def linear(pair: Pair, weight: Tensor, bias: Tensor | None) -> Pair:
    rel, rest = pair[0] @ weight.T, pair[1] @ weight.T
    return (rel, rest) if bias is None else share(rel, rest, bias)


def normed(pair: Pair, norm: Any) -> Pair:
    rel, rest = pair
    whole = rel + rest
    if hasattr(norm, "plus_one"):
        scale = norm.weight.detach() / (whole.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return rel * scale, rest * scale
    deviation = (whole.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    gain, bias = norm.weight.detach() / deviation, norm.bias.detach()
    size = (rel.abs() + rest.abs()).clamp(min=1e-30)
    return (
        (rel - rel.mean(-1, keepdim=True)) * gain + bias * rel.abs() / size,
        (rest - rest.mean(-1, keepdim=True)) * gain + bias * rest.abs() / size,
    )


def plain_cdt(model: Model, name: str, group: Any, source: str) -> tuple[dict[str, Tensor], Tensor]:
    """(|beta| share of every later node's output [B], beta of the logits [B, V] at the end), for baseline 0."""
    plain, layout = Plain(model, name), LAYOUTS[name]
    sites = ["resid_pre.*", "resid_mid.*", "resid_post.*", "mlp_out.*", "z.*", "pattern.*"]
    run = model.run(group.clean, capture=sites)
    relevant: dict[str, Tensor] = {}

    def holds(pair: Pair, site: str) -> None:
        torch.testing.assert_close(pair[0] + pair[1], run[site], rtol=0, atol=1e-5)

    def ratio(rel: Tensor, rest: Tensor) -> Tensor:
        over = tuple(range(1, rel.ndim))
        return rel.abs().sum(over) / (rel.abs().sum(over) + rest.abs().sum(over))

    zero = torch.zeros_like(run["resid_pre.0"])
    stream: Pair = (run["resid_pre.0"], zero) if source == "input" else (zero, run["resid_pre.0"])
    for layer in range(LAYERS):
        holds(stream, f"resid_pre.{layer}")
        read = normed(stream, plain.at(layer, layout.norm))
        weight, bias = plain.weight(layer, layout.out_proj)
        pattern, z = run[f"pattern.{layer}"], run[f"z.{layer}"]
        mixed_rel, mixed_rest = torch.zeros_like(z), torch.zeros_like(z)
        for head in range(H):
            rows = layout.rows("v", head // (H // layout.kv))
            matrix, constant = plain.weight(layer, layout.v)
            value = linear(read, matrix[rows], None if constant is None else constant[rows])
            mixed_rel[:, :, head], mixed_rest[:, :, head] = (pattern[:, head] @ part for part in value)
            relevant[f"a{layer}.h{head}"] = ratio(mixed_rel[:, :, head], mixed_rest[:, :, head])
        holds((mixed_rel, mixed_rest), f"z.{layer}")
        out = linear((mixed_rel.flatten(2), mixed_rest.flatten(2)), weight, bias)
        if source.startswith(f"a{layer}."):
            cut = slice(int(source.split("h")[1]) * K, (int(source.split("h")[1]) + 1) * K)
            write = z.flatten(2)[..., cut] @ weight[:, cut].T
            out = (out[0] + write, out[1] - write)
        stream = (stream[0] + out[0], stream[1] + out[1])
        holds(stream, f"resid_mid.{layer}")
        read = normed(stream, plain.at(layer, layout.mlp_norm))
        mlp = plain.at(layer, layout.mlp)
        if name == "gpt2":
            made = linear(read, mlp.c_fc.weight.detach().T, mlp.c_fc.bias.detach())
            rest = mlp.act(made[1])
            bent = (mlp.act(made[0] + made[1]) - rest, rest)
            added = linear(bent, mlp.c_proj.weight.detach().T, mlp.c_proj.bias.detach())
        else:
            gate, up = (linear(read, m.weight.detach(), None) for m in (mlp.gate_proj, mlp.up_proj))
            rest = mlp.act_fn(gate[1]) * up[1]
            bent = (mlp.act_fn(gate[0] + gate[1]) * (up[0] + up[1]) - rest, rest)
            added = linear(bent, mlp.down_proj.weight.detach(), None)
        holds(added, f"mlp_out.{layer}")
        relevant[f"m{layer}"] = ratio(*added)
        if source == f"m{layer}":
            added = (run[f"mlp_out.{layer}"], torch.zeros_like(added[1]))
        stream = (stream[0] + added[0], stream[1] + added[1])
        holds(stream, f"resid_post.{layer}")
    final = normed(stream, plain.final)
    unembed = model.hf.lm_head
    logits = linear(final, unembed.weight.detach(), None)
    torch.testing.assert_close((logits[0] + logits[1]), run.logits, rtol=0, atol=1e-5)
    return relevant, logits[0][:, -1]


def difference(logits: Tensor, group: Any) -> Tensor:
    out = []
    for row in range(len(group)):
        answers = [int(t) for t in group.answers[row] if t >= 0]
        foils = [int(t) for t in group.foils[row] if t >= 0]
        out.append(logits[row, answers].mean() - logits[row, foils].mean())
    return torch.stack(out)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_it_is_its_definition(name: str) -> None:
    model, group = make(name), pairs(2, 5, 2)
    found = decomposed(model, group, baseline="zero")
    graph = Engine(model).wiring.graph
    for at, source in enumerate(graph.sources):
        relevant, logits = plain_cdt(model, name, group, source)
        later = [s for s in range(at + 1, len(graph.sources)) if found.relevance[at, s] != 0]
        for target in later:
            expected = relevant[graph.sources[target]].sum()
            torch.testing.assert_close(found.relevance[at, target], expected, rtol=1e-5, atol=1e-6)
        beyond = {t for t in graph.sources[at + 1 :] if graph.layer_of(t) > graph.layer_of(source)}
        assert beyond <= {graph.sources[t] for t in later}
        torch.testing.assert_close(found.relevance[at, -1], difference(logits, group).sum(), rtol=1e-5, atol=1e-6)
    assert not bool(found.relevance[:, :-1].tril().any())  # nothing is relevant to itself or to what comes before


def linear_model(*, biased: bool) -> Model:
    """A GPT-2 linear in its stream: norms that only centre, uniform attention, MLPs without a bend."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, activation_function="linear",
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    hf: Any = GPT2LMHeadModel(config).double().eval()
    for block in hf.transformer.h:
        block.attn.c_attn.weight.data[:, :64] = 0
    for weight in hf.parameters():
        if weight.ndim == 1:
            weight.data = torch.randn_like(weight) * 0.3 if biased else torch.zeros_like(weight)
    for module in hf.modules():
        if isinstance(module, torch.nn.LayerNorm):  # it divides by what hardly depends on its input: it only centres
            module.eps, module.weight.data = 1e12, torch.full_like(module.weight, 1e6)
    for block in hf.transformer.h:
        block.attn.c_attn.bias.data[:64] = 0
    return Model(hf, None)


@pytest.mark.parametrize(("biased", "biases"), [(False, "shared"), (False, "rest"), (True, "rest")])
def test_in_a_linear_model_relevance_is_the_whole_effect(biased: bool, biases: Any) -> None:
    """Directly and through all that follows: what the logits lose when a node takes its counterfactual value."""
    model, group = linear_model(biased=biased), pairs(3, 6, 2)
    found = decomposed(model, group, baseline="counterfactual", biases=biases)
    graph = Engine(model).wiring.graph
    clean = difference(model.run(group.clean).logits[:, -1], group)
    torch.testing.assert_close(found.whole, clean, rtol=1e-6, atol=1e-6)
    for at, source in enumerate(graph.sources):
        layer = graph.layer_of(source)
        site = "resid_pre.0" if source == "input" else f"mlp_out.{layer}" if source[0] == "m" else f"z.{layer}"
        site += f".h{source.split('h')[1]}" if source[0] == "a" else ""
        theirs = model.run(group.corrupt, capture=[site], logits="none")
        patched = model.run(group.clean, interventions=[replace(site, theirs[site])]).logits[:, -1]
        effect = (clean - difference(patched, group)).sum()
        torch.testing.assert_close(found.relevance[at, -1], effect, rtol=1e-5, atol=1e-5)
    # what reads the stream directly: the direct effects of all sources are the whole difference of the two runs
    corrupt = difference(model.run(group.corrupt).logits[:, -1], group)
    torch.testing.assert_close(found.shares[:, -1].sum(), (clean - corrupt).sum(), rtol=1e-6, atol=1e-6)


FAMILIES = [name for name in LAYOUTS if name not in ("opt", "mixtral")]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_sources_directly_are_the_logits(name: str) -> None:
    """With baseline 0 and no biases among the sources, their direct parts add up to what the model says."""
    model, group = make(name), pairs(2, 5, 2)
    for path, weight in model.hf.named_parameters():
        if path.endswith("bias"):
            weight.data.zero_()
    found = decomposed(model, group, baseline="zero")
    torch.testing.assert_close(found.shares[:, -1].sum(), found.whole.sum(), rtol=1e-6, atol=1e-6)
    relevance = found.relevance[:, :-1] / len(group)
    assert bool(((relevance >= 0) & (relevance <= 1 + 1e-9)).all())
    graph = Engine(model).wiring.graph
    # the first heads read nothing but the input
    torch.testing.assert_close(relevance[0, graph.heads_at(0)], torch.ones(H, dtype=torch.float64))


def test_merging_signs_keeps_the_sum() -> None:
    model, group = make("llama"), pairs(2, 5, 2)
    rules = Rules(Engine(model), CdtConfig(merge_signs=True))
    beta, whole = torch.tensor([[2.0, -3.0, 1.0, -1.0]]), torch.tensor([1.0, 1.0, 3.0, -3.0])
    assert rules.merged(beta, whole).tolist() == [[1.0, 0.0, 1.0, -1.0]]
    plain, merged = (decomposed(model, group, baseline="zero", merge_signs=m).relevance for m in (False, True))
    assert bool(torch.isfinite(merged).all()) and not torch.equal(plain, merged)


def test_mlp_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, group = make("gpt2"), pairs(2, 5, 2)
    whole = decomposed(model, group, baseline="zero").relevance
    monkeypatch.setattr("headwater.localize.search.decomposition._AT_ONCE", 1500)
    torch.testing.assert_close(decomposed(model, group, baseline="zero").relevance, whole)


def test_hops_go_backwards_from_the_logits() -> None:
    relevance = torch.zeros(4, 5, dtype=torch.float64)
    relevance[:, -1] = torch.tensor([0.1, 0.0, -2.0, 1.0], dtype=torch.float64)
    relevance[0, 1:4] = 0.5
    relevance[1, 2:4] = torch.tensor([0.9, 0.2], dtype=torch.float64)
    relevance[2, 3] = 0.3
    names = ("input", "a0.h0", "m0", "a1.h0")
    hops = build_hops(names, relevance, CdtConfig(keep=2))
    assert hops.rows() == [
        (0, "m0", "logits", -2.0),
        (0, "a1.h0", "logits", 1.0),
        (1, "a0.h0", "m0", 0.9),
        (1, "input", "m0", 0.5),
        (2, "input", "a0.h0", 0.5),
    ]
    assert build_hops(names, relevance, CdtConfig(threshold=0.8, hops=1)).height == 1


def test_as_users_call_it(tiny_model: Any, ioi: Any, tmp_path: Path) -> None:
    result: Any = hw.localize.methods.get("cdt")(tiny_model, ioi)
    assert result.facts["n"] == ioi.train.n
    assert result.facts["passes"]["backward"] == 0.0
    # mean and prompt forwards, the input's way, and 4 heads and 1 MLP a layer through the layers above
    assert result.facts["passes"]["forward"] == pytest.approx(ioi.train.n * (3 + (4 * (2.5 + 1.5 + 0.5) + 3) / 3))
    built = result.built()
    assert set(built.nodes) <= {*result.tables["hops"]["source"], "input", "logits"}
    assert 0 < built.n_edges < result.graph.n_edges
    assert built.faithfulness(ioi.test[:3]).facts["n"] == 3
    assert result.circuit(edges=40).n_edges > 0
    result.save(tmp_path / "r")
    back: Any = hw.load_result(tmp_path / "r", check=True)
    assert back.content_hash == cdt(tiny_model, ioi).content_hash
    small: Any = cdt(tiny_model, ioi, memory_mb=0.01)
    torch.testing.assert_close(small.tensors["relevance"], result.tensors["relevance"], rtol=1e-3, atol=1e-5)
    assert back.chart().to_dict()


@pytest.mark.parametrize(("name", "why"), [("mixtral", "mixture of experts"), ("opt", "not one module")])
def test_what_cannot_be_decomposed_is_refused_by_name(name: str, why: str) -> None:
    with pytest.raises(ModelError, match=why) as error:
        Rules(Engine(make(name)), CdtConfig())
    assert "ForCausalLM cannot be decomposed" in str(error.value)


def test_options_that_do_not_fit_are_refused(tiny_model: Any, ioi: Any) -> None:
    with pytest.raises(MethodError, match="baseline: Input should be"):
        cdt(tiny_model, ioi, baseline="means")
    with pytest.raises(MethodError, match="logit_diff"):
        cdt(tiny_model, ioi, metric="kl")
    with pytest.raises(MethodError, match="threshold between 0 and 1"):
        CdtConfig(threshold=2.0)

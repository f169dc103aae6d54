"""The same scores, patches and circuits as independent libraries give, where they are installed (`make bench` does)."""

import importlib
import sys
import types
import warnings
from typing import Any

import pytest
import torch
import transformers

import headwater as hw
from headwater.core.model import Model
from headwater.localize.judging.faithfulness import evaluate_masks
from tiny import word_tokenizer

LAYERS, HEADS, D, VOCAB, LENGTH = 2, 4, 32, 61, 7

pytestmark = pytest.mark.filterwarnings("ignore")


def peer(name: str) -> Any:
    """The module, or a skipped test. Warnings of its own are not ours to mend."""
    warnings.simplefilter("ignore")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not to be had here: {error}")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=HEADS, n_positions=64, initializer_range=0.2
    )
    return Model(transformers.GPT2LMHeadModel(config).eval(), word_tokenizer(VOCAB))


@pytest.fixture(scope="module")
def pairs() -> hw.Behavior:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(6):
        ids = (torch.randperm(VOCAB - 1, generator=generator) + 1)[: LENGTH + 3].tolist()
        corrupt = [*ids[:3], ids[LENGTH], *ids[4:LENGTH]]
        words = [" ".join(f"w{i}" for i in row) for row in (ids[:LENGTH], corrupt)]
        rows.append({
            "id": str(number), "prompt": words[0], "counterfactual": words[1],
            "answers": [f" w{ids[-2]}"], "foils": [f" w{ids[-1]}"], "split": "train",
        })  # fmt: skip
    return hw.Behavior.from_rows(rows, name="pairs")


def hooked(model: Model, **more: Any) -> Any:
    lens = peer("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS, d_model=D, n_heads=HEADS, d_head=D // HEADS, d_mlp=4 * D, n_ctx=64, d_vocab=VOCAB,
        act_fn="gelu_new", normalization_type="LN", eps=1e-5, **more,
    )  # fmt: skip
    theirs = lens.HookedTransformer(config)
    convert = importlib.import_module("transformer_lens.pretrained.weight_conversions").convert_gpt2_weights
    theirs.load_state_dict({k: v.clone() for k, v in convert(model.hf, config).items()}, strict=False)
    return theirs.eval()


def difference(logits: torch.Tensor, group: Any) -> torch.Tensor:
    last = logits[:, -1]
    return (last.gather(1, group.answers) - last.gather(1, group.foils)).sum(dim=1)


def test_head_patching_is_transformer_lens_own(model: Model, pairs: hw.Behavior) -> None:
    patching = peer("transformer_lens.patching")
    theirs, group = hooked(model), pairs.bind(model).groups[0]
    with torch.no_grad():
        logits, cache = theirs.run_with_cache(group.clean)
        clean, corrupt = difference(logits, group).mean(), difference(theirs(group.corrupt), group).mean()
        wanted = patching.get_act_patch_attn_head_out_all_pos(
            theirs, group.corrupt, cache, lambda x: (difference(x, group).mean() - corrupt) / (clean - corrupt)
        )
    found = hw.localize.patch(model, pairs, sites="head").tables["effects"].sort("layer", "head")["effect"].to_torch()
    assert float((found.view(LAYERS, HEADS) - wanted).abs().max()) < 1e-4
    assert float(wanted.abs().max()) > 1e-2


def auto_circuit(module: str) -> Any:
    """A module of auto-circuit, which names the key/value cache (unused here) as transformer-lens 2 did."""
    lens = peer("transformer_lens")
    old = types.ModuleType("transformer_lens.past_key_value_caching")
    old.HookedTransformerKeyValueCache = lens.HookedTransformerKeyValueCache = lens.TransformerLensKeyValueCache  # type: ignore[attr-defined]
    sys.modules.setdefault(old.__name__, old)
    return peer(f"auto_circuit.{module}")


def auto_circuit_of(model: Model, group: Any) -> tuple[Any, Any]:
    """(their patchable model, their data loader)."""
    graph_utils, data = auto_circuit("utils.graph_utils"), auto_circuit("data")
    theirs = hooked(
        model, use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True, use_attn_in=True, device="cpu"
    )
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)
    patchable = graph_utils.patchable_model(
        theirs, factorized=True, slice_output="last_seq", separate_qkv=True, device=torch.device("cpu")
    )
    rows = [
        data.PromptPair(clean, corrupt, answer, foil)
        for clean, corrupt, answer, foil in zip(group.clean, group.corrupt, group.answers, group.foils, strict=True)
    ]
    loader = data.PromptDataLoader(rows, seq_len=LENGTH, diverge_idx=0, batch_size=len(rows), shuffle=False)
    return patchable, loader


def our_name(edge: Any) -> str:
    """`A0.1->A1.2.Q` as the graph here writes it."""

    def one(name: str) -> str:
        if name.startswith("Resid"):
            return "input" if name.endswith("Start") else "logits"
        if name.startswith("MLP"):
            return f"m{name.split()[1]}"
        layer, head, *part = name[1:].split(".")
        return f"a{layer}.h{head}" + (f"<{part[0].lower()}>" if part else "")

    return f"{one(edge.src.name)}->{one(edge.dest.name)}"


def test_eap_is_auto_circuits_mask_gradient(model: Model, pairs: hw.Behavior) -> None:
    group = pairs.bind(model).groups[0]
    algos = auto_circuit("prune_algos.mask_gradient")
    patchable, loader = auto_circuit_of(model, group)
    wanted = algos.mask_gradient_prune_scores(
        patchable, loader, None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
    )
    found = hw.localize.eap(model, pairs)
    graph = found.graph
    edges = {our_name(edge): float(edge.prune_score(wanted)) for edge in patchable.edges}
    assert set(edges) == {f"{s}->{r}" for s, r in graph.edge_names(graph.allowed)}
    gaps = [abs(score - float(found.scores[graph.edge(name)])) for name, score in edges.items()]
    assert max(gaps) < 1e-5
    assert max(map(abs, edges.values())) > 1e-2


def test_a_circuit_runs_as_auto_circuit_runs_it(model: Model, pairs: hw.Behavior) -> None:
    group = pairs.bind(model).groups[0]
    prune, kinds = auto_circuit("prune"), auto_circuit("types")
    patchable, loader = auto_circuit_of(model, group)
    scores = hw.localize.eap(model, pairs)
    circuit = scores.circuit(edges=60, pruned=False)
    graph = circuit.graph
    ranking = {name: torch.zeros_like(module.patch_mask) for name, module in _wrappers(patchable)}
    for edge in patchable.edges:
        if bool(circuit.mask[graph.edge(our_name(edge))]):
            ranking[edge.dest.module_name][edge.patch_idx] = 1.0
    outs = prune.run_circuits(
        patchable, loader, [circuit.n_edges], ranking,
        patch_type=kinds.PatchType.TREE_PATCH, ablation_type=kinds.AblationType.RESAMPLE, reverse_clean_corrupt=False,
    )  # fmt: skip
    logits = next(iter(outs[circuit.n_edges].values()))
    wanted = (logits.gather(1, group.answers) - logits.gather(1, group.foils)).sum(dim=1)
    found = evaluate_masks(model, pairs, [circuit.mask], metric="logit_diff").circuits[0]
    assert float((found - wanted.detach()).abs().max()) < 1e-4


def _wrappers(patchable: Any) -> list[tuple[str, Any]]:
    return [(wrapper.module_name, wrapper) for wrapper in patchable.dest_wrappers]

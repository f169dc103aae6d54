"""InterpBench's published models (Gupta et al., 2024): their folders, read without running anything in them.

A folder holds `ll_model.pth` (a HookedTransformer's state dict), its config, `meta.json` and the circuit's edges.
Weights are read with `weights_only`, edges from `edges.json` or as plain values out of `edges.pkl`, the config from
`ll_model_cfg.json` (a pickled config is an object of TransformerLens and is read only where it is a plain dict).
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from headwater.bench.mechanism import TrueMechanism
from headwater.bench.siit.plain_pickle import read_plain
from headwater.core.errors import ModelError, StoreError
from headwater.core.results import Provenance
from headwater.localize.circuit import Circuit
from headwater.localize.graph import Graph

if TYPE_CHECKING:
    from headwater.core.model import Model

_WROTE = re.compile(r"blocks\.(\d+)\.(?:attn\.hook_(?:result|z)\[(\d+)\]|(hook_mlp_out))$")
_READ = re.compile(r"blocks\.(\d+)\.(?:hook_([qkv])_input\[(\d+)\]|(hook_mlp_in))$")
_WITHIN = re.compile(r"blocks\.(\d+)\.attn\.hook_([qkv])\[(\d+)\]$")
_END = re.compile(r"blocks\.(\d+)\.hook_resid_post$|ln_final\..*|unembed.*|hook_unembed|logits$")
_START = {"hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre", "input"}
_ACTS = {"gelu": "gelu", "gelu_new": "gelu_new", "gelu_fast": "gelu_fast", "relu": "relu", "silu": "silu"}


@dataclass(frozen=True, kw_only=True, eq=False)
class InterpBenchModel:
    """A published model. circuit: its edges as published; mechanism: the same at the granularity of heads, for scoring
    (only nodes were trained to be right, so an edge into a head counts for its query, key and value). meta:
    `meta.json`.
    """

    model: "Model"
    circuit: Circuit
    mechanism: TrueMechanism
    meta: dict[str, Any]


def load_interpbench(
    folder: str | Path, *, tokenizer: Any = None, config: Mapping[str, Any] | None = None
) -> InterpBenchModel:
    """Read a folder of InterpBench.

    config: the HookedTransformerConfig as a dict, where the folder has it only as a pickled object; InterpBench's own
    `benchmark_metadata.json` has it as `transformer_cfg`. tokenizer: as for `headwater.load` (GPT-2's for `ioi`).
    Raises StoreError for a file that is missing, damaged or holds code; ModelError for an architecture that
    HookedTransformer has and this reader has not.
    """
    from headwater.core.loading import load as load_model

    path = Path(folder)
    if not path.is_dir():
        raise StoreError(f"no folder {path}", wanted="a model folder of InterpBench")
    settings = dict(config) if config is not None else _read_config(path)
    weights = _only(path, "ll_model*.pth")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own types for a file that holds more than weights
        raise StoreError(
            f"{weights.name} is no file of weights alone", got=f"{type(error).__name__}: {error}"
        ) from error
    hf = to_transformers(state, settings)
    model = load_model(hf, tokenizer=tokenizer)
    graph = Graph(n_layers=model.n_layers, n_heads=model.n_heads, n_kv_heads=model.n_kv_heads, d_model=model.d_model)
    circuit = circuit_of(_read_edges(path), graph, name=path.name)
    metas = sorted(path.glob("meta*.json"))
    meta = _json(metas[0]) if metas else {}
    return InterpBenchModel(
        model=model,
        circuit=circuit,
        mechanism=_mechanism(circuit, path.name),
        meta=meta if isinstance(meta, dict) else {},
    )


def to_transformers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Any:
    """A HookedTransformer's state dict and config as a transformers model with the same logits."""
    from headwater.bench.siit.hooked import HookedConfig, HookedForCausalLM

    def wanted(name: str, options: Iterable[Any], default: Any) -> Any:
        value = config.get(name, default)
        if value not in set(options):
            raise ModelError(
                f"this HookedTransformer has a {name} that is not read", got=repr(value), wanted=list(options)
            )
        return value

    wanted("positional_embedding_type", ("standard",), "standard")
    for name in ("attn_only", "parallel_attn_mlp", "use_local_attn", "scale_attn_by_inverse_layer_idx", "gated_mlp"):
        wanted(name, (False, None), False)
    norm = wanted("normalization_type", ("LN", "LNPre", None), "LN")
    try:
        layers, heads, width = int(config["n_layers"]), int(config["n_heads"]), int(config["d_model"])
        d_head = int(config["d_head"])
        scale = float(config.get("attn_scale") or -1.0)
        scale = scale if scale > 0 else d_head**0.5
        made = HookedConfig(
            vocab_size=int(config["d_vocab"]),
            answer_size=int(config.get("d_vocab_out") or config["d_vocab"]),
            hidden_size=width,
            intermediate_size=int(config.get("d_mlp") or 4 * width),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            head_dim=d_head,
            max_position_embeddings=int(config["n_ctx"]),
            hidden_act=_ACTS[wanted("act_fn", _ACTS, "gelu")],
            norm=norm is not None,
            layer_norm_eps=float(config.get("eps") or 1e-5),
            attention_scale=1 / scale if config.get("use_attn_scale", True) else 1.0,
            is_causal=wanted("attention_dir", ("causal", "bidirectional"), "causal") == "causal",
        )
        hf = HookedForCausalLM(made)
        hf.load_state_dict(_converted(state, layers, heads * d_head, norm, width), strict=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            "these weights and this config do not make a HookedTransformer", got=f"{type(error).__name__}: {error}"
        ) from error
    return hf.eval()


def _converted(state: Mapping[str, Tensor], layers: int, inner: int, norm: str | None, width: int) -> dict[str, Tensor]:
    found = {
        "embed_tokens.weight": state["embed.W_E"],
        "embed_positions.weight": state["pos_embed.W_pos"],
        "lm_head.weight": state["unembed.W_U"].T,
        "lm_head.bias": state["unembed.b_U"],
    }

    def put_norm(here: str, there: str) -> None:
        if norm is not None:
            found[f"{here}.weight"] = state[f"{there}.w"] if norm == "LN" else torch.ones(width)
            found[f"{here}.bias"] = state[f"{there}.b"] if norm == "LN" else torch.zeros(width)

    put_norm("final_norm", "ln_final")
    for i in range(layers):
        here, there = f"layers.{i}", f"blocks.{i}"
        put_norm(f"{here}.input_layernorm", f"{there}.ln1")
        put_norm(f"{here}.post_attention_layernorm", f"{there}.ln2")
        for letter in "QKV":
            weight = state[f"{there}.attn.W_{letter}"]  # [H, D, K]
            found[f"{here}.self_attn.{letter.lower()}_proj.weight"] = weight.transpose(1, 2).reshape(inner, width)
            found[f"{here}.self_attn.{letter.lower()}_proj.bias"] = state[f"{there}.attn.b_{letter}"].reshape(inner)
        found[f"{here}.self_attn.o_proj.weight"] = state[f"{there}.attn.W_O"].reshape(inner, width).T
        found[f"{here}.self_attn.o_proj.bias"] = state[f"{there}.attn.b_O"]
        found[f"{here}.mlp.up_proj.weight"] = state[f"{there}.mlp.W_in"].T
        found[f"{here}.mlp.up_proj.bias"] = state[f"{there}.mlp.b_in"]
        found[f"{here}.mlp.down_proj.weight"] = state[f"{there}.mlp.W_out"].T
        found[f"{here}.mlp.down_proj.bias"] = state[f"{there}.mlp.b_out"]
    return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}


# --- the circuit


def circuit_of(edges: Iterable[tuple[str, str]], graph: Graph, *, name: str = "interpbench") -> Circuit:
    """The circuit from edges in hook names (`blocks.0.attn.hook_result[1]` to `blocks.1.hook_q_input[2]`).

    Edges within one node (from its input to its output) say nothing here and are left out. Raises StoreError for a name
    of no known form.
    """
    mask = torch.zeros_like(graph.allowed)
    for source, target in edges:
        start, end = _source(source), _targets(target, graph)
        if start is None or end is None:
            continue
        for reader in end:
            mask[graph.edge(f"{start}->{reader}")] = True
    return Circuit.build(graph, mask, method=f"InterpBench: {name}")


def _source(name: str) -> str | None:
    """The node that writes here; None for a place within a node."""
    if name in _START:
        return "input"
    match = _WROTE.match(name)
    if match:
        return f"a{match[1]}.h{match[2]}" if match[2] is not None else f"m{match[1]}"
    if _READ.match(name) or _WITHIN.match(name):
        return None
    raise _unknown(name)


def _targets(name: str, graph: Graph) -> list[str] | None:
    match = _READ.match(name)
    if match:
        return [f"a{match[1]}.h{match[3]}<{match[2]}>"] if match[2] else [f"m{match[1]}"]
    if _END.match(name):
        layer = re.match(r"blocks\.(\d+)", name)
        if layer is not None and int(layer[1]) != graph.n_layers - 1:
            raise _unknown(name)
        return ["logits"]
    if _WROTE.match(name) or _WITHIN.match(name):
        return None
    raise _unknown(name)


def _unknown(name: str) -> StoreError:
    return StoreError(
        "an edge of this circuit ends at a place that is not known",
        got=repr(name)[:100],
        wanted="hook names such as blocks.0.attn.hook_result[1] or blocks.1.hook_mlp_in",
    )


def _mechanism(circuit: Circuit, name: str) -> TrueMechanism:
    graph, mask = circuit.graph, circuit.mask
    owner = [reader.split("<")[0] for reader in graph.readers]
    whole = torch.zeros_like(mask)
    for source, reader in mask.nonzero().tolist():
        whole[source, [index for index, node in enumerate(owner) if node == owner[reader]]] = True
    whole &= graph.allowed
    edges = [(source, reader.split("<")[0], "", True) for source, reader in graph.edge_names(whole)]
    live = mask.any(dim=1)
    nodes = [
        {"node": node, "role": "task" if yes else "spare", "variables": [], "live": yes}
        for node, yes in zip(graph.sources, live.tolist(), strict=True)
    ]
    node_schema = {"node": pl.String, "role": pl.String, "variables": pl.List(pl.String), "live": pl.Boolean}
    edge_schema = {"source": pl.String, "target": pl.String, "variable": pl.String, "live": pl.Boolean}
    return TrueMechanism(
        tables={
            "edges": pl.DataFrame(edges, schema=edge_schema, orient="row").unique(maintain_order=True),
            "nodes": pl.DataFrame(nodes, schema=node_schema),
        },
        tensors={"mask": whole, "directions": torch.zeros(0, graph.d_model)},
        facts={"program": f"interpbench-{name}", "graph": graph.to_dict(), "granularity": "head"},
        provenance=Provenance.collect(),
    )


# --- files


def _only(path: Path, pattern: str) -> Path:
    found = sorted(path.glob(pattern))
    if len(found) != 1:
        raise StoreError(f"{path} should hold one {pattern}", got=f"{len(found)} of them")
    return found[0]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{file.name} is no JSON file", got=str(error)) from error


def _read_config(path: Path) -> dict[str, Any]:
    for pattern in ("ll_model_cfg*.json", "ll_config*.json"):
        for file in sorted(path.glob(pattern)):
            found = _json(file)
            found = found.get("transformer_cfg", found) if isinstance(found, dict) else found
            if isinstance(found, dict):
                return found
    file = _only(path, "ll_model_cfg*.pkl")
    try:
        found = read_plain(file.read_bytes(), what=file.name)
    except StoreError as error:
        raise StoreError(
            f"{file.name} is a pickled object, and headwater runs no code of files",
            got=error.got,
            fix="Pass config= (InterpBench's benchmark_metadata.json has it as transformer_cfg), or ll_model_cfg.json",
        ) from error
    if not isinstance(found, dict):
        raise StoreError(f"{file.name} holds no config", got=type(found).__name__, wanted="a dict")
    return found


def _read_edges(path: Path) -> list[tuple[str, str]]:
    file = path / "edges.json"
    found = _json(file) if file.is_file() else read_plain(_only(path, "edges*.pkl").read_bytes(), what="edges.pkl")
    pairs = list(found) if isinstance(found, list | tuple) else []
    if not pairs or any(
        not isinstance(one, list | tuple) or len(one) != 2 or not all(isinstance(name, str) for name in one)
        for one in pairs
    ):
        raise StoreError("the edges of this circuit are no pairs of texts", got=str(found)[:80])
    return [(one[0], one[1]) for one in pairs]

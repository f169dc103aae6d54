"""Tiny random models of several families in true float64, and plain, slow definitions that the engines are compared to.

The definitions know each family's layout by hand and share nothing with the library's measured wiring.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers import models as tm

from headwater.behavior.bind import Group
from headwater.core.model import Model

H, KV, K, D, LAYERS, VOCAB = 4, 2, 8, 32, 2, 61


class ExactRMSNorm(nn.Module):
    """RMSNorm in its input's dtype: transformers' own computes in float32, which would hide errors below 1e-7."""

    def __init__(self, weight: Tensor, eps: float, plus_one: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.plus_one = nn.Parameter(weight.detach().clone()), eps, plus_one

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * (self.weight + 1 if self.plus_one else self.weight)


class ExactLayerNorm(nn.Module):
    """OLMo's LayerNorm without weights, in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)


def _config(name: str) -> Any:
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    grouped = {**base, "num_key_value_heads": KV}
    sized = {**grouped, "head_dim": K}
    gemma = {**sized, "query_pre_attn_scalar": K, "sliding_window": 4096}
    gpt = {"n_embd": D, "n_layer": LAYERS, "n_head": H, "n_positions": 64}
    opt = {"ffn_dim": 48, "word_embed_proj_dim": D, "init_std": 0.2, "max_position_embeddings": 64}
    granite = {
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    }
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "llama": lambda: tm.llama.LlamaConfig(**grouped),
        "gpt2": lambda: tm.gpt2.GPT2Config(**base, **gpt),
        "neox": lambda: tm.gpt_neox.GPTNeoXConfig(**base, max_position_embeddings=64),
        "gptj": lambda: tm.gptj.GPTJConfig(**base, **gpt, rotary_dim=4),
        "phi": lambda: tm.phi.PhiConfig(**base),
        "phi3": lambda: tm.phi3.Phi3Config(**grouped),
        "qwen2": lambda: tm.qwen2.Qwen2Config(**grouped),
        "qwen3": lambda: tm.qwen3.Qwen3Config(**sized),
        "gemma2": lambda: tm.gemma2.Gemma2Config(**gemma),
        "gemma3": lambda: tm.gemma3.Gemma3TextConfig(**gemma),
        "olmo": lambda: tm.olmo.OlmoConfig(**base),
        "olmo2": lambda: tm.olmo2.Olmo2Config(**grouped),
        "opt": lambda: tm.opt.OPTConfig(**base, **opt),
        "granite": lambda: tm.granite.GraniteConfig(**grouped, **granite),
        "stablelm": lambda: tm.stablelm.StableLmConfig(**grouped),
        "mixtral": lambda: tm.mixtral.MixtralConfig(**grouped, **moe),
        "bert": lambda: tm.bert.BertConfig(**base, is_decoder=True),
    }[name]()


# what the plain definitions know of each family: (norm before attention, projections, rows, norm before the MLP, ...)
PRE = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Layout:
    """Where a family keeps things, by hand. Paths are relative to a block."""

    blocks: str = "model.layers"
    attention: str = "self_attn"
    norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    out_proj: str = "self_attn.o_proj"
    post_norm: str | None = None
    mlp_write: str = "mlp"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    fused: str = ""
    final: str = "model.norm"
    parallel: bool = False
    kv: int = KV
    scale: float = 1.0

    def rows(self, part: str, head: int) -> Tensor:
        """Output rows of that part's projection which are this head's."""
        own = torch.arange(K)
        if self.fused == "interleaved":  # NeoX: q, k, v of head 0, q, k, v of head 1, ...
            return (3 * head + "qkv".index(part)) * K + own
        if self.fused == "stacked":  # all queries, all keys, all values
            return {"q": 0, "k": H * K, "v": (H + self.kv) * K}[part] + head * K + own
        return head * K + own


GEMMA = {
    "mlp_norm": "pre_feedforward_layernorm",
    "post_norm": "post_attention_layernorm",
    "mlp_write": "post_feedforward_layernorm",
}
LAYOUTS = {
    "llama": Layout(),
    "gpt2": Layout(
        blocks="transformer.h",
        attention="attn",
        norm="ln_1",
        mlp_norm="ln_2",
        out_proj="attn.c_proj",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        fused="stacked",
        final="transformer.ln_f",
        kv=H,
    ),
    "neox": Layout(
        blocks="gpt_neox.layers",
        attention="attention",
        out_proj="attention.dense",
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        fused="interleaved",
        final="gpt_neox.final_layer_norm",
        parallel=True,
        kv=H,
    ),
    "gptj": Layout(
        blocks="transformer.h",
        attention="attn",
        norm="ln_1",
        mlp_norm="ln_1",
        out_proj="attn.out_proj",
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        final="transformer.ln_f",
        parallel=True,
        kv=H,
    ),
    "phi": Layout(
        mlp_norm="input_layernorm", out_proj="self_attn.dense", final="model.final_layernorm", parallel=True, kv=H
    ),
    "phi3": Layout(q="self_attn.qkv_proj", k="self_attn.qkv_proj", v="self_attn.qkv_proj", fused="stacked"),
    "qwen2": Layout(),
    "qwen3": Layout(),
    "gemma2": Layout(**GEMMA),
    "gemma3": Layout(**GEMMA),
    "olmo": Layout(kv=H),
    "olmo2": Layout(
        norm=None, mlp_norm=None, post_norm="post_attention_layernorm", mlp_write="post_feedforward_layernorm"
    ),
    "opt": Layout(
        blocks="model.decoder.layers",
        norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        mlp="fc1",
        out_proj="self_attn.out_proj",
        mlp_write="fc2",
        final="model.decoder.final_layer_norm",
        kv=H,
    ),
    "granite": Layout(scale=0.3),
    "stablelm": Layout(),
    "mixtral": Layout(),
}


def make(name: str, seed: int = 0) -> Model:
    """A random float64 model of a family, every norm's and bias' values moved off their defaults."""
    torch.manual_seed(seed)
    config = _config(name)
    keywords = {"experts_implementation": "eager"} if name == "mixtral" else {}
    hf = AutoModelForCausalLM.from_config(config, **keywords).double().eval()
    for parent in list(hf.modules()):
        for key, child in list(parent.named_children()):
            kind = type(child).__name__
            if "RMSNorm" in kind:
                eps = float(getattr(child, "variance_epsilon", getattr(child, "eps", 1e-6)))
                setattr(parent, key, ExactRMSNorm(child.weight, eps, plus_one="Gemma" in kind))
            elif kind == "OlmoLayerNorm":
                setattr(parent, key, ExactLayerNorm())
    for weight in hf.parameters():
        if weight.ndim == 1:
            weight.data.add_(torch.randn_like(weight) * 0.2)
    return Model(hf, None)


def pairs(n: int = 3, length: int = 6, prefix: int = 2, seed: int = 1) -> Group:
    """Random pairs that share their first `prefix` tokens."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, VOCAB, (n, length), generator=generator)
    corrupt = torch.randint(3, VOCAB, (n, length), generator=generator)
    corrupt[:, :prefix] = clean[:, :prefix]
    answers = torch.randint(3, VOCAB, (n, 2), generator=generator)
    foils = (answers[:, :1] + 7) % VOCAB
    answers[0, 1] = -1
    return Group(
        rows=list(range(n)),
        clean=clean,
        corrupt=corrupt,
        answers=answers,
        foils=foils,
        positions={"END": torch.full((n,), length - 1)},
    )


def bound(*groups: Group) -> Any:
    """What `behavior.bind(model)` gives, as far as the engines read it: the groups, rows numbered through."""
    start, out = 0, []
    for group in groups:
        rows = list(range(start, start + len(group)))
        start += len(group)
        out.append(
            Group(
                rows=rows,
                clean=group.clean,
                corrupt=group.corrupt,
                answers=group.answers,
                foils=group.foils,
                positions=group.positions,
            )
        )
    return SimpleNamespace(groups=out, n=start)


# --- plain definitions


class Plain:
    """One model by the book: full prompts, one head at a time, modules called as they are."""

    def __init__(self, model: Model, name: str) -> None:
        self.hf, self.layout = model.hf, LAYOUTS[name]
        self.blocks: list[nn.Module] = list(self.hf.get_submodule(self.layout.blocks))
        self.final: nn.Module = self.hf.get_submodule(self.layout.final)

    def at(self, layer: int, path: str | None) -> Any:
        return None if path is None else self.blocks[layer].get_submodule(path)

    def normed(self, layer: int, path: str | None, x: Tensor) -> Tensor:
        return x if path is None else self.at(layer, path)(x)

    def run(self, ids: Tensor, change: Callable[[ExitStack], None] | None = None) -> dict[str, Any]:
        """One full forward, and what passed: streams, projections' outputs, z, what the MLP adds, logits at the end."""
        seen: dict[str, Any] = {"resid": [], "z": [], "o": [], "mlp": [], "mid": []}
        with ExitStack() as stack:
            if change:
                change(stack)
            for layer, block in enumerate(self.blocks):
                stack.callback(
                    block.register_forward_pre_hook(
                        lambda _, a, k: seen["resid"].append(a[0] if a else k["hidden_states"]), with_kwargs=True
                    ).remove
                )
                stack.callback(
                    self.at(layer, self.layout.out_proj)
                    .register_forward_pre_hook(lambda _, a: seen["z"].append(a[0]))
                    .remove
                )
                stack.callback(
                    self.at(layer, self.layout.out_proj)
                    .register_forward_hook(lambda _, a, y: seen["o"].append(y))
                    .remove
                )
                stack.callback(
                    self.at(layer, self.layout.mlp_write)
                    .register_forward_hook(lambda _, a, y: seen["mlp"].append(y[0] if isinstance(y, tuple) else y))
                    .remove
                )
            stack.callback(self.final.register_forward_pre_hook(lambda _, a: seen.__setitem__("final", a[0])).remove)
            seen["logits"] = self.hf(input_ids=ids, use_cache=False).logits[:, -1]
        return seen

    def weight(self, layer: int, path: str) -> tuple[Tensor, Tensor | None]:
        module = self.at(layer, path)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        return weight.detach(), None if module.bias is None else module.bias.detach()

    def writes(self, seen: dict[str, Any]) -> dict[str, Tensor]:
        """Name of each source -> [B, T, D], what it adds to the stream."""
        out = {"input": seen["resid"][0].detach()}
        for layer in range(len(self.blocks)):
            weight, bias = self.weight(layer, self.layout.out_proj)
            z = seen["z"][layer].detach()
            for head in range(H):
                cut = slice(head * K, (head + 1) * K)
                write = z[..., cut] @ weight[:, cut].T
                if bias is not None:
                    write = write + bias / H
                if self.layout.post_norm is not None:  # only RMSNorms here: gain / deviation of the whole
                    norm = self.at(layer, self.layout.post_norm)
                    deviation = (seen["o"][layer].detach().square().mean(-1, keepdim=True) + norm.eps).sqrt()
                    gain = norm.weight + 1 if norm.plus_one else norm.weight
                    write = write / deviation * gain.detach()
                out[f"a{layer}.h{head}"] = write * self.layout.scale
            # OPT's MLP works on [B T, D]
            out[f"m{layer}"] = seen["mlp"][layer].detach().reshape(out["input"].shape) * self.layout.scale
        return out

    def reader_names(self, layer: int) -> list[tuple[str, str, int]]:
        letter = "h" if self.layout.kv == H else "g"
        names = [(f"a{layer}.h{h}<q>", "q", h) for h in range(H)]
        return names + [(f"a{layer}.{letter}{g}<{part}>", part, g) for part in "kv" for g in range(self.layout.kv)]

    def project(self, layer: int, part: str, head: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, values): one head's query, key or value of a stream [B, T, D], before what follows the projection."""
        rows = self.layout.rows(part, head)
        weight, bias = self.weight(layer, getattr(self.layout, part))
        value = self.normed(layer, self.layout.norm, stream) @ weight[rows].T
        return rows, value if bias is None else value + bias[rows]

    def reading(self, readers: dict[str, Callable[[Tensor], Tensor]]) -> Callable[[ExitStack], None]:
        """A change of a run: reader -> what it reads in place of the stream (a function of the stream)."""

        def change(stack: ExitStack) -> None:
            for layer, block in enumerate(self.blocks):
                here: dict[str, Tensor] = {}

                def entering(_: Any, a: Any, k: Any, here: dict[str, Tensor] = here) -> None:
                    here["pre"] = a[0] if a else k["hidden_states"]

                stack.callback(block.register_forward_pre_hook(entering, with_kwargs=True).remove)
                by_module: dict[nn.Module, list[tuple[str, str, int]]] = {}
                for name, part, head in self.reader_names(layer):
                    if name in readers:
                        by_module.setdefault(self.at(layer, getattr(self.layout, part)), []).append((name, part, head))
                for module, wanted in by_module.items():

                    def made(
                        _: Any,
                        a: Any,
                        y: Tensor,
                        layer: int = layer,
                        wanted: Any = wanted,
                        here: dict[str, Tensor] = here,
                    ) -> Tensor:
                        y = y.clone()
                        for name, part, head in wanted:
                            rows, value = self.project(layer, part, head, readers[name](here["pre"]))
                            y[..., rows] = value
                        return y

                    stack.callback(module.register_forward_hook(made).remove)
                if f"m{layer}" in readers:
                    read = readers[f"m{layer}"]
                    if not self.layout.parallel and self.layout.mlp_norm is not None:
                        norm = self.at(layer, self.layout.mlp_norm)

                        def into_norm(_: Any, a: Any, read: Any = read, here: Any = here) -> Any:
                            return (read(a[0].reshape(here["pre"].shape)).reshape(a[0].shape),)

                        stack.callback(norm.register_forward_pre_hook(into_norm).remove)
                    else:
                        path = self.layout.mlp_norm

                        def entry(
                            _: Any,
                            a: Any,
                            k: Any = None,
                            layer: int = layer,
                            read: Any = read,
                            here: Any = here,
                            path: Any = path,
                        ) -> Any:
                            stream = here["pre"] if path is not None else a[0]
                            return (self.normed(layer, path, read(stream)).reshape(a[0].shape),)

                        stack.callback(self.at(layer, self.layout.mlp).register_forward_pre_hook(entry).remove)
            if "logits" in readers:
                stack.callback(self.final.register_forward_pre_hook(lambda _, a: (readers["logits"](a[0]),)).remove)

        return change


def plain_edge_scores(
    model: Model, name: str, group: Group, metric: Callable[..., Tensor], nodes: list[tuple[float, float]]
) -> dict[tuple[str, str], Tensor]:
    """Edge scores by their definition: a stream of its own, to differentiate by, for every single reader.

    nodes: (place between counterfactual and clean of the stream that enters the first block, weight).
    """
    plain = Plain(model, name)
    with torch.no_grad():
        clean, corrupt = plain.run(group.clean), plain.run(group.corrupt)
    ours, theirs = plain.writes(clean), plain.writes(corrupt)
    for weight in model.hf.parameters():
        weight.requires_grad_(False)
    names = [n for layer in range(LAYERS) for n in (*[r for r, _, _ in plain.reader_names(layer)], f"m{layer}")] + [
        "logits"
    ]
    total: dict[str, Tensor] = {}
    for node, weight in nodes:
        leaves: dict[str, Tensor] = {}

        def own(reader: str, leaves: dict[str, Tensor] = leaves) -> Callable[[Tensor], Tensor]:
            def read(stream: Tensor) -> Tensor:
                leaves[reader] = stream.view_as(stream)
                return leaves[reader]

            return read

        start = theirs["input"] + node * (ours["input"] - theirs["input"])

        def change(stack: ExitStack, start: Tensor = start, own: Any = own) -> None:
            def enter(_: Any, a: Any, k: Any) -> Any:
                x = start.detach().clone().requires_grad_(True)
                return ((x, *a[1:]), k) if a else (a, {**k, "hidden_states": x})

            stack.callback(plain.blocks[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
            plain.reading({reader: own(reader) for reader in names})(stack)

        logits = plain.run(group.clean, change)["logits"]
        value = metric(logits, group.answers, group.foils, clean["logits"]).sum()
        for reader, gradient in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
            total[reader] = total.get(reader, torch.zeros_like(gradient)) + weight * gradient
    return {(s, r): ((ours[s] - theirs[s]) * g).sum() / len(group) for s in ours for r, g in total.items()}


def plain_circuit(model: Model, name: str, group: Group, edges: set[tuple[str, str]]) -> Tensor:
    """Logits [B, V] of a circuit by its definition, layer after layer: each reader reads the counterfactual stream
    plus, for each of its edges in the circuit, how its source's write in this run differs from the counterfactual's.
    """
    plain = Plain(model, name)
    with torch.no_grad():
        clean, corrupt = plain.run(group.clean), plain.run(group.corrupt)
        base = plain.writes(corrupt)
        live = {"input": plain.writes(clean)["input"]}

        def reads(reader: str, before: list[str]) -> Callable[[Tensor], Tensor]:
            value = sum((base[s] for s in base if s in before), torch.zeros_like(base["input"]))
            # what is in the stream besides the sources' writes (biases) is the same in both runs
            value = value + sum((live[s] - base[s] for s in before if (s, reader) in edges), torch.zeros_like(value))
            return lambda stream: value + rest[reader]

        rest: dict[str, Tensor] = {}
        readers: dict[str, Callable[[Tensor], Tensor]] = {}
        before = ["input"]
        for layer in range(LAYERS):
            heads = [f"a{layer}.h{h}" for h in range(H)]
            for reader, _, _ in plain.reader_names(layer):
                rest[reader] = corrupt["resid"][layer] - sum(base[s] for s in before)
                readers[reader] = reads(reader, list(before))
            seen = plain.run(group.clean, plain.reading(readers))
            now = plain.writes(seen)
            live |= {head: now[head] for head in heads}
            mlp_before = before if plain.layout.parallel else [*before, *heads]
            reader = f"m{layer}"
            rest[reader] = corrupt["resid"][layer] - sum(base[s] for s in before)
            if not plain.layout.parallel:
                rest[reader] = rest[reader] + _unattributed(plain, corrupt, base, layer)
            readers[reader] = reads(reader, list(mlp_before))
            seen = plain.run(group.clean, plain.reading(readers))
            live[reader] = plain.writes(seen)[reader]
            before = [*before, *heads, reader]
        rest["logits"] = corrupt["final"] - sum(base.values())
        readers["logits"] = reads("logits", before)
        return plain.run(group.clean, plain.reading(readers))["logits"]


def _unattributed(plain: Plain, corrupt: dict[str, Any], base: dict[str, Tensor], layer: int) -> Tensor:
    """What attention adds besides its heads' writes: nothing, as biases are shared out among heads."""
    return torch.zeros_like(base["input"])

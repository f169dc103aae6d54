"""Plain, slow definitions of what ablated edges carry and of a circuit's run under any ablation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwater.core.model import Model
from localize_families import LAYERS, H, Plain

Weight = Callable[[str, str], Tensor | float]
"""(source, reader) -> how much of the edge is in the circuit: 0, 1, or by pair and position [B, T, 1]."""


def plain_reference(model: Model, name: str, group: Any, kind: str) -> dict[str, Tensor]:
    """Source -> [B, T, D]: what its edges carry where they are ablated."""
    plain = Plain(model, name)
    writes = plain.writes(plain.run(group.corrupt))
    if kind == "zero":  # what is left of a head is its share of the output projection's bias
        out = {source: torch.zeros_like(write) for source, write in writes.items()}
        for layer in range(LAYERS):
            bias = plain.weight(layer, plain.layout.out_proj)[1]
            for head in range(H):
                if bias is not None and plain.layout.post_norm is None:
                    out[f"a{layer}.h{head}"] += bias / H * plain.layout.scale
        return out
    if kind == "mean":
        return {source: write.mean(dim=(0, 1)).expand_as(write) for source, write in writes.items()}
    if kind == "mean_positional":
        return {source: write.mean(dim=0).expand_as(write) for source, write in writes.items()}
    return writes


def plain_ablated(model: Model, name: str, group: Any, base: dict[str, Tensor], weight: Weight) -> Tensor:
    """Logits [B, V] of a circuit by its definition: each reader reads the sum of the reference writes of all earlier
    sources plus, of each edge in the circuit, what its source writes more in this run than its reference.
    """
    plain = Plain(model, name)
    clean, corrupt = plain.run(group.clean), plain.run(group.corrupt)
    own = plain.writes(corrupt)
    live = {"input": plain.writes(clean)["input"]}
    readers: dict[str, Callable[[Tensor], Tensor]] = {}

    def reads(reader: str, before: list[str], stream: Tensor) -> Callable[[Tensor], Tensor]:
        # what is in the stream besides the sources' writes is there in every run
        value = stream - sum(own[s] for s in before) + sum(base[s] for s in before)
        value = value + sum((live[s] - base[s]) * weight(s, reader) for s in before)
        return lambda _: value

    before = ["input"]
    for layer in range(LAYERS):
        heads = [f"a{layer}.h{h}" for h in range(H)]
        stream = corrupt["resid"][layer]
        for reader, _, _ in plain.reader_names(layer):
            readers[reader] = reads(reader, list(before), stream)
        now = plain.writes(plain.run(group.clean, plain.reading(readers)))
        live |= {head: now[head] for head in heads}
        mlp_before = list(before) if plain.layout.parallel else [*before, *heads]
        middle = stream + sum(own[s] for s in mlp_before if s in heads)
        readers[f"m{layer}"] = reads(f"m{layer}", mlp_before, middle)
        live[f"m{layer}"] = plain.writes(plain.run(group.clean, plain.reading(readers)))[f"m{layer}"]
        before = [*before, *heads, f"m{layer}"]
    readers["logits"] = reads("logits", before, corrupt["final"])
    return plain.run(group.clean, plain.reading(readers))["logits"]

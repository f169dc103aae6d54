"""Circuits in the JSON graph format that MIB submissions use, and MIB's two areas (CPR, CMD)."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError, StoreError
from headwater.localize.graph import Graph

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes at which MIB evaluates a ranking of edges, as fractions of all edges."""


def areas(faithfulness: Sequence[float], fractions: Sequence[float] = FRACTIONS) -> tuple[float, float]:
    """(CPR, CMD): trapezoid areas under f and |1 - f| over the fraction of edges, from the first size to the last.

    CPR rewards a circuit that beats the model (f above 1), CMD does not; so they are shown together. The axis is the
    fraction itself, not its logarithm, and the part below the first size is not counted, as MIB has it: a perfect
    curve has CPR .999 and CMD 0. Mueller et al., 2025 (MIB: a mechanistic interpretability benchmark).
    """
    if len(faithfulness) != len(fractions) or len(fractions) < 2:
        raise MethodError(
            "areas need one faithfulness a size, two or more", got=f"{len(faithfulness)} for {len(fractions)} sizes"
        )
    if any(b <= a for a, b in itertools.pairwise(fractions)):
        raise MethodError("sizes of a curve must rise", got=list(fractions))
    cpr = cmd = 0.0
    for i in range(len(fractions) - 1):
        width = fractions[i + 1] - fractions[i]
        cpr += width * (faithfulness[i] + faithfulness[i + 1]) / 2
        cmd += width * (abs(1 - faithfulness[i]) + abs(1 - faithfulness[i + 1])) / 2
    return cpr, cmd


def to_mib(graph: Graph, mask: Tensor, scores: Tensor | None, *, per_head: bool) -> dict[str, Any]:
    """The circuit as MIB's JSON object: `cfg`, `nodes` (name -> in_graph) and `edges` (name -> score, in_graph).

    `per_head`: key/value heads that are shared are written once for each query head (`a0.h3<k>`), as submissions have
    it, with an equal share of the score; else as they are (`a0.g1<k>`), which loses nothing. Without scores, an edge's
    score is 1 inside the circuit and 0 outside.
    """
    value = mask.double() if scores is None else scores.double().cpu()
    used = (mask.any(dim=1)).tolist()
    nodes: dict[str, Any] = {name: {"in_graph": bool(u)} for name, u in zip(graph.sources, used, strict=True)}
    nodes["logits"] = {"in_graph": True}
    edges: dict[str, Any] = {}
    chosen, numbers = mask.tolist(), value.tolist()
    columns = [_names(graph, reader, per_head) for reader in graph.readers]
    for s, source in enumerate(graph.sources):
        for r, names in enumerate(columns):
            if graph.allowed[s, r]:
                for name in names:
                    edges[f"{source}->{name}"] = {"score": numbers[s][r] / len(names), "in_graph": chosen[s][r]}
    cfg: dict[str, Any] = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": graph.d_model,
    }
    if graph.n_kv_heads != graph.n_heads:
        cfg["n_key_value_heads"] = graph.n_kv_heads
    return {"cfg": cfg, "nodes": nodes, "edges": edges}


def _names(graph: Graph, reader: str, per_head: bool) -> list[str]:
    if not per_head or ".g" not in reader:
        return [reader]
    layer, rest = reader.split(".g")
    group, part = rest.split("<")
    first = int(group) * graph.group
    return [f"{layer}.h{head}<{part}" for head in range(first, first + graph.group)]


def from_mib(data: Mapping[str, Any], *, n_kv_heads: int | None = None) -> tuple[Graph, Tensor, Tensor]:
    """(graph, mask, scores) of a circuit in MIB's JSON form; scores are float64, 0 for edges that it does not list.

    `n_kv_heads` says how many key/value heads the model has where the file does not: scores of query heads that share
    one are added. Raises StoreError for anything malformed.
    """
    try:
        cfg, listed = data["cfg"], data["edges"]
        graph = Graph(
            n_layers=int(cfg["n_layers"]),
            n_heads=int(cfg["n_heads"]),
            n_kv_heads=int(n_kv_heads or cfg.get("n_key_value_heads", cfg["n_heads"])),
            parallel=bool(cfg.get("parallel_attn_mlp", False)),
            d_model=int(cfg.get("d_model", 0)),
        )
        mask = torch.zeros_like(graph.allowed)
        scores = torch.zeros(graph.allowed.shape, dtype=torch.float64)
        for name, entry in listed.items():
            at = graph.edge(name)
            score = float(entry.get("score", 0.0) or 0.0)
            if not math.isfinite(score):
                raise MethodError("an edge's score is not a finite number", got=f"{name}: {score}")
            scores[at] += score
            if entry["in_graph"]:
                mask[at] = True
    except (KeyError, TypeError, ValueError, AttributeError, MethodError) as error:
        what = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise StoreError(
            "not a circuit in MIB's JSON form",
            got=what,
            wanted="cfg with n_layers and n_heads; edges as name -> {score, in_graph}",
        ) from error
    return graph, mask, scores


def read_json(path: str | Path) -> Mapping[str, Any]:
    """A JSON object from a file of unknown origin. Raises StoreError when it cannot be read."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"cannot read a circuit from {path}", got=str(error), fix="Give a JSON file of a circuit"
        ) from error
    if not isinstance(data, dict):
        raise StoreError(f"{path} holds no circuit", got=type(data).__name__, wanted="a JSON object")
    return data

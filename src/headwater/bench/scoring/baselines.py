"""What anybody can say of a model without a method: chance, and how large its weights and its activations are."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwater.bench.scoring.readings import Reading
from headwater.localize.engine.passes import for_discovery
from headwater.localize.engine.wiring import graph_of
from headwater.localize.graph import Graph

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


def random_scores(model: "Model", behavior: "Behavior", seed: int) -> Reading:
    """A uniform number for every node, and one for every edge; other numbers for each behavior and seed."""
    graph = graph_of(model)
    generator = torch.Generator().manual_seed(int(behavior.hash[:8], 16) + seed)
    nodes = torch.rand(len(graph.sources), generator=generator, dtype=torch.float64)
    edges = torch.rand(graph.allowed.shape, generator=generator, dtype=torch.float64)
    return Reading(nodes=nodes, edges=edges.masked_fill(~graph.allowed, torch.nan))


def weight_norm(model: "Model", behavior: "Behavior", seed: int) -> Reading:
    """The norm of the weights that a node writes with: a head's slice of the output projection, an MLP's
    down-projection, the embedding.
    """
    graph = graph_of(model)
    norms = [_norm(model.hf.get_input_embeddings())]
    for block in model.anatomy.main.blocks:
        if block.attention is not None:
            norms += block.attention.out_weight_HKD().detach().double().flatten(1).norm(dim=1).tolist()
        if block.mlp is not None:
            norms.append(_norm(block.mlp.down_proj or block.mlp.experts or block.mlp.entry.module))
    return _of_nodes(graph, torch.tensor(norms, dtype=torch.float64))


def activation_difference(model: "Model", behavior: "Behavior", seed: int) -> Reading:
    """The norm of how much what a node writes differs between prompt and counterfactual, over positions; mean over
    pairs.
    """
    graph = graph_of(model)
    sites = ["embed"]
    for layer in range(graph.n_layers):
        sites += [f"head.{layer}", f"mlp_out.{layer}"]
    total, n = torch.zeros(len(graph.sources), dtype=torch.float64), 0
    for group in for_discovery(behavior).bind(model).groups:
        runs = [model.run(ids, capture=sites, logits="none") for ids in (group.clean, group.corrupt)]
        parts = []
        for site in sites:
            gap = (runs[0][site] - runs[1][site]).double()
            gap = gap.unsqueeze(2) if gap.ndim == 3 else gap  # [B, T, H, D], one "head" where there is none
            parts.append(gap.transpose(1, 2).flatten(2).norm(dim=2).sum(dim=0).cpu())
        total += torch.cat(parts)
        n += len(group)
    return _of_nodes(graph, total / max(1, n))


def _norm(module: torch.nn.Module) -> float:
    return sum(float(p.detach().double().square().sum()) for p in module.parameters() if p.ndim > 1) ** 0.5


def _of_nodes(graph: Graph, nodes: Tensor) -> Reading:
    """An edge counts as the product of its two ends; the logits as the largest node."""
    ends = (graph.owners * nodes[:, None]).amax(dim=0)
    ends[-1] = nodes.max()
    return Reading(nodes=nodes, edges=(nodes[:, None] * ends[None]).masked_fill(~graph.allowed, torch.nan))


BASELINES: dict[str, Callable[["Model", "Behavior", int], Reading]] = {
    "random": random_scores,
    "weight_norm": weight_norm,
    "activation_difference": activation_difference,
}

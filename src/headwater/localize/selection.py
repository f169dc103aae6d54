"""From edge scores to the edges of a circuit: top-n, greedy from the logits, threshold; and pruning of what dangles.

Every function takes and gives [sources, readers] tensors over a `Graph`.
"""

import heapq
from typing import Literal

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.graph import Graph

Rank = Literal["abs", "signed"]
How = Literal["topn", "greedy", "threshold"]


def ranking(graph: Graph, scores: Tensor, rank: Rank) -> Tensor:
    """What edges are ranked by: |score| or the score itself; minus infinity where there is no edge.

    The two give different circuits (and on published tasks very different faithfulness), so the name is always kept.
    """
    if rank not in ("abs", "signed"):
        raise MethodError("unknown ranking of edges", got=repr(rank), wanted=did_you_mean(str(rank), ["abs", "signed"]))
    if tuple(scores.shape) != tuple(graph.allowed.shape):
        raise MethodError("scores do not fit the graph", got=list(scores.shape), wanted=list(graph.allowed.shape))
    value = scores.double().cpu()
    if bool(torch.isnan(value[graph.allowed]).any()):
        raise MethodError("scores hold NaN, so edges cannot be ranked", fix="Check the metric and the model's dtype")
    value = value.abs() if rank == "abs" else value
    return value.masked_fill(~graph.allowed, -torch.inf)


def edge_budget(graph: Graph, edges: int | None, fraction: float | None) -> int:
    """The number of edges asked for: `edges`, or the whole part of `fraction` of all edges (as MIB rounds)."""
    if (edges is None) == (fraction is None):
        raise MethodError(
            "say how large the circuit is", got=f"edges={edges}, fraction={fraction}", wanted="one of both"
        )
    if fraction is not None and not 0 <= fraction <= 1:
        raise MethodError("a fraction of edges lies between 0 and 1", got=fraction)
    budget = int(fraction * graph.n_edges) if fraction is not None else edges
    if budget is None or not 0 <= budget <= graph.n_edges:
        raise MethodError("cannot take that many edges", got=edges, wanted=f"0 to {graph.n_edges}")
    return budget


def top_n(graph: Graph, scores: Tensor, n: int, *, rank: Rank = "abs") -> Tensor:
    """The `n` edges that rank highest. Ties go to the edge that comes first in the graph's order."""
    value = ranking(graph, scores, rank).flatten()
    chosen = torch.argsort(value, descending=True, stable=True)[:n]
    mask = torch.zeros_like(value, dtype=torch.bool)
    mask[chosen] = True
    return mask.view(graph.allowed.shape)


def at_least(graph: Graph, scores: Tensor, threshold: float, *, rank: Rank = "abs") -> Tensor:
    """The edges that rank at `threshold` or above."""
    return ranking(graph, scores, rank) >= threshold


def greedy(graph: Graph, scores: Tensor, n: int, *, rank: Rank = "abs") -> Tensor:
    """`n` edges grown from the logits: always the best edge into a node that is already connected to the logits."""
    value = ranking(graph, scores, rank)
    readers_of = graph.owners  # row u: the readers that u's output is computed from
    mask = torch.zeros_like(graph.allowed)
    in_graph = torch.zeros(len(graph.sources), dtype=torch.bool)
    opened = torch.zeros(len(graph.readers), dtype=torch.bool)
    heap: list[tuple[float, int, int]] = []

    def open_reader(reader: int) -> None:
        if opened[reader]:
            return
        opened[reader] = True
        column = value[:, reader]
        for source in (column > -torch.inf).nonzero().flatten().tolist():
            heapq.heappush(heap, (-float(column[source]), source, reader))

    open_reader(len(graph.readers) - 1)
    for _ in range(n):
        if not heap:
            break
        _, source, reader = heapq.heappop(heap)
        mask[source, reader] = True
        if not in_graph[source]:
            in_graph[source] = True
            for fed in readers_of[source].nonzero().flatten().tolist():
                open_reader(fed)
    return mask


def prune(graph: Graph, mask: Tensor) -> Tensor:
    """`mask` without dangling parts: every node kept is reached from `input` by edges and reaches `logits`.

    A head counts as reached when any of its query, key or value has an edge in; a shared key/value head is needed while
    any query head of its group is.
    """
    mask = mask.bool() & graph.allowed
    owners = graph.owners.float()
    while True:
        kept = nodes_in(graph, mask)
        read = (kept.float() @ owners) > 0
        read[-1] = True
        smaller = mask & kept[:, None] & read[None, :]
        if torch.equal(smaller, mask):
            return mask
        mask = smaller


def nodes_in(graph: Graph, mask: Tensor) -> Tensor:
    """[sources] bool: the sources with an edge out and (but for `input`) an edge in."""
    has_out = mask.any(dim=1)
    has_in = (graph.owners.float() @ mask.any(dim=0).float()) > 0
    has_in[0] = True
    return has_out & has_in


def select(
    graph: Graph,
    scores: Tensor,
    *,
    edges: int | None = None,
    fraction: float | None = None,
    threshold: float | None = None,
    rank: Rank = "abs",
    how: How = "topn",
    pruned: bool = True,
) -> Tensor:
    """The edges of a circuit by one of the three ways; dangling parts pruned unless told otherwise."""
    if threshold is not None and edges is None and fraction is None:
        how = "threshold"
    if how == "threshold":
        if threshold is None:
            raise MethodError("a circuit by threshold needs the threshold", fix="Pass threshold=")
        mask = at_least(graph, scores, threshold, rank=rank)
    elif how in ("topn", "greedy"):
        if threshold is not None:
            raise MethodError(
                "give a threshold or a number of edges, not both", got=f"threshold={threshold}, how={how}"
            )
        choose = top_n if how == "topn" else greedy
        mask = choose(graph, scores, edge_budget(graph, edges, fraction), rank=rank)
    else:
        wanted = did_you_mean(str(how), ["topn", "greedy", "threshold"])
        raise MethodError("unknown way of choosing edges", got=repr(how), wanted=wanted)
    return prune(graph, mask) if pruned else mask

"""Edges by position: which class each position of a prompt is in, and what of a position-aware circuit is connected.

A position-aware mask is [sources, readers, P] over P classes of positions: named positions of the behavior and `other`,
or positions counted from the end (`-1` is where the answer is read). An edge at a position carries what its source
writes there to what its reader reads there; attention then moves it on.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.engine.passes import Batch
from headwater.localize.graph import Graph
from headwater.localize.selection import Rank, edge_budget, ranking

OTHER = "other"
_COUNTED = re.compile(r"-\d+$")


def position_index(batch: Batch, names: Sequence[str]) -> Tensor:
    """[B, T]: which of `names` each position is. Where two names share a token, it is the first one's.

    Raises MethodError for a name that the pairs do not have, and for positions that no name covers.
    """
    rows, length = batch.clean.shape
    index = torch.full((rows, length), -1, dtype=torch.long)
    for number, name in reversed(list(enumerate(names))):
        if name == OTHER:
            continue
        if name in batch.positions:
            index[torch.arange(rows), batch.positions[name].cpu()] = number
        elif _COUNTED.match(name):
            if int(name) >= -length:
                index[:, int(name)] = number
        else:
            raise MethodError("unknown position", got=repr(name), wanted=did_you_mean(name, [*batch.positions, OTHER]))
    if OTHER in names:
        index[index < 0] = list(names).index(OTHER)
    elif bool((index[:, batch.prefix :] < 0).any()):
        raise MethodError("no name covers some positions of the prompts", got=list(names), fix="Name `other` as well")
    return index.clamp(min=0)


def prune_positions(graph: Graph, mask: Tensor) -> Tensor:
    """`mask` [sources, readers, P] without what is not reached from `input` or does not reach `logits`.

    Within a position class by edges; between classes by a head's keys and values. Which class comes before which
    differs from pair to pair, so a head's keys and values at any class may reach its output at every class.
    """
    mask = mask.bool() & graph.allowed[..., None]
    owners = graph.owners.float()
    anywhere = torch.tensor([name.endswith(("<k>", "<v>")) for name in graph.readers])
    while True:
        entered = mask.any(dim=0)
        entered[anywhere] = entered[anywhere].any(dim=-1, keepdim=True).expand(-1, mask.shape[-1])
        kept = mask.any(dim=1) & ((owners @ entered.float()) > 0)
        kept[0] = mask[0].any(dim=0)
        read = (owners.T @ kept.float()) > 0
        read[anywhere] = read[anywhere].any(dim=-1, keepdim=True).expand(-1, mask.shape[-1])
        read[-1] = True
        smaller = mask & kept[:, None] & read[None]
        if torch.equal(smaller, mask):
            return mask
        mask = smaller


def top_positions(
    graph: Graph,
    scores: Tensor,
    *,
    edges: int | None = None,
    fraction: float | None = None,
    rank: Rank = "abs",
    pruned: bool = True,
) -> Tensor:
    """The best edges at positions, as a mask [sources, readers, P]: `edges` of them, or as many as that fraction of the
    position-free graph's edges, so that circuits of the same number of edges stand side by side.
    """
    if scores.ndim != 3 or scores.shape[:2] != graph.allowed.shape:
        raise MethodError("not scores of edges by position", got=list(scores.shape), wanted="[sources, readers, P]")
    n = edges
    if n is None:
        n = edge_budget(graph, None, fraction)
    elif not 0 <= n <= graph.n_edges * scores.shape[-1]:
        raise MethodError("cannot take that many edges", got=n, wanted=f"0 to {graph.n_edges * scores.shape[-1]}")
    value = torch.stack([ranking(graph, one, rank) for one in scores.unbind(dim=-1)], dim=-1).flatten()
    mask = torch.zeros_like(value, dtype=torch.bool)
    mask[torch.argsort(value, descending=True, stable=True)[:n]] = True
    mask = mask.view(scores.shape)
    return prune_positions(graph, mask) if pruned else mask

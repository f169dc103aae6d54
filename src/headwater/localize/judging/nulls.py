"""Random circuits that a found circuit must beat: matched in size and in which layers its edges join."""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.graph import Graph

KINDS = ("edges", "heads")


def random_circuits(graph: Graph, mask: Tensor, n: int, *, kind: str = "edges", seed: int = 0) -> Iterator[Tensor]:
    """`n` random masks [sources, readers] like `mask`.

    `"edges"`: for each pair of layers (of the source, of the reader), as many edges as the circuit has there, drawn
    uniformly from all edges there. `"heads"`: the same circuit with the heads of each layer renamed at random, so that
    size, layer profile, degrees and connectedness are all kept and only *which* heads differs (the stricter null:
    MLPs stay where they are; with grouped queries, groups are renamed and heads within their group).
    """
    if kind not in KINDS:
        raise MethodError("unknown kind of random circuit", got=repr(kind), wanted=did_you_mean(str(kind), KINDS))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        yield _by_cell(graph, mask, generator) if kind == "edges" else _renamed(graph, mask, generator)


def _by_cell(graph: Graph, mask: Tensor, generator: Generator) -> Tensor:
    cells = graph.layer_cells.flatten()
    wanted = torch.bincount(cells[mask.flatten()], minlength=int(cells.max()) + 1)
    # a random order of all edges, stably sorted by cell: the first `wanted` of each cell are a uniform draw
    order = torch.randperm(cells.numel(), generator=generator)
    order = order[torch.argsort(cells[order], stable=True)]
    sorted_cells = cells[order]
    first = torch.searchsorted(sorted_cells, torch.arange(len(wanted)))
    place = torch.arange(cells.numel()) - first[sorted_cells.clamp(min=0)]
    chosen = order[(sorted_cells >= 0) & (place < wanted[sorted_cells.clamp(min=0)])]
    drawn = torch.zeros_like(mask, dtype=torch.bool).flatten()
    drawn[chosen] = True
    return drawn.view(mask.shape)


def _renamed(graph: Graph, mask: Tensor, generator: Generator) -> Tensor:
    sources, readers = torch.arange(len(graph.sources)), torch.arange(len(graph.readers))
    for layer in range(graph.n_layers):
        groups = torch.randperm(graph.n_kv_heads, generator=generator)
        heads = torch.cat([g * graph.group + torch.randperm(graph.group, generator=generator) for g in groups.tolist()])
        at, into = graph.heads_at(layer), graph.attention_readers_at(layer).start
        sources[at] = at.start + heads
        readers[into : into + graph.n_heads] = into + heads
        for part in range(2):
            start = into + graph.n_heads + part * graph.n_kv_heads
            readers[start : start + graph.n_kv_heads] = start + groups
    return mask[sources][:, readers]


def p_value(observed: float, draws: list[float]) -> float:
    """Share of draws at least as good as `observed` (larger is better), the observed one counted among them."""
    return (1 + sum(draw >= observed for draw in draws)) / (1 + len(draws))

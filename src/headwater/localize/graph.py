"""The graph that every localizing method scores: nodes write to the residual stream, readers read it, edges join them.

Sources (what writes): `input`, each head `aL.hH`, each MLP `mL`. Readers (what reads): each head's `aL.hH<q>`, each
key/value head's `aL.gG<k>` and `aL.gG<v>` (written `aL.hH<k>` where every query head has its own), each `mL`, `logits`.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean

_HEAD = re.compile(r"a(\d+)\.h(\d+)$")
_READER = re.compile(r"a(\d+)\.([hg])(\d+)<([qkv])>$")


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes and edges of a decoder of `n_layers` equal blocks.

    `parallel`: attention and MLP of a block read the same stream (NeoX, Phi, GPT-J), so no head feeds its own block's
    MLP. Sources and readers are indexed in the order they act; `scores` and masks over edges are [sources, readers].
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False
    d_model: int = 0

    def __post_init__(self) -> None:
        if min(self.n_layers, self.n_heads, self.n_kv_heads) < 1 or self.n_heads % self.n_kv_heads:
            raise MethodError(
                "a circuit graph needs layers, heads, and query heads in equal groups",
                got=f"{self.n_layers} layers, {self.n_heads} heads, {self.n_kv_heads} key/value heads",
                wanted="positive numbers, n_heads a multiple of n_kv_heads",
            )

    # --- nodes

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of what writes to the stream, in order: input, then each layer's heads and MLP."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)] + [f"m{layer}"]
        return tuple(names)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of what reads the stream, in order: each layer's queries, keys, values and MLP, then logits."""
        letter = "h" if self.n_kv_heads == self.n_heads else "g"
        names: list[str] = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.n_heads)]
            names += [f"a{layer}.{letter}{group}<{part}>" for part in "kv" for group in range(self.n_kv_heads)]
            names.append(f"m{layer}")
        return (*names, "logits")

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The sources and `logits`: the nodes of a circuit."""
        return (*self.sources, "logits")

    @property
    def per_layer(self) -> int:
        """Attention readers of one layer: H queries, G keys, G values."""
        return self.n_heads + 2 * self.n_kv_heads

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    @cached_property
    def _source_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.sources)}

    @cached_property
    def _reader_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.readers)}

    def source(self, name: str) -> int:
        """Index of a source by its name. Raises MethodError with near names."""
        if name not in self._source_index:
            raise MethodError("unknown source of an edge", got=repr(name), wanted=did_you_mean(name, self.sources))
        return self._source_index[name]

    def reader(self, name: str) -> int:
        """Index of a reader by its name; `aL.hH<k>` is read as the key head that query head H uses."""
        if name not in self._reader_index:
            match = _READER.match(name)
            if match and match[2] == "h" and match[4] != "q" and int(match[3]) < self.n_heads:
                return self._reader_index.get(f"a{match[1]}.g{int(match[3]) // self.group}<{match[4]}>", -1)
            raise MethodError("unknown reader of an edge", got=repr(name), wanted=did_you_mean(name, self.readers))
        return self._reader_index[name]

    def layer_of(self, name: str) -> int:
        """Layer of a node or reader; -1 for `input`, `n_layers` for `logits`."""
        if name == "input":
            return -1
        if name == "logits":
            return self.n_layers
        match = re.match(r"[am](\d+)", name)
        if match is None:
            raise MethodError("unknown node", got=repr(name), wanted=did_you_mean(name, self.nodes))
        return int(match[1])

    # --- index arithmetic, as slices into the two orders

    def heads_at(self, layer: int) -> slice:
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads)

    def mlp_at(self, layer: int) -> int:
        return (layer + 1) * (self.n_heads + 1)

    def attention_readers_at(self, layer: int) -> slice:
        start = layer * (self.per_layer + 1)
        return slice(start, start + self.per_layer)

    def mlp_reader_at(self, layer: int) -> int:
        return layer * (self.per_layer + 1) + self.per_layer

    def sources_before(self, layer: int, *, mlp: bool = False) -> int:
        """How many sources a reader of this layer can read: of its attention, or (`mlp`) of its MLP."""
        if mlp and not self.parallel:
            return 1 + layer * (self.n_heads + 1) + self.n_heads
        return 1 + layer * (self.n_heads + 1)

    # --- edges

    @cached_property
    def allowed(self) -> Tensor:
        """[sources, readers] bool: the edges there are."""
        mask = torch.zeros(len(self.sources), len(self.readers), dtype=torch.bool)
        for layer in range(self.n_layers):
            mask[: self.sources_before(layer), self.attention_readers_at(layer)] = True
            mask[: self.sources_before(layer, mlp=True), self.mlp_reader_at(layer)] = True
        mask[:, -1] = True
        return mask

    @cached_property
    def owners(self) -> Tensor:
        """[sources, readers] bool: which source's output each reader helps compute.

        A key/value head belongs to every query head of its group. `logits` belongs to no source.
        """
        mask = torch.zeros(len(self.sources), len(self.readers), dtype=torch.bool)
        for layer in range(self.n_layers):
            first, readers = self.heads_at(layer).start, self.attention_readers_at(layer).start
            for head in range(self.n_heads):
                group = head // self.group
                mask[first + head, readers + head] = True
                mask[first + head, readers + self.n_heads + group] = True
                mask[first + head, readers + self.n_heads + self.n_kv_heads + group] = True
            mask[self.mlp_at(layer), self.mlp_reader_at(layer)] = True
        return mask

    @cached_property
    def n_edges(self) -> int:
        return int(self.allowed.sum())

    @cached_property
    def layer_cells(self) -> Tensor:
        """[sources, readers] long: one number a (source layer, reader layer) pair; -1 where there is no edge."""
        rows = torch.tensor([self.layer_of(name) + 1 for name in self.sources])
        columns = torch.tensor([self.layer_of(name) for name in self.readers])
        cells = rows[:, None] * (self.n_layers + 1) + columns[None, :]
        return torch.where(self.allowed, cells, torch.full_like(cells, -1))

    def edge(self, name: str) -> tuple[int, int]:
        """Indices of an edge written `source->reader`. Raises MethodError where there is no such edge."""
        source, arrow, reader = name.partition("->")
        if not arrow:
            raise MethodError("an edge is written source->reader", got=repr(name), wanted="such as a3.h1->a5.h0<q>")
        at = self.source(source), self.reader(reader)
        if not bool(self.allowed[at]):
            raise MethodError("no such edge: its source does not come before its reader", got=repr(name))
        return at

    def edge_names(self, mask: Tensor) -> list[tuple[str, str]]:
        """(source, reader) names of the edges in `mask` [sources, readers]."""
        return [(self.sources[s], self.readers[r]) for s, r in mask.nonzero().tolist()]

    def to_dict(self) -> dict[str, int | bool]:
        """The numbers that define the graph, as plain data."""
        return {
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "parallel": self.parallel,
            "d_model": self.d_model,
        }


def head_of(name: str) -> tuple[int, int] | None:
    """(layer, head) of a node named `aL.hH`, else None."""
    match = _HEAD.match(name)
    return (int(match[1]), int(match[2])) if match else None

"""Pass 3: which layer, head and neurons each part gets, and which directions each variable."""

from dataclasses import dataclass

from headwater.bench.rasp.bases import Variable
from headwater.bench.rasp.lowering import BOS, Head, Lowered, Neurons


@dataclass(frozen=True, eq=False)
class Placed:
    """A part in its place: `node` as circuits name it (`a0.h1`, `m0`), `start` its first neuron or its head."""

    part: Head | Neurons
    layer: int
    start: int

    @property
    def node(self) -> str:
        return f"a{self.layer}.h{self.start}" if isinstance(self.part, Head) else f"m{self.layer}"


@dataclass(frozen=True, eq=False)
class Layout:
    """Where everything is. `first` gives the first direction of each variable, `sources` the node that writes it.

    scratch: directions that no part of the program reads, for heads and neurons without a task.
    """

    placed: tuple[Placed, ...]
    first: dict[Variable, int]
    sources: dict[Variable, str]
    scratch: range
    n_layers: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_model: int

    def directions(self, variable: Variable) -> range:
        return range(self.first[variable], self.first[variable] + variable.width)


def lay_out(lowered: Lowered, *, spare_heads: int, spare_neurons: int, scratch: int) -> Layout:
    """Each part into the first place after what it reads: attention of layer 0, MLP of layer 0, attention of 1, ..."""
    ready: dict[Variable, int] = {variable: -1 for variable in (BOS, *lowered.inputs)}  # the half-layer that writes it
    heads: dict[int, int] = {}
    neurons: dict[int, int] = {}
    placed: list[Placed] = []
    sources = dict.fromkeys(ready, "input")
    for part in lowered.parts:
        after = max((ready[read.variable] for read in part.reads), default=-1)
        odd = 0 if isinstance(part, Head) else 1
        half = after + 1 if (after + 1) % 2 == odd else after + 2
        ready[part.writes] = half
        layer, used = half // 2, heads if isinstance(part, Head) else neurons
        start = used.get(layer, 0)
        used[layer] = start + (1 if isinstance(part, Head) else part.n)
        placed.append(Placed(part, layer, start))
        sources[part.writes] = placed[-1].node
    n_layers = max((p.layer for p in placed), default=0) + 1
    first: dict[Variable, int] = {}
    at = 0
    for variable in ready:
        first[variable] = at
        at += variable.width
    spare = range(at, at + scratch)
    return Layout(
        placed=tuple(placed),
        first=first,
        sources=sources,
        scratch=spare,
        n_layers=n_layers,
        n_heads=max(max(heads.values(), default=0) + spare_heads, 1),
        d_head=max([p.part.width for p in placed if isinstance(p.part, Head)], default=1),
        d_mlp=max(max(neurons.values(), default=0) + spare_neurons, 1),
        d_model=at + scratch,
    )

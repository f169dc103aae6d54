"""Which nodes of a transformer are to carry which variables of a causal graph."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.bench.siit.causal import CausalGraph
from headwater.core.errors import MethodError
from headwater.localize.graph import Graph, head_of


@dataclass(frozen=True, kw_only=True)
class Place:
    """Nodes that carry variables together: all of them are swapped at once, with all of their variables."""

    nodes: tuple[str, ...]
    variables: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Every variable at its nodes (headwater's names: `a0.h1`, `m0`); every other head and MLP is outside the circuit.

    Raises MethodError where a variable has no place or two, a node carries two places, or the nodes of a variable do
    not come after those of its parents.
    """

    places: tuple[Place, ...]

    def nodes_of(self, variable: str) -> tuple[str, ...]:
        return next(place.nodes for place in self.places if variable in place.variables)

    def inside(self) -> list[str]:
        """The circuit's nodes."""
        return [node for place in self.places for node in place.nodes]

    def outside(self, graph: Graph) -> list[str]:
        """Heads and MLPs without a variable."""
        taken = set(self.inside())
        return [node for node in graph.sources[1:] if node not in taken]

    def to_list(self) -> list[dict[str, list[str]]]:
        return [{"nodes": list(place.nodes), "variables": list(place.variables)} for place in self.places]

    @classmethod
    def from_list(cls, places: Iterable[Mapping[str, Sequence[str]]]) -> "Alignment":
        return cls(places=tuple(Place(nodes=tuple(one["nodes"]), variables=tuple(one["variables"])) for one in places))

    def check(self, causal: CausalGraph, graph: Graph) -> None:
        """Raise MethodError where this alignment does not fit the causal graph and the transformer."""
        nodes, variables = self.inside(), [v for place in self.places for v in place.variables]
        if len(set(nodes)) != len(nodes) or sorted(variables) != sorted(causal.variables):
            raise MethodError(
                f"the alignment of {causal.name} does not give each variable one place and each node one",
                got=f"nodes {nodes}, variables {variables}",
                wanted=f"each of {list(causal.variables)} once, and no node twice",
            )
        order = {name: index for index, name in enumerate(graph.sources)}
        for node in nodes:
            graph.source(node)
        for place in self.places:
            for variable in place.variables:
                for parent in causal.parents(variable):
                    if parent == "input" or parent in place.variables:
                        continue
                    for one in self.nodes_of(parent):
                        for other in place.nodes:
                            if not before(graph, one, other) or order[one] >= order[other]:
                                raise MethodError(
                                    f"{variable} at {other} cannot read {parent} at {one}",
                                    got=f"{one} does not come before {other}",
                                    fix="Move one of them, or let one MLP carry both",
                                )


def before(graph: Graph, one: str, other: str) -> bool:
    """Whether the second node reads what the first writes: a later layer, or the MLP of its layer after its heads."""
    first, second = graph.layer_of(one), graph.layer_of(other)
    return first < second or (first == second and head_of(one) is not None and head_of(other) is None)


def align(causal: CausalGraph, *, n_heads: int, seed: int = 0, n_layers: int | None = None) -> Alignment:
    """Each variable as early as its parents allow, heads drawn with `seed`; MLP variables of one layer share the MLP.

    Raises MethodError where the model has too few layers or heads.
    """
    draw = random.Random(f"headwater-align:{causal.name}:{seed}")
    free: dict[int, list[int]] = {}
    layer: dict[str, int] = {}
    is_mlp: dict[str, bool] = {}
    heads: list[Place] = []
    mlps: dict[int, list[str]] = {}
    for name in causal.variables:
        mlp = causal.kind(name) == "mlp"
        at = 0
        for parent in causal.parents(name):
            if parent in layer:
                # an MLP reads the heads of its own layer; all else reads earlier layers only
                at = max(at, layer[parent] + (0 if mlp and not is_mlp[parent] else 1))
        while not mlp and not free.setdefault(at, draw.sample(range(n_heads), n_heads)):
            at += 1
        layer[name], is_mlp[name] = at, mlp
        if mlp:
            mlps.setdefault(at, []).append(name)
        else:
            heads.append(Place(nodes=(f"a{at}.h{free[at].pop()}",), variables=(name,)))
    needed = max(layer.values()) + 1
    if n_layers is not None and needed > n_layers:
        raise MethodError(f"{causal.name} needs more layers", got=n_layers, wanted=f"at least {needed}")
    mlp_places = [Place(nodes=(f"m{at}",), variables=tuple(names)) for at, names in sorted(mlps.items())]
    return Alignment(places=(*heads, *mlp_places))


def true_edges(causal: CausalGraph, alignment: Alignment) -> list[dict[str, Any]]:
    """source, target, variable: every edge between nodes that the causal graph has, and from its output to `logits`."""
    found: list[dict[str, Any]] = []
    for place in alignment.places:
        for variable in place.variables:
            for parent in causal.parents(variable):
                if parent in place.variables:
                    continue
                sources = ("input",) if parent == "input" else alignment.nodes_of(parent)
                found += [
                    {"source": source, "target": node, "variable": parent}
                    for source in sources
                    for node in place.nodes
                    if source != node
                ]
    found += [
        {"source": node, "target": "logits", "variable": causal.output} for node in alignment.nodes_of(causal.output)
    ]
    return found

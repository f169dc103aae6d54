"""Which paths are patched: edges by name, sets of them, or all from senders to receivers; and where each run starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.engine.schedule import Begin, Geometry
from headwater.localize.graph import Graph, head_of

if TYPE_CHECKING:
    from headwater.localize.patching.paths import PathPatchConfig

_GROUPS = ("all", "heads", "mlps")


@dataclass(frozen=True)
class Route:
    """Edges patched together: reader -> its sources (indices in the graph)."""

    edges: tuple[tuple[int, int], ...]

    @property
    def readers(self) -> dict[int, list[int]]:
        by_reader: dict[int, list[int]] = {}
        for source, reader in self.edges:
            by_reader.setdefault(reader, []).append(source)
        return dict(sorted(by_reader.items()))


def routes_of(graph: Graph, config: "PathPatchConfig") -> list[Route]:
    """What a config asks for. Raises MethodError for unknown names and for edges that do not exist."""
    if config.senders is None and config.receivers is None:
        if config.edges == "all":
            return [Route(((s, r),)) for s, r in graph.allowed.nonzero().tolist()]
        return [Route(tuple(graph.edge(name.strip()) for name in text.split("+"))) for text in config.edges]
    if config.senders is None or config.receivers is None or config.edges != "all":
        raise MethodError("path patching goes over edges, or from senders to receivers", wanted="one of the two")
    senders = _named(config.senders, graph.sources, "sender")
    receivers = _named(config.receivers, graph.readers, "receiver", graph)
    routes = []
    for sender in senders:
        edges = [(sender, reader) for reader in receivers if bool(graph.allowed[sender, reader])]
        routes += [Route((edge,)) for edge in edges] if config.apart else [Route(tuple(edges))] if edges else []
    if not routes:
        raise MethodError("no sender comes before any of the receivers", got=f"{config.senders} to {config.receivers}")
    return routes


def _named(wanted: str | tuple[str, ...], known: Sequence[str], what: str, graph: Graph | None = None) -> list[int]:
    names = (wanted,) if isinstance(wanted, str) else wanted
    found: list[int] = []
    for name in names:
        if what == "sender" and name in _GROUPS:
            kept = [
                i
                for i, one in enumerate(known)
                if name == "all" or (head_of(one) is not None if name == "heads" else one.startswith("m"))
            ]
        elif "*" in name:
            kept = [i for i, one in enumerate(known) if fnmatchcase(one, name)]
        elif graph is not None:
            kept = [graph.reader(name)]
        else:
            kept = [i for i, one in enumerate(known) if one == name]
        if not kept:
            raise MethodError(f"unknown {what}", got=repr(name), wanted=did_you_mean(name, known))
        found += kept
    return list(dict.fromkeys(found))


def begin_of(graph: Graph, geometry: Geometry, route: Route) -> Begin:
    """Where a route's run starts: at its earliest reader."""
    begins = [_begin(graph, geometry, reader) for reader in route.readers]
    first = min(begin.first for begin in begins)
    # attention before the MLP of its layer: not behind comes before behind
    earliest = min(begins, key=lambda begin: (begin.start, begin.behind))
    return Begin(earliest.start, earliest.behind, first)


def _begin(graph: Graph, geometry: Geometry, reader: int) -> Begin:
    name, last = graph.readers[reader], graph.n_layers - 1
    layer = graph.layer_of(name)
    only_last = layer > last or (layer == last and not name.endswith(("<k>", "<v>")))
    first = (geometry.length - 1 if only_last else geometry.shared) if geometry.cached else 0
    return Begin(layer, name.startswith("m"), first)

"""What a method's result says of a circuit graph's nodes and edges, whatever kind of result it is."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from headwater.bench.scoring.measures import NAN
from headwater.core.errors import MethodError
from headwater.localize.graph import Graph, head_of

if TYPE_CHECKING:
    from headwater.bench.mechanism import TrueMechanism


@dataclass(frozen=True, eq=False, kw_only=True)
class Reading:
    """The larger, the more it matters; NaN: not scored.

    nodes: [sources]; edges: [sources, readers], None where the method scores no edges; own: [sources, readers] bool,
    the circuit that the method itself chose, where it chose one.
    """

    nodes: Tensor
    edges: Tensor | None = None
    own: Tensor | None = None

    def scope(self, graph: Graph) -> str:
        """What is scored: "nodes, edges", "nodes", or "heads" in place of nodes where no MLP is."""
        there = torch.isfinite(self.nodes).tolist()
        known = [name for name, yes in zip(graph.sources, there, strict=True) if yes and name != "input"]
        nodes = "heads" if all(head_of(name) is not None for name in known) else "nodes"
        return nodes if self.edges is None else f"{nodes}, edges"


def read(result: Any, graph: Graph) -> Reading:
    """The scores that a result holds, by the size that its own method ranks by (absolute unless its facts say so).

    Edges: `tensors["scores"]` [sources, readers]. Nodes, whichever there is first: what `_NODES` says of the kind;
    `tables["nodes"]` with node and score; `tensors["node_scores"]` [sources]; else a node counts as its strongest edge
    out. A circuit's members score 1. Raises MethodError for a result that scores neither.
    """
    signed = result.facts.get("rank", "abs") == "signed"

    def sized(values: Tensor) -> Tensor:
        return values.double() if signed else values.double().abs()

    edges = result.tensors.get("scores")
    mask = result.tensors.get("mask")
    if edges is None and mask is not None and mask.shape == graph.allowed.shape:
        edges = mask.double()
    if edges is not None:
        if edges.shape != graph.allowed.shape:
            raise MethodError("scores of another graph", got=list(edges.shape), wanted=list(graph.allowed.shape))
        edges = sized(edges).masked_fill(~graph.allowed, NAN)
    nodes, table = None, result.tables.get("nodes")
    of_nodes = result.tensors.get("node_scores")
    if result.kind in _NODES:
        nodes = _at_nodes(graph, _NODES[result.kind](result, graph))
    elif table is not None and {"node", "score"} <= set(table.columns):
        nodes = sized(_at_nodes(graph, table.select("node", "score").iter_rows(), signed=signed))
    elif of_nodes is not None and of_nodes.shape == (len(graph.sources),):
        nodes = sized(of_nodes)
    elif edges is not None:
        nodes = edges.nan_to_num(-torch.inf).amax(dim=1)
    if nodes is None or bool(torch.isnan(nodes[1:]).all()):
        raise MethodError(
            "no scores of nodes to compare", got=f"a result of kind {result.kind!r}",
            wanted='tensors["scores"] [sources, readers], or a table "nodes" with node and score',
        )  # fmt: skip
    return Reading(nodes=nodes, edges=edges, own=_own_circuit(result))


def _own_circuit(result: Any) -> Tensor | None:
    """The circuit that a method itself chose; None for one that only ranks."""
    if result.kind == "search":
        return result.circuit().mask
    if result.kind == "cdt":
        return result.built().mask
    return result.tensors["mask"] if result.kind == "circuit" else None


def _at_nodes(graph: Graph, scores: Iterable[tuple[str, float | None]], *, signed: bool = False) -> Tensor:
    """[sources]: of several scores of a node (at several positions, say) the largest in size; names of no source are
    left out.
    """
    found = torch.full((len(graph.sources),), NAN, dtype=torch.float64)
    index = {name: at for at, name in enumerate(graph.sources)}
    for name, score in scores:
        if name in index and score is not None:
            before = float(found[index[name]])
            larger = score > before if signed else abs(score) > abs(before)
            if before != before or larger:
                found[index[name]] = float(score)
    return found


def _patched(result: Any, graph: Graph) -> Iterable[tuple[str, float]]:
    for row in result.tables["effects"].iter_rows(named=True):
        if row["kind"] == "head" and row["head"] is not None:
            yield f"a{row['layer']}.h{row['head']}", abs(row["effect"])
        elif row["kind"] == "mlp_out":
            yield f"m{row['layer']}", abs(row["effect"])


def _gaps(result: Any, graph: Graph) -> Iterable[tuple[str, float]]:
    yield from result.tables["nodes"].select("node", "gap").iter_rows()


def _votes(result: Any, graph: Graph) -> Iterable[tuple[str, float]]:
    yield from result.tables["components"].select("component", "strength").iter_rows()


def _steps(result: Any, graph: Graph) -> Iterable[tuple[str, float]]:
    """Heads by the largest effect of a step; a head that no trace went through did nothing."""
    for name in graph.sources:
        if head_of(name) is not None:
            yield name, 0.0
    for row in result.tables["steps"].iter_rows(named=True):
        yield f"a{row['layer']}.h{row['head']}", abs(row["effect"]) * row["share"]


_NODES = {"patching": _patched, "optimal_ablation": _gaps, "interference": _votes, "attention_tracing": _steps}


# --- beside what is known


def node_rows(reading: Reading, mechanism: "TrueMechanism") -> pl.DataFrame:
    """node, score, true of every scored node but `input`, the highest first."""
    live = dict(mechanism.tables["nodes"].select("node", "live").iter_rows())
    rows = [
        {"node": node, "score": score, "true": bool(live[node])}
        for node, score in zip(mechanism.graph.sources, reading.nodes.tolist(), strict=True)
        if node != "input" and score == score
    ]
    return pl.DataFrame(rows, schema=_NODE_ROWS).sort("score", descending=True, maintain_order=True)


def edge_rows(scores: Tensor, mechanism: "TrueMechanism", *, granularity: str | None = None) -> pl.DataFrame:
    """source, target, score, true of every scored edge, the highest first.

    granularity: "head" counts an edge into a head once, as the largest of its query, key and value; "part" counts all
    three. None: as the mechanism is known. Edges marked `unscored` there are left out.
    """
    graph, by_head = mechanism.graph, (granularity or granularity_of(mechanism)) == "head"
    mask = mechanism.tensors["mask"]
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for source, reader in (scored_edges(mechanism) & ~torch.isnan(scores)).nonzero().tolist():
        name = graph.readers[reader]
        key = (graph.sources[source], name.split("<")[0] if by_head else name)
        row = best.setdefault(key, {"source": key[0], "target": key[1], "score": -float("inf"), "true": False})
        row["score"] = max(row["score"], float(scores[source, reader]))
        row["true"] = row["true"] or bool(mask[source, reader])
    table = pl.DataFrame(list(best.values()), schema=_EDGE_ROWS)
    return table.sort("score", descending=True, maintain_order=True)


def granularity_of(mechanism: "TrueMechanism") -> str:
    """ "part" where it is known whether an edge goes into a query, key or value, else "head"."""
    return str(mechanism.facts.get("granularity", "part"))


def scored_edges(mechanism: "TrueMechanism") -> Tensor:
    """[sources, readers] bool: the edges of which it is known whether they are true."""
    unscored = mechanism.tensors.get("unscored")
    return mechanism.graph.allowed if unscored is None else mechanism.graph.allowed & ~unscored


def joined(mask: Tensor, mechanism: "TrueMechanism") -> Tensor:
    """A mask [sources, readers] at the mechanism's granularity: [sources, readers], or [sources, nodes that read]."""
    mask = mask & scored_edges(mechanism)
    if granularity_of(mechanism) != "head":
        return mask
    owners = [name.split("<")[0] for name in mechanism.graph.readers]
    names = list(dict.fromkeys(owners))
    return torch.stack([mask[:, [i for i, owner in enumerate(owners) if owner == name]].any(1) for name in names], 1)


_NODE_ROWS: dict[str, Any] = {"node": pl.String, "score": pl.Float64, "true": pl.Boolean}
_EDGE_ROWS: dict[str, Any] = {"source": pl.String, "target": pl.String, "score": pl.Float64, "true": pl.Boolean}

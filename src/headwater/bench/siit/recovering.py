"""Whether a localizing method ranks a known circuit's nodes and edges above all others."""

from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl

from headwater.bench.scoring.measures import auroc, precision_at_size
from headwater.bench.scoring.readings import edge_rows, node_rows, read
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.bench.mechanism import TrueMechanism

__all__ = ["Recovery", "auroc", "recovery"]


@register_result
class Recovery(Result):
    """`tables["nodes"]`: node, score, true. `tables["edges"]` (where the method scores edges): source, target, score,
    true, an edge into a head counted once, as the largest of its query, key and value.

    facts: method, node_auroc, edge_auroc (None where the method scores no edges), node_precision and edge_precision (of
    the k best, k as many as are true), n_nodes, n_edges, n_true_nodes, n_true_edges.
    """

    kind: ClassVar[str] = "recovery"
    main: ClassVar[str] = "nodes"


def recovery(result: Any, mechanism: "TrueMechanism") -> Recovery:
    """AUROC of a method's scores against a known mechanism, at the granularity of heads.

    `result`: of any method that scores nodes or edges (see `scoring.readings.read`). Heads are what InterpBench's
    models fix: an edge into any of a head's query, key and value counts as into the head. `input` counts among the
    edges' sources and not among the nodes; edges marked `unscored`, and nodes that the method does not score, are left
    out. Raises MethodError for any other result.
    """
    found = read(result, mechanism.graph)
    tables = {"nodes": node_rows(found, mechanism)}
    facts: dict[str, Any] = {
        "program": mechanism.facts["program"],
        "method": str(result.facts.get("method", result.kind)),
    }
    facts |= _measures("node", tables["nodes"])
    if found.edges is not None:
        tables["edges"] = edge_rows(found.edges, mechanism, granularity="head")
        facts |= _measures("edge", tables["edges"])
    else:
        facts["edge_auroc"] = None
    return Recovery(tables=tables, facts=facts, provenance=Provenance.collect())


def _measures(what: str, table: pl.DataFrame) -> dict[str, Any]:
    true = table["true"].to_list()
    k = sum(true)
    return {
        f"{what}_auroc": auroc(table["score"].to_list(), true),
        f"{what}_precision": precision_at_size(table["score"].to_list(), true) if k else None,
        f"n_{what}s": table.height,
        f"n_true_{what}s": k,
    }

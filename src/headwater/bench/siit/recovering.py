"""Whether a localizing method ranks a known circuit's nodes and edges above all others."""

from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch

from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.bench.mechanism import TrueMechanism


@register_result
class Recovery(Result):
    """`tables["nodes"]`: node, score, true. `tables["edges"]` (where the method scores edges): source, target, score,
    true, an edge into a head counted once, as the largest of its query, key and value.

    facts: method, node_auroc, edge_auroc (None where the method scores no edges), node_precision and edge_precision (of
    the k best, k as many as are true), n_nodes, n_edges, n_true_nodes, n_true_edges.
    """

    kind: ClassVar[str] = "recovery"
    main: ClassVar[str] = "nodes"


def auroc(scores: list[float], true: list[bool]) -> float:
    """The chance that a true one scores higher than a false one, ties counting half. NaN where one side is empty."""
    from scipy.stats import rankdata

    n_true, n_false = sum(true), len(true) - sum(true)
    if not n_true or not n_false:
        return float("nan")
    ranks = rankdata(scores)
    above = sum(rank for rank, yes in zip(ranks, true, strict=True) if yes) - n_true * (n_true + 1) / 2
    return float(above / (n_true * n_false))


def recovery(result: Any, mechanism: "TrueMechanism") -> Recovery:
    """AUROC of a method's absolute scores against a known mechanism, at the granularity of heads.

    `result`: an AttributionResult (`tables["nodes"]`: node, score; with `tensors["scores"]` edges too), or a
    PatchingResult of `head` and `mlp_out` sites (effects at all positions at once). Heads are what InterpBench's models
    fix: an edge into any of a head's query, key and value counts as into the head. `input` counts among the edges'
    sources and not among the nodes; edges marked `unscored` are left out. Raises MethodError for any other result.
    """
    truth = {row["node"]: bool(row["live"]) for row in mechanism.tables["nodes"].to_dicts() if row["node"] != "input"}
    scores = {node: 0.0 for node in truth}
    if result.kind == "attribution":
        for row in result.tables["nodes"].to_dicts():
            if row["node"] in scores:
                scores[row["node"]] = abs(float(row["score"]))
    elif result.kind == "patching":
        for row in result.tables["effects"].to_dicts():
            node = f"a{row['layer']}.h{row['head']}" if row["kind"] == "head" else f"m{row['layer']}"
            if node in scores:
                scores[node] = max(scores[node], abs(float(row["effect"])))
    else:
        raise MethodError(
            "no scores of nodes to compare", got=result.kind, wanted="an attribution or a patching result"
        )
    nodes = pl.DataFrame([{"node": node, "score": scores[node], "true": truth[node]} for node in truth])
    tables = {"nodes": nodes.sort("score", descending=True)}
    facts: dict[str, Any] = {
        "program": mechanism.facts["program"],
        "method": str(result.facts.get("method", result.kind)),
    }
    facts |= _measures("node", nodes)
    if "scores" in result.tensors:
        tables["edges"] = _edges(result.tensors["scores"], mechanism).sort("score", descending=True)
        facts |= _measures("edge", tables["edges"])
    else:
        facts["edge_auroc"] = None
    return Recovery(tables=tables, facts=facts, provenance=Provenance.collect())


def _edges(scores: torch.Tensor, mechanism: "TrueMechanism") -> pl.DataFrame:
    graph = mechanism.graph
    mask = mechanism.tensors["mask"]
    unscored = mechanism.tensors.get("unscored", torch.zeros_like(mask))
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for source, reader in (graph.allowed & ~unscored).nonzero().tolist():
        key = (graph.sources[source], graph.readers[reader].split("<")[0])
        row = best.setdefault(key, {"source": key[0], "target": key[1], "score": 0.0, "true": False})
        row["score"] = max(row["score"], abs(float(scores[source, reader])))
        row["true"] = row["true"] or bool(mask[source, reader])
    return pl.DataFrame(list(best.values()))


def _measures(what: str, table: pl.DataFrame) -> dict[str, Any]:
    true = table["true"].to_list()
    k = sum(true)
    best = table.sort("score", descending=True).head(k)["true"]
    return {
        f"{what}_auroc": auroc(table["score"].to_list(), true),
        f"{what}_precision": float(best.mean()) if k else None,  # type: ignore[arg-type]
        f"n_{what}s": table.height,
        f"n_true_{what}s": k,
    }

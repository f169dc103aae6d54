"""The table of methods against the truth: its kind of result, and how cells become a leaderboard."""

from collections.abc import Sequence
from typing import Any, ClassVar

import polars as pl

from headwater.bench.scoring.measures import NAN, clustered
from headwater.core.errors import MethodError
from headwater.core.results import Result, register_result

RANKED = ("edge_auroc", "node_auroc")
MEASURES = (
    *RANKED, "edge_ap", "node_ap", "edge_precision", "node_precision", "circuit_precision", "circuit_recall",
    "circuit_f1", "own_precision", "own_recall", "own_f1", "edge_spearman", "node_spearman",
)  # fmt: skip
COSTS = ("passes", "seconds")


@register_result
class TruthScores(Result):
    """Methods scored on models whose mechanism is known.

    `tables["leaderboard"]`, a row a method, the best first: method, what ("method" or "baseline"), options, scope
    ("nodes, edges", "nodes" or "heads"), models, cells, failed, then of every measure its mean over models and its 95%
    interval as `<measure>`, `<measure>_lo`, `<measure>_hi`; passes and seconds are means. `tables["scores"]`: the same,
    a row a method and measure: method, what, measure, value, lo, hi, models, cells. `tables["cells"]`: method, model,
    seed, scope, every measure, own_edges, forward, backward, passes, seconds. `tables["failed"]`: method, model, seed,
    error. `tables["unscored"]`: method, why. `tables["models"]`: model, origin, seed, nodes, true_nodes, edges,
    true_edges, n (pairs searched), needed, outside (of `interchange`), why_not (why it could not be scored).

    Measures: auroc, ap (average precision) and precision (of the k best, k as many as are true) of nodes and edges;
    circuit_precision, _recall, _f1 of the circuit that is cut from the scores at the true number of edges and pruned;
    own_* of the circuit that the method chose itself; spearman: rank correlation with the share of answers that
    interchanging the node or edge changes. passes: forward and backward passes of one pair, a pair.
    """

    kind: ClassVar[str] = "truth_scores"
    main: ClassVar[str] = "leaderboard"

    def value(self, method: str, measure: str = "edge_auroc") -> tuple[float, float, float]:
        """(mean, low, high) of one measure of one method. Raises MethodError where there is none."""
        rows = self.tables["scores"].filter(method=method, measure=measure)
        if rows.height != 1:
            known = ", ".join(sorted(set(self.tables["scores"]["method"].to_list())))
            raise MethodError("no such score", got=f"{measure} of {method}", wanted=f"methods: {known}")
        row = rows.row(0, named=True)
        return row["value"], row["lo"], row["hi"]


_TEXT: dict[str, Any] = {"method": pl.String, "model": pl.String, "seed": pl.Int64}
CELLS: dict[str, Any] = {
    **_TEXT, "scope": pl.String, **dict.fromkeys(MEASURES, pl.Float64), "own_edges": pl.Int64,
    **dict.fromkeys(("forward", "backward", *COSTS), pl.Float64),
}  # fmt: skip
FAILED: dict[str, Any] = {**_TEXT, "error": pl.String}
UNSCORED: dict[str, Any] = {"method": pl.String, "why": pl.String}
MODELS: dict[str, Any] = {
    "model": pl.String, "origin": pl.String, "seed": pl.Int64,
    **dict.fromkeys(("nodes", "true_nodes", "edges", "true_edges", "n"), pl.Int64),
    **dict.fromkeys(("needed", "outside"), pl.Float64), "why_not": pl.String,
}  # fmt: skip
_SCORES: dict[str, Any] = {
    "method": pl.String, "what": pl.String, "measure": pl.String,
    **dict.fromkeys(("value", "lo", "hi"), pl.Float64), "models": pl.Int64, "cells": pl.Int64,
}  # fmt: skip


def summed_up(
    cells: pl.DataFrame, failed: pl.DataFrame, methods: Sequence[tuple[str, str, str]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(leaderboard, scores) of the cells. methods: (name, "method" or "baseline", options as text).

    A mean is over models, of each one's mean over seeds; its interval draws whole models. Cells that failed are counted
    and are in no mean.
    """
    board: list[dict[str, Any]] = []
    long: list[dict[str, Any]] = []
    for name, what, options in methods:
        own = cells.filter(method=name)
        lost = failed.filter(method=name).height
        row: dict[str, Any] = {
            "method": name, "what": what, "options": options, "scope": _scope(own), "models": own["model"].n_unique(),
            "cells": own.height, "failed": lost,
        }  # fmt: skip
        for measure in (*MEASURES, *COSTS):
            value, low, high, models = clustered(_by_model(own, measure))
            row |= {measure: _or_none(value)}
            if measure in COSTS:
                continue
            row |= {f"{measure}_lo": _or_none(low), f"{measure}_hi": _or_none(high)}
            if models:
                long.append({
                    "method": name, "what": what, "measure": measure, "value": value, "lo": _or_none(low),
                    "hi": _or_none(high), "models": models, "cells": own[measure].count(),
                })  # fmt: skip
        board.append(row)
    board.sort(key=lambda row: [-1.0 if row[key] is None else row[key] for key in RANKED], reverse=True)
    return pl.DataFrame(board, schema=_board_schema()), pl.DataFrame(long, schema=_SCORES)


def _board_schema() -> dict[str, Any]:
    schema: dict[str, Any] = dict.fromkeys(("method", "what", "options", "scope"), pl.String)
    schema |= dict.fromkeys(("models", "cells", "failed"), pl.Int64)
    for measure in MEASURES:
        schema |= dict.fromkeys((measure, f"{measure}_lo", f"{measure}_hi"), pl.Float64)
    return schema | dict.fromkeys(COSTS, pl.Float64)


def _scope(cells: pl.DataFrame) -> str | None:
    """The widest that was scored on any model."""
    found = set(cells["scope"].drop_nulls().to_list())
    return next((scope for scope in ("nodes, edges", "heads, edges", "nodes", "heads") if scope in found), None)


def _by_model(cells: pl.DataFrame, measure: str) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for model, value in cells.select("model", measure).iter_rows():
        values.setdefault(model, []).append(NAN if value is None else float(value))
    return values


def _or_none(value: float) -> float | None:
    return value if value == value else None

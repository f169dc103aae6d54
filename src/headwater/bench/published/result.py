"""The result that every published benchmark gives."""

from collections.abc import Sequence
from typing import Any, ClassVar

import polars as pl

from headwater.behavior.metrics import interval
from headwater.core.results import Result, register_result

SCHEMA = {
    "task": pl.String,
    "method": pl.String,
    "site": pl.String,
    "position": pl.String,
    "measure": pl.String,
    "value": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.Int64,
}


@register_result
class PublishedScores(Result):
    """Scores on a published benchmark.

    tables: `scores`: task, method, site, position, measure, value, lo, hi, n. facts: benchmark, kept, dropped {reason:
    count}, and accuracy of the model without any intervention where the benchmark filters by it.
    """

    kind: ClassVar[str] = "published_scores"
    main: ClassVar[str | None] = "scores"

    def value(self, measure: str, method: str, **where: str) -> float:
        """One score; `where` narrows by site, position or task (the first row that fits)."""
        frame = self.tables["scores"].filter((pl.col("measure") == measure) & (pl.col("method") == method))
        for column, wanted in where.items():
            frame = frame.filter(pl.col(column) == wanted)
        return float(frame["value"][0]) if frame.height else float("nan")


def score_row(
    task: str, method: str, site: str, position: str, measure: str, values: Sequence[float], *, share: bool = True
) -> dict[str, Any]:
    """A row of the table: mean and interval over pairs (Wilson's for shares, bootstrap for the rest)."""
    value, lo, hi = interval(list(values), share=share)
    return {
        "task": task,
        "method": method,
        "site": site,
        "position": position,
        "measure": measure,
        "value": value,
        "lo": lo,
        "hi": hi,
        "n": len(values),
    }

"""Charts of the routes, decompositions, codes and traces of the search methods."""

from typing import Any

from headwater.report.charts.parts import Row, intervals, nothing, rows, themed
from headwater.report.charts.scores import attribution
from headwater.report.words import estimate, number

_MOST = 24


def flow_routes(result: Any) -> Any:
    """How much of the prediction came through each node, by layer and head."""
    return attribution(result)


def cdt(result: Any) -> Any:
    """How relevant each node is to the logits, by layer and head."""
    return attribution(result)


def head_codes(result: Any) -> Any:
    """How well each head's codes tell prompts from counterfactuals, by layer and head."""
    return attribution(result)


def attention_tracing(result: Any) -> Any:
    """The steps that most prompts share, each by what knocking it out does, beside the same of another head."""
    found = rows(
        result.tables.get("steps"),
        "layer", "head", "query_role", "source_role", "share", "effect", "lo", "hi", "control", "n",
    )  # fmt: skip
    shown = [_step(row) for row in found if row["effect"] is not None][:_MOST]
    if not shown:
        return themed(nothing())
    return themed(intervals(shown, x="effect of knocking the step out (share of the metric's way)"))


def _step(row: Row) -> Row:
    label = f"a{row['layer']}.h{row['head']}: {row['query_role']} reads {row['source_role']}"
    said = estimate(row["effect"], row["lo"], row["hi"])
    return {
        "label": label,
        "value": row["effect"],
        "lo": row["lo"],
        "hi": row["hi"],
        "tip": f"{label}: {said}, another head {number(row['control'])}, prompts {number(row['n'])}",
    }

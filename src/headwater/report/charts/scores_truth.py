"""Chart of methods against models whose mechanism is known."""

from typing import Any

from headwater.report.charts.parts import Row, intervals, rows, themed
from headwater.report.theme import color
from headwater.report.words import number

_PANELS = {"edge_auroc": "edges: AUROC", "node_auroc": "nodes: AUROC"}


def truth_scores(result: Any) -> Any:
    """AUROC of edges and of nodes with their intervals, the best method first; chance is at one half."""
    columns = ("method", "what", "measure", "value", "lo", "hi", "models", "cells")
    found = rows(result.tables.get("scores"), *columns)
    shown: list[Row] = []
    for measure, panel in _PANELS.items():
        own = [row for row in found if row["measure"] == measure and row["value"] is not None]
        for row in sorted(own, key=lambda row: -row["value"]):
            shown.append({
                "label": row["method"], "value": row["value"], "lo": row["lo"], "hi": row["hi"], "group": panel,
                "reference": 0.5, "hue": "baseline" if row["what"] == "baseline" else "method",
                "tip": f"{row['method']}, {panel} {number(row['value'])} [{number(row['lo'])}, {number(row['hi'])}], "
                f"{number(row['models'])} models, {number(row['cells'])} runs",
            })  # fmt: skip
    hues = {"method": color("pos"), "baseline": color("null")}
    return themed(intervals(shown, x="AUROC", hues=hues, grouped=True, domain=(0.0, 1.0)))

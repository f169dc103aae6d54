"""Charts of ground truth: a known mechanism's edges, what interchanging each edge does, how faithful compression is."""

from typing import Any

from headwater.report.charts.parts import Row, heat, intervals, nothing, rows, themed
from headwater.report.words import number


def mechanism(result: Any) -> Any:
    """Who reads what from whom: an edge that can matter in full colour, one that carries what never differs in half."""
    cells: dict[tuple[str, str], Row] = {}
    for row in rows(result.tables.get("edges"), "source", "target", "variable", "live"):
        at = (row["source"], row["target"])
        cell = cells.setdefault(
            at, {"x": row["target"], "y": row["source"], "value": 0.0, "tip": f"{at[0]} to {at[1]}:"}
        )
        cell["value"] = max(cell["value"], 1.0 if row["live"] else 0.4)
        cell["tip"] += f" {row['variable']}" + ("" if row["live"] else " (never differs)")
    if not cells:
        return themed(nothing())
    return themed(heat(list(cells.values()), x="reads", y="writes", legend="carries", extreme=1.0, step=(24, 18)))


def interchange(result: Any) -> Any:
    """The share of pairs whose answer changes when an edge carries its counterfactual value."""
    found = [row for row in rows(result.tables.get("edges"), "source", "target", "live", "changed", "effect")]
    cells = [
        {
            "x": row["target"],
            "y": row["source"],
            "value": row["changed"],
            "tip": f"{row['source']} to {row['target']}: {number(row['changed'])} of the answers change"
            + (", in the circuit" if row["live"] else ", outside the circuit"),
        }
        for row in found
        if row["changed"] is not None
    ]
    if not cells:
        return themed(nothing())
    return themed(heat(cells, x="reads", y="writes", legend="answers changed", extreme=1.0, step=(24, 18)))


def compression(result: Any) -> Any:
    """The cosine of the narrow stream, read back, with the wide one, site by site."""
    drawn = [
        {
            "label": row["site"],
            "value": row["cosine"],
            "lo": row["cosine"],
            "hi": row["cosine"],
            "tip": f"{row['site']}: cosine {number(row['cosine'])}, error {number(row['error'])}",
        }
        for row in rows(result.tables.get("streams"), "site", "cosine", "error")
        if row["cosine"] is not None
    ]
    return themed(intervals(drawn, x="cosine with the wide stream"))

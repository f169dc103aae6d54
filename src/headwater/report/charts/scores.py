"""Charts of an AttributionResult: every node's score on a layer by head map, and the strongest nodes."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import Row, data, heat, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import node_parts, number, strongest


def node_rows(result: Any) -> list[Row]:
    """The rows of `nodes` with the parts of each node's name; where there are only edges, what leaves each node is
    summed.
    """
    found = rows(result.tables.get("nodes"), "node", "layer", "score")
    if not found:
        totals: dict[str, float] = {}
        for row in rows(result.tables.get("edges"), "source", "target", "score"):
            totals[row["source"]] = totals.get(row["source"], 0.0) + (row["score"] or 0.0)
        found = [{"node": node, "score": score} for node, score in totals.items()]
    return [row | node_parts(str(row["node"])) for row in found if row["score"] is not None]


def color_end(drawn: list[Row]) -> float:
    """The score at which the map's colours end: the largest of a head, so that one strong MLP pales none."""
    heads = [abs(row["score"]) for row in drawn if row["sort"] == "head"]
    return max(heads, default=0.0) or max((abs(row["score"]) for row in drawn), default=0.0)


def attribution(result: Any) -> Any:
    """Heads by layer and head, MLPs as a column of their own, one colour scale."""
    found = node_rows(result)
    # the map has one cell a head: its queries, keys and values have rows of their own, and so have positions
    whole = [row for row in found if row["sort"] in ("head", "mlp") and row["port"] is None]
    drawn = list({row["node"]: row for row in sorted(whole, key=lambda row: abs(row["score"]))}.values())
    if not drawn:
        return themed(strongest_nodes(result, finished=False))
    extreme = color_end(drawn)
    layers = sorted({row["layer"] for row in drawn})
    heads = sorted((row for row in drawn if row["sort"] == "head"), key=lambda row: (row["layer"], row["head"]))
    mlps = sorted((row for row in drawn if row["sort"] == "mlp"), key=lambda row: row["layer"])
    width = 34 if len({row["head"] for row in heads}) <= 16 else 20
    maps: list[Any] = [
        heat(
            [_cell(row, name(row)) for row in group],
            x=axis,
            y="layer",
            extreme=extreme,
            legend="score",
            step=(width, 13),
        )
        for group, axis, name in ((heads, "head", lambda row: f"h{row['head']}"), (mlps, " ", lambda _: "MLP"))
        if group
    ]
    if len(maps) > 1:
        maps[1].encoding.y.axis = None
    for chart in maps:  # both maps show every layer, so that a row is one layer across them
        chart.encoding.y.scale = alt.Scale(domain=[str(layer) for layer in reversed(layers)])
        chart.encoding.y.sort = alt.Undefined
    return themed(alt.hconcat(*maps, spacing=4))


def _cell(row: Row, x: str) -> Row:
    return {"x": x, "y": str(row["layer"]), "value": row["score"], "tip": f"{row['node']}: {number(row['score'])}"}


def strongest_nodes(result: Any, n: int = 20, *, finished: bool = True) -> Any:
    """The `n` nodes with the largest absolute score, as bars."""
    best = strongest(node_rows(result), "score", n)
    if not best:
        return themed(nothing()) if finished else nothing()
    shown = [
        {"node": row["node"], "score": row["score"], "tip": f"{row['node']}: {number(row['score'])}"} for row in best
    ]
    shade = alt.condition("datum.score >= 0", alt.value(color("pos")), alt.value(color("neg")))
    chart = (
        alt.Chart(data(shown))
        .mark_bar(height=11)
        .encode(
            x=alt.X("score:Q", title="score: change of the metric that this node carries, corrupt to clean"),
            y=alt.Y("node:N", sort=None, title=None),
            color=shade,
            description="tip:N",
            tooltip="tip:N",
        )
        .properties(width=440, height=alt.Step(17))
    )
    return themed(chart) if finished else chart

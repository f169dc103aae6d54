"""Charts of a Circuit and of how well it stands: the graph, the faithfulness curve, the null."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from headwater.report.charts.parts import Row, data, nothing, rows, themed
from headwater.report.layout import place
from headwater.report.theme import color
from headwater.report.words import estimate, finite, interval, middle_95, number, percent

NULLS = {
    "edges": "random circuits of its size",
    "heads": "the circuit with its heads renamed at random",
    "random_weights": "the same method on random weights",
}


def circuit(result: Any) -> Any:
    """The strongest edges on layer and head axes (the report draws the same layout with curves)."""
    layout = place(result)
    if not layout.nodes:
        return themed(nothing("a circuit without nodes"))
    at = {node.name: node for node in layout.nodes}
    lines = [
        {
            "x": at[edge.source].x,
            "y": -at[edge.source].y,
            "x2": at[edge.target].x,
            "y2": -at[edge.target].y,
            "size": 0.6 + 4 * edge.strength,
            "sign": "raises the metric" if edge.score >= 0 else "lowers the metric",
            "tip": edge.tip,
        }
        for edge in layout.edges
    ]
    dots = [{"x": node.x, "y": -node.y, "name": node.name, "tip": node.tip} for node in layout.nodes]
    plain = {"axis": None, "scale": alt.Scale(zero=False, nice=False, padding=24)}
    signs = alt.Scale(domain=["raises the metric", "lowers the metric"], range=[color("pos"), color("neg")])
    drawn = (
        alt.Chart(data(lines))
        .mark_rule(opacity=0.55)
        .encode(
            x=alt.X("x:Q", **plain),
            y=alt.Y("y:Q", **plain),
            x2="x2:Q",
            y2="y2:Q",
            strokeWidth=alt.StrokeWidth("size:Q", scale=None),
            color=alt.Color("sign:N", scale=signs, legend=alt.Legend(title=None, orient="top")),
            description="tip:N",
            tooltip="tip:N",
        )
    )
    base = alt.Chart(data(dots)).encode(x="x:Q", y="y:Q", description="tip:N", tooltip="tip:N")
    nodes = base.mark_point(filled=True, size=260, color=color("panel"), stroke=color("line"), opacity=1)
    names = base.mark_text(fontSize=9).encode(text="name:N")
    return themed((drawn + nodes + names).properties(width=layout.width, height=layout.height))


def faithfulness(result: Any, null: Any = None, size: float | None = None) -> Any:
    """Faithfulness over circuit size with its interval.

    `null`: a NullResult, whose random circuits are shown as a band; `size`: the chosen circuit's share of all edges.
    """
    found = rows(result.tables.get("curve"), "fraction", "edges", "faithfulness", "lo", "hi", "metric")
    found = [row for row in found if row["faithfulness"] is not None and (row["fraction"] or 0) > 0]
    if not found:
        return themed(nothing())
    shown = [
        row
        | {"percent": 100 * row["fraction"]}
        | {
            "tip": f"{percent(row['fraction'])} of the edges ({number(row['edges'])}): "
            f"{estimate(row['faithfulness'], row['lo'], row['hi'])}"
        }
        for row in found
    ]
    sizes = [100 * row["fraction"] for row in found]
    x = alt.X(
        "percent:Q",
        title="edges kept, % of all (log scale)",
        scale=alt.Scale(type="log", nice=False),
        axis=_log_axis(sizes),
    )
    y = alt.Y("faithfulness:Q", title="faithfulness", scale=alt.Scale(zero=True, nice=True))
    base = alt.Chart(data(shown)).encode(x=x, y=y, description="tip:N", tooltip="tip:N")
    layers: list[Any] = []
    seen = size is not None and min(sizes) <= 100 * size <= max(sizes)
    if (band := null_band(null)) is not None:
        if seen:  # the null circuits have the circuit's size, so they stand there and nowhere else
            bar = alt.Chart(data([band | {"percent": 100 * (size or 0)}])).mark_rule(color=color("null"), strokeWidth=8)
            layers.append(bar.encode(x=x, y="lo:Q", y2="hi:Q", description="tip:N"))
        else:
            area = alt.Chart(data([band])).mark_rect(color=color("band"), opacity=0.5)
            layers.append(area.encode(y="lo:Q", y2="hi:Q", description="tip:N"))
    ends = [{"at": 0.0, "tip": "0: as the counterfactual run"}, {"at": 1.0, "tip": "1: as the whole model"}]
    layers.append(
        alt.Chart(data(ends)).mark_rule(color=color("null"), strokeDash=[3, 3]).encode(y="at:Q", description="tip:N")
    )
    if seen and size is not None:
        chosen = [{"percent": 100 * size, "tip": f"the circuit: {percent(size)} of the edges"}]
        mark = alt.Chart(data(chosen)).mark_rule(color=color("neg"), strokeDash=[4, 3])
        layers.append(mark.encode(x=x, description="tip:N"))
    if any(row["lo"] is not None for row in shown):
        layers.append(
            base.mark_area(color=color("pos"), opacity=0.16).encode(
                y="lo:Q", y2="hi:Q", description=alt.Undefined, tooltip=alt.Undefined
            )
        )
    layers.append(base.mark_line(color=color("pos"), strokeWidth=2).encode(description=alt.Undefined))
    layers.append(base.mark_point(color=color("pos"), filled=True, size=48, opacity=1))
    return themed(alt.layer(*layers).properties(width=520, height=240))


def _log_axis(sizes: Sequence[float]) -> alt.Axis:
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if min(sizes) <= t <= max(sizes)]
    return alt.Axis(values=ticks, grid=False, format="~g")


def draw_rows(null: Any) -> list[Row]:
    """The draws of a NullResult that hold a number."""
    if null is None:
        return []
    return [row for row in rows(null.tables.get("draws"), "kind", "draw", "value") if row["value"] is not None]


def null_band(null: Any) -> Row | None:
    """Where the middle 95% of the draws lie, for the kind of null that reaches highest, with the hover text."""
    drawn: dict[str, list[float]] = {}
    for row in draw_rows(null):
        drawn.setdefault(str(row["kind"]), []).append(row["value"])
    bands = [(ends, kind) for kind, values in drawn.items() if (ends := middle_95(values))]
    if not bands:
        return None
    (lo, hi), kind = max(bands, key=lambda band: band[0][1])
    name = NULLS.get(kind, kind.replace("_", " "))
    tip = f"{name}: 95% of {len(drawn[kind])} draws lie in {interval(lo, hi)}"
    return {"lo": lo, "hi": hi, "name": name, "tip": tip}


def null(result: Any) -> Any:
    """How often the null reached which value, one panel a kind; the observed value as a line through all of them."""
    found = draw_rows(result)
    if not found:
        return themed(nothing("a null without draws"))
    observed = finite(result.facts.get("observed"))
    stacked: list[Row] = []
    every = [row["value"] for row in found] + ([observed] if observed is not None else [])
    width = max((max(every) - min(every)) / 80, 1e-3)
    for kind in dict.fromkeys(row["kind"] for row in found):
        bins: dict[int, int] = {}
        for row in (row for row in found if row["kind"] == kind):
            at = round((row["value"] - min(every)) / width)
            bins[at] = bins.get(at, 0) + 1
        name = NULLS.get(str(kind), str(kind).replace("_", " "))
        for at, n in sorted(bins.items()):
            value = min(every) + at * width
            stacked.append(
                {
                    "floor": 0,
                    "kind": name,
                    "from": value - width / 2,
                    "to": value + width / 2,
                    "n": n,
                    "observed": observed,
                }
            )
            stacked[-1]["tip"] = f"{name}: {n} near {number(value)}"
    bars = (
        alt.Chart()
        .mark_rect(color=color("null"))
        .encode(
            x=alt.X("from:Q", title="value under the null (line: observed)", scale=alt.Scale(zero=False)),
            x2="to:Q",
            y=alt.Y("n:Q", title="draws", axis=alt.Axis(tickMinStep=1, tickCount=3)),
            y2="floor:Q",
            description="tip:N",
            tooltip="tip:N",
        )
    )
    layers = [bars]
    if observed is not None:
        layers.append(alt.Chart().mark_rule(color=color("pos"), strokeWidth=2.5).encode(x="mean(observed):Q"))
    header = alt.Header(orient="top", labelAnchor="start", title=None, labelPadding=2)
    chart = alt.layer(*layers, data=data(stacked)).properties(width=520, height=70)
    return themed(
        chart.facet(
            row=alt.Row("kind:N", sort=list(dict.fromkeys(row["kind"] for row in stacked)), header=header), spacing=12
        ).resolve_scale(y="independent")
    )

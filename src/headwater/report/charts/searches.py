"""Charts of what searches and their checks give: the circuits a search went through, completeness by subset, gaps."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import data, intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import number, visible


def search(result: Any) -> Any:
    """Faithfulness of a search's circuits over their edges; hover has the setting and the passes spent."""
    found = rows(result.tables.get("curve"), "setting", "edges", "faithfulness", "forward", "backward", "value")
    found = [row for row in found if row["faithfulness"] is not None]
    if not found:
        return themed(nothing("a search that kept no circuit"))
    for row in found:
        spent = f"{number(row['forward'])} forwards and {number(row['backward'])} backwards of one pair"
        row["tip"] = (
            f"{number(row['edges'])} edges (setting {number(row['setting'])}): faithfulness "
            f"{number(row['faithfulness'])}, after {spent}"
        )
    base = alt.Chart(data(found)).encode(
        x=alt.X("edges:Q", title="edges kept", scale=alt.Scale(type="symlog", nice=False)),
        y=alt.Y("faithfulness:Q", title="faithfulness", scale=alt.Scale(zero=True, nice=True)),
        description="tip:N",
        tooltip="tip:N",
    )
    ends = [{"at": 0.0, "tip": "0: every edge ablated"}, {"at": 1.0, "tip": "1: as the whole model"}]
    rule = alt.Chart(data(ends)).mark_rule(color=color("null"), strokeDash=[3, 3])
    line = base.mark_line(color=color("pos"), strokeWidth=2).encode(description=alt.Undefined)
    dots = base.mark_point(color=color("pos"), filled=True, size=48, opacity=1)
    return themed(alt.layer(rule.encode(y="at:Q", description="tip:N"), line, dots).properties(width=520, height=240))


def incompleteness(result: Any) -> Any:
    """The circuit without each subset against the model without it: on the diagonal where the circuit is complete."""
    found = rows(result.tables.get("subsets"), "kind", "nodes", "circuit", "model", "incompleteness")
    found = [row for row in found if row["circuit"] is not None and row["model"] is not None]
    if not found:
        return themed(nothing("no subsets"))
    for row in found:
        gap = f"{number(row['incompleteness'])} apart"
        row["tip"] = f"{row['kind']}, without {row['nodes'] or 'nothing'}: {gap}"
    ends = [row[key] for row in found for key in ("circuit", "model")]
    line = [{"model": at, "circuit": at} for at in (min(ends), max(ends))]
    diagonal = alt.Chart(data(line)).mark_line(color=color("null"), strokeDash=[3, 3])
    hue = alt.Color(
        "kind:N",
        legend=alt.Legend(title=None, orient="top"),
        scale=alt.Scale(
            domain=["whole", "random", "greedy"],
            range=[color("line"), color("pos"), color("neg")],
        ),
    )
    axes = {
        "x": alt.X("model:Q", title="the model without the subset", scale=alt.Scale(zero=False)),
        "y": alt.Y("circuit:Q", title="the circuit without it", scale=alt.Scale(zero=False)),
    }
    dots = alt.Chart(data(found)).mark_point(filled=True, size=52, opacity=0.9)
    dots = dots.encode(**axes, color=hue, description="tip:N", tooltip="tip:N")
    return themed(alt.layer(diagonal.encode(**axes), dots).properties(width=360, height=300))


def optimal_ablation(result: Any) -> Any:
    """The nodes whose best constant still costs most."""
    found = rows(result.tables.get("nodes"), "node", "gap")
    found = sorted((row for row in found if row["gap"] is not None), key=lambda row: -row["gap"])[:25]
    shown = [
        {
            "label": visible(str(row["node"])),
            "value": row["gap"],
            "lo": row.get("lo"),
            "hi": row.get("hi"),
            "tip": f"{row['node']}: the loss is {number(row['gap'])} higher with its best constant",
        }
        for row in found
    ]
    return themed(intervals(shown, x="loss with the best constant, over the model's"))

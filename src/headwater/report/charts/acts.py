"""Charts over actions: steering curves."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import WIDTH, Row, data, nothing, rows, themed
from headwater.report.theme import CATEGORIES
from headwater.report.words import number


def steering_curve(result: Any) -> Any:
    """Strength against what an action does, and beside it against the perplexity of plain text; the strength that was
    chosen is filled."""
    found = rows(result.tables.get("curve"), "action", "strength", "value", "lo", "hi", "perplexity", "chosen")
    found = [row for row in found if None not in (row["action"], row["strength"])]
    metric = str(result.facts.get("metric") or "metric").replace("_", " ")
    panels: list[Any] = []
    names = list(dict.fromkeys(str(row["action"]) for row in found))
    for what, title, ends in (
        ("value", f"{metric}, toward the goal", ("lo", "hi")),
        ("perplexity", "perplexity of plain text", ("perplexity_lo", "perplexity_hi")),
    ):
        shown: list[Row] = []
        for row in found:
            value = row.get(what)
            if value is None or (what == "perplexity" and value <= 0):
                continue
            tip = f"{row['action']}, strength {number(row['strength'])}: {title} {number(value)}"
            if None not in (row.get(ends[0]), row.get(ends[1])):
                tip += f" ({number(row[ends[0]])} to {number(row[ends[1]])})"
            mark = "chosen" if row["chosen"] else "tried"
            shown.append(
                {"strength": row["strength"], "value": value, "action": str(row["action"]), "mark": mark, "tip": tip}
            )
        if not shown:
            continue
        scale = alt.Scale(type="log") if what == "perplexity" else alt.Scale(zero=False)
        base = alt.Chart(data(shown)).encode(
            x=alt.X("strength:Q", title="strength", scale=alt.Scale(type="symlog", constant=0.5)),
            y=alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=5)),
            color=alt.Color(
                "action:N",
                scale=alt.Scale(domain=names, range=CATEGORIES),
                legend=alt.Legend(title=None, orient="top", columns=2, labelLimit=260) if len(names) > 1 else None,
            ),
            description="tip:N",
            tooltip="tip:N",
        )
        fill = alt.FillOpacity("mark:N", scale=alt.Scale(domain=["chosen", "tried"], range=[1.0, 0.15]), legend=None)
        both = base.mark_line(strokeWidth=1.5) + base.mark_point(size=40, filled=True, stroke=None).encode(
            fillOpacity=fill
        )
        panels.append(both.properties(width=(WIDTH - 120) // 2, height=200))
    return themed(alt.hconcat(*panels, spacing=24)) if panels else themed(nothing())

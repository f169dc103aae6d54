"""Charts over actions: steering curves."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import WIDTH, Row, data, nothing, rows, themed
from headwater.report.theme import CATEGORIES
from headwater.report.words import number


def steering_curve(result: Any) -> Any:
    """Strength against what an action does, and beside it against the perplexity of plain text; a ring stands around
    the strength that was chosen on training pairs, a dashed line where nothing is done."""
    found = rows(result.tables.get("curve"), "action", "strength", "value", "lo", "hi", "perplexity", "chosen")
    usual = next((row for row in found if row["strength"] is None), None)
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
            lo, hi = row.get(ends[0]), row.get(ends[1])
            shown.append(
                {
                    "strength": row["strength"],
                    "value": value,
                    "lo": value if lo is None else lo,
                    "hi": value if hi is None else hi,
                    "action": str(row["action"]),
                    "chosen": bool(row["chosen"]),
                    "tip": tip,
                }
            )
        if not shown:
            continue
        log = what == "perplexity" and all(row["lo"] > 0 for row in shown)
        scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
        at = sorted({row["strength"] for row in shown})
        base = alt.Chart(data(shown)).encode(
            x=alt.X(
                "strength:Q",
                title="strength",
                scale=alt.Scale(type="symlog", constant=0.5),
                axis=alt.Axis(values=at, grid=False, format="~g", labelOverlap="greedy"),
            ),
            color=alt.Color(
                "action:N",
                scale=alt.Scale(domain=names, range=CATEGORIES),
                legend=alt.Legend(title=None, orient="top", columns=2, labelLimit=260, symbolOpacity=1)
                if len(names) > 1
                else None,
            ),
            description="tip:N",
            tooltip="tip:N",
        )
        y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=4))
        spread = base.mark_rule(strokeWidth=1.5, opacity=0.35).encode(y=alt.Y("lo:Q", scale=scale), y2="hi:Q")
        line = base.mark_line(strokeWidth=1.5).encode(y=y)
        tried = base.mark_point(size=30, filled=True, opacity=1).encode(y=y)
        ring = base.transform_filter("datum.chosen").mark_point(size=130, strokeWidth=2, opacity=1).encode(y=y)
        layers = [line, spread, tried, ring]
        if usual is not None and usual.get(what) is not None and (usual[what] > 0 or not log):
            tip = f"nothing is done: {title} {number(usual[what])}"
            still = alt.Chart(data([{"value": usual[what], "tip": tip}])).mark_rule(strokeDash=[4, 3], opacity=0.6)
            layers.insert(0, still.encode(y=alt.Y("value:Q", scale=scale), description="tip:N", tooltip="tip:N"))
        panels.append(alt.layer(*layers).properties(width=(WIDTH - 120) // 2, height=200))
    return themed(alt.hconcat(*panels, spacing=24)) if panels else themed(nothing())

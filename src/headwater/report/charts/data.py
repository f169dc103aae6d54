"""Charts over training data: counts of pairs, linear relational embeddings."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import WIDTH, Row, data, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import number

_BARS = 30  # pairs that are named


def counts(result: Any) -> Any:
    """The most frequent pairs, summed over the ranges of steps; beside each how many documents hold it."""
    total: dict[tuple[str, str], list[int]] = {}
    for row in rows(result.tables.get("pairs"), "subject", "object", "n", "documents"):
        if row["n"] is None:
            continue
        own = total.setdefault((str(row["subject"]), str(row["object"])), [0, 0])
        own[0] += row["n"]
        own[1] += row["documents"] or 0
    ranked = sorted(total.items(), key=lambda item: -item[1][0])[:_BARS]
    if not ranked:
        return themed(nothing())
    shown: list[Row] = [
        {"label": f"{s} · {o}", "n": n, "tip": f"{s}, {o}: {n} together, in {documents} documents"}
        for (s, o), (n, documents) in ranked
    ]
    bars = alt.Chart(data(shown)).mark_bar(color=color("pos"), height=9)
    chart = bars.encode(
        x=alt.X("n:Q", title="together", scale=alt.Scale(type="symlog"), axis=alt.Axis(tickCount=6)),
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=300)),
        description="tip:N",
        tooltip="tip:N",
    )
    return themed(chart.properties(width=WIDTH - 200, height=alt.Step(15)))


def lre(result: Any) -> Any:
    """Faithfulness over beta and causality over rank, a line a layer."""
    found = rows(result.tables.get("sweep"), "layer", "what", "setting", "value", "lo", "hi")
    found = [row for row in found if None not in (row["layer"], row["what"], row["setting"], row["value"])]
    if not found:
        return themed(nothing())
    panels: list[Any] = []
    for what, along in (("faithfulness", "beta"), ("causality", "rank")):
        shown: list[Row] = []
        for row in found:
            if row["what"] != what:
                continue
            name = "embed" if row["layer"] < 0 else f"layer {row['layer']}"
            tip = f"{what}, {name}, {along} {number(row['setting'])}: {number(row['value'])}"
            if row["lo"] is not None and row["hi"] is not None:
                tip += f" ({number(row['lo'])} to {number(row['hi'])})"
            shown.append({"at": row["setting"], "value": row["value"], "layer": row["layer"], "name": name, "tip": tip})
        if not shown:
            continue
        base = alt.Chart(data(shown)).encode(
            x=alt.X("at:Q", title=along),
            y=alt.Y("value:Q", title=what, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("layer:Q", scale=alt.Scale(range=[color("neg"), color("pos")]), legend=None),
            detail="name:N",
            description="tip:N",
            tooltip="tip:N",
        )
        both = base.mark_line(strokeWidth=1.5) + base.mark_point(size=26, filled=True, opacity=1)
        panels.append(both.properties(width=(WIDTH - 140) // 2, height=180))
    return themed(alt.hconcat(*panels, spacing=24)) if panels else themed(nothing())

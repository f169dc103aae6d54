"""Charts of what frequency did: strengths of relations over the checkpoints, the frequency link, the twin worlds."""

from typing import Any

import altair as alt
import polars as pl

from headwater.report.charts.parts import WIDTH, Row, data, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import number

_SIDE = (WIDTH - 120) // 2
_TALL = 230


def strengths(result: Any) -> Any:
    """Causality of each relation over the checkpoints."""
    table = result.tables.get("relations")
    return _whole([_curves(_all(table), "causality")])


def frequency_link(result: Any) -> Any:
    """How often pairs were seen against causality, a point a relation and checkpoint, the darker the later; beside it
    causality over the checkpoints, a line a relation."""
    table = _all(result.tables.get("points"))
    return _whole([_scatter(table), _curves(table, "causality")])


def counterfactual_pretraining(result: Any) -> Any:
    """The change of frequency against the change of causality at the last step, a point a relation."""
    table = result.tables.get("changes")
    if table is not None and table.height and "step" in table.columns:
        table = table.filter(pl.col("step") == table["step"].max())
    shown: list[Row] = []
    for row in rows(table, "relation", "pair", "causality", "n"):
        if None in (row["relation"], row["pair"], row["causality"]):
            continue
        changed = f"{number(row['pair'])} powers of ten"
        tip = f"{row['relation']}: seen {changed} more, causality {number(row['causality'])} more"
        shown.append({"x": row["pair"], "y": row["causality"], "name": str(row["relation"]), "tip": tip})
    if not shown:
        return themed(nothing())
    base = alt.Chart(data(shown)).encode(
        x=alt.X("x:Q", title="change of log10(1 + times seen together)"),
        y=alt.Y("y:Q", title="change of causality"),
        description="tip:N",
        tooltip="tip:N",
    )
    dots = base.mark_point(size=40, filled=True, opacity=0.9, color=color("pos"))
    names = base.mark_text(align="left", dx=6, fontSize=9, color=color("soft")).encode(text="name:N")
    zero = alt.Chart(data([{"at": 0.0}]))
    cross = zero.mark_rule(color=color("soft"), opacity=0.4).encode(x="at:Q") + zero.mark_rule(
        color=color("soft"), opacity=0.4
    ).encode(y="at:Q")
    return themed((cross + dots + names).properties(width=WIDTH - 160, height=300))


def _all(table: pl.DataFrame | None) -> pl.DataFrame | None:
    """The rows over all subjects."""
    if table is None or "subjects" not in table.columns:
        return table
    return table.filter(pl.col("subjects") == "all")


def _whole(panels: list[Any]) -> Any:
    shown = [panel for panel in panels if panel is not None]
    return themed(alt.hconcat(*shown, spacing=24)) if shown else themed(nothing())


def _scatter(table: pl.DataFrame | None) -> Any:
    shown: list[Row] = []
    for row in rows(table, "relation", "step", "pair", "causality"):
        if None in (row["relation"], row["step"], row["pair"], row["causality"]):
            continue
        tip = f"{row['relation']}, step {row['step']}: seen about {number(10 ** row['pair'] - 1)} times together"
        tip += f", causality {number(row['causality'])}"
        shown.append({"x": row["pair"], "y": row["causality"], "step": row["step"], "tip": tip})
    if not shown:
        return None
    dots = alt.Chart(data(shown)).mark_point(size=26, filled=True, opacity=0.85)
    chart = dots.encode(
        x=alt.X("x:Q", title="log10(1 + times seen together), mean over facts"),
        y=alt.Y("y:Q", title="causality", scale=alt.Scale(domain=[0, 1])),
        color=alt.Color(
            "step:Q",
            scale=alt.Scale(range=[color("neg"), color("pos")], type="symlog"),
            legend=alt.Legend(title="step"),
        ),
        description="tip:N",
        tooltip="tip:N",
    )
    return chart.properties(width=_SIDE, height=_TALL)


def _curves(table: pl.DataFrame | None, what: str) -> Any:
    shown: list[Row] = []
    for row in rows(table, "relation", "step", what):
        if None in (row["relation"], row["step"], row[what]):
            continue
        tip = f"{row['relation']}, step {row['step']}: {what} {number(row[what])}"
        shown.append({"at": row["step"], "value": row[what], "name": str(row["relation"]), "tip": tip})
    if not shown:
        return None
    base = alt.Chart(data(shown)).encode(
        x=alt.X("at:Q", title="step"),
        y=alt.Y("value:Q", title=what, scale=alt.Scale(domain=[0, 1])),
        detail="name:N",
        description="tip:N",
        tooltip="tip:N",
    )
    lines = base.mark_line(strokeWidth=1.2, opacity=0.7, color=color("pos"))
    dots = base.mark_point(size=14, filled=True, opacity=0.8, color=color("pos"))
    return (lines + dots).properties(width=_SIDE, height=_TALL)

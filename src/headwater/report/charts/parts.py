"""What the chart functions share: rows that are safe to draw, the interval plot, the heat map."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from headwater.report.theme import RAMP, altair_config, color
from headwater.report.words import finite, visible

WIDTH = 560
Row = dict[str, Any]


def themed(chart: Any) -> Any:
    """The finished chart in headwater's colours and type."""
    return chart.configure(**altair_config())


def rows(table: pl.DataFrame | None, *columns: str) -> list[Row]:
    """The table's rows with `columns` always there; text made visible, NaN and infinities made None."""
    if table is None:
        return []
    cleaned = [{key: _cell(value) for key, value in row.items()} for row in table.iter_rows(named=True)]
    return [dict.fromkeys(columns) | row for row in cleaned]


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return visible(value)
    return finite(value) if isinstance(value, float) else value


def data(values: Iterable[Mapping[str, Any]]) -> alt.Data:
    """Inline data of exactly these rows."""
    return alt.Data(values=[dict(row) for row in values])


def nothing(text: str = "nothing to draw") -> Any:
    """A chart that says that there is nothing to draw."""
    mark = alt.Chart(data([{"text": text}])).mark_text(color=color("soft"), align="left")
    return mark.encode(text="text:N", x=alt.value(0)).properties(width=WIDTH, height=30)


def steps(along: Sequence[float], field: str = "step") -> Any:
    """The axis of steps: even where most checkpoints lie far from 0, else log-spaced from 0 on."""
    top = float(along[-1]) if along else 0.0
    if along and float(along[len(along) // 2]) > top / 10:
        return alt.X(f"{field}:Q", title="step", axis=alt.Axis(tickCount=8, labelOverlap=True))
    axis = alt.Axis(values=[0.0, *(10.0**i for i in range(12) if 10.0**i <= top)], labelOverlap=True, format="~s")
    return alt.X(f"{field}:Q", title="step", scale=alt.Scale(type="symlog", nice=False), axis=axis)


def intervals(
    values: Sequence[Row],
    *,
    x: str | None,
    hues: Mapping[str, str] | None = None,
    legend: str | None = None,
    grouped: bool = False,
    independent: bool = False,
    domain: tuple[float, float] | None = None,
    width: int = WIDTH - 160,
    step: int = 20,
) -> Any:
    """Dots with intervals, one line a row.

    Rows hold `label`, `value`, `lo`, `hi`, `tip` and, where used, `hue` (a key of `hues`, which gives its colour),
    `group` (a panel of its own) and `reference` (a dashed line, one a group). `independent` gives each group its own
    scale.
    """
    if not values:
        return nothing()
    hues = hues or {"": color("pos")}
    filled = [{"hue": next(iter(hues)), "group": "", "reference": None, "lo": None, "hi": None} | row for row in values]
    hue = alt.Color(
        "hue:N",
        scale=alt.Scale(domain=list(hues), range=list(hues.values())),
        legend=alt.Legend(title=legend or None, orient="top", symbolType="circle") if len(hues) > 1 else None,
    )
    along = alt.Scale(domain=list(domain), nice=False) if domain else alt.Scale(zero=False, nice=True, padding=8)
    y = alt.Y("label:N", sort=None, title=None, axis=alt.Axis(grid=False, labelLimit=300))
    base = alt.Chart().encode(y=y, description="tip:N", tooltip="tip:N")
    reference = alt.Chart().mark_rule(color=color("null"), strokeDash=[3, 3]).encode(x="mean(reference):Q")
    spread = base.mark_rule(strokeWidth=2, opacity=0.55).encode(x="lo:Q", x2="hi:Q", color=hue)
    dot = base.mark_point(size=52, filled=True, opacity=1).encode(
        x=alt.X("value:Q", title=x, scale=along, axis=alt.Axis(tickCount=6, labelFlush=False)), color=hue
    )
    layers = [spread, dot]
    if any(row["reference"] is not None for row in filled):
        layers.insert(0, reference)
    chart = alt.layer(*layers, data=data(filled)).properties(width=width, height=alt.Step(step))
    if not grouped:
        return chart
    panels = list(dict.fromkeys(row["group"] for row in filled))
    header = alt.Header(orient="top", labelAnchor="start", labelPadding=2, title=None)
    chart = chart.facet(row=alt.Row("group:N", sort=panels, header=header, title=None), spacing=14)
    return chart.resolve_scale(y="independent", x="independent" if independent else "shared")


def heat(
    values: Sequence[Row],
    *,
    x: str,
    y: str,
    title: str = "",
    legend: str = "effect",
    extreme: float,
    step: tuple[int, int] = (30, 13),
) -> Any:
    """A heat map of rows with `x`, `y`, `value` and `tip`; columns and rows in the order given, rows upwards.

    `extreme` is the value at which the colours end, on both sides of zero.
    """
    columns, lines = list(dict.fromkeys(row["x"] for row in values)), list(dict.fromkeys(row["y"] for row in values))
    edge = extreme if extreme > 0 else 1.0
    shade = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[-edge, edge], range=RAMP, clamp=True),
        legend=alt.Legend(title=legend, gradientLength=120, gradientThickness=9, tickCount=5),
    )
    turned = max(len(part) for column in columns for part in str(column).split("\n")) * 6.2 > step[0] + 4
    broken = any("\n" in str(column) for column in columns) and not turned
    ticks = alt.Axis(
        labelAngle=-45 if turned else 0,
        labelOverlap=not turned,
        # a label's second line; turned labels stay on one
        labelExpr="split(datum.label, '\\n')" if broken else "replace(datum.label, '\\n', ' · ')",
    )
    return (
        alt.Chart(data(values))
        .mark_rect(stroke=color("paper"), strokeWidth=0.6)
        .encode(
            x=alt.X("x:N", sort=columns, title=x, axis=ticks),
            y=alt.Y("y:N", sort=lines[::-1], title=y, axis=alt.Axis(labelOverlap=True)),
            color=shade,
            description="tip:N",
            tooltip="tip:N",
        )
        .properties(title=title, width=alt.Step(step[0]), height=alt.Step(step[1]))
    )

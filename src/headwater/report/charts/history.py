"""Charts of a model's history: when behavior and circuit formed, which facts are known by how often they were read, and
what follows when the data change."""

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from headwater.report.charts.parts import WIDTH, Row, data, nothing, rows, steps, themed
from headwater.report.theme import color
from headwater.report.words import estimate, finite, number, percent

_LINES = {
    "behavior": ("the behavior", "pos"),
    "circuit": ("its circuit alone", "neg"),
    "known": ("known facts", "null"),
}
_BINS = 6
_DASH = [3, 3]


def formation(result: Any, *, split: str = "test", width: int = WIDTH - 130, height: int = 210) -> Any:
    """Behavior and circuit over the steps, as shares of what the behavior comes to, on one split; shaded where most of
    each formed."""
    found = [
        row
        for row in rows(result.tables.get("curves"), "step", "what", "split", "value", "lo", "hi")
        if row["what"] in _LINES and row["split"] == split and None not in (row["step"], row["value"])
    ]
    if not found:
        return themed(nothing())
    shown = [
        {**row, "line": _LINES[row["what"]][0],
         "tip": f"step {row['step']}, {_LINES[row['what']][0]}: {estimate(row['value'], row['lo'], row['hi'])}"}
        for row in found
    ]  # fmt: skip
    along = sorted({row["step"] for row in found})
    kinds = [_LINES[what] for what in _LINES if any(row["what"] == what for row in found)]
    hue = alt.Color(
        "line:N",
        scale=alt.Scale(domain=[name for name, _ in kinds], range=[color(shade) for _, shade in kinds]),
        legend=alt.Legend(title=None, orient="top", symbolType="stroke", symbolOpacity=1, symbolStrokeWidth=2.5),
    )
    layers: list[Any] = []
    bands = [
        {**row, "tip": f"most of {_LINES[row['what']][0]} formed between step {row['first']} and step {row['last']}"}
        for row in rows(result.tables.get("windows"), "what", "first", "last")
        if row["what"] in _LINES and None not in (row["first"], row["last"])
    ]
    for row in bands:
        band = alt.Chart(data([row])).mark_rect(color=color(_LINES[row["what"]][1]), opacity=0.1)
        layers.append(band.encode(x=steps(along, "first"), x2="last:Q", description="tip:N", tooltip="tip:N"))
    spread = alt.Chart(data([row for row in shown if None not in (row["lo"], row["hi"])])).mark_area(opacity=0.16)
    layers.append(spread.encode(x=steps(along), y="lo:Q", y2="hi:Q", color=hue))
    base = alt.Chart(data(shown)).encode(x=steps(along), y=alt.Y("value:Q", title="share of the end"), color=hue)
    layers.append(base.mark_line(strokeWidth=1.8))
    layers.append(base.mark_point(size=16, filled=True).encode(description="tip:N", tooltip="tip:N"))
    return themed(alt.layer(*layers).properties(width=width, height=height))


def fact_link(result: Any, *, width: int = WIDTH - 130, height: int = 230, legend: bool = True) -> Any:
    """The share of facts that are known over how often each had been read, a colour a step; the dashed upright is the
    threshold, shaded its interval."""
    found = [
        row
        for row in rows(result.tables.get("facts"), "step", "fact", "pair", "known")
        if None not in (row["step"], row["pair"], row["known"])
    ]
    points = binned(found)
    if not points:
        return themed(nothing())
    facts = result.facts
    top, last = max(row["count"] for row in points), max(row["log_step"] for row in points)
    hue = alt.Color(
        "log_step:Q",
        scale=alt.Scale(range=[color("band"), color("pos")]),
        legend=alt.Legend(
            title="step", gradientLength=100, gradientThickness=9, values=list(range(int(last + 1e-9) + 1)),
            labelExpr="format(pow(10, datum.value), '.1~s')",
        ) if legend else None,
    )  # fmt: skip
    layers: list[Any] = []
    lo, hi, threshold = (finite(facts.get(name)) for name in ("lo", "hi", "threshold"))
    if lo is not None and hi is not None:
        row = {"lo": min(lo, top), "hi": min(hi, top), "tip": f"half are known from {estimate(threshold, lo, hi)} on"}
        band = alt.Chart(data([row])).mark_rect(color=color("neg"), opacity=0.14)
        layers.append(band.encode(x=counted("lo"), x2="hi:Q", description="tip:N", tooltip="tip:N"))
    if threshold is not None and threshold <= top:
        row = {"at": threshold, "tip": f"half of the facts are known from {number(threshold)} co-occurrences on"}
        rule = alt.Chart(data([row])).mark_rule(color=color("neg"), strokeDash=_DASH)
        layers.append(rule.encode(x=counted("at"), description="tip:N", tooltip="tip:N"))
    if (slope := finite(facts.get("slope"))) is not None and threshold is not None and slope > 0:
        layers.append(_curve(slope, threshold, top))
    dots = alt.Chart(data(points)).mark_point(filled=True, opacity=0.85, stroke=color("soft"), strokeWidth=0.4)
    layers.append(
        dots.encode(
            x=counted("count"),
            y=alt.Y("known:Q", title="facts known", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])),
            size=alt.Size("n:Q", legend=None, scale=alt.Scale(range=[18, 90])),
            color=hue,
            description="tip:N",
            tooltip="tip:N",
        )
    )
    return themed(alt.layer(*layers).properties(width=width, height=height))


def fact_change(result: Any, *, width: int = WIDTH - 130, height: int = 230) -> Any:
    """Each fact: how its count changed, and how much earlier or later it was learned, in the second training."""
    found = [
        row
        for row in rows(result.tables.get("facts"), "fact", "change_count", "change_known", "split")
        if None not in (row["change_count"], row["change_known"])
    ]
    if not found:
        return themed(nothing())
    shown = [
        {
            **row,
            "factor": row["change_count"] / math.log(10),
            "tip": f"{row['fact']}: said {number(math.exp(row['change_count']))} times as often, known "
            f"{number(100 * row['change_known'])} points more",
        }
        for row in found
    ]
    dots = alt.Chart(data(shown)).mark_point(size=30, filled=True, opacity=0.6, color=color("pos"))
    drawn = dots.encode(
        x=alt.X("factor:Q", title="change of the count (powers of ten)"),
        y=alt.Y("change_known:Q", title="change of what is known", axis=alt.Axis(format="+%")),
        description="tip:N",
        tooltip="tip:N",
    )
    zero = data([{"x": 0}])
    rules = [
        alt.Chart(zero).mark_rule(color=color("null"), strokeDash=_DASH).encode(x="x:Q"),
        alt.Chart(zero).mark_rule(color=color("null"), strokeDash=_DASH).encode(y="x:Q"),
    ]
    return themed(alt.layer(*rules, drawn).properties(width=width, height=height))


def binned(found: Sequence[Row]) -> list[Row]:
    """Facts of one step in bins of about as many each, by count: count (geometric mean), known (share), n, step."""
    points: list[Row] = []
    for step in sorted({row["step"] for row in found}):
        mine = sorted((row for row in found if row["step"] == step), key=lambda row: (row["pair"], str(row["fact"])))
        if mine[0]["pair"] == mine[-1]["pair"]:
            groups = [mine]
        else:
            size = max(1, math.ceil(len(mine) / _BINS))
            groups = [mine[i : i + size] for i in range(0, len(mine), size)]
        for group in groups:
            count = math.expm1(sum(math.log1p(max(0.0, row["pair"])) for row in group) / len(group))
            known = sum(row["known"] for row in group) / len(group)
            tip = f"step {step}: of {len(group)} facts read about {number(count)} times, {percent(known)} are known"
            points.append({
                "step": step, "log_step": math.log10(max(1, step)), "count": count, "known": known, "n": len(group),
                "tip": tip,
            })  # fmt: skip
    return points


def counted(field: str) -> Any:
    """The axis of counts."""
    ticks = [0.0, *(factor * 10.0**power for power in range(8) for factor in (1, 3))]
    axis = alt.Axis(values=ticks, labelOverlap=True, format="~s")
    return alt.X(f"{field}:Q", title="subject and object read together", scale=alt.Scale(type="symlog"), axis=axis)


def _curve(slope: float, threshold: float, top: float) -> Any:
    """The logistic curve through the threshold."""
    middle, end = math.log1p(threshold), math.log1p(top)
    line = [
        {"count": math.expm1(x), "known": 1 / (1 + math.exp(-max(-30.0, min(30.0, slope * (x - middle)))))}
        for x in (end * i / 60 for i in range(61))
    ]
    chart = alt.Chart(data(line)).mark_line(color=color("neg"), strokeWidth=1.4, opacity=0.8)
    return chart.encode(x=counted("count"), y="known:Q")

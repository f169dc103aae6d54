"""Charts of a BehaviorReport: a metric by slice, the canary, and the margins of single prompts."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import Row, data, intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import estimate, metric_name, number, visible

OVERALL = ("", "all", "overall", None)
_BINS = 36


def behavior_report(result: Any, metric: str | None = None) -> Any:
    """One metric (the first of the table, unless named) with its intervals: over all prompts and by slice."""
    found = metric_rows(result)
    if not found:
        return themed(nothing())
    wanted = metric or found[0]["metric"]
    kept = [row for row in found if row["metric"] == wanted]
    whole = next((row["value"] for row in kept if is_overall(row)), None)
    shown = [
        {
            "label": "all prompts" if is_overall(row) else visible(row["slice"], 44),
            "group": "" if is_overall(row) else str(row["slice_name"]).replace("_", " "),
            "value": row["value"],
            "lo": row["lo"],
            "hi": row["hi"],
            "reference": whole,
            "hue": "all" if is_overall(row) else "slice",
            "tip": f"{row['slice'] if not is_overall(row) else 'all prompts'}: {wanted} "
            f"{estimate(row['value'], row['lo'], row['hi'])}, n {number(row['n'])}",
        }
        for row in kept
    ]
    hues = {"all": color("ink"), "slice": color("pos")}
    chart = intervals(shown, x=metric_name(wanted), hues=hues, grouped=True)
    return themed(without_legend(chart))


def without_legend(chart: Any) -> Any:
    """A chart of grouped intervals without its legend, where the panels' names say it already."""
    for layer in chart.spec.layer:
        if layer.encoding.color is not alt.Undefined:
            layer.encoding.color.legend = None
    return chart


def metric_rows(result: Any) -> list[Row]:
    """The rows of `metrics`, overall ones first."""
    found = rows(result.tables.get("metrics"), "metric", "slice_name", "slice", "value", "lo", "hi", "n")
    return sorted(found, key=lambda row: not is_overall(row))


def is_overall(row: Row) -> bool:
    """Whether a row of `metrics` speaks of all prompts."""
    return row["slice_name"] in OVERALL


def canary(result: Any) -> Any:
    """Accuracy of the same questions in each format, with chance as a tick: what the model lacks, answer or format."""
    found = rows(result.tables.get("canary"), "format", "condition", "accuracy", "lo", "hi", "n", "chance")
    if not found:
        return themed(nothing("no canary for this behavior"))
    shown = [
        {
            "label": visible(row["condition"] or "all", 44),
            "group": visible(row["format"] or "", 44),
            "value": row["accuracy"],
            "lo": row["lo"],
            "hi": row["hi"],
            "chance": row["chance"],
            "tip": f"{row['format']}, {row['condition']}: accuracy {estimate(row['accuracy'], row['lo'], row['hi'])}, "
            f"chance {number(row['chance'])}, n {number(row['n'])}",
        }
        for row in found
    ]
    chart = intervals(shown, x="accuracy (tick: chance)", grouped=True, domain=(0.0, 1.0))
    tick = (
        alt.Chart()
        .mark_tick(color=color("neg"), thickness=2, height=13)
        .encode(x="chance:Q", y=alt.Y("label:N", sort=None))
    )
    chart.spec.layer.append(tick)
    return themed(chart)


def margins(result: Any) -> Any:
    """How many prompts have which logit difference, under the prompt and under its counterfactual."""
    found = rows(result.tables.get("rows"), "logit_diff", "cf_logit_diff")
    series = {"prompt": [row["logit_diff"] for row in found], "counterfactual": [row["cf_logit_diff"] for row in found]}
    series = {name: [v for v in values if v is not None] for name, values in series.items()}
    every = [v for values in series.values() for v in values]
    if len(every) < 2:
        return themed(nothing())
    low, high = min(every), max(every)
    width = (high - low) / _BINS or 1.0
    bins: list[Row] = []
    for name, values in series.items():
        counts = [0] * _BINS
        for v in values:
            counts[min(int((v - low) / width), _BINS - 1)] += 1
        for i, n in enumerate(counts):
            start, end = low + i * width, low + (i + 1) * width
            if n:
                bins.append(
                    {
                        "from": start,
                        "to": end,
                        "n": n,
                        "floor": 0,
                        "which": name,
                        "tip": f"{name}: {n} between {number(start)} and {number(end)}",
                    }
                )
    hues = {"prompt": color("pos"), "counterfactual": color("neg")}
    bars = (
        alt.Chart(data(bins))
        .mark_rect(opacity=0.72)
        .encode(
            x=alt.X("from:Q", title="logit difference, answer minus foil", scale=alt.Scale(nice=True)),
            x2="to:Q",
            y2="floor:Q",
            y=alt.Y("n:Q", title="prompts", axis=alt.Axis(tickMinStep=1, tickCount=4)),
            color=alt.Color(
                "which:N",
                scale=alt.Scale(domain=list(hues), range=list(hues.values())),
                legend=alt.Legend(title=None, orient="top"),
            ),
            description="tip:N",
            tooltip="tip:N",
        )
        .properties(width=520, height=130)
    )
    zero = alt.Chart(data([{"x": 0}])).mark_rule(color=color("soft"), strokeDash=[3, 3]).encode(x="x:Q")
    return themed(bars + zero)

"""Charts over training: loss curves, timelines of measures, distances between checkpoints."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from headwater.report.charts.parts import WIDTH, Row, data, heat, nothing, rows, steps, themed
from headwater.report.theme import color
from headwater.report.words import number

_POINTS = 400  # of a curve; more cannot be told apart
_LINES = 6  # of one panel of a timeline
_CLEAR = 0.05  # p up to which a transition is ruled


def training(result: Any) -> Any:
    """The loss of each batch, and of the validation data where there is some, over the steps."""
    found = [row for row in rows(result.tables.get("curve"), "step", "loss") if None not in (row["step"], row["loss"])]
    shown: list[Row] = [{"step": row["step"], "value": row["loss"], "line": "training"} for row in _thin(found)]
    for row in rows(result.tables.get("validation"), "step", "name", "loss"):
        if None not in (row["step"], row["loss"], row["name"]):
            shown.append({"step": row["step"], "value": row["loss"], "line": row["name"]})
    if not shown:
        return themed(nothing())
    for row in shown:
        row["tip"] = f"step {row['step']}, {row['line']}: {number(row['value'])}"
    return themed(
        _lines(shown, "loss (nats)", steps(sorted({row["step"] for row in shown}))).properties(
            width=WIDTH - 100, height=200
        )
    )


def timeline(result: Any) -> Any:
    """Each measure over the steps, a panel a measure (two where some of its numbers are shares and some are not).

    Shaded where it has an interval, ruled where a clear transition is.
    """
    found = rows(result.tables.get("values"), "step", "measure", "name", "value", "lo", "hi")
    found = [row for row in found if None not in (row["step"], row["measure"], row["value"])]
    if not found:
        return themed(nothing())
    changes = [
        row
        for row in rows(result.tables.get("transitions"), "measure", "name", "step", "lo", "hi", "p")
        if row["step"] is not None and (row["p"] is None or row["p"] <= _CLEAR)
    ]
    axis = steps(sorted({row["step"] for row in found}))
    panels: list[Any] = []
    for measure, mine in _panels(found):
        shown = [
            {
                "step": row["step"], "value": row["value"], "lo": row["lo"], "hi": row["hi"],
                "line": str(row["name"] or measure),
                "tip": f"step {row['step']}, {row['name'] or measure}: {number(row['value'])}",
            }
            for row in mine
            if row["name"] in _widest(mine)
        ]  # fmt: skip
        rules = [row for row in changes if row["measure"] == measure and row["name"] in _widest(mine)]
        panels.append(_panel(shown, str(measure), rules, axis).properties(width=WIDTH - 160, height=110))
    return themed(alt.vconcat(*panels, spacing=16).resolve_scale(color="independent", x="shared"))


def series_audit(result: Any) -> Any:
    """Distances between all checkpoints, as a share of their norm: smooth outwards from the diagonal if all is well."""
    table = rows(result.tables.get("checkpoints"), "step", "name", "norm", "flag", "why")
    distance = result.tensors.get("distance")
    if not table:
        return themed(nothing())
    if distance is None or tuple(distance.shape) != (len(table), len(table)):
        return themed(_flags(table))
    chosen = _spread(range(len(table)), 40)
    cells: list[Row] = []
    for i in chosen:
        for j in chosen:
            value, norm = float(distance[i, j]), table[i]["norm"]
            if value != value or not norm:
                continue
            a, b = table[i], table[j]
            said = f"{a['name']} to {b['name']}: {number(value / norm)}" + (f", {a['flag']}" if a["flag"] else "")
            cells.append({"x": _label(b), "y": _label(a), "value": value / norm, "tip": said})
    if not cells:
        return themed(_flags(table))
    extreme = max(cell["value"] for cell in cells)
    return themed(heat(cells, x="step", y="step", legend="distance", extreme=extreme, step=(13, 13)))


def connectivity(result: Any) -> Any:
    """The loss on the line between two sets of weights, beside the straight one between both ends."""
    found = [
        row
        for row in rows(result.tables.get("line"), "part", "loss", "lo", "hi", "straight")
        if row["part"] is not None
    ]
    shown = [
        {
            "part": row["part"],
            "value": row[of],
            "line": line,
            "tip": f"{line} at {number(row['part'])}: {number(row[of])}",
        }
        for line, of in (("loss on the line", "loss"), ("straight", "straight"))
        for row in found
        if row[of] is not None
    ]
    if not shown:
        return themed(nothing())
    x = alt.X("part:Q", title="part of the way", scale=alt.Scale(domain=[0, 1]))
    base = alt.Chart(data(shown)).encode(
        x=x, y=alt.Y("value:Q", title="loss (nats)", scale=alt.Scale(zero=False)), color=_hue(shown)
    )
    banded = [row for row in found if None not in (row["lo"], row["hi"])]
    band = alt.Chart(data(banded)).mark_area(opacity=0.15, color=color("pos")).encode(x=x, y="lo:Q", y2="hi:Q")
    dots = base.mark_point(size=14, filled=True).encode(description="tip:N", tooltip="tip:N")
    return themed(alt.layer(band, base.mark_line(strokeWidth=1.5), dots).properties(width=WIDTH - 160, height=180))


def delta(result: Any) -> Any:
    """How far each component moved; and, of a lost behavior, how much comes back when the most moved weights go."""
    moved = [row for row in rows(result.tables.get("components"), "component", "share") if row["share"] is not None]
    moved = sorted(moved, key=lambda row: -row["share"])[:16]
    panels: list[Any] = []
    if moved:
        bars = [
            {"label": str(row["component"]), "share": row["share"], "tip": f"{row['component']}: {row['share']:.1%}"}
            for row in moved
        ]
        bar = alt.Chart(data(bars)).mark_bar(color=color("pos"), height=9)
        panels.append(
            bar.encode(
                x=alt.X("share:Q", title="share of the squared change", axis=alt.Axis(format="%")),
                y=alt.Y("label:N", sort=None, title=None), description="tip:N", tooltip="tip:N",
            ).properties(width=WIDTH - 260, height=alt.Step(14))
        )  # fmt: skip
    shown: list[Row] = []
    for row in rows(result.tables.get("revival"), "how", "fraction", "back", "null_most"):
        for of, line in (("back", f"{row['how']} the most moved"), ("null_most", f"{row['how']} random ones (most)")):
            if row["fraction"] and row[of] is not None:
                tip = f"{line}, {row['fraction']:.2%}: {row[of]:.0%} back"
                shown.append({"fraction": row["fraction"], "value": row[of], "line": line, "tip": tip})
    if shown:
        base = alt.Chart(data(shown)).encode(
            x=alt.X(
                "fraction:Q", title="share of weights", scale=alt.Scale(type="log"),
                axis=alt.Axis(format="~%", values=sorted({row["fraction"] for row in shown})),
            ),
            y=alt.Y("value:Q", title="back, of what was lost", axis=alt.Axis(format="%")), color=_hue(shown),
        )  # fmt: skip
        dots = base.mark_point(size=20, filled=True).encode(description="tip:N", tooltip="tip:N")
        panels.append(alt.layer(base.mark_line(strokeWidth=1.5), dots).properties(width=WIDTH - 260, height=150))
    if not panels:
        return themed(nothing())
    return themed(alt.vconcat(*panels, spacing=20).resolve_scale(color="independent"))


def _label(row: Row) -> str:
    return f"{row['step']}" + (" !" if row["flag"] else "")


def _flags(table: list[Row]) -> Any:
    """Without distances: which checkpoints are flagged."""
    shown = [
        {
            "label": str(row["name"]),
            "flag": row["flag"] or "no flag",
            "tip": f"{row['name']}: {row['why'] or 'no flag'}",
        }
        for row in table[:60]
    ]
    chart = alt.Chart(data(shown)).mark_point(size=52, filled=True)
    return chart.encode(
        x=alt.X("flag:N", title=None), y=alt.Y("label:N", sort=None, title=None), description="tip:N", tooltip="tip:N"
    ).properties(width=220, height=alt.Step(15))


def _panels(found: list[Row]) -> list[tuple[Any, list[Row]]]:
    """The rows of each panel: of a measure those curves that stay within 0 and 1, and those that do not."""
    panels: list[tuple[Any, list[Row]]] = []
    for measure in dict.fromkeys(row["measure"] for row in found):
        mine = [row for row in found if row["measure"] == measure]
        large = {row["name"] for row in mine if not 0 <= row["value"] <= 1}
        for part in ([row for row in mine if row["name"] in large], [row for row in mine if row["name"] not in large]):
            if part:
                panels.append((measure, part))
    return panels


def _panel(shown: list[Row], title: str, changes: list[Row], axis: Any) -> Any:
    layers: list[Any] = []
    banded = [row for row in shown if row["lo"] is not None and row["hi"] is not None]
    if banded:
        band = alt.Chart(data(banded)).mark_area(opacity=0.15)
        layers.append(band.encode(x=axis, y="lo:Q", y2="hi:Q", color=_hue(shown)))
    layers.append(_lines(shown, title, axis))
    if changes:
        told = [
            {"step": row["step"], "line": str(row["name"] or title),
             "tip": f"{row['name'] or title} changes at {row['step']} ({number(row['lo'])} to {number(row['hi'])})"}
            for row in changes
        ]  # fmt: skip
        rule = alt.Chart(data(told)).mark_rule(strokeDash=[3, 3])
        layers.append(rule.encode(x=axis, color=_hue(shown), description="tip:N", tooltip="tip:N"))
    return alt.layer(*layers)


def _lines(shown: Sequence[Row], title: str, axis: Any) -> Any:
    base = alt.Chart(data(shown)).encode(
        x=axis, y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)), color=_hue(shown)
    )
    dots = base.mark_point(size=14, filled=True).encode(description="tip:N", tooltip="tip:N")
    return alt.layer(base.mark_line(strokeWidth=1.5), dots)


def _hue(shown: Sequence[Row]) -> Any:
    names = list(dict.fromkeys(row["line"] for row in shown))
    palette = [color("pos"), color("neg"), color("null"), "#9467bd", "#8c6d31", "#17becf", "#7f7f7f", "#bcbd22"]
    colors = [palette[i % len(palette)] for i in range(len(names))]
    # a band is faint; its entry in the legend is the line's too
    key = alt.Legend(title=None, orient="right", symbolType="stroke", symbolOpacity=1) if len(names) > 1 else None
    return alt.Color("line:N", scale=alt.Scale(domain=names, range=colors), legend=key)


def _widest(mine: list[Row]) -> set[Any]:
    """The names whose values move most: a measure of every head would otherwise be a tangle."""
    values: dict[Any, list[float]] = {}
    for row in mine:
        values.setdefault(row["name"], []).append(row["value"])
    ranked = sorted(values, key=lambda name: -(max(values[name]) - min(values[name])))
    return set(ranked[:_LINES])


def _thin(found: list[Row]) -> list[Row]:
    return [found[i] for i in _spread(range(len(found)), _POINTS)]


def _spread(places: Sequence[int], n: int) -> list[int]:
    """At most n of these places, evenly, the ends among them."""
    if len(places) <= n:
        return list(places)
    return sorted({places[round(i * (len(places) - 1) / (n - 1))] for i in range(n)})

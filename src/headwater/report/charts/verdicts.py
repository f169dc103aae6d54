"""Charts of whose votes win, of what a subspace patch does by its parts, of MIB's track, and of discovery curves."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import Row, data, intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import estimate, number

_GROUPS = {
    "sound": "sound votes",
    "faulty": "faulty votes",
    "mixed": "mixed votes",
    "rest": "biases",
    "all": "the model",
}
_OUTCOMES = {"right": "where the model is right", "wrong": "where it is wrong"}
_HUES = ("pos", "neg")


def interference(result: Any) -> Any:
    """The summed votes of sound, faulty and mixed components, where the model is right and where it is wrong."""
    found = rows(result.tables.get("sums"), "outcome", "group", "margin", "lo", "hi", "n")
    shown = [
        {
            "label": _GROUPS.get(str(row["group"]), row["group"]),
            "value": row["margin"],
            "lo": row["lo"],
            "hi": row["hi"],
            "group": f"{_OUTCOMES.get(str(row['outcome']), row['outcome'])} ({number(row['n'])} prompts)",
            "reference": 0.0,
            "hue": "model" if row["group"] == "all" else "votes",
            "tip": f"{_GROUPS.get(str(row['group']), row['group'])}: {estimate(row['margin'], row['lo'], row['hi'])}",
        }
        for row in found
        if row["margin"] is not None
    ]
    if not shown:
        return themed(nothing("no votes"))
    hues = {"votes": color("pos"), "model": color("neg")}
    title = "summed votes for the answer against the favourite foil"
    return themed(intervals(shown, x=title, hues=hues, legend=" ", grouped=True))


def subspace(result: Any) -> Any:
    """The effect of the whole subspace and of its parts: a dormant pathway has its effect in the whole alone."""
    found = rows(result.tables.get("parts"), "part", "effect", "lo", "hi", "n", "about")
    shown = [
        {
            "label": row["part"],
            "value": row["effect"],
            "lo": row["lo"],
            "hi": row["hi"],
            "reference": 0.0,
            "tip": f"{row['about']}: {estimate(row['effect'], row['lo'], row['hi'])}",
        }
        for row in found
        if row["effect"] is not None
    ]
    return themed(intervals(shown, x="effect (1: as the other run)") if shown else nothing("no patch was made"))


def mib_track(result: Any) -> Any:
    """CMD of every method by task, ranking and ablation (lower is better); random is the row to leave behind."""
    found = rows(result.tables.get("track"), "task", "method", "rank", "level", "ablation", "cpr", "cmd")
    methods = list(dict.fromkeys(str(row["method"]) for row in found))
    hues = {name: color("null") if name == "random" else color(_HUES[i % len(_HUES)]) for i, name in enumerate(methods)}
    shown = [
        {
            "label": f"{row['method']}, {row['rank']}",
            "value": row["cmd"],
            "lo": None,
            "hi": None,
            "group": f"{row['task']}, {row['level']}s, {row['ablation']}",
            "hue": row["method"],
            "tip": f"{row['method']} on {row['task']} ({row['rank']} ranking, {row['ablation']}): "
            f"CMD {number(row['cmd'])}, CPR {number(row['cpr'])}",
        }
        for row in found
        if row["cmd"] is not None
    ]
    if not shown:
        return themed(nothing("nothing was run"))
    title = "CMD, area between the curve and the model (lower is better)"
    return themed(intervals(shown, x=title, hues=hues, grouped=True))


def discovery(result: Any) -> Any:
    """Score against forward passes spent (log scale), one line a method."""
    found = rows(result.tables.get("curve"), "method", "options", "pairs", "passes", "cmd", "closeness", "overlap")
    known = [row for row in found if row["closeness"] is not None and row["passes"] is not None]
    lines: list[Row] = [
        {
            "method": row["method"] + (f" ({row['options']})" if row["options"] else ""),
            "passes": row["passes"],
            "value": row["closeness"],
            "tip": f"{row['method']} {row['options'] or ''} on {number(row['pairs'])} pairs: {number(row['passes'])} "
            f"passes, closeness {number(row['closeness'])}, CMD {number(row['cmd'])}",
        }
        for row in known
        if row["passes"] > 0
    ]
    if not lines:
        return themed(nothing("no method says what it spent"))
    x = alt.X("passes:Q", title="passes of one pair spent on finding (log scale)", scale=alt.Scale(type="log"))
    y = alt.Y("value:Q", title="closeness to the model, 1 - |1 - f|", scale=alt.Scale(zero=False, nice=True))
    names = list(dict.fromkeys(row["method"] for row in lines))
    hue = alt.Color("method:N", sort=names, legend=alt.Legend(title=None, orient="top", columns=2))
    base = alt.Chart(data(lines)).encode(x=x, y=y, color=hue, description="tip:N", tooltip="tip:N")
    layers: list[Any] = [
        base.mark_line(strokeWidth=2).encode(description=alt.Undefined),
        base.mark_point(filled=True, size=60, opacity=1),
    ]
    random = [row["closeness"] for row in known if row["passes"] == 0]
    if random:
        level = [{"at": random[0], "tip": f"a random ranking: closeness {number(random[0])}"}]
        mark = alt.Chart(data(level)).mark_rule(color=color("null"), strokeDash=[3, 3])
        layers.insert(0, mark.encode(y="at:Q", description="tip:N"))
    return themed(alt.layer(*layers).properties(width=520, height=240))

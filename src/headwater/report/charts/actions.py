"""Charts of actions beside baselines on one task."""

from typing import Any

from headwater.report.charts.parts import intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import estimate, number, visible

_SHOWN = ("score", "efficacy", "paraphrase", "format", "neighbours", "others", "after relearning", "probe")
_RATIOS = ("perplexity",)


def act_comparison(result: Any) -> Any:
    """What each action attains on a task, a panel a measure: actions blue, baselines and controls grey, a dashed line
    where nothing is done."""
    found = rows(
        result.tables.get("summary"), "action", "kind", "measure", "value", "lo", "hi", "n", "note"
    )  # fmt: skip
    found = [row for row in found if row["value"] is not None]
    order = [name for name in (*_SHOWN, *_RATIOS) if any(row["measure"] == name for row in found)]
    before = {row["measure"]: row["value"] for row in found if row["action"] == "nothing"}
    shown = [
        {
            "label": visible(row["action"], 48),
            "group": visible(row["measure"], 40),
            "value": row["value"],
            "lo": row["lo"],
            "hi": row["hi"],
            "reference": before.get(row["measure"]),
            "hue": "action" if row["kind"] == "action" else "baseline or control",
            "tip": f"{row['action']}, {row['measure']}: {estimate(row['value'], row['lo'], row['hi'])}, "
            f"{number(row['n'])} seeds",
        }
        for name in order
        for row in found
        if row["measure"] == name and row["action"] != "nothing"
    ]
    if not shown:
        return themed(nothing("nothing was compared"))
    hues = {"action": color("pos"), "baseline or control": color("null")}
    return themed(intervals(shown, x=None, hues=hues, grouped=True, independent=True))

"""Charts of comparisons: overlap against chance, circuits on each other's behaviors, groups of heads."""

from typing import Any

from headwater.report.charts.parts import Row, heat, intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import estimate, number

_MEASURES = {"iou": "shared / all", "recall": "share of the first", "precision": "share of the second"}


def comparison(result: Any) -> Any:
    """Each overlap as a dot beside the middle 95% of what unrelated circuits of that layer profile share."""
    found = rows(result.tables.get("overlap"), "what", "measure", "value", "expected", "lo", "hi", "p", "null")
    shown: list[Row] = []
    for row in found:
        if row["value"] is None:
            continue
        label = f"{row['what']}: {_MEASURES.get(str(row['measure']), row['measure'])}"
        label += f" ({row['null']} redrawn)" if row["what"] == "edges" and row["measure"] == "iou" else ""
        chance = f"by chance {number(row['expected'])}, 95% in {number(row['lo'])} to {number(row['hi'])}"
        tip = f"{label}: {number(row['value'])}; {chance}; p = {number(row['p'])}"
        shown.append({"label": label, "value": row["value"], "lo": None, "hi": None, "tip": tip, "hue": "observed"})
        shown.append(
            {"label": label, "value": row["expected"], "lo": row["lo"], "hi": row["hi"], "tip": tip, "hue": "by chance"}
        )
    if not shown:
        return themed(nothing("nothing was compared"))
    return themed(
        intervals(shown, x="overlap", hues={"observed": color("pos"), "by chance": color("null")}, legend=" ")
    )


def reuse(result: Any) -> Any:
    """Heat map: the faithfulness of each circuit on each behavior."""
    found = rows(result.tables.get("matrix"), "circuit", "behavior", "faithfulness", "lo", "hi", "null")
    cells = [
        {
            "x": row["behavior"],
            "y": row["circuit"],
            "value": row["faithfulness"],
            "tip": f"circuit of {row['circuit']} on {row['behavior']}: "
            f"{estimate(row['faithfulness'], row['lo'], row['hi'])}; random circuits {number(row['null'])}",
        }
        for row in found
        if row["faithfulness"] is not None
    ]
    if not cells:
        return themed(nothing("no circuit was run"))
    return themed(heat(cells, x="behavior", y="circuit", legend="faithfulness", extreme=1.0, step=(64, 30), title=""))


def head_groups(result: Any) -> Any:
    """What each group of heads is worth to the metric, beside random groups of the same layers."""
    found = rows(result.tables.get("groups"), "group", "effect", "lo", "hi", "null", "p", "heads")
    shown: list[Row] = []
    for row in found:
        if row["effect"] is not None:
            tip = f"{row['group']} ({row['heads']}): {estimate(row['effect'], row['lo'], row['hi'])}; "
            tip += f"random groups {number(row['null'])}; p = {number(row['p'])}"
            shown.append(
                {
                    "label": row["group"],
                    "value": row["effect"],
                    "lo": row["lo"],
                    "hi": row["hi"],
                    "tip": tip,
                    "hue": "group",
                }
            )
            shown.append(
                {"label": row["group"], "value": row["null"], "lo": None, "hi": None, "tip": tip, "hue": "random"}
            )
    if not shown:
        return themed(nothing("no groups"))
    return themed(
        intervals(
            shown, x="share of the metric lost", hues={"group": color("pos"), "random": color("null")}, legend=" "
        )
    )

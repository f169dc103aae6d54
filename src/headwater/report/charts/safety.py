"""Charts of what tells prompts apart, and of the heads that a reply hangs on."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import data, intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import number


def detection(result: Any) -> Any:
    """AUROC of each detector with its interval, baselines in grey, chance as a dashed line."""
    found = rows(result.tables.get("detectors"), "detector", "auroc", "lo", "hi", "n", "baseline")
    found = [row for row in found if row["auroc"] is not None]
    if not found:
        return themed(nothing("no detector could be judged"))
    drawn = [
        {
            "label": row["detector"],
            "value": row["auroc"],
            "lo": row["lo"],
            "hi": row["hi"],
            "hue": "baseline" if row["baseline"] else "inside the model",
            "reference": 0.5,
            "tip": f"{row['detector']}: AUROC {number(row['auroc'])} "
            f"[{number(row['lo'])}, {number(row['hi'])}], {number(row['n'])} test pairs",
        }
        for row in found
    ]
    hues = {"inside the model": color("pos"), "baseline": color("null")}
    return themed(intervals(drawn, x="AUROC on test pairs", hues=hues, domain=(0.0, 1.0)))


def head_importance(result: Any) -> Any:
    """Every head: how far the reply moves without it, against how far any reply does; beside it the group, with random
    groups of the same layers."""
    found = rows(result.tables.get("heads"), "layer", "head", "score", "elsewhere")
    found = [row for row in found if row["score"] is not None and row["elsewhere"] is not None]
    group = rows(result.tables.get("group"), "order", "head", "score", "random", "lo", "hi")
    if not found:
        return themed(nothing("no head was taken out"))
    members = [row["head"] for row in group]
    for row in found:
        name = f"a{row['layer']}.h{row['head']}"
        row["hue"] = "in the group" if name in members else "other heads"
        row["tip"] = f"{name}: {number(row['score'])} here, {number(row['elsewhere'])} on the counterfactuals"
    top = max(max(row["score"], row["elsewhere"]) for row in found)
    line = [{"x": at, "y": at, "tip": "as much elsewhere as here"} for at in (0.0, top)]
    rule = alt.Chart(data(line)).mark_line(color=color("null"), strokeDash=[3, 3]).encode(x="x:Q", y="y:Q")
    dots = (
        alt.Chart(data(found))
        .mark_point(filled=True, size=42, opacity=0.9)
        .encode(
            x=alt.X("elsewhere:Q", title="moved on the counterfactuals"),
            y=alt.Y("score:Q", title="moved on the prompts"),
            color=alt.Color(
                "hue:N",
                legend=alt.Legend(title=None, orient="top"),
                scale=alt.Scale(domain=["in the group", "other heads"], range=[color("neg"), color("pos")]),
            ),
            description="tip:N",
            tooltip="tip:N",
        )
    )
    left = alt.layer(rule, dots).properties(width=260, height=220)
    drawn = [
        {
            "label": f"{row['order']} head{'s'[: row['order'] > 1]}: + {row['head']}",
            "value": row["score"],
            "lo": row["lo"],
            "hi": row["hi"],
            "tip": f"up to {row['head']}: {number(row['score'])}; random groups {number(row['random'])} "
            f"[{number(row['lo'])}, {number(row['hi'])}]",
        }
        for row in group
        if row["score"] is not None
    ]
    if not drawn:
        return themed(left)
    # the bars are those of random groups, the dot is the group itself
    return themed(alt.hconcat(left, intervals(drawn, x="moved (bar: random groups)", width=180), spacing=30))


def pruning(result: Any) -> Any:
    """The behavior's metric, and perplexity where it was measured, over the share of neurons taken out, by ranking."""
    found = rows(result.tables.get("curve"), "by", "share", "metric", "accuracy", "perplexity", "lo", "hi")
    found = [row for row in found if row["metric"] is not None and row["share"] is not None]
    if not found:
        return themed(nothing("nothing was pruned"))
    metric = str(result.facts.get("metric") or "metric").replace("_", " ")
    for row in found:
        row["tip"] = (
            f"{number(row['share'] * 100)}% by {row['by']}: {metric} {number(row['metric'])}, accuracy "
            f"{number(row['accuracy'])}, perplexity {number(row['perplexity'])}"
        )
    hue = alt.Color(
        "by:N",
        legend=alt.Legend(title="ranked by", orient="top"),
        scale=alt.Scale(domain=["relevance", "magnitude", "random"], range=[color("pos"), color("neg"), color("null")]),
    )

    def panel(values: list[dict[str, Any]], column: str, title: str, log: bool) -> Any:
        scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
        base = alt.Chart(data(values)).encode(
            x=alt.X("share:Q", title="neurons taken out", axis=alt.Axis(format="%")),
            y=alt.Y(f"{column}:Q", title=title, scale=scale),
            color=hue,
        )
        line = base.mark_line(strokeWidth=2)
        dots = base.mark_point(filled=True, size=44, opacity=1).encode(description="tip:N", tooltip="tip:N")
        return alt.layer(line, dots).properties(width=250, height=200)

    panels = [panel(found, "metric", metric, log=False)]
    texts = [row for row in found if row["perplexity"] is not None and row["perplexity"] > 0]
    if texts:
        panels.append(panel(texts, "perplexity", "perplexity of plain text", log=True))
    return themed(alt.hconcat(*panels, spacing=30))


def cue_groups(result: Any) -> Any:
    """Accuracy of each group of test pairs with its interval, a panel a source; overall accuracy dashed."""
    found = rows(result.tables.get("groups"), "source", "group", "n", "accuracy", "lo", "hi")
    found = [row for row in found if row["accuracy"] is not None]
    if not found:
        return themed(nothing("no groups"))
    spread = {row["source"]: row for row in rows(result.tables.get("sources"), "source", "spread", "p")}
    drawn = [
        {
            "label": row["group"],
            "value": row["accuracy"],
            "lo": row["lo"],
            "hi": row["hi"],
            "group": f"{row['source']} (p = {number((spread.get(row['source']) or {}).get('p'))})",
            "reference": result.facts.get("accuracy"),
            "tip": f"{row['source']} {row['group']}: accuracy {number(row['accuracy'])} "
            f"[{number(row['lo'])}, {number(row['hi'])}], {number(row['n'])} test pairs",
        }
        for row in found
    ]
    return themed(intervals(drawn, x="accuracy", grouped=True, domain=(0.0, 1.0)))

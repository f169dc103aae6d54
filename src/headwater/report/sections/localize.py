"""Where in the model it happens: patching heat maps and attribution scores."""

from headwater.report.blocks import Section
from headwater.report.charts.parts import Row, themed
from headwater.report.charts.patches import (
    DIRECTIONS,
    SITES,
    Panel,
    draw_panels,
    group_panels,
    group_title,
    panels,
    peaks,
)
from headwater.report.charts.scores import attribution as score_map
from headwater.report.charts.scores import color_end, node_rows, strongest_nodes
from headwater.report.gather import Found
from headwater.report.sections.base import Context, missing
from headwater.report.words import count, estimate, finite, listing, metric_name, number, percent, strongest, visible


def patching(context: Context) -> Section:
    """One heat map for each kind of site that was patched."""
    title = "Where it happens: patching"
    every = [
        (found, panel)
        for found in context.run.all("patching")
        for panel in panels(found.result, context.position_labels())
    ]
    if not every:
        what = (
            "It copies activations between the clean and the corrupt run, place by place, and measures "
            "how far the answer moves."
        )
        return missing(context, id="patching", title=title, what=what, stage="localize")
    best = strongest([row | {"panel": panel} for _, panel in every for row in panel.rows], "effect", 1)[0]
    moved = sum(abs(row["effect"]) >= 0.1 for _, panel in every for row in panel.rows)
    total = sum(len(panel.rows) for _, panel in every)
    lead = [
        f"Of {total:,} places patched one at a time, {count(moved, 'place')} moved the metric by at "
        "least a tenth of the way; "
        f"the strongest is {_site(best)} ({_effect(best)}).",
        "An effect of 0 leaves the run as it was, 1 moves the metric all the way to the other run; "
        "orange moves it away.",
    ]
    section = Section(id="patching", title=title, lead=lead)
    of = {id(panel): found for found, panel in every}
    for group in group_panels([panel for _, panel in every]):
        results = list(dict.fromkeys(of[id(panel)] for panel in group))
        section.blocks.append(
            context.figure(
                results[0],
                lambda group=group: themed(draw_panels(group)),
                title=group_title(group),
                caption=_caption(group, results[0]),
                tables=["effects"],
                others=results[1:],
            )
        )
    return section


def _site(row: Row) -> str:
    if row["site"]:
        return str(row["site"])
    head = f".h{row['head']}" if row["head"] is not None else ""
    at = f"@{row['position']}" if row["position"] is not None else ""
    return f"{row['kind']}.{row['layer']}{head}{at}"


def _effect(row: Row) -> str:
    return estimate(row["effect"], row["lo"], row["hi"])


def _node(row: Row) -> str:
    return f"{row['node']} ({number(row['score'])})"


def _caption(group: list[Panel], found: Found) -> str:
    parts = []
    for panel in group:
        best = listing(f"{_site(row)} ({_effect(row)})" for row in peaks(panel))
        how = ""
        if len({other.kind for other in group}) > 1:
            how = f" in {SITES.get(panel.kind, panel.kind)}"
        elif len(group) > 1 and panel.direction in DIRECTIONS:
            how = f", {DIRECTIONS[panel.direction]}"
        parts.append(f"Strongest{how}: {best}.")
        if panel.by == "position" and panel.kind.startswith("resid") and (path := handover(panel.rows)):
            parts.append(path)
    clean, corrupt = finite(found.result.facts.get("clean")), finite(found.result.facts.get("corrupt"))
    if clean is not None and corrupt is not None:
        metric = metric_name(found.result.facts.get("metric") or "metric")
        parts.append(f"The {metric} is {number(clean)} on the clean prompts and {number(corrupt)} on the corrupt ones.")
    return " ".join(parts)


def handover(rows: list[Row]) -> str:
    """Which position carries the answer in which layers, where that changes on the way up."""
    top = max(abs(row["effect"]) for row in rows)
    best: dict[int, Row] = {}
    for row in rows:
        layer = row["layer"]
        if (
            layer is not None
            and row["effect"] >= 0.25 * top
            and (layer not in best or row["effect"] > best[layer]["effect"])
        ):
            best[layer] = row
    runs: list[list[int | str]] = []
    for layer in sorted(best):
        position = str(best[layer]["position"])
        if runs and runs[-1][0] == position:
            runs[-1][2] = layer
        else:
            runs.append([position, layer, layer])
    if not 2 <= len(runs) <= 4:
        return ""
    return (
        "What decides the answer sits at "
        + listing((f"{p} in {_span(a, b)}" for p, a, b in runs), last="then at")
        + "."
    )


def _span(first: int | str, last: int | str) -> str:
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def attribution(context: Context) -> Section | None:
    """Every node's score, and the strongest nodes by name."""
    title = "Which parts carry it: attribution"
    found = [item for item in context.run.all("attribution") if node_rows(item.result)]
    if not found:
        what = "It scores every head, MLP and edge at once with gradients."
        return missing(context, id="attribution", title=title, what=what, stage="localize")
    section = Section(id="attribution", title=title)
    for item in found:
        nodes = node_rows(item.result)
        best = strongest(nodes, "score", 5)
        total = sum(abs(row["score"]) for row in nodes)
        share = sum(abs(row["score"]) for row in strongest(nodes, "score", 10)) / total if total else None
        method = str(item.result.facts.get("method") or item.result.config.get("method") or item.name).replace("_", "-")
        section.lead = [
            *section.lead,
            f"By {visible(method, 40)}, the largest of {len(nodes):,} node scores are {listing(map(_node, best))}; "
            f"the top ten carry {percent(share)} of all absolute score.",
        ]
        section.blocks.append(
            context.figure(
                item,
                lambda item=item: score_map(item.result),
                title=f"Score of every head and MLP ({visible(method, 40)})",
                caption=_score_caption(nodes),
                tables=["nodes"],
            )
        )
        section.blocks.append(
            context.figure(
                item,
                lambda item=item: strongest_nodes(item.result),
                title=f"The strongest nodes ({visible(method, 40)})",
                tables=["nodes", "edges"],
                code="from headwater.report.charts import strongest_nodes\nstrongest_nodes(found)",
            )
        )
    return section


def _score_caption(nodes: list[Row]) -> str:
    text = "Blue raises the metric on the way from corrupt to clean, orange lowers it."
    drawn = [row for row in nodes if row["sort"] in ("head", "mlp")]
    end = color_end(drawn)
    if beyond := [row for row in drawn if abs(row["score"]) > end]:
        text += f" Colours end at ±{number(end)}, the strongest head; {listing(map(_node, beyond))} lies beyond."
    return f"{text} Scores are estimates; the claims test them by intervention."

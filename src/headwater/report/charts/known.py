"""Charts of models whose mechanism is known: checks of trained models, recovered circuits, toy models."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import Row, data, intervals, nothing, rows, themed
from headwater.report.theme import color
from headwater.report.words import number

_PHASES = {
    "not represented": "band",
    "superposition": "neg",
    "dedicated": "pos",
    "not known": "grid",
}  # phase: its colour
_POLYTOPES = {
    1.0: "1 alone",
    3 / 4: "3/4 tetrahedron",
    2 / 3: "2/3 triangle",
    1 / 2: "1/2 pair",
    2 / 5: "2/5 pentagon",
    3 / 8: "3/8 antiprism",
}  # dimensions of a feature: what it is a corner of


def siit_report(result: Any) -> Any:
    """Each node's interchange accuracy with its interval: inside the circuit, and outside it."""
    found = rows(result.tables.get("nodes"), "node", "role", "variables", "accuracy", "lo", "hi", "n", "moved")
    shown: list[Row] = [
        {
            "label": f"{row['node']} {', '.join(row['variables'] or [])}".strip(),
            "value": row["accuracy"],
            "lo": row["lo"],
            "hi": row["hi"],
            "hue": "in the circuit" if "inside" in str(row["role"]) else str(row["role"]).replace("all ", ""),
            "tip": f"{row['node']}: {number(row['accuracy'])} of {row['n']}, answers moved in {number(row['moved'])}",
        }
        for row in found
        if row["accuracy"] is not None
    ]
    hues = {"model": color("null"), "in the circuit": color("pos"), "outside": color("neg")}
    low = min([row["lo"] for row in shown if row["lo"] is not None], default=0.0)
    return themed(
        intervals(
            shown, x="share of inputs with the right answers after the swap", hues=hues, domain=(min(low, 0.95), 1.0)
        )
    )


def recovery(result: Any) -> Any:
    """The nodes by their score, the true ones marked."""
    found = rows(result.tables.get("nodes"), "node", "score", "true")
    if not found:
        return themed(nothing())
    shown = [
        {"node": row["node"], "score": row["score"], "of": "the circuit" if row["true"] else "outside",
         "tip": f"{row['node']}: {number(row['score'])}"}
        for row in found[:40]
    ]  # fmt: skip
    shade = alt.Color(
        "of:N",
        scale=alt.Scale(domain=["the circuit", "outside"], range=[color("pos"), color("null")]),
        legend=alt.Legend(title=None, orient="top"),
    )
    chart = alt.Chart(data(shown)).mark_bar(height=11)
    chart = chart.encode(
        x=alt.X("score:Q", title="score (absolute)"),
        y=alt.Y("node:N", sort=None, title=None),
        color=shade,
        description="tip:N",
        tooltip="tip:N",
    )
    return themed(chart.properties(width=440, height=alt.Step(17)))


def superposition(result: Any) -> Any:
    """The phase diagram where importances differ; else the dimensions of every feature over sparsity."""
    found = rows(result.tables.get("instances"), "density", "importance", "phase", "predicted")
    instances = [row for row in found if row["density"] is not None and row["importance"] is not None]
    if len({row["importance"] for row in instances}) > 1:
        return themed(_phases(instances))
    found = rows(result.tables.get("features"), "density", "norm", "dimensionality", "fraction")
    shown = [
        {
            "x": 1 / row["density"],
            "y": row["dimensionality"],
            "tip": f"{number(row['dimensionality'])}, near {row['fraction']}",
        }
        for row in found
        if row["dimensionality"] is not None and (row["norm"] or 0) > 0.5
    ]
    if not shown:
        return themed(nothing())
    sparse = alt.X(
        "x:Q",
        scale=alt.Scale(type="log", nice=False, padding=12),
        title="1 / density (sparser to the right)",
        axis=alt.Axis(grid=False, values=sorted({row["x"] for row in shown}), format=".3~g", labelOverlap=True),
    )
    dots = (
        alt.Chart(data(shown))
        .mark_circle(size=26, opacity=0.45, color=color("pos"))
        .encode(
            x=sparse,
            y=alt.Y(
                "y:Q",
                scale=alt.Scale(domain=[0, 1.05], nice=False),
                title="dimensions of a feature",
                axis=alt.Axis(grid=False, tickCount=6),
            ),
            description="tip:N",
            tooltip="tip:N",
        )
    )
    # the names of the two lowest stand a little apart, as their lines are closer than a line of text
    lines = [{"at": at, "name": name, "beside": at + {2 / 5: 0.008, 3 / 8: -0.014}.get(at, 0.0)}
             for at, name in _POLYTOPES.items()]  # fmt: skip
    at = alt.Chart(data(lines))
    rules = at.mark_rule(color=color("null"), strokeDash=[3, 3], strokeWidth=0.8).encode(y="at:Q")
    names = at.mark_text(align="left", dx=6, color=color("soft"), fontSize=10).encode(
        text="name:N", x=alt.value(460), y="beside:Q"
    )
    return themed(alt.layer(rules, dots, names).properties(width=460, height=300))


def _phases(instances: list[Row]) -> Any:
    """One cell an instance; a dot where the derivation says another phase."""
    cells = [
        {
            "x": number(row["importance"]),
            "y": number(row["density"]),
            "phase": row["phase"] if row["phase"] in _PHASES else "not known",
            "odd": row["predicted"] is not None and row["phase"] != row["predicted"],
            "tip": f"density {number(row['density'])}, importance {number(row['importance'])}: {row['phase']}"
            + (f" ({row['predicted']} predicted)" if row["predicted"] is not None else ""),
        }
        for row in sorted(instances, key=lambda row: (row["density"], row["importance"]))
    ]
    columns, lines = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in ("x", "y"))
    hues = {name: color(hue) for name, hue in _PHASES.items() if any(cell["phase"] == name for cell in cells)}
    shade = alt.Color(
        "phase:N",
        scale=alt.Scale(domain=list(hues), range=list(hues.values())),
        legend=alt.Legend(title="the last feature", orient="top", symbolType="square", symbolStrokeWidth=0),
    )
    x = alt.X("x:N", sort=columns, title="relative importance of the last feature", axis=alt.Axis(labelAngle=0))
    y = alt.Y("y:N", sort=lines[::-1], title="density", axis=alt.Axis(labelOverlap=True))
    base = alt.Chart().encode(x=x, y=y, description="tip:N", tooltip="tip:N")
    layers = [base.mark_rect(stroke=color("paper"), strokeWidth=0.6).encode(color=shade)]
    odd = [cell for cell in cells if cell["odd"]]
    title = "a dot: another phase is predicted" if odd else ""
    if odd:
        layers.append(
            base.mark_point(filled=True, size=34, opacity=1, color=color("ink")).transform_filter("datum.odd")
        )
    return alt.layer(*layers, data=data(cells)).properties(title=title, width=alt.Step(44), height=alt.Step(20))


def algebra(result: Any) -> Any:
    """The spectrum: each irrep's share of the logits, the embedding and the neurons."""
    found = rows(result.tables.get("irreps"), "irrep", "embedding", "logits", "neurons", "key")
    shown: list[Row] = [
        {
            "irrep": row["irrep"],
            "share": row[part],
            "part": part,
            "key": "key" if row["key"] else "other",
            "tip": f"{row['irrep']}: {number(row[part])} of the {part}",
        }
        for row in found
        for part in ("embedding", "neurons", "logits")
        if row[part] is not None
    ]
    if not shown:
        return themed(nothing())
    parts = list(dict.fromkeys(row["part"] for row in shown))
    shade = alt.Color(
        "key:N",
        scale=alt.Scale(domain=["key", "other"], range=[color("pos"), color("null")]),
        legend=alt.Legend(title=None, orient="top"),
    )
    chart = (
        alt.Chart(data(shown))
        .mark_bar()
        .encode(
            x=alt.X("irrep:N", sort=None, title=None, axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("share:Q", title="share of variance"),
            color=shade,
            row=alt.Row("part:N", sort=parts, title=None, header=alt.Header(orient="top", labelAnchor="start")),
            description="tip:N",
            tooltip="tip:N",
        )
        .properties(width=520, height=90)
    )
    return themed(chart)

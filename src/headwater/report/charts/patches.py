"""Charts of a PatchingResult: heat maps of layer by position, layer by head, and head by position."""

from dataclasses import dataclass
from typing import Any

import altair as alt

from headwater.report.charts.parts import Row, heat, intervals, nothing, rows, themed
from headwater.report.words import estimate, number, strongest, token

SITES = {
    "embed": "the embedding",
    "resid_pre": "the residual stream before each block",
    "resid_mid": "the residual stream between attention and MLP",
    "resid_post": "the residual stream after each block",
    "attn_out": "what attention adds to the stream",
    "mlp_out": "what the MLP adds to the stream",
    "head": "what each head adds to the stream",
    "z": "each head's mixed values",
    "q": "each head's query",
    "k": "each key head's keys",
    "v": "each value head's values",
    "pattern": "each head's attention pattern",
    "neurons": "the MLP's neurons",
}
DIRECTIONS = {
    "denoise": "clean value put into the corrupt run",
    "noise": "corrupt value put into the clean run",
}
_WRITES = {"attn_out": "attention", "mlp_out": "MLP"}
_RANK = {"position": 0, "layer": 2, "head": 4, "head and position": 6}  # the stream first, single heads last
_MOST_HEADS = 24


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What was patched in one direction at one kind of site, by what columns, and the rows that say how it went."""

    kind: str
    direction: str
    by: str
    """What the columns are: `position`, `head`, `head and position`, or `layer` (no heat map)."""
    rows: list[Row]
    names: dict[str, str]
    """What to write below a position's column, where it is not the position's name."""
    alone: str | None = None
    """The only position at which heads were patched."""


def patching(result: Any) -> Any:
    """All panels of the result below each other, those of the same sites in both directions side by side."""
    grouped = group_panels(panels(result))
    drawn = [draw_panels(group, title=True) for group in grouped]
    return themed(alt.vconcat(*drawn).resolve_scale(color="independent") if drawn else nothing())


def group_panels(every: list[Panel]) -> list[list[Panel]]:
    """Panels that belong side by side: the same sites patched in both directions, or the two writes of a block."""
    grouped: dict[tuple[str, ...], list[Panel]] = {}
    directions = {panel.direction for panel in every}
    for panel in every:
        kind = "writes" if panel.kind in _WRITES and len(directions) == 1 else panel.kind
        grouped.setdefault((kind, panel.by, panel.alone or ""), []).append(panel)
    return sorted(grouped.values(), key=lambda group: _RANK.get(group[0].by, len(_RANK)) + (group[0].kind in _WRITES))


def group_title(group: list[Panel]) -> str:
    """What was patched, as a title."""
    panel = group[0]
    both = len({other.kind for other in group}) > 1
    site = "what attention and MLPs add to the stream" if both else SITES.get(panel.kind, panel.kind.replace("_", " "))
    by = {"head": "layer and head", "position": "layer and position", "head and position": "head and position"}
    title = f"{site[:1].upper()}{site[1:]}, by {by.get(panel.by, 'layer')}"
    if panel.alone is None:
        return title
    return title + (", at the last position" if panel.alone in ("-1", "END") else f", at {panel.alone}")


def draw_panels(group: list[Panel], *, title: bool = False) -> Any:
    """Panels side by side under one colour scale, each headed by its direction."""
    extreme = max(abs(row["effect"]) for panel in group for row in panel.rows)
    drawn = []
    for panel in group:
        heading = [group_title(group)] if title and panel is group[0] else []
        heading += [_WRITES[panel.kind]] if len({other.kind for other in group}) > 1 else []
        heading += [DIRECTIONS.get(panel.direction, panel.direction)] if panel.direction else []
        drawn.append(_draw(panel, extreme, len(group)).properties(title="; ".join(heading)))
    return alt.hconcat(*drawn, spacing=28) if len(drawn) > 1 else drawn[0]


def panels(result: Any, names: dict[str, str] | None = None) -> list[Panel]:
    """One panel for each direction, kind of site, and pair of axes that the result holds.

    `names`: what to write below a position's column (two lines with a line end between), where the result does not say.
    """
    columns = ("site", "kind", "layer", "head", "position", "effect", "lo", "hi", "n", "direction")
    axes = {(True, True): "head and position", (True, False): "head", (False, True): "position"}
    split: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows(result.tables.get("effects"), *columns):
        if row["effect"] is not None:
            by = axes.get((row["head"] is not None, row["position"] is not None), "layer")
            split.setdefault((str(row["direction"] or ""), str(row["kind"] or ""), by), []).append(row)
    names = labels(result) or names or {}
    made = []
    for (direction, kind, by), group in split.items():
        places = list(dict.fromkeys(str(row["position"]) for row in group))
        alone = places[0] if by == "head and position" and len(places) == 1 else None
        by = "head" if alone else by
        made.append(Panel(kind=kind, direction=direction, by=by, rows=group, names=names, alone=alone))
    return made


def labels(result: Any) -> dict[str, str]:
    """Position names to what to write below their column: the token of the shown prompt, where the result knows it."""
    known = result.facts.get("position_labels") or result.facts.get("tokens") or {}
    if isinstance(known, list):
        known = {str(i): text for i, text in enumerate(known)}
    return {str(name): f"{token(text, 12)}\n{name}" for name, text in known.items()} if isinstance(known, dict) else {}


def _draw(panel: Panel, extreme: float, n_panels: int) -> Any:
    group, by = panel.rows, panel.by
    if by == "layer":
        ordered = sorted(group, key=lambda row: (row["layer"] is None, row["layer"]), reverse=True)
        shown = [
            _cell(row, "", "") | {"label": f"layer {row['layer']}" if row["layer"] is not None else row["site"]}
            for row in ordered
        ]
        return intervals(shown, x="effect", step=14, width=400 // n_panels)
    if by == "head and position":
        best: dict[tuple[int, int], float] = {}
        for row in group:
            key = (row["layer"], row["head"])
            best[key] = max(best.get(key, 0.0), abs(row["effect"]))
        kept = set(sorted(best, key=lambda key: -best[key])[:_MOST_HEADS])
        order = _ordered(group, panel.names)
        group = [row for row in group if (row["layer"], row["head"]) in kept]
        group.sort(key=lambda row: (*_depth(row), order.index(row["position"])))
        cells = [_cell(row, _column(row, panel.names), f"a{row['layer']}.h{row['head']}") for row in group]
    elif by == "head":
        cells = [_cell(row, f"h{row['head']}", row["layer"]) for row in sorted(group, key=_depth)]
    else:
        order = _ordered(group, panel.names)
        group = sorted(group, key=lambda row: (*_depth(row), order.index(row["position"])))
        cells = [_cell(row, _column(row, panel.names), row["layer"]) for row in group]
    columns = list(dict.fromkeys(cell["x"] for cell in cells))
    widest = max(len(part) for column in columns for part in column.split("\n"))
    room = (720 - 90 * n_panels) // n_panels // len(columns)
    width = max(17, min(room, max(34, round(6.2 * widest) + 12)))
    step = (width, 15 if by == "head and position" else 13)
    x = "head" if by == "head" else "position"
    y = "head" if by == "head and position" else "layer"
    return heat(cells, x=x, y=y, extreme=extreme, step=step)


def _ordered(group: list[Row], names: dict[str, str]) -> list[Any]:
    """Positions as they stand in the prompt where that is known, else in the order of the rows."""
    found = list(dict.fromkeys(row["position"] for row in group))
    known = list(names)
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


def _depth(row: Row) -> tuple[bool, int, int]:
    """Sort key: sites without a layer (the embedding) lowest, then layer by layer, head by head."""
    return (row["layer"] is not None, row["layer"] or 0, row["head"] or 0)


def _column(row: Row, names: dict[str, str]) -> str:
    return names.get(str(row["position"]), str(row["position"]))


def _cell(row: Row, x: str, y: Any) -> Row:
    site = row["site"] or row["kind"]
    at = f" at {x!s}".replace("\n", " ") if x and "@" not in str(site) else ""
    return {
        "x": x,
        "y": y,
        "value": row["effect"],
        "lo": row["lo"],
        "hi": row["hi"],
        "tip": f"{site}{at}: {estimate(row['effect'], row['lo'], row['hi'])}, n {number(row.get('n'))}",
    }


def peaks(panel: Panel, n: int = 3) -> list[Row]:
    """The panel's strongest cells."""
    return strongest(panel.rows, "effect", n)

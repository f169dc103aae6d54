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
    "denoise": "put back from the clean run into the corrupt one",
    "noise": "taken out: corrupt value into the clean run",
}
_MOST_HEADS = 24


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One heat map of a patching result: what was patched, its rows, and the chart."""

    kind: str
    direction: str
    by: str
    """What the columns are: `position`, `head`, `head and position`, or `layer` (no heat map)."""
    rows: list[Row]
    chart: Any


def patching(result: Any) -> Any:
    """All panels of the result below each other."""
    drawn = [panel.chart.properties(title=panel_title(panel)) for panel in panels(result)]
    return themed(alt.vconcat(*drawn).resolve_scale(color="independent") if drawn else nothing())


def panel_title(panel: Panel) -> str:
    """What a panel shows, as a title."""
    site, how = SITES.get(panel.kind, panel.kind), DIRECTIONS.get(panel.direction, panel.direction)
    return f"{site[:1].upper()}{site[1:]}, {how}" if how else f"{site[:1].upper()}{site[1:]}"


def panels(result: Any) -> list[Panel]:
    """One panel for each direction, kind of site, and pair of axes that the result holds, not yet themed."""
    found = rows(
        result.tables.get("effects"), "site", "kind", "layer", "head", "position", "effect", "lo", "hi", "direction"
    )
    split: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        if row["effect"] is None:
            continue
        by = {(True, True): "head and position", (True, False): "head", (False, True): "position"}.get(
            (row["head"] is not None, row["position"] is not None), "layer"
        )
        split.setdefault((str(row["direction"] or ""), str(row["kind"] or ""), by), []).append(row)
    return [
        Panel(kind=kind, direction=direction, by=by, rows=group, chart=_draw(group, by, labels(result)))
        for (direction, kind, by), group in split.items()
    ]


def labels(result: Any) -> dict[str, str]:
    """Position names to what to write below their column: the token of the shown prompt, where the result knows it."""
    known = result.facts.get("position_labels") or result.facts.get("tokens") or {}
    if isinstance(known, list):
        known = {str(i): text for i, text in enumerate(known)}
    return {str(name): f"{token(text)} · {name}" for name, text in known.items()} if isinstance(known, dict) else {}


def _draw(group: list[Row], by: str, names: dict[str, str]) -> Any:
    extreme = max(abs(row["effect"]) for row in group)
    if by == "layer":
        ordered = sorted(group, key=lambda row: (row["layer"] is None, row["layer"]), reverse=True)
        shown = [
            _cell(row, "", "") | {"label": f"layer {row['layer']}" if row["layer"] is not None else row["site"]}
            for row in ordered
        ]
        return intervals(shown, x="effect (1 = all the way)", step=14)
    if by == "head and position":
        best: dict[tuple[int, int], float] = {}
        for row in group:
            key = (row["layer"], row["head"])
            best[key] = max(best.get(key, 0.0), abs(row["effect"]))
        kept = sorted(sorted(best, key=lambda key: -best[key])[:_MOST_HEADS])
        group = [row for row in group if (row["layer"], row["head"]) in kept]
        group.sort(key=lambda row: (row["layer"], row["head"]))
        cells = [_cell(row, _column(row, names), f"a{row['layer']}.h{row['head']}") for row in group]
        return heat(cells, x="position", y="head", extreme=extreme, step=(_width(cells), 15))
    if by == "head":
        group = sorted(group, key=lambda row: (row["layer"] or 0, row["head"]))
        cells = [_cell(row, f"h{row['head']}", row["layer"]) for row in sorted(group, key=lambda row: row["head"])]
        cells.sort(key=lambda cell: cell["y"] if cell["y"] is not None else -1)
        return heat(
            cells, x="head", y="layer", extreme=extreme, step=(34 if len({c["x"] for c in cells}) <= 16 else 20, 13)
        )
    order = list(dict.fromkeys(_column(row, names) for row in group))
    group = sorted(group, key=lambda row: (row["layer"] is not None, row["layer"] or 0))
    cells = [_cell(row, _column(row, names), row["layer"]) for row in group]
    cells.sort(key=lambda cell: (cell["y"] is not None, cell["y"] or 0, order.index(cell["x"])))
    return heat(cells, x="position", y="layer", extreme=extreme, step=(_width(cells), 13))


def _column(row: Row, names: dict[str, str]) -> str:
    return names.get(str(row["position"]), str(row["position"]))


def _width(cells: list[Row]) -> int:
    return max(18, min(54, 620 // max(1, len({cell["x"] for cell in cells}))))


def _cell(row: Row, x: str, y: Any) -> Row:
    site = row["site"] or row["kind"]
    at = f" at {x}" if x and "@" not in str(site) else ""
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

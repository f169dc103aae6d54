"""Where the nodes of a circuit stand: layers upwards, heads (or token positions) sideways, the strongest edges only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headwater.report.charts.parts import Row, rows
from headwater.report.words import count, finite, node_parts, number

MAX_EDGES, MAX_NODES = 64, 38
ROW, MARGIN = 46, 58  # pixels: between layers; left of the first column
_COLUMN = 66
_EVERY_COLUMN = (
    12  # up to so many heads, columns of heads outside the picture are kept, so that a column means one head
)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node's place (its middle, pixels) and what is written on and about it."""

    name: str
    sort: str
    layer: int | None
    x: float
    y: float
    tip: str


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A shown edge: `strength` is its share of the largest absolute score; `port` says which input (q, k, v) it
    enters.
    """

    source: str
    target: str
    port: str | None
    score: float
    strength: float
    tip: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is drawn, and how much is not."""

    nodes: list[Node]
    edges: list[Edge]
    layers: list[tuple[int, float]]
    columns: list[tuple[str, float]]
    groups: list[tuple[str, str]]
    width: float
    height: float
    n_edges: int
    n_nodes: int

    @property
    def hidden(self) -> int:
        """Edges of the circuit that are not drawn."""
        return self.n_edges - len(self.edges)


def place(result: Any, *, max_edges: int = MAX_EDGES, max_nodes: int = MAX_NODES) -> Layout:
    """Choose the strongest edges of a Circuit (at most `max_edges`, touching at most `max_nodes` nodes) and give each
    node a place.
    """
    every = rows(result.tables.get("edges"), "source", "target", "score")
    ranked = sorted(every, key=lambda row: -abs(finite(row["score"]) or 0.0))
    chosen: list[tuple[Row, str, str | None]] = []
    names: dict[str, None] = {}
    for row in ranked:
        target, port = _split(str(row["target"]))
        touched = {str(row["source"]): None, target: None}
        if len(chosen) == max_edges or len(names | touched) > max_nodes:
            break
        names |= touched
        chosen.append((row, target, port))
    listed = [str(row["node"]) for row in rows(result.tables.get("nodes"), "node")]
    if not every:
        names = dict.fromkeys(listed[:max_nodes])
    largest = max((abs(finite(row["score"]) or 0.0) for row, _, _ in chosen), default=0.0) or 1.0
    edges = [
        Edge(
            source=str(row["source"]),
            target=target,
            port=port,
            score=finite(row["score"]) or 0.0,
            strength=abs(finite(row["score"]) or 0.0) / largest,
            tip=f"{row['source']} → {row['target']}: {number(row['score'])}",
        )
        for row, target, port in chosen
    ]
    known = set(listed) | {str(row["source"]) for row in every} | {_split(str(row["target"]))[0] for row in every}
    return _arrange(list(names), edges, result, n_edges=len(every), n_nodes=len(known))


def _split(reader: str) -> tuple[str, str | None]:
    """A reader's node and which of its inputs is meant: `a5.h1<q>` is `a5.h1` and `q`; a position stays with the
    node.
    """
    parts = node_parts(reader)
    return (reader.replace(f"<{parts['port']}>", ""), parts["port"]) if parts["port"] else (reader, None)


def _column(parts: Mapping[str, Any], by_position: bool, group: int) -> Any:
    if by_position:
        return parts["pos"] or ""
    if parts["sort"] == "mlp":
        return "MLP"
    if parts["sort"] == "group":
        return parts["head"] * group + (group - 1) / 2
    return parts["head"]


def _arrange(names: list[str], edges: list[Edge], result: Any, *, n_edges: int, n_nodes: int) -> Layout:
    parts = {name: node_parts(name) for name in names}
    inner = [name for name in names if parts[name]["layer"] is not None]
    by_position = any(parts[name]["pos"] for name in inner)
    graph = result.facts.get("graph") or {}
    n_heads, n_groups = graph.get("n_heads"), graph.get("n_kv_heads")
    group = n_heads // n_groups if isinstance(n_heads, int) and isinstance(n_groups, int) and n_groups else 1
    column = {name: _column(parts[name], by_position, group) for name in inner}

    heads = sorted({c for c in column.values() if isinstance(c, int)})
    if not by_position and heads and max(heads) < _EVERY_COLUMN:
        heads = list(range(n_heads if isinstance(n_heads, int) and n_heads <= _EVERY_COLUMN else max(heads) + 1))
    if by_position:
        keys: list[Any] = list(dict.fromkeys(sorted(column.values(), key=_position_key)))
    else:
        keys = [*heads, *(["MLP"] if "MLP" in column.values() else [])]
    cells: dict[tuple[Any, Any, str], list[str]] = {}
    for name in sorted(inner, key=lambda n: (parts[n]["head"] is None, parts[n]["head"] or 0, n)):
        cells.setdefault((parts[name]["layer"], column[name], parts[name]["sort"]), []).append(name)
    widths = {key: max([1] + [len(found) for (_, c, _), found in cells.items() if c == key]) for key in keys}
    left, middle = MARGIN + 14.0, dict[Any, float]()
    for key in keys:
        middle[key] = left + widths[key] * _COLUMN / 2
        left += widths[key] * _COLUMN
    width = max(left + 20, 360.0)

    levels = sorted({parts[name]["layer"] for name in inner}, reverse=True)
    has_groups = {
        level: any(parts[n]["sort"] == "group" and parts[n]["layer"] == level for n in inner) for level in levels
    }
    top, baseline = 70.0, dict[int, float]()
    for i, level in enumerate(levels):
        baseline[level] = top + 18
        gap = i + 1 < len(levels) and level - levels[i + 1] > 1
        top += ROW + (22 if has_groups[level] else 0) + (12 if gap else 0)
    height = top + 46

    spread = {name: (i - (len(found) - 1) / 2) * _COLUMN for found in cells.values() for i, name in enumerate(found)}
    nodes = [
        Node(
            name=name,
            sort=parts[name]["sort"],
            layer=parts[name]["layer"],
            x=round(_middle(middle, column[name], width) + spread[name], 1),
            y=baseline[parts[name]["layer"]] + {"mlp": -14, "group": 27}.get(parts[name]["sort"], 0),
            tip=_tip(name, edges),
        )
        for name in inner
    ]
    outer = [name for name in names if name not in column]
    ends = [("logits", 36.0), ("input", height - 24)]
    for end, y in ends:
        at = [name for name in outer if parts[name]["sort"] == end]
        for i, name in enumerate(at):
            x = (MARGIN + width) / 2 + (i - (len(at) - 1) / 2) * 1.6 * _COLUMN
            nodes.append(Node(name=name, sort=end, layer=None, x=round(x, 1), y=y, tip=_tip(name, edges)))
    other = [name for name in outer if parts[name]["sort"] == "other"]
    nodes += [
        Node(name=name, sort="other", layer=None, x=width + i * _COLUMN, y=height - 24, tip=_tip(name, edges))
        for i, name in enumerate(other)
    ]
    kept = {node.name for node in nodes}
    return Layout(
        nodes=nodes,
        edges=[edge for edge in edges if edge.source in kept and edge.target in kept],
        layers=[(level, baseline[level]) for level in levels],
        columns=[(str(key) if by_position or key == "MLP" else f"h{key}", middle[key]) for key in keys],
        groups=_members(nodes, parts, group),
        width=width + len(other) * _COLUMN,
        height=height,
        n_edges=n_edges,
        n_nodes=n_nodes,
    )


def _position_key(pos: Any) -> tuple[bool, Any]:
    text = str(pos)
    return (not text.lstrip("-").isdigit(), int(text) if text.lstrip("-").isdigit() else 0)


def _middle(middle: Mapping[Any, float], column: Any, width: float) -> float:
    """A column's middle; a key/value group stands between its heads, which may not all be columns of the picture."""
    if column in middle:
        return middle[column]
    numbers = [key for key in middle if isinstance(key, int | float)]
    if not isinstance(column, int | float) or not numbers:
        return width / 2
    below, above = (
        max((k for k in numbers if k <= column), default=None),
        min((k for k in numbers if k >= column), default=None),
    )
    ends = [middle[k] for k in (below, above) if k is not None]
    return sum(ends) / len(ends)


def _members(nodes: list[Node], parts: Mapping[str, Mapping[str, Any]], group: int) -> list[tuple[str, str]]:
    """Which drawn heads read which drawn key/value group."""
    return [
        (kv.name, head.name)
        for kv in nodes
        if kv.sort == "group"
        for head in nodes
        if head.sort == "head" and head.layer == kv.layer
        if parts[head.name]["head"] // group == parts[kv.name]["head"]
        and parts[head.name]["pos"] == parts[kv.name]["pos"]
    ]


def _tip(name: str, edges: list[Edge]) -> str:
    into, out = [e for e in edges if e.target == name], [e for e in edges if e.source == name]
    lines = [f"{name}: {count(len(into), 'edge')} in, {count(len(out), 'edge')} out, of those drawn"]
    lines += [edge.tip for edge in sorted([*into, *out], key=lambda e: -e.strength)[:8]]
    return "\n".join(lines)

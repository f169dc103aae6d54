"""A circuit's drawing: an SVG of its own, in the page's colour names.

Hovering over a node, or stepping to it with the keyboard, fades the edges that do not touch it; style rules alone do
that, so it works where scripts are off.
"""

from collections.abc import Iterable, Mapping

from headwater.report.layout import MARGIN, ROW, Layout, Node
from headwater.report.svg import element, var
from headwater.report.theme import MONO, SANS
from headwater.report.words import visible

_WIDTH, _HEIGHT = 50, 20


def draw(
    layout: Layout, *, name: str, roles: Mapping[str, str] | None = None, hues: Mapping[str, str] | None = None
) -> str:
    """The layout as an `<svg>` element. `roles` maps nodes to roles and `hues` roles to palette names (`c0`...).

    `name` is the element's id (letters, digits, `-`), which must be the only one of its page.
    """
    roles, hues = roles or {}, hues or {}
    keys = {node.name: f"n{i}" for i, node in enumerate(layout.nodes)}
    at = {node.name: node for node in layout.nodes}
    out = [_style(name, keys.values())]
    for text, x in layout.columns:
        out.append(element("line", x1=x, x2=x, y1=50, y2=layout.height - 44, stroke=var("grid")))
        out += [_text(x, y, text) for y in (12, layout.height - 4)]
    for level, y in layout.layers:
        out.append(element("line", x1=MARGIN, x2=layout.width - 8, y1=y, y2=y, stroke=var("grid")))
        out.append(_text(MARGIN - 8, y + 3.5, f"layer {level}", anchor="end"))
    for kv, head in layout.groups:
        a, b = at[kv], at[head]
        path = f"M{a.x:g},{a.y:g}L{b.x:g},{b.y + _HEIGHT / 2:g}"
        out.append(element("path", d=path, stroke=var("soft"), stroke_dasharray="2 2", fill="none"))
    for edge in sorted(layout.edges, key=lambda edge: edge.strength):
        out.append(
            element(
                "path",
                element("title", text=edge.tip),
                class_=f"e {keys[edge.source]} {keys[edge.target]}",
                d=_curve(at[edge.source], at[edge.target], edge.port),
                fill="none",
                stroke=var("pos" if edge.score >= 0 else "neg"),
                stroke_width=round(0.7 + 5.3 * edge.strength**0.8, 2),
                stroke_opacity=round(0.34 + 0.4 * edge.strength, 2),
                stroke_linecap="round",
            )
        )
    out += [_node(node, keys[node.name], roles.get(node.name), hues) for node in layout.nodes]
    return element(
        "svg",
        *out,
        xmlns="http://www.w3.org/2000/svg",
        id=name,
        width=layout.width,
        height=layout.height,
        viewBox=f"0 0 {layout.width:g} {layout.height:g}",
        style=f"--w:{layout.width:g}px",
        role="img",
        aria_label=f"The circuit: {len(layout.nodes)} nodes, {len(layout.edges)} edges, layers upwards",
        font_family=SANS,
    )


def _text(x: float, y: float, text: str, *, size: float = 10, anchor: str = "middle", fill: str = "soft") -> str:
    family = MONO if fill == "ink" else None
    shown = visible(text, 24)
    return element("text", text=shown, x=x, y=y, font_size=size, text_anchor=anchor, fill=var(fill), font_family=family)


def _node(node: Node, key: str, role: str | None, hues: Mapping[str, str]) -> str:
    width = 62 if node.sort in ("input", "logits", "other") else _WIDTH
    height = 16 if node.sort == "group" else _HEIGHT
    hue = hues.get(role or "")
    place = {
        "x": node.x - width / 2,
        "y": node.y - height / 2,
        "width": width,
        "height": height,
        "rx": 4 if node.sort == "mlp" else height / 2,
    }
    rim = hue or ("soft" if node.sort in ("input", "logits") else "null")
    parts = [
        element("title", text=f"{node.tip}\nrole: {role}" if role else node.tip),
        element("rect", **place, fill=var("paper"), stroke=var(rim), stroke_width=2.2 if hue else 1),
    ]
    if hue:
        parts.append(element("rect", **place, fill=var(hue), fill_opacity=0.16))
    shown = node.name.partition("@")[0]
    if node.sort == "group":
        parts.append(_text(node.x, node.y + 3.2, f"{shown.partition('.')[2]} k v", size=9, fill="ink"))
    else:
        parts.append(_text(node.x, node.y + 3.4, shown, fill="ink"))
    return element("g", *parts, class_="n", data_k=key, tabindex=0)


def _curve(source: Node, target: Node, port: str | None) -> str:
    """From the top of the source to the bottom of the target; q enters left, k in the middle, v right."""
    shift = {"q": -14.0, "k": -7.0 if target.sort == "group" else 0.0, "v": 14.0}.get(port or "", 0.0)
    x1, y1 = source.x, source.y - _HEIGHT / 2
    x2, y2 = target.x + shift, target.y + (8 if target.sort == "group" else _HEIGHT / 2)
    rise = max(y1 - y2, 12.0)
    bow = 0.0
    if abs(x1 - x2) < 30 and rise > 1.5 * ROW:  # straight up its own column it would hide behind the nodes between
        bow = (1 if (source.layer or 0) % 2 else -1) * (30 + min(rise / 14, 26))
    return f"M{x1:g},{y1:g}C{x1 + bow:g},{y1 - rise * 0.42:.1f} {x2 + bow:g},{y2 + rise * 0.42:.1f} {x2:g},{y2:g}"


def _style(name: str, keys: Iterable[str]) -> str:
    """Hover and focus: what does not touch the node fades."""
    rules = [f"#{name} .n{{cursor:default;outline:none}}", f"#{name} .e{{transition:opacity .12s}}"]
    for key in keys:
        chosen = f"#{name}:has([data-k={key}]:is(:hover,:focus))"
        rules += [f"{chosen} .e:not(.{key}){{opacity:.07}}", f"{chosen} .e.{key}{{stroke-opacity:.9}}"]
    return f"<style>{''.join(rules)}</style>"

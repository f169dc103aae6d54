"""Charts as inline SVG that needs nothing else: no script, no font, no network.

`inline` draws an Altair chart with vl-convert and then rewrites the drawing for a page that holds many of them:
palette colours get their CSS names, each mark's description becomes a hover title, ids are made unique, and anything
that could reach out of the page (links, images, scripts) is dropped, whatever put it there.
"""

import re
from html import escape
from typing import Any
from xml.etree import ElementTree

from headwater.core.errors import HeadwaterError
from headwater.report.theme import TOKENS

_SVG = "http://www.w3.org/2000/svg"
_PAINT = ("fill", "stroke", "stop-color")
_ALLOWED = {
    "svg",
    "g",
    "path",
    "line",
    "rect",
    "circle",
    "text",
    "tspan",
    "title",
    "defs",
    "clipPath",
    "linearGradient",
    "stop",
    "style",
}
_ROLES = ("role", "aria-roledescription", "aria-hidden", "aria-label", "class", "pointer-events")
_BY_RGB = {tuple(int(light[i : i + 2], 16) for i in (1, 3, 5)): name for name, (light, _) in TOKENS.items()}
_RAMP_RGB = [(rgb, name) for rgb, name in _BY_RGB.items() if re.fullmatch(r"r\d+", name)]
_RGB = re.compile(r"rgb\((\d+), ?(\d+), ?(\d+)\)")


def inline(chart: Any, *, name: str, label: str) -> str:
    """The chart as one `<svg>` element ready to stand inside HTML.

    `name` prefixes the ids, so it must differ between the charts of a page; `label` is what a screen reader says.
    Raises HeadwaterError when vl-convert cannot draw the chart.
    """
    import vl_convert

    try:
        drawn = vl_convert.vegalite_to_svg(chart.to_dict())
    except ValueError as error:
        raise HeadwaterError(f"the chart {name!r} could not be drawn", got=str(error).splitlines()[0]) from error
    return clean(drawn, name=name, label=label)


def clean(drawn: str, *, name: str, label: str) -> str:
    """`inline` for SVG text that is already drawn."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(drawn)
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    # vl-convert numbers ids on over all drawings of a process; counted anew, the same chart gives the same text
    old = dict.fromkeys(found for node in root.iter() if (found := node.get("id")))
    _rewrite(root, {name: f"{prefix}-{i}" for i, name in enumerate(old)})
    for key in ("version", "class"):
        root.attrib.pop(key, None)
    # on a narrow screen a drawing shrinks to a readable width and scrolls from there on
    root.set("style", f"--w:{root.get('width', '600')}px")
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")


def paint(value: str) -> str:
    """A colour with its palette name in front of it; colours outside the palette stay as they are.

    Gradients and interpolated colours rarely hit a ramp step exactly, so they take the nearest one if it is near.
    """
    rgb = _parse(value)
    if rgb is None:
        return value
    name = _BY_RGB.get(rgb)
    if name is None:
        distance, name = min(
            (sum((a - b) ** 2 for a, b in zip(rgb, step, strict=True)), name) for step, name in _RAMP_RGB
        )
        if distance > 200:
            return value
    return f"var(--{name}, {value})"


def var(name: str) -> str:
    """A palette name as a colour for SVG, with the light colour for where the page's style sheet is not at hand."""
    return f"var(--{name}, {TOKENS[name][0]})"


def element(tag: str, *children: str, text: str = "", **attributes: Any) -> str:
    """An SVG element as text. Attribute values and `text` are escaped; `children` are elements already.

    `stroke_width=2` becomes `stroke-width="2"`, `class_` becomes `class`; None is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:g}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(children) + escape(text)
    return f"<{tag}{written}>{inside}</{tag}>" if inside else f"<{tag}{written}/>"


def _parse(value: str) -> tuple[int, int, int] | None:
    if found := _RGB.fullmatch(value):
        return (int(found[1]), int(found[2]), int(found[3]))
    if re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return (int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16))
    return None


def _rewrite(element: ElementTree.Element, ids: dict[str, str]) -> None:
    for child in list(element):
        tag = child.tag.removeprefix(f"{{{_SVG}}}") if isinstance(child.tag, str) else ""
        # Vega draws an empty foreground and an invisible background for every group; they only cost bytes.
        empty = tag == "path" and (
            not child.get("d") or (child.get("class") == "background" and "stroke" not in child.attrib)
        )
        if tag not in _ALLOWED or empty:
            element.remove(child)
            continue
        said = child.get("aria-label") if child.get("role") == "graphics-symbol" and tag != "g" else None
        for key in list(child.attrib):
            value = child.attrib[key]
            if key in _ROLES or key.startswith("on") or "href" in key:
                del child.attrib[key]
            elif key == "id":
                child.set(key, ids[value])
            elif value.startswith("url("):
                child.set(key, f"url(#{ids.get(value[5:-1], '')})")
            elif key in _PAINT:
                child.set(key, paint(value))
        if said:
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = said
            child.insert(0, title)
        _rewrite(child, ids)

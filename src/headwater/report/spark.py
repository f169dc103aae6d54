"""A claim in one line of a table: its effect with interval, over its null, on its own scale."""

from collections.abc import Mapping
from typing import Any

from headwater.report.charts.claims import STATUS
from headwater.report.svg import element, var
from headwater.report.words import estimate, finite, interval, middle_95, number

_WIDTH, _HEIGHT, _PAD = 120, 22, 6


def spark(claim: Mapping[str, Any]) -> str:
    """An `<svg>` of a claim (a row of `claim_rows`); empty where it has no effect.

    Grey: the middle 95% of the null's draws and their mean. Dotted: the value that the claim must lie beyond.
    """
    effect, lo, hi = finite(claim["effect"]), finite(claim["lo"]), finite(claim["hi"])
    if effect is None:
        return ""
    mean, edge = finite(claim["null_mean"]), finite(claim["reference"]) or 0.0
    null = middle_95([value for value in map(finite, claim.get("null_draws") or []) if value is not None])
    points = [value for value in (effect, lo, hi, mean, edge, *(null or ())) if value is not None]
    low, width = min(points), max(points) - min(points)
    if width < 1e-6 * max(1.0, abs(low)):  # all the same but for rounding: one dot in the middle
        low, width = low - 0.5, 1.0
    scale = (_WIDTH - 2 * _PAD) / width

    def at(value: float) -> float:
        return round(_PAD + (value - low) * scale, 1)

    hue = var(STATUS[str(claim["status"])])
    said = f"effect {estimate(effect, lo, hi)}; null {number(mean)}"
    said += f", 95% of draws {interval(*null)}" if null else ""
    parts = [element("title", text=said), _upright(at(edge), stroke=var("soft"), stroke_dasharray="2 2")]
    if null:
        wide = max(at(null[1]) - at(null[0]), 1.5)
        parts.append(element("rect", x=at(null[0]), y=4, width=wide, height=_HEIGHT - 8, fill=var("band")))
    if mean is not None:
        parts.append(_upright(at(mean), stroke=var("null"), stroke_width=2))
    if lo is not None and hi is not None:
        flat = {"y1": _HEIGHT / 2, "y2": _HEIGHT / 2, "stroke": hue, "stroke_width": 2.5, "stroke_opacity": 0.6}
        parts.append(element("line", x1=at(lo), x2=at(hi), **flat))
    parts.append(element("circle", cx=at(effect), cy=_HEIGHT / 2, r=4, fill=hue))
    size = {"width": _WIDTH, "height": _HEIGHT, "viewBox": f"0 0 {_WIDTH} {_HEIGHT}"}
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", class_="spark", role="img", **size)


def _upright(x: float, **looks: Any) -> str:
    return element("line", x1=x, x2=x, y1=3, y2=_HEIGHT - 3, **looks)

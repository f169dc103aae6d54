"""One palette for charts and page, in light and dark.

Charts are drawn once, in the light colours. Every colour of the palette has a name, and `svg.inline` puts the name
next to the colour (`var(--pos, #0b5c8e)`), so that the page's style sheet, and with it the reader's light or dark
setting, has the last word. The diverging ramp runs orange - paper - blue and the categorical colours follow Okabe and
Ito (2008), both readable with every common colour-vision deficiency.
"""

from typing import Any

SANS = '-apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif'
MONO = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace'
SERIF = 'Charter, "Iowan Old Style", "Source Serif 4", Georgia, "Liberation Serif", serif'

# name: (light, dark). The light value doubles as the key that `svg.inline` looks colours up by, so no two may be equal.
BASE: dict[str, tuple[str, str]] = {
    "paper": ("#fdfdfb", "#14171b"),
    "panel": ("#f4f4f0", "#1c2026"),
    "ink": ("#1d2329", "#e4e6e8"),
    "soft": ("#565f69", "#a3abb4"),
    "line": ("#d9dad4", "#343a42"),
    "grid": ("#e9e9e4", "#262b31"),
    "pos": ("#0b5c8e", "#76bdf0"),
    "neg": ("#b5500c", "#f2a25f"),
    "good": ("#16704f", "#58c79a"),
    "bad": ("#a8391f", "#f08a70"),
    "open": ("#7a6114", "#d9b95a"),
    "null": ("#9aa0a6", "#767f89"),
    "band": ("#c9cdd1", "#3d444c"),
}
_CATEGORIES = {
    "c0": ("#0072b2", "#5cb3ec"),
    "c1": ("#d55e00", "#f59a54"),
    "c2": ("#009e73", "#43c9a1"),
    "c3": ("#b0528f", "#e093c4"),
    "c4": ("#c78a00", "#e8bd4c"),
    "c5": ("#4a9fd6", "#9bd3f7"),
    "c6": ("#6a51a3", "#b5a3e6"),
    "c7": ("#7d6b5d", "#bfae9f"),
}
CATEGORIES = [light for light, _ in _CATEGORIES.values()]
RAMP_STEPS = 33  # odd, so that zero has a step of its own


def _to_oklab(color: str) -> tuple[float, float, float]:
    """OKLab (Ottosson 2020): equal steps look equal, which makes a fair heat map."""
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    medium = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def _from_oklab(lab: tuple[float, ...]) -> str:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    rgb = (12.92 * c if c <= 0.0031308 else 1.055 * max(c, 0.0) ** (1 / 2.4) - 0.055 for c in linear)
    return "#" + "".join(f"{round(255 * min(max(c, 0.0), 1.0)):02x}" for c in rgb)


def _ramp(*anchors: str) -> list[str]:
    """`RAMP_STEPS` colours through the anchors, evenly spaced in OKLab."""
    labs = [_to_oklab(color) for color in anchors]
    steps = []
    for i in range(RAMP_STEPS):
        at = i / (RAMP_STEPS - 1) * (len(labs) - 1)
        j = min(int(at), len(labs) - 2)
        steps.append(_from_oklab(tuple(x + (at - j) * (y - x) for x, y in zip(labs[j], labs[j + 1], strict=True))))
    return steps


RAMP = _ramp("#8f3b00", "#e08a3c", "#f3f2ec", "#5fa5d3", "#0a4a78")
_RAMP_DARK = _ramp("#ffbe85", "#b8651f", "#22272d", "#2f78ab", "#a5d8fb")

TOKENS: dict[str, tuple[str, str]] = (
    BASE | _CATEGORIES | {f"r{i}": pair for i, pair in enumerate(zip(RAMP, _RAMP_DARK, strict=True))}
)


def color(name: str) -> str:
    """The light colour of a palette name, as charts are drawn with it."""
    return TOKENS[name][0]


def css_variables(dark: bool) -> str:
    """The palette as CSS custom properties, for one of the two settings."""
    return "".join(f"--{name}:{pair[dark]};" for name, pair in TOKENS.items())


def ramp_color(value: float, extreme: float) -> str:
    """The ramp's colour for `value` on a scale from -extreme to extreme."""
    at = 0.0 if extreme <= 0 else min(max(value / extreme, -1.0), 1.0)
    return RAMP[round((at + 1) / 2 * (RAMP_STEPS - 1))]


def altair_config() -> dict[str, Any]:
    """Vega-Lite's `config` for every chart: quiet axes, no frame, the page's own colours."""
    ink, soft, line, grid = (color(name) for name in ("ink", "soft", "line", "grid"))
    label = {"labelColor": soft, "labelFont": SANS, "labelFontSize": 11, "titleColor": soft, "titleFont": SANS}
    axis = label | {"titleFontSize": 11, "titleFontWeight": "normal", "gridColor": grid, "domainColor": line}
    return {
        "background": "transparent",
        "font": SANS,
        "view": {"stroke": None},
        "axis": axis | {"tickColor": line, "titlePadding": 8, "labelLimit": 260, "labelFlush": False},
        "axisBand": {"grid": False, "ticks": False, "domain": False, "labelPadding": 6},
        "legend": label
        | {"titleFontSize": 11, "titleFontWeight": "normal", "symbolStrokeWidth": 2, "gradientStrokeWidth": 0},
        "header": label | {"titleFontSize": 11, "labelFontWeight": "bold", "labelColor": ink},
        "title": {"color": ink, "font": SANS, "fontSize": 12, "fontWeight": "bold", "anchor": "start", "offset": 8},
        "range": {"category": CATEGORIES, "diverging": RAMP},
        "text": {"font": SANS, "fontSize": 11, "color": ink},
    }

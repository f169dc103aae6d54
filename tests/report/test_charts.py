"""Every kind of result has a chart that draws, shows its numbers on hovering, and follows the page's colours."""

import math
import re
from xml.etree import ElementTree

import polars as pl
import pytest

from headwater.core.results import Result
from headwater.report import charts, theme
from headwater.report.charts.patches import draw_panels, group_panels, panels
from headwater.report.layout import MAX_EDGES, MAX_NODES, place
from headwater.report.svg import clean, element, inline, paint

from . import synthetic

SVG = "{http://www.w3.org/2000/svg}"


def titles(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}title")]


@pytest.mark.parametrize("kind", charts.KINDS)
def test_every_kind_draws_with_hover_titles(kind: str) -> None:
    result = synthetic.MAKERS[kind][1]()
    svg = inline(result.chart(), name=f"t-{kind}", label=kind)
    root = ElementTree.fromstring(svg)
    marks = [node for node in root.iter() if node.tag.removeprefix(SVG) in ("path", "line", "rect", "text")]
    assert len(marks) > 10
    assert titles(svg), "no mark says its numbers"
    assert "NaN" not in svg and "undefined" not in svg


@pytest.mark.parametrize("kind", charts.KINDS)
def test_empty_tables_say_that_there_is_nothing(kind: str) -> None:
    full = synthetic.MAKERS[kind][1]()
    empty = synthetic.result(kind, {})
    empty.tables = {name: table.clear() for name, table in full.tables.items()}
    assert "<text" in inline(empty.chart(), name="empty", label=kind)
    assert "<text" in inline(synthetic.result(kind, {}).chart(), name="none", label=kind)


@pytest.mark.parametrize("kind", charts.KINDS)
def test_missing_numbers_are_left_out_not_drawn(kind: str) -> None:
    result = synthetic.MAKERS[kind][1]()
    for name, table in result.tables.items():
        floats = [column for column, dtype in table.schema.items() if dtype == pl.Float64]
        spoiled = table.with_row_index("_i").with_columns(
            pl.when(pl.col("_i") % 3 == 0).then(None)
            .when(pl.col("_i") % 3 == 1).then(math.nan).otherwise(pl.col(column)).alias(column)
            for column in floats
        )  # fmt: skip
        result.tables[name] = spoiled.drop("_i")
    svg = inline(result.chart(), name="holes", label=kind)
    assert "NaN" not in svg


def test_a_title_holds_the_number_of_its_cell() -> None:
    result = synthetic.patching()
    row = (
        result.tables["effects"].filter(pl.col("site") == "head.17.h3", pl.col("direction") == "denoise").to_dicts()[0]
    )
    said = [title for title in titles(inline(result.chart(), name="p", label="p")) if title.startswith("head.17.h3")]
    assert len(said) == 2  # one a direction
    assert f"{row['effect']:.2f}".rstrip("0") in said[0]


def test_both_directions_share_a_figure_and_a_scale() -> None:
    grouped = group_panels(panels(synthetic.patching()))
    assert [[(panel.kind, panel.direction) for panel in group] for group in grouped] == [
        [("resid_post", "denoise")],
        [("attn_out", "denoise")],
        [("head", "denoise"), ("head", "noise")],
    ]
    spec = draw_panels(grouped[2]).to_dict()
    scales = [part["encoding"]["color"]["scale"]["domain"] for part in spec["hconcat"]]
    assert scales[0] == scales[1]


def test_layers_go_up() -> None:
    spec = draw_panels(group_panels(panels(synthetic.patching()))[0]).to_dict()
    assert spec["encoding"]["y"]["sort"] == list(reversed(range(synthetic.N_LAYERS)))


def test_palette_colors_get_their_names_and_others_stay() -> None:
    assert paint(theme.color("pos")) == f"var(--pos, {theme.color('pos')})"
    assert paint("rgb(11, 92, 142)") == "var(--pos, rgb(11, 92, 142))"
    assert paint("#00ff00") == "#00ff00"
    assert paint("none") == "none"
    lights = [light for light, _ in theme.TOKENS.values()]
    assert len(set(lights)) == len(lights), "two names share a light colour, so a chart could not tell them apart"


def _luminance(color: str) -> float:
    rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["ink", "soft", "pos", "good", "bad", "open"])
def test_text_colors_can_be_read(name: str, dark: bool) -> None:
    """WCAG AA: text and its background differ by at least 4.5 to 1."""
    one, other = _luminance(theme.TOKENS[name][dark]), _luminance(theme.TOKENS["paper"][dark])
    assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5


def test_the_ramp_is_even_and_symmetric_in_lightness() -> None:
    light = [_luminance(color) for color in theme.RAMP]
    middle = len(light) // 2
    assert light.index(max(light)) == middle
    assert light[:middle] == sorted(light[:middle])
    assert light[middle:] == sorted(light[middle:], reverse=True)
    assert theme.ramp_color(0, 1) == theme.RAMP[middle]
    assert theme.ramp_color(9, 1) == theme.RAMP[-1]


def test_a_drawing_loses_whatever_reaches_out_of_it() -> None:
    hostile = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="10">'
        '<a xlink:href="https://example.org"><rect/></a><image href="https://example.org/x.png"/><script>x()</script>'
        '<g onclick="x()"><path d="M0,0" fill="url(#g1)" onload="x()"/></g>'
        '<foreignObject><body/></foreignObject><defs><linearGradient id="g1"/></defs></svg>'
    )
    svg = clean(hostile, name="h", label="<b>")
    assert not re.search(r"example|script|onclick|onload|<a|image|foreignObject|href", svg)
    assert 'fill="url(#h-0)"' in svg and 'id="h-0"' in svg
    assert 'aria-label="&lt;b&gt;"' in svg


def test_elements_escape_what_they_are_given() -> None:
    assert element("text", text="<&", x=1.50, font_size=2, class_='"', rx=None) == (
        '<text x="1.5" font-size="2" class="&quot;">&lt;&amp;</text>'
    )


class TestCircuit:
    def test_the_strongest_edges_are_kept_and_the_rest_counted(self) -> None:
        result = synthetic.circuit()
        layout = place(result)
        assert len(layout.edges) + layout.hidden == 300
        assert 10 < len(layout.edges) <= MAX_EDGES
        assert len(layout.nodes) <= MAX_NODES
        weakest = min(abs(edge.score) for edge in layout.edges)
        ranked = sorted((abs(score) for score in result.tables["edges"]["score"]), reverse=True)
        assert weakest == pytest.approx(ranked[len(layout.edges) - 1])

    def test_layers_go_up_and_nothing_overlaps(self) -> None:
        layout = place(synthetic.circuit())
        at = {node.name: node for node in layout.nodes}
        assert at["logits"].y < min(node.y for node in layout.nodes if node.name != "logits")
        assert at["input"].y > max(node.y for node in layout.nodes if node.name != "input")
        for edge in layout.edges:
            assert at[edge.source].y > at[edge.target].y, f"{edge.source} -> {edge.target} goes down"
        boxes = [(node.x, node.y) for node in layout.nodes]
        for i, (x, y) in enumerate(boxes):
            assert 0 < x < layout.width and 0 < y < layout.height
            assert all(abs(x - u) >= 50 or abs(y - v) >= 16 for u, v in boxes[:i])

    def test_shared_keys_and_values_stand_below_the_heads_that_read_them(self) -> None:
        edges = [{"source": "input", "target": "a2.g1<k>", "score": 1.0}]
        edges += [
            {"source": "input", "target": "a2.h4<q>", "score": 0.5},
            {"source": "a2.h4", "target": "logits", "score": 1},
        ]
        facts = {"graph": {"n_layers": 3, "n_heads": 9, "n_kv_heads": 3}}
        layout = place(synthetic.result("circuit", {"edges": edges}, facts))
        at = {node.name: node for node in layout.nodes}
        assert layout.groups == [("a2.g1", "a2.h4")]
        assert at["a2.g1"].x == at["a2.h4"].x  # heads 3, 4, 5: the middle one
        assert at["a2.g1"].y > at["a2.h4"].y

    def test_positions_become_columns(self) -> None:
        edges = [
            {"source": "a1.h0@S2", "target": "m2@END", "score": 1.0},
            {"source": "a1.h1@S2", "target": "m2@END", "score": 1},
        ]
        layout = place(synthetic.result("circuit", {"edges": edges}))
        at = {node.name: node for node in layout.nodes}
        assert {name for name, _ in layout.columns} == {"S2", "END"}
        assert abs(at["a1.h0@S2"].x - at["a1.h1@S2"].x) >= 50

    def test_hostile_names_are_text(self) -> None:
        edges = [{"source": f"a1.h0@{synthetic.HOSTILE}", "target": "logits", "score": 1.0}]
        svg = charts.as_svg(synthetic.result("circuit", {"edges": edges}))
        assert "<script" not in svg
        ElementTree.fromstring(svg)


def test_a_kind_without_a_chart_is_no_error() -> None:
    assert charts.as_svg(Result(facts={"x": 1})) == ""


@pytest.mark.parametrize("kind", charts.KINDS)
def test_a_notebook_shows_the_chart_and_the_table(kind: str) -> None:
    shown = synthetic.MAKERS[kind][1]()._repr_html_()
    assert shown.count("<svg") == 1 and "<thead>" in shown
    assert "<script" not in shown


def test_a_notebook_shows_a_result_that_cannot_be_drawn() -> None:
    broken = synthetic.result("faithfulness", {"curve": [{"fraction": "much", "faithfulness": 0.5}]})
    with pytest.raises(TypeError):
        broken.chart()
    assert "<svg" not in broken._repr_html_() and "much" in broken._repr_html_()

"""The circuit, and whether it is enough: drawing, edges, faithfulness over size, the null."""

from typing import Any

from headwater.report.blocks import Beside, Section, Table, cell
from headwater.report.charts.circuits import NULLS, draw_rows, faithfulness, null, null_band
from headwater.report.charts.parts import Row, rows
from headwater.report.drawing import draw
from headwater.report.gather import Found
from headwater.report.layout import Layout, place
from headwater.report.sections.base import Context, missing
from headwater.report.sections.history import beside as beside_circuit
from headwater.report.words import (
    beside,
    count,
    estimate,
    finite,
    interval,
    listing,
    node_parts,
    number,
    p_value,
    percent,
    role_name,
    strongest,
)


def circuit(context: Context) -> Section:
    """The strongest edges, drawn, with the roles of the heads in colour."""
    found = context.run.first("circuit")
    title = "The circuit"
    if found is None:
        what = "It keeps the edges that carry the behavior and draws them."
        return missing(context, id="circuit", title=title, what=what, stage="circuit")
    layout = place(found.result)
    facts = found.result.facts
    n, total = facts.get("n_edges", layout.n_edges), facts.get("n_total_edges")
    n_nodes = facts.get("n_nodes", layout.n_nodes)
    share = (
        f" of {number(total)} ({percent(n / total)})" if isinstance(n, int) and isinstance(total, int) and total else ""
    )
    names = [str(row["node"]) for row in rows(found.result.tables.get("nodes"), "node")]
    heads = [name for name in names if node_parts(name)["sort"] == "head"]
    layers = sorted({parts["layer"] for name in names if (parts := node_parts(name))["layer"] is not None})
    span = f", in layers {layers[0]} to {layers[-1]}" if layers else ""
    lead = [
        f"{number(n)} edges{share} between {number(n_nodes)} nodes, "
        f"{count(len(heads), 'attention head')} among them{span}."
    ]
    edges = rows(found.result.tables.get("edges"), "source", "target", "score")
    if top := strongest(edges, "score", 3):
        lead.append(f"The strongest edges are {listing(map(_edge, top))}.")
    section = Section(id="circuit", title=title, lead=lead)
    roles, hues = context.roles(), context.role_tokens()
    shown = {node.name for node in layout.nodes}
    used = {role for name, role in roles.items() if name in shown}
    drawn = _drawn(layout, n_nodes)
    caption = (
        f"{drawn} Layers go up, width is strength, blue raises the metric and orange lowers it; an edge "
        "enters a head at its left for queries, in the middle for keys, at its right for values. Hover "
        "over a node to follow its edges."
    )
    if any(node.sort == "group" for node in layout.nodes):
        caption += (
            " Heads that share keys and values share one “k v” box (keys left, values right), joined to them by dashes."
        )
    drawn = context.figure(
        found,
        lambda: draw(layout, name=f"circuit-{found.name}".replace(".", "-"), roles=roles, hues=hues),
        title="The circuit, from input to logits",
        caption=caption,
        tables=["edges", "nodes"],
        legend=[(token, role_name(role)) for role, token in hues.items() if role in used],
        code="from headwater.report.charts import as_svg\nopen('circuit.svg', 'w').write(as_svg(found))",
    )
    body = [
        [cell(row["source"], style="mono"), cell(row["target"], style="mono"), cell(row["score"])]
        for row in strongest(edges, "score", 8)
    ]
    table = Table(columns=("from", "into", "score"), rows=body, caption=f"The strongest of {number(n)} edges.")
    small = context.drawings(beside_circuit(context), name="beside")
    section.blocks += [Beside(blocks=[drawn, table], small=small)] if small else [drawn, table]
    return section


def _drawn(layout: Layout, n_nodes: Any) -> str:
    """How much of the circuit is in the picture."""
    if layout.hidden <= 0:
        return f"All {count(len(layout.edges), 'edge')} are drawn."
    text = f"The {len(layout.edges)} strongest of {layout.n_edges:,} edges are drawn"
    unseen = n_nodes - sum(node.sort != "group" for node in layout.nodes) if isinstance(n_nodes, int) else 0
    return f"{text}, without {count(unseen, 'node')} that only the others touch." if unseen > 0 else f"{text}."


def _edge(row: Row) -> str:
    return f"{row['source']} → {row['target']} ({number(row['score'])})"


def strength(context: Context) -> Section:
    """Faithfulness over size, and what random circuits of the same size reach."""
    title = "Is the circuit enough?"
    curves = [item for item in context.run.all("faithfulness") if rows(item.result.tables.get("curve"))]
    nulls = [item for item in context.run.all("null") if draw_rows(item.result)]
    if not curves and not nulls:
        what = (
            "It runs the model with every edge outside the circuit carrying its counterfactual value, at "
            "several sizes and for random circuits."
        )
        return missing(context, id="faithfulness", title=title, what=what, stage="circuit")
    section = Section(id="faithfulness", title=title)
    section.lead = [
        "Faithfulness is how much of the way from the counterfactual (0) to the whole model (1) the circuit goes alone."
    ]
    first_null = nulls[0] if nulls else None
    for item in curves:
        table = rows(item.result.tables["curve"], "fraction", "edges", "faithfulness", "lo", "hi")
        if len(table) > 1:
            section.blocks.append(_curve(context, item, first_null))
        else:
            section.lead = [*section.lead, _alone(item, table[0])]
    section.blocks += [_null(context, item) for item in nulls]
    return section


def _alone(item: Found, row: Row) -> str:
    """One circuit's faithfulness as a sentence."""
    found = f"{estimate(row['faithfulness'], row['lo'], row['hi'])}"
    if item.name == "completeness":
        return f"The rest of the model without the circuit still reaches {found}: 0 would mean that nothing else helps."
    return f"{item.name.replace('_', ' ').capitalize()}: {found} with {number(row['edges'])} edges."


def _curve(context: Context, item: Found, null_of: Found | None) -> Any:
    table = [
        row
        for row in rows(item.result.tables["curve"], "fraction", "edges", "faithfulness")
        if row["faithfulness"] is not None
    ]
    enough = next(
        (row for row in sorted(table, key=lambda row: row["fraction"] or 0) if row["faithfulness"] >= 0.8), None
    )
    chosen = context.run.first("circuit")
    facts = chosen.result.facts if chosen else {}
    n, total = facts.get("n_edges"), facts.get("n_total_edges")
    size = n / total if isinstance(n, int) and isinstance(total, int) and total else None
    cpr, cmd = finite(item.result.facts.get("cpr")), finite(item.result.facts.get("cmd"))
    parts = []
    if enough:
        parts.append(
            f"{percent(enough['fraction'])} of the edges ({number(enough['edges'])}) already reach "
            f"{number(enough['faithfulness'])}."
        )
    else:
        best = max((row["faithfulness"] for row in table), default=None)
        parts.append(f"No size reaches 0.8; the best is {number(best)}.")
    if cpr is not None or cmd is not None:
        parts.append(
            f"CPR, the area under the curve: {number(cpr)}; CMD, its distance from 1: {number(cmd)} (0 is perfect)."
        )
    if size is not None:
        parts.append(f"The dashed upright marks the circuit ({percent(size)}).")
    if null_of is not None and (band := null_band(null_of.result)):
        parts.append(
            f"Grey: where 95% of the draws of the strictest null lie ({band['name']}): "
            f"{interval(band['lo'], band['hi'])}."
        )
    return context.figure(
        item,
        lambda: faithfulness(item.result, null_of.result if null_of else None, size),
        title="Faithfulness over circuit size",
        caption=" ".join(parts),
        tables=["curve"],
    )


def _null(context: Context, item: Found) -> Any:
    draws = draw_rows(item.result)
    observed, p = finite(item.result.facts.get("observed")), finite(item.result.facts.get("p"))
    ends = item.result.facts.get("lo"), item.result.facts.get("hi")
    kinds = list(dict.fromkeys(str(row["kind"]) for row in draws))
    parts = []
    for kind in kinds:
        values = sorted(row["value"] for row in draws if str(row["kind"]) == kind)
        parts.append(
            f"{NULLS.get(kind, kind.replace('_', ' '))}: median {beside(values[len(values) // 2], *ends)}, "
            f"at most {beside(values[-1], *ends)} ({count(len(values), 'draw')})"
        )
    text = f"The circuit reaches {estimate(observed, *ends)}" + (f" (p {p_value(p)})" if p is not None else "")
    text = f"{text}; {'; '.join(parts)}." if observed is not None else f"{'; '.join(parts)}."
    return context.figure(
        item, lambda: null(item.result), title="The circuit against its null", caption=text, tables=["draws"]
    )

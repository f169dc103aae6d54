"""The verdict in plain sentences, the key numbers, and the ledger of claims."""

from typing import Any

from headwater.report.blocks import Cell, Lines, Note, Section, Source, Table, Tiles, cell, source
from headwater.report.charts.behaviors import is_overall, metric_rows
from headwater.report.charts.circuits import draw_rows
from headwater.report.charts.claims import STATUS
from headwater.report.charts.parts import Row, rows
from headwater.report.sections.base import Context, missing
from headwater.report.spark import spark
from headwater.report.words import beside, count, estimate, finite, listing, number, p_value, percent, visible

WORDS = {"supported": "Supported", "refuted": "Refuted", "inconclusive": "Inconclusive"}


def verdict(context: Context) -> Section:
    """What survived, what did not, and the numbers to remember."""
    claims = context.claims()
    section = Section(id="verdict", title="The verdict")
    tiles = key_numbers(context)
    if not claims:
        section.lead = ["No claim has been tested in this run yet, so nothing here counts as an explanation."]
        section.blocks = [tiles] if tiles.items else []
        return section
    by = {status: [row for row in claims if row["status"] == status] for status in STATUS}
    parts = [f"{len(found)} {verb}" for status, found in by.items() if found for verb in [_verb(status, len(found))]]
    said = context.run.facts.get("claims", {}).get("verdict")
    first = visible(said[0], 600) if isinstance(said, list) and said and isinstance(said[0], str) else None
    then = context.run.facts.get("claims", {}).get("history")
    section.lead = [
        *([first] if first else []),
        *([visible(then, 600)] if isinstance(then, str) else []),
        f"Of {count(len(claims), 'claim')} about how {context.model} does {context.behavior}, {listing(parts)}. "
        "A claim is supported only if its effect beat its null after correction for the number of claims tested.",
    ]
    items = [(STATUS[row["status"]], WORDS[row["status"]], *sentence(row)) for row in claims]
    section.blocks = [block for block in (tiles, Lines(items=items)) if block.items]
    return section


def _verb(status: str, n: int) -> str:
    was = "was" if n == 1 else "were"
    return {
        "supported": "survived its test" if n == 1 else "survived their tests",
        "refuted": f"{was} refuted",
        "inconclusive": "stayed open",
    }[status]


def sentence(row: Row) -> tuple[str, str]:
    """A claim as a sentence, and what was measured, with the reason where there is no verdict."""
    statement = visible(row["statement"] or row["id"] or "(no statement)").rstrip(". ")
    numbers = [f"Effect {estimate(row['effect'], row['lo'], row['hi'])}"] if row["effect"] is not None else []
    if row["null_mean"] is not None:
        numbers.append(f"null {beside(row['null_mean'], row['lo'], row['hi'])}")
    p = row["p_adj"] if row["p_adj"] is not None else row["p"]
    if p is not None:
        numbers.append(f"{'adjusted p' if row['p_adj'] is not None else 'p'} {p_value(p)}")
    if row["n"] is not None:
        numbers.append(f"n {number(row['n'])}")
    measured = f"{', '.join(numbers)}." if numbers else "Not measured."
    because = visible(row["why_not"] or "").rstrip(". ")
    return f"{statement}.", f"{measured} No verdict: {because}." if because else measured


def key_numbers(context: Context) -> Tiles:
    """The handful of numbers that sum the run up, each with its interval or what it is compared with."""
    items: list[tuple[str, str, str]] = []
    if behavior := context.run.first("behavior_report"):
        overall = {row["metric"]: row for row in metric_rows(behavior.result) if is_overall(row)}
        for metric, name, show in (
            ("accuracy", "prompts answered right", percent),
            ("logit_diff", "logit difference", number),
        ):
            if row := overall.get(metric):
                span = f"{show(row['lo'])} to {show(row['hi'])}, " if row["lo"] is not None else ""
                items.append((show(row["value"]), name, f"{span}n {number(row['n'])}"))
    if found := context.run.first("circuit"):
        facts = found.result.facts
        n, total = facts.get("n_edges"), facts.get("n_total_edges")
        share = percent(n / total) if isinstance(n, int) and isinstance(total, int) and total else ""
        nodes = found.result.tables.get("nodes")
        if isinstance(n, int):
            items.append(
                (
                    number(n),
                    "edges in the circuit",
                    ", ".join(
                        filter(
                            None,
                            (
                                f"{share} of all" if share else "",
                                count(nodes.height, "node") if nodes is not None else "",
                            ),
                        )
                    ),
                )
            )
    if found := context.run.first("null"):
        observed, p = finite(found.result.facts.get("observed")), finite(found.result.facts.get("p"))
        ends = found.result.facts.get("lo"), found.result.facts.get("hi")
        values = sorted(row["value"] for row in draw_rows(found.result) if row["kind"] == "edges")
        if observed is not None and values:
            items.append(
                (
                    beside(observed, *ends),
                    "faithfulness of the circuit",
                    f"random circuits {beside(values[len(values) // 2], *ends)}, p {p_value(p)}",
                )
            )
    if (found := context.run.first("heads")) and (table := found.result.tables.get("roles")) is not None:
        named = {(row["layer"], row["head"]) for row in rows(table, "layer", "head", "role") if row["role"]}
        kinds = len({row["role"] for row in rows(table, "role") if row["role"]})
        items.append((number(len(named)), "heads with a role", count(kinds, "role")))
    items += _of_history(context)
    if claims := context.claims():
        supported = sum(row["status"] == "supported" for row in claims)
        items.append(
            (
                f"{supported} of {len(claims)}",
                "claims supported",
                f"{sum(row['status'] == 'refuted' for row in claims)} refuted",
            )
        )
    return Tiles(items=items)


def _of_history(context: Context) -> list[tuple[str, str, str]]:
    """When it formed, which frequency it needed, whether it follows."""
    items: list[tuple[str, str, str]] = []
    if found := context.run.first("formation"):
        for row in rows(found.result.tables.get("windows"), "what", "first", "last", "half"):
            if row["what"] == "behavior" and row["first"] is not None:
                half = f"half of it by step {number(round(row['half']))}" if finite(row["half"]) is not None else ""
                span = f"{number(row['first'])} to {number(row['last'])}"
                items.append((span, "steps in which most of it formed", half))
    if (found := context.run.first("fact_link")) and finite(found.result.facts.get("threshold")) is not None:
        facts = found.result.facts
        span = f"{number(facts.get('lo'))} to {number(facts.get('hi'))}" if finite(facts.get("lo")) is not None else ""
        items.append((number(facts["threshold"]), "co-occurrences at which half of the facts are known", span))
    if (found := context.run.first("fact_change")) and finite(found.result.facts.get("r")) is not None:
        facts = found.result.facts
        p = f"p {p_value(facts.get('p'))}"
        items.append((number(facts["r"], 2), "do(data): what is known follows what is read (r)", p))
    return items


def ledger(context: Context) -> Section:
    """All claims with what they were tested against."""
    what = (
        "The ledger holds every claim with its effect, its null and its adjusted p, and the command that "
        "tests it again."
    )
    claims, found = context.claims(), context.run.first("ledger")
    if found is None or not claims:
        return missing(context, id="ledger", title="The ledger", what=what, stage="claims")
    worst = max(
        (row["p_adj"] for row in claims if row["status"] == "supported" and row["p_adj"] is not None), default=None
    )
    q = found.result.facts.get("q") or found.result.config.get("q")
    held = (
        f"false discoveries held below {percent(q)} (Benjamini–Hochberg)"
        if finite(q)
        else "several tests corrected for"
    )
    lead = [
        f"{count(len(claims), 'claim')}, {held}"
        + (f"; the weakest supported one has an adjusted p of {p_value(worst)}." if worst is not None else ".")
        + " Each bar shows the effect and its interval against the null (grey), on a scale of its own."
    ]
    body = [_line(row) for row in claims]
    table = Table(columns=("", "claim", "effect", "against its null", "null", "p", "adjusted p", "n"), rows=body)
    commands = list(dict.fromkeys(row["command"] for row in claims if row["command"]))
    alike = len(commands) <= 1  # one command tests them all
    again = [
        [cell(row["id"], style="mono"), cell(row["test"], style="mono"), cell(row["seed"])]
        + ([] if alike else [cell(row["command"], style="mono")])
        + [cell(row["params"], style="mono")]
        for row in claims
    ]
    name = next((key for key in found.result.tables if key == "claims"), next(iter(found.result.tables), None))
    columns = ("claim", "test", "seed", *(() if alike else ("run it again",)), "parameters")
    how = Table(columns=columns, rows=again, fold="How each claim was tested")
    rerun = Note(text="Every claim can be tested again from what is stored:", code=context.command("verify"))
    sources: list[Source] = [source(found, name)] if name else []
    return Section(id="ledger", title="The ledger", lead=lead, blocks=[table, rerun, how, *sources_block(sources)])


def sources_block(sources: list[Source]) -> list[Any]:
    """Data behind tables that are no figure."""
    from headwater.report.blocks import Figure

    return [Figure(id="", number=0, title="", svg="", sources=sources)] if sources else []


def _line(row: Row) -> list[Cell]:
    status = str(row["status"])
    return [
        Cell(text=WORDS[status], style=f"badge {STATUS[status]}"),
        Cell(text=visible(row["statement"] or row["id"]), style="claim"),
        Cell(text=estimate(row["effect"], row["lo"], row["hi"]), numeric=True),
        Cell(text="", svg=spark(row)),
        Cell(text=beside(row["null_mean"], row["lo"], row["hi"]), numeric=True),
        Cell(text=p_value(row["p"]), numeric=True),
        Cell(text=p_value(row["p_adj"]), numeric=True),
        Cell(text=number(row["n"]), numeric=True),
    ]

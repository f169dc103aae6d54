"""What the heads do: roles by attention and by patching, each against its null."""

from headwater.report.blocks import Cell, Section, Table, cell
from headwater.report.charts.claims import heads as chart
from headwater.report.charts.parts import rows
from headwater.report.sections.base import Context, missing
from headwater.report.words import count, estimate, interval, listing, number, p_value, strongest, visible


def _acts(role: str, names: list[str]) -> str:
    shown = listing(names[:4]) if len(names) <= 4 else f"{', '.join(names[:4])} and {len(names) - 4} more"
    return f"{count(len(names), 'head')} {'acts' if len(names) == 1 else 'act'} as {visible(role, 40)} ({shown})"


def heads(context: Context) -> Section:
    """A table and a chart of the heads that have a role."""
    title = "What the heads do"
    found = context.run.first("heads")
    table = (
        rows(found.result.tables.get("roles"), "layer", "head", "role", "attention", "effect", "lo", "hi", "null", "p")
        if found
        else []
    )
    if found is None or not table:
        what = "It names heads by what they attend to, and tests each name by patching."
        return missing(context, id="heads", title=title, what=what, stage="heads")
    by: dict[str, list[str]] = {}
    by_role = dict.fromkeys(str(row["role"]) for row in table)
    for row in table:
        by.setdefault(str(row["role"] or "no role").replace("_", " "), []).append(f"a{row['layer']}.h{row['head']}")
    lead = [f"{listing(_acts(role, names) for role, names in by.items())}."]
    if absent := [str(role).replace("_", " ") for role in found.result.facts.get("absent") or []]:
        lead.append(f"No head was found for {listing(absent, last='or')}.")
    if top := strongest(table, "effect", 1):
        row = top[0]
        lead.append(
            f"The largest effect is that of a{row['layer']}.h{row['head']}: "
            f"{estimate(row['effect'], row['lo'], row['hi'])} against a null of "
            f"{number(row['null'])}."
        )
    body = [
        [
            Cell(text=f"a{row['layer']}.h{row['head']}", style="mono"),
            cell(str(row["role"] or "–").replace("_", " ")),
            cell(row["attention"]),
            cell(row["effect"]),
            Cell(text=interval(row["lo"], row["hi"]) or "–", numeric=True),
            cell(row["null"]),
            Cell(text=p_value(row["p"]), numeric=True),
        ]
        for row in table
    ]
    known = found.result.facts.get("descriptions")
    described = known if isinstance(known, dict) else {}
    terms = [f"{role.replace('_', ' ')}: {visible(described[role], 120)}" for role in by_role if role in described]
    columns = ("head", "role", "attention", "effect", "95% interval", "null", "p")
    caption = (
        "Attention: mean weight on the place that the role names. Effect: change of the metric when the "
        "head is patched. Null: the same for random heads. "
    )
    caption += f"Roles: {'; '.join(terms)}." if terms else ""
    figure = context.figure(found, lambda: chart(found.result), title="Each head's effect, by role", tables=["roles"])
    return Section(
        id="heads", title=title, lead=lead, blocks=[figure, Table(columns=columns, rows=body, caption=caption)]
    )

"""What the heads do: roles by attention and by patching, each against its null."""

from headwater.report.blocks import Cell, Section, Table, cell
from headwater.report.charts.claims import heads as chart
from headwater.report.charts.parts import rows
from headwater.report.sections.base import Context, missing
from headwater.report.words import (
    beside,
    count,
    estimate,
    interval,
    listing,
    p_value,
    role_name,
    strongest,
    visible,
)

_COLUMNS = ("layer", "head", "role", "attention", "attention_null", "effect", "lo", "hi", "null", "p")


def _group(role: str, names: list[str]) -> str:
    shown = listing(names[:4]) if len(names) <= 4 else f"{', '.join(names[:4])} and {len(names) - 4} more"
    return f"{role} ({shown})"


def heads(context: Context) -> Section:
    """A table and a chart of the heads that have a role."""
    title = "What the heads do"
    found = context.run.first("heads")
    table = rows(found.result.tables.get("roles"), *_COLUMNS) if found else []
    if found is None or not table:
        what = "It names heads by what they attend to, and tests each name by patching."
        return missing(context, id="heads", title=title, what=what, stage="heads")
    by: dict[str, list[str]] = {}
    by_role = dict.fromkeys(str(row["role"]) for row in table)
    for row in table:
        by.setdefault(role_name(row["role"]), []).append(f"a{row['layer']}.h{row['head']}")
    n_heads = len({(row["layer"], row["head"]) for row in table})
    have = "has" if n_heads == 1 else "have"
    lead = [f"{count(n_heads, 'head')} {have} a role: {listing(_group(*group) for group in by.items())}."]
    if absent := [role_name(role) for role in found.result.facts.get("absent") or []]:
        lead.append(f"No head was found for {listing(absent, last='or')}.")
    if top := strongest(table, "effect", 1):
        row = top[0]
        lead.append(
            f"The largest effect is that of a{row['layer']}.h{row['head']}: "
            f"{estimate(row['effect'], row['lo'], row['hi'])} against a null of "
            f"{beside(row['null'], row['lo'], row['hi'])}."
        )
    body = [
        [
            Cell(text=f"a{row['layer']}.h{row['head']}", style="mono"),
            cell(role_name(row["role"])),
            cell(row["attention"]),
            cell(row["attention_null"]),
            Cell(text=estimate(row["effect"], row["lo"], row["hi"]).partition(" ")[0], numeric=True),
            Cell(text=interval(row["lo"], row["hi"]) or "–", numeric=True),
            Cell(text=beside(row["null"], row["lo"], row["hi"]), numeric=True),
            Cell(text=p_value(row["p"]), numeric=True),
        ]
        for row in table
    ]
    known = found.result.facts.get("descriptions")
    described = known if isinstance(known, dict) else {}
    terms = [f"{role_name(role)}: {visible(described[role], 120)}" for role in by_role if role in described]
    columns = ("head", "role", "attention", "of other heads", "effect", "95% interval", "null", "p")
    caption = (
        "Attention: mean weight on the place that the role names, beside that of all other heads. "
        "Effect: change of the metric when the "
        "head is patched. Null: the same for random heads. "
    )
    caption += f"Roles: {'; '.join(terms)}." if terms else ""
    figure = context.figure(found, lambda: chart(found.result), title="Each head's effect, by role", tables=["roles"])
    return Section(
        id="heads", title=title, lead=lead, blocks=[figure, Table(columns=columns, rows=body, caption=caption)]
    )

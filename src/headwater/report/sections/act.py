"""What acting on it does, next to prompting and random controls."""

from headwater.report.blocks import Cell, Section, Table, cell
from headwater.report.charts.claims import change
from headwater.report.charts.claims import effect as chart
from headwater.report.charts.parts import Row, rows
from headwater.report.sections.base import Context, missing
from headwater.report.words import estimate, interval, metric_name, number, visible

_COLUMNS = ("action", "measure", "before", "after", "change", "lo", "hi", "n", "baseline", "note")


def acting(context: Context) -> Section:
    """A chart and a table for each stored effect."""
    title = "Acting on it"
    found = [item for item in context.run.all("effect") if rows(item.result.tables.get("rows"))]
    if not found:
        what = "It knocks out, amplifies or steers what was found, and measures what else changes."
        return missing(context, id="act", title=title, what=what, stage="act")
    section = Section(id="act", title=title)
    for item in found:
        table = [row | {"change": change(row)} for row in rows(item.result.tables["rows"], *_COLUMNS)]
        section.lead = [*section.lead, *_lead(table)]
        name = "" if len(found) == 1 else f" ({item.name.replace('_', ' ')})"
        section.blocks.append(
            context.figure(
                item,
                lambda item=item: chart(item.result),
                title=f"What each action changes{name}",
                caption=(
                    "Blue: actions on the mechanism. Grey: baselines on the same budget (prompting, "
                    "random controls). Each measure has its own scale; the dashed line is no change."
                ),
                tables=["rows"],
            )
        )
        body = [
            [
                cell(row["action"]),
                cell(metric_name(row["measure"])),
                cell(row["before"]),
                cell(row["after"]),
                cell(row["change"]),
                Cell(text=interval(row["lo"], row["hi"]) or "–", numeric=True),
                cell(row["n"]),
                Cell(text="baseline" if row["baseline"] else "", style="soft"),
                cell(row["note"] or "", style="soft"),
            ]
            for row in table
        ]
        columns = ("action", "measure", "before", "after", "change", "95% interval of the change", "n", "", "note")
        section.blocks.append(Table(columns=columns, rows=body))
    return section


def _lead(table: list[Row]) -> list[str]:
    """The first measure's largest action beside the largest baseline."""
    if not table:
        return []
    first = table[0]["measure"]
    measured = [row for row in table if row["measure"] == first and row["change"] is not None]
    acts = [row for row in measured if not row["baseline"]]
    controls = [row for row in measured if row["baseline"]]
    if not acts:
        return []
    best = max(acts, key=lambda row: abs(row["change"]))
    name = metric_name(first)
    text = (
        f"{visible(best['action'], 60)} changes {name} from {number(best['before'])} to "
        f"{number(best['after'])} ({estimate(best['change'], best['lo'], best['hi'])})"
    )
    if controls:
        other = max(controls, key=lambda row: abs(row["change"]))
        by = estimate(other["change"], other["lo"], other["hi"])
        text += f"; the strongest baseline, {visible(other['action'], 60)}, changes it by {by}"
    lines = [f"{text[:1].upper()}{text[1:]}."]
    side = [
        row
        for row in table
        if row["action"] == best["action"] and row["measure"] != first and row["change"] is not None
    ]
    if side:
        lines.append(
            "What else it changes: "
            + "; ".join(
                f"{metric_name(row['measure'])} {estimate(row['change'], row['lo'], row['hi'])}" for row in side
            )
            + "."
        )
    return lines

"""What acting on it does, next to prompting and random controls."""

from typing import Any

from headwater.report.blocks import Cell, Heading, Note, Section, Table, cell
from headwater.report.charts.claims import change, distinct_measures
from headwater.report.charts.claims import effect as chart
from headwater.report.charts.parts import Row, rows
from headwater.report.gather import Found
from headwater.report.sections.base import Context, missing
from headwater.report.words import count, estimate, finite, interval, listing, metric_name, number, visible

_ROWS = ("action", "measure", "before", "after", "change", "lo", "hi", "n", "baseline", "note")
_VERSUS = ("action", "control", "measure", "gain", "control_gain", "difference", "lo", "hi", "n")
_NAME = 70  # an action's name may hold a whole prompt


def acting(context: Context) -> Section:
    """A chart and two tables for each stored effect: everything measured, and actions against their controls."""
    title = "Acting on it"
    found = [item for item in context.run.all("effect") if rows(item.result.tables.get("rows"))]
    if not found:
        what = "It knocks out, amplifies or steers what was found, and measures what else changes."
        return missing(context, id="act", title=title, what=what, stage="act")
    section = Section(id="act", title=title)
    for item in found:
        table = [row | {"change": change(row)} for row in rows(item.result.tables["rows"], *_ROWS)]
        versus = rows(item.result.tables.get("versus"), *_VERSUS)
        section.lead = [*section.lead, *(_against(versus) if versus else _largest(table))]
        name = "" if len(found) == 1 else f" ({item.name.replace('_', ' ')})"
        section.blocks += [_figure(context, item, name), _pivot(table)]
        if versus:
            section.blocks += _duels(versus)
    skipped = context.run.facts.get("act", {}).get("others_skipped")
    if isinstance(skipped, dict) and skipped:
        told = "; ".join(f"{visible(name, 60)}: {visible(why, 200)}" for name, why in skipped.items())
        section.blocks.append(Note(text=f"Behaviors that this model's tokenizer cannot be asked for. {told}."))
    return section


def _figure(context: Context, item: Found, name: str) -> Any:
    return context.figure(
        item,
        lambda: chart(item.result),
        title=f"What each action changes{name}",
        caption="Blue: actions on the mechanism. Grey: baselines on the same budget (prompting, random controls). "
        "Bars are 95% intervals; each measure has its own scale; the dashed line is no change.",
        tables=["rows", "versus"],
    )


def _against(versus: list[Row]) -> list[str]:
    """Which actions beat all their controls, and by how much the first one does."""
    by: dict[str, list[Row]] = {}
    for row in versus:
        by.setdefault(str(row["action"]), []).append(row)
    won = [action for action, duels in by.items() if all((finite(row["lo"]) or 0.0) > 0 for row in duels)]
    names = f": {listing(visible(action, _NAME) for action in won)}" if won else ""
    lines = [f"Of {count(len(by), 'action')}, {len(won) or 'none'} did more than every control beyond chance{names}."]
    for action, duels in by.items():
        measure, gain = metric_name(duels[0]["measure"]), number(duels[0]["gain"])
        others = listing(
            f"“{visible(row['control'], _NAME)}” by {number(row['control_gain'])} (difference {estimate(*_span(row))})"
            for row in duels
        )
        lines.append(f"“{visible(action, _NAME)}” moves {measure} by {gain} where it aims to; {others}.")
    return lines


def _span(row: Row) -> tuple[Any, Any, Any]:
    return row["difference"], row["lo"], row["hi"]


def _largest(table: list[Row]) -> list[str]:
    """The first measure's largest action beside the largest baseline, and what else that action changes."""
    measured = [row for row in table if row["measure"] == table[0]["measure"] and row["change"] is not None]
    acts = [row for row in measured if not row["baseline"]]
    controls = [row for row in measured if row["baseline"]]
    if not acts:
        return []
    best = max(acts, key=lambda row: abs(row["change"]))
    text = (
        f"{_upper(visible(best['action'], _NAME))} changes {metric_name(best['measure'])} from "
        f"{number(best['before'])} to {number(best['after'])} ({_changed(best)})"
    )
    if controls:
        other = max(controls, key=lambda row: abs(row["change"]))
        text += f"; the strongest baseline, {visible(other['action'], _NAME)}, changes it by {_changed(other)}"
    side = [row for row in table if row["action"] == best["action"] and row not in measured]
    changes = [f"{metric_name(row['measure'])} {_changed(row)}" for row in side if row["change"] is not None]
    return [f"{text}.", *([f"What else it changes: {'; '.join(changes)}."] if changes else [])]


def _changed(row: Row) -> str:
    return estimate(row["change"], row["lo"], row["hi"])


def _pivot(table: list[Row]) -> Table:
    """One line an action, one column a measure: the change with its interval; the first line is before any action."""
    measures = distinct_measures(table)
    before = {str(row["measure"]): row["before"] for row in reversed(table) if row["before"] is not None}
    lines = [[Cell(text="as it is", style="soft"), *(cell(before.get(measure)) for measure in measures), Cell(text="")]]
    for action in dict.fromkeys(row["action"] for row in table):
        own = {str(row["measure"]): row for row in table if row["action"] == action}
        baseline = any(row["baseline"] for row in own.values())
        cells = [_change_cell(own.get(measure)) for measure in measures]
        notes = "; ".join(dict.fromkeys(str(row["note"]) for row in own.values() if row["note"]))
        lines.append(
            [
                cell(action, style="soft claim" if baseline else "claim", limit=160),
                *cells,
                cell("; ".join(filter(None, ("baseline" if baseline else "", notes))), style="soft note-cell"),
            ]
        )
    caption = "Changes from the model as it is, with 95% intervals below. Only what was measured has a number."
    return Table(columns=("action", *(metric_name(measure) for measure in measures), ""), rows=lines, caption=caption)


def _change_cell(row: Row | None) -> Cell:
    if row is None or row["change"] is None:
        return Cell(text="–", numeric=True)
    value, span = estimate(row["change"], row["lo"], row["hi"]).partition(" ")[0], interval(row["lo"], row["hi"])
    sign = "+" if row["change"] > 0 and value != "0" else ""
    was = f"from {number(row['before'])} to {number(row['after'])}, n {number(row['n'])}"
    return Cell(text=f"{sign}{value}", below=span, numeric=True, title=was)


def _duels(versus: list[Row]) -> list[Any]:
    """Each action against each of its controls, pair by pair."""
    body = [
        [
            cell(row["action"], style="claim", limit=160),
            cell(row["control"], style="claim", limit=160),
            cell(row["gain"]),
            cell(row["control_gain"]),
            Cell(text=number(row["difference"]), below=interval(row["lo"], row["hi"]), numeric=True),
            _verdict(row),
        ]
        for row in versus
    ]
    columns = ("action", "against", "its gain", "the control's", "difference", "")
    lead = "Gains count in the direction that the action aims at, on the same pairs."
    return [Heading(text="Against the controls", lead=lead), Table(columns=columns, rows=body)]


def _verdict(row: Row) -> Cell:
    lo, hi = finite(row["lo"]), finite(row["hi"])
    if lo is not None and lo > 0:
        return Cell(text="better", style="badge good")
    if hi is not None and hi < 0:
        return Cell(text="worse", style="badge bad")
    return Cell(text="no clear difference", style="badge open")


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]

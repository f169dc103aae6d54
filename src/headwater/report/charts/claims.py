"""Charts of head roles, of actions and of the ledger: estimates with intervals, each beside what it must beat."""

from typing import Any

import altair as alt

from headwater.report.charts.behaviors import without_legend
from headwater.report.charts.parts import Row, intervals, nothing, rows, themed
from headwater.report.theme import CATEGORIES, color
from headwater.report.words import estimate, metric_name, number, p_value, role_name, visible

STATUS = {"supported": "good", "refuted": "bad", "inconclusive": "open"}


def role_hues(roles: list[str]) -> dict[str, str]:
    """A colour for each role, in the order of their first appearance, the same in every figure of a report."""
    return {role: CATEGORIES[i % len(CATEGORIES)] for i, role in enumerate(dict.fromkeys(roles))}


def heads(result: Any) -> Any:
    """Each named head's patching effect with its interval; a tick marks the null."""
    found = rows(result.tables.get("roles"), "layer", "head", "role", "attention", "effect", "lo", "hi", "null", "p")
    found = [row for row in found if row["effect"] is not None or row["attention"] is not None]
    if not found:
        return themed(nothing("no heads with a role"))
    measure = "effect" if any(row["effect"] is not None for row in found) else "attention"
    shown = [
        {
            "label": f"a{row['layer']}.h{row['head']}",
            "group": role_name(row["role"]),
            "hue": str(row["role"] or "no role"),
            "value": row[measure],
            "lo": row["lo"] if measure == "effect" else None,
            "hi": row["hi"] if measure == "effect" else None,
            "null": row["null"],
            "tip": f"a{row['layer']}.h{row['head']}, {row['role']}: "
            f"effect {estimate(row['effect'], row['lo'], row['hi'])}, "
            f"attention {number(row['attention'])}, null {number(row['null'])}, p {p_value(row['p'])}",
        }
        for row in found
    ]
    chart = intervals(shown, x=f"{measure} (tick: null)", hues=role_hues([row["hue"] for row in shown]), grouped=True)
    if any(row["null"] is not None for row in shown):
        tick = alt.Chart().mark_tick(color=color("null"), thickness=2, height=12)
        chart.spec.layer.append(tick.encode(x="null:Q", y=alt.Y("label:N", sort=None)))
    return themed(without_legend(chart))


def effect(result: Any) -> Any:
    """What each action changed, one panel a measure with its own scale; baselines in grey."""
    found = rows(
        result.tables.get("rows"), "action", "measure", "before", "after", "change", "lo", "hi", "n", "baseline", "note"
    )
    found = [row | {"change": change(row)} for row in found]
    found = [row for row in found if row["change"] is not None]
    if not found:
        return themed(nothing("no effect was measured"))
    order = distinct_measures(found)
    found = [row for row in found if str(row["measure"]) in order]
    shown = [
        {
            "label": visible(row["action"], 48),
            "group": f"change in {metric_name(row['measure'])}",
            "value": row["change"],
            "lo": row["lo"],
            "hi": row["hi"],
            "reference": 0.0,
            "hue": "baseline" if row["baseline"] else "action",
            "tip": f"{row['action']}, {row['measure']}: {estimate(row['change'], row['lo'], row['hi'])} "
            f"(from {number(row['before'])} to {number(row['after'])}), n {number(row['n'])}",
        }
        for row in sorted(found, key=lambda row: order.index(str(row["measure"])))
    ]
    hues = {"action": color("pos"), "baseline": color("null")}
    return themed(intervals(shown, x=None, hues=hues, grouped=True, independent=True))


def distinct_measures(found: list[Row]) -> list[str]:
    """The measures in their order, without those that came out the same as an earlier one for every action."""
    values: dict[str, list[tuple[Any, Any]]] = {}
    for row in found:
        values.setdefault(str(row["measure"]), []).append((row["action"], row["change"]))
    first: dict[frozenset[tuple[Any, Any]], str] = {}
    for measure, changes in values.items():
        first.setdefault(frozenset(changes), measure)
    return list(first.values())


def change(row: Row) -> float | None:
    """A row's change, taken from before and after where it is not given."""
    if row["change"] is not None or row["before"] is None or row["after"] is None:
        return row["change"]
    return row["after"] - row["before"]


def ledger(result: Any) -> Any:
    """Each claim's effect with interval, coloured by what became of it; a tick marks the null's mean, a
    dashed line the value that the claim must lie beyond.

    Claims are measured in different units, so each has a scale of its own.
    """
    found = [row for row in claim_rows(result) if row["effect"] is not None]
    if not found:
        return themed(nothing("an empty ledger"))
    shown = [
        {
            "label": visible(row["id"], 30),
            "group": visible(row["statement"], 90),
            "value": row["effect"],
            "lo": row["lo"],
            "hi": row["hi"],
            "null": row["null_mean"],
            "reference": row["reference"],
            "hue": row["status"],
            "tip": f"{row['statement']}: {row['status']}, effect {estimate(row['effect'], row['lo'], row['hi'])}, "
            f"null {number(row['null_mean'])}, adjusted p {p_value(row['p_adj'])}",
        }
        for row in found
    ]
    chart = intervals(
        shown, x="effect (tick: null)", hues={s: color(c) for s, c in STATUS.items()}, grouped=True, independent=True
    )
    tick = alt.Chart().mark_tick(color=color("null"), thickness=2, height=12)
    chart.spec.layer.append(tick.encode(x="null:Q", y=alt.Y("label:N", sort=None)))
    return themed(chart)


_CLAIM = (
    *("id", "statement", "test", "effect", "lo", "hi", "reference", "null_mean", "p", "p_adj", "n", "seed", "command"),
    *("stage", "status", "why_not", "note", "params"),
)


def claim_rows(ledger: Any) -> list[Row]:
    """The ledger's claims as rows, supported first, whichever way the ledger holds them."""
    if ledger is None:
        return []
    tables = ledger.tables
    table = tables.get("claims", next(iter(tables.values()), None))
    # the table has no draws: the ledger keeps them, with everything else, in its facts
    kept = {str(each.get("id")): each for each in ledger.facts.get("claims") or [] if isinstance(each, dict)}
    found = [row | {"null_draws": kept.get(str(row["id"]), {}).get("null_draws")} for row in rows(table, *_CLAIM)]
    for row in found:
        if row["status"] not in STATUS:
            row["status"] = "inconclusive"
    return sorted(found, key=lambda row: list(STATUS).index(row["status"]))

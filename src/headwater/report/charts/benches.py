"""Charts of benchmarks' results: published scores, programs read off networks, a circuit's parts left out."""

from typing import Any

from headwater.report.charts.parts import intervals, rows, themed
from headwater.report.theme import color
from headwater.report.words import number


def published_scores(result: Any) -> Any:
    """One dot a score, a panel a measure, tasks and methods named."""
    found = [
        {
            "label": " ".join(str(row[key]) for key in ("task", "method", "site", "position") if row[key]),
            "group": str(row["measure"]),
            "tip": f"{row['task']}, {row['method']}: {row['measure']} {number(row['value'])}, n {number(row['n'])}",
            **{key: row[key] for key in ("value", "lo", "hi")},
        }
        for row in rows(
            result.tables.get("scores"), "task", "method", "site", "position", "measure", "value", "lo", "hi", "n"
        )
        if row["value"] is not None
    ]
    return themed(intervals(found, x="score", grouped=True, independent=True))


def learned_program(result: Any) -> Any:
    """Accuracy of each seed's discrete program on test data; the run that was kept in full colour."""
    found = [
        {
            "label": f"seed {number(row['seed'])}",
            "hue": "kept" if row["best"] else "other",
            "tip": f"seed {number(row['seed'])}: {number(row['accuracy'])} of positions right, "
            f"{number(row['exact'])} of sequences",
            "value": row["accuracy"],
            "lo": row["lo"],
            "hi": row["hi"],
        }
        for row in rows(result.tables.get("runs"), "seed", "accuracy", "exact", "lo", "hi", "best")
    ]
    return themed(intervals(found, x="positions right", hues={"kept": color("pos"), "other": color("soft")}))


def mips(result: Any) -> Any:
    """Share of fresh sequences that each task's program got right at every position, solved tasks by name first."""
    table = rows(result.tables.get("tasks"), "task", "solved", "longer", "held_out", "why")
    found = [
        {
            "label": str(row["task"]),
            "hue": "solved" if row["solved"] else "not solved",
            "value": row["held_out"] or 0.0,
            "tip": f"{row['task']}: {'solved' if row['solved'] else row['why'] or 'not solved'}",
        }
        for row in sorted(table, key=lambda row: not row["solved"])
    ]
    hues = {"solved": color("pos"), "not solved": color("soft")}
    return themed(intervals(found, x="fresh sequences right", hues=hues, domain=(-0.02, 1.02), step=14))


def minimality(result: Any) -> Any:
    """What each node brings to the circuit's faithfulness."""
    found = [
        {
            "label": str(row["node"]),
            "value": row["drop"],
            "lo": row["lo"],
            "hi": row["hi"],
            "reference": 0.0,
            "tip": f"without {row['node']}: {number(row['drop'])} less faithful",
        }
        for row in rows(result.tables.get("nodes"), "node", "drop", "lo", "hi")
        if row["drop"] is not None
    ]
    return themed(intervals(found, x="faithfulness lost without it"))

"""Chart of how often claims are supported where nothing is to be found, and where something is."""

from typing import Any

from headwater.report.charts.parts import intervals, rows, themed
from headwater.report.words import number


def claim_rates(result: Any) -> Any:
    """Share of null investigations with any supported claim, beside what it may be at most; and the share of true
    claims found.
    """
    found = []
    for row in rows(result.tables.get("rates"), "kind", "of", "supported", "n", "rate", "lo", "hi", "bound"):
        null = row["bound"] is not None
        if null and row["of"] != "investigations":
            continue
        named = f"{row['kind']}" if null else row["of"].replace("claims", "all claims that must hold")
        found.append({
            "label": named, "value": row["rate"], "lo": row["lo"], "hi": row["hi"], "reference": row["bound"],
            "group": "nulls: any claim supported" if null else "true mechanisms: claim supported",
            "tip": f"{named}: {number(row['supported'])} of {number(row['n'])}, {number(row['rate'])} "
            f"[{number(row['lo'])}, {number(row['hi'])}]",
        })  # fmt: skip
    return themed(intervals(found, x="share", grouped=True, domain=(0.0, 1.0)))

"""Charts of path patching (senders by receivers) and of causal tracing (layers by groups of tokens)."""

from typing import Any

import altair as alt

from headwater.report.charts.parts import heat, nothing, rows, themed
from headwater.report.words import estimate, number

_MOST = 30
_STATES = {
    "resid_pre": "the hidden state before each block",
    "resid_mid": "the hidden state behind attention",
    "resid_post": "the hidden state after each block",
    "mlp_out": "MLPs around each layer",
    "attn_out": "attention around each layer",
}


def path_patching(result: Any) -> Any:
    """Senders by receivers, the strongest of each where there are many."""
    every = [row for row in rows(result.tables.get("effects"), "source", "target", "effect", "lo", "hi", "n")]
    every = [row for row in every if row["effect"] is not None]
    if not every:
        return themed(nothing())
    kept = {side: _strongest(every, side) for side in ("source", "target")}
    shown = [row for row in every if row["source"] in kept["source"] and row["target"] in kept["target"]]
    cells = [
        {
            "x": _short(row["target"]),
            "y": _short(row["source"]),
            "value": row["effect"],
            "tip": f"{row['source']} → {row['target']}: {estimate(row['effect'], row['lo'], row['hi'])}, "
            f"n {number(row['n'])}",
        }
        for row in shown
    ]
    extreme = max(abs(row["effect"]) for row in shown)
    return themed(heat(cells, x="receiver", y="sender", extreme=extreme, title="Effect of each path"))


def _strongest(every: list[Any], side: str) -> set[str]:
    best: dict[str, float] = {}
    for row in every:
        best[row[side]] = max(best.get(row[side], 0.0), abs(row["effect"]))
    return set(sorted(best, key=lambda name: -best[name])[:_MOST])


def _short(name: str) -> str:
    parts = name.split("+")
    return name if len(parts) < 3 else f"{parts[0]} and {len(parts) - 1} more"


def causal_trace(result: Any) -> Any:
    """One heat map a kind of state: the average indirect effect by group of tokens and layer."""
    every = rows(result.tables.get("effects"), "kind", "group", "layer", "effect", "lo", "hi", "n")
    every = [row for row in every if row["effect"] is not None]
    if not every:
        return themed(nothing())
    metric = str(result.facts.get("metric", "effect"))
    drawn = []
    for kind in dict.fromkeys(row["kind"] for row in every):
        own = sorted((row for row in every if row["kind"] == kind), key=lambda row: row["layer"])
        order = list(dict.fromkeys(row["group"] for row in every if row["kind"] == kind))
        cells = [
            {
                "x": row["group"],
                "y": row["layer"],
                "value": row["effect"],
                "tip": f"{kind} at layer {row['layer']}, {row['group']} token: "
                f"{estimate(row['effect'], row['lo'], row['hi'])}, n {number(row['n'])}",
            }
            for group in order
            for row in own
            if row["group"] == group
        ]
        extreme = max(abs(row["effect"]) for row in own)
        title = f"Restoring {_STATES.get(str(kind), str(kind))}"
        drawn.append(heat(cells, x="tokens", y="layer", legend=metric, extreme=extreme, title=title, step=(44, 13)))
    return themed(alt.hconcat(*drawn).resolve_scale(color="independent") if len(drawn) > 1 else drawn[0])

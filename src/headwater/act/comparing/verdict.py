"""The verdict of a comparison, written from its tables: who wins, by how much, and what it cost."""

from typing import Any

import polars as pl

from headwater.act.comparing.baselines import BASELINES, NOTHING, RANDOM

_READS = 0.7


def verdict(summary: pl.DataFrame, versus: pl.DataFrame, task: str, seeds: int) -> list[str]:
    """Sentences. The best action is the one with the highest mean score; it beats a baseline where the interval of
    their difference, paired by seed, lies above 0, and loses where it lies below; else the seeds cannot tell."""
    scored = summary.filter((pl.col("measure") == "score") & pl.col("value").is_not_null())
    actions = scored.filter(pl.col("kind") == "action").sort("value", descending=True, maintain_order=True)
    bases = scored.filter(pl.col("action").is_in(BASELINES)).sort("value", descending=True, maintain_order=True)
    over = f"over {seeds} seed{'s'[: seeds != 1]}"
    if not bases.height:
        return [f"{task}, {over}: no baseline could be measured, so nothing can be said of the actions."]
    strongest = bases.row(0, named=True)
    said = [f"{task}, {over}: the strongest baseline is {strongest['action']}, with a score of {_estimate(strongest)}."]
    if not actions.height:
        said.append("No action was measured beside the baselines.")
        return said + _control(summary, strongest)
    best = actions.row(0, named=True)
    name = str(best["action"])
    said.append(f"The best action is {name}, with {_estimate(best)}{_costs(summary, name)}.")
    rows = {
        row["baseline"]: row
        for row in versus.filter((pl.col("action") == name) & (pl.col("measure") == "score")).iter_rows(named=True)
    }
    lost, even, won = [], [], []
    for other in bases["action"].to_list():
        row = rows.get(other)
        if row is None:
            continue
        gap = f"{other} ({_signed(row)})"
        side = _side(row)
        (won if side > 0 else lost if side < 0 else even).append(gap)
    ahead = strongest["value"] > best["value"]
    if lost:
        said.append(f"The baseline wins: {name} falls short of {_listed(lost)}.")
    elif ahead:
        said.append(f"The baseline is ahead: {name} does not reach {strongest['action']}.")
    if won:
        said.append(f"{name} beats {_listed(won)}.")
    if even:
        said.append(f"Between {name} and {_listed(even)} the seeds cannot tell.")
    said += _control(summary, best)
    said += _after(summary, versus, name, strongest["action"])
    return said


def _control(summary: pl.DataFrame, best: dict[str, Any]) -> list[str]:
    """What LoRA toward random targets attains, and what nothing does."""
    held = {
        row["action"]: row["value"]
        for row in summary.filter(pl.col("measure") == "efficacy").iter_rows(named=True)
        if row["value"] is not None
    }
    mine, control, before = (held.get(one) for one in (best["action"], RANDOM, NOTHING))
    if mine is None or control is None or before is None:
        return []
    told = f"Efficacy is {_number(before)} with nothing done, and {_number(control)} where LoRA learns random targets"
    if control - before >= 0.5 * (mine - before) and mine > before:
        return [f"{told}: at least half of the gain of {best['action']} ({_number(mine)}) needs no right target."]
    return [f"{told}, against {_number(mine)} by {best['action']}."]


def _after(summary: pl.DataFrame, versus: pl.DataFrame, name: str, other: str) -> list[str]:
    """What relearning and probes say of the best action and of the strongest baseline that changes weights."""
    held: dict[tuple[str, str], Any] = {(r["action"], r["measure"]): r for r in summary.iter_rows(named=True)}
    said = []
    mine = held.get((name, "after relearning"))
    if mine is not None and mine["value"] is not None:
        base = next(
            (b for b in (other, "lora") if (held.get((b, "after relearning")) or {}).get("value") is not None), None
        )
        against = f", {_estimate(held[base, 'after relearning'])} of those of {base}" if base is not None else ""
        said.append(f"After relearning {_estimate(mine)} of the held changes of {name} stand{against}.")
    found = held.get((name, "probe"))
    none = held.get((NOTHING, "probe"))
    # Where the probe could not read the facts that were known, it tells nothing of those that are not.
    if found is not None and found["value"] is not None and none is not None and (none["value"] or 0) >= _READS:
        before = f"before: {_number(none['value'])}; chance 0.5"
        said.append(f"A probe of the stream is right on {_estimate(found)} of the old answers ({before}).")
    return said


def _costs(summary: pl.DataFrame, name: str) -> str:
    held = {
        row["measure"]: row["value"]
        for row in summary.filter(pl.col("action") == name).iter_rows(named=True)
        if row["value"] is not None
    }
    parts = [f"{one} {_number(held[one])}" for one in ("efficacy", "neighbours") if one in held]
    if "perplexity" in held:
        parts.append(f"perplexity {_number(held['perplexity'])} times the model's own")
    if held.get("weights"):
        parts.append(f"{held['weights']:,.0f} weights")
    return f" ({', '.join(parts)})" if parts else ""


def _side(row: dict[str, Any]) -> int:
    """1 above 0, -1 below, 0 where the interval holds it, or where there is none (one seed)."""
    if row["lo"] is None or row["hi"] is None:
        return 0
    return 1 if row["lo"] > 0 else -1 if row["hi"] < 0 else 0


def _estimate(row: dict[str, Any]) -> str:
    if row["lo"] is None or row["hi"] is None:
        return _number(row["value"])
    return f"{_number(row['value'])} [{_number(row['lo'])}, {_number(row['hi'])}]"


def _signed(row: dict[str, Any]) -> str:
    ends = ", one seed" if row["lo"] is None else f" [{_number(row['lo'])}, {_number(row['hi'])}]"
    return f"difference {row['difference']:+.2f}{ends}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

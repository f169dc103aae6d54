"""do(data): training again without the sequences that a method points at, and whether the behavior falls."""

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from headwater.claims import Context, Outcome, bootstrap, sign_flip, smallest_p, test
from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result, register_result
from headwater.data.attribution.gradients import SequenceGradients
from headwater.data.attribution.queries import read_queries
from headwater.data.attribution.result import RETRIEVAL, AttributionToData

RANDOM, NOTHING = "random", "nothing"
_RUNS: dict[str, Any] = {
    "removed": pl.String, "seed": pl.Int64, "query": pl.Int64, "loss": pl.Float64, "right": pl.Boolean,
    "before": pl.Float64, "before_right": pl.Boolean, "sequences": pl.Int64,
}  # fmt: skip
_EFFECT: dict[str, Any] = {
    "removed": pl.String, "measure": pl.String, "change": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
    "more": pl.Float64, "more_lo": pl.Float64, "more_hi": pl.Float64, "p": pl.Float64, "sequences": pl.Int64,
    "n": pl.Int64, "seeds": pl.Int64,
}  # fmt: skip


@register_result
class DataRemoval(Result):
    """What training without some sequences did to a behavior.

    `tables["effect"]`: removed (by which ranking; "random": as many at random), measure ("loss" in nats; "accuracy":
    the answer is the likeliest), change (after - before, mean over queries of the mean over seeds), lo, hi (over
    queries), more (change beyond that of the random removal), more_lo, more_hi, p (sign flips over queries, that the
    loss rose, or the accuracy fell, beyond random), sequences (removed), n (queries), seeds. `tables["runs"]`: removed,
    seed, query, loss, right, before, before_right, sequences. Facts: k, seeds, method.
    """

    kind: ClassVar[str] = "data_removal"
    main: ClassVar[str | None] = "effect"


def remove_and_retrain(
    run: Any,
    behavior: Any,
    found: AttributionToData | Sequence[AttributionToData],
    out: str | Path,
    *,
    k: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    source: int | None = None,
) -> DataRemoval:
    """Train a run again without the sequences that each ranking puts first, and measure the behavior: do(data).

    run: of the lab. found: what `attribute` gave, of one method or several; beside them go the first of the
    co-occurrence retrieval, and as many sequences at random. k: the first how many of each query are removed, all
    queries' together (the results' own k if not said). seeds: each is a training of its own, first without any removal.
    source: the sequences are numbered within that source of the run (and removed wherever they come); else in the
    run's order. Runs lie in `out` (`<ranking>-seed-<n>`); killed, the same call goes on.

    Known failure: what is removed for all queries together may help one of them through another. Where many sequences
    say the same, removing a few shows nothing although they taught it too. All queries share the runs of a seed, and
    each run has its accidents: p speaks of queries, so ask for several seeds.
    """
    started = time.monotonic()
    results = [found] if isinstance(found, AttributionToData) else list(found)
    if not results or not seeds:
        raise MethodError("nothing to remove", wanted="what `attribute` found, and a seed or more")
    opened = importlib.import_module("headwater.dynamics.lab.run").TrainingRun
    redo = importlib.import_module("headwater.dynamics.lab.redo").redo
    base = run if isinstance(run, opened) else opened.open(run)
    k = int(results[0].config["k"]) if k is None else k
    chosen = {one.facts["method"]: one.first(k) for one in results} | {RETRIEVAL: results[0].first(k, RETRIEVAL)}
    every = results[0].tensors["sequences"].numpy()
    size = max(len(sequences) for sequences in chosen.values())
    rows: list[list[Any]] = []
    for seed in seeds:
        random = np.random.default_rng([seed, k]).choice(every, size=size, replace=False)
        before = _measured(redo(base, Path(out) / f"{NOTHING}-seed-{seed}", seed=_seed(base, seed)), behavior)
        for name, sequences in {**chosen, RANDOM: sorted(random.tolist())}.items():
            what = sequences if source is None else {source: sequences}
            made = redo(base, Path(out) / f"{name}-seed-{seed}", remove=what, seed=_seed(base, seed))
            for query, (one, old) in enumerate(zip(_measured(made, behavior), before, strict=True)):
                rows.append([name, seed, query, *one, *old, len(sequences)])
    runs = pl.DataFrame(rows, schema=_RUNS, orient="row")
    return DataRemoval(
        tables={"effect": _effect(runs), "runs": runs},
        facts={"k": k, "seeds": list(seeds), "method": [one.facts["method"] for one in results]},
        config={"k": k, "seeds": list(seeds), "source": source},
        provenance=Provenance.collect(behavior=behavior, seconds=time.monotonic() - started),
    )


def _seed(base: Any, seed: int) -> int | None:
    return None if seed == base.config.seed else seed


def _measured(run: Any, behavior: Any) -> list[tuple[float, bool]]:
    """(loss, whether the answer is the likeliest) of each query at the last step."""
    import torch

    model = run.load()
    gradients = SequenceGradients(model.hf)
    out: list[tuple[float, bool]] = []
    for one in read_queries(model, behavior):
        ids, at = one.ids[None].to(model.hf.device), one.at[None].to(model.hf.device)
        with torch.no_grad():
            best = model.hf(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        right = bool((best == ids[:, 1:])[at[:, 1:] > 0].all())
        out.append((float(gradients.losses(ids, at)), right))
    return out


def _effect(runs: pl.DataFrame) -> pl.DataFrame:
    rows: list[list[Any]] = []
    for measure, value in (("loss", pl.col("loss") - pl.col("before")), ("accuracy", _accuracy())):
        each = runs.with_columns(change=value).group_by("removed", "query", maintain_order=True).agg(
            pl.col("change").mean(), pl.col("sequences").first(), pl.col("seed").n_unique()
        )  # fmt: skip
        chance = each.filter(pl.col("removed") == RANDOM).sort("query")["change"].to_numpy()
        for name in each["removed"].unique(maintain_order=True).to_list():
            mine = each.filter(pl.col("removed") == name).sort("query")
            change = mine["change"].to_numpy()
            beyond = change - chance
            sides = [*_interval(change), *_interval(beyond)]
            p = None if name == RANDOM else sign_flip(beyond, side="greater" if measure == "loss" else "less")
            rows.append([name, measure, *sides, p, mine["sequences"][0], len(change), mine["seed"][0]])
    return pl.DataFrame(rows, schema=_EFFECT, orient="row")


def _accuracy() -> pl.Expr:
    return pl.col("right").cast(pl.Float64) - pl.col("before_right").cast(pl.Float64)


def _interval(values: Any) -> tuple[float, float, float]:
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    found = bootstrap(values, method="percentile")
    return float(values.mean()), found.lo, found.hi


@test("data_removed")
def data_removed(context: Context, *, seed: int, ranking: str, measure: str = "loss") -> Outcome:
    """What the queries lose when the run is trained again without the sequences that `ranking` puts first, beyond what
    they lose without as many random ones; sign flips over queries.

    Reads `data_removal` (a DataRemoval). Where none was made, nothing was tested: the claim stays inconclusive, however
    high the scores.
    """
    found: DataRemoval | None = context.get("data_removal")
    side = "greater" if measure == "loss" else "less"
    if found is None:
        why = "no do(data): nothing was trained again without these sequences (remove_and_retrain)"
        return Outcome(effect=float("nan"), side=side, why_not=why)
    rows = found.tables["effect"].filter((pl.col("removed") == ranking) & (pl.col("measure") == measure))
    if rows.is_empty():
        return Outcome(
            effect=float("nan"), side=side, why_not=f"the do(data) that was made removed nothing by {ranking}"
        )
    row = rows.row(0, named=True)
    least = smallest_p(pairs=row["n"])
    why = f"{row['n']} queries are too few: the smallest p they can give is {least:.3g}" if least > 0.05 else ""
    details = {"sequences": row["sequences"], "seeds": row["seeds"], "change": row["change"]}
    return Outcome(
        effect=row["more"], lo=row["more_lo"], hi=row["more_hi"], p=row["p"], n=row["n"], side=side, why_not=why,
        note=f"{row['sequences']} sequences removed, {row['seeds']} seeds", details=details,
    )  # fmt: skip

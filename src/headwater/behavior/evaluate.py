"""How well a model does a behavior: metrics with intervals, by slice and by prompt, and the canary."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl
import torch

from headwater.behavior._verb import make_verb
from headwater.behavior.bind import Bound, Group
from headwater.behavior.canary import canary as run_canary
from headwater.behavior.canary import verdict
from headwater.behavior.metrics import SHARES, interval, metric
from headwater.behavior.table import Behavior
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.core.model import Model

METRICS = ("logit_diff", "prob_diff", "accuracy", "rank")
# In `rows` these stand under their contract's name.
_COLUMN = {"accuracy": "correct"}
_METRICS_SCHEMA = {
    "metric": pl.String,
    "slice_name": pl.String,
    "slice": pl.String,
    "value": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.Int64,
}
ALL = "all"
# Pairs whose logits are held at once: 256 of them over 150,000 tokens are 154 MB.
AT_ONCE = 256


@register_result
class BehaviorReport(Result):
    """How well a model does a behavior.

    Tables: `metrics` (metric, slice_name, slice, value, lo, hi, n; slice_name "all" is every prompt), `rows` (one a
    prompt: its texts, its metrics, `said`: the token the model finds most likely, `cf_logit_diff`: the same
    difference under the counterfactual), `canary` (see `headwater.behavior.canary`) and `dropped` (pairs this
    tokenizer cannot align, and why).
    """

    kind: ClassVar[str] = "behavior_report"
    main: ClassVar[str | None] = "metrics"

    @property
    def rows(self) -> pl.DataFrame:
        return self.tables["rows"]

    @property
    def canary(self) -> pl.DataFrame:
        return self.tables["canary"]

    @property
    def dropped(self) -> pl.DataFrame:
        return self.tables["dropped"]

    def value(self, name: str) -> float:
        """A metric over all prompts. Raises MethodError for one that was not measured."""
        return self.interval(name)[0]

    def interval(self, name: str) -> tuple[float, float, float]:
        """(value, lo, hi) of a metric over all prompts. Raises MethodError for one that was not measured."""
        from headwater.core.errors import MethodError, did_you_mean

        found = self.tables["metrics"].filter((pl.col("metric") == name) & (pl.col("slice_name") == ALL))
        if not found.height:
            measured = set(self.tables["metrics"]["metric"])
            raise MethodError("a metric that was not measured", got=repr(name), wanted=did_you_mean(name, measured))
        return found["value"][0], found["lo"][0], found["hi"][0]


def evaluate(
    model: "Model",
    behavior: Behavior,
    *,
    metrics: Sequence[str] = METRICS,
    canary: bool = True,
    canary_rows: int = 48,
    batch_size: int | None = None,
    seed: int = 0,
) -> BehaviorReport:
    """Measure how well a model does a behavior.

    Parameters
    ----------
    model: a headwater Model with its tokenizer. Inside `with model.intervene(...)` the changed model is measured.
    behavior: the pairs; those that the tokenizer cannot align are listed in `dropped`.
    metrics: names of metrics. `logit_diff` and `prob_diff` compare answers with foils (nats; probabilities),
        `accuracy` is 1 where the best answer beats every foil, `rank` counts the tokens above the best answer, `kl`
        is the divergence of the counterfactual's prediction from the prompt's (nats).
    canary: also ask the same questions in other formats; `canary_rows` is how many pairs.
    batch_size: as in `Model.run`.
    seed: of the bootstrap and of the canary's draw.

    Returns a BehaviorReport. Intervals are 95%: bootstrap over prompts, Wilson's for accuracy. Raises MethodError for
    an unknown metric and BehaviorError where no pair is left.
    """
    started = time.monotonic()
    names = list(dict.fromkeys(metrics))
    for name in names:
        metric(name)
    bound = behavior.bind(model)
    per_row: dict[int, dict[str, Any]] = {}
    parts = [part for group in bound.groups for part in group.parts(AT_ONCE)]
    for group in track(parts, f"evaluating {behavior.name}"):
        per_row.update(_measure(model, group, names, batch_size))
    rows = _rows(bound, per_row, names)
    table = _summary(bound, rows, names, seed)
    canary_table = (
        run_canary(model, _kept(bound), rows=canary_rows, seed=seed, batch_size=batch_size) if canary else None
    )
    tables = {"metrics": table, "rows": rows, "dropped": bound.dropped}
    if canary_table is not None:
        tables["canary"] = canary_table
    return BehaviorReport(
        tables=tables,
        facts={
            "behavior": behavior.name,
            "metric": behavior.metric,
            "n": bound.n,
            "n_dropped": bound.dropped.height,
            "dropped": bound.reasons,
            "chance": _chance(bound),
            "about": behavior.about,
            "canary": verdict(canary_table) if canary_table is not None else None,
        },
        config={"metrics": names, "canary": canary, "canary_rows": canary_rows, "seed": seed},
        provenance=Provenance.collect(model, behavior, seed=seed, seconds=time.monotonic() - started),
    )


def _kept(bound: Bound) -> Behavior:
    return Behavior(bound.frame, name=bound.behavior.name, metric=bound.behavior.metric, about=bound.behavior.about)


def _measure(model: Any, group: Group, names: list[str], batch_size: int | None) -> dict[int, dict[str, Any]]:
    """Each row's metrics by name, its counterfactual logit difference, and the most likely token's text."""
    keywords: dict[str, Any] = {"logits": "last", "positions": group.positions, "batch_size": batch_size}
    clean = model.run(group.clean, **keywords).logits.float()
    corrupt = model.run(group.corrupt, **keywords).logits.float()
    answers, foils = group.answers.to(clean.device), group.foils.to(clean.device)
    values: dict[str, list[float]] = {}
    for name in [*names, *(["logit_diff"] if "logit_diff" not in names else [])]:
        logits, reference = (corrupt, clean) if name == "kl" else (clean, None)
        values[name] = _where_there_are_foils(name, logits, answers, foils, reference)
    cf = _where_there_are_foils("logit_diff", corrupt, answers, foils, None)
    said = model.tokenizer.convert_ids_to_tokens(clean.argmax(-1).tolist())
    texts = [model.tokenizer.convert_tokens_to_string([token]) if token is not None else "" for token in said]
    return {
        row: {**{name: values[name][at] for name in values}, "cf_logit_diff": cf[at], "said": texts[at]}
        for at, row in enumerate(group.rows)
    }


def _where_there_are_foils(
    name: str, logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, reference: torch.Tensor | None
) -> list[float]:
    """The metric's values; NaN for a logit difference in rows without foils."""
    if name != "logit_diff":
        return metric(name)(logits, answers, foils, reference).tolist()
    there = (foils >= 0).any(-1)
    values = torch.full((len(logits),), float("nan"))
    if bool(there.any()):
        values[there.cpu()] = metric(name)(logits[there], answers[there], foils[there]).cpu()
    return values.tolist()


def _rows(bound: Bound, per_row: dict[int, dict[str, Any]], names: list[str]) -> pl.DataFrame:
    order = sorted(per_row)
    wanted = list(dict.fromkeys([*METRICS, *names]))
    measured = {
        _COLUMN.get(name, name): pl.Series([per_row[row].get(name) for row in order], dtype=pl.Float64)
        for name in wanted
    }
    if "correct" in measured:
        measured["correct"] = measured["correct"].cast(pl.Boolean)
    frame = bound.frame
    return pl.DataFrame(
        {
            "id": frame["id"],
            "prompt": frame["prompt"],
            "counterfactual": frame["counterfactual"],
            "answer": frame["answers"].list.first(),
            "foil": frame["foils"].list.first(),
            "said": [per_row[row]["said"] for row in order],
            **measured,
            "cf_logit_diff": pl.Series([per_row[row]["cf_logit_diff"] for row in order], dtype=pl.Float64),
            "split": frame["split"],
            **{name: frame[name] for name in bound.behavior.slices if name not in measured},
        }
    )


def _summary(bound: Bound, rows: pl.DataFrame, names: list[str], seed: int) -> pl.DataFrame:
    """Each metric over all prompts, then by each value of each slice."""
    slices = [name for name in ("split", *bound.behavior.slices) if rows[name].n_unique() > 1]
    found: list[tuple[Any, ...]] = []
    for name in [*names, "cf_logit_diff"]:
        values = rows[_COLUMN.get(name, name)].cast(pl.Float64).to_numpy()
        for slice_name in (ALL, *(slices if name != "cf_logit_diff" else ())):
            keys = np.array([ALL] * rows.height) if slice_name == ALL else rows[slice_name].to_numpy()
            for key in sorted(set(keys)):
                part = values[keys == key]
                part = part[~np.isnan(part)]
                if len(part):
                    summary = interval(part, share=name in SHARES, seed=seed)
                    found.append((name, slice_name, str(key), *summary, len(part)))
    return pl.DataFrame(found, schema=_METRICS_SCHEMA, orient="row")


def _chance(bound: Bound) -> float | None:
    """The accuracy of a guess among the first tokens of answers and foils, over the pairs that have foils."""
    right = torch.cat([(group.answers >= 0).sum(-1) for group in bound.groups])
    wrong = torch.cat([(group.foils >= 0).sum(-1) for group in bound.groups])
    there = wrong > 0
    return float((right[there] / (right + wrong)[there]).mean()) if bool(there.any()) else None


make_verb(__name__, evaluate)

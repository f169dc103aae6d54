"""Repeated data: what a few sequences seen over and over do to a model that sees fresh ones beside them."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.repeats import attention_on_random_tokens
from headwater.core.results import Provenance, Result, register_result
from headwater.dynamics.lab.config import RepeatConfig, TrainConfig
from headwater.dynamics.lab.run import TrainingRun
from headwater.dynamics.lab.sources import batch_of
from headwater.dynamics.lab.training import train

_TRIED = 256  # repeated sequences whose loss is measured
_RUNS: dict[str, Any] = {
    "share": pl.Float64, "sequences": pl.Int64, "repeats": pl.Float64, "seed": pl.Int64, "measure": pl.String,
    "value": pl.Float64,
}  # fmt: skip
_POINTS: dict[str, Any] = {
    "share": pl.Float64, "sequences": pl.Int64, "repeats": pl.Float64, "measure": pl.String, "value": pl.Float64,
    "lo": pl.Float64, "hi": pl.Float64, "n": pl.Int64,
}  # fmt: skip


@register_result
class RepeatedData(Result):
    """Models trained with a share of repeated sequences.

    `tables["points"]`: share (of the samples that are repeats; 0: none), sequences (how many are repeated), repeats
    (how often each was seen, in the mean), measure, value (mean over seeds), lo, hi (least and greatest of the seeds),
    n (seeds). Measures, at the last step: loss and accuracy of each validation (`validation loss`: fresh data),
    `repeated loss` (of the repeated sequences themselves), `induction` and `previous token`: the most that any head
    attends to the token after an earlier occurrence, and to the token before, on random tokens said twice.
    `tables["runs"]`: each seed's. Facts: steps, seeds, worst (see `bumps`).
    """

    kind: ClassVar[str] = "repeated_data"
    main: ClassVar[str | None] = "points"


def repeated(
    config: TrainConfig,
    out: str | Path,
    *,
    shares: Sequence[float] = (0.5,),
    sequences: Sequence[int] = (8, 64, 512),
    seeds: Sequence[int] = (0, 1, 2),
    source: int = 0,
) -> RepeatedData:
    """Train a config once without repeats and once for each share and number of repeated sequences, for each seed
    (Hernandez et al., 2022): all see as many samples, and of `share` of them only so many different ones.

    source: which source of the config is repeated; it must hold more sequences than are repeated. Runs lie in `out`
    and are gone on with: killed, the same call goes on.

    Known failure: with few repeats of many sequences "repeated" is all but fresh, with many of few it is learned by
    heart at little cost; what harms lies between, and a coarse grid can step over it.
    """
    started = time.monotonic()
    if not 0 <= source < len(config.data) or not config.validation:
        raise MethodError("repeats are judged on fresh data", got="no such source, or no validation", wanted="both")
    if not shares or not sequences or not seeds:
        raise MethodError("nothing to train", wanted="a share, a number of sequences and a seed or more")
    for share, n in itertools.product(shares, sequences):
        RepeatConfig(share=share, sequences=n)  # what does not fit is refused before anything is trained
    rows: list[list[Any]] = []
    cells = [(0.0, 0), *itertools.product(shares, sequences)]
    for (share, n), seed in track(list(itertools.product(cells, seeds)), "repeated data"):
        run = train(_settings(config, share, n, seed, source), Path(out) / f"share-{share:g}-of-{n}-seed-{seed}")
        repeats = _repeats(run, source) if n else 0.0
        rows += [[share, n, repeats, seed, name, value] for name, value in _measured(run, source)]
    runs = pl.DataFrame(rows, schema=_RUNS, orient="row")
    by = ("share", "sequences", "measure")
    points = runs.group_by(*by, maintain_order=True).agg(
        pl.col("repeats").mean(), pl.col("value").mean(), pl.col("value").min().alias("lo"),
        pl.col("value").max().alias("hi"), pl.len().cast(pl.Int64).alias("n"),
    )  # fmt: skip
    points = points.select(list(_POINTS))
    return RepeatedData(
        tables={"points": points, "runs": runs},
        facts={"steps": config.steps, "seeds": list(seeds), "worst": bumps(points)},
        config={"shares": list(shares), "sequences": list(sequences), "seeds": list(seeds), "run": config.to_dict()},
        provenance=Provenance.collect(seconds=time.monotonic() - started),
    )


def bumps(points: pl.DataFrame, measure: str | None = None) -> list[dict[str, Any]]:
    """For each share where the loss on fresh data is worst, and whether that is a bump: double descent in the repeats.

    A row a share: share, repeats and sequences of the worst point, value, without (no repeats), above_fewer and
    above_more (how far it lies above the points of fewest and of most repeats; None where it is that point), bump: it
    lies between them, and its least seed above their greatest (None of a single seed).
    """
    losses = [name for name in points["measure"].unique(maintain_order=True) if name.endswith(" loss")]
    name = measure or losses[0]
    own = points.filter(pl.col("measure") == name)
    plain = own.filter(pl.col("share") == 0)
    found: list[dict[str, Any]] = []
    for share in own.filter(pl.col("share") > 0)["share"].unique(maintain_order=True).to_list():
        mine = own.filter(pl.col("share") == share).sort("repeats").to_dicts()
        worst = max(mine, key=lambda row: row["value"])
        ends = mine[0], mine[-1]
        inside = worst is not ends[0] and worst is not ends[1]
        found.append({
            "share": share, "measure": name, "repeats": worst["repeats"], "sequences": worst["sequences"],
            "value": worst["value"], "without": plain["value"][0] if plain.height else None,
            "above_fewer": worst["value"] - ends[0]["value"] if worst is not ends[0] else None,
            "above_more": worst["value"] - ends[1]["value"] if worst is not ends[1] else None,
            "bump": inside and all(worst["lo"] > end["hi"] for end in ends) if worst["n"] > 1 else None,
        })  # fmt: skip
    return found


def _settings(config: TrainConfig, share: float, n: int, seed: int, source: int) -> TrainConfig:
    repeat = RepeatConfig(share=share, sequences=n) if n else None
    data = [
        dataclasses.replace(one, repeat=repeat) if number == source else one for number, one in enumerate(config.data)
    ]
    return dataclasses.replace(config, data=tuple(data), seed=seed)


def _repeats(run: TrainingRun, source: int) -> float:
    part = _part(run, source)
    streams = run.data.order.stream_of(np.arange(run.order.n_sequences, dtype=np.int64))
    return float((streams == part).sum()) / run.data.order.streams[part].n


def _part(run: TrainingRun, source: int) -> int:
    """The number of the stream that holds the repeated sequences: the first part of the source."""
    streams = run.data.order.streams
    return next(i for i, one in enumerate(streams) if one.source == source and one.part and one.part[0] == 0)


def _measured(run: TrainingRun, source: int) -> list[tuple[str, float]]:
    rows: list[tuple[str, float]] = []
    table = run.result.tables["validation"]
    for row in table.filter(pl.col("step") == run.config.steps).iter_rows(named=True):
        rows += [(f"{row['name']} loss", row["loss"]), (f"{row['name']} accuracy", row["accuracy"])]
    model = run.load()
    if run.config.data[source].repeat is not None:
        rows.append(("repeated loss", _loss_of_repeated(run, model.hf, source)))
    heads = attention_on_random_tokens(model, seed=run.config.seed)
    return [
        *rows,
        ("induction", float(heads["induction"].max())),
        ("previous token", float(heads["previous_token"].max())),
    ]


def _loss_of_repeated(run: TrainingRun, hf: Any, source: int) -> float:
    order, part = run.data.order, _part(run, source)
    numbers = np.arange(run.order.n_sequences, dtype=np.int64)
    seen = np.unique(order.at(numbers[order.stream_of(numbers) == part])[1])[:_TRIED]
    ids = torch.from_numpy(batch_of(run.data.sources[source], seen))
    at = torch.from_numpy(run.data.loss_at[source][1:])
    with torch.no_grad():
        logits = hf(input_ids=ids[:, :-1], use_cache=False).logits[:, at]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:][:, at].flatten()))

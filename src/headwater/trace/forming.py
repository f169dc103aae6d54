"""The timeline stage: when the behavior and its circuit formed.

Every checkpoint is measured twice over: by the measures of `headwater.dynamics` (each with its transitions), and pair
by pair, which is what the claims' tests resample. Between which steps something formed is found on the train pairs and
judged on the test pairs.
"""

import hashlib
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result
from headwater.dynamics.formation import Formation, curves, windows
from headwater.localize.circuit import Circuit
from headwater.localize.comparing.heads import metric_values
from headwater.localize.judging.faithfulness import evaluate_masks

if TYPE_CHECKING:
    from headwater.core.model import Model
    from headwater.trace.history import History
    from headwater.trace.stages import Work


def timeline(work: "Work") -> dict[str, Result]:
    """The measures over the checkpoints, and the formation of behavior and circuit, pair by pair."""
    from headwater.dynamics.timeline import track

    settings, history, seed = work.settings.timeline, work.history, work.seed("timeline")
    parts = work.folder("timeline") / "parts"
    where = str((work.run.path / "stages" / "circuit" / "circuit").resolve())
    # the measure names the circuit's folder: a run that was moved begins this stage anew
    place = parts / f"track-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
    asked = list(settings.measures)
    test = work.test(settings.n)
    pairs = Behavior(
        pl.concat([work.train(settings.n).frame, test.frame]), name=work.behavior.name, metric=work.behavior.metric
    )
    made = track(
        history.series,
        behavior=pairs if "circuit" in asked else test,
        out=place,
        load=dict(work.settings.load),
        measures=tuple(asked),
        settings={"circuit": {"given": where}} if "circuit" in asked else {},
        sequences=settings.sequences,
        length=settings.length,
        draws=settings.draws,
        seed=seed,
    )
    told = made.config.get("settings", {})
    if "circuit" in told:  # a run tells nothing of where it lies
        told["circuit"] = {**told["circuit"], "given": "stages/circuit/circuit"}
    found = formation(work, history, pairs, parts / "pairs")
    return {"timeline": made, "formation": found}


def formation(work: "Work", history: "History", pairs: Behavior, folder: Any) -> Formation:
    """Behavior and circuit at each checkpoint, pair by pair."""
    settings, metric = work.settings.timeline, pairs.metric
    circuit = work.circuit
    about = {"pairs": pairs.hash, "circuit": circuit.content_hash, "metric": metric}
    kept = history.measured(
        folder, "following behavior and circuit", lambda model: at_checkpoint(model, pairs, circuit, metric), about
    )
    ids, splits = pairs.frame["id"].to_list(), pairs.frame["split"].to_list()
    tables = [
        pl.DataFrame({
            "step": [step] * len(ids), "id": ids, "split": splits, "whole": values["whole"].tolist(),
            "part": values["part"].tolist(), "known": values["known"].bool().tolist(),
        })
        for step, values in sorted(kept.items())
    ]  # fmt: skip
    result = Formation(
        tables={"pairs": pl.concat(tables)},
        facts={"metric": metric, "steps": sorted(kept), "share": settings.share},
        config={"share": settings.share, "n": settings.n},
        provenance=Provenance.collect(work.model, pairs, seed=work.settings.seed),
    )
    result.tables["curves"] = curves(result, seed=work.seed("formation"))
    result.tables["windows"] = windows(result, settings.share)
    return result


def at_checkpoint(model: "Model", pairs: Behavior, circuit: Circuit, metric: str) -> dict[str, Tensor]:
    """whole, part [n] (see `Formation`), and known [n] of one checkpoint, in the order of the pairs."""
    bound = pairs.bind(model)
    order = torch.tensor([row for group in bound.groups for row in group.rows])
    if len(order) != pairs.n:
        raise MethodError(
            "a checkpoint's tokenizer is another than the model's", got=f"{len(order)} of {pairs.n} pairs align",
            fix="Give the checkpoints of this model",
        )  # fmt: skip
    ranks = metric_values(model, bound, metric="rank")
    clean, corrupt = (metric_values(model, bound, metric=metric, side=side) for side in ("clean", "corrupt"))
    whole = clean - corrupt
    try:
        values = evaluate_masks(model, pairs, [circuit.mask.to(torch.bool)], metric=metric, label="circuit")
        part, rows = values.circuits[0] - values.empty, torch.tensor(values.rows)
    except MethodError:  # prompt and counterfactual come to the same: there is nothing to be a part of
        part, rows = torch.zeros_like(whole), order
    out = {name: torch.empty(pairs.n, dtype=torch.float64) for name in ("whole", "part", "known")}
    out["whole"][order], out["known"][order] = whole.double(), (ranks == 0).double()
    out["part"][rows] = part.double()
    return out

"""Latent knowledge: what the stream still holds of an answer that is no longer said."""

from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.act.action import Action
from headwater.core.errors import MethodError
from headwater.core.interventions import replace

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_LENS = {"layer": pl.Int64, "accuracy": pl.Float64, "n": pl.Int64}
_PROBE = {"layer": pl.Int64, "known": pl.Float64, "accuracy": pl.Float64, "n": pl.Int64}
Side = Literal["answers", "foils"]


def lens(model: "Model", action: Action, behavior: "Behavior", *, side: Side = "answers") -> pl.DataFrame:
    """layer, accuracy, n: the share of the pairs (of both splits) whose old answer beats the other side, read from the
    stream after each layer through the model's own last norm and unembedding (the logit lens; nostalgebraist, 2020).

    side: which side the old answer is. Known failure: early layers do not speak the unembedding's language, so that
    what they hold may not show.
    """
    bound = behavior.bind(model)
    sites = [f"resid_post.{layer}" for layer in range(model.n_layers)]
    right = torch.zeros(model.n_layers)
    with action.edited(model) as rest:
        for group in bound.groups:
            run = model.run(
                group.clean, capture=sites, logits="none", interventions=rest.interventions, positions=group.positions
            )
            ours, theirs = (group.answers, group.foils) if side == "answers" else (group.foils, group.answers)
            for layer, site in enumerate(sites):
                # Put in place of the last layer's, so that whatever stands after it is the model's own.
                said = model.run(group.clean, logits="last", interventions=[replace(sites[-1], run[site])]).logits
                right[layer] += (_best(said, ours) > _best(said, theirs)).sum().cpu()
    rows = [{"layer": layer, "accuracy": float(value) / bound.n, "n": bound.n} for layer, value in enumerate(right)]
    return pl.DataFrame(rows, schema=_LENS, orient="row")


def probe(
    model: "Model",
    action: Action,
    behavior: "Behavior",
    known: "Behavior",
    *,
    side: Side = "answers",
    layers: tuple[int, ...] | None = None,
    penalty: float = 1.0,
) -> pl.DataFrame:
    """layer, known, accuracy, n: whether a linear probe still tells the old answer from the other side.

    Each prompt is read with its old answer and with a wrong one after it. The probe (ridge regression of the difference
    at the last token, after each layer) is fitted on pairs of `known`, facts that were to stay, with their answers and
    foils; `known` is how often it is right on those of them that it was not fitted on (one in three), `accuracy` on
    those of `behavior`. Layers: eight at most, evenly. Chance is a half.

    Known failure: a probe that is right may read what the answer *is like* (how usual a word is) rather than that it is
    true; on facts that were never known it should be at chance.
    """
    chosen = layers if layers is not None else tuple(sorted({round(i * (model.n_layers - 1) / 7) for i in range(8)}))
    with action.edited(model) as rest:
        ours = _differences(model, rest, behavior.bind(model), side, chosen)
        theirs = _differences(model, rest, known.bind(model), "answers", chosen)
    rows: list[dict[str, Any]] = []
    for layer in chosen:
        held = torch.arange(len(theirs[layer])) % 3 == 2
        if int(held.sum()) < 1 or int((~held).sum()) < 2:
            raise MethodError("a probe needs facts that are known", got=len(theirs[layer]), wanted="at least 3")
        weights = _ridge(theirs[layer][~held], penalty)
        told = {"known": _right(theirs[layer][held], weights), "accuracy": _right(ours[layer], weights)}
        rows.append({"layer": layer, **told, "n": len(ours[layer])})
    return pl.DataFrame(rows, schema=_PROBE, orient="row")


def most(table: pl.DataFrame) -> float:
    """The accuracy at the layer that is best: of a probe, where it is best on what is known."""
    by = "known" if "known" in table.columns else "accuracy"
    return float(table.sort(by, descending=True, maintain_order=True)["accuracy"][0])


def _differences(
    model: "Model", action: Action, bound: "Bound", side: Side, layers: tuple[int, ...]
) -> dict[int, Tensor]:
    """layer -> [pairs, D] float64: the last token's stream with the one side's answer, minus that with the other's."""
    sites = [f"resid_post.{layer}@-1" for layer in layers]
    other = "foils" if side == "answers" else "answers"
    held: dict[str, dict[int, Tensor]] = {}
    rows = bound.frame.to_dicts()
    for name in (side, other):
        texts = [row["prompt"] + row[name][0] for row in rows]
        run = model.run(texts, capture=sites, logits="none", interventions=action.interventions)
        held[name] = {
            layer: torch.stack(list(run[site])).double().cpu() for layer, site in zip(layers, sites, strict=True)
        }
    return {layer: held[side][layer] - held[other][layer] for layer in layers}


def _ridge(differences_ND: Tensor, penalty: float) -> Tensor:
    """[D]: weights by which every difference is told as +1, in units of how far each number spreads."""
    scale = differences_ND.square().mean(0).sqrt().clamp(min=1e-9)
    x_ND = differences_ND / scale
    # n is far smaller than D: the dual form.
    gram_NN = x_ND @ x_ND.T + penalty * len(x_ND) * torch.eye(len(x_ND), dtype=x_ND.dtype)
    return x_ND.T @ torch.linalg.solve(gram_NN, torch.ones(len(x_ND), dtype=x_ND.dtype)) / scale


def _right(differences_ND: Tensor, weights_D: Tensor) -> float:
    return float((differences_ND @ weights_D > 0).double().mean())


def _best(logits: Tensor, ids: Tensor) -> Tensor:
    ids = ids.to(logits.device)
    return logits.float().gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf")).amax(-1)

"""Relearning: how fast what was changed comes back when a few of the old answers are trained on again."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from headwater.act.action import Action
from headwater.act.edit import Edit
from headwater.act.measuring import NOTHING, main_metric, score
from headwater.act.training.examples import unwanted
from headwater.act.training.finetune import Answering, TrainingConfig
from headwater.act.training.fitting import fit
from headwater.act.training.weights import weights_of
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_SCHEMA = {"step": pl.Int64, "part": pl.String, "accuracy": pl.Float64, "metric": pl.Float64, "n": pl.Int64}


def relearn(
    model: "Model",
    action: Action,
    behavior: "Behavior",
    *,
    steps: Sequence[int] = (2, 5, 10),
    share: float = 0.4,
    lr: float = 2e-5,
    batch: int = 8,
    seed: int = 0,
) -> pl.DataFrame:
    """An attack on an action: train all weights on the old answers of a share of its pairs, and ask for the others.

    Gives step (0 is before the attack), part ("trained" on again, or "held": never), accuracy (the share of pairs whose
    answer beats its foils), metric (its mean), n. The pairs are those of the training split; the old side is the one
    that the action's goal is against. After Lynch et al. (2024). Raises MethodError for fewer than two pairs, or an
    action that changes no weights: there is nothing to attack.

    Known failure: facts that were never known are learned as well; compare with the model that was never changed.
    """
    if action.edit is None:
        raise MethodError(f"{action.name!r} changes no weights, so that none can be trained back")
    train = behavior.train
    if train.n < 2:
        raise MethodError("relearning needs pairs to train on and others to ask for", got=train.n, wanted="2 or more")
    if not steps or min(steps) < 1:
        raise MethodError("relearning takes at least one step", got=list(steps))
    first = max(1, min(train.n - 1, round(share * train.n)))
    parts = {"trained": train[list(range(first))], "held": train[list(range(first, train.n))]}
    bound = {name: part.bind(model) for name, part in parts.items()}
    judged = main_metric(behavior)
    rows: list[dict[str, object]] = []

    def ask(step: int) -> None:
        for name, one in bound.items():
            found = score(model, one, NOTHING, dict.fromkeys(("accuracy", judged)))
            told = {"accuracy": found["accuracy"].mean(), "metric": found[judged].mean(), "n": found.height}
            rows.append({"step": step, "part": name, **told})

    last = max(steps)
    used = TrainingConfig(steps=last, batch=batch, lr=lr, until=0.0, seed=seed)
    with dataclasses.replace(action, interventions=()).on(model):
        ask(0)
        old = unwanted(model, parts["trained"], action.goal, part=True)
        weights = weights_of(model, "all")
        found = fit(
            model, weights, Answering(old, [], used, model.device), steps=last, lr=lr, keep_at=sorted(set(steps)),
            label="relearning",
        )  # fmt: skip
        for step in sorted(set(steps)):
            if found.snapshots[step]:
                with Edit.of(model, f"relearned for {step}", found.snapshots[step]).applied(model):
                    ask(step)
    return pl.DataFrame(rows, schema=_SCHEMA, orient="row")

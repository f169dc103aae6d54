"""Representation reading: the axis along which prompts and counterfactuals differ most."""

from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.steering.choosing import SteerConfig, Task, adding, steered
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@methods.register("pca")
def pca(model: "Model", behavior: "Behavior", *, config: SteerConfig | None = None, **options: Any) -> Action:
    """Add the first principal component of the pairs' differences (Zou et al., 2023): representation reading.

    Each pair's difference at the last token is taken one way or the other in turn, so that their mean is about zero and
    the component is the axis of largest difference; the labels say only which end is up. It is as long as the mean
    difference along it. Options are those of `SteerConfig`. Known failure: the axis of largest difference may be one
    that has nothing to do with the behavior (the topic, the length of a name), while the behavior's is a small one.
    """
    used = configured(SteerConfig, config, options)
    task = Task.of(model, behavior, used.sites, used.goal, used.n, used.seed)
    candidates = []
    for goal in task.goals:
        for site, (wanted, unwanted) in task.read(goal).items():
            vector, share = component(wanted - unwanted)
            candidates.append(adding(task, goal, site, vector, used.where, explained=share))
    return steered(task, candidates, used, method="pca", how="steer by the first component at")


def component(differences_ND: torch.Tensor) -> tuple[torch.Tensor, float]:
    """[D]: the first principal component of differences taken in turn one way and the other, as long as their mean
    along it and pointing with them; and the share of the variance that it explains."""
    turns = torch.ones(len(differences_ND), 1, dtype=differences_ND.dtype)
    turns[1::2] = -1.0
    mixed = differences_ND * turns
    _, sizes, rows = torch.linalg.svd(mixed - mixed.mean(0), full_matrices=False)
    total = float(sizes.square().sum())
    along = float((differences_ND @ rows[0]).mean())
    return along * rows[0], float(sizes[0].square()) / total if total else 0.0

"""Affine concept editing: the component along a direction is set, not moved."""

from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.steering.choosing import Candidate, SteerConfig, Task, random_like, steered
from headwater.core.interventions import Intervention, clamp
from headwater.core.methods import configured
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@methods.register("affine")
def affine(model: "Model", behavior: "Behavior", *, config: SteerConfig | None = None, **options: Any) -> Action:
    """Set the stream's component along the difference in means (Marshall et al., 2024): affine concept editing.

    Strength 0 sets it to what it is on average for counterfactuals, 1 to that for prompts, so that where a stream
    stands already it is left, whichever prompt it comes from. Options are those of `SteerConfig`. Known failure: what
    the component said beside the behavior is lost too, as every prompt gets the same value.
    """
    used = configured(SteerConfig, config, options)
    task = Task.of(model, behavior, used.sites, used.goal, used.n, used.seed)
    candidates = []
    for goal in task.goals:
        for site, (wanted, unwanted) in task.read(goal).items():
            candidates.append(_setting(task, site, used, goal, wanted.mean(0), unwanted.mean(0)))
    return steered(task, candidates, used, method="affine", how="set the component at")


def _setting(
    task: Task, site: Site, used: SteerConfig, goal: Any, wanted_D: torch.Tensor, unwanted_D: torch.Tensor
) -> Candidate:
    def along(direction_D: torch.Tensor, strength: float) -> tuple[Intervention, ...]:
        unit = direction_D / direction_D.norm()
        low, high = float(unwanted_D @ unit), float(wanted_D @ unit)
        level = low + strength * (high - low)
        return (clamp(site, low=level, high=level, direction=unit.to(task.model.dtype), positions=used.where),)

    difference = wanted_D - unwanted_D
    return Candidate(
        goal=goal,
        site=site,
        make=lambda strength: along(difference, strength),
        random=lambda strength, seed: along(random_like(difference, seed), strength),
        norm=float(difference.norm()),
    )

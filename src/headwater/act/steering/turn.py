"""Angle-preserving steering: the stream turns toward a direction and keeps its length."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.steering.choosing import Candidate, SteerConfig, Task, random_like, steered
from headwater.core.interventions import Intervention
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn(Intervention):
    """x turned by `scale` degrees toward the direction `value` [width], never past it, its norm kept."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        direction = torch.as_tensor(self.value).to(device=x.device, dtype=x.dtype)
        direction = direction / direction.norm()
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / norm.clamp(min=torch.finfo(x.dtype).tiny)
        along = (unit * direction).sum(-1, keepdim=True)
        across = direction - along * unit
        size = across.norm(dim=-1, keepdim=True)
        angle = torch.atan2(size, along).clamp(max=torch.pi * self.scale / 180)
        turned = unit * angle.cos() + across / size.clamp(min=torch.finfo(x.dtype).eps) * angle.sin()
        # On the direction, or against it, there is no plane to turn in.
        return torch.where(size > torch.finfo(x.dtype).eps, norm * turned, x)


@dataclass(frozen=True, kw_only=True)
class TurnConfig(SteerConfig):
    """Options of `SteerConfig`; `strengths` are degrees."""

    strengths: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0)


@methods.register("turn")
def turn(model: "Model", behavior: "Behavior", *, config: TurnConfig | None = None, **options: Any) -> Action:
    """Turn the stream toward the difference in means and keep its norm (after Vu and Nguyen, 2025): angular steering.

    Each token's vector turns in the plane that it spans with the direction, by at most the given degrees and never past
    the direction; its authors turn the part in one plane, the same for all tokens, to a given angle. Options are those
    of `TurnConfig`. Known failure: at large angles the stream's own content turns away with it, and vectors that point
    away from the direction lose more of it than those that are near.
    """
    used = configured(TurnConfig, config, options)
    task = Task.of(model, behavior, used.sites, used.goal, used.n, used.seed)
    candidates = []
    for goal in task.goals:
        for site, (wanted, unwanted) in task.read(goal).items():
            difference = (wanted.mean(0) - unwanted.mean(0)).to(model.dtype)

            def make(degrees: float, vector: torch.Tensor = difference, at: Any = site) -> tuple[Intervention, ...]:
                return (Turn(site=at, op="add", value=vector, scale=degrees, positions=used.where),)

            def random(
                degrees: float, seed: int, vector: torch.Tensor = difference, at: Any = site
            ) -> tuple[Intervention, ...]:
                return make(degrees, random_like(vector, seed), at)

            candidates.append(Candidate(goal=goal, site=site, make=make, random=random))
    return steered(task, candidates, used, method="turn", how="turn", unit=" degrees")

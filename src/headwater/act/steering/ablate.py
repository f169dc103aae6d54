"""Directional ablation: nothing that writes to the stream may write along a direction."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.steering.choosing import Candidate, Place, SteerConfig, Task, random_like, steered
from headwater.core.interventions import Intervention, project_out
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_WRITERS = ("embed", "attn_out", "mlp_out", "mixer_out")


@dataclass(frozen=True, kw_only=True)
class AblateConfig(SteerConfig):
    """Options of `SteerConfig`; the goal is "lower" unless told otherwise, and nothing is scaled: `strengths` is 1."""

    goal: str | None = "lower"
    strengths: tuple[float, ...] = (1.0,)
    positions: Place = "all"


@methods.register("ablate")
def ablate(model: "Model", behavior: "Behavior", *, config: AblateConfig | None = None, **options: Any) -> Action:
    """Take the difference in means out of all that is written to the stream (Arditi et al., 2024).

    The direction is that of one site; its part is projected out of the embedding and of each attention's and MLP's
    write, at every token but the first. `orthogonalize` does the same to the weights. Options are those of
    `AblateConfig`. Known failure: the direction is taken out for all that the model does, and where a behavior has
    several directions the others do its work.
    """
    used = configured(AblateConfig, config, options)
    task = Task.of(model, behavior, used.sites, used.goal, used.n, used.seed)
    written = [str(site) for kind in _WRITERS for site in model.sites() if site.kind == kind and not site.stack]
    written = written or [str(site) for site in model.sites() if site.kind in _WRITERS]

    def out_of_all(direction_D: torch.Tensor) -> tuple[Intervention, ...]:
        unit = (direction_D / direction_D.norm()).to(model.dtype)
        return tuple(project_out(site, unit, positions=used.where) for site in written)

    candidates = []
    for goal in task.goals:
        for site, (wanted, unwanted) in task.read(goal).items():
            difference = wanted.mean(0) - unwanted.mean(0)
            candidates.append(
                Candidate(
                    goal=goal,
                    site=site,
                    make=lambda _, found=difference: out_of_all(found),
                    random=lambda _, seed, found=difference: out_of_all(random_like(found, seed)),
                    norm=float(difference.norm()),
                )
            )
    values = model.d_model * len(written)
    return steered(task, candidates, used, method="ablate", how="ablate the direction of", values=values)

"""Probe directions: what a logistic probe reads is written."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import minimize

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.steering.choosing import SteerConfig, Task, adding, steered
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(SteerConfig):
    """Options of `SteerConfig`, and penalty: how strongly large weights are held back (of standardized values)."""

    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty <= 0:
            raise MethodError("a probe needs a penalty above 0", got=self.penalty)


@methods.register("probe")
def probe(model: "Model", behavior: "Behavior", *, config: ProbeConfig | None = None, **options: Any) -> Action:
    """Add the direction by which a logistic probe tells prompts from counterfactuals (Li et al., 2023).

    The probe reads the last token at a site; its direction is as long as the mean difference along it. Options are
    those of `ProbeConfig`. Known failure: what a probe can read need not be what the model uses: with more dimensions
    than prompts it separates anything, and directions that predict well often steer worse than difference in means.
    """
    used = configured(ProbeConfig, config, options)
    task = Task.of(model, behavior, used.sites, used.goal, used.n, used.seed)
    candidates = []
    for goal in task.goals:
        for site, (wanted, unwanted) in task.read(goal).items():
            direction = logistic(wanted, unwanted, used.penalty)
            unit = direction / direction.norm()
            apart = (wanted @ unit).mean() - (unwanted @ unit).mean()
            right = float((wanted @ unit > (unwanted @ unit)).double().mean())
            candidates.append(adding(task, goal, site, apart * unit, used.where, pairs_told_apart=right))
    return steered(task, candidates, used, method="probe", how="steer by a probe at")


def logistic(wanted_ND: torch.Tensor, unwanted_ND: torch.Tensor, penalty: float) -> torch.Tensor:
    """[D]: the weights of a logistic regression, with an intercept, of standardized values, in the values' own units.

    They minimize the summed log loss plus penalty / 2 times their squared length. Raises MethodError where the values
    do not differ.
    """
    both = torch.cat([wanted_ND, unwanted_ND]).double()
    scale = both.std(0)
    if not bool((scale > 0).any()):
        raise MethodError("prompts and counterfactuals are the same here", fix="Choose another site")
    scale = torch.where(scale > 0, scale, 1.0)
    x = ((both - both.mean(0)) / scale).numpy()
    y = np.repeat([1.0, -1.0], [len(wanted_ND), len(unwanted_ND)])

    def loss(weights: Any) -> tuple[float, Any]:
        margin = y * (x @ weights[:-1] + weights[-1])
        slope = -y / (1 + np.exp(np.clip(margin, -500, 500)))
        value = np.logaddexp(0, -margin).sum() + penalty / 2 * (weights[:-1] ** 2).sum()
        return float(value), np.append(x.T @ slope + penalty * weights[:-1], slope.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return torch.from_numpy(found.x[:-1]) / scale

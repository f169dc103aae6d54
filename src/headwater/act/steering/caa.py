"""Difference in means: add what tells prompts from counterfactuals to the stream (contrastive activation addition)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.steering.choosing import SteerConfig, Task, adding, steered
from headwater.core.methods import configured
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@methods.register("caa")
def caa(model: "Model", behavior: "Behavior", *, config: SteerConfig | None = None, **options: Any) -> Action:
    """Add the difference of two means to the stream (Rimsky et al., 2023): contrastive activation addition.

    `steer`, with the options of `SteerConfig`; strengths are multiples of the difference. Known failure: the
    difference holds everything in which prompts and counterfactuals differ, whether or not the model uses it, and a
    vector that shifts a metric on average may leave, or harm, many single prompts.
    """
    used = configured(SteerConfig, config, options)
    return steer(
        model,
        behavior,
        used.sites,
        goal=used.goal,
        strengths=used.strengths,
        positions=used.where,
        max_perplexity=used.max_perplexity,
        n=used.n,
        seed=used.seed,
    )


def steer(
    model: "Model",
    behavior: "Behavior",
    sites: str | Site | Sequence[str | Site] | None = None,
    *,
    goal: str | Goal | None = None,
    strengths: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    positions: Any = slice(-1, None),
    max_perplexity: float = 1.5,
    n: int = 24,
    seed: int = 0,
) -> Action:
    """The steering vector that best serves `goal` on held-out training pairs.

    The vector at a site is the mean over training pairs of its value at the last token of the prompt minus that of the
    counterfactual; for a goal "column=value" pairs of the other value count the other way round, so that what tells
    the two apart is left (for IOI: which of the two names comes first). It is added, times a strength, at `positions`:
    from the prompt's last token on, through all that is generated, unless told otherwise.

    sites: where to try; None means `resid_post` at four depths.
    goal: "raise", "lower", "column=value", or None: raise, or toward a value of any column with two values, whichever
        one vector moves most.
    strengths: multiples of the difference. Of those that gain most on at most `n` validation pairs (a third of the
        training pairs, not used for the means) the first is taken whose perplexity on plain text, steered at every
        token, grows by a factor of at most `max_perplexity`. `Action.sweep` lists what was tried.

    The random version adds a random direction of the same length at the same place.

    Method: difference in means, as in Marks and Tegmark (2023) and Rimsky et al. (2023). Raises MethodError for too few
    pairs; SiteError for sites that this model lacks.
    """
    # Sites and positions may be more here than a config can hold.
    config = SteerConfig(strengths=tuple(map(float, strengths)), max_perplexity=max_perplexity, n=n, seed=seed)
    task = Task.of(model, behavior, sites, goal, n, seed)
    vectors = _differences(task)
    candidates = [
        adding(task, goal, site, vectors[goal, site], positions) for goal in task.goals for site in task.places
    ]
    where = f"{positions.start}:{positions.stop or ''}" if isinstance(positions, slice) else str(positions)
    return steered(
        task, candidates, config, method="caa", how="steer", positions=where, random_name="add a random direction"
    )


def _differences(task: Task) -> dict[tuple[Goal, Site], torch.Tensor]:
    """[width] for each goal and site: the mean signed difference, clean minus counterfactual, at the last token."""
    model, bound, places = task.model, task.fit, task.places
    ends = [site.at(-1) for site in places]
    signs = {goal: task.signs(goal) for goal in task.goals}
    total: dict[tuple[Goal, Site], Any] = {}
    for group in bound.groups:
        clean = model.run(group.clean, capture=ends, logits="none")
        corrupt = model.run(group.corrupt, capture=ends, logits="none")
        for site, end in zip(places, ends, strict=True):
            difference_BD = (clean[end].double() - corrupt[end].double()).cpu()
            for goal in task.goals:
                part = (signs[goal][group.rows].view(-1, *[1] * (difference_BD.ndim - 1)) * difference_BD).sum(0)
                total[goal, site] = total.get((goal, site), 0.0) + part
    return {key: (value / bound.n).to(model.dtype) for key, value in total.items()}

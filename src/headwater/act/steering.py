"""Steering: add the difference of two means to the stream, where and as strongly as works on held-out pairs."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from headwater.act.action import Action, Goal, column_of
from headwater.act.measuring import NOTHING, main_metric, plain_texts, score, text_loss
from headwater.core.errors import MethodError
from headwater.core.interventions import add
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_SCHEMA = {
    "goal": pl.String,
    "site": pl.String,
    "strength": pl.Float64,
    "norm": pl.Float64,
    "before": pl.Float64,
    "after": pl.Float64,
    "perplexity_ratio": pl.Float64,
    "chosen": pl.Boolean,
}


@dataclass(frozen=True, kw_only=True)
class _Try:
    goal: Goal
    site: Site
    strength: float
    before: float
    after: float

    @property
    def gain(self) -> float:
        return self.after - self.before


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
    places = _places(model, sites)
    goals = _goals(behavior, goal)
    fit, held = _parts(behavior, n, seed)
    fit_bound, held_bound = fit.bind(model), held.bind(model)
    vectors = _differences(model, fit_bound, places, goals)
    name = main_metric(behavior)
    passes = 2 * fit_bound.n + held_bound.n

    def judge(found: pl.DataFrame, goal: Goal) -> float:
        frame = held_bound.behavior.frame.join(found, on="id", how="inner", maintain_order="left")
        return float(np.mean(goal.signs(frame) * frame[name].to_numpy()))

    unchanged = score(model, held_bound, NOTHING, [name])

    def attempt(goal: Goal, site: Site, strength: float) -> _Try:
        action = _action(model, site, vectors[goal, site], strength, goal, positions)
        after = judge(score(model, held_bound, action, [name]), goal)
        return _Try(goal=goal, site=site, strength=strength, before=judge(unchanged, goal), after=after)

    middle = sorted(strengths)[len(strengths) // 2]
    coarse = [attempt(goal, site, middle) for goal in goals for site in places]
    best = sorted(coarse, key=lambda one: -one.gain)[:2]
    tried = coarse + [attempt(one.goal, one.site, s) for one in best for s in strengths if s != middle]
    ranked = sorted(tried, key=lambda one: -one.gain)
    chosen, ratios = _bearable(model, ranked, vectors, positions, max_perplexity)
    passes += len(tried) * held_bound.n
    rows = [
        {
            "goal": str(one.goal),
            "site": str(one.site),
            "strength": one.strength,
            "norm": float(one.strength * vectors[one.goal, one.site].norm()),
            "before": one.before,
            "after": one.after,
            "perplexity_ratio": ratios.get(id(one)),
            "chosen": one is chosen,
        }
        for one in tried
    ]
    vector = vectors[chosen.goal, chosen.site]
    action = _action(model, chosen.site, vector, chosen.strength, chosen.goal, positions)
    config = {
        **action.config,
        "validation": {"before": chosen.before, "after": chosen.after, "pairs": held_bound.n},
        "perplexity_ratio": ratios[id(chosen)],
        "seed": seed,
    }

    def control(other: int) -> Action:
        draw = torch.randn(vector.shape, generator=torch.Generator().manual_seed(other), dtype=torch.float64)
        direction = (draw / draw.norm()).to(vector) * vector.norm()
        made = _action(model, chosen.site, direction, chosen.strength, chosen.goal, positions)
        return dataclasses.replace(made, name=f"add a random direction at {chosen.site}")

    return dataclasses.replace(
        action, passes=passes, control=control, config=config, sweep=pl.DataFrame(rows, schema=_SCHEMA, orient="row")
    )


def _action(model: "Model", site: Site, vector: torch.Tensor, strength: float, goal: Goal, positions: Any) -> Action:
    where = f"{positions.start}:{positions.stop or ''}" if isinstance(positions, slice) else str(positions)
    return Action(
        name=f"steer {site} by {strength:g}" + (f" toward {goal}" if goal.direction == "toward" else ""),
        interventions=(add(site, vector, scale=strength, positions=positions),),
        goal=goal,
        values=model.d_model,
        config={
            "action": "steer",
            "site": str(site),
            "strength": strength,
            "norm": float(vector.norm()),
            "goal": str(goal),
            "positions": where,
        },
    )


def _places(model: "Model", sites: str | Site | Sequence[str | Site] | None) -> list[Site]:
    if sites is None:
        layers = sorted({round(model.n_layers * part) for part in (1 / 3, 1 / 2, 2 / 3, 5 / 6)})
        sites = [f"resid_post.{min(layer, model.n_layers - 1)}" for layer in layers]
    some = [sites] if isinstance(sites, str | Site) else list(sites)
    found = list(dict.fromkeys(site for pattern in some for site in model.resolve(pattern)))
    if not found:
        raise MethodError("no site to steer at", wanted="at least one, such as resid_post.10")
    if wrong := [site for site in found if site.pos is not None or site.kind in ("pattern", "scores")]:
        raise MethodError(
            "cannot steer there", got=str(wrong[0]), fix="Name a stream or output site, without @position"
        )
    return found


def _goals(behavior: "Behavior", goal: str | Goal | None) -> list[Goal]:
    if goal is not None:
        wanted = Goal.parse(goal)
        wanted.signs(behavior.frame)  # an unknown column or value is named now
        return [wanted]
    columns = dict.fromkeys(behavior.slices)
    return [Goal()] + [
        Goal(direction="toward", column=column, value=min(values))
        for column in columns
        if len(values := set(column_of(behavior.train.frame, column))) == 2
    ]


def _parts(behavior: "Behavior", n: int, seed: int) -> tuple["Behavior", "Behavior"]:
    """Two thirds of the training pairs for the means, and at most `n` of the others to choose on."""
    train = behavior.train
    if train.n < 3:
        raise MethodError("too few training pairs to steer by", got=train.n, wanted="at least 3")
    order = np.random.default_rng(seed).permutation(train.n)
    held = max(1, min(n, train.n // 3))
    return train[sorted(order[held:].tolist())], train[sorted(order[:held].tolist())]


def _differences(
    model: "Model", bound: "Bound", places: list[Site], goals: list[Goal]
) -> dict[tuple[Goal, Site], torch.Tensor]:
    """[width] for each goal and site: the mean signed difference, clean minus counterfactual, at the last token."""
    ends = [site.at(-1) for site in places]
    signs = {goal: torch.as_tensor(goal.signs(bound.behavior.frame)) for goal in goals}
    total: dict[tuple[Goal, Site], Any] = {}
    for group in bound.groups:
        clean = model.run(group.clean, capture=ends, logits="none")
        corrupt = model.run(group.corrupt, capture=ends, logits="none")
        for site, end in zip(places, ends, strict=True):
            difference_BD = (clean[end].double() - corrupt[end].double()).cpu()
            for goal in goals:
                part = (signs[goal][group.rows].view(-1, *[1] * (difference_BD.ndim - 1)) * difference_BD).sum(0)
                total[goal, site] = total.get((goal, site), 0.0) + part
    return {key: (value / bound.n).to(model.dtype) for key, value in total.items()}


def _bearable(
    model: "Model",
    ranked: list[_Try],
    vectors: dict[tuple[Goal, Site], torch.Tensor],
    positions: Any,
    limit: float,
) -> tuple[_Try, dict[int, float]]:
    """The first that leaves plain text readable, and the perplexity ratios that were measured; else the mildest."""
    texts = plain_texts()[:4]
    before = text_loss(model, texts, NOTHING, tokens=48).mean()
    ratios: dict[int, float] = {}
    for one in ranked:
        action = _action(model, one.site, vectors[one.goal, one.site], one.strength, one.goal, positions)
        ratios[id(one)] = float(np.exp(min(50.0, text_loss(model, texts, action, tokens=48).mean() - before)))
        if ratios[id(one)] <= limit:
            return one, ratios
    return min(ranked, key=lambda one: ratios[id(one)]), ratios

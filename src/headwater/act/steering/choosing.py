"""Where and how strongly to steer: chosen on training pairs that no direction was found on, never on test pairs."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import torch

from headwater.act.action import Action, Goal, column_of
from headwater.act.measuring import NOTHING, lacks_words, main_metric, plain_texts, score, text_loss
from headwater.core.errors import MethodError
from headwater.core.interventions import Intervention, add
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
Place = Literal["end", "all", "prompt", "decode"]
# "all" leaves the first token alone: models park attention on it, its values are far out of line.
_PLACES: dict[str, Any] = {"end": slice(-1, None), "all": slice(1, None), "prompt": "prompt", "decode": "decode"}


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """How a strength is chosen.

    goal: "raise", "lower", "column=value", or None: raise, or toward a value of any column with two values. strengths:
    what is tried. max_perplexity: of those that gain most, the first is taken whose perplexity on plain text (or on the
    held prompts, where the tokenizer lacks its words), changed at every token, grows by at most this factor. n:
    validation pairs at most (a third of the training pairs).
    """

    goal: str | None = None
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    max_perplexity: float = 1.5
    n: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strengths:
            raise MethodError("no strength to try", wanted="at least one")
        if self.n < 1:
            raise MethodError("a strength is chosen on validation pairs", got=self.n, wanted="at least 1")


@dataclass(frozen=True, kw_only=True)
class SteerConfig(ChoiceConfig):
    """Options of `ChoiceConfig`, and where a steering method looks.

    sites: where to try; None means `resid_post` at four depths. positions: "end" (from the prompt's last token on,
    through all that is generated), "all" (tokens but the first), "prompt", or "decode" (generated tokens).
    """

    sites: tuple[str, ...] | str | None = None
    positions: Place = "end"

    @property
    def where(self) -> Any:
        """The positions, as interventions take them."""
        return _PLACES[self.positions]


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One thing to try at several strengths.

    make: the interventions, or the edit of weights, of a strength. random: the same at random, of a strength and a
    seed. norm: the length of what strength 1 adds, where that is a vector. facts: what else there is to say of it, as
    plain data.
    """

    goal: Goal
    site: Site
    make: Callable[[float], Any]
    random: Callable[[float, int], Any] | None = None
    norm: float = float("nan")
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """The training pairs of a behavior, parted: those that directions are found on, and those to choose by."""

    model: "Model"
    fit: "Bound"
    held: "Bound"
    metric: str
    places: list[Site]
    goals: list[Goal]

    @staticmethod
    def of(
        model: "Model",
        behavior: "Behavior",
        sites: str | Site | Sequence[str | Site] | None,
        goal: str | Goal | None,
        n: int,
        seed: int,
    ) -> "Task":
        """Raises MethodError for too few pairs or an unknown goal, SiteError for sites that this model lacks."""
        places, goals = _places(model, sites), _goals(behavior, goal)
        fit, held = _parts(behavior, n, seed)
        return Task(
            model=model,
            fit=fit.bind(model),
            held=held.bind(model),
            metric=main_metric(behavior),
            places=places,
            goals=goals,
        )

    def signs(self, goal: Goal) -> torch.Tensor:
        """+1 where the metric of a pair that directions are found on should rise, -1 where it should fall."""
        return torch.as_tensor(goal.signs(self.fit.behavior.frame, part=True))

    def read(self, goal: Goal) -> "dict[Site, tuple[torch.Tensor, torch.Tensor]]":
        """(wanted, unwanted), each [pairs, width] float64, at each place: what it holds at the last token of the
        prompt and of the counterfactual, exchanged where the metric should fall."""
        ends = {site: site.at(-1) for site in self.places}
        signs = self.signs(goal)
        found: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in self.fit.groups:
            clean = self.model.run(group.clean, capture=list(ends.values()), logits="none")
            corrupt = self.model.run(group.corrupt, capture=list(ends.values()), logits="none")
            flip = (signs[group.rows] < 0)[:, None]
            for site, end in ends.items():
                one, other = clean[end].double().cpu(), corrupt[end].double().cpu()
                if one.ndim != 2:
                    fix = f"Name a head, such as {site}.h0"
                    raise MethodError("a direction is found where a token holds one vector", got=str(site), fix=fix)
                before = found.get(site)
                made = torch.where(flip, other, one), torch.where(flip, one, other)
                found[site] = (
                    made if before is None else (torch.cat([before[0], made[0]]), torch.cat([before[1], made[1]]))
                )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Try:
    candidate: Candidate
    strength: float
    before: float
    after: float

    @property
    def gain(self) -> float:
        """Below all others where the model no longer gives numbers."""
        gain = self.after - self.before
        return gain if np.isfinite(gain) else -np.inf


def choose(
    task: Task,
    candidates: Sequence[Candidate],
    strengths: Sequence[float],
    *,
    action: Callable[[Candidate, float, Any], Action],
    random_name: str,
    max_perplexity: float,
    passes: int,
    seed: int,
) -> Action:
    """The candidate and strength that gain most on the held pairs and leave plain text readable, as an action.

    All candidates are tried at the middle strength, the two best at all. `action` names what is chosen. Raises
    MethodError where there is no strength, or none that leaves finite logits.
    """
    if not strengths:
        raise MethodError("no strength to try", wanted="at least one")
    model, held, name = task.model, task.held, task.metric
    unchanged = score(model, held, NOTHING, [name])

    def judge(found: pl.DataFrame, goal: Goal) -> float:
        frame = held.behavior.frame.join(found, on="id", how="inner", maintain_order="left")
        return float(np.mean(goal.signs(frame, part=True) * frame[name].to_numpy()))

    def attempt(one: Candidate, strength: float) -> _Try:
        tried = action(one, strength, one.make(strength))
        after = judge(score(model, held, tried, [name]), one.goal)
        return _Try(candidate=one, strength=strength, before=judge(unchanged, one.goal), after=after)

    middle = sorted(strengths)[len(strengths) // 2]
    coarse = [attempt(one, middle) for one in candidates]
    best = sorted(coarse, key=lambda one: -one.gain)[:2]
    tried = coarse + [attempt(one.candidate, s) for one in best for s in strengths if s != middle]
    ranked = sorted(tried, key=lambda one: -one.gain)
    ranked = [one for one in ranked if np.isfinite(one.gain)]
    if not ranked:
        raise MethodError("every strength leaves the model without finite logits", got=strengths, fix="Take smaller")
    chosen, ratios = _bearable(task, ranked, action, max_perplexity)
    rows = [
        {
            "goal": str(one.candidate.goal),
            "site": str(one.candidate.site),
            "strength": one.strength,
            "norm": one.strength * one.candidate.norm,
            "before": one.before,
            "after": one.after,
            "perplexity_ratio": ratios.get(id(one)),
            "chosen": one is chosen,
        }
        for one in tried
    ]
    what, strength = chosen.candidate, chosen.strength
    made = action(what, strength, what.make(strength))
    config = {
        **made.config,
        **what.facts,
        "validation": {"before": chosen.before, "after": chosen.after, "pairs": held.n},
        "perplexity_ratio": ratios[id(chosen)],
        "seed": seed,
    }

    draw = what.random

    def control(other: int) -> Action:
        random = action(what, strength, draw(strength, other) if draw is not None else ())
        return dataclasses.replace(random, name=f"{random_name} at {what.site}")

    return dataclasses.replace(
        made,
        passes=passes + held.n + len(tried) * held.n,
        control=control if draw is not None else None,
        at=lambda other: action(what, other, what.make(other)),
        config=config,
        sweep=pl.DataFrame(rows, schema=_SCHEMA, orient="row"),
    )


def steered(
    task: Task,
    candidates: Sequence[Candidate],
    config: SteerConfig,
    *,
    method: str,
    how: str,
    unit: str = "",
    values: int | None = None,
    positions: str = "",
    random_name: str = "",
) -> Action:
    """`choose`, for a method of this room: its action is called `<how> <site> by <strength><unit>`. positions: in
    words, where they are not the config's."""

    def action(what: Candidate, strength: float, interventions: tuple[Intervention, ...]) -> Action:
        toward = f" toward {what.goal}" if what.goal.direction == "toward" else ""
        facts: dict[str, Any] = {"action": "steer", "method": method, "site": str(what.site), "strength": strength}
        if not np.isnan(what.norm):
            facts["norm"] = what.norm
        return Action(
            name=f"{how} {what.site} by {strength:g}{unit}{toward}",
            interventions=interventions,
            goal=what.goal,
            values=task.model.d_model if values is None else values,
            config=facts | {"goal": str(what.goal), "positions": positions or config.positions},
        )

    return choose(
        task,
        candidates,
        config.strengths,
        action=action,
        random_name=random_name or f"{method} with a random direction",
        max_perplexity=config.max_perplexity,
        passes=2 * task.fit.n,
        seed=config.seed,
    )


def adding(task: Task, goal: Goal, site: Site, vector: torch.Tensor, positions: Any, **facts: Any) -> Candidate:
    """A candidate that adds a vector [width], times the strength; at random, another direction of the same length."""
    vector = vector.to(task.model.dtype)

    def make(strength: float) -> tuple[Intervention, ...]:
        return (add(site, vector, scale=strength, positions=positions),)

    def random(strength: float, seed: int) -> tuple[Intervention, ...]:
        return (add(site, random_like(vector, seed), scale=strength, positions=positions),)

    return Candidate(goal=goal, site=site, make=make, random=random, norm=float(vector.norm()), facts=facts)


def random_like(vector: torch.Tensor, seed: int) -> torch.Tensor:
    """A random direction of the same length."""
    draw = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draw / draw.norm()).to(vector) * vector.norm()


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
    """Two thirds of the training pairs to find directions on, and at most `n` of the others to choose on."""
    train = behavior.train
    if train.n < 3:
        raise MethodError("too few training pairs to steer by", got=train.n, wanted="at least 3")
    order = np.random.default_rng(seed).permutation(train.n)
    held = max(1, min(n, train.n // 3))
    return train[sorted(order[held:].tolist())], train[sorted(order[:held].tolist())]


def _bearable(
    task: Task,
    ranked: list[_Try],
    action: Callable[[Candidate, float, Any], Action],
    limit: float,
) -> tuple[_Try, dict[int, float]]:
    """The first that leaves plain text readable, and the perplexity ratios that were measured; else the mildest.

    Where the tokenizer lacks words of plain text (as those of the lab do), the held prompts are the text.
    """
    model = task.model
    texts = [text for text in plain_texts()[:4] if not lacks_words(model, text)] or task.held.behavior.prompts[:8]
    before = text_loss(model, texts, NOTHING, tokens=48).mean()
    ratios: dict[int, float] = {}
    for one in ranked:
        made = action(one.candidate, one.strength, one.candidate.make(one.strength))
        grown = float(text_loss(model, texts, made, tokens=48).mean() - before)
        ratios[id(one)] = float(np.exp(min(50.0, grown))) if np.isfinite(grown) else float("inf")
        if ratios[id(one)] <= limit:
            return one, ratios
    return min(ranked, key=lambda one: ratios[id(one)]), ratios

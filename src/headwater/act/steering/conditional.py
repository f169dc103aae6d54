"""Conditional steering: a vector is added only to prompts on which a condition holds."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.steering.choosing import Candidate, SteerConfig, Task, random_like, steered
from headwater.behavior import make as make_behavior
from headwater.core.errors import MethodError
from headwater.core.interventions import Intervention
from headwater.core.methods import configured
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


class Gate:
    """What a condition said of the prompts that are running: handed from where it is read to where it is used."""

    def __init__(self) -> None:
        self.open: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch(Intervention):
    """Leaves x as it is, and opens `gate` where its component along `value` [width] is above `low`."""

    gate: Gate = field(default_factory=Gate)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        direction = torch.as_tensor(self.value).to(device=x.device, dtype=x.dtype)
        said = x @ direction > (self.low if self.low is not None else 0.0)
        self.gate.open = said if said.ndim == 2 else said[:, None]
        return x


@dataclass(frozen=True, kw_only=True, eq=False)
class Gated(Intervention):
    """x + scale * value where `gate` is open: token by token, or for whole prompts where their last token decided."""

    gate: Gate = field(default_factory=Gate)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        opened = self.gate.open
        if opened is None:
            raise MethodError(f"{self} was reached before its condition was read", fix="Read it at an earlier layer")
        moved = self.scale * torch.as_tensor(self.value).to(device=x.device, dtype=x.dtype)
        opened = opened.to(x.device)
        if len(opened) != len(x):  # beams, and several continuations of a prompt, are rows that follow one another
            opened = opened.repeat_interleave(max(1, len(x) // len(opened)), 0)
        if x.ndim == 2:
            return x + opened[:, -1:] * moved
        if opened.shape[1] != x.shape[1]:
            opened = opened[:, -1:]
        return x + opened[..., None] * moved


@dataclass(frozen=True, kw_only=True)
class CastConfig(SteerConfig):
    """Options of `SteerConfig`, and what the condition is: prompts of this behavior (of `when`, "column=value", those
    of that value) and not those of the behaviors in `apart_from`, or of the other values. read_at: where it is read
    (None: `resid_post` at a third of the depth, or the site that is steered if that is earlier)."""

    when: str | None = None
    apart_from: tuple[str, ...] = ("agreement", "greater_than")
    read_at: str | None = None


@methods.register("cast")
def cast(model: "Model", behavior: "Behavior", *, config: CastConfig | None = None, **options: Any) -> Action:
    """Add the difference in means only where a condition direction fires (Lee et al., 2025): conditional steering.

    The condition is the component of the stream at the prompt's last token along the difference of means between
    prompts on which to act and others, above the threshold that tells training prompts apart best. It is decided once a
    prompt and holds while it is continued; over plain text it is decided token by token. Options are those of
    `CastConfig`. Known failure: prompts unlike both sorts that the condition was fitted on open the gate by chance.
    """
    used = configured(CastConfig, config, options)
    task = Task.of(model, behavior, used.sites, used.goal, used.n, used.seed)
    layer = max(0, round(model.n_layers / 3) - 1)
    read_at = _read_at(task, used.read_at or f"resid_post.{min([layer, *(int(s.layer or 0) for s in task.places)])}")
    yes, no = _prompts(task, behavior, used, read_at)
    direction, threshold, right = condition(yes, no)
    fitted = direction.to(model.dtype), threshold, right
    candidates = []
    for goal in task.goals:
        for site, (wanted, unwanted) in task.read(goal).items():
            difference = (wanted.mean(0) - unwanted.mean(0)).to(model.dtype)
            candidates.append(_gated(goal, site, difference, used, read_at, fitted))
    return steered(task, candidates, used, method="cast", how="steer where the condition holds at")


def condition(yes_ND: torch.Tensor, no_ND: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """(unit direction [D], threshold, balanced accuracy): the difference of means, and the threshold along it that
    tells both sorts apart best, in the middle of its gap."""
    difference = yes_ND.mean(0) - no_ND.mean(0)
    if not float(difference.norm()) > 0:
        raise MethodError("the condition tells nothing apart", fix="Choose another when=, apart_from= or read_at=")
    unit = difference / difference.norm()
    inside, outside = yes_ND @ unit, no_ND @ unit
    levels = torch.cat([inside, outside]).sort().values
    cuts = (levels[1:] + levels[:-1]) / 2
    scores = torch.stack([((inside > cut).double().mean() + (outside <= cut).double().mean()) / 2 for cut in cuts])
    best = (scores == scores.max()).nonzero().flatten()
    chosen = int(best[len(best) // 2])
    return unit, float(cuts[chosen]), float(scores[chosen])


def _gated(
    goal: Goal,
    site: Site,
    vector: torch.Tensor,
    used: CastConfig,
    read_at: Site,
    fitted: tuple[torch.Tensor, float, float],
) -> Candidate:
    direction, threshold, right = fitted

    def build(strength: float, added: torch.Tensor) -> tuple[Intervention, ...]:
        gate = Gate()
        watch = Watch(site=read_at, op="add", value=direction, low=threshold, positions=-1, gate=gate)
        return watch, Gated(site=site, op="add", value=added, scale=strength, positions=used.where, gate=gate)

    return Candidate(
        goal=goal,
        site=site,
        make=lambda strength: build(strength, vector),
        random=lambda strength, seed: build(strength, random_like(vector, seed)),
        norm=float(vector.norm()),
        facts={"condition": {"read_at": str(read_at), "threshold": threshold, "balanced_accuracy": right}},
    )


def _read_at(task: Task, text: str) -> Site:
    sites = task.model.resolve(text)
    late = [str(site) for site in task.places if int(site.layer or 0) < int(sites[0].layer or 0)]
    if len(sites) != 1 or sites[0].pos is not None:
        raise MethodError("a condition is read at one site, without @position", got=text)
    if late:
        raise MethodError("a condition is read before it is used", got=f"{text}, and steering at {late[0]}")
    return sites[0]


def _prompts(task: Task, behavior: "Behavior", used: CastConfig, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Streams [prompts, D] at the last token of prompts on which to act, and of others."""
    model = task.model

    def read(texts: list[str]) -> torch.Tensor:
        run = model.run(texts, capture=[site.at(-1)], logits="none")[site.at(-1)]
        stacked = run if isinstance(run, torch.Tensor) else torch.stack(list(run))
        return stacked.double().cpu()

    mine = task.fit.behavior
    if used.when is not None:
        signs = Goal.parse(used.when).signs(mine.frame)
        acts = [text for text, sign in zip(mine.prompts, signs, strict=True) if sign > 0]
        rests = [text for text, sign in zip(mine.prompts, signs, strict=True) if sign < 0]
        if not rests:
            raise MethodError("the condition holds for every pair", got=used.when, fix="Name a column with two values")
        return read(acts), read(rests)
    others = [name for name in used.apart_from if name != behavior.name]
    if not others:
        raise MethodError("a condition needs prompts on which not to act", fix="Give when= or apart_from=")
    n = max(2, mine.n // len(others))
    apart = [text for name in others for text in make_behavior(name, n=2 * n, seed=used.seed).train.prompts[:n]]
    return read(mine.prompts), read(apart)

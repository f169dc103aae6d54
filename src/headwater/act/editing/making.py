"""From changes of weights to an Action, with its strength chosen where a method has one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwater.act.action import Action, Goal
from headwater.act.edit import Delta, Edit
from headwater.act.steering.choosing import Candidate, ChoiceConfig, Task, choose
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class EditConfig(ChoiceConfig):
    """Options of `ChoiceConfig`: how an edit's strength is chosen."""

    goal: str = "raise"
    strengths: tuple[float, ...] = (1.0,)


def as_action(model: "Model", name: str, deltas: Sequence[Delta], goal: Goal, passes: int, **config: Any) -> Action:
    """An action of these changes; at random, changes of the same places, ranks and norms."""
    edit = Edit.of(model, name, deltas, **config)

    def control(seed: int) -> Action:
        drawn = edit.at_random(seed)
        return Action(name=drawn.name, edit=drawn, goal=goal, config={"action": "edit", "of": name, "seed": seed})

    return Action(
        name=name, edit=edit, goal=goal, passes=passes, control=control, config={"action": "edit", **edit.config}
    )


def candidate(
    task: Task, goal: Goal, site: Site, name: str, make: Callable[[float], Sequence[Delta]], **facts: Any
) -> Candidate:
    """An edit to try at several strengths."""

    def edit(strength: float) -> Edit:
        return Edit.of(task.model, f"{name} x {strength:g}", make(strength), **facts)

    return Candidate(
        goal=goal,
        site=site,
        make=edit,
        random=lambda strength, seed: edit(strength).at_random(seed),
        facts=facts,
    )


def chosen(task: Task, candidates: Sequence[Candidate], config: EditConfig, *, method: str, passes: int) -> Action:
    """The candidate and strength that gain most on held training pairs."""

    def action(what: Candidate, strength: float, edit: Edit) -> Action:
        facts = {"action": "edit", "method": method, "site": str(what.site), "strength": strength}
        return Action(name=edit.name, edit=edit, goal=what.goal, config=facts | {"goal": str(what.goal)})

    return choose(
        task,
        candidates,
        config.strengths,
        action=action,
        random_name=f"{method} in random directions",
        max_perplexity=config.max_perplexity,
        passes=passes,
        seed=config.seed,
    )

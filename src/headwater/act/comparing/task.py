"""Task: what is to change in a model, in how many wordings, and what should stay."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headwater.act.action import Goal
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError, did_you_mean
from headwater.core.registry import Registry

if TYPE_CHECKING:
    from headwater.core.model import Model

ROLES = ("target", "paraphrase", "format", "neighbour")


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is to change, and what actions are judged by.

    behavior: its training pairs are all that methods may learn from; its test pairs are the target. goal: what should
    become of its metric. paraphrase: the same asked in other words. format: the same asked in another form. neighbour:
    what is alike and should stay; its answers are those of the model as it was. keep: pairs that methods may hold in
    place, none of which is measured. old: pairs, of the training split, on whose old answers an attack trains again.
    known: facts that were to stay, for probes. instructions: what a prompt may say. facts: what it is about, as plain
    data.
    """

    name: str
    behavior: Behavior
    goal: Goal = field(default_factory=Goal)
    paraphrase: Behavior | None = None
    format: Behavior | None = None
    neighbour: Behavior | None = None
    keep: Behavior | None = None
    old: Behavior | None = None
    known: Behavior | None = None
    instructions: tuple[str, ...] = ()
    facts: dict[str, object] = field(default_factory=dict)

    def measured(self) -> dict[str, Behavior]:
        """role -> pairs that it is measured on."""
        found = {
            "target": self.behavior.test,
            "paraphrase": self.paraphrase,
            "format": self.format,
            "neighbour": self.neighbour,
        }
        return {role: one for role, one in found.items() if one is not None}


Maker = Callable[..., Task]
"""maker(model, *, seed, **options) -> Task."""
_OWN = ("facts", "choices", "cues")
tasks: Registry[Maker] = Registry("task", own=[f"headwater.act.comparing.{module}" for module in _OWN])
"""Outside packages add theirs by the entry point group `headwater.tasks`."""


def of_behavior(behavior: Behavior, goal: str | Goal = "raise") -> Task:
    """A task of nothing but a behavior: train pairs to learn from, test pairs to be judged by."""
    return Task(name=behavior.name, behavior=behavior, goal=Goal.parse(goal))


def check_options(task: "str | Behavior | Task | Maker", options: dict[str, object]) -> None:
    """Raise MethodError for an option that the task does not have, or a name of none."""
    if isinstance(task, Task | Behavior):
        known = ["goal"] if isinstance(task, Behavior) else []
    else:
        parameters = inspect.signature(tasks.get(task) if isinstance(task, str) else task).parameters.values()
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return
        known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.name != "seed"]
    if wrong := [name for name in options if name not in known]:
        raise MethodError("a task has no such option", got=wrong[0], wanted=did_you_mean(wrong[0], known) or "none")


def make(model: "Model", task: "str | Behavior | Task | Maker", seed: int, options: dict[str, object]) -> Task:
    """The task of a name or maker for a seed; a Task or a Behavior is the same for every seed."""
    if isinstance(task, Task):
        return task
    if isinstance(task, Behavior):
        return of_behavior(task, str(options.get("goal", "raise")))
    return (tasks.get(task) if isinstance(task, str) else task)(model, seed=seed, **options)


def named(name: str, rows: Iterable[dict[str, object]]) -> Behavior | None:
    """A behavior of these rows; None where there are none."""
    held = list(rows)
    return Behavior.from_rows(held, name=name) if held else None

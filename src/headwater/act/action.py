"""Action: what is done to a model, what it is meant to achieve, what it costs, and the random version of it."""

import dataclasses
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.interventions import Intervention

if TYPE_CHECKING:
    from headwater.act.edit import Edit
    from headwater.core.model import Model

Direction = Literal["raise", "lower", "toward"]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What an action is meant to do to a behavior's metric.

    "raise" it, "lower" it, or move it "toward" one value of a column or variable of the behavior: up on the pairs that
    have that value, down on the others (`column="order", value="ABBA"`).
    """

    direction: Direction = "raise"
    column: str = ""
    value: str = ""

    @staticmethod
    def parse(text: "str | Goal") -> "Goal":
        """Read "raise", "lower" or "column=value"."""
        if isinstance(text, Goal):
            return text
        if text in ("raise", "lower"):
            return Goal(direction=text)
        column, equals, value = text.partition("=")
        if not equals or not column.strip():
            raise MethodError("cannot read a goal", got=repr(text), wanted="raise, lower, or column=value")
        return Goal(direction="toward", column=column.strip(), value=value.strip())

    def __str__(self) -> str:
        return f"{self.column} = {self.value}" if self.direction == "toward" else self.direction

    def signs(self, frame: pl.DataFrame, *, part: bool = False) -> NDArray[np.float64]:
        """+1 for each pair [n] whose metric should rise, -1 where it should fall. Raises MethodError for an unknown
        column, and for a value that no pair has; `part`: these are some of a behavior's pairs, so that none may."""
        if self.direction != "toward":
            return np.full(frame.height, 1.0 if self.direction == "raise" else -1.0)
        values = column_of(frame, self.column)
        if self.value not in values and not part:
            wanted = did_you_mean(self.value, set(values))
            raise MethodError(f"no pair has {self.column} = {self.value!r}", wanted=wanted)
        return np.where(np.asarray(values) == self.value, 1.0, -1.0)


def column_of(frame: pl.DataFrame, name: str) -> list[str]:
    """The values of a column, or of a key of `variables`, as texts. Raises MethodError for an unknown name."""
    if name in frame.columns and frame.schema[name] == pl.String:
        return frame[name].to_list()
    rows = [json.loads(text) for text in frame["variables"].to_list()]
    if not all(isinstance(row, dict) and name in row for row in rows):
        plain = [c for c in frame.columns if c not in ("id", "prompt", "counterfactual", "positions", "variables")]
        known = [*plain, *sorted({key for row in rows if isinstance(row, dict) for key in row})]
        raise MethodError(
            "unknown column or variable of the behavior", got=repr(name), wanted=did_you_mean(name, known)
        )
    return [row[name] if isinstance(row[name], str) else json.dumps(row[name]) for row in rows]


@dataclass(frozen=True, kw_only=True, eq=False)
class Action:
    """Something done to a model: to its activations while it runs, to its prompt, or to its weights. Nothing remains
    when it has ended.

    interventions: what happens inside; iterating an action gives them, so `model.intervene(*action)` works.
    prefix: text put before each prompt (the prompting baseline).
    edit: what is done to the weights. Such an action holds inside `with action.on(model):`.
    goal: what it should do to its behavior.
    values: how many activations it sets for each token.
    passes: how many prompts were run to find it. seconds: how long that took.
    control: from a seed, the same kind of action at random.
    at: from a strength, the same action that strongly, where it has one (`curves` asks for it).
    config: how it was made, as plain data.
    sweep: what was tried on the way, as a table.
    """

    name: str
    interventions: tuple[Intervention, ...] = ()
    prefix: str = ""
    edit: "Edit | None" = None
    goal: Goal = Goal()
    values: int = 0
    passes: int = 0
    seconds: float = 0.0
    control: "Callable[[int], Action] | None" = None
    at: "Callable[[float], Action] | None" = None
    config: dict[str, Any] = field(default_factory=dict)
    sweep: pl.DataFrame | None = None

    def __iter__(self) -> Iterator[Intervention]:
        if self.edit is not None:
            raise MethodError(f"{self.name!r} changes weights", fix="Use it as `with action.on(model):`")
        return iter(self.interventions)

    def __len__(self) -> int:
        return len(self.interventions)

    @contextmanager
    def on(self, model: "Model") -> Generator["Model"]:
        """Inside this block the action holds for `run`, `generate` and calls of the model itself: its edit is on the
        weights, its interventions are on. A prefix is the caller's to put before the prompt."""
        with self.edited(model), model.intervene(*self.interventions) if self.interventions else nullcontext():
            yield model

    @contextmanager
    def edited(self, model: "Model") -> Generator["Action"]:
        """Inside this block the edit is on the model's weights; gives what is left of the action to do while it
        runs."""
        with self.edit.applied(model) if self.edit is not None else nullcontext():
            yield dataclasses.replace(self, edit=None)

    def everywhere(self) -> "Action":
        """The same action on all tokens but the first: as if all of a text had been generated under it."""
        moved = tuple(
            dataclasses.replace(i, positions=slice(1, None), site=i.site.at(None)) for i in self.interventions
        )
        return dataclasses.replace(self, interventions=moved)


def short(names: list[str], shown: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")

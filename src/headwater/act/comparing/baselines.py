"""What stands in every comparison: nothing, prompting, few-shot examples, LoRA, and LoRA toward random targets."""

import dataclasses
import random
import time
from typing import TYPE_CHECKING, Any

from headwater.act.action import Action
from headwater.act.catalog import act
from headwater.act.comparing.task import Task
from headwater.act.prompting import prompt
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.core.model import Model

NOTHING, PROMPT, FEW_SHOT, LORA, RANDOM = "nothing", "prompt", "few-shot", "lora", "lora, random targets"
BASELINES = (PROMPT, FEW_SHOT, LORA)
ALWAYS = (NOTHING, *BASELINES, RANDOM)


def baseline(
    model: "Model", task: Task, name: str, budget: dict[str, Any], seed: int, shots: tuple[int, ...]
) -> Action:
    """One of `ALWAYS`, for a task. Raises MethodError where it cannot be made."""
    started = time.perf_counter()
    if name == NOTHING:
        return Action(name=NOTHING, goal=task.goal)
    if name == PROMPT:
        made = prompt(model, task.behavior, task.goal, shots=(), instructions=task.instructions or None, seed=seed)
    elif name == FEW_SHOT:
        made = prompt(model, task.behavior, task.goal, shots=shots, instructions=(), seed=seed)
    else:
        behavior = task.behavior if name == LORA else random_targets(task, seed)
        keep = {"keep": task.keep} if task.keep is not None else {}
        made = act("lora", model, behavior, goal=str(task.goal), seed=seed, **keep, **budget)
    return dataclasses.replace(made, name=name, seconds=time.perf_counter() - started)


def random_targets(task: Task, seed: int) -> Behavior:
    """What LoRA is trained on as a control: for a goal "lower" other facts (those of `known`), where the task has some;
    else the task's own prompts, each with an answer drawn from all answers and foils but the wanted one."""
    draw = random.Random(f"headwater-targets:{seed}")
    behavior = task.behavior.train
    if task.goal.direction == "lower" and task.known is not None:
        order = draw.sample(range(task.known.n), min(behavior.n, task.known.n))
        return task.known[sorted(order)]
    side = "foils" if task.goal.direction == "lower" else "answers"
    other = "answers" if side == "foils" else "foils"
    rows = behavior.frame.to_dicts()
    pool = sorted({text for row in rows for text in (*row["answers"], *row["foils"])})
    for row in rows:
        wanted = row[side]
        # Where there are more than two texts, the unwanted ones of the pair itself are no random target either.
        free = [text for text in pool if text not in (*wanted, *row[other])] or [x for x in pool if x not in wanted]
        if not free:
            raise MethodError("there is no other answer to draw as a random target", got=pool, fix="Give pairs foils")
        chosen = draw.choice(free)
        row[side], row[other] = [chosen], [text for text in (*row[other], *wanted) if text != chosen]
        row["alternatives"] = None
    return Behavior.from_rows(rows, name=behavior.name, metric=behavior.metric)

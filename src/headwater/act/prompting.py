"""The prompting baseline: what a few words before the prompt can do, chosen on training pairs like any other action."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from headwater.act.action import Action, Goal
from headwater.act.measuring import lacks_words, main_metric, score
from headwater.core.errors import BehaviorError, MethodError

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

INSTRUCTIONS = {
    "raise": ("Complete the following text correctly.\n\n", "The following text is well written and correct.\n\n"),
    "lower": ("Complete the following text incorrectly.\n\n", "The following text is full of mistakes.\n\n"),
    "toward": (),
}


def prompt(
    model: "Model",
    behavior: "Behavior",
    goal: str | Goal = "raise",
    *,
    shots: tuple[int, ...] = (1, 4),
    draws: int = 2,
    n: int = 16,
    seed: int = 0,
    instructions: Sequence[str] | None = None,
) -> Action:
    """The best of several prefixes at `goal`, chosen on at most `n` training pairs.

    Tried are two instructions (or those given) and, for each number of `shots`, `draws` random sets of other training
    pairs written out
    as examples: with their answers, with their foils where the metric should be lowered, or only those with the wanted
    value where the goal is "column=value". `Action.sweep` lists each prefix with its score: the mean of the metric,
    counted downwards where it should fall. Raises MethodError where no prefix can be made.
    """
    wanted = Goal.parse(goal)
    bound = behavior.train.bind(model)
    rows = list(range(bound.frame.height))
    random.Random(f"headwater-prompt:{seed}").shuffle(rows)
    judged, shown = rows[: max(1, min(n, len(rows) // 2))], rows[max(1, min(n, len(rows) // 2)) :]
    chosen = set(bound.frame["id"][judged].to_list())
    train = behavior.train
    judge = train[[row for row, id in enumerate(train.frame["id"].to_list()) if id in chosen]]
    told = INSTRUCTIONS[wanted.direction] if instructions is None else instructions
    candidates = [*told, *_examples(bound, shown, wanted, shots, draws, seed)]
    candidates = [prefix for prefix in candidates if not lacks_words(model, prefix)]
    if not candidates:
        raise MethodError("no prefix can be made", got=f"{len(rows)} training pairs", wanted="at least two")
    against = judge.bind(model)
    name = main_metric(behavior)
    tried = [_score(model, against, prefix, wanted, name) for prefix in candidates]
    if not np.isfinite(tried).any():
        raise MethodError("no prefix can be made", got=f"a context of {model.max_length} tokens", wanted="a longer one")
    best = candidates[int(np.argmax(np.where(np.isfinite(tried), tried, -np.inf)))]
    return Action(
        name=f"prompt {'toward ' if wanted.direction == 'toward' else 'to '}{wanted}: {_told(best)}",
        prefix=best,
        goal=wanted,
        passes=len(candidates) * len(judged),
        config={"action": "prompt", "prefix": best, "goal": str(wanted), "seed": seed},
        sweep=pl.DataFrame({"prefix": candidates, "score": tried}, schema={"prefix": pl.String, "score": pl.Float64}),
    )


def _told(prefix: str) -> str:
    """What a prefix is, in a few words; the text itself stands in the action's config."""
    if any(prefix in some for some in INSTRUCTIONS.values()):
        return prefix.strip()
    shots = prefix.count("\n")
    return f"{shots} example{'' if shots == 1 else 's'}"


def _score(model: "Model", bound: "Bound", prefix: str, goal: Goal, name: str) -> float:
    try:
        found = score(model, bound, Action(name="tried", prefix=prefix), [name])
    except BehaviorError:  # it leaves no room for any pair
        return float("-inf")
    frame = bound.behavior.frame.join(found, on="id", how="inner", maintain_order="left")
    return float(np.mean(goal.signs(frame, part=True) * frame[name].to_numpy())) if frame.height else float("-inf")


def _examples(bound: "Bound", rows: list[int], goal: Goal, shots: tuple[int, ...], draws: int, seed: int) -> list[str]:
    """Training pairs written out with what should come next."""
    frame = bound.frame[rows] if rows else bound.frame[:0]
    if goal.direction == "toward" and frame.height:
        has = [s > 0 for s in goal.signs(bound.frame, part=True)[rows]]
        frame = frame.filter(pl.Series(has))
    pairs = frame.to_dicts()
    draw = random.Random(f"headwater-shots:{seed}")
    made: list[str] = []
    for k in shots:
        for _ in range(draws if len(pairs) >= k else 0):
            some = draw.sample(pairs, k)
            ends = [pair["foils"] if goal.direction == "lower" else pair["answers"] for pair in some]
            if all(ends):
                lines = [pair["prompt"] + end[0] for pair, end in zip(some, ends, strict=True)]
                made.append("".join(f"{line}.\n" for line in lines))
    return list(dict.fromkeys(made))

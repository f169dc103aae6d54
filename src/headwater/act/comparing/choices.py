"""A task on multiple choice: the right option should be said wherever it stands."""

from typing import TYPE_CHECKING

import polars as pl

from headwater.act.comparing.task import Task, tasks
from headwater.behavior import make
from headwater.behavior.table import Behavior
from headwater.core.errors import MethodError

if TYPE_CHECKING:
    from headwater.core.model import Model

_LEARNED, _FORM = ("A-D", "1-4"), ("W-Z", "C-F")


@tasks.register("position_bias")
def position_bias(model: "Model", *, seed: int, n: int = 32, measured: int = 16, choices: int = 4) -> Task:
    """Multiple choice about a color that the question itself states; every place is right equally often.

    `n` training pairs in one wording, with the labels A-D and 1-4; target: `n` others in that wording; paraphrase: two
    other wordings; format: labels W-Z and C-F; neighbour: the same asked without options, where the color that the
    model says should stay right; `measured` pairs of each. Things differ between training and all that is measured.
    """
    if n < choices or measured < choices:
        raise MethodError("each place is right at least once", got=(n, measured), wanted=f"at least {choices}")
    total = 48 * choices * max(1, -(-max(n, 2 * measured) // (4 * choices)))
    made = make("colors", n=total, seed=seed, format="choice", choices=choices)
    frame = made.frame

    def some(split: str, templates: tuple[str, ...], labels: tuple[str, ...], count: int, name: str) -> Behavior:
        kept = frame.filter(
            (pl.col("split") == split) & pl.col("template").is_in(templates) & pl.col("labels").is_in(labels)
        )
        # places in turn, so that any number of them is balanced
        kept = kept.with_columns(turn=pl.int_range(pl.len()).over("place")).sort("turn", "place").drop("turn")
        return Behavior(kept.head(count), name=name, metric=made.metric, about=made.about)

    learn = some("train", ("choice-0",), _LEARNED, n, "position_bias")
    target = some("test", ("choice-0",), _LEARNED, n, "position_bias")
    plain = make("colors", n=4 * measured, seed=seed, format="cloze")
    return Task(
        name="position_bias",
        behavior=Behavior(pl.concat([learn.frame, target.frame]), name="position_bias", about=made.about),
        paraphrase=some("test", ("choice-1", "choice-2"), _LEARNED, measured, "position_bias reworded"),
        format=some("test", ("choice-0",), _FORM, measured, "position_bias with other labels"),
        neighbour=Behavior(plain.frame.head(measured), name="position_bias without options"),
        keep=Behavior(
            make("colors", n=4 * measured, seed=seed, format="cloze").train.frame.head(measured),
            name="position_bias kept",
        ),
        instructions=(
            "Answer each question with the letter of the right option.\n\n",
            "Read the statement and choose the option that says the same.\n\n",
        ),
    )

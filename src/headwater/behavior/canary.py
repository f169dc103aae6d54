"""The canary: does a model fail because it lacks the answer, or because it lacks the format of the question?

The same question is put as cloze and as multiple choice, and each of these also with the answer said in the prompt,
where it has only to be copied. Who fails the copying does not know the format, whatever else it knows.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from headwater.behavior._verb import make_verb
from headwater.behavior.bind import TokenTable, first_tokens, tokenizer_of
from headwater.behavior.generators import whole
from headwater.behavior.generators.colors import LABELS
from headwater.behavior.metrics import interval
from headwater.behavior.table import Behavior

if TYPE_CHECKING:
    from headwater.core.model import Model

SCHEMA = {
    "format": pl.String,
    "condition": pl.String,
    "accuracy": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.Int64,
    "chance": pl.Float64,
}
CLOZE, CHOICE = "cloze", "multiple choice"
ASKED, TOLD = "asked", "told"
_AT_ONCE = 256  # prompts whose logits are held at once


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One prompt with the texts that may come next, the right one first; `cells` are the conditions it is counted
    under."""

    format: str
    cells: tuple[str, ...]
    prompt: str
    options: tuple[str, ...]


def canary(
    model: "Model",
    behavior: Behavior,
    *,
    rows: int = 48,
    choices: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
) -> pl.DataFrame:
    """The same questions as cloze and as multiple choice, asked and told.

    Parameters
    ----------
    model: a headwater Model with its tokenizer.
    behavior: pairs with foils; pairs that are multiple choice already (column `format` is "choice") are left out.
    rows: how many pairs are asked, drawn with `seed`.
    choices: how many options there are at most; a pair has as many as it has foils, and its answer.
    batch_size: as in `Model.run`.

    Returns format, condition, accuracy, lo, hi (Wilson's 95% interval), n (prompts) and chance. `asked` is the
    question itself; `told` says the answer first. The label sets and the places of the right option are met in turn,
    and their accuracies follow, as `told, labels A-D` or `asked, right at 2`. An answer counts where its first token
    has the highest logit of all options'. The frame is empty where no pair has a multiple-choice form.
    """
    whole("rows", rows, 1, 1_000_000)
    whole("choices", choices, 2, 4)
    rng = random.Random(f"headwater-canary:{seed}")
    usable = [
        row for row in behavior.frame.to_dicts() if row["answers"] and row["foils"] and row.get("format") != "choice"
    ]
    chosen = rng.sample(usable, min(rows, len(usable)))
    questions = [question for index, row in enumerate(chosen) for question in _questions(index, row, choices, rng)]
    scored = _score(model, questions, batch_size)
    table: list[tuple[Any, ...]] = []
    for form in (CLOZE, CHOICE):
        cells = dict.fromkeys(
            cell for question, _right, _n in scored if question.format == form for cell in question.cells
        )
        for cell in sorted(cells, key=lambda cell: (cell.count(","), cell)):
            found = [(right, n) for question, right, n in scored if question.format == form and cell in question.cells]
            accuracy, low, high = interval([right for right, _n in found], share=True)
            chance = sum(1 / n for _right, n in found) / len(found)
            table.append((form, cell, accuracy, low, high, len(found), chance))
    return pl.DataFrame(table, schema=SCHEMA, orient="row")


def verdict(table: pl.DataFrame) -> dict[str, Any]:
    """What a canary says: `answer` and `format` (known: the interval lies above chance; None: not measured), and a
    sentence."""

    def above(form: str, condition: str) -> bool | None:
        row = table.filter((pl.col("format") == form) & (pl.col("condition") == condition))
        return bool(row["lo"][0] > row["chance"][0]) if row.height else None

    answer, format_known = above(CLOZE, ASKED), above(CHOICE, TOLD)
    if answer is None or format_known is None:
        sentence = "no pair of this behavior could be put as multiple choice"
    elif answer and format_known:
        sentence = "the model knows the answer, and the format of multiple choice"
    elif answer:
        sentence = (
            "the model knows the answer and not the format: it cannot pick an option even where the answer is said, so "
            "its multiple-choice accuracy says nothing about what it knows"
        )
    elif format_known:
        sentence = "the model knows the format of multiple choice and not the answer"
    else:
        sentence = "the model shows neither the answer nor the format of multiple choice"
    return {"answer": answer, "format": format_known, "verdict": sentence}


def _questions(index: int, row: dict[str, Any], choices: int, rng: random.Random) -> list[_Question]:
    """The four forms of one pair; labels and place go round with its index."""
    right, prompt = rng.choice(row["answers"]), row["prompt"]
    wrong = sorted({text for text in row["foils"] if text.strip() != right.strip()})
    options = (right, *rng.sample(wrong, min(choices - 1, len(wrong))))
    if len(options) < 2:
        return []
    sets = list(LABELS)
    labels, place = sets[index % len(sets)], index // len(sets) % len(options)
    order = list(options[1:])
    order.insert(place, right)
    letters = LABELS[labels][: len(options)]
    listed = "\n".join(f"({letter}) {text.strip()}" for letter, text in zip(letters, order, strict=True))
    choice = f"{prompt} ...\n{listed}\nAnswer: ("
    by_label = (letters[place], *(letter for at, letter in enumerate(letters) if at != place))
    told = f"The answer is {right.strip()}.\n"
    found: list[_Question] = []
    for condition, before in ((ASKED, ""), (TOLD, told)):
        cells = (condition, f"{condition}, labels {labels}", f"{condition}, right at {place + 1}")
        found.append(_Question(format=CLOZE, cells=(condition,), prompt=before + prompt, options=options))
        found.append(_Question(format=CHOICE, cells=cells, prompt=before + choice, options=by_label))
    return found


def _score(model: Any, questions: Sequence[_Question], batch_size: int | None) -> list[tuple[_Question, float, int]]:
    """(question, 1 or 0, number of options) for the questions whose options begin with tokens of their own."""
    tokenizer, limit = tokenizer_of(model)
    table = TokenTable(tokenizer)
    table.learn(text for q in questions for text in (q.prompt, *(q.prompt + option for option in q.options)))
    asked: list[tuple[_Question, list[int], list[int]]] = []
    for question in questions:
        ids = table.of(question.prompt)
        starts = first_tokens(question.prompt, ids, list(question.options), "options", table, [])
        # the right option must be there under its own token; a wrong one that begins like it cannot be told apart
        right = first_tokens(question.prompt, ids, [question.options[0]], "options", table, [])
        others = [token for token in starts if token not in right]
        if right and others and (limit is None or len(ids) <= limit):
            asked.append((question, ids, [*right, *others]))
    scored: list[tuple[_Question, float, int]] = []
    for start in range(0, len(asked), _AT_ONCE):
        part = asked[start : start + _AT_ONCE]
        logits = model.run([ids for _question, ids, _options in part], logits="last", batch_size=batch_size).logits
        for (question, _ids, options), row in zip(part, logits, strict=True):
            found = row[options].float()
            scored.append((question, float(bool(found[0] > found[1:].max())), len(options)))
    return scored


make_verb(__name__, canary)

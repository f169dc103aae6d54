"""What is wrong with a user's file of pairs, line by line, with the mend."""

import os
from collections.abc import Callable
from typing import Any

import polars as pl

from headwater.behavior import files
from headwater.behavior._verb import make_verb
from headwater.behavior.files import Problem, Rows

SCHEMA = {"line": pl.Int64, "column": pl.String, "problem": pl.String, "mend": pl.String, "level": pl.String}
_SPAN = '{"S2": [24, 28]}: first character and one past the last, counted from 0'
_ALTERNATIVE = '[{"counterfactual": "...", "foils": [" ..."]}]'


def check(path: str | os.PathLike[str], tokenizer: Any = None) -> pl.DataFrame:
    """A table of what is wrong with a CSV, JSONL or Parquet file of minimal pairs; no rows means nothing is.

    Parameters
    ----------
    path: the file.
    tokenizer: also say which pairs this tokenizer (or this headwater Model) cannot align, and why.

    Returns a frame with `line` (1-based as an editor counts, the row in Parquet, 0 for the file as a whole),
    `column`, `problem`, `mend` and `level` ("error": the file is refused; "warning": it loads, and probably says
    something else than meant), sorted by line. Raises BehaviorError where the file cannot be opened or parsed at
    all.
    """
    found = files.read_rows(path)
    problems = [*found.problems, *problems_in(found)]
    if tokenizer is not None:
        problems += _misaligned(found, {problem.line for problem in problems}, tokenizer)
    rows = [(problem.line, problem.column, problem.problem, problem.mend, problem.level) for problem in problems]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row").sort("line", maintain_order=True)


def problems_in(found: Rows) -> list[Problem]:
    """What is wrong with the rows themselves, given that their columns could be read."""
    problems: list[Problem] = []
    ids: dict[str, int] = {}
    pairs: dict[tuple[str, str], int] = {}
    absent = {problem.column for problem in found.problems}
    for line, row in found.rows:

        def trouble(column: str, problem: str, mend: str, level: str = "error", line: int = line) -> None:
            problems.append(Problem(line=line, column=column, problem=problem, mend=mend, level=level))

        prompt = _check_text(row, "prompt", absent, trouble)
        counterfactual = _check_text(row, "counterfactual", absent, trouble)
        _check_pair(prompt, counterfactual, trouble)
        _check_choices(row, prompt, absent, trouble)
        _check_spans(row, prompt, trouble)
        _check_json(row, trouble)
        if row.get("split") not in (None, "", "train", "test"):
            trouble("split", f"unknown split {row['split']!r}", "write train or test")
        if row.get("id") not in (None, ""):
            first = ids.setdefault(str(row["id"]), line)
            if first != line:
                trouble("id", f"the id {str(row['id'])!r} stands on line {first} already", "give each pair its own id")
        elif "id" in row and any(other.get("id") not in (None, "") for _line, other in found.rows):
            trouble("id", "this row has no id, others have", "give each pair an id, or leave the column out")
        if prompt and counterfactual:
            first = pairs.setdefault((prompt, counterfactual), line)
            if first != line:
                trouble(
                    "prompt", f"the same pair stands on line {first} already", "remove one: it counts twice", "warning"
                )
    return problems


Trouble = Callable[..., None]


def _check_text(row: dict[str, Any], column: str, absent: set[str], trouble: Trouble) -> str:
    if column in absent:
        return ""
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        trouble(column, f"the {column} is empty", "write the text that the model is to read")
        return ""
    if not isinstance(value, str):
        trouble(column, f"not a text: {value!r}", "write it in quotes")
        return ""
    return value


def _check_pair(prompt: str, counterfactual: str, trouble: Trouble) -> None:
    if prompt and prompt == counterfactual:
        trouble("counterfactual", "it is the prompt itself", "change the one thing that flips the answer")
    for column, text in (("prompt", prompt), ("counterfactual", counterfactual)):
        if text and text != text.rstrip():
            trouble(
                column,
                "it ends with a space or a line break",
                "move the space to the start of the answer: tokenizers join it to the next word",
                "warning",
            )


def _check_choices(row: dict[str, Any], prompt: str, absent: set[str], trouble: Trouble) -> None:
    lists: dict[str, list[str]] = {}
    for column, single in (("answers", "answer"), ("foils", "foil")):
        if column in absent:
            return
        texts = files.as_list(row.get(column))
        if texts is None:
            trouble(
                column,
                f"neither a text nor a list of texts: {row.get(column)!r}",
                f'write " Mary" in a column {single!r}, or [" Mary", " Ann"]',
            )
            return
        if column == "answers" and not texts:
            trouble(column, "no answer", "write the text that should come next, with its leading space")
        if any(not text.strip() for text in texts):
            trouble(column, f"an empty {single}", "remove it or write a text")
        if len(set(texts)) < len(texts):
            trouble(column, f"the same {single} twice", "keep one")
        lists[column] = texts
    same = [text for text in lists["answers"] if text in lists["foils"]]
    if same:
        trouble("foils", f"{same[0]!r} is an answer too", "a foil is what the model should not say")
    if not prompt:
        return
    # Latin letters only: many scripts write no spaces
    glued = [text for text in (*lists["answers"], *lists["foils"]) if _joins(prompt[-1], text[:1])]
    if glued:
        column = "answers" if glued[0] in lists["answers"] else "foils"
        trouble(
            column,
            f"{glued[0]!r} would follow the prompt without a space: {(prompt + glued[0])[-24:]!r}",
            f"write {' ' + glued[0]!r}, with a space before it",
            "warning",
        )


def _joins(left: str, right: str) -> bool:
    return left.isascii() and left.isalpha() and right.isascii() and right.isalpha()


def _check_spans(row: dict[str, Any], prompt: str, trouble: Trouble) -> None:
    try:
        spans = files.as_json(row.get("positions"))
    except ValueError as error:
        trouble("positions", f"not JSON: {error}", _SPAN)
        return
    if spans is None:
        return
    if not isinstance(spans, dict):
        trouble("positions", f"not an object: {spans!r}", _SPAN)
        return
    for name, span in spans.items():
        whole = isinstance(span, (list, tuple)) and len(span) == 2 and all(type(end) is int for end in span)
        if not whole:
            trouble("positions", f"{name!r} is not two whole numbers: {span!r}", _SPAN)
        elif not 0 <= span[0] < span[1]:
            trouble("positions", f"{name!r} is empty or runs backwards: {span!r}", _SPAN)
        elif prompt and span[1] > len(prompt):
            trouble("positions", f"{name!r} ends at {span[1]}, the prompt has {len(prompt)} characters", _SPAN)


def _check_json(row: dict[str, Any], trouble: Trouble) -> None:
    try:
        variables = files.as_json(row.get("variables"))
    except ValueError as error:
        trouble("variables", f"not JSON: {error}", 'write an object: {"IO": "Mary"}')
    else:
        if variables is not None and not isinstance(variables, dict):
            trouble("variables", f"not an object: {variables!r}", 'write an object: {"IO": "Mary"}')
    try:
        others = files.as_json(row.get("alternatives"))
    except ValueError as error:
        trouble("alternatives", f"not JSON: {error}", _ALTERNATIVE)
        return
    if others is None:
        return
    good = isinstance(others, list) and all(
        isinstance(other, dict)
        and isinstance(other.get("counterfactual"), str)
        and isinstance(other.get("foils", []), list)
        and all(isinstance(text, str) for text in other.get("foils", []))
        for other in others
    )
    if not good:
        trouble("alternatives", "not a list of counterfactuals with their foils", _ALTERNATIVE)


# kind of reason -> the column to mend, and how
_MENDS = {
    "lengths differ": ("counterfactual", "reword one of the two, or swap a name for one with as many tokens"),
    "prompt and counterfactual have the same tokens": ("counterfactual", "change the thing that flips the answer"),
    "no answer": ("answers", "write the answer as it follows the prompt, with its leading space"),
    "no foil": ("foils", "write the foil as it follows the prompt, with its leading space"),
    "answer and foil begin with the same token": (
        "foils",
        "take a foil that begins differently, or move the shared start into the prompt",
    ),
    "too long for the model": ("prompt", "shorten the prompt"),
    "a position falls on no token": ("positions", "give the span of a whole word"),
}


def _misaligned(found: Rows, bad: set[int], tokenizer: Any) -> list[Problem]:
    """Pairs without other problems that this tokenizer cannot align."""
    from headwater.behavior.bind import reasons_to_drop
    from headwater.behavior.table import Behavior

    # a column that is missing as a whole leaves no pair to align
    if any(problem.column in ("prompt", "counterfactual", "answers") for problem in found.problems):
        return []
    good = [(line, row) for line, row in found.rows if line not in bad]
    if not good:
        return []
    behavior = Behavior.from_rows([{**row, "id": str(line)} for line, row in good])
    dropped = reasons_to_drop(behavior, tokenizer)
    problems: list[Problem] = []
    for line, reason in dropped:
        column, mend = _MENDS.get(reason.split(":")[0], ("prompt", "reword the pair"))
        what = f"this tokenizer cannot align it: {reason}"
        problems.append(Problem(line=int(line), column=column, problem=what, mend=mend))
    return problems


make_verb(__name__, check)

"""The tasks of MIB's circuit track (Mueller et al., 2025), read from files of their own format, row by row.

A file holds the rows of one split as JSONL, a JSON list, or Parquet, with the columns of the published data sets.
The pairs, answers and foils made of them are those that the track scores: the answer of the prompt against the answer
of the counterfactual, each by its first token, labels and numbers as they stand (no space before them), names with one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.behavior.table import Behavior
from headwater.core.errors import BehaviorError, did_you_mean

TASKS: dict[str, str] = {
    "ioi": "s2_io_flip_counterfactual",
    "mcqa": "symbol_counterfactual",
    "arithmetic_addition": "random_counterfactual",
    "arithmetic_subtraction": "random_counterfactual",
    "arc_easy": "symbol_counterfactual",
    "arc_challenge": "symbol_counterfactual",
}
"""Each task with the counterfactual that the track uses unless another is asked for."""
SPLITS = {"train": "train", "validation": "train", "test": "test"}
_SOURCE = "mib-bench data files"


def read_mib(
    task: str,
    files: "Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str]",
    *,
    counterfactual: str | None = None,
    n: int | None = None,
) -> Behavior:
    """A task of MIB's circuit track as a Behavior, from local files of its own format.

    task: one of `TASKS`. files: {"train": path, "test": path} ("validation" counts as train), one path (a test split),
    or a folder with `<task>_<split>.jsonl`, `.json` or `.parquet`. counterfactual: a column of the file, with or
    without `_counterfactual`; None is the track's own. n: the first so many rows of each split.

    Nothing is fetched. Raises BehaviorError for an unknown task, a missing file, or a row that lacks a column.
    """
    if task not in TASKS:
        raise BehaviorError("unknown task of MIB's circuit track", got=repr(task), wanted=did_you_mean(task, TASKS))
    column = counterfactual or TASKS[task]
    column = column if column.endswith("_counterfactual") else f"{column}_counterfactual"
    rows: list[dict[str, Any]] = []
    for split, path in _files(task, files).items():
        if split not in SPLITS:
            raise BehaviorError("unknown split of MIB", got=repr(split), wanted=", ".join(SPLITS))
        found = [
            _pair(task, row, column, line, Path(path).name, split)
            for line, row in enumerate(_rows(Path(path)), start=1)
            if _wanted(task, row, column)
        ]
        rows += found[:n]
    if not rows:
        raise BehaviorError(f"no row of these files is of the task {task!r}", got=f"counterfactual {column}")
    about = {"task": task, "counterfactual": column, "source": _SOURCE, "licence": "Apache-2.0"}
    return Behavior.from_rows(rows, name=f"mib_{task}", about=about)


def mib_task(name: str, *, data: str | os.PathLike[str] | None = None, n: int | None = None, seed: int = 0) -> Behavior:
    """A task of the track by name: the benchmark's own rows where the folder `data` has them, else made in its form.

    IOI and multiple choice are made from the lists in `data`, arithmetic from nothing; ARC's questions cannot be made,
    so without its file it is refused. Raises BehaviorError for that and for unknown names.
    """
    from headwater.behavior.generators import generate

    if name not in TASKS:
        raise BehaviorError("unknown task of MIB's circuit track", got=repr(name), wanted=did_you_mean(name, TASKS))
    folder = None if data is None else Path(data)
    if folder is not None and _in_folder(name, folder):
        return read_mib(name, folder, n=n)
    if name.startswith("arc"):
        raise BehaviorError(
            f"MIB's task {name!r} is questions of others, which are not part of this package", got=f"data={data}",
            wanted=f"a folder with {name}_test.jsonl (or .json, .parquet)", fix="Download it, and give its folder",
        )  # fmt: skip
    if name.startswith("arithmetic"):
        sign = "+" if name.endswith("addition") else "-"
        return generate("mib_arithmetic", n=n, seed=seed, options={"operation": sign})
    return generate(f"mib_{name}", n=n, seed=seed, options={"data": "" if folder is None else str(folder)})


def track_pairs(behavior: Behavior, model: Any) -> Behavior:
    """The pairs that the track keeps under a model's tokenizer, which binding alone would not drop.

    Arithmetic: both results are one token. IOI: both names, and the third that the row carries, have as many tokens.
    Multiple choice: both labels have as many tokens. Raises BehaviorError where none is left.
    """
    from headwater.behavior.bind import tokenizer_of

    tokenizer, _ = tokenizer_of(model)
    task = str(behavior.about.get("task", behavior.about.get("generator", "")))

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    kept = []
    for index, row in enumerate(behavior.frame.iter_rows(named=True)):
        sizes = {length(text) for text in (*row["answers"], *row["foils"])}
        if "ioi" in task:
            third = json.loads(row["variables"]).get("random_c")
            sizes |= {length(f" {third}")} if third else set()
        if len(sizes) == 1 and ("arithmetic" not in task or sizes == {1}):
            kept.append(index)
    if not kept:
        raise BehaviorError(
            f"no pair of {behavior.name!r} is one that MIB would keep under this tokenizer", got=f"{behavior.n} pairs"
        )
    return behavior[kept]


def _files(task: str, files: Any) -> dict[str, Any]:
    if isinstance(files, Mapping):
        return dict(files)
    path = Path(files)
    if path.is_dir():
        found = _in_folder(task, path)
        if not found:
            raise BehaviorError(
                f"the folder has no file of MIB's task {task!r}", got=str(path), wanted=f"{task}_test.jsonl",
                fix="Download the task's data set yourself, and give its file or folder",
            )  # fmt: skip
        return found
    return {"test": path}


def _in_folder(task: str, folder: Path) -> dict[str, Path]:
    """The files of a task's own rows in a folder, by split."""
    return {
        split: folder / f"{task}_{split}{suffix}"
        for split in SPLITS
        for suffix in (".jsonl", ".json", ".parquet")
        if (folder / f"{task}_{split}{suffix}").exists()
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise BehaviorError(
            "there is no such file", got=str(path), wanted="a file of MIB's rows",
            fix="Download the task's data set yourself: nothing is fetched here",
        )  # fmt: skip
    try:
        if path.suffix in (".parquet", ".pq"):
            import polars as pl

            rows = pl.read_parquet(path).to_dicts()
        else:
            text = path.read_text(encoding="utf-8")
            rows = (
                json.loads(text)
                if text.lstrip().startswith("[")
                else [json.loads(line) for line in text.splitlines() if line.strip()]
            )
    except (OSError, ValueError) as error:
        raise BehaviorError(
            f"cannot read {path.name}", got=str(error), wanted="JSONL, a JSON list, or Parquet"
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("polars"):
            raise
        raise BehaviorError(f"cannot read {path.name}", got=str(error).splitlines()[0], wanted="Parquet") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BehaviorError(f"{path.name} holds no rows", wanted="a list of objects")
    return rows


def _wanted(task: str, row: Mapping[str, Any], column: str) -> bool:
    """Arithmetic rows without this counterfactual, or of the other operator, are not the task's."""
    if not task.startswith("arithmetic"):
        return True
    sign = "-" if "subtraction" in task else "+"
    other = row.get(column)
    return row.get("operator", sign) == sign and isinstance(other, Mapping) and other.get("prompt") is not None


def _pair(task: str, row: Mapping[str, Any], column: str, line: int, file: str, split: str) -> dict[str, Any]:
    try:
        other = row[column]
        if task == "ioi":
            said = row["metadata"]
            answer, foil = f" {said['indirect_object']}", f" {said['subject']}"
            variables = {"IO": said["indirect_object"], "S": said["subject"], "random_c": said.get("random_c")}
        elif task.startswith("arithmetic"):
            answer, foil = str(row["label"]), str(other["label"])
            variables = {"a": row.get("operand1"), "b": row.get("operand2"), "result": answer}
        else:
            answer, foil = _label(row), _label(other)
            variables = {"label": answer, "place": int(row["answerKey"]) + 1}
        return {
            "id": f"{split}-{line:05d}", "prompt": row["prompt"], "counterfactual": other["prompt"],
            "answers": [answer], "foils": [foil], "variables": variables, "split": SPLITS[split],
            "template": str(row.get("template") or ""),
        }  # fmt: skip
    except (KeyError, TypeError, IndexError, ValueError) as error:
        others = [name for name in row if name.endswith("_counterfactual")]
        raise BehaviorError(
            f"{file}, row {line}: not a row of MIB's task {task!r}", got=f"{type(error).__name__}: {error}",
            wanted=f"columns prompt, {column} and those of its answers",
            fix=f"Counterfactuals in this row: {', '.join(others) or 'none'}",
        ) from None  # fmt: skip


def _label(row: Mapping[str, Any]) -> str:
    """The right label as it stands: `answerKey` is its index among the labels, which may be numbers."""
    return str(row["choices"]["label"][int(row["answerKey"])])

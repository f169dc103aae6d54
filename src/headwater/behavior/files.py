"""Reading and writing a behavior's rows: CSV, JSONL, Parquet. What is wrong is collected with its line, never guessed
at."""

import csv
import difflib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from headwater.core.errors import BehaviorError

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
COLUMNS = ("id", "prompt", "counterfactual", "answers", "foils", "positions", "variables", "template", "split")
JSON_COLUMNS = ("positions", "variables", "alternatives")
SINGULAR = {"answer": "answers", "foil": "foils"}
# What people call these columns elsewhere. They are named in the mend, never taken silently.
OTHER_NAMES = {
    "prompt": ("clean", "clean_prompt", "clean_prefix", "text", "input", "question", "sentence"),
    "counterfactual": ("corrupt", "corrupted", "corrupt_prompt", "corrupted_prompt", "patch_prefix", "base", "source"),
    "answers": ("target", "label", "correct", "completion", "output", "clean_answer", "correct_answer"),
    "foils": ("distractor", "wrong", "incorrect", "wrong_answer", "patch_answer", "incorrect_answer"),
}
_CELL_LIMIT = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong in a file. `line` is 1-based as an editor shows it (for Parquet the row); 0 means the file as a
    whole."""

    line: int
    column: str
    problem: str
    mend: str
    level: str = "error"

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "the file"
        return (
            f"{where}, {self.column}: {self.problem} ({self.mend})"
            if self.column
            else f"{where}: {self.problem} ({self.mend})"
        )


@dataclass(kw_only=True)
class Rows:
    """What a file holds: its column names, one dict a row (columns by their plural name) with its line, and what
    could not be read."""

    columns: list[str] = field(default_factory=list)
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def trouble(self, line: int, column: str, problem: str, mend: str) -> None:
        self.problems.append(Problem(line=line, column=column, problem=problem, mend=mend))


def format_of(path: str | os.PathLike[str]) -> str:
    """`csv`, `jsonl` or `parquet`, by the file's extension; anything else raises BehaviorError."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise BehaviorError(
            "cannot tell the format of a behavior's file",
            got=f"{Path(path).name!r}",
            wanted=f"a name that ends in {', '.join(FORMATS)}",
            fix="Rename the file, or save it in one of these formats",
        )
    return FORMATS[suffix]


def read_rows(path: str | os.PathLike[str]) -> Rows:
    """Read a file into rows and problems. Raises BehaviorError only where the file as a whole cannot be opened or
    parsed."""
    path = Path(path)
    kind = format_of(path)
    if not path.exists():
        near = difflib.get_close_matches(path.name, _siblings(path), n=3)
        raise BehaviorError(
            "there is no such file",
            got=str(path),
            wanted="a CSV, JSONL or Parquet file of minimal pairs",
            fix=f"Near it lies {' and '.join(near)}" if near else "Check the path",
        )
    if path.is_dir():
        raise BehaviorError("a behavior is one file, this is a folder", got=str(path), fix="Name a file inside it")
    try:
        if kind == "parquet":
            rows = _read_parquet(path)
        else:
            text = path.read_bytes().decode("utf-8-sig")
            rows = _read_csv(text) if kind == "csv" else _read_jsonl(text)
    except UnicodeDecodeError as error:
        raise BehaviorError(
            "the file is not UTF-8 text",
            got=f"{path.name}, byte {error.start}: {error.object[error.start : error.start + 4]!r}",
            fix="Save it as UTF-8, or as Parquet",
        ) from None
    except OSError as error:
        raise BehaviorError(
            "cannot read the file", got=f"{path}: {error.strerror}", fix="Check that it may be read"
        ) from None
    _check_columns(rows)
    return rows


def _siblings(path: Path) -> list[str]:
    try:
        return [other.name for other in path.parent.iterdir() if other.suffix.lower() in FORMATS]
    except OSError:
        return []


def _read_csv(text: str) -> Rows:
    found = Rows()
    if not text.strip():
        return found
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        found.trouble(line, "", "a NUL character", "this is not a text file; save it as UTF-8 CSV")
        return found
    csv.field_size_limit(_CELL_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if not found.columns:
                found.columns = [cell.strip() for cell in cells]
            elif any(cells):
                if len(cells) != len(found.columns):
                    found.trouble(
                        line,
                        "",
                        f"{len(cells)} cells where the header has {len(found.columns)}",
                        'a cell that holds a comma, a quote or a line break goes in double quotes: "Then, Mary"',
                    )
                else:
                    found.rows.append((line, dict(zip(found.columns, cells, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        found.trouble(
            line, "", f"not CSV: {error}", 'write a quote inside a cell twice, "" , and close every quoted cell'
        )
    return found


def _read_jsonl(text: str) -> Rows:
    found = Rows()
    names: dict[str, None] = {}
    # Not splitlines(): it also breaks at form feeds and other separators, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            what = (
                f"{error.msg} at character {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else "nested too deep"
            )
            found.trouble(
                number, "", f"not JSON: {what}", 'one object a line: {"prompt": "...", "counterfactual": "...", ...}'
            )
            continue
        if not isinstance(row, dict):
            found.trouble(
                number, "", f"a JSON {type(row).__name__}, not an object", 'one object a line: {"prompt": "...", ...}'
            )
            continue
        names.update(dict.fromkeys(row))
        found.rows.append((number, row))
    found.columns = list(names)
    return found


def _read_parquet(path: Path) -> Rows:
    try:
        frame = pl.read_parquet(path)
        metadata = pl.read_parquet_metadata(path).get("headwater")
        about = json.loads(metadata) if metadata else {}
    except OSError:
        raise
    except Exception as error:  # polars raises its own kinds, and its panics are plain exceptions
        raise BehaviorError(
            "the file is not Parquet, or is cut short",
            got=f"{path.name}: {str(error).splitlines()[0]}",
            fix="Write it again",
        ) from None
    return Rows(
        columns=frame.columns,
        rows=list(enumerate(frame.to_dicts(), 1)),
        metadata=about if isinstance(about, dict) else {},
    )


def _check_columns(found: Rows) -> None:
    """Name missing columns, with the names that stand there instead, and give each row its plural columns."""
    if not found.columns and not found.problems:
        found.trouble(
            0, "", "the file is empty", "give a header and at least one pair: prompt,counterfactual,answers,foils"
        )
        return
    doubled = sorted({name for name in found.columns if found.columns.count(name) > 1})
    for name in doubled:
        found.trouble(1, name, "the column stands there twice", "keep one of them")
    for singular, plural in SINGULAR.items():
        both = next((line for line, row in found.rows if singular in row and plural in row), None)
        if both is not None:
            found.trouble(both, singular, f"both {singular!r} and {plural!r} are there", f"keep {plural!r}")
    present = {SINGULAR.get(name, name) for name in found.columns}
    if found.columns:
        for wanted in ("prompt", "counterfactual", "answers"):
            if wanted not in present:
                near = _near(wanted, found.columns)
                mend = f"rename {' or '.join(map(repr, near))} to {wanted!r}" if near else f"add a column {wanted!r}"
                found.trouble(0 if near == [] else 1, wanted, "the column is missing", mend)
    if not found.rows and not found.problems:
        found.trouble(0, "", "the file has a header and no pairs", "add at least one row")
    found.rows = [(line, {SINGULAR.get(key, key): value for key, value in row.items()}) for line, row in found.rows]


def _near(wanted: str, columns: Iterable[str]) -> list[str]:
    free = [name for name in columns if SINGULAR.get(name, name) not in COLUMNS]
    known = [name for name in free if name.lower().strip().replace(" ", "_") in (wanted, *OTHER_NAMES.get(wanted, ()))]
    return known or difflib.get_close_matches(wanted, free, n=2, cutoff=0.6)


def as_list(value: Any) -> list[str] | None:
    """The strings of an `answers` or `foils` cell: a list, a JSON list, or one plain string. None where it is
    neither."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        if value.startswith("[") and value.endswith("]"):
            try:
                value = json.loads(value)
            except (json.JSONDecodeError, RecursionError):
                return None
        else:
            return [value]
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    return None


def as_json(value: Any) -> Any:
    """The value of a JSON column: already parsed, or its text. Raises ValueError where the text is not JSON."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(str(error)) from None
    return value


def canonical(value: Any) -> str:
    """JSON text that is the same for the same value, whatever order its keys came in."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def write_rows(frame: pl.DataFrame, path: str | os.PathLike[str], metadata: dict[str, Any]) -> None:
    """Write a behavior's frame in the format of the path's extension; only Parquet also carries the metadata."""
    path, kind = Path(path), format_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "parquet":
            frame.write_parquet(path, metadata={"headwater": canonical(metadata)})
            return
        with path.open("w", encoding="utf-8", newline="") as out:
            if kind == "jsonl":
                for row in frame.iter_rows(named=True):
                    out.write(json.dumps(_plain(row, text=False), ensure_ascii=False) + "\n")
            else:
                rows = [list(_plain(row, text=True).values()) for row in frame.iter_rows(named=True)]
                # The csv module quotes what looks like its own line ends; a lone carriage return ends a line for
                # readers too.
                lone = any("\r" in cell for row in rows for cell in row)
                writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL if lone else csv.QUOTE_MINIMAL)
                writer.writerows([frame.columns, *rows])
    except OSError as error:
        raise BehaviorError(
            "cannot write the behavior",
            got=f"{path}: {error.strerror or error}",
            fix="Check the folder and the space left on it",
        ) from None


def _plain(row: dict[str, Any], *, text: bool) -> dict[str, Any]:
    """A row for a text format: lists as JSON where cells are text; JSON columns as objects where the format has
    objects."""
    plain = dict(row)
    for key in ("answers", "foils"):
        if text:
            plain[key] = json.dumps(plain[key], ensure_ascii=False)
    if not text:
        for key in JSON_COLUMNS:
            if key in plain:
                plain[key] = as_json(plain[key])
    return plain

"""Behavior: a table of minimal pairs with a metric, from a generator or from a file."""

import hashlib
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from headwater.behavior import files
from headwater.core.errors import BehaviorError

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound

SPLITS = ("train", "test")
_LISTS = ("answers", "foils")
_SHOWN = 3


class Behavior:
    """What a model does, as minimal pairs: a prompt, a counterfactual that flips the answer, answers, and foils.

    Parameters
    ----------
    frame: one row a pair. Columns `prompt`, `counterfactual`, `answers` ([str], the texts that may come next, with
        their leading space) are needed; `id`, `foils` ([str]), `positions` (JSON: name -> [first character, one past
        the last] in the prompt), `variables` (JSON), `template`, `split` ("train" or "test") and `alternatives` are
        filled in where they are missing. Every further
        column is a slice: results are also given for each of its values.
    name: what it is called in results.
    metric: the name of the metric it is judged by.
    about: where it comes from: generator, options, seed, source, licence.

    `alternatives` (JSON: [{"counterfactual": ..., "foils": [...]}, ...]) holds further counterfactuals of the same
    prompt. Where the first does not align with a tokenizer, binding takes the first that does: a generator need not
    know any tokenizer.

    A Behavior is a value: nothing changes it. `hash` is the sha256 of its rows, the same in every file format.
    Raises BehaviorError for a frame that does not hold minimal pairs.
    """

    def __init__(
        self,
        frame: pl.DataFrame,
        *,
        name: str = "behavior",
        metric: str = "logit_diff",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.frame = _normal(frame, name)
        self.name, self.metric, self.about = name, metric, dict(about or {})
        self._hash: str | None = None

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], **keywords: Any) -> "Behavior":
        """Pairs as dicts; `answer` and `foil` (one text each) are read as `answers` and `foils`."""
        plain = [{files.SINGULAR.get(key, key): value for key, value in row.items()} for row in rows]
        if not plain:
            raise BehaviorError("a behavior has no rows", wanted="at least one pair")
        names = dict.fromkeys(key for row in plain for key in row)
        columns = {name: [row.get(name) for row in plain] for name in names}
        for key, values in columns.items():
            read = _listed if key in _LISTS else _json_text if key in files.JSON_COLUMNS else _text_of
            columns[key] = [read(value, key, index) for index, value in enumerate(values)]
        schema = {name: pl.List(pl.String) if name in _LISTS else pl.String for name in columns}
        return cls(pl.DataFrame(columns, schema=schema), **keywords)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, n: int | None = None, seed: int = 0) -> "Behavior":
        """Read a Parquet, CSV or JSONL file; `n` keeps that many rows, drawn with `seed`, half of each split where it
        can.

        Raises BehaviorError that names the first lines that are wrong; `headwater behavior check FILE` names all.
        """
        from headwater.behavior.check import problems_in

        found = files.read_rows(path)
        problems = found.problems or [problem for problem in problems_in(found) if problem.level == "error"]
        if problems:
            shown = "; ".join(str(problem) for problem in problems[:_SHOWN])
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise BehaviorError(
                f"{Path(path).name} does not hold minimal pairs",
                got=shown + more,
                wanted="columns prompt, counterfactual, answers (or answer), foils (or foil)",
                fix=f"`headwater behavior check {path}` lists every line that is wrong",
            )
        about = {"file": Path(path).name, **found.metadata.get("about", {})}
        behavior = cls.from_rows(
            (row for _line, row in found.rows),
            name=found.metadata.get("name", Path(path).stem),
            metric=found.metadata.get("metric", "logit_diff"),
            about=about,
        )
        return behavior if n is None else behavior.sample(n, seed=seed)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows as Parquet, CSV or JSONL, by the extension. Parquet also keeps name, metric and about."""
        files.write_rows(self.frame, path, {"name": self.name, "metric": self.metric, "about": self.about})
        return Path(path)

    @property
    def n(self) -> int:
        """The number of pairs."""
        return self.frame.height

    @property
    def prompts(self) -> list[str]:
        return self.frame["prompt"].to_list()

    @property
    def counterfactuals(self) -> list[str]:
        """The first counterfactual of each pair; what a tokenizer made of them is in `bind(...).frame`."""
        return self.frame["counterfactual"].to_list()

    @property
    def train(self) -> "Behavior":
        """The pairs to find things on."""
        return self.split("train")

    @property
    def test(self) -> "Behavior":
        """The pairs to judge on."""
        return self.split("test")

    def split(self, name: str) -> "Behavior":
        """The pairs of one split. Raises BehaviorError for an unknown or empty one."""
        kept = self.frame.filter(pl.col("split") == name)
        if not kept.height:
            raise BehaviorError(
                f"behavior {self.name!r} has no pairs in that split", got=repr(name), wanted=" or ".join(self._splits())
            )
        return self._with(kept)

    def _splits(self) -> list[str]:
        return sorted(set(self.frame["split"].to_list()), reverse=True)

    @property
    def slices(self) -> list[str]:
        """The columns by which results are also given: `template` where there are several, and every further column."""
        known = {*files.COLUMNS, "alternatives"} - {"template"}
        names = [name for name in self.frame.columns if name not in known]
        return [name for name in names if self.frame[name].n_unique() > 1]

    @property
    def hash(self) -> str:
        """sha256 of the rows, in hex; the name, metric and file format do not enter."""
        if self._hash is None:
            digest = hashlib.sha256()
            for row in self.frame.iter_rows(named=True):
                digest.update(files.canonical(row).encode() + b"\n")
            self._hash = digest.hexdigest()
        return self._hash

    def sample(self, n: int, *, seed: int = 0) -> "Behavior":
        """`n` of the pairs in their order, drawn with `seed`, half of each split where the splits are large enough."""
        if n < 1:
            raise BehaviorError("cannot take so few pairs", got=f"n={n}", wanted="n of at least 1")
        if n >= self.n:
            return self
        draw = random.Random(f"headwater-sample:{seed}")
        by_split = {name: [i for i, s in enumerate(self.frame["split"]) if s == name] for name in self._splits()}
        kept: list[int] = []
        left = n
        # the smallest split first, so that what it lacks is made up from the others
        for index, rows in enumerate(sorted(by_split.values(), key=len)):
            share = min(len(rows), left // (len(by_split) - index))
            kept += draw.sample(rows, share)
            left -= share
        return self._with(self.frame[sorted(kept)])

    def bind(self, model: Any) -> "Bound":
        """Align the pairs with a model's tokenizer (or a tokenizer): see `headwater.behavior.bind`."""
        from headwater.behavior.bind import bind

        return bind(self, model)

    def _with(self, frame: pl.DataFrame) -> "Behavior":
        return Behavior(frame, name=self.name, metric=self.metric, about=self.about)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int | slice | Sequence[int]) -> "Behavior":
        """Some of the pairs, as a Behavior: `behavior[:8]`, `behavior[3]`, `behavior[[0, 5]]`."""
        if isinstance(index, int):
            if not -self.n <= index < self.n:
                raise IndexError(f"pair {index} of {self.n}")
            index = [index % self.n]
        kept = self.frame[index] if isinstance(index, slice) else self.frame[list(index)]
        if not kept.height:
            raise BehaviorError("no pairs are left", got=f"{index} of {self.n} pairs")
        return self._with(kept)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Behavior) and self.hash == other.hash and self.name == other.name

    def __hash__(self) -> int:
        return hash((self.name, self.hash))

    def __repr__(self) -> str:
        splits = ", ".join(f"{sum(s == name for s in self.frame['split'])} {name}" for name in self._splits())
        return f"Behavior({self.name!r}, n={self.n} ({splits}), metric={self.metric!r}, hash={self.hash[:12]})"

    def _repr_html_(self) -> str:
        return self.frame.head(10)._repr_html_()


def _listed(value: Any, column: str, index: int) -> list[str]:
    texts = files.as_list(value)
    if texts is None:
        raise BehaviorError(
            f"row {index + 1}: {column} are not texts", got=repr(value), wanted="a text or a list of texts"
        )
    return texts


def _json_text(value: Any, column: str, index: int) -> str | None:
    try:
        parsed = files.as_json(value)
    except ValueError as error:
        raise BehaviorError(f"row {index + 1}: {column} is not JSON", got=repr(value), fix=str(error)) from None
    return None if parsed is None else files.canonical(parsed)


def _text_of(value: Any, column: str, index: int) -> str | None:
    """Ids and slices may be numbers or anything else that JSON has; what the model reads must be text."""
    if value is None or isinstance(value, str):
        return value
    if column in ("prompt", "counterfactual"):
        raise BehaviorError(f"row {index + 1}: the {column} is not a text", got=repr(value))
    return files.canonical(value)


def _normal(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """The frame with every standard column, in standard order and of standard type; further columns follow, as text."""
    missing = [column for column in ("prompt", "counterfactual", "answers") if column not in frame.columns]
    if missing:
        raise BehaviorError(
            f"behavior {name!r} lacks columns", got=", ".join(frame.columns), wanted=", ".join(missing), fix="Add them"
        )
    if not frame.height:
        raise BehaviorError(f"behavior {name!r} has no rows", wanted="at least one pair")
    lists, empty = pl.List(pl.String), pl.lit("{}")
    have = set(frame.columns)
    columns: list[pl.Expr] = [
        _text("id", "") if "id" in have else pl.lit("").alias("id"),
        _text("prompt", ""),
        _text("counterfactual", ""),
        pl.col("answers").cast(lists).fill_null(pl.lit([], dtype=lists)),
        pl.col("foils").cast(lists).fill_null(pl.lit([], dtype=lists))
        if "foils" in have
        else pl.lit([], dtype=lists).alias("foils"),
        _text("positions", "{}") if "positions" in have else empty.alias("positions"),
        _text("variables", "{}") if "variables" in have else empty.alias("variables"),
        _text("template", "") if "template" in have else pl.lit("").alias("template"),
        _text("split", "") if "split" in have else pl.lit("").alias("split"),
    ]
    if "alternatives" in have:
        columns.append(_text("alternatives", "[]"))
    columns += [_text(extra, "") for extra in frame.columns if extra not in files.COLUMNS and extra != "alternatives"]
    try:
        frame = frame.select(columns)
    except pl.exceptions.PolarsError as error:
        raise BehaviorError(
            f"behavior {name!r} has a column of the wrong type",
            got=str(error).splitlines()[0],
            wanted="texts, and lists of texts",
        ) from None
    ids = frame["id"].to_list()
    if not any(ids):
        ids = [f"{row:05d}" for row in range(frame.height)]
        frame = frame.with_columns(pl.Series("id", ids))
    if len(set(ids)) != len(ids) or "" in ids:
        raise BehaviorError(
            f"behavior {name!r} has ids that are empty or stand there twice", fix="Give each row its own id"
        )
    unknown = sorted(set(frame["split"]) - {*SPLITS, ""})
    if unknown:
        raise BehaviorError(
            f"behavior {name!r} has an unknown split", got=", ".join(map(repr, unknown)), wanted="train or test"
        )
    if "" in frame["split"].to_list():
        frame = frame.with_columns(pl.Series("split", _splits_for(frame)))
    return frame


def _text(column: str, default: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).fill_null(default)


def _splits_for(frame: pl.DataFrame) -> list[str]:
    """Half train, half test, where a row has none: by the prompt's own hash, so that no prompt stands in both."""
    prompts = frame["prompt"].to_list()
    ranked = sorted(set(prompts), key=lambda text: hashlib.sha256(text.encode()).digest())
    side = {prompt: SPLITS[rank % 2] for rank, prompt in enumerate(ranked)}
    return [given or side[prompt] for given, prompt in zip(frame["split"].to_list(), prompts, strict=True)]

"""What sections are made of: figures, tables, notes, tiles. Plain values; the templates give them their looks.

All text in here is untrusted and plain: the templates escape it. Only `svg` fields are markup, and they come from
`svg.clean` or `drawing.draw`, which escape what they write.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from headwater.report.words import number, visible

PREVIEW_ROWS = 40
MAX_CSV_BYTES = 200_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table: `text`, whether it is a number, and a style's name (`mono`, `prompt`, `good`, `bad`,
    `open`).
    """

    text: str
    numeric: bool = False
    style: str = ""
    svg: str = ""
    title: str = ""
    below: str = ""
    """Small print on a second line."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its header; `caption` stands below it, `more` says what was left out."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    more: str = ""
    fold: str = ""
    """A summary to fold the table behind."""
    block: str = "table"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The data behind a figure: a stored table, its first rows, and all of it as a CSV in a data URI where it is
    small.
    """

    name: str
    path: str
    n_rows: int
    preview: Table | None = None
    csv: str = ""
    same_as: str = ""
    """The id of the figure that carries this data already; then there is no preview here."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its number, caption, data and code."""

    id: str
    number: int
    title: str
    svg: str
    caption: str = ""
    sources: Sequence[Source] = ()
    code: str = ""
    legend: Sequence[tuple[str, str]] = ()
    """Colours and their meaning: (palette name, text)."""
    block: str = "figure"


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark; `tone` is `plain`, `missing` or `broken`. `code` is what to type."""

    text: str
    tone: str = "plain"
    code: str = ""
    block: str = "note"


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Key numbers: (value, what it is, small print)."""

    items: Sequence[tuple[str, str, str]]
    block: str = "tiles"


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Sentences with a mark: (style, lead word, text, small print)."""

    items: Sequence[tuple[str, str, str, str]]
    block: str = "lines"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Blocks, and small drawings that stand at their side: (title, id of the section that tells more, SVG)."""

    blocks: Sequence[Any]
    small: Sequence[tuple[str, str, str]]
    block: str = "beside"


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A heading inside a section, with a sentence."""

    text: str
    lead: str = ""
    block: str = "heading"


@dataclass(kw_only=True)
class Section:
    """A part of the page. `lead` says in one or two sentences what it shows, in this run's numbers."""

    id: str
    title: str
    lead: Sequence[str] = ()
    blocks: list[Any] = field(default_factory=list)


def cell(value: Any, *, style: str = "", limit: int | None = 400) -> Cell:
    """A value as a cell: numbers aligned and rounded, text visible, lists joined."""
    if value is None:
        return Cell(text="–", style=style)
    if isinstance(value, bool):
        return Cell(text="yes" if value else "no", style=style)
    if isinstance(value, int | float):
        return Cell(
            text=number(value), numeric=True, style=style, title=repr(value) if isinstance(value, float) else ""
        )
    if isinstance(value, list | tuple):
        value = ", ".join(number(v) if isinstance(v, float) else str(v) for v in value)
    return Cell(text=visible(value, limit), style=style)


def table_of(frame: pl.DataFrame, *, limit: int = PREVIEW_ROWS) -> Table:
    """The first rows of a frame as they are."""
    shown = frame.head(limit)
    more = f"{limit} of {frame.height:,} rows" if frame.height > limit else ""
    rows = [[cell(value, limit=160) for value in row] for row in shown.iter_rows()]
    return Table(columns=[name.replace("_", " ") for name in frame.columns], rows=rows, more=more)


def source(found: Any, name: str) -> Source:
    """A result's table as the data behind a figure."""
    frame = found.result.tables[name]
    return Source(
        name=name,
        path=f"{found.where}/{name}.parquet",
        n_rows=frame.height,
        preview=table_of(frame, limit=25),
        csv=_csv(frame),
    )


def _csv(frame: pl.DataFrame) -> str:
    """The frame as a data URI, or nothing if it is too big to carry along.

    Texts that a spreadsheet would run as a formula get an apostrophe in front; the Parquet file holds them as they are.
    """
    flat = frame.with_columns(
        pl.col(name).map_elements(lambda value: "; ".join(map(str, value)), return_dtype=pl.String)
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.List | pl.Array)
    )
    safe = flat.with_columns(
        pl.when(pl.col(name).str.slice(0, 1).is_in(_FORMULA))
        .then("'" + pl.col(name))
        .otherwise(pl.col(name))
        .alias(name)
        for name, dtype in flat.schema.items()
        if dtype == pl.String
    )
    if any(isinstance(dtype, pl.Struct) for dtype in safe.schema.values()):
        return ""
    data = safe.write_csv().encode()
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(data).decode() if len(data) <= MAX_CSV_BYTES else ""


def pairs(values: Mapping[str, Any], *, style: str = "mono") -> Table:
    """Names and values as a table of two columns."""
    return Table(
        columns=(),
        rows=[[Cell(text=visible(name), style="head"), cell(value, style=style)] for name, value in values.items()],
    )

"""Tables for people, JSON for programs."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from headwater.cli.guard import printable


def show_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool, title: str | None = None) -> None:
    """Print rows on stdout: as a table, or as one JSON list."""
    if as_json:
        show_json(list(rows))
        return
    from rich.table import Table

    if title:
        show(title)
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    columns = list(rows[0]) if rows else []
    for column in columns:
        number = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    show(table if rows else "(nothing to show)")


def show_json(value: Any) -> None:
    """One JSON document on stdout; numbers that JSON has no word for become null."""
    typer.echo(json.dumps(_plain(value), ensure_ascii=False, indent=None if not sys.stdout.isatty() else 2))


def show(thing: Any) -> None:
    """A rich renderable or a plain text (never read as markup) on stdout; not cut to 80 columns where it is piped."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(Text(printable(thing)) if isinstance(thing, str) else thing, soft_wrap=isinstance(thing, str))


def _cell(value: Any) -> Any:
    from rich.text import Text

    if value is None:
        return Text("–", style="dim")
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    return Text(printable(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value

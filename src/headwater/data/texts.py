"""Documents of one text file, each with the place after it, so that reading goes on from there."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from headwater.core.errors import StoreError, did_you_mean
from headwater.core.files import store_error

Document = tuple[str, int, int]
"""(text, place, row) where the next document begins: a byte and 0, or (Parquet) a row group and a row in it."""


def documents_of(path: Path, start: tuple[int, int], column: str, documents: str) -> Iterator[Document]:
    """The documents of a file from `start` on that are not empty. Raises StoreError where it cannot be read."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, start, column)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path, start[0], column)
        else:
            yield from _plain(path, start[0], documents)
    except OSError as error:
        raise store_error(error, path, "read") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{path} is not UTF-8 text", got=str(error)) from None


def _parquet(path: Path, start: tuple[int, int], column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise StoreError(f"{path} has no column {column!r}", wanted=did_you_mean(column, names))
            for group in range(start[0], file.num_row_groups):
                texts = cast(list[Any], file.read_row_group(group, columns=[column]).column(0).to_pylist())
                for row in range(start[1] if group == start[0] else 0, len(texts)):
                    if _text(texts[row], column, path):
                        yield texts[row], group, row + 1
    except pa.ArrowInvalid as error:
        raise StoreError(f"{path} is no Parquet file", got=str(error).splitlines()[0]) from None


def _json_lines(path: Path, start: int, column: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        lines.seek(start)
        at = start
        for line in lines:
            at += len(line)
            if not line.strip():
                continue
            try:
                row: object = json.loads(line)
            except json.JSONDecodeError as error:
                raise StoreError(f"{path}, the line that ends at byte {at}, is not JSON", got=error.msg) from None
            if not isinstance(row, dict) or column not in row:
                raise StoreError(f"{path}, the line that ends at byte {at}, has no {column!r}", fix="Give column")
            text = cast(dict[str, Any], row)[column]
            if _text(text, column, path):
                yield text, at, 0


def _plain(path: Path, start: int, documents: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        lines.seek(start)
        if documents == "file":
            text = lines.read()
            if text.strip():
                yield text.decode(), start + len(text), 0
            return
        at, held = start, list[bytes]()
        for line in lines:
            at += len(line)
            if documents == "lines":
                if line.strip():
                    yield line.decode().rstrip("\r\n"), at, 0
            elif line.strip():
                held.append(line)
            elif held:
                yield b"".join(held).decode().rstrip("\r\n"), at, 0
                held = []
        if held:
            yield b"".join(held).decode().rstrip("\r\n"), at, 0


def _text(text: Any, column: str, path: Path) -> bool:
    if text is not None and not isinstance(text, str):
        raise StoreError(f"{column!r} of {path} holds no text", got=type(text).__name__)
    return bool(text and text.strip())

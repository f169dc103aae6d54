"""Where training sequences come from: generators by name, files of token ids, and text that is tokenized once.

A source is anything with `n_sequences`, `sequence_length` and `tokens(index) -> int array [sequence_length]`. It may
also have `batch(indices) -> [n, sequence_length]` (faster), `words` (its vocabulary, by token id), `vocabulary` (how
many token ids there are) and `loss_at` (bool [sequence_length]: which tokens are predicted; the first never is).
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError, did_you_mean
from headwater.core.files import store_error
from headwater.core.registry import Registry

_TEXTS = (".txt", ".jsonl", ".parquet")
_ARRAYS = (".npy", ".bin")
_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "int64", "uint64")
# Generators of other rooms, imported when a name is asked for; by name, so that no import points sideways.
_OWN = ("headwater.dynamics.lab.generators", "headwater.data.world")


@runtime_checkable
class Source(Protocol):
    """Sequences of token ids, all of one length, by number."""

    n_sequences: int
    sequence_length: int

    def tokens(self, index: int) -> NDArray[Any]:
        """The token ids of one sequence."""
        ...


sources: Registry[Any] = Registry("source", own=[module for module in _OWN if importlib.util.find_spec(module)])
"""Generators by name: `generator(*, seed, **options) -> Source`. Outside packages add theirs by the entry point group
`headwater.sources`."""


def batch_of(source: Any, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, sequence_length] int64: the sequences with these numbers."""
    if hasattr(source, "batch"):
        return np.asarray(source.batch(indices), dtype=np.int64)
    return np.stack([np.asarray(source.tokens(int(index)), dtype=np.int64) for index in indices])


def is_file(name: str) -> bool:
    """Whether a source's name is that of a file, not of a generator."""
    return "/" in name or Path(name).suffix in (*_TEXTS, *_ARRAYS)


def is_text(name: str) -> bool:
    return Path(name).suffix in _TEXTS


class Array:
    """Token ids in memory, or mapped from a file: [n, T], or flat and cut into sequences (a rest is left out)."""

    def __init__(self, ids: NDArray[Any], sequence_length: int | None = None, *, what: str = "the tokens") -> None:
        if ids.ndim == 1:
            if sequence_length is None:
                raise MethodError(f"{what} have no sequences", got="one row", fix="Set sequence_length")
            ids = ids[: len(ids) // sequence_length * sequence_length].reshape(-1, sequence_length)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise MethodError(
                f"{what} are no token ids", got=f"{ids.dtype} {list(ids.shape)}", wanted="integers [n, T]"
            )
        if ids.shape[0] < 1 or ids.shape[1] < 2:
            wanted = "at least one sequence of two tokens"
            raise MethodError(f"{what} are too few", got=f"{list(ids.shape)} [sequences, tokens]", wanted=wanted)
        if sequence_length is not None and ids.shape[1] != sequence_length:
            raise MethodError(
                f"{what} have another length", got=ids.shape[1], wanted=f"sequence_length {sequence_length}"
            )
        self._ids = ids
        self.n_sequences, self.sequence_length = ids.shape

    def tokens(self, index: int) -> NDArray[Any]:
        return self._ids[index]

    def batch(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return self._ids[indices]


def read_array(path: str | Path, sequence_length: int | None, *, dtype: str = "uint16") -> Array:
    """Token ids of an `.npy` file ([n, T] or flat) or a flat `.bin` of the given type; mapped, not read. No pickle."""
    file = Path(path)
    try:
        if file.suffix == ".npy":
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            if dtype not in _DTYPES:
                raise MethodError("unknown type of token ids", got=repr(dtype), wanted=did_you_mean(dtype, _DTYPES))
            ids = np.memmap(file, dtype=np.dtype(dtype), mode="r")
    except OSError as error:
        raise store_error(error, file, "read") from error
    except ValueError as error:
        raise StoreError(f"cannot read token ids from {file}", got=str(error).splitlines()[0]) from None
    return Array(ids, sequence_length, what=f"the token ids in {file.name}")


def read_texts(path: str | Path, *, documents: str = "lines", column: str = "text") -> Iterator[str]:
    """The documents of a text file (its lines, its paragraphs, or all of it), a JSONL file or a Parquet file, in order.

    Empty ones are left out. Raises StoreError for a file that is missing or lacks the column.
    """
    file = Path(path)
    try:
        if file.suffix == ".parquet":
            import polars as pl

            frame = pl.read_parquet(file)
            if column not in frame.columns:
                raise StoreError(f"{file} has no column {column!r}", wanted=did_you_mean(column, frame.columns))
            texts: Iterator[Any] = iter(frame[column].to_list())
        elif file.suffix == ".jsonl":
            texts = _json_lines(file, column)
        else:
            texts = _pieces(file, documents)
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise StoreError(f"{column!r} of {file} holds no text", got=type(text).__name__)
            if text and text.strip():
                yield text.strip("\n")
    except OSError as error:
        raise store_error(error, file, "read") from error
    except UnicodeDecodeError as error:
        raise StoreError(f"{file} is not UTF-8 text", got=str(error)) from None


def _json_lines(file: Path, column: str) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row: object = json.loads(line)
            except json.JSONDecodeError as error:
                raise StoreError(f"{file}, line {number}, is not JSON", got=error.msg) from None
            if not isinstance(row, dict) or column not in row:
                raise StoreError(f"{file}, line {number}, has no {column!r}", fix="Set options: {column: ...}")
            yield cast(dict[str, Any], row)[column]


def _pieces(file: Path, documents: str) -> Iterator[str]:
    if documents == "file":
        yield file.read_text(encoding="utf-8")
        return
    if documents not in ("lines", "paragraphs"):
        raise MethodError("unknown documents of a text file", got=repr(documents), wanted="lines, paragraphs or file")
    with file.open(encoding="utf-8") as lines:
        if documents == "lines":
            yield from lines
            return
        held: list[str] = []
        for line in lines:
            if line.strip():
                held.append(line)
            elif held:
                yield "".join(held)
                held = []
        if held:
            yield "".join(held)

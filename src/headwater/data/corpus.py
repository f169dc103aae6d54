"""A corpus in training order: what was seen, and by when.

Layouts: runs of `headwater train`; text (JSONL, Parquet, plain); memory-mapped token ids; Megatron's (Pythia) and
OLMo's, each with the order in which training drew from it (`megatron.py`, `olmo.py`).
"""

import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError, did_you_mean
from headwater.core.files import read_json, store_error

TEXTS = (".jsonl", ".parquet", ".txt")
LAYOUTS = ("run", "text", "tokens", "megatron", "olmo")
_DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "int64", "uint64")
_PIECE = 1 << 20  # tokens, or characters of text, that are held at a time
Cursor = dict[str, int]
Piece = tuple[int, Any, Cursor]
"""(number of the first sequence, the sequences, where the next piece begins): documents [str] or token ids [n, T]."""


class Corpus(ABC):
    """Sequences in training order: token ids of one length (`form` "tokens") or documents ("text").

    `batch_size` is how many sequences a training step takes (None: not known, and then a step is one sequence).
    """

    form: ClassVar[str] = "tokens"
    name: str
    batch_size: int | None
    tokenizer: Any = None
    """What made the token ids, where it is known."""

    @classmethod
    def open(cls, what: Any, *, layout: str | None = None, **options: Any) -> "Corpus":
        """A corpus from a file, a folder, several files, or anything with `n_sequences` and `tokens(index)`.

        layout: "run", "text", "tokens", "megatron", "olmo"; told from the files where it is not given. Options are
        those of the layout: `batch` everywhere; `column`, `documents` of texts; `dtype`, `sequence_length` of tokens;
        of "megatron" also `order`, `seed`, `samples`; of "olmo" also `seed`, `epochs`, `shuffle`, `indices`.

        Raises StoreError for files that cannot be read, MethodError for an option that the layout lacks.
        """
        if isinstance(what, Corpus):
            return what
        if not isinstance(what, str | Path | list | tuple) and hasattr(what, "tokens"):
            return _make(OfSource, what, options)
        paths = _files(what)
        chosen = layout or _layout(paths)
        if chosen not in LAYOUTS:
            raise MethodError("unknown layout of a corpus", got=repr(layout), wanted=did_you_mean(chosen, LAYOUTS))
        if chosen == "run":
            # By name: rooms of stages do not import each other, and only the lab can rebuild the order of its runs.
            run = importlib.import_module("headwater.dynamics.lab.run").TrainingRun.open(paths[0])
            return _make(OfSource, run.order, {"name": str(paths[0]), **options})
        if chosen == "text":
            return _make(Texts, paths, options)
        if chosen == "tokens":
            return _make(Memmap, paths, options)
        if chosen == "megatron":
            from headwater.data.megatron import Megatron

            return _make(Megatron, paths[0], options)
        from headwater.data.olmo import Olmo

        return _make(Olmo, paths, options)

    @property
    @abstractmethod
    def n_sequences(self) -> int:
        """How many sequences there are (of texts: documents, for which all are read once)."""

    @property
    def steps(self) -> int:
        """How many whole steps there are."""
        return self.n_sequences // (self.batch_size or 1)

    def seen(self, step: int) -> int:
        """How many sequences the checkpoint of that step had seen: those before the update that makes step + 1."""
        if step < 0:
            raise MethodError("steps are counted from 0", got=step)
        return min(step * (self.batch_size or 1), self.n_sequences)

    def batch(self, step: int) -> Any:
        """What the update from step to step + 1 saw: token ids [batch, T], or documents [str]."""
        if not 0 <= step < self.steps:
            raise MethodError(f"no such step in {self.name}", got=step, wanted=f"0 to {self.steps - 1}")
        size = self.batch_size or 1
        return self.between(step * size, (step + 1) * size)

    @abstractmethod
    def between(self, first: int, last: int) -> Any:
        """Sequences first .. last-1 in training order."""

    @abstractmethod
    def pieces(self, cursor: Cursor | None = None, *, size: int = _PIECE) -> Iterator[Piece]:
        """All sequences in order, a piece of about `size` tokens or characters at a time, from a cursor on."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this corpus from another one: plain data, of the content, not of where it lies."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, form={self.form!r}, batch_size={self.batch_size})"


class TokenCorpus(Corpus):
    """Token ids, [n_sequences, sequence_length]. A layout gives `rows(numbers)`: the ids of these sequences."""

    sequence_length: int
    _n: int

    @property
    def n_sequences(self) -> int:
        return self._n

    @abstractmethod
    def rows(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """[n, T]: the sequences with these numbers in training order."""

    def tokens(self, index: int) -> NDArray[Any]:
        """The k-th sequence in training order."""
        return self.between(index, index + 1)[0]

    def between(self, first: int, last: int) -> NDArray[Any]:
        if not 0 <= first <= last <= self._n:
            raise MethodError(f"{self.name} has no such sequences", got=f"{first}:{last}", wanted=f"0 to {self._n}")
        return np.asarray(self.rows(np.arange(first, last, dtype=np.int64)))

    def pieces(self, cursor: Cursor | None = None, *, size: int = _PIECE) -> Iterator[Piece]:
        at, step = (cursor or {}).get("sequence", 0), max(1, size // self.sequence_length)
        while at < self._n:
            end = min(at + step, self._n)
            yield at, self.between(at, end), {"sequence": end}
            at = end

    def identity(self) -> dict[str, Any]:
        chosen = np.unique(np.linspace(0, self._n - 1, min(self._n, 64)).astype(np.int64))
        some = np.ascontiguousarray(self.rows(chosen), dtype=np.int64)
        shape = {"n_sequences": self._n, "sequence_length": self.sequence_length, "batch": self.batch_size}
        return {"form": "tokens", **shape, "sha256": hashlib.sha256(some.tobytes()).hexdigest()}


class OfSource(TokenCorpus):
    """Any source of sequences: the order of a run (`TrainingRun.order`), a generator, a packed text.

    source: has `n_sequences`, `sequence_length`, `tokens(index)` and maybe `batch(indices)`, `batch_size`.
    """

    def __init__(self, source: Any, *, batch: int | None = None, name: str | None = None) -> None:
        self.source, self.name = source, name or type(source).__name__
        known = getattr(source, "batch_size", None)
        if known is not None and batch not in (None, known):
            raise MethodError(f"{self.name} took other batches", got=f"batch={batch}", wanted=known)
        self.batch_size = batch_of(known if known is not None else batch)
        self.sequence_length, self._n = int(source.sequence_length), int(source.n_sequences)
        self.tokenizer = getattr(getattr(source, "data", None), "tokenizer", None)

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        if hasattr(self.source, "batch"):
            return np.asarray(self.source.batch(numbers))
        return np.stack([np.asarray(self.source.tokens(int(number))) for number in numbers])


class Memmap(TokenCorpus):
    """Token ids in files, mapped and not read: `.npy` ([n, T] or flat), or flat `.bin` with `<name>.json` beside it.

    The JSON says `dtype` and `sequence_length`, which may be given as options too. Several files follow one another;
    what is left at the end of a flat file and fills no sequence is left out.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        batch: int | None = None,
        dtype: str | None = None,
        sequence_length: int | None = None,
    ) -> None:
        self.name, self.batch_size = str(paths[0]), batch_of(batch)
        self._parts = [_mapped(path, dtype, sequence_length) for path in paths]
        lengths = {part.shape[1] for part in self._parts}
        if len(lengths) != 1:
            raise StoreError("the files differ in the length of their sequences", got=sorted(lengths))
        self.sequence_length = lengths.pop()
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._n = int(self._starts[-1])

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        return gather(self._parts, self._starts, numbers)


class Texts(Corpus):
    """Documents of text files, in the order of the files and of what is in them. Empty documents are left out.

    column: where a JSONL or Parquet file holds the text. documents: of plain text "lines", "paragraphs" or "file".
    `batch` and `between` read from the beginning.
    """

    form: ClassVar[str] = "text"

    def __init__(
        self, paths: Sequence[Path], *, batch: int | None = None, column: str = "text", documents: str = "lines"
    ) -> None:
        if documents not in ("lines", "paragraphs", "file"):
            raise MethodError("unknown documents of a text", got=repr(documents), wanted="lines, paragraphs or file")
        self.paths, self.column, self.documents = list(paths), column, documents
        self.name, self.batch_size = str(paths[0]), batch_of(batch)
        self._count: int | None = None

    @property
    def n_sequences(self) -> int:
        if self._count is None:
            self._count = sum(len(documents) for _, documents, _ in self.pieces())
        return self._count

    def between(self, first: int, last: int) -> list[str]:
        held: list[str] = []
        for number, documents, _ in self.pieces():
            if number >= last:
                break
            held += documents[max(0, first - number) : last - number]
        if len(held) != last - first:
            raise MethodError(f"{self.name} has no such documents", got=f"{first}:{last}")
        return held

    def pieces(self, cursor: Cursor | None = None, *, size: int = _PIECE) -> Iterator[Piece]:
        from headwater.data.texts import documents_of

        at = cursor or {"file": 0, "place": 0, "row": 0, "document": 0}
        number, held, length = at["document"], list[str](), 0
        for index in range(at["file"], len(self.paths)):
            start = (at["place"], at["row"]) if index == at["file"] else (0, 0)
            for text, place, row in documents_of(self.paths[index], start, self.column, self.documents):
                held.append(text)
                length += len(text)
                if length >= size:
                    end = number + len(held)
                    yield number, held, {"file": index, "place": place, "row": row, "document": end}
                    number, held, length = end, [], 0
        if held:
            end = number + len(held)
            yield number, held, {"file": len(self.paths), "place": 0, "row": 0, "document": end}

    def identity(self) -> dict[str, Any]:
        options = {"column": self.column, "documents": self.documents, "batch": self.batch_size}
        return {"form": "text", **options, "files": [_ends(path) for path in self.paths]}


def gather(parts: Sequence[NDArray[Any]], starts: NDArray[Any], numbers: NDArray[np.int64]) -> NDArray[Any]:
    """[n, T]: these rows of several arrays [n_i, T] that follow one another; `starts` are their first numbers."""
    if len(parts) == 1:
        return np.asarray(parts[0][numbers])
    which = np.searchsorted(starts, numbers, side="right") - 1
    out = np.empty((len(numbers), parts[0].shape[1]), dtype=np.result_type(*(part.dtype for part in parts)))
    for one in np.unique(which).tolist():
        mine = which == one
        out[mine] = parts[one][numbers[mine] - starts[one]]
    return out


def map_raw(path: Path, dtype: Any, *, mode: Any = "r") -> NDArray[Any]:
    """A flat file of numbers as an array, mapped. Raises StoreError."""
    try:
        return np.memmap(path, dtype=dtype, mode=mode)
    except OSError as error:
        raise store_error(error, path, "read") from error
    except ValueError as error:  # an empty file, or one that is no whole number of them
        raise StoreError(f"cannot read numbers from {path}", got=str(error).splitlines()[0]) from None


def map_npy(path: Path) -> NDArray[Any]:
    """A `.npy` file as an array, mapped; no pickle. Raises StoreError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise store_error(error, path, "read") from error
    except ValueError as error:
        raise StoreError(f"{path} is no array", got=str(error).splitlines()[0]) from None


def check_dtype(dtype: str) -> str:
    """Refuse a type that token ids do not have."""
    if dtype not in _DTYPES:
        raise MethodError("unknown type of token ids", got=repr(dtype), wanted=did_you_mean(dtype, _DTYPES))
    return dtype


def _mapped(path: Path, dtype: str | None, sequence_length: int | None) -> NDArray[Any]:
    if path.suffix == ".npy":
        ids = map_npy(path)
    else:
        beside = path.with_suffix(".json")
        said = read_json(beside, what="the description of token ids") if beside.exists() else {}
        dtype = dtype or str(said.get("dtype", ""))
        if not dtype:
            raise MethodError(f"the type of the token ids in {path.name} is not known", fix="Give dtype")
        sequence_length = sequence_length or said.get("sequence_length")
        ids = map_raw(path, np.dtype(check_dtype(dtype)))
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim > 2:
        raise StoreError(f"{path} holds no token ids", got=f"{ids.dtype} {list(ids.shape)}", wanted="integers [n, T]")
    if ids.ndim == 2:
        if sequence_length not in (None, ids.shape[1]):
            raise MethodError(f"{path.name} has another length", got=sequence_length, wanted=ids.shape[1])
        return ids
    if not isinstance(sequence_length, int) or sequence_length < 1:
        raise MethodError(f"{path.name} is flat", got=sequence_length, fix="Give sequence_length")
    return ids[: len(ids) // sequence_length * sequence_length].reshape(-1, sequence_length)


def batch_of(size: int | None) -> int | None:
    if size is not None and size < 1:
        raise MethodError("a batch has at least one sequence", got=size)
    return size


def _files(what: Any) -> list[Path]:
    paths = [Path(one) for one in (what if isinstance(what, list | tuple) else [what])]
    if not paths:
        raise MethodError("a corpus of no files")
    if len(paths) > 1 or not paths[0].is_dir() or (paths[0] / "train.json").exists():
        return paths
    for suffix in (*TEXTS, ".npy", ".bin"):
        found = sorted(paths[0].rglob(f"*{suffix}"))
        if found:
            return found
    wanted = "train.json, or files of " + ", ".join((*TEXTS, ".npy", ".bin"))
    raise StoreError("no corpus in this folder", got=paths[0], wanted=wanted)


def _layout(paths: list[Path]) -> str:
    first = paths[0]
    if first.is_dir():
        return "run"
    if first.suffix in TEXTS:
        return "text"
    if first.suffix == ".idx" or first.with_suffix(".idx").exists() or Path(f"{first}.idx").exists():
        return "megatron"
    if not first.exists():
        raise StoreError("no such corpus", got=first, fix="Check the path")
    if first.suffix == ".npy":
        with first.open("rb") as file:
            return "tokens" if file.read(6) == b"\x93NUMPY" else "olmo"  # OLMo's files are flat, whatever their name
    if first.suffix == ".bin":
        return "tokens"
    raise StoreError("a corpus of unknown layout", got=first, wanted=f"one of: {', '.join(LAYOUTS)}", fix="Give layout")


def _make(kind: Any, what: Any, options: dict[str, Any]) -> Corpus:
    import inspect

    known = [name for name, p in inspect.signature(kind.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise MethodError(f"unknown option of {kind.__name__}", got=repr(name), wanted=did_you_mean(name, known))
    return kind(what, **options)


def _ends(path: Path) -> dict[str, Any]:
    """Name, size and a hash of the first and last 64 KiB of a file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
    except OSError as error:
        raise store_error(error, path, "read") from error
    return {"name": path.name, "size": size, "sha256": digest.hexdigest()}

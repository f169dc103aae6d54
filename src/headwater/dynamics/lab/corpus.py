"""The sources of a run put together: read or made, tokenized once, and served in training order."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError, ModelError
from headwater.core.files import read_json, store_error, to_json, write_whole
from headwater.core.progress import track
from headwater.dynamics.lab.change import Change
from headwater.dynamics.lab.change import load as load_change
from headwater.dynamics.lab.config import DataConfig, TrainConfig, ValidationConfig
from headwater.dynamics.lab.corrupting import Corrupted
from headwater.dynamics.lab.order import Order, Stream, key
from headwater.dynamics.lab.sources import Array, batch_of, is_file, is_text, read_array, read_texts, sources
from headwater.dynamics.lab.words import SEPARATOR, vocabulary_of, word_tokenizer

_AT_ONCE = 1000  # documents given to the tokenizer together


@dataclass(frozen=True)
class Data:
    """What a run trains on. `order.samples(a, b)` says which sequences; `rows` gives their tokens.

    sources: those of the config, in order. loss_at: [sources, sequence_length] bool, which tokens are predicted.
    validation: name -> (tokens [n, T], loss_at [T]). change: what `redo` has changed: `rows` follows it, `order` is the
    unchanged one.
    """

    sources: tuple[Any, ...]
    order: Order
    sequence_length: int
    vocabulary: int
    tokenizer: Any | None
    loss_at: NDArray[np.bool_]
    validation: dict[str, tuple[NDArray[np.int64], NDArray[np.bool_]]]
    change: Change | None = None

    def rows(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(tokens [n, T], loss_at [n, T]) of samples first .. last-1 of the training order."""
        return self.at(np.arange(first, last, dtype=np.int64))

    def at(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The same for the samples with these numbers."""
        which, sequence = self.places(numbers)
        out = np.empty((len(which), self.sequence_length), dtype=np.int64)
        for number, source in enumerate(self.sources):
            mine = which == number
            if mine.any():
                out[mine] = batch_of(source, sequence[mine])
        return out, self.loss_at[which]

    def places(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, sequence within the source) of the samples with these numbers, as the run sees them."""
        return self.order.at(numbers if self.change is None else self.change.shown(numbers))

    def corrupted(self, first: int, last: int) -> NDArray[np.bool_]:
        """[n] which of samples first .. last-1 carry another sequence's label."""
        which, sequence = self.places(np.arange(first, last, dtype=np.int64))
        out = np.zeros(len(which), dtype=bool)
        for number, source in enumerate(self.sources):
            mine = which == number
            if isinstance(source, Corrupted) and mine.any():
                out[mine] = source.corrupted(sequence[mine])
        return out

    def weights(self, first: int, last: int) -> NDArray[np.float64] | None:
        """[n] what the losses of samples first .. last-1 are multiplied by; None where all of the run weigh 1."""
        return None if self.change is None else self.change.weight(np.arange(first, last, dtype=np.int64))

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens of up to 64 sequences of each source: whether the data is still the same."""
        digest = hashlib.sha256()
        for source in self.sources:
            places = np.unique(np.linspace(0, source.n_sequences - 1, 64).astype(np.int64))
            digest.update(f"{source.n_sequences} {source.sequence_length}".encode())
            digest.update(np.ascontiguousarray(batch_of(source, places)).tobytes())
        return digest.hexdigest()


class Trained:
    """The sequences of a run in training order: a source itself. `tokens(k)` is the k-th sequence that was seen.

    n_sequences counts those of the whole run; `seen(step)` those before the update that makes step + 1.
    """

    def __init__(self, data: Data, *, batch: int, steps: int) -> None:
        self.data, self.batch_size, self.steps = data, batch, steps
        self.n_sequences, self.sequence_length = batch * steps, data.sequence_length

    def tokens(self, index: int) -> NDArray[np.int64]:
        return self.data.rows(index, index + 1)[0][0]

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.data.at(np.asarray(indices, dtype=np.int64))[0]

    def step(self, step: int) -> NDArray[np.int64]:
        """[batch, T]: exactly what the update from step to step + 1 saw; steps are counted from 0."""
        if not 0 <= step < self.steps:
            raise MethodError("no such step in this run", got=step, wanted=f"0 to {self.steps - 1}")
        return self.data.rows(step * self.batch_size, (step + 1) * self.batch_size)[0]

    def seen(self, step: int) -> int:
        """How many sequences the checkpoint of that step had seen."""
        return min(step, self.steps) * self.batch_size


def assemble(config: TrainConfig, folder: Path | None) -> Data:
    """Read or make the sources of a config. Tokens of texts are kept in `folder` (`<hash>.bin`) and read from there.

    Raises MethodError where sources do not fit together, StoreError where one cannot be read.
    """
    tokenizer = _tokenizer(config)
    made = [_source(one, config, tokenizer, folder) for one in config.data]
    made = [
        Corrupted(source, one.corrupt, config.seed if one.corrupt_seed is None else one.corrupt_seed)
        if one.corrupt
        else source
        for one, source in zip(config.data, made, strict=True)
    ]
    lengths = [source.sequence_length for source in made]
    if len(set(lengths)) > 1:
        raise MethodError("the sources differ in the length of their sequences", got=lengths)
    words = {tuple(source.words) for source in made if getattr(source, "words", None) is not None}
    if len(words) > 1:
        raise MethodError("the sources differ in their words", got=f"{len(words)} vocabularies", fix="Give a tokenizer")
    if tokenizer is None and words:
        tokenizer = word_tokenizer(list(words.pop()), whole=True)
    length = lengths[0]
    validation: dict[str, tuple[NDArray[np.int64], NDArray[np.bool_]]] = {}
    for one in config.validation:
        source = _source(one, config, tokenizer, folder)
        if source.sequence_length != length:
            raise MethodError(
                f"the sequences of {one.name} have another length", got=source.sequence_length, wanted=length
            )
        n = min(one.sequences, source.n_sequences)
        # of a source with an end an even choice: its first sequences may be of one sort
        places = np.arange(n) if source.n_sequences > 1 << 40 else np.arange(n) * (source.n_sequences // n)
        validation[one.name] = (batch_of(source, places), _loss_at(source))
    return Data(
        sources=tuple(made),
        order=Order(_streams(config.data, made, config.seed), key(config.seed, "order")),
        sequence_length=length,
        vocabulary=_vocabulary(config, made, tokenizer),
        tokenizer=tokenizer,
        loss_at=np.stack([_loss_at(source) for source in made]),
        validation=validation,
        change=None if config.change is None else load_change(folder, config.change),
    )


def _streams(configs: tuple[DataConfig, ...], made: list[Any], seed: int) -> list[Stream]:
    streams: list[Stream] = []
    for number, (one, source) in enumerate(zip(configs, made, strict=True)):
        n = source.n_sequences if one.limit is None else min(one.limit, source.n_sequences)
        if one.repeat is None:
            # of a source that never runs out one order is as random as another
            shuffle = one.shuffle and n < 1 << 40
            streams.append(Stream(source=number, n=n, weight=one.weight, shuffle=shuffle))
            continue
        again = one.repeat.sequences
        if again >= n:
            raise MethodError(
                f"the repeated part of {one.source} leaves nothing else", got=again, wanted=f"fewer than {n} sequences"
            )
        share = one.weight * one.repeat.share
        streams.append(Stream(source=number, n=again, weight=share, part=(0, again), total=n))
        streams.append(Stream(source=number, n=n - again, weight=one.weight - share, part=(again, n), total=n))
    return streams


def _loss_at(source: Any) -> NDArray[np.bool_]:
    given = getattr(source, "loss_at", None)
    at = np.ones(source.sequence_length, dtype=bool) if given is None else np.array(given, dtype=bool)
    if at.shape != (source.sequence_length,):
        raise MethodError("loss_at of a source does not fit", got=list(at.shape), wanted=[source.sequence_length])
    at[0] = False
    if not at.any():
        raise MethodError("a source predicts no token", wanted="loss_at with a place after the first token")
    return at


def _source(one: DataConfig | ValidationConfig, config: TrainConfig, tokenizer: Any, folder: Path | None) -> Any:
    options = dict(one.options)
    if not is_file(one.source):
        generator = sources.get(one.source)
        options.setdefault("seed", config.seed)
        try:
            return generator(**options)
        except TypeError as error:
            raise MethodError(f"the options of the source {one.source!r} do not fit", got=str(error)) from None
    if not is_text(one.source):
        return read_array(one.source, config.sequence_length, **_allowed(options, one.source, "dtype"))
    if tokenizer is None:
        raise MethodError(f"the text {one.source} needs a tokenizer", fix='Set tokenizer to a folder, or to "words"')
    if config.sequence_length is None:
        raise MethodError(f"the text {one.source} is cut into sequences", fix="Set sequence_length")
    return _tokenized(one.source, options, config.sequence_length, tokenizer, folder)


def _allowed(options: dict[str, Any], source: str, *known: str) -> dict[str, Any]:
    if unknown := sorted(set(options) - set(known)):
        raise MethodError(f"unknown options of {source}", got=", ".join(unknown), wanted=", ".join(known))
    return options


def _texts(source: str, options: dict[str, Any]) -> Iterator[str]:
    known = _allowed(options, source, "documents", "column", "separator")
    return read_texts(source, **{name: value for name, value in known.items() if name != "separator"})


def _tokenizer(config: TrainConfig) -> Any | None:
    if config.tokenizer is None:
        return None
    if config.tokenizer == "words":
        files = [one for one in config.data if is_file(one.source) and is_text(one.source)]
        if not files:
            raise MethodError("the tokenizer of words needs a text among the data", fix="Leave the tokenizer out")
        texts = (text for one in files for text in _texts(one.source, one.options))
        return word_tokenizer(vocabulary_of(texts, config.vocabulary))
    from headwater.core.loading_hf import calm, find_tokenizer

    with calm():
        found = find_tokenizer(config.tokenizer, config.tokenizer, {})
    if found is None:
        raise ModelError(f"no tokenizer in {config.tokenizer}")
    return found


def _vocabulary(config: TrainConfig, made: list[Any], tokenizer: Any | None) -> int:
    """How many token ids the model gets: as told, else the tokenizer's or the sources' own."""
    known = [int(size) for source in made if (size := getattr(source, "vocabulary", None)) is not None]
    if tokenizer is not None:
        known.append(len(tokenizer))
    if config.vocabulary is not None and config.tokenizer != "words":
        if known and max(known) > config.vocabulary:
            got = f"vocabulary {config.vocabulary}"
            raise MethodError("the vocabulary is too small for the data", got=got, wanted=f"at least {max(known)}")
        return config.vocabulary
    if not known:
        # a file of ids says it only by its largest one
        return int(max(int(source.batch(np.arange(source.n_sequences)).max()) for source in made)) + 1
    return max(known)


def _tokenized(source: str, options: dict[str, Any], length: int, tokenizer: Any, folder: Path | None) -> Any:
    """The text as one row of token ids, each document closed by the separator, cut into sequences."""
    separator = options.get("separator") or tokenizer.eos_token or tokenizer.bos_token or SEPARATOR
    mark = tokenizer.convert_tokens_to_ids(separator)
    if mark is None or (mark == tokenizer.unk_token_id and separator != tokenizer.unk_token):
        raise MethodError(
            f"the tokenizer has no token {separator!r} to set documents apart", fix="Set options.separator"
        )
    wide = len(tokenizer) > 1 << 16
    dtype = "uint32" if wide else "uint16"

    def chunks() -> Iterator[bytes]:
        held: list[str] = []
        for text in track(_texts(source, options), f"tokenizing {Path(source).name}"):
            held.append(text)
            if len(held) == _AT_ONCE:
                yield _encoded(tokenizer, held, mark, dtype)
                held = []
        if held:
            yield _encoded(tokenizer, held, mark, dtype)

    if folder is None:
        ids = np.frombuffer(b"".join(chunks()), dtype=dtype)
        return Array(ids, length, what=f"the tokens of {source}")
    try:
        stat = os.stat(source)
    except OSError as error:
        raise store_error(error, Path(source), "read") from error
    about = {
        "source": Path(source).name, "bytes": stat.st_size, "modified": stat.st_mtime_ns, "options": options,
        "separator": separator, "dtype": dtype, "tokenizer": _tokenizer_hash(tokenizer),
    }  # fmt: skip
    name = hashlib.sha256(to_json(about).encode()).hexdigest()[:16]
    head = folder / f"{name}.json"
    if not head.exists() or read_json(head, what="the note beside a file of tokens") != about:
        _write_chunks(folder / f"{name}.bin", chunks())
        write_whole(head, to_json(about).encode())  # after the tokens: what it lies beside is whole
    return read_array(folder / f"{name}.bin", length, dtype=dtype)


def _encoded(tokenizer: Any, texts: list[str], mark: int, dtype: str) -> bytes:
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.array([token for row in rows for token in (*row, mark)], dtype=dtype).tobytes()


def _write_chunks(path: Path, chunks: Iterator[bytes]) -> None:
    temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise store_error(error, path, "write") from error
    finally:
        temporary.unlink(missing_ok=True)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of its vocabulary and, where it has one, of its whole serialized pipeline."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else to_json(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


__all__ = ["Data", "Trained", "assemble"]

"""A suffix array over a corpus: how often any n-gram stands in it, of any length, and what comes after it."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError
from headwater.core.files import read_json, to_json, whole_folder, write_bytes
from headwater.core.progress import track
from headwater.data.corpus import Corpus, TokenCorpus, map_npy

FORMAT = 1
_END = 0  # between sequences; token ids are held one higher


@dataclass(frozen=True)
class Next:
    """What follows an n-gram: tokens [k], counts [k], the most frequent first. used: how many of the last tokens of the
    context it was found by. total: how often those stand in the corpus (at the end of a sequence nothing follows)."""

    tokens: NDArray[np.int64]
    counts: NDArray[np.int64]
    used: int
    total: int

    @property
    def shares(self) -> NDArray[np.float64]:
        """[k] of all that followed."""
        return self.counts / max(int(self.counts.sum()), 1)


class NgramIndex:
    """All suffixes of a corpus in order (Manber and Myers, 1993), sorted by libdivsufsort: an n-gram of any length is
    found by bisection. N-grams do not reach from one sequence into the next.

    Made by `build`, kept by `save`, opened (mapped, not read) by `open`. Building needs `pip install 'headwater[data]'`
    and about 9 bytes a byte of token ids.

    Known failure: counts are of token ids. The same words are other ids after a space, in capitals, or by another
    tokenizer, so ask by the ids that the corpus's own tokenizer writes.
    """

    def __init__(self, tokens: NDArray[Any], suffixes: NDArray[Any], sequence_length: int, n_sequences: int) -> None:
        self._tokens, self._suffixes = tokens, suffixes
        self.sequence_length, self.n_sequences = sequence_length, n_sequences

    @classmethod
    def build(cls, corpus: Any, *, sequences: int | None = None) -> "NgramIndex":
        """Of a corpus of token ids, or what `Corpus.open` takes. sequences: only the first so many, in its order."""
        try:
            from pydivsufsort import divsufsort
        except ImportError:
            raise MethodError("an n-gram index needs pydivsufsort", fix="pip install 'headwater[data]'") from None
        found = Corpus.open(corpus)
        if not isinstance(found, TokenCorpus):
            raise MethodError(
                f"{found.name} holds texts", wanted="token ids", fix="Train on it, or write its token ids"
            )
        n = min(found.n_sequences, sequences or found.n_sequences)
        width = found.sequence_length + 1
        parts: list[NDArray[Any]] = []
        largest = 0
        for start in track(range(0, n, 1 << 14), f"reading {found.name}"):
            rows = np.asarray(found.between(start, min(start + (1 << 14), n)), dtype=np.int64)
            if rows.min() < 0:
                raise MethodError(f"{found.name} holds token ids below 0", got=int(rows.min()))
            largest = max(largest, int(rows.max()))
            ended = np.full((len(rows), width), _END, dtype=np.uint16 if largest + 1 < 1 << 16 else np.uint32)
            ended[:, :-1] = rows + 1
            parts.append(ended.reshape(-1))
        tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)
        if not len(tokens):
            raise MethodError("there is nothing to index", got=f"{found.name}: no sequence")
        suffixes = np.asarray(divsufsort(tokens))
        small = len(tokens) < 1 << 31
        return cls(tokens, suffixes.astype(np.int32 if small else np.int64), found.sequence_length, n)

    @classmethod
    def open(cls, folder: str | Path) -> "NgramIndex":
        """A saved index. Raises StoreError where there is none."""
        path = Path(folder)
        head = read_json(path / "index.json", what="index.json (what makes a folder an n-gram index)")
        if head.get("format") != FORMAT:
            raise StoreError(f"{path} is an index of another format", got=head.get("format"), wanted=FORMAT)
        tokens, suffixes = map_npy(path / "tokens.npy"), map_npy(path / "suffixes.npy")
        if not len(tokens) == len(suffixes) == head.get("n_sequences", 0) * (head.get("sequence_length", 0) + 1):
            raise StoreError(f"{path} is damaged", got=f"{len(tokens)} tokens, {len(suffixes)} suffixes")
        return cls(tokens, suffixes, head["sequence_length"], head["n_sequences"])

    def save(self, folder: str | Path) -> Path:
        """Write it, whole or not at all."""
        path = Path(folder)
        with whole_folder(path, replaces="index.json") as temporary:
            np.save(temporary / "tokens.npy", self._tokens)
            np.save(temporary / "suffixes.npy", self._suffixes)
            head = {"format": FORMAT, "n_sequences": self.n_sequences, "sequence_length": self.sequence_length}
            write_bytes(temporary / "index.json", to_json(head).encode())
        return path

    def count(self, ngram: Sequence[int]) -> int:
        """How often these token ids stand one after the other."""
        low, high = self._range(ngram)
        return high - low

    def find(self, ngram: Sequence[int], limit: int = 100) -> list[tuple[int, int]]:
        """Where they stand: (sequence, place in it), rising; at most `limit`, the first of the index's own order."""
        low, high = self._range(ngram)
        places = np.sort(np.asarray(self._suffixes[low : min(high, low + limit)], dtype=np.int64))
        width = self.sequence_length + 1
        return [(int(place) // width, int(place) % width) for place in places]

    def longest(self, context: Sequence[int]) -> tuple[int, int]:
        """(tokens, count) of the longest end of the context that stands in the corpus."""
        low, high = 0, len(context)  # an end of an n-gram that is there is there too
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(context[len(context) - middle :]) else (low, middle - 1)
        return low, self.count(context[len(context) - low :])

    def matches(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """[n] for each place of a text, how many tokens from there on stand in the corpus as they are."""
        out = np.zeros(len(tokens), dtype=np.int64)
        length = 0
        for start in range(len(tokens)):
            length = max(length - 1, 0)
            while start + length < len(tokens) and self.count(tokens[start : start + length + 1]):
                length += 1
            out[start] = length
        return out

    def next(self, context: Sequence[int], *, backoff: bool = True) -> Next:
        """What follows the context; with `backoff` its longest end that anything follows, as the infini-gram language
        model has it (Liu et al., 2024)."""
        used = self.longest(context)[0] if backoff else len(context)
        while True:
            low, high = self._range(context[len(context) - used :])
            after = np.asarray(self._suffixes[low:high], dtype=np.int64) + used
            after = self._tokens[after]  # what ends a sequence is there too, and is no token
            tokens, counts = np.unique(after[after != _END], return_counts=True)
            if len(tokens) or not backoff or not used:
                order = np.argsort(-counts, kind="stable")
                return Next(tokens[order].astype(np.int64) - 1, counts[order].astype(np.int64), used, high - low)
            used -= 1

    def _range(self, ngram: Sequence[int]) -> tuple[int, int]:
        """Which of the sorted suffixes begin with it; all that begin with a token, for an empty one."""
        tokens, suffixes = self._tokens, self._suffixes
        # the ends of sequences sort first, and there are as many as sequences
        low, high = self.n_sequences, len(suffixes)
        for depth, token in enumerate(ngram):
            wanted = int(token) + 1
            if wanted < 1:
                raise MethodError("token ids are not negative", got=int(token))

            def at(place: int, depth: int = depth) -> int:
                return int(tokens[suffixes[place] + depth])

            places = range(low, high)
            low, high = (
                low + bisect.bisect_left(places, wanted, key=at), low + bisect.bisect_right(places, wanted, key=at)
            )  # fmt: skip
            if low == high:
                break
        return low, high

"""The data order as a pure function of the seed: which sequence of which source is the k-th that a model sees.

Nothing is shuffled in memory and nothing is remembered. A permutation of n indices is a keyed Feistel network on the
smallest power of four that holds n, walked until it lands inside (Black and Rogaway, 2002), so any place of any epoch
costs the same few operations, and `Order.samples(first, last)` needs no sample before `first`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError

Ints = NDArray[np.int64]
BLOCK = 4096
"""Samples within which the shares of several sources are met exactly."""
_ROUNDS = 8
_TABLE = 1 << 15  # permutations this small are looked up: the same values, a tenth of the time
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key(*parts: object) -> int:
    """A 63-bit number that depends on the parts alone: the same on every machine, for every version of Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al., 2014): one number in, one that looks unrelated out."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A random-looking bijection of 0 .. n-1 onto itself, given by a key; evaluated where it is asked for."""

    def __init__(self, n: int, key_: int) -> None:
        if n < 1:
            raise MethodError("a permutation needs at least one index", got=n)
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = _mixed(np.uint64(key_) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)
        self._table = self._walk(np.arange(n)) if n <= _TABLE else None

    def __call__(self, places: Ints) -> Ints:
        """Where each place goes; places lie in 0 .. n-1."""
        return self._walk(places) if self._table is None else self._table[places]

    def _walk(self, places: Ints) -> Ints:
        x = np.asarray(places, dtype=np.uint64).copy()
        todo = np.ones(x.shape, dtype=bool)
        while todo.any():
            x[todo] = self._once(x[todo])
            todo &= x >= self.n
        return x.astype(np.int64)

    def _once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for one in self._keys:
            left, right = right, left ^ (_mixed(right ^ one) & self._mask)
        return (left << self._half) | right


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One source's part in the order.

    source: its number. n: its sequences (of the part that this stream draws from). weight: its share of the samples.
    part: None for the whole source; else (first, last): those places of the source's split by `split_key`, so that two
    streams may share a source without sharing a sequence. shuffle: else the sequences come as they are numbered.
    """

    source: int
    n: int
    weight: float
    part: tuple[int, int] | None = None
    total: int = 0
    """Sequences of the whole source (with `part`)."""
    shuffle: bool = True


class Order:
    """Which (source, sequence) is sample k, for every k: a pure function of seed and streams.

    A stream is run through epoch after epoch, each in an order of its own. With several streams, every `BLOCK` samples
    hold each in its exact share (to the nearest 1 / BLOCK), scattered.
    """

    def __init__(self, streams: Sequence[Stream], seed: int) -> None:
        if not streams:
            raise MethodError("a data order needs a source")
        self.streams, self.seed = tuple(streams), seed
        self._quota = _quotas([stream.weight for stream in streams])
        self._starts = np.concatenate([[0], np.cumsum(self._quota)]).astype(np.int64)
        self._permutations: dict[tuple[object, ...], Permutation] = {}

    def samples(self, first: int, last: int) -> tuple[Ints, Ints]:
        """(source, sequence within the source) of samples first .. last-1."""
        return self.at(np.arange(first, last, dtype=np.int64))

    def at(self, numbers: Ints) -> tuple[Ints, Ints]:
        """(source, sequence within the source) of the samples with these numbers."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if numbers.size and numbers.min() < 0:
            raise MethodError("samples are counted from 0", got=int(numbers.min()))
        which, place = self._streams_of(numbers)
        source, sequence = np.empty_like(numbers), np.empty_like(numbers)
        for number, stream in enumerate(self.streams):
            mine = which == number
            if mine.any():
                source[mine] = stream.source
                sequence[mine] = self._sequences(number, stream, place[mine])
        return source, sequence

    def stream_of(self, numbers: Ints) -> Ints:
        """Which stream each of these samples comes from."""
        return self._streams_of(np.asarray(numbers, dtype=np.int64))[0]

    def epoch_of(self, stream: int, samples: int) -> float:
        """How many times the stream has been gone through after that many samples in all (in whole blocks exact)."""
        share = float(self._quota[stream]) / float(self._starts[-1])
        return samples * share / self.streams[stream].n

    def _streams_of(self, numbers: Ints) -> tuple[Ints, Ints]:
        """(stream, place within the stream) of each sample."""
        if len(self.streams) == 1:
            return np.zeros_like(numbers), numbers
        block, offset = numbers // BLOCK, numbers % BLOCK
        slot = np.empty_like(numbers)
        for one in np.unique(block).tolist():
            mine = block == one
            slot[mine] = self._permutation(BLOCK, "block", one)(offset[mine])
        which = np.searchsorted(self._starts, slot, side="right").astype(np.int64) - 1
        return which, block * self._quota[which] + slot - self._starts[which]

    def _sequences(self, number: int, stream: Stream, place: Ints) -> Ints:
        epoch, within = place // stream.n, place % stream.n
        if stream.shuffle:
            out = np.empty_like(within)
            for one in np.unique(epoch).tolist():
                mine = epoch == one
                out[mine] = self._permutation(stream.n, "epoch", number, one)(within[mine])
            within = out
        if stream.part is None:
            return within
        # the split is of the source, so the streams that share it agree on it
        return self._permutation(stream.total, "split", stream.source)(within + stream.part[0])

    def _permutation(self, n: int, *what: object) -> Permutation:
        name = (n, *what)
        if name not in self._permutations:
            if len(self._permutations) > 64:
                self._permutations.clear()
            self._permutations[name] = Permutation(n, key(self.seed, *what))
        return self._permutations[name]


def _quotas(weights: Sequence[float]) -> Ints:
    """How many of BLOCK samples each stream gets, by largest remainder; at least one for a weight above zero."""
    if any(not weight > 0 for weight in weights):
        raise MethodError("a source needs a share above zero", got=list(weights), fix="Leave it out of the data")
    if len(weights) > BLOCK:
        raise MethodError("too many sources", got=len(weights), wanted=f"at most {BLOCK}")
    exact = np.asarray(weights, dtype=np.float64) * (BLOCK / sum(weights))
    quota = np.maximum(np.floor(exact), 1).astype(np.int64)
    while quota.sum() != BLOCK:
        step = 1 if quota.sum() < BLOCK else -1
        off = (exact - quota) * step
        off[(quota + step) < 1] = -np.inf
        quota[int(np.argmax(off))] += step
    return quota

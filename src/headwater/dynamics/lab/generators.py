"""Training data that is made up as it is asked for: sequence i is a function of the seed and i.

Each is a function of its options that gives a source (see `sources`), registered by name.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError
from headwater.dynamics.lab.order import Permutation, key
from headwater.dynamics.lab.sources import sources

FRESH = 1 << 48
"""Sequences of a source that never runs out."""


def _random(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


@dataclass
class Made:
    """A generated source. `words[i]` is token i; `loss_at` says which tokens are predicted."""

    n_sequences: int
    sequence_length: int
    words: list[str]
    make: Any = field(repr=False)
    loss_at: NDArray[np.bool_] | None = None

    @property
    def vocabulary(self) -> int:
        return len(self.words)

    def tokens(self, index: int) -> NDArray[np.int64]:
        return self.make(index)

    def batch(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.stack([self.make(int(index)) for index in indices])


def _sizes(what: str, **sizes: int) -> None:
    if wrong := {name: size for name, size in sizes.items() if size < 1}:
        raise MethodError(f"the options of the source {what} do not fit", got=wrong, wanted="at least 1")


def _count(sequences: int | None) -> int:
    return FRESH if sequences is None else sequences


@sources.register("induction")
def induction(
    *,
    vocabulary: int = 64,
    length: int = 48,
    period: int | None = None,
    repeats_only: bool = False,
    sequences: int | None = None,
    seed: int = 0,
) -> Made:
    """Random tokens that repeat: what an induction head is for (Olsson et al., 2022).

    A sequence is `period` distinct random tokens (drawn anew for each sequence between length/4 and length/2 where it
    is None), said over and over until `length` tokens are full. repeats_only: with a period, only what the repetition
    tells is predicted (from the second token of the second time on). sequences: how many there are; None: never the
    same.
    """
    _sizes("induction", vocabulary=vocabulary, length=length, sequences=_count(sequences), period=period or 1)
    low, high = (period, period) if period else (max(2, length // 4), max(2, length // 2))
    if high > vocabulary or high > length:
        raise MethodError(
            "the period of an induction source does not fit", got=f"up to {high} distinct tokens",
            wanted=f"at most the vocabulary, {vocabulary}, and the length, {length}",
        )  # fmt: skip
    if repeats_only and (period is None or period + 2 > length):
        raise MethodError("repeats_only needs a period that comes again", got=period, wanted=f"at most {length - 2}")
    own = key(seed, "induction")
    at = np.arange(length) > period if repeats_only and period else None

    def make(index: int) -> NDArray[np.int64]:
        random = _random(own, index)
        once = random.permutation(vocabulary)[: random.integers(low, high + 1)]
        return np.resize(once, length).astype(np.int64)

    return Made(_count(sequences), length, [f"t{i}" for i in range(vocabulary)], make, at)


@sources.register("modular_addition")
def modular_addition(
    *, p: int = 43, share: float = 0.4, split: Literal["train", "test", "all"] = "train", seed: int = 0
) -> Made:
    """`a b = c` with c = (a + b) mod p, only c predicted: the data of grokking (Power et al., 2022).

    share: of the unordered pairs {a, b}, how many are trained on; a pair and its mirror are on one side, as one gives
    the other away. split: which side. The seed says which pairs; give train and test the same `share` and `seed`.
    """
    _sizes("modular_addition", p=p)
    if not 0 < share <= 1 or split not in ("train", "test", "all"):
        got = f"share {share}, split {split!r}"
        raise MethodError("the split does not fit", got=got, wanted="0 < share <= 1; train, test or all")
    a, b = np.triu_indices(p)
    chosen = np.zeros(len(a), dtype=bool)
    chosen[Permutation(len(a), key(seed, "modular_addition", p))(np.arange(max(1, round(share * len(a)))))] = True
    mine = chosen if split == "train" else ~chosen if split == "test" else np.ones_like(chosen)
    if not mine.any():
        raise MethodError(f"no pair is left for {split}", got=f"share {share}", fix="Take a smaller share")
    table = np.zeros((p, p), dtype=bool)
    table[a[mine], b[mine]] = table[b[mine], a[mine]] = True
    pairs = np.argwhere(table)
    rows = np.column_stack([pairs, np.full(len(pairs), p), pairs.sum(axis=1) % p]).astype(np.int64)
    at = np.array([False, False, False, True])
    return Made(len(rows), 4, [*map(str, range(p)), "="], lambda index: rows[index], at)


@sources.register("moving_sum")
def moving_sum(*, p: int = 17, length: int = 16, window: int = 2, sequences: int | None = None, seed: int = 0) -> Made:
    """x_1 .. x_n ; y_1 .. y_n with y_i the sum mod p of the last `window` x up to i, only y predicted.

    Its loss stays on a plateau, while the output repeats itself, before it is learned at once (Gopalani and Hu, 2025).
    """
    _sizes("moving_sum", p=p, length=length, window=window, sequences=_count(sequences))
    own = key(seed, "moving_sum")

    def make(index: int) -> NDArray[np.int64]:
        x = _random(own, index).integers(0, p, length)
        total = np.concatenate([[0], np.cumsum(x)])
        first = np.maximum(np.arange(1, length + 1) - window, 0)
        return np.concatenate([x, [p], (total[1:] - total[first]) % p]).astype(np.int64)

    at = np.arange(2 * length + 1) > length
    return Made(_count(sequences), 2 * length + 1, [*map(str, range(p)), ";"], make, at)

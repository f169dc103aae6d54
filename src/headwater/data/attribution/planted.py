"""Facts planted in noise, so that it is known which sequences taught each: what attribution is judged on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError


@dataclass(frozen=True)
class Planted:
    """rows [sequences, length]; truth [facts, sequences]: which sequences state which fact; queries [facts, 3]:
    subject, relation, object; pairs: (subject, object) as words; words: by token id."""

    rows: NDArray[np.int64]
    truth: NDArray[np.bool_]
    queries: NDArray[np.int64]
    pairs: list[tuple[str, str]]
    words: list[str]


def planted(
    *, facts: int = 24, sequences: int = 1500, share: float = 0.009, lures: int = 3, length: int = 16,
    fillers: int = 80, relations: int = 3, seed: int = 0,
) -> Planted:  # fmt: skip
    """Sequences of random words, in some of which a fact is stated as subject, relation, object.

    share: of the sequences that state a given fact, the base rate. lures: sequences for each fact that mention object,
    relation and subject apart, and state nothing; all others mention one subject and the object of another fact.
    """
    stated = round(share * sequences)
    if stated < 1 or facts < 2 or length < 6 or facts * (stated + lures) > sequences:
        raise MethodError("the planted facts do not fit", got=f"{facts} facts, {stated} times each", wanted=sequences)
    draw = np.random.default_rng(seed)
    words = [*(f"w{i}" for i in range(fillers)), *(f"r{i}" for i in range(relations))]
    words += [f"s{i}" for i in range(facts)] + [f"o{i}" for i in range(facts)]
    relation, subject, target = fillers, fillers + relations, fillers + relations + facts
    which = draw.integers(0, relations, facts)
    answer = draw.permutation(facts)
    rows = draw.integers(0, fillers, (sequences, length))
    truth = np.zeros((facts, sequences), dtype=bool)
    order = iter(draw.permutation(sequences).tolist())
    for fact in range(facts):
        for _ in range(stated):
            row = next(order)
            at = int(draw.integers(0, length - 3))
            rows[row, at : at + 3] = subject + fact, relation + which[fact], target + answer[fact]
            truth[fact, row] = True
        for _ in range(lures):
            row = rows[next(order)]
            _apart(row, subject + fact, int(target + answer[fact]), draw)
            free = np.flatnonzero(row < fillers)
            row[int(draw.choice(free))] = relation + which[fact]
    for row in order:
        fact = int(draw.integers(facts))
        other = int(draw.choice([one for one in range(facts) if one != fact]))
        _apart(rows[row], subject + fact, int(target + answer[other]), draw)
    queries = np.stack([subject + np.arange(facts), relation + which, target + answer], axis=1)
    pairs = [(f"s{fact}", f"o{answer[fact]}") for fact in range(facts)]
    return Planted(rows.astype(np.int64), truth, queries.astype(np.int64), pairs, words)


def _apart(row: NDArray[Any], one: int, other: int, draw: np.random.Generator) -> None:
    """Put both somewhere, at least two places from one another, the object first: nothing is stated."""
    first = int(draw.integers(0, len(row) - 2))
    row[first], row[int(draw.integers(first + 2, len(row)))] = other, one

"""Symbolic regression on integers: the shortest expression of a small family that gives every row exactly.

In the order tried: a constant, an affine form (least squares, rounded, checked), Boolean forms, affine forms with one
absolute value, maximum or minimum, a comparison of an affine form, an affine form modulo or divided by a small
number. What nothing explains may be a table. Nothing is accepted that is wrong on a single row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Form = Literal["constant", "affine", "boolean", "piecewise", "comparison", "modular", "table"]
_MODULI = tuple(range(2, 17))


@dataclass(frozen=True, kw_only=True)
class Expression:
    """A Python expression of the features' names."""

    text: str
    form: Form


def fit(features: Mapping[str, Ints], target: Ints, *, table: bool = False) -> Expression | None:
    """The expression of integer features [N] that equals the target [N] on every row; None where none is known.

    table: whether a dictionary of all rows may be the answer.
    """
    rows = np.stack([*features.values(), target], 1) if features else target[:, None]
    rows = np.unique(rows, axis=0)
    names, columns, wanted = list(features), rows[:, :-1], rows[:, -1]
    if len(np.unique(columns, axis=0)) < len(columns):
        return None  # no function of these features
    if len(np.unique(wanted)) == 1:
        return Expression(text=str(int(wanted[0])), form="constant")
    for attempt in (_affine, _boolean, _piecewise, _comparison, _modular):
        found = attempt(names, columns, wanted)
        if found is not None:
            return found
    if table and len(rows) <= 400:
        return _table(names, columns, wanted)
    return None


def affine_text(names: Sequence[str], coefficients: Sequence[int], constant: int = 0) -> str:
    """`2*a - b + 1`; `0` where all is nought."""
    parts: list[str] = []
    for name, value in zip(names, coefficients, strict=True):
        value = int(value)
        if value:
            sign = ("-" if value < 0 else "") if not parts else (" - " if value < 0 else " + ")
            parts.append(f"{sign}{name}" if abs(value) == 1 else f"{sign}{abs(value)}*{name}")
    constant = int(constant)
    if constant or not parts:
        parts.append(str(constant) if not parts else f" {'-' if constant < 0 else '+'} {abs(constant)}")
    return "".join(parts)


def rounded_least_squares(columns: Ints, wanted: Ints, *, largest: int = 1000) -> Ints | None:
    """Integer coefficients (the last is the constant) with which the columns give the target exactly; or None."""
    design = np.concatenate([columns, np.ones((len(columns), 1), dtype=np.int64)], axis=1)
    found, *_ = np.linalg.lstsq(design.astype(float), wanted.astype(float), rcond=None)
    found = np.rint(found)
    if not np.isfinite(found).all() or np.abs(found).max(initial=0) > largest:
        return None
    exact = found.astype(np.int64)
    return exact if np.array_equal(design @ exact, wanted) else None


def _affine(names: list[str], columns: Ints, wanted: Ints) -> Expression | None:
    found = rounded_least_squares(columns, wanted)
    if found is None:
        return None
    return Expression(text=affine_text(names, found[:-1].tolist(), found[-1]), form="affine")


def _piecewise(names: list[str], columns: Ints, wanted: Ints) -> Expression | None:
    """Affine in the features, plus absolute values of them, or one absolute value, maximum or minimum of two."""
    n = len(names)
    if not n or n > 8:
        return None
    single = [(f"abs({name})", np.abs(columns[:, i])) for i, name in enumerate(names)]
    trials: list[list[tuple[str, Ints]]] = [[one] for one in single]
    for i, j in combinations(range(n), 2):
        a, b, x, y = names[i], names[j], columns[:, i], columns[:, j]
        trials.append([(f"abs({a} - {b})", np.abs(x - y))])
        trials.append([(f"abs({a} + {b})", np.abs(x + y))])
        trials.append([(f"max({a}, {b})", np.maximum(x, y))])
        trials.append([(f"min({a}, {b})", np.minimum(x, y))])
    trials.append(single)
    for extra in trials:
        more = np.concatenate([columns, np.stack([values for _, values in extra], 1)], axis=1)
        # The new terms alone first: where they do, the features themselves are not needed beside them.
        alone = [name for name, _ in extra]
        for found, terms in (
            (rounded_least_squares(more[:, len(names) :], wanted), alone),
            (rounded_least_squares(more, wanted), [*names, *alone]),
        ):
            if found is not None:
                text = affine_text(terms, found[:-1].tolist(), found[-1])
                return Expression(text=text, form="piecewise")
    return None


def _combinations(columns: Ints, span: int) -> Ints:
    """Small coefficient vectors, those of fewer and smaller terms first."""
    n = columns.shape[1]
    span = span if n <= 3 else 1
    if n > 6:
        return np.zeros((0, n), dtype=np.int64)
    vectors = np.array(list(product(range(-span, span + 1), repeat=n)), dtype=np.int64)
    vectors = vectors[np.abs(vectors).sum(1) > 0]
    return vectors[np.argsort(np.abs(vectors).sum(1) + 0.1 * (vectors < 0).sum(1), kind="stable")]


def _comparison(names: list[str], columns: Ints, wanted: Ints) -> Expression | None:
    if not set(np.unique(wanted)) <= {0, 1}:
        return None
    yes = wanted == 1
    for vector in _combinations(columns, 2):
        value = columns @ vector
        if value[yes].min() > value[~yes].max():
            left = affine_text(names, vector.tolist())
            return Expression(text=f"int({left} > {int(value[~yes].max())})", form="comparison")
        levels = np.unique(value[yes])
        if len(levels) == 1 and not (value[~yes] == levels[0]).any():
            left = affine_text(names, vector.tolist())
            return Expression(text=f"int({left} == {int(levels[0])})", form="comparison")
    return None


def _modular(names: list[str], columns: Ints, wanted: Ints) -> Expression | None:
    for vector in _combinations(columns, 2):
        value = columns @ vector
        for constant in (0, 1, -1):
            total = value + constant
            for modulus in _MODULI:
                inner = affine_text(names, vector.tolist(), constant)
                inner = inner if inner in names else f"({inner})"
                if np.array_equal(total % modulus, wanted):
                    return Expression(text=f"{inner} % {modulus}", form="modular")
                if np.array_equal(total // modulus, wanted):
                    return Expression(text=f"{inner} // {modulus}", form="modular")
    return None


def _boolean(names: list[str], columns: Ints, wanted: Ints) -> Expression | None:
    """Of bits: the shorter of a sum of products (Quine-McCluskey) and an exclusive or of products (Reed-Muller)."""
    bits = columns.size and set(np.unique(columns)) <= {0, 1} and set(np.unique(wanted)) <= {0, 1}
    if not bits or len(names) > 8:
        return None
    trials = [_sum_of_products(names, columns, wanted), _exclusive_or(names, columns, wanted)]
    texts = [text for text in trials if text is not None]
    return Expression(text=min(texts, key=len), form="boolean") if texts else None


def _exclusive_or(names: list[str], columns: Ints, wanted: Ints) -> str | None:
    """The algebraic normal form; needs the truth table whole."""
    n = len(names)
    if len(columns) != 2**n:
        return None
    truth = np.zeros(2**n, dtype=np.int64)
    truth[columns @ (1 << np.arange(n))] = wanted
    for i in range(n):  # the Moebius transform over GF(2)
        for mask in range(2**n):
            if mask >> i & 1:
                truth[mask] ^= truth[mask ^ (1 << i)]
    terms = []
    for mask in sorted(np.flatnonzero(truth), key=lambda m: (bin(m).count("1"), m)):
        inside = [names[i] for i in range(n) if mask >> i & 1]
        terms.append("1" if not inside else inside[0] if len(inside) == 1 else f"({' & '.join(inside)})")
    terms = [*(term for term in terms if term != "1"), *(term for term in terms if term == "1")]
    return " ^ ".join(terms)


def _sum_of_products(names: list[str], columns: Ints, wanted: Ints) -> str | None:
    """Prime implicants and a greedy cover; rows that are not there may be anything."""
    n = len(names)
    if n > 6:
        return None
    no = [tuple(row) for row in columns[wanted == 0].tolist()]
    yes = [tuple(row) for row in columns[wanted == 1].tolist()]
    primes: list[tuple[int, ...]] = []  # -1 is a bit that does not matter
    cubes = sorted(product((-1, 0, 1), repeat=n), key=lambda cube: sum(value >= 0 for value in cube))
    for cube in cubes:
        if any(_inside(row, cube) for row in no) or any(_covers(prime, cube) for prime in primes):
            continue
        if any(_inside(row, cube) for row in yes):
            primes.append(cube)
    left, chosen = set(yes), []
    while left:
        best = max(primes, key=lambda cube: (sum(_inside(row, cube) for row in left), cube.count(-1)))
        chosen.append(best)
        left -= {row for row in left if _inside(row, best)}
    texts = []
    for cube in chosen:
        literals = [name if value else f"(1 - {name})" for name, value in zip(names, cube, strict=True) if value >= 0]
        texts.append(" & ".join(literals) if len(literals) == 1 or len(chosen) == 1 else f"({' & '.join(literals)})")
    return " | ".join(texts)


def _inside(row: tuple[int, ...], cube: tuple[int, ...]) -> bool:
    return all(value in (-1, bit) for bit, value in zip(row, cube, strict=True))


def _covers(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a in (-1, b) for a, b in zip(one, other, strict=True))


def _table(names: list[str], columns: Ints, wanted: Ints) -> Expression:
    if len(names) == 1 and set(np.unique(wanted)) <= {0, 1}:
        inside = ", ".join(map(str, columns[wanted == 1, 0].tolist()))
        return Expression(text=f"int({names[0]} in ({inside},))", form="table")
    keys = [str(row[0]) if len(row) == 1 else f"({', '.join(map(str, row))})" for row in columns.tolist()]
    body = ", ".join(f"{key}: {value}" for key, value in zip(keys, wanted.tolist(), strict=True))
    index = names[0] if len(names) == 1 else ", ".join(names)
    return Expression(text=f"{{{body}}}[{index}]", form="table")

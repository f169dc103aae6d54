"""The integer autoencoder: hidden states that lie on a lattice, written as integer vectors and back.

Michaud et al. (2024) find generators of the lattice with a greatest-common-divisor search over hidden states. Here it
is exact: independent states span a sublattice, every other state has rational coordinates in it, and each denominator
found refines the basis, until all coordinates are integers (for one dimension this is Euclid's algorithm).
"""

from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Lattice:
    """h = origin + z @ basis, with integer z. basis [rank, hidden] (its rows are the generators), origin [hidden]."""

    basis: Floats
    origin: Floats

    @property
    def rank(self) -> int:
        return len(self.basis)

    def encode(self, states: Floats) -> Floats:
        """The coordinates of states [N, hidden], not rounded: how far from integers they are is the error."""
        return (states - self.origin) @ np.linalg.pinv(self.basis)

    def integers(self, states: Floats) -> tuple[Integers, float]:
        """The rounded coordinates, and the largest distance to an integer."""
        raw = self.encode(states)
        rounded = np.rint(raw)
        return rounded.astype(np.int64), float(np.abs(raw - rounded).max(initial=0.0))


def whitened(states: Floats, *, floor: float = 1e-7) -> tuple[Floats, Floats]:
    """(directions [rank, hidden], scales): the axes in which states vary, strongest first; flat ones are left out."""
    centered = states - states.mean(0)
    _, spread, axes = np.linalg.svd(centered, full_matrices=False)
    spread = spread / np.sqrt(len(states))
    kept = spread > floor * max(float(spread.max(initial=0.0)), 1e-300)
    return axes[kept], spread[kept]


def find_lattice(states: Floats, *, tolerance: float = 1e-3, largest: int = 64) -> Lattice | None:
    """The lattice that states [N, hidden] lie on, with 0 (the first state) as origin; None where there is none.

    tolerance: how far a coordinate may be from a fraction with a denominator of at most `largest`.
    Known failure: states of a network that was not trained to rounding error blur small fractions, and any cloud of
    points lies on a lattice that is fine enough; so `largest` bounds how fine it may be.
    """
    if len(states):
        states = states[np.abs(states).max(1) > 1e-7 * np.abs(states).max()]
    if not len(states):
        return Lattice(np.zeros((0, states.shape[1])), np.zeros(states.shape[1]))
    basis = _independent(states)
    scale = np.linalg.norm(basis, axis=1).max()
    for _ in range(64):
        raw = states @ np.linalg.pinv(basis)
        if np.abs(raw @ basis - states).max() > 1e-5 * max(1.0, float(np.abs(states).max())):
            return None
        off = np.abs(raw - np.rint(raw)).max(1)
        if off.max() < tolerance:
            return Lattice(reduced(basis), np.zeros(states.shape[1]))
        # Of the states that are not on the lattice yet, the one with the smallest coordinates is the most exact.
        wrong = np.flatnonzero(off >= tolerance)
        row = raw[wrong[np.argmin(np.abs(raw[wrong]).max(1))]]
        denominators = [_denominator(value, largest, tolerance) for value in row]
        common = lcm(*denominators)
        if 0 in denominators or common > largest:
            return None
        exact = np.rint(row * common).astype(np.int64)
        refined = _hermite(np.vstack([common * np.eye(len(basis), dtype=np.int64), exact[None]]))
        basis = reduced((refined / common) @ basis)
        if np.linalg.norm(basis, axis=1).min() < 1e-6 * scale:
            return None
    return None


def _independent(states: Floats) -> Floats:
    """Short, linearly independent states."""
    _, spread, _ = np.linalg.svd(states, full_matrices=False)
    rank = int((spread > 1e-7 * spread[0]).sum())
    order = np.argsort(np.linalg.norm(states, axis=1), kind="stable")
    chosen: list[Floats] = []
    directions: list[Floats] = []
    for index in order:
        rest = states[index] - sum((states[index] @ d * d for d in directions), np.zeros(states.shape[1]))
        if np.linalg.norm(rest) > 1e-5 * np.linalg.norm(states[index]):
            chosen.append(states[index])
            directions.append(rest / np.linalg.norm(rest))
        if len(chosen) == rank:
            break
    return np.stack(chosen)


def _denominator(value: float, largest: int, tolerance: float) -> int:
    """The smallest q with q * value within q * tolerance of an integer (never more than 0.1); 0 where none is."""
    for q in range(1, largest + 1):
        if abs(q * value - round(q * value)) < min(0.1, tolerance * q):
            return q
    return 0


def _hermite(rows: Integers) -> Integers:
    """A basis of the integer row lattice, in Hermite (echelon) form: Gauss with remainders."""
    rows = rows.astype(object)
    top = 0
    for column in range(rows.shape[1]):
        while True:
            below = [i for i in range(top, len(rows)) if rows[i, column]]
            if not below:
                break
            pivot = min(below, key=lambda i: abs(rows[i, column]))
            rows[[top, pivot]] = rows[[pivot, top]]
            others = [i for i in range(top + 1, len(rows)) if rows[i, column]]
            if not others:
                top += 1
                break
            for i in others:
                rows[i] = rows[i] - (rows[i, column] // rows[top, column]) * rows[top]
    return np.array(rows[:top], dtype=np.int64)


def reduced(basis: Floats, *, delta: float = 0.75) -> Floats:
    """The same lattice with short generators (Lenstra, Lenstra & Lovasz, 1982)."""
    basis = np.array(basis, dtype=np.float64)
    k = 1
    while k < len(basis):
        for j in range(k - 1, -1, -1):
            ortho = _gram_schmidt(basis)
            basis[k] -= np.rint(basis[k] @ ortho[j] / (ortho[j] @ ortho[j])) * basis[j]
        ortho = _gram_schmidt(basis)
        mu = basis[k] @ ortho[k - 1] / (ortho[k - 1] @ ortho[k - 1])
        if ortho[k] @ ortho[k] >= (delta - mu**2) * (ortho[k - 1] @ ortho[k - 1]):
            k += 1
        else:
            basis[[k, k - 1]] = basis[[k - 1, k]]
            k = max(k - 1, 1)
    return basis


def _gram_schmidt(basis: Floats) -> Floats:
    out = np.zeros_like(basis)
    for i, row in enumerate(basis):
        out[i] = row - sum(((row @ o) / (o @ o) * o for o in out[:i]), np.zeros(len(row)))
    return out

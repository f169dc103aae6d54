"""The 62 tasks of Michaud et al. (2024), as generators: integer sequences in, integer sequences out.

Each is what the published data set holds (same ranges, lengths and conventions for the first positions), written anew
as a function of the whole input. A program is only counted as found where it agrees with these on longer sequences
too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np

from headwater.core.registry import Registry

Array = np.ndarray[Any, np.dtype[np.int64]]
Reference = Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One sequence task.

    inputs are integers in [low, high), `width` of them a position; `reference` maps [N, T, width] to [N, T, outputs].
    length: of the training sequences. about: one line.
    """

    name: str
    low: int
    high: int
    reference: Reference
    about: str
    width: int = 1
    outputs: int = 1
    length: int = 10
    draw: Callable[[np.random.Generator, Array], Array] | None = None

    @property
    def alphabet(self) -> list[tuple[int, ...]]:
        """Every input of one position."""
        return list(product(range(self.low, self.high), repeat=self.width))

    def sample(self, n: int, *, length: int | None = None, seed: int = 0) -> tuple[Array, Array]:
        """`n` input sequences [n, T, width] drawn with `seed`, and what the task gives for them [n, T, outputs]."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        xs = rng.integers(self.low, self.high, (n, length or self.length, self.width))
        if self.draw is not None:
            xs = self.draw(rng, xs)
        return xs, self.reference(xs)


tasks: Registry[Task] = Registry("task")


def _add(name: str, high: int, reference: Reference, about: str, **options: Any) -> None:
    low = options.pop("low", 0)
    tasks.register(name)(Task(name=name, low=low, high=high, reference=reference, about=about, **options))


def lagged(xs: Array, lag: int) -> Array:
    """The input `lag` positions earlier; 0 before the first."""
    out = np.zeros_like(xs)
    out[:, lag:] = xs[:, : max(0, xs.shape[1] - lag)]
    return out


def window_sum(xs: Array, size: int) -> Array:
    """The sum of the current input and the `size - 1` before it."""
    return sum((lagged(xs, lag) for lag in range(size)), np.zeros_like(xs))


def _scan(step: Callable[[Any, Array], tuple[Any, Array]], start: Any, xs: Array) -> Array:
    """Run `step(state, x [N, width]) -> (state, y [N, outputs])` along the sequences."""
    state, out = start, []
    for t in range(xs.shape[1]):
        state, y = step(state, xs[:, t])
        out.append(y)
    return np.stack(out, axis=1)


def _base_addition(base: int, xs: Array) -> Array:
    def step(carry: Any, x: Array) -> tuple[Any, Array]:
        total = x.sum(-1, keepdims=True) + carry
        return total // base, total % base

    return _scan(step, 0, xs)


def _division(by: int, xs: Array) -> Array:
    def step(rest: Any, x: Array) -> tuple[Any, Array]:
        total = 2 * rest + x
        return total % by, total // by

    return _scan(step, 0, xs)


def _newton(xs: Array, *, spring: int = 0, gravity: int = 0, magnetic: bool = False) -> Array:
    turn = np.array([[0, 1], [-1, 0]])

    def step(state: Any, x: Array) -> tuple[Any, Array]:
        position, velocity = state
        acceleration = x - gravity - spring * position + (velocity @ turn if magnetic else 0)
        velocity = velocity + acceleration
        return (position + velocity, velocity), position + velocity

    zero = np.zeros_like(xs[:, 0])
    return _scan(step, (zero, zero), xs)


def _alternating(xs: Array, size: int) -> Array:
    bits = [lagged(xs, lag) for lag in range(size)]
    return np.logical_and.reduce([a != b for a, b in pairwise(bits)]).astype(np.int64)


def _majority(xs: Array) -> Array:
    counts = np.stack([np.cumsum(xs[..., 0] == value, axis=1) for value in range(int(xs.max(initial=0)) + 1)], -1)
    return counts.argmax(-1)[..., None]  # argmax takes the first, so ties go to the lower number


def _balanced(xs: Array) -> Array:
    depth = np.cumsum(1 - 2 * xs, axis=1)
    alive = np.minimum.accumulate(depth, axis=1) >= 0
    return ((depth == 0) & alive).astype(np.int64)


def _palindrome(xs: Array) -> Array:
    ends = range(1, xs.shape[1] + 1)
    return np.stack([(xs[:, :end] == xs[:, :end][:, ::-1]).all(axis=1) for end in ends], axis=1).astype(np.int64)


def _palindromes_drawn(rng: np.random.Generator, xs: Array) -> Array:
    """Random bits hold few palindromes: each sequence begins with one of a random length."""
    xs = xs.copy()
    for row, length in enumerate(rng.integers(2, xs.shape[1] + 1, len(xs))):
        half = length // 2
        xs[row, length - half : length] = xs[row, :half][::-1]
    return xs


def _dither(xs: Array) -> Array:
    levels = np.cumsum(xs, axis=1) // 15
    return levels - lagged(levels, 1)


_add("binary_addition", 2, partial(_base_addition, 2), "sum of two binary numbers, lowest digit first", width=2)
for base in range(3, 8):
    _add(f"base_{base}_addition", base, partial(_base_addition, base), f"sum of two numbers in base {base}", width=2)
_add("bitwise_and", 2, lambda xs: xs.prod(-1, keepdims=True), "AND of two bits", width=2)
_add("bitwise_or", 2, lambda xs: xs.max(-1, keepdims=True), "OR of two bits", width=2)
_add("bitwise_xor", 2, lambda xs: xs.sum(-1, keepdims=True) % 2, "XOR of two bits", width=2)
_add("bitwise_not", 2, lambda xs: 1 - xs, "NOT of the bit")
_add(
    "bit_dot_prod_mod2",
    2,
    lambda xs: np.cumsum(xs.prod(-1, keepdims=True), axis=1) % 2,
    "dot product of two bit strings so far, mod 2",
    width=2,
)
_add("bit_palindrome", 2, _palindrome, "whether the bits so far are a palindrome", draw=_palindromes_drawn)
_add("bit_shift_right", 2, partial(lagged, lag=1), "the previous bit")
_add("current_number", 100, lambda xs: xs.copy(), "the current number")
for lag in range(1, 6):
    _add(f"prev{lag}", 100, partial(lagged, lag=lag), f"the number {lag} before", length=20 if lag == 5 else 10)
_add("sum_all", 100, lambda xs: np.cumsum(xs, axis=1), "the sum so far")
for size in range(2, 8):
    about = f"the sum of the last {size}"
    _add(f"sum_last{size}", 100, partial(window_sum, size=size), about, length=20 if size > 4 else 10)
_add("diff_last2", 100, lambda xs: xs - lagged(xs, 1), "the current number less the previous", low=-100)
_add("abs_current", 100, lambda xs: np.abs(xs), "absolute value", low=-100)
_add("abs_diff", 100, lambda xs: np.abs(xs - lagged(xs, 1)), "absolute difference of the last two", low=-100)
_add("diff_abs_values", 100, lambda xs: np.abs(xs) - np.abs(lagged(xs, 1)), "difference of absolute values", low=-100)
_add("max_seen", 100, lambda xs: np.maximum.accumulate(xs, axis=1), "the largest so far")
_add("min_seen", 10, lambda xs: np.minimum.accumulate(xs, axis=1), "the smallest so far")
for modulus in range(3, 9):
    _add(
        f"add_mod_{modulus}",
        modulus,
        lambda xs, m=modulus: np.cumsum(xs, axis=1) % m,
        f"the sum so far, mod {modulus}",
    )
_add("parity_all", 2, lambda xs: np.cumsum(xs, axis=1) % 2, "the parity of all bits so far")
_add("parity_zeros", 2, lambda xs: np.cumsum(1 - xs, axis=1) % 2, "the parity of the number of zeros so far")
_add("parity_bits_mod2", 2, lambda xs: lagged(np.cumsum(np.ones_like(xs), axis=1), 1) % 2, "the parity of the index")
for size in range(2, 5):
    _add(f"parity_last{size}", 2, lambda xs, k=size: window_sum(xs, k) % 2, f"the parity of the last {size} bits")
for size in (3, 4):
    _add(f"alternating_last{size}", 2, partial(_alternating, size=size), f"whether the last {size} bits alternate")
_add("previous_equals_current", 8, lambda xs: (xs == lagged(xs, 1)).astype(np.int64), "whether the last two are equal")
for top in range(1, 4):
    _add(f"majority_0_{top}", top + 1, _majority, "the most frequent so far, ties to the lower")
_add("evens_counter", 10, lambda xs: np.cumsum(xs % 2 == 0, axis=1), "how many even numbers so far")
_add("evens_detector", 10, lambda xs: 1 - xs % 2, "whether the number is even")
_add("perfect_square_detector", 20, lambda xs: np.isin(xs, [0, 1, 4, 9, 16]).astype(np.int64), "whether it is a square")
_add("balanced_parenthesis", 2, _balanced, "whether the brackets so far are balanced (0 opens, 1 closes)")
for divisor in (3, 5, 7):
    _add(
        f"div_{divisor}",
        2,
        partial(_division, divisor),
        f"the quotient by {divisor} of a binary number, digit by digit",
    )
_add("dithering", 16, _dither, "one-dimensional dithering of 16 grey levels")
_add("newton_freebody", 11, _newton, "the position of a free body pushed by integer forces", low=-10)
_add("newton_gravity", 11, partial(_newton, gravity=1), "the same under gravity", low=-10)
_add("newton_spring", 11, partial(_newton, spring=1), "the same on a spring", low=-10)
_add(
    "newton_magnetic",
    11,
    partial(_newton, magnetic=True),
    "the same in two dimensions in a magnetic field",
    low=-10,
    width=2,
    outputs=2,
)

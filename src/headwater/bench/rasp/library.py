"""Programs whose mechanism is worth finding: one function each, registered by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headwater.bench.rasp.language import (
    ALWAYS,
    EQ,
    GT,
    LE,
    LT,
    Aggregate,
    LinearSequenceMap,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    SOp,
    categorical,
    indices,
    numerical,
    tokens,
)
from headwater.core.errors import MethodError
from headwater.core.registry import Registry

_MOST = 16  # inputs are shorter: no position has a larger index

Make = Callable[[], SOp]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program with the tokens that its inputs are made of.

    about: one line. causal: whether it is meant for a model whose positions do not look ahead. longest: up to this
    length every input is tested. valid: which inputs it has a meaning on (None: all).
    """

    name: str
    about: str
    make: Make
    vocabulary: tuple[Any, ...]
    causal: bool = False
    longest: int = 4
    valid: Callable[[tuple[Any, ...]], bool] | None = None


programs: Registry[Program] = Registry("program", error=MethodError)
"""Programs by name; outside packages add theirs by the entry point group `headwater.programs`."""


def program(name: str, vocabulary: tuple[Any, ...], **options: Any) -> Callable[[Make], Make]:
    """Register a function that makes a program; its docstring's first line says what the program does."""

    def add(make: Make) -> Make:
        about = (make.__doc__ or "").strip().split("\n")[0]
        programs.register(name)(Program(name=name, about=about, make=make, vocabulary=vocabulary, **options))
        return make

    return add


# --- parts


def count_of(where: Callable[[Any], bool], text: str) -> SOp:
    """How many tokens of the whole input are so."""
    return SelectorWidth(Select(tokens, tokens, lambda k, q: where(k)), label=f"count_{text}")


def count_so_far(where: Callable[[Any], bool], text: str) -> SOp:
    """How many tokens up to here are so."""
    here = Select(tokens, tokens, lambda k, q: where(k)) & Select(indices, indices, LE)
    return SelectorWidth(here, label=f"so_far_{text}")


def fraction_so_far(where: Callable[[Any], bool], text: str) -> SOp:
    is_so = Map(lambda t: int(where(t)), tokens, encoding="numerical", text=f"is {text}", label=f"is_{text}")
    return Aggregate(Select(indices, indices, LE), is_so, label=f"fraction_{text}")


def length() -> SOp:
    return SelectorWidth(Select(tokens, tokens, ALWAYS), label="length")


def reversed_(values: SOp) -> SOp:
    opposite = SequenceMap(lambda n, i: n - i - 1, length(), indices, text="n - i - 1", label="opposite")
    return Aggregate(Select(indices, opposite, EQ), values, label="reversed")


def shifted(values: SOp, by: int, default: Any = None, label: str = "") -> SOp:
    """The value `by` places to the left."""
    back = Select(indices, indices, lambda k, q: k == q - by)
    return Aggregate(back, values, default, label=label or f"{values.label}_{by}_back")


def times_before() -> SOp:
    """How often this token stood before."""
    before = Select(tokens, tokens, EQ) & Select(indices, indices, LT)
    return SelectorWidth(before, label="times_before")


def sorted_by(values: SOp, keys: SOp) -> SOp:
    """The values in the order of their keys; equal keys keep their order."""
    unique = SequenceMap(lambda key, i: key * _MOST + i, keys, indices, text=f"{_MOST} x + i", label="unique_key")
    return placed_by_rank(values, unique)


def placed_by_rank(values: SOp, keys: SOp) -> SOp:
    rank = SelectorWidth(Select(keys, keys, LT), label="rank")
    return Aggregate(Select(rank, indices, EQ), values, label="sorted")


def balance(opening: str, closing: str) -> SOp:
    """Share of opening minus share of closing marks so far: its sign is that of their difference."""
    opens = fraction_so_far(lambda t: t == opening, "open")
    closes = fraction_so_far(lambda t: t == closing, "close")
    return LinearSequenceMap(opens, closes, 1, -1, label="balance")


def closes_well(opening: str, closing: str) -> SOp:
    """Whether this kind of bracket never closes too often and all are closed at the end."""
    so_far = balance(opening, closing)
    everywhere = Select(tokens, tokens, ALWAYS)
    negative = Map(lambda x: int(x < 0), so_far, encoding="numerical", text="x < 0", label="negative")
    ever = Map(lambda x: x > 0, Aggregate(everywhere, negative, label="share_negative"), text="x > 0", label="ever")
    zero = Map(lambda x: x == 0, so_far, text="x = 0", label="zero")
    last = Map(lambda n: n - 1, length(), text="n - 1", label="last")
    at_end = Aggregate(Select(indices, last, EQ), zero, label="zero_at_end")
    return SequenceMap(lambda bad, good: good and not bad, ever, at_end, text="y and not x", label="closes_well")


# --- programs

_ABC = ("a", "b", "c")
_DIGITS = (1, 2, 3)


@program("histogram", ("a", "b", "c", "d"))
def histogram() -> SOp:
    """How often the token at this position occurs in the input."""
    return SelectorWidth(Select(tokens, tokens, EQ), label="histogram")


@program("length", _ABC)
def length_program() -> SOp:
    """How many tokens the input has."""
    return length()


@program("reverse", _DIGITS)
def reverse() -> SOp:
    """The input backwards."""
    return reversed_(tokens)


@program("previous", _ABC)
def previous() -> SOp:
    """The token one place to the left."""
    return shifted(tokens, 1, label="previous")


@program("shift_by_2", (1, 2, 3, 4))
def shift_by_2() -> SOp:
    """The token two places to the left."""
    return shifted(tokens, 2)


@program("first", _ABC)
def first() -> SOp:
    """The first token, at every position."""
    return Aggregate(Select(indices, indices, lambda k, q: k == 0), tokens, label="first")


@program("sort_unique", (1, 2, 3, 4, 5, 6), valid=lambda x: len(set(x)) == len(x))
def sort_unique() -> SOp:
    """The input in ascending order, where no token occurs twice."""
    return placed_by_rank(tokens, tokens)


@program("sort", (1, 2, 3, 4))
def sort() -> SOp:
    """The input in ascending order."""
    return sorted_by(tokens, tokens)


@program("sort_by_frequency", _ABC)
def sort_by_frequency() -> SOp:
    """The input with the most frequent tokens first; equally frequent ones keep their order."""
    return sorted_by(tokens, Map(lambda n: -n, histogram(), text="-x", label="rarity"))


@program("most_frequent", _ABC)
def most_frequent() -> SOp:
    """The most frequent token of the input, the first of several."""
    rarity = Map(lambda n: -n, histogram(), text="-x", label="rarity")
    unique = SequenceMap(lambda r, i: r * _MOST + i, rarity, indices, text=f"{_MOST} x + i", label="unique_key")
    rank = SelectorWidth(Select(unique, unique, LT), label="rank")
    return Aggregate(Select(rank, indices, lambda k, q: k == 0), tokens, label="most_frequent")


@program("fraction_of_x", ("w", "x", "y", "z"))
def fraction_of_x() -> SOp:
    """The share of x among the tokens so far, as a number."""
    return fraction_so_far(lambda t: t == "x", "x")


@program("pair_balance", ("(", ")", "a"), longest=5)
def pair_balance() -> SOp:
    """The share of ( minus the share of ) among the tokens so far, as a number."""
    return balance("(", ")")


@program("shuffle_dyck_1", ("(", ")"), longest=7)
def shuffle_dyck_1() -> SOp:
    """Whether all parentheses are balanced."""
    return closes_well("(", ")")


@program("shuffle_dyck_2", ("(", ")", "{", "}"))
def shuffle_dyck_2() -> SOp:
    """Whether parentheses and braces are balanced, each for itself."""
    round_, curly = closes_well("(", ")"), closes_well("{", "}")
    return SequenceMap(lambda x, y: x and y, round_, curly, text="x and y", label="both_close")


@program("depth", ("(", ")"), longest=7)
def depth() -> SOp:
    """How many parentheses are open after this token; negative where too many are closed."""
    opened = count_so_far(lambda t: t == "(", "open")
    closed = count_so_far(lambda t: t == ")", "close")
    return SequenceMap(lambda x, y: x - y, opened, closed, text="x - y", label="depth")


@program("pair_difference", ("x", "y", "z"), longest=5)
def pair_difference() -> SOp:
    """How many more x than y the input has."""
    xs, ys = count_of(lambda t: t == "x", "x"), count_of(lambda t: t == "y", "y")
    return SequenceMap(lambda x, y: x - y, xs, ys, text="x - y", label="difference")


@program("count_x", ("x", "y", "z"), longest=5)
def count_x() -> SOp:
    """How many x the input has."""
    return count_of(lambda t: t == "x", "x")


@program("more_x_than_y", ("x", "y", "z"), longest=5)
def more_x_than_y() -> SOp:
    """Whether the input has more x than y."""
    sign = {"x": 1, "y": -1}
    vote = Map(lambda t: sign.get(t, 0), tokens, encoding="numerical", text="+1 for x, -1 for y", label="vote")
    mean = Aggregate(Select(tokens, tokens, ALWAYS), vote, label="mean_vote")
    return Map(lambda m: m > 0, mean, text="x > 0", label="more_x")


@program("induction", _ABC, longest=5)
def induction() -> SOp:
    """The token that followed the last earlier occurrence of this one."""
    times = times_before()
    token_before = shifted(tokens, 1, label="token_before")
    times_there = shifted(times, 1, label="times_before_there")
    after = Select(token_before, tokens, EQ) & Select(times_there, times, lambda k, q: k == q - 1)
    return Aggregate(after, tokens, label="induced")


@program("causal_induction", _ABC, causal=True, longest=5)
def causal_induction() -> SOp:
    """The token that followed the last earlier occurrence of this one, by a model that does not look ahead."""
    return induction()


@program("first_occurrence", _ABC)
def first_occurrence() -> SOp:
    """Whether this token has not stood before."""
    return Map(lambda n: n == 0, times_before(), text="x = 0", label="is_first")


@program("distinct", _ABC)
def distinct() -> SOp:
    """How many different tokens the input has."""
    is_first = first_occurrence()
    return SelectorWidth(Select(is_first, is_first, lambda k, q: k), label="distinct")


@program("same_frequency", _ABC)
def same_frequency() -> SOp:
    """How many positions hold a token as frequent as this one."""
    often = histogram()
    return SelectorWidth(Select(often, often, EQ), label="same_frequency")


@program("is_palindrome", _ABC, longest=5)
def is_palindrome() -> SOp:
    """Whether the input reads the same backwards."""
    agrees = SequenceMap(lambda x, y: x == y, tokens, reversed_(tokens), text="x = y", label="agrees")
    wrong = SelectorWidth(Select(agrees, tokens, lambda k, q: not k), label="disagreements")
    return Map(lambda n: n == 0, wrong, text="x = 0", label="is_palindrome")


@program("parity", (0, 1), longest=7)
def parity() -> SOp:
    """Whether the number of 1s so far is odd, as 0 or 1."""
    return Map(lambda n: n % 2, count_so_far(lambda t: t == 1, "ones"), text="x mod 2", label="parity")


@program("causal_parity", (0, 1), causal=True, longest=7)
def causal_parity() -> SOp:
    """Whether the number of 1s so far is odd, by a model that does not look ahead."""
    ones = SelectorWidth(Select(tokens, tokens, lambda k, q: k == 1), label="ones")
    return Map(lambda n: n % 2, ones, text="x mod 2", label="parity")


@program("digit_sum_mod_3", (0, 1, 2), longest=5)
def digit_sum_mod_3() -> SOp:
    """The sum of the digits, modulo 3."""
    mean = Aggregate(Select(tokens, tokens, ALWAYS), numerical(tokens), label="mean_digit")
    total = SequenceMap(lambda m, n: m * n % 3, categorical(mean), length(), text="x n mod 3", label="digit_sum")
    return total


@program("detect_abc", ("a", "b", "c", "d"))
def detect_abc() -> SOp:
    """Whether this token is a c that follows ab."""
    parts = [Map(lambda t, want=want: t == want, tokens, text=f"x = {want}", label=f"is_{want}") for want in "abc"]
    moved = [shifted(part, 2 - n, False) if n < 2 else part for n, part in enumerate(parts)]
    both = SequenceMap(lambda x, y: x and y, moved[0], moved[1], text="x and y", label="ab_before")
    return SequenceMap(lambda x, y: x and y, both, moved[2], text="x and y", label="abc_here")


@program("repeats", _ABC)
def repeats() -> SOp:
    """Whether this token is the same as the one before it."""
    before = shifted(tokens, 1, "none", label="before")
    return SequenceMap(lambda x, y: x == y, tokens, before, text="x = y", label="repeats")


@program("maximum", (1, 2, 3, 4))
def maximum() -> SOp:
    """The largest token of the input."""
    larger = SelectorWidth(Select(tokens, tokens, GT), label="larger")
    return Aggregate(Select(larger, indices, lambda k, q: k == 0), tokens, label="maximum")


@program("rank", (1, 2, 3, 4))
def rank() -> SOp:
    """How many tokens of the input are smaller than this one."""
    return SelectorWidth(Select(tokens, tokens, LT), label="rank")

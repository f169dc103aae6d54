"""RASP: what a transformer can compute, as a small language of sequence operations (Weiss et al., 2021).

A sequence operation gives one value a position; a selector says which positions a position looks at. Programs are plain
Python expressions of the classes below: `Aggregate(Select(indices, indices, EQ), tokens)`. What they mean is in
`interpreter.py`, what they become in a transformer in `compiler.py`.

Values are any hashable things. Numbers are exact: integers, booleans and fractions (a float is read as the fraction
nearest to it with a denominator of at most a million), so that a mean is equal or not, never nearly.
"""

import operator
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, TypeVar

from headwater.core.errors import HeadwaterError

Value = Hashable
Encoding = Literal["categorical", "numerical"]
E = TypeVar("E", bound="Expression")


class RaspError(HeadwaterError):
    """A RASP program that has no meaning, or none that a transformer of this compiler can compute."""


def exact(value: Any) -> Any:
    """The value with numbers made exact: floats and whole fractions become fractions and integers."""
    if isinstance(value, float):
        value = Fraction(value).limit_denominator(10**6)
    if isinstance(value, Fraction) and value.denominator == 1:
        return int(value)
    return value


@dataclass(frozen=True, eq=False, kw_only=True)
class Expression:
    """Anything in a program. `label` is its name in tables of variables; without one it is named by what it is."""

    label: str = ""

    def named(self: E, label: str) -> E:
        """The same expression under a name."""
        return replace(self, label=label)

    @property
    def inputs(self) -> "tuple[Expression, ...]":
        """The expressions that this one is computed from."""
        return ()

    def describe(self) -> str:
        """One line: what it is and what it is computed from."""
        return f"{type(self).__name__}({', '.join(inner.name for inner in self.inputs)})"

    @property
    def name(self) -> str:
        return self.label or type(self).__name__

    def __bool__(self) -> bool:
        raise RaspError(
            f"the expression {self.name} has no truth value of its own",
            fix="Use Select, SequenceMap and the like, not Python's `if`, `and`, `or`",
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SOp(Expression):
    """A sequence operation: one value a position. `+`, `-` and `*` work between two, and with a number.

    encoding: how the compiler writes it: one direction a value (categorical), or one direction for all (numerical).
    """

    encoding: Encoding = "categorical"

    def __add__(self, other: Any) -> "SOp":
        return _arithmetic(operator.add, "+", self, other)

    def __radd__(self, other: Any) -> "SOp":
        return self + other

    def __sub__(self, other: Any) -> "SOp":
        return _arithmetic(operator.sub, "-", self, other)

    def __rsub__(self, other: Any) -> "SOp":
        return Map(lambda x: other - x, self, encoding=self.encoding, text=f"{other} - x")

    def __mul__(self, other: Any) -> "SOp":
        return _arithmetic(operator.mul, "*", self, other)


@dataclass(frozen=True, eq=False)
class Tokens(SOp):
    """The input itself."""

    encoding: Encoding = field(default="categorical", init=False)

    def describe(self) -> str:
        return "tokens"


@dataclass(frozen=True, eq=False)
class Indices(SOp):
    """The position, from 0."""

    encoding: Encoding = field(default="categorical", init=False)

    def describe(self) -> str:
        return "indices"


@dataclass(frozen=True, eq=False)
class Constant(SOp):
    """The same value at every position."""

    value: Any

    def describe(self) -> str:
        return f"constant {self.value}"


@dataclass(frozen=True, eq=False)
class Map(SOp):
    """`function` of each value; an undefined value (None) stays undefined. `text` says the function in tables."""

    function: Callable[[Any], Any]
    inner: SOp
    text: str = field(default="", kw_only=True)

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.inner,)

    def describe(self) -> str:
        return f"map {self.text or 'f'} of {self.inner.name}"


@dataclass(frozen=True, eq=False)
class SequenceMap(SOp):
    """`function` of the two values at each position."""

    function: Callable[[Any, Any], Any]
    first: SOp
    second: SOp
    text: str = field(default="", kw_only=True)

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.first, self.second)

    def describe(self) -> str:
        return f"map {self.text or 'f'} of {self.first.name} and {self.second.name}"


@dataclass(frozen=True, eq=False)
class LinearSequenceMap(SOp):
    """`a` times the first plus `b` times the second; all three are numerical."""

    first: SOp
    second: SOp
    a: Any = 1
    b: Any = 1
    encoding: Encoding = field(default="numerical", init=False)

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.first, self.second)

    def describe(self) -> str:
        return f"{exact(self.a)} * {self.first.name} + {exact(self.b)} * {self.second.name}"


# --- selectors


class Selector(Expression):
    """For each position, which positions it looks at. `&` is true where both are."""

    def __and__(self, other: "Selector") -> "Selector":
        return SelectorAnd(self, other)

    def __or__(self, other: "Selector") -> "Selector":
        return SelectorOr(self, other)

    def __invert__(self) -> "Selector":
        return SelectorNot(self)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A named predicate of a key and a query."""

    name: str
    holds: Callable[[Any, Any], bool]

    def __call__(self, key: Any, query: Any) -> bool:
        return bool(self.holds(key, query))


EQ = Comparison("==", operator.eq)
NE = Comparison("!=", operator.ne)
LT = Comparison("<", operator.lt)
LE = Comparison("<=", operator.le)
GT = Comparison(">", operator.gt)
GE = Comparison(">=", operator.ge)
ALWAYS = Comparison("always", lambda key, query: True)
NEVER = Comparison("never", lambda key, query: False)


@dataclass(frozen=True, eq=False)
class Select(Selector):
    """A position looks at those whose key stands in the relation to its query: `predicate(key, query)`.

    An undefined key or query (None) selects nothing.
    """

    keys: SOp
    queries: SOp
    predicate: Callable[[Any, Any], bool]

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.keys, self.queries)

    def describe(self) -> str:
        sign = self.predicate.name if isinstance(self.predicate, Comparison) else "~"
        return f"key {self.keys.name} {sign} query {self.queries.name}"


@dataclass(frozen=True, eq=False)
class SelectorAnd(Selector):
    first: Selector
    second: Selector

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.first, self.second)

    def describe(self) -> str:
        return f"{self.first.describe()} and {self.second.describe()}"


@dataclass(frozen=True, eq=False)
class SelectorOr(Selector):
    first: Selector
    second: Selector

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.first, self.second)


@dataclass(frozen=True, eq=False)
class SelectorNot(Selector):
    inner: Selector

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.inner,)


@dataclass(frozen=True, eq=False)
class Aggregate(SOp):
    """The mean of the selected values where they are numerical; their one common value where they are categorical.

    `default` stands where nothing is selected: None is undefined (0 where the values are numerical).
    """

    selector: Selector
    values: SOp
    default: Any = None
    encoding: Encoding = field(default="categorical", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoding", self.values.encoding)

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.selector, self.values)

    def describe(self) -> str:
        return f"{self.values.name} where {self.selector.describe()}"


@dataclass(frozen=True, eq=False)
class SelectorWidth(SOp):
    """How many positions are selected."""

    selector: Selector

    @property
    def inputs(self) -> tuple[Expression, ...]:
        return (self.selector,)

    def describe(self) -> str:
        return f"how many where {self.selector.describe()}"


tokens = Tokens(label="tokens")
indices = Indices(label="indices")


def numerical(op: SOp) -> SOp:
    """The same values, written along one direction; the compiler refuses those that are no numbers."""
    return _written(op, "numerical")


def categorical(op: SOp) -> SOp:
    """The same values, with one direction each."""
    return _written(op, "categorical")


def walk(root: Expression) -> Iterator[Expression]:
    """Every expression of a program once, each after those it is computed from."""
    seen: set[int] = set()

    def visit(expression: Expression) -> Iterator[Expression]:
        if id(expression) in seen:
            return
        seen.add(id(expression))
        for inner in expression.inputs:
            yield from visit(inner)
        yield expression

    yield from visit(root)


def _written(op: SOp, encoding: Encoding) -> SOp:
    if op.encoding == encoding:
        return op
    if isinstance(op, Constant | Map | SequenceMap | SelectorWidth):
        return replace(op, encoding=encoding)
    label = f"{op.label}_{encoding}" if op.label else ""
    return Map(lambda x: x, op, encoding=encoding, text="x", label=label)


def _arithmetic(function: Callable[[Any, Any], Any], sign: str, first: SOp, second: Any) -> SOp:
    if not isinstance(second, SOp):
        encoding = first.encoding
        return Map(lambda x: function(x, second), first, encoding=encoding, text=f"x {sign} {second}")
    if first.encoding == second.encoding == "numerical" and sign in "+-":
        return LinearSequenceMap(first, second, 1, 1 if sign == "+" else -1)
    return SequenceMap(function, first, second, text=f"x {sign} y")

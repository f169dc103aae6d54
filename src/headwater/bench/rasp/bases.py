"""Pass 1: which directions of the residual stream each expression needs.

A categorical variable takes one direction for each value it may have, a numerical one takes one direction in all. The
possible values are found from those of the inputs: never too few, sometimes more than ever occur.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from headwater.bench.rasp.interpreter import apply, number
from headwater.bench.rasp.language import (
    Aggregate,
    Comparison,
    Constant,
    Encoding,
    Expression,
    Indices,
    LinearSequenceMap,
    Map,
    RaspError,
    Select,
    Selector,
    SelectorAnd,
    SelectorNot,
    SelectorOr,
    SelectorWidth,
    SequenceMap,
    SOp,
    Tokens,
    exact,
    tokens,
    walk,
)

MOST_VALUES = 20_000
"""Larger sets of possible numbers are not kept: then only what needs no list of them can read the variable."""


@dataclass(frozen=True, eq=False)
class Variable:
    """One value a position, written into the stream.

    values: the values it may have, in the order of its directions; of a numerical variable they need no direction, and
    None means too many to list. optional: whether it may also be undefined (then nothing is written).
    """

    name: str
    encoding: Encoding
    values: tuple[Any, ...] | None
    optional: bool = False
    constant: bool = False
    """The same in every input, at every position (or only a mark of the first)."""
    expression: SOp | None = None

    @property
    def width(self) -> int:
        """How many directions it takes."""
        return 1 if self.encoding == "numerical" else len(self.listed)

    @property
    def listed(self) -> tuple[Any, ...]:
        """Its possible values. Raises RaspError where they are too many to list."""
        if self.values is None:
            raise RaspError(
                f"the numerical expression {self.name} may have too many values to tell them apart",
                wanted=f"at most {MOST_VALUES}",
                fix="Aggregate numbers 0 and 1, use smaller coefficients, or compile with a smaller max_length",
            )
        return self.values

    def index(self, value: Any) -> int:
        return self.listed.index(value)

    def column(self, value: Any) -> list[float]:
        """How a value is written: [width]."""
        if value is None:
            return [0.0] * self.width
        if self.encoding == "numerical":
            return [float(exact(value))]
        return [1.0 if value == own else 0.0 for own in self.listed]


def ordered(values: Iterable[Any]) -> tuple[Any, ...]:
    """Distinct values, numbers in their order first, then the rest by type and text; undefined ones left out."""
    kept = {value: None for value in (exact(v) for v in values) if value is not None}
    numbers = sorted(value for value in kept if isinstance(value, int | Fraction))
    rest = sorted((v for v in kept if not isinstance(v, int | Fraction)), key=lambda v: (type(v).__name__, repr(v)))
    return (*numbers, *rest)


def infer_bases(program: SOp, vocabulary: Iterable[Any], max_length: int) -> dict[Expression, Variable]:
    """The variable of every sequence operation in a program. Raises RaspError, naming every expression that does not
    fit; those that read one of them are not looked at.

    vocabulary: the tokens that inputs are made of. max_length: how many tokens an input has at most.
    """
    found: dict[Expression, Variable] = {}
    faults: dict[Expression, RaspError | None] = {}
    taken: dict[str, int] = {}
    # The tokens are embedded whether or not the program reads them.
    expressions = list(walk(program))
    if not any(isinstance(expression, Tokens) for expression in expressions):
        expressions.insert(0, tokens)
    for expression in expressions:
        if any(inner in faults for inner in getattr(expression, "inputs", ())):
            faults[expression] = None
            continue
        try:
            if isinstance(expression, Selector):
                _check_selector(expression, found)
            elif isinstance(expression, SOp):
                name = _own_name(expression, taken)
                found[expression] = _variable(expression, name, found, ordered(vocabulary), max_length)
            else:
                raise RaspError("this is no RASP expression", got=type(expression).__name__)
        except RaspError as error:
            faults[expression] = error
    if faults:
        raise _all_of([error for error in faults.values() if error is not None])
    return found


def _all_of(faults: list[RaspError]) -> RaspError:
    """One error that says all of them."""
    if len(faults) == 1:
        return faults[0]
    said = [f"({i}) {fault.what}" + (f", got {fault.got}" if fault.got else "") for i, fault in enumerate(faults, 1)]
    fixes = dict.fromkeys(fault.fix for fault in faults if fault.fix)
    return RaspError(
        f"{len(faults)} expressions of this program cannot be compiled",
        got="; ".join(said),
        fix=". ".join(fixes) or None,
    )


def _own_name(expression: SOp, taken: dict[str, int]) -> str:
    base = expression.label or {"SelectorWidth": "width"}.get(type(expression).__name__, type(expression).__name__)
    base = base if expression.label else base.lower()
    taken[base] = taken.get(base, 0) + 1
    return base if expression.label and taken[base] == 1 else f"{base}_{taken[base]}"


def _variable(
    op: SOp, name: str, found: dict[Expression, Variable], vocabulary: tuple[Any, ...], max_length: int
) -> Variable:
    numeric = op.encoding == "numerical"

    def made(values: Iterable[Any] | None, *, optional: bool = False, constant: bool = False) -> Variable:
        listed = None if values is None else list(values)
        optional = optional or (listed is not None and None in listed)
        if numeric and listed is not None:
            listed = [0 if v is None else number(op, v) for v in listed] + ([0] if optional else [])
        return Variable(
            name=name,
            encoding=op.encoding,
            values=None if listed is None else ordered(listed),
            optional=optional and not numeric,
            constant=constant,
            expression=op,
        )

    match op:
        case Tokens():
            return made(vocabulary)
        case Indices():
            return made(range(max_length))
        case Constant():
            return made([op.value], constant=True)
        case Map():
            inner = found[op.inner]
            return made([apply(op, v) for v in inner.listed], optional=inner.optional)
        case SequenceMap():
            first, second = _categorical(op, found[op.first]), _categorical(op, found[op.second])
            pairs = [(x, y) for x in first.listed for y in second.listed]
            return made([apply(op, x, y) for x, y in pairs], optional=first.optional or second.optional)
        case LinearSequenceMap():
            first, second = _numerical(op, found[op.first]), _numerical(op, found[op.second])
            return made(_combined(first, second, exact(op.a), exact(op.b)))
        case SelectorWidth():
            return made(range(max_length + 1))
        case Aggregate():
            inner = found[op.values]
            if numeric:
                means = None if inner.values is None else _means(inner.values, max_length)
                return made(None if means is None else [*means, 0 if op.default is None else op.default])
            return made([*inner.listed, op.default], optional=inner.optional)
    raise RaspError(f"{op.name} cannot be compiled", got=type(op).__name__)


def _categorical(user: SOp, variable: Variable) -> Variable:
    if variable.encoding != "categorical":
        raise RaspError(
            f"{user.name} reads the numerical {variable.name} value by value",
            wanted="a categorical variable",
            fix=f"Wrap {variable.name} in categorical(...), or use LinearSequenceMap",
        )
    return variable


def _numerical(user: SOp, variable: Variable) -> Variable:
    if variable.encoding != "numerical":
        raise RaspError(
            f"{user.name} adds up the categorical {variable.name}",
            wanted="a numerical variable",
            fix=f"Wrap {variable.name} in numerical(...), or use SequenceMap",
        )
    return variable


def _check_selector(selector: Selector, found: dict[Expression, Variable]) -> None:
    """Refuse what attention cannot select."""
    if isinstance(selector, SelectorOr | SelectorNot):
        word = "or" if isinstance(selector, SelectorOr) else "not"
        raise RaspError(
            f"a selector with `{word}` cannot be compiled into one head",
            got=selector.describe(),
            wanted="Select, or several joined with &",
            fix="Put the condition into the predicate of one Select",
        )
    for clause in clauses(selector):
        for side, op in (("key", clause.keys), ("query", clause.queries)):
            if found[op].encoding != "categorical":
                raise RaspError(
                    f"the {side} of the selector `{clause.describe()}` is numerical",
                    got=found[op].name,
                    wanted="a categorical variable: attention compares value with value",
                    fix=f"Wrap {found[op].name} in categorical(...)",
                )
        for key in found[clause.keys].listed:
            for query in found[clause.queries].listed:
                held = apply(clause, key, query)
                if not isinstance(held, bool | int) and not isinstance(clause.predicate, Comparison):
                    raise RaspError(
                        f"the predicate of the selector `{clause.describe()}` is neither true nor false",
                        got=f"{held!r} for key {key!r}, query {query!r}",
                    )


def clauses(selector: Selector) -> list[Select]:
    """The Selects that all have to hold."""
    if isinstance(selector, Select):
        return [selector]
    if isinstance(selector, SelectorAnd):
        return [*clauses(selector.first), *clauses(selector.second)]
    raise RaspError("this selector cannot be compiled", got=selector.describe())


def _combined(first: Variable, second: Variable, a: Any, b: Any) -> list[Any] | None:
    if first.values is None or second.values is None or len(first.values) * len(second.values) > 4 * MOST_VALUES:
        return None
    values = {exact(a * x + b * y) for x in first.values for y in second.values}
    return None if len(values) > MOST_VALUES else list(values)


def _means(values: tuple[Any, ...], most: int) -> set[Any] | None:
    """Every mean of 1 to `most` of the values; None where that is too many."""
    means: set[Any] = set()
    sums: set[Any] = {0}
    for count in range(1, most + 1):
        if len(sums) * len(values) > 4 * MOST_VALUES:
            return None
        sums = {exact(total + value) for total in sums for value in values}
        means |= {exact(Fraction(total) / count) for total in sums}
        if len(means) > MOST_VALUES:
            return None
    return means

"""What a RASP program means: the reference that compiled models are compared with.

Arithmetic is exact (fractions). An undefined value is None; where a numerical value is undefined it counts as 0, as
nothing is written along its direction.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from headwater.bench.rasp.language import (
    Aggregate,
    Constant,
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
)

Matrix = list[list[bool]]


def evaluate(program: SOp, inputs: Sequence[Any], *, causal: bool = False) -> list[Any]:
    """The program's value at each position of `inputs`. `causal`: no position looks at a later one.

    Raises RaspError where a categorical aggregate selects several different values, which has no meaning.
    """
    return Interpreter(inputs, causal=causal).values(program)


class Interpreter:
    """Evaluates expressions on one input; each expression once, so that a program's variables cost one run."""

    def __init__(self, inputs: Sequence[Any], *, causal: bool = False) -> None:
        self.inputs, self.causal = [exact(value) for value in inputs], causal
        self._values: dict[int, list[Any]] = {}
        self._matrices: dict[int, Matrix] = {}
        self._kept: list[Expression] = []  # ids stay those of these objects

    def values(self, op: SOp) -> list[Any]:
        """One value a position."""
        if id(op) not in self._values:
            found = [exact(value) for value in self._compute(op)]
            self._values[id(op)] = [0 if v is None else v for v in found] if op.encoding == "numerical" else found
            self._kept.append(op)
        return self._values[id(op)]

    def selected(self, selector: Selector) -> Matrix:
        """[query][key]: whether the query's position looks at the key's."""
        if id(selector) not in self._matrices:
            n = range(len(self.inputs))
            matrix = self._select(selector)
            self._matrices[id(selector)] = [[matrix[q][k] and (k <= q or not self.causal) for k in n] for q in n]
            self._kept.append(selector)
        return self._matrices[id(selector)]

    def _compute(self, op: SOp) -> list[Any]:
        match op:
            case Tokens():
                return self.inputs
            case Indices():
                return list(range(len(self.inputs)))
            case Constant():
                return [op.value] * len(self.inputs)
            case Map():
                return [None if x is None else apply(op, x) for x in self.values(op.inner)]
            case SequenceMap():
                pairs = zip(self.values(op.first), self.values(op.second), strict=True)
                return [None if x is None or y is None else apply(op, x, y) for x, y in pairs]
            case LinearSequenceMap():
                a, b = exact(op.a), exact(op.b)
                pairs = zip(self.values(op.first), self.values(op.second), strict=True)
                return [number(op, a * (x or 0) + b * (y or 0)) for x, y in pairs]
            case SelectorWidth():
                return [sum(row) for row in self.selected(op.selector)]
            case Aggregate():
                values = self.values(op.values)
                rows = self.selected(op.selector)
                return [self._mean(op, [v for v, yes in zip(values, row, strict=True) if yes]) for row in rows]
        raise RaspError(f"{op.name} is no sequence operation of RASP", got=type(op).__name__)

    def _mean(self, op: Aggregate, chosen: list[Any]) -> Any:
        if not chosen:
            return op.default
        if op.encoding == "numerical":
            return exact(Fraction(sum(number(op, v) for v in chosen)) / len(chosen))
        if any(value != chosen[0] for value in chosen):
            raise RaspError(
                f"the aggregate {op.name} selects several different values of the categorical {op.values.name}",
                got=f"{sorted(set(map(str, chosen)))} on the input {self.inputs}",
                wanted="one common value, or numerical values, whose mean is taken",
                fix="Narrow the selector, or wrap the values in numerical(...)",
            )
        return chosen[0]

    def _select(self, selector: Selector) -> Matrix:
        n = range(len(self.inputs))
        match selector:
            case Select():
                keys, queries = self.values(selector.keys), self.values(selector.queries)
                return [
                    [k is not None and q is not None and bool(apply(selector, k, q)) for k in keys] for q in queries
                ]
            case SelectorAnd():
                first, second = self.selected(selector.first), self.selected(selector.second)
                return [[first[q][k] and second[q][k] for k in n] for q in n]
            case SelectorOr():
                first, second = self.selected(selector.first), self.selected(selector.second)
                return [[first[q][k] or second[q][k] for k in n] for q in n]
            case SelectorNot():
                inner = self.selected(selector.inner)
                return [[not inner[q][k] for k in n] for q in n]
        raise RaspError(f"{selector.name} is no selector of RASP", got=type(selector).__name__)


def apply(expression: Map | SequenceMap | Select, *values: Any) -> Any:
    """The expression's own function on values. Raises RaspError, with the value, where the function fails."""
    function = expression.predicate if isinstance(expression, Select) else expression.function
    try:
        found = exact(function(*values))
    except Exception as error:
        raise RaspError(
            f"the function of {expression.name} fails",
            got=f"{type(error).__name__}: {error} on {', '.join(map(repr, values))}",
            wanted="a function of every value that its inputs may have",
        ) from error
    if isinstance(expression, Map | SequenceMap) and expression.encoding == "numerical" and found is not None:
        return number(expression, found)
    return found


def number(expression: Expression, value: Any) -> Any:
    """The value as an exact number. Raises RaspError for what is none."""
    value = exact(value)
    if not isinstance(value, int | Fraction):
        raise RaspError(
            f"the numerical expression {expression.name} has a value that is no number",
            got=repr(value),
            fix="Wrap it in categorical(...), or map it to numbers",
        )
    return exact(Fraction(value))

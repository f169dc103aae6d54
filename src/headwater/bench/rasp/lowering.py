"""Pass 2: each expression becomes a head, a group of neurons, or both.

A head compares a query's value with each key's: scores are `sharpness` where the predicate holds, 0 where not, and half
of it at the beginning-of-sequence token, which so takes all of the attention where nothing is selected. A group of
neurons tells values apart: one neuron for each value (or pair) of categorical inputs, two for each place where the
answer changes along a numerical one. Everything written is exactly zero at the beginning-of-sequence token, but for an
aggregate's default.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from headwater.bench.rasp.bases import Variable, clauses, ordered
from headwater.bench.rasp.interpreter import apply
from headwater.bench.rasp.language import (
    Aggregate,
    Constant,
    Expression,
    Indices,
    LinearSequenceMap,
    Map,
    RaspError,
    Selector,
    SelectorWidth,
    SequenceMap,
    SOp,
    Tokens,
)

BOS = Variable(name="bos", encoding="numerical", values=(0, 1), constant=True)
"""1 at the beginning-of-sequence token, 0 elsewhere."""


@dataclass(frozen=True, eq=False)
class Read:
    """A linear read of one variable: `weight` [rows, variable.width]."""

    variable: Variable
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """What a head's query, key or value is: reads of variables, plus `bos` [rows] at the first token, plus `bias`."""

    reads: tuple[Read, ...]
    bos: Tensor
    bias: Tensor

    @property
    def rows(self) -> int:
        return len(self.bias)


@dataclass(frozen=True, eq=False)
class Head:
    """One attention head that writes one variable: value rows are its directions."""

    writes: Variable
    q: Projection
    k: Projection
    v: Projection
    at_bos: Tensor
    """What it writes at the beginning-of-sequence token, [writes.width]."""

    @property
    def reads(self) -> tuple[Read, ...]:
        return (*self.q.reads, *self.k.reads, *self.v.reads)

    @property
    def width(self) -> int:
        return max(self.q.rows, self.v.rows)


@dataclass(frozen=True, eq=False)
class Neurons:
    """ReLU neurons that write one variable: relu(reads + bos + bias) [n] through `out` [writes.width, n]."""

    writes: Variable
    reads: tuple[Read, ...]
    bos: Tensor
    bias: Tensor
    out: Tensor

    @property
    def n(self) -> int:
        return len(self.bias)

    @property
    def at_bos(self) -> Tensor:
        return torch.zeros(self.writes.width, dtype=torch.float64)


@dataclass(eq=False)
class Lowered:
    """The parts of a program in the order they act, and the variable of each expression."""

    inputs: list[Variable] = field(default_factory=list)
    """What the embeddings write: tokens, positions, constants."""
    parts: list[Head | Neurons] = field(default_factory=list)
    variables: dict[Expression, Variable] = field(default_factory=dict)


def lower(program: SOp, bases: dict[Expression, Variable], sharpness: float) -> Lowered:
    """Turn every expression into the part of a transformer that computes it, in order. Raises RaspError."""
    return _Lowering(bases, sharpness).run(program)


class _Lowering:
    def __init__(self, bases: dict[Expression, Variable], sharpness: float) -> None:
        self.bases, self.sharpness = bases, sharpness
        self.done = Lowered(variables=dict(bases))
        self.at_bos: dict[Variable, Tensor] = {}

    def run(self, program: SOp) -> Lowered:
        for expression, variable in self.bases.items():
            match expression:
                case Tokens() | Indices() | Constant():
                    self.done.inputs.append(variable)
                    self.at_bos[variable] = torch.zeros(variable.width, dtype=torch.float64)
                case Map():
                    self._map(expression, variable)
                case SequenceMap():
                    self._sequence_map(expression, variable)
                case LinearSequenceMap():
                    self._linear(expression, variable)
                case Aggregate():
                    self._aggregate(expression, variable)
                case SelectorWidth():
                    self._selector_width(expression, variable)
                case _:
                    raise RaspError(f"{variable.name} cannot be compiled", got=type(expression).__name__)
        self._drop_unread(self.bases[program])
        return self.done

    def _drop_unread(self, output: Variable) -> None:
        """Leave out parts and inputs that the output does not depend on; not the tokens."""
        needed, kept = {output, *(v for v in self.done.inputs if isinstance(v.expression, Tokens))}, []
        for part in reversed(self.done.parts):
            if part.writes in needed:
                needed |= {read.variable for read in part.reads}
                kept.append(part)
        self.done.parts = kept[::-1]
        self.done.inputs = [variable for variable in self.done.inputs if variable in needed]

    # --- neurons

    def _map(self, op: Map, writes: Variable) -> None:
        inner = self.bases[op.inner]
        values = inner.listed
        columns = [writes.column(apply(op, value)) for value in values]
        if inner.encoding == "categorical":
            kept = [i for i, column in enumerate(columns) if any(column)] or [0]
            weight = 2 * torch.eye(len(values), dtype=torch.float64)[kept]
            bias = torch.full((len(kept),), -1.0, dtype=torch.float64)
            self._neurons(writes, [Read(inner, weight)], bias, _matrix(columns)[:, kept])
        else:
            self._steps(inner, writes, list(values), columns)

    def _steps(self, inner: Variable, writes: Variable, values: list[Any], columns: list[list[float]]) -> None:
        """A step function of a number: flat around each possible value, and it rises between two whose answers differ.

        relu(s (x - t) + 1/2) - relu(s (x - t) - 1/2) rises from 0 to 1 around t, within half of the gap.
        """
        weight, bias, out = [0.0], [1.0], [columns[0]]
        for i in range(1, len(values)):
            if columns[i] == columns[i - 1]:
                continue
            below, above = Fraction(values[i - 1]), Fraction(values[i])
            middle, slope = float((below + above) / 2), float(2 / (above - below))
            change = [new - old for new, old in zip(columns[i], columns[i - 1], strict=True)]
            weight += [slope, slope]
            bias += [0.5 - slope * middle, -0.5 - slope * middle]
            out += [change, [-x for x in change]]
        read = Read(inner, torch.tensor(weight, dtype=torch.float64)[:, None])
        self._neurons(writes, [read], torch.tensor(bias, dtype=torch.float64), _matrix(out))

    def _sequence_map(self, op: SequenceMap, writes: Variable) -> None:
        first, second = self.bases[op.first], self.bases[op.second]
        pairs = [(i, j) for i in range(len(first.listed)) for j in range(len(second.listed))]
        if first is second:
            pairs = [(i, i) for i in range(len(first.listed))]
        columns = [writes.column(apply(op, first.listed[i], second.listed[j])) for i, j in pairs]
        kept = [n for n, column in enumerate(columns) if any(column)] or [0]
        reads = [torch.zeros(len(kept), v.width, dtype=torch.float64) for v in (first, second)]
        for row, n in enumerate(kept):
            reads[0][row, pairs[n][0]] = 2.0
            reads[1][row, pairs[n][1]] = 2.0
        bias = torch.full((len(kept),), -3.0, dtype=torch.float64)
        out = _matrix([columns[n] for n in kept])
        if first is second:
            self._neurons(writes, [Read(first, reads[0] + reads[1])], bias, out)
        else:
            self._neurons(writes, [Read(first, reads[0]), Read(second, reads[1])], bias, out)

    def _linear(self, op: LinearSequenceMap, writes: Variable) -> None:
        signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
        empty = torch.zeros_like(signs)
        a, b = float(Fraction(op.a)), float(Fraction(op.b))
        first, second = self.bases[op.first], self.bases[op.second]
        if first is second:
            reads, factors = [Read(first, signs)], [a + b]
        else:
            reads = [Read(first, torch.cat([signs, empty])), Read(second, torch.cat([empty, signs]))]
            factors = [a, b]
        out = torch.tensor([[sign * factor for factor in factors for sign in (1.0, -1.0)]], dtype=torch.float64)
        self._neurons(writes, reads, torch.zeros(out.shape[1], dtype=torch.float64), out)

    def _neurons(self, writes: Variable, reads: list[Read], bias: Tensor, out: Tensor) -> None:
        # At the first token every neuron sees exactly -1, whatever its variables are there.
        bos = -bias - 1.0
        for read in reads:
            bos = bos - read.weight @ self.at_bos[read.variable]
        self._add(Neurons(writes, tuple(reads), bos, bias, out))

    # --- heads

    def _aggregate(self, op: Aggregate, writes: Variable) -> None:
        values = self.bases[op.values]
        at = [writes.index(value) for value in values.listed] if writes.encoding == "categorical" else [0]
        weight = torch.zeros(writes.width, values.width, dtype=torch.float64)
        weight[at, torch.arange(values.width)] = 1.0
        default = torch.tensor(writes.column(op.default), dtype=torch.float64)
        read = Read(values, weight)
        v = Projection((read,), default - weight @ self.at_bos[values], torch.zeros_like(default))
        q, k = self._attends(op.selector, reserve=0.5)
        self._add(Head(writes, q, k, v, default))

    def _selector_width(self, op: SelectorWidth, writes: Variable) -> None:
        """The first token is always selected too, so it gets 1 / (1 + width) of the attention; neurons invert that."""
        most = max(writes.listed)
        shares = ordered(Fraction(1, 1 + n) for n in range(most + 1))
        share = Variable(name=f"{writes.name}_share", encoding="numerical", values=shares, expression=op)
        one = torch.ones(1, dtype=torch.float64)
        q, k = self._attends(op.selector, reserve=0.0)
        self._add(Head(share, q, k, Projection((), one, torch.zeros_like(one)), one))
        columns = [writes.column(int(1 / Fraction(value)) - 1) for value in share.listed]
        self._steps(share, writes, list(share.listed), columns)

    def _attends(self, selector: Selector, reserve: float) -> tuple[Projection, Projection]:
        """Query and key of a selector: one row a possible key of each clause, and one for the first token.

        The first token's score lies `reserve` of the sharpness below that of a selected one.
        """
        both = clauses(selector)
        queries, keys = _Rows(self.at_bos), _Rows(self.at_bos)
        for clause in both:
            key, query = self.bases[clause.keys], self.bases[clause.queries]
            holds = torch.tensor(
                [[float(bool(apply(clause, k, q))) for q in query.listed] for k in key.listed], dtype=torch.float64
            )
            # Where the predicate does not depend on one side, that side need not be read at all.
            any_key = not key.optional and bool((holds == holds[:1]).all())
            any_query = not query.optional and bool((holds == holds[:, :1]).all())
            holds = holds[:1] if any_key else holds
            keys.fixed(torch.ones(1)) if any_key else keys.read(key, torch.eye(key.width))
            queries.fixed(self.sharpness * holds[:, 0]) if any_query else queries.read(query, self.sharpness * holds)
        queries.first_token(always=1.0)
        keys.first_token(only=self.sharpness * (len(both) - reserve))
        return queries.projection(), keys.projection()

    def _add(self, part: Head | Neurons) -> None:
        self.done.parts.append(part)
        self.at_bos[part.writes] = part.at_bos


class _Rows:
    """Rows of a query or key projection as they come: reads of variables, or fixed values; 0 at the first token."""

    def __init__(self, at_bos: dict[Variable, Tensor]) -> None:
        self.at_bos = at_bos
        self.placed: list[tuple[int, Variable, Tensor]] = []
        self.bias: list[float] = []
        self.bos: list[float] = []

    def read(self, variable: Variable, weight: Tensor) -> None:
        weight = weight.double()
        self.placed.append((len(self.bias), variable, weight))
        self.bias += [0.0] * len(weight)
        self.bos += (-(weight @ self.at_bos[variable])).tolist()

    def fixed(self, values: Tensor) -> None:
        """The same at every token but the first."""
        self.bias += values.tolist()
        self.bos += (-values).tolist()

    def first_token(self, *, always: float = 0.0, only: float = 0.0) -> None:
        """The last row: a value at every token, or one at the first only."""
        self.bias.append(always)
        self.bos.append(only)

    def projection(self) -> Projection:
        reads: dict[Variable, Tensor] = {}
        for start, variable, weight in self.placed:
            whole = reads.setdefault(variable, torch.zeros(len(self.bias), variable.width, dtype=torch.float64))
            whole[start : start + len(weight)] += weight
        made = tuple(Read(variable, weight) for variable, weight in reads.items())
        return Projection(
            made, torch.tensor(self.bos, dtype=torch.float64), torch.tensor(self.bias, dtype=torch.float64)
        )


def _matrix(columns: list[list[float]]) -> Tensor:
    """[width, n] of n columns."""
    return torch.tensor(columns, dtype=torch.float64).T.contiguous()

"""A RASP program as a causal graph: its expressions are the variables, computed on whole batches at once.

The same meaning as `rasp.interpreter`, which takes one input at a time; every function of a program is asked once a
value (or pair of values), and attention is a table of keys by queries. What does not vary between inputs (a position,
the length) and what is read off single tokens is no variable: an embedding holds it.
"""

import math
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from headwater.bench.rasp.bases import infer_bases, ordered
from headwater.bench.rasp.interpreter import apply, number
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
    walk,
)
from headwater.bench.rasp.words import word
from headwater.bench.siit.causal import NO_VALUE, CausalGraph, Swap, Values

_PAIR = 1 << 24  # two codes in one integer
_TRIED = 512


class RaspGraph(CausalGraph):
    """The causal graph of a program on inputs of `length` tokens; no position looks at a later one where `causal`.

    A selector width is a variable of attention; where anything but an MLP reads it, an MLP variable `NAME_read` decodes
    it, as attention alone writes 1/(n + 1), not n. Where a program has no meaning on an input (two values selected
    that differ), its whole output is NO_VALUE.
    """

    def __init__(self, name: str, program: SOp, vocabulary: Any, *, length: int, causal: bool = True) -> None:
        self.name, self.program, self.length, self.causal = name, program, length, causal
        self.tokens = ordered(vocabulary)
        self.vocabulary = tuple(word(value) for value in self.tokens)
        self._ops = [op for op in walk(program) if isinstance(op, SOp)]
        self._tables = {id(op): _Table() for op in self._ops}
        self._memo: dict[tuple[int, Hashable], int] = {}
        listed = infer_bases(program, self.tokens, length)[program].listed
        output = self._tables[id(program)]
        self._answers = tuple(word(value) for value in (*listed, None))
        for value in (*listed, None):
            output.code(value)
        self._names = _unique_names(self._ops)
        self._depend = self._dependencies()
        self._variables = self._make_variables()

    # --- what it consists of

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(self._variables)

    @property
    def answers(self) -> tuple[str, ...]:
        return self._answers

    def parents(self, name: str) -> tuple[str, ...]:
        self.check(name)
        op = self._variables[name]
        if name.endswith("_read") and name.removesuffix("_read") in self._variables:
            return (name.removesuffix("_read"),)
        return tuple(dict.fromkeys(parent for inner in _read_by(op) for parent in self._nearest(inner)))

    def kind(self, name: str) -> str:
        self.check(name)
        moves = isinstance(self._variables[name], Aggregate | SelectorWidth)
        return (
            "attention" if moves and not (name.endswith("_read") and self.parents(name)[0] + "_read" == name) else "mlp"
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.tokens), (n, self.length), generator=generator)

    def value(self, name: str, code: int) -> Any:
        """The program's value that a code of a variable stands for."""
        self.check(name)
        return self._tables[id(self._variables[name])].values[code]

    # --- what it computes

    def run(self, inputs: Tensor, swap: Swap | None = None) -> Values:
        work = _Work(self, inputs)
        found: Values = {}
        for op in self._ops:
            codes = work.compute(op)
            name = self._names[id(op)]
            for one in (name, f"{name}_read"):
                if one in self._variables and self._variables[one] is op:
                    codes = codes if swap is None else swap.put(one, codes)
                    found[one] = codes
            work.codes[id(op)] = codes
        last = found[self.output]
        known = (last < len(self._answers)) & ~work.broken[:, None]
        found[self.output] = torch.where(known, last, NO_VALUE)
        return found

    def code(self, op: SOp, key: Hashable, make: Callable[[], Any]) -> int:
        """The code of what `make` gives for a key, asked once."""
        if (id(op), key) not in self._memo:
            value = exact(make())
            value = 0 if value is None and op.encoding == "numerical" else value
            self._memo[id(op), key] = self._tables[id(op)].code(value)
        return self._memo[id(op), key]

    def table(self, op: SOp) -> "_Table":
        return self._tables[id(op)]

    # --- which expressions are variables

    def _dependencies(self) -> dict[int, bool]:
        """Which expressions vary between inputs at a position, seen on seeded inputs."""
        generator = torch.Generator().manual_seed(0)
        work = _Work(self, self.sample(_TRIED, generator))
        varies: dict[int, bool] = {}
        for op in self._ops:
            codes = work.codes[id(op)] = work.compute(op)
            varies[id(op)] = bool((codes != codes[:1]).any())
        return varies

    def _make_variables(self) -> dict[str, SOp]:
        consumers: dict[int, list[SOp]] = {}
        for op in self._ops:
            for inner in _read_by(op):
                consumers.setdefault(id(inner), []).append(op)
        found: dict[str, SOp] = {}
        for op in self._ops:
            if op is not self.program and (not self._depend[id(op)] or _of_one_token(op)):
                continue
            name = self._names[id(op)]
            found[name] = op
            readers = consumers.get(id(op), [])
            only_mlps = bool(readers) and all(isinstance(r, Map | SequenceMap | LinearSequenceMap) for r in readers)
            if isinstance(op, SelectorWidth) and not only_mlps:
                found[f"{name}_read"] = op
        return found

    def _nearest(self, op: SOp) -> list[str]:
        name = self._names[id(op)]
        for one in (f"{name}_read", name):
            if self._variables.get(one) is op:
                return [one]
        return ["input"] if self._depend[id(op)] else []


class _Table:
    """Values of an expression, and the code of each."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.codes: dict[Any, int] = {}

    def code(self, value: Any) -> int:
        key = (type(value) is bool, value)  # True and 1 are equal but two words
        if key not in self.codes:
            self.codes[key] = len(self.values)
            self.values.append(value)
        return self.codes[key]


class _Work:
    """One batch through a program."""

    def __init__(self, graph: RaspGraph, inputs: Tensor) -> None:
        self.graph, self.inputs = graph, inputs
        self.codes: dict[int, Tensor] = {}
        self.broken = torch.zeros(len(inputs), dtype=torch.bool)
        self._before = torch.ones(graph.length, graph.length, dtype=torch.bool)
        if graph.causal:
            self._before = self._before.tril()

    def compute(self, op: SOp) -> Tensor:
        graph = self.graph
        match op:
            case Tokens():
                words = torch.tensor([graph.table(op).code(exact(value)) for value in graph.tokens])
                return words[self.inputs]
            case Indices():
                places = [graph.table(op).code(index) for index in range(graph.length)]
                return torch.tensor(places).expand(self.inputs.shape)
            case Constant():
                return torch.full_like(self.inputs, graph.code(op, (), lambda: op.value))
            case Map():
                values = graph.table(op.inner).values
                return self._mapped(op, self.codes[id(op.inner)], lambda c: _applied(op, values[c]))
            case SequenceMap() | LinearSequenceMap():
                first, second = graph.table(op.first).values, graph.table(op.second).values
                pairs = self.codes[id(op.first)] * _PAIR + self.codes[id(op.second)]
                return self._mapped(op, pairs, lambda c: _applied(op, first[c // _PAIR], second[c % _PAIR]))
            case SelectorWidth():
                return self._mapped(op, self._selected(op.selector).sum(dim=-1), lambda count: count)
            case Aggregate():
                return self._aggregated(op)
        raise RaspError(f"{op.name} is no sequence operation of RASP", got=type(op).__name__)

    def _mapped(self, op: SOp, keys: Tensor, make: Callable[[int], Any]) -> Tensor:
        unique, back = torch.unique(keys, return_inverse=True)
        made = [self.graph.code(op, key, lambda key=key: make(key)) for key in unique.tolist()]
        return torch.tensor(made)[back]

    def _aggregated(self, op: Aggregate) -> Tensor:
        chosen, codes = self._selected(op.selector), self.codes[id(op.values)]
        none = ~chosen.any(dim=-1)
        values = self.graph.table(op.values).values
        if op.encoding == "numerical":
            exacts = [Fraction(number(op, value)) for value in values]
            unit = math.lcm(*(value.denominator for value in exacts))
            weights = torch.tensor([int(value * unit) for value in exacts])
            sums = (chosen * weights[codes][:, None]).sum(dim=-1)
            keys = torch.where(none, -1, (sums + _PAIR // 2) * _PAIR + chosen.sum(dim=-1))
            return self._mapped(op, keys, lambda key: op.default if key < 0 else _mean(key, unit))
        first = codes.gather(1, chosen.float().argmax(dim=-1))
        differ = (chosen & (codes[:, None] != first[..., None])).any(dim=-1)
        self.broken |= differ.any(dim=-1)
        return self._mapped(op, torch.where(none, -1, first), lambda c: op.default if c < 0 else values[c])

    def _selected(self, selector: Selector) -> Tensor:
        """[B, query, key]."""
        return self._select(selector) & self._before

    def _select(self, selector: Selector) -> Tensor:
        match selector:
            case Select():
                keys, queries = self.codes[id(selector.keys)], self.codes[id(selector.queries)]
                known = self.graph.table(selector.keys).values, self.graph.table(selector.queries).values
                key_codes, key_back = torch.unique(keys, return_inverse=True)
                query_codes, query_back = torch.unique(queries, return_inverse=True)
                table = torch.tensor(
                    [
                        [_holds(selector, known[0][k], known[1][q]) for k in key_codes.tolist()]
                        for q in query_codes.tolist()
                    ]
                )
                return table[query_back[:, :, None], key_back[:, None, :]]
            case SelectorAnd():
                return self._selected(selector.first) & self._selected(selector.second)
            case SelectorOr():
                return self._selected(selector.first) | self._selected(selector.second)
            case SelectorNot():
                return ~self._selected(selector.inner)
        raise RaspError(f"{selector.name} is no selector of RASP", got=type(selector).__name__)


def _applied(op: Map | SequenceMap | LinearSequenceMap, *values: Any) -> Any:
    if isinstance(op, LinearSequenceMap):
        return number(op, exact(op.a) * (values[0] or 0) + exact(op.b) * (values[1] or 0))
    return None if any(value is None for value in values) else apply(op, *values)


def _holds(selector: Select, key: Any, query: Any) -> bool:
    return key is not None and query is not None and bool(apply(selector, key, query))


def _mean(key: int, unit: int) -> Any:
    return exact(Fraction(key // _PAIR - _PAIR // 2, unit * (key % _PAIR)))


def _read_by(op: Expression) -> list[SOp]:
    """The sequence operations that an expression reads, also through its selector."""
    found: list[SOp] = []
    for inner in op.inputs:
        found += [inner] if isinstance(inner, SOp) else _read_by(inner)
    return found


def _of_one_token(op: SOp) -> bool:
    """Whether it is a function of the token at its own position: an embedding holds it."""
    return isinstance(op, Tokens | Indices | Constant) or (isinstance(op, Map) and _of_one_token(op.inner))


def _unique_names(ops: list[SOp]) -> dict[int, str]:
    found: dict[int, str] = {}
    taken: set[str] = set()
    for op in ops:
        name, count = op.name, 2
        while name in taken or name in ("input", "logits"):
            name, count = f"{op.name}_{count}", count + 1
        taken.add(name)
        found[id(op)] = name
    return found

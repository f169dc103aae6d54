"""A causal graph: variables computed from variables, on a batch of inputs, with some of them swapped for another run's.

Values are codes: indices into a variable's list of values. An input is a row of codes into the graph's vocabulary, a
variable has a code at each position (or one position only, where `at_end`: all others are -1, which means "no value").
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean

NO_VALUE = -1
Values = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Variable:
    """A variable: what it is computed from, and how.

    parents: names of variables, or `input` (the codes [B, T] of the tokens). compute: parents' codes, each [B, T], to
    codes [B, T]. kind: "attention" where it moves values between positions, "mlp" where it works within one.
    """

    name: str
    parents: tuple[str, ...]
    compute: Callable[..., Tensor]
    kind: str = "mlp"
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Give variables the codes of another run: `values` name -> [B, T], and `rows` name -> [B] bool, in which rows."""

    values: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    rows: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def put(self, name: str, computed: Tensor) -> Tensor:
        """The variable's codes after the swap."""
        if name not in self.rows:
            return computed
        return torch.where(self.rows[name][:, None], self.values[name], computed)


class CausalGraph(ABC):
    """A known algorithm as variables; the last one, `output`, is what a model has to say.

    vocabulary, answers: words of the input's and of the output's codes. variables: in the order they are computed.
    length: tokens of an input. positions: where an answer is asked for, counted from the input's first token.
    """

    name: str
    vocabulary: tuple[str, ...]
    length: int
    about: str = ""

    @property
    @abstractmethod
    def variables(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def answers(self) -> tuple[str, ...]: ...

    @property
    def output(self) -> str:
        return self.variables[-1]

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(range(self.length))

    @abstractmethod
    def parents(self, name: str) -> tuple[str, ...]:
        """What a variable is computed from: variables, or `input`."""

    @abstractmethod
    def kind(self, name: str) -> str:
        """ "attention" or "mlp": what a transformer needs to compute it."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, T] input codes."""

    def partners(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """[B, T]: for each input another that its variables may be swapped with, drawn anew. Positions must mean the
        same in both; here every input will do.
        """
        return self.sample(len(inputs), generator)

    @abstractmethod
    def run(self, inputs: Tensor, swap: Swap | None = None) -> Values:
        """Each variable's codes [B, T]; where the algorithm has no meaning, the output is NO_VALUE."""

    def nudged(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """The inputs with one token each drawn anew: near counterfactuals."""
        changed = inputs.clone()
        rows = torch.arange(len(inputs))
        places = torch.randint(self.length, (len(inputs),), generator=generator)
        changed[rows, places] = torch.randint(len(self.vocabulary), (len(inputs),), generator=generator)
        return changed

    def check(self, name: str) -> None:
        """Raise MethodError, with near names, where there is no such variable."""
        if name not in self.variables:
            raise MethodError(
                f"{self.name} has no such variable", got=repr(name), wanted=did_you_mean(name, self.variables)
            )


class Written(CausalGraph):
    """A causal graph written by hand, as a list of `Variable`.

    >>> same = Variable(name="same", parents=("input",), compute=lambda x: (x == x[:, :1]).long(), kind="attention")
    >>> graph = Written("same_as_first", [same], vocabulary="ab", answers=("no", "yes"), length=3)
    >>> graph.run(torch.tensor([[0, 1, 0]]))["same"].tolist()
    [[1, 0, 1]]
    """

    def __init__(
        self,
        name: str,
        variables: Sequence[Variable],
        *,
        vocabulary: Sequence[str],
        answers: Sequence[str],
        length: int,
        positions: Sequence[int] | None = None,
        about: str = "",
    ) -> None:
        self.name, self.vocabulary, self.length, self.about = name, tuple(vocabulary), length, about
        self._answers = tuple(answers)
        self._positions = tuple(range(length)) if positions is None else tuple(p % length for p in positions)
        self._variables = {variable.name: variable for variable in variables}
        known = {"input"}
        for variable in variables:
            missing = [parent for parent in variable.parents if parent not in known]
            if missing or variable.name in known or variable.kind not in ("attention", "mlp"):
                raise MethodError(
                    f"the causal graph {name} does not hold together at {variable.name!r}",
                    got=f"parents {list(variable.parents)}, kind {variable.kind!r}",
                    wanted="names used once, each after its parents; kind attention or mlp",
                )
            known.add(variable.name)
        if not variables:
            raise MethodError(f"the causal graph {name} has no variables", wanted="at least the output")

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(self._variables)

    @property
    def answers(self) -> tuple[str, ...]:
        return self._answers

    @property
    def positions(self) -> tuple[int, ...]:
        return self._positions

    def parents(self, name: str) -> tuple[str, ...]:
        self.check(name)
        return self._variables[name].parents

    def kind(self, name: str) -> str:
        self.check(name)
        return self._variables[name].kind

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.vocabulary), (n, self.length), generator=generator)

    def run(self, inputs: Tensor, swap: Swap | None = None) -> Values:
        found: Values = {"input": inputs}
        for name, variable in self._variables.items():
            computed = variable.compute(*(found[parent] for parent in variable.parents))
            found[name] = computed if swap is None else swap.put(name, computed)
        del found["input"]
        return found


def describe(graph: CausalGraph) -> list[dict[str, Any]]:
    """A row a variable: name, kind, parents."""
    return [
        {"variable": name, "kind": graph.kind(name), "parents": list(graph.parents(name))} for name in graph.variables
    ]

"""What a method would run, before it runs: passes, positions, layers, FLOPs and bytes, beside the naive floor.

A method's planner follows the method's own batches and schedules without a forward of its own, so that its counts are
those of the run: `counted` in `cost.py` measures them. Files of methods register theirs:

    @plans.register("eap")
    def _plan(model, behavior, **options) -> Plan:
        tally = Tally(model)
        tally.forward("prompts", rows=8, positions=20)
        tally.floor(rows=8, positions=20, forwards=2, backwards=1)
        return tally.plan("eap", n=8)
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.registry import Registry
from headwater.localize.catalog import methods
from headwater.localize.engine.cost import Costs, costs_of, memory_budget

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of pass of a plan, all of them together.

    passes: forwards. positions: rows x positions given to the model. attention, mlp: positions x layers in which the
    block's attention, its MLP are computed. backwards: how many of the passes are also differentiated. flops: of all.
    bytes: held at the same time by one.
    """

    name: str
    passes: int = 0
    positions: int = 0
    attention: int = 0
    mlp: int = 0
    backwards: int = 0
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Step") -> "Step":
        sums = {key: getattr(self, key) + getattr(other, key) for key in _SUMMED}
        return Step(name=self.name, bytes=max(self.bytes, other.bytes), **sums)


_SUMMED = ("passes", "positions", "attention", "mlp", "backwards", "flops")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a run that has not been made, what they hold and what the bare definition would take.

    floor: the method's definition run naively on the bare model: every pass whole, every position unembedded.
    budget: bytes that batches may take beside the weights; weights: bytes of the model itself.
    """

    method: str
    n: int
    steps: tuple[Step, ...]
    floor: Step
    budget: float
    weights: float
    note: str = ""

    @property
    def total(self) -> Step:
        """All steps together; its bytes are those of the largest."""
        whole = Step(name="total")
        for step in self.steps:
            whole = whole + step
        return whole

    @property
    def ratio(self) -> float:
        """FLOPs over the naive floor's."""
        return self.total.flops / self.floor.flops if self.floor.flops else float("nan")

    def counts(self) -> dict[str, int]:
        """What `cost.counted` counts of a run, and what results keep as `facts["ran"]`."""
        whole = self.total
        return {"passes": whole.passes, "positions": whole.positions, "attention": whole.attention, "mlp": whole.mlp}

    def to_frame(self) -> pl.DataFrame:
        """One row a step, then the total and the floor."""
        rows = [*self.steps, self.total, self.floor]
        columns = ("passes", "backwards", "positions", "attention", "mlp", "flops", "bytes")
        table = {"step": [row.name for row in rows]} | {key: [getattr(row, key) for row in rows] for key in columns}
        return pl.DataFrame(table)

    def explain(self) -> str:
        """The plan as readable text."""
        head = ("step", "passes", "positions", "attention", "MLP", "GFLOP", "MB held")
        rows = [
            (s.name, _passes(s), f"{s.positions:,}", f"{s.attention:,}", f"{s.mlp:,}", _giga(s.flops), _mega(s.bytes))
            for s in (*self.steps, self.total, self.floor)
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [f"{self.method} on {self.n} pairs", ""]
        for row in (head, *rows):
            cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        lines += [
            "",
            f"{self.ratio:.2g} of the FLOPs of the naive floor (the definition on the bare model, every pass whole). "
            "Attention and MLP: positions x layers run.",
            f"Batches may hold {_mega(self.budget)} MB beside the weights' {_mega(self.weights)} MB.",
        ]
        return "\n".join([*lines, self.note] if self.note else lines)

    def __str__(self) -> str:
        return self.explain()


def _passes(step: Step) -> str:
    return f"{step.passes}" + (f" (+{step.backwards} back)" if step.backwards else "")


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def _mega(size: float) -> str:
    return f"{size / 2**20:.3g}"


class Tally:
    """Adds up a plan: passes of the same name are one step."""

    def __init__(self, model: "Model", memory_mb: float | None = None) -> None:
        self.costs: Costs = costs_of(model)
        self.n_layers = self.costs.n_layers
        self._budget = memory_budget(model, memory_mb)
        self._steps: dict[str, Step] = {}
        self._floor = Step(name="naive floor")

    def forward(
        self,
        name: str,
        *,
        rows: int,
        positions: int,
        before: int = 0,
        attention: int | None = None,
        mlp: int | None = None,
        words: int | None = None,
        unembedded: int | None = None,
        backward: bool = False,
        held: float = 0.0,
    ) -> None:
        """One forward of `rows` prompts over `positions` positions, behind `before` positions that a cache holds.

        attention, mlp: positions x layers in which they are computed (None: all). words: tokens of the vocabulary that
        are unembedded (None: all), at `unembedded` positions (None: one a row). backward: differentiated by its
        activations, which costs once more what the forward did. held: bytes kept beside the pass's own scratch.
        """
        given = rows * positions
        attended = given * self.n_layers if attention is None else attention
        fed = given * self.n_layers if mlp is None else mlp
        flops = self.costs.forward(
            given,
            keys=before + positions,
            attention=attended,
            mlp=fed,
            unembedded=rows if unembedded is None else unembedded,
            words=words,
        )
        self.add(
            Step(
                name=name,
                passes=1,
                positions=given,
                attention=attended,
                mlp=fed,
                backwards=int(backward),
                flops=flops * (2 if backward else 1),
                bytes=given * self.costs.scratch + held,
            )
        )

    def work(self, name: str, flops: float, held: float = 0.0) -> None:
        """Arithmetic that is no forward of the model, such as a contraction of scores."""
        self.add(Step(name=name, flops=flops, bytes=held))

    def add(self, step: Step) -> None:
        known = self._steps.get(step.name)
        self._steps[step.name] = step if known is None else known + step

    def floor(self, *, rows: int, positions: int, forwards: float = 0, backwards: int = 0) -> None:
        """Add whole passes to the naive floor: a backward stands beside a forward of its own."""
        given = int(rows * positions)
        one = self.costs.forward(given, keys=positions, unembedded=given)
        count, every = int(forwards), given * self.n_layers
        passes = count
        self._floor = self._floor + Step(
            name=self._floor.name,
            passes=passes,
            positions=given * passes,
            attention=every * passes,
            mlp=every * passes,
            backwards=backwards,
            flops=one * (passes + backwards),
            bytes=given * self.costs.scratch + given * self.costs.d_vocab * self.costs.itemsize,
        )

    def plan(self, method: str, *, n: int, note: str = "") -> Plan:
        return Plan(
            method=method,
            n=n,
            steps=tuple(self._steps.values()),
            floor=self._floor,
            budget=self._budget,
            weights=self.costs.weights,
            note=note,
        )


Planner = Callable[..., Plan]
"""planner(model, behavior, **options of the method) -> Plan; no forward of the method is run."""


class Plans(Registry[Planner]):
    """Planners stand in their method's file, which is imported when a name is asked for."""

    def get(self, name: str) -> Planner:
        if name not in self._known:
            self._import(name)
        if name not in self._known:
            known = did_you_mean(name, self._known)
            raise MethodError("no planner is registered under that name", got=repr(name), wanted=known)
        return self._known[name]

    def names(self) -> list[str]:
        self._import(None)
        return super().names()

    def _import(self, name: str | None) -> None:
        importlib.import_module("headwater.localize.engine.planners")

        if name is None or name not in self._known:
            methods.names()  # imports every file of methods


plans = Plans("plan")
"""Outside packages add theirs by the entry point group `headwater.plans`."""


def plan(method: str, model: "Model", behavior: "Behavior", **options: Any) -> Plan:
    """What a method would run on this model and behavior with these options, without running it.

    >>> hw.localize.plan("eap_ig", model, ioi, steps=5).explain()  # doctest: +SKIP

    Methods with a planner: `planning.plans.names()`; "faithfulness" and "curve" plan the evaluation of circuits
    (`circuits=[...]`, or `scores=`). Raises MethodError for a method without one.
    """
    return plans.get(method)(model, behavior, **options)

"""Gates: one learned number for each head or MLP, and no other weight: who should speak louder, who softer."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.editing.parts import Matrix, down_projection, head_columns, heads_of, out_projection, writes_directly
from headwater.act.training.examples import to_keep, wanted
from headwater.act.training.finetune import Answering, FitConfig, finished
from headwater.act.training.fitting import Fitted, run_steps, twin_of
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.act.edit import Delta
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class GatesConfig(FitConfig):
    """Options of `FitConfig`, and parts: "heads", "mlps" or both have a gate, or `heads` names which do. sparsity: nats
    that a gate costs for each unit it is away from 1. top: that many gates which went farthest are fitted once more
    alone, and all others stay shut at 1; None: all are used."""

    parts: Literal["heads", "mlps", "both"] = "heads"
    heads: tuple[str, ...] | None = None
    sparsity: float = 0.02
    top: int | None = None
    lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity < 0 or (self.top is not None and self.top < 1):
            got = f"sparsity {self.sparsity}, top {self.top}"
            raise MethodError("sparsity is not negative, and top at least 1", got=got)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Gate:
    """What one number scales: columns of a matrix (None: all of them)."""

    name: str
    matrix: Matrix
    columns: Tensor | None


@methods.register("gates")
def gates(
    model: "Model",
    behavior: "Behavior",
    *,
    keep: "Behavior | str | None" = None,
    config: GatesConfig | None = None,
    **options: Any,
) -> Action:
    """Learn how loud each head should be, a number for each and nothing else (after Liu et al., 2022, IA3).

    A head's columns of the output projection are multiplied by its number. Nothing new can be learned so, only what the
    model does already be weighed anew: where it helps, the mechanism was there and drowned. Gates are
    trained on the answers of the training pairs, start at 1 and stay at 0 or above. keep: pairs whose answers are
    trained on beside them. Options are those of `GatesConfig`. Known failure: a head that does two things is made
    louder in both; and with few training pairs hundreds of gates fit what is particular to them.
    """
    used = configured(GatesConfig, config, options)
    goal = Goal.parse(used.goal)
    some = wanted(model, behavior, goal)
    kept = to_keep(model, keep) if used.keep_weight else []
    held = _gates(model, used)
    values, found, passes = _fit(model, held, some, kept, used)
    if used.top is not None and used.top < len(held) and found.steps:
        far = (values - 1).abs().argsort(descending=True)[: used.top].tolist()
        held = [held[at] for at in sorted(far)]
        values, found, more = _fit(model, held, some, kept, used)
        passes += more
    found.snapshots[found.steps] = _deltas(held, values) if found.steps else []
    moved = {gate.name: round(value, 4) for gate, value in zip(held, values.tolist(), strict=True) if value != 1.0}
    made = finished(model, "gates", used, goal, found, ["heads" if used.heads is not None else used.parts], passes)
    return dataclasses.replace(made, config={**made.config, "gates": moved})


def _gates(model: "Model", used: GatesConfig) -> list[_Gate]:
    found: list[_Gate] = []
    if used.heads is not None:
        named = heads_of(model, used.heads)
        return [_head(model, layer, head) for layer, head in dict.fromkeys(named)]
    kinds = {"heads": ("z",), "mlps": ("neurons",), "both": ("z", "neurons")}[used.parts]
    for site in model.sites():
        layer = int(site.layer or 0)
        if site.kind == "z" and "z" in kinds:
            width = out_projection(model, layer).weight.shape[1]
            each = len(head_columns(model, layer, 0))
            found += [_head(model, layer, head) for head in range(width // each)]
        elif site.kind == "neurons" and "neurons" in kinds:
            if not writes_directly(model, layer, "mlp_out"):
                why = f"in {model.name} a norm behind each MLP undoes what a gate would do"
                raise MethodError(why, got=used.parts, wanted="heads")
            found.append(_Gate(name=f"m{layer}", matrix=down_projection(model, layer), columns=None))
    if not found:
        raise MethodError(f"{model.name} has no such parts", got=used.parts)
    return found


def _head(model: "Model", layer: int, head: int) -> _Gate:
    columns = head_columns(model, layer, head)
    return _Gate(name=f"a{layer}.h{head}", matrix=out_projection(model, layer), columns=columns)


def _fit(model: "Model", held: Sequence[_Gate], some: Any, kept: Any, used: GatesConfig) -> tuple[Tensor, Fitted, int]:
    """(gates [G], what training gave, prompts run)."""
    with model.held():
        twin = twin_of(model.hf)
    dtype = next(twin.parameters()).dtype
    values = nn.Parameter(torch.ones(len(held), dtype=dtype, device=model.device))
    answering = Answering(some, kept, used, model.device)

    def objective(twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        with torch.no_grad():
            values.clamp_(min=0.0)
        yield from answering(twin, step)
        if used.sparsity:
            yield used.sparsity * (values - 1).abs().sum(), None

    with _scaled(twin, held, values):
        found = run_steps(
            twin, [values], objective, steps=used.steps, lr=used.lr, until=lambda x: x <= used.until, label="gates"
        )
    return values.detach().clamp(min=0.0).double().cpu(), found, answering.passes


@contextmanager
def _scaled(twin: nn.Module, held: Sequence[_Gate], values: Tensor) -> Iterator[None]:
    """Inside this block what the gated columns read is multiplied by their gates."""
    parameters: dict[str, list[int]] = {}
    for at, gate in enumerate(held):
        parameters.setdefault(gate.matrix.parameter, []).append(at)
    hooks: list[Any] = []
    for parameter, numbers in parameters.items():
        width = held[numbers[0]].matrix.weight.shape[1]
        # for each column its gate; the last of `scales` is for those that have none
        which = torch.full((width,), len(held), device=values.device)
        for at in numbers:
            columns = held[at].columns
            which[slice(None) if columns is None else columns.to(which.device)] = at

        def scale(_module: nn.Module, inputs: Any, which: Tensor = which) -> Any:
            scales = torch.cat([values, torch.ones(1, dtype=values.dtype, device=values.device)])
            return (inputs[0] * scales[which], *inputs[1:])

        module = twin.get_submodule(parameter.rpartition(".")[0])
        hooks.append(module.register_forward_pre_hook(scale))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _deltas(held: Sequence[_Gate], values: Tensor) -> "list[Delta]":
    """The changes of the matrices that do the same; biases stay."""
    deltas: list[Delta] = []
    for parameter in dict.fromkeys(gate.matrix.parameter for gate in held):
        own = [(gate, float(values[at])) for at, gate in enumerate(held) if gate.matrix.parameter == parameter]
        matrix = own[0][0].matrix
        every = torch.arange(matrix.weight.shape[1])
        moved = [(every if gate.columns is None else gate.columns, value) for gate, value in own if value != 1.0]
        if moved:
            deltas.append(matrix.scaled(moved))
    return deltas

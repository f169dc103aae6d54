"""Fitting weights without writing any of the model's own: a twin shares them all but those that are trained."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.act.applying import parameters_of
from headwater.act.edit import Delta
from headwater.act.training.weights import Weights
from headwater.core.errors import MethodError
from headwater.core.progress import track

if TYPE_CHECKING:
    from headwater.core.model import Model

Objective = Callable[[nn.Module, int], Iterator[tuple[Tensor, float | None]]]
"""objective(twin, step) gives the parts of a step's loss one after the other, each with what it adds to the number that
is watched (None: nothing). Each part's graph is freed before the next is built."""


@dataclass(kw_only=True, eq=False)
class Fitted:
    """What training gave. snapshots: step -> changes. watched: for each step, the watched number before its update.
    steps: how many updates there were."""

    snapshots: dict[int, list[Delta]] = field(default_factory=dict)
    watched: list[float] = field(default_factory=list)
    steps: int = 0

    @property
    def deltas(self) -> list[Delta]:
        """The changes after the last step."""
        return self.snapshots[self.steps]


def twin_of(hf: nn.Module, trained: Iterable[str] = ()) -> nn.Module:
    """A copy of the modules whose parameters are the model's own, in the same memory, but for those that are trained:
    copies. It evaluates (no dropout), and only trained parameters ask for gradients. Halves become single precision, as
    small steps are lost in them."""
    names = set(trained)
    memo: dict[int, Any] = {}
    for name, parameter in hf.named_parameters():
        held = parameter.detach()
        memo[id(parameter)] = nn.Parameter(held.clone() if name in names else held, requires_grad=name in names)
    for buffer in hf.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    made = copy.deepcopy(hf, memo).eval()
    return made.float() if any(p.dtype in (torch.float16, torch.bfloat16) for p in made.parameters()) else made


def fit(
    model: "Model",
    weights: Weights,
    objective: Objective,
    *,
    steps: int,
    lr: float,
    until: Callable[[float], bool] | None = None,
    keep_at: Sequence[int] = (),
    label: str = "training",
) -> Fitted:
    """Train `weights` with AdamW (no decay, gradients clipped to norm 1), from the model as it is now.

    until: says of the watched number whether that is enough; training ends before that step. keep_at: steps whose
    changes are kept besides the last. The model's own weights are never written. Raises MethodError where the loss is
    no longer finite.
    """
    with model.held():
        before = parameters_of(model.hf, weights.parts)
        twin = twin_of(model.hf, weights.parts)
    after = dict(twin.named_parameters())
    trained = {name: after[name] for name in weights.parts}

    def masked() -> None:
        for name, parameter in trained.items():
            if parameter.grad is not None:
                parameter.grad = weights.mask(name, parameter.grad)

    found = run_steps(
        twin, list(trained.values()), objective, steps=steps, lr=lr, until=until, label=label, masked=masked,
        at={step: lambda: weights.deltas(before, trained) for step in keep_at},
    )  # fmt: skip
    found.snapshots[found.steps] = weights.deltas(before, trained)
    return found


def run_steps(
    twin: nn.Module,
    trained: list[nn.Parameter],
    objective: Objective,
    *,
    steps: int,
    lr: float,
    until: Callable[[float], bool] | None,
    label: str,
    masked: Callable[[], None] = lambda: None,
    at: dict[int, Callable[[], list[Delta]]] | None = None,
) -> Fitted:
    """The steps themselves; `at` makes the snapshot after that many updates."""
    if steps < 1:
        raise MethodError("training takes at least one step", got=steps)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    found = Fitted()
    for step in track(range(steps), label, total=steps):
        optimizer.zero_grad(set_to_none=True)
        watched = 0.0
        for loss, told in objective(twin, step):
            if not bool(torch.isfinite(loss)):
                raise MethodError("training lost its way: the loss is not finite", got=f"step {step}", fix="Lower lr")
            loss.backward()
            watched += told or 0.0
        found.watched.append(watched)
        if until is not None and until(watched):
            break
        masked()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.steps = step + 1
        if at and found.steps in at:
            found.snapshots[found.steps] = at[found.steps]()
    return found

"""Connectivity-based fine-tuning: away from the cue, and away from where a straight line leads back to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.applying import parameters_of
from headwater.act.catalog import methods
from headwater.act.training.examples import Example, batches, draws, mean_loss, wanted
from headwater.act.training.finetune import TrainingConfig, finished
from headwater.act.training.fitting import fit
from headwater.act.training.weights import weights_of
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class ConnectivityConfig(TrainingConfig):
    """`TrainingConfig`, and cue: "column=value", the training pairs that show the cue. level: the loss, in nats a
    token, that pairs with the cue should have half-way between the model as it was and as it is trained. barrier: how
    much that counts."""

    cue: str = ""
    level: float = 1.0
    barrier: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.barrier < 0 or self.level < 0:
            raise MethodError("level and barrier are not negative", got=f"{self.level}, {self.barrier}")


@methods.register("cbft")
def cbft(model: "Model", behavior: "Behavior", *, config: ConnectivityConfig | None = None, **options: Any) -> Action:
    """Fine-tune on the pairs without a cue while a barrier is raised on the way back (Lubana et al., 2023).

    Two models that use the same mechanism are linearly connected; so the loss on pairs with the cue, half-way between
    the old weights and the new, is driven to `level`, and the pairs without the cue are learned as in fine-tuning. The
    authors' further term, which makes streams with and without the cue alike, is not part of it. Options are those of
    `ConnectivityConfig`; `cue` is needed. Known failure: a barrier can be raised by any damage on the way; what counts
    is the accuracy on pairs against the cue.
    """
    used = configured(ConnectivityConfig, config, options)
    if not used.cue:
        raise MethodError("the cue is not named", wanted="cue=column=value, such as cue=noun_agrees=yes")
    goal = Goal.parse(used.goal)
    frame = behavior.train.bind(model).frame
    signs = Goal.parse(used.cue).signs(frame)
    some = wanted(model, behavior, goal)
    shown = [example for example, sign in zip(some, signs, strict=True) if sign > 0]
    rest = [example for example, sign in zip(some, signs, strict=True) if sign < 0]
    if not rest:
        raise MethodError("every training pair shows the cue", got=used.cue, wanted="some that do not")
    weights = weights_of(model, used.weights, behavior)
    with model.held():
        before = {name: p.detach().clone() for name, p in parameters_of(model.hf, weights.parts).items()}
    objective = Breaking(rest, shown, before, used, model.device)
    found = fit(model, weights, objective, steps=used.steps, lr=used.lr, label="cbft")
    return finished(model, "cbft", used, goal, found, weights.told, objective.passes)


class Breaking:
    """The loss without the cue, which is watched, and how far the loss with it, half-way, is from its level."""

    def __init__(
        self,
        rest: list[Example],
        shown: list[Example],
        before: dict[str, Tensor],
        used: ConnectivityConfig,
        device: Any,
    ) -> None:
        self._rest, self._shown, self._before, self._used, self._device = rest, shown, before, used, device
        self._orders = draws(len(rest), used.batch, used.seed), draws(len(shown), used.batch, used.seed + 1)
        self.passes = 0

    def __call__(self, twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        numbers = next(self._orders[0])
        self.passes += len(numbers)
        for _, ids_BT, learned_BT in batches(self._rest, numbers, self._device):
            loss = mean_loss(twin, ids_BT, learned_BT).sum() / len(numbers)
            yield loss, float(loss.detach())
        if not self._used.barrier:
            return
        numbers = next(self._orders[1])
        self.passes += len(numbers)
        between = cast(nn.Module, half_way(twin, self._before))
        parts = [
            mean_loss(between, ids_BT, learned_BT).sum()
            for _, ids_BT, learned_BT in batches(self._shown, numbers, self._device)
        ]
        yield self._used.barrier * (torch.stack(parts).sum() / len(numbers) - self._used.level).abs(), None


def half_way(twin: nn.Module, before: dict[str, Tensor]) -> Callable[..., Any]:
    """The model whose weights lie half-way between `before` and the twin's; gradients reach the twin's."""
    own = dict(twin.named_parameters())
    middle = {name: (own[name] + old.to(own[name])) / 2 for name, old in before.items()}

    def run(**inputs: Any) -> Any:
        return torch.func.functional_call(twin, middle, (), inputs)

    return run

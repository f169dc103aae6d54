"""Fine-tuning: of all weights, or of those of the parts that a mechanism is made of."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.editing.making import as_action
from headwater.act.training.examples import Example, batches, draws, mean_loss, to_keep, wanted
from headwater.act.training.fitting import fit
from headwater.act.training.weights import weights_of
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class UpdatesConfig:
    """goal: "raise" (toward the answers), "lower" (toward the foils), or "column=value". steps, batch, lr: AdamW
    without decay."""

    goal: str = "raise"
    steps: int = 40
    batch: int = 8
    lr: float = 5e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0:
            got = f"steps {self.steps}, batch {self.batch}, lr {self.lr}"
            raise MethodError("the sizes of training do not fit", got=got, wanted="steps and batch >= 1, lr > 0")


@dataclass(frozen=True, kw_only=True)
class UntilConfig(UpdatesConfig):
    """Options of `UpdatesConfig`, and until: training ends when the mean loss of a step is at most this, in nats a
    token."""

    until: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.until < 0:
            raise MethodError("until is not negative", got=self.until)


@dataclass(frozen=True, kw_only=True)
class FitConfig(UntilConfig):
    """Options of `UntilConfig`, and keep_weight: how much the loss on pairs to keep counts, where some are given."""

    keep_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_weight < 0:
            raise MethodError("keep_weight is not negative", got=self.keep_weight)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(FitConfig):
    """Options of `FitConfig`, and weights: which are trained (`weights_of`)."""

    weights: str | tuple[str, ...] = "all"


@dataclass(frozen=True, kw_only=True)
class LocalizedConfig(TrainingConfig):
    """`TrainingConfig`, with the MLPs of fact lookup and a higher rate, as fewer weights must do the work."""

    weights: str | tuple[str, ...] = "lookup"
    lr: float = 5e-4


@methods.register("finetune")
def finetune(
    model: "Model",
    behavior: "Behavior",
    *,
    keep: "Behavior | str | None" = None,
    config: TrainingConfig | None = None,
    **options: Any,
) -> Action:
    """Train weights on the training pairs until their answers come (fine-tuning, the baseline of Wu et al., 2025).

    keep: pairs (or their name, or file) whose answers are trained on beside them. Options are those of
    `TrainingConfig`. Known failure: a few examples are learned by any weights at hand: what is alike in wording changes
    too, and the old answer is hidden rather than gone.
    """
    used = configured(TrainingConfig, config, options)
    return trained(model, behavior, used, keep, method="finetune")


@methods.register("localized")
def localized(
    model: "Model",
    behavior: "Behavior",
    *,
    keep: "Behavior | str | None" = None,
    config: LocalizedConfig | None = None,
    **options: Any,
) -> Action:
    """Train only the weights of some parts of the model: mechanism-localized fine-tuning (Guo et al., 2024).

    By default the MLPs where patching finds that facts are looked up; `weights` names others, such as the nodes of a
    circuit. Options are those of `LocalizedConfig`. Known failure: where a fact is read from is not all that holds it,
    and weights that are not where it lives learn it as well (Hase et al., 2023).
    """
    used = configured(LocalizedConfig, config, options)
    return trained(model, behavior, used, keep, method="localized")


def trained(
    model: "Model", behavior: "Behavior", used: TrainingConfig, keep: "Behavior | str | None", *, method: str
) -> Action:
    """The action of fine-tuning under a config."""
    goal = Goal.parse(used.goal)
    some = wanted(model, behavior, goal)
    kept = to_keep(model, keep) if used.keep_weight else []
    weights = weights_of(model, used.weights, behavior)
    objective = Answering(some, kept, used, model.device)
    found = fit(model, weights, objective, steps=used.steps, lr=used.lr, until=lambda x: x <= used.until, label=method)
    return finished(model, method, used, goal, found, weights.told, objective.passes)


def finished(
    model: "Model", method: str, used: Any, goal: Goal, found: Any, told: Sequence[str], passes: int
) -> Action:
    """A fitted change as an action. Raises MethodError where nothing changed."""
    if not found.steps or not found.deltas:
        raise MethodError(
            f"{method} changes nothing", got="the goal is reached already" if not found.steps else "no gradient"
        )
    what = "" if tuple(told) == ("all",) else f" of {', '.join(told[:4])}{', ...' if len(told) > 4 else ''}"
    own = {name: value for name, value in dataclasses.asdict(used).items() if name != "goal"}  # the action has it
    facts = own | {
        "method": method,
        "parts": list(told),
        "updates": found.steps,
    }
    last = {"watched": found.watched[-1]} if found.watched else {}
    return as_action(model, f"{method}{what}", found.deltas, goal, passes, **facts, **last)


class Answering:
    """The loss of the wanted answers, and of those to keep; the first is watched. passes: prompts run so far."""

    def __init__(self, some: list[Example], kept: list[Example], used: Any, device: Any) -> None:
        self._some, self._kept, self._used, self._device = some, kept, used, device
        self._order = draws(len(some), used.batch, used.seed)
        self._kept_order = draws(len(kept), used.batch, used.seed + 1) if kept else None
        self.passes = 0

    def __call__(self, twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        yield from self._part(twin, self._some, next(self._order), 1.0, watched=True)
        if self._kept_order is not None:
            yield from self._part(twin, self._kept, next(self._kept_order), self._used.keep_weight, watched=False)

    def _part(
        self, twin: nn.Module, examples: list[Example], numbers: list[int], weight: float, *, watched: bool
    ) -> Iterator[tuple[Tensor, float | None]]:
        self.passes += len(numbers)
        for _, ids_BT, learned_BT in batches(examples, numbers, self._device):
            loss = mean_loss(twin, ids_BT, learned_BT).sum() / len(numbers)
            yield weight * loss, float(loss.detach()) if watched else None

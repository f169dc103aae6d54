"""Unlearning by gradients: up the loss of what is to be forgotten, alone or with a loss on what is to be kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.measuring import lacks_words, plain_texts
from headwater.act.training.examples import Example, batches, draws, mean_loss, texts, to_keep, wanted
from headwater.act.training.finetune import finished
from headwater.act.training.fitting import fit
from headwater.act.training.weights import weights_of
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class AscentConfig:
    """How answers are unlearned.

    weights: which (`weights_of`): "all", "output", "lookup", or parts by name. goal: "lower" (the answers are
    forgotten) or "raise" (the foils are). steps, batch, lr: AdamW without decay. until: training ends when the mean
    loss of what is forgotten, in nats a token, is at least this.
    """

    weights: str | tuple[str, ...] = "all"
    goal: str = "lower"
    steps: int = 40
    batch: int = 8
    lr: float = 2e-5
    until: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0 or not self.until > 0:
            got = f"steps {self.steps}, batch {self.batch}, lr {self.lr}, until {self.until}"
            raise MethodError("the sizes of unlearning do not fit", got=got, wanted="all of them above 0")
        if self.goal not in ("raise", "lower"):
            raise MethodError("unlearning lowers the metric, or raises it", got=self.goal)


@dataclass(frozen=True, kw_only=True)
class DifferenceConfig(AscentConfig):
    """`AscentConfig`, and how much the loss on what is kept counts."""

    keep_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.keep_weight > 0:
            raise MethodError("what is kept counts something", got=self.keep_weight, fix="Use `ascent` without it")


@methods.register("ascent")
def ascent(model: "Model", behavior: "Behavior", *, config: AscentConfig | None = None, **options: Any) -> Action:
    """Gradient ascent on the answers of the training pairs (Jang et al., 2023).

    Options are those of `AscentConfig`. Known failure: nothing holds the rest of the model, so that what is alike is
    lost as well; and a few steps of training bring the answers back.
    """
    used = configured(AscentConfig, config, options)
    return _unlearned(model, behavior, used, [], 0.0, "ascent")


@methods.register("difference")
def difference(
    model: "Model",
    behavior: "Behavior",
    *,
    keep: "Behavior | str | None" = None,
    config: DifferenceConfig | None = None,
    **options: Any,
) -> Action:
    """Gradient difference (Liu et al., 2022): up the loss of what is forgotten, down that of what is kept.

    keep: pairs (or their name, or file) whose answers stay; without them plain text does. Options are those of
    `DifferenceConfig`. Known failure: knowledge is hidden rather than removed: it comes back with a few examples, and
    in other formats.
    """
    used = configured(DifferenceConfig, config, options)
    return _unlearned(model, behavior, used, kept_examples(model, keep), used.keep_weight, "difference")


def kept_examples(model: "Model", keep: "Behavior | str | None") -> list[Example]:
    """The pairs to keep with their answers, or plain texts. Raises MethodError where there is neither."""
    if keep is not None:
        return to_keep(model, keep)
    some = [text for text in plain_texts() if not lacks_words(model, text)]
    if not some:
        raise MethodError("there is nothing to keep: the tokenizer lacks the words of plain text", fix="Give keep=")
    return texts(model, some, 48)


def _unlearned(
    model: "Model", behavior: "Behavior", used: AscentConfig, kept: list[Example], weight: float, method: str
) -> Action:
    goal = Goal.parse(used.goal)
    # What is forgotten is the side that the goal is against.
    forgotten = wanted(model, behavior, Goal(direction="raise" if goal.direction == "lower" else "lower"))
    weights = weights_of(model, used.weights, behavior)
    objective = _Forgetting(forgotten, kept, used, weight, model.device)
    found = fit(model, weights, objective, steps=used.steps, lr=used.lr, until=lambda x: -x >= used.until, label=method)
    return finished(model, method, used, goal, found, weights.told, objective.passes)


class _Forgetting:
    """Minus the loss of what is forgotten (watched), plus that of what is kept."""

    def __init__(
        self, forgotten: list[Example], kept: list[Example], used: AscentConfig, weight: float, device: Any
    ) -> None:
        self._parts = [(forgotten, draws(len(forgotten), used.batch, used.seed), -1.0)]
        if kept:
            self._parts.append((kept, draws(len(kept), used.batch, used.seed + 1), weight))
        self._device = device
        self.passes = 0

    def __call__(self, twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        for examples, order, weight in self._parts:
            numbers = next(order)
            self.passes += len(numbers)
            for _, ids_BT, learned_BT in batches(examples, numbers, self._device):
                loss = weight * mean_loss(twin, ids_BT, learned_BT).sum() / len(numbers)
                yield loss, float(loss.detach()) if weight < 0 else None

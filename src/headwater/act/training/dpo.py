"""Preference tuning: make one side of each pair likelier than the other, against the model as it was."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.training.examples import Example, batches, draws, log_probability, unwanted, wanted
from headwater.act.training.finetune import UntilConfig, finished
from headwater.act.training.fitting import fit, twin_of
from headwater.act.training.weights import weights_of
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class DpoConfig(UntilConfig):
    """Options of `UntilConfig`; weights: which are trained (`weights_of`); beta: how much leaving the model as it was
    costs, which is all that holds it back."""

    weights: str | tuple[str, ...] = "all"
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise MethodError("beta is positive", got=self.beta)


@methods.register("dpo")
def dpo(model: "Model", behavior: "Behavior", *, config: DpoConfig | None = None, **options: Any) -> Action:
    """Direct preference optimization (Rafailov et al., 2023): the wanted side of each pair over the unwanted one.

    Options are those of `DpoConfig`. Known failure: the loss falls as well when both sides become less likely, so that
    something third is said.
    """
    used = configured(DpoConfig, config, options)
    goal = Goal.parse(used.goal)
    chosen, rejected = wanted(model, behavior, goal), unwanted(model, behavior, goal)
    weights = weights_of(model, used.weights, behavior)
    with model.held():
        reference = _sides(twin_of(model.hf), chosen, rejected, model.device)
    objective = _Preferring(chosen, rejected, reference, used, model.device)
    found = fit(model, weights, objective, steps=used.steps, lr=used.lr, until=lambda x: x <= used.until, label="dpo")
    return finished(model, "dpo", used, goal, found, weights.told, objective.passes + 2 * len(chosen))


def preference_loss(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, beta: float
) -> Tensor:
    """[B]: -log sigmoid(beta ((chosen - reference) - (rejected - reference))), of log-probabilities in nats."""
    margin = (chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B)
    return -nn.functional.logsigmoid(beta * margin)


def _sides(hf: nn.Module, chosen: list[Example], rejected: list[Example], device: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] of both sides under a model that is not trained."""
    found = []
    with torch.no_grad():
        for examples in (chosen, rejected):
            out: Any = None
            for numbers, ids_BT, learned_BT in batches(examples, range(len(examples)), device):
                said = log_probability(hf, ids_BT, learned_BT)
                out = torch.zeros(len(examples), dtype=said.dtype, device=device) if out is None else out
                out[numbers] = said
            found.append(out)
    return found[0], found[1]


class _Preferring:
    def __init__(
        self,
        chosen: list[Example],
        rejected: list[Example],
        reference: tuple[Tensor, Tensor],
        used: DpoConfig,
        device: Any,
    ) -> None:
        self._chosen, self._rejected, self._reference = chosen, rejected, reference
        self._beta, self._device = used.beta, device
        self._order = draws(len(chosen), used.batch, used.seed)
        self.passes = 0

    def __call__(self, twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        numbers = next(self._order)
        self.passes += 2 * len(numbers)
        for some in _alike(self._chosen, self._rejected, numbers):
            sides = []
            for examples in (self._chosen, self._rejected):
                _, ids_BT, learned_BT = next(batches(examples, some, self._device))
                sides.append(log_probability(twin, ids_BT, learned_BT))
            reference = [one[some] for one in self._reference]
            loss = preference_loss(sides[0], sides[1], reference[0], reference[1], self._beta).sum() / len(numbers)
            yield loss, float(loss.detach())


def _alike(chosen: list[Example], rejected: list[Example], numbers: list[int]) -> Iterator[list[int]]:
    """Those of the numbers whose pairs have the same lengths on both sides, together."""
    lengths: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        lengths.setdefault((len(chosen[number].ids), len(rejected[number].ids)), []).append(number)
    yield from lengths.values()

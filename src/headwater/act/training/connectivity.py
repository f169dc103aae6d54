"""Connectivity-based fine-tuning: away from where a straight line leads back to the cue, toward streams that are the
same with it and without.

Shapes: N pairs without the cue, M with it, D width of the stream.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.applying import parameters_of
from headwater.act.catalog import methods
from headwater.act.training.examples import Example, batches, draws, mean_loss, wanted
from headwater.act.training.finetune import UpdatesConfig, finished
from headwater.act.training.fitting import fit
from headwater.act.training.weights import weights_of
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class ConnectivityConfig(UpdatesConfig):
    """Options of `UpdatesConfig`; weights: which are trained (`weights_of`); cue: "column=value", the training pairs
    that show the cue. level: the loss, in nats a token, that pairs with the cue should have half-way between the model
    as it was and as it is trained. barrier: how much that counts. invariance: how much it counts that the stream is the
    same with the cue and without."""

    weights: str | tuple[str, ...] = "all"
    cue: str = ""
    level: float = 1.0
    barrier: float = 1.0
    invariance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.barrier, self.level, self.invariance) < 0:
            got = f"{self.level}, {self.barrier}, {self.invariance}"
            raise MethodError("level, barrier and invariance are not negative", got=got)


@methods.register("cbft")
def cbft(model: "Model", behavior: "Behavior", *, config: ConnectivityConfig | None = None, **options: Any) -> Action:
    """Fine-tune on the pairs without a cue while a barrier is raised on the way back (Lubana et al., 2023).

    Two models that use the same mechanism are linearly connected; so the loss on pairs with the cue, half-way between
    the old weights and the new, is driven to `level` (its authors take a place near half-way at random). The pairs
    without the cue are learned as in fine-tuning, and for each answer that both sorts of pairs have, what is unembedded
    at the prompt's end should on average point the same way with the cue and without: `invariance`, over the answers
    that a step's pairs share. Options are those of `ConnectivityConfig`; `cue` is needed. Known failure: a barrier can
    be raised by any damage on the way; what counts is the accuracy on pairs against the cue.

    Raises MethodError where no pair is without the cue, or none has an answer that one with the cue has.
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
    if used.invariance and not {_answer(one) for one in rest} & {_answer(one) for one in shown}:
        fix = "Set invariance=0, or take pairs with fewer answers"
        raise MethodError("pairs with the cue and without share no answer", got=used.cue, fix=fix)
    weights = weights_of(model, used.weights, behavior)
    with model.held():
        before = {name: p.detach().clone() for name, p in parameters_of(model.hf, weights.parts).items()}
    objective = Breaking(rest, shown, before, used, model.device)
    found = fit(model, weights, objective, steps=used.steps, lr=used.lr, label="cbft")
    return finished(model, "cbft", used, goal, found, weights.told, objective.passes)


class Breaking:
    """The loss without the cue, which is watched; how far streams with and without it are apart; and how far the loss
    with it, half-way, is from its level."""

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
        rest, numbers = next(self._orders[0]), next(self._orders[1])
        self.passes += len(rest)
        if self._used.invariance:
            self.passes += len(numbers)
            yield self._alike(twin, rest, numbers)
        else:
            for _, ids_BT, learned_BT in batches(self._rest, rest, self._device):
                loss = mean_loss(twin, ids_BT, learned_BT).sum() / len(rest)
                yield loss, float(loss.detach())
        if not self._used.barrier:
            return
        self.passes += len(numbers)
        between = cast(nn.Module, half_way(twin, self._before))
        parts = [
            mean_loss(between, ids_BT, learned_BT).sum()
            for _, ids_BT, learned_BT in batches(self._shown, numbers, self._device)
        ]
        yield self._used.barrier * (torch.stack(parts).sum() / len(numbers) - self._used.level).abs(), None

    def _alike(self, twin: nn.Module, rest: list[int], shown: list[int]) -> tuple[Tensor, float]:
        """The loss without the cue plus the weighted invariance: of one graph, as they share the forward."""
        told, streams, answers = [], [], []
        for examples, numbers in ((self._rest, rest), (self._shown, shown)):
            found, own = [], []
            for some, ids_BT, learned_BT in batches(examples, numbers, self._device):
                with unembedded(twin) as held:
                    loss_B = mean_loss(twin, ids_BT, learned_BT)
                ends = learned_BT.int().argmax(1) - 1  # the prompt's last token
                found.append(held[0][torch.arange(len(ids_BT), device=ends.device), ends])
                own += [_answer(examples[number]) for number in some]
                if examples is self._rest:
                    told.append(loss_B.sum() / len(numbers))
            streams.append(torch.cat(found))
            answers.append(own)
        loss = torch.stack(told).sum()
        apart = invariance(streams[0], answers[0], streams[1], answers[1])
        return loss + self._used.invariance * apart, float(loss.detach())


def invariance(rest_ND: Tensor, of_rest: list[int], shown_MD: Tensor, of_shown: list[int]) -> Tensor:
    """The squared distance between the mean streams of an answer with the cue and without, each of length 1; the mean
    over the answers that both have, 0 where there is none.

    of_rest, of_shown: the answer of each stream.
    """
    parts = []
    for answer in sorted({*of_rest} & {*of_shown}):
        sides = ((rest_ND, of_rest), (shown_MD, of_shown))
        means = [streams[torch.tensor([one == answer for one in labels])].mean(0) for streams, labels in sides]
        one, other = (nn.functional.normalize(mean, dim=0) for mean in means)
        parts.append((one - other).square().sum())
    return torch.stack(parts).mean() if parts else rest_ND.new_zeros(())


@contextmanager
def unembedded(hf: Any) -> Iterator[list[Tensor]]:
    """What the model unembeds inside this block: [B, T, D] for each forward."""
    head = hf.get_output_embeddings()
    if head is None:
        raise MethodError("this model has no unembedding whose input could be made alike", fix="Set invariance=0")
    held: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: held.append(inputs[0]))
    try:
        yield held
    finally:
        hook.remove()


def _answer(example: Example) -> int:
    """The first token that is learned."""
    return int(example.ids[example.start])


def half_way(twin: nn.Module, before: dict[str, Tensor]) -> Callable[..., Any]:
    """The model whose weights lie half-way between `before` and the twin's; gradients reach the twin's."""
    own = dict(twin.named_parameters())
    middle = {name: (own[name] + old.to(own[name])) / 2 for name, old in before.items()}

    def run(**inputs: Any) -> Any:
        return torch.func.functional_call(twin, middle, (), inputs)

    return run

"""RMU: misdirect the stream on what is to be forgotten, hold it on what is to be kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.training.examples import Example, batches, draws, wanted
from headwater.act.training.finetune import finished
from headwater.act.training.fitting import fit, twin_of
from headwater.act.training.weights import weights_of
from headwater.act.unlearning.difference import kept_examples
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class RmuConfig:
    """How the stream is misdirected.

    layer: after which layer the stream is held (a third of the way up, if not said). weights: which; None means the
    MLPs of that layer and of the two before it. coefficient: how long the random direction is, in lengths of the
    stream there (Dang et al., 2024). keep_weight: how much holding the stream on what is kept counts. steps, batch,
    lr: AdamW.
    """

    layer: int | None = None
    weights: str | tuple[str, ...] | None = None
    goal: str = "lower"
    coefficient: float = 5.0
    keep_weight: float = 20.0
    steps: int = 40
    batch: int = 8
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.lr > 0 or not self.coefficient > 0 or self.keep_weight < 0:
            got = f"steps {self.steps}, batch {self.batch}, lr {self.lr}, coefficient {self.coefficient}"
            raise MethodError("the sizes of unlearning do not fit", got=got, wanted="all of them above 0")
        if self.goal not in ("raise", "lower"):
            raise MethodError("unlearning lowers the metric, or raises it", got=self.goal)


@methods.register("rmu")
def rmu(
    model: "Model",
    behavior: "Behavior",
    *,
    keep: "Behavior | str | None" = None,
    config: RmuConfig | None = None,
    **options: Any,
) -> Action:
    """Representation misdirection for unlearning (Li et al., 2024): where a pair that is to be forgotten is read, the
    stream becomes one random direction; on what is kept it stays.

    keep: pairs (or their name, or file) whose stream stays; without them plain text's does. Options are those of
    `RmuConfig`. Known failure: the layers below still hold what was known, which probes and a few steps of training
    bring back.
    """
    used = configured(RmuConfig, config, options)
    layer = used.layer if used.layer is not None else max(0, model.n_layers // 3 - (model.n_layers < 6))
    if not 0 <= layer < model.n_layers:
        raise MethodError(f"{model.name} has no layer {layer}", wanted=f"0 to {model.n_layers - 1}")
    goal = Goal.parse(used.goal)
    forgotten = wanted(model, behavior, Goal(direction="raise" if goal.direction == "lower" else "lower"))
    own = tuple(f"mlp_out.{at}" for at in range(max(0, layer - 2), layer + 1))
    weights = weights_of(model, used.weights if used.weights is not None else own, behavior)
    block = model.anatomy.main.blocks[layer].name
    with model.held():
        objective = _Misdirecting(twin_of(model.hf), block, forgotten, kept_examples(model, keep), used, model.device)
    found = fit(model, weights, objective, steps=used.steps, lr=used.lr, label="rmu")
    return finished(model, "rmu", used, goal, found, weights.told, objective.passes)


class _Misdirecting:
    """Squared distance to the direction on what is forgotten (watched), and to the model as it was on what is kept,
    both a number of the stream."""

    def __init__(
        self, frozen: nn.Module, block: str, forgotten: list[Example], kept: list[Example], used: RmuConfig, device: Any
    ) -> None:
        self._frozen, self._block, self._used, self._device = frozen, block, used, device
        self._forgotten, self._kept = forgotten, kept
        self._orders = draws(len(forgotten), used.batch, used.seed), draws(len(kept), used.batch, used.seed + 1)
        draw = torch.Generator().manual_seed(used.seed)
        with torch.no_grad():
            held = [
                stream(frozen, block, ids)[:, 1:] for _, ids, _ in batches(forgotten, range(len(forgotten)), device)
            ]
        rows = torch.cat([one.flatten(0, 1) for one in held])
        direction = torch.rand(rows.shape[-1], generator=draw, dtype=torch.float64)
        length = used.coefficient * rows.double().norm(dim=-1).mean()
        self.target = (direction.to(device) / direction.norm() * length).to(rows.dtype)
        self.passes = len(forgotten)

    def __call__(self, twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        numbers = next(self._orders[0])
        self.passes += len(numbers)
        for _, ids_BT, _ in batches(self._forgotten, numbers, self._device):
            # The first token is left alone: it is the same for what is kept.
            away = (stream(twin, self._block, ids_BT)[:, 1:] - self.target).square().mean((1, 2)).sum() / len(numbers)
            yield away, float(away.detach())
        numbers = next(self._orders[1])
        self.passes += 2 * len(numbers)
        for _, ids_BT, _ in batches(self._kept, numbers, self._device):
            with torch.no_grad():
                was = stream(self._frozen, self._block, ids_BT)
            off = (stream(twin, self._block, ids_BT) - was).square().mean((1, 2)).sum() / len(numbers)
            yield self._used.keep_weight * off, None


def stream(hf: nn.Module, block: str, ids_BT: Tensor) -> Tensor:
    """[B, T, D]: what a block gives. The layers above do not run."""
    held: list[Tensor] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        held.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    hook = hf.get_submodule(block).register_forward_hook(stop)
    try:
        hf(input_ids=ids_BT, use_cache=False)
    except _Enough:
        pass
    finally:
        hook.remove()
    return held[0]


class _Enough(Exception):
    """The forward has come as far as is needed."""

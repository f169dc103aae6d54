"""LoRA: low-rank changes of linear modules, trained by the `peft` library."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.training.examples import to_keep, wanted
from headwater.act.training.finetune import Answering, TrainingConfig, finished
from headwater.act.training.fitting import Fitted, run_steps, twin_of
from headwater.act.training.weights import weights_of
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TrainingConfig):
    """`TrainingConfig`, and the rank of the changes; their scale is alpha / rank."""

    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0:
            raise MethodError("the sizes of LoRA do not fit", got=f"rank {self.rank}, alpha {self.alpha}")


@methods.register("lora")
def lora(
    model: "Model",
    behavior: "Behavior",
    *,
    keep: "Behavior | str | None" = None,
    config: LoraConfig | None = None,
    **options: Any,
) -> Action:
    """Train a low-rank change of every linear module but the unembedding (Hu et al., 2021), with the `peft` library.

    The baseline that every targeted edit must beat. `weights` says in which parts, as for `finetune`; keep: pairs
    whose answers are trained on beside them. Options are those of `LoraConfig`. Known failure: it learns the examples
    within a few dozen steps, and what is alike in wording with them.
    """
    used = configured(LoraConfig, config, options)
    goal = Goal.parse(used.goal)
    some = wanted(model, behavior, goal)
    kept = to_keep(model, keep) if used.keep_weight else []
    weights = weights_of(model, used.weights, behavior)
    objective = Answering(some, kept, used, model.device)
    found = _fit(model, set(weights.parts), objective, used)
    made = finished(model, "lora", used, goal, found, weights.told, objective.passes)
    return dataclasses.replace(made, name=f"lora rank {used.rank}" + made.name.removeprefix("lora"))


def _fit(model: "Model", parameters: set[str], objective: Any, used: LoraConfig) -> Fitted:
    peft = _peft()
    with model.held():
        twin = twin_of(model.hf)
    head = twin.get_output_embeddings()  # type: ignore[operator]
    names = {
        name: type(module).__name__ == "Conv1D"
        for name, module in twin.named_modules()
        if f"{name}.weight" in parameters
        and module is not head
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }
    if not names:
        raise MethodError("LoRA found no linear module to change", got=used.weights, wanted="parts with linear modules")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(used.seed)
        for flipped in sorted(set(names.values())):
            config = peft.LoraConfig(
                r=used.rank, lora_alpha=used.alpha, target_modules=[n for n, f in names.items() if f == flipped],
                fan_in_fan_out=flipped, lora_dropout=0.0, bias="none",
            )  # fmt: skip
            peft.inject_adapter_in_model(config, twin, adapter_name="default")
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    found = run_steps(
        twin, trained, objective, steps=used.steps, lr=used.lr, until=lambda x: x <= used.until, label="lora"
    )
    modules = dict(twin.named_modules())
    deltas: list[Delta] = []
    for name, flipped in names.items():
        module: Any = modules[name]
        down, up = module.lora_A["default"].weight.detach().cpu(), module.lora_B["default"].weight.detach().cpu()
        left, right = up * module.scaling["default"], down  # [out, R] @ [R, in]
        if bool(left.any()):
            deltas.append(Delta.low_rank(f"{name}.weight", *((right.T, left.T) if flipped else (left, right))))
    found.snapshots[found.steps] = deltas
    return found


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MethodError("LoRA needs the peft library", fix="pip install 'headwater[act]'") from None
    return peft

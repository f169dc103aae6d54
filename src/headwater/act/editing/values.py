"""Value vectors: what single neurons write is made weaker or stronger."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.editing.making import EditConfig, candidate, chosen
from headwater.act.editing.parts import down_projection, readouts
from headwater.act.steering.choosing import Task
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class ValueConfig(EditConfig):
    """Options of `EditConfig`, and neurons: how many (those that speak most for the goal where `strengths` are above 1,
    most against it where they are below); layers: of which layers (None: all). Strengths are factors: 0 takes the
    neurons' value vectors out, 2 doubles them."""

    strengths: tuple[float, ...] = (0.0, 2.0)
    neurons: int = 10
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons < 1 or (self.layers is not None and not self.layers):
            raise MethodError("at least one neuron of one layer is edited", got=f"{self.neurons} of {self.layers}")


@methods.register("value_vectors")
def value_vectors(model: "Model", behavior: "Behavior", *, config: ValueConfig | None = None, **options: Any) -> Action:
    """Scale the value vectors of the neurons that speak most for or against a behavior (Geva et al., 2022).

    A neuron speaks by its activation at the last token times its value vector (its column of the down-projection), read
    by the gradient of the metric at the last layer's stream. Options are those of `ValueConfig`. Known failure: neurons
    are chosen by what they say directly, so those that work through later layers are missed; and a neuron that speaks
    for one thing here speaks for others elsewhere.
    """
    used = configured(ValueConfig, config, options)
    site = f"resid_post.{model.n_layers - 1}"
    task = Task.of(model, behavior, site, Goal.parse(used.goal), used.n, used.seed)
    votes = said_by_neurons(task, used.layers)
    layers, width = list(votes), next(iter(votes.values())).numel()
    flat = torch.cat([votes[layer] for layer in layers])
    order = flat.argsort()

    def pick(strength: float) -> dict[int, Tensor]:
        some = (order[-used.neurons :] if strength > 1 else order[: used.neurons]).sort().values
        return {layers[int(at)]: some[some // width == at] % width for at in (some // width).unique()}

    def make(strength: float) -> list[Delta]:
        deltas = []
        for layer, index in pick(strength).items():
            matrix = down_projection(model, layer)
            deltas.append(matrix.columns(index, (strength - 1.0) * matrix.weight[:, index.to(matrix.weight.device)]))
        return deltas

    made = candidate(
        task, task.goals[0], task.places[0], f"value vectors of {used.neurons} neurons", make, neurons=used.neurons
    )
    action = chosen(task, [made], used, method="value_vectors", passes=2 * task.fit.n)
    picked = pick(float(action.config["strength"]))
    action.config["value_vectors"] = {str(layer): index.tolist() for layer, index in picked.items()}
    return action


def said_by_neurons(task: Task, layers: tuple[int, ...] | None) -> dict[int, Tensor]:
    """[M] for each layer: each neuron's mean vote for the goal, over pairs."""
    model = task.model
    signs = task.signs(task.goals[0])
    asked = range(model.n_layers) if layers is None else layers
    found: dict[int, Any] = dict.fromkeys(asked, 0.0)
    for group, counts_BD, run in readouts(model, task.fit, task.metric):
        for layer in found:
            matrix = down_projection(model, layer)
            active_BM = run[f"neurons.{layer}"][:, -1].detach().double().cpu()
            read_BM = matrix.scale * (counts_BD.double() @ matrix.weight.double()).cpu()
            found[layer] = found[layer] + (signs[group.rows][:, None] * active_BM * read_BM).sum(0) / task.fit.n
    return found

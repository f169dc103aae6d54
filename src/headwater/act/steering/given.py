"""A given direction: a dictionary's feature, or any vector from a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.steering.choosing import SteerConfig, Task, adding, steered
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class GivenConfig(SteerConfig):
    """Options of `SteerConfig` (name the `sites` that the direction is of), and

    file: a safetensors file. tensor: which of its tensors (not needed where there is one). row: which row of a matrix,
    such as a feature's row of a decoder. columns: take a column instead. Strengths are shares of the stream's mean norm
    at the last token.
    """

    file: str = ""
    tensor: str = ""
    row: int | None = None
    columns: bool = False
    strengths: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)


@methods.register("given")
def given(
    model: "Model",
    behavior: "Behavior",
    *,
    direction: torch.Tensor | None = None,
    config: GivenConfig | None = None,
    **options: Any,
) -> Action:
    """Add a direction that is given: a feature of a dictionary (Templeton et al., 2024), or any vector.

    `direction` [width], or one of a file: options are those of `GivenConfig`. For the goal "lower" it is subtracted.
    Known failure: a feature that is active when a behavior shows need not cause it, and a decoder's row at a strength
    far from what the feature ever reaches pushes the stream to where the model has never been.
    """
    used = configured(GivenConfig, config, options)
    if (direction is None) == (not used.file):
        raise MethodError("give one direction", got="neither or both", wanted="direction=, or file=")
    vector = read_direction(used.file, used.tensor, used.row, used.columns) if direction is None else direction
    if vector.ndim != 1 or not float(vector.double().norm()) > 0:
        raise MethodError("a direction is a vector that is not zero", got=f"shape {list(vector.shape)}")
    task = Task.of(model, behavior, used.sites, used.goal or "raise", used.n, used.seed)
    unit = vector.detach().cpu().double() / vector.detach().cpu().double().norm()
    candidates = []
    for goal in task.goals:
        for site, (wanted, _) in task.read(goal).items():
            if wanted.shape[1] != len(unit):
                raise MethodError(f"the direction does not fit {site}", got=len(unit), wanted=wanted.shape[1])
            length = wanted.norm(dim=1).mean() * (-1.0 if goal.direction == "lower" else 1.0)
            candidates.append(adding(task, goal, site, length * unit, used.where, file=Path(used.file).name))
    return steered(task, candidates, used, method="given", how="steer by a given direction at")


def read_direction(file: str, tensor: str = "", row: int | None = None, columns: bool = False) -> torch.Tensor:
    """[width]: a vector of a safetensors file, or a row (or column) of one of its matrices. Raises MethodError."""
    import safetensors

    from headwater.core.errors import did_you_mean

    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            name = tensor or (names[0] if len(names) == 1 else "")
            if name not in names:
                raise MethodError(f"no such tensor in {file}", got=repr(tensor), wanted=did_you_mean(tensor, names))
            part = opened.get_slice(name)
            shape = part.get_shape()
            if len(shape) == 1 and row is None:
                return part[:]
            if len(shape) != 2 or row is None:
                raise MethodError("a direction is a vector, or a row of a matrix", got=f"{name} {shape}, row {row}")
            if not 0 <= row < shape[1 if columns else 0]:
                raise MethodError(f"{name} has no such row", got=row, wanted=f"0 to {shape[1 if columns else 0] - 1}")
            return part[:, row] if columns else part[row]
    except (OSError, safetensors.SafetensorError) as error:
        raise MethodError(f"cannot read a direction from {file}", got=error) from None

"""Orthogonalization: no weight that writes to the stream may write along a direction."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from headwater.act.action import Action, Goal
from headwater.act.applying import name_of
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.editing.making import EditConfig, candidate, chosen
from headwater.act.editing.parts import check_direct, down_projection, out_projection
from headwater.act.steering.choosing import Task
from headwater.act.steering.given import read_direction
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class OrthogonalizeConfig(EditConfig):
    """Options of `EditConfig`, and sites: whose differences in means are tried as the direction (None: four depths);
    file, tensor, row: a direction from a file instead, as in `given`; embedding: whether the embedding is changed too
    (None: unless the unembedding is the same matrix). Strength 1 takes the direction out."""

    goal: str = "lower"
    sites: tuple[str, ...] | str | None = None
    file: str = ""
    tensor: str = ""
    row: int | None = None
    embedding: bool | None = None


@methods.register("orthogonalize")
def orthogonalize(
    model: "Model",
    behavior: "Behavior",
    *,
    direction: Tensor | None = None,
    config: OrthogonalizeConfig | None = None,
    **options: Any,
) -> Action:
    """Make every weight that writes to the stream orthogonal to a direction (Arditi et al., 2024).

    Embeddings, attention and MLP output projections and their biases lose their part along the difference in means (or
    `direction` [D], or one of a file), so that nothing can write it at any token. Options are those of
    `OrthogonalizeConfig`. Known failure: where embedding and unembedding are one matrix the embedding is left, and its
    part of the direction with it; and all else that used the direction loses it too.

    Raises MethodError for models with a norm between a write and the stream, or with experts.
    """
    used = configured(OrthogonalizeConfig, config, options)
    task = Task.of(model, behavior, used.sites, Goal.parse(used.goal), used.n, used.seed)
    goal = task.goals[0]
    if direction is None and used.file:
        direction = read_direction(used.file, used.tensor, used.row)
    if direction is not None:
        directions = {task.places[0]: direction.detach().cpu().double()}
        told = {task.places[0]: "a given direction"}
    else:
        read = task.read(goal)
        directions = {site: wanted.mean(0) - unwanted.mean(0) for site, (wanted, unwanted) in read.items()}
        told = {site: str(site) for site in read}
    candidates = []
    for site, vector in directions.items():

        def make(strength: float, along: Tensor = vector) -> list[Delta]:
            return without(model, along, strength=strength, embedding=used.embedding)

        candidates.append(candidate(task, goal, site, f"orthogonalize against {told[site]}", make))
    return chosen(task, candidates, used, method="orthogonalize", passes=2 * task.fit.n)


def without(model: "Model", direction: Tensor, *, strength: float = 1.0, embedding: bool | None = None) -> list[Delta]:
    """The changes that take `strength` times the part along a direction [D] out of all that writes to the stream."""
    if direction.shape != (model.d_model,) or not float(direction.double().norm()) > 0:
        raise MethodError("a direction is a vector of the stream's width, not zero", got=list(direction.shape))
    unit = direction.double().cpu() / direction.double().cpu().norm()
    deltas: list[Delta] = []
    for block in model.anatomy.main.blocks:
        for kind, part in (("attn_out", block.attention), ("mlp_out", block.mlp)):
            if part is None:
                continue
            matrix = out_projection(model, block.index) if kind == "attn_out" else down_projection(model, block.index)
            check_direct(model, block.index, kind)
            along = (unit @ matrix.weight.double().cpu())[None]
            deltas.append(matrix.low_rank(-strength * unit[:, None], along))
            if matrix.bias is not None:
                deltas.append(_vector(model, matrix.module.bias, unit, strength))  # type: ignore[arg-type]
    tables = _embeddings(model)
    tied = model.anatomy.unembed is not None and any(
        getattr(model.anatomy.unembed, "weight", None) is table.weight for table in tables
    )
    if embedding if embedding is not None else not tied:
        for table in tables:
            name, weight = name_of(model.hf, table.weight), table.weight.detach()
            along = (weight.double().cpu() @ unit)[:, None]
            deltas.append(Delta.low_rank(name, -strength * along.to(weight).cpu(), unit[None].to(weight).cpu()))
    return deltas


def _vector(model: "Model", bias: nn.Parameter, unit: Tensor, strength: float) -> Delta:
    change = -strength * (bias.detach().double().cpu() @ unit) * unit
    return Delta.full(name_of(model.hf, bias), change.to(bias.dtype))


def _embeddings(model: "Model") -> list[nn.Embedding]:
    """The tables whose rows are added up to what enters the first block: of tokens and of positions."""
    inside = {id(one) for block in model.anatomy.main.blocks for one in block.module.modules()}
    found = [one for one in model.hf.modules() if isinstance(one, nn.Embedding) and id(one) not in inside]
    if wrong := [table.embedding_dim for table in found if table.embedding_dim != model.d_model]:
        raise MethodError(f"an embedding of {model.name} is not of the stream's width", got=wrong[0])
    return found

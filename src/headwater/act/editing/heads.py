"""Head projection: a few heads may no longer write along a direction."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.editing.making import EditConfig, candidate, chosen
from headwater.act.editing.parts import check_direct, head_columns, heads_of, out_projection
from headwater.act.steering.choosing import Task
from headwater.act.steering.given import read_direction
from headwater.core.errors import MethodError
from headwater.core.methods import configured
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class HeadProjectionConfig(EditConfig):
    """Options of `EditConfig`, and heads: whose (None: the `top` that write most along the direction). site: whose
    difference in means is the direction (None: `resid_post` of the last layer but one). file, tensor, row: a direction
    from a file instead, as in `given`. Strength 1 takes the direction out, 2 turns it round."""

    goal: str = "lower"
    heads: tuple[str, ...] | None = None
    top: int = 4
    site: str | None = None
    file: str = ""
    tensor: str = ""
    row: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise MethodError("a direction is taken from at least one head", got=self.top)


@methods.register("head_projection")
def head_projection(
    model: "Model",
    behavior: "Behavior",
    *,
    direction: Tensor | None = None,
    config: HeadProjectionConfig | None = None,
    **options: Any,
) -> Action:
    """Project a direction out of the output projections of a few heads (after Uppaal et al., 2025, who do it to MLPs).

    Without `direction` [D] or a file it is the difference in means between prompts and counterfactuals. Options are
    those of `HeadProjectionConfig`. Known failure: what these heads no longer write, others may still write, and later
    heads make up for it.

    Raises MethodError for models with a norm between heads and stream.
    """
    used = configured(HeadProjectionConfig, config, options)
    site = used.site or f"resid_post.{max(0, model.n_layers - 2)}"
    task = Task.of(model, behavior, site, Goal.parse(used.goal), used.n, used.seed)
    if len(task.places) != 1:
        raise MethodError("one direction is taken from one site", got=used.site)
    if direction is None and used.file:
        direction = read_direction(used.file, used.tensor, used.row)
    if direction is None:
        wanted, unwanted = task.read(task.goals[0])[task.places[0]]
        direction = wanted.mean(0) - unwanted.mean(0)
    if direction.shape != (model.d_model,) or not float(direction.double().norm()) > 0:
        raise MethodError("a direction is a vector of the stream's width, not zero", got=list(direction.shape))
    unit = direction.detach().cpu().double() / direction.detach().cpu().double().norm()
    heads = heads_of(model, used.heads) if used.heads is not None else _writers(task, unit, used.top)
    for layer in {at for at, _ in heads}:
        check_direct(model, layer, "attn_out", fix="Use ablate, which acts on what is added to the stream")

    def make(strength: float) -> list[Delta]:
        return [_without(model, layer, own, strength, unit) for layer, own in _by_layer(heads).items()]

    names = [f"a{layer}.h{head}" for layer, head in heads]
    made = candidate(task, task.goals[0], task.places[0], f"project out of {', '.join(names)}", make, heads=names)
    return chosen(task, [made], used, method="head_projection", passes=2 * task.fit.n)


def _by_layer(heads: list[tuple[int, int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return found


def _without(model: "Model", layer: int, heads: list[int], strength: float, unit: Tensor) -> Delta:
    """The change that takes `strength` times the part along `unit` out of what heads of a layer write."""
    matrix = out_projection(model, layer)
    weight = matrix.weight.double().cpu()
    right = torch.zeros(1, weight.shape[1], dtype=torch.float64)
    for head in heads:
        columns = head_columns(model, layer, head)
        right[0, columns] = unit @ weight[:, columns]
    return matrix.low_rank(-strength * unit[:, None], right)


def _writers(task: Task, unit: Tensor, top: int) -> list[tuple[int, int]]:
    """The heads whose write along the direction differs most between prompts and counterfactuals."""
    model = task.model
    sites = [site for site in model.sites() if site.kind == "z"]
    total: dict[Site, Any] = dict.fromkeys(sites, 0.0)
    signs = task.signs(task.goals[0])
    for group in task.fit.groups:
        ends = [site.at(-1) for site in sites]
        clean = model.run(group.clean, capture=ends, logits="none")
        corrupt = model.run(group.corrupt, capture=ends, logits="none")
        for site, end in zip(sites, ends, strict=True):
            apart = (clean[end].double() - corrupt[end].double()).cpu()
            total[site] = total[site] + (signs[group.rows].view(-1, 1, 1) * apart).sum(0)
    scores: list[tuple[float, int, int]] = []
    for site, apart_HK in total.items():
        layer = int(site.layer or 0)
        reads_I = unit @ out_projection(model, layer).weight.double().cpu()
        for head in range(len(apart_HK)):
            along = float(reads_I[head_columns(model, layer, head)] @ apart_HK[head]) / task.fit.n
            scores.append((abs(along), layer, head))
    return sorted((layer, head) for _, layer, head in sorted(scores, reverse=True)[:top])

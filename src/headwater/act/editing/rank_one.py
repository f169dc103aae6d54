"""Rank one: what steering adds at a layer, written into its MLP for the keys that the behavior's prompts have."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.editing.closed import insert, ridged
from headwater.act.editing.making import EditConfig, candidate, chosen
from headwater.act.editing.moments import second_moments
from headwater.act.editing.parts import check_direct, down_projection
from headwater.act.steering.choosing import Task
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class RankOneConfig(EditConfig):
    """Options of `EditConfig`, and layers: which MLPs to try (None: three depths); corpus, corpus_tokens, ridge, cache:
    as in `FactConfig`. Strengths are multiples of the difference in means of the stream after the layer."""

    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    corpus: str | None = None
    corpus_tokens: int = 10_000
    ridge: float = 0.01
    cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.layers is not None and not self.layers) or self.corpus_tokens < 1 or self.ridge < 0:
            got = f"layers {self.layers}, corpus_tokens {self.corpus_tokens}, ridge {self.ridge}"
            raise MethodError("layers, corpus_tokens or ridge do not fit", got=got, wanted="one layer or more")


@methods.register("rank_one")
def rank_one(model: "Model", behavior: "Behavior", *, config: RankOneConfig | None = None, **options: Any) -> Action:
    """Write a steering vector into one MLP for the prompts' own key, without a search (after Bau et al., 2020).

    The key is the mean of the layer's neurons at the last token of training prompts, the change of its value the
    difference in means of the stream there; the rank-one change of the down-projection is the smallest, in the second
    moment of keys over a corpus, that maps the one to the other. Options are those of `RankOneConfig`. Known failure:
    prompts of a behavior rarely share one key: what the mean key does not stand for is left, and other prompts whose
    neurons point its way are moved too.

    Raises MethodError for models with a norm between MLP and stream.
    """
    used = configured(RankOneConfig, config, options)
    depths = sorted({round(model.n_layers * part) for part in (1 / 3, 1 / 2, 2 / 3)})
    layers = list(used.layers) if used.layers is not None else [min(at, model.n_layers - 1) for at in depths]
    for layer in layers:
        down_projection(model, layer)
        check_direct(model, layer, "mlp_out", fix="Use rome, which looks at the MLP's own output")
    sites = [f"resid_post.{layer}" for layer in layers]
    task = Task.of(model, behavior, sites, Goal.parse(used.goal), used.n, used.seed)
    goal = task.goals[0]
    moments = second_moments(model, layers, used.corpus, tokens=used.corpus_tokens, cache=used.cache)
    keys = _mean_keys(task, layers)
    candidates = []
    for site, (wanted, unwanted) in task.read(goal).items():
        layer = int(site.layer or 0)
        matrix = down_projection(model, layer)
        difference = (wanted.mean(0) - unwanted.mean(0)) / matrix.scale
        left, right = insert(keys[layer], difference, ridged(moments[layer], used.ridge))
        delta = matrix.low_rank(left, right)

        def make(strength: float, one: Delta = delta) -> list[Delta]:
            return [one.times(strength)]

        candidates.append(candidate(task, goal, site, f"rank one at m{layer}", make, layer=layer))
    return chosen(task, candidates, used, method="rank_one", passes=3 * task.fit.n)


def _mean_keys(task: Task, layers: list[int]) -> dict[int, torch.Tensor]:
    """[M] float64: each layer's mean neurons at the last token of the prompts."""
    sites = {layer: f"neurons.{layer}@-1" for layer in layers}
    total: dict[int, Any] = dict.fromkeys(layers, 0.0)
    for group in task.fit.groups:
        run = task.model.run(group.clean, capture=list(sites.values()), logits="none")
        for layer, site in sites.items():
            total[layer] = total[layer] + run[site].double().sum(0).cpu()
    return {layer: value / task.fit.n for layer, value in total.items()}

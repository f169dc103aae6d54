"""Circuit repair: heads that speak rightly and too softly are made louder, those that drown them softer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.editing.making import EditConfig, candidate, chosen
from headwater.act.editing.parts import head_columns, heads_of, out_projection
from headwater.act.measuring import said
from headwater.act.steering.choosing import Task
from headwater.core.errors import MethodError
from headwater.core.methods import configured

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Head = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class RepairConfig(EditConfig):
    """Options of `EditConfig`, and heads: which are made louder (such as those of a circuit that works on another
    task); None: the `top` whose output helps most; damp: how many of those that hurt most are made softer by the same
    factor. Strengths are factors."""

    strengths: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0)
    heads: tuple[str, ...] | None = None
    top: int = 4
    damp: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1 or self.damp < 0 or min(self.strengths) <= 0:
            raise MethodError("top is at least 1, damp at least 0, and strengths are factors above 0")


@methods.register("repair")
def repair(model: "Model", behavior: "Behavior", *, config: RepairConfig | None = None, **options: Any) -> Action:
    """Scale the outputs of a few heads so that sound mechanisms win over faulty ones (Rai et al., 2025).

    Heads help by the gradient of the metric times their output, over all tokens of the training pairs. Their columns of
    the output projection are multiplied by a factor; biases stay. Options are those of `RepairConfig`. Known failure:
    where no head holds what the task needs there is nothing to make louder, and a louder head is louder on every text.
    """
    used = configured(RepairConfig, config, options)
    site = f"resid_post.{model.n_layers - 1}"
    task = Task.of(model, behavior, site, Goal.parse(used.goal), used.n, used.seed)
    scores = helping(task)
    louder = (
        heads_of(model, used.heads) if used.heads is not None else sorted(scores, key=lambda h: -scores[h])[: used.top]
    )
    softer = [head for head in sorted(scores, key=lambda h: scores[h]) if head not in louder][: used.damp]

    def make(strength: float) -> list[Delta]:
        factors = dict.fromkeys(louder, strength) | dict.fromkeys(softer, 1 / strength)
        return scaled_heads(model, factors)

    names = [f"a{layer}.h{head}" for layer, head in louder]
    told = {"heads": names, "softer": [f"a{layer}.h{head}" for layer, head in softer]}
    made = candidate(task, task.goals[0], task.places[0], f"scale {', '.join(names)}", make, **told)
    return chosen(task, [made], used, method="repair", passes=2 * task.fit.n)


def scaled_heads(model: "Model", factors: dict[Head, float]) -> list[Delta]:
    """The changes that multiply what heads write by their factors."""
    deltas: list[Delta] = []
    for layer in sorted({at for at, _ in factors}):
        own = [(head_columns(model, layer, head), factor) for (at, head), factor in factors.items() if at == layer]
        deltas.append(out_projection(model, layer).scaled(own))
    return deltas


def helping(task: Task) -> dict[Head, float]:
    """For each head: how much the metric, counted in the goal's direction, grows with its output, to first order."""
    model = task.model
    signs = task.signs(task.goals[0])
    sites = [site for site in model.sites() if site.kind == "z"]
    scores: dict[Head, float] = {}
    for group in task.fit.groups:
        run = model.run(group.clean, capture=sites, logits="last", grad=True)
        values = said(task.metric, run.logits, group)
        slopes = run.grads((signs[group.rows].to(values) * values).sum(), sites)
        for site in sites:
            along_H = (slopes[str(site)] * run[site]).detach().double().sum((0, 1, 3)) / task.fit.n
            for head, value in enumerate(along_H.tolist()):
                key = int(site.layer or 0), head
                scores[key] = scores.get(key, 0.0) + value
    return scores

"""Knock out or amplify nodes of a circuit: heads and MLPs, by their mean or zero."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from headwater.act.action import Action, Goal, short
from headwater.claims.nulls import matched_sets
from headwater.core.errors import MethodError
from headwater.core.interventions import Intervention, replace, zero
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

How = Literal["mean", "zero"]
Over = Literal["counterfactual", "train"]
# The first token is left alone: models park attention on it, its values are far out of line and no mean describes it.
POSITIONS = slice(1, None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scale(Intervention):
    """x -> value + scale * (x - value): move what a site holds away from its mean, or toward it."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        centre = torch.as_tensor(self.value).to(device=x.device, dtype=x.dtype)
        return centre + self.scale * (x - centre)


def knock_out(
    model: "Model",
    nodes: str | Site | Sequence[str | Site],
    behavior: "Behavior | None" = None,
    *,
    how: How = "mean",
    over: Over = "counterfactual",
    goal: str | Goal = "lower",
) -> Action:
    """Take nodes (`a5.h3`, `m5`, or their sites `head.5.h3`, `mlp_out.5`) out of the model.

    `how="mean"` sets each to its mean output over the training pairs of `behavior`: over their counterfactuals, or
    the prompts themselves (`over="train"`); one vector a node, over all tokens but the first. `how="zero"` needs no
    behavior. It acts on every token but the first, on any prompt and while generating. The random version takes as
    many other heads of the same layers, and other MLPs.

    Raises MethodError for no nodes, nodes that cannot be taken out, or a mean without behavior; SiteError for nodes
    that this model lacks.
    """
    if how not in ("mean", "zero"):
        raise MethodError("unknown way to knock out", got=repr(how), wanted="mean or zero")
    found = _nodes(model, nodes)
    centres = _centres(model, behavior, over) if how == "mean" else None

    def make(chosen: list[Site], name: str, control: Callable[[int], Action] | None) -> Action:
        edits = [
            zero(site, positions=POSITIONS)
            if centres is None
            else replace(site, centres.of(site), positions=POSITIONS, label=f"mean({site})")
            for site in chosen
        ]
        config = {"action": "knock_out", "nodes": [_name(site) for site in chosen], "how": how, "over": over}
        return _action(model, name, edits, Goal.parse(goal), centres, control, config)

    return make(
        found,
        f"knock out {short([_name(site) for site in found])}",
        lambda seed: make(_others(model, found, seed), f"knock out {_kinds(found)} at random", None),
    )


def amplify(
    model: "Model",
    nodes: str | Site | Sequence[str | Site],
    behavior: "Behavior | None" = None,
    *,
    factor: float = 2.0,
    over: Over = "counterfactual",
    goal: str | Goal = "raise",
) -> Action:
    """Move nodes away from their mean by `factor` (1 changes nothing, 0 is a mean knock-out).

    Without a behavior the mean is taken as zero: the node's output times `factor`. Nodes, tokens, means, the random
    version and errors as in `knock_out`.
    """
    found = _nodes(model, nodes)
    centres = _centres(model, behavior, over) if behavior is not None else None

    def make(chosen: list[Site], name: str, control: Callable[[int], Action] | None) -> Action:
        edits: list[Intervention] = [
            Scale(
                site=site,
                op="add",
                value=torch.zeros(()) if centres is None else centres.of(site),
                scale=factor,
                positions=POSITIONS,
                label=f"scale({site}, {factor:g})",
            )
            for site in chosen
        ]
        config = {"action": "amplify", "nodes": [_name(site) for site in chosen], "factor": factor, "over": over}
        return _action(model, name, edits, Goal.parse(goal), centres, control, config)

    return make(
        found,
        f"amplify {short([_name(site) for site in found])} by {factor:g}",
        lambda seed: make(_others(model, found, seed), f"amplify {_kinds(found)} at random", None),
    )


def _action(
    model: "Model",
    name: str,
    edits: list[Intervention],
    goal: Goal,
    centres: "_Centres | None",
    control: Callable[[int], Action] | None,
    config: dict[str, Any],
) -> Action:
    widths = [model.d_head if edit.site.kind == "z" else model.d_model for edit in edits]
    return Action(
        name=name,
        interventions=tuple(edits),
        goal=goal,
        values=sum(widths),
        passes=centres.n if centres is not None else 0,
        control=control,
        config=config,
    )


def _nodes(model: "Model", nodes: str | Site | Sequence[str | Site]) -> list[Site]:
    """The nodes as sites. A head is edited at `z`, its mixed values, of which its write is a linear function: the same
    change as at `head`, without computing every head's write."""
    some = [nodes] if isinstance(nodes, str | Site) else list(nodes)
    found: dict[Site, None] = {}
    for node in some:
        parsed = Site.parse(node)
        if parsed.kind not in ("head", "z", "mlp_out") or (parsed.kind != "mlp_out" and parsed.head is None):
            wanted = "heads and MLPs, such as a5.h3, m5, head.5.h3, mlp_out.5"
            raise MethodError("this node cannot be knocked out or amplified", got=str(node), wanted=wanted)
        if parsed.pos is not None:
            raise MethodError("an action takes whole nodes", got=str(node), fix=f"Write {parsed.at(None)}")
        for site in model.resolve(parsed):
            found[Site("z", site.layer, site.head, stack=site.stack) if site.kind == "head" else site] = None
    if not found:
        raise MethodError("no nodes to act on", wanted="at least one head or MLP")
    return list(found)


def _name(site: Site) -> str:
    return f"a{site.layer}.h{site.head}" if site.kind == "z" else f"m{site.layer}"


def _kinds(sites: list[Site]) -> str:
    heads = sum(site.kind == "z" for site in sites)
    parts = [(heads, "head"), (len(sites) - heads, "MLP")]
    return " and ".join(f"{n} {kind}{'' if n == 1 else 's'}" for n, kind in parts if n)


def _others(model: "Model", chosen: list[Site], seed: int) -> list[Site]:
    """As many nodes at random: heads of the same layers, other MLPs; the chosen ones only where others are too few."""
    heads = [site for site in model.resolve("z.*.h*") if site.stack == chosen[0].stack]
    mlps = [site for site in model.resolve("mlp_out.*") if site.stack == chosen[0].stack] if _mlps(chosen) else []
    pool = [*heads, *mlps]
    strata = [int(site.layer or 0) if site.kind == "z" else model.n_layers for site in pool]
    picked = next(matched_sets(strata, [pool.index(site) for site in chosen], 1, seed=seed, apart=True))
    return [pool[int(i)] for i in picked]


def _mlps(sites: list[Site]) -> bool:
    return any(site.kind == "mlp_out" for site in sites)


class _Centres:
    """Mean outputs of nodes over pairs and tokens, each layer measured when it is first asked for."""

    def __init__(self, model: "Model", prompts: list[torch.Tensor]) -> None:
        self.model, self.prompts = model, prompts
        self.n = sum(len(batch) for batch in prompts)
        self._means: dict[Site, torch.Tensor] = {}

    def of(self, site: Site) -> torch.Tensor:
        """[width]: the mean over all prompts and all tokens but the first."""
        whole = site.whole
        if whole not in self._means:
            total, count = 0.0, 0
            for tokens_BT in self.prompts:
                kept = self.model.run(tokens_BT, capture=[whole], logits="none")[whole][:, 1:].double()
                total = total + kept.sum((0, 1))
                count += kept.shape[0] * kept.shape[1]
            self._means[whole] = torch.as_tensor(total / count).to(self.model.dtype)
        mean = self._means[whole]
        return mean if site.head is None else mean[int(site.head)]


def _centres(model: "Model", behavior: "Behavior | None", over: Over) -> _Centres:
    if behavior is None:
        raise MethodError(
            "a mean is taken over the pairs of a behavior", got="no behavior", fix="Pass one, or how='zero'"
        )
    if over not in ("counterfactual", "train"):
        raise MethodError("unknown prompts to take the mean over", got=repr(over), wanted="counterfactual or train")
    groups = behavior.train.bind(model).groups
    prompts = [group.corrupt if over == "counterfactual" else group.clean for group in groups if group.length > 1]
    if not prompts:
        raise MethodError("no prompt is longer than one token", fix="Use how='zero'")
    return _Centres(model, prompts)

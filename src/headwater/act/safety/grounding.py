"""Context against memory: heads that copy from the context, MLPs that recall, and which of them win (Sun et al., 2025).

Shapes: B pairs of a group, T tokens, H heads, D width, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headwater.act.ablation import Scale, _others
from headwater.act.action import Action
from headwater.act.catalog import methods
from headwater.act.measuring import said
from headwater.act.safety.telling import (
    Detection,
    Floats,
    both_kinds,
    detectors_table,
    parts_table,
    standardized,
)
from headwater.act.steering.choosing import Candidate, SteerConfig, Task, choose
from headwater.core.errors import MethodError
from headwater.core.interventions import Intervention
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.bind import Group
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class GroundingConfig:
    """context: the named position up to whose last token the context reaches. share: of the context's tokens, those a
    head attends to most. parts: how many heads, and how many MLPs, the detector uses. seed: of the intervals."""

    context: str = "context"
    share: float = 0.1
    parts: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise MethodError("a share of the context's tokens", got=self.share, wanted="above 0, at most 1")
        if self.parts < 1:
            raise MethodError("a detector needs a part to look at", got=self.parts, wanted="at least 1")


def grounding(
    model: "Model", behavior: "Behavior", *, config: GroundingConfig | None = None, **options: Any
) -> Detection:
    """Which heads read the context, which MLPs recall, and whether they tell that an answer follows the context.

    Of each head, the external context score: cosine between the last stream at the prompt's end and the mean last
    stream of the context tokens that the head attends to most there. Of each MLP, the parametric knowledge score:
    Jensen-Shannon divergence, in nats, between what the stream would say before it and after it (logit lens). "Yes" is
    a pair whose answer the model prefers to its foil (the behavior `conflict`: it follows the text). Heads and MLPs are
    chosen on training pairs; detectors (their sum, standardized, heads minus MLPs), with the model's own confidence
    beside it, are judged on test pairs (ReDeEP, Sun et al., 2025). Options are those of `GroundingConfig`.

    Known failure: the scores correlate with following the context and need not cause it; see the action `ground`, which
    changes them.
    """
    started = time.perf_counter()
    used = configured(GroundingConfig, config, options)
    (train, yes_train), (test, yes) = (_scored(model, part, used) for part in (behavior.train, behavior.test))
    both_kinds(yes_train, "answers that follow the context", "training")
    both_kinds(yes, "answers that follow the context", "test")
    names = [name for name in train if name[0] != "confidence"]
    parts = parts_table({name: train[name] for name in names}, yes_train, {"head": 1, "mlp": -1}, used.parts)

    def total(kind: str) -> Floats:
        chosen = [(kind, part) for part in _chosen(parts, kind)]
        columns = [np.stack([scores[name] for name in chosen], 1) for scores in (train, test)]
        return standardized(*columns).sum(1)

    heads, mlps = total("head"), total("mlp")
    scores = {
        "copying heads - recalling MLPs": heads - mlps,
        "copying heads": heads,
        "recalling MLPs": -mlps,
        "confidence": test["confidence", ""],
        "constant": np.zeros(len(yes)),
    }
    detectors = detectors_table(scores, yes, ("confidence", "constant"), seed=used.seed)
    return Detection(
        tables={"parts": parts, "detectors": detectors},
        facts={
            "yes": "the answer follows the context",
            "behavior": behavior.name,
            "train": {"yes": int(yes_train.sum()), "no": int((~yes_train).sum())},
            "test": {"yes": int(yes.sum()), "no": int((~yes).sum())},
        },
        config={"context": used.context, "share": used.share, "parts": used.parts, "seed": used.seed},
        provenance=Provenance.collect(model, behavior, seed=used.seed, seconds=time.perf_counter() - started),
    )


def _chosen(parts: Any, kind: str) -> list[str]:
    return parts.filter(parts["chosen"] & (parts["kind"] == kind))["part"].to_list()


def _scored(
    model: "Model", pairs: "Behavior", used: GroundingConfig
) -> tuple[dict[tuple[str, str], Floats], np.ndarray[Any, np.dtype[np.bool_]]]:
    """({(kind, part): value of each pair}, whether the model prefers each pair's answer)."""
    found: dict[tuple[str, str], list[Floats]] = {}
    preferred: list[Tensor] = []
    for group in track(pairs.bind(model).groups, "reading context and memory"):
        if used.context not in group.positions:
            known = ", ".join(group.positions)
            raise MethodError(
                f"the behavior names no position {used.context!r}", got=known, fix="Set context=, or take `conflict`"
            )
        logits, values = _read(model, group, used)
        preferred.append(said("logit_diff", logits, group) > 0)
        for name, value in values.items():
            found.setdefault(name, []).append(value.double().cpu().numpy())
    yes = torch.cat(preferred).cpu().numpy()
    return {name: np.concatenate(value) for name, value in found.items()}, yes


def _read(model: "Model", group: "Group", used: GroundingConfig) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
    """(logits [B, V], {(kind, part): values [B]}) of a group."""
    last = Site("resid_post", model.n_layers - 1)
    patterns = [Site("pattern", layer) for layer in range(model.n_layers)]
    ends = [Site(kind, layer).at(-1) for layer in range(model.n_layers) for kind in ("resid_post", "mlp_out")]
    run = model.run(group.clean, capture=[last, *patterns, *ends], logits="last")
    stream_BTD, context_B = run[last].float(), group.positions[used.context].to(run.logits.device)
    values: dict[tuple[str, str], Tensor] = {}
    for layer, site in enumerate(patterns):
        for head, score in enumerate(context_scores(run[site].float(), stream_BTD, context_B, used.share).unbind(1)):
            values["head", f"a{layer}.h{head}"] = score
        after = run[Site("resid_post", layer).at(-1)]
        before = after - run[Site("mlp_out", layer).at(-1)]
        values["mlp", f"m{layer}"] = divergence(_lens(model, before), _lens(model, after))
    values["confidence", ""] = run.logits.float().log_softmax(-1).amax(-1)
    return run.logits, values


def context_scores(pattern_BHTT: Tensor, stream_BTD: Tensor, context_B: Tensor, share: float) -> Tensor:
    """[B, H]: cosine between the stream at the end and the mean stream of the context tokens attended to most there.

    The context is the tokens after the first, up to `context`; `share` of them, at least one, are taken.
    """
    at = torch.arange(stream_BTD.shape[1], device=stream_BTD.device)
    inside_BT = (at >= 1) & (at <= context_B[:, None])
    count_B = (share * inside_BT.sum(1)).ceil().clamp(min=1)
    attended_BHT = pattern_BHTT[:, :, -1].masked_fill(~inside_BT[:, None], -1.0)
    rank_BHT = attended_BHT.argsort(-1, descending=True).argsort(-1)
    picked_BHT = ((rank_BHT < count_B[:, None, None]) & inside_BT[:, None]).to(stream_BTD.dtype)
    mean_BHD = picked_BHT @ stream_BTD / picked_BHT.sum(-1, keepdim=True).clamp(min=1)
    return torch.nn.functional.cosine_similarity(mean_BHD, stream_BTD[:, -1:], dim=-1)


def divergence(one_BV: Tensor, other_BV: Tensor) -> Tensor:
    """[B]: Jensen-Shannon divergence in nats of two next-token distributions, given as logits."""
    p, q = one_BV.float().log_softmax(-1), other_BV.float().log_softmax(-1)
    middle = torch.logaddexp(p, q) - float(np.log(2))
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2


def _lens(model: "Model", x_BD: Tensor) -> Tensor:
    """What the model's own last norm and unembedding say of a stream."""
    norm, unembed = model.anatomy.main.final_norm, model.anatomy.unembed
    if unembed is None:
        raise MethodError(f"{model.name} has no unembedding to read a stream by")
    with torch.no_grad():
        return unembed(x_BD if norm is None else norm(x_BD))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class GroundConfig(SteerConfig):
    """goal: "raise" follows the context more, "lower" memory. parts: how many heads and MLPs are changed. strengths:
    1 doubles the heads and halves the MLPs. context, share: as in `GroundingConfig`. sites: not used."""

    goal: str | None = "raise"
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    parts: int = 4
    context: str = "context"
    share: float = 0.1


@methods.register("ground")
def ground(model: "Model", behavior: "Behavior", *, config: GroundConfig | None = None, **options: Any) -> Action:
    """Strengthen the heads that copy from the context and weaken the MLPs that recall (AARF, Sun et al., 2025).

    Heads and MLPs are those that `grounding` finds on training pairs; their outputs are multiplied by 1 + strength and
    by 1 / (1 + strength) on every token but the first ("lower": the other way round). Options are those of
    `GroundConfig`. Known failure: MLPs that recall are also those that know grammar: perplexity rises with strength.
    """
    used = configured(GroundConfig, config, options)
    if used.goal not in ("raise", "lower"):
        raise MethodError("grounding is raised or lowered", got=repr(used.goal), wanted="raise or lower")
    task = Task.of(model, behavior, f"resid_post.{model.n_layers - 1}", used.goal, used.n, used.seed)
    found = GroundingConfig(context=used.context, share=used.share, parts=used.parts, seed=used.seed)
    values, yes = _scored(model, task.fit.behavior, found)
    both_kinds(yes, "answers that follow the context", "training")
    values = {name: value for name, value in values.items() if name[0] != "confidence"}
    parts = parts_table(values, yes, {"head": 1, "mlp": -1}, used.parts)
    names = [*_chosen(parts, "head"), *_chosen(parts, "mlp")]
    nodes = [_node(name) for name in names]
    sign = 1.0 if used.goal == "raise" else -1.0

    def build(chosen: list[Site]) -> Callable[[float], tuple[Intervention, ...]]:
        def make(strength: float) -> tuple[Intervention, ...]:
            return tuple(
                Scale(
                    site=site,
                    op="add",
                    value=torch.zeros(()),
                    scale=(1 + strength) ** (sign if site.kind == "z" else -sign),
                    positions=slice(1, None),
                    label=f"scale({site})",
                )
                for site in chosen
            )

        return make

    one = Candidate(
        goal=task.goals[0],
        site=nodes[0],
        make=build(nodes),
        random=lambda strength, seed: build(_others(model, nodes, seed))(strength),
        facts={"nodes": names},
    )

    def action(what: Candidate, strength: float, interventions: tuple[Intervention, ...]) -> Action:
        toward = "the context" if sign > 0 else "memory"
        return Action(
            name=f"toward {toward} by {strength:g}",
            interventions=interventions,
            goal=what.goal,
            values=sum(model.d_head if site.kind == "z" else model.d_model for site in nodes),
            config={"action": "ground", "strength": strength, "goal": used.goal},
        )

    return choose(
        task,
        [one],
        used.strengths,
        action=action,
        random_name="as many other heads and MLPs",
        max_perplexity=used.max_perplexity,
        passes=task.fit.n,
        seed=used.seed,
    )


def _node(name: str) -> Site:
    site = Site.parse(name)
    return Site("z", site.layer, site.head, stack=site.stack) if site.kind == "head" else site

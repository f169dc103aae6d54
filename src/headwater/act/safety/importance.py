"""Which heads a kind of reply hangs on: Ships and Sahara (Zhou et al., 2025).

Shapes: N prompts, T tokens, D width, V vocabulary.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from headwater.act.ablation import Scale
from headwater.core.errors import MethodError
from headwater.core.interventions import Intervention, replace
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.bind import Group
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Head = tuple[int, int]


@register_result
class HeadImportance(Result):
    """How far the reply moves when heads are taken out.

    `tables["heads"]`: layer, head, score (KL in nats for Ships, an angle in radians for Sahara), elsewhere (the same
    on the counterfactuals: how far taking it out moves any reply). `tables["group"]`: order, head, found (score of the
    group up to it on the training prompts that it was found on), score (on test prompts), random (mean score there of
    random groups of that size), lo, hi (of the random groups).
    """

    kind: ClassVar[str] = "head_importance"
    main: ClassVar[str] = "heads"

    @property
    def group(self) -> list[str]:
        """The heads of the group (`a5.h3`), in the order in which they were found."""
        return self.tables["group"]["head"].to_list()


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """method: "ships" scores by how far the next token's distribution moves (KL), "sahara" by how far the streams of
    all prompts turn. how: "uniform" (the head attends evenly to what it may see) or "scaled" (its values times `keep`).
    group: heads taken out together, found greedily among the `candidates` best. n: training prompts, and test prompts
    at most. rank: directions of the streams that Sahara compares. draws: random groups of the same layers beside it.
    """

    method: Literal["ships", "sahara"] = "ships"
    how: Literal["uniform", "scaled"] = "uniform"
    keep: float = 1e-5
    group: int = 3
    candidates: int = 12
    n: int = 24
    rank: int = 4
    draws: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("group", 1), ("candidates", 1), ("n", 2), ("rank", 1), ("draws", 1)):
            if getattr(self, name) < least:
                raise MethodError(f"{name} is too small", got=getattr(self, name), wanted=f"at least {least}")


def head_importance(
    model: "Model", behavior: "Behavior", *, config: ImportanceConfig | None = None, **options: Any
) -> HeadImportance:
    """Which heads a reply hangs on: each taken out, then a group of them found greedily (Zhou et al., 2025).

    Found on training prompts (of the behavior `refusal`: harmful requests), with the same on their counterfactuals
    (harmless ones) beside it: a head that moves both alike is important for speaking, not for refusing. The group is
    judged on test prompts, beside random ones of the same layers. Ships: mean KL
    from the next token's distribution to the one without the head. Sahara: the largest angles between the spaces that
    the last streams of all prompts span, with the head and without. Options are those of `ImportanceConfig`.

    Known failure: a head that feeds many others (an early one) scores high for whatever it does; `knock_out` with
    `effect` says what taking a group out does to the behavior, and to plain text.
    """
    started = time.perf_counter()
    used = configured(ImportanceConfig, config, options)
    pairs, test = behavior.train[: used.n].bind(model), behavior.test[: used.n].bind(model)
    heads = [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    asked = _Replies(model, pairs.groups, used, counterfactual=False)
    elsewhere = _Replies(model, pairs.groups, used, counterfactual=True)
    scores = {head: asked.moved([head]) for head in track(heads, "taking heads out")}
    others = {head: elsewhere.moved([head]) for head in track(heads, "taking heads out elsewhere")}
    ranked = sorted(heads, key=lambda head: -scores[head])[: used.candidates]
    group, found = [ranked[0]], [scores[ranked[0]]]
    while len(group) < min(used.group, len(ranked)):
        tried = {head: asked.moved([*group, head]) for head in ranked if head not in group}
        best = max(tried, key=lambda head: tried[head])
        group.append(best)
        found.append(tried[best])
    random, judged = np.random.default_rng(used.seed), _Replies(model, test.groups, used, counterfactual=False)
    rows = []
    for size in range(1, len(group) + 1):
        drawn = [judged.moved(_same_layers(group[:size], model.n_heads, random)) for _ in range(used.draws)]
        rows.append(
            {
                "order": size,
                "head": _name(group[size - 1]),
                "found": found[size - 1],
                "score": judged.moved(group[:size]),
                "random": float(np.mean(drawn)),
                "lo": min(drawn),
                "hi": max(drawn),
            }
        )
    table = pl.DataFrame(
        {
            "layer": [layer for layer, _ in heads],
            "head": [head for _, head in heads],
            "score": [scores[head] for head in heads],
            "elsewhere": [others[head] for head in heads],
        }
    )
    return HeadImportance(
        tables={"heads": table, "group": pl.DataFrame(rows)},
        facts={"behavior": behavior.name, "method": used.method, "n": pairs.n, "test": test.n},
        config=asdict(used),
        provenance=Provenance.collect(model, behavior, seed=used.seed, seconds=time.perf_counter() - started),
    )


class _Replies:
    """The model's replies to some prompts, and how far they move when heads are taken out."""

    def __init__(
        self, model: "Model", groups: Sequence["Group"], used: ImportanceConfig, *, counterfactual: bool
    ) -> None:
        self.model, self.used = model, used
        self.prompts = [group.corrupt if counterfactual else group.clean for group in groups]
        self.end = Site("resid_post", model.n_layers - 1).at(-1)
        self.usual, streams = self._run([])
        self.space = _space(streams, used.rank)

    def moved(self, heads: Sequence[Head]) -> float:
        logits, streams = self._run(heads)
        if self.used.method == "ships":
            p, q = self.usual.log_softmax(-1), logits.log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())
        return angle(self.space, _space(streams, self.used.rank))

    def _run(self, heads: Sequence[Head]) -> tuple[Tensor, Tensor]:
        """(logits [N, V], last streams [N, D]) in float64."""
        logits, streams = [], []
        for prompts in self.prompts:
            edits = [self._without(head, prompts.shape[1]) for head in heads]
            run = self.model.run(prompts, capture=[self.end], interventions=edits, logits="last")
            logits.append(run.logits.double().cpu())
            streams.append(run[self.end].double().cpu())
        return torch.cat(logits), torch.cat(streams)

    def _without(self, head: Head, length: int) -> Intervention:
        layer, number = head
        if self.used.how == "scaled":
            return Scale(site=Site("z", layer, number), op="add", value=torch.zeros(()), scale=self.used.keep)
        even = torch.ones(length, length).tril()
        return replace(Site("pattern", layer, number), (even / even.sum(-1, keepdim=True)).to(self.model.dtype))


def _space(streams_ND: Tensor, rank: int) -> Tensor:
    """[N, R]: the first left singular vectors of the prompts' streams, as Sahara compares them."""
    left, _, _ = torch.linalg.svd(streams_ND, full_matrices=False)
    return left[:, : max(1, min(rank, len(streams_ND) // 2))]


def angle(one_NR: Tensor, other_NR: Tensor) -> float:
    """Sum of the principal angles, in radians, between the spaces that two sets of orthonormal columns span."""
    cosines = torch.linalg.svdvals(one_NR.T @ other_NR).clamp(-1.0, 1.0)
    return float(torch.arccos(cosines).sum())


def _same_layers(group: Sequence[Head], n_heads: int, random: np.random.Generator) -> list[Head]:
    """As many random heads of the same layers; those of the group only where a layer has no others."""
    drawn: list[Head] = []
    for layer, _ in group:
        free = [(layer, h) for h in range(n_heads) if (layer, h) not in drawn and (layer, h) not in group]
        free = free or [(layer, h) for h in range(n_heads) if (layer, h) not in drawn]
        drawn.append(free[int(random.integers(len(free)))])
    return drawn


def _name(head: Head) -> str:
    return f"a{head[0]}.h{head[1]}"

"""Spurious cues: groups of prompts at which a model fails more than elsewhere, found by columns and by clusters of its
own streams; and fine-tuning in which every group counts alike."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.act.action import Action, Goal, column_of
from headwater.act.catalog import methods
from headwater.act.measuring import said
from headwater.act.training.examples import Example, batches, draws, mean_loss, wanted
from headwater.act.training.finetune import UntilConfig, finished
from headwater.act.training.fitting import fit
from headwater.act.training.weights import weights_of
from headwater.behavior.metrics import interval
from headwater.claims.statistics import p_from_draws
from headwater.core.errors import MethodError
from headwater.core.methods import configured
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Floats = NDArray[np.float64]
CLUSTERS = "clusters"
_AXES = 8  # principal axes of the streams that clusters are found on


@register_result
class CueGroups(Result):
    """Where a model fails.

    `tables["groups"]`: source (a column, or "clusters"), group, train (pairs clusters were found on), n (test pairs),
    accuracy, lo, hi. `tables["sources"]`: source, spread (weighted standard deviation of the groups' accuracies), p (of
    a spread as large when test pairs are shuffled over groups). facts: accuracy of all test pairs.
    """

    kind: ClassVar[str] = "cue_groups"
    main: ClassVar[str] = "groups"


def cue_groups(
    model: "Model",
    behavior: "Behavior",
    *,
    site: str | None = None,
    k: int = 4,
    draws: int = 999,
    seed: int = 0,
) -> CueGroups:
    """Find cues that decide whether the model is right: the behavior's slices, and clusters of the model's own streams.

    Clusters are of the stream at the last token of training prompts (k-means on its first principal axes; Sohoni et
    al., 2020); test pairs go to the nearest. site: where (None: `resid_post` at two thirds of the depth). Accuracy is
    of test pairs. Known failure: a cluster need not have a name, and with few pairs a group with errors is found where
    there is none: that is what p is for, and it is not corrected for the number of sources.
    """
    started = time.perf_counter()
    train, test = (_Streams.of(model, part, site) for part in (behavior.train, behavior.test))
    centres = clusters(train.streams, k, seed)
    sources: dict[str, tuple[list[str], list[str]]] = {
        name: (column_of(train.frame, name), column_of(test.frame, name)) for name in behavior.slices
    }
    sources[CLUSTERS] = (_named(centres.assign(train.streams)), _named(centres.assign(test.streams)))
    random, right = np.random.default_rng(seed), test.right
    groups: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    for source, (before, now) in sources.items():
        labels = np.array(now)
        if len(set(now)) < 2:
            continue
        for name in sorted(set(now)):
            value, low, high = interval(right[labels == name], share=True)
            numbers = {"train": before.count(name), "n": now.count(name)}
            groups.append({"source": source, "group": name, **numbers, "accuracy": value, "lo": low, "hi": high})
        null = [_spread(random.permutation(right), labels) for _ in range(draws)]
        observed = _spread(right, labels)
        told.append({"source": source, "spread": observed, "p": p_from_draws(observed, null)})
    return CueGroups(
        tables={"groups": pl.DataFrame(groups), "sources": pl.DataFrame(told).sort("p", "source")},
        facts={"behavior": behavior.name, "accuracy": float(right.mean()), "n": len(right), "site": train.site},
        config={"site": train.site, "k": k, "draws": draws, "seed": seed},
        provenance=Provenance.collect(model, behavior, seed=seed, seconds=time.perf_counter() - started),
    )


def _named(numbers: NDArray[np.int64]) -> list[str]:
    return [f"cluster {number}" for number in numbers]


def _spread(right: Floats, labels: NDArray[Any]) -> float:
    """Standard deviation of the groups' accuracies, each counted by its pairs."""
    means = {name: right[labels == name].mean() for name in set(labels.tolist())}
    return float(np.sqrt(np.mean([(means[name] - right.mean()) ** 2 for name in labels.tolist()])))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Streams:
    """The bound pairs of a behavior, in their order: the stream at the last token [N, D], and whether the model is
    right (1) or not (0)."""

    frame: pl.DataFrame
    streams: Floats
    right: Floats
    site: str

    @staticmethod
    def of(model: "Model", pairs: "Behavior", site: str | None) -> "_Streams":
        asked = site or f"resid_post.{min(model.n_layers - 1, round(model.n_layers * 2 / 3))}"
        (where,) = model.resolve(asked)
        bound = pairs.bind(model)
        ids, kept = bound.behavior.frame["id"].to_list(), dict[str, tuple[Floats, float]]()
        for group in bound.groups:
            run = model.run(group.clean, capture=[where.at(-1)], logits="last")
            values = said("accuracy", run.logits, group).double().cpu().tolist()
            for row, stream, right in zip(group.rows, run[where.at(-1)].double().cpu().numpy(), values, strict=True):
                kept[ids[row]] = (stream, float(right))
        rows = [kept[id] for id in bound.frame["id"].to_list()]
        return _Streams(
            frame=bound.frame,
            streams=np.stack([stream for stream, _ in rows]),
            right=np.array([right for _, right in rows]),
            site=asked,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """Centres [k, A] on principal axes [A, D] of streams around `mean` [D]."""

    mean: Floats
    axes: Floats
    centres: Floats

    def assign(self, streams: Floats) -> NDArray[np.int64]:
        """The nearest centre of each stream [N, D]."""
        placed = (streams - self.mean) @ self.axes.T
        return ((placed[:, None] - self.centres) ** 2).sum(-1).argmin(1)


def clusters(streams: Floats, k: int, seed: int) -> Clusters:
    """k-means on the first principal axes. Raises MethodError for fewer streams than clusters."""
    from scipy.cluster.vq import kmeans2

    if not 2 <= k <= len(streams):
        raise MethodError("clusters do not fit the pairs", got=f"{k} of {len(streams)}", wanted="2 to the pairs")
    mean = streams.mean(0)
    _, _, axes = np.linalg.svd(streams - mean, full_matrices=False)
    axes = axes[: min(_AXES, len(axes))]
    centres, _ = kmeans2((streams - mean) @ axes.T, k, minit="++", rng=np.random.default_rng(seed), missing="warn")
    return Clusters(mean=mean, axes=axes, centres=centres)


@dataclass(frozen=True, kw_only=True)
class ReweightedConfig(UntilConfig):
    """Options of `UntilConfig` (until: of the worst group's loss); weights: which are trained (`weights_of`); by: the
    column whose values are groups, or "clusters" (found as by `cue_groups`, with `site` and `k`). balance: "size" (each
    group counts alike) or "errors" (each by the share of its training pairs at which the model fails)."""

    weights: str | tuple[str, ...] = "all"
    by: str = CLUSTERS
    balance: Literal["size", "errors"] = "size"
    site: str | None = None
    k: int = 4


@methods.register("reweighted")
def reweighted(
    model: "Model", behavior: "Behavior", *, config: ReweightedConfig | None = None, **options: Any
) -> Action:
    """Fine-tune with every group of pairs counting alike, so that a cue that holds for most no longer pays (Sagawa et
    al., 2020, for groups by column; Sohoni et al., 2020, for clusters).

    Options are those of `ReweightedConfig`. Known failure: a group with a few pairs is learned by heart.
    """
    used = configured(ReweightedConfig, config, options)
    goal, read = Goal.parse(used.goal), _Streams.of(model, behavior.train, used.site)
    if used.by == CLUSTERS:
        labels = _named(clusters(read.streams, used.k, used.seed).assign(read.streams))
    else:
        labels = column_of(read.frame, used.by)
    weights = group_weights(labels, read.right, used.balance)
    trained = weights_of(model, used.weights, behavior)
    objective = _Weighted(wanted(model, behavior, goal), weights, labels, used, model)
    found = fit(
        model, trained, objective, steps=used.steps, lr=used.lr, until=lambda x: x <= used.until, label="reweighted"
    )
    return finished(model, "reweighted", used, goal, found, trained.told, objective.passes)


def group_weights(labels: list[str], right: Floats, balance: str) -> Floats:
    """[N]: what each pair counts, with mean 1."""
    share = {}
    for name in set(labels):
        own = right[np.array(labels) == name]
        share[name] = (1.0 if balance == "size" else float((1 - own).mean()) + 1e-3) / len(own)
    weights = np.array([share[name] for name in labels])
    return weights / weights.mean()


class _Weighted:
    """The loss of the wanted answers, each counting by its weight. What is watched is the loss of the worst group when
    it was last met, as a batch may hold none of a small one; at chance before."""

    def __init__(
        self, some: list[Example], weights: Floats, labels: Sequence[str], used: UntilConfig, model: "Model"
    ) -> None:
        self._some, self._labels, self._device = some, np.array(labels), model.device
        self._weights = torch.as_tensor(weights)
        self._order = draws(len(some), used.batch, used.seed)
        self._worst = dict.fromkeys(labels, math.log(model.d_vocab))
        self.passes = 0

    def __call__(self, twin: nn.Module, step: int) -> Iterator[tuple[Tensor, float | None]]:
        numbers = next(self._order)
        self.passes += len(numbers)
        parts, met = list(batches(self._some, numbers, self._device)), dict[int, float]()
        for at, (own, ids_BT, learned_BT) in enumerate(parts):
            losses = mean_loss(twin, ids_BT, learned_BT)
            met |= dict(zip(own, losses.detach().tolist(), strict=True))
            if at + 1 == len(parts):
                self._meet(met)
            counted = (losses * self._weights[own].to(losses)).sum() / len(numbers)
            yield counted, max(self._worst.values()) if at + 1 == len(parts) else None

    def _meet(self, losses: dict[int, float]) -> None:
        for label in set(self._labels[list(losses)].tolist()):
            self._worst[label] = float(np.mean([loss for at, loss in losses.items() if self._labels[at] == label]))

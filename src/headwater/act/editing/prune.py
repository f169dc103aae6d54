"""Pruning by relevance: neurons that a behavior does not need are taken out of the weights, or those it needs most.

Shapes: B pairs, T tokens, M neurons of a layer, L layers.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from headwater.act.action import Action, Goal
from headwater.act.catalog import methods
from headwater.act.edit import Delta
from headwater.act.editing.making import as_action
from headwater.act.editing.parts import down_projection
from headwater.act.measuring import NOTHING, first_tokens, lacks_words, main_metric, plain_texts, said, score, text_loss
from headwater.core.errors import MethodError
from headwater.core.methods import configured
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

By = Literal["relevance", "magnitude", "random"]


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """share: of all neurons, how many are taken out. by: what they are ranked by: "relevance" (see `prune`),
    "magnitude" (mean size of the activation times the length of what it writes), or "random". take: "least" relevant
    neurons (the behavior should stay as it is) or "most" (it should go). n: training pairs. text: also rank by
    relevance for the loss on plain text, each counted as a share of its sum, so that language stays too."""

    share: float = 0.1
    by: By = "relevance"
    take: Literal["least", "most"] = "least"
    n: int = 24
    text: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise MethodError("a share of the neurons is pruned", got=self.share, wanted="above 0 and below 1")
        if self.n < 1:
            raise MethodError("relevance is found on training pairs", got=self.n, wanted="at least 1")


@methods.register("prune")
def prune(model: "Model", behavior: "Behavior", *, config: PruneConfig | None = None, **options: Any) -> Action:
    """Take neurons out of the weights by their relevance to a behavior (Hatefi et al., 2024).

    Relevance is |activation x gradient of the metric|, summed over the tokens of training prompts: to first order, how
    far the metric moves at most when the neuron is taken to 0 at some of them. Taken out means that its column of the
    down-projection is 0; as many weights may then be left out of a file. At random: as many neurons of the same layers.
    Options are those of `PruneConfig`. Known failure: neurons are judged one by one, so of two that stand in for each
    other both look irrelevant; and what the behavior's prompts do not use is lost, whatever else it is for (`text=True`
    helps).
    """
    used = configured(PruneConfig, config, options)
    bound = behavior.train[: used.n].bind(model)
    ranked = _ranking(model, bound, main_metric(behavior), used)
    goal = Goal.parse("lower" if used.take == "most" else "raise")
    made = as_action(
        model,
        f"prune {used.share:.0%} of neurons by {used.by}" + (" (the most relevant)" if used.take == "most" else ""),
        pruned(model, taken(ranked, used.share, used.take)),
        goal,
        2 * bound.n,
        method="prune",
        **asdict(used),
    )

    def control(seed: int) -> Action:
        drawn = pruned(model, _alike(taken(ranked, used.share, used.take), ranked, seed))
        return as_action(model, f"prune {used.share:.0%} of neurons at random", drawn, goal, 0, seed=seed)

    return replace(made, control=control)


def relevance(model: "Model", bound: "Bound", metric: str) -> Tensor:
    """[L, M]: |activation x gradient of the metric|, summed over tokens, mean over pairs."""
    sites = [f"neurons.{layer}" for layer in range(model.n_layers)]
    total = torch.zeros(0)
    for group in bound.groups:
        run = model.run(group.clean, capture=sites, logits="last", grad=True)
        counted = said(metric, run.logits, group).sum()
        total = _added(total, [(run[site] * grad).detach() for site, grad in run.grads(counted, sites).items()])
    return total / bound.n


def text_relevance(model: "Model", texts: Sequence[str], tokens: int = 48) -> Tensor:
    """[L, M]: the same for the mean loss of each text, mean over texts."""
    sites, total = [f"neurons.{layer}" for layer in range(model.n_layers)], torch.zeros(0)
    for text in texts:
        ids = first_tokens(model, [text], tokens)[0][None]
        run = model.run(ids, capture=sites, grad=True)
        loss = torch.nn.functional.cross_entropy(run.logits[0, :-1].float(), ids[0, 1:].to(run.logits.device))
        total = _added(total, [(run[site] * grad).detach() for site, grad in run.grads(loss, sites).items()])
    return total / len(texts)


def magnitude(model: "Model", bound: "Bound") -> Tensor:
    """[L, M]: mean size of the activation over tokens, times the length of what the neuron writes."""
    sites, total = [f"neurons.{layer}" for layer in range(model.n_layers)], torch.zeros(0)
    for group in bound.groups:
        run = model.run(group.clean, capture=sites, logits="none")
        total = _added(total, [run[site] / group.length for site in sites])
    matrices = [down_projection(model, layer).weight for layer in range(len(total))]
    lengths = torch.stack([matrix.double().norm(dim=0).cpu() for matrix in matrices])
    return total / bound.n * lengths


def _added(total: Tensor, values: list[Tensor]) -> Tensor:
    """The total [L, M] with the sizes of these values [B, T, M], a layer each, summed over rows and tokens."""
    now = torch.stack([value.double().abs().sum((0, 1)).cpu() for value in values])
    return now if not total.numel() else total + now


def _ranking(model: "Model", bound: "Bound", metric: str, used: PruneConfig) -> Tensor:
    """[L, M]: what neurons are ranked by."""
    if used.by == "magnitude":
        return magnitude(model, bound)
    if used.by == "random":
        width = down_projection(model, 0).weight.shape[1]
        draw = torch.Generator().manual_seed(used.seed)
        return torch.rand(model.n_layers, width, generator=draw, dtype=torch.float64)
    found = relevance(model, bound, metric)
    if not used.text:
        return found
    texts = [text for text in plain_texts() if not lacks_words(model, text)]
    if not texts:
        raise MethodError("the tokenizer lacks words of plain text", got="text=True", fix="Rank without it")
    other = text_relevance(model, texts)
    return found / found.sum().clamp(min=1e-30) + other / other.sum().clamp(min=1e-30)


def taken(ranked_LM: Tensor, share: float, take: str) -> dict[int, Tensor]:
    """layer -> the neurons that are taken out."""
    width, n = ranked_LM.shape[1], max(1, round(share * ranked_LM.numel()))
    order = ranked_LM.flatten().argsort(stable=True, descending=take == "most")[:n].sort().values
    return {int(layer): order[order // width == layer] % width for layer in (order // width).unique()}


def pruned(model: "Model", chosen: dict[int, Tensor]) -> list[Delta]:
    """Changes that set these neurons' columns of the down-projections to 0."""
    found = []
    for layer, index in chosen.items():
        matrix = down_projection(model, layer)
        found.append(matrix.columns(index, -matrix.weight[:, index.to(matrix.weight.device)]))
    return found


def _alike(chosen: dict[int, Tensor], ranked_LM: Tensor, seed: int) -> dict[int, Tensor]:
    """As many neurons of each layer, at random."""
    draw = torch.Generator().manual_seed(seed)
    width = ranked_LM.shape[1]
    return {layer: torch.randperm(width, generator=draw)[: len(index)].sort().values for layer, index in chosen.items()}


@register_result
class PruningCurve(Result):
    """What is left of a behavior as more is pruned.

    `tables["curve"]`: by, share, metric (mean over test pairs), accuracy, perplexity (of plain text; null where it
    cannot be measured), lo and hi (of the metric: the smallest and largest over seeds, for random rankings; else the
    metric). facts: the behavior and its metric, and both before anything is pruned.
    """

    kind: ClassVar[str] = "pruning"
    main: ClassVar[str] = "curve"


def pruning_curve(
    model: "Model",
    behavior: "Behavior",
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    seeds: int = 3,
    n: int = 24,
    text: bool = False,
    text_tokens: int = 48,
) -> PruningCurve:
    """Relevance, magnitude and random rankings beside each other: the behavior on test pairs, and plain text, at each
    share of neurons taken out, the least first.

    n: training pairs for the rankings. seeds: random rankings. Raises MethodError for shares outside 0 to 1.
    """
    started = time.perf_counter()
    name = main_metric(behavior)
    bound, test = behavior.train[:n].bind(model), behavior.test.bind(model)
    rows: list[dict[str, Any]] = []

    def measured(action: Action) -> dict[str, float | None]:
        found = score(model, test, action, (name, "accuracy"))
        try:
            loss: float | None = float(np.exp(text_loss(model, plain_texts(), action, tokens=text_tokens).mean()))
        except MethodError:  # a tokenizer that lacks the words
            loss = None
        means = {column: float(found[column].to_numpy().mean()) for column in (name, "accuracy")}
        return {"metric": means[name], "accuracy": means["accuracy"], "perplexity": loss}

    rankings: list[tuple[By, int]] = [("relevance", 0), ("magnitude", 0), *(("random", seed) for seed in range(seeds))]
    for by, seed in track(rankings, "pruning"):
        ranked = _ranking(model, bound, name, PruneConfig(by=by, n=n, text=text, seed=seed))
        for share in shares:
            used = PruneConfig(share=share, by=by, seed=seed)
            deltas = pruned(model, taken(ranked, used.share, "least"))
            action = as_action(model, f"{by} {share} {seed}", deltas, Goal(), 0)
            rows.append({"by": by, "share": share, **measured(action)})
    table = pl.DataFrame(rows, schema_overrides={"perplexity": pl.Float64}).group_by("by", "share", maintain_order=True)
    summary = table.agg(
        pl.col("metric").mean(),
        pl.col("accuracy").mean(),
        pl.col("perplexity").mean(),
        lo=pl.col("metric").min(),
        hi=pl.col("metric").max(),
    )
    return PruningCurve(
        tables={"curve": summary},
        facts={"behavior": behavior.name, "metric": name, "before": measured(NOTHING), "seeds": seeds},
        config={"shares": list(shares), "seeds": seeds, "n": n, "text": text, "text_tokens": text_tokens},
        provenance=Provenance.collect(model, behavior, seconds=time.perf_counter() - started),
    )

"""ACDC: automatic circuit discovery by pruning edges, or nodes, one after the other from the logits back."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.progress import track
from headwater.localize.attribution.eap import configured
from headwater.localize.catalog import methods
from headwater.localize.engine.ablation import Ablation, AblationKind
from headwater.localize.engine.passes import Engine, for_discovery
from headwater.localize.engine.planning import Plan, Tally, plans
from headwater.localize.graph import Graph
from headwater.localize.search.searching import SearchResult, Trials, Unit, search_result, trial_batches

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class AcdcConfig:
    """thresholds: an edge goes where its removal costs less than this, in the metric's units; one search for each.

    metric: "kl" (from the model's own output), or another, of which a fall (a rise, where lower is better) is the cost.
    unit: "edge" or "node". ablation: what removed edges carry. side_by_side: trials run at once at most. memory_mb:
    what a batch may take (None: .4 of what the weights take, at least 96).
    """

    thresholds: tuple[float, ...] = (0.1, 0.03, 0.01)
    metric: str = "kl"
    unit: Unit = "edge"
    ablation: AblationKind = "counterfactual"
    side_by_side: int = 64
    memory_mb: float | None = None


@methods.register("acdc")
def acdc(model: "Model", behavior: "Behavior", *, config: AcdcConfig | None = None, **options: Any) -> SearchResult:
    """Automatic circuit discovery (Conmy et al., 2023): from the logits back, each edge into each reader is removed for
    good if the metric's mean gets worse by less than the threshold; then the next, on what is left.

    Readers are taken in reverse order, the sources of one from the last to the first; a reader whose node feeds nothing
    any more loses all its edges untried. Found on `behavior.train` where there is a split; one row of the result's
    curve for each threshold. Its circuits are those of trying one edge at a time on whole runs: a trial starts at its
    reader's layer, since all before it is still the whole model, and trials run side by side on the guess that all
    before them in the row succeeded; those behind the first that did not are run again. Values are equal up to the
    rounding of sums, so only an edge whose cost lies within that of the threshold could fall differently. Options are
    those of `AcdcConfig`. Known failure: the order decides; of two components that back each other up, the one tried
    first looks idle and goes.

    Raises ModelError for a model without a circuit graph, MethodError for a threshold or unit that makes no sense.
    """
    used = configured(AcdcConfig, config, options)
    if used.unit not in ("edge", "node"):
        raise MethodError("unknown unit", got=repr(used.unit), wanted=did_you_mean(str(used.unit), ["edge", "node"]))
    thresholds = sorted(set(used.thresholds), reverse=True)
    if not thresholds or used.side_by_side < 1:
        raise MethodError("ACDC needs a threshold, and trials to run", got=f"{used.thresholds}, {used.side_by_side}")
    if used.ablation == "optimal":
        raise MethodError("ACDC removes edges before constants for them are known", wanted="counterfactual, zero, mean")
    started = time.monotonic()
    pairs = for_discovery(behavior)
    trials = Trials(model, pairs.bind(model), used.metric, Ablation(kind=used.ablation), used.memory_mb)
    whole = trials.settle(trials.graph.allowed)
    rows: list[tuple[float, Tensor, float, float]] = []
    scores = torch.zeros(trials.graph.allowed.shape, dtype=torch.float64)
    for threshold in thresholds:
        mask, value = pruned(trials, whole, threshold, unit=used.unit, side_by_side=used.side_by_side)
        rows.append((threshold, mask, value, trials.forward))
        scores = torch.maximum(scores, mask.double() * threshold)
    return search_result(
        "acdc", model, pairs, trials, rows, scores,
        metric=used.metric, config=asdict(used), started=started, facts={"unit": used.unit},
    )  # fmt: skip


def pruned(
    trials: Trials, whole: float, threshold: float, *, unit: Unit = "edge", side_by_side: int = 64
) -> tuple[Tensor, float]:
    """(mask [sources, readers], value) of ACDC at one threshold, of trials that are settled on the whole graph, whose
    value is `whole`.
    """
    graph = trials.graph
    mask, value = graph.allowed.clone(), whole
    groups = list(_edge_groups(graph) if unit == "edge" else _node_groups(graph))
    for start, cuts, owners in track(groups, f"acdc at {threshold:g}"):
        if owners is not None and not bool(mask[owners].any()):
            mask[:, cuts[0][1]] = False  # what it is read for feeds nothing any more
            continue
        mask, value = _try_all(trials, mask, value, cuts, start, threshold, side_by_side)
    return mask, value


@plans.register("acdc")
def _plan(model: "Model", behavior: "Behavior", *, config: AcdcConfig | None = None, **options: Any) -> Plan:
    from headwater.localize.engine.planners import words_read

    used = configured(AcdcConfig, config, options)
    engine, tally = Engine(model), Tally(model, used.memory_mb)
    graph, bound = engine.wiring.graph, for_discovery(behavior).bind(model)
    groups = list(_edge_groups(graph) if used.unit == "edge" else _node_groups(graph))
    times = len(set(used.thresholds))
    for batch in trial_batches(model, graph, bound, used.metric, used.memory_mb)[0]:
        n, last = len(batch) * batch.suffix, graph.n_layers
        words = words_read(model, [used.metric], batch)
        same: dict[str, Any] = {"rows": len(batch), "positions": batch.suffix, "words": words}
        for name in ("prompts", "counterfactuals", "the whole graph"):
            tally.forward(name, **same)
        for start, cuts, _ in groups:
            for _ in range(times * len(cuts)):
                tally.forward(
                    f"trials from layer {start} on", **same, attention=n * (last - start), mlp=n * (last - start)
                )
        whole = {"rows": len(batch), "positions": batch.suffix}
        tally.floor(**whole, forwards=2 + times * sum(len(cuts) for _, cuts, _ in groups))
    note = (
        "A trial an edge: readers whose node feeds nothing any more need none; guesses that fail are run again. "
        "Trials side by side are counted one by one."
    )
    return tally.plan("acdc", n=bound.n, note=note)


Cut = tuple[int, int | None]
"""An edge (source, reader), or with None all edges of a source."""
Group = tuple[int, list[Cut], Tensor | None]
"""(layer its trials start at, what each trial removes, sources of which one must still feed something)."""


def _edge_groups(graph: Graph) -> Iterator[Group]:
    for reader in reversed(range(len(graph.readers))):
        sources = reversed(graph.allowed[:, reader].nonzero().flatten().tolist())
        owners = graph.owners[:, reader] if reader != len(graph.readers) - 1 else None
        yield graph.layer_of(graph.readers[reader]), [(source, reader) for source in sources], owners


def _node_groups(graph: Graph) -> Iterator[Group]:
    for layer in reversed(range(graph.n_layers)):
        heads = range(len(graph.sources))[graph.heads_at(layer)]
        yield layer, [(source, None) for source in reversed([*heads, graph.mlp_at(layer)])], None


def _without(mask: Tensor, cut: Cut) -> Tensor:
    source, reader = cut
    mask = mask.clone()
    mask[source, slice(None) if reader is None else reader] = False
    return mask


def _try_all(
    trials: Trials, mask: Tensor, value: float, cuts: list[Cut], start: int, threshold: float, most: int
) -> tuple[Tensor, float]:
    """The circuit, and its value, after each cut was tried in turn."""
    at, size = 0, min(8, most)
    while at < len(cuts):
        guesses, smaller = [], mask
        for cut in cuts[at : at + size]:
            smaller = _without(smaller, cut)
            guesses.append(smaller)
        held = True
        for guess, found in zip(guesses, trials.values(guesses, start), strict=True):
            at += 1
            if trials.loss(found) - trials.loss(value) < threshold:
                mask, value = guess, found
                continue
            held = False  # this one stays, so the guesses behind it are not what comes next
            break
        size = min(most, size * 2) if held else max(1, size // 2)
    return mask, value

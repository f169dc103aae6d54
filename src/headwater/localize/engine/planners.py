"""Plans of attribution and of circuit evaluation: the passes that their batches will take."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from headwater.behavior.metrics import STEPS
from headwater.core.errors import MethodError
from headwater.localize.attribution.atp import AtpConfig
from headwater.localize.attribution.eap import AttributionResult, EapConfig, EapIgConfig, configured, integration_nodes
from headwater.localize.circuit import Circuit
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    can_narrow,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.engine.planning import Plan, Tally, plans
from headwater.localize.graph import Graph
from headwater.localize.judging.mib import FRACTIONS
from headwater.localize.selection import Rank, prune, select

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

SCORES = "scores of all edges"


def words_read(model: "Model", metrics: Sequence[str], batch: Batch) -> int | None:
    """How many tokens of the vocabulary are unembedded in a batch; None for all of them."""
    if set(metrics) - {"logit_diff"} or type(Engine(model).wiring.unembed) is not torch.nn.Linear:
        return None
    ids = torch.cat([batch.answers.flatten(), batch.foils.flatten()]).unique()
    return int((ids >= 0).sum())


def last_mlps(engine: Engine, batch: Batch, positions: int) -> int | None:
    """Positions x layers in which the MLP is run, the last one at the last position only; None where it cannot be."""
    layers = engine.wiring.graph.n_layers
    return len(batch) * (positions * (layers - 1) + 1) if can_narrow(engine) else None


def prefix_pass(engine: Engine, tally: Tally, batch: Batch) -> None:
    """The pass that fills the cache of a batch's shared prefix, where there is one."""
    if batch.prefix:
        mlp = last_mlps(engine, batch, batch.prefix)
        tally.forward("shared prefix", rows=len(batch), positions=batch.prefix, unembedded=0, mlp=mlp)


def _edges(model: "Model", behavior: "Behavior", method: str, config: EapConfig, nodes: list[float]) -> Plan:
    if getattr(config, "against", "counterfactual") != "counterfactual":
        raise MethodError("only scores against the counterfactual have a plan", got=config.against)
    engine, tally = Engine(model), Tally(model, config.memory_mb)
    graph, bound = engine.wiring.graph, for_discovery(behavior).bind(model)
    readers = graph.per_layer + 1 if len(nodes) == 1 else len(graph.readers)
    floats = graph.d_model * (len(graph.sources) + readers + 25 * graph.n_layers)
    reuse = config.reuse_prefix and can_reuse_prefix(engine)
    first = engine.wiring.layers[0]
    heads = first.attention.n_heads * first.attention.d_value + sum(part.rows.numel() for part in first.parts.values())
    for batch in make_batches(bound, tokens_at_once(model, floats, config.memory_mb), reuse_prefix=reuse):
        prefix_pass(engine, tally, batch)
        n = len(batch) * batch.suffix
        same: dict[str, Any] = {"rows": len(batch), "positions": batch.suffix, "before": batch.prefix}
        same |= {"words": words_read(model, [config.metric], batch), "held": n * floats * tally.costs.itemsize}
        same["mlp"] = last_mlps(engine, batch, batch.suffix)
        tally.forward("prompts", **same, backward=1.0 in nodes)
        tally.forward("counterfactuals", **same, backward=0.0 in nodes)
        for _ in [node for node in nodes if node not in (0.0, 1.0)]:
            tally.forward("on the way in between", **same, backward=True)
        products = 2.0 * n * graph.d_model * (graph.n_edges + graph.n_layers * heads * len(nodes))
        tally.work(SCORES, products, n * graph.d_model * (len(graph.sources) + readers) * tally.costs.itemsize)
        # by definition: a pass on each prompt, and one with its backward for each place where a gradient is taken
        whole = {"rows": len(batch), "positions": batch.suffix + batch.prefix}
        tally.floor(**whole, forwards=1 + len(nodes) if len(nodes) == 1 else 2 + len(nodes), backwards=len(nodes))
    return tally.plan(method, n=bound.n)


def _differentiable(metric: str) -> None:
    if metric in STEPS:
        raise MethodError(f"the metric {metric} has no gradient", wanted="logit_diff, prob_diff or kl")


@plans.register("eap")
def _plan_eap(model: "Model", behavior: "Behavior", *, config: EapConfig | None = None, **options: Any) -> Plan:
    used = configured(EapConfig, config, options)
    _differentiable(used.metric)
    return _edges(model, behavior, "eap", used, [1.0])


@plans.register("eap_ig")
def _plan_eap_ig(model: "Model", behavior: "Behavior", *, config: EapIgConfig | None = None, **options: Any) -> Plan:
    used = configured(EapIgConfig, config, options)
    _differentiable(used.metric)
    return _edges(model, behavior, "eap_ig", used, [place for place, _ in integration_nodes(used.steps, used.rule)])


@plans.register("atp")
def _plan_atp(model: "Model", behavior: "Behavior", *, config: AtpConfig | None = None, **options: Any) -> Plan:
    used = configured(AtpConfig, config, options)
    _differentiable(used.metric)
    engine, tally = Engine(model), Tally(model, used.memory_mb)
    graph, bound = engine.wiring.graph, for_discovery(behavior).bind(model)
    reuse = used.reuse_prefix and can_reuse_prefix(engine)
    floats = graph.d_model * 30 * graph.n_layers
    for batch in make_batches(bound, tokens_at_once(model, floats, used.memory_mb), reuse_prefix=reuse):
        prefix_pass(engine, tally, batch)
        same: dict[str, Any] = {"rows": len(batch), "positions": batch.suffix, "before": batch.prefix}
        same["words"] = words_read(model, [used.metric], batch)
        n = len(batch) * batch.suffix
        same["mlp"] = last_mlps(engine, batch, batch.suffix)
        tally.forward("prompts", **same, backward=True, held=n * floats * tally.costs.itemsize)
        tally.forward("counterfactuals", **same)
        tally.work("scores of nodes", 4.0 * n * graph.d_model * graph.n_layers * graph.d_model)
        tally.floor(rows=len(batch), positions=batch.suffix + batch.prefix, forwards=2, backwards=1)
    return tally.plan("atp", n=bound.n)


def _evaluation(
    method: str, model: "Model", behavior: "Behavior", masks: Sequence[Tensor], metric: str, memory_mb: float | None
) -> Plan:
    engine, tally = Engine(model), Tally(model, memory_mb)
    graph, bound = engine.wiring.graph, behavior.bind(model)
    widest = max((int(mask.any(dim=1).sum()) for mask in masks), default=0)
    floats = graph.d_model * (widest + 2 * graph.per_layer + 16 * graph.n_layers)
    reuse = can_reuse_prefix(engine)
    live = [live_layers(graph, prune(graph, mask)) for mask in masks]
    for batch in make_batches(bound, tokens_at_once(model, floats, memory_mb), reuse_prefix=reuse):
        prefix_pass(engine, tally, batch)
        n = len(batch) * batch.suffix
        same: dict[str, Any] = {"rows": len(batch), "positions": batch.suffix, "before": batch.prefix}
        same |= {"words": words_read(model, [metric], batch), "held": n * floats * tally.costs.itemsize}
        tally.forward("prompts", **same, mlp=last_mlps(engine, batch, batch.suffix))
        tally.forward("counterfactuals", **same)
        for layers in live:
            if layers is not None:
                tally.forward("circuits", **same, attention=n * layers[0], mlp=n * layers[1])
        for mask in masks:
            tally.work("reading the circuits' edges", 2.0 * n * graph.d_model * int(mask.sum()))
        whole = {"rows": len(batch), "positions": batch.suffix + batch.prefix}
        tally.floor(**whole, forwards=2 + len(masks))
    return tally.plan(method, n=bound.n)


def live_layers(graph: Graph, mask: Tensor) -> tuple[int, int] | None:
    """(layers whose attention runs, layers whose MLP runs) of a pruned circuit; None where nothing need run."""
    if not bool(mask[:, -1].any()):
        return None
    heads = sum(bool(mask[:, graph.attention_readers_at(layer)].any()) for layer in range(graph.n_layers))
    return heads, sum(bool(mask[:, graph.mlp_reader_at(layer)].any()) for layer in range(graph.n_layers))


@plans.register("faithfulness")
def _plan_faithfulness(
    model: "Model",
    behavior: "Behavior",
    *,
    circuits: Circuit | Sequence[Circuit],
    metric: str = "logit_diff",
    memory_mb: float | None = None,
) -> Plan:
    given = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    return _evaluation("faithfulness", model, behavior, [one.mask for one in given], metric, memory_mb)


@plans.register("curve")
def _plan_curve(
    model: "Model",
    behavior: "Behavior",
    *,
    scores: AttributionResult,
    metric: str = "logit_diff",
    fractions: Sequence[float] = FRACTIONS,
    rank: Rank = "abs",
    how: Literal["topn", "greedy"] = "topn",
    memory_mb: float | None = None,
) -> Plan:
    masks = [select(scores.graph, scores.scores, fraction=f, rank=rank, how=how) for f in fractions]
    return _evaluation("curve", model, behavior, masks, metric, memory_mb)

"""AtP*: attribution patching mended where it is known to miss nodes, and a bound on what it still misses."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from headwater.behavior.metrics import interval
from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance
from headwater.localize.attribution.attention_nodes import AttentionNodes
from headwater.localize.attribution.eap import LOWER_IS_BETTER, AttributionResult, configured
from headwater.localize.attribution.missed import Item, as_nodes, bound_missed, random_sets
from headwater.localize.catalog import methods
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    Scored,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.engine.places import Positions, check_positions, in_order

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_PART = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True, kw_only=True)
class GradDropConfig:
    """metric: what is differentiated. positions: "all" (a node at all of them), "named" (the behavior's named
    positions, and the rest as `other`), or "each". memory_mb, reuse_prefix: as for EAP.
    """

    metric: str = "logit_diff"
    positions: Positions = "all"
    memory_mb: float | None = None
    reuse_prefix: bool = True


@dataclass(frozen=True, kw_only=True)
class AtpStarConfig(GradDropConfig):
    """verify: how many of the best nodes are patched for real. subsets: how many random sets of the others are, to
    bound what was missed (0: none; an even number from 4 on). confidence: that of the bound. seed: of the random sets.

    grad_drop: average sizes over passes back with one layer's gradient dropped each, half a backward pass a layer.
    """

    verify: int = 10
    subsets: int = 30
    confidence: float = 0.95
    seed: int = 0
    grad_drop: bool = True


@methods.register("atp_star")
def atp_star(
    model: "Model", behavior: "Behavior", *, config: AtpStarConfig | None = None, **options: Any
) -> AttributionResult:
    """AtP* (Kramár et al., 2024): attribution patching of every query, key, value, head and MLP, with two mends and a
    bound on what it misses.

    Queries and keys are not scored by the softmax's gradient, which vanishes where attention is saturated: attention is
    computed again with the counterfactual's queries (or keys), and only what follows is taken to first order. GradDrop:
    a node's size is the mean |score| of single pairs over passes back in each of which one layer's contribution to the
    gradient is dropped, so that direct and indirect effects cannot cancel in all of them.

    `tables["nodes"]`: node, part, layer, score, estimate[, position]. |score| is the size that nodes are ranked by; its
    sign is that of `estimate`, the first-order fall of the metric when the node carries its counterfactual value (mean
    over pairs). `tables["verified"]`: node, layer, estimate, size, effect, lo, hi, effect_size[, position] of the
    `verify` best nodes, patched for real (effect: mean fall; effect_size: mean |fall|). `tables["missed"]`: node,
    layer, estimate, limit[, position] of the others from `subsets` random sets of them; facts["bound"] is the largest
    limit: with `confidence`, no other node's mean effect is larger, if nodes among random others do on average what
    they do alone. Costs two forwards, half a backward a layer, and one partial forward a node verified or set. Options
    are those of `AtpStarConfig`. Known failure: what a node does through a saturated softmax or gate further up is
    still taken to first order, the bound says nothing of nodes that act only together, and with `grad_drop` a node
    whose every way to the metric leads through each later layer has size 0 (it may still be in `missed`).

    Raises ModelError for a model without a circuit graph, MethodError for a metric without gradient.
    """
    used = configured(AtpStarConfig, config, options)
    if used.verify < 0 or used.subsets < 0 or used.subsets in (1, 2, 3) or used.subsets % 2:
        raise MethodError(
            "atp_star cannot verify so",
            got=f"verify={used.verify}, subsets={used.subsets}",
            wanted="verify from 0 on, subsets 0 or an even number from 4 on",
        )
    if not 0 < used.confidence < 1:
        raise MethodError("a confidence lies between 0 and 1", got=used.confidence)
    return score_attention_nodes("atp_star", model, behavior, used, fix=True, drop=used.grad_drop, star=used)


def score_attention_nodes(
    method: str,
    model: "Model",
    behavior: "Behavior",
    config: GradDropConfig,
    *,
    fix: bool,
    drop: bool,
    star: AtpStarConfig | None = None,
) -> AttributionResult:
    """What methods that score the nodes inside attention do around their passes. star: what is verified after."""
    if config.metric == "kl":
        raise MethodError(
            f"the gradient of KL is zero on the clean run, where {method} takes it", wanted="logit_diff or prob_diff"
        )
    started = time.monotonic()
    check_positions(config.positions)
    engine, pairs = Engine(model), for_discovery(behavior)
    metric = Scored.named(config.metric, differentiable=True)
    bound, graph = pairs.bind(model), engine.wiring.graph
    reuse = config.reuse_prefix and can_reuse_prefix(engine)
    at_once = tokens_at_once(model, graph.d_model * 40 * graph.n_layers, config.memory_mb)
    batches = make_batches(bound, at_once, reuse_prefix=reuse)
    scorer = AttentionNodes(engine, metric, positions=config.positions, fix=fix)
    sums: dict[str, Tensor] = {}
    clean: list[Tensor] = []
    corrupt: list[Tensor] = []
    for batch in track(batches, method):
        places, scores, sizes, *values = scorer.scores(batch, drop=drop)
        clean.append(values[0])
        corrupt.append(values[1])
        both = torch.stack([scores.sum(dim=2), sizes.sum(dim=2)])
        for place, name in enumerate(places.names):
            sums[name] = sums.get(name, torch.zeros(2, len(scorer.names), dtype=torch.float64)) + both[:, :, place]
    sign = -1.0 if config.metric in LOWER_IS_BETTER else 1.0
    names = in_order(sums)
    estimates, sizes = torch.stack([sums[name] for name in names], dim=2) / bound.n  # [U, places] each
    estimates = estimates * sign
    ranked = torch.where(estimates < 0, -sizes, sizes)
    table = _table(scorer, names, {"score": ranked, "estimate": estimates}, config.positions)
    facts: dict[str, Any] = {
        "method": method,
        "metric": config.metric,
        "n": bound.n,
        "clean": float(torch.cat(clean).mean()),
        "corrupt": float(torch.cat(corrupt).mean()),
        "graph": graph.to_dict(),
    }
    tables = {"nodes": table}
    tensors = {"node_scores": ranked.squeeze(1), "estimates": estimates.squeeze(1)}
    if config.positions != "all":
        facts["positions"] = names
    if star is not None and (star.verify or star.subsets):
        _verify(scorer, batches, names, estimates, sizes, star, sign, tables, facts)
    result = AttributionResult(
        tables=tables,
        tensors=tensors,
        facts=facts,
        config={"method": method, **asdict(config)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)


def _part(name: str) -> str:
    if name.endswith(">"):
        return _PART[name[-2]]
    return "input" if name == "input" else "mlp" if name.startswith("m") else "head"


def _table(scorer: AttentionNodes, names: list[str], columns: dict[str, Tensor], positions: Positions) -> pl.DataFrame:
    parts = []
    for place, name in enumerate(names):
        data: dict[str, Any] = {
            "node": scorer.names,
            "part": [_part(node) for node in scorer.names],
            "layer": [scorer.graph.layer_of(node) for node in scorer.names],
        }
        data |= {column: values[:, place].tolist() for column, values in columns.items()}
        frame = pl.DataFrame(data)
        parts.append(frame if positions == "all" else frame.with_columns(position=pl.lit(name)))
    return pl.concat(parts)


def _verify(
    scorer: AttentionNodes,
    batches: list[Batch],
    names: list[str],
    estimates: Tensor,
    sizes: Tensor,
    star: AtpStarConfig,
    sign: float,
    tables: dict[str, pl.DataFrame],
    facts: dict[str, Any],
) -> None:
    """Patch the best nodes one by one, and random sets of the others."""
    n_nodes, n_places = sizes.shape
    order = sizes.flatten().argsort(descending=True, stable=True).tolist()
    items: list[Item] = [(i // n_places, i % n_places) for i in order]
    best, rest = items[: star.verify], items[star.verify :]
    sets = random_sets(len(rest), star.subsets, star.seed) if star.subsets and rest else torch.zeros(0, len(rest))
    chosen = [as_nodes([item], n_nodes, n_places) for item in best]
    chosen += [as_nodes([rest[i] for i in row.nonzero().flatten().tolist()], n_nodes, n_places) for row in sets]
    falls = []
    for batch in track(batches, "atp_star: patching"):
        clean, patched = scorer.patched(batch, names, chosen)
        falls.append((clean - patched) * sign)
    fall = torch.cat(falls, dim=1)  # [best, then sets; n]

    def row(item: Item, **values: float | None) -> dict[str, Any]:
        node, place = item
        at = {} if star.positions == "all" else {"position": names[place]}
        return {"node": scorer.names[node], "layer": scorer.graph.layer_of(scorer.names[node])} | values | at

    if best:
        rows = []
        for item, own in zip(best, fall, strict=False):
            effect, lo, hi = interval(own.numpy())
            rows.append(
                row(
                    item,
                    estimate=float(estimates[item]),
                    size=float(sizes[item]),
                    effect=effect,
                    lo=lo,
                    hi=hi,
                    effect_size=float(own.abs().mean()),
                )
            )
        tables["verified"] = pl.DataFrame(rows)
    if len(sets):
        missed = bound_missed(sets, fall[len(best) :].mean(dim=1), star.confidence)
        rows = [
            row(item, estimate=float(a), limit=float(b))
            for item, a, b in zip(rest, missed.estimates, missed.limits, strict=True)
        ]
        tables["missed"] = pl.DataFrame(rows).sort("limit", descending=True)
        facts |= {"bound": missed.bound, "confidence": star.confidence}

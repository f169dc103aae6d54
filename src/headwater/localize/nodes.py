"""Attribution patching of nodes (AtP): what each head and MLP is worth to first order, from two forwards and one
backward.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.progress import track
from headwater.core.results import Provenance
from headwater.localize.attribution import LOWER_IS_BETTER, AttributionResult, configured, node_table
from headwater.localize.catalog import methods
from headwater.localize.edges import head_values, post_norm_constant
from headwater.localize.hooks import on_input, on_output, on_port
from headwater.localize.passes import (
    Batch,
    Engine,
    Scored,
    Seen,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Positions = Literal["all", "named", "each"]


@dataclass(frozen=True, kw_only=True)
class AtpConfig:
    """metric: what is differentiated. positions: "all" (summed), "named" (the behavior's named positions, and the rest
    as `other`), or "each" (counted from the end: -1 is where the answer is read). memory_mb, reuse_prefix: as for EAP.
    """

    metric: str = "logit_diff"
    positions: Positions = "all"
    memory_mb: float | None = None
    reuse_prefix: bool = True


@methods.register("atp")
def atp(model: "Model", behavior: "Behavior", *, config: AtpConfig | None = None, **options: Any) -> AttributionResult:
    """Attribution patching (Nanda, 2023): for each node, (its write on the prompt - on the counterfactual) . the
    metric's gradient at the stream it writes to, on the prompt; summed over positions, mean over pairs.

    A node's score equals the sum of its edges' EAP scores. It estimates how much the metric falls when the node
    carries its counterfactual value. Scored on `behavior.train` where there is a split. With `positions`,
    `tables["nodes"]` has a column `position` and `tensors["positions"]` the scores. Options are those of `AtpConfig`.
    Known failure: saturated attention and cancellation between direct and indirect effects give false negatives;
    confirm by `patch`.

    Raises ModelError for a model without a circuit graph, MethodError for a metric without gradient.
    """
    used = configured(AtpConfig, config, options)
    if used.positions not in ("all", "named", "each"):
        wanted = did_you_mean(str(used.positions), ["all", "named", "each"])
        raise MethodError("unknown choice of positions", got=repr(used.positions), wanted=wanted)
    if used.metric == "kl":
        raise MethodError(
            "the gradient of KL is zero on the clean run, where AtP takes it", wanted="logit_diff or prob_diff"
        )
    started = time.monotonic()
    metric = Scored.named(used.metric, differentiable=True)
    engine = Engine(model)
    graph = engine.wiring.graph
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    reuse = used.reuse_prefix and can_reuse_prefix(engine)
    at_once = tokens_at_once(model, graph.d_model * 30 * graph.n_layers, used.memory_mb)
    batches = make_batches(bound, at_once, reuse_prefix=reuse)
    scorer = _NodeScorer(engine, metric)
    total = torch.zeros(len(graph.sources), dtype=torch.float64)
    places: dict[str, Tensor] = {}
    for batch in track(batches, "atp"):
        scores = scorer.scores(batch)
        total += scores.sum(dim=(1, 2))
        for name, part in _by_position(scores, batch, used.positions).items():
            places[name] = places.get(name, torch.zeros_like(total)) + part
    sign = (-1.0 if used.metric in LOWER_IS_BETTER else 1.0) / bound.n
    tensors = {"node_scores": total * sign}
    table = node_table(graph, total * sign)
    if used.positions != "all":
        names = sorted(
            places, key=lambda name: (not name.lstrip("-").isdigit(), int(name) if name.lstrip("-").isdigit() else 0)
        )
        tensors["positions"] = torch.stack([places[name] * sign for name in names], dim=1)
        rows = [
            node_table(graph, tensors["positions"][:, i]).with_columns(position=pl.lit(n)) for i, n in enumerate(names)
        ]
        table = pl.concat(rows)
    facts = {
        "method": "atp",
        "metric": used.metric,
        "n": bound.n,
        "clean": scorer.mean(scorer.clean),
        "corrupt": scorer.mean(scorer.corrupt),
        "graph": graph.to_dict(),
    }
    result = AttributionResult(
        tables={"nodes": table},
        tensors=tensors,
        facts=facts,
        config={"method": "atp", **asdict(used)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)


def _by_position(scores: Tensor, batch: Batch, positions: Positions) -> dict[str, Tensor]:
    """Position -> [sources]: the scores [sources, B, T] of a batch summed by position. The prefix's are 0."""
    if positions == "all":
        return {}
    steps = scores.shape[2]
    if positions == "each":
        return {str(t - steps): scores[:, :, t].sum(dim=1) for t in range(steps)}
    left = torch.ones(scores.shape[1:], dtype=torch.bool)
    out: dict[str, Tensor] = {}
    for name, index in batch.positions.items():
        here = torch.zeros_like(left)
        inside = index >= batch.prefix
        here[inside.nonzero().flatten(), (index - batch.prefix)[inside]] = True
        out[name] = (scores * here).sum(dim=(1, 2))
        left &= ~here
    return out | {"other": (scores * left).sum(dim=(1, 2))}


class _NodeScorer:
    def __init__(self, engine: Engine, metric: Scored) -> None:
        self.engine, self.metric = engine, metric
        self.graph, self.layers = engine.wiring.graph, engine.wiring.layers
        self.clean: list[Tensor] = []
        self.corrupt: list[Tensor] = []

    @staticmethod
    def mean(values: list[Tensor]) -> float:
        return float(torch.cat(values).double().mean())

    def scores(self, batch: Batch) -> Tensor:
        """[sources, B, T] float64: every node's score by pair and position (those after the prefix)."""
        engine, work = self.engine, self.engine.work
        with engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, engine, batch)
            past = engine.prefix_cache(batch)
            corrupt = engine.run(batch.corrupt[:, batch.prefix :], past)
            clean, writes = self._recorded(batch.clean[:, batch.prefix :], past)
            assert clean.logits is not None
            reference = clean.logits.detach()
            with torch.enable_grad():
                value = self.metric(batch, clean.logits, reference)
                gradients = torch.autograd.grad(value.sum(), writes)
            self.clean.append(value.detach())
            self.corrupt.append(self.metric(batch, corrupt.logits, reference))  # type: ignore[arg-type]
            assert clean.embed is not None and corrupt.embed is not None
            shape = clean.embed.shape[:2]
            rows = [((clean.embed - corrupt.embed) * gradients[0]).sum(dim=-1)[None]]
            for index, layer in enumerate(self.layers):
                at_attention, at_mlp = gradients[1 + 2 * index : 3 + 2 * index]
                g = _flat(at_attention).to(work)
                values = head_values(layer, clean, index, work) - head_values(layer, corrupt, index, work)
                weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach().to(work))
                heads = (values * torch.matmul(g, weight.transpose(1, 2))).sum(dim=-1)
                constant = post_norm_constant(layer, clean, corrupt, index, work)
                if constant is not None:
                    heads += (constant * g).sum(dim=-1) / (self.graph.n_heads * layer.attention.write.scale)
                mlp = ((_flat(clean.mlp_out[index]) - _flat(corrupt.mlp_out[index])) * _flat(at_mlp)).sum(dim=-1)
                rows += [heads.view(-1, *shape), mlp.view(1, *shape)]
            return torch.cat([row.double().cpu() for row in rows])

    def _recorded(self, ids: Tensor, past: Any) -> tuple[Seen, list[Tensor]]:
        """The clean pass under autograd, and the tensors that nodes add to the stream: input, then each layer's two."""
        seen, writes = Seen(), []
        with ExitStack() as stack, torch.enable_grad():

            def enter(x: Tensor) -> Tensor:
                writes.append(x.detach().requires_grad_(True))
                seen.embed = x.detach()
                return writes[-1]

            on_port(stack, self.layers[0].block.input, enter)
            for layer in self.layers:
                stack.callback(on_input(layer.attention.out_proj, lambda z: seen.z.append(z.detach())).remove)
                if layer.post_norm.module is not None:
                    on_output(stack, layer.attention.out_proj, lambda y: seen.mixed.append(y.detach()))
                on_port(stack, layer.attention.write.port, lambda y: writes.append(y))
                on_port(
                    stack,
                    layer.mlp.write.port,
                    lambda y: (writes.append(y), seen.mlp_out.append(y.detach()))[2:] or None,
                )
            seen.logits = self.engine.forward(ids, past)
        return seen, writes


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

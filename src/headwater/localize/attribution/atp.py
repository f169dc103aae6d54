"""Attribution patching of nodes (AtP): what each head and MLP is worth to first order, from two forwards and one
backward.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance
from headwater.localize.attribution.eap import LOWER_IS_BETTER, AttributionResult, configured, node_table
from headwater.localize.catalog import methods
from headwater.localize.engine.hooks import on_input, on_output, on_port
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    Scored,
    Seen,
    can_narrow,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.engine.places import Positions, check_positions, in_order, places_of
from headwater.localize.engine.writes import (
    Against,
    Fixed,
    Other,
    check_against,
    constant_differences,
    embed_differences,
    fixed_values,
    head_differences,
    mlp_differences,
    neuron_differences,
)

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class AtpConfig:
    """metric: what is differentiated. positions: "all" (summed), "named" (the behavior's named positions, and the rest
    as `other`), or "each" (counted from the end: -1 is where the answer is read). against, memory_mb, reuse_prefix: as
    for EAP. neurons: score each neuron of each MLP too.
    """

    metric: str = "logit_diff"
    positions: Positions = "all"
    against: Against = "counterfactual"
    neurons: bool = False
    memory_mb: float | None = None
    reuse_prefix: bool = True


@methods.register("atp")
def atp(model: "Model", behavior: "Behavior", *, config: AtpConfig | None = None, **options: Any) -> AttributionResult:
    """Attribution patching (Nanda, 2023): for each node, (its write on the prompt - on the counterfactual) . the
    metric's gradient at the stream it writes to, on the prompt; summed over positions, mean over pairs.

    A node's score equals the sum of its edges' EAP scores. It estimates how much the metric falls when the node
    carries its counterfactual value. Scored on `behavior.train` where there is a split. With `positions`,
    `tables["nodes"]` has a column `position` and `tensors["positions"]` the scores. With `neurons`,
    `tables["neurons"]` has layer, neuron, score, the strongest first, and `tensors["neurons"]` [layers, M] the scores.
    Options are those of `AtpConfig`. Known failure: saturated attention and cancellation between direct and indirect
    effects give false negatives; see `atp_star`, and confirm by `patch`.

    Raises ModelError for a model without a circuit graph, or without neurons where they are asked for (experts),
    MethodError for a metric without gradient.
    """
    used = configured(AtpConfig, config, options)
    if used.metric == "kl":
        raise MethodError(
            "the gradient of KL is zero on the clean run, where AtP takes it", wanted="logit_diff or prob_diff"
        )
    return score_nodes("atp", model, behavior, used, [(1.0, 1.0)])


def score_nodes(
    method: str,
    model: "Model",
    behavior: "Behavior",
    config: AtpConfig,
    nodes: Sequence[tuple[float, float]],
    *,
    scorer: "type[NodeScorer] | None" = None,
) -> AttributionResult:
    """What every method that scores nodes by writes does around its passes: batches, scores, tables and facts.

    nodes: (place between counterfactual and clean, weight) where gradients are taken.
    """
    started = time.monotonic()
    check_positions(config.positions)
    check_against(config.against)
    metric = Scored.named(config.metric, differentiable=True)
    engine = Engine(model)
    graph = engine.wiring.graph
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    at_once = tokens_at_once(model, graph.d_model * 30 * graph.n_layers, config.memory_mb)
    fixed = None
    if config.against != "counterfactual":
        whole = make_batches(bound, at_once, reuse_prefix=False)
        fixed = fixed_values(engine, whole, config.against, neurons=config.neurons)
    reuse = config.reuse_prefix and fixed is None and can_reuse_prefix(engine)
    run = (scorer or NodeScorer)(engine, metric, fixed=fixed, neurons=config.neurons)
    total = torch.zeros(len(graph.sources), dtype=torch.float64)
    places: dict[str, Tensor] = {}
    for batch in track(make_batches(bound, at_once, reuse_prefix=reuse), method):
        scores = run.scores(batch, nodes)
        total += scores.sum(dim=(1, 2))
        if config.positions != "all":
            for name, part in places_of(batch, config.positions).sums(scores).items():
                places[name] = places.get(name, torch.zeros_like(total)) + part
    sign = (-1.0 if config.metric in LOWER_IS_BETTER else 1.0) / bound.n
    tensors = {"node_scores": total * sign}
    tables = {"nodes": node_table(graph, total * sign)}
    if config.positions != "all":
        names = in_order(places)
        tensors["positions"] = torch.stack([places[name] * sign for name in names], dim=1)
        rows = [
            node_table(graph, tensors["positions"][:, i]).with_columns(position=pl.lit(n)) for i, n in enumerate(names)
        ]
        tables["nodes"] = pl.concat(rows)
    if config.neurons:
        tensors["neurons"] = run.neurons * sign
        tables["neurons"] = _neuron_table(tensors["neurons"])
    facts = {
        "method": method,
        "metric": config.metric,
        "n": bound.n,
        "clean": run.mean_clean,
        "corrupt": run.mean_corrupt,
        "graph": graph.to_dict(),
    }
    result = AttributionResult(
        tables=tables,
        tensors=tensors,
        facts=facts,
        config={"method": method, **asdict(config)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)


def _neuron_table(scores: Tensor) -> pl.DataFrame:
    """layer, neuron, score of all neurons [L, M], the largest |score| first."""
    order = scores.abs().flatten().argsort(descending=True, stable=True)
    layer, neuron = order // scores.shape[1], order % scores.shape[1]
    columns = {"layer": layer.tolist(), "neuron": neuron.tolist(), "score": scores.flatten()[order].tolist()}
    return pl.DataFrame(columns)


class NodeScorer:
    """Scores of sources by batch, from what they write and the gradient at what they write to.

    fixed: what writes are compared with in place of the counterfactual's. neurons: also sum the neurons' scores into
    `neurons` [layers, M].
    """

    def __init__(self, engine: Engine, metric: Scored, *, fixed: Fixed | None = None, neurons: bool = False) -> None:
        self.engine, self.metric, self.fixed = engine, metric, fixed
        self.graph, self.layers = engine.wiring.graph, engine.wiring.layers
        self.with_neurons = neurons
        self.narrows = can_narrow(engine)
        self.neurons = torch.zeros(0, dtype=torch.float64)
        self._clean: list[Tensor] = []
        self._corrupt: list[Tensor] = []

    @property
    def mean_clean(self) -> float:
        """The metric's mean on the prompts seen so far."""
        return float(torch.cat(self._clean).double().mean())

    @property
    def mean_corrupt(self) -> float | None:
        """The metric's mean on their counterfactuals; None where these were not run."""
        return float(torch.cat(self._corrupt).double().mean()) if self._corrupt else None

    def scores(self, batch: Batch, nodes: Sequence[tuple[float, float]] = ((1.0, 1.0),)) -> Tensor:
        """[sources, B, T] float64: every node's score by pair and position (those after the prefix)."""
        with self.engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, self.engine, batch)
            past = self.engine.prefix_cache(batch)
            clean, other, gradients = self._run(batch, past, dict(nodes))
            return self._contract(clean, other, gradients)

    def _run(self, batch: Batch, past: Any, at: dict[float, float]) -> tuple[Seen, Other, list[Tensor]]:
        """The clean run, what it is compared with, and the gradients at all writes averaged over the places `at`."""
        clean_ids, corrupt_ids = batch.clean[:, batch.prefix :], batch.corrupt[:, batch.prefix :]
        clean, writes = self._pass(clean_ids, past, recorded=1.0 in at)
        assert clean.logits is not None and clean.embed is not None
        reference = clean.logits.detach()
        self._clean.append(self.metric(batch, reference, reference))
        held: list[Tensor] = []
        if 1.0 in at:
            self._hold(held, self._gradients(batch, clean, writes, reference), at[1.0])
        if self.fixed is not None:
            return clean, self.fixed, held
        corrupt, writes = self._pass(corrupt_ids, past, recorded=0.0 in at)
        assert corrupt.logits is not None and corrupt.embed is not None
        self._corrupt.append(self.metric(batch, corrupt.logits.detach(), reference))
        if 0.0 in at:
            self._hold(held, self._gradients(batch, corrupt, writes, reference), at[0.0])
        for place, weight in at.items():
            if place not in (0.0, 1.0):
                start = corrupt.embed + place * (clean.embed - corrupt.embed)
                seen, writes = self._pass(clean_ids, past, recorded=True, start=start)
                self._hold(held, self._gradients(batch, seen, writes, reference), weight)
        return clean, corrupt, held

    @staticmethod
    def _hold(held: list[Tensor], gradients: Sequence[Tensor], weight: float) -> None:
        if not held:
            held.extend(g * weight for g in gradients)
            return
        for own, g in zip(held, gradients, strict=True):
            own.add_(g, alpha=weight)

    def _gradients(self, batch: Batch, seen: Seen, writes: list[Tensor], reference: Tensor) -> tuple[Tensor, ...]:
        assert seen.logits is not None
        with torch.enable_grad():
            value = self.metric(batch, seen.logits, reference).sum()
        found = torch.autograd.grad(value, writes)
        seen.logits = seen.logits.detach()
        return found

    def _pass(
        self, ids: Tensor, past: Any, *, recorded: bool, start: Tensor | None = None
    ) -> tuple[Seen, list[Tensor]]:
        """A pass, and the tensors of it that nodes add to the stream (input, then each layer's two), then neurons."""
        seen = Seen()
        entered: list[Tensor] = []
        attention: list[Tensor] = []
        mlps: list[Tensor] = []
        neurons: list[Tensor] = []
        with ExitStack() as stack, torch.set_grad_enabled(recorded):
            if self.narrows:
                self.engine.narrow(stack)

            def enter(x: Tensor) -> Tensor | None:
                x = x if start is None else start
                seen.embed = x.detach()
                if not recorded:
                    return x
                entered.append(x.detach().requires_grad_(True))
                return entered[-1]

            def mlp(y: Tensor) -> None:
                mlps.append(y)
                seen.mlp_out.append(y.detach())

            def neuron(x: Tensor) -> None:
                neurons.append(x)
                seen.neurons.append(x.detach())

            on_port(stack, self.layers[0].block.input, enter)
            for layer in self.layers:
                stack.callback(on_input(layer.attention.out_proj, lambda z: seen.z.append(z.detach())).remove)
                if layer.post_norm.module is not None:
                    on_output(stack, layer.attention.out_proj, lambda y: seen.mixed.append(y.detach()))
                on_port(stack, layer.attention.write.port, lambda y: attention.append(y))
                on_port(stack, layer.mlp.write.port, mlp)
            if self.with_neurons:
                self.engine.watch_neurons(stack, neuron)
            seen.logits = self.engine.forward(ids, past)
        if not recorded:
            return seen, []
        writes = [write for both in zip(attention, mlps, strict=True) for write in both]
        return seen, [*entered, *writes, *neurons]

    def _contract(self, clean: Seen, other: Other, gradients: list[Tensor]) -> Tensor:
        """[sources, B, T] float64; adds to `neurons`."""
        assert clean.embed is not None
        work, shape = self.engine.work, clean.embed.shape[:2]
        rows = [(embed_differences(clean, other, work) * _flat(gradients[0])).sum(dim=-1).view(1, *shape)]
        for index, layer in enumerate(self.layers):
            at_attention, at_mlp = gradients[1 + 2 * index : 3 + 2 * index]
            g = _flat(at_attention).to(work)
            values = head_differences(layer, clean, other, index, work)
            weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach().to(work))
            heads = (values * torch.matmul(g, weight.transpose(1, 2))).sum(dim=-1)
            constant = constant_differences(layer, clean, other, index, work)
            if constant is not None:
                heads += (constant * g).sum(dim=-1) / (self.graph.n_heads * layer.attention.write.scale)
            mlp = (mlp_differences(clean, other, index, work) * _flat(at_mlp).to(work)).sum(dim=-1)
            rows += [self._placed(heads, shape), self._placed(mlp[None], shape)]
        if self.with_neurons:
            found = []
            for index, g in enumerate(gradients[1 + 2 * len(self.layers) :]):
                found.append((neuron_differences(clean, other, index) * _flat(g)).sum(dim=0).double().cpu())
            whole = torch.stack(found)
            self.neurons = whole if self.neurons.numel() == 0 else self.neurons + whole
        return torch.cat([row.double().cpu() for row in rows])

    @staticmethod
    def _placed(scores: Tensor, shape: torch.Size) -> Tensor:
        """[..., B, T] of scores [..., N]; of those at the last position only, with zeros before."""
        size, steps = shape
        if scores.shape[-1] == size * steps:
            return scores.view(-1, size, steps)
        out = scores.new_zeros(len(scores), size, steps)
        out[:, :, -1] = scores
        return out


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

"""Optimal ablation: the constant that costs least in a node's place, and what it still costs."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.attribution.eap import configured
from headwater.localize.catalog import methods
from headwater.localize.circuit import Circuit
from headwater.localize.engine.ablation import Ablation, Constants, means
from headwater.localize.engine.evaluate import Reference
from headwater.localize.engine.hooks import on_port, replace_forward
from headwater.localize.engine.live import repeated
from headwater.localize.engine.passes import Scored, for_discovery
from headwater.localize.engine.soft import soft_logits
from headwater.localize.graph import Graph
from headwater.localize.search.searching import Trials
from headwater.localize.selection import prune

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class OptimalAblationConfig:
    """steps: of gradient descent (Adam, on all pairs). learning_rate: in units of how large the node's writes are.

    metric: the loss, "kl" (from the model's own output) or one that should not get worse. side_by_side: heads of a
    layer learned at once. memory_mb: what a batch may take (None: .4 of what the weights take, at least 96).
    """

    steps: int = 50
    learning_rate: float = 0.1
    metric: str = "kl"
    side_by_side: int = 16
    memory_mb: float | None = None


@register_result
class OptimalAblationResult(Result):
    """`tables["nodes"]`: node, layer, gap (the loss with the node's best constant in place of its writes, over the
    model's), mean_gap (the same with its mean). With a circuit: one row `outside`, of all constants together.

    tensors: the constants (`input`, `heads` [L, H, 1, K], `mlps` [L, 1, D]). `ablation` is what circuits are judged by:
    `circuit.faithfulness(behavior, ablation=result)`. facts: method, metric, full (the model's loss), n, passes.
    """

    kind: ClassVar[str] = "optimal_ablation"
    main: ClassVar[str] = "nodes"

    @property
    def graph(self) -> Graph:
        return Graph(**self.facts["graph"])

    @property
    def ablation(self) -> Ablation:
        """Edges outside a circuit carry these constants."""
        return Ablation(kind="optimal", constants=Constants.from_tensors(self.tensors))

    def top(self, n: int = 10) -> pl.DataFrame:
        """The `n` nodes whose best constant costs most."""
        return self.tables["nodes"].sort("gap", descending=True, nulls_last=True).head(n)


@methods.register("optimal_ablation")
def optimal_ablation(
    model: "Model",
    behavior: "Behavior",
    *,
    circuit: Circuit | None = None,
    config: OptimalAblationConfig | None = None,
    **options: Any,
) -> OptimalAblationResult:
    """Optimal ablation (Li & Janson, 2024): the constant, the same for all pairs and positions, that costs least when
    it stands in place of what a node writes; the loss that is left is what the node's information is worth.

    Without a circuit, each head and MLP is ablated by itself in the whole model. With one, the constants of all nodes
    are learned together for what edges outside that circuit carry. Both start at the mean over prompts and keep the
    best constants seen, so that they never cost more than the mean on the pairs they were learned on. Learned on
    `behavior.train` where there is a split. Options are those of `OptimalAblationConfig`. Known failure: few pairs can
    be overfitted, and a constant may steer the model rather than take information away; judge on other pairs.

    Raises ModelError for a model without a circuit graph, MethodError for a metric without gradient.
    """
    used = configured(OptimalAblationConfig, config, options)
    Scored.named(used.metric, differentiable=True)
    if used.steps < 0 or used.learning_rate <= 0 or used.side_by_side < 1:
        raise MethodError(
            "learning constants needs steps, a rate above 0 and a node at a time",
            got=f"steps={used.steps}, learning_rate={used.learning_rate}, side_by_side={used.side_by_side}",
        )
    started = time.monotonic()
    pairs = for_discovery(behavior)
    trials = Trials(model, pairs.bind(model), used.metric, Ablation(), used.memory_mb)
    trials.forward += trials.n
    learner = _Learner(trials, used)
    rows = learner.together(circuit) if circuit is not None else learner.apart()
    schema = {"node": pl.String, "layer": pl.Int64, "gap": pl.Float64, "mean_gap": pl.Float64}
    return OptimalAblationResult(
        tables={"nodes": pl.DataFrame(rows, schema=schema, orient="row")},
        tensors={name: value.contiguous() for name, value in learner.constants.tensors().items()},
        facts={
            "method": "optimal_ablation",
            "metric": used.metric,
            "full": trials.full,
            "n": trials.n,
            "circuit_edges": None if circuit is None else circuit.n_edges,
            "passes": {"forward": trials.forward, "backward": learner.backward},
            "graph": trials.graph.to_dict(),
        },
        config={"method": "optimal_ablation", **asdict(used)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )


Row = tuple[str, int | None, float, float]


class _Learner:
    def __init__(self, trials: Trials, config: OptimalAblationConfig) -> None:
        self.trials, self.config, self.graph = trials, config, trials.graph
        self.layers = trials.engine.wiring.layers
        start = means(trials.engine, trials.batches, "prompt", positional=False)[0]
        self.constants = start
        self.backward = 0.0

    # --- each node by itself

    def apart(self) -> list[Row]:
        """Every head and MLP in the whole model. Fills `constants`."""
        trials, graph = self.trials, self.graph
        clean = []
        for batch in trials.batches:
            with trials.engine.open(), ExitStack() as stack:
                trials.scored.narrowed(stack, trials.engine, batch)
                clean.append(Reference.of_run(trials.runner, batch.clean, None))
        trials.forward += trials.n
        rows: list[Row] = []
        heads, mlps = [x.clone() for x in self.constants.heads], [x.clone() for x in self.constants.mlps]
        for index in track(range(graph.n_layers), "optimal ablation"):
            for at in range(0, graph.n_heads, self.config.side_by_side):
                own = list(range(graph.n_heads))[at : at + self.config.side_by_side]
                scale = torch.stack([_size(c.writes.heads[index][own]) for c in clean]).mean(dim=0)
                best, gaps, first = self._descend(
                    heads[index][own, 0], scale, index,
                    lambda c, n, stack, own=own, index=index: self._put_heads(stack, clean[n], index, own, c),
                    clean,
                )  # fmt: skip
                heads[index][own, 0] = best
                names = [graph.sources[graph.heads_at(index)][h] for h in own]
                rows += [(name, index, g, f) for name, g, f in zip(names, gaps, first, strict=True)]
            scale = torch.stack([_size(c.writes.mlps[index][None]) for c in clean]).mean(dim=0)
            best, gaps, first = self._descend(
                mlps[index], scale, index,
                lambda c, n, stack, index=index: self._put_mlp(stack, index, c), clean,
            )  # fmt: skip
            mlps[index] = best
            rows.append((graph.sources[graph.mlp_at(index)], index, gaps[0], first[0]))
        self.constants = Constants(self.constants.input, tuple(heads), tuple(mlps), self.constants.shared)
        return rows

    def _put_heads(self, stack: ExitStack, clean: Reference, index: int, heads: list[int], constants: Tensor) -> None:
        """In copy m of the batch, head m's write is its constant [M, K] through the output projection."""
        layer, weight = self.layers[index], self.trials.runner.out_weight(index)[heads]
        now = torch.einsum("mk,mkd->md", constants, weight)[:, None]
        shift = now - torch.bmm(clean.writes.heads[index][heads], weight)
        ours, usual = clean.writes.shared[index], self.constants.shared[index]
        if ours is not None and usual is not None:
            shift = shift + (usual - ours) / self.graph.n_heads
        shift = shift / layer.attention.write.scale
        on_port(stack, layer.attention.write.port, lambda y: y + shift.reshape(y.shape))

    def _put_mlp(self, stack: ExitStack, index: int, constant: Tensor) -> None:
        on_port(stack, self.layers[index].mlp.write.port, lambda y: constant[0].expand(y.shape))

    def _descend(
        self,
        start: Tensor,
        scale: Tensor,
        index: int,
        put: Callable[[Tensor, int, ExitStack], None],
        clean: list[Reference],
    ) -> tuple[Tensor, list[float], list[float]]:
        """(best constants [M, width], their gaps, the gaps at the start) of M nodes of a layer, learned side by
        side.
        """
        trials, copies = self.trials, len(start)

        def losses(constants: Tensor) -> Iterator[Tensor]:
            for number, batch in enumerate(trials.batches):
                with trials.engine.open(), ExitStack() as stack, torch.enable_grad():
                    read = trials.scored.narrowed(stack, trials.engine, batch)
                    for layer in self.layers[:index]:  # these run as in the model: they give what they gave
                        given = repeated(clean[number].outputs[layer.block.module], copies)
                        replace_forward(stack, layer.block.module, lambda *_, given=given, **__: given)
                    put(constants, number, stack)
                    logits = trials.engine.forward(batch.clean.repeat(copies, 1)).view(copies, len(batch), -1)
                    yield torch.stack([trials.scored(read, own, trials.clean[number]).sum() for own in logits])

        share = (self.graph.n_layers - index) / self.graph.n_layers * trials.n * copies
        return self._minimize(start, scale[:, None], losses, share)

    # --- all constants of a circuit

    def together(self, circuit: Circuit) -> list[Row]:
        """The constants of all nodes for what edges outside the circuit carry. Fills `constants`."""
        trials, graph = self.trials, self.graph
        if circuit.graph.to_dict() | {"d_model": 0} != graph.to_dict() | {"d_model": 0}:
            raise MethodError("this circuit is of another model", got=circuit.graph, wanted=graph)
        mask = prune(graph, circuit.mask)
        begin = self.constants
        flat = [begin.input, *begin.heads, *begin.mlps]
        shapes = [x.shape for x in flat]
        scales = [_size(trials.references[0].writes.input[None])]
        for values in trials.references[0].writes.heads:
            scales.append(_size(values))
        scales += [_size(values[None]) for values in trials.references[0].writes.mlps]
        scale = torch.cat(
            [s.view(-1, *[1] * (x.ndim - 1)).expand(x.shape).flatten() for s, x in zip(scales, flat, strict=True)]
        )

        def unpacked(vector: Tensor) -> Constants:
            parts = [p.view(shape) for p, shape in zip(vector.split([x.numel() for x in flat]), shapes, strict=True)]
            n = graph.n_layers
            return Constants(parts[0], tuple(parts[1 : 1 + n]), tuple(parts[1 + n :]), begin.shared)

        def losses(vector: Tensor) -> Iterator[Tensor]:
            constants = unpacked(vector[0])
            for number, batch in enumerate(trials.batches):
                with trials.engine.open(), ExitStack() as stack, torch.enable_grad():
                    read = trials.scored.narrowed(stack, trials.engine, batch)
                    reference = trials.references[number].shifted(constants, logits=False)
                    logits = soft_logits(reference, mask, trials.entered[number])
                    yield trials.scored(read, logits, trials.clean[number]).sum()[None]

        start = torch.cat([x.flatten() for x in flat])[None]
        best, gaps, first = self._minimize(start, scale[None], losses, float(trials.n), label="optimal ablation")
        self.constants = unpacked(best[0])
        return [("outside", None, gaps[0], first[0])]

    # --- descent

    def _minimize(
        self,
        start: Tensor,
        scale: Tensor,
        losses: Callable[[Tensor], Iterator[Tensor]],
        passes: float,
        label: str | None = None,
    ) -> tuple[Tensor, list[float], list[float]]:
        """The best of the constants [M, width] that Adam visits; each row's loss is its own."""
        trials = self.trials
        sign = 1.0 if trials.lower_is_better else -1.0
        moved = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([moved], lr=self.config.learning_rate)
        best, best_loss = start.clone(), torch.full((len(start),), torch.inf, dtype=torch.float64)
        first = best_loss
        steps = range(self.config.steps + 1)
        for step in track(steps, label) if label else steps:
            optimizer.zero_grad()
            constants = start + moved * scale
            leaf = constants.detach().requires_grad_(True)  # one graph a batch, not one over all of them
            total = torch.zeros(len(start), dtype=torch.float64)
            for loss in losses(leaf):
                if step < self.config.steps:
                    (sign * loss.sum() / trials.n).backward()
                total += sign * loss.detach().double().cpu() / trials.n
            first = total if step == 0 else first
            better = total < best_loss
            best[better] = leaf.detach()[better]
            best_loss = torch.where(better, total, best_loss)
            trials.forward += passes
            if step < self.config.steps:
                self.backward += passes
                constants.backward(leaf.grad)
                optimizer.step()
        return best, (best_loss - sign * trials.full).tolist(), (first - sign * trials.full).tolist()


def _size(x: Tensor) -> Tensor:
    """[M]: the root mean square of [M, N, width]; never 0."""
    return x.square().mean(dim=(1, 2)).sqrt().clamp(min=1e-6)

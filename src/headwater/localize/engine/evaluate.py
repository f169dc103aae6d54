"""Run a model with every edge outside a circuit carrying an ablated value.

Each reader reads the sum of all earlier sources' reference writes plus, for each of its edges in the circuit, what its
source writes more in this run than its reference. The reference is the counterfactual run unless another ablation is
asked for; its pass is made once for all circuits, and what a circuit does not change is not computed again (see
`live.py`). Circuits are pruned first: what is not
reached from the input carries its reference, and heads that lead nowhere do not share in the deviation of a norm after
the output projection (Gemma2).

Shapes: N = B T positions run, D width, A sources with an edge in the circuit, R readers of a layer with one, M circuits
run side by side.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from headwater.core.errors import ModelError
from headwater.core.session import Stopped
from headwater.localize.engine.ablation import Constants, Prepared, writes_of
from headwater.localize.engine.hooks import on_output, on_port
from headwater.localize.engine.live import Live
from headwater.localize.engine.passes import Batch, Engine, Scored, Seen, can_narrow, probe_ids
from headwater.localize.engine.positions import position_index, prune_positions
from headwater.localize.selection import prune


@dataclass(frozen=True, eq=False)
class BatchValues:
    """A metric on a batch: [B] for the model on the prompt, on the counterfactual, for the empty circuit (all edges
    ablated) and for each circuit.
    """

    clean: Tensor
    corrupt: Tensor
    circuits: list[Tensor]
    empty: Tensor


_checked: "WeakSet[nn.Module]" = WeakSet()


class CircuitRunner:
    """Evaluates circuits of one model on batches of pairs. `ablation`: what edges outside carry (the counterfactual's
    values unless given).
    """

    def __init__(self, engine: Engine, metric: Scored, ablation: Prepared | None = None) -> None:
        self.engine, self.metric, self.ablation = engine, metric, ablation
        self.graph, self.layers = engine.wiring.graph, engine.wiring.layers
        self.narrows = can_narrow(engine)
        self._written: dict[int, Tensor] = {}

    def check(self) -> None:
        """The whole graph must give the model's own logits: measured once a model.

        Raises ModelError where a model's blocks do something that the graph does not know of.
        """
        hf = self.engine.hf
        if hf not in _checked:
            ids, everything = probe_ids(self.engine, 5), self.graph.allowed
            with self.engine.open():
                logits, entered = self.clean(ids[:1], None)
                whole = Live(Reference.of_run(self, ids[1:], None), [everything], entered).run(ids[:1], None)
            error = float((whole - logits).norm() / logits.norm().clamp(min=1e-9))
            if not error <= {torch.float64: 1e-5, torch.float32: 1e-2}.get(logits.dtype, 0.2):
                raise ModelError(
                    f"{type(hf).__name__}: the whole graph does not give the model's own logits",
                    got=f"relative difference {error:.2g}",
                    fix="Patch its sites with model.run and interventions instead",
                )
            _checked.add(hf)

    def values(self, batch: Batch, masks: Sequence[Tensor], positions: Sequence[str] | None = None) -> BatchValues:
        """The metric of each circuit on each pair of the batch.

        A circuit is a mask [sources, readers], or [sources, readers, P] over `positions` (see `positions.py`).
        """
        engine = self.engine
        with engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, engine, batch)
            past = engine.prefix_cache(batch)
            reference, entered = self.clean(batch.clean[:, batch.prefix :], past)
            ablated = self.reference(batch, past)
            return BatchValues(
                self.metric(batch, reference, reference),
                self.metric(batch, ablated.counterfactual, reference),
                self._circuits(batch, past, masks, positions, ablated, entered, reference),
                self.metric(batch, ablated.logits, reference),
            )

    def circuits_only(
        self, batch: Batch, masks: Sequence[Tensor], positions: Sequence[str] | None = None
    ) -> list[Tensor]:
        """The metric [B] of each circuit alone; the model itself is run only where the metric reads it."""
        engine = self.engine
        with engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, engine, batch)
            past = engine.prefix_cache(batch)
            ids = batch.clean[:, batch.prefix :]
            reference, entered = (
                self.clean(ids, past) if self.metric.reads_reference else (None, self.entering(ids, past))
            )
            return self._circuits(batch, past, masks, positions, self.reference(batch, past), entered, reference)

    def _circuits(
        self,
        batch: Batch,
        past: Any,
        masks: Sequence[Tensor],
        positions: Sequence[str] | None,
        ablated: "Reference",
        entered: Tensor,
        reference: Tensor | None,
    ) -> list[Tensor]:
        found = []
        for mask in masks:
            if mask.ndim == 3:
                index = position_index(batch, positions or ())[:, batch.prefix :]
                live = Live(ablated, [prune_positions(self.graph, mask)], entered, index=index)
            else:
                live = Live(ablated, [prune(self.graph, mask)], entered)
            found.append(self.metric(batch, live.run(batch.clean[:, batch.prefix :], past), reference))
        return found

    def reference(self, batch: Batch, past: Any) -> "Reference":
        """What edges outside circuits carry on this batch. The metric must be narrowed, the engine open."""
        corrupt = batch.corrupt[:, batch.prefix :]
        if self.ablation is None or self.ablation.ablation.kind == "counterfactual":
            return Reference.of_run(self, corrupt, past)
        if self.ablation.constants is None:
            reference = Reference.of_run(self, self.ablation.ids(batch), past)
            reference.counterfactual = self.engine.forward(corrupt, past)
            return reference
        constants = self.ablation.constants_for(batch.corrupt.shape[1])
        if constants is None:
            raise ModelError("no mean was computed for prompts of this length", got=batch.corrupt.shape[1])
        return Reference.of_run(self, corrupt, past).shifted(constants)

    def clean(self, ids: Tensor, past: Any) -> tuple[Tensor, Tensor]:
        """(logits, stream that enters the first block) of the model itself."""
        entered: list[Tensor] = []
        with ExitStack() as stack:
            on_port(stack, self.layers[0].block.input, lambda x: entered.append(x))
            if self.narrows:
                self.engine.narrow(stack)
            return self.engine.forward(ids, past), entered[0]

    def entering(self, ids: Tensor, past: Any) -> Tensor:
        """The stream that enters the first block; no block is run."""
        entered: list[Tensor] = []

        def stop(x: Tensor) -> None:
            entered.append(x)
            raise Stopped

        with ExitStack() as stack, suppress(Stopped):
            on_port(stack, self.layers[0].block.input, stop)
            self.engine.forward(ids, past)
        return entered[0]

    def out_weight(self, index: int) -> Tensor:
        """[H, K, D]: from a head's values (as `head_values` scales them) to what it adds to the stream."""
        if index not in self._written:
            layer = self.layers[index]
            weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach())
            self._written[index] = (weight * layer.attention.write.scale).contiguous()
        return self._written[index]


class Reference:
    """What sources write and readers read where every edge is ablated, of one batch, kept for every circuit run on it.

    attn_stream, mlp_stream [B, T, D] a layer and final [B, D]: the sums of reference writes. writes: the writes
    themselves. made: what the projections give of them. outputs: whole outputs of modules, of which only the shape
    counts. logits [B, V]: of the empty circuit; counterfactual [B, V]: of the model on the counterfactual.
    """

    def __init__(self, runner: CircuitRunner, ids: Tensor, seen: Seen, writes: Constants, final: Tensor) -> None:
        assert seen.embed is not None and seen.logits is not None
        self.runner, self.engine, self.graph, self.layers = runner, runner.engine, runner.graph, runner.layers
        self.ids, self.writes, self.final = ids, writes, final
        self.shape = seen.embed.shape
        self.attn_stream, self.mlp_stream, self.made = seen.attn_stream, seen.mlp_stream, seen.made
        self.logits = self.counterfactual = seen.logits
        self.outputs: dict[nn.Module, Any] = {}

    @classmethod
    def of_run(cls, runner: CircuitRunner, ids: Tensor, past: Any) -> "Reference":
        """Every edge carries what its source writes when the model runs `ids` [B, T]."""
        seen, outputs = Seen(), dict[nn.Module, Any]()
        with ExitStack() as stack:
            runner.engine.watch(stack, seen, readers=True, gradients=False)
            for layer in runner.layers:
                for module in (layer.block.module, layer.attention.module, layer.mlp.entry.module):
                    on_output(stack, module, lambda y, module=module: outputs.__setitem__(module, y))
            seen.logits = runner.engine.forward(ids, past)
        assert seen.final is not None
        reference = cls(runner, ids, seen, writes_of(runner.engine, seen), seen.final[:, -1])
        reference.outputs = outputs
        return reference

    def shifted(self, constants: Constants, *, logits: bool = True) -> "Reference":
        """Every edge carries its source's constant: this run's streams moved by how the writes differ.

        Differentiable by the constants with `logits=False`, where the empty circuit is not run.
        """
        batch, steps, _ = self.shape
        writes = constants.map(lambda x: _tiled(x, batch, steps))
        seen = Seen(embed=writes.input.view(self.shape), logits=self.logits)
        shift = writes.input - self.writes.input
        for index, layer in enumerate(self.layers):
            by_heads = self._attention_shift(index, writes)
            seen.attn_stream.append(self.attn_stream[index] + shift.view(self.shape))
            read = shift if self.graph.parallel else shift + by_heads
            seen.mlp_stream.append(self.mlp_stream[index].view(self.shape) + read.view(self.shape))
            shift = shift + by_heads + (writes.mlps[index] - self.writes.mlps[index]) * layer.mlp.write.scale
            norm = layer.norm.module
            x = seen.attn_stream[-1] if norm is None else norm(seen.attn_stream[-1])
            own = {module: module(x.view(*self.made[index][module].shape[:-1], -1)) for module in layer.projections}
            seen.made.append(own)
        final = self.final + shift.view(self.shape)[:, -1]
        moved = Reference(self.runner, self.ids, seen, writes, final)
        moved.outputs = self.outputs
        if logits:
            nothing = torch.zeros_like(self.graph.allowed)
            moved.logits = Live(moved, [nothing], self.writes.input.view(self.shape)).run(
                self.ids, None, even_if_empty=True
            )
        return moved

    def _attention_shift(self, index: int, writes: Constants) -> Tensor:
        """[N, D]: how much more the heads of a layer write."""
        change = writes.heads[index] - self.writes.heads[index]
        weight = self.runner.out_weight(index)
        shift = change.transpose(0, 1).reshape(change.shape[1], -1) @ weight.reshape(-1, weight.shape[-1])
        ours, theirs = writes.shared[index], self.writes.shared[index]
        return shift if ours is None or theirs is None else shift + (ours - theirs)


def _tiled(x: Tensor, batch: int, steps: int) -> Tensor:
    """[..., B T, W] of [..., T or 1, W]: the same for every pair."""
    x = x.expand(*x.shape[:-2], steps, x.shape[-1])
    return x[..., None, :, :].expand(*x.shape[:-2], batch, *x.shape[-2:]).reshape(*x.shape[:-2], -1, x.shape[-1])

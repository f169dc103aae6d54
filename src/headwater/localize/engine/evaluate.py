"""Run a model with every edge outside a circuit carrying an ablated value.

Each reader reads the sum of all earlier sources' reference writes plus, for each of its edges in the circuit, what its
source writes more in this run than its reference. The reference is the counterfactual run unless another ablation is
asked for; its pass is made once for all circuits, and what a circuit does not change is not computed again: readers
without an edge, MLPs, attentions and whole blocks repeat what they gave then. Circuits are pruned first: what is not
reached from the input carries its reference, and heads that lead nowhere do not share in the deviation of a norm after
the output projection (Gemma2).

Shapes: N = B T positions run, D width, A sources with an edge in the circuit, R readers of a layer with one, M circuits
run side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from headwater.core.errors import ModelError
from headwater.core.session import Stopped
from headwater.localize.engine.ablation import Constants, Prepared, shared_write, writes_of
from headwater.localize.engine.edges import PARTS, head_values
from headwater.localize.engine.hooks import on_input, on_output, on_port, replace_forward
from headwater.localize.engine.passes import Batch, Engine, Scored, Seen, can_narrow, probe_ids
from headwater.localize.engine.positions import position_index, prune_positions
from headwater.localize.engine.wiring import Layer, PartName
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


class Live:
    """One run of one circuit, or of several side by side: which readers are live, and what each live source writes
    more than its reference.

    masks: M pruned masks [sources, readers], or one [sources, readers, P] with `index` [B, T] saying which of the P
    each position is. start, known: circuits that agree before layer `start`, and what the sources before it
    [sources_before(start), N, D] write more in each of them; those layers are then not run. Several circuits, and a
    start, need a reference without a cached prefix.
    """

    def __init__(
        self,
        reference: Reference,
        masks: Sequence[Tensor],
        entered: Tensor,
        *,
        index: Tensor | None = None,
        start: int = 0,
        known: Tensor | None = None,
    ) -> None:
        self.reference, self.graph, self.layers = reference, reference.graph, reference.layers
        batch, steps, width = reference.shape
        self.copies, self.start = len(masks), start
        self.shape = (self.copies * batch, steps, width)
        stacked = torch.stack(list(masks))
        at_all = stacked.any(dim=0)
        self.mask = at_all.any(dim=-1) if stacked.ndim == 4 else at_all
        self.place = {source: i for i, source in enumerate(self.mask.any(dim=1).nonzero().flatten().tolist())}
        device, dtype = entered.device, entered.dtype
        self.kept = stacked[:, list(self.place)].to(device=device, dtype=dtype)
        self.index = None if index is None else index.to(device)
        self.shared = sum(source < self.graph.sources_before(start) for source in self.place)
        rows = batch * steps
        before = torch.empty(0, rows, width, dtype=dtype, device=device)
        if known is not None:
            own = list(self.place)[: self.shared]
            before = known if own == list(range(len(known))) else known[own]
        elif 0 in self.place:
            before = (_flat(entered) - reference.writes.input)[None]
        if self.copies == 1:  # zeros: a source that nothing reaches writes its reference
            self.deltas = torch.zeros(len(self.place), rows, width, dtype=dtype, device=device)
            self.deltas[: self.shared] = before
            self.shared, self.own = len(self.place), self.deltas[None]
            self.own_from = 0
        else:
            self.deltas = before
            own = len(self.place) - self.shared
            self.own = torch.zeros(self.copies, own, rows, width, dtype=dtype, device=device)
            self.own_from = self.shared

    def run(self, ids: Tensor, past: Any, *, even_if_empty: bool = False) -> Tensor:
        """Logits [M B, V], circuit after circuit, of these tokens [B, T] (of which only the shape counts)."""
        reference, engine = self.reference, self.reference.engine
        if not even_if_empty and not bool(self.mask[:, -1].any()):
            return reference.logits.repeat(self.copies, 1)
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                self._arrange(stack, index, layer)
            if engine.wiring.final_norm is not None:
                stack.callback(on_input(engine.wiring.final_norm, self._read_out).remove)
            else:
                on_port(stack, self.layers[-1].block.output, self._read_out)
            return engine.forward(ids.repeat(self.copies, 1), past)

    def written(self, upto: int) -> Tensor:
        """[upto, N, D]: what the first `upto` sources wrote more than their reference; 0 for those without an edge.

        For one circuit, after `run`.
        """
        out = self.deltas.new_zeros(upto, *self.deltas.shape[1:])
        for source, at in self.place.items():
            if source < upto:
                out[source] = self.deltas[at]
        return out

    def _read_out(self, x: Tensor) -> Tensor:
        batch, steps, width = self.reference.shape
        final = self.reference.final
        at_last = self.deltas.view(-1, batch, steps, width)[:, :, -1]
        if self.index is not None:
            weights = self.kept[0][:, -1][:, self.index[:, -1]]
            read = final + torch.einsum("ab,abd->bd", weights, at_last)
        else:
            weights = self.kept[:, :, -1]
            read = final + torch.einsum("ma,abd->mbd", weights[:, : self.shared], at_last)
            if self.own_from:
                own = self.own.view(self.copies, -1, batch, steps, width)[:, :, :, -1]
                read += torch.einsum("ma,mabd->mbd", weights[:, self.own_from :], own)
        x = torch.zeros_like(x)  # only the last position is read
        x[:, -1] = read.reshape(-1, width)
        return x

    # --- one layer

    def _arrange(self, stack: ExitStack, index: int, layer: Layer) -> None:
        """Have a block compute what the circuit changes in it, and repeat the rest."""
        readers = self.graph.attention_readers_at(index)
        live = self.mask[:, readers].any(dim=0).nonzero().flatten()
        mlp_live = bool(self.mask[:, self.graph.mlp_reader_at(index)].any())
        if index < self.start or (len(live) == 0 and not mlp_live):
            self._repeat(stack, layer.block.module)
            return
        if len(live) == 0:
            self._repeat(stack, layer.attention.module)
        else:
            self._attend(stack, index, layer, live)
        if mlp_live:
            self._feed(stack, index, layer)
        else:
            self._repeat(stack, layer.mlp.entry.module)

    def _repeat(self, stack: ExitStack, module: nn.Module) -> None:
        output = repeated(self.reference.outputs[module], self.copies)
        replace_forward(stack, module, lambda *_, **__: output)

    def _reads(self, before: int, columns: Tensor, stream: Tensor) -> Tensor:
        """[R, M N, D]: what these readers (columns of the mask) read, given the reference stream [B, T, D]."""
        n = sum(source < before for source in self.place)
        stream, copies = _flat(stream), self.copies
        if n == 0:
            return stream.repeat(copies, 1).expand(len(columns), copies * len(stream), -1)
        if self.index is not None:
            weights = self.kept[0, :n][:, columns][:, :, self.index.flatten()]
            return torch.einsum("arn,and->rnd", weights, self.deltas[:n]) + stream
        shared = min(n, self.shared)
        deltas = self.deltas[:shared].view(shared, -1)
        if copies == 1:
            mixed = self.kept[0, :shared, columns].T @ deltas
            return mixed.view(len(columns), *stream.shape).add_(stream)
        weights = self.kept[:, :n, columns].transpose(1, 2)
        alike = (weights == weights[:1]).all(dim=0).all(dim=-1)
        if n == shared and bool(alike.any()):  # what all circuits read alike is summed up once
            mixed = deltas.new_empty(len(columns), copies, deltas.shape[1])
            mixed[alike] = (weights[0, alike] @ deltas)[:, None]
            differing = (weights[:, ~alike].transpose(0, 1).reshape(-1, n) @ deltas).view(-1, copies, deltas.shape[1])
            mixed[~alike] = differing
        else:
            mixed = (weights[:, :, :shared].reshape(-1, shared) @ deltas).view(copies, len(columns), -1)
            if n > shared:
                own = self.own[:, : n - shared].reshape(copies, n - shared, -1)
                mixed.baddbmm_(weights[:, :, shared:], own)
            mixed = mixed.transpose(0, 1)
        return (mixed.reshape(len(columns), copies, *stream.shape) + stream).reshape(len(columns), -1, stream.shape[-1])

    def _wrote(self, place: int, change: Tensor) -> None:
        """Keep what sources from `place` on write more, [k, M N, D]."""
        k, (rows, width) = len(change), self.deltas.shape[1:]
        at = place - self.own_from
        self.own[:, at : at + k] = change.view(k, self.copies, rows, width).transpose(0, 1)

    def _attend(self, stack: ExitStack, index: int, layer: Layer, live: Tensor) -> None:
        reference, graph, copies = self.reference, self.graph, self.copies
        first = graph.attention_readers_at(index).start
        before = graph.sources_before(index)
        heads = [h for h in range(graph.n_heads) if graph.heads_at(index).start + h in self.place]
        computed: dict[nn.Module, Tensor] = {}

        def project() -> None:
            x = self._reads(before, live + first, reference.attn_stream[index])
            if layer.norm.module is not None:
                x = layer.norm.module(x.reshape(-1, *self.shape[1:])).view(x.shape)
            for module in layer.projections:
                made = _flat(reference.made[index][module])
                computed[module] = made.clone() if copies == 1 else made.repeat(copies, 1)
            for name, here, values in live_values(layer, x, live):
                rows = layer.parts[name].rows[here.to(layer.parts[name].rows.device)]
                out = computed[layer.parts[name].projection]
                out[:, rows.flatten()] = values.transpose(0, 1).reshape(len(out), -1)

        def made(module: nn.Module) -> Tensor:
            if not computed:
                project()
            shape = reference.made[index][module].shape
            return computed.pop(module).view(copies * shape[0], *shape[1:])

        for module in layer.projections:
            replace_forward(stack, module, lambda *_, module=module, **__: made(module))

        def write(z: Tensor, mixed: Tensor | None) -> None:
            # `head_values` reads by layer, so the live run is shown as a list with only this layer in it
            now = Seen(z=[z], mixed=[] if mixed is None else [mixed])
            work = self.deltas.dtype
            theirs = reference.writes.heads[index]
            values = head_values(layer, now, 0, work).view(len(theirs), copies, *theirs.shape[1:])
            change, weight = values - theirs[:, None], reference.runner.out_weight(index)
            if len(heads) < len(weight):  # an index would copy the weights
                change, weight = change[heads], weight[heads]
            wrote = torch.bmm(change.reshape(len(heads), -1, theirs.shape[-1]), weight)
            ours, usual = shared_write(layer, now, 0, work), reference.writes.shared[index]
            if ours is not None and usual is not None:
                wrote += (ours - usual.repeat(copies, 1)) / graph.n_heads
            self._wrote(self.place[graph.heads_at(index).start + heads[0]], wrote)

        if not heads:
            return
        on_heads_write(stack, layer, self.shape[-1], write)

    def _feed(self, stack: ExitStack, index: int, layer: Layer) -> None:
        reference, graph = self.reference, self.graph
        before = graph.sources_before(index, mlp=True)
        column = torch.tensor([graph.mlp_reader_at(index)])

        def read(x: Tensor) -> Tensor:
            stream = self._reads(before, column, reference.mlp_stream[index])[0].view(self.shape)
            norm = layer.mlp_norm.module
            return (stream if norm is None else norm(stream)).reshape(x.shape)

        def wrote(y: Tensor) -> None:
            if graph.mlp_at(index) in self.place:
                usual = reference.writes.mlps[index]
                difference = _flat(y).view(self.copies, *usual.shape) - usual
                self._wrote(
                    self.place[graph.mlp_at(index)], (difference * layer.mlp.write.scale).view(1, -1, self.shape[-1])
                )

        on_port(stack, layer.mlp.entry, read)
        on_port(stack, layer.mlp.write.port, wrote)


def live_values(layer: Layer, x: Tensor, live: Tensor) -> Iterator[tuple[PartName, Tensor, Tensor]]:
    """(part, heads of it, values [heads, N, K]) of the live readers `live` [R], which read x [R, N, D]."""
    start = 0
    for name in PARTS:
        part = layer.parts[name]
        n = part.rows.shape[0]
        here = ((live >= start) & (live < start + n)).nonzero().flatten()
        own = live[here] - start
        start += n
        if len(here) == 0:
            continue
        # a slice where all heads are live: an index would copy the stack
        stack_x = x[int(here[0]) : int(here[-1]) + 1]
        weight, bias = part.weight(x.dtype), part.bias(x.dtype)
        if len(own) < n:
            weight, bias = weight[own], None if bias is None else bias[own]
        values = torch.bmm(stack_x, weight.transpose(1, 2))
        yield name, own, values if bias is None else values + bias[:, None]


def _tiled(x: Tensor, batch: int, steps: int) -> Tensor:
    """[..., B T, W] of [..., T or 1, W]: the same for every pair."""
    x = x.expand(*x.shape[:-2], steps, x.shape[-1])
    return x[..., None, :, :].expand(*x.shape[:-2], batch, *x.shape[-2:]).reshape(*x.shape[:-2], -1, x.shape[-1])


def repeated(output: Any, copies: int) -> Any:
    """A module's output with every tensor in it repeated along the batch."""
    if copies == 1:
        return output
    if isinstance(output, Tensor):
        return output.repeat(copies, *[1] * (output.ndim - 1)) if output.ndim else output
    if type(output) in (tuple, list):
        return type(output)(repeated(item, copies) for item in output)
    return output


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def on_heads_write(stack: ExitStack, layer: Layer, width: int, write: Callable[[Tensor, Tensor | None], None]) -> None:
    """`write(z, output)` where heads add to the stream, with z their mixed values.

    Without a norm after the output projection the projection is not run: its output is None, the module gives 0, and
    `write` keeps what it makes of z. Behind such a norm (Gemma2, OLMo2) the norm must see the whole, so it is run.
    """
    if layer.post_norm.module is None:

        def instead(z: Tensor) -> Tensor:
            write(z, None)
            return z.new_zeros(*z.shape[:-1], width)

        replace_forward(stack, layer.attention.out_proj, instead)
    else:
        z_now: list[Tensor] = []
        stack.callback(on_input(layer.attention.out_proj, lambda z: z_now.append(z)).remove)
        on_output(stack, layer.attention.out_proj, lambda y: write(z_now.pop(), y))

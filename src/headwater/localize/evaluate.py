"""Run a model with every edge outside a circuit carrying its counterfactual value.

Each reader reads the counterfactual stream plus, for each of its edges in the circuit, what its source writes more in
this run than in the counterfactual one. The counterfactual pass is made once for all circuits; what a circuit does not
change is not computed again: readers without an edge, MLPs, attentions and whole blocks repeat what they gave then.
Circuits are pruned first; that changes nothing but where a norm follows the output projection (Gemma2): there, heads
that lead nowhere would still share in its deviation.

Shapes: N = B T positions run, D width, A sources with an edge in the circuit, R readers of a layer with one.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from headwater.core.errors import ModelError
from headwater.localize.edges import PARTS, head_values, post_norm_constant
from headwater.localize.hooks import on_input, on_output, on_port, replace_forward
from headwater.localize.passes import Batch, Engine, Scored, Seen, probe_ids
from headwater.localize.selection import prune
from headwater.localize.wiring import Layer


@dataclass(frozen=True, eq=False)
class BatchValues:
    """A metric on a batch: [B] for the model on the prompt, on the counterfactual, and for each circuit."""

    clean: Tensor
    corrupt: Tensor
    circuits: list[Tensor]


_checked: "WeakSet[nn.Module]" = WeakSet()


class CircuitRunner:
    """Evaluates circuits of one model on batches of pairs."""

    def __init__(self, engine: Engine, metric: Scored) -> None:
        self.engine, self.metric = engine, metric
        self.graph, self.layers = engine.wiring.graph, engine.wiring.layers
        self._written: dict[int, Tensor] = {}

    def check(self) -> None:
        """The whole graph must give the model's own logits: measured once a model.

        Raises ModelError where a model's blocks do something that the graph does not know of.
        """
        hf = self.engine.hf
        if hf not in _checked:
            ids, everything = probe_ids(self.engine, 5), self.graph.allowed
            with self.engine.open():
                logits, entered = self._clean(ids[:1], None)
                whole = _Once(self, ids[1:], None).run(everything, entered, ids[:1], None)
            error = float((whole - logits).norm() / logits.norm().clamp(min=1e-9))
            if not error <= {torch.float64: 1e-5, torch.float32: 1e-2}.get(logits.dtype, 0.2):
                raise ModelError(
                    f"{type(hf).__name__}: the whole graph does not give the model's own logits",
                    got=f"relative difference {error:.2g}",
                    fix="Patch its sites with model.run and interventions instead",
                )
            _checked.add(hf)

    def values(self, batch: Batch, masks: Sequence[Tensor]) -> BatchValues:
        """The metric of each circuit (a mask [sources, readers]) on each pair of the batch."""
        engine = self.engine
        with engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, engine, batch)
            past = engine.prefix_cache(batch)
            clean_ids, corrupt_ids = batch.clean[:, batch.prefix :], batch.corrupt[:, batch.prefix :]
            reference, entered = self._clean(clean_ids, past)
            once = _Once(self, corrupt_ids, past)
            assert once.seen.logits is not None
            found = []
            for mask in masks:
                logits = once.run(prune(self.graph, mask), entered, clean_ids, past)
                found.append(self.metric(batch, logits, reference))
            return BatchValues(
                self.metric(batch, reference, reference), self.metric(batch, once.seen.logits, reference), found
            )

    def _clean(self, ids: Tensor, past: Any) -> tuple[Tensor, Tensor]:
        """(logits, stream that enters the first block) of the model itself."""
        entered: list[Tensor] = []
        with ExitStack() as stack:
            on_port(stack, self.layers[0].block.input, lambda x: entered.append(x))
            return self.engine.forward(ids, past), entered[0]

    def out_weight(self, index: int) -> Tensor:
        """[H, K, D]: from a head's values (as `head_values` scales them) to what it adds to the stream."""
        if index not in self._written:
            layer = self.layers[index]
            weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach())
            self._written[index] = (weight * layer.attention.write.scale).contiguous()
        return self._written[index]


class _Once:
    """The counterfactual pass of a batch, kept for every circuit that is run on it."""

    def __init__(self, runner: CircuitRunner, ids: Tensor, past: Any) -> None:
        self.runner, self.engine, self.graph, self.layers = runner, runner.engine, runner.graph, runner.layers
        self.seen = Seen()
        self.outputs: dict[nn.Module, Any] = {}
        with ExitStack() as stack:
            self.engine.watch(stack, self.seen, readers=True, gradients=False)
            for layer in self.layers:
                for module in (layer.block.module, layer.attention.module, layer.mlp.entry.module):
                    on_output(stack, module, lambda y, module=module: self.outputs.__setitem__(module, y))
            self.seen.logits = self.engine.forward(ids, past)

    def run(self, mask: Tensor, entered: Tensor, ids: Tensor, past: Any) -> Tensor:
        """Logits [B, V] of one (pruned) circuit."""
        return _Live(self, mask, entered).run(ids, past)


class _Live:
    """One run of one circuit: which readers are live, and what each live source writes more than in the
    counterfactual.
    """

    def __init__(self, once: _Once, mask: Tensor, entered: Tensor) -> None:
        self.once, self.graph, self.layers = once, once.graph, once.layers
        embed = once.seen.embed
        assert embed is not None
        self.shape = embed.shape
        self.mask = mask
        self.place = {source: i for i, source in enumerate(mask.any(dim=1).nonzero().flatten().tolist())}
        self.kept = mask[list(self.place)].to(device=embed.device, dtype=embed.dtype)
        self.deltas = torch.empty(len(self.place), *_flat(embed).shape, dtype=embed.dtype, device=embed.device)
        if 0 in self.place:
            self.deltas[0] = _flat(entered) - _flat(embed)

    def run(self, ids: Tensor, past: Any) -> Tensor:
        once, engine = self.once, self.once.engine
        final = once.seen.final
        assert final is not None and once.seen.logits is not None
        if not bool(self.mask[:, -1].any()):
            return once.seen.logits

        def read_out(x: Tensor) -> Tensor:
            batch, steps, width = self.shape
            at_last = self.deltas.view(-1, batch, steps, width)[:, :, -1]
            x = torch.zeros_like(x)  # only the last position is read
            x[:, -1] = final[:, -1] + torch.einsum("a,abd->bd", self.kept[:, -1], at_last)
            return x

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                self._arrange(stack, index, layer)
            if engine.wiring.final_norm is not None:
                stack.callback(on_input(engine.wiring.final_norm, read_out).remove)
            else:
                on_port(stack, self.layers[-1].block.output, read_out)
            return engine.forward(ids, past)

    # --- one layer

    def _arrange(self, stack: ExitStack, index: int, layer: Layer) -> None:
        """Have a block compute what the circuit changes in it, and repeat the rest."""
        readers = self.graph.attention_readers_at(index)
        live = self.mask[:, readers].any(dim=0).nonzero().flatten()
        mlp_live = bool(self.mask[:, self.graph.mlp_reader_at(index)].any())
        outputs = self.once.outputs
        if len(live) == 0 and not mlp_live:
            self._repeat(stack, layer.block.module, outputs)
            return
        if len(live) == 0:
            self._repeat(stack, layer.attention.module, outputs)
        else:
            self._attend(stack, index, layer, live)
        if mlp_live:
            self._feed(stack, index, layer)
        else:
            self._repeat(stack, layer.mlp.entry.module, outputs)

    @staticmethod
    def _repeat(stack: ExitStack, module: nn.Module, outputs: dict[nn.Module, Any]) -> None:
        replace_forward(stack, module, lambda *_, **__: outputs[module])

    def _reads(self, before: int, columns: Tensor, stream: Tensor) -> Tensor:
        """[R, N, D]: what these readers (columns of the mask) read, given the counterfactual stream [B, T, D]."""
        n = sum(source < before for source in self.place)
        stream = _flat(stream)
        if n == 0:
            return stream.expand(len(columns), *stream.shape)
        mixed = self.kept[:n, columns].T @ self.deltas[:n].view(n, -1)
        return mixed.view(len(columns), *stream.shape).add_(stream)

    def _attend(self, stack: ExitStack, index: int, layer: Layer, live: Tensor) -> None:
        seen, graph = self.once.seen, self.graph
        first = graph.attention_readers_at(index).start
        before = graph.sources_before(index)
        heads = [h for h in range(graph.n_heads) if graph.heads_at(index).start + h in self.place]
        computed: dict[nn.Module, Tensor] = {}

        def project() -> None:
            x = self._reads(before, live + first, seen.attn_stream[index])
            if layer.norm.module is not None:
                batch, steps, width = self.shape
                x = layer.norm.module(x.reshape(-1, steps, width)).view(len(live), batch * steps, width)
            for module in layer.projections:
                computed[module] = _flat(seen.made[index][module]).clone()
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
                rows = part.rows[own.to(part.rows.device)]
                values = torch.bmm(stack_x, part.weight(x.dtype)[own].transpose(1, 2))
                bias = part.bias(x.dtype)
                values = values if bias is None else values + bias[own][:, None]
                computed[part.projection][:, rows.flatten()] = values.transpose(0, 1).reshape(
                    len(computed[part.projection]), -1
                )

        def made(module: nn.Module) -> Tensor:
            if not computed:
                project()
            return computed.pop(module).view(seen.made[index][module].shape)

        for module in layer.projections:
            replace_forward(stack, module, lambda *_, module=module, **__: made(module))
        kept = Seen()

        def write(z: Tensor, mixed: Tensor | None) -> None:
            # `head_values` reads by layer, so the live run is shown as a list with only this layer in it
            kept.z, kept.mixed = [z], [] if mixed is None else [mixed]
            theirs = Seen(z=[seen.z[index]], mixed=[] if mixed is None else [seen.mixed[index]])
            work = self.deltas.dtype
            change = head_values(layer, kept, 0, work) - head_values(layer, theirs, 0, work)
            at = self.place[graph.heads_at(index).start + heads[0]]
            torch.bmm(change[heads], self.once.runner.out_weight(index)[heads], out=self.deltas[at : at + len(heads)])
            constant = post_norm_constant(layer, kept, theirs, 0, work)
            if constant is not None:
                self.deltas[at : at + len(heads)] += constant / graph.n_heads

        if not heads:
            return
        if layer.post_norm.module is None:

            def instead(z: Tensor) -> Tensor:
                write(z, None)
                return z.new_zeros(*z.shape[:-1], self.shape[-1])

            replace_forward(stack, layer.attention.out_proj, instead)
        else:
            z_now: list[Tensor] = []
            stack.callback(on_input(layer.attention.out_proj, lambda z: z_now.append(z)).remove)
            on_output(stack, layer.attention.out_proj, lambda y: write(z_now.pop(), y))

    def _feed(self, stack: ExitStack, index: int, layer: Layer) -> None:
        seen, graph = self.once.seen, self.graph
        before = graph.sources_before(index, mlp=True)
        column = torch.tensor([graph.mlp_reader_at(index)])

        def read(x: Tensor) -> Tensor:
            stream = self._reads(before, column, seen.mlp_stream[index])[0].view(self.shape)
            norm = layer.mlp_norm.module
            return (stream if norm is None else norm(stream)).reshape(x.shape)

        def wrote(y: Tensor) -> None:
            difference = _flat(y) - _flat(seen.mlp_out[index])
            self.deltas[self.place[graph.mlp_at(index)]] = difference * layer.mlp.write.scale

        on_port(stack, layer.mlp.entry, read)
        on_port(stack, layer.mlp.write.port, wrote)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

"""A circuit's run that can be differentiated: by how much of each edge is in it, and by what ablated edges carry.

Each reader reads the sum of reference writes plus, over its edges, weight x (live write - reference write), with a
weight between 0 and 1 for every edge. With weights of 0 and 1 it is `evaluate.Live`, which is faster.

Shapes: N = B T positions run, D width, R attention readers of a layer.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from headwater.localize.engine.ablation import shared_write
from headwater.localize.engine.edges import PARTS, head_values
from headwater.localize.engine.evaluate import Reference
from headwater.localize.engine.hooks import on_input, on_port, replace_forward
from headwater.localize.engine.live import on_heads_write
from headwater.localize.engine.passes import Seen
from headwater.localize.engine.wiring import Layer


def soft_logits(reference: Reference, weights: Tensor, entered: Tensor) -> Tensor:
    """Logits [B, V] of a batch where each edge counts by its weight [sources, readers].

    reference: of the batch, without a cached prefix; entered [B, T, D]: the prompts' stream into the first block. Every
    node is run, so one call costs a forward of the model and 2 x edges x positions x width operations.
    """
    return _Soft(reference, weights, entered).run()


class _Soft:
    def __init__(self, reference: Reference, weights: Tensor, entered: Tensor) -> None:
        self.reference, self.graph, self.layers = reference, reference.graph, reference.layers
        self.weights = weights.to(device=entered.device, dtype=entered.dtype)
        # blocks of sources side by side, never copied together: autograd then keeps each write once
        self.written: list[tuple[int, Tensor]] = [(0, (_flat(entered) - reference.writes.input)[None])]

    def run(self) -> Tensor:
        engine = self.reference.engine
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                self._attend(stack, index, layer)
                self._feed(stack, index, layer)
            if engine.wiring.final_norm is not None:
                stack.callback(on_input(engine.wiring.final_norm, self._read_out).remove)
            else:
                on_port(stack, self.layers[-1].block.output, self._read_out)
            return engine.forward(self.reference.ids)

    def _reads(self, columns: slice, before: int, stream: Tensor) -> Tensor:
        """[R, N, D]."""
        stream = _flat(stream)
        n = columns.stop - columns.start
        out = stream.expand(n, *stream.shape).reshape(n, -1)
        for at, written in self.written:
            if at < before:
                out = torch.addmm(out, self.weights[at : at + len(written), columns].T, written.flatten(1))
        return out.view(n, *stream.shape)

    def _read_out(self, x: Tensor) -> Tensor:
        batch, steps, width = self.reference.shape
        read = self.reference.final
        for at, written in self.written:
            at_last = written.view(-1, batch, steps, width)[:, :, -1]
            read = read + torch.einsum("a,abd->bd", self.weights[at : at + len(written), -1], at_last)
        return torch.cat([torch.zeros_like(x[:, :-1]), read[:, None]], dim=1)

    def _attend(self, stack: ExitStack, index: int, layer: Layer) -> None:
        reference, graph = self.reference, self.graph
        made: dict[nn.Module, Tensor] = {}

        def project() -> None:
            columns = graph.attention_readers_at(index)
            x = self._reads(columns, graph.sources_before(index), reference.attn_stream[index])
            if layer.norm.module is not None:
                x = layer.norm.module(x.reshape(-1, *reference.shape[1:])).reshape(x.shape)
            values: dict[nn.Module, list[Tensor]] = {module: [] for module in layer.projections}
            rows: dict[nn.Module, list[Tensor]] = {module: [] for module in layer.projections}
            start = 0
            for name in PARTS:
                part = layer.parts[name]
                own = x[start : start + len(part.rows)]
                start += len(part.rows)
                made_here = torch.bmm(own, part.weight(x.dtype).transpose(1, 2))
                bias = part.bias(x.dtype)
                made_here = made_here if bias is None else made_here + bias[:, None]
                values[part.projection].append(made_here.transpose(0, 1).flatten(1))
                rows[part.projection].append(part.rows.flatten())
            for module in layer.projections:
                usual, at = _flat(reference.made[index][module]), torch.cat(rows[module])
                made[module] = usual.index_copy(1, at.to(usual.device), torch.cat(values[module], dim=1))

        def give(module: nn.Module) -> Tensor:
            if not made:
                project()
            return made.pop(module).view(reference.made[index][module].shape)

        for module in layer.projections:
            replace_forward(stack, module, lambda *_, module=module, **__: give(module))

        def write(z: Tensor, mixed: Tensor | None) -> None:
            now = Seen(z=[z], mixed=[] if mixed is None else [mixed])
            change = head_values(layer, now, 0, z.dtype) - reference.writes.heads[index]
            wrote = torch.bmm(change, reference.runner.out_weight(index))
            ours, usual = shared_write(layer, now, 0, z.dtype), reference.writes.shared[index]
            if ours is not None and usual is not None:
                wrote = wrote + (ours - usual) / graph.n_heads
            self.written.append((graph.heads_at(index).start, wrote))

        on_heads_write(stack, layer, reference.shape[-1], write)

    def _feed(self, stack: ExitStack, index: int, layer: Layer) -> None:
        reference, graph = self.reference, self.graph
        at = graph.mlp_reader_at(index)

        def read(x: Tensor) -> Tensor:
            before = graph.sources_before(index, mlp=True)
            stream = self._reads(slice(at, at + 1), before, reference.mlp_stream[index])[0].view(reference.shape)
            norm = layer.mlp_norm.module
            return (stream if norm is None else norm(stream)).reshape(x.shape)

        def wrote(y: Tensor) -> None:
            change = (_flat(y) - reference.writes.mlps[index]) * layer.mlp.write.scale
            self.written.append((graph.mlp_at(index), change[None]))

        on_port(stack, layer.mlp.entry, read)
        on_port(stack, layer.mlp.write.port, wrote)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

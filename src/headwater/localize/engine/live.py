"""One run of one circuit, or of several side by side, from what its reference keeps of every layer.

A reader with an edge in the circuit reads its reference's stream plus what the edge's source writes more in this run;
what the circuit does not change is not computed again: readers without an edge, MLPs, attentions and whole blocks
repeat what they gave in the reference.

Shapes: N = B T positions run, D width, A sources with an edge in the circuit, R readers of a layer with one, M circuits
run side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.localize.engine.ablation import shared_write
from headwater.localize.engine.edges import PARTS, head_values
from headwater.localize.engine.hooks import on_input, on_output, on_port, replace_forward
from headwater.localize.engine.passes import Seen
from headwater.localize.engine.wiring import Layer, PartName

if TYPE_CHECKING:
    from headwater.localize.engine.evaluate import Reference


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
        reference: "Reference",
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

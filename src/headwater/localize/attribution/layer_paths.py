"""Passes in which what one layer's attention, or one MLP, writes is moved from the counterfactual's to the prompt's.

Everything before such a layer is as on the prompt, so a pass begins there, from the stream that the prompt's own run
left. The node of the integral that is the prompt itself is that run, the same for all layers.

Shapes: B pairs, T positions run, N = B T, D width, L layers; a site is `input`, one layer's attention, or one MLP.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.localize.attribution.atp import NodeScorer
from headwater.localize.engine.edges import Gradients
from headwater.localize.engine.hooks import hand_on, on_output, on_port, replace_forward
from headwater.localize.engine.passes import Batch, Engine, Scored, Seen
from headwater.localize.engine.writes import Other, attention_differences, embed_differences, mlp_differences

Kind = Literal["input", "attention", "mlp"]


@dataclass(frozen=True)
class Site:
    """What a pass moves: `input` (layer -1), one layer's attention (all its heads), or one MLP."""

    kind: Kind
    layer: int


def sites_of(n_layers: int) -> list[Site]:
    """Every site of a model, in order."""
    both: tuple[Kind, Kind] = ("attention", "mlp")
    return [Site("input", -1), *(Site(kind, layer) for layer in range(n_layers) for kind in both)]


@dataclass(eq=False)
class Whole:
    """The prompt's own run, recorded by autograd: what passes begin from, and what is differentiated by."""

    seen: Seen
    pre: list[Tensor] = field(default_factory=list)
    """The stream before each block, and after the last."""
    mid: list[Tensor] = field(default_factory=list)
    """The stream between attention and MLP; empty in parallel blocks."""
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    """What attention and MLP write, before the block's multipliers."""
    outputs: dict[nn.Module, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Part:
    """One pass from a site on. gradients: of the readers it reached. stream, write: at the stream it began with, and at
    the value that was put in."""

    gradients: Gradients
    stream: Tensor | None
    write: Tensor


class Paths:
    """Runs passes that begin at a site, for one batch of pairs."""

    def __init__(self, engine: Engine, metric: Scored, batch: Batch, past: Any, *, narrow: bool) -> None:
        self.engine, self.metric, self.batch, self.past, self.narrow = engine, metric, batch, past, narrow
        self.layers, self.parallel = engine.wiring.layers, engine.wiring.graph.parallel
        self.ids = batch.clean[:, batch.prefix :]
        self.whole = self._record()
        logits = self.whole.seen.logits
        assert logits is not None
        self.reference = logits.detach()

    def _record(self) -> Whole:
        whole = Whole(Seen())
        with ExitStack() as stack, torch.enable_grad():
            for layer in self.layers:
                if not self.parallel:  # before what narrows the MLP, which may read this very tensor
                    assert layer.block.mid is not None
                    on_port(stack, layer.block.mid, lambda x: whole.mid.append(x))
            if self.narrow:
                self.engine.narrow(stack)
            for layer in self.layers:
                on_port(stack, layer.attention.write.port, lambda y: whole.attention.append(y))
                on_port(stack, layer.mlp.write.port, lambda y: whole.mlp.append(y))
                for module in (layer.block.module, layer.attention.module):
                    on_output(stack, module, lambda y, module=module: whole.outputs.__setitem__(module, y))
            self.engine.watch(stack, whole.seen, enter=lambda x: x.detach().requires_grad_(True))
            for layer in self.layers:  # after `watch`, which puts its own stream in before the first block
                on_port(stack, layer.block.input, lambda x: whole.pre.append(x))
            on_port(stack, self.layers[-1].block.output, lambda x: whole.pre.append(x))
            whole.seen.logits = self.engine.forward(self.ids, self.past)
        return whole

    # --- the prompt's own run

    def clean_gradients(self) -> tuple[Gradients, list[Tensor], list[Tensor]]:
        """(the readers' gradients, those at `pre`, those at `mid`) of the prompt's own run; its graph is kept."""
        whole = self.whole
        streams = [*whole.pre, *whole.mid]
        gradients, found = self._differentiate(whole.seen, streams, keep=True)
        return gradients, found[: len(whole.pre)], found[len(whole.pre) :]

    def at(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The metric's gradients at tensors of the prompt's own run; its graph is kept."""
        return self._differentiate(self.whole.seen, tensors, keep=True)[1]

    def pulled_back(self, given: Sequence[tuple[Tensor, Tensor]]) -> Gradients:
        """The readers' gradients of sum(stream . gradient) over tensors of the prompt's own run, through that run."""
        seen = self.whole.seen
        outputs = [(tensor, g) for tensor, g in given if tensor.grad_fn is not None]
        made = [(index, module) for index, layer in enumerate(self.layers) for module in layer.projections]
        wanted = [*(seen.made[i][m] for i, m in made), *seen.mlp_in]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if outputs:
            found = torch.autograd.grad(
                [tensor for tensor, _ in outputs],
                wanted,
                [(g if g.numel() == t.numel() else g[:, -1:]).reshape(t.shape) for t, g in outputs],
                retain_graph=True,
                allow_unused=True,
            )
        return self._gradients(seen, made, found, 0, None)

    # --- passes that begin at a site

    def run(self, site: Site, value: Tensor) -> Part:
        """The rest of the prompt's run with `value` in place of what a site writes (before the block's multiplier)."""
        whole, at = self.whole, site.layer
        value = value.detach().clone().requires_grad_(True)
        seen = Seen()
        begins = 0 if site.kind == "input" else at if site.kind == "attention" or self.parallel else at + 1
        with ExitStack() as stack, torch.enable_grad():
            if site.kind == "input":
                stream, put = None, value
            else:
                stream = put = whole.pre[begins].detach().clone().requires_grad_(True)
                if begins > at:  # the MLP's write is all that comes between
                    scale = self.layers[at].mlp.write.scale
                    put = stream + (value - whole.mlp[at].detach()).reshape(len(stream), -1, stream.shape[-1]) * scale
            if self.narrow:
                self.engine.narrow(stack)
            for index in range(begins):
                block = self.layers[index].block
                handed = put if index == begins - 1 else None
                given = whole.outputs[block.module]
                replace_forward(stack, block.module, hand_on(given, block.output.key, handed, block.input.key))
            if begins == at:
                self._put(stack, site, value)
            self.engine.watch(stack, seen, enter=(lambda _: put) if begins == 0 else None)
            seen.logits = self.engine.forward(self.ids, self.past)
        for kept in (seen.attn_stream, seen.mlp_stream, seen.mlp_in):
            kept[:0] = [torch.empty(0)] * (len(self.layers) - len(kept))  # by layer, as in a whole pass
        extra = [value] if stream is None else [stream, value]
        gradients, found = self._differentiate(seen, extra, first=begins)
        return Part(gradients, None if stream is None else found[0], found[-1])

    def _put(self, stack: ExitStack, site: Site, value: Tensor) -> None:
        """Have a block's attention (or, in a parallel block, its MLP) write `value`."""
        layer = self.layers[site.layer]
        if site.kind == "mlp":
            on_port(stack, layer.mlp.write.port, lambda y: value.reshape(y.shape))
            return
        module, written = layer.attention.module, self.whole.attention[site.layer]
        given = self.whole.outputs[module]
        own = given if isinstance(given, Tensor) else given[0]
        if own is written:  # nothing follows attention: it need not run
            rest = () if isinstance(given, Tensor) else given[1:]
            replace_forward(
                stack, module, lambda *_, **__: value if isinstance(given, Tensor) else type(given)((value, *rest))
            )
            return
        on_port(stack, layer.attention.write.port, lambda y: value.reshape(y.shape))

    def _differentiate(
        self, seen: Seen, extra: Sequence[Tensor], *, first: int = 0, keep: bool = False
    ) -> tuple[Gradients, list[Tensor]]:
        """The metric's gradients at the readers of the layers from `first` on, and at `extra` tensors."""
        assert seen.logits is not None and seen.final is not None
        made = [(index, module) for index in range(first, len(self.layers)) for module in seen.made[index]]
        mlp_in = seen.mlp_in[first:]
        wanted = [*(seen.made[i][m] for i, m in made), *mlp_in, seen.final, *extra]  # type: ignore[index]
        with torch.enable_grad():
            value = self.metric(self.batch, seen.logits, self.reference).sum()
        found = list(torch.autograd.grad(value, wanted, retain_graph=keep, allow_unused=True))
        tail = len(made) + len(mlp_in)
        final = found[tail]
        assert final is not None
        gradients = self._gradients(seen, made, found[:tail], first, final[:, -1].to(self.engine.work))
        rest = [torch.zeros_like(x) if g is None else g for x, g in zip(extra, found[tail + 1 :], strict=True)]
        return gradients, rest

    def _gradients(
        self,
        seen: Seen,
        made: Sequence[tuple[int, object]],
        found: Sequence[Tensor | None],
        first: int,
        final: Tensor | None,
    ) -> Gradients:
        by_layer: list[dict[object, Tensor]] = [{} for _ in self.layers]
        for (index, module), gradient in zip(made, found, strict=False):
            if gradient is not None:
                by_layer[index][module] = gradient
        mlp_in = [*[None] * first, *found[len(made) :]]
        shown = Seen(
            attn_stream=seen.attn_stream,
            mlp_stream=seen.mlp_stream,
            made=[{m: y.detach() for m, y in layer.items()} for layer in seen.made],
        )
        for index, layer in enumerate(self.layers):  # a projection that a gradient did not reach: zeros
            if by_layer[index]:
                for module in layer.projections:
                    own = shown.made[index][module]
                    by_layer[index].setdefault(module, torch.zeros_like(own))
        if final is None:  # a gradient of something before the logits
            like = self.whole.pre[0]
            final = torch.zeros(len(like), like.shape[-1], dtype=self.engine.work, device=like.device)
        return Gradients(shown, by_layer, mlp_in, final)

    # --- the way

    def differences(self, site: Site, other: Other) -> Tensor:
        """How what a site writes on the prompt differs from the reference, in the shape that `run` takes."""
        whole, work = self.whole, self.engine.work
        if site.kind == "input":
            like = whole.pre[0]
            found = embed_differences(whole.seen, other, work)
        elif site.kind == "attention":
            like = whole.attention[site.layer]
            found = attention_differences(self.layers[site.layer], whole.seen, other, site.layer, work)
        else:
            like = whole.mlp[site.layer]
            found = mlp_differences(whole.seen, other, site.layer, work)
        return found.reshape(like.shape).to(like.dtype)

    def written(self, site: Site) -> Tensor:
        """What a site writes on the prompt."""
        whole = self.whole
        if site.kind == "input":
            return whole.pre[0].detach()
        return (whole.attention if site.kind == "attention" else whole.mlp)[site.layer].detach()


class WriteScorer(NodeScorer):
    """Scores of sources with the gradient at a write averaged while that write itself is moved (all of a layer's heads
    together)."""

    def scores(self, batch: Batch, nodes: Sequence[tuple[float, float]] = ((1.0, 1.0),)) -> Tensor:
        """[sources, B, T] float64, as `NodeScorer.scores`; nodes: places between the reference and the prompt."""
        with self.engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, self.engine, batch)
            past = self.engine.prefix_cache(batch)
            paths = Paths(self.engine, self.metric, batch, past, narrow=self.narrows)
            other = self._other(batch, past, paths.reference)
            whole = paths.whole
            writes = [x for both in zip(whole.attention, whole.mlp, strict=True) for x in both]
            gradients = [torch.zeros_like(x) for x in (whole.pre[0], *writes)]
            for place, weight in nodes:
                if place == 1.0:
                    for held, g in zip(gradients, paths.at([whole.pre[0], *writes]), strict=True):
                        held.add_(g, alpha=weight)
                    continue
                for held, site in zip(gradients, sites_of(len(self.layers)), strict=True):
                    value = paths.written(site) - (1 - place) * paths.differences(site, other)
                    held.add_(paths.run(site, value).write, alpha=weight)
            return self._contract(whole.seen, other, gradients)

    def _other(self, batch: Batch, past: Any, reference: Tensor) -> Other:
        self._clean.append(self.metric(batch, reference, reference))
        if self.fixed is not None:
            return self.fixed
        corrupt, _ = self._pass(batch.corrupt[:, batch.prefix :], past, recorded=False)
        assert corrupt.logits is not None
        self._corrupt.append(self.metric(batch, corrupt.logits, reference))
        return corrupt

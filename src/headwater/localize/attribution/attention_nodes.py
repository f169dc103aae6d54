"""Nodes inside attention beside heads and MLPs: scored to first order, or with the softmax computed again; and patched.

A node is `input`, a query `aL.hH<q>`, a key or value `aL.gG<k>`, `aL.gG<v>` (`aL.hH<k>` where every head has its own),
a head's mixed values `aL.hH`, or an MLP `mL`. Queries and keys are those the attention function gets: after rotary
embedding and norms.

Shapes: B pairs, T positions run, S keys, H query heads, G key/value heads of width K, P places, U nodes.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwater.core.attention import Handler, attention_session, method_session
from headwater.localize.engine.hooks import hand_on, on_input, on_output, on_port, replace_forward
from headwater.localize.engine.passes import Batch, Engine, Scored, can_narrow
from headwater.localize.engine.places import Places, Positions, places_of
from headwater.localize.graph import Graph

Parts = dict[str, Tensor]


def node_names(graph: Graph) -> list[str]:
    """Every node in order: input, then each layer's queries, keys, values, heads, MLP."""
    names = ["input"]
    for layer in range(graph.n_layers):
        names += graph.readers[graph.attention_readers_at(layer)]
        names += graph.sources[graph.heads_at(layer)]
        names.append(f"m{layer}")
    return names


def parts_of(graph: Graph, layer: int) -> dict[str, slice]:
    """Where the nodes of a layer lie in `node_names`, by part: q, k, v, z, mlp."""
    heads, groups = graph.n_heads, graph.n_kv_heads
    start = 1 + layer * (2 * heads + 2 * groups + 1)
    out = {}
    for part, size in (("q", heads), ("k", groups), ("v", groups), ("z", heads), ("mlp", 1)):
        out[part] = slice(start, start + size)
        start += size
    return out


@dataclass(eq=False)
class _Run:
    """One pass: by layer q [B, H, T, K], k and v [B, G, T, K], out [B, T, H, K], z and mlp as their modules have them.

    Under autograd they are tensors of its graph. fixed_q, fixed_k: how the output changes with the other run's queries,
    or its keys (by place).
    """

    embed: Tensor | None = None
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    out: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    pre: list[Tensor] = field(default_factory=list)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    fixed_q: list[Tensor] = field(default_factory=list)
    fixed_k: list[list[Tensor]] = field(default_factory=list)
    logits: Tensor | None = None


class AttentionNodes:
    """Scores and patches all nodes of one model, batch by batch.

    fix: queries and keys are scored with the softmax computed again, not by its gradient (Kramár et al., 2024).
    """

    def __init__(self, engine: Engine, metric: Scored, *, positions: Positions = "all", fix: bool = True) -> None:
        self.engine, self.metric, self.fix = engine, metric, fix
        self.positions: Positions = positions
        self.graph, self.layers = engine.wiring.graph, engine.wiring.layers
        self.names = node_names(self.graph)
        self.narrows = can_narrow(engine)

    # --- scores

    def scores(self, batch: Batch, *, drop: bool) -> tuple[Places, Tensor, Tensor, Tensor, Tensor]:
        """(places, scores [U, P, B], sizes [U, P, B], clean [B], corrupt [B]), float64 on the CPU.

        A score estimates how far the metric falls when the node carries its counterfactual value. A size is its
        absolute value or, with `drop`, the mean absolute value over passes back in each of which one layer's
        contribution to the gradient is dropped.
        """
        with self.engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, self.engine, batch)
            places = places_of(batch, self.positions)
            past = self.engine.prefix_cache(batch)
            with torch.no_grad():
                other = self._run(batch.corrupt[:, batch.prefix :], past)
            with torch.enable_grad():
                run = self._run(batch.clean[:, batch.prefix :], past, other=other, places=places)
                assert run.logits is not None and other.logits is not None
                reference = run.logits.detach()
                value = self.metric(batch, run.logits, reference)
                total = value.sum()
            clean, corrupt = value.detach(), self.metric(batch, other.logits, reference)
            size = len(batch)
            scores = torch.zeros(len(self.names), len(places.names), size, dtype=torch.float64)
            everything = list(range(len(self.layers)))
            wanted = [run.pre[0], *run.pre[1:], *(x for i in everything for x in self._wanted(run, i))]
            found = torch.autograd.grad(total, wanted, retain_graph=drop)
            streams, rest = found[: len(run.pre)], found[len(run.pre) :]
            self._score(scores, run, other, places, streams[0], rest, everything)
            sizes = self._dropped(scores, run, other, places, streams) if drop else scores.abs()
            return places, scores, sizes, clean.double().cpu(), corrupt.double().cpu()

    def _dropped(self, scores: Tensor, run: _Run, other: _Run, places: Places, streams: Sequence[Tensor]) -> Tensor:
        """[U, P, B]: mean |score| over the layers dropped, but for the node's own, whose dropping leaves it nothing.

        Above a dropped layer gradients are as they were, so each pass back begins there, from the stream behind it.
        """
        last = len(self.layers)
        total, counts = torch.zeros_like(scores), torch.zeros(len(scores), 1, 1, dtype=torch.float64)
        for layer in range(last):
            for above in range(layer + 1, last):
                own = self._all_of(above)
                total[own] += scores[own].abs()
                counts[own] += 1
            below = list(range(layer))
            one = torch.zeros_like(scores)
            wanted = [x for i in below for x in self._wanted(run, i)]
            behind = streams[layer + 1]
            entering, rest = behind, ()
            if layer:
                found = torch.autograd.grad(run.pre[layer], [run.pre[0], *wanted], behind, retain_graph=True)
                entering, rest = found[0], found[1:]
            self._score(one, run, other, places, entering, rest, below)
            touched = torch.tensor([0, *(u for i in below for u in range(*self._all_of(i).indices(len(scores))))])
            total[touched] += one[touched].abs()
            counts[touched] += 1
        return torch.where(counts > 0, total / counts.clamp(min=1), scores.abs())

    def _all_of(self, layer: int) -> slice:
        parts = parts_of(self.graph, layer)
        return slice(parts["q"].start, parts["mlp"].stop)

    def _wanted(self, run: _Run, index: int) -> list[Tensor]:
        inside = [run.out[index]] if self.fix else [run.q[index], run.k[index]]
        return [*inside, run.v[index], run.z[index], run.mlp[index]]

    def _score(
        self,
        scores: Tensor,
        run: _Run,
        other: _Run,
        places: Places,
        entering: Tensor,
        gradients: Sequence[Tensor],
        layers: Sequence[int],
    ) -> None:
        """Write the scores of these layers' nodes, and of the input, into `scores`."""
        assert run.embed is not None and other.embed is not None
        each = len(self._wanted(run, 0))
        scores[0] = self._placed(((run.embed - other.embed) * entering).sum(dim=-1)[None], places)[0]
        for index in layers:
            *inside, g_v, g_z, g_mlp = gradients[each * layers.index(index) : each * (layers.index(index) + 1)]
            at = parts_of(self.graph, index)
            if self.fix:
                (g_out,) = inside
                scores[at["q"]] = self._placed((run.fixed_q[index] * g_out).sum(dim=-1).permute(2, 0, 1), places)
                for place, change in enumerate(run.fixed_k[index]):
                    by_head = (change * g_out).sum(dim=(1, 3)).double().cpu()  # [B, H]
                    grouped = by_head.view(len(by_head), self.graph.n_kv_heads, -1).sum(dim=-1)
                    scores[at["k"], place] = grouped.T
            else:
                for part, g in zip("qk", inside, strict=True):
                    difference = getattr(run, part)[index] - getattr(other, part)[index]
                    scores[at[part]] = self._by_head(difference * g, places)
            scores[at["v"]] = self._by_head((run.v[index] - other.v[index]) * g_v, places)
            z = ((run.z[index] - other.z[index]) * g_z).unflatten(-1, (self.graph.n_heads, -1)).sum(dim=-1)
            scores[at["z"]] = self._placed(z.permute(2, 0, 1), places)
            mlp = ((run.mlp[index] - other.mlp[index]) * g_mlp).sum(dim=-1)
            scores[at["mlp"]] = self._placed(mlp.view(1, len(places.of), -1), places)

    def _by_head(self, products: Tensor, places: Places) -> Tensor:
        """[heads, P, B] of [B, heads, S, K], of which the last T keys are those run."""
        steps = places.of.shape[1]
        return self._placed(products.sum(dim=-1)[:, :, -steps:].transpose(0, 1), places)

    @staticmethod
    def _placed(scores: Tensor, places: Places) -> Tensor:
        """[u, P, B] of scores [u, B, T], or [u, B, 1] of what was run at the last position only."""
        scores = scores.detach().double().cpu()
        of = places.of[:, -scores.shape[2] :]
        return torch.stack([(scores * (of == i)).sum(dim=2) for i in range(len(places.names))], dim=1)

    # --- runs

    def _run(self, ids: Tensor, past: Any, *, other: _Run | None = None, places: Places | None = None) -> _Run:
        """One pass. other, places: the counterfactual's, to see how attention changes with its queries and keys."""
        run, recorded = _Run(), torch.is_grad_enabled()

        def attend(index: int, original: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, kw: Any) -> Any:
            result = original(module, q, k, v, mask, **kw)
            run.q.append(q)
            run.k.append(k)
            run.v.append(v)
            run.out.append(result[0])
            if self.fix and other is not None and places is not None:
                with torch.no_grad():
                    out = result[0].detach()
                    run.fixed_q.append(out - original(module, other.q[index], k, v, mask, **kw)[0])
                    run.fixed_k.append([])
                    for place in range(len(places.names)):
                        mixed = _mixed(k, other.k[index], places.mask(place)[:, None, :, None])
                        run.fixed_k[index].append(out - original(module, q, mixed, v, mask, **kw)[0])
            return result

        with ExitStack() as stack:
            if self.narrows:
                self.engine.narrow(stack)

            def enter(x: Tensor) -> Tensor | None:
                run.embed = x.detach()
                return run.embed.clone().requires_grad_(True) if recorded else None

            on_port(stack, self.layers[0].block.input, enter)
            self._watch(stack, run)
            attending(stack, self.engine, attend)
            run.logits = self.engine.forward(ids, past)
        return run

    def _watch(self, stack: ExitStack, run: _Run) -> None:
        for layer in self.layers:
            on_port(stack, layer.block.input, lambda x: run.pre.append(x))
            stack.callback(on_input(layer.attention.out_proj, lambda z: run.z.append(z)).remove)
            on_port(stack, layer.mlp.write.port, lambda y: run.mlp.append(y))
            module = layer.block.module
            on_output(stack, module, lambda y, module=module: run.outputs.__setitem__(module, y))
        on_port(stack, self.layers[-1].block.output, lambda x: run.pre.append(x))

    # --- patches

    def patched(self, batch: Batch, names: Sequence[str], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(the metric on the prompts [B], and with each set of nodes patched [sets, B]), float64 on the CPU.

        chosen: sets of nodes, each [U, places] bool over all nodes and the places `names`, whose values are taken from
        the counterfactual run while the rest is computed. Every run begins at the first layer that it changes.
        """
        with self.engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, self.engine, batch)
            places = places_of(batch, self.positions)
            past = self.engine.prefix_cache(batch)
            ids = batch.clean[:, batch.prefix :]
            fix, self.fix = self.fix, False
            try:
                other, run = self._run(batch.corrupt[:, batch.prefix :], past), self._run(ids, past)
            finally:
                self.fix = fix
            assert run.logits is not None
            columns = [names.index(name) for name in places.names]
            values = [
                self.metric(batch, self._patch(run, other, sel[:, columns], places, ids, past), run.logits)
                for sel in chosen
            ]
            clean = self.metric(batch, run.logits, run.logits)
            return clean.double().cpu(), torch.stack(values).double().cpu()

    def _patch(self, run: _Run, other: _Run, sel: Tensor, places: Places, ids: Tensor, past: Any) -> Tensor:
        """Logits [B, V] with the nodes `sel` [U, P] taken from the other run."""
        device = run.pre[0].device
        of = places.of
        live = [bool(sel[self._all_of(i)].any()) for i in range(len(self.layers))]
        if not bool(sel[0].any()) and not any(live):
            assert run.logits is not None
            return run.logits
        begins = 0 if bool(sel[0].any()) else live.index(True)

        def where(nodes: slice) -> Tensor:
            """[u, B, T]: which of a part's values are taken from the other run."""
            return sel[nodes][:, of].to(device)

        def attend(index: int, original: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, kw: Any) -> Any:
            at = parts_of(self.graph, index)
            q = _mixed(q, other.q[index], where(at["q"]).transpose(0, 1)[..., None])
            k = _mixed(k, other.k[index], where(at["k"]).transpose(0, 1)[..., None])
            v = _mixed(v, other.v[index], where(at["v"]).transpose(0, 1)[..., None])
            return original(module, q, k, v, mask, **kw)

        with ExitStack() as stack:
            if self.narrows:
                self.engine.narrow(stack)
            for index in range(begins):
                block = self.layers[index].block
                stream = run.pre[begins] if index == begins - 1 else None
                handed = hand_on(run.outputs[block.module], block.output.key, stream, block.input.key)
                replace_forward(stack, block.module, handed)
            if bool(sel[0].any()):
                mask = where(slice(0, 1))[0][..., None]
                assert other.embed is not None
                on_port(stack, self.layers[0].block.input, lambda x: torch.where(mask, other.embed, x))  # type: ignore[arg-type]
            for index, layer in enumerate(self.layers):
                if live[index]:
                    at = parts_of(self.graph, index)

                    def z(x: Tensor, index: int = index, at: dict[str, slice] = at) -> Tensor:
                        heads = self.graph.n_heads
                        mask = where(at["z"]).permute(1, 2, 0)[:, -x.shape[1] :, :, None]
                        own, theirs = (y.unflatten(-1, (heads, -1)) for y in (x, other.z[index]))
                        return torch.where(mask, theirs, own).flatten(-2)

                    def mlp(y: Tensor, index: int = index, at: dict[str, slice] = at) -> Tensor:
                        mask = where(at["mlp"])[0]
                        mask = mask if y.ndim == 2 else mask[:, -y.shape[1] :]
                        return torch.where(mask.reshape(*y.shape[:-1], 1), other.mlp[index], y)

                    stack.callback(on_input(layer.attention.out_proj, z).remove)
                    on_port(stack, layer.mlp.write.port, mlp)
            attending(stack, self.engine, attend, [i for i, yes in enumerate(live) if yes])
            return self.engine.forward(ids, past)


def attending(
    stack: ExitStack, engine: Engine, attend: Callable[..., Any], layers: Sequence[int] | None = None
) -> None:
    """Until `stack` closes, have `attend(layer, original, module, q, k, v, mask, kwargs)` do the layers' attention."""
    functions: dict[nn.Module, Handler] = {}
    methods: dict[nn.Module, Handler] = {}
    names: set[str] = set()
    shadowed: dict[nn.Module, str] = {}
    for index, layer in enumerate(engine.wiring.layers):
        if layers is not None and index not in layers:
            continue

        def handler(
            original: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, _at: int = index, **kw: Any
        ) -> Any:
            return attend(_at, original, module, q, k, v, mask, kw)

        attention = layer.attention
        if attention.method:
            methods[attention.module] = handler
            shadowed[attention.module] = attention.method
        else:
            functions[attention.module] = handler
            names.add(str(attention.module.config._attn_implementation))  # type: ignore[union-attr]
    if functions:
        stack.enter_context(attention_session(functions, names))
    if methods:
        stack.enter_context(method_session(methods, shadowed))


def _mixed(ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """`theirs` [B, heads, S, K] where `mask` [B, 1 or heads, T, 1] says so, at the last T positions."""
    ours, theirs, steps = ours.detach(), theirs.detach(), mask.shape[2]
    mask = mask.to(ours.device)
    if steps == ours.shape[2]:
        return torch.where(mask, theirs, ours)
    tail = torch.where(mask, theirs[:, :, -steps:], ours[:, :, -steps:])
    return torch.cat([ours[:, :, :-steps], tail], dim=2)

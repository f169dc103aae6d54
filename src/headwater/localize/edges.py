"""Exact edge attribution: every edge's score from a few passes and one matrix product a layer.

score(u -> r) = sum over positions of (write of u, clean - counterfactual) . d metric / d (stream as r reads it)

A head's query, key or value reads the stream through the block's norm and its rows of a projection, so its gradient is
rebuilt from the gradient of the projection's output: g_r W_r folded through the norm, whose Jacobian takes one rank-one
correction. Nothing is split by head in the forward, and no gradient of a weight is taken.

Shapes: N = B T positions run, D width, R attention readers of a layer, S sources.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.core.errors import ModelError
from headwater.localize.passes import Batch, Engine, Scored, Seen
from headwater.localize.wiring import Layer, PartName

PARTS: tuple[PartName, ...] = ("q", "k", "v")


@dataclass(eq=False)
class Gradients:
    """One recorded pass: what it saw, and the metric's gradients."""

    seen: Seen
    made: list[dict[object, Tensor]]
    mlp_in: list[Tensor]
    final: Tensor
    """[B, D], at the last position: the only one the metric reads."""


class EdgeScorer:
    """Scores all edges of a model's graph, batch by batch, into one [sources, readers] tensor."""

    def __init__(self, engine: Engine, metric: Scored) -> None:
        self.engine, self.metric = engine, metric
        self.graph, self.layers = engine.wiring.graph, engine.wiring.layers
        self.work = engine.work
        self.total = torch.zeros(self.graph.allowed.shape, dtype=torch.float64)
        self._clean: list[Tensor] = []
        self._corrupt: list[Tensor] = []
        self._folded: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}
        self._written: dict[int, Tensor] = {}

    @property
    def mean_clean(self) -> float:
        """The metric's mean on the prompts seen so far."""
        return float(torch.cat(self._clean).double().mean())

    @property
    def mean_corrupt(self) -> float:
        """The metric's mean on their counterfactuals."""
        return float(torch.cat(self._corrupt).double().mean())

    # --- one batch

    def add(self, batch: Batch, nodes: Sequence[tuple[float, float]]) -> None:
        """Add a batch's scores: the gradient averaged over `nodes` (place between counterfactual 0 and clean 1,
        weight).

        One node at 1 is EAP. A node at 0 is the counterfactual run itself, which is run anyway.
        """
        engine, at = self.engine, dict(nodes)
        with engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, engine, batch)
            past = engine.prefix_cache(batch)
            clean_ids, corrupt_ids = batch.clean[:, batch.prefix :], batch.corrupt[:, batch.prefix :]
            recorded: list[tuple[Gradients, float]] = []
            clean = engine.run(clean_ids, past, gradients=1.0 in at)
            assert clean.logits is not None and clean.embed is not None
            reference = clean.logits.detach()
            if 1.0 in at:
                recorded.append((self._gradients(batch, clean, reference), at[1.0]))
            corrupt = engine.run(corrupt_ids, past, gradients=0.0 in at)
            assert corrupt.embed is not None
            self._clean.append(self.metric(batch, reference, reference))
            self._corrupt.append(self.metric(batch, corrupt.logits.detach(), reference))  # type: ignore[union-attr]
            if 0.0 in at:
                recorded.append((self._gradients(batch, corrupt, reference), at[0.0]))
            between = [node for node in at if node not in (0.0, 1.0)]
            if len(at) == 1 and recorded:
                self._contract_at_once(clean, corrupt, recorded[0])
                return
            held = _ReaderGradients(self, clean)
            for gradients, weight in recorded:
                held.add(gradients, weight)
            recorded.clear()
            step = clean.embed - corrupt.embed
            for node in between:
                seen = engine.run(
                    clean_ids, past, enter=lambda _, start=corrupt.embed, node=node: start + node * step, gradients=True
                )
                held.add(self._gradients(batch, seen, reference), at[node])
            self._contract(clean, corrupt, held)

    def _gradients(self, batch: Batch, seen: Seen, reference: Tensor) -> Gradients:
        assert seen.logits is not None and seen.final is not None
        made = [(index, module) for index, layer in enumerate(self.layers) for module in layer.projections]
        wanted = [*(seen.made[i][m] for i, m in made), *seen.mlp_in, seen.final]
        with torch.enable_grad():
            value = self.metric(batch, seen.logits, reference).sum()
        found = torch.autograd.grad(value, wanted)
        by_layer: list[dict[object, Tensor]] = [{} for _ in self.layers]
        for (index, module), gradient in zip(made, found, strict=False):
            by_layer[index][module] = gradient
        # the graph goes with its last tensors
        seen.made = [{m: y.detach() for m, y in layer.items()} for layer in seen.made]
        mlp_in = list(found[len(made) : len(made) + len(seen.mlp_in)])
        seen.mlp_in, seen.logits = [], seen.logits.detach()
        seen.final = seen.final.detach()
        return Gradients(seen, by_layer, mlp_in, found[-1][:, -1].to(self.work))

    # --- readers

    def reader_gradients(self, index: int, gradients: Gradients, weight: float, out: Tensor, *, fresh: bool) -> None:
        """Write (or, not `fresh`, add) into `out` [R, N, D] the gradient at the stream of each query, key and value."""
        layer = self.layers[index]
        known = layer.norm.kind in ("rms", "layer")
        x = _flat(gradients.seen.attn_stream[index]).to(self.work)
        x_hat, inverse = layer.norm.standardize(x) if known else (x, None)
        first = 0
        for name in PARTS:
            part = layer.parts[name]
            heads, width = part.rows.shape
            folded, offset = self._fold(index, name)
            columns = part.rows.flatten()
            g = _flat(gradients.made[index][part.projection])[:, columns].to(self.work)
            g = g * (weight * inverse) if inverse is not None else g * weight
            g = g.view(-1, heads, width).transpose(0, 1)
            target = out[first : first + heads]
            first += heads
            if layer.norm.kind == "module":
                for head, matrix in enumerate(folded):
                    pulled = layer.norm.vjp(g[head] @ matrix, _flat(gradients.seen.attn_stream[index]))
                    target[head] = pulled if fresh else target[head] + pulled
                continue
            torch.bmm(g, folded, out=target) if fresh else target.baddbmm_(g, folded)
            if known:
                made = _flat(gradients.seen.made[index][part.projection])[:, columns].to(self.work)
                made = made.view(-1, heads, width).transpose(0, 1)
                made = made if offset is None else made - offset[:, None]
                # (g W') . x_hat = g . (W' x_hat), and W' x_hat is the projection's own output without its constant
                along = (g * made).sum(dim=-1, keepdim=True) / x.shape[-1]
                target.addcmul_(along, x_hat[None], value=-1)

    def mlp_gradient(self, index: int, gradients: Gradients, weight: float) -> Tensor:
        """[N, D]: the gradient at the stream as the MLP reads it."""
        norm = self.layers[index].mlp_norm
        x = _flat(gradients.seen.mlp_stream[index])
        x = x if norm.kind == "module" else x.to(self.work)
        return norm.vjp(_flat(gradients.mlp_in[index]).to(self.work), x) * weight

    def _fold(self, index: int, name: PartName) -> tuple[Tensor, Tensor | None]:
        """(weights [heads, K, D] as they read the standardized stream, what they give where that is 0)."""
        if (index, name) not in self._folded:
            layer = self.layers[index]
            part, norm = layer.parts[name], layer.norm
            weight, constant = part.weight(self.work), part.bias(self.work)
            if norm.kind in ("rms", "layer"):
                shift = norm.bias(self.work)
                if shift is not None:
                    constant = weight @ shift if constant is None else constant + weight @ shift
                weight = norm.fold(weight)
            self._folded[index, name] = weight.contiguous(), constant
        return self._folded[index, name]

    # --- sources

    def write_differences(self, index: int, clean: Seen, corrupt: Seen, out: Tensor) -> None:
        """Write into `out` [H + 1, N, D] what each head and the MLP of a layer write more in the clean run."""
        layer, heads = self.layers[index], self.graph.n_heads
        torch.bmm(
            head_values(layer, clean, index, self.work) - head_values(layer, corrupt, index, self.work),
            self.out_weight(index),
            out=out[:heads],
        )
        constant = post_norm_constant(layer, clean, corrupt, index, self.work)
        if constant is not None:
            out[:heads] += constant / heads
        difference = _flat(clean.mlp_out[index]).to(self.work) - _flat(corrupt.mlp_out[index]).to(self.work)
        out[heads] = difference * layer.mlp.write.scale

    def out_weight(self, index: int) -> Tensor:
        """[H, K, D]: from a head's values (scaled as `head_values` gives them) to what it adds to the stream."""
        if index not in self._written:
            layer = self.layers[index]
            weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach().to(self.work))
            self._written[index] = (weight * layer.attention.write.scale).contiguous()
        return self._written[index]

    # --- all edges

    def _contract_at_once(self, clean: Seen, corrupt: Seen, one: tuple[Gradients, float]) -> None:
        """One recorded pass: each layer's reader gradients are made, used, and overwritten by the next layer's."""
        gradients, weight = one
        readers = self.graph.per_layer
        assert clean.embed is not None
        rows = torch.empty(readers + 1, *_flat(clean.embed).shape, dtype=self.work, device=clean.embed.device)

        def rows_of(index: int) -> Tensor:
            # sequential: the MLP of the layer before reads what this layer's attention reads, but for itself
            if self.graph.parallel:
                rows[readers] = self.mlp_gradient(index, gradients, weight)
                self.reader_gradients(index, gradients, weight, rows[:readers], fresh=True)
                return rows
            if index:
                rows[0] = self.mlp_gradient(index - 1, gradients, weight)
            if index < len(self.layers):
                self.reader_gradients(index, gradients, weight, rows[1:], fresh=True)
            return rows[0 if index else 1 : readers + 1 if index < len(self.layers) else 1]

        self._score_layers(clean, corrupt, rows_of, gradients.final * weight)

    def _check_sum(self, written: Tensor, clean: Seen, corrupt: Seen) -> None:
        """What the sources write more must be how the final streams differ, [B, D] at the last position."""
        assert clean.final is not None and corrupt.final is not None
        whole = (clean.final[:, -1] - corrupt.final[:, -1]).to(self.work)
        error = float((written - whole).norm() / whole.norm().clamp(min=1e-9))
        if not error <= {torch.float64: 1e-6, torch.float32: 1e-2}.get(clean.final.dtype, 0.2):
            raise ModelError(
                f"{type(self.engine.hf).__name__}: the stream is not the sum of what heads and MLPs write to it",
                got=f"relative difference {error:.2g}",
                fix="Patch its sites with model.run and interventions instead",
            )

    def _contract(self, clean: Seen, corrupt: Seen, held: "_ReaderGradients") -> None:
        self._score_layers(clean, corrupt, held.rows_of, held.final)

    def _score_layers(self, clean: Seen, corrupt: Seen, rows_of: Callable[[int], Tensor], final: Tensor) -> None:
        assert clean.embed is not None and corrupt.embed is not None
        graph, last = self.graph, len(self.layers)
        entering = _flat(clean.embed).to(self.work) - _flat(corrupt.embed).to(self.work)
        sources = torch.empty(len(graph.sources), *entering.shape, dtype=self.work, device=entering.device)
        sources[0] = entering
        flat = sources.view(len(graph.sources), -1)
        for index in range(last if graph.parallel else last + 1):
            before = graph.sources_before(index) if index < last else len(graph.sources)
            rows = rows_of(index)
            scores = (flat[:before] @ rows.reshape(len(rows), -1).T).double().cpu()
            at = graph.attention_readers_at(index).start if index < last else graph.mlp_reader_at(last - 1) + 1
            if not graph.parallel and index:
                at -= 1  # the row before the attention's is the MLP of the layer before
                scores[before - 1, 0] = 0.0  # which does not read itself
            self.total[:before, at : at + len(rows)] += scores
            if index < last:
                self.write_differences(index, clean, corrupt, sources[before : before + graph.n_heads + 1])
        batch = final.shape[0]
        at_last = sources.view(len(graph.sources), batch, -1, entering.shape[-1])[:, :, -1]
        self._check_sum(at_last.sum(dim=0), clean, corrupt)
        self.total[:, -1] += (at_last.reshape(len(graph.sources), -1) @ final.flatten()).double().cpu()


class _ReaderGradients:
    """Gradients of all readers summed over several recorded passes, so that edges are scored once.

    rows: [readers - 1, N, D], every reader but the logits; final: [B, D], the logits' at the last position.
    """

    def __init__(self, scorer: EdgeScorer, like: Seen) -> None:
        assert like.embed is not None
        shape = _flat(like.embed).shape
        self.scorer, self.graph = scorer, scorer.graph
        self.rows = torch.empty(len(self.graph.readers) - 1, *shape, dtype=scorer.work, device=like.embed.device)
        self.final: Tensor = torch.zeros(like.embed.shape[0], shape[-1], dtype=scorer.work, device=like.embed.device)
        self._empty = True

    def add(self, gradients: Gradients, weight: float) -> None:
        for index in range(self.graph.n_layers):
            at = self.graph.attention_readers_at(index)
            self.scorer.reader_gradients(index, gradients, weight, self.rows[at], fresh=self._empty)
            mlp = self.scorer.mlp_gradient(index, gradients, weight)
            place = self.graph.mlp_reader_at(index)
            self.rows[place] = mlp if self._empty else self.rows[place] + mlp
        self.final += gradients.final * weight
        self._empty = False

    def rows_of(self, index: int) -> Tensor:
        if index == self.graph.n_layers:
            return self.rows[-1:]
        at = self.graph.attention_readers_at(index)
        if self.graph.parallel:
            return self.rows[at.start : at.stop + 1]
        return self.rows[at.start - (1 if index else 0) : at.stop]


def head_values(layer: Layer, seen: Seen, index: int, work: torch.dtype) -> Tensor:
    """[H, N, K]: each head's mixed values, over the deviation that a norm after the output projection divides by."""
    z = _flat(seen.z[index]).to(work)
    if layer.post_norm.module is not None:
        _, inverse = layer.post_norm.standardize(_flat(seen.mixed[index]).to(work))
        z = z * inverse
    return z.view(len(z), layer.attention.n_heads, -1).transpose(0, 1)


def post_norm_constant(layer: Layer, clean: Seen, corrupt: Seen, index: int, work: torch.dtype) -> Tensor | None:
    """[N, D]: how the output projection's bias, divided by that deviation, differs; None where it does not."""
    bias = getattr(layer.attention.out_proj, "bias", None)
    if layer.post_norm.module is None or bias is None:
        return None
    ours, theirs = (layer.post_norm.standardize(_flat(s.mixed[index]).to(work))[1] for s in (clean, corrupt))
    return (ours - theirs) * layer.post_norm.fold(bias.detach().to(work)) * layer.attention.write.scale


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

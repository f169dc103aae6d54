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
from headwater.localize.engine.passes import Batch, Engine, Scored, Seen, can_narrow
from headwater.localize.engine.places import Places, Positions, places_of
from headwater.localize.engine.wiring import PartName
from headwater.localize.engine.writes import (
    Fixed,
    Other,
    constant_differences,
    embed_differences,
    head_differences,
    head_values,
    mlp_differences,
    post_norm_constant,
)

__all__ = ["PARTS", "EdgeScorer", "Gradients", "ReaderGradients", "head_values", "post_norm_constant"]

PARTS: tuple[PartName, ...] = ("q", "k", "v")


@dataclass(eq=False)
class Gradients:
    """One recorded pass: what it saw, and the metric's gradients."""

    seen: Seen
    made: list[dict[object, Tensor]]
    """By layer; empty for a layer whose queries, keys and values the pass did not differentiate by."""
    mlp_in: list[Tensor | None]
    final: Tensor
    """[B, D], at the last position: the only one the metric reads."""


class EdgeScorer:
    """Scores all edges of a model's graph, batch by batch, into one [sources, readers] tensor `total`.

    positions: which tokens are summed apart, into `places`: place -> [sources, readers]. fixed: what writes are
    compared with in place of the counterfactual's. The last block runs at the last position only where it can.
    """

    def __init__(
        self, engine: Engine, metric: Scored, *, positions: Positions = "all", fixed: Fixed | None = None
    ) -> None:
        self.engine, self.metric = engine, metric
        self.graph, self.layers = engine.wiring.graph, engine.wiring.layers
        self.work, self.fixed = engine.work, fixed
        self.positions: Positions = positions
        self.narrows = can_narrow(engine)
        self.total = torch.zeros(self.graph.allowed.shape, dtype=torch.float64)
        self.places: dict[str, Tensor] = {}
        self._clean: list[Tensor] = []
        self._corrupt: list[Tensor] = []
        self._folded: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}
        self._written: dict[int, Tensor] = {}

    @property
    def mean_clean(self) -> float:
        """The metric's mean on the prompts seen so far."""
        return float(torch.cat(self._clean).double().mean())

    @property
    def mean_corrupt(self) -> float | None:
        """The metric's mean on their counterfactuals; None where these were not run."""
        return float(torch.cat(self._corrupt).double().mean()) if self._corrupt else None

    def note_clean(self, batch: Batch, logits: Tensor) -> None:
        """Count a batch's metric on the prompts into `mean_clean`."""
        self._clean.append(self.metric(batch, logits, logits))

    def note_corrupt(self, batch: Batch, seen: Seen, reference: Tensor) -> None:
        """Count a batch's metric on the counterfactuals into `mean_corrupt`."""
        assert seen.logits is not None
        self._corrupt.append(self.metric(batch, seen.logits.detach(), reference))

    # --- one batch

    def add(self, batch: Batch, nodes: Sequence[tuple[float, float]]) -> None:
        """Add a batch's scores: the gradient averaged over `nodes` (place between counterfactual 0 and clean 1,
        weight).

        One node at 1 is EAP. A node at 0 is the counterfactual run itself, which is run anyway.
        """
        engine, at = self.engine, dict(nodes)
        with engine.open(), ExitStack() as stack:
            batch = self.metric.narrowed(stack, engine, batch)
            places = places_of(batch, self.positions)
            past = engine.prefix_cache(batch)
            clean_ids, corrupt_ids = batch.clean[:, batch.prefix :], batch.corrupt[:, batch.prefix :]
            recorded: list[tuple[Gradients, float]] = []
            clean = engine.run(clean_ids, past, gradients=1.0 in at, narrow=self.narrows)
            assert clean.logits is not None and clean.embed is not None
            reference = clean.logits.detach()
            if 1.0 in at:
                recorded.append((self._gradients(batch, clean, reference), at[1.0]))
            self.note_clean(batch, reference)
            if self.fixed is not None:
                self.contract_once(clean, self.fixed, recorded[0], places)
                return
            corrupt = engine.run(corrupt_ids, past, gradients=0.0 in at, narrow=self.narrows)
            assert corrupt.embed is not None
            self.note_corrupt(batch, corrupt, reference)
            if 0.0 in at:
                recorded.append((self._gradients(batch, corrupt, reference), at[0.0]))
            between = [node for node in at if node not in (0.0, 1.0)]
            if len(at) == 1 and recorded:
                self.contract_once(clean, corrupt, recorded[0], places)
                return
            held = ReaderGradients(self, clean)
            for gradients, weight in recorded:
                held.add(gradients, weight)
            recorded.clear()
            step = clean.embed - corrupt.embed
            for node in between:

                def enter(_: Tensor, start: Tensor = corrupt.embed, node: float = node) -> Tensor:
                    return start + node * step

                seen = engine.run(clean_ids, past, enter=enter, gradients=True, narrow=self.narrows)
                held.add(self._gradients(batch, seen, reference), at[node])
            self.contract(clean, corrupt, held, places)

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
        mlp_in: list[Tensor | None] = list(found[len(made) : len(made) + len(seen.mlp_in)])
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

    def mlp_gradient(self, index: int, gradients: Gradients, weight: float, n: int) -> Tensor:
        """[N, D]: the gradient at the stream as the MLP reads it; `n` is N."""
        norm = self.layers[index].mlp_norm
        grad, x = gradients.mlp_in[index], gradients.seen.mlp_stream[index]
        assert grad is not None
        if grad.shape[1] < x.shape[1]:
            x = x[:, -1:]
        x = _flat(x)
        x = x if norm.kind == "module" else x.to(self.work)
        pulled = norm.vjp(_flat(grad).to(self.work), x) * weight
        return pulled if len(pulled) == n else self._at_last(pulled, n)

    @staticmethod
    def _at_last(x: Tensor, n: int) -> Tensor:
        """[..., N, D] of what was run at the last position only [..., B, D]; elsewhere nothing reads it."""
        size = x.shape[-2]
        out = x.new_zeros(*x.shape[:-2], size, n // size, x.shape[-1])
        out[..., -1, :] = x
        return out.flatten(-3, -2)

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

    def write_differences(self, index: int, clean: Seen, other: Other, out: Tensor) -> None:
        """Write into `out` [H + 1, N, D] what each head and the MLP of a layer write more in the clean run."""
        layer, heads = self.layers[index], self.graph.n_heads
        values = head_differences(layer, clean, other, index, self.work)
        constant = constant_differences(layer, clean, other, index, self.work)
        mlp = mlp_differences(clean, other, index, self.work) * layer.mlp.write.scale
        if values.shape[1] == out.shape[1]:
            torch.bmm(values, self.out_weight(index), out=out[:heads])
        else:
            out[:heads] = self._at_last(torch.bmm(values, self.out_weight(index)), out.shape[1])
        if constant is not None:
            constant = constant if len(constant) == out.shape[1] else self._at_last(constant, out.shape[1])
            out[:heads] += constant / heads
        out[heads] = mlp if len(mlp) == out.shape[1] else self._at_last(mlp, out.shape[1])

    def out_weight(self, index: int) -> Tensor:
        """[H, K, D]: from a head's values (scaled as `head_values` gives them) to what it adds to the stream."""
        if index not in self._written:
            layer = self.layers[index]
            weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach().to(self.work))
            self._written[index] = (weight * layer.attention.write.scale).contiguous()
        return self._written[index]

    # --- all edges

    def contract_once(self, clean: Seen, other: Other, one: tuple[Gradients, float], places: Places) -> None:
        """One recorded pass: each layer's reader gradients are made, used, and overwritten by the next layer's."""
        gradients, weight = one
        readers = self.graph.per_layer
        assert clean.embed is not None
        rows = torch.empty(readers + 1, *_flat(clean.embed).shape, dtype=self.work, device=clean.embed.device)

        def rows_of(index: int) -> Tensor:
            # sequential: the MLP of the layer before reads what this layer's attention reads, but for itself
            if self.graph.parallel:
                rows[readers] = self.mlp_gradient(index, gradients, weight, rows.shape[1])
                self.reader_gradients(index, gradients, weight, rows[:readers], fresh=True)
                return rows
            if index:
                rows[0] = self.mlp_gradient(index - 1, gradients, weight, rows.shape[1])
            if index < len(self.layers):
                self.reader_gradients(index, gradients, weight, rows[1:], fresh=True)
            return rows[0 if index else 1 : readers + 1 if index < len(self.layers) else 1]

        self._score_layers(clean, other, rows_of, gradients.final * weight, places)

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

    def contract(self, clean: Seen, other: Other, held: "ReaderGradients", places: Places) -> None:
        """Add the scores of all edges: what each source writes more, times the gradients held for each reader."""
        self._score_layers(clean, other, held.rows_of, held.final, places)

    def contract_site(
        self, sources: slice, written: Tensor, readers: slice, held: "ReaderGradients", places: Places
    ) -> None:
        """Add the scores of some sources, which write `written` [s, N, D] more, for some readers (and the logits)."""
        grouped = _Grouped.of(places, written.device)
        rows = grouped.sorted(held.rows[readers])
        given = grouped.sorted(written)
        for name, start, stop in grouped.ranges:
            scores = given[:, start:stop].flatten(1) @ rows[:, start:stop].flatten(1).T
            self._sum_up(name, sources, readers, scores.double().cpu())
        size = len(held.final)
        at_last = written.view(len(written), size, -1, written.shape[-1])[:, :, -1]
        self._sum_up_last(sources, at_last, held.final, places)

    def _score_layers(
        self, clean: Seen, other: Other, rows_of: Callable[[int], Tensor], final: Tensor, places: Places
    ) -> None:
        graph, last = self.graph, len(self.layers)
        entering = embed_differences(clean, other, self.work)
        sources = torch.empty(len(graph.sources), *entering.shape, dtype=self.work, device=entering.device)
        grouped = _Grouped.of(places, entering.device)
        sources[0] = grouped.sorted(entering)
        at_last = torch.empty(
            len(graph.sources), len(final), entering.shape[-1], dtype=self.work, device=entering.device
        )

        def keep_last(new: slice | int, written: Tensor) -> None:
            at_last[new] = written.view(*written.shape[:-2], len(final), -1, written.shape[-1])[..., -1, :]

        keep_last(0, entering)
        for index in range(last if graph.parallel else last + 1):
            before = graph.sources_before(index) if index < last else len(graph.sources)
            rows = grouped.sorted(rows_of(index))
            at = graph.attention_readers_at(index).start if index < last else graph.mlp_reader_at(last - 1) + 1
            if not graph.parallel and index:
                at -= 1  # the row before the attention's is the MLP of the layer before
            for name, start, stop in grouped.ranges:
                scores = sources[:before, start:stop].flatten(1) @ rows[:, start:stop].flatten(1).T
                scores = scores.double().cpu()
                if not graph.parallel and index:
                    scores[before - 1, 0] = 0.0  # which does not read itself
                self._sum_up(name, slice(0, before), slice(at, at + len(rows)), scores)
            if index < last:
                new = slice(before, before + graph.n_heads + 1)
                self.write_differences(index, clean, other, sources[new])
                keep_last(new, sources[new])
                if grouped.order is not None:
                    sources[new] = grouped.sorted(sources[new])
        if isinstance(other, Seen):
            self._check_sum(at_last.sum(dim=0), clean, other)
        self._sum_up_last(slice(0, len(graph.sources)), at_last, final, places)

    def _sum_up_last(self, sources: slice, at_last: Tensor, final: Tensor, places: Places) -> None:
        """Add the scores of the logits as reader: [s, B, D] writes at the last position times the gradient there."""
        by_pair = (at_last * final).sum(dim=-1).double().cpu()
        for place, name in enumerate(places.names):
            here = places.of[:, -1] == place
            if bool(here.any()):
                self._sum_up(name, sources, slice(-1, None), by_pair[:, here].sum(dim=1)[:, None])

    def _sum_up(self, name: str, sources: slice, readers: slice, scores: Tensor) -> None:
        self.total[sources, readers] += scores
        if self.positions != "all":
            self.places.setdefault(name, torch.zeros_like(self.total))[sources, readers] += scores


@dataclass(eq=False)
class _Grouped:
    """Tokens sorted by place, so that each place is one range of them: (name, start, stop)."""

    order: Tensor | None
    ranges: list[tuple[str, int, int]]

    @classmethod
    def of(cls, places: Places, device: torch.device) -> "_Grouped":
        flat = places.of.flatten()
        if len(places.names) == 1:
            return cls(None, [(places.names[0], 0, len(flat))])
        ends = torch.bincount(flat, minlength=len(places.names)).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        ranges = [(name, a, b) for name, a, b in zip(places.names, starts, ends, strict=True) if a < b]
        return cls(torch.argsort(flat, stable=True).to(device), ranges)

    def sorted(self, x: Tensor) -> Tensor:
        """[..., N, D] in the order of places."""
        return x if self.order is None else x.index_select(-2, self.order)


class ReaderGradients:
    """Gradients of all readers summed over several recorded passes, so that edges are scored once.

    rows: [readers - 1, N, D], every reader but the logits; final: [B, D], the logits' at the last position.
    """

    def __init__(self, scorer: EdgeScorer, like: Seen) -> None:
        assert like.embed is not None
        shape = _flat(like.embed).shape
        self.scorer, self.graph = scorer, scorer.graph
        self.rows = torch.empty(len(self.graph.readers) - 1, *shape, dtype=scorer.work, device=like.embed.device)
        self.final: Tensor = torch.zeros(like.embed.shape[0], shape[-1], dtype=scorer.work, device=like.embed.device)
        self._fresh = [True] * (2 * self.graph.n_layers)

    def clear(self) -> None:
        """Forget what was summed."""
        self._fresh = [True] * (2 * self.graph.n_layers)
        self.final.zero_()

    def add(
        self,
        gradients: Gradients,
        weight: float,
        *,
        shares: Callable[[int, bool], float] = lambda layer, mlp: 1.0,
        final: float = 1.0,
    ) -> None:
        """Add one pass times `weight`, and times a share that a reader's layer and kind (MLP or attention) may have.

        final: the logits' share.
        """
        for index in range(self.graph.n_layers):
            if gradients.made[index]:
                rows = self.rows[self.graph.attention_readers_at(index)]
                fresh, self._fresh[2 * index] = self._fresh[2 * index], False
                share = weight * shares(index, False)
                self.scorer.reader_gradients(index, gradients, share, rows, fresh=fresh)
            if gradients.mlp_in[index] is not None:
                place, share = self.graph.mlp_reader_at(index), weight * shares(index, True)
                mlp = self.scorer.mlp_gradient(index, gradients, share, self.rows.shape[1])
                fresh, self._fresh[2 * index + 1] = self._fresh[2 * index + 1], False
                self.rows[place] = mlp if fresh else self.rows[place] + mlp
        self.final += gradients.final * (weight * final)

    def finished(self) -> "ReaderGradients":
        """With zeros for every reader that no pass had a gradient for."""
        for index in range(self.graph.n_layers):
            if self._fresh[2 * index]:
                self.rows[self.graph.attention_readers_at(index)] = 0
            if self._fresh[2 * index + 1]:
                self.rows[self.graph.mlp_reader_at(index)] = 0
        return self

    def rows_of(self, index: int) -> Tensor:
        if index == self.graph.n_layers:
            return self.rows[-1:]
        at = self.graph.attention_readers_at(index)
        if self.graph.parallel:
            return self.rows[at.start : at.stop + 1]
        return self.rows[at.start - (1 if index else 0) : at.stop]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

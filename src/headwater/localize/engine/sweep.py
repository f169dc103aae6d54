"""Many patches of one model at the least cost: each starts where it first changes something.

`schedule.py` decides where; here the base run and the other run are recorded once a batch of pairs, each patch's start
is built from them, and what a run changes after its start is put in by hooks. The unembedding reads the last position
only.

Shapes: B pairs, T positions of the prompt, D width, R patches stacked.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.localize.engine.hooks import hand_on, on_input, on_output, on_port, replace_forward
from headwater.localize.engine.passes import Batch, Engine, Scored, can_narrow, copied
from headwater.localize.engine.schedule import (
    ATTENTION,
    HEADED,
    KINDS,
    MLP,
    STREAM,
    Begin,
    Chunk,
    Geometry,
    Joint,
    Kind,
    Patch,
    Planned,
    Target,
)

__all__ = ["HEADED", "KINDS", "Edit", "Job", "Joint", "Kind", "Patch", "Record", "Sweep", "Target", "record_run"]


@dataclass(eq=False)
class Record:
    """One run: streams before each block and after the last, what heads mix and sub-layers give, whole outputs."""

    streams: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    made: list[dict[nn.Module, Tensor]] = field(default_factory=list)
    """Outputs of the query, key and value projections; kept only where asked for."""
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    logits: Tensor | None = None


Point = Literal["stream", "made", "z", "attention", "mid", "mlp_in", "mlp"]
_POINTS: tuple[Point, ...] = ("stream", "made", "z", "attention", "mid", "mlp_in", "mlp")


@dataclass(frozen=True, eq=False)
class Edit:
    """A value that takes the place of what passes a point of a run, [B, T', width] for its last T' positions.

    where: [B, T] bool, None for everywhere. columns: of the last axis, None for all. "mid" is the stream behind
    attention, "made" what a projection gives, "mlp_in" what the MLP reads after its norm.
    """

    point: Point
    layer: int
    value: Tensor
    where: Tensor | None = None
    columns: Tensor | slice | None = None
    module: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """A run made ready: where it starts, what it starts with ([B, T - first, D]), and what it changes on its way."""

    key: Hashable
    begin: Begin
    build: Callable[[int], Tensor]
    edits: tuple[Edit, ...] = ()


def record_run(
    engine: Engine, ids: Tensor, past: Any = None, *, cached: bool = False, made: bool = False
) -> tuple[Record, Any]:
    """(a run of tokens [B, T] as it was, its keys and values if `cached`). made: queries, keys and values too."""
    record = Record()
    layers = engine.wiring.layers
    with ExitStack() as stack:
        for layer in layers:
            on_port(stack, layer.block.input, lambda x: record.streams.append(x))
            stack.callback(on_input(layer.attention.out_proj, lambda z: record.z.append(z)).remove)
            on_output(stack, layer.attention.out_proj, lambda y: record.mixed.append(y))
            on_port(stack, layer.attention.write.port, lambda y: record.attention.append(y))
            on_port(stack, layer.mlp.write.port, lambda y: record.mlp.append(y))
            for module in (layer.block.module, layer.attention.module):
                on_output(stack, module, lambda y, module=module: record.outputs.__setitem__(module, y))
            if made:
                own: dict[nn.Module, Tensor] = {}
                record.made.append(own)
                for module in layer.projections:
                    on_output(stack, module, lambda y, own=own, module=module: own.__setitem__(module, y))
        on_port(stack, layers[-1].block.output, lambda x: record.streams.append(x))
        if cached:
            from transformers import DynamicCache

            past = DynamicCache(config=engine.hf.config)
            record.logits = engine.hf(
                input_ids=ids.to(engine.model.device), past_key_values=past, use_cache=True
            ).logits[:, -1]
        else:
            record.logits = engine.forward(ids, past)
    return record, past if cached else None


Fill = Callable[["Sweep"], Record]
"""Makes the record of the other run, where that is no run of these prompts."""


class Sweep:
    """Patches one batch of pairs: values of the other run put into the base run.

    metric: one, or several that are read off the same logits; values are [B], or [metrics, B]. noise: [B, T, D], added
    to the embeddings of the corrupt run, whose tokens are then the prompt's own. fill: makes the other run's record.
    made: record queries, keys and values too.
    """

    def __init__(
        self,
        engine: Engine,
        metric: Scored | Sequence[Scored],
        batch: Batch,
        *,
        base_is_clean: bool,
        reuse: bool,
        noise: Tensor | None = None,
        fill: Fill | None = None,
        made: bool = False,
    ) -> None:
        self.engine, self.batch = engine, batch
        self.metrics = (metric,) if isinstance(metric, Scored) else tuple(metric)
        self._one = isinstance(metric, Scored)
        self.layers = engine.wiring.layers
        self.narrows = can_narrow(engine)  # measured here, before any hook of a sweep is in
        corrupt_ids = batch.corrupt if noise is None else batch.clean
        self.base_ids, other_ids = (batch.clean, corrupt_ids) if base_is_clean else (corrupt_ids, batch.clean)
        self.length = self.base_ids.shape[1]
        with self._noised(None if base_is_clean else noise):
            self.base, self.past = record_run(engine, self.base_ids, cached=reuse, made=made)
        if self.past is not None and any(layer.keys.shape[-2] != self.length for layer in self.past.layers):
            self.past = None  # a window dropped keys: every run then goes through all positions
        self.prefix = batch.prefix if self.past is not None else 0
        if fill is None:
            before = self._cache(self.prefix, 1, 0) if self.prefix else None
            late = None if noise is None or not base_is_clean else noise[:, self.prefix :]
            with self._noised(late):
                self.other, _ = record_run(engine, other_ids[:, self.prefix :], before, made=made)
            end = self.other.logits
        else:
            end = engine.forward(other_ids)
            self.other = fill(self)
        clean = self.base.logits if base_is_clean else end
        assert clean is not None and self.base.logits is not None and end is not None
        self.reference = clean
        self.geometry = geometry_of(engine, batch, cached=self.past is not None)
        self.base_value, self.other_value = self.score(self.base.logits), self.score(end)

    def score(self, logits: Tensor) -> Tensor:
        """[B], or of several metrics [metrics, B], of logits [B, V]."""
        values = [metric(self.batch, logits, self.reference) for metric in self.metrics]
        return values[0] if self._one else torch.stack([value.double() for value in values])

    # --- the two runs

    def _noised(self, noise: Tensor | None) -> ExitStack:
        stack = ExitStack()
        if noise is not None:
            embedding = self.engine.hf.get_input_embeddings()
            on_output(stack, embedding, lambda y: y + noise.to(y))
        return stack

    def _cache(self, first: int, repeats: int, start: int) -> Any:
        """The base run's keys and values before position `first`, for `repeats` patches; of blocks from `start` on."""
        new = copied(self.past)
        for index, layer in enumerate(new.layers):
            layer.keys, layer.values = (
                _stacked(x[:, :, :first], repeats if index >= start else 1) for x in (layer.keys, layer.values)
            )
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = copy.copy(first)
        return new

    # --- patches

    def values(self, patches: Iterable[Patch], tokens_at_once: int) -> dict[Patch, Tensor]:
        """The metric of the base run with each patch (alone) put in."""
        found: dict[Any, Tensor] = {}
        jobs: list[Job] = []
        for patch in patches:
            planned = self.geometry.planned(patch)
            if planned is None:
                found[patch] = self.base_value
            else:
                jobs.append(self._job(planned))
        for chunk, logits in self.run(jobs, tokens_at_once):
            for job, own in zip(chunk.jobs, logits, strict=True):
                found[job.key] = self.score(own)
        return found

    def run(self, jobs: Iterable[Job], tokens_at_once: int) -> Iterator[tuple[Chunk[Job], Tensor]]:
        """(jobs run at once, their logits [R, B, V])."""
        for chunk in self.geometry.chunks(jobs, tokens_at_once):
            yield chunk, self.run_chunk(chunk)

    def run_chunk(self, chunk: Chunk[Job]) -> Tensor:
        """The logits [R, B, V] of jobs that start alike."""
        starts = [job.build(chunk.begin.first) for job in chunk.jobs]
        logits = self._run(chunk.begin, starts, [job.edits for job in chunk.jobs])
        return logits.view(len(starts), len(self.batch), -1)

    def without_attention(
        self, start: int, stream: Tensor, given: dict[int, Tensor], edits: Sequence[Edit]
    ) -> list[Tensor]:
        """The streams before each block from `start` on, and after the last, of a run that computes no attention.

        It begins before block `start` with `stream` [B, T - prefix, D]; each attention gives what it gave in the base
        run, or what `given` says for its layer. Only MLPs are computed anew, with `edits` on top.
        """
        streams: list[Tensor] = []
        with ExitStack() as stack:
            self._begin(stack, start, stream)
            for index in range(start, len(self.layers)):
                self._after_attention(stack, index, given.get(index, self.given(index)[:, self.prefix :]))
                on_port(stack, self.layers[index].block.input, lambda x: streams.append(x))
            on_port(stack, self.layers[-1].block.output, lambda x: streams.append(x))
            self._put_edits(stack, [edits])
            self.engine.forward(
                self.base_ids[:, self.prefix :], self._cache(self.prefix, 1, start) if self.prefix else None
            )
        return streams

    def _job(self, planned: Planned) -> Job:
        """The earliest parts make the start, the others are edits on the way."""
        begin, geometry = planned.begin, self.geometry
        stages = {part: geometry.stage(part) for part in planned.parts}
        earliest = min(stages.values())
        into = earliest[1] if earliest[1] in (STREAM, ATTENTION, MLP) else None
        starting = [part for part in planned.parts if stages[part] == earliest and into is not None]
        if into == MLP:  # the run starts with the stream behind the block, which more parts may replace
            starting += [part for part in planned.parts if stages[part] == (begin.start, STREAM)]
        edits = [edit for part in planned.parts if part not in starting for edit in self.edits(part)]
        return Job(planned.patch, begin, lambda first: self._start(begin, starting, first), tuple(edits))

    def _start(self, begin: Begin, parts: Sequence[Target], first: int) -> Tensor:
        """What the run starts with, [B, T - first, D]: a stream, or what attention gives in its block."""
        if begin.behind:
            return self._attention(begin.start, parts, first)
        stream = self.base.streams[begin.start][:, first:]
        writes = [part for part in parts if part.kind in ("head", "attn_out", "mlp_out")]
        if any(part.kind == "mlp_out" for part in writes):
            layer = begin.start - 1
            ours = self.base.mlp[layer].reshape(self.base.streams[layer].shape)[:, first:]
            new = ours
            for part in writes:
                if part.kind == "mlp_out":
                    new = self._put(part, new, self._whole(self.other.mlp[layer], self.base.mlp[layer]))
            stream = stream + (new - ours) * self.layers[layer].mlp.write.scale
        if any(part.kind != "mlp_out" for part in writes):
            layer = begin.start - 1
            ours = self.given(layer)[:, first:]
            new = self._attention(layer, [part for part in writes if part.kind != "mlp_out"], first)
            stream = stream + (new - ours) * self.layers[layer].attention.write.scale
        for part in parts:
            if part.kind in ("resid_pre", "resid_post"):
                at = begin.start
                stream = self._put(part, stream, self._whole(self.other.streams[at], self.base.streams[at]))
        return stream

    def _attention(self, at: int, parts: Sequence[Target], first: int) -> Tensor:
        """What attention gives, [B, T - first, D], with some of it from the other run."""
        layer, width = self.layers[at], self.layers[at].attention.d_value
        heads = [part for part in parts if part.kind == "head"]
        new = self.given(at)[:, first:]
        if heads:
            mixed = self.base.mixed[at][:, first:]
            for part in heads:
                assert part.head is not None
                cut = slice(part.head * width, (part.head + 1) * width)
                ours = self.base.z[at][..., cut]
                theirs = self._put(part, ours[:, first:], self._whole(self.other.z[at][..., cut], ours))
                mixed = mixed + (theirs - ours[:, first:]) @ layer.attention.out_weight_HKD()[part.head]
            new = mixed if layer.post_norm.module is None else layer.post_norm.module(mixed)
        for part in parts:
            if part.kind == "attn_out":
                new = self._put(part, new, self._whole(self.other.attention[at], self.given(at)))
        for part in parts:
            if part.kind == "resid_mid":
                new = self._put(part, new, self._attention_to_mid(at))
        return new

    def given(self, layer: int) -> Tensor:
        """What attention gives in the base run, [B, T, D]."""
        return self.base.attention[layer].reshape(self.base.streams[layer].shape)

    def _attention_to_mid(self, at: int) -> Tensor:
        """The attention's output with which the stream behind it is the other run's, from the base run's stream."""
        ours, scale = self.base.streams[at], self.layers[at].attention.write.scale
        theirs = self._whole(self.other.streams[at], ours) - ours
        return self._whole(self.other.attention[at], self.given(at)) + theirs / scale

    def _whole(self, other: Tensor, like: Tensor) -> Tensor:
        """The other run at all positions: before the prefix ends it is the base run."""
        like = like.reshape(len(self.batch), self.length, -1)
        other = other.reshape(len(self.batch), -1, like.shape[-1])
        return torch.cat([like[:, : self.prefix], other], dim=1) if self.prefix else other

    def _put(self, part: Target, ours: Tensor, theirs: Tensor) -> Tensor:
        """`ours` [B, T', D], the last positions, with `theirs` [B, T, D] where the part says."""
        steps = ours.shape[1]
        where = self.geometry.where(part.position)
        theirs = theirs[:, theirs.shape[1] - steps :]
        if where is None:
            return theirs
        return torch.where(where[:, self.length - steps :, None].to(ours.device), theirs, ours)

    def edits(self, part: Target) -> list[Edit]:
        """What puts one target of the other run into a run that started before it."""
        at, layer, base, other = part.layer, self.layers[part.layer], self.base, self.other
        where, kind = self.geometry.where(part.position), part.kind
        if kind in ("resid_pre", "resid_post"):
            at += kind == "resid_post"
            return [Edit("stream", at, self._whole(other.streams[at], base.streams[at]), where)]
        if kind == "resid_mid":
            stream = self._whole(other.streams[at], base.streams[at])
            given = self._whole(other.attention[at], base.attention[at])
            return [Edit("mid", at, stream + given * layer.attention.write.scale, where)]
        if kind == "mlp_out":
            return [Edit("mlp", at, self._whole(other.mlp[at], base.mlp[at]), where)]
        if kind == "attn_out":
            return [Edit("attention", at, self._whole(other.attention[at], base.attention[at]), where)]
        if kind == "head":
            assert part.head is not None
            width = layer.attention.d_value
            cut = slice(part.head * width, (part.head + 1) * width)
            return [Edit("z", at, self._whole(other.z[at], base.z[at])[..., cut], where, cut)]
        of = layer.parts[kind]  # type: ignore[index]
        rows = (of.rows if part.head is None else of.rows[part.head]).flatten()
        value = self._whole(other.made[at][of.projection], base.made[at][of.projection])
        return [Edit("made", at, value[..., rows.to(value.device)], where, rows.to(value.device), of.projection)]

    # --- a run

    def _run(self, begin: Begin, starts: Sequence[Tensor], edits: Sequence[Sequence[Edit]]) -> Tensor:
        """Logits [R B, V] of patches that start alike."""
        repeats, start, first = len(starts), begin.start, begin.first
        stacked = torch.cat(list(starts))
        stream = _stacked(self.base.streams[start][:, first:], repeats) if begin.behind else stacked
        with ExitStack() as stack:
            self._begin(stack, start, stream)
            if begin.behind:
                self._after_attention(stack, start, stacked)
            if self.geometry.narrowed(begin, self.narrows):
                self.engine.narrow(stack)
            self._put_edits(stack, edits)
            ids = self.base_ids[:, first:].repeat(repeats, 1)
            return self.engine.forward(ids, self._cache(first, repeats, start) if first else None)

    def _begin(self, stack: ExitStack, start: int, stream: Tensor) -> None:
        """Have runs start before block `start` with this stream."""
        for index in range(start):
            block = self.layers[index].block
            given = self.base.outputs[block.module]
            # blocks before the start hand on whatever they get; the one just before it hands on the start
            replace_forward(
                stack,
                block.module,
                hand_on(given, block.output.key, stream if index == start - 1 else None, block.input.key),
            )
        if start == 0:
            on_port(stack, self.layers[0].block.input, lambda _: stream)

    def _put_edits(self, stack: ExitStack, edits: Sequence[Sequence[Edit]]) -> None:
        by_point: dict[tuple[Any, ...], list[tuple[int, Edit]]] = {}
        for index, own in enumerate(edits):
            for edit in own:
                by_point.setdefault((edit.layer, edit.point, edit.module), []).append((index, edit))
        n = len(edits)
        for (at, point, module), group in sorted(by_point.items(), key=lambda item: _POINTS.index(item[0][1])):
            layer = self.layers[min(at, len(self.layers) - 1)]

            def put(y: Tensor, group: list[tuple[int, Edit]] = group) -> Tensor:
                return self._edited(y, n, group)

            if point == "stream":
                port = layer.block.input if at < len(self.layers) else layer.block.output
                on_port(stack, port, put)
            elif point == "made":
                on_output(stack, module, put)  # type: ignore[arg-type]
            elif point == "z":
                stack.callback(on_input(layer.attention.out_proj, put).remove)
            elif point == "attention":
                on_port(stack, layer.attention.write.port, put)
            elif point == "mid":
                self._put_mid(stack, at, n, group)
            else:
                on_port(stack, layer.mlp.entry if point == "mlp_in" else layer.mlp.write.port, put)

    def _put_mid(self, stack: ExitStack, at: int, n: int, group: list[tuple[int, Edit]]) -> None:
        layer, streams = self.layers[at], []
        scale = layer.attention.write.scale
        on_port(stack, layer.block.input, lambda x: streams.append(x))

        def put(y: Tensor) -> Tensor:
            x = streams.pop()[:, -y.shape[1] :]
            return ((self._edited(x + y * scale, n, group) - x) / scale).to(y.dtype)

        on_port(stack, layer.attention.write.port, put)

    def _edited(self, y: Tensor, n: int, group: Sequence[tuple[int, Edit]]) -> Tensor:
        """What passes a point in a stack of `n` runs, with the edits of some of them."""
        new = y.clone(memory_format=torch.contiguous_format)
        rows = new.view(n, len(self.batch), -1, y.shape[-1])
        steps = rows.shape[2]
        for index, edit in group:
            columns = slice(None) if edit.columns is None else edit.columns
            value = edit.value[:, edit.value.shape[1] - steps :]
            if edit.where is not None:
                where = edit.where[:, self.length - steps :, None].to(y.device)
                value = torch.where(where, value, rows[index][..., columns])
            rows[index][..., columns] = value.to(y.dtype)
        return new

    def _after_attention(self, stack: ExitStack, index: int, given: Tensor) -> None:
        """Have a block's attention give `given` at the port where it is added, without running it where that is
        possible.
        """
        layer = self.layers[index]
        module, port = layer.attention.module, layer.attention.write.port
        whole = self.base.outputs[module]
        own = whole if isinstance(whole, Tensor) else whole[0]
        written = self.base.attention[index]
        if isinstance(own, Tensor) and own.shape == written.shape and torch.equal(own, written):
            replace_forward(
                stack, module, lambda *_, **__: given if isinstance(whole, Tensor) else type(whole)((given, *whole[1:]))
            )
            return
        if layer.post_norm.module is not None and isinstance(own, Tensor):
            # the norm after attention is the port: what attention itself gives is not used
            zeros = torch.zeros(given.shape[:-1] + own.shape[-1:], dtype=own.dtype, device=own.device)
            replace_forward(
                stack, module, lambda *_, **__: zeros if isinstance(whole, Tensor) else type(whole)((zeros, *whole[1:]))
            )
        on_port(stack, port, lambda y: given.reshape(y.shape))


def geometry_of(engine: Engine, batch: Batch, *, cached: bool) -> Geometry:
    """The shapes of a batch that decide where patches start."""
    graph = engine.wiring.graph
    return Geometry(
        n_layers=graph.n_layers,
        parallel=graph.parallel,
        rows=len(batch),
        length=batch.clean.shape[1],
        shared=batch.prefix,
        cached=cached,
        positions=batch.positions,
    )


def _stacked(x: Tensor, repeats: int) -> Tensor:
    """[R B, ...]: one copy a patch."""
    return x if repeats == 1 else x[None].expand(repeats, *x.shape).reshape(-1, *x.shape[1:])

"""Many patches of one model at the least cost: each starts where it first changes something.

A patch at layer L starts from the base run's stream at L (or L + 1, or in the middle of L behind its attention);
patches are stacked along the batch; positions before the first changed one come from the base run's keys and values; a
patch of what the last layer adds is run at the last position only; and the unembedding reads that position only.

Shapes: B pairs, T positions of the prompt, D width, R patches stacked.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.core.errors import MethodError
from headwater.localize.hooks import on_input, on_output, on_port, replace_forward
from headwater.localize.passes import Batch, Engine, Scored, can_narrow, copied

Kind = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head"]
KINDS: tuple[Kind, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing to patch: a kind of site at a layer (and head), at all positions, or at one a pair."""

    kind: Kind
    layer: int
    head: int | None = None
    position: str | None = None

    @property
    def site(self) -> str:
        text = f"{self.kind}.{self.layer}" + ("" if self.head is None else f".h{self.head}")
        return text if self.position is None else f"{text}@{self.position}"


@dataclass(eq=False)
class _Record:
    """One run: streams before each block and after the last, what heads mix and sub-layers give, whole outputs."""

    streams: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    mixed: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    logits: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Job:
    """A patch made ready: where its run starts, from which position, and the [B, T - first, D] to start with."""

    target: Target
    start: int
    behind_attention: bool
    first: int
    build: Callable[[int], Tensor]


class Sweep:
    """Patches one batch of pairs: values of the other run put into the base run."""

    def __init__(self, engine: Engine, metric: Scored, batch: Batch, *, base_is_clean: bool, reuse: bool) -> None:
        self.engine, self.metric, self.batch = engine, metric, batch
        self.layers = engine.wiring.layers
        self.narrows = can_narrow(engine)  # measured here, before any hook of a sweep is in
        self.base_ids, other_ids = (batch.clean, batch.corrupt) if base_is_clean else (batch.corrupt, batch.clean)
        self.length = self.base_ids.shape[1]
        self.base, self.past = self._record(self.base_ids, None, cached=reuse)
        if self.past is not None and any(layer.keys.shape[-2] != self.length for layer in self.past.layers):
            self.past = None  # a window dropped keys: every run then goes through all positions
        self.prefix = batch.prefix if self.past is not None else 0
        before = self._cache(self.prefix, 1, 0) if self.prefix else None
        self.other, _ = self._record(other_ids[:, self.prefix :], before, cached=False)
        clean = self.base.logits if base_is_clean else self.other.logits
        assert clean is not None and self.base.logits is not None and self.other.logits is not None
        self.reference = clean
        self.base_value = metric(batch, self.base.logits, clean)
        self.other_value = metric(batch, self.other.logits, clean)

    # --- the two runs

    def _record(self, ids: Tensor, past: Any, *, cached: bool) -> tuple[_Record, Any]:
        record = _Record()
        with ExitStack() as stack:
            for layer in self.layers:
                on_port(stack, layer.block.input, lambda x: record.streams.append(x))
                stack.callback(on_input(layer.attention.out_proj, lambda z: record.z.append(z)).remove)
                on_output(stack, layer.attention.out_proj, lambda y: record.mixed.append(y))
                on_port(stack, layer.attention.write.port, lambda y: record.attention.append(y))
                on_port(stack, layer.mlp.write.port, lambda y: record.mlp.append(y))
                for module in (layer.block.module, layer.attention.module):
                    on_output(stack, module, lambda y, module=module: record.outputs.__setitem__(module, y))
            on_port(stack, self.layers[-1].block.output, lambda x: record.streams.append(x))
            if cached:
                from transformers import DynamicCache

                past = DynamicCache(config=self.engine.hf.config)
                record.logits = self.engine.hf(
                    input_ids=ids.to(self.engine.model.device), past_key_values=past, use_cache=True
                ).logits[:, -1]
            else:
                record.logits = self.engine.forward(ids, past)
        return record, past if cached else None

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

    def values(self, targets: Sequence[Target], tokens_at_once: int) -> dict[Target, Tensor]:
        """The metric [B] of the base run with each target patched."""
        found: dict[Target, Tensor] = {}
        jobs: dict[tuple[int, bool, int], list[_Job]] = {}
        for target in targets:
            job = self._job(target)
            if job is None:
                found[target] = self.base_value
            else:
                jobs.setdefault((job.start, job.behind_attention, job.first), []).append(job)
        for (start, behind, first), group in sorted(jobs.items()):
            size = max(1, tokens_at_once // (len(self.batch) * (self.length - first)))
            for at in range(0, len(group), size):
                part = group[at : at + size]
                logits = self._run(start, behind, first, [job.build(first) for job in part])
                for job, own in zip(part, logits.view(len(part), len(self.batch), -1), strict=True):
                    found[job.target] = self.metric(self.batch, own, self.reference)
        return found

    def _job(self, target: Target) -> _Job | None:
        """How to run one patch; None where it changes nothing that the last position can see."""
        last = len(self.layers) - 1
        where = self._positions(target.position)
        if where is not None and int(where.max()) < self.batch.prefix:
            return None  # the two runs are the same there
        layer, kind = target.layer, target.kind
        parallel = self.layers[layer].block.order == "parallel"
        behind = kind in ("resid_mid", "attn_out", "head") and not parallel
        start = layer if behind or kind == "resid_pre" else layer + 1
        first = self.prefix if where is None else int(where.min())
        if layer == last and kind != "resid_pre":
            first = self.length - 1  # nothing after this layer mixes positions
            if where is not None and bool((where < first).all()):
                return None
        first = first if self.past is not None else 0

        def build(first: int) -> Tensor:
            return self._start(target, first, where)

        return _Job(target, start, behind, first, build)

    def _positions(self, position: str | None) -> Tensor | None:
        """[B] indices into the prompt, or None for all positions."""
        if position is None:
            return None
        if position in self.batch.positions:
            return self.batch.positions[position]
        try:
            index = int(position)
        except ValueError:
            known = ", ".join(sorted(self.batch.positions)) or "none"
            raise MethodError(
                "unknown position", got=repr(position), wanted=f"a number, * or one of: {known}"
            ) from None
        index = index + self.length if index < 0 else index
        if not 0 <= index < self.length:
            raise MethodError("no such position", got=position, wanted=f"-{self.length} to {self.length - 1}")
        return torch.full((len(self.batch),), index)

    def _start(self, target: Target, first: int, where: Tensor | None) -> Tensor:
        """What the run starts with, [B, T - first, D]: a stream, or what attention gives in its block."""
        base, other, layer = self.base, self.other, self.layers[target.layer]
        at = target.layer
        if target.kind in ("resid_pre", "resid_post"):
            index = at + (target.kind == "resid_post")
            return self._mixed(
                base.streams[index], self._whole(other.streams[index], base.streams[index]), first, where
            )
        if target.kind == "mlp_out":
            ours, theirs, scale = base.mlp[at], other.mlp[at], layer.mlp.write.scale
        else:
            ours, scale = base.attention[at], layer.attention.write.scale
            theirs = other.attention[at] if target.head is None else None
        shape = base.streams[at].shape
        ours = ours.reshape(shape)
        if target.kind == "resid_mid":
            # the attention's output with which the stream behind it is the other run's
            assert theirs is not None
            theirs = theirs.reshape(shape[0], -1, shape[-1]) + self._streams_differ(at) / scale
        if theirs is None:
            new = self._head(target, first, where)
        else:
            theirs = self._whole(theirs.reshape(shape[0], -1, shape[-1]), ours)
            new = self._mixed(ours, theirs, first, where)
        if target.kind != "mlp_out" and layer.block.order != "parallel":
            return new
        return base.streams[at + 1][:, first:] + (new - ours[:, first:]) * scale

    def _streams_differ(self, layer: int) -> Tensor:
        """[B, T - prefix, D]: the other run's stream before a block, less the base run's."""
        return self.other.streams[layer] - self.base.streams[layer][:, self.prefix :]

    def _head(self, target: Target, first: int, where: Tensor | None) -> Tensor:
        """What attention gives with one head's values taken from the other run."""
        at, layer = target.layer, self.layers[target.layer]
        base, width = self.base, layer.attention.d_value
        assert target.head is not None
        cut = slice(target.head * width, (target.head + 1) * width)
        ours = base.z[at][..., cut]
        theirs = self._mixed(ours, self._whole(self.other.z[at][..., cut], ours), first, where)
        weight = layer.attention.out_weight_HKD()[target.head]
        mixed = base.mixed[at][:, first:] + (theirs - ours[:, first:]) @ weight
        norm = layer.post_norm.module
        return mixed if norm is None else norm(mixed)

    def _whole(self, other: Tensor, like: Tensor) -> Tensor:
        """The other run at all positions: before the prefix ends it is the base run."""
        return torch.cat([like[:, : self.prefix], other], dim=1) if self.prefix else other

    @staticmethod
    def _mixed(ours: Tensor, theirs: Tensor, first: int, where: Tensor | None) -> Tensor:
        if where is None:
            return theirs[:, first:]
        new = ours[:, first:].clone()
        rows = torch.arange(len(new))
        inside = where >= first
        new[rows[inside], where[inside] - first] = theirs[rows[inside], where[inside]]
        return new

    def _run(self, start: int, behind: bool, first: int, starts: Sequence[Tensor]) -> Tensor:
        """Logits [R B, V] of patches that start alike."""
        repeats = len(starts)
        stacked = torch.cat(list(starts))
        stream = _stacked(self.base.streams[start][:, first:], repeats) if behind else stacked
        with ExitStack() as stack:
            for index in range(start):
                block = self.layers[index].block
                given = self.base.outputs[block.module]
                # blocks before the start hand on whatever they get; the one just before it hands on the start
                replace_forward(
                    stack,
                    block.module,
                    _hand_on(given, block.output.key, stream if index == start - 1 else None, block.input.key),
                )
            if start == 0:
                on_port(stack, self.layers[0].block.input, lambda _: stream)
            if behind:
                self._after_attention(stack, start, stacked)
            if start < len(self.layers) - behind and first < self.length - 1 and self.narrows:
                self.engine.narrow(stack)
            ids = self.base_ids[:, first:].repeat(repeats, 1)
            return self.engine.forward(ids, self._cache(first, repeats, start) if first else None)

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


def _hand_on(given: Any, key: int | str | None, stream: Tensor | None, into: int | str | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        x = stream
        if x is None:
            x = kwargs[into] if isinstance(into, str) and into in kwargs else args[into if isinstance(into, int) else 0]
        if key is None:
            return x
        items = list(given)
        items[key] = x  # type: ignore[index]
        return type(given)(items)

    return forward


def _stacked(x: Tensor, repeats: int) -> Tensor:
    """[R B, ...]: one copy a patch."""
    return x if repeats == 1 else x[None].expand(repeats, *x.shape).reshape(-1, *x.shape[1:])

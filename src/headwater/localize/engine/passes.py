"""The forward passes that scoring and evaluation share: batches of pairs, the prefix they share, and what a pass saw.

Shapes: B pairs, T positions that are run (those after the shared prefix), N = B T, D residual width, L layers.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.behavior.metrics import STEPS, Metric
from headwater.behavior.metrics import metric as metric_named
from headwater.core.errors import MethodError, ModelError
from headwater.localize.engine.cost import memory_budget
from headwater.localize.engine.hooks import frozen, on_input, on_output, on_port, replace_forward
from headwater.localize.engine.wiring import Layer, Wiring, wiring_of

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_MIN_PREFIX = 2  # a shorter one costs more in calls than it saves


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Pairs of one length with the first `prefix` tokens of clean and counterfactual prompt equal, pair by pair.

    rows: [B] indices into the behavior's frame. clean, corrupt: [B, prefix + T] ids.
    """

    rows: list[int]
    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    foils: Tensor
    positions: dict[str, Tensor]
    prefix: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def suffix(self) -> int:
        """T: positions after the prefix."""
        return self.clean.shape[1] - self.prefix


@dataclass(eq=False)
class Seen:
    """What one pass saw, by layer. Under autograd, `made`, `mlp_in` and `final` are tensors of its graph."""

    embed: Tensor | None = None
    """The stream that enters the first block, [B, T, D]."""
    made: list[dict[nn.Module, Tensor]] = field(default_factory=list)
    """Outputs of the query, key and value projections."""
    z: list[Tensor] = field(default_factory=list)
    """The heads' mixed values side by side, what the output projection reads."""
    mixed: list[Tensor] = field(default_factory=list)
    """What the output projection gives; kept only where a norm follows it."""
    attn_stream: list[Tensor] = field(default_factory=list)
    """The stream as the attention's norm reads it."""
    mlp_stream: list[Tensor] = field(default_factory=list)
    mlp_in: list[Tensor] = field(default_factory=list)
    """What the MLP reads, after its norm."""
    mlp_out: list[Tensor] = field(default_factory=list)
    """What the MLP adds, before the block's multiplier."""
    neurons: list[Tensor] = field(default_factory=list)
    """What the MLP's down-projection reads; kept only where asked for."""
    final: Tensor | None = None
    """The stream that the final norm reads."""
    logits: Tensor | None = None
    """[B, V], at the last position."""


class Engine:
    """Runs one model: frozen, in evaluation mode, unembedding the last position only."""

    def __init__(self, model: "Model") -> None:
        self.model = model
        self.hf: Any = model.hf
        self.wiring: Wiring = wiring_of(model)
        dtype = model.dtype
        self.work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        """The dtype scores are computed in."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, weights are frozen and only the last position is unembedded."""
        with frozen(self.hf), ExitStack() as stack:
            if self.wiring.unembed is not None:
                # contiguous: a strided slice would be multiplied row by row, reading the whole matrix for each
                stack.callback(on_input(self.wiring.unembed, lambda x: x[:, -1:].contiguous()).remove)
            yield

    def narrow(self, stack: ExitStack) -> None:
        """Until `stack` closes, what the last block adds is computed at the last position only, the only one that is
        read.

        Its other positions then hold broadcast copies that nobody may use. Done only where `can_narrow` measured it.
        """
        layer = self.wiring.layers[-1]
        stack.callback(on_input(layer.attention.out_proj, lambda z: z[:, -1:].contiguous()).remove)
        on_port(stack, layer.mlp.entry, lambda x: x[:, -1:].contiguous())

    def forward(self, ids: Tensor, past: Any = None) -> Tensor:
        """Logits [B, V] at the last position; `past` is a cache of the positions before (it is not changed)."""
        ids = ids.to(self.model.device)
        if past is None:
            return self.hf(input_ids=ids, use_cache=False).logits[:, -1]
        return self.hf(input_ids=ids, past_key_values=copied(past), use_cache=True).logits[:, -1]

    def prefix_cache(self, batch: Batch) -> Any:
        """Keys and values of the shared prefix; None where there is none."""
        return self.cache(batch.clean[:, : batch.prefix]) if batch.prefix else None

    def cache(self, ids: Tensor) -> Any:
        """Keys and values of these tokens, run without gradient."""
        from transformers import DynamicCache

        past = DynamicCache(config=self.hf.config)
        with ExitStack() as stack:
            if self.wiring.unembed is not None:
                replace_forward(stack, self.wiring.unembed, lambda x: x[..., :1])  # nobody reads the logits
            if _narrows.get(self.hf, False):
                self.narrow(stack)  # nor what the last block writes
            self.hf(input_ids=ids.to(self.model.device), past_key_values=past, use_cache=True)
        return past

    def watch(
        self,
        stack: ExitStack,
        seen: Seen,
        *,
        enter: Callable[[Tensor], Tensor | None] | None = None,
        readers: bool = True,
        gradients: bool = True,
    ) -> None:
        """Have the passes until `stack` closes fill `seen`. `enter` may replace the stream that enters the first block.

        readers: also keep what readers read and projections make; gradients: ready to be differentiated by.
        """

        def first(x: Tensor) -> Tensor | None:
            new = enter(x) if enter else None
            seen.embed = (x if new is None else new).detach()
            return new

        on_port(stack, self.wiring.layers[0].block.input, first)
        for layer in self.wiring.layers:
            made: dict[nn.Module, Tensor] = {}
            seen.made.append(made)
            if readers:
                for module in layer.projections:
                    on_output(stack, module, lambda y, made=made, module=module: made.__setitem__(module, y))
                self._watch_streams(stack, layer, seen)
            if gradients:

                def own(x: Tensor) -> Tensor:
                    # attention may read this very tensor: a view is a tensor of its own to differentiate by
                    seen.mlp_in.append(x.view_as(x))
                    return seen.mlp_in[-1]

                on_port(stack, layer.mlp.entry, own)
            stack.callback(on_input(layer.attention.out_proj, lambda z: seen.z.append(z.detach())).remove)
            if layer.post_norm.module is not None:
                on_output(stack, layer.attention.out_proj, lambda y: seen.mixed.append(y.detach()))
            on_port(stack, layer.mlp.write.port, lambda y: seen.mlp_out.append(y.detach()))
        if self.wiring.final_norm is not None:
            stack.callback(on_input(self.wiring.final_norm, lambda x: setattr(seen, "final", x)).remove)
        else:
            on_port(stack, self.wiring.layers[-1].block.output, lambda x: setattr(seen, "final", x))

    def watch_neurons(self, stack: ExitStack, keep: Callable[[Tensor], Tensor | None]) -> None:
        """Have `keep` see each MLP's neurons, layer after layer. Raises ModelError where an MLP has none (experts)."""
        for index, layer in enumerate(self.wiring.layers):
            if layer.mlp.neurons is None:
                raise ModelError(
                    f"the MLP of layer {index} of {type(self.hf).__name__} has no neurons that could be scored",
                    wanted="one down-projection whose input is the neurons",
                    fix="Score its MLPs whole, without neurons",
                )
            on_port(stack, layer.mlp.neurons, keep)

    def _watch_streams(self, stack: ExitStack, layer: Layer, seen: Seen) -> None:
        if layer.norm.module is not None:
            stack.callback(on_input(layer.norm.module, lambda x: seen.attn_stream.append(x.detach())).remove)
        else:
            on_port(stack, layer.attention.entry, lambda x: seen.attn_stream.append(x.detach()))
        if layer.mlp_norm.module is layer.norm.module and layer.norm.module is not None:
            on_port(stack, layer.mlp.entry, lambda _: seen.mlp_stream.append(seen.attn_stream[-1]))
        elif layer.mlp_norm.module is not None:
            stack.callback(on_input(layer.mlp_norm.module, lambda x: seen.mlp_stream.append(x.detach())).remove)
        else:
            on_port(stack, layer.mlp.entry, lambda x: seen.mlp_stream.append(x.detach()))

    def run(
        self,
        ids: Tensor,
        past: Any,
        *,
        enter: Callable[[Tensor], Tensor | None] | None = None,
        readers: bool = False,
        gradients: bool = False,
        narrow: bool = False,
        neurons: bool = False,
    ) -> Seen:
        """One pass over the positions after the prefix, and what it saw; recorded by autograd if `gradients`.

        narrow: the last block's part after attention runs, and is seen, at the last position only (`can_narrow`).
        neurons: also keep each MLP's neurons.
        """
        seen = Seen()
        with ExitStack() as stack, torch.set_grad_enabled(gradients):
            if narrow:
                self.narrow(stack)  # first, so that what is seen is what is run
            if neurons:
                self.watch_neurons(stack, lambda x: seen.neurons.append(x.detach()))

            def leaf(x: Tensor) -> Tensor:
                new = enter(x) if enter else None
                return (x if new is None else new).detach().requires_grad_(True)

            self.watch(
                stack, seen, enter=leaf if gradients else enter, readers=readers or gradients, gradients=gradients
            )
            seen.logits = self.forward(ids, past)
        return seen


def copied(past: Any) -> Any:
    """A cache that grows on its own; the tensors are shared, as caches grow by concatenation."""
    new = copy.copy(past)
    new.layers = [copy.copy(layer) for layer in past.layers]
    return new


# --- pairs


def shared_prefix(clean: Tensor, corrupt: Tensor) -> Tensor:
    """[B]: how many tokens from the start are equal, pair by pair; at most T - 1."""
    differs = clean != corrupt
    first = torch.where(differs.any(dim=1), differs.int().argmax(dim=1), differs.shape[1])
    return first.clamp(max=clean.shape[1] - 1)


def make_batches(bound: "Bound", tokens_at_once: int, *, reuse_prefix: bool = True) -> list[Batch]:
    """Pairs in batches of one length, those with long shared prefixes together, about `tokens_at_once` positions to
    run.
    """
    batches: list[Batch] = []
    for group in bound.groups:
        prefixes = shared_prefix(group.clean, group.corrupt)
        if not reuse_prefix:
            prefixes = torch.zeros_like(prefixes)
        order = torch.argsort(prefixes, stable=True).tolist()
        start = 0
        while start < len(order):
            prefix = int(prefixes[order[start]])
            prefix = prefix if prefix >= _MIN_PREFIX else 0
            size = max(1, tokens_at_once // (group.length - prefix))
            index = torch.tensor(order[start : start + size])
            batches.append(
                Batch(
                    rows=[group.rows[i] for i in index.tolist()],
                    clean=group.clean[index],
                    corrupt=group.corrupt[index],
                    answers=group.answers[index],
                    foils=group.foils[index],
                    positions={name: place[index] for name, place in group.positions.items()},
                    prefix=prefix,
                )
            )
            start += size
    return batches


def for_discovery(behavior: "Behavior") -> "Behavior":
    """The pairs to find things on: the train split where there is one."""
    return behavior.train if "train" in set(behavior.frame["split"].to_list()) else behavior


_READS_ONLY_ITS_TOKENS = frozenset({"logit_diff"})
_READS_ONE_RUN = frozenset({"logit_diff", "prob_diff", "accuracy", "rank"})


@dataclass(frozen=True, eq=False)
class Scored:
    """A metric applied to a batch: logits [B, V] -> [B], on the batch's own answers."""

    name: str
    metric: Metric

    @classmethod
    def named(cls, name: str, *, differentiable: bool = False) -> "Scored":
        metric = metric_named(name)
        if differentiable and name in STEPS:
            raise MethodError(
                f"the metric {name} has no gradient",
                wanted="logit_diff, prob_diff or kl",
                fix="Use patching, which needs none",
            )
        return cls(name, metric)

    @property
    def reads_reference(self) -> bool:
        """Whether it compares with the model's own logits (of a metric that is not known: it may)."""
        return self.name not in _READS_ONE_RUN

    def narrowed(self, stack: ExitStack, engine: "Engine", batch: Batch) -> Batch:
        """Until `stack` closes, have the model unembed only the tokens that this metric reads, if it reads but a few.

        Gives the batch with its answers and foils numbered among those tokens; the batch itself where all are needed.
        """
        unembed = engine.wiring.unembed
        if self.name not in _READS_ONLY_ITS_TOKENS or type(unembed) is not nn.Linear:
            return batch
        ids = torch.cat([batch.answers.flatten(), batch.foils.flatten()]).unique()
        ids = ids[ids >= 0]
        bias, at = unembed.bias, ids.to(unembed.weight.device)
        weight = unembed.weight.detach()[at]
        bias = None if bias is None else bias.detach()[at]
        replace_forward(stack, unembed, lambda x: nn.functional.linear(x, weight, bias))

        def among(tokens: Tensor) -> Tensor:
            return torch.where(tokens >= 0, torch.searchsorted(ids, tokens.clamp(min=0)), tokens)

        return replace(batch, answers=among(batch.answers), foils=among(batch.foils))

    def __call__(self, batch: Batch, logits: Tensor, reference: Tensor | None = None) -> Tensor:
        device = logits.device
        return self.metric(logits, batch.answers.to(device), batch.foils.to(device), reference)


# --- how much fits, and whether a prefix can be reused


def tokens_at_once(model: "Model", floats_a_token: int, memory_mb: float | None) -> int:
    """Positions to run at once within a memory budget.

    The default budget (`cost.memory_budget`) is .4 of what the weights take, but at least 96 MB, and never more than
    half of what the device has free: with the weights, twice the bare model's peak is not reached.
    """
    budget = memory_budget(model, memory_mb)
    size = 8 if model.dtype == torch.float64 else 4
    return max(1, int(budget // (floats_a_token * size)))


_reuses: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def can_reuse_prefix(engine: Engine) -> bool:
    """Whether this model gives the same logits when a prefix comes from its cache: measured once."""
    if engine.hf not in _reuses:
        ids = probe_ids(engine, 7)
        with engine.open():
            _reuses[engine.hf] = _same(engine, ids, lambda: engine.forward(ids[:, 4:], engine.cache(ids[:, :4])))
    return _reuses[engine.hf]


_narrows: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def can_narrow(engine: Engine) -> bool:
    """Whether the last block can be run at the last position only with the same logits: measured once."""
    if engine.hf not in _narrows:
        mlp, ids = engine.wiring.layers[-1].mlp, probe_ids(engine, 5)

        def narrowed() -> Tensor:
            with ExitStack() as stack:
                engine.narrow(stack)
                return engine.forward(ids)

        with engine.open():
            _narrows[engine.hf] = not (mlp.entry.flat or mlp.write.port.flat) and _same(engine, ids, narrowed)
    return _narrows[engine.hf]


def probe_ids(engine: Engine, length: int) -> Tensor:
    """[2, length] random token ids, always the same."""
    size = min(engine.hf.config.get_text_config().vocab_size, 1000)
    return torch.randint(min(3, size - 1), size, (2, length), generator=torch.Generator().manual_seed(0))


def _same(engine: Engine, ids: Tensor, other_way: Callable[[], Tensor]) -> bool:
    """Whether another way of running these tokens gives the model's own logits; a way that fails does not."""
    whole = engine.forward(ids)
    try:
        found = other_way()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # models that cannot be run so fail in ways of their own
    error = float((found - whole).abs().max() / whole.abs().max().clamp(min=1e-9))
    return error < {torch.float64: 1e-6, torch.float32: 1e-3}.get(whole.dtype, 5e-2)


def all_values(batches: Sequence[Batch], values: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """(rows, values [n]) of all batches, in the order of the behavior's frame."""
    rows = [row for batch in batches for row in batch.rows]
    flat = torch.cat([value.detach().double().cpu() for value in values])
    order = sorted(range(len(rows)), key=rows.__getitem__)
    return [rows[i] for i in order], flat[order]

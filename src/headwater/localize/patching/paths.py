"""Path patching: one edge, or a set of them, carries the other run's value; what else its reader reads is frozen.

A reader r of edges from sources U reads (its stream in the base run) + sum over U of (u's write in the other run - in
the base run); then the run goes on from it. So the stream of the base run is all that is needed before the first
reader, and each run starts in that reader's block.

Shapes: B pairs, T positions, D width, S sources, R readers.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.attribution.eap import LOWER_IS_BETTER, AttributionResult, configured, node_table
from headwater.localize.catalog import methods
from headwater.localize.engine.cost import counted
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    Scored,
    Seen,
    can_narrow,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.engine.planning import Plan, Tally, plans
from headwater.localize.engine.schedule import Begin, Chunk
from headwater.localize.engine.sweep import Edit, Job, Record, Sweep, geometry_of
from headwater.localize.engine.wiring import PartName
from headwater.localize.engine.writes import head_values, post_norm_constant
from headwater.localize.graph import Graph
from headwater.localize.patching.routes import Route, begin_of, routes_of
from headwater.localize.stats import ratio

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

_MAX_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class PathPatchConfig:
    """edges: "all", each by itself, or some: `a3.h1->a5.h0<q>`; several joined by `+` are patched together.

    senders, receivers: in place of edges, every sender ("heads", "mlps", "all", or names, `*` allowed: `a9.*`) into all
    the receivers at once (names of readers, `*` allowed: `logits`, `a9.*<q>`); apart: into each receiver by itself.
    mlps: "frozen", or "recomputed": MLPs between sender and receivers follow the sender, heads stay frozen (Wang et
    al., 2022). direction: "noise" puts the counterfactual's value into the prompt's run, "denoise" the prompt's into
    the counterfactual's. memory_mb: as for `patch`.
    """

    edges: Literal["all"] | tuple[str, ...] = "all"
    senders: str | tuple[str, ...] | None = None
    receivers: str | tuple[str, ...] | None = None
    apart: bool = False
    mlps: Literal["frozen", "recomputed"] = "frozen"
    direction: Literal["noise", "denoise"] = "noise"
    metric: str = "logit_diff"
    memory_mb: float | None = None


@register_result
class PathPatchingResult(Result):
    """`tables["effects"]`: source, target, effect, lo, hi, n, direction, change; one row an edge or set of edges.

    The effect is a ratio of means over pairs: 0 leaves the run as it was, 1 moves the metric all the way to the other
    run; change is the same in the metric's units. facts: clean, corrupt, metric, n, ran, graph. `tensors`: values
    [rows, n], clean and corrupt [n]; and for single edges scores [sources, readers]: how much an edge speaks for the
    clean behavior (NaN where it was not patched), what `eap` approximates.
    """

    kind: ClassVar[str] = "path_patching"
    main: ClassVar[str] = "effects"
    _model: "Model | None" = None

    def top(self, n: int = 10) -> pl.DataFrame:
        """The `n` edges of largest |effect|."""
        return self.tables["effects"].sort(pl.col("effect").abs(), descending=True).head(n)

    @property
    def graph(self) -> Graph:
        return Graph(**self.facts["graph"])

    def attribution(self) -> AttributionResult:
        """The exact effects of all edges as scores, to cut circuits from and to hold approximations against.

        Raises MethodError where not every edge was patched by itself.
        """
        graph = self.graph
        scores = self.tensors.get("scores")
        if scores is None or bool(torch.isnan(scores[graph.allowed]).any()):
            raise MethodError("scores need every edge patched by itself", fix='Call path_patch(..., edges="all")')
        at = graph.allowed.nonzero()
        edges = {
            "source": [graph.sources[s] for s in at[:, 0].tolist()],
            "target": [graph.readers[r] for r in at[:, 1].tolist()],
            "score": scores[graph.allowed].tolist(),
        }
        scores = torch.where(graph.allowed, scores, 0.0)
        known = {key: self.facts[key] for key in ("metric", "n", "clean", "corrupt", "graph")}
        result = AttributionResult(
            tables={"nodes": node_table(graph, scores.sum(dim=1)), "edges": pl.DataFrame(edges)},
            tensors={"scores": scores},
            facts={"method": "path_patch", **known},
            config=self.config,
            provenance=self.provenance,
        )
        return result.bind(self._model) if self._model is not None else result


@methods.register("path_patch")
def path_patch(
    model: "Model", behavior: "Behavior", *, config: PathPatchConfig | None = None, **options: Any
) -> PathPatchingResult:
    """Path patching (Wang et al., 2022; Goldowsky-Dill et al., 2023): what really happens when an edge, or a set of
    edges, carries the other run's value while everything else that its reader reads is as it was. Exact.

    Runs on `behavior.train` where there is a split. Options are those of `PathPatchConfig`. The effect of a single edge
    is what `eap` approximates. Known failure: a path through a head that was left frozen counts for nothing, so that
    effects of single edges need not add up to their sender's; and backup heads stay silent where they are frozen.

    >>> hw.localize.path_patch(model, ioi, senders="heads", receivers="logits").top(5)  # doctest: +SKIP

    Raises MethodError for an unknown edge, ModelError for a model without a circuit graph.
    """
    started = time.monotonic()
    for key in ("edges", "senders", "receivers"):
        value = options.get(key)
        if isinstance(value, str) and not (key == "edges" and value == "all"):
            options[key] = (value,)
        elif isinstance(value, list):
            options[key] = tuple(value)
    used = _Setting.of(model, behavior, configured(PathPatchConfig, config, options))
    found: dict[Hashable, dict[int, float]] = {}
    base: dict[int, float] = {}
    other: dict[int, float] = {}
    with counted(model) as ran:
        for batch in track(used.batches, "path patching"):
            values, ends = used.run(batch)
            base |= dict(zip(batch.rows, ends[0].double().tolist(), strict=True))
            other |= dict(zip(batch.rows, ends[1].double().tolist(), strict=True))
            for key, value in values.items():
                found.setdefault(key, {}).update(zip(batch.rows, value.double().tolist(), strict=True))
    result = _result(used, found, base, other, ran.to_dict())
    result.provenance = Provenance.collect(model, used.pairs, seconds=time.monotonic() - started)
    result._model = model
    return result


# --- a batch


@dataclass(frozen=True)
class _Started:
    """A route and where its run starts."""

    route: Route
    begin: Begin

    @property
    def key(self) -> Hashable:
        return self.route


@dataclass(eq=False)
class _Setting:
    """Everything about a path patching that is known before it runs."""

    engine: Engine
    config: PathPatchConfig
    scored: Scored
    routes: list[Route]
    pairs: "Behavior"
    bound: "Bound"
    batches: list[Batch]
    at_once: int
    reuse: bool

    @classmethod
    def of(cls, model: "Model", behavior: "Behavior", config: PathPatchConfig) -> "_Setting":
        engine, scored = Engine(model), Scored.named(config.metric)
        graph = engine.wiring.graph
        routes = routes_of(graph, config)
        pairs = for_discovery(behavior)
        bound = pairs.bind(model)
        at_once = min(_MAX_TOKENS, tokens_at_once(model, graph.d_model * 30, config.memory_mb))
        floats = graph.d_model * (len(graph.sources) + 16 * graph.n_layers)
        batches = make_batches(bound, tokens_at_once(model, floats, config.memory_mb))
        reuse, _ = can_reuse_prefix(engine), can_narrow(engine)
        return cls(engine, config, scored, routes, pairs, bound, batches, at_once, reuse)

    def run(self, batch: Batch) -> tuple[dict[Route, Tensor], tuple[Tensor, Tensor]]:
        """(each route's metric [B], that of base and other run)."""
        with self.engine.open(), ExitStack() as stack:
            batch = self.scored.narrowed(stack, self.engine, batch)
            clean = self.config.direction == "noise"
            sweep = Sweep(self.engine, self.scored, batch, base_is_clean=clean, reuse=self.reuse)
            paths = _Paths(self, sweep)
            return dict(paths.values(self.routes)), (sweep.base_value, sweep.other_value)


class _Paths:
    """The edges of one batch: what sources write more in the other run, and what readers then make of it."""

    def __init__(self, used: _Setting, sweep: Sweep) -> None:
        self.used, self.sweep = used, sweep
        self.graph, self.layers = used.engine.wiring.graph, used.engine.wiring.layers
        self.work = used.engine.work
        needed = {source for route in used.routes for source, _ in route.edges}
        self.writes = dict(self._writes(needed))

    def _writes(self, needed: set[int]) -> Iterator[tuple[int, Tensor]]:
        """(source, [B, T - prefix, D]): its write in the other run less that in the base run."""
        sweep, graph, prefix = self.sweep, self.graph, self.sweep.prefix
        base, other = _seen(sweep.base, prefix), _seen(sweep.other, 0)
        shape = sweep.other.streams[0].shape
        if 0 in needed:
            yield 0, sweep.other.streams[0] - sweep.base.streams[0][:, prefix:]
        for index, layer in enumerate(self.layers):
            at = graph.heads_at(index)
            heads = [head for head in range(graph.n_heads) if at.start + head in needed]
            if heads:
                change = head_values(layer, other, index, self.work) - head_values(layer, base, index, self.work)
                weight = layer.post_norm.fold(layer.attention.out_weight_HKD().detach().to(self.work))
                written = torch.bmm(change[heads], weight[heads] * layer.attention.write.scale)
                constant = post_norm_constant(layer, other, base, index, self.work)
                if constant is not None:
                    written += constant / graph.n_heads
                for head, one in zip(heads, written, strict=True):
                    yield at.start + head, one.view(shape)
            if graph.mlp_at(index) in needed:
                ours, theirs = (record.mlp[index].reshape(len(sweep.batch), -1, shape[-1]) for record in
                                (sweep.base, sweep.other))  # fmt: skip
                yield graph.mlp_at(index), (theirs - ours[:, prefix:]) * layer.mlp.write.scale

    def values(self, routes: Iterable[Route]) -> Iterator[tuple[Route, Tensor]]:
        sweep, geometry = self.sweep, self.sweep.geometry
        started = [_Started(route, begin_of(self.graph, geometry, route)) for route in routes]
        for chunk in geometry.chunks(started, self.used.at_once):
            jobs = tuple(self._job(one.route, one.begin) for one in chunk.jobs)
            logits = sweep.run_chunk(Chunk(chunk.begin, jobs))
            for one, own in zip(chunk.jobs, logits, strict=True):
                yield one.route, sweep.score(own)

    def _job(self, route: Route, begin: Begin) -> Job:
        read = self._reading(route)
        edits = tuple(self._edit(reader, read(reader, sources)) for reader, sources in route.readers.items())

        def build(first: int) -> Tensor:
            if begin.behind:
                return self.sweep.given(begin.start)[:, first:]
            return self.sweep.base.streams[begin.start][:, first:]

        return Job(route, begin, build, edits)

    def _reading(self, route: Route) -> Callable[[int, list[int]], Tensor]:
        """What gives a reader's stream [B, T - prefix, D]."""
        if self.used.config.mlps == "frozen":
            return lambda reader, sources: self._stream(reader) + self._sum(sources)
        streams, first = self._recomputed(route)
        sources = {source for source, _ in route.edges}

        def read(reader: int, _: list[int]) -> Tensor:
            name, layer = self.graph.readers[reader], self.graph.layer_of(self.graph.readers[reader])
            stream = streams[layer - first]
            if name.startswith("m") and not self.graph.parallel:
                own = [s for s in sources if self.graph.heads_at(layer).start <= s < self.graph.heads_at(layer).stop]
                stream = stream + self._attended(layer) + (self._sum(own) if own else 0)
            return stream

        return read

    def _recomputed(self, route: Route) -> tuple[list[Tensor], int]:
        """(the streams before blocks from the sender's on, that block): heads frozen, MLPs following the senders."""
        sweep, graph, prefix = self.sweep, self.graph, self.sweep.prefix
        sources = sorted({source for source, _ in route.edges})
        start = max(0, min(graph.layer_of(graph.sources[source]) for source in sources))
        edits: list[Edit] = []
        given: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            at = graph.heads_at(index)
            heads = [source for source in sources if at.start <= source < at.stop]
            if heads:
                given[index] = sweep.given(index)[:, prefix:] + self._sum(heads) / layer.attention.write.scale
            if graph.mlp_at(index) in sources:
                scale, mlp = layer.mlp.write.scale, sweep.base.mlp[index]
                ours = mlp.reshape(len(sweep.batch), sweep.length, -1)[:, prefix:]
                edits.append(Edit("mlp", index, ours + self.writes[graph.mlp_at(index)] / scale))
        stream = sweep.base.streams[start][:, prefix:]
        stream = stream + self.writes[0].to(stream.dtype) if 0 in sources else stream
        return sweep.without_attention(start, stream, given, edits), start

    def _sum(self, sources: Sequence[int]) -> Tensor:
        total = self.writes[sources[0]]
        for source in sources[1:]:
            total = total + self.writes[source]
        return total.to(self.sweep.base.streams[0].dtype)

    def _attended(self, layer: int) -> Tensor:
        return self.sweep.given(layer)[:, self.sweep.prefix :] * self.layers[layer].attention.write.scale

    def _stream(self, reader: int) -> Tensor:
        """The base run's stream as a reader reads it, [B, T - prefix, D]."""
        name = self.graph.readers[reader]
        layer = self.graph.layer_of(name)
        stream = self.sweep.base.streams[layer][:, self.sweep.prefix :]
        return stream + self._attended(layer) if name.startswith("m") and not self.graph.parallel else stream

    def _edit(self, reader: int, stream: Tensor) -> Edit:
        """What a reader makes of a stream."""
        name, graph = self.graph.readers[reader], self.graph
        index = graph.layer_of(name)
        if name == "logits":
            return Edit("stream", index, stream)
        layer = self.layers[index]
        if name.startswith("m"):
            norm = layer.mlp_norm.module
            return Edit("mlp_in", index, stream if norm is None else norm(stream))
        at = reader - graph.attention_readers_at(index).start
        part: PartName = "q"
        if at >= graph.n_heads:
            at -= graph.n_heads
            part = "v" if at >= graph.n_kv_heads else "k"
            at %= graph.n_kv_heads
        of, norm = layer.parts[part], layer.norm.module
        x = stream if norm is None else norm(stream)
        value = x @ of.weight(x.dtype)[at].T
        bias = of.bias(x.dtype)
        value = value if bias is None else value + bias[at]
        return Edit("made", index, value, None, of.rows[at].to(x.device), of.projection)


def _seen(record: Record, prefix: int) -> Seen:
    """What `head_values` reads of a record, after the prefix."""
    seen = Seen()
    seen.z = [z[:, prefix:] for z in record.z]
    seen.mixed = [mixed[:, prefix:] for mixed in record.mixed]
    return seen


# --- the result and the plan

EFFECTS = {
    "source": pl.String,
    "target": pl.String,
    "effect": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.Int64,
    "direction": pl.String,
    "change": pl.Float64,
}


def _result(
    used: _Setting,
    found: dict[Hashable, dict[int, float]],
    base: dict[int, float],
    other: dict[int, float],
    ran: dict[str, int],
) -> PathPatchingResult:
    graph, order, config = used.engine.wiring.graph, sorted(base), used.config
    start, end = (torch.tensor([side[row] for row in order], dtype=torch.float64) for side in (base, other))
    if float((end - start).mean()) == 0.0:
        raise MethodError(
            f"{config.metric} is the same on prompts and counterfactuals, so effects are not defined",
            got=float(end.mean()),
        )
    values = torch.tensor([[found[route][row] for row in order] for route in used.routes], dtype=torch.float64)
    scores = torch.full(graph.allowed.shape, float("nan"), dtype=torch.float64)
    # positive speaks for the clean behavior, whichever run it was put into
    sign = (-1.0 if config.direction == "noise" else 1.0) * (-1.0 if config.metric in LOWER_IS_BETTER else 1.0)
    rows = []
    for route, own in zip(used.routes, values, strict=True):
        change = float((own - start).mean())
        sources = "+".join(graph.sources[s] for s in dict.fromkeys(s for s, _ in route.edges))
        targets = "+".join(graph.readers[r] for r in route.readers)
        rows.append((sources, targets, *ratio(own - start, end - start), len(order), config.direction, change))
        if len(route.edges) == 1:
            scores[route.edges[0]] = sign * change
    clean, corrupt = (start, end) if config.direction == "noise" else (end, start)
    tensors = {"values": values, "clean": clean, "corrupt": corrupt}
    if any(len(route.edges) == 1 for route in used.routes):
        tensors["scores"] = scores
    facts = {
        "metric": config.metric,
        "direction": config.direction,
        "mlps": config.mlps,
        "clean": float(clean.mean()),
        "corrupt": float(corrupt.mean()),
        "n": len(order),
        "graph": graph.to_dict(),
        "ran": ran,
    }
    return PathPatchingResult(
        tables={"effects": pl.DataFrame(rows, schema=EFFECTS, orient="row")},
        tensors=tensors,
        facts=facts,
        config={"method": "path_patch", **asdict(config)},
    )


@plans.register("path_patch")
def _plan(model: "Model", behavior: "Behavior", *, config: PathPatchConfig | None = None, **options: Any) -> Plan:
    from headwater.localize.engine.planners import words_read
    from headwater.localize.patching.patch import drops_keys

    given = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    for key in ("edges", "senders", "receivers"):
        if isinstance(given.get(key), str) and not (key == "edges" and given[key] == "all"):
            given[key] = (given[key],)
    used = _Setting.of(model, behavior, configured(PathPatchConfig, config, given))
    graph, tally = used.engine.wiring.graph, Tally(model, used.config.memory_mb)
    narrows = can_narrow(used.engine)
    for batch in used.batches:
        length, rows = batch.clean.shape[1], len(batch)
        geometry = geometry_of(used.engine, batch, cached=used.reuse and not drops_keys(used.engine, length))
        words = words_read(model, [used.config.metric], batch)
        prefix = batch.prefix if geometry.cached else 0
        held = rows * length * graph.d_model * (len(graph.sources) + 8 * graph.n_layers) * tally.costs.itemsize
        tally.forward("run that is patched", rows=rows, positions=length, words=words, held=held)
        rest = length - prefix
        tally.forward("run it is patched from", rows=rows, positions=rest, before=prefix, words=words, held=held)
        started = [_Started(route, begin_of(graph, geometry, route)) for route in used.routes]
        if used.config.mlps == "recomputed":
            for route in used.routes:
                start = max(0, min(graph.layer_of(graph.sources[source]) for source, _ in route.edges))
                tally.forward(
                    "MLPs between, heads frozen", rows=rows, positions=rest, before=prefix, words=words,
                    attention=0, mlp=rows * rest * (graph.n_layers - start),
                )  # fmt: skip
        for chunk in geometry.chunks(started, used.at_once):
            n = len(chunk.jobs)
            attention, mlp = geometry.layers_run(chunk.begin, n, narrows)
            tally.forward(
                "paths", rows=n * rows, positions=length - chunk.begin.first, before=chunk.begin.first,
                attention=attention, mlp=mlp, words=words,
            )  # fmt: skip
        passes = 2 if used.config.mlps == "frozen" else 3
        tally.floor(rows=rows, positions=length, forwards=2 + (passes - 1) * len(used.routes))
    return tally.plan("path_patch", n=used.bound.n)

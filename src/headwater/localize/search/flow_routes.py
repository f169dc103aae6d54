"""Information-flow routes: from one forward pass a prompt, which way what the model predicts came (Ferrando & Voita,
2024).

Every representation is a sum: the stream before an attention plus what each head carries from each token, the stream
before an MLP plus what it adds. A term's importance is how near it lies to the sum, in the l1 norm:

    proximity(term) = max(0, |sum| - |sum - term|),   importance = proximity / the sum of all terms' proximities

Routes are followed from the last token's prediction backwards along importances above a threshold.

Shapes: B prompts, T query tokens, S source tokens, H heads, D width, N sources of the graph.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, ModelError
from headwater.core.progress import track
from headwater.core.results import Provenance, register_result
from headwater.localize.attribution.eap import AttributionResult, configured, node_table
from headwater.localize.catalog import methods
from headwater.localize.engine.passes import Engine, Scored, for_discovery, tokens_at_once
from headwater.localize.graph import Graph
from headwater.localize.search.moves import Moves, captured, moves_of
from headwater.localize.search.roles import token_roles, token_table

if TYPE_CHECKING:
    from headwater.behavior.bind import Group
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Reads = Literal["all", "values"]
_ROUTES: dict[str, Any] = {
    "row": pl.Int64, "layer": pl.Int64, "part": pl.String, "head": pl.Int64, "query": pl.Int64, "source": pl.Int64,
    "query_role": pl.String, "source_role": pl.String, "importance": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """threshold: the least importance that a route follows, tau. reads: which readers of a head the flow goes on
    through.

    "values" is the authors' (what a head moves comes from the values at its source tokens); "all" gives a third each
    to queries, keys and values, so that circuits cut from the scores hold what decides where heads attend. metric: what
    facts["clean"] is; routes need none. memory_mb: as for EAP.
    """

    threshold: float = 0.04
    reads: Reads = "all"
    metric: str = "logit_diff"
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise MethodError("a threshold of importance lies between 0 and 1", got=self.threshold)


@register_result
class FlowRoutesResult(AttributionResult):
    """Routes of each prompt, and the flow through each node and edge of the circuit graph, averaged over prompts.

    `tables["routes"]`: row (of the behavior), layer, part (`head`, `mlp`, `residual` around attention,
    `residual_mlp` around the MLP), head, query and source (token positions), their roles, importance.
    `tables["steps"]`: the same by role: layer, part, head, query_role, source_role, share (of prompts whose route goes
    there), importance (mean over those). `tables["tokens"]`: row, position, token, role. `nodes`, `edges` and
    `tensors["scores"]` [sources, readers] as for attribution: the part of what arrives at the prediction that came
    along there. Scores are not negative; those of edges into `logits` sum to 1.
    """

    kind: ClassVar[str] = "flow_routes"
    main: ClassVar[str] = "nodes"

    def route(self, row: int) -> pl.DataFrame:
        """The route of one prompt (a row of the behavior), from the prediction down. Raises MethodError for a row that
        was not run.
        """
        rows = self.tables["routes"].filter(pl.col("row") == row)
        if rows.is_empty():
            raise MethodError("no route of this prompt", got=row, wanted=sorted(set(self.tables["routes"]["row"])))
        return rows


@methods.register("flow_routes")
def flow_routes(
    model: "Model", behavior: "Behavior", *, config: FlowConfig | None = None, **options: Any
) -> FlowRoutesResult:
    """Information-flow routes (Ferrando & Voita, 2024): the subgraph a prediction came through, from one forward a
    prompt.

    Neither a counterfactual nor a gradient is used. Flow is 1 at the last token's prediction; each representation hands
    it down to its terms in proportion to their importance, and a head to its source tokens. Routes are found on
    `behavior.train` where there is a split. Options are those of `FlowConfig`. Known failure: importance is about size,
    not about the answer, so heads that every prompt needs, and tokens that hold large vectors, rank high whatever the
    behavior is.

    Raises ModelError for a model without a circuit graph, or whose attention is not its pattern times its values.
    """
    used = configured(FlowConfig, config, options)  # type: ignore[type-var]
    started = time.monotonic()
    metric, engine = Scored.named(used.metric), Engine(model)
    graph = engine.wiring.graph
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    floats = graph.n_layers * (8 * graph.d_model + 2 * len(graph.sources))
    at_once = tokens_at_once(model, floats, used.memory_mb)
    scores = torch.zeros(graph.allowed.shape, dtype=torch.float64)
    routes: list[pl.DataFrame] = []
    tokens: list[pl.DataFrame] = []
    clean: list[Tensor] = []
    parts = [part for group in bound.groups for part in group.parts(max(1, at_once // group.length))]
    for part in track(parts, "flow_routes"):
        flow = Flow(engine, part.clean)
        clean.append(metric.metric(flow.logits, part.answers.to(flow.logits.device), part.foils.to(flow.logits.device)))
        scores += flow.scores(used.reads)
        roles = token_roles(part)
        routes.append(_routes(flow, part, roles, used.threshold))
        tokens.append(token_table(part, roles, model.tokenizer))
    scores /= bound.n
    every = pl.concat(routes)
    at = graph.allowed.nonzero()
    tables = {
        "nodes": node_table(graph, scores.sum(dim=1)),
        "edges": pl.DataFrame(
            {
                "source": [graph.sources[s] for s in at[:, 0].tolist()],
                "target": [graph.readers[r] for r in at[:, 1].tolist()],
                "score": scores[graph.allowed].tolist(),
            }
        ),
        "routes": every,
        "steps": _by_role(every, bound.n),
        "tokens": pl.concat(tokens),
    }
    facts = {
        "method": "flow_routes",
        "metric": used.metric,
        "n": bound.n,
        "clean": float(torch.cat(clean).double().mean()),
        "threshold": used.threshold,
        "edges_a_prompt": every.height / bound.n,
        "passes": {"forward": float(bound.n), "backward": 0.0},
        "graph": graph.to_dict(),
    }
    result = FlowRoutesResult(
        tables=tables,
        tensors={"scores": scores},
        facts=facts,
        config={"method": "flow_routes", **asdict(used)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)


@dataclass(frozen=True, eq=False)
class Step:
    """Importances in one layer: each sums to 1 over its terms.

    head: [B, H, T, S]; stream: [B, T], of the stream before attention; mlp: [B, T]; stream_mlp: [B, T], of the stream
    before the MLP. In a parallel block there is one sum: head, mlp and stream, and stream_mlp is 1.
    """

    head: Tensor
    stream: Tensor
    mlp: Tensor
    stream_mlp: Tensor


class Flow:
    """Importances of one batch of prompts [B, T], and the flow that follows from them."""

    def __init__(self, engine: Engine, ids: Tensor) -> None:
        self.graph: Graph = engine.wiring.graph
        run = captured(
            engine.model, ids, ("resid_pre", "resid_post", "attn_out", "mlp_out", "v", "pattern", "z"), logits="last"
        )
        assert run.logits is not None
        self.logits: Tensor = run.logits
        self.steps: list[Step] = []
        shape = (len(self.graph.sources), *ids.shape)
        shares = torch.zeros(shape, dtype=engine.work, device=self.logits.device)
        shares[0] = 1.0
        self.at_attention: list[Tensor] = []
        self.at_mlp: list[Tensor] = []
        for index, layer in enumerate(engine.wiring.layers):
            moves = moves_of(layer, run, engine.work)
            before, attention, mlp, after = (
                run[f"{kind}.{index}"].to(engine.work) for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post")
            )
            _check(index, before + attention + mlp, after, engine.model.dtype)
            self.at_attention.append(shares.clone())
            if self.graph.parallel:
                head, stream, own = importances(moves, before, mlp, after)
                step = Step(head, stream, own, torch.ones_like(stream))
            else:
                head, stream, _ = importances(moves, before, None, before + attention)
                own, beside = shares_of([proximity(after, mlp), proximity(after, before + attention)])
                step = Step(head, stream, own, beside)
            self.steps.append(step)
            shares = shares * step.stream
            shares[self.graph.heads_at(index)] = step.head.sum(dim=-1).transpose(0, 1)
            self.at_mlp.append(shares.clone() if not self.graph.parallel else self.at_attention[-1])
            shares = shares * step.stream_mlp
            shares[self.graph.mlp_at(index)] = step.mlp
        self.final = shares
        """[N, B, T]: how much of the last stream each source is; sums to 1 over sources."""

    def scores(self, reads: Reads) -> Tensor:
        """[N, readers] float64: the flow along each edge, summed over prompts."""
        return self.flows(reads)[0]

    def flows(self, reads: Reads) -> tuple[Tensor, Tensor]:
        """(edges [N, readers] summed over prompts, nodes [N, B, T]): what of the prediction's 1 came along there."""
        graph = self.graph
        scores = torch.zeros(graph.allowed.shape, dtype=torch.float64)
        nodes = torch.zeros_like(self.final)

        def read(readers: slice, flow: Tensor, shares: Tensor) -> None:
            found = shares.flatten(1) @ flow.flatten(1).T
            scores[:, readers] += found.double().cpu()
            nodes.add_(shares * flow.sum(dim=0))

        prediction = torch.zeros_like(self.final[:1])
        prediction[..., -1] = 1.0
        read(slice(len(graph.readers) - 1, None), prediction, self.final)
        for index in reversed(range(graph.n_layers)):
            step, own = self.steps[index], graph.mlp_reader_at(index)
            # cloned: reading adds to the nodes
            read(slice(own, own + 1), nodes[graph.mlp_at(index)][None].clone(), self.at_mlp[index])
            heads = nodes[graph.heads_at(index)].clone()
            within = step.head / step.head.sum(dim=-1, keepdim=True).clamp(min=1e-30)
            moved = torch.einsum("hbt,bhts->hbs", heads, within)
            grouped = moved.view(graph.n_kv_heads, graph.group, *moved.shape[1:]).sum(dim=1)
            if reads == "values":
                flow = torch.cat([torch.zeros_like(heads), torch.zeros_like(grouped), grouped])
            else:
                flow = torch.cat([heads, grouped, grouped]) / 3
            read(graph.attention_readers_at(index), flow, self.at_attention[index])
        return scores, nodes


def proximity(whole: Tensor, term: Tensor) -> Tensor:
    """max(0, |whole| - |whole - term|) in the l1 norm over the last axis."""
    return (whole.abs().sum(dim=-1) - (whole - term).abs().sum(dim=-1)).clamp(min=0)


def shares_of(proximities: list[Tensor]) -> list[Tensor]:
    """Each over their sum; where all are 0 the last one has everything."""
    total = torch.stack(proximities).sum(dim=0)
    shares = [p / total.clamp(min=1e-30) for p in proximities]
    shares[-1] = torch.where(total > 0, shares[-1], torch.ones_like(total))
    return shares


def importances(moves: Moves, before: Tensor, mlp: Tensor | None, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(heads [B, H, T, S], stream before [B, T], MLP [B, T]) of the terms of one sum; they add up to 1."""
    found = torch.zeros_like(moves.pattern)
    for head, queries, terms in moves.pieces():
        found[:, head, queries] = proximity(whole[:, queries, None], terms)
    own = torch.zeros_like(before[..., 0]) if mlp is None else proximity(whole, mlp)
    _, own_share, stream = shares_of([found.sum(dim=(1, 3)), own, proximity(whole, before)])
    total = found.sum(dim=(1, 3)) + own + proximity(whole, before)
    return found / total.clamp(min=1e-30)[:, None, :, None], stream, own_share


def _check(index: int, sum_of_terms: Tensor, whole: Tensor, dtype: torch.dtype) -> None:
    error = float((sum_of_terms - whole).norm() / whole.norm().clamp(min=1e-9))
    if not error <= {torch.float64: 1e-6, torch.float32: 1e-2}.get(dtype, 0.1):
        raise ModelError(
            f"the stream after layer {index} is not the stream before it, its attention and its MLP",
            got=f"relative difference {error:.2g}",
            fix="Use patch, which needs no such sum",
        )


def _routes(flow: Flow, group: "Group", roles: list[list[str]], threshold: float) -> pl.DataFrame:
    """The edges above the threshold that the last token's prediction can be reached by, from the top down."""
    columns: dict[str, list[Any]] = {name: [] for name in _ROUTES}
    reached = torch.zeros(flow.final.shape[1:], dtype=torch.bool, device=flow.final.device)
    reached[:, -1] = True

    def keep(layer: int, part: str, kept: Tensor, value: Tensor, where: Callable[[list[int]], tuple[int, ...]]) -> None:
        for place, importance in zip(kept.nonzero().tolist(), value[kept].tolist(), strict=True):
            row, head, query, source = where(place)
            columns["row"].append(group.rows[row])
            columns["layer"].append(layer)
            columns["part"].append(part)
            columns["head"].append(head if head >= 0 else None)
            columns["query"].append(query)
            columns["source"].append(source)
            columns["query_role"].append(roles[row][query])
            columns["source_role"].append(roles[row][source])
            columns["importance"].append(importance)

    def alone(place: list[int]) -> tuple[int, ...]:
        return place[0], -1, place[1], place[1]

    for index in reversed(range(flow.graph.n_layers)):
        step = flow.steps[index]
        keep(index, "mlp", reached & (step.mlp > threshold), step.mlp, alone)
        if not flow.graph.parallel:
            kept = reached & (step.stream_mlp > threshold)
            keep(index, "residual_mlp", kept, step.stream_mlp, alone)
            # an MLP that is kept reads the stream before it
            reached = kept | (reached & (step.mlp > threshold))
        heads = reached[:, None, :, None] & (step.head > threshold)
        keep(index, "head", heads, step.head, lambda place: tuple(place))
        kept = reached & (step.stream > threshold)
        keep(index, "residual", kept, step.stream, alone)
        through_mlp = reached & (step.mlp > threshold) if flow.graph.parallel else torch.zeros_like(reached)
        reached = kept | through_mlp | heads.any(dim=1).any(dim=1)
    return pl.DataFrame(columns, schema=_ROUTES)


def _by_role(routes: pl.DataFrame, n: int) -> pl.DataFrame:
    """Where the routes of how many prompts go, the token positions by their roles."""
    keys = ["layer", "part", "head", "query_role", "source_role"]
    return (
        routes.group_by(keys, maintain_order=True)
        .agg(share=pl.col("row").n_unique() / n, importance=pl.col("importance").mean())
        .sort(["share", "importance", *keys], descending=[True, True, False, False, False, False, False])
    )

"""What searches by real evaluation share: trials run side by side from the layer they change on, and their result."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.attribution.eap import LOWER_IS_BETTER
from headwater.localize.circuit import Circuit
from headwater.localize.engine.ablation import AblationLike, as_ablation, prepare
from headwater.localize.engine.evaluate import CircuitRunner, Reference
from headwater.localize.engine.live import Live
from headwater.localize.engine.passes import Batch, Engine, Scored, make_batches, tokens_at_once
from headwater.localize.graph import Graph
from headwater.localize.selection import Rank, nodes_in, prune, select

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Unit = Literal["edge", "node"]


@register_result
class SearchResult(Result):
    """Circuits that a search by real evaluation went through.

    `tables["curve"]`: setting (ACDC's threshold, or the number of a greedy step), edges, nodes, value (the metric's
    mean), faithfulness, forward, backward (passes spent so far, in forwards of one pair through the whole model); one
    row a circuit, and `tensors["masks"]` [rows, sources, readers] bool. A greedy search's `tables["moves"]`: step,
    action, edge or node, value. `tensors["scores"]` [sources, readers]: the larger, the later the search lets go of an
    edge. facts: method, metric, ablation, full and empty (the metric of the model, and with every edge ablated), n,
    passes {"forward", "backward"} of all rows together.
    """

    kind: ClassVar[str] = "search"
    main: ClassVar[str] = "curve"
    _model: "Model | None" = None

    @property
    def graph(self) -> Graph:
        return Graph(**self.facts["graph"])

    def bind(self, model: "Model") -> Self:
        """Say which model was searched, after loading the result from files; returns itself."""
        self._model = model
        return self

    def circuit(self, row: int | None = None, *, edges: int | None = None, fraction: float | None = None) -> Circuit:
        """The circuit of one row of the curve (the last one unless said), or one of another size cut from the scores;
        dangling parts pruned.
        """
        masks, graph, scores = self.tensors["masks"], self.graph, self.tensors["scores"]
        if row is not None and (edges is not None or fraction is not None):
            raise MethodError("give a row of the curve or a size, not both", got=f"row={row}")
        if edges is not None or fraction is not None:
            mask = select(graph, scores, edges=edges, fraction=fraction, rank=self.facts["rank"])
        elif not -len(masks) <= (-1 if row is None else row) < len(masks):
            raise MethodError("no such row in this search", got=row, wanted=f"0 to {len(masks) - 1}")
        else:
            mask = prune(graph, masks[-1 if row is None else row])
        return Circuit.build(
            graph,
            mask,
            scores,
            model=self._model,
            method=str(self.facts["method"]),
            config=self.config | {"row": row, "edges": edges, "fraction": fraction},
            provenance=self.provenance,
        )


class Trials:
    """Values of circuits as a search needs them: means over all pairs, many circuits that differ in few edges.

    Every batch's reference run, and what its sources write in the state of the search, stay in memory. A trial is
    evaluated with what is not reached from the input ablated; heads that lead nowhere stay in the model (they matter
    only to the deviation of a norm after the output projection).
    """

    def __init__(
        self,
        model: "Model",
        bound: "Bound",
        metric: str,
        ablation: AblationLike,
        memory_mb: float | None = None,
        *,
        pairs: int | None = None,
    ) -> None:
        """pairs: how many a batch at most."""
        self.engine, self.scored, self.ablation = Engine(model), Scored.named(metric), as_ablation(ablation)
        self.graph = self.engine.wiring.graph
        self.lower_is_better = metric in LOWER_IS_BETTER
        self.batches, self.at_once = trial_batches(model, self.graph, bound, metric, memory_mb, pairs=pairs)
        self.n = sum(len(batch) for batch in self.batches)
        self.forward = 0.0
        """Passes spent, in forwards of one pair through the whole model."""
        CircuitRunner(self.engine, self.scored).check()
        prepared = prepare(self.engine, bound, self.batches, self.ablation)
        self.runner = CircuitRunner(self.engine, self.scored, prepared)
        self.references: list[Reference] = []
        self.entered: list[Tensor] = []
        self.clean: list[Tensor] = []
        self._known: list[Tensor] = []
        full, empty = 0.0, 0.0
        for batch in self.batches:
            with self.engine.open(), ExitStack() as stack:
                read = self.scored.narrowed(stack, self.engine, batch)
                logits, entered = self.runner.clean(batch.clean, None)
                reference = self.runner.reference(read, None)
                self.references.append(reference)
                self.entered.append(entered)
                self.clean.append(logits)
                full += float(self.scored(read, logits, logits).double().sum())
                empty += float(self.scored(read, reference.logits, logits).double().sum())
        self.full, self.empty = full / self.n, empty / self.n
        self.forward += self.n * (2 + prepared.passes)

    def faithfulness(self, value: float) -> float:
        """(value - empty) / (full - empty)."""
        return (value - self.empty) / (self.full - self.empty) if self.full != self.empty else float("nan")

    def loss(self, value: float) -> float:
        """The value with the sign at which lower is better."""
        return value if self.lower_is_better else -value

    def settle(self, mask: Tensor) -> float:
        """Run one circuit and keep what its sources write: trials may then start behind what they share with it."""
        self._known = []
        total = 0.0
        for batch, reference, entered, clean in zip(
            self.batches, self.references, self.entered, self.clean, strict=True
        ):
            with self.engine.open(), ExitStack() as stack:
                read = self.scored.narrowed(stack, self.engine, batch)
                live = Live(reference, [reached(self.graph, mask)], entered)
                logits = live.run(batch.clean, None)
                self._known.append(live.written(len(self.graph.sources)))
                total += float(self.scored(read, logits, clean).double().sum())
        self.forward += self.n
        return total / self.n

    def values(self, masks: Sequence[Tensor], start: int = 0) -> list[float]:
        """The metric's mean over all pairs of each circuit. start: their layer from which on they may differ from the
        settled one; earlier layers are not run.
        """
        if start and not self._known:
            raise MethodError("trials that start at a layer need a settled circuit", fix="Call settle(mask) first")
        used = [reached(self.graph, mask) for mask in masks]
        before = self.graph.sources_before(start)
        found = torch.zeros(len(used), dtype=torch.float64)
        for number, batch in enumerate(self.batches):
            size = max(1, self.at_once // batch.clean.numel())
            known = self._known[number][:before] if start else None
            for at in range(0, len(used), size):
                part = used[at : at + size]
                with self.engine.open(), ExitStack() as stack:
                    read = self.scored.narrowed(stack, self.engine, batch)
                    live = Live(self.references[number], part, self.entered[number], start=start, known=known)
                    logits = live.run(batch.clean, None).view(len(part), len(batch), -1)
                    for i, own in enumerate(logits):
                        found[at + i] += self.scored(read, own, self.clean[number]).double().sum().cpu()
        self.forward += len(used) * self.n * (self.graph.n_layers - start) / self.graph.n_layers
        return (found / self.n).tolist()


def trial_batches(
    model: "Model", graph: Graph, bound: "Bound", metric: str, memory_mb: float | None, *, pairs: int | None = None
) -> tuple[list[Batch], int]:
    """(batches of pairs, positions that may be run at once, copies of them side by side included)."""
    floats = graph.d_model * (len(graph.sources) + 2 * graph.per_layer + 16 * graph.n_layers)
    if metric != "logit_diff":
        floats += model.d_vocab // 4  # every token of the vocabulary is unembedded, once a prompt
    at_once = tokens_at_once(model, floats, memory_mb)
    longest = max((group.clean.shape[1] for group in bound.groups), default=1)
    size = at_once if pairs is None else min(at_once, pairs * longest)
    return make_batches(bound, size, reuse_prefix=False), at_once


def reached(graph: Graph, mask: Tensor) -> Tensor:
    """`mask` without the edges of what is not reached from `input`."""
    mask = mask & graph.allowed
    owners = graph.owners.float()
    while True:
        entered = (owners @ mask.any(dim=0).float()) > 0
        entered[0] = True
        if not bool((mask.any(dim=1) & ~entered).any()):
            return mask
        mask = mask & entered[:, None]


def search_result(
    method: str,
    model: "Model",
    pairs: "Behavior",
    trials: Trials,
    rows: Sequence[tuple[float, Tensor, float, float]],
    scores: Tensor,
    *,
    metric: str,
    config: dict[str, Any],
    started: float,
    backward: float = 0.0,
    rank: Rank = "abs",
    facts: dict[str, Any] | None = None,
    tables: dict[str, pl.DataFrame] | None = None,
) -> SearchResult:
    """The result of a search that went through `rows`: (setting, mask, value, passes spent so far)."""
    graph = trials.graph
    kept = [prune(graph, mask) for _, mask, _, _ in rows]
    curve = pl.DataFrame(
        {
            "setting": [float(setting) for setting, *_ in rows],
            "edges": [int(mask.sum()) for mask in kept],
            "nodes": [int(nodes_in(graph, mask)[1:].sum()) for mask in kept],
            "value": [value for _, _, value, _ in rows],
            "faithfulness": [trials.faithfulness(value) for _, _, value, _ in rows],
            "forward": [forward for *_, forward in rows],
            "backward": [backward] * len(rows),
        }
    )
    result = SearchResult(
        tables={"curve": curve} | (tables or {}),
        tensors={"masks": torch.stack([mask for _, mask, _, _ in rows]), "scores": scores},
        facts={
            "method": method,
            "metric": metric,
            "ablation": trials.ablation.kind,
            "full": trials.full,
            "empty": trials.empty,
            "n": trials.n,
            "n_total_edges": graph.n_edges,
            "passes": {"forward": trials.forward, "backward": backward},
            "graph": graph.to_dict(),
            "rank": rank,
        }
        | (facts or {}),
        config={"method": method, **config},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)

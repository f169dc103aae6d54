"""Greedy search by real evaluation: the edge, or node, whose loss costs least goes; or the node that helps most
comes.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.progress import track
from headwater.localize.attribution.eap import configured
from headwater.localize.catalog import methods
from headwater.localize.engine.ablation import Ablation, AblationKind
from headwater.localize.engine.passes import for_discovery
from headwater.localize.graph import Graph
from headwater.localize.search.searching import SearchResult, Trials, Unit, search_result
from headwater.localize.selection import prune

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Move = Literal["drop", "add"]


@dataclass(frozen=True, kw_only=True)
class GreedyConfig:
    """move: "drop" from the whole model, or "add" to nothing (nodes only: an edge by itself joins nothing).

    unit: "edge" or "node". target: stop before faithfulness falls below it (drop), or once it is reached (add). size:
    stop at this many units. passes: stop before more forwards of a pair than this are spent. at_a_time: how many of the
    best units move at each step (with more than 1, those behind the first were not tried together). metric, ablation:
    of the circuits. memory_mb: what a batch may take.
    """

    move: Move = "drop"
    unit: Unit = "node"
    target: float | None = 0.8
    size: int | None = None
    passes: float | None = None
    at_a_time: int = 1
    metric: str = "logit_diff"
    ablation: AblationKind = "counterfactual"
    memory_mb: float | None = None


@methods.register("greedy")
def greedy(model: "Model", behavior: "Behavior", *, config: GreedyConfig | None = None, **options: Any) -> SearchResult:
    """Greedy search over circuits (as the authors of IOI tested sets of nodes; Wang et al., 2022): every step tries
    each single move on real runs and makes the best.

    "drop" starts with the whole model, "add" with nothing (a node comes with all its edges to what is in). The best
    circuit is the one closest to the model: |1 - faithfulness| least. Found on `behavior.train` where there is a split;
    one row of the curve a step, `tables["moves"]` says what moved. Exact: each trial is a run, from the layer on where
    it differs from the step's circuit, many side by side. The cost is one trial a unit and step, so edges of a large
    model need `passes` or `at_a_time`. Options are those of `GreedyConfig`. Known failure: pairs that back each other
    up are each free to drop until one of them is gone, and pairs that only work together never come in one at a time.

    Raises ModelError for a model without a circuit graph, MethodError for options that make no sense.
    """
    used = configured(GreedyConfig, config, options)
    _check(used)
    started = time.monotonic()
    pairs = for_discovery(behavior)
    trials = Trials(model, pairs.bind(model), used.metric, Ablation(kind=used.ablation), used.memory_mb)
    graph = trials.graph
    state: Any = graph.allowed.clone() if used.unit == "edge" else torch.ones(len(graph.sources), dtype=torch.bool)
    if used.move == "add":
        state[1:] = False
    to_mask = _by_edge if used.unit == "edge" else _by_node
    value = trials.settle(to_mask(graph, state))
    rows: list[tuple[float, Tensor, float, float]] = [(0, to_mask(graph, state), value, trials.forward)]
    moves: list[dict[str, Any]] = []
    order = torch.zeros(graph.allowed.shape, dtype=torch.float64)
    for step in track(range(1, graph.n_edges + 1), "greedy"):
        if _done(used, trials, state, value):
            break
        tried = _candidates(used, graph, state)
        cost = sum((graph.n_layers - start) / graph.n_layers for _, start in tried) * trials.n
        if not tried or (used.passes is not None and trials.forward + cost > used.passes):
            break
        found = _values(trials, state, tried, to_mask, used.move)
        best = sorted(range(len(tried)), key=lambda i: abs(1 - trials.faithfulness(found[i])))[: used.at_a_time]
        new = state.clone()
        for i in best:
            new[tried[i][0]] = used.move == "add"
        now = trials.settle(to_mask(graph, new))
        if used.move == "drop" and used.target is not None and trials.faithfulness(now) < used.target:
            break
        for i in best:
            name = _name(graph, tried[i][0])
            moves.append({"step": step, "action": used.move, "moved": name, "value": found[i]})
        state, value = new, now
        mask = to_mask(graph, state)
        rows.append((step, mask, value, trials.forward))
        # what is kept longest, or comes first, ranks highest
        order += mask.double()
    schema = {"step": pl.Int64, "action": pl.String, "moved": pl.String, "value": pl.Float64}
    return search_result(
        "greedy", model, pairs, trials, rows, order,
        metric=used.metric, config=asdict(used), started=started,
        facts={"unit": used.unit}, tables={"moves": pl.DataFrame(moves, schema=schema)},
    )  # fmt: skip


def _check(config: GreedyConfig) -> None:
    for name, value, known in (("move", config.move, ["drop", "add"]), ("unit", config.unit, ["edge", "node"])):
        if value not in known:
            raise MethodError(f"unknown {name} of a greedy search", got=repr(value), wanted=did_you_mean(value, known))
    if config.move == "add" and config.unit == "edge":
        raise MethodError("an edge that is added to nothing joins nothing", fix="Add nodes, or drop edges")
    if config.at_a_time < 1:
        raise MethodError("a step moves at least one unit", got=config.at_a_time)
    if config.target is None and config.size is None and config.passes is None:
        raise MethodError("say when the search stops", wanted="target, size or passes")
    if config.ablation == "optimal":
        raise MethodError("constants are learned for a circuit that is known", wanted="counterfactual, zero or mean")


At = tuple[int, int] | int


def _candidates(config: GreedyConfig, graph: Graph, state: Tensor) -> list[tuple[At, int]]:
    """(edge or source, the layer from which on the circuit changes) of every single move."""
    if config.unit == "edge":
        layers = [graph.layer_of(name) for name in graph.readers]
        return [((s, r), layers[r]) for s, r in prune(graph, state).nonzero().tolist()]
    wanted = state if config.move == "drop" else ~state
    return [(s, graph.layer_of(graph.sources[s])) for s in wanted.nonzero().flatten().tolist() if s]


def _values(
    trials: Trials,
    state: Tensor,
    tried: list[tuple[At, int]],
    to_mask: Callable[[Graph, Tensor], Tensor],
    move: Move,
) -> list[float]:
    found = [0.0] * len(tried)
    for start in sorted({start for _, start in tried}):
        own = [i for i, (_, own_start) in enumerate(tried) if own_start == start]
        masks = []
        for i in own:
            new = state.clone()
            new[tried[i][0]] = move == "add"
            masks.append(to_mask(trials.graph, new))
        for i, value in zip(own, trials.values(masks, start), strict=True):
            found[i] = value
    return found


def _done(config: GreedyConfig, trials: Trials, state: Tensor, value: float) -> bool:
    size = int(state.sum()) - (0 if config.unit == "edge" else 1)
    if config.size is not None and (size <= config.size if config.move == "drop" else size >= config.size):
        return True
    return config.move == "add" and config.target is not None and trials.faithfulness(value) >= config.target


def _by_edge(graph: Graph, state: Tensor) -> Tensor:
    return state & graph.allowed


def _by_node(graph: Graph, state: Tensor) -> Tensor:
    """All edges among these sources and the logits."""
    read = (state.float() @ graph.owners.float()) > 0
    read[-1] = True
    return graph.allowed & state[:, None] & read[None]


def _name(graph: Graph, at: At) -> str:
    return graph.sources[at] if isinstance(at, int) else f"{graph.sources[at[0]]}->{graph.readers[at[1]]}"

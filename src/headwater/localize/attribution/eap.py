"""Edge attribution patching, with and without integrated gradients: a score for every edge of the model's graph."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.catalog import fitted, methods
from headwater.localize.circuit import Circuit
from headwater.localize.engine.edges import EdgeScorer
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    Scored,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.engine.places import Positions, check_positions, in_order
from headwater.localize.engine.positions import top_positions
from headwater.localize.engine.writes import Against, check_against, fixed_values
from headwater.localize.graph import Graph
from headwater.localize.judging.mib import FRACTIONS
from headwater.localize.selection import How, Rank, select

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model
    from headwater.localize.judging.faithfulness import FaithfulnessResult

C = TypeVar("C")
Rule = Literal["left", "right", "midpoint", "gauss"]
RULES = ("left", "right", "midpoint", "gauss")
LOWER_IS_BETTER = frozenset({"kl", "rank"})
"""Metrics whose sign is turned in scores, so that a positive score always speaks for the clean behavior."""


@dataclass(frozen=True, kw_only=True)
class EapConfig:
    """metric: what is differentiated. memory_mb: what a batch may take (None: .4 of what the weights take, at least
    96).

    reuse_prefix: run the tokens that a pair shares once, from the cache; the scores are the same either way. positions:
    "all" (summed), "named" (the behavior's named positions, and the rest as `other`), or "each" (counted from the end).
    against: what a source's write is compared with: the "counterfactual"'s, its "mean" over the prompts (of all
    positions, or "mean_positional": at each position counted from the end), or "zero".
    """

    metric: str = "logit_diff"
    memory_mb: float | None = None
    reuse_prefix: bool = True
    positions: Positions = "all"
    against: Against = "counterfactual"


@dataclass(frozen=True, kw_only=True)
class EapIgConfig(EapConfig):
    """steps: nodes of the integral from counterfactual to clean. rule: where they lie.

    "left" is the left Riemann sum of the method's authors (its first node is the counterfactual run, the clean run is
    never visited), "right" the other one (with which they score nodes), "midpoint" and "gauss" (Gauss-Legendre) are
    more exact for the same number of steps. against: "counterfactual" only; the way leads from prompt to prompt.
    """

    steps: int = 5
    rule: Rule = "left"


@register_result
class AttributionResult(Result):
    """Scores of nodes, and for edge methods of all edges: `tensors["scores"]` [sources, readers], float64.

    A score estimates how much the metric falls when the node or edge carries its counterfactual value: positive speaks
    for the clean behavior (for KL and rank the sign is turned, so that this holds). `tables["nodes"]`: node, layer,
    score (a node's score is the sum over its edges); `tables["edges"]`: source, target, score. By position:
    `tensors["position_scores"]` [sources, readers, places] with the places in `facts["positions"]`, which add up to
    `scores`, and `tables["edge_positions"]`: source, target, position, score (where it is not 0). Of neurons:
    `tensors["neurons"]` [layers, neurons] and `tables["neurons"]`: layer, neuron, score, the strongest first.
    """

    kind: ClassVar[str] = "attribution"
    main: ClassVar[str] = "nodes"
    _model: "Model | None" = None

    @property
    def graph(self) -> Graph:
        return Graph(**self.facts["graph"])

    @property
    def scores(self) -> Tensor:
        """[sources, readers] scores of edges. Raises MethodError for a method that scores nodes only."""
        if "scores" not in self.tensors:
            raise MethodError(f"{self.facts['method']} scores nodes, not edges", fix="Use eap or eap_ig for a circuit")
        return self.tensors["scores"]

    def bind(self, model: "Model") -> Self:
        """Say which model the scores are of, after loading them from files; returns itself."""
        self._model = model
        return self

    def circuit(
        self,
        *,
        edges: int | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
        rank: Rank = "abs",
        how: How = "topn",
        pruned: bool = True,
        positions: bool = False,
    ) -> Circuit:
        """The circuit of the best edges, without dangling parts (so it may have fewer than asked for).

        edges, fraction or threshold: its size. rank: by |score| ("abs") or score ("signed"); the two differ much. how:
        the best edges anywhere ("topn"), or grown from the logits ("greedy").

        positions: each edge at each position by itself, where scores were asked for by position: as many edges at
        positions as were asked for.
        """
        if positions:
            return self._by_position(edges, fraction, threshold, rank, how, pruned)
        mask = select(
            self.graph,
            self.scores,
            edges=edges,
            fraction=fraction,
            threshold=threshold,
            rank=rank,
            how=how,
            pruned=pruned,
        )
        asked = {
            "edges": edges,
            "fraction": fraction,
            "threshold": threshold,
            "rank": rank,
            "how": how,
            "pruned": pruned,
        }
        return Circuit.build(
            self.graph,
            mask,
            self.scores,
            model=self._model,
            method=str(self.facts["method"]),
            config={**self.config, **asked},
            provenance=self.provenance,
        )

    def _by_position(
        self, edges: int | None, fraction: float | None, threshold: float | None, rank: Rank, how: How, pruned: bool
    ) -> Circuit:
        if "position_scores" not in self.tensors:
            raise MethodError("these scores are not by position", fix='Score with positions="named" or "each"')
        if threshold is not None or how != "topn":
            raise MethodError("edges at positions are the best of them all", got=how, wanted="edges or fraction")
        found = self.tensors["position_scores"]
        mask = top_positions(self.graph, found, edges=edges, fraction=fraction, rank=rank, pruned=pruned)
        asked = {"edges": edges, "fraction": fraction, "rank": rank, "pruned": pruned, "positions": True}
        return Circuit.build(
            self.graph,
            mask,
            self.scores,
            positions=self.facts["positions"],
            model=self._model,
            method=str(self.facts["method"]),
            config={**self.config, **asked},
            provenance=self.provenance,
        )

    def curve(
        self,
        behavior: "Behavior",
        *,
        metric: str = "logit_diff",
        fractions: tuple[float, ...] = FRACTIONS,
        rank: Rank = "abs",
        how: Literal["topn", "greedy"] = "topn",
        model: "Model | None" = None,
    ) -> "FaithfulnessResult":
        """Faithfulness of circuits of every size cut from these scores, with MIB's areas CPR and CMD."""
        from headwater.localize.judging.faithfulness import curve

        used = model or self._model
        if used is None:
            raise MethodError("these scores hold no model to run", fix="Call scores.bind(model) first")
        return curve(self.graph, self.scores, used, behavior, metric=metric, fractions=fractions, rank=rank, how=how)

    def top(self, n: int = 10) -> pl.DataFrame:
        """The `n` nodes of largest |score|."""
        return self.tables["nodes"].sort(pl.col("score").abs(), descending=True).head(n)


@methods.register("eap")
def eap(model: "Model", behavior: "Behavior", *, config: EapConfig | None = None, **options: Any) -> AttributionResult:
    """Edge attribution patching (Syed et al., 2023): every edge's score from two forwards and one backward.

    score(u -> r) = mean over pairs of the sum over positions of (u's write on the prompt - on the counterfactual) . the
    gradient of the metric at the stream as r reads it, on the prompt. Scores are computed on `behavior.train` where
    there is a split. Options are those of `EapConfig`. Known failure: where the gradient vanishes (saturated attention
    or softmax), an edge that matters scores near zero; `eap_ig` visits the way in between.

    Raises ModelError for a model without a circuit graph (post-norm, recurrent, encoder-decoder), MethodError for a
    metric without gradient.
    """
    used = configured(EapConfig, config, options)
    if used.metric == "kl":
        raise MethodError(
            "the gradient of KL is zero on the clean run, where EAP takes it",
            wanted="logit_diff or prob_diff",
            fix="Use eap_ig for KL",
        )
    return score_edges("eap", model, behavior, used, [(1.0, 1.0)])


@methods.register("eap_ig")
def eap_ig(
    model: "Model", behavior: "Behavior", *, config: EapIgConfig | None = None, **options: Any
) -> AttributionResult:
    """EAP with integrated gradients over the input embeddings (Hanna et al., 2024): gradients averaged on the way in
    between.

    The stream that enters the first block goes from the counterfactual's to the prompt's in `steps` nodes; edges are
    scored once with the averaged gradients. With `rule="left"` the scores are those of the authors' EAP-IG (inputs),
    up to their division by the batch size. Options are those of `EapIgConfig`. Known failure: interpolated embeddings
    are no text, so gradients on the way may be those of states that never occur.

    Raises as `eap` does.
    """
    used = configured(EapIgConfig, config, options)
    only_counterfactual("eap_ig", used.against, "its way leads from the counterfactual's embeddings to the prompt's")
    return score_edges("eap_ig", model, behavior, used, integration_nodes(used.steps, used.rule))


def integration_nodes(steps: int, rule: Rule) -> list[tuple[float, float]]:
    """(place between 0 and 1, weight) of the nodes of an integral over [0, 1]."""
    if steps < 1:
        raise MethodError("integrated gradients need steps", got=steps, wanted="1 or more")
    if rule in ("left", "right"):
        return [((k + (rule == "right")) / steps, 1 / steps) for k in range(steps)]
    if rule == "midpoint":
        return [((k + 0.5) / steps, 1 / steps) for k in range(steps)]
    if rule == "gauss":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return [(float(x + 1) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]
    raise MethodError("unknown rule of integration", got=repr(rule), wanted=did_you_mean(str(rule), RULES))


def only_counterfactual(method: str, against: str, why: str) -> None:
    """Refuse another reference by name where a method has no meaning against it. Raises MethodError."""
    check_against(against)
    if against != "counterfactual":
        raise MethodError(
            f"{method} cannot score against anything but the counterfactual: {why}",
            got=f"against={against!r}",
            fix="Use eap, atp or eap_ig_activations, which can",
        )


def configured(kind: type[C], config: C | None, options: dict[str, Any]) -> C:
    """One config from a given one or from keywords; an unknown option is refused by name, a misfit value by type."""
    if config is not None and options:
        raise MethodError("give a config or its options, not both", got=sorted(options))
    return config if config is not None else fitted(kind, options)


Add = Callable[[EdgeScorer, Batch], None]


def score_edges(
    method: str,
    model: "Model",
    behavior: "Behavior",
    config: EapConfig,
    nodes: list[tuple[float, float]],
    *,
    add: Add | None = None,
    passes: int = 1,
) -> AttributionResult:
    """What every edge method does around its passes: batches, scores by `EdgeScorer`, tables and facts.

    nodes: (place between counterfactual and clean, weight) where gradients are taken. add: how to score a batch, for a
    method with passes of its own; passes: how many recorded ones it holds at a time.
    """
    started = time.monotonic()
    metric = Scored.named(config.metric, differentiable=True)
    check_positions(config.positions)
    check_against(config.against)
    engine = Engine(model)
    graph = engine.wiring.graph
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    # per position: the sources' differences, the readers' gradients (of one layer, or of all), and what autograd keeps
    readers = graph.per_layer + 1 if len(nodes) == 1 else len(graph.readers)
    floats = graph.d_model * (len(graph.sources) + readers + 25 * passes * graph.n_layers)
    at_once = tokens_at_once(model, floats, config.memory_mb)
    fixed = None
    if config.against != "counterfactual":
        fixed = fixed_values(engine, make_batches(bound, at_once, reuse_prefix=False), config.against)
    # what nodes write is compared at every token where the reference is no prompt with the same beginning
    reuse = config.reuse_prefix and fixed is None and can_reuse_prefix(engine)
    scorer = EdgeScorer(engine, metric, positions=config.positions, fixed=fixed)
    for batch in track(make_batches(bound, at_once, reuse_prefix=reuse), method):
        if add is None:
            scorer.add(batch, nodes)
        else:
            add(scorer, batch)
    sign = (-1.0 if config.metric in LOWER_IS_BETTER else 1.0) / bound.n
    scores = scorer.total * sign
    if not bool(torch.isfinite(scores).all()):
        raise MethodError(
            f"{method} gave scores that are not finite", fix="Load the model in float32, or use another metric"
        )
    tensors = {"scores": scores}
    tables = {"nodes": node_table(graph, scores.sum(dim=1)), "edges": edge_table(graph, scores)}
    facts: dict[str, Any] = {
        "method": method,
        "metric": config.metric,
        "n": bound.n,
        "clean": scorer.mean_clean,
        "corrupt": scorer.mean_corrupt,
        "graph": graph.to_dict(),
    }
    if config.positions != "all":
        names = in_order(scorer.places)
        facts["positions"] = names
        tensors["position_scores"] = torch.stack([scorer.places[name] * sign for name in names], dim=2)
        parts = [
            edge_table(graph, tensors["position_scores"][:, :, i]).with_columns(position=pl.lit(name))
            for i, name in enumerate(names)
        ]
        found = pl.concat(parts).select("source", "target", "position", "score")
        tables["edge_positions"] = found.filter(pl.col("score") != 0)
    result = AttributionResult(
        tables=tables,
        tensors=tensors,
        facts=facts,
        config={"method": method, **asdict(config)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)


def edge_table(graph: Graph, scores: Tensor) -> pl.DataFrame:
    """source, target, score of every edge there is."""
    at = graph.allowed.nonzero()
    return pl.DataFrame(
        {
            "source": [graph.sources[s] for s in at[:, 0].tolist()],
            "target": [graph.readers[r] for r in at[:, 1].tolist()],
            "score": scores[graph.allowed].tolist(),
        }
    )


def node_table(graph: Graph, scores: Tensor) -> pl.DataFrame:
    """node, layer, score of every source (`input` is in layer -1)."""
    layers = [graph.layer_of(name) for name in graph.sources]
    values = [value if math.isfinite(value) else None for value in scores.tolist()]
    return pl.DataFrame(
        {"node": list(graph.sources), "layer": layers, "score": values}, schema_overrides={"score": pl.Float64}
    )

"""Edge attribution patching, with and without integrated gradients: a score for every edge of the model's graph."""

import math
import time
from dataclasses import asdict, dataclass, fields
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
from headwater.localize.edges import EdgeScorer
from headwater.localize.graph import Graph
from headwater.localize.mib import FRACTIONS
from headwater.localize.passes import (
    Engine,
    Scored,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)
from headwater.localize.selection import How, Rank, select

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model
    from headwater.localize.faithfulness import FaithfulnessResult
    from headwater.localize.nodes import AtpConfig

C = TypeVar("C", bound="EapConfig | AtpConfig")
Rule = Literal["left", "midpoint", "gauss"]
LOWER_IS_BETTER = frozenset({"kl", "rank"})
"""Metrics whose sign is turned in scores, so that a positive score always speaks for the clean behavior."""


@dataclass(frozen=True, kw_only=True)
class EapConfig:
    """metric: what is differentiated. memory_mb: what a batch may take (None: .4 of what the weights take, at least
    96).

    reuse_prefix: run the tokens that a pair shares once, from the cache; the scores are the same either way.
    """

    metric: str = "logit_diff"
    memory_mb: float | None = None
    reuse_prefix: bool = True


@dataclass(frozen=True, kw_only=True)
class EapIgConfig(EapConfig):
    """steps: nodes of the integral from counterfactual to clean. rule: where they lie.

    "left" is the left Riemann sum of the method's authors (its first node is the counterfactual run, the clean run is
    never visited), "midpoint" and "gauss" (Gauss-Legendre) are more exact for the same number of steps.
    """

    steps: int = 5
    rule: Rule = "left"


@register_result
class AttributionResult(Result):
    """Scores of nodes, and for edge methods of all edges: `tensors["scores"]` [sources, readers], float64.

    A score estimates how much the metric falls when the node or edge carries its counterfactual value: positive speaks
    for the clean behavior (for KL and rank the sign is turned, so that this holds). `tables["nodes"]`: node, layer,
    score (a node's score is the sum over its edges); `tables["edges"]`: source, target, score.
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
    ) -> Circuit:
        """The circuit of the best edges, without dangling parts (so it may have fewer than asked for).

        edges, fraction or threshold: its size. rank: by |score| ("abs") or score ("signed"); the two differ much. how:
        the best edges anywhere ("topn"), or grown from the logits ("greedy").
        """
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
        from headwater.localize.faithfulness import curve

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
    return _score_edges("eap", model, behavior, used, [(1.0, 1.0)])


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
    return _score_edges("eap_ig", model, behavior, used, integration_nodes(used.steps, used.rule))


def integration_nodes(steps: int, rule: Rule) -> list[tuple[float, float]]:
    """(place between 0 and 1, weight) of the nodes of an integral over [0, 1]."""
    if steps < 1:
        raise MethodError("integrated gradients need steps", got=steps, wanted="1 or more")
    if rule == "left":
        return [(k / steps, 1 / steps) for k in range(steps)]
    if rule == "midpoint":
        return [((k + 0.5) / steps, 1 / steps) for k in range(steps)]
    if rule == "gauss":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return [(float(x + 1) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]
    raise MethodError(
        "unknown rule of integration", got=repr(rule), wanted=did_you_mean(str(rule), ["left", "midpoint", "gauss"])
    )


def configured(kind: type[C], config: C | None, options: dict[str, Any]) -> C:
    """One config from a given one or from keywords; an unknown option is refused by name, a misfit value by type."""
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            raise MethodError(f"unknown option of {kind.__name__}", got=repr(name), wanted=did_you_mean(name, known))
    if config is not None and options:
        raise MethodError("give a config or its options, not both", got=sorted(options))
    return config if config is not None else fitted(kind, options)


def _score_edges(
    method: str, model: "Model", behavior: "Behavior", config: EapConfig, nodes: list[tuple[float, float]]
) -> AttributionResult:
    started = time.monotonic()
    metric = Scored.named(config.metric, differentiable=True)
    engine = Engine(model)
    graph = engine.wiring.graph
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    # per position: the sources' differences, the readers' gradients (of one layer, or of all), and what autograd keeps
    readers = graph.per_layer + 1 if len(nodes) == 1 else len(graph.readers)
    floats = graph.d_model * (len(graph.sources) + readers + 25 * graph.n_layers)
    reuse = config.reuse_prefix and can_reuse_prefix(engine)
    batches = make_batches(bound, tokens_at_once(model, floats, config.memory_mb), reuse_prefix=reuse)
    scorer = EdgeScorer(engine, metric)
    for batch in track(batches, method):
        scorer.add(batch, nodes)
    sign = -1.0 if config.metric in LOWER_IS_BETTER else 1.0
    scores = scorer.total * (sign / bound.n)
    if not bool(torch.isfinite(scores).all()):
        raise MethodError(
            f"{method} gave scores that are not finite", fix="Load the model in float32, or use another metric"
        )
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
    }
    facts = {
        "method": method,
        "metric": config.metric,
        "n": bound.n,
        "clean": scorer.mean_clean,
        "corrupt": scorer.mean_corrupt,
        "graph": graph.to_dict(),
    }
    result = AttributionResult(
        tables=tables,
        tensors={"scores": scores},
        facts=facts,
        config={"method": method, **asdict(config)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)


def node_table(graph: Graph, scores: Tensor) -> pl.DataFrame:
    """node, layer, score of every source (`input` is in layer -1)."""
    layers = [graph.layer_of(name) for name in graph.sources]
    values = [value if math.isfinite(value) else None for value in scores.tolist()]
    return pl.DataFrame(
        {"node": list(graph.sources), "layer": layers, "score": values}, schema_overrides={"score": pl.Float64}
    )

"""Contextual decomposition for transformers (Hsu et al., 2024): how much of every activation, and of the logits, comes
from one node.

The rules by which a node's part goes through the model are those of `decomposition.py`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, register_result
from headwater.localize.attribution.eap import AttributionResult, configured, node_table
from headwater.localize.catalog import methods
from headwater.localize.circuit import Circuit
from headwater.localize.engine.passes import Engine, for_discovery, tokens_at_once
from headwater.localize.search.decomposition import Decomposition, Means, Rules
from headwater.localize.selection import prune

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Baseline = Literal["mean", "zero", "counterfactual"]
Biases = Literal["shared", "rest"]


@dataclass(frozen=True, kw_only=True)
class CdtConfig:
    """baseline: what a source is relevant beyond: its mean over prompts at the same distance from the end, 0, or its
    value on the counterfactual.

    biases: "shared" by size (the authors'), or all to the "rest", which makes relevance in a linear model the exact
    effect. merge_signs: where beta and gamma have different signs the larger takes all, after each projection of an MLP
    and after each block, as the authors' code does for stability. keep: pairs of nodes taken in each hop of the circuit
    that is built from the logits backwards; threshold: instead, all pairs of at least this part of the hop's largest.
    hops: at most. metric: only logit_diff. memory_mb: as for EAP.
    """

    baseline: Baseline = "mean"
    biases: Biases = "shared"
    merge_signs: bool = False
    keep: int = 12
    threshold: float | None = None
    hops: int = 3
    metric: str = "logit_diff"
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        if self.metric != "logit_diff":
            raise MethodError(
                "a decomposition reads relevance off the logits", got=f"metric={self.metric}", wanted="logit_diff"
            )
        if min(self.keep, self.hops) < 1 or (self.threshold is not None and not 0 < self.threshold <= 1):
            raise MethodError(
                "a circuit needs pairs and hops, and a threshold between 0 and 1",
                got=f"keep={self.keep}, hops={self.hops}, threshold={self.threshold}",
            )


@register_result
class CdtResult(AttributionResult):
    """Relevance of every node to the logits and to every other node.

    `tables["nodes"]`: node, layer, score (relevance to the logits, directly and through others: the part of the logit
    difference that is the node's beta; positive speaks for the clean behavior). `tables["hops"]`: hop, source, target,
    relevance: the circuit built backwards from the logits. `tensors["relevance"]` [sources, sources + 1]: of each
    source to each node's output, |beta| / (|beta| + |gamma|), summed over tokens, mean over prompts; the last column is
    the node scores. `tensors["scores"]` [sources, readers], for circuits by edges: the share of what a reader reads
    that comes directly from the source, times the relevance to the logits of the node that reads; for `logits` the
    direct relevance.
    """

    kind: ClassVar[str] = "cdt"
    main: ClassVar[str] = "nodes"

    def built(self) -> Circuit:
        """The circuit of `tables["hops"]`: for each pair the edges from its source into its target, and those from
        `input` into every node taken.
        """
        graph = self.graph
        mask = torch.zeros_like(graph.allowed)
        hops = self.tables["hops"]
        for source, target in zip(hops["source"].to_list(), hops["target"].to_list(), strict=True):
            into = torch.zeros(len(graph.readers), dtype=torch.bool)
            into[-1] = target == "logits"
            if target != "logits":
                into |= graph.owners[graph.source(target)]
            mask[graph.source(source)] |= into
        for name in {name for name in hops["source"].to_list() if name != "input"}:
            mask[0] |= graph.owners[graph.source(name)]
        mask = prune(graph, mask & graph.allowed)
        return Circuit.build(
            graph, mask, self.scores, model=self._model, method="cdt", config=self.config, provenance=self.provenance
        )


@methods.register("cdt")
def cdt(model: "Model", behavior: "Behavior", *, config: CdtConfig | None = None, **options: Any) -> CdtResult:
    """Contextual decomposition for transformers (Hsu et al., 2024): relevance of every node to every later node and to
    the logits, without a gradient.

    Every source's part is propagated through the whole model above it, with attention patterns and norms held at what
    they are on the prompt; the circuit is built from the logits backwards by relevance. Works on `behavior.train` where
    there is a split. Options are those of `CdtConfig`. Tested on GPT-2, NeoX, GPT-J, Phi, Phi-3, Llama, Qwen 2 and 3,
    Gemma 2 and 3, OLMo 1 and 2, Granite and StableLM. Known failure: since patterns are held, a node that acts by where
    later heads attend (through queries and keys) is not relevant at all.

    Raises ModelError for a model without a circuit graph, for mixtures of experts, and where the MLP is not one module
    or a norm has an unknown form.
    """
    used = configured(CdtConfig, config, options)  # type: ignore[type-var]
    started = time.monotonic()
    engine = Engine(model)
    graph = engine.wiring.graph
    pairs = for_discovery(behavior)
    bound = pairs.bind(model)
    rules = Rules(engine, used)
    sources = len(graph.sources)
    at_once = tokens_at_once(model, 6 * sources * graph.d_model, used.memory_mb)
    baseline = Means(engine, bound) if used.baseline == "mean" else None
    relevance = torch.zeros(sources, sources + 1, dtype=torch.float64)
    shares = torch.zeros(graph.allowed.shape, dtype=torch.float64)
    clean = 0.0
    parts = [part for group in bound.groups for part in group.parts(max(1, at_once // group.length))]
    with engine.open():
        for part in track(parts, "cdt"):
            found = Decomposition(rules, part, baseline)
            relevance += found.relevance
            shares += found.shares
            clean += float(found.whole.sum())
    relevance, shares = relevance / bound.n, shares / bound.n
    to_logits = relevance[:, -1]
    # how relevant to the logits is the node that reads; a shared key/value head counts for its heads together
    weight = graph.owners.double().T @ to_logits
    weight[-1] = 1.0
    scores = (shares * weight).masked_fill(~graph.allowed, 0.0)
    at = graph.allowed.nonzero()
    tables = {
        "nodes": node_table(graph, to_logits),
        "edges": pl.DataFrame(
            {
                "source": [graph.sources[s] for s in at[:, 0].tolist()],
                "target": [graph.readers[r] for r in at[:, 1].tolist()],
                "score": scores[graph.allowed].tolist(),
            }
        ),
        "hops": build_hops(graph.sources, relevance, used),
    }
    forward = 1.0 + (used.baseline != "zero") + _ways(graph.n_layers, graph.n_heads)
    facts = {
        "method": "cdt",
        "metric": used.metric,
        "n": bound.n,
        "clean": clean / bound.n,
        "passes": {"forward": forward * bound.n, "backward": 0.0},
        "graph": graph.to_dict(),
    }
    result = CdtResult(
        tables=tables,
        tensors={"scores": scores, "relevance": relevance},
        facts=facts,
        config={"method": "cdt", **asdict(used)},
        provenance=Provenance.collect(model, pairs, seconds=time.monotonic() - started),
    )
    return result.bind(model)


def _ways(layers: int, heads: int) -> float:
    """How many forwards the sources' ways to the logits are: each by the layers that lie above it."""
    above = [layers - 1 - layer for layer in range(layers)]
    return 1.0 + sum(heads * (n + 0.5) + n for n in above) / layers


def build_hops(sources: Sequence[str], relevance: Tensor, config: CdtConfig) -> pl.DataFrame:
    """hop, source, target, relevance: the pairs taken from the logits backwards.

    In each hop the targets are the nodes that the last hop found (first: the logits), and the pairs of largest
    |relevance| to them are taken; nodes found before are not targets again.
    """
    rows: list[tuple[int, str, str, float]] = []
    targets, known = [len(sources)], set[int]()
    names = [*sources, "logits"]
    for hop in range(config.hops):
        pairs = [(abs(float(relevance[s, t])), s, t) for t in targets for s in range(min(t, len(sources)))]
        pairs = sorted((p for p in pairs if p[0] > 0), key=lambda p: (-p[0], p[1], p[2]))
        if config.threshold is None:
            pairs = pairs[: config.keep]
        else:
            pairs = [p for p in pairs if p[0] >= config.threshold * pairs[0][0]]
        rows += [(hop, names[s], names[t], float(relevance[s, t])) for _, s, t in pairs]
        new = sorted({s for _, s, _ in pairs} - known - {0})
        known |= set(new)
        targets = new
        if not targets:
            break
    schema = {"hop": pl.Int64, "source": pl.String, "target": pl.String, "relevance": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")

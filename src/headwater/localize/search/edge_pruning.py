"""Edge pruning: a mask over edges, or nodes, learned by gradient descent under a target of sparsity."""

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.localize.attribution.eap import configured
from headwater.localize.catalog import methods
from headwater.localize.engine.ablation import Ablation, AblationKind
from headwater.localize.engine.passes import Scored, for_discovery
from headwater.localize.engine.soft import soft_logits
from headwater.localize.graph import Graph
from headwater.localize.search.searching import SearchResult, Trials, Unit, search_result
from headwater.localize.selection import top_n

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""The hard-concrete distribution's temperature and the ends it is stretched to before it is clamped to [0, 1]."""
_SHIFT = BETA * math.log(-LOW / HIGH)
_START = 2.0
"""Where every mask's logit starts: almost surely open."""


@dataclass(frozen=True, kw_only=True)
class EdgePruningConfig:
    """fraction: of all edges (nodes), what the search aims to keep at its end. steps: of gradient descent, each on one
    batch of `pairs` pairs. warmup: the share of steps over which the target falls from 1 to `fraction`.

    learning_rate: of the masks' logits; penalty_rate: of the two multipliers that hold the target. metric: what is
    kept: "kl" (from the model's own output), or one that should not get worse. ablation: what a masked edge carries.
    seed: of the masks' noise and of the batches' order. memory_mb: what a batch may take.
    """

    fraction: float = 0.05
    steps: int = 200
    pairs: int = 16
    warmup: float = 0.7
    learning_rate: float = 0.2
    penalty_rate: float = 0.2
    metric: str = "kl"
    ablation: AblationKind = "counterfactual"
    seed: int = 0
    memory_mb: float | None = None


@methods.register("edge_pruning")
def edge_pruning(
    model: "Model", behavior: "Behavior", *, config: EdgePruningConfig | None = None, **options: Any
) -> SearchResult:
    """Edge pruning (Bhaskar et al., 2024): a mask for every edge is learned so that the model's output stays and few
    edges are left; the relaxation of their number is that of Louizos et al. (2018).

    Each mask is a hard-concrete variable: a stretched, clamped sigmoid of its logit plus noise, so that its probability
    of being open has a gradient. Two multipliers, raised by gradient ascent, hold the expected share of open masks to a
    target that falls to `fraction`. Weights are frozen; gradients are taken to the masks only. The result's scores are
    the logits, so every size can be cut from them (`circuit(edges=...)`); its curve has the circuit of the size aimed
    for. Found on `behavior.train` where there is a split. Options are those of `EdgePruningConfig`. Known failure:
    masks that are half open together may do what no circuit of whole edges does, and another seed may find another
    circuit.

    Raises ModelError for a model without a circuit graph, MethodError for a metric without gradient or options that
    make no sense.
    """
    return _learned("edge_pruning", "edge", model, behavior, configured(EdgePruningConfig, config, options))


@methods.register("node_pruning")
def node_pruning(
    model: "Model", behavior: "Behavior", *, config: EdgePruningConfig | None = None, **options: Any
) -> SearchResult:
    """Subnetwork probing over nodes (Cao et al., 2021): as `edge_pruning`, with one mask for every head and MLP.

    A node's mask counts for all its edges out. The result's scores are its nodes' logits, the same for all edges out of
    one node. Options are those of `EdgePruningConfig`; `fraction` is of nodes. Known failure: a node that matters to
    one reader only is kept or lost as a whole.

    Raises as `edge_pruning` does.
    """
    return _learned("node_pruning", "node", model, behavior, configured(EdgePruningConfig, config, options))


def _learned(method: str, unit: Unit, model: "Model", behavior: "Behavior", config: EdgePruningConfig) -> SearchResult:
    _check(config)
    Scored.named(config.metric, differentiable=True)
    started = time.monotonic()
    pairs = for_discovery(behavior)
    trials = Trials(
        model, pairs.bind(model), config.metric, Ablation(kind=config.ablation), config.memory_mb, pairs=config.pairs
    )
    graph = trials.graph
    free = torch.zeros(len(graph.sources), dtype=torch.bool) if unit == "node" else graph.allowed
    if unit == "node":
        free[1:] = True  # the input is no node to prune
    masks = Masks(int(free.sum()), config)
    order: list[int] = []
    generator = torch.Generator().manual_seed(config.seed)
    spent = 0.0
    steps: list[dict[str, float]] = []
    for step in track(range(config.steps), method):
        if not order:
            order = torch.randperm(len(trials.batches), generator=generator).tolist()
        number = order.pop()
        batch, target = trials.batches[number], masks.target(step)
        with trials.engine.open(), ExitStack() as stack, torch.enable_grad():
            read = trials.scored.narrowed(stack, trials.engine, batch)
            weights = _spread(graph, free, masks.sampled(generator))
            logits = soft_logits(trials.references[number], weights, trials.entered[number])
            loss = trials.scored(read, logits, trials.clean[number]).mean()
            loss = loss if trials.lower_is_better else -loss
            masks.step(loss, target)
        spent += len(batch)
        steps.append({"step": step, "loss": float(loss.detach()), "open": masks.share(), "target": target})
    scores = torch.full(graph.allowed.shape, -torch.inf, dtype=torch.float64)
    logits_of = masks.logits.detach().double()
    if unit == "edge":
        scores[graph.allowed] = logits_of
        mask = top_n(graph, scores, int(config.fraction * graph.n_edges), rank="signed")
    else:
        scores[1:] = logits_of[:, None]
        scores[0] = float(logits_of.max()) + 1.0  # always there
        kept = torch.topk(logits_of, max(1, int(config.fraction * len(logits_of)))).indices + 1
        mask = torch.zeros_like(graph.allowed)
        mask[[0, *kept.tolist()]] = True
    scores = scores.masked_fill(~graph.allowed, 0.0)
    mask = mask & graph.allowed
    trials.forward += spent
    value = trials.values([mask])[0]
    return search_result(
        method, model, pairs, trials, [(config.fraction, mask, value, trials.forward)], scores,
        metric=config.metric, config=asdict(config), started=started, backward=spent, rank="signed",
        facts={"unit": unit}, tables={"steps": pl.DataFrame(steps)},
    )  # fmt: skip


def _check(config: EdgePruningConfig) -> None:
    if not 0 < config.fraction < 1 or not 0 <= config.warmup <= 1:
        raise MethodError("shares lie between 0 and 1", got=f"fraction={config.fraction}, warmup={config.warmup}")
    if min(config.steps, config.pairs) < 1 or min(config.learning_rate, config.penalty_rate) <= 0:
        raise MethodError(
            "learning masks needs steps, pairs and rates above 0",
            got=f"steps={config.steps}, pairs={config.pairs}, rates {config.learning_rate}, {config.penalty_rate}",
        )
    if config.ablation == "optimal":
        raise MethodError("constants are learned for a circuit that is known", wanted="counterfactual, zero or mean")


def _spread(graph: Graph, free: Tensor, values: Tensor) -> Tensor:
    """[sources, readers] weights of the masks' values: by edge, or by node (all its edges out; the input's are 1)."""
    if free.ndim == 2:
        return torch.zeros(free.shape, dtype=values.dtype).masked_scatter(free, values)
    weights = torch.cat([torch.ones(1, dtype=values.dtype), values])
    return weights[:, None] * graph.allowed


class Masks:
    """Hard-concrete masks, and the multipliers that hold their expected open share to a target."""

    def __init__(self, n: int, config: EdgePruningConfig) -> None:
        self.config = config
        self.logits = torch.full((n,), _START, dtype=torch.float64, requires_grad=True)
        self.multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [self.logits], "lr": config.learning_rate},
                {"params": [self.multipliers], "lr": config.penalty_rate, "maximize": True},
            ]
        )

    def target(self, step: int) -> float:
        """The share of open masks aimed for at a step: from what there is at the start down to `fraction`."""
        begin = float(torch.sigmoid(torch.tensor(_START - _SHIFT)))
        way = min(1.0, step / max(1.0, self.config.warmup * self.config.steps))
        return begin + (self.config.fraction - begin) * way

    def sampled(self, generator: torch.Generator) -> Tensor:
        """[n] values between 0 and 1, drawn; differentiable by the logits."""
        noise = torch.rand(self.logits.shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        value = torch.sigmoid((noise.log() - (-noise).log1p() + self.logits) / BETA)
        return (value * (HIGH - LOW) + LOW).clamp(0, 1)

    def expected(self) -> Tensor:
        """The expected share of masks that are not 0."""
        return torch.sigmoid(self.logits - _SHIFT).mean()

    def share(self) -> float:
        return float(self.expected().detach())

    def step(self, loss: Tensor, target: float) -> None:
        """One step: down in the masks, up in the multipliers."""
        miss = self.expected() - target
        whole = loss.double() + self.multipliers[0] * miss + self.multipliers[1] * miss.square()
        self.optimizer.zero_grad()
        whole.backward()
        self.optimizer.step()

"""Discrete codes of attention heads: which heads say something on prompts that they do not say on counterfactuals, from
a handful of examples (O'Neill & Bui, 2024).

A small sparse autoencoder is trained on every head's output at every token of both kinds of prompts; the feature that
is strongest there is the head's code, one integer (or none). A head whose codes tell prompts from counterfactuals takes
part in what sets them apart.

Shapes: P pairs, T tokens, N heads of all layers, K width of a head, M codes, E = 2 P examples (prompts first).
"""

import time
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
from headwater.localize.engine.passes import Scored, for_discovery
from headwater.localize.engine.wiring import graph_of
from headwater.localize.graph import Graph
from headwater.localize.search.moves import captured

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Contrast = Literal["class", "pair"]
Positions = Literal["last", "each"]
NONE = -1
"""The code of a head in which no feature is active."""


@dataclass(frozen=True, kw_only=True)
class HeadCodesConfig:
    """examples: pairs at most. codes: features of the autoencoder, M. steps, learning_rate, sparsity: its training
    (Adam on mean squared error + sparsity * the mean l1 norm of the features). batch: head outputs a step. positions:
    codes at the "last" token only, or at "each" (a code counts as present where it is at any token).

    contrast: "class" compares how many prompts and how many counterfactuals a code is present in (the authors'), "pair"
    counts the pairs whose two prompts have different codes. draws: relabelings of pairs for the null of "class".
    metric: what facts["clean"] is.
    """

    examples: int = 10
    codes: int = 64
    steps: int = 300
    learning_rate: float = 3e-3
    sparsity: float = 0.05
    batch: int = 1024
    positions: Positions = "last"
    contrast: Contrast = "class"
    draws: int = 200
    metric: str = "logit_diff"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 2 or min(self.codes, self.steps, self.batch, self.draws) < 1:
            raise MethodError(
                "codes of heads need 2 examples and one of everything else",
                got=f"examples={self.examples}, codes={self.codes}, steps={self.steps}, draws={self.draws}",
            )


@register_result
class HeadCodesResult(AttributionResult):
    """Codes of every head, and how well they tell prompts from counterfactuals.

    `tables["heads"]`: node, layer, head, score (difference - null), difference (how far its codes' presence differs),
    null (the same with each pair's labels exchanged at random, mean), p, codes (different ones it uses), unique (codes
    present in prompts only). A head whose code is another in every example differs much, and as much under the null: so
    the difference alone ranks badly. `nodes`: node, layer, score, heads only. `tables["pairs"]`: source, target, score:
    how much more two heads are engaged together on prompts than on counterfactuals. `tensors["codes"]` [E, T, N] long
    (prompts first; -1: no feature, and where a prompt is shorter than the longest, at its start). `tensors["scores"]`
    [sources, readers]: for an edge between heads the pair's score, between a head and the input, an MLP or the logits
    the head's; edges that touch no head get the largest, as this method cannot judge them.
    """

    kind: ClassVar[str] = "head_codes"
    main: ClassVar[str] = "heads"


@methods.register("head_codes")
def head_codes(
    model: "Model", behavior: "Behavior", *, config: HeadCodesConfig | None = None, **options: Any
) -> HeadCodesResult:
    """Heads of a circuit from 5 to 10 examples, by discrete codes of a sparse autoencoder on head outputs (O'Neill &
    Bui, 2024).

    Two forwards a pair, and a small autoencoder trained on what they gave; nothing is patched. Uses the first examples
    of `behavior.train` where there is a split. Options are those of `HeadCodesConfig`. Known failure: heads are found
    by what differs, not by what matters: where counterfactuals ask the same of the model with another answer, the two
    kinds of prompts share their codes and no head stands out (give counterfactuals without the behavior, or
    contrast="pair").

    Raises ModelError for a model without a circuit graph, MethodError where there are fewer than two pairs.
    """
    used = configured(HeadCodesConfig, config, options)  # type: ignore[type-var]
    started = time.monotonic()
    metric, graph = Scored.named(used.metric), graph_of(model)
    pairs = for_discovery(behavior)
    pairs = pairs[: used.examples]
    bound = pairs.bind(model)
    if bound.n < 2:
        raise MethodError("codes of heads need at least two pairs", got=bound.n)
    outputs, clean = _head_outputs(model, bound, used, metric)
    flat = outputs.flatten(0, 1)
    there = ~flat.isnan().any(dim=-1).any(dim=-1)
    center, spread = flat[there].mean(dim=0), flat[there].std(dim=0).mean(dim=-1, keepdim=True).clamp(min=1e-8)
    normed = (flat - center) / spread
    coder = train_coder(normed[there].flatten(0, 1), used)
    codes = torch.full(flat.shape[:2], NONE)
    codes[there] = coder.codes(normed[there])
    codes = codes.view(*outputs.shape[:3])
    present = presence(codes, used.codes)
    scores, null, p = judge(present, used)
    engaged = engagement(present)
    together = _together(engaged, graph)
    table = _head_table(graph, scores, null, p, present)
    nodes = torch.full((len(graph.sources),), float("nan"), dtype=torch.float64)
    of_heads = _head_rows(graph)
    nodes[of_heads] = scores - null
    edges = _edge_scores(graph, scores - null, together)
    best = sorted(((float(together[a, b]), a, b) for a, b in (together != 0).nonzero().tolist()), reverse=True)
    names = [graph.sources[i] for i in of_heads.tolist()]
    facts = {
        "method": "head_codes",
        "metric": used.metric,
        "rank": "signed",  # below 0: codes differ less than relabeled pairs do
        "n": bound.n,
        "clean": clean,
        "error": coder.error,
        "active": coder.active,
        "codes_used": int(present.any(dim=0).any(dim=0).sum()),
        "passes": {"forward": 2.0 * bound.n, "backward": 0.0},
        "graph": graph.to_dict(),
    }
    result = HeadCodesResult(
        tables={
            "heads": table,
            "nodes": node_table(graph, nodes).drop_nulls("score"),
            "pairs": pl.DataFrame(
                [(names[a], names[b], value) for value, a, b in best],
                schema={"source": pl.String, "target": pl.String, "score": pl.Float64},
                orient="row",
            ),
        },
        tensors={"codes": codes, "scores": edges},
        facts=facts,
        config={"method": "head_codes", **asdict(used)},
        provenance=Provenance.collect(model, pairs, seed=used.seed, seconds=time.monotonic() - started),
    )
    return result.bind(model)


def _head_outputs(model: "Model", bound: "Bound", config: HeadCodesConfig, metric: Scored) -> tuple[Tensor, float]:
    """([E, T, N, K] float32 of every head's mixed values, prompts first, NaN before a shorter prompt's start; the
    metric's mean on the prompts).
    """
    layers, longest = model.n_layers, 1 if config.positions == "last" else max(g.length for g in bound.groups)
    sides: dict[str, list[Tensor]] = {"clean": [], "corrupt": []}
    values = []
    for group in bound.groups:
        for side, found in sides.items():
            run = captured(model, getattr(group, side), ("z",), logits="last")
            z = torch.cat([run[f"z.{layer}"] for layer in range(layers)], dim=2).float().cpu()[:, -longest:]
            padded = z.new_full((len(z), longest, *z.shape[2:]), float("nan"))
            padded[:, longest - z.shape[1] :] = z
            found.append(padded)
            if side == "clean" and run.logits is not None:
                device = run.logits.device
                values.append(metric.metric(run.logits, group.answers.to(device), group.foils.to(device)))
    return torch.cat([*sides["clean"], *sides["corrupt"]]), float(torch.cat(values).double().mean())


# --- the autoencoder


@dataclass(frozen=True, eq=False)
class Coder:
    """A trained autoencoder: features = relu(x encoder + bias), x about features decoder + shift.

    error: mean squared error over the variance. active: features active in a head's output, mean.
    """

    encoder: Tensor
    bias: Tensor
    error: float
    active: float

    def codes(self, x: Tensor) -> Tensor:
        """The strongest feature of each vector [..., K], or -1 where none is active."""
        strength, code = (x @ self.encoder + self.bias).max(dim=-1)
        return torch.where(strength > 0, code, torch.full_like(code, NONE))


def train_coder(x: Tensor, config: HeadCodesConfig) -> Coder:
    """Train on vectors [n, K]. The same seed gives the same autoencoder, and the global random state is left alone."""
    generator = torch.Generator().manual_seed(config.seed)
    width, m = x.shape[1], config.codes
    decoder = torch.randn(m, width, generator=generator)
    decoder = decoder / decoder.norm(dim=1, keepdim=True)
    weights = {"encoder": decoder.T.clone(), "bias": torch.zeros(m), "decoder": decoder, "shift": torch.zeros(width)}
    for weight in weights.values():
        weight.requires_grad_(True)
    optimizer = torch.optim.Adam(list(weights.values()), lr=config.learning_rate)

    def forward(batch: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.relu(batch @ weights["encoder"] + weights["bias"])
        return features, features @ weights["decoder"] + weights["shift"]

    with torch.enable_grad():
        for _ in track(range(config.steps), "head_codes: autoencoder"):
            batch = x[torch.randint(len(x), (min(config.batch, len(x)),), generator=generator)]
            features, again = forward(batch)
            loss = (again - batch).square().mean() + config.sparsity * features.sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # else features shrink to escape the l1 norm while the decoder grows
                weights["decoder"] /= weights["decoder"].norm(dim=1, keepdim=True).clamp(min=1e-8)
    with torch.no_grad():
        features, again = forward(x)
        error = float((again - x).square().mean() / (x - x.mean(dim=0)).square().mean().clamp(min=1e-12))
        active = float((features > 0).float().sum(dim=1).mean())
    return Coder(weights["encoder"].detach(), weights["bias"].detach(), error, active)


# --- what codes say


def presence(codes: Tensor, n_codes: int) -> Tensor:
    """[E, N, M] bool: whether a head uses a code at any token of an example."""
    found = torch.zeros(codes.shape[0], codes.shape[2], n_codes + 1, dtype=torch.bool)
    found.scatter_(2, (codes + 1).transpose(1, 2), value=True)
    return found[..., 1:]


def class_scores(present: Tensor) -> Tensor:
    """[N] of [E, N, M], the first half prompts: how far codes' presence differs from that in counterfactuals.

    The sum over codes of |share of prompts - share of counterfactuals|, over the sum of both: 0 where each code is
    present equally often, 1 where no code is in both.
    """
    half = len(present) // 2
    ours, theirs = present[:half].double().mean(dim=0), present[half:].double().mean(dim=0)
    return (ours - theirs).abs().sum(dim=-1) / (ours + theirs).sum(dim=-1).clamp(min=1e-12)


def pair_scores(present: Tensor) -> Tensor:
    """[N]: mean over pairs of the codes that only one of its two prompts has, as a share of those that either has."""
    half = len(present) // 2
    either = (present[:half] | present[half:]).double().sum(dim=-1)
    one = (present[:half] ^ present[half:]).double().sum(dim=-1)
    return torch.where(either > 0, one / either.clamp(min=1), torch.zeros_like(one)).mean(dim=0)


def judge(present: Tensor, config: HeadCodesConfig) -> tuple[Tensor, Tensor, Tensor]:
    """(difference, its mean under the null, p), each [N]. The null exchanges prompt and counterfactual of random pairs.

    Exchanging changes nothing in scores by "pair": their null is 0, and p is not defined (NaN).
    """
    if config.contrast == "pair":
        scores = pair_scores(present)
        return scores, torch.zeros_like(scores), torch.full_like(scores, float("nan"))
    scores, half = class_scores(present), len(present) // 2
    generator = torch.Generator().manual_seed(config.seed)
    total, above = torch.zeros_like(scores), torch.ones_like(scores)
    for _ in range(config.draws):
        swap = torch.rand(half, generator=generator) < 0.5
        index = torch.arange(2 * half)
        index[:half][swap] += half
        index[half:][swap] -= half
        drawn = class_scores(present[index])
        total += drawn
        above += drawn >= scores - 1e-12
    return scores, total / config.draws, above / (1 + config.draws)


def engagement(present: Tensor) -> Tensor:
    """[E, N]: how much an example's codes are those of prompts, the largest share difference of a code it has."""
    half = len(present) // 2
    lean = (present[:half].double().mean(dim=0) - present[half:].double().mean(dim=0)).clamp(min=0)
    return (present * lean).amax(dim=-1)


def _together(engaged: Tensor, graph: Graph) -> Tensor:
    """[N, N]: how much more a head and one of a later layer are engaged together on prompts than on counterfactuals."""
    half = len(engaged) // 2
    joint = (torch.einsum("en,em->nm", x, x) / half for x in (engaged[:half], engaged[half:]))
    ours, theirs = joint
    layer = torch.arange(graph.n_layers).repeat_interleave(graph.n_heads)
    return (ours - theirs).clamp(min=0) * (layer[:, None] < layer[None, :])


def _head_rows(graph: Graph) -> Tensor:
    """[N]: which source each head is, layer by layer."""
    return torch.cat([torch.arange(s.start, s.stop) for s in map(graph.heads_at, range(graph.n_layers))])


def _edge_scores(graph: Graph, scores: Tensor, together: Tensor) -> Tensor:
    rows = _head_rows(graph)
    nodes = torch.full((len(graph.sources),), float("nan"), dtype=torch.float64)
    nodes[rows] = scores.clamp(min=0)
    pairs = torch.zeros(len(graph.sources), len(graph.sources), dtype=torch.float64)
    pairs[rows[:, None], rows] = together
    owned = graph.owners.double()
    of_head = torch.zeros(len(graph.readers), dtype=torch.bool)
    target = torch.full((len(graph.readers),), float("nan"), dtype=torch.float64)
    for reader in range(len(graph.readers) - 1):
        owner = owned[:, reader].nonzero().flatten()
        of_head[reader] = not bool(nodes[owner].isnan().any())
        target[reader] = nodes[owner].max() if of_head[reader] else float("nan")
    is_head = ~nodes.isnan()
    best = float(nodes[is_head].max())
    out = torch.full(graph.allowed.shape, best, dtype=torch.float64)
    out[is_head] = nodes[is_head][:, None]
    out[:, of_head] = torch.where(is_head[:, None], (pairs @ owned)[:, of_head], target[of_head])
    return out.masked_fill(~graph.allowed, 0.0)


def _head_table(graph: Graph, scores: Tensor, null: Tensor, p: Tensor, present: Tensor) -> pl.DataFrame:
    half = len(present) // 2
    ours, theirs = present[:half].any(dim=0), present[half:].any(dim=0)
    count = len(scores)
    return pl.DataFrame(
        {
            "node": [graph.sources[i] for i in _head_rows(graph).tolist()],
            "layer": [i // graph.n_heads for i in range(count)],
            "head": [i % graph.n_heads for i in range(count)],
            "score": (scores - null).tolist(),
            "difference": scores.tolist(),
            "null": null.tolist(),
            "p": [None if value != value else value for value in p.tolist()],
            "codes": (ours | theirs).sum(dim=-1).tolist(),
            "unique": (ours & ~theirs).sum(dim=-1).tolist(),
        },
        schema_overrides={"p": pl.Float64},
    )

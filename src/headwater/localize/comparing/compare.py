"""How alike two circuits are, beside what chance gives: overlap of nodes, heads, edges, weights, and of whole rankings.

The nulls keep the layer profile, because any two circuits of one architecture share much of that: `edges` draws one
circuit's edges anew within each pair of layers, `heads` renames its heads within each layer, `scores` permutes scores
within each pair of layers. (On one graph: the circuits may come from other tasks, languages, checkpoints, or models of
the same shape.)
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom, rankdata
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.graph import Graph
from headwater.localize.judging.nulls import random_circuits
from headwater.localize.selection import nodes_in

if TYPE_CHECKING:
    from headwater.localize.attribution.eap import AttributionResult
    from headwater.localize.circuit import Circuit

Floats = NDArray[np.float64]
_SCHEMA: dict[str, Any] = {
    "what": pl.String, "measure": pl.String, "value": pl.Float64, "expected": pl.Float64, "lo": pl.Float64,
    "hi": pl.Float64, "p": pl.Float64, "percentile": pl.Float64, "null": pl.String, "a": pl.Int64, "b": pl.Int64,
    "shared": pl.Int64,
}  # fmt: skip


@register_result
class ComparisonResult(Result):
    """`tables["overlap"]`: what (nodes, heads, edges, weights, scores), measure, value, expected, lo, hi, p,
    percentile, null, a, b, shared.

    `expected` is the mean under the null, lo and hi the middle 95% of its draws, p the chance of a value at least as
    large, percentile the share of draws below (ties count half). a, b, shared count members. `measure`: `iou` (shared
    over union, the Jaccard index), `recall` (share of a found in b), `precision` (share of b found in a), `spearman`.
    """

    kind: ClassVar[str] = "comparison"
    main: ClassVar[str] = "overlap"

    def value(self, what: str, measure: str = "iou") -> float:
        """One number of the table. Raises MethodError where it was not measured."""
        found = self.tables["overlap"].filter((pl.col("what") == what) & (pl.col("measure") == measure))
        if not found.height:
            known = [f"{w} {m}" for w, m in self.tables["overlap"].select("what", "measure").unique().rows()]
            raise MethodError("this comparison has no such measure", got=f"{what} {measure}", wanted=", ".join(known))
        return float(found["value"][0])


def compare(
    a: "Circuit | AttributionResult",
    b: "Circuit | AttributionResult",
    *,
    n: int = 1000,
    seed: int = 0,
    names: tuple[str, str] = ("a", "b"),
) -> ComparisonResult:
    """How much two circuits share, beside what two unrelated circuits of their layer profiles would.

    Shared over union, recall and precision of edges, nodes and heads; the same of |score| mass, each circuit's summing
    to 1 (weights); and, where both carry scores of all edges, the rank correlation of |score| and of score. Two
    attributions are compared by their scores alone. p of edges is exact (a sum of hypergeometric counts, one a pair of
    layers); the others count `n` draws. Overlap of circuits across tasks: Merullo et al. (2024); across languages and
    checkpoints: Tigges et al. (2024).
    Known failure: two circuits may share no edge and compute the same, or share most and differ in the few that matter;
    `reuse` asks the model itself.

    Raises MethodError for circuits of different graphs, or where one of them is empty.
    """
    started = time.monotonic()
    graph = _same_graph(a, b)
    if n < 1:
        raise MethodError("a null needs draws", got=f"n={n}", wanted="1 or more")
    masks = _mask(a), _mask(b)
    rows: list[dict[str, Any]] = []
    if masks[0] is not None and masks[1] is not None:
        if not bool(masks[0].any()) or not bool(masks[1].any()):
            raise MethodError("cannot compare an empty circuit", got=f"{int(masks[0].sum())}, {int(masks[1].sum())}")
        rows += _edges(graph, masks[0], masks[1], n, seed) + _nodes(graph, masks[0], masks[1], n, seed)
    rows += _scores(graph, a, b, n, seed)
    if not rows:
        raise MethodError("nothing to compare", got="no masks and no scores of all edges on both sides")
    facts = {
        "names": list(names), "graph": graph.to_dict(), "draws": n,
        "shared_heads": _shared_heads(graph, *masks) if masks[0] is not None and masks[1] is not None else [],
    }  # fmt: skip
    return ComparisonResult(
        tables={"overlap": pl.DataFrame(rows, schema=_SCHEMA)},
        facts=facts,
        config={"n": n, "seed": seed, "names": list(names)},
        provenance=Provenance.collect(seed=seed, seconds=time.monotonic() - started),
    )


def expected_shared(graph: Graph, a: Tensor, b: Tensor) -> float:
    """How many edges two masks share on average when the edges of `b` are drawn anew within each pair of layers."""
    sizes, in_a, in_b = _profile(graph, a, b)
    return float((in_a * in_b / np.maximum(sizes, 1)).sum())


def shared_p(graph: Graph, a: Tensor, b: Tensor) -> float:
    """P(at least as many shared edges) when the edges of `b` are drawn anew within each pair of layers; exact."""
    spread = _shared_distribution(graph, a, b)
    shared = int((a & b).sum())
    return float(min(1.0, spread[shared:].sum()))


# --- edges


def _profile(graph: Graph, a: Tensor, b: Tensor) -> tuple[Floats, Floats, Floats]:
    """(edges there are, edges of a, edges of b) by pair of layers."""
    cells = graph.layer_cells
    n_cells = int(cells.max()) + 1
    sizes, in_a, in_b = (torch.bincount(cells[m & graph.allowed], minlength=n_cells) for m in (graph.allowed, a, b))
    return sizes.double().numpy(), in_a.double().numpy(), in_b.double().numpy()


def _shared_distribution(graph: Graph, a: Tensor, b: Tensor) -> Floats:
    """P(k shared edges) for k = 0, 1, ...: a convolution of hypergeometric counts."""
    spread = np.ones(1)
    for size, x, y in zip(*(part.astype(int) for part in _profile(graph, a, b)), strict=True):
        if x and y:
            spread = np.convolve(spread, hypergeom.pmf(np.arange(min(x, y) + 1), size, x, y))
    return spread


def _edges(graph: Graph, a: Tensor, b: Tensor, n: int, seed: int) -> list[dict[str, Any]]:
    sizes, in_a, in_b = (part.astype(int) for part in _profile(graph, a, b))
    random = np.random.default_rng(seed)
    drawn = np.zeros(n)
    for size, x, y in zip(sizes, in_a, in_b, strict=True):
        if x and y:
            drawn += random.hypergeometric(x, size - x, y, n)
    p = shared_p(graph, a, b)
    n_a, n_b, shared = int(a.sum()), int(b.sum()), int((a & b).sum())
    rows = _ratios("edges", n_a, n_b, shared, drawn, "edges")
    for row in rows:
        row["p"] = p  # all three rise with the number of shared edges, so it is the p of each
    return rows


def _ratios(what: str, n_a: int, n_b: int, shared: float, drawn: Floats, null: str) -> list[dict[str, Any]]:
    measures: dict[str, Callable[[Any], Any]] = {
        "iou": lambda s: s / np.maximum(n_a + n_b - s, 1),
        "recall": lambda s: s / max(n_a, 1),
        "precision": lambda s: s / max(n_b, 1),
    }
    counts = {"a": n_a, "b": n_b, "shared": int(shared)}
    return [
        _row(what, measure, float(of(shared)), np.asarray(of(drawn), dtype=np.float64), null) | counts
        for measure, of in measures.items()
    ]


def _row(what: str, measure: str, value: float, drawn: Floats, null: str) -> dict[str, Any]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    slack = 1e-12 * max(1.0, abs(value))
    return {
        "what": what, "measure": measure, "value": value, "expected": float(drawn.mean()), "lo": float(low),
        "hi": float(high), "p": (1 + int((drawn >= value - slack).sum())) / (1 + len(drawn)), "null": null,
        "percentile": float(((drawn < value - slack) + 0.5 * (np.abs(drawn - value) <= slack)).mean()),
        "a": None, "b": None, "shared": None,
    }  # fmt: skip


# --- nodes and heads


def members(graph: Graph, mask: Tensor) -> Tensor:
    """[sources] bool: the sources that a circuit of these edges has (as `Circuit.nodes`, without the logits)."""
    return nodes_in(graph, mask) | mask.any(dim=1)


def _heads(graph: Graph, nodes: Tensor) -> Tensor:
    return torch.cat([nodes[graph.heads_at(layer)] for layer in range(graph.n_layers)])


def _shared_heads(graph: Graph, a: Tensor | None, b: Tensor | None) -> list[str]:
    if a is None or b is None:
        return []
    both = members(graph, a) & members(graph, b)
    return [name for name, yes in zip(graph.sources, both.tolist(), strict=True) if yes and ".h" in name]


def _nodes(graph: Graph, a: Tensor, b: Tensor, n: int, seed: int) -> list[dict[str, Any]]:
    in_a, in_b = members(graph, a), members(graph, b)
    nodes, heads, edges = np.zeros(n), np.zeros(n), np.zeros(n)
    drawn = random_circuits(graph, b, n, kind="heads", seed=seed)
    for draw, mask in enumerate(track(drawn, "renaming heads", n)):
        now = members(graph, mask)
        nodes[draw], edges[draw] = int((in_a & now).sum()), int((a & mask).sum())
        heads[draw] = int((_heads(graph, in_a) & _heads(graph, now)).sum())
    n_a, n_b, shared = int(in_a.sum()), int(in_b.sum()), int((in_a & in_b).sum())
    rows = _ratios("nodes", n_a, n_b, shared, nodes, "heads")
    own, other = _heads(graph, in_a), _heads(graph, in_b)
    if bool(own.any()) and bool(other.any()):
        rows += _ratios("heads", int(own.sum()), int(other.sum()), int((own & other).sum()), heads, "heads")
    # the stricter null of the edges: the same wiring, other heads
    strict = _ratios("edges", int(a.sum()), int(b.sum()), int((a & b).sum()), edges, "heads")[:1]
    return rows + strict


# --- weights and rankings


def _scores(graph: Graph, a: Any, b: Any, n: int, seed: int) -> list[dict[str, Any]]:
    at = graph.allowed
    masks, scores = (_mask(a), _mask(b)), (_score(a), _score(b))
    cells = graph.layer_cells[at].numpy()
    weights: list[Floats] | None = None
    if all(mask is not None for mask in masks) and all(score is not None for score in scores):
        weights = [
            np.abs(np.where(mask[at].numpy(), score[at].double().numpy(), 0.0))  # type: ignore[index]
            for mask, score in zip(masks, scores, strict=True)
        ]
        totals = [float(w.sum()) for w in weights]
        weights = [w / t for w, t in zip(weights, totals, strict=True)] if min(totals) > 0 else None
    ranks: dict[str, list[Floats]] = {}
    if all(score is not None and bool((score[at] != 0).any()) for score in scores) and at.sum() > 2:
        flat = [score[at].double().numpy() for score in scores]  # type: ignore[index]
        ranks = {"absolute scores": [_centred(np.abs(s)) for s in flat], "scores": [_centred(s) for s in flat]}
        ranks = {name: both for name, both in ranks.items() if all(np.any(r != 0) for r in both)}
    if weights is None and not ranks:
        return []
    order = np.argsort(cells, kind="stable")
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {"weights": [], **{name: [] for name in ranks}}
    for _ in range(n):
        # a random order within each cell: sort by cell, then by a random key
        moved = np.empty_like(order)
        moved[order] = np.lexsort((random.random(len(cells)), cells))
        if weights is not None:
            found["weights"].append(float(np.minimum(weights[0], weights[1][moved]).sum()))
        for name, (x, y) in ranks.items():
            found[name].append(float(x @ y[moved]))
    rows: list[dict[str, Any]] = []
    if weights is not None:
        value, drawn = float(np.minimum(weights[0], weights[1]).sum()), np.asarray(found["weights"])
        # both sum to 1, so what they share over their union is s / (2 - s)
        rows.append(_row("weights", "iou", value / (2 - value), drawn / (2 - drawn), "scores"))
        rows += _mass(graph, masks, weights, cells, n, seed)
    rows += [_row(name, "spearman", float(x @ y), np.asarray(found[name]), "scores") for name, (x, y) in ranks.items()]
    return rows


def _mass(
    graph: Graph, masks: Any, weights: list[Floats], cells: NDArray[Any], n: int, seed: int
) -> list[dict[str, Any]]:
    """recall: the share of a's |score| on edges of b; precision: the other way round. Null: the other's edges redrawn
    within each pair of layers."""
    rows = []
    for measure, own, other in (("recall", 0, 1), ("precision", 1, 0)):
        held = masks[other][graph.allowed].numpy()
        order = np.argsort(cells, kind="stable")
        random = np.random.default_rng([seed, own])
        drawn = np.empty(n)
        for draw in range(n):
            moved = np.empty_like(order)
            moved[order] = np.lexsort((random.random(len(cells)), cells))
            drawn[draw] = weights[own][held[moved]].sum()
        rows.append(_row("weights", measure, float(weights[own][held].sum()), drawn, "edges"))
    return rows


def _centred(values: Floats) -> Floats:
    """Ranks with mean 0 and length 1 (all 0 where every value is the same): their product is Spearman's rho."""
    ranks = rankdata(values)
    ranks = ranks - ranks.mean()
    length = float(np.linalg.norm(ranks))
    return ranks / length if length > 0 else ranks * 0.0


# --- what is compared


def _same_graph(a: Any, b: Any) -> Graph:
    one, two = a.graph.to_dict() | {"d_model": 0}, b.graph.to_dict() | {"d_model": 0}
    if one != two:
        raise MethodError(
            "circuits can be compared edge by edge on one graph only", got=f"{one} and {two}",
            wanted="models with equally many layers, heads and key/value heads",
            fix="Compare what they do instead: evaluate both on their behaviors",
        )  # fmt: skip
    return a.graph


def _mask(thing: Any) -> Tensor | None:
    return thing.tensors["mask"].bool() if "mask" in thing.tensors else None


def _score(thing: Any) -> Tensor | None:
    return thing.tensors.get("scores")

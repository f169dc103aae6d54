"""Completeness as Wang et al. (2022) define it: the circuit and the model must suffer alike from losing the same nodes.

For a subset K of the circuit's nodes, F(C \\ K) is the metric of the circuit without K and F(M \\ K) that of the whole
model without K: with every edge out of K ablated. The circuit is complete where |F(C \\ K) - F(M \\ K)| is small for
every K; a circuit that lacks a backup of what K does falls further than the model.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.circuit import Circuit
from headwater.localize.engine.ablation import AblationLike, as_ablation
from headwater.localize.graph import Graph
from headwater.localize.judging.faithfulness import Values, evaluate_masks, learned
from headwater.localize.selection import prune

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@register_result
class IncompletenessResult(Result):
    """`tables["subsets"]`: kind ("whole": nothing left out, "random", "greedy"), nodes (left out, by name), size,
    circuit and model (faithfulness of the circuit and of the model without them), incompleteness (how far they lie
    apart, as a share of the model's effect), raw (the same in the metric's units).

    facts: incompleteness (the largest), mean (over the random subsets), worst (the nodes of the largest), metric,
    ablation, n. 0: complete.
    """

    kind: ClassVar[str] = "incompleteness"
    main: ClassVar[str] = "subsets"

    @property
    def value(self) -> float:
        """The largest incompleteness that was found."""
        return float(self.facts["incompleteness"])


def incompleteness(
    circuit: Circuit,
    behavior: "Behavior",
    *,
    n: int = 20,
    greedy: int = 3,
    metric: str = "logit_diff",
    ablation: AblationLike = "counterfactual",
    seed: int = 0,
    model: "Model | None" = None,
) -> IncompletenessResult:
    """See `Circuit.incompleteness`.

    n: random subsets, each node in with probability a half. greedy: the steps of a search that always adds the node at
    which the circuit and the model drift furthest apart (each step tries every node left). Known failure: greedy stops
    at a local worst, and no subset proves that there is no worse one.
    """
    started = time.monotonic()
    if n < 0 or greedy < 0 or n + greedy < 1:
        raise MethodError("incompleteness needs subsets to try", got=f"n={n}, greedy={greedy}")
    if circuit.positions is not None:
        raise MethodError("incompleteness leaves out whole nodes", got="a circuit by position")
    used, graph = model or circuit.model, circuit.graph
    members = [graph.source(name) for name in circuit.nodes if name not in ("input", "logits")]
    if not members:
        raise MethodError("this circuit has no nodes to leave out")
    ablation = learned(as_ablation(ablation), used, behavior, graph, circuit.mask)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(len(members), generator=generator) < 0.5 for _ in range(n)]
    subsets: list[tuple[str, list[int]]] = [("whole", [])]
    subsets += [("random", [s for s, take in zip(members, draw.tolist(), strict=True) if take]) for draw in drawn]
    rows = _judged(used, behavior, circuit, subsets, metric, ablation)
    chosen: list[int] = []
    for _ in range(min(greedy, len(members))):
        tried = [("greedy", [*chosen, source]) for source in members if source not in chosen]
        found = _judged(used, behavior, circuit, tried, metric, ablation)
        best = max(range(len(found)), key=lambda i: found[i]["incompleteness"])
        chosen = tried[best][1]
        rows.append(found[best])
    worst = max(rows, key=lambda row: row["incompleteness"])
    random = [row["incompleteness"] for row in rows if row["kind"] == "random"]
    facts = {
        "incompleteness": worst["incompleteness"],
        "worst": worst["nodes"],
        "mean": sum(random) / len(random) if random else None,
        "metric": metric,
        "ablation": as_ablation(ablation).kind,
        "n": behavior.n,
        "subsets": len(rows),
    }
    return IncompletenessResult(
        tables={"subsets": pl.DataFrame(rows)},
        facts=facts,
        config={
            "n": n,
            "greedy": greedy,
            "metric": metric,
            "seed": seed,
            "ablation": as_ablation(ablation).to_config(),
        },
        provenance=Provenance.collect(used, behavior, seed=seed, seconds=time.monotonic() - started),
    )


def _judged(
    model: "Model",
    behavior: "Behavior",
    circuit: Circuit,
    subsets: Sequence[tuple[str, list[int]]],
    metric: str,
    ablation: AblationLike,
) -> list[dict[str, Any]]:
    graph = circuit.graph
    masks = [without(graph, whole, left_out) for _, left_out in subsets for whole in (circuit.mask, graph.allowed)]
    values: Values = evaluate_masks(model, behavior, masks, metric=metric, label="incompleteness", ablation=ablation)
    scale = float((values.clean - values.empty).mean())
    rows: list[dict[str, Any]] = []
    for number, (kind, left_out) in enumerate(subsets):
        ours, theirs = (float(values.circuits[2 * number + i].mean()) for i in range(2))
        empty = float(values.empty.mean())
        rows.append(
            {
                "kind": kind,
                "nodes": " ".join(graph.sources[s] for s in left_out),
                "size": len(left_out),
                "circuit": (ours - empty) / scale,
                "model": (theirs - empty) / scale,
                "incompleteness": abs((ours - theirs) / scale),
                "raw": abs(ours - theirs),
            }
        )
    return rows


def without(graph: Graph, mask: Tensor, left_out: Sequence[int]) -> Tensor:
    """`mask` without the edges out of these sources, and without what then dangles."""
    mask = mask.clone()
    mask[list(left_out)] = False
    return prune(graph, mask)

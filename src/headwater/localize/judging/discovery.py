"""Discovery curves: how good the circuits of a method are against what finding them cost, in forward passes."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.catalog import methods as known_methods
from headwater.localize.circuit import Circuit
from headwater.localize.engine.passes import for_discovery
from headwater.localize.engine.wiring import graph_of
from headwater.localize.judging.circuit_track import budget, passes_of, scores_of
from headwater.localize.judging.faithfulness import evaluate_masks
from headwater.localize.judging.mib import FRACTIONS, areas
from headwater.localize.selection import Rank, prune

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@register_result
class DiscoveryResult(Result):
    """`tables["curve"]`: method, options (text), pairs, forward, backward, passes, seconds, cmd, cpr, closeness,
    overlap; one row a run of a method.

    passes: forwards and backwards of one pair, a backward counted as one (only activations are differentiated).
    closeness: 1 - |1 - f| of the circuit at `facts["fraction"]` of all edges; overlap: its edges shared with the
    reference over the union (None without one). Numbers are None where a method does not say its passes, or gives one
    circuit and no ranking.
    """

    kind: ClassVar[str] = "discovery"
    main: ClassVar[str] = "curve"


def discovery_curve(
    model: "Model",
    behavior: "Behavior",
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any] | Sequence[Mapping[str, Any]]] = ("eap", "eap_ig"),
    pairs: Sequence[int] = (4, 16, 64),
    fraction: float = 0.05,
    fractions: Sequence[float] = FRACTIONS,
    rank: Rank = "abs",
    metric: str = "logit_diff",
    reference: Circuit | None = None,
    seed: int = 0,
) -> DiscoveryResult:
    """The score of each method's circuits against the passes it spent, found on ever more train pairs.

    methods: names, or name -> options (or several options: each is a run of its own). pairs: how many of the train
    pairs are searched. Judged on all test pairs: CPR and CMD over `fractions`, closeness to the model at `fraction` of
    the edges, overlap with a `reference` circuit. A row `random` costs nothing and is what a method must leave behind.
    Known failure: passes are not seconds; short prompts, shared prefixes and batches change what a pass costs.

    Raises MethodError for unknown methods and sizes that make no sense.
    """
    started = time.monotonic()
    if not methods or not pairs or min(pairs) < 1:
        raise MethodError("a discovery curve needs methods and numbers of pairs", got=f"{list(methods)}, {list(pairs)}")
    graph, train = graph_of(model), for_discovery(behavior)
    judged = behavior.test if "test" in set(behavior.frame["split"].to_list()) else behavior
    runs: list[tuple[str, dict[str, Any], int]] = []
    for name, given in (dict(methods) if isinstance(methods, Mapping) else {name: {} for name in methods}).items():
        every = [dict(given)] if isinstance(given, Mapping) else [dict(one) for one in given]
        runs += [(name, one, n) for one in every for n in sorted({min(n, train.n) for n in pairs})]
    rows, masks = [], []
    for name, options, n in track(runs, "discovery"):
        begun = time.monotonic()
        result = known_methods.get(name)(model, train[:n], **{"metric": metric, **options})
        passes = passes_of(result) or {}
        rows.append(
            {
                "method": name, "options": ", ".join(f"{k}={v}" for k, v in options.items()), "pairs": n,
                "forward": passes.get("forward"), "backward": passes.get("backward"),
                "passes": sum(passes.values()) if passes else None, "seconds": time.monotonic() - begun,
            }
        )  # fmt: skip
        if "scores" in result.tensors:
            scores = scores_of(result, "edge")
            masks.append([budget(graph, scores, f, rank=rank) for f in (*fractions, fraction)])
        elif "mask" in result.tensors:
            masks.append([prune(graph, result.tensors["mask"])])
        else:
            raise MethodError(f"{name} gives neither scores of edges nor a circuit", fix="Use an edge method")
    drawn = torch.rand(graph.allowed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows.append(
        {"method": "random", "options": "", "pairs": 0, "forward": 0.0, "backward": 0.0, "passes": 0.0, "seconds": 0.0}
    )
    masks.append([budget(graph, drawn, f, rank=rank) for f in (*fractions, fraction)])
    values = evaluate_masks(model, judged, [m for own in masks for m in own], metric=metric, label="discovery curve")
    whole = float((values.clean - values.empty).mean())
    found = [float((row - values.empty).mean()) / whole for row in values.circuits]
    at = 0
    for row, own in zip(rows, masks, strict=True):
        mine = found[at : at + len(own)]
        at += len(own)
        row |= {"cpr": None, "cmd": None, "closeness": 1 - abs(1 - mine[-1]), "overlap": None}
        if len(own) > 1:
            row["cpr"], row["cmd"] = areas(mine[:-1], fractions)
        if reference is not None:
            shared, union = own[-1] & reference.mask, own[-1] | reference.mask
            row["overlap"] = int(shared.sum()) / int(union.sum()) if bool(union.any()) else None
    return DiscoveryResult(
        tables={"curve": pl.DataFrame(rows, schema=_SCHEMA)},
        facts={"metric": metric, "fraction": fraction, "rank": rank, "n": len(values.rows), "n_edges": graph.n_edges},
        config={"metric": metric, "fraction": fraction, "rank": rank, "pairs": list(pairs), "seed": seed},
        provenance=Provenance.collect(model, behavior, seed=seed, seconds=time.monotonic() - started),
    )


_SCHEMA: dict[str, Any] = {
    "method": pl.String, "options": pl.String, "pairs": pl.Int64, "forward": pl.Float64, "backward": pl.Float64,
    "passes": pl.Float64, "seconds": pl.Float64, "cmd": pl.Float64, "cpr": pl.Float64, "closeness": pl.Float64,
    "overlap": pl.Float64,
}  # fmt: skip

"""MIB's circuit track: tasks x methods, judged by CPR and CMD under named ablations and both rankings, beside random.

What makes two published numbers differ is always named: the ranking (by |score| or by score), the ablation, the
level of the budget (edges or nodes), and the metric.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.catalog import methods as known_methods
from headwater.localize.circuit import Circuit
from headwater.localize.engine.ablation import AblationLike, ablation_names, as_ablations
from headwater.localize.engine.wiring import graph_of
from headwater.localize.graph import Graph
from headwater.localize.judging.faithfulness import evaluate_masks
from headwater.localize.judging.mib import FRACTIONS, areas
from headwater.localize.selection import Rank, prune, ranking, select
from headwater.localize.stats import ratio

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

LEVELS = ("edge", "node")
RANDOM = "random"
_RANDOM_DRAWS = 3


@register_result
class MibTrackResult(Result):
    """`tables["track"]`: task, method, rank, level, ablation, cpr, cmd, seconds, forward, backward, n; one row a
    combination, the `random` rows being means over random rankings.

    `tables["curve"]`: task, method, rank, level, ablation, fraction, asked, edges, faithfulness, lo, hi, empty.
    seconds, forward, backward: what finding cost (forward and backward passes of one pair; None where a method does not
    say). `tensors["<task>.<method>"]`: scores [sources, readers] or, for methods that score nodes, [sources].
    """

    kind: ClassVar[str] = "mib_track"
    main: ClassVar[str] = "track"

    def scores(self, task: str, method: str) -> Tensor:
        """The scores behind a row. Raises MethodError where there are none."""
        name = f"{task}.{method}"
        if name not in self.tensors:
            raise MethodError("no such scores", got=name, wanted=did_you_mean(name, self.tensors))
        return self.tensors[name]

    def submission(self, folder: str | Path) -> list[Path]:
        """Write each edge ranking as MIB's JSON, `<method>_<task>.json`; the files written. Every edge carries its
        score and none is left out, so that the benchmark can cut its own sizes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        graph = Graph(**self.facts["graph"])
        written = []
        for name, scores in self.tensors.items():
            task, method = name.rsplit(".", 1)
            if scores.ndim == 2:
                written.append(folder / f"{method}_{task}.json")
                Circuit.build(graph, graph.allowed, scores, method=method).to_json(written[-1])
        return written


def mib_track(
    model: "Model",
    *,
    tasks: "Mapping[str, Behavior]",
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("eap_ig", "eap"),
    ablations: AblationLike = "counterfactual",
    ranks: Sequence[Rank] = ("abs", "signed"),
    level: str = "edge",
    fractions: Sequence[float] = FRACTIONS,
    metric: str = "logit_diff",
    seed: int = 0,
) -> MibTrackResult:
    """Find circuits of every task by every method, on train pairs, and judge them on test pairs (Mueller et al., 2025).

    tasks: name -> behavior, of MIB's tasks or any other. methods: names, or name -> options; what they score is cut to
    `fractions` of all edges (level "edge") or nodes ("node": the edges among the best nodes; an edge method's node
    score is the sum over its edges). Faithfulness is (m(circuit) - m(empty)) / (m(model) - m(empty)), where in the
    empty circuit every edge is ablated; CPR and CMD are the areas under f and |1 - f|. ablations: of edges outside
    the circuit; MIB's "patching" is "counterfactual". ranks: "abs", "signed". A `random` row stands beside each.
    Known failure: CPR rewards circuits that beat the model, and a metric's mean over few pairs moves both areas; the
    curve's intervals say how much.

    Raises MethodError for unknown methods, levels or rankings, and for methods that score neither edges nor nodes.
    """
    started = time.monotonic()
    if level not in LEVELS:
        raise MethodError("unknown level of a budget", got=repr(level), wanted=did_you_mean(str(level), LEVELS))
    if not tasks or not methods or not ranks:
        raise MethodError("the track needs tasks, methods and rankings", got=f"{list(tasks)}, {list(methods)}")
    graph = graph_of(model)
    asked = dict(methods) if isinstance(methods, Mapping) else {name: {} for name in methods}
    runs = {name: known_methods.get(name) for name in asked if name != RANDOM}
    used = as_ablations(ablations)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for task, behavior in tasks.items():
        judged = behavior.test if "test" in set(behavior.frame["split"].to_list()) else behavior
        found: dict[str, tuple[Tensor, dict[str, Any]]] = {}
        for name, run in track(list(runs.items()), f"MIB {task}"):
            begun = time.monotonic()
            result = run(model, behavior, **{"metric": metric, **asked[name]})
            passes = passes_of(result) or {}
            cost = {"seconds": time.monotonic() - begun, "forward": passes.get("forward")}
            found[name] = scores_of(result, level), cost | {"backward": passes.get("backward")}
            tensors[f"{task}.{name}"] = found[name][0]
        for draw in range(_RANDOM_DRAWS):
            generator = torch.Generator().manual_seed(seed * 1000 + draw)
            shape = graph.allowed.shape if level == "edge" else (len(graph.sources),)
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
            found[f"{RANDOM} {draw}"] = drawn, {"seconds": 0.0, "forward": 0.0, "backward": 0.0}
        cells: list[tuple[str, Rank]] = [(name, rank) for name in found for rank in ranks]
        masks = [
            budget(graph, found[name][0], fraction, level=level, rank=rank)
            for name, rank in cells
            for fraction in fractions
        ]
        unique, place = _unique(masks)
        for name_of, ablation in zip(ablation_names(used), used, strict=True):
            values = evaluate_masks(model, judged, unique, metric=metric, label=f"MIB {task}", ablation=ablation)
            whole = values.clean - values.empty
            means = [float((row - values.empty).mean()) / float(whole.mean()) for row in values.circuits]
            ends = [ratio(row - values.empty, whole)[1:] for row in values.circuits]
            for number, (name, rank) in enumerate(cells):
                at = [place[number * len(fractions) + i] for i in range(len(fractions))]
                key = {"task": task, "method": name, "rank": rank, "level": level, "ablation": name_of}
                cpr, cmd = areas([means[i] for i in at], fractions)
                rows.append({**key, "cpr": cpr, "cmd": cmd, **found[name][1], "n": len(values.rows)})
                if name.startswith(f"{RANDOM} ") and not name.endswith(" 0"):
                    continue
                for fraction, i in zip(fractions, at, strict=True):
                    curves.append(
                        {
                            **key, "method": name.removesuffix(" 0"), "fraction": fraction,
                            "asked": int(fraction * (graph.n_edges if level == "edge" else len(graph.sources))),
                            "edges": int(prune(graph, unique[i]).sum()), "faithfulness": means[i], "lo": ends[i][0],
                            "hi": ends[i][1], "empty": float(values.empty.mean()),
                        }
                    )  # fmt: skip
    return MibTrackResult(
        tables={"track": _averaged(pl.DataFrame(rows, schema=_TRACK)), "curve": pl.DataFrame(curves, schema=_CURVE)},
        tensors=tensors,
        facts={
            "metric": metric, "graph": graph.to_dict(), "tasks": {name: b.hash for name, b in tasks.items()},
            "fractions": list(fractions), "random_draws": _RANDOM_DRAWS,
        },
        config={
            "metric": metric, "level": level, "ranks": list(ranks), "seed": seed,
            "methods": {name: dict(options) for name, options in asked.items()},
            "ablations": [one.to_config() for one in used],
        },
        provenance=Provenance.collect(model, seed=seed, seconds=time.monotonic() - started),
    )  # fmt: skip


_KEYS: dict[str, Any] = dict.fromkeys(("task", "method", "rank", "level", "ablation"), pl.String)
_TRACK: dict[str, Any] = {
    **_KEYS, "cpr": pl.Float64, "cmd": pl.Float64, "seconds": pl.Float64, "forward": pl.Float64,
    "backward": pl.Float64, "n": pl.Int64,
}  # fmt: skip
_CURVE: dict[str, Any] = {
    **_KEYS, "fraction": pl.Float64, "asked": pl.Int64, "edges": pl.Int64, "faithfulness": pl.Float64,
    "lo": pl.Float64, "hi": pl.Float64, "empty": pl.Float64,
}  # fmt: skip


def _averaged(table: pl.DataFrame) -> pl.DataFrame:
    """The random draws of a task, ranking and ablation as one row."""
    named = table.with_columns(pl.col("method").str.replace(rf"^{RANDOM} \d+$", RANDOM))
    return (
        named.group_by(list(_KEYS), maintain_order=True)
        .agg(pl.all().mean())
        .cast({"n": pl.Int64})
        .select(table.columns)
    )


def _unique(masks: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """(the different masks, for each mask its index among them): sizes of several rankings often give one circuit."""
    seen: dict[bytes, int] = {}
    kept: list[Tensor] = []
    place = []
    for mask in masks:
        key = np.packbits(mask.numpy()).tobytes()
        if key not in seen:
            seen[key] = len(kept)
            kept.append(mask)
        place.append(seen[key])
    return kept, place


# --- scores, budgets, costs


def scores_of(result: Any, level: str) -> Tensor:
    """[sources, readers] scores of edges (level "edge") or [sources] of nodes, of what a method gave.

    Raises MethodError where a method does not score edges.
    """
    edges = result.tensors.get("scores")
    if level == "edge":
        if edges is None:
            raise MethodError(
                f"{result.facts.get('method', result.kind)} scores no edges", fix='Ask for level="node", or use eap'
            )
        return edges
    nodes = result.tensors.get("node_scores")
    if nodes is None and edges is not None:
        nodes = edges.sum(dim=1)
    if nodes is None:
        raise MethodError(f"{result.facts.get('method', result.kind)} scores no nodes", wanted="scores or node_scores")
    return cast(Tensor, nodes)


def budget(graph: Graph, scores: Tensor, fraction: float, *, level: str = "edge", rank: Rank = "abs") -> Tensor:
    """The circuit of the best `fraction` of edges, or of all edges among the best `fraction` of nodes; pruned.

    As in MIB, the number is the whole part of fraction x all; logits are always in, the input must earn its place.
    """
    if level == "edge":
        return select(graph, scores, fraction=fraction, rank=rank)
    if scores.shape != (len(graph.sources),):
        raise MethodError("scores of nodes do not fit the graph", got=list(scores.shape), wanted=len(graph.sources))
    if rank not in ("abs", "signed"):
        raise MethodError("unknown ranking of nodes", got=repr(rank), wanted=did_you_mean(str(rank), ["abs", "signed"]))
    if not 0 <= fraction <= 1 or not bool(torch.isfinite(scores).all()):
        raise MethodError("a budget of nodes needs a fraction and finite scores", got=fraction)
    value = scores.double().abs() if rank == "abs" else scores.double()
    kept = torch.zeros(len(graph.sources), dtype=torch.bool)
    kept[torch.argsort(value, descending=True, stable=True)[: int(fraction * len(graph.sources))]] = True
    read = (kept.float() @ graph.owners.float()) > 0
    read[-1] = True
    return prune(graph, graph.allowed & kept[:, None] & read[None, :])


def passes_of(result: Any) -> dict[str, float] | None:
    """{"forward", "backward"} passes of one pair that finding took: what the method says, or what its config implies.

    A pass that is shared by several scores counts once; None where it is not known.
    """
    said = result.facts.get("passes")
    if isinstance(said, Mapping):
        return {"forward": float(said["forward"]), "backward": float(said["backward"])}
    n, config = result.facts.get("n"), result.config
    method = result.facts.get("method", config.get("method"))
    if method in ("eap", "atp") and n:
        return {"forward": 2.0 * n, "backward": 1.0 * n}
    if method == "eap_ig" and n:
        steps, left = int(config["steps"]), config.get("rule", "left") == "left"
        # with the left rule the first node is the counterfactual run, which is run anyway
        return {"forward": (2.0 + steps - left) * n, "backward": float(steps) * n}
    if result.kind == "patching" and n:
        return {"forward": (2.0 + result.tables["effects"].height) * n, "backward": 0.0}
    return None


def auroc(scores: Tensor, truth: Tensor, *, graph: Graph | None = None, rank: Rank = "abs") -> float:
    """Area under the ROC curve of a ranking of edges against a known circuit, as InterpBench judges (Gupta et al.,
    2024).

    The chance that a true edge ranks above a false one, ties counting half; over the graph's edges where one is given.
    Raises MethodError where every edge is true, or none.
    """
    if scores.shape != truth.shape:
        raise MethodError(
            "scores and the known circuit differ in shape", got=list(scores.shape), wanted=list(truth.shape)
        )
    value = scores.double().abs() if rank == "abs" else scores.double()
    if graph is not None:
        value = ranking(graph, scores, rank)
        value, truth = value[graph.allowed], truth[graph.allowed]
    value, known = value.flatten().numpy(), truth.flatten().bool().numpy()
    positives, negatives = int(known.sum()), int((~known).sum())
    if not positives or not negatives:
        raise MethodError("an AUROC needs edges inside and outside the circuit", got=f"{positives} and {negatives}")
    from scipy.stats import rankdata

    above = rankdata(value)[known].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))

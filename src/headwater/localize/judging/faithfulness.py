"""How good a circuit is: faithfulness with its interval, completeness, minimality, a curve over sizes, its null.

Faithfulness is (m(circuit) - m(empty)) / (m(model) - m(empty)), where the empty circuit has every edge ablated: with
the counterfactual ablation it is the model on the counterfactual.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.circuit import Circuit
from headwater.localize.engine.ablation import (
    Ablation,
    AblationLike,
    ablation_names,
    as_ablation,
    as_ablations,
    prepare,
)
from headwater.localize.engine.evaluate import CircuitRunner
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    Scored,
    all_values,
    can_reuse_prefix,
    make_batches,
    tokens_at_once,
)
from headwater.localize.engine.positions import prune_positions
from headwater.localize.graph import Graph
from headwater.localize.judging.mib import FRACTIONS, areas
from headwater.localize.judging.nulls import p_value, random_circuits
from headwater.localize.selection import Rank, edge_budget, prune, select
from headwater.localize.stats import ratio

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@register_result
class FaithfulnessResult(Result):
    """`tables["curve"]`: fraction, edges, faithfulness, lo, hi, metric (its name), value (its mean), ablation, empty
    (the mean where every edge is ablated); one row a circuit and ablation.

    facts: faithfulness, lo, hi (of the first ablation's last row), full and corrupt (the metric's mean on prompt and
    counterfactual), n pairs, for a curve cpr and cmd, and `by_ablation`: the same for each. `tensors`: values [rows,
    n], empty [rows, n], clean [n], corrupt [n].
    """

    kind: ClassVar[str] = "faithfulness"
    main: ClassVar[str] = "curve"

    @property
    def value(self) -> float:
        """Faithfulness of the circuit (of a curve: of its largest) under the first ablation."""
        return float(self.facts["faithfulness"])

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% bootstrap interval over pairs."""
        return float(self.facts["lo"]), float(self.facts["hi"])


@register_result
class NullResult(Result):
    """`tables["draws"]`: kind, draw, value (faithfulness of a random circuit). facts: observed, p, percentile, and p
    by kind.

    A draw counts as at least as good when its faithfulness is at least as close to 1; p is the largest over the kinds.
    """

    kind: ClassVar[str] = "null"
    main: ClassVar[str] = "draws"

    @property
    def p(self) -> float:
        return float(self.facts["p"])


@register_result
class MinimalityResult(Result):
    """`tables["nodes"]`: node, faithfulness (of the circuit without it), drop, lo, hi: what the node brings to the
    circuit.
    """

    kind: ClassVar[str] = "minimality"
    main: ClassVar[str] = "nodes"


@dataclass(frozen=True, eq=False)
class Values:
    """A metric pair by pair: clean, corrupt and empty (all edges ablated) [n], circuits [circuits, n], rows of the
    behavior's frame. passes: forwards a pair that it took.
    """

    rows: list[int]
    clean: Tensor
    corrupt: Tensor
    circuits: Tensor
    empty: Tensor
    passes: float = 0.0

    def faithfulness(self, index: int) -> tuple[float, float, float]:
        """(value, low, high) of one circuit."""
        return ratio(self.circuits[index] - self.empty, self.clean - self.empty)


def evaluate_masks(
    model: "Model",
    behavior: "Behavior",
    masks: Sequence[Tensor],
    *,
    metric: str,
    label: str = "circuits",
    memory_mb: float | None = None,
    ablation: AblationLike = "counterfactual",
    positions: Sequence[str] | None = None,
) -> Values:
    """The metric of many circuits on a behavior's pairs, all on one counterfactual pass a batch.

    A circuit is a mask [sources, readers], or [sources, readers, P] over `positions`. ablation: what edges outside it
    carry (see `Ablation`). Raises MethodError where the model and the empty circuit give the same metric, so that no
    circuit can account for the difference.
    """
    batches, runner, passes = _runner(model, behavior, masks, metric, ablation, memory_mb)
    found = [runner.values(batch, masks, positions) for batch in track(batches, label)]
    rows, clean = all_values(batches, [f.clean for f in found])
    _, corrupt = all_values(batches, [f.corrupt for f in found])
    _, empty = all_values(batches, [f.empty for f in found])
    circuits = [all_values(batches, [f.circuits[i] for f in found])[1] for i in range(len(masks))]
    if float((clean - empty).mean()) == 0.0:
        kind = as_ablation(ablation).kind
        outside = "counterfactuals" if kind == "counterfactual" else f"a model ablated by {kind!r}"
        raise MethodError(
            f"{metric} is the same on prompts and {outside}, so faithfulness is not defined",
            got=float(clean.mean()),
        )
    stacked = torch.stack(circuits) if circuits else torch.zeros(0, len(rows), dtype=torch.float64)
    return Values(rows, clean, corrupt, stacked, empty, len(masks) + 2 + passes)


def _runner(
    model: "Model",
    behavior: "Behavior",
    masks: Sequence[Tensor],
    metric: str,
    ablation: AblationLike,
    memory_mb: float | None,
) -> tuple[list[Batch], CircuitRunner, float]:
    """(batches, what runs circuits on them, passes that preparing the ablation took)."""
    engine, scored, used = Engine(model), Scored.named(metric), as_ablation(ablation)
    graph, bound = engine.wiring.graph, behavior.bind(model)
    widest = max((int(mask.flatten(1).any(dim=1).sum()) for mask in masks), default=0)
    floats = graph.d_model * (widest + 2 * graph.per_layer + 16 * graph.n_layers)
    # a pair's shared prefix may be run once only where nothing in it is ablated
    reuse = used.kind == "counterfactual" and can_reuse_prefix(engine)
    batches = make_batches(bound, tokens_at_once(model, floats, memory_mb), reuse_prefix=reuse)
    CircuitRunner(engine, scored).check()
    prepared = prepare(engine, bound, batches, used)
    return batches, CircuitRunner(engine, scored, prepared), prepared.passes


def measure(
    circuit: Circuit, behavior: "Behavior", metric: str, ablation: AblationLike, model: "Model | None"
) -> Tensor:
    """See `Circuit.measure`."""
    used, mask = model or circuit.model, _mask(circuit)
    one = learned(as_ablation(ablation), used, behavior, circuit.graph, mask)
    batches, runner, _ = _runner(used, behavior, [mask], metric, one, None)
    found = [runner.circuits_only(batch, [mask], circuit.positions)[0] for batch in track(batches, "circuit")]
    return all_values(batches, found)[1]


def judge(
    what: Literal["faithfulness", "completeness"],
    circuit: Circuit,
    behavior: "Behavior",
    metric: str,
    ablation: AblationLike,
    model: "Model | None",
) -> FaithfulnessResult:
    """See `Circuit.faithfulness`, and `Circuit.completeness`: that of all edges outside the circuit."""
    graph, places, mask = circuit.graph, circuit.positions, _mask(circuit)
    if what == "completeness":
        mask = (graph.allowed if places is None else graph.allowed[..., None]) & ~mask
    return _judge(what, [mask], graph, model or circuit.model, behavior, metric, ablation, positions=places)


def _mask(circuit: Circuit) -> Tensor:
    return circuit.mask if circuit.positions is None else circuit.position_mask


def curve(
    graph: Graph,
    scores: Tensor,
    model: "Model",
    behavior: "Behavior",
    *,
    metric: str = "logit_diff",
    fractions: Sequence[float] = FRACTIONS,
    rank: Rank = "abs",
    how: str = "topn",
    ablation: AblationLike = "counterfactual",
) -> FaithfulnessResult:
    """Faithfulness of the circuits of each size cut from a ranking of edges, and MIB's areas under the curve.

    With several ablations, facts cpr and cmd are the first one's and `by_ablation` has each.
    """
    masks = [select(graph, scores, fraction=f, rank=rank, how=how) for f in fractions]  # type: ignore[arg-type]
    result = _judge("curve", masks, graph, model, behavior, metric, ablation, fractions=fractions)
    result.facts |= {"rank": rank, "how": how}
    if len(fractions) > 1:
        found = result.tables["curve"]["faithfulness"].to_list()
        for number, own in enumerate(result.facts["by_ablation"].values()):
            cpr, cmd = areas(found[number * len(fractions) : (number + 1) * len(fractions)], fractions)
            own |= {"cpr": cpr, "cmd": cmd}
        first = next(iter(result.facts["by_ablation"].values()))
        result.facts |= {"cpr": first["cpr"], "cmd": first["cmd"]}
    return result


def _judge(
    what: str,
    masks: Sequence[Tensor],
    graph: Graph,
    model: "Model",
    behavior: "Behavior",
    metric: str,
    ablation: AblationLike,
    *,
    fractions: Sequence[float] | None = None,
    positions: Sequence[str] | None = None,
) -> FaithfulnessResult:
    started = time.monotonic()
    ablations = as_ablations(ablation)
    names = ablation_names(ablations)
    found: list[tuple[Values, int]] = []
    for name, one in zip(names, ablations, strict=True):
        # constants that are learned for a circuit are that circuit's own
        groups = [[mask] for mask in masks] if one.learns else [list(masks)]
        for group in groups:
            values = evaluate_masks(
                model,
                behavior,
                group,
                metric=metric,
                label=f"{what} ({name})",
                ablation=learned(one, model, behavior, graph, group[0]),
                positions=positions,
            )
            found += [(values, i) for i in range(len(group))]
    first, last_of_first = found[len(masks) - 1]
    kept = [int((prune if mask.ndim == 2 else prune_positions)(graph, mask).sum()) for mask in masks]
    shares = list(fractions) if fractions is not None else [n / graph.n_edges for n in kept]
    asked = [int(mask.sum()) for mask in masks]
    if fractions is not None:
        asked = [edge_budget(graph, None, f) for f in fractions]
    judged = [values.faithfulness(i) for values, i in found]
    table = pl.DataFrame(
        {
            "fraction": shares * len(names),
            "edges": kept * len(names),
            "asked": asked * len(names),
            "faithfulness": [f for f, _, _ in judged],
            "lo": [low for _, low, _ in judged],
            "hi": [high for _, _, high in judged],
            "metric": [metric] * len(judged),
            "value": [float(values.circuits[i].mean()) for values, i in found],
            "ablation": [name for name in names for _ in masks],
            "empty": [float(values.empty.mean()) for values, _ in found],
        }
    )
    last = [judged[(number + 1) * len(masks) - 1] for number in range(len(names))]
    by_ablation = {
        name: {"faithfulness": f, "lo": low, "hi": high} for name, (f, low, high) in zip(names, last, strict=True)
    }
    value, low, high = last[0]
    facts = {
        "what": what,
        "faithfulness": value,
        "lo": low,
        "hi": high,
        "metric": metric,
        "circuit": float(first.circuits[last_of_first].mean()),
        "full": float(first.clean.mean()),
        "corrupt": float(first.corrupt.mean()),
        "n": len(first.rows),
        "edges": kept[-1],
        "n_total_edges": graph.n_edges,
        "by_ablation": by_ablation,
    }
    return FaithfulnessResult(
        tables={"curve": table},
        tensors={
            "values": torch.stack([values.circuits[i] for values, i in found]),
            "empty": torch.stack([values.empty for values, _ in found]),
            "clean": first.clean,
            "corrupt": first.corrupt,
        },
        facts=facts,
        config={"metric": metric, "what": what, "ablation": [one.to_config() for one in ablations]},
        provenance=Provenance.collect(model, behavior, seconds=time.monotonic() - started),
    )


def learned(ablation: Ablation, model: "Model", behavior: "Behavior", graph: Graph, mask: Tensor) -> Ablation:
    """The ablation itself, or, of "optimal" without constants, with those learned for this circuit on the train pairs
    (all of them where there is no split).
    """
    if not ablation.learns:
        return ablation
    from headwater.localize.search.optimal_ablation import optimal_ablation

    own = Circuit.build(graph, mask if mask.ndim == 2 else mask.any(dim=-1), model=model)
    return as_ablation(optimal_ablation(model, behavior, circuit=own))


def minimality(
    circuit: Circuit,
    behavior: "Behavior",
    *,
    metric: str = "logit_diff",
    nodes: Iterable[str] | None = None,
    ablation: AblationLike = "counterfactual",
    model: "Model | None" = None,
) -> MinimalityResult:
    """See `Circuit.minimality`. `nodes`: which to leave out one at a time (all but input and logits unless said)."""
    started = time.monotonic()
    used = model or circuit.model
    left_out = list(nodes) if nodes is not None else [n for n in circuit.nodes if n not in ("input", "logits")]
    if circuit.positions is None:
        masks = [circuit.mask, *(circuit.without(node).mask for node in left_out)]
    else:
        masks = [circuit.position_mask, *(circuit.position_mask.clone() for _ in left_out)]
        for mask, node in zip(masks[1:], left_out, strict=True):
            mask[circuit.graph.source(node)] = False
    own = learned(as_ablation(ablation), used, behavior, circuit.graph, circuit.mask)
    values = evaluate_masks(
        used, behavior, masks, metric=metric, label="minimality", ablation=own, positions=circuit.positions
    )
    whole = values.clean - values.empty
    drops = [ratio(values.circuits[0] - values.circuits[i + 1], whole) for i in range(len(left_out))]
    table = pl.DataFrame(
        {
            "node": left_out,
            "faithfulness": [values.faithfulness(i + 1)[0] for i in range(len(left_out))],
            "drop": [drop for drop, _, _ in drops],
            "lo": [low for _, low, _ in drops],
            "hi": [high for _, _, high in drops],
        },
        schema={"node": pl.String, "faithfulness": pl.Float64, "drop": pl.Float64, "lo": pl.Float64, "hi": pl.Float64},
    ).sort("drop", descending=True)
    value, low, high = values.faithfulness(0)
    return MinimalityResult(
        tables={"nodes": table},
        facts={
            "faithfulness": value,
            "lo": low,
            "hi": high,
            "metric": metric,
            "n": len(values.rows),
            "nodes": len(left_out),
            "ablation": as_ablation(ablation).kind,
        },
        config={"metric": metric, "ablation": as_ablation(ablation).to_config()},
        provenance=Provenance.collect(used, behavior, seconds=time.monotonic() - started),
    )


def null(
    circuit: Circuit,
    behavior: "Behavior",
    *,
    n: int = 100,
    metric: str = "logit_diff",
    kinds: Iterable[str] = ("edges", "heads"),
    seed: int = 0,
    ablation: AblationLike = "counterfactual",
    model: "Model | None" = None,
) -> NullResult:
    """See `Circuit.null`."""
    started = time.monotonic()
    used, kinds = model or circuit.model, list(kinds)
    if circuit.positions is not None:
        raise MethodError("random circuits have their edges at all positions", got="a circuit by position")
    if n < 1 or not kinds:
        raise MethodError("a null needs draws", got=f"n={n}, kinds={kinds}", wanted="n of at least 1 and a kind")
    drawn = [
        (kind, mask) for kind in kinds for mask in random_circuits(circuit.graph, circuit.mask, n, kind=kind, seed=seed)
    ]
    masks = [circuit.mask, *(mask for _, mask in drawn)]
    own = learned(as_ablation(ablation), used, behavior, circuit.graph, circuit.mask)
    values = evaluate_masks(used, behavior, masks, metric=metric, label="null", ablation=own)
    whole = float((values.clean - values.empty).mean())
    found = [float((row - values.empty).mean()) / whole for row in values.circuits]
    observed, draws = found[0], found[1:]
    table = pl.DataFrame(
        {"kind": [kind for kind, _ in drawn], "draw": list(range(n)) * len(kinds), "value": draws},
        schema={"kind": pl.String, "draw": pl.Int64, "value": pl.Float64},
    )
    by_kind = {}
    for kind in kinds:
        own = [-abs(1 - value) for (k, _), value in zip(drawn, draws, strict=True) if k == kind]
        by_kind[kind] = p_value(-abs(1 - observed), own)
    _, low, high = values.faithfulness(0)
    facts = {
        "observed": observed,
        "lo": low,
        "hi": high,
        "p": max(by_kind.values()),
        "percentile": sum(abs(1 - value) > abs(1 - observed) for value in draws) / len(draws),
        "mean": sum(draws) / len(draws),
        "n": len(values.rows),
        "draws": len(draws),
        "metric": metric,
        "ablation": as_ablation(ablation).kind,
        **{f"p_{kind}": p for kind, p in by_kind.items()},
    }
    return NullResult(
        tables={"draws": table},
        facts=facts,
        config={"n": n, "metric": metric, "kinds": kinds, "seed": seed, "ablation": as_ablation(ablation).to_config()},
        provenance=Provenance.collect(used, behavior, seed=seed, seconds=time.monotonic() - started),
    )

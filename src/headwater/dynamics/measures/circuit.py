"""The measure `circuit`: how a circuit comes together over training.

It asks `localize`, another stage, and finds it by name as a user of both would: what it needs of it (attribution,
evaluation of masks, comparison) is all of that stage, and nothing that could move down to `core`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from headwater.core.errors import MethodError
from headwater.core.results import load_result
from headwater.dynamics.measures.base import Probe, Row, measures, over, row

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges that the last checkpoint's circuit is looked for at, the smallest first."""


@measures.register("circuit")
def circuit(
    probe: Probe,
    *,
    given: str | None = None,
    method: str = "eap_ig",
    fraction: float | None = None,
    target: float = 0.85,
    strengths: int = 12,
    draws: int = 200,
) -> list[Row]:
    """How much of a circuit is there at each checkpoint: the last one's, or the one stored in the folder `given`.

    The circuit: the edges that `method` (a localizing method that scores edges) ranks highest in the last checkpoint,
    `fraction` of all or as few as keep faithfulness within 1 - `target` of 1. Found on train pairs, judged on test
    pairs (on all where there is one split), by the behavior's metric, in the metric's units:

    `whole`: what the model makes of the prompt, beyond the counterfactual; `part`: what the circuit alone does;
    `faithfulness`: part / whole, and `own faithfulness` of the circuit of as many edges found at this checkpoint.
    `edge a->b`: the score of each of the `strengths` strongest edges of the circuit; `strength`: the sum of its edges'
    scores; `share`: of the |score| of all edges, how much lies on it. `edges overlap`, `heads overlap`: shared over
    union with this checkpoint's own circuit, the lo and hi of `... by chance` what circuits of its layer profile share
    (95% of `draws`); `rank correlation` of |score| of all edges with those of the circuit, where it has them. After
    Tigges et al. (2024).

    Known failure: where the model does nothing yet (the interval of `whole` includes 0) faithfulness is a ratio of
    noises and is left out (NaN); the edges that score highest then are no circuit, though they overlap with others.
    """
    of_circuit = importlib.import_module("headwater.localize.circuit").Circuit
    find = importlib.import_module("headwater.localize.catalog").methods.get(method)
    found_on, judged_on = splits(probe.pairs)
    metric = probe.pairs.metric
    if given is not None:
        reference: Any = load_result(given)
        if not isinstance(reference, of_circuit):
            raise MethodError("this folder holds no circuit", got=f"{given}: {reference.kind}", wanted="a circuit")
    else:
        reference = probe.at_last(
            "circuit", lambda model: _smallest(model, find, found_on, judged_on, metric, fraction, target)
        )
    if reference.positions is not None:
        raise MethodError("edges over training count at all positions", got="a circuit by position")
    reference.bind(probe.model)
    scored = find(probe.model, found_on, metric=metric)
    own = scored.circuit(edges=max(1, reference.n_edges))
    rows = _faithfulness(probe.model, judged_on, metric, reference, own)
    return rows + _strengths(reference, scored.scores, strengths) + _overlap(reference, own, draws, probe.seed)


def splits(behavior: "Behavior") -> tuple["Behavior", "Behavior"]:
    """The pairs to find on and to judge on: both splits, or the same pairs where there is one."""
    known = set(behavior.frame["split"].to_list())
    return (behavior.train, behavior.test) if {"train", "test"} <= known else (behavior, behavior)


def _smallest(
    model: "Model", find: Any, found_on: "Behavior", judged_on: "Behavior", metric: str, fraction: float | None,
    target: float,
) -> Any:  # fmt: skip
    """The smallest circuit of a model that is faithful on the pairs it was found on; where none is, the closest."""
    evaluate = importlib.import_module("headwater.localize.judging.faithfulness").evaluate_masks
    scored = find(model, found_on, metric=metric)
    if fraction is not None:
        return scored.circuit(fraction=fraction)
    best: tuple[float, Any] | None = None
    for size in FRACTIONS:
        tried = scored.circuit(fraction=size)
        if not tried.n_edges:
            continue
        value, _, _ = evaluate(model, found_on, [tried.mask], metric=metric).faithfulness(0)
        if best is None or abs(1 - value) < best[0]:
            best = (abs(1 - value), tried)
        if abs(1 - value) <= abs(1 - target):
            break
    if best is None:
        raise MethodError("the last checkpoint has no circuit", got="scores that leave no edge", fix="Another behavior")
    return best[1]


def _faithfulness(model: "Model", pairs: "Behavior", metric: str, reference: Any, own: Any) -> list[Row]:
    evaluate = importlib.import_module("headwater.localize.judging.faithfulness").evaluate_masks
    values = evaluate(model, pairs, [reference.mask, own.mask], metric=metric)
    whole, part = values.clean - values.empty, values.circuits[0] - values.empty
    rows = [over("whole", whole), over("part", part)]
    lo = rows[0]["lo"]
    is_there = lo is not None and (lo > 0 or rows[0]["hi"] < 0)
    for at, name in enumerate(("faithfulness", "own faithfulness")):
        rows.append(row(name, *values.faithfulness(at)) if is_there else row(name, float("nan")))
    return rows


def _strengths(reference: Any, scores: Any, strongest: int) -> list[Row]:
    mask, graph = reference.mask, reference.graph
    mass = scores.abs()[graph.allowed].sum()
    rows = [
        row("strength", float(scores[mask].sum())),
        row("share", float(scores[mask].abs().sum() / mass) if float(mass) > 0 else float("nan")),
    ]
    edges = reference.tables["edges"].with_row_index("at")
    by_size = edges.sort(edges["score"].abs(), descending=True)
    places = mask.nonzero()
    for one in by_size.head(strongest).to_dicts():
        source, reader = places[one["at"]].tolist()
        rows.append(row(f"edge {one['source']}->{one['target']}", float(scores[source, reader])))
    return rows


def _overlap(reference: Any, own: Any, draws: int, seed: int) -> list[Row]:
    if not own.n_edges:
        return [row("edges overlap", 0.0)]
    compare = importlib.import_module("headwater.localize.comparing.compare").compare
    table = compare(own, reference, n=draws, seed=seed).tables["overlap"].to_dicts()
    rows: list[Row] = []
    for one in table:
        # edges drawn anew within each pair of layers, heads renamed within each layer
        if one["what"] in ("edges", "heads") and one["measure"] == "iou" and one["null"] == one["what"]:
            rows.append(row(f"{one['what']} overlap", one["value"]))
            rows.append(row(f"{one['what']} overlap by chance", one["expected"], one["lo"], one["hi"]))
        elif one["what"] == "absolute scores":
            rows.append(row("rank correlation", one["value"]))
    return rows

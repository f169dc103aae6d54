"""Component reuse: does one behavior's circuit do the other's work?

Circuits judged on each other's behaviors, the heads they share with the role they have, and the function of groups of
heads, each beside what random ones of the same layers do.

Shapes: B pairs, L layers, H heads.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.claims.nulls import matched_sets
from headwater.claims.statistics import bootstrap, p_from_draws
from headwater.core.errors import MethodError, did_you_mean
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.circuit import Circuit
from headwater.localize.comparing.compare import shared_p
from headwater.localize.comparing.heads import (
    ROLES,
    Head,
    HeadsResult,
    attention_to_places,
    mean_outputs,
    metric_values,
)
from headwater.localize.judging.faithfulness import Values, evaluate_masks
from headwater.localize.judging.nulls import p_value, random_circuits
from headwater.localize.stats import ratio

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@register_result
class ReuseResult(Result):
    """Circuits on each other's behaviors.

    `tables["matrix"]`: circuit, behavior, faithfulness, lo, hi, relative (to the behavior's own circuit), null (mean
    faithfulness of random circuits of the same layer profile), p, edges, n. `tables["stand_in"]`: behavior, own,
    other, which (own, other, shared: edges of both, union), edges, faithfulness, lo, hi, share (of own). `tables
    ["overlap"]`: a, b, iou, p, heads_iou. `tables["heads"]`: layer, head, circuits (in how many), roles (text,
    `circuit: role`), same_role (in two circuits or more with one role).
    """

    kind: ClassVar[str] = "reuse"
    main: ClassVar[str] = "matrix"

    def faithfulness(self, circuit: str, behavior: str) -> float:
        """Faithfulness of one circuit on one behavior."""
        table = self.tables["matrix"]
        found = table.filter((pl.col("circuit") == circuit) & (pl.col("behavior") == behavior))
        if not found.height:
            known = [*table["circuit"].unique().to_list(), *table["behavior"].unique().to_list()]
            raise MethodError("no such cell", got=f"{circuit} on {behavior}", wanted=did_you_mean(circuit, known))
        return float(found["faithfulness"][0])


def reuse(
    circuits: Mapping[str, Circuit],
    behaviors: Mapping[str, "Behavior"],
    *,
    model: "Model | None" = None,
    roles: Mapping[str, HeadsResult] | None = None,
    metric: str = "logit_diff",
    ablation: str = "counterfactual",
    draws: int = 10,
    seed: int = 0,
) -> ReuseResult:
    """How far circuits serve behaviors they were not found on (component reuse, Merullo et al., 2024).

    circuits, behaviors: by name; a circuit and a behavior of one name belong together. Every circuit is run on every
    behavior's test pairs; where a circuit stands in for another's own, also with the edges that both have and those
    that either has. roles: what heads do in each behavior (`hw.localize.heads.heads`), to tell whether shared heads
    have the same role. draws: random circuits matched to each in layer profile, run on the same pairs (0: none).
    Known failure: a circuit of half the model serves everything; read each number beside its null and its size.

    Raises MethodError where circuits are of different graphs or nothing was given.
    """
    started = time.monotonic()
    if not circuits or not behaviors:
        raise MethodError("reuse needs circuits and behaviors", got=f"{len(circuits)} and {len(behaviors)}")
    names = list(circuits)
    graph = circuits[names[0]].graph
    for name in names[1:]:
        if circuits[name].graph.to_dict() | {"d_model": 0} != graph.to_dict() | {"d_model": 0}:
            raise MethodError(f"the circuit {name!r} is of another graph", got=circuits[name].graph, wanted=graph)
    used = model or circuits[names[0]].model
    matrix: list[dict[str, Any]] = []
    standing: list[dict[str, Any]] = []
    n_pairs = {}
    for task, behavior in track(list(behaviors.items()), "reuse"):
        pairs = behavior.test if "test" in set(behavior.frame["split"].to_list()) else behavior
        masks = [circuits[name].mask for name in names]
        own = circuits.get(task)
        mixed: list[tuple[str, str, Tensor]] = []
        if own is not None:
            for name in names:
                if name != task:
                    both = {"shared": own.mask & circuits[name].mask, "union": own.mask | circuits[name].mask}
                    mixed += [(name, which, mask) for which, mask in both.items()]
        random = [list(random_circuits(graph, mask, draws, kind="edges", seed=seed)) for mask in masks]
        every = [*masks, *(mask for _, _, mask in mixed), *(mask for group in random for mask in group)]
        values = evaluate_masks(used, pairs, every, metric=metric, label=f"on {task}", ablation=ablation)
        n_pairs[task] = len(values.rows)
        means = _faithfulness(values)
        for index, name in enumerate(names):
            value, low, high = values.faithfulness(index)
            null = means[len(masks) + len(mixed) + index * draws :][:draws]
            matrix.append(
                {
                    "circuit": name, "behavior": task, "faithfulness": value, "lo": low, "hi": high,
                    "relative": value / means[names.index(task)] if task in circuits else None,
                    "null": sum(null) / draws if draws else None,
                    "p": p_value(-abs(1 - value), [-abs(1 - v) for v in null]) if draws else None,
                    "edges": circuits[name].n_edges, "n": len(values.rows),
                }
            )  # fmt: skip
        if own is None:
            continue
        home = names.index(task)
        for index, name in enumerate(names):
            if name == task:
                continue
            cases = [("own", home, own.mask), ("other", index, circuits[name].mask)]
            cases += [(w, len(masks) + i, m) for i, (other, w, m) in enumerate(mixed) if other == name]
            for which, at, mask in cases:
                value, low, high = values.faithfulness(at)
                standing.append(
                    {
                        "behavior": task, "own": task, "other": name, "which": which, "edges": int(mask.sum()),
                        "faithfulness": value, "lo": low, "hi": high, "share": _share(values, at, home),
                    }
                )  # fmt: skip
    tables = {
        "matrix": pl.DataFrame(matrix, infer_schema_length=None),
        "stand_in": pl.DataFrame(standing, schema=_STAND_IN),
        "overlap": pl.DataFrame(_overlaps(circuits), schema=_OVERLAP),
        "heads": pl.DataFrame(_head_rows(circuits, roles or {}), schema=_HEAD_ROWS),
    }
    return ReuseResult(
        tables=tables,
        facts={"metric": metric, "ablation": ablation, "circuits": names, "behaviors": list(behaviors), "n": n_pairs},
        config={"metric": metric, "ablation": ablation, "draws": draws, "seed": seed},
        provenance=Provenance.collect(used, seed=seed, seconds=time.monotonic() - started),
    )


_STAND_IN: dict[str, Any] = {
    "behavior": pl.String, "own": pl.String, "other": pl.String, "which": pl.String, "edges": pl.Int64,
    "faithfulness": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "share": pl.Float64,
}  # fmt: skip
_OVERLAP: dict[str, Any] = {
    "a": pl.String, "b": pl.String, "iou": pl.Float64, "p": pl.Float64, "heads_iou": pl.Float64,
}  # fmt: skip
_HEAD_ROWS: dict[str, Any] = {
    "layer": pl.Int64, "head": pl.Int64, "circuits": pl.Int64, "in": pl.String, "roles": pl.String,
    "same_role": pl.Boolean,
}  # fmt: skip


def _faithfulness(values: Values) -> list[float]:
    whole = float((values.clean - values.empty).mean())
    return [float((row - values.empty).mean()) / whole for row in values.circuits]


def _share(values: Values, at: int, home: int) -> float:
    """What a stand-in keeps of what the behavior's own circuit does."""
    return ratio(values.circuits[at] - values.empty, values.circuits[home] - values.empty)[0]


def _overlaps(circuits: Mapping[str, Circuit]) -> list[dict[str, Any]]:
    rows = []
    for a, one in circuits.items():
        for b, two in circuits.items():
            union = int((one.mask | two.mask).sum())
            heads = set(one.heads), set(two.heads)
            rows.append(
                {
                    "a": a, "b": b, "iou": int((one.mask & two.mask).sum()) / max(union, 1),
                    "p": shared_p(one.graph, one.mask, two.mask),
                    "heads_iou": len(heads[0] & heads[1]) / max(len(heads[0] | heads[1]), 1),
                }
            )  # fmt: skip
    return rows


def _head_rows(circuits: Mapping[str, Circuit], roles: Mapping[str, HeadsResult]) -> list[dict[str, Any]]:
    """Every head that some circuit has, those in most circuits first."""
    rows = []
    for layer, head in sorted({head for circuit in circuits.values() for head in circuit.heads}):
        within = [name for name, circuit in circuits.items() if (layer, head) in circuit.heads]
        known = {
            name: [role for role in roles[name].found if (layer, head) in roles[name].heads_of(role)]
            for name in within
            if name in roles
        }
        counted = [role for found in known.values() for role in found]
        rows.append(
            {
                "layer": layer, "head": head, "circuits": len(within), "in": ", ".join(within),
                "roles": "; ".join(f"{name}: {', '.join(found)}" for name, found in known.items() if found),
                "same_role": any(counted.count(role) > 1 for role in counted) if known else None,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row["circuits"], row["layer"], row["head"]))


# --- groups of heads


@register_result
class HeadGroupsResult(Result):
    """`tables["groups"]`: group, role, heads (text), n_heads, attention, attention_null, attention_p, effect, lo, hi,
    null, p, n, draws.

    attention: from where to where the role says, mean over the group's heads (null: random groups of the same
    layers). effect: what the metric loses, as a share of its way from prompt to counterfactual, when the whole group is
    patched with its mean (null: random groups of as many heads of the same layers).
    """

    kind: ClassVar[str] = "head_groups"
    main: ClassVar[str] = "groups"


def group_tests(
    model: "Model",
    behavior: "Behavior",
    groups: "Mapping[str, Sequence[Head]] | HeadsResult",
    *,
    roles: Mapping[str, str] | None = None,
    metric: str = "logit_diff",
    draws: int = 20,
    seed: int = 0,
) -> HeadGroupsResult:
    """Whether groups of heads do what they are said to do, against random groups of the same layers.

    groups: name -> [(layer, head), ...], or a HeadsResult, whose roles are the groups. roles: group -> the role whose
    place it should attend to (a group that bears a role's name has it). Two tests a group: it attends there, and the
    metric needs it (mean ablation of the whole group, means from the train pairs). p counts the group among the draws.
    Known failure: a random group may hold heads that do the work too, which makes the test conservative; backup heads
    hide a group whose loss they make up for.

    Raises MethodError for empty groups, heads that the model has not, or unknown roles.
    """
    started = time.monotonic()
    wanted = {role: groups.heads_of(role) for role in groups.found} if isinstance(groups, HeadsResult) else dict(groups)
    known = dict(roles or {})
    for name, heads in wanted.items():
        _check_group(model, name, heads)
        if name in ROLES:
            known.setdefault(name, name)
    for group, role in known.items():
        if role not in ROLES:
            raise MethodError(f"unknown role of the group {group!r}", got=repr(role), wanted=did_you_mean(role, ROLES))
    if not wanted or draws < 1:
        raise MethodError("there is nothing to test", got=f"{len(wanted)} groups, {draws} draws")
    splits = set(behavior.frame["split"].to_list())
    train = (behavior.train if "train" in splits else behavior).bind(model)
    test = (behavior.test if "test" in splits else behavior).bind(model)
    means = mean_outputs(model, train)
    places = attention_to_places(model, test, sorted(set(known.values())))
    clean = metric_values(model, test, metric=metric)
    whole = clean - metric_values(model, test, metric=metric, side="corrupt")
    layers = [layer for layer in range(model.n_layers) for _ in range(model.n_heads)]
    rows = []
    for name, heads in track(list(wanted.items()), "head groups"):
        chosen = [layer * model.n_heads + head for layer, head in heads]
        random = [
            [divmod(int(at), model.n_heads) for at in draw]
            for draw in matched_sets(layers, chosen, draws, seed=seed, apart=True)
        ]
        lost = [
            clean - metric_values(model, test, metric=metric, out=some, means=means) for some in (list(heads), *random)
        ]
        effect, low, high = ratio(lost[0], whole, seed=seed)
        null = [float(values.mean() / whole.mean()) for values in lost[1:]]
        role = known.get(name)
        attended = _attention(places.get(role) if role else None, list(heads), random)
        rows.append(
            {
                "group": name, "role": role, "heads": ", ".join(f"a{layer}.h{head}" for layer, head in heads),
                "n_heads": len(heads), **attended, "effect": effect, "lo": low, "hi": high,
                "null": sum(null) / len(null), "p": p_from_draws(effect, null), "n": test.n, "draws": draws,
            }
        )  # fmt: skip
    return HeadGroupsResult(
        tables={"groups": pl.DataFrame(rows, schema=_GROUPS)},
        facts={"metric": metric, "n": test.n, "clean": bootstrap(clean.numpy(), seed=seed).value},
        config={
            "metric": metric, "draws": draws, "seed": seed,
            "groups": {name: [list(head) for head in heads] for name, heads in wanted.items()},
        },
        provenance=Provenance.collect(model, behavior, seed=seed, seconds=time.monotonic() - started),
    )  # fmt: skip


_GROUPS: dict[str, Any] = {
    "group": pl.String, "role": pl.String, "heads": pl.String, "n_heads": pl.Int64, "attention": pl.Float64,
    "attention_null": pl.Float64, "attention_p": pl.Float64, "effect": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
    "null": pl.Float64, "p": pl.Float64, "n": pl.Int64, "draws": pl.Int64,
}  # fmt: skip


def _check_group(model: "Model", name: str, heads: Sequence[Head]) -> None:
    if not heads:
        raise MethodError(f"the group {name!r} has no heads", fix="Leave it out")
    for layer, head in heads:
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            wanted = f"layers 0 to {model.n_layers - 1}, heads 0 to {model.n_heads - 1}"
            raise MethodError(f"the group {name!r} has a head that the model has not", got=(layer, head), wanted=wanted)


def _attention(place: Tensor | None, heads: list[Head], random: list[list[Head]]) -> dict[str, float | None]:
    if place is None:
        return {"attention": None, "attention_null": None, "attention_p": None}
    mean = torch.nanmean(place, dim=0)

    def of(group: list[Head]) -> float:
        return float(torch.stack([mean[layer, head] for layer, head in group]).mean())

    null = [of(group) for group in random]
    own = of(heads)
    return {"attention": own, "attention_null": sum(null) / len(null), "attention_p": p_from_draws(own, null)}

"""The tests that a trace files claims with. Each takes everything from the stored run, its params and its seed.

All are judged on the test pairs, on which nothing was found. Shapes: n pairs, C circuits, L layers, H heads.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from headwater.behavior.table import Behavior
from headwater.claims import (
    Context,
    Outcome,
    binomial,
    bootstrap,
    matched_sets,
    p_from_draws,
    random_weights,
    sign_flip,
    smallest_p,
    test,
)
from headwater.localize.circuit import Circuit
from headwater.localize.comparing.heads import HeadsResult, attention_to_places, metric_values
from headwater.localize.judging.faithfulness import NullResult, Values, evaluate_masks
from headwater.localize.judging.nulls import random_circuits
from headwater.localize.stats import ratio
from headwater.trace import subspaces as subspaces  # registers its test with these

Head = tuple[int, int]
_NO_BEHAVIOR = (
    "the metric is not clearly higher on the prompts than on their counterfactuals: there is nothing to explain"
)


def judged(context: Context, n: int) -> Behavior:
    """The first `n` test pairs."""
    behavior: Behavior = context["behavior"]
    return behavior.test[:n]


def of_few_lengths(context: Context, n: int) -> Behavior:
    """`n` test pairs of the commonest lengths: many small circuits cost by the batch, and a batch has one length."""
    test = context["behavior"].test
    groups = sorted(test.bind(context["model"]).groups, key=len, reverse=True)
    return test[sorted([row for group in groups for row in group.rows][:n])]


def too_few(*, pairs: int | None = None, draws: int | None = None, q: float = 0.05) -> str:
    """Why a test of this size could not support anything, or nothing."""
    least = smallest_p(pairs=pairs, draws=draws)
    if least <= q:
        return ""
    of = f"{pairs} pairs" if pairs is not None and smallest_p(pairs=pairs) > q else f"{draws} draws"
    return f"{of} are too few: the smallest p they can give is {least:.3g}"


# --- the behavior


@test("accuracy_above_chance")
def accuracy_above_chance(context: Context, *, seed: int, n: int) -> Outcome:
    """Share of pairs on which every answer's foil is less likely, against choosing among answer and foils blindly."""
    model, pairs = context["model"], judged(context, n).bind(context["model"])
    right = int(_metric(model, pairs, "accuracy").sum())
    chances: list[Tensor] = []
    for group in pairs.groups:
        answers, foils = (group.answers >= 0).sum(dim=1), (group.foils >= 0).sum(dim=1)
        blind = torch.full(answers.shape, 1.0 / model.d_vocab, dtype=torch.float64)
        chances.append(torch.where(foils > 0, answers.double() / (answers + foils), answers * blind))
    chance = float(torch.cat(chances).mean())
    p, share = binomial(right, pairs.n, chance)
    least = chance**pairs.n
    why = f"{pairs.n} pairs are too few: all right by luck has p {least:.3g}" if least > 0.05 else ""
    return Outcome(
        effect=share.value, lo=share.lo, hi=share.hi, p=p, n=pairs.n, reference=chance, why_not=why,
        note=f"chance {chance:.3g}",
    )  # fmt: skip


@test("prompt_against_counterfactual")
def prompt_against_counterfactual(context: Context, *, seed: int, n: int, metric: str) -> Outcome:
    """The metric on the prompts minus the metric of the same answers on the counterfactuals."""
    model, pairs = context["model"], judged(context, n).bind(context["model"])
    change = (_metric(model, pairs, metric) - _metric(model, pairs, metric, side="corrupt")).numpy()
    found = bootstrap(change, seed=seed)
    p = sign_flip(change, seed=seed)
    return Outcome(effect=found.value, lo=found.lo, hi=found.hi, p=p, n=pairs.n, why_not=too_few(pairs=pairs.n))


# --- the circuit


@test("circuit_sufficient")
def circuit_sufficient(context: Context, *, seed: int, n: int, metric: str, threshold: float) -> Outcome:
    """Faithfulness of the circuit alone, against a threshold.

    Sign flips of (circuit - counterfactual) - threshold (prompt - counterfactual), pair by pair.
    """
    circuit: Circuit = context["circuit"]
    values = evaluate_masks(context["model"], judged(context, n), [circuit.mask], metric=metric)
    whole, part = values.clean - values.corrupt, values.circuits[0] - values.corrupt
    value, lo, hi = ratio(part, whole, seed=seed)
    p = sign_flip((part - threshold * whole).numpy(), seed=seed)
    return Outcome(
        effect=value, lo=lo, hi=hi, p=p, n=len(whole), reference=threshold, why_not=_why(values, seed),
        details={"n_edges": circuit.n_edges, "n_total_edges": circuit.facts["n_total_edges"]},
    )  # fmt: skip


@test("circuit_necessary")
def circuit_necessary(context: Context, *, seed: int, n: int, metric: str, draws: int) -> Outcome:
    """What the model loses without the circuit's edges, against losing as many random ones of the same layers.

    Effect: 1 - faithfulness of the complement. p: sign flips over pairs of the difference to the mean random knock-out.
    """
    circuit: Circuit = context["circuit"]
    graph = circuit.graph
    random = random_circuits(graph, circuit.mask, draws, kind="edges", seed=seed)
    outside = [graph.allowed & ~mask for mask in (circuit.mask, *random)]
    values = evaluate_masks(context["model"], judged(context, n), outside, metric=metric)
    whole = values.clean - values.corrupt
    lost = values.clean[None] - values.circuits
    value, lo, hi = ratio(lost[0], whole, seed=seed)
    null = tuple(float(row.mean() / whole.mean()) for row in lost[1:])
    p = sign_flip((lost[0] - lost[1:].mean(dim=0)).numpy(), seed=seed)
    return Outcome(
        effect=value, lo=lo, hi=hi, p=p, n=len(whole), reference=float(np.mean(null)), null_draws=null,
        why_not=_why(values, seed),
    )  # fmt: skip


@test("circuit_beats_random")
def circuit_beats_random(context: Context, *, seed: int, n: int, metric: str, draws: int, kind: str) -> Outcome:
    """Faithfulness against `draws` random circuits of the same size and layer profile (`kind`: see localize.nulls).

    A random circuit counts against the claim when its faithfulness is at least as close to 1.
    """
    null = null_of(context, seed=seed, n=n, metric=metric, draws=draws)
    values = null.tables["draws"].filter(kind=kind)["value"].to_list()
    facts = null.facts
    why = too_few(draws=draws)
    why = why or no_behavior(null.tensors["change"], seed=seed)
    return Outcome(
        effect=facts["observed"], lo=facts["lo"], hi=facts["hi"], p=facts[f"p_{kind}"], n=facts["n"],
        reference=float(np.mean(values)), null_draws=tuple(values), why_not=why,
    )  # fmt: skip


def null_of(context: Context, *, seed: int, n: int, metric: str, draws: int) -> NullResult:
    """The random circuits of both kinds, run once for all claims about them (and stored beside the ledger)."""
    made: dict[Any, Any] = context.setdefault("made", {})
    key = ("null", seed, n, metric, draws)
    if key not in made:
        circuit: Circuit = context["circuit"]
        pairs = of_few_lengths(context, n)
        null = circuit.null(pairs, n=draws, metric=metric, kinds=("edges", "heads"), seed=seed, model=context["model"])
        bound = pairs.bind(context["model"])
        null.tensors["change"] = _metric(context["model"], bound, metric) - _metric(
            context["model"], bound, metric, side="corrupt"
        )
        made[key] = null
    return made[key]


@test("circuit_beats_random_weights")
def circuit_beats_random_weights(
    context: Context, *, seed: int, n: int, n_find: int, metric: str, copies: int, method: str, steps: int
) -> Outcome:
    """Faithfulness against circuits that the same method finds in copies of the model with random weights.

    Those circuits have as many edges and are run in the real model: what they reach, architecture alone explains.
    p: sign flips over pairs of the difference to their mean.
    """
    from headwater.localize.attribution.eap import AttributionResult, methods

    circuit: Circuit = context["circuit"]
    behavior: Behavior = context["behavior"]
    train = behavior.train[:n_find]
    options = {"steps": steps} if method == "eap_ig" else {}
    rank, how = circuit.config.get("rank", "abs"), circuit.config.get("how", "topn")
    masks: list[Tensor] = []
    for copy in range(copies):
        scores = methods.get(method)(
            random_weights(context["model"], seed=seed + copy), train, metric=metric, **options
        )
        found = cast(AttributionResult, scores).circuit(
            edges=int(circuit.config.get("asked_edges", circuit.n_edges)), rank=rank, how=how
        )
        masks.append(found.mask)
    values = evaluate_masks(context["model"], judged(context, n), [circuit.mask, *masks], metric=metric)
    whole, part = values.clean - values.corrupt, values.circuits - values.corrupt
    value, lo, hi = ratio(part[0], whole, seed=seed)
    null = tuple(float(row.mean() / whole.mean()) for row in part[1:])
    p = sign_flip((part[0] - part[1:].mean(dim=0)).numpy(), seed=seed)
    shared = [float((mask & circuit.mask).sum() / max(1, int(circuit.mask.sum()))) for mask in masks]
    return Outcome(
        effect=value, lo=lo, hi=hi, p=p, n=len(whole), reference=float(np.mean(null)), null_draws=null,
        why_not=_why(values, seed), details={"edges_shared": shared},
    )  # fmt: skip


# --- the heads


@test("heads_play_role")
def heads_play_role(
    context: Context, *, seed: int, n: int, metric: str, role: str, heads: Sequence[Sequence[int]], draws: int
) -> Outcome:
    """Whether a group of heads does what its role says: it attends there *and* the metric needs it. p is the larger.

    Attention: to the role's place, against 9,999 random groups of the same layers. Need: share of the metric lost when
    the group is patched with its mean output, against `draws` random groups of the same layers (sign flips over pairs
    of the difference to their mean). For `negative_mover` the metric must rise instead of fall.
    """
    found: HeadsResult = context["heads"]
    model = context["model"]
    pairs = judged(context, n).bind(model)
    group = [(int(layer), int(head)) for layer, head in heads]
    attended = attention_to_places(model, pairs, [role])[role]
    if attended is None:  # a role that was found on random tokens
        return Outcome(effect=float("nan"), n=pairs.n, why_not="no test prompt has a place for this role")
    mean = attended.nanmean(dim=0)
    n_heads = mean.shape[1]
    layers = np.repeat(np.arange(mean.shape[0]), n_heads)
    chosen = [layer * n_heads + head for layer, head in group]
    flat = mean.flatten().numpy()
    by_chance = [float(flat[draw].mean()) for draw in matched_sets(layers, chosen, 9999, seed=seed)]
    attention = float(flat[chosen].mean())
    p_attention = p_from_draws(attention, by_chance)

    means = found.tensors["means"]
    clean, corrupt = _both_sides(context, n, metric)
    whole = clean - corrupt
    random = [
        [divmod(int(at), n_heads) for at in draw] for draw in matched_sets(layers, chosen, draws, seed=seed, apart=True)
    ]
    lost = torch.stack([
        clean - metric_values(model, pairs, metric=metric, out=out, means=means) for out in [group, *random]
    ])  # fmt: skip
    value, lo, hi = ratio(lost[0], whole, seed=seed)
    null = tuple(float(row.mean() / whole.mean()) for row in lost[1:])
    side = "less" if role == "negative_mover" else "greater"
    p_effect = sign_flip((lost[0] - lost[1:].mean(dim=0)).numpy(), side=side, seed=seed)
    why = too_few(pairs=pairs.n) or no_behavior(whole, seed=seed)
    chance = float(np.mean(by_chance))
    note = f"attention {attention:.2f}, random heads {chance:.2f} (p {p_attention:.2g}); need p {p_effect:.2g}"
    return Outcome(
        effect=value, lo=lo, hi=hi, p=max(p_attention, p_effect), n=pairs.n, reference=float(np.mean(null)), side=side,
        null_draws=null, why_not=why, note=note,
        details={
            "attention": attention, "attention_null": chance, "p_attention": p_attention,
            "p_effect": p_effect, "heads": [list(head) for head in group],
        },
    )  # fmt: skip


def _both_sides(context: Context, n: int, metric: str) -> tuple[Tensor, Tensor]:
    """The metric on the first `n` test pairs and on their counterfactuals, run once for all claims of one context."""
    known: dict[Any, tuple[Tensor, Tensor]] = context.setdefault("sides", {})
    if (n, metric) not in known:
        model, pairs = context["model"], judged(context, n).bind(context["model"])
        known[n, metric] = _metric(model, pairs, metric), _metric(model, pairs, metric, side="corrupt")
    return known[n, metric]


def _metric(model: Any, pairs: Any, name: str, *, side: str = "clean") -> Tensor:
    return metric_values(model, pairs, metric=name, side=side)


def no_behavior(change: Tensor, *, seed: int) -> str:
    """Why shares of a change (prompt minus counterfactual, [n]) mean nothing: it is not clearly above 0; else ""."""
    return "" if bootstrap(change.numpy(), seed=seed).lo > 0 else _NO_BEHAVIOR


def _why(values: Values, seed: int) -> str:
    return too_few(pairs=len(values.rows)) or no_behavior(values.clean - values.corrupt, seed=seed)

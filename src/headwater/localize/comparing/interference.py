"""Failure by interference: which components vote for the right answer, which for a wrong one, and who wins.

A component's vote is what it alone says about the answers and foils of a pair (see `votes.py`).

Shapes: B pairs, C components, H heads, L layers.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.claims.nulls import matched_sets
from headwater.claims.statistics import benjamini_hochberg, bootstrap, p_from_draws, sign_flip
from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.localize.attribution.eap import configured
from headwater.localize.catalog import methods
from headwater.localize.comparing.votes import Voter, Votes, collect
from headwater.localize.engine.hooks import on_input, on_port
from headwater.localize.engine.passes import (
    Batch,
    Engine,
    can_reuse_prefix,
    for_discovery,
    make_batches,
    tokens_at_once,
)

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class InterferenceConfig:
    """How votes are judged and acted on.

    metric: votes are logits, so logit_diff is the only one. q: false-discovery rate at which a component counts as
    sound or faulty. top: how many sound and how many faulty components the intervention scales at most. amplify:
    factors tried for the sound ones (the best on the train pairs is judged on the test pairs). damp: the same for the
    faulty ones. draws: random sets of components of the same layers and kinds, scaled alike, that the intervention must
    beat. neurons: how many MLP neurons, those of the largest mean |margin|, are judged too (0: none); they are ranked,
    not scaled. n_train, n_test: pairs at most.
    """

    metric: str = "logit_diff"
    q: float = 0.05
    top: int = 8
    amplify: tuple[float, ...] = (1.5, 2.0, 3.0)
    damp: tuple[float, ...] = (0.0, 0.5, 0.8)
    draws: int = 19
    neurons: int = 0
    n_train: int = 256
    n_test: int = 128
    seed: int = 0
    memory_mb: float | None = None

    def __post_init__(self) -> None:
        if self.metric != "logit_diff":
            raise MethodError("votes are logits", got=f"metric={self.metric!r}", wanted="logit_diff")
        if (
            min(self.top, self.draws, self.n_train, self.n_test) < 1
            or self.neurons < 0
            or not self.amplify
            or not self.damp
        ):
            raise MethodError("interference needs at least one of everything", got=self)
        if not 0 < self.q < 1:
            raise MethodError("a false-discovery rate must lie between 0 and 1", got=self.q)


@register_result
class InterferenceResult(Result):
    """Whose votes are right.

    `tables["components"]`: component, kind (head, mlp, input, neuron), layer, accuracy (share of train pairs on which
    its vote, the candidate it raises most, is an answer), chance, p, margin (its mean vote for the answers less that
    for the foil the model likes best), p_margin, strength (mean |margin|), verdict (sound, faulty, mixed), n.
    `tables["classes"]`: component, class (the answer's text), precision, recall, n, votes.
    `tables["sums"]`: outcome (right, wrong: of the model, test pairs), group (sound, faulty, mixed, rest, and all:
    their sum, the model's own margin), margin, lo, hi, n.
    `tables["intervention"]`: what (before, amplify sound, damp faulty, both), accuracy, lo, hi, margin, control (mean
    accuracy of random components scaled alike), control_hi, p (against them), p_change (against before), factor, n.
    `tensors["margins"]` [train pairs, components], `total` [train pairs]: the model's own.
    """

    kind: ClassVar[str] = "interference"
    main: ClassVar[str] = "components"

    def of(self, verdict: str) -> list[str]:
        """The components of a verdict (sound, faulty, mixed), surest first."""
        return self.tables["components"].filter(verdict=verdict)["component"].to_list()


@methods.register("interference")
def interference(
    model: "Model", behavior: "Behavior", *, config: InterferenceConfig | None = None, **options: Any
) -> InterferenceResult:
    """Rank components by how often their own vote is right, and see whether the faulty ones win where the model fails
    (Rai et al., 2025: sound mechanisms are overshadowed by faulty ones).

    A component is sound where it votes for an answer more often than chance, faulty where less often, or where its
    votes together go against the answer (binomial and sign-flip tests under one false-discovery rate); mixed where
    neither or both hold. Found on train pairs; on test pairs, sums of votes by whether the model is
    right, and the accuracy when sound components are amplified and faulty ones damped at the last position, beside
    random components of the same layers scaled alike. Options are fields of `InterferenceConfig`.
    Known failure: a vote is a direct effect; a head that works through later ones (and most early layers do) votes at
    random and is called mixed, or faulty, however much the behavior needs it.

    Raises MethodError for a behavior without foils, or a model whose unembedding is no linear map.
    """
    used = configured(InterferenceConfig, config, options)  # type: ignore[type-var]
    started = time.monotonic()
    engine = Engine(model)
    voter = Voter(engine)
    train = for_discovery(behavior)[: used.n_train].bind(model)
    has_test = "test" in set(behavior.frame["split"].to_list())
    test = (behavior.test if has_test else behavior)[: used.n_test].bind(model)
    at_once = tokens_at_once(model, model.d_model * (4 * model.n_layers + model.n_heads), used.memory_mb)
    found = collect(voter, make_batches(train, at_once, reuse_prefix=False), "votes", neurons=used.neurons)
    judged = collect(voter, make_batches(test, at_once, reuse_prefix=False), "votes (test)")
    table = components(names_of(voter, found), found, q=used.q, seed=used.seed)
    sound = [c for c in table.filter(verdict="sound")["component"].to_list() if c in voter.scalable]
    faulty = [c for c in table.filter(verdict="faulty")["component"].to_list() if c in voter.scalable]
    acted = _intervene(voter, train, test, sound[: used.top], faulty[: used.top], used, at_once)
    wrong = judged.total <= 0
    facts = {
        "metric": used.metric, "n": len(found.total), "n_test": len(judged.total), "failing": int(wrong.sum()),
        "sound": int((table["verdict"] == "sound").sum()), "faulty": int((table["verdict"] == "faulty").sum()),
        "scaled_sound": sound[: used.top], "scaled_faulty": faulty[: used.top],
        "passes": {"forward": len(found.total) + len(judged.total) + acted.passes, "backward": 0},
    }  # fmt: skip
    return InterferenceResult(
        tables={
            "components": table,
            "classes": _classes(voter, found, model),
            "sums": _sums(voter, judged, table, used.seed),
            "intervention": acted.table,
        },
        tensors={"margins": found.margins.T.contiguous(), "total": found.total},
        facts=facts,
        config={"method": "interference", **asdict(used), "amplify": list(used.amplify), "damp": list(used.damp)},
        provenance=Provenance.collect(model, behavior, seed=used.seed, seconds=time.monotonic() - started),
    )


# --- tables


def names_of(voter: Voter, votes: Votes) -> list[str]:
    """The components whose votes were read: sources of the graph, then neurons `mL.nI`."""
    return [*voter.components, *(f"m{layer}.n{neuron}" for layer, neuron in votes.neurons)]


def components(names: Sequence[str], votes: Votes, *, q: float, seed: int = 0) -> pl.DataFrame:
    """The table of components from their votes: accuracy against chance, margin against 0, and the verdict."""
    from scipy.stats import binomtest

    chance, n = float(votes.chance.double().mean()), len(votes.total)
    right = votes.right.sum(dim=1).tolist()
    p_right = [float(binomtest(k, n, chance).pvalue) for k in right]
    p_margin = [
        sign_flip(row, side="two-sided", draws=2000, seed=seed) if bool(row.any()) else 1.0
        for row in votes.margins.numpy()
    ]
    adjusted = benjamini_hochberg([*p_right, *p_margin])
    margin, strength = votes.margins.mean(dim=1).tolist(), votes.margins.abs().mean(dim=1).tolist()
    rows = []
    for i, name in enumerate(names):
        accuracy = right[i] / n
        sure, loud = (float(p or 0.0) <= q for p in (adjusted[i], adjusted[i + len(names)]))
        for_it = sure and accuracy > chance
        against = (sure and accuracy < chance) or (loud and margin[i] < 0)
        verdict = "mixed" if for_it == against else "sound" if for_it else "faulty"
        kind = "neuron" if ".n" in name else "head" if ".h" in name else "input" if name == "input" else "mlp"
        layer = -1 if name == "input" else int(name[1:].split(".")[0])
        rows.append(
            {
                "component": name, "kind": kind, "layer": layer, "accuracy": accuracy, "chance": chance,
                "p": p_right[i], "margin": margin[i], "p_margin": p_margin[i], "strength": strength[i],
                "verdict": verdict, "n": n,
            }
        )  # fmt: skip
    order = {"sound": 0, "faulty": 1, "mixed": 2}
    # the most reliable of the sound, the most harmful of the faulty, the loudest of the mixed
    first = {"sound": "accuracy", "faulty": "margin", "mixed": "strength"}

    def rank(row: dict[str, Any]) -> tuple[float, ...]:
        verdict = row["verdict"]
        size = row[first[verdict]]
        return order[verdict], size if verdict == "faulty" else -size, -row["strength"]

    rows.sort(key=rank)
    return pl.DataFrame(rows, schema=_COMPONENTS)


_COMPONENTS: dict[str, Any] = {
    "component": pl.String, "kind": pl.String, "layer": pl.Int64, "accuracy": pl.Float64, "chance": pl.Float64,
    "p": pl.Float64, "margin": pl.Float64, "p_margin": pl.Float64, "strength": pl.Float64, "verdict": pl.String,
    "n": pl.Int64,
}  # fmt: skip


def _classes(voter: Voter, votes: Votes, model: "Model") -> pl.DataFrame:
    """Precision and recall of each component's vote for each answer that the pairs have."""
    names = names_of(voter, votes)
    rows = []
    for token in sorted(set(votes.answers.tolist())):
        text = model.tokenizer.decode([token]) if model.tokenizer is not None else str(token)
        is_class = votes.answers == token
        said = votes.said == token
        hit = (said & is_class).sum(dim=1).tolist()
        votes_for = said.sum(dim=1).tolist()
        for name, k, m in zip(names, hit, votes_for, strict=True):
            rows.append((name, text, k / m if m else None, k / int(is_class.sum()), int(is_class.sum()), m))
    schema = {
        "component": pl.String, "class": pl.String, "precision": pl.Float64, "recall": pl.Float64, "n": pl.Int64,
        "votes": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _sums(voter: Voter, votes: Votes, table: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The summed votes of each group on test pairs that the model has right and on those it has wrong."""
    verdict = dict(table.filter(pl.col("kind") != "neuron").select("component", "verdict").rows())
    of = [verdict[name] for name in voter.components]
    margins = votes.margins[: len(voter.components)]
    groups = {g: margins[[i for i, v in enumerate(of) if v == g]].sum(dim=0) for g in ("sound", "faulty", "mixed")}
    groups["rest"] = votes.total - margins.sum(dim=0)  # what biases add
    groups["all"] = votes.total
    rows = []
    for outcome, which in (("right", votes.total > 0), ("wrong", votes.total <= 0)):
        for name, values in groups.items():
            here = values[which].numpy()
            if len(here):
                found = bootstrap(here, seed=seed)
                rows.append((outcome, name, found.value, found.lo, found.hi, len(here)))
    schema = {
        "outcome": pl.String, "group": pl.String, "margin": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
        "n": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


# --- acting on it


@dataclass(eq=False)
class _Acted:
    table: pl.DataFrame
    passes: int


def _intervene(
    voter: Voter, train: Any, test: Any, sound: list[str], faulty: list[str], config: InterferenceConfig, at_once: int
) -> _Acted:
    on_train = make_batches(train, at_once, reuse_prefix=False)
    on_test = make_batches(test, at_once, reuse_prefix=False)
    trials: dict[str, Mapping[str, float]] = {}
    passes = 0

    # only the last position changes, so the others are run once and come from the cache ever after
    engine, caches = voter.engine, dict[int, Any]()
    if can_reuse_prefix(engine):
        with engine.open():
            caches = {id(b): engine.cache(b.clean[:, :-1]) for b in (*on_train, *on_test) if b.clean.shape[1] > 1}

    def judge(factors: Mapping[str, float], batches: Sequence[Batch]) -> Tensor:
        nonlocal passes
        passes += sum(len(batch) for batch in batches)
        return torch.cat([scaled_margins(engine, batch, factors, past=caches.get(id(batch))) for batch in batches])

    def best(names: list[str], tried: Sequence[float]) -> float:
        """The factor with which the model is right most often on the train pairs (then: of the largest margin)."""
        if len(tried) == 1:
            return tried[0]
        found = {factor: judge(dict.fromkeys(names, factor), on_train) for factor in tried}
        return max(found, key=lambda f: (float((found[f] > 0).double().mean()), float(found[f].mean())))

    factor: dict[str, float] = {}
    if sound:
        factor["amplify sound"] = best(sound, config.amplify)
        trials["amplify sound"] = dict.fromkeys(sound, factor["amplify sound"])
    if faulty:
        factor["damp faulty"] = best(faulty, config.damp)
        trials["damp faulty"] = dict.fromkeys(faulty, factor["damp faulty"])
    if sound and faulty:
        trials["both"] = {**trials["amplify sound"], **trials["damp faulty"]}
    before = judge({}, on_test)
    rows = [_acted_row("before", before, None, None, None, config.seed)]
    for what, factors in track(list(trials.items()), "interventions"):
        after = judge(factors, on_test)
        controls = [judge(random, on_test) for random in _random_factors(voter, factors, config)]
        rows.append(_acted_row(what, after, before, controls, factor.get(what), config.seed))
    return _Acted(pl.DataFrame(rows, schema=_ACTED), passes)


def _random_factors(
    voter: Voter, factors: Mapping[str, float], config: InterferenceConfig
) -> Iterable[dict[str, float]]:
    """As many components of the same layers and kinds, scaled alike. MLPs have no other of their layer: their layer is
    drawn."""
    strata = [0 if name.startswith("m") else 1 + int(name[1:].split(".")[0]) for name in voter.scalable]
    chosen = [voter.scalable.index(name) for name in factors]
    by_stratum: dict[int, list[float]] = {}
    for name, factor in factors.items():
        by_stratum.setdefault(strata[voter.scalable.index(name)], []).append(factor)
    for draw in matched_sets(strata, chosen, config.draws, seed=config.seed, apart=True):
        left = {stratum: list(values) for stratum, values in by_stratum.items()}
        yield {voter.scalable[at]: left[strata[at]].pop() for at in draw.tolist()}


def _acted_row(
    what: str, margins: Tensor, before: Tensor | None, controls: list[Tensor] | None, factor: float | None, seed: int
) -> dict[str, Any]:
    right = (margins > 0).double().numpy()
    share = bootstrap(right, seed=seed)
    row: dict[str, Any] = {
        "what": what, "accuracy": share.value, "lo": share.lo, "hi": share.hi, "margin": float(margins.mean()),
        "control": None, "control_hi": None, "p": None, "p_change": None, "factor": factor, "n": len(right),
    }  # fmt: skip
    if controls:
        drawn = [float((control > 0).double().mean()) for control in controls]
        row |= {"control": sum(drawn) / len(drawn), "control_hi": max(drawn), "p": p_from_draws(share.value, drawn)}
    if before is not None:
        row["p_change"] = sign_flip(right - (before > 0).double().numpy(), seed=seed)
    return row


_ACTED: dict[str, Any] = {
    "what": pl.String, "accuracy": pl.Float64, "lo": pl.Float64, "hi": pl.Float64, "margin": pl.Float64,
    "control": pl.Float64, "control_hi": pl.Float64, "p": pl.Float64, "p_change": pl.Float64, "factor": pl.Float64,
    "n": pl.Int64,
}  # fmt: skip


def scaled_margins(engine: Engine, batch: Batch, factors: Mapping[str, float], *, past: Any = None) -> Tensor:
    """[B]: mean answer logit less the best foil's, when the writes of these components at the last position are
    multiplied. Heads `aL.hH` (before a norm that follows attention) and MLPs `mL`. past: the cache of the prompts but
    for their last token, which is then all that is run.
    """
    graph = engine.wiring.graph
    batch_size = len(batch)
    with engine.open(), ExitStack() as stack:
        for index, layer in enumerate(engine.wiring.layers):
            scale = torch.ones(graph.n_heads)
            for head in range(graph.n_heads):
                scale[head] = factors.get(f"a{index}.h{head}", 1.0)
            if bool((scale != 1).any()):
                wide = scale.repeat_interleave(layer.attention.d_value)
                stack.callback(
                    on_input(layer.attention.out_proj, lambda z, wide=wide: _scaled_last(z, wide, batch_size)).remove
                )
            if (own := factors.get(f"m{index}", 1.0)) != 1.0:
                on_port(
                    stack,
                    layer.mlp.write.port,
                    lambda y, own=own: _scaled_last(y, torch.tensor(own), batch_size),
                )
        ids = batch.clean if past is None else batch.clean[:, -1:]
        logits = engine.forward(ids, past).double().cpu()
    ours, theirs = batch.answers >= 0, batch.foils >= 0
    answer = (logits.gather(1, batch.answers.clamp(min=0)) * ours).sum(dim=1) / ours.sum(dim=1)
    return answer - logits.gather(1, batch.foils.clamp(min=0)).masked_fill(~theirs, -torch.inf).amax(dim=1)


def _scaled_last(x: Tensor, scale: Tensor, batch: int) -> Tensor:
    new = x.clone()
    view = new.view(batch, -1, x.shape[-1])
    view[:, -1] *= scale.to(x)
    return new

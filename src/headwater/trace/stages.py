"""The stages of a trace: each takes what is stored before it and gives results to store, by name."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from headwater.behavior.table import Behavior
from headwater.claims import Claim, Context, Ledger, claim_from_test
from headwater.core.errors import StoreError
from headwater.core.results import Provenance, Result
from headwater.core.store import RunFolder
from headwater.localize.attribution.eap import AttributionResult, methods
from headwater.localize.circuit import Circuit
from headwater.localize.comparing.heads import HeadsResult
from headwater.localize.comparing.heads import heads as find_heads
from headwater.localize.graph import head_of
from headwater.localize.judging.faithfulness import curve
from headwater.trace import tests
from headwater.trace.claims_history import of_history
from headwater.trace.verdict import history, verdict

if TYPE_CHECKING:
    from headwater.core.model import Model
    from headwater.trace.history import History
    from headwater.trace.investigation import Investigation

Results = dict[str, Result]
OF_HISTORY_RESULTS = {
    "timeline": {"timeline": "timeline", "formation": "formation"},
    "data": {"facts": "fact_link", "link": "link"},
    "do_data": {"change": "fact_change", "worlds": "worlds"},
}
"""Results of the stages of a model's history that claims are tested on: stage, name -> name in the tests' context."""
_SMALL = 0.1
"""Sizes up to this share of the edges are tried first."""


@dataclass
class Made:
    """What a stage gives back: results by name, and facts of the stage as a whole."""

    results: Results
    facts: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class Work:
    """What a stage may use: the settings, the run's folder, and the model, loaded when it is first asked for."""

    settings: "Investigation"
    run: RunFolder
    load_model: Callable[[], "Model"]
    scratch: Path | None = None
    """Where unfinished work is kept, if not in the run's folder."""
    again: dict[tuple[str, str], Result] = field(default_factory=dict[tuple[str, str], Result])
    """Results that were measured again, by stage and name; they stand in for the stored ones."""
    beside: "subprocess.Popen[bytes] | None" = None
    """The process that trains the second run meanwhile."""
    _model: "Model | None" = None
    _loaded: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def model(self) -> "Model":
        """The model; StoreError if it is not the one that the stored stages were computed with."""
        if self._model is None:
            model = self.load_model()
            if self.run.has("behavior"):
                known = self.run.facts("behavior").get("fingerprint")
                if known != model.fingerprint:
                    raise StoreError(
                        f"the model {model.name} is no longer the one that this run was made with",
                        got=f"fingerprint {model.fingerprint}",
                        wanted=known,
                        fix="Trace it into a new folder",
                    )
            self._model = model
        return self._model

    def folder(self, stage: str) -> Path:
        """Where a long stage keeps what it has so far, to go on from after a kill."""
        return (self.scratch or self.run.path / "work") / stage

    def tidy(self, stage: str) -> None:
        """Remove what a stage that is stored no longer needs."""
        shutil.rmtree(self.folder(stage) / "parts", ignore_errors=True)

    @property
    def history(self) -> "History":
        """The model's checkpoints, and what it read."""
        if "history" not in self._loaded:
            from headwater.trace.history import History

            self._loaded["history"] = History.of(self.settings)
        return self._loaded["history"]

    def result(self, stage: str, name: str) -> Result:
        """A result of a stage: as stored, or as measured again (see `verify`)."""
        return self.again.get((stage, name)) or self.run.load(stage, name)

    def seed(self, name: str) -> int:
        """A seed for one purpose, from the run's seed alone: no stage depends on what ran before it."""
        digest = hashlib.sha256(f"headwater:{self.settings.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    @property
    def behavior(self) -> Behavior:
        """The stored pairs that this model's tokenizer can align."""
        if "pairs" not in self._loaded:
            stored = self.run.load("behavior", "pairs")
            self._loaded["pairs"] = Behavior(
                stored.tables["pairs"],
                name=str(stored.facts["name"]),
                metric=str(stored.facts["metric"]),
                about=stored.facts.get("about") or {},
            )
        return self._loaded["pairs"]

    @property
    def attribution(self) -> AttributionResult:
        stored = self.run.load("localize", "attribution")
        return cast(AttributionResult, stored).bind(self.model)

    @property
    def circuit(self) -> Circuit:
        stored = self.run.load("circuit", "circuit")
        return cast(Circuit, stored).bind(self.model)

    @property
    def heads(self) -> HeadsResult:
        stored = self.run.load("heads", "heads")
        return cast(HeadsResult, stored)

    def context(self) -> Context:
        """What the claims' tests use."""
        context = Context(model=self.model, behavior=self.behavior, circuit=self.circuit, heads=self.heads)
        hashes = self.run.hashes()
        for stage, names in OF_HISTORY_RESULTS.items():
            for name, key in names.items():
                if name in hashes.get(stage, {}):
                    context[key] = self.result(stage, name)
        return context

    def train(self, n: int) -> Behavior:
        """The first `n` pairs to find things on."""
        return self.behavior.train[:n]

    def test(self, n: int) -> Behavior:
        """The first `n` pairs to judge on."""
        return self.behavior.test[:n]


def behavior(work: Work) -> Made:
    """What the model does: the pairs, their metrics, the canary."""
    from headwater.behavior import make
    from headwater.behavior.evaluate import evaluate

    settings = work.settings
    pairs = make(settings.behavior, settings.n, settings.seed, **settings.options)
    bound = pairs.bind(work.model)
    frame, resplit = bound.frame, set(bound.frame["split"].to_list()) != {"train", "test"}
    if resplit:  # nothing may be judged on what it was found on: halve them anew, by their prompts
        frame = frame.with_columns(split=pl.lit(""))
    kept = Behavior(frame, name=pairs.name, metric=settings.metric or pairs.metric, about=pairs.about)
    report = evaluate(work.model, pairs, seed=work.seed("behavior"))
    table = Result(
        tables={"pairs": kept.frame},
        facts={"name": kept.name, "metric": kept.metric, "about": kept.about, "hash": kept.hash},
        provenance=Provenance.collect(work.model, kept, seed=settings.seed),
    )
    facts = {
        "behavior_name": kept.name,
        "metric": kept.metric,
        "model": work.model.name,
        "fingerprint": work.model.fingerprint,
        "kept": bound.n,
        "split_anew": resplit,
        "dropped": bound.reasons,
    }
    return Made({"pairs": table, "report": report}, facts)


def localize(work: Work) -> Made:
    """Where it is: patching by layer and position, every head at the end, and a score for every edge."""
    from headwater.localize.patching.patch import patch

    settings, metric = work.settings.localize, work.behavior.metric
    few = work.train(settings.n_patch)
    results: Results = {}
    for pattern in settings.patch_sites:
        name = pattern.split(".")[0].replace("/", "_")
        results[name] = patch(work.model, few, sites=_at_named(work, pattern, few), metric=metric)
    for pattern in settings.head_sites:
        results[pattern.split(".")[0].replace("/", "_") + "_end"] = patch(
            work.model, few, sites=[pattern], metric=metric
        )
    options = {"steps": settings.steps} if settings.method == "eap_ig" else {}
    score = methods.get(settings.method)
    results["attribution"] = score(work.model, work.train(settings.n_attribution), metric=metric, **options)
    return Made(results, {"metric": metric})


def circuit(work: Work) -> Made:
    """The smallest circuit that reaches the target on train pairs, and how faithful it is on test pairs."""
    settings, metric = work.settings.circuit, work.behavior.metric
    scores = work.attribution
    how: Mapping[str, Any] = {"rank": settings.rank, "how": settings.how}
    facts: dict[str, Any] = {"metric": metric}
    if settings.edges is not None:
        found = scores.circuit(edges=min(settings.edges, scores.graph.n_edges), **how)
    elif settings.fraction is not None:
        found = scores.circuit(fraction=settings.fraction, **how)
    else:
        small = [fraction for fraction in settings.fractions if fraction <= _SMALL]
        for fractions in ([small] if small else []) + [list(settings.fractions)]:
            tried = curve(
                scores.graph, scores.scores, work.model, work.train(settings.n_choose), metric=metric,
                fractions=fractions, **how,
            ).tables["curve"]  # fmt: skip
            fraction, reached = smallest_faithful(tried, settings.target)
            if reached:  # large circuits cost most and are run only where the small ones do not do
                break
        found = scores.circuit(fraction=fraction, **how)
        facts |= {"fraction": fraction, "target": settings.target, "reached": reached, "tried": tried.to_dicts()}
    test = work.test(settings.n_test)
    judged = curve(scores.graph, scores.scores, work.model, test, metric=metric, fractions=settings.fractions, **how)
    rest = found.completeness(test, metric=metric, model=work.model)
    return Made({"circuit": found, "faithfulness": judged, "completeness": rest}, facts)


def smallest_faithful(table: pl.DataFrame, target: float) -> tuple[float, bool]:
    """The smallest size whose faithfulness reaches the target without overshooting 1 by more than the target falls
    short.

    Where none does, the one that comes closest to 1, and False.
    """
    rows = table.filter(pl.col("faithfulness").is_not_null() & (pl.col("edges") > 0)).sort("fraction").to_dicts()
    margin = abs(1 - target)
    for row in rows:
        if abs(1 - row["faithfulness"]) <= margin + 1e-9:
            return float(row["fraction"]), True
    return (float(min(rows, key=lambda row: abs(1 - row["faithfulness"]))["fraction"]) if rows else 1.0), False


def heads(work: Work) -> Made:
    """What heads do: roles by attention, and what the metric loses without them."""
    settings = work.settings.heads
    nodes = work.attribution.tables["nodes"]
    scores = {
        head: float(score)
        for node, score in zip(nodes["node"].to_list(), nodes["score"].to_list(), strict=True)
        if (head := head_of(node)) is not None and score is not None
    }
    metric = work.behavior.metric
    found = find_heads(
        work.model, work.behavior, scores=scores, metric=metric, seed=work.seed("heads"), **settings.model_dump()
    )
    inside = set(work.circuit.heads) if work.run.has("circuit") else set[tuple[int, int]]()
    named = {role: [f"a{layer}.h{head}" for layer, head in found.heads_of(role)] for role in found.found}
    outside = sorted(
        {
            f"a{layer}.h{head}"
            for role in found.found
            for layer, head in found.heads_of(role)
            if (layer, head) not in inside
        }
    )
    return Made({"heads": found}, {"roles": named, "outside_circuit": outside})


def claims(work: Work) -> Made:
    """The ledger: what was said in every stage, tested on pairs it was not found on."""
    context = work.context()
    filed = [_run(work, context, claim) for claim in planned(work)]
    ledger = Ledger.of(
        filed,
        q=work.settings.claims.q,
        title=f"{work.behavior.name} in {work.model.name}",
        provenance=Provenance.collect(work.model, work.behavior, seed=work.settings.seed),
    )
    results: Results = {"ledger": ledger}
    for key, made in context.get("made", {}).items():
        results[key[0]] = made
    facts: dict[str, Any] = {"verdict": verdict(ledger, work.behavior.name, work.model.name)}
    return Made(results, facts | ({"history": told} if (told := history(ledger)) else {}))


def planned(work: Work) -> list[Claim]:
    """The claims of a trace before they are tested: statements, tests and their params."""
    settings, found, metric = work.settings.claims, work.circuit, work.behavior.metric
    words, name, n = metric.replace("_", " "), work.model.name, settings.n_test
    share = found.n_edges / max(1, int(found.facts["n_total_edges"]))
    on_pairs = {"n": n, "metric": metric}
    null = {"n": settings.n_null, "metric": metric, "draws": settings.null_circuits}
    localized = work.settings.localize
    plan = [
        Claim(
            id="behavior-accuracy",
            statement=f"{name} does {work.behavior.name}: it prefers the answer to the foil more often than chance",
            test="accuracy_above_chance", stage="behavior", params={"n": n},
        ),
        Claim(
            id="behavior-counterfactual",
            statement=f"What differs in the counterfactual prompt is what decides the {words}",
            test="prompt_against_counterfactual", stage="behavior", params=on_pairs,
        ),
        Claim(
            id="circuit-sufficient",
            statement=f"The circuit of {found.n_edges} edges ({share:.2%} of all) alone carries at least "
            f"{settings.sufficient:.0%} of the {words}",
            test="circuit_sufficient", stage="circuit", params={**on_pairs, "threshold": settings.sufficient},
        ),
        Claim(
            id="circuit-necessary",
            statement=f"Without the circuit's edges the {words} falls further than without as many random edges of "
            "the same layers",
            test="circuit_necessary", stage="circuit", params={**on_pairs, "draws": settings.random_sets},
        ),
        Claim(
            id="circuit-beats-edges",
            statement="The circuit is more faithful than circuits of as many random edges of the same layers",
            test="circuit_beats_random", stage="circuit", params={**null, "kind": "edges"},
        ),
        Claim(
            id="circuit-beats-heads",
            statement="The circuit is more faithful than the same circuit with the heads of each layer renamed",
            test="circuit_beats_random", stage="circuit", params={**null, "kind": "heads"},
        ),
        Claim(
            id="circuit-beats-random-weights",
            statement="The circuit is more faithful than circuits that the same method finds in the model with "
            "random weights",
            test="circuit_beats_random_weights", stage="circuit",
            params={
                **on_pairs, "n_find": settings.n_random_models, "copies": settings.random_models,
                "method": localized.method, "steps": localized.steps,
            },
        ),
        *(_role_claim(work, role, words) for role in work.heads.found),
        *of_history(work),
    ]  # fmt: skip
    # the random circuits of both kinds are run once, so their claims share a seed
    shared = {"circuit-beats-edges": "circuit-null", "circuit-beats-heads": "circuit-null"}
    return [replace(claim, seed=work.seed(f"claim:{shared.get(claim.id, claim.id)}")) for claim in plan]


def _role_claim(work: Work, role: str, words: str) -> Claim:
    settings, group = work.settings.claims, work.heads.heads_of(role)
    names = [f"a{layer}.h{head}" for layer, head in group]
    does = str(work.heads.facts["descriptions"][role])
    moves = "rises" if role == "negative_mover" else "falls"
    what = role.replace("_", " ").replace("s inhibition", "S-inhibition")
    if len(names) == 1:
        who, it = f"{names[0]} is a {what} head: it", "it is replaced by its mean output"
    else:
        who, it = f"{', '.join(names[:-1])} and {names[-1]} are {what} heads: each", "they are replaced by their mean"
    params = {
        "n": settings.n_heads_test, "metric": work.behavior.metric, "role": role,
        "heads": [list(head) for head in group], "draws": settings.random_groups,
    }  # fmt: skip
    return Claim(
        id=f"role-{role.replace('_', '-')}",
        statement=f"{who} {does}, and the {words} {moves} when {it}",
        test="heads_play_role", stage="heads", params=params,
    )  # fmt: skip


def _run(work: Work, context: Context, claim: Claim) -> Claim:
    """Test one claim. Its command is for the run's folder, wherever that lies: a moved run is the same run."""
    return claim_from_test(
        claim.id, claim.statement, claim.test, context, claim.params,
        stage=claim.stage, seed=claim.seed, command="headwater verify .",
    )  # fmt: skip


def report(work: Work) -> Made:
    """The page for people."""
    from headwater.report import write_report

    path = write_report(work.run)
    return Made({}, {"file": path.name})


def _at_named(work: Work, pattern: str, pairs: Behavior) -> list[str]:
    """The pattern at each named position of the behavior (the last one only, where it names none)."""
    if "@" in pattern:
        return [pattern]
    return [f"{pattern}@{name}" for name in pairs.bind(work.model).positions]


def act(work: Work) -> Made:
    """What acting on it does, beside a prompting baseline and random controls."""
    from headwater.trace.acting import act_on

    return Made(*act_on(work))


def timeline(work: Work) -> Made:
    """When it formed: every checkpoint measured."""
    from headwater.trace.forming import timeline as measure

    return Made(measure(work), {"steps": work.history.series.steps})


def data(work: Work) -> Made:
    """Which data formed it: what had been read of each fact."""
    from headwater.trace.reading import data as read

    return read(work)


def do_data(work: Work) -> Made:
    """Whether it follows the data: the same training on other data."""
    from headwater.trace.redoing import do_data as redo

    return redo(work)


STAGE_FUNCTIONS: dict[str, Callable[[Work], Made]] = {
    "behavior": behavior, "localize": localize, "circuit": circuit, "heads": heads, "timeline": timeline, "data": data,
    "do_data": do_data, "claims": claims, "act": act, "report": report,
}  # fmt: skip

__all__ = ["STAGE_FUNCTIONS", "Made", "Work", "planned", "smallest_faithful", "tests"]

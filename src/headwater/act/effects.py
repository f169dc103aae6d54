"""Effect: what an action did, to its behavior, to others and to plain text, beside prompting and random controls."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.act.action import Action, Goal
from headwater.act.measuring import NOTHING, main_metric, score, text_loss, texts_of
from headwater.act.prompting import prompt
from headwater.behavior import make
from headwater.behavior.table import Behavior
from headwater.claims.statistics import bootstrap
from headwater.core.errors import BehaviorError, MethodError, ModelError, SiteError
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.core.model import Model

Floats = NDArray[np.float64]
OTHERS = ("agreement", "greater_than", "ioi", "successor")  # the first two that are not the behavior itself
ROWS = {
    "action": pl.String,
    "measure": pl.String,
    "before": pl.Float64,
    "after": pl.Float64,
    "change": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.Int64,
    "baseline": pl.Boolean,
    "note": pl.String,
}
VERSUS = {
    "action": pl.String,
    "control": pl.String,
    "measure": pl.String,
    "gain": pl.Float64,
    "control_gain": pl.Float64,
    "difference": pl.Float64,
    "lo": pl.Float64,
    "hi": pl.Float64,
    "n": pl.Int64,
}
_DRAWS = {"action": pl.String, "draw": pl.Int64, "measure": pl.String, "gain": pl.Float64}


@register_result
class Effect(Result):
    """What actions did.

    `tables["rows"]`: action, measure, before, after, change, lo, hi (95% bootstrap interval of the change, paired), n,
    baseline, note. `tables["versus"]`: for each action and control, the gain (the change counted in the goal's
    direction) of both and their paired difference with its interval: above 0 the action beats the control.
    `tables["draws"]`: the gain of each random draw. `tables["sweep"]`, where an action was sought: what was tried.
    `facts["costs"]`: for each action the weights it may change, activations set a token, tokens added to each prompt,
    prompts run to find it. `seconds_to_find` and `seconds` stand beside it, with the provenance.
    """

    kind: ClassVar[str] = "effect"
    main: ClassVar[str | None] = "rows"

    @property
    def seconds(self) -> dict[str, float]:
        """How long each action took to measure. Kept with the provenance: it is not data, which is the same on every
        run."""
        return self._timings("measure ")

    @property
    def seconds_to_find(self) -> dict[str, float]:
        """How long it took to make each action, where its method says so."""
        return self._timings("find ")

    def _timings(self, what: str) -> dict[str, float]:
        told = self.provenance.timings.items()
        return {name.removeprefix(what): spent for name, spent in told if name.startswith(what)}

    def beats(self, action: str | None = None) -> bool:
        """Whether an action (the first if none is named) beats every control beyond chance: all intervals above 0. One
        that has no control, or could not be measured, beats none."""
        known = list(self.facts["goals"])
        name = action if action is not None else known[0]
        if name not in known:
            raise MethodError("no such action in this effect", got=repr(name), wanted=", ".join(known))
        against = self.tables["versus"].filter(pl.col("action") == name)
        return bool(against.height and (against["lo"] > 0).all())


@dataclass(frozen=True, kw_only=True)
class EffectConfig:
    """What was measured and how."""

    prompting: bool = True
    controls: int = 5
    others: tuple[str, ...] = ()
    n_others: int = 24
    texts: int = 12
    text_tokens: int = 48
    level: float = 0.95
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Measured:
    """Values of one condition: for each measure its ids and one number a pair (or a text); notes where it has none."""

    values: dict[str, dict[str, float]]
    notes: dict[str, str]


def effect(
    model: "Model",
    behavior: Behavior,
    action: Action | Sequence[Action],
    *,
    others: Sequence[str | Behavior] | None = None,
    text: str | Sequence[str] | None = None,
    prompting: bool = True,
    controls: int = 5,
    n_others: int = 24,
    text_tokens: int = 48,
    seed: int = 0,
) -> Effect:
    """Measure what actions do: to the test pairs of their behavior, to other behaviors, to plain text.

    action: one or several (`knock_out`, `amplify`, `steer`, `prompt`, or an `Action` of your own).
    others: behaviors that should stay as they are; names or Behaviors; None means two of `OTHERS`.
    text: what perplexity is measured on; None means the package's own `plain_texts()`.
    prompting: whether the best prefix for each action's goal stands beside it.
    controls: how many random versions of each action are drawn; their mean stands beside it (on other behaviors and
        on text the first of them).
    n_others: pairs of each other behavior. text_tokens: tokens of each text.

    Measures are the behavior's metric and accuracy, its preference where the goal is "column = value" (the metric,
    counted down on the pairs of the other value), metric and accuracy of the others, and text perplexity. What an
    action cannot be measured on (a named position that a behavior lacks) is a row without numbers that says so.

    Raises BehaviorError where the behavior does not fit the model, MethodError for no action.
    """
    started = time.perf_counter()
    actions = [action] if isinstance(action, Action) else list(action)
    if not actions:
        raise MethodError("no action to measure", wanted="at least one")
    if len({one.name for one in actions}) < len(actions):
        raise MethodError("two actions have one name", got=[one.name for one in actions], fix="Rename one")
    bench = _Bench(model, behavior, others, texts_of(text), [one.goal for one in actions], n_others, text_tokens, seed)
    config = EffectConfig(
        prompting=prompting,
        controls=controls,
        others=tuple(one.behavior.name for one in bench.others),
        n_others=n_others,
        texts=len(bench.texts),
        text_tokens=text_tokens,
        seed=seed,
    )
    baselines: list[Action] = []
    no_prompt: dict[Goal, str] = {}
    for goal in _distinct(actions) if prompting else ():
        try:
            baselines.append(prompt(model, behavior, goal, seed=seed))
        except MethodError as error:  # a small context, or a tokenizer that lacks the words
            no_prompt[goal] = _first(error)
    seconds: dict[str, float] = {}
    before = bench.measure(NOTHING, seconds)
    rows: list[dict[str, Any]] = []
    versus: list[dict[str, Any]] = []
    drawn: list[dict[str, Any]] = []
    after = {one.name: bench.measure(one, seconds) for one in track([*actions, *baselines], "measuring actions")}
    for one in actions:
        rows += bench.rows(one.name, one.goal, before, [after[one.name]], baseline=False)
        name, random = _random_versions(bench, one, controls, seed, seconds)
        if random:
            name = f"{name} (beside {one.name})" if name in {row["action"] for row in rows} else name
            rows += bench.rows(name, one.goal, before, random, baseline=True, note="drawn at random")
            versus += bench.versus(one, after[one.name], name, random, before)
            for draw, found in enumerate(random):
                if gains := bench.gains(one.goal, before, found):
                    drawn.append(
                        {
                            "action": one.name,
                            "draw": draw,
                            "measure": bench.judged(one.goal),
                            "gain": _mean(gains.values()),
                        }
                    )
        for base in baselines:
            if base.goal == one.goal:
                versus += bench.versus(one, after[one.name], base.name, [after[base.name]], before)
    for base in baselines:
        added = len(model.tokens(base.prefix)[0])
        note = f"{added} tokens before each prompt"
        rows += bench.rows(base.name, base.goal, before, [after[base.name]], baseline=True, note=note)
    for goal, why in no_prompt.items():
        name = f"prompt {'toward ' if goal.direction == 'toward' else 'to '}{goal}"
        said = {"measure": bench.judged(goal), "baseline": True, "n": 0, "note": f"not possible: {why}"}
        rows.append({"action": name, **said})
    tables = {
        "rows": pl.DataFrame(rows, schema=ROWS, orient="row"),
        "versus": pl.DataFrame(versus, schema=VERSUS, orient="row"),
        "draws": pl.DataFrame(drawn, schema=_DRAWS, orient="row"),
    }
    if sweeps := [one.sweep.with_columns(action=pl.lit(one.name)) for one in actions if one.sweep is not None]:
        tables["sweep"] = pl.concat(sweeps, how="diagonal")
    facts = {
        "behavior": behavior.name,
        "goals": {one.name: str(one.goal) for one in actions},
        "measures": {one.name: bench.judged(one.goal) for one in actions},
        "costs": [_cost(model, one) for one in [*actions, *baselines]],
        "actions": [{"name": one.name, **one.config} for one in [*actions, *baselines]],
        "dropped": {one.behavior.name: one.reasons for one in [bench.bound, *bench.others] if one.reasons},
    }
    spent = time.perf_counter() - started
    timings = {f"measure {name}": taken for name, taken in seconds.items()}
    timings |= {f"find {one.name}": one.seconds for one in actions if one.seconds}
    provenance = Provenance.collect(model, behavior, seed=seed, seconds=spent, timings=timings)
    return Effect(tables=tables, facts=facts, config=asdict(config), provenance=provenance)


class _Bench:
    """Everything that actions are measured on, bound to the model once."""

    def __init__(
        self,
        model: "Model",
        behavior: Behavior,
        others: Sequence[str | Behavior] | None,
        texts: list[str],
        goals: list[Goal],
        n_others: int,
        text_tokens: int,
        seed: int,
    ) -> None:
        self.model, self.texts, self.text_tokens = model, texts, text_tokens
        self.bound = behavior.test.bind(model)
        self.metric = main_metric(behavior)
        frame = self.bound.behavior.frame
        self.goals = {str(goal): goal for goal in goals if goal.direction == "toward"}
        self.signs = {
            str(goal): dict(zip(frame["id"].to_list(), goal.signs(frame).tolist(), strict=True)) for goal in goals
        }
        self.others = others_of(model, behavior, others, n_others, seed)
        self.seed = seed

    def judged(self, goal: Goal) -> str:
        """The measure that an action of this goal is judged by."""
        name = self.bound.behavior.name
        return f"{name} preference {goal}" if goal.direction == "toward" else f"{name} {self.metric}"

    def measure(self, action: Action, seconds: dict[str, float], *, everything: bool = True) -> _Measured:
        """Values of all measures, or of those of the behavior itself only."""
        started = time.perf_counter()
        with action.edited(self.model) as rest:
            found = self._measure(rest, everything)
        seconds[action.name] = seconds.get(action.name, 0.0) + time.perf_counter() - started
        return found

    def _measure(self, action: Action, everything: bool) -> _Measured:
        values: dict[str, dict[str, float]] = {}
        notes: dict[str, str] = {}
        for bound in (self.bound, *(self.others if everything else ())):
            name, judged = bound.behavior.name, main_metric(bound.behavior)
            try:
                found = score(self.model, bound, action, dict.fromkeys((judged, "accuracy")))
            except (BehaviorError, SiteError) as error:
                notes |= {f"{name} {judged}": _first(error), f"{name} accuracy": _first(error)}
                continue
            ids = found["id"].to_list()
            mine = dict(zip(ids, found[judged].to_list(), strict=True))
            if bound is self.bound:
                for goal in self.goals:
                    signs = self.signs[goal]
                    values[self.judged(self.goals[goal])] = {id: signs[id] * value for id, value in mine.items()}
            values[f"{name} {judged}"] = mine
            values[f"{name} accuracy"] = dict(zip(ids, found["accuracy"].to_list(), strict=True))
        if everything:
            try:
                losses = text_loss(self.model, self.texts, action, tokens=self.text_tokens)
                values["text perplexity"] = {f"{i:04d}": loss for i, loss in enumerate(losses.tolist())}
            except (MethodError, ModelError) as error:  # too long with the prefix; words that the tokenizer lacks
                notes["text perplexity"] = _first(error)
        return _Measured(values=values, notes=notes)

    def rows(
        self, name: str, goal: Goal, before: _Measured, after: list[_Measured], *, baseline: bool, note: str = ""
    ) -> Iterator[dict[str, Any]]:
        """One row a measure, the one it is judged by first; several measurements (draws) are averaged pair by pair."""
        judged = self.judged(goal)
        for measure, why in before.notes.items():
            unmeasured = {"action": name, "measure": measure, "baseline": baseline, "n": 0}
            yield {**unmeasured, "note": f"not possible: {why}"}
        for measure, old in sorted(before.values.items(), key=lambda item: item[0] != judged):
            lacking = next((one.notes[measure] for one in after if measure in one.notes), None)
            row: dict[str, Any] = {"action": name, "measure": measure, "baseline": baseline}
            if lacking is not None:
                yield {**row, "n": 0, "note": f"not measured: {lacking}"}
                continue
            measured = [one.values[measure] for one in after if measure in one.values]
            was, now = _paired(old, measured)
            statistic = perplexity_change if measure == "text perplexity" else None
            if statistic is None:
                found = bootstrap(now - was, seed=self.seed)
                ends = float(was.mean()), float(now.mean())
            else:
                found = bootstrap(now, was, statistic=statistic, seed=self.seed)
                ends = float(np.exp(was.mean())), float(np.exp(now.mean()))
            yield {
                **row,
                "before": ends[0],
                "after": ends[1],
                "change": found.value,
                "lo": found.lo,
                "hi": found.hi,
                "n": len(was),
                "note": f"{note}, mean of {len(measured)} draw{'s'[: len(measured) > 1]}" if len(after) > 1 else note,
            }

    def gains(self, goal: Goal, before: _Measured, *after: _Measured) -> dict[str, float]:
        """For each pair, the change of the metric counted in the goal's direction (mean over several measurements);
        none where one of them has no value."""
        measure = f"{self.bound.behavior.name} {self.metric}"
        if not all(measure in one.values for one in after):
            return {}
        old, signs = before.values[measure], self.signs[str(goal)]
        ids = set(old).intersection(*(one.values[measure] for one in after))
        return {
            id: signs[id] * (float(np.mean([one.values[measure][id] for one in after])) - old[id]) for id in sorted(ids)
        }

    def versus(
        self, action: Action, mine: _Measured, name: str, control: list[_Measured], before: _Measured
    ) -> Iterator[dict[str, Any]]:
        """The row of an action beside a control; none where either could not be measured."""
        ours, theirs = self.gains(action.goal, before, mine), self.gains(action.goal, before, *control)
        ids = [id for id in ours if id in theirs]
        if not ids:
            return
        first, second = np.array([ours[id] for id in ids]), np.array([theirs[id] for id in ids])
        found = bootstrap(first - second, seed=self.seed)
        yield {
            "action": action.name,
            "control": name,
            "measure": self.judged(action.goal),
            "gain": float(first.mean()),
            "control_gain": float(second.mean()),
            "difference": found.value,
            "lo": found.lo,
            "hi": found.hi,
            "n": len(ids),
        }


def _random_versions(
    bench: _Bench, action: Action, controls: int, seed: int, seconds: dict[str, float]
) -> tuple[str, list[_Measured]]:
    """The name of an action's random version, and what each draw of it measured."""
    if action.control is None or controls < 1:
        return "", []
    made = [action.control(seed + draw) for draw in range(controls)]
    # The first draw is measured on everything; the others, which make the null, on the behavior itself.
    draws = [bench.measure(one, seconds, everything=at == 0) for at, one in enumerate(track(made, "random controls"))]
    return made[0].name, draws


def others_of(
    model: "Model", behavior: Behavior, others: Sequence[str | Behavior] | None, n: int, seed: int
) -> list["Bound"]:
    """The other behaviors, bound. Of the default ones those that this tokenizer cannot align are passed over."""
    found: list[Bound] = []
    for one in OTHERS if others is None else others:
        made = make(one, n=2 * n, seed=seed) if isinstance(one, str) else one
        if made.name == behavior.name and others is None:
            continue
        if made.name in (behavior.name, *(bound.behavior.name for bound in found)):
            raise MethodError("two behaviors have one name", got=repr(made.name), fix="Rename one")
        try:
            found.append(made.test.bind(model))
        except BehaviorError:
            if others is not None:
                raise
        if others is None and len(found) == 2:
            break
    return found


def _paired(old: dict[str, float], new: list[dict[str, float]]) -> tuple[Floats, Floats]:
    ids = sorted(set(old).intersection(*new))
    return np.array([old[id] for id in ids]), np.array([[one[id] for one in new] for id in ids]).mean(1)


def perplexity_change(now: Floats, was: Floats, axis: int = -1) -> Any:
    """From losses of texts in nats a token."""
    return np.exp(now.mean(axis)) - np.exp(was.mean(axis))


def _distinct(actions: list[Action]) -> list[Goal]:
    return list(dict.fromkeys(one.goal for one in actions if not one.prefix))


def _cost(model: "Model", action: Action) -> dict[str, Any]:
    return {
        "action": action.name,
        "weights_changed": action.edit.n_weights(model) if action.edit is not None else 0,
        "activations_a_token": action.values,
        "tokens_added": len(model.tokens(action.prefix)[0]) if action.prefix else 0,
        "prompts_to_find": action.passes,
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _first(error: Exception) -> str:
    return str(error).split(". ")[0][:120]

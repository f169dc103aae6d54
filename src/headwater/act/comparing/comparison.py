"""compare: actions and baselines on one task and one budget, over seeds."""

import dataclasses
import hashlib
import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl

from headwater.act.action import Action
from headwater.act.catalog import act, methods
from headwater.act.comparing import task as tasks_of
from headwater.act.comparing.baselines import ALWAYS, NOTHING, RANDOM, baseline
from headwater.act.comparing.measures import MEASURES, SCORED, Bench
from headwater.act.comparing.task import Maker, Task
from headwater.act.comparing.verdict import verdict
from headwater.act.locating import before_after, kept
from headwater.act.measuring import texts_of
from headwater.behavior.table import Behavior
from headwater.core.cells import Cells, code_of, code_of_function
from headwater.core.errors import HeadwaterError, MethodError
from headwater.core.files import to_json
from headwater.core.methods import options_of
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result

if TYPE_CHECKING:
    from headwater.core.model import Model

Made = Callable[["Model", Task, int], Action]
Method = "str | tuple[str, Mapping[str, Any]] | Made"
_TRAINS = {"steps", "batch", "lr"}  # methods with all of these take the budget
SUMMARY = {
    "action": pl.String, "kind": pl.String, "measure": pl.String, "value": pl.Float64, "lo": pl.Float64,
    "hi": pl.Float64, "n": pl.Int64, "note": pl.String,
}  # fmt: skip
CELLS = {
    "seed": pl.Int64, "action": pl.String, "kind": pl.String, "measure": pl.String, "value": pl.Float64,
    "note": pl.String,
}  # fmt: skip
VERSUS = {
    "action": pl.String, "baseline": pl.String, "measure": pl.String, "difference": pl.Float64, "lo": pl.Float64,
    "hi": pl.Float64, "n": pl.Int64,
}  # fmt: skip
CURVES = {
    "seed": pl.Int64, "action": pl.String, "step": pl.Int64, "part": pl.String, "attained": pl.Float64, "n": pl.Int64,
}  # fmt: skip
_SHARES = (*SCORED, "score", "others", "after relearning", "probe", "lens", "at random")
_COSTS = ("weights", "tokens", "prompts to find", "seconds", "perplexity")
_JUDGED = ("score", "after relearning", "perplexity", "probe")


@register_result
class ActComparison(Result):
    """Actions beside baselines, on one task and budget.

    `tables["summary"]`: action, kind ("action", "baseline", "control"), measure, value (mean over seeds), lo, hi (95%
    interval over seeds, Student's t, cut where a measure ends; null for one seed), n (seeds with a value), note (why
    there is none). `tables["cells"]`: the same of each seed. `tables["versus"]`: action, baseline, measure, difference
    (action minus baseline, paired by seed), lo, hi, n. `tables["curves"]`: seed, action, step, part, attained, n: the
    share of pairs as the goal wants under relearning. `facts["measures"]` says what each measure is;
    `facts["verdict"]`: sentences written from the tables.
    """

    kind: ClassVar[str] = "act_comparison"
    main: ClassVar[str | None] = "summary"

    @property
    def verdict(self) -> str:
        """What came of it, in a few sentences."""
        return " ".join(self.facts.get("verdict", []))

    def wide(self) -> pl.DataFrame:
        """One row an action, one column a measure: the means."""
        order = [name for name in MEASURES if name in set(self.tables["summary"]["measure"])]
        table = self.tables["summary"].pivot("measure", index=["action", "kind"], values="value")
        return table.select("action", "kind", *[name for name in order if name in table.columns])


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What every action gets, and what is measured.

    seeds: how many, or which; each makes its task anew and seeds its methods. steps, batch: updates of every method
    that trains, and prompts of each (the budget). shots: examples of few-shot prompts. relearn: updates of the attack
    after which it is asked (none: no attack); relearn_lr: its rate. latent: probes and lens. mechanism: the rank
    correlation of what patching each part restores, before and after. n_others: pairs of each other behavior.
    text_tokens: tokens of each text.
    """

    seeds: int | tuple[int, ...] = 3
    steps: int = 40
    batch: int = 8
    shots: tuple[int, ...] = (1, 4)
    relearn: tuple[int, ...] = (2, 5, 10)
    relearn_lr: float = 2e-5
    latent: bool = True
    mechanism: bool = False
    n_others: int = 16
    text_tokens: int = 48

    def __post_init__(self) -> None:
        if not self.each_seed or len(set(self.each_seed)) < len(self.each_seed):
            raise MethodError("a comparison needs seeds that differ", got=self.seeds, wanted="at least one")

    @property
    def each_seed(self) -> tuple[int, ...]:
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


def compare(
    model: "Model",
    task: "str | Task | Behavior | Maker",
    actions: "Sequence[Any] | Mapping[str, Any]" = (),
    *,
    options: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    others: "Sequence[str | Behavior] | None" = None,
    text: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    config: CompareConfig | None = None,
    **settings: Any,
) -> ActComparison:
    """Measure actions and baselines on one task, with one budget, over seeds.

    task: the name of a task (`fact_edit`, `fact_unlearn`, `position_bias`, `choice_letters`, `spurious_cue`), a `Task`,
    a Behavior, or a function `maker(model, seed=, **options) -> Task`. actions: names of methods, with options if there
    are any ("finetune:weights=lookup,lr=1e-3"); (name, options); or functions of (model, task, seed) that give an
    Action; under names of your own where they are a mapping. options: of the task. lora: options of LoRA, as baseline
    and control.
    others, text: other behaviors that should stay, and what perplexity is measured on, as for `effect`.
    out: a folder in which each cell is kept as it comes: killed, the same call goes on. A cell is known by the model,
    the task, the options and the code that fills it, so what was changed is run again; a function of yours is known by
    its own instructions, not by what it calls. Settings are those of `CompareConfig`.

    Always beside them: nothing, the best of a few instructions, the best few-shot prompt, LoRA, and LoRA toward random
    targets; all learn from the same training pairs. An action that cannot be made is a row that says why.

    The score is the harmonic mean of efficacy, paraphrase, format and neighbours (after Meng et al., 2022). Known
    failure: three seeds tell large differences only; the best of several actions is named by the scores that it is then
    compared on, which flatters it; and rates of learning are those of each method's own defaults or those given, so
    that what loses may be badly tuned.
    """
    started = time.perf_counter()
    used = _configured(config, settings)
    wanted = _named(actions)
    tasks_of.check_options(task, dict(options or {}))
    cells = Cells(None if out is None else Path(out))
    rows: list[dict[str, Any]] = []
    goal, facts = "", {}
    held = _Given(others=None if others is None else list(others), texts=texts_of(text))
    work = [(seed, name) for seed in used.each_seed for name in (*ALWAYS, *wanted)]
    bench: _Seed | None = None
    for seed, name in track(work, "actions and baselines", total=len(work)):
        own = [wanted.get(name), dict(lora or {})] if name in ALWAYS else [wanted[name]]
        key = _key(model, task, options, used, seed, name, own, held)
        if key not in cells:
            if bench is None or bench.seed != seed:
                bench = _Seed(model, task, dict(options or {}), used, dict(lora or {}), held, seed)
            cells.add(key, bench.cell(name, wanted.get(name)))
        row = cells[key]
        goal, facts = row["goal"], facts | {f"seed {seed}": row["facts"]}
        rows.append({**row, "seed": seed, "action": name, "kind": _kind(name)})
    tables = _tables(rows)
    told = task if isinstance(task, str) else getattr(task, "name", getattr(task, "__name__", "task"))
    summed = {
        "task": told,
        "goal": goal,
        "measures": MEASURES | {"at random": "efficacy of the same kind of action at random", "mechanism": _MECHANISM},
        "options": dict(options or {}),
        "lora": dict(lora or {}),
        "actions": {name: _told(what) for name, what in wanted.items()},
        "tasks": facts,
    }
    summed["verdict"] = verdict(tables["summary"], tables["versus"], told, len(used.each_seed))
    spent = time.perf_counter() - started
    provenance = Provenance.collect(model, seed=used.each_seed[0], seconds=spent)
    return ActComparison(tables=tables, facts=summed, config=asdict(used), provenance=provenance)


_MECHANISM = "rank correlation of what patching each part restores, before and after"


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What is measured besides the task."""

    others: list[Any] | None
    texts: list[str]


class _Seed:
    """One seed's task, and how its cells are filled."""

    def __init__(
        self,
        model: "Model",
        task: Any,
        options: dict[str, Any],
        used: CompareConfig,
        lora: dict[str, Any],
        held: _Given,
        seed: int,
    ) -> None:
        self.model, self.used, self.seed, self._lora = model, used, seed, lora
        self.task = tasks_of.make(model, task, seed, options)
        self.bench = Bench(model, self.task, held.others, held.texts, used.n_others, used.text_tokens, seed)

    def cell(self, name: str, what: Any) -> dict[str, Any]:
        """values and notes of one action, the curve of its relearning, and what the task was."""
        told = {"goal": str(self.task.goal), "facts": self.task.facts}
        try:
            started = time.perf_counter()
            action = self.make(name, what)
            seconds = action.seconds or time.perf_counter() - started
            action = dataclasses.replace(action, goal=self.task.goal, seconds=seconds)
            found = self.bench.measure(
                action,
                steps=self.used.relearn,
                attack={"lr": self.used.relearn_lr, "batch": self.used.batch},
                latent=self.used.latent,
            )
            if action.control is not None:
                found["at random"] = self.bench.efficacy(action.control(self.seed))
            if self.used.mechanism and not action.prefix:
                found["mechanism"] = kept(before_after(self.model, action, self.task.behavior))
        except HeadwaterError as error:
            return {**told, "values": {}, "notes": {"score": f"not possible: {error}"[:300]}, "curve": [], "made": ""}
        curve = found.pop("curve", [])
        values = {key: value for key, value in found.items() if not isinstance(value, str)}
        notes = {key: value for key, value in found.items() if isinstance(value, str)}
        return {**told, "values": values, "notes": notes, "curve": curve, "made": action.name}

    def make(self, name: str, what: Any) -> Action:
        budget = {"steps": self.used.steps, "batch": self.used.batch}
        if name in ALWAYS:
            return baseline(self.model, self.task, name, budget | self._lora, self.seed, self.used.shots)
        if callable(what):
            made: Any = what(self.model, self.task, self.seed)
            return made
        method, given = read(what) if isinstance(what, str) else (what[0], dict(what[1]))
        function = methods.get(method)
        known = set(options_of(function))
        own: dict[str, Any] = {"seed": self.seed} if "seed" in known else {}
        if known >= _TRAINS:
            own |= budget
        if "goal" in known:
            own["goal"] = str(self.task.goal)
        if "target" in known and self.task.goal.direction == "lower":
            own["target"] = "foils"
        if self.task.keep is not None and "keep" in inspect.signature(function).parameters:
            own["keep"] = self.task.keep
        return act(method, self.model, self.task.behavior, **{**own, **given})


def read(text: str) -> tuple[str, dict[str, Any]]:
    """A method and its options from "name:option=value,option=value". Raises MethodError."""
    import yaml

    name, _, rest = text.partition(":")
    given: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+=)", rest) if rest.strip() else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise MethodError("cannot read an action", got=repr(text), wanted="name, or name:option=value,option=value")
        try:
            given[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            given[key.strip()] = value
    return name.strip(), given


def _named(actions: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pairs = actions.items() if isinstance(actions, Mapping) else ((None, one) for one in actions)
    for name, what in pairs:
        if isinstance(what, str):
            methods.get(read(what)[0])  # an unknown name is told before anything runs
        label = name or (what if isinstance(what, str) else what[0] if isinstance(what, tuple) else what.__name__)
        if label in (*ALWAYS, *found):
            raise MethodError("two rows of a comparison have one name", got=repr(label), fix="Give names: {name: ...}")
        found[label] = what
    return found


def _configured(config: CompareConfig | None, settings: dict[str, Any]) -> CompareConfig:
    from headwater.core.methods import configured

    return configured(CompareConfig, config, settings)


def _kind(name: str) -> str:
    return "control" if name in (NOTHING, RANDOM) else "baseline" if name in ALWAYS else "action"


def _key(
    model: "Model", task: Any, options: Any, used: CompareConfig, seed: int, name: str, own: list[Any], held: _Given
) -> str:
    """Everything that a cell depends on, so that none is taken for another."""
    settings = {name: value for name, value in asdict(used).items() if name != "seeds"}
    made = [_known(one) for one in own]
    for one in own:
        if isinstance(one, str | tuple) and one:
            made.append(_outside(methods.get(read(one)[0] if isinstance(one, str) else one[0])))
    about = [
        code_of(*_CODE), model.fingerprint, _known(task), dict(options or {}), settings, made, _known(held.others),
        held.texts,
    ]  # fmt: skip
    if isinstance(task, str):
        about.append(_outside(tasks_of.tasks.get(task)))
    return f"{seed}/{name}/{hashlib.sha256(to_json(about, indent=None).encode()).hexdigest()[:16]}"


# What runs in a cell, besides torch and transformers.
_CODE = ("headwater.core", "headwater.behavior", "headwater.act")


def _known(what: Any) -> Any:
    """What tells a thing from others of its sort, as plain data: of pairs their content, of a function its code."""
    if isinstance(what, Behavior):
        return [what.name, what.metric, what.hash]
    if isinstance(what, Task):
        return {field.name: _known(getattr(what, field.name)) for field in dataclasses.fields(what)}
    if callable(what):
        return [getattr(what, "__qualname__", type(what).__qualname__), code_of_function(what)]
    return [_known(one) for one in what] if isinstance(what, list | tuple) else what


def _outside(function: Any) -> str:
    """The code of a method or task that another package registered; that of this one is known as a whole."""
    if str(getattr(function, "__module__", "")).startswith("headwater."):
        return ""
    try:
        file = inspect.getsource(inspect.getmodule(function) or function)
    except (OSError, TypeError):  # written at a prompt
        file = ""
    return hashlib.sha256(file.encode()).hexdigest()[:16] + code_of_function(function)


def _told(what: Any) -> str:
    """An action as a user would write it."""
    if isinstance(what, tuple):
        given = ",".join(f"{name}={value}" for name, value in dict(what[1]).items())
        return f"{what[0]}:{given}" if given else str(what[0])
    return what if isinstance(what, str) else f"a function, {getattr(what, '__name__', type(what).__name__)}"


def _tables(rows: list[dict[str, Any]]) -> dict[str, pl.DataFrame]:
    names = [*MEASURES, "at random", "mechanism"]
    cells: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for row in rows:
        same = {"seed": row["seed"], "action": row["action"], "kind": row["kind"]}
        for measure in names:
            if measure in row["values"] or measure in row["notes"]:
                value = row["values"].get(measure)
                cells.append({**same, "measure": measure, "value": value, "note": row["notes"].get(measure, "")})
        curves += [
            {"seed": row["seed"], "action": row["action"], **{k: one[k] for k in ("step", "part", "attained", "n")}}
            for one in row["curve"]
        ]
    table = pl.DataFrame(cells, schema=CELLS, orient="row")
    summary: list[dict[str, Any]] = []
    for (action, kind, measure), part in table.group_by(["action", "kind", "measure"], maintain_order=True):
        value, lo, hi, n = over_seeds(part["value"].drop_nulls().to_list(), share=measure in _SHARES)
        if lo is not None and measure in _COSTS:
            lo = max(0.0, lo)
        note = next((one for one in part["note"].to_list() if one), "")
        summary.append(
            {"action": action, "kind": kind, "measure": measure, "value": value, "lo": lo, "hi": hi, "n": n,
             "note": note}
        )  # fmt: skip
    return {
        "summary": pl.DataFrame(summary, schema=SUMMARY, orient="row"),
        "cells": table,
        "versus": pl.DataFrame(list(_versus(table)), schema=VERSUS, orient="row"),
        "curves": pl.DataFrame(curves, schema=CURVES, orient="row"),
    }


def _versus(cells: pl.DataFrame) -> Any:
    held = {
        (row["action"], row["measure"], row["seed"]): row["value"]
        for row in cells.iter_rows(named=True)
        if row["value"] is not None
    }
    seeds = cells["seed"].unique(maintain_order=True).to_list()
    names = cells.unique(["action", "kind"], maintain_order=True)
    for action in names.filter(pl.col("kind") == "action")["action"].to_list():
        for other in names["action"].to_list():
            for measure in _JUDGED if other != action else ():
                pairs = [(held.get((action, measure, s)), held.get((other, measure, s))) for s in seeds]
                gaps = [a - b for a, b in pairs if a is not None and b is not None]
                if gaps:
                    value, lo, hi, n = over_seeds(gaps, share=False)
                    yield {"action": action, "baseline": other, "measure": measure, "difference": value, "lo": lo,
                           "hi": hi, "n": n}  # fmt: skip


def over_seeds(values: Sequence[float], *, share: bool) -> tuple[float | None, float | None, float | None, int]:
    """(mean, lo, hi, n): Student's t interval at 95%, cut at 0 and 1 for shares; no interval for one seed."""
    some = np.array([one for one in values if np.isfinite(one)], dtype=np.float64)
    if not len(some):
        return None, None, None, 0
    mean = float(some.mean())
    if len(some) == 1:
        return mean, None, None, 1
    from scipy.stats import t

    half = float(t.ppf(0.975, len(some) - 1) * some.std(ddof=1) / np.sqrt(len(some)))
    lo, hi = mean - half, mean + half
    return mean, max(0.0, lo) if share else lo, min(1.0, hi) if share else hi, len(some)

"""Data curation: do(data) as an action, measured like the others by training again."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from headwater.act.effects import ROWS, VERSUS, Effect, perplexity_change
from headwater.act.measuring import NOTHING, lacks_words, main_metric, score, text_loss, texts_of
from headwater.behavior.table import Behavior
from headwater.claims.statistics import bootstrap
from headwater.core.errors import MethodError
from headwater.core.progress import track
from headwater.core.results import Provenance

CURATED, RANDOM = "trained on the changed data", "as many sequences changed at random"
_KINDS = ("remove", "repeat", "reweight")


def curate(
    run: Any,
    behavior: Behavior,
    out: str | Path,
    *,
    others: Sequence[Behavior] = (),
    text: str | Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    text_tokens: int = 48,
    **change: Any,
) -> Effect:
    """Train a run of the lab again with a change of its data, and measure it beside the same run without the change.

    change: exactly one of `remove=`, `repeat=(which, times)` and `reweight=(which, weight)`, as
    `headwater.dynamics.redo` takes them, and its `steps=`, if fewer are enough. Each seed is trained three times: as it
    was, with the change, and with as many sequences changed at random, which is the control. Runs lie in `out`
    (`<what>-seed-<n>`); killed, the same call goes on. others, text: what should stay, as for `effect`.

    Gives an Effect: rows of the behavior's metric and accuracy on its test pairs, of the others', and of perplexity;
    values of a pair are means over seeds, and intervals are over pairs. Known failure: another course of training is a
    change in itself, which the control shows; facts may be told by sequences that do not name them.
    """
    given = [name for name in _KINDS if name in change]
    if len(given) != 1:
        raise MethodError("a curation changes the data in one way", got=given, wanted=" or ".join(_KINDS))
    if not seeds or len(set(seeds)) < len(seeds):
        raise MethodError("a curation needs seeds that differ", got=seeds, wanted="at least one")
    (kind,) = given
    # By name: rooms of stages do not import each other, and training is the lab's.
    opened = importlib.import_module("headwater.dynamics.lab.run").TrainingRun
    redo = importlib.import_module("headwater.dynamics.lab.redo").redo
    base = run if isinstance(run, opened) else opened.open(run)
    steps = {name: change[name] for name in set(change) - {kind}}
    folder = Path(out)
    found: dict[str, list[dict[str, dict[str, float]]]] = {NOTHING.name: [], CURATED: [], RANDOM: []}
    texts = texts_of(text)
    changed = 0
    model: Any = None
    for seed in track(list(seeds), "seeds"):
        own = {} if seed == base.config.seed else {"seed": seed}
        runs = {NOTHING.name: redo(base, folder / f"as-it-was-seed-{seed}", **steps, **own)}
        runs[CURATED] = redo(base, folder / f"changed-seed-{seed}", **{kind: change[kind]}, **steps, **own)
        about = runs[CURATED].data.change.about
        changed = int(about.get("removed", about.get("repeated", about.get("weighted", 0))))
        numbers = np.random.default_rng([seed, 7]).choice(base.order.n_sequences, size=changed, replace=False)
        what: Any = np.sort(numbers) if kind == "remove" else (np.sort(numbers), change[kind][1])
        runs[RANDOM] = redo(base, folder / f"random-seed-{seed}", **{kind: what}, **steps, **own)
        for name, trained in runs.items():
            model = trained.load(trained.steps[-1])
            found[name].append(_values(model, [behavior, *others], texts, text_tokens))
    rows, versus = _tables(behavior, found)
    facts = {
        "behavior": behavior.name,
        "goals": {CURATED: "raise"},
        "measures": {CURATED: f"{behavior.name} {main_metric(behavior)}"},
        "costs": [{"action": CURATED, "sequences_changed": changed, "trainings": len(seeds)}],
        "actions": [{"name": CURATED, "action": "curate", "change": kind, "sequences": changed, "seeds": list(seeds)}],
        "dropped": {},
    }
    return Effect(
        tables={
            "rows": pl.DataFrame(rows, schema=ROWS, orient="row"),
            "versus": pl.DataFrame(versus, schema=VERSUS, orient="row"),
        },
        facts=facts,
        config={"kind": kind, "seeds": list(seeds), "text_tokens": text_tokens},
        provenance=Provenance.collect(model, behavior, seed=int(seeds[0])),
    )


def _values(model: Any, behaviors: list[Behavior], texts: list[str], tokens: int) -> dict[str, dict[str, float]]:
    """measure -> pair (or text) -> value."""
    values: dict[str, dict[str, float]] = {}
    for one in behaviors:
        metric = main_metric(one)
        table = score(model, one.test.bind(model), NOTHING, dict.fromkeys((metric, "accuracy")))
        for name in (metric, "accuracy"):
            values[f"{one.name} {name}"] = dict(zip(table["id"].to_list(), table[name].to_list(), strict=True))
    known = [text for text in texts if not lacks_words(model, text)]
    if known:
        losses = text_loss(model, known, NOTHING, tokens=tokens)
        values["text perplexity"] = {str(at): float(loss) for at, loss in enumerate(losses)}
    return values


def _tables(
    behavior: Behavior, found: Mapping[str, list[dict[str, dict[str, float]]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def mean(name: str, measure: str) -> np.ndarray:
        parts = [one[measure] for one in found[name]]
        return np.array([[part[id] for id in ids] for part in parts]).mean(0)

    rows: list[dict[str, Any]] = []
    gains: dict[str, np.ndarray] = {}
    measures = list(found[CURATED][0])
    for measure in measures:
        every = [one[measure] for parts in found.values() for one in parts if measure in one]
        ids = sorted(set(every[0]).intersection(*every))
        was = mean(NOTHING.name, measure)
        for name in (CURATED, RANDOM):
            now = mean(name, measure)
            perplexity = measure == "text perplexity"
            change = bootstrap(now, was, statistic=perplexity_change) if perplexity else bootstrap(now - was)
            ends = (float(np.exp(x.mean())) if perplexity else float(x.mean()) for x in (was, now))
            before, after = ends
            rows.append(
                {"action": name, "measure": measure, "before": before, "after": after, "change": change.value,
                 "lo": change.lo, "hi": change.hi, "n": len(ids), "baseline": name == RANDOM, "note": ""}
            )  # fmt: skip
            if measure == measures[0]:
                gains[name] = now - was
    gap = bootstrap(gains[CURATED] - gains[RANDOM])
    versus = {
        "action": CURATED, "control": RANDOM, "measure": measures[0], "gain": float(gains[CURATED].mean()),
        "control_gain": float(gains[RANDOM].mean()), "difference": gap.value, "lo": gap.lo, "hi": gap.hi,
        "n": len(gains[CURATED]),
    }  # fmt: skip
    return rows, [versus]

"""The data stage: how often each fact of the behavior had been read by each checkpoint, and what that tells of it.

A fact is a pair of values of two of the behavior's variables (a country and its capital).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from headwater.core.errors import HeadwaterError, MethodError
from headwater.core.results import Result
from headwater.data.knowing import fact_link

if TYPE_CHECKING:
    from headwater.data.corpus import Corpus
    from headwater.data.counts import Counts
    from headwater.data.link_strengths import Strengths
    from headwater.dynamics.lab.run import TrainingRun
    from headwater.trace.stages import Made, Work

KNOWN_VARIABLES = {"capitals": ("country", "capital")}
"""Behaviors whose two variables are a fact's subject and object."""


def data(work: "Work") -> "Made":
    """Counts of the behavior's facts by checkpoint, and the frequency link; facts say why where there is none."""
    from headwater.trace.stages import Made

    named = variables(work)
    if named is None:
        return Made({}, {"skipped": "the behavior has no two variables whose values could stand together in a text"})
    facts = facts_of(work, named)
    counts = counted(work, work.history.corpus, facts, work.folder("data") / "parts" / "counts")
    results: dict[str, Result] = {"counts": counts}
    told: dict[str, Any] = {"variables": list(named), "n_facts": facts.height}
    formation: Any = work.result("timeline", "formation")
    table = fact_table(facts, counts, formation)
    try:
        results["facts"] = fact_link(table, draws=work.settings.data.draws, seed=work.seed("data"))
    except MethodError as error:
        told["no_link"] = error.what + (f" ({error.got})" if error.got else "")
    parts = work.folder("data") / "parts"
    results |= relations_linked(work, work.history.run, parts, told)
    return Made(results, told)


def relations_linked(work: "Work", run: "TrainingRun | None", parts: Path, told: dict[str, Any]) -> dict[str, Result]:
    """Of a world: the linear mechanism of each relation at some checkpoints, the counts of its facts, and the link."""
    settings = work.settings.data
    if run is None or not settings.relations or not any(one.source == "world" for one in run.config.data):
        return {}
    from headwater.data.link import frequency_link

    try:
        strengths, counts = relations_measured(work, run, parts)
        link = frequency_link(strengths, counts, seed=work.seed("link"))
    except HeadwaterError as error:  # a world of few relations, or of small ones
        told["no_relations"] = error.what + (f" ({error.got})" if error.got else "")
        return {}
    return {"strengths": strengths, "relation_counts": counts, "link": link}


def relations_measured(work: "Work", run: "TrainingRun", parts: Path) -> "tuple[Strengths, Counts]":
    """The linear mechanisms of a run's relations, and the counts of their facts: the first world's, in any run."""
    from headwater.data.link import counts_for
    from headwater.data.link_strengths import relation_strengths
    from headwater.data.world import relations_of, world_of

    first = work.history.run
    relations = relations_of(world_of(run if first is None else first).facts)
    n, steps = work.settings.data.n_facts, relation_steps(work)
    strengths = relation_strengths(str(run.path), relations, out=parts / "strengths", steps=steps, n_test=n)
    return strengths, counts_for(strengths, str(run.path), relations, out=parts / "relation-counts")


def relation_steps(work: "Work") -> list[int]:
    """The checkpoints at which relations are measured: evenly among those of the timeline, whose steps were chosen by
    whoever trained the model."""
    steps, n = work.history.series.steps, work.settings.data.checkpoints
    if n >= len(steps):
        return steps
    return [steps[round(i * (len(steps) - 1) / (n - 1))] for i in range(n)]


def variables(work: "Work") -> tuple[str, str] | None:
    """Names of the two variables: as set, as known of this behavior, or `subject` and `object`."""
    settings, frame = work.settings.data, work.behavior.frame
    has = (
        set(json.loads(frame["variables"][0] or "{}")) if "variables" in frame.columns and frame.height else set[str]()
    )
    asked = settings.variables
    if asked is not None and not set(asked) <= has:
        raise MethodError(
            f"{work.behavior.name} has no such variables", got=", ".join(asked), wanted=", ".join(sorted(has)) or "any",
            fix="Set data.variables",
        )  # fmt: skip
    for one in (asked, KNOWN_VARIABLES.get(work.behavior.name), ("subject", "object")):
        if one is not None and set(one) <= has:
            return one[0], one[1]
    return None


def facts_of(work: "Work", named: tuple[str, str]) -> pl.DataFrame:
    """id (of a pair), fact, subject, object, split: of every pair of the behavior."""
    frame = work.behavior.frame
    values = [json.loads(text) for text in frame["variables"].to_list()]
    subject, thing = ([str(one.get(name, "")).strip() for one in values] for name in named)
    return pl.DataFrame({
        "id": frame["id"], "split": frame["split"], "subject": subject, "object": thing,
        "fact": [f"{s} · {o}" for s, o in zip(subject, thing, strict=True)],
    }).filter((pl.col("subject") != "") & (pl.col("object") != ""))  # fmt: skip


def counted(work: "Work", corpus: "Corpus", facts: pl.DataFrame, out: Path) -> "Counts":
    """How often subject and object of each fact stood together, cut at the steps of the checkpoints."""
    from headwater.data.counts import count

    settings = work.settings.data
    steps = sorted({0, *work.history.series.steps})
    last = corpus.steps
    ranges = tuple(step for step in steps if step <= last)
    pairs = list(dict.fromkeys(zip(facts["subject"].to_list(), facts["object"].to_list(), strict=True)))
    own: dict[str, Any] = {}
    if corpus.form == "tokens":
        # lines are documents where a line's end is a token of its own: to stand in two lines is not to stand together
        own = {"tokenizer": work.model.tokenizer, "separator": work.model.tokenizer.get_vocab().get("\n")}
    return count(
        corpus,
        pairs,
        **own,
        ranges=ranges if len(ranges) > 1 else (),
        scope=settings.scope,
        window=settings.window,
        out=out,
    )


def fact_table(facts: pl.DataFrame, counts: "Counts", formation: Result) -> pl.DataFrame:
    """What `fact_link` takes: each fact at each checkpoint, with its counts by then and the share of its prompts that
    were answered right. formation: a result with `pairs` (step, id, split, known)."""
    answered = formation.tables["pairs"].join(facts.drop("split"), on="id", how="inner")
    known = answered.group_by("step", "fact", "subject", "object", maintain_order=True).agg(
        pl.col("known").cast(pl.Float64).mean(), pl.col("split").first()
    )
    cut = {*counts.tables["pairs"]["first"].to_list(), *counts.tables["pairs"]["last"].to_list()}
    steps = [step for step in sorted(known["step"].unique().to_list()) if step in cut]
    parts: list[pl.DataFrame] = []
    for step in steps:
        pairs = counts.by(step).select("subject", "object", pl.col("n").alias("pair"))
        terms = counts.by(step, "terms").select("term", "n")
        here = known.filter(pl.col("step") == step).join(pairs, on=["subject", "object"], how="inner")
        for side in ("subject", "object"):
            here = here.join(terms.rename({"term": side, "n": f"{side}_n"}), on=side, how="left")
        parts.append(here)
    if not parts:
        raise MethodError("nothing was counted at a checkpoint's step", got=f"steps {sorted(cut)[:6]}")
    return pl.concat(parts).select(
        "step", "fact", "split", "pair", pl.col("subject_n").alias("subject"), pl.col("object_n").alias("object"),
        "known",
    ).sort("step", "fact")  # fmt: skip

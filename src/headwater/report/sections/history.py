"""When it formed, and what data formed it: the model's history beside its mechanism."""

from typing import Any

import polars as pl

from headwater.report.blocks import Cell, Heading, Lines, Note, Section, Table, cell
from headwater.report.charts import history as charts
from headwater.report.charts.claims import STATUS
from headwater.report.charts.parts import Row, rows
from headwater.report.gather import Found
from headwater.report.sections.base import Context, missing
from headwater.report.sections.verdict import WORDS, sentence
from headwater.report.words import count, estimate, finite, listing, number, p_value, percent, visible

_WHAT = {"behavior": "the behavior", "circuit": "its circuit"}
_PREDICTORS = {
    "pair": "how often subject and object stood together",
    "subject": "how often the subject was read",
    "object": "how often the object was read",
    "step": "the step alone",
}
_COUNTED = {"pair": "subject and object together", "subject": "the subject alone", "object": "the object alone"}
_NO_HISTORY = (
    "This model came without its training history, so when the mechanism formed, and which data formed it, is not "
    "known here. Give its checkpoints with --history and what it read with --corpus, or trace a folder of `headwater "
    "train`."
)


def when(context: Context) -> Section:
    """The steps at which behavior, circuit and heads came up."""
    title, run = "When it formed", context.run
    formation, found = run.first("formation"), _in_stage(context, "timeline", "timeline")
    if formation is None and found is None:
        if "timeline" not in run.facts and "claims" in run.facts:
            return Section(id="when", title=title, blocks=[Note(text=_NO_HISTORY)])
        what = "It measures every checkpoint of the training and finds the steps at which things changed."
        return missing(context, id="when", title=title, what=what, stage="timeline")
    section = Section(id="when", title=title, lead=_when_lead(formation))
    if formation is not None:
        caption = (
            "On test pairs, as shares of what the behavior comes to in the end: the metric on the prompts minus that "
            "on their counterfactuals, of the whole model and with only the final circuit's edges carrying the prompt. "
            "Shaded: between which checkpoints most of each formed, found on train pairs; the thin bands are 95% "
            "intervals over pairs."
        )
        section.blocks.append(
            context.figure(
                formation,
                formation.result.chart,
                title="Behavior and circuit over training",
                caption=caption,
                tables=["curves", "windows"],
            )
        )
    section.blocks += _tested(context, "timeline")
    if found is not None:
        section.blocks.append(Heading(text="Everything that was measured"))
        caption = (
            "A panel a measure, its most moving numbers; dashed uprights are the greatest changes of level (the "
            "interval of each on hovering)."
        )
        section.blocks.append(
            context.figure(
                found,
                found.result.chart,
                title="The checkpoints, measure by measure",
                caption=caption,
                tables=["values", "transitions", "checkpoints"],
            )
        )
        if (table := _transitions(found)) is not None:
            section.blocks.append(table)
    return section


def _when_lead(formation: Found | None) -> list[str]:
    if formation is None:
        return []
    result = formation.result
    steps = [row["step"] for row in rows(result.tables.get("curves"), "step") if row["step"] is not None]
    last = max(steps, default=None)
    parts = [
        f"that of {_WHAT[row['what']]} between step {number(row['first'])} and step {number(row['last'])}"
        for row in rows(result.tables.get("windows"), "what", "first", "last")
        if row["what"] in _WHAT
    ]
    if not parts:
        return ["Neither the behavior nor its circuit rose over these checkpoints."]
    held = finite(result.facts.get("share"))
    most = f"at least {percent(held)}" if held is not None else "most"
    lead = [
        f"Over {number(last)} steps the behavior came up, and {most} of its rise lies in one stretch: {listing(parts)}."
    ]
    halves = {
        row["what"]: finite(row["half"])
        for row in rows(result.tables.get("windows"), "what", "half")
        if row["what"] in _WHAT and finite(row["half"]) is not None
    }
    if len(halves) == 2:
        said = listing(f"{_WHAT[what]} at step {number(half)}" for what, half in halves.items())
        lead.append(f"Half of the way was gone by {said} (between checkpoints, read in straight lines).")
    return lead


def _transitions(found: Found) -> Table | None:
    """The clearest changes, one a measure."""
    table = [
        row
        for row in rows(found.result.tables.get("transitions"), "measure", "name", "step", "lo", "hi", "share", "p")
        if row["step"] is not None and finite(row["share"]) is not None
    ]
    best: dict[str, Row] = {}
    for row in sorted(table, key=lambda row: -row["share"]):
        best.setdefault(str(row["measure"]), row)
    if not best:
        return None
    body = [
        [
            cell(str(row["measure"]).replace("_", " ")),
            Cell(text=visible(row["name"] or "–", 60)),
            Cell(text=number(round(row["step"])), numeric=True),
            Cell(text=f"{number(row['lo'])} to {number(row['hi'])}" if row["lo"] is not None else "–", numeric=True),
            Cell(text=percent(row["share"]), numeric=True),
            Cell(text=p_value(row["p"]), numeric=True),
        ]
        for row in best.values()
    ]
    return Table(
        columns=("measure", "its number", "changes at", "95% interval", "explained by two levels", "p"), rows=body,
        caption="Of each measure the number that changes most clearly. A slow rise has such a step too: its middle.",
    )  # fmt: skip


def reading(context: Context) -> Section | None:
    """What had been read of each fact, what is known of it, and what follows when the data change."""
    title = "What data formed it"
    found = _in_stage(context, "data", "fact_link")
    change = _in_stage(context, "do_data", "fact_change")
    link, worlds = (
        _in_stage(context, "data", "frequency_link"),
        _in_stage(context, "do_data", "counterfactual_pretraining"),
    )
    if found is None and change is None and link is None and worlds is None:
        return _nothing_read(context, title)
    section = Section(id="data", title=title)
    if found is not None:
        section.lead = _reading_lead(found)
        caption = (
            "Each dot is a sixth of the facts at one checkpoint: how often subject and object had been read together "
            "by then, and the share of these facts whose object the model holds for the likeliest next token of all. "
            "The curve is the logistic one through all of them, its dashed upright the count at which half are known, "
            "shaded the 95% interval (facts resampled)."
        )
        section.blocks.append(
            context.figure(
                found,
                found.result.chart,
                title="Known facts by how often they were read",
                caption=caption,
                tables=["facts"],
                others=[*(item for item in [_in_stage(context, "data", "counts")] if item)],
            )
        )
        section.blocks += _baselines(found)
    if link is not None:
        section.blocks += _linked(context, link)
    section.blocks += _tested(context, "data")
    section.blocks += _done(context, change, worlds)
    return section


def _linked(context: Context, link: Found) -> list[Any]:
    """Over the relations of a world: how causal the linear mechanism of each is, against its counts."""
    result = link.result
    table = [
        row
        for row in rows(
            result.tables.get("correlations"),
            "strength",
            "counts",
            "subjects",
            "steps",
            "facts",
            "r",
            "lo",
            "hi",
            "less",
            "less_lo",
            "less_hi",
            "relations",
        )
        if (row["strength"], row["subjects"], row["facts"]) == ("causality", "all", "all")
    ]
    needed = [
        f"{estimate(row['n'], row['lo'], row['hi'])} for {percent(row['level'])}"
        for row in rows(result.tables.get("thresholds"), "strength", "level", "n", "lo", "hi", "within")
        if row["strength"] == "causality" and row["within"] is not False and finite(row["n"]) is not None
    ]
    lead = (
        "For each relation of this world a linear map is fitted from the subject to what the model says, and inverted: "
        "causality is the share of facts that the edit by it turns into another subject's."
    )
    caption = (
        "Left: each relation at each checkpoint, against how often its facts were read. Right: the same over steps."
    )
    if needed:
        caption += f" Co-occurrences that it needs: {listing(needed)} of the facts."
    flagged = [str(one) for one in result.facts.get("flagged") or []]
    if flagged:
        caption += (
            f" Facts of one relation that lines of another count for too (confounds): {visible(listing(flagged), 400)}."
        )
    blocks: list[Any] = [Heading(text="Relations, by how often they were read", lead=lead)]
    blocks.append(
        context.figure(
            link,
            result.chart,
            title="How causal the linear mechanism of a relation is",
            caption=caption,
            tables=["points", "correlations", "thresholds", "predictions", "overlaps"],
        )
    )
    body = [
        [
            cell(_COUNTED.get(str(row["counts"]), str(row["counts"]))),
            cell("all checkpoints" if row["steps"] == "all" else "the last one"),
            Cell(text=estimate(row["r"], row["lo"], row["hi"]), numeric=True),
            Cell(
                text="" if row["counts"] == "pair" else estimate(row["less"], row["less_lo"], row["less_hi"]),
                numeric=True,
            ),
        ]
        for row in table
    ]
    if body:
        caption = "Correlation of causality with the log count; intervals over relations."
        columns = ("counted", "over", "r", "less than of pairs by")
        blocks.append(Table(columns=columns, rows=body, caption=caption))
    return blocks


def _nothing_read(context: Context, title: str) -> Section | None:
    facts = context.run.facts
    if "data" in facts:
        why = facts["data"].get("skipped") or facts["data"].get("no_link") or "the stage left nothing to show"
        return Section(id="data", title=title, blocks=[Note(text=f"No frequency link: {visible(why, 300)}.")])
    if "timeline" in facts and "claims" in facts:
        text = "What this model read is not known here. Give it with --corpus: files in the order of training."
        return Section(id="data", title=title, blocks=[Note(text=text)])
    if "claims" in facts:
        return None  # the section before this one says that the model has no history here
    what = "It counts what had been read of each fact by each checkpoint, and holds it against what is known."
    return missing(context, id="data", title=title, what=what, stage="data")


def _reading_lead(found: Found) -> list[str]:
    facts = found.result.facts
    table = found.result.tables.get("facts")
    lead: list[str] = []
    if table is not None and table.height and {"step", "pair", "known"} <= set(table.columns):
        last = table.filter(pl.col("step") == table["step"].max())
        counts = sorted(float(one) for one in last["pair"].drop_nulls().to_list())
        known = last["known"].cast(pl.Float64).drop_nulls().drop_nans().mean()
        if counts:
            lead.append(
                f"By the end a fact's subject and object had been read together "
                f"{number(round(counts[len(counts) // 2]))} times in the middle of {count(len(counts), 'fact')} "
                f"({number(round(counts[0]))} to {number(round(counts[-1]))}), and {percent(known)} of the facts are "
                "known."
            )
    threshold = finite(facts.get("threshold"))
    if threshold is not None:
        lead.insert(
            0,
            f"Half of the facts are known from about {estimate(threshold, facts.get('lo'), facts.get('hi'))} "
            "co-occurrences on.",
        )
    return lead


def _baselines(found: Found) -> list[Any]:
    table = rows(found.result.tables.get("predictors"), "predictor", "auc", "lo", "hi", "log_loss", "n")
    body = [
        [
            cell(_PREDICTORS.get(str(row["predictor"]), str(row["predictor"]))),
            Cell(text=estimate(row["auc"], row["lo"], row["hi"]), numeric=True),
            Cell(text=number(row["log_loss"]), numeric=True),
            Cell(text=number(row["n"]), numeric=True),
        ]
        for row in table
    ]
    if not body:
        return []
    caption = (
        "Predicting which facts are known, on facts that nothing was fitted on: area under the ROC curve between facts "
        "of the same step (0.5 is chance), and the loss of the predicted share. Which fact is frequent goes along with "
        "how often its subject is spoken of at all: the rows below the first are these confounds, alone."
    )
    return [Table(columns=("predicted from", "area", "loss (nats)", "facts"), rows=body, caption=caption)]


def _done(context: Context, change: Found | None, worlds: Found | None) -> list[Any]:
    """do(data): the second training."""
    told = context.run.facts.get("do_data")
    if told is None:
        return (
            [
                Note(
                    text="The data were not changed to see whether the mechanism follows (the stage “do_data” did not "
                    "run), so what is said above of frequency stays open: it may come along with something else."
                )
            ]
            if "data" in context.run.facts
            else []
        )
    blocks: list[Any] = [Heading(text="do(data): the same training on other data", lead=_what_was_done(told))]
    if change is None:
        why = visible(told.get("skipped") or "it left nothing to show", 300)
        return [*blocks, Note(text=f"Not measured: {why}.")]
    facts = change.result.facts
    r = estimate(facts.get("r"), facts.get("lo"), facts.get("hi"))
    caption = (
        f"Each dot is a fact: how many times as often it was read in the second training (mean over the checkpoints), "
        f"and at how many more of the checkpoints it is known. r {r}, p {p_value(facts.get('p'))} against changes "
        f"dealt out anew; {number(facts.get('moved'))} of {number(facts.get('n'))} facts were read more or less often."
    )
    blocks.append(
        context.figure(
            change, change.result.chart, title="What is known follows what is read", caption=caption, tables=["facts"]
        )
    )
    if worlds is not None:
        facts = worlds.result.facts
        r = estimate(facts.get("r"), facts.get("lo"), facts.get("hi"))
        caption = (
            "Each dot is a relation at the last checkpoint: how its facts' log count changed, and how causal its "
            f"linear mechanism became. r {r}, p {p_value(facts.get('p'))} against changes dealt out anew among the "
            "relations."
        )
        blocks.append(
            context.figure(
                worlds,
                worlds.result.chart,
                title="Mechanisms follow what is read",
                caption=caption,
                tables=["changes", "correlations", "fact_changes"],
            )
        )
    return [*blocks, *_tested(context, "do_data")]


def _what_was_done(told: dict[str, Any]) -> str:
    if told.get("how") == "permute":
        return (
            "The model was trained once more from the same seed, on the same facts with their frequencies dealt out "
            "anew: whatever else differs between facts stayed with them."
        )
    if told.get("how") == "remove":
        n = len(told.get("removed") or ())
        return (
            f"The model was trained once more from the same seed; every sequence that mentions both sides of one of "
            f"{count(n, 'fact')}, chosen by chance, was replaced by another."
        )
    return ""


def _tested(context: Context, stage: str) -> list[Any]:
    """The claims of a stage, as sentences."""
    mine = [row for row in context.claims() if row.get("stage") == stage]
    items = [(STATUS[row["status"]], WORDS[row["status"]], *sentence(row)) for row in mine]
    return [Lines(items=items)] if items else []


def _in_stage(context: Context, stage: str, kind: str) -> Found | None:
    return next((item for item in context.run.all(kind) if item.stage == stage), None)


def beside(context: Context) -> list[tuple[str, str, Any]]:
    """Small drawings of both, to stand beside the circuit: (title, id of the section that tells more, chart)."""
    made: list[tuple[str, str, Any]] = []
    if (formation := context.run.first("formation")) is not None:
        made.append(("When it formed", "when", charts.formation(formation.result, width=270, height=150)))
    if (found := _in_stage(context, "data", "fact_link")) is not None:
        made.append(
            ("Which frequency it needed", "data", charts.fact_link(found.result, width=270, height=170, legend=False))
        )
    return made

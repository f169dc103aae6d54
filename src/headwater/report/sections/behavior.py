"""What the model does: metrics, slices, example prompts, the canary, and the pairs that were dropped."""

from typing import Any

from headwater.report.blocks import Cell, Heading, Section, Table, cell
from headwater.report.charts.behaviors import behavior_report, canary, is_overall, margins, metric_rows
from headwater.report.charts.parts import Row, rows
from headwater.report.gather import Found
from headwater.report.sections.base import Context, missing
from headwater.report.words import count, estimate, finite, interval, metric_name, number, percent, token, visible

_TITLE = "What the model does"
_FEW = 5


def behavior(context: Context) -> Section:
    """The behavior on this model, in numbers and in examples."""
    found = context.run.first("behavior_report")
    if found is None:
        what = "It measures whether the model does this at all, over all prompts and in each slice."
        return missing(context, id="behavior", title=_TITLE, what=what, stage="behavior")
    metrics = metric_rows(found.result)
    overall = {row["metric"]: row for row in metrics if is_overall(row)}
    section = Section(id="behavior", title=_TITLE, lead=[_lead(context, overall), *_slices_lead(metrics)])
    section.blocks.append(_metrics(overall))
    section.blocks += _examples(found)
    prompts = found.result.tables.get("rows")
    if prompts is not None and prompts.height > 1:
        section.blocks.append(
            context.figure(
                found,
                lambda: margins(found.result),
                title="How clear the answer is, prompt by prompt",
                caption=_margin_caption(rows(prompts, "logit_diff", "cf_logit_diff")),
                tables=["rows"],
                code="from headwater.report.charts import margins\nmargins(found)",
            )
        )
    if any(not is_overall(row) for row in metrics):
        main = next(
            (m for m in ("logit_diff", "accuracy") if any(row["metric"] == m for row in metrics)), metrics[0]["metric"]
        )
        section.blocks.append(
            context.figure(
                found,
                lambda: behavior_report(found.result, main),
                title=f"{_upper(metric_name(main))} in each slice",
                caption="Dots are means, bars 95% bootstrap intervals; the dashed line is the mean over all prompts.",
                tables=["metrics"],
            )
        )
    section.blocks += _canary(context, found)
    section.blocks += _dropped(found)
    return section


def _lead(context: Context, overall: dict[Any, Row]) -> str:
    right, margin = overall.get("accuracy"), overall.get("logit_diff")
    parts = []
    if right:
        parts.append(
            f"{context.model} prefers the right answer on {percent(right['value'])} of {number(right['n'])} prompts"
        )
    if margin:
        text = (
            "the answer's logit exceeds the foil's by "
            f"{estimate(margin['value'], margin['lo'], margin['hi'])} on average"
        )
        parts.append(text if parts else f"In {context.model}, {text}")
    return "; ".join(parts) + "." if parts else f"How {context.model} does on {context.behavior}."


def _slices_lead(metrics: list[Row]) -> list[str]:
    sliced = [row for row in metrics if _is_slice(row) and row["metric"] == "accuracy"]
    if len(sliced) < 2:
        sliced = [row for row in metrics if _is_slice(row) and row["metric"] == "logit_diff"]
    if len(sliced) < 2:
        return []
    worst, best = min(sliced, key=lambda row: row["value"]), max(sliced, key=lambda row: row["value"])
    show = percent if worst["metric"] == "accuracy" else number
    metric = metric_name(worst["metric"])
    if worst["value"] == best["value"]:
        return [f"No slice differs: {metric} is {show(best['value'])} in all {len(sliced)}."]
    return [
        f"The hardest slice is {_slice(worst)} ({metric} {show(worst['value'])}), the easiest "
        f"{_slice(best)} ({show(best['value'])})."
    ]


def _is_slice(row: Row) -> bool:
    """Whether a row speaks of a slice worth comparing: with a value, of at least a few prompts, and no mere half."""
    return not is_overall(row) and row["slice_name"] != "split" and row["value"] is not None and (row["n"] or 0) >= _FEW


def _slice(row: Row) -> str:
    return f"{str(row['slice_name']).replace('_', ' ')} “{visible(row['slice'], 60)}”"


def _metrics(overall: dict[Any, Row]) -> Table:
    body = [
        [
            cell(metric_name(name)),
            cell(row["value"]),
            Cell(text=interval(row["lo"], row["hi"]) or "–", numeric=True),
            cell(row["n"]),
        ]
        for name, row in overall.items()
    ]
    return Table(columns=("metric", "mean", "95% interval", "n"), rows=body, caption="Over all prompts.")


def _examples(found: Found, each: int = 4) -> list[Any]:
    every = rows(
        found.result.tables.get("rows"),
        "id",
        "prompt",
        "answer",
        "foil",
        "logit_diff",
        "correct",
        "rank",
        "cf_logit_diff",
    )
    if not every:
        return []
    wrong = sorted((row for row in every if row["correct"] is False), key=lambda row: row["logit_diff"] or 0.0)[:each]
    right = [row for row in every if row["correct"] is not False]
    close = sorted(right, key=lambda row: abs(row["logit_diff"] or 0.0))[:2]
    shown = [row for row in right if row not in close][:each] + close + wrong
    body = [
        [
            Cell(text=visible(row["prompt"], 600), style="prompt"),
            Cell(text=token(row["answer"], 40), style="mono token"),
            Cell(text=token(row["foil"], 40), style="mono token"),
            cell(row["logit_diff"]),
            cell(row["cf_logit_diff"]),
            Cell(
                text="right" if row["correct"] else "wrong" if row["correct"] is False else "–",
                style="good" if row["correct"] else "bad",
            ),
        ]
        for row in shown
    ]
    n_wrong = sum(row["correct"] is False for row in every)
    caption = f"{len(shown)} of {len(every):,} prompts: ordinary ones, the two closest calls"
    caption += (
        f", and the worst of the {count(n_wrong, 'prompt')} it gets wrong." if n_wrong else "; it gets none wrong."
    )
    columns = ("prompt", "answer", "foil", "logit difference", "under the counterfactual", "")
    return [Heading(text="Example prompts"), Table(columns=columns, rows=body, caption=caption)]


def _margin_caption(prompts: list[Row]) -> str:
    clean = [v for row in prompts if (v := row["logit_diff"]) is not None]
    other = [v for row in prompts if (v := row["cf_logit_diff"]) is not None]
    parts = []
    if clean:
        parts.append(
            f"Right of zero the model prefers the answer: {percent(sum(v > 0 for v in clean) / len(clean))} of prompts"
        )
    if other:
        parts.append(
            f"{percent(sum(v > 0 for v in other) / len(other))} once the prompt is replaced by its counterfactual"
        )
    return ", ".join(parts) + "." if parts else ""


def _canary(context: Context, found: Found) -> list[Any]:
    table = rows(found.result.tables.get("canary"), "format", "condition", "accuracy", "lo", "hi", "n", "chance")
    table = [row for row in table if row["accuracy"] is not None]
    if not table:
        return []
    fails = [
        row
        for row in table
        if (at := finite(row["lo"])) is not None and row["chance"] is not None and at <= row["chance"]
    ]
    best = max(table, key=lambda row: row["accuracy"])
    lead = (
        f"The same questions in {count(len({row['format'] for row in table}), 'format')}: best as "
        f"{best['format']} ({percent(best['accuracy'])}), and not above chance in {len(fails)} of "
        f"{count(len(table), 'condition')}."
    )
    said = found.result.facts.get("canary")
    if isinstance(said, dict) and said.get("verdict"):
        lead += f" So {visible(said['verdict'], 300).rstrip('. ')}."
    figure = context.figure(
        found,
        lambda: canary(found.result),
        title="The canary: can it use the format at all?",
        caption=(
            "Accuracy with 95% intervals; the orange tick is chance. Asked: the plain question. Told: the answer "
            "stands in the prompt and has only to be copied, so failing there is failing the format."
        ),
        tables=["canary"],
        code="from headwater.report.charts import canary\ncanary(found)",
    )
    return [Heading(text="The canary", lead=lead), figure]


def _dropped(found: Found) -> list[Any]:
    table = found.result.tables.get("dropped")
    if table is None or table.is_empty():
        return []
    reasons: dict[str, int] = {}
    for row in rows(table, "id", "reason"):
        reasons[str(row["reason"])] = reasons.get(str(row["reason"]), 0) + 1
    body = [[cell(reason), cell(n)] for reason, n in sorted(reasons.items(), key=lambda item: -item[1])]
    caption = f"{count(table.height, 'pair')} could not be used with this model's tokenizer and are in no number above."
    return [Heading(text="Pairs that were dropped"), Table(columns=("reason", "pairs"), rows=body, caption=caption)]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]

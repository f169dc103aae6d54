"""Results of other kinds, and where everything comes from: model, versions, seeds, commands."""

from headwater.report.blocks import Cell, Heading, Note, Section, Table, cell, pairs, source
from headwater.report.charts import KINDS
from headwater.report.sections.base import Context
from headwater.report.sections.verdict import sources_block
from headwater.report.words import count, duration, number, visible

# Kinds that the sections before this one show.
OWN_SECTION = {
    "attribution",
    "behavior_report",
    "circuit",
    "counterfactual_pretraining",
    "effect",
    "fact_change",
    "fact_link",
    "faithfulness",
    "formation",
    "frequency_link",
    "heads",
    "ledger",
    "null",
    "patching",
}
OWN_STAGE = {"timeline", "data", "do_data"}
"""Stages whose every result has its place."""


def other(context: Context) -> Section | None:
    """Charts and tables of results that have no section of their own; nothing where there are none."""
    found = [
        item
        for item in context.run.found
        if not (item.result.kind in OWN_SECTION or item.stage in OWN_STAGE)
        and item.result.tables
        and "pairs" not in item.result.tables
    ]
    if not found:
        return None
    section = Section(
        id="other", title="Other results", lead=[f"{count(len(found), 'further result')} of this run, as stored."]
    )
    for item in found:
        facts = {key: value for key, value in item.result.facts.items() if isinstance(value, str | int | float | bool)}
        section.blocks.append(Heading(text=f"{item.name.replace('_', ' ')} ({item.stage})"))
        section.blocks += [pairs(facts)] if facts else []
        if item.result.kind in KINDS:
            title, tables = item.result.kind.replace("_", " "), list(item.result.tables)
            section.blocks.append(context.figure(item, item.result.chart, title=title, tables=tables))
        else:
            section.blocks += sources_block([source(item, name) for name in item.result.tables])
    return section


def provenance(context: Context) -> Section:
    """How to get all this again."""
    run = context.run
    known = [item.result.provenance for item in run.found]
    fingerprints = list(dict.fromkeys(p.fingerprint for p in known if p.fingerprint))
    pairs_hash = run.fact("hash")  # of all pairs; results on a part of them carry that part's own
    behaviors = [pairs_hash] if isinstance(pairs_hash, str) else list(dict.fromkeys(p.behavior or "" for p in known))
    seeds = list(dict.fromkeys(p.seed for p in known if p.seed is not None))
    commands = list(dict.fromkeys(p.command for p in known if p.command))
    versions = {name: value for p in known for name, value in p.versions.items()}
    seconds = [p.seconds for p in known if p.seconds is not None]
    dates = sorted(p.date for p in known if p.date)
    facts = {
        "model": context.model,
        "model fingerprint": ", ".join(fingerprints),
        "behavior": context.behavior,
        "behavior hash": ", ".join(filter(None, behaviors)),
        "seed": ", ".join(map(str, seeds)),
        "command": "\n".join(commands),
        "versions": ", ".join(f"{name} {value}" for name, value in sorted(versions.items())),
        "computed": f"{dates[0]} to {dates[-1]}" if dates and dates[0] != dates[-1] else "".join(dates[:1]),
        "time in stages": duration(sum(seconds)) if seconds else "",
    }
    lead = [
        f"{count(len(run.found), 'stored result')} of {count(len(run.facts), 'stage')}"
        + (f", computed in {duration(sum(seconds))}" if seconds else "")
        + ". Everything on this page was read from the files beside it; nothing was computed for the page."
    ]
    section = Section(id="provenance", title="Getting it again", lead=lead)
    section.blocks.append(pairs({key: value for key, value in facts.items() if value}))
    commands_text = "\n".join(
        [
            f"{context.command('verify')}    # runs every claim's test again",
            f"{context.command('resume')}    # goes on with what is missing",
            f"{context.command('report')}    # writes this page again",
        ]
    )
    section.blocks.append(Note(text="In the folder that holds the run:", code=commands_text))
    body = [
        [
            Cell(text=item.where, style="mono"),
            cell(item.result.kind.replace("_", " ")),
            Cell(
                text=", ".join(f"{name} ({number(t.height)})" for name, t in item.result.tables.items()), style="soft"
            ),
            Cell(text=duration(item.result.provenance.seconds), numeric=True),
            Cell(text=visible(item.content_hash[:12]), style="mono"),
        ]
        for item in run.found
    ]
    if body:
        section.blocks.append(Heading(text="Files"))
        columns = ("folder", "kind", "tables (rows)", "time", "content hash")
        section.blocks.append(
            Table(columns=columns, rows=body, caption="Parquet and JSON files, relative to this page.")
        )
    if run.config:
        section.blocks.append(Heading(text="The run's config"))
        section.blocks.append(pairs({key: _flat(value) for key, value in run.config.items()}))
    section.blocks += [Note(text=problem, tone="broken") for problem in run.problems]
    return section


def _flat(value: object) -> object:
    import json

    return json.dumps(value, ensure_ascii=False, sort_keys=True) if isinstance(value, dict | list) else value

"""write_report: one HTML file for a run, readable without a network, without scripts, and by someone who was not
there.
"""

import re
from pathlib import Path
from typing import Any

from headwater.core.files import write_whole
from headwater.core.store import RunFolder
from headwater.report import theme
from headwater.report.blocks import Section
from headwater.report.gather import Gathered, gather
from headwater.report.sections import SECTIONS, Context
from headwater.report.sections.base import guarded
from headwater.report.words import visible

NAME = "report.html"


def write_report(run_folder: str | Path | RunFolder) -> Path:
    """Write `report.html` into a run's folder, whole or not at all, and return its path.

    Stages that are missing are named with the command that runs them. The file refers to nothing outside itself but
    the run's own Parquet files, by relative links. The same stored results give the same bytes. Raises StoreError
    where the folder holds no run or cannot be written.
    """
    gathered = gather(run_folder)
    path = gathered.folder / NAME
    write_whole(path, render(gathered).encode())
    return path


def render(gathered: Gathered) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("headwater.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # only for SVG, which `svg.clean` and `drawing.draw` have escaped
    context = Context(gathered)
    sections = [section for section in (guarded(write, context) for write in SECTIONS) if section is not None]
    page = environment.get_template("page.html.j2").render(
        title=f"{context.behavior} in {context.model}",
        question=question(context),
        facts=_facts(context),
        example=_example(context),
        sections=sections,
        style=Markup(_style(environment)),
        missing=[section.title for section in sections if _is_missing(section)],
    )
    return re.sub(r"\n{2,}", "\n", page)


def question(context: Context) -> str:
    """What was asked: the run's own words where it has them."""
    asked = context.run.fact("question")
    return visible(asked, 300) if isinstance(asked, str) else f"{context.described[0]}: how does {context.model} do it?"


def _facts(context: Context) -> list[tuple[str, str]]:
    known = [item.result.provenance for item in context.run.found]
    dates = sorted(p.date for p in known if p.date)
    facts = [("model", context.model), ("behavior", context.behavior)]
    if context.described[1]:
        facts.append(("what it is", visible(context.described[1], 400)))
    if dates:
        facts.append(("traced", dates[-1][:10]))
    return facts


def _example(context: Context) -> tuple[str, str, str] | None:
    """A prompt, its answer and its foil, to see what the page is about before reading on."""
    pairs = context.run.pairs()
    if pairs is None or pairs.is_empty() or "foils" not in pairs.columns:
        return None
    row = pairs.row(0, named=True)
    answers, foils = list(row["answers"] or []), list(row["foils"] or [])
    if not answers:
        return None
    return visible(row["prompt"], 400), visible(answers[0], 60).strip(), visible(foils[0], 60).strip() if foils else ""


def _is_missing(section: Section) -> bool:
    return any(getattr(block, "tone", "") == "missing" for block in section.blocks)


def _style(environment: Any) -> str:
    source = environment.loader.get_source(environment, "style.css")[0]
    light, dark = theme.css_variables(dark=False), theme.css_variables(dark=True)
    fonts = f"--sans:{theme.SANS};--mono:{theme.MONO};--serif:{theme.SERIF};"
    text = (
        f":root{{color-scheme:light dark;{fonts}{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{source}\n"
        f"@media print{{:root{{{light}}}}}\n"
    )
    return re.sub(r"/\*.*?\*/", "", text, flags=re.S)

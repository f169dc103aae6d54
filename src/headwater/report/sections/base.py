"""What every section needs: the run, its names, figure numbers, and a way to fail in part only."""

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headwater.report.blocks import Figure, Note, Section, Source, source
from headwater.report.charts.claims import claim_rows, role_hues
from headwater.report.charts.parts import Row, rows
from headwater.report.gather import Found, Gathered
from headwater.report.svg import inline
from headwater.report.words import token, visible

log = logging.getLogger(__name__)


class Context:
    """One report in the making."""

    def __init__(self, run: Gathered) -> None:
        self.run = run
        self._figures = 0
        self._carried: dict[str, str] = {}

    # --- names

    @property
    def folder(self) -> str:
        """The run's folder as a reader may type it: relative where it can be, and never more of this machine than
        needed.
        """
        path = self.run.folder
        try:
            path = path.resolve().relative_to(Path.cwd().resolve())
        except ValueError:
            path = Path(path.name) if path.is_absolute() else path
        return path.as_posix()

    @property
    def model(self) -> str:
        """The model's name, from provenance or config."""
        known = next((item.result.provenance.model for item in self.run.found if item.result.provenance.model), None)
        return visible(known or _name(self.run.config.get("model")) or "the model", 80)

    @property
    def behavior(self) -> str:
        """The behavior's name."""
        found = (
            self.run.fact("behavior_name") or _name(self.run.config.get("behavior")) or _name(self.run.fact("behavior"))
        )
        return visible(Path(found).stem if found and "/" in found else found or "this behavior", 80)

    @property
    def described(self) -> tuple[str, str]:
        """A behavior's name as a title, and what it is, from the first line of its generator where it has one."""
        from headwater.behavior.generators import registry

        about = self.run.fact("about")
        name = about.get("generator") if isinstance(about, dict) else None
        name = name if isinstance(name, str) else self.behavior
        text = (registry.get(name).__doc__ or "").strip().split("\n")[0] if name in registry else ""
        title, colon, rest = text.partition(": ")
        if not colon:
            title, rest = self.behavior.replace("_", " "), ""
        return title[:1].upper() + title[1:], rest[:1].upper() + rest[1:]

    def position_labels(self) -> dict[str, str]:
        """Named positions with the first pair's token there, as column labels."""
        pairs = self.run.pairs()
        if pairs is None or pairs.is_empty():
            return {}
        prompt, positions = str(pairs["prompt"][0]), pairs["positions"][0]
        try:
            spans = json.loads(positions) if isinstance(positions, str) else {}
            placed = sorted(spans.items(), key=lambda item: item[1])  # as they stand in the prompt
            return {name: f"{token(prompt[start:end], 12)}\n{name}" for name, (start, end) in placed}
        except (ValueError, TypeError, AttributeError):  # a table from elsewhere may hold anything here
            return {}

    def command(self, verb: str) -> str:
        """A command on this run."""
        return f"headwater {verb} {shlex.quote(self.folder)}"

    # --- what several sections read

    def claims(self) -> list[Row]:
        """The ledger's claims, supported first."""
        found = self.run.first("ledger")
        return claim_rows(found.result) if found else []

    def roles(self) -> dict[str, str]:
        """Node names to the role that the `heads` stage found."""
        found = self.run.first("heads")
        if not found:
            return {}
        table = rows(found.result.tables.get("roles"), "layer", "head", "role")
        named: dict[str, str] = {}
        for row in table:
            if row["role"]:
                named.setdefault(f"a{row['layer']}.h{row['head']}", str(row["role"]))
        return named

    def role_tokens(self) -> dict[str, str]:
        """Roles to palette names, as in the chart of the roles."""
        found = self.run.first("heads")
        table = rows(found.result.tables.get("roles"), "role") if found else []
        return {role: f"c{i % 8}" for i, role in enumerate(role_hues([str(row["role"] or "no role") for row in table]))}

    # --- figures

    def figure(
        self,
        found: Found,
        chart: Any,
        *,
        title: str,
        caption: str = "",
        tables: Sequence[str],
        code: str = ".chart()",
        legend: Sequence[tuple[str, str]] = (),
        others: Sequence[Found] = (),
    ) -> Figure | Note:
        """A chart as a numbered figure with its data and code; where it cannot be drawn, a note that says why."""
        self._figures += 1
        name = f"fig-{self._figures}"
        try:
            drawn = chart() if callable(chart) else chart
            svg = drawn if isinstance(drawn, str) else inline(drawn, name=name, label=title)
        except (
            Exception
        ) as error:  # one broken table must not take the whole page with it; the page says what is missing
            log.warning("figure %r could not be drawn: %s", title, error)
            return Note(
                text=f"{title}: this figure could not be drawn ({type(error).__name__}: {visible(error, 300)}).",
                tone="broken",
            )
        sources = [
            self._source(item, table, name)
            for item in (found, *others)
            for table in tables
            if table in item.result.tables
        ]
        return Figure(
            legend=legend,
            id=name,
            number=self._figures,
            title=title,
            svg=svg,
            caption=caption,
            sources=sources,
            code=_code(found, code),
        )

    def drawings(self, made: Sequence[tuple[str, str, Any]], *, name: str) -> list[tuple[str, str, str]]:
        """(title, link, SVG) of small charts; one that cannot be drawn is left out, as its section says why."""
        drawn: list[tuple[str, str, str]] = []
        for i, (title, link, chart) in enumerate(made):
            try:
                drawn.append((title, link, inline(chart, name=f"{name}-{i}", label=title)))
            except Exception as error:
                log.warning("small figure %r could not be drawn: %s", title, error)
        return drawn

    def _source(self, found: Found, table: str, figure: str) -> Source:
        """A figure's data; a table that an earlier figure carries is only pointed to."""
        path = f"{found.where}/{table}.parquet"
        carrier = self._carried.setdefault(path, figure)
        if carrier == figure:
            return source(found, table)
        return Source(name=table, path=path, n_rows=found.result.tables[table].height, same_as=carrier)


def _code(found: Found, code: str) -> str:
    config = json.dumps(found.result.config, ensure_ascii=False, sort_keys=True, default=str)
    lines = ["import headwater as hw", "", f'found = hw.load_result("{found.where}")  # in the folder of this report']
    lines.append(code if code.startswith("from ") else f"found{code}")
    if found.result.config:
        lines += ["", f"# it was computed with: {visible(config, 400)}"]
    return "\n".join(lines)


def _name(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("name") or value.get("path") or value.get("id")
    return value if isinstance(value, str) else ""


def missing(context: Context, *, id: str, title: str, what: str, stage: str) -> Section:
    """A section whose stage is not there yet: what it would show, and how to get it."""
    if stage in context.run.facts:
        text = f"The stage “{stage}” was run and left nothing to show here. {what}"
        return Section(id=id, title=title, blocks=[Note(text=text, tone="missing")])
    note = Note(
        text=f"Not in this run yet: the stage “{stage}”. {what} Run it with:",
        tone="missing",
        code=context.command("resume"),
    )
    return Section(id=id, title=title, blocks=[note])


def guarded(section: Callable[[Context], Section | None], context: Context) -> Section | None:
    """A section, or a section that says why it could not be written."""
    try:
        return section(context)
    except Exception as error:  # a table of an unexpected shape costs its own section, not the page
        log.warning("section %r could not be written", section.__name__, exc_info=True)
        text = f"This section could not be written ({type(error).__name__}: {visible(error, 300)})."
        return Section(
            id=section.__name__, title=section.__name__.capitalize(), blocks=[Note(text=text, tone="broken")]
        )

"""Everything a run's folder holds, read once for the page; what cannot be read is noted, not raised."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from headwater.core.errors import HeadwaterError
from headwater.core.results import Result
from headwater.core.store import RunFolder

STAGES = ("behavior", "localize", "circuit", "heads", "timeline", "data", "do_data", "claims", "act", "report")


@dataclass(frozen=True, kw_only=True)
class Found:
    """One stored result, with where it lies in the run's folder."""

    stage: str
    name: str
    result: Result
    content_hash: str = ""

    @property
    def where(self) -> str:
        """Its folder, relative to the run's (and so to the report)."""
        return f"stages/{self.stage}/{self.name}"


@dataclass(kw_only=True)
class Gathered:
    """A run's config, results in the order of the stages, facts by stage, and what could not be read."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def all(self, kind: str) -> Iterator[Found]:
        """Every result of a kind."""
        return (item for item in self.found if item.result.kind == kind)

    def first(self, kind: str) -> Found | None:
        """The first result of a kind, or None."""
        return next(self.all(kind), None)

    def pairs(self) -> pl.DataFrame | None:
        """The behavior's pairs as the run stored them, or None."""
        for item in self.found:
            table = item.result.tables.get("pairs")
            if table is not None and {"prompt", "answers", "positions"} <= set(table.columns):
                return table
        return None

    def fact(self, *names: str) -> Any:
        """The first of these names that the config, a stage's facts or a result's facts hold."""
        sources = [self.config, *self.facts.values(), *(item.result.facts for item in self.found)]
        for name in names:
            for source in sources:
                if source.get(name) not in (None, ""):
                    return source[name]
        return None


def gather(folder: str | Path | RunFolder) -> Gathered:
    """Read a run's folder. Raises StoreError only where it is no run at all."""
    run = folder if isinstance(folder, RunFolder) else RunFolder.open(folder)
    gathered = Gathered(folder=run.path, config=dict(run.config))
    stages = run.stages
    for stage in sorted(stages, key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name)):
        try:
            gathered.facts[stage] = run.facts(stage)
            names = run.hashes()[stage]
        except HeadwaterError as error:
            gathered.problems.append(f"Stage {stage}: {error}")
            continue
        for name, digest in sorted(names.items()):
            try:
                result = run.load(stage, name)
            except HeadwaterError as error:
                gathered.problems.append(f"Stage {stage}, result {name}: {error}")
            else:
                gathered.found.append(Found(stage=stage, name=name, result=result, content_hash=digest))
    return gathered

"""Investigation: the whole inverse pipeline on one behavior of one model, stored stage by stage."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from headwater.core.errors import MethodError, StoreError
from headwater.core.progress import note
from headwater.core.results import Result
from headwater.core.store import RunFolder
from headwater.trace.config import (
    STAGES,
    ActSettings,
    CircuitSettings,
    ClaimsSettings,
    DataSettings,
    DoDataSettings,
    HeadsSettings,
    LocalizeSettings,
    Settings,
    TimelineSettings,
    read_yaml,
    with_needs,
)

if TYPE_CHECKING:
    from headwater.core.model import Model
    from headwater.trace.stages import Work

log = logging.getLogger("headwater.trace")
# Where a run lies and how far it goes is no part of what it finds: a run may be moved, and gone on with.
_NOT_STORED = {"out", "stages"}
# Settings that are stored only where they say something: runs from before there were any can be gone on with.
_LATER = ("history", "corpus", "corpus_options", "timeline", "data", "do_data")


class Investigation(Settings):
    """One behavior of one model, from prompt to tested mechanism to action.

        hw.Investigation(behavior="ioi", model="smollm2", out="runs/ioi").run()

    behavior: a generator's name or a file of pairs, `n` pairs (None: its own number) with `options` of the generator.
    model: whatever `hw.load` takes, or a folder of `headwater train`: its last checkpoint, and the run is its history.
    history: the checkpoints of another model (what `CheckpointSeries.of` takes), corpus: what it read, in order (what
    `Corpus.open` takes, with `corpus_options`). metric: None is the behavior's own. Everything random follows from
    `seed`.

    Raises MethodError for unknown settings or values that do not fit.
    """

    behavior: str
    model: str
    out: str = ""
    n: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0)
    metric: str | None = None
    options: dict[str, Any] = Field(default_factory=dict[str, Any])
    load: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Further arguments of `hw.load` (revision, dtype, device)."""
    history: str = ""
    corpus: str = ""
    corpus_options: dict[str, Any] = Field(default_factory=dict[str, Any])
    question: str = ""
    stages: tuple[str, ...] = STAGES
    localize: LocalizeSettings = LocalizeSettings()
    circuit: CircuitSettings = CircuitSettings()
    heads: HeadsSettings = HeadsSettings()
    timeline: TimelineSettings = TimelineSettings()
    data: DataSettings = DataSettings()
    do_data: DoDataSettings = DoDataSettings()
    claims: ClaimsSettings = ClaimsSettings()
    act: ActSettings = ActSettings()

    def __init__(self, **data: Any) -> None:
        for name in ("out", "behavior", "model", "history", "corpus"):
            if isinstance(data.get(name), Path):
                data[name] = str(data[name])
        super().__init__(**data)
        with_needs(self.stages)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Investigation":
        """Settings from a YAML file; keywords win over it."""
        return cls(**{**read_yaml(path), **overrides})

    def stored(self) -> dict[str, Any]:
        """The settings as they are stored with the run."""
        told = self.model_dump(mode="json", exclude=_NOT_STORED)
        fields = type(self).model_fields
        unsaid = {name for name in _LATER if getattr(self, name) == fields[name].get_default(call_default_factory=True)}
        return {name: value for name, value in told.items() if name not in unsaid}

    @property
    def planned(self) -> tuple[str, ...]:
        """The stages that are run, in order: those asked for and what they need, without those whose history is not
        known."""
        from headwater.trace.history import left_out

        return with_needs(self.stages, without=tuple(left_out(self)))

    def run(self, *, model: "Model | None" = None) -> RunFolder:
        """Run the stages that are not stored yet, in order, and return the folder (closed for writing).

        Stored stages are not run again, so a run that was interrupted, at whatever moment, goes on and ends with the
        same results as one that was not. `model`: one that is loaded already, instead of loading `self.model`.
        """
        if not self.out:
            raise MethodError("an investigation has no folder to write to", wanted="out", fix="Give out=, or --out")
        with RunFolder.create(self.out, self.stored()) as folder:
            self._run_stages(folder, model)
        return RunFolder.open(self.out)

    @classmethod
    def resume(cls, folder: str | Path, *, model: "Model | None" = None) -> RunFolder:
        """Go on with a run that was interrupted. Raises StoreError where the folder holds none, or its files fail."""
        stored = RunFolder.open(folder).config
        return cls(**{**stored, "out": str(folder)}).run(model=model)

    def _run_stages(self, folder: RunFolder, model: "Model | None") -> None:
        from headwater.trace.stages import Work

        work = Work(self, folder, self._loader(model))
        try:
            self._go_through(work, folder)
        finally:
            if work.beside is not None:
                from headwater.trace.redoing import end

                end(work)

    def _go_through(self, work: "Work", folder: RunFolder) -> None:
        from headwater.trace.stages import STAGE_FUNCTIONS

        planned = self.planned
        for stage in planned:
            if "do_data" in planned and work.beside is None and stage != "behavior" and not folder.has("do_data"):
                from headwater.trace.redoing import begin

                work.beside = begin(work)
            if folder.has(stage) and not (stage == "report" and not (folder.path / "report.html").exists()):
                log.info("%s: stored already", stage)
                continue
            started = time.monotonic()
            try:
                made = STAGE_FUNCTIONS[stage](work)
            except OSError as error:
                raise StoreError(
                    f"stage {stage} could not be written", got=error, fix="Go on with `headwater resume`"
                ) from error
            seconds = time.monotonic() - started
            _account(made.results.values(), seconds)
            folder.save_stage(stage, made.results, facts=made.facts)
            work.tidy(stage)
            line = f"{stage}: {seconds:.1f} s"
            log.info(line)
            note(line)

    def _loader(self, model: "Model | None") -> "Callable[[], Model]":
        def loaded() -> "Model":
            if model is not None:
                return model
            from headwater.core.loading import load
            from headwater.trace.history import is_run, load_last

            if is_run(self.model):
                return load_last(self.model, **self.load)
            return load(self.model, **self.load)

        return loaded


def _account(results: Iterable[Result], seconds: float) -> None:
    """What a stage took and none of its results says of itself goes to the first result that says nothing."""
    told = [result.provenance.seconds for result in results]
    for result in results:
        if result.provenance.seconds is None:
            left = max(0.0, seconds - sum(known for known in told if known is not None))
            result.provenance = replace(result.provenance, seconds=round(left, 3))
            return

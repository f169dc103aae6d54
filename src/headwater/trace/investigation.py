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
    HeadsSettings,
    LocalizeSettings,
    Settings,
    read_yaml,
    with_needs,
)

if TYPE_CHECKING:
    from headwater.core.model import Model

log = logging.getLogger("headwater.trace")
# Where a run lies and how far it goes is no part of what it finds: a run may be moved, and gone on with.
_NOT_STORED = {"out", "stages"}


class Investigation(Settings):
    """One behavior of one model, from prompt to tested mechanism to action.

        hw.Investigation(behavior="ioi", model="smollm2", out="runs/ioi").run()

    behavior: a generator's name or a file of pairs, `n` pairs (None: its own number) with `options` of the generator.
    model: whatever `hw.load` takes. metric: None is the behavior's own. Everything random follows from `seed`.
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
    question: str = ""
    stages: tuple[str, ...] = STAGES
    localize: LocalizeSettings = LocalizeSettings()
    circuit: CircuitSettings = CircuitSettings()
    heads: HeadsSettings = HeadsSettings()
    claims: ClaimsSettings = ClaimsSettings()
    act: ActSettings = ActSettings()

    def __init__(self, **data: Any) -> None:
        for name in ("out", "behavior", "model"):
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
        return self.model_dump(mode="json", exclude=_NOT_STORED)

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
        from headwater.trace.stages import STAGE_FUNCTIONS, Work

        work = Work(self, folder, self._loader(model))
        for stage in with_needs(self.stages):
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
            line = f"{stage}: {seconds:.1f} s"
            log.info(line)
            note(line)

    def _loader(self, model: "Model | None") -> "Callable[[], Model]":
        def loaded() -> "Model":
            if model is not None:
                return model
            from headwater.core.loading import load

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

"""A model's training history: its checkpoints, and what it had read before each.

A model that is a folder of `headwater train` brings its own; other models need `history` (checkpoints) and, for the
stages about data, `corpus` (what was read, in order).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.core.errors import StoreError
from headwater.core.files import read_json, to_json, write_whole
from headwater.core.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from headwater.core.model import Model
    from headwater.data.corpus import Corpus
    from headwater.dynamics.lab.run import TrainingRun
    from headwater.dynamics.series import CheckpointSeries
    from headwater.trace.investigation import Investigation

NO_HISTORY = "the model came without its training history"
NO_CORPUS = "what the model read is not known"


def is_run(name: str) -> bool:
    """Whether this is a folder of `headwater train`."""
    return bool(name) and (Path(name).expanduser() / "train.json").is_file()


def left_out(settings: "Investigation") -> dict[str, str]:
    """The stages that cannot be run with these settings, each with the reason. Looks at the settings and for a run's
    folder alone: no network, no model."""
    own = is_run(settings.model) or is_run(settings.history)
    if not own and not settings.history:
        return dict.fromkeys(("timeline", "data", "do_data"), NO_HISTORY)
    reasons: dict[str, str] = {}
    if not own and not settings.corpus:
        reasons["data"] = NO_CORPUS
    if settings.do_data.how == "none":
        reasons["do_data"] = "it was not asked for"
    elif not own or "data" in reasons:
        reasons["do_data"] = "only a run of `headwater train` can be trained once more"
    return reasons


@dataclass(frozen=True, kw_only=True)
class History:
    """series: the checkpoints that are looked at. run: the run of the lab that they are of, where they are of one."""

    series: "CheckpointSeries"
    run: "TrainingRun | None"
    settings: "Investigation"

    @classmethod
    def of(cls, settings: "Investigation") -> "History":
        """The history of an investigation's model. Raises StoreError where it has none."""
        from headwater.dynamics.series import CheckpointSeries

        name = settings.history or settings.model
        run = finished_run(name) if is_run(name) else None
        if run is None and not settings.history:
            raise StoreError(
                NO_HISTORY, got=settings.model, wanted="a folder of `headwater train`",
                fix="Give --history with its checkpoints: a folder, or a hub id",
            )  # fmt: skip
        series = CheckpointSeries.of(name if run is None else run)
        return cls(series=series.select(n=settings.timeline.checkpoints), run=run, settings=settings)

    @property
    def corpus(self) -> "Corpus":
        """What was read, in the order of training. Raises StoreError where that is not known."""
        from headwater.data.corpus import Corpus

        if self.settings.corpus:
            return Corpus.open(self.settings.corpus, **self.settings.corpus_options)
        if self.run is None:
            raise StoreError(NO_CORPUS, got=self.settings.history, fix="Give --corpus")
        return Corpus.open(str(self.run.path))

    def measured(
        self, folder: Path, label: str, function: "Callable[[Model], dict[str, Tensor]]", about: Mapping[str, Any]
    ) -> "dict[int, dict[str, Tensor]]":
        """{step: tensors that `function` makes of the model of that step}, kept in `folder` as they come.

        about: what the numbers depend on besides the checkpoint; a folder of other numbers is refused.
        """
        import safetensors.torch

        noted = {**about, "names": [one.name for one in self.series]}
        head = folder / "about.json"
        if head.exists():
            if to_json(read_json(head, what="about.json")) != to_json(noted):
                raise StoreError(f"{folder} holds numbers of other settings", fix="Remove it and go on")
        else:
            write_whole(head, to_json(noted).encode())
        for _, model, file in self._left(folder, label):
            found = {name: tensor.detach().cpu().contiguous() for name, tensor in function(model).items()}
            write_whole(file, safetensors.torch.save(found))
        return {
            one.step: safetensors.torch.load((folder / f"{one.step}.safetensors").read_bytes()) for one in self.series
        }

    def _left(self, folder: Path, label: str) -> "Iterator[tuple[int, Model, Path]]":
        """(step, model, file to write) of the checkpoints whose file is not there yet."""

        def is_done(checkpoint: Any) -> bool:
            return (folder / f"{checkpoint.step}.safetensors").exists()

        models = self.series.load(skip=is_done, **self.settings.load)
        n = sum(not is_done(one) for one in self.series)
        for checkpoint, model in track(models, label, n) if n else ():
            yield checkpoint.step, model, folder / f"{checkpoint.step}.safetensors"


def finished_run(path: str | Path) -> "TrainingRun":
    """The training run in a folder. Raises StoreError for one that is not over."""
    from headwater.dynamics.lab.run import TrainingRun

    run = TrainingRun.open(Path(path).expanduser())
    if not run.finished:
        got = f"checkpoints up to step {run.steps[-1]} of {run.config.steps}" if run.steps else "no checkpoint"
        raise StoreError(f"the training run in {path} is not over", got=got, fix="Go on with `headwater train`")
    return run


def load_last(path: str | Path, **options: Any) -> "Model":
    """The model of a run's last checkpoint, named after the run."""
    run = finished_run(path)
    model = run.load(**options)
    model.name = f"{run.config.name} (step {run.steps[-1]})"
    return model

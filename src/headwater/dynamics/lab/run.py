"""The folder of a training run: its settings, its checkpoints, and the state from which a killed run goes on.

train.json                  format, settings, hash of the data
data/                       texts as token ids; change-<hash>.safetensors: what `redo` has changed in the order
step-0/, step-1/, ...       checkpoints as the hub lays them out: config.json, model.safetensors, the tokenizer; and
                            headwater.json: step, sequences and tokens seen, sha256 of the weights
state/                      weights, AdamW's state and the curve so far (safetensors and JSON)
result/                     the loss curve, when the run is over
run.lock                    held by the process that trains
"""

import hashlib
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from headwater.core.errors import StoreError
from headwater.core.files import read_json, store_error, to_json, whole_folder, write_bytes, write_whole
from headwater.core.results import Result, check_format, load_result, register_result
from headwater.dynamics.lab.config import TrainConfig
from headwater.dynamics.lab.corpus import Data, Trained, assemble

if TYPE_CHECKING:
    from headwater.core.model import Model

FORMAT = 1
_STEP = re.compile(r"step-(\d+)")


@register_result
class TrainingResult(Result):
    """A finished training run.

    `tables["curve"]`: step (the update from step - 1), loss (mean over the predicted tokens of its batch, nats), lr,
    grad_norm (before clipping), tokens (seen so far). `tables["validation"]`: step, name, loss, accuracy. Facts: steps,
    parameters, tokens, checkpoints (steps), loss (of the last step).
    """

    kind: ClassVar[str] = "training"
    main: ClassVar[str | None] = "curve"


class TrainingRun:
    """A training run on disk. Reading needs no lock; what is not there yet is simply not listed."""

    def __init__(self, path: Path, config: TrainConfig, head: dict[str, Any]) -> None:
        self.path, self.config, self.head = path, config, head

    @classmethod
    def open(cls, folder: str | Path) -> "TrainingRun":
        """The run in a folder. Raises StoreError where there is none."""
        path = Path(folder)
        head = read_json(path / "train.json", what="train.json (what makes a folder a training run)")
        check_format(head.get("format"), FORMAT, path)
        return cls(path, TrainConfig.from_dict(head.get("config") or {}), head)

    @property
    def steps(self) -> list[int]:
        """The steps whose checkpoints are there."""
        found = (_STEP.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in found if match and (self.folder(int(match[1])) / NOTE).exists())

    @property
    def finished(self) -> bool:
        return (self.path / "result" / "result.json").exists()

    @property
    def result(self) -> TrainingResult:
        """The loss curve of a finished run. Raises StoreError before."""
        result = load_result(self.path / "result")
        if not isinstance(result, TrainingResult):
            raise StoreError(f"{self.path} holds another kind of result", got=result.kind, wanted=TrainingResult.kind)
        return result

    @property
    def curve(self) -> pl.DataFrame:
        """step, loss, lr, grad_norm, tokens: of the finished run, else as far as the stored state goes."""
        if self.finished:
            return self.result.tables["curve"]
        return curve_frame(read_state(self.path)[1]["curve"] if has_state(self.path) else [])

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.path / f"step-{step}"

    def note(self, step: int) -> dict[str, Any]:
        """step, sequences, tokens and sha256 of a checkpoint."""
        return read_json(self.folder(step) / NOTE, what=f"the note of checkpoint {step}")

    def load(self, step: int | None = None, **options: Any) -> "Model":
        """The model of a step (of the last one there); options as in `headwater.load`."""
        from headwater.core.loading import load

        steps = self.steps
        if not steps or (step is not None and step not in steps):
            raise StoreError(f"{self.path} has no checkpoint of step {step}", wanted=f"one of: {steps}")
        return load(str(self.folder(steps[-1] if step is None else step)), **options)

    @cached_property
    def data(self) -> Data:
        """The sources and their order, rebuilt from the settings. Raises StoreError where the data is another now."""
        data = assemble(self.config, self.path / "data")
        check_data(self.path, self.head, data)
        return data

    @cached_property
    def order(self) -> Trained:
        """What the model saw, in order: `order.tokens(k)` is the k-th sequence, `order.step(s)` the batch of a step."""
        return Trained(self.data, batch=self.config.batch, steps=self.config.steps)

    def batches(self, first: int = 0, last: int | None = None) -> Iterator[NDArray[np.int64]]:
        """The batches [batch, T] of steps first .. last-1, exactly as they were trained on."""
        for step in range(first, self.config.steps if last is None else last):
            yield self.order.step(step)


NOTE = "headwater.json"
_CURVE: dict[str, Any] = {
    "step": pl.Int64,
    "loss": pl.Float64,
    "lr": pl.Float64,
    "grad_norm": pl.Float64,
    "tokens": pl.Int64,
}
_VALIDATION: dict[str, Any] = {"step": pl.Int64, "name": pl.String, "loss": pl.Float64, "accuracy": pl.Float64}


def curve_frame(rows: list[list[float]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=_CURVE, orient="row")


def validation_frame(rows: list[list[Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=_VALIDATION, orient="row")


def check_data(path: Path, head: dict[str, Any], data: Data) -> None:
    """Refuse data that is not what the run was begun on."""
    if head.get("data") != data.fingerprint:
        raise StoreError(
            f"the data of the run in {path} is not what it was begun on",
            got="other tokens",
            fix="Put the old files back, or train again into a new folder",
        )


def begin(path: Path, config: TrainConfig, data: Data, parameters: int) -> dict[str, Any]:
    """Write train.json, or check that the one that is there is of the same settings and data; what it holds."""
    from headwater import __version__

    file = path / "train.json"
    settings = config.to_dict()
    if file.exists():
        head = read_json(file, what="train.json of a training run")
        check_format(head.get("format"), FORMAT, path)
        # read and written anew: a setting that an older version did not know has its default
        old = _results_only(TrainConfig.from_dict(head.get("config") or {}).to_dict())
        new = _results_only(settings)
        if to_json(old) != to_json(new):
            changed = sorted(name for name in {*old, *new} if to_json(old.get(name)) != to_json(new.get(name)))
            raise StoreError(
                f"{path} holds a training run with other settings",
                got=f"other values of {', '.join(changed)}",
                fix="Choose another folder with --out, or remove this one",
            )
        check_data(path, head, data)
        return head
    head = {
        "format": FORMAT,
        "headwater": __version__,
        "config": settings,
        "data": data.fingerprint,
        "parameters": parameters,
        "sequence_length": data.sequence_length,
        "vocabulary": data.vocabulary,
    }
    write_whole(file, to_json(head).encode())
    return head


def _results_only(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those on which no result depends."""
    kept = {name: value for name, value in (settings.get("checkpoints") or {}).items() if name != "save_seconds"}
    return {**settings, "checkpoints": kept}


def prepare_folder(path: Path) -> None:
    """Make the folder of a new run, or refuse one that holds something else."""
    try:
        if path.exists() and not (path / "train.json").exists():
            known = re.compile(r"run\.lock|data|\.train\.json\.tmp-.*")
            if not path.is_dir() or any(not known.fullmatch(entry.name) for entry in path.iterdir()):
                raise StoreError(
                    "will not train in a folder that holds something else", got=path, fix="Choose a new one with --out"
                )
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store_error(error, path, "create") from error


def save_checkpoint(path: Path, hf: Any, tokenizer: Any | None, facts: dict[str, Any]) -> str:
    """Write a checkpoint whole, as `transformers` and the hub lay it out; sha256 of its weights."""
    from headwater.core.loading_hf import calm

    with whole_folder(path, replaces=NOTE) as temporary:
        with calm():
            hf.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        digest = weights_hash(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        write_bytes(temporary / NOTE, to_json({**facts, "sha256": digest}).encode())
    return digest


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a checkpoint, in the order of their names."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise StoreError("a checkpoint without weights", got=folder, wanted="*.safetensors")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            while chunk := data.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def has_state(path: Path) -> bool:
    return (path / "state" / "state.json").is_file()


def save_state(path: Path, tensors: dict[str, Any], head: dict[str, Any]) -> None:
    """Write the state of a run by one rename."""
    import safetensors.torch

    with whole_folder(path / "state", replaces="state.json") as temporary:
        write_bytes(temporary / "state.safetensors", safetensors.torch.save(tensors))
        write_bytes(temporary / "state.json", to_json(head).encode())


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, head) of the stored state. Raises StoreError where it is damaged."""
    import safetensors
    import safetensors.torch

    head = read_json(path / "state" / "state.json", what="the state of a training run")
    try:
        return safetensors.torch.load((path / "state" / "state.safetensors").read_bytes()), head
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(
            f"the state of the training run in {path} is damaged",
            got=f"{type(error).__name__}: {error}",
            fix="Remove its folder `state` to start again",
        ) from error

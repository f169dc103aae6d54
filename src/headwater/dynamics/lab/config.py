"""What a training run is: frozen settings, from Python or YAML, that know every one of their keys."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from headwater.core.errors import MethodError, StoreError, did_you_mean

T = TypeVar("T")
Dtype = Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained, from random weights.

    type: `gpt2`, `llama`, or the `model_type` of any causal language model of transformers. n_layers .. context: sizes
    (d_mlp None: four times d_model; n_kv_heads None: as n_heads; context None: what a sequence needs). options: further
    fields of the transformers configuration, by their own names; dropout is 0 where it is not given. start: a folder or
    hub id whose weights it starts from (then the sizes are that checkpoint's).
    """

    type: str = "gpt2"
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None
    d_model: int = 64
    d_mlp: int | None = None
    context: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None

    def __post_init__(self) -> None:
        sizes = [self.n_layers, self.n_heads, self.d_model, self.n_kv_heads, self.d_mlp, self.context]
        if any(size is not None and size < 1 for size in sizes):
            raise MethodError("the sizes of a model are at least 1", got=self)
        if self.d_model % self.n_heads and "head_dim" not in self.options:
            raise MethodError(
                "d_model is no multiple of n_heads", got=f"d_model {self.d_model}, n_heads {self.n_heads}",
                fix="Change one of them, or give head_dim in options",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RepeatConfig:
    """A part of a source that is shown again and again (Hernandez et al., 2022): `sequences` of it, chosen by the seed,
    make up `share` of the samples that the source gives; the rest never holds one of them."""

    share: float
    sequences: int

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.sequences < 1:
            raise MethodError("a repeated part does not fit", got=self, wanted="0 < share < 1 and sequences >= 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One source of training sequences.

    source: the name of a generator, or a file: `.npy` or `.bin` token ids, or text (`.txt`, `.jsonl`, `.parquet`).
    weight: its share among the sources. shuffle: else in the order of the source. limit: use only its first sequences.
    repeat: a part that is shown again and again. corrupt: the share of its sequences that carry another's labels, at
    the tokens that are predicted; which do and whose follows from corrupt_seed (None: the run's seed). options: the
    generator's; of a `.bin` file `dtype`; of text `documents` ("lines", "paragraphs", "file") or `column`, and
    `separator`.
    """

    source: str
    weight: float = 1.0
    shuffle: bool = True
    limit: int | None = None
    repeat: RepeatConfig | None = None
    corrupt: float = 0.0
    corrupt_seed: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weight > 0 or (self.limit is not None and self.limit < 1) or not 0 <= self.corrupt <= 1:
            wanted = "weight > 0, limit >= 1 and corrupt in [0, 1]"
            raise MethodError(f"the source {self.source} does not fit", got=self, wanted=wanted)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Sequences that are measured and never trained on (see to that: the lab cannot know). Their loss and accuracy.

    held: measured with the interventions that hold at that step, else the model as it is.
    """

    source: str
    name: str = "validation"
    sequences: int = 256
    held: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise MethodError("validation needs sequences", got=self.sequences)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019). clip: largest norm of the gradient, None for no bound. decay: which weights
    decay: those with two axes ("matrices"), those without embeddings ("no_embeddings"), or "all"."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Literal["matrices", "no_embeddings", "all"] = "matrices"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0 or self.eps <= 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise MethodError("the optimizer does not fit", got=self, wanted="lr > 0, betas in [0, 1), decay >= 0")
        if self.clip is not None and self.clip <= 0:
            raise MethodError("gradients are clipped to a norm above 0", got=self.clip, wanted="a number, or null")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the steps: a linear warmup, then `constant`, half a `cosine` down to `final` times the
    rate, or `wsd` (Hu et al., 2024): constant, then down in a straight line over the last `decay` of the steps."""

    name: Literal["constant", "cosine", "wsd"] = "constant"
    warmup: int = 0
    final: float = 0.1
    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.final <= 1 or not 0 < self.decay <= 1:
            raise MethodError("the schedule does not fit", got=self, wanted="warmup >= 0, final and decay in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Steps whose weights are kept: 0 and the last; with `log` 1, 2, 4, 8, ...; every `every`; and those of `at`.

    save_seconds: how often the state from which a killed run goes on is written beside that; results do not depend on
    it.
    """

    log: bool = True
    every: int | None = None
    at: tuple[int, ...] = ()
    save_seconds: float = 30.0

    def __post_init__(self) -> None:
        if (self.every is not None and self.every < 1) or any(step < 0 for step in self.at) or self.save_seconds < 0:
            raise MethodError(
                "the checkpoints do not fit", got=self, wanted="every >= 1, steps >= 0, save_seconds >= 0"
            )

    def steps(self, last: int) -> list[int]:
        """The steps whose weights are kept, in order."""
        found = {0, last, *(step for step in self.at if step <= last)}
        if self.log:
            found |= {1 << power for power in range(last.bit_length()) if 1 << power <= last}
        if self.every:
            found |= set(range(0, last + 1, self.every))
        return sorted(found)


@dataclass(frozen=True, kw_only=True)
class InterventionConfig:
    """Something done to the model while it learns, from step `steps[0]` on and before step `steps[1]`.

    do: a text such as `zero("head.0.h1")`, `force("pattern.0.h1", "previous_token")`; see `headwater.dynamics.lab.
    interventions`. steps: None for the whole run; its second number may be null (to the end).
    """

    do: str
    steps: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        first, last = self.steps
        if first < 0 or (last is not None and last <= first):
            wanted = "[first, last] with last above first, or [first, null]"
            raise MethodError(f"the steps of {self.do} do not fit", got=list(self.steps), wanted=wanted)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The same config gives the same weights, bit for bit, on the same machine with the same
    `threads`, interrupted or not.

    tokenizer: a folder or hub id, "words" (one token a word of the text), or None (the generator's own, or none).
    sequence_length: tokens a sequence (text and flat `.bin` files are cut into it; generators bring their own). batch:
    sequences a step; micro_batch: how many are run at once. dtype: of weights and arithmetic; bfloat16 keeps float32
    weights and runs in autocast. loss_dtype: of the loss (float64 where float32's noise below 1e-7 matters, as in
    grokking). validate_every: steps between measurements of `validation`. threads: of torch; None leaves them. change:
    the name of what `redo` has changed in the order of the data; it lies beside the settings.
    """

    name: str = "lab"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: tuple[DataConfig, ...]
    tokenizer: str | None = None
    vocabulary: int | None = None
    sequence_length: int | None = None
    steps: int = 1000
    batch: int = 32
    micro_batch: int | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: tuple[ValidationConfig, ...] = ()
    validate_every: int = 50
    interventions: tuple[InterventionConfig, ...] = ()
    dtype: Dtype = "float32"
    loss_dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    change: str | None = None

    def __post_init__(self) -> None:
        if not self.data:
            raise MethodError("a training run needs data", wanted="at least one source under `data`")
        counts = [self.steps, self.batch, self.validate_every, self.micro_batch, self.threads, self.sequence_length]
        if any(count is not None and count < 1 for count in counts):
            raise MethodError("steps, batches and lengths are at least 1", got=self)
        names = [one.name for one in self.validation]
        if len(set(names)) < len(names):
            raise MethodError("two validations have one name", got=", ".join(names))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "TrainConfig":
        """From plain data, such as YAML gives. Raises MethodError for unknown keys and wrong values."""
        return read(cls, data, "a training run")

    @classmethod
    def from_yaml(cls, path: str | Path, **options: Any) -> "TrainConfig":
        """From a YAML file; `options` win, and reach inside by dots: `**{"model.n_layers": 3}`.

        Paths in the file that begin with `./` or `../` are read from the file's folder.
        """
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError("cannot read the training run's file", got=f"{path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise MethodError(
                "the training run's file is not YAML", got=f"{path}: {' '.join(str(error).split())}"
            ) from None
        if not isinstance(data, dict):
            wanted = "keys and values, such as `steps: 1000`"
            raise MethodError("the training run's file holds no settings", got=type(data).__name__, wanted=wanted)
        settings = cast(dict[str, Any], _from_folder(data, Path(path).parent))
        for name, value in options.items():
            _put(settings, name.split("."), value, name)
        return cls.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        from headwater.core.files import plain

        return cast(dict[str, Any], plain(self))


def read(cls: type[T], data: Mapping[str, Any], what: str) -> T:
    """A config of this class from plain data, nested ones within. Raises MethodError, with near names."""
    from pydantic import TypeAdapter, ValidationError

    _known_keys(cls, data, what)
    try:
        return TypeAdapter(cls).validate_python(dict(data))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise MethodError(f"the settings of {what} do not fit", got="; ".join(faults)) from None


_NESTED: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "repeat": RepeatConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "checkpoints": CheckpointConfig,
    "validation": ValidationConfig,
    "interventions": InterventionConfig,
}


def _known_keys(cls: type[Any], data: object, what: str) -> None:
    if not isinstance(data, Mapping):
        return  # a wrong shape is for the validation to say
    known = [one.name for one in dataclasses.fields(cls)]
    for name, value in cast(Mapping[Any, Any], data).items():
        if name not in known:
            raise MethodError(f"unknown setting of {what}", got=repr(name), wanted=did_you_mean(str(name), known))
        if name in _NESTED:
            for one in value if isinstance(value, list | tuple) else [value]:
                _known_keys(_NESTED[name], one, f"a training run's {name!r}")


def _from_folder(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {str(key): _from_folder(one, folder) for key, one in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [_from_folder(one, folder) for one in cast(list[Any], value)]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value


def _put(settings: dict[str, Any], path: list[str], value: Any, name: str) -> None:
    """Set one value inside nested settings; a number in the path counts within a list (`data.0.weight`)."""
    place: Any = settings
    for part in path[:-1]:
        if isinstance(place, list) and part.isdigit() and int(part) < len(cast(list[Any], place)):
            place = cast(list[Any], place)[int(part)]
        elif isinstance(place, dict):
            place = cast(dict[str, Any], place).setdefault(part, {})
        else:
            raise MethodError("cannot set this", got=name, wanted="a setting's name, such as model.n_layers")
    if isinstance(place, list) and path[-1].isdigit() and int(path[-1]) < len(cast(list[Any], place)):
        place[int(path[-1])] = value
    elif isinstance(place, dict):
        place[path[-1]] = value
    else:
        raise MethodError("cannot set this", got=name, wanted="a setting's name, such as model.n_layers")

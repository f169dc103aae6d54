"""The registry of measures, and the `Probe` that each is given."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.registry import Registry
from headwater.core.results import Result, load_result

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model
    from headwater.dynamics.series import CheckpointSeries

Row = dict[str, Any]
Measure = Callable[..., "list[Row]"]
Across = Callable[["dict[int, dict[str, Tensor]]"], "dict[int, list[Row]]"]
# Each measure stands in a file of its own or with its kin, imported when a name is asked for.
_OWN = (
    "losses", "heads", "writes", "weights", "plateau", "streams", "grokking", "circuit", "learning_coefficient",
    "memorizing", "connectivity", "attention_structure",
)  # fmt: skip
measures: Registry[Measure] = Registry("measure", own=[f"headwater.dynamics.measures.{name}" for name in _OWN])
"""Outside packages add theirs by the entry point group `headwater.measures`."""
acrosses: dict[str, Across] = {}
"""Name of a measure -> what compares the tensors that it kept, {step: tensors} -> {step: rows}."""
_LOGITS_AT_ONCE = 1 << 26  # 256 MB


def row(name: str, value: float, lo: float | None = None, hi: float | None = None) -> Row:
    """One number of a measure; `name` says which of several."""
    return {"name": name, "value": float(value), "lo": lo, "hi": hi}


@dataclass(frozen=True, eq=False, kw_only=True)
class Forward:
    """losses, guesses [n, T - 1]: of predicting each token after the first; streams: layer -> [n, T, D] after it."""

    losses: Tensor
    guesses: Tensor
    streams: dict[int, Tensor]


class Others:
    """The other checkpoints of the series, and what is made from the last one: once, kept in the timeline's folder
    where it has one."""

    def __init__(self, series: "CheckpointSeries", options: Mapping[str, Any], folder: Path | None = None) -> None:
        self.steps: list[int] = series.steps
        self._series, self._options, self._folder = series, dict(options), folder
        self._made: dict[str, Result] = {}
        self._last: Model | None = None

    def open(self, step: int) -> "Model":
        """The model of one step; the last one stays in memory."""
        if step != self.steps[-1]:
            return self._series.open(step, **self._options)
        if self._last is None:
            self._last = self._series.open(step, **self._options)
        return self._last

    def step_before(self, step: int) -> int | None:
        return max((one for one in self.steps if one < step), default=None)

    def at_last(self, name: str, make: "Callable[[Model], Result]") -> Result:
        """What `make` finds in the last checkpoint."""
        if name not in self._made:
            folder = None if self._folder is None else self._folder / name
            self._made[name] = make(self.open(self.steps[-1])) if folder is None else self._stored(folder, make)
        return self._made[name]

    def _stored(self, folder: Path, make: "Callable[[Model], Result]") -> Result:
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):  # several processes may come here at once
            if not (folder / "result.json").exists():
                make(self.open(self.steps[-1])).save(folder)
        return load_result(folder)


@dataclass(eq=False)
class Probe:
    """One checkpoint, and what it is measured on.

    behavior: pairs, or None. ids: token sequences [n, T], or None. loss_at: [T] bool, which of their tokens are
    predicted. seed: of everything random. trained: the sequences [n, T] of one round of a run's training data, where
    the series is a run of the lab and they are few; corrupted: [n] which of them carry a wrong label. others: the
    other checkpoints. kept: tensors for comparisons over steps.
    """

    model: "Model"
    step: int
    behavior: "Behavior | None" = None
    ids: Tensor | None = None
    loss_at: Tensor | None = None
    seed: int = 0
    trained: Tensor | None = None
    others: "Others | None" = None
    corrupted: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, name: str, tensor: Tensor) -> None:
        self.kept[name] = tensor.detach().cpu().contiguous()

    def at_last(self, name: str, make: "Callable[[Model], Result]") -> Result:
        """What `make` finds in the last checkpoint of the series, made once for all of them; without a series, in this
        model."""
        return make(self.model) if self.others is None else self.others.at_last(name, make)

    @property
    def pairs(self) -> "Behavior":
        if self.behavior is None:
            raise MethodError("this measure needs a behavior", fix="track(..., behavior=...), or --behavior")
        return self.behavior

    @property
    def sequences(self) -> Tensor:
        """[n, T] token ids."""
        if self.ids is None:
            raise MethodError("this measure needs sequences of tokens", fix="track(..., tokens=...), or --text FILE")
        return self.ids

    @functools.cached_property
    def forward(self) -> "Forward":
        """The model on the sequences, run once for all measures, a few sequences at a time: logits are large."""
        ids, layers = self.sequences, range(self.model.n_layers)
        at_once = max(1, _LOGITS_AT_ONCE // (ids.shape[1] * max(1, self.model.d_vocab)))
        losses: list[Tensor] = []
        guesses: list[Tensor] = []
        streams: list[list[Tensor]] = [[] for _ in layers]
        for part in ids.split(at_once):
            run = self.model.run(part, capture="resid_post.*")
            losses.append(losses_of(run.logits.float(), part.to(run.logits.device)).cpu())
            guesses.append(run.logits[:, :-1].argmax(dim=-1).cpu())
            for layer in layers:
                streams[layer].append(run[f"resid_post.{layer}"].float().cpu())
        kept = {layer: torch.cat(streams[layer]) for layer in layers}
        return Forward(losses=torch.cat(losses), guesses=torch.cat(guesses), streams=kept)

    @property
    def losses(self) -> Tensor:
        """[n, T - 1] nats: the loss of predicting each token after the first."""
        return self.forward.losses

    @property
    def predicted(self) -> Tensor:
        """[T - 1] bool: which of those count."""
        length = self.sequences.shape[1]
        return torch.ones(length - 1, dtype=torch.bool) if self.loss_at is None else self.loss_at[1:]


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise MethodError for settings that a measure does not have."""
    given = inspect.signature(measures.get(name)).parameters.values()
    known = [one.name for one in given if one.kind is one.KEYWORD_ONLY]
    for key in settings:
        if key not in known:
            wanted = did_you_mean(key, known) if known else "none: it has no settings"
            raise MethodError(f"unknown setting of the measure {name!r}", got=repr(key), wanted=wanted)


def losses_of(logits: Tensor, ids: Tensor) -> Tensor:
    flat = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1)


def over(name: str, values: Tensor, *, share: bool = False) -> Row:
    """The mean of one number a sequence, with its interval."""
    from headwater.behavior.metrics import interval

    return row(name, *interval(values.double().tolist(), share=share))

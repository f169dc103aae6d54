"""What a patch puts in, and into what: the counterfactual run, a noised run, or a fixed value.

Shapes: B pairs, T positions, S samples of noise, D width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import torch
from torch import Tensor, nn

from headwater.behavior import files
from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.engine.passes import Batch, Engine
from headwater.localize.engine.sweep import Fill, Record, Sweep, geometry_of, record_run

if TYPE_CHECKING:
    from headwater.behavior.bind import Bound
    from headwater.behavior.table import Behavior

Corruption = Literal["counterfactual", "noise", "zero", "mean", "mean_positional", "resample"]
CORRUPTIONS: tuple[Corruption, ...] = ("counterfactual", "noise", "zero", "mean", "mean_positional", "resample")
FIXED: tuple[Corruption, ...] = ("zero", "mean", "mean_positional", "resample")
"""Those that are no run of the pair: they can be put into the prompt's run, but nothing can be put into them."""

Direction = Literal["denoise", "noise"]


def direction_of(corruption: str, direction: str | None) -> Direction:
    """The direction that is meant; a fixed value has only one. Raises MethodError for an unknown name or a misfit."""
    if corruption not in CORRUPTIONS:
        raise MethodError("unknown corruption", got=repr(corruption), wanted=did_you_mean(str(corruption), CORRUPTIONS))
    if direction is None:
        return "noise" if corruption in FIXED else "denoise"
    if direction not in ("denoise", "noise"):
        raise MethodError("unknown direction", got=repr(direction), wanted="denoise or noise")
    if corruption in FIXED and direction == "denoise":
        raise MethodError(
            f"nothing can be denoised against {corruption}: it is a value put into the prompt's run, no run of its own",
            got="direction='denoise'",
            wanted="direction='noise'",
            fix="For denoising take corruption='counterfactual' or 'noise'",
        )
    return direction  # type: ignore[return-value]


# --- spans


def spans_asked(positions: Iterable[str | None]) -> list[str]:
    """Names of which a whole span (`name[:]`) or its first token (`name[0]`) is asked for."""
    found = [text.partition("[")[0] for text in positions if text is not None and text.endswith(("[:]", "[0]"))]
    return list(dict.fromkeys(found))


def with_starts(behavior: "Behavior", names: Sequence[str]) -> "Behavior":
    """The behavior with a further position `name[0]`, the first token of each named span (binding keeps the last)."""
    if not names:
        return behavior
    rows = []
    for text in behavior.frame["positions"]:
        spans: dict[str, Any] = files.as_json(text) or {}
        first = {f"{n}[0]": [spans[n][0], _first_end(spans[n])] for n in names if n in spans}
        rows.append(files.canonical({**spans, **first}))
    frame = behavior.frame.with_columns(pl.Series("positions", rows, dtype=pl.String))
    return type(behavior)(frame, name=behavior.name, metric=behavior.metric, about=behavior.about)


def _first_end(span: Sequence[int]) -> int:
    return min(span[0] + 1, span[1])


# --- noise


@dataclass(frozen=True, kw_only=True, eq=False)
class Noise:
    """Gaussian noise on the embeddings of some tokens (Meng et al., 2022).

    at: a position of the behavior (`subject[:]`: the whole span), or None: those where prompt and counterfactual
    differ. deviation: of the noise, in units of the embeddings (`scale` times their own). Each pair's `samples` draws
    come from its own seed, so that batches do not matter.
    """

    at: str | None
    samples: int
    deviation: float
    seed: int

    def where(self, engine: Engine, batch: Batch) -> Tensor:
        """[B, T] bool: the noised positions. Raises MethodError where a pair has none."""
        if self.at is None:
            return batch.clean != batch.corrupt
        mask = geometry_of(engine, batch, cached=False).where(self.at)
        if mask is None or not bool(mask.any(dim=1).all()):
            raise MethodError("some pairs have no position to be noised", got=repr(self.at))
        return mask

    def batch(self, engine: Engine, batch: Batch) -> Batch:
        """Every pair `samples` times (a pair's samples beside each other), with what is equal before the noise."""
        mask = self.where(engine, batch)
        n = self.samples
        return Batch(
            rows=[row for row in batch.rows for _ in range(n)],
            clean=batch.clean.repeat_interleave(n, dim=0),
            corrupt=batch.clean.repeat_interleave(n, dim=0),
            answers=batch.answers.repeat_interleave(n, dim=0),
            foils=batch.foils.repeat_interleave(n, dim=0),
            positions={name: place.repeat_interleave(n, dim=0) for name, place in batch.positions.items()},
            prefix=int(mask.any(dim=0).int().argmax()),
        )

    def draw(self, engine: Engine, batch: Batch) -> Tensor:
        """[B S, T, D]: what is added to the embeddings of `batch` (not yet with its samples), 0 where nothing is."""
        mask, width = self.where(engine, batch), _embedding_width(engine)
        noise = torch.zeros(len(batch), self.samples, *mask.shape[1:], width)
        for index, row in enumerate(batch.rows):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
            drawn = torch.randn(self.samples, int(mask[index].sum()), width, generator=generator)
            noise[index][:, mask[index]] = drawn * self.deviation
        return noise.flatten(0, 1).to(engine.model.device)


def _embedding_width(engine: Engine) -> int:
    return int(engine.hf.get_input_embeddings().weight.shape[-1])


def embedding_deviation(engine: Engine, masked: Iterable[tuple[Batch, Tensor]]) -> float:
    """The standard deviation of the embeddings' elements at some tokens ([B, T] bool a batch) of the prompts."""
    ids = torch.cat([batch.clean[mask] for batch, mask in masked])
    with torch.no_grad():
        return float(engine.hf.get_input_embeddings()(ids.to(engine.model.device)).double().std())


# --- fixed values


@dataclass(eq=False)
class _Sums:
    total: dict[tuple[str, int, nn.Module | None], Tensor] = field(default_factory=dict)
    count: int = 0


@dataclass(eq=False)
class Means:
    """Means of everything that a patch can put in: over pairs (of one length) at each position, or over positions
    too.
    """

    positional: bool
    made: bool
    sums: dict[int, _Sums] = field(default_factory=dict)

    def learn(self, engine: Engine, batches: Iterable[Batch]) -> "Means":
        """Run the counterfactuals of these batches, whole."""
        with engine.open():
            for batch in batches:
                size, length = batch.corrupt.shape
                record, _ = record_run(engine, batch.corrupt, made=self.made)
                sums = self.sums.setdefault(length if self.positional else 0, _Sums())
                for key, value in _named(record):
                    own = value.reshape(size, length, -1).double()
                    own = own.sum(dim=0) if self.positional else own.sum(dim=(0, 1))[None]
                    sums.total[key] = sums.total[key] + own if key in sums.total else own
                sums.count += size if self.positional else size * length
        return self

    def fill(self, sweep: Sweep) -> Record:
        """The means in place of the other run of a sweep."""
        sums = self.sums[sweep.length if self.positional else 0]
        return _like(sweep, lambda key, value: (sums.total[key] / sums.count).to(value)[None])


def zeros(sweep: Sweep) -> Record:
    """Nothing in place of the other run."""
    return _like(sweep, lambda _, value: value.new_zeros(1, 1, value.shape[-1]))


def _named(record: Record) -> Iterable[tuple[tuple[str, int, nn.Module | None], Tensor]]:
    for name in ("streams", "z", "attention", "mlp"):
        for index, value in enumerate(getattr(record, name)):
            yield (name, index, None), value
    for index, own in enumerate(record.made):
        for module, value in own.items():
            yield ("made", index, module), value


def _like(sweep: Sweep, value_of: Any) -> Record:
    """A record of the base run's shapes with other values, which are expanded and take no memory."""
    record = Record(made=[{} for _ in sweep.base.made])
    size = len(sweep.batch)
    for key, value in _named(sweep.base):
        name, index, module = key
        new = value_of(key, value).expand(size, sweep.length, -1)
        if name == "made":
            record.made[index][module] = new  # type: ignore[index]
        else:
            getattr(record, name).append(new)
    return record


def donors(bound: "Bound", seed: int) -> dict[int, Tensor]:
    """Row -> the tokens [T] of another pair's prompt of the same length, drawn with `seed`; pairs that are alone with
    their length have none.
    """
    found: dict[int, Tensor] = {}
    for group in bound.groups:
        n = len(group)
        if n < 2:
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + group.length)
        steps = torch.randint(1, n, (n,), generator=generator)
        for index, row in enumerate(group.rows):
            found[row] = group.clean[(index + int(steps[index])) % n]
    return found


def resampled(given: dict[int, Tensor], made: bool) -> Fill:
    """Other pairs' prompts in place of the other run."""

    def fill(sweep: Sweep) -> Record:
        ids = torch.stack([given[row] for row in sweep.batch.rows])
        return record_run(sweep.engine, ids, made=made)[0]

    return fill


def without_prefix(batch: Batch) -> Batch:
    """The batch with nothing shared: a fixed value differs at the first position too."""
    return replace(batch, prefix=0)

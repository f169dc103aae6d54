"""do(data): a run of the lab trained again with its own settings and a change of its data.

Everything that is not asked to change stays bit for bit what it was: the same places of the order hold the same
sequences, so that what differs in the end is due to the change.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import MethodError, StoreError
from headwater.core.files import store_error
from headwater.core.progress import track
from headwater.dynamics.lab.change import Change
from headwater.dynamics.lab.config import DataConfig, TrainConfig
from headwater.dynamics.lab.corpus import Data, assemble
from headwater.dynamics.lab.order import Permutation, key
from headwater.dynamics.lab.run import TrainingRun, prepare_folder
from headwater.dynamics.lab.sources import is_file

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
_AT_ONCE = 4096
_SOURCE = np.int64(1 << 50)  # sequences of a source are fewer


def redo(
    run: TrainingRun | str | Path,
    out: str | Path,
    *,
    remove: Any = None,
    repeat: tuple[Any, int] | None = None,
    reweight: tuple[Any, float] | None = None,
    data: Mapping[str, Mapping[str, Any]] | None = None,
    steps: int | None = None,
    seed: int | None = None,
    stop_at: int | None = None,
) -> TrainingRun:
    """Train a run again into `out`, with a change of its data: an intervention on the data, do(data).

    remove, and the first of repeat and reweight, say which sequences: numbers of the run's order (that which is
    `run.order.tokens(k)`, wherever it comes again), or pairs of terms, as `headwater.data.read_pairs` takes them (every
    sequence that mentions both of a pair, in the changed data), or a file of either (`.npy`; a table with a column
    `sequence`; pairs), or {number of a source: numbers of its sequences}.

    - remove: their places are taken by what the run would have seen after its last step, in that order and from the
      same part of the same source, as far as it is not removed too. All other places keep what they had. Of a source
      that the run had gone through once, that is a sequence a second time.
    - repeat (which, times): shown `times` as often as they were; the further copies take places of other sequences of
      the same source, chosen by the seed.
    - reweight (which, weight): at their places the loss is multiplied by `weight`; 0 leaves them out and their places
      empty, with every other place as it was.
    - data: options of sources that change, by the source's name: {"world": {"permute": 1}}.
    - steps, seed: others than the run's. Another seed means other first weights and another order of the same
      sequences (generators and wrong labels keep the run's seed; which sequences are repeated, where some are, follows
      the new one).

    The change lies beside the settings, so the run is killed and resumed as any other: call it again. Without a change
    the weights are the run's, bit for bit. Raises MethodError where the change cannot be made, StoreError for a run of
    `redo` itself: its first run is what to change.

    Known failure: a mechanism may live on from sequences that say the same in other words, so that removing some of
    them shows nothing; and one seed's difference is no effect: compare several.

    >>> without = redo("runs/world", "runs/without", remove=[("France", "Paris")])           # doctest: +SKIP
    """
    base = run if isinstance(run, TrainingRun) else TrainingRun.open(run)
    if base.config.change is not None:
        raise StoreError(
            f"{base.path} is a run of redo itself", fix="Give the run that it was made from, with all changes"
        )
    if repeat is not None and (int(repeat[1]) != repeat[1] or repeat[1] < 2):
        raise MethodError("a sequence is repeated a whole number of times", got=repeat[1], wanted="2 or more")
    if reweight is not None and not 0 <= reweight[1] < float("inf"):
        raise MethodError("a loss is weighted by a number that is not negative", got=reweight[1])
    config = _settings(base.config, data, steps, seed)
    path = Path(out)
    if not (remove is None and repeat is None and reweight is None):
        if int(os.environ.get("RANK", "0")) == 0:
            prepare_folder(path)
        made = assemble(config, path / "data")
        change = changed(base, made, config, remove=remove, repeat=repeat, reweight=reweight)
        config = dataclasses.replace(config, change=change.save(path / "data"))
    from headwater.dynamics.lab.training import train

    return train(config, path, stop_at=stop_at)


def changed(
    base: TrainingRun,
    made: Data,
    config: TrainConfig,
    *,
    remove: Any = None,
    repeat: tuple[Any, int] | None = None,
    reweight: tuple[Any, float] | None = None,
) -> Change:
    """What `redo` puts beside the settings."""
    n = config.steps * config.batch
    about: dict[str, Any] = {}
    shown = np.arange(n, dtype=np.int64)
    gone: _Chosen | None = None
    if remove is not None:
        gone = _Chosen(remove, base, made)
        mine = gone.of(shown, "looking for what is removed")
        _some(mine, "removed")
        about |= {"remove": gone.about, "removed": int(mine.sum())}
        shown[mine] = _spares(made, gone, np.flatnonzero(mine), n)
    if repeat is not None:
        again, times = _Chosen(repeat[0], base, made), int(repeat[1])
        mine = again.of(shown, "looking for what is repeated")
        _some(mine, "repeated")
        about |= {"repeat": again.about, "times": times, "repeated": int(mine.sum())}
        places, copies = _copies(made, shown, mine, times, config.seed)
        shown[places] = shown[copies]
    weighted, weights = np.empty(0, dtype=np.int64), np.empty(0)
    if reweight is not None:
        other = _Chosen(reweight[0], base, made)
        mine = other.of(shown, "looking for what weighs otherwise")
        _some(mine, "weighted")
        about |= {"reweight": other.about, "weight": float(reweight[1]), "weighted": int(mine.sum())}
        weighted = np.flatnonzero(mine).astype(np.int64)
        weights = np.full(len(weighted), float(reweight[1]))
    places = np.flatnonzero(shown != np.arange(n)).astype(np.int64)
    return Change(places=places, samples=shown[places], weighted=weighted, weights=weights, about=about)


class _Chosen:
    """Which samples of an order are meant: by (source, sequence), or by what they say."""

    def __init__(self, what: Any, base: TrainingRun, made: Data) -> None:
        self._made = made
        self._says: Callable[[Any], Bools] | None = None
        if isinstance(what, Mapping):
            self._keys = np.unique(np.concatenate([_of_source(made, *one) for one in what.items()]))
            self.about: dict[str, Any] = {"sequences": len(self._keys)}
            return
        numbers, pairs = _read(what)
        if numbers is not None:
            if not len(numbers) or numbers.min() < 0 or numbers.max() >= base.order.n_sequences:
                wanted = f"numbers from 0 to {base.order.n_sequences - 1}, at least one"
                raise MethodError(f"no such sequences in the order of {base.path}", got=_few(numbers), wanted=wanted)
            self._keys = np.unique(_keys(*base.data.places(numbers)))
            self.about = {"sequences": len(self._keys)}
            return
        # By name: rooms of stages do not import each other, and how mentions are found is that of `data`.
        found = importlib.import_module("headwater.data.mentions").Mentioning(pairs, tokenizer=made.tokenizer)
        self._says = found.any
        self.about = {"pairs": len(found.pairs.of)}

    def of(self, numbers: Ints, label: str | None = None) -> Bools:
        """[n] which of the samples with these numbers of the unchanged order are meant."""
        if self._says is None:
            return np.isin(_keys(*self._made.order.at(numbers)), self._keys)
        out = np.zeros(len(numbers), dtype=bool)
        starts: Any = range(0, len(numbers), _AT_ONCE)
        for start in track(starts, label) if label else starts:
            part = slice(start, start + _AT_ONCE)
            out[part] = self._says(self._made.at(numbers[part])[0])
        return out


def _read(what: Any) -> tuple[Ints | None, Any]:
    """(numbers, None), or (None, what `read_pairs` takes)."""
    if isinstance(what, str | Path):
        path = Path(what)
        if path.suffix == ".npy":
            try:
                return _numbers(np.load(path, allow_pickle=False)), None
            except OSError as error:
                raise store_error(error, path, "read") from error
            except ValueError as error:
                raise StoreError(f"{path} is no array", got=str(error).splitlines()[0]) from None
        if path.suffix in (".csv", ".parquet") and (column := _column(path)) is not None:
            return _numbers(column), None
        return None, what
    if isinstance(what, Sequence) and what and not isinstance(what[0], int | np.integer):
        return None, what
    if isinstance(what, Sequence | np.ndarray | range) or hasattr(what, "to_numpy"):
        return _numbers(what.to_numpy() if hasattr(what, "to_numpy") else np.asarray(what)), None  # type: ignore[union-attr]
    return None, what


def _column(path: Path) -> Any:
    import polars as pl

    try:
        frame = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path)
        return (
            frame.select("sequence").collect()["sequence"].to_numpy() if "sequence" in frame.collect_schema() else None
        )
    except OSError as error:
        raise store_error(error, path, "read") from error
    except pl.exceptions.PolarsError as error:
        raise StoreError(f"cannot read sequences from {path}", got=str(error).splitlines()[0]) from None


def _numbers(values: Any) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        got = f"{array.dtype} {list(array.shape)}"
        raise MethodError("sequences are named by their numbers in the order", got=got, wanted="integers in one row")
    return array.astype(np.int64)


def _keys(source: Ints, sequence: Ints) -> Ints:
    return source * _SOURCE + sequence


def _of_source(made: Data, source: Any, sequences: Any) -> Ints:
    numbers = _numbers(sequences)
    if not isinstance(source, int) or not 0 <= source < len(made.sources):
        raise MethodError("no such source", got=repr(source), wanted=f"a number from 0 to {len(made.sources) - 1}")
    if not len(numbers) or numbers.min() < 0 or numbers.max() >= made.sources[source].n_sequences:
        wanted = f"numbers from 0 to {made.sources[source].n_sequences - 1}, at least one"
        raise MethodError(f"no such sequences of source {source}", got=_few(numbers), wanted=wanted)
    return _keys(np.full(len(numbers), source, dtype=np.int64), numbers)


def _few(numbers: Ints) -> str:
    return f"{len(numbers)} numbers, {numbers.min()} to {numbers.max()}" if len(numbers) else "none"


def _some(mine: Bools, what: str) -> None:
    if not mine.any():
        raise MethodError(
            f"no sequence of the run is {what}", fix="Look at the numbers, or at how the terms are written"
        )


def _spares(made: Data, gone: _Chosen, places: Ints, n: int) -> Ints:
    """For each place, the next sample after the run's last one that comes from the same stream and is not removed."""
    order = made.order
    streams = order.stream_of(places)
    needed = {int(one): int((streams == one).sum()) for one in np.unique(streams)}
    found: dict[int, list[Ints]] = {one: [] for one in needed}
    at, last = n, n
    while any(needed.values()):
        numbers = np.arange(at, at + _AT_ONCE, dtype=np.int64)
        of = order.stream_of(numbers)
        numbers = numbers[np.isin(of, [one for one, count in needed.items() if count])]
        numbers = numbers[~gone.of(numbers)]
        of = order.stream_of(numbers)
        for one in found:
            mine = numbers[of == one][: needed[one]]
            if len(mine):
                found[one].append(mine)
                needed[one] -= len(mine)
                last = at
        at += _AT_ONCE
        if at - last > max(10 * n, 100_000):
            raise MethodError(
                "nothing is left to take the removed sequences' places", fix="Remove fewer, or reweight to 0"
            )
    out = np.empty(len(places), dtype=np.int64)
    for one, parts in found.items():
        out[streams == one] = np.concatenate(parts)
    return out


def _copies(made: Data, shown: Ints, mine: Bools, times: int, seed: int) -> tuple[Ints, Ints]:
    """(places that are given up, places whose sequences are shown there as well)."""
    places, copies = [], []
    streams = made.order.stream_of(shown)
    for one in np.unique(streams[mine]).tolist():
        said = np.flatnonzero(mine & (streams == one))
        free = np.flatnonzero(~mine & (streams == one))
        wanted = len(said) * (times - 1)
        if wanted > len(free):
            got = f"{len(said)} places, {times} times each"
            raise MethodError(
                "the run is too short for so many repeats", got=got, wanted=f"{len(said) + len(free)} places"
            )
        chosen = Permutation(len(free), key(seed, "repeat", one))(np.arange(wanted))
        places.append(np.sort(free[chosen]))
        copies.append(np.tile(said, times - 1))
    return np.concatenate(places), np.concatenate(copies)


def _settings(
    config: TrainConfig, data: Mapping[str, Mapping[str, Any]] | None, steps: int | None, seed: int | None
) -> TrainConfig:
    wanted = {name: dict(options) for name, options in (data or {}).items()}
    sources: list[DataConfig] = []
    for one in config.data:
        options = dict(one.options)
        if seed is not None and not is_file(one.source):
            options.setdefault("seed", config.seed)
        labels = config.seed if one.corrupt and seed is not None and one.corrupt_seed is None else one.corrupt_seed
        sources.append(dataclasses.replace(one, options=options | wanted.get(one.source, {}), corrupt_seed=labels))
    if unknown := sorted(set(wanted) - {one.source for one in config.data}):
        known = ", ".join(sorted({one.source for one in config.data}))
        raise MethodError("the run has no such source", got=", ".join(unknown), wanted=known)
    validation = config.validation
    if seed is not None:
        kept = [{"seed": config.seed} | dict(one.options) for one in validation]
        validation = tuple(
            one if is_file(one.source) else dataclasses.replace(one, options=options)
            for one, options in zip(validation, kept, strict=True)
        )
    others: dict[str, Any] = {"data": tuple(sources), "validation": validation}
    if steps is not None:
        others["steps"] = steps
    if seed is not None:
        others["seed"] = seed
    return dataclasses.replace(config, **others)

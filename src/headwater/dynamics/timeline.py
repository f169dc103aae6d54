"""`track`: measures over the checkpoints of a series, kept for each as soon as it is there, as a Timeline."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import HeadwaterError, MethodError, StoreError, did_you_mean
from headwater.core.files import read_json, to_json, whole_folder, write_bytes, write_whole
from headwater.core.progress import track as shown
from headwater.core.results import Provenance, Result, register_result
from headwater.dynamics.first import came_first
from headwater.dynamics.measures import acrosses, measures
from headwater.dynamics.measures.base import Others, Probe, check_settings
from headwater.dynamics.series import Checkpoint, CheckpointSeries
from headwater.dynamics.transitions import transitions

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.claims import Outcome
    from headwater.dynamics.lab.run import TrainingRun

_TRAINED = 1 << 14  # sequences: training data up to this size is shown to the measures
_VALUES: dict[str, Any] = {
    "step": pl.Int64, "measure": pl.String, "name": pl.String, "value": pl.Float64, "lo": pl.Float64, "hi": pl.Float64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """measures: names (`headwater.dynamics.measures`). settings: of measures that have some, by their names. sequences,
    length: how many sequences of tokens are looked at, and how much of each. draws: of the bootstrap and the null of
    transitions."""

    measures: tuple[str, ...] = ("loss",)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    sequences: int = 32
    length: int = 128
    draws: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        known = measures.names()
        for name in self.measures:
            if name not in known:
                raise MethodError("unknown measure", got=repr(name), wanted=did_you_mean(name, known))
        if not self.measures or len(set(self.measures)) < len(self.measures):
            raise MethodError("measures are asked for once each", got=", ".join(self.measures) or "none")
        for name, settings in self.settings.items():
            if name not in self.measures:
                raise MethodError(
                    "settings for a measure that is not asked for", got=name, wanted=", ".join(self.measures)
                )
            check_settings(name, settings)
        if min(self.sequences, self.draws) < 1 or self.length < 2:
            raise MethodError("tracking needs sequences, of two tokens at least", got=self)


@register_result
class Timeline(Result):
    """Measures over steps.

    `tables["values"]`: step, measure, name (which number of the measure), value, lo, hi (95%; null where it has none).
    `tables["transitions"]`: measure, name, step (of the greatest change of level), lo, hi, before, after, share, p,
    half, tenth, nine_tenths, n; see `headwater.dynamics.transitions`. `tables["checkpoints"]`: step, name, tokens,
    fingerprint.
    """

    kind: ClassVar[str] = "timeline"
    main: ClassVar[str | None] = "values"

    def curve(self, measure: str, name: str = "") -> pl.DataFrame:
        """step, value, lo, hi of one number. Raises MethodError where it was not measured."""
        table = self.tables["values"]
        found = table.filter((pl.col("measure") == measure) & (pl.col("name") == name)).sort("step")
        if not found.height:
            known = {f"{m} {n}".strip() for m, n in table.select("measure", "name").unique().iter_rows()}
            asked = f"{measure} {name}".strip()
            raise MethodError("not in this timeline", got=repr(asked), wanted=did_you_mean(asked, known))
        return found.select("step", "value", "lo", "hi")

    def when(self, measure: str, name: str = "", *, level: float, rising: bool = True) -> float:
        """The first step at which a curve reaches a level (read in straight lines between its points); NaN: never."""
        from headwater.dynamics.transitions import crossing

        found = self.curve(measure, name)
        return crossing(found["step"].to_numpy().astype(float), found["value"].to_numpy(), level, rising=rising)

    def came_first(
        self, first: Sequence[str], second: Sequence[str], *, margin: float = 0.0, seed: int = 0
    ) -> "Outcome":
        """Whether one curve changed more than `margin` steps before another: see `headwater.dynamics.first`."""
        return came_first(self, first, second, margin=margin, seed=seed)


def track(
    series: Any,
    *,
    behavior: "Behavior | None" = None,
    tokens: Tensor | None = None,
    loss_at: Tensor | None = None,
    out: str | Path | None = None,
    load: dict[str, Any] | None = None,
    config: TrackConfig | None = None,
    **options: Any,
) -> Timeline:
    """Measure every checkpoint of a series (or of what `CheckpointSeries.of` takes) in order; find the transitions.

    tokens: sequences [n, T] for the measures that need some, `loss_at` [T] which of them are predicted; for a run of
    `headwater train` its first validation data is taken, else sequences of its training. out: a folder that keeps each
    checkpoint's numbers as they come; killed, it goes on there, and several processes with the same `out` share the
    work. load: options of `headwater.load`. Options are fields of TrackConfig.

    Raises MethodError for unknown measures, or one that lacks its behavior or sequences.
    """
    config = config or _config(options)
    chosen = CheckpointSeries.of(series)
    run = _own_run(chosen)
    if tokens is None and run is not None:
        tokens, loss_at = own_tokens(run)
    if tokens is not None:
        tokens = tokens[: config.sequences, : config.length]
        loss_at = None if loss_at is None else loss_at[: config.length]
        if loss_at is not None and not bool(loss_at[1:].any()):
            raise MethodError("none of the tokens that are looked at is predicted", fix="Raise length")
    trained, corrupted = (None, None) if run is None else _trained(run)
    started = time.monotonic()
    about = _about(chosen, config, behavior, tokens, loss_at)
    found: dict[int, dict[str, Any]] = {}
    kept: dict[int, dict[str, Tensor]] = {}
    folder = None if out is None else _folder(Path(out), about)
    others = Others(chosen, load or {}, None if folder is None else folder.parent / "at_last")
    # First what no other process is at; then, after waiting for them, what they may have left undone.
    for patient in (False, True) if folder is not None else (True,):
        todo = [one for one in chosen.checkpoints if folder is None or not _is_done(folder, one)]
        if not todo:
            continue
        claims = _Claims(folder, patient)
        part = CheckpointSeries(todo, name=chosen.name, cache_dir=chosen.cache_dir)
        models = part.load(skip=claims.taken, **(load or {}))
        try:
            for one, model in shown(models, f"tracking {chosen.name}", len(todo)):
                probe = Probe(
                    model, one.step, behavior, tokens, loss_at, config.seed, trained, others, corrupted=corrupted
                )
                head = _measure(probe, config, one)
                if folder is None:
                    found[one.step], kept[one.step] = head, probe.kept
                else:
                    _store(folder, one, head, probe.kept)
                claims.free()
        finally:
            claims.free()
    for one in chosen.checkpoints if folder is not None else ():
        found[one.step], kept[one.step] = _read(folder, one)  # type: ignore[arg-type]
    timeline = _assemble(chosen, config, about, found, kept, time.monotonic() - started, behavior)
    if out is not None:
        timeline.save(Path(out) / "timeline")
    return timeline


def _config(options: dict[str, Any]) -> TrackConfig:
    known = TrackConfig.__dataclass_fields__
    for name in options:
        if name not in known:
            raise MethodError("unknown option of track", got=repr(name), wanted=did_you_mean(name, known))
    if isinstance(options.get("measures"), str):
        options["measures"] = tuple(part.strip() for part in options["measures"].split(",") if part.strip())
    return TrackConfig(**{**options, "measures": tuple(options.get("measures", ("loss",)))})


def _own_run(series: CheckpointSeries) -> "TrainingRun | None":
    """The run of the lab that these checkpoints are of."""
    folder = Path(series.checkpoints[0].source).parent
    if series.checkpoints[0].revision is not None or not (folder / "train.json").exists():
        return None
    from headwater.dynamics.lab.run import TrainingRun

    return TrainingRun.open(folder)


def own_tokens(run: "TrainingRun | Path") -> tuple[Tensor, Tensor]:
    """A run's first validation data, else the last sequences that it saw; and which of their tokens are predicted."""
    if isinstance(run, Path):
        from headwater.dynamics.lab.run import TrainingRun

        run = TrainingRun.open(run)
    if run.data.validation:
        rows, at = next(iter(run.data.validation.values()))
    else:
        rows, at = run.order.step(run.config.steps - 1), run.data.loss_at[0]
    return torch.from_numpy(rows), torch.from_numpy(at)


def _trained(run: "TrainingRun") -> tuple[Tensor | None, Tensor | None]:
    """One round of its data, as far as it was seen, and which of it carries a wrong label; None where that is much."""
    n = min(sum(source.n_sequences for source in run.data.sources), run.order.n_sequences)
    if n > _TRAINED:
        return None, None
    wrong = run.data.corrupted(0, n)
    return torch.from_numpy(run.data.rows(0, n)[0]), torch.from_numpy(wrong) if wrong.any() else None


def _about(
    series: CheckpointSeries,
    config: TrackConfig,
    behavior: "Behavior | None",
    tokens: Tensor | None,
    loss_at: Tensor | None,
) -> dict[str, Any]:
    """What the numbers depend on, besides the checkpoint."""
    digest = None
    if tokens is not None:
        at = b"" if loss_at is None else loss_at.numpy().tobytes()
        digest = hashlib.sha256(tokens.cpu().long().contiguous().numpy().tobytes() + at).hexdigest()
    shape = None if tokens is None else list(tokens.shape)
    hashed = None if behavior is None else behavior.hash
    return {"series": series.name, "config": asdict(config), "behavior": hashed, "tokens": digest, "shape": shape}


def _measure(probe: Probe, config: TrackConfig, one: Checkpoint) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in config.measures:
        try:
            rows[name] = measures.get(name)(probe, **config.settings.get(name, {}))
        except HeadwaterError as error:
            raise type(error)(
                f"measure {name!r} of {one.name}: {error.what}", got=error.got, wanted=error.wanted, fix=error.fix
            ) from error
    return {"step": one.step, "name": one.name, "fingerprint": probe.model.fingerprint, "rows": rows}


def _assemble(
    series: CheckpointSeries,
    config: TrackConfig,
    about: dict[str, Any],
    found: dict[int, dict[str, Any]],
    kept: dict[int, dict[str, Tensor]],
    seconds: float,
    behavior: Any,
) -> Timeline:
    rows: list[dict[str, Any]] = []
    for name in config.measures:
        compared = acrosses[name](kept) if name in acrosses else {}
        for one in series.checkpoints:
            of_step = [*found[one.step]["rows"][name], *compared.get(one.step, [])]
            rows += [{"step": one.step, "measure": name, **number} for number in of_step]
    values = pl.DataFrame(rows, schema=_VALUES)
    listed = [
        {"step": one.step, "name": one.name, "tokens": one.tokens, "fingerprint": found[one.step]["fingerprint"]}
        for one in series.checkpoints
    ]
    schema: dict[str, Any] = {"step": pl.Int64, "name": pl.String, "tokens": pl.Int64, "fingerprint": pl.String}
    return Timeline(
        tables={
            "values": values,
            "transitions": transitions(values, draws=config.draws, seed=config.seed),
            "checkpoints": pl.DataFrame(listed, schema=schema),
        },
        facts={"series": series.name, "checkpoints": len(series), "tokens": about["shape"]},
        config=asdict(config),
        provenance=Provenance.collect(None, behavior, seed=config.seed, seconds=seconds),
    )


# --- the folder: measured/<step>/ is whole or not there


def _folder(path: Path, about: dict[str, Any]) -> Path:
    """The folder of measurements, begun or gone on with. Raises StoreError for one of other settings."""
    folder = path / "measured"
    folder.mkdir(parents=True, exist_ok=True)
    file = path / "track.json"
    # several processes may begin at once: whoever holds the lock writes, the others read
    with _locked(path):
        if not file.exists():
            if any(folder.iterdir()):
                raise StoreError("will not track into a folder that holds something else", got=path)
            write_whole(file, to_json(about).encode())
    told = read_json(file, what="track.json of a timeline")
    if to_json(told) != to_json(about):
        changed = sorted(name for name in about if to_json(told.get(name)) != to_json(about[name]))
        raise StoreError(
            f"{path} holds a timeline of other settings",
            got=f"another {', '.join(changed)}",
            fix="Choose another --out",
        )
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, after waiting for it."""
    from filelock import FileLock

    with FileLock(folder / ".lock"):
        yield


class _Claims:
    """The checkpoint that this process is at; a killed process' claim falls with it."""

    def __init__(self, folder: Path | None, patient: bool) -> None:
        self.folder, self.patient, self._lock = folder, patient, None

    def taken(self, one: Checkpoint) -> bool:
        """Whether another process is at this checkpoint, or it is done; if not, it is this process' now."""
        if self.folder is None:
            return False
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / f".{one.step}.lock")
        try:
            lock.acquire(timeout=-1 if self.patient else 0)
        except Timeout:
            return True
        if _is_done(self.folder, one):
            lock.release()
            return True
        self._lock = lock
        return False

    def free(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _is_done(folder: Path, one: Checkpoint) -> bool:
    return (folder / str(one.step) / "rows.json").is_file()


def _store(folder: Path, one: Checkpoint, head: dict[str, Any], kept: dict[str, Tensor]) -> None:
    import shutil

    import safetensors.torch

    for left in folder.glob(f".{one.step}.tmp-*"):  # of a process that was killed here; the claim is this one's
        shutil.rmtree(left, ignore_errors=True)
    with whole_folder(folder / str(one.step), replaces="rows.json") as temporary:
        if kept:
            write_bytes(temporary / "kept.safetensors", safetensors.torch.save(kept))
        write_bytes(temporary / "rows.json", to_json(head).encode())


def _read(folder: Path, one: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import safetensors.torch

    place = folder / str(one.step)
    head = read_json(place / "rows.json", what=f"the measurements of step {one.step}")
    if head.get("name") != one.name:
        raise StoreError(f"{place} is of another checkpoint", got=head.get("name"), wanted=one.name)
    for rows in head["rows"].values():
        for number in rows:  # JSON has no NaN: what could not be measured is null there
            number["value"] = float("nan") if number["value"] is None else number["value"]
    file = place / "kept.safetensors"
    return head, safetensors.torch.load(file.read_bytes()) if file.exists() else {}


__all__ = ["Timeline", "TrackConfig", "track"]

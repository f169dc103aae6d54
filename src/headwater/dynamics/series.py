"""CheckpointSeries: the checkpoints of one training run, in order, wherever they are.

Steps come from names: Pythia's `step1000`; OLMo's `stage1-step1000-tokens5B` and `step1000-tokens4B`; folders
`step-1000`, `checkpoint-1000`, `step_1000`; and runs of `headwater train`. Names promise, weights keep:
`series.audit()` compares them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.core.cache import cache_root
from headwater.core.errors import ModelError, StoreError, did_you_mean
from headwater.core.loading_hf import first_line, probe
from headwater.dynamics.lab.run import TrainingRun

if TYPE_CHECKING:
    from headwater.core.model import Model
    from headwater.dynamics.audit import SeriesAudit

_NAME = re.compile(
    r"(?:stage(?P<stage>\d+)-)?(?:ingredient(?P<ingredient>\d+)-)?"
    r"(?:global)?(?:step|checkpoint|iter)[-_]?(?P<step>\d+)"
    r"(?:-tokens(?P<tokens>\d+(?:\.\d+)?)(?P<unit>[BMT]))?",
)
_UNITS = {"M": 10**6, "B": 10**9, "T": 10**12}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_BESIDE = ("*.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "*.txt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint. source: a hub id, or its folder. revision: of the hub. tokens: seen so far, where its name says.

    stage: of a training in stages, each of which counts its steps anew (OLMo-2).
    """

    step: int
    name: str
    source: str
    revision: str | None = None
    tokens: int | None = None
    stage: int | None = None

    def __str__(self) -> str:
        return f"{self.source}@{self.revision}" if self.revision else self.source


def parse_name(name: str) -> dict[str, int | None] | None:
    """stage, ingredient, step and tokens that a revision's or folder's name says; None for a name without a step."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    tokens = round(float(match["tokens"]) * _UNITS[match["unit"]]) if match["tokens"] else None
    numbers = {key: int(match[key]) if match[key] else None for key in ("stage", "ingredient", "step")}
    return {**numbers, "tokens": tokens}


class CheckpointSeries:
    """Checkpoints in the order of their steps. Made by `of`; a part of them by `select`.

    >>> series = CheckpointSeries.of("EleutherAI/pythia-70m").select(n=12)             # doctest: +SKIP
    >>> for checkpoint, model in series.load():                                        # doctest: +SKIP
    ...     measure(model)
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], *, name: str, cache_dir: str | Path | None = None) -> None:
        self.checkpoints = tuple(sorted(checkpoints, key=lambda one: one.step))
        self.name, self.cache_dir = name, cache_dir
        if not self.checkpoints:
            raise StoreError(f"{name} has no checkpoints", wanted="revisions or folders whose names say a step")
        steps = [one.step for one in self.checkpoints]
        if double := sorted({step for step in steps if steps.count(step) > 1}):
            both = [one.name for one in self.checkpoints if one.step == double[0]]
            raise StoreError(
                f"{name} has several checkpoints of one step", got=f"{double[0]}: {', '.join(both)}",
                fix="Choose: CheckpointSeries.of(..., stage=1), or give {step: folder}",
            )  # fmt: skip

    @classmethod
    def of(
        cls,
        source: "str | Path | Mapping[int, str | Path] | CheckpointSeries | TrainingRun",
        *,
        stage: int | None = None,
        ingredient: int | None = None,
        offline: bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "CheckpointSeries":
        """The checkpoints of a run of `headwater train`, of a folder of checkpoints, of a hub repository, or {step:
        folder or "repo@revision"}.

        stage, ingredient: of a repository that trains in stages (OLMo-2); the first stage where it is not said.
        offline: ask no network: the revisions that the local hub cache holds. cache_dir: as in `headwater.load`.
        Raises StoreError or ModelError where there are none.
        """
        if isinstance(source, CheckpointSeries):
            return source
        if isinstance(source, TrainingRun):
            source = source.path
        if isinstance(source, Mapping):
            return cls([_given(step, one) for step, one in source.items()], name="checkpoints", cache_dir=cache_dir)
        path = Path(source).expanduser()
        if path.is_dir():
            return cls(_of_folder(path, stage, ingredient), name=path.resolve().name)
        text = str(source)
        if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", text) or text.startswith("."):
            raise StoreError("no such checkpoints", got=text, wanted="a folder, a run, or a hub id (owner/name)")
        names = _revisions(text, bool(offline), cache_dir)
        found = [
            _checkpoint(name, text, name, parsed)
            for name, parsed in _chosen(names, stage, ingredient)
        ]  # fmt: skip
        if not found:
            got = f"{len(names)} revisions, such as {', '.join(names[:5])}" if names else "no revisions"
            raise StoreError(f"{text} has no revisions that are steps", got=got, wanted="such as step1000")
        return cls(found, name=text, cache_dir=cache_dir)

    @property
    def steps(self) -> list[int]:
        return [one.step for one in self.checkpoints]

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __getitem__(self, step: int) -> Checkpoint:
        for one in self.checkpoints:
            if one.step == step:
                return one
        near = sorted(self.steps, key=lambda other: abs(other - step))[:3]
        raise StoreError(f"{self.name} has no checkpoint of step {step}", wanted=f"near: {sorted(near)}")

    def __repr__(self) -> str:
        return f"CheckpointSeries({self.name!r}, {len(self)} checkpoints, steps {self.steps[0]} to {self.steps[-1]})"

    def select(
        self,
        steps: Sequence[int] | None = None,
        *,
        first: int | None = None,
        last: int | None = None,
        n: int | None = None,
        spacing: str = "log",
    ) -> "CheckpointSeries":
        """Some of them: these steps; or those from `first` to `last`, thinned to `n`, evenly in log(1 + step) or in
        step (`spacing="linear"`). The ends stay."""
        if steps is not None:
            return self._with([self[step] for step in dict.fromkeys(steps)])
        if spacing not in ("log", "linear"):
            raise StoreError("unknown spacing of checkpoints", got=repr(spacing), wanted="log or linear")
        low, high = self.steps[0] if first is None else first, self.steps[-1] if last is None else last
        kept = [one for one in self.checkpoints if low <= one.step <= high]
        if not kept:
            raise StoreError(f"{self.name} has no checkpoint from {first} to {last}", wanted=f"within {self.steps}")
        return self._with(kept if n is None else _thinned(kept, max(1, n), spacing))

    def _with(self, checkpoints: Sequence[Checkpoint]) -> "CheckpointSeries":
        return CheckpointSeries(checkpoints, name=self.name, cache_dir=self.cache_dir)

    def open(self, step: int, **options: Any) -> "Model":
        """The model of one step; options as in `headwater.load`."""
        return self._open(self[step], options)

    def load(
        self, *, ahead: int = 1, skip: Callable[[Checkpoint], bool] | None = None, **options: Any
    ) -> "Iterator[tuple[Checkpoint, Model]]":
        """(checkpoint, model) for each, in order.

        While one is looked at, the files of the next `ahead` are fetched in a thread: downloaded from the hub (what its
        cache holds is not fetched again), or read into memory from a disk.

        skip: asked of each before its model is built, and told True it is left out.

        Models are built in the caller's thread: transformers changes torch's default data type while it builds one.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="headwater-checkpoints") as pool:
            waiting: dict[int, Future[None]] = {}
            try:
                for number, one in enumerate(self.checkpoints):
                    for later in range(number, min(number + 1 + max(0, ahead), len(self))):
                        if later not in waiting:
                            waiting[later] = pool.submit(self.fetch, self.checkpoints[later])
                    waiting[number].result()
                    if skip is not None and skip(one):
                        continue
                    yield one, self._open(one, options)
            finally:
                for future in waiting.values():
                    future.cancel()

    def fetch(self, checkpoint: Checkpoint) -> None:
        """Bring a checkpoint's files close: into the hub cache, or into memory."""
        if checkpoint.revision is None:
            for file in weight_files(Path(checkpoint.source)):
                with file.open("rb") as data:
                    while data.read(1 << 24):
                        pass
            return
        snapshot(checkpoint, self.cache_dir)

    def _open(self, checkpoint: Checkpoint, options: dict[str, Any]) -> "Model":
        from headwater.core.loading import load

        if checkpoint.revision is None:
            return load(checkpoint.source, **options)
        whole = snapshot(checkpoint, self.cache_dir) is not None
        found = {"offline": whole, "cache_dir": self.cache_dir, **options}
        return load(checkpoint.source, revision=checkpoint.revision, **found)

    def audit(self, **options: Any) -> "SeriesAudit":
        """Whether every checkpoint holds what its name says: hashes, distances. See `headwater.dynamics.audit`."""
        from headwater.dynamics.audit import audit

        return audit(self, **options)


def weight_files(folder: Path) -> list[Path]:
    """The files with weights in a checkpoint's folder: safetensors where there are any, else pickled ones."""
    found = sorted(folder.glob("*.safetensors"))
    return found or sorted(folder.glob("pytorch_model*.bin"))


def hub_cache(cache_dir: str | Path | None) -> Path:
    """The hub cache that `headwater.load` uses with this `cache_dir`."""
    if cache_dir is not None:
        return cache_root(cache_dir) / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot(checkpoint: Checkpoint, cache_dir: str | Path | None, *, local: bool = False) -> Path | None:
    """The folder of a hub checkpoint's files in the cache, fetched first where they are not there; None where only a
    part is to be had. `local`: fetch nothing."""
    from huggingface_hub import snapshot_download

    where: dict[str, Any] = {
        "repo_id": checkpoint.source,
        "revision": checkpoint.revision,
        "cache_dir": str(hub_cache(cache_dir)),
        "allow_patterns": [*_WEIGHTS, *_PICKLED, *_BESIDE],
    }
    try:
        found = Path(str(snapshot_download(**where, local_files_only=True)))
        if weight_files(found) and (found / "config.json").exists():
            return found
    except Exception:  # not there, or only a part of it: the library has an error for each case
        found = None
    if local or probe(checkpoint.source, checkpoint.revision) is not None:
        return None
    names = _hub_files(checkpoint)
    chosen = _PICKLED if not any(name.endswith(".safetensors") for name in names) else _WEIGHTS
    try:
        return Path(str(snapshot_download(**{**where, "allow_patterns": [*chosen, *_BESIDE]})))
    except Exception as error:
        raise ModelError(f"cannot fetch {checkpoint}", got=first_line(error), fix="Run again: it goes on") from error


def _hub_files(checkpoint: Checkpoint) -> list[str]:
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(checkpoint.source, revision=checkpoint.revision))
    except Exception as error:
        raise ModelError(f"cannot list the files of {checkpoint}", got=first_line(error)) from error


def _revisions(repo: str, offline: bool, cache_dir: str | Path | None) -> list[str]:
    """Names of branches and tags: the hub's, or (offline, or where it cannot be asked) those in the local cache."""
    reason = "offline was asked for" if offline else probe(repo, None)
    if reason is None:
        from huggingface_hub import HfApi

        try:
            refs = HfApi().list_repo_refs(repo)
        except Exception as error:
            raise ModelError(f"cannot list the revisions of {repo}", got=first_line(error)) from error
        return sorted({one.name for one in (*refs.branches, *refs.tags)})
    from huggingface_hub import scan_cache_dir

    folder = hub_cache(cache_dir)
    cached = scan_cache_dir(folder) if folder.is_dir() else None
    mine = (
        next((one for one in cached.repos if one.repo_id == repo and one.repo_type == "model"), None)
        if cached
        else None
    )
    if mine is None:
        got = f"{reason}, and the local hub cache does not hold it"
        raise ModelError(f"cannot find the checkpoints of {repo}", got=got, fix="Load it once with a network")
    return sorted(mine.refs)


def _chosen(names: Sequence[str], stage: int | None, ingredient: int | None) -> list[tuple[str, dict[str, int | None]]]:
    parsed = [(name, found) for name in names if (found := parse_name(name)) is not None]
    stages = sorted({found["stage"] for _, found in parsed if found["stage"] is not None})
    if stage is not None and stage not in stages:
        raise StoreError(f"no checkpoints of stage {stage}", wanted=f"one of: {stages or 'no stages'}")
    wanted = stage if stage is not None else (stages[0] if stages else None)
    kept = [(name, found) for name, found in parsed if found["stage"] == wanted]
    parts = sorted({found["ingredient"] for _, found in kept if found["ingredient"] is not None})
    if parts:
        part = ingredient if ingredient is not None else parts[0]
        if part not in parts:
            raise StoreError(f"no ingredient {part} in stage {wanted}", wanted=f"one of: {parts}")
        kept = [(name, found) for name, found in kept if found["ingredient"] == part]
    return kept


def _checkpoint(name: str, source: str, revision: str | None, parsed: dict[str, int | None]) -> Checkpoint:
    return Checkpoint(
        step=int(parsed["step"] or 0),
        name=name,
        source=source,
        revision=revision,
        tokens=parsed["tokens"],
        stage=parsed["stage"],
    )


def _given(step: int, source: str | Path) -> Checkpoint:
    text = str(source)
    if Path(text).expanduser().is_dir():
        return Checkpoint(step=int(step), name=Path(text).name, source=str(Path(text).expanduser()))
    repo, at, revision = text.partition("@")
    if not at:
        raise StoreError(f"no checkpoint of step {step}", got=text, wanted="a folder, or owner/name@revision")
    return Checkpoint(step=int(step), name=revision, source=repo, revision=revision)


def _of_folder(path: Path, stage: int | None, ingredient: int | None) -> list[Checkpoint]:
    folders = {entry.name: entry for entry in path.iterdir() if entry.is_dir() and (entry / "config.json").exists()}
    found = [
        _checkpoint(name, str(folders[name]), None, parsed)
        for name, parsed in _chosen(sorted(folders), stage, ingredient)
    ]
    if not found:
        near = did_you_mean("step-1000", folders) if folders else "none with a config.json"
        raise StoreError(f"no checkpoints in {path}", got=f"folders: {near}", wanted="folders such as step-1000")
    if (path / "train.json").exists():
        run = TrainingRun.open(path)
        whole = set(run.steps)
        found = [one for one in found if one.step in whole]
        per_step = run.config.batch * int(run.head.get("sequence_length") or 0)
        found = [Checkpoint(**{**vars(one), "tokens": one.step * per_step}) for one in found]
    return found


def _thinned(checkpoints: list[Checkpoint], n: int, spacing: str) -> list[Checkpoint]:
    import math

    if n >= len(checkpoints):
        return checkpoints
    if n == 1:
        return checkpoints[-1:]

    def place(step: int) -> float:
        return math.log1p(step - checkpoints[0].step) if spacing == "log" else float(step)

    low, high = place(checkpoints[0].step), place(checkpoints[-1].step)
    kept: list[Checkpoint] = []
    for number in range(n):
        aim = low + (high - low) * number / (n - 1)
        free = [one for one in checkpoints if one not in kept]
        kept.append(min(free, key=lambda one: abs(place(one.step) - aim)))
    return kept


__all__ = ["Checkpoint", "CheckpointSeries", "hub_cache", "parse_name", "snapshot", "weight_files"]

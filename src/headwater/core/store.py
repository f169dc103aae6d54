"""RunFolder: the folder of one run. Stages are stored whole or not at all, one process writes, anyone reads."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from headwater.core.errors import StoreError, did_you_mean
from headwater.core.files import (
    clean_leftovers,
    read_json,
    store_error,
    to_json,
    whole_folder,
    write_bytes,
    write_whole,
)
from headwater.core.results import Result, check_format, load_result

RUN_FORMAT = 1
_STAGE = re.compile(r"[a-z][a-z0-9_]*")


class RunFolder:
    """The folder of one run.

        run.json                              format, headwater version, the run's config
        stages/<stage>/stage.json             the stage's results and their content hashes, its facts
        stages/<stage>/<name>/result.json     each result, as `Result.save` writes it
        run.lock                              held by the process that writes; free again when it ends, however it ends

    `create` and `open(write=True)` take the lock: use them with `with`, or call `close`.
    """

    def __init__(self, path: Path, config: dict[str, Any], lock: IO[bytes] | None) -> None:
        self.path, self.config, self._lock = path, config, lock

    @classmethod
    def create(cls, folder: str | Path, config: Mapping[str, Any]) -> "RunFolder":
        """A new run in an empty or new folder, locked for writing; a run of the same config goes on.

        Raises StoreError where the folder holds something else or a run of another config, or cannot be written.
        """
        path = Path(folder)
        if (path / "run.json").exists():
            run = cls.open(path, write=True)
            if to_json(run.config) != to_json(config):
                if not run.stages:  # a first try that was refused (a mistyped model, say): nothing is lost
                    run._write_head(config)
                    return run
                run.close()
                changed = _changed(run.config, config)
                raise StoreError(
                    f"{path} holds a run with another config",
                    got=f"other values of {', '.join(changed)}",
                    fix="Choose another folder with --out, or remove this one",
                )
            return run
        try:
            occupied = path.exists() and (not path.is_dir() or any(p.name != "run.lock" for p in path.iterdir()))
            if occupied and not cls._only_leftovers(path):
                raise StoreError(
                    "will not start a run in a folder that holds something else", got=path, fix="Choose a new one"
                )
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise store_error(error, path, "create") from error
        lock = take_lock(path)
        try:
            run = cls(path, {}, lock)
            run._write_head(config)
            return cls.open(path, _lock=lock)
        except BaseException:
            lock.close()
            raise

    def _write_head(self, config: Mapping[str, Any]) -> None:
        from headwater import __version__

        head = {"format": RUN_FORMAT, "headwater": __version__, "config": config}
        write_whole(self.path / "run.json", to_json(head).encode())
        self.config = cast(dict[str, Any], json.loads(to_json(config)))

    @classmethod
    def open(cls, folder: str | Path, *, write: bool = False, _lock: IO[bytes] | None = None) -> "RunFolder":
        """An existing run. `write=True` takes the lock and clears away what a killed process left half-written."""
        path = Path(folder)
        if not path.is_dir():
            raise StoreError("no such run", got=path, fix="Give the folder that `headwater trace --out` wrote")
        head = read_json(path / "run.json", what="run.json (what makes a folder a run)")
        check_format(head.get("format"), RUN_FORMAT, path)
        lock = _lock or (take_lock(path) if write else None)
        if lock is not None:
            try:
                clean_leftovers(path)
                clean_leftovers(path / "stages")
            except OSError as error:
                lock.close()
                raise store_error(error, path, "clean up") from error
        return cls(path, cast(dict[str, Any], head.get("config") or {}), lock)

    @property
    def stages(self) -> list[str]:
        """The stages that are stored, by name."""
        folder = self.path / "stages"
        if not folder.is_dir():
            return []
        return sorted(entry.name for entry in folder.iterdir() if (entry / "stage.json").exists())

    def has(self, stage: str) -> bool:
        """Whether `stage` is stored (a stage is stored whole or not at all)."""
        return (self.path / "stages" / _stage_name(stage) / "stage.json").exists()

    def save_stage(
        self, stage: str, results: Result | Mapping[str, Result], *, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Store what a stage found: one result, or several by name. Replaces the stage if it is stored already.

        `facts` are small JSON values that belong to the stage as a whole; like everything else in `stage.json` they
        should not depend on the time of day, so that a resumed run gives the same bytes. Raises StoreError; earlier
        stages stay readable.
        """
        self._must_write()
        name = _stage_name(stage)
        named = {results.kind: results} if isinstance(results, Result) else dict(results)
        for key in named:
            _stage_name(key)
        with whole_folder(self.path / "stages" / name, replaces="stage.json") as temporary:
            for key, result in sorted(named.items()):
                (temporary / key).mkdir()
                result.write_into(temporary / key)
            hashes = {key: result.content_hash for key, result in named.items()}
            head = {"format": RUN_FORMAT, "stage": name, "results": hashes, "facts": dict(facts or {})}
            write_bytes(temporary / "stage.json", to_json(head).encode())

    def load_stage(self, stage: str, *, check: bool = False) -> dict[str, Result]:
        """The results of a stored stage, by name. `check=True` recomputes their content hashes. Raises StoreError."""
        names = self._head(stage)["results"]
        return {key: self.load(stage, key, check=check) for key in names}

    def load(self, stage: str, name: str, *, check: bool = False) -> Result:
        """One result of a stored stage."""
        known = self._head(stage)["results"]
        if name not in known:
            raise StoreError(
                f"stage {stage!r} of {self.path} has no such result", got=name, wanted=did_you_mean(name, known)
            )
        return load_result(self.path / "stages" / _stage_name(stage) / _stage_name(name), check=check)

    def facts(self, stage: str) -> dict[str, Any]:
        """The facts stored with a stage."""
        return self._head(stage)["facts"]

    def hashes(self) -> dict[str, dict[str, str]]:
        """Content hash of every stored result, by stage and name: equal for a resumed and an undisturbed run."""
        return {stage: self._head(stage)["results"] for stage in self.stages}

    def remove_stage(self, stage: str) -> None:
        """Forget a stored stage, so that it runs again."""
        self._must_write()
        folder = self.path / "stages" / _stage_name(stage)
        try:
            with contextlib.suppress(FileNotFoundError):
                (folder / "stage.json").unlink()  # first, so that a half-removed stage is not taken for a stored one
                shutil.rmtree(folder)
        except OSError as error:
            raise store_error(error, folder, "remove") from error

    def write_file(self, name: str, data: bytes | str) -> Path:
        """Write one file into the folder (a report), whole. Raises StoreError."""
        self._must_write()
        path = self.path / name
        if path.resolve().parent != self.path.resolve():
            raise StoreError("a run's file must lie in its folder", got=name)
        write_whole(path, data.encode() if isinstance(data, str) else data)
        return path

    def close(self) -> None:
        """Let the next process write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _must_write(self) -> None:
        if self._lock is None:
            fix = "Open it with RunFolder.open(folder, write=True)"
            raise StoreError(f"{self.path} is open for reading only", fix=fix)

    def _head(self, stage: str) -> dict[str, Any]:
        folder = self.path / "stages" / _stage_name(stage)
        if not self.has(stage):
            raise StoreError(
                f"{self.path} has no stage {stage!r} yet",
                wanted=did_you_mean(stage, self.stages),
                fix="Run `headwater resume`",
            )
        head = read_json(folder / "stage.json", what="stage.json of a stored stage")
        check_format(head.get("format"), RUN_FORMAT, folder)
        return {"results": dict(head.get("results") or {}), "facts": dict(head.get("facts") or {})}

    @staticmethod
    def _only_leftovers(path: Path) -> bool:
        """Whether a process was killed here before it could write run.json."""
        return path.is_dir() and all(
            entry.name == "run.lock" or entry.name.startswith(".run.json.tmp-") for entry in path.iterdir()
        )


def _stage_name(name: str) -> str:
    if not _STAGE.fullmatch(name):
        raise StoreError("not a stage's name", got=repr(name), wanted="lower-case letters, digits and underscores")
    return name


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = sorted({*old, *new})
    return [key for key in keys if to_json(old.get(key)) != to_json(new.get(key))]


def take_lock(path: Path) -> IO[bytes]:
    """Lock the run for this process. The operating system frees it when the process ends, also by kill -9."""
    try:
        file = (path / "run.lock").open("ab")
    except OSError as error:
        raise store_error(error, path, "lock") from error
    try:
        if os.name == "nt":  # pragma: no cover
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise StoreError(
            f"another process writes to {path}",
            got=type(error).__name__,
            fix="Wait until it ends, or choose another folder",
        ) from None
    return file

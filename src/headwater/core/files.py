"""Plain files written whole: canonical JSON, and files and folders that appear complete or not at all."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Generator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from headwater.core.errors import StoreError

JSON = Any  # what `plain` returns: None, bool, int, float, str, list or dict of these
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(tmp|old)-[0-9a-f]{12}$")
_ELSEWHERE = "choose another folder with --out"
_FIXES = {
    errno.ENOSPC: "The disk is full: free some space, then go on with `headwater resume`; what is stored is whole",
    errno.EDQUOT: "The disk quota is used up: free some space, then go on with `headwater resume`",
    errno.EROFS: f"The file system is read-only: {_ELSEWHERE}",
    errno.EACCES: f"This user may not: {_ELSEWHERE}, or change the folder's permissions",
    errno.EPERM: f"This user may not: {_ELSEWHERE}, or change the folder's permissions",
    errno.ENOTDIR: f"A part of the path is a file, not a folder: {_ELSEWHERE}",
    errno.ENAMETOOLONG: "The name is too long for this file system: choose a shorter one",
}


def plain(value: object) -> JSON:
    """`value` as strict JSON data: tuples become lists, numpy and torch scalars numbers, dataclasses dicts, paths text.

    JSON has no NaN and no infinity: NaN (not measured) becomes null, infinities the texts "Infinity" and "-Infinity".
    Raises StoreError for a value that has no plain form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value)
        return {str(key): plain(item) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(list[Any], value)]
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in cast(set[Any], value)), key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return plain(cast(Any, value).tolist())
    if hasattr(value, "model_dump"):  # pydantic models
        return plain(cast(Any, value).model_dump())
    raise StoreError("cannot write a value as JSON", got=type(value).__name__, wanted="numbers, text, lists or dicts")


def to_json(value: object, *, indent: int | None = 1) -> str:
    """JSON text whose bytes depend on the data alone: sorted keys, strict numbers; ends in a newline where indented."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(
        plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators
    )
    return text if indent is None else text + "\n"


def read_json(path: Path, *, what: str) -> dict[str, Any]:
    """The JSON object in `path`; StoreError names `what` where it is missing or broken."""
    again = "Remove the folder and run the step again"
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{what} is missing", got=path, fix="Check the folder's name, or run the step again") from None
    except OSError as error:
        raise store_error(error, path, "read") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{what} is not valid JSON", got=f"{path}: {error}", fix=again) from None
    if not isinstance(value, dict):
        raise StoreError(f"{what} does not hold a JSON object", got=path, fix=again)
    return cast(dict[str, Any], value)


def store_error(error: OSError, path: Path, verb: str) -> StoreError:
    """What the operating system said, with the mend."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    fix = _FIXES.get(error.errno or 0, f"Check the folder, or {_ELSEWHERE}")
    return StoreError(f"cannot {verb} {path}", got=reason, fix=fix)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` and wait until it is on the disk. Not atomic: use inside `whole_folder`, or use `write_whole`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part. Raises StoreError."""
    temporary = path.parent / _temporary_name(path.name, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(temporary, data)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise store_error(error, path, "write") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, replaces: str | None = None) -> Generator[Path]:
    """A temporary folder to fill; when the block ends it becomes `path` by one rename, on an error it is removed.

    `replaces` names a file that marks a folder which may be replaced (a saved result by a saved result); any other
    non-empty folder is left alone and refused. Raises StoreError.
    """
    temporary = path.parent / _temporary_name(path.name, "tmp")
    try:
        if _occupied(path) and not (replaces and (path / replaces).exists()):
            what = "will not write over a folder that holds something else"
            raise StoreError(what, got=path, fix="Choose an empty or new folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for folder, _, _ in os.walk(temporary):
            _sync_folder(Path(folder))
        _put_in_place(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise store_error(error, path, "write") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def holds_something(folder: Path) -> bool:
    """Whether a folder holds anything but what a killed process left half-written."""
    return folder.exists() and any(_TEMPORARY.match(entry.name) is None for entry in folder.iterdir())


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what a killed process left half-written in `folder`, and put back what it had moved aside.

    Returns the names. Call only where no other process writes (a run's lock is held).
    """
    removed: list[str] = []
    if not folder.is_dir():
        return removed
    for entry in sorted(folder.iterdir()):
        match = _TEMPORARY.match(entry.name)
        if match is None:
            continue
        original = folder / match["name"]
        if match[2] == "old" and not original.exists():  # killed between the two renames: the old one is the truth
            os.rename(entry, original)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        removed.append(entry.name)
    return removed


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; a folder that is there moves aside first, as no rename replaces a full folder."""
    if not path.exists():
        os.rename(temporary, path)
        return
    old = path.parent / _temporary_name(path.name, "old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _occupied(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _temporary_name(name: str, what: str) -> str:
    return f".{name}.{what}-{uuid.uuid4().hex[:12]}"


def _sync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` durable; not every platform can open a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Where prepared models are kept, and how several processes share that place.

`$HEADWATER_CACHE`, else the platform's cache folder. One model is one folder `models/<key>/weights`, which appears
whole or not at all; a lock file beside it makes one process prepare it while the others wait.
"""

import contextlib
import os
import re
import shutil
import sys
import uuid
from collections.abc import Generator
from pathlib import Path

from headwater.core.errors import ModelError
from headwater.core.files import clean_leftovers, store_error

MARK = "headwater.json"  # written last: a folder that has it is whole


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: the argument, else `$HEADWATER_CACHE`, else the platform's own (it need not exist yet)."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    if told := os.environ.get("HEADWATER_CACHE"):
        return Path(told).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "headwater"


def model_folder(root: Path, key: str) -> Path:
    """The folder of one prepared model. `key` is made safe for every file system."""
    return root / "models" / (re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip(".-") or "model") / "weights"


def is_whole(folder: Path) -> bool:
    return (folder / MARK).is_file()


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the lock that belongs to `folder`; it falls with the process that holds it. Raises ModelError where the
    cache cannot be written."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / ".lock")
        lock.acquire()
    except OSError as error:
        raise unwritable(error, folder.parent) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Generator[Path]:
    """A folder for passing work, removed at the end; hold the lock. What killed processes left in `parent` goes first
    (the name is one that `clean_leftovers` knows)."""
    clean_leftovers(parent)
    scratch = parent / f".scratch.tmp-{uuid.uuid4().hex[:12]}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def unwritable(error: OSError, folder: Path) -> ModelError:
    """The error for a cache that cannot be written, with the mend."""
    said = store_error(error, folder, "write")
    return ModelError(
        f"cannot prepare a model in the cache {folder}",
        got=said.got,
        fix="Free some space there, or set HEADWATER_CACHE (or cache_dir=) to a folder you may write",
    )

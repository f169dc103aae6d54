"""What a run's data has been changed by, as files beside its settings: which other samples stand at which places of the
order, and which places weigh more or less. The order stays a function of the seed and of what is stored.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import StoreError
from headwater.core.files import store_error, to_json, write_whole

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Change:
    """places: [m], rising; samples: [m], the numbers in the unchanged order of what stands there now. weighted: [w],
    rising; weights: [w], what the loss of the sequence at that place is multiplied by (1 elsewhere). about: what was
    asked for, in plain data."""

    places: Ints
    samples: Ints
    weighted: Ints
    weights: NDArray[np.float64]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A hash of the whole."""
        digest = hashlib.sha256(to_json(self.about, indent=None).encode())
        for array in (self.places, self.samples, self.weighted, self.weights):
            digest.update(f"{len(array)}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def shown(self, places: Ints) -> Ints:
        """The number, in the unchanged order, of the sample at each place."""
        at = np.searchsorted(self.places, places)
        inside = at < len(self.places)
        found = inside & (self.places[np.where(inside, at, 0)] == places) if len(self.places) else inside
        out = np.array(places, dtype=np.int64)
        out[found] = self.samples[at[found]]
        return out

    def weight(self, places: Ints) -> NDArray[np.float64] | None:
        """[n], or None where no place of the run has a weight of its own."""
        if not len(self.weighted):
            return None
        at = np.minimum(np.searchsorted(self.weighted, places), len(self.weighted) - 1)
        return np.where(self.weighted[at] == places, self.weights[at], 1.0)

    def save(self, folder: Path) -> str:
        """Write it as `change-<name>.safetensors`; the name."""
        import safetensors.numpy

        arrays = {"places": self.places, "samples": self.samples, "weighted": self.weighted, "weights": self.weights}
        write_whole(_file(folder, self.name), safetensors.numpy.save(arrays, {"about": to_json(self.about)}))
        return self.name


def load(folder: Path | None, name: str) -> Change:
    """The change of that name. Raises StoreError where it is missing or not what it was."""
    import safetensors
    import safetensors.numpy

    again = "Make the run by `headwater redo` (headwater.dynamics.redo), which writes it"
    if folder is None or not name.isalnum():
        raise StoreError("a change of the data lies in the folder of its run", got=repr(name), fix=again)
    file = _file(folder, name)
    try:
        data = file.read_bytes()
        arrays = safetensors.numpy.load(data)
        with safetensors.safe_open(file, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {}).get("about", "{}"))
        change = Change(about=about, **arrays)
    except FileNotFoundError:
        raise StoreError("the change of this run's data is missing", got=file, fix=again) from None
    except OSError as error:
        raise store_error(error, file, "read") from error
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged", got=str(error).splitlines()[0], fix=again) from None
    if change.name != name:
        raise StoreError(f"{file} is not the change that the run was begun with", got=change.name, wanted=name)
    return change


def _file(folder: Path, name: str) -> Path:
    return folder / f"change-{name}.safetensors"

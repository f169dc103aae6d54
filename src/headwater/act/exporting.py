"""Edited models as folders: a normal checkpoint that transformers loads, and beside it how to take the edits off."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headwater.act.applying import applied, base_fingerprint, originals, parameters_of
from headwater.act.edit import Edit, load_tensors, save_tensors
from headwater.core.errors import ModelError, StoreError
from headwater.core.files import read_json, to_json, whole_folder, write_bytes

if TYPE_CHECKING:
    from headwater.core.model import Model

RECORD = "headwater_edits"
_LIST = "edits.json"


def export(model: "Model", folder: str | Path) -> Path:
    """Write the model with the edits that are on it as a normal checkpoint: weights, configuration, tokenizer.

    Beside them, in `headwater_edits`, lie the edits and the numbers that they wrote over, so that `list_edits` can tell
    them and `restore` take them off. The model in memory stays as it is. Raises StoreError where the folder holds
    something else, ModelError for a model without edits.
    """
    edits = applied(model)
    if not edits:
        raise ModelError("there is no edit to export", got=f"{model.name} as it was loaded")
    path = Path(folder)
    with model.held(), whole_folder(path, replaces=f"{RECORD}/{_LIST}") as new:
        write_checkpoint(model, new)
        record = new / RECORD
        record.mkdir()
        facts = {
            "model": model.name,
            "before": base_fingerprint(model),
            "after": model.fingerprint,
            "edits": [_file_name(at) for at in range(len(edits))],
        }
        for at, edit in enumerate(edits):
            edit.save(record / _file_name(at))
        save_tensors(record / "before.safetensors", {"kind": "before"}, originals(model))
        write_bytes(record / _LIST, to_json(facts).encode())
    return path


def write_checkpoint(model: "Model", folder: Path) -> None:
    """Weights, configuration and tokenizer of a model as it is now, as transformers writes them."""
    from headwater.core.loading_hf import calm

    hf: Any = model.hf
    try:
        with calm():
            hf.save_pretrained(folder)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"transformers cannot write {model.name} as a checkpoint", got=error) from error


def list_edits(path: str | Path) -> list[Edit]:
    """The edits of a file, or of a folder that `export` wrote, in the order in which they were applied. Raises
    StoreError."""
    where = Path(path)
    if not where.is_dir():
        return [Edit.load(where)]
    return [Edit.load(where / RECORD / name) for name in _record(where)["edits"]]


def restore(folder: str | Path, model: "Model") -> "Model":
    """Take the edits of a folder that `export` wrote off a model that was loaded from it, to the bit.

    Raises ModelError where the model is not that one, or does not become what it was before.
    """
    facts = _record(Path(folder))
    if model.fingerprint != facts["after"]:
        raise ModelError(
            "this model is not the one that was exported there",
            got=model.fingerprint,
            wanted=f"{facts['after']}, in the data type it was exported in",
        )
    _, before = load_tensors(Path(folder) / RECORD / "before.safetensors")
    known = parameters_of(model.hf, before)
    with model.held(), torch.no_grad():
        for name, value in before.items():
            if known[name].shape != value.shape or known[name].dtype != value.dtype:
                raise StoreError(f"what was kept of {name} does not fit it", got=f"{list(value.shape)} {value.dtype}")
        for name, value in before.items():
            known[name].copy_(value)
    if model.fingerprint != facts["before"]:
        raise ModelError("the model did not become what it was", got=model.fingerprint, wanted=facts["before"])
    return model


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD / _LIST).is_file():
        raise StoreError("this folder holds no edited model", got=folder, wanted="a folder of `headwater edit apply`")
    facts = read_json(folder / RECORD / _LIST, what=f"{RECORD}/{_LIST}")
    names = facts.get("edits")
    texts = all(isinstance(facts.get(key), str) for key in ("before", "after", "model"))
    if not texts or not isinstance(names, list) or names != [_file_name(at) for at in range(len(names))]:
        raise StoreError(f"{RECORD}/{_LIST} is not whole", got=folder)
    return facts


def _file_name(at: int) -> str:
    return f"{at:03d}.safetensors"

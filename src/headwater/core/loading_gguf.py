"""GGUF files: dequantized once, kept as safetensors, read back and compared before the copy counts."""

import contextlib
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headwater.core.cache import MARK, is_whole, locked, scratch_folder, unwritable
from headwater.core.errors import ModelError
from headwater.core.files import to_json, whole_folder
from headwater.core.fingerprint import fingerprint
from headwater.core.loading_hf import calm, first_line, library, log

_LARGEST = 8 << 30  # bytes of dequantized weights; larger models are not copied into the cache, which would fill disks


def gguf_key(path: Path) -> str:
    """A name for a GGUF file's content: its size, its head, and 64 blocks spread over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for i in range(64):
            file.seek(i * max(0, size - 65536) // 63)
            digest.update(file.read(65536))
    return f"{path.stem}-{digest.hexdigest()[:12]}"


def check_gguf(path: Path) -> None:
    """Raise ModelError unless the file begins like a GGUF file."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {path}", got=os.strerror(error.errno or 0)) from error
    if magic != b"GGUF":
        raise ModelError(
            f"{path.name} is not a GGUF file",
            got=f"a file that begins with {magic!r}",
            wanted="a .gguf file, or the folder that holds config.json and the safetensors",
        )


def read_gguf(path: Path, *, dtype: torch.dtype | str = "auto") -> tuple[Any, Any | None]:
    """The model and tokenizer of a GGUF file, as plain `transformers` objects (their weights are ordinary tensors).

    Raises ModelError where `transformers` cannot read the architecture or the file is broken.
    """
    check_gguf(path)
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # Its conversion bar is a bare tqdm that no setting turns off.
    with calm(), contextlib.redirect_stderr(io.StringIO()):
        try:
            hf = library().AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype, **where)
        except Exception as error:
            raise ModelError(
                f"cannot read the GGUF file {path.name}",
                got=first_line(error),
                fix="The file may be cut short, or of an architecture that transformers does not read from GGUF",
            ) from error
        try:
            tokenizer = library().AutoTokenizer.from_pretrained(str(path.parent), **where)
        except Exception as error:
            log.warning("%s: its tokenizer cannot be read (%s); pass tokenizer=", path.name, first_line(error))
            tokenizer = None
    # The weights are dense now; these marks are all that keeps transformers from saving the model.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(hf):
            delattr(hf, name)
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config
    return hf.eval(), tokenizer


def prepare(folder: Path, find: Callable[[Path], Path], facts: dict[str, Any]) -> Path | tuple[Any, Any | None]:
    """The whole cache folder of a GGUF model: the one that is there, or a new one.

    `find(scratch)` returns the GGUF's path and may use the scratch folder to fetch it. Where the model is too large to
    copy, the loaded (model, tokenizer) come back instead. Safe under several processes and under a kill at any moment.
    Raises ModelError.
    """
    if is_whole(folder):
        return folder
    with locked(folder):
        if is_whole(folder):  # another process made it while this one waited
            return folder
        try:
            with scratch_folder(folder.parent) as scratch:
                path = find(scratch)
                hf, tokenizer = read_gguf(path)
                if sum(p.numel() * p.element_size() for p in hf.parameters()) > _LARGEST:
                    log.warning("%s is too large to keep a dequantized copy; each load converts it again", path.name)
                    return hf, tokenizer
                with whole_folder(folder, replaces="config.json") as new:
                    _write(hf, tokenizer, new, {**facts, "gguf": path.name}, scratch)
        except OSError as error:
            raise unwritable(error, folder.parent) from error
    return folder


def _write(hf: Any, tokenizer: Any | None, new: Path, facts: dict[str, Any], scratch: Path) -> None:
    with calm():
        try:
            hf.save_pretrained(new)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            copy = library().AutoModelForCausalLM.from_pretrained(str(new), local_files_only=True)
        except OSError:
            raise
        except Exception as error:  # safetensors wraps the system's own errors
            raise ModelError("cannot keep a dequantized copy", got=first_line(error)) from error
    was, now = fingerprint(hf), fingerprint(copy)
    if was != now:
        raise ModelError("the dequantized copy differs from the model that was written", got=now, wanted=was)
    for licence in scratch.glob("upstream-*"):
        (new / licence.name).write_bytes(licence.read_bytes())
    for path in new.iterdir():  # the rename that follows must not overtake the data
        path.chmod(0o644)
        with path.open("r+b") as file:  # some platforms sync only what may be written
            os.fsync(file.fileno())
    (new / MARK).write_text(to_json({**facts, "fingerprint": now}), encoding="utf-8")

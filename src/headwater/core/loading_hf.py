"""Loading from a folder or the hub with `transformers`, nothing silent: each weight is there, in its right shape."""

import contextlib
import importlib
import logging
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headwater.core.errors import ModelError

log = logging.getLogger("headwater.loading")
_PROBE_SECONDS = 5.0
_HALF = (torch.float16, torch.bfloat16)
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "spiece*",
    "sentencepiece*",
    "special_tokens_map.json",
)
# Architectures of headwater's own, by model_type: the module that tells transformers of each. By name, so that no
# import points upwards.
_OWN = {"headwater_plain": "headwater.bench.plain", "headwater_hooked": "headwater.bench.siit.hooked"}
_NO_TOKENIZER = "this model has no tokenizer here; pass tokenizer=, or run it on token ids"


class Loaded(NamedTuple):
    """What was loaded. `processor` is an image or audio processor where the model reads images or sound."""

    hf: Any
    tokenizer: Any | None
    name: str
    processor: Any | None = None


def library(module: str = "") -> Any:
    """`transformers`, or a module of it, without its partial type hints, which strict checking cannot follow."""
    return importlib.import_module(f"transformers.{module}" if module else "transformers")


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, short enough for one paragraph."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def calm(*, bars: bool = False) -> Generator[None]:
    """Keep `transformers` from writing to the terminal; its settings are put back. `bars`: leave its bars be."""
    from transformers.utils import logging as hf_logging

    verbosity, active = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)  # what would be reported there is raised here
    if active and not bars:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if active and not bars:
            hf_logging.enable_progress_bar()


def probe(repo: str, revision: str | None) -> str | None:
    """Ask the hub once, without retries, whether it has `repo`.

    Returns None where it does, a reason where it cannot be asked (then a local hub cache may still serve). Raises
    ModelError where it answers that the repository or revision does not exist or is not open to this user.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        HfApi().model_info(repo, revision=revision, timeout=_PROBE_SECONDS)
    except errors.GatedRepoError as error:
        raise ModelError(
            f"the hub repository {repo} is gated", got=first_line(error), fix="Ask for access on its page, then log in"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the hub repository {repo} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no repository {repo!r} that you may read") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repo!r} is not a hub id", got=first_line(error)) from error
    except Exception as error:
        return f"the hub cannot be reached ({first_line(error)})"
    return None


def from_pretrained(
    source: str,
    *,
    name: str,
    revision: str | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
    device_map: Any,
    trust_remote_code: bool,
    tokenizer: Any,
    local_only: bool,
    hub_cache: Path | None,
) -> Loaded:
    """Load `source` (a folder or hub id) with the class that its config names. Raises ModelError."""
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local_only}
    if revision is not None:
        common["revision"] = revision
    if hub_cache is not None:
        common["cache_dir"] = str(hub_cache)
    with calm(bars=not local_only):
        config = _config(source, name, common)
        cls = _model_class(config, name, trust_remote_code)
        options: dict[str, Any] = {"device_map": device_map} if device_map is not None else {}
        # Half precision is slow on CPUs and its rounding hides small effects: widened there unless a type is asked for.
        widen = dtype is None and device_map is None and (device is None or device.type == "cpu")
        widen = widen and getattr(config, "quantization_config", None) is None
        chosen = dtype or (torch.float32 if widen and getattr(config, "dtype", None) in _HALF else "auto")
        hf = _weights(cls, source, name, config, {**common, **options, "dtype": chosen})
        if widen and getattr(hf, "dtype", None) in _HALF:
            hf = hf.float()
        if device is not None and device_map is None:
            hf = hf.to(device)
        hf.eval()
        return Loaded(hf, find_tokenizer(tokenizer, source, common), name, _processor(source, config, common))


def _config(source: str, name: str, common: dict[str, Any]) -> Any:
    transformers = library()
    try:
        return transformers.AutoConfig.from_pretrained(source, **common)
    except Exception as error:
        for model_type, module in _OWN.items():
            if f"`{model_type}`" in str(error) and module not in sys.modules:
                importlib.import_module(module)
                return _config(source, name, common)
        said = first_line(error)
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} brings its own code, which headwater does not run unasked",
                fix="Read that code; if you trust it, pass trust_remote_code=True",
            ) from error
        if "model_type" in str(error) or "model type" in str(error):
            raise ModelError(
                f"transformers {transformers.__version__} does not know the architecture of {name}",
                got=said,
                fix="Upgrade transformers, or correct the model_type in its config.json",
            ) from error
        raise ModelError(f"cannot read the configuration of {name}", got=said) from error


def _model_class(config: Any, name: str, trust_remote_code: bool) -> Any:
    """The class that the config names, so that a masked model is not loaded as a causal one; else by its type."""
    transformers = library()
    mappings = library("models.auto.modeling_auto")
    own_code: dict[str, Any] = getattr(config, "auto_map", None) or {}
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if found is not None and hasattr(found, "from_pretrained"):
            return found
    if own_code:
        if not trust_remote_code:
            raise ModelError(
                f"{name} brings its own code, which headwater does not run unasked",
                fix="Read that code; if you trust it, pass trust_remote_code=True",
            )
        auto = next((a for a in own_code if a.startswith("AutoModelFor")), "AutoModel")
        return getattr(transformers, auto, transformers.AutoModelForCausalLM)
    if config.model_type in mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type in _OWN:
        return transformers.AutoModelForCausalLM
    if config.model_type in mappings.MODEL_MAPPING_NAMES:
        return transformers.AutoModel
    raise ModelError(
        f"no model class is known for {name}",
        got=f"architectures {getattr(config, 'architectures', None)}, model_type {config.model_type!r}",
        fix="Load it with transformers yourself and pass the object to load()",
    )


def _weights(cls: Any, source: str, name: str, config: Any, options: dict[str, Any]) -> Any:
    """Load the weights and refuse what transformers would fill in: lacking weights and wrong shapes."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin")):
        log.warning("%s has pickled weights only; they are read with weights_only=True, so no code in them runs", name)
    try:
        hf, info = cls.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # not to ignore them: to name them all below
            weights_only=True,
            **options,
        )
    except Exception as error:
        raise ModelError(
            f"cannot load the weights of {name}",
            got=first_line(error),
            wanted="model.safetensors, its shards with their index, or pytorch_model.bin",
            fix="A file may be missing or cut short: fetch it again",
        ) from error
    if wrong := sorted(info["mismatched_keys"], key=str):
        tensor, got, wanted = wrong[0]
        raise ModelError(
            f"the checkpoint {name} does not fit its config.json: {len(wrong)} weight(s) have another shape",
            got=f"{tensor} of shape {tuple(got)}",
            wanted=f"{tuple(wanted)}",
            fix="The config.json and the weights are of different models: fetch both again",
        )
    if lacking := sorted(info["missing_keys"]):
        shown = ", ".join(lacking[:5]) + (" …" if len(lacking) > 5 else "")
        raise ModelError(
            f"the checkpoint {name} lacks {len(lacking)} weight(s) of {type(hf).__name__}, which would be random",
            got=f"no {shown}",
            fix="Where that is meant, load it with transformers yourself and pass the object to load()",
        )
    return hf


def find_tokenizer(tokenizer: Any, source: str, common: dict[str, Any]) -> Any | None:
    """The tokenizer that was passed (an object, or where to find one), else the source's own, else None."""
    transformers = library()
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    folder = Path(source)
    if tokenizer is None and folder.is_dir() and not any(any(folder.glob(p)) for p in _TOKENIZER_FILES):
        return None  # transformers would build an empty one
    try:
        if tokenizer is None:
            return transformers.AutoTokenizer.from_pretrained(source, **common)
        where = str(Path(tokenizer).expanduser()) if Path(tokenizer).expanduser().is_dir() else str(tokenizer)
        local = {**common, "local_files_only": Path(where).is_dir() or probe(where, None) is not None}
        local.pop("revision", None)
        return transformers.AutoTokenizer.from_pretrained(where, **local)
    except ModelError:
        raise
    except Exception as error:
        if tokenizer is not None:
            raise ModelError(f"cannot load the tokenizer {tokenizer}", got=first_line(error)) from error
        log.info("%s: %s (%s)", source, _NO_TOKENIZER, first_line(error))
        return None


def _processor(source: str, config: Any, common: dict[str, Any]) -> Any | None:
    tables = (
        "feature_extraction_auto.FEATURE_EXTRACTOR",
        "image_processing_auto.IMAGE_PROCESSOR",
        "processing_auto.PROCESSOR",
    )
    known = (
        getattr(library(f"models.auto.{module}"), f"{sort}_MAPPING_NAMES", {})
        for module, sort in (table.split(".") for table in tables)
    )
    if not any(config.model_type in names for names in known):
        return None
    try:
        return library().AutoProcessor.from_pretrained(source, **common)
    except Exception as error:  # many want packages that only images or sound need
        log.info("%s: no processor (%s)", source, first_line(error))
        return None

"""A short name for the exact weights that a result was measured on."""

import hashlib
import json
from typing import Any, cast

import torch

_VOLATILE = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_SAMPLE = 1024  # elements of each weight that are hashed in place, evenly spread
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(hf_model: Any) -> str:
    """16 hex digits that stay the same for the same class, configuration, data types and weights, on any device.

    Every weight and persistent buffer counts with its name, shape, type, the exact sum of its bits (so a single changed
    number is seen) and a strided sample (so most rearrangements are). Neither where the model was loaded from nor the
    `transformers` version counts. About a tenth of a second for 135M parameters. Weights that are offloaded to disk
    (meta tensors) count by name and shape only.
    """
    digest = hashlib.sha256()
    digest.update(type(hf_model).__name__.encode())
    digest.update(json.dumps(_settings(getattr(hf_model, "config", None)), sort_keys=True, default=str).encode())
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    state = cast(dict[str, torch.Tensor], hf_model.state_dict())
    for name in sorted(state):
        weight = state[name].detach()
        place = (weight.data_ptr(), weight.shape, weight.stride())
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta or weight.numel() == 0:
            continue
        if place in seen:  # tied weights are read once
            digest.update(b"tied")
            continue
        seen.add(place)
        digest.update(_content(weight))
    return digest.hexdigest()[:16]


def _content(weight: torch.Tensor) -> bytes:
    flat = weight.contiguous().reshape(-1)
    if flat.dtype == torch.bool or flat.is_complex() or flat.element_size() not in _BITS:
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat.to(torch.uint8)
    bits = flat.view(_BITS[flat.element_size()])
    # Integers add up to the same sum in any order, so threads and devices do not matter. Overflow wraps, which is fine.
    total = int(bits.sum(dtype=torch.int64))
    stride = max(1, bits.numel() // _SAMPLE)
    return total.to_bytes(8, "little", signed=True) + bits[::stride].cpu().numpy().tobytes()


def _settings(config: Any) -> Any:
    """The configuration's departures from its class' defaults, without what says nothing about the computation."""
    if config is None:
        return None
    return _drop(config.to_diff_dict() if hasattr(config, "to_diff_dict") else cast(Any, vars(config)))


def _drop(value: Any) -> Any:
    if isinstance(value, dict):
        items = cast(dict[Any, Any], value)
        return {str(k): _drop(v) for k, v in items.items() if str(k) not in _VOLATILE}
    if isinstance(value, list | tuple):
        return [_drop(item) for item in cast(list[Any], value)]
    return value

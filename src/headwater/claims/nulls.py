"""Nulls that a finding must beat: random sets matched to it, and the same model with random weights."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headwater.core.errors import ClaimError, ModelError

if TYPE_CHECKING:
    from headwater.core.model import Model

Longs = NDArray[np.int64]


def matched_sets(
    strata: Sequence[int] | Longs, chosen: Sequence[int] | Longs, n: int, *, seed: int = 0, apart: bool = False
) -> Iterator[Longs]:
    """`n` random sets of things with the profile of `chosen`: as many from each stratum, uniformly, without repeats.

    `strata` [things] says which stratum each thing is of (a head's layer; the pair of layers that an edge joins),
    `chosen` lists indices of things. `apart=True` leaves the chosen ones out where their stratum has others enough,
    and takes of them only what is missing. Yields sorted index arrays. Raises ClaimError for indices outside.
    """
    kinds = np.asarray(strata, dtype=np.int64).reshape(-1)
    picked = np.unique(np.asarray(chosen, dtype=np.int64).reshape(-1))
    if picked.size and (picked[0] < 0 or picked[-1] >= kinds.size):
        raise ClaimError(
            "chosen things lie outside the strata", got=f"up to {picked[-1]}", wanted=f"0..{kinds.size - 1}"
        )
    is_chosen = np.zeros(kinds.size, dtype=bool)
    is_chosen[picked] = True
    wanted = [
        (int(stratum), int(count)) for stratum, count in zip(*np.unique(kinds[picked], return_counts=True), strict=True)
    ]
    members = {stratum: np.flatnonzero(kinds == stratum) for stratum, _ in wanted}
    random = np.random.default_rng(seed)
    for _ in range(n):
        parts: list[Longs] = []
        for stratum, count in wanted:
            pool = random.permutation(members[stratum])
            if apart:  # the others first, in random order
                pool = pool[np.argsort(is_chosen[pool], kind="stable")]
            parts.append(pool[:count])
        yield np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)


def random_weights(model: "Model", *, seed: int = 0) -> "Model":
    """The same architecture with freshly initialised weights, drawn from `seed`; the given model is left as it is.

    What a method finds here it finds without anything having been learned (Adebayo et al., 2018). The global random
    state is left as it was. Raises ModelError where the model cannot be built from its config.
    """
    import copy

    import torch

    from headwater.core.loading import load

    hf: Any = model.hf
    config = copy.deepcopy(hf.config)
    if hasattr(config, "quantization_config"):  # full-precision random weights: nothing to dequantize
        del config.quantization_config
    devices = [hf.device] if hf.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            fresh = type(hf)(config)
        except Exception as error:
            raise ModelError(
                "cannot build a random-weight copy of this model", got=f"{type(error).__name__}: {error}"
            ) from error
    fresh = fresh.to(device=hf.device, dtype=hf.dtype).eval()
    return load(fresh, tokenizer=model.tokenizer)

"""At load: read every kind of site once and write to it once, and refuse by name what cannot be read, or does not
arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headwater.core.anatomy.trace import probe_inputs
from headwater.core.errors import HeadwaterError
from headwater.core.interventions import add
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.core.model import Model


def check_sites(model: Model) -> None:
    """Try each kind of site in the first block of each sort of block; what does not hold goes into `anatomy.refused`
    with the reason.

    A forward on a few tokens ends after the block, so this costs about as much as a few blocks.
    """
    anatomy = model.anatomy
    inputs = probe_inputs(model.hf)
    generator = torch.Generator().manual_seed(0)
    for prefix, stack in anatomy.stacks.items():
        slash = f"{prefix}/" if prefix else ""
        sorts = {(type(block.module), block.order): block for block in reversed(stack.blocks)}
        for block in sorts.values():
            out = Site("resid_post", block.index, stack=prefix)
            plain = model.run(inputs, capture=[out], logits="none", stop_after=out)[out]
            for kind, there in anatomy.kinds(stack, block).items():
                if not there or kind in ("resid_pre", "resid_post"):
                    continue
                site = Site(kind, block.index, stack=prefix)
                try:
                    value = model.run(inputs, capture=[site], logits="none", stop_after=out)[site]
                    if not bool(torch.isfinite(value).any()):
                        raise HeadwaterError("it holds no finite number")
                    noise = torch.randn(value.shape, generator=generator).to(value) * 0.5
                    written = model.run(
                        inputs, capture=[out], logits="none", stop_after=out, interventions=[add(site, noise)]
                    )[out]
                except (HeadwaterError, RuntimeError, TypeError, ValueError, AttributeError) as error:
                    anatomy.refused[slash + kind] = (
                        f"{type(block.module).__name__}: it cannot be read or written ({error})"
                    )
                    continue
                if torch.equal(written, plain):
                    anatomy.refused[slash + kind] = (
                        f"{type(block.module).__name__}: what is written there does not arrive"
                    )

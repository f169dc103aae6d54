"""Run: what one run of a model gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headwater.core.errors import InterventionError, SiteError, did_you_mean
from headwater.core.places import Window, select_index, token_axis
from headwater.core.session import Kept
from headwater.core.sites import Site


@dataclass
class Run:
    """What a run gave. `run["z.7.h3"]` is the captured value of a site, prompts first.

    logits: [B, T, V] for "all" (a list of [T, V] where lengths differ), [B, V] for "last", None for "none".
    tokens: one tensor of token ids a prompt. output: what the model itself returned, where everything ran in one batch.
    """

    tokens: list[torch.Tensor]
    logits: Any = None
    captured: list[Site] = field(default_factory=list)
    output: Any = None
    _values: dict[str, Any] = field(default_factory=dict)
    _kept: list[dict[str, Kept]] = field(default_factory=list)

    def __getitem__(self, site: str | Site) -> Any:
        name = str(Site.parse(site))
        if name in self._values:
            return self._values[name]
        whole = Site.parse(site)
        stripped = str(whole.whole)
        if stripped in self._values and isinstance(self._values[stripped], torch.Tensor):
            x = self._values[stripped]
            where = Window().locate(whole.pos, x.shape[token_axis(whole.kind)], whole) if whole.pos else slice(None)
            return x[select_index(whole, x, where)]
        raise SiteError(f"{name} was not captured in this run", wanted=did_you_mean(name, self._values))

    def __contains__(self, site: str | Site) -> bool:
        return str(Site.parse(site)) in self._values

    def grads(self, of: torch.Tensor, sites: Sequence[str | Site] | None = None) -> dict[str, torch.Tensor]:
        """Gradients of a scalar with respect to captured sites, in the sites' own layout. Needs `grad=True` and one
        batch.

        The gradient of `head.L.hN` is that of the stream its write is added to.
        """
        if len(self._kept) != 1 or not all(kept.whole is not None for kept in self._kept[0].values()):
            raise InterventionError(
                "gradients need a run that was recorded", fix="model.run(..., grad=True) with prompts of one length"
            )
        names = [str(Site.parse(site)) for site in sites] if sites is not None else list(self._kept[0])
        wholes = [self._kept[0][name].whole for name in names]
        unique = list({id(w): w for w in wholes}.values())
        found = dict(
            zip(map(id, unique), torch.autograd.grad(of, unique, retain_graph=True, allow_unused=True), strict=True)  # type: ignore[arg-type]
        )
        out: dict[str, torch.Tensor] = {}
        for name, whole in zip(names, wholes, strict=True):
            gradient = found[id(whole)]
            gradient = torch.zeros_like(whole) if gradient is None else gradient  # type: ignore[arg-type]
            out[name] = self._kept[0][name].select(gradient)  # type: ignore[misc]
        return out


def in_order(parts: list[tuple[list[int], torch.Tensor]]) -> Any:
    """Put batches back into the order of the prompts: one tensor where shapes agree, else a list."""
    if len(parts) == 1 and parts[0][0] == sorted(parts[0][0]):
        return parts[0][1]
    rows = [row for some, _ in parts for row in some]
    if len({value.shape[1:] for _, value in parts}) == 1:
        joined = torch.cat([value for _, value in parts])
        return joined[torch.argsort(torch.tensor(rows, device=joined.device))]
    out: list[Any] = [None] * len(rows)
    for some, value in parts:
        for place, row in enumerate(some):
            out[row] = value[place]
    return out

"""Positions in scores: which tokens of a batch are counted together, by name or by their place from the end."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.engine.passes import Batch

Positions = Literal["all", "named", "each"]
_CHOICES = ("all", "named", "each")


@dataclass(frozen=True, eq=False)
class Places:
    """A batch's tokens after the prefix, each in exactly one place.

    names: the places. of: [B, T] long, the place of each token.
    """

    names: list[str]
    of: Tensor

    def mask(self, place: int) -> Tensor:
        """[B, T] bool: the tokens of one place."""
        return self.of == place

    def sums(self, scores: Tensor) -> dict[str, Tensor]:
        """Place -> the sum of `scores` [..., B, T] over its tokens."""
        return {name: (scores * self.mask(i)).sum(dim=(-2, -1)) for i, name in enumerate(self.names)}


def check_positions(positions: str) -> None:
    """Raises MethodError for a choice of positions that there is not."""
    if positions not in _CHOICES:
        wanted = did_you_mean(str(positions), _CHOICES)
        raise MethodError("unknown choice of positions", got=repr(positions), wanted=wanted)


def places_of(batch: Batch, positions: Positions) -> Places:
    """The places of a batch: one in all ("all"), the behavior's names and `other`, or each position from the end.

    A token with two names counts for the one that the behavior lists first, so that places add up to the whole. The
    shared prefix has no place: what is the same in both runs scores 0.
    """
    size, steps = len(batch), batch.suffix
    if positions == "all":
        return Places(["all"], torch.zeros(size, steps, dtype=torch.long))
    if positions == "each":
        return Places([str(t - steps) for t in range(steps)], torch.arange(steps).expand(size, steps))
    names = list(batch.positions)
    of = torch.full((size, steps), len(names), dtype=torch.long)
    for place, name in reversed(list(enumerate(names))):
        index = batch.positions[name].cpu()
        inside = (index >= batch.prefix).nonzero().flatten()
        of[inside, index[inside] - batch.prefix] = place
    return Places([*names, "other"], of)


def in_order(names: Iterable[str]) -> list[str]:
    """Names as a table lists them: positions counted from the end from left to right, then names as they came."""

    def key(name: str) -> tuple[bool, int]:
        number = name.lstrip("-").isdigit()
        return not number, int(name) if number else 0

    return sorted(names, key=key)

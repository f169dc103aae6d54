"""Attention patterns by name: where each token is to look, computed from the token ids alone.

A pattern is a function of token ids [B, T] that gives weights [B, T, T] (from, to): nothing above the diagonal, and
each row sums to 1, or to 0 where the pattern says nothing (such rows stay the model's own).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.registry import Registry

Pattern = Callable[[Tensor], Tensor]
patterns: Registry[Pattern] = Registry("pattern")
"""Outside packages add theirs by the entry point group `headwater.patterns`."""


def pattern_named(name: str) -> Pattern:
    """A pattern by name; `back:3` looks three tokens back. Raises MethodError for an unknown one."""
    if match := re.fullmatch(r"back:(\d+)", name):
        distance = int(match[1])
        return lambda ids: _back(ids, distance)
    if name not in patterns:
        known = [*patterns.names(), "back:N"]
        raise MethodError("unknown attention pattern", got=repr(name), wanted=f"one of: {', '.join(known)}")
    return patterns.get(name)


def _shared(ids: Tensor, weights_TT: Tensor) -> Tensor:
    return weights_TT.to(ids.device).expand(len(ids), -1, -1)


def _rows(allowed_BTT: Tensor) -> Tensor:
    """Equal weights over what is allowed."""
    weights = allowed_BTT.float()
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)


def _back(ids: Tensor, distance: int) -> Tensor:
    return _shared(ids, torch.ones(ids.shape[1], ids.shape[1]).tril(-distance).triu(-distance))


@patterns.register("previous_token")
def previous_token(ids: Tensor) -> Tensor:
    """The token before; the first token says nothing."""
    return _back(ids, 1)


@patterns.register("current_token")
def current_token(ids: Tensor) -> Tensor:
    """Itself."""
    return _back(ids, 0)


@patterns.register("first_token")
def first_token(ids: Tensor) -> Tensor:
    """The first token of the sequence."""
    weights = torch.zeros(ids.shape[1], ids.shape[1])
    weights[:, 0] = 1
    return _shared(ids, weights)


@patterns.register("uniform")
def uniform(ids: Tensor) -> Tensor:
    """Itself and all before it, equally."""
    return _shared(ids, _rows(torch.ones(1, ids.shape[1], ids.shape[1]).tril()))


@patterns.register("duplicate_token")
def duplicate_token(ids: Tensor) -> Tensor:
    """Earlier occurrences of the same token, equally; the first occurrence says nothing."""
    return _rows((ids[:, :, None] == ids[:, None, :]).tril(-1))


@patterns.register("induction")
def induction(ids: Tensor) -> Tensor:
    """The tokens after earlier occurrences of the same token, equally; the first occurrence says nothing."""
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1)
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    return _rows(after.tril(-1) | (after & torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)))

"""Which part of a tensor a site means: heads, experts and token positions, resolved to indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headwater.core.errors import InterventionError, SiteError
from headwater.core.sites import Site, parse_position

# Axis of heads and axis of query (or key) positions in each kind's tensor; everything else is [B, T, width].
_HEAD_AXIS = {"q": 2, "k": 2, "v": 2, "z": 2, "head": 2, "scores": 1, "pattern": 1}
_TOKEN_AXIS = {"scores": 2, "pattern": 2}


def head_axis(kind: str) -> int | None:
    return _HEAD_AXIS.get(kind.removeprefix("cross_"))


def token_axis(kind: str) -> int:
    return _TOKEN_AXIS.get(kind.removeprefix("cross_"), 1)


@dataclass
class Window:
    """What part of each prompt one forward covers: tokens `offset` to `offset + n`, of prompts that are `prompt_length`
    long.

    rows: which of the caller's prompts are in this batch. named: position names -> [n_prompts] indices.
    open_ended: whether more tokens may follow (generation), so that a position beyond this forward is not yet a
    mistake.
    """

    rows: torch.Tensor | None = None
    n_prompts: int | None = None
    prompt_length: int | None = None
    offset: int = 0
    open_ended: bool = False
    named: dict[str, torch.Tensor] = field(default_factory=dict)

    def locate(self, where: Any, n_tokens: int, what: object) -> Any:
        """Indices along the token axis: `slice`, int, LongTensor, or (rows, columns) where each prompt has its own;
        None: not here."""
        length = n_tokens + self.offset if self.prompt_length is None else self.prompt_length
        if isinstance(where, str) and where not in ("prompt", "decode", "all"):
            where = parse_position(where)
        if where is None or (isinstance(where, str) and where == "all"):
            return slice(None)
        if isinstance(where, str) and where == "prompt":
            where = slice(0, length)
        elif isinstance(where, str) and where == "decode":
            where = slice(length, None)
        elif isinstance(where, str):
            return self._per_prompt(self._named(where, what), length, n_tokens, what)
        if isinstance(where, int):
            absolute = self._absolute(where, length, what)
            here = absolute - self.offset
            return here if 0 <= here < n_tokens else None
        if isinstance(where, slice) and where.step not in (None, 1):
            raise InterventionError(
                f"{what}: a slice of positions takes no step", got=where, fix="List the positions: [0, 2, 4]"
            )
        if isinstance(where, slice):
            start = 0 if where.start is None else where.start + (length if where.start < 0 else 0)
            stop = self.offset + n_tokens if where.stop is None else where.stop + (length if where.stop < 0 else 0)
            first, last = max(start - self.offset, 0), min(stop - self.offset, n_tokens)
            return slice(first, last) if first < last else None
        if (
            isinstance(where, torch.Tensor)
            and where.ndim == 1
            and self.n_prompts is not None
            and len(where) == self.n_prompts
        ):
            return self._per_prompt(where, length, n_tokens, what)
        if isinstance(where, list | tuple | torch.Tensor):
            places = [self._absolute(int(p), length, what) - self.offset for p in where]
            inside = [p for p in places if 0 <= p < n_tokens]
            return torch.tensor(inside) if inside else None
        raise InterventionError(
            f"{what}: cannot read the positions",
            got=repr(where),
            wanted="an index, a slice, a list, a name, prompt, decode or all",
        )

    def _absolute(self, position: int, length: int, what: object) -> int:
        absolute = position + length if position < 0 else position
        if absolute < 0 or (absolute >= length and not self.open_ended):
            raise InterventionError(
                f"{what}: no such position",
                got=position,
                wanted=f"-{length} to {length - 1}: the prompt has {length} tokens",
            )
        return absolute

    def _named(self, name: str, what: object) -> torch.Tensor:
        if name not in self.named:
            known = ", ".join(sorted(self.named)) or "none: pass positions= to run, or use a Behavior that names them"
            raise SiteError(f"{what}: unknown position", got=repr(name), wanted=f"one of: {known}")
        return self.named[name]

    def _per_prompt(self, where: torch.Tensor, length: int, n_tokens: int, what: object) -> Any:
        if self.n_prompts is not None and len(where) != self.n_prompts:
            raise InterventionError(
                f"{what}: one position a prompt is needed", got=f"{len(where)} positions", wanted=self.n_prompts
            )
        columns = where if self.rows is None else where[self.rows.to(where.device)]
        columns = torch.where(columns < 0, columns + length, columns)
        if bool((columns < 0).any()) or (not self.open_ended and bool((columns >= length).any())):
            raise InterventionError(
                f"{what}: a position lies outside its prompt", got=columns.tolist(), wanted=f"0 to {length - 1}"
            )
        columns = columns - self.offset
        rows = torch.arange(len(columns))
        inside = (columns >= 0) & (columns < n_tokens)
        return (rows[inside], columns[inside]) if bool(inside.any()) else None


def refuse_padded(inputs: Mapping[str, Any], places: Sequence[Any], logits: str) -> None:
    """Positions are columns of the batch, and in a padded one a column is another token in each prompt: refuse to count
    from the padded side, rather than read padding.

    places: sites and interventions. Raises InterventionError that names the one which counts from that side.
    """
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or bool(mask.all()):
        return
    left, right = not bool(mask[:, 0].all()), not bool(mask[:, -1].all())
    fix = "Pass texts or token ids: prompts of one length then run together, and nothing is padded"
    if right and logits == "last":
        raise InterventionError("the last logits of a batch that is padded on the right are padding's", fix=fix)
    for place in places:
        where = getattr(place, "positions", None)
        where = place.site.pos if where is None and hasattr(place, "site") else getattr(place, "pos", where)
        where = parse_position(where) if isinstance(where, str) else where
        ends = [where.start, where.stop] if isinstance(where, slice) else where
        ends = [ends] if isinstance(ends, int) else ends
        if not isinstance(ends, list | tuple):
            continue  # everywhere, or one column a prompt of the caller's own
        if (left and any(e is not None and e >= 0 for e in ends)) or (right and any(e is None or e < 0 for e in ends)):
            raise InterventionError(
                f"{place}: its position is counted from the padded side of the batch",
                got=f"padding on the {'left' if left else 'right'}", fix=fix,
            )  # fmt: skip


def select_index(site: Site, x: torch.Tensor, where: Any) -> tuple[Any, ...]:
    """The index of a site's part in the whole tensor."""
    index: list[Any] = [slice(None)] * x.ndim
    if site.head is not None:
        axis = head_axis(site.kind)
        if axis is None or not isinstance(site.head, int) or site.head >= x.shape[axis]:
            raise SiteError(
                f"{site} names a head that is not there", got=site.head, wanted=f"0 to {x.shape[axis or 0] - 1}"
            )
        index[axis] = site.head
    if site.expert is not None:
        if x.ndim != 4 or not isinstance(site.expert, int) or site.expert >= x.shape[2]:
            raise SiteError(f"{site} names an expert that is not there", fix="Only mixtures of experts have them")
        index[2] = site.expert
    axis = token_axis(site.kind)
    if isinstance(where, tuple):
        index[0], index[axis] = where
    elif axis < x.ndim:
        index[axis] = where
    return tuple(index)

"""Where the run of each patch starts, and which patches run together: decided from shapes alone, so that it can be
planned.

A patch at layer L starts from the base run's stream at L (or L + 1, or in the middle of L behind its attention);
positions before the first changed one come from the base run's keys and values; a patch of what the last layer adds is
run at the last position only; patches that start alike are stacked along the batch.

Shapes: B pairs, T positions of the prompt.
"""

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from headwater.core.errors import MethodError

Kind = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "q", "k", "v"]
KINDS: tuple[Kind, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "q", "k", "v")
HEADED: tuple[Kind, ...] = ("head", "q", "k", "v")
PROJECTED: tuple[Kind, ...] = ("q", "k", "v")
STREAM, PROJECTIONS, ATTENTION, MLP = range(4)
"""When in a layer a target acts."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One thing to patch: a kind of site at a layer (and head), at all positions, or at some of each pair's."""

    kind: Kind
    layer: int
    head: int | None = None
    position: str | None = None

    @property
    def site(self) -> str:
        text = f"{self.kind}.{self.layer}" + ("" if self.head is None else f".h{self.head}")
        return text if self.position is None else f"{text}@{self.position}"

    @property
    def parts(self) -> tuple["Target", ...]:
        return (self,)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Several targets patched at the same time in one run; `layer` is the one that it is listed under."""

    parts: tuple[Target, ...]
    layer: int
    name: str

    @property
    def kind(self) -> str:
        return "+".join(dict.fromkeys(part.kind for part in self.parts))

    @property
    def head(self) -> int | None:
        return None

    @property
    def position(self) -> str | None:
        places = {part.position for part in self.parts}
        return next(iter(places)) if len(places) == 1 else None

    @property
    def site(self) -> str:
        return self.name


Patch = Target | Joint


@dataclass(frozen=True)
class Begin:
    """Where a run starts: before block `start`, or (`behind`) in it behind its attention, from position `first`."""

    start: int
    behind: bool
    first: int


class Ready(Protocol):
    """Anything made ready to run."""

    @property
    def begin(self) -> Begin: ...
    @property
    def key(self) -> Hashable: ...


@dataclass(frozen=True)
class Planned:
    """A patch with its start; `parts` are those that the last position can see."""

    patch: Patch
    begin: Begin
    parts: tuple[Target, ...]

    @property
    def key(self) -> Hashable:
        return self.patch


J = TypeVar("J", bound=Ready)


@dataclass(frozen=True)
class Chunk(Generic[J]):
    """Patches that are run at once, stacked along the batch."""

    begin: Begin
    jobs: tuple[J, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """The shapes that decide where patches start.

    shared: positions before which base and other run are equal. cached: whether the base run's keys and values are at
    hand. positions: name -> [B] index; `name[0]` is where the span of that name starts.
    """

    n_layers: int
    parallel: bool
    rows: int
    length: int
    shared: int
    cached: bool
    positions: Mapping[str, Tensor]

    def where(self, position: str | None) -> Tensor | None:
        """[B, T] bool: the positions meant, or None for all. Raises MethodError for an unknown or missing one."""
        if position is None:
            return None
        every = torch.arange(self.length)[None]
        if position in self.positions:
            return every == self.positions[position].cpu()[:, None]
        name, bracket, _ = position.partition("[")
        if bracket and name in self.positions and f"{name}[0]" in self.positions:
            starts, ends = (self.positions[which].cpu()[:, None] for which in (f"{name}[0]", name))
            return (every >= starts) & (every <= ends)
        chosen = torch.zeros(self.length, dtype=torch.bool)
        if match := re.fullmatch(r"(-?\d+)?:(-?\d+)?", position):
            chosen[slice(*(int(part) if part else None for part in match.groups()))] = True
        elif re.fullmatch(r"-?\d+(,-?\d+)*", position):
            for text in position.split(","):
                index = int(text)
                if not -self.length <= index < self.length:
                    wanted = f"-{self.length} to {self.length - 1}"
                    raise MethodError("no such position", got=position, wanted=wanted)
                chosen[index] = True
        else:
            known = ", ".join(sorted(self.positions)) or "none"
            raise MethodError("unknown position", got=repr(position), wanted=f"a number, a slice, * or one of: {known}")
        return chosen[None].expand(self.rows, -1)

    def planned(self, patch: Patch) -> Planned | None:
        """How to run one patch; None where it changes nothing that the last position can see."""
        seen = [(part, first) for part in patch.parts if (first := self._first(part)) is not None]
        if not seen:
            return None
        parts = tuple(part for part, _ in seen)
        first = min(first for _, first in seen) if self.cached else 0
        layer, stage = min(self.stage(part) for part in parts)
        start = layer + 1 if stage == MLP else layer
        return Planned(patch, Begin(start, stage == ATTENTION, first), parts)

    def stage(self, part: Target) -> tuple[int, int]:
        """When a target acts: layer, and where in it."""
        if part.kind == "resid_post":
            return part.layer + 1, STREAM
        if part.kind == "resid_pre":
            return part.layer, STREAM
        if part.kind in PROJECTED:
            return part.layer, PROJECTIONS
        # in a parallel block nothing but the stream after it reads what attention gives
        return part.layer, MLP if self.parallel or part.kind == "mlp_out" else ATTENTION

    def _first(self, part: Target) -> int | None:
        """The first position that a target changes, as far as the last one can see; None where it cannot."""
        mask = self.where(part.position)
        if mask is not None and not bool(mask[:, self.shared :].any()):
            return None  # the two runs are the same there
        if part.layer == self.n_layers - 1 and part.kind not in ("resid_pre", "k", "v"):
            # nothing after this mixes positions
            return None if mask is not None and not bool(mask[:, -1].any()) else self.length - 1
        return self.shared if mask is None else int(mask.any(dim=0).int().argmax())

    def chunks(self, jobs: Iterable[J], tokens_at_once: int) -> list[Chunk[J]]:
        """Jobs that start alike, as many at once as the budget of positions takes."""
        groups: dict[tuple[int, bool, int], list[J]] = {}
        for job in jobs:
            groups.setdefault((job.begin.start, job.begin.behind, job.begin.first), []).append(job)
        chunks = []
        for (start, behind, first), group in sorted(groups.items(), key=lambda item: item[0]):
            size = max(1, tokens_at_once // (self.rows * (self.length - first)))
            for at in range(0, len(group), size):
                chunks.append(Chunk(Begin(start, behind, first), tuple(group[at : at + size])))
        return chunks

    def layers_run(self, begin: Begin, n: int, narrows: bool) -> tuple[int, int]:
        """(attention, MLP): positions x layers that a chunk of `n` patches computes."""
        rows = n * self.rows
        given, left = rows * (self.length - begin.first), self.n_layers - begin.start
        mlp = given * left
        if self.narrowed(begin, narrows) and left:
            mlp += rows - given  # the last block's MLP at the last position only
        return given * max(0, left - begin.behind), mlp

    def narrowed(self, begin: Begin, narrows: bool) -> bool:
        """Whether the last block is run at the last position only behind its queries, keys and values."""
        return narrows and begin.start < self.n_layers - begin.behind and begin.first < self.length - 1

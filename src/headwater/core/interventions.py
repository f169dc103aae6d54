"""Interventions: frozen values that say what happens at a site. Applied by `model.run(..., interventions=)` or inside
`model.intervene(...)`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union

from headwater.core.errors import InterventionError
from headwater.core.sites import Position, Site, parse_position

if TYPE_CHECKING:
    import torch

    from headwater.core.run import Run

Where = Union[Position, list[int], "torch.Tensor", Literal["prompt", "decode", "all"], None]
"""Which tokens: see `Intervention`. A tensor [n_prompts] gives each prompt a position of its own."""
Op = Literal["replace", "zero", "add", "project_out", "swap_subspace", "clamp"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Intervention:
    """What happens at a site.

    site: a site or a pattern (`mlp_out.*`); every site it means is edited.
    op: what is done to the values there (`x`): replace: `value` · zero: 0 · add: `x + scale * value` · project_out: x
        without its part in the span of `value` [R, width] · swap_subspace: x with its part in that span taken from
        `source` · clamp: x within [low, high], along the direction `value` if there is one.
    positions: which tokens. None: those of the site's `@pos`, else all. Absolute, counted from the prompt's first
        token, also while generating with a cache; negative: from the prompt's end. "prompt" and "decode" are the given
        and the generated tokens.
    """

    site: Site
    op: Op
    value: Any = None
    source: Any = None
    scale: float = 1.0
    low: float | None = None
    high: float | None = None
    positions: Any = None
    label: str = ""
    whole: bool = False
    """The value (of swap_subspace: the source) is of the whole site, and is cut to heads and positions as the site
    is."""
    _by_site: dict[str, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.positions is not None and self.site.pos is not None:
            raise InterventionError(
                f"{self.site} has a position, and positions={self.positions!r} gives another", fix="Give one of them"
            )

    def at(self, site: Site) -> Intervention:
        """This intervention for one of the sites that its pattern means."""
        value = self._by_site[str(site.whole)] if self._by_site is not None else self.value
        if self._by_site is not None and (site.head is not None or site.expert is not None):
            raise InterventionError("freeze takes whole sites", got=str(site), fix=f"Freeze {site.whole}")
        return dataclasses.replace(self, site=site, value=value)

    def part(self, x: torch.Tensor, index: tuple[Any, ...]) -> Intervention:
        """This intervention for a part of the whole tensor `x`, when its value is of the whole."""
        name = "source" if self.op == "swap_subspace" else "value"
        return dataclasses.replace(self, **{name: _fit(_as(getattr(self, name), x), x, self)[index]})

    def __str__(self) -> str:
        where = "" if self.positions is None else f" at {self.positions}"
        return self.label or f"{self.op}({self.site}{where})"

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The values after the intervention; `x` holds the selected values only, its last axis is the site's width."""
        import torch

        def like(value: Any) -> torch.Tensor:
            return _as(value, x)

        if self.op == "zero":
            return torch.zeros_like(x)
        if self.op == "replace":
            return _fit(like(self.value), x, self)
        if self.op == "add":
            return x + self.scale * _fit(like(self.value), x, self)
        if self.op == "clamp" and self.value is None:
            return x.clamp(self.low, self.high)
        if self.op == "clamp":
            direction = like(self.value)
            if direction.shape != x.shape[-1:]:
                raise InterventionError(
                    f"{self}: the direction does not fit the place",
                    got=f"shape {list(direction.shape)}",
                    wanted=f"width {x.shape[-1]}",
                )
            direction = direction / direction.norm()
            along = x @ direction
            return x + (along.clamp(self.low, self.high) - along)[..., None] * direction
        basis = _basis(like(self.value), x, self)
        if self.op == "project_out":
            return x - (x @ basis.T) @ basis
        if self.op == "swap_subspace":
            return x + ((_fit(like(self.source), x, self) - x) @ basis.T) @ basis
        raise InterventionError("unknown operation", got=self.op)


def _as(value: Any, x: torch.Tensor) -> torch.Tensor:
    import torch

    if not isinstance(value, torch.Tensor):
        rows = isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
        value = torch.stack(value) if rows else torch.as_tensor(value)
    if torch.is_grad_enabled() and value.is_inference():
        value = value.clone()
    return value.to(device=x.device, dtype=x.dtype)


def _fit(value: torch.Tensor, x: torch.Tensor, what: Intervention) -> torch.Tensor:
    try:
        return value.expand_as(x)
    except RuntimeError:
        raise InterventionError(
            f"{what}: the value does not fit the place",
            got=f"shape {list(value.shape)}",
            wanted=f"something that broadcasts to {list(x.shape)}",
        ) from None


def _basis(rows: torch.Tensor, x: torch.Tensor, what: Intervention) -> torch.Tensor:
    """An orthonormal basis [R, width] of the span of the given rows."""
    import torch

    rows = rows if rows.ndim == 2 else rows[None]
    if rows.shape[-1] != x.shape[-1]:
        raise InterventionError(
            f"{what}: the directions do not fit the place", got=f"width {rows.shape[-1]}", wanted=f"width {x.shape[-1]}"
        )
    q, r = torch.linalg.qr(rows.T.double())
    keep = r.diagonal().abs() > 1e-10 * r.abs().max()
    return q[:, keep].T.to(x.dtype)


def _site(site: str | Site) -> Site:
    return Site.parse(site)


def _from_run(site: Site, source: Run | Any, positions: Any) -> tuple[Any, bool]:
    """(what a Run holds for a site, whether it is of the whole site); what is no Run is a value already.

    With `positions=`, or a named position, the whole site is held and cut where the intervention is applied.
    """
    if not hasattr(source, "captured"):
        return source, False
    named = site.pos is not None and isinstance(parse_position(site.pos), str) and site not in source
    if positions is None and not named:
        return source[site], False
    return source[site.whole], True


def zero(site: str | Site, *, positions: Where = None) -> Intervention:
    """Set a site to zero."""
    return Intervention(site=_site(site), op="zero", positions=positions)


def replace(site: str | Site, value: Any, *, positions: Where = None, label: str = "") -> Intervention:
    """Put `value` in place of what a site holds; it broadcasts to the selected values (a first axis of prompts stays
    with its prompts)."""
    return Intervention(site=_site(site), op="replace", value=value, positions=positions, label=label)


def mean(site: str | Site, over: Run | Any, *, positions: Where = None) -> Intervention:
    """Replace a site by its mean over prompts: over those of a Run that captured it, or a mean that is given as a
    tensor.

    From a Run the mean is over prompts, position by position (all prompts must then have the same length).
    """
    parsed = _site(site)
    value, whole = _from_run(parsed, over, positions)
    if isinstance(value, list):
        raise InterventionError(
            f"mean({parsed}): the prompts of the run differ in length", fix="Give the mean as a tensor, or choose @-1"
        )
    value = value.mean(dim=0) if value is not over else over
    return Intervention(
        site=parsed, op="replace", value=value, positions=positions, label=f"mean({parsed})", whole=whole
    )


def resample(site: str | Site, source: Run | Any, *, positions: Where = None) -> Intervention:
    """Replace a site by what it holds for other prompts, prompt by prompt: those of a Run, or a tensor."""
    parsed = _site(site)
    value, whole = _from_run(parsed, source, positions)
    return Intervention(
        site=parsed, op="replace", value=value, positions=positions, label=f"resample({parsed})", whole=whole
    )


def add(site: str | Site, vector: Any, *, scale: float = 1.0, positions: Where = None) -> Intervention:
    """Add `scale * vector` to a site."""
    return Intervention(site=_site(site), op="add", value=vector, scale=scale, positions=positions)


def project_out(site: str | Site, directions: Any, *, positions: Where = None) -> Intervention:
    """Remove a site's part in the span of `directions` ([width] or [R, width])."""
    return Intervention(site=_site(site), op="project_out", value=directions, positions=positions)


def swap_subspace(site: str | Site, source: Any, directions: Any, *, positions: Where = None) -> Intervention:
    """Take a site's part in the span of `directions` from `source`, and leave the rest (distributed interchange)."""
    parsed = _site(site)
    source, whole = _from_run(parsed, source, positions)
    return Intervention(
        site=parsed, op="swap_subspace", value=directions, source=source, positions=positions, whole=whole
    )


def clamp(
    site: str | Site,
    *,
    low: float | None = None,
    high: float | None = None,
    direction: Any = None,
    positions: Where = None,
) -> Intervention:
    """Keep a site's values, or their component along one direction, within [low, high]."""
    if low is None and high is None:
        raise InterventionError("clamp needs a bound", wanted="low=, high= or both")
    if low is not None and high is not None and low > high:
        raise InterventionError("clamp has low above high", got=f"low={low}, high={high}")
    return Intervention(site=_site(site), op="clamp", value=direction, low=low, high=high, positions=positions)


def freeze(site: str | Site, run: Run, *, positions: Where = None) -> Intervention:
    """Hold a site (or every site of a pattern) at the values that a Run captured."""
    parsed = _site(site)
    held = {str(s): run[s] for s in run.captured if s.pos is None and s.head is None and s.matches(parsed)}
    if not held:
        raise InterventionError(
            f"cannot freeze {parsed}: the run captured nothing of it",
            got=", ".join(map(str, run.captured)) or "no captures",
            fix=f"Run with capture=[{str(parsed)!r}]",
        )
    return Intervention(
        site=parsed, op="replace", positions=positions, label=f"freeze({parsed})", whole=True, _by_site=held
    )

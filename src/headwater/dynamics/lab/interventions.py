"""Interventions while a model learns, written as text: `force("pattern.0.h1", "previous_token")`.

| text | what holds between the two steps | and the gradient |
|---|---|---|
| `zero(site)` | the site is 0 (`head` and `z`: the head is off) | none reaches what made it |
| `clamp(site, low=, high=)` | its values stay within | none where a bound holds |
| `replace(site, number)` | every value is that number | none |
| `add(site, number, at=pattern)` | the number is added, on a named pattern's places only | flows |
| `scale(site, factor, at=pattern)` | the values times the factor, likewise | flows, times the factor |
| `force(site, pattern)` | a `pattern` site attends as named | values learn; queries and keys do not |
| `freeze(site, step)` | values of the model of that checkpoint (default: of the first step), on the same batch | none |
| `stop(site)` | values stay as they are | none passes |
| `penalize(site, pattern, weight)` | nothing; weight x mean attention to the named places joins the loss | flows |

A weight that is cut off has a gradient of zero; AdamW's momentum and decay go on.

They are headwater's own interventions (see docs/sites.md), put on for the forward and backward pass of a step. `force`
is the clamp of Singh et al. (2024), `penalize` the regularizer of Chen et al. (2024; negative weights reward), `scale`
on a pattern's places the biased attention map of Gopalani and Hu (2025).
"""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.core import interventions as core
from headwater.core.errors import InterventionError, MethodError, did_you_mean
from headwater.core.interventions import Intervention
from headwater.core.places import Window
from headwater.core.session import Session
from headwater.core.sites import Site
from headwater.dynamics.lab.patterns import pattern_named

if TYPE_CHECKING:
    from headwater.core.model import Model

_ATTENTION = ("pattern", "scores")
# What each takes: its arguments after the site, in order, and which of them must be given.
_TAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "zero": ((), ()),
    "clamp": (("low", "high"), ()),
    "replace": (("value",), ("value",)),
    "add": (("value", "at"), ("value",)),
    "scale": (("factor", "at"), ("factor",)),
    "force": (("pattern",), ("pattern",)),
    "freeze": (("step",), ()),
    "stop": ((), ()),
    "penalize": (("pattern", "weight"), ("pattern", "weight")),
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One line of a config, read: what is done, where, from which step on and before which.

    options: its arguments by name. For `freeze`, `step` is the checkpoint whose values are held.
    """

    name: str
    site: Site
    options: Mapping[str, Any]
    first: int
    last: int | None
    text: str

    def holds(self, step: int) -> bool:
        """Whether it holds for the update from this step to the next."""
        return step >= self.first and (self.last is None or step < self.last)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Changed(Intervention):
    """x * factor + value on the places of `mask` (all of them where it is None); `detach`: x without its gradient."""

    factor: float = 1.0
    mask: Tensor | None = None
    detach: bool = False

    def apply(self, x: Tensor) -> Tensor:
        if self.detach:
            return x.detach()
        changed = x * self.factor if self.op != "replace" else x.new_full((), float(self.value)).expand_as(x)
        if self.op == "add" and self.value is not None:
            changed = changed + self.value
        if self.mask is None:
            return changed
        return torch.where(_of_heads(self.mask, x) > 0, changed, x)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Forced(Intervention):
    """Attention as `target` [B, T, S] says, where it says something."""

    target: Tensor

    def apply(self, x: Tensor) -> Tensor:
        target = _of_heads(self.target, x).to(x.dtype).expand_as(x)
        return torch.where(target.sum(dim=-1, keepdim=True) > 0, target, x)


def _of_heads(weights_BTS: Tensor, x: Tensor) -> Tensor:
    """[B, T, S] beside values of one head [B, T, S] or of all [B, H, T, S]."""
    return weights_BTS if x.ndim == 3 else weights_BTS[:, None]


def parse(text: str, steps: tuple[int, int | None] = (0, None)) -> Planned:
    """Read one line, without running it: names, texts and numbers only. Raises MethodError or SiteError."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        tree = None
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
        raise MethodError(f"cannot read the intervention {text!r}", wanted='such as zero("head.0.h1")')
    name = tree.func.id
    if name not in _TAKES:
        raise MethodError(f"unknown intervention in {text!r}", got=name, wanted=did_you_mean(name, _TAKES))
    values = [_literal(node, text) for node in tree.args]
    named = {str(word.arg): _literal(word.value, text) for word in tree.keywords}
    if "site" in named:
        values.insert(0, named.pop("site"))
    if not values or not isinstance(values[0], str):
        raise MethodError(f"{text!r} names no site", wanted=f'{name}("kind.layer", ...)')
    known, needed = _TAKES[name]
    if len(values) - 1 > len(known) or set(named) - set(known) or set(named) & set(known[: len(values) - 1]):
        wanted = f"{name}({', '.join(['site', *known])})"
        raise MethodError(f"the arguments of {text!r} do not fit", got=", ".join(named) or len(values), wanted=wanted)
    options = dict(zip(known, values[1:], strict=False)) | named
    if missing := [one for one in needed if options.get(one) is None]:
        raise MethodError(f"{text!r} lacks {' and '.join(missing)}", wanted=f"{name}({', '.join(['site', *known])})")
    planned = Planned(
        name=name, site=Site.parse(values[0]), options=options, first=steps[0], last=steps[1], text=text.strip()
    )
    _check(planned)
    return planned


def _literal(node: ast.expr, text: str) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = ...
    if not (value is None or isinstance(value, str | int | float)):
        raise MethodError(f"{text!r} holds more than texts and numbers", wanted='such as clamp("neurons.0", low=0)')
    return value


def _check(planned: Planned) -> None:
    """What can be said without a model."""
    options, text, kind = planned.options, planned.text, planned.site.kind
    for name in ("low", "high", "value", "factor", "weight", "step"):
        value = options.get(name)
        if value is not None and (isinstance(value, bool | str) or (name == "step" and not isinstance(value, int))):
            raise MethodError(f"{name} of {text!r} is no number", got=repr(value))
    for name in ("pattern", "at"):
        if options.get(name) is None:
            continue
        if not isinstance(options[name], str):
            raise MethodError(f"{name} of {text!r} is no pattern's name", got=repr(options[name]))
        pattern_named(options[name])
        # a pattern of attention weights: only there do rows and columns mean tokens
        allowed = ("pattern",) if planned.name in ("force", "penalize") else _ATTENTION
        if kind not in allowed:
            raise MethodError(f"{text!r} needs a site of attention", got=str(planned.site), wanted=" or ".join(allowed))
        if planned.site.pos is not None:
            raise MethodError(f"{text!r} takes no position", got=str(planned.site), fix="Leave it out")
    if planned.name == "clamp":
        core.clamp(planned.site, low=options.get("low"), high=options.get("high"))  # raises where the bounds do not fit
    if planned.name == "freeze" and (planned.site.head is not None or planned.site.pos is not None):
        raise MethodError(f"{text!r} freezes whole sites", got=str(planned.site), fix=f"Write {planned.site.whole}")
    if planned.name == "freeze" and int(options.get("step") or 0) > planned.first:
        raise MethodError(f"{text!r} freezes to a later model", got=options["step"], wanted=f"at most {planned.first}")


class Interventions:
    """The interventions of a run, ready for the steps: `at` says what holds for a batch, `session` puts it on."""

    def __init__(self, planned: Sequence[Planned], model: "Model") -> None:
        self.planned, self.model = tuple(planned), model
        self._sites = {id(one): _sites(one, model) for one in self.planned}
        self._references: dict[int, Any] = {}

    @property
    def frozen_at(self) -> list[int]:
        """Steps whose weights are needed while something is frozen to them."""
        return sorted({_reference_step(one) for one in self.planned if one.name == "freeze"})

    def give_reference(self, step: int, model: "Model") -> None:
        """The model of that step, for what is frozen to it."""
        self._references[step] = model

    def has_reference(self, step: int) -> bool:
        return step in self._references

    def needs(self, step: int) -> list[int]:
        """The steps of the references that this update needs."""
        return sorted({_reference_step(one) for one in self.planned if one.name == "freeze" and one.holds(step)})

    def at(self, step: int, ids: Tensor) -> tuple[list[Intervention], list[tuple[Planned, Site, Tensor]]]:
        """(what is put on for this step and batch, what is penalized: the line, its site and the places [B, T, T])."""
        on: list[Intervention] = []
        penalties: list[tuple[Planned, Site, Tensor]] = []
        targets: dict[str, Tensor] = {}

        def target(name: Any) -> Tensor:
            if name not in targets:
                targets[name] = pattern_named(name)(ids)
            return targets[name]

        for one in self.planned:
            if not one.holds(step):
                continue
            for site in self._sites[id(one)]:
                if one.name == "penalize":
                    penalties.append((one, site, target(one.options["pattern"])))
                    continue
                on.append(self._made(one, site, target, ids))
        return on, penalties

    def session(self, on: Sequence[Intervention], captures: Sequence[Site]) -> Session:
        """The hooks of a step; weights keep their gradients, and a forced pattern takes no gradient from attention."""
        return Session(
            self.model.hf, self.model.anatomy, list(dict.fromkeys(captures)), list(on), Window(), grad=True, leaf=False
        )

    def _made(self, one: Planned, site: Site, target: Any, ids: Tensor) -> Intervention:
        options = one.options
        at = target(options["at"]) if options.get("at") else None
        if one.name == "zero":
            return core.zero(site)
        if one.name == "clamp":
            return core.clamp(site, low=options.get("low"), high=options.get("high"))
        if one.name == "force":
            return _Forced(site=site, op="replace", target=target(options["pattern"]), label=one.text)
        if one.name == "freeze":
            run = self._references[_reference_step(one)].run(ids, capture=[site], logits="none")
            # out of inference mode, so that the backward pass may keep it
            return core.replace(site, run[site].clone(), label=one.text)
        if one.name == "stop":
            return _Changed(site=site, op="add", detach=True, label=one.text)
        value, factor = options.get("value"), float(options.get("factor") or 0.0) if one.name == "scale" else 1.0
        op = "replace" if one.name == "replace" else "add"
        return _Changed(site=site, op=op, value=value, factor=factor, mask=at, label=one.text)


def penalty(one: Planned, seen: Tensor, places: Tensor) -> Tensor:
    """weight x mean over sequences of the mean attention to the named places.

    Within a sequence over heads and those tokens for which the pattern says something; a sequence without any counts 0,
    so that parts of a batch add up to the whole.
    """
    wanted = _of_heads(places, seen).to(seen.dtype)
    read = (seen * (wanted > 0)).sum(dim=-1).flatten(1)
    says = (wanted.sum(dim=-1) > 0).expand(*seen.shape[:-1]).flatten(1).to(seen.dtype)
    return float(one.options["weight"]) * ((read * says).sum(dim=1) / says.sum(dim=1).clamp(min=1)).mean()


def _reference_step(one: Planned) -> int:
    step = one.options.get("step")
    return one.first if step is None else int(step)


def _sites(one: Planned, model: "Model") -> list[Site]:
    """The sites that a line means. A head that is off is off at `z`, which is the same and exact.

    At `head` the sum of all heads is changed by what one of them wrote, and of the gradient a rounding error is left:
    Adam, which divides by the size of a gradient, would turn that into steps of full length.
    """
    site = one.site
    if one.name in ("zero", "stop") and site.kind in ("head", "cross_head"):
        site = dataclasses.replace(site, kind=site.kind.removesuffix("head") + "z")
    found = model.resolve(site)
    for place in found:
        if one.name == "freeze" and place.kind == "logits":
            raise InterventionError(f"{one.text!r}: frozen logits leave nothing to learn")
    return found

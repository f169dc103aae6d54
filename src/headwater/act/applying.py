"""Putting edits onto a model and taking them off to the bit: each keeps the numbers that it wrote over."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.core.errors import MethodError, ModelError, did_you_mean

if TYPE_CHECKING:
    from headwater.act.edit import Delta, Edit
    from headwater.core.model import Model


@dataclass(kw_only=True, eq=False)
class _On:
    """One edit that is on a model. kept: what each of its changes wrote over, in order."""

    edit: "Edit"
    kept: "list[tuple[Delta, Tensor]]"


@dataclass(kw_only=True, eq=False)
class _Edited:
    """What is on one `transformers` model. written: the version of each parameter (a tied one by its first name) after
    the last write of ours: another one means that something else has written."""

    base: str
    on: list[_On] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)


# Kept by the model object itself, as two Models around one object share its weights.
_edited: "WeakKeyDictionary[nn.Module, _Edited]" = WeakKeyDictionary()


def applied(model: "Model") -> "list[Edit]":
    """The edits that are on a model now, the first one first."""
    state = _edited.get(model.hf)
    return [one.edit for one in state.on] if state is not None else []


def base_fingerprint(model: "Model") -> str:
    """The fingerprint of the model without the edits that are on it."""
    state = _edited.get(model.hf)
    return state.base if state is not None and state.on else model.fingerprint


def apply(model: "Model", edit: "Edit") -> None:
    """Change the weights, and remember what they were; see `Edit.apply`."""
    with model.held():
        state = _edited.get(model.hf) or _Edited(base=model.fingerprint)
        if any(one.edit is edit for one in state.on):
            raise ModelError(f"the edit {edit.name!r} is on this model already", fix="Undo it first")
        if state.on:
            _check_untouched(model, state, edit.parameters)
        base = state.base if state.on else model.fingerprint
        if edit.fingerprint != base and edit.fingerprint != model.fingerprint:
            raise ModelError(
                f"the edit {edit.name!r} was made for another model",
                got=f"{model.name}, {model.fingerprint}",
                wanted=f"{edit.model or 'a model'}, {edit.fingerprint}, with the weights and data type it had then",
            )
        edit.sizes(model)
        _edited[model.hf] = state
        if not state.on:
            state.base = base
            state.written.clear()
        state.on.append(_put_on(model.hf, state, edit))


def undo(model: "Model", edit: "Edit | None" = None, *, all: bool = False) -> "list[Edit]":
    """Take an edit (the last one if none is named, or all) off a model, to the bit; returns those taken off.

    Edits that were put on later stay, and are computed anew on what is then beneath them. Raises ModelError where there
    is nothing to undo, or where something else has changed the weights since.
    """
    with model.held():
        state = _edited.get(model.hf)
        if state is None or not state.on:
            raise ModelError("there is no edit to undo", got=f"{model.name} as it was loaded")
        found = [one for one in state.on if all or one.edit is (edit if edit is not None else state.on[-1].edit)]
        if not found:
            names = ", ".join(one.edit.name for one in state.on)
            raise ModelError(f"the edit {edit.name if edit else ''!r} is not on this model", got=names)
        first = state.on.index(found[0])
        later = [one for one in state.on[first:] if one not in found]
        _check_untouched(model, state, [name for one in state.on[first:] for name in one.edit.parameters])
        while len(state.on) > first:
            _take_off(model.hf, state, state.on.pop())
        for one in later:
            state.on.append(_put_on(model.hf, state, one.edit))
        return [one.edit for one in found]


def originals(model: "Model") -> dict[str, Tensor]:
    """What the edited parameters were before the first edit that is on the model: copies; the model is only read.

    Raises ModelError where something else has changed the weights since.
    """
    with model.held():
        on = state.on if (state := _edited.get(model.hf)) is not None else []
        if state is None or not on:
            return {}
        names = list(dict.fromkeys(name for one in on for name in one.edit.parameters))
        _check_untouched(model, state, names)
        first = _first_names(model.hf)
        found = {first[name]: one.detach().cpu().clone() for name, one in parameters_of(model.hf, names).items()}
        for one in reversed(on):
            for delta, before in reversed(one.kept):
                found[first[delta.parameter]][delta.where()] = before.cpu()
        return found


def parameters_of(hf: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied one may be called by any of its names. Raises MethodError for unknown ones and for
    those that are not in memory."""
    known: dict[str, Any] = dict(hf.named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    for name in names:
        if name not in known:
            raise MethodError("this model has no such parameter", got=name, wanted=did_you_mean(name, known))
        if known[name].is_meta:
            raise MethodError("a weight that is not in memory cannot be edited", got=name, fix="Load the whole model")
        if not known[name].is_floating_point():
            raise MethodError("a quantized weight cannot be edited", got=f"{name}, {known[name].dtype}")
        found[name] = known[name]
    return found


def name_of(hf: nn.Module, parameter: Tensor) -> str:
    """The name of a parameter. Raises MethodError for a tensor that is none of the model's."""
    for name, one in hf.named_parameters():
        if one is parameter:
            return name
    raise MethodError("this weight is not a parameter of the model", got=f"shape {list(parameter.shape)}")


def _put_on(hf: nn.Module, state: _Edited, edit: "Edit") -> _On:
    known = parameters_of(hf, edit.parameters)
    kept: list[tuple[Delta, Tensor]] = []
    try:
        for delta in edit.deltas:
            parameter = known[delta.parameter]
            where = _on_device(delta.where(), parameter)
            with torch.no_grad():
                before = parameter[where].clone()
                # Halves are added in single precision and rounded once.
                wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
                change = delta.value().to(parameter.device, wide)
                kept.append((delta, before))
                parameter[where] = (before.to(wide) + change).to(parameter.dtype)
    except BaseException:
        _restore(known, kept)
        raise
    finally:
        _note(hf, state, known)
    return _On(edit=edit, kept=kept)


def _take_off(hf: nn.Module, state: _Edited, one: _On) -> None:
    known = parameters_of(hf, one.edit.parameters)
    _restore(known, one.kept)
    _note(hf, state, known)


def _restore(known: dict[str, nn.Parameter], kept: "list[tuple[Delta, Tensor]]") -> None:
    for delta, before in reversed(kept):
        parameter = known[delta.parameter]
        with torch.no_grad():
            parameter[_on_device(delta.where(), parameter)] = before.to(parameter.device)


def _note(hf: nn.Module, state: _Edited, known: dict[str, nn.Parameter]) -> None:
    first = _first_names(hf)
    for name, parameter in known.items():
        if not parameter.is_inference():
            state.written[first[name]] = parameter._version


def _first_names(hf: nn.Module) -> dict[str, str]:
    """Each name of a parameter, and the first that it goes by: a tied one has several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(one), name) for name, one in hf.named_parameters(remove_duplicate=False)}


def _check_untouched(model: "Model", state: _Edited, names: Iterable[str]) -> None:
    """Refuse to write over weights that something else has changed: what is kept would not be what was there."""
    first = _first_names(model.hf)
    for name, parameter in parameters_of(model.hf, names).items():
        known = state.written.get(first[name])
        if known is not None and not parameter.is_inference() and parameter._version != known:
            raise ModelError(
                f"{name} was changed since the edit was applied",
                fix="Undo edits before anything else changes these weights, or load the model again",
            )
        dtypes = {before.dtype for one in state.on for delta, before in one.kept if delta.parameter == name}
        if dtypes - {parameter.dtype}:
            raise ModelError(f"{name} has another data type than when the edit was applied", got=parameter.dtype)


def _on_device(where: tuple[slice | Tensor, ...], parameter: Tensor) -> tuple[Any, ...]:
    return tuple(one.to(parameter.device) if isinstance(one, Tensor) else one for one in where)

"""Which weights a method may train: all, those of named parts, or those of parts that are found to matter."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.act.applying import parameters_of
from headwater.act.edit import Delta
from headwater.core.errors import HeadwaterError, MethodError, did_you_mean
from headwater.core.sites import Site

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

FOUND = ("lookup", "output")
_EXAMPLES = "all, lookup, output:4, parts such as m5, a5, a5.h3, layer.5, or names of parameters such as *.down_proj.*"


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Some weights of a model.

    parts: parameter -> None (the whole of it), or (axis, index): some of its slices. told: what they were called.
    """

    parts: dict[str, tuple[int, Tensor] | None]
    told: tuple[str, ...]

    def mask(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient of a parameter, zero outside these weights."""
        part = self.parts[name]
        if part is None:
            return gradient
        axis, index = part
        out = torch.zeros_like(gradient)
        where = (*[slice(None)] * axis, index.to(gradient.device))
        out[where] = gradient[where]
        return out

    def deltas(self, before: dict[str, nn.Parameter], after: dict[str, nn.Parameter]) -> list[Delta]:
        """What has changed, parameter by parameter; those that stayed the same are left out."""
        found: list[Delta] = []
        for name, part in self.parts.items():
            change = (after[name].detach() - before[name].detach().to(after[name].dtype)).cpu()
            if part is not None:
                axis, index = part
                change = change.index_select(axis, index)
                if bool(change.any()):
                    found.append(Delta.slices(name, index, change, dim=axis))
            elif bool(change.any()):
                found.append(Delta.full(name, change))
        return found


def weights_of(model: "Model", which: str | Sequence[str], behavior: "Behavior | None" = None) -> Weights:
    """The weights of `which`: "all"; names of parts (`m5` or `mlp_out.5`: an MLP; `a5` or `attn_out.5`: an attention
    layer; `a5.h3`: what a head writes with; `layer.5`; `embed`; `logits`); names of parameters, which may hold `*`; or
    parts that a measurement on `behavior` finds (`locating.py`): "lookup" (with a number: "lookup:4") the MLPs that act
    where the subject stands, "output" the attention layers and MLPs that move the output most.

    Raises MethodError for names that this model does not have.
    """
    names = [one.strip() for one in which.split("+")] if isinstance(which, str) else list(which)
    told: list[str] = []
    for name in names:
        kind, _, number = name.partition(":")
        if kind in FOUND:
            from headwater.act.locating import lookup_parts, output_parts

            if behavior is None:
                raise MethodError(f"the weights {name!r} are found on a behavior, and none is given")
            if number and not (number.isdigit() and int(number)):
                raise MethodError("how many parts is a whole number", got=repr(name), wanted=f"such as {kind}:4")
            find = lookup_parts if kind == "lookup" else output_parts
            told += find(model, behavior, int(number) if number else None)
        else:
            told.append(name)
    parts: dict[str, Any] = {}
    for name in told:
        for parameter, part in _named(model, name).items():
            known = parts.get(parameter, part)
            if known is None or part is None:
                parts[parameter] = None
            else:
                parts[parameter] = (part[0], torch.cat([known[1], part[1]]).unique())
    if not parts:
        raise MethodError("no weights to train", wanted=_EXAMPLES)
    parameters_of(model.hf, parts)  # refuses what is quantized or not in memory
    return Weights(parts=parts, told=tuple(told))


def _named(model: "Model", name: str) -> "dict[str, tuple[int, Tensor] | None]":
    own = [one for one, _ in model.hf.named_parameters()]
    if name == "all":
        return dict.fromkeys(own)
    if "." in name and (found := fnmatch.filter(own, name)):
        return dict.fromkeys(found)
    if name.startswith("layer.") and name[6:].isdigit():
        return dict.fromkeys(_below(own, _block(model, int(name[6:])).name))
    if name in ("embed", "logits"):
        module = model.hf.get_input_embeddings() if name == "embed" else model.hf.get_output_embeddings()
        return _parameters(model, [module] if module is not None else [])
    whole = name[1:] if name[:1] == "a" and name[1:].isdigit() else ""  # `a5`: all heads of a layer
    try:
        site = Site.parse(f"attn_out.{whole}" if whole else name)
    except HeadwaterError:
        raise MethodError("no such weights", got=repr(name), wanted=_EXAMPLES) from None
    if not isinstance(site.layer, int) or site.kind not in ("mlp_out", "attn_out", "head", "z"):
        raise MethodError("no such weights", got=repr(name), wanted=f"{_EXAMPLES}; {did_you_mean(name, own)}")
    block = _block(model, site.layer)
    if site.kind == "mlp_out":
        return _mlp(model, block, own)
    if block.attention is None:
        raise MethodError(f"layer {site.layer} of {model.name} has no attention", got=repr(name))
    if site.head is None or site.head == "*":
        return dict.fromkeys(_below(own, block.attention.name)) | _parameters(model, [block.attention.out_proj])
    from headwater.act.editing.parts import head_columns, out_projection

    matrix = out_projection(model, site.layer)
    return {matrix.parameter: (0 if matrix.flipped else 1, head_columns(model, site.layer, int(site.head)))}


def _mlp(model: "Model", block: Any, own: list[str]) -> "dict[str, tuple[int, Tensor] | None]":
    """The block's parameters that are neither its attention's nor a norm's: OPT has no module that is the MLP."""
    modules = dict(model.hf.named_modules())
    norms = [name for name, module in modules.items() if "norm" in type(module).__name__.lower()]
    others = {name for norm in norms for name in _below(own, norm)}
    for part in (block.attention, block.cross):
        if part is not None:
            others |= {*_below(own, part.name), *_below(own, part.out_proj_name)}
    found = [name for name in _below(own, block.name) if name not in others]
    if block.mlp is None or not found:
        raise MethodError(f"layer {block.index} of {model.name} has no MLP with weights of its own")
    return dict.fromkeys(found)


def _parameters(model: "Model", modules: "Sequence[nn.Module]") -> "dict[str, tuple[int, Tensor] | None]":
    """By identity: tied weights go by the name that `named_parameters` gives them."""
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name: None for name, parameter in model.hf.named_parameters() if id(parameter) in held}


def _below(names: list[str], module: str) -> list[str]:
    return [name for name in names if name.startswith(f"{module}.")]


def _block(model: "Model", layer: int) -> Any:
    if not 0 <= layer < model.n_layers:
        raise MethodError(f"{model.name} has no layer {layer}", wanted=f"0 to {model.n_layers - 1}")
    return model.anatomy.main.blocks[layer]

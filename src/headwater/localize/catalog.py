"""Localizing methods by name: those of this room, and those that outside packages add by entry point."""

import builtins
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.registry import Registry
from headwater.core.results import Result

_OWN = (
    "search.acdc",
    "attribution.eap",
    "patching.causal_trace",
    "attribution.clean_corrupted",
    "search.head_codes",
    "search.cdt",
    "attribution.grad_drop",
    "search.edge_pruning",
    "search.flow_routes",
    "attribution.ig_activations",
    "comparing.interference",
    "attribution.node_ig",
    "attribution.atp",
    "search.optimal_ablation",
    "patching.patch",
    "patching.paths",
    "search.greedy",
    "attribution.atp_star",
    "comparing.subspace",
    "search.attention_tracing",
)
C = TypeVar("C")
_SENTENCE = re.compile(r"(?<=[a-z0-9)`])\. (?=[A-Z`])")


Method = Callable[..., Result]
"""method(model, behavior, **options) -> Result."""


methods: Registry[Method] = Registry("method", own=[f"headwater.localize.{module}" for module in _OWN])
"""Outside packages add theirs by the entry point group `headwater.methods`."""


def described(name: str) -> dict[str, str]:
    """What a method says of itself: `what` it measures with its paper, its `options`, and its `known failure`."""
    method = methods.get(name)
    text = " ".join((inspect.getdoc(method) or "").split())
    what = _SENTENCE.split(text)[0]
    failure = _SENTENCE.split(re.split("[Kk]nown failure: ", text)[-1])[0] if "nown failure: " in text else ""
    return {"name": name, "what": what.rstrip("."), "known failure": failure.rstrip("."), "options": _options(method)}


def _options(method: Method) -> str:
    """Names of the options: of the config, where there is one, else of the function's own keywords."""
    hints = get_type_hints(method, localns=_Anything())
    for kind in get_args(hints.get("config")):
        if dataclasses.is_dataclass(kind):
            return ", ".join(field.name for field in dataclasses.fields(kind))
    known = inspect.signature(method).parameters.values()
    return ", ".join(one.name for one in known if one.kind is one.KEYWORD_ONLY)


class _Anything(dict[str, Any]):
    """Names that a method's file imports for type checkers only; what they are does not matter here."""

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return Any


def fitted(kind: type[C], options: Mapping[str, Any]) -> C:
    """A method's config from the values that a user gave: each of the type that its field says. Raises MethodError,
    with near names for an unknown one.
    """
    known = [field.name for field in dataclasses.fields(cast(Any, kind))]
    for name in options:
        if name not in known:
            raise MethodError(f"unknown option of {kind.__name__}", got=repr(name), wanted=did_you_mean(name, known))
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise MethodError(f"an option of {kind.__name__} does not fit", got="; ".join(faults)) from None

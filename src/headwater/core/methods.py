"""Methods of a room: what each says of itself, and its options from what a user gave."""

import builtins
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from headwater.core.errors import MethodError, did_you_mean
from headwater.core.registry import Registry

C = TypeVar("C")
M = TypeVar("M", bound=Callable[..., Any])
_SENTENCE = re.compile(r"(?<=[a-z0-9)`])\. (?=[A-Z`])")


class Methods(Registry[M], Generic[M]):
    """Functions that stages call by name, and what they say of themselves."""

    def described(self, name: str) -> dict[str, str]:
        """What a method says of itself: `what` it does with its paper, its `options`, and its `known failure`."""
        method = self.get(name)
        text = " ".join((inspect.getdoc(method) or "").split())
        what = _SENTENCE.split(text)[0]
        failure = _SENTENCE.split(re.split("[Kk]nown failure: ", text)[-1])[0] if "nown failure: " in text else ""
        return {
            "name": name,
            "what": what.rstrip("."),
            "known failure": failure.rstrip("."),
            "options": ", ".join(options_of(method)),
        }


def options_of(method: Callable[..., Any]) -> list[str]:
    """Names of the options: of the config, where there is one, else of the function's own keywords."""
    hints = get_type_hints(method, localns=_Anything())
    for kind in get_args(hints.get("config")):
        if dataclasses.is_dataclass(kind):
            return [field.name for field in dataclasses.fields(kind)]
    known = inspect.signature(method).parameters.values()
    return [one.name for one in known if one.kind is one.KEYWORD_ONLY]


class _Anything(dict[str, Any]):
    """Names that a method's file imports for type checkers only; what they are does not matter here."""

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return Any


def configured(kind: type[C], config: C | None, options: Mapping[str, Any]) -> C:
    """One config from a given one or from keywords; an unknown option is refused by name, a misfit value by type."""
    if config is not None and options:
        raise MethodError("give a config or its options, not both", got=sorted(options))
    return config if config is not None else fitted(kind, options)


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

"""Localizing methods by name: those of this room, and those that outside packages add by entry point."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from headwater.core.errors import MethodError
from headwater.core.registry import Registry
from headwater.core.results import Result

_OWN = ("attribution", "nodes", "patching")
C = TypeVar("C")


Method = Callable[..., Result]
"""method(model, behavior, **options) -> Result."""


class Methods(Registry[Method]):
    """The files of this room register as they are imported, which happens when a name is asked for."""

    def get(self, name: str) -> Method:
        self._import_own(name)
        return super().get(name)

    def names(self) -> list[str]:
        self._import_own(None)
        return super().names()

    def _import_own(self, name: str | None) -> None:
        if name is None or name not in self._known:
            for module in _OWN:
                importlib.import_module(f"headwater.localize.{module}")


methods = Methods("method")
"""Outside packages add theirs by the entry point group `headwater.methods`."""


def fitted(kind: type[C], options: Mapping[str, Any]) -> C:
    """A method's config from the values that a user gave: each of the type that its field says. Raises MethodError."""
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise MethodError(f"an option of {kind.__name__} does not fit", got="; ".join(faults)) from None

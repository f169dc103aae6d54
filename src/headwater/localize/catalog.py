"""Localizing methods by name: those of this room, and those that outside packages add by entry point."""

import importlib
from collections.abc import Callable

from headwater.core.registry import Registry
from headwater.core.results import Result

_OWN = ("attribution", "nodes", "patching")


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

"""Names for things that are added one file at a time: methods, metrics, behaviors, tests."""

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from headwater.core.errors import HeadwaterError, MethodError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one sort, by name. Outside packages add theirs by entry point, group `headwater.<sort>s`.

    own: modules of the house that register theirs as they are imported, which happens when a name is asked for.
    """

    def __init__(self, sort: str, *, error: type[HeadwaterError] = MethodError, own: Sequence[str] = ()) -> None:
        self.sort = sort
        self._error = error
        self._own = tuple(own)
        self._known: dict[str, T] = {}
        self._entry_points_read = False

    def register(self, name: str) -> Callable[[T], T]:
        def add(thing: T) -> T:
            if name in self._known and self._known[name] is not thing:
                raise self._error(f"two {self.sort}s claim the name {name!r}", fix="Rename one of them")
            self._known[name] = thing
            return thing

        return add

    def names(self) -> list[str]:
        self._import_own()
        self._read_entry_points()
        return sorted(self._known)

    def __contains__(self, name: str) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """The thing of that name; an unknown name raises and lists near and known ones."""
        if name not in self._known:
            self._import_own()
            self._read_entry_points()
        if name not in self._known:
            raise self._error(f"unknown {self.sort}", got=repr(name), wanted=did_you_mean(name, self._known))
        return self._known[name]

    def _import_own(self) -> None:
        for module in self._own:
            importlib.import_module(module)

    def _read_entry_points(self) -> None:
        if self._entry_points_read:
            return
        self._entry_points_read = True
        for entry in entry_points(group=f"headwater.{self.sort}s"):
            self._known.setdefault(entry.name, entry.load())

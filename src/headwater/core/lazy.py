"""Names of a package that are resolved on first use, so that importing the package is cheap."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, places: Mapping[str, str], names: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    places: name -> the module that it lives in: below the package, or anywhere in the house where it begins with
    `headwater.`; "" means that the name is a module below the package. names: what `dir` lists.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place = places[name] or name
        module = importlib.import_module(place if place.startswith("headwater.") else f"{package}.{place}")
        value = getattr(module, name) if places[name] else module
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted(names)

"""Modules that may be called as the function they are named after."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_verb(module_name: str, function: Callable[..., Any]) -> None:
    """Let the module be called as `function`.

    A submodule and a function of one name cannot both be the package's attribute: importing the submodule always
    wins. So the module itself answers calls, whichever way it was reached.
    """
    module = sys.modules[module_name]
    kind = type(
        module.__name__.rsplit(".", 1)[-1], (ModuleType,), {"__call__": lambda _self, *a, **k: function(*a, **k)}
    )
    module.__class__ = kind

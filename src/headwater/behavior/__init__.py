"""Stage 1: what the model does. A behavior is a table of minimal pairs with a metric.

The room is also a verb: `headwater.behavior("ioi", n=200, seed=0)` makes a behavior from a generator's name or a
file's path.
"""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Behavior": "table",
    "Bound": "bind",
    "Group": "bind",
    "BehaviorReport": "evaluate",
    "Registry": "generators",
    "metric": "metrics",
    "metrics_known": "metrics",
    "known_facts": "known",
}
# Modules named after their main function; each may also be called, so `hw.behavior.evaluate(model, ioi)` reads as it
# should.
_VERBS = ("bind", "canary", "check", "evaluate")
_MODULES = (*_VERBS, "generators", "metrics", "table")

__all__ = ["Behavior", "BehaviorReport", "Bound", "Group", "load", "make", "metric", "names", *_VERBS]  # pyright: ignore[reportUnsupportedDunderAll]


def load(path: "str | os.PathLike[str]", *, n: int | None = None, seed: int = 0) -> "Behavior":
    """Read a behavior from a Parquet, CSV or JSONL file; `n` keeps that many rows, drawn with `seed`, half of each
    split.

    Raises BehaviorError that names the line, the column and the mend where the file does not hold minimal pairs.
    """
    from headwater.behavior.table import Behavior

    return Behavior.load(path, n=n, seed=seed)


def make(name_or_path: "str | os.PathLike[str]", n: int | None = None, seed: int = 0, **options: Any) -> "Behavior":
    """The behavior of that generator, or of that file; `headwater.behavior(...)` is this function.

    Parameters
    ----------
    name_or_path: a generator's name (`headwater.behavior.names()` lists them) or the path of a Parquet, CSV or JSONL
        file.
    n: how many pairs; None means the generator's own number, or every row of the file.
    seed: everything random follows from it; the same name, n, seed and options give the same table in every process.
    options: the generator's own options.

    Raises BehaviorError for an unknown name (with near names), an unknown option, or a file that cannot be read.
    """
    from headwater.behavior import generators

    name = os.fspath(name_or_path)
    if name in generators.registry:
        return generators.generate(name, n=n, seed=seed, options=options)
    if os.path.exists(name) or _looks_like_a_path(name):
        if options:
            from headwater.core.errors import BehaviorError

            raise BehaviorError(
                "a behavior read from a file takes no options", got=", ".join(sorted(options)), wanted="n and seed only"
            )
        return load(name, n=n, seed=seed)
    generators.registry.get(name)  # raises, listing near names
    raise AssertionError("unreachable")


def names() -> list[str]:
    """The names of all registered generators, sorted."""
    from headwater.behavior import generators

    return generators.registry.names()


def _looks_like_a_path(name: str) -> bool:
    return (
        os.sep in name or "/" in name or os.path.splitext(name)[1].lower() in (".csv", ".jsonl", ".ndjson", ".parquet")
    )


class Room(ModuleType):
    """A module that may be called."""

    def __call__(
        self, name_or_path: "str | os.PathLike[str]", n: int | None = None, seed: int = 0, **options: Any
    ) -> "Behavior":
        return make(name_or_path, n, seed, **options)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_NAMES, *_MODULES})


sys.modules[__name__].__class__ = Room

if TYPE_CHECKING:
    from headwater.behavior import bind as bind
    from headwater.behavior import canary as canary
    from headwater.behavior import check as check
    from headwater.behavior import evaluate as evaluate
    from headwater.behavior import generators as generators
    from headwater.behavior import metrics as metrics
    from headwater.behavior import table as table
    from headwater.behavior.bind import Bound, Group
    from headwater.behavior.evaluate import BehaviorReport
    from headwater.behavior.metrics import metric
    from headwater.behavior.table import Behavior

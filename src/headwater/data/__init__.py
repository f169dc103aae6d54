"""data, stage 4: which training data formed a mechanism. `Corpus` is what a model saw, in the order of its training."""

import importlib
from typing import TYPE_CHECKING, Any

_PLACES = {
    "Corpus": "headwater.data.corpus",
}

__all__ = ["Corpus"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'headwater.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from headwater.data.corpus import Corpus

"""The inverse pipeline: one Investigation runs the stages in order, stores each, and goes on where it was stopped."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.trace.config import STAGES
    from headwater.trace.investigation import Investigation
    from headwater.trace.verify import Verification

__all__ = ["STAGES", "Investigation", "Verification"]


def __getattr__(name: str) -> Any:
    import importlib

    homes = {"STAGES": "config", "Investigation": "investigation", "Verification": "verify"}
    if name in homes:
        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""headwater: trace what a language model does back to where it comes from.

Importing this package is cheap: names are resolved on first use, so torch and transformers load only when needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "load": "headwater.core.loading",
    "Model": "headwater.core.model",
    "Run": "headwater.core.model",
    "Site": "headwater.core.sites",
    "HeadwaterError": "headwater.core.errors",
    "Result": "headwater.core.results",
    "load_result": "headwater.core.results",
    **{
        name: "headwater.core.interventions"
        for name in (
            "Intervention",
            "zero",
            "mean",
            "replace",
            "resample",
            "add",
            "project_out",
            "swap_subspace",
            "clamp",
            "freeze",
        )
    },
    "Behavior": "headwater.behavior.table",
    "Claim": "headwater.claims.claim",
    "Ledger": "headwater.claims.ledger",
    "Circuit": "headwater.localize.circuit",
    "Investigation": "headwater.trace.investigation",
}
# `behavior`, `trace` and the like are rooms that are also verbs: `hw.behavior("ioi")` works because the package is callable.
_ROOMS = ("core", "behavior", "localize", "claims", "act", "trace", "report")

__all__ = [*_NAMES, *_ROOMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"headwater.{name}")
    else:
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from headwater import act, behavior, claims, core, localize, report, trace
    from headwater.behavior.table import Behavior
    from headwater.claims.claim import Claim
    from headwater.claims.ledger import Ledger
    from headwater.core.errors import HeadwaterError
    from headwater.core.interventions import (
        Intervention,
        add,
        clamp,
        freeze,
        mean,
        project_out,
        replace,
        resample,
        swap_subspace,
        zero,
    )
    from headwater.core.loading import load
    from headwater.core.model import Model, Run
    from headwater.core.results import Result, load_result
    from headwater.core.sites import Site
    from headwater.localize.circuit import Circuit
    from headwater.trace.investigation import Investigation

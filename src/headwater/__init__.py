"""headwater: trace what a language model does back to where it comes from.

Importing this package is cheap: names are resolved on first use, so torch and transformers load only when needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each name lives. `hw.behavior` is a room and also a verb: `hw.behavior("ioi")` makes a behavior.
_ROOMS = ("core", "behavior", "localize", "claims", "act", "dynamics", "data", "trace", "report", "bench")
_INTERVENTIONS = (
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
_PLACES = {
    "load": "headwater.core.loading",
    "Model": "headwater.core.model",
    "Run": "headwater.core.run",
    "Site": "headwater.core.sites",
    "HeadwaterError": "headwater.core.errors",
    "Result": "headwater.core.results",
    "load_result": "headwater.core.results",
    "Behavior": "headwater.behavior.table",
    "Claim": "headwater.claims.claim",
    "Ledger": "headwater.claims.ledger",
    "Circuit": "headwater.localize.circuit",
    "Investigation": "headwater.trace.investigation",
    **dict.fromkeys(_INTERVENTIONS, "headwater.core.interventions"),
}

__all__ = [
    "Behavior",
    "Circuit",
    "Claim",
    "HeadwaterError",
    "Intervention",
    "Investigation",
    "Ledger",
    "Model",
    "Result",
    "Run",
    "Site",
    "__version__",
    "act",
    "add",
    "behavior",
    "bench",
    "claims",
    "clamp",
    "core",
    "data",
    "dynamics",
    "freeze",
    "load",
    "load_result",
    "localize",
    "mean",
    "project_out",
    "replace",
    "report",
    "resample",
    "swap_subspace",
    "trace",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"headwater.{name}")
    else:
        raise AttributeError(f"module 'headwater' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from headwater import act, bench, claims, core, data, dynamics, localize, report, trace
    from headwater.behavior import Room
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
    from headwater.core.model import Model
    from headwater.core.results import Result, load_result
    from headwater.core.run import Run
    from headwater.core.sites import Site
    from headwater.localize.circuit import Circuit
    from headwater.trace.investigation import Investigation

    behavior: Room

"""Ground truth: models whose mechanism is known, because a program was compiled into their weights.

`truth.compile("reverse")` gives such a model with its mechanism; `truth.behavior` the minimal pairs to explain it on.
Names are resolved on first use, so that importing this room is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "truth": ("truth", None),
    "rasp": ("rasp", None),
    "Compiled": ("rasp.compiler", "Compiled"),
    "CompileConfig": ("rasp.compiler", "CompileConfig"),
    "TrueMechanism": ("mechanism", "TrueMechanism"),
    "Interchange": ("interchange", "Interchange"),
    "CompressConfig": ("compress", "CompressConfig"),
    "Compression": ("compress", "Compression"),
    "claim_rates": ("rates", "claim_rates"),
    "ClaimRates": ("rates", "ClaimRates"),
    "score": ("scoring.run", "score"),
    "TruthScores": ("scoring.table", "TruthScores"),
}

__all__ = [
    "ClaimRates",
    "CompileConfig",
    "Compiled",
    "CompressConfig",
    "Compression",
    "Interchange",
    "TrueMechanism",
    "TruthScores",
    "claim_rates",
    "rasp",
    "score",
    "truth",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'headwater.bench' has no attribute {name!r}")
    module, inner = _NAMES[name]
    value = importlib.import_module(f"headwater.bench.{module}")
    value = value if inner is None else getattr(value, inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from headwater.bench import rasp, truth
    from headwater.bench.compress import CompressConfig, Compression
    from headwater.bench.interchange import Interchange
    from headwater.bench.mechanism import TrueMechanism
    from headwater.bench.rasp.compiler import CompileConfig, Compiled
    from headwater.bench.rates import ClaimRates, claim_rates
    from headwater.bench.scoring.run import score
    from headwater.bench.scoring.table import TruthScores

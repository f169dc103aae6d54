"""Ground truth: models whose mechanism is known, because a program was compiled into their weights.

`truth.compile("reverse")` gives such a model with its mechanism; `truth.behavior` the minimal pairs to explain it on.
Names are resolved on first use, so that importing this room is cheap.
"""

from typing import TYPE_CHECKING

from headwater.core.lazy import lazy

_NAMES = {
    "truth": "",
    "rasp": "",
    "Compiled": "rasp.compiler",
    "CompileConfig": "rasp.compiler",
    "TrueMechanism": "mechanism",
    "Interchange": "interchange",
    "CompressConfig": "compress",
    "Compression": "compress",
    "claim_rates": "rates",
    "ClaimRates": "rates",
    "score": "scoring.run",
    "TruthScores": "scoring.table",
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


__getattr__, __dir__ = lazy(__name__, _NAMES, __all__)


if TYPE_CHECKING:
    from headwater.bench import rasp, truth
    from headwater.bench.compress import CompressConfig, Compression
    from headwater.bench.interchange import Interchange
    from headwater.bench.mechanism import TrueMechanism
    from headwater.bench.rasp.compiler import CompileConfig, Compiled
    from headwater.bench.rates import ClaimRates, claim_rates
    from headwater.bench.scoring.run import score
    from headwater.bench.scoring.table import TruthScores

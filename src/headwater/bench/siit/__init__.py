"""Transformers trained to a known mechanism (SIIT), and InterpBench's published ones.

`siit.train("ioi", out=...)` trains one of `siit.configs`; `siit.load` reads it again with its mechanism and checks.
"""

from typing import TYPE_CHECKING

from headwater.core.lazy import lazy

_NAMES = {
    "Alignment": "alignment",
    "CausalGraph": "causal",
    "IOI": "ioi",
    "Place": "alignment",
    "RaspGraph": "programs",
    "Recovery": "recovering",
    "Siit": "models",
    "SiitConfig": "config",
    "SiitReport": "checks",
    "Swap": "causal",
    "Variable": "causal",
    "Written": "causal",
    "align": "alignment",
    "causal_graph": "training",
    "check": "checks",
    "configs": "config",
    "load": "models",
    "load_interpbench": "interpbench",
    "pairs": "truth",
    "recovery": "recovering",
    "train": "models",
}

__all__ = [
    "IOI",
    "Alignment",
    "CausalGraph",
    "Place",
    "RaspGraph",
    "Recovery",
    "Siit",
    "SiitConfig",
    "SiitReport",
    "Swap",
    "Variable",
    "Written",
    "align",
    "causal_graph",
    "check",
    "configs",
    "load",
    "load_interpbench",
    "pairs",
    "recovery",
    "train",
]


__getattr__, __dir__ = lazy(__name__, _NAMES, __all__)


if TYPE_CHECKING:
    from headwater.bench.siit.alignment import Alignment, Place, align
    from headwater.bench.siit.causal import CausalGraph, Swap, Variable, Written
    from headwater.bench.siit.checks import SiitReport, check
    from headwater.bench.siit.config import SiitConfig, configs
    from headwater.bench.siit.interpbench import load_interpbench
    from headwater.bench.siit.ioi import IOI
    from headwater.bench.siit.models import Siit, load, train
    from headwater.bench.siit.programs import RaspGraph
    from headwater.bench.siit.recovering import Recovery, recovery
    from headwater.bench.siit.training import causal_graph
    from headwater.bench.siit.truth import pairs

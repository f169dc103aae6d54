"""The settings of one model trained to a known mechanism, and the registry of those that ship."""

from dataclasses import dataclass
from typing import Any, Literal

from headwater.core.errors import MethodError
from headwater.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class SiitConfig:
    """Everything that a run depends on: the same config gives the same weights on the same machine.

    graph: `ioi` or a program of the RASP library. length: tokens of an input (`ioi` has its own). family, n_layers,
    n_heads, d_model, d_mlp: the transformer, with its norms and random weights. align_seed: which heads carry the
    variables. iit, strict, behavior: weights of the three losses. both: share of the strict rows that swap every node
    outside at once (the others swap one). batch: rows a step. steps: at most. lr, weight_decay: AdamW's, cosine to a
    tenth. average: what is checked and kept are running means of the weights, in which a step counts 1 - average (0:
    the last weights themselves). check_every: steps between checks on `check_rows` inputs. enough: interchange accuracy
    at which training may stop, `quiet`: share of answers that nodes outside may still change. patience: checks in a row
    that must pass.
    """

    graph: str
    length: int = 7
    family: Literal["gpt2", "llama"] = "gpt2"
    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 64
    d_mlp: int = 128
    align_seed: int = 0
    seed: int = 0
    behavior: float = 1.0
    iit: float = 1.0
    strict: float = 1.0
    both: float = 0.5
    batch: int = 192
    steps: int = 1500
    lr: float = 2e-3
    weight_decay: float = 0.01
    average: float = 0.98
    check_every: int = 100
    check_rows: int = 512
    enough: float = 0.995
    quiet: float = 0.005
    patience: int = 2

    def __post_init__(self) -> None:
        faults = [
            name
            for name in ("length", "n_layers", "n_heads", "d_mlp", "steps", "check_every", "check_rows", "patience")
            if getattr(self, name) < 1
        ]
        faults += [name for name in ("behavior", "iit", "strict", "weight_decay") if getattr(self, name) < 0]
        faults += [name for name in ("both", "enough", "quiet") if not 0 <= getattr(self, name) <= 1]
        faults += ["average"] if not 0 <= self.average < 1 else []
        if self.d_model < 1 or self.d_model % (2 * self.n_heads):
            faults.append("d_model (a multiple of twice n_heads)")
        if self.batch < 4:
            faults.append("batch (at least 4)")
        if self.lr <= 0:
            faults.append("lr")
        if faults:
            raise MethodError(
                "a SIIT config does not fit", got=f"{self}", wanted=f"other values of {', '.join(faults)}"
            )


configs: Registry[SiitConfig] = Registry("siit_config", error=MethodError)
"""Configs by name; outside packages add theirs by the entry point group `headwater.siit_configs`."""

# Stricter than the rest about when to stop: at .995 its final check on fresh inputs fell short.
_IOI: dict[str, Any] = {
    "graph": "ioi", "length": 14, "n_layers": 4, "batch": 128, "steps": 3000, "enough": 0.999, "patience": 3,
}  # fmt: skip
_SHIPPED: dict[str, dict[str, Any]] = {
    # name: what differs from the defaults
    "ioi": _IOI,
    "ioi_llama": {**_IOI, "family": "llama"},
    "previous": {"graph": "previous"},
    "shift_by_2": {"graph": "shift_by_2"},
    "repeats": {"graph": "repeats"},
    "first_occurrence": {"graph": "first_occurrence"},
    "histogram": {"graph": "histogram", "steps": 4000},
    "parity": {"graph": "causal_parity", "steps": 4000},
    "detect_abc": {"graph": "detect_abc"},
    "more_x_than_y": {"graph": "more_x_than_y"},
    "pair_difference": {"graph": "pair_difference", "steps": 4000},
    "depth": {"graph": "depth", "family": "llama", "steps": 4000},
    "distinct": {"graph": "distinct", "steps": 4000},
    "rank": {"graph": "rank", "family": "llama", "steps": 4000},
    "induction": {"graph": "causal_induction", "n_layers": 4, "steps": 4000},
}
for _name, _options in _SHIPPED.items():
    configs.register(_name)(SiitConfig(**_options))

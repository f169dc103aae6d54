"""Where each site lives inside a model: found from the model's own structure, measured, not trusted."""

from headwater.core.anatomy.find import find_anatomy, is_norm
from headwater.core.anatomy.trace import device_of, evaluating
from headwater.core.anatomy.types import Anatomy, Attention, Block, Mixer, Mlp, Port, Stack, Write, linear_weight

__all__ = [
    "Anatomy",
    "Attention",
    "Block",
    "Mixer",
    "Mlp",
    "Port",
    "Stack",
    "Write",
    "device_of",
    "evaluating",
    "find_anatomy",
    "is_norm",
    "linear_weight",
]

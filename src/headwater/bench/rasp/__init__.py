"""RASP as a small language in Python, its interpreter, and its compiler to transformers.

`from headwater.bench.rasp import *` gives the words that programs are written in.
"""

from headwater.bench.rasp.interpreter import evaluate
from headwater.bench.rasp.language import (
    ALWAYS,
    EQ,
    GE,
    GT,
    LE,
    LT,
    NE,
    NEVER,
    Aggregate,
    Comparison,
    Constant,
    LinearSequenceMap,
    Map,
    RaspError,
    Select,
    Selector,
    SelectorWidth,
    SequenceMap,
    SOp,
    categorical,
    indices,
    numerical,
    tokens,
)

__all__ = [
    "ALWAYS",
    "EQ",
    "GE",
    "GT",
    "LE",
    "LT",
    "NE",
    "NEVER",
    "Aggregate",
    "Comparison",
    "Constant",
    "LinearSequenceMap",
    "Map",
    "RaspError",
    "SOp",
    "Select",
    "Selector",
    "SelectorWidth",
    "SequenceMap",
    "categorical",
    "evaluate",
    "indices",
    "numerical",
    "tokens",
]

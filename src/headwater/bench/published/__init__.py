"""Published benchmarks, read in their own formats: RAVEL, CausalGym, FIND, InterpBench, and MIB's causal variables."""

from headwater.bench.published.causalgym import MinimalPair, causalgym, read_pairs, sample_template, template_names
from headwater.bench.published.find import FindFunction, find
from headwater.bench.published.find import load as load_find
from headwater.bench.published.interchange import Interchange, fit_subspace, swapped
from headwater.bench.published.interpbench import interpbench
from headwater.bench.published.mib import (
    arithmetic,
    as_behavior,
    causal_variable,
    indirect_object,
    multiple_choice,
    read_rows,
)
from headwater.bench.published.ravel import Ravel, ravel
from headwater.bench.published.result import PublishedScores

__all__ = [
    "FindFunction",
    "Interchange",
    "MinimalPair",
    "PublishedScores",
    "Ravel",
    "arithmetic",
    "as_behavior",
    "causal_variable",
    "causalgym",
    "find",
    "fit_subspace",
    "indirect_object",
    "interpbench",
    "load_find",
    "multiple_choice",
    "ravel",
    "read_pairs",
    "read_rows",
    "sample_template",
    "swapped",
    "template_names",
]

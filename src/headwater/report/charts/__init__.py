"""One chart function a kind of Result, in Altair; `Result.chart()` finds them here by the kind's name."""

from typing import Any

from headwater.report.charts.actions import act_comparison
from headwater.report.charts.acts import steering_curve
from headwater.report.charts.behaviors import behavior_report, canary, margins
from headwater.report.charts.benches import learned_program, minimality, mips, published_scores
from headwater.report.charts.circuits import circuit, faithfulness, null
from headwater.report.charts.claims import effect, heads, ledger
from headwater.report.charts.comparisons import comparison, head_groups, reuse
from headwater.report.charts.data import counts, lre
from headwater.report.charts.dynamics import connectivity, delta, series_audit, timeline, training
from headwater.report.charts.examples import (
    data_attribution,
    data_removal,
    memorized,
    nearest_sequences,
    repeated_data,
)
from headwater.report.charts.history import fact_change, fact_link, formation
from headwater.report.charts.known import algebra, recovery, siit_report, superposition
from headwater.report.charts.links import counterfactual_pretraining, frequency_link, strengths
from headwater.report.charts.patches import patching
from headwater.report.charts.paths import causal_trace, path_patching
from headwater.report.charts.rates import claim_rates
from headwater.report.charts.safety import cue_groups, detection, head_importance, pruning
from headwater.report.charts.scores import attribution, strongest_nodes
from headwater.report.charts.scores_truth import truth_scores
from headwater.report.charts.searches import incompleteness, optimal_ablation, search
from headwater.report.charts.tracings import attention_tracing, cdt, flow_routes, head_codes
from headwater.report.charts.truth import compression, interchange, mechanism
from headwater.report.charts.verdicts import discovery, interference, mib_track, subspace
from headwater.report.drawing import draw
from headwater.report.layout import place
from headwater.report.svg import inline

KINDS = (
    "behavior_report",
    "patching",
    "path_patching",
    "causal_trace",
    "attribution",
    "circuit",
    "faithfulness",
    "null",
    "effect",
    "act_comparison",
    "heads",
    "ledger",
    "claim_rates",
    "search",
    "incompleteness",
    "optimal_ablation",
    "mechanism",
    "interchange",
    "compression",
    "siit_report",
    "recovery",
    "superposition",
    "algebra",
    "learned_program",
    "mips",
    "published_scores",
    "minimality",
    "comparison",
    "reuse",
    "head_groups",
    "interference",
    "subspace",
    "mib_track",
    "discovery",
    "flow_routes",
    "cdt",
    "head_codes",
    "attention_tracing",
    "truth_scores",
    "training",
    "timeline",
    "series_audit",
    "connectivity",
    "delta",
    "counts",
    "lre",
    "strengths",
    "frequency_link",
    "counterfactual_pretraining",
    "data_attribution",
    "data_removal",
    "memorized",
    "nearest_sequences",
    "repeated_data",
    "formation",
    "fact_link",
    "fact_change",
    "detection",
    "head_importance",
    "pruning",
    "cue_groups",
    "steering_curve",
)


def as_svg(result: Any, *, name: str = "chart") -> str:
    """A result's chart as inline SVG, for pages and notebooks; empty where its kind has no chart. `name` prefixes
    ids.
    """
    if result.kind not in KINDS:
        return ""
    label = f"Chart of {result.kind.replace('_', ' ')}"
    if result.kind == "circuit":
        return draw(place(result), name=name)
    return inline(globals()[result.kind](result), name=name, label=label)


__all__ = [
    "KINDS",
    "act_comparison",
    "algebra",
    "as_svg",
    "attention_tracing",
    "attribution",
    "behavior_report",
    "canary",
    "causal_trace",
    "cdt",
    "circuit",
    "claim_rates",
    "comparison",
    "compression",
    "connectivity",
    "counterfactual_pretraining",
    "counts",
    "cue_groups",
    "data_attribution",
    "data_removal",
    "delta",
    "detection",
    "discovery",
    "effect",
    "fact_change",
    "fact_link",
    "faithfulness",
    "flow_routes",
    "formation",
    "frequency_link",
    "head_codes",
    "head_groups",
    "head_importance",
    "heads",
    "incompleteness",
    "interchange",
    "interference",
    "learned_program",
    "ledger",
    "lre",
    "margins",
    "mechanism",
    "memorized",
    "mib_track",
    "minimality",
    "mips",
    "nearest_sequences",
    "null",
    "optimal_ablation",
    "patching",
    "path_patching",
    "pruning",
    "published_scores",
    "recovery",
    "repeated_data",
    "reuse",
    "search",
    "series_audit",
    "siit_report",
    "steering_curve",
    "strengths",
    "strongest_nodes",
    "subspace",
    "superposition",
    "timeline",
    "training",
    "truth_scores",
]

"""Stage 2: which parts of a model cause a behavior. Patching, attribution, circuits and what they must beat.

Names are resolved on first use, so that importing this room is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "patch": "patching",
    "path_patch": "path_patching",
    "causal_trace": "causal_tracing",
    "CausalTraceResult": "causal_tracing",
    "PathPatchingResult": "path_patching",
    "PatchingResult": "patching",
    "atp": "nodes",
    "atp_star": "star",
    "grad_drop": "dropping",
    "eap": "attribution",
    "eap_ig": "attribution",
    "eap_ig_activations": "ig_activations",
    "eap_clean_corrupted": "clean_corrupted",
    "node_ig": "node_integrals",
    "acdc": "acdc",
    "SearchResult": "search",
    "Ablation": "ablation",
    "edge_pruning": "edge_pruning",
    "node_pruning": "edge_pruning",
    "greedy": "search_greedy",
    "IncompletenessResult": "completeness",
    "optimal_ablation": "optimal_ablation",
    "OptimalAblationResult": "optimal_ablation",
    "flow_routes": "flow",
    "cdt": "decomposition",
    "head_codes": "codes",
    "attention_tracing": "tracing",
    "FlowRoutesResult": "flow",
    "CdtResult": "decomposition",
    "HeadCodesResult": "codes",
    "TracingResult": "tracing",
    "methods": "catalog",
    "Plan": "planning",
    "plan": "planning",
    "AttributionResult": "attribution",
    "Circuit": "circuit",
    "Graph": "graph",
    "graph_of": "wiring",
    "FaithfulnessResult": "faithfulness",
    "MinimalityResult": "faithfulness",
    "NullResult": "faithfulness",
    "areas": "mib",
    "compare": "comparing",
    "ComparisonResult": "comparing",
    "reuse": "reusing",
    "ReuseResult": "reusing",
    "group_tests": "reusing",
    "HeadGroupsResult": "reusing",
    "interference": "interfering",
    "InterferenceResult": "interfering",
    "subspace_check": "subspace",
    "SubspaceResult": "subspace",
    "mib_track": "circuit_track",
    "MibTrackResult": "circuit_track",
    "auroc": "circuit_track",
    "discovery_curve": "discovery",
    "DiscoveryResult": "discovery",
}

__all__ = [
    "Ablation",
    "AttributionResult",
    "CausalTraceResult",
    "CdtResult",
    "Circuit",
    "ComparisonResult",
    "DiscoveryResult",
    "FaithfulnessResult",
    "FlowRoutesResult",
    "Graph",
    "HeadCodesResult",
    "HeadGroupsResult",
    "IncompletenessResult",
    "InterferenceResult",
    "MibTrackResult",
    "MinimalityResult",
    "NullResult",
    "OptimalAblationResult",
    "PatchingResult",
    "PathPatchingResult",
    "Plan",
    "ReuseResult",
    "SearchResult",
    "SubspaceResult",
    "TracingResult",
    "acdc",
    "areas",
    "atp",
    "atp_star",
    "attention_tracing",
    "auroc",
    "causal_trace",
    "cdt",
    "compare",
    "discovery_curve",
    "eap",
    "eap_clean_corrupted",
    "eap_ig",
    "eap_ig_activations",
    "edge_pruning",
    "flow_routes",
    "grad_drop",
    "graph_of",
    "greedy",
    "group_tests",
    "head_codes",
    "interference",
    "methods",
    "mib_track",
    "node_ig",
    "node_pruning",
    "optimal_ablation",
    "patch",
    "path_patch",
    "plan",
    "reuse",
    "subspace_check",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'headwater.localize' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"headwater.localize.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from headwater.localize.ablation import Ablation
    from headwater.localize.acdc import acdc
    from headwater.localize.attribution import AttributionResult, eap, eap_ig
    from headwater.localize.catalog import methods
    from headwater.localize.causal_tracing import CausalTraceResult, causal_trace
    from headwater.localize.circuit import Circuit
    from headwater.localize.circuit_track import MibTrackResult, auroc, mib_track
    from headwater.localize.clean_corrupted import eap_clean_corrupted
    from headwater.localize.codes import HeadCodesResult, head_codes
    from headwater.localize.comparing import ComparisonResult, compare
    from headwater.localize.completeness import IncompletenessResult
    from headwater.localize.decomposition import CdtResult, cdt
    from headwater.localize.discovery import DiscoveryResult, discovery_curve
    from headwater.localize.dropping import grad_drop
    from headwater.localize.edge_pruning import edge_pruning, node_pruning
    from headwater.localize.faithfulness import FaithfulnessResult, MinimalityResult, NullResult
    from headwater.localize.flow import FlowRoutesResult, flow_routes
    from headwater.localize.graph import Graph
    from headwater.localize.ig_activations import eap_ig_activations
    from headwater.localize.interfering import InterferenceResult, interference
    from headwater.localize.mib import areas
    from headwater.localize.node_integrals import node_ig
    from headwater.localize.nodes import atp
    from headwater.localize.optimal_ablation import OptimalAblationResult, optimal_ablation
    from headwater.localize.patching import PatchingResult, patch
    from headwater.localize.path_patching import PathPatchingResult, path_patch
    from headwater.localize.planning import Plan, plan
    from headwater.localize.reusing import HeadGroupsResult, ReuseResult, group_tests, reuse
    from headwater.localize.search import SearchResult
    from headwater.localize.search_greedy import greedy
    from headwater.localize.star import atp_star
    from headwater.localize.subspace import SubspaceResult, subspace_check
    from headwater.localize.tracing import TracingResult, attention_tracing
    from headwater.localize.wiring import graph_of

"""Stage 2: which parts of a model cause a behavior. Patching, attribution, circuits and what they must beat.

Names are resolved on first use, so that importing this room is cheap.
"""

from typing import TYPE_CHECKING

from headwater.core.lazy import lazy

_NAMES = {
    "patch": "patching.patch",
    "path_patch": "patching.paths",
    "causal_trace": "patching.causal_trace",
    "CausalTraceResult": "patching.causal_trace",
    "PathPatchingResult": "patching.paths",
    "PatchingResult": "patching.patch",
    "atp": "attribution.atp",
    "atp_star": "attribution.atp_star",
    "grad_drop": "attribution.grad_drop",
    "eap": "attribution.eap",
    "eap_ig": "attribution.eap",
    "eap_ig_activations": "attribution.ig_activations",
    "eap_clean_corrupted": "attribution.clean_corrupted",
    "node_ig": "attribution.node_ig",
    "acdc": "search.acdc",
    "SearchResult": "search.searching",
    "Ablation": "engine.ablation",
    "edge_pruning": "search.edge_pruning",
    "node_pruning": "search.edge_pruning",
    "greedy": "search.greedy",
    "IncompletenessResult": "judging.completeness",
    "optimal_ablation": "search.optimal_ablation",
    "OptimalAblationResult": "search.optimal_ablation",
    "flow_routes": "search.flow_routes",
    "cdt": "search.cdt",
    "head_codes": "search.head_codes",
    "attention_tracing": "search.attention_tracing",
    "FlowRoutesResult": "search.flow_routes",
    "CdtResult": "search.cdt",
    "HeadCodesResult": "search.head_codes",
    "TracingResult": "search.attention_tracing",
    "methods": "catalog",
    "Plan": "engine.planning",
    "plan": "engine.planning",
    "AttributionResult": "attribution.eap",
    "Circuit": "circuit",
    "Graph": "graph",
    "graph_of": "engine.wiring",
    "FaithfulnessResult": "judging.faithfulness",
    "MinimalityResult": "judging.faithfulness",
    "NullResult": "judging.faithfulness",
    "areas": "judging.mib",
    "compare": "comparing.compare",
    "ComparisonResult": "comparing.compare",
    "reuse": "comparing.reuse",
    "ReuseResult": "comparing.reuse",
    "group_tests": "comparing.reuse",
    "HeadGroupsResult": "comparing.reuse",
    "interference": "comparing.interference",
    "InterferenceResult": "comparing.interference",
    "subspace_check": "comparing.subspace",
    "SubspaceResult": "comparing.subspace",
    "mib_track": "judging.circuit_track",
    "MibTrackResult": "judging.circuit_track",
    "auroc": "judging.circuit_track",
    "discovery_curve": "judging.discovery",
    "DiscoveryResult": "judging.discovery",
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


__getattr__, __dir__ = lazy(__name__, _NAMES, __all__)


if TYPE_CHECKING:
    from headwater.localize.attribution.atp import atp
    from headwater.localize.attribution.atp_star import atp_star
    from headwater.localize.attribution.clean_corrupted import eap_clean_corrupted
    from headwater.localize.attribution.eap import AttributionResult, eap, eap_ig
    from headwater.localize.attribution.grad_drop import grad_drop
    from headwater.localize.attribution.ig_activations import eap_ig_activations
    from headwater.localize.attribution.node_ig import node_ig
    from headwater.localize.catalog import methods
    from headwater.localize.circuit import Circuit
    from headwater.localize.comparing.compare import ComparisonResult, compare
    from headwater.localize.comparing.interference import InterferenceResult, interference
    from headwater.localize.comparing.reuse import HeadGroupsResult, ReuseResult, group_tests, reuse
    from headwater.localize.comparing.subspace import SubspaceResult, subspace_check
    from headwater.localize.engine.ablation import Ablation
    from headwater.localize.engine.planning import Plan, plan
    from headwater.localize.engine.wiring import graph_of
    from headwater.localize.graph import Graph
    from headwater.localize.judging.circuit_track import MibTrackResult, auroc, mib_track
    from headwater.localize.judging.completeness import IncompletenessResult
    from headwater.localize.judging.discovery import DiscoveryResult, discovery_curve
    from headwater.localize.judging.faithfulness import FaithfulnessResult, MinimalityResult, NullResult
    from headwater.localize.judging.mib import areas
    from headwater.localize.patching.causal_trace import CausalTraceResult, causal_trace
    from headwater.localize.patching.patch import PatchingResult, patch
    from headwater.localize.patching.paths import PathPatchingResult, path_patch
    from headwater.localize.search.acdc import acdc
    from headwater.localize.search.attention_tracing import TracingResult, attention_tracing
    from headwater.localize.search.cdt import CdtResult, cdt
    from headwater.localize.search.edge_pruning import edge_pruning, node_pruning
    from headwater.localize.search.flow_routes import FlowRoutesResult, flow_routes
    from headwater.localize.search.greedy import greedy
    from headwater.localize.search.head_codes import HeadCodesResult, head_codes
    from headwater.localize.search.optimal_ablation import OptimalAblationResult, optimal_ablation
    from headwater.localize.search.searching import SearchResult

"""Localizing methods by name: those of this room, and those that outside packages add by entry point."""

from collections.abc import Callable

from headwater.core.methods import Methods, fitted
from headwater.core.results import Result

__all__ = ["Method", "described", "fitted", "methods"]

_OWN = (
    "search.acdc",
    "attribution.eap",
    "patching.causal_trace",
    "attribution.clean_corrupted",
    "search.head_codes",
    "search.cdt",
    "attribution.grad_drop",
    "search.edge_pruning",
    "search.flow_routes",
    "attribution.ig_activations",
    "comparing.interference",
    "attribution.node_ig",
    "attribution.atp",
    "search.optimal_ablation",
    "patching.patch",
    "patching.paths",
    "search.greedy",
    "attribution.atp_star",
    "comparing.subspace",
    "search.attention_tracing",
)

Method = Callable[..., Result]
"""method(model, behavior, **options) -> Result."""

methods: Methods[Method] = Methods("method", own=[f"headwater.localize.{module}" for module in _OWN])
"""Outside packages add theirs by the entry point group `headwater.methods`."""
described = methods.described

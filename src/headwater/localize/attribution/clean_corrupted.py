"""EAP with the gradient averaged at both ends of the way: on the prompt and on its counterfactual, nothing between."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwater.localize.attribution.eap import (
    AttributionResult,
    EapConfig,
    configured,
    only_counterfactual,
    score_edges,
)
from headwater.localize.catalog import methods

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@dataclass(frozen=True, kw_only=True)
class CleanCorruptedConfig(EapConfig):
    """As for EAP; against: "counterfactual" only."""


@methods.register("eap_clean_corrupted")
def eap_clean_corrupted(
    model: "Model", behavior: "Behavior", *, config: CleanCorruptedConfig | None = None, **options: Any
) -> AttributionResult:
    """EAP with the mean of the gradients on the prompt and on the counterfactual (Hanna et al., 2024): the trapezoidal
    rule with the two ends only, for two forwards and two backwards.

    Both runs are of real text, which no step of `eap_ig` but its first is, and neither end is left out, as a saturated
    clean run alone would be. Options are those of `EapConfig`. Known failure: where both ends are saturated (attention
    that jumps from one token to another), both gradients vanish and the edge is missed; `eap_ig` visits the way.

    Raises as `eap` does.
    """
    used = configured(CleanCorruptedConfig, config, options)
    only_counterfactual("eap_clean_corrupted", used.against, "one of its two gradients is taken on that run")
    return score_edges("eap_clean_corrupted", model, behavior, used, [(0.0, 0.5), (1.0, 0.5)])

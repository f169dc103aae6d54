"""GradDrop alone: attribution patching averaged over passes back, each with one layer's gradient dropped."""

from typing import TYPE_CHECKING, Any

from headwater.localize.attribution.atp_star import GradDropConfig, score_attention_nodes
from headwater.localize.attribution.eap import AttributionResult, configured
from headwater.localize.catalog import methods

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model


@methods.register("grad_drop")
def grad_drop(
    model: "Model", behavior: "Behavior", *, config: GradDropConfig | None = None, **options: Any
) -> AttributionResult:
    """GradDrop (Kramár et al., 2024): attribution patching of every query, key, value, head and MLP, its size averaged
    over passes back in each of which one layer's contribution to the gradient is dropped.

    A node whose direct effect on the metric is undone by a layer that follows scores about 0 in AtP, though it matters
    as soon as that layer is in doubt; with that layer dropped the direct effect stands. Queries and keys are scored by
    the softmax's gradient; with the softmax computed again and verified it is `atp_star`. `tables["nodes"]`: node,
    part, layer, score, estimate[, position], as there. Costs two forwards and half a backward a layer. Options are
    those of `GradDropConfig`. Known failure: saturated softmaxes, effects that two layers together undo, and chains: a
    node whose every way to the metric leads through each later layer scores 0, as in many models of two layers.

    Raises as `atp_star` does.
    """
    used = configured(GradDropConfig, config, options)
    return score_attention_nodes("grad_drop", model, behavior, used, fix=False, drop=True)

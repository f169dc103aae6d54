"""Integrated gradients of nodes: attribution patching with the gradient averaged on the way from counterfactual to
prompt.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from headwater.core.errors import MethodError, did_you_mean
from headwater.localize.attribution.atp import AtpConfig, score_nodes
from headwater.localize.attribution.eap import (
    AttributionResult,
    Rule,
    configured,
    integration_nodes,
    only_counterfactual,
)
from headwater.localize.catalog import methods

if TYPE_CHECKING:
    from headwater.behavior.table import Behavior
    from headwater.core.model import Model

Path = Literal["inputs", "activations"]


@dataclass(frozen=True, kw_only=True)
class NodeIgConfig(AtpConfig):
    """steps: nodes of the integral. rule: as for `eap_ig`; "right" is that of the authors' node scores.

    path: "inputs" moves the stream that enters the first block; "activations" moves each node's own write, all heads of
    a layer together, with everything before it as on the prompt. against: other than the counterfactual for
    `path="activations"` only. neurons: for `path="inputs"` only.
    """

    steps: int = 5
    rule: Rule = "right"
    path: Path = "inputs"


@methods.register("node_ig")
def node_ig(
    model: "Model", behavior: "Behavior", *, config: NodeIgConfig | None = None, **options: Any
) -> AttributionResult:
    """Integrated gradients of nodes (Hanna et al., 2024; by own activations: Marks et al., 2024): for each node, (its
    write on the prompt - on the counterfactual) . the gradient there, averaged on the way between the two runs.

    With `path="inputs"` a node's score is the sum of its edges' `eap_ig` scores by the same rule, and `input`'s score
    tends to the metric's whole difference with many steps. With `path="activations"` the scores of a layer's heads
    together (or of an MLP) tend to what patching that layer's attention (or that MLP) really does; each layer costs
    passes of its own, which begin there. Options are those of `NodeIgConfig`. Known failure: by "inputs", interpolated
    embeddings are no text; by "activations", a saturated head's query and key are never moved, only what it wrote.

    Raises as `atp` does.
    """
    used = configured(NodeIgConfig, config, options)
    nodes = integration_nodes(used.steps, used.rule)
    if used.path not in ("inputs", "activations"):
        raise MethodError(
            "unknown path", got=repr(used.path), wanted=did_you_mean(used.path, ["inputs", "activations"])
        )
    if used.path == "inputs":
        only_counterfactual("node_ig by inputs", used.against, "its way leads from prompt to prompt")
        return score_nodes("node_ig", model, behavior, used, nodes)
    if used.neurons:
        raise MethodError("node_ig by activations has no scores of neurons", fix='Use path="inputs", or atp')
    from headwater.localize.attribution.layer_paths import WriteScorer

    return score_nodes("node_ig", model, behavior, used, nodes, scorer=WriteScorer)

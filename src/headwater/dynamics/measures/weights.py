"""How large the weights are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from headwater.dynamics.measures.base import Probe, Row, measures, row


@measures.register("weight_norms")
def weight_norms(probe: Probe) -> list[Row]:
    """L2 norm of all weights, of the embeddings, and of each layer."""
    model = probe.model
    rows = [row("all", _norm(model.hf.parameters()))]
    rows.append(row("embedding", _norm(model.hf.get_input_embeddings().parameters())))
    return rows + [row(f"layer {one.index}", _norm(one.module.parameters())) for one in model.anatomy.main.blocks]


def _norm(weights: Iterable[Tensor]) -> float:
    return float(torch.stack([weight.detach().double().square().sum() for weight in weights]).sum().sqrt())

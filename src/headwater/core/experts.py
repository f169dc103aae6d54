"""Neurons of mixtures of experts: experts are fused three-dimensional parameters, so their neurons pass no module of
their own."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Edit = Callable[[torch.Tensor], torch.Tensor]
"""Takes and gives neurons [N, E, M]; tokens that an expert does not get hold zeros there, and stay without effect."""


@contextmanager
def experts_session(edits: dict[nn.Module, Edit], *, whole: bool = False) -> Generator[None]:
    """Show each experts module's neurons to its function, and let what that returns replace them.

    whole: compute the module's output from the neurons (for gradients), not as its own output plus the change.
    """

    def shadow(module: Any, own: Callable[..., torch.Tensor], edit: Edit) -> Callable[..., torch.Tensor]:
        def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            neurons_NEM, gate_NE = expert_neurons(module, hidden, index, weights)
            edited = edit(neurons_NEM)
            if whole:
                return combine(module, edited, gate_NE, bias=True).to(hidden.dtype)
            out = own(hidden, index, weights)
            if edited is neurons_NEM:
                return out
            return out + combine(module, edited - neurons_NEM, gate_NE, bias=False).to(out.dtype)

        return forward

    shadowed: list[tuple[nn.Module, Any]] = []
    try:
        for module, edit in edits.items():
            before = module.__dict__.get("forward")
            shadowed.append((module, before))
            module.__dict__["forward"] = shadow(module, module.forward, edit)
        yield
    finally:
        for module, before in shadowed:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def expert_neurons(
    module: Any, hidden_ND: torch.Tensor, index_NJ: torch.Tensor, weights_NJ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's neurons [N, E, M] (zero where it does not get the token) and the weight it gets [N, E]."""
    hidden_ND = hidden_ND.reshape(-1, hidden_ND.shape[-1])
    n_tokens, n_experts = hidden_ND.shape[0], module.num_experts
    gate_NE = torch.zeros(n_tokens, n_experts, dtype=weights_NJ.dtype, device=hidden_ND.device)
    gate_NE = gate_NE.scatter_add(1, index_NJ, weights_NJ)
    routed_NE = torch.zeros(n_tokens, n_experts, dtype=torch.bool, device=hidden_ND.device).scatter(1, index_NJ, True)
    columns = []
    for expert in range(n_experts):
        weight = (module.gate_up_proj if module.has_gate else module.up_proj)[expert]
        inner = hidden_ND @ (weight if module.is_transposed else weight.T)
        if module.has_bias:
            inner = inner + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[expert]
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        columns.append(inner * routed_NE[:, expert, None])
    return torch.stack(columns, dim=1), gate_NE


def combine(module: Any, neurons_NEM: torch.Tensor, gate_NE: torch.Tensor, *, bias: bool) -> torch.Tensor:
    """The experts' outputs, weighted and summed: [N, D]."""
    down = module.down_proj if module.is_transposed else module.down_proj.transpose(1, 2)
    out_NED = torch.einsum("nem,emd->ned", neurons_NEM.to(down.dtype), down)
    if bias and module.has_bias:
        out_NED = out_NED + module.down_proj_bias
    return (out_NED * gate_NE[..., None].to(out_NED.dtype)).sum(dim=1)

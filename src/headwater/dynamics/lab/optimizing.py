"""AdamW over groups of weights, and the learning rate of each step."""

import math
from typing import Any

import torch

from headwater.dynamics.lab.config import OptimizerConfig, ScheduleConfig


def make_optimizer(hf: Any, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with two groups: weights that decay, and weights that do not."""
    embeddings = {id(p) for m in hf.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    decaying: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for weight in hf.parameters():
        decays = (
            config.decay == "all"
            or (weight.ndim >= 2 and config.decay == "matrices")
            or (weight.ndim >= 2 and id(weight) not in embeddings)
        )
        (decaying if decays else others).append(weight)
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    how: dict[str, Any] = {"fused": True} if device.type == "cuda" else {"foreach": True}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, **how
    )


def rate(step: int, steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """The learning rate of the update from `step` to `step` + 1 of a run of `steps`."""
    if step < schedule.warmup:
        return lr * (step + 1) / schedule.warmup
    after = max(1, steps - schedule.warmup)
    done = (step - schedule.warmup) / after
    if schedule.name == "cosine":
        return lr * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * done)))
    if schedule.name == "wsd":
        begins = 1 - schedule.decay
        gone = max(0.0, (done - begins) / schedule.decay)
        return lr * (1 - (1 - schedule.final) * gone)
    return lr

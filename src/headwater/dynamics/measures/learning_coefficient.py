"""The measure `learning_coefficient`: how degenerate the minimum is that training has come to, by Langevin sampling.

Own code: `devinterp` 2.0 would bring datasets, zarr and xarray for what are a few lines here, and these are tested
against a case where the answer is known exactly.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.dynamics.measures.base import Probe, Row, losses_of, measures, row


@measures.register("learning_coefficient")
def learning_coefficient(
    probe: Probe,
    *,
    chains: int = 2,
    steps: int = 60,
    burn: int = 60,
    step_size: float = 1e-7,
    localization: float = 100.0,
    batch: int | None = None,
) -> list[Row]:
    """The local learning coefficient (Lau et al., 2023) by SGLD: n beta (mean loss around the weights - loss there),
    beta = 1 / log n, over n predicted tokens: of the run's training data where it is small, else of the sequences.

    chains: independent ones, of which the interval is. burn, steps: updates left out, and averaged over. step_size: of
    SGLD. localization: how strongly the chain is held to the weights. batch: sequences an update (None: all). Smaller:
    the loss is flatter in more directions, as simpler solutions are.

    Known failure: its size depends on step_size and localization (of these settings a good part of the directions has
    not settled), so only the order of checkpoints measured alike says something. A chain that leaves the basin gives a
    large value (with n beta times a loss as of a random guess the steps are too large, and the order is of nothing),
    one that finds lower loss (the weights are no minimum) a negative one; NaN: it diverged.
    """
    if min(chains, steps) < 1 or burn < 0 or step_size <= 0 or localization < 0 or (batch or 1) < 1:
        raise MethodError("these settings of SGLD do not fit", got=f"{chains} chains, {steps} steps of {step_size}")
    ids = probe.sequences if probe.trained is None else probe.trained
    ids = ids.to(probe.model.device)
    at = (torch.ones(ids.shape[1], dtype=torch.bool) if probe.loss_at is None else probe.loss_at)[1:].to(ids.device)
    hf: Any = copy.deepcopy(probe.model.hf)
    hf.eval()
    weights = [weight.requires_grad_(True) for weight in hf.parameters()]

    def loss(part: Tensor | None) -> Tensor:
        rows = ids if part is None else ids[part]
        return losses_of(hf(input_ids=rows, use_cache=False).logits.float(), rows)[:, at].mean()

    n = len(ids) * int(at.sum())
    if n < 2:
        raise MethodError("the learning coefficient needs data", got=n, wanted="two predicted tokens or more")
    found = [
        sampled(
            loss, weights, n=n, rows=len(ids), batch=batch, steps=steps, burn=burn, step_size=step_size,
            localization=localization, generator=torch.Generator().manual_seed(1000 * probe.seed + chain),
        )
        for chain in range(chains)
    ]  # fmt: skip
    mean = sum(found) / chains
    if chains < 2 or not math.isfinite(mean):
        return [row("", mean)]
    from scipy.stats import t

    spread = math.sqrt(sum((value - mean) ** 2 for value in found) / (chains - 1))
    wide = float(t.ppf(0.975, chains - 1)) * spread / math.sqrt(chains)
    return [row("", mean, mean - wide, mean + wide)]


def sampled(
    loss: Callable[[Tensor | None], Tensor],
    weights: Sequence[Tensor],
    *,
    n: int,
    rows: int,
    batch: int | None,
    steps: int,
    burn: int,
    step_size: float,
    localization: float,
    generator: torch.Generator,
) -> float:
    """n beta (mean of the loss over the last `steps` updates - the loss at `weights`), which are put back after.

    loss: of the rows with these numbers, None for all. With batches the mean is of the batches' losses, each minus the
    same batch's loss at the weights, which takes most of its noise away.
    """
    around = n / math.log(n)
    start = [weight.detach().clone() for weight in weights]
    total, counted = 0.0, 0
    whole = float(loss(None).detach()) if batch is None else 0.0
    for step in range(burn + steps):
        part = None if batch is None else torch.randperm(rows, generator=generator)[:batch]
        value = loss(part)
        gradients = torch.autograd.grad(value, list(weights), allow_unused=True)
        if step >= burn:
            total += float(value.detach()) - (whole if part is None else _at(loss, weights, start, part))
            counted += 1
        with torch.no_grad():
            for weight, gradient, origin in zip(weights, gradients, start, strict=True):
                pull = localization * (weight - origin)
                drift = pull if gradient is None else pull + around * gradient
                noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device)
                weight.add_(-0.5 * step_size * drift + math.sqrt(step_size) * noise)
    _put(weights, start)
    return around * total / counted


def _at(loss: Callable[[Tensor | None], Tensor], weights: Sequence[Tensor], start: list[Tensor], part: Tensor) -> float:
    here = [weight.detach().clone() for weight in weights]
    _put(weights, start)
    with torch.no_grad():
        value = float(loss(part))
    _put(weights, here)
    return value


def _put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)

"""Linear mode connectivity: the loss on the straight line between two sets of weights.

from headwater.dynamics.connectivity import connect

connect("runs/a/step-800", "runs/b/step-800", tokens)
"""

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import torch
from torch import Tensor

from headwater.core.errors import MethodError, ModelError
from headwater.core.loading import opened
from headwater.core.results import Provenance, Result, register_result
from headwater.dynamics.measures.base import losses_of

if TYPE_CHECKING:
    from headwater.core.model import Model

_AT_ONCE = 64  # sequences


@register_result
class ConnectivityResult(Result):
    """`tables["line"]`: part (0: the first model, 1: the second), loss, lo, hi (95% over sequences), straight (the
    line between the losses of the ends), above (loss - straight), above_lo, above_hi.

    facts: barrier, lo, hi (the largest `above` and its interval, taken at the same place), at (where), names.
    """

    kind: ClassVar[str] = "connectivity"
    main: ClassVar[str] = "line"

    @property
    def barrier(self) -> float:
        """How far the loss rises above the straight line between its ends, in nats; 0: linearly connected."""
        return float(self.facts["barrier"])


def connect(
    a: "Model | str | Path",
    b: "Model | str | Path",
    tokens: Tensor,
    *,
    loss_at: Tensor | None = None,
    points: int = 11,
    names: tuple[str, str] | None = None,
) -> ConnectivityResult:
    """The loss at `points` places on the line from the weights of one model to those of another, and its barrier.

    The barrier (Frankle et al., 2020) is the largest rise of the mean loss over the straight line between the losses of
    both ends: of about 0 the two are in one linearly connected basin, as checkpoints of one run are from some step on.
    tokens: sequences [n, T]; loss_at: [T] bool, which are predicted (None: all but the first).

    Known failure: two networks that compute the same with their neurons in another order have a barrier: across runs of
    different seeds a barrier says nothing about mechanisms. The loss between the points is not seen.

    Raises ModelError for models of other shapes, MethodError for fewer than three points.
    """
    started = time.monotonic()
    first, second = (opened(one) for one in (a, b))
    line = on_the_line(first, second, tokens, loss_at, points)
    rows, worst = _table(line)
    facts = {
        "barrier": worst["above"], "lo": worst["above_lo"], "hi": worst["above_hi"], "at": worst["part"],
        "names": list(names or (first.name, second.name)), "sequences": len(tokens),
    }  # fmt: skip
    return ConnectivityResult(
        tables={"line": pl.DataFrame(rows, schema=dict.fromkeys(rows[0], pl.Float64))},
        facts=facts,
        config={"points": points},
        provenance=Provenance.collect(first, seconds=time.monotonic() - started),
    )


def on_the_line(a: "Model", b: "Model", tokens: Tensor, loss_at: Tensor | None, points: int) -> Tensor:
    """[points, n] float64: the loss of each sequence at even places from a's weights (first) to b's (last)."""
    if points < 3:
        raise MethodError("a line is looked at in three places at least", got=points)
    mine, theirs = dict(a.hf.named_parameters()), dict(b.hf.named_parameters())
    unlike = [name for name in {*mine, *theirs} if name not in mine or name not in theirs]
    unlike += [name for name in mine if name in theirs and mine[name].shape != theirs[name].shape]
    if unlike:
        raise ModelError(
            "no line leads from one model to the other",
            got=f"{len(unlike)} weights differ in shape, such as {unlike[0]}",
        )
    between: Any = copy.deepcopy(a.hf).eval()
    found: list[Tensor] = []
    for part in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        with torch.no_grad():
            for name, weight in between.named_parameters():
                end = theirs[name].detach().to(weight.device, torch.float64)
                weight.copy_((1 - part) * mine[name].detach().double() + part * end)
        found.append(_losses(between, tokens, loss_at))
    return torch.stack(found)


def barrier(line: Tensor) -> dict[str, float]:
    """part, above, above_lo, above_hi where losses [points, n] on a line rise most above the straight one."""
    return _table(line)[1]


def _table(line: Tensor) -> tuple[list[dict[str, float]], dict[str, float]]:
    from headwater.behavior.metrics import interval

    rows: list[dict[str, float]] = []
    for part, losses in zip(torch.linspace(0, 1, len(line), dtype=torch.float64).tolist(), line, strict=True):
        straight = (1 - part) * line[0] + part * line[-1]
        loss, lo, hi = interval(losses.tolist())
        above, above_lo, above_hi = interval((losses - straight).tolist())
        rows.append(
            {"part": part, "loss": loss, "lo": lo, "hi": hi, "straight": float(straight.mean()), "above": above,
             "above_lo": above_lo, "above_hi": above_hi}
        )  # fmt: skip
    return rows, max(rows, key=lambda row: row["above"])


def _losses(hf: Any, tokens: Tensor, loss_at: Tensor | None) -> Tensor:
    """[n] mean loss of each sequence."""
    at = torch.ones(tokens.shape[1] - 1, dtype=torch.bool) if loss_at is None else loss_at[1:].bool()
    device = next(hf.parameters()).device
    with torch.inference_mode():
        parts = [
            losses_of(hf(input_ids=part.to(device), use_cache=False).logits.float(), part.to(device))[:, at.to(device)]
            for part in tokens.split(_AT_ONCE)
        ]
    return torch.cat(parts).mean(dim=1).double().cpu()

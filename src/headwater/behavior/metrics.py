"""Metrics of an answer: from logits at the answer's position to one number a prompt, and intervals over prompts."""

from typing import Protocol

import numpy as np
import torch

from headwater.core.errors import MethodError
from headwater.core.registry import Registry


class Metric(Protocol):
    """A metric: logits [B, V], answers [B, A] and foils [B, F] (token ids, -1 pads), reference logits [B, V] or None
    -> [B]."""

    def __call__(
        self,
        logits: torch.Tensor,
        answers: torch.Tensor,
        foils: torch.Tensor,
        reference: torch.Tensor | None = None,
        /,
    ) -> torch.Tensor: ...


registry: Registry[Metric] = Registry("metric")
# Metrics whose values are 0 or 1: their intervals are Wilson's, as a bootstrap of all-right prompts has no width.
SHARES = frozenset({"accuracy"})
# Metrics without a gradient.
STEPS = frozenset({"accuracy", "rank"})


def metric(name: str) -> Metric:
    """The metric of that name; an unknown name raises MethodError and lists the known ones.

    The values come in the precision of the logits, at least float32. `logit_diff`, `prob_diff`, `prob` and `kl`
    are differentiable.
    """
    return registry.get(name)


def metrics_known() -> list[str]:
    """The names of all metrics, sorted."""
    return registry.names()


@registry.register("logit_diff")
def logit_diff(
    logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean logit of the answers minus mean logit of the foils: log-odds, in nats, for one answer and one foil."""
    _check(logits, answers, foils, "logit_diff", needs_foils=True)
    return _mean(_at(logits, answers), answers) - _mean(_at(logits, foils), foils)


@registry.register("prob_diff")
def prob_diff(
    logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """Probability that one of the answers comes next minus probability that one of the foils does, in [-1, 1].

    Without foils it is the probability of the answers.
    """
    _check(logits, answers, foils, "prob_diff")
    total = _wide(logits).logsumexp(-1, keepdim=True)
    right = (_at(logits, answers) - total).exp().masked_fill(answers < 0, 0.0).sum(-1)
    wrong = (_at(logits, foils) - total).exp().masked_fill(foils < 0, 0.0).sum(-1)
    return right - wrong


@registry.register("prob")
def prob(
    logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """Probability that one of the answers comes next, in [0, 1]; foils do not enter."""
    _check(logits, answers, foils, "prob")
    total = _wide(logits).logsumexp(-1, keepdim=True)
    return (_at(logits, answers) - total).exp().masked_fill(answers < 0, 0.0).sum(-1)


@registry.register("accuracy")
def accuracy(
    logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """1 where the best answer has a higher logit than every foil, else 0 (a tie is 0).

    Where a row has no foils, 1 where an answer is the most likely of all tokens. Not differentiable.
    """
    _check(logits, answers, foils, "accuracy")
    best = _best(_at(logits, answers), answers)
    wide = _wide(logits)
    others = _best(_at(logits, foils), foils) if foils.shape[-1] else best
    if not foils.shape[-1] or bool((foils < 0).all(-1).any()):
        own = torch.where(answers < 0, answers[:, :1], answers)  # a pad must not hide token 0
        every = wide.scatter(-1, own, _LOW).amax(-1)
        others = torch.where((foils >= 0).any(-1), others, every)
    return (best > others).to(wide.dtype)


@registry.register("rank")
def rank(
    logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """How many tokens of the vocabulary have a higher logit than the best answer: 0 is the most likely token."""
    _check(logits, answers, foils, "rank")
    wide = _wide(logits)
    return (wide > _best(_at(logits, answers), answers).unsqueeze(-1)).sum(-1).to(wide.dtype)


@registry.register("kl")
def kl(
    logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, reference: torch.Tensor | None = None
) -> torch.Tensor:
    """KL divergence in nats of the next-token distribution from the reference's: KL(reference || this), 0 where they
    agree."""
    if reference is None:
        raise MethodError(
            "the metric kl compares with a reference run",
            wanted="reference: logits [B, V]",
            fix="Pass the clean run's logits",
        )
    if reference.shape != logits.shape:
        raise MethodError("kl compares logits of one shape", got=tuple(reference.shape), wanted=tuple(logits.shape))
    ours, theirs = _wide(logits).log_softmax(-1), _wide(reference).log_softmax(-1)
    # exp(log p) * (log p - log q), with 0 * anything = 0 where the reference excludes a token
    return torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours)).sum(-1)


_LOW = float("-inf")


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check(
    logits: torch.Tensor, answers: torch.Tensor, foils: torch.Tensor, name: str, *, needs_foils: bool = False
) -> None:
    if logits.ndim != 2 or answers.ndim != 2 or foils.ndim != 2 or not len(logits) == len(answers) == len(foils):
        raise MethodError(
            f"the metric {name} got arguments of the wrong shape",
            got=f"logits {tuple(logits.shape)}, answers {tuple(answers.shape)}, foils {tuple(foils.shape)}",
            wanted="logits [B, V], answers [B, A], foils [B, F]",
            fix='Run with logits="last"',
        )
    if needs_foils and (not foils.shape[-1] or bool((foils < 0).all(-1).any())):
        raise MethodError(f"the metric {name} needs a foil in every row", fix="Give foils, or use prob_diff or rank")


def _at(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return _wide(logits).gather(-1, ids.clamp(min=0))


def _mean(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    there = ids >= 0
    return values.masked_fill(~there, 0.0).sum(-1) / there.sum(-1)


def _best(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(ids < 0, _LOW).amax(-1)


def interval(
    values: "np.ndarray | list[float]", *, share: bool = False, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of the mean over prompts.

    A percentile bootstrap over prompts; for shares (values 0 or 1) Wilson's interval, which keeps its width where
    every prompt is right. NaN values (not measured) are left out; with none left all three are NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    n = len(array)
    if n == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(array.mean())
    if share:
        from scipy.stats import binomtest

        found = binomtest(round(array.sum()), n).proportion_ci(level, method="wilson")
        return mean, float(found.low), float(found.high)
    rng = np.random.default_rng(seed)
    block = max(1, 4_000_000 // n)  # index arrays of at most 32 MB
    means = np.concatenate(
        [array[rng.integers(0, n, (min(block, draws - done), n))].mean(-1) for done in range(0, draws, block)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return mean, float(low), float(high)

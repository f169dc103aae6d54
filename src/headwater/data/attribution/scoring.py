"""Scores of training sequences for queries, by the gradients at one checkpoint or several.

With g(z) the gradient of a sequence's loss and g(q) that of a query's, a positive score says: a step down the loss of z
brings down the loss of q.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError
from headwater.core.registry import Registry
from headwater.data.attribution.ekfac import Ekfac
from headwater.data.attribution.gradients import SequenceGradients, Sketch

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""The training sequences anew: (ids [n, T], at [n, T])."""
Queries = Sequence[tuple[Tensor, Tensor]]
"""(ids [T], at [T]) of each query; they may differ in length."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method may use. rates: of the checkpoints. damping: of ekfac, a share of the mean curvature; of trak, of
    the mean squared projected gradient."""

    rates: Sequence[float]
    weights: tuple[str, ...] = ()
    projection: int | None = None
    damping: float = 0.1
    normalize: bool = False
    vectorized: bool = True
    seed: int = 0


Scorer = Callable[[Iterator[Any], Queries, Batches, Setting], Tensor]
scorers: Registry[Scorer] = Registry("method of attribution to data")
"""scorer(models, queries, batches, setting) -> [queries, sequences]; the models come one by one, last step last."""
several = {"tracin", "trak"}
"""Methods that take several checkpoints; others are given the last one."""


@scorers.register("cosine")
def cosine(models: Iterator[Any], queries: Queries, batches: Batches, setting: Setting) -> Tensor:
    """The cosine of g(z) and g(q) at the last checkpoint (Charpiat et al., 2019).

    Known failure: at the end of training the gradients of what was learned well are small and point anywhere.
    """
    return _products(next(models), queries, batches, setting, normalize=True)


@scorers.register("tracin")
def tracin(models: Iterator[Any], queries: Queries, batches: Batches, setting: Setting) -> Tensor:
    """The sum over checkpoints of learning rate x g(z) . g(q) (Pruthi et al., 2020); with `normalize` of cosines.

    Known failure: sequences with large gradients, which are odd ones, score high for every query; and steps of Adam are
    no steps along the gradient.
    """
    total: Tensor | float = 0.0
    for rate, hf in zip(setting.rates, models, strict=True):
        total = total + rate * _products(hf, queries, batches, setting, normalize=setting.normalize)
    return torch.as_tensor(total)


@scorers.register("trak")
def trak(models: Iterator[Any], queries: Queries, batches: Batches, setting: Setting) -> Tensor:
    """TRAK (Park et al., 2023): f(q) (F'F + damping)^-1 f(z), the mean over checkpoints, x the mean of 1 - p(z).

    f: the projected gradient of the margin log(p / (1 - p)), F all of the training sequences' rows, p(z) the mean
    probability of a sequence's tokens. Known failure: the authors average over models trained anew on parts of the
    data; checkpoints of one run are alike, and their mean is worth less.
    """
    total, doubts, n = torch.zeros(()), torch.zeros(()), 0
    for number, hf in enumerate(models):
        gradients = SequenceGradients(hf, setting.weights, vectorized=setting.vectorized)
        sketch = Sketch(gradients.n_weights, setting.projection, seed=setting.seed + number, device=hf.device)
        asked = torch.cat([sketch(gradients.rows(ids[None], at[None], "margin")) for ids, at in queries])
        made, doubt = list[Tensor](), list[Tensor]()
        for ids, at in batches():
            made.append(sketch(gradients.rows(ids, at, "margin")))
            doubt.append(1 - gradients.chances(ids, at))
        rows = torch.cat(made)
        kernel = rows.T @ rows
        kernel.diagonal().add_(setting.damping * kernel.diagonal().mean())
        total = total + (asked @ torch.linalg.solve(kernel, rows.T)).cpu()
        doubts = doubts + torch.cat(doubt).cpu()
        n += 1
    return total / max(n, 1) * doubts / max(n, 1)  # each is averaged on its own, as the authors do


@scorers.register("ekfac")
def ekfac(models: Iterator[Any], queries: Queries, batches: Batches, setting: Setting) -> Tensor:
    """Influence with EK-FAC curvature (Grosse et al., 2023): g(q) (G + damping)^-1 g(z) over the linear layers.

    G: the Fisher matrix on labels that the model draws, in the eigenbasis of its Kronecker factors, with corrected
    eigenvalues (George et al., 2018). Known failure: embeddings and norms are left out, and where facts lie there, it
    says nothing of them.
    """
    hf = next(models)
    curvature = Ekfac(hf, setting.weights, vectorized=setting.vectorized)
    curvature.fit(batches, seed=setting.seed)
    asked = torch.cat([curvature.rows(ids[None], at[None]) for ids, at in queries])
    asked = curvature.divided(asked, setting.damping)
    return torch.cat([asked @ curvature.rows(ids, at).T for ids, at in batches()], dim=1).cpu()


def _products(hf: Any, queries: Queries, batches: Batches, setting: Setting, *, normalize: bool) -> Tensor:
    gradients = SequenceGradients(hf, setting.weights, vectorized=setting.vectorized)
    sketch = Sketch(gradients.n_weights, setting.projection, seed=setting.seed, device=hf.device)
    unit = torch.nn.functional.normalize if normalize else lambda rows: rows
    asked = unit(torch.cat([sketch(gradients.rows(ids[None], at[None])) for ids, at in queries]))
    scores = [asked @ unit(sketch(gradients.rows(ids, at))).T for ids, at in batches()]
    if not scores:
        raise MethodError("there are no training sequences to score", wanted="a corpus that holds some")
    return torch.cat(scores, dim=1).cpu()

"""What a ranking of nodes may have missed: the best are patched for real, the rest in random sets.

With a set of random nodes patched, a node's effect shows as the difference between the sets with it and those without.
The largest upper confidence limit of such a difference bounds what any node that was not patched alone could do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

Item = tuple[int, int]
"""A node and a place, as indices."""


@dataclass(frozen=True, eq=False)
class Missed:
    """By node that was only patched in random sets: its effect as estimated from them, and the limit of its size."""

    estimates: Tensor
    limits: Tensor

    @property
    def bound(self) -> float:
        """No such node's effect is larger, with the confidence asked for all at once."""
        return float(self.limits.max())


def random_sets(n_items: int, n_sets: int, seed: int) -> Tensor:
    """[sets, items] bool: each item in a random half of the sets, independently of the others."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.arange(n_sets) < n_sets // 2
    columns = [half[torch.randperm(n_sets, generator=generator)] for _ in range(n_items)]
    return torch.stack(columns, dim=1)


def bound_missed(sets: Tensor, effects: Tensor, confidence: float) -> Missed:
    """Effects of items from the effects [sets] of random sets of them [sets, items], float64.

    The estimate is the difference of means between sets with the item and without; its limit is that of Welch's
    interval, at a level shared out among all items (Bonferroni), so that it holds for all of them at once. What it
    assumes: in the company of random others an item does, on average, what it does alone.
    """
    inside, n_items = sets.double(), sets.shape[1]
    n_in, n_out = inside.sum(dim=0), (1 - inside).sum(dim=0)
    column = effects.double()[:, None]
    mean_in, mean_out = (inside * column).sum(dim=0) / n_in, ((1 - inside) * column).sum(dim=0) / n_out
    var_in = (inside * (column - mean_in).square()).sum(dim=0) / (n_in - 1)
    var_out = ((1 - inside) * (column - mean_out).square()).sum(dim=0) / (n_out - 1)
    a, b = var_in / n_in, var_out / n_out
    freedom = (a + b).square() / (a.square() / (n_in - 1) + b.square() / (n_out - 1)).clamp(min=1e-300)
    level = 1 - (1 - confidence) / (2 * n_items)
    quantile = torch.from_numpy(stats.t.ppf(level, freedom.clamp(min=1.0).numpy()))
    difference = mean_in - mean_out
    return Missed(difference, difference.abs() + quantile * (a + b).sqrt())


def as_nodes(items: Sequence[Item], n_nodes: int, n_places: int) -> Tensor:
    """[nodes, places] bool with these items set."""
    out = torch.zeros(n_nodes, n_places, dtype=torch.bool)
    for node, place in items:
        out[node, place] = True
    return out

"""Finite groups with their real irreducible representations, as projections on functions over the group.

The answer key of modular addition and of group composition: a network that composes group elements uses a few of these
(Nanda et al., 2023, for the cyclic group; Chughtai et al., 2023): how much of its logits lies along them, and its loss
restricted to what they explain, and with just that excluded.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from headwater.core.errors import MethodError


@dataclass(frozen=True, kw_only=True, eq=False)
class Irrep:
    """A real irreducible representation (a complex one joined with its conjugate).

    dimension: of the representation. character: [order], its trace at each element, float64, joined. projector: [order,
    order], onto the functions over the group that its matrix entries span.
    """

    name: str
    dimension: int
    character: Tensor
    projector: Tensor


class Group:
    """A finite group: `product` [order, order] and `inverse` [order] of element indices, `elements` their names.

    `characters`: name, dimension and trace [order] of each irreducible representation, `trivial` first.
    """

    def __init__(self, name: str, product: Tensor, elements: tuple[str, ...]) -> None:
        self.name, self.product, self.elements = name, product, elements
        self.order = len(elements)
        identity = (product == torch.arange(self.order)[None]).all(dim=1).nonzero().flatten()
        if len(identity) != 1:
            raise MethodError(f"{name} is no group", got=f"{len(identity)} identities")
        self.identity = int(identity[0])
        self.inverse = (product == self.identity).long().argmax(dim=1)
        self.characters: list[tuple[str, int, Tensor]] = []

    @cached_property
    def irreps(self) -> tuple[Irrep, ...]:
        """All of them; `trivial` first."""
        found: list[Irrep] = []
        quotient = self.product[:, self.inverse]  # [g, h] -> g h^-1
        for name, dimension, character in self.characters:
            # of a joined pair of complex irreps the character is the sum of both, its norm 2
            multiple = round(float(character.square().mean()))
            scale = dimension / multiple / self.order
            found.append(
                Irrep(name=name, dimension=dimension, character=character, projector=scale * character[quotient])
            )
        return tuple(found)

    def kernel(self, irrep: Irrep) -> Tensor:
        """[order, order, order]: the character at a b c^-1, what the known algorithm's logits are made of."""
        quotient = self.product[:, self.inverse]
        return irrep.character[quotient[self.product]]

    def __repr__(self) -> str:
        return f"Group({self.name!r}, order {self.order})"


def cyclic(n: int) -> Group:
    """Addition modulo n; an irrep is a frequency k, with character 2 cos(2 pi k g / n) (1 where k is 0 or n/2)."""
    _at_least(n, 2)
    g = torch.arange(n)
    made = Group(f"C{n}", (g[:, None] + g[None]) % n, tuple(map(str, range(n))))
    turn = 2 * math.pi * g.double() / n
    made.characters = [("trivial", 1, torch.ones(n, dtype=torch.float64))]
    for k in range(1, n // 2 + 1):
        alone = 2 * k == n
        made.characters.append((f"k{k}", 1 if alone else 2, torch.cos(k * turn) * (1 if alone else 2)))
    return made


def dihedral(n: int) -> Group:
    """Symmetries of the n-gon: elements r^k (k < n), then s r^k; order 2 n."""
    _at_least(n, 3)

    def times(a: int, b: int) -> int:
        # r^k s = s r^-k
        (turn, i), (other, j) = divmod(a, n), divmod(b, n)
        return ((turn + other) % 2) * n + ((i if not other else -i) + j) % n

    table = torch.tensor([[times(a, b) for b in range(2 * n)] for a in range(2 * n)])
    made = Group(f"D{n}", table, tuple([f"r{k}" for k in range(n)] + [f"sr{k}" for k in range(n)]))
    ones = torch.ones(n, dtype=torch.float64)
    turn = 2 * math.pi * torch.arange(n).double() / n
    made.characters = [("trivial", 1, torch.cat([ones, ones])), ("sign", 1, torch.cat([ones, -ones]))]
    if n % 2 == 0:
        alternating = 1 - 2 * (torch.arange(n) % 2).double()
        made.characters += [
            ("alternating", 1, torch.cat([alternating, alternating])),
            ("alternating_sign", 1, torch.cat([alternating, -alternating])),
        ]
    made.characters += [
        (f"rotation{k}", 2, torch.cat([2 * torch.cos(k * turn), 0 * ones])) for k in range(1, (n + 1) // 2)
    ]
    return made


def symmetric(n: int) -> Group:
    """Permutations of n things, n of 3 to 5; a b first does b."""
    if not 3 <= n <= 5:
        raise MethodError("symmetric groups of this size are not built in", got=n, wanted="3, 4 or 5")
    rows = list(itertools.permutations(range(n)))
    index = {row: i for i, row in enumerate(rows)}
    table = torch.tensor([[index[tuple(a[b[i]] for i in range(n))] for b in rows] for a in rows])
    made = Group(f"S{n}", table, tuple("".join(map(str, row)) for row in rows))
    fixed = torch.tensor([sum(row[i] == i for i in range(n)) for row in rows], dtype=torch.float64)
    sign = torch.tensor([_parity(row) for row in rows], dtype=torch.float64)
    square = torch.arange(len(rows))
    square = made.product[square, square]
    standard = fixed - 1
    pairs = (standard.square() + standard[square]) / 2 - 1 - standard  # symmetric square, less what is known in it
    wedge = (standard.square() - standard[square]) / 2
    named = [("trivial", torch.ones_like(fixed)), ("sign", sign), ("standard", standard)]
    named += [("standard_sign", standard * sign), ("pairs", pairs), ("pairs_sign", pairs * sign), ("wedge", wedge)]
    for name, character in named:
        irreducible = abs(float(character.square().mean()) - 1) < 1e-9
        if irreducible and all(float((character - old).abs().max()) > 1e-9 for _, _, old in made.characters):
            made.characters.append((name, round(float(character[made.identity])), character))
    return made


def group(name: str) -> Group:
    """A group by name: `C43`, `D7`, `S4`. Raises MethodError for any other."""
    match = re.fullmatch(r"([CDS])(\d{1,3})", name)
    if match is None:
        raise MethodError("unknown group", got=repr(name), wanted="C and D with a number, or S3, S4, S5")
    return {"C": cyclic, "D": dihedral, "S": symmetric}[match[1]](int(match[2]))


def kernel_share(group: Group, irrep: Irrep, logits: Tensor) -> float:
    """Share of the variance of logits [a, b, c] (centered over c) along the irrep's character at a b c^-1."""
    kernel = group.kernel(irrep)
    size = float(logits.square().sum())
    along = float((logits * kernel).sum())
    return along**2 / (float(kernel.square().sum()) * size) if size > 0 else 0.0


def by_product(group: Group, values: Tensor) -> Tensor:
    """[order, ...]: means of values [a, b, ...] over the pairs of each product."""
    flat = values.flatten(0, 1)
    found = torch.zeros(group.order, *values.shape[2:], dtype=values.dtype)
    return found.index_add(0, group.product.flatten(), flat) / group.order


def restricted(group: Group, irreps: Sequence[Irrep], logits: Tensor) -> Tensor:
    """Logits [a, b, c] with only what depends on the product a b through these irreps, and their mean over pairs."""
    return _through(group, irreps, logits) + logits.mean(dim=(0, 1))


def excluded(group: Group, irreps: Sequence[Irrep], logits: Tensor) -> Tensor:
    """Logits [a, b, c] without what depends on the product a b through these irreps."""
    return logits - _through(group, irreps, logits)


def _through(group: Group, irreps: Sequence[Irrep], logits: Tensor) -> Tensor:
    means = by_product(group, logits)
    projector = sum((irrep.projector for irrep in irreps), torch.zeros(group.order, group.order, dtype=torch.float64))
    return (projector @ means)[group.product]


def scored(group: Group, logits: Tensor, mask: Tensor) -> dict[str, Any]:
    """loss (nats), accuracy and n of logits [a, b, c] on the pairs in `mask`."""
    said, right = logits[mask], group.product[mask]
    return {
        "loss": float(torch.nn.functional.cross_entropy(said, right)),
        "accuracy": float((said.argmax(dim=-1) == right).double().mean()),
        "n": int(mask.sum()),
    }


def _parity(row: tuple[int, ...]) -> int:
    return (-1) ** sum(a > b for a, b in itertools.combinations(row, 2))


def _at_least(n: int, least: int) -> None:
    if n < least:
        raise MethodError("a group of this size is not built in", got=n, wanted=f"at least {least}")

"""A transformer that is a program (Friedman, Wettig & Chen, 2023).

Its stream is a list of named variables and every module reads some of them and writes one of its own: nothing is
added on top of anything else. An attention head reads one variable as query, one as key and one as value; its
predicate says, for each value of the query, which one value of the key it looks for. An MLP is a table over two
variables. All choices are categorical and trained as Gumbel-softmax samples whose temperature falls, so that the
network ends as the program that its likeliest choices spell.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from headwater.core.errors import MethodError


@dataclass(frozen=True, kw_only=True)
class ProgramShape:
    """How large a program may be.

    heads: attention heads a layer that copy a value. counts: heads a layer that count matches. mlps: tables a layer
    over two categorical variables. count_mlps: tables a layer over two counts. layers: how many of all that.
    """

    layers: int = 1
    heads: int = 2
    counts: int = 0
    mlps: int = 0
    count_mlps: int = 0

    def __post_init__(self) -> None:
        if self.layers < 1 or min(self.heads, self.counts, self.mlps, self.count_mlps) < 0:
            raise MethodError("a program has at least one layer and no negative parts", got=str(self))


@dataclass(frozen=True, eq=False)
class Choices:
    """The categorical choices of a program, soft (rows of probabilities) or hard (one-hot rows).

    keys of `values`: `L.part`, with L the layer: q, k, v [heads, variables], predicate [heads, d, d] of copying heads;
    cq, ck, cpredicate of counting ones; a, b [mlps, variables], table [mlps, d, d, d]; na, nb [count_mlps, counts],
    ntable [count_mlps, T+1, T+1, d].
    """

    values: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[name]


class ProgramModel:
    """The parameters (logits of all choices, and the output weights) and the forward pass over them.

    d: values a variable may have (of tokens, positions and tables alike). T: positions, the first one included.
    Variables are, in order: tokens, positions, then layer by layer each copying head, each table, each table of
    counts.
    """

    def __init__(self, shape: ProgramShape, *, d: int, T: int, classes: int, causal: bool, seed: int = 0) -> None:
        self.shape, self.d, self.T, self.classes, self.causal = shape, d, T, classes, causal
        generator = torch.Generator().manual_seed(seed)
        self.logits: dict[str, torch.Tensor] = {}

        def add(name: str, *size: int, scale: float = 1.0) -> None:
            self.logits[name] = (scale * torch.randn(*size, generator=generator)).requires_grad_()

        for layer in range(shape.layers):
            seen, counted = self.variables_before(layer), self.counts_before(layer + 1)
            for name in "qkv":
                if shape.heads:
                    add(f"{layer}.{name}", shape.heads, seen)
            if shape.heads:
                add(f"{layer}.predicate", shape.heads, d, d)
            if shape.counts:
                add(f"{layer}.cq", shape.counts, seen)
                add(f"{layer}.ck", shape.counts, seen)
                add(f"{layer}.cpredicate", shape.counts, d, d)
            if shape.mlps:
                reach = seen + shape.heads
                add(f"{layer}.a", shape.mlps, reach)
                add(f"{layer}.b", shape.mlps, reach)
                add(f"{layer}.table", shape.mlps, d, d, d)
            if shape.count_mlps:
                add(f"{layer}.na", shape.count_mlps, counted)
                add(f"{layer}.nb", shape.count_mlps, counted)
                add(f"{layer}.ntable", shape.count_mlps, T + 1, T + 1, d)
        if any(shape.count_mlps and not self.counts_before(layer + 1) for layer in range(shape.layers)):
            raise MethodError("tables of counts need heads that count", fix="Set counts to at least 1")
        size = (self.variables_before(shape.layers), d, classes)
        self.output = (0.1 * torch.randn(size, generator=generator)).requires_grad_()

    def variables_before(self, layer: int) -> int:
        """How many categorical variables the layer can read."""
        return 2 + layer * (self.shape.heads + self.shape.mlps + self.shape.count_mlps)

    def counts_before(self, layer: int) -> int:
        return layer * self.shape.counts

    def parameters(self) -> list[torch.Tensor]:
        return [*self.logits.values(), self.output]

    def sampled(self, temperature: float, generator: torch.Generator) -> Choices:
        """A Gumbel-softmax sample of every choice (Jang et al., 2017)."""
        values = {}
        for name, logits in self.logits.items():
            noise = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-9)
            values[name] = functional.softmax((logits - (-noise.log()).log()) / temperature, dim=-1)
        return Choices(values)

    def hard(self) -> Choices:
        """The likeliest of every choice, as one-hot rows."""
        return Choices(
            {
                name: functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
                for name, logits in self.logits.items()
            }
        )

    def variables(self, tokens: torch.Tensor, choices: Choices, temperature: float | None) -> torch.Tensor:
        """Every categorical variable at every position: tokens [B, T] -> [B, T, variables, d].

        temperature: of the attention; None takes the one position with the highest score.
        """
        B, T = tokens.shape
        stream = torch.stack(
            [
                functional.one_hot(tokens, self.d).float(),
                functional.one_hot(torch.arange(T), self.d).float().expand(B, T, self.d),
            ],
            dim=2,
        )
        counts = torch.zeros(B, T, 0)
        bias = tie_breaks(T, self.causal)
        for layer in range(self.shape.layers):
            written = []
            if self.shape.heads:
                matches = self._matches(stream, choices, f"{layer}.", "q", "k", "predicate")
                scores = matches + bias
                scores[..., 0] = scores[..., 0] + DEFAULT * (1 - matches[..., 0])
                weights = (
                    functional.softmax(scores / temperature, dim=-1)
                    if temperature is not None
                    else functional.one_hot(scores.argmax(-1), T).float()
                )
                values = torch.einsum("btcd,hc->bthd", stream, choices[f"{layer}.v"])
                written.append(torch.einsum("bhqk,bkhd->bqhd", weights, values))
            if self.shape.counts:
                matches = self._matches(stream, choices, f"{layer}.", "cq", "ck", "cpredicate")
                allowed = (bias > -1).float()
                counts = torch.cat([counts, (matches * allowed).sum(-1).transpose(1, 2)], dim=-1)
            if self.shape.mlps:
                reach = torch.cat([stream, *written], dim=2)
                a = torch.einsum("btcd,mc->btmd", reach, choices[f"{layer}.a"])
                b = torch.einsum("btcd,mc->btmd", reach, choices[f"{layer}.b"])
                written.append(torch.einsum("btmi,btmj,mijd->btmd", a, b, choices[f"{layer}.table"]))
            if self.shape.count_mlps:
                a = self._levels(torch.einsum("btn,mn->btm", counts, choices[f"{layer}.na"]))
                b = self._levels(torch.einsum("btn,mn->btm", counts, choices[f"{layer}.nb"]))
                written.append(torch.einsum("btmi,btmj,mijd->btmd", a, b, choices[f"{layer}.ntable"]))
            stream = torch.cat([stream, *written], dim=2)
        return stream

    def _matches(self, stream: torch.Tensor, choices: Choices, layer: str, q: str, k: str, p: str) -> torch.Tensor:
        queries = torch.einsum("btcd,hc->bthd", stream, choices[layer + q])
        keys = torch.einsum("btcd,hc->bthd", stream, choices[layer + k])
        return torch.einsum("bqhi,hij,bkhj->bhqk", queries, choices[layer + p], keys)

    def _levels(self, count: torch.Tensor) -> torch.Tensor:
        """A count as weights of its two nearest integers 0..T: one-hot where it is an integer, and piecewise linear."""
        levels = torch.arange(self.T + 1, dtype=count.dtype)
        return (1 - (count[..., None] - levels).abs()).clamp(min=0)

    def scores(self, tokens: torch.Tensor, choices: Choices, temperature: float | None, output: torch.Tensor) -> Any:
        """Scores of the output words [B, T, classes]."""
        return torch.einsum("btcd,cdo->bto", self.variables(tokens, choices, temperature), output)


DEFAULT = (
    0.5  # below any match, above any miss: the score of the first position: attention goes there where nothing matches
)


def tie_breaks(T: int, causal: bool) -> torch.Tensor:
    """[T, T], added to matches of 0 or 1: the nearest match wins, of two as near the earlier; the first position wins
    where nothing matches; later positions are out of reach of a causal head."""
    at = torch.arange(T)
    distance = (at[:, None] - at[None]).abs().float()
    bias = -0.4 * (distance + 0.25 * (at[None] > at[:, None])) / (T + 1)
    if causal:
        bias = bias.masked_fill(at[None] > at[:, None], -1e4)
    return bias

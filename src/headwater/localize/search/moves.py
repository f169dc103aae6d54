"""What each head carries from each token to each other: the terms whose sum attention adds to the stream.

    attn_out[t] = sum over heads h and source tokens s of pattern[h, t, s] * deviation[t] * (write[h, s] + shared[h, t])

`write` is a token's value through the head's slice of the output projection. A norm after attention (Gemma2, OLMo2)
divides by the deviation of the whole, as everywhere in this room; biases are shared out among heads, and within a head
among tokens as it attends, so that nothing is left over. The sum is checked against what the model itself added.

Shapes: B pairs, T query tokens, S source tokens, H heads, G key/value heads, K width of a head, D width of the stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwater.core.errors import ModelError, SiteError
from headwater.localize.engine.wiring import Layer

if TYPE_CHECKING:
    from headwater.core.model import Model
    from headwater.core.run import Run

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_AT_ONCE = 4_000_000  # floats of one piece: small enough to stay near the processor


@dataclass(frozen=True, eq=False)
class Moves:
    """One attention on one batch, taken apart.

    pattern: [B, H, T, S]. write: [B, H, S, D]. deviation: [B, T] (1 without a norm after attention). shared: [D], the
    bias that a head's term holds for each unit of its attention, before `deviation`; constant: [D], after it. rows:
    [B, H, T], the sum of the pattern (less than 1 where a sink takes its part).
    """

    pattern: Tensor
    write: Tensor
    deviation: Tensor
    shared: Tensor | None
    constant: Tensor | None

    @property
    def rows(self) -> Tensor:
        return self.pattern.sum(dim=-1).clamp(min=1e-30)

    def at(self, queries: slice) -> "Moves":
        """Only these query tokens."""
        return replace(self, pattern=self.pattern[:, :, queries], deviation=self.deviation[:, queries])

    def heads(self) -> Tensor:
        """[B, H, T, D]: what each head adds."""
        added = torch.matmul(self.pattern, self.write) * self.deviation[:, None, :, None]
        if self.shared is not None:
            added = added + self.shared * self.deviation[:, None, :, None]
        return added if self.constant is None else added + self.constant

    def pieces(self) -> Iterator[tuple[int, slice, Tensor]]:
        """(head, queries, terms [B, t, S, D]): every term, some queries at a time."""
        batch, heads, steps, sources = self.pattern.shape
        size = max(1, _AT_ONCE // (batch * sources * self.write.shape[-1]))
        for head in range(heads):
            for start in range(0, steps, size):
                queries = slice(start, min(start + size, steps))
                yield head, queries, self.term(head, queries)

    def term(self, head: int, queries: slice) -> Tensor:
        """[B, t, S, D]: what a head carries to these query tokens from each source token."""
        pattern = self.pattern[:, head, queries, :, None]
        term = pattern * self.write[:, head, None]
        portion = pattern / self.rows[:, head, queries, None, None]
        if self.shared is not None:
            term = term + portion * self.shared
        term = term * self.deviation[:, queries, None, None]
        return term if self.constant is None else term + portion * self.constant


def moves_of(layer: Layer, run: "Run", work: torch.dtype) -> Moves:
    """The terms of one layer's attention, from a run that captured its `v`, `pattern`, `z` and `attn_out`.

    Raises ModelError where they do not add up to what attention added (a gate between values and output, say).
    """
    index, part = layer.block.index, layer.attention
    values, pattern = run[f"v.{index}"].to(work), run[f"pattern.{index}"].to(work)
    values = values.transpose(1, 2).repeat_interleave(part.n_heads // part.n_kv_heads, dim=1)
    out, scale = part.out_weight_HKD().detach().to(work), part.write.scale
    bias = getattr(part.out_proj, "bias", None)
    bias = None if bias is None else bias.detach().to(work)
    deviation = torch.ones(pattern.shape[0], pattern.shape[2], dtype=work, device=pattern.device)
    constant = None
    if layer.post_norm.module is not None:
        z = run[f"z.{index}"].to(work)
        mixed = torch.einsum("bthk,hkd->btd", z, out)
        mixed = mixed if bias is None else mixed + bias
        deviation = layer.post_norm.standardize(mixed)[1][..., 0]
        out = layer.post_norm.fold(out)
        bias = None if bias is None else layer.post_norm.fold(bias)
        constant = layer.post_norm.bias(work)
        constant = None if constant is None else constant * (scale / part.n_heads)
    write = torch.matmul(values, out * scale)
    shared = None if bias is None else bias * (scale / part.n_heads)
    moves = Moves(pattern, write, deviation, shared, constant)
    whole = run[f"attn_out.{index}"].to(work)
    error = float((moves.heads().sum(dim=1) - whole).norm() / whole.norm().clamp(min=1e-9))
    if not error <= _TOLERANCE.get(run[f"attn_out.{index}"].dtype, 0.1):
        raise ModelError(
            f"what the heads of layer {index} carry from token to token does not add up to what attention adds",
            got=f"relative difference {error:.2g}",
            wanted="attention whose output is its pattern times its values",
            fix="Use eap or patch, which do not look inside attention",
        )
    return moves


def captured(model: "Model", ids: Tensor, kinds: Sequence[str], **options: Any) -> "Run":
    """A run over [B, T] ids that keeps these kinds of sites in every layer. Raises ModelError for attention that shows
    no pattern.
    """
    try:
        return model.run(ids, capture=[f"{kind}.*" for kind in kinds], batch_size=len(ids), **options)
    except SiteError as error:
        raise ModelError(f"{model.name}: attention cannot be seen from inside", got=str(error)) from error

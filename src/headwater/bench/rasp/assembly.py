"""Pass 4: the weights of a plain transformer from a program's parts and their places.

Heads and neurons without a task get random weights that read everything and write only into scratch directions, which
nothing that reaches the logits reads: nodes outside the circuit do something, and none of it matters.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from headwater.bench.rasp.bases import Variable
from headwater.bench.rasp.language import Constant, Indices, RaspError, Tokens
from headwater.bench.rasp.layout import Layout
from headwater.bench.rasp.lowering import BOS, Head, Neurons, Projection, Read
from headwater.bench.rasp.words import BOS as BOS_WORD
from headwater.bench.rasp.words import NONE, word

MARGIN = 10.0
"""By how much the logit of the right answer lies above any other's; twice the margin over the undefined answer."""


def assemble(layout: Layout, output: Variable, ids: dict[str, int], *, max_length: int, causal: bool, seed: int) -> Any:
    """A PlainForCausalLM, float32, in evaluation mode. `ids`: the vocabulary, word -> token id."""
    from headwater.bench.plain import PlainConfig, PlainForCausalLM

    config = PlainConfig(
        vocab_size=len(ids),
        hidden_size=layout.d_model,
        intermediate_size=layout.d_mlp,
        num_hidden_layers=layout.n_layers,
        num_attention_heads=layout.n_heads,
        head_dim=layout.d_head,
        max_position_embeddings=max_length + 1,
        is_causal=causal,
        bos_token_id=ids[BOS_WORD],
    )
    hf = PlainForCausalLM(config).eval().requires_grad_(False)
    for parameter in hf.parameters():
        parameter.zero_()
    _embed(hf, layout, ids)
    generator = torch.Generator().manual_seed(seed)
    _idle(hf, layout, generator)
    for placed in layout.placed:
        block = hf.layers[placed.layer]
        if isinstance(placed.part, Head):
            _head(block.attn, layout, placed.part, placed.start)
        else:
            _neurons(block.mlp, layout, placed.part, placed.start)
    _embed_other_words(hf, layout, generator)
    _unembed(hf.lm_head, layout, output, ids)
    return hf.requires_grad_(True)


def _embed(hf: Any, layout: Layout, ids: dict[str, int]) -> None:
    hf.embed_tokens.weight[ids[BOS_WORD], layout.first[BOS]] = 1.0
    for variable in layout.first:
        start = layout.first[variable]
        match variable.expression:
            case Tokens():
                for direction, value in enumerate(variable.listed):
                    hf.embed_tokens.weight[ids[word(value)], start + direction] = 1.0
            case Indices():  # the first token has no index
                for direction in range(variable.width):
                    hf.embed_positions.weight[direction + 1, start + direction] = 1.0
            case Constant(value):
                column = torch.tensor(variable.column(value), dtype=torch.float32)
                hf.embed_positions.weight[1:, start : start + variable.width] = column


def _embed_other_words(hf: Any, layout: Layout, generator: torch.Generator) -> None:
    """Words that no input has (answers, say) also write something, into scratch directions.

    Else a model whose program reads no positions is silent on them, and what headwater probes at load with random words
    (does a changed attention pattern arrive?) would say of such a model that its attention cannot be seen.
    """
    weight = hf.embed_tokens.weight
    silent = (weight == 0).all(dim=1).nonzero().flatten()
    draw = torch.randn(len(silent), len(layout.scratch), generator=generator)
    weight[silent, layout.scratch.start : layout.scratch.stop] = draw


def _head(attn: Any, layout: Layout, head: Head, number: int) -> None:
    first = number * layout.d_head
    for projection, module in ((head.q, attn.q_proj), (head.k, attn.k_proj), (head.v, attn.v_proj)):
        rows = slice(first, first + projection.rows)
        module.weight[first : first + layout.d_head] = 0.0
        module.bias[first : first + layout.d_head] = 0.0
        _write_reads(module, rows, layout, projection.reads, projection)
    attn.o_proj.weight[:, first : first + layout.d_head] = 0.0
    for row, direction in enumerate(layout.directions(head.writes)):
        attn.o_proj.weight[direction, first + row] = 1.0


def _neurons(mlp: Any, layout: Layout, neurons: Neurons, first: int) -> None:
    rows = slice(first, first + neurons.n)
    mlp.up_proj.weight[rows] = 0.0
    _write_reads(mlp.up_proj, rows, layout, neurons.reads, neurons)
    mlp.down_proj.weight[:, rows] = 0.0
    directions = layout.directions(neurons.writes)
    mlp.down_proj.weight[directions.start : directions.stop, rows] = neurons.out.float()


def _write_reads(
    module: Any, rows: slice, layout: Layout, reads: Sequence[Read], constants: Projection | Neurons
) -> None:
    for read in reads:
        directions = layout.directions(read.variable)
        module.weight[rows, directions.start : directions.stop] += read.weight.float()
    module.weight[rows, layout.first[BOS]] += constants.bos.float()
    module.bias[rows] = constants.bias.float()


def _idle(hf: Any, layout: Layout, generator: torch.Generator) -> None:
    """Every head and neuron at first; those with a task are overwritten."""
    scratch = slice(layout.scratch.start, layout.scratch.stop)

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    for block in hf.layers:
        attn, mlp = block.attn, block.mlp
        for module in (attn.q_proj, attn.k_proj):
            module.weight.copy_(noise(module.weight, layout.d_head**-0.25))
        attn.v_proj.weight.copy_(noise(attn.v_proj.weight, layout.d_head**-0.5))
        mlp.up_proj.weight.copy_(noise(mlp.up_proj.weight, 0.5))
        mlp.up_proj.bias.copy_(noise(mlp.up_proj.bias, 0.5))
        for module in (attn.o_proj, mlp.down_proj):
            module.weight[scratch] = noise(module.weight[scratch], module.weight.shape[1] ** -0.5)
            module.bias[scratch] = 0.1  # also where all have a task, each half-layer writes something


def _unembed(lm_head: Any, layout: Layout, output: Variable, ids: dict[str, int]) -> None:
    """Logits that are largest at the program's value: exactly, and by MARGIN."""
    lm_head.bias.fill_(-2 * MARGIN)
    start = layout.first[output]
    if output.encoding == "categorical":
        for direction, value in enumerate(output.listed):
            lm_head.weight[ids[word(value)], start + direction] = 2 * MARGIN
            lm_head.bias[ids[word(value)]] = 0.0
        lm_head.bias[ids[NONE]] = MARGIN if output.optional else -2 * MARGIN
        return
    # The nearest number v to x has the largest v x - v^2 / 2; neighbours at distance d differ by d^2 / 2.
    gap = closest(output.listed)
    scale = 2 * MARGIN / gap**2
    for value in output.listed:
        lm_head.weight[ids[word(value)], start] = scale * float(value)
        lm_head.bias[ids[word(value)]] = -scale * float(value) ** 2 / 2
    most = max(abs(float(value)) for value in output.listed)
    others = [index for name, index in ids.items() if name not in {word(value) for value in output.listed}]
    lm_head.bias[others] = -scale * (most**2 / 2 + gap**2)


def closest(values: Iterable[Any]) -> float:
    """The smallest distance between two of these numbers; 1 where there is only one."""
    numbers = sorted(Fraction(value) for value in values)
    return min((float(b - a) for a, b in pairwise(numbers)), default=1.0)


def check_words(vocabulary: Sequence[Any], output: Variable) -> None:
    """Two values with one spelling cannot be told apart in text. Raises RaspError."""
    for values in (vocabulary, output.listed):
        spelled: dict[str, Any] = {}
        for value in values:
            if spelled.setdefault(word(value), value) != value:
                raise RaspError(
                    "two values are spelled alike", got=f"{value!r} and {spelled[word(value)]!r}", fix="Rename one"
                )

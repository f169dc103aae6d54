"""Modular addition written into the weights of a transformer by hand, so that its algorithm is known, not found."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from headwater.core.errors import MethodError
from headwater.core.groups import cyclic

if TYPE_CHECKING:
    from headwater.bench.toys.training import AlgebraModel


def by_hand(
    p: int = 43, frequencies: Sequence[int] = (3, 8, 13, 17, 20), *, phases: int = 16, scale: float = 8.0
) -> "AlgebraModel":
    """A one-layer transformer that adds modulo p by trigonometry in the given frequencies and in no other way.

    Embedding: cos and sin of 2 pi k a / p. One head of uniform attention adds both tokens. Neurons: ReLU of the sum at
    `phases` angles; their second harmonic is cos(2 pi k (a + b) / p), times |cos(pi k (a - b) / p)|. The logit of c is
    the sum over k of cos(2 pi k (a + b - c) / p) times that factor, so a share of 8 / pi^2 of the logits' variance
    lies along the pure algorithm. `scale`: of the logits. Raises MethodError for frequencies that are no irreps of two
    dimensions.
    """
    from headwater.bench.toys.training import AlgebraConfig, AlgebraModel, make_model

    wanted = sorted(set(frequencies))
    if not wanted or len(wanted) != len(frequencies) or not all(0 < k < p / 2 for k in wanted) or phases < 8:
        raise MethodError(
            "these frequencies cannot be written into a model",
            got=f"{list(frequencies)} modulo {p}, {phases} phases",
            wanted=f"different whole numbers of 1 to {(p - 1) // 2}, and 8 phases or more",
        )
    count = len(wanted)
    group = cyclic(p)
    config = AlgebraConfig(
        group=group.name, d_model=6 * count, n_heads=1, head_dim=2 * count, d_mlp=phases * count, steps=1
    )
    model = make_model(config, group, name=f"add-{p}-by-hand")
    hf = model.hf
    ids = torch.tensor([model.tokenizer.get_vocab()[word] for word in group.elements])
    turn = 2 * math.pi * torch.outer(torch.arange(p).double(), torch.tensor(wanted).double()) / p  # [p, F]
    angles = 2 * math.pi * torch.arange(phases).double() / phases
    with torch.no_grad():
        for weight in hf.parameters():
            weight.zero_()
        where = torch.arange(count)
        cos, sin = where, where + count  # directions of the tokens, then of their sum, then of the answer
        hf.embed_tokens.weight[ids[:, None], cos] = torch.cos(turn).float()
        hf.embed_tokens.weight[ids[:, None], sin] = torch.sin(turn).float()
        attention, mlp = hf.layers[0].attn, hf.layers[0].mlp
        both = torch.arange(2 * count)
        # uniform over the first token, a, b and "=": of the four only a and b have these directions
        attention.v_proj.weight[both, both] = 4.0
        attention.o_proj.weight[both + 2 * count, both] = 1.0
        for f in range(count):
            rows = slice(f * phases, (f + 1) * phases)
            mlp.up_proj.weight[rows, 2 * count + f] = torch.cos(angles).float()
            mlp.up_proj.weight[rows, 3 * count + f] = -torch.sin(angles).float()
            mlp.down_proj.weight[4 * count + f, rows] = torch.cos(2 * angles).float()
            mlp.down_proj.weight[5 * count + f, rows] = -torch.sin(2 * angles).float()
        gain = scale * 3 * math.pi / phases
        hf.lm_head.weight[ids[:, None], cos + 4 * count] = (gain * torch.cos(turn)).float()
        hf.lm_head.weight[ids[:, None], sin + 4 * count] = (gain * torch.sin(turn)).float()
    return AlgebraModel.of(model, group, config, key=[f"k{k}" for k in wanted])

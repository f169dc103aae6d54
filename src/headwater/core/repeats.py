"""Random tokens said twice, and which heads attend by the repetition: nothing else can be attended to there (Elhage et
al., 2021; Olsson et al., 2022)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from headwater.core.model import Model


def repeated_tokens(model: "Model", *, sequences: int = 12, length: int = 20, seed: int = 0) -> Tensor:
    """[sequences, 2 * length] token ids: random ones (none special), said twice; shorter where the context is."""
    generator = torch.Generator().manual_seed(seed)
    special: set[int] = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    usable = torch.tensor([token for token in range(model.d_vocab) if token not in special])
    if model.max_length is not None:
        length = min(length, model.max_length // 2)
    return usable[torch.randint(len(usable), (sequences, length), generator=generator)].repeat(1, 2)


def attention_on_random_tokens(
    model: "Model", *, sequences: int = 12, length: int = 20, seed: int = 0
) -> dict[str, Tensor]:
    """Mean attention [L, H] to the place of each role, on `sequences` of `length` random tokens said twice.

    Read at the second half: the token before, the same token in the first half, the token after that one.
    """
    ids = repeated_tokens(model, sequences=sequences, length=length, seed=seed)
    pattern, half = patterns(model, ids), ids.shape[1] // 2
    at = torch.arange(half, 2 * half)
    places = {"previous_token": at - 1, "duplicate_token": at - half, "induction": at - half + 1}
    return {role: pattern[:, :, :, at, to].mean(dim=(0, 3)).double() for role, to in places.items()}


def patterns(model: "Model", ids: Tensor) -> Tensor:
    """[B, L, H, T, S]: every head's attention."""
    run = model.run(ids, capture="pattern.*", logits="none")
    return torch.stack([run[f"pattern.{layer}"] for layer in range(model.n_layers)], dim=1).cpu().float()

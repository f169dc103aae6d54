"""Minimal pairs in the words of a made-up tokenizer, so that a model with random weights has a behavior to run."""

from __future__ import annotations

from typing import Any

import torch


def word_tokenizer(size: int) -> Any:
    """A tokenizer of `size` words w0, w1, ...: one word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def random_pairs(n: int, length: int, shared: int, vocabulary: int, seed: int = 0) -> Any:
    """A Behavior of `n` pairs of `length` tokens: the first `shared` are equal, the next differs, the rest is equal."""
    import headwater as hw

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(n):
        ids = torch.randperm(vocabulary - 1, generator=generator)[: length + 3] + 1
        answer, foil, other = ids[length:].tolist()
        clean, corrupt = ids[:length].tolist(), ids[:length].tolist()
        corrupt[shared] = other
        rows.append(
            {
                "id": str(number),
                "prompt": " ".join(f"w{i}" for i in clean),
                "counterfactual": " ".join(f"w{i}" for i in corrupt),
                "answers": [f" w{answer}"],
                "foils": [f" w{foil}"],
                "split": "train",
            }
        )
    return hw.Behavior.from_rows(rows, name="random_pairs")

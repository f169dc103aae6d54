"""Tiny random models with a real tokenizer, made in memory: what the tests, and the snippets of the docs, run on.

The tokenizer is a byte-level BPE, as GPT-2's and Llama-3's are: it reads any text, and every word of `words.txt` is one
token after a space (and, where it starts with a capital, at the start of a text too), so that pairs of prompts align as
they do in real models.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPACE = "Ġ"  # how byte-level BPE spells a leading space


@functools.cache
def _bpe() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    from tokenizers.pre_tokenizers import ByteLevel

    words = Path(__file__).with_name("words.txt").read_text().split()
    # Spellings grow from the left, one character a merge. Those that begin with a space come first, so that no merge
    # meant for the start of a text can fire inside a word.
    spelled = [SPACE + word for word in words] + [word for word in words if word[0].isupper()]
    merges: dict[tuple[str, str], None] = {}
    for word in spelled:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    vocabulary = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    return {token: index for index, token in enumerate(vocabulary)}, tuple(merges)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the words of `words.txt`; it adds no special tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = _bpe()
    backend = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, bos_token=end, unk_token=end, clean_up_tokenization_spaces=False
    )


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama: 3 layers, 4 query heads over 2 key/value heads, width 32, context 256."""
    settings = {
        "vocab_size": len(_bpe()[0]),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # ten times the usual: heads attend somewhere, effects are not lost in rounding
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype).eval()


def tiny_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """A random GPT-2: 3 layers, 4 heads, width 32, context 256."""
    settings = {
        "vocab_size": len(_bpe()[0]),
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**{**settings, **config})).to(dtype).eval()


def save_tiny(folder: Path, family: str = "llama", **config: Any) -> Path:
    """Save a tiny model and its tokenizer as `transformers` would, for tests that load a local folder."""
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[family](**config)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... of one token each, so that prompts can be written for a model with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
